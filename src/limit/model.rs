//! Models of the waiting line, with the limiter it waits for.

use super::*;
use crate::{
    clock::ManualClock,
    sync::{Bell, explore, spawn},
};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

const PERIOD: Duration = Duration::from_micros(1);

fn limiter(algorithm: impl Into<Algorithm>) -> (RateLimiter, ManualClock) {
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("search", algorithm).clock(&clock).build();
    (limiter.expect("a valid limit"), clock)
}

/// One request in a period.
fn one_token() -> (RateLimiter, ManualClock) {
    limiter(TokenBucket::new(1, PERIOD))
}

/// As a layer asks: a look, and if that is not enough a closer one.
fn ask(limiter: &RateLimiter) -> Option<RateLimitPermit> {
    let now = Reading::new();
    limiter.glance(&now).or_else(|| limiter.acquire_at(1, &now).ok())
}

/// Somebody who waits, and what wakes it.
struct Waiting {
    acquire: Pin<Box<Acquire>>,
    admitted: Option<RateLimitPermit>,
    bell: Arc<Bell>,
    waker: Waker,
}

impl Waiting {
    /// Asks once, and joins the line if it must.
    fn new(limiter: &RateLimiter) -> Self {
        Self::for_cost(limiter, 1)
    }

    fn for_cost(limiter: &RateLimiter, cost: u32) -> Self {
        let (bell, waker) = Bell::new();
        let mut waiting = Self {
            acquire: Box::pin(limiter.acquire_n(cost)),
            admitted: None,
            bell,
            waker,
        };
        waiting.poll();
        waiting
    }

    fn poll(&mut self) {
        if let Poll::Ready(admitted) = self.acquire.as_mut().poll(&mut Context::from_waker(&self.waker)) {
            self.admitted = Some(admitted.expect("no deadline"));
        }
    }

    /// Asks again if it was woken; whether it is admitted.
    fn go_on(&mut self) -> bool {
        while self.admitted.is_none() && self.bell.rang() {
            self.poll();
        }
        self.admitted.is_some()
    }
}

fn what_comes_back_wakes_who_joins(name: &str, algorithm: impl Into<Algorithm> + Copy + Send + Sync + 'static) {
    explore(name, 3, move || {
        let (limiter, _clock) = limiter(algorithm);
        let permit = ask(&limiter).expect("full");
        let joins = limiter.clone();
        let joins = spawn(move || Waiting::new(&joins));
        permit.unused();
        assert!(joins.join().unwrap().go_on(), "the wake-up was lost");
        assert!(ask(&limiter).is_none(), "one too many");
    });
}

#[test]
fn a_token_that_comes_back_wakes_who_joins() {
    what_comes_back_wakes_who_joins("a token comes back while one joins", TokenBucket::new(1, PERIOD));
}

#[test]
fn a_slot_that_comes_back_wakes_who_joins() {
    what_comes_back_wakes_who_joins("a slot comes back while one joins", SlidingWindow::new(1, PERIOD));
}

#[test]
fn a_part_of_what_the_front_waits_for_brings_its_time_nearer() {
    explore("one token of two comes back while one joins", 3, || {
        let (limiter, clock) = limiter(TokenBucket::new(1, PERIOD).burst(2));
        let (permit, _used) = (ask(&limiter).expect("full"), ask(&limiter).expect("full"));
        let joins = limiter.clone();
        let joins = spawn(move || Waiting::for_cost(&joins, 2));
        permit.unused();
        let mut waiting = joins.join().unwrap();
        assert!(!waiting.go_on(), "one too many");
        clock.advance(PERIOD);
        assert!(waiting.go_on(), "its timer was not set anew");
    });
}

#[test]
fn nobody_overtakes_who_waits() {
    explore("a token comes back while others ask", 2, || {
        let (limiter, clock) = one_token();
        let permit = ask(&limiter).expect("full");
        let mut front = Waiting::new(&limiter);
        let (joins, asks) = (limiter.clone(), limiter.clone());
        let joins = spawn(move || Waiting::new(&joins));
        let asks = spawn(move || ask(&asks).is_some());
        permit.unused();
        let mut behind = joins.join().unwrap();
        assert!(front.go_on(), "the wake-up was lost");
        assert!(!asks.join().unwrap() && !behind.go_on(), "overtook who waited");
        clock.advance(PERIOD);
        assert!(behind.go_on(), "its timer wakes it");
        assert!(limiter.shared.queue.is_empty());
    });
}

