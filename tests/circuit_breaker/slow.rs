//! Calls that take too long.

use crate::{SECOND, admit, breaker, end_calls, just_before, transitions, trip_and_wait};
use portcullis::{CircuitBreaker, ManualClock, Outcome, State, Window};
use std::time::Duration;

/// Half of the last four calls may not take two seconds; nothing else trips.
fn slow_breaker() -> (CircuitBreaker, ManualClock) {
    breaker(|builder| builder.slow_calls(0.5, 2 * SECOND).window(Window::calls(4)))
}

fn call_for(breaker: &CircuitBreaker, clock: &ManualClock, took: Duration, outcome: Outcome) {
    let permit = admit(breaker);
    clock.advance(took);
    permit.settle(outcome);
}

#[test]
fn a_call_of_exactly_the_slow_duration_is_slow_and_one_nanosecond_less_is_not() {
    let (breaker, clock) = slow_breaker();
    for _ in 0..100 {
        call_for(&breaker, &clock, just_before(2 * SECOND), Outcome::Success);
    }
    assert_eq!(breaker.status().metrics.slow_requests, 0);
    call_for(&breaker, &clock, 2 * SECOND, Outcome::Success);
    let status = breaker.status();
    assert_eq!(status.metrics.slow_requests, 1);
    let window = status.window.expect("a rate is watched");
    assert_eq!((window.calls, window.slow, window.slow_call_rate), (4, 1, Some(0.25)));
    assert_eq!(status.state, State::Closed, "a quarter of the calls");
    call_for(&breaker, &clock, 2 * SECOND, Outcome::Success);
    assert_eq!(
        breaker.state(),
        State::Open,
        "half of the calls were slow, though all succeeded"
    );
}

#[test]
fn quick_failures_do_not_trip_a_slow_call_rate() {
    let (breaker, _clock) = slow_breaker();
    end_calls(&breaker, 1_000, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed, "only slowness is watched");
}

#[test]
fn a_slow_failure_counts_on_both_sides() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .slow_calls(1.0, SECOND)
            .failure_rate(1.0)
            .window(Window::calls(10))
            .minimum_calls(10)
    });
    call_for(&breaker, &clock, SECOND, Outcome::Failure);
    let window = breaker.status().window.expect("a rate is watched");
    assert_eq!((window.calls, window.failures, window.slow), (1, 1, 1));
}

#[test]
fn a_slow_call_that_its_classifier_ignores_says_nothing() {
    let (breaker, clock) = slow_breaker();
    for _ in 0..10 {
        call_for(&breaker, &clock, 5 * SECOND, Outcome::Ignored);
    }
    let status = breaker.status();
    assert_eq!((status.state, status.metrics.slow_requests), (State::Closed, 0));
    assert_eq!(status.window.map(|window| window.calls), Some(0));
}

#[test]
fn a_cancelled_call_that_was_slow_already_counts_as_slow() {
    let (breaker, clock) = slow_breaker();
    for cancelled in 1..=4 {
        assert_eq!(breaker.state(), State::Closed);
        let permit = admit(&breaker);
        clock.advance(2 * SECOND);
        drop(permit);
        assert_eq!(breaker.status().metrics.cancelled_requests, cancelled);
    }
    let status = breaker.status();
    assert_eq!(
        status.state,
        State::Open,
        "callers that give up on a slow service do not hide it"
    );
    assert_eq!((status.metrics.slow_requests, status.metrics.failed_requests), (4, 0));
}

#[test]
fn a_cancelled_call_that_was_quick_says_nothing() {
    let (breaker, clock) = slow_breaker();
    for _ in 0..10 {
        let permit = admit(&breaker);
        clock.advance(just_before(2 * SECOND));
        drop(permit);
    }
    let status = breaker.status();
    assert_eq!(status.window.map(|window| window.calls), Some(0));
    assert_eq!(
        (status.metrics.cancelled_requests, status.metrics.slow_requests),
        (10, 0)
    );
}

#[test]
fn a_slow_cancelled_call_leaves_a_run_of_failures_alone() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .failure_threshold(3)
            .slow_calls(1.0, SECOND)
            .window(Window::calls(100))
    });
    end_calls(&breaker, 2, Outcome::Failure);
    let permit = admit(&breaker);
    clock.advance(SECOND);
    drop(permit);
    assert_eq!(breaker.status().failure_count, 2, "neither a failure nor a success");
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn a_slow_probe_opens_again_though_it_succeeded() {
    let (breaker, clock) = breaker(|builder| builder.failure_threshold(1).slow_calls(0.5, 2 * SECOND));
    trip_and_wait(&breaker, &clock);
    call_for(&breaker, &clock, 2 * SECOND, Outcome::Success);
    assert_eq!(breaker.state(), State::Open, "a service that is still slow is not well");
    assert_eq!(transitions(&breaker), [1, 1, 0, 1]);
}

#[test]
fn a_cancelled_probe_opens_again_only_if_it_was_slow() {
    for (took, state) in [(just_before(2 * SECOND), State::HalfOpen), (2 * SECOND, State::Open)] {
        let (breaker, clock) = breaker(|builder| builder.failure_threshold(1).slow_calls(0.5, 2 * SECOND));
        trip_and_wait(&breaker, &clock);
        let probe = admit(&breaker);
        clock.advance(took);
        drop(probe);
        let status = breaker.status();
        assert_eq!(
            (status.state, status.probes_in_flight),
            (state, 0),
            "a probe dropped after {took:?}"
        );
    }
}

#[test]
fn without_a_slow_call_rate_no_call_is_slow() {
    let (breaker, clock) = breaker(|builder| builder);
    call_for(&breaker, &clock, crate::YEAR, Outcome::Success);
    assert_eq!(breaker.status().metrics.slow_requests, 0);
}
