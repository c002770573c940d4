//! What goes wrong in other circuit breakers and rate limiters, and does not here: a list to read, one test for each fault, named
//! after what must hold. The comment above a test says what the fault looks like in the field. Much of this is pinned at more
//! length elsewhere, by subject.
//!
//! Faults that cannot be said in the terms of this crate, and why:
//!
//! - The least latency that an adaptive limiter has seen never grows again: no limit here looks at latency.
//! - The capacity of an adaptive limiter falls below zero when many are denied at once: here a denial takes nothing and teaches
//!   nothing. What is left of the fault, a cost that a lowered rate never meets, has a test.
//! - A layer that is built without a shared handle, so that each service has a breaker of its own: no layer can be built without one.
//!   That the handle is shared by all that the layer makes has a test.
//! - State that is lost when the settings of a rate limiter are replaced: a limiter's settings cannot be replaced. A breaker's can.

use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);
const YEAR: Duration = Duration::from_secs(31_557_600);

/// The circuit breaker by itself.
mod breaker {
    use super::{HOUR, MINUTE, SECOND};
    use futures_util::FutureExt;
    use portcullis::{
        CircuitBreaker, CircuitBreakerConfig, CircuitBreakerPermit, Clock, ManualClock, Outcome, Reason, State, Window,
    };
    use std::{
        future::pending,
        sync::{Barrier, Mutex},
        thread,
        time::Duration,
    };

    fn config() -> CircuitBreakerConfig {
        CircuitBreakerConfig::default().recovery_timeout(MINUTE)
    }

    fn breaker(config: CircuitBreakerConfig) -> (CircuitBreaker, ManualClock) {
        let clock = Clock::manual();
        let breaker = CircuitBreaker::builder("search").config(config).clock(&clock).build();
        (breaker.unwrap(), clock)
    }

    fn admit(breaker: &CircuitBreaker) -> CircuitBreakerPermit {
        breaker.try_acquire().expect("the circuit admits")
    }

    fn end(breaker: &CircuitBreaker, calls: u32, outcome: Outcome) {
        (0..calls).for_each(|_| admit(breaker).settle(outcome));
    }

    /// Opens by failures and waits until probes are let through.
    fn half_open(config: CircuitBreakerConfig) -> (CircuitBreaker, ManualClock) {
        let (breaker, clock) = breaker(config.failure_threshold(1));
        end(&breaker, 1, Outcome::Failure);
        clock.advance(MINUTE);
        assert_eq!(breaker.state(), State::HalfOpen);
        (breaker, clock)
    }

    fn one_probe() -> CircuitBreakerConfig {
        config().half_open_max_calls(1).success_threshold(1)
    }

    // A window of calls that never slides: the first calls stay in it for good, and later failures weigh nothing.
    #[test]
    fn successes_of_long_ago_do_not_outweigh_the_failures_of_now() {
        let (breaker, _) = breaker(config().failure_rate(0.5).window(Window::calls(10)));
        end(&breaker, 10_000, Outcome::Success);
        end(&breaker, 4, Outcome::Failure);
        assert_eq!(breaker.state(), State::Closed, "four of the last ten");
        end(&breaker, 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Open, "five of the last ten");
    }

    // The minimum of calls is ignored: nothing trips before the whole window is full.
    #[test]
    fn the_minimum_of_calls_is_enough_and_the_window_need_not_be_full() {
        let rate = config().failure_rate(0.5).window(Window::calls(100)).minimum_calls(5);
        let (breaker, _) = breaker(rate);
        end(&breaker, 4, Outcome::Failure);
        assert_eq!(breaker.state(), State::Closed);
        end(&breaker, 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Open);
    }

    // Wedged in half-open: the successes of probes are forgotten with the window of time, so probes that come seldom never add up.
    #[test]
    fn probes_that_lie_farther_apart_than_the_window_of_time_add_up() {
        let rate = config().failure_rate(0.5).window(Window::time(10 * SECOND));
        let (breaker, clock) = half_open(rate.minimum_calls(1).success_threshold(3));
        for _ in 0..3 {
            assert_eq!(breaker.state(), State::HalfOpen);
            clock.advance(HOUR);
            end(&breaker, 1, Outcome::Success);
        }
        assert_eq!(breaker.state(), State::Closed);
    }

    // Wedged in half-open: the only probe never ends, and nobody else is ever let through.
    #[test]
    fn a_probe_that_never_ends_holds_its_place_for_a_lease_and_no_longer() {
        let (breaker, clock) = half_open(one_probe().probe_lease(10 * SECOND));
        let _hanging = admit(&breaker);
        clock.advance(9 * SECOND);
        let refused = breaker.try_acquire().unwrap_err();
        assert_eq!(
            (refused.reason, refused.retry_after),
            (Reason::HalfOpenFull, Some(SECOND))
        );
        clock.advance(SECOND);
        end(&breaker, 1, Outcome::Success);
        assert_eq!(breaker.state(), State::Closed, "and the one after it decides");
    }

    // Wedged in half-open: a probe that is cancelled never gives its place back.
    #[tokio::test]
    async fn a_probe_that_is_cancelled_gives_its_place_back_at_once() {
        let (breaker, _clock) = half_open(one_probe());
        for _ in 0..100 {
            let probe = breaker.call(pending::<Result<(), ()>>());
            assert!(probe.now_or_never().is_none(), "admitted, and given up");
        }
        assert_eq!(
            (breaker.state(), breaker.status().probes_in_flight),
            (State::HalfOpen, 0)
        );
    }

    // Wedged in half-open: an outcome that is neither success nor failure is not counted, and its place is not freed either.
    #[test]
    fn a_probe_whose_outcome_is_ignored_gives_its_place_back() {
        let (breaker, _clock) = half_open(one_probe());
        end(&breaker, 100, Outcome::Ignored);
        end(&breaker, 1, Outcome::Success);
        assert_eq!(breaker.state(), State::Closed);
    }

    // A cancelled probe, of which nobody knows how it would have ended, closes the circuit.
    #[tokio::test]
    async fn a_probe_that_is_cancelled_closes_nothing() {
        let (breaker, _clock) = half_open(one_probe());
        assert!(breaker.call(pending::<Result<(), ()>>()).now_or_never().is_none());
        drop(admit(&breaker));
        assert_eq!(breaker.state(), State::HalfOpen);
    }

