//! What counts as a failure over HTTP and gRPC.

use super::{
    AsResponse,
    body::{GuardedBody, metered},
    cost::CostMeter,
    grpc::{is_grpc, is_web},
};
use crate::{
    GuardLayer,
    classify::Classify,
    clock::Reading,
    permit::{Outcome, Permit, Verdict},
    policy::Gate,
    rejected::Rejected,
};
use http::{
    HeaderMap, Method, Request, Response, StatusCode,
    header::{self, AsHeaderName},
};
use http_body::Body;
use std::{any::Any, sync::Arc, time::Duration};

/// Judges HTTP responses, at their head or at the end of their body. Every judge is a
/// [`Classify`](crate::classify::Classify), for [`classify_with`](crate::GuardLayer::classify_with).
///
/// [`HttpClassifier`] and [`GrpcClassifier`] are judges. This one of a user's own fails an answer that announces more than it sends:
///
/// ```
/// use http::{HeaderMap, Request, Response};
/// use portcullis::{
///     CircuitBreaker, CircuitBreakerLayer, Outcome, Verdict,
///     classify::{Judge, JudgeEnd, Judged},
/// };
///
/// #[derive(Clone)]
/// struct ChecksumMustCome;
///
/// impl Judge for ChecksumMustCome {
///     type Seen = ();
///     type AtEnd = Checksum;
///
///     fn see<B>(&self, _: &Request<B>) {}
///
///     fn head<B>(&self, (): (), response: &Response<B>) -> Judged<Checksum> {
///         match response.status().is_success() {
///             true => Judged::AtEnd(Checksum),
///             false => Judged::Now(Outcome::Failure.into()),
///         }
///     }
/// }
///
/// struct Checksum;
///
/// impl JudgeEnd for Checksum {
///     fn end(self, trailers: Option<&HeaderMap>) -> Verdict {
///         match trailers.is_some_and(|trailers| trailers.contains_key("checksum")) {
///             true => Outcome::Success.into(),
///             false => Outcome::Failure.into(),
///         }
///     }
/// }
///
/// let breaker = CircuitBreaker::builder("files").build()?;
/// let layer = CircuitBreakerLayer::http(breaker).classify_with(ChecksumMustCome);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
pub trait Judge: Clone {
    /// What is kept of the request while the call runs.
    type Seen;
    /// Judges the end of a body.
    type AtEnd: JudgeEnd;

    /// Looks at a request that is about to go out.
    fn see<B>(&self, request: &Request<B>) -> Self::Seen;

    /// Judges the head of a response, or leaves it to the end of its body.
    fn head<B>(&self, seen: Self::Seen, response: &Response<B>) -> Judged<Self::AtEnd>;

    /// Judges an error of the call, or of `poll_ready`. Default: a failure, unless it is a rejection by another portcullis policy.
    fn error<E: Any>(&self, error: &E) -> Verdict {
        Outcome::of_error(error).into()
    }
}

/// What a [`Judge`] says of the head of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judged<J> {
    /// All is known.
    Now(Verdict),
    /// The end of the body tells.
    AtEnd(J),
}

/// Judges how a body ended.
pub trait JudgeEnd: Sized {
    /// The body ended, with trailers or without.
    fn end(self, trailers: Option<&HeaderMap>) -> Verdict;

    /// The body broke off. Default: a failure.
    fn error(self) -> Verdict {
        Outcome::Failure.into()
    }

    /// The body was dropped before its end, but all the bytes had come that its length announced: an HTTP/1.1 server asks for no
    /// more. `None` if the call was cancelled. Default: an end without trailers.
    fn complete(self) -> Option<Verdict> {
        Some(self.end(None))
    }
}

