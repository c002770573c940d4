//! What the guard promises to tower: whom it asks, whom it calls, what it holds, and what every way to end a call counts as.
#![expect(clippy::float_cmp, reason = "tokens are taken and given back whole")]

use axum::{
    body::Body,
    http::{Request, Response, StatusCode},
};
use futures_util::FutureExt;
use portcullis::{
    Adaptive, Algorithm, BoxError, CircuitBreaker, CircuitBreakerLayer, Clock, EventKind, Guard, GuardLayer,
    KeyedRateLimiter, ManualClock, Outcome, RateLimitLayer, RateLimiter, Reason, Rejected, SlidingWindow, State,
    TokenBucket, Verdict, policy::Waiting,
};
use std::{
    error::Error as StdError,
    fmt,
    future::{Future, pending},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio_test::task;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_http::catch_panic::CatchPanicLayer;
use tower_test::mock;

const OPEN: Duration = Duration::from_secs(10);

// ---- The parts: a service that knows tower's contract, breakers in each state, what was counted --------------------------

/// An error of the guarded service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Down(&'static str);

impl fmt::Display for Down {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl StdError for Down {}

/// What all instances of an inner service share.
#[derive(Default)]
struct World {
    pending: AtomicBool,
    failing: AtomicBool,
    polls: AtomicUsize,
    calls: AtomicUsize,
}

impl World {
    fn set_pending(&self, pending: bool) {
        self.pending.store(pending, Ordering::SeqCst);
    }

    fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::SeqCst);
    }

    fn polls(&self) -> usize {
        self.polls.load(Ordering::SeqCst)
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

/// A service of which each instance must be readied before each call.
struct Inner<F> {
    world: Arc<World>,
    ready: bool,
    answer: F,
}

impl<F> Inner<F> {
    fn new(world: &Arc<World>, answer: F) -> Self {
        Self {
            world: world.clone(),
            ready: false,
            answer,
        }
    }
}

impl<F: Clone> Clone for Inner<F> {
    fn clone(&self) -> Self {
        Self::new(&self.world, self.answer.clone())
    }
}

impl<F, Fut, T> Service<u32> for Inner<F>
where
    F: Fn(u32) -> Fut,
    Fut: Future<Output = Result<T, Down>>,
{
    type Response = T;
    type Error = Down;
    type Future = Fut;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Down>> {
        self.world.polls.fetch_add(1, Ordering::SeqCst);
        if self.world.failing.load(Ordering::SeqCst) {
            return Poll::Ready(Err(Down("not ready")));
        }
        if self.world.pending.load(Ordering::SeqCst) {
            return Poll::Pending;
        }
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: u32) -> Fut {
        assert!(
            std::mem::take(&mut self.ready),
            "an instance was called that was not readied"
        );
        self.world.calls.fetch_add(1, Ordering::SeqCst);
        (self.answer)(request)
    }
}

fn echo(world: &Arc<World>) -> Inner<impl Fn(u32) -> std::future::Ready<Result<u32, Down>> + Clone + use<>> {
    Inner::new(world, |request| std::future::ready(Ok(request)))
}

fn hanging(world: &Arc<World>) -> Inner<impl Fn(u32) -> std::future::Pending<Result<u32, Down>> + Clone + use<>> {
    Inner::new(world, |_| pending())
}

fn failing(world: &Arc<World>) -> Inner<impl Fn(u32) -> std::future::Ready<Result<u32, Down>> + Clone + use<>> {
    Inner::new(world, |_| std::future::ready(Err(Down("called"))))
}

async fn broken(_: u32) -> Result<u32, Down> {
    panic!("in poll")
}

fn poll_ready<S: Service<u32>>(service: &mut S) -> Poll<Result<(), S::Error>> {
    service.poll_ready(&mut Context::from_waker(Waker::noop()))
}

/// A closed breaker: one failure opens it for ten seconds, then one probe decides.
fn closed(clock: &ManualClock) -> CircuitBreaker {
    CircuitBreaker::builder("search")
        .clock(clock)
        .failure_threshold(1)
        .recovery_timeout(OPEN)
        .half_open_max_calls(1)
        .success_threshold(1)
        .build()
        .unwrap()
}

/// The same, tripped: it has counted one failure.
fn open(clock: &ManualClock) -> CircuitBreaker {
    let breaker = closed(clock);
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
    breaker
}

/// The same, its open time over.
fn half_open(clock: &ManualClock) -> CircuitBreaker {
    let breaker = open(clock);
    clock.advance(OPEN);
    assert_eq!(breaker.state(), State::HalfOpen);
    breaker
}

/// `burst` at once, then one in a minute.
fn bucket(clock: &ManualClock, burst: u32) -> RateLimiter {
    RateLimiter::builder("search", TokenBucket::new(1, Duration::from_secs(60)).burst(burst))
        .clock(clock)
        .build()
        .unwrap()
}

fn available(limiter: &RateLimiter) -> f64 {
    limiter.status().available_tokens
}

fn probes(breaker: &CircuitBreaker) -> usize {
    breaker.status().probes_in_flight
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    successful: u64,
    failed: u64,
    ignored: u64,
    cancelled: u64,
    rejected: u64,
}

fn counted(breaker: &CircuitBreaker) -> Counted {
    let metrics = breaker.status().metrics;
    Counted {
        successful: metrics.successful_requests,
        failed: metrics.failed_requests,
        ignored: metrics.ignored_requests,
        cancelled: metrics.cancelled_requests,
        rejected: metrics.rejected_requests,
    }
}

fn one_failure() -> Counted {
    Counted {
        failed: 1,
        ..Counted::default()
    }
}

/// The rejection in the error of a call that was not made.
fn rejection<T: fmt::Debug>(result: Result<T, BoxError>) -> Rejected {
    let error = result.expect_err("the call was to be rejected");
    Rejected::find(&*error)
        .expect("the error was to be a rejection")
        .clone()
}

// ---- Readiness ---------------------------------------------------------------------------------------------------------------

#[test]
fn an_open_breaker_answers_although_the_inner_service_is_not_ready() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    world.set_pending(true);
    let mut guard = CircuitBreakerLayer::new(breaker).layer(echo(&world));

    for _ in 0..3 {
        assert!(poll_ready(&mut guard).is_ready(), "an open breaker is ready to reject");
        let why = rejection(guard.call(1).now_or_never().expect("at once"));
        assert_eq!((why.reason, why.retry_after), (Reason::Open, Some(OPEN)));
    }
    assert_eq!(
        (world.polls(), world.calls()),
        (0, 0),
        "the inner service is left alone"
    );
}

#[test]
fn a_mock_behind_an_open_breaker_sees_neither_poll_nor_request() {
    let clock = Clock::manual();
    let (mut guard, mut handle) = mock::spawn_layer::<u32, u32, _>(CircuitBreakerLayer::new(open(&clock)));
    handle.allow(0);
    handle.send_error("would be taken by the first poll");

    tokio_test::assert_ready_ok!(guard.poll_ready(), "the inner service is not polled");
    assert_eq!(rejection(guard.call(1).now_or_never().unwrap()).reason, Reason::Open);
    tokio_test::assert_pending!(handle.poll_request(), "nothing was sent");
}

#[test]
fn a_guard_waits_for_its_inner_service_and_is_woken_by_it() {
    let clock = Clock::manual();
    let (mut guard, mut handle) = mock::spawn_layer::<u32, u32, _>(CircuitBreakerLayer::new(closed(&clock)));
    handle.allow(0);
    tokio_test::assert_pending!(guard.poll_ready());
    handle.allow(1);
    assert!(guard.is_woken(), "the inner service's waker is the caller's");
    tokio_test::assert_ready_ok!(guard.poll_ready());

    let mut response = task::spawn(guard.call(7));
    let (request, answer) = handle.next_request().now_or_never().unwrap().unwrap();
    assert_eq!(request, 7);
    tokio_test::assert_pending!(response.poll());
    answer.send_response(8);
    assert!(response.is_woken());
    assert_eq!(tokio_test::assert_ready_ok!(response.poll()), 8);
}

#[test]
fn the_readied_instance_is_the_one_called() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let layer = GuardLayer::new((bucket(&clock, 100), closed(&clock)));
    let mut guard = layer.layer(echo(&world));
    for round in 0..10 {
        assert!(poll_ready(&mut guard).is_ready());
        // What middleware does that must move the service into a future: the clone stays, the readied one goes.
        let clone = guard.clone();
        let mut readied = std::mem::replace(&mut guard, clone);
        assert_eq!(readied.call(round).now_or_never().unwrap().unwrap(), round);
    }
    assert_eq!(world.calls(), 10);
}

#[test]
fn a_waiting_call_owns_the_instance_that_was_readied() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let layer = RateLimitLayer::new(bucket(&clock, 1)).wait(Duration::from_secs(300));
    let mut guard = layer.layer(echo(&world));
    let mut calls: Vec<_> = (0..3)
        .map(|request| {
            assert!(poll_ready(&mut guard).is_ready());
            task::spawn(guard.call(request))
        })
        .collect();
    // Readied again and never called: it must not be the one that the waits take.
    assert!(poll_ready(&mut guard).is_ready());

    for call in &mut calls {
        if call.poll().is_pending() {
            clock.advance(Duration::from_secs(60));
            assert!(call.is_woken());
            tokio_test::assert_ready_ok!(call.poll(), "the call uses the instance readied for it");
        }
    }
    assert_eq!(world.calls(), 3);
}

#[test]
fn a_clone_of_a_readied_guard_is_not_ready_and_holds_no_slot() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    assert_eq!(probes(&breaker), 1, "the readied guard holds the slot");

    let mut clone = guard.clone();
    drop(clone.clone());
    assert_eq!(probes(&breaker), 1, "a clone neither takes nor frees one");
    assert!(poll_ready(&mut clone).is_ready());
    assert_eq!(
        rejection(clone.call(1).now_or_never().unwrap()).reason,
        Reason::HalfOpenFull
    );
    assert_eq!(guard.call(2).now_or_never().unwrap().unwrap(), 2);
    assert_eq!((breaker.state(), probes(&breaker)), (State::Closed, 0));
}

#[test]
fn a_clone_of_a_readied_guard_calls_an_instance_of_its_own_only_once_readied() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let mut guard = CircuitBreakerLayer::new(closed(&clock)).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    let mut clone = guard.clone();
    let unready = catch_unwind(AssertUnwindSafe(|| drop(clone.call(1))));
    assert!(
        unready.is_err(),
        "the clone's inner service was never readied, and says so"
    );
}

