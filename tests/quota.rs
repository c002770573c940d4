//! What a limit tells of itself: how many requests in which window, what remains, and when all of it is back.

use portcullis::{
    Adaptive, Algorithm, Clock, KeyedRateLimiter, ManualClock, Name, Quota, RateLimiter, SlidingWindow, TokenBucket,
};
use std::time::Duration;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn limiter(algorithm: impl Into<Algorithm>) -> (RateLimiter, ManualClock) {
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("search", algorithm).clock(&clock).build().unwrap();
    (limiter, clock)
}

fn told(quota: &Quota) -> (u64, Duration, u64, Duration) {
    (quota.quota, quota.window, quota.remaining, quota.reset)
}

#[test]
fn a_bucket_whose_burst_is_its_limit_tells_limit_and_period() {
    let (limiter, clock) = limiter(TokenBucket::new(100, secs(60)));
    assert_eq!(told(&limiter.quota()), (100, secs(60), 100, secs(0)));
    limiter.try_acquire_n(40).unwrap();
    assert_eq!(
        told(&limiter.quota()),
        (100, secs(60), 60, secs(24)),
        "40 tokens take 24 s"
    );
    clock.advance(ms(300));
    assert_eq!(
        told(&limiter.quota()),
        (100, secs(60), 60, secs(24)),
        "23.7 s are told as 24, half a token as none"
    );
}

#[test]
fn a_bucket_with_another_burst_tells_the_burst_and_the_time_that_it_takes_to_fill() {
    let (limiter, _) = limiter(TokenBucket::new(100, secs(60)).burst(20));
    assert_eq!(told(&limiter.quota()), (20, secs(12), 20, secs(0)));
    let (large, _) = self::limiter(TokenBucket::new(1, secs(86_400)).burst(u32::MAX));
    assert_eq!(large.quota().quota, u64::from(u32::MAX));
    assert_eq!(
        large.quota().window,
        secs(u32::MAX.into()),
        "as far as a header's window is told"
    );
}

#[test]
fn a_window_below_a_second_is_told_as_a_second() {
    let (limiter, _) = limiter(SlidingWindow::new(10, ms(100)));
    assert_eq!((limiter.quota().quota, limiter.quota().window), (100, secs(1)));
    let (uneven, _) = self::limiter(SlidingWindow::new(3, ms(700)));
    assert_eq!(
        (uneven.quota().quota, uneven.quota().window),
        (4, secs(1)),
        "4.3 are told as 4"
    );
    let (fast, _) = self::limiter(TokenBucket::new(u32::MAX, Duration::from_nanos(1)));
    assert_eq!(
        (fast.quota().quota, fast.quota().window),
        (u32::MAX.into(), secs(1)),
        "the number saturates"
    );
    let (odd, _) = self::limiter(SlidingWindow::new(10, ms(1_500)));
    assert_eq!((odd.quota().quota, odd.quota().window), (10, secs(2)), "rounded up");
}

#[test]
fn a_sliding_window_is_whole_again_when_its_latest_admission_leaves_it() {
    let (limiter, clock) = limiter(SlidingWindow::new(3, secs(10)));
    assert_eq!(told(&limiter.quota()), (3, secs(10), 3, secs(0)));
    for reset in [10, 10, 10] {
        limiter.try_acquire().unwrap();
        assert_eq!(limiter.quota().reset, secs(reset));
        clock.advance(secs(2));
    }
    assert_eq!(told(&limiter.quota()), (3, secs(10), 0, secs(8)));
    clock.advance(secs(4));
    assert_eq!(
        told(&limiter.quota()),
        (3, secs(10), 1, secs(4)),
        "the first has left, the last stays 4 s"
    );
    clock.advance(secs(4));
    assert_eq!(told(&limiter.quota()), (3, secs(10), 3, secs(0)));
}

#[test]
fn an_admission_that_is_given_back_is_in_no_quota() {
    let (limiter, clock) = limiter(SlidingWindow::new(2, secs(10)));
    limiter.try_acquire().unwrap();
    clock.advance(secs(3));
    limiter.try_acquire().unwrap().unused();
    assert_eq!(told(&limiter.quota()), (2, secs(10), 1, secs(7)));
}

