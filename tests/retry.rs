//! The retry policy: when it retries a rejection, when it does not, and that every retry is paid for.
#![cfg(feature = "retry")]

use portcullis::{
    BoxError, CircuitBreaker, CircuitBreakerLayer, Clock, Error, ManualClock, Outcome, RateLimitLayer, RateLimiter,
    Reason, Rejected, SlidingWindow, TokenBucket,
    retry::{Again, RetryRejected},
};
use std::{
    convert::Infallible,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt,
    retry::{
        RetryLayer,
        budget::{Budget, TpsBudget},
    },
    service_fn,
};

const SECOND: Duration = Duration::from_secs(1);
const NANO: Duration = Duration::from_nanos(1);

fn budget(clock: impl Into<Clock>, retries: u32) -> RateLimiter {
    RateLimiter::builder("search", SlidingWindow::new(retries, Duration::from_secs(3600)))
        .limit("retries")
        .clock(clock)
        .build()
        .unwrap()
}

/// One call each second.
fn limiter(clock: impl Into<Clock>) -> RateLimiter {
    RateLimiter::builder("search", TokenBucket::new(1, SECOND))
        .clock(clock)
        .build()
        .unwrap()
}

fn open(clock: impl Into<Clock>) -> CircuitBreaker {
    let breaker = CircuitBreaker::builder("search")
        .failure_threshold(1)
        .recovery_timeout(SECOND)
        .clock(clock)
        .build()
        .unwrap();
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    breaker
}

async fn plus_one(question: u32) -> io::Result<u32> {
    Ok(question + 1)
}

fn reason(result: &Result<u32, BoxError>) -> Reason {
    let error = result.as_ref().unwrap_err();
    Rejected::find(&**error).expect("a rejection").reason
}

/// A service that always fails, and how often it was called.
fn failing() -> (
    impl Service<u32, Response = u32, Error = BoxError, Future: Send> + Clone + Send,
    Arc<AtomicUsize>,
) {
    let calls = Arc::<AtomicUsize>::default();
    let counted = calls.clone();
    let service = service_fn(move |_: u32| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { Err::<u32, BoxError>("down".into()) }
    });
    (service, calls)
}

// ---- Rejections ----------------------------------------------------------------------------------------------------------