#[test]
fn a_readied_guard_that_is_dropped_leaks_nothing() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    let limiter = bucket(&clock, 5);
    let layer = GuardLayer::new((limiter.clone(), breaker.clone()));
    for _ in 0..100 {
        let mut guard = layer.layer(echo(&world));
        assert!(poll_ready(&mut guard).is_ready());
        assert_eq!(probes(&breaker), 1);
    }
    assert_eq!(
        world.polls(),
        100,
        "every one of them got the slot that the one before gave back"
    );
    assert_eq!((probes(&breaker), counted(&breaker)), (0, one_failure()));
    assert_eq!((available(&limiter), limiter.status().accepted_requests), (5.0, 0));
}

#[test]
fn however_often_poll_ready_runs_one_slot_is_held_and_one_rejection_counted() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let (mut first, mut second) = (layer.layer(echo(&world)), layer.layer(echo(&world)));
    for _ in 0..10 {
        assert!(poll_ready(&mut first).is_ready());
        assert!(poll_ready(&mut second).is_ready());
        assert_eq!(probes(&breaker), 1);
    }
    assert_eq!(counted(&breaker), one_failure(), "asking is not calling");
    assert_eq!(
        rejection(second.call(1).now_or_never().unwrap()).reason,
        Reason::HalfOpenFull
    );
    assert_eq!(breaker.status().metrics.rejected.half_open_full, 1);
    assert_eq!(counted(&breaker).rejected, 1);
}

#[test]
fn every_rejected_call_is_counted_once_and_told_once_to_listeners() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    let mut events = breaker.subscribe(100);
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    for polls in 0..5 {
        for _ in 0..polls {
            assert!(poll_ready(&mut guard).is_ready());
        }
        rejection(guard.call(1).now_or_never().unwrap());
    }
    assert_eq!(counted(&breaker).rejected, 5);
    let told = std::iter::from_fn(|| events.try_recv()).filter(|event| matches!(event.kind, EventKind::Rejected(_)));
    assert_eq!(told.count(), 5);

    assert!(poll_ready(&mut guard).is_ready());
    drop(guard);
    assert_eq!(
        counted(&breaker).rejected,
        5,
        "a guard readied to reject and dropped rejected nobody"
    );
}

#[test]
fn while_a_probe_waits_for_a_service_that_is_never_ready_all_others_are_rejected_at_once() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    world.set_pending(true);
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let mut prober = layer.layer(echo(&world));
    assert!(poll_ready(&mut prober).is_pending());
    let polls = world.polls();

    for _ in 0..20 {
        let why = rejection(
            layer
                .layer(echo(&world))
                .oneshot(1)
                .now_or_never()
                .expect("rejected at once"),
        );
        assert_eq!((why.reason, why.retry_after), (Reason::HalfOpenFull, Some(OPEN)));
    }
    assert_eq!(world.polls(), polls, "only the prober asks the inner service");

    drop(prober);
    assert_eq!(probes(&breaker), 0);
    world.set_pending(false);
    assert_eq!(layer.layer(echo(&world)).oneshot(1).now_or_never().unwrap().unwrap(), 1);
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn a_slot_whose_lease_ends_goes_to_the_next_guard_and_the_first_is_refused_when_it_asks_again() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    world.set_pending(true);
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let (mut first, mut second) = (layer.layer(echo(&world)), layer.layer(echo(&world)));
    assert!(poll_ready(&mut first).is_pending());
    clock.advance(OPEN);
    assert_eq!(probes(&breaker), 0, "the lease is over");

    assert!(poll_ready(&mut second).is_pending(), "the slot is free for the next");
    assert!(poll_ready(&mut first).is_ready(), "the first has lost it");
    assert_eq!(
        rejection(first.call(1).now_or_never().unwrap()).reason,
        Reason::HalfOpenFull
    );
    assert_eq!(probes(&breaker), 1);
    drop(first);
    assert_eq!(
        probes(&breaker),
        1,
        "what the first no longer holds it cannot give back"
    );

    world.set_pending(false);
    assert!(poll_ready(&mut second).is_ready());
    assert_eq!(second.call(2).now_or_never().unwrap().unwrap(), 2);
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn asking_again_does_not_lengthen_a_lease() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    world.set_pending(true);
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let (mut first, mut second) = (layer.layer(echo(&world)), layer.layer(echo(&world)));
    for _ in 0..10 {
        assert!(poll_ready(&mut first).is_pending());
        clock.advance(OPEN / 10);
    }
    assert!(poll_ready(&mut second).is_pending(), "the slot is the second's now");
    assert!(poll_ready(&mut first).is_ready(), "ready to reject");
}

#[test]
fn a_guard_called_after_its_lease_ended_takes_a_free_slot_or_is_rejected() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let (mut first, mut second) = (layer.layer(hanging(&world)), layer.layer(hanging(&world)));
    assert!(poll_ready(&mut first).is_ready());
    clock.advance(OPEN);
    let running = first.call(1);
    assert_eq!(
        (probes(&breaker), world.calls()),
        (1, 1),
        "the slot was free to take again"
    );

    clock.advance(OPEN);
    assert!(poll_ready(&mut second).is_ready());
    clock.advance(OPEN);
    let mut third = layer.layer(hanging(&world));
    assert!(poll_ready(&mut third).is_ready());
    assert_eq!(
        rejection(second.call(1).now_or_never().unwrap()).reason,
        Reason::HalfOpenFull
    );
    assert_eq!((probes(&breaker), world.calls()), (1, 1));
    drop((running, third));
    assert_eq!(probes(&breaker), 0);
}

#[test]
fn a_circuit_that_opens_between_ready_and_call_rejects_the_call() {
    let clock = Clock::manual();
    let (breaker, world) = (closed(&clock), Arc::new(World::default()));
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    assert_eq!(rejection(guard.call(1).now_or_never().unwrap()).reason, Reason::Open);
    assert_eq!((world.calls(), counted(&breaker).rejected), (0, 1));
}

#[test]
fn a_probe_that_was_reserved_before_the_circuit_opened_again_is_rejected_and_gives_its_slot_back() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    let config = breaker.config().half_open_max_calls(2).probe_lease(OPEN * 10);
    breaker.reconfigure(config).unwrap();
    clock.advance(OPEN);
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let (mut called, mut asked) = (layer.layer(echo(&world)), layer.layer(echo(&world)));
    assert!(poll_ready(&mut called).is_ready());
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    assert_eq!((breaker.state(), probes(&breaker)), (State::Open, 1));
    let why = rejection(called.call(1).now_or_never().unwrap());
    assert_eq!((why.reason, why.retry_after), (Reason::Open, Some(OPEN)));
    assert_eq!((world.calls(), probes(&breaker)), (0, 0));

    clock.advance(OPEN);
    assert!(poll_ready(&mut asked).is_ready());
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    assert!(poll_ready(&mut asked).is_ready(), "ready to reject");
    assert_eq!(probes(&breaker), 0, "and it holds nothing");
    assert_eq!(rejection(asked.call(1).now_or_never().unwrap()).reason, Reason::Open);
    assert_eq!(world.calls(), 0);
}

#[test]
fn the_time_that_a_readied_guard_waits_for_its_call_does_not_make_the_call_slow() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    let second = Duration::from_secs(1);
    breaker.reconfigure(breaker.config().slow_calls(1.0, second)).unwrap();
    clock.advance(OPEN);
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    clock.advance(second);
    assert_eq!(guard.call(1).now_or_never().unwrap().unwrap(), 1);
    assert_eq!(
        (breaker.state(), breaker.status().metrics.slow_requests),
        (State::Closed, 0)
    );
}

#[test]
fn a_circuit_that_closes_between_ready_and_call_admits_the_call() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    breaker.reset();
    assert_eq!(guard.call(1).now_or_never().unwrap().unwrap(), 1);
    assert_eq!((counted(&breaker).successful, probes(&breaker)), (1, 0));
}

#[test]
fn a_service_readied_as_refused_tells_the_rejection_as_it_is_when_called() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    clock.advance(Duration::from_secs(4));
    let why = rejection(guard.call(1).now_or_never().unwrap());
    assert_eq!(
        why.retry_after,
        Some(Duration::from_secs(6)),
        "four seconds have passed since"
    );

    assert!(poll_ready(&mut guard).is_ready());
    breaker.force_open();
    let why = rejection(guard.call(1).now_or_never().unwrap());
    assert_eq!(
        (why.reason, why.retry_after),
        (Reason::ForcedOpen, None),
        "forced meanwhile"
    );
}

#[test]
fn a_service_readied_as_refused_is_rejected_even_if_the_circuit_admits_again_and_takes_no_slot() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    clock.advance(OPEN);
    let why = rejection(guard.call(1).now_or_never().unwrap());
    assert_eq!(why.retry_after, Some(Duration::ZERO), "the next call would be admitted");
    assert_eq!(
        (world.polls(), world.calls()),
        (0, 0),
        "its inner service was never readied"
    );
    assert_eq!(probes(&breaker), 0);

    assert!(poll_ready(&mut guard).is_ready(), "readied again, it gets the slot");
    assert_eq!(guard.call(2).now_or_never().unwrap().unwrap(), 2);
}

#[test]
fn a_service_readied_as_refused_tells_what_it_was_refused_for_once_that_is_over() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let (mut prober, mut other) = (layer.layer(echo(&world)), layer.layer(echo(&world)));
    assert!(poll_ready(&mut prober).is_ready());
    assert!(poll_ready(&mut other).is_ready());
    drop(prober);
    let why = rejection(other.call(1).now_or_never().unwrap());
    assert_eq!(
        (why.reason, why.retry_after),
        (Reason::HalfOpenFull, Some(Duration::ZERO))
    );
    assert_eq!(
        (breaker.status().metrics.rejected.half_open_full, probes(&breaker)),
        (1, 0)
    );

    breaker.force_open();
    assert!(poll_ready(&mut other).is_ready());
    breaker.reset();
    let why = rejection(other.call(1).now_or_never().unwrap());
    assert_eq!((why.reason, why.retry_after), (Reason::ForcedOpen, None));
    assert_eq!(breaker.status().metrics.rejected.forced_open, 1);
    assert_eq!((counted(&breaker).rejected, world.calls()), (2, 0));
    assert_eq!(world.polls(), 1, "by the prober");
    assert!(poll_ready(&mut other).is_ready());
    assert_eq!(other.call(2).now_or_never().unwrap().unwrap(), 2);
}

