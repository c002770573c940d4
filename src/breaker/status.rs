use super::{CircuitBreakerConfig, counter, machine::View};
use crate::{
    clock::Timestamp,
    name::Name,
    state::{Override, State, StateTransitions},
};
use std::time::Duration;

/// A circuit breaker at one moment: from [`CircuitBreaker::status`](crate::CircuitBreaker::status).
///
/// It tells what the next call would meet. Durations are serialized in seconds, rates that do not exist yet as `null`.
///
/// ```
/// # use portcullis::{CircuitBreaker, State};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let status = breaker.status();
/// assert_eq!((status.state, status.failure_count), (State::Closed, 0));
/// assert_eq!(status.metrics.success_rate, None, "nothing was counted yet");
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CircuitBreakerStatus {
    /// The service's name.
    pub service: Name,
    /// The state that the next call would meet.
    pub state: State,
    /// What an operator forced the circuit into.
    pub forced: Option<Override>,
    /// Rises with every transition, override, reset and reconfiguration.
    pub generation: u64,
    /// How long the circuit has been in this state.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "state_age_seconds", serialize_with = "crate::numbers::seconds")
    )]
    pub state_age: Duration,
    /// Failures that count towards the next trip: in a row if [`failure_threshold`](CircuitBreakerConfig::failure_threshold) is
    /// watched, else within the time or the window that is.
    pub failure_count: u64,
    /// Probes that have succeeded in this half-open state.
    pub success_count: u32,
    /// Probes with an unexpired lease.
    pub probes_in_flight: usize,
    /// How long until the next call would be admitted, if it would be rejected now and that can be told.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::numbers::optional_seconds"))]
    pub retry_after: Option<Duration>,
    /// The window over which rates are taken, if one is watched.
    pub window: Option<WindowStatus>,
    /// The counters. They only ever grow.
    pub metrics: CircuitBreakerMetrics,
    /// The config as it was given.
    pub config: CircuitBreakerConfig,
}

/// The calls over which rates are taken; part of [`CircuitBreakerStatus`].
///
/// ```
/// # use portcullis::{CircuitBreaker, Outcome};
/// let breaker = CircuitBreaker::builder("search").failure_rate(0.5).minimum_calls(1).build()?;
/// breaker.try_acquire()?.settle(Outcome::Success);
/// assert_eq!(breaker.status().window.unwrap().failure_rate, Some(0.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct WindowStatus {
    /// Recorded calls.
    pub calls: u64,
    /// Those that failed.
    pub failures: u64,
    /// Those that were slow.
    pub slow: u64,
    /// Failures by calls, 0 to 1; `None` below the minimum of calls.
    pub failure_rate: Option<f64>,
    /// Slow calls by calls, 0 to 1; `None` below the minimum of calls.
    pub slow_call_rate: Option<f64>,
}

/// What a circuit breaker has counted over its life; part of [`CircuitBreakerStatus`]. No counter ever falls.
///
/// ```
/// # use portcullis::{CircuitBreaker, Outcome};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// breaker.try_acquire()?.settle(Outcome::Success);
/// breaker.force_open();
/// breaker.try_acquire().unwrap_err();
/// let metrics = breaker.status().metrics;
/// assert_eq!((metrics.total_requests, metrics.rejected_requests, metrics.success_rate), (2, 1, Some(50.0)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CircuitBreakerMetrics {
    /// Everything that was asked for and has ended: the sum of the five below.
    pub total_requests: u64,
    /// Calls that succeeded.
    pub successful_requests: u64,
    /// Calls that failed.
    pub failed_requests: u64,
    /// Calls that were rejected.
    pub rejected_requests: u64,
    /// Calls that said nothing about the service.
    pub ignored_requests: u64,
    /// Calls that were dropped before they ended, unless the config counts them as
    /// [something else](CircuitBreakerConfig::cancelled): then they are found there.
    pub cancelled_requests: u64,
    /// Calls, among the above, that took as long as a slow call.
    pub slow_requests: u64,
    /// The rejected calls by reason.
    pub rejected: RejectedByCircuit,
    /// Successful by total, in percent; `None` while nothing was counted.
    pub success_rate: Option<f64>,
    /// How often the circuit moved by itself; overrides and resets are no transitions.
    pub state_transitions: StateTransitions,
}

/// Rejected calls by reason; part of [`CircuitBreakerMetrics`].
///
/// ```
/// # use portcullis::CircuitBreaker;
/// let breaker = CircuitBreaker::builder("search").build()?;
/// breaker.force_open();
/// breaker.try_acquire().unwrap_err();
/// assert_eq!(breaker.status().metrics.rejected.forced_open, 1);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct RejectedByCircuit {
    /// The circuit was open.
    pub open: u64,
    /// The circuit was half-open and every probe taken.
    pub half_open_full: u64,
    /// The circuit was forced open.
    pub forced_open: u64,
}

impl CircuitBreakerStatus {
    pub(super) fn new(
        service: Name,
        view: View,
        config: CircuitBreakerConfig,
        now: Timestamp,
        count: impl Fn(usize) -> u64,
    ) -> Self {
        let refused_until = view.refusal.and_then(|refusal| refusal.until);
        Self {
            service,
            state: view.state,
            forced: view.forced,
            generation: view.generation,
            state_age: now.duration_since(view.since),
            failure_count: view.failure_count,
            success_count: view.success_count,
            probes_in_flight: view.probes,
            retry_after: refused_until.map(|until| until.duration_since(now)),
            window: view.window.map(|tally| {
                let enough = tally.calls >= view.minimum_calls;
                WindowStatus {
                    calls: tally.calls,
                    failures: tally.failures,
                    slow: tally.slow,
                    failure_rate: tally.failure_rate().filter(|_| enough),
                    slow_call_rate: tally.slow_rate().filter(|_| enough),
                }
            }),
            metrics: CircuitBreakerMetrics::new(view.transitions, count),
            config,
        }
    }
}

impl CircuitBreakerMetrics {
    pub(super) fn new(state_transitions: StateTransitions, count: impl Fn(usize) -> u64) -> Self {
        let rejected = RejectedByCircuit {
            open: count(counter::REJECTED_OPEN),
            half_open_full: count(counter::REJECTED_HALF_OPEN),
            forced_open: count(counter::REJECTED_FORCED),
        };
        let successful_requests = count(counter::SUCCESS);
        let failed_requests = count(counter::FAILURE);
        let ignored_requests = count(counter::IGNORED);
        let cancelled_requests = count(counter::CANCELLED);
        let rejected_requests = rejected.open + rejected.half_open_full + rejected.forced_open;
        let ended = successful_requests + failed_requests + ignored_requests + cancelled_requests;
        let total_requests = ended + rejected_requests;
        Self {
            total_requests,
            successful_requests,
            failed_requests,
            rejected_requests,
            ignored_requests,
            cancelled_requests,
            slow_requests: count(counter::SLOW),
            rejected,
            success_rate: crate::numbers::percent(successful_requests, total_requests),
            state_transitions,
        }
    }
}
