//! Successes that are only counted, and recorded later: nobody can tell the difference.
//!
//! On the clocks of a program a success in a window of time is counted, on a manual clock it is recorded at once. The same steps on
//! both, at the same times, must show the same.

use crate::{admit, breaker, end_calls};
use portcullis::{CircuitBreaker, CircuitBreakerConfig, Clock, ManualClock, Outcome, State, Window, WindowStatus};
use proptest::{collection::vec, prelude::*, test_runner::TestCaseResult};
use std::{sync::Barrier, thread, time::Duration};

#[derive(Debug, Clone)]
enum Step {
    Succeed(u32),
    Fail,
    Ignore,
    Advance(Duration),
    /// Moves to the first moment of a tenth.
    Tenth(u64),
    Reset,
    ForceClosed,
    Reconfigure(u64),
    Look,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    vec(
        prop_oneof![
            6 => (1..9_u32).prop_map(Step::Succeed),
            3 => Just(Step::Fail),
            1 => Just(Step::Ignore),
            4 => prop_oneof![1..30_u64, 90..110_u64, Just(100), 1_000..1_200_u64]
                .prop_map(|millis| Step::Advance(Duration::from_millis(millis))),
            3 => prop_oneof![3 => Just(1), 1 => 2..12_u64].prop_map(Step::Tenth),
            1 => Just(Step::Reset),
            1 => Just(Step::ForceClosed),
            1 => (1..5_u64).prop_map(Step::Reconfigure),
            2 => Just(Step::Look),
        ],
        1..120,
    )
}

fn config(tenths: u64, minimum: u32, consecutive: bool) -> CircuitBreakerConfig {
    let config = CircuitBreakerConfig::default()
        .failure_rate(0.4)
        .window(Window::time(Duration::from_millis(tenths * 1_000)))
        .minimum_calls(minimum)
        .recovery_timeout(Duration::from_millis(250));
    if consecutive {
        config.failure_threshold(4)
    } else {
        config
    }
}

struct Both {
    counts: CircuitBreaker,
    records: CircuitBreaker,
    clock: ManualClock,
}

impl Both {
    fn new(config: &CircuitBreakerConfig) -> Self {
        let clock = Clock::manual();
        // The tenths of both begin at the same times.
        clock.advance(Clock::system().now().duration_since(clock.now()));
        let build = |clock: Clock| {
            CircuitBreaker::builder("agent")
                .config(config.clone())
                .clock(clock)
                .build()
                .unwrap()
        };
        Self {
            counts: build(Clock::system()),
            records: build(clock.clone().into()),
            clock,
        }
    }

    fn call(&self, outcome: Outcome) -> TestCaseResult {
        let permits = (self.counts.try_acquire(), self.records.try_acquire());
        prop_assert_eq!(permits.0.is_ok(), permits.1.is_ok());
        if let (Ok(counts), Ok(records)) = permits {
            counts.settle(outcome);
            records.settle(outcome);
        }
        Ok(())
    }

    async fn advance(&self, by: Duration) {
        tokio::time::advance(by).await;
        self.clock
            .advance(Clock::system().now().duration_since(self.clock.now()));
    }

    async fn step(&self, step: &Step, minimum: u32, consecutive: bool) -> TestCaseResult {
        match *step {
            Step::Succeed(n) => {
                for _ in 0..n {
                    self.call(Outcome::Success)?;
                }
            }
            Step::Fail => self.call(Outcome::Failure)?,
            Step::Ignore => self.call(Outcome::Ignored)?,
            Step::Advance(by) => self.advance(by).await,
            Step::Tenth(n) => self.advance(until_tenth(n)).await,
            Step::Reset => {
                self.counts.reset();
                self.records.reset();
            }
            Step::ForceClosed => {
                self.counts.force_closed();
                self.records.force_closed();
            }
            Step::Reconfigure(tenths) => {
                for breaker in [&self.counts, &self.records] {
                    breaker.reconfigure(config(tenths, minimum, consecutive)).unwrap();
                }
            }
            // Not after every step: that a look records what was counted must not be what makes them equal.
            Step::Look => self.compare()?,
        }
        Ok(())
    }

    fn compare(&self) -> TestCaseResult {
        let (counts, records) = (self.counts.status(), self.records.status());
        prop_assert_eq!(counts.state, records.state);
        prop_assert_eq!(counts.generation, records.generation);
        prop_assert_eq!(counts.failure_count, records.failure_count);
        prop_assert_eq!(counts.success_count, records.success_count);
        prop_assert_eq!(counts.retry_after, records.retry_after);
        prop_assert_eq!(counts.window, records.window);
        prop_assert_eq!(counts.metrics, records.metrics);
        Ok(())
    }
}

