use crate::{
    clock::Reading,
    quota::Quota,
    rejected::{Error, Rejected},
};
use pin_project_lite::pin_project;
use std::{
    future::Future,
    mem::ManuallyDrop,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

/// How a call ended, as far as its policy is concerned.
///
/// ```
/// # use portcullis::{CircuitBreaker, Outcome};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// breaker.try_acquire()?.settle(Outcome::Ignored); // a 404, say: neither for nor against the service
/// assert_eq!(breaker.status().metrics.ignored_requests, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The service did its work.
    Success,
    /// The service failed.
    Failure,
    /// Says nothing about the service's health: a refusal by the caller's own side, a bad request.
    Ignored,
}

impl Outcome {
    /// The outcome as metrics and JSON spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Ignored => "ignored",
        }
    }

    /// What the default classifier says of a result: an error is a failure, unless it is a rejection by another portcullis
    /// policy, which is a local refusal and says nothing about the service; see
    /// [`ErrorsAreFailures`](crate::ErrorsAreFailures) for where a rejection is seen. For classifiers that add to it.
    ///
    /// ```
    /// # use portcullis::{CircuitBreaker, CircuitBreakerLayer, Outcome};
    /// # use std::io;
    /// # let breaker = CircuitBreaker::builder("search").build()?;
    /// let layer = CircuitBreakerLayer::new(breaker).classify(|result: &Result<u16, io::Error>| match result {
    ///     Ok(status) if *status >= 500 => Outcome::Failure,
    ///     _ => Outcome::of(result),
    /// });
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    #[must_use]
    #[inline]
    pub fn of<T, E: 'static>(result: &Result<T, E>) -> Self {
        match result {
            Ok(_) => Self::Success,
            Err(error) => Self::of_error(error),
        }
    }

    #[cold]
    pub(crate) fn of_error<E: 'static>(error: &E) -> Self {
        match Rejected::find_in(error) {
            Some(_) => Self::Ignored,
            None => Self::Failure,
        }
    }
}

/// All that is told to a permit at the end of its call: the outcome, and what else is known.
///
/// ```
/// # use portcullis::{Outcome, Verdict};
/// # use std::time::Duration;
/// let verdict = Verdict::new(Outcome::Failure).retry_after(Duration::from_secs(30));
/// assert_eq!(verdict.outcome, Outcome::Failure);
/// assert_eq!(Verdict::from(Outcome::Success), Verdict::new(Outcome::Success));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verdict {
    /// How the call ended.
    pub outcome: Outcome,
    /// What the call cost in truth, where that is known only now. A token bucket or an adaptive limiter charges or returns the
    /// difference to what was reserved (charged, it may go into debt by one burst); a sliding window keeps what it admitted; a
    /// breaker does not care.
    pub cost: Option<u32>,
    /// How long the service asked to be left alone. A breaker that [honours](crate::CircuitBreakerConfig::honor_retry_after) it
    /// and trips on this call opens for at least so long, up to its cap.
    pub retry_after: Option<Duration>,
    /// What a meter in the response said: for the limits that charge by what a request costs, and for no others.
    pub(crate) metered: Option<u32>,
}

impl Verdict {
    /// A verdict of which only the outcome is known.
    #[must_use]
    #[inline]
    pub const fn new(outcome: Outcome) -> Self {
        Self {
            outcome,
            cost: None,
            retry_after: None,
            metered: None,
        }
    }

    /// States the true cost.
    #[must_use]
    pub const fn cost(mut self, cost: u32) -> Self {
        self.cost = Some(cost);
        self
    }

