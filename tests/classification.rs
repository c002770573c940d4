//! How HTTP and gRPC calls are judged, and when: at the head where that tells all, else at the end of the stream.
#![cfg(feature = "http")]

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use portcullis::{
    Adaptive, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerLayer, CircuitBreakerMetrics, Clock, CostMeter,
    GrpcClassifier, GuardLayer, HttpClassifier, KeyedRateLimiter, ManualClock, Outcome, RateLimitLayer, RateLimiter,
    Rejected, State, TokenBucket, Verdict,
    classify::{Judge, JudgeEnd, Judged},
};
use proptest::{collection::vec, prelude::*};
use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tower::{Layer, Service, ServiceExt, service_fn};

/// One step of a scripted body.
#[derive(Clone, Debug)]
enum Step {
    Data(&'static str),
    Trailers(Vec<(&'static str, &'static str)>),
    Error,
    Panic,
    Wait,
}

/// A body that does what its script says. `knows_its_end`: says so in `is_end_stream`, as a body with a known length does.
#[derive(Clone, Debug, Default)]
struct Script {
    steps: VecDeque<Step>,
    knows_its_end: bool,
}

fn script(steps: impl IntoIterator<Item = Step>) -> Script {
    Script {
        steps: steps.into_iter().collect(),
        knows_its_end: false,
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        Poll::Ready(match self.steps.pop_front() {
            None => None,
            Some(Step::Data(text)) => Some(Ok(Frame::data(text.into()))),
            Some(Step::Trailers(fields)) => Some(Ok(Frame::trailers(headers(&fields)))),
            Some(Step::Error) => Some(Err(io::Error::other("cut off"))),
            Some(Step::Panic) => panic!("the body panics"),
            Some(Step::Wait) => return Poll::Pending,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.knows_its_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(7)
    }
}

fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in fields {
        headers.append(*name, HeaderValue::from_static(value));
    }
    headers
}

fn response(status: u16, fields: &[(&'static str, &'static str)], body: Script) -> Response<Script> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    *response.headers_mut() = headers(fields);
    response
}

fn serves(
    response: Response<Script>,
) -> impl Service<Request<()>, Response = Response<Script>, Error = io::Error, Future: Send> + Clone {
    service_fn(move |_| std::future::ready(Ok(response.clone())))
}

fn get() -> Request<()> {
    Request::new(())
}

fn grpc_call() -> Request<()> {
    let mut request = get();
    let proto = HeaderValue::from_static("application/grpc+proto");
    request.headers_mut().insert("content-type", proto);
    request
}

struct World {
    clock: ManualClock,
    breaker: CircuitBreaker,
}

impl World {
    fn new(config: CircuitBreakerConfig) -> Self {
        let clock = Clock::manual();
        let breaker = CircuitBreaker::builder("search")
            .config(config)
            .clock(&clock)
            .build()
            .unwrap();
        Self { clock, breaker }
    }

    fn metrics(&self) -> CircuitBreakerMetrics {
        self.breaker.status().metrics
    }