impl<J, ReqB, ResB, Err> Classify<Request<ReqB>, Response<ResB>, Err> for J
where
    J: Judge,
    ResB: Body,
    Err: Any,
{
    type Seen = (J, J::Seen);
    type Response<P: Permit> = Response<GuardedBody<ResB, P, J::AtEnd>>;

    fn see(&self, request: &Request<ReqB>) -> Self::Seen {
        (self.clone(), Judge::see(self, request))
    }

    fn finish<P: Permit>(
        (judge, seen): Self::Seen,
        result: Result<Response<ResB>, Err>,
        permit: P,
        now: &Reading,
    ) -> Result<Self::Response<P>, Err> {
        let response = match result {
            Ok(response) => response,
            Err(error) => {
                permit.settle(judge.error(&error), now);
                return Err(error);
            }
        };
        let meter = response.extensions().get::<CostMeter>().cloned();
        let verdict = if response.extensions().get::<Rejected>().is_some() {
            // A local refusal by a layer inside this one is not the service's answer.
            Outcome::Ignored.into()
        } else {
            match judge.head(seen, &response) {
                Judged::Now(verdict) => verdict,
                Judged::AtEnd(end) if response.body().is_end_stream() => end.end(None),
                Judged::AtEnd(end) => {
                    let length = length(&response);
                    return Ok(response.map(|body| GuardedBody::watched(body, permit, end, meter, length)));
                }
            }
        };
        permit.settle(metered(verdict, meter.as_ref()), now);
        Ok(response.map(GuardedBody::settled))
    }

    fn unready(&self, error: Err) -> (Verdict, Err) {
        (self.error(&error), error)
    }
}

/// Judges HTTP: a 5xx and a body that breaks off are failures.
///
/// | the call ended with | counts as |
/// |---|---|
/// | an error | failure; ignored if it is a rejection by another portcullis policy |
/// | a rejection answered by a portcullis layer inside | ignored |
/// | 5xx | failure, told by the head |
/// | 429 | as [`rate_limited`](Self::rate_limited) says: ignored by default |
/// | any other status | success when the body has ended; failure if it breaks off |
/// | a body that is dropped before its end | cancelled; success if it had sent all that its `Content-Length` announces |
///
/// Where there is no body (a `HEAD` or `CONNECT` request, 1xx, 204, 304, an empty one) the head is the end. So a half-open probe holds
/// its slot until its answer has been streamed, and a slow call is measured to the end of its body: on a server, as fast as the caller
/// reads.
///
/// A client that looks at the head alone and drops the rest cancels its calls: no probe of it closes a circuit. Read the body to its
/// end, or say with [`cancelled`](crate::CircuitBreakerConfig::cancelled) what such a call counts as.
///
/// A body ends where it says so. One that is shorter than its `Content-Length` is an error of hyper's client, and so a failure in
/// front of it; in a server the service that sends it has succeeded, and hyper breaks the answer off behind the layer.
///
/// A `Retry-After` of a 429 or 503 goes to the breaker, which heeds it if it
/// [honours](crate::CircuitBreakerConfig::honor_retry_after) it, up to its cap: seconds, or a date if the response has a `Date` to
/// compare it with.
///
/// ```
/// use http::StatusCode;
/// use portcullis::{CircuitBreaker, CircuitBreakerLayer, HttpClassifier, Outcome};
///
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let classifier = HttpClassifier::new()
///     .status(StatusCode::NOT_IMPLEMENTED, Outcome::Success)
///     .rate_limited(Outcome::Failure);
/// let layer = CircuitBreakerLayer::http(breaker).classify_with(classifier);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct HttpClassifier {
    /// By status; few, so they are searched from the end: the latest word counts. `None` while there are none, so that the clone
    /// for each call costs nothing; and of a pointer's size, for each call keeps one.
    overrides: Option<Arc<Vec<(StatusCode, Outcome)>>>,
}

impl HttpClassifier {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Judges a status otherwise.
    #[must_use]
    pub fn status(self, status: StatusCode, outcome: Outcome) -> Self {
        let mut overrides = self.overrides.unwrap_or_default();
        Arc::make_mut(&mut overrides).push((status, outcome));
        Self {
            overrides: Some(overrides),
        }
    }

    /// Judges a 429. Default: [`Outcome::Ignored`]: a service that limits its callers is well, and one that is asked too much is
    /// no reason to ask it more. [`Outcome::Failure`] has a breaker leave it alone for a while, and an adaptive limiter slow down.
    #[must_use]
    pub fn rate_limited(self, outcome: Outcome) -> Self {
        self.status(StatusCode::TOO_MANY_REQUESTS, outcome)
    }

