//! Response bodies that do anything, read by somebody who does anything: frames pass unchanged, and each call is settled once.

use super::input::{play, rarely};
use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header::CONTENT_LENGTH};
use http_body::{Body, Frame, SizeHint};
use portcullis::{
    CircuitBreaker, CircuitBreakerMetrics, Clock, CostMeter, GrpcClassifier, GuardLayer, HttpClassifier, Outcome,
    RateLimiter, TokenBucket, classify::Judge,
};
use std::{
    collections::VecDeque,
    convert::Infallible,
    future::{Ready, ready},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tower_layer::Layer;
use tower_service::Service;

const BURST: u32 = 1_000;
const RESERVED: u32 = 10;

pub fn run(data: &[u8]) {
    play(data, |input| {
        if input.arbitrary()? {
            scenario(input, HttpClassifier::new(), false)
        } else {
            scenario(input, GrpcClassifier::new(), true)
        }
    });
}

#[derive(Debug, Clone)]
enum Step {
    Data(usize),
    /// With this `grpc-status`, if there is one.
    Trailers(Option<&'static str>),
    /// So much was used, the meter says.
    Meter(u32),
    Pending,
    Error,
    Panic,
}

/// A body that does what its script says.
#[derive(Debug, Clone)]
struct Script {
    steps: VecDeque<Step>,
    knows_its_end: bool,
    hint: Option<u64>,
    meter: CostMeter,
}

/// What stands in for a panic: it unwinds as one does, and no hook hears of it.
struct Unwound;

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, Self::Error>>> {
        loop {
            return match self.steps.pop_front() {
                None => Poll::Ready(None),
                Some(Step::Data(length)) => Poll::Ready(Some(Ok(Frame::data(vec![b'x'; length].into())))),
                Some(Step::Trailers(status)) => Poll::Ready(Some(Ok(Frame::trailers(trailers(status))))),
                Some(Step::Meter(cost)) => {
                    self.meter.add(cost);
                    continue;
                }
                Some(Step::Pending) => Poll::Pending,
                Some(Step::Error) => Poll::Ready(Some(Err("cut off"))),
                Some(Step::Panic) => resume_unwind(Box::new(Unwound)),
            };
        }
    }

    fn is_end_stream(&self) -> bool {
        self.knows_its_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.hint.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

fn trailers(status: Option<&'static str>) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if let Some(status) = status {
        trailers.insert("grpc-status", HeaderValue::from_static(status));
    }
    trailers
}

fn script(input: &mut Unstructured<'_>) -> Result<Script> {
    let mut steps = VecDeque::new();
    for _ in 0..input.int_in_range(0..=8)? {
        steps.push_back(match input.int_in_range(0..=9)? {
            0 => Step::Error,
            1 => Step::Panic,
            2 => Step::Pending,
            3 => Step::Trailers(*input.choose(&[None, Some("0"), Some("8"), Some("14"), Some("014"), Some("x")])?),
            4 => Step::Meter(input.arbitrary()?),
            _ => Step::Data(input.int_in_range(0..=7)?),
        });
    }
    Ok(Script {
        steps,
        knows_its_end: input.arbitrary()?,
        hint: if rarely(input)? {
            Some(input.int_in_range(0..=20)?)
        } else {
            None
        },
        meter: CostMeter::new(),
    })
}

/// What the reader does next.
#[derive(Debug, Clone, Copy)]
enum Read {
    Poll,
    AskForEnd,
    AskForSize,
}

/// What came of it, as text: frames cannot be compared.
fn read<B: Body<Data = Bytes, Error = &'static str>>(body: Pin<&mut B>, how: Read) -> String {
    let mut cx = Context::from_waker(Waker::noop());
    match how {
        Read::AskForEnd => format!("{}", body.is_end_stream()),
        Read::AskForSize => format!("{:?}", body.size_hint()),
        Read::Poll => {
            let polled = catch_unwind(AssertUnwindSafe(|| body.poll_frame(&mut cx)));
            polled.map_or_else(|_| "unwound".to_owned(), |frame| format!("{frame:?}"))
        }
    }
}

/// Answers once, with what it is given.
struct Upstream(Option<Response<Script>>);

impl Service<Request<()>> for Upstream {
    type Response = Response<Script>;
    type Error = Infallible;
    type Future = Ready<std::result::Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        ready(Ok(self.0.take().expect("called once")))
    }
}

