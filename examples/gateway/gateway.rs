//! The gateway: what stands between a caller and each agent.

use crate::{agents::Agents, options::Options};
use axum::{
    Json, Router,
    body::Body,
    extract::Request,
    http::{
        HeaderMap, StatusCode, Uri, Version,
        header::{self, HeaderName},
        uri::PathAndQuery,
    },
    response::{IntoResponse, Response},
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use portcullis::{
    BoxError, CircuitBreakerConfig, CircuitBreakerLayer, Outcome, RateLimitLayer, Registry, RegistryError, Rejected,
    SlidingWindow, TokenBucket,
};
use serde_json::json;
use std::{convert::Infallible, net::SocketAddr, time::Duration};
use tokio::time::timeout;
use tower::{Service, ServiceBuilder, service_fn};

pub(crate) fn router(registry: &Registry, agents: &Agents, options: &Options) -> Result<Router, RegistryError> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let circuit = CircuitBreakerConfig::default()
        .failure_threshold(3)
        .recovery_timeout(options.cycle / 8);

    // From the outside in: the limiter counts every call, the breaker only sees the admitted ones, the timeout is inside the
    // breaker so that an agent that hangs counts as one that fails. A rejected caller gets a 429 or 503 that says why.
    let limiter = registry.rate_limiter("research", TokenBucket::new(100, Duration::from_secs(1)))?;
    // Critical: `/admin/readyz` fails while this circuit is open.
    let breaker = registry.circuit_breaker("research", circuit.clone().critical(true))?;
    let research = ServiceBuilder::new()
        .layer(RateLimitLayer::new(limiter).fallback_with(rejection))
        .layer(
            CircuitBreakerLayer::new(breaker)
                .classify(judge)
                .fallback_with(rejection),
        )
        .service(agent(&client, agents.research.address));

    // Takes no more than five calls in any five seconds.
    let limiter = registry.rate_limiter("data_processing", SlidingWindow::new(5, Duration::from_secs(5)))?;
    let breaker = registry.circuit_breaker("data_processing", circuit.clone())?;
    let data_processing = ServiceBuilder::new()
        .layer(RateLimitLayer::new(limiter).fallback_with(rejection))
        .layer(
            CircuitBreakerLayer::new(breaker)
                .classify(judge)
                .fallback_with(rejection),
        )
        .service(agent(&client, agents.data_processing.address));

    // Degrades instead of refusing. While its circuit is open a simpler agent answers; when that one has too much to do, or
    // the summarizer itself, an answer comes from the cache.
    let limiter = registry.named_rate_limiter("summarizer", "simple", SlidingWindow::new(6, options.cycle / 4))?;
    let simple = ServiceBuilder::new()
        .layer(RateLimitLayer::new(limiter).fallback(service_fn(cached_summary)))
        .service(service_fn(simple_summary));
    let limiter = registry.rate_limiter("summarizer", TokenBucket::new(100, Duration::from_secs(1)))?;
    let breaker = registry.circuit_breaker("summarizer", circuit)?;
    let summarizer = ServiceBuilder::new()
        .layer(RateLimitLayer::new(limiter).fallback(service_fn(cached_summary)))
        .layer(CircuitBreakerLayer::new(breaker).classify(judge).fallback(simple))
        .service(agent(&client, agents.summarizer.address));

    Ok(Router::new()
        .route_service("/agents/research", research)
        .route_service("/agents/data_processing", data_processing)
        .route_service("/agents/summarizer", summarizer)
        .nest_service("/admin", registry.admin())
        .fallback(async || problem(StatusCode::NOT_FOUND, json!({ "detail": NOT_FOUND }))))
}

const NOT_FOUND: &str = "there are /agents/research, /agents/data_processing, /agents/summarizer, /admin/status, \
    /admin/status/{service}, /admin/metrics, /admin/livez and /admin/readyz";

/// What counts as a failure: an answer that blames the agent. A 4xx is the caller's fault.
fn judge(result: &Result<Response, Infallible>) -> Outcome {
    match result {
        Ok(answer) if !answer.status().is_server_error() => Outcome::Success,
        _ => Outcome::Failure,
    }
}

/// What a rejected caller gets: 429 from a limiter, 503 from a circuit breaker, when to come back, and why.
async fn rejection(_: Request, why: Rejected) -> Result<Response, Infallible> {
    let status = match why.limit {
        Some(_) => StatusCode::TOO_MANY_REQUESTS,
        None => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut answer = problem(
        status,
        json!({
            "detail": why.to_string(),
            "service": why.service.as_str(),
            "limit": why.limit.as_deref(),
            "reason": why.reason.as_str(),
            "retry_after": why.retry_after.map(|wait| wait.as_secs_f64()),
        }),
    );
    if let Some(seconds) = why.retry_after_secs() {
        answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    Ok(answer)
}

/// The fallback: simpler than the agent, but always there.
async fn simple_summary(_: Request) -> Result<Response, Infallible> {
    Ok(summary(
        "simple_summarizer",
        "the first sentence, for want of a better summary",
    ))
}

/// The last resort.
async fn cached_summary(_: Request) -> Result<Response, Infallible> {
    Ok(summary("cache", "yesterday's summary"))
}

fn summary(agent: &'static str, answer: &str) -> Response {
    Json(json!({ "agent": agent, "answer": answer })).into_response()
}

/// The agent as a service. One that gives no answer makes for a 502, so that nothing here fails.
fn agent(
    client: &Client<HttpConnector, Body>,
    address: SocketAddr,
) -> impl Service<Request, Response = Response, Error = Infallible, Future: Send> + Clone + Send + Sync + 'static {
    let client = client.clone();
    service_fn(move |request| {
        let client = client.clone();
        async move {
            Ok(forward(&client, address, request).await.unwrap_or_else(|error| {
                let detail = format!("the agent gave no answer: {error}");
                problem(StatusCode::BAD_GATEWAY, json!({ "detail": detail }))
            }))
        }
    })
}

/// Makes the call, over a real HTTP client, with a timeout.
async fn forward(
    client: &Client<HttpConnector, Body>,
    agent: SocketAddr,
    mut request: Request,
) -> Result<Response, BoxError> {
    let query = request.uri().query();
    let path: PathAndQuery = query.map_or(String::from("/"), |query| format!("/?{query}")).parse()?;
    let uri = Uri::builder().scheme("http").authority(agent.to_string());
    *request.uri_mut() = uri.path_and_query(path).build()?;
    *request.version_mut() = Version::HTTP_11;
    request.headers_mut().remove(header::HOST);
    remove_hop_by_hop(request.headers_mut());
    let mut answer = timeout(Duration::from_secs(2), client.request(request))
        .await??
        .map(Body::new);
    remove_hop_by_hop(answer.headers_mut());
    Ok(answer)
}

/// Removes what concerns one connection only and is not to be forwarded (RFC 9110 §7.6.1).
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let mut named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    named.extend([
        header::CONNECTION,
        header::TE,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ]);
    named.push(HeaderName::from_static("keep-alive"));
    for name in named {
        headers.remove(name);
    }
}

/// A refusal as RFC 9457 has it.
fn problem(status: StatusCode, mut members: serde_json::Value) -> Response {
    members["title"] = status.canonical_reason().into();
    members["status"] = status.as_u16().into();
    let headers = [
        (header::CONTENT_TYPE, "application/problem+json"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (status, headers, members.to_string()).into_response()
}
