//! Pins what each rate limiter keeps to whatever order the times arrive in, under random schedules on a manual clock.

mod limiters;

use limiters::{NANOSECOND, SECOND, YEAR, acquire_when_told, limiter};
use portcullis::{Adaptive, Algorithm, SlidingWindow, TokenBucket};
use proptest::{prelude::*, test_runner::TestCaseResult};
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

/// What happens next.
#[derive(Debug, Clone)]
enum Step {
    /// Time passes, in thousandths of the limiter's period.
    Advance(u64),
    /// Time passes, in nanoseconds.
    Tick(u64),
    /// A call, of a cost modulo what the limit holds at once.
    Take(u32),
    /// The latest call was never made.
    Unused,
    /// The latest call is over.
    Drop,
    /// A thread that was held up sees an old time, in thousandths of the period.
    Rewind(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..1500u64).prop_map(Step::Advance),
        2 => (0..4u64).prop_map(Step::Tick),
        1 => (0..200_000u64).prop_map(Step::Advance),
        10 => any::<u32>().prop_map(Step::Take),
        2 => Just(Step::Unused),
        7 => Just(Step::Drop),
        3 => (0..1500u64).prop_map(Step::Rewind),
    ];
    prop::collection::vec(step, 1..120)
}

/// Periods from a nanosecond to a hundred years, round and odd ones.
fn periods() -> impl Strategy<Value = Duration> {
    prop_oneof![
        4 => (1..1000u64).prop_map(Duration::from_millis),
        2 => (1..10_000_000_000u64).prop_map(Duration::from_nanos),
        1 => (1..20u64).prop_map(Duration::from_nanos),
        1 => (1..=100u32).prop_map(|years| YEAR * years),
        1 => Just(3 * SECOND),
        1 => Just(86_400 * SECOND),
    ]
}

fn buckets() -> impl Strategy<Value = (u32, Duration, u32)> {
    let limit = prop_oneof![6 => 1..20u32, 2 => 1..100_000u32, 1 => any::<u32>().prop_map(|n| n.max(1))];
    let burst = prop_oneof![6 => 1..20u32, 1 => 1..2_000_000u32];
    (limit, periods(), burst)
}

fn keeps_to_its_window(max_requests: u32, window: Duration, steps: &[Step]) -> TestCaseResult {
    let (clock, limiter) = limiter(SlidingWindow::new(max_requests, window));
    let start = clock.now();
    clock.advance(YEAR);
    let mut admitted: Vec<Duration> = Vec::new();
    let mut newest = None;
    let mut latest = clock.now();
    let permille = |n: u64| Duration::from_nanos(u64::try_from(window.as_nanos()).unwrap() * n / 1000);
    for step in steps {
        match *step {
            Step::Advance(n) => clock.advance(permille(n)),
            Step::Tick(n) => clock.advance(Duration::from_nanos(n)),
            Step::Rewind(n) => clock.rewind(permille(n)),
            Step::Take(any) => {
                let cost = any % max_requests + 1;
                if let Ok(permit) = limiter.try_acquire_n(cost) {
                    admitted.extend((0..cost).map(|_| clock.now().duration_since(start)));
                    newest = Some(permit);
                }
            }
            Step::Unused => {
                if let Some(permit) = newest.take() {
                    admitted.truncate(admitted.len() - permit.cost() as usize);
                    permit.unused();
                }
            }
            Step::Drop => newest = None,
        }
        latest = latest.max(clock.now());
    }
    let mut in_order = admitted.clone();
    in_order.sort();
    for crowd in in_order.windows(max_requests as usize + 1) {
        let (first, last) = (crowd[0], crowd[max_requests as usize]);
        prop_assert!(
            last >= first + window,
            "more than {} in one window, from {:?} on",
            max_requests,
            first
        );
    }
    // However confused the times were, one quiet window later everything is as new.
    clock.advance(latest.duration_since(clock.now()) + window);
    for _ in 0..3 {
        prop_assert!((limiter.status().available_tokens - f64::from(max_requests)).abs() < 1e-9);
        for _ in 0..max_requests {
            prop_assert!(limiter.try_acquire().is_ok(), "the whole quota is back");
        }
        prop_assert!(limiter.try_acquire().is_err(), "and no more than the quota");
        clock.advance(window);
    }
    Ok(())
}

