use crate::{
    clock::Timestamp,
    name::Name,
    rejected::{Reason, Rejected},
    state::{Override, State},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Something that happened to a breaker or a limiter.
///
/// Listeners are registered with `on_event` on a [`CircuitBreaker`](crate::CircuitBreaker), a
/// [`RateLimiter`](crate::RateLimiter) or a whole [`Registry`](crate::Registry). They run inline, on the thread on which it
/// happened, after the state has changed and outside every lock: one that blocks holds up its own caller and nobody else; one
/// that panics is caught, and the others still run. Two threads may deliver their events in either order; the generation
/// tells which came first. For work that takes time there is `subscribe`, a bounded queue.
///
/// ```
/// use portcullis::{CircuitBreaker, EventKind, Outcome, State};
/// use std::sync::{Arc, Mutex};
///
/// let breaker = CircuitBreaker::builder("search").failure_threshold(1).build()?;
/// let seen = Arc::new(Mutex::new(Vec::new()));
/// breaker.on_event({
///     let seen = seen.clone();
///     move |event| {
///         if let EventKind::Transition { from, to, .. } = event.kind {
///             seen.lock().unwrap().push((from, to));
///         }
///     }
/// });
/// breaker.try_acquire()?.settle(Outcome::Failure);
/// assert_eq!(*seen.lock().unwrap(), [(State::Closed, State::Open)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// The service it happened to.
    pub service: Name,
    /// The rate limit it happened to; `None` for the circuit breaker.
    pub limit: Option<Name>,
    /// When, on the clock of the breaker or limiter. A transition that became due earlier than it was noticed carries the due
    /// instant.
    pub at: Timestamp,
    /// What.
    pub kind: EventKind,
}

/// What happened.
///
/// ```
/// # use portcullis::{CircuitBreaker, EventKind};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let mut events = breaker.subscribe(8);
/// breaker.force_open();
/// assert!(matches!(events.try_recv().unwrap().kind, EventKind::Overridden { .. }));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// The circuit moved by itself.
    Transition {
        /// The state it left.
        from: State,
        /// The state it entered.
        to: State,
        /// The generation that began with it.
        generation: u64,
    },
    /// A call was rejected.
    Rejected(Rejected),
    /// An operator forced the circuit.
    Overridden {
        /// Into what.
        into: Override,
        /// The generation that began with it.
        generation: u64,
    },
    /// An operator reset the circuit: it is closed, its windows empty. Or a set of breakers forgot a key whose circuit was open or
    /// half-open and whose failures were old.
    Reset {
        /// The generation that began with it.
        generation: u64,
    },
    /// The circuit was given another config.
    Reconfigured {
        /// The generation that began with it.
        generation: u64,
    },
    /// An adaptive limiter moved its rate.
    RateChanged {
        /// Requests per window before.
        from: f64,
        /// Requests per window from now on.
        to: f64,
    },
}

/// Names a listener, to remove it with `remove_listener`.
///
/// ```
/// # use portcullis::CircuitBreaker;
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let id = breaker.on_event(|event| println!("{event:?}"));
/// assert!(breaker.remove_listener(id));
/// assert!(!breaker.remove_listener(id), "it is gone");
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ListenerId(u64);

/// Hears events: a closure, or the sending end of a queue.
pub(crate) trait Listen: Send + Sync {
    fn hear(&self, event: &Event);
    /// Nobody reads what it hears any more.
    fn gone(&self) -> bool {
        false
    }
}

impl<F: Fn(&Event) + Send + Sync> Listen for F {
    fn hear(&self, event: &Event) {
        self(event);
    }
}

#[derive(Clone)]
pub(crate) struct Listener {
    pub(crate) id: ListenerId,
    listen: Arc<dyn Listen>,
}

impl Listener {
    pub(crate) fn new(listen: impl Listen + 'static) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: ListenerId(NEXT.fetch_add(1, Ordering::Relaxed)),
            listen: Arc::new(listen),
        }
    }

    /// Whether nobody hears it any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.listen.gone()
    }
}

/// The listeners of one breaker or limiter.
#[derive(Default)]
pub(crate) struct Hub {
    /// How many there are, so that nobody pays for events that nobody hears.
    count: AtomicUsize,
    listeners: RwLock<Arc<[Listener]>>,
}

impl Hub {
    pub(crate) fn on_event(&self, listener: impl Fn(&Event) + Send + Sync + 'static) -> ListenerId {
        let listener = Listener::new(listener);
        let id = listener.id;
        self.add(listener);
        id
    }

    pub(crate) fn add(&self, listener: Listener) {
        self.change(|listeners| listeners.push(listener));
    }

    /// Whether it was there.
    pub(crate) fn remove(&self, id: ListenerId) -> bool {
        let mut found = false;
        self.change(|listeners| {
            listeners.retain(|listener| {
                found |= listener.id == id;
                listener.id != id
            });
        });
        found
    }

    fn change(&self, edit: impl FnOnce(&mut Vec<Listener>)) {
        let mut shared = self.listeners.write().unwrap_or_else(PoisonError::into_inner);
        let mut listeners = shared.to_vec();
        edit(&mut listeners);
        listeners.retain(|listener| !listener.is_gone());
        self.count.store(listeners.len(), Ordering::Release);
        let before = std::mem::replace(&mut *shared, listeners.into());
        drop(shared);
        // Outside the lock: the last reference to a listener runs its captures' destructors.
        drop(before);
    }

