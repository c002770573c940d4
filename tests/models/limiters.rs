//! Each limiter against its rule.

use crate::{
    NANO, YEAR,
    rules::{Habits, Log, Moving, Rule, Tokens},
    steps::{Dice, Kind, Share, Tally, run, steps},
};
use portcullis::{
    Algorithm, Clock, ManualClock, Outcome, RateLimitPermit, RateLimiter, RateLimiterStatus, Reason, Rejected,
    Timestamp, Verdict,
};
use proptest::{prelude::*, test_runner::TestCaseResult};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    time::Duration,
};

/// No clock goes on for that long; what is told instead is the end of its scale.
const SCALE: Duration = Duration::from_secs(300 * YEAR.as_secs());

/// What a call costs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cost {
    /// One, two or three: they are the ones that meet each other.
    Small(u32),
    /// Modulo what the limit holds at once.
    Any(u32),
    Nothing,
    /// So much more than the limit ever holds.
    TooMuch(u32),
}

impl Cost {
    pub(crate) fn read(dice: &mut Dice) -> Self {
        let kind = dice.below(40);
        let number = u32::try_from(dice.below(1 << 24)).expect("small");
        match kind {
            0..24 => Self::Small(number % 3),
            24..37 => Self::Any(number),
            37 | 38 => Self::Nothing,
            _ => Self::TooMuch(number),
        }
    }

    pub(crate) fn of(self, burst: u32) -> u32 {
        match self {
            Self::Small(cost) => cost.min(burst - 1) + 1,
            Self::Any(any) => any % burst + 1,
            Self::Nothing => 0,
            Self::TooMuch(more) => burst.saturating_add(more).saturating_add(1),
        }
    }
}

/// How time passes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pass {
    Tick(u64),
    /// In thousandths of the limiter's period.
    Thousandths(u64),
    Years(u32),
}

impl Pass {
    pub(crate) fn read(dice: &mut Dice) -> Self {
        match dice.below(20) {
            0..5 => Self::Tick(dice.up_to(3)),
            5..17 => Self::Thousandths(dice.below(1_500)),
            17 | 18 => Self::Thousandths(dice.below(200_000)),
            _ => Self::Years(u32::try_from(dice.up_to(2)).expect("two")),
        }
    }

    /// Never nothing, and leaves room for more.
    pub(crate) fn of(self, period: Duration) -> Duration {
        match self {
            Self::Tick(nanos) => Duration::from_nanos(nanos),
            Self::Thousandths(n) => {
                let nanos = period.as_nanos() * u128::from(n) / 1_000;
                let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
                time.clamp(NANO, YEAR)
            }
            Self::Years(years) => YEAR * years,
        }
    }
}

/// What a call has cost in truth.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Truth {
    /// As reserved, or one more or less.
    Near(u32),
    /// Anything up to what leads from a full bucket into the deepest debt.
    Any(u32),
}

impl Truth {
    pub(crate) fn read(dice: &mut Dice) -> Self {
        let (near, any) = (dice.below(2) == 0, dice.below(1 << 24));
        let any = u32::try_from(any).expect("small");
        if near { Self::Near(any % 3) } else { Self::Any(any) }
    }

