//! Limiters of any settings that are accepted, at any times and costs, beside the plainest arithmetic there is.

use super::input::{NANOSECOND, Step, YEAR, duration, just_before, play, rarely};
use arbitrary::{Result, Unstructured};
use portcullis::{
    Adaptive, Algorithm, Clock, KeyedPermit, KeyedRateLimiter, ManualClock, Outcome, RateLimitPermit, RateLimiter,
    Reason, Rejected, SlidingWindow, Timestamp, TokenBucket, Verdict,
};
use std::time::Duration;

/// Less than what the limiters are made for.
const LONGEST_RUN: Duration = YEAR.saturating_mul(90);
/// No clock goes on for that long, in nanoseconds; what is told is the end of its scale.
const END: u128 = 300 * YEAR.as_nanos();
/// Keeps a run short; what is larger differs in memory alone.
const LARGEST_WINDOW: u32 = 1 << 8;
/// A window of more has several parts, and of which one a permit is taken back depends on the thread.
const SURELY_ONE_PART: u32 = 64;

pub fn run(data: &[u8]) {
    play(data, scenario);
}

fn scenario(input: &mut Unstructured<'_>) -> Result<()> {
    let (algorithm, rule) = algorithm(input)?;
    let clock = Clock::manual();
    let Ok(limiter) = RateLimiter::builder("fuzzed", algorithm).clock(&clock).build() else {
        return Ok(());
    };
    let keyed = KeyedRateLimiter::builder("fuzzed", algorithm).clock(&clock).build();
    let mut run = Run {
        start: clock.now(),
        latest: clock.now(),
        clock,
        keyed: keyed.expect("as valid as without keys"),
        burst: limiter.status().burst,
        limiter,
        rule,
        rewinds: rarely(input)?,
        flying: Vec::new(),
    };
    while let Some(step) = Step::next(input)? {
        run.step(step, input)?;
        if run.elapsed() > LONGEST_RUN {
            break;
        }
    }
    if let Rule::Log(log) = &run.rule {
        log.never_exceeded();
    }
    Ok(())
}

fn algorithm(input: &mut Unstructured<'_>) -> Result<(Algorithm, Rule)> {
    let period = duration(input)?;
    let number = |input: &mut Unstructured<'_>| {
        Ok::<u32, arbitrary::Error>(if rarely(input)? {
            input.arbitrary()?
        } else {
            u32::from(input.arbitrary::<u8>()?)
        })
    };
    let (limit, burst) = (number(input)?, number(input)?);
    Ok(match input.int_in_range(0..=2)? {
        0 => (
            TokenBucket::new(limit, period).burst(burst).into(),
            Rule::Tokens(Tokens::new(limit, period, burst)),
        ),
        1 => {
            let most = if limit > 1 << 24 { limit } else { limit % LARGEST_WINDOW };
            (
                SlidingWindow::new(most, period).into(),
                Rule::Log(Log::new(most, period)),
            )
        }
        _ => {
            let (least, most) = (number(input)?, number(input)?);
            let algorithm = Adaptive::new(limit)
                .min_rate(least)
                .max_rate(most)
                .burst(burst)
                .window(period)
                .minimum_calls(number(input)?)
                .error_threshold(input.arbitrary()?)
                .adjustment_factor(input.arbitrary()?);
            let rates = (least.into(), most.into());
            let ceiling = Tokens::new(most, period, burst);
            (algorithm.into(), Rule::Between { rates, ceiling })
        }
    })
}

/// What a limiter has to keep to.
enum Rule {
    Tokens(Tokens),
    Log(Log),
    /// The rate is its own choice, within bounds.
    Between {
        rates: (f64, f64),
        ceiling: Tokens,
    },
}

impl Rule {
    fn at(&mut self, now: Duration) {
        let now = now.as_nanos();
        match self {
            Self::Tokens(tokens) | Self::Between { ceiling: tokens, .. } => tokens.at(now),
            Self::Log(log) => log.now = now,
        }
    }

    /// How long until so much is there, and by how much a limiter may be later; `None` if nobody knows.
    fn missing(&self, cost: u32) -> Option<(u128, u128)> {
        match self {
            Self::Tokens(tokens) => Some((tokens.missing(cost), tokens.lateness())),
            Self::Log(log) => Some((log.missing(cost), 0)),
            Self::Between { .. } => None,
        }
    }

