//! The registry: one state for each name, refusals that change nothing, order, removal, listeners, and any name at all.

use portcullis::{
    Adaptive, Algorithm, Backoff, CircuitBreaker, CircuitBreakerConfig, Clock, EventKind, Name, Outcome, RateLimiter,
    Registry, RegistryError, SlidingWindow, State, TokenBucket, Window,
};
use std::{
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

const MINUTE: Duration = Duration::from_secs(60);

fn config() -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
}

fn registry() -> Registry {
    Registry::with_clock(Clock::manual())
}

fn fail(breaker: &CircuitBreaker) {
    breaker
        .try_acquire()
        .expect("a closed circuit admits")
        .settle(Outcome::Failure);
}

/// Two handles are one state if what is done through one is seen through the other.
#[track_caller]
fn assert_one_breaker(one: &CircuitBreaker, other: &CircuitBreaker) {
    let before = other.status().generation;
    one.reset();
    assert_eq!(other.status().generation, before + 1, "the same name is the same state");
}

#[track_caller]
fn assert_one_limiter(one: &RateLimiter, other: &RateLimiter) {
    let before = other.status().accepted_requests;
    drop(one.try_acquire_n(0));
    assert_eq!(
        other.status().accepted_requests,
        before + 1,
        "the same name is the same state"
    );
}

fn names_of(names: &[Name]) -> Vec<&str> {
    names.iter().map(Name::as_str).collect()
}

/// Names that some format or other gives a meaning to, up to the longest there may be.
fn hostile_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "\"", "\\", "\\\"", "\\n", "a\nb", "a\r\nb", "\0", "\u{7f}", " ", "\t", "..", "/", "%2F", "{}", "}", "=,", "#",
        "# EOF", "<script>", "🦀", "e\u{301}", "é", "\u{202e}", "\u{2028}", "\u{feff}", "default",
    ]
    .map(String::from)
    .into();
    names.push("x".repeat(Name::MAX_LEN));
    names.push(format!("{}x", "é".repeat(127)));
    names
}

#[test]
fn the_same_name_is_the_same_state_from_every_handle() {
    let registry = registry();
    let breaker = registry
        .circuit_breaker("search", config().failure_threshold(2))
        .unwrap();
    let again = registry
        .clone()
        .circuit_breaker("search", config().failure_threshold(2))
        .unwrap();
    fail(&breaker);
    fail(&again);
    assert_eq!(breaker.state(), State::Open, "two handles, one run of failures");
    let found = registry.get_circuit_breaker("search").unwrap();
    assert_eq!(found.state(), State::Open, "a look-up finds the same state");

    let bucket = TokenBucket::new(2, MINUTE);
    let limiter = registry.rate_limiter("search", bucket).unwrap();
    let again = registry.clone().rate_limiter("search", bucket).unwrap();
    limiter.try_acquire().unwrap();
    again.try_acquire().unwrap();
    limiter.try_acquire().expect_err("two handles, one bucket");
    let found = registry.get_rate_limiter("search").unwrap();
    found.try_acquire().expect_err("a look-up finds the same bucket");
}

#[test]
fn another_name_is_another_state() {
    let registry = registry();
    let search = registry.circuit_breaker("search", config()).unwrap();
    let ask = registry.circuit_breaker("ask", config()).unwrap();
    search.force_open();
    assert_eq!(ask.state(), State::Closed);
    let other = Registry::with_clock(Clock::manual());
    let elsewhere = other.circuit_breaker("search", config()).unwrap();
    assert_eq!(elsewhere.state(), State::Closed, "registries share nothing");
}

#[test]
fn what_is_got_or_made_by_many_threads_at_once_is_one_state() {
    const THREADS: u32 = 8;
    let registry = registry();
    for round in 0..50 {
        let service = format!("service {round}");
        let barrier = Barrier::new(THREADS as usize);
        let admitted = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    barrier.wait();
                    let limiter = registry.rate_limiter(&service, TokenBucket::new(3, MINUTE)).unwrap();
                    let breaker = registry
                        .circuit_breaker(&service, config().failure_threshold(THREADS))
                        .unwrap();
                    admitted.fetch_add(usize::from(limiter.try_acquire().is_ok()), Ordering::Relaxed);
                    fail(&breaker);
                });
            }
        });
        assert_eq!(admitted.load(Ordering::Relaxed), 3, "one bucket for all threads");
        let status = registry.service_status(&service).unwrap();
        let breaker = status.circuit_breaker.unwrap();
        assert_eq!(
            breaker.metrics.failed_requests,
            u64::from(THREADS),
            "one breaker counts them all"
        );
        assert_eq!(breaker.state, State::Open, "and trips on their sum");
        assert_eq!(status.rate_limiters.len(), 1);
    }
}