    pub(crate) fn of(self, reserved: u32, burst: u32) -> u32 {
        match self {
            Self::Near(more) => reserved.saturating_add(more).saturating_sub(1),
            Self::Any(any) => any % burst.saturating_mul(2),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Take(Cost),
    /// A call that waits as long as it is told to.
    Wait(Cost),
    /// Ends a call; its true cost may be known by now.
    Settle(usize, Outcome, Option<Truth>),
    Drop(usize),
    /// A call is dropped by a panic.
    Panic(usize),
    /// A call was never made.
    Unused(usize),
    Pass(Pass),
}

impl Step {
    fn read(dice: &mut Dice) -> Self {
        match dice.below(100) {
            0..31 => Self::Take(Cost::read(dice)),
            31..35 => Self::Wait(Cost::read(dice)),
            35..57 => {
                let (index, outcome) = (dice.index(), outcome(dice));
                Self::Settle(index, outcome, (dice.below(3) == 0).then(|| Truth::read(dice)))
            }
            57..77 => Self::Drop(dice.index()),
            77 => Self::Panic(dice.index()),
            78..82 => Self::Unused(dice.index()),
            _ => Self::Pass(Pass::read(dice)),
        }
    }
}

pub(crate) fn outcome(dice: &mut Dice) -> Outcome {
    match dice.below(10) {
        0..7 => Outcome::Success,
        7..9 => Outcome::Failure,
        _ => Outcome::Ignored,
    }
}

/// What a limiter has counted.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Counts {
    pub(crate) accepted: u64,
    pub(crate) cost: u64,
    pub(crate) returned: u64,
    pub(crate) over_limit: u64,
    pub(crate) too_much: u64,
}

impl Counts {
    pub(crate) fn check(&self, status: &RateLimiterStatus) -> TestCaseResult {
        let shown = Self {
            accepted: status.accepted_requests,
            cost: status.accepted_cost,
            returned: status.returned_requests,
            over_limit: status.rejected.over_limit,
            too_much: status.rejected.cost_exceeds_burst,
        };
        prop_assert_eq!(&shown, self);
        prop_assert_eq!(status.rejected_requests, self.over_limit + self.too_much);
        let all = self.accepted + status.rejected_requests;
        let percent = (all > 0).then(|| self.accepted as f64 * 100.0 / all as f64);
        prop_assert_eq!(status.acceptance_rate, percent);
        Ok(())
    }
}

/// What is told of a wait is what the rule says, or later by so much as it may be.
pub(crate) fn check_wait(rule: &impl Rule, cost: u32, told: Option<Duration>) -> TestCaseResult {
    match (told, rule.missing(cost)) {
        (None, None) => Ok(()),
        (None, Some(wait)) => Err(TestCaseError::fail(format!(
            "above the limit: a cost of {cost} has room {wait} ns too early"
        ))),
        (Some(told), exact) => {
            let (told, scale) = (told.as_nanos(), SCALE.as_nanos());
            let exact = exact.unwrap_or(0).min(scale);
            let late = rule.lateness();
            prop_assert!(
                exact <= told && (told <= exact + late || exact == scale),
                "below the limit: told to wait {} ns for a cost of {}, the rule says {} (+ {})",
                told,
                cost,
                exact,
                late
            );
            Ok(())
        }
    }
}

/// The limiter shows what the rule says.
pub(crate) fn check_state(rule: &impl Rule, status: &RateLimiterStatus) -> TestCaseResult {
    let (rate, due) = (status.rate, rule.rate());
    prop_assert!((rate - due).abs() < 1e-9 * due, "the rate is {}, not {}", rate, due);
    let (least, most) = rule.available();
    let there = status.available_tokens;
    prop_assert!(
        least <= there && there <= most,
        "{} are there, not {} to {}",
        there,
        least,
        most
    );
    check_wait(rule, 1, status.retry_after)
}

/// A call in flight.
struct Flight {
    permit: RateLimitPermit,
    /// Its number among all admissions, and when it was admitted.
    number: usize,
    at: u128,
}

/// A limiter beside its rule.
struct Pair<'a, R> {
    clock: ManualClock,
    start: Timestamp,
    limiter: RateLimiter,
    rule: R,
    tally: &'a Tally,
    period: Duration,
    burst: u32,
    /// What the last status told of the next call.
    foretold: Option<Duration>,
    flights: Vec<Flight>,
    admissions: usize,
    counts: Counts,
}

impl<'a, R: Rule> Pair<'a, R> {
    fn new((algorithm, rule): (impl Into<Algorithm>, R), tally: &'a Tally) -> Self {
        let clock = Clock::manual();
        let limiter = RateLimiter::builder("agent", algorithm).clock(&clock).build();
        let limiter = limiter.expect("valid settings");
        let status = limiter.status();
        Self {
            start: clock.now(),
            period: status.period,
            burst: status.burst,
            foretold: status.retry_after,
            clock,
            limiter,
            rule,
            tally,
            flights: Vec::new(),
            admissions: 0,
            counts: Counts::default(),
        }
    }

