//! The metrics page, read back by the parsers that others read it with: Python's `prometheus_client` and `promtool`.
//!
//! `tests/run` installs both. What was parsed must be what the status says, sample by sample.

use portcullis::{
    Adaptive, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerPermit, CircuitBreakerStatus, Clock, MetricsFormat,
    Name, Outcome, Override, RateLimiterStatus, Registry, RegistryStatus, SlidingWindow, State, TokenBucket,
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::Write,
    process::{Command, Output, Stdio},
    time::Duration,
};
use tokio_test::{assert_pending, task};

const MINUTE: Duration = Duration::from_secs(60);
const FORMATS: [MetricsFormat; 2] = [MetricsFormat::Prometheus, MetricsFormat::OpenMetrics];

/// Reads a page from its standard input and writes what it found as JSON.
const PARSE: &str = r#"
import json, sys
if sys.argv[1] == "openmetrics":
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
else:
    from prometheus_client.parser import text_string_to_metric_families as parse
page = sys.stdin.buffer.read().decode("utf-8")
families = [
    {
        "name": family.name,
        "type": family.type,
        "help": family.documentation,
        # As text, which loses no digit on the way.
        "samples": [[sample.name, sample.labels, repr(float(sample.value))] for sample in family.samples],
    }
    for family in parse(page)
]
json.dump(families, sys.stdout)
"#;

fn run(command: &mut Command, input: &str) -> Output {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {program} ({error}): tests/run installs it and runs the tests"));
    let mut stdin = child.stdin.take().expect("it is piped");
    // A parser that gives up early says why on its standard error, and a thread keeps full pipes from blocking each other.
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input.as_bytes()));
        (child.wait_with_output(), writer.join().expect("it does not panic"))
    });
    let output = written.0.unwrap();
    assert!(
        written.1.is_ok() || !output.status.success(),
        "{program} did not read its input"
    );
    output
}

type Labels = BTreeMap<String, String>;
type Samples = BTreeMap<(String, Labels), f64>;

#[derive(Debug, PartialEq)]
struct Family {
    kind: String,
    help: String,
}

/// A page as Python's parser of the format understands it.
struct Parsed {
    families: BTreeMap<String, Family>,
    samples: Samples,
}

fn parse(page: &str, format: MetricsFormat) -> Parsed {
    // The one that tests/run has made, also for a plain `cargo test` afterwards.
    let made = concat!(env!("CARGO_MANIFEST_DIR"), "/target/python/bin/python");
    let python = env::var_os("PORTCULLIS_PYTHON").unwrap_or_else(|| made.into());
    let format = if format == MetricsFormat::OpenMetrics {
        "openmetrics"
    } else {
        "text"
    };
    let output = run(Command::new(python).args(["-c", PARSE, format]), page);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        !complaint.contains("No module named 'prometheus_client"),
        "the Python parsers are missing: tests/run installs them and runs the tests\n{complaint}"
    );
    assert!(
        output.status.success(),
        "the {format} parser refused the page: {complaint}\n{page}"
    );

    let mut parsed = Parsed {
        families: BTreeMap::new(),
        samples: BTreeMap::new(),
    };
    let families: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for family in families.as_array().unwrap() {
        let text = |field: &str| family[field].as_str().unwrap().to_owned();
        let described = Family {
            kind: text("type"),
            help: text("help"),
        };
        let before = parsed.families.insert(text("name"), described);
        assert_eq!(before, None, "a family is written in one piece: {}", text("name"));
        for sample in family["samples"].as_array().unwrap() {
            let labels: Labels = serde_json::from_value(sample[1].clone()).unwrap();
            let key = (sample[0].as_str().unwrap().to_owned(), labels);
            let before = parsed.samples.insert(key, sample[2].as_str().unwrap().parse().unwrap());
            assert_eq!(before, None, "a sample is written once: {sample}");
        }
    }
    parsed
}