    // A success that was begun before the trip closes the circuit, while the only probe still hangs.
    #[test]
    fn a_success_begun_before_the_trip_does_not_close_the_circuit() {
        let (breaker, clock) = breaker(one_probe().failure_threshold(1));
        let (early, earlier) = (admit(&breaker), admit(&breaker));
        end(&breaker, 1, Outcome::Failure);
        early.settle(Outcome::Success);
        assert_eq!(breaker.state(), State::Open);
        clock.advance(MINUTE);
        let probe = admit(&breaker);
        earlier.settle(Outcome::Success);
        assert_eq!(breaker.state(), State::HalfOpen);
        probe.settle(Outcome::Success);
        assert_eq!(breaker.state(), State::Closed);
    }

    // Calls that were begun while the circuit was closed are taken for probes: they use up the places, or free those of others.
    #[test]
    fn a_call_begun_while_the_circuit_was_closed_is_no_probe() {
        let (breaker, clock) = breaker(one_probe().failure_threshold(1));
        let early = [admit(&breaker), admit(&breaker), admit(&breaker)];
        end(&breaker, 1, Outcome::Failure);
        clock.advance(MINUTE);
        assert_eq!(breaker.status().probes_in_flight, 0);
        let _probe = admit(&breaker);
        for (call, outcome) in early
            .into_iter()
            .zip([Outcome::Failure, Outcome::Ignored, Outcome::Success])
        {
            call.settle(outcome);
            assert_eq!(
                (breaker.state(), breaker.status().probes_in_flight),
                (State::HalfOpen, 1)
            );
            assert!(breaker.try_acquire().is_err(), "the place is the probe's");
        }
    }

    // A probe that succeeds slowly closes a circuit that opened because its service was slow.
    #[test]
    fn a_slow_probe_does_not_close_a_circuit_that_opened_on_slowness() {
        let slow = one_probe()
            .slow_calls(0.5, SECOND)
            .window(Window::calls(4))
            .minimum_calls(1);
        let (breaker, clock) = breaker(slow);
        let slowly = || {
            let call = admit(&breaker);
            clock.advance(SECOND);
            call.settle(Outcome::Success);
        };
        slowly();
        assert_eq!(breaker.state(), State::Open);
        clock.advance(MINUTE);
        slowly();
        assert_eq!(breaker.state(), State::Open, "as slow as before");
        clock.advance(MINUTE);
        end(&breaker, 1, Outcome::Success);
        assert_eq!(breaker.state(), State::Closed);
    }

    // A half-open circuit without bounds: all that come are probes.
    #[test]
    fn a_half_open_circuit_admits_its_probes_and_no_more() {
        let (breaker, _clock) = half_open(config().half_open_max_calls(3));
        let probes: Vec<_> = (0..1_000).filter_map(|_| breaker.try_acquire().ok()).collect();
        assert_eq!(probes.len(), 3);
    }

    // "One probe" that is one for each thread that looks at the same time.
    #[test]
    fn one_probe_is_one_probe_however_many_threads_ask() {
        const THREADS: usize = 8;
        for _ in 0..50 {
            let (breaker, _clock) = half_open(one_probe());
            let (barrier, probes) = (Barrier::new(THREADS), Mutex::new(Vec::new()));
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        barrier.wait();
                        let admitted = (0..40).filter_map(|_| breaker.try_acquire().ok());
                        let admitted: Vec<_> = admitted.collect();
                        probes.lock().unwrap().extend(admitted);
                    });
                }
            });
            assert_eq!(probes.lock().unwrap().len(), 1);
        }
    }

    // Other settings, the same breaker: window and state are thrown away, and an outage begins to count from zero.
    #[test]
    fn other_settings_keep_the_window_and_the_state() {
        let rate = config().failure_rate(0.5).window(Window::calls(10)).minimum_calls(10);
        let (breaker, clock) = breaker(rate.clone());
        end(&breaker, 5, Outcome::Success);
        end(&breaker, 4, Outcome::Failure);
        breaker.reconfigure(rate.clone().half_open_max_calls(7)).unwrap();
        end(&breaker, 1, Outcome::Failure);
        assert_eq!(breaker.state(), State::Open, "the tenth call, and the fifth failure");
        clock.advance(20 * SECOND);
        breaker.reconfigure(rate.half_open_max_calls(5)).unwrap();
        let refused = breaker.try_acquire().unwrap_err();
        assert_eq!((refused.reason, refused.retry_after), (Reason::Open, Some(40 * SECOND)));
    }

    // Numbers at the end of their type are accepted, and panic later or wrap.
    #[test]
    fn the_largest_settings_are_refused_or_work() {
        let huge = [
            config().failure_threshold(u32::MAX),
            config().failures_within(u32::MAX, SECOND),
            config().failure_rate(0.5).window(Window::calls(u32::MAX)),
            config()
                .failure_rate(0.5)
                .minimum_calls(u32::MAX)
                .window(Window::time(Duration::MAX)),
            config()
                .failure_rate(0.5)
                .minimum_calls(u32::MAX)
                .window(Window::time(HOUR)),
            config().half_open_max_calls(u32::MAX).success_threshold(u32::MAX),
            config().recovery_timeout(Duration::MAX),
            config().probe_lease(Duration::MAX),
        ];
        let mut accepted = 0;
        for config in huge {
            let clock = Clock::manual();
            let built = CircuitBreaker::builder("search").config(config).clock(&clock).build();
            let Ok(breaker) = built else {
                continue;
            };
            accepted += 1;
            // One less than opens a circuit that says nothing of failures.
            end(&breaker, 4, Outcome::Failure);
            clock.advance(Duration::MAX);
            end(&breaker, 4, Outcome::Success);
            let status = breaker.status();
            assert_eq!((status.state, status.metrics.total_requests), (State::Closed, 8));
        }
        assert_eq!(
            accepted, 3,
            "what has no bound by its nature: two thresholds and a number of probes"
        );
    }

    // Threads read the clock, are held up, and come late: a check that time never goes back panics.
    #[test]
    fn a_thread_whose_clock_lies_behind_is_served_like_any_other() {
        let window = config()
            .failure_rate(0.5)
            .window(Window::time(10 * SECOND))
            .minimum_calls(2);
        let (breaker, clock) = breaker(window.slow_calls(0.5, SECOND).failures_within(2, SECOND));
        clock.advance(HOUR);
        let early = admit(&breaker);
        end(&breaker, 1, Outcome::Success);
        clock.rewind(20 * SECOND);
        early.settle(Outcome::Success);
        end(&breaker, 2, Outcome::Failure);
        assert_eq!(breaker.state(), State::Open);
        clock.rewind(20 * SECOND);
        assert!(breaker.try_acquire().is_err());
        clock.advance(40 * SECOND + MINUTE);
        end(&breaker, 2, Outcome::Success);
        assert_eq!(breaker.state(), State::Closed);
    }
}

