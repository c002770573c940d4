use super::backoff::back_off;
use crate::{
    clock::{Timestamp, nanos},
    error::{ConfigError, duration, within},
    sync::atomic::{AtomicU64, Ordering},
};
use std::{collections::VecDeque, time::Duration};

/// An exact sliding window: no stretch of `window`, wherever it begins, holds more than `max_requests` admissions.
///
/// A burst of the whole quota is allowed; the quota of one instant is back exactly one window later. Compare
/// [`TokenBucket`](super::TokenBucket), which spreads the quota evenly.
///
/// ```
/// use portcullis::{RateLimiter, SlidingWindow};
/// use std::time::Duration;
///
/// let limiter = RateLimiter::new("api", SlidingWindow::new(100, Duration::from_secs(60)))?;
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
///
/// 8 bytes for each request of the quota, allocated once; an admission takes the same time for a quota of ten and of ten
/// million, one compare-and-swap and one store for each token it costs. A limiter works for 292 years less one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlidingWindow {
    max_requests: u32,
    window: Duration,
}

impl SlidingWindow {
    /// At most `max_requests` (1 to 2²⁴) in any `window` (1 ns to 100 years).
    #[must_use]
    pub const fn new(max_requests: u32, window: Duration) -> Self {
        Self { max_requests, window }
    }

    pub(super) fn max_requests(&self) -> u32 {
        self.max_requests
    }

    pub(super) fn window(&self) -> Duration {
        self.window
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        within("max_requests", self.max_requests, &(1..=1 << INDEX_BITS))?;
        duration("window", self.window).map(|_| ())
    }

    pub(super) fn build(&self, now: Timestamp) -> Result<SlidingWindowState, ConfigError> {
        self.validate()?;
        let never = || AtomicU64::new(Slot { stamp: 0, odd: true }.pack());
        Ok(SlidingWindowState {
            start: now.nanos(),
            window: nanos(self.window),
            head: AtomicU64::new(0),
            ring: std::iter::repeat_with(never).take(self.max_requests as usize).collect(),
        })
    }
}

/// A ring with the time of each of the last `max_requests` admissions.
///
/// *Why it is exact.* An admission overwrites the slot of an admission that is at least one window old. If N + 1 admissions lay
/// within one window, two of them would share one of the N slots, and those two are a window apart.
///
/// *Protocol.* `head` is the position of the next admission: `lap << 24 | index`. It only rises, and repeats only after 2⁴⁰ laps,
/// so a compare-and-swap that succeeds has missed nothing. An admission of n reads the n slots from the head on. Each must carry
/// the mark of the lap before (one parity bit) and a stamp that is one window old; then it moves the head past them with one
/// compare-and-swap, which makes them its own, and writes its stamps. A slot without the mark has been claimed and not yet
/// written: its stamp is not known, so it is taken for new. Nobody waits for anybody.
///
/// A refund steps back to the first of its slots, but two laps further on: the marks are the same there, and the head has risen.
/// To everybody else its slots are now claimed and not yet written, so they are its own until it writes, with the mark of the
/// lap before, a stamp that is just old enough.
///
/// The head's compare-and-swap is `AcqRel` and its load `Acquire`, so whoever sees a head sees what its makers saw: no slot that it
/// passed is older to the reader than the mark says. A stamp is stored with Release and loaded with Acquire, so whoever sees a
/// stamp sees the head that has passed it, and does not take a slot that is full for the next.
#[derive(Debug)]
pub(super) struct SlidingWindowState {
    /// Stamps count nanoseconds from one window before this instant, so that zero is old enough from the start.
    start: u64,
    window: u64,
    head: AtomicU64,
    ring: Box<[AtomicU64]>,
}

const INDEX_BITS: u32 = 24;

/// A stamp in 63 bits, and the parity of the lap that wrote it.
#[derive(Debug, Clone, Copy)]
struct Slot {
    stamp: u64,
    odd: bool,
}

