//! A breaker for each key: whose is whose, what is forgotten when the set is full and what never is, and what is counted.

use portcullis::{
    BoxError, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerLayer, Clock, EventKind, GuardLayer,
    KeyedCircuitBreaker, ManualClock, MetricsFormat, Outcome, RateLimiter, Reason, Registry, RegistryError, Rejected,
    SlidingWindow, State, Window, policy::Missing,
};
use std::{
    io,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
use tower::{ServiceBuilder, ServiceExt, service_fn};

const OPEN: Duration = Duration::from_secs(10);

fn config() -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
        .failure_threshold(2)
        .recovery_timeout(OPEN)
        .half_open_max_calls(1)
        .success_threshold(1)
}

fn keyed(clock: &ManualClock, max_keys: usize) -> KeyedCircuitBreaker {
    keyed_with(clock, max_keys, config())
}

fn keyed_with(clock: &ManualClock, max_keys: usize, config: CircuitBreakerConfig) -> KeyedCircuitBreaker {
    KeyedCircuitBreaker::builder("shops")
        .config(config)
        .max_keys(max_keys)
        .clock(clock)
        .build()
        .unwrap()
}

fn end(set: &KeyedCircuitBreaker, key: u32, outcome: Outcome) {
    set.try_acquire(&key).unwrap().settle(outcome);
}

fn trip(set: &KeyedCircuitBreaker, key: u32) {
    end(set, key, Outcome::Failure);
    end(set, key, Outcome::Failure);
    assert_eq!(set.get(&key).state(), State::Open);
}

#[test]
fn keys_do_not_share_a_circuit_and_a_key_keeps_its_own() {
    let clock = Clock::manual();
    let set = keyed(&clock, 10);
    trip(&set, 1);
    end(&set, 2, Outcome::Failure);
    assert_eq!(set.try_acquire(&1).unwrap_err().reason, Reason::Open);
    assert_eq!(set.get(&2).status().failure_count, 1);
    assert_eq!(set.get(&3).status().failure_count, 0);
    clock.advance(OPEN);
    end(&set, 1, Outcome::Success);
    assert_eq!(set.get(&1).state(), State::Closed);
    assert_eq!(set.get("text").name(), "shops");
    assert_eq!(set.fingerprint("text"), set.fingerprint(&String::from("text")));
    assert_ne!(
        set.fingerprint("text"),
        keyed(&clock, 1).fingerprint("text"),
        "every set has a seed of its own"
    );
}

#[test]
fn settings_outside_their_range_are_refused() {
    for (field, builder) in [
        ("name", KeyedCircuitBreaker::builder("")),
        ("max_keys", KeyedCircuitBreaker::builder("shops").max_keys(0)),
        (
            "max_keys",
            KeyedCircuitBreaker::builder("shops").max_keys((1 << 20) + 1),
        ),
        (
            "failure_threshold",
            KeyedCircuitBreaker::builder("shops").config(config().failure_threshold(0)),
        ),
        (
            "forget_after",
            KeyedCircuitBreaker::builder("shops").forget_after(Duration::ZERO),
        ),
        (
            "forget_after",
            KeyedCircuitBreaker::builder("shops").forget_after(Duration::MAX),
        ),
    ] {
        assert_eq!(builder.build().unwrap_err().field(), field);
    }
}

// ---- Full sets -----------------------------------------------------------------------------------------------------------

#[test]
fn twenty_thousand_keys_never_hold_more_than_the_most_and_idle_ones_make_room() {
    let clock = Clock::manual();
    let set = keyed(&clock, 100);
    for key in 0..20_000 {
        end(&set, key, Outcome::Success);
    }
    let status = set.status();
    assert_eq!((status.tracked, status.evicted, status.overflowed), (100, 19_900, 0));
    assert_eq!(
        status.metrics.successful_requests, 20_000,
        "what the evicted counted is not lost"
    );
}

