//! The rows of portcullis.

use crate::row::{Candidate, Expect, Row, Tally, same};
use portcullis::{
    Adaptive, Algorithm, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerLayer, Clock, GuardLayer,
    KeyedRateLimiter, Outcome, RateLimitLayer, RateLimiter, RateLimiterStatus, SlidingWindow, State, TokenBucket,
    Window,
};
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
/// Longer than any run.
const NEVER: Duration = Duration::from_secs(1_000_000);

pub(crate) fn breakers() -> Vec<Row> {
    let mut rows = vec![
        closed("breaker closed: portcullis", default),
        Row::accept("breaker closed: portcullis, clone + ready + call", || {
            let breaker = breaker(default());
            Candidate::cloned(CircuitBreakerLayer::new(breaker.clone())).check(stays_closed(breaker))
        }),
        Row::accept("breaker closed: portcullis, HTTP", || {
            let breaker = breaker(default());
            Candidate::http(CircuitBreakerLayer::http(breaker.clone())).check(stays_closed(breaker))
        }),
        closed("breaker closed: portcullis, count window", count_window),
        Row::accept("breaker closed: portcullis, count window, clone + ready + call", || {
            let breaker = breaker(count_window());
            Candidate::cloned(CircuitBreakerLayer::new(breaker.clone()))
                .check(stays_closed(breaker))
                .after(1_000)
        }),
    ];
    // A fresh one for each measurement: it holds what was recorded before, and what the measurement adds.
    let after = |name, calls, clock: fn() -> Clock| {
        let build = move || {
            let config = default().failure_rate(0.5).window(Window::time(60 * SECOND));
            let breaker = breaker_by(config, clock());
            Candidate::service(CircuitBreakerLayer::new(breaker.clone()))
                .check(stays_closed(breaker))
                .after(calls)
        };
        Row::accept(name, build).fresh()
    };
    rows.extend([
        after(
            "breaker closed: portcullis, time window after 1,000 calls",
            1_000,
            Clock::fast,
        ),
        after(
            "breaker closed: portcullis, time window after 100,000 calls",
            100_000,
            Clock::fast,
        ),
        after(
            "breaker closed: portcullis, time window after 10,000,000 calls",
            10_000_000,
            Clock::fast,
        ),
        after(
            "breaker closed: portcullis, time window, default clock",
            1_000,
            Clock::system,
        ),
    ]);
    for (name, config, one_in) in [
        ("breaker, 1 % failures: portcullis", default as fn() -> _, 100),
        ("breaker, 1 % failures: portcullis, count window", count_window, 100),
        ("breaker, 10 % failures: portcullis", default, 10),
        ("breaker, 10 % failures: portcullis, count window", count_window, 10),
    ] {
        rows.push(Row::new(name, Expect::FailOneIn(one_in), move || {
            let breaker = breaker(config());
            Candidate::failing(CircuitBreakerLayer::new(breaker.clone()), one_in).check(stays_closed(breaker))
        }));
    }
    rows.push(Row::reject("breaker open: portcullis", || {
        let breaker = tripped();
        Candidate::service(CircuitBreakerLayer::new(breaker.clone())).check(stays_open(breaker))
    }));
    rows.push(Row::reject("breaker open: portcullis, clone + ready + call", || {
        let breaker = tripped();
        Candidate::cloned(CircuitBreakerLayer::new(breaker.clone())).check(stays_open(breaker))
    }));
    rows.push(Row::reject("breaker open: portcullis, HTTP", || {
        let breaker = tripped();
        Candidate::http(CircuitBreakerLayer::http(breaker.clone())).check(stays_open(breaker))
    }));
    rows
}