/// The rate limiters by themselves.
mod limiters {
    use super::{DAY, HOUR, MINUTE, SECOND, YEAR};
    use portcullis::{
        Adaptive, Algorithm, Clock, ManualClock, Outcome, RateLimiter, Reason, SlidingWindow, TokenBucket,
    };
    use std::{
        sync::{
            Barrier,
            atomic::{AtomicUsize, Ordering},
        },
        thread,
        time::Duration,
    };
    use tokio::{task::JoinSet, time::timeout};
    use tokio_test::{assert_pending, assert_ready, task::spawn};

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn limiter(algorithm: impl Into<Algorithm>) -> (RateLimiter, ManualClock) {
        let clock = Clock::manual();
        let limiter = RateLimiter::builder("search", algorithm).clock(&clock).build();
        (limiter.unwrap(), clock)
    }

    /// How many of so many are admitted now.
    fn admitted(limiter: &RateLimiter, of: usize) -> usize {
        (0..of).filter(|_| limiter.try_acquire().is_ok()).count()
    }

    /// So many in a minute, of each kind.
    fn a_minute(requests: u32) -> [Algorithm; 3] {
        [
            TokenBucket::new(requests, MINUTE).into(),
            SlidingWindow::new(requests, MINUTE).into(),
            Adaptive::new(requests).window(MINUTE).into(),
        ]
    }

    // "n per second" that means one token every n seconds.
    #[test]
    fn n_in_a_second_are_n_in_each_second() {
        for algorithm in [
            TokenBucket::new(5, SECOND).into(),
            SlidingWindow::new(5, SECOND).into(),
            Algorithm::from(Adaptive::new(5).max_rate(5).window(SECOND)),
        ] {
            let (limiter, clock) = limiter(algorithm);
            for second in 0..10 {
                assert_eq!(admitted(&limiter, 100), 5, "{algorithm:?} in second {second}");
                clock.advance(SECOND);
            }
        }
    }

    // Arithmetic that wraps in a release build: a slow rate with a large burst admits a seventh of it.
    #[test]
    fn a_large_burst_at_a_slow_rate_is_admitted_whole_and_not_once_more() {
        let (limiter, clock) = limiter(TokenBucket::new(1, DAY).burst(1_000_000));
        assert_eq!(admitted(&limiter, 1_000_100), 1_000_000);
        assert_eq!(limiter.try_acquire().unwrap_err().retry_after, Some(DAY));
        clock.advance(10 * DAY);
        assert_eq!(admitted(&limiter, 100), 10);
    }

    // Numbers at the end of their type pass the constructor, and panic at the first request.
    #[test]
    fn the_largest_numbers_are_refused_or_work() {
        let forever = 100 * YEAR;
        let huge: [Algorithm; 8] = [
            TokenBucket::new(u32::MAX, Duration::from_nanos(1)).into(),
            TokenBucket::new(u32::MAX, forever).into(),
            TokenBucket::new(1, forever).burst(u32::MAX).into(),
            TokenBucket::new(u32::MAX, Duration::MAX).into(),
            SlidingWindow::new(u32::MAX, SECOND).into(),
            SlidingWindow::new(1, Duration::MAX).into(),
            Adaptive::new(u32::MAX).max_rate(u32::MAX).window(SECOND).into(),
            Adaptive::new(u32::MAX).window(Duration::MAX).into(),
        ];
        let mut accepted = 0;
        for algorithm in huge {
            let clock = Clock::manual();
            let Ok(limiter) = RateLimiter::builder("search", algorithm).clock(&clock).build() else {
                continue;
            };
            accepted += 1;
            let burst = limiter.status().burst;
            limiter.try_acquire_n(burst).expect("full at first");
            assert!(limiter.try_acquire_n(burst).is_err(), "{algorithm:?}: nothing is left");
            clock.advance(forever);
            limiter.try_acquire().expect("a hundred years bring one at least");
            clock.advance(Duration::MAX);
            limiter.try_acquire().expect("and the end of time another");
        }
        assert_eq!(
            accepted, 4,
            "all but the window of four billion requests, and those whose period is longer than 100 years"
        );
    }

    // A burst of one switches the limit off.
    #[test]
    fn a_burst_of_one_is_a_limit() {
        let (limiter, clock) = limiter(TokenBucket::new(10, SECOND).burst(1));
        assert_eq!(admitted(&limiter, 1_000), 1);
        clock.advance(SECOND / 10);
        assert_eq!(admitted(&limiter, 1_000), 1);
    }

    // After a pause the bucket holds more than its burst.
    #[test]
    fn a_pause_brings_the_burst_and_no_more() {
        for algorithm in a_minute(10) {
            let (limiter, clock) = limiter(algorithm);
            for pause in [MINUTE, HOUR, YEAR, MINUTE + MINUTE * 7 / 10] {
                assert_eq!(admitted(&limiter, 3), 3);
                clock.advance(pause);
                assert_eq!(admitted(&limiter, 100), 10, "{algorithm:?} after {pause:?}");
                clock.advance(HOUR);
            }
        }
    }

    // A window that begins anew at fixed times: twice the limit within a millisecond around its boundary.
    #[test]
    fn no_boundary_of_a_window_lets_twice_the_limit_through() {
        for algorithm in a_minute(100) {
            for late in [1, 30_000, 59_999] {
                let (limiter, clock) = limiter(algorithm);
                clock.advance(late * MILLISECOND);
                let at_once = admitted(&limiter, 1_000);
                assert_eq!(at_once, 100);
                clock.advance(MILLISECOND);
                assert_eq!(admitted(&limiter, 1_000), 0, "{algorithm:?}, one millisecond later");
            }
        }
    }