#[test]
fn no_eviction_forgets_what_a_breaker_has_seen() {
    type Mark = fn(&KeyedCircuitBreaker);
    let marks: [(&str, Mark); 7] = [
        ("a failure", |set| end(set, 0, Outcome::Failure)),
        ("an open circuit", |set| trip(set, 0)),
        ("forced open", |set| set.get(&0).force_open()),
        ("forced closed", |set| set.get(&0).force_closed()),
        ("disabled", |set| set.get(&0).disable()),
        ("a config of its own", |set| {
            set.get(&0).reconfigure(config().failure_threshold(9)).unwrap();
        }),
        ("a failure in the window that a success has followed", |set| {
            end(set, 0, Outcome::Failure);
            end(set, 0, Outcome::Success);
        }),
    ];
    for (what, mark) in marks {
        let clock = Clock::manual();
        let set = keyed_with(&clock, 1, config().failure_rate(0.9).window(Window::time(OPEN)));
        mark(&set);
        let before = set.get(&0).status();
        for key in 1..50 {
            set.get(&key);
        }
        assert_eq!(set.get(&0).status(), before, "{what}");
        assert_eq!((set.status().evicted, set.status().overflowed), (0, 49), "{what}");

        set.get(&0).reset();
        set.get(&0)
            .reconfigure(config().failure_rate(0.9).window(Window::time(OPEN)))
            .unwrap();
        set.get(&1);
        assert_eq!(set.status().evicted, 1, "{what}: reset, it is as good as new");
    }
}

#[test]
fn an_open_circuit_is_kept_when_its_open_time_is_over_and_goes_when_it_has_recovered() {
    let clock = Clock::manual();
    let set = keyed(&clock, 1);
    trip(&set, 0);
    clock.advance(OPEN * 10);
    set.get(&1);
    assert_eq!(set.status().evicted, 0, "half-open");
    end(&set, 0, Outcome::Success);
    set.get(&1);
    assert_eq!(set.status().evicted, 1);
    let transitions = set.status().metrics.state_transitions;
    assert_eq!((transitions.closed_to_open, transitions.half_open_to_closed), (1, 1));
}

#[test]
fn failures_that_time_has_outrun_do_not_keep_a_key() {
    let clock = Clock::manual();
    let set = keyed_with(&clock, 1, CircuitBreakerConfig::default().failures_within(3, OPEN));
    end(&set, 0, Outcome::Failure);
    set.get(&1);
    assert_eq!(set.status().evicted, 0);
    clock.advance(OPEN);
    set.get(&1);
    assert_eq!(set.status().evicted, 1);
}

#[test]
fn a_slow_call_in_the_window_keeps_a_key() {
    let clock = Clock::manual();
    let slow = Duration::from_secs(1);
    let set = keyed_with(&clock, 1, config().slow_calls(0.9, slow).minimum_calls(5));
    let permit = set.try_acquire(&0).unwrap();
    clock.advance(slow);
    permit.settle(Outcome::Success);
    set.get(&1);
    assert_eq!(set.status().evicted, 0);
}

#[test]
fn a_key_whose_permit_or_handle_is_in_use_is_kept() {
    let clock = Clock::manual();
    let set = keyed(&clock, 1);
    let permit = set.try_acquire(&0).unwrap();
    set.get(&1);
    assert_eq!(set.status().evicted, 0, "its permit may yet tell of a failure");
    permit.settle(Outcome::Success);
    let handle = set.get(&0);
    set.get(&1);
    assert_eq!(set.status().evicted, 0);
    drop(handle);
    set.get(&1);
    assert_eq!(set.status().evicted, 1);
}

#[test]
fn without_an_idle_key_new_ones_share_one_breaker_until_there_is_one() {
    let clock = Clock::manual();
    let set = keyed(&clock, 2);
    end(&set, 0, Outcome::Failure);
    end(&set, 1, Outcome::Failure);
    end(&set, 2, Outcome::Failure);
    end(&set, 3, Outcome::Failure);
    assert_eq!(
        set.try_acquire(&4).unwrap_err().reason,
        Reason::Open,
        "the overflow breaker is one"
    );
    assert_eq!(set.status().overflow, State::Open);
    assert_eq!(set.get(&0).state(), State::Closed);
    end(&set, 0, Outcome::Success);
    assert_eq!(set.get(&4).state(), State::Closed, "the place of key 0");
    let status = set.status();
    assert_eq!((status.evicted, status.tracked, status.open), (1, 2, 0));
    assert_eq!(
        status.metrics.failed_requests, 4,
        "the overflow breaker's are among them"
    );
    assert_eq!(status.metrics.rejected_requests, 1);
}

#[test]
fn the_longest_unused_of_the_idle_goes_first() {
    let clock = Clock::manual();
    let set = keyed(&clock, 3);
    let tracked = |key: u32| {
        let mark = set.get(&key).status().metrics.successful_requests;
        mark > 0
    };
    for key in 0..3 {
        end(&set, key, Outcome::Success);
    }
    end(&set, 10, Outcome::Success); // all were used: any goes, and all count as unused from here
    end(&set, 1, Outcome::Success);
    end(&set, 11, Outcome::Success);
    assert!(tracked(1), "used since, though it was next in turn");
}

