//! What a guard asks before it lets a call through.
//!
//! A [`CircuitBreaker`] is a policy, a [`RateLimiter`] is one, and so is one of these for each [key](Keyed), a limiter that charges by
//! [cost](Cost) or [waits](Waiting), whatever a closure [picks](select), and a pair of policies.
//!
//! # A policy of your own
//!
//! Implement [`Gate`] and [`Policy`]. This one refuses while a shop is closed, and says until when:
//!
//! ```
//! use portcullis::{BoxError, GuardLayer, Name, Reason, Rejected, policy::{Admit, Gate, Never, Policy, Readiness, Reading}};
//! use std::{sync::{Arc, atomic::{AtomicBool, Ordering}}, task::Context, time::Duration};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! #[derive(Clone)]
//! struct OpeningHours {
//!     shop: Name,
//!     closed: Arc<AtomicBool>,
//! }
//!
//! impl OpeningHours {
//!     fn refusal(&self) -> Option<Rejected> {
//!         let closed = self.closed.load(Ordering::Relaxed);
//!         closed.then(|| Rejected::new(self.shop.clone(), Reason::Other).retry_after(Duration::from_secs(3600)))
//!     }
//! }
//!
//! impl Gate for OpeningHours {
//!     type Reserved = ();
//!
//!     // Asked in `poll_ready`: while this refuses, the inner service is neither polled nor called.
//!     fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
//!         self.refusal().map_or(Readiness::Ready(()), Readiness::Rejected)
//!     }
//! }
//!
//! impl<Req> Policy<Req> for OpeningHours {
//!     type Permit = (); // nothing to settle when the call ends
//!     type Wait = Never<()>;
//!
//!     fn refusal(&self, (): &(), _: &Req, _: &Reading) -> Option<Rejected> {
//!         self.refusal()
//!     }
//!
//!     fn admit(&self, (): (), _: &Req, _: &Reading) -> Admit<(), Never<()>> {
//!         self.refusal().map_or(Admit::Now(()), Admit::Rejected)
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), BoxError> {
//! let closed = Arc::new(AtomicBool::new(false));
//! let hours = OpeningHours { shop: Name::try_from("shop")?, closed: closed.clone() };
//! let service = ServiceBuilder::new()
//!     .layer(GuardLayer::new(hours))
//!     .service(service_fn(async |order: u32| Ok::<_, std::io::Error>(order)));
//! assert_eq!(service.clone().oneshot(7).await?, 7);
//! closed.store(true, Ordering::Relaxed);
//! let error = service.oneshot(7).await.unwrap_err();
//! assert_eq!(Rejected::find(&*error).unwrap().reason, Reason::Other);
//! # Ok(()) }
//! ```
//!
//! In a pair it combines with the others: `GuardLayer::new((hours, breaker))`.

mod cost;
mod keyed;
mod keyed_breaker;
mod keyed_limiter;
mod not_ready;
pub(crate) mod select;
mod waiting;

pub use cost::{Cost, Limiter};
pub use keyed::{Keyed, Missing};
pub use not_ready::NotReady;
pub use select::{Select, select};
pub use waiting::{Waitable, Waiting};

pub use crate::{clock::Reading, permit::Permit, rejected::Refusing};

use crate::{
    breaker::{CircuitBreaker, CircuitBreakerPermit, Reservation, nobody},
    limit::{RateLimitPermit, RateLimiter},
    permit::Verdict,
    rejected::{Reason, Rejected},
};
use pin_project_lite::pin_project;
use std::{
    convert::Infallible,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tower_service::Service;

/// What a policy says in `poll_ready`.
#[derive(Debug)]
#[must_use = "what was reserved is given back when it is dropped"]
pub enum Readiness<R> {
    /// The inner service may be asked whether it is ready.
    Ready(R),
    /// Not now: the task is woken when it should ask again. What is held comes back with the next question.
    Pending(R),
    /// The call would meet this: the inner service need not be asked whether it is ready.
    Rejected(Rejected),
}

/// What a policy says in `poll_ready`, if a look at it is enough: the answer of [`Gate::ready_at_a_glance`].
#[derive(Debug)]
pub enum Glance<R> {
    /// The inner service may be asked whether it is ready.
    Ready(R),
    /// The call would be rejected for this reason: the inner service need not be asked whether it is ready.
    Refused(Reason),
    /// It takes more than a look: [`Gate::reserve`] is asked.
    Unsure,
}

impl<R> Readiness<R> {
    /// Both, if this does not refuse.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn and<S>(self, other: impl FnOnce() -> Readiness<S>) -> Readiness<(R, S)> {
        let (first, waits) = match self {
            Self::Ready(first) => (first, false),
            Self::Pending(first) => (first, true),
            Self::Rejected(why) => return Readiness::Rejected(why),
        };
        match other() {
            Readiness::Ready(second) if !waits => Readiness::Ready((first, second)),
            Readiness::Ready(second) | Readiness::Pending(second) => Readiness::Pending((first, second)),
            Readiness::Rejected(why) => Readiness::Rejected(why),
        }
    }
}

/// The part of a policy that needs no request: what happens in `poll_ready`. See the [module](self) for an example.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no policy",
    label = "a breaker, a limiter or another policy is wanted here",
    note = "a `KeyedRateLimiter` or `KeyedCircuitBreaker` becomes one by `.by(key)`; three policies are a pair in a pair: `((a, b), c)`",
    note = "settings are none: `TokenBucket` and its like go into `RateLimiter::new(name, …)`, a config into `CircuitBreaker::builder(name).config(…)`"
)]
pub trait Gate {
    /// What a readied service holds until it is called. Dropped, it is given back; that must not panic, or a call that has just
    /// been made is lost with its permit.
    type Reserved;

