//! A limit for each key: exact for each, in bounded memory, and nothing handed back that was spent.

use futures_util::FutureExt;
use portcullis::{
    Adaptive, Algorithm, CircuitBreaker, Clock, EventKind, GuardLayer, KeyedPermit, KeyedRateLimiter, KeysStatus,
    ManualClock, MetricsFormat, Outcome, RateLimitLayer, RateLimiter, Reason, Registry, RegistryError, Rejected,
    SlidingWindow, TokenBucket, Verdict,
    policy::{Missing, Policy, Reading},
};
use proptest::prelude::*;
use std::{
    collections::HashMap,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tower::{Layer, Service, ServiceExt, service_fn};

const MINUTE: Duration = Duration::from_secs(60);

fn keyed(algorithm: impl Into<Algorithm>, max_keys: usize) -> (KeyedRateLimiter, ManualClock) {
    let clock = Clock::manual();
    let limiter = KeyedRateLimiter::builder("api", algorithm)
        .limit("per-caller")
        .max_keys(max_keys)
        .clock(&clock)
        .build()
        .unwrap();
    (limiter, clock)
}

fn algorithms() -> [(&'static str, Algorithm); 3] {
    [
        ("token bucket", TokenBucket::new(3, MINUTE).into()),
        ("sliding window", SlidingWindow::new(3, MINUTE).into()),
        ("adaptive", Adaptive::new(3).window(MINUTE).into()),
    ]
}

fn keys(limiter: &KeyedRateLimiter) -> KeysStatus {
    limiter.status().keys.expect("keyed")
}

/// Uses a key's whole quota of three.
fn exhaust(limiter: &KeyedRateLimiter, key: u64) {
    for _ in 0..3 {
        limiter.try_acquire(&key).unwrap();
    }
    limiter.try_acquire(&key).unwrap_err();
}

#[test]
fn each_key_has_a_quota_of_its_own() {
    for (name, algorithm) in algorithms() {
        let (limiter, clock) = keyed(algorithm, 100);
        for key in 0..50 {
            exhaust(&limiter, key);
        }
        assert_eq!(keys(&limiter).tracked, 50, "{name}");
        clock.advance(MINUTE);
        for key in 0..50 {
            exhaust(&limiter, key);
        }
    }
}

#[test]
fn a_rejection_tells_all_that_an_unkeyed_limit_tells() {
    let (limiter, clock) = keyed(TokenBucket::new(6, MINUTE), 10);
    let single = RateLimiter::builder("api", TokenBucket::new(6, MINUTE)).limit("per-caller");
    let single = single.clock(&clock).build().unwrap();
    for cost in [4, 3, 7, 2, 1, 9] {
        let (ours, theirs) = (limiter.try_acquire_n("a", cost), single.try_acquire_n(cost));
        assert_eq!(ours.as_ref().err(), theirs.as_ref().err(), "{cost}");
        assert_eq!(
            ours.err().and_then(|why| why.quota()),
            theirs.err().and_then(|why| why.quota())
        );
    }
    let why = limiter.try_acquire("a").unwrap_err();
    let wait = why.retry_after.unwrap();
    clock.advance(wait.saturating_sub(Duration::from_nanos(1)));
    assert!(limiter.try_acquire("a").is_err(), "one nanosecond early");
    clock.advance(Duration::from_nanos(1));
    limiter.try_acquire("a").unwrap();
}

#[test]
fn a_full_set_gives_all_new_keys_one_quota_together() {
    for (name, algorithm) in algorithms() {
        let (limiter, _) = keyed(algorithm, 5);
        for key in 0..5_u64 {
            limiter.try_acquire(&key).unwrap();
        }
        let admitted = (100..200).filter(|key: &u64| limiter.try_acquire(key).is_ok()).count();
        assert_eq!(admitted, 3, "{name}: what one key gets");
        let keys = keys(&limiter);
        assert_eq!(
            (keys.tracked, keys.max, keys.evicted, keys.overflow_requests),
            (5, 5, 0, 100),
            "{name}"
        );
        for key in 0..5_u64 {
            limiter.try_acquire(&key).expect("those who are known keep their own");
        }
    }
}

/// What a new key's next call would meet, as a pair asks it and as the status shows it: how long it is refused, if it is.
fn met_by(limiter: &KeyedRateLimiter, new: u64) -> Option<Duration> {
    let policy = limiter.by(|key: &u64| Some(*key));
    let told = Policy::refusal(&policy, &(), &new, &Reading::new());
    let told = told.map(|why| why.retry_after.expect("a quota comes back"));
    let status = limiter.status();
    assert_eq!(status.retry_after, told, "the status shows what a pair is told");
    assert_eq!(told.is_none(), status.available_tokens >= 1.0);
    told
}

#[test]
fn what_a_new_key_would_meet_is_told_before_it_comes_and_is_what_it_meets() {
    const HALF: Duration = Duration::from_secs(30);
    for (name, algorithm) in [
        ("token bucket", Algorithm::from(TokenBucket::new(1, MINUTE))),
        ("sliding window", SlidingWindow::new(1, MINUTE).into()),
        ("adaptive", Adaptive::new(1).window(MINUTE).into()),
    ] {
        let (limiter, clock) = keyed(algorithm, 2);
        limiter.try_acquire(&1_u64).unwrap();
        assert_eq!(met_by(&limiter, 9), None, "{name}: a place is free");
        limiter.try_acquire(&2_u64).unwrap();
        assert_eq!(met_by(&limiter, 9), None, "{name}: the overflow is unused");
        clock.advance(HALF);
        limiter.try_acquire(&3_u64).expect("the overflow's");
        assert_eq!(met_by(&limiter, 9), Some(MINUTE), "{name}: the overflow is spent");
        clock.advance(HALF.saturating_sub(Duration::from_nanos(1)));
        let wait = HALF + Duration::from_nanos(1);
        assert_eq!(met_by(&limiter, 9), Some(wait), "{name}: nobody has the whole quota");
        let refused = limiter.try_acquire(&9_u64).unwrap_err();
        assert_eq!(refused.retry_after, Some(wait), "{name}");
        clock.advance(Duration::from_nanos(1));
        assert_eq!(met_by(&limiter, 9), None, "{name}: two have, and one would make room");
        assert_eq!(
            (keys(&limiter).tracked, keys(&limiter).evicted),
            (2, 0),
            "{name}: whoever asks evicts nobody"
        );
        limiter.try_acquire(&9_u64).expect("its own quota");
        assert_eq!(met_by(&limiter, 10), None, "{name}: the other would make room");
        limiter.try_acquire(&10_u64).expect("its own quota");
        assert_eq!(
            met_by(&limiter, 11),
            Some(HALF),
            "{name}: the overflow's, which is not back"
        );
        clock.advance(HALF);
        assert_eq!(met_by(&limiter, 11), None, "{name}: now it is");
        let counted = keys(&limiter);
        assert_eq!(
            (counted.tracked, counted.evicted, counted.overflow_requests),
            (2, 2, 2),
            "{name}: what was only told is counted nowhere"
        );
    }
}

#[test]
fn only_a_key_that_has_its_whole_quota_makes_room() {
    for (name, algorithm) in algorithms() {
        let (limiter, clock) = keyed(algorithm, 2);
        exhaust(&limiter, 1);
        clock.advance(MINUTE / 2);
        exhaust(&limiter, 2);
        clock.advance((MINUTE / 2).saturating_sub(Duration::from_nanos(1)));
        limiter.try_acquire(&3_u64).expect("the overflow's");
        assert_eq!(
            (keys(&limiter).evicted, keys(&limiter).overflow_requests),
            (0, 1),
            "{name}"
        );
        clock.advance(Duration::from_nanos(1));
        exhaust(&limiter, 4);
        assert_eq!(
            (keys(&limiter).tracked, keys(&limiter).evicted),
            (2, 1),
            "{name}: the first was whole again"
        );
        limiter.try_acquire(&2_u64).err().or_else(|| {
            // A bucket has brought some back by now; a window has not.
            assert_ne!(name, "sliding window");
            None
        });
    }
}

#[test]
fn a_new_key_looks_at_so_many_that_are_in_use_and_the_next_at_others() {
    let (limiter, clock) = keyed(TokenBucket::new(1, MINUTE), 301);
    let busy = || (0..300_u64).for_each(|key| drop(limiter.try_acquire(&key).unwrap()));
    busy();
    clock.advance(Duration::from_secs(1));
    limiter.try_acquire("idle").unwrap();
    clock.advance(MINUTE);
    busy();
    limiter.try_acquire("new").expect("the overflow's");
    let status = keys(&limiter);
    assert_eq!((status.evicted, status.overflow_requests), (0, 1), "256 were in use");
    limiter.try_acquire("newer").expect("its own");
    let status = keys(&limiter);
    assert_eq!((status.evicted, status.overflow_requests), (1, 1), "44 were in use");
}

#[test]
fn a_key_that_goes_on_calling_keeps_its_place() {
    let (limiter, clock) = keyed(TokenBucket::new(3, MINUTE), 3);
    for key in 0..3_u64 {
        limiter.try_acquire(&key).unwrap();
    }
    for new in 100..200_u64 {
        clock.advance(Duration::from_secs(20));
        // A token of each is back: were it not used again at once, the key would be idle.
        for key in 0..3_u64 {
            limiter.try_acquire(&key).unwrap();
        }
        let _ = limiter.try_acquire(&new);
    }
    assert_eq!(keys(&limiter).evicted, 0);
}

#[test]
fn a_million_invented_keys_stay_in_bounds_and_free_nobody() {
    for (name, algorithm) in algorithms() {
        let (limiter, clock) = keyed(algorithm, 1_000);
        for throttled in 0..10 {
            exhaust(&limiter, throttled);
        }
        let count: u64 = if name == "token bucket" { 1_000_000 } else { 100_000 };
        let mut admitted = 0_u32;
        for spoofed in 0..count {
            admitted += u32::from(limiter.try_acquire(&format!("198.51.100.{spoofed}")).is_ok());
        }
        assert_eq!(admitted, 990 + 3, "{name}: the free places and the overflow's quota");
        assert_eq!(keys(&limiter).tracked, 1_000, "{name}");
        clock.advance(Duration::from_secs(1));
        for throttled in 0..10_u64 {
            assert!(
                limiter.try_acquire(&throttled).is_err(),
                "{name}: throttled keys stay throttled"
            );
        }
    }
}

#[test]
fn two_threads_get_no_more_of_a_key_than_it_has() {
    for (name, algorithm) in algorithms() {
        let (limiter, _) = keyed(algorithm, 2);
        let admitted = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (limiter, admitted) = (&limiter, &admitted);
                scope.spawn(move || {
                    for round in 0..2_000 {
                        if limiter.try_acquire("shared").is_ok() {
                            admitted.fetch_add(1, Ordering::Relaxed);
                        }
                        let _ = limiter.try_acquire(&(thread * 10_000 + round));
                    }
                });
            }
        });
        assert_eq!(admitted.load(Ordering::Relaxed), 3, "{name}");
        assert_eq!(keys(&limiter).tracked, 2, "{name}");
        let status = limiter.status();
        assert_eq!(
            status.accepted_requests + status.rejected_requests,
            16_000,
            "{name}: every call is counted once"
        );
    }
}

