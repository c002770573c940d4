//! `call` and `call_with`, and permits that end by a panic.

use crate::{SECOND, admit, breaker, trip, trip_and_wait};
use futures_util::FutureExt;
use portcullis::{
    BoxError, CircuitBreaker, CircuitBreakerMetrics, Clock, Error, Outcome, RateLimiter, Reason, Rejected, State,
    TokenBucket, Verdict,
};
use std::{
    cell::Cell,
    future::{pending, ready},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

/// Successful, failed, ignored, cancelled, rejected.
fn counts(breaker: &CircuitBreaker) -> [u64; 5] {
    let CircuitBreakerMetrics {
        successful_requests,
        failed_requests,
        ignored_requests,
        cancelled_requests,
        rejected_requests,
        ..
    } = breaker.status().metrics;
    [
        successful_requests,
        failed_requests,
        ignored_requests,
        cancelled_requests,
        rejected_requests,
    ]
}

#[tokio::test]
async fn a_call_returns_what_the_future_does_and_counts_it() {
    let (breaker, _clock) = breaker(|builder| builder);
    assert_eq!(breaker.call(ready(Ok::<_, &str>(42))).await, Ok(42));
    assert_eq!(
        breaker.call(ready(Err::<(), _>("down"))).await,
        Err(Error::Inner("down"))
    );
    assert_eq!(counts(&breaker), [1, 1, 0, 0, 0]);
    assert_eq!(breaker.status().failure_count, 1);
}

#[tokio::test]
async fn an_open_circuit_does_not_touch_the_future() {
    let (breaker, _clock) = breaker(|builder| builder);
    trip(&breaker);
    let touched = Cell::new(false);
    let answer = breaker
        .call(async {
            touched.set(true);
            Ok::<_, &str>(())
        })
        .await;
    let Err(Error::Rejected(rejected)) = answer else {
        panic!("the circuit is open: {answer:?}");
    };
    assert_eq!(
        (rejected.reason, rejected.retry_after),
        (Reason::Open, Some(60 * SECOND))
    );
    assert!(!touched.get());
    assert_eq!(counts(&breaker), [0, 5, 0, 0, 1]);
}

#[tokio::test]
async fn a_call_that_is_never_polled_leaves_no_trace() {
    let (breaker, _clock) = breaker(|builder| builder);
    drop(breaker.call(pending::<Result<(), &str>>()));
    assert_eq!(counts(&breaker), [0; 5]);
}

#[tokio::test]
async fn a_call_dropped_while_it_runs_is_cancelled() {
    let (breaker, clock) = breaker(|builder| builder);
    assert_eq!(breaker.call(pending::<Result<(), &str>>()).now_or_never(), None);
    assert_eq!(counts(&breaker), [0, 0, 0, 1, 0]);
    trip_and_wait(&breaker, &clock);
    for _ in 0..100 {
        assert_eq!(breaker.call(pending::<Result<(), &str>>()).now_or_never(), None);
    }
    let status = breaker.status();
    assert_eq!(
        (status.state, status.probes_in_flight),
        (State::HalfOpen, 0),
        "a cancelled probe decides nothing"
    );
}

#[tokio::test]
async fn a_call_whose_future_panics_is_one_failure() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(2));
    for failures in 1..=2 {
        let call = breaker.call(async {
            if true {
                panic!("a bug in the service")
            } else {
                Ok::<(), &str>(())
            }
        });
        assert!(
            AssertUnwindSafe(call).catch_unwind().await.is_err(),
            "the panic goes on its way"
        );
        assert_eq!(counts(&breaker), [0, failures, 0, 0, 0], "one failure for one panic");
    }
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test]
async fn a_call_whose_classifier_panics_is_one_failure() {
    let (breaker, clock) = breaker(|builder| builder.failure_threshold(1));
    trip_and_wait(&breaker, &clock);
    let classify = |_: &Result<(), &str>| -> Outcome { panic!("a bug in the classifier") };
    let call = breaker.call_with(classify, ready(Ok(())));
    assert!(AssertUnwindSafe(call).catch_unwind().await.is_err());
    assert_eq!(counts(&breaker), [0, 2, 0, 0, 0]);
    assert_eq!(breaker.status().probes_in_flight, 0, "the probe's slot is free");
}