#[test]
fn an_equal_breaker_config_is_accepted_in_any_spelling() {
    let rate = config().failure_rate(0.5);
    let spellings = [
        (
            "every default spelt out",
            config(),
            config().failure_threshold(5).recovery_timeout(MINUTE),
        ),
        (
            "the probes' defaults",
            config(),
            config().half_open_max_calls(3).success_threshold(2),
        ),
        ("the lease is the open time", config(), config().probe_lease(MINUTE)),
        (
            "a cancelled call is ignored",
            config(),
            config().cancelled(Outcome::Ignored).critical(false),
        ),
        (
            "the default window",
            rate.clone(),
            rate.clone().window(Window::calls(100)).minimum_calls(20),
        ),
        (
            "the minimum follows a small window",
            rate.clone().window(Window::calls(7)),
            rate.clone().window(Window::calls(7)).minimum_calls(7),
        ),
        (
            "a window that nothing watches",
            config(),
            config().window(Window::calls(50)),
        ),
        (
            "a small window that nothing watches",
            config(),
            config().window(Window::calls(7)),
        ),
        (
            "a minimum of a window that nothing watches",
            config(),
            config().minimum_calls(7),
        ),
    ];
    for (what, one, other) in spellings {
        let registry = registry();
        let first = registry.circuit_breaker("search", one.clone()).unwrap();
        let second = registry.circuit_breaker("search", other.clone());
        assert_one_breaker(&first, &second.unwrap_or_else(|error| panic!("{what}: {error}")));
        let registry = self::registry();
        let first = registry.circuit_breaker("search", other).unwrap();
        let second = registry.circuit_breaker("search", one);
        assert_one_breaker(
            &first,
            &second.unwrap_or_else(|error| panic!("{what}, the other way round: {error}")),
        );
    }
}

#[test]
fn an_equal_limit_is_accepted_in_any_spelling() {
    let spellings: [(&str, Algorithm, Algorithm); 3] = [
        (
            "the burst is the limit",
            TokenBucket::new(9, MINUTE).into(),
            TokenBucket::new(9, MINUTE).burst(9).into(),
        ),
        (
            "the range of the rate",
            Adaptive::new(100).into(),
            Adaptive::new(100).min_rate(10).max_rate(200).burst(100).into(),
        ),
        (
            "how the rate moves",
            Adaptive::new(100).into(),
            Adaptive::new(100)
                .window(MINUTE)
                .error_threshold(0.1)
                .adjustment_factor(0.2)
                .minimum_calls(10)
                .cancelled(Outcome::Ignored)
                .into(),
        ),
    ];
    for (what, one, other) in spellings {
        for (one, other) in [(one, other), (other, one)] {
            let registry = registry();
            let first = registry.rate_limiter("search", one).unwrap();
            let second = registry.rate_limiter("search", other);
            assert_one_limiter(&first, &second.unwrap_or_else(|error| panic!("{what}: {error}")));
        }
    }
}