#[test]
fn a_rejection_is_retried_when_its_time_has_come_and_not_a_nanosecond_earlier() {
    let clock = Clock::manual();
    let (limit, paid) = (limiter(&clock), budget(&clock, 9));
    limit.try_acquire().unwrap();
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(RetryRejected::new(paid.clone()).clock(&clock)))
        .layer(RateLimitLayer::new(limit.clone()))
        .service(service_fn(plus_one));
    let mut call = task::spawn(service.oneshot(1));
    assert_pending!(call.poll());
    clock.advance(SECOND.saturating_sub(NANO));
    assert!(!call.is_woken());
    assert_pending!(call.poll());
    clock.advance(NANO);
    assert!(call.is_woken());
    assert_eq!(assert_ready!(call.poll()).unwrap(), 2);
    assert_eq!(
        (limit.status().rejected.over_limit, paid.status().accepted_cost),
        (1, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_is_met_again_when_it_probes() {
    let breaker = open(Clock::system());
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(RetryRejected::new(budget(Clock::system(), 9))))
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(service_fn(plus_one));
    let begun = breaker.clock().now();
    assert_eq!(service.oneshot(1).await.unwrap(), 2);
    assert!(breaker.clock().now().duration_since(begun) >= SECOND);
    assert_eq!(breaker.status().metrics.rejected.open, 1, "one retry was enough");
}

#[test]
fn a_rejection_without_a_time_is_passed_on() {
    let clock = Clock::manual();
    let breaker = open(&clock);
    breaker.force_open();
    let paid = budget(&clock, 9);
    let policy = RetryRejected::new(paid.clone()).clock(&clock);
    let service = ServiceBuilder::new()
        // Not even if the closure would: it is not asked.
        .layer(RetryLayer::new(policy.retry_if(|_: &Result<u32, BoxError>| true)))
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(service_fn(plus_one));
    let result = assert_ready!(task::spawn(service.oneshot(1)).poll());
    assert_eq!(reason(&result), Reason::ForcedOpen);
    assert_eq!(breaker.status().metrics.rejected.forced_open, 1);
    assert_eq!(paid.status().accepted_cost, 0, "what is not retried costs nothing");
}

#[test]
fn a_rejection_that_would_wait_too_long_is_passed_on() {
    let clock = Clock::manual();
    let breaker = open(&clock);
    let paid = budget(&clock, 9);
    let service = |most: Duration| {
        let policy = RetryRejected::new(paid.clone()).clock(&clock).max_wait(most);
        ServiceBuilder::new()
            .layer(RetryLayer::new(policy))
            .layer(CircuitBreakerLayer::new(breaker.clone()))
            .service(service_fn(plus_one))
    };
    let result = assert_ready!(task::spawn(service(SECOND.saturating_sub(NANO)).oneshot(1)).poll());
    assert_eq!(reason(&result), Reason::Open);
    assert_eq!(paid.status().accepted_cost, 0);
    let mut call = task::spawn(service(SECOND).oneshot(1));
    assert_pending!(call.poll(), "exactly as long as it may be");
    clock.advance(SECOND);
    assert_ready!(call.poll()).unwrap();
}

#[test]
fn no_request_is_retried_more_often_than_it_may_be() {
    let clock = Clock::manual();
    let limit = limiter(&clock);
    for most in [0_u32, 1, 2] {
        let rejected_before = limit.status().rejected.over_limit;
        limit.try_acquire().unwrap();
        let policy = RetryRejected::new(budget(&clock, 9)).clock(&clock).max_retries(most);
        let service = ServiceBuilder::new()
            .layer(RetryLayer::new(policy))
            .layer(RateLimitLayer::new(limit.clone()))
            .service(service_fn(plus_one));
        let mut call = task::spawn(service.oneshot(1));
        for _ in 0..most {
            assert_pending!(call.poll());
            clock.advance(SECOND);
            limit.try_acquire().unwrap(); // somebody else is always faster
        }
        let result = assert_ready!(call.poll());
        assert_eq!(reason(&result), Reason::OverLimit);
        let rejected = limit.status().rejected.over_limit - rejected_before;
        assert_eq!(rejected, u64::from(most) + 1, "{most} retries");
        clock.advance(SECOND);
    }
}

#[test]
fn a_request_is_cloned_for_each_attempt_but_the_last() {
    #[derive(Debug)]
    struct Counted(Arc<AtomicUsize>);
    impl Clone for Counted {
        fn clone(&self) -> Self {
            self.0.fetch_add(1, Ordering::SeqCst);
            Self(self.0.clone())
        }
    }
    let clock = Clock::manual();
    for most in [0_u32, 1, 3] {
        let (clones, attempts) = (Arc::<AtomicUsize>::default(), AtomicUsize::new(0));
        let policy = RetryRejected::new(budget(&clock, 9))
            .clock(&clock)
            .max_retries(most)
            .backoff(Duration::ZERO)
            .retry_if(|_: &Result<(), BoxError>| true);
        let service = RetryLayer::new(policy).layer(service_fn(|_: Counted| {
            attempts.fetch_add(1, Ordering::SeqCst);
            async { Err::<(), BoxError>("down".into()) }
        }));
        assert_ready!(task::spawn(service.oneshot(Counted(clones.clone()))).poll()).unwrap_err();
        let most = usize::try_from(most).unwrap();
        assert_eq!(
            (attempts.load(Ordering::SeqCst), clones.load(Ordering::SeqCst)),
            (most + 1, most)
        );
    }
}

#[test]
fn a_crowd_before_an_open_circuit_retries_no_more_than_its_budget() {
    let clock = Clock::manual();
    let breaker = open(&clock);
    let paid = budget(&clock, 7);
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(RetryRejected::new(paid.clone()).clock(&clock)))
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(service_fn(plus_one));
    let mut calls: Vec<_> = (0..100)
        .map(|question| task::spawn(service.clone().oneshot(question)))
        .collect();
    let waiting: usize = calls.iter_mut().map(|call| usize::from(call.poll().is_pending())).sum();
    assert_eq!(waiting, 7);
    assert_eq!(breaker.status().metrics.rejected.open, 100);
    assert_eq!(
        (paid.status().accepted_cost, paid.status().rejected.over_limit),
        (7, 93)
    );
}

#[test]
fn the_clones_of_a_policy_share_its_budget() {
    let clock = Clock::manual();
    let breaker = open(&clock);
    let policy = RetryRejected::new(budget(&clock, 1)).clock(&clock);
    let mut calls = [policy.clone(), policy].map(|policy| {
        let inner = CircuitBreakerLayer::new(breaker.clone()).layer(service_fn(plus_one));
        task::spawn(RetryLayer::new(policy).layer(inner).oneshot(1))
    });
    let pending = calls.each_mut().map(|call| call.poll().is_pending());
    assert_eq!(pending, [true, false]);
}

