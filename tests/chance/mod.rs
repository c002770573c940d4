//! Chance that can be had again: what the tests share that do things at random and at once.

use std::{
    env,
    hash::{BuildHasher, RandomState},
};

/// A number from the environment, or else this one.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    match env::var(name) {
        Ok(given) => given
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {given:?}")),
        Err(_) => default,
    }
}

/// The seed of a run: another each time, unless `PORTCULLIS_SEED` names one. It is printed, which a test shows that fails. What
/// each task does follows from it; in which order threads do it does not.
pub(crate) fn seed() -> u64 {
    let seed = setting("PORTCULLIS_SEED", RandomState::new().hash_one(()));
    println!("PORTCULLIS_SEED={seed}");
    seed
}

/// A reproducible source of randomness: splitmix64 (Steele, Lea and Flood, 2014).
pub(crate) struct Dice(u64);

impl Dice {
    /// Dice of their own for each task of a run.
    pub(crate) fn new(seed: u64, task: u64) -> Self {
        Self(Self(seed ^ task.wrapping_mul(0xd6e8_feb8_6659_fd93)).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below this.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True once in so many times.
    pub(crate) fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
