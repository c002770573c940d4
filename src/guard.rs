//! The one tower service of this crate: a [`Guard`] asks its policy, and its [`GuardLayer`] is what users configure.

use crate::{
    breaker::{CircuitBreaker, nobody},
    classify::{ByError, ByResult, Classify, ErrorsAreFailures},
    clock::Reading,
    limit::RateLimiter,
    permit::{Outcome, Verdict, Watch, failing_on_unwind},
    policy::{Admit, Gate, Glance, Hold, Policy, Readiness, Waiting},
    reject::{AsError, Fallback, FallbackWith, Reject},
    rejected::{Reason, Rejected},
};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    mem::ManuallyDrop,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tower_layer::Layer;
use tower_service::Service;

/// Guards a service with a policy: a circuit breaker, a rate limiter, or a pair of policies.
///
/// [`CircuitBreakerLayer`] and [`RateLimitLayer`] are this layer. Three parts, each with a default: the **policy** admits or
/// rejects, the **classifier** says what counts as a failure ([`classify`](Self::classify)), the **rejecter** says what a
/// rejected caller gets ([`fallback`](Self::fallback)).
///
/// Two policies as a pair are one layer: the clock is read once for both, each is asked before any gives, and what the first
/// took is returned if the second refuses.
///
/// ```
/// use portcullis::{CircuitBreaker, GuardLayer, RateLimiter, TokenBucket};
/// use std::time::Duration;
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
/// let limiter = RateLimiter::new("search", TokenBucket::new(100, Duration::from_secs(60)))?;
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let service = ServiceBuilder::new()
///     .layer(GuardLayer::new((limiter, breaker)))
///     .service(service_fn(async |question: u32| Ok::<_, std::io::Error>(question + 1)));
/// assert_eq!(service.oneshot(41).await?, 42);
/// # Ok(()) }
/// ```
///
/// # tower's contract
///
/// The instance that was readied is the one that is called. State lives behind the policy's handle, so it is shared by every
/// clone and by every service that the layer makes. A readied guard of a half-open circuit holds a probe's slot, its clones do
/// not; dropped, it gives the slot back. One that is called without having been readied, which tower forbids, asks its policy all
/// the same. While the policy refuses, the inner service is neither polled nor called. The future is
/// not boxed and is `Send` whenever the parts are; the inner service need not be `Clone` unless the layer
/// [waits](GuardLayer::wait). An error of the inner `poll_ready` is judged like an error of a call and passes on unchanged; a
/// panic there is a failure.
///
/// Two things follow from tower's readiness. A call that is rejected after the inner service became ready leaves that service
/// ready, with all that it reserved (a permit of `ConcurrencyLimit`, say), until the guard is called again or dropped: put such
/// layers outside the guard. And callers who already wait for the inner service to become ready are not woken by a circuit that
/// opens: they are rejected when the inner service wakes them.
#[derive(Debug, Clone)]
#[must_use = "a layer guards nothing until it is put around a service"]
pub struct GuardLayer<P, C = ErrorsAreFailures, R = AsError> {
    policy: P,
    classify: C,
    reject: R,
}

