//! Pins each rate limiter to a brute-force model of its rule, under random schedules on a manual clock.

mod limiters;

use limiters::{NANOSECOND, SECOND, YEAR, acquire_when_told, just_before, limiter};
use portcullis::{Adaptive, Algorithm, ManualClock, Outcome, RateLimitPermit, RateLimiter, SlidingWindow, TokenBucket};
use portcullis::{Rejected, Timestamp, Verdict};
use proptest::prelude::*;
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
    /// A call that waits as long as it is told to.
    Wait(u32),
    /// One of the calls in flight was never made.
    Unused(usize),
    /// One of the calls in flight ends; its true cost is known by now.
    Settle(usize, u32),
    /// One of the calls in flight ends well, or not.
    Outcome(usize, bool),
    /// A thread that was held up sees an old time, in thousandths of the period.
    Rewind(u64),
}

fn steps(rewinds: bool) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..1500u64).prop_map(Step::Advance),
        2 => (0..4u64).prop_map(Step::Tick),
        1 => (0..200_000u64).prop_map(Step::Advance),
        8 => any::<u32>().prop_map(Step::Take),
        2 => any::<u32>().prop_map(Step::Wait),
        2 => any::<usize>().prop_map(Step::Unused),
        2 => (any::<usize>(), any::<u32>()).prop_map(|(which, cost)| Step::Settle(which, cost)),
        5 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(which, good)| Step::Outcome(which, good)),
        if rewinds { 3 } else { 0 } => (0..1500u64).prop_map(Step::Rewind),
    ];
    prop::collection::vec(step, 1..120)
}

/// The rule, written down as plainly as can be.
trait Model {
    /// Lets time pass up to `now`, nanoseconds since the start.
    fn at(&mut self, now: u128);
    /// How long until so much is there; `None` if it is there.
    fn missing(&self, cost: u32) -> Option<u128>;
    /// By how many nanoseconds the limiter may be later than the rule.
    fn lateness(&self) -> u128;
    fn taken(&mut self, cost: u32);
    /// Whether it was given back.
    fn unused(&mut self, admission: usize, cost: u32) -> bool;
    fn corrected(&mut self, reserved: u32, cost: u32);
    fn ended(&mut self, outcome: Outcome);
    fn rate(&self) -> f64;
}

/// A run of a limiter beside its model.
struct Run<M> {
    clock: ManualClock,
    start: Timestamp,
    limiter: RateLimiter,
    model: M,
    period: Duration,
    burst: u32,
    /// The calls in flight, by number of admission.
    flying: Vec<(usize, RateLimitPermit)>,
    admissions: usize,
}

impl<M: Model> Run<M> {
    fn new(algorithm: impl Into<Algorithm>, model: M) -> Self {
        let (clock, limiter) = limiter(algorithm);
        let status = limiter.status();
        Self {
            start: clock.now(),
            period: status.period,
            burst: status.burst,
            clock,
            limiter,
            model,
            flying: Vec::new(),
            admissions: 0,
        }
    }

    fn now(&self) -> u128 {
        self.clock.now().duration_since(self.start).as_nanos()
    }

    /// Whether a schedule has left the hundred years that the limiters are made for.
    fn is_over(&self) -> bool {
        self.now() > (90 * YEAR).as_nanos()
    }

    fn cost(&self, any: u32) -> u32 {
        // Small costs half of the time: they are the ones that meet each other.
        let most = if any.is_multiple_of(2) {
            self.burst.min(3)
        } else {
            self.burst
        };
        (any / 2) % most + 1
    }

    /// Model and limiter agree on an answer.
    fn check(&mut self, cost: u32, answer: &Result<RateLimitPermit, Rejected>) {
        self.model.at(self.now());
        let late = self.model.lateness();
        match (answer, self.model.missing(cost)) {
            (Ok(_), None) => {}
            (Ok(_), Some(wait)) => panic!("above the limit: a cost of {cost} admitted {wait} ns too early"),
            (Err(rejected), exact) => {
                let wait = rejected.retry_after.expect("the cost fits the burst").as_nanos();
                let exact = exact.unwrap_or(0);
                // No clock goes on for that long; what is told is the end of its scale.
                let exact = exact.min((300 * YEAR).as_nanos());
                assert!(
                    exact <= wait && (wait <= exact + late || exact == (300 * YEAR).as_nanos()),
                    "below the limit: told to wait {wait} ns for a cost of {cost}, the rule says {exact} (+ {late})"
                );
            }
        }
    }

