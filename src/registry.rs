#[cfg(feature = "http")]
use crate::breaker::CircuitBreakerStatus;
use crate::{
    breaker::{CircuitBreaker, CircuitBreakerConfig, KeyedCircuitBreaker},
    clock::Clock,
    error::ConfigError,
    event::{Event, Listener, ListenerId},
    limit::{Algorithm, DEFAULT_LIMIT, KeyedRateLimiter, RateLimiter, RateLimiterStatus},
    metrics::{self, MetricsFormat},
    name::Name,
    state::State,
    status::{RegistryStatus, ServiceStatus},
    subscribe::Events,
};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

/// Every breaker and limiter of a program by the name of the service it guards.
///
/// A cheap handle: clones are one registry. The same name is the same state, from every layer, route and thread. The registry is
/// asked when a service is put together and when somebody looks; no call ever passes through it.
///
/// A second registry made with [`new`](Self::new) knows nothing of the first: the same name in both is two states, and an admin
/// service or a page of metrics shows the one that it came from. Make one, and clone it to wherever services are put together. What
/// was built without it is shown once it is [registered](Self::register). [`RegistryError`] says where two mean different things by
/// one name: another config, another breaker, a limit that is keyed and one that is not.
///
/// ```
/// use portcullis::{CircuitBreakerConfig, Registry, TokenBucket};
/// use std::time::Duration;
///
/// let registry = Registry::new();
/// for agent in ["research", "data_processing", "summarizer"] {
///     registry.circuit_breaker(agent, CircuitBreakerConfig::default().failure_threshold(3))?;
///     registry.rate_limiter(agent, TokenBucket::new(50, Duration::from_secs(60)))?;
/// }
/// registry.get_circuit_breaker("research").unwrap().force_open();
/// assert_eq!(registry.open_circuits(), ["research"]);
///
/// let status = registry.status();
/// let names: Vec<_> = status.services.keys().map(|name| name.as_str()).collect();
/// assert_eq!(names, ["data_processing", "research", "summarizer"]);
/// # Ok::<(), portcullis::RegistryError>(())
/// ```
#[derive(Clone, Default)]
pub struct Registry {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    clock: Clock,
    entries: RwLock<Entries>,
}

#[derive(Default)]
struct Entries {
    services: BTreeMap<Name, Entry>,
    /// Given to every breaker and limiter, present and to come.
    listeners: Vec<Listener>,
}

#[derive(Default, Clone)]
struct Entry {
    breaker: Option<CircuitBreaker>,
    /// In place of a breaker: a service has one or the other.
    keyed_breakers: Option<KeyedCircuitBreaker>,
    limiters: BTreeMap<Name, RateLimiter>,
    /// None of them has the name of one of the limiters.
    keyed_limiters: BTreeMap<Name, KeyedRateLimiter>,
}

/// Why a registry did not take or make a breaker or limiter. Nothing has changed then.
///
/// ```
/// # use portcullis::{CircuitBreakerConfig, Registry, RegistryError};
/// let registry = Registry::new();
/// registry.circuit_breaker("search", CircuitBreakerConfig::default())?;
/// let other = CircuitBreakerConfig::default().failure_threshold(9);
/// let error = registry.circuit_breaker("search", other).unwrap_err();
/// assert!(matches!(error, RegistryError::Conflict { .. }));
/// assert!(error.to_string().contains("9"), "both configs are shown");
/// # Ok::<(), RegistryError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// A setting or a name is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The name is in use with another config.
    #[error("{what} of {service:?} exists with another config: it has {existing}, asked for was {requested}")]
    Conflict {
        /// The service's name.
        service: Name,
        /// `the circuit breaker`, or the rate limit by name.
        what: String,
        /// The config that it has.
        existing: String,
        /// The config that was asked for.
        requested: String,
    },
    /// The name is in use by another breaker or limiter than the one to be registered.
    #[error("{what} of {service:?} exists already, with a state of its own")]
    Taken {
        /// The service's name.
        service: Name,
        /// `the circuit breaker`, or the rate limit by name.
        what: String,
    },
}

const THE_BREAKER: &str = "the circuit breaker";

fn the_limit(limit: &str) -> String {
    format!("the rate limit {limit:?}")
}

