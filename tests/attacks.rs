//! What whoever can send requests can do, and what he cannot: the claims of the README's section on attacks that no other file pins.
#![cfg(feature = "http")]

use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use portcullis::{
    BoxError, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerLayer, Clock, GrpcClassifier, HttpClassifier,
    KeyedCircuitBreaker, KeyedRateLimiter, ManualClock, MetricsFormat, Outcome, RateLimitLayer, RateLimiter, Registry,
    State, TokenBucket, Window, key, policy::Missing,
};
use std::{convert::Infallible, sync::Arc, sync::Mutex, time::Duration};
use tonic::{body::Body, service::Routes};
use tower::{Layer, Service, ServiceExt, service_fn};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

type Answer = Response<Full<Bytes>>;

/// An upstream that fails on the requests that ask it to.
async fn upstream(request: Request<()>) -> Result<Answer, Infallible> {
    let mut response = Response::new(Full::from("an answer"));
    if request.uri().path() == "/poison" {
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    }
    Ok(response)
}

fn request(caller: &str, path: &str) -> Request<()> {
    Request::get(path).header("x-api-key", caller).body(()).unwrap()
}

/// Sends a request and reads its answer to the end.
fn send<S, B>(service: &S, request: Request<()>) -> StatusCode
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible> + Clone,
    B: http_body::Body<Error: std::fmt::Debug>,
{
    let response = service.clone().oneshot(request).now_or_never().unwrap().unwrap();
    let status = response.status();
    response.into_body().collect().now_or_never().unwrap().unwrap();
    status
}

fn on(clock: &ManualClock, name: &str, config: CircuitBreakerConfig) -> CircuitBreaker {
    CircuitBreaker::builder(name)
        .config(config)
        .clock(clock)
        .build()
        .unwrap()
}

fn callers(clock: &ManualClock, limit: u32, max_keys: usize) -> KeyedRateLimiter {
    KeyedRateLimiter::builder("api", TokenBucket::new(limit, MINUTE))
        .limit("caller")
        .max_keys(max_keys)
        .clock(clock)
        .build()
        .unwrap()
}

#[test]
fn invented_keys_get_what_the_set_has_room_for_unless_a_limit_of_all_stands_beside_it() {
    let clock = Clock::manual();
    let flood = |service: &dyn Fn(Request<()>) -> StatusCode| {
        let sent = (0..5_000).map(|key| service(request(&format!("invented-{key}"), "/")));
        sent.filter(StatusCode::is_success).count()
    };
    let alone = callers(&clock, 2, 1_000);
    let by_key = || key::header("x-api-key").unwrap();
    let service = RateLimitLayer::http(alone.by(by_key())).layer(service_fn(upstream));
    assert_eq!(
        flood(&|request| send(&service, request)),
        1_000 + 2,
        "a place each, and the overflow's quota"
    );

    let (each, all) = (
        callers(&clock, 2, 1_000),
        RateLimiter::builder("api", TokenBucket::new(50, MINUTE)),
    );
    let all = all.clock(&clock).build().unwrap();
    let service = RateLimitLayer::http((all, each.by(by_key()))).layer(service_fn(upstream));
    assert_eq!(flood(&|request| send(&service, request)), 50);
    assert_eq!(
        each.status().keys.unwrap().tracked,
        50,
        "and a key that the other limit refuses takes no place"
    );
}

#[test]
fn a_fingerprint_of_one_set_tells_nothing_of_another() {
    let clock = Clock::manual();
    let (one, other) = (callers(&clock, 1, 1), callers(&clock, 1, 1));
    assert_ne!(one.fingerprint("alice"), other.fingerprint("alice"));
}

#[test]
fn whoever_makes_the_upstream_fail_opens_its_circuit_for_everybody() {
    let clock = Clock::manual();
    let breaker = on(&clock, "search", CircuitBreakerConfig::default());
    let service = CircuitBreakerLayer::http(breaker.clone()).layer(service_fn(upstream));
    for _ in 0..5 {
        send(&service, request("mallory", "/poison"));
    }
    assert_eq!(send(&service, request("alice", "/")), StatusCode::SERVICE_UNAVAILABLE);
}

