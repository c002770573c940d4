//! What is printed: the registry's events as they come, and its status now and then.

use crate::options::Options;
use portcullis::{Clock, Event, EventKind, Name, Reason, Registry, Rejected, State, Timestamp};
use std::{
    collections::HashMap,
    fmt::Display,
    io::{Write, stdout},
    net::SocketAddr,
    time::Duration,
};
use tokio::{
    select,
    time::{MissedTickBehavior, interval},
};

/// Of rejections alike, one is printed in this time.
const SAMPLE: Duration = Duration::from_secs(4);
const STATUS: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub(crate) struct Console {
    clock: Clock,
    start: Timestamp,
}

impl Console {
    pub(crate) fn new() -> Self {
        let clock = Clock::system();
        let start = clock.now();
        Self { clock, start }
    }

    pub(crate) fn say(&self, whom: &str, what: impl Display) {
        let seconds = self.clock.now().duration_since(self.start).as_secs_f64();
        print(format!("{seconds:>6.1} s  {whom:<15}  {what}"));
    }

    /// Prints what happens, for ever.
    pub(crate) async fn watch(&self, registry: &Registry, gateway: SocketAddr, options: &Options) {
        let mut events = registry.subscribe(1024);
        let mut rejections = Rejections::default();
        let mut seen = 0;
        let mut ticks = interval(STATUS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.reset();
        print(welcome(gateway, options));
        loop {
            select! {
                event = events.recv() => {
                    if let Some(event) = event && let Some(line) = rejections.line(&event) {
                        self.say(&event.service, line);
                    }
                }
                _ = ticks.tick() => {
                    let (line, calls) = summary(registry);
                    // Nobody called, nothing to tell.
                    if calls > seen {
                        self.say("status", line);
                    }
                    seen = calls;
                }
            }
        }
    }
}

/// Whoever reads this may have gone away (`| head`): no reason to stop serving.
fn print(line: impl Display) {
    let _ = writeln!(stdout(), "{line}");
}

fn welcome(gateway: SocketAddr, options: &Options) -> String {
    let open = options.cycle / 8;
    let what = if options.traffic {
        format!(
            "
What to watch, again every {:?}:
  research         fails for a while. Its circuit opens, and callers get a 503 at once instead of waiting for a 500;
                   {open:?} later it is half-open and lets probes through; two good ones close it.
  summarizer       fails later on. While its circuit is open, a simpler summarizer answers, and then a cache.
  data_processing  is called 8 times at once every 6 s. It takes 5 calls in any 5 s; the others get a 429.
A `caller` line tells when callers begin to see something else. Of rejections alike, one in {SAMPLE:?} is printed.",
            options.cycle
        )
    } else {
        format!(
            "
No traffic but yours. research and summarizer fail by turns, each for {:?} out of {:?}. Try:
  while sleep 0.2; do curl -i http://{gateway}/agents/research; done",
            options.cycle / 4,
            options.cycle
        )
    };
    format!(
        "The gateway listens; Ctrl-C stops it:
  curl -i http://{gateway}/agents/research   or data_processing, summarizer; any method, any body
  curl http://{gateway}/admin/status         or /admin/status/research, /admin/metrics, /admin/livez, /admin/readyz
{what}
"
    )
}

/// Samples rejections, so that everything else stays readable: when one of a kind was last printed.
#[derive(Default)]
struct Rejections(HashMap<(Name, Option<Name>, Reason), Timestamp>);

impl Rejections {
    /// The line for an event, if it is to have one.
    fn line(&mut self, event: &Event) -> Option<String> {
        match &event.kind {
            EventKind::Transition { from, to, .. } => Some(transition(*from, *to)),
            EventKind::Rejected(why) => self.rejection(why, event.at),
            other => Some(format!("{other:?}")),
        }
    }

    fn rejection(&mut self, why: &Rejected, at: Timestamp) -> Option<String> {
        let kind = (why.service.clone(), why.limit.clone(), why.reason);
        if let Some(last) = self.0.get(&kind)
            && at.duration_since(*last) < SAMPLE
        {
            return None;
        }
        self.0.insert(kind, at);
        Some(format!("rejected: {why}"))
    }
}

fn transition(from: State, to: State) -> String {
    let why = match (from, to) {
        (_, State::HalfOpen) => "its open time is over, probes may pass",
        (State::HalfOpen, State::Open) => "a probe failed",
        (_, State::Open) => "too many failures in a row",
        (_, State::Closed) => "the probes succeeded",
    };
    format!("CIRCUIT {} -> {}: {why}", from.as_str(), to.as_str())
}

/// One line about everything, and how many calls there have been.
fn summary(registry: &Registry) -> (String, u64) {
    let (mut states, mut calls, mut answered, mut failed, mut rejected) = (Vec::new(), 0, 0, 0, 0);
    for (name, service) in registry.status().services {
        if let Some(circuit) = service.circuit_breaker {
            states.push(format!("{name} {}", circuit.state.as_str()));
            answered += circuit.metrics.successful_requests;
            failed += circuit.metrics.failed_requests;
            rejected += circuit.metrics.rejected_requests;
        }
        for limiter in service.rate_limiters {
            calls += limiter.accepted_requests + limiter.rejected_requests;
            rejected += limiter.rejected_requests;
        }
    }
    let states = states.join(", ");
    (
        format!("{states}; {answered} answered, {failed} failed, {rejected} rejected"),
        calls,
    )
}