#[test]
fn an_unequal_breaker_config_is_an_error_that_shows_both_and_changes_nothing() {
    let second = Duration::from_secs(1);
    let base = || {
        config()
            .failure_threshold(5)
            .failure_rate(0.5)
            .slow_calls(0.5, second)
            .failures_within(9, MINUTE)
            .recovery_backoff(Backoff::new(2.0, 2 * MINUTE).seed(1))
    };
    let others = [
        base().failure_threshold(6),
        base().failures_within(8, MINUTE),
        base().failures_within(9, second),
        base().failure_rate(0.6),
        base().slow_calls(0.6, second),
        base().slow_calls(0.5, MINUTE),
        base().window(Window::calls(99)),
        base().window(Window::time(MINUTE)),
        base().minimum_calls(19),
        base().recovery_timeout(second),
        base().recovery_backoff(Backoff::new(3.0, 2 * MINUTE).seed(1)),
        base().recovery_backoff(Backoff::new(2.0, 3 * MINUTE).seed(1)),
        base().recovery_backoff(Backoff::new(2.0, 2 * MINUTE).jitter(0.1).seed(1)),
        base().recovery_backoff(Backoff::new(2.0, 2 * MINUTE).seed(2)),
        base().half_open_max_calls(4),
        base().success_threshold(1),
        base().probe_lease(second),
        base().cancelled(Outcome::Failure),
        base().honor_retry_after(MINUTE),
        base().critical(true),
    ];
    let registry = registry();
    let breaker = registry.circuit_breaker("search", base()).unwrap();
    fail(&breaker);
    let before = registry.status();
    for other in others {
        let error = registry
            .circuit_breaker("search", other.clone())
            .expect_err("another config is refused");
        let RegistryError::Conflict {
            service,
            what,
            existing,
            requested,
        } = &error
        else {
            panic!("expected a conflict, got {error:?}");
        };
        assert_eq!(service, "search");
        assert_eq!(what, "the circuit breaker");
        assert_eq!(*existing, format!("{:?}", base()), "it shows the config that is there");
        assert_eq!(
            *requested,
            format!("{other:?}"),
            "it shows the config that was asked for"
        );
        let text = error.to_string();
        for part in [existing, requested, "\"search\""] {
            assert!(text.contains(part), "{text} should contain {part}");
        }
        assert_eq!(registry.status(), before, "a refusal changes nothing");
    }
    assert_one_breaker(&breaker, &registry.circuit_breaker("search", base()).unwrap());
}

#[test]
fn an_unequal_limit_is_an_error_that_shows_both_and_changes_nothing() {
    let second = Duration::from_secs(1);
    let adaptive = Adaptive::new(100);
    let cases: [(Algorithm, Vec<Algorithm>); 3] = [
        (
            TokenBucket::new(9, MINUTE).into(),
            vec![
                TokenBucket::new(8, MINUTE).into(),
                TokenBucket::new(9, second).into(),
                TokenBucket::new(9, MINUTE).burst(8).into(),
                SlidingWindow::new(9, MINUTE).into(),
                Adaptive::new(9).window(MINUTE).into(),
            ],
        ),
        (
            SlidingWindow::new(9, MINUTE).into(),
            vec![
                SlidingWindow::new(8, MINUTE).into(),
                SlidingWindow::new(9, second).into(),
            ],
        ),
        (
            adaptive.into(),
            vec![
                Adaptive::new(99).into(),
                adaptive.min_rate(11).into(),
                adaptive.max_rate(201).into(),
                adaptive.burst(99).into(),
                adaptive.window(second).into(),
                adaptive.error_threshold(0.2).into(),
                adaptive.adjustment_factor(0.3).into(),
                adaptive.minimum_calls(11).into(),
                adaptive.cancelled(Outcome::Failure).into(),
            ],
        ),
    ];
    for (base, others) in cases {
        let registry = registry();
        let limiter = registry.rate_limiter("search", base).unwrap();
        limiter.try_acquire().unwrap();
        let before = registry.status();
        for other in others {
            let error = registry
                .rate_limiter("search", other)
                .expect_err("another limit is refused");
            let RegistryError::Conflict {
                service,
                what,
                existing,
                requested,
            } = &error
            else {
                panic!("expected a conflict, got {error:?}");
            };
            assert_eq!(service, "search");
            assert_eq!(what, "the rate limit \"default\"");
            assert_eq!(*existing, format!("{base:?}"), "it shows the limit that is there");
            assert_eq!(
                *requested,
                format!("{other:?}"),
                "it shows the limit that was asked for"
            );
            let text = error.to_string();
            assert!(
                text.contains(existing) && text.contains(requested),
                "{text} should show both"
            );
            assert_eq!(registry.status(), before, "a refusal changes nothing");
        }
        assert_one_limiter(&limiter, &registry.rate_limiter("search", base).unwrap());
    }
}

#[test]
fn after_a_reconfiguration_the_present_config_counts() {
    let registry = registry();
    let breaker = registry
        .circuit_breaker("search", config().failure_threshold(3))
        .unwrap();
    breaker.reconfigure(config().failure_threshold(7)).unwrap();
    assert_one_breaker(
        &breaker,
        &registry
            .circuit_breaker("search", config().failure_threshold(7))
            .unwrap(),
    );
    let error = registry
        .circuit_breaker("search", config().failure_threshold(3))
        .unwrap_err();
    let RegistryError::Conflict { existing, .. } = error else {
        panic!("the config that it was made with is another one now, got {error:?}");
    };
    assert!(
        existing.contains("failure_threshold: Some(7)"),
        "the present config is shown: {existing}"
    );

    breaker
        .reconfigure(config().failure_threshold(0))
        .expect_err("zero is refused");
    assert_one_breaker(
        &breaker,
        &registry
            .circuit_breaker("search", config().failure_threshold(7))
            .unwrap(),
    );
}