proptest! {
    /// Each of these times is one that some thread read; the order in which they arrive is anybody's.
    #[test]
    fn a_sliding_window_is_never_exceeded_by_threads_that_lie_behind(
        max_requests in 1..6u32, window in 1..2000u64, steps in steps(),
    ) {
        keeps_to_its_window(max_requests, Duration::from_nanos(window), &steps)?;
    }

    /// Whatever order the readings arrive in: never more than the burst and what the rate brings up to the latest of them.
    #[test]
    fn a_bucket_is_never_exceeded_by_threads_that_lie_behind(
        (limit, period, burst) in buckets(), adaptive in any::<bool>(), steps in steps(),
    ) {
        let algorithm = if adaptive {
            // Nobody settles here, so the rate stays.
            Algorithm::from(Adaptive::new(limit).burst(burst).window(period).max_rate(limit))
        } else {
            TokenBucket::new(limit, period).burst(burst).into()
        };
        let (clock, limiter) = limiter(algorithm);
        let start = clock.now();
        let mut latest = start;
        let mut admitted = 0;
        for step in &steps {
            let permille = |n: u64| (period / 1000).saturating_mul(u32::try_from(n).unwrap_or(u32::MAX)).min(YEAR);
            match *step {
                Step::Advance(n) => clock.advance(permille(n)),
                Step::Tick(n) => clock.advance(Duration::from_nanos(n)),
                Step::Rewind(n) => clock.rewind(permille(n)),
                Step::Take(any) => {
                    let cost = any % burst + 1;
                    admitted += limiter.try_acquire_n(cost).map_or(0, |permit| u128::from(permit.cost()));
                }
                Step::Unused | Step::Drop => {}
            }
            latest = latest.max(clock.now());
            if latest.duration_since(start) > 90 * YEAR {
                break;
            }
            let brought = latest.duration_since(start).as_nanos() * u128::from(limit) / period.as_nanos();
            prop_assert!(admitted <= u128::from(burst) + brought, "{} admitted of {}", admitted, u128::from(burst) + brought);
        }
    }

    /// A bucket that is asked all the time hands out its rate, to the token, over any stretch.
    #[test]
    fn a_token_bucket_under_pressure_hands_out_exactly_its_rate((limit, period, burst) in buckets(), rounds in 1..200u32) {
        // What a nanosecond brings must find room, or it overflows, as it must.
        let burst = burst + 1 + u32::try_from(u128::from(limit) / period.as_nanos()).unwrap();
        let (clock, limiter) = limiter(TokenBucket::new(limit, period).burst(burst));
        let start = clock.now();
        limiter.try_acquire_n(burst).unwrap();
        for taken in 1..=u128::from(rounds) {
            if clock.now().duration_since(start) > 80 * YEAR {
                break;
            }
            acquire_when_told(&clock, &limiter, 1);
            let due = (taken * period.as_nanos()).div_ceil(u128::from(limit));
            prop_assert_eq!(clock.now().duration_since(start).as_nanos(), due, "token {} is late or early: it drifts", taken);
        }
    }
}

#[test]
fn a_window_that_took_back_its_only_admission_is_whole_for_a_thread_that_lies_behind() {
    let steps = [Step::Take(0), Step::Unused, Step::Rewind(500)];
    keeps_to_its_window(1, Duration::from_nanos(2), &steps).expect("it once was not");
}

#[test]
fn a_status_read_while_a_bucket_wakes_up_from_a_long_rest_is_not_garbled() {
    const ROUNDS: usize = 200_000;
    // So fast that a second is many times what 64 bits tell apart.
    let (clock, limiter) = limiter(TokenBucket::new(u32::MAX, NANOSECOND));
    let (round, read) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let wait_for = |counter: &AtomicUsize, number| {
        let mut looks = 0;
        while counter.load(Ordering::SeqCst) < number {
            looks += 1;
            // The other thread may be without a core, and this one on it.
            if looks % 100 == 0 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    };
    let garbled = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut garbled = Vec::new();
            for number in 1..=ROUNDS {
                wait_for(&round, number);
                let status = limiter.status();
                if status.retry_after.is_some() {
                    garbled.push((number, status.retry_after));
                }
                read.store(number, Ordering::SeqCst);
            }
            garbled
        });
        for number in 1..=ROUNDS {
            clock.advance(Duration::from_secs(3));
            round.store(number, Ordering::SeqCst);
            limiter.try_acquire().expect("full");
            wait_for(&read, number);
        }
        reader.join().expect("reads")
    });
    assert_eq!(garbled.first(), None, "four billion are there, before and after");
}
