//! A breaker for each key, in bounded memory.
//!
//! A hit takes its shard's lock for reading and nothing else. Whoever adds a key holds the books, one mutex for the whole set,
//! and so does whoever sums: what an eviction takes out of the shards and adds to the retired sums is never seen in between.
//! Locks are taken in this order: books, shard, machine; no user code runs under any.

use super::{CircuitBreaker, CircuitBreakerConfig, CircuitBreakerMetrics, Core, config::Settings, counter};
use crate::{
    clock::{Clock, Reading, Timestamp},
    error::{ConfigError, duration, within},
    event::{Event, Hub, Listener, ListenerId},
    fingerprint::{Seed, SipHasher},
    name::Name,
    rejected::{Reason, Rejected},
    shards::Shards,
    state::{State, StateTransitions},
    stripe::Striped,
    subscribe::Events,
};
use std::{
    fmt,
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// How many keys a new one looks at for one to evict, at most.
const LOOKS: usize = 16;

const DEFAULT_FORGET_AFTER: Duration = Duration::from_secs(3_600);

/// A circuit breaker for each key: an upstream host, a tenant, a shop.
///
/// A key's breaker is made when it is first asked for. Of a key only a 64-bit hash is kept, by `SipHash` with a random seed; two
/// keys with the same hash, which nobody can aim for, share a breaker.
///
/// ```
/// use portcullis::{CircuitBreakerConfig, KeyedCircuitBreaker, Outcome};
///
/// let upstreams = KeyedCircuitBreaker::builder("upstreams")
///     .config(CircuitBreakerConfig::default().failure_threshold(1))
///     .max_keys(100)
///     .build()?;
/// upstreams.try_acquire("eu.example")?.settle(Outcome::Failure);
/// assert!(upstreams.try_acquire("eu.example").is_err());
/// assert!(upstreams.try_acquire("us.example").is_ok());
/// assert_eq!(upstreams.status().open, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # When the set is full
///
/// At most [`max_keys`](KeyedCircuitBreakerBuilder::max_keys) breakers are kept. A new key then takes the place of one that may go:
///
/// - its breaker is as good as new: closed, without a failure or a slow call in what it remembers;
/// - or all of that is old: the latest was recorded [`forget_after`](KeyedCircuitBreakerBuilder::forget_after) ago, an hour by
///   default, and no open time runs. A host that failed and is gone, say. Listeners hear of one that is forgotten open or half-open
///   as if it were [`reset`](CircuitBreaker::reset).
///
/// One stays in any case that is overridden, has another config than the set, or is in somebody's hands, as a handle or a permit. A
/// new key looks at up to 16, in turn; of these one that was not used since the last look goes first. If none of them may go, the
/// key's calls share one *overflow* breaker, and the next call looks at the next 16.
///
/// So who makes calls fail under keys of his own choice makes other new keys share a breaker, for an hour and as long as he goes on:
/// strangers should not choose the keys. See the [README](crate#under-attack).
///
/// # Cost
///
/// For a key that is tracked: a hash, a lock shared with one key in 32 that is only read, and what a [`CircuitBreaker`] costs,
/// with counters that its callers share. A new key takes a mutex and makes a breaker, of about 1 kB.
#[derive(Clone)]
pub struct KeyedCircuitBreaker {
    set: Arc<Set>,
}

struct Set {
    name: Name,
    clock: Clock,
    config: CircuitBreakerConfig,
    settings: Settings,
    max_keys: usize,
    forget_after: Duration,
    seed: Seed,
    hub: Arc<Hub>,
    shards: Shards<Entry>,
    books: Mutex<Books>,
    overflow: CircuitBreaker,
    /// Calls that were rejected because they had no key.
    keyless: AtomicU64,
}

struct Entry {
    breaker: CircuitBreaker,
    /// Since a new key last looked here.
    used: AtomicBool,
}

/// What has to be seen and changed together.
#[derive(Default)]
struct Books {
    /// Every tracked key once, and where to look next for one to evict.
    ring: Vec<u64>,
    hand: usize,
    evicted: u64,
    overflowed: u64,
    retired: Sums,
}

#[derive(Default)]
struct Sums {
    counts: [u64; counter::COUNTERS],
    transitions: StateTransitions,
}

impl Sums {
    fn add(&mut self, breaker: &CircuitBreaker, transitions: StateTransitions) {
        for (counter, sum) in self.counts.iter_mut().enumerate() {
            *sum += breaker.shared.home.sum(counter);
        }
        self.transitions.closed_to_open += transitions.closed_to_open;
        self.transitions.open_to_half_open += transitions.open_to_half_open;
        self.transitions.half_open_to_open += transitions.half_open_to_open;
        self.transitions.half_open_to_closed += transitions.half_open_to_closed;
    }
}

/// Makes a [`KeyedCircuitBreaker`]; from [`KeyedCircuitBreaker::builder`].
///
/// ```
/// # use portcullis::KeyedCircuitBreaker;
/// let tenants = KeyedCircuitBreaker::builder("tenants").max_keys(10_000).build()?;
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build`"]
pub struct KeyedCircuitBreakerBuilder {
    name: String,
    clock: Clock,
    config: CircuitBreakerConfig,
    max_keys: usize,
    forget_after: Duration,
}

impl KeyedCircuitBreakerBuilder {
    /// The config of every breaker.
    pub fn config(mut self, config: CircuitBreakerConfig) -> Self {
        self.config = config;
        self
    }

    /// How many keys have a breaker of their own, 1 to 1,048,576. Default: 1,000.
    pub fn max_keys(mut self, keys: usize) -> Self {
        self.max_keys = keys;
        self
    }

    /// How old the latest failure or slow call of a key must be before the key may make room for a new one in a full set, 1 ns to
    /// 100 years. Default: one hour. See [full sets](KeyedCircuitBreaker#when-the-set-is-full).
    ///
    /// ```
    /// # use portcullis::{Clock, KeyedCircuitBreaker, Outcome};
    /// # use std::time::Duration;
    /// # let clock = Clock::manual();
    /// let pods = KeyedCircuitBreaker::builder("pods").max_keys(1).forget_after(Duration::from_secs(600)).clock(&clock).build()?;
    /// pods.try_acquire("10.0.0.7")?.settle(Outcome::Failure); // and then it is gone
    /// pods.try_acquire("10.0.0.8")?.settle(Outcome::Success);
    /// assert_eq!((pods.status().overflowed, pods.status().evicted), (1, 0));
    /// clock.advance(Duration::from_secs(600));
    /// pods.try_acquire("10.0.0.8")?.settle(Outcome::Success);
    /// assert_eq!((pods.status().overflowed, pods.status().evicted), (1, 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn forget_after(mut self, age: Duration) -> Self {
        self.forget_after = age;
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
    pub fn build(self) -> Result<KeyedCircuitBreaker, ConfigError> {
        let name = Name::new("name", &self.name)?;
        let settings = self.config.validate()?;
        let max_keys = within("max_keys", self.max_keys, &(1..=1 << 20))?;
        let forget_after = duration("forget_after", self.forget_after)?;
        let hub = Arc::<Hub>::default();
        let (named, clock) = (name.clone(), self.clock.clone());
        let (config, checked, shared_hub) = (self.config.clone(), settings.clone(), hub.clone());
        let overflow = Striped::new(|home| Core::new(named, clock, config, checked, shared_hub, home));
        Ok(KeyedCircuitBreaker {
            set: Arc::new(Set {
                name,
                clock: self.clock,
                config: self.config,
                settings,
                max_keys,
                forget_after,
                seed: Seed::default(),
                hub,
                shards: Shards::default(),
                books: Mutex::default(),
                overflow: CircuitBreaker { shared: overflow },
                keyless: AtomicU64::new(0),
            }),
        })
    }
}

