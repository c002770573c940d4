//! Rate limiters: one handle over three algorithms, its permits, and its waiting line.

mod acquire;
mod adaptive;
mod admitted;
mod algorithm;
mod backoff;
mod bucket;
mod keyed;
mod queue;
mod sliding_window;
mod status;
mod token_bucket;

pub use acquire::Acquire;
pub use adaptive::Adaptive;
pub use algorithm::Algorithm;
pub use keyed::{KeyedPermit, KeyedRateLimiter, KeyedRateLimiterBuilder};
pub use sliding_window::SlidingWindow;
pub use status::{KeyStatus, KeysStatus, RateLimiterStatus, RejectedByLimit};
pub use token_bucket::TokenBucket;

use crate::{
    clock::{Clock, Reading, Timestamp},
    error::ConfigError,
    event::{Event, EventKind, Hub, Listener, ListenerId, trace_rejection},
    name::Name,
    permit::{self, Outcome, Permit, Verdict},
    quota::{Advertised, Quota},
    rejected::{Error, Reason, Refusing, Rejected, Told},
    stripe::{Home, Homed, Share, Striped},
    subscribe::Events,
};
use admitted::{Admitted, Wants};
use algorithm::{Admission, State, View};
use queue::Queue;
use status::Seen;
use std::{fmt, future::Future, time::Duration};

/// The striped counters, by index.
mod counter {
    /// Ends of shares; see the stripes. The outcomes are those that a limiter wants to know and that need only be counted.
    pub(super) const RETURNED: usize = 0;
    pub(super) const SUCCEEDED: usize = 1;
    pub(super) const FAILED: usize = 2;
    pub(super) const IGNORED: usize = 3;
    /// Calls admitted that cost one token, those that cost another number, and what the latter cost together.
    pub(super) const ACCEPTED_ONE: usize = 4;
    pub(super) const ACCEPTED_OTHER: usize = 5;
    pub(super) const ACCEPTED_COST: usize = 6;
    pub(super) const REJECTED_OVER_LIMIT: usize = 7;
    pub(super) const REJECTED_COST: usize = 8;
    /// Of keyed limiters: calls that met the overflow, calls without a key that met a shared quota or none, and those rejected.
    pub(super) const OVERFLOWED: usize = 9;
    pub(super) const KEYLESS: usize = 10;
    pub(super) const REJECTED_KEYLESS: usize = 11;
}

/// The name of a limit that has none.
pub(crate) const DEFAULT_LIMIT: &str = "default";

struct Core {
    home: Home,
    service: Name,
    limit: Name,
    clock: Clock,
    algorithm: Algorithm,
    /// What clients are told of a limit that does not learn.
    advertised: Advertised,
    wants: Wants,
    state: State,
    queue: Queue,
    hub: Hub,
}

impl Homed for Core {
    fn home(&self) -> &Home {
        &self.home
    }
}

/// A rate limiter: a [`TokenBucket`], a [`SlidingWindow`] or an [`Adaptive`] bucket.
///
/// A cheap handle: clones share one state, across threads, layers and connections. Use it directly, as here, or put it into a
/// [`RateLimitLayer`](crate::RateLimitLayer).
///
/// ```
/// use portcullis::{RateLimiter, TokenBucket};
/// use std::time::Duration;
///
/// let limiter = RateLimiter::new("search", TokenBucket::new(2, Duration::from_secs(60)))?;
/// limiter.try_acquire()?;
/// limiter.try_acquire()?;
/// let rejected = limiter.try_acquire().unwrap_err();
/// assert!(rejected.retry_after.unwrap() <= Duration::from_secs(30));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Cost
///
/// An admission allocates nothing, and takes no lock while nobody waits for the limiter, but for large costs of a
/// [`SlidingWindow`]. While somebody waits, every call takes the queue's mutex, for O(log n) of n waiters.
///
/// Memory: about 600 bytes, the slots of a [`SlidingWindow`], and for each waiter some 200 in its future and a place in the queue; and
/// one of the program's 256 seats for counters, while there are some, see the [README](crate#memory-and-cost).
#[derive(Clone)]
pub struct RateLimiter {
    shared: Striped<Core>,
}

