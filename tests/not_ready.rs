//! What a breaker promises that is not ready while it refuses: who waits, what wakes them, and that nothing is left behind.

use futures_util::FutureExt;
use portcullis::{
    CircuitBreaker, CircuitBreakerConfig, CircuitBreakerLayer, Clock, Guard, GuardLayer, ManualClock, Outcome,
    RateLimiter, Reason, Rejected, SlidingWindow, State,
    policy::{self, NotReady, Policy},
};
use std::{
    io,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::Duration,
};
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt,
    balance::p2c::Balance,
    discover::ServiceList,
    load::Constant,
    load_shed::error::Overloaded,
    retry::{self, RetryLayer},
    service_fn,
    timeout::error::Elapsed,
    util::rng::HasherRng,
};

const OPEN: Duration = Duration::from_secs(10);
const LEASE: Duration = Duration::from_secs(4);

// ---- The parts: breakers in each state, a service, a waker that counts ---------------------------------------------------

fn config() -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
        .failure_threshold(1)
        .recovery_timeout(OPEN)
        .half_open_max_calls(1)
        .success_threshold(1)
        .probe_lease(LEASE)
}

fn breaker(clock: impl Into<Clock>) -> CircuitBreaker {
    CircuitBreaker::builder("search")
        .config(config())
        .clock(clock)
        .build()
        .unwrap()
}

fn trip(breaker: &CircuitBreaker) {
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

/// Half-open, its only probe in the hands of somebody else.
fn full(clock: &ManualClock) -> (CircuitBreaker, portcullis::CircuitBreakerPermit) {
    let breaker = breaker(clock);
    trip(&breaker);
    clock.advance(OPEN);
    let probe = breaker.try_acquire().unwrap();
    assert_eq!(breaker.try_acquire().unwrap_err().reason, Reason::HalfOpenFull);
    (breaker, probe)
}

async fn plus_one(question: u32) -> io::Result<u32> {
    Ok(question + 1)
}

type Inner = tower::util::ServiceFn<fn(u32) -> std::future::Ready<io::Result<u32>>>;

fn inner() -> Inner {
    service_fn(|question| std::future::ready(Ok(question + 1)))
}

fn guard(breaker: &CircuitBreaker) -> Guard<Inner, NotReady> {
    CircuitBreakerLayer::new(breaker.clone()).not_ready().layer(inner())
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A guard and its task.
struct Waiter {
    guard: Guard<Inner, NotReady>,
    woken: Arc<Woken>,
}

impl Waiter {
    fn new(breaker: &CircuitBreaker) -> Self {
        Self {
            guard: guard(breaker),
            woken: Arc::default(),
        }
    }

    /// Whether the guard is ready.
    fn poll(&mut self) -> bool {
        let waker = Waker::from(self.woken.clone());
        let polled = self.guard.poll_ready(&mut Context::from_waker(&waker));
        polled.map(Result::unwrap).is_ready()
    }

    fn woken(&self) -> usize {
        self.woken.0.load(Ordering::SeqCst)
    }
}

fn rejected<T: std::fmt::Debug>(result: Result<T, BoxError>) -> Rejected {
    let error = result.unwrap_err();
    Rejected::find(&*error).expect("a rejection").clone()
}

// ---- What wakes those who wait -------------------------------------------------------------------------------------------

#[test]
fn the_end_of_the_open_time_wakes_a_waiter_that_then_holds_the_probe() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    trip(&breaker);
    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    clock.advance(OPEN.checked_sub(Duration::from_nanos(1)).unwrap());
    assert_eq!(waiter.woken(), 0, "the open time is not over");
    clock.advance(Duration::from_nanos(1));
    assert_eq!(waiter.woken(), 1);
    assert!(waiter.poll());
    assert_eq!(breaker.status().probes_in_flight, 1, "readiness holds the slot");
    assert_eq!(breaker.status().metrics.rejected_requests, 0, "nobody was rejected");
}

#[test]
fn the_end_of_a_lease_wakes_a_waiter() {
    let clock = Clock::manual();
    let (breaker, _probe) = full(&clock);
    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    clock.advance(LEASE.checked_sub(Duration::from_nanos(1)).unwrap());
    assert_eq!(waiter.woken(), 0);
    clock.advance(Duration::from_nanos(1));
    assert_eq!(waiter.woken(), 1);
    assert!(waiter.poll());
}

#[test]
fn a_freed_slot_wakes_a_waiter_however_it_is_freed() {
    type End = fn(portcullis::CircuitBreakerPermit);
    let ends: [(&str, End); 4] = [
        ("settled as ignored", |probe| probe.settle(Outcome::Ignored)),
        ("settled as success, which closes", |probe| {
            probe.settle(Outcome::Success);
        }),
        ("dropped", drop),
        ("not used", portcullis::CircuitBreakerPermit::unused),
    ];
    for (how, end) in ends {
        let clock = Clock::manual();
        let (breaker, probe) = full(&clock);
        let mut waiter = Waiter::new(&breaker);
        assert!(!waiter.poll());
        end(probe);
        assert_eq!(waiter.woken(), 1, "{how}");
        assert!(waiter.poll(), "{how}");
    }
}

#[test]
fn a_slot_that_a_readied_guard_gives_back_wakes_a_waiter() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    trip(&breaker);
    clock.advance(OPEN);
    let (mut first, mut second) = (Waiter::new(&breaker), Waiter::new(&breaker));
    assert!(first.poll() && !second.poll());
    drop(first);
    assert_eq!(second.woken(), 1);
    assert!(second.poll());
}

