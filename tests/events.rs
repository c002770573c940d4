//! Events: what reaches listeners and subscriptions, what a bad listener can do (nothing), and when a queue ends.

use futures_util::FutureExt;
use portcullis::{
    Adaptive, CircuitBreaker, CircuitBreakerConfig, Clock, Event, EventKind, Events, ManualClock, Outcome, Override,
    RateLimiter, Reason, Registry, Rejected, State, Timestamp, TokenBucket, Verdict,
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};
use tokio_test::{assert_pending, assert_ready, assert_ready_eq, task};

const MINUTE: Duration = Duration::from_secs(60);

fn config() -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
}

/// A breaker that trips on the first failure, recovers on the first success and lets one probe through.
fn brittle() -> CircuitBreakerConfig {
    config()
        .failure_threshold(1)
        .success_threshold(1)
        .half_open_max_calls(1)
}

fn breaker(clock: &ManualClock) -> CircuitBreaker {
    CircuitBreaker::builder("search")
        .config(brittle())
        .clock(clock)
        .build()
        .unwrap()
}

fn limiter(clock: &ManualClock, algorithm: impl Into<portcullis::Algorithm>) -> RateLimiter {
    RateLimiter::builder("search", algorithm)
        .limit("daily")
        .clock(clock)
        .build()
        .unwrap()
}

fn settle(breaker: &CircuitBreaker, outcome: Outcome) {
    breaker.try_acquire().expect("the circuit admits").settle(outcome);
}

/// What a listener heard, in order.
type Heard = Arc<Mutex<Vec<Event>>>;

fn recorder() -> (Heard, impl Fn(&Event) + Send + Sync + 'static) {
    let heard = Heard::default();
    let record = {
        let heard = heard.clone();
        move |event: &Event| heard.lock().unwrap().push(event.clone())
    };
    (heard, record)
}

fn take(heard: &Heard) -> Vec<Event> {
    std::mem::take(&mut heard.lock().unwrap())
}

fn drain(events: &mut Events) -> Vec<Event> {
    std::iter::from_fn(|| events.try_recv()).collect()
}

fn kinds(events: &[Event]) -> Vec<EventKind> {
    events.iter().map(|event| event.kind.clone()).collect()
}

fn transition(from: State, to: State, generation: u64) -> EventKind {
    EventKind::Transition { from, to, generation }
}

/// Every way of hearing of a breaker or limiter in a registry: a listener and a queue of its own, and of the registry.
struct Ears {
    own: Heard,
    registry: Heard,
    own_queue: Events,
    registry_queue: Events,
}

impl Ears {
    fn of_breaker(breaker: &CircuitBreaker) -> Self {
        let registry = Registry::new();
        let (heard, record) = recorder();
        registry.on_event(record);
        let registry_queue = registry.subscribe(64);
        registry.register(breaker).unwrap();
        let (own, record) = recorder();
        breaker.on_event(record);
        Self {
            own,
            registry: heard,
            own_queue: breaker.subscribe(64),
            registry_queue,
        }
    }

    fn of_limiter(limiter: &RateLimiter) -> Self {
        let registry = Registry::new();
        registry.register(limiter).unwrap();
        let (heard, record) = recorder();
        registry.on_event(record);
        let (own, record) = recorder();
        limiter.on_event(record);
        Self {
            own,
            registry: heard,
            own_queue: limiter.subscribe(64),
            registry_queue: registry.subscribe(64),
        }
    }

    /// What all of them heard: the same.
    #[track_caller]
    fn take(&mut self) -> Vec<Event> {
        let heard = take(&self.own);
        assert_eq!(
            take(&self.registry),
            heard,
            "the registry's listener hears what the own one does"
        );
        assert_eq!(drain(&mut self.own_queue), heard, "a queue holds what a listener hears");
        assert_eq!(
            drain(&mut self.registry_queue),
            heard,
            "and so does a queue of the registry"
        );
        heard
    }

