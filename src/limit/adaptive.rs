use super::{
    admitted,
    bucket::{Bucket, Level, Line, Scale, Short},
};
use crate::{
    clock::{Timestamp, nanos},
    error::{ConfigError, duration, share, within},
    permit::Outcome,
    stripe::Seated,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering, fence},
    },
};
use std::{sync::PoisonError, time::Duration};

/// A token bucket that finds its own rate: down when calls fail, up while they succeed and the rate is used.
///
/// The rate counts requests per [`window`](Self::window) and moves at most once per window, at its end:
///
/// - more than [`error_threshold`](Self::error_threshold) of the calls failed: `rate × (1 − adjustment_factor)`;
/// - otherwise, if at least half the rate was used: `rate × (1 + adjustment_factor)`;
/// - fewer than [`minimum_calls`](Self::minimum_calls) outcomes: it stays,
///
/// always between [`min_rate`](Self::min_rate) and [`max_rate`](Self::max_rate). It learns from the outcomes that permits are
/// settled with; ignored and dropped ones say nothing, unless [`cancelled`](Self::cancelled) says otherwise. A move changes how
/// fast tokens come, not how many there are.
///
/// ```
/// use portcullis::{Adaptive, RateLimiter};
/// use std::time::Duration;
///
/// let limiter = RateLimiter::new(
///     "agent",
///     Adaptive::new(100)
///         .min_rate(10)
///         .max_rate(200)
///         .window(Duration::from_secs(60))
///         .error_threshold(0.1)
///         .adjustment_factor(0.2),
/// )?;
/// assert_eq!(limiter.status().rate, 100.0);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
///
/// O(1) memory. An admission is the one of a token bucket and one more addition; an outcome is a reading of the clock and one
/// addition, which only its thread's line sees. A rejection takes a mutex, to tell when it would end, and so do the first call
/// after the end of a window, a permit that is dropped or settled with a cost, and on a manual clock every outcome. Whoever ends a
/// window, or is refused until after its end, adds up a line for each thread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adaptive {
    base_rate: u32,
    min_rate: Option<u32>,
    max_rate: Option<u32>,
    burst: Option<u32>,
    window: Duration,
    error_threshold: f64,
    adjustment_factor: f64,
    minimum_calls: u32,
    cancelled: Outcome,
}

impl Adaptive {
    /// Starts at `base_rate` requests per window, 1 or more.
    #[must_use]
    pub const fn new(base_rate: u32) -> Self {
        Self {
            base_rate,
            min_rate: None,
            max_rate: None,
            burst: None,
            window: Duration::from_secs(60),
            error_threshold: 0.1,
            adjustment_factor: 0.2,
            minimum_calls: 10,
            cancelled: Outcome::Ignored,
        }
    }

    /// The rate never falls below this, 1 to the base rate. Default: a tenth of the base rate, at least 1.
    #[must_use]
    pub const fn min_rate(mut self, rate: u32) -> Self {
        self.min_rate = Some(rate);
        self
    }

    /// The rate never rises above this, at least the base rate. Default: twice the base rate.
    #[must_use]
    pub const fn max_rate(mut self, rate: u32) -> Self {
        self.max_rate = Some(rate);
        self
    }

    /// How many requests may come at once after a pause, whatever the rate is, 1 or more. Default: the base rate.
    #[must_use]
    pub const fn burst(mut self, burst: u32) -> Self {
        self.burst = Some(burst);
        self
    }

    /// How often the rate moves, and what it counts requests per; 1 ns to 100 years. Default: 60 s.
    #[must_use]
    pub const fn window(mut self, window: Duration) -> Self {
        self.window = window;
        self
    }

    /// The share of failed calls, above 0 and at most 1, that may pass before the rate falls. Default: 0.1.
    #[must_use]
    pub const fn error_threshold(mut self, share: f64) -> Self {
        self.error_threshold = share;
        self
    }

    /// By how much the rate moves, above 0 and below 1. Default: 0.2.
    #[must_use]
    pub const fn adjustment_factor(mut self, factor: f64) -> Self {
        self.adjustment_factor = factor;
        self
    }

    /// How many outcomes a window must have to move the rate, 1 or more. Default: 10.
    #[must_use]
    pub const fn minimum_calls(mut self, calls: u32) -> Self {
        self.minimum_calls = calls;
        self
    }

