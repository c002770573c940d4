#[cfg(feature = "tonic")]
use crate::lazy_status::LazyStatus;
use crate::{
    name::Name,
    quota::{Advertised, Quota, whole_millis, whole_seconds},
};
use std::{any::Any, error::Error as StdError, fmt, io, sync::Arc, time::Duration};

/// The error type of a tower middleware that may add errors of its own, as in tower itself.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// A call that was not made, and everything that is known about why.
///
/// Error text, events and status all say the same thing, from this one value. It travels as an error; [`Rejected::find`] gets
/// it back out of whatever middleware wrapped round it.
///
/// ```
/// use portcullis::{BoxError, Reason, RateLimiter, Rejected, TokenBucket};
/// use std::time::Duration;
///
/// let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(60)))?;
/// limiter.try_acquire()?;
/// let error: BoxError = limiter.try_acquire().unwrap_err().into();
/// let rejected = Rejected::find(&*error).expect("the limiter refused");
/// assert_eq!(rejected.service, "search");
/// assert_eq!(rejected.reason, Reason::OverLimit);
/// assert!(rejected.retry_after <= Some(Duration::from_secs(60)));
/// # Ok::<(), BoxError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rejected {
    /// The service whose policy refused.
    pub service: Name,
    /// The rate limit that refused; `None` if it was the circuit breaker.
    pub limit: Option<Name>,
    /// Why.
    pub reason: Reason,
    /// How long until the policy would admit the same call from a caller alone. `None` when no time can be told: the circuit
    /// is forced open, or the cost can never be met.
    pub retry_after: Option<Duration>,
    /// What the limit admits and what is left of it.
    pub(crate) told: Option<Told>,
    /// The same rejection for those who look for a status in the chain of sources.
    #[cfg(feature = "tonic")]
    pub(crate) status: LazyStatus,
}

/// What a rejection knows of its limit's quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) of: Advertised,
    pub(crate) remaining: u32,
}

/// What a policy that [refuses at a glance](crate::policy::Policy::refuse_at_a_glance) tells of a rejection that is not made yet: the
/// guard makes it where it is wanted.
///
/// ```
/// use portcullis::{Name, Reason, policy::Refusing};
/// use std::time::Duration;
///
/// let shop = Name::try_from("shop")?;
/// let refusing = Refusing::new(&shop, Reason::Other).retry_after(Duration::from_secs(600));
/// assert_eq!(refusing.reject().to_string(), r#"policy "shop" refuses; retry after 600s"#);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
// Of references and numbers only: a name that is copied from one half-made value into the next costs more than all the rest.
#[derive(Debug, Clone, Copy)]
pub struct Refusing<'a> {
    service: &'a Name,
    limit: Option<&'a Name>,
    reason: Reason,
    retry_after: Option<Duration>,
    pub(crate) told: Option<Told>,
}

impl<'a> Refusing<'a> {
    /// A refusal in the name of a service.
    #[must_use]
    #[inline]
    pub fn new(service: &'a Name, reason: Reason) -> Self {
        Self {
            service,
            limit: None,
            reason,
            retry_after: None,
            told: None,
        }
    }

    /// Names the limit that refuses.
    #[must_use]
    #[inline]
    pub fn limit(mut self, limit: &'a Name) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Tells when the same call would be admitted, if that can be told.
    #[must_use]
    #[inline]
    pub fn retry_after(mut self, wait: impl Into<Option<Duration>>) -> Self {
        self.retry_after = wait.into();
        self
    }

    /// The rejection.
    #[must_use]
    #[expect(clippy::inline_always, reason = "made where it is wanted")]
    #[inline(always)]
    pub fn reject(self) -> Rejected {
        match (self.service.as_short(), self.limit) {
            (Some(service), None) => return self.of(service.into(), None),
            (Some(service), Some(limit)) => {
                if let Some(limit) = limit.as_short() {
                    return self.of(service.into(), Some(limit.into()));
                }
            }
            (None, _) => {}
        }
        let (service, limit) = share(self.service, self.limit);
        self.of(service, limit)
    }

    #[expect(clippy::inline_always, reason = "made where it is wanted")]
    #[inline(always)]
    fn of(self, service: Name, limit: Option<Name>) -> Rejected {
        Rejected {
            service,
            limit,
            reason: self.reason,
            retry_after: self.retry_after,
            told: self.told,
            #[cfg(feature = "tonic")]
            status: LazyStatus::default(),
        }
    }
}

/// Names of which one is long. Handed no more than those, so that the rest of a rejection need not lie in memory.
#[cold]
#[inline(never)]
fn share(service: &Name, limit: Option<&Name>) -> (Name, Option<Name>) {
    (service.clone(), limit.cloned())
}

/// Why a call was rejected.
///
/// ```
/// # use portcullis::Reason;
/// assert_eq!(Reason::HalfOpenFull.as_str(), "half_open_full");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The circuit is open: the service failed too often.
    Open,
    /// The circuit is half-open and every probe is taken.
    HalfOpenFull,
    /// An operator forced the circuit open.
    ForcedOpen,
    /// The rate limit has no room for the call now, or not before the deadline of its wait.
    OverLimit,
    /// The call costs more than the limit ever holds at once: no wait would help.
    CostExceedsBurst {
        /// What the call costs.
        cost: u32,
        /// The most that the limit admits at once.
        burst: u32,
    },
    /// The request does not carry the key by which the limit tells callers apart, and the limit does not admit such requests.
    MissingKey,
    /// A policy of your own refused.
    Other,
}