    /// (success, failure, ignored, cancelled)
    fn counts(&self) -> [u64; 4] {
        let metrics = self.metrics();
        [
            metrics.successful_requests,
            metrics.failed_requests,
            metrics.ignored_requests,
            metrics.cancelled_requests,
        ]
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new(CircuitBreakerConfig::default().failure_threshold(1_000))
    }
}

const NOTHING: [u64; 4] = [0, 0, 0, 0];
const SUCCESS: [u64; 4] = [1, 0, 0, 0];
const FAILURE: [u64; 4] = [0, 1, 0, 0];
const IGNORED: [u64; 4] = [0, 0, 1, 0];
const CANCELLED: [u64; 4] = [0, 0, 0, 1];

/// Makes a call, and reads its answer to the end. What was counted at the head, and at the end.
fn judged<C>(
    layer: &GuardLayer<CircuitBreaker, C, portcullis::AsResponse>,
    world: &World,
    answer: Response<Script>,
) -> ([u64; 4], [u64; 4])
where
    C: Judge,
{
    judged_for(get(), layer, world, answer)
}

fn judged_for<C>(
    request: Request<()>,
    layer: &GuardLayer<CircuitBreaker, C, portcullis::AsResponse>,
    world: &World,
    answer: Response<Script>,
) -> ([u64; 4], [u64; 4])
where
    C: Judge,
{
    let service = layer.layer(serves(answer));
    let response = service.oneshot(request).now_or_never().unwrap().unwrap();
    let at_head = world.counts();
    drop(
        response
            .into_body()
            .collect()
            .now_or_never()
            .expect("a body that does not wait"),
    );
    (at_head, world.counts())
}

fn http(answer: Response<Script>) -> ([u64; 4], [u64; 4]) {
    let world = World::default();
    judged(&CircuitBreakerLayer::http(world.breaker.clone()), &world, answer)
}

fn grpc(answer: Response<Script>) -> ([u64; 4], [u64; 4]) {
    let world = World::default();
    judged_for(
        grpc_call(),
        &CircuitBreakerLayer::grpc(world.breaker.clone()),
        &world,
        answer,
    )
}

#[test]
fn a_good_answer_is_judged_at_the_end_of_its_body() {
    let data = || script([Step::Data("some"), Step::Data("more")]);
    assert_eq!(http(response(200, &[], data())), (NOTHING, SUCCESS));
    let knows = Script {
        knows_its_end: true,
        ..data()
    };
    assert_eq!(http(response(200, &[], knows)), (NOTHING, SUCCESS));
    let trailers = script([Step::Data("some"), Step::Trailers(vec![("checksum", "1")])]);
    assert_eq!(http(response(200, &[], trailers)), (NOTHING, SUCCESS));
    assert_eq!(http(response(404, &[], data())), (NOTHING, SUCCESS));
}

#[test]
fn an_answer_without_a_body_is_judged_at_its_head() {
    let empty = || Script {
        knows_its_end: true,
        ..Script::default()
    };
    assert_eq!(http(response(200, &[], empty())), (SUCCESS, SUCCESS));
    for status in [101, 204, 304] {
        // A server drops such a body without a look at it.
        assert_eq!(http(response(status, &[], script([]))), (SUCCESS, SUCCESS), "{status}");
    }
    for method in [Method::HEAD, Method::CONNECT] {
        let world = World::default();
        let service =
            CircuitBreakerLayer::http(world.breaker.clone()).layer(serves(response(200, &[], script([Step::Wait]))));
        let mut request = get();
        *request.method_mut() = method.clone();
        drop(service.oneshot(request).now_or_never().unwrap().unwrap());
        assert_eq!(world.counts(), SUCCESS, "{method} has no body");
    }
}

#[test]
fn an_answer_without_a_body_is_judged_at_its_head_by_the_classifier_of_grpc_as_well() {
    for (method, status, counts) in [
        (Method::HEAD, 200, SUCCESS),
        (Method::CONNECT, 200, SUCCESS),
        (Method::GET, 101, SUCCESS),
        (Method::GET, 204, SUCCESS),
        (Method::GET, 304, SUCCESS),
        (Method::HEAD, 500, FAILURE),
        (Method::GET, 200, CANCELLED),
    ] {
        let world = World::default();
        let service =
            CircuitBreakerLayer::grpc(world.breaker.clone()).layer(serves(response(status, &[], script([Step::Wait]))));
        let mut request = get();
        *request.method_mut() = method.clone();
        drop(service.oneshot(request).now_or_never().unwrap().unwrap());
        assert_eq!(world.counts(), counts, "{method} {status}, of which nothing was read");
    }
    let world = World::default();
    let service =
        CircuitBreakerLayer::grpc(world.breaker.clone()).layer(serves(response(200, &[], script([Step::Wait]))));
    let mut call = grpc_call();
    *call.method_mut() = Method::HEAD;
    drop(service.oneshot(call).now_or_never().unwrap().unwrap());
    assert_eq!(world.counts(), CANCELLED, "the status of a gRPC call was still to come");
}

#[test]
fn an_answer_that_breaks_off_is_one_failure() {
    let broken = script([Step::Data("some"), Step::Error, Step::Error]);
    assert_eq!(http(response(200, &[], broken)), (NOTHING, FAILURE));
}

#[test]
fn an_answer_that_is_dropped_early_is_cancelled() {
    for steps in [vec![Step::Wait], vec![Step::Data("some"), Step::Wait]] {
        let world = World::default();
        let service = CircuitBreakerLayer::http(world.breaker.clone()).layer(serves(response(200, &[], script(steps))));
        let mut body = service.oneshot(get()).now_or_never().unwrap().unwrap().into_body();
        while let Some(Some(Ok(_))) = body.frame().now_or_never() {}
        assert_eq!(world.counts(), NOTHING);
        drop(body);
        assert_eq!(world.counts(), CANCELLED);
    }
}

#[test]
fn a_body_is_settled_by_the_frame_behind_which_nothing_follows() {
    let world = World::default();
    let body = Script {
        knows_its_end: true,
        ..script([Step::Data("all of it")])
    };
    let service = CircuitBreakerLayer::http(world.breaker.clone()).layer(serves(response(200, &[], body)));
    let mut body = service.oneshot(get()).now_or_never().unwrap().unwrap().into_body();
    assert_eq!(body.size_hint().exact(), Some(7), "passes through");
    assert!(!body.is_end_stream());
    body.frame().now_or_never().unwrap().unwrap().unwrap();
    assert_eq!(world.counts(), SUCCESS, "hyper need not ask again");
    assert!(body.is_end_stream());
    drop(body);
    assert_eq!(world.counts(), SUCCESS, "once");
}

#[test]
fn a_body_that_panics_is_one_failure() {
    let world = World::default();
    let service = CircuitBreakerLayer::http(world.breaker.clone()).layer(serves(response(
        200,
        &[],
        script([Step::Panic, Step::Data("after")]),
    )));
    let mut body = service.oneshot(get()).now_or_never().unwrap().unwrap().into_body();
    catch_unwind(AssertUnwindSafe(|| body.frame().now_or_never())).unwrap_err();
    assert_eq!(world.counts(), FAILURE);
    drop(body.collect().now_or_never());
    assert_eq!(world.counts(), FAILURE, "once");
}

/// Sends one frame and waits; whether it is at its end is told by a closure.
#[derive(Clone)]
struct Asked<F> {
    sent: bool,
    is_end: F,
}

impl<F: Fn(bool) -> bool + Unpin> Body for Asked<F> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if std::mem::replace(&mut self.sent, true) {
            return Poll::Pending;
        }
        Poll::Ready(Some(Ok(Frame::data("x".into()))))
    }

    fn is_end_stream(&self) -> bool {
        (self.is_end)(self.sent)
    }
}

fn asked<F: Fn(bool) -> bool + Unpin>(
    breaker: &CircuitBreaker,
    is_end: F,
) -> impl Body<Data = Bytes, Error = io::Error> + Unpin {
    let answer = Mutex::new(Some(Response::new(Asked { sent: false, is_end })));
    let service = service_fn(|_: Request<()>| {
        let answer = answer.lock().unwrap().take().unwrap();
        std::future::ready(Ok::<_, io::Error>(answer))
    });
    let guard = CircuitBreakerLayer::http(breaker.clone()).layer(service);
    guard.oneshot(get()).now_or_never().unwrap().unwrap().into_body()
}

#[test]
fn a_body_that_was_told_to_be_at_its_end_and_is_dropped_has_ended() {
    let (world, ended) = (World::default(), AtomicBool::new(false));
    let body = asked(&world.breaker, |_| ended.load(Ordering::Relaxed));
    assert!(!body.is_end_stream());
    ended.store(true, Ordering::Relaxed);
    assert!(body.is_end_stream());
    assert_eq!(world.counts(), NOTHING);
    drop(body);
    assert_eq!(world.counts(), SUCCESS, "hyper does not poll such a body");

    ended.store(false, Ordering::Relaxed);
    let body = asked(&world.breaker, |_| ended.load(Ordering::Relaxed));
    ended.store(true, Ordering::Relaxed);
    drop(body);
    assert_eq!(world.counts(), [1, 0, 0, 1], "nobody knew");
}

#[test]
fn a_body_that_panics_when_asked_whether_it_is_at_its_end_is_one_failure() {
    let world = World::default();
    let mut body = asked(&world.breaker, |sent| {
        assert!(!sent, "the body panics");
        false
    });
    catch_unwind(AssertUnwindSafe(|| body.frame().now_or_never())).unwrap_err();
    assert_eq!(world.counts(), FAILURE);
    drop(body);
    assert_eq!(world.counts(), FAILURE, "once");
}

