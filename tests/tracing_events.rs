//! Every event as a `tracing` event: its level, its target, its fields.
#![cfg(feature = "tracing")]

use futures_util::FutureExt;
use portcullis::{
    Adaptive, CircuitBreaker, CircuitBreakerConfig, Clock, GuardLayer, KeyedRateLimiter, Outcome, RateLimiter,
    TokenBucket,
};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};
use tower::{Layer as _, ServiceExt, service_fn};
use tracing::{
    Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context, prelude::*};

const MINUTE: Duration = Duration::from_secs(60);

/// One event: its level and its fields, the message and the target among them.
type Line = (Level, BTreeMap<String, String>);

#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<Line>>>);

impl<S: Subscriber> Layer<S> for Capture {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let line = (*event.metadata().level(), fields.0);
        self.0.lock().unwrap().push(line);
    }

    fn register_callsite(&self, metadata: &'static tracing::Metadata<'static>) -> tracing::subscriber::Interest {
        // As a user's filter by crate name would.
        if metadata.target().starts_with("portcullis") {
            tracing::subscriber::Interest::always()
        } else {
            tracing::subscriber::Interest::never()
        }
    }
}

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.to_string(), value.to_owned());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.to_string(), format!("{value:?}"));
    }
}

/// Runs `work` and returns what it told of that service.
///
/// One subscriber for the whole process: `tracing` decides once, for every thread, whether anybody wants a kind of event, and
/// a thread without a subscriber of its own would answer no.
fn told_of(service: &str, work: impl FnOnce()) -> Vec<Line> {
    static CAPTURE: OnceLock<Capture> = OnceLock::new();
    let capture = CAPTURE.get_or_init(|| {
        let capture = Capture::default();
        tracing_subscriber::registry().with(capture.clone()).init();
        capture
    });
    work();
    let lines = capture.0.lock().unwrap();
    lines
        .iter()
        .filter(|(_, fields)| fields["service"] == service)
        .cloned()
        .collect()
}

/// A line that is expected: message, service and the other fields.
fn line(level: Level, message: &str, service: &str, more: &[(&str, &str)]) -> Line {
    let fields = [("message", message), ("service", service)]
        .into_iter()
        .chain(more.iter().copied());
    (
        level,
        fields
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
    )
}

#[test]
fn every_event_of_a_circuit_is_told_without_any_listener() {
    let service = "circuit";
    let clock = Clock::manual();
    let lines = told_of(service, || {
        let breaker = CircuitBreaker::builder(service)
            .failure_threshold(1)
            .success_threshold(1)
            .clock(&clock)
            .build()
            .unwrap();
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        clock.advance(MINUTE / 2);
        breaker.try_acquire().unwrap_err();
        clock.advance(MINUTE / 2);
        breaker.try_acquire().unwrap().settle(Outcome::Success);
        breaker.force_open();
        breaker.try_acquire().unwrap_err();
        breaker.reset();
        breaker.reconfigure(CircuitBreakerConfig::default()).unwrap();
    });
    let moved = |level, from, to, generation| {
        let more = [("from", from), ("to", to), ("generation", generation)];
        line(level, "circuit breaker transition", service, &more)
    };
    let expected = [
        moved(Level::WARN, "closed", "open", "2"),
        line(
            Level::DEBUG,
            "rejected",
            service,
            &[("reason", "open"), ("retry_after", "30.0")],
        ),
        moved(Level::INFO, "open", "half_open", "3"),
        moved(Level::INFO, "half_open", "closed", "4"),
        line(
            Level::WARN,
            "circuit breaker overridden",
            service,
            &[("into", "forced_open"), ("generation", "5")],
        ),
        line(Level::DEBUG, "rejected", service, &[("reason", "forced_open")]),
        line(Level::WARN, "circuit breaker reset", service, &[("generation", "6")]),
        line(
            Level::INFO,
            "circuit breaker reconfigured",
            service,
            &[("generation", "7")],
        ),
    ];
    assert_eq!(lines, expected);
}