impl Reason {
    /// The reason as metrics and JSON spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::HalfOpenFull => "half_open_full",
            Self::ForcedOpen => "forced_open",
            Self::OverLimit => "over_limit",
            Self::CostExceedsBurst { .. } => "cost_exceeds_burst",
            Self::MissingKey => "missing_key",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.limit {
            None if self.reason == Reason::Other => write!(f, "policy {:?} ", self.service)?,
            None => write!(f, "circuit breaker {:?} ", self.service)?,
            Some(limit) => write!(f, "rate limit {limit:?} of {:?} ", self.service)?,
        }
        match self.reason {
            Reason::Open => f.write_str("is open")?,
            Reason::HalfOpenFull => f.write_str("is half-open with all its probes taken")?,
            Reason::ForcedOpen => f.write_str("is forced open")?,
            Reason::OverLimit => f.write_str("is exhausted")?,
            Reason::CostExceedsBurst { cost, burst } => {
                write!(f, "admits at most {burst} at once and was asked for {cost}")?;
            }
            Reason::MissingKey => f.write_str("needs a key that the request does not carry")?,
            Reason::Other => f.write_str("refuses")?,
        }
        match self.retry_after {
            // For people: rounded up to the millisecond, so that it is never too early. The field is exact.
            Some(wait) => write!(f, "; retry after {:?}", Duration::from_millis(whole_millis(wait))),
            None => Ok(()),
        }
    }
}

impl StdError for Rejected {
    #[cfg(feature = "tonic")]
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(self.status.get_or_make(|| self.to_status()))
    }
}

impl Rejected {
    /// A rejection by a policy of your own, in the name of a service. See [`policy`](crate::policy) for such a policy.
    ///
    /// ```
    /// use portcullis::{Name, Reason, Rejected};
    /// use std::time::Duration;
    ///
    /// let closed = Rejected::new(Name::try_from("shop")?, Reason::Other).retry_after(Duration::from_secs(600));
    /// assert_eq!(closed.to_string(), r#"policy "shop" refuses; retry after 600s"#);
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    #[must_use]
    #[inline]
    pub fn new(service: Name, reason: Reason) -> Self {
        Self {
            service,
            limit: None,
            reason,
            retry_after: None,
            told: None,
            #[cfg(feature = "tonic")]
            status: LazyStatus::default(),
        }
    }

