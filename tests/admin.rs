//! The admin service: every path, its JSON, its health answers, and that it only ever reads, in a test, axum and hyper alike.
#![cfg(feature = "http")]

use axum::Router;
use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    HeaderMap, Method, Request, Response, StatusCode,
    header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE},
};
use http_body_util::BodyExt;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use portcullis::{
    Adaptive, CircuitBreaker, CircuitBreakerConfig, Clock, EventKind, ManualClock, Name, Outcome, Registry,
    SlidingWindow, State, TokenBucket, Window,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tower::ServiceExt;

const MINUTE: Duration = Duration::from_secs(60);
const PATHS: [&str; 5] = ["/status", "/status/search", "/metrics", "/livez", "/readyz"];
const PROBLEM: &str = "application/problem+json";

fn config() -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
}

fn fail(breaker: &CircuitBreaker) {
    breaker
        .try_acquire()
        .expect("the circuit admits")
        .settle(Outcome::Failure);
}

/// A registry on a clock that stands still, with a breaker and a limit for `search`.
fn search() -> (ManualClock, Registry, CircuitBreaker) {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let breaker = registry
        .circuit_breaker("search", config().failure_threshold(2))
        .unwrap();
    registry.rate_limiter("search", TokenBucket::new(50, MINUTE)).unwrap();
    (clock, registry, breaker)
}

fn answer<B>(registry: &Registry, request: Request<B>) -> Response<Bytes> {
    let answer = registry.admin().oneshot(request).now_or_never();
    let (head, body) = answer
        .expect("it answers at once")
        .expect("it never fails")
        .into_parts();
    let body = body
        .collect()
        .now_or_never()
        .expect("the body is there at once")
        .unwrap();
    Response::from_parts(head, body.to_bytes())
}

fn ask(registry: &Registry, method: &Method, path: &str) -> Response<Bytes> {
    let request = Request::builder().method(method).uri(path).body(());
    answer(
        registry,
        request.unwrap_or_else(|error| panic!("{method} {path}: {error}")),
    )
}

fn get(registry: &Registry, path: &str) -> Response<Bytes> {
    ask(registry, &Method::GET, path)
}

fn header<'a>(headers: &'a HeaderMap, name: &http::HeaderName) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

fn json_of(response: &Response<Bytes>) -> Value {
    serde_json::from_slice(response.body()).unwrap_or_else(|error| panic!("{error} in {:?}", response.body()))
}

/// Holds what every answer holds, and a problem besides.
#[track_caller]
fn assert_problem(response: &Response<Bytes>, status: StatusCode) {
    assert_eq!(response.status(), status);
    assert_eq!(header(response.headers(), &CONTENT_TYPE), PROBLEM);
    let problem = json_of(response);
    assert_eq!(problem["type"], "about:blank");
    assert_eq!(problem["status"], status.as_u16());
    assert_eq!(problem["title"], status.canonical_reason().unwrap());
    assert!(!problem["detail"].as_str().unwrap().is_empty(), "it says what is wrong");
}

