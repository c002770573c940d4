//! What no type can forbid: that it does what the documentation says, and no worse.

use portcullis::{
    CircuitBreaker, CircuitBreakerConfig, CircuitBreakerLayer, Clock, GuardLayer, Outcome, RateLimitLayer, RateLimiter,
    Registry, State, TokenBucket,
};
use std::{convert::Infallible, time::Duration};
use tower::{Layer, Service, ServiceExt, service_fn};

const MINUTE: Duration = Duration::from_secs(60);

fn breaker(name: &str) -> CircuitBreaker {
    let builder = CircuitBreaker::builder(name).clock(Clock::manual());
    builder.failure_threshold(2).build().unwrap()
}

fn two_a_minute() -> RateLimiter {
    let builder = RateLimiter::builder("api", TokenBucket::new(2, MINUTE)).clock(Clock::manual());
    builder.build().unwrap()
}

fn echo() -> impl Service<u32, Response = u32, Error = Infallible, Future: Send> + Clone {
    service_fn(async |number: u32| Ok(number))
}

/// How many of ten requests come through, each by a layer that is made for it.
async fn through(mut layer: impl FnMut() -> RateLimitLayer) -> usize {
    let mut admitted = 0;
    for _ in 0..10 {
        admitted += usize::from(layer().layer(echo()).oneshot(1).await.is_ok());
    }
    admitted
}

#[tokio::test]
async fn a_limit_holds_though_its_layer_is_made_for_each_request_but_not_though_it_is_made_itself() {
    let limiter = two_a_minute();
    assert_eq!(
        through(|| RateLimitLayer::new(limiter.clone())).await,
        2,
        "the state is behind the handle"
    );
    assert_eq!(
        through(|| RateLimitLayer::new(two_a_minute())).await,
        10,
        "a new one for each is full"
    );
}

#[test]
fn two_breakers_of_one_name_share_nothing_and_no_registry_takes_both() {
    let (one, other) = (breaker("search"), breaker("search"));
    one.force_open();
    assert_eq!(other.state(), State::Closed);
    let registry = Registry::new();
    registry.register(&one).unwrap();
    let error = registry.register(&other).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"the circuit breaker of "search" exists already, with a state of its own"#
    );
}

#[test]
fn the_same_name_in_two_registries_is_two_states() {
    let (one, other) = (Registry::new(), Registry::new());
    let config = CircuitBreakerConfig::default;
    one.circuit_breaker("search", config()).unwrap().force_open();
    let unseen = other.circuit_breaker("search", config()).unwrap();
    assert_eq!(unseen.state(), State::Closed);
    assert_eq!(
        (one.open_circuits().len(), other.open_circuits().len()),
        (1, 0),
        "each shows its own"
    );
    let known = one.get_circuit_breaker("search").unwrap();
    assert!(
        other.register(known).is_err(),
        "and what is one's cannot hide the other's"
    );
}

#[test]
fn a_breaker_and_a_limit_may_have_one_name_and_two_limits_may_not() {
    let registry = Registry::new();
    registry.register(breaker("api")).unwrap();
    registry.register(two_a_minute()).unwrap();
    assert!(registry.register(two_a_minute()).is_err());
    let keyed = registry.keyed_rate_limiter("api", "default", TokenBucket::new(2, MINUTE), 10);
    assert_eq!(
        keyed.unwrap_err().to_string(),
        r#"the rate limit "default" of "api" exists already, with a state of its own"#
    );
}

#[tokio::test]
async fn one_handle_twice_in_a_pair_counts_each_call_twice() {
    let (breaker, limiter) = (breaker("search"), two_a_minute());
    let fails = service_fn(async |_: u32| Err::<(), _>("down"));
    let twice = CircuitBreakerLayer::new((breaker.clone(), breaker.clone()));
    twice.layer(fails).oneshot(1).await.unwrap_err();
    assert_eq!(
        (breaker.status().metrics.failed_requests, breaker.state()),
        (2, State::Open)
    );

    let twice = GuardLayer::new((limiter.clone(), limiter.clone()));
    twice.layer(echo()).oneshot(1).await.unwrap();
    assert_eq!(limiter.status().accepted_cost, 2);
}

#[test]
fn a_permit_that_is_bound_to_nothing_is_cancelled_at_once() {
    let breaker = breaker("search");
    let _ = breaker.try_acquire();
    assert_eq!(breaker.status().metrics.cancelled_requests, 1);
    let permit = breaker.try_acquire().unwrap();
    assert_eq!(breaker.status().metrics.total_requests, 1, "this one is held");
    permit.settle(Outcome::Success);
}

#[tokio::test]
async fn the_last_classifier_that_is_set_is_the_one_that_judges() {
    let breaker = breaker("search");
    let layer = CircuitBreakerLayer::new(breaker.clone())
        .classify(|_: &Result<u32, Infallible>| Outcome::Failure)
        .classify(|_: &Result<u32, Infallible>| Outcome::Ignored);
    layer.layer(echo()).oneshot(1).await.unwrap();
    let metrics = breaker.status().metrics;
    assert_eq!((metrics.failed_requests, metrics.ignored_requests), (0, 1));
}

#[test]
fn on_a_manual_clock_that_nobody_advances_nothing_comes_back() {
    let (breaker, limiter) = (breaker("search"), two_a_minute());
    for _ in 0..2 {
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        limiter.try_acquire().unwrap();
    }
    for _ in 0..100 {
        assert_eq!(breaker.try_acquire().unwrap_err().retry_after, Some(MINUTE));
        assert_eq!(limiter.try_acquire().unwrap_err().retry_after, Some(MINUTE / 2));
    }
}