#[test]
fn every_event_of_a_limit_is_told_with_the_limits_name() {
    let service = "limit";
    let clock = Clock::manual();
    let lines = told_of(service, || {
        let adaptive = Adaptive::new(100).minimum_calls(1);
        let limiter = RateLimiter::builder(service, adaptive)
            .limit("daily")
            .clock(&clock)
            .build()
            .unwrap();
        limiter.try_acquire_n(100).unwrap().settle(Outcome::Failure);
        limiter.try_acquire_n(101).unwrap_err();
        limiter.try_acquire_n(100).unwrap_err();
        clock.advance(MINUTE);
        limiter.try_acquire().unwrap();
    });
    let daily = ("limit", "daily");
    let expected = [
        line(
            Level::DEBUG,
            "rejected",
            service,
            &[daily, ("reason", "cost_exceeds_burst")],
        ),
        line(
            Level::DEBUG,
            "rejected",
            service,
            &[daily, ("reason", "over_limit"), ("retry_after", "60.0")],
        ),
        line(
            Level::INFO,
            "rate limit moved",
            service,
            &[daily, ("from", "100.0"), ("to", "80.0")],
        ),
    ];
    assert_eq!(lines, expected);
}

#[test]
fn listeners_hear_beside_the_tracing_subscriber() {
    let service = "both";
    let heard = Arc::new(Mutex::new(0));
    let lines = told_of(service, || {
        let breaker = CircuitBreaker::builder(service).build().unwrap();
        let count = heard.clone();
        breaker.on_event(move |_| *count.lock().unwrap() += 1);
        breaker.reset();
    });
    assert_eq!((lines.len(), *heard.lock().unwrap()), (1, 1));
}

#[test]
fn what_a_layer_rejects_is_told_once() {
    let service = "layer";
    let clock = Clock::manual();
    let told = told_of(service, || {
        let limiter = RateLimiter::builder(service, TokenBucket::new(1, MINUTE))
            .clock(&clock)
            .build()
            .unwrap();
        let breaker = CircuitBreaker::builder(service)
            .failure_threshold(1)
            .recovery_timeout(MINUTE / 2)
            .clock(&clock)
            .build()
            .unwrap();
        let inner = service_fn(async |(): ()| Err::<(), _>(std::io::Error::other("down")));
        let mut throttled = GuardLayer::new(limiter).layer(inner);
        let mut broken = GuardLayer::new(breaker).layer(inner);
        for _ in 0..2 {
            assert!((&mut throttled).oneshot(()).now_or_never().unwrap().is_err());
            assert!((&mut broken).oneshot(()).now_or_never().unwrap().is_err());
        }
    });
    let rejected = told.iter().filter(|(_, fields)| fields["message"] == "rejected");
    let expected = [
        line(
            Level::DEBUG,
            "rejected",
            service,
            &[("limit", "default"), ("reason", "over_limit"), ("retry_after", "60.0")],
        ),
        line(
            Level::DEBUG,
            "rejected",
            service,
            &[("reason", "open"), ("retry_after", "30.0")],
        ),
    ];
    assert_eq!(rejected.cloned().collect::<Vec<_>>(), expected);
}

#[test]
fn a_flood_of_rejections_tells_nothing_above_debug_but_the_moves_of_the_circuit_and_no_key() {
    let clock = Clock::manual();
    let lines = told_of("flooded", || {
        let breaker = CircuitBreaker::builder("flooded").clock(&clock).build().unwrap();
        let callers = KeyedRateLimiter::builder("flooded", TokenBucket::new(5, MINUTE))
            .clock(&clock)
            .build()
            .unwrap();
        let by_key = callers.by(|caller: &&'static str| Some(*caller));
        let fails = service_fn(async |_: &str| Err::<(), _>("down"));
        let service = GuardLayer::new((by_key, breaker)).layer(fails);
        for _ in 0..1_000 {
            service.clone().oneshot("sk-4242").now_or_never().unwrap().unwrap_err();
        }
    });
    let (told, debug): (Vec<_>, Vec<_>) = lines.iter().partition(|(level, _)| *level < Level::DEBUG);
    assert_eq!(debug.len(), 995, "each rejection");
    assert_eq!(told.len(), 1, "the circuit opened: {told:?}");
    assert!(!format!("{lines:?}").contains("4242"));
}
