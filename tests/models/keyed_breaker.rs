//! A set of breakers against a breaker for each key and a plain list of keys: who has a place, who makes room, and that nothing that was
//! counted is lost.

use crate::{
    NANO,
    steps::{Dice, Kind, Share, Tally, run, steps},
};
use portcullis::{
    CircuitBreaker, CircuitBreakerConfig, CircuitBreakerMetrics, CircuitBreakerPermit, Clock, KeyedCircuitBreaker,
    ManualClock, Outcome, Override, State, Timestamp, Window,
};
use proptest::{prelude::*, test_runner::TestCaseResult};
use std::time::Duration;

type Key = u64;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3_600);
/// At how many keys one that is new looks in each of two rounds.
const LOOKS: usize = 16;

#[derive(Debug, Clone, Copy)]
enum Step {
    Call(Key),
    Settle(usize, Outcome),
    /// A call or a handle.
    Drop(usize),
    Hold(Key),
    Operate(Key, Act),
    Pass(Duration),
}

#[derive(Debug, Clone, Copy)]
enum Act {
    Force(Override),
    Reset,
    OwnConfig,
    SetsConfig,
}

impl Step {
    fn read(dice: &mut Dice) -> Self {
        // Some keys are called more than others.
        let key = |dice: &mut Dice| {
            let most = dice.one_of(&[40, 20, 5]);
            dice.below(most)
        };
        match dice.below(100) {
            0..45 => Self::Call(key(dice)),
            45..65 => {
                let outcomes = [Outcome::Success, Outcome::Failure, Outcome::Ignored, Outcome::Failure];
                Self::Settle(dice.index(), dice.one_of(&outcomes))
            }
            65..80 => Self::Drop(dice.index()),
            80..83 => Self::Hold(key(dice)),
            83..87 => {
                let acts = [
                    Act::Reset,
                    Act::SetsConfig,
                    Act::OwnConfig,
                    Act::Force(Override::ForcedOpen),
                    Act::Force(Override::ForcedClosed),
                    Act::Force(Override::Disabled),
                ];
                Self::Operate(key(dice), dice.one_of(&acts))
            }
            _ => Self::Pass(dice.one_of(&[NANO, SECOND, 3 * SECOND, 10 * SECOND, HOUR])),
        }
    }
}

/// A breaker of its own, to which all is done that is done to one of the set.
struct Twin {
    breaker: CircuitBreaker,
    /// When it last recorded a failure.
    blamed: Timestamp,
    has_own_config: bool,
    /// Handles and permits.
    holders: usize,
}

struct Place {
    key: Key,
    twin: usize,
    used: bool,
}

enum Held {
    Call {
        real: CircuitBreakerPermit,
        twins: CircuitBreakerPermit,
        generation: u64,
        /// A disabled breaker's permit holds nothing.
        holds: bool,
    },
    Handle(#[expect(dead_code, reason = "held for what it keeps")] CircuitBreaker),
}

struct Pair<'a> {
    clock: ManualClock,
    config: CircuitBreakerConfig,
    forget_after: Duration,
    set: KeyedCircuitBreaker,
    /// All that ever were, by number. The first is the overflow.
    twins: Vec<Twin>,
    places: Vec<Place>,
    hand: usize,
    evicted: u64,
    overflowed: u64,
    retired: Vec<u64>,
    held: Vec<(usize, Held)>,
    tally: &'a Tally,
}

const OVERFLOW: usize = 0;

fn counts(metrics: &CircuitBreakerMetrics) -> Vec<u64> {
    let (rejected, moves) = (metrics.rejected, metrics.state_transitions);
    vec![
        metrics.successful_requests,
        metrics.failed_requests,
        metrics.ignored_requests,
        metrics.cancelled_requests,
        rejected.open,
        rejected.half_open_full,
        rejected.forced_open,
        moves.closed_to_open,
        moves.open_to_half_open,
        moves.half_open_to_closed,
        moves.half_open_to_open,
    ]
}

fn add(sums: &mut [u64], breaker: &CircuitBreaker) {
    let more = counts(&breaker.status().metrics);
    sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
}

impl<'a> Pair<'a> {
    fn new(config: CircuitBreakerConfig, max_keys: usize, forget_after: Duration, tally: &'a Tally) -> Self {
        let clock = Clock::manual();
        let builder = KeyedCircuitBreaker::builder("shops")
            .config(config.clone())
            .clock(&clock);
        let set = builder.max_keys(max_keys).forget_after(forget_after).build();
        let mut pair = Self {
            clock,
            config,
            forget_after,
            set: set.expect("valid"),
            twins: Vec::new(),
            places: Vec::new(),
            hand: 0,
            evicted: 0,
            overflowed: 0,
            retired: vec![0; 11],
            held: Vec::new(),
            tally,
        };
        pair.new_twin();
        pair
    }

