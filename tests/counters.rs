//! Counters and permits, however many breakers, threads and handles there are.

use portcullis::{CircuitBreaker, Clock, EventKind, Outcome, RateLimiter, Registry, State, TokenBucket, Window};
use std::{
    sync::{Arc, Barrier, Mutex},
    thread,
    time::Duration,
};

fn breaker() -> CircuitBreaker {
    CircuitBreaker::builder("agent").clock(Clock::manual()).build().unwrap()
}

fn successes(breaker: &CircuitBreaker) -> u64 {
    breaker.status().metrics.successful_requests
}

/// More than the fast counters have room for: the others are slower, and count the same.
#[test]
fn a_thousand_breakers_count_each_for_itself() {
    let breakers: Vec<_> = (0..1_000).map(|_| breaker()).collect();
    for (n, breaker) in breakers.iter().enumerate() {
        for _ in 0..n % 7 {
            breaker.try_acquire().unwrap().settle(Outcome::Success);
        }
    }
    for (n, breaker) in breakers.iter().enumerate() {
        assert_eq!(successes(breaker), n as u64 % 7, "breaker {n}");
    }
}

/// Those in a row after a failure are told to the breaker together, now and then.
#[test]
fn a_success_is_counted_once_however_many_there_are_in_a_row() {
    let breaker = CircuitBreaker::builder("agent")
        .failure_rate(1.0)
        .window(Window::calls(10_000))
        .build()
        .unwrap();
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    for _ in 0..3_000 {
        breaker.try_acquire().unwrap().settle(Outcome::Success);
    }
    let metrics = breaker.status().metrics;
    assert_eq!((metrics.successful_requests, metrics.total_requests), (3_000, 3_001));
}

#[test]
fn a_breaker_begins_with_nothing_where_another_one_ended() {
    for round in 0..2_000 {
        let breaker = breaker();
        let metrics = breaker.status().metrics;
        assert_eq!(
            (metrics.total_requests, breaker.state()),
            (0, State::Closed),
            "round {round}"
        );
        breaker.try_acquire().unwrap().settle(Outcome::Success);
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        drop(breaker.try_acquire().unwrap());
        if round % 3 == 0 {
            breaker.force_open();
        }
    }
}

#[test]
fn calls_of_more_threads_than_there_are_lines_are_all_counted() {
    let (breaker, limiter) = (
        breaker(),
        RateLimiter::new("agent", TokenBucket::new(1_000_000, Duration::from_secs(1))).unwrap(),
    );
    let together = Barrier::new(200);
    thread::scope(|scope| {
        for _ in 0..200 {
            scope.spawn(|| {
                breaker.try_acquire().unwrap().settle(Outcome::Success);
                // All at once alive: the numbers of threads run out.
                together.wait();
                for _ in 0..100 {
                    breaker.try_acquire().unwrap().settle(Outcome::Success);
                    limiter.try_acquire().unwrap().settle(Outcome::Success);
                }
            });
        }
    });
    assert_eq!(successes(&breaker), 200 * 101);
    assert_eq!(limiter.status().accepted_requests, 200 * 100);
}

#[test]
fn calls_of_threads_that_come_and_go_are_all_counted() {
    let breaker = breaker();
    for _ in 0..100 {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        breaker.try_acquire().unwrap().settle(Outcome::Success);
                    }
                });
            }
        });
    }
    assert_eq!(successes(&breaker), 100 * 4 * 50);
}

#[test]
fn a_permit_may_end_on_another_thread_than_it_began_on() {
    let breaker = breaker();
    let permits: Vec<_> = (0..100).map(|_| breaker.try_acquire().unwrap()).collect();
    thread::scope(|scope| {
        for permit in permits {
            scope.spawn(move || permit.settle(Outcome::Success));
        }
    });
    assert_eq!(successes(&breaker), 100);
}

/// Thread locals are dropped in no order that anybody could rely on.
#[test]
fn a_permit_that_a_thread_local_drops_at_the_end_of_its_thread_is_counted() {
    thread_local! {
        static LATE: std::cell::RefCell<Vec<portcullis::CircuitBreakerPermit>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    let breaker = breaker();
    for _ in 0..50 {
        let breaker = breaker.clone();
        let thread = thread::spawn(move || {
            LATE.with_borrow_mut(|late| late.push(breaker.try_acquire().unwrap()));
            breaker.try_acquire().unwrap().settle(Outcome::Success);
            LATE.with_borrow_mut(|late| late.push(breaker.try_acquire().unwrap()));
        });
        // Unlike the end of a scope, this waits for the thread locals.
        thread.join().unwrap();
    }
    let metrics = breaker.status().metrics;
    assert_eq!((metrics.successful_requests, metrics.cancelled_requests), (50, 100));
}

#[test]
fn a_permit_that_outlives_every_handle_still_tells_the_listeners() {
    let opened = Arc::new(Mutex::new(Vec::new()));
    let breaker = CircuitBreaker::builder("agent").failure_threshold(1).build().unwrap();
    let told = opened.clone();
    breaker.on_event(move |event| {
        if let EventKind::Transition { to, .. } = event.kind {
            told.lock().unwrap().push(to);
        }
    });
    let (first, second) = (breaker.try_acquire().unwrap(), breaker.try_acquire().unwrap());
    drop(breaker);
    second.settle(Outcome::Success);
    first.settle(Outcome::Failure);
    assert_eq!(*opened.lock().unwrap(), [State::Open]);
}

/// Threads end permits while others drop the last handles and build the next breakers.
#[test]
fn breakers_come_and_go_under_threads_and_count_exactly() {
    let registry = Registry::new();
    thread::scope(|scope| {
        for thread in 0..4_u32 {
            let registry = &registry;
            scope.spawn(move || {
                for round in 0..300 {
                    let breaker = breaker();
                    let permits: Vec<_> = (0..8).map(|_| breaker.try_acquire().unwrap()).collect();
                    let last = breaker.clone();
                    let helper = thread::spawn(move || {
                        for permit in permits {
                            permit.settle(Outcome::Success);
                        }
                        successes(&last)
                    });
                    for _ in 0..5 {
                        breaker.try_acquire().unwrap().settle(Outcome::Success);
                    }
                    if round % 2 == 0 {
                        drop(breaker);
                        helper.join().unwrap();
                    } else {
                        helper.join().unwrap();
                        assert_eq!(successes(&breaker), 13, "thread {thread}, round {round}");
                    }
                    assert!(registry.open_circuits().is_empty());
                }
            });
        }
    });
}