/// A breaker or limiter built elsewhere: what [`Registry::register`] takes.
///
/// ```
/// # use portcullis::{CircuitBreaker, Registry};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// Registry::new().register(breaker)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Registrable {
    /// A circuit breaker, by its service's name.
    CircuitBreaker(CircuitBreaker),
    /// A set of circuit breakers, by its service's name. A service has this or one breaker, not both.
    KeyedCircuitBreaker(KeyedCircuitBreaker),
    /// A rate limiter, by its service's and its limit's name.
    RateLimiter(RateLimiter),
    /// A rate limiter for each key, by its service's and its limit's name.
    KeyedRateLimiter(KeyedRateLimiter),
}

impl From<CircuitBreaker> for Registrable {
    fn from(breaker: CircuitBreaker) -> Self {
        Self::CircuitBreaker(breaker)
    }
}
impl From<&CircuitBreaker> for Registrable {
    fn from(breaker: &CircuitBreaker) -> Self {
        breaker.clone().into()
    }
}
impl From<KeyedCircuitBreaker> for Registrable {
    fn from(breakers: KeyedCircuitBreaker) -> Self {
        Self::KeyedCircuitBreaker(breakers)
    }
}
impl From<&KeyedCircuitBreaker> for Registrable {
    fn from(breakers: &KeyedCircuitBreaker) -> Self {
        breakers.clone().into()
    }
}
impl From<KeyedRateLimiter> for Registrable {
    fn from(limiters: KeyedRateLimiter) -> Self {
        Self::KeyedRateLimiter(limiters)
    }
}
impl From<&KeyedRateLimiter> for Registrable {
    fn from(limiters: &KeyedRateLimiter) -> Self {
        limiters.clone().into()
    }
}
impl From<RateLimiter> for Registrable {
    fn from(limiter: RateLimiter) -> Self {
        Self::RateLimiter(limiter)
    }
}
impl From<&RateLimiter> for Registrable {
    fn from(limiter: &RateLimiter) -> Self {
        limiter.clone().into()
    }
}