#[test]
fn an_invalid_config_or_name_never_leaves_a_half_made_entry() {
    let registry = registry();
    let bucket = TokenBucket::new(9, MINUTE);
    let too_long = "x".repeat(Name::MAX_LEN + 1);
    let errors = [
        registry.circuit_breaker("search", config().failure_threshold(0)).err(),
        registry.circuit_breaker("", config()).err(),
        registry.circuit_breaker(&too_long, config()).err(),
        registry.rate_limiter("search", TokenBucket::new(0, MINUTE)).err(),
        registry
            .rate_limiter("search", SlidingWindow::new(9, Duration::ZERO))
            .err(),
        registry
            .rate_limiter("search", Adaptive::new(9).error_threshold(f64::NAN))
            .err(),
        registry.rate_limiter("", bucket).err(),
        registry.rate_limiter(&too_long, bucket).err(),
        registry.named_rate_limiter("search", "", bucket).err(),
        registry.named_rate_limiter("search", &too_long, bucket).err(),
    ];
    for error in errors {
        assert!(
            matches!(error, Some(RegistryError::Config(_))),
            "nonsense is refused as such: {error:?}"
        );
    }
    assert!(registry.services().is_empty(), "nothing was made");
    assert!(registry.status().services.is_empty());
    assert_eq!(registry.service_status("search"), None);

    registry.circuit_breaker("search", config()).unwrap();
    registry.rate_limiter("search", bucket).unwrap();
    let before = registry.status();
    let errors = [
        registry.circuit_breaker("search", config().failure_threshold(0)).err(),
        registry.rate_limiter("search", TokenBucket::new(0, MINUTE)).err(),
        registry
            .named_rate_limiter("search", "daily", TokenBucket::new(0, MINUTE))
            .err(),
    ];
    for error in errors {
        let invalid = matches!(error, Some(RegistryError::Config(_)));
        assert!(invalid, "nonsense is nonsense on a name in use too: {error:?}");
    }
    assert_eq!(registry.status(), before, "a refusal changes nothing");
}

#[test]
fn a_service_has_as_many_limits_as_it_is_given_names() {
    let registry = registry();
    let per_second = TokenBucket::new(10, Duration::from_secs(1));
    let daily = SlidingWindow::new(1000, Duration::from_secs(86_400));
    let second = registry.named_rate_limiter("search", "per-second", per_second).unwrap();
    registry.named_rate_limiter("search", "daily", daily).unwrap();
    registry.rate_limiter("search", Adaptive::new(50)).unwrap();
    let again = registry.named_rate_limiter("search", "per-second", per_second).unwrap();
    assert_one_limiter(&second, &again);

    let limiters = registry.get_rate_limiters("search");
    let limits: Vec<&str> = limiters.iter().map(|limiter| limiter.limit().as_str()).collect();
    assert_eq!(
        limits,
        ["daily", "default", "per-second"],
        "in the order of their names"
    );
    let by_default = registry
        .named_rate_limiter("search", "default", Adaptive::new(50))
        .unwrap();
    assert_one_limiter(&by_default, &registry.get_rate_limiter("search").unwrap());
    assert_eq!(
        registry.get_named_rate_limiter("search", "daily").unwrap().algorithm(),
        daily.into()
    );
    assert!(registry.get_named_rate_limiter("search", "hourly").is_none());
    assert!(registry.get_rate_limiters("ask").is_empty());
    assert!(
        registry.get_circuit_breaker("search").is_none(),
        "limits bring no breaker along"
    );

    let conflict = registry.named_rate_limiter("search", "daily", per_second).unwrap_err();
    assert!(conflict.to_string().contains("the rate limit \"daily\""), "{conflict}");
    let rejected = second.try_acquire_n(11).unwrap_err();
    assert_eq!(
        rejected.limit.as_deref(),
        Some("per-second"),
        "a rejection names its limit"
    );
}

#[test]
fn looking_up_makes_nothing() {
    let registry = registry();
    assert!(registry.get_circuit_breaker("search").is_none());
    assert!(registry.get_rate_limiter("search").is_none());
    assert!(registry.get_rate_limiters("search").is_empty());
    assert_eq!(registry.service_status("search"), None);
    assert!(!registry.remove("search"), "there is nothing to remove");
    assert!(registry.services().is_empty());
}

