use super::backoff::back_off;
use crate::{
    clock::{Timestamp, nanos},
    error::{ConfigError, duration, within},
    stripe,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use std::{collections::VecDeque, num::NonZeroU64, sync::PoisonError, time::Duration};

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
/// 8 bytes for each request of the quota, and 2 kB for quotas of 64 and more, allocated once. An admission takes the same time for
/// a quota of ten and of ten million, one compare-and-swap and one store for each token it costs. From 64 on the quota is dealt to
/// eight parts, and a thread goes to its own first: threads do not meet on one limiter while each finds room there, and share all of
/// it all the same. Only a cost of more than one that no part has room for takes a mutex, and for that moment holds up those who
/// would otherwise be refused. A limiter works for 292 years less one window.
///
/// A permit that was not used is taken back for certain as long as nobody was admitted at a later time. If somebody was, it depends
/// on whether that took from the same part.
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

    /// A window that many threads ask.
    pub(super) fn build(&self, now: Timestamp) -> Result<SlidingWindowState, ConfigError> {
        self.validate()?;
        let lanes = if self.max_requests < WIDE { 1 } else { LANES };
        Ok(SlidingWindowState::with_lanes(self, lanes, now))
    }

    /// A window of a single lane: one of many, each of which is asked little.
    pub(super) fn build_narrow(&self, now: Timestamp) -> Result<SlidingWindowState, ConfigError> {
        self.validate()?;
        Ok(SlidingWindowState::with_lanes(self, 1, now))
    }
}

/// Rings with the time of each of the last `max_requests` admissions.
///
/// *Lanes.* The slots are dealt to up to [`LANES`] rings, each with a head of its own on lines of memory of its own. A thread goes
/// to the lane of its number, which nobody else goes to first, so threads do not meet. Where that lane has no free slot it goes to
/// the others, and only where none has is it refused. A small window is one lane.
///
/// *Why it is exact.* An admission overwrites a slot whose word says that the admission before it is at least one window old. So
/// the admissions that count fall into as many chains as there are slots, in each of which they follow each other a window apart:
/// no window holds two of a chain. A refund takes one admission out, and the argument must survive it: see below.
///
/// *Bits.* A head is the position of its lane's next admission: `lap << 25 | held << 24 | index`. But for the bit `held` it only
/// rises, and repeats only after 2³⁹ laps, so a compare-and-swap that succeeds has missed nothing. A slot is `stamp << 1 | odd`:
/// the time of an admission, and the parity of the lap that wrote it. What a permit remembers is the stamp alone.
///
/// *The one update path.* An admission of n reads the n slots of a lane from the head on. Each must carry the mark of the lap
/// before and a stamp that is one window old; then it moves the head past them with one compare-and-swap, which makes them its own,
/// and writes its stamps. A slot without the mark has been claimed and not yet written: its stamp is not known, so it is taken for
/// new. Up to here nobody waits for anybody.
///
/// *Several lanes at once.* What no single lane can hold is taken from several, all or nothing: under a lock, for those who do so
/// among themselves, every head is marked as held. A held head is no position, so nobody else moves it: the lanes stand still.
/// Then there is enough, and it is claimed and written, or there is not, and the time that is told is exact; the heads are put where
/// they belong, and with that they are free again. So of two who race for more than there is one is admitted if one alone would
/// have been. Who finds a lane held goes to the others; who finds no slot there must not be refused for what is only held, and
/// decides under the lock as well. What remains: a thread that is interrupted while it holds the lanes holds those up until it goes
/// on.
///
/// *A refusal* is told for a moment in which all lanes were as they were seen: all heads are looked at, then their slots, then the
/// heads again. If one has moved, somebody else was admitted or has given back, and everything is asked anew. For one request the
/// time is that of the lane whose next slot is free first; for n it is the n-th of all, lane by lane in the order of the heads.
///
/// *A refund* takes back, of some lane, the newest admission, if its stamp is the one in the permit. It may be another's: two
/// admissions of one instant are alike, and it makes no difference to anybody which of them goes. It steps back to the slot, but
/// two laps further on: the marks are the same there, and the head has risen. To everybody else the slot is now claimed and not yet
/// written, so it is its own until it writes, with the mark of the lap before, a stamp that is just old enough. A refund of more
/// than one finds all of them in one lane, or looks for them in all while they are held; it takes back all or nothing.
///
/// *Why it stays exact.* At any time there is for each slot a chain whose last admission is no newer than the slot says. Let a
/// refund of an admission P of time p find a slot that says p, of a chain that ends with E, no later than p. If P is the last of a
/// chain, E's or another's, the two chains change slots, and P leaves its chain: the one before P is no newer than p less a window,
/// which is what the slot says from now on. If another, Q, followed P in its chain, Q and what follows go behind E (Q is a window
/// later than p, so than E) and what was before P stays with the slot that was found. So it does not matter either that a slot
/// which was given back says more than is true: the stamp of a permit that has been overwritten may be found there.
///
/// *What pairs with what.* The head's compare-and-swap is `AcqRel` and its load `Acquire`, so whoever sees a head sees what its
/// makers saw: no slot that it passed is older to the reader than the mark says. Who holds a lane has read its head with `AcqRel`
/// and puts it back with `Release`, which passes that on. A stamp is stored with Release and loaded with Acquire, so whoever sees a
/// stamp sees the head that has passed it, and does not take a slot that is full for the next; and the second look at the heads
/// comes after the look at the slots.
#[derive(Debug)]
pub(super) struct SlidingWindowState {
    /// Stamps count nanoseconds from one window before this instant, so that zero is old enough from the start.
    start: u64,
    window: u64,
    lanes: Lanes,
    /// Of those who hold lanes.
    holding: Mutex<()>,
}