    fn outcome(&self, status: StatusCode) -> Outcome {
        let overrides = self.overrides.as_deref().map_or(&[][..], Vec::as_slice);
        match overrides.iter().rev().find(|(of, _)| *of == status) {
            Some((_, outcome)) => *outcome,
            None if status.is_server_error() => Outcome::Failure,
            None if status == StatusCode::TOO_MANY_REQUESTS => Outcome::Ignored,
            None => Outcome::Success,
        }
    }
}

impl Judge for HttpClassifier {
    /// Whether the response will have a body.
    type Seen = bool;
    type AtEnd = CleanEnd;

    fn see<B>(&self, request: &Request<B>) -> bool {
        asks_for_body(request.method())
    }

    fn head<B>(&self, has_body: bool, response: &Response<B>) -> Judged<CleanEnd> {
        let outcome = self.outcome(response.status());
        if outcome == Outcome::Success && has_body && may_have_body(response.status()) {
            return Judged::AtEnd(CleanEnd(()));
        }
        Judged::Now(Verdict {
            retry_after: retry_after(response),
            ..Verdict::new(outcome)
        })
    }
}

/// Whether the answer to such a request has a body. What follows the head of a `CONNECT` belongs to the tunnel: a server drops the
/// body unread.
pub(super) fn asks_for_body(method: &Method) -> bool {
    !matches!(*method, Method::HEAD | Method::CONNECT)
}

/// Whether an answer of this status has a body, if the request asks for one. A server drops one that should not be there unread.
pub(super) fn may_have_body(status: StatusCode) -> bool {
    !status.is_informational() && !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// A body that ends is a success: see [`HttpClassifier`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CleanEnd(());

impl JudgeEnd for CleanEnd {
    fn end(self, _: Option<&HeaderMap>) -> Verdict {
        Outcome::Success.into()
    }
}

/// The one value of a header field; nothing if there are several.
fn only(headers: &HeaderMap, name: impl AsHeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).into_iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

/// How many bytes the body has: as the head says, or else the body. A server stops after so many.
fn length<B: Body>(response: &Response<B>) -> Option<u64> {
    let announced = only(response.headers(), header::CONTENT_LENGTH).and_then(|length| length.parse().ok());
    announced.or_else(|| response.body().size_hint().exact())
}

/// `Retry-After` of a 429 or 503: seconds, or a date, which is told from the response's own `Date`: clocks differ.
pub(super) fn retry_after<B>(response: &Response<B>) -> Option<Duration> {
    if !matches!(
        response.status(),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        return None;
    }
    let headers = response.headers();
    let value = only(headers, header::RETRY_AFTER)?;
    if value.bytes().all(|byte| byte.is_ascii_digit()) {
        return value.parse().ok().map(Duration::from_secs);
    }
    let until = httpdate::parse_http_date(value).ok()?;
    let now = httpdate::parse_http_date(only(headers, header::DATE)?).ok()?;
    until.duration_since(now).ok()
}

/// Judges gRPC by the status in the head or in the trailers.
///
/// | the call ended with | counts as |
/// |---|---|
/// | 2 UNKNOWN, 4 `DEADLINE_EXCEEDED`, 13 INTERNAL, 14 UNAVAILABLE, 15 `DATA_LOSS` | failure |
/// | 8 `RESOURCE_EXHAUSTED` | as [`resource_exhausted`](Self::resource_exhausted) says: ignored by default |
/// | 1 CANCELLED | ignored |
/// | any other code, 0 OK among them | success |
/// | no status, or one that is no number | failure: the stream was cut off |
/// | an HTTP status other than 200 without a status | the code that gRPC maps it to |
/// | an error, a body that breaks off | failure |
/// | a rejection by another portcullis policy | ignored |
/// | a body that is dropped before its end | cancelled |
///
/// `grpc-retry-pushback-ms` goes to the breaker as `Retry-After` does, see [`HttpClassifier`]; so does the `Retry-After` of a 429 or
/// 503 without a gRPC status, as a proxy answers.
///
/// A request without a content type of gRPC (a health check, a browser's preflight, a page that is served beside the services) is
/// no gRPC call, and an answer without a `grpc-status` no failed one: a 5xx and a body that breaks off are failures, all else is a
/// success. So nobody opens the circuit by asking for a page. Where such an answer has no body the head is the end, as with
/// [`HttpClassifier`].
///
/// A gRPC-Web body carries its trailers as data, where they are not looked for: its clean end is a success. Put the layer inside
/// the one that translates gRPC-Web.
///
/// ```
/// use portcullis::{CircuitBreaker, CircuitBreakerLayer, GrpcClassifier, Outcome};
///
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let classifier = GrpcClassifier::new().code(10, Outcome::Failure).resource_exhausted(Outcome::Failure);
/// let layer = CircuitBreakerLayer::grpc(breaker).classify_with(classifier);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrpcClassifier {
    /// By code.
    outcomes: [Outcome; 17],
}

