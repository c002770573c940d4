//! Policies that are picked by the request.

use super::{Admit, Gate, Never, Policy, Readiness, Reading};
use crate::{breaker::nobody, rejected::Rejected};
use std::{fmt, task::Context};

/// The policy that a closure picks for each request; none, and the request is admitted.
///
/// The policy is known only when the request is: such a layer reserves nothing in `poll_ready`, so it asks the inner service to be
/// ready before it rejects.
#[cfg_attr(
    feature = "http",
    doc = "Over HTTP, [`PerRoute`](crate::PerRoute) picks by method and route."
)]
///
/// ```
/// use portcullis::{CircuitBreaker, CircuitBreakerLayer, policy};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
/// let (read, write) = (CircuitBreaker::builder("read").build()?, CircuitBreaker::builder("write").build()?);
/// write.force_open();
/// let by_kind = policy::select(move |statement: &&str| match statement.split(' ').next() {
///     Some("select") => Some(read.clone()),
///     Some("insert" | "update") => Some(write.clone()),
///     _ => None,
/// });
/// let service = ServiceBuilder::new()
///     .layer(CircuitBreakerLayer::new(by_kind))
///     .service(service_fn(async |_: &str| Ok::<_, std::io::Error>("done")));
/// assert_eq!(service.clone().oneshot("select 1").await?, "done");
/// assert!(service.oneshot("insert 1").await.is_err());
/// # Ok(()) }
/// ```
pub fn select<F, P, Req>(pick: F) -> Select<F>
where
    F: Fn(&Req) -> Option<P>,
{
    Select(pick)
}

/// Picks a policy for each request: from [`select`].
#[derive(Clone, Copy)]
#[must_use = "a policy guards nothing until it is put into a layer"]
pub struct Select<F>(F);

impl<F> fmt::Debug for Select<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Select").finish_non_exhaustive()
    }
}

impl<F> Gate for Select<F> {
    type Reserved = ();

    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }
}

impl<F, P, Req> Policy<Req> for Select<F>
where
    F: Fn(&Req) -> Option<P>,
    P: Policy<Req, Wait = Never<<P as Policy<Req>>::Permit>>,
{
    type Permit = Option<P::Permit>;
    type Wait = Never<Self::Permit>;

    fn refusal(&self, (): &(), request: &Req, now: &Reading) -> Option<Rejected> {
        refusal(&(self.0)(request)?, request, now)
    }

    fn refuse(&self, (): &(), request: &Req, now: &Reading) -> Option<Rejected> {
        refuse(&(self.0)(request)?, request, now)
    }

    fn admit(&self, (): (), request: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        admit((self.0)(request).as_ref(), request, now)
    }
}

/// What a policy needs that had no `poll_ready`. One that is not ready is asked as it is: nobody would be woken.
fn reserve<P: Gate>(policy: &P, now: &Reading) -> Result<P::Reserved, Rejected> {
    match policy.reserve(None, now, &mut Context::from_waker(nobody())) {
        Readiness::Ready(reserved) | Readiness::Pending(reserved) => Ok(reserved),
        Readiness::Rejected(why) => Err(why),
    }
}

/// Asks what the policy refuses, without taking anything.
pub(crate) fn refusal<P: Policy<Req>, Req>(policy: &P, request: &Req, now: &Reading) -> Option<Rejected> {
    match policy.look(now) {
        Readiness::Ready(looked) | Readiness::Pending(looked) => policy.refusal(&looked, request, now),
        Readiness::Rejected(why) => Some(why),
    }
}

pub(crate) fn refuse<P: Policy<Req>, Req>(policy: &P, request: &Req, now: &Reading) -> Option<Rejected> {
    match policy.look(now) {
        Readiness::Ready(looked) | Readiness::Pending(looked) => policy.refuse(&looked, request, now),
        Readiness::Rejected(why) => {
            policy.count(&why, now);
            Some(why)
        }
    }
}

/// Asks the policy, if there is one.
pub(crate) fn admit<P, Req>(
    policy: Option<&P>,
    request: &Req,
    now: &Reading,
) -> Admit<Option<P::Permit>, Never<Option<P::Permit>>>
where
    P: Policy<Req, Wait = Never<<P as Policy<Req>>::Permit>>,
{
    let Some(policy) = policy else {
        return Admit::Now(None);
    };
    match reserve(policy, now) {
        Ok(reserved) => match policy.admit(reserved, request, now) {
            Admit::Now(permit) => Admit::Now(Some(permit)),
            Admit::Rejected(why) => Admit::Rejected(why),
            Admit::Later(never) => match never.0 {},
        },
        Err(why) => {
            policy.count(&why, now);
            Admit::Rejected(why)
        }
    }
}