    /// What a call counts as that was begun and dropped: callers who give up may be the first sign of overload.
    /// Default: [`Outcome::Ignored`].
    #[must_use]
    pub const fn cancelled(mut self, outcome: Outcome) -> Self {
        self.cancelled = outcome;
        self
    }

    pub(super) fn base_rate(&self) -> u32 {
        self.base_rate
    }

    pub(super) fn lowest(&self) -> u32 {
        self.min_rate.unwrap_or((self.base_rate / 10).max(1))
    }

    pub(super) fn highest(&self) -> u32 {
        self.max_rate.unwrap_or(self.base_rate.saturating_mul(2))
    }

    pub(super) fn largest(&self) -> u32 {
        self.burst.unwrap_or(self.base_rate)
    }

    pub(super) fn period(&self) -> Duration {
        self.window
    }

    pub(super) fn cancelled_outcome(&self) -> Outcome {
        self.cancelled
    }

    #[cfg(feature = "serde")]
    pub(super) fn thresholds(&self) -> (f64, f64, u32) {
        (self.error_threshold, self.adjustment_factor, self.minimum_calls)
    }

    /// The same limit with every default spelt out, for comparison.
    pub(super) fn resolved(self) -> Self {
        self.min_rate(self.lowest())
            .max_rate(self.highest())
            .burst(self.largest())
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        within("base_rate", self.base_rate, &(1..=u32::MAX))?;
        within("min_rate", self.lowest(), &(1..=self.base_rate))?;
        within("max_rate", self.highest(), &(self.base_rate..=u32::MAX))?;
        within("burst", self.largest(), &(1..=u32::MAX))?;
        duration("window", self.window)?;
        share("error_threshold", self.error_threshold)?;
        if !(self.adjustment_factor > 0.0 && self.adjustment_factor < 1.0) {
            let value = self.adjustment_factor.to_string();
            return Err(ConfigError::new("adjustment_factor", value, "above 0 and below 1"));
        }
        within("minimum_calls", self.minimum_calls, &(1..=u32::MAX))?;
        self.token().map(|_| ())
    }

    /// Units a token: as fine as the bucket can hold a burst of, given how far the rates lie apart; see [`Bucket`].
    fn token(&self) -> Result<u64, ConfigError> {
        const FINE_ENOUGH: u64 = 1 << 32;
        let apart = u64::from(self.highest().div_ceil(self.lowest()));
        match Bucket::LARGEST / apart / u64::from(self.largest()) {
            0 => Err(ConfigError::new(
                "burst",
                self.largest().to_string(),
                format!(
                    "at most 2^61 × min_rate / max_rate, which is {}",
                    Bucket::LARGEST / apart
                ),
            )),
            finest => Ok(finest.min(FINE_ENOUGH)),
        }
    }

    pub(super) fn build(&self, now: Timestamp) -> Result<AdaptiveState, ConfigError> {
        self.validate()?;
        let token = self.token()?;
        let line = |rate: u32| Line {
            start: now,
            base: token * u64::from(self.largest()),
            mul: units_per_window(rate.into(), token),
            div: nanos(self.window),
        };
        let course = Course {
            line: line(self.base_rate),
            rate: self.base_rate.into(),
            window_end: now.saturating_add(self.window),
        };
        let state = AdaptiveState {
            rules: Rules {
                lowest: self.lowest(),
                highest: self.highest(),
                window: nanos(self.window),
                error_threshold: self.error_threshold,
                adjustment_factor: self.adjustment_factor,
                minimum_calls: self.minimum_calls,
            },
            sits: None,
            level: Level::full(&line(self.base_rate)),
            scale: Scale::new(token, self.largest(), &line(self.highest()), false),
            used: AtomicU64::new(0),
            successes: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            course: Mutex::new(course),
            published: Published::default(),
        };
        state.published.write(&course);
        Ok(state)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at least 1 and below 2⁶⁴: the scale sees to it"
)]
fn units_per_window(rate: f64, token: u64) -> u64 {
    ((rate * token as f64) as u64).max(1)
}

#[derive(Debug, Clone, Copy, Default)]
struct Outcomes {
    successes: u64,
    failures: u64,
}