#[test]
fn a_service_that_is_refused_for_another_reason_when_it_is_asked_again_tells_the_last() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    let layer = CircuitBreakerLayer::new(breaker.clone());
    let (mut prober, mut other) = (layer.layer(echo(&world)), layer.layer(echo(&world)));
    assert!(poll_ready(&mut other).is_ready(), "to be rejected by an open circuit");
    clock.advance(OPEN);
    assert!(poll_ready(&mut prober).is_ready());
    assert!(poll_ready(&mut other).is_ready(), "by one that has no probe left");
    drop(prober);
    let why = rejection(other.call(1).now_or_never().unwrap());
    assert_eq!(
        (why.reason, why.retry_after),
        (Reason::HalfOpenFull, Some(Duration::ZERO))
    );
    let rejected = breaker.status().metrics.rejected;
    assert_eq!((rejected.half_open_full, rejected.open), (1, 0));
}

/// Short and long: a long one is kept elsewhere.
const NAMES: [&str; 2] = ["search", "the search of the whole catalogue"];

#[test]
fn a_layer_rejects_as_the_breaker_itself_does_counts_it_once_and_tells_it() {
    for name in NAMES {
        let clock = Clock::manual();
        let world = Arc::new(World::default());
        let breaker = CircuitBreaker::builder(name)
            .clock(&clock)
            .failure_threshold(1)
            .recovery_timeout(OPEN)
            .build()
            .unwrap();
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
        let mut rejects_as_itself = |reason: Reason| {
            let own = breaker.try_acquire().unwrap_err();
            assert_eq!((own.reason, own.service.as_str()), (reason, name));
            let mut events = breaker.subscribe(2);
            let before = counted(&breaker).rejected;
            assert!(poll_ready(&mut guard).is_ready());
            let why = rejection(guard.call(1).now_or_never().unwrap());
            assert_eq!(why, own);
            assert_eq!(counted(&breaker).rejected, before + 1);
            let told = events.try_recv().expect("listeners hear of it");
            assert_eq!((told.kind, told.at), (EventKind::Rejected(own), clock.now()));
            assert!(events.try_recv().is_none());
        };
        rejects_as_itself(Reason::Open);
        let last = Duration::from_nanos(1);
        clock.advance(OPEN.checked_sub(last).unwrap());
        rejects_as_itself(Reason::Open);
        clock.advance(last);
        let probes: Vec<_> = std::iter::from_fn(|| breaker.try_acquire().ok()).collect();
        rejects_as_itself(Reason::HalfOpenFull);
        drop(probes);
        breaker.force_open();
        rejects_as_itself(Reason::ForcedOpen);
        assert_eq!((world.polls(), world.calls()), (0, 0));
    }
}

#[test]
fn a_layer_rejects_as_the_limiter_itself_does_counts_it_once_and_tells_it() {
    let minute = Duration::from_secs(60);
    let algorithms: [portcullis::Algorithm; 5] = [
        TokenBucket::new(7, minute).burst(3).into(),
        TokenBucket::new(u32::MAX, Duration::from_secs(1)).burst(2).into(),
        // A rate that is no whole number of units in a nanosecond.
        TokenBucket::new(4_294_967_291, Duration::from_secs(86_400 * 36_500)).into(),
        SlidingWindow::new(3, minute).into(),
        portcullis::Adaptive::new(60).window(minute).into(),
    ];
    for (name, algorithm) in NAMES.into_iter().flat_map(|name| algorithms.map(|it| (name, it))) {
        let clock = Clock::manual();
        let world = Arc::new(World::default());
        let limiter = RateLimiter::builder(name, algorithm)
            .limit(name)
            .clock(&clock)
            .build()
            .unwrap();
        // All there is, at once: one by one it would take a day.
        let all = u32::try_from(limiter.quota().remaining).unwrap();
        limiter.try_acquire_n(all).unwrap();
        let mut guard = RateLimitLayer::new(limiter.clone()).layer(echo(&world));
        for step in 0..43_u64 {
            match step {
                // In the end it falls behind all that it has shown, and behind the limiter's beginning.
                40.. => clock.rewind(Duration::from_nanos(step * step * step * 4)),
                _ => clock.advance(Duration::from_nanos(step * step * step)),
            }
            let Err(own) = limiter.try_acquire() else {
                continue;
            };
            let mut events = limiter.subscribe(2);
            let before = limiter.status().rejected_requests;
            assert!(poll_ready(&mut guard).is_ready());
            let why = rejection(guard.call(1).now_or_never().unwrap());
            assert_eq!(why, own);
            assert_eq!(why.quota(), own.quota());
            assert_eq!(limiter.status().rejected_requests, before + 1);
            let told = events.try_recv().expect("listeners hear of it");
            assert_eq!((told.kind, told.at), (EventKind::Rejected(own), clock.now()));
        }
        assert_eq!(world.calls(), 0, "{algorithm:?}");
    }
}

#[test]
fn a_layer_tells_how_long_those_who_wait_come_first() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let limiter = bucket(&clock, 1);
    limiter.try_acquire().unwrap();
    let mut waiter = task::spawn(limiter.acquire());
    assert!(waiter.poll().is_pending());
    let mut guard = RateLimitLayer::new(limiter.clone()).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    let why = rejection(guard.call(1).now_or_never().unwrap());
    assert_eq!(why, limiter.try_acquire().unwrap_err());
    drop(waiter);
    let alone = limiter.try_acquire().unwrap_err();
    assert_eq!(why.retry_after, alone.retry_after.map(|wait| wait * 2));
}

#[test]
fn a_layer_lets_no_call_overtake_those_who_wait() {
    let minute = Duration::from_secs(60);
    for algorithm in [
        Algorithm::from(TokenBucket::new(3, minute)),
        SlidingWindow::new(3, minute).into(),
        Adaptive::new(3).window(minute).into(),
    ] {
        let clock = Clock::manual();
        let limiter = RateLimiter::builder("search", algorithm).clock(&clock).build().unwrap();
        limiter.try_acquire_n(2).unwrap();
        let mut waiter = task::spawn(limiter.acquire_n(2));
        assert!(waiter.poll().is_pending());
        let guard = RateLimitLayer::new(limiter.clone()).layer(echo(&Arc::default()));
        let why = rejection(guard.clone().oneshot(1).now_or_never().unwrap());
        assert_eq!(
            Some(why),
            limiter.try_acquire().err(),
            "the one that is there is the waiter's"
        );
        drop(waiter);
        guard.oneshot(2).now_or_never().unwrap().expect("nobody waits any more");
    }
}

#[test]
fn a_pair_readied_as_refused_rejects_in_the_name_of_its_breaker_whatever_has_changed_since() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (limiter, breaker) = (bucket(&clock, 3), open(&clock));
    let pair = (limiter.clone(), breaker.clone());
    let mut guard = GuardLayer::new(pair).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    clock.advance(Duration::from_secs(4));
    let why = rejection(guard.call(1).now_or_never().unwrap());
    assert_eq!(
        (why.reason, why.retry_after),
        (Reason::Open, Some(Duration::from_secs(6)))
    );

    assert!(poll_ready(&mut guard).is_ready());
    clock.advance(OPEN);
    let why = rejection(guard.call(1).now_or_never().unwrap());
    assert_eq!((why.reason, why.retry_after), (Reason::Open, Some(Duration::ZERO)));
    assert_eq!((counted(&breaker).rejected, limiter.status().rejected_requests), (2, 0));
    assert_eq!((world.polls(), probes(&breaker), available(&limiter)), (0, 0, 3.0));
    assert!(poll_ready(&mut guard).is_ready());
    assert_eq!(guard.call(2).now_or_never().unwrap().unwrap(), 2);
}

// ---- Errors of poll_ready ----------------------------------------------------------------------------------------------------

#[test]
fn an_error_of_poll_ready_passes_on_unchanged_is_counted_and_trips() {
    let clock = Clock::manual();
    let (breaker, world) = (closed(&clock), Arc::new(World::default()));
    world.set_failing(true);
    let mut kept = CircuitBreakerLayer::new(breaker.clone())
        .fallback_with(async |request: u32, _| Ok(request))
        .layer(echo(&world));
    assert_eq!(
        poll_ready(&mut kept),
        Poll::Ready(Err(Down("not ready"))),
        "with a fallback the error type stays"
    );
    assert_eq!((counted(&breaker), breaker.state()), (one_failure(), State::Open));

    breaker.reset();
    let mut boxed = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    let Poll::Ready(Err(error)) = poll_ready(&mut boxed) else {
        panic!("the error passes through");
    };
    assert_eq!(error.downcast_ref(), Some(&Down("not ready")), "boxed once");
    assert_eq!(breaker.state(), State::Open);
    assert!(
        poll_ready(&mut boxed).map_err(|error| error.to_string()) == Poll::Ready(Ok(())),
        "ready to reject"
    );
}

#[test]
fn an_error_of_poll_ready_goes_through_the_classifier() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    world.set_failing(true);

    let breaker = closed(&clock);
    let layer = CircuitBreakerLayer::new(breaker.clone()).classify(|result: &Result<u32, Down>| match result {
        Err(Down("not ready")) => Outcome::Ignored,
        _ => Outcome::Failure,
    });
    assert!(poll_ready(&mut layer.layer(echo(&world))).is_ready());
    let layer = CircuitBreakerLayer::new(breaker.clone()).classify_error(|error: &Down| match error {
        Down("not ready") => Outcome::Ignored,
        Down(_) => Outcome::Failure,
    });
    assert!(poll_ready(&mut layer.layer(echo(&world))).is_ready());
    assert_eq!((counted(&breaker).ignored, breaker.state()), (2, State::Closed));
}

#[test]
fn an_error_of_poll_ready_during_a_probe_opens_the_circuit_again() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    world.set_failing(true);
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(echo(&world));
    assert!(matches!(poll_ready(&mut guard), Poll::Ready(Err(_))));
    assert_eq!((breaker.state(), probes(&breaker)), (State::Open, 0));
    assert_eq!(counted(&breaker).failed, 2);
}

#[test]
fn an_error_of_poll_ready_reaches_the_breaker_of_a_pair_and_takes_nothing_from_the_limiter() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (limiter, breaker) = (bucket(&clock, 2), half_open(&clock));
    world.set_failing(true);
    let mut guard = GuardLayer::new((limiter.clone(), breaker.clone())).layer(echo(&world));
    assert!(matches!(poll_ready(&mut guard), Poll::Ready(Err(_))));
    assert_eq!((breaker.state(), probes(&breaker)), (State::Open, 0));
    assert_eq!((available(&limiter), limiter.status().accepted_requests), (2.0, 0));
}

#[test]
fn a_rejection_in_an_error_of_poll_ready_is_no_failure() {
    let clock = Clock::manual();
    let breaker = closed(&clock);
    let (mut guard, mut handle) = mock::spawn_layer::<u32, u32, _>(CircuitBreakerLayer::new(breaker.clone()));
    handle.send_error(open(&clock).try_acquire().unwrap_err());
    let error = tokio_test::assert_ready_err!(guard.poll_ready());
    assert!(Rejected::find(&*error).is_some());
    assert_eq!((counted(&breaker).ignored, breaker.state()), (1, State::Closed));
}

