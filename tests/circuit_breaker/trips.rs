//! What opens a closed circuit, and what does not.

use crate::{NANO, SECOND, admit, breaker, end_calls, just_before, transitions, trip_and_wait};
use portcullis::{CircuitBreaker, Outcome, State, Timestamp, Window};
use proptest::{prelude::*, test_runner::TestCaseResult};
use std::{collections::VecDeque, time::Duration};

#[test]
fn the_defaults_are_five_failures_sixty_seconds_three_probes_and_two_successes() {
    let (breaker, clock) = breaker(|builder| builder);
    end_calls(&breaker, 4, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed, "four failures are not enough");
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open, "the fifth failure opens");
    assert_eq!(breaker.status().retry_after, Some(Duration::from_secs(60)));
    clock.advance(Duration::from_secs(60));
    let probes: Vec<_> = (0..3).map(|_| admit(&breaker)).collect();
    assert!(
        breaker.try_acquire().is_err(),
        "three probes fill the half-open circuit"
    );
    for (probe, after) in probes.into_iter().zip([State::HalfOpen, State::Closed, State::Closed]) {
        probe.settle(Outcome::Success);
        assert_eq!(breaker.state(), after, "the second success closes");
    }
}

#[test]
fn a_success_ends_a_run_of_failures() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(3));
    for _ in 0..100 {
        end_calls(&breaker, 2, Outcome::Failure);
        assert_eq!(breaker.status().failure_count, 2);
        end_calls(&breaker, 1, Outcome::Success);
        assert_eq!(breaker.status().failure_count, 0, "a success starts the run over");
    }
    assert_eq!(breaker.state(), State::Closed);
    end_calls(&breaker, 3, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn ignored_and_cancelled_and_unused_calls_leave_a_run_of_failures_alone() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(2));
    end_calls(&breaker, 1, Outcome::Failure);
    end_calls(&breaker, 50, Outcome::Ignored);
    (0..50).for_each(|_| drop(admit(&breaker)));
    (0..50).for_each(|_| admit(&breaker).unused());
    let status = breaker.status();
    assert_eq!((status.state, status.failure_count), (State::Closed, 1));
    assert_eq!(status.metrics.total_requests, 101, "an unused permit was no call");
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open, "the run goes on where it was");
}

#[test]
fn dropped_calls_count_as_failures_where_so_configured() {
    let (breaker, _clock) = breaker(|builder| builder.cancelled(Outcome::Failure));
    for _ in 0..5 {
        assert_eq!(breaker.state(), State::Closed);
        drop(admit(&breaker));
    }
    assert_eq!(breaker.state(), State::Open);
    let metrics = breaker.status().metrics;
    assert_eq!((metrics.failed_requests, metrics.cancelled_requests), (5, 0));
}

#[test]
fn after_ten_thousand_successes_exactly_the_failures_that_the_rate_asks_for_open_a_count_window() {
    for (size, rate, needed) in [
        (10, 0.5, 5),
        (100, 0.5, 50),
        (100, 0.1, 10),
        (64, 1.0, 64),
        (7, 0.3, 3),
        (1, 0.01, 1),
    ] {
        let (breaker, _clock) = breaker(|builder| builder.failure_rate(rate).window(Window::calls(size)));
        end_calls(&breaker, 10_000, Outcome::Success);
        end_calls(&breaker, needed - 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Closed, "one failure short of {rate} of {size}");
        end_calls(&breaker, 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Open, "{needed} failures are {rate} of {size}");
    }
}

#[test]
fn a_rate_is_reached_by_the_very_share_it_names() {
    // 0.1 × 30 is more than 3 in floating point: a product instead of a ratio would miss the third failure.
    let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.1).window(Window::calls(30)).minimum_calls(30));
    end_calls(&breaker, 27, Outcome::Success);
    end_calls(&breaker, 2, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed, "the window holds 29 calls");
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn a_count_window_forgets_its_oldest_call_with_every_new_one() {
    let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.5).window(Window::calls(10)).minimum_calls(1));
    end_calls(&breaker, 10, Outcome::Success);
    end_calls(&breaker, 4, Outcome::Failure);
    for forgotten in 0..=4u64 {
        let window = breaker.status().window.expect("a rate is watched");
        assert_eq!((window.calls, window.failures), (10, 4 - forgotten));
        let successes = if forgotten == 0 { 7 } else { 1 };
        end_calls(&breaker, successes, Outcome::Success);
    }
    end_calls(&breaker, 4, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed, "the first four failures are gone");
}