    fn new_twin(&mut self) -> usize {
        let builder = CircuitBreaker::builder("shops").config(self.config.clone());
        let breaker = builder.clock(&self.clock).build().expect("valid");
        self.twins.push(Twin {
            breaker,
            blamed: self.clock.now(),
            has_own_config: false,
            holders: 0,
        });
        self.twins.len() - 1
    }

    fn is_as_new(twin: &Twin) -> bool {
        let status = twin.breaker.status();
        let blameless = status.window.is_none_or(|window| window.failures == 0);
        (status.forced, status.state, status.failure_count) == (None, State::Closed, 0) && blameless
    }

    fn is_outdated(&self, twin: &Twin) -> bool {
        let status = twin.breaker.status();
        status.forced.is_none()
            && status.state != State::Open
            && self.clock.now().duration_since(twin.blamed) >= self.forget_after
    }

    /// Whose place a new key gets, if it gets one.
    fn place_to_take(&mut self) -> Option<usize> {
        let keys = self.places.len();
        let first = self.hand;
        for round in 0..2 {
            for look in 0..LOOKS.min(keys) {
                let at = (first + look) % keys;
                self.hand = (at + 1) % keys;
                let used = std::mem::take(&mut self.places[at].used);
                let twin = &self.twins[self.places[at].twin];
                if round == 0 && used || twin.holders > 0 || twin.has_own_config {
                    continue;
                }
                if Self::is_as_new(twin) {
                    self.tally.meet("a key made room that was as good as new");
                    return Some(at);
                }
                if self.is_outdated(twin) {
                    self.tally.meet(match twin.breaker.state() {
                        State::Closed => "a key made room whose failures were old",
                        _ => "a key made room that had been open",
                    });
                    return Some(at);
                }
            }
        }
        None
    }

    /// The twin of the breaker that a key meets.
    fn find(&mut self, key: Key) -> usize {
        if let Some(place) = self.places.iter_mut().find(|place| place.key == key) {
            place.used = true;
            return place.twin;
        }
        if self.places.len() < self.set.max_keys() {
            let twin = self.new_twin();
            self.places.push(Place { key, twin, used: true });
            return twin;
        }
        let Some(at) = self.place_to_take() else {
            self.overflowed += 1;
            self.tally.meet("a key that found no place");
            return OVERFLOW;
        };
        add(&mut self.retired, &self.twins[self.places[at].twin].breaker);
        self.evicted += 1;
        let twin = self.new_twin();
        self.places[at] = Place { key, twin, used: true };
        twin
    }

    fn call(&mut self, key: Key) -> TestCaseResult {
        let real = self.set.try_acquire(&key);
        let number = self.find(key);
        let twin = &mut self.twins[number];
        let kind = match (real, twin.breaker.try_acquire()) {
            (Ok(real), Ok(twins)) => {
                let status = twin.breaker.status();
                let holds = status.forced != Some(Override::Disabled);
                twin.holders += usize::from(holds);
                let generation = status.generation;
                let call = Held::Call {
                    real,
                    twins,
                    generation,
                    holds,
                };
                self.held.push((number, call));
                Kind::Admitted
            }
            (Err(real), Err(twins)) => {
                prop_assert_eq!((real.reason, real.retry_after), (twins.reason, twins.retry_after));
                Kind::Other
            }
            (real, twins) => return Err(TestCaseError::fail(format!("{real:?}, its twin {twins:?}"))),
        };
        self.check(kind)
    }

    /// Ends something that is held: a call with this outcome, or dropped.
    fn end(&mut self, index: usize, outcome: Option<Outcome>) -> TestCaseResult {
        if self.held.is_empty() {
            return self.call(index as u64);
        }
        let (number, held) = self.held.swap_remove(index % self.held.len());
        let twin = &mut self.twins[number];
        match held {
            Held::Handle(_) => twin.holders -= 1,
            Held::Call {
                real,
                twins,
                generation,
                holds,
            } => {
                let status = twin.breaker.status();
                let is_heard = holds && status.forced != Some(Override::Disabled) && status.generation == generation;
                if outcome == Some(Outcome::Failure) && is_heard {
                    twin.blamed = self.clock.now();
                }
                twin.holders -= usize::from(holds);
                if let Some(outcome) = outcome {
                    real.settle(outcome);
                    twins.settle(outcome);
                }
            }
        }
        self.check(if outcome.is_some() {
            Kind::Settled
        } else {
            Kind::Dropped
        })
    }

