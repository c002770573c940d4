//! An HTTP or gRPC answer in place of a rejected call.

use super::{
    grpc,
    problem::{PROBLEM_JSON, Problem},
    ratelimit::{RateLimitHeaders, decimal},
    told,
};
use crate::{
    GuardLayer,
    clock::{Reading, since_1970},
    permit::Permit,
    quota::{Quota, whole_seconds},
    reject::Reject,
    rejected::Rejected,
};
use bytes::{Bytes, BytesMut};
use http::{
    HeaderValue, Method, Request, Response,
    header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER},
};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

/// Rejections are answers: 429 and 503 over HTTP, `RESOURCE_EXHAUSTED` and `UNAVAILABLE` over gRPC. The inner service's error
/// type stays as it is, so axum needs no `HandleErrorLayer`.
///
/// From [`GuardLayer::respond`]. What a rejected caller gets:
///
/// | | a limit refused | a circuit or another policy refused | [`MissingKey`](crate::Reason::MissingKey) |
/// |---|---|---|---|
/// | HTTP status | 429 | 503 | 400 |
/// | body | problem `quota-exceeded` | problem `temporary-reduced-capacity` | problem `about:blank` |
/// | gRPC status | 8 | 14 | 3 |
///
/// Over HTTP: `application/problem+json` (RFC 9457) with the rejection's text as `detail`, the exact wait as `retry-after-ms`,
/// `violated-policies`, and of a circuit `circuit` and `circuit-state`; `Cache-Control: no-store`; `Retry-After` in whole seconds
/// if the time is known and a wait helps, which it does not where the cost is above the burst. The answer to a `HEAD` has no body.
///
/// A request whose `content-type` begins with `application/grpc` is answered in gRPC's Trailers-Only form, with the details
/// `RetryInfo`, `QuotaFailure` and `ErrorInfo`, and with `grpc-retry-pushback-ms`: -1 where no retry helps.
///
/// Admitted answers are told their limits as well, see [`RateLimitHeaders`]; gRPC's in the header frame. A rejection carries
/// the [`Rejected`] in its extensions.
///
/// ```
/// use portcullis::{AsResponse, CircuitBreaker, CircuitBreakerLayer, Rejected};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let breaker = CircuitBreaker::builder("search").build()?;
/// breaker.force_open();
/// let service = ServiceBuilder::new()
///     .layer(CircuitBreakerLayer::new(breaker).reject_with(AsResponse::new()))
///     .service(service_fn(async |_: http::Request<()>| Ok::<_, std::io::Error>(http::Response::new(()))));
/// let response = service.oneshot(http::Request::new(())).await?;
/// assert_eq!(response.status(), 503);
/// assert_eq!(response.headers()["content-type"], "application/problem+json");
/// assert!(response.extensions().get::<Rejected>().is_some());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct AsResponse {
    headers: RateLimitHeaders,
}

impl AsResponse {
    /// Answers with the rate-limit headers of [draft 11](RateLimitHeaders::Draft11).
    #[must_use]
    pub const fn new() -> Self {
        Self {
            headers: RateLimitHeaders::Draft11,
        }
    }

    /// Writes the rate-limit headers in another form, or none.
    ///
    /// ```
    /// # use portcullis::{AsResponse, RateLimitHeaders};
    /// let silent = AsResponse::new().headers(RateLimitHeaders::Off);
    /// ```
    #[must_use]
    pub const fn headers(mut self, form: RateLimitHeaders) -> Self {
        self.headers = form;
        self
    }
}

impl<P, C, R> GuardLayer<P, C, R> {
    /// Answers rejected requests over HTTP or gRPC: see [`AsResponse`]. The inner service's error type stays as it is.
    ///
    /// ```
    /// use axum::{Router, routing::get};
    /// use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
    /// use std::time::Duration;
    ///
    /// let limiter = RateLimiter::new("search", TokenBucket::new(100, Duration::from_secs(60)))?;
    /// let app: Router = Router::new()
    ///     .route("/search", get(async || "an answer"))
    ///     .layer(RateLimitLayer::new(limiter).respond());
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    #[cfg_attr(docsrs, doc(cfg(feature = "http")))]
    pub fn respond(self) -> GuardLayer<P, C, AsResponse> {
        self.reject_with(AsResponse::new())
    }
}

