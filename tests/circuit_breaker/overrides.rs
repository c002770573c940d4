//! What an operator forces, and how it ends.

use crate::{SECOND, YEAR, admit, breaker, end_calls, transitions, trip, trip_and_wait};
use portcullis::{CircuitBreaker, EventKind, Outcome, Override, Reason, State, Window};

#[test]
fn a_circuit_forced_open_rejects_for_ever_and_tells_no_retry_time() {
    let (breaker, clock) = breaker(|builder| builder);
    breaker.force_open();
    for _ in 0..3 {
        let rejected = breaker.try_acquire().expect_err("forced open");
        assert_eq!((rejected.reason, rejected.retry_after), (Reason::ForcedOpen, None));
        clock.advance(100 * YEAR);
        let status = breaker.status();
        assert_eq!((status.state, status.forced), (State::Open, Some(Override::ForcedOpen)));
        assert_eq!(status.retry_after, None);
    }
    let metrics = breaker.status().metrics;
    assert_eq!((metrics.rejected_requests, metrics.rejected.forced_open), (3, 3));
    assert_eq!(
        transitions(&breaker),
        [0; 4],
        "a forced circuit does not move by itself"
    );
}

#[test]
fn a_circuit_forced_closed_admits_and_records_but_never_trips() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(3).failure_rate(0.5).window(Window::calls(10)));
    breaker.force_closed();
    end_calls(&breaker, 100, Outcome::Failure);
    let status = breaker.status();
    assert_eq!(
        (status.state, status.forced),
        (State::Closed, Some(Override::ForcedClosed))
    );
    assert_eq!((status.failure_count, status.metrics.failed_requests), (100, 100));
    assert_eq!(
        status.window.and_then(|window| window.failure_rate),
        Some(1.0),
        "what it would have tripped on shows"
    );
    assert_eq!(transitions(&breaker), [0; 4]);
}

#[test]
fn a_disabled_breaker_admits_and_records_nothing() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1));
    end_calls(&breaker, 1, Outcome::Success);
    breaker.disable();
    let before = breaker.status();
    assert_eq!((before.state, before.forced), (State::Closed, Some(Override::Disabled)));
    end_calls(&breaker, 10, Outcome::Failure);
    end_calls(&breaker, 10, Outcome::Success);
    drop(admit(&breaker));
    admit(&breaker).unused();
    let held = admit(&breaker);
    assert_eq!(breaker.status(), before, "not even a counter moves");
    breaker.reset();
    let after = breaker.status();
    held.settle(Outcome::Failure);
    assert_eq!(
        breaker.status(),
        after,
        "a call begun while disabled is not recorded later either"
    );
}

#[test]
fn an_override_replaces_another_and_holds_until_reset() {
    let (breaker, clock) = breaker(|builder| builder);
    breaker.force_open();
    breaker.force_closed();
    admit(&breaker).settle(Outcome::Failure);
    breaker.disable();
    admit(&breaker).settle(Outcome::Failure);
    breaker.force_open();
    clock.advance(YEAR);
    assert!(breaker.try_acquire().is_err());
    breaker.reset();
    assert_eq!(breaker.status().forced, None);
    admit(&breaker).settle(Outcome::Success);
}

#[test]
fn forcing_overrules_an_open_and_a_half_open_circuit() {
    let (breaker, clock) = breaker(|builder| builder);
    trip(&breaker);
    breaker.force_closed();
    admit(&breaker).settle(Outcome::Success);
    breaker.reset();

    trip_and_wait(&breaker, &clock);
    let _probes: Vec<_> = (0..3).map(|_| admit(&breaker)).collect();
    assert!(breaker.try_acquire().is_err());
    breaker.disable();
    admit(&breaker).settle(Outcome::Success);
    breaker.force_open();
    assert_eq!(
        breaker.try_acquire().expect_err("forced open").reason,
        Reason::ForcedOpen
    );
}