#[test]
fn an_idle_key_is_found_however_many_cannot_go() {
    let clock = Clock::manual();
    let set = keyed(&clock, 200);
    for key in 0..200 {
        end(&set, key, if key == 150 { Outcome::Success } else { Outcome::Failure });
    }
    // Sixteen at a time: no new key pays for the whole set.
    let asked = (0..200).take_while(|_| {
        set.get(&1_000);
        set.status().evicted == 0
    });
    assert!(asked.count() <= 200 / 16, "every look goes on where the last one ended");
    assert_eq!(set.status().evicted, 1);
}

#[test]
fn the_next_new_key_looks_at_the_sixteen_after_those_that_the_last_one_looked_at() {
    let clock = Clock::manual();
    let set = keyed(&clock, 48);
    for key in 0..48 {
        let may_go = key == 31 || key == 47;
        end(&set, key, if may_go { Outcome::Success } else { Outcome::Failure });
    }
    let of_each_sixteen = [(1, 0), (1, 1), (1, 2), (2, 2), (2, 3)];
    for (new, expected) in (100_u32..).zip(of_each_sixteen) {
        set.get(&new);
        let status = set.status();
        assert_eq!((status.overflowed, status.evicted), expected, "new key {new}");
    }
}

#[test]
fn if_all_were_used_the_one_that_has_its_place_for_the_longest_goes() {
    let clock = Clock::manual();
    let set = keyed(&clock, 100);
    for key in 0..100 {
        end(&set, key, Outcome::Success);
    }
    for new in 0..8 {
        end(&set, 1_000 + new, Outcome::Success);
        // The one that came `new` before is gone: it needs a place again. All others have theirs.
        for kept in new + 1..100 {
            end(&set, kept, Outcome::Success);
        }
        assert_eq!(set.status().evicted, u64::from(new) + 1);
    }
}

const OLD: Duration = Duration::from_secs(600);
/// An instant before that.
const ALMOST_OLD: Duration = Duration::new(599, 999_999_999);
const INSTANT: Duration = Duration::from_nanos(1);

fn forgetful(clock: &ManualClock, max_keys: usize, config: CircuitBreakerConfig) -> KeyedCircuitBreaker {
    KeyedCircuitBreaker::builder("shops")
        .config(config)
        .max_keys(max_keys)
        .forget_after(OLD)
        .clock(clock)
        .build()
        .unwrap()
}

/// A new key comes: whether it got a place of its own.
fn finds_room(set: &KeyedCircuitBreaker, key: u32) -> bool {
    let before = set.status().overflowed;
    set.get(&key);
    set.status().overflowed == before
}

#[test]
fn a_key_that_failed_and_never_came_back_makes_room_when_its_failures_are_old() {
    let marks: [fn(&KeyedCircuitBreaker); 2] = [|set| end(set, 0, Outcome::Failure), |set| trip(set, 0)];
    for mark in marks {
        let clock = Clock::manual();
        let set = forgetful(&clock, 1, config());
        clock.advance(OLD);
        mark(&set);
        clock.advance(ALMOST_OLD);
        assert!(!finds_room(&set, 1));
        let before = set.status().metrics;
        clock.advance(INSTANT);
        assert!(finds_room(&set, 1));
        let status = set.status();
        assert_eq!((status.tracked, status.evicted, status.open), (1, 1, 0));
        assert_eq!(status.metrics, before, "what it counted is not lost");
        end(&set, 1, Outcome::Failure);
        assert!(!finds_room(&set, 0), "another has its place");
    }
}

#[test]
fn the_latest_failure_or_slow_call_is_what_has_to_be_old() {
    type Again = fn(&ManualClock, &KeyedCircuitBreaker);
    let again: [(&str, bool, Again); 3] = [
        ("a failure", true, |_, set| end(set, 0, Outcome::Failure)),
        ("a slow call", true, |clock, set| {
            let permit = set.try_acquire(&0).unwrap();
            clock.advance(INSTANT);
            permit.settle(Outcome::Success);
        }),
        ("a success", false, |_, set| end(set, 0, Outcome::Success)),
    ];
    for (what, counts, again) in again {
        let clock = Clock::manual();
        let config = CircuitBreakerConfig::default()
            .failure_rate(0.9)
            .slow_calls(0.9, INSTANT)
            .window(Window::calls(100));
        let set = forgetful(&clock, 1, config);
        end(&set, 0, Outcome::Failure);
        clock.advance(ALMOST_OLD);
        again(&clock, &set);
        clock.advance(INSTANT);
        assert_eq!(finds_room(&set, 1), !counts, "{what}");
        if counts {
            clock.advance(ALMOST_OLD);
            assert!(finds_room(&set, 1), "{what}");
        }
    }
}