impl<P, C> GuardLayer<P, C, AsResponse> {
    /// Writes the rate-limit headers in another form, or none.
    ///
    /// ```
    /// # use portcullis::{GuardLayer, RateLimiter, RateLimitHeaders, TokenBucket};
    /// # use std::time::Duration;
    /// # let limiter = RateLimiter::new("search", TokenBucket::new(100, Duration::from_secs(60)))?;
    /// let layer = GuardLayer::new(limiter).respond().headers(RateLimitHeaders::XRateLimitDelta);
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    #[cfg_attr(docsrs, doc(cfg(feature = "http")))]
    pub fn headers(self, form: RateLimitHeaders) -> Self {
        self.reject_with(AsResponse::new().headers(form))
    }
}

impl Rejected {
    /// The rejection as an HTTP response, for a handler that answers by itself: what [`AsResponse`] answers, with the
    /// rate-limit headers of draft 11.
    ///
    /// ```
    /// # use portcullis::{RateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// let limiter = RateLimiter::new("mails", TokenBucket::new(1, Duration::from_secs(60)))?;
    /// limiter.try_acquire()?;
    /// let response = limiter.try_acquire().unwrap_err().to_response();
    /// assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (429, &"60".parse()?));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg_attr(docsrs, doc(cfg(feature = "http")))]
    #[must_use]
    pub fn to_response(&self) -> Response<Full<Bytes>> {
        AsResponse::new().problem(self.clone()).map(Full::new)
    }

    /// The rejection as gRPC's Trailers-Only response, of which the body is empty.
    ///
    /// ```
    /// # use portcullis::CircuitBreaker;
    /// let breaker = CircuitBreaker::builder("search").build()?;
    /// breaker.force_open();
    /// let response = breaker.try_acquire().unwrap_err().to_grpc_response();
    /// assert_eq!(response.status(), 200);
    /// assert_eq!(response.headers()["grpc-status"], "14");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg_attr(docsrs, doc(cfg(feature = "http")))]
    #[must_use]
    pub fn to_grpc_response(&self) -> Response<Full<Bytes>> {
        AsResponse::new()
            .trailers_only(self.clone(), grpc::plain_content_type())
            .map(Full::new)
    }
}

impl AsResponse {
    fn problem(self, why: Rejected) -> Response<Bytes> {
        // Room for the body and for all header values: they share one buffer.
        let mut text = BytesMut::with_capacity(768);
        let (status, problem) = Problem::of(&why);
        problem.write(&mut text);
        let body = text.split().freeze();
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        headers.insert(CONTENT_LENGTH, number(&mut text, body.len() as u64));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(wait) = told::wait_seconds(&why) {
            headers.insert(RETRY_AFTER, number(&mut text, wait));
        }
        self.finish(response.map(|_| body), text, why)
    }

    fn trailers_only(self, why: Rejected, content_type: HeaderValue) -> Response<Bytes> {
        let mut response = Response::new(Bytes::new());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, content_type);
        grpc::write(headers, &why);
        self.finish(response, BytesMut::new(), why)
    }

    fn finish(self, mut response: Response<Bytes>, mut text: BytesMut, why: Rejected) -> Response<Bytes> {
        if let Some(quota) = self.tells().then(|| why.quota()).flatten() {
            text.reserve(RateLimitHeaders::room(&quota));
            self.write_quota(&mut text, &quota, told::wait_seconds(&why));
            self.headers.add(response.headers_mut(), text);
        }
        response.extensions_mut().insert(why);
        response
    }

    fn tells(self) -> bool {
        self.headers != RateLimitHeaders::Off
    }

    fn write_quota(self, text: &mut BytesMut, quota: &Quota, reset: Option<u64>) {
        let unix_now = match self.headers {
            RateLimitHeaders::XRateLimitEpoch => since_1970(),
            _ => Duration::ZERO,
        };
        self.headers.write(text, quota, reset, unix_now);
    }
}

/// A number as a header value, in the buffer.
fn number(text: &mut BytesMut, number: u64) -> HeaderValue {
    decimal(text, number);
    HeaderValue::from_maybe_shared(text.split().freeze()).expect("digits")
}

impl<Req, Raw, B, Err> Reject<Request<Req>, Raw, Response<B>, Err> for AsResponse {
    type Response = Response<AnswerBody<B>>;
    type Error = Err;
    type Future = AnswerFuture<B, Err>;
    type Pass = Self;
    type Told = Passing;

    fn reject(&self, request: Request<Req>, why: Rejected) -> Self::Future {
        let form = match grpc::content_type(request.headers()) {
            Some(content_type) => Form::TrailersOnly(Box::new(content_type)),
            None if *request.method() == Method::HEAD => Form::Head,
            None => Form::Problem,
        };
        let answer = Answer { of: *self, form, why };
        AnswerFuture {
            answer: Some(answer),
            result: PhantomData,
        }
    }