#[test]
fn what_was_built_elsewhere_can_be_registered_once_under_its_name() {
    let registry = registry();
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    registry.register(&breaker).unwrap();
    registry
        .register(breaker.clone())
        .expect("the same one again is no error");
    assert_one_breaker(&breaker, &registry.get_circuit_breaker("search").unwrap());
    assert_one_breaker(&breaker, &registry.circuit_breaker("search", config()).unwrap());

    let twin = CircuitBreaker::builder("search").build().unwrap();
    let error = registry
        .register(&twin)
        .expect_err("an equal config is another state all the same");
    assert!(
        matches!(&error, RegistryError::Taken { service, .. } if service == "search"),
        "{error:?}"
    );
    let taken = "the circuit breaker of \"search\" exists already, with a state of its own";
    assert_eq!(error.to_string(), taken);
    assert_one_breaker(&breaker, &registry.get_circuit_breaker("search").unwrap());

    let limiter = RateLimiter::builder("search", TokenBucket::new(9, MINUTE))
        .limit("daily")
        .build()
        .unwrap();
    registry.register(&limiter).unwrap();
    registry
        .register(limiter.clone())
        .expect("the same one again is no error");
    assert_one_limiter(&limiter, &registry.get_named_rate_limiter("search", "daily").unwrap());
    let twin = RateLimiter::builder("search", TokenBucket::new(9, MINUTE))
        .limit("daily")
        .build()
        .unwrap();
    let error = registry.register(twin).expect_err("the limit's name is taken");
    assert_eq!(
        error.to_string(),
        "the rate limit \"daily\" of \"search\" exists already, with a state of its own"
    );
    let other = RateLimiter::new("search", TokenBucket::new(9, MINUTE)).unwrap();
    registry.register(other).expect("another limit's name is free");
    assert_eq!(registry.get_rate_limiters("search").len(), 2);
}

#[test]
fn one_handle_may_stand_in_two_registries() {
    let (one, other) = (registry(), registry());
    let breaker = one.circuit_breaker("search", config()).unwrap();
    other.register(&breaker).unwrap();
    breaker.force_open();
    assert_eq!(names_of(&one.open_circuits()), ["search"]);
    assert_eq!(names_of(&other.open_circuits()), ["search"]);
    assert!(one.remove("search"));
    assert_eq!(
        names_of(&other.open_circuits()),
        ["search"],
        "removed here, it stands there"
    );
}

#[test]
fn a_removed_service_goes_on_unseen() {
    let registry = registry();
    let breaker = registry.circuit_breaker("search", config()).unwrap();
    let limiter = registry.rate_limiter("search", TokenBucket::new(1, MINUTE)).unwrap();
    registry.rate_limiter("ask", TokenBucket::new(1, MINUTE)).unwrap();
    limiter.try_acquire().unwrap();
    breaker.force_open();
    assert!(registry.remove("search"));
    assert!(!registry.remove("search"), "it is gone");
    assert_eq!(names_of(&registry.services()), ["ask"], "the others stay");
    assert!(registry.open_circuits().is_empty());
    assert!(registry.get_circuit_breaker("search").is_none());

    breaker.try_acquire().expect_err("who holds it goes on with it");
    limiter.try_acquire().expect_err("who holds it goes on with it");
    let fresh = registry
        .circuit_breaker("search", config().failure_threshold(9))
        .expect("the name is free again");
    assert_eq!(fresh.state(), State::Closed, "what is made anew has a state of its own");
    registry
        .register(&breaker)
        .expect_err("the name is taken by the new one");
}

#[test]
fn services_are_listed_in_the_order_of_names() {
    let registry = registry();
    for service in ["b", "ä", "a b", "B", "a", "aa", "10", "9"] {
        registry.circuit_breaker(service, config()).unwrap().force_open();
    }
    registry.rate_limiter("aaa", TokenBucket::new(1, MINUTE)).unwrap();
    let all = ["10", "9", "B", "a", "a b", "aa", "aaa", "b", "ä"];
    assert_eq!(names_of(&registry.services()), all);
    let status = registry.status();
    let names: Vec<&str> = status.services.keys().map(Name::as_str).collect();
    assert_eq!(names, all);
    let open: Vec<&str> = all.into_iter().filter(|name| *name != "aaa").collect();
    assert_eq!(names_of(&registry.open_circuits()), open);
    assert_eq!(names_of(&status.open_circuits), open);
}

