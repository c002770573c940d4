//! Pins what the rate limiters promise when used by themselves: limits, refusals, refunds, settings, status, threads.

mod chance;
mod limiters;

use chance::{Dice, seed};
use limiters::{NANOSECOND, SECOND, YEAR, acquire_when_told, just_before, limiter, wait_of};
use portcullis::{
    Adaptive, Algorithm, Clock, ConfigError, Error, EventKind, ManualClock, Name, Outcome, RateLimiter, Reason,
    Rejected, SlidingWindow, TokenBucket, Verdict,
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

const MINUTE: Duration = Duration::from_secs(60);

/// `n` requests a minute, of each kind.
fn a_minute(n: u32) -> [Algorithm; 3] {
    [
        TokenBucket::new(n, MINUTE).into(),
        SlidingWindow::new(n, MINUTE).into(),
        Adaptive::new(n).window(MINUTE).into(),
    ]
}

fn equal(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-6
}

/// How many single requests are admitted before the first refusal.
fn drain(limiter: &RateLimiter) -> u32 {
    (0..u32::MAX)
        .find(|_| limiter.try_acquire().is_err())
        .expect("a limiter has an end")
}

// ---- settings ----

fn refusal(algorithm: impl Into<Algorithm>) -> ConfigError {
    let algorithm = algorithm.into();
    match RateLimiter::new("agent", algorithm) {
        Ok(_) => panic!("{algorithm:?} must be refused"),
        Err(error) => error,
    }
}

#[test]
fn a_setting_out_of_range_is_refused_with_its_name_its_value_and_the_range() {
    let beyond = 100 * YEAR + NANOSECOND;
    let whole = "1 to 4294967295";
    let span = "1 ns to 100 years";
    let bucket = TokenBucket::new(1, SECOND);
    let adaptive = Adaptive::new(100);
    let cases: [(Algorithm, &str, &str, &str); 20] = [
        (TokenBucket::new(0, SECOND).into(), "limit", "0", whole),
        (TokenBucket::new(1, Duration::ZERO).into(), "period", "0ns", span),
        (
            TokenBucket::new(1, beyond).into(),
            "period",
            "3155760000.000000001s",
            span,
        ),
        (
            TokenBucket::new(1, Duration::MAX).into(),
            "period",
            &format!("{:?}", Duration::MAX),
            span,
        ),
        (bucket.burst(0).into(), "burst", "0", whole),
        (
            SlidingWindow::new(0, SECOND).into(),
            "max_requests",
            "0",
            "1 to 16777216",
        ),
        (
            SlidingWindow::new((1 << 24) + 1, SECOND).into(),
            "max_requests",
            "16777217",
            "1 to 16777216",
        ),
        (
            SlidingWindow::new(u32::MAX, SECOND).into(),
            "max_requests",
            "4294967295",
            "1 to 16777216",
        ),
        (SlidingWindow::new(1, Duration::ZERO).into(), "window", "0ns", span),
        (
            SlidingWindow::new(1, beyond).into(),
            "window",
            "3155760000.000000001s",
            span,
        ),
        (Adaptive::new(0).into(), "base_rate", "0", whole),
        (adaptive.min_rate(0).into(), "min_rate", "0", "1 to 100"),
        (adaptive.min_rate(101).into(), "min_rate", "101", "1 to 100"),
        (adaptive.max_rate(99).into(), "max_rate", "99", "100 to 4294967295"),
        (
            adaptive.min_rate(90).max_rate(80).into(),
            "max_rate",
            "80",
            "100 to 4294967295",
        ),
        (adaptive.max_rate(0).into(), "max_rate", "0", "100 to 4294967295"),
        (adaptive.burst(0).into(), "burst", "0", whole),
        (adaptive.window(Duration::ZERO).into(), "window", "0ns", span),
        (adaptive.window(beyond).into(), "window", "3155760000.000000001s", span),
        (adaptive.minimum_calls(0).into(), "minimum_calls", "0", whole),
    ];
    for (algorithm, field, value, expected) in cases {
        let error = refusal(algorithm);
        assert_eq!(
            (error.field(), error.value(), error.expected()),
            (field, value, expected)
        );
        assert_eq!(error.to_string(), format!("{field} is {value}; expected {expected}"));
    }
}

#[test]
fn a_share_out_of_range_is_refused() {
    let adaptive = Adaptive::new(100);
    for nonsense in [0.0, -0.0, -0.1, 1.000_001, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = refusal(adaptive.error_threshold(nonsense));
        assert_eq!(
            (error.field(), error.expected()),
            ("error_threshold", "a share above 0 and at most 1")
        );
        assert_eq!(error.value(), nonsense.to_string());
    }
    for nonsense in [0.0, -0.1, 1.0, 1.5, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = refusal(adaptive.adjustment_factor(nonsense));
        assert_eq!(
            (error.field(), error.expected()),
            ("adjustment_factor", "above 0 and below 1")
        );
        assert_eq!(error.value(), nonsense.to_string());
    }
    for sense in [f64::MIN_POSITIVE, 1.0] {
        RateLimiter::new("agent", adaptive.error_threshold(sense)).expect("the ends of the range belong to it");
    }
}

#[test]
fn any_rate_is_counted_that_its_parts_allow() {
    for fits in [
        Algorithm::from(TokenBucket::new(6, NANOSECOND)),
        TokenBucket::new(u32::MAX, NANOSECOND).into(),
        TokenBucket::new(u32::MAX, SECOND).into(),
        TokenBucket::new(u32::MAX, 100 * YEAR).into(),
        TokenBucket::new(1, 100 * YEAR).burst(u32::MAX).into(),
        SlidingWindow::new(1 << 24, 100 * YEAR).into(),
        SlidingWindow::new(1, NANOSECOND).into(),
        Adaptive::new(3).window(NANOSECOND).into(),
        Adaptive::new(u32::MAX).window(SECOND).into(),
        Adaptive::new(1).window(100 * YEAR).max_rate(u32::MAX).into(),
    ] {
        let (clock, limiter) = limiter(fits);
        assert!(limiter.try_acquire().is_ok());
        clock.advance(400 * YEAR);
        assert!(limiter.try_acquire().is_ok(), "{fits:?}: nor does time run out");
    }
    let error = refusal(Adaptive::new(u32::MAX).min_rate(1));
    assert_eq!((error.field(), error.value()), ("burst", "4294967295"));
    assert!(
        error.expected().contains("at most 2^61"),
        "the error says what would do: {error}"
    );
}

/// Counts wrap round every twenty seconds at such rates, and tokens are fractions of a nanosecond apart.
#[test]
fn a_rate_near_the_limits_of_arithmetic_is_kept_whatever_the_pauses() {
    let (clock, limiter) = limiter(TokenBucket::new(u32::MAX, SECOND).burst(3));
    let full = |limiter: &RateLimiter| {
        let burst = drain(limiter);
        let told = limiter.try_acquire().unwrap_err().retry_after;
        (burst, told)
    };
    for pause in [0, 1, 2, 5, 8, 10, 13, 16, 21, 32, 43, 65, 86, 1000, 1_000_000_000] {
        clock.advance(pause * SECOND);
        let available = limiter.status().available_tokens;
        assert!((available - 3.0).abs() < 1e-9, "full after {pause} s, not {available}");
        assert_eq!(
            full(&limiter),
            (3, Some(NANOSECOND)),
            "a burst and no more after {pause} s"
        );
        clock.advance(NANOSECOND);
        assert_eq!(full(&limiter).0, 3, "4.29 tokens a nanosecond");
        clock.advance(NANOSECOND);
    }
}

/// So slow that the fractions of a token which are counted are more than a float tells apart.
#[test]
fn a_full_bucket_shows_its_burst_and_not_more() {
    for burst in 1..400 {
        let (_, limiter) = limiter(TokenBucket::new(1, 50 * YEAR).burst(burst));
        let available = limiter.status().available_tokens;
        assert!(available <= f64::from(burst), "{available} of {burst} are available");
        assert!(
            equal(available, f64::from(burst)),
            "all {burst} are there, not {available}"
        );
    }
}

/// Where the last nanosecond brings less of a token than a float tells apart.
#[test]
fn the_whole_part_of_what_a_status_shows_would_be_admitted() {
    let slow = |limit, period| {
        [
            Algorithm::from(TokenBucket::new(limit, period)),
            Adaptive::new(limit).max_rate(limit).window(period).into(),
        ]
    };
    for algorithm in [
        slow(1, YEAR),
        slow(7, 99 * YEAR),
        slow(1_000_000, YEAR),
        slow(u32::MAX, 80 * YEAR),
    ]
    .concat()
    {
        let (clock, limiter) = limiter(algorithm);
        let burst = limiter.status().burst;
        limiter.try_acquire_n(burst).unwrap();
        for cost in [1, 2, burst / 2, burst - 1, burst] {
            let Some(Err(rejected)) = (1..=burst).contains(&cost).then(|| limiter.try_acquire_n(cost)) else {
                continue;
            };
            clock.advance(just_before(rejected.retry_after.expect("the cost fits the burst")));
            assert_eq!(wait_of(limiter.try_acquire_n(cost)), NANOSECOND);
            let before = limiter.status().available_tokens;
            assert!(
                before < f64::from(cost),
                "{algorithm:?}: {before} shown, {cost} refused"
            );
            clock.advance(NANOSECOND);
            let then = limiter.status().available_tokens;
            assert!(
                then >= f64::from(cost),
                "{algorithm:?}: {then} shown, {cost} would be admitted"
            );
        }
    }
}

#[test]
fn a_name_is_any_text_up_to_its_longest() {
    let bucket = TokenBucket::new(1, SECOND);
    for (service, limit, field) in [
        (String::new(), "default".to_owned(), "name"),
        ("x".repeat(Name::MAX_LEN + 1), "default".to_owned(), "name"),
        ("agent".to_owned(), String::new(), "limit"),
        ("agent".to_owned(), "ü".repeat(Name::MAX_LEN / 2 + 1), "limit"),
    ] {
        let error = RateLimiter::builder(service, bucket)
            .limit(limit)
            .build()
            .expect_err("refused");
        assert_eq!(error.field(), field);
    }
    let longest = "x".repeat(Name::MAX_LEN);
    let limiter = RateLimiter::builder(longest.clone(), bucket)
        .limit("täglich\n\"\0")
        .build()
        .unwrap();
    assert_eq!(
        (limiter.name().as_str(), limiter.limit().as_str()),
        (longest.as_str(), "täglich\n\"\0")
    );
}

// ---- refusals ----

#[test]
fn a_refusal_explains_itself() {
    for algorithm in a_minute(1) {
        let clock = Clock::manual();
        let limiter = RateLimiter::builder("search", algorithm)
            .limit("per-minute")
            .clock(&clock)
            .build()
            .unwrap();
        limiter.try_acquire().unwrap();
        let rejected = limiter.try_acquire().unwrap_err();
        assert_eq!(
            (rejected.service.as_str(), rejected.limit.as_deref()),
            ("search", Some("per-minute"))
        );
        assert_eq!(
            (rejected.reason, rejected.retry_after),
            (Reason::OverLimit, Some(MINUTE))
        );
        let text = rejected.to_string();
        for word in ["search", "per-minute", "60s"] {
            assert!(text.contains(word), "{text:?} names {word}");
        }
    }
}

#[test]
fn a_cost_above_the_burst_is_refused_without_a_time_and_takes_nothing() {
    for algorithm in a_minute(5) {
        let (_, limiter) = limiter(algorithm);
        for cost in [6, u32::MAX] {
            let rejected = limiter.try_acquire_n(cost).unwrap_err();
            assert_eq!(rejected.reason, Reason::CostExceedsBurst { cost, burst: 5 });
            assert_eq!(rejected.retry_after, None, "there is no such time");
        }
        assert_eq!(drain(&limiter), 5);
        assert_eq!(limiter.status().rejected.cost_exceeds_burst, 2);
        assert_eq!(limiter.status().rejected.over_limit, 1);
    }
}

#[test]
fn a_cost_is_met_whole_or_not_at_all() {
    for algorithm in a_minute(5) {
        let (_, limiter) = limiter(algorithm);
        limiter.try_acquire_n(3).unwrap();
        wait_of(limiter.try_acquire_n(3));
        assert_eq!(drain(&limiter), 2, "{algorithm:?}: the refused request took nothing");
    }
}

#[test]
fn a_cost_of_zero_is_free() {
    for algorithm in a_minute(1) {
        let (_, limiter) = limiter(algorithm);
        let free = limiter.try_acquire_n(0).unwrap();
        assert_eq!(drain(&limiter), 1);
        free.unused();
        assert!(limiter.try_acquire().is_err(), "nothing taken, nothing given back");
        assert_eq!(
            limiter.status().returned_requests,
            1,
            "the call was not made all the same"
        );
        limiter.try_acquire_n(0).expect("also when nothing is left");
    }
}

#[test]
fn a_retry_time_is_right_to_the_nanosecond() {
    for (limit, period, burst) in [
        (7, 3 * SECOND, 7),
        (7, 3 * SECOND, 1),
        (3, NANOSECOND, 9),
        (5, NANOSECOND, 5),
        (1, NANOSECOND, 4),
        (u32::MAX, SECOND, 12),
        (u32::MAX, SECOND, u32::MAX),
        (u32::MAX, 100 * YEAR, 1000),
        (1, 100 * YEAR, 1),
        (1, 86_400 * SECOND, 1_000_000),
        (1_000_003, 999 * SECOND + Duration::from_nanos(7), 100),
    ] {
        for algorithm in [
            Algorithm::from(TokenBucket::new(limit, period).burst(burst)),
            Adaptive::new(limit).max_rate(limit).window(period).burst(burst).into(),
        ] {
            for cost in (1..=9)
                .chain([burst / 2, burst])
                .filter(|cost| (1..=burst).contains(cost))
            {
                let (clock, limiter) = limiter(algorithm);
                limiter.try_acquire_n(burst).unwrap();
                // A hundred years are promised.
                if period * (cost / limit) > 99 * YEAR {
                    continue;
                }
                let wait = acquire_when_told(&clock, &limiter, cost).as_nanos();
                let exact = (u128::from(cost) * period.as_nanos()).div_ceil(u128::from(limit));
                assert_eq!(wait, exact, "{algorithm:?}, cost {cost}");
            }
        }
    }
    for (max_requests, window) in [
        (7, 3 * SECOND),
        (3, NANOSECOND),
        (1, 100 * YEAR),
        (1_000_000, 86_400 * SECOND),
    ] {
        for cost in [1, 2, 3, max_requests].into_iter().filter(|cost| *cost <= max_requests) {
            let (clock, limiter) = limiter(SlidingWindow::new(max_requests, window));
            limiter.try_acquire_n(max_requests).unwrap();
            assert_eq!(acquire_when_told(&clock, &limiter, cost), window);
        }
    }
}

/// 64 bits of nanoseconds hold a fifth of this wait.
#[test]
fn a_large_burst_of_a_slow_rate_neither_wraps_nor_overflows() {
    let (clock, limiter) = limiter(TokenBucket::new(1, 86_400 * SECOND).burst(1_000_000));
    assert_eq!(drain(&limiter), 1_000_000, "all of the burst, and no more");
    assert_eq!(wait_of(limiter.try_acquire()), 86_400 * SECOND);
    assert!(
        wait_of(limiter.try_acquire_n(1_000_000)) >= 100 * YEAR,
        "beyond what any clock tells, and not soon"
    );
    clock.advance(99 * YEAR);
    assert_eq!(drain(&limiter), 99 * 1461 / 4, "a day brings one");
}

/// Tokens are counted in fractions here, one in 59 milliseconds; at the end of a year none is in the making.
#[test]
fn a_burst_that_is_used_whole_puts_the_next_token_off_by_nothing() {
    let (clock, limiter) = limiter(TokenBucket::new(1, YEAR).burst(u32::MAX));
    clock.advance(YEAR);
    limiter.try_acquire_n(u32::MAX).expect("a full bucket");
    assert_eq!(acquire_when_told(&clock, &limiter, 1), YEAR);
}

// ---- what the algorithms mean ----

#[test]
fn a_token_bucket_starts_full_with_its_limit_as_burst() {
    let (clock, limiter) = limiter(TokenBucket::new(60, MINUTE));
    assert_eq!(drain(&limiter), 60);
    for _ in 0..100 {
        clock.advance(SECOND);
        assert_eq!(drain(&limiter), 1, "then one a second");
    }
}

#[test]
fn a_burst_of_one_still_limits() {
    let (clock, limiter) = limiter(TokenBucket::new(60, MINUTE).burst(1));
    for _ in 0..10 {
        assert_eq!(drain(&limiter), 1);
        clock.advance(SECOND);
    }
    clock.advance(YEAR);
    assert_eq!(drain(&limiter), 1, "a pause saves up no more than the burst");
}

#[test]
fn a_limit_per_second_is_so_many_each_second() {
    let (clock, limiter) = limiter(TokenBucket::new(5, SECOND));
    assert_eq!(drain(&limiter), 5);
    assert_eq!(wait_of(limiter.try_acquire()), SECOND / 5);
    clock.advance(SECOND);
    assert_eq!(drain(&limiter), 5);
}

#[test]
fn a_sliding_window_has_no_boundary_at_which_twice_the_limit_passes() {
    let (clock, limiter) = limiter(SlidingWindow::new(100, SECOND));
    clock.advance(just_before(SECOND));
    assert_eq!(drain(&limiter), 100);
    clock.advance(NANOSECOND);
    assert_eq!(
        drain(&limiter),
        0,
        "a second of the clock begins, and the window does not care"
    );
    clock.advance(just_before(just_before(SECOND)));
    assert_eq!(drain(&limiter), 0);
    clock.advance(NANOSECOND);
    assert_eq!(drain(&limiter), 100, "exactly one window later");
}

#[test]
fn a_sliding_window_gives_each_request_back_a_window_after_it_came() {
    let (clock, limiter) = limiter(SlidingWindow::new(3, 10 * SECOND));
    for _ in 0..3 {
        limiter.try_acquire().unwrap();
        clock.advance(2 * SECOND);
    }
    for wait in [4 * SECOND, 6 * SECOND, 8 * SECOND] {
        let cost = u32::try_from(wait.as_secs() / 2 - 1).unwrap();
        assert_eq!(
            wait_of(limiter.try_acquire_n(cost)),
            wait,
            "{cost} need the {cost} oldest to leave"
        );
    }
}

#[test]
fn a_year_of_silence_brings_one_burst_and_the_status_knows() {
    for algorithm in a_minute(10) {
        for taken in [0, 4, 10] {
            let (clock, limiter) = limiter(algorithm);
            if taken > 0 {
                limiter.try_acquire_n(taken).unwrap();
            }
            for years in [1, 98] {
                clock.advance(years * YEAR);
                let status = limiter.status();
                assert!(
                    equal(status.available_tokens, 10.0),
                    "{algorithm:?}: {}",
                    status.available_tokens
                );
                assert_eq!(status.retry_after, None);
                assert_eq!(drain(&limiter), 10, "{algorithm:?}: a burst, not two");
            }
            clock.advance(MINUTE);
            assert_eq!(drain(&limiter), 10);
        }
    }
}

#[test]
fn a_clock_that_stands_still_brings_nothing() {
    for algorithm in a_minute(3) {
        let (_, limiter) = limiter(algorithm);
        assert_eq!(drain(&limiter), 3);
        for _ in 0..100 {
            assert_eq!(wait_of(limiter.try_acquire_n(3)), MINUTE);
        }
    }
}

#[test]
fn a_time_that_lies_behind_is_answered_and_brings_nothing() {
    for algorithm in a_minute(3) {
        for back in [NANOSECOND, MINUTE, YEAR, 140 * YEAR] {
            let (clock, limiter) = limiter(algorithm);
            let start = clock.now();
            clock.advance(MINUTE);
            assert_eq!(drain(&limiter), 3);
            clock.rewind(back);
            assert_eq!(drain(&limiter), 0, "{algorithm:?}: what was taken is taken");
            assert!(limiter.status().retry_after.is_some());
            let wait = wait_of(limiter.try_acquire());
            clock.advance(wait);
            assert!(
                limiter.try_acquire().is_ok(),
                "{algorithm:?}: {back:?} back: the wait is measured from there"
            );
            clock.advance((2 * MINUTE).saturating_sub(clock.now().duration_since(start)));
            assert!(drain(&limiter) <= 3);
        }
    }
}

/// What has been used of a rate that stays counts from where the limiter began, also at a time before the window that has ended.
#[test]
fn a_time_that_lies_behind_finds_at_an_adaptive_limit_what_it_finds_in_a_bucket() {
    for algorithm in [
        Algorithm::from(TokenBucket::new(10, 10 * SECOND)),
        Adaptive::new(10).window(10 * SECOND).into(),
    ] {
        let (clock, limiter) = limiter(algorithm);
        clock.advance(5 * SECOND);
        limiter.try_acquire_n(10).expect("full");
        clock.advance(6 * SECOND);
        limiter.try_acquire().expect("six have come");
        clock.rewind(4 * SECOND);
        let available = limiter.status().available_tokens;
        assert!(
            equal(available, 1.0),
            "{algorithm:?}: of two that have come one is used, not {available}"
        );
        assert_eq!(drain(&limiter), 1, "{algorithm:?}");
        assert_eq!(wait_of(limiter.try_acquire()), SECOND, "{algorithm:?}");
    }
}

// ---- permits ----

#[test]
fn a_dropped_permit_is_spent() {
    for algorithm in a_minute(3) {
        let (_, limiter) = limiter(algorithm);
        for _ in 0..3 {
            drop(limiter.try_acquire().unwrap());
        }
        assert!(
            limiter.try_acquire().is_err(),
            "{algorithm:?}: who goes away has used the limit all the same"
        );
    }
}

#[test]
fn a_dropped_call_is_spent() {
    for algorithm in a_minute(3) {
        let (_, limiter) = limiter(algorithm);
        for _ in 0..3 {
            let call = limiter.call(std::future::pending::<Result<(), std::io::Error>>());
            let mut call = tokio_test::task::spawn(call);
            assert!(call.poll().is_pending());
        }
        assert!(limiter.try_acquire().is_err());
        let unpolled = limiter.call(std::future::pending::<Result<(), std::io::Error>>());
        drop(unpolled);
        assert_eq!(
            limiter.status().rejected_requests,
            1,
            "a call that was never polled never asked"
        );
    }
}

#[test]
fn an_unused_permit_is_given_back() {
    for algorithm in a_minute(5) {
        let (_, limiter) = limiter(algorithm);
        for _ in 0..100 {
            limiter.try_acquire_n(5).unwrap().unused();
        }
        limiter.try_acquire_n(2).unwrap();
        limiter.try_acquire_n(3).unwrap().unused();
        assert_eq!(drain(&limiter), 3, "{algorithm:?}");
        let status = limiter.status();
        assert_eq!((status.accepted_requests, status.returned_requests), (105, 101));
    }
}

#[test]
fn giving_back_after_a_pause_does_not_overfill() {
    for algorithm in a_minute(5) {
        let (clock, limiter) = limiter(algorithm);
        let permit = limiter.try_acquire_n(5).unwrap();
        clock.advance(YEAR);
        permit.unused();
        assert_eq!(drain(&limiter), 5, "{algorithm:?}: a full limiter holds one burst");
    }
}

#[test]
fn a_sliding_window_takes_back_only_its_newest_admission() {
    let (clock, limiter) = limiter(SlidingWindow::new(3, MINUTE));
    let older = limiter.try_acquire().unwrap();
    // Of one instant they would be alike.
    clock.advance(NANOSECOND);
    let newer = limiter.try_acquire().unwrap();
    older.unused();
    assert!(equal(limiter.status().available_tokens, 1.0), "others have come since");
    assert_eq!(limiter.status().returned_requests, 0, "it is spent");
    newer.unused();
    assert!(
        equal(limiter.status().available_tokens, 2.0),
        "the newest is taken back"
    );
    assert_eq!(limiter.status().returned_requests, 1);
    assert_eq!(drain(&limiter), 2);
    clock.advance(MINUTE);
    assert_eq!(drain(&limiter), 3);
}

#[test]
fn a_sliding_window_takes_back_one_after_the_other_from_the_newest_on() {
    let (_, limiter) = limiter(SlidingWindow::new(4, MINUTE));
    let permits: Vec<_> = [1, 2, 1].map(|cost| limiter.try_acquire_n(cost).unwrap()).into();
    for permit in permits.into_iter().rev() {
        permit.unused();
    }
    assert_eq!(drain(&limiter), 4);
}

#[test]
fn a_sliding_window_outlives_refunds_of_permits_that_are_a_window_old() {
    for max_requests in 1..4 {
        for cost in 1..=max_requests {
            let (clock, limiter) = limiter(SlidingWindow::new(max_requests, MINUTE));
            let old = limiter.try_acquire_n(cost).unwrap();
            // One window and a little: the times of both must not be mistaken for each other.
            clock.advance(MINUTE + SECOND);
            let new = limiter.try_acquire_n(max_requests).unwrap();
            new.unused();
            old.unused();
            for _ in 0..5 {
                assert_eq!(
                    drain(&limiter),
                    max_requests,
                    "the ring still admits its quota, each window"
                );
                clock.advance(MINUTE);
            }
        }
    }
}

#[test]
fn a_sliding_window_keeps_its_quota_for_costs_that_wrap_its_ring() {
    let (clock, limiter) = limiter(SlidingWindow::new(5, MINUTE));
    for cost in [3, 4, 5, 1, 2, 5, 5, 3, 4, 4].into_iter().cycle().take(1000) {
        let permit = limiter.try_acquire_n(cost).expect("a window has passed");
        assert!(equal(limiter.status().available_tokens, f64::from(5 - cost)));
        wait_of(limiter.try_acquire_n(6 - cost));
        if cost % 2 == 0 {
            permit.unused();
            assert!(equal(limiter.status().available_tokens, 5.0));
        }
        clock.advance(MINUTE);
    }
}

#[test]
fn a_true_cost_above_the_reserved_is_charged() {
    for algorithm in [
        TokenBucket::new(10, 10 * SECOND).into(),
        Algorithm::from(Adaptive::new(10).window(10 * SECOND)),
    ] {
        let (clock, limiter) = limiter(algorithm);
        limiter
            .try_acquire()
            .unwrap()
            .settle(Verdict::new(Outcome::Success).cost(4));
        assert!(equal(limiter.status().available_tokens, 6.0));
        limiter
            .try_acquire_n(6)
            .unwrap()
            .settle(Verdict::new(Outcome::Success).cost(9));
        assert!(
            equal(limiter.status().available_tokens, 0.0),
            "a debt of three is shown as nothing there"
        );
        assert_eq!(
            limiter.status().retry_after,
            Some(4 * SECOND),
            "and paid before the next is admitted"
        );
        assert_eq!(acquire_when_told(&clock, &limiter, 1), 4 * SECOND);
    }
}

#[test]
fn a_true_cost_below_the_reserved_is_returned() {
    for algorithm in [
        TokenBucket::new(10, 10 * SECOND).into(),
        Algorithm::from(Adaptive::new(10).window(10 * SECOND)),
    ] {
        let (clock, limiter) = limiter(algorithm);
        let permit = limiter.try_acquire_n(10).unwrap();
        permit.settle(Verdict::new(Outcome::Success).cost(3));
        assert!(equal(limiter.status().available_tokens, 7.0));
        limiter
            .try_acquire_n(7)
            .unwrap()
            .settle(Verdict::new(Outcome::Success).cost(7));
        assert!(
            limiter.try_acquire().is_err(),
            "the cost that was reserved changes nothing"
        );
        clock.advance(10 * SECOND);
        limiter.try_acquire_n(10).unwrap().settle(Outcome::Success);
        assert!(limiter.try_acquire().is_err(), "nor does a verdict without a cost");
    }
}

#[test]
fn a_rate_is_used_by_what_calls_have_cost_in_truth() {
    for (cost, rate) in [(4, 10.0), (5, 15.0)] {
        let adaptive = Adaptive::new(10)
            .window(10 * SECOND)
            .minimum_calls(1)
            .adjustment_factor(0.5);
        let (clock, limiter) = limiter(adaptive);
        let permit = limiter.try_acquire().unwrap();
        permit.settle(Verdict::new(Outcome::Success).cost(cost));
        clock.advance(10 * SECOND);
        assert!(equal(limiter.status().rate, rate), "{cost}");
    }
}

#[test]
fn a_debt_is_at_most_one_burst() {
    for algorithm in [
        TokenBucket::new(10, 10 * SECOND).into(),
        Algorithm::from(Adaptive::new(10).window(10 * SECOND)),
    ] {
        let (_, limiter) = limiter(algorithm);
        let permits: Vec<_> = (0..10).map(|_| limiter.try_acquire().unwrap()).collect();
        for permit in permits {
            permit.settle(Verdict::new(Outcome::Ignored).cost(u32::MAX));
        }
        assert_eq!(
            limiter.status().retry_after,
            Some(11 * SECOND),
            "{algorithm:?}: ten seconds of debt, then a token"
        );
    }
}

#[test]
fn a_sliding_window_keeps_what_it_admitted_whatever_it_cost() {
    let (_, limiter) = limiter(SlidingWindow::new(10, MINUTE));
    limiter
        .try_acquire_n(5)
        .unwrap()
        .settle(Verdict::new(Outcome::Success).cost(1));
    limiter
        .try_acquire_n(1)
        .unwrap()
        .settle(Verdict::new(Outcome::Success).cost(9));
    assert_eq!(drain(&limiter), 4);
}

#[tokio::test(start_paused = true)]
async fn a_call_is_limited_and_keeps_its_own_error() {
    let limiter = RateLimiter::new("agent", TokenBucket::new(2, MINUTE)).unwrap();
    assert!(matches!(limiter.call(async { Ok::<_, String>(42) }).await, Ok(42)));
    let failed = limiter
        .call(async { Err::<(), _>("refused by the peer".to_owned()) })
        .await;
    assert_eq!(failed, Err(Error::Inner("refused by the peer".to_owned())));
    let rejected = limiter
        .call(async { Err::<(), _>("the call was made".to_owned()) })
        .await;
    let rejected = rejected.unwrap_err();
    assert_eq!(rejected.rejected().expect("refused here").retry_after, Some(MINUTE / 2));
}

#[tokio::test(start_paused = true)]
async fn a_call_may_tell_its_true_cost() {
    let limiter = RateLimiter::new("model", TokenBucket::new(100, MINUTE)).unwrap();
    let classify = |result: &Result<u32, String>| Verdict::new(Outcome::Success).cost(*result.as_ref().unwrap_or(&0));
    limiter.call_with(classify, async { Ok(40) }).await.unwrap();
    assert!(equal(limiter.status().available_tokens, 60.0));
}

// ---- adaptive ----

/// Rate 100 a minute, between 50 and 150; ten outcomes make a verdict, a tenth of them may fail.
fn adaptive() -> Adaptive {
    Adaptive::new(100)
        .min_rate(50)
        .max_rate(150)
        .adjustment_factor(0.2)
        .error_threshold(0.1)
        .minimum_calls(10)
}

/// Makes so many calls that end so.
fn end(limiter: &RateLimiter, calls: u32, outcome: Outcome) {
    for _ in 0..calls {
        limiter.try_acquire().expect("room").settle(outcome);
    }
}

fn rate(limiter: &RateLimiter) -> f64 {
    limiter.status().rate
}

#[test]
fn the_rate_falls_once_for_each_window_with_too_many_failures() {
    let (clock, limiter) = limiter(adaptive());
    for expected in [80.0, 64.0, 51.2, 50.0, 50.0] {
        end(&limiter, 9, Outcome::Success);
        end(&limiter, 2, Outcome::Failure);
        let before = rate(&limiter);
        clock.advance(just_before(MINUTE));
        assert!(equal(rate(&limiter), before), "not before the window ends");
        clock.advance(NANOSECOND);
        assert!(equal(rate(&limiter), expected), "{} is not {expected}", rate(&limiter));
    }
}

#[test]
fn the_rate_rises_once_for_each_window_that_goes_well_and_is_used() {
    let (clock, limiter) = limiter(adaptive().burst(200));
    for expected in [120.0, 144.0, 150.0, 150.0] {
        end(&limiter, 80, Outcome::Success);
        clock.advance(MINUTE);
        assert!(equal(rate(&limiter), expected), "{} is not {expected}", rate(&limiter));
    }
}

#[test]
fn the_rate_rises_only_if_half_of_it_was_used() {
    for (calls, expected) in [(49, 100.0), (50, 120.0)] {
        let (clock, limiter) = limiter(adaptive());
        end(&limiter, calls, Outcome::Success);
        clock.advance(MINUTE);
        assert!(equal(rate(&limiter), expected), "{calls} of 100 used");
    }
    // What was given back was not used.
    let (clock, limiter) = limiter(adaptive());
    end(&limiter, 49, Outcome::Success);
    for _ in 0..20 {
        limiter.try_acquire().unwrap().unused();
    }
    clock.advance(MINUTE);
    assert!(
        equal(rate(&limiter), 100.0),
        "a permit that was given back is no use of the rate"
    );
}

#[test]
fn the_rate_moves_on_the_minimum_of_outcomes_and_not_on_fewer() {
    for (failures, expected) in [(9, 100.0), (10, 80.0)] {
        let (clock, limiter) = limiter(adaptive());
        end(&limiter, failures, Outcome::Failure);
        clock.advance(MINUTE);
        assert!(
            equal(rate(&limiter), expected),
            "{failures} failures of at least 10 outcomes"
        );
    }
    let (clock, limiter) = limiter(adaptive());
    end(&limiter, 9, Outcome::Failure);
    end(&limiter, 50, Outcome::Ignored);
    clock.advance(MINUTE);
    assert!(equal(rate(&limiter), 100.0), "what is ignored is no outcome");
}

#[test]
fn the_threshold_itself_is_no_overload() {
    for (failures, expected) in [(6, 120.0), (7, 80.0)] {
        let (clock, limiter) = limiter(adaptive());
        end(&limiter, 60 - failures, Outcome::Success);
        end(&limiter, failures, Outcome::Failure);
        clock.advance(MINUTE);
        assert!(equal(rate(&limiter), expected), "{failures} of 60 failed, a tenth may");
    }
}

#[test]
fn outcomes_of_one_window_do_not_count_in_the_next() {
    let (clock, limiter) = limiter(adaptive());
    end(&limiter, 9, Outcome::Failure);
    clock.advance(MINUTE);
    end(&limiter, 9, Outcome::Failure);
    clock.advance(MINUTE);
    assert!(equal(rate(&limiter), 100.0));
}

#[test]
fn many_silent_windows_are_one_move() {
    for (outcome, expected) in [(Outcome::Failure, 80.0), (Outcome::Success, 120.0)] {
        let (clock, limiter) = limiter(adaptive());
        end(&limiter, 60, outcome);
        clock.advance(YEAR + SECOND);
        assert!(equal(rate(&limiter), expected), "a year of silence says nothing more");
        assert_eq!(drain(&limiter), 100, "and fills the bucket once");
        assert!(equal(rate(&limiter), expected));
        // The windows still end where they would have.
        end_of_window_is_after(&clock, &limiter, MINUTE.saturating_sub(SECOND + YEAR_PAST_ITS_MINUTE));
    }
}

/// A year of 365.25 days is a whole number of minutes.
const YEAR_PAST_ITS_MINUTE: Duration = Duration::from_secs(31_557_600 % 60);

/// Fails what there is to fail and checks that the rate falls after `wait`, not before.
fn end_of_window_is_after(clock: &ManualClock, limiter: &RateLimiter, wait: Duration) {
    let before = rate(limiter);
    for _ in 0..10 {
        limiter.try_acquire_n(0).expect("free").settle(Outcome::Failure);
    }
    clock.advance(just_before(wait));
    assert!(equal(rate(limiter), before));
    clock.advance(NANOSECOND);
    assert!(equal(rate(limiter), before * 0.8));
}

/// A limiter on one of the program's clocks counts the outcomes of a window where it sits, and is not asked; one on a clock of the
/// test's own is told of each.
#[tokio::test(start_paused = true)]
async fn outcomes_that_are_only_counted_move_the_rate_as_those_that_are_told() {
    let seed = seed();
    let below = |dice: &mut Dice, n: usize| usize::try_from(dice.below(n as u64)).expect("an index");
    let mut moves = 0;
    for task in 0..100 {
        let mut dice = Dice::new(seed, task);
        let algorithm = adaptive().burst(10_000);
        let (clock, told) = limiter(algorithm);
        let counted = RateLimiter::new("agent", algorithm).unwrap();
        let mut running = Vec::new();
        for step in 0..400 {
            let before = rate(&told);
            if dice.once_in(20) {
                // Now and then to the very end of a window, or past several.
                let wait = [MINUTE / 4, MINUTE / 3, MINUTE / 2, MINUTE, 3 * MINUTE][below(&mut dice, 5)];
                clock.advance(wait);
                tokio::time::advance(wait).await;
            } else if running.is_empty() || dice.once_in(2) {
                let cost = if dice.once_in(4) { 7 } else { 1 };
                running.push([&told, &counted].map(|limiter| limiter.try_acquire_n(cost).expect("room")));
            } else {
                let which = below(&mut dice, running.len());
                let verdict = match dice.below(16) {
                    0..8 => Some(Verdict::new(Outcome::Success)),
                    8..10 => Some(Verdict::new(Outcome::Failure)),
                    10..12 => Some(Verdict::new(Outcome::Ignored)),
                    12 => Some(Verdict::new(Outcome::Failure).cost(3)),
                    13 => Some(Verdict::new(Outcome::Success).cost(9)),
                    _ => None,
                };
                let given_back = dice.once_in(2);
                for permit in running.swap_remove(which) {
                    match verdict {
                        Some(verdict) => permit.settle(verdict),
                        None if given_back => permit.unused(),
                        None => drop(permit),
                    }
                }
            }
            let [told, counted] = [&told, &counted].map(RateLimiter::status);
            moves += u32::from(!equal(told.rate, before));
            assert!(
                equal(told.rate, counted.rate) && equal(told.available_tokens, counted.available_tokens),
                "run {task}, step {step}: {told:?} and {counted:?}"
            );
            assert_eq!(told.accepted_requests, counted.accepted_requests);
            assert_eq!(told.returned_requests, counted.returned_requests);
        }
    }
    assert!(moves > 100, "{moves} moves tell little");
}

#[tokio::test(start_paused = true)]
async fn every_outcome_that_threads_count_is_counted_in_its_window() {
    for (one_more, expected) in [(0, 120.0), (1, 80.0)] {
        let algorithm = Adaptive::new(100).burst(10_000).error_threshold(0.1);
        let limiter = RateLimiter::new("agent", algorithm).unwrap();
        let runtime = tokio::runtime::Handle::current();
        let handles = [0, 0, 0, one_more].map(|more| {
            let (limiter, runtime) = (limiter.clone(), runtime.clone());
            std::thread::spawn(move || {
                let _on_its_clock = runtime.enter();
                end(&limiter, 225 - more, Outcome::Success);
                end(&limiter, 25 + more, Outcome::Failure);
            })
        });
        for handle in handles {
            handle.join().expect("it ends its calls");
        }
        tokio::time::advance(MINUTE).await;
        assert!(
            equal(rate(&limiter), expected),
            "{} failures of 1,000: {}",
            100 + one_more,
            rate(&limiter)
        );
    }
}

#[test]
fn a_move_grants_no_free_burst() {
    let (clock, limiter) = limiter(adaptive().burst(60));
    end(&limiter, 60, Outcome::Success);
    clock.advance(MINUTE);
    assert!(equal(rate(&limiter), 120.0));
    assert_eq!(drain(&limiter), 60, "the burst stays as it was set");
    assert!(equal(limiter.status().available_tokens, 0.0));
    assert_eq!(acquire_when_told(&clock, &limiter, 1), SECOND / 2, "120 a minute");
}

#[test]
fn a_move_strands_no_tokens() {
    for (outcome, per_half_minute) in [(Outcome::Failure, 40.0), (Outcome::Success, 60.0)] {
        let (clock, limiter) = limiter(adaptive().burst(300));
        end(&limiter, 250, outcome);
        clock.advance(MINUTE);
        assert!(
            equal(limiter.status().available_tokens, 150.0),
            "50 were left, 100 came before the move"
        );
        clock.advance(MINUTE / 2);
        assert!(
            equal(limiter.status().available_tokens, 150.0 + per_half_minute),
            "what comes after it comes faster or slower"
        );
        assert_eq!(
            f64::from(drain(&limiter)).total_cmp(&(150.0 + per_half_minute)),
            std::cmp::Ordering::Equal
        );
    }
}

#[test]
fn a_retry_time_across_the_end_of_a_window_knows_the_next_rate() {
    for (outcome, after) in [
        (Outcome::Failure, 3 * MINUTE / 4),
        (Outcome::Success, MINUTE / 2),
        (Outcome::Ignored, 3 * MINUTE / 5),
    ] {
        let (clock, limiter) = limiter(adaptive().burst(200));
        end(&limiter, 200, outcome);
        clock.advance(MINUTE / 3);
        // 100 come in this window, 60 more after it at 80, 120 or 100 a minute.
        assert_eq!(
            acquire_when_told(&clock, &limiter, 160),
            2 * MINUTE / 3 + after,
            "{outcome:?}"
        );
    }
}

#[test]
fn a_panic_under_a_permit_is_a_failure() {
    let (clock, limiter) = limiter(adaptive());
    for _ in 0..10 {
        let caught = catch_unwind(AssertUnwindSafe(|| {
            let _permit = limiter.try_acquire().unwrap();
            std::panic::resume_unwind(Box::new("the call fails"));
        }));
        assert!(caught.is_err());
    }
    clock.advance(MINUTE);
    assert!(equal(rate(&limiter), 80.0));
}

#[tokio::test(start_paused = true)]
async fn a_panic_inside_a_call_is_a_failure_once() {
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("agent", adaptive().minimum_calls(20))
        .clock(&clock)
        .build()
        .unwrap();
    for _ in 0..10 {
        let limiter = limiter.clone();
        let call = async move {
            let fail = async { std::panic::resume_unwind(Box::new("the call fails")) };
            limiter.call::<(), std::io::Error>(fail).await
        };
        assert!(tokio::spawn(call).await.unwrap_err().is_panic());
    }
    end(&limiter, 9, Outcome::Failure);
    clock.advance(MINUTE);
    assert!(equal(rate(&limiter), 100.0), "ten and nine are not twenty");
    end(&limiter, 20, Outcome::Failure);
    clock.advance(MINUTE);
    assert!(equal(rate(&limiter), 80.0));
}

#[test]
fn a_dropped_permit_counts_as_the_option_says() {
    for (cancelled, expected) in [
        (Outcome::Ignored, 100.0),
        (Outcome::Failure, 80.0),
        (Outcome::Success, 120.0),
    ] {
        let (clock, limiter) = limiter(adaptive().cancelled(cancelled));
        assert_eq!(drain(&limiter), 100);
        clock.advance(MINUTE);
        assert!(equal(rate(&limiter), expected), "{cancelled:?}");
    }
    let (clock, limiter) = limiter(adaptive());
    drain(&limiter);
    clock.advance(MINUTE);
    assert!(equal(rate(&limiter), 100.0), "by default a cancelled call says nothing");
}

#[tokio::test(start_paused = true)]
async fn a_call_teaches_what_its_classifier_says() {
    let refused_elsewhere = || {
        Rejected::find(
            &RateLimiter::new("other", TokenBucket::new(1, MINUTE))
                .unwrap()
                .try_acquire_n(2)
                .unwrap_err(),
        )
        .cloned()
    };
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("agent", adaptive()).clock(&clock).build().unwrap();
    for _ in 0..60 {
        // An answer that tells of an error is a failure if the classifier says so.
        let answer = limiter
            .call_with(|_: &Result<u16, String>| Outcome::Failure, async { Ok(503) })
            .await;
        assert_eq!(answer, Ok(503));
    }
    clock.advance(MINUTE);
    assert!(equal(rate(&limiter), 80.0));
    for _ in 0..60 {
        let answer = limiter.call(async { Err::<(), _>(refused_elsewhere().unwrap()) }).await;
        assert!(matches!(answer, Err(Error::Inner(_))));
    }
    clock.advance(MINUTE);
    assert!(
        equal(rate(&limiter), 80.0),
        "a refusal by another policy is not the service's failure"
    );
}

#[test]
fn a_move_is_told_once_with_the_moment_it_was_due() {
    let (clock, limiter) = limiter(adaptive());
    let mut events = limiter.subscribe(8);
    let start = clock.now();
    end(&limiter, 10, Outcome::Failure);
    clock.advance(MINUTE + 7 * SECOND);
    assert!(equal(rate(&limiter), 80.0));
    assert!(
        events.try_recv().is_none(),
        "a reader of the status sees the move and does not make it"
    );
    end(&limiter, 2, Outcome::Success);
    let event = events.try_recv().expect("whoever comes by makes it");
    assert_eq!(event.at.duration_since(start), MINUTE);
    assert_eq!(
        (event.service.as_str(), event.limit.as_deref()),
        ("agent", Some("default"))
    );
    assert!(matches!(event.kind, EventKind::RateChanged { from, to } if equal(from, 100.0) && equal(to, 80.0)));
    clock.advance(MINUTE);
    limiter.try_acquire().unwrap();
    assert!(events.try_recv().is_none(), "a rate that stays is no event");
}

#[test]
fn a_rate_at_its_bound_is_told_no_more() {
    let (clock, limiter) = limiter(adaptive().min_rate(100));
    let mut events = limiter.subscribe(8);
    end(&limiter, 10, Outcome::Failure);
    clock.advance(MINUTE);
    limiter.try_acquire().unwrap();
    assert!(events.try_recv().is_none());
}

// ---- status, events, handles ----

#[test]
fn the_status_tells_everything() {
    for algorithm in a_minute(4) {
        let clock = Clock::manual();
        let limiter = RateLimiter::builder("search", algorithm)
            .limit("burst")
            .clock(&clock)
            .build()
            .unwrap();
        let status = limiter.status();
        assert_eq!(
            (status.service.as_str(), status.name.as_str(), status.kind),
            ("search", "burst", algorithm.as_str())
        );
        assert_eq!((status.period, status.burst, status.config), (MINUTE, 4, algorithm));
        assert!(equal(status.rate, 4.0) && equal(status.available_tokens, 4.0));
        assert_eq!(
            (status.retry_after, status.acceptance_rate),
            (None, None),
            "no request, no rate"
        );
        limiter.try_acquire_n(3).unwrap();
        limiter.try_acquire().unwrap();
        limiter.try_acquire().unwrap_err();
        limiter.try_acquire_n(5).unwrap_err();
        let status = limiter.status();
        assert_eq!((status.accepted_requests, status.accepted_cost), (2, 4));
        assert_eq!(
            (
                status.rejected_requests,
                status.rejected.over_limit,
                status.rejected.cost_exceeds_burst
            ),
            (2, 1, 1)
        );
        assert_eq!((status.waiting, status.returned_requests), (0, 0));
        assert!(equal(status.acceptance_rate.unwrap(), 50.0), "in percent");
        assert!(equal(status.available_tokens, 0.0));
        assert_eq!(status.retry_after, limiter.try_acquire().unwrap_err().retry_after);
    }
}

#[test]
fn reading_the_status_changes_nothing() {
    for algorithm in a_minute(4) {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire_n(3).unwrap();
        for _ in 0..10 {
            // Not a whole number of tokens, nor of their fractions.
            clock.advance(MINUTE / 3);
            assert_eq!(limiter.status(), limiter.status());
        }
        assert_eq!(drain(&limiter), 4, "{algorithm:?}");
    }
}

#[test]
fn clones_share_one_state() {
    for algorithm in a_minute(5) {
        let (_, limiter) = limiter(algorithm);
        let admitted = (0..100).filter(|_| limiter.clone().try_acquire().is_ok()).count();
        assert_eq!(admitted, 5);
        assert_eq!(limiter.status().accepted_requests, 5);
    }
}

#[test]
fn every_rejection_is_told_and_a_panicking_listener_disturbs_nobody() {
    for algorithm in a_minute(1) {
        let (_, limiter) = limiter(algorithm);
        let heard = Arc::new(Mutex::new(Vec::new()));
        limiter.on_event(|_| std::panic::resume_unwind(Box::new("a listener's own affair")));
        let id = limiter.on_event({
            let heard = heard.clone();
            move |event| heard.lock().unwrap().push(event.kind.clone())
        });
        limiter.try_acquire().unwrap();
        let rejected = limiter.try_acquire().unwrap_err();
        let too_dear = limiter.try_acquire_n(2).unwrap_err();
        assert_eq!(
            *heard.lock().unwrap(),
            [EventKind::Rejected(rejected), EventKind::Rejected(too_dear)]
        );
        assert!(limiter.remove_listener(id) && !limiter.remove_listener(id));
        limiter.try_acquire().unwrap_err();
        assert_eq!(heard.lock().unwrap().len(), 2);
    }
}

#[test]
fn the_last_handle_frees_everything() {
    for algorithm in a_minute(2) {
        let (_, limiter) = limiter(algorithm);
        let alive = Arc::new(());
        let watched = Arc::downgrade(&alive);
        limiter.on_event(move |_| drop(alive.clone()));
        let clone = limiter.clone();
        let permit = limiter.try_acquire().unwrap();
        drop((limiter, clone));
        assert!(watched.upgrade().is_some(), "a permit still belongs to its limiter");
        permit.unused();
        assert!(watched.upgrade().is_none(), "{algorithm:?}: nothing is left");
    }
}

// ---- threads ----

/// Runs the same thing on several threads at once.
fn on_threads<T: Send>(threads: usize, run: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let barrier = Barrier::new(threads);
    std::thread::scope(|scope| {
        let (run, barrier) = (&run, &barrier);
        let start = |thread| {
            scope.spawn(move || {
                barrier.wait();
                run(thread)
            })
        };
        let running: Vec<_> = (0..threads).map(start).collect();
        running
            .into_iter()
            .map(|thread| thread.join().expect("no thread panics"))
            .collect()
    })
}

#[test]
fn threads_that_hammer_one_limiter_get_its_limit_to_the_request() {
    const LIMIT: u32 = 10_000;
    for algorithm in a_minute(LIMIT) {
        let (clock, limiter) = limiter(algorithm);
        for window in 1..=3_u64 {
            let admitted: u32 = on_threads(4, |_| (0..LIMIT).filter(|_| limiter.try_acquire().is_ok()).count())
                .into_iter()
                .sum::<usize>()
                .try_into()
                .unwrap();
            assert_eq!(admitted, LIMIT, "{algorithm:?}: not one more, not one less");
            let status = limiter.status();
            assert_eq!(
                status.accepted_requests,
                window * u64::from(LIMIT),
                "the counters add up"
            );
            assert_eq!(
                status.accepted_requests + status.rejected_requests,
                window * 4 * u64::from(LIMIT)
            );
            clock.advance(MINUTE);
        }
    }
}

#[test]
fn threads_on_a_moving_clock_never_get_more_than_the_limit() {
    const CALLS: u64 = 20_000;
    for algorithm in [
        Algorithm::from(TokenBucket::new(3, Duration::from_nanos(100)).burst(7)),
        Adaptive::new(3)
            .max_rate(3)
            .window(Duration::from_nanos(100))
            .burst(7)
            .into(),
        SlidingWindow::new(7, Duration::from_nanos(100)).into(),
    ] {
        let (clock, limiter) = limiter(algorithm);
        let start = clock.now();
        let admitted: u64 = on_threads(3, |thread| {
            let mut admitted = 0;
            for call in 0..CALLS {
                if thread == 0 && call % 3 == 0 {
                    clock.advance(Duration::from_nanos(1 + call % 13));
                }
                let cost = u32::try_from(call % 3).unwrap() + 1;
                if let Ok(permit) = limiter.try_acquire_n(cost) {
                    admitted += u64::from(cost);
                    // Every third is not needed after all; where it cannot be taken back it is spent.
                    if call % 3 == 0 && algorithm.as_str() != "sliding_window" {
                        admitted -= u64::from(cost);
                        permit.unused();
                    }
                }
            }
            admitted
        })
        .into_iter()
        .sum();
        let passed = u64::try_from(clock.now().duration_since(start).as_nanos()).unwrap();
        let most = match algorithm {
            Algorithm::SlidingWindow(_) => 7 * (passed / 100 + 1),
            _ => 7 + passed * 3 / 100,
        };
        assert!(admitted <= most, "{algorithm:?}: {admitted} admitted, {most} allowed");
        let status = limiter.status();
        assert_eq!(
            status.accepted_requests + status.rejected_requests,
            3 * CALLS,
            "the counters add up"
        );
        assert!(status.accepted_cost >= admitted, "what was given back was accepted too");
    }
}

/// The window is one tick of the clock, so the admissions of each tick must not exceed the quota; the permits of the tick before
/// are given back in the same moment in which others take their places.
#[test]
fn refunds_that_race_with_admissions_neither_exceed_a_window_nor_wedge_it() {
    const TICKS: u32 = 30_000;
    const WINDOW: Duration = Duration::from_nanos(10);
    for (max_requests, cost, threads) in [(1, 1, 2), (1, 1, 3), (2, 2, 2), (3, 2, 3), (4, 3, 2), (64, 40, 2)] {
        let (clock, limiter) = limiter(SlidingWindow::new(max_requests, WINDOW));
        let tick = AtomicU32::new(0);
        let admitted: Vec<AtomicU32> = (0..=TICKS).map(|_| AtomicU32::new(0)).collect();
        let (over, refunds) = (AtomicBool::new(false), AtomicU32::new(0));
        on_threads(threads, |thread| {
            let take = |cost| {
                let before = tick.load(Ordering::SeqCst);
                let permit = limiter.try_acquire_n(cost).ok()?;
                // Counted only if the clock certainly stood still meanwhile, which leaves most of them.
                if let Some(admitted) = admitted.get(before as usize)
                    && tick.load(Ordering::SeqCst) == before
                {
                    admitted.fetch_add(cost, Ordering::SeqCst);
                }
                Some(permit)
            };
            if thread > 0 {
                while !over.load(Ordering::SeqCst) {
                    drop(take(max_requests));
                    drop(take(1));
                }
                return;
            }
            let move_on = |next| {
                // Between two ticks nobody counts: the time has moved, or has not.
                tick.store(u32::MAX, Ordering::SeqCst);
                clock.advance(WINDOW);
                tick.store(next, Ordering::SeqCst);
            };
            for next in (1..TICKS).step_by(2) {
                move_on(next);
                let old = take(cost);
                move_on(next + 1);
                if let Some(old) = old {
                    old.unused();
                    refunds.fetch_add(1, Ordering::SeqCst);
                }
                drop(take(max_requests));
            }
            over.store(true, Ordering::SeqCst);
        });
        assert!(refunds.into_inner() > 0, "the race took place");
        for (tick, admitted) in admitted.iter().enumerate() {
            let admitted = admitted.load(Ordering::SeqCst);
            assert!(
                admitted <= max_requests,
                "tick {tick}: {admitted} admitted in one window of {max_requests}"
            );
        }
        for _ in 0..5 {
            clock.advance(WINDOW);
            assert_eq!(
                drain(&limiter),
                max_requests,
                "the ring of {max_requests} still admits its quota"
            );
        }
    }
}

#[test]
fn threads_that_take_and_give_back_leave_everything_there() {
    for algorithm in a_minute(8) {
        let (clock, limiter) = limiter(algorithm);
        let unused = AtomicU64::new(0);
        on_threads(3, |thread| {
            let cost = u32::try_from(thread).unwrap() + 1;
            for _ in 0..10_000 {
                if let Ok(permit) = limiter.try_acquire_n(cost) {
                    permit.unused();
                    unused.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let status = limiter.status();
        let kept = unused.into_inner() - status.returned_requests;
        if algorithm.as_str() == "sliding_window" {
            // What was no longer the newest stays for its window, and costs 1 to 3.
            let used = 8.0 - status.available_tokens;
            assert!(kept as f64 <= used && used <= 3.0 * kept as f64, "{kept} kept: {used}");
            clock.advance(MINUTE);
        } else {
            assert_eq!(kept, 0, "{algorithm:?}");
        }
        assert_eq!(drain(&limiter), 8, "{algorithm:?}");
    }
}

#[test]
fn a_clock_that_fell_far_behind_is_told_the_exact_time_all_the_same() {
    let (clock, limiter) = limiter(TokenBucket::new(u32::MAX, NANOSECOND).burst(1));
    clock.advance(10 * SECOND);
    limiter.try_acquire().expect("full");
    clock.rewind(5 * SECOND);
    assert_eq!(
        acquire_when_told(&clock, &limiter, 1),
        5 * SECOND + NANOSECOND,
        "until the clock is back, and the nanosecond that brings a token"
    );
}
