use super::{
    Core, Words, counter,
    machine::{Ended, Lease},
    step_at, word,
};
use crate::{
    clock::{Now, Reading, Timestamp},
    permit::{Outcome, Permit, Verdict},
    stripe::{Hot, Share, Sitting, Striped},
};
use std::{
    fmt,
    mem::ManuallyDrop,
    num::NonZeroU64,
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
    /// The word under which the call was admitted, which names the seat; [`word::NOBODYS`] once settled, and for a disabled breaker,
    /// which wants to know nothing.
    word: NonZeroU64,
    /// The breaker, if it has no seat. Like the lease it is taken out by hand and never dropped with the permit: then nothing on the
    /// fast path takes a reference to the permit, and it need not be in memory.
    standing: ManuallyDrop<Option<Arc<Core>>>,
    /// A probe's place; boxed, because few calls are probes and every future has room for it.
    lease: ManuallyDrop<Option<Box<Lease>>>,
    /// When the call began, under a word that says that it matters how long it takes.
    started: Timestamp,
}

impl CircuitBreakerPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn new(shared: &Striped<Core>, word: NonZeroU64, lease: Option<Lease>, now: &Reading) -> Self {
        let timed = word.get() & word::TIMED != 0;
        let (_, standing) = shared.count_and_share(counter::ADMITTED).into_parts();
        Self {
            word,
            standing: ManuallyDrop::new(standing),
            lease: ManuallyDrop::new(lease.map(Box::new)),
            started: if timed {
                now.at(&shared.clock)
            } else {
                Timestamp::BEGINNING
            },
        }
    }

    pub(super) fn untracked() -> Self {
        Self {
            word: word::NOBODYS,
            standing: ManuallyDrop::new(None),
            lease: ManuallyDrop::new(None),
            started: Timestamp::BEGINNING,
        }
    }

    /// How the call ended: an [`Outcome`], or a [`Verdict`] with more.
    #[expect(clippy::inline_always, reason = "a permit that is handed over lies in memory")]
    #[inline(always)]
    pub fn settle(self, verdict: impl Into<Verdict>) {
        Permit::settle(self, verdict.into(), &Reading::new());
    }

    /// The call was never begun: the probe's slot is free, and nothing is counted.
    pub fn unused(self) {
        Permit::unused(self, &Reading::new());
    }

    /// What there is to settle; nothing is left of it here.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn take(&mut self) -> Parts {
        Parts {
            word: std::mem::replace(&mut self.word, word::NOBODYS),
            standing: self.standing.take(),
            lease: self.lease.take(),
            started: self.started,
        }
    }

    /// The breaker, if the permit is not settled.
    fn core(&self) -> Option<Arc<Core>> {
        match &*self.standing {
            Some(core) => Some(core.clone()),
            // Looked at, and not ended.
            None => share(self.word, None).map(|share| ManuallyDrop::new(share).state()),
        }
    }

    /// Whether a reserved probe is still one: its generation runs and its lease holds the slot.
    pub(super) fn still_holds(&self, now: &Reading) -> bool {
        let (Some(core), Some(lease)) = (self.core(), self.lease.as_deref()) else {
            return false;
        };
        let now = now.at(&core.clock);
        // Not from the word: a busy one names no generation.
        let machine = core.machine();
        machine.generation() == word::generation(self.word.get()) && machine.holds(*lease, now)
    }

    /// The call of a readied service begins now: what it waited to be ready does not make it slow.
    pub(super) fn begin(&mut self, now: &Reading) {
        if let Some(core) = self.core() {
            self.started = now.at(&core.clock);
        }
    }
}
/// A permit taken apart, for what is rare at the end of a call.
struct Parts {
    word: NonZeroU64,
    standing: Option<Arc<Core>>,
    lease: Option<Box<Lease>>,
    started: Timestamp,
}

/// The share of a permit, unless it is settled.
fn share(word: NonZeroU64, standing: Option<Arc<Core>>) -> Option<Share<Core>> {
    (word != word::NOBODYS).then(|| Share::of(word::seat(word.get()), standing))
}

impl Parts {
    #[cold]
    #[inline(never)]
    fn abandon(self) {
        if std::thread::panicking() {
            self.end(Some(&Outcome::Failure.into()), &Reading::new());
        } else {
            self.end(None, &Reading::new());
        }
    }

