use crate::{clock::nanos, name::Name};
use std::{num::NonZeroU32, time::Duration};

/// A rate limit as a client is told of it: what `RateLimit` header fields and gRPC details say.
///
/// Whole seconds and whole requests, each rounded so that a client who believes them is not rejected: the window up, what remains
/// down, the time to wait up.
///
/// ```
/// use portcullis::{RateLimiter, TokenBucket};
/// use std::time::Duration;
///
/// let limiter = RateLimiter::builder("search", TokenBucket::new(100, Duration::from_secs(60))).limit("per-minute").build()?;
/// let permit = limiter.try_acquire()?;
/// let quota = limiter.quota();
/// assert_eq!((quota.limit.as_str(), quota.quota, quota.remaining), ("per-minute", 100, 99));
/// assert_eq!((quota.window, quota.reset), (Duration::from_secs(60), Duration::from_secs(1)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quota {
    /// The limit's name.
    pub limit: Name,
    /// How many requests are admitted in each [`window`](Self::window). Of a token bucket whose burst is not its limit it is the
    /// burst, and the window is the time in which an empty bucket fills. A window below one second is told as a second, with as
    /// many requests as that has room for.
    pub quota: u64,
    /// The window, in whole seconds.
    pub window: Duration,
    /// How many requests would be admitted now.
    pub remaining: u64,
    /// In a rejection, when to retry. Otherwise the time in which the whole quota is there again, if nothing more is used.
    /// In whole seconds.
    pub reset: Duration,
}

impl Quota {
    /// A quota of a policy of your own: `quota` requests in each `window`, of which none remains.
    ///
    /// ```
    /// # use portcullis::{Name, Quota};
    /// # use std::time::Duration;
    /// let mut quota = Quota::new(Name::try_from("daily")?, 1_000, Duration::from_secs(86_400));
    /// quota.remaining = 17;
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    #[must_use]
    pub fn new(limit: Name, quota: u32, window: Duration) -> Self {
        Advertised::new(quota, u128::from(nanos(window))).quota(limit, 0, Duration::ZERO)
    }
}

/// The part of a [`Quota`] that does not change from one request to the next, small enough to travel in every rejection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Advertised {
    quota: u32,
    window: NonZeroU32,
}

const SECOND: u128 = 1_000_000_000;

impl Advertised {
    /// `quota` requests in so many nanoseconds.
    pub(crate) fn new(quota: u32, window: u128) -> Self {
        if window >= SECOND {
            let seconds = u32::try_from(window.div_ceil(SECOND)).unwrap_or(u32::MAX);
            let window = NonZeroU32::new(seconds).unwrap_or(NonZeroU32::MIN);
            return Self { quota, window };
        }
        let in_a_second = u128::from(quota) * SECOND / window.max(1);
        Self {
            quota: u32::try_from(in_a_second).unwrap_or(u32::MAX),
            window: NonZeroU32::MIN,
        }
    }

    pub(crate) fn quota(self, limit: Name, remaining: u64, reset: Duration) -> Quota {
        Quota {
            limit,
            quota: self.quota.into(),
            window: Duration::from_secs(self.window.get().into()),
            remaining,
            reset: whole_seconds(reset),
        }
    }
}

/// Rounded up.
pub(crate) fn whole_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// Rounded up.
pub(crate) fn whole_seconds(duration: Duration) -> Duration {
    let up = u64::from(duration.subsec_nanos() > 0);
    Duration::from_secs(duration.as_secs().saturating_add(up))
}