impl Registry {
    /// An empty registry, whose breakers and limiters read [`Clock::system`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty registry, whose breakers and limiters read this clock.
    ///
    /// ```
    /// # use portcullis::{Clock, Registry};
    /// let clock = Clock::manual();
    /// let registry = Registry::with_clock(&clock);
    /// ```
    #[must_use]
    pub fn with_clock(clock: impl Into<Clock>) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock: clock.into(),
                entries: RwLock::default(),
            }),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Entries> {
        self.shared.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Entries> {
        self.shared.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, service: &str) -> Option<Entry> {
        self.read().services.get(service).cloned()
    }

    /// The breaker of that service, made now if there is none.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Config`] for a setting or name that is not valid, [`RegistryError::Conflict`] if the breaker there has
    /// another config (after a [`reconfigure`](CircuitBreaker::reconfigure): than the new one), [`RegistryError::Taken`] if the
    /// service has a breaker for each key.
    pub fn circuit_breaker(
        &self,
        service: impl Into<String>,
        config: CircuitBreakerConfig,
    ) -> Result<CircuitBreaker, RegistryError> {
        let builder = CircuitBreaker::builder(service).config(config);
        let made = builder.clock(&self.shared.clock).build()?;
        let mut entries = self.write();
        match entries.breaker(made.name()) {
            Some(existing) if existing.matches(&made.config()) => Ok(existing.clone()),
            Some(existing) => Err(RegistryError::Conflict {
                service: made.name().clone(),
                what: THE_BREAKER.into(),
                existing: format!("{:?}", existing.config()),
                requested: format!("{:?}", made.config()),
            }),
            None if entries.keyed_breakers(made.name()).is_some() => Err(taken(made.name(), THE_BREAKER.into())),
            None => {
                entries.insert_breaker(made.clone());
                Ok(made)
            }
        }
    }

    /// The breakers of that service, one for each of up to `max_keys` keys, made now if there are none.
    ///
    /// A set with a [`forget_after`](crate::KeyedCircuitBreakerBuilder::forget_after) of its own is built and taken in by
    /// [`register`](Self::register); then it is the one that is found here.
    ///
    /// ```
    /// # use portcullis::{CircuitBreakerConfig, Registry};
    /// let registry = Registry::new();
    /// let config = CircuitBreakerConfig::default().failure_threshold(3);
    /// let upstreams = registry.keyed_circuit_breaker("upstream", config, 1_000)?;
    /// upstreams.get("eu.example").force_open();
    /// let status = registry.service_status("upstream").unwrap();
    /// assert_eq!(status.circuit_breakers.unwrap().open, 1);
    /// # Ok::<(), portcullis::RegistryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`RegistryError::Config`] for a setting or name that is not valid, [`RegistryError::Conflict`] if the breakers there have
    /// another config or number of keys, [`RegistryError::Taken`] if the service has a breaker that is not keyed.
    pub fn keyed_circuit_breaker(
        &self,
        service: impl Into<String>,
        config: CircuitBreakerConfig,
        max_keys: usize,
    ) -> Result<KeyedCircuitBreaker, RegistryError> {
        let builder = KeyedCircuitBreaker::builder(service).config(config).max_keys(max_keys);
        let made = builder.clock(&self.shared.clock).build()?;
        let mut entries = self.write();
        match entries.keyed_breakers(made.name()) {
            Some(existing) if existing.matches(&made) => Ok(existing.clone()),
            Some(existing) => Err(RegistryError::Conflict {
                service: made.name().clone(),
                what: THE_BREAKER.into(),
                existing: format!("{:?} for {} keys", existing.config(), existing.max_keys()),
                requested: format!("{:?} for {max_keys} keys", made.config()),
            }),
            None if entries.breaker(made.name()).is_some() => Err(taken(made.name(), THE_BREAKER.into())),
            None => {
                entries.insert_keyed_breakers(made.clone());
                Ok(made)
            }
        }
    }

    /// The rate limiter of that service, made now if there is none. Its limit is named `default`.
    ///
    /// # Errors
    ///
    /// As [`circuit_breaker`](Self::circuit_breaker).
    pub fn rate_limiter(
        &self,
        service: impl Into<String>,
        algorithm: impl Into<Algorithm>,
    ) -> Result<RateLimiter, RegistryError> {
        self.named_rate_limiter(service, DEFAULT_LIMIT, algorithm)
    }

    /// One of several rate limiters of a service, made now if there is none of that name.
    ///
    /// ```
    /// # use portcullis::{Registry, SlidingWindow, TokenBucket};
    /// # use std::time::Duration;
    /// let registry = Registry::new();
    /// registry.named_rate_limiter("search", "per-second", TokenBucket::new(10, Duration::from_secs(1)))?;
    /// registry.named_rate_limiter("search", "daily", SlidingWindow::new(10_000, Duration::from_secs(86_400)))?;
    /// assert_eq!(registry.get_rate_limiters("search").len(), 2);
    /// # Ok::<(), portcullis::RegistryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`circuit_breaker`](Self::circuit_breaker); [`RegistryError::Taken`] if the limit of that name is a keyed one.
    pub fn named_rate_limiter(
        &self,
        service: impl Into<String>,
        limit: impl Into<String>,
        algorithm: impl Into<Algorithm>,
    ) -> Result<RateLimiter, RegistryError> {
        let (service, limit, algorithm) = (service.into(), limit.into(), algorithm.into());
        // Looked up first: a window's ring may be large, and is made only where it is needed.
        if let Some(existing) = self.get_named_rate_limiter(&service, &limit) {
            return existing_limiter(&existing, algorithm);
        }
        let builder = RateLimiter::builder(service, algorithm).limit(limit);
        let made = builder.clock(&self.shared.clock).build()?;
        let mut entries = self.write();
        if let Some(existing) = entries.limiter(made.name(), made.limit()) {
            return existing_limiter(existing, algorithm);
        }
        if entries.keyed_limiter(made.name(), made.limit()).is_some() {
            return Err(taken(made.name(), the_limit(made.limit())));
        }
        entries.insert_limiter(made.clone());
        Ok(made)
    }

    /// One of the rate limiters of a service, with a quota for each of up to `max_keys` keys, made now if there is none of that
    /// name.
    ///
    /// ```
    /// # use portcullis::{Registry, TokenBucket};
    /// # use std::time::Duration;
    /// let registry = Registry::new();
    /// let callers =
    ///     registry.keyed_rate_limiter("api", "per-caller", TokenBucket::new(10, Duration::from_secs(1)), 50_000)?;
    /// callers.try_acquire("alice")?;
    /// let status = registry.service_status("api").unwrap();
    /// assert_eq!(status.rate_limiters[0].keys.as_ref().unwrap().tracked, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`circuit_breaker`](Self::circuit_breaker); [`RegistryError::Taken`] if the limit of that name is not a keyed one.
    pub fn keyed_rate_limiter(
        &self,
        service: impl Into<String>,
        limit: impl Into<String>,
        algorithm: impl Into<Algorithm>,
        max_keys: usize,
    ) -> Result<KeyedRateLimiter, RegistryError> {
        let algorithm = algorithm.into();
        let builder = KeyedRateLimiter::builder(service, algorithm)
            .limit(limit)
            .max_keys(max_keys);
        let made = builder.clock(&self.shared.clock).build()?;
        let mut entries = self.write();
        match entries.keyed_limiter(made.name(), made.limit()) {
            Some(existing) if existing.matches(&algorithm) && existing.max_keys() == max_keys => Ok(existing.clone()),
            Some(existing) => Err(RegistryError::Conflict {
                service: made.name().clone(),
                what: the_limit(made.limit()),
                existing: format!("{:?} for {} keys", existing.algorithm(), existing.max_keys()),
                requested: format!("{algorithm:?} for {max_keys} keys"),
            }),
            None if entries.limiter(made.name(), made.limit()).is_some() => {
                Err(taken(made.name(), the_limit(made.limit())))
            }
            None => {
                entries.insert_keyed_limiter(made.clone());
                Ok(made)
            }
        }
    }

    /// The keyed limiter of that service and limit, if there is one.
    #[must_use]
    pub fn get_keyed_rate_limiter(&self, service: &str, limit: &str) -> Option<KeyedRateLimiter> {
        self.read().keyed_limiter(service, limit).cloned()
    }

    /// Takes in a breaker or limiter that was built elsewhere. To take in the same one again is no error.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Taken`] if the name is in use by another one, even one with an equal config: the states differ.
    pub fn register(&self, handle: impl Into<Registrable>) -> Result<(), RegistryError> {
        // Made and, if refused, dropped outside the lock: both may run the user's code.
        let handle = handle.into();
        self.write().take_in(&handle)
    }

    /// The breaker of that service, if there is one.
    #[must_use]
    pub fn get_circuit_breaker(&self, service: &str) -> Option<CircuitBreaker> {
        self.read().breaker(service).cloned()
    }

    /// The keyed breakers of that service, if there are any.
    #[must_use]
    pub fn get_keyed_circuit_breaker(&self, service: &str) -> Option<KeyedCircuitBreaker> {
        self.read().keyed_breakers(service).cloned()
    }

    /// The limiter of that service whose limit is named `default`, if there is one.
    #[must_use]
    pub fn get_rate_limiter(&self, service: &str) -> Option<RateLimiter> {
        self.get_named_rate_limiter(service, DEFAULT_LIMIT)
    }

    /// The limiter of that service and limit, if there is one.
    #[must_use]
    pub fn get_named_rate_limiter(&self, service: &str, limit: &str) -> Option<RateLimiter> {
        self.read().limiter(service, limit).cloned()
    }

    /// All limiters of that service that are not keyed, by the names of their limits.
    #[must_use]
    pub fn get_rate_limiters(&self, service: &str) -> Vec<RateLimiter> {
        self.entry(service)
            .map_or_else(Vec::new, |entry| entry.limiters.into_values().collect())
    }

    #[cfg(feature = "http")]
    pub(crate) fn has(&self, service: &str) -> bool {
        self.read().services.contains_key(service)
    }

    /// The names of all services, in order.
    #[must_use]
    pub fn services(&self) -> Vec<Name> {
        self.read().services.keys().cloned().collect()
    }

    /// Forgets a service. Whoever holds its breaker or limiters goes on with them, unseen. `false` if there was none.
    pub fn remove(&self, service: &str) -> bool {
        let (removed, listeners) = {
            let mut entries = self.write();
            (entries.services.remove(service), entries.ids())
        };
        if let Some(entry) = &removed {
            for id in listeners {
                entry.remove_listener(id);
            }
        }
        removed.is_some()
    }

    /// Everything there is to see, service by service in the order of names: each breaker and limiter at one moment of its own.
    /// Reading changes nothing.
    #[must_use]
    pub fn status(&self) -> RegistryStatus {
        let services = self.read().services.clone();
        let status = |(name, entry): (Name, Entry)| (name.clone(), entry.status(name));
        RegistryStatus::new(services.into_iter().map(status).collect())
    }

    /// One service's breaker and limiters, if there are any.
    #[must_use]
    pub fn service_status(&self, service: &str) -> Option<ServiceStatus> {
        let (name, entry) = {
            let entries = self.read();
            let (name, entry) = entries.services.get_key_value(service)?;
            (name.clone(), entry.clone())
        };
        Some(entry.status(name))
    }

    /// The breaker of each service that has one, in the order of names. Limits and keyed breakers, which may have very many keys,
    /// are not looked at.
    #[cfg(feature = "http")]
    pub(crate) fn circuits(&self) -> Vec<CircuitBreakerStatus> {
        let services = self.read().services.clone();
        let breakers = services.values().filter_map(|entry| entry.breaker.as_ref());
        breakers.map(CircuitBreaker::status).collect()
    }

    /// The services whose circuit is open, forced ones included, in the order of names.
    #[must_use]
    pub fn open_circuits(&self) -> Vec<Name> {
        let services = self.read().services.clone();
        let open = |entry: &Entry| {
            entry
                .breaker
                .as_ref()
                .is_some_and(|breaker| breaker.state() == State::Open)
        };
        services
            .into_iter()
            .filter(|(_, entry)| open(entry))
            .map(|(name, _)| name)
            .collect()
    }

    /// Every number as a page for a metrics collector: for hosts with an endpoint of their own. See
    /// [`MetricsFormat::content_type`] for the header that goes with it.
    ///
    /// ```
    /// # use portcullis::{CircuitBreakerConfig, MetricsFormat, Registry};
    /// let registry = Registry::new();
    /// registry.circuit_breaker("search", CircuitBreakerConfig::default())?;
    /// let page = registry.metrics_text(MetricsFormat::Prometheus);
    /// assert!(page.contains("circuit_breaker_state{service=\"search\"} 0\n"));
    /// # Ok::<(), portcullis::RegistryError>(())
    /// ```
    #[must_use]
    pub fn metrics_text(&self, format: MetricsFormat) -> String {
        metrics::encode(&self.status(), format)
    }

    /// Calls `listener` on every event of every breaker and limiter here, present and to come; see [`Event`] for how.
    pub fn on_event(&self, listener: impl Fn(&Event) + Send + Sync + 'static) -> ListenerId {
        let listener = Listener::new(listener);
        let id = listener.id;
        self.add_listener(listener);
        id
    }

    /// Removes a listener of this registry; `false` if it is not there.
    pub fn remove_listener(&self, id: ListenerId) -> bool {
        let (removed, services) = {
            let mut entries = self.write();
            let Some(at) = entries.listeners.iter().position(|listener| listener.id == id) else {
                // Perhaps a breaker's own listener, which is not the registry's to remove.
                return false;
            };
            (entries.listeners.remove(at), entries.services.clone())
        };
        for entry in services.values() {
            entry.remove_listener(id);
        }
        // Outside the lock: the last reference to a listener runs its captures' destructors.
        drop(removed);
        true
    }

    /// A queue of all events that holds `capacity` (at least one) and loses the oldest.
    #[must_use = "dropping the queue ends the subscription"]
    pub fn subscribe(&self, capacity: usize) -> Events {
        let (events, listener) = Events::new(capacity);
        self.add_listener(listener);
        events
    }

    fn add_listener(&self, listener: Listener) {
        let mut entries = self.write();
        entries.listeners.retain(|listener| !listener.is_gone());
        for entry in entries.services.values() {
            entry.add_listener(&listener);
        }
        entries.listeners.push(listener);
    }
}

