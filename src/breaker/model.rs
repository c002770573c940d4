//! Models of the packed word: of what it admits, refuses and counts without the machine, and of the generations it tells apart.
//!
//! They look at a breaker from outside, by its permits and its status: what the word is made of is its own affair.

use super::*;
use crate::{
    clock::ManualClock,
    permit::Permit,
    sync::{explore, spawn},
};
use std::{sync::atomic::AtomicUsize, time::Duration};

const fn nanos(n: u64) -> Duration {
    Duration::from_nanos(n)
}

const OPEN: u64 = 10;
const LEASE: u64 = 100;

/// One failure opens it, and one probe closes it.
fn breaker() -> (CircuitBreaker, ManualClock) {
    breaker_with(CircuitBreakerConfig::default().failure_threshold(1))
}

/// Two failures in a row open it.
fn breaker_of_two() -> CircuitBreaker {
    breaker_with(CircuitBreakerConfig::default().failure_threshold(2)).0
}

/// It never opens, and remembers the last eight calls.
fn breaker_that_counts() -> CircuitBreaker {
    let config = CircuitBreakerConfig::default().failure_rate(1.0).minimum_calls(8);
    breaker_with(config.window(Window::calls(8))).0
}

fn breaker_with(config: CircuitBreakerConfig) -> (CircuitBreaker, ManualClock) {
    let clock = Clock::manual();
    let config = config
        .recovery_timeout(nanos(OPEN))
        .probe_lease(nanos(LEASE))
        .half_open_max_calls(1)
        .success_threshold(1);
    let breaker = CircuitBreaker::builder("search").config(config).clock(&clock).build();
    (breaker.expect("a valid config"), clock)
}

fn acquire(breaker: &CircuitBreaker) -> CircuitBreakerPermit {
    breaker.try_acquire().expect("admitted")
}

