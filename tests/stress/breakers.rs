//! Breakers: alone, as a service that is not ready, and over streamed answers.

#[cfg(feature = "http")]
use crate::streaming;
use crate::{
    chance::{Dice, seed},
    on_several_threads, stress,
    upstream::{Call, End, Ended, Seen, Stack, Upstream, World, call, split_dropped},
};
use portcullis::{
    Backoff, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerLayer, CircuitBreakerMetrics, CircuitBreakerStatus,
    Clock, Outcome, Reason, State, Window,
};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

const PROBES: u32 = 3;
const SUCCESSES: u32 = 2;

/// Breakers that trip in every way; all let as many probes through. Times are in this unit.
fn configs(unit: Duration, cancelled: Outcome) -> [CircuitBreakerConfig; 4] {
    let config = CircuitBreakerConfig::default()
        .half_open_max_calls(PROBES)
        .success_threshold(SUCCESSES)
        .recovery_timeout(unit)
        .cancelled(cancelled);
    [
        config.clone().failure_threshold(3),
        config
            .clone()
            .failure_rate(0.5)
            .window(Window::calls(10))
            .minimum_calls(5)
            .recovery_backoff(Backoff::new(2.0, 8 * unit).jitter(0.5)),
        config
            .clone()
            .failure_rate(0.5)
            .slow_calls(0.8, unit / 4)
            .window(Window::time(unit))
            .minimum_calls(5),
        config.failures_within(4, unit).probe_lease(unit / 4),
    ]
}

/// How a breaker becomes a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Rejecting,
    NotReady,
    #[cfg(feature = "http")]
    Streaming,
}

const SHAPES: &[Shape] = &[
    Shape::Rejecting,
    Shape::NotReady,
    #[cfg(feature = "http")]
    Shape::Streaming,
];

impl Shape {
    fn stack(self, breaker: &CircuitBreaker, upstream: Upstream) -> Stack {
        let layer = CircuitBreakerLayer::new(breaker.clone());
        match self {
            Self::Rejecting => Stack::new(layer.layer(upstream)),
            Self::NotReady => Stack::new(layer.not_ready().layer(upstream)),
            #[cfg(feature = "http")]
            Self::Streaming => streaming::stack(breaker.clone(), upstream),
        }
    }
}

/// Looks at a breaker again and again.
fn watcher(breaker: &CircuitBreaker) -> Box<dyn FnMut() + Send> {
    let breaker = breaker.clone();
    let mut before = breaker.status();
    Box::new(move || {
        let now = breaker.status();
        check(&now);
        let falls = counters(&before)
            .into_iter()
            .zip(counters(&now))
            .any(|(then, now)| now < then);
        assert!(!falls, "a counter falls: {before:?}, then {now:?}");
        before = now;
    })
}

fn counters(status: &CircuitBreakerStatus) -> [u64; 13] {
    let metrics = &status.metrics;
    let (rejected, moves) = (metrics.rejected, metrics.state_transitions);
    [
        status.generation,
        metrics.successful_requests,
        metrics.failed_requests,
        metrics.ignored_requests,
        metrics.cancelled_requests,
        metrics.slow_requests,
        rejected.open,
        rejected.half_open_full,
        rejected.forced_open,
        moves.closed_to_open,
        moves.open_to_half_open,
        moves.half_open_to_closed,
        moves.half_open_to_open,
    ]
}

/// What holds at any time.
fn check(status: &CircuitBreakerStatus) {
    assert!(
        status.probes_in_flight <= PROBES as usize,
        "too many probes: {status:?}"
    );
    assert!(status.success_count < SUCCESSES, "enough to close: {status:?}");
    let moves = status.metrics.state_transitions;
    let (opened, probed) = (moves.closed_to_open + moves.half_open_to_open, moves.open_to_half_open);
    let left = moves.half_open_to_closed + moves.half_open_to_open;
    assert!(
        left <= probed && probed <= opened,
        "who leaves a state was in it: {status:?}"
    );
}