    // The status is only brought up to date by requests: after an hour without any it still says that nothing is there.
    #[test]
    fn the_status_after_an_idle_hour_says_what_is_there() {
        for algorithm in a_minute(10) {
            let (limiter, clock) = limiter(algorithm);
            admitted(&limiter, 100);
            let spent = limiter.status();
            assert!(spent.available_tokens < 1.0 && spent.retry_after.is_some(), "{spent:?}");
            clock.advance(HOUR);
            let status = limiter.status();
            let there = (status.available_tokens.to_string(), status.retry_after);
            assert_eq!(there, ("10".to_owned(), None), "{algorithm:?}");
        }
    }

    // A wait that cannot succeed sleeps through its whole time before it is told so.
    #[test]
    fn a_wait_that_cannot_end_in_time_is_refused_at_once() {
        for algorithm in a_minute(1) {
            let (limiter, _clock) = limiter(algorithm);
            limiter.try_acquire().unwrap();
            let mut doomed = spawn(limiter.acquire_within(1, 59 * SECOND));
            let refused = assert_ready!(doomed.poll()).expect_err("a minute is needed");
            assert_eq!((refused.reason, refused.retry_after), (Reason::OverLimit, Some(MINUTE)));
            let mut too_much = spawn(limiter.acquire_n(2));
            let refused = assert_ready!(too_much.poll()).expect_err("two are never there");
            assert_eq!(refused.retry_after, None);
        }
    }

    // Two threads see the same last token: one more than the limit is admitted.
    #[test]
    fn threads_that_ask_at_once_get_no_more_than_the_limit() {
        const THREADS: usize = 8;
        for requests in [10, 100] {
            for algorithm in a_minute(requests) {
                for _ in 0..20 {
                    let (limiter, _clock) = limiter(algorithm);
                    let (barrier, sum) = (Barrier::new(THREADS), AtomicUsize::new(0));
                    thread::scope(|scope| {
                        for _ in 0..THREADS {
                            scope.spawn(|| {
                                barrier.wait();
                                sum.fetch_add(admitted(&limiter, 50), Ordering::Relaxed);
                            });
                        }
                    });
                    assert_eq!(sum.into_inner(), requests as usize, "{algorithm:?}");
                }
            }
        }
    }

    // A clock that lies behind another thread's: a check that time never goes back panics, or time is counted twice.
    #[test]
    fn a_clock_that_goes_back_and_forth_brings_nothing_twice() {
        for algorithm in a_minute(10) {
            let (limiter, clock) = limiter(algorithm);
            clock.advance(HOUR);
            assert_eq!(admitted(&limiter, 100), 10);
            for _ in 0..20 {
                clock.rewind(30 * SECOND);
                assert_eq!(admitted(&limiter, 100), 0, "{algorithm:?} behind");
                assert!(limiter.status().available_tokens < 1.0);
                clock.advance(30 * SECOND);
                assert_eq!(admitted(&limiter, 100), 0, "{algorithm:?} again at the same time");
            }
        }
    }

    // A waiter that gives up takes the wake-up with it that was meant for the next.
    #[test]
    fn a_waiter_that_gives_up_when_its_turn_has_come_hands_it_on() {
        for algorithm in a_minute(1) {
            let (limiter, clock) = limiter(algorithm);
            limiter.try_acquire().unwrap();
            let (mut first, mut second) = (spawn(limiter.acquire()), spawn(limiter.acquire()));
            assert_pending!(first.poll());
            assert_pending!(second.poll());
            clock.advance(MINUTE);
            assert!(first.is_woken(), "its turn");
            // Somebody else looks, which serves the first.
            assert!(limiter.try_acquire().is_err());
            drop(first);
            assert!(second.is_woken(), "{algorithm:?}: there is room, and nobody before it");
            assert!(assert_ready!(second.poll()).is_ok());
        }
    }

    // The same with many: some wait for ever although there is room.
    #[tokio::test(start_paused = true)]
    async fn all_who_stay_in_line_are_served_whoever_gives_up() {
        for algorithm in a_minute(60) {
            let limiter = RateLimiter::new("search", algorithm).unwrap();
            limiter.try_acquire_n(60).unwrap();
            let mut line = JoinSet::new();
            for number in 0..300_u64 {
                let limiter = limiter.clone();
                line.spawn(async move {
                    // Each third gives up halfway.
                    let patience = if number % 3 == 0 {
                        500 * number
                    } else {
                        u64::from(u32::MAX)
                    };
                    timeout(Duration::from_millis(patience), limiter.acquire())
                        .await
                        .is_ok()
                });
            }
            let served = timeout(HOUR, line.join_all()).await.expect("nobody waits for ever");
            assert!(served.iter().filter(|served| **served).count() >= 200, "{algorithm:?}");
            assert_eq!(limiter.status().waiting, 0);
        }
    }

    // Dropped calls teach an adaptive limit nothing, so a service that hangs until its callers give up looks well.
    #[test]
    fn dropped_calls_lower_an_adaptive_rate_where_they_count_as_failures() {
        let (limiter, clock) = limiter(Adaptive::new(100).cancelled(Outcome::Failure));
        (0..20).for_each(|_| drop(limiter.try_acquire().unwrap()));
        clock.advance(MINUTE);
        assert!(limiter.status().rate < 100.0);
    }

    // After many denials an adaptive limit has less than nothing, or a rate below what one request costs: whoever waits, waits for
    // ever.
    #[test]
    fn the_largest_cost_comes_through_an_adaptive_limit_at_its_lowest_rate() {
        let (limiter, clock) = limiter(Adaptive::new(100).min_rate(1).minimum_calls(1));
        for _ in 0..100 {
            if let Ok(permit) = limiter.try_acquire() {
                permit.settle(Outcome::Failure);
            }
            assert!((0..1_000).filter(|_| limiter.try_acquire_n(100).is_err()).count() >= 999);
            assert!(limiter.status().available_tokens >= 0.0);
            clock.advance(MINUTE);
        }
        while limiter.try_acquire().is_ok() {}
        assert!(
            limiter.status().rate < 1.01,
            "as low as it gets: {}",
            limiter.status().rate
        );
        let mut waiting = spawn(limiter.acquire_n(100));
        assert_pending!(waiting.poll());
        let wait = limiter
            .try_acquire_n(100)
            .unwrap_err()
            .retry_after
            .expect("a time is known");
        clock.advance(wait);
        assert!(waiting.is_woken());
        assert!(assert_ready!(waiting.poll()).is_ok());
    }
}