    /// What all of them heard, of which each tells the service, the limit and the time.
    #[track_caller]
    fn take_at(&mut self, limit: Option<&str>, at: Timestamp) -> Vec<EventKind> {
        let heard = self.take();
        for event in &heard {
            assert_eq!(event.service, "search", "an event names its service");
            assert_eq!(event.limit.as_deref(), limit, "an event names its limit");
            assert_eq!(event.at, at, "an event tells when it happened: {event:?}");
        }
        kinds(&heard)
    }
}

#[test]
fn every_transition_of_a_circuit_is_heard_in_order() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut ears = Ears::of_breaker(&breaker);
    settle(&breaker, Outcome::Success);
    assert_eq!(ears.take(), [], "nothing moves, nothing is heard");

    settle(&breaker, Outcome::Failure);
    let opened = transition(State::Closed, State::Open, 2);
    assert_eq!(ears.take_at(None, clock.now()), [opened]);

    clock.advance(MINUTE);
    let due = clock.now();
    clock.advance(MINUTE);
    let probe = breaker.try_acquire().unwrap();
    let half_open = transition(State::Open, State::HalfOpen, 3);
    assert_eq!(
        ears.take_at(None, due),
        [half_open],
        "it carries the instant at which it was due"
    );

    probe.settle(Outcome::Failure);
    let reopened = transition(State::HalfOpen, State::Open, 4);
    assert_eq!(ears.take_at(None, clock.now()), [reopened]);

    clock.advance(MINUTE);
    settle(&breaker, Outcome::Success);
    let recovered = [
        transition(State::Open, State::HalfOpen, 5),
        transition(State::HalfOpen, State::Closed, 6),
    ];
    assert_eq!(ears.take_at(None, clock.now()), recovered);
}

#[test]
fn a_transition_that_is_due_is_heard_before_what_made_it_real() {
    type Intervention = (fn(&CircuitBreaker), EventKind);
    let generation = 4;
    let interventions: [Intervention; 5] = [
        (CircuitBreaker::reset, EventKind::Reset { generation }),
        (
            CircuitBreaker::force_open,
            EventKind::Overridden {
                into: Override::ForcedOpen,
                generation,
            },
        ),
        (
            CircuitBreaker::force_closed,
            EventKind::Overridden {
                into: Override::ForcedClosed,
                generation,
            },
        ),
        (
            CircuitBreaker::disable,
            EventKind::Overridden {
                into: Override::Disabled,
                generation,
            },
        ),
        (
            |breaker| breaker.reconfigure(config()).unwrap(),
            EventKind::Reconfigured { generation },
        ),
    ];
    for (intervene, event) in interventions {
        let clock = Clock::manual();
        let breaker = breaker(&clock);
        settle(&breaker, Outcome::Failure);
        clock.advance(MINUTE);
        let mut ears = Ears::of_breaker(&breaker);
        intervene(&breaker);
        assert_eq!(
            ears.take_at(None, clock.now()),
            [transition(State::Open, State::HalfOpen, 3), event]
        );
    }
}

/// Seated or not, by a call that is settled or dropped.
#[test]
fn who_hears_of_a_transition_sees_the_call_that_made_it_counted() {
    let clock = Clock::manual();
    let others: Vec<_> = (0..300).map(|_| breaker(&clock)).collect();
    let standing = breaker(&clock);
    drop(others);
    for breaker in [breaker(&clock), standing] {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let listener = breaker.on_event({
            let (breaker, seen) = (breaker.clone(), seen.clone());
            move |_| {
                let metrics = breaker.status().metrics;
                let ended = (metrics.failed_requests, metrics.successful_requests);
                seen.lock().unwrap().push(ended);
            }
        });
        settle(&breaker, Outcome::Failure);
        clock.advance(MINUTE);
        settle(&breaker, Outcome::Success);
        let cancelled_fails = brittle().cancelled(Outcome::Failure);
        breaker.reconfigure(cancelled_fails).unwrap();
        drop(breaker.try_acquire().unwrap());
        // To open, half-open, closed, reconfigured, open.
        assert_eq!(*seen.lock().unwrap(), [(1, 0), (1, 0), (1, 1), (1, 1), (2, 1)]);
        breaker.remove_listener(listener);
    }
}

