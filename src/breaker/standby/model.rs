//! Models of those who wait for a breaker to admit again.

use super::*;
use crate::{
    breaker::CircuitBreakerPermit,
    clock::{Clock, ManualClock},
    permit::Outcome,
    sync::{Bell, explore, spawn},
};
use std::time::Duration;

const OPEN: Duration = Duration::from_nanos(10);

/// A breaker that one failure opens, half-open, with its only probe.
fn probed() -> (CircuitBreaker, CircuitBreakerPermit, ManualClock) {
    let clock = Clock::manual();
    let breaker = CircuitBreaker::builder("search")
        .failure_threshold(1)
        .recovery_timeout(OPEN)
        .half_open_max_calls(1)
        .success_threshold(1)
        .clock(&clock)
        .build()
        .expect("a valid config");
    breaker.try_acquire().expect("closed").settle(Outcome::Failure);
    clock.advance(OPEN);
    let probe = breaker.try_acquire().expect("half-open");
    (breaker, probe, clock)
}

/// A service that wants to be ready, and what wakes it.
struct Waiting {
    breaker: CircuitBreaker,
    held: Result<Standby, Standby>,
    bell: Arc<Bell>,
    waker: Waker,
}

impl Waiting {
    /// Asks once, and joins those who wait if it must.
    fn new(breaker: &CircuitBreaker) -> Self {
        let (bell, waker) = Bell::new();
        let held = breaker.stand_by(None, &Reading::new(), &mut Context::from_waker(&waker));
        Self {
            breaker: breaker.clone(),
            held,
            bell,
            waker,
        }
    }

    /// Asks again if it was woken; whether it is ready.
    fn go_on(&mut self) -> bool {
        while self.held.is_err() && self.bell.rang() {
            let (Ok(held) | Err(held)) = std::mem::replace(&mut self.held, Err(Standby::default()));
            let mut cx = Context::from_waker(&self.waker);
            self.held = self.breaker.stand_by(Some(held), &Reading::new(), &mut cx);
        }
        self.held.is_ok()
    }
}

fn the_end_of_a_probe_wakes_who_joins(name: &str, end: fn(CircuitBreakerPermit)) {
    explore(name, 3, move || {
        let (breaker, probe, _clock) = probed();
        let joins = breaker.clone();
        let joins = spawn(move || Waiting::new(&joins));
        end(probe);
        assert!(joins.join().unwrap().go_on(), "the wake-up was lost");
    });
}

#[test]
fn a_probe_that_succeeds_wakes_who_joins() {
    the_end_of_a_probe_wakes_who_joins("a probe succeeds while one joins", |probe| {
        probe.settle(Outcome::Success);
    });
}

#[test]
fn a_probe_that_was_not_used_wakes_who_joins() {
    the_end_of_a_probe_wakes_who_joins("a probe is given back while one joins", CircuitBreakerPermit::unused);
}

#[test]
fn who_joins_while_a_probe_fails_is_woken_when_the_open_time_is_over() {
    explore("a probe fails while one joins", 3, || {
        let (breaker, probe, clock) = probed();
        let joins = breaker.clone();
        let joins = spawn(move || Waiting::new(&joins));
        probe.settle(Outcome::Failure);
        let mut waiting = joins.join().unwrap();
        assert!(!waiting.go_on(), "the circuit is open");
        clock.advance(OPEN);
        assert!(waiting.go_on(), "its timer was not set for the open time");
    });
}

#[test]
fn a_slot_that_comes_back_goes_to_one_of_those_who_wait() {
    explore("a slot comes back to two", 2, || {
        let (breaker, probe, _clock) = probed();
        let mut first = Waiting::new(&breaker);
        let joins = breaker.clone();
        let joins = spawn(move || Waiting::new(&joins));
        probe.unused();
        let mut second = joins.join().unwrap();
        let ready = [first.go_on(), second.go_on()];
        assert!(ready[0] ^ ready[1], "the slot went to nobody, or to both: {ready:?}");
        // Who has it gives it to the other.
        let (ready, mut other) = if ready[0] { (first, second) } else { (second, first) };
        drop(ready.held);
        assert!(other.go_on(), "the wake-up was lost");
    });
}

#[test]
fn who_leaves_takes_no_wake_up_along() {
    explore("one leaves while a slot comes back", 3, || {
        let (breaker, probe, _clock) = probed();
        let (leaves, mut stays) = (Waiting::new(&breaker), Waiting::new(&breaker));
        let leaves = spawn(move || drop(leaves));
        probe.unused();
        leaves.join().unwrap();
        assert!(stays.go_on(), "the wake-up was lost");
    });
}