/// The layers, as services stand on them.
mod layers {
    use super::{HOUR, MINUTE, SECOND};
    use futures_util::FutureExt;
    use portcullis::{
        CircuitBreaker, CircuitBreakerLayer, Clock, Outcome, RateLimitLayer, RateLimiter, State, TokenBucket,
    };
    use std::{
        future::{Pending, Ready, pending, poll_fn, ready},
        io,
        panic::{AssertUnwindSafe, catch_unwind},
        task::{Context, Poll, Waker},
        time::Duration,
    };
    use tokio::time::sleep;
    use tower::{Layer, Service, ServiceExt, service_fn};

    fn breaker(failures: u32) -> CircuitBreaker {
        let breaker = CircuitBreaker::builder("search").failure_threshold(failures);
        breaker.recovery_timeout(HOUR).build().unwrap()
    }

    fn limiter(requests: u32) -> RateLimiter {
        let limiter = RateLimiter::builder("search", TokenBucket::new(requests, MINUTE));
        limiter.clock(Clock::manual()).build().unwrap()
    }

    fn answer(question: u32) -> Ready<io::Result<u32>> {
        ready(Ok(question + 1))
    }

    fn hang(_: u32) -> Pending<io::Result<u32>> {
        pending()
    }

    /// Is never ready.
    struct Unready;

    impl Service<u32> for Unready {
        type Response = u32;
        type Error = io::Error;
        type Future = Ready<io::Result<u32>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::Error::other("no connection")))
        }

        fn call(&mut self, request: u32) -> Self::Future {
            answer(request)
        }
    }

    fn is_ready<S: Service<u32>>(service: &mut S) -> bool {
        let polled = service.poll_ready(&mut Context::from_waker(Waker::noop()));
        matches!(polled, Poll::Ready(Ok(())))
    }

    // Calls whose callers give up leave no trace.
    #[test]
    fn dropped_calls_are_counted_and_trip_where_they_count_as_failures() {
        for (outcome, state) in [(Outcome::Ignored, State::Closed), (Outcome::Failure, State::Open)] {
            let breaker = CircuitBreaker::builder("search")
                .failure_threshold(50)
                .cancelled(outcome);
            let breaker = breaker.build().unwrap();
            let service = CircuitBreakerLayer::new(breaker.clone()).layer(service_fn(hang));
            for _ in 0..50 {
                assert!(service.clone().oneshot(1).now_or_never().is_none());
            }
            let metrics = breaker.status().metrics;
            assert_eq!(metrics.cancelled_requests + metrics.failed_requests, 50);
            assert_eq!(breaker.state(), state);
        }
    }

    // Calls that panic leave no trace.
    #[test]
    fn panics_are_failures() {
        let breaker = breaker(50);
        let panics = service_fn(|_: u32| -> Ready<io::Result<u32>> { std::panic::resume_unwind(Box::new("broken")) });
        let service = CircuitBreakerLayer::new(breaker.clone()).layer(panics);
        for failures in 0..50 {
            assert_eq!(
                (breaker.state(), breaker.status().failure_count),
                (State::Closed, failures)
            );
            let call = || service.clone().oneshot(1).now_or_never();
            assert!(catch_unwind(AssertUnwindSafe(call)).is_err(), "the panic passes on");
        }
        assert_eq!(breaker.state(), State::Open);
    }

    // A service that fails before it is called, in `poll_ready`, leaves no trace.
    #[test]
    fn errors_of_poll_ready_are_failures() {
        let breaker = breaker(50);
        let mut service = CircuitBreakerLayer::new(breaker.clone()).layer(Unready);
        for failures in 0..50 {
            assert_eq!(
                (breaker.state(), breaker.status().failure_count),
                (State::Closed, failures)
            );
            assert!(!is_ready(&mut service));
        }
        assert_eq!(breaker.state(), State::Open);
    }

    // Each service that the layer makes has a breaker of its own, and none of them sees enough to trip.
    #[test]
    fn all_services_of_a_layer_have_one_breaker() {
        let breaker = breaker(5);
        let layer = CircuitBreakerLayer::new(breaker.clone());
        for _ in 0..5 {
            let fails = service_fn(async |_: u32| Err::<u32, _>(io::Error::other("down")));
            let failed = layer.clone().layer(fails).oneshot(1).now_or_never();
            assert!(failed.expect("at once").is_err());
        }
        assert_eq!(breaker.state(), State::Open);
    }

    // A limit that each clone of the service has for itself is none where a server clones the service for each request.
    #[test]
    fn all_clones_of_a_service_have_one_limit() {
        let service = RateLimitLayer::new(limiter(5)).layer(service_fn(answer));
        let ask = |_: &u32| matches!(service.clone().oneshot(1).now_or_never(), Some(Ok(2)));
        assert_eq!((0..1_500).filter(ask).count(), 5);
    }

    // State in what the layer makes: a server that applies the layer for each connection has a limit for each.
    #[test]
    fn all_connections_have_one_limit() {
        let layer = RateLimitLayer::new(limiter(100));
        let mut admitted = 0;
        for _ in 0..32 {
            let connection = layer.layer(service_fn(answer));
            let ask = |_: &u32| matches!(connection.clone().oneshot(1).now_or_never(), Some(Ok(2)));
            admitted += (0..100).filter(ask).count();
        }
        assert_eq!(admitted, 100);
    }

    // A service that was ready and is dropped without a call keeps what it took to be ready: a caller that picks among services
    // uses up the limit of those that it does not pick.
    #[test]
    fn readiness_that_is_not_used_takes_nothing_of_a_limit() {
        let limiter = limiter(5);
        for _ in 0..100 {
            assert!(is_ready(
                &mut RateLimitLayer::new(limiter.clone()).layer(service_fn(answer))
            ));
            assert!(is_ready(
                &mut RateLimitLayer::new(limiter.clone())
                    .wait(SECOND)
                    .layer(service_fn(answer))
            ));
        }
        assert_eq!((0..100).filter(|_| limiter.try_acquire().is_ok()).count(), 5);
    }

    // The same of a probe's place: the circuit never closes again.
    #[test]
    fn readiness_that_is_not_used_gives_a_probes_place_back() {
        let clock = Clock::manual();
        let breaker = CircuitBreaker::builder("search")
            .failure_threshold(1)
            .half_open_max_calls(1);
        let breaker = breaker.success_threshold(1).clock(&clock).build().unwrap();
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        clock.advance(HOUR);
        for _ in 0..100 {
            let mut service = CircuitBreakerLayer::new(breaker.clone()).layer(service_fn(answer));
            assert!(is_ready(&mut service));
            assert_eq!(breaker.status().probes_in_flight, 1);
        }
        breaker.try_acquire().unwrap().settle(Outcome::Success);
        assert_eq!(breaker.state(), State::Closed);
    }

    // Who waits for an open circuit sleeps on after an operator has closed it, until the open time is over.
    #[tokio::test(start_paused = true)]
    async fn who_waits_for_an_open_circuit_is_woken_when_it_is_forced_closed() {
        let breaker = breaker(1);
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        let mut service = CircuitBreakerLayer::new(breaker.clone())
            .not_ready()
            .layer(service_fn(answer));
        let begun = breaker.clock().now();
        // A task of its own, which nothing else wakes.
        let call = tokio::spawn(async move { service.ready().await.unwrap().call(1).await });
        sleep(5 * SECOND).await;
        assert!(!call.is_finished());
        breaker.force_closed();
        assert_eq!(call.await.unwrap().unwrap(), 2);
        let waited = breaker.clock().now().duration_since(begun);
        assert!(
            waited < 6 * SECOND,
            "the open time is an hour, and the call waited {waited:?}"
        );
    }

    // Who waits for an open circuit looks every millisecond, or all the time.
    #[tokio::test(start_paused = true)]
    async fn who_waits_for_an_open_circuit_looks_again_when_there_is_something_to_see() {
        let breaker = breaker(1);
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        let mut service = CircuitBreakerLayer::new(breaker.clone())
            .not_ready()
            .layer(service_fn(answer));
        let (begun, mut looks) = (breaker.clock().now(), 0);
        poll_fn(|cx| {
            looks += 1;
            service.poll_ready(cx)
        })
        .await
        .unwrap();
        let waited = breaker.clock().now().duration_since(begun);
        // tokio rounds up to its millisecond.
        assert!((HOUR..HOUR + Duration::from_millis(2)).contains(&waited), "{waited:?}");
        assert!(looks <= 3, "looked {looks} times in an hour");
    }
}