#[test]
fn a_probe_that_fails_is_a_newer_failure_and_one_that_is_dropped_is_none() {
    for (outcome, counts) in [(Some(Outcome::Failure), true), (None, false)] {
        let clock = Clock::manual();
        let set = forgetful(&clock, 1, config());
        trip(&set, 0);
        clock.advance(OPEN);
        let probe = set.try_acquire(&0).unwrap();
        match outcome {
            Some(outcome) => probe.settle(outcome),
            None => drop(probe),
        }
        clock.advance(OLD.saturating_sub(OPEN));
        assert_eq!(finds_room(&set, 1), !counts, "{outcome:?}");
        clock.advance(OPEN);
        assert!(finds_room(&set, 2), "{outcome:?}");
    }
}

#[test]
fn however_old_its_failures_are_a_breaker_that_still_refuses_or_is_in_use_is_kept() {
    type Mark = fn(&KeyedCircuitBreaker) -> Option<Box<dyn std::any::Any>>;
    let marks: [(&str, Mark); 7] = [
        ("forced open", |set| {
            set.get(&0).force_open();
            None
        }),
        ("forced closed", |set| {
            set.get(&0).force_closed();
            None
        }),
        ("disabled", |set| {
            set.get(&0).disable();
            None
        }),
        ("a config of its own", |set| {
            set.get(&0).reconfigure(config().failure_threshold(9)).unwrap();
            None
        }),
        ("a handle", |set| {
            end(set, 0, Outcome::Failure);
            Some(Box::new(set.get(&0)))
        }),
        ("a permit", |set| {
            end(set, 0, Outcome::Failure);
            Some(Box::new(set.try_acquire(&0).unwrap()))
        }),
        ("an open time that is not over", |set| {
            set.get(&0).reconfigure(config().recovery_timeout(OLD * 100)).unwrap();
            trip(set, 0);
            set.get(&0).reconfigure(config()).unwrap();
            None
        }),
    ];
    for (what, mark) in marks {
        let clock = Clock::manual();
        let set = forgetful(&clock, 1, config());
        let held = mark(&set);
        for new in 1..20 {
            assert!(!finds_room(&set, new), "{what}");
            clock.advance(OLD);
        }
        drop(held);
    }
}

#[test]
fn dead_hosts_go_and_those_that_are_called_keep_their_breakers() {
    let clock = Clock::manual();
    let set = forgetful(&clock, 16, config());
    for dead in 0..16 {
        end(&set, dead, Outcome::Failure);
    }
    assert!(!finds_room(&set, 100), "from this look on they count as unused");
    clock.advance(OLD);
    for _ in 0..100 {
        for live in 200..210 {
            end(&set, live, Outcome::Success);
        }
    }
    assert_eq!((set.status().evicted, set.status().tracked), (10, 16));
    end(&set, 300, Outcome::Success);
    assert_eq!(
        set.status().evicted,
        11,
        "a dead one, though the others are as good as new"
    );
    for live in 200..210 {
        assert_eq!(set.get(&live).status().metrics.successful_requests, 100);
    }
}

#[test]
fn by_default_a_failure_is_old_after_an_hour() {
    let clock = Clock::manual();
    let set = keyed(&clock, 1);
    assert_eq!(set.forget_after(), Duration::from_secs(3_600));
    trip(&set, 0);
    clock.advance(Duration::from_secs(3_599));
    assert!(!finds_room(&set, 1));
    clock.advance(Duration::from_secs(1));
    assert!(finds_room(&set, 1));
}

#[test]
fn listeners_hear_that_an_open_circuit_is_forgotten() {
    let clock = Clock::manual();
    let set = forgetful(&clock, 1, config());
    trip(&set, 0);
    clock.advance(OLD);
    let seen = Arc::new(Mutex::new(Vec::new()));
    set.on_event({
        let (seen, set) = (seen.clone(), set.clone());
        move |event| {
            let moved = match event.kind {
                EventKind::Transition { from, to, .. } => Some((from, to)),
                _ => None,
            };
            seen.lock().unwrap().push((moved, set.status().tracked));
        }
    });
    set.get(&1);
    let moved = Some((State::Open, State::HalfOpen));
    assert_eq!(
        *seen.lock().unwrap(),
        [(moved, 1), (None, 1)],
        "then the reset, outside every lock"
    );
    assert_eq!(set.status().metrics.state_transitions.open_to_half_open, 1);
}

