//! The layers in the stacks that people build: axum, tonic, hyper, and tower's own middleware around and under them.

use axum::{
    Router,
    body::Body,
    error_handling::HandleErrorLayer,
    http::{Request, Response, StatusCode, header::RETRY_AFTER},
    routing::get,
};
use futures_util::FutureExt;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use portcullis::{
    BoxError, CircuitBreaker, CircuitBreakerLayer, Clock, Guard, GuardLayer, ManualClock, Outcome, RateLimitLayer,
    RateLimiter, Reason, Rejected, SlidingWindow, State, TokenBucket,
};
use std::{
    convert::Infallible,
    fmt,
    future::{Future, Ready, pending, ready},
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_test::task;
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt, balance::p2c::Balance, discover::ServiceList,
    limit::ConcurrencyLimitLayer, load::Constant, load_shed::error::Overloaded, retry, service_fn,
};

const MINUTE: Duration = Duration::from_secs(60);

fn breaker(clock: &ManualClock) -> CircuitBreaker {
    CircuitBreaker::builder("search")
        .clock(clock)
        .failure_threshold(1)
        .half_open_max_calls(1)
        .success_threshold(1)
        .build()
        .unwrap()
}

fn open(clock: &ManualClock) -> CircuitBreaker {
    let breaker = breaker(clock);
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    breaker
}

fn limiter(clock: &ManualClock, limit: u32) -> RateLimiter {
    RateLimiter::builder("search", TokenBucket::new(limit, MINUTE))
        .clock(clock)
        .build()
        .unwrap()
}

/// An error from somebody else's crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("connection refused")
    }
}

impl std::error::Error for Refused {}

/// Answers even numbers.
async fn even(request: u32) -> Result<u32, Refused> {
    if request.is_multiple_of(2) {
        Ok(request)
    } else {
        Err(Refused)
    }
}

fn found<T: fmt::Debug>(result: Result<T, BoxError>) -> Rejected {
    let error = result.expect_err("the call was to be rejected");
    Rejected::find(&*error)
        .expect("the error was to be a rejection")
        .clone()
}