#[test]
fn overrides_and_resets_wake_waiters() {
    type Act = fn(&CircuitBreaker);
    let acts: [(&str, Act); 3] = [
        ("reset", CircuitBreaker::reset),
        ("forced closed", CircuitBreaker::force_closed),
        ("disabled", CircuitBreaker::disable),
    ];
    for (what, act) in acts {
        for forced in [false, true] {
            let clock = Clock::manual();
            let breaker = breaker(&clock);
            if forced {
                breaker.force_open();
            } else {
                trip(&breaker);
            }
            let mut waiter = Waiter::new(&breaker);
            assert!(!waiter.poll());
            act(&breaker);
            assert_eq!(waiter.woken(), 1, "{what}, forced open before: {forced}");
            assert!(waiter.poll(), "{what}, forced open before: {forced}");
        }
    }
}

#[test]
fn a_reconfiguration_that_makes_room_wakes_a_waiter() {
    let clock = Clock::manual();
    let (breaker, _probe) = full(&clock);
    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    breaker.reconfigure(config().failure_threshold(9)).unwrap();
    assert_eq!(waiter.woken(), 0, "no more room than before");
    breaker.reconfigure(config().half_open_max_calls(2)).unwrap();
    assert_eq!(waiter.woken(), 1);
    assert!(waiter.poll());
}

#[test]
fn somebody_else_who_finds_the_open_time_over_wakes_the_waiters() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    breaker.reconfigure(config().half_open_max_calls(2)).unwrap();
    trip(&breaker);
    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    // A waiter whose timer is late: it was set at a time that the clock had not reached yet.
    clock.advance(OPEN);
    let before = waiter.woken();
    let _probe = breaker.try_acquire().unwrap();
    assert_eq!(
        (before, waiter.woken()),
        (1, 2),
        "the clock, then the call that took the first slot"
    );
    assert!(waiter.poll());
}

#[test]
fn a_circuit_that_is_forced_open_while_they_wait_keeps_them_waiting_beyond_the_open_time() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    trip(&breaker);
    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    breaker.force_open();
    clock.advance(OPEN);
    assert!(!waiter.poll(), "nobody can tell when");
    let woken = waiter.woken();
    clock.advance(Duration::from_secs(86_400 * 365 * 50));
    assert_eq!(waiter.woken(), woken, "no timer runs");
    breaker.reset();
    assert_eq!(waiter.woken(), woken + 1);
    assert!(waiter.poll());
}

#[test]
fn a_waiter_is_woken_through_the_waker_of_its_last_poll() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    trip(&breaker);
    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    let before = std::mem::take(&mut waiter.woken);
    assert!(!waiter.poll());
    assert_eq!(
        Arc::strong_count(&before),
        1,
        "the old waker is gone, from the timer as well"
    );
    clock.advance(OPEN);
    assert_eq!((before.0.load(Ordering::SeqCst), waiter.woken()), (0, 1));
}

#[test]
fn after_another_trip_a_waiter_waits_for_the_new_open_time() {
    let clock = Clock::manual();
    let (breaker, probe) = full(&clock);
    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    clock.advance(Duration::from_secs(1));
    probe.settle(Outcome::Failure);
    assert!(!waiter.poll(), "open again");
    clock.advance(LEASE);
    assert_eq!(waiter.woken(), 0, "the lease that it waited for means nothing now");
    clock.advance(OPEN.saturating_sub(LEASE));
    assert_eq!(waiter.woken(), 1);
    assert!(waiter.poll());
}

// ---- Nothing happens: nobody is woken. And nothing is left -----------------------------------------------------------------