/// Stops calling a service that keeps failing: a [`GuardLayer`] with a [`CircuitBreaker`].
///
/// ```
/// use portcullis::{CircuitBreaker, CircuitBreakerLayer, Outcome};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
/// let breaker = CircuitBreaker::builder("search").failure_threshold(3).build()?;
/// let service = ServiceBuilder::new()
///     .layer(CircuitBreakerLayer::new(breaker).classify(|result: &Result<u16, _>| match result {
///         Ok(status) if *status < 500 => Outcome::Success,
///         _ => Outcome::Failure,
///     }))
///     .service(service_fn(async |_: ()| Ok::<u16, std::io::Error>(503)));
/// assert_eq!(service.oneshot(()).await?, 503, "an answer that counts as a failure");
/// # Ok(()) }
/// ```
///
/// # Mistakes that nobody reports
///
/// - [`new`](GuardLayer::new) over HTTP or gRPC: every answer is a success by default, a 503 too, and the circuit never opens.
#[cfg_attr(
    feature = "http",
    doc = "  [`http`](GuardLayer::http) and [`grpc`](GuardLayer::grpc) judge them."
)]
#[cfg_attr(
    not(feature = "http"),
    doc = "  With the feature `http`, `::http(…)` and `::grpc(…)` judge them."
)]
/// - A timeout outside the breaker drops the call, which is cancelled and ignored: it goes inside. A retry, a `LoadShed`, a `Buffer`
///   and a rate limiter go outside; the [README](crate#layer-order) says why, layer by layer.
/// - A breaker made for each request, clone or route remembers nothing: the layer may be made anew as often as one likes, the breaker
///   once. Two of one name share nothing.
/// - One breaker in two layers of a stack, or twice in a pair, counts each call twice, and a probe takes two slots.
pub type CircuitBreakerLayer<C = ErrorsAreFailures, R = AsError, P = CircuitBreaker> = GuardLayer<P, C, R>;

/// Limits how often a service is called: a [`GuardLayer`] with a [`RateLimiter`].
///
/// ```
/// use portcullis::{RateLimitLayer, RateLimiter, Rejected, TokenBucket};
/// use std::time::Duration;
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
/// let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(60)))?;
/// let service = ServiceBuilder::new()
///     .layer(RateLimitLayer::new(limiter))
///     .service(service_fn(async |question: u32| Ok::<_, std::io::Error>(question + 1)));
/// service.clone().oneshot(1).await?;
/// let error = service.oneshot(2).await.unwrap_err();
/// assert!(Rejected::find(&*error).unwrap().retry_after.is_some());
/// # Ok(()) }
/// ```
///
/// # Mistakes that nobody reports
///
/// - A limiter inside a breaker: its rejections may hold a probe's slot. It goes outside, or into a pair with the breaker, which
///   spends nothing while the circuit is open; see the [README](crate#layer-order).
/// - A limiter made for each request, clone or route limits nothing: the layer may be made anew as often as one likes, the limiter
///   once. Two of one name share nothing.
/// - One limiter in two layers of a stack, or twice in a pair, charges each call twice.
/// - A classifier on a token bucket or a sliding window: they do not ask how a call ended, only what it cost. An [`Adaptive`](crate::Adaptive)
///   limiter asks, and over HTTP and gRPC is told the truth by the same classifiers as a breaker.
pub type RateLimitLayer<C = ErrorsAreFailures, R = AsError, P = RateLimiter> = GuardLayer<P, C, R>;

impl<P: Gate> GuardLayer<P> {
    /// A layer with this policy, in which errors are failures and rejections are errors.
    ///
    /// Over HTTP and gRPC this is seldom what is meant: there a failure is an answer like others, and a success by this default.
    pub fn new(policy: P) -> Self {
        Self {
            policy,
            classify: ErrorsAreFailures,
            reject: AsError,
        }
    }
}

impl<P, C, R> GuardLayer<P, C, R> {
    /// Judges results with a closure: it returns an [`Outcome`](crate::Outcome), or a [`Verdict`] with more.
    ///
    /// A layer has one classifier, and the last one that is set is asked: this one takes the place of that of `::http` too.
    /// The closure also judges errors of the inner service's `poll_ready`. It must be `Clone`: each call keeps one. It replaces
    /// [`ErrorsAreFailures`] with all it knows: if a portcullis layer inside this one answers with errors, ignore those in which
    /// [`Rejected::find`] finds something.
    ///
    /// ```
    /// use axum::response::Response;
    /// # use portcullis::{CircuitBreaker, CircuitBreakerLayer, Outcome};
    /// # use std::io;
    ///
    /// # let breaker = CircuitBreaker::builder("search").build()?;
    /// let layer = CircuitBreakerLayer::new(breaker).classify(|result: &Result<Response, io::Error>| match result {
    ///     Ok(response) if !response.status().is_server_error() => Outcome::Success,
    ///     _ => Outcome::Failure,
    /// });
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    pub fn classify<F, V, Res, Err>(self, judge: F) -> GuardLayer<P, ByResult<F>, R>
    where
        F: Fn(&Result<Res, Err>) -> V + Clone,
        V: Into<Verdict>,
    {
        self.classify_with(ByResult(judge))
    }