    /// `None` is cancelled.
    #[cold]
    #[inline(never)]
    fn end(self, end: Option<&Verdict>, now: &Reading) {
        let Some(share) = share(self.word, self.standing) else {
            return;
        };
        let admitted = self.word.get();
        // A clock of the program's is told by the word; to any other there is only the way to the breaker.
        if let Some(kind) = word::clock(admitted) {
            let now = &Now::OfKind(now, kind);
            record(share, admitted, self.lease, self.started, end, now);
        } else {
            let clock = share.state().clock.clone();
            let now = &Now::Asked(now, &clock);
            record(share, admitted, self.lease, self.started, end, now);
        }
    }

    #[cold]
    #[inline(never)]
    fn unused(self, now: &Reading) {
        let (share, lease) = (share(self.word, self.standing), self.lease);
        if let (Some(share), Some(lease)) = (share, lease) {
            let core = share.state();
            core.step(&Now::Asked(now, &core.clock), |machine| (machine.release(*lease), None));
        }
    }
}

/// Records and counts how a call ended, and ends its share.
fn record(
    share: Share<Core>,
    admitted: u64,
    lease: Option<Box<Lease>>,
    started: Timestamp,
    end: Option<&Verdict>,
    now: &Now<'_>,
) {
    let place = share.place();
    let long = admitted & word::TIMED != 0 && {
        let took = now.get().nanos().saturating_sub(started.nanos());
        took >= place.hot().slow().load(Ordering::Relaxed)
    };
    let cancelled = end.is_none();
    let verdict = match end {
        Some(verdict) => verdict,
        None => &place.lock().settings().cancelled.into(),
    };
    let counter = match verdict.outcome {
        Outcome::Success => counter::SUCCESS,
        Outcome::Failure => counter::FAILURE,
        Outcome::Ignored if cancelled => counter::CANCELLED,
        Outcome::Ignored => counter::IGNORED,
    };
    // A call that its classifier wants ignored says nothing, however long it took.
    let slow = long && (cancelled || verdict.outcome != Outcome::Ignored);
    if slow {
        place.add(counter::SLOW, 1);
    }
    let generation = word::generation(admitted);
    let word = place.hot().word().load(Ordering::Acquire);
    let current = word::generation(word) == generation || word & word::MODE == word::BUSY;
    let unremarkable = verdict.outcome == Outcome::Ignored
        || verdict.outcome == Outcome::Success && word & word::CLEAN != 0 && word & word::MODE == word::CLOSED;
    if lease.is_none() && (!current || unremarkable && !slow) {
        share.count_and_end(counter);
        return;
    }
    let ended = Ended {
        generation,
        verdict,
        slow,
    };
    let ((), moved) = step_at(place, admitted & word::CONSTANT, now, |machine| {
        if let Some(lease) = lease {
            machine.release(*lease);
        }
        ((), machine.record(&ended, now))
    });
    // The listeners of a move see the call that made it counted.
    match moved {
        None => share.count_and_end(counter),
        Some(moved) => {
            let core = share.state();
            share.count_and_end(counter);
            core.tell(&moved);
        }
    }
}

/// After how many counted successes a thread tells the machine of them: it may have become clean.
const UNTOLD: u64 = 512;

/// Whether a success is to be counted now under a word that says within, and the word is still that.
#[inline(never)]
fn is_within(hot: &Hot, word: u64, now: &Reading) -> bool {
    let Some(clock) = word::clock(word) else {
        return false;
    };
    let now = now.at_kind(clock).nanos();
    let (since, until) = (hot.since().load(Ordering::Acquire), hot.until().load(Ordering::Acquire));
    (since..until).contains(&now) && hot.word().load(Ordering::Acquire) == word
}

/// Counts a quick success as done where that is enough. Tells how many this thread has done in the generation; zero if it is not
/// enough.
#[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
#[inline(always)]
fn count(seat: &Sitting, word: u64, now: &Reading) -> u64 {
    if word & word::WITHIN != 0 {
        // The end of the time is told soon enough, and nothing becomes clean before that.
        let counted = is_within(seat.hot(), word, now) && seat.count_done(word::generation(word)) > 0;
        return counted.into();
    }
    seat.count_done(word::generation(word))
}