#[test]
fn open_circuits_are_those_that_reject_whether_tripped_or_forced() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let make = |service: &str| {
        registry
            .circuit_breaker(service, config().failure_threshold(1))
            .unwrap()
    };
    let due = make("half-open, due");
    fail(&due);
    clock.advance(MINUTE);
    fail(&make("tripped"));
    make("forced open").force_open();
    make("forced closed").force_closed();
    make("disabled").disable();
    make("closed");
    registry
        .rate_limiter("no breaker", TokenBucket::new(1, MINUTE))
        .unwrap();
    assert_eq!(names_of(&registry.open_circuits()), ["forced open", "tripped"]);
    assert_eq!(
        registry.status().open_circuits,
        registry.open_circuits(),
        "the snapshot says the same"
    );
    assert_eq!(
        due.state(),
        State::HalfOpen,
        "a circuit whose open time is over lets probes through"
    );
}

#[test]
fn one_snapshot_joins_a_services_breaker_and_limits() {
    let registry = registry();
    let breaker = registry.circuit_breaker("search", config()).unwrap();
    let limiter = registry.rate_limiter("search", TokenBucket::new(9, MINUTE)).unwrap();
    registry
        .named_rate_limiter("ask", "daily", SlidingWindow::new(9, MINUTE))
        .unwrap();
    fail(&breaker);
    limiter.try_acquire_n(2).unwrap();

    let search = registry.service_status("search").unwrap();
    assert_eq!(search.service, "search");
    assert_eq!(search.circuit_breaker, Some(breaker.status()));
    assert_eq!(search.rate_limiters, [limiter.status()]);
    let ask = registry.service_status("ask").unwrap();
    assert_eq!(
        ask.circuit_breaker, None,
        "a service without a breaker has none in its status"
    );
    assert_eq!(ask.rate_limiters[0].name, "daily");
    let all = registry.status();
    assert_eq!(all.services["search"], search);
    assert_eq!(all.services["ask"], ask);
    assert_eq!(all.services.len(), 2);
}

#[test]
fn everything_made_by_a_registry_reads_its_clock() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let breaker = registry
        .circuit_breaker("search", config().failure_threshold(1))
        .unwrap();
    let limiter = registry.rate_limiter("search", TokenBucket::new(1, MINUTE)).unwrap();
    fail(&breaker);
    limiter.try_acquire().unwrap();
    clock.advance(MINUTE);
    assert_eq!(breaker.state(), State::HalfOpen);
    limiter
        .try_acquire()
        .expect("a minute has passed on the registry's clock");
}

/// What a registry-wide listener has heard: service, limit, and whether it was an override.
type Heard = Arc<Mutex<Vec<(String, Option<String>)>>>;

fn listen(registry: &Registry) -> (Heard, portcullis::ListenerId) {
    let heard = Heard::default();
    let id = registry.on_event({
        let heard = heard.clone();
        move |event| {
            let limit = event.limit.as_ref().map(ToString::to_string);
            heard.lock().unwrap().push((event.service.to_string(), limit));
        }
    });
    (heard, id)
}

fn take(heard: &Heard) -> Vec<(String, Option<String>)> {
    std::mem::take(&mut heard.lock().unwrap())
}

#[test]
fn a_listener_of_the_registry_hears_every_service_present_and_to_come() {
    let registry = registry();
    let present = registry.circuit_breaker("present", config()).unwrap();
    let (heard, _) = listen(&registry);
    let future = registry.clone().circuit_breaker("future", config()).unwrap();
    let limiter = registry
        .named_rate_limiter("future", "daily", TokenBucket::new(1, MINUTE))
        .unwrap();
    let registered = CircuitBreaker::builder("registered").build().unwrap();
    registered.reset();
    registry.register(&registered).unwrap();

    present.reset();
    future.reset();
    limiter.try_acquire_n(2).unwrap_err();
    registered.reset();
    let expected = [
        ("present", None),
        ("future", None),
        ("future", Some("daily")),
        ("registered", None),
    ];
    assert_eq!(
        take(&heard),
        expected.map(|(service, limit)| (service.to_owned(), limit.map(str::to_owned)))
    );

    registry.register(&registered).unwrap();
    registry.circuit_breaker("present", config()).unwrap().reset();
    assert_eq!(take(&heard).len(), 1, "got again, a handle is listened to once");
}