#[derive(Debug)]
enum Lanes {
    One(Lane),
    Many(Box<[Apart; LANES]>),
}

/// The alignment keeps neighbours (and the line that a prefetcher pulls along) apart.
#[derive(Debug)]
#[repr(align(128))]
struct Apart(Lane);

/// A ring, and the position of its next admission.
#[derive(Debug)]
struct Lane {
    head: AtomicU64,
    ring: Vec<AtomicU64>,
}

/// How many lanes a window has that has several; a power of two. A refusal looks at all of them.
#[cfg(not(all(test, portcullis_loom)))]
const LANES: usize = 8;
#[cfg(all(test, portcullis_loom))]
const LANES: usize = 2;

/// From so many slots on there are several lanes.
const WIDE: u32 = 64;

/// Room behind the ring of a lane, so that no line is shared with what lies behind it.
const GAP: usize = 16;

const INDEX_BITS: u32 = 24;

/// The bit of a head whose lane is held. It makes the index larger than that of any slot.
const HELD: u64 = 1 << INDEX_BITS;

/// From a position to the same in the next lap.
const LAP: u64 = HELD << 1;

/// The last time that is told from others.
const LATEST: u64 = u64::MAX >> 1;

/// The word of a slot that an admission of this stamp has written, in a lap of this parity.
#[inline]
fn slot(stamp: u64, odd: u64) -> u64 {
    stamp << 1 | odd
}

/// A number of slots as an index; the rings have at most 2²⁴.
#[inline]
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// A position on the endless walk round a ring, as a head has it; of a held head, none that is in the ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Position(u64);

impl Position {
    #[inline]
    fn index(self) -> usize {
        index(self.0 % LAP)
    }

    /// The parity of its lap.
    #[inline]
    fn odd(self) -> u64 {
        (self.0 / LAP) & 1
    }

    /// `n` slots on, at most one lap.
    #[inline]
    fn forward(self, n: usize, size: usize) -> Self {
        let lap = if self.index() + n < size { 0 } else { LAP - size as u64 };
        Self(self.0.wrapping_add(n as u64).wrapping_add(lap))
    }

    /// `n` slots back, at most one lap.
    fn backward(self, n: usize, size: usize) -> Self {
        let lap = if n <= self.index() { 0 } else { LAP - size as u64 };
        Self(self.0.wrapping_sub(n as u64).wrapping_sub(lap))
    }

    /// Where a refund of `n` puts the head: back, and two laps on.
    fn given_back(self, n: usize, size: usize) -> Self {
        Self(self.backward(n, size).0.wrapping_add(2 * LAP))
    }
}

/// What a refund needs to know of an admission: its stamp, and a bit that makes it no zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Admission(NonZeroU64);

impl Admission {
    #[inline]
    fn at(stamp: u64) -> Self {
        Self(NonZeroU64::new(stamp << 1 | 1).unwrap_or(NonZeroU64::MIN))
    }

    fn stamp(self) -> u64 {
        self.0.get() >> 1
    }
}

impl Lane {
    /// With so many slots that have never been used.
    fn new(size: usize, gap: usize) -> Self {
        let mut ring = Vec::with_capacity(size + gap);
        ring.extend((0..size).map(|_| AtomicU64::new(slot(0, 1))));
        let head = AtomicU64::new(Position::default().0);
        Self { head, ring }
    }

    #[inline]
    fn ring(&self) -> Ring<'_> {
        Ring(&self.ring)
    }

    /// Where the head stands, held or not.
    fn position(&self) -> Position {
        Position(self.head.load(Ordering::Acquire) & !HELD)
    }
}

