//! Another config for a running breaker: what means the same under it is kept.

use crate::{NANO, SECOND, YEAR, admit, breaker, end_calls, just_before, transitions, trip, trip_and_wait};
use portcullis::{
    Backoff, CircuitBreaker, CircuitBreakerConfig, EventKind, ManualClock, Outcome, State, Window, WindowStatus,
};
use std::time::Duration;

fn config() -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
}

fn reconfigure(breaker: &CircuitBreaker, config: CircuitBreakerConfig) {
    breaker.reconfigure(config).expect("the config is valid");
}

fn window(breaker: &CircuitBreaker) -> WindowStatus {
    breaker.status().window.expect("a rate is watched")
}

fn over_calls(calls: u32) -> CircuitBreakerConfig {
    config().failure_rate(1.0).window(Window::calls(calls)).minimum_calls(1)
}

fn over_time(period: Duration) -> CircuitBreakerConfig {
    config().failure_rate(1.0).window(Window::time(period)).minimum_calls(1)
}

#[test]
fn a_refused_config_changes_nothing() {
    let (breaker, _clock) = breaker(|builder| builder);
    end_calls(&breaker, 4, Outcome::Failure);
    let mut events = breaker.subscribe(1);
    let before = breaker.status();
    let error = breaker
        .reconfigure(config().half_open_max_calls(1))
        .expect_err("two successes are needed");
    assert_eq!(error.field(), "half_open_max_calls");
    assert_eq!(breaker.status(), before);
    assert_eq!(events.try_recv(), None, "nothing happened");
}

#[test]
fn the_new_config_is_shown_and_announced() {
    let (breaker, clock) = breaker(|builder| builder);
    let mut events = breaker.subscribe(1);
    let new = config().failure_threshold(9).recovery_timeout(SECOND);
    reconfigure(&breaker, new.clone());
    assert_eq!((breaker.config(), breaker.status().config), (new.clone(), new));
    let event = events.try_recv().expect("an event");
    assert_eq!(
        (event.kind, event.at),
        (EventKind::Reconfigured { generation: 2 }, clock.now())
    );
}

#[test]
fn a_run_of_failures_goes_on() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(10));
    end_calls(&breaker, 7, Outcome::Failure);
    reconfigure(&breaker, config().failure_threshold(8));
    assert_eq!((breaker.state(), breaker.status().failure_count), (State::Closed, 7));
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn a_lower_threshold_trips_with_the_next_failure_and_not_before() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(10));
    end_calls(&breaker, 7, Outcome::Failure);
    reconfigure(&breaker, config().failure_threshold(3));
    assert_eq!(
        breaker.state(),
        State::Closed,
        "conditions are judged after a recorded call"
    );
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn a_count_window_keeps_its_latest_calls_when_it_shrinks_and_all_of_them_when_it_grows() {
    for recorded in [100, 137, 1_000] {
        let (breaker, _clock) = breaker(|builder| builder.config(over_calls(100)));
        end_calls(&breaker, recorded, Outcome::Success);
        end_calls(&breaker, 10, Outcome::Failure);
        end_calls(&breaker, 20, Outcome::Success);
        for (size, calls, failures) in [
            (100, 100, 10),
            (1_000, 100, 10),
            (70, 70, 10),
            (25, 25, 5),
            (64, 25, 5),
            (21, 21, 1),
        ] {
            reconfigure(&breaker, over_calls(size));
            let window = window(&breaker);
            assert_eq!(
                (window.calls, window.failures),
                (calls, failures),
                "in a window of {size} after {recorded}"
            );
        }
        end_calls(&breaker, 1, Outcome::Success);
        assert_eq!(window(&breaker).failures, 0, "the window slides on from where it was");
    }
}

#[test]
fn a_grown_count_window_fills_up_before_it_forgets() {
    let (breaker, _clock) = breaker(|builder| builder.config(over_calls(5)));
    end_calls(&breaker, 13, Outcome::Success);
    end_calls(&breaker, 1, Outcome::Failure);
    reconfigure(&breaker, over_calls(8));
    end_calls(&breaker, 7, Outcome::Success);
    assert_eq!((window(&breaker).calls, window(&breaker).failures), (8, 1));
    end_calls(&breaker, 1, Outcome::Success);
    assert_eq!((window(&breaker).calls, window(&breaker).failures), (8, 0));
}

#[test]
fn a_time_window_keeps_its_calls_when_it_grows() {
    let (breaker, clock) = breaker(|builder| builder.config(over_time(10 * SECOND)));
    for _ in 0..8 {
        end_calls(&breaker, 1, Outcome::Success);
        end_calls(&breaker, 1, Outcome::Failure);
        clock.advance(SECOND);
    }
    reconfigure(&breaker, over_time(100 * SECOND));
    assert_eq!((window(&breaker).calls, window(&breaker).failures), (16, 8));
    clock.advance(70 * SECOND);
    assert_eq!(
        (window(&breaker).calls, window(&breaker).failures),
        (16, 8),
        "they count as long as the new period says"
    );
    clock.advance(40 * SECOND);
    assert_eq!(window(&breaker).calls, 0);
}