    /// States how long the service asked to be left alone.
    #[must_use]
    pub const fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

impl From<Outcome> for Verdict {
    #[inline]
    fn from(outcome: Outcome) -> Self {
        Self::new(outcome)
    }
}

/// Leave to make one call. Every permit ends in exactly one of three ways; dropping it is the second.
///
/// `()` is a permit with nothing to settle, `Option` one that may be absent, and a pair of permits is one.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no permit",
    note = "`()` is one with nothing to settle; `Option` of a permit and a pair of permits are permits"
)]
pub trait Permit: Sized {
    /// The call ended, and this is how.
    fn settle(self, verdict: Verdict, now: &Reading);
    /// A shortcut of [`settle`](Self::settle), asked before it, where the permit lies. `true`: the permit is settled, and is asked
    /// nothing more. It may be forgotten without being dropped, so it owns nothing from now on; and to drop it does nothing. `false`:
    /// nothing has happened, and `settle` is asked. Default: there is no shortcut.
    #[inline]
    fn settle_quickly(&mut self, verdict: &Verdict, now: &Reading) -> bool {
        let _ = (verdict, now);
        false
    }
    /// Settles what is there, in the quick way if there is one: how a classifier ends a call. `None` is settled. A permit of your own
    /// has no need to replace it.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle_in_place(permit: &mut Option<Self>, verdict: Verdict, now: &Reading) {
        if let Some(held) = permit
            && held.settle_quickly(&verdict, now)
        {
            std::mem::forget(permit.take());
        } else if let Some(permit) = permit.take() {
            permit.settle(verdict, now);
        }
    }
    /// The call was begun and abandoned: nobody waits for its result any more. `cost` is what it had cost until then, where
    /// that is known: for the limits that charge by what a request costs.
    fn cancel(self, cost: Option<u32>, now: &Reading);
    /// The call was never begun. What the permit took is given back as if it had not been asked for.
    fn unused(self, now: &Reading);
    /// Tells the quotas of the limits that the call has passed, as they stand now. Default: there are none.
    fn quotas(&self, now: &Reading, tell: &mut dyn FnMut(Quota)) {
        let _ = (now, tell);
    }
}

impl Permit for () {
    fn settle(self, _: Verdict, _: &Reading) {}
    fn cancel(self, _: Option<u32>, _: &Reading) {}
    fn unused(self, _: &Reading) {}
}

impl<P: Permit> Permit for Option<P> {
    #[inline]
    fn settle(self, verdict: Verdict, now: &Reading) {
        if let Some(permit) = self {
            permit.settle(verdict, now);
        }
    }
    #[inline]
    fn settle_quickly(&mut self, verdict: &Verdict, now: &Reading) -> bool {
        self.as_mut().is_none_or(|permit| permit.settle_quickly(verdict, now))
    }
    fn cancel(self, cost: Option<u32>, now: &Reading) {
        if let Some(permit) = self {
            permit.cancel(cost, now);
        }
    }
    fn unused(self, now: &Reading) {
        if let Some(permit) = self {
            permit.unused(now);
        }
    }
    fn quotas(&self, now: &Reading, tell: &mut dyn FnMut(Quota)) {
        if let Some(permit) = self {
            permit.quotas(now, tell);
        }
    }
}

impl<A: Permit, B: Permit> Permit for (A, B) {
    #[inline]
    fn settle(self, verdict: Verdict, now: &Reading) {
        self.0.settle(verdict, now);
        self.1.settle(verdict, now);
    }
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle_in_place(permit: &mut Option<Self>, verdict: Verdict, now: &Reading) {
        let Some((first, _)) = permit else {
            return;
        };
        // Each where it lies: they are large together.
        if first.settle_quickly(&verdict, now) {
            let half = HalfSettled(permit);
            if let Some((_, second)) = &mut *half.0
                && second.settle_quickly(&verdict, now)
            {
                std::mem::forget(half.0.take());
            } else if let Some((_, second)) = half.0.take() {
                second.settle(verdict, now);
            }
            std::mem::forget(half);
        } else if let Some(permit) = permit.take() {
            permit.settle(verdict, now);
        }
    }
    fn cancel(self, cost: Option<u32>, now: &Reading) {
        self.0.cancel(cost, now);
        self.1.cancel(cost, now);
    }
    fn unused(self, now: &Reading) {
        self.0.unused(now);
        self.1.unused(now);
    }
    fn quotas(&self, now: &Reading, tell: &mut dyn FnMut(Quota)) {
        self.0.quotas(now, tell);
        self.1.quotas(now, tell);
    }
}

/// A permit in charge of a running call: dropped, the call was cancelled. Then the permit is taken out by hand: there is one
/// look whether it is there, and not a second one for what is left.
pub(crate) struct Held<P: Permit>(ManuallyDrop<Option<P>>);

impl<P: Permit> Held<P> {
    #[inline]
    pub(crate) fn new(permit: Option<P>) -> Self {
        Self(ManuallyDrop::new(permit))
    }

    #[inline]
    pub(crate) fn permit(&mut self) -> &mut Option<P> {
        &mut self.0
    }

    #[cold]
    #[inline(never)]
    fn cancel(&mut self) {
        if let Some(permit) = self.0.take() {
            permit.cancel(None, &Reading::new());
        }
    }
}

impl<P: Permit> Drop for Held<P> {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        if self.0.is_some() {
            self.cancel();
        }
    }
}

