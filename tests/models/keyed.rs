//! Each keyed limiter against a rule for each key, one for all that find no place, and which keys may have one.
//!
//! Which of several keys that have their whole quota makes room is the limiter's own business: such a key is as good as one that
//! has no place, so the model lets any of them go. Only of an adaptive limiter it matters, whose keys forget their rate; there the
//! set has one place, or enough for all.

use crate::{
    NANO, YEAR,
    limiters::{Cost, Counts, Pass, Truth, buckets, check_state, check_wait, habits, outcome, windows},
    rules::{Log, Moving, Rule, Tokens},
    steps::{Dice, Kind, Share, Tally, run, steps},
};
use portcullis::{
    Algorithm, Clock, KeyedPermit, KeyedRateLimiter, KeysStatus, ManualClock, Outcome, RateLimiterStatus, Reason,
    Timestamp, Verdict,
};
use proptest::{prelude::*, test_runner::TestCaseResult};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

type Key = u64;

const KEYS: u64 = 8;

#[derive(Debug, Clone, Copy)]
enum Step {
    Take(Key, Cost),
    /// A call that waits as long as it is told to.
    Wait(Key, Cost),
    Settle(usize, Outcome, Option<Truth>),
    Drop(usize),
    Unused(usize),
    Pass(Pass),
}

impl Step {
    fn read(dice: &mut Dice) -> Self {
        match dice.below(100) {
            0..32 => Self::Take(dice.below(KEYS), Cost::read(dice)),
            32..35 => Self::Wait(dice.below(KEYS), Cost::read(dice)),
            35..57 => {
                let (index, outcome) = (dice.index(), outcome(dice));
                Self::Settle(index, outcome, (dice.below(3) == 0).then(|| Truth::read(dice)))
            }
            57..76 => Self::Drop(dice.index()),
            76..82 => Self::Unused(dice.index()),
            _ => Self::Pass(Pass::read(dice)),
        }
    }
}

/// A key that has a place.
#[derive(Debug, Clone)]
struct Tracked<R> {
    rule: R,
    /// It may have its whole quota sooner than could be foreseen: something was given back, or the rate has risen. It need not
    /// make room at once then.
    early: bool,
    refusals: u32,
}

/// Whose quota a call was admitted by.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Key(Key),
    Overflow,
}

struct Flight {
    permit: KeyedPermit,
    place: Place,
    number: usize,
    at: u128,
}

struct Pair<'a, R> {
    clock: ManualClock,
    start: Timestamp,
    limiter: KeyedRateLimiter,
    tally: &'a Tally,
    period: Duration,
    burst: u32,
    max_keys: usize,
    /// Whether a key that makes room loses more than it has.
    forgets: bool,
    fresh: R,
    keys: BTreeMap<Key, Tracked<R>>,
    overflow: R,
    flights: Vec<Flight>,
    admissions: usize,
    counts: Counts,
    /// As the last status showed it.
    shown: KeysStatus,
}

fn keys_of(status: &RateLimiterStatus) -> KeysStatus {
    status.keys.clone().expect("keyed")
}

impl<'a, R: Rule> Pair<'a, R> {
    fn new((algorithm, rule): (Algorithm, R), max_keys: usize, tally: &'a Tally) -> Self {
        let clock = Clock::manual();
        let limiter = KeyedRateLimiter::builder("api", algorithm).max_keys(max_keys);
        let limiter = limiter.clock(&clock).build().expect("valid settings");
        let status = limiter.status();
        Self {
            start: clock.now(),
            period: status.period,
            burst: status.burst,
            max_keys,
            forgets: matches!(algorithm, Algorithm::Adaptive(_)),
            shown: keys_of(&status),
            clock,
            limiter,
            tally,
            fresh: rule.clone(),
            keys: BTreeMap::new(),
            overflow: rule,
            flights: Vec::new(),
            admissions: 0,
            counts: Counts::default(),
        }
    }

    fn now(&self) -> u128 {
        self.clock.now().duration_since(self.start).as_nanos()
    }

    fn is_full(&self) -> bool {
        self.keys.len() == self.max_keys
    }

    /// Whether a key that certainly can make room is there.
    fn has_room_for_certain(&self) -> bool {
        let can_go = |tracked: &Tracked<R>| tracked.rule.whole().1 && !tracked.early;
        !self.is_full() || self.keys.values().any(can_go)
    }