#[test]
fn a_reset_returns_to_closed_with_empty_windows_from_everywhere() {
    type Bring = fn(&CircuitBreaker, &portcullis::ManualClock);
    let origins: [(&str, Bring); 6] = [
        ("closed", |breaker, _| end_calls(breaker, 4, Outcome::Failure)),
        ("open", |breaker, _| trip(breaker)),
        ("half-open", |breaker, clock| {
            trip_and_wait(breaker, clock);
            end_calls(breaker, 1, Outcome::Success);
        }),
        ("forced open", |breaker, _| breaker.force_open()),
        ("forced closed", |breaker, _| {
            breaker.force_closed();
            end_calls(breaker, 100, Outcome::Failure);
        }),
        ("disabled", |breaker, _| breaker.disable()),
    ];
    for (name, bring) in origins {
        let (breaker, clock) = breaker(|builder| {
            builder
                .failure_threshold(5)
                .failures_within(5, YEAR)
                .failure_rate(0.5)
                .window(Window::calls(5))
        });
        bring(&breaker, &clock);
        let before = breaker.status();
        breaker.reset();
        let status = breaker.status();
        assert_eq!((status.state, status.forced), (State::Closed, None), "from {name}");
        assert_eq!((status.failure_count, status.success_count), (0, 0), "from {name}");
        assert_eq!(status.window.map(|window| window.calls), Some(0), "from {name}");
        assert_eq!(
            status.metrics, before.metrics,
            "from {name}: the counters stay, and a reset is no transition"
        );
        end_calls(&breaker, 4, Outcome::Failure);
        assert_eq!(
            breaker.state(),
            State::Closed,
            "from {name}: it takes all failures anew"
        );
        end_calls(&breaker, 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Open, "from {name}: and trips again");
    }
}

#[test]
fn overrides_and_resets_reach_listeners_with_their_generation() {
    let (breaker, clock) = breaker(|builder| builder);
    let mut events = breaker.subscribe(8);
    breaker.force_open();
    breaker.force_closed();
    breaker.disable();
    breaker.reset();
    let overridden = |into, generation| EventKind::Overridden { into, generation };
    for kind in [
        overridden(Override::ForcedOpen, 2),
        overridden(Override::ForcedClosed, 3),
        overridden(Override::Disabled, 4),
        EventKind::Reset { generation: 5 },
    ] {
        let event = events.try_recv().expect("an event");
        assert_eq!((event.kind, event.at), (kind, clock.now()));
    }
    assert_eq!(events.try_recv(), None);
}

#[test]
fn counters_survive_everything_and_only_grow() {
    let (breaker, clock) = breaker(|builder| builder);
    let mut before = [0u64; 11];
    let mut check = |what: &str| {
        let metrics = breaker.status().metrics;
        let [tripped, due, closed, reopened] = transitions(&breaker);
        let now = [
            metrics.total_requests,
            metrics.successful_requests,
            metrics.failed_requests,
            metrics.rejected_requests,
            metrics.ignored_requests,
            metrics.cancelled_requests,
            metrics.slow_requests,
            tripped,
            due,
            closed,
            reopened,
        ];
        assert!(
            now.iter().zip(&before).all(|(now, before)| now >= before),
            "{what}: {now:?} after {before:?}"
        );
        let parts: u64 = now[1..=5].iter().sum();
        assert_eq!(now[0], parts, "{what}: the total is the sum of its parts");
        before = now;
    };
    for _ in 0..3 {
        end_calls(&breaker, 3, Outcome::Success);
        end_calls(&breaker, 2, Outcome::Ignored);
        drop(admit(&breaker));
        check("closed");
        trip(&breaker);
        assert!(breaker.try_acquire().is_err());
        check("open");
        clock.advance(60 * SECOND);
        check("half-open, projected");
        admit(&breaker).settle(Outcome::Failure);
        check("open again");
        clock.advance(60 * SECOND);
        end_calls(&breaker, 2, Outcome::Success);
        check("closed again");
        breaker.force_open();
        assert!(breaker.try_acquire().is_err());
        check("forced open");
        breaker.force_closed();
        end_calls(&breaker, 1, Outcome::Failure);
        check("forced closed");
        breaker.disable();
        end_calls(&breaker, 1, Outcome::Failure);
        check("disabled");
        breaker.reconfigure(breaker.config()).expect("the same config");
        check("reconfigured");
        breaker.reset();
        check("reset");
    }
    assert_eq!(
        before,
        [51, 15, 21, 6, 6, 3, 0, 3, 6, 3, 3],
        "all of three rounds is there"
    );
}

#[test]
fn a_circuit_forced_open_tells_no_retry_time_though_it_was_about_to_probe_by_itself() {
    let make = || breaker(|builder| builder.half_open_max_calls(1).success_threshold(1));
    let (open, _clock) = make();
    trip(&open);
    assert!(open.status().retry_after.is_some());
    open.force_open();
    assert_eq!(open.status().retry_after, None, "open underneath");

    let (full, clock) = make();
    trip_and_wait(&full, &clock);
    let _probe = admit(&full);
    assert!(full.status().retry_after.is_some(), "no slot is free");
    full.force_open();
    assert_eq!(full.status().retry_after, None, "half-open and full underneath");
}