/// A limit for each caller.
#[cfg(feature = "http")]
mod keys {
    use super::MINUTE;
    use futures_util::FutureExt;
    use http::{Request, Response, StatusCode};
    use portcullis::{
        Adaptive, Algorithm, ClientIp, Clock, KeyedCircuitBreaker, KeyedRateLimiter, KeysStatus, ManualClock, Outcome,
        RateLimitLayer, SlidingWindow, TokenBucket,
        key::{self, Key},
        policy::{Keyed, Missing},
    };
    use std::{
        convert::Infallible,
        net::{IpAddr, Ipv6Addr, SocketAddr},
    };
    use tower::{Layer, ServiceExt, service_fn};

    fn callers(algorithm: impl Into<Algorithm>, max_keys: usize) -> (KeyedRateLimiter, ManualClock) {
        let clock = Clock::manual();
        let callers = KeyedRateLimiter::builder("api", algorithm)
            .max_keys(max_keys)
            .clock(&clock);
        (callers.build().unwrap(), clock)
    }

    fn tracked(callers: &KeyedRateLimiter) -> KeysStatus {
        callers.status().keys.expect("keyed")
    }

    /// What these requests are answered, one after the other.
    fn answers<K>(policy: Keyed<KeyedRateLimiter, K>, requests: impl Iterator<Item = Request<()>>) -> Vec<StatusCode>
    where
        K: Key<Request<()>> + Clone,
    {
        let found = service_fn(async |_: Request<()>| Ok::<_, Infallible>(Response::new(String::new())));
        let service = RateLimitLayer::http(policy).layer(found);
        let ask = |request| {
            service
                .clone()
                .oneshot(request)
                .now_or_never()
                .expect("at once")
                .unwrap()
                .status()
        };
        requests.map(ask).collect()
    }

    fn admitted(answers: &[StatusCode]) -> usize {
        answers.iter().filter(|status| status.is_success()).count()
    }

    fn from(peer: impl Into<IpAddr>) -> Request<()> {
        let mut request = Request::new(());
        request.extensions_mut().insert(SocketAddr::new(peer.into(), 4711));
        request
    }

    // Whoever invents an address in `X-Forwarded-For` has a quota for each.
    #[test]
    fn invented_forwarded_addresses_share_the_quota_of_the_peer_that_sends_them() {
        let (callers, _clock) = callers(TokenBucket::new(10, MINUTE), 1_000);
        let invented = (0..20_000).map(|number: u32| {
            let mut request = from([203, 0, 113, 7]);
            let address = IpAddr::from(number.to_be_bytes()).to_string();
            request
                .headers_mut()
                .insert("x-forwarded-for", address.parse().unwrap());
            request
        });
        assert_eq!(admitted(&answers(callers.by(ClientIp::new()), invented)), 10);
        assert_eq!(tracked(&callers).tracked, 1);
    }

    // Memory without bound: each invented key is kept, and each has a quota of its own.
    #[test]
    fn invented_keys_fill_the_set_and_then_share_one_quota() {
        for algorithm in [
            TokenBucket::new(10, MINUTE).into(),
            SlidingWindow::new(10, MINUTE).into(),
            Algorithm::from(Adaptive::new(10)),
        ] {
            let (callers, _clock) = callers(algorithm, 100);
            let admitted = (0..200_000_u32).filter(|key| callers.try_acquire(key).is_ok()).count();
            assert_eq!(
                admitted, 110,
                "{algorithm:?}: one for each of a hundred, and ten for all others"
            );
            assert_eq!(tracked(&callers).tracked, 100);
        }
    }