/// Turns every switch of a breaker, and has time pass.
fn operator(
    world: &Arc<World>,
    breaker: &CircuitBreaker,
    configs: [CircuitBreakerConfig; 4],
    unit: Duration,
    disables: bool,
) -> Box<dyn FnMut() + Send> {
    let (world, breaker) = (world.clone(), breaker.clone());
    let mut chance = world.dice(100);
    Box::new(move || {
        let roll = chance.below(256);
        let enable = |switch: fn(&CircuitBreaker)| {
            switch(&breaker);
            let turns = world.disabled.load(Ordering::SeqCst);
            world.disabled.store(turns.next_multiple_of(2), Ordering::SeqCst);
        };
        match roll {
            0 => enable(CircuitBreaker::force_open),
            1 => enable(CircuitBreaker::force_closed),
            2..8 => enable(CircuitBreaker::reset),
            8 | 9 if disables => {
                world.disabled.fetch_or(1, Ordering::SeqCst);
                breaker.disable();
            }
            10..16 => reconfigure(&breaker, &configs, &mut chance),
            16..192 => world.manual.advance(unit / 8),
            _ => {}
        }
    })
}

fn reconfigure(breaker: &CircuitBreaker, configs: &[CircuitBreakerConfig; 4], dice: &mut Dice) {
    let index = usize::try_from(dice.below(4)).expect("four");
    breaker.reconfigure(configs[index].clone()).expect("valid");
}

/// The counters are what the callers have seen.
fn check_counters(metrics: &CircuitBreakerMetrics, seen: &Seen, cancelled: Outcome) {
    let (failed, dropped) = split_dropped(&seen.ended, cancelled);
    let (perhaps_failed, perhaps_dropped) = split_dropped(&seen.perhaps, cancelled);
    // A failure to become ready says nothing of a circuit that has opened meanwhile.
    let perhaps_failed = perhaps_failed + seen.unready;
    for (what, counted, sure, perhaps) in [
        (
            "answered",
            metrics.successful_requests,
            seen.ended.answered,
            seen.perhaps.answered,
        ),
        ("failed", metrics.failed_requests, failed, perhaps_failed),
        ("cancelled", metrics.cancelled_requests, dropped, perhaps_dropped),
        (
            "rejected",
            metrics.rejected_requests,
            seen.rejected_by_circuit() + seen.unheard,
            0,
        ),
        ("open", metrics.rejected.open, seen.open, seen.unheard),
        (
            "full",
            metrics.rejected.half_open_full,
            seen.half_open_full,
            seen.unheard,
        ),
        ("forced", metrics.rejected.forced_open, seen.forced_open, seen.unheard),
        ("ignored", metrics.ignored_requests, 0, 0),
    ] {
        let may_be = sure..=sure + perhaps;
        assert!(may_be.contains(&counted), "{what}: counted {counted}, seen {may_be:?}");
    }
}

/// Nobody calls any more: nothing is held. The upstream is well: the circuit closes after as many calls as it takes.
async fn check_recovery(world: &Arc<World>, breaker: &CircuitBreaker) {
    assert_eq!(
        (breaker.status().probes_in_flight, world.running()),
        (0, 0),
        "all is given back"
    );
    if breaker.status().forced.is_some() {
        breaker.reset();
    }
    let upstream = Upstream::new(world, false);
    let mut stack = Stack::new(CircuitBreakerLayer::new(breaker.clone()).layer(upstream));
    let mut seen = Seen::default();
    while breaker.state() != State::Closed {
        let wait = breaker.status().retry_after.unwrap_or_default();
        world.manual.advance(wait);
        stack.ready().await.expect("never moody");
        call(world, &mut stack, Call::of(End::Answer), None, &mut seen).await;
        assert!(
            seen.ended.answered <= SUCCESSES.into(),
            "closed by so many successes: {:?}",
            breaker.status()
        );
    }
}