// ---- Errors of calls ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn an_error_is_boxed_once_however_many_layers_it_passes() {
    let clock = Clock::manual();
    let (breaker, world) = (closed(&clock), Arc::new(World::default()));
    let service = ServiceBuilder::new()
        .layer(RateLimitLayer::new(bucket(&clock, 5)))
        .layer(CircuitBreakerLayer::new(closed(&clock)))
        .layer(CircuitBreakerLayer::new(breaker))
        .service(failing(&world));
    let error: BoxError = service.oneshot(1).await.unwrap_err();
    assert_eq!(error.downcast_ref(), Some(&Down("called")));
}

#[tokio::test]
async fn with_a_fallback_the_error_keeps_its_type() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let service = ServiceBuilder::new()
        .layer(RateLimitLayer::new(bucket(&clock, 5)).fallback(echo(&world)))
        .layer(CircuitBreakerLayer::new(closed(&clock)).fallback_with(async |request: u32, _| Ok(request)))
        .service(failing(&world));
    let result: Result<u32, Down> = service.oneshot(1).await;
    assert_eq!(result, Err(Down("called")));
}

// ---- Cancellation and panics -------------------------------------------------------------------------------------------------

#[test]
fn a_call_dropped_before_its_first_poll_is_cancelled() {
    let clock = Clock::manual();
    let (breaker, limiter) = (half_open(&clock), bucket(&clock, 2));
    let world = Arc::new(World::default());
    let mut guard = GuardLayer::new((limiter.clone(), breaker.clone())).layer(hanging(&world));
    assert!(poll_ready(&mut guard).is_ready());
    drop(guard.call(1));
    assert_eq!(world.calls(), 1, "tower calls before the first poll");
    assert_eq!((counted(&breaker).cancelled, probes(&breaker)), (1, 0));
    assert_eq!(
        breaker.state(),
        State::HalfOpen,
        "by default a cancelled call says nothing"
    );
    assert_eq!(
        available(&limiter),
        1.0,
        "who goes away early has used the limit all the same"
    );
}

#[test]
fn a_call_dropped_while_it_runs_is_cancelled() {
    let clock = Clock::manual();
    let (breaker, limiter) = (half_open(&clock), bucket(&clock, 2));
    let world = Arc::new(World::default());
    let mut guard = GuardLayer::new((limiter.clone(), breaker.clone())).layer(hanging(&world));
    assert!(poll_ready(&mut guard).is_ready());
    let mut call = task::spawn(guard.call(1));
    assert!(call.poll().is_pending());
    assert_eq!(probes(&breaker), 1);
    drop(call);
    assert_eq!((counted(&breaker).cancelled, probes(&breaker)), (1, 0));
    assert_eq!(available(&limiter), 1.0);
}

#[test]
fn a_cancelled_call_counts_as_configured() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let breaker = CircuitBreaker::builder("search")
        .clock(&clock)
        .failure_threshold(2)
        .cancelled(Outcome::Failure)
        .build()
        .unwrap();
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(hanging(&world));
    for _ in 0..2 {
        assert!(poll_ready(&mut guard).is_ready());
        drop(guard.call(1));
    }
    assert_eq!((breaker.state(), counted(&breaker).failed), (State::Open, 2));
}

#[test]
fn callers_who_drop_every_future_get_no_more_than_the_limit() {
    let clock = Clock::manual();
    let (limiter, world) = (bucket(&clock, 5), Arc::new(World::default()));
    let mut guard = RateLimitLayer::new(limiter.clone()).layer(hanging(&world));
    for _ in 0..100 {
        assert!(poll_ready(&mut guard).is_ready());
        drop(guard.call(1));
    }
    assert_eq!(world.calls(), 5);
    assert_eq!(limiter.status().rejected_requests, 95);
}

#[test]
fn a_call_dropped_while_it_waits_leaves_the_line_and_what_it_took() {
    let clock = Clock::manual();
    let (limiter, world) = (bucket(&clock, 1), Arc::new(World::default()));
    limiter.try_acquire().unwrap();
    let mut guard = RateLimitLayer::new(limiter.clone())
        .wait(Duration::from_secs(600))
        .layer(echo(&world));
    let mut wait = |polled: bool| {
        assert!(poll_ready(&mut guard).is_ready());
        let mut call = task::spawn(guard.call(1));
        assert!(!polled || call.poll().is_pending());
        call
    };
    drop(wait(false));
    assert_eq!(limiter.status().waiting, 0, "it takes its place when first polled");

    let (first, mut second, third) = (wait(true), wait(true), wait(true));
    assert_eq!(limiter.status().waiting, 3);
    drop(first);
    assert_eq!(limiter.status().waiting, 2);
    clock.advance(Duration::from_secs(60));
    assert!(second.is_woken(), "the next has moved up");
    tokio_test::assert_ready_ok!(second.poll());

    clock.advance(Duration::from_secs(60));
    drop(third);
    assert_eq!(
        (limiter.status().waiting, available(&limiter)),
        (0, 1.0),
        "what it was due is there"
    );
    assert_eq!(world.calls(), 1);
}

#[test]
fn a_call_dropped_in_its_fallback_was_rejected_and_nothing_else() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    let expected = |rejected| Counted {
        rejected,
        ..one_failure()
    };
    let mut guard = CircuitBreakerLayer::new(breaker.clone())
        .fallback(hanging(&Arc::new(World::default())))
        .layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    drop(guard.call(1));
    assert_eq!(counted(&breaker), expected(1), "before its first poll");

    assert!(poll_ready(&mut guard).is_ready());
    let mut call = task::spawn(guard.call(1));
    assert!(call.poll().is_pending());
    drop(call);
    assert_eq!(counted(&breaker), expected(2), "while the fallback runs");

    let mut guard = CircuitBreakerLayer::new(breaker.clone())
        .fallback_with(|_: u32, _| pending::<Result<u32, Down>>())
        .layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    let mut call = task::spawn(guard.call(1));
    assert!(call.poll().is_pending());
    drop(call);
    assert_eq!(counted(&breaker), expected(3), "while the closure's future runs");
}

/// Runs one call through a guard, catches what it throws, and looks at the breaker while the future is still there: the
/// failure must not wait until it is dropped.
fn panicking<S>(guard: &mut S, breaker: &CircuitBreaker)
where
    S: Service<u32>,
{
    assert!(poll_ready(guard).is_ready());
    match catch_unwind(AssertUnwindSafe(|| guard.call(1))) {
        Err(_) => assert_eq!(counted(breaker), one_failure(), "right after the panic"),
        Ok(future) => {
            let mut future = pin!(future);
            let mut cx = Context::from_waker(Waker::noop());
            let thrown = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut cx).is_ready()));
            assert!(thrown.is_err(), "the panic goes on");
            assert_eq!(counted(breaker), one_failure(), "right after the panic");
        }
    }
    assert_eq!(counted(breaker), one_failure(), "and no more once all is dropped");
    assert_eq!((breaker.state(), probes(breaker)), (State::Open, 0));
}

#[test]
fn a_panic_counts_as_one_failure_wherever_it_happens() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());

    let breaker = closed(&clock);
    let in_call = Inner::new(&world, |_| -> std::future::Ready<Result<u32, Down>> {
        panic!("in call")
    });
    panicking(&mut CircuitBreakerLayer::new(breaker.clone()).layer(in_call), &breaker);

    let breaker = closed(&clock);
    let in_poll = Inner::new(&world, broken);
    panicking(&mut CircuitBreakerLayer::new(breaker.clone()).layer(in_poll), &breaker);

    let breaker = closed(&clock);
    let in_classifier = |_: &Result<u32, Down>| -> Outcome { panic!("in the classifier") };
    panicking(
        &mut CircuitBreakerLayer::new(breaker.clone())
            .classify(in_classifier)
            .layer(echo(&world)),
        &breaker,
    );

    let breaker = closed(&clock);
    let in_classifier = |_: &Down| -> Outcome { panic!("in the classifier") };
    panicking(
        &mut CircuitBreakerLayer::new(breaker.clone())
            .classify_error(in_classifier)
            .layer(failing(&world)),
        &breaker,
    );
}

#[test]
fn a_panicking_probe_opens_the_circuit_again_and_frees_its_slot() {
    let clock = Clock::manual();
    let (breaker, world) = (half_open(&clock), Arc::new(World::default()));
    let in_poll = Inner::new(&world, broken);
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(in_poll);
    assert!(poll_ready(&mut guard).is_ready());
    let mut call = Box::pin(guard.call(1));
    catch_unwind(AssertUnwindSafe(|| call.as_mut().now_or_never())).unwrap_err();
    assert_eq!((breaker.state(), probes(&breaker)), (State::Open, 0));
    assert_eq!(counted(&breaker).failed, 2);
}

#[test]
fn a_panic_after_a_wait_counts_once_and_the_permit_is_spent() {
    let clock = Clock::manual();
    let (limiter, world) = (bucket(&clock, 2), Arc::new(World::default()));
    let in_call = Inner::new(&world, |_| -> std::future::Ready<Result<u32, Down>> {
        panic!("in call")
    });
    let mut guard = RateLimitLayer::new(limiter.clone())
        .wait(Duration::from_secs(60))
        .layer(in_call);
    assert!(poll_ready(&mut guard).is_ready());
    let mut call = Box::pin(guard.call(1));
    catch_unwind(AssertUnwindSafe(|| call.as_mut().now_or_never())).unwrap_err();
    drop(call);
    assert_eq!(available(&limiter), 1.0);
}

#[test]
fn a_panic_in_poll_ready_counts_as_one_failure_and_frees_the_slot() {
    struct Broken;
    impl Service<u32> for Broken {
        type Response = u32;
        type Error = Down;
        type Future = std::future::Ready<Result<u32, Down>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Down>> {
            panic!("in poll_ready")
        }
        fn call(&mut self, _: u32) -> Self::Future {
            unreachable!("never ready")
        }
    }
    let clock = Clock::manual();
    let breaker = half_open(&clock);
    let failed = breaker.status().metrics.failed_requests;
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(Broken);
    catch_unwind(AssertUnwindSafe(|| poll_ready(&mut guard).is_ready())).unwrap_err();
    assert_eq!(probes(&breaker), 0);
    assert_eq!(
        breaker.state(),
        State::Open,
        "a probe that fails to become ready has failed"
    );
    drop(guard);
    assert_eq!(breaker.status().metrics.failed_requests, failed + 1, "once");
}

