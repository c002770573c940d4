//! What the caller gets instead of a call that was rejected: an error, an HTTP or gRPC answer, or another service's.
//!
//! - by default ([`AsError`]) the layer's error is a [`BoxError`], as in tower's own middleware, and
//!   [`Rejected::find`](crate::Rejected::find) tells a rejection from the inner service's errors;
//! - [`GuardLayer::fallback`](crate::GuardLayer::fallback) asks another service, which sees the request;
//! - [`GuardLayer::fallback_with`](crate::GuardLayer::fallback_with) asks a closure, which sees the request and the rejection.
//! - with the feature `http`, `GuardLayer::respond` answers over HTTP and gRPC: `AsResponse`.
//!
//! With a fallback or an answer the inner service's error type stays as it is.

#[cfg(feature = "http")]
pub use crate::http::{AnswerBody, AnswerFuture, Passing};

use crate::{
    clock::Reading,
    permit::Permit,
    rejected::{BoxError, Rejected},
};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_service::Service;

/// Answers for a call that was rejected. `Raw` is the inner service's response, `Res` what the classifier made of it.
///
/// [`AsError`], [`Fallback`] and [`FallbackWith`] implement it, and with the feature `http` `AsResponse`.
///
/// One of your own needs only what it reads; for an answer from a closure there is
/// [`fallback_with`](crate::GuardLayer::fallback_with):
///
/// ```
/// use portcullis::{CircuitBreaker, CircuitBreakerLayer, Rejected, reject::Reject};
/// use std::{convert::Infallible, future::{Ready, ready}};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// /// Nothing, in place of an answer.
/// #[derive(Clone)]
/// struct AsNone;
///
/// impl<Req, Raw, Res, Err> Reject<Req, Raw, Res, Err> for AsNone {
///     type Response = Option<Res>;
///     type Error = Err;
///     type Future = Ready<Result<Option<Res>, Err>>;
///     type Pass = ();
///     type Told = ();
///
///     fn reject(&self, _: Req, _: Rejected) -> Self::Future {
///         ready(Ok(None))
///     }
///
///     fn admitted(&self, _: &Req) {}
///
///     fn pass((): (), result: Result<Res, Err>) -> Result<Option<Res>, Err> {
///         result.map(Some)
///     }
///
///     fn error(error: Err) -> Err {
///         error
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let service = ServiceBuilder::new()
///     .layer(CircuitBreakerLayer::new(breaker.clone()).reject_with(AsNone))
///     .service(service_fn(async |question: u32| Ok::<_, Infallible>(question + 1)));
/// assert_eq!(service.clone().oneshot(41).await?, Some(42));
/// breaker.force_open();
/// assert_eq!(service.oneshot(41).await?, None);
/// # Ok(()) }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot answer a rejected `{Req}`",
    note = "by default a rejection is a `BoxError`, which the inner service's `{Err}` must turn into",
    note = "`.respond()`, `::http(…)` and `::grpc(…)` answer an `http::Request` with an `http::Response` whose body is an `http_body::Body`; a fallback must answer the same request with the same response"
)]
pub trait Reject<Req, Raw, Res, Err> {
    /// The response of the guarded service.
    type Response;
    /// The error of the guarded service.
    type Error;
    /// Comes to the answer.
    type Future: Future<Output = Result<Self::Response, Self::Error>>;

    /// What is kept of the request while an admitted call runs: in the response future, so it should be small.
    type Pass;
    /// The same once the call has ended, with what the permit tells.
    type Told: From<Self::Pass>;

    /// Answers a rejected request.
    fn reject(&self, request: Req, why: Rejected) -> Self::Future;

    /// Looks at a request that was admitted and is about to go out.
    fn admitted(&self, request: &Req) -> Self::Pass;

    /// Looks at the permit before it is settled: it tells the quotas of the limits that the call has passed. Default: does
    /// nothing.
    fn tell(told: &mut Self::Told, permit: &impl Permit, now: &Reading) {
        let _ = (told, permit, now);
    }

    /// Passes on the result of a call that was made.
    ///
    /// # Errors
    ///
    /// The inner service's error, as it is or boxed.
    fn pass(told: Self::Told, result: Result<Res, Err>) -> Result<Self::Response, Self::Error>;

    /// Passes on an error of the inner service's `poll_ready`.
    fn error(error: Err) -> Self::Error;
}

/// Rejections are errors, among the inner service's errors in a [`BoxError`].
///
/// ```
/// # use portcullis::{AsError, CircuitBreaker, CircuitBreakerLayer, ErrorsAreFailures, Rejected};
/// # use tower::{ServiceBuilder, ServiceExt, service_fn};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::ConfigError> {
/// let breaker = CircuitBreaker::builder("search").build()?;
/// breaker.force_open();
/// let service = ServiceBuilder::new()
///     .layer(CircuitBreakerLayer::new(breaker))
///     .service(service_fn(async |question: u32| Ok::<_, std::io::Error>(question + 1)));
/// let error = service.oneshot(1).await.unwrap_err();
/// assert_eq!(Rejected::find(&*error).unwrap().service, "search");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct AsError;

impl<Req, Raw, Res, Err: Into<BoxError>> Reject<Req, Raw, Res, Err> for AsError {
    type Response = Res;
    type Error = BoxError;
    type Future = Refusal<Res>;
    type Pass = ();
    type Told = ();