    /// The status tells what the next call will meet, and the call meets it.
    fn take(&mut self, cost: u32) {
        let status = self.limiter.status();
        let foretold = (cost == 1).then_some(status.retry_after);
        let answer = self.limiter.try_acquire_n(cost);
        if let Some(foretold) = foretold {
            let met = answer.as_ref().err().and_then(|rejected| rejected.retry_after);
            assert_eq!(foretold, met, "the status tells what try_acquire meets");
        }
        self.check(cost, &answer);
        assert!(
            (self.limiter.status().rate - self.model.rate()).abs() < 1e-9 * self.model.rate(),
            "the rate is {}, the rule says {}",
            self.limiter.status().rate,
            self.model.rate()
        );
        if let Ok(permit) = answer {
            self.admitted(cost, permit);
        }
    }

    fn admitted(&mut self, cost: u32, permit: RateLimitPermit) {
        self.model.taken(cost);
        self.flying.push((self.admissions, permit));
        self.admissions += 1;
    }

    fn land(&mut self, which: usize) -> Option<(usize, RateLimitPermit)> {
        let flying = self.flying.len();
        (flying > 0).then(|| self.flying.swap_remove(which % flying))
    }

    fn step(&mut self, step: &Step) {
        let thousandths = |n: u64| {
            Duration::from_nanos(u64::try_from(self.period.as_nanos() * u128::from(n) / 1000).unwrap_or(u64::MAX))
        };
        match *step {
            Step::Advance(n) => self.clock.advance(thousandths(n).min(YEAR)),
            Step::Tick(n) => self.clock.advance(Duration::from_nanos(n)),
            Step::Rewind(n) => self.clock.rewind(thousandths(n)),
            Step::Take(any) => self.take(self.cost(any)),
            Step::Wait(any) => {
                let cost = self.cost(any);
                let wait = self
                    .limiter
                    .try_acquire_n(cost)
                    .map_err(|rejected| rejected.retry_after);
                match wait {
                    Ok(permit) => {
                        self.model.at(self.now());
                        assert!(self.model.missing(cost).is_none(), "above the limit");
                        self.admitted(cost, permit);
                    }
                    Err(wait) if wait < Some(YEAR) => {
                        self.clock.advance(just_before(wait.unwrap_or_default()));
                        let early = self
                            .limiter
                            .try_acquire_n(cost)
                            .map_err(|rejected| rejected.retry_after);
                        assert_eq!(
                            early.expect_err("refused one nanosecond early"),
                            Some(NANOSECOND),
                            "told at {wait:?}: still true one nanosecond early"
                        );
                        self.clock.advance(NANOSECOND);
                        self.model.at(self.now());
                        let permit = self
                            .limiter
                            .try_acquire_n(cost)
                            .expect("admitted after the time it was told");
                        assert!(self.model.missing(cost).is_none(), "above the limit");
                        self.admitted(cost, permit);
                    }
                    Err(_) => {}
                }
            }
            Step::Unused(which) => {
                if let Some((admission, permit)) = self.land(which) {
                    self.model.at(self.now());
                    self.model.unused(admission, permit.cost());
                    permit.unused();
                }
            }
            Step::Settle(which, any) => {
                let cost = any % (2 * self.burst).max(1);
                if let Some((_, permit)) = self.land(which) {
                    self.model.at(self.now());
                    self.model.corrected(permit.cost(), cost);
                    permit.settle(Verdict::new(Outcome::Ignored).cost(cost));
                }
            }
            Step::Outcome(which, good) => {
                if let Some((_, permit)) = self.land(which) {
                    let outcome = if good { Outcome::Success } else { Outcome::Failure };
                    self.model.at(self.now());
                    self.model.ended(outcome);
                    permit.settle(outcome);
                }
            }
        }
    }