#[test]
fn failures_that_are_the_callers_own_open_nothing_if_they_are_ignored() {
    let clock = Clock::manual();
    let breaker = on(&clock, "search", CircuitBreakerConfig::default());
    let classifier = HttpClassifier::new().status(StatusCode::INTERNAL_SERVER_ERROR, Outcome::Ignored);
    let layer = CircuitBreakerLayer::http(breaker.clone()).classify_with(classifier);
    let service = layer.layer(service_fn(upstream));
    for _ in 0..1_000 {
        send(&service, request("mallory", "/poison"));
    }
    assert_eq!(send(&service, request("alice", "/")), StatusCode::OK);
}

#[test]
fn a_breaker_for_each_caller_opens_for_the_one_who_makes_the_upstream_fail() {
    let clock = Clock::manual();
    let tenants = KeyedCircuitBreaker::builder("search").clock(&clock).build().unwrap();
    let by_tenant = tenants.by(key::header("x-api-key").unwrap());
    let service = CircuitBreakerLayer::http(by_tenant).layer(service_fn(upstream));
    for _ in 0..5 {
        send(&service, request("mallory", "/poison"));
    }
    assert_eq!(send(&service, request("mallory", "/")), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(send(&service, request("alice", "/")), StatusCode::OK);
}

#[test]
fn a_limit_for_each_caller_keeps_his_failures_below_a_rate_with_a_minimum_of_calls() {
    let clock = Clock::manual();
    let config = CircuitBreakerConfig::default()
        .failure_rate(0.5)
        .window(Window::time(MINUTE))
        .minimum_calls(50);
    let breaker = on(&clock, "search", config);
    let callers = callers(&clock, 20, 1_000).by(key::header("x-api-key").unwrap());
    let service = CircuitBreakerLayer::http((callers, breaker.clone())).layer(service_fn(upstream));
    for _ in 0..1_000 {
        send(&service, request("mallory", "/poison"));
    }
    assert_eq!(breaker.status().metrics.failed_requests, 20, "his quota");
    for alice in 0..100 {
        assert_eq!(send(&service, request(&format!("alice-{alice}"), "/")), StatusCode::OK);
    }
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn strangers_who_choose_the_keys_of_breakers_take_their_places_and_open_the_one_that_new_keys_share() {
    let clock = Clock::manual();
    let upstreams = |config: CircuitBreakerConfig| {
        let builder = KeyedCircuitBreaker::builder("proxy").config(config).max_keys(100);
        builder.clock(&clock).build().unwrap()
    };
    let in_a_row = upstreams(CircuitBreakerConfig::default());
    let within = upstreams(CircuitBreakerConfig::default().failures_within(5, MINUTE));
    for set in [&in_a_row, &within] {
        for key in 0..1_000 {
            // One failure each, which opens none.
            if let Ok(permit) = set.try_acquire(&key) {
                permit.settle(Outcome::Failure);
            }
        }
        assert_eq!(set.status().tracked, 100, "memory is bounded");
        assert_eq!(set.try_acquire("honest").unwrap_err().reason.as_str(), "open");
    }
    clock.advance(59 * MINUTE);
    for set in [&in_a_row, &within] {
        set.try_acquire("honest").unwrap().settle(Outcome::Success);
    }
    assert_eq!(in_a_row.status().evicted, 0, "a run of failures is not too old yet");
    assert_eq!(
        within.status().evicted,
        1,
        "failures within a time make room when it is over"
    );
    clock.advance(MINUTE);
    in_a_row.try_acquire("honest").unwrap().settle(Outcome::Success);
    assert_eq!(in_a_row.status().evicted, 1, "failures of an hour ago make room");
}

#[test]
fn who_reads_slowly_makes_his_call_slow_where_its_end_is_judged_and_not_where_its_head_is() {
    let clock = Clock::manual();
    let config = || {
        CircuitBreakerConfig::default()
            .slow_calls(1.0, SECOND)
            .minimum_calls(1)
            .window(Window::calls(1))
    };
    let (to_the_end, to_the_head) = (on(&clock, "end", config()), on(&clock, "head", config()));
    let judged_at_the_end = CircuitBreakerLayer::http(to_the_end.clone()).layer(service_fn(upstream));
    let response = judged_at_the_end.oneshot(request("mallory", "/")).now_or_never();
    clock.advance(SECOND);
    drop(response);
    assert_eq!(to_the_end.state(), State::Open, "hanging up late is slow, too");

    let head = |result: &Result<Answer, Infallible>| match result {
        Ok(response) if response.status().is_server_error() => Outcome::Failure,
        _ => Outcome::Success,
    };
    let judged_at_the_head = CircuitBreakerLayer::new(to_the_head.clone()).respond().classify(head);
    let response = judged_at_the_head
        .layer(service_fn(upstream))
        .oneshot(request("mallory", "/"))
        .now_or_never();
    clock.advance(SECOND);
    drop(response);
    assert_eq!(to_the_head.state(), State::Closed);
}

#[test]
fn who_hangs_up_early_opens_nothing_by_default() {
    let clock = Clock::manual();
    let breaker = on(&clock, "search", CircuitBreakerConfig::default());
    let service = CircuitBreakerLayer::http(breaker.clone()).layer(service_fn(upstream));
    for _ in 0..1_000 {
        drop(service.clone().oneshot(request("mallory", "/")).now_or_never());
        drop(service.clone().oneshot(request("mallory", "/poison")));
    }
    assert_eq!(breaker.state(), State::Closed);
    assert_eq!(breaker.status().metrics.cancelled_requests, 1_000);
}

#[test]
fn who_does_not_read_the_answers_of_probes_holds_their_slots_for_a_lease_each() {
    let clock = Clock::manual();
    let config = CircuitBreakerConfig::default().probe_lease(5 * SECOND);
    let breaker = on(&clock, "search", config);
    let service = CircuitBreakerLayer::http(breaker.clone()).layer(service_fn(upstream));
    for _ in 0..5 {
        send(&service, request("mallory", "/poison"));
    }
    clock.advance(MINUTE);
    let unread: Vec<_> = (0..3)
        .map(|_| service.clone().oneshot(request("mallory", "/")).now_or_never())
        .collect();
    assert_eq!(send(&service, request("alice", "/")), StatusCode::SERVICE_UNAVAILABLE);
    clock.advance(5 * SECOND);
    assert_eq!(send(&service, request("alice", "/")), StatusCode::OK);
    assert_eq!(send(&service, request("bob", "/")), StatusCode::OK);
    assert_eq!(
        breaker.state(),
        State::Closed,
        "it recovers, though they are unread yet"
    );
    drop(unread);
}

#[tokio::test]
async fn no_more_wait_than_are_served_in_the_time_that_they_may() {
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("api", TokenBucket::new(10, SECOND).burst(1));
    let limiter = limiter.clock(&clock).build().unwrap();
    let layer = RateLimitLayer::http(limiter.clone()).wait(5 * SECOND);
    let mut waiting = Vec::new();
    for _ in 0..2_000 {
        let mut call = Box::pin(layer.layer(service_fn(upstream)).oneshot(request("mallory", "/")));
        if call.as_mut().now_or_never().is_none() {
            waiting.push(call);
        }
    }
    assert_eq!(waiting.len(), 50, "ten a second, for five seconds");
    assert_eq!(limiter.status().waiting, 50);
}

/// A server of one's own, told through a protocol what callers send it.
fn health(breaker: &CircuitBreaker, classifier: GrpcClassifier) -> impl Fn(&'static [u8]) {
    let (_reporter, service) = tonic_health::server::health_reporter();
    let layer = CircuitBreakerLayer::grpc(breaker.clone()).classify_with(classifier);
    let service = layer.layer(Routes::new(service).prepare());
    move |message| {
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        let frame = [&[0], &length[..], message].concat();
        let request = Request::post("/grpc.health.v1.Health/Check")
            .header("content-type", "application/grpc")
            .body(Body::new(Full::from(frame)));
        let response = service.clone().oneshot(request.unwrap()).now_or_never();
        let response = response.expect("it answers at once").unwrap();
        response.into_body().collect().now_or_never().unwrap().unwrap();
    }
}

#[test]
fn messages_that_cannot_be_decoded_are_failures_of_a_grpc_server_unless_their_code_is_ignored() {
    let clock = Clock::manual();
    let (breaker, heedless) = (
        on(&clock, "own", CircuitBreakerConfig::default()),
        on(&clock, "own", CircuitBreakerConfig::default()),
    );
    let (send, send_heedlessly) = (
        health(&breaker, GrpcClassifier::new().code(13, Outcome::Ignored)),
        health(&heedless, GrpcClassifier::new()),
    );
    send(b"");
    send_heedlessly(b"");
    for _ in 0..5 {
        send(b"\x0a\xff");
        send_heedlessly(b"\x0a\xff");
    }
    assert_eq!(heedless.state(), State::Open);
    assert_eq!(breaker.state(), State::Closed);
    let metrics = breaker.status().metrics;
    assert_eq!((metrics.successful_requests, metrics.ignored_requests), (1, 5));
}

#[test]
fn no_key_of_a_caller_is_shown_anywhere_and_metrics_do_not_grow_with_callers() -> Result<(), BoxError> {
    const SECRET: &str = "sk-live-4242";
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let callers = registry.keyed_rate_limiter("api", "caller", TokenBucket::new(1, MINUTE), 100)?;
    let config = CircuitBreakerConfig::default().failure_threshold(1);
    let breakers = registry.keyed_circuit_breaker("api", config, 100)?;
    let told = Arc::new(Mutex::new(Vec::new()));
    registry.on_event({
        let told = told.clone();
        move |event| told.lock().unwrap().push(format!("{event:?}"))
    });
    let by_key = || key::header("x-api-key").unwrap();
    let limits = callers.by(by_key()).missing(Missing::Reject);
    let limited = RateLimitLayer::http(limits).layer(service_fn(upstream));
    let broken = CircuitBreakerLayer::http(breakers.by(by_key())).layer(service_fn(upstream));
    let in_error = RateLimitLayer::new(callers.by(by_key())).layer(service_fn(upstream));
    let page = || registry.metrics_text(MetricsFormat::Prometheus).lines().count();
    let lines = page();

    let mut seen = vec![format!("{limited:?} {broken:?} {callers:?} {breakers:?} {registry:?}")];
    let nobody = Request::get("/").body(())?;
    for request in [
        request(SECRET, "/"),
        request(SECRET, "/poison"),
        request(SECRET, "/"),
        nobody,
    ] {
        seen.push(answer(&limited, request.clone()));
        seen.push(answer(&broken, request.clone()));
        if let Err(error) = in_error.clone().oneshot(request).now_or_never().unwrap() {
            seen.push(format!("{error} {error:?}"));
        }
    }
    for stranger in 0..1_000 {
        seen.push(answer(&limited, request(&format!("{SECRET}-{stranger}"), "/")));
    }
    for path in ["/status", "/status/api", "/metrics", "/readyz"] {
        seen.push(answer(&registry.admin(), Request::get(path).body(())?));
    }
    seen.append(&mut told.lock().unwrap());
    let seen = seen.concat();
    for kind in ["429", "503", "400", "over_limit", "most_rejected", "Rejected("] {
        assert!(seen.contains(kind), "{kind} is among what was looked at");
    }
    assert!(!seen.contains("4242"), "{seen}");
    assert_eq!(page(), lines, "no series for a key");
    Ok(())
}

/// All of an answer as text.
fn answer<S, B>(service: &S, request: Request<()>) -> String
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible> + Clone,
    B: http_body::Body<Data = Bytes, Error: std::fmt::Debug>,
{
    let response = service.clone().oneshot(request).now_or_never().unwrap().unwrap();
    let (head, body) = response.into_parts();
    let body = body.collect().now_or_never().unwrap().unwrap().to_bytes();
    format!("{head:?} {body:?}")
}