#[test]
fn a_body_that_is_dropped_when_its_whole_length_has_come_has_ended() {
    // The body itself says that it has seven bytes.
    for (fields, steps, counts) in [
        (&[("content-length", "4")][..], vec![Step::Data("four")], SUCCESS),
        (
            &[("content-length", "4")],
            vec![Step::Data("fo"), Step::Data("ur")],
            SUCCESS,
        ),
        (&[("content-length", "4")], vec![Step::Data("more")], SUCCESS),
        (&[("content-length", "0")], vec![], SUCCESS),
        (&[("content-length", "5")], vec![Step::Data("four")], CANCELLED),
        (&[], vec![Step::Data("seven c")], SUCCESS),
        (&[], vec![Step::Data("four")], CANCELLED),
        (
            &[("content-length", "4"), ("content-length", "4")],
            vec![Step::Data("four")],
            CANCELLED,
        ),
        (&[("content-length", "-4")], vec![Step::Data("four")], CANCELLED),
    ] {
        let world = World::default();
        let waits = script(steps.iter().cloned().chain([Step::Wait]));
        let answer = response(200, fields, waits);
        let guard = CircuitBreakerLayer::http(world.breaker.clone()).layer(serves(answer));
        let mut body = guard.oneshot(get()).now_or_never().unwrap().unwrap().into_body();
        while let Some(Some(Ok(_))) = body.frame().now_or_never() {}
        assert_eq!(world.counts(), NOTHING, "an error or trailers may still come");
        drop(body);
        assert_eq!(world.counts(), counts, "{fields:?} {steps:?}");
    }
    let world = World::default();
    let waits = script([Step::Data("four"), Step::Wait]);
    let answer = response(200, &[("content-length", "4")], waits);
    let guard = CircuitBreakerLayer::grpc(world.breaker.clone()).layer(serves(answer));
    let mut body = guard.oneshot(grpc_call()).now_or_never().unwrap().unwrap().into_body();
    body.frame().now_or_never().unwrap().unwrap().unwrap();
    drop(body);
    assert_eq!(world.counts(), CANCELLED, "the status of a gRPC call was still to come");
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => prop_oneof![Just("x"), Just("xyz"), Just("")].prop_map(Step::Data),
        1 => prop_oneof![Just("0"), Just("14"), Just("none")].prop_map(|code| Step::Trailers(vec![("grpc-status", code)])),
        1 => Just(Step::Error),
        1 => Just(Step::Panic),
        1 => Just(Step::Wait),
    ]
}

proptest! {
    /// However a body behaves, and whoever reads it however far: its probe is judged once, and its slot is free.
    #[test]
    fn each_body_settles_its_permit_once(
        steps in vec(any_step(), 0..6),
        knows_its_end: bool,
        length in prop_oneof![Just(None), Just(Some("0")), Just(Some("3")), Just(Some("6"))],
        polls in 0..9_usize,
        asks: bool,
        of_grpc: bool,
        panics: bool,
    ) {
        let world = World::new(
            CircuitBreakerConfig::default().failure_threshold(1).half_open_max_calls(1).success_threshold(1),
        );
        world.breaker.try_acquire().unwrap().settle(Outcome::Failure);
        world.clock.advance(Duration::from_secs(60));
        let fields: Vec<_> = length.map(|length| ("content-length", length)).into_iter().collect();
        let answer = response(200, &fields, Script { knows_its_end, ..script(steps) });
        let breaker = world.breaker.clone();
        let body = if of_grpc {
            let service = CircuitBreakerLayer::grpc(breaker).layer(serves(answer));
            service.oneshot(grpc_call()).now_or_never().unwrap().unwrap().into_body().boxed_unsync()
        } else {
            let service = CircuitBreakerLayer::http(breaker).layer(serves(answer));
            service.oneshot(get()).now_or_never().unwrap().unwrap().into_body().boxed_unsync()
        };
        let mut body = Some(body);
        for _ in 0..polls {
            let body = body.as_mut().unwrap();
            if asks && body.is_end_stream() {
                break;
            }
            let _ = catch_unwind(AssertUnwindSafe(|| body.frame().now_or_never()));
        }
        let before: u64 = world.counts().iter().sum();
        let dropped = catch_unwind(AssertUnwindSafe(|| {
            let _body = body.take();
            assert!(!panics, "somebody else's panic");
        }));
        prop_assert_eq!(dropped.is_err(), panics);
        let counts = world.counts();
        // The failure that tripped the circuit is one more.
        prop_assert_eq!(counts.iter().sum::<u64>(), 2);
        prop_assert!((1..=2).contains(&before));
        prop_assert_eq!(world.breaker.status().probes_in_flight, 0);
        let state = match counts {
            [1, 1, 0, 0] => State::Closed,
            [0, 2, 0, 0] => State::Open,
            _ => State::HalfOpen,
        };
        prop_assert_eq!(world.breaker.state(), state);
    }
}

/// Panics at the end.
#[derive(Clone)]
struct Panics;

impl Judge for Panics {
    type Seen = ();
    type AtEnd = Self;
    fn see<B>(&self, _: &Request<B>) {}
    fn head<B>(&self, (): (), _: &Response<B>) -> Judged<Self> {
        Judged::AtEnd(Self)
    }
}

impl JudgeEnd for Panics {
    fn end(self, _: Option<&HeaderMap>) -> Verdict {
        panic!("the judge panics")
    }
}

#[test]
fn a_judge_that_panics_at_the_end_is_one_failure_however_the_end_comes() {
    let body = |steps: &[Step], world: &World| {
        let answer = response(200, &[("content-length", "1")], script(steps.iter().cloned()));
        let layer = CircuitBreakerLayer::http(world.breaker.clone()).classify_with(Panics);
        let service = layer.layer(serves(answer));
        service.oneshot(get()).now_or_never().unwrap().unwrap().into_body()
    };
    for steps in [
        vec![],
        vec![Step::Trailers(vec![])],
        vec![Step::Data("x")],
        vec![Step::Data("x"), Step::Wait],
    ] {
        let world = World::default();
        let mut body = body(&steps, &world);
        catch_unwind(AssertUnwindSafe(move || {
            while let Some(Some(Ok(_))) = body.frame().now_or_never() {}
        }))
        .unwrap_err();
        assert_eq!(world.counts(), FAILURE, "{steps:?}");
    }
    let world = World::default();
    let mut whole = body(&[Step::Data("x"), Step::Wait], &world);
    whole.frame().now_or_never().unwrap().unwrap().unwrap();
    let panic = catch_unwind(AssertUnwindSafe(move || {
        let _whole = whole;
        panic!("somebody else's panic")
    }));
    panic.unwrap_err();
    assert_eq!(world.counts(), CANCELLED, "the judge is not asked during a panic");
}

#[test]
fn a_server_error_is_a_failure_at_once() {
    for status in [500, 502, 503, 504, 599] {
        assert_eq!(
            http(response(status, &[], script([Step::Wait])).map(|_| script([]))),
            (FAILURE, FAILURE)
        );
    }
    assert_eq!(http(response(429, &[], script([]))), (IGNORED, IGNORED), "by default");
}

