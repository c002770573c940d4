//! Models of keys that come, take, and make room for each other.
//!
//! With two chains to begin with, odd keys share the one and even keys the other; the third slot splits that of the even ones.

use super::*;
use crate::{
    limit::TokenBucket,
    sync::{explore, spawn},
};
use std::time::Duration;

const START: Timestamp = Timestamp::from_nanos(1 << 62);

/// After this long a bucket of which one token was taken at the start is full.
const LATER: Timestamp = Timestamp::from_nanos((1 << 62) + 10);
const LATEST: Timestamp = Timestamp::from_nanos((1 << 62) + 20);

/// So many tokens at once for each of so many keys, and one in ten nanoseconds.
fn table(burst: u32, max_keys: usize) -> Arc<Table> {
    let bucket = TokenBucket::new(1, Duration::from_nanos(10)).burst(burst);
    Arc::new(Table::new(bucket.shape(START).expect("valid settings"), max_keys))
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    Admitted,
    Rejected,
    /// There is no room for the key.
    Overflow,
}
use Taken::{Admitted, Overflow, Rejected};

/// As a keyed limiter takes: at a glance, or else by a closer look.
fn take(table: &Table, key: u64, now: Timestamp) -> Taken {
    if table.take_one_at_a_glance(key, || now) {
        return Admitted;
    }
    match table.with_or_add(key, now, |view| view.take(1, now).is_ok()) {
        Some(true) => Admitted,
        Some(false) => Rejected,
        None => Overflow,
    }
}

fn give_back(table: &Table, key: u64, now: Timestamp) {
    table.with(key, |view| view.correct(1, 0, now));
}

/// How many tokens a key has left, if it is tracked.
fn left(table: &Table, key: u64, now: Timestamp) -> Option<u32> {
    table.with(key, |view| view.whole_available(now))
}

#[test]
fn two_calls_that_bring_one_key_share_its_bucket() {
    explore("two bring a key", 2, || {
        let table = table(1, 2);
        let other = table.clone();
        let brings = spawn(move || take(&other, 1, START));
        let mine = take(&table, 1, START);
        let both = [mine, brings.join().unwrap()];
        assert!([[Admitted, Rejected], [Rejected, Admitted]].contains(&both), "{both:?}");
        assert_eq!(table.survey(|_| ()), (1, 0));
    });
}

#[test]
fn a_new_key_hides_no_other_of_its_chain() {
    explore("a key comes into a chain", 2, || {
        let table = table(2, 2);
        take(&table, 1, START);
        let other = table.clone();
        let brings = spawn(move || take(&other, 3, START));
        assert_eq!(take(&table, 1, START), Admitted);
        assert_eq!(brings.join().unwrap(), Admitted);
        assert_eq!((left(&table, 1, START), left(&table, 3, START)), (Some(0), Some(1)));
        assert_eq!(table.survey(|_| ()), (2, 0));
    });
}

#[test]
fn no_key_is_lost_while_its_chain_is_split() {
    explore("a chain is split", 2, || {
        let table = table(2, 3);
        for key in [4, 2] {
            take(&table, key, START);
        }
        let other = table.clone();
        let splits = spawn(move || take(&other, 1, START));
        // Of the two one stays in its chain, and the other moves into the new one.
        for key in [2, 4] {
            assert_eq!(take(&table, key, START), Admitted);
        }
        assert_eq!(splits.join().unwrap(), Admitted);
        let left = [1, 2, 4].map(|key| left(&table, key, START));
        assert_eq!(left, [Some(1), Some(0), Some(0)]);
        assert_eq!(table.survey(|_| ()), (3, 0));
    });
}

#[test]
fn a_key_keeps_its_slot_or_leaves_it_with_its_whole_quota() {
    explore("one takes from a key that another evicts", 2, || {
        let table = table(1, 1);
        take(&table, 1, START);
        let other = table.clone();
        let evicts = spawn(move || take(&other, 2, LATER));
        let mine = take(&table, 1, LATER);
        let both = [mine, evicts.join().unwrap()];
        assert!([[Admitted, Overflow], [Overflow, Admitted]].contains(&both), "{both:?}");
        let left = [1, 2].map(|key| left(&table, key, LATER));
        let expected = if mine == Admitted {
            [Some(0), None]
        } else {
            [None, Some(0)]
        };
        assert_eq!(left, expected);
    });
}

