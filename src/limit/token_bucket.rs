use super::bucket::{Bucket, Level, Line, Scale, Short};
use crate::{
    clock::{Timestamp, nanos},
    error::{ConfigError, duration, within},
};
use std::time::Duration;

/// A token bucket: a steady rate, with room for bursts.
///
/// `limit` requests per `period`, evenly; up to `burst` of them at once after a pause. The bucket starts full. Over any stretch
/// of time it admits at most the burst plus what the rate brings in that time; those who [wait](crate::RateLimiter::acquire)
/// count from the instant at which they were due. Exact to the nanosecond for as long as the clock runs: nothing drifts and
/// nothing overflows. (Where 64 bits cannot hold a burst in fractions that add up to whole nanoseconds, as for a prime number of
/// requests in many years, the last of a burst may be late by such a fraction.)
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
/// Two atomics of 8 bytes; an admission is one compare-and-swap. The algorithm is the generic cell rate algorithm of ITU-T I.371.
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
        within("burst", self.largest(), &(1..=u32::MAX)).map(|_| ())
    }

    /// Units a token, and units a nanosecond as a fraction in lowest terms: a whole number, unless 64 bits cannot hold a burst
    /// in such units. That takes a burst that comes together in more than 73 years, or a fraction with a numerator to match (a
    /// prime number of requests in a year).
    fn scale(&self) -> (u64, u64, u64) {
        let (limit, period, burst) = (u64::from(self.limit), nanos(self.period), u64::from(self.largest()));
        let common = gcd(limit, period);
        let exact = period / common;
        if exact.saturating_mul(burst) <= Bucket::LARGEST {
            return (exact, limit / common, 1);
        }
        // Both the burst in units and the product below fit in 64 bits.
        let token = (Bucket::LARGEST / burst).min(u64::MAX / limit);
        let made = limit * token;
        let common = gcd(made, period);
        (token, made / common, period / common)
    }

    pub(super) fn shape(&self, now: Timestamp) -> Result<TokenBucketShape, ConfigError> {
        self.validate()?;
        let (token, mul, div) = self.scale();
        let line = Line {
            start: now,
            base: token * u64::from(self.largest()),
            mul,
            div,
        };
        Ok(TokenBucketShape {
            scale: Scale::new(token, self.largest(), &line, true),
            line,
        })
    }

    pub(super) fn build(&self, now: Timestamp) -> Result<TokenBucketState, ConfigError> {
        let shape = self.shape(now)?;
        Ok(TokenBucketState {
            level: shape.full(),
            shape,
        })
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// What all buckets of one limit have in common.
#[derive(Debug)]
pub(super) struct TokenBucketShape {
    scale: Scale,
    line: Line,
}

impl TokenBucketShape {
    /// A full bucket of this shape, whenever it is made.
    pub(super) fn full(&self) -> Level {
        Level::full(&self.line)
    }

    #[inline]
    pub(super) fn of<'a>(&'a self, level: &'a Level) -> TokenBucketView<'a> {
        self.on(level, &self.line)
    }

    /// A bucket whose units are counted from another base.
    #[inline]
    pub(super) fn on<'a>(&'a self, level: &'a Level, line: &'a Line) -> TokenBucketView<'a> {
        TokenBucketView {
            bucket: Bucket {
                level,
                scale: &self.scale,
            },
            line,
        }
    }

    #[inline]
    pub(super) fn line(&self) -> &Line {
        &self.line
    }

    #[inline]
    pub(super) fn scale(&self) -> &Scale {
        &self.scale
    }
}

#[derive(Debug)]
pub(super) struct TokenBucketState {
    level: Level,
    shape: TokenBucketShape,
}

impl TokenBucketState {
    #[inline]
    pub(super) fn take_one_at_a_glance(&self, now: Timestamp) -> bool {
        self.view().bucket.take_one_at_a_glance(&self.shape.line, now)
    }

    #[inline]
    pub(super) fn refuses_one_at_a_glance(&self, now: Timestamp) -> Option<Duration> {
        self.view().bucket.refuses_one_at_a_glance(&self.shape.line, now)
    }

    #[inline]
    pub(super) fn view(&self) -> TokenBucketView<'_> {
        self.shape.of(&self.level)
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct TokenBucketView<'a> {
    bucket: Bucket<'a>,
    line: &'a Line,
}

impl TokenBucketView<'_> {
    pub(super) fn take(&self, cost: u32, now: Timestamp) -> Result<(), Timestamp> {
        let taken = self.bucket.take(self.line, cost, now);
        taken.map_err(|short| self.line.when(short))
    }

    pub(super) fn take_in_line(&self, cost: u32, now: Timestamp) -> Result<(), Timestamp> {
        let taken = self.bucket.take_in_line(self.line, cost, now);
        taken.map_err(|short| self.line.when(short))
    }

    pub(super) fn give_back(&self, cost: u32, now: Timestamp) {
        self.bucket.give_back(self.line, cost, now);
    }

    pub(super) fn charge(&self, cost: u32, now: Timestamp) {
        self.bucket.charge(self.line, cost, now);
    }

    pub(super) fn peek(&self, cost: u32, now: Timestamp) -> Timestamp {
        self.when(self.bucket.peek(self.line, cost, now), now)
    }

    pub(super) fn due(&self, cost: u64, now: Timestamp) -> Timestamp {
        self.when(self.bucket.peek_in_line(self.line, cost, now), now)
    }

    fn when(&self, enough: Result<(), Short>, now: Timestamp) -> Timestamp {
        enough.map_or_else(|short| self.line.when(short), |()| now)
    }

    pub(super) fn full_again(&self, now: Timestamp) -> Timestamp {
        self.when(self.bucket.peek_full(self.line, now), now)
    }

    pub(super) fn tokens(&self, now: Timestamp) -> f64 {
        self.bucket.tokens(self.line, now)
    }

    pub(super) fn whole_tokens(&self, now: Timestamp) -> u32 {
        self.bucket.whole_tokens(self.line, now)
    }
}