/// Makes a [`RateLimiter`] with more than the defaults; from [`RateLimiter::builder`].
///
/// ```
/// # use portcullis::{RateLimiter, SlidingWindow};
/// # use std::time::Duration;
/// let daily = RateLimiter::builder("search", SlidingWindow::new(10_000, Duration::from_secs(86_400)))
///     .limit("daily")
///     .build()?;
/// assert_eq!(daily.limit(), "daily");
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build`"]
pub struct RateLimiterBuilder {
    service: String,
    limit: String,
    clock: Clock,
    algorithm: Algorithm,
}

impl RateLimiterBuilder {
    /// Names the limit, to tell several of one service apart. Default: `default`.
    pub fn limit(mut self, limit: impl Into<String>) -> Self {
        self.limit = limit.into();
        self
    }

    /// Reads the time here. Default: [`Clock::system`].
    pub fn clock(mut self, clock: impl Into<Clock>) -> Self {
        self.clock = clock.into();
        self
    }

    /// The limiter, full.
    ///
    /// # Errors
    ///
    /// A name that is empty or longer than [`Name::MAX_LEN`]; a setting outside its range, named in the error.
    pub fn build(self) -> Result<RateLimiter, ConfigError> {
        let service = Name::new("name", &self.service)?;
        let limit = Name::new("limit", &self.limit)?;
        let now = self.clock.now();
        let mut state = self.algorithm.build(now)?;
        let advertised = state.view().advertised(&self.algorithm, now);
        Ok(RateLimiter {
            shared: Striped::new(|home| Core {
                service,
                limit,
                wants: state.sit(home.seated(), self.clock.kind()),
                home,
                clock: self.clock,
                algorithm: self.algorithm,
                advertised,
                state,
                queue: Queue::default(),
                hub: Hub::default(),
            }),
        })
    }
}

impl Core {
    fn state(&self) -> View<'_> {
        self.state.view()
    }

    /// Lets time do what is due.
    fn roll(&self, now: Timestamp) {
        if let Some(moved) = self.state().roll(now) {
            let kind = EventKind::RateChanged {
                from: moved.from,
                to: moved.to,
            };
            self.emit(moved.at, kind);
            self.queue.wake_front();
        }
    }

    /// Serves who waits after something came back or the front left. Who is the front then looks at the clock again: what is
    /// not enough for it brings its time nearer all the same.
    fn serve(&self, now: Timestamp) {
        if !self.queue.is_empty_after_giving() {
            self.queue.serve(|cost| self.state().take_in_line(cost, now), |_| ());
            self.queue.wake_front();
        }
    }

    /// Until when the front of the line may sleep that is due at `until`: the rate may have changed before.
    fn settled(&self, until: Timestamp, now: Timestamp) -> Timestamp {
        self.state()
            .next_move(now)
            .map_or(until, |next_move| until.min(next_move))
    }

    /// Takes back what was not used; `false` if it can no longer be.
    fn give_back(&self, admission: Admission, cost: u32, now: Timestamp) -> bool {
        self.roll(now);
        if cost == 0 {
            return true;
        }
        let taken_back = self.state().give_back(admission, cost, now);
        if taken_back {
            self.serve(now);
        }
        taken_back
    }

    /// Corrects what was reserved to what the call cost in truth, where that is known.
    fn correct(&self, reserved: u32, cost: Option<u32>, now: &Reading) {
        let Some(cost) = cost.filter(|cost| *cost != reserved) else {
            return;
        };
        let now = now.at(&self.clock);
        self.roll(now);
        // Who is due is served first: a correction lets overflow what came while they waited.
        self.serve(now);
        self.state().correct(reserved, cost, now);
        self.serve(now);
    }

    fn learn(&self, outcome: Outcome, now: &Reading) {
        if self.state().learns() {
            self.roll(now.at(&self.clock));
            self.state().learn(outcome);
        }
    }

    fn emit(&self, at: Timestamp, kind: EventKind) {
        self.hub.emit(|| Event {
            service: self.service.clone(),
            limit: Some(self.limit.clone()),
            at,
            kind,
        });
    }

    fn advertised(&self, now: Timestamp) -> Advertised {
        if self.state.learns() {
            self.state().advertised(&self.algorithm, now)
        } else {
            self.advertised
        }
    }

    fn rejected(&self, reason: Reason, retry_after: Option<Duration>, told: Option<Told>) -> Rejected {
        Rejected {
            limit: Some(self.limit.clone()),
            retry_after,
            told,
            ..Rejected::new(self.service.clone(), reason)
        }
    }

    /// The refusal of one request by a limit that does not learn.
    #[inline]
    fn refusal(&self, wait: Duration) -> Refusing<'_> {
        let told = Told {
            of: self.advertised,
            remaining: 0,
        };
        let mut refusing = Refusing::new(&self.service, Reason::OverLimit)
            .limit(&self.limit)
            .retry_after(wait);
        refusing.told = Some(told);
        refusing
    }

    /// A call of this cost is refused until then.
    fn over_limit(&self, cost: u32, until: Timestamp, now: Timestamp) -> Rejected {
        let told = Told {
            of: self.advertised(now),
            // Where one request is refused nothing is left.
            remaining: if cost > 1 { self.whole_available(now) } else { 0 },
        };
        self.rejected(Reason::OverLimit, Some(until.duration_since(now)), Some(told))
    }

    /// What is there now for somebody who comes, in requests.
    fn available(&self, now: Timestamp) -> f64 {
        (self.state().available(now) - self.queue.cost() as f64).max(0.0)
    }

    /// The same in whole requests.
    fn whole_available(&self, now: Timestamp) -> u32 {
        let waiting = u32::try_from(self.queue.cost()).unwrap_or(u32::MAX);
        self.state().whole_available(now).saturating_sub(waiting)
    }

    fn quota(&self, now: Timestamp) -> Quota {
        let reset = self.state().full_again(now).duration_since(now);
        let advertised = self.advertised(now);
        advertised.quota(self.limit.clone(), self.whole_available(now).into(), reset)
    }

    /// Refuses a cost that no wait could meet.
    fn check_cost(&self, cost: u32) -> Result<(), Rejected> {
        let burst = self.algorithm.largest();
        if cost <= burst {
            return Ok(());
        }
        let now = self.clock.now();
        let told = Told {
            of: self.advertised(now),
            remaining: self.whole_available(now),
        };
        Err(self.rejected(Reason::CostExceedsBurst { cost, burst }, None, Some(told)))
    }
}

impl RateLimiter {
    /// A limiter named `default` for the service of that name.
    ///
    /// Each one that is built has a state of its own, also under the name of another: build it once and clone it, or ask a
    /// [`Registry`](crate::Registry), which lets no two have one name.
    ///
    /// # Errors
    ///
    /// A setting outside its range, named in the error.
    pub fn new(service: impl Into<String>, algorithm: impl Into<Algorithm>) -> Result<Self, ConfigError> {
        Self::builder(service, algorithm).build()
    }

    /// Starts a limiter with more than the defaults: a limit's name, a clock.
    pub fn builder(service: impl Into<String>, algorithm: impl Into<Algorithm>) -> RateLimiterBuilder {
        RateLimiterBuilder {
            service: service.into(),
            limit: DEFAULT_LIMIT.into(),
            clock: Clock::system(),
            algorithm: algorithm.into(),
        }
    }

    /// Leave to make one call now, or the reason why not. Does not overtake those who wait.
    ///
    /// # Errors
    ///
    /// [`Reason::OverLimit`], with the exact time after which a caller alone is admitted.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub fn try_acquire(&self) -> Result<RateLimitPermit, Rejected> {
        let now = Reading::new();
        match self.glance(&now) {
            Some(permit) => Ok(permit),
            None => self.acquire_at(1, &now.again()),
        }
    }

    /// [`try_acquire`](Self::try_acquire) for a call that costs `cost`: all or nothing. A cost of zero is free.
    ///
    /// # Errors
    ///
    /// [`Reason::OverLimit`]; [`Reason::CostExceedsBurst`] for more than is ever there at once.
    pub fn try_acquire_n(&self, cost: u32) -> Result<RateLimitPermit, Rejected> {
        self.acquire_at(cost, &Reading::new())
    }

    pub(crate) fn acquire_at(&self, cost: u32, now: &Reading) -> Result<RateLimitPermit, Rejected> {
        self.acquire_uncounted(cost, now)
            .inspect_err(|why| self.count(why, now))
    }

    fn acquire_uncounted(&self, cost: u32, now: &Reading) -> Result<RateLimitPermit, Rejected> {
        let core: &Core = &self.shared;
        core.check_cost(cost)?;
        if cost == 0 {
            return Ok(self.permit(Admission::Tokens, 0));
        }
        let now = now.at(&core.clock);
        core.roll(now);
        let taken = if core.queue.is_empty() {
            core.state().take(cost, now)
        } else {
            core.queue.serve(
                |cost| core.state().take_in_line(cost, now),
                |waiters| {
                    if waiters.is_empty() {
                        core.state().take(cost, now)
                    } else {
                        Err(core.state().due_behind(waiters.costs(), waiters.cost(), cost, now))
                    }
                },
            )
        };
        match taken {
            Ok(admission) => Ok(self.permit(admission, cost)),
            Err(until) => Err(core.over_limit(cost, until, now)),
        }
    }

    fn permit(&self, admission: Admission, cost: u32) -> RateLimitPermit {
        self.permit_that(self.shared.wants, admission, cost)
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn permit_that(&self, wants: Wants, admission: Admission, cost: u32) -> RateLimitPermit {
        RateLimitPermit(Admitted::new(&self.shared, admission, cost, wants))
    }

    /// Leave to make one call now, if a look is enough; otherwise nothing has happened.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn glance(&self, now: &Reading) -> Option<RateLimitPermit> {
        let core: &Core = &self.shared;
        if !core.queue.is_empty() {
            return None;
        }
        let (admission, learns) = core.state.take_one_at_a_glance(|| now.at(&core.clock))?;
        let wants = if learns { core.wants } else { Wants::NOTHING };
        Some(self.permit_that(wants, admission, 1))
    }

    /// The refusal of one request, counted, if a look is enough.
    #[expect(
        clippy::inline_always,
        reason = "a rejection that is made here and moved there costs more than all the rest"
    )]
    #[inline(always)]
    pub(crate) fn refuse_at_a_glance(&self, now: &Reading) -> Option<Refusing<'_>> {
        let core: &Core = &self.shared;
        let wait = core.state.refuses_one_at_a_glance(|| now.at(&core.clock))?;
        if !core.queue.is_empty() {
            return None;
        }
        self.shared.add(counter::REJECTED_OVER_LIMIT, 1);
        trace_rejection(&core.service, Some(&core.limit), Reason::OverLimit, Some(wait));
        if core.hub.is_heard() {
            self.tell_refusal(wait, now);
        }
        Some(core.refusal(wait))
    }

    /// Handed a number and no reference, so that what is refused at a glance need not lie in memory.
    #[cold]
    #[inline(never)]
    fn tell_refusal(&self, wait: Duration, now: &Reading) {
        let core: &Core = &self.shared;
        core.hub
            .tell_rejection(&core.refusal(wait).reject(), now.at(&core.clock));
    }

    /// Counts a rejection and tells the listeners. Called once for every call that was rejected.
    pub(crate) fn count(&self, why: &Rejected, now: &Reading) {
        let core = &self.shared;
        core.add(
            match why.reason {
                Reason::CostExceedsBurst { .. } => counter::REJECTED_COST,
                _ => counter::REJECTED_OVER_LIMIT,
            },
            1,
        );
        core.hub.rejected(why, || now.at(&core.clock));
    }

    /// The refusal that the next call of this cost would meet, without taking anything.
    pub(crate) fn peek(&self, cost: u32, now: &Reading) -> Option<Rejected> {
        let core: &Core = &self.shared;
        if let Err(rejected) = core.check_cost(cost) {
            return Some(rejected);
        }
        if cost == 0 {
            return None;
        }
        let now = now.at(&core.clock);
        let waiting = core.queue.cost();
        let until = match waiting {
            0 => core.state().peek(cost, now),
            _ => core.state().due(waiting + u64::from(cost), now),
        };
        (now < until).then(|| core.over_limit(cost, until, now))
    }

    /// Waits in line for leave to make one call, for as long as it takes.
    ///
    /// Served in the order in which the futures are first polled. Cancel-safe: a dropped future leaves the line, and gives back
    /// what it was served. With [`Clock::system`], needs a tokio runtime with its timer enabled, and is served up to a
    /// millisecond late. Tokens are charged for the instant at which a waiter was due, so a late timer slows nobody down; and
    /// everybody who has become due is served at once, however many they are (after a program stood still, say). A sliding window
    /// counts from the moment it serves instead, and keeps its quota even then.
    ///
    /// ```
    /// # use portcullis::{RateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let limiter = RateLimiter::new("search", TokenBucket::new(10, Duration::from_secs(1)).burst(1))?;
    /// for _ in 0..20 {
    ///     let permit = limiter.acquire().await?;
    ///     // … a call, ten times a second …
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// It waits for as long as it takes, in a line as long as callers make it: for whom strangers call,
    /// [`acquire_within`](Self::acquire_within) keeps it short.
    ///
    /// # Errors
    ///
    /// The future fails only for a cost above the burst: see [`acquire_n`](Self::acquire_n).
    pub fn acquire(&self) -> Acquire {
        self.acquire_n(1)
    }

    /// [`acquire`](Self::acquire) for a call that costs `cost`.
    ///
    /// # Errors
    ///
    /// The future fails at once with [`Reason::CostExceedsBurst`] for a cost that no wait could meet.
    pub fn acquire_n(&self, cost: u32) -> Acquire {
        Acquire::new(self.clone(), cost, None)
    }

    /// [`acquire_n`](Self::acquire_n) that waits for at most `max_wait`.
    ///
    /// ```
    /// # use portcullis::{RateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(60)))?;
    /// limiter.try_acquire()?;
    /// // Refused at once: the next token is a minute away.
    /// let rejected = limiter.acquire_within(1, Duration::from_secs(5)).await.unwrap_err();
    /// assert!(rejected.retry_after > Some(Duration::from_secs(5)));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// The future fails with [`Reason::OverLimit`], at once if the wait cannot fit, else when it has not; with
    /// [`Reason::CostExceedsBurst`] for a cost that no wait could meet.
    pub fn acquire_within(&self, cost: u32, max_wait: Duration) -> Acquire {
        Acquire::new(self.clone(), cost, Some(max_wait))
    }

    /// Makes a call if the limiter admits it now. An adaptive limiter learns from the result: an error is a failure, unless it
    /// is a rejection by another portcullis policy (seen where [`ErrorsAreFailures`](crate::ErrorsAreFailures) sees it: not inside
    /// an error type of your own).
    ///
    /// Nothing happens before the future is polled. Cancel-safe: dropped, its permit is spent.
    ///
    /// ```
    /// # use portcullis::{RateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let limiter = RateLimiter::new("search", TokenBucket::new(10, Duration::from_secs(1)))?;
    /// let answer = limiter.call(async { Ok::<_, std::io::Error>(42) }).await?;
    /// assert_eq!(answer, 42);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Rejected`] if the call was not made, [`Error::Inner`] with its own error if it failed.
    pub async fn call<T, E: 'static>(&self, future: impl Future<Output = Result<T, E>>) -> Result<T, Error<E>> {
        self.call_with(Outcome::of, future).await
    }

    /// [`call`](Self::call) with a classifier of its own: what an adaptive limiter learns from, or what the call cost.
    ///
    /// ```
    /// # use portcullis::{RateLimiter, Outcome, TokenBucket, Verdict};
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let tokens = RateLimiter::new("model", TokenBucket::new(1000, Duration::from_secs(60)))?;
    /// let ask = async { Ok::<_, std::io::Error>("forty-two") };
    /// tokens.call_with(|_| Verdict::new(Outcome::Success).cost(250), ask).await?;
    /// assert!(tokens.status().available_tokens < 751.0);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub async fn call_with<T, E, V: Into<Verdict>>(
        &self,
        classify: impl FnOnce(&Result<T, E>) -> V,
        future: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Error<E>> {
        let permit = self.try_acquire()?;
        permit::run(permit, classify, future).await
    }

    /// The service's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.shared.service
    }

    /// The limit's name, which tells several limits of one service apart.
    #[must_use]
    pub fn limit(&self) -> &Name {
        &self.shared.limit
    }

    /// The clock that the limiter reads.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// What the limiter was made of.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.shared.algorithm
    }

    /// What a client is told of this limit: in `RateLimit` headers, say.
    #[must_use]
    pub fn quota(&self) -> Quota {
        self.shared.quota(self.clock().now())
    }

    /// Everything there is to see, at one moment. Reading changes nothing.
    #[must_use]
    pub fn status(&self) -> RateLimiterStatus {
        let now = Reading::new();
        let at = now.at(self.clock());
        let core: &Core = &self.shared;
        let seen = Seen {
            service: &core.service,
            limit: &core.limit,
            algorithm: &core.algorithm,
            rate: core.state().adaptive_rate(at),
            available: core.available(at),
            retry_after: self.peek(1, &now).and_then(|refusal| refusal.retry_after),
            waiting: core.queue.len(),
        };
        RateLimiterStatus::new(&seen, |counter| self.shared.home.sum(counter))
    }

    /// Calls `listener` on every event of this limiter; see [`Event`] for how.
    pub fn on_event(&self, listener: impl Fn(&Event) + Send + Sync + 'static) -> ListenerId {
        self.shared.hub.on_event(listener)
    }

    /// Removes a listener; `false` if it is not there.
    pub fn remove_listener(&self, id: ListenerId) -> bool {
        self.shared.hub.remove(id)
    }

    /// A queue of this limiter's events that holds `capacity` (at least one) and loses the oldest.
    #[must_use = "dropping the queue ends the subscription"]
    pub fn subscribe(&self, capacity: usize) -> Events {
        self.shared.hub.subscribe(capacity)
    }

    pub(crate) fn add_listener(&self, listener: Listener) {
        self.shared.hub.add(listener);
    }

    /// Whether both are handles of one limiter.
    pub(crate) fn same(&self, other: &Self) -> bool {
        self.shared.same(&other.shared)
    }

    /// Whether the limiter limits as this algorithm does.
    pub(crate) fn matches(&self, algorithm: &Algorithm) -> bool {
        algorithm.validate().is_ok() && self.shared.algorithm.resolved() == algorithm.resolved()
    }
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimiter")
            .field("service", self.name())
            .field("limit", self.limit())
            .field("algorithm", &self.shared.algorithm)
            .finish_non_exhaustive()
    }
}

