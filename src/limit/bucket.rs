//! The generic cell rate algorithm (ITU-T I.371, GCRA) in whole numbers: what the token bucket and the adaptive limiter stand on.
//!
//! Tokens are counted in *units*, fractions of a token chosen so that a nanosecond brings a whole number of them: then nothing
//! is ever rounded. Two numbers make the bucket: how many units have *ever* been made by now (a [`Line`], computed from the
//! absolute elapsed time, so no error adds up) and how many have ever been taken or have overflowed (one atomic). Their
//! difference is the content.
//!
//! # Why 64 bits are enough
//!
//! Both counts wrap round. Their difference is right as long as it is small, and so it is while somebody comes by now and then:
//! the bucket holds at most a burst (no more than 2⁶¹ units) and owes at most as much. [`Level::touched`] remembers when
//! somebody last did. Whoever comes [`TOUCH_AFTER`] or more later first writes off what has overflowed since and then touches
//! the bucket; only then are tokens taken. So a bucket that has not been touched for [`FULL_AFTER`] has lain idle for the time
//! of two bursts at least, and is full, whatever its wrapped difference seems to say; before that the difference is below 2⁶³.

use super::backoff::back_off;
use crate::{
    clock::Timestamp,
    sync::atomic::{AtomicU64, Ordering},
};
use std::time::Duration;

/// How long a bucket may go untouched, and after how long it is full, in units' time.
const TOUCH_AFTER: u64 = 1 << 60;
const FULL_AFTER: u64 = TOUCH_AFTER + 2 * Bucket::LARGEST;

/// Units made since the beginning of time, as a straight line over the clock: `base + (now − start) · mul / div`, modulo 2⁶⁴.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) start: Timestamp,
    pub(super) base: u64,
    pub(super) mul: u64,
    pub(super) div: u64,
}

impl Line {
    #[inline]
    fn elapsed(&self, now: Timestamp) -> u64 {
        now.nanos().saturating_sub(self.start.nanos())
    }

    /// Whole units made by `now`.
    pub(super) fn made(&self, now: Timestamp) -> u64 {
        let elapsed = self.elapsed(now);
        self.base.wrapping_add(if self.div == 1 {
            elapsed.wrapping_mul(self.mul)
        } else {
            let made = u128::from(elapsed) * u128::from(self.mul) / u128::from(self.div);
            low_half(made)
        })
    }

    /// The first nanosecond from `now` on at which so many more whole units are made: the exact inverse of
    /// [`made`](Self::made).
    pub(super) fn later(&self, now: Timestamp, units: u64) -> Timestamp {
        if self.div == 1 {
            return self.soon(now, units);
        }
        let elapsed = u128::from(self.elapsed(now));
        let (mul, div) = (u128::from(self.mul), u128::from(self.div));
        let target = elapsed.saturating_mul(mul) / div + u128::from(units);
        let at = target.saturating_mul(div).div_ceil(mul);
        let at = u64::try_from(at).unwrap_or(u64::MAX);
        Timestamp::from_nanos(self.start.nanos().saturating_add(at)).max(now)
    }

    /// [`later`](Self::later) where a nanosecond makes a whole number of units.
    #[inline]
    fn soon(&self, now: Timestamp, units: u64) -> Timestamp {
        let now = now.max(self.start);
        Timestamp::from_nanos(now.nanos().saturating_add(units.div_ceil(self.mul)))
    }

    /// When what is missing will have been made.
    pub(super) fn when(&self, short: Short) -> Timestamp {
        self.later(short.at, short.units)
    }

    /// Whether a unit is in the making: then the whole ones are not the whole truth.
    fn is_between(&self, now: Timestamp) -> bool {
        self.div > 1 && u128::from(self.elapsed(now)) * u128::from(self.mul) % u128::from(self.div) > 0
    }

    /// How many nanoseconds so many units take at this rate.
    fn nanos_of(&self, units: u64) -> u64 {
        let nanos = u128::from(units) * u128::from(self.div) / u128::from(self.mul);
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "modulo 2⁶⁴ is what is wanted")]
fn low_half(n: u128) -> u64 {
    n as u64
}

/// A difference of wrapped counts.
#[inline]
fn difference(a: u64, b: u64) -> i64 {
    a.wrapping_sub(b).cast_signed()
}