#[test]
fn a_token_that_comes_back_to_one_who_leaves_goes_to_the_next() {
    explore("a token comes back while the front leaves", 3, || {
        let (limiter, _clock) = one_token();
        let permit = ask(&limiter).expect("full");
        let (front, mut next) = (Waiting::new(&limiter), Waiting::new(&limiter));
        let leaves = spawn(move || drop(front));
        permit.unused();
        leaves.join().unwrap();
        assert!(next.go_on(), "the wake-up was lost");
        assert!(limiter.shared.queue.is_empty());
        assert!(ask(&limiter).is_none(), "one too many");
    });
}

#[test]
fn a_token_that_comes_back_to_the_only_one_who_leaves_is_there_for_who_comes() {
    explore("a token comes back while the only one leaves", 3, || {
        let (limiter, _clock) = one_token();
        let permit = ask(&limiter).expect("full");
        let only = Waiting::new(&limiter);
        let leaves = spawn(move || drop(only));
        permit.unused();
        leaves.join().unwrap();
        assert!(limiter.shared.queue.is_empty());
        assert!(ask(&limiter).is_some(), "the token went along");
        assert!(ask(&limiter).is_none(), "one too many");
    });
}

#[test]
fn who_joins_behind_one_who_leaves_is_served_what_was_too_little_for_it() {
    explore("the front leaves while one joins", 3, || {
        let (limiter, _clock) = limiter(TokenBucket::new(1, PERIOD).burst(2));
        let _used = ask(&limiter).expect("full");
        let front = Waiting::for_cost(&limiter, 2);
        let joins = limiter.clone();
        let joins = spawn(move || Waiting::new(&joins));
        drop(front);
        assert!(joins.join().unwrap().go_on(), "the wake-up was lost");
        assert!(limiter.shared.queue.is_empty());
        assert!(ask(&limiter).is_none(), "one too many");
    });
}

#[test]
fn a_token_that_comes_back_goes_to_one_of_two() {
    explore("a token comes back while one joins and one asks", 2, || {
        let (limiter, clock) = one_token();
        let permit = ask(&limiter).expect("full");
        let (joins, asks) = (limiter.clone(), limiter.clone());
        let joins = spawn(move || Waiting::new(&joins));
        let asks = spawn(move || ask(&asks).is_some());
        permit.unused();
        let mut waiting = joins.join().unwrap();
        let waited = waiting.go_on();
        assert!(waited ^ asks.join().unwrap(), "the token went to nobody, or to both");
        if !waited {
            clock.advance(PERIOD);
            assert!(waiting.go_on(), "its timer wakes it");
        }
        assert!(limiter.shared.queue.is_empty());
        assert!(ask(&limiter).is_none(), "one too many");
        assert_eq!(limiter.status().accepted_requests, 2 + u64::from(!waited));
    });
}

#[test]
fn an_outcome_that_is_counted_while_a_window_ends_moves_the_rate_once() {
    explore("an outcome is counted while a window ends", 3, || {
        // On one of the program's clocks, which no step depends on: the window is over when the model says so.
        let window = Duration::from_secs(31_557_600);
        let adaptive = Adaptive::new(10).window(window).minimum_calls(1);
        let limiter = RateLimiter::new("search", adaptive).expect("a valid limit");
        let permit = ask(&limiter).expect("full");
        let settles = spawn(move || permit.settle(Outcome::Failure));
        let state = limiter.shared.state();
        let end = |windows: u32| limiter.shared.clock.now().saturating_add(windows * window);
        state.roll(end(1));
        settles.join().unwrap();
        state.roll(end(3));
        assert!((state.adaptive_rate(end(3)).expect("it learns") - 8.0).abs() < 1e-9);
    });
}

#[test]
fn two_who_join_are_served_in_turn() {
    explore("a token comes back while two join", 2, || {
        let (limiter, clock) = one_token();
        let permit = ask(&limiter).expect("full");
        let (one, two) = (limiter.clone(), limiter.clone());
        let one = spawn(move || Waiting::new(&one));
        let two = spawn(move || Waiting::new(&two));
        permit.unused();
        let mut waiting = [one.join().unwrap(), two.join().unwrap()];
        for turn in 1..=2 {
            let served = waiting.iter_mut().filter_map(|waiting| waiting.go_on().then_some(()));
            assert_eq!(served.count(), turn);
            clock.advance(PERIOD);
        }
    });
}
