//! Snapshots as text for a metrics collector. Pure: a status in, a page out.

use crate::{
    breaker::{CircuitBreakerMetrics, CircuitBreakerStatus, KeyedCircuitBreakerStatus},
    limit::{KeysStatus, RateLimiterStatus},
    state::{Override, State},
    status::RegistryStatus,
};
use std::fmt::Write;

/// The text format of a metrics page.
///
/// ```
/// # use portcullis::MetricsFormat;
/// assert_eq!(MetricsFormat::Prometheus.content_type(), "text/plain; version=0.0.4; charset=utf-8");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MetricsFormat {
    /// The Prometheus text format, version 0.0.4.
    Prometheus,
    /// `OpenMetrics` 1.0.
    OpenMetrics,
}

impl MetricsFormat {
    /// The `Content-Type` to send with it.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Counter,
    Gauge,
}

struct Page {
    text: String,
    format: MetricsFormat,
}

impl Page {
    /// Writes one family; nothing if there are no samples. `name` comes without the suffix of a counter.
    fn family<'a>(
        &mut self,
        kind: Kind,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'static str, &'a str)>, f64)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        let (kind, suffix) = match kind {
            Kind::Counter => ("counter", "_total"),
            Kind::Gauge => ("gauge", ""),
        };
        // OpenMetrics names the family without the suffix, the older format with it.
        let family = match self.format {
            MetricsFormat::Prometheus => format!("{name}{suffix}"),
            MetricsFormat::OpenMetrics => name.to_owned(),
        };
        let text = &mut self.text;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {family} {help}\n# TYPE {family} {kind}");
        for (labels, value) in samples {
            let _ = write!(text, "{name}{suffix}");
            for (at, (label, value)) in labels.into_iter().enumerate() {
                let open = if at == 0 { '{' } else { ',' };
                let _ = write!(text, "{open}{label}=\"{}\"", escape(value));
            }
            let _ = writeln!(text, "}} {value}");
        }
    }
}

/// A label's value, as both formats escape it.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The number of each state, in the order of how bad it is.
fn state_number(state: State) -> f64 {
    match state {
        State::Closed => 0.0,
        State::HalfOpen => 1.0,
        State::Open => 2.0,
    }
}

const IN_STATES: [&str; 6] = [
    State::Closed.as_str(),
    State::Open.as_str(),
    State::HalfOpen.as_str(),
    Override::ForcedOpen.as_str(),
    Override::ForcedClosed.as_str(),
    Override::Disabled.as_str(),
];

pub(crate) fn encode(status: &RegistryStatus, format: MetricsFormat) -> String {
    let mut page = Page {
        text: String::new(),
        format,
    };
    let version = vec![("version", env!("CARGO_PKG_VERSION"))];
    page.family(
        Kind::Gauge,
        "portcullis_build_info",
        "The version of portcullis.",
        [(version, 1.0)],
    );
    let breakers: Vec<_> = status
        .services
        .values()
        .filter_map(|service| service.circuit_breaker.as_ref())
        .collect();
    let keyed: Vec<_> = status
        .services
        .values()
        .filter_map(|service| service.circuit_breakers.as_ref())
        .collect();
    let of_one = breakers.iter().map(|it| (it.service.as_str(), &it.metrics));
    let of_many = keyed.iter().map(|it| (it.service.as_str(), &it.metrics));
    let counters: Vec<_> = of_one.chain(of_many).collect();
    encode_breakers(&mut page, &breakers);
    encode_breaker_counters(&mut page, &counters);
    encode_breaker_rates(&mut page, &breakers);
    encode_keyed_breakers(&mut page, &keyed);
    let limiters: Vec<_> = status
        .services
        .values()
        .flat_map(|service| &service.rate_limiters)
        .collect();
    encode_limiters(&mut page, &limiters);
    encode_keys(&mut page, &limiters);
    if format == MetricsFormat::OpenMetrics {
        page.text.push_str("# EOF\n");
    }
    page.text
}