/// The limiter that is there, if it is the one that was asked for.
fn existing_limiter(existing: &RateLimiter, requested: Algorithm) -> Result<RateLimiter, RegistryError> {
    requested.validate()?;
    if existing.matches(&requested) {
        return Ok(existing.clone());
    }
    Err(RegistryError::Conflict {
        service: existing.name().clone(),
        what: the_limit(existing.limit()),
        existing: format!("{:?}", existing.algorithm()),
        requested: format!("{requested:?}"),
    })
}

fn taken(service: &Name, what: String) -> RegistryError {
    RegistryError::Taken {
        service: service.clone(),
        what,
    }
}

impl Entries {
    fn breaker(&self, service: &str) -> Option<&CircuitBreaker> {
        self.services.get(service)?.breaker.as_ref()
    }

    fn keyed_breakers(&self, service: &str) -> Option<&KeyedCircuitBreaker> {
        self.services.get(service)?.keyed_breakers.as_ref()
    }

    fn limiter(&self, service: &str, limit: &str) -> Option<&RateLimiter> {
        self.services.get(service)?.limiters.get(limit)
    }

    fn keyed_limiter(&self, service: &str, limit: &str) -> Option<&KeyedRateLimiter> {
        self.services.get(service)?.keyed_limiters.get(limit)
    }