impl Set {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_breaker(&self) -> CircuitBreaker {
        let core = |home| {
            Core::new(
                self.name.clone(),
                self.clock.clone(),
                self.config.clone(),
                self.settings.clone(),
                self.hub.clone(),
                home,
            )
        };
        let breaker = CircuitBreaker {
            shared: Striped::standing(core),
        };
        breaker.shared.machine().date_blame();
        breaker
    }

    fn find(&self, fingerprint: u64) -> Option<CircuitBreaker> {
        let shard = self.shards.read(fingerprint);
        let entry = shard.get(&fingerprint)?;
        // A line that is written once is a line that readers share.
        if !entry.used.load(Ordering::Relaxed) {
            entry.used.store(true, Ordering::Relaxed);
        }
        Some(entry.breaker.clone())
    }

    fn find_or_add(&self, fingerprint: u64) -> CircuitBreaker {
        if let Some(breaker) = self.find(fingerprint) {
            return breaker;
        }
        let mut books = self.books();
        if let Some(breaker) = self.find(fingerprint) {
            return breaker;
        }
        let now = self.clock.now();
        let evicted = if books.ring.len() < self.max_keys {
            books.ring.push(fingerprint);
            None
        } else {
            let Some((place, evicted)) = self.evict(&mut books, now) else {
                books.overflowed += 1;
                return self.overflow.clone();
            };
            books.ring[place] = fingerprint;
            // Dropped outside all locks.
            Some(evicted)
        };
        let breaker = self.new_breaker();
        let entry = Entry {
            breaker: breaker.clone(),
            used: AtomicBool::new(true),
        };
        self.shards.write(fingerprint).insert(fingerprint, entry);
        drop(books);
        if let Some(evicted) = evicted
            && evicted.state() != State::Closed
        {
            // For the listeners, who hold it to be open or half-open. Its counters are among those of the retired already.
            evicted.reset();
        }
        breaker
    }

