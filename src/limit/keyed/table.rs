//! Token buckets by fingerprint, found and used without a lock.
//!
//! All that a bucket is are two words, so a key needs no object of its own: it has a *slot* of 32 bytes, and a slot, once made,
//! stays where it is for as long as the table. What moves are *links*, places of slots in 32 bits.
//!
//! # Finding
//!
//! The table is a linear hash table: as many chains as slots, and with each slot that is made one chain is split in two.
//! So it grows by a step with each key, moves no bucket, and never stands still. Slots lie in *segments*, each an eighth of a power
//! of two, that are allocated when they are needed. A link tells segment and offset, so that nobody has to work them out, and
//! four bits of the fingerprint it leads to: who walks a chain touches links, and hardly ever a slot but the one it looks for.
//!
//! Each power of two has an array with the heads of its chains. While chains are split their heads move from one array to the next,
//! both of which are known before the fingerprint is. The smaller arrays stay: together they are as large as the last.
//!
//! Links are changed under the books, one mutex for the table, and read without. Who walks while a chain is split or a slot
//! leaves it may be led into another chain, and miss a key that is there. So a hit is trusted and a miss is not: it is
//! asked for again under the books. A walk that is led in circles is a miss after so many steps.
//!
//! # Taking
//!
//! A slot belongs to one key after another, and each time is a *life* of the slot. Who uses a bucket without the books
//!
//! 1. reads `gone`, and after it the number of the life, `touched` and `owner`,
//! 2. computes what will be gone, and
//! 3. exchanges `gone`, which fails unless it is what was read.
//!
//! Lives are told apart by `gone` itself: each counts its units from a base of its own, so that what one life has written is not
//! found again in the next. (The bases of two lives, *n* apart, differ by at least 2⁶² / *n* units. For an exchange to take the one
//! for the other a thread would have to stand still between the first step and the third while so many are made, and then to meet
//! exactly this value of 2⁶⁴.) Hence an exchange that succeeds proves that the life has lasted from the first step to the third.
//!
//! A life ends and the next begins under the books, in this order:
//!
//! 1. `owner` becomes nobody;
//! 2. `gone` is exchanged for a value that no bucket has, if it is still the one that was seen to be a whole quota. If it is not,
//!    somebody has taken a token meanwhile: the owner is put back, and the key looked at anew;
//! 3. the new life's number, `touched` and `gone` are written, and its first token is taken;
//! 4. `owner` becomes the new key.
//!
//! So whoever takes a token of the old life does it before the second step, which then fails: no token is lost, and none is handed
//! back. Whoever has read a `gone` of the second step or later sees in `owner` nobody or the new key (the exchange releases, and
//! reading `gone` acquires), and whoever sees the new key there cannot succeed with a `gone` from before the fourth step. A key
//! whose owner has not been put back yet is missed, and waits for the books like a new one.
//!
//! What is more than one exchange of `gone` is done under the books, where no life ends, in the slot itself: touching a
//! bucket ([`Bucket`](super::super::bucket::Bucket) says when), and what others got in the way of too often.
//!
//! The rejections of a key are counted in one word with the life's number, so that none is counted for the next key.
//!
//! # Memory
//!
//! For each slot 32 bytes, 4 for its link and 12 among the books, an eighth more at most while the last segment fills; and for the
//! heads 8 to 16.

use super::super::{
    algorithm::View,
    backoff::back_off,
    bucket::{Level, Line},
    token_bucket::TokenBucketShape,
};
use super::LOOKS;
use crate::{
    clock::Timestamp,
    sync::{
        Mutex, MutexGuard, OnceLock, array,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, binary_heap::PeekMut},
    sync::{Arc, PoisonError},
};

/// How often somebody tries before it takes the books.
const ATTEMPTS: u32 = 4;

/// How far a walk goes that may have been led in circles. Chains have one link each on average, and hardly ever ten.
const LONGEST_WALK: usize = 32;

const MADE: &str = "made before it was linked to";

/// No key's fingerprint.
const NOBODY: u64 = 0;

/// How far the bases of two lives lie apart: 2⁶⁴ by the golden ratio, multiples of which are as far from each other as can be.
const BETWEEN_LIVES: u64 = 0x9E37_79B9_7F4A_7C15;