    /// Whether the key certainly has a place: what it has used is not forgotten.
    fn has_place_for_certain(&self, key: Key) -> bool {
        let tracked = self.keys.get(&key);
        tracked.is_some_and(|tracked| self.forgets || !tracked.rule.whole().0)
    }

    /// One of the keys that may have gone has. If it may be one of those that need not, nobody knows which are left.
    fn blur(&mut self) {
        let mut may_go: Vec<_> = self.keys.values_mut().filter(|key| key.rule.whole().0).collect();
        let early = may_go.iter().any(|key| key.early);
        for key in &mut may_go {
            key.early |= early;
        }
    }

    /// Any of the keys that may make room.
    fn let_go(&mut self) -> TestCaseResult {
        let may_go = self.keys.iter().find(|(_, tracked)| tracked.rule.whole().0);
        let Some(key) = may_go.map(|(key, _)| *key) else {
            return Err(TestCaseError::fail("a key that is in use made room"));
        };
        self.keys.remove(&key);
        Ok(())
    }

    /// A key has got a place, or had one.
    fn place(&mut self, key: Key, evicted: bool) -> TestCaseResult {
        if evicted {
            self.tally.meet(if self.has_room_for_certain() {
                "a key that had to make room"
            } else {
                "a key that made room all the same"
            });
            prop_assert!(self.is_full(), "a key made room where there was some");
            prop_assert!(!self.has_place_for_certain(key), "a key that has a place took another");
        }
        if evicted || self.is_full() && !self.keys.contains_key(&key) {
            self.blur();
        }
        if self.keys.contains_key(&key) {
            return Ok(());
        }
        let known = !evicted && self.is_full();
        prop_assert!(!(known && self.forgets), "a key without a place has one");
        if self.is_full() {
            self.let_go()?;
        }
        let tracked = Tracked {
            rule: self.fresh.clone(),
            // The limiter has let another go than the model has: who knows what it was given back.
            early: known,
            refusals: 0,
        };
        self.keys.insert(key, tracked);
        Ok(())
    }

    fn rule(&mut self, place: Place) -> Option<&mut R> {
        match place {
            Place::Key(key) => self.keys.get_mut(&key).map(|tracked| &mut tracked.rule),
            Place::Overflow => Some(&mut self.overflow),
        }
    }

    /// What a status shows of the keys after a step, of which the limiter decides where the key of this step has its place.
    fn find_place(&mut self, key: Key) -> Result<Place, TestCaseError> {
        let shown = keys_of(&self.limiter.status());
        let evicted = shown.evicted - self.shown.evicted;
        let overflowed = shown.overflow_requests - self.shown.overflow_requests;
        prop_assert!(evicted + overflowed <= 1, "{:?} after {:?}", shown, self.shown);
        self.shown = shown;
        if overflowed == 0 {
            self.place(key, evicted == 1)?;
            return Ok(Place::Key(key));
        }
        prop_assert!(!self.has_room_for_certain(), "no room beside a key that can go");
        prop_assert!(!self.has_place_for_certain(key), "a key has lost its place");
        self.tally.meet("a key that found no place");
        Ok(Place::Overflow)
    }

    /// The end of a step.
    fn done(&mut self, kind: Kind) -> TestCaseResult {
        let status = self.limiter.status();
        self.counts.check(&status)?;
        // What the next new key would meet.
        let fresh = check_state(&self.fresh, &status);
        if self.has_room_for_certain() {
            fresh?;
        } else if fresh.is_err() {
            check_state(&self.overflow, &status)?;
        }
        let shown = keys_of(&status);
        prop_assert_eq!(shown.tracked, self.keys.len());
        prop_assert_eq!(shown.max, self.max_keys);
        prop_assert_eq!(shown.evicted, self.shown.evicted);
        prop_assert_eq!(shown.overflow_requests, self.shown.overflow_requests);
        prop_assert_eq!(shown.missing_key_requests, 0);
        // With one place, or one for each key, nobody need guess who is there.
        let all_known = self.max_keys == 1 || self.max_keys == usize::try_from(KEYS).expect("few");
        if all_known {
            let refused = self.keys.iter().filter(|(_, tracked)| tracked.refusals > 0);
            let refused: BTreeSet<_> = refused
                .map(|(key, tracked)| (format!("{:016x}", self.limiter.fingerprint(key)), tracked.refusals))
                .collect();
            let told = shown.most_rejected.iter().map(|key| (key.key.clone(), key.rejected));
            prop_assert_eq!(told.collect::<BTreeSet<_>>(), refused);
        }
        self.tally.count(kind);
        Ok(())
    }