    /// Keeps or renews what is held, waits, or refuses. A refusal leaves no trace: one call may ask many times.
    ///
    /// A service that is called without having been asked whether it is ready asks with a waker that wakes nobody.
    fn reserve(&self, held: Option<Self::Reserved>, now: &Reading, cx: &mut Context<'_>) -> Readiness<Self::Reserved>;

    /// What to ask [`Policy::refusal`] with for a service that was never readied: the policy was picked by the request. Should
    /// take nothing. Default: reserves for the moment.
    fn look(&self, now: &Reading) -> Readiness<Self::Reserved> {
        self.reserve(None, now, &mut Context::from_waker(nobody()))
    }

    /// A shortcut of [`reserve`](Self::reserve) for a service that holds nothing, and asked before it: what a look tells, without
    /// taking anything. A refusal is told by its reason alone, and the rejection is made when the service is called: by
    /// [`Policy::refuse_at_a_glance`] if that still refuses, else by `reserve`, else by [`lapsed`](Self::lapsed). A policy that
    /// refuses here says so by [`REFUSES_AT_A_GLANCE`](Self::REFUSES_AT_A_GLANCE) and implements the other two. Default: a look does
    /// not tell.
    ///
    /// ```
    /// use portcullis::{GuardLayer, Name, Reason, Rejected, policy::{Admit, Gate, Glance, Never, Policy, Readiness, Reading, Refusing}};
    /// use std::{sync::{Arc, atomic::{AtomicBool, Ordering}}, task::Context, time::Duration};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// #[derive(Clone)]
    /// struct Door(Name, Arc<AtomicBool>); // whether it is shut
    ///
    /// impl Door {
    ///     fn refusing(&self) -> Option<Refusing<'_>> {
    ///         self.1.load(Ordering::Relaxed).then(|| Refusing::new(&self.0, Reason::Other))
    ///     }
    ///     fn refusal(&self) -> Option<Rejected> {
    ///         self.refusing().map(Refusing::reject)
    ///     }
    /// }
    ///
    /// impl Gate for Door {
    ///     type Reserved = ();
    ///     fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
    ///         self.refusal().map_or(Readiness::Ready(()), Readiness::Rejected)
    ///     }
    ///
    ///     const REFUSES_AT_A_GLANCE: bool = true;
    ///     fn ready_at_a_glance(&self, _: &Reading) -> Glance<()> {
    ///         self.refusing().map_or(Glance::Ready(()), |_| Glance::Refused(Reason::Other))
    ///     }
    ///     fn lapsed(&self, reason: Reason) -> Rejected {
    ///         Rejected::new(self.0.clone(), reason).retry_after(Duration::ZERO)
    ///     }
    /// }
    ///
    /// impl<Req> Policy<Req> for Door {
    ///     type Permit = ();
    ///     type Wait = Never<()>;
    ///     fn refusal(&self, (): &(), _: &Req, _: &Reading) -> Option<Rejected> {
    ///         Door::refusal(self)
    ///     }
    ///     fn refuse_at_a_glance(&self, _: Option<&()>, _: &Req, _: &Reading) -> Option<Refusing<'_>> {
    ///         self.refusing()
    ///     }
    ///     fn admit(&self, (): (), _: &Req, _: &Reading) -> Admit<(), Never<()>> {
    ///         Door::refusal(self).map_or(Admit::Now(()), Admit::Rejected)
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
    /// let door = Door(Name::try_from("shop")?, Arc::default());
    /// let service = ServiceBuilder::new()
    ///     .layer(GuardLayer::new(door.clone()))
    ///     .service(service_fn(async |order: u32| Ok::<_, std::io::Error>(order)));
    /// assert_eq!(service.clone().oneshot(7).await?, 7);
    /// door.1.store(true, Ordering::Relaxed);
    /// assert!(service.oneshot(7).await.is_err());
    /// # Ok(()) }
    /// ```
    fn ready_at_a_glance(&self, now: &Reading) -> Glance<Self::Reserved> {
        let _ = now;
        Glance::Unsure
    }

    /// Whether [`ready_at_a_glance`](Self::ready_at_a_glance) ever refuses: a pair has to know which of its two did, and lets only one,
    /// the first if it may. Default: no.
    const REFUSES_AT_A_GLANCE: bool = false;

    /// The rejection of a call whose service was refused for that reason [at a glance](Self::ready_at_a_glance), if by now this
    /// refuses no more: the inner service was not asked whether it is ready, so the call cannot be made. Not counted yet. Asked of no
    /// policy but those that [refuse at a glance](Self::REFUSES_AT_A_GLANCE), which must implement it. Default: panics.
    ///
    /// Mostly a rejection that may be tried again at once: with a `retry_after` of zero.
    fn lapsed(&self, reason: Reason) -> Rejected {
        let _ = reason;
        unreachable!("asked only of a policy that refuses at a glance, which tells what has lapsed")
    }

    /// Counts a rejection that [`reserve`](Self::reserve) or [`Policy::refusal`] gave, if it is of this policy. Default: it
    /// counts nothing.
    fn count(&self, why: &Rejected, now: &Reading) -> bool {
        let _ = (why, now);
        false
    }

    /// Records that the inner service failed to become ready. Default: what was reserved is dropped.
    fn unready(&self, reserved: Self::Reserved, verdict: Verdict, now: &Reading) {
        let _ = (reserved, verdict, now);
    }
}

/// Admits or rejects calls. See the [module](self) for an example.
///
/// A policy that must see the request to know whether it refuses cannot do so in `poll_ready`: its callers wait for the inner
/// service to be ready first.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no policy for `{Req}`",
    note = "a `KeyedRateLimiter` or `KeyedCircuitBreaker` becomes one by `.by(key)`; three policies are a pair in a pair: `((a, b), c)`",
    note = "a policy that waits (`.wait`) cannot be in a pair, and a key or a cost must be for the request that the service takes"
)]
pub trait Policy<Req>: Gate {
    /// Leave to make one call.
    type Permit: Permit;
    /// A permit that comes later. [`Never`] for a policy that answers at once.
    type Wait: Future<Output = Result<Self::Permit, Rejected>>;

