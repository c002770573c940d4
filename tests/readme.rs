//! Pins that the README shows what the code does: the status page, the metrics with their types and labels, the alert rules.
//!
//! `tests/run` installs `promtool`, which runs the alert rules.
#![cfg(feature = "http")]

use portcullis::{
    CircuitBreakerConfig, Clock, KeyedCircuitBreaker, KeyedRateLimiter, MetricsFormat, Outcome, RateLimiter, Registry,
    TokenBucket, Window,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
    time::Duration,
};
use tower::ServiceExt;

const README: &str = include_str!("../README.md");

/// What stands between the first fence of that language and its end.
fn block(language: &str) -> &'static str {
    let (_, after) = README.split_once(&format!("```{language}\n")).expect("such a block");
    after.split_once("```").expect("the end of the block").0
}

#[tokio::test]
async fn the_status_in_the_readme_is_what_the_endpoint_answers() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let config = CircuitBreakerConfig::default().failure_threshold(3);
    let breaker = registry
        .circuit_breaker("research", config.recovery_timeout(Duration::from_secs(30)))
        .unwrap();
    let bucket = TokenBucket::new(50, Duration::from_secs(60)).burst(10);
    let limiter = registry.rate_limiter("research", bucket).unwrap();
    for outcome in [Outcome::Success, Outcome::Failure] {
        for _ in 0..3 {
            limiter.try_acquire().unwrap();
            breaker.try_acquire().unwrap().settle(outcome);
        }
    }
    for _ in 0..2 {
        limiter.try_acquire().unwrap();
        breaker.try_acquire().unwrap_err();
    }
    clock.advance(Duration::from_millis(500));

    let request = http::Request::get("/status/research").body(()).unwrap();
    let response = registry.admin().oneshot(request).await.unwrap();
    let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
    let answered: serde_json::Value = serde_json::from_slice(&body.to_bytes()).unwrap();
    let shown: serde_json::Value = serde_json::from_str(block("json")).unwrap();
    assert_eq!(shown, answered, "the README shows another page than the endpoint");
}

/// Every family of a page on which nothing is absent: its type and the labels of its samples.
fn families() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let registry = Registry::new();
    let config = CircuitBreakerConfig::default()
        .failure_rate(0.9)
        .window(Window::calls(10));
    let breaker = registry.circuit_breaker("a", config.minimum_calls(1)).unwrap();
    breaker.try_acquire().unwrap().settle(Outcome::Success);
    registry
        .register(RateLimiter::new("a", TokenBucket::new(1, Duration::from_secs(1))).unwrap())
        .unwrap();
    let keyed = KeyedRateLimiter::builder("a", TokenBucket::new(1, Duration::from_secs(1))).limit("keyed");
    registry.register(keyed.build().unwrap()).unwrap();
    registry
        .register(KeyedCircuitBreaker::builder("b").build().unwrap())
        .unwrap();
    let mut families = BTreeMap::new();
    for line in registry.metrics_text(MetricsFormat::Prometheus).lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, kind) = family.split_once(' ').unwrap();
            families.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new()));
        } else if !line.starts_with('#') {
            let (name, rest) = line.split_once('{').unwrap();
            let labels = rest.split_once('}').unwrap().0.split(',');
            let labels = labels.map(|label| label.split_once('=').unwrap().0.to_owned());
            families
                .get_mut(name)
                .expect("a type before its samples")
                .1
                .extend(labels);
        }
    }
    families
}

#[test]
fn the_readme_lists_every_metric_with_its_type_and_labels() {
    let (_, section) = README.split_once("### Metrics\n").unwrap();
    let (section, _) = section.split_once("\n#").unwrap();
    let mut listed = BTreeMap::new();
    for row in section.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let labels = cells[3].split(", ").map(|label| label.trim_matches('`').to_owned());
        listed.insert(
            cells[1].trim_matches('`').to_owned(),
            (cells[2].to_owned(), labels.collect()),
        );
    }
    assert_eq!(listed, families(), "the README lists other metrics than /metrics has");
}

