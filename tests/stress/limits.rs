//! Limiters of each algorithm: rejecting, waiting, in a pair with a breaker, and one for each caller.

use crate::{
    chance::seed,
    on_several_threads, stress,
    upstream::{Admission, Seen, Stack, Upstream, World},
};
use portcullis::{
    Adaptive, Algorithm, CircuitBreaker, GuardLayer, KeyedRateLimiter, RateLimitLayer, RateLimiter, RateLimiterStatus,
    SlidingWindow, TokenBucket,
};
use std::{sync::Arc, time::Duration};
use tower::Layer;

const SECOND: Duration = Duration::from_secs(1);
/// Of the calls that anybody makes.
const KEYS: u32 = 16;

/// A limit, and what it may admit: so many at once, and so many more in each period.
#[derive(Debug, Clone, Copy)]
struct Rule {
    algorithm: Algorithm,
    at_once: u64,
    more: u64,
    period: Duration,
}

/// One of each kind. So fast that about every second call is admitted: threads meet where there is something to be had. So much
/// slower as there are callers.
fn rules(callers: u32) -> [Rule; 4] {
    let second = callers * SECOND;
    let rule = |algorithm: Algorithm, at_once, more, period| Rule {
        algorithm,
        at_once,
        more,
        period,
    };
    // The second window is so large that it is cut into lanes.
    [
        rule(TokenBucket::new(500, second).burst(50).into(), 50, 500, second),
        rule(SlidingWindow::new(60, second / 5).into(), 60, 60, second / 5),
        rule(SlidingWindow::new(200, second / 2).into(), 200, 200, second / 2),
        rule(
            Adaptive::new(400).max_rate(500).burst(50).window(second).into(),
            50,
            500,
            second,
        ),
    ]
}

impl Rule {
    /// The most in any stretch of so many nanoseconds.
    fn most(&self, elapsed: u64) -> u64 {
        let period = u64::try_from(self.period.as_nanos()).expect("short");
        match self.algorithm {
            Algorithm::SlidingWindow(_) => self.at_once + self.more * (elapsed / period),
            _ => self.at_once + self.more * elapsed / period,
        }
    }

    /// No stretch of time holds more than it may. An admission lies between two times; it is held against a stretch that has both.
    fn check(&self, admissions: &[Admission], quotas: u64) {
        let mut starts: Vec<_> = admissions.iter().map(|it| it.asked).collect();
        starts.sort_unstable();
        starts.dedup();
        self.check_from(&starts, admissions, quotas);
    }

    /// The same where callers give back what they were admitted for: a bucket that is full by then may give that out at once, too. So it
    /// is held to what it may give from the beginning on.
    fn check_with_returns(&self, admissions: &[Admission]) {
        match self.algorithm {
            Algorithm::SlidingWindow(_) => self.check(admissions, 1),
            _ => self.check_from(&[0], admissions, 1),
        }
    }

    fn check_from(&self, starts: &[u64], admissions: &[Admission], quotas: u64) {
        let mut by_end: Vec<_> = admissions.iter().map(|it| (it.reached, it.asked)).collect();
        by_end.sort_unstable();
        for &start in starts {
            let within = by_end.iter().filter(|(_, asked)| *asked >= start);
            for (admitted, (end, _)) in (1..).zip(within) {
                let most = quotas * self.most(end - start);
                assert!(
                    admitted <= most,
                    "{admitted} from {start} to {end}, of {most} at most: {self:?}"
                );
            }
        }
    }