#[test]
fn while_a_key_makes_room_threads_get_no_more_than_the_place_has() {
    const ROUNDS: u64 = 3_000;
    for (name, algorithm) in algorithms() {
        let (limiter, clock) = keyed(algorithm, 1);
        let (admitted, most, meeting) = (AtomicU32::new(0), AtomicU32::new(0), Barrier::new(3));
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (limiter, clock, admitted, most, meeting) = (&limiter, &clock, &admitted, &most, &meeting);
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        if meeting.wait().is_leader() {
                            most.fetch_max(admitted.swap(0, Ordering::Relaxed), Ordering::Relaxed);
                            clock.advance(MINUTE);
                            drop(limiter.try_acquire(&0_u64));
                            clock.advance(MINUTE);
                        }
                        meeting.wait();
                        // One brings a new key while the others use the one that may go.
                        let key = if thread == 0 { round } else { 0 };
                        for _ in 0..3 {
                            let taken = limiter.try_acquire(&key).is_ok();
                            admitted.fetch_add(u32::from(taken), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert!(keys(&limiter).evicted > 0, "{name}");
        let most = most.into_inner();
        assert_eq!(
            most,
            3 + 3,
            "{name}: the place and the overflow, as nobody who has used anything makes room"
        );
    }
}

#[test]
fn threads_that_bring_a_new_key_at_once_share_its_quota() {
    const ROUNDS: u64 = 3_000;
    for (name, algorithm) in algorithms() {
        let (limiter, _) = keyed(algorithm, 10_000);
        let (admitted, meeting) = (AtomicU32::new(0), Barrier::new(2));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for key in 0..ROUNDS {
                        meeting.wait();
                        for _ in 0..3 {
                            let taken = limiter.try_acquire(&key).is_ok();
                            admitted.fetch_add(u32::from(taken), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(u64::from(admitted.into_inner()), 3 * ROUNDS, "{name}");
        assert_eq!(keys(&limiter).tracked as u64, ROUNDS, "{name}");
    }
}

/// Whether a service that never waits answers with `Ok`.
fn call_now<S: Service<u64>>(service: &mut S, key: u64) -> bool {
    let ready = std::future::poll_fn(|cx| service.poll_ready(cx)).now_or_never();
    assert!(ready.is_some_and(|ready| ready.is_ok()));
    service.call(key).now_or_never().expect("does not wait").is_ok()
}

/// A xorshift generator: each thread of each round has its own.
struct Dice(u64);

impl Dice {
    fn new(seed: u64, thread: u64, round: u64) -> Self {
        let mixed = seed ^ thread.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ round.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        Self(mixed | 1)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % n
    }
}

/// What threads got of each key, less what they gave back.
struct Ledger(Vec<AtomicU32>);

impl Ledger {
    fn take(&self, key: u64, tokens: u32) {
        self.0[usize::try_from(key).unwrap()].fetch_add(tokens, Ordering::Relaxed);
    }

    fn close(&self) -> Vec<u32> {
        self.0.iter().map(|key| key.swap(0, Ordering::Relaxed)).collect()
    }
}

#[test]
fn threads_that_take_evict_and_give_back_at_once_get_exactly_what_there_is() {
    const SEED: u64 = 0x0DD5_EED5;
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 1_500;
    const PLACES: u64 = 5;
    const KEYS: u64 = 8;
    let sizes: [(&str, Algorithm); 2] = [
        ("one at a time", TokenBucket::new(1, MINUTE).into()),
        ("three at once", TokenBucket::new(3, MINUTE).into()),
    ];
    for (name, algorithm) in sizes {
        let quota = if name == "one at a time" { 1 } else { 3 };
        let (limiter, clock) = keyed(algorithm, usize::try_from(PLACES).unwrap());
        let ledger = Ledger((0..KEYS).map(|_| AtomicU32::new(0)).collect());
        let (meeting, got) = (Barrier::new(usize::try_from(THREADS).unwrap()), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (limiter, clock, ledger, meeting, got) = (&limiter, &clock, &ledger, &meeting, &got);
                scope.spawn(move || {
                    let by_key = limiter.by(|key: &u64| Some(*key));
                    let echo = service_fn(|_: u64| std::future::ready(Ok::<_, std::io::Error>(())));
                    let mut service = RateLimitLayer::new(by_key).layer(echo);
                    for round in 0..ROUNDS {
                        let mut dice = Dice::new(SEED, thread, round);
                        if meeting.wait().is_leader() {
                            // All are whole in the very moment in which the next round begins.
                            clock.advance(MINUTE * quota);
                        }
                        meeting.wait();
                        for _ in 0..6 {
                            let key = dice.below(KEYS);
                            match dice.below(5) {
                                0 | 1 => ledger.take(key, u32::from(call_now(&mut service, key))),
                                2 => ledger.take(key, u32::from(limiter.try_acquire(&key).is_ok())),
                                3 => {
                                    let _ = limiter.try_acquire(&key).map(KeyedPermit::unused);
                                }
                                _ => {
                                    let settle =
                                        |permit: KeyedPermit| permit.settle(Verdict::new(Outcome::Success).cost(0));
                                    let _ = limiter.try_acquire(&key).map(settle);
                                }
                            }
                        }
                        // Then what is left.
                        if meeting.wait().is_leader() {
                            for key in 0..KEYS {
                                while limiter.try_acquire(&key).is_ok() {
                                    ledger.take(key, 1);
                                }
                            }
                            got.lock().unwrap().push(ledger.close());
                        }
                    }
                });
            }
        });
        // Here, because a thread that panics leaves the others waiting.
        for (round, got) in got.into_inner().unwrap().into_iter().enumerate() {
            let excess: u32 = got.iter().map(|got| got.saturating_sub(quota)).sum();
            let all: u32 = got.iter().sum();
            let there = u32::try_from(PLACES + 1).unwrap() * quota;
            assert!(
                excess <= quota,
                "{name}, seed {SEED:#x}, round {round}: {got:?}, where only the overflow may be shared"
            );
            assert_eq!(all, there, "{name}, seed {SEED:#x}, round {round}: {got:?}");
        }
        assert!(keys(&limiter).evicted > ROUNDS, "{name}, seed {SEED:#x}");
    }
}

#[test]
fn threads_that_fill_a_set_while_they_use_it_get_what_each_key_has() {
    const SEED: u64 = 0x6A0F_F11E;
    const THREADS: u64 = 3;
    const KEYS: u64 = 20_000;
    let (limiter, _) = keyed(TokenBucket::new(3, MINUTE), 20_000);
    let ledger = Ledger((0..KEYS).map(|_| AtomicU32::new(0)).collect());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (limiter, ledger) = (&limiter, &ledger);
            scope.spawn(move || {
                let mut dice = Dice::new(SEED, thread, 0);
                let by_key = limiter.by(|key: &u64| Some(*key));
                let echo = service_fn(|_: u64| std::future::ready(Ok::<_, std::io::Error>(())));
                let mut service = RateLimitLayer::new(by_key).layer(echo);
                for newest in 0..KEYS {
                    // Every key twice when its turn has come, and one of those before: the chains are split all the while.
                    for key in [newest, dice.below(newest + 1), newest] {
                        ledger.take(key, u32::from(call_now(&mut service, key)));
                    }
                }
            });
        }
    });
    for (key, got) in ledger.close().into_iter().enumerate() {
        assert_eq!(got, 3, "key {key}, seed {SEED:#x}");
    }
    let status = keys(&limiter);
    assert_eq!(
        (status.tracked as u64, status.overflow_requests),
        (KEYS, 0),
        "seed {SEED:#x}"
    );
}