#[test]
fn a_call_that_is_dropped_while_it_waits_is_not_made_again() {
    let clock = Clock::manual();
    let breaker = open(&clock);
    let calls = AtomicUsize::new(0);
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(RetryRejected::new(budget(&clock, 9)).clock(&clock)))
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(service_fn(|question: u32| {
            calls.fetch_add(1, Ordering::SeqCst);
            plus_one(question)
        }));
    let mut call = task::spawn(service.oneshot(1));
    assert_pending!(call.poll());
    drop(call);
    clock.advance(SECOND);
    assert_eq!(
        (calls.load(Ordering::SeqCst), breaker.status().probes_in_flight),
        (0, 0)
    );
}

#[test]
fn rejections_are_found_in_other_error_types_and_foreign_errors_are_not_touched() {
    fn retried<E: 'static>(clock: &ManualClock, error: impl Fn(Rejected) -> E + Clone) -> bool {
        let why = open(clock).try_acquire().unwrap_err();
        let service = service_fn(move |_: u32| {
            let error = error(why.clone());
            async move { Err::<u32, E>(error) }
        });
        let policy = RetryRejected::new(budget(clock, 9)).clock(clock);
        let mut call = task::spawn(RetryLayer::new(policy).layer(service).oneshot(1));
        call.poll().is_pending()
    }
    let clock = Clock::manual();
    assert!(retried(&clock, |why| why));
    assert!(retried(&clock, io::Error::other));
    assert!(retried(&clock, |why| BoxError::from(io::Error::other(why))));
    assert!(retried(&clock, Error::<io::Error>::Rejected));
    assert!(!retried(&clock, |_| io::Error::other("down")));
    assert!(!retried(&clock, |_| "down"));
}

// ---- What a closure says -------------------------------------------------------------------------------------------------

#[test]
fn a_closure_has_more_retried_after_waits_that_double_under_the_same_budget_and_number() {
    let clock = Clock::manual();
    let (service, calls) = failing();
    let paid = budget(&clock, 5);
    let policy = RetryRejected::new(paid.clone())
        .clock(&clock)
        .max_retries(4)
        .backoff(SECOND)
        .max_wait(SECOND * 3)
        .retry_if(|result: &Result<u32, BoxError>| result.is_err());
    let service = RetryLayer::new(policy).layer(service);
    let mut call = task::spawn(service.clone().oneshot(1));
    for (retry, whole) in [SECOND, SECOND * 2, SECOND * 3, SECOND * 3].into_iter().enumerate() {
        assert_pending!(call.poll());
        assert_eq!(calls.load(Ordering::SeqCst), retry + 1);
        clock.advance((whole / 2).saturating_sub(NANO));
        assert!(!call.is_woken(), "retry {retry}: never less than half of {whole:?}");
        clock.advance(whole / 2 + NANO);
        assert!(call.is_woken(), "retry {retry}: never more than {whole:?}");
    }
    assert_ready!(call.poll()).unwrap_err();
    assert_eq!((calls.load(Ordering::SeqCst), paid.status().accepted_cost), (5, 4));

    let mut call = task::spawn(service.oneshot(1));
    assert_pending!(call.poll());
    clock.advance(SECOND);
    assert_ready!(call.poll()).unwrap_err();
    assert_eq!(paid.status().accepted_cost, 5, "one was left");
}

#[test]
fn waits_without_a_time_are_shortened_at_random() {
    let clock = Clock::manual();
    let (service, _) = failing();
    let policy = RetryRejected::new(budget(&clock, 64))
        .clock(&clock)
        .backoff(SECOND)
        .retry_if(|_: &Result<u32, BoxError>| true);
    let service = RetryLayer::new(policy).layer(service);
    let mut calls: Vec<_> = (0..64).map(|n| task::spawn(service.clone().oneshot(n))).collect();
    for call in &mut calls {
        assert_pending!(call.poll());
    }
    clock.advance(SECOND * 3 / 4);
    let woken = calls.iter().filter(|call| call.is_woken()).count();
    // Each by the toss of a coin: that all fall alike happens once in 2^63 runs.
    assert!((1..64).contains(&woken), "{woken} of 64 at three quarters of the wait");
}

#[tokio::test(start_paused = true)]
async fn a_wait_beyond_the_reach_of_the_timer_lasts_as_long_as_it_was_told() {
    let days = Duration::from_secs(86_400) * 1_000;
    let (service, calls) = failing();
    let policy = RetryRejected::new(budget(Clock::system(), 9))
        .max_retries(1)
        .max_wait(days)
        .retry_if(move |_: &Result<u32, BoxError>| Some(days));
    let clock = Clock::system();
    let begun = clock.now();
    RetryLayer::new(policy).layer(service).oneshot(1).await.unwrap_err();
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    assert!(clock.now().duration_since(begun) >= days);
}

