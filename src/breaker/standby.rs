//! Who waits for a breaker to admit again.
//!
//! Whoever changes the machine so that it admits sooner than it would have wakes all that wait, and takes them off the list:
//! they look, and those who find no room come back. That time passes changes nothing, so each brings a timer of its own.

use super::{CircuitBreaker, Core, Reservation};
use crate::{
    clock::{Reading, Sleep},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering, fence},
    },
};
use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, LazyLock, PoisonError},
    task::{Context, Wake, Waker},
};

/// The waker of who asks and will not wait.
///
/// Not `Waker::noop`: that is known by its functions alone, and those may have another address in each place that names it.
pub(crate) fn nobody() -> &'static Waker {
    struct Nobody;
    impl Wake for Nobody {
        fn wake(self: Arc<Self>) {}
    }
    static NOBODY: LazyLock<Waker> = LazyLock::new(|| Arc::new(Nobody).into());
    &NOBODY
}

#[derive(Default)]
pub(super) struct Waiters {
    /// How many wait, so that who finds nobody takes no lock. Written under the lock.
    waiting: AtomicUsize,
    wakers: Mutex<Wakers>,
}

#[derive(Default)]
struct Wakers {
    by_number: BTreeMap<u64, Waker>,
    last: u64,
}

impl Waiters {
    /// Adds a waiter; its number. It must look once more after this: pairs with [`wake`](Self::wake), of which either the look
    /// sees the change or the change sees the waiter.
    fn join(&self, waker: Waker) -> u64 {
        let mut wakers = self.lock();
        wakers.last += 1;
        let number = wakers.last;
        wakers.by_number.insert(number, waker);
        self.waiting.store(wakers.by_number.len(), Ordering::Relaxed);
        drop(wakers);
        fence(Ordering::SeqCst);
        number
    }

    fn leave(&self, number: u64) {
        let mut wakers = self.lock();
        let waker = wakers.by_number.remove(&number);
        self.waiting.store(wakers.by_number.len(), Ordering::Relaxed);
        drop(wakers);
        // Outside the lock: the last waker of a task drops its future, which may wait here as well.
        drop(waker);
    }

    /// Wakes all. The caller has published what they wait for.
    pub(super) fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut wakers = self.lock();
        let woken = std::mem::take(&mut wakers.by_number);
        self.waiting.store(0, Ordering::Relaxed);
        drop(wakers);
        woken.into_values().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, Wakers> {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among those who wait. Dropped, it is left.
struct Place {
    breaker: CircuitBreaker,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.breaker.shared.waiters.leave(self.number);
    }
}

/// What a service holds that is ready when its circuit admits: a probe's slot if there is one to hold, or a place among those
/// who wait for it. Dropped, either is given back.
#[derive(Default)]
#[must_use = "a slot or a place that is dropped is given back"]
pub struct Standby {
    reservation: Reservation,
    wait: Option<Wait>,
}

impl Standby {
    fn ready(reservation: Reservation) -> Self {
        Self {
            reservation,
            wait: None,
        }
    }

    pub(crate) fn reservation(&self) -> &Reservation {
        &self.reservation
    }

    pub(crate) fn into_reservation(self) -> Reservation {
        self.reservation
    }
}

impl fmt::Debug for Standby {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standby")
            .field("reservation", &self.reservation)
            .field("waiting", &self.wait.is_some())
            .finish()
    }
}

/// Held for its drop.
struct Wait {
    _place: Place,
    /// Boxed: a readied service may be moved, and few wait.
    _timer: Option<Pin<Box<Sleep>>>,
}

impl CircuitBreaker {
    /// Keeps or takes what a readied service needs; as an error, what it holds while it waits to be woken.
    pub(crate) fn stand_by(
        &self,
        held: Option<Standby>,
        now: &Reading,
        cx: &mut Context<'_>,
    ) -> Result<Standby, Standby> {
        let Standby { reservation, wait } = held.unwrap_or_default();
        // Off the list while it looks: what it finds is no news to itself.
        drop(wait);
        if let Ok(reservation) = self.reserve(Some(reservation), now) {
            return Ok(Standby::ready(reservation));
        }
        // Called without having been asked whether it is ready: there is nobody to wake.
        if cx.waker().data() == nobody().data() {
            return Err(Standby::default());
        }
        self.wait(cx)
    }

    /// Joins those who wait and looks once more; again when its timer says so, which may be at once.
    ///
    /// The timer is set anew at each look: the service may have come from another runtime, whose timers nobody drives.
    fn wait(&self, cx: &mut Context<'_>) -> Result<Standby, Standby> {
        let core: &Core = &self.shared;
        let place = Place {
            number: core.waiters.join(cx.waker().clone()),
            breaker: self.clone(),
        };
        loop {
            let now = Reading::new();
            let refused = match self.reserve(None, &now) {
                Ok(reservation) => return Ok(Standby::ready(reservation)),
                Err(why) => why,
            };
            let mut timer = refused.retry_after.map(|wait| {
                let due = now.at(&core.clock).saturating_add(wait);
                Box::pin(core.clock.sleep_until(due))
            });
            // It rings at once if the time has come, or is too far for it.
            let rings = timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready());
            if !rings {
                return Err(Standby {
                    reservation: Reservation::default(),
                    wait: Some(Wait {
                        _place: place,
                        _timer: timer,
                    }),
                });
            }
        }
    }
}

#[cfg(all(test, portcullis_loom))]
mod model;