    fn now(&self) -> u128 {
        self.clock.now().duration_since(self.start).as_nanos()
    }

    /// Whether the steps have left the hundred years that the limiters are made for.
    fn is_over(&self) -> bool {
        self.now() > (90 * YEAR).as_nanos()
    }

    /// The end of a step.
    fn done(&mut self, kind: Kind) -> TestCaseResult {
        let status = self.limiter.status();
        check_state(&self.rule, &status)?;
        self.counts.check(&status)?;
        self.foretold = status.retry_after;
        self.tally.count(kind);
        Ok(())
    }

    fn pass(&mut self, time: Duration) -> TestCaseResult {
        if time == NANO {
            self.tally.meet("a nanosecond");
        } else if time >= YEAR {
            self.tally.meet("a year or more");
        }
        self.clock.advance(time);
        self.rule.at(self.now());
        if let Some(moved) = self.rule.moved() {
            self.tally.meet(moved);
        }
        self.done(Kind::Time)
    }

    /// Asks for so much. Whether it was refused for want of room, and how long.
    fn take(&mut self, cost: u32) -> Result<Option<Duration>, TestCaseError> {
        let answer = self.limiter.try_acquire_n(cost);
        if cost > self.burst {
            let why = answer.err().map(|why| (why.reason, why.retry_after));
            let burst = self.burst;
            prop_assert_eq!(why, Some((Reason::CostExceedsBurst { cost, burst }, None)));
            self.counts.too_much += 1;
            self.tally.meet("a cost above the burst");
            self.done(Kind::Other)?;
            return Ok(None);
        }
        let told = answer.as_ref().err().and_then(|why| why.retry_after);
        if cost == 1 {
            prop_assert_eq!(told, self.foretold, "the status tells what the next call meets");
        }
        if cost > 0 {
            check_wait(&self.rule, cost, told)?;
        }
        match answer {
            Ok(permit) => self.admitted(permit, cost),
            Err(why) => self.refused(&why),
        }?;
        Ok(told)
    }

    fn admitted(&mut self, permit: RateLimitPermit, cost: u32) -> TestCaseResult {
        prop_assert_eq!(permit.cost(), cost);
        if cost > 0 {
            self.rule.take(self.admissions, cost);
        } else {
            self.tally.meet("a call that costs nothing");
        }
        self.flights.push(Flight {
            permit,
            number: self.admissions,
            at: self.now(),
        });
        self.admissions += 1;
        self.counts.accepted += 1;
        self.counts.cost += u64::from(cost);
        self.done(Kind::Admitted)
    }

    fn refused(&mut self, why: &Rejected) -> TestCaseResult {
        prop_assert_eq!(&why.reason, &Reason::OverLimit);
        prop_assert!(why.retry_after > Some(Duration::ZERO));
        self.counts.over_limit += 1;
        self.done(Kind::Other)
    }

    /// Asks for so much; if refused, waits as told and finds that the time was right to the nanosecond.
    fn wait(&mut self, cost: u32) -> TestCaseResult {
        let Some(wait) = self.take(cost)?.filter(|wait| *wait < YEAR) else {
            return Ok(());
        };
        if wait > NANO {
            self.pass(wait.saturating_sub(NANO))?;
        }
        prop_assert_eq!(self.take(cost)?, Some(NANO), "still true one nanosecond early");
        self.pass(NANO)?;
        prop_assert_eq!(self.take(cost)?, None, "admitted after the time it was told");
        Ok(())
    }

    /// Ends one of the calls in flight; asks for one if there is none.
    fn end(&mut self, index: usize, kind: Kind, end: impl FnOnce(&mut Self, Flight)) -> TestCaseResult {
        if self.flights.is_empty() {
            return self.take(1).map(|_| ());
        }
        let flight = self.flights.swap_remove(index % self.flights.len());
        end(self, flight);
        self.done(kind)
    }