impl Slot {
    const LATEST: u64 = u64::MAX >> 1;

    #[inline]
    fn pack(self) -> u64 {
        self.stamp << 1 | u64::from(self.odd)
    }

    #[inline]
    fn unpack(word: u64) -> Self {
        Self {
            stamp: word >> 1,
            odd: word & 1 == 1,
        }
    }
}

/// A position on the endless walk round the ring.
#[derive(Debug, Clone, Copy)]
struct Position {
    lap: u64,
    index: usize,
}

/// A number of slots as an index; the ring has at most 2²⁴.
#[inline]
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl Position {
    #[inline]
    fn unpack(head: u64) -> Self {
        Self {
            lap: head >> INDEX_BITS,
            index: index(head & ((1 << INDEX_BITS) - 1)),
        }
    }

    #[inline]
    fn pack(self) -> u64 {
        self.lap << INDEX_BITS | self.index as u64
    }

    /// `n` slots on, at most one lap.
    #[inline]
    fn forward(self, n: usize, size: usize) -> Self {
        let index = self.index + n;
        if index < size {
            Self { index, ..self }
        } else {
            Self {
                lap: self.lap + 1,
                index: index - size,
            }
        }
    }

    fn is_odd(self) -> bool {
        self.lap & 1 == 1
    }
}

/// What a refund needs to know of an admission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Admission {
    head: u64,
    stamp: u64,
}

impl SlidingWindowState {
    #[inline]
    fn stamp(&self, now: Timestamp) -> u64 {
        let elapsed = now.nanos().saturating_sub(self.start);
        elapsed.saturating_add(self.window).min(Slot::LATEST)
    }

    fn time(&self, stamp: u64) -> Timestamp {
        Timestamp::from_nanos(self.start.saturating_add(stamp.saturating_sub(self.window)))
    }

    /// When the slot at this position may be used again, as a stamp.
    #[inline]
    fn free_from(&self, at: Position, now: u64) -> u64 {
        let slot = Slot::unpack(self.ring[at.index].load(Ordering::Acquire));
        let last = if slot.odd == at.is_odd() { now } else { slot.stamp };
        last.saturating_add(self.window)
    }

    /// The latest moment at which one of `n` slots from the head on is free.
    fn all_free_from(&self, head: Position, n: usize, now: u64) -> u64 {
        (0..n)
            .map(|ahead| self.free_from(head.forward(ahead, self.ring.len()), now))
            .max()
            .unwrap_or(0)
    }