/// A bucket of tokens. The line is handed in: for a token bucket it is always the same, for an adaptive limiter it bends.
///
/// # Ordering
///
/// Whatever changes `gone` is one compare-and-swap with what was seen at one look; `touched` only rises. `gone` is loaded with
/// Acquire and exchanged with `AcqRel`. A taker touches the bucket, if that is due, before it takes; so
/// whoever sees what it took sees that the bucket is touched, if it looks at `touched` after `gone`. The other way round, who
/// sees that it was touched might have seen a `gone` from before: two counts that lie too far apart to be compared. So a look
/// counts only if `gone` is still what it was.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bucket<'a> {
    pub(super) level: &'a Level,
    pub(super) scale: &'a Scale,
}

/// What changes of a bucket: all that there is for each key of a keyed limiter.
#[derive(Debug)]
pub(super) struct Level {
    /// Units ever taken, or lost because the bucket was full; wraps.
    gone: AtomicU64,
    /// A time, in nanoseconds, at which the content was put right, not long before the last token was taken.
    touched: AtomicU64,
}

impl Level {
    /// Full, if the line's base is the burst.
    pub(super) fn full(line: &Line) -> Self {
        Self::new(0, line.start.nanos())
    }

    pub(super) fn new(gone: u64, touched: u64) -> Self {
        Self {
            gone: AtomicU64::new(gone),
            touched: AtomicU64::new(touched),
        }
    }

    #[inline]
    pub(super) fn gone(&self) -> &AtomicU64 {
        &self.gone
    }

    #[inline]
    pub(super) fn touched(&self) -> &AtomicU64 {
        &self.touched
    }
}

/// What does not change of a bucket.
#[derive(Debug)]
pub(super) struct Scale {
    /// Units a token.
    token: u64,
    /// The most that the bucket holds, in units.
    burst: i64,
    /// What a full bucket does with the unit in the making: lose it with the rest of the overflow, and hand the last of a burst
    /// out a little late; or keep it, and hand the next token out a little early.
    strict: bool,
    /// From how long after being touched the bucket wants to be touched again, and is full; in nanoseconds.
    touch_after: u64,
    full_after: u64,
    /// Up to how long after being touched a look may be enough: never where units come in fractions.
    glance_until: u64,
}

impl Scale {
    /// `fastest` is the line at its highest rate; at the lowest it must still make two bursts in `FULL_AFTER - TOUCH_AFTER` of
    /// the fastest one's time.
    pub(super) fn new(token: u64, burst: u32, fastest: &Line, strict: bool) -> Self {
        Self {
            token,
            burst: (token * u64::from(burst)).cast_signed(),
            strict,
            touch_after: fastest.nanos_of(TOUCH_AFTER),
            glance_until: if fastest.div == 1 {
                fastest.nanos_of(TOUCH_AFTER).saturating_add(1)
            } else {
                0
            },
            full_after: fastest.nanos_of(FULL_AFTER),
        }
    }

    pub(super) fn token(&self) -> u64 {
        self.token
    }

    /// What is gone after one more token, if the bucket is as [`Bucket::take_one_at_a_glance`] wants it. Both counts must belong
    /// together.
    #[inline]
    pub(super) fn one_gone(&self, line: &Line, gone: u64, touched: u64, now: Timestamp) -> Option<u64> {
        let (made, left) = self.one_left(line, gone, touched, now)?;
        (left >= 0).then(|| made.wrapping_sub(left.cast_unsigned()))
    }

    /// The units made, and those left after one more token: fewer than none, if it is not there.
    #[inline]
    fn one_left(&self, line: &Line, gone: u64, touched: u64, now: Timestamp) -> Option<(u64, i64)> {
        // Of a thread that lies behind it is very long. So the line had begun by then: it was touched when it began.
        if now.nanos().wrapping_sub(touched) >= self.glance_until {
            return None;
        }
        let elapsed = now.nanos().wrapping_sub(line.start.nanos());
        let made = line.base.wrapping_add(elapsed.wrapping_mul(line.mul));
        let content = difference(made, gone).min(self.burst);
        Some((made, content - self.token.cast_signed()))
    }
}