    fn follow(mut self, steps: &[Step]) -> Self {
        for step in steps {
            if self.is_over() {
                break;
            }
            self.step(step);
        }
        self
    }
}

/// Tokens in fractions of 1 / period, so that every nanosecond brings exactly `limit` of them.
#[derive(Debug)]
struct Tokens {
    now: u128,
    limit: i128,
    period: i128,
    burst: i128,
    content: i128,
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Tokens {
    fn new(limit: u32, period: Duration, burst: u32) -> Self {
        let period = i128::try_from(period.as_nanos()).expect("a hundred years fit");
        Self {
            now: 0,
            limit: limit.into(),
            period,
            burst: period * i128::from(burst),
            content: period * i128::from(burst),
        }
    }

    fn fill(&mut self, more: i128) {
        self.content = (self.content + more).min(self.burst);
    }
}

impl Model for Tokens {
    fn at(&mut self, now: u128) {
        let passed = i128::try_from(now - self.now).expect("a hundred years fit");
        self.fill(passed * self.limit);
        self.now = now;
    }

    fn missing(&self, cost: u32) -> Option<u128> {
        let missing = self.period * i128::from(cost) - self.content;
        u128::try_from(missing)
            .ok()
            .filter(|missing| *missing > 0)
            .map(|missing| missing.div_ceil(self.limit.unsigned_abs()))
    }

    /// The limiter counts in fractions of a token of which a burst fits in 61 bits. Only where fractions that small do not add up
    /// to whole nanoseconds, a bucket that was full may be late by one of them.
    fn lateness(&self) -> u128 {
        let (limit, period) = (self.limit.unsigned_abs(), self.period.unsigned_abs());
        let burst = self.burst.unsigned_abs() / period;
        let token = period / gcd(limit, period);
        if token * burst <= 1 << 61 {
            return 0;
        }
        let fractions = ((1 << 61) / burst).min(u128::from(u64::MAX) / limit);
        1 + period.div_ceil(limit * fractions)
    }

    fn taken(&mut self, cost: u32) {
        self.content -= self.period * i128::from(cost);
    }

    fn unused(&mut self, _: usize, cost: u32) -> bool {
        self.fill(self.period * i128::from(cost));
        true
    }

    fn corrected(&mut self, reserved: u32, cost: u32) {
        let more = self.period * (i128::from(cost) - i128::from(reserved));
        if more > 0 {
            self.content = (self.content - more).max(self.content.min(-self.burst));
        } else {
            self.fill(-more);
        }
    }

    fn ended(&mut self, _: Outcome) {}

    fn rate(&self) -> f64 {
        self.limit as f64
    }
}

/// The time of every admission of the run, with its number; one entry for each request it counts for.
#[derive(Debug)]
struct Log {
    now: u128,
    max_requests: u32,
    window: u128,
    admissions: Vec<(u128, usize)>,
    next: usize,
}

impl Log {
    fn new(max_requests: u32, window: Duration) -> Self {
        Self {
            now: 0,
            max_requests,
            window: window.as_nanos(),
            admissions: Vec::new(),
            next: 0,
        }
    }
}

impl Model for Log {
    fn at(&mut self, now: u128) {
        self.now = now;
    }

    fn missing(&self, cost: u32) -> Option<u128> {
        let recent: Vec<u128> = self
            .admissions
            .iter()
            .map(|(at, _)| *at)
            .filter(|at| at + self.window > self.now)
            .collect();
        let too_many = (recent.len() + cost as usize).checked_sub(self.max_requests as usize)?;
        let last_to_go = too_many.checked_sub(1)?;
        Some(recent[last_to_go] + self.window - self.now)
    }

    fn lateness(&self) -> u128 {
        0
    }

    fn taken(&mut self, cost: u32) {
        self.admissions.extend((0..cost).map(|_| (self.now, self.next)));
        self.next += 1;
    }

