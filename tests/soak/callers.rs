//! Callers: some come again and again, some once; some are patient, some go away; all count what they see.

use crate::{chance::Dice, upstream::Upstream};
use axum::{
    body::Bytes,
    http::{Request, Response},
};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, Error, connect::HttpConnector},
    rt::TokioExecutor,
};
use portcullis::ManualClock;
use serde_json::Value;
use std::{net::SocketAddr, ops::AddAssign, time::Duration};
use tokio::select;

/// What becomes of requests.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Each limit of the pair has admitted them.
    pub(crate) admitted_for_caller: u64,
    pub(crate) admitted_for_all: u64,
    pub(crate) over_callers_limit: u64,
    pub(crate) over_limit_of_all: u64,
    pub(crate) keyless: u64,
    pub(crate) open: u64,
    pub(crate) half_open_full: u64,
    pub(crate) answered: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
}

impl Tally {
    fn parts(&mut self) -> [&mut u64; 10] {
        [
            &mut self.admitted_for_caller,
            &mut self.admitted_for_all,
            &mut self.over_callers_limit,
            &mut self.over_limit_of_all,
            &mut self.keyless,
            &mut self.open,
            &mut self.half_open_full,
            &mut self.answered,
            &mut self.failed,
            &mut self.cancelled,
        ]
    }

    /// A soak that meets nothing shows nothing.
    pub(crate) fn met_everything(mut self) -> bool {
        self.parts().iter().all(|part| **part > 0)
    }

    fn admit(&mut self) {
        self.admitted_for_caller += 1;
        self.admitted_for_all += 1;
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, mut other: Self) {
        for (part, more) in self.parts().into_iter().zip(other.parts()) {
            *part += *more;
        }
    }
}

pub(crate) struct Caller {
    gateway: SocketAddr,
    upstream: Upstream,
    clock: ManualClock,
    dice: Dice,
    client: Client<HttpConnector, Empty<Bytes>>,
}

/// What a request came to.
enum Came {
    /// It may be tried again after that time.
    Refused(Duration),
    Done,
}