    fn check_status(&self, before: &RateLimiterStatus, now: &RateLimiterStatus) {
        let counters = |status: &RateLimiterStatus| {
            let keys = status
                .keys
                .as_ref()
                .map_or(0, |keys| keys.evicted + keys.overflow_requests);
            [
                status.accepted_requests,
                status.accepted_cost,
                status.returned_requests,
                status.rejected_requests,
                keys,
            ]
        };
        let falls = counters(before)
            .into_iter()
            .zip(counters(now))
            .any(|(then, now)| now < then);
        assert!(!falls, "a counter falls: {before:?}, then {now:?}");
        assert!(
            now.available_tokens <= self.at_once as f64,
            "more than there can be: {now:?}"
        );
        if let Algorithm::Adaptive(_) = self.algorithm {
            assert!((40.0..=500.0).contains(&now.rate), "beyond its bounds: {now:?}");
        }
        if let Some(keys) = &now.keys {
            assert!(keys.tracked <= keys.max, "more keys than may be: {now:?}");
        }
    }

    /// Watches the limit, and has time pass.
    fn watcher(
        self,
        world: &Arc<World>,
        status: impl Fn() -> RateLimiterStatus + Send + 'static,
    ) -> Box<dyn FnMut() + Send> {
        let (world, mut dice) = (world.clone(), world.dice(100));
        let mut before = status();
        Box::new(move || {
            if dice.once_in(2) {
                world.manual.advance(SECOND / 20);
            }
            let now = status();
            self.check_status(&before, &now);
            before = now;
        })
    }

    /// Everything has come back, and no more than that.
    fn check_all_is_back(&self, world: &World, mut admits: impl FnMut() -> bool) {
        world.manual.advance(10 * self.period.max(SECOND));
        let admitted = (0..=self.at_once).filter(|_| admits()).count();
        assert_eq!(admitted as u64, self.at_once, "{self:?}");
    }
}

/// What all runs of a test have met, which must not be nothing: such a stress would show nothing.
#[derive(Debug, Default)]
struct Met {
    admitted: usize,
    over_limit: u64,
    open: u64,
}

impl Met {
    fn add(&mut self, seen: &Seen) {
        self.admitted += seen.admissions.len();
        self.over_limit += seen.over_limit;
        self.open += seen.open;
        println!("{self:?}");
    }
}

/// The counters are what the callers have seen.
fn check_counters(status: &RateLimiterStatus, seen: &Seen, perhaps_rejected: u64) {
    let admitted = status.accepted_requests - status.returned_requests;
    assert_eq!(admitted, seen.admissions.len() as u64, "{status:?}");
    let rejected = seen.over_limit..=seen.over_limit + perhaps_rejected;
    assert!(
        rejected.contains(&status.rejected.over_limit),
        "{rejected:?}: {status:?}"
    );
    assert_eq!(status.rejected_requests, status.rejected.over_limit);
    assert_eq!(status.waiting, 0, "nobody is left in line");
}

fn run(world: &Arc<World>, stack: Stack, watcher: Box<dyn FnMut() + Send>) -> Seen {
    let seen = on_several_threads(stress(world, &[stack], 150, [watcher]));
    assert_eq!(world.running(), 0, "all has ended");
    seen
}

#[test]
fn a_limit_is_never_exceeded_and_counts_right_whatever_is_done_to_it_at_once() {
    let (root, mut met) = (seed(), Met::default());
    for rule in rules(1) {
        for waiting in [false, true] {
            println!("{rule:?}, waiting: {waiting}");
            let world = Arc::new(World::new(root));
            let limiter = RateLimiter::builder("upstream", rule.algorithm).clock(&world.clock);
            let limiter = limiter.build().unwrap();
            let (layer, upstream) = (RateLimitLayer::new(limiter.clone()), Upstream::new(&world, true));
            let stack = if waiting {
                Stack::new(layer.wait(SECOND / 20).layer(upstream))
            } else {
                Stack::new(layer.layer(upstream))
            };
            let watched = limiter.clone();
            let seen = run(&world, stack, rule.watcher(&world, move || watched.status()));
            met.add(&seen);
            if waiting {
                // Who leaves the line when served gives that back.
                rule.check_with_returns(&seen.admissions);
            } else {
                rule.check(&seen.admissions, 1);
            }
            // Who leaves the line was not rejected; who is rejected without a wait was, though nobody heard it.
            let perhaps_rejected = if waiting { 0 } else { seen.unheard };
            check_counters(&limiter.status(), &seen, perhaps_rejected);
            rule.check_all_is_back(&world, || limiter.try_acquire().is_ok());
        }
    }
    assert!(met.admitted > 0 && met.over_limit > 0, "{met:?}");
}

