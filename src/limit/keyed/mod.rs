//! A limiter for each key, in bounded memory.
//!
//! Token buckets lie in a [`Table`] that is read without a lock; the states of other algorithms in a [`Map`] under locks. No user
//! code runs under any.

mod map;
mod table;

use super::{
    Algorithm, RateLimiterStatus, abandoned,
    admitted::{Admitted, Wants},
    algorithm::{Admission, State, View},
    counter,
    status::{KeyStatus, KeysStatus, Seen},
};
use crate::{
    clock::{Clock, Reading, Timestamp},
    error::{ConfigError, within},
    event::{Event, Hub, Listener, ListenerId},
    fingerprint::{Seed, SipHasher},
    name::Name,
    permit::{Outcome, Permit, Verdict},
    quota::Quota,
    rejected::{Reason, Rejected, Told},
    stripe::{Home, Homed, Share, Striped},
    subscribe::Events,
};
use map::Map;
use std::{fmt, hash::Hash};
use table::Table;

/// How many keys that might have become idle a new key looks at, at most.
const LOOKS: usize = 256;

/// A rate limit for each key: a caller, a tenant, an address.
///
/// Every key has a quota of its own, by any of the three algorithms. Of a key only a 64-bit hash is kept, by `SipHash` with a random
/// seed: keys of any length cost the same, and nobody can aim for another's. (Two of a million keys share a quota with a
/// probability of one in 37 million.)
///
/// ```
/// use portcullis::{KeyedRateLimiter, TokenBucket};
/// use std::time::Duration;
///
/// let callers = KeyedRateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60)))?;
/// callers.try_acquire("alice")?;
/// assert!(callers.try_acquire("alice").is_err());
/// callers.try_acquire("bob")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// As a layer: [`by`](Self::by) says what the key of a request is.
///
/// # When the set is full
///
/// At most [`max_keys`](KeyedRateLimiterBuilder::max_keys) keys have a quota of their own. A new one then takes the place of one that
/// has its whole quota back, so that an eviction hands nothing back that was spent. While there is none, all new keys share one
/// *overflow* quota: a million invented keys together get what one caller gets. Those who are tracked keep their
/// own. (An adaptive limiter's key that is evicted forgets what rate it had found.)
///
/// # Cost
///
/// For a key of a token bucket that is tracked: a hash, a look at a table without any lock, and one compare-and-swap. Of the other
/// algorithms: a hash, a lock shared with one key in 32 that is only read, and what the algorithm costs. A new key takes a mutex,
/// for O(log keys); in a full set it looks at up to 256 keys that should be idle. If these are all in use, it
/// meets the overflow, and the next new key looks at others.
///
/// Memory, its place in the tables included: 56 to 70 bytes for each tracked key of a token bucket, whoever comes and goes, and 7 kB
/// for the set. For the other algorithms 60 to 110 bytes, and up to 220 in a full set whose keys come and go; a sliding window takes
/// 60 more, and 8 for each request of its quota; an adaptive limiter about 250 more.
#[derive(Clone)]
pub struct KeyedRateLimiter {
    set: Striped<Set>,
}

impl Homed for Set {
    fn home(&self) -> &Home {
        &self.home
    }
}

struct Set {
    home: Home,
    service: Name,
    limit: Name,
    clock: Clock,
    algorithm: Algorithm,
    max_keys: usize,
    seed: Seed,
    hub: Hub,
    keys: Keys,
    overflow: State,
    /// What a new key finds: looked at, and never used.
    unused: State,
}

/// The keys that are tracked, each with its limiter.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one in each set, and no way round by a box"
)]
enum Keys {
    Buckets(Table),
    Others(Map),
}

impl Keys {
    fn new(algorithm: Algorithm, start: Timestamp, max_keys: usize) -> Result<Self, ConfigError> {
        Ok(match algorithm {
            Algorithm::TokenBucket(config) => Self::Buckets(Table::new(config.shape(start)?, max_keys)),
            Algorithm::SlidingWindow(_) | Algorithm::Adaptive(_) => Self::Others(Map::new(algorithm, start, max_keys)),
        })
    }

