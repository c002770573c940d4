use super::{Algorithm, counter};
use crate::name::Name;
use std::time::Duration;

/// A rate limiter at one moment: from [`RateLimiter::status`](crate::RateLimiter::status).
///
/// It tells what the next `try_acquire` would meet. Durations are serialized in seconds, rates that do not exist yet as `null`.
///
/// ```
/// # use portcullis::{RateLimiter, TokenBucket};
/// # use std::time::Duration;
/// let limiter = RateLimiter::new("search", TokenBucket::new(100, Duration::from_secs(60)))?;
/// let status = limiter.status();
/// assert_eq!((status.rate, status.available_tokens, status.retry_after), (100.0, 100.0, None));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct RateLimiterStatus {
    /// The service's name.
    pub service: Name,
    /// The limit's name.
    pub name: Name,
    /// The algorithm: `token_bucket`, `sliding_window` or `adaptive`.
    #[cfg_attr(feature = "serde", serde(rename = "type"))]
    pub kind: &'static str,
    /// Requests per [`period`](Self::period); of an adaptive limiter, as it stands now.
    pub rate: f64,
    /// What the rate counts requests per.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "period_seconds", serialize_with = "crate::numbers::seconds")
    )]
    pub period: Duration,
    /// The most that is admitted at once.
    pub burst: u32,
    /// What is there now, in requests: the whole part of it would be admitted. What is there for those who wait is theirs.
    pub available_tokens: f64,
    /// How long until the next `try_acquire` would be admitted, if it would be rejected now.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::numbers::optional_seconds"))]
    pub retry_after: Option<Duration>,
    /// How many wait in line.
    pub waiting: usize,
    /// Requests admitted over the life of the limiter. As all counters, it only ever grows.
    pub accepted_requests: u64,
    /// What the admitted requests cost together, as reserved.
    pub accepted_cost: u64,
    /// Requests, among the admitted, that were given back unused and taken back. Not those that stay spent: in a sliding window
    /// where others came in their way since, or of a key that was evicted meanwhile.
    pub returned_requests: u64,
    /// Requests rejected.
    pub rejected_requests: u64,
    /// The rejected requests by reason.
    pub rejected: RejectedByLimit,
    /// Accepted by all requests, in percent; `None` while there were none.
    pub acceptance_rate: Option<f64>,
    /// The keys, of a keyed limiter.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub keys: Option<KeysStatus>,
    /// What the limiter was made of.
    pub config: Algorithm,
}

/// Rejected requests by reason; part of [`RateLimiterStatus`].
///
/// ```
/// # use portcullis::{RateLimiter, TokenBucket};
/// # use std::time::Duration;
/// let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(60)))?;
/// limiter.try_acquire_n(2).unwrap_err();
/// assert_eq!(limiter.status().rejected.cost_exceeds_burst, 1);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct RejectedByLimit {
    /// The limit had no room.
    pub over_limit: u64,
    /// The cost was above the burst.
    pub cost_exceeds_burst: u64,
    /// A keyed limit found no key. Serialized where it happened.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "crate::numbers::is_zero"))]
    pub missing_key: u64,
}

/// The keys of a keyed limiter; part of [`RateLimiterStatus`].
///
/// ```
/// # use portcullis::{KeyedRateLimiter, TokenBucket};
/// # use std::time::Duration;
/// let callers = KeyedRateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60)))?;
/// callers.try_acquire("alice")?;
/// let keys = callers.status().keys.unwrap();
/// assert_eq!((keys.tracked, keys.max), (1, 10_000));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct KeysStatus {
    /// Keys with a quota of their own.
    pub tracked: usize,
    /// The most that can be.
    pub max: usize,
    /// Keys that had their whole quota and made room for another.
    pub evicted: u64,
    /// Requests of new keys that found no room and met the overflow's quota.
    pub overflow_requests: u64,
    /// Requests without a key.
    pub missing_key_requests: u64,
    /// Up to ten tracked keys, those with the most rejections since they were last new.
    pub most_rejected: Vec<KeyStatus>,
}

