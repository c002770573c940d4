//! An axum server with a limit for each route and one for each caller, and a client that meets them.
//!
//! Run it: `cargo run --example axum_server --features axum`

use axum::{Router, http::Method, routing::get};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use portcullis::{BoxError, PerRoute, RateLimitLayer, Registry, SlidingWindow, TokenBucket, key, policy::Missing};
use std::{
    future::IntoFuture,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};
use tokio::net::TcpListener;

fn app(registry: &Registry) -> Result<Router, BoxError> {
    let minute = Duration::from_secs(60);

    // One layer for the whole app picks the limit by the route's template.
    let searches = registry.named_rate_limiter("api", "search", TokenBucket::new(3, minute))?;
    let others = registry.named_rate_limiter("api", "other", TokenBucket::new(100, minute))?;
    let per_route = PerRoute::builder()
        .route(Method::GET, "/search/{topic}", searches)
        .exempt("/health")
        .default(others)
        .build()?;

    // One more tells callers apart. Who names no key shares one limit with the others who do not.
    let callers = registry.keyed_rate_limiter("api", "per-caller", TokenBucket::new(5, minute), 10_000)?;
    let per_caller = callers.by(key::header("x-api-key")?).missing(Missing::Shared);

    // A limit on one route alone.
    let reports = registry.named_rate_limiter("api", "report", SlidingWindow::new(1, minute))?;

    Ok(Router::new()
        .route("/search/{topic}", get(async || "found\n"))
        .route(
            "/report",
            get(async || "all is well\n").route_layer(RateLimitLayer::http(reports)),
        )
        .route("/health", get(async || "ok\n"))
        .layer(RateLimitLayer::http(per_route))
        .layer(RateLimitLayer::http(per_caller))
        .nest_service("/admin", registry.admin()))
}

async fn ask(server: SocketAddr, path: &str, key: &str) -> Result<(), BoxError> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let request = Request::get(format!("http://{server}{path}")).header("x-api-key", key);
    let answer = client.request(request.body(Empty::new())?).await?;
    let status = answer.status();
    let mut limits = String::new();
    for value in answer.headers().get_all("ratelimit") {
        limits.push_str("  ");
        limits.push_str(value.to_str()?);
    }
    println!("{key:>5} {path:<16} {status}{limits}");
    if !status.is_success() {
        println!(
            "      {}",
            String::from_utf8_lossy(&answer.into_body().collect().await?.to_bytes())
        );
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let registry = Registry::new();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let server = listener.local_addr()?;
    tokio::spawn(axum::serve(listener, app(&registry)?).into_future());

    for topic in ["rust", "tower", "gates"] {
        ask(server, &format!("/search/{topic}"), "alice").await?;
    }
    ask(server, "/search/moats", "alice").await?; // the route's limit, whatever the topic
    ask(server, "/report", "alice").await?;
    ask(server, "/health", "alice").await?; // exempt from the routes' limits, not from the caller's
    ask(server, "/report", "bob").await?; // another caller, the same route

    let callers = registry
        .get_keyed_rate_limiter("api", "per-caller")
        .expect("made above");
    println!("callers known: {}", callers.status().keys.expect("keyed").tracked);
    Ok(())
}