    /// Whether every nanosecond brings a whole number of the fractions that are counted. Else a bucket may be late by a part of
    /// one, and each of two by another.
    fn is_exact(&self) -> bool {
        match self {
            Self::Tokens(tokens) => tokens.lateness() == 0,
            Self::Log(_) => true,
            Self::Between { .. } => false,
        }
    }

    fn taken(&mut self, cost: u32, permit: usize) {
        match self {
            Self::Tokens(tokens) | Self::Between { ceiling: tokens, .. } => tokens.take(cost),
            Self::Log(log) if cost > 0 => log.admissions.push((log.now, cost, permit)),
            Self::Log(_) => {}
        }
    }

    fn unused(&mut self, cost: u32, permit: usize, returned: bool) {
        match self {
            Self::Tokens(tokens) | Self::Between { ceiling: tokens, .. } => tokens.correct(cost, 0),
            Self::Log(log) => log.unused(permit, returned),
        }
    }

    fn corrected(&mut self, reserved: u32, cost: u32) {
        match self {
            Self::Tokens(tokens) | Self::Between { ceiling: tokens, .. } => tokens.correct(reserved, cost),
            Self::Log(_) => {}
        }
    }
}

/// Tokens in fractions of 1 / period, so that every nanosecond brings exactly `limit` of them.
struct Tokens {
    now: u128,
    limit: i128,
    period: i128,
    burst: i128,
    content: i128,
    /// Whole tokens, without those that came back.
    taken: i128,
    /// How often it has been at the bottom since it was full.
    bottoms: u32,
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The fractions of a token that a bucket counts are such that a burst of them fits in 61 bits.
const FRACTIONS: u128 = 1 << 61;

impl Tokens {
    fn new(limit: u32, period: Duration, burst: u32) -> Self {
        let period = i128::try_from(period.as_nanos()).expect("a valid one fits");
        let burst = period * i128::from(burst);
        Self {
            now: 0,
            limit: limit.into(),
            period,
            burst,
            content: burst,
            taken: 0,
            bottoms: 0,
        }
    }

    fn at(&mut self, now: u128) {
        let passed = i128::try_from(now.saturating_sub(self.now)).expect("a hundred years fit");
        self.fill(passed * self.limit);
        self.now = self.now.max(now);
    }

    fn fill(&mut self, more: i128) {
        self.content = (self.content + more).min(self.burst);
        if self.content == self.burst {
            self.bottoms = 0;
        }
    }

    /// In whatever order the times came: no more than the burst and what has come up to the latest of them.
    fn take(&mut self, cost: u32) {
        self.content -= self.period * i128::from(cost);
        self.taken += i128::from(cost);
        let since = i128::try_from(self.now).expect("a hundred years fit");
        let most = (self.burst + since * self.limit) / self.period;
        assert!(self.taken <= most, "above the limit: {} of {most}", self.taken);
    }

    fn missing(&self, cost: u32) -> u128 {
        let missing = self.period * i128::from(cost) - self.content;
        u128::try_from(missing).map_or(0, |missing| missing.div_ceil(self.limit.unsigned_abs()))
    }

    /// Only where the fractions of a token do not add up to whole nanoseconds, a bucket that was full may be late by one of them,
    /// and by one more for each time that it came to the bottom.
    fn lateness(&self) -> u128 {
        let (limit, period) = (self.limit.unsigned_abs(), self.period.unsigned_abs());
        let burst = self.burst.unsigned_abs() / period;
        let exact = period / gcd(limit, period);
        if exact * burst <= FRACTIONS {
            return 0;
        }
        let fractions = (FRACTIONS / burst).min(u128::from(u64::MAX) / limit);
        (1 + period.div_ceil(limit * fractions)) * u128::from(1 + self.bottoms)
    }

    /// A call cost less than it took, or more: then it leaves a debt, of one burst at most.
    fn correct(&mut self, reserved: u32, cost: u32) {
        let more = self.period * (i128::from(cost) - i128::from(reserved));
        if more > 0 {
            self.content = (self.content - more).max(self.content.min(-self.burst));
            self.bottoms += u32::from(self.content < self.period - self.burst);
        } else {
            self.fill(-more);
            self.taken += i128::from(cost) - i128::from(reserved);
        }
    }
}

/// Every admission: when, of what cost, by which permit.
struct Log {
    now: u128,
    most: u64,
    window: u128,
    admissions: Vec<(u128, u32, usize)>,
}

impl Log {
    fn new(most: u32, window: Duration) -> Self {
        Self {
            now: 0,
            most: most.into(),
            window: window.as_nanos(),
            admissions: Vec::new(),
        }
    }