    // Whoever has an IPv6 network, which is everybody who has IPv6, has 2^64 addresses and a quota for each.
    #[test]
    fn the_addresses_of_one_ipv6_network_share_one_quota() {
        let (callers, _clock) = callers(TokenBucket::new(10, MINUTE), 1_000);
        let network = |host: u16| from(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, host, 0, 7, host));
        let neighbour = from(Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 7, 7));
        let requests = (0..1_000).map(network).chain([neighbour]);
        let answers = answers(callers.by(ClientIp::new()), requests);
        assert_eq!(admitted(&answers[..1_000]), 10);
        assert_eq!(answers[1_000], StatusCode::OK, "the next network is somebody else's");
        assert_eq!(tracked(&callers).tracked, 2);
    }

    // A request without a key is answered 500, as if the server had failed.
    #[test]
    fn a_request_without_a_key_is_admitted_or_refused_and_no_failure_of_the_server() {
        for (missing, expected) in [
            (Missing::Shared, [StatusCode::OK, StatusCode::TOO_MANY_REQUESTS]),
            (Missing::Exempt, [StatusCode::OK; 2]),
            (Missing::Reject, [StatusCode::BAD_REQUEST; 2]),
        ] {
            let (callers, _clock) = callers(TokenBucket::new(1, MINUTE), 10);
            let policy = callers.by(key::header("x-api-key").unwrap()).missing(missing);
            let answers = answers(policy, (0..2).map(|_| Request::new(())));
            assert_eq!(answers, expected, "{missing:?}");
        }
    }

    // A key that made room for others comes back with a full quota: invented keys buy back what was spent.
    #[test]
    fn no_key_gets_back_what_it_spent_because_others_came() {
        for algorithm in [
            TokenBucket::new(10, MINUTE).into(),
            SlidingWindow::new(10, MINUTE).into(),
            Algorithm::from(Adaptive::new(10)),
        ] {
            let (callers, _clock) = callers(algorithm, 100);
            assert_eq!((0..100).filter(|_| callers.try_acquire("mallory").is_ok()).count(), 10);
            for key in 0..10_000_u32 {
                let _ = callers.try_acquire(&key);
            }
            assert!(callers.try_acquire("mallory").is_err(), "{algorithm:?}");
        }
    }

    // The same of breakers: a circuit that is open, or about to open, is forgotten, and the upstream that is down gets its calls again.
    #[test]
    fn no_key_gets_a_closed_circuit_because_others_came() {
        let clock = Clock::manual();
        let upstreams = KeyedCircuitBreaker::builder("upstream")
            .max_keys(100)
            .clock(&clock)
            .build()
            .unwrap();
        let fail = |key: &str| upstreams.try_acquire(key).unwrap().settle(Outcome::Failure);
        (0..5).for_each(|_| fail("down"));
        (0..4).for_each(|_| fail("failing"));
        for key in 0..10_000_u32 {
            upstreams.try_acquire(&key).unwrap().settle(Outcome::Success);
        }
        assert!(upstreams.try_acquire("down").is_err());
        fail("failing");
        assert!(upstreams.try_acquire("failing").is_err(), "its fifth failure");
        assert_eq!(upstreams.status().tracked, 100);
    }

    // The largest number of keys passes the constructor, and is allocated, or panics, at the first request.
    #[test]
    fn the_largest_number_of_keys_is_refused() {
        let limits = KeyedRateLimiter::builder("api", TokenBucket::new(1, MINUTE)).max_keys(usize::MAX);
        assert_eq!(limits.build().unwrap_err().field(), "max_keys");
        let breakers = KeyedCircuitBreaker::builder("api").max_keys(usize::MAX);
        assert_eq!(breakers.build().unwrap_err().field(), "max_keys");
    }
}

/// What is answered over HTTP and gRPC, and what an answer says.
#[cfg(feature = "http")]
mod answers {
    use super::{DAY, MINUTE, SECOND};
    use futures_util::FutureExt;
    use http::{Request, Response, StatusCode};
    use portcullis::{
        Adaptive, Algorithm, CircuitBreaker, CircuitBreakerLayer, Clock, RateLimitLayer, RateLimiter, SlidingWindow,
        State, TokenBucket,
    };
    use std::{convert::Infallible, time::Duration};
    use tower::{Layer, ServiceExt, service_fn};

    // `Retry-After: 0`: the refused come back at once, and are refused again.
    #[test]
    fn a_refusal_never_says_to_come_back_now_or_earlier_than_would_do() {
        for (algorithm, whole_seconds) in [
            (Algorithm::from(TokenBucket::new(1_000, SECOND).burst(1)), "1"),
            (SlidingWindow::new(1, SECOND / 1_000).into(), "1"),
            (Adaptive::new(10).burst(1).window(SECOND).into(), "1"),
            (TokenBucket::new(1, SECOND + Duration::from_nanos(1)).into(), "2"),
            (TokenBucket::new(1, DAY).into(), "86400"),
        ] {
            let clock = Clock::manual();
            let limiter = RateLimiter::builder("api", algorithm).clock(&clock).build().unwrap();
            let hello = service_fn(async |_: Request<()>| Ok::<_, Infallible>(Response::new(String::new())));
            let service = RateLimitLayer::http(limiter.clone()).layer(hello);
            let ask = || {
                service
                    .clone()
                    .oneshot(Request::new(()))
                    .now_or_never()
                    .expect("at once")
                    .unwrap()
            };
            assert_eq!(ask().status(), StatusCode::OK);
            let refused = ask();
            assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(refused.headers()["retry-after"], whole_seconds, "{algorithm:?}");
            let exact = limiter.try_acquire().unwrap_err().retry_after.unwrap();
            assert!(exact > Duration::ZERO);
            clock.advance(whole_seconds.parse().map(Duration::from_secs).unwrap());
            assert_eq!(ask().status(), StatusCode::OK, "who did as told is admitted");
        }
    }

    // An answer is an answer: a 500 inside `Ok` counts as success, and an adaptive limit rises while the service is down.
    #[test]
    fn an_answer_that_says_that_the_server_failed_is_a_failure() {
        let clock = Clock::manual();
        let limiter = RateLimiter::builder("api", Adaptive::new(100))
            .clock(&clock)
            .build()
            .unwrap();
        let breaker = CircuitBreaker::builder("api")
            .failure_threshold(60)
            .clock(&clock)
            .build()
            .unwrap();
        let down = service_fn(async |_: Request<()>| {
            let answer = Response::builder().status(StatusCode::INTERNAL_SERVER_ERROR);
            Ok::<_, Infallible>(answer.body(String::new()).unwrap())
        });
        let inner = CircuitBreakerLayer::http(breaker.clone()).layer(down);
        let service = RateLimitLayer::http(limiter.clone()).layer(inner);
        for _ in 0..60 {
            assert_eq!(breaker.state(), State::Closed);
            let answer = service.clone().oneshot(Request::new(())).now_or_never();
            assert_eq!(
                answer.expect("at once").unwrap().status(),
                StatusCode::INTERNAL_SERVER_ERROR
            );
        }
        assert_eq!(breaker.state(), State::Open);
        clock.advance(MINUTE);
        assert!(limiter.status().rate < 100.0, "{}", limiter.status().rate);
    }