#[test]
fn the_transitions_of_keys_that_went_are_still_counted() {
    let clock = Clock::manual();
    let set = keyed(&clock, 1);
    for round in 1..=3 {
        // Opens, opens again after a failed probe, and closes.
        trip(&set, round);
        clock.advance(OPEN);
        end(&set, round, Outcome::Failure);
        clock.advance(OPEN);
        end(&set, round, Outcome::Success);
        let counted = set.status().metrics.state_transitions;
        let each = [
            counted.closed_to_open,
            counted.open_to_half_open,
            counted.half_open_to_open,
            counted.half_open_to_closed,
        ];
        let rounds = u64::from(round);
        assert_eq!(each, [rounds, 2 * rounds, rounds, rounds]);
        assert_eq!(set.status().evicted, rounds - 1);
    }
    assert_eq!(set.clock().now(), clock.now(), "the clock it was given");
}

// ---- What is counted and told ----------------------------------------------------------------------------------------------

#[test]
fn the_sums_never_fall_while_keys_come_and_go_on_two_threads() {
    let clock = Clock::manual();
    let set = keyed(&clock, 8);
    let running = AtomicBool::new(true);
    thread::scope(|scope| {
        let workers = [0_u32, 1].map(|worker| {
            let set = &set;
            scope.spawn(move || {
                for call in 0..10_000 {
                    let outcome = if call % 2 == 0 {
                        Outcome::Success
                    } else {
                        Outcome::Ignored
                    };
                    end(set, call * 2 + worker, outcome);
                }
            })
        });
        scope.spawn(|| {
            let mut last = 0;
            while running.load(Ordering::SeqCst) {
                let status = set.status();
                assert!(
                    status.metrics.total_requests >= last,
                    "fell to {} from {last}",
                    status.metrics.total_requests
                );
                assert!(status.tracked <= 8);
                last = status.metrics.total_requests;
            }
        });
        for worker in workers {
            worker.join().unwrap();
        }
        running.store(false, Ordering::SeqCst);
    });
    let metrics = set.status().metrics;
    assert_eq!(
        (metrics.successful_requests, metrics.ignored_requests),
        (10_000, 10_000)
    );
}

#[test]
fn two_threads_that_ask_for_a_new_key_get_one_breaker_and_no_failure_is_lost() {
    let clock = Clock::manual();
    let set = keyed_with(&clock, 4, config().failure_threshold(u32::MAX));
    thread::scope(|scope| {
        for worker in 0..2_u32 {
            let set = &set;
            scope.spawn(move || {
                for call in 0..2_000 {
                    end(set, 7, Outcome::Failure);
                    end(set, 100 + call * 2 + worker, Outcome::Success);
                }
            });
        }
    });
    assert_eq!(set.get(&7).status().failure_count, 4_000);
}

#[test]
fn threads_that_bring_a_new_key_at_once_share_its_breaker() {
    const ROUNDS: u32 = 3_000;
    let clock = Clock::manual();
    let set = keyed_with(&clock, 10_000, config().failure_threshold(u32::MAX));
    let meeting = Barrier::new(2);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for key in 0..ROUNDS {
                    meeting.wait();
                    end(&set, key, Outcome::Failure);
                }
            });
        }
    });
    for key in 0..ROUNDS {
        assert_eq!(set.get(&key).status().failure_count, 2, "of key {key}");
    }
    assert_eq!(set.status().tracked, 3_000);
}

#[test]
fn a_listener_may_use_the_set_it_listens_to() {
    let clock = Clock::manual();
    let set = keyed(&clock, 1);
    let own = set.clone();
    set.on_event(move |event| {
        if let EventKind::Transition { to: State::Open, .. } = event.kind {
            end(&own, 2, Outcome::Ignored);
            assert_eq!((own.status().open, own.status().overflowed), (1, 1));
            own.get(&1).reset();
            end(&own, 3, Outcome::Ignored);
        }
    });
    end(&set, 1, Outcome::Failure);
    end(&set, 1, Outcome::Failure);
    assert_eq!((set.status().open, set.status().tracked), (0, 1));
}