#[test]
fn nobody_is_woken_while_nothing_happens() {
    let clock = Clock::manual();
    let (breaker, probe) = full(&clock);
    let mut waiters: Vec<_> = (0..5).map(|_| Waiter::new(&breaker)).collect();
    for _ in 0..100 {
        assert!(waiters.iter_mut().all(|waiter| !waiter.poll()));
        breaker.try_acquire().unwrap_err();
        let _ = breaker.status();
    }
    assert!(waiters.iter().all(|waiter| waiter.woken() == 0));

    drop(probe);
    assert!(
        waiters.iter().all(|waiter| waiter.woken() == 1),
        "one slot is news to all"
    );
    let ready: Vec<bool> = waiters.iter_mut().map(Waiter::poll).collect();
    assert_eq!(ready, [true, false, false, false, false]);
    for _ in 0..100 {
        let ready = waiters
            .iter_mut()
            .filter_map(|waiter| waiter.poll().then_some(()))
            .count();
        assert_eq!(ready, 1, "the one that holds the slot");
    }
    assert!(
        waiters.iter().all(|waiter| waiter.woken() == 1),
        "those who found no room wait: they do not wake each other"
    );
}

#[test]
fn a_closed_circuit_wakes_nobody_and_keeps_no_waker() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut waiter = Waiter::new(&breaker);
    assert!(waiter.poll());
    assert_eq!(Arc::strong_count(&waiter.woken), 1);
    breaker.reset();
    breaker.try_acquire().unwrap().settle(Outcome::Success);
    assert_eq!(waiter.woken(), 0);
}

#[test]
fn dropped_waiters_leave_nothing() {
    let clock = Clock::manual();
    let (breaker, _probe) = full(&clock);
    let mut waiters: Vec<_> = (0..8).map(|_| Waiter::new(&breaker)).collect();
    assert!(waiters.iter_mut().all(|waiter| !waiter.poll()));
    let wakers: Vec<_> = waiters.iter().map(|waiter| waiter.woken.clone()).collect();
    assert!(wakers.iter().all(|woken| Arc::strong_count(woken) > 2), "registered");
    let clones: Vec<_> = waiters.iter().map(|waiter| waiter.guard.clone()).collect();
    drop(waiters);
    assert!(wakers.iter().all(|woken| Arc::strong_count(woken) == 1));
    breaker.reset();
    clock.advance(OPEN);
    assert!(wakers.iter().all(|woken| woken.0.load(Ordering::SeqCst) == 0));
    drop(clones);
}

#[test]
fn a_waiter_that_becomes_ready_leaves_the_list_and_stops_its_timer() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    trip(&breaker);
    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    breaker.reset();
    assert!(waiter.poll());
    assert_eq!(Arc::strong_count(&waiter.woken), 1);
    clock.advance(OPEN);
    assert_eq!(waiter.woken(), 1);
}

/// The last reference to a waiting guard lies in the waker of another.
struct Owner(Mutex<Option<Waiter>>);

impl Wake for Owner {
    fn wake(self: Arc<Self>) {
        drop(self.0.lock().unwrap().take());
    }
}

#[test]
fn a_waker_may_drop_another_waiter_when_it_is_woken_replaced_or_dropped() {
    let clock = Clock::manual();
    // Forced open no timer runs, and the list holds the last reference to the waker.
    for forced in [false, true] {
        let breaker = breaker(&clock);
        if forced {
            breaker.force_open();
        } else {
            trip(&breaker);
        }
        let owned = || {
            let mut waiter = Waiter::new(&breaker);
            assert!(!waiter.poll());
            let woken = waiter.woken.clone();
            (Waker::from(Arc::new(Owner(Mutex::new(Some(waiter))))), woken)
        };
        let (waker, replaced) = owned();
        let mut outer = guard(&breaker);
        assert!(outer.poll_ready(&mut Context::from_waker(&waker)).is_pending());
        drop(waker);
        let (waker, dropped) = owned();
        assert!(outer.poll_ready(&mut Context::from_waker(&waker)).is_pending());
        assert_eq!(Arc::strong_count(&replaced), 1, "went with its waker");
        drop(waker);
        drop(outer);
        assert_eq!(Arc::strong_count(&dropped), 1);

        let (waker, woken) = owned();
        let mut outer = guard(&breaker);
        assert!(outer.poll_ready(&mut Context::from_waker(&waker)).is_pending());
        drop(waker);
        breaker.reset();
        assert_eq!(Arc::strong_count(&woken), 1);
    }
}

#[test]
fn a_waker_may_use_the_breaker() {
    struct Probe(CircuitBreaker, AtomicBool);
    impl Wake for Probe {
        fn wake(self: Arc<Self>) {
            self.1.store(self.0.try_acquire().is_ok(), Ordering::SeqCst);
        }
    }
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    breaker.force_open();
    let probe = Arc::new(Probe(breaker.clone(), AtomicBool::new(false)));
    let mut guard = guard(&breaker);
    let waker = Waker::from(probe.clone());
    assert!(guard.poll_ready(&mut Context::from_waker(&waker)).is_pending());
    breaker.reset();
    assert!(
        probe.1.load(Ordering::SeqCst),
        "closed before anybody is woken, and no lock is held"
    );
}