    fn grpc_call() -> Request<()> {
        Request::post("/shop.Orders/Place")
            .header("content-type", "application/grpc")
            .body(())
            .unwrap()
    }

    // The same as `Retry-After: 0`, for the clients of gRPC that retry by themselves.
    #[test]
    fn a_grpc_refusal_never_says_to_come_back_now_or_earlier_than_would_do() {
        for (limit, millis) in [(400_000, "1"), (400, "3"), (1, "1000")] {
            let clock = Clock::manual();
            let limiter = RateLimiter::builder("api", TokenBucket::new(limit, SECOND).burst(1)).clock(&clock);
            let done = service_fn(async |_: Request<()>| Ok::<_, Infallible>(Response::new(String::new())));
            let service = RateLimitLayer::grpc(limiter.build().unwrap()).layer(done);
            let ask = || {
                service
                    .clone()
                    .oneshot(grpc_call())
                    .now_or_never()
                    .expect("at once")
                    .unwrap()
            };
            assert!(!ask().headers().contains_key("grpc-status"));
            let refused = ask();
            assert_eq!(refused.headers()["grpc-status"], "8");
            assert_eq!(refused.headers()["grpc-retry-pushback-ms"], millis);
            clock.advance(millis.parse().map(Duration::from_millis).unwrap());
            assert!(
                !ask().headers().contains_key("grpc-status"),
                "who did as told is admitted"
            );
        }
    }

    // The same as a 500 inside `Ok`: in gRPC a failure is a 200 that says so in its head or its trailers.
    #[test]
    fn a_grpc_status_that_says_that_the_server_failed_is_a_failure() {
        let breaker = CircuitBreaker::builder("api").failure_threshold(5).build().unwrap();
        let down = service_fn(async |_: Request<()>| {
            let answer = Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "14");
            Ok::<_, Infallible>(answer.body(String::new()).unwrap())
        });
        let service = CircuitBreakerLayer::grpc(breaker.clone()).layer(down);
        for _ in 0..5 {
            assert_eq!(breaker.state(), State::Closed);
            let answer = service.clone().oneshot(grpc_call()).now_or_never();
            assert_eq!(answer.expect("at once").unwrap().status(), StatusCode::OK);
        }
        assert_eq!(breaker.state(), State::Open);
    }
}

/// What an operator sees and can do.
mod operator {
    use super::MINUTE;
    use portcullis::{CircuitBreakerConfig, Clock, MetricsFormat, Outcome, Registry, State, Window};

    /// The values of one family, with what names each.
    fn family(registry: &Registry, name: &str) -> Vec<(String, String)> {
        let text = registry.metrics_text(MetricsFormat::Prometheus);
        let lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        lines
            .map(|line| line.rsplit_once(' ').expect("a name and a value"))
            .map(|(labels, value)| (labels.to_owned(), value.to_owned()))
            .collect()
    }

    // One gauge for each state, set in passing and never unset: the circuit is open and closed at once.
    #[test]
    fn a_circuit_is_in_one_state_at_a_time() {
        let clock = Clock::manual();
        let registry = Registry::with_clock(&clock);
        let config = CircuitBreakerConfig::default()
            .failure_threshold(1)
            .success_threshold(1);
        let breaker = registry
            .circuit_breaker("search", config.recovery_timeout(MINUTE))
            .unwrap();
        let is_in = |state: &str| {
            let gauges = family(&registry, "circuit_breaker_in_state");
            let set: Vec<_> = gauges.iter().filter(|(_, value)| value != "0").collect();
            assert_eq!(set.len(), 1, "{state}: {set:?}");
            assert!(set[0].0.contains(&format!("state=\"{state}\"")), "{state}: {set:?}");
        };
        let end = |outcome: Outcome| breaker.try_acquire().unwrap().settle(outcome);
        is_in("closed");
        end(Outcome::Failure);
        is_in("open");
        clock.advance(MINUTE);
        is_in("half_open");
        end(Outcome::Success);
        is_in("closed");
        breaker.force_open();
        is_in("forced_open");
        breaker.force_closed();
        is_in("forced_closed");
        breaker.disable();
        is_in("disabled");
        breaker.reset();
        is_in("closed");
    }

    // A rate of −1 where there are too few calls for one: it is summed, averaged and compared like any other.
    #[test]
    fn a_rate_that_is_not_known_yet_is_absent() {
        let registry = Registry::with_clock(Clock::manual());
        let rate = CircuitBreakerConfig::default()
            .failure_rate(0.9)
            .window(Window::calls(10))
            .minimum_calls(2);
        let breaker = registry.circuit_breaker("search", rate).unwrap();
        let ratio = || family(&registry, "circuit_breaker_failure_ratio");
        let told = || breaker.status().window.expect("a rate is watched").failure_rate;
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        assert_eq!((told(), ratio()), (None, vec![]));
        breaker.try_acquire().unwrap().settle(Outcome::Success);
        assert_eq!(told(), Some(0.5));
        assert_eq!(ratio()[0].1, "0.5");
        assert_eq!(breaker.state(), State::Closed);
    }

    // A request to the admin endpoint for a name that nobody knows makes a breaker of that name.
    #[cfg(feature = "http")]
    #[test]
    fn asking_the_admin_service_for_an_unknown_name_makes_nothing() {
        use futures_util::FutureExt;
        use http::{Method, Request, StatusCode};
        use tower::ServiceExt;

        let registry = Registry::new();
        for method in [
            Method::POST,
            Method::PUT,
            Method::DELETE,
            Method::PATCH,
            Method::GET,
            Method::HEAD,
        ] {
            let request = Request::builder()
                .method(&method)
                .uri("/status/nobody")
                .body("{\"state\":\"open\"}");
            let answer = registry.admin().oneshot(request.unwrap()).now_or_never();
            assert_eq!(
                answer.expect("at once").unwrap().status(),
                StatusCode::NOT_FOUND,
                "{method}"
            );
            assert!(registry.services().is_empty(), "{method}");
            assert!(registry.get_circuit_breaker("nobody").is_none());
        }
    }
}