#[test]
fn a_listener_may_use_the_limit_it_listens_to() {
    let (limiter, _) = keyed(TokenBucket::new(1, MINUTE), 1);
    let (own, heard) = (limiter.clone(), Arc::new(AtomicU32::new(0)));
    let times = heard.clone();
    limiter.on_event(move |_| {
        if times.fetch_add(1, Ordering::Relaxed) == 0 {
            own.try_acquire("b").expect("the overflow's");
            own.try_acquire("b").unwrap_err();
            assert_eq!(own.status().rejected_requests, 2);
        }
    });
    limiter.try_acquire("a").unwrap();
    limiter.try_acquire("a").unwrap_err();
    assert_eq!(heard.load(Ordering::Relaxed), 2);
}

#[test]
fn the_worst_offenders_are_shown_by_their_fingerprints() {
    let (limiter, _) = keyed(TokenBucket::new(1, MINUTE), 100);
    for key in 0..20_u64 {
        for _ in 0..=key {
            let _ = limiter.try_acquire(&key);
        }
    }
    let worst: Vec<_> = keys(&limiter)
        .most_rejected
        .into_iter()
        .map(|it| (it.key, it.rejected))
        .collect();
    let expected = |key: u64| {
        (
            format!("{:016x}", limiter.fingerprint(&key)),
            u32::try_from(key).unwrap(),
        )
    };
    assert_eq!(worst, (10..20).rev().map(expected).collect::<Vec<_>>());
    let (other, _) = keyed(TokenBucket::new(1, MINUTE), 100);
    assert_ne!(
        limiter.fingerprint("a"),
        other.fingerprint("a"),
        "nobody can look them up elsewhere"
    );
}

