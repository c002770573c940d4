//! Who waits for a limiter, in order of arrival.
//!
//! Nobody is in charge of the queue: whoever comes by with the time (a waiter whose timer fired, a caller that tries) serves it
//! from the front as far as the limiter admits, under one mutex. Served waiters find their admission laid out for them. So one
//! tick of the timer serves all that are due, and a waiter that is woken and not polled holds up nobody, but that a sliding
//! window counts its admission from when others served it.

use super::algorithm::Admission;
use crate::{
    clock::Timestamp,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering, fence},
    },
};
use std::{collections::BTreeMap, sync::PoisonError, task::Waker};

#[derive(Debug, Default)]
pub(super) struct Queue {
    /// How many wait, so that a caller who finds nobody takes no lock. Written under the lock, with Release; loads are Acquire, so
    /// who finds nobody because all were served finds their admissions taken.
    waiting: AtomicUsize,
    waiters: Mutex<Waiters>,
}

#[derive(Debug, Default)]
pub(super) struct Waiters {
    /// By number of arrival.
    waiting: BTreeMap<u64, Waiter>,
    /// Served, and not yet back to fetch it.
    served: BTreeMap<u64, Admission>,
    arrivals: u64,
    /// The cost of all that wait.
    cost: u64,
    /// The cost of all that were ever served from the queue.
    served_cost: u64,
}

#[derive(Debug)]
struct Waiter {
    cost: u32,
    /// What will have been served once this waiter is, if nobody before it gives up.
    ticket: u64,
    waker: Waker,
}

/// What a waiter finds when it looks.
pub(super) enum Turn {
    Served(Admission),
    /// Still waiting, behind at most so much cost, its own included.
    Waiting(u64),
}

impl Queue {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// The cost of all that wait.
    pub(super) fn cost(&self) -> u64 {
        if self.is_empty() { 0 } else { self.lock().cost }
    }

    /// Announces that somebody is about to wait. Whoever joins an empty queue asks the limiter once more after this: somebody who
    /// gave something back and then found nobody waiting came before, and what it gave is seen. The two fences pair: this one
    /// between the count and the limiter's look, the giver's between what it gave and its look at the count.
    pub(super) fn announce(&self, _: &mut Waiters) {
        self.waiting.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Whether nobody waits for what the caller has just given back; pairs with [`announce`](Self::announce).
    pub(super) fn is_empty_after_giving(&self) -> bool {
        fence(Ordering::SeqCst);
        self.is_empty()
    }

    /// Serves the queue from the front with `take`, then runs `step` on it; wakes the served, and a new front, outside the lock.
    pub(super) fn serve<T>(
        &self,
        mut take: impl FnMut(u32) -> Result<Admission, Timestamp>,
        step: impl FnOnce(&mut Waiters) -> T,
    ) -> T {
        let mut wakers = Vec::new();
        let mut waiters = self.lock();
        let front = waiters.front();
        while let Some(entry) = waiters.waiting.first_entry() {
            let Ok(admission) = take(entry.get().cost) else {
                break;
            };
            let (number, waiter) = entry.remove_entry();
            waiters.cost -= u64::from(waiter.cost);
            waiters.served_cost += u64::from(waiter.cost);
            waiters.served.insert(number, admission);
            wakers.push(waiter.waker);
        }
        let done = step(&mut waiters);
        // A new front sets its timer anew: those before it may have left early.
        if front.is_some()
            && waiters.front() != front
            && let Some(waiter) = waiters.waiting.values().next()
        {
            wakers.push(waiter.waker.clone());
        }
        self.waiting.store(waiters.waiting.len(), Ordering::Release);
        drop(waiters);
        wakers.into_iter().for_each(Waker::wake);
        done
    }

    /// Takes a waiter out: its admission, if it was served and did not fetch it, and whether all others have moved up.
    pub(super) fn leave(&self, number: u64) -> (Option<Admission>, bool) {
        let mut waiters = self.lock();
        let was_front = waiters.front() == Some(number);
        let waiter = waiters.waiting.remove(&number);
        if let Some(waiter) = &waiter {
            waiters.cost -= u64::from(waiter.cost);
        }
        self.waiting.store(waiters.waiting.len(), Ordering::Release);
        let served = waiters.served.remove(&number);
        drop(waiters);
        // Outside the lock: the last waker of a task drops its future, which may wait here as well.
        drop(waiter);
        (served, was_front)
    }

    /// Has the front look at the clock again: what it waits for may come earlier now.
    pub(super) fn wake_front(&self) {
        if self.is_empty() {
            return;
        }
        let waker = self.lock().waiting.values().next().map(|waiter| waiter.waker.clone());
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiters> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiters {
    fn front(&self) -> Option<u64> {
        self.waiting.keys().next().copied()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The cost of all that wait.
    pub(super) fn cost(&self) -> u64 {
        self.cost
    }

    /// The costs of those who wait, in order.
    pub(super) fn costs(&self) -> impl Iterator<Item = u32> {
        self.waiting.values().map(|waiter| waiter.cost)
    }

    /// Adds a waiter at the end; its number.
    pub(super) fn join(&mut self, cost: u32, waker: Waker) -> u64 {
        self.arrivals += 1;
        self.cost += u64::from(cost);
        let waiter = Waiter {
            cost,
            ticket: self.served_cost + self.cost,
            waker,
        };
        self.waiting.insert(self.arrivals, waiter);
        self.arrivals
    }

    /// A waiter's turn; if it has not come, the waiter is woken through `waker` from now on. The waker that this replaces is to
    /// be dropped outside the lock.
    pub(super) fn turn(&mut self, number: u64, waker: &Waker) -> (Turn, Option<Waker>) {
        if let Some(admission) = self.served.remove(&number) {
            return (Turn::Served(admission), None);
        }
        let front = self.front();
        let served = self.served_cost;
        match self.waiting.get_mut(&number) {
            Some(waiter) => {
                let replaced =
                    (!waiter.waker.will_wake(waker)).then(|| std::mem::replace(&mut waiter.waker, waker.clone()));
                // Those who gave up in between leave the ticket too high; at the front the own cost is all there is.
                let before = if front == Some(number) {
                    waiter.cost.into()
                } else {
                    waiter.ticket.saturating_sub(served)
                };
                (Turn::Waiting(before), replaced)
            }
            None => unreachable!("a waiter leaves by its own hand"),
        }
    }
}