fn trip(breaker: &CircuitBreaker) {
    acquire(breaker).settle(Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

/// Successes and failures, as counted.
fn counts(breaker: &CircuitBreaker) -> (u64, u64) {
    let metrics = breaker.status().metrics;
    (metrics.successful_requests, metrics.failed_requests)
}

/// Calls and failures, as remembered.
fn remembered(breaker: &CircuitBreaker) -> (u64, u64) {
    let window = breaker.status().window.expect("there is one");
    (window.calls, window.failures)
}

/// What the word answers is what the machine would.
fn assert_published(breaker: &CircuitBreaker) {
    let (now, at) = (Reading::new(), breaker.clock().now());
    let view = breaker.shared.caught_up().view(at);
    let refusal = view.refusal.map(|refusal| (refusal.reason, refusal.until));
    let told = breaker.peek(&now);
    let told = told.map(|told| (told.reason, told.retry_after.map(|wait| at.saturating_add(wait))));
    assert_eq!(told, refusal);
    let admitted = breaker
        .glance(&Reservation::default(), &now)
        .map(CircuitBreakerPermit::unused);
    assert_eq!(admitted.is_some(), view.state == State::Closed);
}

#[test]
fn a_refusal_by_the_word_has_its_reason_and_its_end_from_one_moment() {
    explore("a word is read while the circuit moves twice", 3, || {
        let (breaker, clock) = breaker();
        trip(&breaker);
        // One thread read the time while the circuit was still to stay open.
        clock.advance(nanos(5));
        let early = Reading::new();
        early.at(breaker.clock());
        clock.advance(nanos(7));
        let asks = breaker.clone();
        let asks = spawn(move || asks.acquire_at(&early));
        // A probe fills the half-open circuit, and fails.
        acquire(&breaker).settle(Outcome::Failure);
        let refused = asks.join().unwrap().expect_err("open, or full");
        let told = (refused.reason, refused.retry_after);
        let open = (Reason::Open, Some(nanos(5)));
        let full = (Reason::HalfOpenFull, Some(nanos(7 + LEASE)));
        let open_again = (Reason::Open, Some(nanos(7 + OPEN)));
        assert!([open, full, open_again].contains(&told), "{told:?}");
        assert_published(&breaker);
    });
}

#[test]
fn two_readers_of_a_word_are_both_told_the_truth() {
    explore("two read a word while a circuit opens", 2, || {
        let (breaker, _clock) = breaker();
        let fails = acquire(&breaker);
        let asks = || {
            let breaker = breaker.clone();
            spawn(move || match breaker.try_acquire() {
                Ok(permit) => {
                    permit.settle(Outcome::Ignored);
                    None
                }
                Err(refused) => Some((refused.reason, refused.retry_after)),
            })
        };
        let (one, two) = (asks(), asks());
        fails.settle(Outcome::Failure);
        for told in [one.join().unwrap(), two.join().unwrap()].into_iter().flatten() {
            assert_eq!(told, (Reason::Open, Some(nanos(OPEN))));
        }
        assert!(breaker.try_acquire().is_err());
        assert_published(&breaker);
    });
}

#[test]
fn a_circuit_trips_whatever_succeeds_meanwhile() {
    explore("successes meet a trip", 2, || {
        let (breaker, _clock) = breaker();
        let (fails, succeeds) = (acquire(&breaker), acquire(&breaker));
        let glances = breaker.clone();
        let fails = spawn(move || fails.settle(Outcome::Failure));
        let glances = spawn(move || {
            // As a layer does: a look at the word, and the fast way to settle.
            let now = Reading::new();
            let mut permit = glances.glance(&Reservation::default(), &now);
            let admitted = permit.is_some();
            CircuitBreakerPermit::settle_in_place(&mut permit, Outcome::Success.into(), &now);
            u64::from(admitted)
        });
        succeeds.settle(Outcome::Success);
        fails.join().unwrap();
        let admitted = glances.join().unwrap();
        let status = breaker.status();
        assert_eq!((status.state, status.generation), (State::Open, 2));
        assert_eq!(counts(&breaker), (1 + admitted, 1));
        assert!(breaker.glance(&Reservation::default(), &Reading::new()).is_none());
        assert_published(&breaker);
    });
}

#[test]
fn no_failure_of_a_run_is_lost_and_none_is_counted_twice() {
    explore("two failures of a run", 3, || {
        let breaker = breaker_of_two();
        let (one, two) = (acquire(&breaker), acquire(&breaker));
        let one = spawn(move || one.settle(Outcome::Failure));
        two.settle(Outcome::Failure);
        one.join().unwrap();
        assert_eq!((breaker.state(), counts(&breaker)), (State::Open, (0, 2)));
        assert_published(&breaker);
    });
}

#[test]
fn a_success_ends_the_run_of_failures_before_it() {
    explore("a success between two failures", 3, || {
        let breaker = breaker_of_two();
        let (succeeds, other) = (breaker.clone(), acquire(&breaker));
        acquire(&breaker).settle(Outcome::Failure);
        let fails = acquire(&breaker);
        let succeeds = spawn(move || acquire(&succeeds).settle(Outcome::Success));
        other.settle(Outcome::Success);
        fails.settle(Outcome::Failure);
        succeeds.join().unwrap();
        assert_eq!((breaker.state(), counts(&breaker)), (State::Closed, (2, 2)));
        assert_published(&breaker);
    });
}

#[test]
fn a_success_that_is_counted_is_recorded_once() {
    explore("successes are counted while failures are recorded", 3, || {
        let breaker = breaker_that_counts();
        let (one, fails) = (acquire(&breaker), acquire(&breaker));
        acquire(&breaker).settle(Outcome::Failure);
        acquire(&breaker).settle(Outcome::Success);
        let succeeds = breaker.clone();
        let succeeds = spawn(move || {
            one.settle(Outcome::Success);
            acquire(&succeeds).settle(Outcome::Success);
        });
        // Records what was counted until then.
        fails.settle(Outcome::Failure);
        assert!((3..=5).contains(&remembered(&breaker).0));
        succeeds.join().unwrap();
        assert_eq!((remembered(&breaker), counts(&breaker)), ((5, 2), (3, 2)));
        acquire(&breaker).settle(Outcome::Failure);
        assert_eq!(remembered(&breaker), (6, 3));
        assert_published(&breaker);
    });
}

#[test]
fn a_success_that_is_counted_is_recorded_in_no_later_generation() {
    explore("a success is counted while the circuit is reset", 2, || {
        let breaker = breaker_that_counts();
        (0..2).for_each(|_| acquire(&breaker).settle(Outcome::Success));
        let old = acquire(&breaker);
        let other = breaker.clone();
        let succeeds = spawn(move || {
            old.settle(Outcome::Success);
            // Records what was counted until then.
            remembered(&other)
        });
        breaker.reset();
        // In a line that counted two before.
        acquire(&breaker).settle(Outcome::Success);
        acquire(&breaker).settle(Outcome::Failure);
        succeeds.join().unwrap();
        assert_eq!((remembered(&breaker), counts(&breaker)), ((2, 1), (4, 1)));
        assert_published(&breaker);
    });
}

#[test]
fn calls_of_an_earlier_generation_move_nothing() {
    explore("old calls end while a probe begins", 2, || {
        let (breaker, clock) = breaker();
        let (fails, succeeds) = (acquire(&breaker), acquire(&breaker));
        trip(&breaker);
        clock.advance(nanos(OPEN));
        let fails = spawn(move || fails.settle(Outcome::Failure));
        let succeeds = spawn(move || succeeds.settle(Outcome::Success));
        let probe = acquire(&breaker);
        fails.join().unwrap();
        succeeds.join().unwrap();
        let status = breaker.status();
        assert_eq!((status.state, status.generation), (State::HalfOpen, 3));
        assert_eq!((status.success_count, status.probes_in_flight), (0, 1));
        assert_eq!(counts(&breaker), (1, 2));
        probe.settle(Outcome::Success);
        assert_eq!(breaker.state(), State::Closed);
        assert_published(&breaker);
    });
}

#[test]
fn a_failure_from_before_a_reset_does_not_outlive_it() {
    explore("a reset meets a trip", 3, || {
        let (breaker, _clock) = breaker();
        let fails = acquire(&breaker);
        let resets = breaker.clone();
        let resets = spawn(move || resets.reset());
        fails.settle(Outcome::Failure);
        resets.join().unwrap();
        let status = breaker.status();
        assert_eq!((status.state, status.failure_count), (State::Closed, 0));
        assert_published(&breaker);
        acquire(&breaker).settle(Outcome::Success);
    });
}

#[test]
fn a_call_that_meets_a_circuit_while_it_is_disabled_counts_if_it_came_first() {
    explore("a circuit is disabled while a call asks", 3, || {
        let (breaker, clock) = breaker();
        trip(&breaker);
        clock.advance(nanos(OPEN));
        let disables = breaker.clone();
        let disables = spawn(move || disables.disable());
        let permit = acquire(&breaker);
        disables.join().unwrap();
        let came_first = breaker.status().probes_in_flight == 1;
        permit.settle(Outcome::Success);
        assert_eq!(counts(&breaker), (u64::from(came_first), 1));
        assert_eq!(breaker.status().probes_in_flight, 0);
    });
}

#[test]
fn there_are_never_more_probes_than_the_cap() {
    explore("two ask for one probe", 2, || {
        let (breaker, clock) = breaker();
        trip(&breaker);
        clock.advance(nanos(OPEN));
        let probes = Arc::new(AtomicUsize::new(0));
        let probe = |breaker: &CircuitBreaker, probes: &AtomicUsize| {
            let Ok(permit) = breaker.try_acquire() else {
                return 0;
            };
            assert_eq!(probes.fetch_add(1, Ordering::SeqCst), 0, "two probes at once");
            // A step between, for the others to come in.
            assert_eq!(breaker.status().probes_in_flight, 1);
            probes.fetch_sub(1, Ordering::SeqCst);
            permit.unused();
            1
        };
        let other = {
            let (breaker, probes) = (breaker.clone(), probes.clone());
            spawn(move || probe(&breaker, &probes))
        };
        let admitted = probe(&breaker, &probes) + other.join().unwrap();
        assert!(admitted > 0, "nobody probed");
        let status = breaker.status();
        assert_eq!((status.state, status.generation), (State::HalfOpen, 3));
        assert_eq!(status.probes_in_flight, 0);
        assert_published(&breaker);
    });
}

/// Ends a call as a layer does, at a time that the request has read.
fn settle_at(permit: CircuitBreakerPermit, outcome: Outcome, now: Timestamp) {
    CircuitBreakerPermit::settle_in_place(&mut Some(permit), outcome.into(), &Reading::of(&Clock::system(), now));
}

#[test]
fn no_call_is_lost_or_counted_in_a_tenth_before_its_own_while_the_next_begins() {
    // Within a tenth successes are counted by the system's clock alone: here one that stands still.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build();
    let runtime = Arc::new(runtime.expect("a runtime"));
    for outcome in [Outcome::Success, Outcome::Failure] {
        let runtime = runtime.clone();
        explore("a call ends while the next tenth of a window begins", 3, move || {
            let _inside = runtime.enter();
            let config = CircuitBreakerConfig::default().failure_rate(1.0).minimum_calls(100);
            let config = config.window(Window::time(nanos(1_000)));
            let breaker = CircuitBreaker::builder("search").config(config).build();
            let breaker = breaker.expect("a valid config");
            // From the beginning of a tenth on.
            let begin = breaker.clock().now().nanos().next_multiple_of(100);
            let after = move |n| Timestamp::from_nanos(begin + n);
            settle_at(acquire(&breaker), Outcome::Failure, after(50));
            let (first, third, fails) = (acquire(&breaker), acquire(&breaker), acquire(&breaker));
            let succeeds = spawn(move || {
                settle_at(first, Outcome::Success, after(60));
                settle_at(third, outcome, after(250));
            });
            settle_at(fails, Outcome::Failure, after(250));
            succeeds.join().unwrap();
            let seen = |now| {
                let view = breaker.shared.caught_up().view(after(now));
                view.window.expect("there is one").calls
            };
            assert_eq!(seen(250), 4, "each once");
            // The first is counted in the third tenth if its thread was held up until then.
            assert!((2..=3).contains(&seen(1_150)), "{}", seen(1_150));
            assert_eq!(seen(1_250), 0);
        });
    }
}