/// The same under a word that is another than the call was admitted under.
#[inline(never)]
fn count_after_a_move(seat: &Sitting, admitted: u64, now: &Reading) -> u64 {
    let word = seat.hot().word().load(Ordering::Acquire);
    let counted = word & (word::MODE | word::COUNTED) == word::CLOSED | word::COUNTED;
    if counted && word::generation(word) == word::generation(admitted) {
        count(seat, word, now)
    } else {
        0
    }
}

/// Ends a success that was counted, and has the machine record all that were.
#[cold]
#[inline(never)]
fn end_and_tell(seat: Sitting, now: &Reading) {
    let another = Share::<Core>::Sitting(seat.another());
    Share::<Core>::Sitting(seat).count_and_end(counter::SUCCESS);
    let core = another.state();
    core.step(&Now::Asked(now, &core.clock), |_| ((), None));
}

impl Permit for CircuitBreakerPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle(mut self, verdict: Verdict, now: &Reading) {
        if !self.settle_quickly(&verdict, now) {
            self.take().end(Some(&verdict), now);
        }
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle_quickly(&mut self, verdict: &Verdict, now: &Reading) -> bool {
        let admitted = self.word.get();
        if verdict.outcome != Outcome::Success || !word::is_plain(admitted) {
            return false;
        }
        let seat = ManuallyDrop::new(Sitting::of(word::seat(admitted)));
        let unmoved = seat.hot().word().load(Ordering::Acquire) == admitted;
        // It would change nothing but its counter: the word is the one that admitted the call, and clean.
        if !unmoved || admitted & word::CLEAN == 0 {
            let done = if !unmoved {
                count_after_a_move(&seat, admitted, now)
            } else if admitted & word::COUNTED != 0 {
                count(&seat, admitted, now)
            } else {
                0
            };
            if done == 0 {
                return false;
            }
            if done.is_multiple_of(UNTOLD) {
                self.word = word::NOBODYS;
                end_and_tell(ManuallyDrop::into_inner(seat), now);
                return true;
            }
        }
        self.word = word::NOBODYS;
        seat.ending().count_and_end(counter::SUCCESS);
        true
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn cancel(mut self, _: Option<u32>, now: &Reading) {
        self.take().end(None, now);
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn unused(mut self, now: &Reading) {
        self.take().unused(now);
    }
}

impl Drop for CircuitBreakerPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        if self.word != word::NOBODYS {
            self.take().abandon();
        }
    }
}

impl fmt::Debug for CircuitBreakerPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreakerPermit")
            .field("service", &self.core().map(|core| core.name.clone()))
            .field("generation", &word::generation(self.word.get()))
            .field("probe", &self.lease.is_some())
            .finish_non_exhaustive()
    }
}

/// A probe's slot in the hands of a service that is ready but not called yet. Dropped, it was never used.
///
/// Boxed, because every readied service has room for it, and only those of a half-open circuit have one. Taken out by hand:
/// there is one look whether there is one, and nothing else of it where the call is made.
#[derive(Default)]
#[must_use = "a slot that is dropped is given back"]
pub struct Reservation(ManuallyDrop<Option<Box<CircuitBreakerPermit>>>);

impl Reservation {
    pub(super) fn of(permit: CircuitBreakerPermit) -> Self {
        Self(ManuallyDrop::new(Some(Box::new(permit))))
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The permit, if it still holds its slot; the call begins now.
    pub(super) fn redeem(mut self, now: &Reading) -> Option<CircuitBreakerPermit> {
        let mut permit = *self.0.take()?;
        if !permit.still_holds(now) {
            Permit::unused(permit, now);
            return None;
        }
        permit.begin(now);
        Some(permit)
    }

    pub(crate) fn still_holds(&self, now: &Reading) -> bool {
        self.0.as_ref().is_some_and(|permit| permit.still_holds(now))
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reservation").field(&*self.0).finish()
    }
}

impl Drop for Reservation {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(permit) = self.0.take() {
            give_back(permit);
        }
    }
}

#[cold]
#[inline(never)]
#[expect(
    clippy::boxed_local,
    reason = "it is taken out of its box here and not in every call"
)]
fn give_back(permit: Box<CircuitBreakerPermit>) {
    permit.unused();
}