fn labels<const N: usize>(labels: [(&str, &str); N]) -> Labels {
    labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// The samples that a status asks for, put down by hand: the promise that dashboards and alerts stand on.
fn expected(status: &RegistryStatus) -> Samples {
    let mut samples = Samples::new();
    let version = labels([("version", env!("CARGO_PKG_VERSION"))]);
    samples.insert(("portcullis_build_info".into(), version), 1.0);
    for service in status.services.values() {
        if let Some(breaker) = &service.circuit_breaker {
            expect_breaker(&mut samples, breaker);
        }
        for limiter in &service.rate_limiters {
            expect_limiter(&mut samples, limiter);
        }
    }
    samples
}

fn expect_breaker(samples: &mut Samples, breaker: &CircuitBreakerStatus) {
    let mut add = |name: &str, more: &[(&str, &str)], value: f64| {
        let mut labels = labels([("service", breaker.service.as_str())]);
        labels.extend(
            more.iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        samples.insert((name.to_owned(), labels), value);
    };
    let number = match breaker.state {
        State::Closed => 0.0,
        State::HalfOpen => 1.0,
        State::Open => 2.0,
    };
    add("circuit_breaker_state", &[], number);
    let present = match breaker.forced {
        Some(Override::ForcedOpen) => "forced_open",
        Some(Override::ForcedClosed) => "forced_closed",
        Some(Override::Disabled) => "disabled",
        None if breaker.state == State::Closed => "closed",
        None if breaker.state == State::Open => "open",
        None => "half_open",
    };
    for state in [
        "closed",
        "open",
        "half_open",
        "forced_open",
        "forced_closed",
        "disabled",
    ] {
        add(
            "circuit_breaker_in_state",
            &[("state", state)],
            f64::from(u8::from(state == present)),
        );
    }
    let metrics = &breaker.metrics;
    for (outcome, n) in [
        ("success", metrics.successful_requests),
        ("failure", metrics.failed_requests),
        ("ignored", metrics.ignored_requests),
        ("cancelled", metrics.cancelled_requests),
    ] {
        add("circuit_breaker_calls_total", &[("outcome", outcome)], n as f64);
    }
    add("circuit_breaker_slow_calls_total", &[], metrics.slow_requests as f64);
    for (reason, n) in [
        ("open", metrics.rejected.open),
        ("half_open_full", metrics.rejected.half_open_full),
        ("forced_open", metrics.rejected.forced_open),
    ] {
        add("circuit_breaker_rejected_total", &[("reason", reason)], n as f64);
    }
    let moves = metrics.state_transitions;
    for (from, to, n) in [
        ("closed", "open", moves.closed_to_open),
        ("open", "half_open", moves.open_to_half_open),
        ("half_open", "closed", moves.half_open_to_closed),
        ("half_open", "open", moves.half_open_to_open),
    ] {
        add(
            "circuit_breaker_transitions_total",
            &[("from", from), ("to", to)],
            n as f64,
        );
    }
    for (name, value) in [
        ("circuit_breaker_success_rate", metrics.success_rate),
        (
            "circuit_breaker_failure_ratio",
            breaker.window.and_then(|window| window.failure_rate),
        ),
        (
            "circuit_breaker_slow_call_ratio",
            breaker.window.and_then(|window| window.slow_call_rate),
        ),
        (
            "circuit_breaker_probes_in_flight",
            Some(breaker.probes_in_flight as f64),
        ),
    ] {
        if let Some(value) = value {
            add(name, &[], value);
        }
    }
}

fn expect_limiter(samples: &mut Samples, limiter: &RateLimiterStatus) {
    let mut add = |name: &str, reason: Option<&str>, value: f64| {
        let mut labels = labels([("service", limiter.service.as_str()), ("limit", limiter.name.as_str())]);
        labels.extend(reason.map(|reason| ("reason".to_owned(), reason.to_owned())));
        samples.insert((name.to_owned(), labels), value);
    };
    add("rate_limiter_accepted_total", None, limiter.accepted_requests as f64);
    add("rate_limiter_accepted_cost_total", None, limiter.accepted_cost as f64);
    add("rate_limiter_returned_total", None, limiter.returned_requests as f64);
    add(
        "rate_limiter_rejected_total",
        Some("over_limit"),
        limiter.rejected.over_limit as f64,
    );
    add(
        "rate_limiter_rejected_total",
        Some("cost_exceeds_burst"),
        limiter.rejected.cost_exceeds_burst as f64,
    );
    add("rate_limiter_available", None, limiter.available_tokens);
    add("rate_limiter_rate", None, limiter.rate / limiter.period.as_secs_f64());
    add("rate_limiter_waiting", None, limiter.waiting as f64);
}

/// Reads the page of a registry back in both formats: the samples are those of the status, in families of the right kind.
fn assert_reads_back(registry: &Registry) {
    let status = registry.status();
    let expected = expected(&status);
    for format in FORMATS {
        let page = registry.metrics_text(format);
        let parsed = parse(&page, format);
        for (sample, value) in &expected {
            assert_eq!(parsed.samples.get(sample), Some(value), "{sample:?} in {format:?}");
        }
        let unexpected: Vec<_> = parsed
            .samples
            .keys()
            .filter(|sample| !expected.contains_key(*sample))
            .collect();
        assert!(
            unexpected.is_empty(),
            "no sample without a status behind it: {unexpected:?}"
        );
        assert_eq!(registry.metrics_text(format), page, "reading the page changes nothing");
        for (name, family) in &parsed.families {
            assert!(family.help.ends_with('.'), "{name} is explained: {:?}", family.help);
            let counter = expected.keys().any(|(sample, _)| *sample == format!("{name}_total"));
            assert_eq!(
                family.kind,
                if counter { "counter" } else { "gauge" },
                "{name} in {format:?}"
            );
        }
    }
    assert_eq!(registry.status(), status, "reading the page changes nothing");
    assert_linted(&registry.metrics_text(MetricsFormat::Prometheus));
}

/// `promtool` parses the older format, and knows the conventions for names, units and help.
fn assert_linted(page: &str) {
    let output = run(Command::new("promtool").args(["check", "metrics"]), page);
    let said = [output.stdout, output.stderr]
        .map(|said| String::from_utf8_lossy(&said).into_owned())
        .concat();
    assert!(
        output.status.success() && said.is_empty(),
        "promtool check metrics: {said}\n{page}"
    );
}

fn config() -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
}

fn settle(breaker: &CircuitBreaker, outcome: Outcome, times: usize) {
    for _ in 0..times {
        breaker.try_acquire().expect("the circuit admits").settle(outcome);
    }
}

fn reject(breaker: &CircuitBreaker, times: usize) {
    for _ in 0..times {
        breaker.try_acquire().expect_err("the circuit rejects");
    }
}

/// Breakers in every state and override. The probe keeps one of them probing.
fn breakers_everywhere() -> (Registry, CircuitBreakerPermit) {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let make = |service: &str| {
        let config = config()
            .failure_threshold(2)
            .success_threshold(1)
            .half_open_max_calls(1);
        registry.circuit_breaker(service, config).unwrap()
    };
    make("untouched");
    let due = make("half-open, due");
    settle(&due, Outcome::Failure, 2);
    let half_open = make("half-open, probing");
    settle(&half_open, Outcome::Failure, 2);
    let recovered = make("recovered");
    settle(&recovered, Outcome::Failure, 2);
    let reopened = make("reopened");
    settle(&reopened, Outcome::Failure, 2);
    clock.advance(MINUTE);
    let probe = half_open.try_acquire().unwrap();
    reject(&half_open, 3);
    settle(&recovered, Outcome::Success, 2);
    settle(&reopened, Outcome::Failure, 1);
    reject(&reopened, 5);
    let open = make("open");
    settle(&open, Outcome::Success, 1);
    settle(&open, Outcome::Ignored, 2);
    drop(open.try_acquire().unwrap());
    settle(&open, Outcome::Failure, 2);
    reject(&open, 1);
    let forced_open = make("forced open");
    forced_open.force_open();
    reject(&forced_open, 4);
    let forced_closed = make("forced closed");
    forced_closed.force_closed();
    settle(&forced_closed, Outcome::Failure, 9);
    let disabled = make("disabled");
    disabled.disable();
    settle(&disabled, Outcome::Failure, 9);
    let rates = config()
        .failure_rate(0.9)
        .slow_calls(0.9, Duration::from_secs(1))
        .minimum_calls(3);
    let timed = registry.circuit_breaker("timed", rates.clone()).unwrap();
    let slow = timed.try_acquire().unwrap();
    clock.advance(Duration::from_secs(1));
    slow.settle(Outcome::Success);
    settle(&timed, Outcome::Failure, 1);
    settle(&timed, Outcome::Success, 1);
    let below = registry.circuit_breaker("below the minimum", rates).unwrap();
    settle(&below, Outcome::Failure, 2);

    (registry, probe)
}

/// The value of one sample, if it is there.
fn value(samples: &Samples, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let labels = labels
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    samples.get(&(name.to_owned(), labels.collect())).copied()
}

#[test]
fn breakers_in_every_state_and_override_read_back() {
    let (registry, _probe) = breakers_everywhere();
    let states: BTreeSet<_> = registry
        .status()
        .services
        .values()
        .filter_map(|service| service.circuit_breaker.as_ref())
        .map(|it| it.forced.map_or(it.state.as_str(), Override::as_str))
        .collect();
    assert_eq!(states.len(), 6, "every state and override is among them: {states:?}");
    assert_reads_back(&registry);
}

#[test]
fn a_breakers_samples_tell_what_happened_to_it() {
    let (registry, _probe) = breakers_everywhere();
    let samples = parse(
        &registry.metrics_text(MetricsFormat::Prometheus),
        MetricsFormat::Prometheus,
    )
    .samples;
    let of = |name: &str, service| value(&samples, name, &[("service", service)]);
    for (service, number) in [
        ("untouched", 0.0),
        ("recovered", 0.0),
        ("forced closed", 0.0),
        ("disabled", 0.0),
        ("half-open, due", 1.0),
        ("half-open, probing", 1.0),
        ("open", 2.0),
        ("reopened", 2.0),
        ("forced open", 2.0),
    ] {
        assert_eq!(of("circuit_breaker_state", service), Some(number), "{service}");
    }
    assert_eq!(
        of("circuit_breaker_success_rate", "untouched"),
        None,
        "a rate of nothing is left out"
    );
    assert_eq!(
        of("circuit_breaker_failure_ratio", "below the minimum"),
        None,
        "and so is one of too little"
    );
    assert_eq!(of("circuit_breaker_slow_calls_total", "timed"), Some(1.0));
    assert_eq!(of("circuit_breaker_probes_in_flight", "half-open, probing"), Some(1.0));

    let labelled = |name: &str, service, label, is| value(&samples, name, &[("service", service), (label, is)]);
    let rejected = |service, reason| labelled("circuit_breaker_rejected_total", service, "reason", reason);
    assert_eq!(rejected("half-open, probing", "half_open_full"), Some(3.0));
    assert_eq!(rejected("reopened", "open"), Some(5.0));
    assert_eq!(rejected("forced open", "forced_open"), Some(4.0));
    let calls = |service, outcome| labelled("circuit_breaker_calls_total", service, "outcome", outcome);
    assert_eq!(calls("open", "cancelled"), Some(1.0));
    assert_eq!(calls("disabled", "failure"), Some(0.0), "disabled, it records nothing");
    let moves = |service, from, to| {
        let labels = [("service", service), ("from", from), ("to", to)];
        value(&samples, "circuit_breaker_transitions_total", &labels)
    };
    assert_eq!(
        moves("half-open, due", "open", "half_open"),
        Some(1.0),
        "a due move is shown"
    );
    assert_eq!(moves("recovered", "half_open", "closed"), Some(1.0));
    assert_eq!(moves("reopened", "half_open", "open"), Some(1.0));
}

#[test]
fn limiters_of_every_kind_read_back() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let bucket = registry
        .named_rate_limiter("search", "bucket", TokenBucket::new(7, MINUTE).burst(3))
        .unwrap();
    let window = registry
        .named_rate_limiter("search", "window", SlidingWindow::new(5, MINUTE))
        .unwrap();
    let adaptive = registry
        .named_rate_limiter("search", "adaptive", Adaptive::new(100).minimum_calls(1))
        .unwrap();
    let slow = Duration::from_secs(86_400 * 365);
    let tiny = registry
        .named_rate_limiter("ask", "tiny", TokenBucket::new(1, slow))
        .unwrap();
    registry
        .named_rate_limiter("ask", "fast", TokenBucket::new(5, Duration::from_nanos(1)))
        .unwrap();
    registry
        .named_rate_limiter("ask", "large", TokenBucket::new(u32::MAX, MINUTE))
        .unwrap();

    bucket.try_acquire_n(3).unwrap();
    bucket.try_acquire_n(4).unwrap_err();
    bucket.try_acquire().unwrap_err();
    clock.advance(Duration::from_millis(10_007));
    let status = bucket.status();
    assert!(
        status.available_tokens.fract() > 0.0,
        "a part of a token: {}",
        status.available_tokens
    );
    window.try_acquire_n(2).unwrap();
    window.try_acquire().unwrap().unused();
    window.try_acquire_n(4).unwrap_err();
    adaptive.try_acquire().unwrap().settle(Outcome::Failure);
    clock.advance(MINUTE);
    tiny.try_acquire().unwrap();
    let mut waits = [tiny.acquire(), tiny.acquire()].map(task::spawn);
    for wait in &mut waits {
        assert_pending!(wait.poll());
    }
    assert_reads_back(&registry);

    let samples = parse(
        &registry.metrics_text(MetricsFormat::OpenMetrics),
        MetricsFormat::OpenMetrics,
    )
    .samples;
    let of = |name: &str, service, limit| value(&samples, name, &[("service", service), ("limit", limit)]);
    assert_eq!(of("rate_limiter_accepted_cost_total", "search", "bucket"), Some(3.0));
    assert_eq!(of("rate_limiter_returned_total", "search", "window"), Some(1.0));
    let per_second = of("rate_limiter_rate", "search", "adaptive");
    assert_eq!(per_second, Some(80.0 / 60.0), "a due move is shown");
    assert_eq!(of("rate_limiter_rate", "ask", "fast"), Some(5e9));
    assert_eq!(of("rate_limiter_available", "ask", "large"), Some(f64::from(u32::MAX)));
    assert_eq!(of("rate_limiter_waiting", "ask", "tiny"), Some(2.0));
}