fn encode_breakers(page: &mut Page, breakers: &[&CircuitBreakerStatus]) {
    page.family(
        Kind::Gauge,
        "circuit_breaker_state",
        "The state of the circuit: 0 closed, 1 half-open, 2 open.",
        breakers.iter().map(|it| (vec![service(it)], state_number(it.state))),
    );
    page.family(
        Kind::Gauge,
        "circuit_breaker_in_state",
        "1 for what the circuit is in, overrides included, 0 for the others.",
        breakers.iter().flat_map(|it| {
            let present = it.forced.map_or(it.state.as_str(), Override::as_str);
            IN_STATES.map(|state| {
                let labels = vec![service(it), ("state", state)];
                (labels, f64::from(u8::from(state == present)))
            })
        }),
    );
}

fn encode_keyed_breakers(page: &mut Page, keyed: &[&KeyedCircuitBreakerStatus]) {
    let gauges = |value: fn(&KeyedCircuitBreakerStatus) -> usize| {
        keyed
            .iter()
            .map(move |it| (vec![("service", it.service.as_str())], value(it) as f64))
    };
    page.family(
        Kind::Gauge,
        "circuit_breaker_tracked_keys",
        "Keys with a circuit of their own.",
        gauges(|it| it.tracked),
    );
    page.family(
        Kind::Gauge,
        "circuit_breaker_open_keys",
        "Keys whose circuit is open, forced ones included.",
        gauges(|it| it.open),
    );
    page.family(
        Kind::Counter,
        "circuit_breaker_evicted_keys",
        "Keys whose circuit was as good as new, or its failures old, and that made room for another.",
        keyed
            .iter()
            .map(|it| (vec![("service", it.service.as_str())], it.evicted as f64)),
    );
}

/// Of a service with a breaker for each key, the sums.
fn encode_breaker_counters(page: &mut Page, breakers: &[(&str, &CircuitBreakerMetrics)]) {
    page.family(
        Kind::Counter,
        "circuit_breaker_calls",
        "Calls that were admitted and have ended, by outcome.",
        breakers.iter().flat_map(|&(service, metrics)| {
            [
                ("success", metrics.successful_requests),
                ("failure", metrics.failed_requests),
                ("ignored", metrics.ignored_requests),
                ("cancelled", metrics.cancelled_requests),
            ]
            .map(|(outcome, n)| (vec![("service", service), ("outcome", outcome)], n as f64))
        }),
    );
    page.family(
        Kind::Counter,
        "circuit_breaker_slow_calls",
        "Calls, among the ended ones, that took as long as a slow call.",
        breakers
            .iter()
            .map(|&(service, metrics)| (vec![("service", service)], metrics.slow_requests as f64)),
    );
    page.family(
        Kind::Counter,
        "circuit_breaker_rejected",
        "Calls that the circuit rejected, by reason.",
        breakers.iter().flat_map(|&(service, metrics)| {
            let rejected = metrics.rejected;
            [
                ("open", rejected.open),
                ("half_open_full", rejected.half_open_full),
                ("forced_open", rejected.forced_open),
            ]
            .map(|(reason, n)| (vec![("service", service), ("reason", reason)], n as f64))
        }),
    );
    page.family(
        Kind::Counter,
        "circuit_breaker_transitions",
        "Moves that the circuit made by itself.",
        breakers.iter().flat_map(|&(service, metrics)| {
            let moves = metrics.state_transitions;
            [
                ("closed", "open", moves.closed_to_open),
                ("open", "half_open", moves.open_to_half_open),
                ("half_open", "closed", moves.half_open_to_closed),
                ("half_open", "open", moves.half_open_to_open),
            ]
            .map(|(from, to, n)| {
                let labels = vec![("service", service), ("from", from), ("to", to)];
                (labels, n as f64)
            })
        }),
    );
}

fn encode_breaker_rates(page: &mut Page, breakers: &[&CircuitBreakerStatus]) {
    page.family(
        Kind::Gauge,
        "circuit_breaker_success_rate",
        "Successful calls by all requests over the life of the circuit, in percent.",
        breakers
            .iter()
            .filter_map(|it| Some((vec![service(it)], it.metrics.success_rate?))),
    );
    page.family(
        Kind::Gauge,
        "circuit_breaker_failure_ratio",
        "Failures by calls in the window, 0 to 1; absent below the minimum of calls.",
        breakers
            .iter()
            .filter_map(|it| Some((vec![service(it)], it.window?.failure_rate?))),
    );
    page.family(
        Kind::Gauge,
        "circuit_breaker_slow_call_ratio",
        "Slow calls by calls in the window, 0 to 1; absent below the minimum of calls.",
        breakers
            .iter()
            .filter_map(|it| Some((vec![service(it)], it.window?.slow_call_rate?))),
    );
    page.family(
        Kind::Gauge,
        "circuit_breaker_probes_in_flight",
        "Half-open probes with an unexpired lease.",
        breakers
            .iter()
            .map(|it| (vec![service(it)], it.probes_in_flight as f64)),
    );
}