#[test]
fn a_time_window_that_shrinks_forgets_what_is_older_than_its_new_period() {
    let (breaker, clock) = breaker(|builder| builder.config(over_time(100 * SECOND)));
    end_calls(&breaker, 1, Outcome::Success);
    end_calls(&breaker, 7, Outcome::Failure);
    clock.advance(60 * SECOND);
    end_calls(&breaker, 3, Outcome::Success);
    reconfigure(&breaker, over_time(50 * SECOND));
    assert_eq!((window(&breaker).calls, window(&breaker).failures), (3, 0));
    clock.advance(50 * SECOND);
    assert_eq!(window(&breaker).calls, 0);
}

#[test]
fn nothing_carries_over_between_a_window_of_calls_and_one_of_time() {
    let (breaker, _clock) = breaker(|builder| builder.config(over_calls(10)));
    end_calls(&breaker, 1, Outcome::Success);
    for next in [over_time(SECOND), over_calls(10)] {
        end_calls(&breaker, 5, Outcome::Success);
        reconfigure(&breaker, next);
        assert_eq!(window(&breaker).calls, 0);
    }
}

#[test]
fn failures_within_a_period_are_kept_under_another_number_and_period() {
    let (breaker, clock) = breaker(|builder| builder.failures_within(5, 10 * SECOND));
    for _ in 0..4 {
        end_calls(&breaker, 1, Outcome::Failure);
        clock.advance(4 * SECOND);
    }
    assert_eq!(breaker.status().failure_count, 2, "those of the last ten seconds");
    reconfigure(&breaker, config().failures_within(5, 20 * SECOND));
    assert_eq!(breaker.status().failure_count, 4, "the earlier ones count again");
    reconfigure(&breaker, config().failures_within(3, 20 * SECOND));
    assert_eq!(
        (breaker.status().failure_count, breaker.state()),
        (3, State::Closed),
        "no call, no judgement"
    );
    reconfigure(&breaker, config().failures_within(4, 20 * SECOND));
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open, "three kept and one more");
}

#[test]
fn a_success_never_trips_a_condition_that_counts_failures() {
    for last in [Outcome::Failure, Outcome::Success] {
        let (breaker, _clock) = breaker(|builder| builder.failures_within(5, SECOND));
        end_calls(&breaker, 3, Outcome::Failure);
        end_calls(&breaker, 1, last);
        reconfigure(&breaker, config().failures_within(2, SECOND));
        end_calls(&breaker, 10, Outcome::Success);
        assert_eq!(
            breaker.state(),
            State::Closed,
            "successes after a {last:?}, with too many failures for the new config"
        );
        end_calls(&breaker, 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Open);
    }
}

#[test]
fn an_open_circuit_keeps_the_instant_at_which_it_will_probe() {
    let (breaker, clock) = breaker(|builder| builder);
    trip(&breaker);
    clock.advance(20 * SECOND);
    for timeout in [SECOND, YEAR] {
        reconfigure(&breaker, config().recovery_timeout(timeout));
        let status = breaker.status();
        assert_eq!((status.state, status.retry_after), (State::Open, Some(40 * SECOND)));
        assert_eq!(status.state_age, 20 * SECOND, "it has been open as long as before");
    }
    clock.advance(just_before(40 * SECOND));
    assert!(breaker.try_acquire().is_err());
    clock.advance(NANO);
    admit(&breaker).settle(Outcome::Failure);
    assert_eq!(
        breaker.status().retry_after,
        Some(YEAR),
        "the next trip follows the new config"
    );
}

#[test]
fn a_half_open_circuit_keeps_its_probes_their_leases_and_its_successes() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .half_open_max_calls(4)
            .success_threshold(3)
            .probe_lease(30 * SECOND)
    });
    trip_and_wait(&breaker, &clock);
    end_calls(&breaker, 1, Outcome::Success);
    let probes: Vec<_> = (0..4)
        .map(|_| {
            clock.advance(SECOND);
            admit(&breaker)
        })
        .collect();
    reconfigure(&breaker, config().half_open_max_calls(2).probe_lease(YEAR));
    let status = breaker.status();
    assert_eq!(
        (status.state, status.probes_in_flight, status.success_count),
        (State::HalfOpen, 4, 1)
    );
    assert_eq!(
        status.retry_after,
        Some(29 * SECOND),
        "three of four leases must end before one more of two may run"
    );
    clock.advance(just_before(29 * SECOND));
    assert!(breaker.try_acquire().is_err());
    clock.advance(NANO);
    admit(&breaker).unused();
    for probe in probes {
        probe.settle(Outcome::Failure);
    }
    assert_eq!(
        breaker.state(),
        State::HalfOpen,
        "probes begun before are counted and move nothing"
    );
    end_calls(&breaker, 1, Outcome::Success);
    assert_eq!(
        breaker.state(),
        State::Closed,
        "one success before and one after are the two of the new config"
    );
}