    /// Takes out one that may go: of the next few one that was not used since the last look, or else any.
    fn evict(&self, books: &mut Books, now: Timestamp) -> Option<(usize, CircuitBreaker)> {
        let keys = books.ring.len();
        let looks = LOOKS.min(keys);
        let first = books.hand;
        for look in 0..2 * looks {
            let place = (first + look % looks) % keys;
            books.hand = (place + 1) % keys;
            let fingerprint = books.ring[place];
            let mut shard = self.shards.write(fingerprint);
            let Some(entry) = shard.get_mut(&fingerprint) else {
                unreachable!("the ring and the shards hold the same keys")
            };
            let used = std::mem::take(entry.used.get_mut());
            if used && look < looks || !self.may_go(&mut entry.breaker, now) {
                continue;
            }
            if let Some(Entry { breaker, .. }) = shard.remove(&fingerprint) {
                drop(shard);
                let transitions = breaker.shared.caught_up().view(now).transitions;
                books.retired.add(&breaker, transitions);
                books.evicted += 1;
                return Some((place, breaker));
            }
        }
        None
    }

    /// Whether a breaker is in nobody's hands and has nothing to remember, or nothing but what is old. The caller holds the shard for
    /// writing: who finds no other handle now finds none until it is done.
    fn may_go(&self, breaker: &mut CircuitBreaker, now: Timestamp) -> bool {
        if !breaker.shared.is_sole() || *breaker.shared.config() != self.config {
            return false;
        }
        let machine = breaker.shared.caught_up();
        machine.is_as_new(now) || machine.is_outdated(self.forget_after, now)
    }
}

impl KeyedCircuitBreaker {
    /// Starts a set of breakers for the service of that name.
    pub fn builder(name: impl Into<String>) -> KeyedCircuitBreakerBuilder {
        KeyedCircuitBreakerBuilder {
            name: name.into(),
            clock: Clock::system(),
            config: CircuitBreakerConfig::default(),
            max_keys: 1_000,
            forget_after: DEFAULT_FORGET_AFTER,
        }
    }