    fn unused(&mut self, flight: Flight) {
        let (before, cost) = (self.limiter.status().returned_requests, flight.permit.cost());
        flight.permit.unused();
        let returned = self.limiter.status().returned_requests - before;
        // If not, the counts differ.
        if returned > 0 || cost == 0 || self.rule.must_take_back(flight.at) {
            self.counts.returned += 1;
            self.rule.take_back(flight.number, cost);
        } else {
            self.tally.meet("a permit that is not taken back");
        }
    }

    fn settle(&mut self, flight: Flight, outcome: Outcome, truth: Option<Truth>) {
        let (mut verdict, reserved) = (Verdict::new(outcome), flight.permit.cost());
        if let Some(truth) = truth {
            let cost = truth.of(reserved, self.burst);
            verdict = verdict.cost(cost);
            self.rule.correct(reserved, cost);
            if self.rule.available().1 < 1e-3 {
                self.tally.meet("nothing left at the end of a call");
            }
        }
        self.rule.end(Some(outcome));
        flight.permit.settle(verdict);
    }

    fn step(&mut self, step: Step) -> TestCaseResult {
        match step {
            Step::Take(cost) => self.take(cost.of(self.burst)).map(|_| ()),
            Step::Wait(cost) => self.wait(cost.of(self.burst)),
            Step::Settle(index, outcome, truth) => self.end(index, Kind::Settled, |pair, flight| {
                pair.settle(flight, outcome, truth);
            }),
            Step::Drop(index) => self.end(index, Kind::Dropped, |pair, flight| {
                pair.rule.end(None);
                drop(flight);
            }),
            Step::Panic(index) => self.end(index, Kind::Dropped, |pair, flight| {
                pair.rule.end(Some(Outcome::Failure));
                let panics = AssertUnwindSafe(|| {
                    let _flight = flight;
                    resume_unwind(Box::new(()))
                });
                let _: Result<(), _> = catch_unwind(panics);
            }),
            Step::Unused(index) => self.end(index, Kind::Other, Self::unused),
            Step::Pass(pass) => self.pass(pass.of(self.period)),
        }
    }

    fn follow(mut self, steps: &[Step]) -> TestCaseResult {
        for step in steps {
            if self.is_over() {
                break;
            }
            self.step(*step)?;
        }
        Ok(())
    }
}

/// Periods from a nanosecond to a hundred years, round and odd ones.
pub(crate) fn periods() -> impl Strategy<Value = Duration> {
    prop_oneof![
        4 => (1..1000u64).prop_map(Duration::from_millis),
        2 => (1..10_000_000_000u64).prop_map(Duration::from_nanos),
        1 => (1..20u64).prop_map(Duration::from_nanos),
        1 => (1..=100u32).prop_map(|years| YEAR * years),
        1 => Just(Duration::from_secs(3)),
        1 => Just(Duration::from_secs(86_400)),
    ]
}

pub(crate) fn buckets() -> impl Strategy<Value = (u32, Duration, u32)> {
    let limit = prop_oneof![6 => 1..20u32, 2 => 1..100_000u32, 1 => any::<u32>().prop_map(|n| n.max(1))];
    let burst = prop_oneof![6 => 1..20u32, 1 => 1..2_000_000u32];
    (limit, periods(), burst)
}

/// From 64 on, what one thread takes lies in more than one place.
pub(crate) fn windows() -> impl Strategy<Value = (u32, Duration)> {
    (prop_oneof![3 => 1..12u32, 1 => 64..300u32], periods())
}

pub(crate) fn habits() -> impl Strategy<Value = Habits> {
    let rates = (2..40u32, 1..=4u32, 1..=4u32, 1..40u32);
    // Few calls often fail exactly as many as may.
    let threshold = prop_oneof![prop::sample::select([0.25, 0.5, 1.0].as_slice()), 0.05..0.9f64];
    let judgement = (1..6u32, threshold, 0.05..0.95f64);
    let cancelled = prop_oneof![Just(Outcome::Ignored), Just(Outcome::Failure), Just(Outcome::Success)];
    (rates, periods(), judgement, cancelled).prop_map(|(rates, window, judgement, cancelled)| {
        let (base, under, over, burst) = rates;
        let (minimum_calls, error_threshold, factor) = judgement;
        Habits {
            base,
            bounds: ((base / under).max(1), base * over),
            burst,
            window,
            minimum_calls,
            error_threshold,
            factor,
            cancelled,
        }
    })
}