/// What a web service answers to those whom it rejects.
fn try_later(why: &Rejected) -> Response<Body> {
    let status = match why.reason {
        Reason::OverLimit => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let wait = why.retry_after.map_or(0, |wait| wait.as_secs());
    Response::builder()
        .status(status)
        .header(RETRY_AFTER, wait)
        .body(Body::from(why.to_string()))
        .unwrap()
}

fn by_status<B, E>(result: &Result<Response<B>, E>) -> Outcome {
    match result {
        Ok(response) if !response.status().is_server_error() => Outcome::Success,
        _ => Outcome::Failure,
    }
}

fn ask(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

// ---- axum --------------------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn axum_routers_take_the_layers_in_response_form_without_an_error_handler() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let app: Router = Router::new()
        .route("/", get(async || "hi"))
        .route("/broken", get(async || StatusCode::BAD_GATEWAY))
        .layer(
            CircuitBreakerLayer::new(breaker.clone())
                .classify(by_status)
                .fallback_with(async |_: Request<_>, why| Ok(try_later(&why))),
        )
        .layer(RateLimitLayer::new(limiter(&clock, 4)).fallback_with(async |_: Request<_>, why| Ok(try_later(&why))));
    let status = async |path| app.clone().oneshot(ask(path)).await.unwrap().status();

    assert_eq!(status("/").await, StatusCode::OK);
    assert_eq!(status("/broken").await, StatusCode::BAD_GATEWAY);
    assert_eq!(breaker.state(), State::Open);
    assert_eq!(status("/").await, StatusCode::SERVICE_UNAVAILABLE);
    clock.advance(MINUTE);
    assert_eq!(status("/").await, StatusCode::OK, "the probe");
    for _ in 0..3 {
        assert_eq!(status("/").await, StatusCode::OK);
    }
    let response = app.oneshot(ask("/")).await.unwrap();
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(response.headers()[RETRY_AFTER], "15");
}

#[tokio::test]
async fn axum_route_layers_guard_the_routes_that_exist_and_each_router_its_own() {
    async fn busy(_: Request<Body>, why: Rejected) -> Result<Response<Body>, Infallible> {
        Ok(try_later(&why))
    }
    let clock = Clock::manual();
    let shared = limiter(&clock, 2);
    let guarded = |path: &str| {
        Router::new()
            .route(path, get(async || "hi"))
            .route_layer(RateLimitLayer::new(shared.clone()).fallback_with(busy))
    };
    let app: Router = guarded("/a").merge(guarded("/b")).route("/free", get(async || "hi"));
    let status = async |path| app.clone().oneshot(ask(path)).await.unwrap().status();

    assert_eq!(status("/nowhere").await, StatusCode::NOT_FOUND, "costs nothing");
    assert_eq!(status("/a").await, StatusCode::OK);
    assert_eq!(status("/b").await, StatusCode::OK);
    assert_eq!(
        status("/a").await,
        StatusCode::TOO_MANY_REQUESTS,
        "both routes share the handle's limit"
    );
    assert_eq!(status("/free").await, StatusCode::OK);
}

#[tokio::test]
async fn axum_routers_take_the_layers_in_error_form_under_an_error_handler() {
    let clock = Clock::manual();
    let app: Router = Router::new().route("/", get(async || "hi")).layer(
        ServiceBuilder::new()
            .layer(HandleErrorLayer::new(async |error: BoxError| {
                match Rejected::find(&*error) {
                    Some(why) => try_later(why),
                    None => Response::builder().status(500).body(Body::empty()).unwrap(),
                }
            }))
            .layer(RateLimitLayer::new(limiter(&clock, 1)))
            .layer(CircuitBreakerLayer::new(breaker(&clock))),
    );
    let status = async || app.clone().oneshot(ask("/")).await.unwrap().status();
    assert_eq!(status().await, StatusCode::OK);
    assert_eq!(status().await, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn axum_routers_take_pairs_and_waiting_layers() {
    let clock = Clock::manual();
    let pair = (limiter(&clock, 1), breaker(&clock));
    let app: Router = Router::new()
        .route("/", get(async || "hi"))
        .layer(GuardLayer::new(pair).fallback_with(async |_: Request<_>, why| Ok(try_later(&why))))
        .layer(
            RateLimitLayer::new(limiter(&clock, 2))
                .wait(MINUTE)
                .fallback_with(async |_: Request<_>, why| Ok(try_later(&why))),
        );
    let mut calls: Vec<_> = (0..4).map(|_| task::spawn(app.clone().oneshot(ask("/")))).collect();
    let mut status = |at: usize| match calls[at].poll() {
        Poll::Ready(response) => Some(response.unwrap().status()),
        Poll::Pending => None,
    };
    assert_eq!(status(0), Some(StatusCode::OK));
    assert_eq!(status(1), Some(StatusCode::TOO_MANY_REQUESTS), "rejected by the pair");
    assert_eq!(
        (status(2), status(3)),
        (None, None),
        "waiting for thirty and for sixty seconds"
    );
    clock.advance(MINUTE / 2);
    assert_eq!((status(2), status(3)), (Some(StatusCode::TOO_MANY_REQUESTS), None));
    clock.advance(MINUTE / 2);
    assert_eq!(status(3), Some(StatusCode::OK), "by now the pair has a token again");
}

// ---- Limits over many connections --------------------------------------------------------------------------------------------

const CONNECTIONS: usize = 32;
const REQUESTS: usize = 1_500;
const QUOTA: usize = 100;

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Sends all requests over all connections at once; how many were answered with 200 and how many with 429.
async fn hammer(address: SocketAddr) -> (usize, usize) {
    let clients = (0..CONNECTIONS).map(|at| {
        let share = REQUESTS / CONNECTIONS + usize::from(at < REQUESTS % CONNECTIONS);
        tokio::spawn(async move {
            let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
            let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
            tokio::spawn(connection);
            let mut statuses = Vec::new();
            for _ in 0..share {
                let request = Request::get("/")
                    .header("host", "test")
                    .body(Empty::<&[u8]>::new())
                    .unwrap();
                sender.ready().await.unwrap();
                let response = sender.send_request(request).await.unwrap();
                statuses.push(response.status());
                http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
            }
            statuses
        })
    });
    let statuses: Vec<_> = futures_util::future::join_all(clients).await;
    let statuses: Vec<_> = statuses.into_iter().flat_map(Result::unwrap).collect();
    let count = |wanted| statuses.iter().filter(|status| **status == wanted).count();
    assert_eq!(statuses.len(), REQUESTS);
    (count(StatusCode::OK), count(StatusCode::TOO_MANY_REQUESTS))
}

fn quotas(clock: &ManualClock) -> [RateLimiter; 2] {
    let limit = u32::try_from(QUOTA).unwrap();
    let window = RateLimiter::builder("search", SlidingWindow::new(limit, MINUTE)).clock(clock);
    [limiter(clock, limit), window.build().unwrap()]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_axum_exactly_the_quota_passes_over_all_connections() {
    let clock = Clock::manual();
    for limiter in quotas(&clock) {
        let app: Router = Router::new()
            .route("/", get(async || "hi"))
            .layer(RateLimitLayer::new(limiter.clone()).fallback_with(async |_: Request<_>, why| Ok(try_later(&why))));
        let (listener, address) = listen().await;
        let server = tokio::spawn(axum::serve(listener, app).into_future());
        assert_eq!(hammer(address).await, (QUOTA, REQUESTS - QUOTA));
        let status = limiter.status();
        assert_eq!(status.accepted_requests + status.rejected_requests, REQUESTS as u64);
        server.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_hyper_exactly_the_quota_passes_though_every_connection_has_a_layer_product_of_its_own() {
    let clock = Clock::manual();
    for limiter in quotas(&clock) {
        let (listener, address) = listen().await;
        let layer = RateLimitLayer::new(limiter).fallback_with(async |_: Request<Incoming>, why| Ok(try_later(&why)));
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let inner =
                    service_fn(async |_: Request<Incoming>| Ok::<_, Infallible>(Response::new(Body::from("hi"))));
                let service = TowerToHyperService::new(layer.layer(inner));
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
            }
        });
        assert_eq!(hammer(address).await, (QUOTA, REQUESTS - QUOTA));
        server.abort();
    }
}

#[tokio::test]
async fn a_hyper_client_is_guarded_in_both_forms() {
    let (listener, address) = listen().await;
    let app = Router::new()
        .route("/", get(async || "hi"))
        .route("/broken", get(async || StatusCode::INTERNAL_SERVER_ERROR));
    let server = tokio::spawn(axum::serve(listener, app).into_future());
    let client = Client::builder(TokioExecutor::new()).build_http::<Body>();
    let clock = Clock::manual();
    let ask = |path| ask(&format!("http://{address}{path}"));

    let breaker = breaker(&clock);
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let errors = layer.clone().classify(by_status).layer(client.clone());
    assert_eq!(errors.clone().oneshot(ask("/")).await.unwrap().status(), 200);
    assert_eq!(errors.clone().oneshot(ask("/broken")).await.unwrap().status(), 500);
    assert_eq!(found(errors.oneshot(ask("/")).await).reason, Reason::Open);

    // The bodies differ: the fallback answers with what the guarded service would.
    let responses = ServiceBuilder::new()
        .layer(
            layer
                .classify(by_status)
                .fallback_with(async |_: Request<_>, why| Ok(try_later(&why))),
        )
        .map_response(|response: Response<Incoming>| response.map(Body::new))
        .service(client);
    assert_eq!(responses.oneshot(ask("/")).await.unwrap().status(), 503);
    server.abort();
}

// ---- tonic -------------------------------------------------------------------------------------------------------------------

/// Messages without content.
#[derive(Debug, Clone, Copy, Default)]
struct Unit;

impl tonic::codec::Codec for Unit {
    type Encode = ();
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for Unit {
    type Item = ();
    type Error = tonic::Status;
    fn encode(&mut self, (): (), _: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        Ok(())
    }
}

impl tonic::codec::Decoder for Unit {
    type Item = ();
    type Error = tonic::Status;
    fn decode(&mut self, _: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        Ok(Some(()))
    }
}

/// Makes one gRPC call, to a method that no server has.
async fn grpc<S>(service: S) -> tonic::Status
where
    S: tonic::client::GrpcService<tonic::body::Body>,
    S::ResponseBody: Send + 'static + hyper::body::Body<Data: Send, Error: Into<BoxError>>,
{
    let mut client = tonic::client::Grpc::new(service);
    if let Err(error) = client.ready().await {
        return tonic::Status::from_error(error.into());
    }
    let path = axum::http::uri::PathAndQuery::from_static("/Nobody/Home");
    let call = client.unary(tonic::Request::new(()), path, Unit);
    call.await.expect_err("no server has the method")
}

#[tokio::test]
async fn a_tonic_channel_is_guarded_and_its_status_carries_the_rejection() {
    let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
    let clock = Clock::manual();
    let guarded = ServiceBuilder::new()
        .layer(GuardLayer::new((limiter(&clock, 9), open(&clock))))
        .service(channel);
    let status = grpc(guarded).await;
    let why = Rejected::find(&status).expect("the rejection is the status's source");
    assert_eq!((why.reason, why.retry_after), (Reason::Open, Some(MINUTE)));
}

#[tokio::test]
async fn a_tonic_server_takes_the_layers_in_both_forms() {
    let clock = Clock::manual();
    let (listener, address) = listen().await;
    let limiter = limiter(&clock, 1);
    let server = tonic::transport::Server::builder()
        .layer(
            RateLimitLayer::new(limiter).fallback_with(async |_: Request<_>, why: Rejected| {
                Ok(tonic::Status::resource_exhausted(why.to_string()).into_http::<tonic::body::Body>())
            }),
        )
        .layer(CircuitBreakerLayer::new(breaker(&clock)))
        .add_routes(tonic::service::Routes::default())
        .serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener));
    let server = tokio::spawn(server);
    let channel = tonic::transport::Endpoint::new(format!("http://{address}"))
        .unwrap()
        .connect_lazy();

    assert_eq!(
        grpc(channel.clone()).await.code(),
        tonic::Code::Unimplemented,
        "admitted"
    );
    let status = grpc(channel).await;
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    assert!(status.message().contains("retry after 60s"), "{}", status.message());
    server.abort();
}

// ---- Types -------------------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn two_layers_in_error_form_stand_over_a_foreign_error() {
    let clock = Clock::manual();
    let service = ServiceBuilder::new()
        .layer(RateLimitLayer::new(limiter(&clock, 2)))
        .layer(
            CircuitBreakerLayer::new(breaker(&clock)).classify(|result: &Result<u32, Refused>| match result {
                Ok(_) => Outcome::Success,
                Err(Refused) => Outcome::Ignored,
            }),
        )
        .service(service_fn(even));
    assert_eq!(service.clone().oneshot(2).await.unwrap(), 2);
    let error = service.clone().oneshot(3).await.unwrap_err();
    assert!(error.is::<Refused>(), "boxed once");
    assert_eq!(found(service.oneshot(4).await).reason, Reason::OverLimit);
}

#[tokio::test]
async fn classifier_closures_need_not_name_the_types() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let judged = |ok| if ok { Outcome::Success } else { Outcome::Ignored };
    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()).classify(move |result: &Result<_, _>| judged(result.is_ok())))
        .service(service_fn(even));
    service.oneshot(1).await.unwrap_err();

    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()).classify(move |result| judged(result.is_ok())))
        .service(service_fn(even));
    service.oneshot(1).await.unwrap_err();

    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()).classify_error(|_| Outcome::Ignored))
        .service(service_fn(even));
    service.oneshot(1).await.unwrap_err();

    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()).classify_error(|_: &Refused| Outcome::Ignored))
        .service(service_fn(even));
    service.oneshot(1).await.unwrap_err();
    assert_eq!(breaker.status().metrics.ignored_requests, 4);
}