/// Leave to make one call.
///
/// Dropped, it is spent: who goes away early has used the limit all the same. So a token bucket and a sliding window need nothing
/// more than `limiter.try_acquire()?;`. Only [`unused`](Self::unused) gives it back. An adaptive limiter wants to know how the call
/// ended: [`settle`](Self::settle); from one that is dropped it learns what [`cancelled`](Adaptive::cancelled) says, by default
/// nothing.
///
/// ```
/// # use portcullis::{Adaptive, RateLimiter, Outcome};
/// let limiter = RateLimiter::new("agent", Adaptive::new(100))?;
/// let permit = limiter.try_acquire()?;
/// // … the call …
/// permit.settle(Outcome::Success);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RateLimitPermit(Admitted<Core>);

impl RateLimitPermit {
    /// A permit whose cost was an estimate.
    pub(crate) fn estimated(mut self) -> Self {
        self.0.set_estimated(true);
        self
    }

    /// How the call ended: an [`Outcome`], or a [`Verdict`] with its true cost.
    #[expect(clippy::inline_always, reason = "a permit that is handed over lies in memory")]
    #[inline(always)]
    pub fn settle(self, verdict: impl Into<Verdict>) {
        Permit::settle(self, verdict.into(), &Reading::new());
    }

    /// The call was never begun: the limiter takes the permit back, and whoever waits is served. A sliding window does so while no
    /// other call has been admitted at a later time; afterwards it still may, if those calls came on other threads, or else the
    /// permit is spent.
    pub fn unused(self) {
        Permit::unused(self, &Reading::new());
    }