    /// Runs a step on a key's limiter, if it is tracked. It may run more than once, and what it answers last counts.
    fn with<T>(&self, fingerprint: u64, step: impl Fn(View<'_>) -> T) -> Option<T> {
        match self {
            Self::Buckets(table) => table.with(fingerprint, step),
            Self::Others(map) => map.with(fingerprint, step),
        }
    }

    /// The same; a new key is added, unless there is no room for it.
    fn with_or_add<T>(&self, fingerprint: u64, now: Timestamp, step: impl Fn(View<'_>) -> T) -> Option<T> {
        match self {
            Self::Buckets(table) => table.with_or_add(fingerprint, now, step),
            Self::Others(map) => map.with_or_add(fingerprint, now, step),
        }
    }

    /// Counts a rejection at a key, if it is tracked.
    fn add_rejection(&self, fingerprint: u64) {
        match self {
            Self::Buckets(table) => table.add_rejection(fingerprint),
            Self::Others(map) => map.add_rejection(fingerprint),
        }
    }

    /// Whether a new key would meet the overflow, as far as can be told without evicting one.
    fn overflows(&self, now: Timestamp) -> bool {
        match self {
            Self::Buckets(table) => table.overflows(now),
            Self::Others(map) => map.overflows(now),
        }
    }

    /// How many keys are tracked, and how many have been evicted; and all who have been rejected, piece by piece.
    fn survey(&self, see: impl FnMut(&mut dyn Iterator<Item = (u32, u64)>)) -> (usize, u64) {
        match self {
            Self::Buckets(table) => table.survey(see),
            Self::Others(map) => map.survey(see),
        }
    }
}

/// Makes a [`KeyedRateLimiter`]; from [`KeyedRateLimiter::builder`].
///
/// ```
/// # use portcullis::{KeyedRateLimiter, SlidingWindow};
/// # use std::time::Duration;
/// let callers = KeyedRateLimiter::builder("api", SlidingWindow::new(100, Duration::from_secs(60)))
///     .limit("per-caller")
///     .max_keys(50_000)
///     .build()?;
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build`"]
pub struct KeyedRateLimiterBuilder {
    service: String,
    limit: String,
    clock: Clock,
    algorithm: Algorithm,
    max_keys: usize,
}

impl KeyedRateLimiterBuilder {
    /// Names the limit, to tell several of one service apart. Default: `default`.
    pub fn limit(mut self, limit: impl Into<String>) -> Self {
        self.limit = limit.into();
        self
    }

    /// How many keys have a quota of their own, 1 to 16,777,216. Default: 10,000.
    pub fn max_keys(mut self, keys: usize) -> Self {
        self.max_keys = keys;
        self
    }

    /// Reads the time here. Default: [`Clock::system`].
    pub fn clock(mut self, clock: impl Into<Clock>) -> Self {
        self.clock = clock.into();
        self
    }

    /// The set, empty.
    ///
    /// # Errors
    ///
    /// A name that is empty or longer than [`Name::MAX_LEN`]; a setting outside its range, named in the error.
    pub fn build(self) -> Result<KeyedRateLimiter, ConfigError> {
        let service = Name::new("name", &self.service)?;
        let limit = Name::new("limit", &self.limit)?;
        let max_keys = within("max_keys", self.max_keys, &(1..=1 << 24))?;
        let start = self.clock.now();
        let (overflow, unused) = (self.algorithm.build(start)?, self.algorithm.build_narrow(start)?);
        let keys = Keys::new(self.algorithm, start, max_keys)?;
        Ok(KeyedRateLimiter {
            set: Striped::new(|home| Set {
                home,
                service,
                limit,
                clock: self.clock,
                algorithm: self.algorithm,
                max_keys,
                seed: Seed::default(),
                hub: Hub::default(),
                keys,
                overflow,
                unused,
            }),
        })
    }
}

/// Where a call was admitted. One that cost nothing was at its key, tracked or not: it may cost something yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place(u64);

impl Place {
    /// No key's fingerprint.
    const OVERFLOW: Self = Self(0);
}

impl Set {
    /// Runs a step on the limiter where a call was admitted, if it is there yet.
    fn at<T>(&self, place: Place, step: impl Fn(View<'_>) -> T) -> Option<T> {
        match place {
            Place::OVERFLOW => Some(step(self.overflow.view())),
            Place(fingerprint) => self.keys.with(fingerprint, step),
        }
    }

    /// Runs a step on the key's limiter, new if the key is, or on the overflow's.
    fn with_or_add<T>(&self, fingerprint: u64, now: Timestamp, step: impl Fn(View<'_>) -> T) -> (T, Place) {
        match self.keys.with_or_add(fingerprint, now, &step) {
            Some(done) => (done, Place(fingerprint)),
            None => (step(self.overflow.view()), Place::OVERFLOW),
        }
    }

    fn told(&self, view: View<'_>, now: Timestamp) -> Told {
        Told {
            of: view.advertised(&self.algorithm, now),
            remaining: view.whole_available(now),
        }
    }

    fn rejected(&self, reason: Reason, told: Told) -> Rejected {
        Rejected {
            limit: Some(self.limit.clone()),
            told: Some(told),
            ..Rejected::new(self.service.clone(), reason)
        }
    }

    fn over_limit(&self, view: View<'_>, until: Timestamp, now: Timestamp) -> Rejected {
        self.rejected(Reason::OverLimit, self.told(view, now))
            .retry_after(until.duration_since(now))
    }

    /// Refuses a cost that no wait could meet; a key is not remembered for it.
    fn check_cost(&self, fingerprint: u64, cost: u32, now: Timestamp) -> Result<(), Rejected> {
        let burst = self.algorithm.largest();
        if cost <= burst {
            return Ok(());
        }
        let told = self.keys.with(fingerprint, |view| self.told(view, now));
        let told = told.unwrap_or_else(|| self.told(self.unused.view(), now));
        Err(self.rejected(Reason::CostExceedsBurst { cost, burst }, told))
    }
}

impl KeyedRateLimiter {
    /// A limiter named `default` for the service of that name, for up to 10,000 keys.
    ///
    /// # Errors
    ///
    /// A setting outside its range, named in the error.
    pub fn new(service: impl Into<String>, algorithm: impl Into<Algorithm>) -> Result<Self, ConfigError> {
        Self::builder(service, algorithm).build()
    }

    /// Starts a limiter with more than the defaults.
    pub fn builder(service: impl Into<String>, algorithm: impl Into<Algorithm>) -> KeyedRateLimiterBuilder {
        KeyedRateLimiterBuilder {
            service: service.into(),
            limit: super::DEFAULT_LIMIT.into(),
            clock: Clock::system(),
            algorithm: algorithm.into(),
            max_keys: 10_000,
        }
    }

    /// Leave to make one call for this key now, or the reason why not.
    ///
    /// # Errors
    ///
    /// [`Reason::OverLimit`], with the exact time after which the key is admitted if nothing else uses its quota.
    pub fn try_acquire(&self, key: &(impl Hash + ?Sized)) -> Result<KeyedPermit, Rejected> {
        self.try_acquire_n(key, 1)
    }

    /// [`try_acquire`](Self::try_acquire) for a call that costs `cost`: all or nothing. A cost of zero is free.
    ///
    /// # Errors
    ///
    /// [`Reason::OverLimit`]; [`Reason::CostExceedsBurst`] for more than is ever there at once.
    pub fn try_acquire_n(&self, key: &(impl Hash + ?Sized), cost: u32) -> Result<KeyedPermit, Rejected> {
        self.acquire_at(self.fingerprint(key), cost, &Reading::new())
    }

    pub(crate) fn acquire_at(&self, fingerprint: u64, cost: u32, now: &Reading) -> Result<KeyedPermit, Rejected> {
        let set: &Set = &self.set;
        if cost == 0 {
            // Its key need not be remembered, but is charged if the call turns out to cost something.
            return Ok(self.permit(Place(fingerprint), 0, Admission::Tokens));
        }
        let at = now.at(&set.clock);
        if let Err(why) = set.check_cost(fingerprint, cost, at) {
            self.count(Some(fingerprint), &why, now);
            return Err(why);
        }
        let (taken, place) = set.with_or_add(fingerprint, at, |view| {
            view.roll(at);
            view.take(cost, at).map_err(|until| set.over_limit(view, until, at))
        });
        if place == Place::OVERFLOW {
            self.set.add(counter::OVERFLOWED, 1);
        }
        match taken {
            Ok(admission) => Ok(self.permit(place, cost, admission)),
            Err(why) => {
                self.count((place != Place::OVERFLOW).then_some(fingerprint), &why, now);
                Err(why)
            }
        }
    }

    /// Leave to make one call for this key now, if a look is enough; otherwise nothing has happened.
    #[inline]
    pub(crate) fn glance(&self, fingerprint: u64, now: &Reading) -> Option<KeyedPermit> {
        let set: &Set = &self.set;
        let Keys::Buckets(table) = &set.keys else {
            return None;
        };
        let taken = table.take_one_at_a_glance(fingerprint, || now.at(&set.clock));
        taken.then(|| self.permit(Place(fingerprint), 1, Admission::Tokens))
    }

    #[inline]
    fn permit(&self, place: Place, cost: u32, admission: Admission) -> KeyedPermit {
        // Each key learns for itself.
        let wants = match self.set.algorithm {
            Algorithm::Adaptive(_) => Wants::OUTCOME,
            Algorithm::TokenBucket(_) | Algorithm::SlidingWindow(_) => Wants::NOTHING,
        };
        KeyedPermit {
            admitted: Admitted::new(&self.set, admission, cost, wants),
            place,
        }
    }

    /// Counts a rejection, at the key if there is one and it is tracked, and tells the listeners.
    pub(crate) fn count(&self, fingerprint: Option<u64>, why: &Rejected, now: &Reading) {
        let set = &self.set;
        set.add(
            match why.reason {
                Reason::CostExceedsBurst { .. } => counter::REJECTED_COST,
                Reason::MissingKey => counter::REJECTED_KEYLESS,
                _ => counter::REJECTED_OVER_LIMIT,
            },
            1,
        );
        if let Some(fingerprint) = fingerprint {
            set.keys.add_rejection(fingerprint);
        }
        set.hub.rejected(why, || now.at(&set.clock));
    }

    /// The refusal that the key's next call of this cost would meet, without taking anything. In a full set a new key may
    /// be refused by the overflow all the same.
    pub(crate) fn peek(&self, fingerprint: u64, cost: u32, now: &Reading) -> Option<Rejected> {
        self.peek_at(fingerprint, cost, now).map(|(why, _)| why)
    }

    /// The same, counted as [`acquire_at`](Self::acquire_at) would.
    pub(crate) fn refuse(&self, fingerprint: u64, cost: u32, now: &Reading) -> Option<Rejected> {
        let (why, place) = self.peek_at(fingerprint, cost, now)?;
        if place == Place::OVERFLOW {
            self.set.add(counter::OVERFLOWED, 1);
        }
        self.count((place != Place::OVERFLOW).then_some(fingerprint), &why, now);
        Some(why)
    }

    fn peek_at(&self, fingerprint: u64, cost: u32, now: &Reading) -> Option<(Rejected, Place)> {
        let set: &Set = &self.set;
        if cost == 0 {
            return None;
        }
        let now = now.at(&set.clock);
        if let Err(why) = set.check_cost(fingerprint, cost, now) {
            return Some((why, Place(fingerprint)));
        }
        let look = |view: View<'_>| {
            let until = view.peek(cost, now);
            (now < until).then(|| set.over_limit(view, until, now))
        };
        let (refusal, place) = match set.keys.with(fingerprint, look) {
            Some(refusal) => (refusal, Place(fingerprint)),
            None if set.keys.overflows(now) => (look(set.overflow.view()), Place::OVERFLOW),
            None => return None,
        };
        refusal.map(|why| (why, place))
    }

    pub(crate) fn missing_key(&self) -> Rejected {
        let set: &Set = &self.set;
        Rejected::new(set.service.clone(), Reason::MissingKey).limit(set.limit.clone())
    }

    /// All that is kept of a key, and how [`status`](Self::status) shows it, in hexadecimal. Every set has other fingerprints.
    ///
    /// ```
    /// # use portcullis::{KeyedRateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// let callers = KeyedRateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60)))?;
    /// callers.try_acquire("alice")?;
    /// callers.try_acquire("alice").unwrap_err();
    /// let worst = &callers.status().keys.unwrap().most_rejected[0];
    /// assert_eq!(worst.key, format!("{:016x}", callers.fingerprint("alice")));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn fingerprint(&self, key: &(impl Hash + ?Sized)) -> u64 {
        self.set.seed.fingerprint(key)
    }

