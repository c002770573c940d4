use super::bucket::{Bucket, Line};
use crate::{
    clock::{Timestamp, nanos},
    error::{ConfigError, LONGEST, duration, within},
};
use std::time::Duration;

/// A token bucket: a steady rate, with room for bursts.
///
/// `limit` requests per `period`, evenly; up to `burst` of them at once after a pause. The bucket starts full. Over any stretch
/// of time it admits at most the burst plus what the rate brings in that time. Exact over a hundred years: nothing drifts and
/// nothing overflows.
///
/// ```
/// use portcullis::{RateLimiter, TokenBucket};
/// use std::time::Duration;
///
/// // 100 a minute, no more than 20 at once.
/// let limiter = RateLimiter::new("search", TokenBucket::new(100, Duration::from_secs(60)).burst(20))?;
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
///
/// One atomic of 8 bytes; an admission is one compare-and-swap. The algorithm is the generic cell rate algorithm of ITU-T I.371.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    limit: u32,
    period: Duration,
    burst: Option<u32>,
}

impl TokenBucket {
    /// `limit` requests (1 or more) per `period` (1 ns to 100 years).
    #[must_use]
    pub const fn new(limit: u32, period: Duration) -> Self {
        Self {
            limit,
            period,
            burst: None,
        }
    }

    /// How many requests may come at once after a pause, 1 or more. Default: the limit.
    #[must_use]
    pub const fn burst(mut self, burst: u32) -> Self {
        self.burst = Some(burst);
        self
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    pub(super) fn period(&self) -> Duration {
        self.period
    }

    pub(super) fn largest(&self) -> u32 {
        self.burst.unwrap_or(self.limit)
    }

    /// The same limit with every default spelt out, for comparison.
    pub(super) fn resolved(self) -> Self {
        self.burst(self.largest())
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        within("limit", self.limit, &(1..=u32::MAX))?;
        duration("period", self.period)?;
        within("burst", self.largest(), &(1..=u32::MAX))?;
        self.scale().map(|_| ())
    }

    /// Units a token, and units a nanosecond as a fraction.
    fn scale(&self) -> Result<(u64, u64, u64), ConfigError> {
        let (limit, period) = (u64::from(self.limit), nanos(self.period));
        // What must fit in 64 bits: the tokens of a hundred years, the burst they start with, the burst that debt may reach and
        // the one that is asked for then.
        let century = u128::from(nanos(LONGEST)) * u128::from(limit);
        let tokens = century.div_ceil(u128::from(period)) + 3 * u128::from(self.largest());
        let exact = period / gcd(limit, period);
        let finest = u64::try_from(u128::from(u64::MAX) / tokens).unwrap_or(u64::MAX);
        if finest == 0 {
            return Err(ConfigError::new(
                "limit",
                format!("{limit} per {:?}", self.period),
                "at most what 100 years can count in 64 bits, about 5.8e9 per second",
            ));
        }
        let token = exact.min(finest);
        // In lowest terms; for an exact scale the divisor is one.
        let (mul, div) = (u128::from(limit) * u128::from(token), u128::from(period));
        let common = gcd_wide(mul, div);
        let narrow = |n: u128| u64::try_from(n / common).unwrap_or(u64::MAX);
        Ok((token, narrow(mul), narrow(div)))
    }

    pub(super) fn build(&self, now: Timestamp) -> Result<TokenBucketState, ConfigError> {
        self.validate()?;
        let (token, mul, div) = self.scale()?;
        let burst = token * u64::from(self.largest());
        Ok(TokenBucketState {
            bucket: Bucket::new(token, burst),
            line: Line {
                start: now,
                base: burst,
                mul,
                div,
            },
        })
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn gcd_wide(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd_wide(b, a % b) }
}

#[derive(Debug)]
pub(super) struct TokenBucketState {
    bucket: Bucket,
    line: Line,
}

impl TokenBucketState {
    pub(super) fn take(&self, cost: u32, now: Timestamp) -> Result<(), Timestamp> {
        let taken = self.bucket.take(&self.line, cost, now);
        taken.map_err(|units| self.line.when(units))
    }

    pub(super) fn give_back(&self, cost: u32) {
        self.bucket.give_back(cost);
    }

    pub(super) fn charge(&self, cost: u32, now: Timestamp) {
        self.bucket.charge(&self.line, cost, now);
    }

    pub(super) fn peek(&self, cost: u32, now: Timestamp) -> Timestamp {
        match self.bucket.peek(&self.line, cost, now) {
            Ok(()) => now,
            Err(units) => self.line.when(units),
        }
    }

    pub(super) fn due(&self, cost: u64, now: Timestamp) -> Timestamp {
        self.line.when(self.bucket.target(&self.line, cost, now)).max(now)
    }

    pub(super) fn tokens(&self, now: Timestamp) -> f64 {
        self.bucket.content(&self.line, now)
    }
}
