//! The open circuit: for how long, what its callers are told, and how its readers see the end of it.

use crate::{NANO, SECOND, YEAR, admit, breaker, end_calls, just_before, transitions, trip, trip_and_wait};
use portcullis::{Backoff, CircuitBreaker, EventKind, ManualClock, Outcome, Reason, State, Verdict};
use std::time::Duration;

/// Refused at once, refused one nanosecond before `retry_after`, admitted at that instant.
fn assert_retry_after_is_exact(breaker: &CircuitBreaker, clock: &ManualClock, reason: Reason) {
    let rejected = breaker.try_acquire().expect_err("rejected now");
    assert_eq!(rejected.reason, reason);
    let wait = rejected.retry_after.expect("a retry time");
    assert_eq!(breaker.status().retry_after, Some(wait), "the status tells the same");
    clock.advance(just_before(wait));
    let rejected = breaker.try_acquire().expect_err("one nanosecond early");
    assert_eq!(rejected.retry_after, Some(NANO));
    clock.advance(NANO);
    assert_eq!(breaker.status().retry_after, None, "the next call would be admitted");
    admit(breaker).unused();
}

#[test]
fn an_open_circuit_rejects_and_says_who_why_and_for_how_long() {
    let (breaker, clock) = breaker(|builder| builder.recovery_timeout(30 * SECOND));
    trip(&breaker);
    clock.advance(10 * SECOND);
    let rejected = breaker.try_acquire().expect_err("the circuit is open");
    assert_eq!(
        (&*rejected.service, rejected.limit, rejected.reason),
        ("search", None, Reason::Open)
    );
    assert_eq!(rejected.retry_after, Some(20 * SECOND));
    let metrics = breaker.status().metrics;
    assert_eq!((metrics.rejected_requests, metrics.rejected.open), (1, 1));
}

#[test]
fn retry_after_is_exact_while_open() {
    for open in [NANO, SECOND, Duration::from_nanos(123_456_789_012_345_679), 100 * YEAR] {
        let (breaker, clock) = breaker(|builder| builder.recovery_timeout(open));
        trip(&breaker);
        assert_eq!(breaker.status().retry_after, Some(open));
        assert_retry_after_is_exact(&breaker, &clock, Reason::Open);
    }
}

#[test]
fn retry_after_is_exact_while_the_half_open_circuit_is_full() {
    let (breaker, clock) = breaker(|builder| builder.probe_lease(7 * SECOND));
    trip_and_wait(&breaker, &clock);
    let _probes: Vec<_> = (0..3)
        .map(|_| {
            clock.advance(SECOND);
            admit(&breaker)
        })
        .collect();
    assert_eq!(
        breaker.status().retry_after,
        Some(5 * SECOND),
        "the earliest lease ends first"
    );
    assert_retry_after_is_exact(&breaker, &clock, Reason::HalfOpenFull);
}

#[test]
fn retry_after_while_open_looks_past_probes_that_outlast_the_open_time() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .failure_threshold(1)
            .half_open_max_calls(1)
            .success_threshold(1)
            .recovery_timeout(10 * SECOND)
            .probe_lease(60 * SECOND)
    });
    trip_and_wait(&breaker, &clock);
    let late = admit(&breaker);
    clock.advance(60 * SECOND);
    let _hanging = admit(&breaker);
    late.settle(Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
    assert_eq!(
        breaker.status().retry_after,
        Some(60 * SECOND),
        "after ten seconds the circuit is half-open, but its only slot is taken for sixty"
    );
    assert_retry_after_is_exact(&breaker, &clock, Reason::Open);
}

