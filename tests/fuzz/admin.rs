//! The admin service: any services, any requests.

use super::input::{bytes, play, text};
use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header::ACCEPT};
use http_body_util::{BodyExt, Full};
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use portcullis::{
    Admin, Backoff, CircuitBreaker, Clock, KeyedCircuitBreaker, KeyedRateLimiter, ManualClock, Outcome, RateLimiter,
    Registry, SlidingWindow, TokenBucket, Window,
};
use std::{collections::BTreeSet, time::Duration};
use tower_service::Service;

use super::ready;

const MINUTE: Duration = Duration::from_secs(60);
/// What no page may show.
const SECRET: &str = "secret-of-a-client";
/// A page has some forty samples of a service, each with its name; a refusal has no part of the request.
const LARGEST_REFUSAL: usize = 400;
const LARGEST_PART: usize = 64 * 1024;

pub fn run(data: &[u8]) {
    play(data, scenario);
}

fn scenario(input: &mut Unstructured<'_>) -> Result<()> {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let mut names = BTreeSet::new();
    for _ in 0..input.int_in_range(0..=4)? {
        let name = text(input)?;
        let limit = text(input)?;
        if register(input, &registry, &clock, &name, &limit)? {
            names.insert(name);
        }
    }
    while !input.is_empty() {
        if let Some(request) = request(input, &names)? {
            ask(&registry, &names, request);
        }
        clock.advance(Duration::from_millis(input.arbitrary::<u16>()?.into()));
    }
    for name in &names {
        let path = format!("/status/{}", percent_encode(name.as_bytes(), NON_ALPHANUMERIC));
        let response = answer(
            registry.admin(),
            Request::get(path).body(Full::<Bytes>::default()).expect("a path"),
        );
        assert_eq!(
            response.status(),
            StatusCode::OK,
            "every service is shown under its name: {name:?}"
        );
    }
    Ok(())
}

/// Something by that name, used a little. `false` if it was refused.
fn register(
    input: &mut Unstructured<'_>,
    registry: &Registry,
    clock: &ManualClock,
    name: &str,
    limit: &str,
) -> Result<bool> {
    let (seconds, number) = (
        Duration::from_secs(input.arbitrary()?),
        u32::from(input.arbitrary::<u8>()?),
    );
    let calls = input.int_in_range(0..=6)?;
    let outcome = |input: &mut Unstructured<'_>| input.choose(&[Outcome::Success, Outcome::Failure]).copied();
    Ok(match input.int_in_range(0..=4)? {
        0 => {
            let breaker = CircuitBreaker::builder(name)
                .clock(clock)
                .failure_threshold(number)
                .failure_rate(input.arbitrary()?)
                .window(if input.arbitrary()? {
                    Window::time(seconds)
                } else {
                    Window::calls(number)
                })
                .minimum_calls(1)
                .recovery_timeout(Duration::from_secs(1))
                .recovery_backoff(Backoff::new(input.arbitrary()?, seconds))
                .critical(input.arbitrary()?)
                .build();
            let Ok(breaker) = breaker else { return Ok(false) };
            for _ in 0..calls {
                match input.int_in_range(0..=5)? {
                    0 => breaker.force_open(),
                    1 => breaker.disable(),
                    2 => breaker.reset(),
                    _ => {
                        if let Ok(permit) = breaker.try_acquire() {
                            permit.settle(outcome(input)?);
                        }
                    }
                }
            }
            registry.register(breaker).is_ok()
        }
        1 => {
            let breakers = KeyedCircuitBreaker::builder(name).clock(clock).max_keys(3).build();
            let Ok(breakers) = breakers else { return Ok(false) };
            for key in 0..calls {
                if let Ok(permit) = breakers.try_acquire(&(SECRET, key)) {
                    permit.settle(outcome(input)?);
                }
            }
            registry.register(breakers).is_ok()
        }
        2 => {
            let limiter = RateLimiter::builder(name, SlidingWindow::new(number, seconds))
                .limit(limit)
                .clock(clock)
                .build();
            let Ok(limiter) = limiter else { return Ok(false) };
            let _ = limiter.try_acquire_n(calls);
            registry.register(limiter).is_ok()
        }
        3 => {
            let bucket = TokenBucket::new(number, seconds);
            let limiter = KeyedRateLimiter::builder(name, bucket)
                .limit(limit)
                .max_keys(2)
                .clock(clock)
                .build();
            let Ok(limiter) = limiter else { return Ok(false) };
            for key in 0..calls {
                for _ in 0..3 {
                    let _ = limiter.try_acquire_n(&format!("{SECRET}-{key}"), 200);
                }
            }
            registry.register(limiter).is_ok()
        }
        _ => registry
            .named_rate_limiter(name, limit, TokenBucket::new(number, MINUTE))
            .is_ok(),
    })
}