#[test]
fn a_panic_of_somebody_else_that_drops_a_call_cancels_it() {
    let clock = Clock::manual();
    let (breaker, world) = (closed(&clock), Arc::new(World::default()));
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(hanging(&world));
    assert!(poll_ready(&mut guard).is_ready());
    let call = guard.call(1);
    catch_unwind(AssertUnwindSafe(|| {
        let _call = call;
        panic!("the caller's own");
    }))
    .unwrap_err();
    assert_eq!((counted(&breaker).cancelled, counted(&breaker).failed), (1, 0));
}

#[test]
fn a_panic_in_a_fallback_is_not_the_services_failure() {
    let clock = Clock::manual();
    let (breaker, world) = (open(&clock), Arc::new(World::default()));
    let broken = Inner::new(&world, broken);
    let guard = CircuitBreakerLayer::new(breaker.clone())
        .fallback(broken)
        .layer(echo(&world));
    catch_unwind(AssertUnwindSafe(|| guard.oneshot(1).now_or_never())).unwrap_err();
    assert_eq!(
        counted(&breaker),
        Counted {
            rejected: 1,
            ..one_failure()
        }
    );
}

async fn broken_page(_: Request<Body>) -> Result<Response<Body>, Down> {
    panic!("in the handler")
}

fn page() -> Request<Body> {
    Request::new(Body::empty())
}

#[tokio::test]
async fn catch_panic_outside_the_layer_counts_exactly_one_failure() {
    let clock = Clock::manual();
    let breaker = closed(&clock);
    let service = ServiceBuilder::new()
        .layer(CatchPanicLayer::new())
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(service_fn(broken_page));
    let response = service.oneshot(page()).await.unwrap();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!((counted(&breaker), breaker.state()), (one_failure(), State::Open));
}

#[tokio::test]
async fn catch_panic_inside_the_layer_counts_exactly_one_failure() {
    let clock = Clock::manual();
    let breaker = closed(&clock);
    let service = ServiceBuilder::new()
        .layer(
            CircuitBreakerLayer::new(breaker.clone()).classify(|result: &Result<Response<_>, _>| match result {
                Ok(response) if !response.status().is_server_error() => Outcome::Success,
                _ => Outcome::Failure,
            }),
        )
        .layer(CatchPanicLayer::new())
        .service(service_fn(broken_page));
    let response = service.oneshot(page()).await.unwrap();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!((counted(&breaker), breaker.state()), (one_failure(), State::Open));
}

// ---- A rejection by an inner layer is no failure -----------------------------------------------------------------------------

fn one_ignored() -> Counted {
    Counted {
        ignored: 1,
        ..Counted::default()
    }
}

#[tokio::test]
async fn a_rejection_by_an_inner_layer_is_no_failure() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());

    let breaker = closed(&clock);
    let plain = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .layer(CircuitBreakerLayer::new(open(&clock)))
        .service(echo(&world));
    assert_eq!(rejection(plain.oneshot(1).await).reason, Reason::Open);
    assert_eq!(counted(&breaker), one_ignored(), "one layer in the other");

    let breaker = closed(&clock);
    let buffered = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .buffer(4)
        .layer(CircuitBreakerLayer::new(open(&clock)))
        .service(echo(&world));
    assert_eq!(rejection(buffered.oneshot(1).await).reason, Reason::Open);
    assert_eq!(counted(&breaker), one_ignored(), "through a buffer");

    let breaker = closed(&clock);
    let timed = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .timeout(OPEN)
        .layer(CircuitBreakerLayer::new(open(&clock)))
        .service(echo(&world));
    assert_eq!(rejection(timed.oneshot(1).await).reason, Reason::Open);
    assert_eq!(counted(&breaker), one_ignored(), "through a timeout");

    let breaker = closed(&clock);
    let as_io = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .map_err(io::Error::other::<BoxError>)
        .layer(CircuitBreakerLayer::new(open(&clock)))
        .service(echo(&world));
    assert_eq!(rejection(as_io.oneshot(1).await).reason, Reason::Open);
    assert_eq!(counted(&breaker), one_ignored(), "as an io::Error");

    let breaker = closed(&clock);
    let shared = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .map_err(|error: BoxError| Arc::new(io::Error::other(error)))
        .layer(CircuitBreakerLayer::new(open(&clock)))
        .service(echo(&world));
    assert_eq!(rejection(shared.oneshot(1).await).reason, Reason::Open);
    assert_eq!(counted(&breaker), one_ignored(), "as a shared io::Error");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_inside_the_layer_is_a_failure_and_one_outside_a_cancelled_call() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let breaker = closed(&clock);
    let inside = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .timeout(OPEN)
        .service(hanging(&world));
    inside.oneshot(1).await.unwrap_err();
    assert_eq!(counted(&breaker), one_failure());

    let breaker = closed(&clock);
    let outside = ServiceBuilder::new()
        .timeout(OPEN)
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .service(hanging(&world));
    outside.oneshot(1).await.unwrap_err();
    assert_eq!((counted(&breaker).failed, counted(&breaker).cancelled), (0, 1));
}

// ---- Pairs -------------------------------------------------------------------------------------------------------------------

#[test]
fn nothing_is_taken_from_the_limiter_while_the_breaker_of_its_pair_refuses() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (limiter, breaker) = (bucket(&clock, 3), open(&clock));
    let mut limiter_first = GuardLayer::new((limiter.clone(), breaker.clone())).layer(echo(&world));
    let mut breaker_first = GuardLayer::new((breaker.clone(), limiter.clone())).layer(echo(&world));
    for _ in 0..5 {
        assert!(poll_ready(&mut limiter_first).is_ready());
        assert_eq!(
            rejection(limiter_first.call(1).now_or_never().unwrap()).reason,
            Reason::Open
        );
        assert!(poll_ready(&mut breaker_first).is_ready());
        assert_eq!(
            rejection(breaker_first.call(1).now_or_never().unwrap()).reason,
            Reason::Open
        );
    }
    let status = limiter.status();
    assert_eq!(status.available_tokens, 3.0);
    assert_eq!(
        (
            status.accepted_requests,
            status.returned_requests,
            status.rejected_requests
        ),
        (0, 0, 0)
    );
    assert_eq!(counted(&breaker).rejected, 10);
    assert_eq!((world.polls(), world.calls()), (0, 0));
}

#[test]
fn both_of_a_pair_are_asked_before_either_gives() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (limiter, breaker) = (bucket(&clock, 3), closed(&clock));
    let mut guard = GuardLayer::new((limiter.clone(), breaker.clone())).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    // It opens only now: the limiter, asked first, must not have given yet when the breaker says no.
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    assert_eq!(rejection(guard.call(1).now_or_never().unwrap()).reason, Reason::Open);
    assert_eq!((limiter.status().accepted_requests, available(&limiter)), (0, 3.0));
    assert_eq!((counted(&breaker).rejected, limiter.status().rejected_requests), (1, 0));
}

#[test]
fn a_pair_whose_limiter_refuses_gives_the_probes_slot_back_and_counts_at_the_limiter() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (limiter, breaker) = (bucket(&clock, 1), half_open(&clock));
    while limiter.try_acquire().is_ok() {}
    let refused = limiter.status().rejected_requests;
    for round in 1..=3 {
        let mut guard = GuardLayer::new((breaker.clone(), limiter.clone())).layer(echo(&world));
        assert!(poll_ready(&mut guard).is_ready());
        assert_eq!(probes(&breaker), 1);
        let why = rejection(guard.call(1).now_or_never().unwrap());
        assert_eq!(
            (why.limit.as_ref(), why.reason),
            (Some(limiter.limit()), Reason::OverLimit)
        );
        assert_eq!((probes(&breaker), counted(&breaker)), (0, one_failure()));
        assert_eq!(limiter.status().rejected_requests - refused, round);
    }
    assert_eq!(world.calls(), 0);
}

/// The same limiter twice refuses neither when asked and refuses the second time when it gives: the one way to provoke on one
/// thread what two threads do to each other.
#[test]
fn what_the_first_of_a_pair_gave_is_returned_when_the_second_refuses_after_all() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let bucket = bucket(&clock, 1);
    let window = RateLimiter::builder("search", SlidingWindow::new(1, Duration::from_secs(60)))
        .clock(&clock)
        .build()
        .unwrap();
    for limiter in [bucket, window] {
        let guard = GuardLayer::new((limiter.clone(), limiter.clone())).layer(echo(&world));
        assert_eq!(
            rejection(guard.oneshot(1).now_or_never().unwrap()).reason,
            Reason::OverLimit
        );
        let status = limiter.status();
        assert_eq!(status.available_tokens, 1.0, "{}", status.kind);
        assert_eq!(
            (
                status.accepted_requests,
                status.returned_requests,
                status.rejected_requests
            ),
            (1, 1, 1)
        );
        limiter.try_acquire().expect("the token is there again");
    }
    assert_eq!(world.calls(), 0);
}

#[test]
fn a_nested_pair_returns_everything_when_its_last_policy_refuses_after_all() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (limiter, breaker) = (bucket(&clock, 1), half_open(&clock));
    let left = GuardLayer::new(((breaker.clone(), limiter.clone()), limiter.clone()));
    let right = GuardLayer::new((limiter.clone(), (breaker.clone(), limiter.clone())));
    for guard in [left.layer(echo(&world)).boxed(), right.layer(echo(&world)).boxed()] {
        assert_eq!(
            rejection(guard.oneshot(1).now_or_never().unwrap()).reason,
            Reason::OverLimit
        );
        assert_eq!((available(&limiter), probes(&breaker)), (1.0, 0));
        assert_eq!(counted(&breaker), one_failure(), "a probe that never began is no call");
    }
    assert_eq!(world.calls(), 0);
}

#[test]
fn a_pair_that_cannot_have_both_probe_slots_holds_neither() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (first, second) = (half_open(&clock), half_open(&clock));
    let taken = second.try_acquire().unwrap();
    let mut guard = GuardLayer::new((first.clone(), second.clone())).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    assert_eq!(probes(&first), 0, "the first gives its slot back at once");
    assert_eq!(
        rejection(guard.call(1).now_or_never().unwrap()).reason,
        Reason::HalfOpenFull
    );
    assert_eq!((probes(&first), probes(&second)), (0, 1));
    drop(taken);
}

