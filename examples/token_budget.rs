//! A streaming agent under a limit of tokens a minute: a call reserves an estimate and settles what its answer really took.
//!
//! Run it: `cargo run --example token_budget`

use axum::body::Body;
use futures_util::{StreamExt, stream};
use http::{Request, Response};
use http_body_util::BodyExt;
use portcullis::{BoxError, CostMeter, RateLimitLayer, RateLimiter, TokenBucket};
use std::{convert::Infallible, time::Duration};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

/// What a prompt may cost: its words, and an answer of at most fifty.
fn estimate(request: &Request<String>) -> u32 {
    u32::try_from(request.body().split_whitespace().count())
        .unwrap_or(u32::MAX)
        .saturating_add(50)
}

/// Stands in for a language model: as many words as asked for, one by one. The meter goes with the answer and counts them as
/// they are sent.
async fn model(request: Request<String>) -> Result<Response<Body>, Infallible> {
    let prompt = u32::try_from(request.body().split_whitespace().count()).unwrap_or(u32::MAX);
    let words: usize = request
        .body()
        .split_whitespace()
        .find_map(|word| word.parse().ok())
        .unwrap_or(1);
    let meter = CostMeter::new();
    meter.add(prompt);
    let counted = meter.clone();
    let answer = stream::iter(std::iter::repeat_n("word ", words)).map(move |word| {
        counted.add(1);
        Ok::<_, Infallible>(word)
    });
    let mut response = Response::new(Body::from_stream(answer));
    response.extensions_mut().insert(meter);
    Ok(response)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let budget = RateLimiter::builder("model", TokenBucket::new(190, Duration::from_secs(60)))
        .limit("tokens")
        .build()?;
    let mut agent = ServiceBuilder::new()
        .layer(RateLimitLayer::http(budget.cost(estimate)))
        .service(service_fn(model));
    let left = || budget.quota().remaining;
    println!("{} tokens a minute", left());

    let ask = |prompt: &str| Request::new(String::from(prompt));
    let answer = agent.ready().await?.call(ask("say 10 words")).await?;
    println!("reserved: {} left", left());
    answer.into_body().collect().await?;
    println!("settled at the end of the stream: {} left", left());

    let mut answer = agent.ready().await?.call(ask("say 9 words")).await?.into_body();
    answer.frame().await;
    drop(answer);
    println!("gone after one word: {} left", left());

    let answer = agent.ready().await?.call(ask("say 160 words")).await?;
    answer.into_body().collect().await?;
    println!("more than was reserved: {} left", left());

    let refused = agent.ready().await?.call(ask("say 1 word")).await?;
    println!(
        "{}: {}",
        refused.status(),
        String::from_utf8_lossy(&refused.into_body().collect().await?.to_bytes())
    );
    Ok(())
}