    fn take_in(&mut self, handle: &Registrable) -> Result<(), RegistryError> {
        match handle {
            Registrable::CircuitBreaker(breaker) => match self.breaker(breaker.name()) {
                Some(existing) if existing.same(breaker) => {}
                Some(existing) => return Err(taken(existing.name(), THE_BREAKER.into())),
                None if self.keyed_breakers(breaker.name()).is_some() => {
                    return Err(taken(breaker.name(), THE_BREAKER.into()));
                }
                None => self.insert_breaker(breaker.clone()),
            },
            Registrable::KeyedCircuitBreaker(breakers) => match self.keyed_breakers(breakers.name()) {
                Some(existing) if existing.same(breakers) => {}
                None if self.breaker(breakers.name()).is_none() => self.insert_keyed_breakers(breakers.clone()),
                _ => return Err(taken(breakers.name(), THE_BREAKER.into())),
            },
            Registrable::RateLimiter(limiter) => match self.limiter(limiter.name(), limiter.limit()) {
                Some(existing) if existing.same(limiter) => {}
                None if self.keyed_limiter(limiter.name(), limiter.limit()).is_none() => {
                    self.insert_limiter(limiter.clone());
                }
                _ => return Err(taken(limiter.name(), the_limit(limiter.limit()))),
            },
            Registrable::KeyedRateLimiter(limiter) => match self.keyed_limiter(limiter.name(), limiter.limit()) {
                Some(existing) if existing.same(limiter) => {}
                None if self.limiter(limiter.name(), limiter.limit()).is_none() => {
                    self.insert_keyed_limiter(limiter.clone());
                }
                _ => return Err(taken(limiter.name(), the_limit(limiter.limit()))),
            },
        }
        Ok(())
    }