impl Bucket<'_> {
    /// The most units that a bucket may hold.
    pub(super) const LARGEST: u64 = 1 << 61;

    fn units(&self, cost: u32) -> i64 {
        // A cost is at most the burst. A true cost may be more: from a full bucket to the deepest debt it is two bursts.
        let most = 2 * Self::LARGEST;
        self.scale.token.saturating_mul(cost.into()).min(most).cast_signed()
    }

    /// What is gone, and when the bucket was touched before that.
    fn counts(&self) -> (u64, u64) {
        let mut gone = self.level.gone.load(Ordering::Acquire);
        loop {
            let touched = self.level.touched.load(Ordering::Acquire);
            let latest = self.level.gone.load(Ordering::Acquire);
            if latest == gone {
                return (gone, touched);
            }
            gone = latest;
        }
    }

    /// Counts of what is gone and made, and the time at which they belong together.
    fn look(&self, line: &Line, now: Timestamp) -> Look {
        let (gone, touched) = self.counts();
        // A thread that lies so far behind that the difference would be ambiguous takes the later time that others have read.
        let now = now.max(Timestamp::from_nanos(touched.saturating_sub(self.scale.touch_after)));
        let since = now.nanos().saturating_sub(touched);
        let made = line.made(now);
        let content = if since > self.scale.full_after {
            self.scale.burst
        } else {
            difference(made, gone)
        };
        Look {
            gone,
            made,
            content,
            now,
            wants_touch: since > self.scale.touch_after,
        }
    }

    /// Looks, and touches the bucket if that is due: what has overflowed is written off first.
    fn look_and_touch(&self, line: &Line, now: Timestamp) -> Look {
        loop {
            let look = self.look(line, now);
            if !look.wants_touch {
                return look;
            }
            // A full bucket stays as full as it is: only a taker settles what becomes of the unit in the making.
            let content = look.content.min(self.scale.burst).cast_unsigned();
            if self.replace(look.gone, look.made.wrapping_sub(content)) {
                self.level.touched.fetch_max(look.now.nanos(), Ordering::AcqRel);
            }
        }
    }

    /// The content once all above `most` has overflowed, and what counts as made then.
    fn level_of(&self, line: &Line, look: &Look, most: i64) -> (i64, u64) {
        if look.content < most {
            (look.content, look.made)
        } else {
            (most, self.made_at_an_end(line, look))
        }
    }

    /// What counts as made where a content is set instead of moved, at the top of the bucket or at the bottom of its debt: the
    /// whole truth, rounded up.
    fn made_at_an_end(&self, line: &Line, look: &Look) -> u64 {
        let unfinished = self.scale.strict && line.is_between(look.now);
        look.made.wrapping_add(unfinished.into())
    }

    #[inline]
    fn replace(&self, gone: u64, with: u64) -> bool {
        self.level
            .gone
            .compare_exchange_weak(gone, with, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Takes one token, if the bucket is as it mostly is: units come in whole numbers, it was touched lately, and it has the token.
    /// Otherwise nothing has happened: [`take`](Self::take) knows the rest.
    ///
    /// `gone` is what it was before `touched` was read, or the exchange fails: the look is as good as [`look`](Self::look).
    #[inline]
    pub(super) fn take_one_at_a_glance(&self, line: &Line, now: Timestamp) -> bool {
        loop {
            let gone = self.level.gone.load(Ordering::Acquire);
            let touched = self.level.touched.load(Ordering::Acquire);
            let Some(with) = self.scale.one_gone(line, gone, touched, now) else {
                return false;
            };
            if self.replace(gone, with) {
                return true;
            }
            back_off(now);
        }
    }

    /// How long one token is refused, if the bucket is as it mostly is and does not have it.
    #[inline]
    pub(super) fn refuses_one_at_a_glance(&self, line: &Line, now: Timestamp) -> Option<Duration> {
        let gone = self.level.gone.load(Ordering::Acquire);
        let touched = self.level.touched.load(Ordering::Acquire);
        let (_, left) = self.scale.one_left(line, gone, touched, now)?;
        let refused = left < 0 && self.level.gone.load(Ordering::Acquire) == gone;
        refused.then(|| line.soon(now, left.unsigned_abs()).duration_since(now))
    }

    /// Takes `cost` tokens (no more than the burst), or tells what is missing.
    pub(super) fn take(&self, line: &Line, cost: u32, now: Timestamp) -> Result<(), Short> {
        self.take_from(line, cost, now, self.scale.burst)
    }

    /// The same for those who wait in line. While somebody waits nothing overflows: had the waiter been served the moment it
    /// was due, the tokens that came later would have been there for the next. A timer that is late costs nobody anything.
    pub(super) fn take_in_line(&self, line: &Line, cost: u32, now: Timestamp) -> Result<(), Short> {
        self.take_from(line, cost, now, i64::MAX)
    }

    fn take_from(&self, line: &Line, cost: u32, now: Timestamp, most: i64) -> Result<(), Short> {
        let need = self.units(cost);
        loop {
            let look = self.look_and_touch(line, now);
            let (content, made) = self.level_of(line, &look, most);
            look.enough(content.into(), need.into())?;
            let left = (content - need).cast_unsigned();
            if self.replace(look.gone, made.wrapping_sub(left)) {
                return Ok(());
            }
            back_off(now);
        }
    }

    /// The answer of [`take`](Self::take), without taking.
    pub(super) fn peek(&self, line: &Line, cost: u32, now: Timestamp) -> Result<(), Short> {
        let look = self.look(line, now);
        look.enough(look.content.min(self.scale.burst).into(), self.units(cost).into())
    }

    /// What is missing to a full bucket.
    pub(super) fn peek_full(&self, line: &Line, now: Timestamp) -> Result<(), Short> {
        let look = self.look(line, now);
        look.enough(look.content.into(), self.scale.burst.into())
    }

    /// What is missing for a line of waiters that cost so much together, one after the other.
    pub(super) fn peek_in_line(&self, line: &Line, cost: u64, now: Timestamp) -> Result<(), Short> {
        let look = self.look(line, now);
        look.enough(look.content.into(), i128::from(self.scale.token) * i128::from(cost))
    }

    /// Gives tokens back. The bucket still holds no more than its burst.
    pub(super) fn give_back(&self, line: &Line, cost: u32, now: Timestamp) {
        self.change(line, now, |content| content + self.units(cost));
    }

    /// Takes tokens that have been used already: the bucket goes into debt, by at most one burst.
    pub(super) fn charge(&self, line: &Line, cost: u32, now: Timestamp) {
        self.change(line, now, |content| {
            let least = content.min(-self.scale.burst);
            (content - self.units(cost)).max(least)
        });
    }

    fn change(&self, line: &Line, now: Timestamp, change: impl Fn(i64) -> i64) {
        loop {
            let look = self.look_and_touch(line, now);
            let (before, made) = self.level_of(line, &look, self.scale.burst);
            let content = change(before).min(self.scale.burst);
            // At an end it is set anew: the unit in the making has grown since.
            if content == before && content.abs() != self.scale.burst {
                return;
            }
            let made = if content.abs() < self.scale.burst {
                made
            } else {
                self.made_at_an_end(line, &look)
            };
            if self.replace(look.gone, made.wrapping_sub(content.cast_unsigned())) {
                return;
            }
        }
    }

    /// The content in tokens; nothing while in debt.
    pub(super) fn tokens(&self, line: &Line, now: Timestamp) -> f64 {
        let content = self.content(line, now);
        // In two parts: large numbers of units are rounded, and a full bucket would hold a little more than its burst.
        let (whole, part) = (content / self.scale.token, content % self.scale.token);
        let tokens = whole as f64 + part as f64 / self.scale.token as f64;
        // Nor is a token shown that is not there yet because all but the last of it is.
        tokens.min(((whole + 1) as f64).next_down())
    }

    /// The same in whole tokens. Not by way of a float: a large content would be rounded up to a token that is not there yet.
    pub(super) fn whole_tokens(&self, line: &Line, now: Timestamp) -> u32 {
        u32::try_from(self.content(line, now) / self.scale.token).unwrap_or(u32::MAX)
    }

    /// The units that are there, without overflow and debt.
    fn content(&self, line: &Line, now: Timestamp) -> u64 {
        let content = self.look(line, now).content;
        content.clamp(0, self.scale.burst).cast_unsigned()
    }
}

/// What one look at a bucket shows.
struct Look {
    gone: u64,
    made: u64,
    /// Units there, overflow included; negative while in debt.
    content: i64,
    now: Timestamp,
    wants_touch: bool,
}

impl Look {
    fn enough(&self, content: i128, need: i128) -> Result<(), Short> {
        match need - content {
            ..=0 => Ok(()),
            missing => Err(Short {
                units: u64::try_from(missing).unwrap_or(u64::MAX),
                at: self.now,
            }),
        }
    }
}

/// So many units are missing at that time, which is later than the caller's if that lies far behind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Short {
    pub(super) units: u64,
    pub(super) at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn later_is_the_exact_inverse_of_made(
            mul in 1..1u64 << 32, div in 1..1u64 << 32, base: u64, elapsed in 0..1u64 << 40, ask in 1..1u64 << 50,
        ) {
            let start = Timestamp::from_nanos(1 << 62);
            let line = Line { start, base, mul, div };
            let now = Timestamp::from_nanos(start.nanos() + elapsed);
            let at = line.later(now, ask);
            if at < Timestamp::from_nanos(u64::MAX) {
                let made_by = |at: Timestamp| {
                    let units = |at: Timestamp| u128::from(at.nanos() - start.nanos()) * u128::from(mul) / u128::from(div);
                    units(at) - units(now)
                };
                prop_assert!(made_by(at) >= u128::from(ask));
                let before = Timestamp::from_nanos(at.nanos() - 1);
                prop_assert!(at == now || made_by(before) < u128::from(ask));
            }
        }
    }
}