    /// Judges errors with a closure; every response is a success. Other circuit breakers call it `expected_exception`.
    ///
    /// ```
    /// # use portcullis::{CircuitBreaker, CircuitBreakerLayer, Outcome};
    /// # use std::io;
    /// let breaker = CircuitBreaker::builder("files").build()?;
    /// let layer = CircuitBreakerLayer::new(breaker).classify_error(|error: &io::Error| match error.kind() {
    ///     io::ErrorKind::NotFound => Outcome::Ignored,
    ///     _ => Outcome::Failure,
    /// });
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    pub fn classify_error<F, V, Err>(self, judge: F) -> GuardLayer<P, ByError<F>, R>
    where
        F: Fn(&Err) -> V + Clone,
        V: Into<Verdict>,
    {
        self.classify_with(ByError(judge))
    }

    /// Judges results with a classifier type.
    ///
    /// ```
    /// # use portcullis::{CircuitBreaker, CircuitBreakerLayer, ErrorsAreFailures};
    /// # let breaker = CircuitBreaker::builder("search").build()?;
    /// let layer = CircuitBreakerLayer::new(breaker).classify_with(ErrorsAreFailures);
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    pub fn classify_with<C2>(self, classify: C2) -> GuardLayer<P, C2, R> {
        GuardLayer {
            policy: self.policy,
            classify,
            reject: self.reject,
        }
    }

    /// Has another service answer rejected requests. The inner service's error type stays as it is. A call that was made and
    /// failed is no rejection: its error goes to the caller.
    ///
    /// The fallback is cloned for each rejected request and may be guarded itself, and so on down to one that cannot fail.
    ///
    /// ```
    /// use portcullis::{CircuitBreaker, CircuitBreakerLayer};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder("search").build()?;
    /// breaker.force_open();
    /// let cached = service_fn(async |_: &str| Ok::<_, std::io::Error>("yesterday's answer"));
    /// let service = ServiceBuilder::new()
    ///     .layer(CircuitBreakerLayer::new(breaker).fallback(cached))
    ///     .service(service_fn(async |_: &str| Ok::<_, std::io::Error>("today's answer")));
    /// assert_eq!(service.oneshot("what is new?").await?, "yesterday's answer");
    /// # Ok(()) }
    /// ```
    pub fn fallback<F>(self, service: F) -> GuardLayer<P, C, Fallback<F>> {
        self.reject_with(Fallback(service))
    }

    /// Has a closure answer rejected requests: it sees the request and the [`Rejected`], and returns a future. The inner
    /// service's error type stays as it is.
    ///
    /// ```
    /// use portcullis::{CircuitBreaker, CircuitBreakerLayer};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder("search").build()?;
    /// breaker.force_open();
    /// let service = ServiceBuilder::new()
    ///     .layer(CircuitBreakerLayer::new(breaker).fallback_with(async |_: &str, why| Ok(why.to_string())))
    ///     .service(service_fn(async |_: &str| Ok::<_, std::io::Error>(String::from("an answer"))));
    /// let answer = service.oneshot("what is new?").await?;
    /// assert_eq!(answer, r#"circuit breaker "search" is forced open"#);
    /// # Ok(()) }
    /// ```
    pub fn fallback_with<F, Fut, Req>(self, answer: F) -> GuardLayer<P, C, FallbackWith<F>>
    where
        F: Fn(Req, Rejected) -> Fut,
        Fut: Future,
    {
        self.reject_with(FallbackWith(answer))
    }

