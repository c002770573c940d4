//! Calls that take too long.

use crate::{
    SECOND, admit, breaker,
    chance::{self, Dice},
    end_calls, just_before, transitions, trip_and_wait,
};
use portcullis::{CircuitBreaker, CircuitBreakerConfig, ManualClock, Outcome, State, Window};
use std::{collections::VecDeque, time::Duration};

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

/// What the last calls were: whether each failed, and whether it was slow.
#[derive(Default)]
struct LastCalls(VecDeque<(bool, bool)>);

impl LastCalls {
    fn push(&mut self, size: usize, failed: bool, slow: bool) {
        self.0.push_back((failed, slow));
        self.resize(size);
    }

    fn resize(&mut self, size: usize) {
        while self.0.len() > size {
            self.0.pop_front();
        }
    }

    fn assert_shown_by(&self, breaker: &CircuitBreaker, after: &str) {
        let window = breaker.status().window.expect("a rate is watched");
        let failures = self.0.iter().filter(|call| call.0).count() as u64;
        let slow = self.0.iter().filter(|call| call.1).count() as u64;
        assert_eq!(
            (window.calls, window.failures, window.slow),
            (self.0.len() as u64, failures, slow),
            "{after}"
        );
    }
}

#[test]
fn a_slow_call_leaves_a_window_when_as_many_others_have_come_whatever_the_size_becomes() {
    let config = |size: u32| {
        CircuitBreakerConfig::default()
            .failure_rate(1.0)
            .slow_calls(1.0, SECOND)
            .window(Window::calls(size))
            .minimum_calls(size)
    };
    let seed = chance::seed();
    for (task, first) in (0..).zip([3, 63, 64, 65, 130].repeat(4)) {
        let mut dice = Dice::new(seed, task);
        let mut size = first;
        let (breaker, clock) = breaker(|builder| builder.config(config(size)));
        let mut last = LastCalls::default();
        for step in 0..600 {
            // Neither all calls fail nor are all slow, so that nothing trips.
            let (failed, slow) = match step % 3 {
                0 => (false, false),
                _ => (dice.once_in(3), dice.once_in(3)),
            };
            let outcome = if failed { Outcome::Failure } else { Outcome::Success };
            call_for(&breaker, &clock, if slow { SECOND } else { Duration::ZERO }, outcome);
            last.push(size as usize, failed, slow);
            last.assert_shown_by(&breaker, &format!("task {task}, step {step}, size {size}"));
            if dice.once_in(50) {
                size = 3 + u32::try_from(dice.below(140)).expect("small");
                breaker.reconfigure(config(size)).expect("valid");
                last.resize(size as usize);
                last.assert_shown_by(&breaker, &format!("task {task}, resized at step {step} to {size}"));
            }
        }
    }
}

#[test]
fn slow_calls_in_a_window_of_time_add_up_over_its_tenths_and_leave_with_them() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .slow_calls(1.0, SECOND)
            .window(Window::time(100 * SECOND))
            .minimum_calls(1_000)
    });
    let slow = |breaker: &CircuitBreaker| breaker.status().window.map(|window| (window.calls, window.slow));
    for tenth in 1..=10 {
        call_for(&breaker, &clock, 2 * SECOND, Outcome::Success);
        call_for(&breaker, &clock, 3 * SECOND, Outcome::Failure);
        call_for(&breaker, &clock, Duration::ZERO, Outcome::Success);
        assert_eq!(slow(&breaker), Some((3 * tenth, 2 * tenth)), "after {tenth} tenths");
        clock.advance(5 * SECOND);
    }
    clock.advance(45 * SECOND);
    let left = slow(&breaker).expect("a rate is watched");
    assert!(
        left.1 > 0 && left.1 < 20 && left.0 * 2 == left.1 * 3,
        "a part has left: {left:?}"
    );
    clock.advance(100 * SECOND);
    assert_eq!(slow(&breaker), Some((0, 0)), "all have left");
}