/// Nobody calls any more: every slot can be used at once, and no more than there are. How many overlap under stress is chance.
async fn check_slots(world: &Arc<World>, breaker: &CircuitBreaker, stack: &Stack) {
    let wait = breaker.status().retry_after.unwrap_or_default();
    world.manual.advance(wait);
    let mut probes = Vec::new();
    for running in 1..=PROBES as usize {
        let mut stack = stack.clone();
        let probe = stack.ready().await.expect("never moody").call(Call::of(End::Hang));
        assert_eq!(world.running(), running);
        probes.push(probe);
    }
    let full = breaker.try_acquire().expect_err("every slot is taken");
    assert_eq!(full.reason, Reason::HalfOpenFull);
    drop(probes);
    assert_eq!(world.running(), 0);
}

#[derive(Debug, Default)]
struct Met {
    seen: Seen,
    moves: [u64; 4],
    slow: u64,
}

impl Met {
    fn add(&mut self, mut seen: Seen, metrics: &CircuitBreakerMetrics) {
        let moves = metrics.state_transitions;
        // More than anybody wants to read.
        seen.admissions.clear();
        self.seen += seen;
        self.slow += metrics.slow_requests;
        let counts = [
            moves.closed_to_open,
            moves.open_to_half_open,
            moves.half_open_to_closed,
            moves.half_open_to_open,
        ];
        self.moves.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
    }

    /// A stress that meets nothing shows nothing.
    fn check(&self) {
        let Seen { ended, perhaps, .. } = &self.seen;
        let met = [
            ended.answered,
            ended.failed,
            ended.dropped,
            perhaps.answered,
            self.seen.unready,
            self.seen.open,
            self.seen.half_open_full,
            self.seen.forced_open,
            self.seen.unheard,
            self.slow,
        ];
        assert!(met.iter().chain(&self.moves).all(|met| *met > 0), "{self:?}");
    }
}

#[test]
fn a_breaker_counts_right_holds_nothing_back_and_closes_again_whatever_is_done_to_it_at_once() {
    let root = seed();
    let unit = Duration::from_secs(1);
    let mut met = Met::default();
    for (round, &shape) in SHAPES.iter().chain(SHAPES).enumerate() {
        // In the second turn everything is known of every call, so the counters are to be exact.
        let disturbed = round < SHAPES.len();
        let cancelled = if round % 2 == 0 {
            Outcome::Ignored
        } else {
            Outcome::Failure
        };
        println!("{shape:?}, disturbed: {disturbed}, cancelled: {cancelled:?}");
        let world = Arc::new(World::new(root ^ round as u64));
        let configs = configs(unit, cancelled);
        let breaker = CircuitBreaker::builder("upstream")
            .config(configs[0].clone())
            .clock(&world.clock);
        let breaker = breaker.build().unwrap();
        let seen = on_several_threads(async {
            let stack = shape.stack(&breaker, Upstream::new(&world, disturbed));
            let beside = [watcher(&breaker), operator(&world, &breaker, configs, unit, disturbed)];
            let seen = stress(&world, &[stack], 200, beside).await;
            check_counters(&breaker.status().metrics, &seen, cancelled);
            check_recovery(&world, &breaker).await;
            seen
        });
        met.add(seen, &breaker.status().metrics);
    }
    met.check();
}

/// Microseconds instead of seconds: here time passes by itself, and a breaker knows its clock by a bit, which is another path.
#[test]
fn a_breaker_on_the_systems_clock_counts_right_and_closes_again_as_well() {
    let root = seed();
    let unit = Duration::from_micros(200);
    for config in configs(unit, Outcome::Ignored) {
        let world = Arc::new(World::new(root).with_clock(Clock::system()));
        let breaker = CircuitBreaker::builder("upstream")
            .config(config.clone())
            .build()
            .unwrap();
        on_several_threads(async {
            let stack = Shape::Rejecting.stack(&breaker, Upstream::new(&world, false));
            let seen = stress(&world, &[stack], 150, [watcher(&breaker)]).await;
            check_counters(&breaker.status().metrics, &seen, Outcome::Ignored);
            assert_eq!(seen.perhaps.answered, 0, "so the counters are exact");
            check_recovery(&world, &breaker).await;
        });
    }
}