    /// The rejection that [`admit`](Self::admit) would answer with, without taking or counting anything.
    fn refusal(&self, reserved: &Self::Reserved, request: &Req, now: &Reading) -> Option<Rejected>;

    /// The same, counted by the policy whose refusal it is.
    fn refuse(&self, reserved: &Self::Reserved, request: &Req, now: &Reading) -> Option<Rejected> {
        let why = self.refusal(reserved, request, now)?;
        self.count(&why, now);
        Some(why)
    }

    /// Whether a permit of [`glance`](Self::glance) that is given back [unused](Permit::unused) leaves no trace. A pair glances at
    /// such a policy first. Default: it leaves one.
    const TRACELESS: bool = false;

    /// A shortcut of [`admit`](Self::admit): the permit, if a look at the policy is enough. Otherwise nothing is taken and nothing
    /// counted, and `admit` is asked. What was reserved is dropped once the call is made. Default: a look is never enough.
    fn glance(&self, reserved: &Self::Reserved, request: &Req, now: &Reading) -> Option<Self::Permit> {
        let _ = (reserved, request, now);
        None
    }

    /// Another, for a call that is not admitted at a glance: the refusal, if a look at the policy is enough. Whoever answers with one
    /// has counted it: [`count`](Gate::count) is not asked. Otherwise nothing has happened. `reserved` is `None` where this has
    /// refused [at a glance](Gate::ready_at_a_glance) in `poll_ready`, and is asked whether it still does. Default: a look is never
    /// enough.
    fn refuse_at_a_glance(
        &self,
        reserved: Option<&Self::Reserved>,
        request: &Req,
        now: &Reading,
    ) -> Option<Refusing<'_>> {
        let _ = (reserved, request, now);
        None
    }

    /// Admits a call, now or later, or rejects and counts it.
    fn admit(&self, reserved: Self::Reserved, request: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait>;
}