// ---- Calls ---------------------------------------------------------------------------------------------------------------

#[test]
fn a_call_without_asking_is_rejected_and_counted_once() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    trip(&breaker);
    let call = guard(&breaker).call(1);
    let why = rejected(tokio_test::block_on(call));
    assert_eq!((why.reason, why.retry_after), (Reason::Open, Some(OPEN)));
    assert_eq!(breaker.status().metrics.rejected.open, 1);

    let mut waiter = Waiter::new(&breaker);
    assert!(!waiter.poll());
    let why = rejected(tokio_test::block_on(waiter.guard.call(1)));
    assert_eq!(why.reason, Reason::Open, "called while it waits");
    assert_eq!(breaker.status().metrics.rejected.open, 2);
    assert_eq!(Arc::strong_count(&waiter.woken), 1, "and it waits no more");
}

#[test]
fn a_call_without_asking_needs_no_runtime() {
    let breaker = breaker(Clock::system());
    trip(&breaker);
    let call = guard(&breaker).call(1).now_or_never();
    assert_eq!(rejected(call.expect("nobody waits")).reason, Reason::Open);
    // Nor does a breaker that is picked for each request, and so is never asked before.
    let not_ready = NotReady::new(breaker);
    let picked = policy::select(move |_: &u32| Some(not_ready.clone()));
    let call = GuardLayer::new(picked).layer(inner()).oneshot(1).now_or_never();
    assert_eq!(rejected(call.expect("nobody waits")).reason, Reason::Open);
}

#[test]
fn a_call_that_was_promised_nothing_is_rejected_when_the_circuit_opened_meanwhile() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut waiter = Waiter::new(&breaker);
    assert!(waiter.poll());
    trip(&breaker);
    let why = rejected(tokio_test::block_on(waiter.guard.call(1)));
    assert_eq!(why.reason, Reason::Open);
    assert_eq!(breaker.status().metrics.rejected.open, 1);
    assert!(!waiter.poll(), "and then it waits");
}

#[test]
fn a_readied_guard_that_is_asked_again_after_a_trip_waits() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut waiter = Waiter::new(&breaker);
    assert!(waiter.poll());
    trip(&breaker);
    assert!(!waiter.poll());
    clock.advance(OPEN);
    assert!(waiter.poll());
    assert_eq!(tokio_test::block_on(waiter.guard.call(1)).unwrap(), 2);
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn a_readied_guard_whose_probe_is_overtaken_by_another_trip_waits_and_holds_no_slot() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let config = config().half_open_max_calls(2).probe_lease(OPEN * 10);
    breaker.reconfigure(config).unwrap();
    trip(&breaker);
    clock.advance(OPEN);
    let (mut asked, mut called) = (Waiter::new(&breaker), Waiter::new(&breaker));
    assert!(asked.poll());
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    assert!(!asked.poll());
    assert_eq!(breaker.status().probes_in_flight, 0);
    clock.advance(OPEN);
    assert_eq!(asked.woken(), 1);

    assert!(called.poll());
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    let why = rejected(tokio_test::block_on(called.guard.call(1)));
    assert_eq!((why.reason, why.retry_after), (Reason::Open, Some(OPEN)));
    assert_eq!(breaker.status().probes_in_flight, 0);
}

#[test]
fn a_probe_whose_lease_ended_while_its_guard_was_ready_waits_behind_the_one_that_took_its_place() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    trip(&breaker);
    clock.advance(OPEN);
    let (mut late, mut next) = (Waiter::new(&breaker), Waiter::new(&breaker));
    assert!(late.poll() && !next.poll());
    clock.advance(LEASE);
    assert_eq!(next.woken(), 1);
    assert!(next.poll() && !late.poll());
    assert_eq!(tokio_test::block_on(next.guard.call(1)).unwrap(), 2);
    assert_eq!(late.woken(), 1, "the probe closed the circuit");
    assert!(late.poll());
}