pub(crate) fn limiters() -> Vec<Row> {
    let mut rows = vec![
        admitting("token bucket: portcullis", Expect::Accept, || {
            limiter(plenty(), Clock::fast())
        }),
        admitting("token bucket: portcullis, default clock", Expect::Accept, || {
            limiter(plenty(), Clock::system())
        }),
        Row::accept("token bucket: portcullis, clone + ready + call", || {
            let limiter = limiter(plenty(), Clock::fast());
            Candidate::cloned(RateLimitLayer::new(limiter.clone())).check(admits(move || limiter.status()))
        }),
        Row::accept("token bucket: portcullis, HTTP", || {
            let limiter = limiter(plenty(), Clock::fast());
            Candidate::http(RateLimitLayer::http(limiter.clone())).check(admits(move || limiter.status()))
        }),
        Row::reject("token bucket empty: portcullis", || {
            let limiter = exhausted();
            Candidate::service(RateLimitLayer::new(limiter.clone())).check(rejects(limiter))
        }),
        Row::reject("token bucket empty: portcullis, HTTP", || {
            let limiter = exhausted();
            Candidate::http(RateLimitLayer::http(limiter.clone())).check(rejects(limiter))
        }),
    ];
    // A window so short that every slot is free again when its turn comes. All but one: the slot that a thread has claimed and
    // not yet written. Of 100 slots the other thread is round in some microseconds, so if the system takes the first off its
    // core just then, it is rejected until that one goes on, as exactness asks.
    for (name, expect, size) in [
        ("sliding window: portcullis, 100", Expect::AcceptMost, 100),
        ("sliding window: portcullis, 10,000", Expect::Accept, 10_000),
        ("sliding window: portcullis, 1,000,000", Expect::Accept, 1_000_000),
    ] {
        let make = move || limiter(SlidingWindow::new(size, Duration::from_nanos(1)), Clock::fast());
        rows.push(admitting(name, expect, make));
    }
    rows.push(admitting(
        "sliding window: portcullis, 10,000, default clock",
        Expect::Accept,
        || limiter(SlidingWindow::new(10_000, Duration::from_nanos(1)), Clock::system()),
    ));
    rows.push(admitting("adaptive: portcullis", Expect::Accept, || {
        limiter(Adaptive::new(1_000_000_000).window(SECOND), Clock::fast())
    }));
    for (name, keys) in [
        ("keyed: portcullis, 1 key", 1),
        ("keyed: portcullis, 1,000 keys", 1_000),
        ("keyed: portcullis, 100,000 keys", 100_000),
    ] {
        rows.push(Row::accept(name, move || {
            let limiters = keyed_limiters();
            let layer = RateLimitLayer::new(limiters.by(|key: &u32| Some(*key)));
            Candidate::keyed(layer, keys)
                .check(move |total| {
                    admits(|| limiters.status())(total)?;
                    let tracked = limiters.status().keys.map(|keys| keys.tracked);
                    same("keys", &tracked, &Some(keys as usize))
                })
                .after(keys.into())
        }));
    }
    rows
}

pub(crate) fn pairs() -> Vec<Row> {
    vec![
        Row::accept("limiter + breaker: portcullis, one layer", || {
            let (limiter, breaker) = pair(&Clock::fast());
            Candidate::service(GuardLayer::new((limiter.clone(), breaker.clone()))).check(both(limiter, breaker))
        }),
        Row::accept("limiter + breaker: portcullis, one layer, default clock", || {
            let (limiter, breaker) = pair(&Clock::system());
            Candidate::service(GuardLayer::new((limiter.clone(), breaker.clone()))).check(both(limiter, breaker))
        }),
        Row::accept("limiter + breaker: portcullis, one layer, clone + ready + call", || {
            let (limiter, breaker) = pair(&Clock::fast());
            Candidate::cloned(GuardLayer::new((limiter.clone(), breaker.clone()))).check(both(limiter, breaker))
        }),
        Row::accept("limiter + breaker: portcullis, two layers", || {
            let (limiter, breaker) = pair(&Clock::fast());
            let outer = RateLimitLayer::new(limiter.clone());
            let inner = CircuitBreakerLayer::new(breaker.clone());
            Candidate::service(tower::layer::util::Stack::new(inner, outer)).check(both(limiter, breaker))
        }),
    ]
}

/// Bytes that a sliding window takes for each request of its quota.
pub(crate) fn bytes_a_slot() -> f64 {
    let held = |size: u32| {
        let mut kept = None;
        let info = allocation_counter::measure(|| {
            kept = Some(limiter(SlidingWindow::new(size, SECOND), Clock::fast()));
        });
        info.bytes_current as f64
    };
    (held(200_000) - held(100_000)) / 100_000.0
}

