//! When what listeners capture is dropped, and what becomes of a panic there. Apart from other tests, and one after the other: whoever
//! takes or leaves a breaker in that moment may be the one who drops it, on another thread.

use portcullis::{
    Adaptive, Algorithm, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerPermit, Clock, KeyedCircuitBreaker,
    KeyedPermit, KeyedRateLimiter, Outcome, RateLimitPermit, RateLimiter, SlidingWindow, TokenBucket, Verdict,
};
use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts when it is dropped.
struct Told(Arc<AtomicU64>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

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
    let _alone = alone();
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

/// Whatever order handles and permits go in, what the breaker holds goes with the last of them.
#[test]
fn the_last_of_handles_and_permits_drops_the_listeners() {
    let _alone = alone();
    let dropped = Arc::new(AtomicU64::new(0));
    let mut gone = 0;
    for permits_first in [true, false] {
        let breaker = breaker();
        let told = Told(dropped.clone());
        breaker.on_event(move |_| {
            let _ = &told;
        });
        let other = breaker.clone();
        let permits = [breaker.try_acquire().unwrap(), other.try_acquire().unwrap()];
        assert_eq!(dropped.load(Ordering::Relaxed), gone);
        if permits_first {
            drop(permits);
            drop(breaker);
            assert_eq!(dropped.load(Ordering::Relaxed), gone, "a handle is left");
            drop(other);
        } else {
            drop((breaker, other));
            assert_eq!(dropped.load(Ordering::Relaxed), gone, "permits are left");
            drop(permits);
        }
        gone += 1;
        assert_eq!(dropped.load(Ordering::Relaxed), gone);
    }
}

trait Ends: fmt::Debug {
    fn settle(self, verdict: Verdict);
    fn unused(self);
}

macro_rules! ends {
    ($($permit:ty)+) => {
        $(impl Ends for $permit {
            fn settle(self, verdict: Verdict) {
                Self::settle(self, verdict);
            }
            fn unused(self) {
                Self::unused(self);
            }
        })+
    };
}

ends!(CircuitBreakerPermit RateLimitPermit KeyedPermit);

/// Ends calls in every way there is, the last of them after the last handle.
fn end_in_every_way<H, P: Ends>(handle: H, admit: impl Fn(&H) -> P, dropped: &AtomicU64, case: &str) {
    let ways: [fn(P); 8] = [
        |permit| permit.settle(Outcome::Success.into()),
        |permit| permit.settle(Outcome::Failure.into()),
        |permit| permit.settle(Outcome::Ignored.into()),
        |permit| permit.settle(Verdict::new(Outcome::Success).cost(2)),
        |permit| drop(permit),
        |permit| permit.unused(),
        |permit| {
            let panics = move || {
                let _held = permit;
                resume_unwind(Box::new(()))
            };
            assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        },
        // To look at a permit ends nothing.
        |permit| assert!(!format!("{permit:?}{permit:?}").is_empty()),
    ];
    for end in ways {
        end(admit(&handle));
    }
    // More in a row than are told to the breaker one by one.
    for _ in 0..1_100 {
        admit(&handle).settle(Outcome::Success.into());
    }
    let left = ways.map(|end| (end, admit(&handle)));
    drop(handle);
    for (end, permit) in left {
        assert_eq!(dropped.load(Ordering::Relaxed), 0, "{case}: permits are left");
        end(permit);
    }
    assert_eq!(
        dropped.load(Ordering::Relaxed),
        1,
        "{case}: the last permit drops the listener"
    );
}

/// Where there is room for fast counters, and where there is none any more.
#[test]
fn whichever_way_calls_end_the_last_of_them_drops_the_listeners() {
    let _alone = alone();
    let second = Duration::from_secs(1);
    let algorithms: [Algorithm; 3] = [
        TokenBucket::new(1_000_000, second).into(),
        SlidingWindow::new(1_000_000, second).into(),
        Adaptive::new(1_000_000).into(),
    ];
    let mut fast = Vec::new();
    for with_room in [true, false] {
        if !with_room {
            fast.extend((0..300).map(|_| breaker()));
        }
        for watched in [false, true] {
            let dropped = Arc::new(AtomicU64::new(0));
            let told = Told(dropped.clone());
            let builder = CircuitBreaker::builder("agent").failure_rate(1.0);
            let breaker = if watched {
                builder.slow_calls(1.0, second)
            } else {
                builder
            }
            .build()
            .unwrap();
            breaker.on_event(move |_| {
                let _ = &told;
            });
            let case = format!("breaker, with room {with_room}, slow calls watched {watched}");
            end_in_every_way(breaker, |breaker| breaker.try_acquire().unwrap(), &dropped, &case);
        }

        let dropped = Arc::new(AtomicU64::new(0));
        let told = Told(dropped.clone());
        let watched = CircuitBreakerConfig::default().failure_rate(1.0);
        let breakers = KeyedCircuitBreaker::builder("agent").config(watched).build().unwrap();
        breakers.on_event(move |_| {
            let _ = &told;
        });
        let case = format!("keyed breaker, with room {with_room}");
        end_in_every_way(breakers, |breakers| breakers.try_acquire(&1).unwrap(), &dropped, &case);

        for algorithm in algorithms {
            let dropped = Arc::new(AtomicU64::new(0));
            let told = Told(dropped.clone());
            let limiter = RateLimiter::new("agent", algorithm).unwrap();
            limiter.on_event(move |_| {
                let _ = &told;
            });
            let case = format!("{algorithm:?}, with room {with_room}");
            end_in_every_way(limiter, |limiter| limiter.try_acquire().unwrap(), &dropped, &case);

            let dropped = Arc::new(AtomicU64::new(0));
            let told = Told(dropped.clone());
            let limiter = KeyedRateLimiter::new("agent", algorithm).unwrap();
            limiter.on_event(move |_| {
                let _ = &told;
            });
            let case = format!("keyed {algorithm:?}, with room {with_room}");
            end_in_every_way(limiter, |limiter| limiter.try_acquire(&1).unwrap(), &dropped, &case);
        }
    }
    drop(fast);
}
