//! The half-open circuit: how many probes, for how long, and that nothing a probe does can wedge it.

use crate::{NANO, SECOND, YEAR, admit, breaker, end_calls, just_before, transitions, trip, trip_and_wait};
use portcullis::{CircuitBreaker, CircuitBreakerBuilder, CircuitBreakerPermit, ManualClock, Outcome, Reason, State};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Barrier,
    thread,
};

/// Half-open, with what it takes to be there.
fn half_open(configure: impl FnOnce(CircuitBreakerBuilder) -> CircuitBreakerBuilder) -> (CircuitBreaker, ManualClock) {
    let (breaker, clock) = breaker(configure);
    trip_and_wait(&breaker, &clock);
    (breaker, clock)
}

/// All the probes that are admitted at once.
fn fill(breaker: &CircuitBreaker) -> Vec<CircuitBreakerPermit> {
    std::iter::from_fn(|| breaker.try_acquire().ok()).take(1_000).collect()
}

fn in_flight(breaker: &CircuitBreaker) -> usize {
    breaker.status().probes_in_flight
}

fn assert_recovers(breaker: &CircuitBreaker, why: &str) {
    assert_eq!(in_flight(breaker), 0, "{why}: no slot is taken");
    end_calls(breaker, 2, Outcome::Success);
    assert_eq!(breaker.state(), State::Closed, "{why}: the breaker recovers");
}

#[test]
fn a_half_open_circuit_admits_no_more_probes_than_allowed() {
    for allowed in [1, 2, 3, 17] {
        let (breaker, _clock) = half_open(|builder| builder.half_open_max_calls(allowed).success_threshold(1));
        let mut probes = fill(&breaker);
        assert_eq!(probes.len(), allowed as usize);
        assert_eq!(in_flight(&breaker), allowed as usize);
        assert_eq!(breaker.try_acquire().expect_err("full").reason, Reason::HalfOpenFull);
        drop(probes.pop());
        assert_eq!(fill(&breaker).len(), 1, "a probe that ends makes room for one");
        assert_eq!(
            breaker.status().metrics.rejected.half_open_full,
            3,
            "every refusal is counted by its reason"
        );
    }
}