    fn admitted(&self, _: &Request<Req>) -> Self {
        *self
    }

    fn tell(passing: &mut Passing, permit: &impl Permit, now: &Reading) {
        if passing.answer.tells() {
            let Passing { answer, told } = passing;
            permit.quotas(now, &mut |quota| {
                told.reserve(RateLimitHeaders::room(&quota));
                let reset = whole_seconds(quota.reset).as_secs();
                answer.write_quota(told, &quota, Some(reset));
            });
        }
    }

    fn pass(Passing { answer, told }: Passing, result: Result<Response<B>, Err>) -> Result<Self::Response, Err> {
        let mut response = result?.map(AnswerBody::inner);
        answer.headers.add(response.headers_mut(), told);
        Ok(response)
    }

    fn error(error: Err) -> Err {
        error
    }
}

/// What goes into the headers of an admitted call's answer.
#[derive(Debug)]
pub struct Passing {
    answer: AsResponse,
    /// The quotas, as text.
    told: BytesMut,
}

impl From<AsResponse> for Passing {
    fn from(answer: AsResponse) -> Self {
        let told = BytesMut::new();
        Self { answer, told }
    }
}

/// The future of a rejection that is an answer: it is ready at once.
#[must_use = "a call does nothing unless it is polled"]
pub struct AnswerFuture<B, Err> {
    answer: Option<Answer>,
    result: PhantomData<fn() -> Result<B, Err>>,
}

/// All that an answer is made of. Made when it is asked for: the future of every admitted call has room for it, and a response is
/// larger.
#[derive(Debug)]
struct Answer {
    of: AsResponse,
    form: Form,
    why: Rejected,
}

#[derive(Debug)]
enum Form {
    Problem,
    Head,
    /// gRPC, with the content type to answer with.
    TrailersOnly(Box<HeaderValue>),
}

impl Answer {
    fn response(self) -> Response<Bytes> {
        let Self { of, form, why } = self;
        match form {
            Form::Problem => of.problem(why),
            // The headers of a GET, its length included, and no body.
            Form::Head => of.problem(why).map(|_| Bytes::new()),
            Form::TrailersOnly(content_type) => of.trailers_only(why, *content_type),
        }
    }
}

impl<B, Err> fmt::Debug for AnswerFuture<B, Err> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AnswerFuture").field(&self.answer).finish()
    }
}

impl<B, Err> Future for AnswerFuture<B, Err> {
    type Output = Result<Response<AnswerBody<B>>, Err>;
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = self.answer.take().expect("polled after it was ready");
        Poll::Ready(Ok(answer.response().map(AnswerBody::own)))
    }
}

pin_project! {
    /// The body of an answer behind [`AsResponse`]: the inner service's, or that of a rejection.
    ///
    /// As a [`Body`] it takes its data and error types from the inner body, and passes its frames, trailers and sizes on. The
    /// inner body's data must be of a type that can be made of [`Bytes`]: that is all that is asked of it. The default is empty.
    #[derive(Debug)]
    pub struct AnswerBody<B> {
        #[pin]
        source: Source<B>,
    }
}

pin_project! {
    #[derive(Debug)]
    #[project = SourceProjection]
    enum Source<B> {
        Inner { #[pin] body: B },
        // `None` once it is read, or if there is nothing to read.
        Own { bytes: Option<Bytes> },
    }
}

impl<B> AnswerBody<B> {
    fn inner(body: B) -> Self {
        let source = Source::Inner { body };
        Self { source }
    }

    fn own(bytes: Bytes) -> Self {
        let bytes = Some(bytes).filter(|bytes| !bytes.is_empty());
        let source = Source::Own { bytes };
        Self { source }
    }
}

impl<B> Default for AnswerBody<B> {
    fn default() -> Self {
        Self::own(Bytes::new())
    }
}

impl<B> Body for AnswerBody<B>
where
    B: Body,
    B::Data: From<Bytes>,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        match self.project().source.project() {
            SourceProjection::Inner { body } => body.poll_frame(cx),
            SourceProjection::Own { bytes } => {
                let frame = bytes.take().map(|bytes| Ok(Frame::data(bytes.into())));
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Inner { body } => body.is_end_stream(),
            Source::Own { bytes } => bytes.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Inner { body } => body.size_hint(),
            Source::Own { bytes } => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
        }
    }
}