/// Settles the permit when dropped, which only an unwinding step does: the others are [done](Self::done). The permit itself would be
/// dropped too late to know of the panic: after `catch_unwind`, with the future.
#[must_use = "dropped, it settles the permit"]
pub(crate) struct OnUnwind<'a, P: Permit, V: Fn() -> Verdict + Copy>(&'a mut Option<P>, V);

impl<'a, P: Permit, V: Fn() -> Verdict + Copy> OnUnwind<'a, P, V> {
    #[inline]
    pub(crate) fn new(permit: &'a mut Option<P>, verdict: V) -> Self {
        Self(permit, verdict)
    }

    #[inline]
    pub(crate) fn permit(&mut self) -> &mut Option<P> {
        self.0
    }

    #[inline]
    pub(crate) fn done(self) {
        std::mem::forget(self);
    }
}

impl<P: Permit, V: Fn() -> Verdict + Copy> Drop for OnUnwind<'_, P, V> {
    // So small that it is inlined even where the compiler knows that it is rarely come by: a reference to the permit that went out to
    // a function would keep the permit in memory.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        settle_unwinding(self.0.take(), self.1);
    }
}

#[cold]
#[inline(never)]
fn settle_unwinding<P: Permit>(permit: Option<P>, verdict: impl Fn() -> Verdict) {
    if let Some(permit) = permit {
        permit.settle(verdict(), &Reading::new());
    }
}

/// A pair whose first is settled. Dropped, the second panicked where it lay: it failed, and the first is not told again.
struct HalfSettled<'a, A: Permit, B: Permit>(&'a mut Option<(A, B)>);

impl<A: Permit, B: Permit> Drop for HalfSettled<'_, A, B> {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        settle_unwinding(self.0.take().map(|(_, second)| second), || Outcome::Failure.into());
    }
}

/// A panic fails the permit, until it is [done](OnUnwind::done).
#[inline]
pub(crate) fn failing_on_unwind<P: Permit>(permit: &mut Option<P>) -> OnUnwind<'_, P, impl Fn() -> Verdict + Copy> {
    OnUnwind::new(permit, || Outcome::Failure.into())
}

pin_project! {
    /// A running call and its permit: hands both results out together, and on every other path (panic, drop) settles the
    /// permit itself.
    pub(crate) struct Watch<F, P: Permit> {
        #[pin]
        future: F,
        held: Held<P>,
    }
}

impl<F, P: Permit> Watch<F, P> {
    /// Makes the call. A panic inside `call` fails the permit as one inside the future does.
    #[inline]
    pub(crate) fn start(permit: P, call: impl FnOnce() -> F) -> Self {
        // Dropped by nobody else: the step ends or unwinds.
        let mut permit = ManuallyDrop::new(Some(permit));
        let starting = failing_on_unwind(&mut permit);
        let future = call();
        starting.done();
        let held = Held::new(permit.take());
        Self { future, held }
    }
}

impl<F, P: Permit> Watch<F, P> {
    /// A running call whose permit is still to come.
    #[inline]
    pub(crate) fn unheld(future: F) -> Self {
        Self {
            future,
            held: Held::new(None),
        }
    }

    /// Hands over the permit of an unheld call.
    #[inline]
    pub(crate) fn hold(&mut self, permit: Option<P>) {
        std::mem::forget(std::mem::replace(self.held.permit(), permit));
    }
}

impl<F: Future, P: Permit> Watch<F, P> {
    /// The call's result, and the permit, still where it was.
    #[inline]
    pub(crate) fn poll<'a>(self: Pin<&'a mut Self>, cx: &mut Context<'_>) -> Poll<(F::Output, &'a mut Option<P>)> {
        let this = self.project();
        let future = this.future;
        let polling = failing_on_unwind(this.held.permit());
        let polled = future.poll(cx);
        polling.done();
        let output = ready!(polled);
        Poll::Ready((output, this.held.permit()))
    }
}

/// Makes a call under a permit and settles it: what `call_with` does on every handle.
pub(crate) async fn run<P: Permit, T, E, V: Into<Verdict>>(
    permit: P,
    classify: impl FnOnce(&Result<T, E>) -> V,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, Error<E>> {
    let mut watch = std::pin::pin!(Watch::start(permit, || future));
    let ended = |(result, permit): (_, &mut Option<P>)| (result, permit.take());
    let (result, permit) = std::future::poll_fn(|cx| watch.as_mut().poll(cx).map(ended)).await;
    permit.settle(classify(&result).into(), &Reading::new());
    result.map_err(Error::Inner)
}
