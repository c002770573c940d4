//! Pins that the README shows what the code does: the status page, the metrics with their types and labels, the alert rules.
#![cfg(feature = "http")]

use portcullis::{CircuitBreakerConfig, Clock, MetricsFormat, Outcome, RateLimiter, Registry, TokenBucket, Window};
use std::{
    collections::{BTreeMap, BTreeSet},
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