#[test]
fn resets_overrides_and_reconfigurations_are_heard() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut ears = Ears::of_breaker(&breaker);
    clock.advance(MINUTE);
    breaker.force_open();
    breaker.force_closed();
    breaker.disable();
    breaker.reset();
    breaker.reconfigure(config().failure_threshold(7)).unwrap();
    breaker.reconfigure(config().failure_threshold(0)).unwrap_err();
    let expected = [
        EventKind::Overridden {
            into: Override::ForcedOpen,
            generation: 2,
        },
        EventKind::Overridden {
            into: Override::ForcedClosed,
            generation: 3,
        },
        EventKind::Overridden {
            into: Override::Disabled,
            generation: 4,
        },
        EventKind::Reset { generation: 5 },
        EventKind::Reconfigured { generation: 6 },
    ];
    assert_eq!(
        ears.take_at(None, clock.now()),
        expected,
        "and a refused config is no event"
    );
}

#[test]
fn every_rejection_by_a_circuit_is_heard_once_as_the_caller_got_it() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    settle(&breaker, Outcome::Failure);
    let mut ears = Ears::of_breaker(&breaker);
    clock.advance(MINUTE / 2);
    let open = breaker.try_acquire().unwrap_err();
    assert_eq!((open.reason, open.retry_after), (Reason::Open, Some(MINUTE / 2)));
    assert_eq!(ears.take_at(None, clock.now()), [EventKind::Rejected(open)]);

    clock.advance(MINUTE);
    let probe = breaker.try_acquire().unwrap();
    ears.take();
    let full = breaker.try_acquire().unwrap_err();
    assert_eq!(full.reason, Reason::HalfOpenFull);
    assert_eq!(ears.take_at(None, clock.now()), [EventKind::Rejected(full)]);
    drop(probe);

    breaker.force_open();
    ears.take();
    let forced = breaker.try_acquire().unwrap_err();
    assert_eq!((forced.reason, forced.retry_after), (Reason::ForcedOpen, None));
    let by_call = breaker
        .call(async { Ok::<_, Rejected>(()) })
        .now_or_never()
        .unwrap()
        .unwrap_err();
    let expected = [
        EventKind::Rejected(forced),
        EventKind::Rejected(by_call.rejected().unwrap().clone()),
    ];
    assert_eq!(ears.take_at(None, clock.now()), expected);
}

#[test]
fn every_rejection_by_a_limit_is_heard_once_as_the_caller_got_it() {
    let clock = Clock::manual();
    let limiter = limiter(&clock, TokenBucket::new(2, MINUTE));
    let mut ears = Ears::of_limiter(&limiter);
    clock.advance(MINUTE);
    limiter.try_acquire_n(2).unwrap();
    assert_eq!(ears.take(), [], "an admission is no event");
    let over = limiter.try_acquire().unwrap_err();
    let too_much = limiter.try_acquire_n(3).unwrap_err();
    let no_time = limiter
        .acquire_within(1, MINUTE / 4)
        .now_or_never()
        .expect("refused at once")
        .unwrap_err();
    let never = limiter
        .acquire_n(3)
        .now_or_never()
        .expect("refused at once")
        .unwrap_err();
    assert_eq!(over.reason, Reason::OverLimit);
    assert_eq!(too_much.reason, Reason::CostExceedsBurst { cost: 3, burst: 2 });
    let expected = [over, too_much, no_time, never].map(EventKind::Rejected);
    assert_eq!(ears.take_at(Some("daily"), clock.now()), expected);
}