#[test]
fn requests_without_a_key_are_shown_under_a_fingerprint_of_the_sets_own() {
    let shown = || {
        let (limiter, _) = keyed(TokenBucket::new(1, MINUTE), 100);
        let service = RateLimitLayer::new(limiter.by(caller)).layer(yes());
        for _ in 0..3 {
            let _ = service.clone().oneshot(call(None)).now_or_never();
        }
        let worst = keys(&limiter).most_rejected;
        assert_eq!((worst.len(), worst[0].rejected), (1, 2));
        worst[0].key.clone()
    };
    assert_ne!(shown(), shown());
}

#[test]
fn a_permit_gives_back_corrects_and_teaches_at_its_own_key() {
    let (limiter, clock) = keyed(TokenBucket::new(10, Duration::from_secs(10)), 10);
    limiter.try_acquire_n("a", 6).unwrap().unused();
    limiter
        .try_acquire_n("a", 10)
        .unwrap()
        .settle(Verdict::new(Outcome::Success).cost(4));
    assert!(limiter.try_acquire_n("a", 7).is_err());
    limiter
        .try_acquire_n("a", 6)
        .unwrap()
        .settle(Verdict::new(Outcome::Success).cost(11));
    assert_eq!(
        limiter.try_acquire("a").unwrap_err().retry_after,
        Some(Duration::from_secs(6)),
        "five in debt"
    );
    limiter.try_acquire_n("b", 10).expect("another key");
    drop(limiter.try_acquire_n("c", 10).unwrap());
    assert!(limiter.try_acquire("c").is_err(), "dropped is spent");
    limiter.try_acquire_n("c", 0).expect("nothing is free");
    assert_eq!(limiter.status().returned_requests, 1);

    let (adaptive, adaptive_clock) = keyed(
        Adaptive::new(10)
            .window(Duration::from_secs(10))
            .minimum_calls(1)
            .adjustment_factor(0.5),
        10,
    );
    adaptive.try_acquire("bad").unwrap().settle(Outcome::Failure);
    adaptive.try_acquire("good").unwrap().settle(Outcome::Success);
    adaptive_clock.advance(Duration::from_secs(10));
    for key in ["bad", "good"] {
        adaptive.try_acquire_n(key, 10).unwrap();
    }
    adaptive_clock.advance(Duration::from_secs(1));
    assert!(adaptive.try_acquire("bad").is_err(), "its rate has been halved");
    adaptive.try_acquire("good").expect("one a second");
    drop(clock);
}