#[test]
fn a_fingerprint_finds_the_breaker_of_its_key_and_makes_none() {
    let clock = Clock::manual();
    let set = keyed(&clock, 10);
    trip(&set, 1);
    let fingerprint = u64::from_str_radix(&set.status().open_keys[0], 16).unwrap();
    set.get_by_fingerprint(fingerprint).unwrap().reset();
    assert_eq!(set.get(&1).state(), State::Closed);
    assert!(set.get_by_fingerprint(fingerprint.wrapping_add(1)).is_none());
    assert_eq!((set.status().tracked, set.status().overflowed), (1, 0));
}

#[test]
fn the_status_names_up_to_ten_open_keys() {
    let clock = Clock::manual();
    let set = keyed(&clock, 50);
    (0..12).for_each(|key| trip(&set, key));
    set.get(&0).reset();
    clock.advance(Duration::from_secs(1));
    let status = set.status();
    assert_eq!((status.open, status.half_open, status.open_keys.len()), (11, 0, 10));
    let all: Vec<String> = (1..12_u32)
        .map(|key| format!("{:016x}", set.fingerprint(&key)))
        .collect();
    assert!(status.open_keys.iter().all(|key| all.contains(key)));
    clock.advance(OPEN);
    let status = set.status();
    assert_eq!((status.open, status.half_open, status.open_keys.len()), (0, 11, 0));
}

#[test]
fn a_listener_hears_every_key_and_those_that_come_later() {
    let clock = Clock::manual();
    let set = keyed(&clock, 5);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let notes = heard.clone();
    let listener = set.on_event(move |event| notes.lock().unwrap().push(event.kind.clone()));
    let mut queue = set.subscribe(10);
    trip(&set, 1);
    set.try_acquire(&1).unwrap_err();
    assert!(matches!(
        heard.lock().unwrap().as_slice(),
        [EventKind::Transition { to: State::Open, .. }, EventKind::Rejected(_)]
    ));
    assert!(set.remove_listener(listener));
    trip(&set, 2);
    assert_eq!(heard.lock().unwrap().len(), 2);
    assert_eq!(std::iter::from_fn(|| queue.try_recv()).count(), 3);
}

#[test]
fn a_registry_shows_a_set_and_gives_it_its_listeners() {
    let clock = Clock::manual();
    let set = keyed(&clock, 5);
    let registry = Registry::with_clock(&clock);
    let mut queue = registry.subscribe(10);
    registry.register(&set).unwrap();
    registry.register(set.clone()).unwrap();
    trip(&set, 1);
    set.try_acquire(&1).unwrap_err();
    end(&set, 2, Outcome::Success);
    assert_eq!(
        std::iter::from_fn(|| queue.try_recv()).count(),
        2,
        "a transition and a rejection"
    );
    let status = registry.service_status("shops").unwrap();
    assert_eq!(status.circuit_breakers.as_ref(), Some(&set.status()));
    assert_eq!(status.circuit_breaker, None);
    #[cfg(feature = "http")]
    {
        let json = serde_json::to_value(&status).unwrap();
        let block = &json["circuit_breakers"];
        assert_eq!((&block["tracked"], &block["open"]), (&2.into(), &1.into()), "{json}");
        let open = format!("{:016x}", set.fingerprint(&1));
        assert_eq!(block["open_keys"], serde_json::json!([open]), "{json}");
    }
    let page = registry.metrics_text(MetricsFormat::Prometheus);
    for line in [
        r#"circuit_breaker_tracked_keys{service="shops"} 2"#,
        r#"circuit_breaker_open_keys{service="shops"} 1"#,
        r#"circuit_breaker_evicted_keys_total{service="shops"} 0"#,
        r#"circuit_breaker_calls_total{service="shops",outcome="failure"} 2"#,
        r#"circuit_breaker_calls_total{service="shops",outcome="success"} 1"#,
        r#"circuit_breaker_rejected_total{service="shops",reason="open"} 1"#,
    ] {
        assert!(page.lines().any(|it| it == line), "{line} in\n{page}");
    }

    assert!(registry.remove("shops"));
    trip(&set, 3);
    assert!(queue.try_recv().is_none(), "forgotten");
}