    /// Tells every listener of a rejection.
    #[inline]
    pub(crate) fn rejected(&self, why: &Rejected, at: impl FnOnce() -> Timestamp) {
        trace_rejection(&why.service, why.limit.as_ref(), why.reason, why.retry_after);
        if self.is_heard() {
            self.tell_rejection(why, at());
        }
    }

    /// The same for listeners that are no subscriber to `tracing`. Apart, so that no rejection carries this along where nobody
    /// listens.
    #[cold]
    #[inline(never)]
    pub(crate) fn tell_rejection(&self, why: &Rejected, at: Timestamp) {
        self.tell(&Event {
            service: why.service.clone(),
            limit: why.limit.clone(),
            at,
            kind: EventKind::Rejected(why.clone()),
        });
    }

    /// Tells every listener of anything but a rejection. `event` is made only if there is somebody to tell.
    pub(crate) fn emit(&self, event: impl FnOnce() -> Event) {
        if cfg!(feature = "tracing") || self.is_heard() {
            let event = event();
            #[cfg(feature = "tracing")]
            trace(&event);
            self.tell(&event);
        }
    }

    #[inline]
    pub(crate) fn is_heard(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    #[cold]
    fn tell(&self, event: &Event) {
        let listeners = self.listeners.read().unwrap_or_else(PoisonError::into_inner).clone();
        for listener in &*listeners {
            // A listener's panic is its own affair: the caller asked for a permit, not for its bookkeeping.
            let heard = catch_unwind(AssertUnwindSafe(|| listener.listen.hear(event)));
            if let Err(payload) = heard {
                // What it panicked with may panic when dropped.
                let dropped = catch_unwind(AssertUnwindSafe(|| drop(payload)));
                std::mem::forget(dropped);
            }
        }
        if listeners.iter().any(Listener::is_gone) {
            self.change(|_| ());
        }
    }
}

/// Apart from the others, because it is told often: where nobody listens, no event is made for it, and not even a rejection.
#[inline]
pub(crate) fn trace_rejection(service: &Name, limit: Option<&Name>, reason: Reason, retry_after: Option<Duration>) {
    #[cfg(feature = "tracing")]
    trace_rejected(service, limit, reason.as_str(), retry_after);
    #[cfg(not(feature = "tracing"))]
    let _ = (service, limit, reason, retry_after);
}

#[cfg(feature = "tracing")]
#[inline(never)]
fn trace_rejected(service: &Name, limit: Option<&Name>, reason: &'static str, retry_after: Option<Duration>) {
    tracing::debug!(
        service = service.as_str(),
        limit = limit.map(Name::as_str),
        reason,
        retry_after = retry_after.map(|wait| wait.as_secs_f64()),
        "rejected"
    );
}

#[cfg(feature = "tracing")]
fn trace(event: &Event) {
    let Event {
        service, limit, kind, ..
    } = event;
    let limit = limit.as_deref();
    match kind {
        EventKind::Transition { from, to, generation } => {
            let (from, to) = (from.as_str(), to.as_str());
            if to == State::Open.as_str() {
                tracing::warn!(
                    service = service.as_str(),
                    from,
                    to,
                    generation,
                    "circuit breaker transition"
                );
            } else {
                tracing::info!(
                    service = service.as_str(),
                    from,
                    to,
                    generation,
                    "circuit breaker transition"
                );
            }
        }
        EventKind::Rejected(why) => trace_rejection(&why.service, why.limit.as_ref(), why.reason, why.retry_after),
        EventKind::Overridden { into, generation } => {
            tracing::warn!(
                service = service.as_str(),
                into = into.as_str(),
                generation,
                "circuit breaker overridden"
            );
        }
        EventKind::Reset { generation } => {
            tracing::warn!(service = service.as_str(), generation, "circuit breaker reset");
        }
        EventKind::Reconfigured { generation } => {
            tracing::info!(service = service.as_str(), generation, "circuit breaker reconfigured");
        }
        EventKind::RateChanged { from, to } => {
            tracing::info!(service = service.as_str(), limit, from, to, "rate limit moved");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::Clock, subscribe::Events};

    fn event() -> Event {
        Event {
            service: Name::new("name", "search").unwrap(),
            limit: None,
            at: Clock::manual().now(),
            kind: EventKind::Reset { generation: 1 },
        }
    }

    /// Not to be seen from outside, where it would only cost memory and time.
    #[test]
    fn a_hub_forgets_a_queue_that_nobody_reads() {
        let hub = Hub::default();
        let count = || hub.count.load(Ordering::Acquire);
        let (kept, listener) = Events::new(1);
        hub.add(listener);
        for _ in 0..3 {
            let (dropped, listener) = Events::new(1);
            hub.add(listener);
            drop(dropped);
        }
        assert_eq!(count(), 2, "each subscription sweeps out those that ended before it");
        hub.emit(event);
        assert_eq!(count(), 1, "and so does each event");
        drop(kept);
        hub.emit(event);
        assert_eq!(count(), 0, "nobody is left to hear");
    }
}
