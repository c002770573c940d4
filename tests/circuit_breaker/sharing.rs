//! One breaker in many hands: threads, listeners, and what is left when the last hand lets go.

use crate::{SECOND, admit, breaker, end_calls, transitions, trip, trip_and_wait};
use portcullis::{CircuitBreaker, CircuitBreakerConfig, Outcome, Reason, State, Window};
use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

#[test]
fn clones_are_the_same_breaker() {
    let (breaker, _clock) = breaker(|builder| builder);
    let clone = breaker.clone();
    end_calls(&breaker, 3, Outcome::Failure);
    end_calls(&clone, 2, Outcome::Failure);
    assert_eq!((breaker.state(), clone.state()), (State::Open, State::Open));
    assert_eq!(breaker.status(), clone.status());
}

#[test]
fn the_counters_of_two_threads_hammering_one_breaker_add_up() {
    const CALLS: u64 = 30_000;
    type Configure = fn(CircuitBreakerConfig) -> CircuitBreakerConfig;
    let configs: [Configure; 4] = [
        |config| config.failure_threshold(2),
        |config| config.failures_within(2, SECOND),
        |config| config.failure_rate(0.2).window(Window::calls(10)),
        |config| {
            config
                .failure_rate(0.2)
                .window(Window::time(SECOND))
                .slow_calls(0.9, SECOND)
        },
    ];
    for configure in configs {
        let config = configure(CircuitBreakerConfig::default()).recovery_timeout(SECOND);
        let (breaker, clock) = breaker(|builder| builder.config(config));
        let sums: [AtomicU64; 5] = Default::default();
        let barrier = Barrier::new(2);
        let hammer = |thread: u64| {
            barrier.wait();
            for call in 0..CALLS {
                let ended = match breaker.try_acquire() {
                    Err(_) => {
                        clock.advance(SECOND / 20);
                        4
                    }
                    Ok(permit) if call % 13 == thread => {
                        drop(permit);
                        3
                    }
                    Ok(permit) => {
                        let (index, outcome) = match call % 7 {
                            0 | 1 => (1, Outcome::Failure),
                            2 => (2, Outcome::Ignored),
                            _ => (0, Outcome::Success),
                        };
                        permit.settle(outcome);
                        index
                    }
                };
                sums[ended].fetch_add(1, Ordering::Relaxed);
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| hammer(0));
            scope.spawn(|| hammer(1));
        });
        let metrics = breaker.status().metrics;
        let counted = [
            metrics.successful_requests,
            metrics.failed_requests,
            metrics.ignored_requests,
            metrics.cancelled_requests,
            metrics.rejected_requests,
        ];
        assert_eq!(counted, sums.map(AtomicU64::into_inner));
        assert_eq!(metrics.total_requests, 2 * CALLS);
        let status = breaker.status();
        assert_eq!(status.probes_in_flight, 0, "every slot came back");
        let [tripped, due, closed, reopened] = transitions(&breaker);
        assert!(
            tripped > 0 && closed > 0,
            "the circuit went round: {tripped} trips, {closed} recoveries"
        );
        let opened = tripped + reopened;
        assert_eq!(
            opened - due,
            u64::from(status.state == State::Open),
            "every open time ends in half-open"
        );
        assert_eq!(
            due - closed - reopened,
            u64::from(status.state == State::HalfOpen),
            "every half-open state ends in closed or open"
        );
        assert_eq!(
            status.generation,
            1 + opened + due + closed,
            "a generation for each transition"
        );
    }
}

#[test]
fn no_more_probes_are_inside_than_allowed_while_threads_come_and_go() {
    let (breaker, clock) = breaker(|builder| builder.half_open_max_calls(2).success_threshold(2));
    trip_and_wait(&breaker, &clock);
    let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for call in 0..10_000 {
                    let Ok(probe) = breaker.try_acquire() else { continue };
                    most.fetch_max(inside.fetch_add(1, Ordering::AcqRel) + 1, Ordering::AcqRel);
                    inside.fetch_sub(1, Ordering::AcqRel);
                    match call % 3 {
                        0 => probe.settle(Outcome::Ignored),
                        1 => probe.unused(),
                        _ => drop(probe),
                    }
                }
            });
        }
    });
    let most = most.into_inner();
    assert!((1..=2).contains(&most), "{most} probes were inside at once");
    let status = breaker.status();
    assert_eq!((status.state, status.probes_in_flight), (State::HalfOpen, 0));
}

