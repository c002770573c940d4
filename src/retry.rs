//! A retry policy for [`tower::retry`]: it knows what a rejection says, and pays for every retry.

use crate::{
    clock::{Clock, Sleep, Timestamp},
    limit::RateLimiter,
    rejected::Rejected,
};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tower::{
    retry::{Policy, budget::Budget},
    util::rng::{HasherRng, Rng},
};

/// Retries rejected calls when their time has come, and what a closure says besides.
///
/// For [`tower::retry`], outside the layers whose rejections it retries:
///
/// ```
/// use portcullis::{CircuitBreaker, CircuitBreakerLayer, Outcome, RateLimiter, TokenBucket, retry::RetryRejected};
/// use std::time::Duration;
/// use tower::{ServiceBuilder, ServiceExt, retry::RetryLayer, service_fn};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> Result<(), portcullis::BoxError> {
/// let breaker = CircuitBreaker::builder("search").failure_threshold(1).recovery_timeout(Duration::from_secs(2)).build()?;
/// let budget = RateLimiter::builder("search", TokenBucket::new(10, Duration::from_secs(1))).limit("retries").build()?;
/// let service = ServiceBuilder::new()
///     .layer(RetryLayer::new(RetryRejected::new(budget)))
///     .layer(CircuitBreakerLayer::new(breaker.clone()))
///     .service(service_fn(async |question: u32| Ok::<_, std::io::Error>(question + 1)));
/// breaker.try_acquire()?.settle(Outcome::Failure); // the circuit opens
/// assert_eq!(service.oneshot(41).await?, 42, "two seconds later");
/// # Ok(()) }
/// ```
///
/// # What it retries
///
/// A rejection by a portcullis policy, after its [`retry_after`](Rejected::retry_after) has passed, to the nanosecond (tokio's
/// timer rounds up to its millisecond). Not one that tells no time (a circuit that is forced open, a cost that can never be
/// met), nor one that would wait longer than [`max_wait`](Self::max_wait). It is found where
/// [`ErrorsAreFailures`](crate::ErrorsAreFailures) finds it. Anything else is for [`retry_if`](Self::retry_if).
///
/// # What it costs
///
/// Every retry is paid from the budget, and no request is retried more than [`max_retries`](Self::max_retries) times: when a
/// circuit opens in front of a thousand callers, it is the budget that keeps them from calling a thousand times more. A
/// [`RateLimiter`] is an exact budget, that is seen in the registry as any limit is. tower's `TpsBudget` is one that grows with
/// the traffic.
///
/// The request is cloned for each attempt but the last.
#[must_use = "a policy retries nothing until it is put into a `RetryLayer`"]
pub struct RetryRejected<B = RateLimiter, C = RejectionsOnly> {
    budget: Arc<B>,
    classifier: C,
    /// For the request that this clone of the policy is for; a layer's own has all of them.
    retries_left: u32,
    max_wait: Duration,
    backoff: Duration,
    clock: Clock,
}

impl<B: Budget> RetryRejected<B> {
    /// Retries rejections at the expense of this budget. Up to 3 times for each request, after waits of up to 5 s.
    pub fn new(budget: B) -> Self {
        Self {
            budget: Arc::new(budget),
            classifier: RejectionsOnly,
            retries_left: 3,
            max_wait: Duration::from_secs(5),
            backoff: Duration::from_millis(100),
            clock: Clock::system(),
        }
    }
}

impl<B, C> RetryRejected<B, C> {
    /// How often one request may be retried. Default: 3.
    pub fn max_retries(mut self, retries: u32) -> Self {
        self.retries_left = retries;
        self
    }

    /// The longest wait before a retry; a rejection that asks for more is passed on at once. Default: 5 s.
    pub fn max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = wait;
        self
    }

    /// The wait before the first retry that [`retry_if`](Self::retry_if) asks for without saying when. Default: 100 ms.
    ///
    /// It doubles from retry to retry up to [`max_wait`](Self::max_wait), less a random share of up to a half.
    pub fn backoff(mut self, first: Duration) -> Self {
        self.backoff = first;
        self
    }

    /// Waits by this clock. Default: [`Clock::system`].
    pub fn clock(mut self, clock: impl Into<Clock>) -> Self {
        self.clock = clock.into();
        self
    }

    /// Retries also what the closure says: `true` or `false`, how long to wait ([`Option<Duration>`]), or [`Again`].
    ///
    /// It is not asked about rejections in errors: those are retried as they say. Here it finds them in responses, where a layer
    /// left them that answers with responses:
    ///
    /// ```
    /// # use portcullis::{RateLimiter, Rejected, TokenBucket};
    /// # use std::{convert::Infallible, time::Duration};
    /// use axum::response::Response;
    /// use portcullis::retry::{Again, RetryRejected};
    ///
    /// # let budget = RateLimiter::new("search", TokenBucket::new(10, Duration::from_secs(1)))?;
    /// let policy = RetryRejected::new(budget).retry_if(|result: &Result<Response, Infallible>| match result {
    ///     Ok(response) => response.extensions().get::<Rejected>().map_or(Again::No, Again::from),
    ///     Err(_) => Again::No,
    /// });
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    pub fn retry_if<F, V, Res, E>(self, classify: F) -> RetryRejected<B, RetryIf<F>>
    where
        F: Fn(&Result<Res, E>) -> V + Clone,
        V: Into<Again>,
    {
        RetryRejected {
            budget: self.budget,
            classifier: RetryIf(classify),
            retries_left: self.retries_left,
            max_wait: self.max_wait,
            backoff: self.backoff,
            clock: self.clock,
        }
    }

    /// The wait that this asks for, if it is no longer than any may be.
    fn wait(&mut self, again: Again) -> Option<Duration> {
        match again {
            Again::No | Again::GiveUp => None,
            Again::After(wait) => Some(wait).filter(|wait| *wait <= self.max_wait),
            Again::Backoff => {
                let whole = self.backoff.min(self.max_wait);
                self.backoff = self.backoff.saturating_mul(2);
                let less = (whole / 2).mul_f64(HasherRng::default().next_f64());
                Some(whole.saturating_sub(less))
            }
        }
    }
}