impl Outcomes {
    /// What was counted since then. Counts wrap.
    fn since(self, then: Self) -> Self {
        Self {
            successes: self.successes.wrapping_sub(then.successes),
            failures: self.failures.wrapping_sub(then.failures),
        }
    }
}

/// What one window has seen.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    /// Outcomes that were told to the state, of this window.
    told: Outcomes,
    /// Those that were only counted where it sits, and all that ever were.
    counted: Outcomes,
    ever_counted: Outcomes,
    used: u64,
}

impl Seen {
    fn calls(&self) -> u64 {
        self.told.successes + self.counted.successes + self.failures()
    }

    fn failures(&self) -> u64 {
        self.told.failures + self.counted.failures
    }
}

/// At which rate tokens are made, and until when that is settled.
#[derive(Debug, Clone, Copy)]
struct Course {
    line: Line,
    rate: f64,
    window_end: Timestamp,
}

/// A move of the rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Moved {
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) at: Timestamp,
}

/// What moves the rate. Apart from the settings, which take more room: a keyed limiter keeps this for each key.
#[derive(Debug)]
struct Rules {
    lowest: u32,
    highest: u32,
    window: u64,
    error_threshold: f64,
    adjustment_factor: f64,
    minimum_calls: u32,
}

impl Rules {
    /// The rate after a window with these outcomes.
    fn next_rate(&self, rate: f64, seen: Seen) -> f64 {
        if seen.calls() < u64::from(self.minimum_calls) {
            return rate;
        }
        let error_rate = seen.failures() as f64 / seen.calls() as f64;
        let moved = if error_rate > self.error_threshold {
            rate * (1.0 - self.adjustment_factor)
        } else if seen.used as f64 >= rate / 2.0 {
            rate * (1.0 + self.adjustment_factor)
        } else {
            rate
        };
        moved.clamp(self.lowest.into(), self.highest.into())
    }
}

#[derive(Debug)]
pub(super) struct AdaptiveState {
    rules: Rules,
    /// Boxed, since the states of a keyed limiter, of which there are many, do not sit.
    sits: Option<Box<Sits>>,
    level: Level,
    scale: Scale,
    /// Tokens taken in this window.
    used: AtomicU64,
    /// Outcomes of this window that were told here. Each is one addition, so that none is split between two windows.
    successes: AtomicU64,
    failures: AtomicU64,
    course: Mutex<Course>,
    published: Published,
}

/// Where outcomes are counted besides the state itself, and the end of the window is published for those who do so.
///
/// Whoever ends a window sums the counts up first, and then stores the new end with Release; who counts has loaded the end with
/// Acquire. So who counts because it has seen the new end is not in the sum of the old window.
#[derive(Debug)]
struct Sits {
    seat: Seated,
    /// The outcomes that had been counted there when the window began. Whoever reads or writes them holds the course.
    successes: AtomicU64,
    failures: AtomicU64,
}

impl Sits {
    fn ever_counted(&self) -> Outcomes {
        Outcomes {
            successes: self.seat.sum(admitted::outcomes(Outcome::Success)),
            failures: self.seat.sum(admitted::outcomes(Outcome::Failure)),
        }
    }

    fn before_this_window(&self) -> Outcomes {
        Outcomes {
            successes: self.successes.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }

    fn begin_window(&self, before: Outcomes, end: Timestamp) {
        self.successes.store(before.successes, Ordering::Relaxed);
        self.failures.store(before.failures, Ordering::Relaxed);
        admitted::window_end(self.seat.hot()).store(end.nanos(), Ordering::Release);
    }
}

/// The course as everybody reads it: a sequence lock. The writer holds the mutex; the version is odd while it writes. A reader
/// whose version moved, or is odd, takes the mutex instead of spinning: the writer may have lost its processor.
#[derive(Debug, Default)]
struct Published {
    version: AtomicU64,
    start: AtomicU64,
    base: AtomicU64,
    mul: AtomicU64,
    window_end: AtomicU64,
}

impl Published {
    fn write(&self, course: &Course) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // Pairs with the readers' Acquire fence: who sees one of the values below sees the odd version.
        fence(Ordering::Release);
        self.start.store(course.line.start.nanos(), Ordering::Relaxed);
        self.base.store(course.line.base, Ordering::Relaxed);
        self.mul.store(course.line.mul, Ordering::Relaxed);
        self.window_end.store(course.window_end.nanos(), Ordering::Relaxed);
        self.version.store(version + 2, Ordering::Release);
    }