/// A policy's answer to a call.
#[derive(Debug)]
#[must_use = "a permit that is dropped ends its call, and a rejection is for the caller"]
pub enum Admit<P, W> {
    /// Make it.
    Now(P),
    /// Make it when this says so.
    Later(W),
    /// Do not make it.
    Rejected(Rejected),
}

impl<R> From<Result<R, Rejected>> for Readiness<R> {
    #[inline]
    fn from(answer: Result<R, Rejected>) -> Self {
        answer.map_or_else(Self::Rejected, Self::Ready)
    }
}

impl<P, W> From<Result<P, Rejected>> for Admit<P, W> {
    #[inline]
    fn from(answer: Result<P, Rejected>) -> Self {
        match answer {
            Ok(permit) => Self::Now(permit),
            Err(why) => Self::Rejected(why),
        }
    }
}

/// The wait of a policy that never waits.
#[derive(Debug)]
pub struct Never<P>(Infallible, PhantomData<fn() -> P>);

impl<P> Future for Never<P> {
    type Output = Result<P, Rejected>;
    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        match self.0 {}
    }
}

/// What is kept while a policy waits: nothing for [`Never`]; the readied service and the request for a real wait, which
/// therefore needs a service that is `Clone`.
pub trait Hold<S: Service<Req>, Req>: Sized {
    /// The service and the request, or nothing.
    type Held;

    /// Takes the readied service out, leaving a clone in its place.
    fn hold(&self, service: &mut S, request: Req) -> Self::Held;

    /// Makes the call.
    fn call(held: Self::Held) -> S::Future;

    /// Gives the request back: it was rejected after all.
    fn request(held: Self::Held) -> Req;
}

impl<S: Service<Req>, Req, P> Hold<S, Req> for Never<P> {
    type Held = Infallible;
    fn hold(&self, _: &mut S, _: Req) -> Infallible {
        match self.0 {}
    }
    fn call(held: Infallible) -> S::Future {
        match held {}
    }
    fn request(held: Infallible) -> Req {
        match held {}
    }
}

