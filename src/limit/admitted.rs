use super::{algorithm::Admission, counter};
use crate::{
    clock::{ClockKind, Reading},
    permit::{Outcome, Verdict},
    stripe::{Homed, Hot, Share, Sitting, Striped},
    sync::atomic::{AtomicU64, Ordering},
};
use std::{mem::ManuallyDrop, num::NonZeroU64, sync::Arc};

/// What every permit of a limiter is made of: its share of the limiter, and what it took.
///
/// Nothing in it is dropped by itself, so nothing on the fast path takes a reference to it: it need not be in memory.
pub(super) struct Admitted<T: Homed> {
    /// The limiter, if it has no seat.
    standing: ManuallyDrop<Option<Arc<T>>>,
    pub(super) admission: Admission,
    word: Word,
}

/// What a limiter wants to know at the end of a call, besides another cost: bits of a [`Word`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wants(u64);

impl Wants {
    pub(super) const NOTHING: Self = Self(Word::QUICK);
    /// The outcome: it has to be asked.
    pub(super) const OUTCOME: Self = Self(Word::ASKED);

    /// The outcome, which is counted as the end of the share until this clock shows the time that is published as
    /// [`window_end`]; then it has to be asked.
    pub(super) fn counted_outcome(clock: ClockKind) -> Self {
        Self(Word::ASKED | clock.code() << Word::CLOCK_SHIFT)
    }
}

/// Until when outcomes are only counted, in nanoseconds of the clock.
#[inline]
pub(super) fn window_end(hot: &Hot) -> &AtomicU64 {
    &hot.words[0]
}

/// The counter of an outcome. Each is an end of a share.
pub(super) fn outcomes(outcome: Outcome) -> usize {
    match outcome {
        Outcome::Success => counter::SUCCEEDED,
        Outcome::Failure => counter::FAILED,
        Outcome::Ignored => counter::IGNORED,
    }
}

/// The rest, in one word: where permits are moved together with others, one that is marked as absent by a byte of its own is moved in
/// odd pieces.
///
/// ```text
/// bits  0..32  cost
/// bits 32..40  seat
/// bit  40      estimated: the cost was told from the request; then a meter's word corrects it
/// bit  41      quick: the share is to be ended, and that is all, unless the cost was another
/// bit  42      asked: the share is to be ended, and the limiter asked what it wants to know
/// bit  43      set, so that no word is zero
/// bits 44..46  clock: while it is early enough on this clock the permit counts the outcome, and the limiter is not asked
/// ```
///
/// Neither quick nor asked, the permit has ended.
#[derive(Clone, Copy)]
struct Word(NonZeroU64);

impl Word {
    const SEAT_SHIFT: u32 = 32;
    const ESTIMATED: u64 = 1 << 40;
    const QUICK: u64 = 1 << 41;
    const ASKED: u64 = 1 << 42;
    const CLOCK_SHIFT: u32 = 44;
    const OVER: Self = Self(NonZeroU64::new(1 << 43).expect("not zero"));

    #[inline]
    fn new(cost: u32, seat: u8, end: u64) -> Self {
        Self(Self::OVER.0 | u64::from(cost) | u64::from(seat) << Self::SEAT_SHIFT | end)
    }

    /// The counter of the outcome, if it need only be counted.
    #[inline(never)]
    fn counter(self, outcome: Outcome, now: &Reading) -> Option<usize> {
        let clock = ClockKind::of_code(self.0.get() >> Self::CLOCK_SHIFT)?;
        let seat = ManuallyDrop::new(Sitting::of(self.seat()));
        let end = window_end(seat.hot()).load(Ordering::Acquire);
        (now.at_kind(clock).nanos() < end).then(|| outcomes(outcome))
    }

    #[inline]
    fn has(self, bit: u64) -> bool {
        self.0.get() & bit != 0
    }

    #[inline]
    fn with(self, bit: u64, set: bool) -> Self {
        let others = self.0.get() & !bit;
        Self(Self::OVER.0 | others | if set { bit } else { 0 })
    }

    /// The same of a permit that has ended: only what it took is still told.
    #[inline]
    fn over(self) -> Self {
        Self(Self::OVER.0 | u64::from(self.cost()))
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "those bits are wanted")]
    fn cost(self) -> u32 {
        self.0.get() as u32
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "those bits are wanted")]
    fn seat(self) -> u8 {
        (self.0.get() >> Self::SEAT_SHIFT) as u8
    }
}

impl<T: Homed> Admitted<T> {
    /// Counts an admission.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn new(shared: &Striped<T>, admission: Admission, cost: u32, wants: Wants) -> Self {
        let (seat, standing) = if cost == 1 {
            shared.count_and_share(counter::ACCEPTED_ONE).into_parts()
        } else {
            shared.add(counter::ACCEPTED_COST, cost.into());
            shared.count_and_share(counter::ACCEPTED_OTHER).into_parts()
        };
        let Wants(end) = if standing.is_some() { Wants::OUTCOME } else { wants };
        Self {
            standing: ManuallyDrop::new(standing),
            admission,
            word: Word::new(cost, seat, end),
        }
    }

    /// What was taken.
    #[inline]
    pub(super) fn cost(&self) -> u32 {
        self.word.cost()
    }

    /// Whether the cost was told from the request.
    #[inline]
    pub(super) fn is_estimated(&self) -> bool {
        self.word.has(Word::ESTIMATED)
    }

    pub(super) fn set_estimated(&mut self, estimated: bool) {
        self.word = self.word.with(Word::ESTIMATED, estimated);
    }

    /// Ends the call if that is no more than the end of the share.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn settle_quickly(&mut self, verdict: &Verdict, now: &Reading) -> bool {
        let word = self.word;
        if verdict.cost.is_some() || verdict.metered.is_some() {
            return false;
        }
        if word.has(Word::QUICK) {
            self.word = word.over();
            ManuallyDrop::new(Sitting::of(word.seat())).ending().end();
            return true;
        }
        let Some(counter) = word.counter(verdict.outcome, now) else {
            return false;
        };
        self.word = word.over();
        ManuallyDrop::new(Sitting::of(word.seat()))
            .ending()
            .count_and_end(counter);
        true
    }

    /// The share, to be dropped at the end, and whether the limiter has to be asked; `None` if the permit has ended.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn take(&mut self) -> Option<(Share<T>, bool)> {
        let word = self.word;
        if !word.has(Word::QUICK | Word::ASKED) {
            return None;
        }
        self.word = word.over();
        Some((Share::of(word.seat(), self.standing.take()), word.has(Word::ASKED)))
    }

    /// The limiter, if the permit has not ended.
    pub(super) fn state(&self) -> Option<Arc<T>> {
        if !self.word.has(Word::QUICK | Word::ASKED) {
            return None;
        }
        match &*self.standing {
            Some(state) => Some(state.clone()),
            // Looked at, and not ended.
            None => Some(ManuallyDrop::new(Share::of(self.word.seat(), None)).state()),
        }
    }
}
