//! The rows of the peers. Each is set up as its documentation shows, with limits that are never (or always) reached.
//!
//! | peer | how it is called |
//! |---|---|
//! | recloser, failsafe, circuitbreaker-rs | a plain call of a closure |
//! | governor | a plain `check` |
//! | leaky-bucket | `acquire_one` and `try_acquire` |
//! | tower's `RateLimit`, tower-resilience, `tower_governor` | through tower, as ours |
//!
//! tower-resilience's layers are built with a handle, since without one every service has a state of its own. tower's `RateLimit`
//! cannot be shared, so it has no row for two threads.

use crate::row::{Candidate, Expect, Keys, Mix, Row, Tally, echo, same, settle};
use circuitbreaker_rs::DefaultPolicy;
use failsafe::CircuitBreaker as _;
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota};
use recloser::Recloser;
use std::{io, num::NonZero, pin::pin, sync::Arc, time::Duration};
use tower::limit::RateLimitLayer;
use tower_governor::{GovernorLayer, governor::GovernorConfigBuilder, key_extractor::GlobalKeyExtractor};
use tower_resilience_circuitbreaker::{
    CircuitBreakerConfigBuilder, CircuitBreakerHandle, CircuitBreakerLayer, CircuitState, DefaultClassifier,
    SlidingWindowType,
};
use tower_resilience_ratelimiter::{
    RateLimiterConfigBuilder, RateLimiterHandle, RateLimiterLayer, WindowType as LimiterWindow,
};

const SECOND: Duration = Duration::from_secs(1);
/// Longer than any run.
const NEVER: Duration = Duration::from_secs(1_000_000);
const PLENTY: usize = 1_000_000_000;

pub(crate) fn closed() -> Vec<Row> {
    let mut rows = vec![
        Row::accept("breaker closed: recloser", || {
            let breaker = Arc::new(Recloser::custom().build());
            recloser(&breaker).check(recloser_is_closed(breaker))
        }),
        Row::accept("breaker closed: failsafe, consecutive", || {
            let policy = failsafe::failure_policy::consecutive_failures(5, failsafe::backoff::constant(NEVER));
            failsafe(failsafe::Config::new().failure_policy(policy).build(), true)
        }),
        Row::accept("breaker closed: failsafe, success rate", || {
            let backoff = failsafe::backoff::constant(NEVER);
            let policy = failsafe::failure_policy::success_rate_over_time_window(0.5, 20, 30 * SECOND, backoff);
            failsafe(failsafe::Config::new().failure_policy(policy).build(), true)
        }),
        Row::accept("breaker closed: circuitbreaker-rs", || {
            circuitbreaker_rs(&CircuitBreakerRs::builder().build(), circuitbreaker_rs::State::Closed)
        }),
        Row::accept("breaker closed: tower-resilience, count window", || {
            tower_resilience(CircuitBreakerLayer::builder(), CircuitState::Closed).after(1_000)
        }),
        Row::accept("breaker closed: tower-resilience, consecutive", || {
            tower_resilience(
                CircuitBreakerLayer::builder().consecutive_failures(5),
                CircuitState::Closed,
            )
        }),
    ];
    // A few calls on a fresh one, so that the window holds about what the row says.
    for (name, calls) in [
        (
            "breaker closed: tower-resilience, time window after 1,000 calls",
            1_000_u16,
        ),
        (
            "breaker closed: tower-resilience, time window after 10,000 calls",
            10_000,
        ),
    ] {
        let build = move || {
            let config = CircuitBreakerLayer::builder()
                .sliding_window_type(SlidingWindowType::TimeBased)
                .sliding_window_duration(60 * SECOND)
                .minimum_number_of_calls(20);
            tower_resilience(config, CircuitState::Closed).after(calls.into())
        };
        rows.push(Row::accept(name, build).fresh().calls(500));
    }
    rows
}

pub(crate) fn failing() -> Vec<Row> {
    let row = |name, one_in| {
        Row::new(name, Expect::FailOneIn(one_in), move || {
            let breaker = Arc::new(Recloser::custom().build());
            let called = breaker.clone();
            Candidate::plain(move |_| {
                let breaker = called.clone();
                let mut mix = Mix::new(one_in);
                move || breaker.call(|| echo(mix.next())).is_ok()
            })
            .check(recloser_is_closed(breaker))
        })
    };
    vec![
        row("breaker, 1 % failures: recloser", 100),
        row("breaker, 10 % failures: recloser", 10),
    ]
}