#[test]
fn a_wait_that_runs_out_is_heard_as_one_rejection() {
    let clock = Clock::manual();
    let limiter = limiter(&clock, TokenBucket::new(2, 2 * MINUTE));
    let mut ears = Ears::of_limiter(&limiter);
    let call = limiter.try_acquire_n(2).unwrap();
    let mut wait = task::spawn(limiter.acquire_within(1, MINUTE));
    assert_pending!(wait.poll(), "its turn comes in a minute");
    call.settle(Verdict::new(Outcome::Success).cost(3));
    clock.advance(MINUTE / 2);
    assert_eq!(ears.take(), [], "who waits is not rejected");
    clock.advance(MINUTE / 2);
    let rejected = assert_ready!(wait.poll()).expect_err("the call cost more than it said");
    assert_eq!(rejected.retry_after, Some(MINUTE));
    assert_eq!(
        ears.take_at(Some("daily"), clock.now()),
        [EventKind::Rejected(rejected)]
    );
}

#[test]
fn a_wait_that_is_given_up_is_no_rejection() {
    let clock = Clock::manual();
    let limiter = limiter(&clock, TokenBucket::new(1, MINUTE));
    limiter.try_acquire().unwrap();
    let mut ears = Ears::of_limiter(&limiter);
    let mut wait = task::spawn(limiter.acquire());
    assert_pending!(wait.poll());
    drop(wait);
    assert_eq!(ears.take(), []);
}

#[test]
fn a_rate_that_moves_is_heard_with_the_instant_at_which_it_moved() {
    let clock = Clock::manual();
    let limiter = limiter(&clock, Adaptive::new(100).minimum_calls(1));
    let mut ears = Ears::of_limiter(&limiter);
    limiter.try_acquire().unwrap().settle(Outcome::Failure);
    clock.advance(MINUTE);
    let due = clock.now();
    assert_eq!(ears.take(), [], "nobody looked yet");
    clock.advance(MINUTE / 2);
    limiter.try_acquire().unwrap();
    let down = EventKind::RateChanged { from: 100.0, to: 80.0 };
    assert_eq!(ears.take_at(Some("daily"), due), [down]);
    limiter.try_acquire().unwrap();
    assert_eq!(ears.take(), [], "once a window");
}

#[test]
fn a_panicking_listener_is_caught_and_the_others_still_hear() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let ((before, record_before), (after, record_after)) = (recorder(), recorder());
    breaker.on_event(record_before);
    breaker.on_event(|event| panic!("a listener panics on {event:?}"));
    breaker.on_event(record_after);
    settle(&breaker, Outcome::Failure);
    breaker.try_acquire().expect_err("the caller gets its answer");
    breaker.reset();
    assert_eq!(take(&before).len(), 3);
    assert_eq!(take(&after).len(), 3, "those behind it hear too");
    assert_eq!(breaker.state(), State::Closed, "the breaker goes on");

    let limiter = limiter(&clock, TokenBucket::new(1, MINUTE));
    limiter.on_event(|event| panic!("a listener panics on {event:?}"));
    limiter.try_acquire().unwrap();
    let rejected = limiter.try_acquire().expect_err("the caller gets its answer");
    assert_eq!(rejected.reason, Reason::OverLimit);
}

#[test]
fn a_listener_may_panic_while_its_caller_does() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    breaker.on_event(|_| panic!("a listener panics"));
    let (heard, record) = recorder();
    breaker.on_event(record);
    let call = AssertUnwindSafe(|| {
        let _permit = breaker.try_acquire().unwrap();
        panic!("the call panics");
    });
    let payload = catch_unwind(call).expect_err("the call's own panic goes on");
    assert_eq!(payload.downcast_ref::<&str>(), Some(&"the call panics"));
    let opened = transition(State::Closed, State::Open, 2);
    assert_eq!(kinds(&take(&heard)), [opened], "it counted as a failure");
}

