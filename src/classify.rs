//! What counts as a failure: the classifier of a [`GuardLayer`](crate::GuardLayer) turns a call's result into a
//! [`Verdict`].
//!
//! - by default ([`ErrorsAreFailures`]) every error is a failure, except a rejection by another portcullis layer;
//! - a closure over `&Result<Response, Error>` ([`GuardLayer::classify`](crate::GuardLayer::classify)) says what it likes;
//! - a closure over `&Error` ([`GuardLayer::classify_error`](crate::GuardLayer::classify_error)) says which errors count;
#![cfg_attr(
    feature = "http",
    doc = "- [`HttpClassifier`](crate::HttpClassifier), [`GrpcClassifier`](crate::GrpcClassifier) and any other [`Judge`] look at the head of an HTTP response and at the end of its body."
)]

#[cfg(feature = "tower-http")]
pub use crate::http::TowerHttpEnd;
#[cfg(feature = "http")]
pub use crate::http::{CleanEnd, GrpcEnd, Judge, JudgeEnd, Judged};

use crate::{
    clock::Reading,
    permit::{Outcome, Permit, Verdict},
};
use std::any::Any;

/// Judges how a call ended. Sees the request before it goes out and the result when it is there; may keep the permit in the
/// response and settle it later.
///
/// Closures and [`ErrorsAreFailures`] implement it. For HTTP and gRPC implement `Judge` in its place (feature `http`): every judge is
/// a classifier.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not judge `{Res}` of `{Req}`",
    note = "the classifiers of `::http(…)` and `::grpc(…)` judge an `http::Response` whose body is an `http_body::Body`"
)]
pub trait Classify<Req, Res, Err> {
    /// What is kept of the request while the call runs.
    type Seen;
    /// The response as it leaves: the inner one, or the inner one with the permit in it.
    type Response<P: Permit>;

    /// Looks at a request that is about to go out.
    fn see(&self, request: &Req) -> Self::Seen;

    /// Judges a result: settles the permit, or puts it into the response.
    ///
    /// # Errors
    ///
    /// The call's own error, unchanged.
    fn finish<P: Permit>(
        seen: Self::Seen,
        result: Result<Res, Err>,
        permit: P,
        now: &Reading,
    ) -> Result<Self::Response<P>, Err>;

    /// [`finish`](Self::finish) where the permit lies. Default: takes it out, and asks that.
    ///
    /// # Errors
    ///
    /// The call's own error, unchanged.
    fn finish_in_place<P: Permit>(
        seen: Self::Seen,
        result: Result<Res, Err>,
        permit: &mut Option<P>,
        now: &Reading,
    ) -> Result<Self::Response<P>, Err>
    where
        Self: Sized,
    {
        let permit = permit.take().expect("a call ends once");
        Self::finish(seen, result, permit, now)
    }

    /// Judges an error from `poll_ready`, for which there was no request.
    fn unready(&self, error: Err) -> (Verdict, Err);
}

/// The default classifier: an error is a failure, and every response a success.
///
/// An HTTP response is a success whatever its status: to count a 503 as a failure, say so with
/// [`GuardLayer::classify`](crate::GuardLayer::classify).
///
/// An error that carries a [`Rejected`](crate::Rejected) of another portcullis policy is ignored: a local refusal is not the
/// service's failure. It is seen in a boxed error, an [`io::Error`](std::io::Error), an `Arc` and the like, and with the feature
/// `tonic` in a `tonic::Status`, however deep; inside an error type of your own, say so with
/// [`classify_error`](crate::GuardLayer::classify_error) and [`Rejected::find`](crate::Rejected::find).
///
/// ```
/// # use portcullis::{CircuitBreaker, CircuitBreakerLayer, ErrorsAreFailures};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let layer: CircuitBreakerLayer<ErrorsAreFailures> = CircuitBreakerLayer::new(breaker);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct ErrorsAreFailures;

// `Any` is `'static` and no more. Written as `'static`, rustc (1.95 at least) forgets between incremental builds how it judged the
// bound, and breaks off with "unstable fingerprints" once a guard is the fallback of another and their crate is edited.
impl<Req, Res, Err: Any> Classify<Req, Res, Err> for ErrorsAreFailures {
    type Seen = ();
    type Response<P: Permit> = Res;