#[test]
fn a_registry_makes_a_set_once_and_knows_it_by_its_name() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let mut queue = registry.subscribe(10);
    assert!(registry.get_keyed_circuit_breaker("shops").is_none());
    let made = registry.keyed_circuit_breaker("shops", config(), 10).unwrap();
    trip(&made, 1);
    assert!(queue.try_recv().is_some(), "a registry's listeners hear it");

    let spelled = config().probe_lease(OPEN);
    let same = registry.keyed_circuit_breaker("shops", spelled, 10).unwrap(); // the default, spelled out
    let got = registry.get_keyed_circuit_breaker("shops").unwrap();
    for handle in [&same, &got] {
        assert!(handle.try_acquire(&1).is_err(), "the same state");
        assert_eq!(handle.max_keys(), 10);
    }
    registry.register(&made).expect("the same one");

    clock.advance(OPEN);
    assert_eq!(made.get(&1).state(), State::HalfOpen, "the registry's clock");
    assert!(registry.get_circuit_breaker("shops").is_none());
}

#[test]
fn a_set_that_was_registered_is_found_whenever_it_forgets() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let made = forgetful(&clock, 10, config());
    registry.register(&made).unwrap();
    let found = registry.keyed_circuit_breaker("shops", config(), 10).unwrap();
    trip(&made, 1);
    assert_eq!((found.status().open, found.forget_after()), (1, OLD));
}

#[test]
fn another_config_or_size_of_a_set_is_an_error_that_shows_both() {
    let registry = Registry::with_clock(Clock::manual());
    let made = registry.keyed_circuit_breaker("shops", config(), 10).unwrap();
    trip(&made, 1);
    for (other, max_keys, shown) in [
        (config().failure_threshold(99), 10, "failure_threshold: Some(99)"),
        (config().critical(true), 10, "critical: true"),
        (config(), 11, "for 11 keys"),
    ] {
        let error = registry.keyed_circuit_breaker("shops", other, max_keys).unwrap_err();
        let RegistryError::Conflict {
            service,
            what,
            existing,
            requested,
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!((service.as_str(), what.as_str()), ("shops", "the circuit breaker"));
        assert!(requested.contains(shown) && !existing.contains(shown), "{error}");
        assert!(existing.ends_with("for 10 keys"), "{error}");
    }
    assert_eq!(
        registry.get_keyed_circuit_breaker("shops").unwrap().status(),
        made.status()
    );

    let invalid = registry.keyed_circuit_breaker("shops", config().failure_threshold(0), 10);
    assert!(matches!(invalid, Err(RegistryError::Config(_))));
    for max_keys in [0, usize::MAX] {
        let invalid = registry.keyed_circuit_breaker("other", config(), max_keys);
        assert!(matches!(invalid, Err(RegistryError::Config(_))));
    }
    assert_eq!(registry.services(), ["shops"], "nothing half made");
}

#[test]
fn a_service_has_one_breaker_or_one_for_each_key() {
    let clock = Clock::manual();
    let (set, other) = (keyed(&clock, 5), keyed(&clock, 5));
    let one = CircuitBreaker::builder("shops").build().unwrap();
    let taken = |result: Result<(), RegistryError>| matches!(result, Err(RegistryError::Taken { .. }));
    let registry = Registry::new();
    registry.register(&set).unwrap();
    assert!(taken(registry.register(&other)), "another set");
    assert!(taken(registry.register(&one)));
    assert!(taken(registry.circuit_breaker("shops", config()).map(drop)));
    let registry = Registry::new();
    registry.register(&one).unwrap();
    assert!(taken(registry.register(&set)));
    assert!(taken(registry.keyed_circuit_breaker("shops", config(), 5).map(drop)));
}

// ---- As a layer --------------------------------------------------------------------------------------------------------------

#[derive(Debug, Clone)]
struct Order {
    shop: Option<u32>,
}

fn order(shop: u32) -> Order {
    Order { shop: Some(shop) }
}

async fn serve(order: Order) -> io::Result<()> {
    match order.shop {
        Some(13) => Err(io::Error::other("down")),
        _ => Ok(()),
    }
}

fn reason(result: Result<(), BoxError>) -> Reason {
    let error = result.unwrap_err();
    Rejected::find(&*error).expect("a rejection").reason
}

#[tokio::test]
async fn a_layer_breaks_the_circuit_of_the_key_that_fails() {
    let clock = Clock::manual();
    let set = keyed(&clock, 10);
    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(set.by(|order: &Order| order.shop)))
        .service(service_fn(serve));
    for _ in 0..2 {
        assert!(service.clone().oneshot(order(13)).await.unwrap_err().is::<io::Error>());
    }
    assert_eq!(reason(service.clone().oneshot(order(13)).await), Reason::Open);
    service.clone().oneshot(order(14)).await.unwrap();
    assert_eq!(
        set.get(&13_u32).status().metrics.rejected.open,
        1,
        "the key of the closure is the key of `get`"
    );
    clock.advance(OPEN);
    assert!(
        service.clone().oneshot(order(13)).await.unwrap_err().is::<io::Error>(),
        "the probe"
    );
    assert_eq!(set.get(&13_u32).state(), State::Open);
}