#[test]
fn a_pair_reads_the_clock_once() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (first, second) = (open(&clock), closed(&clock));
    clock.advance(Duration::from_secs(1));
    second.try_acquire().unwrap().settle(Outcome::Failure);
    // The first turns half-open nine seconds from now, and while it does, time goes on past the second's open time.
    clock.advance(Duration::from_secs(9));
    first.on_event({
        let clock = clock.clone();
        move |event| {
            if matches!(
                event.kind,
                EventKind::Transition {
                    to: State::HalfOpen,
                    ..
                }
            ) {
                clock.advance(OPEN);
            }
        }
    });
    let mut guard = GuardLayer::new((first.clone(), second.clone())).layer(echo(&world));
    assert!(poll_ready(&mut guard).is_ready());
    assert_eq!(
        second.state(),
        State::HalfOpen,
        "for a reading of its own it would have been half-open"
    );
    assert_eq!(world.polls(), 0, "the second was judged by the time that the first saw");
    assert_eq!(probes(&first), 0);
}

#[test]
fn a_verdict_reaches_both_of_a_pair_and_every_part_of_a_nested_one() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (first, second, breaker) = (bucket(&clock, 10), bucket(&clock, 20), closed(&clock));
    let guard = GuardLayer::new(((first.clone(), breaker.clone()), second.clone()))
        .classify(|_: &Result<u32, Down>| Verdict::new(Outcome::Failure).cost(4))
        .layer(echo(&world));
    assert_eq!(guard.oneshot(1).now_or_never().unwrap().unwrap(), 1);
    assert_eq!(
        (available(&first), available(&second)),
        (6.0, 16.0),
        "the true cost is charged"
    );
    assert_eq!((counted(&breaker), breaker.state()), (one_failure(), State::Open));
}

#[test]
fn an_adaptive_limit_learns_alone_and_in_a_pair_how_the_calls_behind_a_layer_end() {
    let minute = Duration::from_secs(60);
    let adaptive = Adaptive::new(10).window(minute).minimum_calls(1).adjustment_factor(0.5);
    for paired in [false, true] {
        for fails in [false, true] {
            let clock = Clock::manual();
            let limiter = RateLimiter::builder("search", adaptive).clock(&clock).build().unwrap();
            let judge = move |_: &Result<u32, Down>| if fails { Outcome::Failure } else { Outcome::Success };
            let calls = (0..5).filter(|call| {
                let inner = echo(&Arc::default());
                let answer = if paired {
                    let pair = (closed(&clock), limiter.clone());
                    let layer = GuardLayer::new(pair).classify(judge);
                    layer.layer(inner).oneshot(*call).now_or_never()
                } else {
                    let layer = RateLimitLayer::new(limiter.clone()).classify(judge);
                    layer.layer(inner).oneshot(*call).now_or_never()
                };
                answer.unwrap().is_ok()
            });
            assert_eq!(calls.count(), 5);
            clock.advance(minute);
            let expected = if fails { 5.0 } else { 15.0 };
            assert_eq!(limiter.status().rate, expected, "paired: {paired}, fails: {fails}");
        }
    }
}

#[test]
fn a_rejection_counts_at_the_limiter_of_a_pair_that_refused_even_if_both_have_one_name() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (roomy, tight) = (bucket(&clock, 9), bucket(&clock, 1));
    let guard = GuardLayer::new((roomy.clone(), tight.clone())).layer(echo(&world));
    guard.clone().oneshot(1).now_or_never().unwrap().unwrap();
    rejection(guard.oneshot(2).now_or_never().unwrap());
    assert_eq!(
        (roomy.status().rejected_requests, tight.status().rejected_requests),
        (0, 1)
    );

    let nested = GuardLayer::new(((roomy.clone(), tight.clone()), roomy.clone())).layer(echo(&world));
    rejection(nested.oneshot(3).now_or_never().unwrap());
    assert_eq!(
        (roomy.status().rejected_requests, tight.status().rejected_requests),
        (0, 2)
    );
}

#[test]
fn of_two_that_refuse_a_pair_tells_the_one_whose_wait_is_longer_and_counts_there() {
    let clock = Clock::manual();
    let limiter = |secs| {
        let bucket = TokenBucket::new(1, Duration::from_secs(secs));
        RateLimiter::builder("agent", bucket).clock(&clock).build().unwrap()
    };
    let (soon, late) = (limiter(1), limiter(3600));
    let (quick, slow) = (soon.clone(), late.clone());
    let policies = GuardLayer::new(((quick.clone(), slow.clone()), quick.clone()));
    let turned = GuardLayer::new((slow, (quick.clone(), quick)));
    soon.try_acquire().unwrap();
    late.try_acquire().unwrap();
    let world = Arc::new(World::default());
    for rejected in 1..=2 {
        let answer = match rejected {
            1 => policies.layer(echo(&world)).oneshot(1).now_or_never().unwrap(),
            _ => turned.layer(echo(&world)).oneshot(1).now_or_never().unwrap(),
        };
        assert_eq!(
            rejection(answer).retry_after,
            Some(Duration::from_secs(3600)),
            "who waits for the other alone is refused again"
        );
        let counts = (soon.status().rejected_requests, late.status().rejected_requests);
        assert_eq!(counts, (0, rejected));
    }

    let minute = TokenBucket::new(1, Duration::from_secs(60));
    let minute = RateLimiter::builder("agent", minute).clock(&clock).build().unwrap();
    minute.try_acquire().unwrap();
    let never = CircuitBreaker::builder("agent").clock(&clock).build().unwrap();
    let guard = GuardLayer::new((minute.clone(), never.clone())).layer(echo(&world));
    let mut readied = guard;
    assert!(poll_ready(&mut readied).is_ready());
    never.force_open();
    let told = rejection(readied.call(1).now_or_never().unwrap());
    assert_eq!(told.reason, Reason::ForcedOpen, "nobody knows how long that lasts");
    assert_eq!((counted(&never).rejected, minute.status().rejected_requests), (1, 0));
}

#[test]
fn of_two_that_refuse_for_as_long_the_first_tells() {
    let clock = Clock::manual();
    let world = Arc::new(World::default());
    let (first, second) = (bucket(&clock, 1), bucket(&clock, 1));
    for limiter in [&first, &second] {
        limiter.try_acquire().unwrap();
    }
    let guard = GuardLayer::new((first.clone(), second.clone())).layer(echo(&world));
    rejection(guard.oneshot(1).now_or_never().unwrap());
    assert_eq!(
        (first.status().rejected_requests, second.status().rejected_requests),
        (1, 0)
    );
}

// ---- Waiting -----------------------------------------------------------------------------------------------------------------

#[test]
fn a_waiting_layer_is_ready_at_once_and_waits_in_the_future() {
    let clock = Clock::manual();
    let (limiter, world) = (bucket(&clock, 1), Arc::new(World::default()));
    let mut guard = RateLimitLayer::new(limiter.clone())
        .wait(Duration::from_secs(60))
        .layer(echo(&world));
    assert_eq!(
        guard
            .ready()
            .now_or_never()
            .unwrap()
            .unwrap()
            .call(1)
            .now_or_never()
            .unwrap()
            .unwrap(),
        1
    );

    assert!(poll_ready(&mut guard).is_ready());
    let mut call = task::spawn(guard.call(2));
    assert!(call.poll().is_pending());
    assert_eq!(
        (world.calls(), limiter.status().waiting),
        (1, 1),
        "the inner service is called after the wait"
    );
    clock.advance(Duration::from_secs(60) - Duration::from_nanos(1));
    assert!(call.poll().is_pending());
    clock.advance(Duration::from_nanos(1));
    assert!(call.is_woken());
    assert_eq!(tokio_test::assert_ready_ok!(call.poll()), 2);
}

#[test]
fn waiting_calls_are_served_in_order_of_arrival() {
    let clock = Clock::manual();
    let (limiter, world) = (bucket(&clock, 1), Arc::new(World::default()));
    let order = Arc::new(Mutex::new(Vec::new()));
    let inner = Inner::new(&world, {
        let order = order.clone();
        move |request| {
            order.lock().unwrap().push(request);
            std::future::ready(Ok(request))
        }
    });
    limiter.try_acquire().unwrap();
    let mut guard = RateLimitLayer::new(limiter).wait(Duration::from_secs(600)).layer(inner);
    let mut calls: Vec<_> = (0..5)
        .map(|request| {
            assert!(poll_ready(&mut guard).is_ready());
            let mut call = task::spawn(guard.call(request));
            assert!(call.poll().is_pending());
            call
        })
        .collect();
    while !calls.is_empty() {
        clock.advance(Duration::from_secs(60));
        // The last to come asks first, every time.
        for at in (0..calls.len()).rev() {
            if calls[at].poll().is_ready() {
                drop(calls.remove(at));
            }
        }
    }
    assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 4]);
}

#[test]
fn a_wait_that_cannot_fit_hands_the_request_to_the_fallback_at_once() {
    let clock = Clock::manual();
    let (limiter, world) = (bucket(&clock, 1), Arc::new(World::default()));
    limiter.try_acquire().unwrap();
    let guard = RateLimitLayer::new(limiter.clone())
        .wait(Duration::from_secs(59))
        .fallback_with(async |request: u32, why: Rejected| {
            assert_eq!(why.retry_after, Some(Duration::from_secs(60)));
            Ok(request + 1000)
        })
        .layer(echo(&world));
    assert_eq!(guard.oneshot(7).now_or_never().expect("at once"), Ok(1007));
    assert_eq!((world.calls(), limiter.status().rejected_requests), (0, 1));
}

#[test]
fn a_wait_that_outlives_its_time_hands_the_request_to_the_fallback() {
    let clock = Clock::manual();
    let (limiter, world) = (bucket(&clock, 2), Arc::new(World::default()));
    limiter.try_acquire_n(2).unwrap().settle(Outcome::Success);
    let mut guard = RateLimitLayer::new(limiter.clone())
        .wait(Duration::from_secs(60))
        .fallback(Inner::new(&world, |request| std::future::ready(Ok(request + 1000))))
        .layer(echo(&world));
    // Before the call whose time has come asks, its cost is corrected away: the limit is deeper in debt than it promised.
    let owed = limiter.clone();
    assert!(poll_ready(&mut guard).is_ready());
    let mut call = task::spawn(guard.call(7));
    assert!(call.poll().is_pending());
    let free = owed.try_acquire_n(0).unwrap();
    free.settle(Verdict::new(Outcome::Success).cost(2));
    clock.advance(Duration::from_secs(60));
    assert!(call.is_woken());
    assert_eq!(tokio_test::assert_ready_ok!(call.poll()), 1007);
    assert_eq!((limiter.status().waiting, limiter.status().rejected_requests), (0, 1));
}

/// A service that cannot be cloned.
struct Unique;

impl Service<u32> for Unique {
    type Response = u32;
    type Error = Down;
    type Future = std::future::Ready<Result<u32, Down>>;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Down>> {
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: u32) -> Self::Future {
        std::future::ready(Ok(request))
    }
}

