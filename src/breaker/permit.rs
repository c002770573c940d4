use super::{
    Core, CoreStripe, counter,
    machine::{Ended, Lease},
    word,
};
use crate::{
    clock::{Reading, Timestamp},
    permit::{Outcome, Permit, Verdict},
};
use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

/// Leave to make one call. Tell it how the call ended with [`settle`](Self::settle).
///
/// Dropped unsettled, the call counts as cancelled, as the config says ([`cancelled`](super::CircuitBreakerConfig::cancelled)); dropped
/// by a panic, as a failure. Either way a probe's slot is free again.
///
/// ```
/// # use portcullis::{CircuitBreaker, Outcome};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let permit = breaker.try_acquire()?;
/// // … the call …
/// permit.settle(Outcome::Success);
/// drop(breaker.try_acquire()?); // thought better of it
/// assert_eq!(breaker.status().metrics.cancelled_requests, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a permit that is dropped counts as a cancelled call"]
pub struct CircuitBreakerPermit {
    /// `None` once settled, and for a disabled breaker, which wants to know nothing.
    stripe: Option<Arc<CoreStripe>>,
    generation: u64,
    lease: Option<Lease>,
    /// When the call began, if it matters how long it takes.
    started: Option<Timestamp>,
}

impl CircuitBreakerPermit {
    pub(super) fn new(stripe: &Arc<CoreStripe>, word: u64, lease: Option<Lease>, now: &Reading) -> Self {
        Self {
            stripe: Some(stripe.clone()),
            generation: word::generation(word),
            lease,
            started: (word & word::TIMED != 0).then(|| now.at(&stripe.clock)),
        }
    }

    pub(super) fn untracked() -> Self {
        Self {
            stripe: None,
            generation: 0,
            lease: None,
            started: None,
        }
    }

    /// How the call ended: an [`Outcome`], or a [`Verdict`] with more.
    pub fn settle(self, verdict: impl Into<Verdict>) {
        Permit::settle(self, verdict.into(), &Reading::new());
    }

    /// The call was never begun: the probe's slot is free, and nothing is counted.
    pub fn unused(self) {
        Permit::unused(self, &Reading::new());
    }

    /// Whether a reserved probe is still one: its generation runs and its lease holds the slot.
    pub(super) fn still_holds(&self, now: &Reading) -> bool {
        let (Some(stripe), Some(lease)) = (&self.stripe, self.lease) else {
            return false;
        };
        let now = now.at(&stripe.clock);
        // Not from the word: a busy one names no generation.
        let machine = stripe.machine();
        machine.generation() == self.generation && machine.holds(lease, now)
    }

    fn end(&mut self, end: End, reading: &Reading) {
        let Some(stripe) = self.stripe.take() else {
            return;
        };
        let core: &Core = &stripe;
        let long = self.started.is_some_and(|started| {
            let took = reading.at(&core.clock).nanos().saturating_sub(started.nanos());
            took >= core.slow.load(Ordering::Relaxed)
        });
        let (verdict, cancelled) = match end {
            End::Verdict(verdict) => (verdict, false),
            End::Cancelled => (core.machine().settings().cancelled.into(), true),
        };
        // A call that its classifier wants ignored says nothing, however long it took.
        let slow = long && (cancelled || verdict.outcome != Outcome::Ignored);
        stripe.add(
            match verdict.outcome {
                Outcome::Success => counter::SUCCESS,
                Outcome::Failure => counter::FAILURE,
                Outcome::Ignored if cancelled => counter::CANCELLED,
                Outcome::Ignored => counter::IGNORED,
            },
            1,
        );
        if slow {
            stripe.add(counter::SLOW, 1);
        }
        let word = core.word.load(Ordering::Acquire);
        let current = word::generation(word) == self.generation || word & word::MODE == word::BUSY;
        let unremarkable = verdict.outcome == Outcome::Ignored
            || verdict.outcome == Outcome::Success && word & word::CLEAN != 0 && word & word::MODE == word::CLOSED;
        if self.lease.is_none() && (!current || unremarkable && !slow) {
            return;
        }
        let now = reading.at(&core.clock);
        let ended = Ended {
            generation: self.generation,
            verdict,
            slow,
        };
        core.step(now, |machine| {
            if let Some(lease) = self.lease.take() {
                machine.release(lease);
            }
            ((), machine.record(ended, now))
        });
    }
}

#[derive(Clone, Copy)]
enum End {
    Verdict(Verdict),
    Cancelled,
}

impl Permit for CircuitBreakerPermit {
    fn settle(mut self, verdict: Verdict, now: &Reading) {
        self.end(End::Verdict(verdict), now);
    }
    fn cancel(mut self, _: Option<u32>, now: &Reading) {
        self.end(End::Cancelled, now);
    }
    fn unused(mut self, now: &Reading) {
        if let (Some(stripe), Some(lease)) = (self.stripe.take(), self.lease.take()) {
            let core: &Core = &stripe;
            core.step(now.at(&core.clock), |machine| (machine.release(lease), None));
        }
    }
}

impl Drop for CircuitBreakerPermit {
    fn drop(&mut self) {
        let end = if std::thread::panicking() {
            End::Verdict(Outcome::Failure.into())
        } else {
            End::Cancelled
        };
        self.end(end, &Reading::new());
    }
}

impl fmt::Debug for CircuitBreakerPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreakerPermit")
            .field("service", &self.stripe.as_ref().map(|stripe| &stripe.name))
            .field("generation", &self.generation)
            .field("probe", &self.lease.is_some())
            .finish_non_exhaustive()
    }
}

/// A probe's slot in the hands of a service that is ready but not called yet. Dropped, it was never used.
#[derive(Debug, Default)]
pub struct Reservation(Option<CircuitBreakerPermit>);

impl Reservation {
    pub(super) fn of(permit: CircuitBreakerPermit) -> Self {
        Self(Some(permit))
    }

    /// The permit, if it still holds its slot; the call begins now.
    pub(super) fn redeem(mut self, now: &Reading) -> Option<CircuitBreakerPermit> {
        let mut permit = self.0.take()?;
        if !permit.still_holds(now) {
            Permit::unused(permit, now);
            return None;
        }
        // What it waited to be ready does not make it slow.
        if let (Some(started), Some(stripe)) = (&mut permit.started, &permit.stripe) {
            *started = now.at(&stripe.clock);
        }
        Some(permit)
    }

    pub(crate) fn still_holds(&self, now: &Reading) -> bool {
        self.0.as_ref().is_some_and(|permit| permit.still_holds(now))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(permit) = self.0.take() {
            permit.unused();
        }
    }
}