    fn read(&self, div: u64) -> Option<(Line, Timestamp)> {
        let version = self.version.load(Ordering::Acquire);
        let line = Line {
            start: Timestamp::from_nanos(self.start.load(Ordering::Relaxed)),
            base: self.base.load(Ordering::Relaxed),
            mul: self.mul.load(Ordering::Relaxed),
            div,
        };
        let window_end = Timestamp::from_nanos(self.window_end.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let whole = version & 1 == 0 && self.version.load(Ordering::Relaxed) == version;
        whole.then_some((line, window_end))
    }
}

impl AdaptiveState {
    fn bucket(&self) -> Bucket<'_> {
        Bucket {
            level: &self.level,
            scale: &self.scale,
        }
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        self.course.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the state sits there. Nobody has seen it yet.
    pub(super) fn sit(&mut self, seat: Seated) {
        let sits = Sits {
            seat,
            successes: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        };
        sits.begin_window(Outcomes::default(), self.course().window_end);
        self.sits = Some(Box::new(sits));
    }

    /// What the window has seen, for whoever holds the course. An outcome that is counted while this looks is seen now or by the
    /// next window.
    fn seen(&self) -> Seen {
        let (ever_counted, counted) = match &self.sits {
            None => Default::default(),
            Some(sits) => {
                let ever = sits.ever_counted();
                (ever, ever.since(sits.before_this_window()))
            }
        };
        Seen {
            told: Outcomes {
                successes: self.successes.load(Ordering::Relaxed),
                failures: self.failures.load(Ordering::Relaxed),
            },
            counted,
            ever_counted,
            used: self.used.load(Ordering::Relaxed),
        }
    }

    /// The course from the end of the window on, if it has ended, and what the window has seen: what [`roll`](Self::roll) makes real.
    fn next_course(&self, course: &Course, now: Timestamp) -> Option<(Course, Seen)> {
        let over = now.nanos().checked_sub(course.window_end.nanos())?;
        let seen = self.seen();
        let rate = self.rules.next_rate(course.rate, seen);
        let window = course.line.div;
        let windows = over / window + 1;
        let end = course.window_end.nanos().saturating_add(windows.saturating_mul(window));
        let bent = (rate - course.rate).abs() > 0.0;
        let next = Course {
            // A line that goes straight on keeps its origin: no rounding adds up.
            line: if bent {
                Line {
                    start: course.window_end,
                    base: course.line.made(course.window_end),
                    mul: units_per_window(rate, self.scale.token()),
                    div: window,
                }
            } else {
                course.line
            },
            rate,
            window_end: Timestamp::from_nanos(end),
        };
        Some((next, seen))
    }

    /// The course at `now`, a due move included.
    fn present(&self, course: &Course, now: Timestamp) -> Course {
        self.next_course(course, now).map_or(*course, |(next, _)| next)
    }

