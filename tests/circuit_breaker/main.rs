//! Pins the circuit breaker used directly, without tower: what trips it, what it admits while open and half-open, which
//! results move it, what an operator can force, and what its readers see.

mod calls;
#[path = "../chance/mod.rs"]
mod chance;
mod config;
mod counted;
mod generations;
mod open;
mod overrides;
mod probes;
mod reconfigure;
mod sharing;
mod slow;
mod time;
mod trips;

use portcullis::{CircuitBreaker, CircuitBreakerBuilder, CircuitBreakerPermit, Clock, ManualClock, Outcome, State};
use std::time::Duration;

const NANO: Duration = Duration::from_nanos(1);
const SECOND: Duration = Duration::from_secs(1);
const YEAR: Duration = Duration::from_secs(31_557_600);

/// A breaker on a clock of its own that moves only when told to.
fn breaker(configure: impl FnOnce(CircuitBreakerBuilder) -> CircuitBreakerBuilder) -> (CircuitBreaker, ManualClock) {
    let clock = Clock::manual();
    let builder = configure(CircuitBreaker::builder("search")).clock(&clock);
    (builder.build().expect("the settings are valid"), clock)
}

/// The last nanosecond before.
fn just_before(time: Duration) -> Duration {
    time.saturating_sub(NANO)
}

/// A call that is expected to be admitted.
fn admit(breaker: &CircuitBreaker) -> CircuitBreakerPermit {
    breaker.try_acquire().expect("the breaker admits the call")
}

/// Makes `calls` calls one after the other, all of which end the same way.
fn end_calls(breaker: &CircuitBreaker, calls: u32, outcome: Outcome) {
    for _ in 0..calls {
        admit(breaker).settle(outcome);
    }
}

/// Opens a closed circuit, whatever its conditions, with failures.
fn trip(breaker: &CircuitBreaker) {
    for _ in 0..1_000 {
        if breaker.state() == State::Open {
            return;
        }
        admit(breaker).settle(Outcome::Failure);
    }
    panic!("a thousand failures opened nothing");
}

/// Opens a closed circuit and lets its open time pass.
fn trip_and_wait(breaker: &CircuitBreaker, clock: &ManualClock) {
    trip(breaker);
    clock.advance(breaker.status().retry_after.expect("an open circuit tells how long"));
    assert_eq!(breaker.state(), State::HalfOpen, "the open time is over");
}

/// Transitions so far: closed to open, open to half-open, half-open to closed, half-open to open.
fn transitions(breaker: &CircuitBreaker) -> [u64; 4] {
    let counted = breaker.status().metrics.state_transitions;
    [
        counted.closed_to_open,
        counted.open_to_half_open,
        counted.half_open_to_closed,
        counted.half_open_to_open,
    ]
}