#[derive(Debug, Clone, Copy)]
struct Ring<'a>(&'a [AtomicU64]);

impl Ring<'_> {
    #[inline]
    fn size(self) -> usize {
        self.0.len()
    }

    /// The stamp of the admission that a slot is to follow; more than any while that has not been written yet.
    #[inline]
    fn before(self, at: Position) -> u64 {
        // The bit of the lap before falls out, that of the same lap goes to the top.
        let word = self.0[at.index()].load(Ordering::Acquire);
        (word ^ at.odd() ^ 1).rotate_right(1)
    }

    /// How many slots from the head on are free, each before the next; no more than `most`. And the position behind them. Free are
    /// those whose stamps are no later than `old`.
    #[inline]
    fn free(self, head: Position, old: u64, most: usize) -> (usize, Position) {
        let (mut free, mut at) = (0, head);
        while free < most.min(self.size()) && self.before(at) <= old {
            free += 1;
            at = at.forward(1, self.size());
        }
        (free, at)
    }

    /// Writes the stamp of an admission into slots that it has claimed.
    #[inline]
    fn write(self, first: Position, n: usize, stamp: u64) {
        let mut at = first;
        for _ in 0..n {
            self.0[at.index()].store(slot(stamp, at.odd()), Ordering::Release);
            at = at.forward(1, self.size());
        }
    }

    /// How many slots before the head hold an admission of this stamp, with none of another between; no more than `most`.
    fn newest(self, head: Position, stamp: u64, most: usize) -> usize {
        let holds = |back: &usize| {
            let at = head.backward(*back, self.size());
            self.0[at.index()].load(Ordering::Acquire) == slot(stamp, at.odd())
        };
        (1..=most.min(self.size())).take_while(holds).count()
    }

    /// Writes into the `n` slots before a head, which a refund has made its own, that they are free for all whose windows begin
    /// after `old`.
    fn clear(self, head: Position, n: usize, old: u64) {
        for back in 1..=n {
            let at = head.backward(back, self.size());
            self.0[at.index()].store(slot(old, at.odd() ^ 1), Ordering::Release);
        }
    }
}

/// What a look at all lanes has shown.
enum Look {
    /// All lanes together have too few free slots, until then.
    Short(u64),
    /// Something has changed meanwhile.
    Moved,
    /// It takes all lanes to tell, or to admit.
    Hold,
}

impl SlidingWindowState {
    /// With one lane, or with several whose sizes differ by one at most.
    fn with_lanes(config: &SlidingWindow, lanes: usize, now: Timestamp) -> Self {
        let size = config.max_requests as usize;
        let lanes = if lanes == 1 {
            Lanes::One(Lane::new(size, 0))
        } else {
            let lane = |number| Apart(Lane::new((size + number) / LANES, GAP));
            Lanes::Many(Box::new(std::array::from_fn(lane)))
        };
        Self {
            start: now.nanos(),
            window: nanos(config.window),
            lanes,
            holding: Mutex::new(()),
        }
    }

    /// A lane by its number, which counts on from the first after the last.
    #[inline]
    fn lane(&self, number: usize) -> &Lane {
        match &self.lanes {
            Lanes::One(lane) => lane,
            Lanes::Many(lanes) => &lanes[number % LANES].0,
        }
    }

    /// How many lanes there are.
    fn count(&self) -> usize {
        match &self.lanes {
            Lanes::One(_) => 1,
            Lanes::Many(_) => LANES,
        }
    }

    /// All lanes, this one first.
    fn lanes_from(&self, first: usize) -> impl Iterator<Item = &Lane> {
        (0..self.count()).map(move |on| self.lane(first.wrapping_add(on)))
    }

    fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.lanes_from(0)
    }

    /// How many slots there are.
    fn quota(&self) -> usize {
        self.lanes().map(|lane| lane.ring().size()).sum()
    }

    /// A time as a stamp, which is one window at least.
    #[inline]
    fn stamp(&self, now: Timestamp) -> u64 {
        let elapsed = now.nanos().saturating_sub(self.start);
        elapsed.min(LATEST - self.window) + self.window
    }

    fn time(&self, stamp: u64) -> Timestamp {
        Timestamp::from_nanos(self.start.saturating_add(stamp.saturating_sub(self.window)))
    }

    /// When the slot at this position may be used again, as a stamp. One that is not written yet is taken for new.
    fn free_from(&self, lane: &Lane, at: Position, now: u64) -> u64 {
        let before = lane.ring().before(at);
        let last = if before > LATEST { now } else { before };
        last + self.window
    }

    /// Admits one request, if the next slot of the thread's own lane is free. Otherwise nothing has happened: [`take`](Self::take)
    /// knows the rest.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(super) fn take_one_at_a_glance(&self, now: Timestamp) -> Option<Admission> {
        let (lane, stamp) = (self.lane(stripe::thread_number()), self.stamp(now));
        self.take_from(lane, 1, stamp, now).then(|| Admission::at(stamp))
    }

    /// Admits `n` from this lane, if its next slots are free; otherwise nothing has happened.
    #[inline]
    fn take_from(&self, lane: &Lane, n: usize, stamp: u64, now: Timestamp) -> bool {
        let (ring, old) = (lane.ring(), stamp - self.window);
        loop {
            let head = Position(lane.head.load(Ordering::Acquire));
            let is_held = head.index() >= ring.size();
            if is_held {
                return false;
            }
            let (free, next) = ring.free(head, old, n);
            if free < n {
                return false;
            }
            let claimed = lane
                .head
                .compare_exchange_weak(head.0, next.0, Ordering::AcqRel, Ordering::Relaxed);
            if claimed.is_ok() {
                ring.write(head, n, stamp);
                return true;
            }
            back_off(now);
        }
    }

    /// Admits `cost` requests (no more than the quota), or tells when it will for a caller alone.
    pub(super) fn take(&self, cost: u32, now: Timestamp) -> Result<Admission, Timestamp> {
        self.take_beginning_with(stripe::thread_number(), cost, now)
    }

    /// [`take`](Self::take) for somebody whose own lane is this one.
    fn take_beginning_with(&self, own: usize, cost: u32, now: Timestamp) -> Result<Admission, Timestamp> {
        let (n, stamp) = (index(cost.into()), self.stamp(now));
        loop {
            if self.lanes_from(own).any(|lane| self.take_from(lane, n, stamp, now)) {
                return Ok(Admission::at(stamp));
            }
            match self.look(n, stamp) {
                Look::Short(until) => return Err(self.time(until)),
                Look::Moved => {}
                Look::Hold => {
                    let taken = self.take_from_all(own, n, stamp);
                    return taken.map(|()| Admission::at(stamp)).map_err(|until| self.time(until));
                }
            }
        }
    }

    /// Whether all lanes together have `n` free slots.
    fn look(&self, n: usize, stamp: u64) -> Look {
        let mut heads = [Position::default(); LANES];
        for (head, lane) in heads.iter_mut().zip(self.lanes()) {
            *head = Position(lane.head.load(Ordering::Acquire));
            if head.0 & HELD != 0 {
                return Look::Hold;
            }
        }
        let until = Merged::new(self, heads, stamp).advance_one_by_one(n);
        let moved = |(head, lane): (Position, &Lane)| lane.head.load(Ordering::Acquire) != head.0;
        if heads.into_iter().zip(self.lanes()).any(moved) {
            Look::Moved
        } else if stamp < until {
            Look::Short(until)
        } else if n > 1 && self.count() > 1 {
            Look::Hold
        } else {
            Look::Moved
        }
    }

    /// Runs a step while nobody else moves any head. It is shown where they stand, and they will stand where it puts them.
    fn hold<T>(&self, step: impl FnOnce(&mut [Position; LANES]) -> T) -> T {
        let guard = self.holding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut heads = [Position::default(); LANES];
        for (head, lane) in heads.iter_mut().zip(self.lanes()) {
            *head = Position(lane.head.fetch_or(HELD, Ordering::AcqRel));
        }
        let done = step(&mut heads);
        for (head, lane) in heads.iter().zip(self.lanes()) {
            lane.head.store(head.0, Ordering::Release);
        }
        drop(guard);
        done
    }

    /// Admits `n` from as many lanes as it takes, or tells when it will be.
    #[cold]
    fn take_from_all(&self, own: usize, n: usize, stamp: u64) -> Result<(), u64> {
        self.hold(|heads| {
            let until = Merged::new(self, *heads, stamp).advance_one_by_one(n);
            if stamp < until {
                return Err(until);
            }
            let mut left = n;
            for number in (0..self.count()).map(|on| own.wrapping_add(on) % self.count()) {
                let (lane, head) = (self.lane(number), &mut heads[number]);
                let (free, next) = lane.ring().free(*head, stamp - self.window, left);
                lane.ring().write(*head, free, stamp);
                *head = next;
                left -= free;
            }
            Ok(())
        })
    }

    /// Takes an admission back if it, or one of the same instant, is the newest of a lane; if its cost was met from several, of each.
    /// `false` if others have come since, and it stays.
    pub(super) fn give_back(&self, admission: Admission, cost: u32) -> bool {
        self.give_back_beginning_with(stripe::thread_number(), admission, cost)
    }

    /// [`give_back`](Self::give_back) for somebody whose own lane is this one.
    fn give_back_beginning_with(&self, own: usize, admission: Admission, cost: u32) -> bool {
        let (n, stamp) = (index(cost.into()), admission.stamp());
        let (mut newest, mut held) = (0, false);
        for lane in self.lanes_from(own) {
            match self.give_back_to(lane, n, stamp) {
                Ok(()) => return true,
                Err(Some(found)) => newest += found,
                Err(None) => held = true,
            }
        }
        (held || newest >= n) && self.give_back_to_all(n, stamp)
    }

    /// Takes back `n` of this stamp that are the newest of a lane. Or tells how many are; nothing if the lane is held.
    fn give_back_to(&self, lane: &Lane, n: usize, stamp: u64) -> Result<(), Option<usize>> {
        loop {
            let head = Position(lane.head.load(Ordering::Acquire));
            if head.0 & HELD != 0 {
                return Err(None);
            }
            let newest = lane.ring().newest(head, stamp, n);
            if newest < n {
                // What was seen of the slots may be newer than the head.
                if lane.head.load(Ordering::Acquire) != head.0 {
                    continue;
                }
                return Err(Some(newest));
            }
            let back = head.given_back(n, lane.ring().size());
            let claimed = lane
                .head
                .compare_exchange(head.0, back.0, Ordering::AcqRel, Ordering::Relaxed);
            if claimed.is_ok() {
                lane.ring().clear(head, n, stamp - self.window);
                return Ok(());
            }
        }
    }

    /// Takes back `n` of this stamp from as many lanes as it takes.
    #[cold]
    fn give_back_to_all(&self, n: usize, stamp: u64) -> bool {
        self.hold(|heads| {
            let mut left = n;
            let mut newest = [0; LANES];
            for ((newest, head), lane) in newest.iter_mut().zip(&*heads).zip(self.lanes()) {
                *newest = lane.ring().newest(*head, stamp, left);
                left -= *newest;
            }
            if left > 0 {
                return false;
            }
            for ((head, lane), n) in heads.iter_mut().zip(self.lanes()).zip(newest) {
                if n > 0 {
                    lane.ring().clear(*head, n, stamp - self.window);
                    *head = head.given_back(n, lane.ring().size());
                }
            }
            true
        })
    }

    /// The slots of all lanes from where the heads stand now.
    fn merged(&self, stamp: u64) -> Merged<'_> {
        let mut heads = [Position::default(); LANES];
        for (head, lane) in heads.iter_mut().zip(self.lanes()) {
            *head = lane.position();
        }
        Merged::new(self, heads, stamp)
    }

    /// When `cost` more admissions will have found room, one after the other; may be more than the quota.
    pub(super) fn due(&self, cost: u64, now: Timestamp) -> Timestamp {
        let Some(ahead) = cost.checked_sub(1) else {
            return now;
        };
        let (stamp, quota) = (self.stamp(now), self.quota() as u64);
        let (laps, slot) = (ahead / quota, ahead % quota);
        let free = self.merged(stamp).advance(index(slot + 1)).max(stamp);
        self.time(free.saturating_add(self.window.saturating_mul(laps)))
    }

    /// When `cost` requests at once would be admitted after those that wait already, each at once, in this order. Follows the
    /// slots into the future: O(waiters).
    pub(super) fn due_behind(&self, ahead: impl Iterator<Item = u32>, cost: u32, now: Timestamp) -> Timestamp {
        let stamp = self.stamp(now);
        // The slots as they are, in the order in which they become free; then as the waiters will have left them. Which of several
        // free ones a waiter takes is all the same to the next.
        let (mut old, mut left, mut future) = (self.merged(stamp), self.quota(), VecDeque::new());
        let mut at = stamp;
        for cost in ahead.chain([cost]) {
            let mut slots = index(cost.into());
            let of_old = slots.min(left);
            if of_old > 0 {
                left -= of_old;
                slots -= of_old;
                at = at.max(old.advance(of_old));
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
        let until = self.merged(self.stamp(now)).advance_one_by_one(index(cost.into()));
        self.time(until).max(now)
    }

    /// When the latest admission is one window old; now or later.
    pub(super) fn full_again(&self, now: Timestamp) -> Timestamp {
        let stamp = self.stamp(now);
        let latest = self.lanes().map(|lane| {
            // One before the head; seen from a lap later, it is the one to follow.
            let (ring, size) = (lane.ring(), lane.ring().size());
            let latest = lane.position().backward(1, size).forward(size, size);
            match ring.before(latest) {
                unwritten if unwritten > LATEST => stamp,
                written => written,
            }
        });
        let latest = latest.max().unwrap_or(0);
        self.time(latest + self.window).max(now)
    }

    /// How many requests would be admitted now. Stamps rise along a ring, but for threads that lie behind: a binary search in each.
    pub(super) fn available(&self, now: Timestamp) -> usize {
        let stamp = self.stamp(now);
        let free_in = |lane: &Lane| {
            let (ring, head, size) = (lane.ring(), lane.position(), lane.ring().size());
            let is_free = |n| ring.before(head.forward(n, size)) <= stamp - self.window;
            // The first of them first: where stamps do not rise, others behind it may be free already and have to wait for it.
            if !is_free(0) {
                return 0;
            }
            let (mut free, mut beyond) = (1, size);
            while free < beyond {
                let middle = free.midpoint(beyond);
                if is_free(middle) {
                    free = middle + 1;
                } else {
                    beyond = middle;
                }
            }
            free
        };
        self.lanes().map(free_in).sum()
    }
}

/// The slots of all lanes, merged into the order in which they become free: in each lane none before those ahead of it.
struct Merged<'a> {
    window: &'a SlidingWindowState,
    now: u64,
    heads: [Position; LANES],
    /// How many of each lane are behind us, and when the last of them is free.
    passed: [(usize, u64); LANES],
}