pub(crate) fn open() -> Vec<Row> {
    vec![
        Row::reject("breaker open: recloser", || {
            let breaker = Arc::new(Recloser::custom().closed_len(1).open_wait(NEVER).build());
            for _ in 0..2 {
                let _ = breaker.call(|| Err::<u32, _>(io::Error::from(io::ErrorKind::TimedOut)));
            }
            recloser(&breaker)
        }),
        Row::reject("breaker open: failsafe, consecutive", || {
            let policy = failsafe::failure_policy::consecutive_failures(1, failsafe::backoff::constant(NEVER));
            let breaker = failsafe::Config::new().failure_policy(policy).build();
            breaker.on_error();
            failsafe(breaker, false)
        }),
        Row::reject("breaker open: circuitbreaker-rs", || {
            let breaker = CircuitBreakerRs::builder().cooldown(NEVER).build();
            breaker.force_open();
            circuitbreaker_rs(&breaker, circuitbreaker_rs::State::Open)
        }),
        Row::reject("breaker open: tower-resilience", || {
            let config = CircuitBreakerLayer::builder().wait_duration_in_open(NEVER);
            tower_resilience(config, CircuitState::Open)
        }),
    ]
}

pub(crate) fn accepting() -> Vec<Row> {
    vec![
        Row::accept("token bucket: governor, plain", || governor(Quota::per_second(many()))),
        Row::accept("token bucket: leaky-bucket, acquire_one", || {
            let limiter = leaky_bucket(usize::MAX);
            let future = size_of_val(&limiter.acquire_one());
            let called = limiter.clone();
            Candidate::plain(move |_| {
                let limiter = called.clone();
                move || {
                    settle(pin!(limiter.acquire_one()), |()| ());
                    true
                }
            })
            .check(leaky_bucket_spent(limiter))
            .future(future, 0)
        }),
        Row::accept("token bucket: tower RateLimit", || {
            Candidate::service(RateLimitLayer::new(u64::MAX, NEVER))
        })
        .never_shared(),
        Row::accept("token bucket: tower-resilience", || {
            let config = RateLimiterLayer::builder()
                .limit_for_period(PLENTY)
                .refresh_period(SECOND)
                .burst_size(PLENTY);
            tower_resilience_limiter(config, false)
        }),
        Row::accept("token bucket: tower-resilience, fixed window", || {
            let config = RateLimiterLayer::builder()
                .limit_for_period(PLENTY)
                .refresh_period(SECOND);
            tower_resilience_limiter(config, false)
        }),
        Row::accept("token bucket: tower_governor, HTTP", || {
            tower_governor(Duration::from_nanos(1), 1_000_000_000)
        }),
    ]
}

pub(crate) fn rejecting() -> Vec<Row> {
    vec![
        Row::reject("token bucket empty: governor, plain", || {
            governor(Quota::with_period(NEVER).expect("not zero")).after(1)
        }),
        Row::reject("token bucket empty: leaky-bucket, try_acquire", || {
            let limiter = leaky_bucket(0);
            let called = limiter.clone();
            Candidate::plain(move |_| {
                let limiter = called.clone();
                move || limiter.try_acquire(1)
            })
            .check(leaky_bucket_spent(limiter))
        }),
        Row::reject("token bucket empty: tower-resilience", || {
            let config = RateLimiterLayer::builder()
                .limit_for_period(1)
                .refresh_period(NEVER)
                .timeout_duration(Duration::ZERO);
            tower_resilience_limiter(config, true).after(1)
        }),
        Row::reject("token bucket empty: tower_governor, HTTP", || {
            tower_governor(NEVER, 1).after(1)
        }),
    ]
}

pub(crate) fn sliding() -> Vec<Row> {
    vec![Row::accept("sliding window: tower-resilience, log of 1 ms", || {
        let config = RateLimiterLayer::builder()
            .limit_for_period(1_000_000)
            .refresh_period(Duration::from_millis(1))
            .window_type(LimiterWindow::SlidingLog);
        tower_resilience_limiter(config, false)
    })]
}

pub(crate) fn keyed() -> Vec<Row> {
    let row = |name, keys: u32| {
        Row::accept(name, move || {
            let limiters = Arc::new(DefaultKeyedRateLimiter::keyed(Quota::per_second(many())));
            let called = limiters.clone();
            Candidate::plain(move |thread| {
                let limiters = called.clone();
                let mut keys = Keys::new(keys, thread);
                move || limiters.check_key(&keys.next()).is_ok()
            })
            .check(move |_| same("keys", &limiters.len(), &(keys as usize)))
            .after(keys.into())
        })
    };
    vec![
        row("keyed: governor, plain, 1 key", 1),
        row("keyed: governor, plain, 1,000 keys", 1_000),
        row("keyed: governor, plain, 100,000 keys", 100_000),
    ]
}

/// Bytes that governor takes for each of so many keys.
pub(crate) fn governor_bytes_a_key(keys: u32) -> f64 {
    let mut kept = None;
    let info = allocation_counter::measure(|| {
        let limiters = DefaultKeyedRateLimiter::keyed(Quota::per_second(many()));
        for key in 0..keys {
            let _ = limiters.check_key(&key);
        }
        kept = Some(limiters);
    });
    info.bytes_current as f64 / f64::from(keys)
}

