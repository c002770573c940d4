//! The queue behind `subscribe`: a listener that only takes notes.

use crate::event::{Event, Hub, Listen, Listener};
use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
};

/// A bounded queue of events: a slow reader loses the oldest ones, and is told how many. Dropping it ends the subscription.
///
/// ```
/// # use portcullis::CircuitBreaker;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::ConfigError> {
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let mut events = breaker.subscribe(2);
/// for _ in 0..3 {
///     breaker.reset();
/// }
/// assert!(events.recv().await.is_some());
/// assert!(events.try_recv().is_some());
/// assert!(events.try_recv().is_none());
/// assert_eq!(events.lost(), 1);
/// # Ok(()) }
/// ```
#[must_use = "dropping the queue ends the subscription"]
pub struct Events {
    queue: Arc<Queue>,
}

struct Queue {
    capacity: usize,
    state: Mutex<QueueState>,
}

#[derive(Default)]
struct QueueState {
    events: VecDeque<Event>,
    lost: u64,
    waker: Option<Waker>,
    /// No source is left.
    ended: bool,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending half: the queue ends when the last hub drops it.
struct Sender(Weak<Queue>);

impl Sender {
    fn change(&self, edit: impl FnOnce(&mut QueueState, usize)) {
        let Some(queue) = self.0.upgrade() else {
            return;
        };
        let waker = {
            let mut state = queue.state();
            edit(&mut state, queue.capacity);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Listen for Sender {
    fn hear(&self, event: &Event) {
        self.change(|state, capacity| {
            if state.events.len() == capacity {
                state.events.pop_front();
                state.lost += 1;
            }
            state.events.push_back(event.clone());
        });
    }
    fn gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.change(|state, _| state.ended = true);
    }
}

impl Hub {
    pub(crate) fn subscribe(&self, capacity: usize) -> Events {
        let (events, listener) = Events::new(capacity);
        self.add(listener);
        events
    }
}

impl Events {
    /// A queue and the listener that fills it. A capacity of zero holds one.
    pub(crate) fn new(capacity: usize) -> (Self, Listener) {
        let queue = Arc::new(Queue {
            capacity: capacity.max(1),
            state: Mutex::default(),
        });
        let listener = Listener::new(Sender(Arc::downgrade(&queue)));
        (Self { queue }, listener)
    }

    /// The oldest event in the queue, if there is one.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.queue.state().events.pop_front()
    }

    /// Waits for the next event; `None` once everything that could send one is gone. Cancel-safe: dropping the future loses
    /// no event.
    pub async fn recv(&mut self) -> Option<Event> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// [`recv`](Self::recv) for hand-written futures and streams.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut state = self.queue.state();
        match state.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if state.ended => Poll::Ready(None),
            None => {
                let replaced = state.waker.replace(cx.waker().clone());
                drop(state);
                // Outside the lock: the last waker of a task drops its future, and what that holds may have events to tell.
                drop(replaced);
                Poll::Pending
            }
        }
    }

    /// How many events were dropped because the queue was full.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.queue.state().lost
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.queue.state();
        f.debug_struct("Events")
            .field("queued", &state.events.len())
            .field("lost", &state.lost)
            .finish_non_exhaustive()
    }
}