    /// The key's breaker, new if the key is; in a full set perhaps the overflow breaker. As long as the handle lives, the key
    /// keeps its place.
    ///
    /// Listeners hear all breakers of the set, on whichever handle they were added.
    pub fn get(&self, key: &(impl Hash + ?Sized)) -> CircuitBreaker {
        self.breaker(self.fingerprint(key))
    }

    /// The breaker of a key of which only the fingerprint is known, as a status shows it; `None` if no breaker is kept for it.
    ///
    /// ```
    /// # use portcullis::{KeyedCircuitBreaker, State};
    /// let shops = KeyedCircuitBreaker::builder("shops").build()?;
    /// shops.get("north").force_open();
    /// for shown in shops.status().open_keys {
    ///     let fingerprint = u64::from_str_radix(&shown, 16)?;
    ///     shops.get_by_fingerprint(fingerprint).unwrap().reset();
    /// }
    /// assert_eq!(shops.get("north").state(), State::Closed);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn get_by_fingerprint(&self, fingerprint: u64) -> Option<CircuitBreaker> {
        self.set.find(fingerprint)
    }

    /// Leave to call the service for this key, or the reason why not.
    ///
    /// # Errors
    ///
    /// As [`CircuitBreaker::try_acquire`].
    pub fn try_acquire(&self, key: &(impl Hash + ?Sized)) -> Result<super::CircuitBreakerPermit, Rejected> {
        self.get(key).try_acquire()
    }

    /// All that is kept of a key, and how [`status`](Self::status) shows it, in hexadecimal. Every set has other fingerprints.
    #[must_use]
    pub fn fingerprint(&self, key: &(impl Hash + ?Sized)) -> u64 {
        self.set.seed.fingerprint(key)
    }

    /// The fingerprint of what is written, if it says so.
    pub(crate) fn fingerprint_with(&self, write: impl FnOnce(&mut SipHasher) -> bool) -> Option<u64> {
        self.set.seed.fingerprint_with(write)
    }

    /// The fingerprint of no key.
    pub(crate) fn keyless(&self) -> u64 {
        self.set.seed.keyless()
    }

    pub(crate) fn breaker(&self, fingerprint: u64) -> CircuitBreaker {
        self.set.find_or_add(fingerprint)
    }

    pub(crate) fn missing_key(&self) -> Rejected {
        Rejected::new(self.set.name.clone(), Reason::MissingKey)
    }

    /// Counts the rejection of a request without a key, and tells the listeners.
    pub(crate) fn count_missing(&self, why: &Rejected, now: &Reading) {
        self.set.keyless.fetch_add(1, Ordering::Relaxed);
        self.set.hub.rejected(why, || now.at(&self.set.clock));
    }

    /// The service's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.set.name
    }

    /// The clock that the breakers read.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.set.clock
    }

    /// The config of a new key's breaker.
    #[must_use]
    pub fn config(&self) -> &CircuitBreakerConfig {
        &self.set.config
    }

    /// How many keys have a breaker of their own at most.
    #[must_use]
    pub fn max_keys(&self) -> usize {
        self.set.max_keys
    }

    /// How old the latest failure or slow call of a key must be before the key may make room.
    #[must_use]
    pub fn forget_after(&self) -> Duration {
        self.set.forget_after
    }

    /// Whether the other set means the same: its config, in whatever spelling, and how many keys.
    pub(crate) fn matches(&self, other: &Self) -> bool {
        let (set, other) = (&*self.set, &*other.set);
        set.settings == other.settings && set.config.critical == other.config.critical && set.max_keys == other.max_keys
    }

    /// Calls `listener` on every event of every breaker; see [`Event`] for how.
    pub fn on_event(&self, listener: impl Fn(&Event) + Send + Sync + 'static) -> ListenerId {
        self.set.hub.on_event(listener)
    }

    /// Removes a listener; `false` if it is not there.
    pub fn remove_listener(&self, id: ListenerId) -> bool {
        self.set.hub.remove(id)
    }

    /// A queue of all breakers' events that holds `capacity` (at least one) and loses the oldest.
    #[must_use = "dropping the queue ends the subscription"]
    pub fn subscribe(&self, capacity: usize) -> Events {
        self.set.hub.subscribe(capacity)
    }

    pub(crate) fn add_listener(&self, listener: Listener) {
        self.set.hub.add(listener);
    }

    /// Whether both are handles of one set.
    pub(crate) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.set, &other.set)
    }

    /// The set as a whole. Reading changes nothing. It looks at every breaker, and new keys wait for it; tracked ones do not.
    #[must_use]
    pub fn status(&self) -> KeyedCircuitBreakerStatus {
        let set = &*self.set;
        let now = set.clock.now();
        let mut sums = Sums::default();
        let (mut open, mut half_open, mut open_keys) = (0, 0, Vec::new());
        let books = set.books();
        sums.counts = books.retired.counts;
        sums.transitions = books.retired.transitions;
        for shard in set.shards.each() {
            for (fingerprint, entry) in &*shard {
                let view = entry.breaker.shared.caught_up().view(now);
                sums.add(&entry.breaker, view.transitions);
                match view.state {
                    State::Closed => {}
                    State::HalfOpen => half_open += 1,
                    State::Open => {
                        open += 1;
                        if open_keys.len() < KeyedCircuitBreakerStatus::MOST_OPEN_KEYS {
                            open_keys.push(format!("{fingerprint:016x}"));
                        }
                    }
                }
            }
        }
        let overflow = set.overflow.shared.caught_up().view(now);
        sums.add(&set.overflow, overflow.transitions);
        let (tracked, evicted, overflowed) = (books.ring.len(), books.evicted, books.overflowed);
        drop(books);
        open_keys.sort_unstable();
        KeyedCircuitBreakerStatus {
            service: set.name.clone(),
            tracked,
            max: set.max_keys,
            open,
            half_open,
            evicted,
            overflowed,
            overflow: overflow.state,
            open_keys,
            missing_key: set.keyless.load(Ordering::Relaxed),
            metrics: CircuitBreakerMetrics::new(sums.transitions, |counter| sums.counts[counter]),
            config: set.config.clone(),
        }
    }
}