    /// What the permit took from the limit.
    #[must_use]
    pub fn cost(&self) -> u32 {
        self.0.cost()
    }

    /// Tells the limiter how the call ended, if it wants to know.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn end(&mut self, outcome: Option<Outcome>, cost: Option<u32>, now: &Reading) {
        let reserved = self.0.cost();
        let cost = cost.filter(|cost| *cost != reserved);
        if let Some((share, asked)) = self.0.take()
            && (asked || cost.is_some())
        {
            teach(&share, reserved, outcome, cost, now);
        }
    }
}

/// Tells at the end of a call what the limiter wants to know: the true cost, and of an adaptive one the outcome.
#[cold]
#[inline(never)]
fn teach(share: &Share<Core>, reserved: u32, outcome: Option<Outcome>, cost: Option<u32>, now: &Reading) {
    let core = share.state();
    core.correct(reserved, cost, now);
    core.learn(outcome.unwrap_or_else(|| core.algorithm.cancelled()), now);
}

/// How a call ended that nobody settled.
fn abandoned() -> Option<Outcome> {
    std::thread::panicking().then_some(Outcome::Failure)
}

impl Permit for RateLimitPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle(mut self, verdict: Verdict, now: &Reading) {
        if self.0.settle_quickly(&verdict, now) {
            return;
        }
        let metered = verdict.metered.filter(|_| self.0.is_estimated());
        self.end(Some(verdict.outcome), verdict.cost.or(metered), now);
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle_quickly(&mut self, verdict: &Verdict, now: &Reading) -> bool {
        self.0.settle_quickly(verdict, now)
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn cancel(mut self, cost: Option<u32>, now: &Reading) {
        let cost = cost.filter(|_| self.0.is_estimated());
        self.end(None, cost, now);
    }

    fn quotas(&self, now: &Reading, tell: &mut dyn FnMut(Quota)) {
        if let Some(core) = self.0.state() {
            tell(core.quota(now.at(&core.clock)));
        }
    }

    fn unused(mut self, now: &Reading) {
        if let Some((share, _)) = self.0.take() {
            let core = share.state();
            if core.give_back(self.0.admission, self.0.cost(), now.at(&core.clock)) {
                share.count_and_end(counter::RETURNED);
            }
        }
    }
}

impl Drop for RateLimitPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        if let Some((share, true)) = self.0.take() {
            teach(&share, self.0.cost(), abandoned(), None, &Reading::new());
        }
    }
}

impl fmt::Debug for RateLimitPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimitPermit")
            .field("limit", &self.0.state().map(|core| core.limit.clone()))
            .field("cost", &self.cost())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, portcullis_loom))]
mod model;