    fn operate(&mut self, key: Key, act: Act) -> TestCaseResult {
        let real = self.set.get(&key);
        let number = self.find(key);
        let twin = &mut self.twins[number];
        let both = [&real, &twin.breaker];
        match act {
            Act::Force(Override::ForcedOpen) => both.map(CircuitBreaker::force_open),
            Act::Force(Override::ForcedClosed) => both.map(CircuitBreaker::force_closed),
            Act::Force(_) => both.map(CircuitBreaker::disable),
            Act::Reset => both.map(CircuitBreaker::reset),
            Act::OwnConfig | Act::SetsConfig => {
                twin.has_own_config = matches!(act, Act::OwnConfig);
                let own = self.config.clone().cancelled(Outcome::Success);
                let config = if twin.has_own_config { &own } else { &self.config };
                both.map(|breaker| breaker.reconfigure(config.clone()).expect("valid"))
            }
        };
        drop(real);
        self.check(Kind::Other)
    }

    fn step(&mut self, step: Step) -> TestCaseResult {
        match step {
            Step::Call(key) => self.call(key),
            Step::Settle(index, outcome) => self.end(index, Some(outcome)),
            Step::Drop(index) => self.end(index, None),
            Step::Hold(key) => {
                let real = self.set.get(&key);
                let number = self.find(key);
                self.twins[number].holders += 1;
                self.held.push((number, Held::Handle(real)));
                self.check(Kind::Other)
            }
            Step::Operate(key, act) => self.operate(key, act),
            Step::Pass(time) => {
                self.clock.advance(time);
                self.check(Kind::Time)
            }
        }
    }

    fn check(&self, kind: Kind) -> TestCaseResult {
        self.tally.count(kind);
        let status = self.set.status();
        prop_assert_eq!(
            (status.tracked, status.evicted, status.overflowed),
            (self.places.len(), self.evicted, self.overflowed)
        );
        let tracked = || self.places.iter().map(|place| &self.twins[place.twin].breaker);
        let overflow = &self.twins[OVERFLOW].breaker;
        let mut sums = self.retired.clone();
        tracked().chain([overflow]).for_each(|breaker| add(&mut sums, breaker));
        prop_assert_eq!(counts(&status.metrics), sums);
        let in_state = |state| tracked().filter(|breaker| breaker.state() == state).count();
        prop_assert_eq!(
            (status.open, status.half_open, status.overflow),
            (in_state(State::Open), in_state(State::HalfOpen), overflow.state())
        );
        Ok(())
    }
}

/// Breakers that remember in every way.
fn configs() -> impl Strategy<Value = CircuitBreakerConfig> {
    let remembers = prop_oneof![
        Just(CircuitBreakerConfig::default().failure_threshold(2)),
        Just(CircuitBreakerConfig::default().failures_within(2, 10 * SECOND)),
        Just(
            CircuitBreakerConfig::default()
                .failure_rate(0.5)
                .window(Window::calls(4))
        ),
        Just(
            CircuitBreakerConfig::default()
                .failure_rate(0.5)
                .window(Window::time(10 * SECOND))
        ),
    ];
    (remembers, prop::sample::select(vec![SECOND, 5 * SECOND, 2 * HOUR])).prop_map(|(config, open)| {
        config
            .minimum_calls(2)
            .recovery_timeout(open)
            .half_open_max_calls(2)
            .success_threshold(2)
    })
}

#[test]
fn a_set_of_breakers_has_one_for_each_key_that_finds_a_place() {
    let sizes = prop::sample::select(vec![1_usize, 2, 5, 16, 17, 30]);
    let ages = prop::sample::select(vec![NANO, 3 * SECOND, 10 * SECOND, HOUR]);
    let to_meet = [
        "a key made room that was as good as new",
        "a key made room whose failures were old",
        "a key made room that had been open",
        "a key that found no place",
    ];
    let cases = (configs(), sizes, ages, steps(200, Step::read));
    run(
        "the set of breakers",
        Share::KEYED_BREAKER,
        &to_meet,
        &cases,
        |tally, (config, max_keys, forget_after, steps)| {
            let mut pair = Pair::new(config, max_keys, forget_after, tally);
            steps.into_iter().try_for_each(|step| pair.step(step))
        },
    );
}
