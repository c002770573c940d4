//! What the tests of the rate limiters share.

use portcullis::{Algorithm, Clock, ManualClock, RateLimitPermit, RateLimiter, Reason, Rejected};
use std::time::Duration;

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const NANOSECOND: Duration = Duration::from_nanos(1);
pub(crate) const YEAR: Duration = Duration::from_secs(31_557_600);

/// One nanosecond less.
pub(crate) fn just_before(wait: Duration) -> Duration {
    wait.checked_sub(NANOSECOND).expect("a wait takes time")
}

/// A limiter on a clock of its own that stands still.
pub(crate) fn limiter(algorithm: impl Into<Algorithm>) -> (ManualClock, RateLimiter) {
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("agent", algorithm).clock(&clock).build();
    (clock, limiter.expect("valid settings"))
}

/// How long a refusal for want of room says to wait.
pub(crate) fn wait_of(answer: Result<RateLimitPermit, Rejected>) -> Duration {
    let rejected = answer.expect_err("the limit is reached");
    assert_eq!(rejected.reason, Reason::OverLimit, "a refusal for want of room says so");
    rejected.retry_after.expect("room comes back, so there is a time")
}

/// Asks for `cost`; if refused, waits as told and checks that the time was right to the nanosecond.
pub(crate) fn acquire_when_told(clock: &ManualClock, limiter: &RateLimiter, cost: u32) -> Duration {
    let Err(rejected) = limiter.try_acquire_n(cost) else {
        return Duration::ZERO;
    };
    let wait = rejected.retry_after.expect("the cost fits the burst");
    assert!(
        wait > Duration::ZERO,
        "refused now, so the time to retry is not now: {rejected}"
    );
    clock.advance(just_before(wait));
    assert_eq!(
        wait_of(limiter.try_acquire_n(cost)),
        NANOSECOND,
        "one nanosecond before its time ({wait:?}) a cost of {cost} is refused, and told to wait that nanosecond"
    );
    clock.advance(NANOSECOND);
    if let Err(rejected) = limiter.try_acquire_n(cost) {
        panic!("whoever waited {wait:?} as told is admitted for a cost of {cost}: {rejected}");
    }
    wait
}