#[test]
fn failures_spread_below_the_rate_never_open_a_count_window() {
    let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.5).window(Window::calls(10)).minimum_calls(10));
    for _ in 0..1_000 {
        end_calls(&breaker, 6, Outcome::Success);
        end_calls(&breaker, 4, Outcome::Failure);
    }
    assert_eq!(transitions(&breaker), [0; 4]);
}

#[test]
fn minimum_calls_act_exactly_at_the_minimum() {
    for window in [Window::calls(100), Window::time(Duration::from_secs(100))] {
        let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.5).window(window).minimum_calls(5));
        end_calls(&breaker, 4, Outcome::Failure);
        let status = breaker.status();
        assert_eq!(status.state, State::Closed, "four of a minimum of five calls");
        assert_eq!(
            status.window.map(|window| window.failure_rate),
            Some(None),
            "no rate is told below the minimum"
        );
        end_calls(&breaker, 1, Outcome::Failure);
        assert_eq!(
            breaker.state(),
            State::Open,
            "the fifth call is the minimum, {window:?} or not full"
        );
    }
}

#[test]
fn the_call_that_reaches_the_minimum_may_be_a_success() {
    let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.5).window(Window::calls(100)).minimum_calls(5));
    end_calls(&breaker, 4, Outcome::Failure);
    end_calls(&breaker, 1, Outcome::Success);
    assert_eq!(
        breaker.state(),
        State::Open,
        "conditions are judged after every recorded call"
    );
}

#[test]
fn the_default_minimum_is_twenty_calls_or_a_smaller_window() {
    for (window, minimum) in [(100, 20), (20, 20), (8, 8)] {
        let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.01).window(Window::calls(window)));
        end_calls(&breaker, minimum - 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Closed);
        end_calls(&breaker, 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Open, "{minimum} calls in a window of {window}");
    }
}

#[test]
fn failures_within_a_period_open_whatever_succeeds_in_between() {
    let (breaker, clock) = breaker(|builder| builder.failures_within(3, 10 * SECOND));
    for _ in 0..2 {
        end_calls(&breaker, 1, Outcome::Failure);
        end_calls(&breaker, 1_000, Outcome::Success);
        clock.advance(4 * SECOND);
    }
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open, "three failures in eight seconds");
}

#[test]
fn failures_within_a_period_are_exact_to_the_nanosecond() {
    for (gap, state) in [(just_before(10 * SECOND), State::Open), (10 * SECOND, State::Closed)] {
        let (breaker, clock) = breaker(|builder| builder.failures_within(2, 10 * SECOND));
        end_calls(&breaker, 1, Outcome::Failure);
        clock.advance(gap);
        assert_eq!(breaker.status().failure_count, u64::from(gap < 10 * SECOND));
        end_calls(&breaker, 1, Outcome::Failure);
        assert_eq!(breaker.state(), state, "two failures {gap:?} apart, within ten seconds");
    }
}

#[test]
fn one_failure_within_the_shortest_period_opens() {
    let (breaker, _clock) = breaker(|builder| builder.failures_within(1, NANO));
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn any_of_several_conditions_opens() {
    let build = || {
        breaker(|builder| {
            builder
                .failure_threshold(3)
                .failures_within(4, SECOND)
                .failure_rate(0.5)
                .window(Window::calls(20))
                .minimum_calls(10)
        })
    };
    let fail_and_succeed = |breaker: &CircuitBreaker| {
        end_calls(breaker, 1, Outcome::Failure);
        end_calls(breaker, 1, Outcome::Success);
    };
    let (consecutive, _clock) = build();
    end_calls(&consecutive, 3, Outcome::Failure);
    assert_eq!(consecutive.state(), State::Open, "three in a row");

    let (within, _clock) = build();
    (0..3).for_each(|_| fail_and_succeed(&within));
    end_calls(&within, 1, Outcome::Failure);
    assert_eq!(within.state(), State::Open, "four within a second, no two in a row");

    let (rate, clock) = build();
    for _ in 0..5 {
        assert_eq!(rate.state(), State::Closed);
        fail_and_succeed(&rate);
        clock.advance(SECOND);
    }
    assert_eq!(rate.state(), State::Open, "half of ten calls, a second apart");
}

#[test]
fn the_default_threshold_gives_way_to_another_condition() {
    let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.5).window(Window::calls(100)).minimum_calls(50));
    end_calls(&breaker, 49, Outcome::Failure);
    assert_eq!(
        breaker.state(),
        State::Closed,
        "nobody asked for five failures in a row"
    );
}