impl<'a> Merged<'a> {
    fn new(window: &'a SlidingWindowState, heads: [Position; LANES], now: u64) -> Self {
        let passed = [(0, 0); LANES];
        Self {
            window,
            now,
            heads,
            passed,
        }
    }

    /// Passes `n` more slots, each looked at, and tells when all that were passed are free.
    fn advance_one_by_one(&mut self, n: usize) -> u64 {
        (0..n).fold(0, |latest, _| self.pass(1).map_or(latest, |(_, at)| latest.max(at)))
    }

    /// The same without a look at each, for as far as it may be: O(log n).
    ///
    /// Of the lanes that are each asked for as many as their share of n, the one whose last of them is free first has none among
    /// them that is not one of the next n.
    fn advance(&mut self, n: usize) -> u64 {
        let (mut left, mut latest) = (n, 0);
        while left > 0
            && let Some((passed, at)) = self.pass(left.div_ceil(self.window.count()))
        {
            left -= passed;
            latest = latest.max(at);
        }
        latest
    }

    /// Passes up to `n` slots of the lane where the last of them is free first: how many, and when.
    fn pass(&mut self, n: usize) -> Option<(usize, u64)> {
        let next = |number: usize| {
            let (lane, (passed, until)) = (self.window.lane(number), self.passed[number]);
            let size = lane.ring().size();
            let n = n.min(size - passed);
            let last = (passed + n).checked_sub(1).filter(|_| n > 0)?;
            let free = self
                .window
                .free_from(lane, self.heads[number].forward(last, size), self.now);
            Some((free.max(until), number, n))
        };
        let (at, number, n) = (0..self.window.count()).filter_map(next).min()?;
        self.passed[number] = (self.passed[number].0 + n, at);
        Some((n, at))
    }
}