#[test]
fn threads_behind_a_barrier_get_no_more_probes_than_allowed() {
    const THREADS: usize = 8;
    for _round in 0..50 {
        let (breaker, _clock) = half_open(|builder| builder);
        let barrier = Barrier::new(THREADS);
        let probes: Vec<CircuitBreakerPermit> = thread::scope(|scope| {
            let contend = || {
                barrier.wait();
                (0..20).filter_map(|_| breaker.try_acquire().ok()).collect::<Vec<_>>()
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(contend)).collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        assert_eq!(probes.len(), 3, "of {THREADS} threads with 20 attempts each");
        let status = breaker.status();
        assert_eq!(status.metrics.rejected.half_open_full, 20 * THREADS as u64 - 3);
        assert_eq!(
            status.metrics.state_transitions.open_to_half_open, 1,
            "one of them made the transition"
        );
        drop(probes);
        assert_recovers(&breaker, "after the rush");
    }
}

#[test]
fn enough_successes_close_and_a_single_failure_opens_again() {
    let (breaker, clock) = half_open(|builder| builder.half_open_max_calls(5).success_threshold(4));
    end_calls(&breaker, 3, Outcome::Success);
    assert_eq!(breaker.status().success_count, 3);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(
        breaker.state(),
        State::Open,
        "three successes do not outweigh a failure"
    );
    assert_eq!(
        breaker.status().retry_after,
        Some(60 * SECOND),
        "the open time starts over"
    );
    clock.advance(60 * SECOND);
    assert_eq!(breaker.status().success_count, 0, "earlier successes are forgotten");
    end_calls(&breaker, 3, Outcome::Success);
    assert_eq!(breaker.state(), State::HalfOpen);
    end_calls(&breaker, 1, Outcome::Success);
    assert_eq!(breaker.state(), State::Closed);
    assert_eq!(transitions(&breaker), [1, 2, 1, 1]);
}

#[test]
fn probes_further_apart_than_any_window_still_close_the_circuit() {
    let (breaker, clock) = half_open(|builder| builder.failures_within(2, SECOND));
    end_calls(&breaker, 1, Outcome::Success);
    clock.advance(YEAR);
    end_calls(&breaker, 1, Outcome::Success);
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn a_dropped_probe_frees_its_slot_and_closes_nothing() {
    let (breaker, _clock) = half_open(|builder| builder.success_threshold(1));
    for _ in 0..100 {
        drop(fill(&breaker));
        assert_eq!((in_flight(&breaker), breaker.state()), (0, State::HalfOpen));
    }
    assert_eq!(breaker.status().metrics.cancelled_requests, 300);
    end_calls(&breaker, 1, Outcome::Success);
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn an_ignored_probe_frees_its_slot_and_closes_nothing() {
    let (breaker, _clock) = half_open(|builder| builder);
    end_calls(&breaker, 100, Outcome::Ignored);
    assert_eq!(
        breaker.state(),
        State::HalfOpen,
        "what says nothing about the service is no recovery"
    );
    assert_recovers(&breaker, "after ignored probes");
}

#[test]
fn an_unused_probe_frees_its_slot_and_is_not_counted() {
    let (breaker, _clock) = half_open(|builder| builder);
    let before = breaker.status();
    for _ in 0..100 {
        fill(&breaker).into_iter().for_each(CircuitBreakerPermit::unused);
    }
    let metrics = breaker.status().metrics;
    assert_eq!(
        metrics.total_requests - metrics.rejected_requests,
        before.metrics.total_requests
    );
    assert_recovers(&breaker, "after unused probes");
}

#[test]
fn a_panicking_probe_is_one_failure_and_frees_its_slot() {
    let (breaker, clock) = half_open(|builder| builder);
    let failed = breaker.status().metrics.failed_requests;
    let probe = admit(&breaker);
    let panic = catch_unwind(AssertUnwindSafe(|| {
        let _probe = probe;
        panic!("the probe blew up");
    }));
    assert!(panic.is_err());
    let status = breaker.status();
    assert_eq!((status.state, status.probes_in_flight), (State::Open, 0));
    assert_eq!(status.metrics.failed_requests, failed + 1);
    clock.advance(60 * SECOND);
    assert_recovers(&breaker, "after a panic");
}

#[test]
fn a_probe_that_never_ends_loses_its_slot_with_its_lease() {
    let (breaker, clock) = half_open(|builder| builder.probe_lease(10 * SECOND));
    let hanging = fill(&breaker);
    clock.advance(just_before(10 * SECOND));
    assert!(breaker.try_acquire().is_err(), "the lease runs for one more nanosecond");
    assert_eq!(in_flight(&breaker), 3);
    clock.advance(NANO);
    assert_recovers(&breaker, "with three probes that never end");
    hanging.into_iter().for_each(std::mem::forget);
    assert_eq!(in_flight(&breaker), 0);
}

#[test]
fn a_lease_lasts_as_long_as_the_recovery_timeout_by_default() {
    let (breaker, clock) = half_open(|builder| builder.recovery_timeout(7 * SECOND));
    let _probes = fill(&breaker);
    assert_eq!(breaker.status().retry_after, Some(7 * SECOND));
    clock.advance(7 * SECOND);
    assert_eq!(fill(&breaker).len(), 3);
}

#[test]
fn the_late_outcome_of_a_probe_without_a_lease_still_counts() {
    for (outcome, state) in [(Outcome::Success, State::Closed), (Outcome::Failure, State::Open)] {
        let (breaker, clock) = half_open(|builder| builder.success_threshold(1).half_open_max_calls(1));
        let late = admit(&breaker);
        clock.advance(60 * SECOND);
        let next = admit(&breaker);
        late.settle(outcome);
        assert_eq!(breaker.state(), state, "it is of this generation");
        next.settle(Outcome::Ignored);
        assert_eq!(in_flight(&breaker), 0);
    }
}

#[test]
fn a_late_outcome_does_not_free_the_slot_of_another_probe() {
    let (breaker, clock) = half_open(|builder| builder.half_open_max_calls(1).success_threshold(1));
    let late = admit(&breaker);
    clock.advance(60 * SECOND);
    let _next = admit(&breaker);
    late.settle(Outcome::Ignored);
    assert_eq!(in_flight(&breaker), 1);
    assert!(breaker.try_acquire().is_err(), "the slot is taken by the next probe");
}

#[test]
fn late_successes_close_with_those_of_the_probes_that_took_their_slots() {
    let (breaker, clock) = half_open(|builder| builder.half_open_max_calls(2).success_threshold(2));
    let late = fill(&breaker);
    clock.advance(60 * SECOND);
    end_calls(&breaker, 1, Outcome::Success);
    for (probe, state) in late.into_iter().zip([State::Closed, State::Closed]) {
        probe.settle(Outcome::Success);
        assert_eq!(breaker.state(), state);
    }
    assert_eq!(transitions(&breaker), [1, 1, 1, 0]);
}

#[test]
fn a_probe_still_running_from_the_half_open_state_before_keeps_its_slot() {
    let (breaker, clock) = half_open(|builder| builder.probe_lease(100 * SECOND));
    let mut probes = fill(&breaker);
    probes.pop().expect("three").settle(Outcome::Failure);
    clock.advance(60 * SECOND);
    let status = breaker.status();
    assert_eq!((status.state, status.probes_in_flight), (State::HalfOpen, 2));
    let fresh = fill(&breaker);
    assert_eq!(fresh.len(), 1, "no more than three run in the service at once");
    drop(probes);
    assert_eq!(
        in_flight(&breaker),
        1,
        "ending, they free their slots in the next state too"
    );
    drop(fresh);
    assert_recovers(&breaker, "after leftovers");
}

#[test]
fn calls_begun_before_the_trip_are_no_probes() {
    let (breaker, clock) = breaker(|builder| builder);
    let begun: Vec<_> = (0..10).map(|_| admit(&breaker)).collect();
    trip(&breaker);
    clock.advance(60 * SECOND);
    assert_eq!(in_flight(&breaker), 0);
    assert_eq!(fill(&breaker).len(), 3, "they take no slot");
    drop(begun);
    assert_eq!(breaker.state(), State::HalfOpen);
}
