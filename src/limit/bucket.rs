//! The generic cell rate algorithm (ITU-T I.371, GCRA) in whole numbers: what the token bucket and the adaptive limiter stand on.
//!
//! Tokens are counted in *units*, fractions of a token chosen so that a hundred years of tokens fit in 64 bits; for most rates
//! one unit is what one nanosecond brings or a whole share of it, and nothing is ever rounded. Two numbers make the bucket: how
//! many units have *ever* been made by now (a [`Line`], computed from the absolute elapsed time, so no error adds up) and how
//! many have ever been taken or have overflowed (one atomic). Their difference is the content.

use crate::clock::Timestamp;
use std::sync::atomic::{AtomicU64, Ordering};

/// Units made since the beginning of time, as a straight line over the clock: `base + (now − start) · mul / div`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) start: Timestamp,
    pub(super) base: u64,
    pub(super) mul: u64,
    pub(super) div: u64,
}

impl Line {
    /// Whole units made by `now`.
    pub(super) fn floor(&self, now: Timestamp) -> u64 {
        let elapsed = now.nanos().saturating_sub(self.start.nanos());
        let made = if self.div == 1 {
            elapsed.saturating_mul(self.mul)
        } else {
            narrow(u128::from(elapsed) * u128::from(self.mul) / u128::from(self.div))
        };
        self.base.saturating_add(made)
    }

    /// The same, the unit in the making counted as made.
    fn ceil(&self, now: Timestamp) -> u64 {
        if self.div == 1 {
            return self.floor(now);
        }
        let elapsed = now.nanos().saturating_sub(self.start.nanos());
        let made = (u128::from(elapsed) * u128::from(self.mul)).div_ceil(u128::from(self.div));
        self.base.saturating_add(narrow(made))
    }

    /// The first nanosecond at which so many whole units are made: the exact inverse of [`floor`](Self::floor).
    pub(super) fn when(&self, units: u64) -> Timestamp {
        let missing = u128::from(units.saturating_sub(self.base));
        let elapsed = narrow((missing * u128::from(self.div)).div_ceil(u128::from(self.mul)));
        Timestamp::from_nanos(self.start.nanos().saturating_add(elapsed))
    }
}

fn narrow(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// A bucket of tokens. The line is handed in: for a token bucket it is always the same, for an adaptive limiter it bends.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Units ever taken, or lost because the bucket was full.
    gone: AtomicU64,
    /// Units a token.
    token: u64,
    /// The most that the bucket holds, in units.
    burst: u64,
}

impl Bucket {
    /// A full bucket, if its line's base is its burst.
    pub(super) fn new(token: u64, burst: u64) -> Self {
        Self {
            gone: AtomicU64::new(0),
            token,
            burst,
        }
    }

    pub(super) fn token(&self) -> u64 {
        self.token
    }

    /// Takes `cost` tokens (no more than the burst), or tells how many units must have been made before a caller alone can.
    pub(super) fn take(&self, line: &Line, cost: u32, now: Timestamp) -> Result<(), u64> {
        let made = line.floor(now);
        let mut gone = self.gone.load(Ordering::Relaxed);
        loop {
            let taken = self.plan(line, made, gone, cost, now)?;
            // Relaxed: the atomic guards nothing but itself.
            match self
                .gone
                .compare_exchange_weak(gone, taken, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return Ok(()),
                Err(latest) => gone = latest,
            }
        }
    }

    /// The answer of [`take`](Self::take), without taking.
    pub(super) fn peek(&self, line: &Line, cost: u32, now: Timestamp) -> Result<(), u64> {
        let gone = self.gone.load(Ordering::Relaxed);
        self.plan(line, line.floor(now), gone, cost, now).map(|_| ())
    }

    /// What will be gone after taking `cost` tokens, or what must have been made first.
    fn plan(&self, line: &Line, made: u64, gone: u64, cost: u32, now: Timestamp) -> Result<u64, u64> {
        let before = self.level(line, made, gone, now);
        let after = before.saturating_add(self.units(cost));
        // A full bucket gives up to its burst, whatever is in the making.
        if before != gone || after <= made {
            Ok(after)
        } else {
            Err(after)
        }
    }

    /// What is gone once the overflow up to `now` is: a full bucket holds its burst, measured back from the end of the unit
    /// in the making, so that what it hands out is never made early.
    fn level(&self, line: &Line, made: u64, gone: u64, now: Timestamp) -> u64 {
        if gone <= made.saturating_sub(self.burst) {
            line.ceil(now) - self.burst
        } else {
            gone
        }
    }

    /// Gives tokens back. The bucket still holds no more than its burst.
    pub(super) fn give_back(&self, cost: u32) {
        let units = self.units(cost);
        let less = |gone: u64| Some(gone.saturating_sub(units));
        let _ = self.gone.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Takes tokens that have been used already: the bucket goes into debt, by at most one burst.
    pub(super) fn charge(&self, line: &Line, cost: u32, now: Timestamp) {
        let made = line.floor(now);
        let units = self.token.saturating_mul(cost.into());
        let more = |gone: u64| {
            let most = line.ceil(now).saturating_add(self.burst).max(gone);
            Some(self.level(line, made, gone, now).saturating_add(units).min(most))
        };
        let _ = self.gone.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// How many units must have been made before `cost` tokens can be taken: also for more than the burst, which then are taken
    /// one after the other as they come.
    pub(super) fn target(&self, line: &Line, cost: u64, now: Timestamp) -> u64 {
        let gone = self.gone.load(Ordering::Relaxed);
        let before = self.level(line, line.floor(now), gone, now);
        before.saturating_add(self.token.saturating_mul(cost))
    }

    /// The content in tokens; nothing while in debt.
    pub(super) fn content(&self, line: &Line, now: Timestamp) -> f64 {
        let made = line.floor(now);
        let units = made.saturating_sub(self.gone.load(Ordering::Relaxed)).min(self.burst);
        units as f64 / self.token as f64
    }

    fn units(&self, cost: u32) -> u64 {
        self.token * u64::from(cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn when_is_the_exact_inverse_of_floor(
            mul in 1..u64::MAX, div in 1..u64::MAX, base in 0..1u64 << 40, ask in 0..u64::MAX,
        ) {
            let line = Line { start: Timestamp::from_nanos(1 << 62), base, mul, div };
            let at = line.when(ask);
            if at < Timestamp::from_nanos(u64::MAX) {
                prop_assert!(line.floor(at) >= ask);
                let before = Timestamp::from_nanos(at.nanos() - 1);
                prop_assert!(at == line.start || line.floor(before) < ask);
            }
        }
    }
}
