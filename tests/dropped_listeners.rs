//! A listener whose captures panic when they are dropped. Apart from other tests: whoever takes or leaves a breaker in that moment may
//! be the one who drops them, on another thread.

use portcullis::{CircuitBreaker, Clock, Outcome, RateLimiter, TokenBucket};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

fn breaker() -> CircuitBreaker {
    CircuitBreaker::builder("agent").clock(Clock::manual()).build().unwrap()
}

/// What a listener holds is dropped by whoever ends last, and may panic: the call has ended all the same, once.
#[test]
fn a_listener_that_panics_when_it_is_dropped_leaves_nothing_behind_for_the_next_breaker() {
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }
    struct Told(Arc<AtomicU64>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let dropped = Arc::new(AtomicU64::new(0));
    for round in 1..=300 {
        let (first, limited) = (
            breaker(),
            RateLimiter::new("agent", TokenBucket::new(9, Duration::from_secs(1))).unwrap(),
        );
        let (one, two) = (Panics, Panics);
        first.on_event(move |_| {
            let _ = &one;
        });
        limited.on_event(move |_| {
            let _ = &two;
        });
        let (permit, limit) = (first.try_acquire().unwrap(), limited.try_acquire().unwrap());
        drop((first, limited));
        let ends = || permit.settle(Outcome::Success);
        assert!(catch_unwind(AssertUnwindSafe(ends)).is_err());
        let ends = || limit.settle(Outcome::Success);
        assert!(catch_unwind(AssertUnwindSafe(ends)).is_err());

        let next = [breaker(), breaker()];
        for breaker in &next {
            let told = Told(dropped.clone());
            breaker.on_event(move |_| {
                let _ = &told;
            });
            assert_eq!(breaker.status().metrics.total_requests, 0);
            breaker.try_acquire().unwrap().settle(Outcome::Success);
        }
        drop(next);
        assert_eq!(
            dropped.load(Ordering::Relaxed),
            2 * round,
            "the last handle frees everything"
        );
    }
}