#[test]
fn a_call_that_is_free_to_begin_is_charged_at_its_key_what_it_cost_in_truth() {
    let (limiter, _) = keyed(TokenBucket::new(10, Duration::from_secs(10)), 10);
    let free = limiter.try_acquire_n("a", 0).unwrap();
    assert_eq!(
        keys(&limiter).tracked,
        0,
        "a key that has used nothing is not remembered"
    );
    free.settle(Verdict::new(Outcome::Success).cost(13));
    assert_eq!(
        limiter.try_acquire("a").unwrap_err().retry_after,
        Some(Duration::from_secs(4)),
        "three in debt"
    );
    limiter.try_acquire_n("b", 10).expect("another key");
    for outcome in [Outcome::Success, Outcome::Failure] {
        limiter.try_acquire_n("c", 0).unwrap().settle(outcome);
    }
    limiter.try_acquire_n("c", 0).unwrap().unused();
    assert_eq!(keys(&limiter).tracked, 2, "nor one whose calls stayed free");
    assert_eq!(limiter.status().returned_requests, 1, "one of them was not made");
}

#[test]
fn an_adaptive_limit_learns_from_a_call_that_was_free_to_begin() {
    let adaptive = Adaptive::new(10).window(Duration::from_secs(10)).minimum_calls(1);
    let (adaptive, clock) = keyed(adaptive.adjustment_factor(0.5), 10);
    adaptive.try_acquire_n("bad", 10).unwrap();
    adaptive.try_acquire_n("bad", 0).unwrap().settle(Outcome::Failure);
    clock.advance(Duration::from_secs(10));
    adaptive.try_acquire_n("bad", 10).unwrap();
    clock.advance(Duration::from_secs(1));
    assert!(adaptive.try_acquire("bad").is_err(), "its rate has been halved");
}

#[test]
fn a_permit_outlives_the_place_of_its_key() {
    let (limiter, clock) = keyed(TokenBucket::new(10, Duration::from_secs(10)), 1);
    let (unused, cheaper, dearer) = (
        limiter.try_acquire("a").unwrap(),
        limiter.try_acquire_n("a", 5).unwrap(),
        limiter.try_acquire("a").unwrap(),
    );
    clock.advance(Duration::from_secs(10));
    limiter.try_acquire("b").unwrap();
    assert_eq!(keys(&limiter).evicted, 1, "a has made room for b");
    unused.unused();
    assert_eq!(
        limiter.status().returned_requests,
        0,
        "what is given back to it is lost"
    );
    cheaper.settle(Verdict::new(Outcome::Success).cost(1));
    clock.advance(Duration::from_secs(10));
    dearer.settle(Verdict::new(Outcome::Success).cost(8));
    assert!(
        limiter.try_acquire_n("a", 4).is_err(),
        "what it cost in truth is charged"
    );
    limiter.try_acquire_n("a", 3).unwrap();
}

#[test]
fn a_window_takes_back_only_what_it_gave_itself() {
    let (limiter, clock) = keyed(SlidingWindow::new(1, MINUTE), 1);
    let stale = limiter.try_acquire("a").unwrap();
    clock.advance(MINUTE);
    limiter.try_acquire("b").unwrap();
    clock.advance(MINUTE);
    limiter.try_acquire("a").unwrap();
    assert_eq!(keys(&limiter).evicted, 2);
    stale.unused();
    assert!(
        limiter.try_acquire("a").is_err(),
        "the present admission is not the one that comes back"
    );
    assert_eq!(limiter.status().returned_requests, 0, "a permit that stays is spent");
    clock.advance(MINUTE);
    limiter.try_acquire("a").unwrap().unused();
    assert_eq!(limiter.status().returned_requests, 1);
}

#[test]
fn time_that_goes_back_frees_nobody() {
    for (name, algorithm) in algorithms() {
        let (limiter, clock) = keyed(algorithm, 2);
        clock.advance(MINUTE);
        exhaust(&limiter, 1);
        clock.rewind(MINUTE);
        assert!(limiter.try_acquire(&1_u64).is_err(), "{name}");
        limiter.try_acquire(&2_u64).unwrap();
        for new in 10..20_u64 {
            let _ = limiter.try_acquire(&new);
        }
        assert_eq!(keys(&limiter).evicted, 0, "{name}");
    }
}