const TO_MEET: [&str; 5] = [
    "a nanosecond",
    "a year or more",
    "a cost above the burst",
    "a call that costs nothing",
    "nothing left at the end of a call",
];

fn check<R: Rule, A: Into<Algorithm>>(model: &str, to_meet: &[&str], limits: impl Strategy<Value = (A, R)>) {
    let cases = (limits, steps(200, Step::read));
    let to_meet = [&TO_MEET, to_meet].concat();
    run(model, Share::LIMITER, &to_meet, &cases, |tally, (limit, steps)| {
        Pair::new(limit, tally).follow(&steps)
    });
}

#[test]
fn a_token_bucket_admits_what_exact_arithmetic_admits() {
    let limits = buckets().prop_map(|(limit, period, burst)| Tokens::new(limit, period, burst));
    check("the token bucket", &[], limits);
}

#[test]
fn a_sliding_window_admits_what_the_list_of_its_admissions_allows() {
    let limits = windows().prop_map(|(max_requests, window)| Log::new(max_requests, window));
    check("the sliding window", &["a permit that is not taken back"], limits);
}

#[test]
fn an_adaptive_limiter_follows_its_rule() {
    let moves = [
        "a rate that falls",
        "a rate that rises",
        "a rate that stays for want of outcomes",
        "a rate that stays for want of use",
    ];
    check("the adaptive limiter", &moves, habits().prop_map(Moving::new));
}

#[test]
fn steps_that_once_went_wrong_go_right() {
    let any = |cost: u32| Step::Take(Cost::Any(cost - 1));
    let settle = |index, cost| Step::Settle(index, Outcome::Ignored, Some(Truth::Any(cost)));
    let pass = |thousandths| Step::Pass(Pass::Thousandths(thousandths));
    let fail = Step::Settle(0, Outcome::Failure, None);
    let day = Duration::from_secs(86_400);
    let buckets = [
        (1, YEAR, 391, vec![any(1), any(117), settle(0, 450), any(265)]),
        (
            51_123,
            Duration::from_secs(3),
            10,
            vec![pass(1), any(6), any(1), any(2), settle(1, 12), any(1)],
        ),
        (6, 77 * YEAR, 16, vec![any(14), fail, any(1), settle(0, 18), any(14)]),
        (
            14,
            day,
            1_457_692,
            vec![
                pass(46),
                Step::Wait(Cost::Any(977_471)),
                any(2),
                any(1),
                settle(1, 1_937_911),
                settle(1, 2),
                Step::Unused(0),
                any(273_697),
            ],
        ),
        (
            7,
            day,
            172_687,
            vec![
                pass(58_544),
                Step::Wait(Cost::Any(17_928)),
                any(3),
                settle(1, 327_445),
                Step::Pass(Pass::Tick(1)),
                settle(0, 178),
                any(124_403),
            ],
        ),
    ];
    let tally = Tally::default();
    for (limit, period, burst, steps) in buckets {
        let pair = Pair::new(Tokens::new(limit, period, burst), &tally);
        pair.follow(&steps)
            .unwrap_or_else(|why| panic!("{limit} in {period:?}, {burst} at once: {why}"));
    }
    let log = Pair::new(Log::new(1, Duration::from_millis(1)), &tally);
    let unused = Step::Unused(0);
    log.follow(&[any(1), pass(1_001), any(1), unused, unused, any(1)])
        .expect("a refund of what has left the window frees nobody");
    let habits = Habits {
        base: 2,
        bounds: (1, 6),
        burst: 7,
        window: Duration::from_micros(1),
        minimum_calls: 1,
        error_threshold: 0.1,
        factor: 0.25,
        cancelled: Outcome::Ignored,
    };
    Pair::new(Moving::new(habits), &tally)
        .follow(&[any(4), any(1), fail, settle(0, 6), pass(1_000), any(1)])
        .expect("what is overdrawn is paid for at the new rate");
}
