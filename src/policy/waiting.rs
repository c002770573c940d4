//! Limiters that let calls wait their turn.

use super::{Admit, Cost, Gate, Later, Policy, Readiness, Reading};
use crate::{
    limit::{Acquire, RateLimitPermit, RateLimiter},
    rejected::Rejected,
};
use std::{task::Context, time::Duration};

/// A limiter that can let a call wait.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot let calls wait",
    note = "a `RateLimiter` can, and `RateLimiter::cost`; keyed limiters, routes, pairs and breakers only admit or reject"
)]
pub trait Waitable<Req>: Gate<Reserved = ()> {
    /// Waits in line for leave to make the call.
    fn acquire_for(&self, request: &Req, max_wait: Duration) -> Acquire;
}

impl<Req> Waitable<Req> for RateLimiter {
    fn acquire_for(&self, _: &Req, max_wait: Duration) -> Acquire {
        self.acquire_within(1, max_wait)
    }
}

impl<F: Fn(&Req) -> u32, Req> Waitable<Req> for Cost<RateLimiter, F> {
    fn acquire_for(&self, request: &Req, max_wait: Duration) -> Acquire {
        self.limiter.acquire_within((self.cost)(request), max_wait).estimated()
    }
}

/// A rate limiter that lets calls wait their turn, up to a time; from [`GuardLayer::wait`](crate::GuardLayer::wait).
#[derive(Debug, Clone)]
#[must_use = "a policy guards nothing until it is put into a layer"]
pub struct Waiting<L = RateLimiter> {
    limiter: L,
    max_wait: Duration,
}

impl<L> Waiting<L> {
    pub(crate) fn new(limiter: L, max_wait: Duration) -> Self {
        Self { limiter, max_wait }
    }
}

impl<L: Gate<Reserved = ()>> Gate for Waiting<L> {
    type Reserved = ();

    fn reserve(&self, held: Option<()>, now: &Reading, cx: &mut Context<'_>) -> Readiness<()> {
        self.limiter.reserve(held, now, cx)
    }

    fn count(&self, why: &Rejected, now: &Reading) -> bool {
        self.limiter.count(why, now)
    }
}

impl<L: Waitable<Req>, Req> Policy<Req> for Waiting<L> {
    type Permit = RateLimitPermit;
    type Wait = Later<Acquire>;

    fn refusal(&self, (): &(), _: &Req, _: &Reading) -> Option<Rejected> {
        None
    }

    fn admit(&self, (): (), request: &Req, _: &Reading) -> Admit<Self::Permit, Self::Wait> {
        Admit::Later(Later::new(self.limiter.acquire_for(request, self.max_wait)))
    }
}