#[test]
fn more_probes_are_let_through_at_once_when_more_are_allowed() {
    let (breaker, clock) = breaker(|builder| builder.half_open_max_calls(1).success_threshold(1));
    trip_and_wait(&breaker, &clock);
    let _probe = admit(&breaker);
    assert!(breaker.try_acquire().is_err());
    reconfigure(&breaker, config().half_open_max_calls(2));
    let _another = admit(&breaker);
    assert!(breaker.try_acquire().is_err());
}

#[test]
fn overrides_counters_and_the_backoff_survive() {
    let backoff = Backoff::new(2.0, YEAR);
    let (breaker, clock) = breaker(|builder| builder.recovery_timeout(SECOND).recovery_backoff(backoff));
    trip_and_wait(&breaker, &clock);
    end_calls(&breaker, 1, Outcome::Failure);
    let before = breaker.status().metrics;
    reconfigure(
        &breaker,
        config().recovery_timeout(10 * SECOND).recovery_backoff(backoff),
    );
    assert_eq!(breaker.status().metrics, before);
    clock.advance(2 * SECOND);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(
        breaker.status().retry_after,
        Some(40 * SECOND),
        "the third trip in a row: ten seconds × 2²"
    );
    assert_eq!(transitions(&breaker), [1, 2, 0, 2]);
    breaker.force_open();
    reconfigure(&breaker, config());
    assert!(breaker.try_acquire().is_err(), "forced open until reset");
}

#[test]
fn jitter_goes_on_under_the_same_seed_and_starts_over_under_another() {
    let jittered = |seed: u64| {
        let backoff = Backoff::new(1.0, 60 * SECOND).jitter(1.0).seed(seed);
        config().failure_threshold(1).recovery_backoff(backoff)
    };
    let open_time = |breaker: &CircuitBreaker| {
        breaker.reset();
        trip(breaker);
        breaker.status().retry_after.expect("open")
    };
    let open_times = |seed: u64| -> Vec<Duration> {
        let (breaker, _clock) = breaker(|builder| builder.config(jittered(seed)));
        (0..3).map(|_| open_time(&breaker)).collect()
    };
    let (breaker, _clock) = breaker(|builder| builder.config(jittered(1)));
    for (seed, expected) in [
        (1, open_times(1)[0]),
        (1, open_times(1)[1]),
        (2, open_times(2)[0]),
        (2, open_times(2)[1]),
    ] {
        reconfigure(&breaker, jittered(seed).success_threshold(1));
        assert_eq!(open_time(&breaker), expected, "seed {seed}");
    }
}

#[test]
fn a_call_that_began_before_slow_ones_were_watched_is_not_slow() {
    for outcome in [Outcome::Success, Outcome::Failure] {
        let (breaker, clock) = breaker(|builder| builder);
        clock.advance(YEAR);
        let running = admit(&breaker);
        reconfigure(&breaker, config().slow_calls(1.0, SECOND));
        running.settle(outcome);
        assert_eq!(breaker.status().metrics.slow_requests, 0);
    }
}

/// Ends one call for each, after a second if it is to be slow.
fn calls(breaker: &CircuitBreaker, clock: &ManualClock, slow: &[bool]) {
    for slow in slow {
        let permit = admit(breaker);
        if *slow {
            clock.advance(SECOND);
        }
        permit.settle(Outcome::Success);
    }
}

#[test]
fn slow_calls_leave_the_window_though_none_are_watched_any_more() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .slow_calls(1.0, SECOND)
            .window(Window::calls(3))
            .minimum_calls(3)
    });
    calls(&breaker, &clock, &[true, false, true]);
    reconfigure(&breaker, over_calls(3));
    assert_eq!(window(&breaker).slow, 2);
    // The first is recorded and tells that no rate is high, the others are counted.
    for left in [1, 1, 0] {
        end_calls(&breaker, 1, Outcome::Success);
        assert_eq!(window(&breaker).slow, left);
    }
}

#[test]
fn a_lease_that_ends_now_is_not_what_a_full_circuit_waits_for() {
    let half_open = |probes| config().half_open_max_calls(probes).success_threshold(2);
    let (breaker, clock) = breaker(|builder| builder.config(half_open(3)));
    trip_and_wait(&breaker, &clock);
    let _probes = [0, 1, 1].map(|wait| {
        clock.advance(wait * SECOND);
        admit(&breaker)
    });
    reconfigure(&breaker, half_open(2));
    clock.advance(58 * SECOND);
    let status = breaker.status();
    assert_eq!(
        (status.state, status.retry_after),
        (State::HalfOpen, Some(SECOND)),
        "two still run"
    );
    assert_eq!(breaker.try_acquire().unwrap_err().retry_after, Some(SECOND));
}