/// gRPC's codes that the classifier speaks of.
mod code {
    pub(super) const CANCELLED: usize = 1;
    pub(super) const UNKNOWN: usize = 2;
    pub(super) const DEADLINE_EXCEEDED: usize = 4;
    pub(super) const PERMISSION_DENIED: usize = 7;
    pub(super) const RESOURCE_EXHAUSTED: usize = 8;
    pub(super) const UNIMPLEMENTED: usize = 12;
    pub(super) const INTERNAL: usize = 13;
    pub(super) const UNAVAILABLE: usize = 14;
    pub(super) const DATA_LOSS: usize = 15;
    pub(super) const UNAUTHENTICATED: usize = 16;
}

impl Default for GrpcClassifier {
    fn default() -> Self {
        let mut outcomes = [Outcome::Success; 17];
        for failing in [
            code::UNKNOWN,
            code::DEADLINE_EXCEEDED,
            code::INTERNAL,
            code::UNAVAILABLE,
            code::DATA_LOSS,
        ] {
            outcomes[failing] = Outcome::Failure;
        }
        outcomes[code::CANCELLED] = Outcome::Ignored;
        outcomes[code::RESOURCE_EXHAUSTED] = Outcome::Ignored;
        Self { outcomes }
    }
}

impl GrpcClassifier {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Judges a code, 0 to 16, otherwise. gRPC has no others: one above 16 is read as 2 UNKNOWN, and to judge it here changes
    /// nothing.
    #[must_use]
    pub fn code(mut self, code: u8, outcome: Outcome) -> Self {
        if let Some(of) = self.outcomes.get_mut(usize::from(code)) {
            *of = outcome;
        }
        self
    }

    /// Judges `RESOURCE_EXHAUSTED`. Default: [`Outcome::Ignored`], for the reasons of
    /// [`HttpClassifier::rate_limited`].
    #[must_use]
    pub fn resource_exhausted(mut self, outcome: Outcome) -> Self {
        self.outcomes[code::RESOURCE_EXHAUSTED] = outcome;
        self
    }

    fn verdict(&self, code: usize, headers: Option<&HeaderMap>) -> Verdict {
        let outcome = self.outcomes.get(code).copied();
        let mut verdict = Verdict::new(outcome.unwrap_or(self.outcomes[code::UNKNOWN]));
        verdict.retry_after = headers.and_then(pushback);
        verdict
    }

    /// By the `grpc-status` in a head or in trailers, if there is one.
    fn by_status(&self, headers: &HeaderMap) -> Option<Verdict> {
        headers.get(STATUS)?;
        let code = only(headers, STATUS).and_then(number);
        Some(self.verdict(code.unwrap_or(code::UNKNOWN), Some(headers)))
    }
}

const STATUS: &str = "grpc-status";

/// A decimal number without a sign or leading zeros.
fn number<N: std::str::FromStr>(text: &str) -> Option<N> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

/// gRFC A6: milliseconds that fit in an `i32`; anything else says not to retry, which is no time.
fn pushback(headers: &HeaderMap) -> Option<Duration> {
    let ms: i32 = number(only(headers, "grpc-retry-pushback-ms")?)?;
    u64::try_from(ms).ok().map(Duration::from_millis)
}

/// gRPC's mapping of an HTTP status that came without a gRPC one.
fn code_of(status: StatusCode) -> usize {
    match status.as_u16() {
        400 => code::INTERNAL,
        401 => code::UNAUTHENTICATED,
        403 => code::PERMISSION_DENIED,
        404 => code::UNIMPLEMENTED,
        429 | 502..=504 => code::UNAVAILABLE,
        _ => code::UNKNOWN,
    }
}

