//! What is kept for each key: maps under locks that callers rarely share.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

const SHARDS: usize = 32;

/// A map from fingerprints, in pieces.
pub(crate) struct Shards<T>([RwLock<Shard<T>>; SHARDS]);

pub(crate) type Shard<T> = HashMap<u64, T, BuildHasherDefault<Hashed>>;

impl<T> Default for Shards<T> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| RwLock::default()))
    }
}

impl<T> Shards<T> {
    fn of(&self, fingerprint: u64) -> &RwLock<Shard<T>> {
        // The map takes the upper and the lowest bits.
        &self.0[(fingerprint >> 32) as usize % SHARDS]
    }

    pub(crate) fn read(&self, fingerprint: u64) -> RwLockReadGuard<'_, Shard<T>> {
        read(self.of(fingerprint))
    }

    pub(crate) fn write(&self, fingerprint: u64) -> RwLockWriteGuard<'_, Shard<T>> {
        self.of(fingerprint).write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Each piece in turn, for those who look at everything.
    pub(crate) fn each(&self) -> impl Iterator<Item = RwLockReadGuard<'_, Shard<T>>> {
        self.0.iter().map(read)
    }
}

fn read<T>(shard: &RwLock<Shard<T>>) -> RwLockReadGuard<'_, Shard<T>> {
    shard.read().unwrap_or_else(PoisonError::into_inner)
}

/// The hash of what is a good hash already.
#[derive(Default)]
pub(crate) struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("a fingerprint is written whole")
    }
    fn write_u64(&mut self, fingerprint: u64) {
        self.0 = fingerprint;
    }
}
