//! The algorithms behind one handle, as an enum: one match, no boxes.

use super::{
    Adaptive, SlidingWindow, TokenBucket,
    adaptive::AdaptiveState,
    adaptive::Moved,
    admitted::Wants,
    sliding_window,
    sliding_window::SlidingWindowState,
    token_bucket::{TokenBucketState, TokenBucketView},
};
use crate::{
    clock::{ClockKind, Timestamp, nanos},
    error::ConfigError,
    permit::Outcome,
    quota::Advertised,
    stripe::Seated,
};
use std::time::Duration;

/// How a [`RateLimiter`](super::RateLimiter) limits. Made by `From` of each algorithm's settings.
///
/// ```
/// # use portcullis::{Algorithm, SlidingWindow};
/// # use std::time::Duration;
/// let algorithm = Algorithm::from(SlidingWindow::new(100, Duration::from_secs(60)));
/// assert_eq!(algorithm.as_str(), "sliding_window");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Algorithm {
    /// A steady rate with room for bursts.
    TokenBucket(TokenBucket),
    /// A quota for any stretch of time.
    SlidingWindow(SlidingWindow),
    /// A rate that follows the errors.
    Adaptive(Adaptive),
}

impl Algorithm {
    /// The algorithm's name as metrics and JSON spell it.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::TokenBucket(_) => "token_bucket",
            Self::SlidingWindow(_) => "sliding_window",
            Self::Adaptive(_) => "adaptive",
        }
    }

    /// With every default spelt out, so that equal limits compare equal.
    pub(super) fn resolved(self) -> Self {
        match self {
            Self::TokenBucket(config) => Self::TokenBucket(config.resolved()),
            Self::SlidingWindow(_) => self,
            Self::Adaptive(config) => Self::Adaptive(config.resolved()),
        }
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::TokenBucket(config) => config.validate(),
            Self::SlidingWindow(config) => config.validate(),
            Self::Adaptive(config) => config.validate(),
        }
    }

    /// The most that can be admitted at once.
    pub(super) fn largest(&self) -> u32 {
        match self {
            Self::TokenBucket(config) => config.largest(),
            Self::SlidingWindow(config) => config.max_requests(),
            Self::Adaptive(config) => config.largest(),
        }
    }

    /// What a call counts as that was begun and dropped.
    pub(super) fn cancelled(&self) -> Outcome {
        match self {
            Self::TokenBucket(_) | Self::SlidingWindow(_) => Outcome::Ignored,
            Self::Adaptive(config) => config.cancelled_outcome(),
        }
    }

    pub(super) fn build(&self, now: Timestamp) -> Result<State, ConfigError> {
        Ok(match self {
            Self::TokenBucket(config) => State::TokenBucket(config.build(now)?),
            Self::SlidingWindow(config) => State::SlidingWindow(config.build(now)?),
            Self::Adaptive(config) => State::Adaptive(config.build(now)?),
        })
    }

    /// [`build`](Self::build) for one of many, each of which is asked little: as small as it can be.
    pub(super) fn build_narrow(&self, now: Timestamp) -> Result<State, ConfigError> {
        match self {
            Self::SlidingWindow(config) => config.build_narrow(now).map(State::SlidingWindow),
            Self::TokenBucket(_) | Self::Adaptive(_) => self.build(now),
        }
    }
}

impl From<TokenBucket> for Algorithm {
    fn from(config: TokenBucket) -> Self {
        Self::TokenBucket(config)
    }
}
impl From<SlidingWindow> for Algorithm {
    fn from(config: SlidingWindow) -> Self {
        Self::SlidingWindow(config)
    }
}
impl From<Adaptive> for Algorithm {
    fn from(config: Adaptive) -> Self {
        Self::Adaptive(config)
    }
}

/// What an admission must remember to be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// Nothing: tokens are alike.
    Tokens,
    /// Its place in the window.
    Window(sliding_window::Admission),
}

/// An algorithm at work. Every step is handed the time.
// With a tag of its own: one in a niche takes some steps more to read.
#[derive(Debug)]
#[repr(u8)]
pub(super) enum State {
    TokenBucket(TokenBucketState),
    SlidingWindow(SlidingWindowState),
    Adaptive(AdaptiveState),
}

impl State {
    /// Whether outcomes matter.
    #[inline]
    pub(super) fn learns(&self) -> bool {
        matches!(self, Self::Adaptive(_))
    }