    fn missing(&self, cost: u32) -> u128 {
        let recent = self.admissions.iter().filter(|(at, ..)| at + self.window > self.now);
        let used: u64 = recent.clone().map(|(_, cost, _)| u64::from(*cost)).sum();
        let mut too_many = (used + u64::from(cost)).saturating_sub(self.most);
        let mut wait = 0;
        for (at, cost, _) in recent {
            if too_many == 0 {
                break;
            }
            wait = at + self.window - self.now;
            too_many = too_many.saturating_sub(u64::from(*cost));
        }
        wait
    }

    fn unused(&mut self, permit: usize, returned: bool) {
        let at = self.admissions.iter().position(|(.., by)| *by == permit);
        let Some(at) = at else { return };
        let taken = self.admissions[at].0;
        let newest = self.admissions.last().is_some_and(|(last, ..)| *last == taken);
        let counts = taken + self.window > self.now;
        assert!(
            returned || !newest || !counts,
            "the newest admission is taken back for certain"
        );
        if returned {
            self.admissions.remove(at);
        }
    }

    fn never_exceeded(&self) {
        for (from, ..) in &self.admissions {
            let inside = self
                .admissions
                .iter()
                .filter(|(at, ..)| at >= from && at - from < self.window);
            let sum: u64 = inside.map(|(_, cost, _)| u64::from(*cost)).sum();
            assert!(sum <= self.most, "{sum} of {} in the window from {from}", self.most);
        }
    }
}

/// A limiter, the same one keyed with a single key, and the rule.
struct Run {
    clock: ManualClock,
    start: Timestamp,
    latest: Timestamp,
    limiter: RateLimiter,
    keyed: KeyedRateLimiter,
    rule: Rule,
    burst: u32,
    /// Whether threads that were held up see old times. The answers are then anybody's, but never too many.
    rewinds: bool,
    flying: Vec<(usize, RateLimitPermit, Option<KeyedPermit>)>,
}

impl Run {
    fn elapsed(&self) -> Duration {
        self.clock.now().duration_since(self.start)
    }

    fn step(&mut self, step: Step, input: &mut Unstructured<'_>) -> Result<()> {
        match step {
            Step::Advance(by) => self.advance(by.min(YEAR)),
            Step::Rewind(by) if self.rewinds => self.clock.rewind(by.min(self.elapsed())),
            Step::Take | Step::Rewind(_) => {
                let cost = self.cost(input)?;
                self.take(cost, input.arbitrary()?);
            }
            Step::End => self.end(input)?,
        }
        self.check_status();
        Ok(())
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
        self.latest = self.latest.max(self.clock.now());
    }

    /// Any cost; small ones and the largest that fits mostly, as these meet each other.
    fn cost(&self, input: &mut Unstructured<'_>) -> Result<u32> {
        Ok(match input.int_in_range(0..=3)? {
            0 => input.arbitrary()?,
            1 => self.burst,
            _ => u32::from(input.arbitrary::<u8>()?) % self.burst.min(4).saturating_add(1),
        })
    }

    /// Asks; if refused and `waits`, waits as told and asks again.
    fn take(&mut self, cost: u32, waits: bool) {
        let Err(refused) = self.ask(cost) else { return };
        if cost > self.burst {
            let (burst, reason) = (self.burst, refused.reason);
            assert_eq!(reason, Reason::CostExceedsBurst { cost, burst });
            assert_eq!(refused.retry_after, None, "it will never fit");
            return;
        }
        assert_eq!(refused.reason, Reason::OverLimit);
        let wait = refused.retry_after.expect("it fits, one day");
        assert!(wait > Duration::ZERO, "refused now, so the time to retry is not now");
        if !waits || self.rewinds || wait > YEAR {
            return;
        }
        self.advance(just_before(wait));
        let early = self.ask(cost).expect_err("refused one nanosecond early");
        assert_eq!(early.retry_after, Some(NANOSECOND), "told {wait:?}");
        self.advance(NANOSECOND);
        if let Err(again) = self.ask(cost) {
            panic!("a cost of {cost}, told to wait {wait:?}, did, and was refused: {again:?}");
        }
    }

