//! What the protocols made by hand are made of: the standard library's locks and atomics, and in a model [loom]'s, so that the
//! very code is modelled and not a copy of it.
//!
//! A model is a unit test in a module named `model`, beside the atomics that it proves. It runs with the flag
//! `--cfg portcullis_loom` (`tests/loom` gives it): not with `loom`, which other crates take for theirs. loom then runs the
//! test once for each order in which its threads may step, and for each value that a load may see by the rules of memory.
//!
//! What loom does not show: a load that sees a store which comes later in the order of steps, and an exchange that fails for no
//! reason. An ordering of `SeqCst` on a load or a store it takes for `AcqRel` (its fences are whole), which may raise false alarms
//! but hides nothing; so may a store beside an exchange, since it lets the store come between the two halves of the exchange.
//!
//! [loom]: https://docs.rs/loom

#[cfg(not(all(test, portcullis_loom)))]
mod parts {
    pub(crate) use std::sync::{Arc, Mutex, MutexGuard, OnceLock, atomic};

    /// A static. In a model, which has no other constants either, each run has its own.
    macro_rules! global {
        (static $name:ident: $type:ty = $value:expr;) => {
            static $name: $type = $value;
        };
    }

    /// A function that is `const`, but for models.
    macro_rules! constant {
        (fn $name:ident() -> $type:ty $body:block) => {
            const fn $name() -> $type $body
        };
    }

    /// An array of this value, anew for each place.
    macro_rules! array {
        ($value:expr; $length:expr) => {
            [const { $value }; $length]
        };
    }

    /// Something of each thread.
    macro_rules! local {
        (static $name:ident: $type:ty = $value:expr;) => {
            thread_local! { static $name: $type = const { $value }; }
        };
    }

    pub(crate) use {array, constant, global, local};
}

#[cfg(all(test, portcullis_loom))]
mod parts {
    pub(crate) use loom::sync::{Arc, Mutex, MutexGuard};

    /// loom's atomics, with a step more for each load.
    ///
    /// loom 0.7 looks for another order only where a step depends on the very last one on the same atomic. A thread that loads and
    /// then stores (or exchanges) hides with its own load the load that another thread made before, and loom never tries the
    /// store before that. So a load here first touches a twin, in a way that depends on all others and orders nothing.
    pub(crate) mod atomic {
        pub(crate) use loom::sync::atomic::{Ordering, fence};

        macro_rules! with_a_twin {
            ($name:ident, $type:ty) => {
                #[derive(Debug, Default)]
                pub(crate) struct $name {
                    real: loom::sync::atomic::$name,
                    twin: loom::sync::atomic::AtomicBool,
                }

                impl $name {
                    #[allow(dead_code, reason = "not every type is made by hand")]
                    pub(crate) fn new(value: $type) -> Self {
                        Self {
                            real: loom::sync::atomic::$name::new(value),
                            ..Self::default()
                        }
                    }

                    pub(crate) fn load(&self, order: Ordering) -> $type {
                        self.twin.fetch_or(false, Ordering::Relaxed);
                        self.real.load(order)
                    }
                }

                impl std::ops::Deref for $name {
                    type Target = loom::sync::atomic::$name;
                    fn deref(&self) -> &Self::Target {
                        &self.real
                    }
                }
            };
        }

        with_a_twin!(AtomicBool, bool);
        with_a_twin!(AtomicU32, u32);
        with_a_twin!(AtomicU64, u64);
        with_a_twin!(AtomicUsize, usize);
    }

    /// What is made once, by one who holds a lock: loom has no such thing.
    #[derive(Debug)]
    pub(crate) struct OnceLock<T> {
        made: atomic::AtomicBool,
        value: std::sync::OnceLock<T>,
    }

    impl<T> OnceLock<T> {
        pub(crate) fn new() -> Self {
            Self {
                made: atomic::AtomicBool::new(false),
                value: std::sync::OnceLock::new(),
            }
        }

        pub(crate) fn get(&self) -> Option<&T> {
            let made = self.made.load(atomic::Ordering::Acquire);
            made.then(|| self.value.get()).flatten()
        }

        pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
            self.get().unwrap_or_else(|| {
                let value = self.value.get_or_init(make);
                self.made.store(true, atomic::Ordering::Release);
                value
            })
        }
    }

    macro_rules! global {
        (static $name:ident: $type:ty = $value:expr;) => {
            loom::lazy_static! { static ref $name: $type = $value; }
        };
    }

    macro_rules! constant {
        (fn $name:ident() -> $type:ty $body:block) => {
            fn $name() -> $type $body
        };
    }

    macro_rules! array {
        ($value:expr; $length:expr) => {
            std::array::from_fn::<_, { $length }, _>(|_| $value)
        };
    }

    macro_rules! local {
        (static $name:ident: $type:ty = $value:expr;) => {
            loom::thread_local! { static $name: $type = $value; }
        };
    }

    pub(crate) use {array, constant, global, local};

    /// Starts a thread of a model.
    pub(crate) fn spawn<T: 'static>(run: impl FnOnce() -> T + 'static) -> loom::thread::JoinHandle<T> {
        loom::thread::spawn(move || {
            let done = run();
            crate::stripe::model::end_thread();
            done
        })
    }

    /// What a waker of a model rings. Not loom's: whether a bell was rung is asked when all threads have ended.
    #[derive(Default)]
    pub(crate) struct Bell(std::sync::atomic::AtomicBool);

    impl Bell {
        pub(crate) fn new() -> (std::sync::Arc<Self>, std::task::Waker) {
            let bell = std::sync::Arc::<Self>::default();
            (bell.clone(), bell.into())
        }

        /// Whether it was rung since it was last asked.
        pub(crate) fn rang(&self) -> bool {
            self.0.swap(false, atomic::Ordering::SeqCst)
        }
    }

    impl std::task::Wake for Bell {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.store(true, atomic::Ordering::SeqCst);
        }
    }

    /// Runs `model` in every order with at most so many preemptions (switches away from a thread that could go on, at other
    /// points than its end), and says how many that were. Few faults need more than two (Musuvathi and Qadeer, 2007).
    pub(crate) fn explore(name: &str, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
        use std::sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        };
        let runs = Arc::new(AtomicU64::new(0));
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
        builder.max_branches = 10_000;
        let count = runs.clone();
        builder.check(move || {
            count.fetch_add(1, Ordering::Relaxed);
            model();
            crate::stripe::model::end_thread();
        });
        println!("{name}: {} runs", runs.load(Ordering::Relaxed));
    }
}

pub(crate) use parts::*;