#[tokio::test]
async fn a_request_without_a_key_is_rejected_shared_or_exempt() {
    let clock = Clock::manual();
    let set = keyed(&clock, 10);
    let layer = |missing| CircuitBreakerLayer::new(set.by(|order: &Order| order.shop).missing(missing));
    let failing = || service_fn(async |_: Order| Err::<(), _>(io::Error::other("down")));
    let ask = async |missing| {
        let service = ServiceBuilder::new().layer(layer(missing)).service(failing());
        service.oneshot(Order { shop: None }).await
    };
    assert_eq!(reason(ask(Missing::Reject).await), Reason::MissingKey);
    assert_eq!((set.status().missing_key, set.status().tracked), (1, 0));
    for _ in 0..3 {
        assert!(ask(Missing::Exempt).await.unwrap_err().is::<io::Error>());
    }
    assert_eq!((set.status().tracked, set.status().metrics.total_requests), (0, 0));
    for _ in 0..2 {
        assert!(ask(Missing::Shared).await.unwrap_err().is::<io::Error>());
    }
    assert_eq!(reason(ask(Missing::Shared).await), Reason::Open);
}

/// Else somebody could look for a key that shares its circuit with them.
#[tokio::test]
async fn the_circuit_of_requests_without_a_key_has_another_fingerprint_in_every_set() {
    let clock = Clock::manual();
    let mut shown = Vec::new();
    for _ in 0..2 {
        let set = keyed(&clock, 10);
        let shops = set.by(|order: &Order| order.shop).missing(Missing::Shared);
        let down = service_fn(async |_: Order| Err::<(), _>(io::Error::other("down")));
        let service = ServiceBuilder::new()
            .layer(CircuitBreakerLayer::new(shops))
            .service(down);
        for _ in 0..2 {
            service.clone().oneshot(Order { shop: None }).await.unwrap_err();
        }
        let open = set.status().open_keys;
        assert_eq!(open.len(), 1);
        shown.extend(open);
    }
    assert_ne!(shown[0], shown[1]);
}

#[tokio::test]
async fn in_a_pair_a_refusal_is_counted_by_its_key_and_costs_the_other_nothing() {
    let clock = Clock::manual();
    let set = keyed(&clock, 10);
    let limiter = RateLimiter::builder("shops", SlidingWindow::new(1, OPEN))
        .clock(&clock)
        .build()
        .unwrap();
    let pair = (
        limiter.clone(),
        set.by(|order: &Order| order.shop).missing(Missing::Reject),
    );
    let service = ServiceBuilder::new()
        .layer(GuardLayer::new(pair))
        .service(service_fn(serve));
    trip(&set, 13);
    assert_eq!(reason(service.clone().oneshot(order(13)).await), Reason::Open);
    assert_eq!(
        reason(service.clone().oneshot(Order { shop: None }).await),
        Reason::MissingKey
    );
    assert_eq!(limiter.status().accepted_requests, 0);
    assert_eq!(set.get(&13_u32).status().metrics.rejected.open, 1);
    assert_eq!(set.status().missing_key, 1);
    service.clone().oneshot(order(1)).await.unwrap();
    assert_eq!(reason(service.oneshot(order(2)).await), Reason::OverLimit);
    assert_eq!(
        set.status().tracked,
        2,
        "a request that the limit refused makes no breaker"
    );
}

#[tokio::test]
async fn a_call_that_is_dropped_frees_the_probe_of_its_key() {
    let clock = Clock::manual();
    let set = keyed(&clock, 1);
    trip(&set, 1);
    clock.advance(OPEN);
    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(set.by(|order: &Order| order.shop)))
        .service(service_fn(|_: Order| std::future::pending::<io::Result<()>>()));
    let mut call = tokio_test::task::spawn(service.clone().oneshot(order(1)));
    assert!(call.poll().is_pending());
    assert_eq!(set.get(&1_u32).status().probes_in_flight, 1);
    drop(call);
    assert_eq!(set.get(&1_u32).status().probes_in_flight, 0);
}