    fn insert_breaker(&mut self, breaker: CircuitBreaker) {
        self.listeners
            .iter()
            .for_each(|listener| breaker.add_listener(listener.clone()));
        let name = breaker.name().clone();
        self.services.entry(name).or_default().breaker = Some(breaker);
    }

    fn insert_keyed_breakers(&mut self, breakers: KeyedCircuitBreaker) {
        self.listeners
            .iter()
            .for_each(|listener| breakers.add_listener(listener.clone()));
        let name = breakers.name().clone();
        self.services.entry(name).or_default().keyed_breakers = Some(breakers);
    }

    fn insert_limiter(&mut self, limiter: RateLimiter) {
        self.listeners
            .iter()
            .for_each(|listener| limiter.add_listener(listener.clone()));
        let limiters = &mut self.services.entry(limiter.name().clone()).or_default().limiters;
        limiters.insert(limiter.limit().clone(), limiter);
    }

    fn insert_keyed_limiter(&mut self, limiter: KeyedRateLimiter) {
        self.listeners
            .iter()
            .for_each(|listener| limiter.add_listener(listener.clone()));
        let entry = self.services.entry(limiter.name().clone()).or_default();
        entry.keyed_limiters.insert(limiter.limit().clone(), limiter);
    }

    fn ids(&self) -> Vec<ListenerId> {
        self.listeners.iter().map(|listener| listener.id).collect()
    }
}

impl Entry {
    fn add_listener(&self, listener: &Listener) {
        self.breaker
            .iter()
            .for_each(|breaker| breaker.add_listener(listener.clone()));
        self.keyed_breakers
            .iter()
            .for_each(|breakers| breakers.add_listener(listener.clone()));
        self.limiters
            .values()
            .for_each(|limiter| limiter.add_listener(listener.clone()));
        self.keyed_limiters
            .values()
            .for_each(|limiter| limiter.add_listener(listener.clone()));
    }

    fn remove_listener(&self, id: ListenerId) {
        if let Some(breaker) = &self.breaker {
            breaker.remove_listener(id);
        }
        if let Some(breakers) = &self.keyed_breakers {
            breakers.remove_listener(id);
        }
        for limiter in self.limiters.values() {
            limiter.remove_listener(id);
        }
        for limiter in self.keyed_limiters.values() {
            limiter.remove_listener(id);
        }
    }

    /// By name, keyed or not.
    fn limiters(&self) -> Vec<RateLimiterStatus> {
        let plain = self.limiters.values().map(RateLimiter::status);
        let keyed = self.keyed_limiters.values().map(KeyedRateLimiter::status);
        let mut all: Vec<_> = plain.chain(keyed).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn status(&self, service: Name) -> ServiceStatus {
        ServiceStatus {
            service,
            circuit_breaker: self.breaker.as_ref().map(CircuitBreaker::status),
            circuit_breakers: self.keyed_breakers.as_ref().map(KeyedCircuitBreaker::status),
            rate_limiters: self.limiters(),
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("services", &self.services())
            .finish_non_exhaustive()
    }
}