    fn pass(&mut self, time: Duration) -> TestCaseResult {
        self.clock.advance(time);
        let now = self.now();
        self.fresh.at(now);
        self.overflow.at(now);
        for tracked in self.keys.values_mut() {
            let rate = tracked.rule.rate();
            tracked.rule.at(now);
            tracked.early |= tracked.rule.rate() > rate;
        }
        self.done(Kind::Time)
    }

    /// Asks for so much: where, and how long it was refused for want of room.
    fn take(&mut self, key: Key, cost: u32) -> Result<(Place, Option<Duration>), TestCaseError> {
        let answer = self.limiter.try_acquire_n(&key, cost);
        if cost > self.burst {
            let why = answer.err().map(|why| (why.reason, why.retry_after));
            let burst = self.burst;
            prop_assert_eq!(why, Some((Reason::CostExceedsBurst { cost, burst }, None)));
            self.counts.too_much += 1;
            self.count_refusal(Place::Key(key));
            self.done(Kind::Other)?;
            return Ok((Place::Key(key), None));
        }
        let place = if cost == 0 {
            Place::Key(key)
        } else {
            self.find_place(key)?
        };
        let told = answer.as_ref().err().and_then(|why| why.retry_after);
        let (now, number) = (self.now(), self.admissions);
        if cost > 0 {
            let rule = self.rule(place).expect("it has a place");
            check_wait(rule, cost, told)?;
            if answer.is_ok() {
                rule.take(number, cost);
            }
        }
        if let Ok(permit) = answer {
            prop_assert_eq!(permit.cost(), cost);
            self.flights.push(Flight {
                permit,
                place,
                number,
                at: now,
            });
            self.admissions += 1;
            self.counts.accepted += 1;
            self.counts.cost += u64::from(cost);
            self.done(Kind::Admitted)?;
        } else {
            prop_assert!(told > Some(Duration::ZERO));
            self.counts.over_limit += 1;
            self.count_refusal(place);
            self.done(Kind::Other)?;
        }
        Ok((place, told))
    }

    fn count_refusal(&mut self, place: Place) {
        if let Place::Key(key) = place
            && let Some(tracked) = self.keys.get_mut(&key)
        {
            tracked.refusals += 1;
        }
    }

    /// Asks for so much; if its own quota refuses it, waits as told and finds that the time was right to the nanosecond.
    fn wait(&mut self, key: Key, cost: u32) -> TestCaseResult {
        let (Place::Key(_), Some(wait)) = self.take(key, cost)? else {
            return Ok(());
        };
        if wait >= YEAR {
            return Ok(());
        }
        if wait > NANO {
            self.pass(wait.saturating_sub(NANO))?;
        }
        prop_assert_eq!(self.take(key, cost)?, (Place::Key(key), Some(NANO)));
        self.pass(NANO)?;
        prop_assert_eq!(self.take(key, cost)?, (Place::Key(key), None));
        Ok(())
    }

    fn end(
        &mut self,
        index: usize,
        kind: Kind,
        end: impl FnOnce(&mut Self, Flight) -> TestCaseResult,
    ) -> TestCaseResult {
        if self.flights.is_empty() {
            return self.take(index as u64 % KEYS, 1).map(|_| ());
        }
        let flight = self.flights.swap_remove(index % self.flights.len());
        end(self, flight)?;
        self.done(kind)
    }

    fn unused(&mut self, flight: Flight) -> TestCaseResult {
        let Flight {
            permit,
            place,
            number,
            at,
        } = flight;
        let (before, cost) = (self.limiter.status().returned_requests, permit.cost());
        permit.unused();
        let returned = self.limiter.status().returned_requests > before;
        let certain = match place {
            Place::Key(key) => self.has_place_for_certain(key),
            Place::Overflow => true,
        };
        let must = cost == 0 || certain && self.rule(place).is_some_and(|rule| rule.must_take_back(at));
        prop_assert!(returned || !must, "a permit must be taken back");
        if !returned {
            self.tally.meet("a permit that is not taken back");
            return Ok(());
        }
        self.counts.returned += 1;
        if cost > 0
            && let Some(rule) = self.rule(place)
        {
            rule.take_back(number, cost);
            self.comes_early(place);
        }
        Ok(())
    }