#[test]
fn a_rejection_never_mixes_two_states_though_the_circuit_moves_meanwhile() {
    const ROUNDS: u32 = 200_000;
    let (breaker, clock) = breaker(|builder| {
        builder
            .failure_threshold(1)
            .half_open_max_calls(1)
            .success_threshold(1)
            .recovery_timeout(60 * SECOND)
            .probe_lease(7 * SECOND)
    });
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                if let Ok(permit) = breaker.try_acquire() {
                    permit.settle(Outcome::Failure);
                }
                clock.advance(60 * SECOND);
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            let held = breaker.try_acquire();
            let Err(why) = breaker.try_acquire() else { continue };
            // Every step of the clock is a minute: open times end on the minute, leases seven seconds after.
            let expected = if why.reason == Reason::Open { 0 } else { 7 };
            let wait = why.retry_after.expect("a retry time").as_secs();
            assert_eq!(wait % 60, expected, "{why}");
            if let Ok(permit) = held {
                permit.settle(Outcome::Ignored);
            }
        }
    });
}

#[test]
fn a_status_is_of_one_moment_though_the_config_changes_meanwhile() {
    let (breaker, _clock) = breaker(|builder| builder);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..20_000 {
                let config = CircuitBreakerConfig::default();
                let config = if round % 2 == 0 {
                    config.failure_rate(0.5)
                } else {
                    config
                };
                breaker.reconfigure(config).expect("valid");
            }
            done.store(true, Ordering::Release);
        });
        let with_window = CircuitBreakerConfig::default().failure_rate(0.5);
        while !done.load(Ordering::Acquire) {
            let status = breaker.status();
            assert_eq!(
                status.window.is_some(),
                status.config == with_window,
                "the config belongs to the window shown"
            );
        }
    });
}

#[test]
fn dropping_the_last_handle_releases_what_listeners_hold() {
    let (breaker, _clock) = breaker(|builder| builder);
    let held = Arc::new(());
    breaker.on_event({
        let held = held.clone();
        move |_| drop(held.clone())
    });
    let mut events = breaker.subscribe(8);
    trip(&breaker);
    let clone = breaker.clone();
    drop(breaker);
    assert_eq!(Arc::strong_count(&held), 2, "a clone is a handle");
    drop(clone);
    assert_eq!(Arc::strong_count(&held), 1, "nothing keeps the listener");
    assert!(events.try_recv().is_some(), "what was queued is still there");
    let ended = futures_util::FutureExt::now_or_never(events.recv());
    assert_eq!(ended, Some(None), "and then the queue has ended");
}

#[test]
fn a_permit_that_outlives_its_breaker_ends_as_any_other() {
    let (breaker, clock) = breaker(|builder| builder.failure_threshold(1));
    let held = Arc::new(());
    let closed = admit(&breaker);
    trip(&breaker);
    clock.advance(60 * SECOND);
    let probe = admit(&breaker);
    breaker.on_event({
        let held = held.clone();
        move |_| drop(held.clone())
    });
    drop(breaker);
    closed.settle(Outcome::Success);
    assert_eq!(Arc::strong_count(&held), 2, "the probe is still under way");
    probe.settle(Outcome::Failure);
    assert_eq!(Arc::strong_count(&held), 1, "the last permit frees what is left");
}

#[test]
fn a_listener_may_use_the_breaker_that_calls_it() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1));
    let seen = Arc::new(AtomicU64::new(0));
    let handle = Arc::new(std::sync::Mutex::new(Some(breaker.clone())));
    breaker.on_event({
        let (seen, handle) = (seen.clone(), handle.clone());
        move |_| {
            let breaker: Option<CircuitBreaker> = handle.lock().expect("not poisoned").take();
            if let Some(breaker) = breaker {
                seen.store(breaker.status().generation, Ordering::Relaxed);
                breaker.reset();
            }
        }
    });
    trip_once(&breaker);
    assert_eq!(
        seen.load(Ordering::Relaxed),
        2,
        "the listener saw the state after the transition"
    );
    assert_eq!(breaker.state(), State::Closed, "and reset it");
}

#[test]
fn a_panicking_listener_harms_nobody() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1));
    let heard = Arc::new(AtomicU64::new(0));
    breaker.on_event(|_| panic!("a bug in the listener"));
    breaker.on_event({
        let heard = heard.clone();
        move |_| {
            heard.fetch_add(1, Ordering::Relaxed);
        }
    });
    trip_once(&breaker);
    assert!(breaker.try_acquire().is_err());
    assert_eq!(
        heard.load(Ordering::Relaxed),
        2,
        "a transition and a rejection reach the other listener"
    );
}

fn trip_once(breaker: &CircuitBreaker) {
    admit(breaker).settle(Outcome::Failure);
}