    /// Admits one request, if its slot is free. Otherwise nothing has happened: [`take`](Self::take) knows the rest.
    #[inline]
    pub(super) fn take_one_at_a_glance(&self, now: Timestamp) -> Option<Admission> {
        let stamp = self.stamp(now);
        loop {
            let head = self.head.load(Ordering::Acquire);
            let at = Position::unpack(head);
            if stamp < self.free_from(at, stamp) {
                return None;
            }
            let next = at.forward(1, self.ring.len()).pack();
            let claimed = self
                .head
                .compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Relaxed);
            if claimed.is_ok() {
                self.write(at, stamp);
                return Some(Admission { head, stamp });
            }
            back_off(now);
        }
    }

    /// Writes the stamp of an admission into a slot that it has claimed.
    #[inline]
    fn write(&self, at: Position, stamp: u64) {
        let slot = Slot {
            stamp,
            odd: at.is_odd(),
        };
        self.ring[at.index].store(slot.pack(), Ordering::Release);
    }

    /// Admits `cost` requests (no more than the quota), or tells when it will for a caller alone.
    pub(super) fn take(&self, cost: u32, now: Timestamp) -> Result<Admission, Timestamp> {
        let (cost, stamp) = (index(cost.into()), self.stamp(now));
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let first = Position::unpack(head);
            let free = self.all_free_from(first, cost, stamp);
            if stamp < free {
                // A head that moved meanwhile made these slots somebody else's news.
                let latest = self.head.load(Ordering::Acquire);
                if latest == head {
                    return Err(self.time(free));
                }
                head = latest;
                continue;
            }
            let next = first.forward(cost, self.ring.len()).pack();
            match self
                .head
                .compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => {
                    for ahead in 0..cost {
                        self.write(first.forward(ahead, self.ring.len()), stamp);
                    }
                    return Ok(Admission { head, stamp });
                }
                Err(latest) => head = latest,
            }
        }
    }

    /// Takes an admission back if it is the newest; `false` if others have come since, and it stays.
    ///
    /// It is the newest if the head stands behind it, laps apart, and its slots still hold what it wrote: a later admission that
    /// used one of them, taken back or not, left another word there.
    pub(super) fn give_back(&self, admission: Admission, cost: u32) -> bool {
        let (first, cost) = (Position::unpack(admission.head), index(cost.into()));
        let after = first.forward(cost, self.ring.len());
        let head = self.head.load(Ordering::Acquire);
        let stands = Position::unpack(head);
        let slots = || (0..cost).map(|ahead| first.forward(ahead, self.ring.len()));
        let is_its_own = |at: Position| {
            let (stamp, odd) = (admission.stamp, at.is_odd());
            self.ring[at.index].load(Ordering::Acquire) == Slot { stamp, odd }.pack()
        };
        if stands.index != after.index || stands.is_odd() != after.is_odd() || !slots().all(is_its_own) {
            return false;
        }
        let back = Position {
            lap: stands.lap + 2 - (after.lap - first.lap),
            index: first.index,
        };
        if self
            .head
            .compare_exchange(head, back.pack(), Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            return false;
        }
        for at in slots() {
            let free = Slot {
                stamp: admission.stamp.saturating_sub(self.window),
                odd: !at.is_odd(),
            };
            self.ring[at.index].store(free.pack(), Ordering::Release);
        }
        true
    }

    /// When `cost` more admissions will have found room, one after the other; may be more than the quota.
    pub(super) fn due(&self, cost: u64, now: Timestamp) -> Timestamp {
        let Some(ahead) = cost.checked_sub(1) else {
            return now;
        };
        let head = Position::unpack(self.head.load(Ordering::Acquire));
        let size = self.ring.len() as u64;
        let (laps, slot) = (ahead / size, ahead % size);
        let stamp = self.stamp(now);
        let free = self
            .free_from(head.forward(index(slot), self.ring.len()), stamp)
            .max(stamp);
        self.time(free.saturating_add(self.window.saturating_mul(laps)))
    }

    /// When `cost` requests at once would be admitted after those that wait already, each at once, in this order. Follows the
    /// ring into the future: O(waiters).
    pub(super) fn due_behind(&self, ahead: impl Iterator<Item = u32>, cost: u32, now: Timestamp) -> Timestamp {
        let head = Position::unpack(self.head.load(Ordering::Acquire));
        let (size, stamp) = (self.ring.len(), self.stamp(now));
        // The ring from the head on, first as it is, then as the waiters will have left it.
        let (mut old, mut future) = (0, VecDeque::new());
        let mut at = stamp;
        for cost in ahead.chain([cost]) {
            let mut slots = index(cost.into());
            let of_old = slots.min(size - old);
            if of_old > 0 {
                old += of_old;
                slots -= of_old;
                at = at.max(self.free_from(head.forward(old - 1, size), stamp));
            }
            while slots > 0
                && let Some((count, admitted)) = future.front_mut()
            {
                let used = slots.min(*count);
                slots -= used;
                *count -= used;
                at = at.max(self.window.saturating_add(*admitted));
                if *count == 0 {
                    future.pop_front();
                }
            }
            future.push_back((index(cost.into()), at));
        }
        self.time(at)
    }

    /// When `cost` requests, no more than the quota, would be admitted at once; now or later.
    pub(super) fn peek(&self, cost: u32, now: Timestamp) -> Timestamp {
        let head = Position::unpack(self.head.load(Ordering::Acquire));
        self.time(self.all_free_from(head, index(cost.into()), self.stamp(now)))
            .max(now)
    }

    /// When the latest admission is one window old; now or later.
    pub(super) fn full_again(&self, now: Timestamp) -> Timestamp {
        let head = Position::unpack(self.head.load(Ordering::Acquire));
        // One before the head is one less than a lap ahead of it, but for the lap.
        let mut latest = head.forward(self.ring.len() - 1, self.ring.len());
        latest.lap = latest.lap.wrapping_sub(1);
        let slot = Slot::unpack(self.ring[latest.index].load(Ordering::Acquire));
        let stamp = self.stamp(now);
        let last = if slot.odd == latest.is_odd() { slot.stamp } else { stamp };
        self.time(last.saturating_add(self.window)).max(now)
    }

    /// How many requests would be admitted now. Stamps rise along the ring, but for threads that lie behind: a binary search.
    pub(super) fn available(&self, now: Timestamp) -> usize {
        let head = Position::unpack(self.head.load(Ordering::Acquire));
        let stamp = self.stamp(now);
        let (mut free, mut beyond) = (0, self.ring.len());
        while free < beyond {
            let middle = free.midpoint(beyond);
            if self.free_from(head.forward(middle, self.ring.len()), stamp) <= stamp {
                free = middle + 1;
            } else {
                beyond = middle;
            }
        }
        free
    }
}