    /// Has the state of a limiter count where that sits, by the clock it reads; tells what it wants to know of each call.
    pub(super) fn sit(&mut self, seat: Option<Seated>, clock: Option<ClockKind>) -> Wants {
        match (self, seat, clock) {
            (Self::TokenBucket(_) | Self::SlidingWindow(_), ..) => Wants::NOTHING,
            (Self::Adaptive(state), Some(seat), Some(clock)) => {
                state.sit(seat);
                Wants::counted_outcome(clock)
            }
            (Self::Adaptive(_), ..) => Wants::OUTCOME,
        }
    }

    /// Admits one request, if that takes no more than a look, and tells whether its outcome matters; otherwise nothing has
    /// happened, and [`View::take`] tells more.
    #[expect(
        clippy::inline_always,
        reason = "every call passes, and a call would pass its answer by memory"
    )]
    #[inline(always)]
    pub(super) fn take_one_at_a_glance(&self, now: impl FnOnce() -> Timestamp) -> Option<(Admission, bool)> {
        match self {
            Self::TokenBucket(state) => state.take_one_at_a_glance(now()).then_some((Admission::Tokens, false)),
            Self::SlidingWindow(state) => state
                .take_one_at_a_glance(now())
                .map(|at| (Admission::Window(at), false)),
            Self::Adaptive(state) => state.take_one_at_a_glance(now()).then_some((Admission::Tokens, true)),
        }
    }

    /// How long one request is refused, if a look tells.
    #[inline]
    pub(super) fn refuses_one_at_a_glance(&self, now: impl FnOnce() -> Timestamp) -> Option<Duration> {
        match self {
            Self::TokenBucket(state) => state.refuses_one_at_a_glance(now()),
            Self::SlidingWindow(_) | Self::Adaptive(_) => None,
        }
    }

    pub(super) fn view(&self) -> View<'_> {
        match self {
            Self::TokenBucket(state) => View::TokenBucket(state.view()),
            Self::SlidingWindow(state) => View::SlidingWindow(state),
            Self::Adaptive(state) => View::Adaptive(state),
        }
    }
}

/// What a keyed limiter keeps of a key that is no token bucket, in a box of its own size.
#[derive(Debug)]
pub(super) enum Cell {
    SlidingWindow(Box<SlidingWindowState>),
    Adaptive(Box<AdaptiveState>),
}

impl Cell {
    pub(super) fn view(&self) -> View<'_> {
        match self {
            Self::SlidingWindow(state) => View::SlidingWindow(state),
            Self::Adaptive(state) => View::Adaptive(state),
        }
    }
}

