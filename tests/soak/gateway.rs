//! The gateway, and what its metrics page says.

use crate::{Gauge, callers::Tally};
use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{Request, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use portcullis::{
    BoxError, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerLayer, KeyedRateLimiter, KeysStatus, ManualClock,
    RateLimitLayer, Registry, TokenBucket, key, policy::Missing,
};
use std::{net::SocketAddr, time::Duration};
use tower::{ServiceBuilder, ServiceExt, util::BoxCloneSyncService};

/// How many callers have a quota of their own.
pub(crate) const KEYS: usize = 48;
pub(crate) const SUCCESSES: u32 = 2;

pub(crate) struct Gateway {
    registry: Registry,
    upstream: SocketAddr,
    pub(crate) breaker: CircuitBreaker,
    pub(crate) callers: KeyedRateLimiter,
    /// Requests that wait for the head of an answer.
    pub(crate) running: Gauge,
}

/// What a handler needs.
#[derive(Clone)]
struct Way {
    upstream: SocketAddr,
    client: BoxCloneSyncService<Request<Body>, Response, BoxError>,
    running: Gauge,
}

impl Gateway {
    pub(crate) fn new(clock: &ManualClock, upstream: SocketAddr) -> Self {
        let registry = Registry::with_clock(clock);
        let config = CircuitBreakerConfig::default()
            .failure_threshold(5)
            .recovery_timeout(Duration::from_millis(50))
            .success_threshold(SUCCESSES);
        let bucket = TokenBucket::new(10, Duration::from_secs(1)).burst(20);
        Self {
            upstream,
            breaker: registry.circuit_breaker("upstream", config).unwrap(),
            callers: registry.keyed_rate_limiter("api", "per-caller", bucket, KEYS).unwrap(),
            registry,
            running: Gauge::default(),
        }
    }

    pub(crate) fn app(&self) -> Router {
        let all = TokenBucket::new(600, Duration::from_secs(1)).burst(20);
        let all = self.registry.named_rate_limiter("api", "all", all).unwrap();
        let per_caller = self
            .callers
            .by(key::header("x-caller").unwrap())
            .missing(Missing::Reject);
        let client = ServiceBuilder::new()
            .map_response(|answer: axum::http::Response<_>| answer.map(Body::new))
            .layer(CircuitBreakerLayer::http(self.breaker.clone()))
            .service(Client::builder(TokioExecutor::new()).build_http());
        let way = Way {
            upstream: self.upstream,
            client: BoxCloneSyncService::new(client.map_err(Into::into)),
            running: self.running.clone(),
        };
        Router::new()
            .route("/ask/{what}/{id}", get(ask))
            .with_state(way)
            // The keyed one last: it would not take back what it gave to a key that has made room for another meanwhile.
            .layer(RateLimitLayer::http((all, per_caller)))
            .nest_service("/admin", self.registry.admin())
    }

    pub(crate) fn keys(&self) -> KeysStatus {
        self.callers.status().keys.expect("keyed")
    }
}

async fn ask(State(way): State<Way>, Path((what, id)): Path<(String, u64)>) -> Response {
    let _running = way.running.enter();
    let uri = format!("http://{}/{what}/{id}", way.upstream);
    let request = Request::get(uri).body(Body::empty()).expect("valid");
    match way.client.oneshot(request).await {
        Ok(answer) => answer,
        Err(error) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    }
}

/// The value of a sample, named with its labels.
pub(crate) fn value(metrics: &str, sample: &str) -> u64 {
    let mut lines = metrics
        .lines()
        .filter_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    let value = lines.next().unwrap_or_else(|| panic!("no {sample} in {metrics}"));
    value.parse().unwrap_or_else(|_| panic!("{sample} is {value}"))
}

/// What the metrics page has counted, in the words of the callers.
pub(crate) fn counted(metrics: &str) -> Tally {
    let calls = |outcome: &str| {
        value(
            metrics,
            &format!(r#"circuit_breaker_calls_total{{service="upstream",outcome="{outcome}"}}"#),
        )
    };
    let rejected = |reason: &str| {
        value(
            metrics,
            &format!(r#"circuit_breaker_rejected_total{{service="upstream",reason="{reason}"}}"#),
        )
    };
    let limited = |limit: &str, reason: &str| {
        value(
            metrics,
            &format!(r#"rate_limiter_rejected_total{{service="api",limit="{limit}",reason="{reason}"}}"#),
        )
    };
    let admitted = |limit: &str| {
        let count = |what: &str| {
            value(
                metrics,
                &format!(r#"rate_limiter_{what}_total{{service="api",limit="{limit}"}}"#),
            )
        };
        count("accepted") - count("returned")
    };
    assert_eq!((calls("ignored"), rejected("forced_open")), (0, 0));
    Tally {
        admitted_for_caller: admitted("per-caller"),
        admitted_for_all: admitted("all"),
        over_callers_limit: limited("per-caller", "over_limit"),
        over_limit_of_all: limited("all", "over_limit"),
        keyless: limited("per-caller", "missing_key"),
        open: rejected("open"),
        half_open_full: rejected("half_open_full"),
        answered: calls("success"),
        failed: calls("failure"),
        cancelled: calls("cancelled"),
    }
}