#[test]
fn statuses_may_be_judged_otherwise_and_the_last_word_counts() {
    let classifier = HttpClassifier::new()
        .status(StatusCode::NOT_FOUND, Outcome::Success)
        .status(StatusCode::NOT_FOUND, Outcome::Ignored)
        .status(StatusCode::NOT_IMPLEMENTED, Outcome::Success)
        .rate_limited(Outcome::Failure);
    for (status, at_head, at_end) in [
        (404, IGNORED, IGNORED),
        (501, NOTHING, SUCCESS),
        (429, FAILURE, FAILURE),
        (500, FAILURE, FAILURE),
        (200, NOTHING, SUCCESS),
    ] {
        let world = World::default();
        let layer = CircuitBreakerLayer::http(world.breaker.clone()).classify_with(classifier.clone());
        let answer = response(status, &[], script([Step::Data("x")]));
        assert_eq!(judged(&layer, &world, answer), (at_head, at_end), "{status}");
    }
}

#[test]
fn errors_of_the_call_are_failures_and_local_refusals_are_not() {
    let world = World::default();
    let layer = CircuitBreakerLayer::http(world.breaker.clone());
    let fails = service_fn(async |_: Request<()>| Err::<Response<Script>, _>(io::Error::other("refused")));
    layer
        .clone()
        .layer(fails)
        .oneshot(get())
        .now_or_never()
        .unwrap()
        .unwrap_err();
    assert_eq!(world.counts(), FAILURE);

    let inner = CircuitBreaker::builder("inner").build().unwrap();
    inner.force_open();
    let good = || serves(response(200, &[], script([])));
    let as_error = CircuitBreakerLayer::new(inner.clone()).layer(good());
    layer
        .clone()
        .layer(as_error)
        .oneshot(get())
        .now_or_never()
        .unwrap()
        .unwrap_err();
    assert_eq!(world.counts(), [0, 1, 1, 0], "a rejection that is an error");
    let as_answer = CircuitBreakerLayer::http(inner).layer(good());
    let answer = layer.layer(as_answer).oneshot(get()).now_or_never().unwrap().unwrap();
    assert_eq!(answer.status(), 503);
    assert!(answer.extensions().get::<Rejected>().is_some());
    assert_eq!(world.counts(), [0, 1, 2, 0], "a rejection that is an answer");
}

#[test]
fn each_grpc_code_counts_as_the_table_says() {
    const TABLE: [(&str, [u64; 4]); 17] = [
        ("0", SUCCESS),
        ("1", IGNORED),
        ("2", FAILURE),
        ("3", SUCCESS),
        ("4", FAILURE),
        ("5", SUCCESS),
        ("6", SUCCESS),
        ("7", SUCCESS),
        ("8", IGNORED),
        ("9", SUCCESS),
        ("10", SUCCESS),
        ("11", SUCCESS),
        ("12", SUCCESS),
        ("13", FAILURE),
        ("14", FAILURE),
        ("15", FAILURE),
        ("16", SUCCESS),
    ];
    for (code, counts) in TABLE {
        let status = vec![("grpc-status", code)];
        let streamed = script([Step::Data("x"), Step::Trailers(status.clone())]);
        assert_eq!(
            grpc(response(200, &[], streamed)),
            (NOTHING, counts),
            "{code} in trailers"
        );
        assert_eq!(
            grpc(response(200, &status, script([]))),
            (counts, counts),
            "{code} in the head"
        );
    }
}

#[test]
fn a_stream_without_a_readable_status_was_cut_off() {
    let ends = |steps: Vec<Step>| grpc(response(200, &[], script(steps)));
    assert_eq!(ends(vec![Step::Data("x")]), (NOTHING, FAILURE));
    assert_eq!(ends(vec![Step::Data("x"), Step::Error]), (NOTHING, FAILURE));
    assert_eq!(ends(vec![Step::Trailers(vec![("other", "0")])]), (NOTHING, FAILURE));
    for bad in ["", "-1", "00", "01", " 0", "0x0", "17", "99999999999999999999", "zero"] {
        assert_eq!(
            ends(vec![Step::Trailers(vec![("grpc-status", bad)])]),
            (NOTHING, FAILURE),
            "{bad:?}"
        );
        assert_eq!(
            grpc(response(200, &[("grpc-status", bad)], script([]))),
            (FAILURE, FAILURE),
            "{bad:?}"
        );
    }
    let twice = vec![("grpc-status", "0"), ("grpc-status", "14")];
    assert_eq!(ends(vec![Step::Trailers(twice)]), (NOTHING, FAILURE), "which?");
    let empty = Script {
        knows_its_end: true,
        ..Script::default()
    };
    assert_eq!(grpc(response(200, &[], empty)), (FAILURE, FAILURE), "nothing at all");
}

#[test]
fn an_http_status_without_a_grpc_one_is_mapped() {
    for (status, counts) in [
        (400, FAILURE),
        (401, SUCCESS),
        (403, SUCCESS),
        (404, SUCCESS),
        (418, FAILURE),
        (429, FAILURE),
        (500, FAILURE),
        (502, FAILURE),
        (503, FAILURE),
        (504, FAILURE),
    ] {
        assert_eq!(grpc(response(status, &[], script([]))), (counts, counts), "{status}");
    }
    let told = response(503, &[("grpc-status", "0")], script([]));
    assert_eq!(grpc(told), (SUCCESS, SUCCESS), "gRPC's own status counts");
}

#[test]
fn a_request_that_is_no_grpc_call_opens_no_circuit_by_its_answer_without_a_status() {
    let plain = |answer| {
        let world = World::default();
        judged(&CircuitBreakerLayer::grpc(world.breaker.clone()), &world, answer)
    };
    let page = || script([Step::Data("a page")]);
    assert_eq!(plain(response(200, &[], page())), (NOTHING, SUCCESS));
    assert_eq!(plain(response(404, &[], page())), (NOTHING, SUCCESS));
    assert_eq!(plain(response(400, &[], page())), (NOTHING, SUCCESS));
    assert_eq!(plain(response(503, &[], page())), (FAILURE, FAILURE));
    let cut = script([Step::Data("a pa"), Step::Error]);
    assert_eq!(plain(response(200, &[], cut)), (NOTHING, FAILURE));
    let status = response(200, &[("grpc-status", "14")], script([]));
    assert_eq!(plain(status), (FAILURE, FAILURE), "what says that it failed, has");
}

#[test]
fn grpc_codes_may_be_judged_otherwise() {
    let classifier = GrpcClassifier::new()
        .code(5, Outcome::Failure)
        .code(14, Outcome::Ignored)
        .code(200, Outcome::Failure)
        .resource_exhausted(Outcome::Failure);
    for (code, counts) in [("5", FAILURE), ("14", IGNORED), ("8", FAILURE), ("0", SUCCESS)] {
        let world = World::default();
        let layer = CircuitBreakerLayer::grpc(world.breaker.clone()).classify_with(classifier);
        let answer = response(200, &[], script([Step::Trailers(vec![("grpc-status", code)])]));
        assert_eq!(judged(&layer, &world, answer), (NOTHING, counts), "{code}");
    }
}