impl Caller {
    pub(crate) fn new(gateway: SocketAddr, upstream: &Upstream, clock: &ManualClock, dice: Dice) -> Self {
        Self {
            gateway,
            upstream: upstream.clone(),
            clock: clock.clone(),
            dice,
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// Makes so many requests.
    pub(crate) async fn make(mut self, requests: u64, is_ill: bool) -> Tally {
        let mut seen = Tally::default();
        let mut left = requests;
        while left > 0 {
            let what = self.anything(is_ill);
            let caller = self.anybody();
            // Some try again, and wait for as long as they are told: here that is what has time pass.
            let mut tries = self.dice.below(3).min(left - 1) + 1;
            while tries > 0 {
                (left, tries) = (left - 1, tries - 1);
                self.clock.advance(Duration::from_millis(1));
                match self.ask(what, caller.as_deref(), &mut seen).await {
                    Came::Refused(wait) if tries > 0 => self.clock.advance(wait.min(Duration::from_millis(20))),
                    Came::Refused(_) | Came::Done => break,
                }
            }
        }
        seen
    }

    /// One request that is answered, unless it is refused: then time passes.
    pub(crate) async fn ask_well(&mut self, seen: &mut Tally) {
        if let Came::Refused(wait) = self.ask("stream", Some("monitor"), seen).await {
            self.clock.advance(wait);
        }
    }

    fn anything(&mut self, is_ill: bool) -> &'static str {
        let healthy = if is_ill { 30 } else { 90 };
        match self.dice.below(100) {
            roll if roll < healthy => ["answer", "stream"][usize::from(self.dice.once_in(2))],
            _ => match self.dice.below(8) {
                0..4 => "fail",
                4 | 5 => "break",
                6 => "stall",
                _ => "hang",
            },
        }
    }

    fn anybody(&mut self) -> Option<String> {
        match self.dice.below(100) {
            0..2 => None,
            2..40 => Some(format!("stranger {}", self.dice.below(u64::MAX))),
            // One of them asks more often than all others.
            40..50 => Some("regular 0".into()),
            _ => Some(format!("regular {}", self.dice.below(60))),
        }
    }

    async fn ask(&mut self, what: &'static str, caller: Option<&str>, seen: &mut Tally) -> Came {
        let id = self.dice.below(u64::MAX);
        let request = Request::get(format!("http://{}/ask/{what}/{id}", self.gateway));
        let request = match caller {
            Some(caller) => request.header("x-caller", caller),
            None => request,
        };
        let answer = self.client.request(request.body(Empty::new()).expect("valid"));
        let answer = if what == "hang" {
            let hangs = self.upstream.hangs(id);
            select! {
                answer = answer => {
                    self.upstream.forget(id);
                    answer
                }
                // It goes away with the request.
                _ = hangs => {
                    seen.admit();
                    seen.cancelled += 1;
                    return Came::Done;
                }
            }
        } else {
            answer.await
        };
        self.read(what, answer, seen).await
    }

    async fn read(&mut self, what: &str, answer: Result<Response<Incoming>, Error>, seen: &mut Tally) -> Came {
        let mut answer = match answer {
            Ok(answer) => answer,
            // The gateway may have had no time to send the head.
            Err(_) if what == "break" => {
                seen.admit();
                seen.failed += 1;
                return Came::Done;
            }
            Err(error) => panic!("{what}: {error}"),
        };
        match (answer.status().as_u16(), what) {
            (200, "stall") => {
                let piece = answer.frame().await.expect("one piece").expect("is there");
                assert_eq!(piece.into_data().expect("bytes"), "one ");
                seen.admit();
                seen.cancelled += 1;
                Came::Done
            }
            (200, "break") => {
                answer.collect().await.expect_err("breaks off");
                seen.admit();
                seen.failed += 1;
                Came::Done
            }
            (200, "answer" | "stream") => {
                let body = answer.collect().await.expect("complete").to_bytes();
                assert!(
                    ["an answer", "one two "].contains(&&*String::from_utf8_lossy(&body)),
                    "{body:?}"
                );
                seen.admit();
                seen.answered += 1;
                Came::Done
            }
            // Broken off before the gateway had a head.
            (500, "fail") | (502, "break") => {
                answer.collect().await.expect("complete");
                seen.admit();
                seen.failed += 1;
                Came::Done
            }
            (400 | 429 | 503, _) => refused(answer, seen).await,
            (status, _) => panic!("{what}: {status}"),
        }
    }

    pub(crate) async fn metrics(&self) -> String {
        let uri = format!("http://{}/admin/metrics", self.gateway);
        let page = self.client.get(uri.parse().expect("valid")).await.expect("answers");
        let page = page.collect().await.expect("complete").to_bytes();
        String::from_utf8(page.into()).expect("text")
    }
}

/// Counts a refusal by its problem document.
async fn refused(answer: Response<Incoming>, seen: &mut Tally) -> Came {
    let status = answer.status().as_u16();
    let problem = answer.collect().await.expect("complete").to_bytes();
    let problem: Value = serde_json::from_slice(&problem).expect("a problem document");
    let text = |at: &str| problem.pointer(at).and_then(Value::as_str);
    match (status, text("/circuit-state"), text("/violated-policies/0")) {
        (400, None, None) => {
            seen.keyless += 1;
            return Came::Done;
        }
        (429, None, Some("per-caller")) => seen.over_callers_limit += 1,
        (429, None, Some("all")) => seen.over_limit_of_all += 1,
        (503, Some(state), Some("upstream")) => {
            seen.admit();
            match state {
                "open" => seen.open += 1,
                "half_open" => seen.half_open_full += 1,
                _ => panic!("{problem}"),
            }
        }
        _ => panic!("{status}: {problem}"),
    }
    let wait = problem["retry-after-ms"].as_u64().expect("a time");
    Came::Refused(Duration::from_millis(wait))
}