    fn unused(&mut self, admission: usize, _: u32) -> bool {
        // Or one of the same instant, which is all the same to whoever counts.
        let at = self.admissions.iter().find(|(_, number)| *number == admission);
        let newest = at.is_some_and(|(at, _)| self.admissions.last().is_some_and(|(last, _)| last == at));
        if newest {
            self.admissions.retain(|(_, number)| *number != admission);
        }
        newest
    }

    fn corrected(&mut self, _: u32, _: u32) {}

    fn ended(&mut self, _: Outcome) {}

    fn rate(&self) -> f64 {
        self.max_requests.into()
    }
}

/// A token bucket in floating point whose rate moves at the end of a window.
#[derive(Debug)]
struct Moving {
    now: u128,
    window: u128,
    window_end: u128,
    bounds: (f64, f64),
    minimum_calls: u32,
    burst: f64,
    rate: f64,
    content: f64,
    calls: u32,
    failures: u32,
    used: f64,
}

impl Moving {
    const ERROR_THRESHOLD: f64 = 0.1;
    const FACTOR: f64 = 0.25;

    fn fill(&mut self, until: u128) {
        let brought = (until - self.now) as f64 * self.rate / self.window as f64;
        self.content = (self.content + brought).min(self.burst);
        self.now = until;
    }

    fn next_rate(&self) -> f64 {
        if self.calls < self.minimum_calls {
            return self.rate;
        }
        let moved = if f64::from(self.failures) / f64::from(self.calls) > Self::ERROR_THRESHOLD {
            self.rate * (1.0 - Self::FACTOR)
        } else if self.used >= self.rate / 2.0 {
            self.rate * (1.0 + Self::FACTOR)
        } else {
            self.rate
        };
        moved.clamp(self.bounds.0, self.bounds.1)
    }
}

impl Model for Moving {
    fn at(&mut self, now: u128) {
        if now >= self.window_end {
            self.fill(self.window_end);
            self.rate = self.next_rate();
            (self.calls, self.failures, self.used) = (0, 0, 0.0);
            self.window_end += ((now - self.window_end) / self.window + 1) * self.window;
        }
        self.fill(now);
    }

    fn missing(&self, cost: u32) -> Option<u128> {
        // What is too little by less than this is floating point's own.
        let missing = f64::from(cost) - self.content - 1e-6;
        if missing <= 0.0 {
            return None;
        }
        let here = missing * self.window as f64 / self.rate;
        let left = (self.window_end - self.now) as f64;
        let wait = if here <= left {
            here
        } else {
            left + (missing - left * self.rate / self.window as f64) * self.window as f64 / self.next_rate()
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a wait, below a hundred years"
        )]
        Some(wait as u128)
    }

    /// A few millionths of the time for one token, for the floating point here.
    fn lateness(&self) -> u128 {
        self.window / 100_000 + 2
    }

    fn taken(&mut self, cost: u32) {
        self.content -= f64::from(cost);
        self.used += f64::from(cost);
    }

    fn unused(&mut self, _: usize, cost: u32) -> bool {
        self.content = (self.content + f64::from(cost)).min(self.burst);
        self.used = (self.used - f64::from(cost)).max(0.0);
        true
    }

    fn corrected(&mut self, reserved: u32, cost: u32) {
        if cost > reserved {
            self.content = (self.content - f64::from(cost - reserved)).max(self.content.min(-self.burst));
            self.used += f64::from(cost - reserved);
        } else {
            self.unused(0, reserved - cost);
        }
    }

    fn ended(&mut self, outcome: Outcome) {
        self.calls += 1;
        self.failures += u32::from(outcome == Outcome::Failure);
    }

