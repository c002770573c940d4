//! Counters that threads do not fight over, and shared state without a shared reference count.
//!
//! One cache line that two cores write costs more than everything else on the admit path. So every handle owns as many
//! *stripes* as the machine has cores; a thread always uses the same one. A stripe holds its own counters and its own
//! reference to the shared core, and a permit holds its thread's stripe: taking and settling a permit touches no line that
//! another core writes.

use std::{
    cell::Cell,
    ops::Deref,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

/// Above this many cores, threads share stripes: reading a status walks all of them, and each costs 256 bytes.
const MOST_STRIPES: usize = 64;

/// One thread's share of a `Striped`. The alignment keeps neighbours (and the line that a prefetcher pulls along) apart.
#[repr(align(128))]
pub(crate) struct Stripe<T, const N: usize> {
    core: Arc<T>,
    counts: [AtomicU64; N],
}

impl<T, const N: usize> Stripe<T, N> {
    /// Adds to one of the counters. `Relaxed`: a counter orders nothing, and a reader that joined the writing threads sees
    /// their sums.
    pub(crate) fn add(&self, counter: usize, n: u64) {
        self.counts[counter].fetch_add(n, Ordering::Relaxed);
    }
}

impl<T, const N: usize> Deref for Stripe<T, N> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.core
    }
}

/// A core of type `T` shared by every clone, with `N` striped counters.
pub(crate) struct Striped<T, const N: usize>(Arc<[Arc<Stripe<T, N>>]>);

impl<T, const N: usize> Striped<T, N> {
    pub(crate) fn new(core: T) -> Self {
        let core = Arc::new(core);
        let stripe = || Stripe {
            core: core.clone(),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
        };
        Self((0..stripes()).map(|_| Arc::new(stripe())).collect())
    }

    /// The same with one stripe for all threads: for many cores of which each is used little.
    pub(crate) fn single(core: T) -> Self {
        let stripe = Stripe {
            core: Arc::new(core),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
        };
        Self(Arc::new([Arc::new(stripe)]))
    }

    /// Whether nobody else holds this handle or one of its stripes.
    pub(crate) fn is_sole(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some_and(|stripes| stripes.iter_mut().all(|stripe| Arc::get_mut(stripe).is_some()))
    }

    /// The calling thread's stripe.
    pub(crate) fn local(&self) -> &Arc<Stripe<T, N>> {
        // The number of stripes is a power of two.
        &self.0[thread_index() & (self.0.len() - 1)]
    }

    /// The sum of one counter over all stripes. It never falls between two calls.
    pub(crate) fn sum(&self, counter: usize) -> u64 {
        self.0
            .iter()
            .map(|stripe| stripe.counts[counter].load(Ordering::Relaxed))
            .sum()
    }

    /// Whether both are handles of one state.
    pub(crate) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T, const N: usize> Clone for Striped<T, N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T, const N: usize> Deref for Striped<T, N> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0[0].core
    }
}

fn stripes() -> usize {
    // Asking the system reads files on Linux; the answer does not change.
    static STRIPES: OnceLock<usize> = OnceLock::new();
    *STRIPES.get_or_init(|| {
        thread::available_parallelism()
            .map_or(1, usize::from)
            .next_power_of_two()
            .min(MOST_STRIPES)
    })
}

fn thread_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    const UNSET: usize = usize::MAX;
    thread_local! {
        static INDEX: Cell<usize> = const { Cell::new(UNSET) };
    }
    // A permit may be dropped by another thread-local's destructor, when this one is gone: any stripe will do then.
    INDEX
        .try_with(|index| {
            if index.get() == UNSET {
                index.set(NEXT.fetch_add(1, Ordering::Relaxed) % MOST_STRIPES);
            }
            index.get()
        })
        .unwrap_or(0)
}