impl Judge for GrpcClassifier {
    /// Whether it was a gRPC call, and whether the response will have a body.
    type Seen = (bool, bool);
    type AtEnd = GrpcEnd;

    fn see<B>(&self, request: &Request<B>) -> (bool, bool) {
        (is_grpc(request.headers()), asks_for_body(request.method()))
    }

    fn head<B>(&self, (is_call, has_body): (bool, bool), response: &Response<B>) -> Judged<GrpcEnd> {
        let headers = response.headers();
        if let Some(verdict) = self.by_status(headers) {
            return Judged::Now(verdict);
        }
        let failed = response.status().is_server_error() || is_call && response.status() != StatusCode::OK;
        if failed {
            let mut verdict = self.verdict(code_of(response.status()), Some(headers));
            // A proxy's answer, which speaks HTTP.
            verdict.retry_after = verdict.retry_after.or_else(|| retry_after(response));
            return Judged::Now(verdict);
        }
        let end = GrpcEnd {
            classifier: *self,
            needs_status: is_call && !is_web(headers),
        };
        // The status of a call is looked for wherever a body may be; others are judged as over HTTP.
        if is_call || has_body && may_have_body(response.status()) {
            Judged::AtEnd(end)
        } else {
            Judged::Now(end.end(None))
        }
    }
}

/// The status is in the trailers: see [`GrpcClassifier`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrpcEnd {
    classifier: GrpcClassifier,
    /// Whether the trailers must tell: not for those who speak no gRPC, nor for gRPC-Web, which has them in its bytes.
    needs_status: bool,
}

impl JudgeEnd for GrpcEnd {
    fn end(self, trailers: Option<&HeaderMap>) -> Verdict {
        match trailers.and_then(|trailers| self.classifier.by_status(trailers)) {
            Some(verdict) => verdict,
            None if self.needs_status => Outcome::Failure.into(),
            None => Outcome::Success.into(),
        }
    }

    /// Where the trailers must tell, they were still to come.
    fn complete(self) -> Option<Verdict> {
        (!self.needs_status).then(|| Outcome::Success.into())
    }
}

impl<P: Gate> GuardLayer<P, HttpClassifier, AsResponse> {
    /// A layer for HTTP with this policy: [`HttpClassifier`] judges, [`AsResponse`] answers rejected calls with 429 or 503. The
    /// inner service's error type stays as it is. For servers and clients.
    ///
    /// ```
    /// use axum::{Router, routing::get};
    /// use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
    /// use std::time::Duration;
    ///
    /// let limiter = RateLimiter::new("api", TokenBucket::new(100, Duration::from_secs(60)))?;
    /// let app: Router = Router::new()
    ///     .route("/search", get(async || "found"))
    ///     .layer(RateLimitLayer::http(limiter));
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    pub fn http(policy: P) -> Self {
        GuardLayer::new(policy).classify_with(HttpClassifier::new()).respond()
    }
}

impl<P: Gate> GuardLayer<P, GrpcClassifier, AsResponse> {
    /// A layer for gRPC with this policy: [`GrpcClassifier`] judges, [`AsResponse`] answers rejected calls with
    /// `RESOURCE_EXHAUSTED` or `UNAVAILABLE`. For servers and clients.
    ///
    /// ```
    /// use portcullis::{CircuitBreaker, CircuitBreakerLayer};
    /// use tonic::transport::Endpoint;
    /// use tower::ServiceBuilder;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
    /// let channel = Endpoint::from_static("http://127.0.0.1:50051").connect_lazy();
    /// let breaker = CircuitBreaker::builder("search").build()?;
    /// let guarded = ServiceBuilder::new().layer(CircuitBreakerLayer::grpc(breaker)).service(channel);
    /// // … goes into the `new` of a generated client.
    /// # let _ = guarded; Ok(()) }
    /// ```
    pub fn grpc(policy: P) -> Self {
        GuardLayer::new(policy).classify_with(GrpcClassifier::new()).respond()
    }
}