#[cfg(all(test, portcullis_loom))]
mod model {
    use super::*;
    use crate::sync::{explore, spawn};
    use std::sync::Arc;

    const NOW: u64 = 1 << 62;

    /// A window of a second, with so many slots in so many lanes.
    fn window(slots: u32, lanes: usize) -> Arc<SlidingWindowState> {
        let config = SlidingWindow::new(slots, Duration::from_secs(1));
        Arc::new(SlidingWindowState::with_lanes(
            &config,
            lanes,
            Timestamp::from_nanos(NOW),
        ))
    }

    fn after(nanos: u64) -> Timestamp {
        Timestamp::from_nanos(NOW + nanos)
    }

    /// As a call of a thread takes it whose lane is this: at a glance, or else by a closer look.
    fn take(window: &SlidingWindowState, own: usize, now: Timestamp) -> Option<Admission> {
        let stamp = window.stamp(now);
        if window.take_from(window.lane(own), 1, stamp, now) {
            return Some(Admission::at(stamp));
        }
        window.take_beginning_with(own, 1, now).ok()
    }

    fn take_all(window: &SlidingWindowState, own: usize, cost: u32, now: Timestamp) -> Option<Admission> {
        window.take_beginning_with(own, cost, now).ok()
    }

    /// How many more are admitted.
    fn left(window: &SlidingWindowState, now: Timestamp) -> usize {
        let left = window.available(now);
        let admitted = std::iter::from_fn(|| take(window, 0, now)).count();
        assert_eq!(left, admitted, "what is shown is there");
        admitted
    }