#[test]
fn a_grpc_web_body_that_ends_is_a_success() {
    let web = [("content-type", "application/grpc-web+proto")];
    assert_eq!(grpc(response(200, &web, script([Step::Data("x")]))), (NOTHING, SUCCESS));
    assert_eq!(grpc(response(200, &web, script([Step::Error]))), (NOTHING, FAILURE));
}

#[test]
fn a_probe_holds_its_slot_until_its_answer_has_been_streamed() {
    let config = CircuitBreakerConfig::default()
        .failure_threshold(1)
        .half_open_max_calls(1)
        .success_threshold(1)
        .recovery_timeout(Duration::from_secs(10));
    let world = World::new(config);
    let guard = CircuitBreakerLayer::http(world.breaker.clone()).layer(serves(response(
        200,
        &[],
        script([Step::Data("a"), Step::Data("b")]),
    )));
    let trip = || world.breaker.try_acquire().unwrap().settle(Outcome::Failure);
    trip();
    world.clock.advance(Duration::from_secs(10));
    let mut probe = guard.clone().oneshot(get()).now_or_never().unwrap().unwrap();
    probe.frame().now_or_never().unwrap().unwrap().unwrap();
    let second = guard.clone().oneshot(get()).now_or_never().unwrap().unwrap();
    assert_eq!(second.status(), 503, "the one slot is taken");
    assert_eq!(second.headers()["retry-after"], "10", "the lease");
    drop(probe.collect().now_or_never());
    assert_eq!(world.breaker.state(), State::Closed);

    trip();
    world.clock.advance(Duration::from_secs(10));
    let endless = guard.clone().oneshot(get()).now_or_never().unwrap().unwrap();
    world.clock.advance(Duration::from_secs(10));
    let next = guard.oneshot(get()).now_or_never().unwrap().unwrap();
    assert_eq!(next.status(), 200, "a stream that never ends loses its lease");
    drop(next.collect().now_or_never());
    assert_eq!(world.breaker.state(), State::Closed);
    drop(endless);
}

#[test]
fn a_stream_that_ends_in_another_generation_moves_nothing_and_holds_nothing() {
    let config = CircuitBreakerConfig::default()
        .failure_threshold(1)
        .half_open_max_calls(1)
        .success_threshold(1)
        .recovery_timeout(Duration::from_secs(10))
        .probe_lease(Duration::from_secs(3600));
    let world = World::new(config.clone());
    let guard = |steps: &[Step]| {
        CircuitBreakerLayer::http(world.breaker.clone()).layer(serves(response(200, &[], script(steps.to_vec()))))
    };
    let ask = |steps: &[Step]| guard(steps).oneshot(get()).now_or_never().unwrap().unwrap();
    let breaks_off = [Step::Data("a"), Step::Error];
    let read = |answer: Response<_>| drop(BodyExt::collect(answer).now_or_never());

    // Begun while closed, ended while half-open.
    let early = ask(&breaks_off);
    read(ask(&breaks_off));
    world.clock.advance(Duration::from_secs(10));
    assert_eq!(world.breaker.state(), State::HalfOpen);
    read(early);
    assert_eq!(world.breaker.state(), State::HalfOpen);

    // A probe that ends after the circuit was reset, and one after it was configured anew.
    let probe = ask(&breaks_off);
    world.breaker.reset();
    read(probe);
    assert_eq!(world.breaker.state(), State::Closed);
    read(ask(&breaks_off));
    world.clock.advance(Duration::from_secs(10));
    let probe = ask(&breaks_off);
    world.breaker.reconfigure(config).unwrap();
    assert_eq!(ask(&[]).status(), 503, "the slot is still taken");
    read(probe);
    assert_eq!(world.breaker.state(), State::HalfOpen);
    read(ask(&[]));
    assert_eq!(world.breaker.state(), State::Closed, "its slot was free again");
    assert_eq!(world.counts(), [1, 5, 0, 0], "counted all the same");
}

#[test]
fn a_slow_call_is_measured_to_the_end_of_its_stream() {
    let world = World::new(CircuitBreakerConfig::default().slow_calls(1.0, Duration::from_secs(5)));
    let guard =
        CircuitBreakerLayer::http(world.breaker.clone()).layer(serves(response(200, &[], script([Step::Data("a")]))));
    let answer = guard.oneshot(get()).now_or_never().unwrap().unwrap();
    world.clock.advance(Duration::from_secs(5));
    drop(answer.collect().now_or_never());
    assert_eq!(world.metrics().slow_requests, 1);
}

#[test]
fn an_adaptive_limit_learns_from_streams() {
    let clock = Clock::manual();
    let adaptive = Adaptive::new(100)
        .window(Duration::from_secs(1))
        .minimum_calls(4)
        .adjustment_factor(0.5);
    let limiter = RateLimiter::builder("search", adaptive).clock(&clock).build().unwrap();
    let guard =
        RateLimitLayer::http(limiter.clone()).layer(serves(response(200, &[], script([Step::Data("a"), Step::Error]))));
    for _ in 0..4 {
        let answer = guard.clone().oneshot(get()).now_or_never().unwrap().unwrap();
        drop(answer.collect().now_or_never());
    }
    clock.advance(Duration::from_secs(1));
    assert_eq!(limiter.status().rate.to_string(), "50");
}

#[test]
fn two_layers_each_settle_their_own() {
    let (outer, inner) = (World::default(), World::default());
    let service = CircuitBreakerLayer::http(outer.breaker.clone()).layer(
        CircuitBreakerLayer::http(inner.breaker.clone()).layer(serves(response(
            200,
            &[],
            script([Step::Data("a"), Step::Error]),
        ))),
    );
    let answer = service.oneshot(get()).now_or_never().unwrap().unwrap();
    drop(answer.collect().now_or_never());
    assert_eq!((outer.counts(), inner.counts()), (FAILURE, FAILURE));
}

#[test]
fn a_fallback_answers_with_the_plain_response_of_its_service() {
    let world = World::default();
    world.breaker.force_open();
    let layer = CircuitBreakerLayer::new(world.breaker.clone())
        .classify_with(HttpClassifier::new())
        .fallback(serves(response(200, &[], script([Step::Data("from memory")]))));
    let answer = layer.layer(serves(response(200, &[], script([])))).oneshot(get());
    let body = answer
        .now_or_never()
        .unwrap()
        .unwrap()
        .collect()
        .now_or_never()
        .unwrap()
        .unwrap();
    assert_eq!(body.to_bytes(), "from memory");
    assert_eq!(world.metrics().total_requests, world.metrics().rejected_requests);
}