    fn ask(&mut self, cost: u32) -> std::result::Result<(), Rejected> {
        let foretold = self.limiter.status().retry_after;
        let answer = self.limiter.try_acquire_n(cost);
        let keyed = self.keyed.try_acquire_n("one", cost);
        let both = [answer.as_ref().err(), keyed.as_ref().err()];
        if self.rule.is_exact() && !self.rewinds {
            assert_eq!(both[0], both[1], "a single key is limited as if there were no keys");
        }
        if cost == 1 {
            let met = answer.as_ref().err().and_then(|refused| refused.retry_after);
            assert_eq!(foretold, met, "the status tells what the next call meets");
        }
        if !self.rewinds && (1..=self.burst).contains(&cost) {
            self.check(cost, answer.as_ref().err());
        } else {
            self.rule.at(self.latest.duration_since(self.start));
        }
        let permit = answer?;
        assert_eq!(permit.cost(), cost);
        let number = usize::try_from(self.limiter.status().accepted_requests).expect("few");
        if let (Rule::Log(log), true) = (&mut self.rule, self.rewinds) {
            log.now = self.clock.now().duration_since(self.start).as_nanos();
        }
        self.rule.taken(cost, number);
        self.flying.push((number, permit, keyed.ok()));
        Ok(())
    }

    /// The answer is what the rule says.
    fn check(&mut self, cost: u32, refused: Option<&Rejected>) {
        self.rule.at(self.elapsed());
        let Some((exact, late)) = self.rule.missing(cost) else {
            return;
        };
        match refused.map(|why| why.retry_after.unwrap_or_default().as_nanos()) {
            None => assert_eq!(exact, 0, "above the limit: a cost of {cost} too early"),
            Some(wait) => assert!(
                exact.min(END) <= wait && (wait <= exact + late || exact >= END),
                "below the limit: told to wait {wait} ns for a cost of {cost}, the rule says {exact} (+ {late})"
            ),
        }
    }

    /// One of the calls in flight ends in one of the ways there are.
    fn end(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (which, how) = (input.arbitrary::<u8>()?, input.int_in_range(0..=4)?);
        let true_cost = self.cost(input)?;
        let Some(last) = self.flying.len().checked_sub(1) else {
            return Ok(());
        };
        let (number, permit, keyed) = self.flying.swap_remove(usize::from(which) % (last + 1));
        let reserved = permit.cost();
        if !self.rewinds {
            self.rule.at(self.elapsed());
        }
        let verdict = match how {
            0 => Verdict::new(Outcome::Success),
            1 => Verdict::new(Outcome::Failure),
            // Under old times a rule cannot tell what comes back.
            2 if !self.rewinds => Verdict::new(Outcome::Ignored).cost(true_cost),
            3 if !self.rewinds && self.is_one_part() => {
                let before = self.limiter.status().returned_requests;
                permit.unused();
                if let Some(keyed) = keyed {
                    keyed.unused();
                }
                let returned = self.limiter.status().returned_requests - before;
                self.rule.unused(reserved, number, returned > 0);
                return Ok(());
            }
            _ => return Ok(()),
        };
        if let Some(cost) = verdict.cost {
            self.rule.corrected(reserved, cost);
        }
        permit.settle(verdict);
        if let Some(keyed) = keyed {
            keyed.settle(verdict);
        }
        Ok(())
    }

    fn is_one_part(&self) -> bool {
        !matches!(self.rule, Rule::Log(_)) || self.burst < SURELY_ONE_PART
    }

    fn check_status(&self) {
        let (status, quota) = (self.limiter.status(), self.limiter.quota());
        let available = status.available_tokens;
        assert!(
            (0.0..=f64::from(status.burst)).contains(&available),
            "{available} of {} are available",
            status.burst
        );
        assert!(
            quota.remaining <= u64::from(status.burst),
            "no more remains than there can be"
        );
        if let Rule::Between {
            rates: (least, most), ..
        } = self.rule
        {
            assert!((least..=most).contains(&status.rate), "the rate is {}", status.rate);
        }
        let refused = status.rejected.over_limit + status.rejected.cost_exceeds_burst;
        assert_eq!(status.rejected_requests, refused + status.rejected.missing_key);
        assert!(status.accepted_requests >= self.flying.len() as u64);
    }
}