#[test]
fn an_admission_of_a_thread_that_lies_behind_does_not_make_a_window_seem_whole() {
    let (limiter, clock) = keyed(SlidingWindow::new(3, MINUTE), 1);
    limiter.try_acquire(&1_u64).unwrap();
    clock.advance(MINUTE / 2);
    limiter.try_acquire(&1_u64).unwrap();
    clock.rewind(MINUTE / 2);
    // It has read the time before the others, and is served after them.
    limiter.try_acquire(&1_u64).unwrap();
    clock.advance(MINUTE);
    limiter.try_acquire(&2_u64).expect("the overflow's");
    assert_eq!(keys(&limiter).evicted, 0, "one is not back yet");
    clock.advance(MINUTE / 2);
    limiter.try_acquire(&2_u64).unwrap();
    assert_eq!(keys(&limiter).evicted, 1);
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let build = |max_keys, limit: &str| {
        let builder = KeyedRateLimiter::builder("api", TokenBucket::new(1, MINUTE)).limit(limit);
        builder.max_keys(max_keys).build().map_err(|error| error.field())
    };
    assert_eq!(build(0, "x").unwrap_err(), "max_keys");
    assert_eq!(build((1 << 24) + 1, "x").unwrap_err(), "max_keys");
    assert_eq!(build(1, "").unwrap_err(), "limit");
    assert!(
        build(1 << 24, "x").is_ok(),
        "nothing is allocated before there are keys"
    );
    let window = KeyedRateLimiter::new("api", SlidingWindow::new(0, MINUTE)).unwrap_err();
    assert_eq!(window.field(), "max_requests");
    assert_eq!(
        KeyedRateLimiter::new("api", TokenBucket::new(0, MINUTE))
            .unwrap_err()
            .field(),
        "limit"
    );
}

#[derive(Clone)]
struct Call {
    caller: Option<&'static str>,
    cost: u32,
}

fn call(caller: impl Into<Option<&'static str>>) -> Call {
    Call {
        caller: caller.into(),
        cost: 1,
    }
}

fn caller(call: &Call) -> Option<&'static str> {
    call.caller
}

fn yes() -> impl Service<Call, Response = (), Error = std::io::Error, Future: Send> + Clone {
    service_fn(async |_: Call| Ok(()))
}

fn refused<E: AsRef<dyn std::error::Error + Send + Sync>>(result: Option<Result<(), E>>) -> Rejected {
    let error = result.expect("does not wait").expect_err("refused");
    let error: &(dyn std::error::Error + 'static) = error.as_ref();
    Rejected::find(error).expect("a rejection").clone()
}

#[test]
fn a_layer_keeps_callers_apart() {
    let (limiter, _) = keyed(TokenBucket::new(1, MINUTE), 10);
    let service = RateLimitLayer::new(limiter.by(caller)).layer(yes());
    service.clone().oneshot(call("a")).now_or_never().unwrap().unwrap();
    service.clone().oneshot(call("b")).now_or_never().unwrap().unwrap();
    let why = refused(service.oneshot(call("a")).now_or_never());
    assert_eq!(
        (why.limit.as_deref(), why.retry_after),
        (Some("per-caller"), Some(MINUTE))
    );
    assert_eq!(limiter.status().rejected_requests, 1);
    assert_eq!(keys(&limiter).most_rejected[0].rejected, 1);
}

#[test]
fn a_request_without_a_key_meets_what_was_chosen() {
    for missing in [Missing::Shared, Missing::Reject, Missing::Exempt] {
        let (limiter, _) = keyed(TokenBucket::new(1, MINUTE), 10);
        let service = RateLimitLayer::new(limiter.by(caller).missing(missing)).layer(yes());
        let ask = || service.clone().oneshot(call(None)).now_or_never();
        match missing {
            Missing::Shared => {
                ask().unwrap().unwrap();
                assert_eq!(refused(ask()).reason, Reason::OverLimit);
            }
            Missing::Reject => {
                let why = refused(ask());
                assert_eq!((why.reason, why.retry_after), (Reason::MissingKey, None));
                assert_eq!(why.limit.as_deref(), Some("per-caller"));
                assert_eq!(refused(ask()).reason, Reason::MissingKey);
                assert_eq!(limiter.status().rejected.missing_key, 2);
            }
            Missing::Exempt => {
                for _ in 0..3 {
                    ask().unwrap().unwrap();
                }
            }
        }
        assert!(keys(&limiter).missing_key_requests >= 2, "{missing:?}");
        service
            .oneshot(call("a"))
            .now_or_never()
            .unwrap()
            .expect("who has a key is not concerned");
    }
}

#[test]
fn several_limits_admit_together_or_not_at_all() {
    let clock = Clock::manual();
    let (callers, _) = keyed(TokenBucket::new(2, MINUTE), 10);
    let all = RateLimiter::builder("api", TokenBucket::new(3, MINUTE))
        .limit("all")
        .clock(&clock)
        .build()
        .unwrap();
    let breaker = CircuitBreaker::builder("api").build().unwrap();
    let policy = ((callers.by(caller), all.clone()), breaker.clone());
    let service = GuardLayer::new(policy).layer(yes());
    let ask = |who| service.clone().oneshot(call(who)).now_or_never();
    ask("a").unwrap().unwrap();
    ask("a").unwrap().unwrap();
    assert_eq!(refused(ask("a")).limit.as_deref(), Some("per-caller"));
    assert_eq!(
        all.status().accepted_requests,
        2,
        "the refusal of one burns nothing of the other"
    );
    ask("b").unwrap().unwrap();
    assert_eq!(refused(ask("c")).limit.as_deref(), Some("all"));
    assert_eq!(callers.status().accepted_requests, 3);
    breaker.force_open();
    assert_eq!(refused(ask("d")).limit, None);
    assert_eq!(
        (callers.status().rejected_requests, all.status().rejected_requests),
        (1, 1),
        "each counts its own"
    );
}

#[test]
fn in_a_pair_the_refusals_of_the_keyless_and_of_the_overflow_are_counted_as_such() {
    for paired in [false, true] {
        let (limiter, _) = keyed(TokenBucket::new(1, MINUTE), 2);
        let all = RateLimiter::new("api", TokenBucket::new(100, MINUTE)).unwrap();
        let ask = |who| {
            let callers = limiter.by(caller);
            let answer = if paired {
                let service = GuardLayer::new((all.clone(), callers)).layer(yes());
                service.oneshot(call(who)).now_or_never()
            } else {
                let service = GuardLayer::new(callers).layer(yes());
                service.oneshot(call(who)).now_or_never()
            };
            answer.unwrap().is_ok()
        };
        assert_eq!([(); 3].map(|()| ask(None)), [true, false, false]);
        assert_eq!(
            ["a", "a", "b", "c", "d", "e", "f"].map(|who| ask(Some(who))),
            [true, false, true, false, false, false, false]
        );
        let keys = keys(&limiter);
        assert_eq!(keys.missing_key_requests, 3, "paired: {paired}");
        assert_eq!(keys.overflow_requests, 5, "paired: {paired}");
        assert_eq!(limiter.status().rejected_requests, 7, "paired: {paired}");
        let rejected: Vec<_> = keys.most_rejected.iter().map(|key| key.rejected).collect();
        assert_eq!(rejected, [2, 1], "of the keyless and of the one that is tracked");
        let all = all.status();
        let spent = if paired { 3 } else { 0 };
        assert_eq!(
            (all.accepted_requests, all.returned_requests),
            (spent, 0),
            "a refusal takes nothing, not even for a moment"
        );
    }
}

#[test]
fn a_keyed_limit_may_charge_by_the_request() {
    let (limiter, _) = keyed(TokenBucket::new(10, MINUTE), 10);
    let by_cost = limiter.by(caller).cost(|call: &Call| call.cost);
    let service = RateLimitLayer::new(by_cost).layer(yes());
    let ask = |caller: &'static str, cost| {
        let call = Call {
            caller: Some(caller),
            cost,
        };
        service.clone().oneshot(call).now_or_never()
    };
    ask("a", 7).unwrap().unwrap();
    refused(ask("a", 4));
    ask("a", 3).unwrap().unwrap();
    ask("b", 10).unwrap().unwrap();
    assert_eq!(
        refused(ask("c", 11)).reason,
        Reason::CostExceedsBurst { cost: 11, burst: 10 }
    );
    assert_eq!(keys(&limiter).tracked, 2, "who asked for too much is not remembered");
    assert_eq!(limiter.status().accepted_cost, 20);
}