#[test]
fn the_service_says_how_long_it_wants_to_be_left_alone() {
    let open_for = |grpc: bool, status: u16, fields: &[(&'static str, &'static str)]| {
        let config = CircuitBreakerConfig::default()
            .failure_threshold(1)
            .recovery_timeout(Duration::from_secs(1))
            .honor_retry_after(Duration::from_secs(600));
        let world = World::new(config);
        let answer = response(status, fields, script([]));
        if grpc {
            let layer = CircuitBreakerLayer::grpc(world.breaker.clone());
            judged_for(grpc_call(), &layer, &world, answer);
        } else {
            let classifier = HttpClassifier::new().rate_limited(Outcome::Failure);
            judged(
                &CircuitBreakerLayer::http(world.breaker.clone()).classify_with(classifier),
                &world,
                answer,
            );
        }
        world.breaker.status().retry_after.unwrap().as_millis()
    };
    let http = |status, fields: &[(&'static str, &'static str)]| open_for(false, status, fields);
    assert_eq!(http(503, &[("retry-after", "30")]), 30_000);
    assert_eq!(http(429, &[("retry-after", "30")]), 30_000);
    assert_eq!(http(500, &[("retry-after", "30")]), 1_000, "says nothing there");
    assert_eq!(http(503, &[("retry-after", "100000")]), 600_000, "the cap");
    assert_eq!(
        http(503, &[("retry-after", "99999999999999999999999")]),
        1_000,
        "no number of seconds"
    );
    for bad in ["-5", "1.5", "", "soon", "+3", "3 "] {
        assert_eq!(http(503, &[("retry-after", bad)]), 1_000, "{bad:?}");
    }
    assert_eq!(
        http(503, &[("retry-after", "30"), ("retry-after", "40")]),
        1_000,
        "which?"
    );
    let (date, later) = ("Tue, 24 Nov 2026 10:00:00 GMT", "Tue, 24 Nov 2026 10:02:00 GMT");
    assert_eq!(http(503, &[("retry-after", later), ("date", date)]), 120_000);
    assert_eq!(
        http(503, &[("retry-after", later)]),
        1_000,
        "there is nothing to compare it with"
    );
    assert_eq!(
        http(503, &[("retry-after", date), ("date", later)]),
        1_000,
        "it is over"
    );

    let grpc = |fields: &[(&'static str, &'static str)]| open_for(true, 200, fields);
    assert_eq!(
        grpc(&[("grpc-status", "14"), ("grpc-retry-pushback-ms", "2500")]),
        2_500
    );
    let proxied = |status, fields: &[(&'static str, &'static str)]| open_for(true, status, fields);
    assert_eq!(proxied(503, &[("retry-after", "30")]), 30_000, "a proxy speaks HTTP");
    assert_eq!(proxied(502, &[("retry-after", "30")]), 1_000, "says nothing there");
    let both = [("retry-after", "30"), ("grpc-retry-pushback-ms", "2500")];
    assert_eq!(proxied(503, &both), 2_500);
    for bad in ["-1", "02500", "2147483648", "", "x"] {
        assert_eq!(
            grpc(&[("grpc-status", "14"), ("grpc-retry-pushback-ms", bad)]),
            1_000,
            "{bad:?}"
        );
    }
}

#[test]
fn hostile_headers_are_read_as_nothing() {
    let long: &'static str = "9".repeat(10_000).leak();
    let world = World::new(
        CircuitBreakerConfig::default()
            .failure_threshold(1)
            .honor_retry_after(Duration::from_secs(600)),
    );
    let answer = response(503, &[("retry-after", long), ("grpc-status", long)], script([]));
    judged(&CircuitBreakerLayer::http(world.breaker.clone()), &world, answer);
    assert_eq!(world.breaker.status().retry_after, Some(Duration::from_secs(60)));
    let mut bytes = response(200, &[], script([]));
    bytes
        .headers_mut()
        .insert("grpc-status", HeaderValue::from_bytes(b"\xff\xfe").unwrap());
    assert_eq!(grpc(bytes), (FAILURE, FAILURE));
}

/// A limit of 1,000 tokens that reserves 500 for each call, before a service with a meter that has counted so much.
fn metered(
    counted: u32,
    steps: Vec<Step>,
) -> (
    RateLimiter,
    Response<impl Body<Data = Bytes, Error = io::Error> + Unpin>,
    CostMeter,
) {
    let clock = Clock::manual();
    let tokens = RateLimiter::builder("model", TokenBucket::new(1_000, Duration::from_secs(1_000)))
        .clock(&clock)
        .build()
        .unwrap();
    let meter = CostMeter::new();
    meter.add(counted);
    let mut answer = response(200, &[], script(steps));
    answer.extensions_mut().insert(meter.clone());
    let service = RateLimitLayer::http(tokens.cost(|_: &Request<()>| 500)).layer(serves(answer));
    let answer = service.oneshot(get()).now_or_never().unwrap().unwrap();
    assert_eq!(tokens.quota().remaining, 500, "the estimate");
    (tokens, answer, meter)
}

#[test]
fn a_stream_is_charged_what_its_meter_says_when_it_has_ended() {
    let (tokens, answer, meter) = metered(10, vec![Step::Data("a"), Step::Data("b")]);
    meter.add(20);
    drop(answer.into_body().collect().now_or_never());
    assert_eq!(tokens.quota().remaining, 970);
    meter.add(1_000);
    assert_eq!(tokens.quota().remaining, 970, "once");
}

#[test]
fn a_stream_that_is_dropped_is_charged_what_it_had_cost() {
    let (tokens, answer, _) = metered(100, vec![Step::Wait]);
    drop(answer);
    assert_eq!(tokens.quota().remaining, 900);
}

#[test]
fn a_stream_that_is_dropped_before_its_meter_has_counted_keeps_its_estimate() {
    // As one whose cost comes with its last message, which the caller does not wait for.
    let (tokens, answer, _) = metered(0, vec![Step::Data("a"), Step::Wait]);
    let mut body = answer.into_body();
    body.frame().now_or_never().unwrap().unwrap().unwrap();
    drop(body);
    assert_eq!(tokens.quota().remaining, 500);
    let (tokens, answer, _) = metered(0, vec![]);
    drop(answer.into_body().collect().now_or_never());
    assert_eq!(tokens.quota().remaining, 1_000, "what has ended says what it cost");
}

#[test]
fn a_stream_that_panics_is_charged_what_it_had_cost() {
    let (tokens, answer, _) = metered(700, vec![Step::Panic]);
    let mut body = answer.into_body();
    catch_unwind(AssertUnwindSafe(|| body.frame().now_or_never())).unwrap_err();
    assert_eq!(tokens.quota().remaining, 300);
    drop(body);
    assert_eq!(tokens.quota().remaining, 300, "once");
}