#[test]
fn in_a_pair_the_other_policy_still_rejects_and_the_pair_waits() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let limiter = RateLimiter::builder("search", SlidingWindow::new(1, Duration::from_secs(60)))
        .clock(&clock)
        .build()
        .unwrap();
    let layer = GuardLayer::new((limiter.clone(), NotReady::new(breaker.clone())));
    let mut guard = layer.layer(inner());
    trip(&breaker);
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    let cx = &mut Context::from_waker(&waker);
    assert!(guard.poll_ready(cx).is_pending());
    clock.advance(OPEN);
    assert!(guard.poll_ready(cx).is_ready());
    assert_eq!(tokio_test::block_on(guard.call(1)).unwrap(), 2);
    assert!(guard.poll_ready(cx).is_ready());
    assert_eq!(rejected(tokio_test::block_on(guard.call(1))).reason, Reason::OverLimit);
    assert_eq!(limiter.status().rejected.over_limit, 1);

    // Called all the same, as tower forbids: the breaker refuses, and counts it.
    clock.advance(Duration::from_secs(60));
    breaker.force_open();
    assert!(guard.poll_ready(cx).is_pending());
    assert_eq!(rejected(tokio_test::block_on(guard.call(1))).reason, Reason::ForcedOpen);
    let rejections = (
        breaker.status().metrics.rejected_requests,
        limiter.status().rejected_requests,
    );
    assert_eq!(rejections, (1, 1));
    breaker.reset();

    let mut two = GuardLayer::new((NotReady::new(breaker.clone()), NotReady::new(breaker.clone()))).layer(inner());
    breaker.force_open();
    assert!(two.poll_ready(cx).is_pending());
    drop(two);
    drop(guard);
    drop(waker);
    assert_eq!(Arc::strong_count(&woken), 1);
}

#[test]
fn an_inner_service_that_fails_to_become_ready_settles_the_probe() {
    struct Never;
    impl Service<u32> for Never {
        type Response = u32;
        type Error = io::Error;
        type Future = std::future::Ready<io::Result<u32>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into()))
        }
        fn call(&mut self, _: u32) -> Self::Future {
            unreachable!("never ready")
        }
    }
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    trip(&breaker);
    clock.advance(OPEN);
    let mut guard = CircuitBreakerLayer::new(breaker.clone()).not_ready().layer(Never);
    let cx = &mut Context::from_waker(Waker::noop());
    assert!(matches!(guard.poll_ready(cx), Poll::Ready(Err(_))));
    assert_eq!(breaker.state(), State::Open);
    assert!(guard.poll_ready(cx).is_pending());
}

#[test]
fn such_a_guard_is_send_and_sync_and_its_policy_is_one_for_any_request() {
    fn check<P: Policy<u32> + Policy<String> + Clone + Send + Sync + 'static>(_: &P)
    where
        P::Reserved: Send + Sync,
    {
    }
    fn check_guard<S: Service<u32, Future: Send> + Clone + Send + Sync + 'static>(_: &S) {}
    let breaker = breaker(Clock::system());
    check(&NotReady::new(breaker.clone()));
    check_guard(&guard(&breaker));
}

#[cfg(feature = "http")]
#[test]
fn the_end_of_a_probes_stream_wakes_a_waiter_and_its_head_does_not() {
    use http::{Request, Response};
    use http_body_util::{BodyExt, Full};
    for dropped in [false, true] {
        let clock = Clock::manual();
        let breaker = breaker(&clock);
        trip(&breaker);
        clock.advance(OPEN);
        let layer = CircuitBreakerLayer::http(breaker.clone()).not_ready();
        let inner = service_fn(|_: Request<()>| {
            std::future::ready(Ok::<_, io::Error>(Response::new(Full::<bytes::Bytes>::from("hi"))))
        });
        let (mut probe, mut other) = (layer.layer(inner), layer.layer(inner));
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let cx = &mut Context::from_waker(&waker);
        assert!(probe.poll_ready(cx).is_ready() && other.poll_ready(cx).is_pending());
        let answer = tokio_test::block_on(probe.call(Request::new(()))).unwrap();
        assert!(other.poll_ready(cx).is_pending(), "the stream runs");
        assert_eq!(woken.0.load(Ordering::SeqCst), 0);
        if dropped {
            drop(answer);
        } else {
            tokio_test::block_on(answer.into_body().collect()).unwrap();
        }
        assert_eq!(woken.0.load(Ordering::SeqCst), 1, "dropped: {dropped}");
        assert!(other.poll_ready(cx).is_ready());
        let state = if dropped { State::HalfOpen } else { State::Closed };
        assert_eq!(breaker.state(), state, "dropped: {dropped}");
    }
}

// ---- Threads ---------------------------------------------------------------------------------------------------------------

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Blocks until the guard is ready; a wake-up that is lost blocks for ever.
fn wait(guard: &mut impl Service<u32>) {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    while guard.poll_ready(&mut Context::from_waker(&waker)).is_pending() {
        thread::park();
    }
}