fn request(input: &mut Unstructured<'_>, names: &BTreeSet<String>) -> Result<Option<Request<Full<Bytes>>>> {
    const METHODS: [&str; 5] = ["GET", "HEAD", "POST", "DELETE", "OPTIONS"];
    const PATHS: [&str; 6] = ["/status", "/metrics", "/livez", "/readyz", "/", "/status/"];
    let method = match input.int_in_range(0..=7)? {
        0 => Method::from_bytes(&bytes(input)?).ok(),
        at => Method::from_bytes(METHODS[at % METHODS.len()].as_bytes()).ok(),
    };
    let path = match input.int_in_range(0..=3)? {
        0 => bytes(input)?,
        1 => {
            let name = names
                .iter()
                .nth(input.int_in_range(0..=4)?)
                .map_or("search", String::as_str);
            format!("/status/{}", percent_encode(name.as_bytes(), NON_ALPHANUMERIC)).into_bytes()
        }
        2 => [b"/status/".to_vec(), bytes(input)?].concat(),
        _ => input.choose(&PATHS)?.as_bytes().to_vec(),
    };
    // A path of many kilobytes, as a server lets it through.
    let path = path.repeat(if input.ratio(1_u8, 16_u8)? { 60 } else { 1 });
    let (Some(method), Ok(uri)) = (method, Uri::try_from(path)) else {
        return Ok(None);
    };
    let mut request = Request::new(Full::new(bytes(input)?.into()));
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    for _ in 0..input.int_in_range(0..=2)? {
        let name = if input.arbitrary()? {
            Ok(ACCEPT)
        } else {
            HeaderName::from_bytes(&bytes(input)?)
        };
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(&bytes(input)?)) {
            request.headers_mut().append(name, value);
        }
    }
    Ok(Some(request))
}

fn answer<B>(mut admin: Admin, request: Request<B>) -> Response<Full<Bytes>> {
    let Ok(response) = ready(admin.call(request));
    response
}

fn body(response: Response<Full<Bytes>>) -> String {
    let Ok(collected) = ready(response.into_body().collect());
    String::from_utf8(collected.to_bytes().to_vec()).expect("every page is UTF-8")
}

fn ask(registry: &Registry, names: &BTreeSet<String>, request: Request<Full<Bytes>>) {
    let before = registry.status();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut as_get = Request::get(request.uri()).body(()).expect("it had a URI");
    as_get.headers_mut().clone_from(request.headers());

    let response = answer(registry.admin(), request);
    assert_eq!(registry.status(), before, "reading changes nothing");
    let (status, headers) = (response.status(), response.headers().clone());
    let page = body(response);
    assert_eq!(headers["cache-control"], "no-store");
    if method == Method::HEAD {
        assert_eq!(page, "", "a HEAD is answered without a body");
        let same = answer(registry.admin(), as_get);
        assert_eq!(
            (same.status(), same.headers()),
            (status, &headers),
            "and with the headers of a GET"
        );
        return;
    }
    assert_eq!(headers["content-length"], page.len().to_string().as_str());
    assert!(
        page.len() <= LARGEST_PART * (1 + names.len()),
        "{} bytes are too many",
        page.len()
    );
    assert!(!page.contains(SECRET), "no page shows a key");
    let content_type = headers["content-type"].to_str().expect("text");
    match status {
        StatusCode::OK => assert_eq!(method, Method::GET, "only readers get a page"),
        StatusCode::SERVICE_UNAVAILABLE => assert_eq!((method, path.as_str()), (Method::GET, "/readyz")),
        StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_FOUND => {
            assert!(
                page.len() <= LARGEST_REFUSAL,
                "a refusal repeats nothing of the request: {page}"
            );
            assert_eq!(content_type, "application/problem+json");
            assert_eq!(headers.contains_key("allow"), status == StatusCode::METHOD_NOT_ALLOWED);
        }
        other => panic!("{other}"),
    }
    match content_type {
        "application/json" => check_json(names, &path, &page),
        "application/problem+json" => {
            let problem: serde_json::Value = serde_json::from_str(&page).expect("it is JSON");
            assert_eq!(problem["status"], status.as_u16());
        }
        "text/plain; charset=utf-8" => check_health(names, &path, &page),
        _ => check_metrics(names, content_type, &page),
    }
}