#[test]
fn a_removed_listener_hears_nothing_more() {
    let registry = registry();
    let breaker = registry.circuit_breaker("search", config()).unwrap();
    let ((first, id), (second, _)) = (listen(&registry), listen(&registry));
    assert!(registry.remove_listener(id));
    assert!(!registry.remove_listener(id), "it is gone");
    breaker.reset();
    registry.circuit_breaker("ask", config()).unwrap().reset();
    assert!(take(&first).is_empty(), "neither from present nor from future services");
    assert_eq!(take(&second).len(), 2, "the others still hear");

    let own = breaker.on_event(|_| ());
    assert!(
        !registry.remove_listener(own),
        "a breaker's own listener is not the registry's to remove"
    );
    assert!(breaker.remove_listener(own));
}

#[test]
fn a_removed_service_is_not_listened_to_any_more() {
    let registry = registry();
    let breaker = registry.circuit_breaker("search", config()).unwrap();
    let limiter = registry.rate_limiter("search", TokenBucket::new(1, MINUTE)).unwrap();
    let (heard, _) = listen(&registry);
    let mut own = breaker.subscribe(8);
    registry.remove("search");
    breaker.reset();
    limiter.try_acquire_n(2).unwrap_err();
    assert!(take(&heard).is_empty(), "the registry's listeners hear nothing more");
    assert!(own.try_recv().is_some(), "the breaker's own listeners do");
    registry.register(&breaker).unwrap();
    breaker.reset();
    assert_eq!(take(&heard).len(), 1, "registered again, it is heard again");
}

#[test]
fn a_name_is_any_text_of_1_to_255_bytes() {
    let registry = registry();
    for name in hostile_names() {
        let breaker = registry
            .circuit_breaker(&name, config())
            .unwrap_or_else(|error| panic!("{name:?}: {error}"));
        let limiter = registry
            .named_rate_limiter(&name, &name, TokenBucket::new(1, MINUTE))
            .unwrap();
        assert_eq!(breaker.name(), name.as_str());
        assert_eq!((limiter.name().as_str(), limiter.limit().as_str()), (&*name, &*name));
        assert_one_breaker(&breaker, &registry.get_circuit_breaker(&name).unwrap());
        let status = registry.service_status(&name).unwrap();
        assert_eq!(status.service, name.as_str());
        assert_eq!(status.rate_limiters[0].name, name.as_str());
    }
    let mut expected = hostile_names();
    expected.sort();
    assert_eq!(
        names_of(&registry.services()),
        expected,
        "no two of them are taken for one another"
    );

    for (refused, shown) in [
        (String::new(), "\"\" (0 bytes)"),
        ("x".repeat(256), "(256 bytes)"),
        ("é".repeat(128), "(256 bytes)"),
        ("🦀".repeat(10_000), "(40000 bytes)"),
    ] {
        let error = registry
            .circuit_breaker(&refused, config())
            .expect_err("too short or too long");
        let RegistryError::Config(error) = error else {
            panic!("expected a config error, got {error:?}");
        };
        assert_eq!((error.field(), error.expected()), ("name", "1 to 255 bytes of text"));
        assert!(
            error.value().ends_with(shown),
            "{} should end in {shown}",
            error.value()
        );
        assert!(error.to_string().len() < 400, "a long name does not drown the message");
        let error = registry
            .named_rate_limiter("search", &refused, TokenBucket::new(1, MINUTE))
            .unwrap_err();
        assert!(
            matches!(&error, RegistryError::Config(error) if error.field() == "limit"),
            "{error:?}"
        );
    }
    assert!(
        registry.get_circuit_breaker("search").is_none(),
        "a refused limit's name makes no service"
    );
}