#[test]
fn every_path_answers_get_with_its_type_its_length_and_no_caching() {
    let (_, registry, _) = search();
    for (path, content_type) in [
        ("/status", "application/json"),
        ("/status/search", "application/json"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("/livez", "text/plain; charset=utf-8"),
        ("/readyz", "text/plain; charset=utf-8"),
    ] {
        for path in [path.to_owned(), format!("{path}?verbose=1")] {
            let response = get(&registry, &path);
            assert_eq!(response.status(), StatusCode::OK, "{path}");
            assert_eq!(header(response.headers(), &CONTENT_TYPE), content_type, "{path}");
            assert_eq!(
                header(response.headers(), &CACHE_CONTROL),
                "no-store",
                "what is true now is not kept: {path}"
            );
            let length = response.body().len().to_string();
            assert_eq!(header(response.headers(), &CONTENT_LENGTH), length, "{path}");
            assert_ne!(length, "0", "{path}");
        }
    }
}

#[test]
fn an_empty_registry_answers_too() {
    let registry = Registry::new();
    assert_eq!(
        json_of(&get(&registry, "/status")),
        json!({ "services": {}, "open_circuits": [] })
    );
    for path in ["/metrics", "/livez", "/readyz"] {
        assert_eq!(get(&registry, path).status(), StatusCode::OK, "{path}");
    }
    assert_problem(&get(&registry, "/status/search"), StatusCode::NOT_FOUND);
}

#[test]
fn any_request_body_will_do() {
    struct NeitherSendNorClone(std::rc::Rc<()>);
    let (_, registry, _) = search();
    let status = |response: Response<Bytes>| response.status();
    assert_eq!(
        status(answer(&registry, Request::get("/livez").body(String::new()).unwrap())),
        200
    );
    let odd = NeitherSendNorClone(std::rc::Rc::default());
    assert_eq!(std::rc::Rc::strong_count(&odd.0), 1);
    assert_eq!(
        status(answer(&registry, Request::get("/livez").body(odd).unwrap())),
        200
    );
}

/// What `search` shows before anything happened.
fn untouched() -> Value {
    json!({
        "service": "search",
        "state": "closed",
        "forced": null,
        "generation": 1,
        "state_age_seconds": 0.0,
        "failure_count": 0,
        "success_count": 0,
        "probes_in_flight": 0,
        "retry_after": null,
        "window": null,
        "metrics": {
            "total_requests": 0,
            "successful_requests": 0,
            "failed_requests": 0,
            "rejected_requests": 0,
            "ignored_requests": 0,
            "cancelled_requests": 0,
            "slow_requests": 0,
            "rejected": { "open": 0, "half_open_full": 0, "forced_open": 0 },
            "success_rate": null,
            "state_transitions": {
                "closed_to_open": 0,
                "open_to_half_open": 0,
                "half_open_to_closed": 0,
                "half_open_to_open": 0,
            },
        },
        "config": {
            "failure_threshold": 2,
            "failures_within": null,
            "failures_within_seconds": null,
            "failure_rate": null,
            "slow_call_rate": null,
            "slow_call_seconds": null,
            "window_calls": null,
            "window_seconds": null,
            "minimum_calls": null,
            "recovery_timeout": 60.0,
            "recovery_backoff_multiplier": null,
            "recovery_backoff_max": null,
            "recovery_backoff_jitter": null,
            "half_open_max_calls": 3,
            "success_threshold": 2,
            "probe_lease": 60.0,
            "cancelled": "ignored",
            "honor_retry_after": null,
            "critical": false,
        },
        "rate_limiters": [{
            "service": "search",
            "name": "default",
            "type": "token_bucket",
            "rate": 50.0,
            "period_seconds": 60.0,
            "burst": 50,
            "available_tokens": 50.0,
            "retry_after": null,
            "waiting": 0,
            "accepted_requests": 0,
            "accepted_cost": 0,
            "returned_requests": 0,
            "rejected_requests": 0,
            "rejected": { "over_limit": 0, "cost_exceeds_burst": 0 },
            "acceptance_rate": null,
            "config": { "rate": 50, "per_seconds": 60.0, "burst_size": 50 },
        }],
    })
}

#[test]
fn a_rate_of_nothing_is_null_in_the_status_of_a_service() {
    let (_, registry, _) = search();
    assert_eq!(json_of(&get(&registry, "/status/search")), untouched());
}

#[test]
fn the_status_of_a_service_tells_what_happened_to_it() {
    let (clock, registry, breaker) = search();
    breaker.try_acquire().unwrap().settle(Outcome::Success);
    breaker.try_acquire().unwrap().settle(Outcome::Ignored);
    drop(breaker.try_acquire().unwrap());
    fail(&breaker);
    fail(&breaker);
    clock.advance(Duration::from_millis(15_500));
    for _ in 0..3 {
        breaker.try_acquire().unwrap_err();
    }
    let limiter = registry.get_rate_limiter("search").unwrap();
    limiter.try_acquire_n(48).unwrap().unused();
    limiter.try_acquire_n(50).unwrap();
    limiter.try_acquire_n(51).unwrap_err();
    limiter.try_acquire().unwrap_err();

    let mut expected = untouched();
    expected["state"] = json!("open");
    expected["generation"] = json!(2);
    expected["state_age_seconds"] = json!(15.5);
    expected["failure_count"] = json!(2);
    expected["retry_after"] = json!(44.5);
    let metrics = &mut expected["metrics"];
    metrics["total_requests"] = json!(8);
    metrics["successful_requests"] = json!(1);
    metrics["failed_requests"] = json!(2);
    metrics["rejected_requests"] = json!(3);
    metrics["ignored_requests"] = json!(1);
    metrics["cancelled_requests"] = json!(1);
    metrics["rejected"]["open"] = json!(3);
    metrics["success_rate"] = json!(12.5);
    metrics["state_transitions"]["closed_to_open"] = json!(1);
    let limit = &mut expected["rate_limiters"][0];
    limit["available_tokens"] = json!(0.0);
    limit["retry_after"] = json!(1.2);
    limit["accepted_requests"] = json!(2);
    limit["accepted_cost"] = json!(98);
    limit["returned_requests"] = json!(1);
    limit["rejected_requests"] = json!(2);
    limit["rejected"] = json!({ "over_limit": 1, "cost_exceeds_burst": 1 });
    limit["acceptance_rate"] = json!(50.0);
    assert_eq!(json_of(&get(&registry, "/status/search")), expected);

    let all = json_of(&get(&registry, "/status"));
    assert_eq!(all["services"]["search"], expected, "the list says the same");
    assert_eq!(all["open_circuits"], json!(["search"]));

    clock.advance(MINUTE);
    breaker.try_acquire().unwrap().settle(Outcome::Success);
    let probe = breaker.try_acquire().unwrap();
    let status = json_of(&get(&registry, "/status/search"));
    assert_eq!(status["state"], "half_open");
    assert_eq!(
        (&status["success_count"], &status["probes_in_flight"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(status["retry_after"], Value::Null, "there is room for another probe");
    probe.settle(Outcome::Failure);
    clock.advance(MINUTE);
    for _ in 0..2 {
        breaker.try_acquire().unwrap().settle(Outcome::Success);
    }
    let status = json_of(&get(&registry, "/status/search"));
    assert_eq!(status["state"], "closed");
    let transitions = json!({
        "closed_to_open": 1, "open_to_half_open": 2, "half_open_to_closed": 1, "half_open_to_open": 1,
    });
    assert_eq!(status["metrics"]["state_transitions"], transitions);
}

type Force = fn(&CircuitBreaker);

#[test]
fn the_status_shows_windows_overrides_and_every_setting() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let second = Duration::from_secs(1);
    let all = config()
        .failure_threshold(9)
        .failures_within(8, MINUTE)
        .failure_rate(0.5)
        .slow_calls(0.75, second)
        .window(Window::time(10 * second))
        .minimum_calls(2)
        .recovery_timeout(second / 2)
        .recovery_backoff(portcullis::Backoff::new(1.5, MINUTE).jitter(0.25))
        .half_open_max_calls(5)
        .success_threshold(4)
        .probe_lease(2 * second)
        .cancelled(Outcome::Failure)
        .honor_retry_after(3 * second)
        .critical(true);
    let breaker = registry.circuit_breaker("search", all).unwrap();
    breaker.try_acquire().unwrap().settle(Outcome::Success);
    let status = json_of(&get(&registry, "/status/search"));
    let below = json!({ "calls": 1, "failures": 0, "slow": 0, "failure_rate": null, "slow_call_rate": null });
    assert_eq!(status["window"], below, "below the minimum of calls there is no rate");
    let config = json!({
        "failure_threshold": 9,
        "failures_within": 8,
        "failures_within_seconds": 60.0,
        "failure_rate": 0.5,
        "slow_call_rate": 0.75,
        "slow_call_seconds": 1.0,
        "window_calls": null,
        "window_seconds": 10.0,
        "minimum_calls": 2,
        "recovery_timeout": 0.5,
        "recovery_backoff_multiplier": 1.5,
        "recovery_backoff_max": 60.0,
        "recovery_backoff_jitter": 0.25,
        "half_open_max_calls": 5,
        "success_threshold": 4,
        "probe_lease": 2.0,
        "cancelled": "failure",
        "honor_retry_after": 3.0,
        "critical": true,
    });
    assert_eq!(status["config"], config);
    let slow = breaker.try_acquire().unwrap();
    clock.advance(second);
    slow.settle(Outcome::Success);
    let status = json_of(&get(&registry, "/status/search"));
    let at_the_minimum = json!({ "calls": 2, "failures": 0, "slow": 1, "failure_rate": 0.0, "slow_call_rate": 0.5 });
    assert_eq!(status["window"], at_the_minimum);
    assert_eq!(status["metrics"]["slow_requests"], 1);

    let overrides: [(Force, &str, &str); 3] = [
        (CircuitBreaker::force_open, "forced_open", "open"),
        (CircuitBreaker::force_closed, "forced_closed", "closed"),
        (CircuitBreaker::disable, "disabled", "closed"),
    ];
    for (force, forced, state) in overrides {
        force(&breaker);
        let status = json_of(&get(&registry, "/status/search"));
        assert_eq!((&status["forced"], &status["state"]), (&json!(forced), &json!(state)));
        assert_eq!(
            status["retry_after"],
            Value::Null,
            "nobody can tell how long an override holds"
        );
    }
}

#[test]
fn a_service_without_a_breaker_shows_its_limits_alone() {
    let registry = Registry::with_clock(Clock::manual());
    registry
        .named_rate_limiter("ask", "daily", SlidingWindow::new(9, MINUTE))
        .unwrap();
    registry.named_rate_limiter("ask", "agent", Adaptive::new(100)).unwrap();
    let status = json_of(&get(&registry, "/status/ask"));
    let limits = status["rate_limiters"].as_array().unwrap();
    assert_eq!(
        status.as_object().unwrap().len(),
        2,
        "nothing stands for a breaker that is not there: {status}"
    );
    assert_eq!(status["service"], "ask");
    assert_eq!(limits.len(), 2);
    assert_eq!(
        (&limits[0]["name"], &limits[0]["type"]),
        (&json!("agent"), &json!("adaptive"))
    );
    assert_eq!(
        (&limits[1]["name"], &limits[1]["type"]),
        (&json!("daily"), &json!("sliding_window"))
    );
    let adaptive = json!({
        "base_rate": 100,
        "min_rate": 10,
        "max_rate": 200,
        "burst_size": 100,
        "window_seconds": 60.0,
        "error_threshold": 0.1,
        "adjustment_factor": 0.2,
        "minimum_calls": 10,
        "cancelled": "ignored",
    });
    assert_eq!(limits[0]["config"], adaptive);
    assert_eq!(
        limits[1]["config"],
        json!({ "max_requests": 9, "window_seconds": 60.0 })
    );
}

#[test]
fn head_answers_the_headers_of_get_and_no_body() {
    let (_, registry, breaker) = search();
    registry
        .circuit_breaker("critical", config().critical(true))
        .unwrap()
        .force_open();
    fail(&breaker);
    for path in PATHS.into_iter().chain(["/nowhere", "/status/nobody", "/"]) {
        let (get, head) = (get(&registry, path), ask(&registry, &Method::HEAD, path));
        assert_eq!(head.status(), get.status(), "{path}");
        assert_eq!(head.headers(), get.headers(), "{path}");
        assert_eq!(
            header(head.headers(), &CONTENT_LENGTH),
            get.body().len().to_string(),
            "{path}"
        );
        assert!(head.body().is_empty(), "{path}");
    }
}

fn other_methods() -> Vec<Method> {
    let mut methods = vec![
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::PATCH,
        Method::OPTIONS,
        Method::TRACE,
        Method::CONNECT,
    ];
    methods.extend(["BREW", "get", "GETS", "M!#$%&'*+-.^_`|~"].map(|name| name.parse::<Method>().unwrap()));
    methods
}

#[test]
fn other_methods_are_answered_405_with_what_is_allowed() {
    let (_, registry, _) = search();
    for method in other_methods() {
        for path in PATHS {
            let response = ask(&registry, &method, path);
            assert_problem(&response, StatusCode::METHOD_NOT_ALLOWED);
            assert_eq!(header(response.headers(), &ALLOW), "GET, HEAD", "{method} {path}");
        }
    }
}

#[test]
fn unknown_paths_and_services_are_answered_404_whatever_the_method() {
    let (_, registry, _) = search();
    let unknown = [
        "/",
        "/Status",
        "/status/",
        "/status/nobody",
        "/status/search/",
        "/status/search/more",
        "/status//search",
        "/statuses",
        "/metrics/",
        "/livez/",
        "/readyz/x",
        "/healthz",
        "//status",
        "/status/../metrics",
        "*",
        "/status/%",
        "/status/%zz",
        "/status/%ff",
        "/status/%00",
        "/status/searc%68%00",
        "/status/Search",
    ];
    for method in other_methods().into_iter().chain([Method::GET]) {
        for path in unknown {
            assert_problem(&ask(&registry, &method, path), StatusCode::NOT_FOUND);
        }
    }
}

#[test]
fn no_request_makes_a_service() {
    let (_, registry, _) = search();
    for method in other_methods().into_iter().chain([Method::GET, Method::HEAD]) {
        for path in ["/status/nobody", "/metrics/nobody", "/nobody", "/status/"] {
            ask(&registry, &method, path);
        }
    }
    assert_eq!(registry.services(), ["search"]);
}

#[test]
fn a_service_is_found_by_its_percent_encoded_name() {
    let registry = Registry::with_clock(Clock::manual());
    for (name, encoded) in [
        ("search", "search"),
        ("search", "%73earch"),
        ("a b", "a%20b"),
        ("a/b", "a%2Fb"),
        ("a/b", "a/b"),
        ("50%", "50%25"),
        ("%41", "%2541"),
        ("a+b", "a+b"),
        ("?", "%3F"),
        ("#", "%23"),
        ("..", "%2e%2e"),
        ("\"\\\n\0", "%22%5C%0A%00"),
        ("🦀", "%F0%9F%A6%80"),
        ("ä", "%c3%a4"),
        ("status", "status"),
    ] {
        registry.circuit_breaker(name, config()).unwrap();
        let path = format!("/status/{encoded}");
        let response = get(&registry, &path);
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        assert_eq!(json_of(&response)["service"], name, "{path}");
    }
    let longest = "é".repeat(127);
    registry.circuit_breaker(&longest, config()).unwrap();
    let path = format!("/status/{}", "%c3%a9".repeat(127));
    assert_eq!(json_of(&get(&registry, &path))["service"], longest);
    let all = json_of(&get(&registry, "/status"));
    let names: Vec<&str> = all["services"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let services = registry.services();
    let mut expected: Vec<&str> = services.iter().map(Name::as_str).collect();
    expected.sort_unstable();
    assert_eq!(names, expected, "the list's JSON holds every name unchanged");
}

#[test]
fn readiness_fails_exactly_while_a_critical_circuit_is_open() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let critical = registry
        .circuit_breaker(
            "critical",
            config().failure_threshold(1).success_threshold(1).critical(true),
        )
        .unwrap();
    let other = registry
        .circuit_breaker("other", config().failure_threshold(1))
        .unwrap();
    let ready = |expected: u16, line: &str, when: &str| {
        let response = get(&registry, "/readyz");
        assert_eq!(response.status(), expected, "{when}");
        let verdict = if expected == 200 { "ready" } else { "not ready" };
        let body = String::from_utf8(response.body().to_vec()).unwrap();
        assert_eq!(body, format!("{line}\n{verdict}\n"), "{when}");
        let live = get(&registry, "/livez");
        assert_eq!(
            (live.status().as_u16(), &live.body()[..]),
            (200, &b"ok\n"[..]),
            "alive whatever happens: {when}"
        );
    };
    let closed = "[+]circuit \"critical\" closed";
    let half_open = "[+]circuit \"critical\" half_open";
    let open = "[-]circuit \"critical\" open";
    ready(200, closed, "closed");
    fail(&other);
    other.force_open();
    ready(200, closed, "a circuit that is not critical is open");
    fail(&critical);
    ready(503, open, "open");
    clock.advance(Duration::from_nanos(59_999_999_999));
    ready(503, open, "one nanosecond before the open time is over");
    clock.advance(Duration::from_nanos(1));
    ready(
        200,
        half_open,
        "half-open is due: without traffic no probe would arrive",
    );
    let probe = critical.try_acquire().unwrap();
    ready(200, half_open, "half-open with a probe under way");
    probe.settle(Outcome::Failure);
    ready(503, open, "the probe failed");
    clock.advance(MINUTE);
    critical.try_acquire().unwrap().settle(Outcome::Success);
    ready(200, closed, "recovered");
    critical.force_open();
    ready(503, open, "forced open");
    clock.advance(1000 * MINUTE);
    ready(503, open, "forced open stays so");
    critical.force_closed();
    ready(200, closed, "forced closed");
    critical.disable();
    ready(200, closed, "disabled");
    critical.reset();
    critical.reconfigure(config().critical(false)).unwrap();
    critical.force_open();
    assert_eq!(get(&registry, "/readyz").body(), "ready\n", "no longer critical");
}

#[test]
fn the_circuit_of_a_key_never_fails_readiness() {
    let registry = Registry::new();
    let hosts = registry
        .keyed_circuit_breaker("hosts", config().critical(true), 10)
        .unwrap();
    hosts.get("one of many").force_open();
    assert_eq!(get(&registry, "/readyz").body(), "ready\n");
}

#[test]
fn a_name_cannot_forge_a_line_of_readiness() {
    let registry = Registry::new();
    let name = "a\n[+]circuit \"b\" closed\nready";
    registry
        .circuit_breaker(name, config().critical(true))
        .unwrap()
        .force_open();
    let response = get(&registry, "/readyz");
    let body = std::str::from_utf8(response.body()).unwrap();
    assert_eq!(body.lines().count(), 2, "one line a circuit, and the verdict: {body}");
    assert!(body.ends_with("\nnot ready\n"), "{body}");
}

#[test]
fn the_metrics_are_in_the_format_that_is_asked_for() {
    let (_, registry, _) = search();
    let text = portcullis::MetricsFormat::Prometheus;
    let open = portcullis::MetricsFormat::OpenMetrics;
    let cases: [(&[&[u8]], _); 8] = [
        (&[], text),
        (&[b"application/openmetrics-text; version=1.0.0"], open),
        (&[b"text/plain;q=0.5", b"application/openmetrics-text;q=0.9"], open),
        (&[b"application/openmetrics-text;q=0.5", b"text/plain"], text),
        (&[b"application/json"], text),
        (&[b"\xff\xfe"], text),
        (&[b"\xff", b"application/openmetrics-text"], open),
        (&[b",,;;==,q=,;q"], text),
    ];
    for (lines, format) in cases {
        let mut request = Request::get("/metrics").body(()).unwrap();
        for line in lines {
            request
                .headers_mut()
                .append(ACCEPT, http::HeaderValue::from_bytes(line).unwrap());
        }
        let response = answer(&registry, request);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(
            header(response.headers(), &CONTENT_TYPE),
            format.content_type(),
            "{lines:?}"
        );
        assert_eq!(
            response.body(),
            &registry.metrics_text(format),
            "it is the registry's page"
        );
        assert_eq!(response.body().ends_with(b"# EOF\n"), format == open);
    }
}

#[test]
fn reading_changes_nothing() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let breaker = registry
        .circuit_breaker("search", config().failure_threshold(1))
        .unwrap();
    let bucket = registry.rate_limiter("search", TokenBucket::new(1, MINUTE)).unwrap();
    let adaptive = registry
        .named_rate_limiter("search", "agent", Adaptive::new(100).minimum_calls(1))
        .unwrap();
    fail(&breaker);
    adaptive.try_acquire().unwrap().settle(Outcome::Failure);
    clock.advance(MINUTE);
    let due = clock.now();
    clock.advance(MINUTE);

    let mut events = registry.subscribe(16);
    for path in PATHS {
        let first = get(&registry, path);
        for method in other_methods().into_iter().chain([Method::HEAD]) {
            ask(&registry, &method, path);
        }
        let second = get(&registry, path);
        assert_eq!(first.body(), second.body(), "read twice, {path} is the same");
    }
    let status = json_of(&get(&registry, "/status/search"));
    assert_eq!(status["state"], "half_open", "what the next call would meet");
    assert_eq!(status["generation"], 3, "the generation that will begin with it");
    assert_eq!(
        status["metrics"]["state_transitions"]["open_to_half_open"], 1,
        "the move that is due"
    );
    assert_eq!(status["state_age_seconds"], 60.0, "since it was due");
    assert_eq!(status["rate_limiters"][0]["rate"], 80.0, "the rate that will hold");
    assert_eq!(status["rate_limiters"][1]["available_tokens"], 1.0);
    assert_eq!(events.try_recv(), None, "reading moves nothing: nothing happened yet");

    let probe = breaker.try_acquire().unwrap();
    let event = events.try_recv().expect("the first call makes the move");
    let transition = EventKind::Transition {
        from: State::Open,
        to: State::HalfOpen,
        generation: 3,
    };
    assert_eq!(
        (event.kind, event.at),
        (transition, due),
        "it carries the instant at which it was due"
    );
    drop(probe);
    adaptive.try_acquire().unwrap();
    assert_eq!(
        events.try_recv().unwrap().kind,
        EventKind::RateChanged { from: 100.0, to: 80.0 }
    );
    bucket.try_acquire().expect("no reader took the token");
    assert_eq!(events.try_recv(), None);
}

#[test]
fn huge_paths_and_odd_methods_get_a_short_answer() {
    let (_, registry, _) = search();
    let long = "x".repeat(60_000);
    let paths = [
        format!("/{long}"),
        format!("/status/{long}"),
        format!("/status/{}", "%41".repeat(20_000)),
        format!("/status/{}", "%".repeat(60_000)),
        format!("/status/{}", "%ff".repeat(20_000)),
        "/".repeat(60_000),
        format!("/status/{}", "../".repeat(20_000)),
        format!("/livez?{long}"),
    ];
    let methods = [Method::GET, Method::POST, "X".repeat(60_000).parse().unwrap()];
    for path in paths.iter().map(String::as_str).chain(["/status", "/livez"]) {
        for method in &methods {
            let response = ask(&registry, method, path);
            let read = *method == Method::GET && !response.status().is_client_error();
            assert!(
                read || response.body().len() < 512,
                "what a stranger sends does not come back: {} bytes",
                response.body().len()
            );
        }
    }
}

proptest! {
    #[test]
    fn any_request_gets_an_answer_of_known_shape(
        method in "[!#$%&'*+.^_`|~0-9A-Za-z-]{1,12}",
        path in "/(status/?|metrics|livez|readyz)?[!-~&&[^#?]]{0,40}(\\?[!-~&&[^#]]{0,8})?",
        accept in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let (_, registry, _) = search();
        let mut request = Request::builder().method(method.as_str()).uri(path.as_str());
        if let Ok(accept) = http::HeaderValue::from_bytes(&accept) {
            request = request.header(ACCEPT, accept);
        }
        // What no server would take in is not a request.
        let request = request.body(());
        prop_assume!(request.is_ok());
        let response = answer(&registry, request.unwrap());
        match response.status().as_u16() {
            200 => {}
            status @ (404 | 405) => assert_problem(&response, StatusCode::from_u16(status).unwrap()),
            status => prop_assert!(false, "unexpected status {status}"),
        }
        prop_assert_eq!(registry.services(), ["search"]);
    }
}

/// Sends one request as it is written and reads all that comes back.
async fn send(server: SocketAddr, method: &str, path: &str, more: &str) -> Response<Bytes> {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    let end = bytes
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .expect("the head ends");
    let body = bytes.split_off(end + 4);
    let head = String::from_utf8(bytes).unwrap();
    let mut lines = head.trim_end().split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .expect("a status line");
    let mut response = Response::builder().status(status);
    for line in lines {
        let (name, value) = line.split_once(": ").expect("a header");
        response = response.header(name, value);
    }
    response.body(body.into()).unwrap()
}

/// What must hold behind any server, under any prefix.
async fn assert_served(registry: &Registry, server: SocketAddr, prefix: &str) {
    for path in PATHS {
        let expected = get(registry, path);
        let url = format!("{prefix}{path}");
        let response = send(server, "GET", &url, "").await;
        assert_eq!(response.status(), StatusCode::OK, "{url}");
        assert_eq!(response.body(), expected.body(), "{url}");
        for name in [CONTENT_TYPE, CONTENT_LENGTH, CACHE_CONTROL] {
            assert_eq!(response.headers().get(&name), expected.headers().get(&name), "{url}");
        }
        let head = send(server, "HEAD", &url, "").await;
        assert!(head.body().is_empty(), "HEAD {url} brings no body");
        for name in [CONTENT_TYPE, CONTENT_LENGTH, CACHE_CONTROL] {
            assert_eq!(head.headers().get(&name), expected.headers().get(&name), "HEAD {url}");
        }
        for method in ["POST", "DELETE", "OPTIONS", "BREW"] {
            let response = send(server, method, &url, "Content-Length: 0\r\n").await;
            assert_problem(&response, StatusCode::METHOD_NOT_ALLOWED);
            assert_eq!(header(response.headers(), &ALLOW), "GET, HEAD", "{method} {url}");
        }
    }
    for path in ["/nowhere", "/status/nobody", "/status/%zz", "/"] {
        assert_problem(
            &send(server, "GET", &format!("{prefix}{path}"), "").await,
            StatusCode::NOT_FOUND,
        );
        let head = send(server, "HEAD", &format!("{prefix}{path}"), "").await;
        assert_eq!(
            (head.status(), head.body().len()),
            (StatusCode::NOT_FOUND, 0),
            "HEAD {path}"
        );
    }
    let name = send(
        server,
        "GET",
        &format!("{prefix}/status/a%20%22b%22%2F%F0%9F%A6%80"),
        "",
    )
    .await;
    assert_eq!(json_of(&name)["service"], "a \"b\"/🦀");
    let open_metrics = "Accept: application/openmetrics-text; version=1.0.0\r\n";
    let metrics = send(server, "GET", &format!("{prefix}/metrics"), open_metrics).await;
    let format = portcullis::MetricsFormat::OpenMetrics;
    assert_eq!(header(metrics.headers(), &CONTENT_TYPE), format.content_type());
    assert_eq!(metrics.body(), &registry.metrics_text(format));

    registry.get_circuit_breaker("search").unwrap().force_open();
    let ready = send(server, "GET", &format!("{prefix}/readyz"), "").await;
    assert_eq!(ready.status(), StatusCode::SERVICE_UNAVAILABLE, "what changes is seen");
    let live = send(server, "GET", &format!("{prefix}/livez"), "").await;
    assert_eq!(live.status(), StatusCode::OK);
}

/// What both servers serve. Its clock stands still, so that an answer in a test equals one over a wire.
fn served() -> Registry {
    let registry = Registry::with_clock(Clock::manual());
    registry.circuit_breaker("search", config().critical(true)).unwrap();
    registry.rate_limiter("search", TokenBucket::new(50, MINUTE)).unwrap();
    registry.circuit_breaker("a \"b\"/🦀", config()).unwrap();
    registry
}

async fn loopback() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[tokio::test]
async fn it_mounts_in_axum_under_a_prefix() {
    let registry = served();
    let app = Router::new().nest_service("/admin", registry.admin());
    let (listener, address) = loopback().await;
    let server = tokio::spawn(async move { axum::serve(listener, app).await });
    assert_served(&registry, address, "/admin").await;
    server.abort();
}

#[tokio::test]
async fn it_serves_a_hyper_connection() {
    let registry = served();
    let service = TowerToHyperService::new(registry.admin());
    let (listener, address) = loopback().await;
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let connection = hyper::server::conn::http1::Builder::new();
            tokio::spawn(connection.serve_connection(TokioIo::new(stream), service.clone()));
        }
    });
    assert_served(&registry, address, "").await;
    server.abort();
}
