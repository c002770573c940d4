//! The admin service before strangers: whatever they send, and however services are named, the answer is short, well-formed and
//! told without reading what was not asked for.
#![cfg(feature = "http")]

use axum::Router;
use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    Method, Request, Response,
    header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use portcullis::{
    CircuitBreakerConfig, Clock, MetricsFormat, Name, Outcome, RateLimitLayer, RateLimiter, Registry, TokenBucket,
};
use serde_json::Value;
use std::{
    convert::Infallible,
    fmt::Write,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tower::{Layer, ServiceExt};

const MINUTE: Duration = Duration::from_secs(60);
const PATHS: [&str; 5] = ["/status", "/status/search", "/metrics", "/livez", "/readyz"];

/// A body that must not be asked for anything.
struct Unread;

impl Body for Unread {
    type Data = Bytes;
    type Error = Infallible;
    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        panic!("the body was read")
    }
}

fn answer<B>(registry: &Registry, request: Request<B>) -> Response<Bytes> {
    let answer = registry.admin().oneshot(request).now_or_never();
    let (head, body) = answer.expect("it answers at once").unwrap().into_parts();
    let body = body.collect().now_or_never().expect("all is there").unwrap();
    Response::from_parts(head, body.to_bytes())
}

fn get(registry: &Registry, path: &str) -> Response<Bytes> {
    let request = Request::get(path).body(Unread);
    answer(registry, request.unwrap_or_else(|error| panic!("{path}: {error}")))
}

fn text(response: &Response<Bytes>) -> &str {
    std::str::from_utf8(response.body()).expect("text")
}

fn json(response: &Response<Bytes>) -> Value {
    serde_json::from_str(text(response)).unwrap_or_else(|error| panic!("{error} in {}", text(response)))
}

fn search() -> Registry {
    let registry = Registry::with_clock(Clock::manual());
    let config = CircuitBreakerConfig::default().critical(true);
    registry.circuit_breaker("search", config).unwrap();
    registry.rate_limiter("search", TokenBucket::new(50, MINUTE)).unwrap();
    registry
}

/// Names that mean something to one format or another.
fn hostile_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "\"",
        "\\",
        "\\\"",
        "\\n",
        "\n",
        "\r\n",
        "a\r\nSet-Cookie: a=b\r\n\r\n<html>",
        "\"} 1\ncircuit_breaker_state{service=\"forged",
        "# EOF",
        "\n# EOF\n",
        "# HELP circuit_breaker_state forged",
        "</script><script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "\",\"open_circuits\":[],\"x\":\"",
        "'; DROP TABLE services; --",
        "{{7*7}}${jndi:ldap://x}",
        "/",
        "..",
        "../../etc/passwd",
        "a/b/c",
        "//",
        "%",
        "%2e%2e%2f",
        "%00",
        "%zz",
        "?verbose",
        "#fragment",
        "a b",
        "+",
        "\0",
        "\u{1}\u{1f}\u{7f}",
        "\u{1b}[31mred",
        "\u{85}\u{2028}\u{2029}",
        "\u{202e}desrever",
        "\u{feff}bom",
        "\u{fffd}",
        "e\u{301}",
        "é",
        "🦀",
        "\u{10ffff}",
        "null",
        "__proto__",
        "services",
    ]
    .map(str::to_owned)
    .to_vec();
    names.push("\"".repeat(Name::MAX_LEN));
    names.push("\n".repeat(Name::MAX_LEN));
    names.push("🦀".repeat(Name::MAX_LEN / "🦀".len()));
    names
}

/// Every byte encoded.
fn encoded(name: &str) -> String {
    name.bytes().fold(String::new(), |mut path, byte| {
        write!(path, "%{byte:02x}").unwrap();
        path
    })
}

