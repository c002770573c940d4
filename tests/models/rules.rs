//! The rule of each limiter, written down as plainly as can be. Times are nanoseconds since the limiter was made.

use portcullis::{Adaptive, Outcome, SlidingWindow, TokenBucket};
use std::time::Duration;

pub(crate) trait Rule: Clone {
    /// Lets time pass up to `now`.
    fn at(&mut self, now: u128);
    /// How long until so much is there; `None` if it is there.
    fn missing(&self, cost: u32) -> Option<u128>;
    /// By how many nanoseconds the limiter may be later than the rule.
    fn lateness(&self) -> u128;
    /// Between what the tokens are that are there.
    fn available(&self) -> (f64, f64);
    /// Admits a call, which has a number of its own.
    fn take(&mut self, number: usize, cost: u32);
    /// Whether what was admitted at that time must be taken back if it was not used. If not, it may be.
    fn must_take_back(&self, admitted: u128) -> bool;
    fn take_back(&mut self, number: usize, cost: u32);
    /// A call has cost something else than was reserved for it.
    fn correct(&mut self, reserved: u32, cost: u32);
    /// A call ended so, or was dropped.
    fn end(&mut self, outcome: Option<Outcome>);
    fn rate(&self) -> f64;
    /// Whether a key may have its whole quota, and whether it must.
    fn whole(&self) -> (bool, bool);
    /// What the last move was, if there are any.
    fn moved(&self) -> Option<&'static str> {
        None
    }
}

/// Tokens in fractions of 1 / period, so that every nanosecond brings exactly `limit` of them.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
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
    pub(crate) fn new(limit: u32, period: Duration, burst: u32) -> (TokenBucket, Self) {
        let nanos = i128::try_from(period.as_nanos()).expect("a hundred years fit");
        let rule = Self {
            now: 0,
            limit: limit.into(),
            period: nanos,
            burst: nanos * i128::from(burst),
            content: nanos * i128::from(burst),
        };
        (TokenBucket::new(limit, period).burst(burst), rule)
    }

    fn fill(&mut self, more: i128) {
        self.content = (self.content + more).min(self.burst);
    }
}

impl Rule for Tokens {
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

    fn available(&self) -> (f64, f64) {
        let late = i128::try_from(self.lateness()).expect("short") * self.limit;
        let tokens = |content: i128| content.max(0) as f64 / self.period as f64;
        let float = |tokens: f64| 1e-12 * (1.0 + tokens);
        let (least, most) = (tokens(self.content - late), tokens(self.content));
        (least - float(least), most + float(most))
    }

    fn take(&mut self, _: usize, cost: u32) {
        self.content -= self.period * i128::from(cost);
    }

    fn must_take_back(&self, _: u128) -> bool {
        true
    }

    fn take_back(&mut self, _: usize, cost: u32) {
        self.fill(self.period * i128::from(cost));
    }

    fn correct(&mut self, reserved: u32, cost: u32) {
        let more = self.period * (i128::from(cost) - i128::from(reserved));
        if more > 0 {
            self.content = (self.content - more).max(self.content.min(-self.burst));
        } else {
            self.fill(-more);
        }
    }

    fn end(&mut self, _: Option<Outcome>) {}

    fn rate(&self) -> f64 {
        self.limit as f64
    }

    fn whole(&self) -> (bool, bool) {
        let full = self.content == self.burst;
        (full, full)
    }
}

/// An admission.
#[derive(Debug, Clone, Copy)]
struct Admitted {
    at: u128,
    number: usize,
    cost: u32,
}

/// Every admission that counts, the oldest first.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    now: u128,
    max_requests: u32,
    window: u128,
    admissions: Vec<Admitted>,
    /// When somebody was admitted last, whatever became of it.
    latest: u128,
}

impl Log {
    pub(crate) fn new(max_requests: u32, window: Duration) -> (SlidingWindow, Self) {
        let rule = Self {
            now: 0,
            max_requests,
            window: window.as_nanos(),
            admissions: Vec::new(),
            latest: 0,
        };
        (SlidingWindow::new(max_requests, window), rule)
    }

    fn used(&self) -> u32 {
        self.admissions.iter().map(|admitted| admitted.cost).sum()
    }
}

impl Rule for Log {
    fn at(&mut self, now: u128) {
        self.now = now;
        self.admissions.retain(|admitted| admitted.at + self.window > now);
    }

    fn missing(&self, cost: u32) -> Option<u128> {
        let too_many = (self.used() + cost).checked_sub(self.max_requests)?;
        let mut gone = 0;
        for admitted in &self.admissions {
            if gone >= too_many {
                break;
            }
            gone += admitted.cost;
            if gone >= too_many {
                return Some(admitted.at + self.window - self.now);
            }
        }
        None
    }

    fn lateness(&self) -> u128 {
        0
    }

    fn available(&self) -> (f64, f64) {
        let left = f64::from(self.max_requests - self.used());
        (left, left)
    }

    fn take(&mut self, number: usize, cost: u32) {
        self.latest = self.now;
        self.admissions.push(Admitted {
            at: self.now,
            number,
            cost,
        });
    }

    fn must_take_back(&self, admitted: u128) -> bool {
        admitted >= self.latest
    }

    fn take_back(&mut self, number: usize, _: u32) {
        // Or another of the same instant, which is all the same to whoever counts.
        self.admissions.retain(|admitted| admitted.number != number);
    }

    fn correct(&mut self, _: u32, _: u32) {}

    fn end(&mut self, _: Option<Outcome>) {}

    fn rate(&self) -> f64 {
        self.max_requests.into()
    }

    fn whole(&self) -> (bool, bool) {
        let empty = self.admissions.is_empty();
        (empty, empty)
    }
}