#[cfg(all(test, portcullis_loom))]
mod model {
    use super::*;
    use crate::sync::{explore, spawn};
    use std::sync::Arc;

    const NOW: u64 = 1 << 62;

    /// A window of a second, with so many slots.
    fn window(slots: u32) -> Arc<SlidingWindowState> {
        let built = SlidingWindow::new(slots, Duration::from_secs(1)).build(Timestamp::from_nanos(NOW));
        Arc::new(built.expect("valid settings"))
    }

    fn after(nanos: u64) -> Timestamp {
        Timestamp::from_nanos(NOW + nanos)
    }

    /// As a call takes it: at a glance, or else by a closer look.
    fn take(window: &SlidingWindowState, now: Timestamp) -> Option<Admission> {
        window.take_one_at_a_glance(now).or_else(|| window.take(1, now).ok())
    }

    #[test]
    fn two_threads_share_the_slots_of_a_window() {
        for slots in [1, 2] {
            explore("two threads take two each", 2, move || {
                let window = window(slots);
                let other = window.clone();
                let two = |window: &SlidingWindowState| {
                    let taken = [take(window, after(0)), take(window, after(1))];
                    taken.into_iter().flatten().count()
                };
                let takes = spawn(move || two(&other));
                let mine = two(&window);
                assert_eq!(mine + takes.join().unwrap(), slots as usize, "the quota and no more");
                assert!(take(&window, after(999_999_999)).is_none(), "none is a window old");
                assert!(
                    take(&window, after(1_000_000_001)).is_some(),
                    "now one is, and none was lost"
                );
            });
        }
    }

    #[test]
    fn a_cost_of_two_takes_both_slots_or_none() {
        explore("one takes two at once, one takes one", 3, || {
            let window = window(2);
            let other = window.clone();
            let takes = spawn(move || other.take(2, after(0)).is_ok());
            let one = take(&window, after(0)).is_some();
            let two = takes.join().unwrap();
            assert!(one ^ two, "one of them, whole");
        });
    }

    #[test]
    fn a_slot_that_is_given_back_is_free_once() {
        explore("one gives back, one takes", 3, || {
            let window = window(1);
            let admission = take(&window, after(0)).expect("a free slot");
            let other = window.clone();
            let takes = spawn(move || take(&other, after(0)).is_some());
            let returned = window.give_back(admission, 1);
            let taken = takes.join().unwrap();
            assert!(returned, "it is the newest");
            let left = take(&window, after(0)).is_some();
            assert!(taken ^ left, "the slot was free for one more, and only one");
        });
    }
}
