use super::{algorithm::Admission, counter};
use crate::{
    permit::Verdict,
    stripe::{Homed, Share, Sitting, Striped},
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
    const OVER: Self = Self(NonZeroU64::new(1 << 43).expect("not zero"));

    #[inline]
    fn new(cost: u32, seat: u8, end: u64) -> Self {
        Self(Self::OVER.0 | u64::from(cost) | u64::from(seat) << Self::SEAT_SHIFT | end)
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
    pub(super) fn new(shared: &Striped<T>, admission: Admission, cost: u32, learns: bool) -> Self {
        let (seat, standing) = if cost == 1 {
            shared.count_and_share(counter::ACCEPTED_ONE).into_parts()
        } else {
            shared.add(counter::ACCEPTED_COST, cost.into());
            shared.count_and_share(counter::ACCEPTED_OTHER).into_parts()
        };
        let end = if learns || standing.is_some() {
            Word::ASKED
        } else {
            Word::QUICK
        };
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
    pub(super) fn settle_quickly(&mut self, verdict: &Verdict) -> bool {
        let word = self.word;
        let quick = word.has(Word::QUICK) && verdict.cost.is_none() && verdict.metered.is_none();
        if quick {
            self.word = Word::OVER;
            ManuallyDrop::new(Sitting::of(word.seat())).ending().end();
        }
        quick
    }

    /// The share, to be dropped at the end, and whether the limiter has to be asked; `None` if the permit has ended.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn take(&mut self) -> Option<(Share<T>, bool)> {
        let word = self.word;
        if !word.has(Word::QUICK | Word::ASKED) {
            return None;
        }
        self.word = word.with(Word::QUICK | Word::ASKED, false);
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