/// Neither `Clone` nor `Send`, as are its requests and responses.
struct Local(Rc<u32>);

impl Service<Rc<u32>> for Local {
    type Response = Rc<u32>;
    type Error = Infallible;
    type Future = Ready<Result<Rc<u32>, Infallible>>;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: Rc<u32>) -> Self::Future {
        ready(Ok(Rc::new(*request + *self.0)))
    }
}

#[tokio::test]
async fn an_inner_service_that_is_neither_clone_nor_send_is_guarded() {
    let clock = Clock::manual();
    let mut service = ServiceBuilder::new()
        .layer(GuardLayer::new((limiter(&clock, 3), breaker(&clock))))
        .layer(CircuitBreakerLayer::new(breaker(&clock)).fallback_with(async |request: Rc<u32>, _| Ok(request)))
        .service(Local(Rc::new(1)));
    let answer = service.ready().await.unwrap().call(Rc::new(2)).await.unwrap();
    assert_eq!(*answer, 3);
}

type Boxed = Pin<Box<dyn Future<Output = Result<u32, Refused>> + Send>>;

/// A service with a boxed future.
#[derive(Clone)]
struct Remote;

impl Service<u32> for Remote {
    type Response = u32;
    type Error = Refused;
    type Future = Boxed;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: u32) -> Boxed {
        Box::pin(even(request))
    }
}