#[test]
fn the_alert_rules_ask_only_for_metrics_and_labels_that_exist() {
    let families = families();
    let expressions = block("yaml").lines().filter(|line| !line.contains("summary:"));
    let mut asked = 0;
    for line in expressions {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = line.split(|c| !is_name(c));
        for word in words.filter(|word| word.starts_with("circuit_breaker_") || word.starts_with("rate_limiter_")) {
            let (_, labels) = families
                .get(word)
                .unwrap_or_else(|| panic!("there is no metric {word}"));
            let after = line.split_once(word).unwrap().1;
            if let Some(selector) = after.strip_prefix('{') {
                let label = selector.split(['=', '!']).next().unwrap();
                assert!(labels.contains(label), "{word} has no label {label}");
            }
            asked += 1;
        }
    }
    assert!(asked >= 6, "each of the six rules asks for a metric, found {asked}");
}

/// Every sample of every scrape, as `promtool` takes them. Every service is called each 5 s, and scraped each 15 s before that.
fn scraped(registry: &Registry, scrapes: usize, mut call: impl FnMut(u64)) -> Vec<serde_json::Value> {
    let mut series: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for scrape in 0..scrapes {
        for line in registry.metrics_text(MetricsFormat::Prometheus).lines() {
            if !line.starts_with('#') {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let values = series.entry(name.to_owned()).or_default();
                // What was absent so far.
                values.resize(scrape, "_".to_owned());
                values.push(value.to_owned());
            }
        }
        (0..3).for_each(|third| call(scrape as u64 * 15 + third * 5));
    }
    let series = series.into_iter();
    series
        .map(|(name, values)| serde_json::json!({ "series": name, "values": values.join(" ") }))
        .collect()
}

/// A probe that fails keeps an outage going, though a scrape may see the circuit half-open just before.
#[test]
fn the_alerts_tell_a_circuit_that_stays_open_from_one_that_opens_again_and_again() {
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let services = ["well", "blip", "down", "flapping"].map(|service| {
        let config = CircuitBreakerConfig::default().failure_threshold(1);
        let open = Duration::from_secs(if service == "flapping" { 20 } else { 60 });
        let breaker = registry.circuit_breaker(service, config.recovery_timeout(open));
        (service, breaker.unwrap())
    });
    let series = scraped(&registry, 120, |second| {
        for (service, breaker) in &services {
            let fails = match *service {
                "blip" => (60..90).contains(&second),
                "down" => second >= 60,
                "flapping" => second % 60 == 0,
                _ => false,
            };
            if let Ok(permit) = breaker.try_acquire() {
                permit.settle(if fails { Outcome::Failure } else { Outcome::Success });
            }
        }
        clock.advance(Duration::from_secs(5));
    });

    let expected = |alert: &str, minute: u32, service: &str, summary: &str| {
        serde_json::json!({
            "alertname": alert,
            "eval_time": format!("{minute}m"),
            "exp_alerts": [{
                "exp_labels": { "service": service, "severity": "warning" },
                "exp_annotations": { "summary": summary },
            }],
        })
    };
    let mut alerts = Vec::new();
    for minute in 16..29 {
        alerts.push(expected("CircuitOpen", minute, "down", "down is not being called"));
        let summary = "the circuit of flapping opens again and again";
        alerts.push(expected("CircuitFlapping", minute, "flapping", summary));
    }
    let tests = serde_json::json!({
        "rule_files": ["alerts.yml"],
        "evaluation_interval": "15s",
        "tests": [{ "interval": "15s", "input_series": series, "alert_rule_test": alerts }],
    });
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::write(directory.join("alerts.yml"), block("yaml")).unwrap();
    // JSON is YAML.
    fs::write(directory.join("alerts_test.yml"), tests.to_string()).unwrap();
    let output = Command::new("promtool")
        .args(["test", "rules"])
        .arg(directory.join("alerts_test.yml"))
        .output()
        .expect("tests/run installs promtool");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "promtool test rules: {said}");
}
