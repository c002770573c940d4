//! What all models share: chance, and an account of what it has brought about.

use proptest::{
    prelude::*,
    test_runner::{RngSeed, TestCaseResult, TestError, TestRunner},
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
};

/// How many steps all models make together at least.
const STEPS: u64 = 1_000_000;

/// For more of them.
const VARIABLE: &str = "PORTCULLIS_MODEL_STEPS";

/// How many cases run under one seed: what failed comes again soon.
const CASES: u32 = 50;

/// Percent of all steps that a model makes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share(u64);

impl Share {
    pub(crate) const BREAKER: Self = Self(35);
    pub(crate) const KEYED_BREAKER: Self = Self(5);
    pub(crate) const LIMITER: Self = Self(15);
    pub(crate) const KEYED_LIMITER: Self = Self(5);
}

const _: () = assert!(
    Share::BREAKER.0 + Share::KEYED_BREAKER.0 + 3 * (Share::LIMITER.0 + Share::KEYED_LIMITER.0) == 100,
    "the shares of all models are the whole"
);

impl Share {
    fn steps(self) -> u64 {
        let wished = std::env::var(VARIABLE).map_or(STEPS, |steps| {
            let steps: Result<u64, _> = steps.replace('_', "").parse();
            steps.unwrap_or_else(|_| panic!("{VARIABLE} is a number of steps"))
        });
        (wished.max(STEPS) * self.0).div_ceil(100)
    }
}

/// A random number, taken apart. A smaller number has smaller parts, so what fails gets simpler as it shrinks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dice(u64);

impl Dice {
    /// From zero on.
    pub(crate) fn below(&mut self, most: u64) -> u64 {
        let face = self.0 % most;
        self.0 /= most;
        face
    }

    /// From one on.
    pub(crate) fn up_to(&mut self, most: u64) -> u64 {
        1 + self.below(most)
    }

    pub(crate) fn index(&mut self) -> usize {
        usize::try_from(self.below(256)).expect("small")
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        let at = self.below(all.len() as u64);
        all[usize::try_from(at).expect("one of them")]
    }
}

/// As many steps as a case has, each read from a number of its own: cheaper by far than a strategy for each kind.
pub(crate) fn steps<T: std::fmt::Debug>(count: usize, read: fn(&mut Dice) -> T) -> impl Strategy<Value = Vec<T>> {
    prop::collection::vec(any::<u64>().prop_map(move |number| read(&mut Dice(number))), count)
}

/// What a step was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Admitted,
    Settled,
    Dropped,
    Time,
    /// A refusal, a permit that is given back, an operator's doing.
    Other,
}

impl Kind {
    /// Of which a tenth of all steps must be, each.
    const MAIN: [Self; 4] = [Self::Admitted, Self::Settled, Self::Dropped, Self::Time];
}

/// How many steps were made and compared, and what was met on the way.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    kinds: [Cell<u64>; 5],
    met: RefCell<BTreeMap<&'static str, u64>>,
}

impl Tally {
    pub(crate) fn count(&self, kind: Kind) {
        self.kinds[kind as usize].update(|count| count + 1);
    }

    pub(crate) fn meet(&self, what: &'static str) {
        *self.met.borrow_mut().entry(what).or_default() += 1;
    }

    fn steps(&self) -> u64 {
        self.kinds.iter().map(Cell::get).sum()
    }
}

/// Runs cases until the model has made its share of all steps. Then each main kind must have been a tenth of them, and everything
/// met that is to be.
pub(crate) fn run<S: Strategy>(
    model: &str,
    share: Share,
    to_meet: &[&str],
    strategy: &S,
    case: impl Fn(&Tally, S::Value) -> TestCaseResult,
) {
    let config = ProptestConfig {
        cases: CASES,
        max_shrink_iters: 2_000,
        // The seed is printed instead: a file would know nothing of the kinds of steps that come later.
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let chosen = match config.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => RandomState::new().hash_one(0),
    };
    let tally = Tally::default();
    let mut seed = chosen;
    while tally.steps() < share.steps() {
        let mut runner = TestRunner::new(ProptestConfig {
            rng_seed: RngSeed::Fixed(seed),
            ..config.clone()
        });
        match runner.run(strategy, |values| case(&tally, values)) {
            Ok(()) => {}
            Err(TestError::Fail(why, values)) => {
                panic!("{model}: {why}\nby {values:?}\nThe same again: PROPTEST_RNG_SEED={seed}")
            }
            Err(TestError::Abort(why)) => panic!("{model}: {why}"),
        }
        seed = seed.wrapping_add(1);
    }
    let steps = tally.steps();
    println!("{model}, from the seed {chosen} on: {steps} steps");
    for kind in Kind::MAIN {
        let count = tally.kinds[kind as usize].get();
        println!("{kind:?}: {count}");
        assert!(
            count * 10 >= steps,
            "{model}: only {count} of {steps} steps are {kind:?}"
        );
    }
    let met = tally.met.borrow();
    println!("{met:?}");
    let missing: Vec<_> = to_meet.iter().filter(|what| !met.contains_key(*what)).collect();
    assert!(missing.is_empty(), "{model} never met {missing:?}");
}