    /// Answers rejected requests with a rejecter type.
    ///
    /// ```
    /// # use portcullis::{AsError, CircuitBreaker, CircuitBreakerLayer};
    /// # let breaker = CircuitBreaker::builder("search").build()?;
    /// let layer = CircuitBreakerLayer::new(breaker).reject_with(AsError);
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    pub fn reject_with<R2>(self, reject: R2) -> GuardLayer<P, C, R2> {
        GuardLayer {
            policy: self.policy,
            classify: self.classify,
            reject,
        }
    }
}

impl<P, C, R> GuardLayer<P, C, R> {
    /// The same layer with a policy made of this one's.
    pub(crate) fn map_policy<P2>(self, map: impl FnOnce(P) -> P2) -> GuardLayer<P2, C, R> {
        GuardLayer {
            policy: map(self.policy),
            classify: self.classify,
            reject: self.reject,
        }
    }
}

impl<L: Gate<Reserved = ()>, C, R> GuardLayer<L, C, R> {
    /// Lets calls wait their turn for up to `max_wait`, inside the response future, instead of rejecting them. A call that
    /// cannot be served in that time is rejected at once.
    ///
    /// The waiting call owns the readied inner service, so that must be `Clone`, and holds what its readiness reserved. Calls
    /// are served in order of arrival; a dropped call leaves the line.
    ///
    /// For a [`RateLimiter`](crate::RateLimiter), also one with a [`cost`](crate::RateLimiter::cost). Keyed limiters, limits by
    /// route and pairs do not wait: give the limiter that does a layer of its own.
    ///
    /// ```
    /// # use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// # use tower::{ServiceBuilder, ServiceExt, service_fn};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> Result<(), portcullis::BoxError> {
    /// let limiter = RateLimiter::new("search", TokenBucket::new(10, Duration::from_secs(1)).burst(1))?;
    /// let service = ServiceBuilder::new()
    ///     .layer(RateLimitLayer::new(limiter).wait(Duration::from_secs(5)))
    ///     .service(service_fn(async |question: u32| Ok::<_, std::io::Error>(question + 1)));
    /// for question in 0..30 {
    ///     service.clone().oneshot(question).await?; // ten a second
    /// }
    /// # Ok(()) }
    /// ```
    pub fn wait(self, max_wait: Duration) -> GuardLayer<Waiting<L>, C, R> {
        GuardLayer {
            policy: Waiting::new(self.policy, max_wait),
            classify: self.classify,
            reject: self.reject,
        }
    }
}

impl<S, P: Gate + Clone, C: Clone, R: Clone> Layer<S> for GuardLayer<P, C, R> {
    type Service = Guard<S, P, C, R>;

    fn layer(&self, inner: S) -> Self::Service {
        Guard {
            inner,
            ready: Ready::No,
            looked: None,
            refusal: None,
            layer: self.clone(),
        }
    }
}

/// A service behind a policy. Made by a [`GuardLayer`].
///
/// ```
/// use portcullis::{CircuitBreaker, CircuitBreakerLayer};
/// use tower::{Layer, service_fn};
///
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let inner = service_fn(async |question: u32| Ok::<_, std::io::Error>(question + 1));
/// let guard = CircuitBreakerLayer::new(breaker.clone()).layer(inner);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[must_use = "a service does nothing until it is called"]
pub struct Guard<S, P: Gate, C = ErrorsAreFailures, R = AsError> {
    inner: S,
    ready: Ready<P::Reserved>,
    /// Why the service is ready to reject, if a look at the policy was enough. Apart from `ready`, which moves with every call.
    looked: Option<Reason>,
    /// The same, if it was not.
    refusal: Option<Rejected>,
    layer: GuardLayer<P, C, R>,
}

/// What the last `poll_ready` found.
enum Ready<T> {
    /// Not asked since the last call, or the inner service is not ready yet.
    No,
    /// What is held while the inner service gets ready.
    Reserving(T),
    /// Ready, and the inner service is, too.
    Yes(T),
    /// Ready to reject, and `looked` or `refusal` says why: the inner service was not asked.
    Refused,
}