#[cfg(all(test, portcullis_loom))]
mod model {
    use super::*;
    use crate::sync::{explore, spawn};
    use std::sync::Arc;

    /// A bucket of so many tokens in which no time passes: what is taken must be given back to be there again.
    struct Still {
        level: Level,
        scale: Scale,
        line: Line,
        now: Timestamp,
    }

    impl Still {
        fn new(burst: u32) -> Arc<Self> {
            let now = Timestamp::from_nanos(1 << 62);
            let line = Line {
                start: now,
                base: 10 * u64::from(burst),
                mul: 1,
                div: 1,
            };
            Arc::new(Self {
                level: Level::full(&line),
                scale: Scale::new(10, burst, &line, true),
                line,
                now,
            })
        }

        fn bucket(&self) -> Bucket<'_> {
            Bucket {
                level: &self.level,
                scale: &self.scale,
            }
        }

        /// As a call takes it: at a glance, or else by a closer look.
        fn take(&self) -> bool {
            let bucket = self.bucket();
            bucket.take_one_at_a_glance(&self.line, self.now) || bucket.take(&self.line, 1, self.now).is_ok()
        }

        /// How many tokens are left.
        fn drain(&self) -> usize {
            std::iter::from_fn(|| self.take().then_some(())).count()
        }
    }

    #[test]
    fn of_the_last_token_two_threads_take_one() {
        explore("two takers of one token", 3, || {
            let still = Still::new(1);
            let other = still.clone();
            let takes = spawn(move || other.take());
            let mine = still.take();
            assert!(mine ^ takes.join().unwrap(), "exactly one of them");
            assert_eq!(still.drain(), 0);
        });
    }

    #[test]
    fn a_token_that_is_given_back_is_there_once() {
        explore("one gives back, one takes two", 3, || {
            let still = Still::new(2);
            assert!(still.take());
            let other = still.clone();
            let gives = spawn(move || other.bucket().give_back(&other.line, 1, other.now));
            let taken = [still.take(), still.take()].into_iter().filter(|taken| *taken).count();
            gives.join().unwrap();
            assert_eq!(taken + still.drain(), 2, "two tokens were there, and one came back");
        });
    }

    #[test]
    fn a_charge_and_a_take_both_count() {
        explore("one charges, one takes", 3, || {
            let still = Still::new(3);
            let other = still.clone();
            let charges = spawn(move || other.bucket().charge(&other.line, 2, other.now));
            let taken = usize::from(still.take());
            charges.join().unwrap();
            assert_eq!(taken + still.drain(), 1, "of three tokens two were charged");
        });
    }
}