    fn rate(&self) -> f64 {
        self.rate
    }
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

proptest! {
    #[test]
    fn a_token_bucket_admits_what_exact_arithmetic_admits((limit, period, burst) in buckets(), steps in steps(false)) {
        let algorithm = TokenBucket::new(limit, period).burst(burst);
        Run::new(algorithm, Tokens::new(limit, period, burst)).follow(&steps);
    }

    #[test]
    fn a_sliding_window_admits_what_the_list_of_its_admissions_allows(
        max_requests in 1..12u32, window in periods(), steps in steps(false),
    ) {
        Run::new(SlidingWindow::new(max_requests, window), Log::new(max_requests, window)).follow(&steps);
    }

    #[test]
    fn an_adaptive_limiter_follows_its_rule(
        base in 2..40u32, burst in 1..40u32, minimum_calls in 1..6u32, window in 1..100_000u64, steps in steps(false),
    ) {
        let window = Duration::from_micros(window);
        let (min, max) = (base / 2, base * 3);
        let algorithm = Adaptive::new(base)
            .min_rate(min)
            .max_rate(max)
            .burst(burst)
            .window(window)
            .minimum_calls(minimum_calls)
            .error_threshold(Moving::ERROR_THRESHOLD)
            .adjustment_factor(Moving::FACTOR);
        let model = Moving {
            now: 0,
            window: window.as_nanos(),
            window_end: window.as_nanos(),
            bounds: (min.into(), max.into()),
            minimum_calls,
            burst: burst.into(),
            rate: base.into(),
            content: burst.into(),
            calls: 0,
            failures: 0,
            used: 0.0,
        };
        Run::new(algorithm, model).follow(&steps);
    }

    /// Each of these times is one that some thread read; the order in which they arrive is anybody's.
    #[test]
    fn a_sliding_window_is_never_exceeded_by_threads_that_lie_behind(
        max_requests in 1..6u32, window in 1..2000u64, steps in steps(true),
    ) {
        let window = Duration::from_nanos(window);
        let (clock, limiter) = limiter(SlidingWindow::new(max_requests, window));
        let start = clock.now();
        clock.advance(YEAR);
        let mut admitted: Vec<Duration> = Vec::new();
        let mut newest = None;
        let mut latest = clock.now();
        let permille = |n: u64| Duration::from_nanos(u64::try_from(window.as_nanos()).unwrap() * n / 1000);
        for step in &steps {
            match *step {
                Step::Advance(n) => clock.advance(permille(n)),
                Step::Tick(n) => clock.advance(Duration::from_nanos(n)),
                Step::Rewind(n) => clock.rewind(permille(n)),
                Step::Take(any) | Step::Wait(any) => {
                    let cost = any % max_requests + 1;
                    if let Ok(permit) = limiter.try_acquire_n(cost) {
                        admitted.extend((0..cost).map(|_| clock.now().duration_since(start)));
                        newest = Some(permit);
                    }
                }
                Step::Unused(_) => {
                    if let Some(permit) = newest.take() {
                        admitted.truncate(admitted.len() - permit.cost() as usize);
                        permit.unused();
                    }
                }
                Step::Settle(..) | Step::Outcome(..) => newest = None,
            }
            latest = latest.max(clock.now());
        }
        let mut in_order = admitted.clone();
        in_order.sort();
        for crowd in in_order.windows(max_requests as usize + 1) {
            let (first, last) = (crowd[0], crowd[max_requests as usize]);
            prop_assert!(last >= first + window, "more than {} in one window, from {:?} on", max_requests, first);
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
    }

    /// Whatever order the readings arrive in: never more than the burst and what the rate brings up to the latest of them.
    #[test]
    fn a_bucket_is_never_exceeded_by_threads_that_lie_behind(
        (limit, period, burst) in buckets(), adaptive in any::<bool>(), steps in steps(true),
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
                Step::Take(any) | Step::Wait(any) => {
                    let cost = any % burst + 1;
                    admitted += limiter.try_acquire_n(cost).map_or(0, |permit| u128::from(permit.cost()));
                }
                Step::Unused(_) | Step::Settle(..) | Step::Outcome(..) => {}
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
fn a_status_read_while_a_bucket_wakes_up_from_a_long_rest_is_not_garbled() {
    const ROUNDS: usize = 200_000;
    // So fast that a second is many times what 64 bits tell apart.
    let (clock, limiter) = limiter(TokenBucket::new(u32::MAX, NANOSECOND));
    let (round, read) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let wait_for = |counter: &AtomicUsize, number| {
        while counter.load(Ordering::SeqCst) < number {
            std::hint::spin_loop();
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