impl<T> Ready<T> {
    /// Takes the place of one that holds nothing, which so is not asked whether it does.
    #[inline]
    fn become_now(&mut self, next: Self) {
        debug_assert!(matches!(self, Self::No | Self::Refused), "nothing is held");
        std::mem::forget(std::mem::replace(self, next));
    }
}

/// What is held while the inner service is asked whether it is ready. Dropped, the service (or the judgement of its error) panicked:
/// a failure.
struct Readying<'a, P: Gate> {
    policy: &'a P,
    /// Dropped by [`Drop`] or by nobody: a place that nothing refers to need not be in memory.
    reserved: ManuallyDrop<Option<P::Reserved>>,
}

impl<P: Gate> Readying<'_, P> {
    #[inline]
    fn done(mut self) -> P::Reserved {
        let reserved = self.reserved.take();
        std::mem::forget(self);
        reserved.expect("there until then")
    }
}

impl<P: Gate> Drop for Readying<'_, P> {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        unready_unwinding(self.policy, self.reserved.take());
    }
}

#[cold]
#[inline(never)]
fn unready_unwinding<P: Gate>(policy: &P, reserved: Option<P::Reserved>) {
    if let Some(reserved) = reserved {
        policy.unready(reserved, Outcome::Failure.into(), &Reading::new());
    }
}

impl<S: Clone, P: Gate + Clone, C: Clone, R: Clone> Clone for Guard<S, P, C, R> {
    /// A clone is not ready: it holds nothing of what the original reserved.
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            ready: Ready::No,
            looked: None,
            refusal: None,
            layer: self.layer.clone(),
        }
    }
}

impl<S: fmt::Debug, P: Gate + fmt::Debug, C, R> fmt::Debug for Guard<S, P, C, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("policy", &self.layer.policy)
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl<S, P, C, R, Req> Service<Req> for Guard<S, P, C, R>
where
    S: Service<Req>,
    P: Policy<Req>,
    P::Wait: Hold<S, Req>,
    C: Classify<Req, S::Response, S::Error>,
    R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error> + Clone,
{
    type Response = R::Response;
    type Error = R::Error;
    type Future = ResponseFuture<S, Req, P, C, R>;

    #[expect(clippy::inline_always, reason = "else the caller is answered through memory")]
    #[inline(always)]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let now = Reading::new();
        let reserved = match std::mem::replace(&mut self.ready, Ready::No) {
            Ready::No | Ready::Refused => match self.layer.policy.ready_at_a_glance(&now) {
                Glance::Ready(reserved) => reserved,
                Glance::Refused(reason) => {
                    (self.ready, self.looked) = (Ready::Refused, Some(reason));
                    return Poll::Ready(Ok(()));
                }
                Glance::Unsure => match self.reserve(None, &now, cx) {
                    Ok(reserved) => reserved,
                    Err(asked) => return asked.map(Ok),
                },
            },
            Ready::Reserving(held) | Ready::Yes(held) => match self.reserve(Some(held), &now, cx) {
                Ok(reserved) => reserved,
                Err(asked) => return asked.map(Ok),
            },
        };
        let readying = Readying {
            policy: &self.layer.policy,
            reserved: ManuallyDrop::new(Some(reserved)),
        };
        match self.inner.poll_ready(cx) {
            Poll::Pending => {
                self.ready.become_now(Ready::Reserving(readying.done()));
                Poll::Pending
            }
            Poll::Ready(Ok(())) => {
                self.ready.become_now(Ready::Yes(readying.done()));
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => {
                let (verdict, error) = self.layer.classify.unready(error);
                let reserved = readying.done();
                self.layer.policy.unready(reserved, verdict, &now);
                Poll::Ready(Err(R::error(error)))
            }
        }
    }

    #[expect(clippy::inline_always, reason = "as `poll_ready`")]
    #[inline(always)]
    fn call(&mut self, request: Req) -> Self::Future {
        let now = Reading::new();
        let found = std::mem::replace(&mut self.ready, Ready::No);
        if let Ready::Yes(reserved) = &found
            && let Some(permit) = self.layer.policy.glance(reserved, &request, &now)
        {
            // What was reserved is dropped behind this: a permit that waited for that would lie in memory.
            self.make(permit, request)
        } else {
            self.call_otherwise(found, request, &now.again())
        }
    }
}