pin_project! {
    /// The wait of a policy that may wait: any future of a permit.
    ///
    /// ```
    /// use portcullis::{BoxError, GuardLayer, Rejected, Verdict, policy::{Admit, Gate, Later, Permit, Policy, Readiness, Reading}};
    /// use std::{future::Future, pin::Pin, sync::Arc, task::Context};
    /// use tokio::sync::{OwnedSemaphorePermit, Semaphore};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// /// So many calls at once; over HTTP to the end of the answer's body.
    /// #[derive(Clone)]
    /// struct AtOnce(Arc<Semaphore>);
    ///
    /// struct Slot(OwnedSemaphorePermit); // given back when it is dropped
    ///
    /// impl Permit for Slot {
    ///     fn settle(self, _: Verdict, _: &Reading) {}
    ///     fn cancel(self, _: Option<u32>, _: &Reading) {}
    ///     fn unused(self, _: &Reading) {}
    /// }
    ///
    /// impl Gate for AtOnce {
    ///     type Reserved = ();
    ///     fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
    ///         Readiness::Ready(())
    ///     }
    /// }
    ///
    /// impl<Req> Policy<Req> for AtOnce {
    ///     type Permit = Slot;
    ///     type Wait = Later<Pin<Box<dyn Future<Output = Result<Slot, Rejected>> + Send>>>;
    ///
    ///     fn refusal(&self, (): &(), _: &Req, _: &Reading) -> Option<Rejected> {
    ///         None
    ///     }
    ///
    ///     fn admit(&self, (): (), _: &Req, _: &Reading) -> Admit<Slot, Self::Wait> {
    ///         let slots = self.0.clone();
    ///         Admit::Later(Later::new(Box::pin(async {
    ///             Ok(Slot(slots.acquire_owned().await.expect("never closed")))
    ///         })))
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), BoxError> {
    /// let service = ServiceBuilder::new()
    ///     .layer(GuardLayer::new(AtOnce(Arc::new(Semaphore::new(10)))))
    ///     .service(service_fn(async |question: u32| Ok::<_, std::io::Error>(question + 1)));
    /// assert_eq!(service.oneshot(41).await?, 42);
    /// # Ok(()) }
    /// ```
    #[derive(Debug)]
    #[must_use = "a wait does nothing unless it is polled"]
    pub struct Later<F> {
        #[pin]
        future: F,
    }
}

impl<F> Later<F> {
    /// Admits or rejects when the future does.
    pub fn new(future: F) -> Self {
        Self { future }
    }
}

impl<F: Future> Future for Later<F> {
    type Output = F::Output;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().future.poll(cx)
    }
}

impl<S: Service<Req> + Clone, Req, F> Hold<S, Req> for Later<F> {
    type Held = (S, Req);
    fn hold(&self, service: &mut S, request: Req) -> (S, Req) {
        let clone = service.clone();
        (std::mem::replace(service, clone), request)
    }
    fn call((mut service, request): (S, Req)) -> S::Future {
        service.call(request)
    }
    fn request((_, request): (S, Req)) -> Req {
        request
    }
}

impl Gate for CircuitBreaker {
    type Reserved = Reservation;

    #[inline]
    fn reserve(&self, held: Option<Reservation>, now: &Reading, _: &mut Context<'_>) -> Readiness<Reservation> {
        CircuitBreaker::reserve(self, held, now).into()
    }

    fn look(&self, _: &Reading) -> Readiness<Reservation> {
        Readiness::Ready(Reservation::default())
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn ready_at_a_glance(&self, now: &Reading) -> Glance<Reservation> {
        CircuitBreaker::ready_at_a_glance(self, now)
    }

    const REFUSES_AT_A_GLANCE: bool = true;

    fn lapsed(&self, reason: Reason) -> Rejected {
        CircuitBreaker::lapsed(self, reason)
    }

    fn count(&self, why: &Rejected, now: &Reading) -> bool {
        let own = why.limit.is_none() && why.service == *self.name();
        if own {
            CircuitBreaker::count(self, why, now);
        }
        own
    }

    fn unready(&self, reserved: Reservation, verdict: Verdict, now: &Reading) {
        // Rejected meanwhile: then it is not this service's call that failed.
        if let Ok(permit) = self.redeem_uncounted(reserved, now) {
            Permit::settle(permit, verdict, now);
        }
    }
}

impl<Req> Policy<Req> for CircuitBreaker {
    type Permit = CircuitBreakerPermit;
    type Wait = Never<CircuitBreakerPermit>;

    #[inline]
    fn refusal(&self, reserved: &Reservation, _: &Req, now: &Reading) -> Option<Rejected> {
        if self.surely_admits(reserved) || reserved.still_holds(now) {
            None
        } else {
            self.peek(now)
        }
    }