#[test]
fn a_stream_that_breaks_off_is_charged_what_it_had_cost() {
    let (tokens, answer, _) = metered(700, vec![Step::Error]);
    drop(answer.into_body().collect().now_or_never());
    assert_eq!(tokens.quota().remaining, 300);
}

#[test]
fn a_meter_takes_a_bucket_into_debt_by_one_burst_at_most() {
    let (tokens, answer, meter) = metered(0, vec![Step::Data("a")]);
    meter.set(u32::MAX);
    meter.add(u32::MAX);
    drop(answer.into_body().collect().now_or_never());
    let wait = tokens.try_acquire().unwrap_err().retry_after.unwrap();
    assert_eq!(wait, Duration::from_secs(1_001));
}

#[test]
fn a_meter_corrects_the_limit_of_tokens_and_not_that_of_calls() {
    let clock = Clock::manual();
    let limit = |name: &str| {
        let bucket = TokenBucket::new(100, Duration::from_secs(100));
        RateLimiter::builder("model", bucket)
            .limit(name)
            .clock(&clock)
            .build()
            .unwrap()
    };
    let (calls, tokens) = (limit("calls"), limit("tokens"));
    let meter = CostMeter::new();
    meter.add(30);
    let mut answer = response(200, &[], script([Step::Data("a")]));
    answer.extensions_mut().insert(meter);
    let pair = RateLimitLayer::http((calls.clone(), tokens.cost(|_: &Request<()>| 50))).layer(serves(answer));
    for left in [(99, 70), (98, 40)] {
        let answer = pair.clone().oneshot(get()).now_or_never().unwrap().unwrap();
        drop(answer.into_body().collect().now_or_never());
        assert_eq!((calls.quota().remaining, tokens.quota().remaining), left);
    }
    let refused = pair.oneshot(get()).now_or_never().unwrap().unwrap();
    assert_eq!(refused.status(), 429);
    assert_eq!(
        refused.extensions().get::<Rejected>().unwrap().limit.as_deref(),
        Some("tokens")
    );
    assert_eq!(
        calls.quota().remaining,
        98,
        "nothing is burnt on the refusal of another"
    );
}

/// Nothing is streamed then, and the answer has cost what it has cost all the same.
#[test]
fn an_answer_that_is_judged_at_its_head_is_charged_what_its_meter_says() {
    for (status, knows_its_end) in [(500, false), (200, true)] {
        let clock = Clock::manual();
        let tokens = RateLimiter::builder("model", TokenBucket::new(1_000, Duration::from_secs(1_000)))
            .clock(&clock)
            .build()
            .unwrap();
        let meter = CostMeter::new();
        meter.add(30);
        let body = Script {
            steps: VecDeque::new(),
            knows_its_end,
        };
        let mut answer = response(status, &[], body);
        answer.extensions_mut().insert(meter);
        let service = RateLimitLayer::http(tokens.cost(|_: &Request<()>| 500)).layer(serves(answer));
        let _answer = service.oneshot(get()).now_or_never().unwrap().unwrap();
        assert_eq!(tokens.quota().remaining, 970, "status {status}");
    }
}

#[test]
fn a_meter_corrects_a_keyed_limit_of_tokens_at_its_own_key_and_not_that_of_calls() {
    let clock = Clock::manual();
    let limit = |name: &str| {
        let bucket = TokenBucket::new(100, Duration::from_secs(100));
        KeyedRateLimiter::builder("model", bucket)
            .limit(name)
            .clock(&clock)
            .build()
            .unwrap()
    };
    let (calls, tokens) = (limit("calls"), limit("tokens"));
    let by_path = |request: &Request<()>| Some(request.uri().path().to_owned());
    let meter = CostMeter::new();
    meter.add(30);
    let mut answer = response(200, &[], script([Step::Data("a")]));
    answer.extensions_mut().insert(meter);
    let pair = (calls.by(by_path), tokens.by(by_path).cost(|_: &Request<()>| 50));
    let pair = RateLimitLayer::http(pair).layer(serves(answer));
    let ask = |path: &'static str| {
        let request = Request::get(path).body(()).unwrap();
        let answer = pair.clone().oneshot(request).now_or_never().unwrap().unwrap();
        drop(answer.into_body().collect().now_or_never());
    };
    ask("/a");
    ask("/b");
    for key in ["/a", "/b"] {
        assert!(calls.try_acquire_n(key, 100).is_err(), "the call itself was charged");
        assert!(calls.try_acquire_n(key, 99).is_ok(), "and nothing but the call");
        assert!(
            tokens.try_acquire_n(key, 71).is_err(),
            "what the meter says was charged"
        );
        assert!(
            tokens.try_acquire_n(key, 70).is_ok(),
            "and what was reserved beyond it returned"
        );
    }
}

#[test]
fn calls_and_tokens_in_any_order_and_of_each_caller_are_corrected_however_a_stream_ends() {
    let clock = Clock::manual();
    let bucket = || TokenBucket::new(100, Duration::from_secs(100));
    let answer = |steps: &[Step]| {
        let meter = CostMeter::new();
        meter.add(30);
        let mut answer = response(200, &[], script(steps.iter().cloned()));
        answer.extensions_mut().insert(meter);
        serves(answer)
    };
    let estimate = |_: &Request<()>| 50;
    for steps in [vec![Step::Data("a")], vec![Step::Error], vec![Step::Wait]] {
        let single = || RateLimiter::builder("model", bucket()).clock(&clock).build().unwrap();
        let (calls, tokens) = (single(), single());
        for layer in [
            RateLimitLayer::http((calls.clone(), tokens.cost(estimate)))
                .layer(answer(&steps))
                .boxed(),
            RateLimitLayer::http((tokens.cost(estimate), calls.clone()))
                .layer(answer(&steps))
                .boxed(),
        ] {
            drop(
                layer
                    .oneshot(get())
                    .now_or_never()
                    .unwrap()
                    .unwrap()
                    .collect()
                    .now_or_never(),
            );
        }
        let left = (calls.quota().remaining, tokens.quota().remaining);
        assert_eq!(left, (98, 40), "{steps:?}");

        let keyed = || {
            let limiter = KeyedRateLimiter::builder("model", bucket()).clock(&clock).build();
            limiter.unwrap()
        };
        let (calls, tokens) = (keyed(), keyed());
        let who = |_: &Request<()>| Some(7_u8);
        let pair = (calls.by(who), (calls.by(who), tokens.by(who).cost(estimate)));
        let service = RateLimitLayer::http(pair).layer(answer(&steps));
        drop(
            service
                .oneshot(get())
                .now_or_never()
                .unwrap()
                .unwrap()
                .collect()
                .now_or_never(),
        );
        for (limiter, left) in [(calls, 98), (tokens, 70)] {
            assert!(limiter.try_acquire_n(&7_u8, left + 1).is_err(), "{steps:?}: {left}");
            limiter.try_acquire_n(&7_u8, left).expect("this much");
        }
    }
}