#[test]
fn a_listener_may_call_back() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let breaker = registry.circuit_breaker("search", brittle()).unwrap();
    let limiter = registry.rate_limiter("search", TokenBucket::new(2, MINUTE)).unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let id = Arc::new(Mutex::new(None));
    let listener = {
        let (registry, calls, id) = (registry.clone(), calls.clone(), id.clone());
        move |event: &Event| {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            if call > 0 {
                return;
            }
            let search = registry.get_circuit_breaker("search").unwrap();
            assert_eq!(
                search.state(),
                State::Open,
                "the state has changed before {event:?} is told"
            );
            assert_eq!(registry.open_circuits(), ["search"]);
            search.try_acquire().unwrap_err();
            search.reset();
            settle(&search, Outcome::Success);
            registry
                .get_rate_limiter("search")
                .unwrap()
                .try_acquire_n(3)
                .unwrap_err();
            registry.circuit_breaker("late", config()).unwrap().force_open();
            drop(registry.subscribe(1));
            search.on_event(|_| ());
            assert!(
                registry.remove_listener(id.lock().unwrap().take().unwrap()),
                "it may remove itself"
            );
            assert!(registry.remove("late"));
        }
    };
    *id.lock().unwrap() = Some(registry.on_event(listener));
    settle(&breaker, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed, "what the listener did holds");
    // The trip; then, from inside: the rejection, the reset, the limit's rejection and the late breaker's override.
    assert_eq!(calls.load(Ordering::Relaxed), 5);
    breaker.reset();
    limiter.try_acquire_n(3).unwrap_err();
    assert_eq!(
        calls.load(Ordering::Relaxed),
        5,
        "a listener that removed itself hears nothing more"
    );
}

#[test]
fn a_blocking_listener_holds_up_its_own_caller_only() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let breaker = registry
        .circuit_breaker("search", brittle().failure_threshold(2))
        .unwrap();
    let ((entered, has_entered), (leave, may_leave)) = (mpsc::channel(), mpsc::channel::<()>());
    let may_leave = Mutex::new(Some(may_leave));
    breaker.on_event(move |_| {
        // The first event blocks, the others pass.
        let first = may_leave.lock().unwrap().take();
        if let Some(may_leave) = first {
            entered.send(()).unwrap();
            may_leave.recv().expect("the test lets it go");
        }
    });
    thread::scope(|scope| {
        let blocked = scope.spawn(|| breaker.force_open());
        has_entered.recv().unwrap();
        assert_eq!(breaker.state(), State::Open, "the change was made before it was told");
        breaker.try_acquire().expect_err("others are answered");
        breaker.reset();
        settle(&breaker, Outcome::Success);
        breaker.on_event(|_| ());
        assert_eq!(registry.status().services.len(), 1, "the registry answers");
        registry.on_event(|_| ());
        assert!(registry.remove("search"));
        assert!(!blocked.is_finished(), "its own caller waits for it");
        leave.send(()).unwrap();
    });
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn a_removed_listener_hears_nothing_more() {
    let clock = Clock::manual();
    let (breaker, limiter) = (breaker(&clock), limiter(&clock, TokenBucket::new(1, MINUTE)));
    let (heard, record) = recorder();
    let id = breaker.on_event(record);
    let (limit_heard, record) = recorder();
    let limit_id = limiter.on_event(record);
    assert!(!limiter.remove_listener(id), "another's listener is not there");
    assert!(breaker.remove_listener(id));
    assert!(!breaker.remove_listener(id), "it is gone");
    assert!(limiter.remove_listener(limit_id));
    breaker.reset();
    limiter.try_acquire_n(2).unwrap_err();
    assert_eq!((take(&heard), take(&limit_heard)), (vec![], vec![]));
}

#[test]
fn a_removed_listener_gives_back_what_it_captured() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let alive = Arc::new(());
    let held = alive.clone();
    let id = breaker.on_event(move |_| drop(held.clone()));
    breaker.reset();
    assert!(breaker.remove_listener(id));
    assert_eq!(Arc::strong_count(&alive), 1);
}