/// What is written by few and read by many, and what is written by many, apart from each other.
#[repr(align(128))]
#[derive(Default)]
struct Apart<T>(T);

pub(super) struct Table {
    shape: TokenBucketShape,
    max_keys: u32,
    /// None before the first.
    segments: Box<[OnceLock<Segment>]>,
    /// Links to the first slot of each chain, by the power of two.
    heads: [OnceLock<Heads>; POWERS],
    /// How many chains there are, as [`Chains`]: as many as slots, and no fewer than the fewest.
    chains: Apart<AtomicU64>,
    books: Apart<Mutex<Books>>,
}

struct Segment {
    slots: Box<[Slot]>,
    /// Links from each slot to the next of its chain.
    next: Box<[AtomicU32]>,
}

#[repr(align(32))]
struct Slot {
    /// The fingerprint of the key whose bucket this is.
    owner: AtomicU64,
    level: Level,
    /// The number of the life in the upper half, the key's rejections in the lower.
    tally: AtomicU64,
}

/// What has to be seen and changed together.
#[derive(Default)]
struct Books {
    /// Every tracked key's slot once, with a time before which it was not idle: it may have been used since, and is not idle yet then.
    idle_from: BinaryHeap<Reverse<Due>>,
    /// How many slots have been made.
    made: u32,
    /// One that has been made and is nobody's.
    vacant: Option<Spot>,
    evicted: u64,
}

/// A time and a slot in twelve bytes, the earlier the less.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Due([u32; 3]);

impl Due {
    #[expect(clippy::cast_possible_truncation, reason = "both halves are kept")]
    fn new(at: Timestamp, slot: Spot) -> Self {
        let nanos = at.nanos();
        Self([(nanos >> 32) as u32, nanos as u32, slot.0])
    }

    fn at(&self) -> Timestamp {
        Timestamp::from_nanos(u64::from(self.0[0]) << 32 | u64::from(self.0[1]))
    }

    fn slot(&self) -> Spot {
        Spot(self.0[2])
    }
}

/// Where a slot lies: the number of its segment, from one on, in the upper eight bits, and which of the segment's it is in the
/// lower twenty.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Spot(u32);

const SEGMENT_SHIFT: u32 = 24;
const OFFSET: u32 = (1 << 20) - 1;

/// Segments are eighths of powers of two: the first eight have as many slots together as come before the ninth.
const FIRST: u32 = 16;

impl Spot {
    /// Of the slot with this number.
    fn of(number: u32) -> Self {
        let from_zero = number + FIRST;
        let power = from_zero.ilog2();
        let eighth = power - 3;
        let segment = 8 * (power - FIRST.ilog2()) + (from_zero >> eighth) - 8;
        Self((segment + 1) << SEGMENT_SHIFT | from_zero & ((1 << eighth) - 1))
    }

    /// Its segment, from one on.
    #[inline]
    fn segment(self) -> usize {
        (self.0 >> SEGMENT_SHIFT) as usize
    }

    #[inline]
    fn offset(self) -> usize {
        (self.0 & OFFSET) as usize
    }
}

/// The number of the first slot of a segment, counted from zero.
fn first_of(segment: usize) -> usize {
    ((8 + segment % 8) << (segment / 8 + FIRST.ilog2() as usize - 3)) - FIRST as usize
}

/// A spot, and between its halves four bits of the fingerprint of who is there; or zero, the end of a chain.
#[derive(Clone, Copy)]
struct Link(u32);

impl Link {
    const TAG: u32 = 0xF << 20;

    fn new(slot: Spot, fingerprint: u64) -> Self {
        Self(Self::tag(fingerprint) | slot.0)
    }

    #[inline]
    fn tag(fingerprint: u64) -> u32 {
        (fingerprint >> 32) as u32 & Self::TAG
    }

    #[inline]
    fn slot(self) -> Option<Spot> {
        (self.0 != 0).then_some(Spot(self.0 & !Self::TAG))
    }

    #[inline]
    fn may_be_of(self, fingerprint: u64) -> bool {
        (self.0 ^ Self::tag(fingerprint)) & Self::TAG == 0
    }
}

/// How many chains there are at least: so few in a model that it can split one.
const FEWEST_CHAINS: u32 = if cfg!(all(test, portcullis_loom)) { 2 } else { 64 };
const POWERS: usize = 24 - FEWEST_CHAINS.ilog2() as usize + 1;