#[test]
fn guards_and_their_futures_are_send_when_their_parts_are() {
    fn check<S: Service<u32, Future: Send> + Clone + Send + Sync + 'static>(_: &S) {}
    let clock = Clock::manual();
    check(&CircuitBreakerLayer::new(breaker(&clock)).layer(Remote));
    check(&RateLimitLayer::new(limiter(&clock, 1)).layer(Remote));
    check(&RateLimitLayer::new(limiter(&clock, 1)).wait(MINUTE).layer(Remote));
    check(&GuardLayer::new((breaker(&clock), limiter(&clock, 1))).layer(Remote));
    check(&CircuitBreakerLayer::new(breaker(&clock)).fallback(Remote).layer(Remote));
    check(
        &CircuitBreakerLayer::new(breaker(&clock))
            .fallback_with(async |n, _| Ok(n))
            .layer(Remote),
    );
}

#[test]
fn the_layers_add_at_most_64_bytes_to_the_future_that_they_guard() {
    type FutureOf<P> = <Guard<Remote, P> as Service<u32>>::Future;
    let inner = size_of::<Boxed>();
    for (layer, size) in [
        ("CircuitBreakerLayer", size_of::<FutureOf<CircuitBreaker>>()),
        ("RateLimitLayer", size_of::<FutureOf<RateLimiter>>()),
        ("a pair", size_of::<FutureOf<(RateLimiter, CircuitBreaker)>>()),
    ] {
        assert!(size <= inner + 64, "{layer}: {size} bytes around {inner}");
    }
}