#[test]
fn an_answer_that_is_judged_at_its_head_is_charged_what_its_meter_says_there() {
    let clock = Clock::manual();
    let tokens = RateLimiter::builder("model", TokenBucket::new(1_000, Duration::from_secs(1_000)))
        .clock(&clock)
        .build()
        .unwrap();
    let meter = CostMeter::new();
    meter.add(20);
    for (left, status) in [(980, 200), (960, 500)] {
        let body = Script {
            knows_its_end: true,
            ..Script::default()
        };
        let mut answer = response(status, &[], body);
        answer.extensions_mut().insert(meter.clone());
        let service = RateLimitLayer::http(tokens.cost(|_: &Request<()>| 500)).layer(serves(answer));
        let answer = service.oneshot(get()).now_or_never().unwrap().unwrap();
        assert_eq!(tokens.quota().remaining, left, "{status}");
        drop(answer);
        assert_eq!(tokens.quota().remaining, left, "once");
    }
}

#[test]
fn a_meter_stays_at_the_largest_number() {
    let meter = CostMeter::new();
    meter.set(u32::MAX - 1);
    for _ in 0..3 {
        meter.add(1);
    }
    assert_eq!(meter.get(), u32::MAX);
}

#[test]
fn a_waiting_limit_of_tokens_is_corrected_as_well() {
    let clock = Clock::manual();
    let tokens = RateLimiter::builder("model", TokenBucket::new(100, Duration::from_secs(100)))
        .clock(&clock)
        .build()
        .unwrap();
    let meter = CostMeter::new();
    meter.add(10);
    let mut answer = response(200, &[], script([Step::Data("a")]));
    answer.extensions_mut().insert(meter);
    let layer = RateLimitLayer::http(tokens.cost(|_: &Request<()>| 80)).wait(Duration::from_secs(1));
    let answer = layer
        .layer(serves(answer))
        .oneshot(get())
        .now_or_never()
        .unwrap()
        .unwrap();
    assert_eq!(tokens.quota().remaining, 20);
    drop(answer.into_body().collect().now_or_never());
    assert_eq!(tokens.quota().remaining, 90);
}

/// Counts as a success what sent as many frames as it announced.
#[derive(Clone)]
struct Announced(Arc<str>);

struct Marked(bool);

impl Judge for Announced {
    type Seen = bool;
    type AtEnd = Marked;
    fn see<B>(&self, request: &Request<B>) -> bool {
        request.uri().path() == &*self.0
    }
    fn head<B>(&self, marked: bool, _: &Response<B>) -> Judged<Marked> {
        Judged::AtEnd(Marked(marked))
    }
}

impl JudgeEnd for Marked {
    fn end(self, _: Option<&HeaderMap>) -> Verdict {
        if self.0 {
            Outcome::Success.into()
        } else {
            Outcome::Failure.into()
        }
    }
}

#[test]
fn a_judge_of_ones_own_sees_the_request_and_the_end() {
    for (path, counts) in [("/", SUCCESS), ("/other", FAILURE)] {
        let world = World::default();
        let layer = CircuitBreakerLayer::http(world.breaker.clone()).classify_with(Announced(path.into()));
        assert_eq!(
            judged(&layer, &world, response(500, &[], script([Step::Data("a")]))),
            (NOTHING, counts)
        );
    }
}

#[cfg(feature = "tower-http")]
mod tower_http {
    use super::*;
    use ::tower_http::classify::{GrpcErrorsAsFailures, ServerErrorsAsFailures, SharedClassifier};
    use portcullis::TowerHttpClassifier;

    #[test]
    fn an_answer_without_a_body_is_judged_at_its_head_by_tower_http_as_well() {
        let by_status = TowerHttpClassifier::new(SharedClassifier::new(ServerErrorsAsFailures::new()));
        for (method, status) in [
            (Method::HEAD, 200),
            (Method::CONNECT, 200),
            (Method::GET, 101),
            (Method::GET, 204),
            (Method::GET, 304),
        ] {
            let world = World::default();
            let layer = CircuitBreakerLayer::http(world.breaker.clone()).classify_with(by_status.clone());
            let mut request = get();
            *request.method_mut() = method.clone();
            let service = layer.layer(serves(response(status, &[], script([Step::Wait]))));
            drop(service.oneshot(request).now_or_never().unwrap().unwrap());
            assert_eq!(world.counts(), SUCCESS, "{method} {status}");
        }
    }

    #[test]
    fn what_a_service_asks_for_is_heeded_whoever_judges() {
        let world = World::new(
            CircuitBreakerConfig::default()
                .failure_threshold(1)
                .honor_retry_after(Duration::from_secs(600)),
        );
        let by_status = TowerHttpClassifier::new(SharedClassifier::new(ServerErrorsAsFailures::new()));
        let layer = CircuitBreakerLayer::http(world.breaker.clone()).classify_with(by_status);
        judged(&layer, &world, response(503, &[("retry-after", "300")], script([])));
        assert_eq!(world.breaker.status().retry_after, Some(Duration::from_secs(300)));
    }

    #[test]
    fn a_classifier_of_tower_http_judges_heads_and_ends() {
        let by_status = TowerHttpClassifier::new(SharedClassifier::new(ServerErrorsAsFailures::new()));
        let by_code = TowerHttpClassifier::new(SharedClassifier::new(GrpcErrorsAsFailures::new()));
        let status = |code| script([Step::Trailers(vec![("grpc-status", code)])]);
        for (grpc, answer, counts) in [
            (false, response(500, &[], script([])), (FAILURE, FAILURE)),
            (false, response(200, &[], script([Step::Data("a")])), (NOTHING, SUCCESS)),
            (
                false,
                response(200, &[], script([Step::Data("a"), Step::Error])),
                (NOTHING, FAILURE),
            ),
            (true, response(200, &[], status("14")), (NOTHING, FAILURE)),
            (true, response(200, &[], status("0")), (NOTHING, SUCCESS)),
        ] {
            let world = World::default();
            let layer = CircuitBreakerLayer::http(world.breaker.clone());
            let judged = if grpc {
                judged(&layer.classify_with(by_code.clone()), &world, answer)
            } else {
                judged(&layer.classify_with(by_status.clone()), &world, answer)
            };
            assert_eq!(judged, counts);
        }
    }
}