    #[inline]
    fn reject(&self, _: Req, why: Rejected) -> Self::Future {
        Refusal {
            why: Some(Box::new(why)),
            response: PhantomData,
        }
    }

    #[inline]
    fn admitted(&self, _: &Req) {}

    #[inline]
    fn pass((): (), result: Result<Res, Err>) -> Result<Res, BoxError> {
        result.map_err(Into::into)
    }

    fn error(error: Err) -> BoxError {
        error.into()
    }
}

/// The future of a rejection that is an error.
#[derive(Debug)]
#[must_use = "a call does nothing unless it is polled"]
pub struct Refusal<Res> {
    /// Boxed as the error will be: the future of every admitted call has room for it.
    why: Option<Box<Rejected>>,
    response: PhantomData<fn() -> Res>,
}

impl<Res> Future for Refusal<Res> {
    type Output = Result<Res, BoxError>;
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        let why = self.why.take().expect("polled after it was ready");
        Poll::Ready(Err(why))
    }
}

/// A plain response as the type that a guarded service answers with.
pub trait Lift<T>: Sized {
    /// Makes it that type.
    fn lift(plain: T) -> Self;
}

impl<T> Lift<T> for T {
    fn lift(plain: T) -> T {
        plain
    }
}

/// Another service answers instead: from [`GuardLayer::fallback`](crate::GuardLayer::fallback).
#[derive(Debug, Clone)]
pub struct Fallback<F>(pub(crate) F);

impl<F, Req, Raw, Res, Err> Reject<Req, Raw, Res, Err> for Fallback<F>
where
    F: Service<Req, Response = Raw> + Clone,
    F::Error: Into<Err>,
    Res: Lift<Raw>,
{
    type Response = Res;
    type Error = Err;
    type Future = FallbackFuture<F, Req, Res, Err>;
    type Pass = ();
    type Told = ();

    fn reject(&self, request: Req, _: Rejected) -> Self::Future {
        FallbackFuture {
            state: FallbackState::Readying {
                service: self.0.clone(),
                request: Some(request),
            },
            result: PhantomData,
        }
    }

    #[inline]
    fn admitted(&self, _: &Req) {}

    #[inline]
    fn pass((): (), result: Result<Res, Err>) -> Result<Res, Err> {
        result
    }

    fn error(error: Err) -> Err {
        error
    }
}

pin_project! {
    /// The future of a rejection that another service answers.
    #[must_use = "a call does nothing unless it is polled"]
    pub struct FallbackFuture<F: Service<Req>, Req, Res, Err> {
        #[pin]
        state: FallbackState<F, F::Future, Req>,
        result: PhantomData<fn() -> Result<Res, Err>>,
    }
}

pin_project! {
    #[project = FallbackProjection]
    enum FallbackState<F, Fut, Req> {
        Readying { service: F, request: Option<Req> },
        Called { #[pin] future: Fut },
    }
}

impl<F: Service<Req>, Req, Res, Err> fmt::Debug for FallbackFuture<F, Req, Res, Err> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FallbackFuture").finish_non_exhaustive()
    }
}

impl<F, Req, Res, Err> Future for FallbackFuture<F, Req, Res, Err>
where
    F: Service<Req>,
    F::Error: Into<Err>,
    Res: Lift<F::Response>,
{
    type Output = Result<Res, Err>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                FallbackProjection::Readying { service, request } => {
                    ready!(service.poll_ready(cx)).map_err(Into::into)?;
                    let request = request.take().expect("taken once, with the change of state");
                    let future = service.call(request);
                    state.set(FallbackState::Called { future });
                }
                FallbackProjection::Called { future } => {
                    return future.poll(cx).map(|result| result.map(Lift::lift).map_err(Into::into));
                }
            }
        }
    }
}

/// A closure answers instead: from [`GuardLayer::fallback_with`](crate::GuardLayer::fallback_with).
#[derive(Debug, Clone)]
pub struct FallbackWith<F>(pub(crate) F);

impl<F, Fut, Req, Raw, Res, Err> Reject<Req, Raw, Res, Err> for FallbackWith<F>
where
    F: Fn(Req, Rejected) -> Fut,
    Fut: Future<Output = Result<Raw, Err>>,
    Res: Lift<Raw>,
{
    type Response = Res;
    type Error = Err;
    type Future = FallbackWithFuture<Fut, Res>;
    type Pass = ();
    type Told = ();

    fn reject(&self, request: Req, why: Rejected) -> Self::Future {
        FallbackWithFuture {
            future: (self.0)(request, why),
            response: PhantomData,
        }
    }

    #[inline]
    fn admitted(&self, _: &Req) {}

    #[inline]
    fn pass((): (), result: Result<Res, Err>) -> Result<Res, Err> {
        result
    }

    fn error(error: Err) -> Err {
        error
    }
}

pin_project! {
    /// The future of a rejection that a closure answers.
    #[derive(Debug)]
    #[must_use = "a call does nothing unless it is polled"]
    pub struct FallbackWithFuture<Fut, Res> {
        #[pin]
        future: Fut,
        response: PhantomData<fn() -> Res>,
    }
}

impl<Fut, Raw, Res, Err> Future for FallbackWithFuture<Fut, Res>
where
    Fut: Future<Output = Result<Raw, Err>>,
    Res: Lift<Raw>,
{
    type Output = Result<Res, Err>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().future.poll(cx).map(|result| result.map(Lift::lift))
    }
}