    /// The same window, one window later: whatever happened, no slot was lost and none came to it.
    fn is_whole(window: &SlidingWindowState, slots: usize) {
        assert_eq!(left(window, after(2_000_000_000)), slots, "all are back");
    }

    #[test]
    fn two_threads_share_the_slots_of_a_window() {
        for (slots, lanes) in [(1, 1), (2, 1), (2, 2), (3, 2)] {
            explore("two threads take two each", 2, move || {
                let window = window(slots, lanes);
                let other = window.clone();
                let two = |window: &SlidingWindowState, own| {
                    let taken = [take(window, own, after(0)), take(window, own, after(1))];
                    taken.into_iter().flatten().count()
                };
                let takes = spawn(move || two(&other, 1));
                let mine = two(&window, 0);
                assert_eq!(mine + takes.join().unwrap(), slots as usize, "the quota and no more");
                assert!(take(&window, 0, after(999_999_999)).is_none(), "none is a window old");
                let next: Vec<_> = (0..slots).map(|_| take(&window, 1, after(1_000_000_001))).collect();
                assert!(next.iter().all(Option::is_some), "now they are, and none was lost");
            });
        }
    }

    #[test]
    fn a_thread_whose_lane_is_full_takes_from_the_other_without_a_slot_too_many() {
        explore("two take from the same lane, of which one steals", 3, || {
            let window = window(2, 2);
            take(&window, 0, after(0)).expect("a free slot");
            let other = window.clone();
            let steals = spawn(move || take(&other, 0, after(0)).is_some());
            let mine = take(&window, 1, after(0)).is_some();
            assert!(mine ^ steals.join().unwrap(), "one slot was left");
            assert_eq!(left(&window, after(999_999_999)), 0);
            is_whole(&window, 2);
        });
    }

    #[test]
    fn a_cost_of_two_takes_both_slots_or_none() {
        for lanes in [1, 2] {
            explore("one takes two at once, one takes one", 3, move || {
                let window = window(2, lanes);
                let other = window.clone();
                let takes = spawn(move || take_all(&other, 1, 2, after(0)).is_some());
                let one = take(&window, 0, after(0)).is_some();
                let two = takes.join().unwrap();
                assert!(one ^ two, "one of them, whole");
                assert_eq!(left(&window, after(0)), usize::from(one));
                is_whole(&window, 2);
            });
        }
    }

    #[test]
    fn of_two_that_want_both_slots_one_gets_them() {
        for lanes in [1, 2] {
            explore("two take two at once", 3, move || {
                let window = window(2, lanes);
                let other = window.clone();
                let takes = spawn(move || take_all(&other, 1, 2, after(0)).is_some());
                let mine = take_all(&window, 0, 2, after(0)).is_some();
                assert!(mine ^ takes.join().unwrap(), "one of them, whole");
                is_whole(&window, 2);
            });
        }
    }

    #[test]
    fn who_finds_every_lane_held_for_nothing_is_not_refused() {
        explore("one is refused a cost of two, one takes the last slot", 3, || {
            let window = window(2, 2);
            take(&window, 0, after(0)).expect("a free slot");
            let other = window.clone();
            let refused = spawn(move || other.take_from_all(1, 2, other.stamp(after(0))).is_err());
            assert!(take(&window, 0, after(0)).is_some(), "there was one all the time");
            assert!(refused.join().unwrap(), "there were never two");
            is_whole(&window, 2);
        });
    }

    #[test]
    fn a_slot_that_is_given_back_is_free_once() {
        for (slots, lanes) in [(1, 1), (2, 2)] {
            explore("one gives back, one takes", 3, move || {
                let window = window(slots, lanes);
                let admission = take(&window, 0, after(0)).expect("a free slot");
                if lanes > 1 {
                    take(&window, 1, after(1)).expect("a free slot");
                }
                let other = window.clone();
                let takes = spawn(move || take(&other, 1, after(1)).is_some());
                let returned = window.give_back_beginning_with(1, admission, 1);
                let taken = takes.join().unwrap();
                assert!(returned, "it is the newest of its lane");
                let left = take(&window, 0, after(1)).is_some();
                assert!(taken ^ left, "the slot was free for one more, and only one");
                is_whole(&window, slots as usize);
            });
        }
    }

