//! A breaker that is not ready while it refuses.

use super::{Admit, Gate, Never, Policy, Readiness, Reading};
use crate::{
    breaker::{CircuitBreaker, CircuitBreakerPermit, Standby},
    guard::GuardLayer,
    permit::Verdict,
    rejected::Rejected,
};
use std::task::Context;

/// A circuit breaker that makes its service wait to be ready instead of rejecting: from
/// [`GuardLayer::not_ready`], or by itself in a pair.
///
/// ```
/// use portcullis::{CircuitBreaker, GuardLayer, RateLimiter, TokenBucket, policy::NotReady};
/// # use std::time::Duration;
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let limiter = RateLimiter::new("search", TokenBucket::new(100, Duration::from_secs(60)))?;
/// let layer = GuardLayer::new((limiter, NotReady::new(breaker)));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a policy guards nothing until it is put into a layer"]
pub struct NotReady {
    breaker: CircuitBreaker,
}

impl NotReady {
    /// The breaker as such a policy.
    pub fn new(breaker: CircuitBreaker) -> Self {
        Self { breaker }
    }
}

impl<C, R> GuardLayer<CircuitBreaker, C, R> {
    /// Makes the service wait to be ready while its circuit refuses, instead of being ready to reject: for the endpoints of a
    /// balancer.
    ///
    /// A balancer sends calls to the endpoint with the least load, and nothing carries less load than one that rejects at once.
    /// This one takes no call while its circuit is open, forced open, or half-open with all its probes taken. It is ready again
    /// when the circuit closes, is reset or overridden, when a probe's slot becomes free, and when the open time ends: then it
    /// holds a probe's slot, and the balancer's next calls probe it.
    ///
    /// Callers wait, so something else must bound the wait: other endpoints, or a `LoadShed` around the balancer (a `Timeout`
    /// does not, it begins with the call). A circuit that is forced open keeps them waiting until somebody resets it. A call
    /// that was promised nothing (the circuit opened since the service was readied) is rejected as ever.
    /// An inner service that was ready when the circuit opened stays ready, with all that it reserved (a permit of a shared
    /// `ConcurrencyLimit`, say), while this one waits.
    ///
    /// The end of the open time is awaited with tokio's timer, inside a runtime, unless the breaker's clock is a
    /// [`ManualClock`](crate::ManualClock). A closed circuit costs what it costs otherwise; a waiting service costs two short
    /// locks for each look, a waker and a timer.
    ///
    /// ```
    /// use portcullis::{CircuitBreaker, CircuitBreakerLayer};
    /// use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
    /// let breaker = CircuitBreaker::builder("search").build()?;
    /// breaker.force_open();
    /// let mut service = ServiceBuilder::new()
    ///     .layer(CircuitBreakerLayer::new(breaker.clone()).not_ready())
    ///     .service(service_fn(async |question: u32| Ok::<_, std::io::Error>(question + 1)));
    /// let operator = async { breaker.reset() };
    /// let (ready, ()) = tokio::join!(service.ready(), operator);
    /// assert_eq!(ready?.call(41).await?, 42);
    /// # Ok(()) }
    /// ```
    pub fn not_ready(self) -> GuardLayer<NotReady, C, R> {
        self.map_policy(NotReady::new)
    }
}

impl Gate for NotReady {
    type Reserved = Standby;

    fn reserve(&self, held: Option<Standby>, now: &Reading, cx: &mut Context<'_>) -> Readiness<Standby> {
        match self.breaker.stand_by(held, now, cx) {
            Ok(ready) => Readiness::Ready(ready),
            Err(waiting) => Readiness::Pending(waiting),
        }
    }

    fn look(&self, _: &Reading) -> Readiness<Standby> {
        Readiness::Ready(Standby::default())
    }

    fn count(&self, why: &Rejected, now: &Reading) -> bool {
        Gate::count(&self.breaker, why, now)
    }

    fn unready(&self, reserved: Standby, verdict: Verdict, now: &Reading) {
        Gate::unready(&self.breaker, reserved.into_reservation(), verdict, now);
    }
}

impl<Req> Policy<Req> for NotReady {
    type Permit = CircuitBreakerPermit;
    type Wait = Never<CircuitBreakerPermit>;

    fn refusal(&self, reserved: &Standby, request: &Req, now: &Reading) -> Option<Rejected> {
        self.breaker.refusal(reserved.reservation(), request, now)
    }

    fn admit(&self, reserved: Standby, request: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        self.breaker.admit(reserved.into_reservation(), request, now)
    }
}