fn check_json(names: &BTreeSet<String>, path: &str, page: &str) {
    let status: serde_json::Value = serde_json::from_str(page).expect("it is JSON");
    if path == "/status" {
        let shown: BTreeSet<_> = status["services"]
            .as_object()
            .expect("services")
            .keys()
            .cloned()
            .collect();
        assert_eq!(&shown, names, "every service is shown, and nothing else");
    } else {
        let service = status["service"].as_str().expect("a service has a name");
        assert!(names.contains(service));
    }
}

/// `ok`, or a line for each critical circuit and one for all.
fn check_health(names: &BTreeSet<String>, path: &str, page: &str) {
    let lines: Vec<_> = page.lines().collect();
    let (last, circuits) = lines.split_last().expect("it says something");
    match path {
        "/livez" => assert_eq!(lines, ["ok"]),
        _ => assert!(matches!(*last, "ready" | "not ready"), "{page}"),
    }
    assert!(circuits.len() <= names.len(), "a name forges no line: {page}");
    for circuit in circuits {
        assert!(
            circuit.starts_with("[+]circuit \"") || circuit.starts_with("[-]circuit \""),
            "{page}"
        );
    }
}

/// Every line is a comment, or one sample whose labels say names that exist.
fn check_metrics(names: &BTreeSet<String>, content_type: &str, page: &str) {
    assert!(page.ends_with('\n'));
    // Not `lines`: a carriage return is a part of a name.
    let mut samples = BTreeSet::new();
    for line in page.split_terminator('\n').filter(|line| !line.starts_with("# ")) {
        let (name, rest) = line.split_once('{').expect("every sample has labels");
        assert!(
            name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'),
            "{line:?}"
        );
        let (labels, value) = labels(rest);
        let value = value.strip_prefix("} ").expect("the labels end");
        assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line:?}");
        for (label, value) in &labels {
            assert!(
                label != "service" || names.contains(value),
                "nobody is called {value:?}"
            );
        }
        assert!(samples.insert((name, labels)), "no sample comes twice: {line:?}");
    }
    let is_open_metrics = content_type.starts_with("application/openmetrics-text");
    assert_eq!(page.ends_with("# EOF\n"), is_open_metrics);
}

/// The labels, and what stands behind them.
fn labels(mut rest: &str) -> (Vec<(String, String)>, &str) {
    let mut labels = Vec::new();
    loop {
        let (label, value) = rest.split_once("=\"").expect("a label and its value");
        let mut text = String::new();
        let mut chars = value.char_indices();
        let end = loop {
            match chars.next().expect("a value ends with a quotation mark") {
                (at, '"') => break at,
                (_, '\\') => match chars.next().expect("something is escaped").1 {
                    'n' => text.push('\n'),
                    escaped @ ('"' | '\\') => text.push(escaped),
                    other => panic!("there is no escape for {other:?}"),
                },
                (_, other) => text.push(other),
            }
        };
        labels.push((label.to_owned(), text));
        rest = &value[end + 1..];
        match rest.strip_prefix(',') {
            Some(others) => rest = others,
            None => return (labels, rest),
        }
    }
}
