//! Settings that make no sense are refused, and the error says which, what it was and what would do.

use crate::{NANO, SECOND, YEAR};
use portcullis::{
    Backoff, CircuitBreaker, CircuitBreakerBuilder, CircuitBreakerConfig, ConfigError, Name, Outcome, Window,
};
use std::time::Duration;

fn refused(configure: impl FnOnce(CircuitBreakerBuilder) -> CircuitBreakerBuilder) -> ConfigError {
    configure(CircuitBreaker::builder("search"))
        .build()
        .expect_err("the setting makes no sense")
}

fn assert_refused(
    field: &str,
    value: &str,
    expected: &str,
    configure: impl FnOnce(CircuitBreakerBuilder) -> CircuitBreakerBuilder,
) {
    let error = refused(configure);
    assert_eq!(
        (error.field(), error.value(), error.expected()),
        (field, value, expected)
    );
    assert_eq!(error.to_string(), format!("{field} is {value}; expected {expected}"));
}

#[test]
fn counts_outside_their_range_are_refused() {
    let any = "1 to 4294967295";
    assert_refused("failure_threshold", "0", any, |builder| builder.failure_threshold(0));
    assert_refused("success_threshold", "0", any, |builder| builder.success_threshold(0));
    for failures in [0, 65_537] {
        assert_refused(
            "failures_within (failures)",
            &failures.to_string(),
            "1 to 65536",
            |builder| builder.failures_within(failures, SECOND),
        );
    }
    for calls in [0, (1 << 20) + 1, u32::MAX] {
        assert_refused("window (calls)", &calls.to_string(), "1 to 1048576", |builder| {
            builder.failure_rate(0.5).window(Window::calls(calls))
        });
    }
    for calls in [0, 11] {
        assert_refused("minimum_calls", &calls.to_string(), "1 to 10", |builder| {
            builder.failure_rate(0.5).window(Window::calls(10)).minimum_calls(calls)
        });
    }
    assert_refused("minimum_calls", "0", any, |builder| {
        builder.failure_rate(0.5).window(Window::time(SECOND)).minimum_calls(0)
    });
}

#[test]
fn fewer_probes_than_successes_needed_are_refused() {
    for (probes, successes) in [(0, 2), (1, 2), (9, 10), (3, u32::MAX)] {
        let expected = format!("at least success_threshold, which is {successes}");
        assert_refused("half_open_max_calls", &probes.to_string(), &expected, |builder| {
            builder.half_open_max_calls(probes).success_threshold(successes)
        });
    }
}

#[test]
fn shares_outside_zero_to_one_are_refused() {
    let numbers = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        0.0,
        -0.0,
        -0.5,
        1.0 + f64::EPSILON,
        f64::MAX,
    ];
    for number in numbers {
        let expected = "a share above 0 and at most 1";
        let value = number.to_string();
        assert_refused("failure_rate", &value, expected, |builder| builder.failure_rate(number));
        assert_refused("slow_calls (threshold)", &value, expected, |builder| {
            builder.slow_calls(number, SECOND)
        });
    }
}

#[test]
fn durations_of_zero_or_of_more_than_a_hundred_years_are_refused() {
    type Setting = (
        &'static str,
        fn(CircuitBreakerBuilder, Duration) -> CircuitBreakerBuilder,
    );
    let settings: [Setting; 7] = [
        ("recovery_timeout", CircuitBreakerBuilder::recovery_timeout),
        ("probe_lease", CircuitBreakerBuilder::probe_lease),
        ("honor_retry_after", CircuitBreakerBuilder::honor_retry_after),
        ("failures_within (period)", |builder, period| {
            builder.failures_within(1, period)
        }),
        ("slow_calls (slow)", |builder, slow| builder.slow_calls(0.5, slow)),
        ("window (time)", |builder, period| {
            builder.failure_rate(0.5).window(Window::time(period))
        }),
        ("recovery_backoff (max)", |builder, max| {
            builder.recovery_timeout(NANO).recovery_backoff(Backoff::new(2.0, max))
        }),
    ];
    for (field, set) in settings {
        for duration in [Duration::ZERO, 100 * YEAR + NANO, Duration::MAX] {
            assert_refused(field, &format!("{duration:?}"), "1 ns to 100 years", |builder| {
                set(builder, duration)
            });
        }
        for duration in [NANO, 100 * YEAR] {
            let builder = set(CircuitBreaker::builder("search"), duration);
            assert!(builder.build().is_ok(), "{field} may be {duration:?}");
        }
    }
}

#[test]
fn a_backoff_that_shrinks_or_knows_no_bounds_is_refused() {
    let set = |builder: CircuitBreakerBuilder, backoff| builder.recovery_timeout(10 * SECOND).recovery_backoff(backoff);
    for multiplier in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -2.0, 0.999_999] {
        assert_refused(
            "recovery_backoff (multiplier)",
            &multiplier.to_string(),
            "1 or more",
            |builder| set(builder, Backoff::new(multiplier, YEAR)),
        );
    }
    for jitter in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.1, 1.000_1] {
        assert_refused("recovery_backoff (jitter)", &jitter.to_string(), "0 to 1", |builder| {
            set(builder, Backoff::new(2.0, YEAR).jitter(jitter))
        });
    }
    assert_refused(
        "recovery_backoff (max)",
        "9s",
        "at least recovery_timeout, which is 10s",
        |builder| set(builder, Backoff::new(2.0, 9 * SECOND)),
    );
}

#[test]
fn names_are_one_to_255_bytes_of_any_text() {
    let build = |name: &str| CircuitBreaker::builder(name).build();
    for name in [
        "x",
        " ",
        "\0",
        "a\"b\\c\nd",
        "übung/検索 🚪",
        &"x".repeat(Name::MAX_LEN),
    ] {
        assert_eq!(build(name).expect("any text").name(), name);
    }
    for name in ["", &"x".repeat(Name::MAX_LEN + 1), &"é".repeat(128)] {
        let error = build(name).expect_err("too short or too long");
        assert_eq!((error.field(), error.expected()), ("name", "1 to 255 bytes of text"));
        assert!(error.value().contains(&format!("({} bytes)", name.len())), "{error}");
    }
}

#[test]
fn the_widest_valid_settings_build_and_work() {
    let (breaker, clock) = crate::breaker(|builder| {
        builder
            .failure_threshold(u32::MAX)
            .failures_within(1 << 16, 100 * YEAR)
            .failure_rate(1.0)
            .slow_calls(f64::MIN_POSITIVE, 100 * YEAR)
            .window(Window::calls(1 << 20))
            .minimum_calls(1 << 9)
            .recovery_timeout(100 * YEAR)
            .recovery_backoff(Backoff::new(f64::MAX, 100 * YEAR).jitter(1.0))
            .half_open_max_calls(u32::MAX)
            .success_threshold(u32::MAX)
            .probe_lease(100 * YEAR)
            .honor_retry_after(100 * YEAR)
    });
    crate::trip_and_wait(&breaker, &clock);
    crate::end_calls(&breaker, 1, Outcome::Failure);
    clock.advance(breaker.status().retry_after.expect("open again"));
    crate::end_calls(&breaker, 10, Outcome::Success);
    assert_eq!(breaker.status().success_count, 10);
}

#[test]
fn a_config_tells_whether_it_is_critical() {
    assert!(!CircuitBreakerConfig::default().is_critical());
    assert!(CircuitBreakerConfig::default().critical(true).is_critical());
    assert!(
        !CircuitBreakerConfig::default()
            .critical(true)
            .critical(false)
            .is_critical()
    );
}
