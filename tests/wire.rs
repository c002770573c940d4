//! Real servers and clients on loopback: axum, hyper and tonic, HTTP/1.1 and HTTP/2.
#![cfg(feature = "http")]

use axum::{
    Router,
    body::Body,
    middleware::{Next, from_fn},
    routing::get,
};
use bytes::Bytes;
use futures_util::{StreamExt, future::join_all, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use portcullis::{
    CircuitBreaker, CircuitBreakerLayer, ClientIp, Clock, KeyedRateLimiter, Outcome, RateLimitLayer, RateLimiter,
    SlidingWindow, State, TokenBucket,
};
use std::{
    convert::Infallible,
    future::IntoFuture,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Barrier,
    task::JoinError,
};
use tonic::{Code, transport::Endpoint};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_client::HealthClient},
    server::health_reporter,
};
use tonic_types::StatusExt;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};

const HOUR: Duration = Duration::from_secs(3600);

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn serve(app: Router) -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::spawn(axum::serve(listener, app).into_future());
    address
}

fn limiter(algorithm: impl Into<portcullis::Algorithm>) -> RateLimiter {
    RateLimiter::builder("api", algorithm)
        .clock(Clock::manual())
        .build()
        .unwrap()
}

/// 1,500 requests at once over 32 connections: how many were answered 200, and how many 429.
async fn flood(server: SocketAddr) -> (usize, usize) {
    let connections = (0..32).map(|connection| async move {
        let stream = TcpStream::connect(server).await.unwrap();
        let (mut sender, connected) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        let driver = tokio::spawn(connected);
        let mut statuses = Vec::new();
        let share = 1_500 / 32 + usize::from(connection < 1_500 % 32);
        for _ in 0..share {
            sender.ready().await.unwrap();
            let request = Request::get("/")
                .header("host", "test")
                .body(Empty::<Bytes>::new())
                .unwrap();
            let answer = sender.send_request(request).await.unwrap();
            statuses.push(answer.status());
            answer.into_body().collect().await.unwrap();
        }
        driver.abort();
        statuses
    });
    tally(join_all(connections.map(tokio::spawn)).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_1500_requests_over_32_connections_exactly_the_quota_passes_in_axum() {
    for limiter in [
        limiter(TokenBucket::new(100, HOUR)),
        limiter(SlidingWindow::new(100, HOUR)),
    ] {
        let app = Router::new()
            .route("/", get(async || "ok"))
            .layer(RateLimitLayer::http(limiter.clone()));
        assert_eq!(flood(serve(app).await).await, (100, 1_400));
        let status = limiter.status();
        assert_eq!((status.accepted_requests, status.rejected_requests), (100, 1_400));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_1500_requests_that_32_http2_connections_carry_at_once_exactly_the_quota_passes_in_axum() {
    for limiter in [
        limiter(TokenBucket::new(100, HOUR)),
        limiter(SlidingWindow::new(100, HOUR)),
    ] {
        // Nobody is answered before all are there: 1,500 at once, which no limit of a connection hinders.
        let there = Arc::new(Barrier::new(1_500));
        let gather = from_fn(move |request: Request<Body>, next: Next| {
            let there = there.clone();
            async move {
                there.wait().await;
                next.run(request).await
            }
        });
        let app = Router::new()
            .route("/", get(async || "ok"))
            .layer(RateLimitLayer::http(limiter.clone()))
            .layer(gather);
        assert_eq!(flood_http2(serve(app).await).await, (100, 1_400));
        let status = limiter.status();
        assert_eq!((status.accepted_requests, status.rejected_requests), (100, 1_400));
    }
}

/// The same over HTTP/2, where each connection carries its share at once.
async fn flood_http2(server: SocketAddr) -> (usize, usize) {
    let connections = (0..32).map(|connection| async move {
        let stream = TcpStream::connect(server).await.unwrap();
        let (sender, connected) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
        let driver = tokio::spawn(connected);
        let share = 1_500 / 32 + usize::from(connection < 1_500 % 32);
        let calls = (0..share).map(|_| {
            let mut sender = sender.clone();
            async move {
                let request = Request::get("http://test/").body(Empty::<Bytes>::new()).unwrap();
                let answer = sender.send_request(request).await.unwrap();
                let status = answer.status();
                answer.into_body().collect().await.unwrap();
                status
            }
        });
        let statuses = join_all(calls).await;
        driver.abort();
        statuses
    });
    tally(join_all(connections.map(tokio::spawn)).await)
}

fn tally(statuses: Vec<Result<Vec<StatusCode>, JoinError>>) -> (usize, usize) {
    let statuses: Vec<_> = statuses.into_iter().flat_map(Result::unwrap).collect();
    let count = |status| statuses.iter().filter(|it| **it == status).count();
    assert_eq!(statuses.len(), 1_500);
    (count(StatusCode::OK), count(StatusCode::TOO_MANY_REQUESTS))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_layer_that_is_applied_to_each_connection_anew_is_still_one_limit() {
    for http2 in [false, true] {
        let clock = Clock::manual();
        let callers = KeyedRateLimiter::builder("api", TokenBucket::new(100, HOUR))
            .clock(&clock)
            .build()
            .unwrap();
        let layer = RateLimitLayer::http(callers.by(ClientIp::new()));
        let (listener, server) = listen().await;
        tokio::spawn(async move {
            while let Ok((stream, peer)) = listener.accept().await {
                let service = ServiceBuilder::new()
                    .map_request(move |mut request: Request<hyper::body::Incoming>| {
                        request.extensions_mut().insert(peer);
                        request
                    })
                    .service(layer.layer(service_fn(async |_| {
                        Ok::<_, Infallible>(http::Response::new(Full::<Bytes>::from("ok")))
                    })));
                tokio::spawn(async move {
                    let connection = auto::Builder::new(TokioExecutor::new());
                    let _ = connection
                        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
                        .await;
                });
            }
        });
        let passed = if http2 {
            flood_http2(server).await
        } else {
            flood(server).await
        };
        assert_eq!(passed, (100, 1_400), "http2: {http2}");
        assert_eq!(callers.status().keys.unwrap().tracked, 1, "one address");
    }
}

/// A server that sends two pieces and then fails.
async fn breaks_off() -> SocketAddr {
    let body = || {
        let pieces = stream::iter([Ok("one "), Ok("two "), Err(io::Error::other("broken"))]);
        // A turn between the pieces: else they are sent as one, and the failure before the head.
        Body::from_stream(pieces.then(async |piece| {
            tokio::task::yield_now().await;
            piece
        }))
    };
    serve(Router::new().route("/", get(async move || body()))).await
}

#[tokio::test]
async fn a_body_that_is_cut_off_on_the_wire_is_a_failure_and_opens_the_circuit() {
    for http2 in [false, true] {
        let server = breaks_off().await;
        let clock = Clock::manual();
        let breaker = CircuitBreaker::builder("upstream")
            .failure_threshold(2)
            .clock(&clock)
            .build()
            .unwrap();
        let client = Client::builder(TokioExecutor::new())
            .http2_only(http2)
            .build_http::<Empty<Bytes>>();
        let client = CircuitBreakerLayer::http(breaker.clone()).layer(client);
        let ask = || {
            let request = Request::get(format!("http://{server}/")).body(Empty::new()).unwrap();
            client.clone().oneshot(request)
        };
        for failures in 1..=2 {
            let answer = ask().await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK, "the head was well");
            answer.into_body().collect().await.expect_err("the stream breaks off");
            assert_eq!(breaker.status().metrics.failed_requests, failures, "http2: {http2}");
        }
        assert_eq!(breaker.state(), State::Open);
        let refused = ask().await.unwrap();
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["retry-after"]),
            (503, &"60".parse().unwrap())
        );
        assert_eq!(refused.headers()["content-type"], "application/problem+json");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_in_the_middle_is_a_cancelled_call() {
    for http2 in [false, true] {
        let breaker = CircuitBreaker::builder("inbound").build().unwrap();
        let endless = async || {
            Body::from_stream(
                stream::repeat_with(|| Ok::<_, Infallible>("again ")).then(async |piece| {
                    tokio::task::yield_now().await;
                    piece
                }),
            )
        };
        let app = Router::new()
            .route("/", get(endless))
            .layer(CircuitBreakerLayer::http(breaker.clone()));
        let server = serve(app).await;
        let client = Client::builder(TokioExecutor::new())
            .http2_only(http2)
            .build_http::<Empty<Bytes>>();
        let request = Request::get(format!("http://{server}/")).body(Empty::new()).unwrap();
        let mut answer = client.request(request).await.unwrap();
        answer.frame().await.unwrap().unwrap();
        assert_eq!(breaker.status().metrics.cancelled_requests, 0);
        drop((answer, client));
        let noticed = async {
            while breaker.status().metrics.cancelled_requests == 0 {
                tokio::task::yield_now().await;
            }
        };
        // Not a measure of time: the test would otherwise hang where it should fail.
        tokio::time::timeout(Duration::from_secs(60), noticed)
            .await
            .expect("the server notices");
        let metrics = breaker.status().metrics;
        assert_eq!(
            (metrics.cancelled_requests, metrics.total_requests),
            (1, 1),
            "http2: {http2}"
        );
    }
}

#[tokio::test]
async fn a_stream_of_announced_length_is_a_success_though_nobody_asks_for_its_end() {
    for http2 in [false, true] {
        let breaker = CircuitBreaker::builder("inbound").build().unwrap();
        // What a proxy does that copies the head and streams the body: hyper stops when as much is sent as was announced.
        let proxied = async || {
            let pieces = stream::iter(["one ", "two "].map(Ok::<_, Infallible>));
            ([("content-length", "8")], Body::from_stream(pieces))
        };
        let app = Router::new()
            .route("/", get(proxied))
            .layer(CircuitBreakerLayer::http(breaker.clone()));
        let server = serve(app).await;
        let client = Client::builder(TokioExecutor::new())
            .http2_only(http2)
            .build_http::<Empty<Bytes>>();
        let request = Request::get(format!("http://{server}/")).body(Empty::new()).unwrap();
        let body = client.request(request).await.unwrap().collect().await.unwrap();
        assert_eq!(body.to_bytes(), "one two ");
        let judged = async {
            loop {
                let metrics = breaker.status().metrics;
                let counts = (metrics.successful_requests, metrics.cancelled_requests);
                if counts != (0, 0) {
                    return counts;
                }
                tokio::task::yield_now().await;
            }
        };
        // Not a measure of time: the test would otherwise hang where it should fail.
        let judged = tokio::time::timeout(Duration::from_secs(60), judged).await;
        assert_eq!(
            judged.expect("the server is done with the body"),
            (1, 0),
            "http2: {http2}"
        );
    }
}

#[tokio::test]
async fn a_connection_is_upgraded_through_the_layers_of_both_sides() {
    let (inbound, outbound) = ["inbound", "outbound"]
        .map(|name| CircuitBreaker::builder(name).build().unwrap())
        .into();
    let upgrade = async |request: Request<Body>| {
        tokio::spawn(async move {
            let upgraded = hyper::upgrade::on(request).await.unwrap();
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            tokio::io::copy(&mut read, &mut write).await.unwrap();
        });
        let head = [("connection", "upgrade"), ("upgrade", "echo")];
        (StatusCode::SWITCHING_PROTOCOLS, head)
    };
    let app = Router::new()
        .route("/", get(upgrade))
        .layer(CircuitBreakerLayer::http(inbound.clone()));
    let server = serve(app).await;
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let client = CircuitBreakerLayer::http(outbound.clone()).layer(client);
    let request = Request::get(format!("http://{server}/"))
        .header("connection", "upgrade")
        .header("upgrade", "echo")
        .body(Empty::new())
        .unwrap();
    let answer = client.oneshot(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut upgraded = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    upgraded.write_all(b"hello").await.unwrap();
    let mut echoed = [0; 5];
    upgraded.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"hello");
    for breaker in [inbound, outbound] {
        let metrics = breaker.status().metrics;
        assert_eq!((metrics.successful_requests, metrics.total_requests), (1, 1));
    }
}

/// The tunnel is what follows the head: the server drops the body of that answer unread, whatever is in it.
#[tokio::test]
async fn a_probe_that_opens_a_tunnel_closes_the_circuits_of_both_sides() {
    let clock = Clock::manual();
    let [inbound, outbound] = ["inbound", "outbound"].map(|name| {
        let breaker = CircuitBreaker::builder(name)
            .failure_threshold(1)
            .success_threshold(1)
            .clock(&clock)
            .build()
            .unwrap();
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        breaker
    });
    clock.advance(Duration::from_secs(60));
    let proxy = service_fn(async |request: Request<Incoming>| {
        assert_eq!(request.method(), Method::CONNECT);
        tokio::spawn(async move {
            let upgraded = hyper::upgrade::on(request).await.unwrap();
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            tokio::io::copy(&mut read, &mut write).await.unwrap();
        });
        let body = Body::from_stream(stream::iter([Ok::<_, Infallible>("of no length that is known")]));
        Ok::<_, Infallible>(Response::new(body))
    });
    let (listener, server) = listen().await;
    let guarded = TowerToHyperService::new(CircuitBreakerLayer::http(inbound.clone()).layer(proxy));
    tokio::spawn(async move {
        let (connection, _) = listener.accept().await.unwrap();
        let builder = auto::Builder::new(TokioExecutor::new());
        let serving = builder.serve_connection_with_upgrades(TokioIo::new(connection), guarded);
        serving.await.unwrap();
    });

    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let client = CircuitBreakerLayer::http(outbound.clone()).layer(client);
    let request = Request::connect(server.to_string()).body(Empty::new()).unwrap();
    let answer = client.oneshot(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let mut tunnel = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    tunnel.write_all(b"hello").await.unwrap();
    let mut echoed = [0; 5];
    tunnel.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"hello");
    for breaker in [inbound, outbound] {
        assert_eq!(breaker.state(), State::Closed, "{}", breaker.name());
        let metrics = breaker.status().metrics;
        assert_eq!((metrics.successful_requests, metrics.total_requests), (1, 2));
    }
}

#[tokio::test]
async fn an_answer_without_a_body_is_a_success_on_both_sides() {
    for http2 in [false, true] {
        let (inbound, outbound) = ["inbound", "outbound"]
            .map(|name| CircuitBreaker::builder(name).build().unwrap())
            .into();
        let app = Router::new()
            .route("/", get(async || "the length of this is told to a HEAD"))
            .route("/204", get(async || StatusCode::NO_CONTENT))
            .route("/304", get(async || StatusCode::NOT_MODIFIED))
            .layer(CircuitBreakerLayer::http(inbound.clone()));
        let server = serve(app).await;
        let client = Client::builder(TokioExecutor::new())
            .http2_only(http2)
            .build_http::<Empty<Bytes>>();
        let client = CircuitBreakerLayer::http(outbound.clone()).layer(client);
        for (calls, (method, path)) in (1..).zip([("HEAD", "/"), ("GET", "/204"), ("GET", "/304")]) {
            let request = Request::builder().method(method).uri(format!("http://{server}{path}"));
            let request = request.body(Empty::new()).unwrap();
            drop(client.clone().oneshot(request).await.unwrap());
            for breaker in [&inbound, &outbound] {
                let metrics = breaker.status().metrics;
                let counts = (metrics.successful_requests, metrics.total_requests);
                assert_eq!(counts, (calls, calls), "{} {path}, http2: {http2}", breaker.name());
            }
        }
    }
}

/// gRPC's health service behind a layer. A macro: as a function it would repeat all that tonic asks of a layer.
macro_rules! grpc_server {
    ($layer:expr) => {{
        let (listener, address) = listen().await;
        let (health, service) = health_reporter();
        health.set_service_status("search", ServingStatus::Serving).await;
        let server = tonic::transport::Server::builder().layer($layer).add_service(service);
        tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)));
        Endpoint::from_shared(format!("http://{address}")).unwrap()
    }};
}

fn check() -> HealthCheckRequest {
    HealthCheckRequest {
        service: "search".into(),
    }
}

#[tokio::test]
async fn a_tonic_client_reads_the_details_and_the_pushback_of_a_refusal() {
    let endpoint = grpc_server!(RateLimitLayer::grpc(limiter(TokenBucket::new(
        1,
        Duration::from_secs(90)
    ))));
    let mut client = HealthClient::new(endpoint.connect().await.unwrap());
    let admitted = client.check(check()).await.unwrap();
    assert_eq!(admitted.metadata().get("ratelimit").unwrap(), r#""default";r=0;t=90"#);
    let status = client.check(check()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(
        status.message(),
        r#"rate limit "default" of "api" is exhausted; retry after 90s"#
    );
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "90000");
    let details = status.get_error_details();
    assert_eq!(details.retry_info().unwrap().retry_delay, Some(Duration::from_secs(90)));
    assert_eq!(details.quota_failure().unwrap().violations[0].subject, "default");
    assert_eq!(details.error_info().unwrap().reason, "RATE_LIMITED");
    let streaming = client.watch(check()).await.unwrap_err();
    assert_eq!(streaming.code(), Code::ResourceExhausted, "streams begin the same way");
}

#[cfg(feature = "tonic")]
#[tokio::test]
async fn an_error_of_a_layer_is_a_status_to_tonic_and_does_not_cost_the_connection() {
    let endpoint = grpc_server!(RateLimitLayer::new(limiter(TokenBucket::new(
        1,
        Duration::from_secs(90)
    ))));
    let mut client = HealthClient::new(endpoint.connect().await.unwrap());
    client.check(check()).await.unwrap();
    for _ in 0..2 {
        let status = client.check(check()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "RATE_LIMITED");
    }
}

#[tokio::test]
async fn a_tonic_client_behind_a_breaker_judges_statuses_and_streams() {
    let (listener, address) = listen().await;
    let (mut health, service) = health_reporter();
    health.set_service_status("search", ServingStatus::Serving).await;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(tokio_stream::wrappers::TcpListenerStream::new(listener), async {
                stopped.await.unwrap_or(());
            }),
    );
    let clock = Clock::manual();
    let breaker = CircuitBreaker::builder("health")
        .failure_threshold(1)
        .clock(&clock)
        .build()
        .unwrap();
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect_lazy();
    let mut client = HealthClient::new(CircuitBreakerLayer::grpc(breaker.clone()).layer(channel));
    let counts = || {
        let metrics = breaker.status().metrics;
        [
            metrics.successful_requests,
            metrics.failed_requests,
            metrics.cancelled_requests,
        ]
    };
    client.check(check()).await.unwrap();
    assert_eq!(counts(), [1, 0, 0]);
    let missing = HealthCheckRequest {
        service: "nobody".into(),
    };
    assert_eq!(client.check(missing).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(counts(), [2, 0, 0], "NOT_FOUND is an answer");

    let mut watched = client.watch(check()).await.unwrap().into_inner();
    watched.message().await.unwrap().unwrap();
    assert_eq!(counts(), [2, 0, 0], "a stream that runs is not judged");
    drop(watched);
    assert_eq!(counts(), [2, 0, 1]);

    let mut ended = client.watch(check()).await.unwrap().into_inner();
    ended.message().await.unwrap().unwrap();
    health.clear_service_status("search").await;
    assert!(
        ended.message().await.unwrap().is_none(),
        "the server ends the stream in order"
    );
    assert_eq!(counts(), [3, 0, 1]);

    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
    assert_eq!(client.check(check()).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!((counts(), breaker.state()), ([3, 1, 1], State::Open));
    let refused = client.check(check()).await.unwrap_err();
    assert_eq!(
        (
            refused.code(),
            refused.metadata().get("grpc-retry-pushback-ms").unwrap().as_bytes()
        ),
        (Code::Unavailable, &b"60000"[..])
    );
    assert_eq!(breaker.status().metrics.rejected_requests, 1);
}