/// The same, wherever the state is kept.
#[derive(Debug, Clone, Copy)]
pub(super) enum View<'a> {
    TokenBucket(TokenBucketView<'a>),
    SlidingWindow(&'a SlidingWindowState),
    Adaptive(&'a AdaptiveState),
}

impl View<'_> {
    /// Admits `cost`, at most the largest, or tells when a caller alone would be.
    pub(super) fn take(&self, cost: u32, now: Timestamp) -> Result<Admission, Timestamp> {
        match self {
            Self::TokenBucket(state) => state.take(cost, now).map(|()| Admission::Tokens),
            Self::SlidingWindow(state) => state.take(cost, now).map(Admission::Window),
            Self::Adaptive(state) => state.take(cost, now).map(|()| Admission::Tokens),
        }
    }

    /// [`take`](Self::take) for the front of the line: a token that came while it waited is there, however late it is noticed.
    /// A window counts from the admission itself.
    pub(super) fn take_in_line(&self, cost: u32, now: Timestamp) -> Result<Admission, Timestamp> {
        match self {
            Self::TokenBucket(state) => state.take_in_line(cost, now).map(|()| Admission::Tokens),
            Self::SlidingWindow(state) => state.take(cost, now).map(Admission::Window),
            Self::Adaptive(state) => state.take_in_line(cost, now).map(|()| Admission::Tokens),
        }
    }

    /// When [`take`](Self::take) would admit; now or later.
    pub(super) fn peek(&self, cost: u32, now: Timestamp) -> Timestamp {
        match self {
            Self::TokenBucket(state) => state.peek(cost, now),
            Self::SlidingWindow(state) => state.peek(cost, now),
            Self::Adaptive(state) => state.peek(cost, now),
        }
    }

    /// When `cost` would be admitted behind those who wait, whose costs are `ahead`, in sum `total`.
    pub(super) fn due_behind(
        &self,
        ahead: impl Iterator<Item = u32>,
        total: u64,
        cost: u32,
        now: Timestamp,
    ) -> Timestamp {
        match self {
            // To a window it matters in what portions.
            Self::SlidingWindow(state) => state.due_behind(ahead, cost, now),
            Self::TokenBucket(_) | Self::Adaptive(_) => self.due(total + u64::from(cost), now),
        }
    }

    /// When so much would have been admitted, one by one; may exceed the largest.
    pub(super) fn due(&self, cost: u64, now: Timestamp) -> Timestamp {
        match self {
            Self::TokenBucket(state) => state.due(cost, now),
            Self::SlidingWindow(state) => state.due(cost, now),
            Self::Adaptive(state) => state.due(cost, now),
        }
    }

    /// Gives an admission back that was not used; `false` if it can no longer be.
    pub(super) fn give_back(&self, admission: Admission, cost: u32, now: Timestamp) -> bool {
        match (self, admission) {
            (Self::SlidingWindow(state), Admission::Window(admission)) => state.give_back(admission, cost),
            (Self::TokenBucket(state), _) => {
                state.give_back(cost, now);
                true
            }
            (Self::Adaptive(state), _) => {
                state.give_back(cost, now);
                true
            }
            (Self::SlidingWindow(_), Admission::Tokens) => false,
        }
    }

    /// Corrects an admission to what the call cost in truth.
    pub(super) fn correct(&self, reserved: u32, true_cost: u32, now: Timestamp) {
        let (more, less) = (true_cost.saturating_sub(reserved), reserved.saturating_sub(true_cost));
        match self {
            Self::TokenBucket(state) if more > 0 => state.charge(more, now),
            Self::TokenBucket(state) => state.give_back(less, now),
            Self::Adaptive(state) if more > 0 => state.charge(more, now),
            Self::Adaptive(state) => state.give_back(less, now),
            Self::SlidingWindow(_) => {}
        }
    }

    /// Lets time do what is due; tells if the rate moved.
    pub(super) fn roll(&self, now: Timestamp) -> Option<Moved> {
        match self {
            Self::Adaptive(state) => state.roll(now),
            Self::TokenBucket(_) | Self::SlidingWindow(_) => None,
        }
    }

    /// When the rate may move next.
    pub(super) fn next_move(&self, now: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Adaptive(state) => Some(state.window_end(now)),
            Self::TokenBucket(_) | Self::SlidingWindow(_) => None,
        }
    }

    pub(super) fn learns(&self) -> bool {
        matches!(self, Self::Adaptive(_))
    }

    pub(super) fn learn(&self, outcome: Outcome) {
        if let Self::Adaptive(state) = self {
            state.learn(outcome);
        }
    }

    /// What is there now, in requests.
    pub(super) fn available(&self, now: Timestamp) -> f64 {
        match self {
            Self::TokenBucket(state) => state.tokens(now),
            Self::SlidingWindow(state) => state.available(now) as f64,
            Self::Adaptive(state) => state.tokens(now),
        }
    }

    /// When everything is there, if nothing more is used; now or later.
    pub(super) fn full_again(&self, now: Timestamp) -> Timestamp {
        match self {
            Self::TokenBucket(state) => state.full_again(now),
            Self::SlidingWindow(state) => state.full_again(now),
            Self::Adaptive(state) => state.full_again(now),
        }
    }

    /// What clients are told of the limit. Where the burst is not what a window brings, the burst, and how long it takes to come.
    /// Always the same, unless the limit [learns](Self::learns).
    pub(super) fn advertised(&self, algorithm: &Algorithm, now: Timestamp) -> Advertised {
        let burst = algorithm.largest();
        let window = match algorithm {
            Algorithm::SlidingWindow(config) => nanos(config.window()).into(),
            Algorithm::TokenBucket(config) => {
                (u128::from(nanos(config.period())) * u128::from(burst)).div_ceil(config.limit().into())
            }
            Algorithm::Adaptive(config) => {
                let rate = self.adaptive_rate(now).unwrap_or(config.base_rate().into());
                whole(config.period().as_nanos() as f64 * f64::from(burst) / rate)
            }
        };
        Advertised::new(burst, window)
    }

    /// What is there now, in whole requests.
    pub(super) fn whole_available(&self, now: Timestamp) -> u32 {
        match self {
            Self::TokenBucket(state) => state.whole_tokens(now),
            Self::SlidingWindow(state) => u32::try_from(state.available(now)).unwrap_or(u32::MAX),
            Self::Adaptive(state) => state.whole_tokens(now),
        }
    }

    /// The adaptive rate now.
    pub(super) fn adaptive_rate(&self, now: Timestamp) -> Option<f64> {
        match self {
            Self::Adaptive(state) => Some(state.rate(now)),
            Self::TokenBucket(_) | Self::SlidingWindow(_) => None,
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and far below what the type holds"
)]
fn whole(nanos: f64) -> u128 {
    nanos.ceil() as u128
}