    pub(crate) fn fingerprint_with(&self, write: impl FnOnce(&mut SipHasher) -> bool) -> Option<u64> {
        self.set.seed.fingerprint_with(write)
    }

    pub(crate) fn keyless(&self) -> u64 {
        self.set.seed.keyless()
    }

    /// The service's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.set.service
    }

    /// The limit's name, which tells several limits of one service apart.
    #[must_use]
    pub fn limit(&self) -> &Name {
        &self.set.limit
    }

    /// The clock that the limiters read.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.set.clock
    }

    /// What each key's limiter is made of.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.set.algorithm
    }

    /// How many keys have a quota of their own at most.
    #[must_use]
    pub fn max_keys(&self) -> usize {
        self.set.max_keys
    }

    /// The set as a whole. Reading changes nothing. It looks at every key, and new ones wait for it; tracked ones do not.
    ///
    /// The counters are sums over all keys; what is available, the rate and the retry time are those of a key that is new.
    #[must_use]
    pub fn status(&self) -> RateLimiterStatus {
        let set: &Set = &self.set;
        let now = set.clock.now();
        let mut worst: Vec<(u32, u64)> = Vec::new();
        let (tracked, evicted) = set.keys.survey(|rejected| {
            worst.extend(rejected);
            // So that the list is never longer than the worst and one piece.
            worst.sort_unstable_by(|a, b| b.cmp(a));
            worst.truncate(KeysStatus::MOST_REJECTED);
        });
        let overflows = set.keys.overflows(now);
        let view = if overflows {
            set.overflow.view()
        } else {
            set.unused.view()
        };
        let until = view.peek(1, now);
        let seen = Seen {
            service: &set.service,
            limit: &set.limit,
            algorithm: &set.algorithm,
            rate: view.adaptive_rate(now),
            available: view.available(now).max(0.0),
            retry_after: (now < until).then(|| until.duration_since(now)),
            waiting: 0,
        };
        let mut status = RateLimiterStatus::new(&seen, |counter| self.set.home.sum(counter));
        status.keys = Some(KeysStatus {
            tracked,
            max: set.max_keys,
            evicted,
            overflow_requests: self.set.home.sum(counter::OVERFLOWED),
            missing_key_requests: self.set.home.sum(counter::KEYLESS) + self.set.home.sum(counter::REJECTED_KEYLESS),
            most_rejected: worst
                .into_iter()
                .map(|(rejected, key)| KeyStatus {
                    key: format!("{key:016x}"),
                    rejected,
                })
                .collect(),
        });
        status
    }

    /// Counts a request without a key that was admitted all the same, or shares a quota.
    pub(crate) fn count_keyless(&self) {
        self.set.add(counter::KEYLESS, 1);
    }

    /// Calls `listener` on every event of this limiter: rejections. See [`Event`] for how.
    pub fn on_event(&self, listener: impl Fn(&Event) + Send + Sync + 'static) -> ListenerId {
        self.set.hub.on_event(listener)
    }

    /// Removes a listener; `false` if it is not there.
    pub fn remove_listener(&self, id: ListenerId) -> bool {
        self.set.hub.remove(id)
    }

    /// A queue of this limiter's events that holds `capacity` (at least one) and loses the oldest.
    #[must_use = "dropping the queue ends the subscription"]
    pub fn subscribe(&self, capacity: usize) -> Events {
        self.set.hub.subscribe(capacity)
    }

    pub(crate) fn add_listener(&self, listener: Listener) {
        self.set.hub.add(listener);
    }

    /// Whether both are handles of one set.
    pub(crate) fn same(&self, other: &Self) -> bool {
        self.set.same(&other.set)
    }

    /// Whether each key is limited as this algorithm does.
    pub(crate) fn matches(&self, algorithm: &Algorithm) -> bool {
        algorithm.validate().is_ok() && self.set.algorithm.resolved() == algorithm.resolved()
    }
}