/// Two ways to read this trait for a service, one for everything else: naming it for a type compiles only if the type is no
/// service.
trait NoService<A> {
    fn holds() {}
}
impl<T> NoService<()> for T {}
impl<T: Service<u32>> NoService<Down> for T {}

#[test]
fn only_a_waiting_layer_needs_an_inner_service_that_can_be_cloned() {
    let clock = Clock::manual();
    let policy = (bucket(&clock, 1), closed(&clock));
    let guard = GuardLayer::new(policy).layer(Unique);
    assert_eq!(guard.oneshot(1).now_or_never().unwrap().unwrap(), 1);
    <Guard<Unique, Waiting> as NoService<_>>::holds();
}

// ---- Fallbacks ---------------------------------------------------------------------------------------------------------------

/// Primary agent, then a fallback agent, then what is known from yesterday.
fn agents(
    primary: &CircuitBreaker,
    secondary: &CircuitBreaker,
) -> impl Service<u32, Response = String, Error = Down, Future: Send> + Clone + Send {
    let say = |who: &'static str| {
        Inner::new(&Arc::new(World::default()), move |request| async move {
            match request {
                13 => Err(Down(who)),
                _ => Ok(format!("{who} on {request}")),
            }
        })
    };
    let degraded = CircuitBreakerLayer::new(secondary.clone())
        .fallback_with(async |request: u32, why: Rejected| Ok(format!("cached for {request}, as {:?}", why.reason)))
        .layer(say("secondary"));
    CircuitBreakerLayer::new(primary.clone())
        .fallback(degraded)
        .layer(say("primary"))
}

#[tokio::test]
async fn a_chain_of_fallbacks_degrades_gracefully_and_keeps_the_inner_error_type() {
    let clock = Clock::manual();
    let (primary, secondary) = (closed(&clock), closed(&clock));
    let service = agents(&primary, &secondary);
    let ask = |request| service.clone().oneshot(request);

    assert_eq!(ask(1).await.unwrap(), "primary on 1");
    assert_eq!(
        ask(13).await,
        Err(Down("primary")),
        "a failed call is not repeated elsewhere"
    );
    assert_eq!(ask(2).await.unwrap(), "secondary on 2");
    assert_eq!(ask(13).await, Err(Down("secondary")));
    assert_eq!(ask(3).await.unwrap(), "cached for 3, as Open");
    assert_eq!((counted(&primary).failed, counted(&primary).rejected), (1, 3));
    assert_eq!((counted(&secondary).failed, counted(&secondary).rejected), (1, 1));

    clock.advance(OPEN);
    assert_eq!(ask(4).await.unwrap(), "primary on 4", "and back again");
}

#[test]
fn a_fallback_that_is_not_ready_is_waited_for() {
    let clock = Clock::manual();
    let (mut fallback, mut handle) = mock::pair::<u32, u32>();
    handle.allow(0);
    let guard = CircuitBreakerLayer::new(open(&clock))
        .fallback(fallback.clone())
        .layer(mock::pair::<u32, u32>().0);
    let mut call = task::spawn(guard.oneshot(7));
    assert!(call.poll().is_pending());
    tokio_test::assert_pending!(handle.poll_request());
    handle.allow(2);
    assert!(call.is_woken());
    assert!(call.poll().is_pending());
    let (request, answer) = handle.next_request().now_or_never().unwrap().unwrap();
    answer.send_response(request + 1000);
    assert_eq!(tokio_test::assert_ready_ok!(call.poll()), 1007);
    // The fallback that was configured is as it was: the calls use clones.
    assert!(poll_ready(&mut fallback).is_ready());
}

#[test]
fn an_error_of_a_fallback_is_the_callers_and_not_the_services_failure() {
    let clock = Clock::manual();
    let breaker = open(&clock);
    let (world, unready) = (Arc::new(World::default()), Arc::new(World::default()));
    unready.set_failing(true);
    for (fallback, error) in [(&world, Down("called")), (&unready, Down("not ready"))] {
        let guard = CircuitBreakerLayer::new(breaker.clone())
            .fallback(failing(fallback))
            .layer(echo(&world));
        assert_eq!(guard.oneshot(1).now_or_never().unwrap(), Err(error));
    }
    assert_eq!((counted(&breaker).failed, counted(&breaker).rejected), (1, 2));
}

#[tokio::test]
async fn the_error_of_a_fallback_becomes_the_inner_one() {
    struct Cold;
    impl From<Cold> for Down {
        fn from(_: Cold) -> Self {
            Down("no cached answer")
        }
    }
    let clock = Clock::manual();
    let cache = service_fn(async |_: u32| Err::<u32, _>(Cold));
    let guard = CircuitBreakerLayer::new(open(&clock))
        .fallback(cache)
        .layer(echo(&Arc::new(World::default())));
    assert_eq!(guard.oneshot(1).await, Err(Down("no cached answer")));
}

// ---- Finding the rejection ---------------------------------------------------------------------------------------------------

/// An error of some middleware, around another.
#[derive(Debug)]
struct Wrapped(BoxError);

impl fmt::Display for Wrapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("wrapped")
    }
}

impl StdError for Wrapped {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.0)
    }
}

#[test]
fn a_rejection_is_found_in_whatever_wraps_it() {
    let why = open(&Clock::manual()).try_acquire().unwrap_err();
    let any: Arc<dyn StdError + Send + Sync> = Arc::new(why.clone());
    let local: Arc<dyn StdError> = Arc::new(why.clone());
    let carriers: Vec<(&str, Box<dyn StdError>)> = vec![
        ("itself", Box::new(why.clone())),
        ("Box<Rejected>", Box::new(Box::new(why.clone()))),
        ("Arc<Rejected>", Box::new(Arc::new(why.clone()))),
        ("Arc<dyn Error + Send + Sync>", Box::new(any)),
        ("Arc<dyn Error>", Box::new(local)),
        ("io::Error", Box::new(io::Error::other(why.clone()))),
        (
            "io::Error twice",
            Box::new(io::Error::other(io::Error::other(why.clone()))),
        ),
        ("Box<io::Error>", Box::new(Box::new(io::Error::other(why.clone())))),
        ("Arc<io::Error>", Box::new(Arc::new(io::Error::other(why.clone())))),
        ("a source", Box::new(Wrapped(why.clone().into()))),
        ("Arc of a source", Box::new(Arc::new(Wrapped(why.clone().into())))),
        (
            "a source of an io::Error of an Arc of a source",
            Box::new(Wrapped(io::Error::other(Arc::new(Wrapped(why.clone().into()))).into())),
        ),
        (
            "portcullis::Error",
            Box::new(portcullis::Error::<Down>::Rejected(why.clone())),
        ),
        (
            "portcullis::Error around an io::Error",
            Box::new(portcullis::Error::Inner(io::Error::other(why.clone()))),
        ),
    ];
    for (carrier, error) in carriers {
        assert_eq!(Rejected::find(&*error), Some(&why), "in {carrier}");
    }
}

#[test]
fn no_rejection_is_found_where_none_is() {
    /// Its own source.
    #[derive(Debug)]
    struct Endless;
    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("endless")
        }
    }
    impl StdError for Endless {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            Some(self)
        }
    }
    for error in [
        Box::new(Down("called")) as BoxError,
        Box::new(io::Error::from(io::ErrorKind::NotFound)),
        Box::new(Wrapped(io::Error::other(Down("called")).into())),
        Box::new(Endless),
    ] {
        assert_eq!(Rejected::find(&*error), None);
    }
}

#[tokio::test]
async fn a_rejection_is_found_through_towers_buffer() {
    let clock = Clock::manual();
    let service = ServiceBuilder::new()
        .buffer(4)
        .layer(CircuitBreakerLayer::new(open(&clock)))
        .service(echo(&Arc::new(World::default())));
    let why = rejection(service.oneshot(1).await);
    assert_eq!((why.service.as_str(), why.retry_after), ("search", Some(OPEN)));

    // A buffer whose service fails to become ready tells every caller the same error, behind an `Arc`.
    let (mock, mut handle) = mock::pair::<u32, u32>();
    handle.send_error(open(&clock).try_acquire().unwrap_err());
    let breaker = closed(&clock);
    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(breaker.clone()))
        .buffer(4)
        .service(mock);
    assert_eq!(rejection(service.oneshot(1).await).reason, Reason::Open);
    assert_eq!(counted(&breaker), one_ignored());
}

// ---- Attacks -----------------------------------------------------------------------------------------------------------------

#[test]
fn a_guard_called_unready_still_asks_its_policy() {
    let clock = Clock::manual();
    let (limiter, breaker) = (bucket(&clock, 2), open(&clock));
    let mut guard = GuardLayer::new((limiter.clone(), breaker.clone())).layer(Unique);
    for _ in 0..3 {
        assert_eq!(rejection(guard.call(1).now_or_never().unwrap()).reason, Reason::Open);
    }
    assert_eq!(counted(&breaker).rejected, 3);
    clock.advance(OPEN);
    assert_eq!(guard.call(1).now_or_never().unwrap().unwrap(), 1, "the probe");
    assert_eq!(guard.call(2).now_or_never().unwrap().unwrap(), 2);
    assert_eq!(
        rejection(guard.call(3).now_or_never().unwrap()).reason,
        Reason::OverLimit
    );
}

#[test]
fn a_guard_called_while_it_still_waits_for_its_inner_service_keeps_the_slot_it_reserved() {
    /// Never ready, and callable all the same.
    struct Careless;
    impl Service<u32> for Careless {
        type Response = u32;
        type Error = Down;
        type Future = std::future::Ready<Result<u32, Down>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Down>> {
            Poll::Pending
        }
        fn call(&mut self, request: u32) -> Self::Future {
            std::future::ready(Ok(request))
        }
    }
    let clock = Clock::manual();
    let breaker = half_open(&clock);
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(Careless);
    assert!(poll_ready(&mut guard).is_pending());
    assert_eq!(probes(&breaker), 1);
    assert_eq!(
        guard.call(1).now_or_never().unwrap().unwrap(),
        1,
        "its own slot does not stand in its way"
    );
    assert_eq!((breaker.state(), probes(&breaker)), (State::Closed, 0));
}