fn scenario<J>(input: &mut Unstructured<'_>, judge: J, is_grpc: bool) -> Result<()>
where
    J: Judge,
{
    let clock = Clock::manual();
    let breaker = CircuitBreaker::builder("fuzzed")
        .clock(&clock)
        .failure_threshold(1)
        .recovery_timeout(Duration::from_secs(1))
        .half_open_max_calls(1)
        .success_threshold(1)
        .build()
        .expect("valid");
    let is_probe: bool = input.arbitrary()?;
    if is_probe {
        breaker.try_acquire().expect("closed").settle(Outcome::Failure);
        clock.advance(Duration::from_secs(1));
    }
    let begun = breaker.status().metrics;
    // So slow that nothing comes back by itself.
    let bucket = TokenBucket::new(1, Duration::from_secs(3_000_000_000)).burst(BURST);
    let limiter = RateLimiter::builder("fuzzed", bucket)
        .clock(&clock)
        .build()
        .expect("valid");

    let (script, head) = (script(input)?, head(input)?);
    let has_meter: bool = input.arbitrary()?;
    let mut response = head.response(script.clone());
    if has_meter {
        response.extensions_mut().insert(script.meter.clone());
    }
    let policy = (breaker.clone(), limiter.cost(|_: &Request<()>| RESERVED));
    let mut service = GuardLayer::new(policy)
        .classify_with(judge)
        .respond()
        .layer(Upstream(Some(response)));
    assert!(service.poll_ready(&mut Context::from_waker(Waker::noop())).is_ready());
    let Ok(response) = super::ready(service.call(head.request(is_grpc)));
    assert_eq!(response.status(), head.status, "the head passes");

    // The same script beside it, unguarded, with a meter that nobody reads.
    let mut twin = pin!(Script {
        meter: CostMeter::new(),
        ..script.clone()
    });
    let mut expected = head.expect(&script, is_grpc);
    let mut body = Box::pin(response.into_body());
    for _ in 0..input.int_in_range(0..=12)? {
        let how = *input.choose(&[Read::Poll, Read::Poll, Read::Poll, Read::AskForEnd, Read::AskForSize])?;
        let before = twin.clone();
        let (passed, original) = (read(body.as_mut(), how), read(twin.as_mut(), how));
        assert_eq!(passed, original, "what the body does passes unchanged");
        expected.see(how, &passed, &before, &twin);
    }
    if rarely(input)? {
        // Dropped by somebody's panic.
        let dropped = catch_unwind(AssertUnwindSafe(move || {
            let _body = body;
            resume_unwind(Box::new(Unwound));
        }));
        assert!(dropped.is_err());
        expected.drop_in_panic();
    } else {
        drop(body);
        expected.drop();
    }
    drop(service);

    let ended = counts(breaker.status().metrics);
    let settled: Vec<_> = ended.iter().zip(counts(begun)).map(|(now, then)| now - then).collect();
    assert_eq!(
        settled,
        expected.counts(),
        "[success, failure, ignored, cancelled] of {script:?} behind {head:?}"
    );
    assert_eq!(breaker.status().probes_in_flight, 0, "no slot is kept");
    let charged = u64::from(BURST) - limiter.quota().remaining;
    let metered = if has_meter { Some(script.meter.get()) } else { None };
    let charge = expected.charge(metered);
    assert_eq!(
        charged,
        u64::from(charge.min(BURST)),
        "charged for {script:?} behind {head:?}"
    );
    Ok(())
}

fn counts(metrics: CircuitBreakerMetrics) -> [u64; 4] {
    let CircuitBreakerMetrics {
        successful_requests,
        failed_requests,
        ignored_requests,
        cancelled_requests,
        ..
    } = metrics;
    [
        successful_requests,
        failed_requests,
        ignored_requests,
        cancelled_requests,
    ]
}

#[derive(Debug)]
struct Head {
    method: Method,
    status: StatusCode,
    announced: Option<u64>,
}

fn head(input: &mut Unstructured<'_>) -> Result<Head> {
    Ok(Head {
        method: if rarely(input)? { Method::HEAD } else { Method::GET },
        status: *input.choose(&[
            StatusCode::OK,
            StatusCode::OK,
            StatusCode::NO_CONTENT,
            StatusCode::BAD_GATEWAY,
        ])?,
        announced: if input.arbitrary()? {
            Some(input.int_in_range(0..=20)?)
        } else {
            None
        },
    })
}

impl Head {
    fn request(&self, is_grpc: bool) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        if is_grpc {
            let grpc = HeaderValue::from_static("application/grpc");
            request.headers_mut().insert("content-type", grpc);
        }
        request
    }

    fn response(&self, body: Script) -> Response<Script> {
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        if let Some(announced) = self.announced {
            response.headers_mut().insert(CONTENT_LENGTH, announced.into());
        }
        response
    }

    /// What the head alone says of the call, and what is still to come.
    fn expect(&self, script: &Script, is_grpc: bool) -> Expected {
        let at_head = if is_grpc {
            (self.status != StatusCode::OK).then_some(End::Failure)
        } else if self.status == StatusCode::BAD_GATEWAY {
            Some(End::Failure)
        } else if self.method == Method::HEAD || self.status == StatusCode::NO_CONTENT {
            Some(End::Success)
        } else {
            None
        };
        let mut expected = Expected {
            end: at_head,
            is_grpc,
            left: self.announced.or(script.hint),
            told_end: false,
            metered: 0,
        };
        if expected.end.is_none() && script.is_end_stream() {
            expected.end = Some(expected.without_status());
        }
        expected
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Success,
    Failure,
    Ignored,
    Cancelled,
}

/// How the call ends, as told by what the reader sees.
#[derive(Debug)]
struct Expected {
    end: Option<End>,
    is_grpc: bool,
    left: Option<u64>,
    told_end: bool,
    /// What the meter said when the call ended.
    metered: u32,
}

impl Expected {
    /// A stream of gRPC that ends without a status has failed.
    fn without_status(&self) -> End {
        if self.is_grpc { End::Failure } else { End::Success }
    }

    fn see(&mut self, how: Read, seen: &str, before: &Script, after: &Script) {
        if self.end.is_some() {
            return;
        }
        self.metered = self.metered.max(after.meter.get());
        match how {
            Read::AskForEnd => self.told_end |= seen == "true",
            Read::AskForSize => {}
            Read::Poll => {
                let step = before.steps.iter().find(|step| !matches!(step, Step::Meter(_)));
                self.end = match step {
                    None => Some(self.without_status()),
                    Some(Step::Panic | Step::Error) => Some(End::Failure),
                    Some(Step::Trailers(status)) => Some(self.by_trailers(*status)),
                    Some(Step::Data(length)) => {
                        self.left = self.left.map(|left| left.saturating_sub(*length as u64));
                        after.is_end_stream().then(|| self.without_status())
                    }
                    Some(Step::Pending | Step::Meter(_)) => None,
                };
            }
        }
    }

    fn by_trailers(&self, status: Option<&str>) -> End {
        match status {
            _ if !self.is_grpc => End::Success,
            Some("0") => End::Success,
            Some("8") => End::Ignored,
            _ => End::Failure,
        }
    }

    fn drop(&mut self) {
        if self.end.is_none() {
            self.end = Some(if self.told_end {
                self.without_status()
            } else if self.left == Some(0) && !self.is_grpc {
                End::Success
            } else {
                End::Cancelled
            });
        }
    }

    fn drop_in_panic(&mut self) {
        self.end.get_or_insert(End::Cancelled);
    }

    fn counts(&self) -> Vec<u64> {
        let all = [End::Success, End::Failure, End::Ignored, End::Cancelled];
        all.iter().map(|end| u64::from(self.end == Some(*end))).collect()
    }

    /// A call that was cancelled before anything was counted keeps what it reserved.
    fn charge(&self, metered: Option<u32>) -> u32 {
        match metered {
            None => RESERVED,
            Some(_) if self.metered == 0 && self.end == Some(End::Cancelled) => RESERVED,
            Some(_) => self.metered,
        }
    }
}