// ---- tower's own middleware --------------------------------------------------------------------------------------------------

fn hang() -> impl Service<u32, Response = u32, Error = Refused, Future: Send> + Clone + Send {
    service_fn(|_: u32| pending::<Result<u32, Refused>>())
}

#[test]
fn an_open_breaker_answers_over_a_full_concurrency_limit_and_takes_none_of_its_permits() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let full = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(1))
        .service(hang());
    let running = full.clone().oneshot(1);
    let mut running = task::spawn(running);
    assert!(running.poll().is_pending());

    let guard = CircuitBreakerLayer::new(breaker.clone()).layer(full.clone());
    let mut waiting = task::spawn(guard.clone().oneshot(2));
    assert!(waiting.poll().is_pending(), "a closed breaker waits for the permit");
    breaker.force_open();
    assert_eq!(
        found(guard.oneshot(3).now_or_never().unwrap()).reason,
        Reason::ForcedOpen
    );
    drop((running, waiting));
    let mut next = task::spawn(full.oneshot(4));
    assert!(next.poll().is_pending());
    assert!(breaker.status().metrics.rejected_requests == 1);
}

#[test]
fn a_rejection_gives_a_concurrency_limit_around_the_layer_its_permit_back() {
    let clock = Clock::manual();
    let service = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(1))
        .layer(CircuitBreakerLayer::new(open(&clock)))
        .service(hang());
    for _ in 0..10 {
        let why = found(
            service
                .clone()
                .oneshot(1)
                .now_or_never()
                .expect("the permit is there again"),
        );
        assert_eq!(why.reason, Reason::Open);
    }
}

