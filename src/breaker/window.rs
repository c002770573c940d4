//! What a closed circuit remembers of its calls. Plain data: the caller brings the time and the lock.

use super::config::WindowKind;
use crate::clock::{Now, Timestamp, nanos};
use std::{collections::VecDeque, time::Duration};

/// Calls by what they were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) calls: u64,
    pub(super) failures: u64,
    pub(super) slow: u64,
}

impl Tally {
    fn of(failed: bool, slow: bool) -> Self {
        Self {
            calls: 1,
            failures: failed.into(),
            slow: slow.into(),
        }
    }

    fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.failures += other.failures;
        self.slow += other.slow;
    }

    pub(super) fn failures_reach(&self, most: f64) -> bool {
        Self::reaches(self.failures, self.calls, most)
    }

    pub(super) fn slow_reach(&self, most: f64) -> bool {
        Self::reaches(self.slow, self.calls, most)
    }

    /// Whether the ratio is as high as that. Far from it a product tells as much as the quotient, in a fifth of the time.
    #[inline]
    fn reaches(part: u64, calls: u64, most: f64) -> bool {
        const FAR: f64 = 0.99;
        // Signed numbers become floats in one step.
        let (some, all) = (part.cast_signed() as f64, calls.cast_signed() as f64);
        some >= most * FAR * all && Self::ratio(part, calls).is_some_and(|rate| rate >= most)
    }

    fn ratio(part: u64, calls: u64) -> Option<f64> {
        // A division rounds correctly: 3 of 30 is the same number as the literal 0.1, where 0.1 × 30 is more than 3.
        (calls > 0).then(|| part as f64 / calls as f64)
    }

    pub(super) fn failure_rate(&self) -> Option<f64> {
        Self::ratio(self.failures, self.calls)
    }

    pub(super) fn slow_rate(&self) -> Option<f64> {
        Self::ratio(self.slow, self.calls)
    }
}

/// The window over which rates are taken.
#[derive(Debug)]
pub(super) enum RateWindow {
    Calls(CountWindow),
    Time(Box<TimeWindow>),
}

impl RateWindow {
    pub(super) fn new(kind: WindowKind) -> Self {
        match kind {
            WindowKind::Calls(calls) => Self::Calls(CountWindow::new(calls)),
            WindowKind::Time(period) => Self::Time(Box::new(TimeWindow::new(period))),
        }
    }

    #[inline]
    pub(super) fn record(&mut self, failed: bool, slow: bool, now: &Now<'_>) {
        match self {
            Self::Calls(window) => window.record(failed, slow),
            Self::Time(window) => window.record(Tally::of(failed, slow), now.get()),
        }
    }

    /// Records so many quick successes, which came within one tenth of a window of time.
    pub(super) fn succeed(&mut self, calls: u64, at: Timestamp) {
        match self {
            Self::Calls(window) => window.succeed(calls),
            Self::Time(window) => {
                let tally = Tally {
                    calls,
                    ..Tally::default()
                };
                window.record(tally, at);
            }
        }
    }

    #[inline]
    pub(super) fn tally(&self, now: &Now<'_>) -> Tally {
        match self {
            Self::Calls(window) => *window.tally(),
            Self::Time(window) => window.tally(now.get()),
        }
    }

    /// The same calls in a window of another size; between calls and time nothing carries over.
    pub(super) fn resize(self, kind: WindowKind, now: Timestamp) -> Self {
        match (self, kind) {
            (Self::Calls(window), WindowKind::Calls(calls)) => Self::Calls(window.resize(calls)),
            (Self::Time(window), WindowKind::Time(period)) => Self::Time(Box::new(window.resize(period, now))),
            _ => Self::new(kind),
        }
    }
}

/// The last N calls: a ring with two bits a call.
#[derive(Debug)]
pub(super) struct CountWindow {
    size: u32,
    next: u32,
    marks: Vec<Marks>,
    tally: Tally,
}

/// What 64 calls were, a bit each. Places that no call has taken yet have none.
#[derive(Debug, Clone, Copy, Default)]
struct Marks {
    failed: u64,
    slow: u64,
}

impl CountWindow {
    fn new(size: u32) -> Self {
        Self {
            size,
            next: 0,
            marks: vec![Marks::default(); size.div_ceil(64) as usize],
            tally: Tally::default(),
        }
    }

    #[inline]
    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Whether one more success would leave the window as it is, so that it need not be recorded.
    #[inline]
    pub(super) fn is_clean(&self) -> bool {
        self.tally.calls == u64::from(self.size) && self.tally.failures == 0 && self.tally.slow == 0
    }

    fn get(&self, at: u32) -> (bool, bool) {
        let (marks, bit) = (self.marks[(at / 64) as usize], at % 64);
        (marks.failed >> bit & 1 == 1, marks.slow >> bit & 1 == 1)
    }

    // One mark after the other: the compiler would look at both at once, and what was written in halves is slow to read as a whole.
    #[inline]
    fn record(&mut self, failed: bool, slow: bool) {
        let (marks, mask) = (&mut self.marks[(self.next / 64) as usize], 1 << (self.next % 64));
        if marks.failed & mask != 0 {
            marks.failed &= !mask;
            self.tally.failures -= 1;
        }
        if marks.slow & mask != 0 {
            marks.slow &= !mask;
            self.tally.slow -= 1;
        }
        if failed {
            marks.failed |= mask;
            self.tally.failures += 1;
        }
        if slow {
            marks.slow |= mask;
            self.tally.slow += 1;
        }
        self.tally.calls = (self.tally.calls + 1).min(self.size.into());
        self.move_on(1);
    }

    fn move_on(&mut self, places: u32) {
        self.next += places;
        if self.next == self.size {
            self.next = 0;
        }
    }