impl KeysStatus {
    pub(super) const MOST_REJECTED: usize = 10;
}

/// One key of a keyed limiter; part of [`KeysStatus`].
///
/// See [`KeyedRateLimiter::fingerprint`](crate::KeyedRateLimiter::fingerprint) for an example.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct KeyStatus {
    /// Its fingerprint, in hexadecimal. The key itself is not kept.
    pub key: String,
    /// How many of its requests were rejected.
    pub rejected: u32,
}

/// What there is to see of a limiter, beside the counters.
pub(super) struct Seen<'a> {
    pub(super) service: &'a Name,
    pub(super) limit: &'a Name,
    pub(super) algorithm: &'a Algorithm,
    /// Of an adaptive one.
    pub(super) rate: Option<f64>,
    pub(super) available: f64,
    pub(super) retry_after: Option<Duration>,
    pub(super) waiting: usize,
}

impl RateLimiterStatus {
    pub(super) fn new(seen: &Seen<'_>, count: impl Fn(usize) -> u64) -> Self {
        let (limit, period) = match seen.algorithm {
            Algorithm::TokenBucket(config) => (config.limit(), config.period()),
            Algorithm::SlidingWindow(config) => (config.max_requests(), config.window()),
            Algorithm::Adaptive(config) => (config.base_rate(), config.period()),
        };
        let rejected = RejectedByLimit {
            over_limit: count(counter::REJECTED_OVER_LIMIT),
            cost_exceeds_burst: count(counter::REJECTED_COST),
            missing_key: count(counter::REJECTED_KEYLESS),
        };
        let accepted_one = count(counter::ACCEPTED_ONE);
        let accepted_requests = accepted_one + count(counter::ACCEPTED_OTHER);
        let rejected_requests = rejected.over_limit + rejected.cost_exceeds_burst + rejected.missing_key;
        Self {
            service: seen.service.clone(),
            name: seen.limit.clone(),
            kind: seen.algorithm.as_str(),
            rate: seen.rate.unwrap_or(limit.into()),
            period,
            burst: seen.algorithm.largest(),
            available_tokens: seen.available,
            retry_after: seen.retry_after,
            waiting: seen.waiting,
            accepted_requests,
            accepted_cost: accepted_one + count(counter::ACCEPTED_COST),
            returned_requests: count(counter::RETURNED),
            rejected_requests,
            rejected,
            acceptance_rate: crate::numbers::percent(accepted_requests, accepted_requests + rejected_requests),
            keys: None,
            config: *seen.algorithm,
        }
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Algorithm {
    /// The settings with every default spelt out; durations in seconds.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let mut out = serializer.serialize_map(None)?;
        match self {
            Self::TokenBucket(config) => {
                out.serialize_entry("rate", &config.limit())?;
                out.serialize_entry("per_seconds", &config.period().as_secs_f64())?;
                out.serialize_entry("burst_size", &config.largest())?;
            }
            Self::SlidingWindow(config) => {
                out.serialize_entry("max_requests", &config.max_requests())?;
                out.serialize_entry("window_seconds", &config.window().as_secs_f64())?;
            }
            Self::Adaptive(config) => {
                let (error_threshold, adjustment_factor, minimum_calls) = config.thresholds();
                out.serialize_entry("base_rate", &config.base_rate())?;
                out.serialize_entry("min_rate", &config.lowest())?;
                out.serialize_entry("max_rate", &config.highest())?;
                out.serialize_entry("burst_size", &config.largest())?;
                out.serialize_entry("window_seconds", &config.period().as_secs_f64())?;
                out.serialize_entry("error_threshold", &error_threshold)?;
                out.serialize_entry("adjustment_factor", &adjustment_factor)?;
                out.serialize_entry("minimum_calls", &minimum_calls)?;
                out.serialize_entry("cancelled", config.cancelled_outcome().as_str())?;
            }
        }
        out.end()
    }
}