impl fmt::Debug for KeyedCircuitBreaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedCircuitBreaker")
            .field("name", self.name())
            .field("max_keys", &self.set.max_keys)
            .field("forget_after", &self.set.forget_after)
            .finish_non_exhaustive()
    }
}

/// A set of breakers at one moment: from [`KeyedCircuitBreaker::status`].
///
/// ```
/// # use portcullis::KeyedCircuitBreaker;
/// let shops = KeyedCircuitBreaker::builder("shops").max_keys(2).build()?;
/// shops.get("north").force_open();
/// let status = shops.status();
/// assert_eq!((status.tracked, status.max, status.open), (1, 2, 1));
/// assert_eq!(status.open_keys, [format!("{:016x}", shops.fingerprint("north"))]);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct KeyedCircuitBreakerStatus {
    /// The service's name.
    pub service: Name,
    /// Keys with a breaker of their own.
    pub tracked: usize,
    /// The most that can be.
    pub max: usize,
    /// Keys whose circuit is open, forced ones included.
    pub open: usize,
    /// Keys whose circuit is half-open.
    pub half_open: usize,
    /// Keys whose breaker was as good as new, or its failures old, and that made room for another.
    pub evicted: u64,
    /// How often a breaker was asked for and was the overflow breaker.
    pub overflowed: u64,
    /// The state of the overflow breaker.
    pub overflow: State,
    /// The fingerprints, in hexadecimal, of up to ten keys whose circuit is open.
    pub open_keys: Vec<String>,
    /// Calls that were rejected because they had no key; not among the metrics.
    pub missing_key: u64,
    /// The sums of the counters, over the breakers that are and those that were. They only ever grow.
    pub metrics: CircuitBreakerMetrics,
    /// The config of each breaker.
    pub config: CircuitBreakerConfig,
}

impl KeyedCircuitBreakerStatus {
    const MOST_OPEN_KEYS: usize = 10;
}