#[test]
fn a_closed_circuit_starts_with_empty_windows() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .failure_threshold(5)
            .failures_within(5, Duration::from_secs(3600))
            .failure_rate(0.5)
            .window(Window::calls(5))
    });
    trip_and_wait(&breaker, &clock);
    end_calls(&breaker, 2, Outcome::Success);
    let status = breaker.status();
    assert_eq!((status.state, status.failure_count), (State::Closed, 0));
    assert_eq!(status.window.map(|window| window.calls), Some(0));
    end_calls(&breaker, 4, Outcome::Failure);
    assert_eq!(
        breaker.state(),
        State::Closed,
        "the failures before the recovery are forgotten"
    );
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

proptest! {
    /// Whatever the outcomes: the window holds the last N of them, and the circuit opens with the first call at which their
    /// rate is reached.
    #[test]
    fn a_count_window_holds_the_last_calls_and_no_others(
        size in 1u32..140,
        minimum in 1u32..140,
        rate in 0.05f64..=1.0,
        failed in prop::collection::vec(prop::bool::weighted(0.2), 1..600),
    ) {
        let minimum = minimum.min(size);
        let (breaker, _clock) =
            breaker(|builder| builder.failure_rate(rate).window(Window::calls(size)).minimum_calls(minimum));
        let mut last = VecDeque::new();
        for failed in failed {
            admit(&breaker).settle(if failed { Outcome::Failure } else { Outcome::Success });
            last.push_back(failed);
            if last.len() > size as usize {
                last.pop_front();
            }
            let failures = last.iter().filter(|failed| **failed).count();
            let window = breaker.status().window.expect("a rate is watched");
            prop_assert_eq!((window.calls, window.failures), (last.len() as u64, failures as u64));
            let reached = last.len() >= minimum as usize && failures as f64 / last.len() as f64 >= rate;
            prop_assert_eq!(breaker.state() == State::Open, reached);
            if reached {
                break;
            }
        }
    }

    /// A call counts for at least nine tenths of the period and for no more than the whole, wherever the tenths begin.
    #[test]
    fn a_time_window_reaches_between_nine_and_ten_tenths_of_its_period_back(
        tenth in 1u64..1_000,
        phase in 0u64..10_000,
        steps in prop::collection::vec((0u64..3_000, any::<bool>()), 1..100),
    ) {
        let period = Duration::from_nanos(tenth * 10);
        // A rate of more than any share that the calls reach: the circuit stays closed.
        let (breaker, clock) = breaker(|builder| {
            builder.failure_rate(1.0).window(Window::time(period)).minimum_calls(u32::MAX)
        });
        clock.advance(Duration::from_nanos(phase));
        let mut calls = Vec::new();
        let check = |calls: &[(Timestamp, bool)]| -> TestCaseResult {
            let young = |most: Duration, failures_only: bool| {
                let counts = |&&(at, failed): &&(Timestamp, bool)| {
                    clock.now().duration_since(at) < most && (failed || !failures_only)
                };
                calls.iter().filter(counts).count() as u64
            };
            let window = breaker.status().window.expect("a rate is watched");
            let (sure, most) = (period * 9 / 10 + NANO, period);
            prop_assert!((young(sure, false)..=young(most, false)).contains(&window.calls));
            prop_assert!((young(sure, true)..=young(most, true)).contains(&window.failures));
            Ok(())
        };
        for (step, failed) in steps {
            clock.advance(Duration::from_nanos(step));
            check(&calls)?;
            admit(&breaker).settle(if failed { Outcome::Failure } else { Outcome::Success });
            calls.push((clock.now(), failed));
            check(&calls)?;
        }
    }

    /// However the failures are spread: the circuit opens with the first one that is the n-th within the period.
    #[test]
    fn failures_within_a_period_open_at_the_first_that_is_one_too_many(
        most in 1u32..6,
        period in 1u64..50,
        gaps in prop::collection::vec(0u64..20, 1..80),
    ) {
        let (breaker, clock) = breaker(|builder| builder.failures_within(most, Duration::from_nanos(period)));
        let mut failures = Vec::new();
        for gap in gaps {
            clock.advance(Duration::from_nanos(gap));
            end_calls(&breaker, 1, Outcome::Failure);
            failures.push(clock.now());
            let recent = |at: &&Timestamp| clock.now().duration_since(**at) < Duration::from_nanos(period);
            let tripping = failures.iter().filter(recent).count() >= most as usize;
            prop_assert_eq!(breaker.state() == State::Open, tripping);
            if tripping {
                break;
            }
        }
    }
}