#[test]
fn every_name_of_a_service_and_of_a_limit_comes_back_as_it_is() {
    let registry = Registry::with_clock(Clock::manual());
    let names = hostile_names();
    let critical = || CircuitBreakerConfig::default().critical(true);
    for name in &names {
        registry.circuit_breaker(name, critical()).unwrap();
        let limit = TokenBucket::new(1, MINUTE);
        registry.named_rate_limiter(name, name, limit).unwrap();
    }

    let all = json(&get(&registry, "/status"));
    let shown = all["services"].as_object().unwrap();
    assert_eq!(shown.len(), names.len());
    let ready = get(&registry, "/readyz");
    let lines: Vec<&str> = text(&ready).lines().collect();
    assert_eq!(lines.len(), names.len() + 1, "a line for each, and the verdict");
    for name in &names {
        assert_eq!(shown[name.as_str()]["service"], name.as_str());
        let one = get(&registry, &format!("/status/{}", encoded(name)));
        let one = json(&one);
        assert_eq!(one["service"], name.as_str());
        assert_eq!(one["rate_limiters"][0]["name"], name.as_str());
        let line = format!("[+]circuit {name:?} closed");
        assert!(lines.contains(&line.as_str()), "{line} in {lines:#?}");
    }
    assert!(
        text(&ready).chars().all(|char| char == '\n' || !char.is_control()),
        "nothing there moves a terminal's cursor"
    );
}

/// One sample's labels, unescaped: written after the format's description, and not after the crate's own code.
fn labels(line: &str) -> Vec<(String, String)> {
    let (_, mut rest) = line.split_once('{').expect("a sample with labels");
    let mut labels = Vec::new();
    loop {
        let (label, value) = rest.split_once("=\"").expect("a label");
        let (mut unescaped, mut chars) = (String::new(), value.char_indices());
        let end = loop {
            match chars.next().expect("a value that ends") {
                (at, '"') => break at,
                (_, '\\') => unescaped.push(match chars.next() {
                    Some((_, 'n')) => '\n',
                    Some((_, escaped @ ('"' | '\\'))) => escaped,
                    other => panic!("not an escape: {other:?} in {line}"),
                }),
                (_, plain) => unescaped.push(plain),
            }
        };
        labels.push((label.to_owned(), unescaped));
        match value[end + 1..].split_at(1) {
            (",", more) => rest = more,
            ("}", _) => return labels,
            other => panic!("{other:?} in {line}"),
        }
    }
}

#[test]
fn no_name_forges_a_line_or_a_label_of_the_metrics() {
    let registry = Registry::with_clock(Clock::manual());
    let mut names = hostile_names();
    for name in &names {
        registry.circuit_breaker(name, CircuitBreakerConfig::default()).unwrap();
    }
    names.sort_unstable();
    for format in [MetricsFormat::Prometheus, MetricsFormat::OpenMetrics] {
        let page = registry.metrics_text(format);
        let mut found: Vec<String> = Vec::new();
        for line in page
            .split('\n')
            .filter(|line| line.starts_with("circuit_breaker_state{"))
        {
            let mut labels = labels(line);
            assert_eq!(labels.len(), 1, "{line}");
            let (label, value) = labels.remove(0);
            assert_eq!(label, "service", "{line}");
            found.push(value);
        }
        found.sort_unstable();
        assert_eq!(found, names, "one sample for each name");
        assert_eq!(
            page.split('\n').filter(|line| *line == "# EOF").count(),
            usize::from(format == MetricsFormat::OpenMetrics)
        );
    }
}