impl<B, C: Clone> Clone for RetryRejected<B, C> {
    /// The same budget, not another one.
    fn clone(&self) -> Self {
        Self {
            budget: self.budget.clone(),
            classifier: self.classifier.clone(),
            retries_left: self.retries_left,
            max_wait: self.max_wait,
            backoff: self.backoff,
            clock: self.clock.clone(),
        }
    }
}

impl<B: fmt::Debug, C> fmt::Debug for RetryRejected<B, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryRejected")
            .field("budget", &self.budget)
            .field("retries_left", &self.retries_left)
            .field("max_wait", &self.max_wait)
            .field("backoff", &self.backoff)
            .finish_non_exhaustive()
    }
}

/// Whether a call is to be made again, and when; what a closure of [`RetryRejected::retry_if`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// No: the caller gets the result. If it is an `Ok`, it pays into the budget.
    No,
    /// No, and it is no success even if it is an `Ok` (a rejection that a response carries, a 500): it pays nothing in.
    GiveUp,
    /// After a wait that grows from retry to retry.
    Backoff,
    /// After this time.
    After(Duration),
}

impl From<bool> for Again {
    fn from(again: bool) -> Self {
        if again { Self::Backoff } else { Self::No }
    }
}

impl From<Option<Duration>> for Again {
    fn from(wait: Option<Duration>) -> Self {
        wait.map_or(Self::No, Self::After)
    }
}

impl From<&Rejected> for Again {
    /// When the rejection says; one that tells no time is given up.
    fn from(rejected: &Rejected) -> Self {
        rejected.retry_after.map_or(Self::GiveUp, Self::After)
    }
}

/// Says of a result that is no rejection whether to retry: [`RejectionsOnly`], or the closure of [`RetryRejected::retry_if`].
pub trait ClassifyRetry<Res, E> {
    /// Whether, and when.
    fn classify_retry(&self, result: &Result<Res, E>) -> Again;
}

/// Retries nothing but rejections: the default.
#[derive(Debug, Clone, Copy)]
pub struct RejectionsOnly;

impl<Res, E> ClassifyRetry<Res, E> for RejectionsOnly {
    fn classify_retry(&self, _: &Result<Res, E>) -> Again {
        Again::No
    }
}

/// Retries what a closure says: from [`RetryRejected::retry_if`].
#[derive(Clone, Copy)]
pub struct RetryIf<F>(F);

impl<F> fmt::Debug for RetryIf<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RetryIf")
    }
}

impl<F: Fn(&Result<Res, E>) -> V, V: Into<Again>, Res, E> ClassifyRetry<Res, E> for RetryIf<F> {
    fn classify_retry(&self, result: &Result<Res, E>) -> Again {
        (self.0)(result).into()
    }
}

impl<Req, Res, E, B, C> Policy<Req, Res, E> for RetryRejected<B, C>
where
    Req: Clone,
    E: 'static,
    B: Budget,
    C: ClassifyRetry<Res, E>,
{
    type Future = RetryWait;

    fn retry(&mut self, _: &mut Req, result: &mut Result<Res, E>) -> Option<RetryWait> {
        let again = match result.as_ref().err().and_then(Rejected::find_in) {
            Some(rejected) => rejected.into(),
            None => self.classifier.classify_retry(result),
        };
        // As tower's own example does: what succeeded pays for what did not.
        if again == Again::No && result.is_ok() {
            self.budget.deposit();
        }
        let wait = self.wait(again)?;
        self.retries_left = self.retries_left.checked_sub(1)?;
        // Last: what is not retried for another reason costs nothing.
        self.budget.withdraw().then(|| RetryWait::new(&self.clock, wait))
    }

    /// `None` when no retry is left: the last attempt needs no clone.
    fn clone_request(&mut self, request: &Req) -> Option<Req> {
        (self.retries_left > 0).then(|| request.clone())
    }
}

/// An exact budget: every retry takes one permit, and nothing is ever put in.
impl Budget for RateLimiter {
    fn deposit(&self) {}

    fn withdraw(&self) -> bool {
        // Dropped, the permit is spent.
        self.try_acquire().is_ok()
    }
}

pin_project! {
    /// The wait before a retry.
    #[must_use = "a wait does nothing unless it is polled"]
    pub struct RetryWait {
        clock: Clock,
        due: Timestamp,
        #[pin]
        sleep: Option<Sleep>,
    }
}

impl RetryWait {
    fn new(clock: &Clock, wait: Duration) -> Self {
        Self {
            due: clock.now().saturating_add(wait),
            clock: clock.clone(),
            sleep: None,
        }
    }
}

impl Future for RetryWait {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        loop {
            if let Some(sleep) = this.sleep.as_mut().as_pin_mut() {
                ready!(sleep.poll(cx));
            }
            if this.clock.now() >= *this.due {
                return Poll::Ready(());
            }
            this.sleep.set(Some(this.clock.sleep_until(*this.due)));
        }
    }
}

impl fmt::Debug for RetryWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryWait").finish_non_exhaustive()
    }
}