/// Heads of chains, while there are more chains than half a power of two and no more than the whole.
struct Heads {
    /// Of the chains that have been split.
    whole: Arc<[AtomicU32]>,
    /// Of all others: the `whole` of the power before.
    half: Arc<[AtomicU32]>,
}

/// How many chains there are: so many of the half have been split, of this power of two, counted from the fewest.
#[derive(Clone, Copy)]
struct Chains(u64);

impl Chains {
    const FEWEST: Self = Self(FEWEST_CHAINS as u64 / 2);

    fn of(count: u32) -> Self {
        let whole = count.next_power_of_two();
        let power = whole.ilog2() - FEWEST_CHAINS.ilog2();
        Self(u64::from(power) << 32 | u64::from(count - whole / 2))
    }

    #[inline]
    fn power(self) -> usize {
        (self.0 >> 32) as usize
    }

    #[inline]
    fn split(self) -> usize {
        (self.0 & 0xFFFF_FFFF) as usize
    }
}

impl Slot {
    fn life(tally: u64) -> u64 {
        tally >> 32
    }
}

/// What the first step of a taker has read.
struct Seen {
    gone: u64,
    touched: u64,
    line: Line,
}

impl Table {
    pub(super) fn new(shape: TokenBucketShape, max_keys: usize) -> Self {
        let max_keys = u32::try_from(max_keys).unwrap_or(u32::MAX);
        let segments = Spot::of(max_keys - 1).segment() + 1;
        Self {
            shape,
            max_keys,
            segments: std::iter::repeat_with(OnceLock::new).take(segments).collect(),
            heads: array![OnceLock::new(); POWERS],
            chains: Apart(AtomicU64::new(Chains::FEWEST.0)),
            books: Apart::default(),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn segment(&self, slot: Spot) -> Option<&Segment> {
        self.segments.get(slot.segment())?.get()
    }

    #[inline]
    fn head(&self, fingerprint: u64) -> Option<&AtomicU32> {
        let chains = Chains(self.chains.0.load(Ordering::Acquire));
        let heads = self.heads.get(chains.power())?.get()?;
        let low = (fingerprint & 0xFFFF_FFFF) as usize;
        let (in_whole, in_half) = (low & (heads.whole.len() - 1), low & (heads.half.len() - 1));
        let is_split = in_half < chains.split();
        let (heads, at) = if is_split {
            (&heads.whole, in_whole)
        } else {
            (&heads.half, in_half)
        };
        heads.get(at)
    }

    fn made_slot(&self, slot: Spot) -> &Slot {
        let segment = self.segment(slot).expect(MADE);
        &segment.slots[slot.offset()]
    }

    fn next_of(&self, slot: Spot) -> &AtomicU32 {
        let segment = self.segment(slot).expect(MADE);
        &segment.next[slot.offset()]
    }

    fn made_head(&self, fingerprint: u64) -> &AtomicU32 {
        self.head(fingerprint).expect(MADE)
    }

    /// The slot of a key, no further than so many links away. Without the books it may be missed.
    #[inline]
    fn find(&self, fingerprint: u64, walk: usize) -> Option<&Slot> {
        let mut link = Link(self.head(fingerprint)?.load(Ordering::Acquire));
        for _ in 0..walk {
            let place = link.slot()?;
            let segment = self.segment(place)?;
            if link.may_be_of(fingerprint) {
                let slot = segment.slots.get(place.offset())?;
                if slot.owner.load(Ordering::Acquire) == fingerprint {
                    return Some(slot);
                }
            }
            link = Link(segment.next.get(place.offset())?.load(Ordering::Acquire));
        }
        None
    }

    /// The line of units of a life.
    #[inline]
    fn line(&self, life: u64) -> Line {
        let first = *self.shape.line();
        Line {
            base: first.base.wrapping_add(Self::offset(life)),
            ..first
        }
    }

    /// How far a life's base lies from the first one's.
    #[inline]
    fn offset(life: u64) -> u64 {
        life.wrapping_mul(BETWEEN_LIVES)
    }

    /// The first step of a taker, if the slot is the key's.
    #[inline]
    fn see(&self, slot: &Slot, fingerprint: u64) -> Option<Seen> {
        // First: what is read after it is of the same life or of a later one, and then it will have changed.
        let gone = slot.level.gone().load(Ordering::Acquire);
        let life = Slot::life(slot.tally.load(Ordering::Acquire));
        let touched = slot.level.touched().load(Ordering::Acquire);
        (slot.owner.load(Ordering::Acquire) == fingerprint).then(|| Seen {
            gone,
            touched,
            line: self.line(life),
        })
    }

    /// Takes one token of a key that is tracked, if that takes no more than a look. Otherwise nothing has happened.
    #[inline]
    pub(super) fn take_one_at_a_glance(&self, fingerprint: u64, now: impl FnOnce() -> Timestamp) -> bool {
        let Some(slot) = self.find(fingerprint, LONGEST_WALK) else {
            return false;
        };
        let now = now();
        for _ in 0..ATTEMPTS {
            let Some(seen) = self.see(slot, fingerprint) else {
                return false;
            };
            let scale = self.shape.scale();
            let Some(with) = scale.one_gone(&seen.line, seen.gone, seen.touched, now) else {
                return false;
            };
            let gone = slot.level.gone();
            if gone
                .compare_exchange_weak(seen.gone, with, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                return true;
            }
            back_off(now);
        }
        false
    }

    /// Runs a step on a key's bucket without the books, if that takes no more than one exchange.
    fn attempt<T>(&self, fingerprint: u64, step: &impl Fn(View<'_>) -> T) -> Option<T> {
        let slot = self.find(fingerprint, LONGEST_WALK)?;
        for _ in 0..ATTEMPTS {
            let seen = self.see(slot, fingerprint)?;
            // On a copy, so that what the step reads and what it writes are of one life.
            let copy = Level::new(seen.gone, seen.touched);
            let done = step(View::TokenBucket(self.shape.on(&copy, &seen.line)));
            if copy.touched().load(Ordering::Relaxed) != seen.touched {
                return None;
            }
            let gone = slot.level.gone();
            let with = copy.gone().load(Ordering::Relaxed);
            let stands = if with == seen.gone {
                gone.load(Ordering::Acquire) == seen.gone
            } else {
                let exchanged = gone.compare_exchange(seen.gone, with, Ordering::AcqRel, Ordering::Relaxed);
                exchanged.is_ok()
            };
            if stands {
                return Some(done);
            }
        }
        None
    }

    /// Runs a step on the bucket in this slot, whose life does not end meanwhile: the caller has the books.
    fn step<T>(&self, slot: &Slot, step: impl FnOnce(View<'_>) -> T) -> T {
        let line = self.line(Slot::life(slot.tally.load(Ordering::Relaxed)));
        step(View::TokenBucket(self.shape.on(&slot.level, &line)))
    }

    /// Runs a step on a key's bucket, if it is tracked. It may run more than once, and what it answers last counts.
    pub(super) fn with<T>(&self, fingerprint: u64, step: impl Fn(View<'_>) -> T) -> Option<T> {
        if let Some(done) = self.attempt(fingerprint, &step) {
            return Some(done);
        }
        let _books = self.books();
        let slot = self.find(fingerprint, usize::MAX)?;
        Some(self.step(slot, step))
    }

    /// The same; a new key is added, unless there is no room for it.
    pub(super) fn with_or_add<T>(&self, fingerprint: u64, now: Timestamp, step: impl Fn(View<'_>) -> T) -> Option<T> {
        if let Some(done) = self.attempt(fingerprint, &step) {
            return Some(done);
        }
        let mut books = self.books();
        if let Some(slot) = self.find(fingerprint, usize::MAX) {
            return Some(self.step(slot, step));
        }
        let place = self.vacancy(&mut books, now)?;
        let slot = self.made_slot(place);
        let life = Slot::life(slot.tally.load(Ordering::Relaxed).wrapping_add(1 << 32));
        let full = Level::full(self.shape.line());
        slot.tally.store(life << 32, Ordering::Release);
        slot.level
            .touched()
            .store(full.touched().load(Ordering::Relaxed), Ordering::Release);
        let gone = full.gone().load(Ordering::Relaxed);
        slot.level
            .gone()
            .store(gone.wrapping_add(Self::offset(life)), Ordering::Release);
        let (done, idle_from) = self.step(slot, |view| (step(view), view.full_again(now)));
        slot.owner.store(fingerprint, Ordering::Release);
        let head = self.made_head(fingerprint);
        self.next_of(place)
            .store(head.load(Ordering::Relaxed), Ordering::Release);
        head.store(Link::new(place, fingerprint).0, Ordering::Release);
        books.vacant = None;
        books.idle_from.push(Reverse(Due::new(idle_from, place)));
        Some(done)
    }

    /// A slot that is nobody's.
    fn vacancy(&self, books: &mut Books, now: Timestamp) -> Option<Spot> {
        if books.vacant.is_none() {
            if books.made < self.max_keys {
                self.make(books);
            } else {
                self.evict(books, now);
            }
        }
        books.vacant
    }

    /// Makes a slot, and a chain with it.
    fn make(&self, books: &mut Books) {
        let number = books.made;
        let slot = Spot::of(number);
        let segment = slot.segment();
        self.segments[segment].get_or_init(|| {
            let end = first_of(segment).min(self.max_keys as usize);
            books.idle_from.reserve_exact(end - books.idle_from.len());
            Segment::new(end - first_of(segment - 1))
        });
        books.made += 1;
        let chains = Chains::of(books.made.max(FEWEST_CHAINS));
        let before = chains
            .power()
            .checked_sub(1)
            .and_then(|before| self.heads[before].get());
        let heads = self.heads[chains.power()].get_or_init(|| {
            let half = before.map_or_else(|| links(FEWEST_CHAINS as usize / 2), |before| before.whole.clone());
            let whole = links(2 * half.len());
            Heads { whole, half }
        });
        if books.made > FEWEST_CHAINS {
            self.split(heads, chains);
        }
        books.vacant = Some(slot);
    }

    /// Splits the next chain, so that there are so many.
    fn split(&self, heads: &Heads, chains: Chains) {
        let (low, half) = (chains.split() - 1, heads.half.len());
        let mut link = Link(heads.half[low].swap(0, Ordering::AcqRel));
        while let Some(slot) = link.slot() {
            let owner = self.made_slot(slot).owner.load(Ordering::Relaxed);
            let next = self.next_of(slot);
            let head = &heads.whole[if owner & half as u64 == 0 { low } else { low + half }];
            let rest = next.swap(head.load(Ordering::Relaxed), Ordering::AcqRel);
            head.store(link.0, Ordering::Release);
            link = Link(rest);
        }
        self.chains.0.store(chains.0, Ordering::Release);
    }

    /// Takes a slot out of its chain. Its own link stays: who stands there walks on.
    fn unlink(&self, gone: Spot, fingerprint: u64) {
        let mut cell = self.made_head(fingerprint);
        while let Some(slot) = Link(cell.load(Ordering::Relaxed)).slot() {
            let next = self.next_of(slot);
            if slot == gone {
                cell.store(next.load(Ordering::Relaxed), Ordering::Release);
                return;
            }
            cell = next;
        }
    }

    /// Takes out a key that has its whole quota. Each look at one that has not is paid for by the call that it made since.
    fn evict(&self, books: &mut Books, now: Timestamp) {
        for _ in 0..LOOKS {
            let Some(mut next) = books.idle_from.peek_mut() else {
                return;
            };
            if next.0.at() > now {
                return;
            }
            let place = next.0.slot();
            let slot = self.made_slot(place);
            let fingerprint = slot.owner.load(Ordering::Relaxed);
            if let Err(full) = self.end_life(slot, now) {
                *next = Reverse(Due::new(full, place));
                continue;
            }
            PeekMut::pop(next);
            self.unlink(place, fingerprint);
            books.vacant = Some(place);
            books.evicted += 1;
            return;
        }
    }

    /// Ends the life of a bucket that is full, or tells when it will be. The caller has the books.
    fn end_life(&self, slot: &Slot, now: Timestamp) -> Result<(), Timestamp> {
        let fingerprint = slot.owner.load(Ordering::Relaxed);
        loop {
            let gone = slot.level.gone().load(Ordering::Acquire);
            // Nobody else touches it now: the two belong together.
            let seen = Level::new(gone, slot.level.touched().load(Ordering::Acquire));
            let line = self.line(Slot::life(slot.tally.load(Ordering::Relaxed)));
            let full = View::TokenBucket(self.shape.on(&seen, &line)).full_again(now);
            if full > now {
                return Err(full);
            }
            slot.owner.store(NOBODY, Ordering::Release);
            let nothing = gone ^ 1 << 63;
            let ended = slot
                .level
                .gone()
                .compare_exchange(gone, nothing, Ordering::AcqRel, Ordering::Relaxed);
            if ended.is_ok() {
                return Ok(());
            }
            slot.owner.store(fingerprint, Ordering::Release);
        }
    }

    /// Counts a rejection at a key, if it is tracked.
    pub(super) fn add_rejection(&self, fingerprint: u64) {
        if self
            .find(fingerprint, LONGEST_WALK)
            .is_some_and(|slot| Self::add_rejection_at(slot, fingerprint))
        {
            return;
        }
        let _books = self.books();
        if let Some(slot) = self.find(fingerprint, usize::MAX) {
            Self::add_rejection_at(slot, fingerprint);
        }
    }

    fn add_rejection_at(slot: &Slot, fingerprint: u64) -> bool {
        let mut tally = slot.tally.load(Ordering::Acquire);
        loop {
            // After the tally, as after `gone`.
            if slot.owner.load(Ordering::Acquire) != fingerprint {
                return false;
            }
            let rejections = tally & u64::from(u32::MAX);
            let more = tally + u64::from(rejections < u64::from(u32::MAX));
            match slot
                .tally
                .compare_exchange_weak(tally, more, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return true,
                Err(latest) => tally = latest,
            }
        }
    }

    /// Whether a new key would meet the overflow, as far as can be told without evicting one.
    pub(super) fn overflows(&self, now: Timestamp) -> bool {
        let books = self.books();
        books.vacant.is_none()
            && books.made >= self.max_keys
            && books.idle_from.peek().is_some_and(|Reverse(first)| first.at() > now)
    }

    /// How many keys are tracked, and how many have been evicted; and all who have been rejected, piece by piece.
    pub(super) fn survey(&self, mut see: impl FnMut(&mut dyn Iterator<Item = (u32, u64)>)) -> (usize, u64) {
        let books = self.books();
        for segment in self.segments.iter().filter_map(OnceLock::get) {
            see(&mut segment.slots.iter().filter_map(|slot| {
                let rejections = slot.tally.load(Ordering::Relaxed) & u64::from(u32::MAX);
                let owner = slot.owner.load(Ordering::Relaxed);
                let tracked = owner != NOBODY && rejections > 0;
                tracked.then(|| (u32::try_from(rejections).unwrap_or(u32::MAX), owner))
            }));
        }
        (books.idle_from.len(), books.evicted)
    }
}

impl Segment {
    fn new(size: usize) -> Self {
        let slot = || Slot {
            owner: AtomicU64::new(NOBODY),
            level: Level::new(0, 0),
            tally: AtomicU64::new(0),
        };
        Self {
            slots: std::iter::repeat_with(slot).take(size).collect(),
            next: links(size),
        }
    }
}

fn links<L: FromIterator<AtomicU32>>(count: usize) -> L {
    std::iter::repeat_with(|| AtomicU32::new(0)).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limit::TokenBucket;
    use std::{collections::HashSet, time::Duration};

    const START: Timestamp = Timestamp::from_nanos(1 << 62);
    const SECOND: Duration = Duration::from_secs(1);

    /// A token a second, three at once.
    fn table(max_keys: usize) -> Table {
        Table::new(TokenBucket::new(1, SECOND).burst(3).shape(START).unwrap(), max_keys)
    }

    fn add(table: &Table, fingerprint: u64, now: Timestamp) {
        let taken = table.with_or_add(fingerprint, now, |view| view.take(1, now).is_ok());
        assert_eq!(taken, Some(true));
    }

    /// Numbers that look like hashes.
    fn fingerprints() -> impl Iterator<Item = u64> {
        (1..).map(|n: u64| {
            n.wrapping_mul(0xD6E8_FEB8_6659_FD93)
                .rotate_left(32)
                .wrapping_mul(0xD6E8_FEB8_6659_FD93)
        })
    }

    #[test]
    fn segments_follow_one_another_without_a_gap() {
        let mut next = (1, 0);
        for number in 0..1 << 16 {
            let slot = Spot::of(number);
            assert_eq!((slot.segment(), slot.offset()), next, "{number}");
            let size = first_of(slot.segment()) - first_of(slot.segment() - 1);
            next = if next.1 + 1 < size {
                (next.0, next.1 + 1)
            } else {
                (next.0 + 1, 0)
            };
        }
        let last = Spot::of((1 << 24) - 1);
        assert!(last.segment() < 1 << 8 && last.offset() <= OFFSET as usize);
        assert_eq!(first_of(last.segment() - 1) + last.offset(), (1 << 24) - 1);
    }

    #[test]
    fn every_key_is_found_without_the_books_however_many_there_are() {
        let table = table(5_000);
        for (count, fingerprint) in fingerprints().take(5_000).enumerate() {
            add(&table, fingerprint, START);
            if count % 97 == 0 || count < 200 {
                for known in fingerprints().take(count + 1) {
                    assert!(table.find(known, LONGEST_WALK).is_some(), "{known:x} of {count}");
                }
            }
        }
        // And when each has made room for another.
        let later = START.saturating_add(10 * SECOND);
        for fingerprint in fingerprints().skip(5_000).take(5_000) {
            add(&table, fingerprint, later);
        }
        assert!(
            fingerprints()
                .take(5_000)
                .all(|old| table.find(old, usize::MAX).is_none())
        );
        assert!(
            fingerprints()
                .skip(5_000)
                .take(5_000)
                .all(|new| table.find(new, LONGEST_WALK).is_some())
        );
        assert_eq!(table.survey(|_| ()), (5_000, 5_000));
    }

    #[test]
    fn what_was_read_of_one_life_is_not_found_in_the_next() {
        let table = table(1);
        let mut seen = HashSet::new();
        for life in 1..1_000 {
            // Each begins in the very moment in which the one before is full, and for once gives its token back at once.
            let now = START.saturating_add(Duration::from_secs(life));
            add(&table, life, now);
            let slot = table.find(life, LONGEST_WALK).unwrap();
            let gone = || slot.level.gone().load(Ordering::Relaxed);
            let one_short = gone();
            table.with(life, |view| view.correct(1, 0, now));
            let full = gone();
            assert!(table.take_one_at_a_glance(life, || now));
            assert!(seen.insert(full) && seen.insert(one_short), "again in life {life}");
        }
        assert_eq!(table.survey(|_| ()), (1, 998));
    }

    #[test]
    fn a_taker_that_comes_first_keeps_the_slot_for_its_key() {
        let table = table(1);
        add(&table, 1, START);
        let full = START.saturating_add(SECOND);
        let slot = table.find(1, LONGEST_WALK).unwrap();
        let seen = table.see(slot, 1).unwrap();
        assert!(table.take_one_at_a_glance(1, || full));
        assert_eq!(table.end_life(slot, full), Err(full.saturating_add(SECOND)));
        assert!(table.see(slot, 1).is_some(), "it has its owner yet");
        let stale = slot
            .level
            .gone()
            .compare_exchange(seen.gone, 0, Ordering::AcqRel, Ordering::Relaxed);
        assert!(stale.is_err());
        // The other way round nobody takes.
        let seen = table.see(slot, 1).unwrap();
        let full = full.saturating_add(SECOND);
        assert_eq!(table.end_life(slot, full), Ok(()));
        assert!(!table.take_one_at_a_glance(1, || full));
        let late = slot
            .level
            .gone()
            .compare_exchange(seen.gone, 0, Ordering::AcqRel, Ordering::Relaxed);
        assert!(late.is_err());
    }

    #[test]
    fn the_rejections_of_a_key_are_not_the_next_ones() {
        let table = table(1);
        add(&table, 1, START);
        for _ in 0..3 {
            table.add_rejection(1);
        }
        table.add_rejection(2);
        let rejected = |table: &Table| {
            let mut all = Vec::new();
            table.survey(|piece| all.extend(piece));
            all
        };
        assert_eq!(rejected(&table), [(3, 1)]);
        add(&table, 2, START.saturating_add(SECOND));
        assert_eq!(rejected(&table), []);
    }
}

#[cfg(all(test, portcullis_loom))]
mod model;