#[test]
fn a_probe_waits_for_a_concurrency_limit_and_gives_both_back_when_dropped() {
    let clock = Clock::manual();
    let breaker = open(&clock);
    clock.advance(MINUTE);
    let limited = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(1))
        .service(service_fn(even));
    let mut holder = limited.clone();
    holder.ready().now_or_never().unwrap().unwrap();
    let guard = CircuitBreakerLayer::new(breaker.clone()).layer(limited);
    let mut probe = task::spawn(guard.clone().oneshot(2));
    assert!(probe.poll().is_pending());
    assert_eq!(
        found(guard.clone().oneshot(2).now_or_never().unwrap()).reason,
        Reason::HalfOpenFull
    );
    drop(probe);
    assert_eq!(breaker.status().probes_in_flight, 0);
    drop(holder);
    assert_eq!(guard.oneshot(2).now_or_never().unwrap().unwrap(), 2);
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn load_shed_around_the_layer_sheds_what_waits_and_passes_on_what_is_rejected() {
    let clock = Clock::manual();
    let full = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(1))
        .service(hang());
    let mut running = task::spawn(full.clone().oneshot(1));
    assert!(running.poll().is_pending());
    let breaker = breaker(&clock);
    let service = ServiceBuilder::new()
        .load_shed()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(full);
    let error = service.clone().oneshot(1).now_or_never().unwrap().unwrap_err();
    assert!(error.is::<Overloaded>());
    assert_eq!(
        breaker.status().metrics.total_requests,
        0,
        "what is shed outside never reaches the breaker"
    );
    breaker.force_open();
    assert_eq!(
        found(service.oneshot(1).now_or_never().unwrap()).reason,
        Reason::ForcedOpen
    );
}

#[test]
fn load_shed_under_the_layer_counts_as_the_classifier_says() {
    let clock = Clock::manual();
    let full = ServiceBuilder::new()
        .load_shed()
        .layer(ConcurrencyLimitLayer::new(1))
        .service(hang());
    let mut running = task::spawn(full.clone().oneshot(1));
    assert!(running.poll().is_pending());

    let strict = breaker(&clock);
    let guard = CircuitBreakerLayer::new(strict.clone()).layer(full.clone());
    guard.oneshot(1).now_or_never().unwrap().unwrap_err();
    assert_eq!(strict.state(), State::Open, "an error like any other");

    let lenient = breaker(&clock);
    let guard = CircuitBreakerLayer::new(lenient.clone()).classify_error(|error: &BoxError| {
        if error.is::<Overloaded>() {
            Outcome::Ignored
        } else {
            Outcome::Failure
        }
    });
    guard.layer(full).oneshot(1).now_or_never().unwrap().unwrap_err();
    assert_eq!(
        (lenient.state(), lenient.status().metrics.ignored_requests),
        (State::Closed, 1)
    );
}

#[tokio::test]
async fn a_buffer_around_the_layer_shares_one_guard_and_one_under_it_is_guarded() {
    let clock = Clock::manual();
    let around = ServiceBuilder::new()
        .buffer(4)
        .layer(GuardLayer::new((limiter(&clock, 2), breaker(&clock))))
        .service(service_fn(even));
    assert_eq!(around.clone().oneshot(2).await.unwrap(), 2);
    assert!(around.clone().oneshot(3).await.unwrap_err().is::<Refused>());
    assert_eq!(found(around.oneshot(2).await).reason, Reason::Open);

    let breaker = breaker(&clock);
    let under = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .buffer(4)
        .service(service_fn(even));
    assert_eq!(under.clone().oneshot(2).await.unwrap(), 2);
    assert!(under.clone().oneshot(3).await.unwrap_err().is::<Refused>());
    assert_eq!(found(under.oneshot(2).await).reason, Reason::Open);
}

#[tokio::test]
async fn a_buffer_without_room_keeps_a_probe_waiting_and_nobody_else() {
    let clock = Clock::manual();
    let breaker = open(&clock);
    clock.advance(MINUTE);
    let buffer = ServiceBuilder::new().buffer(1).concurrency_limit(1).service(hang());
    // One request runs, one waits with the worker, one lies in the buffer.
    let mut filling: Vec<_> = (0..3).map(|_| task::spawn(buffer.clone().oneshot(1))).collect();
    for call in &mut filling {
        assert!(call.poll().is_pending());
        tokio::task::yield_now().await;
    }
    let guard = CircuitBreakerLayer::new(breaker.clone()).layer(buffer);
    let mut probe = task::spawn(guard.clone().oneshot(1));
    assert!(probe.poll().is_pending());
    assert_eq!(found(guard.oneshot(1).await).reason, Reason::HalfOpenFull);
    drop(probe);
    assert_eq!(breaker.status().probes_in_flight, 0);
}

/// Repeats every error that is no rejection, up to nine times.
#[derive(Clone)]
struct Again(usize);