    /// Records so many quick successes, up to 64 of them in a step: O(n / 64), at most O(size / 64).
    #[inline]
    fn succeed(&mut self, calls: u64) {
        let calls = calls.min(self.size.into());
        self.tally.calls = (self.tally.calls + calls).min(self.size.into());
        let mut left = u32::try_from(calls).unwrap_or(self.size);
        while left > 0 {
            let (marks, bit) = (&mut self.marks[(self.next / 64) as usize], self.next % 64);
            let step = left.min(64 - bit).min(self.size - self.next);
            let covered = (u64::MAX >> (64 - step)) << bit;
            // Mostly there is nothing to forget.
            if marks.failed & covered != 0 {
                self.tally.failures -= u64::from((marks.failed & covered).count_ones());
                marks.failed &= !covered;
            }
            if marks.slow & covered != 0 {
                self.tally.slow -= u64::from((marks.slow & covered).count_ones());
                marks.slow &= !covered;
            }
            self.move_on(step);
            left -= step;
        }
    }

    fn resize(self, size: u32) -> Self {
        if size == self.size {
            return self;
        }
        let mut resized = Self::new(size);
        let kept = u32::try_from(self.tally.calls).unwrap_or(u32::MAX);
        for back in (1..=kept.min(size)).rev() {
            let at = u64::from(self.next) + u64::from(self.size) - u64::from(back);
            let (failed, slow) = self.get(u32::try_from(at % u64::from(self.size)).unwrap_or(0));
            resized.record(failed, slow);
        }
        resized
    }
}

const BUCKETS: usize = 10;

/// The calls of the last T seconds, in ten buckets of which each counts for one tenth of the time.
#[derive(Debug)]
pub(super) struct TimeWindow {
    width: u64,
    buckets: [Bucket; BUCKETS],
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    /// Which tenth since the clock's zero this bucket counts for.
    number: u64,
    tally: Tally,
}

impl TimeWindow {
    fn new(period: Duration) -> Self {
        Self {
            width: nanos(period).div_ceil(BUCKETS as u64),
            buckets: [Bucket::default(); BUCKETS],
        }
    }

    fn record(&mut self, tally: Tally, now: Timestamp) {
        let number = now.nanos() / self.width;
        let at = usize::try_from(number % BUCKETS as u64).unwrap_or_default();
        let bucket = &mut self.buckets[at];
        if bucket.number < number {
            *bucket = Bucket {
                number,
                tally: Tally::default(),
            };
        }
        // A thread so far behind that its bucket has been reused reports what no longer counts.
        if bucket.number == number {
            bucket.tally.add(tally);
        }
    }

    /// The tenth that is filled now, from when until when. A thread that lies behind sees the newest.
    pub(super) fn tenth(&self, now: Timestamp) -> (Timestamp, Timestamp) {
        let newest = self.buckets.iter().map(|bucket| bucket.number).max();
        let number = newest.unwrap_or_default().max(now.nanos() / self.width);
        let start = number.saturating_mul(self.width);
        (
            Timestamp::from_nanos(start),
            Timestamp::from_nanos(start.saturating_add(self.width)),
        )
    }

    fn live(&self, now: Timestamp) -> impl Iterator<Item = &Bucket> {
        // A thread that lies behind sees the window that ends with the newest bucket: no more than one period.
        let newest = self
            .buckets
            .iter()
            .map(|bucket| bucket.number)
            .fold(now.nanos() / self.width, u64::max);
        self.buckets
            .iter()
            .filter(move |bucket| bucket.number + BUCKETS as u64 > newest)
    }

    pub(super) fn tally(&self, now: Timestamp) -> Tally {
        let mut sum = Tally::default();
        self.live(now).for_each(|bucket| sum.add(bucket.tally));
        sum
    }

    fn resize(self, period: Duration, now: Timestamp) -> Self {
        let mut resized = Self::new(period);
        if resized.width == self.width {
            return self;
        }
        let mut kept: Vec<&Bucket> = self.live(now).collect();
        kept.sort_unstable_by_key(|bucket| bucket.number);
        for bucket in kept {
            let start = Timestamp::from_nanos(bucket.number.saturating_mul(self.width));
            resized.record(bucket.tally, start);
        }
        resized
    }
}

/// The times of the last few failures: trips when the oldest of them is recent.
#[derive(Debug)]
pub(super) struct FailureTimes {
    times: VecDeque<Timestamp>,
    most: usize,
    period: u64,
}

impl FailureTimes {
    pub(super) fn new(failures: u32, period: u64) -> Self {
        Self {
            times: VecDeque::new(),
            most: failures as usize,
            period,
        }
    }

    pub(super) fn record(&mut self, now: Timestamp) {
        // In order, also when a thread that lies behind reports late: the oldest goes, whoever reported it.
        let after = self.times.partition_point(|time| *time <= now);
        self.times.insert(after, now);
        if self.times.len() > self.most {
            self.times.pop_front();
        }
    }

    /// How many failures lie within the period that ends now, or with the newest of them if this thread lies behind.
    pub(super) fn within(&self, now: Timestamp) -> usize {
        let now = self.times.back().map_or(now, |newest| now.max(*newest));
        let old = |time: &Timestamp| now.nanos().saturating_sub(time.nanos()) >= self.period;
        self.times.len() - self.times.partition_point(old)
    }

    pub(super) fn is_tripping(&self, now: Timestamp) -> bool {
        self.within(now) >= self.most
    }

    pub(super) fn resize(mut self, failures: u32, period: u64) -> Self {
        let surplus = self.times.len().saturating_sub(failures as usize);
        self.times.drain(..surplus);
        Self {
            times: self.times,
            ..Self::new(failures, period)
        }
    }
}