impl fmt::Debug for KeyedRateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedRateLimiter")
            .field("service", self.name())
            .field("limit", self.limit())
            .field("algorithm", &self.set.algorithm)
            .field("max_keys", &self.set.max_keys)
            .finish_non_exhaustive()
    }
}

/// Leave to make one call for a key.
///
/// Dropped, it is spent, as a [`RateLimitPermit`](super::RateLimitPermit) is. A key that was evicted meanwhile has its whole quota:
/// what is given back to it is lost, what is charged makes it known again.
///
/// ```
/// # use portcullis::{KeyedRateLimiter, TokenBucket};
/// # use std::time::Duration;
/// let callers = KeyedRateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60)))?;
/// callers.try_acquire("alice")?.unused(); // thought better of it
/// callers.try_acquire("alice")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KeyedPermit {
    admitted: Admitted<Set>,
    place: Place,
}

impl KeyedPermit {
    /// How the call ended: an [`Outcome`], or a [`Verdict`] with its true cost.
    pub fn settle(self, verdict: impl Into<Verdict>) {
        Permit::settle(self, verdict.into(), &Reading::new());
    }

    /// The call was never begun: the key takes the permit back, as [`RateLimitPermit::unused`](super::RateLimitPermit::unused) does.
    pub fn unused(self) {
        Permit::unused(self, &Reading::new());
    }