impl<P, C, R> GuardLayer<P, C, R> {
    #[inline]
    fn keep<S, Req>(&self, request: &Req) -> Kept<S, P, C, R, Req>
    where
        S: Service<Req>,
        P: Policy<Req>,
        C: Classify<Req, S::Response, S::Error>,
        R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error>,
    {
        (self.classify.see(request), self.reject.admitted(request))
    }
}

impl<S, P: Gate, C, R> Guard<S, P, C, R> {
    /// Asks the policy where a glance is not enough: what it reserves, or the answer of `poll_ready`.
    #[inline(never)]
    fn reserve(
        &mut self,
        held: Option<P::Reserved>,
        now: &Reading,
        cx: &mut Context<'_>,
    ) -> Result<P::Reserved, Poll<()>> {
        match self.layer.policy.reserve(held, now, cx) {
            Readiness::Ready(reserved) => Ok(reserved),
            Readiness::Pending(reserved) => {
                self.ready = Ready::Reserving(reserved);
                Err(Poll::Pending)
            }
            Readiness::Rejected(why) => {
                (self.ready, self.looked) = (Ready::Refused, None);
                self.refusal = Some(why);
                Err(Poll::Ready(()))
            }
        }
    }

    /// Makes a call that was admitted.
    #[inline]
    fn make<Req>(&mut self, permit: P::Permit, request: Req) -> ResponseFuture<S, Req, P, C, R>
    where
        S: Service<Req>,
        P: Policy<Req>,
        P::Wait: Hold<S, Req>,
        C: Classify<Req, S::Response, S::Error>,
        R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error>,
    {
        // Dropped by nobody else: the step ends or unwinds.
        let mut permit = ManuallyDrop::new(Some(permit));
        let beginning = failing_on_unwind(&mut permit);
        let mut future = self.begin(request);
        beginning.done();
        if let State::Called { call } = &mut future.state {
            call.watch.hold(permit.take());
        }
        future
    }

    /// Makes a call whose permit is still with the caller. Out of line and without it, so that there is nothing here to drop when the
    /// inner service panics: then the inner future is written to its place at once. Moved there in one piece right after it was
    /// written in several, it would wait for the writes to reach the cache.
    #[inline(never)]
    fn begin<Req>(&mut self, request: Req) -> ResponseFuture<S, Req, P, C, R>
    where
        S: Service<Req>,
        P: Policy<Req>,
        P::Wait: Hold<S, Req>,
        C: Classify<Req, S::Response, S::Error>,
        R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error>,
    {
        let kept = self.layer.keep::<S, Req>(&request);
        ResponseFuture {
            state: State::Called {
                call: Call {
                    watch: Watch::unheld(self.inner.call(request)),
                    kept: Some(kept),
                },
            },
        }
    }

    /// Goes on with a call that a glance did not admit: mostly it is refused, here or when its service was readied. And with one
    /// whose service is not ready. Out of line, for it shares nothing with others.
    #[inline(never)]
    fn call_otherwise<Req>(
        &mut self,
        found: Ready<P::Reserved>,
        request: Req,
        now: &Reading,
    ) -> ResponseFuture<S, Req, P, C, R>
    where
        S: Service<Req>,
        P: Policy<Req>,
        P::Wait: Hold<S, Req>,
        C: Classify<Req, S::Response, S::Error>,
        R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error> + Clone,
    {
        let admit = match found {
            Ready::Refused => {
                let future = self.refuse(request);
                return ResponseFuture {
                    state: State::Rejected { future },
                };
            }
            Ready::Yes(reserved) => {
                let policy = &self.layer.policy;
                if let Some(refusing) = policy.refuse_at_a_glance(Some(&reserved), &request, now) {
                    return self.reject(request, refusing.reject());
                }
                policy.admit(reserved, &request, now)
            }
            Ready::Reserving(reserved) => self.admit(Some(reserved), &request, now),
            Ready::No => self.admit(None, &request, now),
        };
        self.go_on(admit, request)
    }