#[test]
fn no_answer_is_taken_for_a_page_by_a_browser() {
    let registry = search();
    for path in PATHS.into_iter().chain(["/nowhere", "/status/%3Cscript%3E"]) {
        let response = get(&registry, path);
        assert_eq!(response.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff", "{path}");
        let content_type = response.headers()[CONTENT_TYPE].to_str().unwrap();
        assert!(!content_type.contains("html"), "{path}: {content_type}");
    }
}

#[test]
fn nothing_of_a_request_comes_back_but_the_name_of_a_service_that_is_there() {
    let registry = search();
    let marks = ["mark%3Cb%3E", "%22mark", "mark%0a", "MARK"];
    for mark in marks {
        for path in [
            format!("/{mark}"),
            format!("/status/{mark}"),
            format!("/status/search/{mark}"),
            format!("/status/search?{mark}"),
            format!("/livez?q={mark}"),
        ] {
            for method in ["GET", "POST", "TRACE", "OPTIONS", "MARK"] {
                let request = Request::builder()
                    .method(method)
                    .uri(&path)
                    .header("cookie", "session=mark")
                    .header("authorization", "Bearer mark")
                    .header("accept", "mark/mark");
                let response = answer(&registry, request.body(Unread).unwrap());
                let whole = format!("{:?} {}", response.headers(), text(&response)).to_lowercase();
                assert!(!whole.contains("mark"), "{method} {path}: {whole}");
            }
        }
    }
}

#[test]
fn no_method_and_no_header_makes_it_write() {
    let registry = search();
    let before = get(&registry, "/status").into_body();
    let mut events = registry.subscribe(8);
    let methods = [
        "GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PURGE", "PROPFIND", "RESET",
    ];
    for method in methods {
        for path in [
            "/status",
            "/status/search",
            "/status/search/reset",
            "/status/search?state=closed",
            "/readyz",
        ] {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header("x-http-method-override", "POST")
                .header("content-type", "application/json");
            answer(&registry, request.body(r#"{"updateState":"FORCE_OPEN"}"#).unwrap());
        }
    }
    assert_eq!(get(&registry, "/status").into_body(), before);
    assert_eq!(events.try_recv(), None);
}

#[test]
fn every_form_of_a_target_is_answered() {
    let registry = search();
    for (method, target, status) in [
        (Method::GET, "http://elsewhere.example/livez", 200),
        (
            Method::GET,
            "http://user:password@elsewhere.example:1/status/search?x#y",
            200,
        ),
        (Method::GET, "http://elsewhere.example", 404),
        (Method::OPTIONS, "*", 404),
        (Method::OPTIONS, "/livez", 405),
        (Method::CONNECT, "elsewhere.example:443", 404),
        (Method::TRACE, "/livez", 405),
        (Method::GET, "/livez?%00%ff&&==&a=b&a=b", 200),
        (Method::GET, "/livez/..", 404),
        (Method::GET, "/livez;jsessionid=1", 404),
        (Method::GET, "/livez%20", 404),
        (Method::GET, "/%6civez", 404),
        (Method::GET, "/status/%73%65%61%72%63%68", 200),
        (Method::GET, "/status/%2573earch", 404),
        (Method::GET, "/status/%c0%af", 404),
        (Method::GET, "/status/%ed%a0%80", 404),
    ] {
        let request = Request::builder().method(&method).uri(target).body(Unread).unwrap();
        assert_eq!(answer(&registry, request).status(), status, "{method} {target}");
    }
}

#[test]
fn a_path_longer_than_any_name_is_refused_unread() {
    let registry = search();
    let longest = "🦀".repeat(63);
    registry
        .circuit_breaker(&longest, CircuitBreakerConfig::default())
        .unwrap();
    let found = get(&registry, &format!("/status/{}", encoded(&longest)));
    assert_eq!(
        json(&found)["service"],
        longest,
        "the longest there is, in its longest spelling"
    );
    let short = format!("/status/{}", "%41".repeat(Name::MAX_LEN));
    let long = format!("/status/{}", "%41".repeat(20_000));
    let cost = |path: &str| {
        let request = Request::get(path).body(()).unwrap();
        let mut admin = registry.admin();
        allocation_counter::measure(|| {
            let answer = tower::Service::call(&mut admin, request);
            assert_eq!(answer.into_inner().unwrap().status(), 404);
        })
        .bytes_total
    };
    // What is left is the answer, which is the same for both.
    assert!(cost(&long) < cost(&short), "no memory is taken to decode it");
}

#[test]
fn a_limiter_stands_before_it_as_before_any_service() {
    let limiter = RateLimiter::new("admin", TokenBucket::new(2, MINUTE)).unwrap();
    let service = RateLimitLayer::http(limiter).layer(search().admin());
    let statuses = [200, 200, 429].map(|status| (status, service.clone()));
    for (status, service) in statuses {
        let response = service.oneshot(Request::get("/status").body(Unread).unwrap());
        assert_eq!(response.now_or_never().unwrap().unwrap().status(), status);
    }
}

#[test]
fn health_takes_no_longer_however_many_keys_there_are() {
    let registry = search();
    let cost = |path: &str| {
        let request = Request::get(path).body(()).unwrap();
        let mut admin = registry.admin();
        allocation_counter::measure(|| {
            let answer = tower::Service::call(&mut admin, request);
            assert_eq!(answer.into_inner().unwrap().status(), 200);
        })
    };
    let limit = TokenBucket::new(1, MINUTE);
    let callers = registry.keyed_rate_limiter("search", "caller", limit, 10_000).unwrap();
    let config = CircuitBreakerConfig::default().failure_threshold(1);
    let hosts = registry.keyed_circuit_breaker("hosts", config, 1_000).unwrap();
    let before = ["/livez", "/readyz"].map(cost);
    for key in 0..1_000 {
        callers.try_acquire(&key).unwrap();
        callers.try_acquire(&key).unwrap_err();
        hosts.try_acquire(&key).unwrap().settle(Outcome::Failure);
    }
    let after = ["/livez", "/readyz"].map(cost);
    assert_eq!(
        before.map(|cost| (cost.count_total, cost.bytes_total)),
        after.map(|cost| (cost.count_total, cost.bytes_total))
    );
}

/// Sends bytes and reads the first answer's head, without closing this end.
async fn exchange(server: SocketAddr, request: &[u8]) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(server).await.unwrap();
    // A server that has heard enough may have closed its end.
    let _ = stream.write_all(request).await;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    (stream, String::from_utf8(head).unwrap())
}

fn status(head: &str) -> u16 {
    let line = head.lines().next().unwrap_or_default();
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.unwrap_or_else(|| panic!("no answer: {head:?}"))
}

/// What must hold behind any server: the admin service answers though the body has not come and never will.
async fn assert_hardy(server: SocketAddr) {
    let body = "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let long = "Content-Length: 9000000000000000000\r\n\r\nhello";
    let host = "Host: localhost\r\n";
    for more in [body, long] {
        for (method, expected) in [("GET", 200), ("POST", 405), ("PUT", 405), ("BREW", 405)] {
            for path in ["/status", "/status/search", "/livez"] {
                let request = format!("{method} {path} HTTP/1.1\r\n{host}{more}");
                let (_open, head) = exchange(server, request.as_bytes()).await;
                assert_eq!(status(&head), expected, "{request}");
            }
        }
    }
    let expect = format!("POST /status HTTP/1.1\r\n{host}Expect: 100-continue\r\nContent-Length: 1000000\r\n\r\n");
    let (_open, head) = exchange(server, expect.as_bytes()).await;
    assert_eq!(status(&head), 405, "it asks for no body that it will not read");

    for (line, expected) in [
        ("GET http://elsewhere.example/livez HTTP/1.1", 200),
        ("TRACE /livez HTTP/1.1", 405),
        ("OPTIONS * HTTP/1.1", 404),
        ("M!#$%&'*+-.^_`|~ /livez HTTP/1.1", 405),
        ("GET /livez?a=%00%ff HTTP/1.1", 200),
        ("GET /status/%00 HTTP/1.1", 404),
    ] {
        let (_open, head) = exchange(server, format!("{line}\r\n{host}Cookie: secret\r\n\r\n").as_bytes()).await;
        assert_eq!(status(&head), expected, "{line}");
    }

    // Longer than a server takes: whatever it says, it is no success, and it goes on serving.
    let huge = format!("GET /status/{} HTTP/1.1\r\n{host}\r\n", "x".repeat(1 << 20));
    let (_open, head) = exchange(server, huge.as_bytes()).await;
    assert!(head.is_empty() || status(&head) >= 400, "{head}");
    let (_open, head) = exchange(server, format!("GET /livez HTTP/1.1\r\n{host}\r\n").as_bytes()).await;
    assert_eq!(status(&head), 200);
}

async fn loopback() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[tokio::test]
async fn behind_axum_it_answers_whatever_comes_and_waits_for_no_body() {
    let app = Router::new().fallback_service(search().admin());
    let (listener, address) = loopback().await;
    let server = tokio::spawn(async move { axum::serve(listener, app).await });
    assert_hardy(address).await;
    server.abort();
}

#[tokio::test]
async fn behind_hyper_it_answers_whatever_comes_and_waits_for_no_body() {
    let service = TowerToHyperService::new(search().admin());
    let (listener, address) = loopback().await;
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let connection = hyper::server::conn::http1::Builder::new();
            tokio::spawn(connection.serve_connection(TokioIo::new(stream), service.clone()));
        }
    });
    assert_hardy(address).await;
    server.abort();
}