#[test]
fn a_closure_may_say_how_long_to_wait() {
    let clock = Clock::manual();
    let (service, calls) = failing();
    let policy = RetryRejected::new(budget(&clock, 9))
        .clock(&clock)
        .max_retries(1)
        .max_wait(SECOND);
    let after = |wait: Option<Duration>| {
        let policy = policy.clone().retry_if(move |_: &Result<u32, BoxError>| wait);
        task::spawn(RetryLayer::new(policy).layer(service.clone()).oneshot(1))
    };
    assert_ready!(after(None).poll()).unwrap_err();
    assert_ready!(after(Some(SECOND + NANO)).poll()).unwrap_err();
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    let mut call = after(Some(SECOND));
    assert_pending!(call.poll());
    clock.advance(SECOND);
    assert_ready!(call.poll()).unwrap_err();
    assert_ready!(after(Some(Duration::ZERO)).poll()).unwrap_err();
    assert_eq!(
        calls.load(Ordering::SeqCst),
        6,
        "two with a wait of a second, two with none"
    );
}

#[test]
fn extreme_waits_do_not_overflow() {
    let clock = Clock::manual();
    let (service, calls) = failing();
    let policy = RetryRejected::new(budget(&clock, 200))
        .clock(&clock)
        .max_retries(u32::MAX)
        .max_wait(Duration::MAX)
        .backoff(Duration::MAX);
    let mut call = task::spawn(
        RetryLayer::new(policy.clone().retry_if(|_: &Result<u32, BoxError>| Again::Backoff))
            .layer(service.clone())
            .oneshot(1),
    );
    assert_pending!(call.poll());
    let mut call = task::spawn(
        RetryLayer::new(policy.retry_if(|_: &Result<u32, BoxError>| Again::After(Duration::MAX)))
            .layer(service)
            .oneshot(1),
    );
    assert_pending!(call.poll());
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

#[cfg(feature = "http")]
#[test]
fn a_rejection_that_a_response_carries_is_retried_as_it_says() {
    use http::{Response, StatusCode};
    let clock = Clock::manual();
    let limit = limiter(&clock);
    limit.try_acquire().unwrap();
    let answer = async |_: u32, why: Rejected| {
        let mut response = Response::new(String::new());
        *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        response.extensions_mut().insert(why);
        Ok(response)
    };
    let policy = RetryRejected::new(budget(&clock, 9)).clock(&clock).retry_if(
        |result: &Result<Response<String>, Infallible>| {
            let why = result.as_ref().ok().and_then(|response| response.extensions().get());
            why.map_or(Again::No, |why: &Rejected| why.into())
        },
    );
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(policy))
        .layer(RateLimitLayer::new(limit).fallback_with(answer))
        .service(service_fn(async |question: u32| {
            Ok(Response::new(question.to_string()))
        }));
    let mut call = task::spawn(service.oneshot(1));
    assert_pending!(call.poll());
    clock.advance(SECOND);
    assert_eq!(assert_ready!(call.poll()).unwrap().status(), StatusCode::OK);
}

// ---- Budgets ---------------------------------------------------------------------------------------------------------------

#[derive(Debug, Default)]
struct Purse {
    deposits: AtomicUsize,
    left: AtomicUsize,
}

impl Budget for &'static Purse {
    fn deposit(&self) {
        self.deposits.fetch_add(1, Ordering::SeqCst);
    }
    fn withdraw(&self) -> bool {
        let take = |left: usize| left.checked_sub(1);
        self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }
}

#[test]
fn a_budget_of_ones_own_is_paid_into_by_what_succeeds_and_out_of_by_retries() {
    static PURSE: Purse = Purse {
        deposits: AtomicUsize::new(0),
        left: AtomicUsize::new(1),
    };
    let clock = Clock::manual();
    let breaker = open(&clock);
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(RetryRejected::new(&PURSE).clock(&clock)))
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(service_fn(plus_one));
    let mut paid = task::spawn(service.clone().oneshot(1));
    assert_pending!(paid.poll());
    let unpaid = assert_ready!(task::spawn(service.clone().oneshot(1)).poll());
    assert_eq!(reason(&unpaid), Reason::Open);
    assert_eq!(PURSE.deposits.load(Ordering::SeqCst), 0, "a rejection pays for nothing");
    clock.advance(SECOND);
    assert_ready!(paid.poll()).unwrap();
    assert_ready!(task::spawn(service.oneshot(1)).poll()).unwrap();
    assert_eq!(PURSE.deposits.load(Ordering::SeqCst), 2);
}