/// How long it is until that many tenths of 100 ms have begun from now on. They are counted from where the clock's scale begins.
fn until_tenth(tenths: u64) -> Duration {
    let now = Clock::system().now();
    let passed = now.duration_since(now.saturating_sub(Duration::MAX)).as_nanos() % 100_000_000;
    let passed = u64::try_from(passed).expect("less than a tenth");
    Duration::from_nanos(tenths * 100_000_000 - passed)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn a_window_of_time_counts_its_successes_as_it_would_record_them(
        steps in steps(), minimum in 1..12_u32, consecutive: bool,
    ) {
        // The scale of the system clock begins before the paused time does.
        let _ = Clock::system().now();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let both = Both::new(&config(1, minimum, consecutive));
            for step in &steps {
                both.step(step, minimum, consecutive).await?;
            }
            both.compare()
        })?;
    }
}

/// A window that many threads fill has no call too many and none too few.
#[test]
fn a_window_of_calls_holds_the_successes_of_all_threads() {
    let breaker = CircuitBreaker::builder("agent")
        .failure_rate(0.9)
        .window(Window::calls(10_000))
        .build()
        .unwrap();
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..500 {
                    breaker.try_acquire().unwrap().settle(Outcome::Success);
                }
            });
        }
    });
    let window = |breaker: &CircuitBreaker| {
        breaker
            .status()
            .window
            .map(|WindowStatus { calls, failures, .. }| (calls, failures))
    };
    assert_eq!(window(&breaker), Some((4_001, 1)));
    for _ in 0..5_999 {
        breaker.try_acquire().unwrap().settle(Outcome::Success);
    }
    assert_eq!(window(&breaker), Some((10_000, 1)), "the failure is the oldest call");
    breaker.try_acquire().unwrap().settle(Outcome::Success);
    assert_eq!(window(&breaker), Some((10_000, 0)), "one more, and it is out");
}

/// The same with more threads than have counters of their own, all at once; also of a window of time, on the program's clock.
#[test]
fn a_window_holds_the_successes_of_more_threads_than_have_counters_of_their_own() {
    const THREADS: u32 = 100;
    for window in [Window::calls(10_000), Window::time(Duration::from_secs(1 << 30))] {
        let breaker = CircuitBreaker::builder("agent")
            .failure_rate(0.9)
            .window(window)
            .build()
            .unwrap();
        admit(&breaker).settle(Outcome::Failure);
        let all_run = Barrier::new(THREADS as usize);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..2 {
                        admit(&breaker).settle(Outcome::Success);
                        all_run.wait();
                    }
                });
            }
        });
        let window = breaker.status().window.expect("a rate is watched");
        assert_eq!((window.calls, window.failures), (2 * u64::from(THREADS) + 1, 1));
    }
}

#[test]
fn failures_of_calls_that_run_at_once_trip_together() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(3));
    let running = [admit(&breaker), admit(&breaker), admit(&breaker)];
    for permit in running {
        permit.settle(Outcome::Failure);
    }
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn a_success_ends_the_run_of_the_failures_that_came_while_it_ran() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(2));
    let running = admit(&breaker);
    end_calls(&breaker, 1, Outcome::Failure);
    running.settle(Outcome::Success);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed, "the run began anew");
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn a_success_of_an_earlier_generation_ends_no_run_of_failures() {
    let (breaker, _clock) = breaker(|builder| builder.failure_threshold(2));
    let running = admit(&breaker);
    breaker.reset();
    end_calls(&breaker, 1, Outcome::Failure);
    running.settle(Outcome::Success);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn a_success_of_an_earlier_generation_takes_nothing_from_what_was_counted_since() {
    let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.5).window(Window::calls(100)));
    let running = admit(&breaker);
    breaker.reset();
    end_calls(&breaker, 3, Outcome::Success);
    running.settle(Outcome::Success);
    end_calls(&breaker, 2, Outcome::Success);
    let window = breaker.status().window.expect("a rate is watched");
    assert_eq!(window.calls, 5);
}

#[test]
fn a_success_trips_if_a_failure_that_came_while_it_ran_made_the_rate_high() {
    let (breaker, _clock) = breaker(|builder| builder.failure_rate(0.5).window(Window::calls(10)).minimum_calls(2));
    let running = admit(&breaker);
    end_calls(&breaker, 1, Outcome::Failure);
    assert_eq!(breaker.state(), State::Closed, "the minimum of calls is not reached");
    running.settle(Outcome::Success);
    assert_eq!(breaker.state(), State::Open, "one of two failed");
}