#[test]
fn no_token_is_taken_from_the_bucket_of_the_next_key() {
    explore("a slot changes hands, and its bucket is full both times", 2, || {
        let table = table(1, 1);
        take(&table, 1, START);
        let other = table.clone();
        let evicts = spawn(move || {
            let taken = take(&other, 2, LATER);
            give_back(&other, 2, LATER);
            taken
        });
        let mine = take(&table, 1, LATER);
        let both = [mine, evicts.join().unwrap()];
        assert!([[Admitted, Overflow], [Overflow, Admitted]].contains(&both), "{both:?}");
        let left = [1, 2].map(|key| left(&table, key, LATER));
        let expected = if mine == Admitted {
            [Some(0), None]
        } else {
            [None, Some(1)]
        };
        assert_eq!(left, expected);
    });
}

#[test]
fn a_key_that_comes_back_finds_its_slot_as_new() {
    explore("a key leaves its slot and comes back", 2, || {
        let table = table(1, 1);
        take(&table, 1, START);
        let other = table.clone();
        let evicts = spawn(move || {
            let taken = take(&other, 2, LATER);
            give_back(&other, 2, LATER);
            [taken, take(&other, 1, LATEST)]
        });
        let mine = take(&table, 1, LATER);
        let [other, back] = evicts.join().unwrap();
        // Who is late by a life may meet the token of that one, but takes none.
        assert!((mine == Admitted) ^ (other == Admitted), "{mine:?} {other:?}");
        assert_eq!((back, left(&table, 1, LATEST)), (Admitted, Some(0)));
    });
}

#[test]
fn a_new_key_in_an_old_slot_has_its_burst_and_no_more() {
    explore("two bring a key into the slot of another", 2, || {
        let table = table(2, 1);
        take(&table, 1, START);
        // In the chain of the key that goes, so that one may walk to the slot while the other makes it ready.
        let other = table.clone();
        let brings = spawn(move || take(&other, 3, LATER));
        let taken = [take(&table, 3, LATER), take(&table, 3, LATER), brings.join().unwrap()];
        let admitted = taken.iter().filter(|taken| **taken == Admitted).count();
        assert_eq!(admitted, 2, "{taken:?}");
        assert!(!taken.contains(&Overflow), "the slot was free");
        assert_eq!(table.survey(|_| ()), (1, 1));
    });
}

#[test]
fn a_key_is_found_behind_one_that_leaves_its_chain() {
    // In its own chain or in the other its slot gets another key.
    for next in [2, 5] {
        explore("a key leaves a chain", 2, move || {
            let table = table(2, 2);
            take(&table, 1, LATER);
            take(&table, 3, START);
            let other = table.clone();
            let evicts = spawn(move || take(&other, next, LATER));
            assert_eq!(take(&table, 1, LATER), Admitted);
            assert_eq!(evicts.join().unwrap(), Admitted);
            let left = [1, 3, next].map(|key| left(&table, key, LATER));
            assert_eq!(left, [Some(0), None, Some(1)]);
        });
    }
}

#[test]
fn a_rejection_is_counted_at_its_own_key_or_not_at_all() {
    explore("one is rejected at a key that another evicts", 3, || {
        let table = table(1, 1);
        take(&table, 1, START);
        let other = table.clone();
        let evicts = spawn(move || take(&other, 2, LATER));
        table.add_rejection(1);
        assert_eq!(evicts.join().unwrap(), Admitted);
        let slot = table.find(2, usize::MAX).expect("it has the slot");
        let tally = slot.tally.load(Ordering::Relaxed);
        // loom lets a store come between the two halves of an exchange: then the life before seems to be the last.
        assert!(tally == 2 << 32 || Slot::life(tally) == 1, "{tally:x}");
    });
}
