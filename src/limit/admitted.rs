use super::{algorithm::Admission, counter};
use crate::{
    permit::Verdict,
    stripe::{Homed, Share, Sitting, Striped},
};
use std::{mem::ManuallyDrop, sync::Arc};

/// What every permit of a limiter is made of: its share of the limiter, and what it took.
///
/// Nothing in it is dropped by itself, so nothing on the fast path takes a reference to it: it need not be in memory.
pub(super) struct Admitted<T: Homed> {
    /// The limiter, if it has no seat.
    standing: ManuallyDrop<Option<Arc<T>>>,
    pub(super) admission: Admission,
    pub(super) cost: u32,
    seat: u8,
    /// Whether the cost was told from the request: then a meter's word corrects it.
    pub(super) estimated: bool,
    end: End,
}

/// What is to be done at the end of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The share ends, and that is all, unless the cost was another.
    Quick,
    /// The limiter has to be asked what it wants to know.
    Asked,
    /// Nothing: it is done.
    Over,
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
        Self {
            end: if learns || standing.is_some() {
                End::Asked
            } else {
                End::Quick
            },
            standing: ManuallyDrop::new(standing),
            admission,
            cost,
            seat,
            estimated: false,
        }
    }

    /// Ends the call if that is no more than the end of the share.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn settle_quickly(&mut self, verdict: &Verdict) -> bool {
        let quick = self.end == End::Quick && verdict.cost.is_none() && verdict.metered.is_none();
        if quick {
            self.end = End::Over;
            ManuallyDrop::new(Sitting::of(self.seat)).ending().end();
        }
        quick
    }

    /// The share, to be dropped at the end, and whether the limiter has to be asked; `None` if the permit has ended.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn take(&mut self) -> Option<(Share<T>, bool)> {
        match std::mem::replace(&mut self.end, End::Over) {
            End::Over => None,
            end => Some((Share::of(self.seat, self.standing.take()), end == End::Asked)),
        }
    }

    /// The limiter, if the permit has not ended.
    pub(super) fn state(&self) -> Option<Arc<T>> {
        match (self.end, &*self.standing) {
            (End::Over, _) => None,
            (_, Some(state)) => Some(state.clone()),
            // Looked at, and not ended.
            (_, None) => Some(ManuallyDrop::new(Share::of(self.seat, None)).state()),
        }
    }
}