#[test]
fn exactly_one_state_of_a_circuit_is_1() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let breaker = registry
        .circuit_breaker("search", config().failure_threshold(1).success_threshold(1))
        .unwrap();
    let steps: [(&str, &dyn Fn()); 8] = [
        ("closed", &|| ()),
        ("open", &|| settle(&breaker, Outcome::Failure, 1)),
        ("half_open", &|| clock.advance(MINUTE)),
        ("closed", &|| settle(&breaker, Outcome::Success, 1)),
        ("forced_open", &|| breaker.force_open()),
        ("forced_closed", &|| breaker.force_closed()),
        ("disabled", &|| breaker.disable()),
        ("closed", &|| breaker.reset()),
    ];
    for (state, step) in steps {
        step();
        for format in FORMATS {
            let samples = parse(&registry.metrics_text(format), format).samples;
            let in_state: Vec<_> = samples
                .iter()
                .filter(|((name, _), _)| name == "circuit_breaker_in_state")
                .collect();
            assert_eq!(in_state.len(), 6, "each state and override has its sample");
            let ones: Vec<_> = in_state.iter().filter(|(_, value)| **value != 0.0).collect();
            assert_eq!(ones.len(), 1, "exactly one of them is not 0: {ones:?}");
            let ((_, labels), value) = ones[0];
            assert_eq!((&*labels["state"], **value), (state, 1.0));
        }
    }
}