#[test]
fn a_pair_gives_back_what_its_breaker_refuses_and_each_counts_its_own() {
    let (root, mut met) = (seed(), Met::default());
    for rule in rules(1) {
        println!("{rule:?}");
        let world = Arc::new(World::new(root));
        let limiter = RateLimiter::builder("upstream", rule.algorithm).clock(&world.clock);
        let limiter = limiter.build().unwrap();
        let breaker = CircuitBreaker::builder("upstream")
            .failure_threshold(3)
            .recovery_timeout(SECOND / 20);
        let breaker = breaker.clock(&world.clock).build().unwrap();
        let layer = GuardLayer::new((limiter.clone(), breaker.clone()));
        let stack = Stack::new(layer.layer(Upstream::new(&world, false)));
        let watched = limiter.clone();
        let seen = run(&world, stack, rule.watcher(&world, move || watched.status()));
        met.add(&seen);
        rule.check_with_returns(&seen.admissions);
        let (limit, circuit) = (limiter.status(), breaker.status());
        if let Algorithm::SlidingWindow(_) = rule.algorithm {
            // What others have come behind stays spent.
            let admitted = limit.accepted_requests - limit.returned_requests;
            assert!(admitted >= seen.admissions.len() as u64, "{limit:?}");
        } else {
            check_counters(&limit, &seen, seen.unheard);
        }
        let metrics = &circuit.metrics;
        assert_eq!(
            (
                metrics.successful_requests,
                metrics.failed_requests,
                metrics.cancelled_requests
            ),
            (seen.ended.answered, seen.ended.failed, seen.ended.dropped)
        );
        assert_eq!(
            limit.rejected_requests + metrics.rejected_requests,
            seen.over_limit + seen.rejected_by_circuit() + seen.unheard
        );
        assert_eq!((circuit.probes_in_flight, limit.waiting), (0, 0), "all is given back");
        rule.check_all_is_back(&world, || limiter.try_acquire().is_ok());
    }
    assert!(met.admitted > 0 && met.over_limit > 0 && met.open > 0, "{met:?}");
}

#[test]
fn each_callers_limit_is_never_exceeded_also_where_there_are_too_many_callers() {
    let (root, mut met) = (seed(), Met::default());
    for rule in rules(KEYS) {
        for room in [KEYS, KEYS / 4] {
            println!("{rule:?}, room for {room}");
            let world = Arc::new(World::new(root));
            let callers = KeyedRateLimiter::builder("upstream", rule.algorithm).clock(&world.clock);
            let callers = callers.max_keys(room as usize).build().unwrap();
            let layer = RateLimitLayer::new(callers.by(|call: &crate::upstream::Call| Some(call.key)));
            let stack = Stack::new(layer.layer(Upstream::new(&world, true)));
            let watched = callers.clone();
            let seen = run(&world, stack, rule.watcher(&world, move || watched.status()));
            met.add(&seen);
            // A key for which there is no room may have had its own quota, and then the one of all others.
            let quotas = if room == KEYS { 1 } else { 2 };
            for key in 0..u64::from(KEYS) {
                let of_key: Vec<_> = seen.admissions.iter().filter(|it| it.key == key).copied().collect();
                rule.check(&of_key, quotas);
            }
            let status = callers.status();
            check_counters(&status, &seen, seen.unheard);
            let keys = status.keys.expect("keyed");
            assert_eq!(keys.tracked, room as usize);
            assert_eq!(keys.overflow_requests > 0, room < KEYS, "{keys:?}");
            rule.check_all_is_back(&world, || callers.try_acquire(&0_u64).is_ok());
        }
    }
    assert!(met.admitted > 0 && met.over_limit > 0, "{met:?}");
}
