//! What a thread does that has lost a compare-and-swap to another.

use crate::clock::Timestamp;
use std::{cell::Cell, hint};

/// A thread that loses again within this time, in nanoseconds, is one of several that do little else.
const SOON: u64 = 100_000;

/// The longest wait is two to this power of the CPU's pauses: 10 to 50 microseconds. Each change of hands costs both threads some
/// hundred nanoseconds, so the winner needs some hundred calls in between to make little of that.
const MOST: u32 = 10;

thread_local! {
    /// When this thread last lost, in nanoseconds of some clock, and how often it has lost soon after another loss.
    static LAST: Cell<(u64, u32)> = const { Cell::new((0, 0)) };
}

/// Waits a moment before the next attempt: a pause for somebody who has lost by chance, and longer from loss to loss for threads
/// that hammer one limit.
///
/// A line that two cores want goes back and forth for every attempt, and that is what costs. A loser that stays away leaves the
/// line to the winner, which gets many calls through in the time of a few. Nobody depends on anybody: who has waited tries again,
/// whatever the others do. An attempt that is lost costs a waiter one wait and no more, however long it has waited before; how many
/// it loses has no bound, as with any compare-and-swap. It costs nothing where nobody loses.
#[cold]
#[inline(never)]
pub(super) fn back_off(now: Timestamp) {
    let (last, losses) = LAST.get();
    let losses = if now.nanos().abs_diff(last) < SOON {
        (losses + 1).min(MOST)
    } else {
        0
    };
    LAST.set((now.nanos(), losses));
    for _ in 0..1 << losses {
        hint::spin_loop();
    }
}
