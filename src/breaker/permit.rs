use super::{
    Core, Words, counter,
    machine::{Ended, Lease},
    word,
};
use crate::{
    clock::{Clock, Reading, Timestamp},
    permit::{Outcome, Permit, Verdict},
    stripe::{Ending, Share, Striped},
};
use std::{fmt, sync::atomic::Ordering};

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
    share: Option<Share<Core>>,
    /// The word under which the call was admitted.
    word: u64,
    /// A probe's place; boxed, because few calls are probes and every future has room for it.
    lease: Option<Box<Lease>>,
    /// When the call began, if it matters how long it takes.
    started: Option<Timestamp>,
}

impl CircuitBreakerPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn new(shared: &Striped<Core>, word: u64, lease: Option<Lease>, now: &Reading) -> Self {
        let timed = word & word::TIMED != 0;
        Self {
            share: Some(shared.share()),
            word,
            lease: lease.map(Box::new),
            started: timed.then(|| now.at(&shared.clock)),
        }
    }

    pub(super) fn untracked() -> Self {
        Self {
            share: None,
            word: 0,
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
        let (Some(share), Some(lease)) = (&self.share, self.lease.as_deref()) else {
            return false;
        };
        let core = share.state();
        let now = now.at(&core.clock);
        // Not from the word: a busy one names no generation.
        let machine = core.machine();
        machine.generation() == word::generation(self.word) && machine.holds(*lease, now)
    }

    #[cold]
    #[inline(never)]
    fn abandon(&mut self) {
        let end = if std::thread::panicking() {
            End::Verdict(Outcome::Failure.into())
        } else {
            End::Cancelled
        };
        self.end_as(end, &Reading::new());
    }

    /// Counts a quick success as done where that is enough; what is left to do is the end of its share.
    #[inline(never)]
    fn count(permit: Option<&Self>, now: &Reading) -> Option<Ending> {
        let Some(Self {
            share: Some(Share::Sitting(seat)),
            word: admitted,
            lease: None,
            started: None,
        }) = permit
        else {
            return None;
        };
        let (hot, generation) = (seat.hot(), word::generation(*admitted));
        let word = hot.word().load(Ordering::Acquire);
        let counted = word & (word::MODE | word::COUNTED) == word::CLOSED | word::COUNTED;
        if !counted || word::generation(word) != generation {
            return None;
        }
        if word & word::WITHIN != 0 {
            let now = now.at(&Clock::of_kind(word::clock(word))).nanos();
            let (since, until) = (hot.since().load(Ordering::Acquire), hot.until().load(Ordering::Acquire));
            if !(since..until).contains(&now) || hot.word().load(Ordering::Acquire) != word {
                return None;
            }
        }
        seat.count_done(generation).then(|| seat.ending())
    }

    #[cold]
    #[inline(never)]
    fn end(permit: &mut Option<Self>, end: End, now: &Reading) {
        if let Some(mut permit) = permit.take() {
            permit.end_as(end, now);
        }
    }

    fn end_as(&mut self, end: End, reading: &Reading) {
        let Some(share) = self.share.take() else {
            return;
        };
        let (admitted, lease, started) = (self.word, self.lease.take(), self.started);
        let core = share.state();
        let long = started.is_some_and(|started| {
            let took = reading.at(&core.clock).nanos().saturating_sub(started.nanos());
            took >= share.hot().slow().load(Ordering::Relaxed)
        });
        let (verdict, cancelled) = match end {
            End::Verdict(verdict) => (verdict, false),
            End::Cancelled => (core.machine().settings().cancelled.into(), true),
        };
        // A call that its classifier wants ignored says nothing, however long it took.
        let slow = long && (cancelled || verdict.outcome != Outcome::Ignored);
        share.add(
            match verdict.outcome {
                Outcome::Success => counter::SUCCESS,
                Outcome::Failure => counter::FAILURE,
                Outcome::Ignored if cancelled => counter::CANCELLED,
                Outcome::Ignored => counter::IGNORED,
            },
            1,
        );
        if slow {
            share.add(counter::SLOW, 1);
        }
        let generation = word::generation(admitted);
        let word = share.hot().word().load(Ordering::Acquire);
        let current = word::generation(word) == generation || word & word::MODE == word::BUSY;
        let unremarkable = verdict.outcome == Outcome::Ignored
            || verdict.outcome == Outcome::Success && word & word::CLEAN != 0 && word & word::MODE == word::CLOSED;
        if lease.is_none() && (!current || unremarkable && !slow) {
            return;
        }
        let now = reading.at(&core.clock);
        let ended = Ended {
            generation,
            verdict,
            slow,
        };
        core.step(now, |machine| {
            if let Some(lease) = lease {
                machine.release(*lease);
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
    fn settle(self, verdict: Verdict, now: &Reading) {
        Self::settle_in_place(&mut Some(self), verdict, now);
    }
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle_in_place(permit: &mut Option<Self>, verdict: Verdict, now: &Reading) {
        // A success that would change nothing but its counter: the word is the one that admitted the call, and clean.
        if let Some(Self {
            share: Some(Share::Sitting(seat)),
            word: admitted,
            ..
        }) = permit
            && verdict.outcome == Outcome::Success
            && *admitted & (word::MODE | word::CLEAN | word::TIMED) == word::CLOSED | word::CLEAN
            && seat.hot().word().load(Ordering::Acquire) == *admitted
        {
            let ending = seat.ending();
            std::mem::forget(permit.take());
            ending.count_and_end(counter::SUCCESS);
        } else if verdict.outcome == Outcome::Success
            && let Some(ending) = Self::count(permit.as_ref(), now)
        {
            std::mem::forget(permit.take());
            ending.count_and_end(counter::SUCCESS);
        } else {
            Self::end(permit, End::Verdict(verdict), now);
        }
    }
    fn cancel(self, _: Option<u32>, now: &Reading) {
        Self::end(&mut Some(self), End::Cancelled, now);
    }
    fn unused(mut self, now: &Reading) {
        if let (Some(share), Some(lease)) = (self.share.take(), self.lease.take()) {
            let core = share.state();
            core.step(now.at(&core.clock), |machine| (machine.release(*lease), None));
        }
    }
}

impl Drop for CircuitBreakerPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        if self.share.is_some() {
            self.abandon();
        }
    }
}

impl fmt::Debug for CircuitBreakerPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreakerPermit")
            .field("service", &self.share.as_ref().map(|share| share.state().name.clone()))
            .field("generation", &word::generation(self.word))
            .field("probe", &self.lease.is_some())
            .finish_non_exhaustive()
    }
}

/// A probe's slot in the hands of a service that is ready but not called yet. Dropped, it was never used.
///
/// Boxed, because every readied service has room for it, and only those of a half-open circuit have one.
#[derive(Debug, Default)]
pub struct Reservation(Option<Box<CircuitBreakerPermit>>);

impl Reservation {
    pub(super) fn of(permit: CircuitBreakerPermit) -> Self {
        Self(Some(Box::new(permit)))
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The permit, if it still holds its slot; the call begins now.
    pub(super) fn redeem(mut self, now: &Reading) -> Option<CircuitBreakerPermit> {
        let mut permit = *self.0.take()?;
        if !permit.still_holds(now) {
            Permit::unused(permit, now);
            return None;
        }
        // What it waited to be ready does not make it slow.
        if let (Some(started), Some(share)) = (&mut permit.started, &permit.share) {
            *started = now.at(&share.state().clock);
        }
        Some(permit)
    }

    pub(crate) fn still_holds(&self, now: &Reading) -> bool {
        self.0.as_ref().is_some_and(|permit| permit.still_holds(now))
    }
}

impl Drop for Reservation {
    #[inline]
    fn drop(&mut self) {
        if let Some(permit) = self.0.take() {
            permit.unused();
        }
    }
}