    // Nothing is counted at a breaker before the call ends.
    const TRACELESS: bool = true;

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn glance(&self, reserved: &Reservation, _: &Req, now: &Reading) -> Option<CircuitBreakerPermit> {
        self.glance(reserved, now)
    }

    #[expect(
        clippy::inline_always,
        reason = "a rejection that is made here and moved there costs more than all the rest"
    )]
    #[inline(always)]
    fn refuse_at_a_glance(&self, reserved: Option<&Reservation>, _: &Req, now: &Reading) -> Option<Refusing<'_>> {
        if reserved.is_none_or(Reservation::is_empty) {
            self.refuse_at_a_glance(now)
        } else {
            None
        }
    }

    #[inline]
    fn admit(&self, reserved: Reservation, _: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        self.redeem(reserved, now).into()
    }
}

impl Gate for RateLimiter {
    type Reserved = ();

    #[inline]
    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }

    #[inline]
    fn ready_at_a_glance(&self, _: &Reading) -> Glance<()> {
        Glance::Ready(())
    }

    fn count(&self, why: &Rejected, now: &Reading) -> bool {
        let own = why.limit.as_ref() == Some(self.limit()) && why.service == *self.name();
        if own {
            RateLimiter::count(self, why, now);
        }
        own
    }
}

impl<Req> Policy<Req> for RateLimiter {
    type Permit = RateLimitPermit;
    type Wait = Never<RateLimitPermit>;

    #[inline]
    fn refusal(&self, (): &(), _: &Req, now: &Reading) -> Option<Rejected> {
        self.peek(1, now)
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn glance(&self, (): &(), _: &Req, now: &Reading) -> Option<RateLimitPermit> {
        self.glance(now)
    }

    #[expect(
        clippy::inline_always,
        reason = "a rejection that is made here and moved there costs more than all the rest"
    )]
    #[inline(always)]
    fn refuse_at_a_glance(&self, _: Option<&()>, _: &Req, now: &Reading) -> Option<Refusing<'_>> {
        self.refuse_at_a_glance(now)
    }

    fn admit(&self, (): (), _: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        self.acquire_at(1, now).into()
    }
}

impl<A: Gate, B: Gate> Gate for (A, B) {
    type Reserved = (A::Reserved, B::Reserved);

    #[inline]
    fn reserve(&self, held: Option<Self::Reserved>, now: &Reading, cx: &mut Context<'_>) -> Readiness<Self::Reserved> {
        let (first, second) = held.unzip();
        // A refusal by the second drops, and so returns, what the first reserved.
        self.0.reserve(first, now, cx).and(|| self.1.reserve(second, now, cx))
    }

    fn look(&self, now: &Reading) -> Readiness<Self::Reserved> {
        self.0.look(now).and(|| self.1.look(now))
    }

    #[inline]
    fn ready_at_a_glance(&self, now: &Reading) -> Glance<Self::Reserved> {
        let first = match self.0.ready_at_a_glance(now) {
            Glance::Ready(first) => first,
            // What refuses without saying that it may would not be asked for its rejection.
            Glance::Refused(reason) if A::REFUSES_AT_A_GLANCE => return Glance::Refused(reason),
            Glance::Refused(_) | Glance::Unsure => return Glance::Unsure,
        };
        match self.1.ready_at_a_glance(now) {
            Glance::Ready(second) => Glance::Ready((first, second)),
            // Of two that may refuse it has to be known which did.
            Glance::Refused(reason) if B::REFUSES_AT_A_GLANCE && !A::REFUSES_AT_A_GLANCE => Glance::Refused(reason),
            Glance::Refused(_) | Glance::Unsure => Glance::Unsure,
        }
    }

    const REFUSES_AT_A_GLANCE: bool = A::REFUSES_AT_A_GLANCE || B::REFUSES_AT_A_GLANCE;

    fn lapsed(&self, reason: Reason) -> Rejected {
        if A::REFUSES_AT_A_GLANCE {
            self.0.lapsed(reason)
        } else {
            self.1.lapsed(reason)
        }
    }