#[test]
fn threads_behind_a_barrier_never_have_more_probes_in_the_service_than_allowed() {
    const THREADS: usize = 8;
    for _ in 0..50 {
        let clock = Clock::manual();
        let breaker = CircuitBreaker::builder("search")
            .clock(&clock)
            .failure_threshold(1)
            .half_open_max_calls(3)
            .success_threshold(3)
            .build()
            .unwrap();
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        clock.advance(Duration::from_secs(60));
        let world = Arc::new(World::default());
        let layer = CircuitBreakerLayer::new(breaker.clone());
        let (before, after) = (Barrier::new(THREADS), Barrier::new(THREADS));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                let mut guard = layer.layer(hanging(&world));
                let (before, after) = (&before, &after);
                scope.spawn(move || {
                    before.wait();
                    assert!(poll_ready(&mut guard).is_ready());
                    let call = guard.call(1);
                    after.wait();
                    drop(call);
                });
            }
        });
        assert_eq!(world.calls(), 3, "as many as there are slots, no more and no fewer");
        assert_eq!((probes(&breaker), breaker.state()), (0, State::HalfOpen));
        let all = counted(&breaker);
        assert_eq!((all.cancelled, all.rejected), (3, THREADS as u64 - 3));
    }
}

#[test]
fn threads_at_several_limits_burn_nothing_and_each_refusal_is_counted_once() {
    const THREADS: u32 = 4;
    const CALLS: u32 = 1_000;
    let (clock, world) = (Clock::manual(), Arc::new(World::default()));
    let (tokens, calls) = (bucket(&clock, 3_000), bucket(&clock, 1_000));
    let of_each = TokenBucket::new(1, Duration::from_secs(60)).burst(400);
    let each = KeyedRateLimiter::builder("search", of_each)
        .clock(&clock)
        .build()
        .unwrap();
    // Two keys of 400 calls: the tightest of the three, and asked last.
    let policy = (
        (tokens.cost(|_: &u32| 2), calls.clone()),
        each.by(|call: &u32| Some(call % 2)),
    );
    let layer = GuardLayer::new(policy);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let guard = layer.layer(echo(&world));
            scope.spawn(move || {
                for call in 0..CALLS {
                    let _ = guard.clone().oneshot(call).now_or_never().unwrap();
                }
            });
        }
    });
    assert_eq!(world.calls(), 800);
    assert_eq!((available(&tokens), available(&calls)), (1_400.0, 200.0));
    let all = [tokens.status(), calls.status(), each.status()];
    for status in &all {
        assert_eq!(status.accepted_requests - status.returned_requests, 800);
    }
    let rejected = all.iter().map(|status| status.rejected_requests).sum::<u64>();
    assert_eq!(rejected, u64::from(THREADS * CALLS) - 800);
}

#[test]
fn threads_that_trip_probe_and_drop_lose_no_call_and_leak_no_slot() {
    const THREADS: u32 = 4;
    const ROUNDS: u32 = 5_000;
    let clock = Clock::manual();
    let (breaker, limiter) = (half_open(&clock), bucket(&clock, u32::MAX));
    let world = Arc::new(World::default());
    let inner = |request: u32| async move {
        match request % 5 {
            0 => Err(Down("called")),
            1 => pending().await,
            _ => Ok(request),
        }
    };
    let layer = GuardLayer::new((limiter.clone(), breaker.clone()));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let mut guard = layer.layer(Inner::new(&world, inner));
            let (layer, world, clock, breaker) = (&layer, &world, &clock, &breaker);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    assert!(poll_ready(&mut guard).is_ready());
                    assert!(probes(breaker) <= 1, "there is one slot");
                    drop(guard.call(thread + round).now_or_never());
                    match round % 7 {
                        0 => clock.advance(OPEN),
                        1 => guard = layer.layer(Inner::new(world, inner)),
                        _ => {}
                    }
                }
            });
        }
    });
    assert_eq!(probes(&breaker), 0);
    let total = breaker.status().metrics.total_requests;
    assert_eq!(
        total,
        u64::from(THREADS * ROUNDS) + 1,
        "each call once, and the failure that opened the circuit"
    );
    let status = limiter.status();
    assert_eq!(
        status.accepted_requests - status.returned_requests,
        world.calls() as u64
    );
}

/// A guard under a random life: readied, called, polled, dropped, cloned, panicking, while time passes and the inner service is
/// ready or not. Whatever happens, no more probes run than have slots, nothing leaks, and every call is counted once.
mod random {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        PollReady(usize),
        Call(usize, Fate),
        Poll(usize),
        Drop(usize),
        Replace(usize),
        Clone(usize, usize),
        Advance(u64),
        Pending(bool),
        Failing(bool),
        Force(u8),
    }

    #[derive(Debug, Clone, Copy)]
    enum Fate {
        Succeeds,
        Fails,
        PanicsInCall,
        PanicsInPoll,
        Hangs,
    }

    const GUARDS: usize = 4;
    const LEASE: Duration = Duration::from_secs(7);

    fn fate() -> impl Strategy<Value = Fate> {
        prop_oneof![
            Just(Fate::Succeeds),
            Just(Fate::Fails),
            Just(Fate::PanicsInCall),
            Just(Fate::PanicsInPoll),
            Just(Fate::Hangs),
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..GUARDS).prop_map(Step::PollReady),
            4 => (0..GUARDS, fate()).prop_map(|(guard, fate)| Step::Call(guard, fate)),
            4 => any::<usize>().prop_map(Step::Poll),
            2 => any::<usize>().prop_map(Step::Drop),
            1 => (0..GUARDS).prop_map(Step::Replace),
            1 => (0..GUARDS, 0..GUARDS).prop_map(|(from, to)| Step::Clone(from, to)),
            3 => (0u64..12).prop_map(Step::Advance),
            1 => any::<bool>().prop_map(Step::Pending),
            1 => prop::bool::weighted(0.2).prop_map(Step::Failing),
            1 => (0u8..16).prop_map(Step::Force),
        ]
    }

    type Running = std::pin::Pin<Box<dyn Future<Output = Result<u32, BoxError>>>>;

    /// How the service is told what a call shall do.
    fn scripted(fate: u32) -> std::pin::Pin<Box<dyn Future<Output = Result<u32, Down>>>> {
        match fate {
            0 => Box::pin(async { Ok(0) }),
            1 => Box::pin(async { Err(Down("called")) }),
            2 => panic!("in call"),
            3 => Box::pin(async { panic!("in poll") }),
            _ => Box::pin(pending()),
        }
    }

    proptest! {
        #[test]
        fn no_life_of_a_guard_leaks_a_slot_or_loses_a_call(
            steps in prop::collection::vec(step(), 1..120),
            slots in 1u32..4,
            seed_open in any::<bool>(),
        ) {
            let clock = Clock::manual();
            let breaker = CircuitBreaker::builder("search")
                .clock(&clock)
                .failure_threshold(2)
                .recovery_timeout(OPEN)
                .half_open_max_calls(slots)
                .success_threshold(slots)
                .probe_lease(LEASE)
                .build()
                .unwrap();
            let limiter = bucket(&clock, 1_000_000);
            let world = Arc::new(World::default());
            let layer = GuardLayer::new((limiter.clone(), breaker.clone()));
            let new = || layer.layer(Inner::new(&world, scripted));
            let mut guards: Vec<_> = (0..GUARDS).map(|_| (new(), false)).collect();
            let mut running: Vec<Running> = Vec::new();
            let (mut calls, mut unready, mut disabled) = (0u64, 0u64, false);
            if seed_open {
                for _ in 0..2 {
                    breaker.try_acquire().unwrap().settle(Outcome::Failure);
                }
                calls += 2;
            }
            for step in steps {
                match step {
                    Step::PollReady(at) => {
                        let (guard, ready) = &mut guards[at];
                        match poll_ready(guard) {
                            Poll::Ready(Ok(())) => *ready = true,
                            Poll::Ready(Err(_)) => { *ready = false; unready += 1 }
                            Poll::Pending => *ready = false,
                        }
                    }
                    Step::Call(at, fate) => {
                        let (guard, ready) = &mut guards[at];
                        if std::mem::take(ready) {
                            calls += 1;
                            let call = catch_unwind(AssertUnwindSafe(|| guard.call(fate as u32)));
                            running.extend(call.ok().map(|call| Box::pin(call) as Running));
                        }
                    }
                    Step::Poll(at) if !running.is_empty() => {
                        let at = at % running.len();
                        let mut cx = Context::from_waker(Waker::noop());
                        let done = catch_unwind(AssertUnwindSafe(|| running[at].as_mut().poll(&mut cx).is_ready()));
                        if done.unwrap_or(true) {
                            drop(running.swap_remove(at));
                        }
                    }
                    Step::Drop(at) if !running.is_empty() => drop(running.swap_remove(at % running.len())),
                    Step::Poll(_) | Step::Drop(_) => {}
                    Step::Replace(at) => guards[at] = (new(), false),
                    Step::Clone(from, to) => guards[to] = (guards[from].0.clone(), false),
                    Step::Advance(seconds) => clock.advance(Duration::from_secs(seconds)),
                    Step::Pending(pending) => world.set_pending(pending),
                    Step::Failing(failing) => world.set_failing(failing),
                    Step::Force(0) => breaker.force_open(),
                    Step::Force(1) => breaker.force_closed(),
                    Step::Force(2) => { breaker.disable(); disabled = true }
                    Step::Force(_) => breaker.reset(),
                }
                let held = probes(&breaker);
                prop_assert!(held <= slots as usize, "{held} probes hold {slots} slots after {step:?}");
            }
            drop(running);
            drop(guards);
            prop_assert_eq!(probes(&breaker), 0, "a slot leaked");
            let total = breaker.status().metrics.total_requests;
            prop_assert!(total <= calls + unready, "{total} counted of {} calls", calls + unready);
            prop_assert!(disabled || total == calls + unready, "{total} counted of {} calls", calls + unready);
            let status = limiter.status();
            prop_assert_eq!(status.accepted_requests - status.returned_requests, world.calls() as u64);
        }
    }
}

#[test]
fn a_readied_guard_keeps_its_probe_while_others_come_and_go() {
    let clock = Clock::manual();
    let breaker = CircuitBreaker::builder("search")
        .clock(&clock)
        .failure_threshold(1)
        .recovery_timeout(OPEN)
        .half_open_max_calls(2)
        .success_threshold(1)
        .build()
        .unwrap();
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    clock.advance(OPEN);
    let world = Arc::new(World::default());
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).layer(hanging(&world));
    assert!(poll_ready(&mut guard).is_ready());
    // A slot that is given up and taken anew has a lease from now on.
    clock.advance(OPEN / 2);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                breaker.try_acquire().expect("the other slot is free").unused();
            }
        });
        for _ in 0..500_000 {
            assert!(poll_ready(&mut guard).is_ready());
        }
        over.store(true, Ordering::SeqCst);
    });
    assert_eq!(probes(&breaker), 1, "the guard's");
    clock.advance(OPEN / 2);
    assert_eq!(probes(&breaker), 0, "its lease is the one that it was readied with");
}