    fn comes_early(&mut self, place: Place) {
        if let Place::Key(key) = place
            && let Some(tracked) = self.keys.get_mut(&key)
        {
            tracked.early = true;
        }
    }

    /// Where a charge finds its key; nowhere if nobody can tell.
    fn charged_place(&self, key: Key) -> Option<Place> {
        if self.has_place_for_certain(key) {
            return Some(Place::Key(key));
        }
        let may_go = self.keys.values().filter(|tracked| tracked.rule.whole().0).count();
        if self.has_room_for_certain() {
            Some(Place::Key(key))
        } else if may_go == 0 {
            Some(Place::Overflow)
        } else {
            None
        }
    }

    fn settle(&mut self, flight: Flight, outcome: Outcome, truth: Option<Truth>) -> TestCaseResult {
        let Flight { permit, place, .. } = flight;
        let reserved = permit.cost();
        let mut verdict = Verdict::new(outcome);
        let truth = truth.map(|truth| truth.of(reserved, self.burst));
        let corrected = match (truth, place) {
            (Some(cost), Place::Key(key)) if cost > reserved => self.charged_place(key),
            (Some(_), _) => Some(place),
            (None, _) => None,
        };
        if let (Some(cost), Some(_)) = (truth, corrected) {
            verdict = verdict.cost(cost);
        }
        permit.settle(verdict);
        if let (Some(cost), Some(corrected)) = (truth, corrected) {
            if let (Place::Key(key), true) = (corrected, cost > reserved) {
                let was_known = self.has_place_for_certain(key);
                let found = self.find_place(key)?;
                prop_assert_eq!(found, corrected);
                if !was_known {
                    self.tally.meet("a charge that makes a key known again");
                }
            }
            if let Some(rule) = self.rule(corrected) {
                rule.correct(reserved, cost);
                if cost < reserved {
                    self.comes_early(corrected);
                }
            }
        }
        if let Some(rule) = self.rule(place) {
            rule.end(Some(outcome));
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> TestCaseResult {
        match step {
            Step::Take(key, cost) => self.take(key, cost.of(self.burst)).map(|_| ()),
            Step::Wait(key, cost) => self.wait(key, cost.of(self.burst)),
            Step::Settle(index, outcome, truth) => {
                self.end(index, Kind::Settled, |pair, flight| pair.settle(flight, outcome, truth))
            }
            Step::Drop(index) => self.end(index, Kind::Dropped, |pair, flight| {
                if let Some(rule) = pair.rule(flight.place) {
                    rule.end(None);
                }
                drop(flight);
                Ok(())
            }),
            Step::Unused(index) => self.end(index, Kind::Other, Self::unused),
            Step::Pass(pass) => self.pass(pass.of(self.period)),
        }
    }

    fn follow(mut self, steps: &[Step]) -> TestCaseResult {
        for step in steps {
            // They are made for a hundred years.
            if self.now() > (90 * YEAR).as_nanos() {
                break;
            }
            self.step(*step)?;
        }
        Ok(())
    }
}

fn check<R: Rule, A: Into<Algorithm>>(model: &str, sizes: &'static [usize], limits: impl Strategy<Value = (A, R)>) {
    let cases = (limits, prop::sample::select(sizes), steps(200, Step::read));
    let to_meet = [
        "a key that had to make room",
        "a key that found no place",
        "a permit that is not taken back",
    ];
    run(model, Share::KEYED_LIMITER, &to_meet, &cases, |tally, case| {
        let ((algorithm, rule), max_keys, steps) = case;
        Pair::new((algorithm.into(), rule), max_keys, tally).follow(&steps)
    });
}

#[test]
fn a_keyed_token_bucket_has_one_for_each_key_that_finds_a_place() {
    let limits = buckets().prop_map(|(limit, period, burst)| Tokens::new(limit, period, burst));
    // Of one that may be late nobody can tell when it is whole.
    let exact = limits.prop_filter("an exact bucket", |(_, rule)| rule.lateness() == 0);
    check("the keyed token bucket", &[1, 2, 4, 8], exact);
}

#[test]
fn a_keyed_sliding_window_has_one_for_each_key_that_finds_a_place() {
    let limits = windows().prop_map(|(max_requests, window)| Log::new(max_requests, window));
    check("the keyed sliding window", &[1, 2, 4, 8], limits);
}

#[test]
fn a_keyed_adaptive_limiter_has_one_for_each_key_that_finds_a_place() {
    check("the keyed adaptive limiter", &[1, 8], habits().prop_map(Moving::new));
}