#[test]
fn a_queue_holds_the_newest_events_and_counts_those_it_lost() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let (mut small, mut large) = (breaker.subscribe(3), breaker.subscribe(100));
    for _ in 0..10 {
        breaker.reset();
    }
    assert_eq!(small.lost(), 7);
    let generation = |n| EventKind::Reset { generation: n };
    assert_eq!(
        kinds(&drain(&mut small)),
        [9, 10, 11].map(generation),
        "the newest, oldest first"
    );
    assert_eq!(kinds(&drain(&mut large)), (2..=11).map(generation).collect::<Vec<_>>());
    assert_eq!(large.lost(), 0, "each queue counts for itself");
    breaker.reset();
    assert_eq!(
        kinds(&drain(&mut small)),
        [generation(12)],
        "with room again, nothing is lost"
    );
    assert_eq!(small.lost(), 7, "what is lost stays lost");
}

#[test]
fn a_queue_for_nothing_holds_one() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut events = breaker.subscribe(0);
    breaker.reset();
    breaker.reset();
    assert_eq!(kinds(&drain(&mut events)), [EventKind::Reset { generation: 3 }]);
    assert_eq!(events.lost(), 1);
}

#[test]
fn a_queue_tells_of_nothing_that_happened_before_it() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    breaker.reset();
    let mut events = breaker.subscribe(8);
    assert_eq!(events.try_recv(), None);
}

#[test]
fn whoever_waits_for_an_event_is_woken_by_it() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut events = breaker.subscribe(8);
    let mut recv = task::spawn(events.recv());
    assert_pending!(recv.poll());
    assert!(!recv.is_woken());
    breaker.reset();
    assert!(recv.is_woken());
    let event = assert_ready!(recv.poll()).unwrap();
    assert_eq!(event.kind, EventKind::Reset { generation: 2 });
}

#[test]
fn the_task_that_polled_last_is_woken() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut events = breaker.subscribe(8);
    let (mut before, mut after) = (task::spawn(()), task::spawn(()));
    assert_pending!(before.enter(|cx, _| events.poll_recv(cx)));
    assert_pending!(after.enter(|cx, _| events.poll_recv(cx)));
    breaker.reset();
    assert!(after.is_woken(), "the queue moved to another task");
    assert!(!before.is_woken());
}

#[test]
fn a_wait_for_an_event_that_is_dropped_loses_nothing() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut events = breaker.subscribe(8);
    let mut recv = task::spawn(events.recv());
    assert_pending!(recv.poll());
    breaker.reset();
    assert!(recv.is_woken());
    drop(recv);
    assert_eq!(events.lost(), 0);
    let event = events.recv().now_or_never().expect("it is still there").unwrap();
    assert_eq!(event.kind, EventKind::Reset { generation: 2 });
}

#[tokio::test(start_paused = true)]
async fn events_cross_tasks_without_loss() {
    const EVENTS: usize = 500;
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    let mut events = breaker.subscribe(EVENTS);
    let source = tokio::spawn(async move {
        for _ in 0..EVENTS {
            breaker.reset();
            tokio::task::yield_now().await;
        }
    });
    let mut generations = Vec::new();
    loop {
        // Half the waits are given up: none of them may take an event along.
        tokio::select! {
            biased;
            () = tokio::task::yield_now() => {}
            event = events.recv() => match event {
                Some(event) => generations.push(event.kind),
                None => break,
            }
        }
    }
    source.await.unwrap();
    let expected: Vec<_> = (2..)
        .take(EVENTS)
        .map(|generation| EventKind::Reset { generation })
        .collect();
    assert_eq!(generations, expected, "in order, each once, and the end after the last");
}