    /// What the permit took from the key's quota.
    #[must_use]
    pub fn cost(&self) -> u32 {
        self.admitted.cost()
    }

    /// A permit whose cost was an estimate.
    pub(crate) fn estimated(mut self) -> Self {
        self.admitted.set_estimated(true);
        self
    }

    /// A permit of a limit that counts calls.
    pub(crate) fn counting(mut self) -> Self {
        self.admitted.set_estimated(false);
        self
    }

    /// Tells the key's limiter how the call ended, if it wants to know.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn end(&mut self, outcome: Option<Outcome>, cost: Option<u32>, now: &Reading) {
        let reserved = self.admitted.cost();
        let cost = cost.filter(|cost| *cost != reserved);
        if let Some((share, asked)) = self.admitted.take()
            && (asked || cost.is_some())
        {
            teach(&share, self.place, reserved, outcome, cost, now);
        }
    }
}

/// Tells at the end of a call what the key's limiter wants to know: the true cost, and of an adaptive one the outcome.
#[cold]
#[inline(never)]
fn teach(share: &Share<Set>, place: Place, reserved: u32, outcome: Option<Outcome>, cost: Option<u32>, now: &Reading) {
    let set = share.state();
    let now = now.at(&set.clock);
    if let Some(cost) = cost {
        let correct = |view: View<'_>| {
            view.roll(now);
            view.correct(reserved, cost, now);
        };
        if cost > reserved && place != Place::OVERFLOW {
            set.with_or_add(place.0, now, correct);
        } else {
            set.at(place, correct);
        }
    }
    if matches!(set.algorithm, Algorithm::Adaptive(_)) {
        set.at(place, |view| {
            view.roll(now);
            view.learn(outcome.unwrap_or_else(|| set.algorithm.cancelled()));
        });
    }
}