#[test]
fn what_a_call_behind_a_layer_cost_in_truth_is_charged_at_its_key() {
    let (limiter, _) = keyed(TokenBucket::new(10, MINUTE), 10);
    let service = RateLimitLayer::new(limiter.by(caller))
        .classify(|_: &Result<(), std::io::Error>| Verdict::new(Outcome::Success).cost(4))
        .layer(yes());
    let ask = |who| service.clone().oneshot(call(who)).now_or_never().unwrap().is_ok();
    assert_eq!([(); 4].map(|()| ask("a")), [true, true, true, false]);
    assert!(ask("b"));
}

#[test]
fn an_adaptive_limit_learns_at_its_key_how_the_calls_behind_a_layer_end() {
    let adaptive = Adaptive::new(10)
        .min_rate(1)
        .burst(1)
        .window(MINUTE)
        .adjustment_factor(0.5)
        .minimum_calls(1);
    let (limiter, clock) = keyed(adaptive, 10);
    let layer = RateLimitLayer::new(limiter.by(caller)).classify(|_: &Result<(), std::io::Error>| Outcome::Failure);
    let service = layer.layer(yes());
    let ask = |who| service.clone().oneshot(call(who)).now_or_never();
    ask("a").unwrap().unwrap();
    clock.advance(MINUTE);
    ask("a").unwrap().unwrap();
    ask("b").unwrap().unwrap();
    assert_eq!(refused(ask("a")).retry_after, Some(MINUTE / 5), "half as fast");
    assert_eq!(refused(ask("b")).retry_after, Some(MINUTE / 10));
}

#[test]
fn a_listener_that_was_removed_hears_nothing_more() {
    let (limiter, clock) = keyed(TokenBucket::new(1, MINUTE), 10);
    let heard = Arc::new(AtomicU32::new(0));
    let listener = limiter.on_event({
        let heard = heard.clone();
        move |_| {
            heard.fetch_add(1, Ordering::Relaxed);
        }
    });
    limiter.try_acquire("a").unwrap();
    limiter.try_acquire("a").unwrap_err();
    assert!(limiter.remove_listener(listener));
    assert!(!limiter.remove_listener(listener), "it is gone already");
    limiter.try_acquire("a").unwrap_err();
    assert_eq!(heard.load(Ordering::Relaxed), 1);
    clock.advance(MINUTE);
    assert_eq!(limiter.clock().now(), clock.now(), "the clock it was given");
}

#[test]
fn rejections_are_events() {
    let (limiter, _) = keyed(TokenBucket::new(1, MINUTE), 10);
    let mut events = limiter.subscribe(8);
    limiter.try_acquire("a").unwrap();
    limiter.try_acquire("a").unwrap_err();
    let event = events.try_recv().unwrap();
    assert!(matches!(event.kind, EventKind::Rejected(why) if why.reason == Reason::OverLimit));
    assert!(events.try_recv().is_none());
}