#[test]
fn an_error_shows_a_hostile_name_on_one_line() {
    let registry = registry();
    registry.circuit_breaker("a\n\"b\"", config()).unwrap();
    let error = registry
        .circuit_breaker("a\n\"b\"", config().failure_threshold(9))
        .unwrap_err();
    assert!(error.to_string().contains(r#""a\n\"b\"""#), "{error}");
    assert!(!error.to_string().contains('\n'), "a name cannot forge a line of a log");
}

#[test]
fn dropping_the_last_handle_frees_everything() {
    let registry = registry();
    let alive = Arc::new(());
    let breaker = registry.circuit_breaker("search", config()).unwrap();
    registry.rate_limiter("search", TokenBucket::new(1, MINUTE)).unwrap();
    let held = alive.clone();
    registry.on_event(move |_| drop(held.clone()));
    let held = alive.clone();
    breaker.on_event(move |_| drop(held.clone()));
    assert_eq!(Arc::strong_count(&alive), 3);
    drop(registry);
    assert_eq!(
        Arc::strong_count(&alive),
        3,
        "the breaker is in use, and its listeners with it"
    );
    drop(breaker);
    assert_eq!(Arc::strong_count(&alive), 1, "nothing keeps what nobody can reach");
}

/// Looks into a registry when dropped, as a listener's captures may.
struct Looks(Registry);

impl Drop for Looks {
    fn drop(&mut self) {
        assert!(self.0.services().len() < 100, "the registry answers");
    }
}

/// Made by a registry at the moment it is converted.
struct Late(Registry);

impl From<Late> for portcullis::Registrable {
    fn from(late: Late) -> Self {
        late.0.circuit_breaker("late", config()).unwrap().into()
    }
}

#[test]
fn no_users_code_runs_under_the_registrys_lock() {
    let registry = registry();
    registry.circuit_breaker("search", config()).unwrap();
    registry.rate_limiter("search", TokenBucket::new(1, MINUTE)).unwrap();

    // The last handle of a refused breaker goes, and with it what its listener captured.
    let refused = CircuitBreaker::builder("search").build().unwrap();
    let looks = Looks(registry.clone());
    refused.on_event(move |_| assert!(looks.0.services().len() < 100));
    registry.register(refused).unwrap_err();
    let refused = RateLimiter::new("search", TokenBucket::new(1, MINUTE)).unwrap();
    let looks = Looks(registry.clone());
    refused.on_event(move |_| assert!(looks.0.services().len() < 100));
    registry.register(refused).unwrap_err();

    // So do a removed listener, and a removed service.
    let looks = Looks(registry.clone());
    let id = registry.on_event(move |_| assert!(looks.0.services().len() < 100));
    assert!(registry.remove_listener(id));
    let looks = Looks(registry.clone());
    let breaker = registry.get_circuit_breaker("search").unwrap();
    breaker.on_event(move |_| assert!(looks.0.services().len() < 100));
    drop(breaker);
    assert!(registry.remove("search"));

    // A conversion is the caller's code, too.
    registry
        .register(Late(registry.clone()))
        .expect("it is the one that is there");
}

#[test]
fn threads_may_do_everything_at_once() {
    const ROUNDS: usize = 300;
    let registry = registry();
    let (heard, _) = listen(&registry);
    let barrier = Barrier::new(4);
    let in_turn = |work: &(dyn Fn(usize) + Sync)| {
        barrier.wait();
        (0..ROUNDS).for_each(work);
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            in_turn(&|round| {
                let name = format!("service {}", round % 7);
                registry.circuit_breaker(&name, config()).unwrap().reset();
                registry.rate_limiter(&name, TokenBucket::new(1, MINUTE)).unwrap();
            });
        });
        scope.spawn(|| {
            in_turn(&|round| {
                registry.remove(&format!("service {}", round % 5));
            });
        });
        scope.spawn(|| {
            in_turn(&|_| {
                let status = registry.status();
                assert!(status.services.len() <= 7);
                assert!(registry.open_circuits().is_empty());
            });
        });
        scope.spawn(|| {
            in_turn(&|_| {
                let id = registry.on_event(|_| ());
                drop(registry.subscribe(1));
                assert!(registry.remove_listener(id));
            });
        });
    });
    take(&heard);
    let left: Vec<_> = registry
        .services()
        .iter()
        .filter_map(|name| registry.get_circuit_breaker(name))
        .collect();
    left.iter().for_each(CircuitBreaker::reset);
    assert_eq!(
        take(&heard).len(),
        left.len(),
        "every breaker that is left has the registry's listener once"
    );
}

#[test]
fn a_subscription_to_the_registry_gets_the_events_of_all_services() {
    let registry = registry();
    let mut events = registry.subscribe(8);
    registry.circuit_breaker("search", config()).unwrap().force_open();
    let rejected = registry
        .get_circuit_breaker("search")
        .unwrap()
        .try_acquire()
        .unwrap_err();
    assert!(matches!(events.try_recv().unwrap().kind, EventKind::Overridden { .. }));
    assert_eq!(events.try_recv().unwrap().kind, EventKind::Rejected(rejected));
    assert!(events.try_recv().is_none());
}