    /// Makes a call that was admitted, waits with one that may be, and rejects the others.
    fn go_on<Req>(&mut self, admit: Admit<P::Permit, P::Wait>, request: Req) -> ResponseFuture<S, Req, P, C, R>
    where
        S: Service<Req>,
        P: Policy<Req>,
        P::Wait: Hold<S, Req>,
        C: Classify<Req, S::Response, S::Error>,
        R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error> + Clone,
    {
        match admit {
            Admit::Now(permit) => self.make(permit, request),
            Admit::Later(wait) => ResponseFuture {
                state: State::Waiting {
                    kept: Some(self.layer.keep::<S, Req>(&request)),
                    held: Some(wait.hold(&mut self.inner, request)),
                    wait,
                    reject: self.layer.reject.clone(),
                },
            },
            Admit::Rejected(why) => self.reject(request, why),
        }
    }

    #[inline]
    fn reject<Req>(&self, request: Req, why: Rejected) -> ResponseFuture<S, Req, P, C, R>
    where
        S: Service<Req>,
        P: Policy<Req>,
        P::Wait: Hold<S, Req>,
        C: Classify<Req, S::Response, S::Error>,
        R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error>,
    {
        ResponseFuture {
            state: State::Rejected {
                future: self.layer.reject.reject(request, why),
            },
        }
    }

    /// Rejects a call that the last `poll_ready` was ready to reject: as it is now, not as it was then. Out of line, for it shares nothing
    /// with others.
    #[inline(never)]
    fn refuse<Req>(&mut self, request: Req) -> R::Future
    where
        S: Service<Req>,
        P: Policy<Req>,
        P::Wait: Hold<S, Req>,
        C: Classify<Req, S::Response, S::Error>,
        R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error>,
    {
        let now = Reading::new();
        // Of a pair that refused otherwise, the one that would be asked here need not be the one that did.
        if self.looked.is_some()
            && let Some(refusing) = self.layer.policy.refuse_at_a_glance(None, &request, &now)
        {
            return self.layer.reject.reject(request, refusing.reject());
        }
        let why = self.refusal(&now);
        self.layer.reject.reject(request, why)
    }

    /// The same where it takes more than a look, or the policy refuses no more.
    #[cold]
    #[inline(never)]
    fn refusal(&mut self, now: &Reading) -> Rejected {
        let policy = &self.layer.policy;
        let told = self.refusal.take();
        let why = match policy.reserve(None, now, &mut Context::from_waker(nobody())) {
            Readiness::Rejected(why) => why,
            Readiness::Ready(_) | Readiness::Pending(_) => match self.looked {
                Some(reason) => policy.lapsed(reason),
                None => told.expect("told in `poll_ready`").due(),
            },
        };
        policy.count(&why, now);
        why
    }

    /// Asks the policy for a call whose service is not ready, which tower forbids: the inner service will say so, but the policy holds.
    #[cold]
    #[inline(never)]
    fn admit<Req>(&self, held: Option<P::Reserved>, request: &Req, now: &Reading) -> Admit<P::Permit, P::Wait>
    where
        P: Policy<Req>,
    {
        let policy = &self.layer.policy;
        let reserved = match held {
            Some(reserved) => Readiness::Ready(reserved),
            None => policy.reserve(None, now, &mut Context::from_waker(nobody())),
        };
        match reserved {
            Readiness::Ready(reserved) | Readiness::Pending(reserved) => policy.admit(reserved, request, now),
            Readiness::Rejected(why) => {
                policy.count(&why, now);
                Admit::Rejected(why)
            }
        }
    }
}