#[test]
fn two_threads_hand_one_slot_to_each_other_and_lose_no_wake_up() {
    const TURNS: usize = 5_000;
    let clock = Clock::manual();
    let (breaker, probe) = full(&clock);
    let busy = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let layer = CircuitBreakerLayer::new(breaker.clone()).not_ready();
                let mut guard = layer.layer(inner());
                for _ in 0..TURNS {
                    wait(&mut guard);
                    assert_eq!(busy.fetch_add(1, Ordering::SeqCst), 0, "one slot, one holder");
                    busy.fetch_sub(1, Ordering::SeqCst);
                    // Given back unused: the circuit stays half-open, and the clock, which stands still, ends no lease.
                    guard = guard.clone();
                }
            });
        }
        drop(probe);
    });
    assert_eq!(breaker.state(), State::HalfOpen);
    assert_eq!(breaker.status().probes_in_flight, 0);
}

#[test]
fn two_threads_hear_of_every_reset() {
    const TURNS: usize = 2_000;
    let breaker = breaker(Clock::manual());
    let rounds = Barrier::new(3);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut guard = guard(&breaker);
                for _ in 0..TURNS {
                    rounds.wait();
                    wait(&mut guard);
                    rounds.wait();
                }
            });
        }
        for _ in 0..TURNS {
            breaker.force_open();
            rounds.wait();
            breaker.reset();
            rounds.wait();
        }
    });
}

/// A reproducible source of randomness (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

#[test]
fn threads_that_wait_call_give_up_and_pass_their_guards_on_lose_no_wake_up() {
    const SEED: u64 = 0x5EED_0F0A_CEA5_E1E5;
    const TURNS: usize = 3_000;
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    breaker.reconfigure(config().half_open_max_calls(2)).unwrap();
    trip(&breaker);
    // The clock stands still from here, and the circuit stays half-open: no timer helps who was not woken.
    clock.advance(OPEN);
    let layer = CircuitBreakerLayer::new(breaker.clone())
        .classify(|_: &io::Result<u32>| Outcome::Ignored)
        .not_ready();
    let guard = || layer.layer(inner());
    let (busy, passed_on) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for task in 1..=4 {
            let (guard, busy, passed_on) = (&guard, &busy, &passed_on);
            scope.spawn(move || {
                let waker = Waker::from(Arc::new(Unpark(thread::current())));
                let cx = &mut Context::from_waker(&waker);
                let mut dice = Dice(SEED ^ task);
                let mut own = guard();
                for _ in 0..TURNS {
                    match dice.roll(6) {
                        // Gives up, perhaps with a wake-up that was meant for it, perhaps with a slot.
                        0 => {
                            let _ = own.poll_ready(cx);
                            own = guard();
                        }
                        // Passes its guard on while it waits or is ready, and takes one over from another thread.
                        1 => {
                            let _ = own.poll_ready(cx);
                            let mut passed_on = passed_on.lock().unwrap();
                            let other = passed_on.pop().unwrap_or_else(guard);
                            passed_on.push(std::mem::replace(&mut own, other));
                        }
                        how => {
                            // Else slots might lie there for which nobody works.
                            passed_on.lock().unwrap().clear();
                            wait(&mut own);
                            assert!(busy.fetch_add(1, Ordering::SeqCst) < 2, "seed {SEED:#x}: two slots");
                            busy.fetch_sub(1, Ordering::SeqCst);
                            match how {
                                2 => own = guard(),
                                3 => drop(own.call(1)),
                                _ => assert_eq!(tokio_test::block_on(own.call(1)).unwrap(), 2),
                            }
                        }
                    }
                }
                passed_on.lock().unwrap().clear();
            });
        }
    });
    let status = breaker.status();
    assert_eq!(
        (status.state, status.probes_in_flight, status.metrics.rejected_requests),
        (State::HalfOpen, 0, 0),
        "seed {SEED:#x}"
    );
}

// ---- tokio's time, and tower's middleware ----------------------------------------------------------------------------------

/// Counts the questions that a service is asked, to see that nobody spins.
#[derive(Clone)]
struct Asked<S>(S, Arc<AtomicUsize>);

impl<S: Service<u32>> Service<u32> for Asked<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.poll_ready(cx)
    }
    fn call(&mut self, question: u32) -> S::Future {
        self.0.call(question)
    }
}