#[test]
fn an_empty_registry_reads_back() {
    let registry = Registry::new();
    assert_reads_back(&registry);
    for format in FORMATS {
        assert_eq!(
            parse(&registry.metrics_text(format), format).samples.len(),
            1,
            "the version is all there is"
        );
    }
}

#[test]
fn an_openmetrics_page_ends_in_its_end_and_the_other_has_none() {
    let registry = Registry::new();
    assert!(registry.metrics_text(MetricsFormat::OpenMetrics).ends_with("\n# EOF\n"));
    assert!(!registry.metrics_text(MetricsFormat::Prometheus).contains("EOF"));
}

/// A registry whose names are all service names and limit names at once.
fn registry_of<'a>(names: impl IntoIterator<Item = &'a str>) -> Registry {
    let registry = Registry::with_clock(Clock::manual());
    for name in names {
        registry.circuit_breaker(name, config()).unwrap();
        registry
            .named_rate_limiter(name, name, TokenBucket::new(9, MINUTE))
            .unwrap();
    }
    registry
}

#[test]
fn hostile_names_read_back_unchanged() {
    let longest = "é".repeat(127);
    assert_eq!(longest.len() + 1, Name::MAX_LEN);
    let names = [
        "\"",
        "\\",
        "\\\"",
        "\\n",
        "\\\\n",
        "\\\n",
        "a\nb",
        "\n",
        "a\r\nb",
        "\r",
        "\0",
        "\u{7f}",
        " ",
        " a ",
        "\t",
        "\u{b}",
        "\u{85}",
        "\u{a0}",
        "\u{2028}",
        "\u{2029}",
        "\u{feff}",
        "\u{202e}",
        "{",
        "}",
        "{}",
        "}} 1",
        "=",
        ",",
        "a=\"b\",c=\"d\"",
        "\"} 1\ncircuit_breaker_state{service=\"forged\"} 2\n#",
        "#",
        "# EOF",
        "\n# EOF\n",
        "# HELP x y",
        "🦀",
        "e\u{301}",
        "\u{10ffff}",
        "NaN",
        "+Inf",
        "1",
        "service",
        &longest,
    ];
    let registry = registry_of(names);
    assert_reads_back(&registry);
    for format in FORMATS {
        let samples = parse(&registry.metrics_text(format), format).samples;
        let services: BTreeSet<&str> = samples
            .keys()
            .filter(|(name, _)| name == "circuit_breaker_state")
            .map(|(_, labels)| &*labels["service"])
            .collect();
        assert_eq!(services, names.into(), "each name, and no forged one, in {format:?}");
    }
}

proptest! {
    // Each case starts three programs on a page of many names.
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn any_names_read_back_unchanged(
        names in proptest::collection::btree_set("(?s).{1,60}|[\\\\n\"\n{}=, #]{1,20}", 1..100),
    ) {
        assert_reads_back(&registry_of(names.iter().map(String::as_str)));
    }
}