/// What the classifier and the rejecter keep of a request while its call runs.
type Kept<S, P, C, R, Req> = (
    Seen<S, C, Req>,
    <R as Reject<
        Req,
        <S as Service<Req>>::Response,
        <C as Classify<Req, <S as Service<Req>>::Response, <S as Service<Req>>::Error>>::Response<
            <P as Policy<Req>>::Permit,
        >,
        <S as Service<Req>>::Error,
    >>::Pass,
);
type Seen<S, C, Req> = <C as Classify<Req, <S as Service<Req>>::Response, <S as Service<Req>>::Error>>::Seen;

pin_project! {
    /// The future of a guarded call. It owns the permit: dropped, the call was cancelled.
    #[must_use = "a call does nothing unless it is polled"]
    pub struct ResponseFuture<S, Req, P, C, R>
    where
        S: Service<Req>,
        P: Policy<Req>,
        P::Wait: Hold<S, Req>,
        C: Classify<Req, S::Response, S::Error>,
        R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error>,
    {
        #[pin]
        state: State<S::Future, P::Permit, Kept<S, P, C, R, Req>, P::Wait, <P::Wait as Hold<S, Req>>::Held, R, R::Future>,
    }
}

pin_project! {
    /// A call that was made, and what is kept of its request.
    struct Call<F, P: crate::permit::Permit, K> {
        #[pin]
        watch: Watch<F, P>,
        kept: Option<K>,
    }
}

pin_project! {
    #[project = Projection]
    enum State<F, P: crate::permit::Permit, K, W, H, R, RF> {
        Called { #[pin] call: Call<F, P, K> },
        Waiting { #[pin] wait: W, held: Option<H>, kept: Option<K>, reject: R },
        Rejected { #[pin] future: RF },
    }
}

impl<S, Req, P, C, R> fmt::Debug for ResponseFuture<S, Req, P, C, R>
where
    S: Service<Req>,
    P: Policy<Req>,
    P::Wait: Hold<S, Req>,
    C: Classify<Req, S::Response, S::Error>,
    R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Called { .. } => "called",
            State::Waiting { .. } => "waiting",
            State::Rejected { .. } => "rejected",
        };
        f.debug_tuple("ResponseFuture").field(&state).finish()
    }
}

impl<S, Req, P, C, R> Future for ResponseFuture<S, Req, P, C, R>
where
    S: Service<Req>,
    P: Policy<Req>,
    P::Wait: Hold<S, Req>,
    C: Classify<Req, S::Response, S::Error>,
    R: Reject<Req, S::Response, C::Response<P::Permit>, S::Error>,
{
    type Output = Result<R::Response, R::Error>;

    #[inline(always)]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        const ONCE: &str = "polled after it was ready";
        let mut state = self.project().state;
        loop {
            let next = match state.as_mut().project() {
                Projection::Called { call } => {
                    let call = call.project();
                    let (result, permit) = ready!(call.watch.poll(cx));
                    let (seen, pass) = call.kept.take().expect(ONCE);
                    let mut told = pass.into();
                    let now = Reading::new();
                    let mut ending = failing_on_unwind(permit);
                    if let Some(permit) = ending.permit() {
                        R::tell(&mut told, permit, &now);
                    }
                    let result = C::finish_in_place(seen, result, ending.permit(), &now);
                    ending.done();
                    return Poll::Ready(R::pass(told, result));
                }
                Projection::Waiting {
                    wait,
                    held,
                    kept,
                    reject,
                } => {
                    let admitted = ready!(wait.poll(cx));
                    let held = held.take().expect(ONCE);
                    match admitted {
                        Ok(permit) => State::Called {
                            call: Call {
                                watch: Watch::start(permit, || P::Wait::call(held)),
                                kept: kept.take(),
                            },
                        },
                        Err(why) => State::Rejected {
                            future: reject.reject(P::Wait::request(held), why),
                        },
                    }
                }
                Projection::Rejected { future } => return future.poll(cx),
            };
            state.set(next);
        }
    }
}
