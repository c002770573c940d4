//! What a request costs, told from the request.

use super::{Admit, Gate, Never, Permit, Policy, Readiness, Reading};
use crate::{
    limit::{RateLimitPermit, RateLimiter},
    rejected::Rejected,
};
use std::{fmt, task::Context};

/// A policy whose calls may cost more than one: a [`RateLimiter`], or one for each key.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot charge `{Req}` a cost",
    note = "a `RateLimiter` can, and a `KeyedRateLimiter` by a key of that request"
)]
pub trait Limiter<Req>: Gate<Reserved = ()> {
    /// Leave to make one call.
    type Permit: Permit;

    /// The rejection that a call of this cost would meet, without taking or counting anything.
    fn refusal_of(&self, cost: u32, request: &Req, now: &Reading) -> Option<Rejected>;

    /// The same, counted.
    fn refuse_of(&self, cost: u32, request: &Req, now: &Reading) -> Option<Rejected> {
        let why = self.refusal_of(cost, request, now)?;
        self.count(&why, now);
        Some(why)
    }

    /// Admits a call of this cost, or rejects and counts it.
    ///
    /// # Errors
    ///
    /// The rejection.
    fn admit_of(&self, cost: u32, request: &Req, now: &Reading) -> Result<Self::Permit, Rejected>;
}

impl<Req> Limiter<Req> for RateLimiter {
    type Permit = RateLimitPermit;

    fn refusal_of(&self, cost: u32, _: &Req, now: &Reading) -> Option<Rejected> {
        self.peek(cost, now)
    }

    fn admit_of(&self, cost: u32, _: &Req, now: &Reading) -> Result<RateLimitPermit, Rejected> {
        self.acquire_at(cost, now).map(RateLimitPermit::estimated)
    }
}

/// A limiter that charges for each request what a closure says: from [`RateLimiter::cost`].
///
/// All or nothing; a cost of zero is free. What the call cost in truth may be settled when it has ended:
/// [`Verdict::cost`](crate::Verdict::cost).
#[derive(Clone)]
#[must_use = "a policy guards nothing until it is put into a layer"]
pub struct Cost<L, F> {
    pub(super) limiter: L,
    pub(super) cost: F,
}

impl<L, F> Cost<L, F> {
    pub(crate) fn new(limiter: L, cost: F) -> Self {
        Self { limiter, cost }
    }
}

impl<L: fmt::Debug, F> fmt::Debug for Cost<L, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cost").field(&self.limiter).finish()
    }
}

impl RateLimiter {
    /// This limiter as a policy that charges for each request what `cost` says, in place of one.
    ///
    /// In a pair it is asked more than once for each request, and should say the same each time. A cost of zero is free: where the
    /// caller states it, `.max(1)` keeps him from calling for nothing.
    ///
    /// ```
    /// use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
    /// use std::time::Duration;
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
    /// let limiter = RateLimiter::new("search", TokenBucket::new(100, Duration::from_secs(60)))?;
    /// let by_length = limiter.cost(|question: &&str| u32::try_from(question.len()).unwrap_or(u32::MAX));
    /// let service = ServiceBuilder::new()
    ///     .layer(RateLimitLayer::new(by_length))
    ///     .service(service_fn(async |_: &str| Ok::<_, std::io::Error>("an answer")));
    /// service.oneshot("why?").await?;
    /// assert_eq!(limiter.status().accepted_cost, 4);
    /// # Ok(()) }
    /// ```
    pub fn cost<F, Req>(&self, cost: F) -> Cost<Self, F>
    where
        F: Fn(&Req) -> u32,
    {
        Cost::new(self.clone(), cost)
    }
}

impl<L: Gate<Reserved = ()>, F> Gate for Cost<L, F> {
    type Reserved = ();

    fn reserve(&self, held: Option<()>, now: &Reading, cx: &mut Context<'_>) -> Readiness<()> {
        self.limiter.reserve(held, now, cx)
    }

    fn count(&self, why: &Rejected, now: &Reading) -> bool {
        self.limiter.count(why, now)
    }
}

impl<L: Limiter<Req>, F: Fn(&Req) -> u32, Req> Policy<Req> for Cost<L, F> {
    type Permit = L::Permit;
    type Wait = Never<L::Permit>;

    fn refusal(&self, (): &(), request: &Req, now: &Reading) -> Option<Rejected> {
        self.limiter.refusal_of((self.cost)(request), request, now)
    }

    fn refuse(&self, (): &(), request: &Req, now: &Reading) -> Option<Rejected> {
        self.limiter.refuse_of((self.cost)(request), request, now)
    }

    fn admit(&self, (): (), request: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        self.limiter.admit_of((self.cost)(request), request, now).into()
    }
}