    /// Ends the window if it is over; tells if the rate moved.
    pub(super) fn roll(&self, now: Timestamp) -> Option<Moved> {
        if let Some((_, window_end)) = self.published.read(1)
            && now < window_end
        {
            return None;
        }
        let mut course = self.course();
        let (next, seen) = self.next_course(&course, now)?;
        let before = std::mem::replace(&mut *course, next);
        self.published.write(&next);
        if let Some(sits) = &self.sits {
            sits.begin_window(seen.ever_counted, next.window_end);
        }
        // What was seen is done with; what came in meanwhile belongs to the new window.
        for (counter, seen) in [
            (&self.successes, seen.told.successes),
            (&self.failures, seen.told.failures),
            (&self.used, seen.used),
        ] {
            let less = |now: u64| Some(now.saturating_sub(seen));
            let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
        ((next.rate - before.rate).abs() > 0.0).then_some(Moved {
            from: before.rate,
            to: next.rate,
            at: before.window_end,
        })
    }

    /// The line that holds now, a due move included.
    fn line(&self, now: Timestamp) -> Line {
        match self.published.read(self.rules.window) {
            Some((line, window_end)) if now < window_end => line,
            _ => {
                let course = self.course();
                self.present(&course, now).line
            }
        }
    }

    /// Requests per window, a due move included.
    pub(super) fn rate(&self, now: Timestamp) -> f64 {
        let course = self.course();
        self.present(&course, now).rate
    }

    /// When the window ends that `now` lies in.
    pub(super) fn window_end(&self, now: Timestamp) -> Timestamp {
        let course = self.course();
        self.present(&course, now).window_end
    }

    /// When what is missing will have been made, if no more outcomes arrive: a move that is already settled is foreseen.
    fn when(&self, short: Short) -> Timestamp {
        let course = self.course();
        if let Some((next, _)) = self.next_course(&course, short.at) {
            // A move that is due uses up what was seen: none follows from it.
            return next.line.when(short);
        }
        let end = course.window_end;
        let at = course.line.when(short);
        if at <= end {
            return at;
        }
        let until_then = course.line.made(end).wrapping_sub(course.line.made(short.at));
        self.present(&course, end)
            .line
            .later(end, short.units.saturating_sub(until_then))
    }

    /// Takes one token, if that is there and the window is not over; otherwise nothing has happened.
    #[inline(never)]
    pub(super) fn take_one_at_a_glance(&self, now: Timestamp) -> bool {
        let Some((line, window_end)) = self.published.read(self.rules.window) else {
            return false;
        };
        let taken = now < window_end && self.bucket().take(&line, 1, now).is_ok();
        if taken {
            self.used.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    pub(super) fn take(&self, cost: u32, now: Timestamp) -> Result<(), Timestamp> {
        let taken = self.bucket().take(&self.line(now), cost, now);
        self.taken(taken, cost)
    }

    pub(super) fn take_in_line(&self, cost: u32, now: Timestamp) -> Result<(), Timestamp> {
        let taken = self.bucket().take_in_line(&self.line(now), cost, now);
        self.taken(taken, cost)
    }

    fn taken(&self, taken: Result<(), Short>, cost: u32) -> Result<(), Timestamp> {
        taken.map_err(|short| self.when(short))?;
        self.used.fetch_add(cost.into(), Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn give_back(&self, cost: u32, now: Timestamp) {
        self.bucket().give_back(&self.line(now), cost, now);
        let less = |used: u64| Some(used.saturating_sub(cost.into()));
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    pub(super) fn charge(&self, cost: u32, now: Timestamp) {
        self.bucket().charge(&self.line(now), cost, now);
        self.used.fetch_add(cost.into(), Ordering::Relaxed);
    }

    pub(super) fn learn(&self, outcome: Outcome) {
        let counter = match outcome {
            Outcome::Ignored => return,
            Outcome::Failure => &self.failures,
            Outcome::Success => &self.successes,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn peek(&self, cost: u32, now: Timestamp) -> Timestamp {
        let enough = self.bucket().peek(&self.line(now), cost, now);
        enough.map_or_else(|short| self.when(short), |()| now)
    }

    pub(super) fn due(&self, cost: u64, now: Timestamp) -> Timestamp {
        let enough = self.bucket().peek_in_line(&self.line(now), cost, now);
        enough.map_or_else(|short| self.when(short), |()| now)
    }

    pub(super) fn full_again(&self, now: Timestamp) -> Timestamp {
        let full = self.bucket().peek_full(&self.line(now), now);
        full.map_or_else(|short| self.when(short), |()| now)
    }

    pub(super) fn tokens(&self, now: Timestamp) -> f64 {
        self.bucket().tokens(&self.line(now), now)
    }

    pub(super) fn whole_tokens(&self, now: Timestamp) -> u32 {
        self.bucket().whole_tokens(&self.line(now), now)
    }
}

#[cfg(all(test, portcullis_loom))]
mod model {
    use super::*;
    use crate::sync::{explore, spawn};
    use std::sync::Arc;

    const WINDOW: u64 = 1_000;

    fn at(nanos: u64) -> Timestamp {
        Timestamp::from_nanos((1 << 62) + nanos)
    }

    /// Ten requests in a window, and one outcome moves the rate.
    fn adaptive() -> Arc<AdaptiveState> {
        let config = Adaptive::new(10)
            .burst(1)
            .window(Duration::from_nanos(WINDOW))
            .minimum_calls(1);
        Arc::new(config.build(at(0)).expect("a valid limit"))
    }

    fn left(state: &AdaptiveState) -> (u64, u64) {
        let seen = state.seen();
        (seen.calls(), seen.failures())
    }

    #[test]
    fn a_course_is_read_whole() {
        explore("a course is read while it is written", 3, || {
            let course = |number: u64| Course {
                line: Line {
                    start: at(number),
                    base: number,
                    mul: number,
                    div: 1,
                },
                rate: 1.0,
                window_end: at(number),
            };
            let published = Arc::new(Published::default());
            published.write(&course(1));
            let other = published.clone();
            let writes = spawn(move || other.write(&course(2)));
            if let Some((line, window_end)) = published.read(1) {
                let whole = |number| line == course(number).line && window_end == at(number);
                assert!((1..=2).any(whole), "torn: {line:?} {window_end:?}");
            }
            writes.join().unwrap();
            assert!(published.read(1).is_some_and(|(line, _)| line == course(2).line));
        });
    }

    #[test]
    fn a_window_ends_once_and_takes_only_what_it_saw() {
        explore("two end a window", 3, || {
            let state = adaptive();
            state.learn(Outcome::Failure);
            let other = state.clone();
            let ends = spawn(move || {
                let moved = other.roll(at(WINDOW)).is_some();
                other.learn(Outcome::Failure);
                moved
            });
            let mine = state.roll(at(WINDOW)).is_some();
            assert!(mine ^ ends.join().unwrap(), "moved twice, or never");
            assert_eq!(
                left(&state),
                (1, 1),
                "what was learnt after the end is all that is left"
            );
            assert!((state.rate(at(WINDOW)) - 8.0).abs() < 1e-9);
        });
    }

    #[test]
    fn an_outcome_belongs_to_one_window_and_whole() {
        for outcome in [Outcome::Failure, Outcome::Success] {
            explore("an outcome comes in while a window ends", 3, move || {
                let state = adaptive();
                // Enough is used for a success to raise the rate.
                state.charge(5, at(0));
                let other = state.clone();
                let learns = spawn(move || other.learn(outcome));
                let moved = state.roll(at(WINDOW));
                learns.join().unwrap();
                let failures = u64::from(outcome == Outcome::Failure);
                let expected = if failures > 0 { 8.0 } else { 12.0 };
                match moved {
                    Some(moved) => {
                        assert!((moved.to - expected).abs() < 1e-9);
                        assert_eq!(left(&state), (0, 0), "counted twice");
                    }
                    None => assert_eq!(left(&state), (1, failures), "lost, or split"),
                }
            });
        }
    }

    #[test]
    fn every_outcome_of_a_window_is_counted_once() {
        explore("two learn while a window ends", 2, || {
            let state = adaptive();
            let learns = |outcome| {
                let state = state.clone();
                spawn(move || state.learn(outcome))
            };
            let (one, two) = (learns(Outcome::Failure), learns(Outcome::Success));
            let moved = state.roll(at(WINDOW));
            one.join().unwrap();
            two.join().unwrap();
            // The one failure lowered the rate, or is left for the next window.
            let seen = match (moved, left(&state)) {
                (Some(_), (calls, 0)) => calls <= 1,
                (None, (calls, 1)) => (1..=2).contains(&calls),
                _ => false,
            };
            assert!(seen, "{moved:?} {:?}", left(&state));
        });
    }

    #[test]
    fn no_token_is_given_twice_while_the_rate_moves() {
        explore("two take while the rate moves", 2, || {
            let state = adaptive();
            state.learn(Outcome::Failure);
            let other = state.clone();
            let takes = spawn(move || other.take(1, at(WINDOW)).is_ok());
            state.roll(at(WINDOW));
            let mine = state.take(1, at(WINDOW)).is_ok();
            assert!(mine ^ takes.join().unwrap(), "one token was there");
            assert_eq!(state.whole_tokens(at(WINDOW)), 0);
        });
    }

    #[test]
    fn what_is_used_while_a_window_ends_is_counted_once() {
        explore("one uses tokens while a window ends", 3, || {
            let state = adaptive();
            state.learn(Outcome::Success);
            // Half the rate is used.
            state.charge(5, at(0));
            let other = state.clone();
            let uses = spawn(move || other.charge(3, at(0)));
            let moved = state.roll(at(WINDOW)).expect("the rate rises");
            uses.join().unwrap();
            assert!((moved.to - 12.0).abs() < 1e-9);
            assert!([0, 3].contains(&state.seen().used), "{}", state.seen().used);
        });
    }
}
