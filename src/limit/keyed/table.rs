//! Token buckets by fingerprint, found and used without a lock.
//!
//! All that a bucket is are two words, so a key needs no object of its own: it has a *slot* of 32 bytes, and a slot, once made,
//! stays where it is for as long as the table. What moves are *links*, places of slots in 32 bits.
//!
//! # Finding
//!
//! The table is a linear hash table: as many chains as slots, and with each slot that is made one chain is split in two.
//! So it grows by a step with each key, copies nothing, and never stands still. Slots lie in *segments*, each an eighth of a power of
//! two, heads of chains in segments of powers of two, that are allocated when they are needed. A link tells segment and offset,
//! so that nobody has to work them out, and four bits of the fingerprint it leads to: who walks a chain touches links, and hardly
//! ever a slot but the one it looks for.
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

use super::super::{
    algorithm::View,
    bucket::{Level, Line},
    token_bucket::TokenBucketShape,
};
use super::LOOKS;
use crate::clock::Timestamp;
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, binary_heap::PeekMut},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

/// How often somebody tries before it takes the books.
const ATTEMPTS: u32 = 8;

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
    segments: [OnceLock<Segment>; SEGMENTS],
    /// Links to the first slot of each chain. A chain that is split moves to the array of the next power of two with both halves.
    heads: [OnceLock<Box<[AtomicU32]>>; ARRAYS],
    /// How many chains there are: as many as slots, and no fewer than the fewest.
    chains: Apart<AtomicU32>,
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
const FIRST: u32 = 32;
const SEGMENTS: usize = 8 * (24 - FIRST.ilog2() as usize) + 2;

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

/// How many chains there are at least. So many, and every power of two above, have an array of heads.
const FEWEST_CHAINS: u32 = 16;
const ARRAYS: usize = 24 - FEWEST_CHAINS.ilog2() as usize + 1;

/// The array of a power of two.
#[inline]
fn array_of(chains: u32) -> usize {
    chains.ilog2().wrapping_sub(FEWEST_CHAINS.ilog2()) as usize
}

/// Of so many chains, those that a fingerprint is told to by one bit more than the others: the number of chains that there are
/// being split into, and which of the chains before have been.
struct Chains {
    all: u32,
    split: u32,
}

impl Chains {
    #[inline]
    fn of(count: u32) -> Self {
        let all = count.next_power_of_two();
        Self {
            all,
            split: count - all / 2,
        }
    }

    /// Of which array the chain of a fingerprint is, and where its head is there.
    #[inline]
    fn chain_of(&self, fingerprint: u64) -> (u32, u32) {
        let low = (fingerprint & 0xFFFF_FFFF) as u32;
        if low & (self.all / 2 - 1) < self.split {
            (self.all, low & (self.all - 1))
        } else {
            (self.all / 2, low & (self.all / 2 - 1))
        }
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
        Self {
            shape,
            max_keys: u32::try_from(max_keys).unwrap_or(u32::MAX),
            segments: [const { OnceLock::new() }; SEGMENTS],
            heads: [const { OnceLock::new() }; ARRAYS],
            chains: Apart(AtomicU32::new(FEWEST_CHAINS)),
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

    /// The heads of so many chains.
    #[inline]
    fn heads(&self, chains: u32) -> Option<&[AtomicU32]> {
        self.heads.get(array_of(chains))?.get().map(|heads| &**heads)
    }

    #[inline]
    fn head(&self, fingerprint: u64) -> Option<&AtomicU32> {
        let chains = Chains::of(self.chains.0.load(Ordering::Acquire));
        // Both first, so that nobody waits for them who knows which it is.
        let (all, half) = (self.heads(chains.all), self.heads(chains.all / 2));
        let (of, at) = chains.chain_of(fingerprint);
        let heads = if of == chains.all { all } else { half };
        heads?.get(at as usize)
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
            let spot = link.slot()?;
            let segment = self.segment(spot)?;
            if link.may_be_of(fingerprint) {
                let slot = segment.slots.get(spot.offset())?;
                if slot.owner.load(Ordering::Acquire) == fingerprint {
                    return Some(slot);
                }
            }
            link = Link(segment.next.get(spot.offset())?.load(Ordering::Acquire));
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
        for attempt in 0..ATTEMPTS {
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
            // Whoever has won is left alone with the line for a while.
            (0..1 << attempt).for_each(|_| std::hint::spin_loop());
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
        let spot = self.vacancy(&mut books, now)?;
        let slot = self.made_slot(spot);
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
        self.next_of(spot)
            .store(head.load(Ordering::Relaxed), Ordering::Release);
        head.store(Link::new(spot, fingerprint).0, Ordering::Release);
        books.vacant = None;
        books.idle_from.push(Reverse(Due::new(idle_from, spot)));
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
        let chains = books.made.max(FEWEST_CHAINS).next_power_of_two();
        self.heads[array_of(chains)].get_or_init(|| links(chains as usize));
        if books.made > FEWEST_CHAINS {
            self.split(books.made);
        }
        books.vacant = Some(slot);
    }

    /// Splits the next chain, so that there are so many.
    fn split(&self, chains: u32) {
        let half = chains.next_power_of_two() / 2;
        let (low, high) = (chains - 1 - half, chains - 1);
        let from = &self.heads(half).expect(MADE)[low as usize];
        let into = self.heads(2 * half).expect(MADE);
        let mut link = Link(from.swap(0, Ordering::AcqRel));
        while let Some(slot) = link.slot() {
            let owner = self.made_slot(slot).owner.load(Ordering::Relaxed);
            let next = self.next_of(slot);
            let head = if owner & u64::from(half) == 0 { low } else { high };
            let head = &into[head as usize];
            let rest = next.swap(head.load(Ordering::Relaxed), Ordering::AcqRel);
            head.store(link.0, Ordering::Release);
            link = Link(rest);
        }
        self.chains.0.store(chains, Ordering::Release);
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
            let spot = next.0.slot();
            let slot = self.made_slot(spot);
            let fingerprint = slot.owner.load(Ordering::Relaxed);
            if let Err(full) = self.end_life(slot, now) {
                *next = Reverse(Due::new(full, spot));
                continue;
            }
            PeekMut::pop(next);
            self.unlink(spot, fingerprint);
            books.vacant = Some(spot);
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

fn links(count: usize) -> Box<[AtomicU32]> {
    std::iter::repeat_with(|| AtomicU32::new(0)).take(count).collect()
}