impl Permit for KeyedPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle(mut self, verdict: Verdict, now: &Reading) {
        let metered = verdict.metered.filter(|_| self.admitted.is_estimated());
        self.end(Some(verdict.outcome), verdict.cost.or(metered), now);
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn settle_quickly(&mut self, verdict: &Verdict, now: &Reading) -> bool {
        self.admitted.settle_quickly(verdict, now)
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn cancel(mut self, cost: Option<u32>, now: &Reading) {
        let cost = cost.filter(|_| self.admitted.is_estimated());
        self.end(None, cost, now);
    }

    fn unused(mut self, now: &Reading) {
        let Some((share, _)) = self.admitted.take() else {
            return;
        };
        let set = share.state();
        let now = now.at(&set.clock);
        let (admission, cost) = (self.admitted.admission, self.admitted.cost());
        let taken_back = set.at(self.place, |view| {
            view.roll(now);
            view.give_back(admission, cost, now)
        });
        if cost == 0 || taken_back == Some(true) {
            share.count_and_end(counter::RETURNED);
        }
    }

    fn quotas(&self, now: &Reading, tell: &mut dyn FnMut(Quota)) {
        let Some(set) = self.admitted.state() else {
            return;
        };
        let now = now.at(&set.clock);
        let told = set.at(self.place, |view| {
            let reset = view.full_again(now).duration_since(now);
            let Told { of, remaining } = set.told(view, now);
            of.quota(set.limit.clone(), remaining.into(), reset)
        });
        if let Some(quota) = told {
            tell(quota);
        }
    }
}

impl Drop for KeyedPermit {
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn drop(&mut self) {
        if let Some((share, true)) = self.admitted.take() {
            teach(
                &share,
                self.place,
                self.admitted.cost(),
                abandoned(),
                None,
                &Reading::new(),
            );
        }
    }
}

impl fmt::Debug for KeyedPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedPermit")
            .field("limit", &self.admitted.state().map(|set| set.limit.clone()))
            .field("cost", &self.admitted.cost())
            .finish_non_exhaustive()
    }
}