/// No success of a probe ever counts, so that the circuit is never closed and whatever runs is a probe: the upstream itself can tell
/// how many there are. What began before the circuit opened succeeds meanwhile.
#[test]
fn no_more_probes_run_than_may_however_they_end_and_no_earlier_success_closes_the_circuit() {
    const EARLIER: usize = 200;
    let root = seed();
    let unit = Duration::from_secs(1);
    let (mut met, mut earlier_successes) = (Ended::default(), 0);
    for not_ready in [false, true] {
        let world = Arc::new(World::new(root ^ u64::from(not_ready)));
        let config = CircuitBreakerConfig::default()
            .failure_threshold(1)
            .half_open_max_calls(PROBES)
            .success_threshold(SUCCESSES)
            .recovery_timeout(unit)
            .probe_lease(Duration::from_secs(1_000_000_000));
        let other = config.clone().failure_threshold(2).recovery_timeout(2 * unit);
        let breaker = CircuitBreaker::builder("upstream")
            .config(config.clone())
            .clock(&world.clock);
        let breaker = breaker.build().unwrap();
        let mut earlier: Vec<_> = (0..EARLIER).map(|_| breaker.try_acquire().unwrap()).collect();
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        let layer = CircuitBreakerLayer::new(breaker.clone()).classify(|result: &std::io::Result<()>| match result {
            Ok(()) => Outcome::Ignored,
            Err(_) => Outcome::Failure,
        });
        let stack_over = |upstream| {
            if not_ready {
                Stack::new(ServiceBuilder::new().layer(layer.clone().not_ready()).service(upstream))
            } else {
                Stack::new(ServiceBuilder::new().layer(&layer).service(upstream))
            }
        };
        let stack = stack_over(Upstream::new(&world, true));
        let passing = {
            let (world, breaker, mut dice) = (world.clone(), breaker.clone(), world.dice(100));
            move || {
                match dice.below(32) {
                    0 => breaker.reconfigure(config.clone()).unwrap(),
                    1 => breaker.reconfigure(other.clone()).unwrap(),
                    2..16 => world.manual.advance(unit),
                    _ => {}
                }
                if let Some(earlier) = earlier.pop() {
                    earlier.settle(Outcome::Success);
                }
                let running = world.most_running();
                assert!(running <= PROBES as usize, "{running} probes at once");
            }
        };
        on_several_threads(async {
            let seen = stress(&world, &[stack], 60, [watcher(&breaker), Box::new(passing)]).await;
            let metrics = breaker.status().metrics;
            let Ended {
                answered,
                failed,
                dropped,
            } = seen.ended;
            let failures = failed + 1..=failed + 1 + seen.unready;
            assert_eq!(metrics.ignored_requests, answered);
            // Those for which there was no time were dropped.
            let others = metrics.successful_requests + metrics.cancelled_requests;
            assert_eq!(others, dropped + EARLIER as u64);
            earlier_successes += metrics.successful_requests;
            met += seen.ended;
            assert!(failures.contains(&metrics.failed_requests), "{failures:?}: {metrics:?}");
            assert_eq!(metrics.state_transitions.half_open_to_closed, 0);
            check_slots(&world, &breaker, &stack_over(Upstream::new(&world, false))).await;
            assert_eq!(world.most_running(), PROBES as usize);
            check_recovery(&world, &breaker).await;
        });
    }
    assert!(earlier_successes > 0);
    assert!(met.answered > 0 && met.failed > 0 && met.dropped > 0, "{met:?}");
}
