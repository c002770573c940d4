//! Clocks that stand still, jump, or lie behind.

use crate::{NANO, SECOND, YEAR, admit, breaker, end_calls, just_before, transitions, trip, trip_and_wait};
use portcullis::{Backoff, CircuitBreaker, Outcome, State, Window};
use std::time::Duration;

#[test]
fn a_clock_that_stands_still_lets_calls_through_trips_and_keeps_the_circuit_open() {
    let (breaker, _clock) = breaker(|builder| {
        builder
            .failures_within(10, SECOND)
            .failure_rate(0.9)
            .window(Window::time(SECOND))
            .slow_calls(0.5, SECOND)
    });
    end_calls(&breaker, 10_000, Outcome::Success);
    end_calls(&breaker, 10, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
    for _ in 0..1_000 {
        let rejected = breaker.try_acquire().expect_err("no time passes");
        assert_eq!(rejected.retry_after, Some(60 * SECOND));
    }
}

#[test]
fn a_breaker_tells_which_clock_it_reads() {
    let (breaker, clock) = breaker(|builder| builder);
    clock.advance(YEAR);
    assert_eq!(breaker.clock().now(), clock.now());
    clock.advance(NANO);
    assert_eq!(breaker.clock().now(), clock.now());
}

#[test]
fn a_jump_of_years_empties_the_windows_of_time_and_no_other() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .failures_within(10, YEAR)
            .failure_rate(1.0)
            .window(Window::time(YEAR))
    });
    end_calls(&breaker, 9, Outcome::Failure);
    clock.advance(90 * YEAR);
    let status = breaker.status();
    assert_eq!(
        (status.failure_count, status.window.map(|window| window.calls)),
        (0, Some(0))
    );
    end_calls(&breaker, 9, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed);

    let (breaker, clock) = crate::breaker(|builder| builder.failure_threshold(10));
    end_calls(&breaker, 9, Outcome::Failure);
    clock.advance(90 * YEAR);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open, "a run of failures has no age");
}

#[test]
fn a_jump_of_years_brings_an_open_circuit_to_half_open_once() {
    let (breaker, clock) = breaker(|builder| builder);
    trip(&breaker);
    clock.advance(90 * YEAR + 60 * SECOND);
    let status = breaker.status();
    assert_eq!((status.state, status.state_age), (State::HalfOpen, 90 * YEAR));
    let _hanging: Vec<_> = (0..3).map(|_| admit(&breaker)).collect();
    clock.advance(90 * YEAR);
    assert_eq!(breaker.status().probes_in_flight, 0);
    end_calls(&breaker, 2, Outcome::Success);
    assert_eq!(transitions(&breaker), [1, 1, 1, 0]);
}

#[test]
fn the_end_of_time_overflows_nothing() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .failures_within(2, 100 * YEAR)
            .failure_rate(0.5)
            .window(Window::time(100 * YEAR))
            .slow_calls(1.0, SECOND)
            .recovery_timeout(100 * YEAR)
            .recovery_backoff(Backoff::new(2.0, 100 * YEAR).jitter(0.5))
            .honor_retry_after(100 * YEAR)
    });
    clock.advance(Duration::MAX);
    end_calls(&breaker, 2, Outcome::Failure);
    assert_eq!(
        breaker.state(),
        State::HalfOpen,
        "there is no later instant: whatever was to come is there"
    );
    end_calls(&breaker, 2, Outcome::Success);
    assert_eq!(breaker.state(), State::Closed);
    clock.rewind(Duration::MAX);
    trip(&breaker);
    assert_eq!(breaker.state(), State::Open);
    assert!(breaker.status().retry_after > Some(49 * YEAR));
}

#[test]
fn a_caller_whose_clock_lies_behind_sees_no_half_open_circuit_close_or_open_for_it() {
    let (breaker, clock) = breaker(|builder| builder);
    trip_and_wait(&breaker, &clock);
    admit(&breaker).unused();
    clock.rewind(30 * SECOND);
    assert_eq!(breaker.state(), State::HalfOpen, "what has happened has happened");
    assert_eq!(breaker.status().state_age, Duration::ZERO, "no age is negative");
    end_calls(&breaker, 2, Outcome::Success);
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn a_slow_call_measured_backwards_is_not_slow() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .slow_calls(0.5, Duration::from_nanos(1))
            .window(Window::calls(1))
    });
    let permit = admit(&breaker);
    clock.rewind(YEAR);
    permit.settle(Outcome::Success);
    assert_eq!(
        (breaker.state(), breaker.status().metrics.slow_requests),
        (State::Closed, 0)
    );
}

#[test]
fn a_trip_noticed_by_a_thread_that_lies_behind_opens_from_its_own_time() {
    let (breaker, clock) = breaker(|builder| builder);
    end_calls(&breaker, 4, Outcome::Failure);
    clock.rewind(10 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.status().retry_after, Some(60 * SECOND));
    clock.advance(60 * SECOND);
    assert_eq!(breaker.state(), State::HalfOpen);
}

#[test]
fn a_failure_reported_late_counts_for_when_it_was() {
    let (breaker, clock) = breaker(|builder| builder.failures_within(3, 10 * SECOND));
    end_calls(&breaker, 1, Outcome::Failure);
    clock.advance(20 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    clock.rewind(2 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    clock.advance(2 * SECOND);
    assert_eq!(breaker.status().failure_count, 2, "the late one lies two seconds back");
    clock.advance(7 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open, "three within nine seconds");
}

#[test]
fn failures_further_apart_than_the_period_do_not_trip_in_whatever_order_they_are_reported() {
    let (breaker, clock) = breaker(|builder| builder.failures_within(2, 10 * SECOND));
    clock.advance(100 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    clock.rewind(95 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed, "the two lie 95 seconds apart");
    clock.advance(96 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open, "the latest two lie one second apart");
}

#[test]
fn a_late_report_does_not_push_a_later_failure_out() {
    let (breaker, clock) = breaker(|builder| builder.failures_within(2, 10 * SECOND));
    end_calls(&breaker, 1, Outcome::Failure);
    clock.advance(100 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    clock.rewind(50 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    clock.rewind(50 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed);
    clock.advance(109 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open, "the failures at 100 and at 109 seconds");
}

#[test]
fn a_thread_that_lies_behind_does_not_see_more_than_one_time_window() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .failure_rate(0.5)
            .window(Window::time(10 * SECOND))
            .minimum_calls(10)
    });
    end_calls(&breaker, 9, Outcome::Failure);
    clock.advance(95 * SECOND);
    end_calls(&breaker, 1, Outcome::Success);
    clock.rewind(95 * SECOND);
    let window = breaker.status().window.expect("a rate is watched");
    assert_eq!(
        (window.calls, window.failures),
        (1, 0),
        "the failures and the success lie 95 seconds apart"
    );
    end_calls(&breaker, 1, Outcome::Success);
    assert_eq!(breaker.state(), State::Closed, "no ten calls lie within ten seconds");
}

#[tokio::test(start_paused = true)]
async fn the_default_clock_is_tokios_and_can_be_paused() {
    let breaker = CircuitBreaker::builder("search")
        .build()
        .expect("the defaults are valid");
    trip(&breaker);
    tokio::time::advance(just_before(60 * SECOND)).await;
    assert_eq!(breaker.state(), State::Open);
    tokio::time::advance(NANO).await;
    assert_eq!(breaker.state(), State::HalfOpen);
}