impl<E> retry::Policy<u32, u32, E> for Again
where
    E: Into<BoxError> + AsRejected,
{
    type Future = Ready<()>;
    fn retry(&mut self, _: &mut u32, result: &mut Result<u32, E>) -> Option<Ready<()>> {
        let worth_it = result.as_ref().is_err_and(|error| !error.is_rejection());
        self.0 += 1;
        (worth_it && self.0 < 10).then(|| ready(()))
    }
    fn clone_request(&mut self, request: &u32) -> Option<u32> {
        Some(*request)
    }
}

trait AsRejected {
    fn is_rejection(&self) -> bool;
}

impl AsRejected for BoxError {
    fn is_rejection(&self) -> bool {
        Rejected::find(&**self).is_some()
    }
}

impl AsRejected for Refused {
    fn is_rejection(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_retry_around_the_layer_counts_every_attempt_and_ends_when_the_circuit_opens() {
    let clock = Clock::manual();
    let breaker = CircuitBreaker::builder("search")
        .clock(&clock)
        .failure_threshold(4)
        .build()
        .unwrap();
    let service = ServiceBuilder::new()
        .retry(Again(0))
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(service_fn(even));
    assert_eq!(found(service.oneshot(1).await).reason, Reason::Open);
    let metrics = breaker.status().metrics;
    assert_eq!((metrics.failed_requests, metrics.rejected_requests), (4, 1));
}

#[tokio::test]
async fn a_retry_under_the_layer_is_one_call() {
    let clock = Clock::manual();
    let (breaker, limiter) = (breaker(&clock), limiter(&clock, 5));
    let attempts = Arc::new(AtomicUsize::new(0));
    let service = ServiceBuilder::new()
        .layer(GuardLayer::new((limiter.clone(), breaker.clone())))
        .retry(Again(0))
        .service(service_fn({
            let attempts = attempts.clone();
            move |request| {
                attempts.fetch_add(1, Ordering::Relaxed);
                even(request)
            }
        }));
    assert!(service.oneshot(1).await.unwrap_err().is::<Refused>());
    assert_eq!(attempts.load(Ordering::Relaxed), 10);
    assert_eq!(
        (
            breaker.status().metrics.failed_requests,
            limiter.status().accepted_requests
        ),
        (1, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_timeout_around_a_waiting_layer_ends_the_wait_and_costs_nothing() {
    let limiter = RateLimiter::new("search", TokenBucket::new(1, MINUTE)).unwrap();
    let service = ServiceBuilder::new()
        .timeout(MINUTE / 2)
        .layer(RateLimitLayer::new(limiter.clone()).wait(MINUTE))
        .service(service_fn(even));
    assert_eq!(service.clone().oneshot(2).await.unwrap(), 2);
    service.clone().oneshot(2).await.unwrap_err();
    assert_eq!((limiter.status().waiting, limiter.status().accepted_requests), (0, 1));
    assert_eq!(
        service.oneshot(2).await.unwrap(),
        2,
        "the token that the first one waited for"
    );
}

#[tokio::test]
async fn a_balancer_takes_guards_as_endpoints_and_an_open_one_attracts_traffic() {
    let clock = Clock::manual();
    let (healthy, sick) = (breaker(&clock), open(&clock));
    let endpoint = |breaker: &CircuitBreaker, load: u32| {
        Constant::new(CircuitBreakerLayer::new(breaker.clone()).layer(service_fn(even)), load)
    };
    let mut balance = Balance::new(ServiceList::new([endpoint(&healthy, 2), endpoint(&sick, 1)]));
    for _ in 0..20 {
        let result = balance.ready().await.unwrap().call(2).await;
        assert_eq!(
            found(result).reason,
            Reason::Open,
            "it is ready at once and has the lower load"
        );
    }
    clock.advance(MINUTE);
    assert_eq!(
        balance.ready().await.unwrap().call(2).await.unwrap(),
        2,
        "the probe passes through the balancer"
    );
    assert_eq!((sick.state(), sick.status().probes_in_flight), (State::Closed, 0));
    assert_eq!(healthy.status().metrics.total_requests, 0);

    let whole = breaker(&clock);
    let mut guard = CircuitBreakerLayer::new(whole.clone()).layer(balance);
    assert!(guard.ready().await.unwrap().call(3).await.unwrap_err().is::<Refused>());
    assert_eq!(whole.state(), State::Open, "a balancer is guarded as any service is");
}