#[test]
fn a_queue_ends_when_its_source_is_gone_and_it_is_empty() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut events = breaker.subscribe(8);
    let clone = breaker.clone();
    breaker.reset();
    drop(breaker);
    clone.reset();
    drop(clone);
    let generation = |n| Some(EventKind::Reset { generation: n });
    let mut next = || {
        events
            .recv()
            .now_or_never()
            .expect("it has ended")
            .map(|event| event.kind)
    };
    assert_eq!(next(), generation(2), "what was queued is still delivered");
    assert_eq!(next(), generation(3));
    assert_eq!(next(), None);
    assert_eq!(next(), None, "the end stays");

    let limiter = limiter(&clock, TokenBucket::new(1, MINUTE));
    let mut events = limiter.subscribe(8);
    let mut recv = task::spawn(events.recv());
    assert_pending!(recv.poll());
    drop(limiter);
    assert!(recv.is_woken(), "whoever waits learns of the end");
    assert_ready_eq!(recv.poll(), None);
}

#[test]
fn a_permit_is_a_source_for_as_long_as_it_may_move_the_circuit() {
    let clock = Clock::manual();
    let breaker = breaker(&clock);
    let mut events = breaker.subscribe(8);
    let permit = breaker.try_acquire().unwrap();
    drop(breaker);
    let mut recv = task::spawn(events.recv());
    assert_pending!(recv.poll());
    permit.settle(Outcome::Failure);
    assert!(recv.is_woken());
    let event = assert_ready!(recv.poll()).unwrap();
    assert_eq!(event.kind, transition(State::Closed, State::Open, 2));
    drop(recv);
    assert_eq!(
        events.recv().now_or_never(),
        Some(None),
        "the permit was the last source"
    );
}

#[test]
fn a_queue_of_a_registry_ends_with_the_last_of_all_its_sources() {
    let registry = Registry::with_clock(Clock::manual());
    let mut events = registry.subscribe(8);
    let breaker = registry.circuit_breaker("search", config()).unwrap();
    let removed = registry.circuit_breaker("removed", config()).unwrap();
    assert!(registry.remove("removed"));
    drop(registry);
    breaker.reset();
    assert!(
        events.try_recv().is_some(),
        "a handle that outlives its registry is heard on"
    );
    let mut recv = task::spawn(events.recv());
    assert_pending!(recv.poll());
    drop(breaker);
    assert_ready_eq!(recv.poll(), None, "what was removed is no source any more");
    removed.reset();
}

#[test]
fn dropping_a_queue_ends_its_subscription_and_nothing_else() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let breaker = registry.circuit_breaker("search", brittle()).unwrap();
    let (heard, record) = recorder();
    breaker.on_event(record);
    let mut kept = breaker.subscribe(8);
    drop(breaker.subscribe(8));
    drop(registry.subscribe(8));
    breaker.reset();
    assert_eq!(take(&heard).len(), 1);
    assert_eq!(drain(&mut kept).len(), 1);
    breaker.reset();
    assert_eq!(drain(&mut kept).len(), 1);
    let late = registry.circuit_breaker("late", config()).unwrap();
    late.reset();
    assert_eq!(
        drain(&mut kept).len(),
        0,
        "a breaker's queue hears of that breaker alone"
    );
}

#[test]
fn concurrent_events_reach_a_queue_each_once() {
    const THREADS: usize = 4;
    const EACH: usize = 500;
    let breaker = CircuitBreaker::builder("search")
        .clock(Clock::manual())
        .build()
        .unwrap();
    let mut events = breaker.subscribe(THREADS * EACH);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| (0..EACH).for_each(|_| breaker.reset()));
        }
    });
    let mut generations: Vec<u64> = drain(&mut events)
        .into_iter()
        .map(|event| match event.kind {
            EventKind::Reset { generation } => generation,
            other => panic!("expected a reset, got {other:?}"),
        })
        .collect();
    generations.sort_unstable();
    assert_eq!(
        generations,
        (2..).take(THREADS * EACH).collect::<Vec<u64>>(),
        "whatever the order of delivery"
    );
    assert_eq!(events.lost(), 0);
}
