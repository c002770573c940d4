//! The callers: they use the gateway as anybody would, and tell when its answers change.

use crate::console::Console;
use axum::{
    body::Body,
    http::{Request, Uri},
};
use futures_util::future::{join_all, join3};
use http_body_util::BodyExt;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use std::{net::SocketAddr, time::Duration};
use tokio::time::{MissedTickBehavior, interval};

type HttpClient = Client<HttpConnector, Body>;

/// A steady trickle to the agents that fail, and to the limited one a burst now and then.
pub(crate) async fn run(gateway: SocketAddr, cycle: Duration, console: Console) {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let calls = |agent, at_once, every| call(&client, &console, gateway, agent, at_once, every);
    join3(
        calls("research", 1, cycle / 96),
        calls("data_processing", 8, Duration::from_secs(6)),
        calls("summarizer", 1, cycle / 96),
    )
    .await;
}

/// Calls an agent for ever, so many times at once.
async fn call(
    client: &HttpClient,
    console: &Console,
    gateway: SocketAddr,
    agent: &str,
    at_once: usize,
    every: Duration,
) {
    let uri = Uri::try_from(format!("http://{gateway}/agents/{agent}")).expect("a valid address");
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = Vec::new();
    loop {
        ticks.tick().await;
        let mut answers = join_all((0..at_once).map(|_| ask(client, &uri))).await;
        answers.sort();
        let kinds: Vec<String> = answers
            .chunk_by(|one, next| one == next)
            .map(|alike| format!("{} x {}", alike.len(), alike[0]))
            .collect();
        if kinds != before {
            console.say(
                "caller",
                format!("{agent}: {}", kinds.join(", ").trim_start_matches("1 x ")),
            );
            before = kinds;
        }
    }
}

/// What the caller sees: the status, and which agent it was that answered.
async fn ask(client: &HttpClient, uri: &Uri) -> String {
    let mut request = Request::new(Body::from("what is new?"));
    *request.uri_mut() = uri.clone();
    match client.request(request).await {
        Ok(answer) => {
            let status = answer.status();
            let body = answer.into_body().collect().await;
            let members: Value = body
                .ok()
                .and_then(|body| serde_json::from_slice(&body.to_bytes()).ok())
                .unwrap_or_default();
            match members["agent"].as_str() {
                Some(agent) => format!("{status} from {agent}"),
                None => format!("{status} from the gateway"),
            }
        }
        Err(error) => format!("no answer: {error}"),
    }
}