fn many() -> NonZero<u32> {
    NonZero::new(1_000_000_000).expect("not zero")
}

fn recloser(breaker: &Arc<Recloser>) -> Candidate {
    let breaker = breaker.clone();
    Candidate::plain(move |_| {
        let breaker = breaker.clone();
        move || breaker.call(|| echo(1)).is_ok()
    })
}

/// It has no way to ask for its state, but an open one would reject this call.
fn recloser_is_closed(breaker: Arc<Recloser>) -> impl Fn(Tally) -> Result<(), String> {
    move |_| same("admits", &breaker.call(|| echo(1)).is_ok(), &true)
}

fn failsafe<P: failsafe::FailurePolicy + Send + 'static>(
    breaker: failsafe::StateMachine<P, ()>,
    permits: bool,
) -> Candidate {
    let called = breaker.clone();
    Candidate::plain(move |_| {
        let breaker = called.clone();
        move || breaker.call(|| echo(1)).is_ok()
    })
    .check(move |_| same("permits calls", &breaker.is_call_permitted(), &permits))
}

type CircuitBreakerRs = circuitbreaker_rs::CircuitBreaker<DefaultPolicy, io::Error>;

fn circuitbreaker_rs(breaker: &CircuitBreakerRs, state: circuitbreaker_rs::State) -> Candidate {
    let (called, asked) = (breaker.clone(), breaker.clone());
    Candidate::plain(move |_| {
        let breaker = called.clone();
        move || breaker.call(|| echo(1)).is_ok()
    })
    .check(move |_| same("state", &asked.current_state(), &state))
}

fn tower_resilience(config: CircuitBreakerConfigBuilder<DefaultClassifier>, state: CircuitState) -> Candidate {
    let (layer, handle) = shared(config);
    if state == CircuitState::Open {
        settle(pin!(handle.force_open()), |()| ());
    }
    Candidate::service(layer).check(move |_| same("state", &handle.state(), &state))
}

pub(crate) fn shared(
    config: CircuitBreakerConfigBuilder<DefaultClassifier>,
) -> (CircuitBreakerLayer<DefaultClassifier>, CircuitBreakerHandle) {
    config.build_with_handle().expect("a valid config")
}

fn tower_resilience_limiter(config: RateLimiterConfigBuilder, throttles: bool) -> Candidate {
    let (layer, handle) = shared_limiter(config);
    Candidate::service(layer).check(move |_| same("throttles", &handle.is_throttling(), &throttles))
}

pub(crate) fn shared_limiter(config: RateLimiterConfigBuilder) -> (RateLimiterLayer, RateLimiterHandle) {
    config.build_with_handle().expect("a valid config")
}

fn governor(quota: Quota) -> Candidate {
    let limiter = Arc::new(DefaultDirectRateLimiter::direct(quota));
    Candidate::plain(move |_| {
        let limiter = limiter.clone();
        move || limiter.check().is_ok()
    })
}

fn leaky_bucket(tokens: usize) -> Arc<leaky_bucket::RateLimiter> {
    let limiter = leaky_bucket::RateLimiter::builder()
        .max(usize::MAX)
        .initial(tokens)
        .interval(NEVER)
        .build();
    Arc::new(limiter)
}

/// Every call that was answered with `Ok` has taken a token of the most that it can hold, or of none.
fn leaky_bucket_spent(limiter: Arc<leaky_bucket::RateLimiter>) -> impl Fn(Tally) -> Result<(), String> {
    let full = limiter.balance();
    move |total| {
        let spent = full - limiter.balance();
        same("tokens spent", &(spent as u64), &total.ok)
    }
}

fn tower_governor(period: Duration, burst: u32) -> Candidate {
    Candidate::http(tower_governor_layer(period, burst))
}

/// One quota for all callers, as our limiter has it.
pub(crate) fn tower_governor_layer(
    period: Duration,
    burst: u32,
) -> GovernorLayer<
    GlobalKeyExtractor,
    governor::middleware::NoOpMiddleware<governor::clock::QuantaInstant>,
    axum::body::Body,
> {
    let config = GovernorConfigBuilder::default()
        .key_extractor(GlobalKeyExtractor)
        .period(period)
        .burst_size(burst)
        .finish()
        .expect("not zero");
    GovernorLayer::new(config)
}

/// The same, which tells the quota in header fields.
pub(crate) fn tower_governor_layer_with_headers(
    period: Duration,
    burst: u32,
) -> GovernorLayer<GlobalKeyExtractor, governor::middleware::StateInformationMiddleware, axum::body::Body> {
    let config = GovernorConfigBuilder::default()
        .key_extractor(GlobalKeyExtractor)
        .period(period)
        .burst_size(burst)
        .use_headers()
        .finish()
        .expect("not zero");
    GovernorLayer::new(config)
}
