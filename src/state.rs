use std::fmt;

/// Where a circuit stands.
///
/// ```text
///               a trip condition holds
///     ┌────────┐ ───────────────────────▶ ┌────────┐
///     │ Closed │                          │  Open  │ ◀─┐
///     └────────┘                          └────────┘   │
///          ▲                                   │       │
///          │ enough probes      the open time  │       │ one probe
///          │ succeed            is over        ▼       │ fails
///          │                             ┌──────────┐  │
///          └──────────────────────────── │ HalfOpen │ ─┘
///                                        └──────────┘
/// ```
///
/// A forced circuit reports the state it acts like: forced open is `Open`; forced closed and disabled are `Closed`. The
/// [`Override`] tells them apart.
///
/// ```
/// # use portcullis::{CircuitBreaker, State};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// assert_eq!(breaker.state(), State::Closed);
/// breaker.force_open();
/// assert_eq!(breaker.state(), State::Open);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Calls pass; their outcomes are watched.
    Closed,
    /// Calls are rejected.
    Open,
    /// A few calls pass as probes; the others are rejected.
    HalfOpen,
}

impl State {
    /// The state as metrics and JSON spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// What an operator forced a circuit into, until it is reset.
///
/// ```
/// # use portcullis::{CircuitBreaker, Override};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// breaker.disable();
/// assert_eq!(breaker.status().forced, Some(Override::Disabled));
/// breaker.reset();
/// assert_eq!(breaker.status().forced, None);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Override {
    /// Rejects every call.
    ForcedOpen,
    /// Admits every call and records it, but does not trip.
    ForcedClosed,
    /// Admits every call and records nothing.
    Disabled,
}

impl Override {
    /// The override as metrics and JSON spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ForcedOpen => "forced_open",
            Self::ForcedClosed => "forced_closed",
            Self::Disabled => "disabled",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Override {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How often a circuit has moved, by itself, from each state to each next one.
///
/// ```
/// # use portcullis::{CircuitBreaker, Outcome};
/// let breaker = CircuitBreaker::builder("search").failure_threshold(1).build()?;
/// breaker.try_acquire()?.settle(Outcome::Failure);
/// assert_eq!(breaker.status().metrics.state_transitions.closed_to_open, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct StateTransitions {
    /// Trips.
    pub closed_to_open: u64,
    /// Open times that ran out.
    pub open_to_half_open: u64,
    /// Recoveries.
    pub half_open_to_closed: u64,
    /// Failed probes.
    pub half_open_to_open: u64,
}
