//! Results of calls begun in an earlier generation: counted, and moving nothing.

use crate::{SECOND, admit, breaker, end_calls, transitions, trip, trip_and_wait};
use portcullis::{CircuitBreaker, Outcome, State, Window};

/// Settles a call begun earlier and checks that nothing but its counter moved.
fn assert_moves_nothing(breaker: &CircuitBreaker, outcome: Outcome, settle: impl FnOnce()) {
    let before = breaker.status();
    settle();
    let mut expected = before;
    let metrics = &mut expected.metrics;
    metrics.total_requests += 1;
    match outcome {
        Outcome::Success => metrics.successful_requests += 1,
        _ => metrics.failed_requests += 1,
    }
    let ratio = metrics.successful_requests as f64 * 100.0 / metrics.total_requests as f64;
    metrics.success_rate = Some(ratio);
    assert_eq!(
        breaker.status(),
        expected,
        "{outcome:?} of an earlier generation is counted, no more"
    );
}

#[test]
fn a_result_of_a_call_begun_while_closed_moves_nothing_once_the_circuit_has_opened() {
    for outcome in [Outcome::Success, Outcome::Failure] {
        let (breaker, _clock) = breaker(|builder| builder);
        let begun = admit(&breaker);
        trip(&breaker);
        assert_moves_nothing(&breaker, outcome, || begun.settle(outcome));
    }
}

#[test]
fn a_result_of_a_call_begun_while_closed_moves_nothing_once_the_circuit_is_half_open() {
    for outcome in [Outcome::Success, Outcome::Failure] {
        let (breaker, clock) = breaker(|builder| builder.success_threshold(1));
        let (projected, real) = (admit(&breaker), admit(&breaker));
        trip_and_wait(&breaker, &clock);
        assert_moves_nothing(&breaker, outcome, || projected.settle(outcome));
        let probe = admit(&breaker);
        assert_moves_nothing(&breaker, outcome, || real.settle(outcome));
        assert_eq!(breaker.state(), State::HalfOpen, "only the probe decides");
        probe.settle(Outcome::Success);
        assert_eq!(breaker.state(), State::Closed);
    }
}

#[test]
fn a_probe_of_an_earlier_half_open_state_decides_nothing_in_the_next() {
    for outcome in [Outcome::Success, Outcome::Failure] {
        let (breaker, clock) = breaker(|builder| builder.success_threshold(1));
        trip_and_wait(&breaker, &clock);
        let (old, failing) = (admit(&breaker), admit(&breaker));
        failing.settle(Outcome::Failure);
        clock.advance(60 * SECOND);
        let probe = admit(&breaker);
        assert_moves_nothing(&breaker, outcome, || old.settle(outcome));
        probe.settle(Outcome::Success);
        assert_eq!(transitions(&breaker), [1, 2, 1, 1]);
    }
}

#[test]
fn a_failure_of_a_probe_does_not_open_the_circuit_that_other_probes_have_closed() {
    let (breaker, clock) = breaker(|builder| builder.failure_threshold(1));
    trip_and_wait(&breaker, &clock);
    let late = admit(&breaker);
    // Its lease is over: what it holds no more it cannot give back either.
    clock.advance(60 * SECOND);
    end_calls(&breaker, 2, Outcome::Success);
    assert_eq!(breaker.state(), State::Closed);
    assert_moves_nothing(&breaker, Outcome::Failure, || late.settle(Outcome::Failure));
}

#[test]
fn every_transition_override_reset_and_reconfiguration_begins_a_generation() {
    type Change = fn(&CircuitBreaker);
    let changes: [(&str, Change); 5] = [
        ("force_open", CircuitBreaker::force_open),
        ("force_closed", CircuitBreaker::force_closed),
        ("disable", CircuitBreaker::disable),
        ("reset", CircuitBreaker::reset),
        ("reconfigure", |breaker| {
            breaker.reconfigure(breaker.config()).expect("the same config");
        }),
    ];
    for (name, change) in changes {
        for outcome in [Outcome::Success, Outcome::Failure] {
            let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1));
            let generation = breaker.status().generation;
            let begun = admit(&breaker);
            change(&breaker);
            assert_eq!(
                breaker.status().generation,
                generation + 1,
                "{name} begins a generation"
            );
            assert_moves_nothing(&breaker, outcome, || begun.settle(outcome));
        }
    }

    let (breaker, clock) = breaker(|builder| builder);
    let generation = |expected| assert_eq!(breaker.status().generation, expected);
    generation(1);
    trip(&breaker);
    generation(2);
    clock.advance(60 * SECOND);
    generation(3);
    end_calls(&breaker, 2, Outcome::Success);
    generation(4);
}

#[test]
fn a_success_begun_before_a_failure_of_its_generation_stands_in_the_window() {
    let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.5).window(Window::calls(10)).minimum_calls(10));
    let begun: Vec<_> = (0..4).map(|_| admit(&breaker)).collect();
    end_calls(&breaker, 1, Outcome::Failure);
    for permit in begun {
        permit.settle(Outcome::Success);
    }
    let window = breaker.status().window.expect("a rate is watched");
    assert_eq!((window.calls, window.failures), (5, 1));
}