/// What an adaptive limiter may be told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Habits {
    pub(crate) base: u32,
    pub(crate) bounds: (u32, u32),
    pub(crate) burst: u32,
    pub(crate) window: Duration,
    pub(crate) minimum_calls: u32,
    pub(crate) error_threshold: f64,
    pub(crate) factor: f64,
    pub(crate) cancelled: Outcome,
}

/// A token bucket in floating point whose rate moves at the end of a window.
#[derive(Debug, Clone)]
pub(crate) struct Moving {
    habits: Habits,
    now: u128,
    window: u128,
    window_end: u128,
    burst: f64,
    rate: f64,
    content: f64,
    calls: u32,
    failures: u32,
    used: f64,
    /// When it was used last.
    used_at: u128,
    moved: Option<&'static str>,
}

impl Moving {
    /// What is too little by less is floating point's own.
    const FLOAT: f64 = 1e-6;

    pub(crate) fn new(habits: Habits) -> (Adaptive, Self) {
        let algorithm = Adaptive::new(habits.base)
            .min_rate(habits.bounds.0)
            .max_rate(habits.bounds.1)
            .burst(habits.burst)
            .window(habits.window)
            .minimum_calls(habits.minimum_calls)
            .error_threshold(habits.error_threshold)
            .adjustment_factor(habits.factor)
            .cancelled(habits.cancelled);
        let window = habits.window.as_nanos();
        let rule = Self {
            habits,
            now: 0,
            window,
            window_end: window,
            burst: habits.burst.into(),
            rate: habits.base.into(),
            content: habits.burst.into(),
            calls: 0,
            failures: 0,
            used: 0.0,
            used_at: 0,
            moved: None,
        };
        (algorithm, rule)
    }

    fn fill(&mut self, until: u128) {
        let brought = (until - self.now) as f64 * self.rate / self.window as f64;
        self.content = (self.content + brought).min(self.burst);
        self.now = until;
    }

    fn next_rate(&self) -> (f64, &'static str) {
        let Habits { bounds, factor, .. } = self.habits;
        if self.calls < self.habits.minimum_calls {
            return (self.rate, "a rate that stays for want of outcomes");
        }
        let error_rate = f64::from(self.failures) / f64::from(self.calls);
        let (moved, how) = if error_rate > self.habits.error_threshold {
            (self.rate * (1.0 - factor), "a rate that falls")
        } else if self.used >= self.rate / 2.0 {
            (self.rate * (1.0 + factor), "a rate that rises")
        } else {
            (self.rate, "a rate that stays for want of use")
        };
        (moved.clamp(bounds.0.into(), bounds.1.into()), how)
    }

    fn per_token(&self, rate: f64) -> f64 {
        self.window as f64 / rate
    }
}

impl Rule for Moving {
    fn at(&mut self, now: u128) {
        self.moved = None;
        if now >= self.window_end {
            self.fill(self.window_end);
            let (rate, how) = self.next_rate();
            (self.rate, self.moved) = (rate, Some(how));
            (self.calls, self.failures, self.used) = (0, 0, 0.0);
            self.window_end += ((now - self.window_end) / self.window + 1) * self.window;
        }
        self.fill(now);
    }

    fn missing(&self, cost: u32) -> Option<u128> {
        let missing = f64::from(cost) - self.content - Self::FLOAT;
        if missing <= 0.0 {
            return None;
        }
        let here = missing * self.per_token(self.rate);
        let left = (self.window_end - self.now) as f64;
        let wait = if here <= left {
            here
        } else {
            left + (missing - left / self.per_token(self.rate)) * self.per_token(self.next_rate().0)
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a wait, below a hundred years"
        )]
        Some(wait as u128)
    }

    /// Of a few millionths of a token.
    fn lateness(&self) -> u128 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a short time")]
        let late = (3.0 * Self::FLOAT * self.per_token(self.rate.min(self.next_rate().0))) as u128;
        late + 2
    }

    fn available(&self) -> (f64, f64) {
        let tokens = self.content.max(0.0);
        (tokens - Self::FLOAT, tokens + Self::FLOAT)
    }

    fn take(&mut self, _: usize, cost: u32) {
        self.content -= f64::from(cost);
        self.used += f64::from(cost);
        self.used_at = self.now;
    }

    fn must_take_back(&self, _: u128) -> bool {
        true
    }

    fn take_back(&mut self, _: usize, cost: u32) {
        self.content = (self.content + f64::from(cost)).min(self.burst);
        self.used = (self.used - f64::from(cost)).max(0.0);
    }

    fn correct(&mut self, reserved: u32, cost: u32) {
        if cost > reserved {
            self.content = (self.content - f64::from(cost - reserved)).max(self.content.min(-self.burst));
            self.used += f64::from(cost - reserved);
            self.used_at = self.now;
        } else {
            self.take_back(0, reserved - cost);
        }
    }

    fn end(&mut self, outcome: Option<Outcome>) {
        match outcome.unwrap_or(self.habits.cancelled) {
            Outcome::Ignored => return,
            Outcome::Failure => self.failures += 1,
            _ => {}
        }
        self.calls += 1;
    }

    fn rate(&self) -> f64 {
        self.rate
    }

    /// When exactly it is whole is known to floating point only nearly; it is for certain after three times what it takes at most.
    fn whole(&self) -> (bool, bool) {
        let longest = 3.0 * self.burst * self.per_token(self.habits.bounds.0.into());
        let certain = (self.now - self.used_at) as f64 > longest;
        (self.content + Self::FLOAT >= self.burst, certain)
    }

    fn moved(&self) -> Option<&'static str> {
        self.moved
    }
}