    #[inline]
    fn see(&self, _: &Req) {}

    #[inline]
    fn finish<P: Permit>((): (), result: Result<Res, Err>, permit: P, now: &Reading) -> Result<Res, Err> {
        <Self as Classify<Req, Res, Err>>::finish_in_place((), result, &mut Some(permit), now)
    }

    #[expect(clippy::inline_always, reason = "what it is handed is moved once more else")]
    #[inline(always)]
    fn finish_in_place<P: Permit>(
        (): (),
        result: Result<Res, Err>,
        permit: &mut Option<P>,
        now: &Reading,
    ) -> Result<Res, Err> {
        // Taken apart, so that it need not lie in memory for the sake of an error that is looked at there.
        match result {
            Ok(response) => {
                P::settle_in_place(permit, Outcome::Success.into(), now);
                Ok(response)
            }
            Err(error) => {
                settle_error(&error, permit, now);
                Err(error)
            }
        }
    }

    fn unready(&self, error: Err) -> (Verdict, Err) {
        let result = Err::<(), Err>(error);
        let verdict = Outcome::of(&result).into();
        (verdict, error_of(result))
    }
}

/// Out of line, so that a success does not carry it along.
#[inline(never)]
fn settle_error<P: Permit, Err: Any>(error: &Err, permit: &mut Option<P>, now: &Reading) {
    P::settle_in_place(permit, Outcome::of_error(error).into(), now);
}

/// A classifier of the whole result: from [`GuardLayer::classify`](crate::GuardLayer::classify).
#[derive(Debug, Clone, Copy)]
pub struct ByResult<F>(pub(crate) F);

impl<F, V, Req, Res, Err> Classify<Req, Res, Err> for ByResult<F>
where
    F: Fn(&Result<Res, Err>) -> V + Clone,
    V: Into<Verdict>,
{
    type Seen = F;
    type Response<P: Permit> = Res;

    fn see(&self, _: &Req) -> F {
        self.0.clone()
    }

    #[inline]
    fn finish<P: Permit>(judge: F, result: Result<Res, Err>, permit: P, now: &Reading) -> Result<Res, Err> {
        <Self as Classify<Req, Res, Err>>::finish_in_place(judge, result, &mut Some(permit), now)
    }

    #[inline]
    fn finish_in_place<P: Permit>(
        judge: F,
        result: Result<Res, Err>,
        permit: &mut Option<P>,
        now: &Reading,
    ) -> Result<Res, Err> {
        P::settle_in_place(permit, judge(&result).into(), now);
        result
    }

    fn unready(&self, error: Err) -> (Verdict, Err) {
        let result = Err(error);
        let verdict = (self.0)(&result).into();
        (verdict, error_of(result))
    }
}

/// A classifier of errors alone; every response is a success. From
/// [`GuardLayer::classify_error`](crate::GuardLayer::classify_error).
#[derive(Debug, Clone, Copy)]
pub struct ByError<F>(pub(crate) F);

impl<F, V, Req, Res, Err> Classify<Req, Res, Err> for ByError<F>
where
    F: Fn(&Err) -> V + Clone,
    V: Into<Verdict>,
{
    type Seen = F;
    type Response<P: Permit> = Res;

    fn see(&self, _: &Req) -> F {
        self.0.clone()
    }

    #[inline]
    fn finish<P: Permit>(judge: F, result: Result<Res, Err>, permit: P, now: &Reading) -> Result<Res, Err> {
        <Self as Classify<Req, Res, Err>>::finish_in_place(judge, result, &mut Some(permit), now)
    }

    #[inline]
    fn finish_in_place<P: Permit>(
        judge: F,
        result: Result<Res, Err>,
        permit: &mut Option<P>,
        now: &Reading,
    ) -> Result<Res, Err> {
        let verdict = match &result {
            Ok(_) => Outcome::Success.into(),
            Err(error) => judge(error).into(),
        };
        P::settle_in_place(permit, verdict, now);
        result
    }

    fn unready(&self, error: Err) -> (Verdict, Err) {
        ((self.0)(&error).into(), error)
    }
}

fn error_of<T, E>(result: Result<T, E>) -> E {
    match result {
        Ok(_) => unreachable!("made of an error"),
        Err(error) => error,
    }
}