#[test]
fn a_registry_knows_a_keyed_limit_by_its_name() {
    let registry = Registry::with_clock(Clock::manual());
    let bucket = TokenBucket::new(1, MINUTE);
    let made = registry.keyed_rate_limiter("api", "callers", bucket, 10).unwrap();
    made.try_acquire("a").unwrap();
    let same = registry
        .keyed_rate_limiter("api", "callers", bucket.burst(1), 10)
        .unwrap();
    assert!(same.try_acquire("a").is_err(), "the same state");
    for (algorithm, max) in [(TokenBucket::new(2, MINUTE), 10), (bucket, 11)] {
        let error = registry
            .keyed_rate_limiter("api", "callers", algorithm, max)
            .unwrap_err();
        assert!(matches!(error, RegistryError::Conflict { .. }), "{error}");
    }
    let taken = registry.named_rate_limiter("api", "callers", bucket).unwrap_err();
    assert!(matches!(taken, RegistryError::Taken { .. }), "{taken}");
    registry.named_rate_limiter("api", "all", bucket).unwrap();
    let taken = registry.keyed_rate_limiter("api", "all", bucket, 10).unwrap_err();
    assert!(matches!(taken, RegistryError::Taken { .. }), "{taken}");
    registry.register(&made).expect("the same one");
    let other = KeyedRateLimiter::builder("api", bucket)
        .limit("callers")
        .max_keys(10)
        .build()
        .unwrap();
    assert!(matches!(registry.register(other), Err(RegistryError::Taken { .. })));
    assert!(registry.get_keyed_rate_limiter("api", "callers").is_some());
    assert!(registry.get_keyed_rate_limiter("api", "all").is_none());

    let mut events = registry.subscribe(8);
    made.try_acquire("a").unwrap_err();
    assert!(events.try_recv().is_some(), "a registry's listeners hear it");
    let status = registry.service_status("api").unwrap();
    let names: Vec<_> = status
        .rate_limiters
        .iter()
        .map(|it| (it.name.as_str(), it.keys.is_some()))
        .collect();
    assert_eq!(names, [("all", false), ("callers", true)]);
}

#[test]
fn metrics_tell_counts_and_never_a_key() {
    let registry = Registry::with_clock(Clock::manual());
    let limiter = registry
        .keyed_rate_limiter("api", "callers", TokenBucket::new(1, MINUTE), 2)
        .unwrap();
    for key in ["secret-a", "secret-a", "secret-b", "secret-c"] {
        let _ = limiter.try_acquire(key);
    }
    let page = registry.metrics_text(MetricsFormat::Prometheus);
    for line in [
        r#"rate_limiter_tracked_keys{service="api",limit="callers"} 2"#,
        r#"rate_limiter_max_keys{service="api",limit="callers"} 2"#,
        r#"rate_limiter_evicted_keys_total{service="api",limit="callers"} 0"#,
        r#"rate_limiter_overflow_requests_total{service="api",limit="callers"} 1"#,
        r#"rate_limiter_missing_key_requests_total{service="api",limit="callers"} 0"#,
        r#"rate_limiter_accepted_total{service="api",limit="callers"} 3"#,
        r#"rate_limiter_rejected_total{service="api",limit="callers",reason="over_limit"} 1"#,
        r#"rate_limiter_rejected_total{service="api",limit="callers",reason="missing_key"} 0"#,
    ] {
        assert!(page.lines().any(|it| it == line), "{line} in\n{page}");
    }
    assert!(
        !page.contains("secret") && !page.contains("rate_limiter_available"),
        "{page}"
    );
}

#[derive(Debug, Clone)]
enum Step {
    Take(u8, u32),
    TakeBack(u8, u32),
    Settle(u8, u32, u32),
    Advance(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..6_u8, 0..5_u32).prop_map(|(key, cost)| Step::Take(key, cost)),
        (0..6_u8, 1..4_u32).prop_map(|(key, cost)| Step::TakeBack(key, cost)),
        (0..6_u8, 0..4_u32, 0..6_u32).prop_map(|(key, cost, truth)| Step::Settle(key, cost, truth)),
        (0..40_000_000_000_u64).prop_map(Step::Advance),
    ];
    proptest::collection::vec(step, 1..120)
}

proptest! {
    #[test]
    fn each_key_is_limited_as_by_a_limiter_of_its_own(steps in steps(), which in 0..2_usize) {
        let (_, algorithm) = algorithms()[which];
        let (limiter, clock) = keyed(algorithm, 6);
        let mut singles: HashMap<u8, RateLimiter> = HashMap::new();
        for step in steps {
            let mut single = |key: u8| {
                let single = singles.entry(key).or_insert_with(|| {
                    RateLimiter::builder("api", algorithm).limit("per-caller").clock(&clock).build().unwrap()
                });
                single.clone()
            };
            match step {
                Step::Advance(by) => clock.advance(Duration::from_nanos(by)),
                Step::Take(key, cost) => {
                    let (ours, theirs) = (limiter.try_acquire_n(&key, cost), single(key).try_acquire_n(cost));
                    prop_assert_eq!(ours.err(), theirs.err());
                }
                Step::TakeBack(key, cost) => {
                    match (limiter.try_acquire_n(&key, cost), single(key).try_acquire_n(cost)) {
                        (Ok(ours), Ok(theirs)) => {
                            ours.unused();
                            theirs.unused();
                        }
                        (ours, theirs) => prop_assert_eq!(ours.err(), theirs.err()),
                    }
                }
                Step::Settle(key, cost, truth) => {
                    let verdict = Verdict::new(Outcome::Success).cost(truth);
                    match (limiter.try_acquire_n(&key, cost), single(key).try_acquire_n(cost)) {
                        (Ok(ours), Ok(theirs)) => {
                            ours.settle(verdict);
                            theirs.settle(verdict);
                        }
                        (ours, theirs) => prop_assert_eq!(ours.err(), theirs.err()),
                    }
                }
            }
            prop_assert!(keys(&limiter).tracked <= 6);
        }
    }
}
