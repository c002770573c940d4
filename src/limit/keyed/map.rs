//! The states of all other algorithms: maps under locks.
//!
//! A key that is tracked is found under its shard's lock for reading, and its limiter is taken from under the same lock: nobody
//! takes from one that has been evicted. Whoever adds a key holds the books, one mutex for the whole set. Locks are taken in this
//! order: books, shard; no user code runs under any.

use super::super::{
    Algorithm,
    algorithm::{Cell, State, View},
};
use super::LOOKS;
use crate::{clock::Timestamp, shards::Shards};
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, binary_heap::PeekMut},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

pub(super) struct Map {
    algorithm: Algorithm,
    /// All count from one instant: what one key was given cannot pass for what another is.
    start: Timestamp,
    max_keys: usize,
    shards: Shards<Entry>,
    books: Mutex<Books>,
}

struct Entry {
    cell: Cell,
    rejected: AtomicU32,
}

/// What has to be seen and changed together.
#[derive(Default)]
struct Books {
    /// Every tracked key once, with a time before which it was not idle: it may have been used since, and is not idle yet then.
    idle_from: BinaryHeap<Reverse<(Timestamp, u64)>>,
    evicted: u64,
}

impl Map {
    /// The algorithm has been validated.
    pub(super) fn new(algorithm: Algorithm, start: Timestamp, max_keys: usize) -> Self {
        Self {
            algorithm,
            start,
            max_keys,
            shards: Shards::default(),
            books: Mutex::default(),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of a new key: nothing has been used.
    fn full(&self) -> Cell {
        match self.algorithm.build_narrow(self.start) {
            Ok(State::SlidingWindow(state)) => Cell::SlidingWindow(Box::new(state)),
            Ok(State::Adaptive(state)) => Cell::Adaptive(Box::new(state)),
            Ok(State::TokenBucket(_)) | Err(_) => unreachable!("no bucket, and validated"),
        }
    }

    /// Runs a step on a key's limiter, if it is tracked.
    pub(super) fn with<T>(&self, fingerprint: u64, step: impl FnOnce(View<'_>) -> T) -> Option<T> {
        let shard = self.shards.read(fingerprint);
        shard.get(&fingerprint).map(|entry| step(entry.cell.view()))
    }

    /// The same; a new key is added, unless there is no room for it. Its limiter is shown to nobody before the step has run.
    pub(super) fn with_or_add<T>(&self, fingerprint: u64, now: Timestamp, step: impl Fn(View<'_>) -> T) -> Option<T> {
        if let Some(done) = self.with(fingerprint, &step) {
            return Some(done);
        }
        let mut books = self.books();
        if let Some(done) = self.with(fingerprint, &step) {
            return Some(done);
        }
        if books.idle_from.len() >= self.max_keys && !self.evict(&mut books, now) {
            return None;
        }
        let entry = Entry {
            cell: self.full(),
            rejected: AtomicU32::new(0),
        };
        let view = entry.cell.view();
        let done = step(view);
        books.idle_from.push(Reverse((view.full_again(now), fingerprint)));
        self.shards.write(fingerprint).insert(fingerprint, entry);
        Some(done)
    }

    /// When a key certainly has its whole quota. A window's latest admission may carry an earlier time than the one before, if its
    /// thread lay behind: so what seems whole is asked for all of it, at the price of the window that takes its place.
    fn whole_from(&self, view: View<'_>, now: Timestamp) -> Timestamp {
        match view.full_again(now) {
            at if at > now => at,
            _ => view.peek(self.algorithm.largest(), now),
        }
    }

    /// Takes out a key that has its whole quota. Each look at one that has not is paid for by the call that it made since.
    fn evict(&self, books: &mut Books, now: Timestamp) -> bool {
        for _ in 0..LOOKS {
            let Some(mut next) = books.idle_from.peek_mut() else {
                return false;
            };
            let Reverse((idle_from, fingerprint)) = *next;
            if idle_from > now {
                return false;
            }
            let mut shard = self.shards.write(fingerprint);
            let full = shard
                .get(&fingerprint)
                .map(|entry| self.whole_from(entry.cell.view(), now))
                .filter(|full| *full > now);
            if let Some(full) = full {
                *next = Reverse((full, fingerprint));
                continue;
            }
            let evicted = shard.remove(&fingerprint);
            drop(shard);
            PeekMut::pop(next);
            books.evicted += 1;
            drop(evicted);
            return true;
        }
        false
    }

    /// Counts a rejection at a key, if it is tracked.
    pub(super) fn add_rejection(&self, fingerprint: u64) {
        let more = |n: u32| Some(n.saturating_add(1));
        if let Some(entry) = self.shards.read(fingerprint).get(&fingerprint) {
            // `Relaxed`: a counter orders nothing.
            let _ = entry.rejected.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        }
    }

    /// Whether a new key would meet the overflow, as far as can be told without evicting one.
    pub(super) fn overflows(&self, now: Timestamp) -> bool {
        let books = self.books();
        let full = books.idle_from.len() >= self.max_keys;
        full && books
            .idle_from
            .peek()
            .is_some_and(|Reverse((idle_from, _))| *idle_from > now)
    }

    /// How many keys are tracked, and how many have been evicted; and all who have been rejected, piece by piece.
    pub(super) fn survey(&self, mut see: impl FnMut(&mut dyn Iterator<Item = (u32, u64)>)) -> (usize, u64) {
        let books = self.books();
        for shard in self.shards.each() {
            let rejected = shard
                .iter()
                .map(|(key, entry)| (entry.rejected.load(Ordering::Relaxed), *key));
            see(&mut rejected.filter(|(rejected, _)| *rejected > 0));
        }
        (books.idle_from.len(), books.evicted)
    }
}