#[test]
fn an_adaptive_limit_tells_the_rate_that_it_has_found() {
    let (limiter, clock) = limiter(
        Adaptive::new(10)
            .window(secs(10))
            .minimum_calls(1)
            .adjustment_factor(0.5),
    );
    assert_eq!((limiter.quota().quota, limiter.quota().window), (10, secs(10)));
    limiter.try_acquire().unwrap().settle(portcullis::Outcome::Failure);
    assert_eq!((limiter.quota().remaining, limiter.quota().reset), (9, secs(1)));
    clock.advance(secs(10));
    assert_eq!(limiter.status().rate.to_string(), "5");
    assert_eq!(
        (limiter.quota().quota, limiter.quota().window),
        (10, secs(20)),
        "the burst is what it was, and takes twice as long to come"
    );
}

#[test]
fn a_rejection_tells_the_quota_of_the_limit_that_refused() {
    let clock = Clock::manual();
    let builder = RateLimiter::builder("search", TokenBucket::new(10, secs(10))).limit("bulk");
    let limiter = builder.clock(&clock).build().unwrap();
    limiter.try_acquire_n(7).unwrap();
    let quota = limiter.try_acquire_n(5).unwrap_err().quota().unwrap();
    assert_eq!(quota.limit, "bulk");
    assert_eq!(
        told(&quota),
        (10, secs(10), 3, secs(2)),
        "three are left, five are there in 2 s"
    );
    let never = limiter.try_acquire_n(11).unwrap_err();
    assert_eq!(never.retry_after, None);
    assert_eq!(never.quota().unwrap().remaining, 3);
}

#[test]
fn what_remains_is_rounded_down_also_where_a_float_would_round_up() {
    let century = secs(100 * 365 * 86_400);
    let clock = Clock::manual();
    let bucket = RateLimiter::builder("search", TokenBucket::new(1, century)).clock(&clock);
    let bucket = bucket.build().unwrap();
    let keys = KeyedRateLimiter::builder("search", TokenBucket::new(1, century)).clock(&clock);
    let keys = keys.build().unwrap();
    bucket.try_acquire().unwrap();
    keys.try_acquire(&7).unwrap();
    clock.advance(century.saturating_sub(Duration::from_nanos(1)));
    assert_eq!(bucket.quota().remaining, 0);
    let refused = keys.try_acquire(&7).unwrap_err();
    assert_eq!(refused.retry_after, Some(Duration::from_nanos(1)));
    assert_eq!(refused.quota().unwrap().remaining, 0, "or it would not be refused");
    clock.advance(Duration::from_nanos(1));
    assert_eq!(bucket.quota().remaining, 1);
    keys.try_acquire(&7).unwrap();
}

#[test]
fn those_who_wait_have_their_share_of_what_remains() {
    let (limiter, clock) = limiter(TokenBucket::new(10, secs(10)));
    limiter.try_acquire_n(10).unwrap();
    let mut waiting = tokio_test::task::spawn(limiter.acquire_n(4));
    tokio_test::assert_pending!(waiting.poll());
    clock.advance(secs(3));
    assert_eq!(limiter.quota().remaining, 0, "what has come is the waiter's");
}

#[test]
fn a_quota_of_ones_own_is_rounded_as_those_of_the_limiters() {
    let name = || Name::try_from("daily").unwrap();
    assert_eq!(told(&Quota::new(name(), 5, ms(1_001))), (5, secs(2), 0, secs(0)));
    assert_eq!(
        Quota::new(name(), 5, Duration::ZERO).window,
        secs(1),
        "no window is none"
    );
    assert_eq!(Quota::new(name(), 5, Duration::MAX).window, secs(u32::MAX.into()));
}

#[test]
fn a_breakers_rejection_has_no_quota() {
    let breaker = portcullis::CircuitBreaker::builder("search").build().unwrap();
    breaker.force_open();
    assert_eq!(breaker.try_acquire().unwrap_err().quota(), None);
}