#[test]
fn a_permit_dropped_by_a_panic_is_one_failure() {
    let (breaker, _clock) = breaker(|builder| builder);
    let panic = catch_unwind(|| {
        let _permit = admit(&breaker);
        panic!("in the middle of the call");
    });
    assert!(panic.is_err());
    assert_eq!(counts(&breaker), [0, 1, 0, 0, 0]);
    assert_eq!(breaker.status().failure_count, 1);
}

#[test]
fn a_permit_settled_before_a_panic_keeps_its_outcome() {
    let (breaker, _clock) = breaker(|builder| builder);
    let panic = catch_unwind(|| {
        admit(&breaker).settle(Outcome::Success);
        admit(&breaker).unused();
        panic!("after the calls");
    });
    assert!(panic.is_err());
    assert_eq!(counts(&breaker), [1, 0, 0, 0, 0]);
}

#[tokio::test]
async fn a_classifier_says_what_counts() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1));
    let classify = |result: &Result<u16, io::Error>| match result {
        Ok(500..) => Outcome::Failure,
        Ok(_) => Outcome::Success,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Outcome::Ignored,
        Err(_) => Outcome::Failure,
    };
    let not_found = Err(io::Error::from(io::ErrorKind::NotFound));
    assert!(breaker.call_with(classify, ready(not_found)).await.is_err());
    assert_eq!(counts(&breaker), [0, 0, 1, 0, 0], "an expected error says nothing");
    assert!(matches!(breaker.call_with(classify, ready(Ok(200))).await, Ok(200)));
    assert!(
        matches!(breaker.call_with(classify, ready(Ok(503))).await, Ok(503)),
        "the answer comes through"
    );
    assert_eq!(counts(&breaker), [1, 1, 1, 0, 0], "an answer may be a failure");
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test]
async fn a_classifier_may_say_when_to_come_back() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1).honor_retry_after(600 * SECOND));
    let classify = |_: &Result<(), &str>| Verdict::new(Outcome::Failure).retry_after(300 * SECOND);
    assert!(breaker.call_with(classify, ready(Err("busy"))).await.is_err());
    assert_eq!(breaker.status().retry_after, Some(300 * SECOND));
}

/// Calls through `breaker` with an error that is a rejection by another policy, in some wrapping.
async fn fail_with<E: 'static>(breaker: &CircuitBreaker, error: E) {
    assert!(breaker.call(ready(Err::<(), E>(error))).await.is_err());
}

#[tokio::test]
async fn a_rejection_by_another_policy_is_ignored_however_it_is_wrapped() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1));
    let rejected = || -> Rejected {
        let (inner, _clock) = crate::breaker(|builder| builder);
        inner.force_open();
        inner.try_acquire().expect_err("forced open")
    };
    fail_with(&breaker, rejected()).await;
    fail_with(&breaker, Box::new(rejected())).await;
    fail_with(&breaker, Arc::new(rejected())).await;
    fail_with::<BoxError>(&breaker, rejected().into()).await;
    fail_with::<BoxError>(&breaker, Box::new(Error::<io::Error>::from(rejected()))).await;
    fail_with(&breaker, io::Error::other(rejected())).await;
    fail_with(&breaker, Error::<BoxError>::Rejected(rejected())).await;
    fail_with(&breaker, Error::<BoxError>::Inner(rejected().into())).await;
    fail_with(&breaker, Error::<io::Error>::Rejected(rejected())).await;
    fail_with(&breaker, Error::<Rejected>::Inner(rejected())).await;
    assert_eq!(counts(&breaker), [0, 0, 10, 0, 0]);
    assert_eq!(
        breaker.state(),
        State::Closed,
        "a local refusal is not the service's failure"
    );
    fail_with::<BoxError>(&breaker, "down".into()).await;
    assert_eq!(breaker.state(), State::Open, "an error of the service is");
}

#[tokio::test]
async fn a_limiter_inside_a_breaker_does_not_open_it() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(1));
    let limiter = RateLimiter::builder("search", TokenBucket::new(1, SECOND))
        .clock(Clock::manual())
        .build()
        .expect("valid");
    let ask = || breaker.call(limiter.call(async { Ok::<_, io::Error>(()) }));
    assert!(ask().await.is_ok());
    for _ in 0..10 {
        let answer = ask().await;
        assert!(matches!(answer, Err(Error::Inner(Error::Rejected(_)))), "{answer:?}");
    }
    assert_eq!(counts(&breaker), [1, 0, 10, 0, 0]);
}