#[tokio::test(start_paused = true)]
async fn the_timer_of_tokio_readies_a_waiter_at_probe_time_without_spinning() {
    let breaker = breaker(Clock::system());
    trip(&breaker);
    let asked = Arc::default();
    let mut service = Asked(guard(&breaker), Arc::clone(&asked));
    let begun = breaker.clock().now();
    assert_eq!(service.ready().await.unwrap().call(1).await.unwrap(), 2);
    let waited = breaker.clock().now().duration_since(begun);
    assert!(
        (OPEN..OPEN + Duration::from_millis(2)).contains(&waited),
        "{waited:?}: tokio rounds up to its millisecond"
    );
    assert!(asked.load(Ordering::SeqCst) <= 3, "asked {asked:?} times");
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn a_waiter_that_outlives_its_runtime_goes_on_waiting_in_another() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
    };
    for idle in [false, true] {
        let breaker = breaker(Clock::system());
        trip(&breaker);
        let mut guard = guard(&breaker);
        let first = runtime();
        first.block_on(async { assert!(guard.ready().now_or_never().is_none()) });
        // Shut down, or there and driven by nobody.
        let _idle = idle.then_some(first);
        let answer = runtime().block_on(async { guard.ready().await.unwrap().call(1).await });
        assert_eq!(answer.unwrap(), 2, "idle: {idle}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_balancer_spares_an_endpoint_whose_circuit_is_open_probes_it_and_sends_it_traffic_again() {
    let broken = Arc::new(AtomicBool::new(true));
    let breakers: [CircuitBreaker; 3] = std::array::from_fn(|_| breaker(Clock::system()));
    let calls: [Arc<AtomicUsize>; 3] = std::array::from_fn(|_| Arc::default());
    let endpoints = std::array::from_fn::<_, 3, _>(|i| {
        let (calls, broken) = (calls[i].clone(), broken.clone());
        let service = service_fn(move |question: u32| {
            calls.fetch_add(1, Ordering::SeqCst);
            let fails = i == 0 && broken.load(Ordering::SeqCst);
            async move {
                if fails {
                    Err(io::Error::other("down"))
                } else {
                    Ok(question + 1)
                }
            }
        });
        let layer = CircuitBreakerLayer::new(breakers[i].clone()).not_ready();
        // The broken one has the least load: a balancer prefers it whenever it is ready.
        Constant::new(layer.layer(service), u32::from(i != 0))
    });
    let seed = 7;
    let rng = HasherRng::with_hasher(SeedHasher(seed));
    let mut balance = Balance::from_rng(ServiceList::new(endpoints), rng);
    let mut ask = async |questions: usize| {
        let before: [usize; 3] = std::array::from_fn(|i| calls[i].load(Ordering::SeqCst));
        let mut failed = 0;
        for _ in 0..questions {
            failed += usize::from(balance.ready().await.unwrap().call(1).await.is_err());
        }
        (
            std::array::from_fn(|i| calls[i].load(Ordering::SeqCst) - before[i]),
            failed,
        )
    };

    let (_, failed) = ask(30).await;
    assert_eq!(failed, 1, "seed {seed}: the one that opened the circuit");
    let ([first, second, third], failed): ([usize; 3], _) = ask(300).await;
    assert_eq!(
        (first, failed),
        (0, 0),
        "seed {seed}: no traffic while open, and no rejection"
    );
    assert!(second > 0 && third > 0, "seed {seed}: {second} and {third}");
    assert_eq!(breakers[0].status().metrics.rejected_requests, 0);

    tokio::time::advance(OPEN + Duration::from_millis(1)).await;
    let ([first, ..], failed) = ask(30).await;
    assert_eq!((first, failed), (1, 1), "seed {seed}: one probe, which failed");
    assert_eq!(breakers[0].state(), State::Open);

    broken.store(false, Ordering::SeqCst);
    tokio::time::advance(OPEN + Duration::from_millis(1)).await;
    let ([first, ..], failed) = ask(30).await;
    assert_eq!(failed, 0, "seed {seed}");
    assert_eq!(breakers[0].state(), State::Closed);
    assert!(first > 5, "seed {seed}: {first} of 30 after it closed");
}

#[derive(Clone)]
struct SeedHasher(u64);

impl std::hash::BuildHasher for SeedHasher {
    type Hasher = std::hash::DefaultHasher;
    fn build_hasher(&self) -> Self::Hasher {
        let mut hasher = Self::Hasher::new();
        std::hash::Hasher::write_u64(&mut hasher, self.0);
        hasher
    }
}

#[tokio::test(start_paused = true)]
async fn a_balancer_with_no_endpoint_ready_waits_for_the_first_probe() {
    let breakers: [CircuitBreaker; 2] = std::array::from_fn(|_| breaker(Clock::system()));
    breakers.iter().for_each(trip);
    let endpoints = breakers.iter().map(|breaker| Constant::new(guard(breaker), 1));
    let mut balance = Balance::new(ServiceList::new(endpoints));
    let begun = breakers[0].clock().now();
    assert_eq!(balance.ready().await.unwrap().call(1).await.unwrap(), 2);
    assert!(breakers[0].clock().now().duration_since(begun) >= OPEN);
}

#[tokio::test(start_paused = true)]
async fn a_buffer_keeps_its_requests_until_the_circuit_admits() {
    let breaker = breaker(Clock::system());
    trip(&breaker);
    let service = ServiceBuilder::new().buffer(8).service(guard(&breaker));
    let calls = (0..3).map(|question| tokio::spawn(service.clone().oneshot(question)));
    for (call, answer) in calls.collect::<Vec<_>>().into_iter().zip(1..) {
        assert_eq!(call.await.unwrap().unwrap(), answer);
    }
    assert_eq!(breaker.status().metrics.rejected_requests, 0);
}

#[tokio::test(start_paused = true)]
async fn load_shed_sheds_what_would_wait() {
    let breaker = breaker(Clock::system());
    trip(&breaker);
    let service = ServiceBuilder::new().load_shed().service(guard(&breaker));
    let error = service.clone().oneshot(1).await.unwrap_err();
    assert!(error.is::<Overloaded>(), "{error}");
    assert_eq!(
        breaker.status().metrics.rejected_requests,
        0,
        "the breaker rejected nothing"
    );
    breaker.reset();
    assert_eq!(service.oneshot(1).await.unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_waiting_guard_takes_nothing_of_a_concurrency_limit_inside_and_one_permit_of_one_outside() {
    let breaker = breaker(Clock::system());
    trip(&breaker);
    let limit = tower::limit::GlobalConcurrencyLimitLayer::new(1);
    let waits = CircuitBreakerLayer::new(breaker.clone()).not_ready();
    let mut waiting = waits.clone().layer(limit.layer(service_fn(plus_one)));
    let cx = &mut Context::from_waker(Waker::noop());
    assert!(waiting.poll_ready(cx).is_pending());
    let free = limit.layer(service_fn(plus_one));
    assert_eq!(free.oneshot(1).await.unwrap(), 2, "the inner limit is free");

    breaker.reset();
    assert!(waiting.poll_ready(cx).is_ready());
    trip(&breaker);
    assert!(waiting.poll_ready(cx).is_pending());
    let mut other = limit.layer(service_fn(plus_one));
    assert!(other.poll_ready(cx).is_pending(), "what was ready before stays ready");
    drop((waiting, other));

    let mut outside = limit.layer(waits.layer(service_fn(plus_one)));
    assert!(outside.poll_ready(cx).is_pending());
    let mut other = limit.layer(service_fn(plus_one));
    assert!(
        other.poll_ready(cx).is_pending(),
        "tower's limit takes its permit first"
    );
    drop(outside);
    assert_eq!(other.ready().await.unwrap().call(1).await.unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_around_the_layer_does_not_end_a_wait_to_be_ready_and_one_around_the_whole_call_does() {
    let breaker = breaker(Clock::system());
    trip(&breaker);
    let second = Duration::from_secs(1);
    let service = ServiceBuilder::new().timeout(second).service(guard(&breaker));
    assert_eq!(
        service.oneshot(1).await.unwrap(),
        2,
        "tower's clock starts with the call"
    );

    trip(&breaker);
    let woken = tokio::time::timeout(second, guard(&breaker).oneshot(1)).await;
    assert!(woken.is_err());
    // A buffer between them makes the wait part of the call.
    let service = ServiceBuilder::new().timeout(second).buffer(1).service(guard(&breaker));
    let error = service.oneshot(1).await.unwrap_err();
    assert!(error.is::<Elapsed>(), "{error}");
    tokio::time::advance(OPEN).await;
    assert_eq!(
        guard(&breaker).oneshot(1).await.unwrap(),
        2,
        "who gave up holds no slot"
    );
}

#[derive(Clone)]
struct Twice(usize);

impl retry::Policy<u32, u32, BoxError> for Twice {
    type Future = std::future::Ready<()>;
    fn retry(&mut self, _: &mut u32, result: &mut Result<u32, BoxError>) -> Option<Self::Future> {
        self.0 = self.0.checked_sub(usize::from(result.is_err()))?;
        result.is_err().then(|| std::future::ready(()))
    }
    fn clone_request(&mut self, question: &u32) -> Option<u32> {
        Some(*question)
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_around_the_layer_waits_until_the_circuit_probes() {
    let breaker = breaker(Clock::system());
    let calls = AtomicUsize::new(0);
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(Twice(1)))
        .layer(CircuitBreakerLayer::new(breaker.clone()).not_ready())
        .service(service_fn(|question: u32| {
            let first = calls.fetch_add(1, Ordering::SeqCst) == 0;
            async move {
                if first {
                    Err(io::Error::other("down"))
                } else {
                    Ok(question + 1)
                }
            }
        }));
    let begun = breaker.clock().now();
    assert_eq!(service.oneshot(1).await.unwrap(), 2, "the second attempt is the probe");
    assert!(breaker.clock().now().duration_since(begun) >= OPEN);
    assert_eq!(breaker.status().metrics.rejected_requests, 0);
}