#[test]
fn a_circuit_whose_open_time_is_over_reads_as_half_open_though_nothing_was_written() {
    let (breaker, clock) = breaker(|builder| builder);
    trip(&breaker);
    let mut events = breaker.subscribe(8);
    let before = breaker.status();
    clock.advance(just_before(60 * SECOND));
    assert_eq!(breaker.state(), State::Open);
    clock.advance(NANO + 5 * SECOND);
    let projected = breaker.status();
    assert_eq!(projected.state, State::HalfOpen);
    assert_eq!(projected.generation, before.generation + 1);
    assert_eq!(projected.metrics.state_transitions.open_to_half_open, 1);
    assert_eq!(
        projected.state_age,
        5 * SECOND,
        "half-open since the open time was over"
    );
    assert_eq!(breaker.status(), projected, "reading changes nothing");
    assert_eq!(breaker.state(), State::HalfOpen);
    assert!(events.try_recv().is_none(), "nothing has happened yet");
    admit(&breaker).unused();
    assert_eq!(
        breaker.status(),
        projected,
        "the transition made real is the one that was read"
    );
}

#[test]
fn the_event_of_a_due_transition_carries_the_due_instant() {
    type Mutator = fn(&CircuitBreaker);
    let mutators: [(&str, Mutator); 6] = [
        ("acquire", |breaker| admit(breaker).unused()),
        ("force_open", CircuitBreaker::force_open),
        ("force_closed", CircuitBreaker::force_closed),
        ("disable", CircuitBreaker::disable),
        ("reset", CircuitBreaker::reset),
        ("reconfigure", |breaker| {
            breaker.reconfigure(breaker.config()).expect("the same config");
        }),
    ];
    for (name, mutate) in mutators {
        let (breaker, clock) = breaker(|builder| builder);
        trip(&breaker);
        let due = clock.now().saturating_add(60 * SECOND);
        let projected = breaker.status().generation + 1;
        clock.advance(YEAR);
        let mut events = breaker.subscribe(8);
        mutate(&breaker);
        let event = events.try_recv().expect("the mutator makes the due transition real");
        assert_eq!(
            event.at, due,
            "{name}: the transition happened when it was due, not when it was noticed"
        );
        let expected = EventKind::Transition {
            from: State::Open,
            to: State::HalfOpen,
            generation: projected,
        };
        assert_eq!(event.kind, expected, "{name}");
        assert_eq!(transitions(&breaker)[1], 1, "{name}");
        if let Some(event) = events.try_recv() {
            assert_eq!(event.at, clock.now(), "{name}: its own event is of now");
        }
    }
}

/// Opens again from half-open and tells for how long.
fn fail_probe(breaker: &CircuitBreaker, clock: &ManualClock) -> Duration {
    clock.advance(breaker.status().retry_after.expect("open"));
    admit(breaker).settle(Outcome::Failure);
    breaker.status().retry_after.expect("open again")
}

#[test]
fn the_open_time_stays_the_same_without_a_backoff() {
    let (breaker, clock) = breaker(|builder| builder);
    trip(&breaker);
    for _ in 0..50 {
        assert_eq!(fail_probe(&breaker, &clock), 60 * SECOND);
    }
}

#[test]
fn a_backoff_grows_from_trip_to_trip_up_to_its_cap_and_starts_over_when_the_circuit_closes() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .recovery_timeout(SECOND)
            .recovery_backoff(Backoff::new(2.0, 10 * SECOND))
    });
    for _ in 0..3 {
        trip(&breaker);
        assert_eq!(
            breaker.status().retry_after,
            Some(SECOND),
            "the first trip since the circuit was closed"
        );
        for seconds in [2, 4, 8, 10, 10, 10] {
            assert_eq!(fail_probe(&breaker, &clock), seconds * SECOND);
        }
        clock.advance(10 * SECOND);
        end_calls(&breaker, 2, Outcome::Success);
        assert_eq!(breaker.state(), State::Closed);
    }
}

#[test]
fn a_backoff_starts_over_after_a_reset() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .recovery_timeout(SECOND)
            .recovery_backoff(Backoff::new(3.0, YEAR))
    });
    trip(&breaker);
    assert_eq!(fail_probe(&breaker, &clock), 3 * SECOND);
    breaker.reset();
    trip(&breaker);
    assert_eq!(breaker.status().retry_after, Some(SECOND));
}