    fn count(&self, why: &Rejected, now: &Reading) -> bool {
        self.0.count(why, now) || self.1.count(why, now)
    }

    fn unready(&self, (first, second): Self::Reserved, verdict: Verdict, now: &Reading) {
        self.0.unready(first, verdict, now);
        self.1.unready(second, verdict, now);
    }
}

/// Whether a refusal lasts longer than the other: a call that waits for the other alone would be refused by this one. Longest lasts
/// what nobody can tell the end of.
fn outlasts(refusal: Option<&Rejected>, other: Option<&Rejected>) -> bool {
    let lasts = |refusal: &Rejected| refusal.retry_after.unwrap_or(Duration::MAX);
    refusal.map(lasts) > other.map(lasts)
}

/// Two policies as one: both must admit. Each is asked whether it refuses before any gives, and what the first gave is returned
/// if the second refuses all the same. If both refuse, the rejection is that of the longer wait. Pairs nest. A policy that waits cannot be in a pair: give it a layer of its own.
impl<Req, A, B> Policy<Req> for (A, B)
where
    A: Policy<Req, Wait = Never<<A as Policy<Req>>::Permit>>,
    B: Policy<Req, Wait = Never<<B as Policy<Req>>::Permit>>,
{
    type Permit = (A::Permit, B::Permit);
    type Wait = Never<Self::Permit>;

    fn refusal(&self, (first, second): &Self::Reserved, request: &Req, now: &Reading) -> Option<Rejected> {
        let first = self.0.refusal(first, request, now);
        let second = self.1.refusal(second, request, now);
        if outlasts(second.as_ref(), first.as_ref()) {
            second
        } else {
            first
        }
    }

    fn refuse(&self, reserved: &Self::Reserved, request: &Req, now: &Reading) -> Option<Rejected> {
        // The one that is told counts it, and not whoever has the name in the rejection: two limits of one service may both be
        // called `default`.
        let first = || self.0.refuse(&reserved.0, request, now);
        let second = || self.1.refuse(&reserved.1, request, now);
        let Some(one) = self.0.refusal(&reserved.0, request, now) else {
            return second();
        };
        let other = self.1.refusal(&reserved.1, request, now);
        if outlasts(other.as_ref(), Some(&one)) {
            second().or_else(first)
        } else {
            first().or_else(second)
        }
    }

    const TRACELESS: bool = A::TRACELESS && B::TRACELESS;

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn glance(&self, reserved: &Self::Reserved, request: &Req, now: &Reading) -> Option<Self::Permit> {
        let first = || self.0.glance(&reserved.0, request, now);
        let second = || self.1.glance(&reserved.1, request, now);
        if B::TRACELESS {
            let other = second()?;
            let Some(one) = first() else {
                other.unused(now);
                return None;
            };
            Some((one, other))
        } else if A::TRACELESS {
            let one = first()?;
            let Some(other) = second() else {
                one.unused(now);
                return None;
            };
            Some((one, other))
        } else {
            None
        }
    }

    #[inline]
    fn refuse_at_a_glance(
        &self,
        reserved: Option<&Self::Reserved>,
        request: &Req,
        now: &Reading,
    ) -> Option<Refusing<'_>> {
        // Of a service that was not refused both have to be asked, and who refuses longer tells.
        if reserved.is_some() {
            None
        } else if A::REFUSES_AT_A_GLANCE {
            self.0.refuse_at_a_glance(None, request, now)
        } else {
            self.1.refuse_at_a_glance(None, request, now)
        }
    }

    fn admit(&self, reserved: Self::Reserved, request: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        if let Some(why) = self.refuse(&reserved, request, now) {
            return Admit::Rejected(why);
        }
        let first = match self.0.admit(reserved.0, request, now) {
            Admit::Now(permit) => permit,
            Admit::Rejected(why) => return Admit::Rejected(why),
            Admit::Later(never) => match never.0 {},
        };
        match self.1.admit(reserved.1, request, now) {
            Admit::Now(second) => Admit::Now((first, second)),
            Admit::Rejected(why) => {
                first.unused(now);
                Admit::Rejected(why)
            }
            Admit::Later(never) => match never.0 {},
        }
    }
}