    #[test]
    fn a_cost_of_two_that_is_given_back_is_free_once() {
        for lanes in [1, 2] {
            explore("one gives two back, one takes one", 3, move || {
                let window = window(2, lanes);
                let both = take_all(&window, 0, 2, after(0)).expect("free slots");
                let other = window.clone();
                let takes = spawn(move || take(&other, 1, after(1)).is_some());
                assert!(window.give_back_beginning_with(0, both, 2), "they are the newest");
                let taken = takes.join().unwrap();
                assert_eq!(left(&window, after(1)), 2 - usize::from(taken), "each is free once");
                is_whole(&window, 2);
            });
        }
    }

    #[test]
    fn two_refunds_of_one_instant_take_back_one_each() {
        for (slots, lanes) in [(2, 1), (2, 2), (4, 2)] {
            explore("two give back what they took at one time", 2, move || {
                let window = window(slots, lanes);
                let admissions = [0, 1].map(|own| take(&window, own, after(0)).expect("a free slot"));
                assert_eq!(admissions[0], admissions[1], "they are alike");
                let other = window.clone();
                let gives = spawn(move || other.give_back_beginning_with(0, admissions[0], 1));
                let mine = window.give_back_beginning_with(0, admissions[1], 1);
                assert!(gives.join().unwrap() && mine, "nobody came later");
                assert_eq!(left(&window, after(0)), slots as usize, "each once");
                is_whole(&window, slots as usize);
            });
        }
    }

    #[test]
    fn a_refund_that_finds_its_lane_held_is_none_the_less_made() {
        explore("one wants both slots, one gives one back", 2, || {
            let window = window(2, 2);
            let admission = take(&window, 0, after(0)).expect("a free slot");
            let other = window.clone();
            let takes = spawn(move || take_all(&other, 1, 2, after(1)).is_some());
            assert!(window.give_back_beginning_with(0, admission, 1), "it is the newest");
            let taken = takes.join().unwrap();
            let left = left(&window, after(1));
            assert!(left == 0 && taken || left == 2 && !taken, "whole or not at all");
            is_whole(&window, 2);
        });
    }

    #[test]
    fn a_refund_that_comes_too_late_and_finds_its_lane_held_is_not_made() {
        explore("one wants both slots, one gives back what another followed", 2, || {
            let window = window(2, 2);
            let stale = take(&window, 0, after(0)).expect("a free slot");
            let later = after(1_000_000_000);
            take(&window, 0, later).expect("a window later");
            let other = window.clone();
            let refused = spawn(move || other.take_from_all(1, 2, other.stamp(later)).is_err());
            assert!(!window.give_back_beginning_with(0, stale, 1), "its slot is another's");
            assert!(refused.join().unwrap(), "there were never two");
            assert_eq!(left(&window, later), 1);
        });
    }

    #[test]
    fn what_is_claimed_and_not_written_yet_counts_from_now() {
        explore("one takes the only slot, one asks when it is free", 3, || {
            let window = window(1, 1);
            let other = window.clone();
            let takes = spawn(move || take(&other, 0, after(0)).is_some());
            let mine = window.take_beginning_with(0, 1, after(0));
            // It is one's or the other's by now.
            assert_eq!(window.full_again(after(0)), after(1_000_000_000));
            assert!(mine.is_ok() ^ takes.join().unwrap(), "exactly one of them");
            if let Err(until) = mine {
                assert_eq!(until, after(1_000_000_000));
            }
        });
    }

    #[test]
    fn a_slot_that_is_taken_and_given_back_under_a_taker_is_not_taken_twice() {
        for (slots, lanes) in [(1, 1), (2, 2)] {
            explore("one takes and gives back, one takes", 3, move || {
                let window = window(slots, lanes);
                let other = window.clone();
                let gives_back = spawn(move || {
                    let taken = take(&other, 0, after(0));
                    taken.is_none_or(|admission| other.give_back_beginning_with(0, admission, 1))
                });
                let taken = take(&window, 0, after(0)).is_some();
                assert!(gives_back.join().unwrap(), "nobody came later");
                assert_eq!(left(&window, after(0)), slots as usize - usize::from(taken));
                is_whole(&window, slots as usize);
            });
        }
    }

    #[test]
    fn who_looks_at_one_lane_after_the_other_does_not_miss_the_slot_that_moves() {
        explore("one slot comes back before the other goes", 3, || {
            let window = window(2, 2);
            let admission = take(&window, 0, after(0)).expect("a free slot");
            let other = window.clone();
            let moves = spawn(move || {
                assert!(other.give_back_beginning_with(0, admission, 1), "it is the newest");
                take(&other, 1, after(0)).is_some()
            });
            let look = window.look(1, window.stamp(after(0)));
            assert!(!matches!(look, Look::Short(_)), "there was one all the time");
            assert!(moves.join().unwrap(), "and it was the other's");
            is_whole(&window, 2);
        });
    }
}