    /// Names the limit that refused: then it is a limit's rejection, and an HTTP answer is a 429.
    #[must_use]
    pub fn limit(mut self, limit: Name) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Tells when the same call would be admitted.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// What the limit that refused admits, and what is left of it; `None` for a breaker.
    ///
    /// ```
    /// # use portcullis::{RateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(60)))?;
    /// limiter.try_acquire()?;
    /// let quota = limiter.try_acquire().unwrap_err().quota().unwrap();
    /// assert_eq!((quota.quota, quota.remaining, quota.reset), (1, 0, Duration::from_secs(60)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn quota(&self) -> Option<Quota> {
        let Told { of, remaining } = self.told?;
        let wait = self.retry_after.unwrap_or_default();
        Some(of.quota(self.limit.clone()?, remaining.into(), wait))
    }

    /// Finds the rejection inside an error, however deep middleware has wrapped it.
    ///
    /// Follows `source()`, and looks into what `source()` chains skip: the inside of an [`io::Error`], an `Arc<dyn Error>`, and a
    /// `Box` or an `Arc` of a `Rejected` or of an `io::Error`. A chain longer than 128 errors is not followed to its end.
    ///
    /// ```
    /// # use portcullis::{CircuitBreaker, Rejected};
    /// # use std::io;
    /// let breaker = CircuitBreaker::builder("search").build()?;
    /// breaker.force_open();
    /// let error = io::Error::other(breaker.try_acquire().unwrap_err());
    /// assert!(Rejected::find(&error).is_some());
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    #[must_use]
    pub fn find<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        // A `source()` that returns its own error would otherwise never end.
        for _ in 0..128 {
            let error = next?;
            if let Some(rejected) = error.downcast_ref::<Self>() {
                return Some(rejected);
            }
            next = inside(error).or_else(|| error.source());
        }
        None
    }

    /// [`retry_after`](Self::retry_after) in whole seconds, rounded up and at least 1: what a `Retry-After` header takes.
    ///
    /// ```
    /// # use portcullis::{Clock, RateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// # let clock = Clock::manual();
    /// let limiter = RateLimiter::builder("search", TokenBucket::new(2, Duration::from_secs(3))).clock(&clock).build()?;
    /// limiter.try_acquire_n(2)?;
    /// let rejected = limiter.try_acquire().unwrap_err();
    /// assert_eq!(rejected.retry_after, Some(Duration::from_millis(1_500)));
    /// assert_eq!(rejected.retry_after_secs(), Some(2));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn retry_after_secs(&self) -> Option<u64> {
        Some(whole_seconds(self.retry_after?).as_secs().max(1))
    }

    /// The rejection, told when its time is over: what a service was readied to reject and is called for later.
    pub(crate) fn due(mut self) -> Self {
        self.retry_after = self.retry_after.map(|_| Duration::ZERO);
        self
    }

    /// The same for an error type of which nothing is known: sees the usual carriers only.
    pub(crate) fn find_in<E: 'static>(error: &E) -> Option<&Self> {
        macro_rules! carriers {
            ($any:ident: $($plain:ty),+; boxed $($boxed:ty),*) => {
                $(if let Some(error) = $any.downcast_ref::<$plain>() {
                    return Self::find(error);
                })+
                $(if let Some(error) = $any.downcast_ref::<$boxed>() {
                    return Self::find(&**error);
                })*
            };
        }
        let any: &dyn Any = error;
        if let Some(error) = any.downcast_ref::<Error<BoxError>>() {
            return match error {
                Error::Rejected(rejected) => Some(rejected),
                Error::Inner(error) => Self::find(&**error),
            };
        }
        // The commonest error, and one that mostly carries nothing: without a walk from type to type.
        if let Some(error) = any.downcast_ref::<io::Error>() {
            return error.get_ref().and_then(|inner| Self::find(inner));
        }
        carriers!(any:
            Self, Box<Self>, Arc<Self>, Box<io::Error>, Arc<io::Error>, Error<io::Error>, Error<Self>, Error<std::convert::Infallible>;
            boxed BoxError, Box<dyn StdError + Send>, Box<dyn StdError>, Arc<dyn StdError + Send + Sync>
        );
        // What a generated client fails with, whatever it was that its channel failed with.
        #[cfg(feature = "tonic")]
        carriers!(any: tonic::Status, Box<tonic::Status>, Error<tonic::Status>; boxed);
        None
    }
}

/// The error that a wrapper hides from its `source()` chain. A `Box` or an `Arc` answers with the source of what it holds.
fn inside<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    macro_rules! look_into {
        ($($carrier:ty),+) => {
            $(if let Some(error) = error.downcast_ref::<$carrier>() {
                return Some(&**error);
            })+
        };
    }
    look_into!(Box<Rejected>, Arc<Rejected>, Box<io::Error>, Arc<io::Error>);
    look_into!(Arc<dyn StdError + Send + Sync>, Arc<dyn StdError>);
    let error = error.downcast_ref::<io::Error>()?.get_ref()?;
    Some(error)
}

/// What a direct call ([`CircuitBreaker::call`](crate::CircuitBreaker::call), [`RateLimiter::call`](crate::RateLimiter::call))
/// fails with: the rejection, or the error of the call itself.
///
/// ```
/// use portcullis::{CircuitBreaker, Error};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::ConfigError> {
/// let breaker = CircuitBreaker::builder("search").failure_threshold(1).build()?;
/// let ask = async || Err::<(), _>("connection refused");
/// assert!(matches!(breaker.call(ask()).await, Err(Error::Inner("connection refused"))));
/// assert!(matches!(breaker.call(ask()).await, Err(Error::Rejected(_))));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error<E> {
    /// The call was not made.
    Rejected(Rejected),
    /// The call was made and failed.
    Inner(E),
}

impl<E> Error<E> {
    /// The rejection, if the call was not made.
    #[must_use]
    pub fn rejected(&self) -> Option<&Rejected> {
        match self {
            Self::Rejected(rejected) => Some(rejected),
            Self::Inner(_) => None,
        }
    }
}

impl<E> From<Rejected> for Error<E> {
    fn from(rejected: Rejected) -> Self {
        Self::Rejected(rejected)
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected(rejected) => rejected.fmt(f),
            Self::Inner(error) => error.fmt(f),
        }
    }
}

impl<E: StdError + 'static> StdError for Error<E> {
    // Itself, not its source: only so can `Rejected::find` see it without knowing `E`.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Rejected(rejected) => Some(rejected),
            Self::Inner(error) => Some(error),
        }
    }
}