#[test]
fn a_backoff_of_thousands_of_trips_stays_at_its_cap() {
    for multiplier in [1.000_1, 2.0, f64::MAX] {
        let (breaker, clock) = breaker(|builder| {
            builder
                .recovery_timeout(NANO)
                .recovery_backoff(Backoff::new(multiplier, SECOND))
        });
        trip(&breaker);
        let mut last = NANO;
        for _ in 0..5_000 {
            let open = fail_probe(&breaker, &clock);
            assert!(
                (last..=SECOND).contains(&open),
                "×{multiplier}: {open:?} after {last:?}"
            );
            last = open;
        }
    }
}

#[test]
fn jitter_only_shortens_and_by_no_more_than_its_share() {
    let open_times = |seed: u64| -> Vec<Duration> {
        let backoff = Backoff::new(1.0, 100 * SECOND).jitter(0.2).seed(seed);
        let (breaker, clock) = breaker(|builder| builder.recovery_timeout(100 * SECOND).recovery_backoff(backoff));
        trip(&breaker);
        (0..1_000).map(|_| fail_probe(&breaker, &clock)).collect()
    };
    let times = open_times(7);
    let bounds = 80 * SECOND..=100 * SECOND;
    assert!(times.iter().all(|time| bounds.contains(time)), "{times:?}");
    let (shortest, longest) = (times.iter().min(), times.iter().max());
    assert!(shortest < Some(&(82 * SECOND)), "the whole share is used: {shortest:?}");
    assert!(longest > Some(&(98 * SECOND)), "from its beginning: {longest:?}");
    assert_eq!(open_times(7), times, "the same seed gives the same times");
    assert_ne!(open_times(8), times, "another seed gives others");
}

#[test]
fn breakers_without_a_seed_do_not_probe_in_step() {
    let open_time = || {
        let (breaker, _clock) = breaker(|builder| builder.recovery_backoff(Backoff::new(1.0, YEAR).jitter(1.0)));
        trip(&breaker);
        breaker.status().retry_after.expect("open")
    };
    let times: Vec<Duration> = (0..8).map(|_| open_time()).collect();
    // Eight equal draws from more than 2^35 nanoseconds do not happen by chance.
    assert!(times.iter().any(|time| *time != times[0]), "{times:?}");
}

#[test]
fn a_jitter_of_everything_still_opens_for_a_while() {
    let (breaker, clock) = breaker(|builder| {
        builder
            .recovery_timeout(NANO)
            .recovery_backoff(Backoff::new(1.0, NANO).jitter(1.0).seed(1))
    });
    trip(&breaker);
    for _ in 0..100 {
        assert_eq!(fail_probe(&breaker, &clock), NANO, "an open time is never zero");
    }
}

#[test]
fn a_service_that_says_when_to_come_back_lengthens_the_open_time_up_to_the_cap() {
    for (asked, open) in [(10, 60), (90, 90), (100_000, 120)] {
        let (breaker, clock) = breaker(|builder| builder.failure_threshold(1).honor_retry_after(120 * SECOND));
        let verdict = Verdict::new(Outcome::Failure).retry_after(asked * SECOND);
        admit(&breaker).settle(verdict);
        assert_eq!(breaker.status().retry_after, Some(open * SECOND), "asked for {asked} s");
        clock.advance(open * SECOND);
        admit(&breaker).settle(verdict);
        assert_eq!(
            breaker.status().retry_after,
            Some(open * SECOND),
            "a probe may ask as well"
        );
    }
}

#[test]
fn what_the_service_asks_for_is_not_heard_unless_configured() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1));
    admit(&breaker).settle(Verdict::new(Outcome::Failure).retry_after(YEAR));
    assert_eq!(breaker.status().retry_after, Some(60 * SECOND));
}