fn service(status: &CircuitBreakerStatus) -> (&'static str, &str) {
    ("service", status.service.as_str())
}

/// What only keyed limits have.
fn encode_keys(page: &mut Page, limiters: &[&RateLimiterStatus]) {
    let keyed: Vec<_> = limiters
        .iter()
        .filter_map(|it| Some((labels(it), it.keys.as_ref()?)))
        .collect();
    let samples = |value: fn(&KeysStatus) -> f64| keyed.iter().map(move |(labels, keys)| (labels.clone(), value(keys)));
    page.family(
        Kind::Gauge,
        "rate_limiter_tracked_keys",
        "Keys with a quota of their own.",
        samples(|keys| keys.tracked as f64),
    );
    page.family(
        Kind::Gauge,
        "rate_limiter_max_keys",
        "The most keys that can have a quota of their own.",
        samples(|keys| keys.max as f64),
    );
    page.family(
        Kind::Counter,
        "rate_limiter_evicted_keys",
        "Keys that had their whole quota and made room for another.",
        samples(|keys| keys.evicted as f64),
    );
    page.family(
        Kind::Counter,
        "rate_limiter_overflow_requests",
        "Requests of new keys that found no room and met the overflow's quota.",
        samples(|keys| keys.overflow_requests as f64),
    );
    page.family(
        Kind::Counter,
        "rate_limiter_missing_key_requests",
        "Requests without a key.",
        samples(|keys| keys.missing_key_requests as f64),
    );
}

fn encode_limiters(page: &mut Page, limiters: &[&RateLimiterStatus]) {
    let unkeyed: Vec<_> = limiters.iter().filter(|it| it.keys.is_none()).collect();
    page.family(
        Kind::Counter,
        "rate_limiter_accepted",
        "Requests that the limit admitted.",
        limiters.iter().map(|it| (labels(it), it.accepted_requests as f64)),
    );
    page.family(
        Kind::Counter,
        "rate_limiter_accepted_cost",
        "What the admitted requests cost together, as reserved.",
        limiters.iter().map(|it| (labels(it), it.accepted_cost as f64)),
    );
    page.family(
        Kind::Counter,
        "rate_limiter_returned",
        "Requests, among the admitted ones, that were taken back unused.",
        limiters.iter().map(|it| (labels(it), it.returned_requests as f64)),
    );
    page.family(
        Kind::Counter,
        "rate_limiter_rejected",
        "Requests that the limit rejected, by reason.",
        limiters.iter().flat_map(|it| {
            let rejected = it.rejected;
            let missing_key = it.keys.is_some().then_some(("missing_key", rejected.missing_key));
            [
                ("over_limit", rejected.over_limit),
                ("cost_exceeds_burst", rejected.cost_exceeds_burst),
            ]
            .into_iter()
            .chain(missing_key)
            .map(|(reason, n)| {
                let mut labels = labels(it);
                labels.push(("reason", reason));
                (labels, n as f64)
            })
        }),
    );
    page.family(
        Kind::Gauge,
        "rate_limiter_available",
        "Requests that would be admitted now.",
        // Of a keyed one that is no one number.
        unkeyed.iter().map(|it| (labels(it), it.available_tokens)),
    );
    page.family(
        Kind::Gauge,
        "rate_limiter_rate",
        "Requests per second that the limit brings now.",
        limiters
            .iter()
            .map(|it| (labels(it), it.rate / it.period.as_secs_f64())),
    );
    page.family(
        Kind::Gauge,
        "rate_limiter_waiting",
        "Requests that wait in line.",
        limiters.iter().map(|it| (labels(it), it.waiting as f64)),
    );
}

fn labels(status: &RateLimiterStatus) -> Vec<(&'static str, &str)> {
    vec![("service", status.service.as_str()), ("limit", status.name.as_str())]
}
