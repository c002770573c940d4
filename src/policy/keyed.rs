//! Policies that treat each key by itself.

/// A set of policies of which each request meets the one of its key.
#[derive(Debug, Clone)]
#[must_use = "a policy guards nothing until it is put into a layer"]
pub struct Keyed<L, X> {
    pub(crate) set: L,
    pub(crate) key: X,
    pub(crate) missing: Missing,
}

/// What becomes of a request that has no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Missing {
    /// It is rejected: [`Reason::MissingKey`](crate::Reason::MissingKey).
    Reject,
    /// It shares one policy with all others that have none.
    #[default]
    Shared,
    /// It is admitted.
    Exempt,
}

impl<L, X> Keyed<L, X> {
    /// What becomes of requests without a key. Default: they share one policy.
    pub fn missing(mut self, missing: Missing) -> Self {
        self.missing = missing;
        self
    }
}