/// Bytes that a keyed limiter takes for each of so many keys.
pub(crate) fn bytes_a_key(keys: u32) -> f64 {
    let mut kept = None;
    let info = allocation_counter::measure(|| {
        let limiters = keyed_limiters();
        for key in 0..keys {
            drop(limiters.try_acquire(&key));
        }
        kept = Some(limiters);
    });
    info.bytes_current as f64 / f64::from(keys)
}

pub(crate) fn limiter(algorithm: impl Into<Algorithm>, clock: Clock) -> RateLimiter {
    RateLimiter::builder("bench", algorithm)
        .clock(clock)
        .build()
        .expect("a valid limit")
}

pub(crate) fn plenty() -> TokenBucket {
    TokenBucket::new(1_000_000_000, SECOND)
}

pub(crate) fn exhausted() -> RateLimiter {
    let limiter = limiter(TokenBucket::new(1, NEVER), Clock::fast());
    limiter.try_acquire().expect("a full bucket");
    limiter
}

fn keyed_limiters() -> KeyedRateLimiter {
    KeyedRateLimiter::builder("bench", plenty())
        .max_keys(200_000)
        .clock(Clock::fast())
        .build()
        .expect("a valid limit")
}

fn pair(clock: &Clock) -> (RateLimiter, CircuitBreaker) {
    (limiter(plenty(), clock.clone()), breaker_by(default(), clock.clone()))
}

fn default() -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
}

fn count_window() -> CircuitBreakerConfig {
    default().failure_rate(0.5).window(Window::calls(100))
}

fn breaker(config: CircuitBreakerConfig) -> CircuitBreaker {
    breaker_by(config, Clock::fast())
}

fn breaker_by(config: CircuitBreakerConfig, clock: Clock) -> CircuitBreaker {
    CircuitBreaker::builder("bench")
        .config(config)
        .clock(clock)
        .build()
        .expect("a valid config")
}

fn tripped() -> CircuitBreaker {
    let breaker = breaker(default().failure_threshold(1).recovery_timeout(NEVER));
    breaker.try_acquire().expect("closed").settle(Outcome::Failure);
    breaker
}

fn closed(name: &'static str, config: fn() -> CircuitBreakerConfig) -> Row {
    Row::accept(name, move || {
        let breaker = breaker(config());
        Candidate::service(CircuitBreakerLayer::new(breaker.clone()))
            .check(stays_closed(breaker))
            .after(1_000)
    })
}

fn admitting(name: &'static str, expect: Expect, make: impl Fn() -> RateLimiter + 'static) -> Row {
    Row::new(name, expect, move || {
        let limiter = make();
        Candidate::service(RateLimitLayer::new(limiter.clone())).check(admits(move || limiter.status()))
    })
}

fn stays_closed(breaker: CircuitBreaker) -> impl Fn(Tally) -> Result<(), String> {
    move |total| {
        let status = breaker.status();
        let counts = &status.metrics;
        same("state", &status.state, &State::Closed)?;
        same("rejected", &counts.rejected_requests, &0)?;
        same("successes", &counts.successful_requests, &total.ok)?;
        same("failures", &counts.failed_requests, &total.errors())?;
        same("openings", &counts.state_transitions.closed_to_open, &0)
    }
}

fn stays_open(breaker: CircuitBreaker) -> impl Fn(Tally) -> Result<(), String> {
    move |total| {
        let status = breaker.status();
        same("state", &status.state, &State::Open)?;
        same("rejected", &status.metrics.rejected.open, &total.calls)
    }
}

fn admits(status: impl Fn() -> RateLimiterStatus) -> impl Fn(Tally) -> Result<(), String> {
    move |total| {
        let status = status();
        same("accepted", &status.accepted_requests, &total.ok)?;
        same("rejected", &status.rejected_requests, &total.errors())
    }
}

fn rejects(limiter: RateLimiter) -> impl Fn(Tally) -> Result<(), String> {
    move |total| {
        let status = limiter.status();
        same("accepted", &status.accepted_requests, &1)?;
        same("rejected", &status.rejected_requests, &total.calls)
    }
}

fn both(limiter: RateLimiter, breaker: CircuitBreaker) -> impl Fn(Tally) -> Result<(), String> {
    let (admits, closed) = (admits(move || limiter.status()), stays_closed(breaker));
    move |total| admits(total).and_then(|()| closed(total))
}
