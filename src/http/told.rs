//! A rejection in the terms that HTTP and gRPC share: whose fault it is, and when to come back.

use crate::{
    rejected::{Reason, Rejected},
    state::{Override, State},
};
use std::time::Duration;

/// Which of the three answers a rejection gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The caller asked for more than a limit admits: 429, `RESOURCE_EXHAUSTED`.
    Quota,
    /// The service cannot be called now, whoever asks: 503, `UNAVAILABLE`.
    Capacity,
    /// The request lacks what the policy needs: 400, `INVALID_ARGUMENT`.
    Request,
}

impl Kind {
    pub(super) fn of(why: &Rejected) -> Self {
        match why.reason {
            Reason::MissingKey => Self::Request,
            Reason::CostExceedsBurst { .. } => Self::Quota,
            _ if why.limit.is_some() => Self::Quota,
            _ => Self::Capacity,
        }
    }
}

/// When to retry. None where the same request is refused at any time, whatever the policy said.
pub(super) fn wait(why: &Rejected) -> Option<Duration> {
    match why.reason {
        Reason::MissingKey | Reason::CostExceedsBurst { .. } => None,
        _ => why.retry_after,
    }
}

/// The same as `Retry-After` has it.
pub(super) fn wait_seconds(why: &Rejected) -> Option<u64> {
    wait(why).and(why.retry_after_secs())
}

/// Whether a client that retries by itself does so in vain.
pub(super) fn is_final(why: &Rejected) -> bool {
    wait(why).is_none()
        && matches!(
            why.reason,
            Reason::MissingKey | Reason::CostExceedsBurst { .. } | Reason::ForcedOpen
        )
}

/// The state of the circuit that refused, if it was one.
pub(super) fn circuit_state(why: &Rejected) -> Option<&'static str> {
    if why.limit.is_some() {
        return None;
    }
    match why.reason {
        Reason::Open => Some(State::Open.as_str()),
        Reason::HalfOpenFull => Some(State::HalfOpen.as_str()),
        Reason::ForcedOpen => Some(Override::ForcedOpen.as_str()),
        _ => None,
    }
}