#[test]
fn neither_a_failure_nor_a_success_that_is_retried_is_paid_in() {
    static PURSE: Purse = Purse {
        deposits: AtomicUsize::new(0),
        left: AtomicUsize::new(1),
    };
    let clock = Clock::manual();
    let policy = RetryRejected::new(&PURSE).clock(&clock).backoff(Duration::ZERO);
    let (down, calls) = failing();
    assert_ready!(task::spawn(RetryLayer::new(policy.clone()).layer(down).oneshot(1)).poll()).unwrap_err();
    assert_eq!(
        (calls.load(Ordering::SeqCst), PURSE.deposits.load(Ordering::SeqCst)),
        (1, 0)
    );

    let unfinished = policy.retry_if(|result: &io::Result<u32>| result.as_ref().is_ok_and(|answer| *answer == 2));
    let service = RetryLayer::new(unfinished).layer(service_fn(plus_one));
    assert_eq!(assert_ready!(task::spawn(service.oneshot(1)).poll()).unwrap(), 2);
    assert_eq!(PURSE.left.load(Ordering::SeqCst), 0, "retried once");
    assert_eq!(PURSE.deposits.load(Ordering::SeqCst), 0);
}

/// A service behind the breaker that answers a rejection with a response, and a policy that finds it there.
fn answering<B: Budget>(
    breaker: &CircuitBreaker,
    policy: RetryRejected<B>,
) -> impl Service<u32, Response = Result<u32, Rejected>, Error = Infallible> + Clone {
    let policy = policy.retry_if(|result: &Result<Result<u32, Rejected>, Infallible>| match result {
        Ok(Err(why)) => Again::from(why),
        _ => Again::No,
    });
    ServiceBuilder::new()
        .layer(RetryLayer::new(policy))
        .layer(CircuitBreakerLayer::new(breaker.clone()).fallback_with(async |_, why| Ok(Err(why))))
        .service(service_fn(async |question: u32| Ok(Ok(question + 1))))
}

#[test]
fn a_rejection_in_a_response_that_is_not_retried_is_paid_neither_in_nor_out() {
    static PURSE: Purse = Purse {
        deposits: AtomicUsize::new(0),
        left: AtomicUsize::new(5),
    };
    let purse = || (PURSE.deposits.load(Ordering::SeqCst), PURSE.left.load(Ordering::SeqCst));
    let clock = Clock::manual();
    let breaker = open(&clock);
    let service = answering(&breaker, RetryRejected::new(&PURSE).clock(&clock));
    let mut retried = task::spawn(service.clone().oneshot(1));
    assert_pending!(retried.poll(), "it tells a time");
    assert_eq!(purse(), (0, 4));
    breaker.force_open();
    let Ok(Err(why)) = assert_ready!(task::spawn(service.clone().oneshot(1)).poll()) else {
        panic!("it was called")
    };
    assert_eq!(why.reason, Reason::ForcedOpen);
    assert_eq!(purse(), (0, 4), "no time to wait for, and no success");
    breaker.reset();
    assert_ready!(task::spawn(service.oneshot(1)).poll()).unwrap().unwrap();
    assert_eq!(purse(), (1, 4));
}

#[tokio::test(start_paused = true)]
async fn forced_open_circuits_do_not_fill_the_budget_of_tower() {
    let breaker = open(Clock::system());
    // One retry for each success, and none besides.
    let budget = TpsBudget::new(SECOND * 10, 0, 1.0);
    let service = answering(&breaker, RetryRejected::new(budget));
    breaker.force_open();
    for _ in 0..100 {
        service.clone().oneshot(1).await.unwrap().unwrap_err();
    }
    breaker.reset();
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    let why = service.clone().oneshot(1).await.unwrap().unwrap_err();
    assert_eq!(why.reason, Reason::Open, "nothing has been paid in for a retry");
    breaker.reset();
    service.clone().oneshot(1).await.unwrap().unwrap();
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    assert_eq!(service.oneshot(1).await.unwrap().unwrap(), 2, "one success, one retry");
}

#[tokio::test(start_paused = true)]
async fn the_budget_of_tower_is_one() {
    let breaker = open(Clock::system());
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(RetryRejected::new(TpsBudget::default())))
        .layer(CircuitBreakerLayer::new(breaker))
        .service(service_fn(plus_one));
    assert_eq!(service.oneshot(1).await.unwrap(), 2);
}
