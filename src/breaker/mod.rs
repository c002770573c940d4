//! The circuit breaker: a handle that many clones share, and the permits it hands out.
//!
//! # How it is kept fast and right
//!
//! The truth is a sequential [`Machine`] behind a mutex, where the breaker's seat is. What the hot paths need of it is published, by whoever holds the mutex,
//! in one packed *word* that only changes when the machine does; a healthy call reads it twice and writes nothing shared.
//!
//! ```text
//! bits  0..3   mode: how to admit
//! bit   3      refusing: every acquire before `until` is refused
//! bit   4      clean: a quick success in this generation would change nothing
//! bit   5      timed: calls longer than `slow` are slow, so a permit notes when it began
//! bit   6      half-open: what a refusing word refuses for
//! bit   7      counted: a quick success in this generation need only be counted
//! bit   8      within: and that only from `since` on and before `until`
//! bits  9..11  clock: the system's, the fast one, or (zero) one of the user's; always the same in one breaker
//! bit   11     seated: the breaker has a seat; always the same in one breaker, as is its number
//! bits 12..20  seat
//! bits 20..64  generation
//! ```
//!
//! Only [`publish`] and, for the bits of quick successes, [`publish_quick`] write the word, `until` and `since`, and their caller holds the
//! machine. The former stores `BUSY`, then those two with
//! Release, which takes `BUSY` along, then the new word with Release, which takes them and `slow` along. Readers load the word,
//! those two and the word again, each with Acquire: one that saw a newer `until` or `since` sees at least `BUSY` in its second look,
//! and asks the machine; one that saw the newer word sees what belongs to it. A word may come again within its generation; what was
//! seen then belongs to the later one.
//!
//! # Why most successes need no lock
//!
//! A success cannot trip a circuit whose rates are below their limits, it only makes them smaller, and it matters in no way but
//! by its number: it ends a run of failures, it makes a window longer, and it moves older calls out of a window of calls. So it
//! is counted, in a line that only its thread writes, marked with the generation; and whoever next steps the machine first
//! records all that were counted since the step before. A failure, a slow call and every call that may trip are steps. A window
//! of time is stepped once in each of its tenths as well, so that what is counted belongs to one of them. Every 512 that a thread
//! has counted it makes a step of its own: the machine may have become clean.

mod config;
mod keyed;
mod machine;
mod permit;
mod standby;
mod status;
mod window;

pub use config::{Backoff, CircuitBreakerConfig, Window};
pub use keyed::{KeyedCircuitBreaker, KeyedCircuitBreakerBuilder, KeyedCircuitBreakerStatus};
pub use permit::CircuitBreakerPermit;
pub(crate) use permit::Reservation;
pub(crate) use standby::{Standby, nobody};
pub use status::{CircuitBreakerMetrics, CircuitBreakerStatus, RejectedByCircuit, WindowStatus};

use crate::{
    clock::{Clock, Now, Reading, Timestamp},
    error::ConfigError,
    event::{Event, EventKind, Hub, Listener, ListenerId, trace_rejection},
    name::Name,
    permit::{Outcome, Verdict, run},
    policy::Glance,
    rejected::{Error, Reason, Refusing, Rejected},
    state::{Override, State},
    stripe::{Home, Homed, Hot, Locked, Place, Striped},
    subscribe::Events,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};
use config::Settings;
pub(crate) use machine::Machine;
use machine::{Quick, Refusal, Transition};
use standby::Waiters;
use std::{
    fmt,
    future::Future,
    num::NonZeroU64,
    sync::{Arc, PoisonError},
    time::Duration,
};

/// The striped counters, by index.
mod counter {
    pub(super) const SUCCESS: usize = 0;
    pub(super) const FAILURE: usize = 1;
    pub(super) const IGNORED: usize = 2;
    pub(super) const CANCELLED: usize = 3;
    /// Calls admitted, which end as one of those before.
    pub(super) const ADMITTED: usize = 4;
    pub(super) const SLOW: usize = 6;
    pub(super) const REJECTED_OPEN: usize = 7;
    pub(super) const REJECTED_HALF_OPEN: usize = 8;
    pub(super) const REJECTED_FORCED: usize = 9;
    pub(super) const COUNTERS: usize = 10;
}

/// The packed word; see the module's documentation.
mod word {
    use crate::{clock::ClockKind, rejected::Reason};
    use std::num::NonZeroU64;

    pub(super) const MODE: u64 = 0b111;
    // None is 0, so that no word is.
    pub(super) const CLOSED: u64 = 1;
    pub(super) const ASK: u64 = 2;
    pub(super) const FORCED_OPEN: u64 = 3;
    pub(super) const DISABLED: u64 = 4;
    pub(super) const BUSY: u64 = 5;
    pub(super) const REFUSING: u64 = 1 << 3;
    pub(super) const CLEAN: u64 = 1 << 4;
    pub(super) const TIMED: u64 = 1 << 5;
    pub(super) const HALF_OPEN: u64 = 1 << 6;
    pub(super) const COUNTED: u64 = 1 << 7;
    pub(super) const WITHIN: u64 = 1 << 8;
    const CLOCK_SHIFT: u32 = 9;
    const CLOCK: u64 = ((1 << ClockKind::CODE_BITS) - 1) << CLOCK_SHIFT;
    pub(super) const SEATED: u64 = 1 << 11;
    const SEAT_SHIFT: u32 = 12;
    pub(super) const GENERATION_SHIFT: u32 = 20;
    /// What is always the same in one breaker.
    pub(super) const CONSTANT: u64 = CLOCK | SEATED | 0xff << SEAT_SHIFT;
    /// In the place of a word, of a permit that has nothing to settle.
    pub(super) const NOBODYS: NonZeroU64 = NonZeroU64::new(DISABLED).expect("no mode is 0");

    /// The clock, if it is one of the program's.
    #[inline]
    pub(super) fn clock(word: u64) -> Option<ClockKind> {
        ClockKind::of_code((word & CLOCK) >> CLOCK_SHIFT)
    }

    /// What all words of a breaker have of this clock and this seat.
    pub(super) fn constant(clock: Option<ClockKind>, seat: Option<u8>) -> u64 {
        let clock = clock.map_or(0, ClockKind::code);
        clock << CLOCK_SHIFT | seat.map_or(0, |number| SEATED | u64::from(number) << SEAT_SHIFT)
    }

    /// Whether a call was admitted into a seat by a closed circuit that does not care how long it takes. It has no probe's lease.
    #[inline]
    pub(super) const fn is_plain(word: u64) -> bool {
        word & (MODE | SEATED | TIMED) == CLOSED | SEATED
    }

    /// For which reason a word refuses that does.
    #[inline]
    pub(super) const fn refusal(word: u64) -> Reason {
        if word & MODE == FORCED_OPEN {
            Reason::ForcedOpen
        } else if word & HALF_OPEN == 0 {
            Reason::Open
        } else {
            Reason::HalfOpenFull
        }
    }

    pub(super) const fn generation(word: u64) -> u64 {
        word >> GENERATION_SHIFT
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "those bits are wanted")]
    pub(super) const fn seat(word: u64) -> u8 {
        (word >> SEAT_SHIFT) as u8
    }
}

/// The counter of rejections for this reason.
#[inline]
fn rejections(reason: Reason) -> usize {
    match reason {
        Reason::HalfOpenFull => counter::REJECTED_HALF_OPEN,
        Reason::ForcedOpen => counter::REJECTED_FORCED,
        _ => counter::REJECTED_OPEN,
    }
}

struct Core {
    name: Name,
    clock: Clock,
    home: Home,
    /// What is the same in all its words.
    constant: u64,
    /// The config as the user wrote it; the machine has it checked and completed.
    config: Mutex<CircuitBreakerConfig>,
    /// Shared by the breakers of a keyed set.
    hub: Arc<Hub>,
    waiters: Waiters,
}

impl Homed for Core {
    fn home(&self) -> &Home {
        &self.home
    }
}

/// What the hot paths read, by name.
trait Words {
    /// The packed word; see the module's documentation.
    fn word(&self) -> &AtomicU64;
    /// When a refusing word stops being true, in the clock's nanoseconds.
    fn until(&self) -> &AtomicU64;
    /// From which length a call is slow, in nanoseconds.
    fn slow(&self) -> &AtomicU64;
    /// From when on, and until `until`, a success is counted under a word that says within.
    fn since(&self) -> &AtomicU64;
}

impl Words for Hot {
    #[inline]
    fn word(&self) -> &AtomicU64 {
        &self.words[0]
    }
    #[inline]
    fn until(&self) -> &AtomicU64 {
        &self.words[1]
    }
    #[inline]
    fn slow(&self) -> &AtomicU64 {
        &self.words[2]
    }
    #[inline]
    fn since(&self) -> &AtomicU64 {
        &self.words[3]
    }
}

/// The machine of a place, with all successes recorded that were only counted.
fn caught_up(place: Place<'_>) -> Locked<'_> {
    let mut locked = place.lock();
    let machine: &mut Machine = &mut locked;
    machine.catch_up(place.done(machine.generation()));
    locked
}

/// What a step has moved, for those who are told.
struct Moved {
    admits_sooner: bool,
    transitions: [Option<Transition>; 2],
}

/// Runs a step of the machine: a due transition first, then `step`; and publishes. Needs a share, and no more of the breaker than
/// what is the same in all its words. What has moved is boxed, as that is rare.
fn step_at<T>(
    place: Place<'_>,
    constant: u64,
    now: &Now<'_>,
    step: impl FnOnce(&mut Machine) -> (T, Option<Transition>),
) -> (T, Option<Box<Moved>>) {
    let mut locked = place.lock();
    let machine: &mut Machine = &mut locked;
    machine.catch_up(place.done(machine.generation()));
    let was_plainly_closed = machine.is_plainly_closed();
    // A closed one admits everybody: no step makes it admit sooner.
    let before = (!was_plainly_closed).then(|| machine.admits_from());
    let due = machine.advance(now);
    let (done, transition) = step(machine);
    // Where nothing can have moved, there is less to do.
    let is_quick = was_plainly_closed && transition.is_none() && publish_quick(place, machine);
    if is_quick {
        return (done, None);
    }
    publish(place, constant, machine, now);
    let moved = Moved {
        admits_sooner: before.is_some_and(|before| machine.admits_from() < before),
        transitions: [due, transition],
    };
    let is_told = moved.admits_sooner || moved.transitions.iter().any(Option::is_some);
    (done, is_told.then(|| Box::new(moved)))
}

/// Writes what alone changes from call to call of a circuit that stays closed and has no window of time: what becomes of quick
/// successes. `false`, and nothing is written, if more may have changed.
fn publish_quick(place: Place<'_>, machine: &Machine) -> bool {
    const QUICK: u64 = word::CLEAN | word::COUNTED | word::WITHIN;

    let hot = place.hot();
    let word = hot.word().load(Ordering::Relaxed);
    let same = word & word::MODE == word::CLOSED && word::generation(word) == machine.generation();
    if !same || !machine.is_plainly_closed() || machine.has_window_of_time() {
        return false;
    }
    let quick = match machine.quick_at_any_time() {
        Quick::Nothing => word::CLEAN,
        Quick::Count if word & word::SEATED != 0 => word::COUNTED,
        Quick::Count | Quick::CountWithin(..) | Quick::Record => 0,
    };
    if word & QUICK != quick {
        hot.word().store(word & !QUICK | quick, Ordering::Release);
    }
    true
}

/// Writes the word for what the machine is now. The caller holds the machine.
fn publish(place: Place<'_>, constant: u64, machine: &mut Machine, now: &Now<'_>) {
    let mode = match (machine.forced(), machine.state()) {
        (Some(Override::Disabled), _) => word::DISABLED,
        (Some(Override::ForcedOpen), _) => word::FORCED_OPEN,
        (_, State::Closed) => word::CLOSED,
        (_, State::Open | State::HalfOpen) => word::ASK,
    };
    let seated = constant & word::SEATED != 0;
    let mut until = machine.refused_until();
    let refusing = until.is_some();
    let mut since = Timestamp::from_nanos(0);
    let quick = match machine.quick(now) {
        _ if mode != word::CLOSED => 0,
        Quick::Nothing => word::CLEAN,
        Quick::Count if seated => word::COUNTED,
        // Which clock it is must be told by the word.
        Quick::CountWithin(from, to) if seated && word::clock(constant).is_some() => {
            (since, until) = (from, Some(to));
            word::COUNTED | word::WITHIN
        }
        Quick::Count | Quick::CountWithin(..) | Quick::Record => 0,
    };
    let slow = machine.settings().slow_calls.map(|(_, slow)| slow);
    let flag = |set: bool, flag: u64| if set { flag } else { 0 };
    let word = mode
        | flag(refusing, word::REFUSING)
        | quick
        | flag(slow.is_some(), word::TIMED)
        | flag(machine.state() == State::HalfOpen, word::HALF_OPEN)
        | constant
        | machine.generation() << word::GENERATION_SHIFT;
    let slow = slow.unwrap_or(u64::MAX);
    let until = until.map_or(0, Timestamp::nanos);
    let since = since.nanos();
    let hot = place.hot();
    // A store that changes nothing takes the line from everybody all the same.
    if hot.slow().load(Ordering::Relaxed) != slow {
        hot.slow().store(slow, Ordering::Relaxed);
    }
    if (hot.until().load(Ordering::Relaxed), hot.since().load(Ordering::Relaxed)) != (until, since) {
        hot.word().store(word::BUSY, Ordering::Relaxed);
        hot.until().store(until, Ordering::Release);
        hot.since().store(since, Ordering::Release);
    }
    if hot.word().load(Ordering::Relaxed) != word {
        hot.word().store(word, Ordering::Release);
    }
}

/// A circuit breaker: stops calling a service that keeps failing, and finds out when it is well again.
///
/// A cheap handle: clones share one state, across threads, layers and connections. Use it directly, as here, or put it into a
/// [`CircuitBreakerLayer`](crate::CircuitBreakerLayer). See [`State`] for how it moves, [`CircuitBreakerConfig`] for what moves it.
///
/// ```
/// use portcullis::{CircuitBreaker, Outcome, State};
/// use std::time::Duration;
///
/// let breaker = CircuitBreaker::builder("search")
///     .failure_threshold(2)
///     .recovery_timeout(Duration::from_secs(30))
///     .build()?;
///
/// for _ in 0..2 {
///     let permit = breaker.try_acquire()?;
///     permit.settle(Outcome::Failure); // the call failed
/// }
/// assert_eq!(breaker.state(), State::Open);
/// let rejected = breaker.try_acquire().unwrap_err();
/// assert!(rejected.retry_after <= Some(Duration::from_secs(30)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Cost
///
/// A success of a closed circuit takes no lock, allocates nothing and writes nothing that another thread writes, but where it may
/// trip: a rate is reached, and only the minimum of calls is not. A rejection by an open circuit takes no lock either. Every other
/// outcome (a failure, a dropped call, a probe, any call where slow ones are watched, any in a window of time on a manual clock)
/// takes a mutex for a step that does not depend on the traffic. Reading the state or the status takes it too.
///
/// Memory: about 900 bytes, two bits for each call of a window of calls, 8 bytes for each failure that
/// [`failures_within`](CircuitBreakerConfig::failures_within) remembers; and one of the program's 256 seats for counters, while there
/// are some, see the [README](crate#memory-and-cost).
#[derive(Clone)]
pub struct CircuitBreaker {
    shared: Striped<Core>,
}

/// Makes a [`CircuitBreaker`]; from [`CircuitBreaker::builder`]. Its settings are those of [`CircuitBreakerConfig`].
///
/// ```
/// # use portcullis::CircuitBreaker;
/// let breaker = CircuitBreaker::builder("search").failure_threshold(3).build()?;
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build`"]
pub struct CircuitBreakerBuilder {
    name: String,
    clock: Clock,
    pub(self) config: CircuitBreakerConfig,
}

impl CircuitBreakerBuilder {
    /// Takes a whole config, in place of every setting made so far.
    pub fn config(mut self, config: CircuitBreakerConfig) -> Self {
        self.config = config;
        self
    }

    /// Reads the time here. Default: [`Clock::system`].
    pub fn clock(mut self, clock: impl Into<Clock>) -> Self {
        self.clock = clock.into();
        self
    }

    /// The breaker, closed.
    ///
    /// # Errors
    ///
    /// A name that is empty or longer than [`Name::MAX_LEN`]; a setting outside its range, named in the error.
    pub fn build(self) -> Result<CircuitBreaker, ConfigError> {
        let name = Name::new("name", &self.name)?;
        let settings = self.config.validate()?;
        let core = |home| Core::new(name, self.clock, self.config, settings, Arc::default(), home);
        Ok(CircuitBreaker {
            shared: Striped::new(core),
        })
    }
}

impl Core {
    fn new(
        name: Name,
        clock: Clock,
        config: CircuitBreakerConfig,
        settings: Settings,
        hub: Arc<Hub>,
        home: Home,
    ) -> Self {
        home.keep(Machine::new(settings, clock.now()));
        let core = Self {
            name,
            constant: word::constant(clock.kind(), home.seat()),
            clock,
            home,
            config: Mutex::new(config),
            hub,
            waiters: Waiters::default(),
        };
        core.step(&Now::At(core.clock.now()), |_| ((), None));
        core
    }

    fn machine(&self) -> Locked<'_> {
        self.home.place().lock()
    }

    /// The machine, with all successes recorded that were only counted.
    fn caught_up(&self) -> Locked<'_> {
        caught_up(self.home.place())
    }

    /// Runs a step of the machine, and tells those who wait and the listeners outside the lock.
    fn step<T>(&self, now: &Now<'_>, step: impl FnOnce(&mut Machine) -> (T, Option<Transition>)) -> T {
        let (done, moved) = step_at(self.home.place(), self.constant, now, step);
        if let Some(moved) = moved {
            self.tell(&moved);
        }
        done
    }

    /// Tells those who wait, and the listeners, what a step has moved.
    fn tell(&self, moved: &Moved) {
        if moved.admits_sooner {
            self.waiters.wake();
        }
        for Transition {
            from,
            to,
            generation,
            at,
        } in moved.transitions.iter().flatten().copied()
        {
            self.emit(at, EventKind::Transition { from, to, generation });
        }
    }

    fn emit(&self, at: Timestamp, kind: EventKind) {
        self.hub.emit(|| Event {
            service: self.name.clone(),
            limit: None,
            at,
            kind,
        });
    }

    fn rejected(&self, reason: Reason, until: Option<Timestamp>, now: Option<Timestamp>) -> Rejected {
        Rejected {
            retry_after: until.zip(now).map(|(until, now)| until.duration_since(now)),
            ..Rejected::new(self.name.clone(), reason)
        }
    }
}

impl CircuitBreaker {
    /// Starts a breaker for the service of that name; the defaults suit most.
    ///
    /// Each one that is built has a state of its own, also under the name of another: build it once and clone it, or ask a
    /// [`Registry`](crate::Registry), which lets no two have one name.
    pub fn builder(name: impl Into<String>) -> CircuitBreakerBuilder {
        CircuitBreakerBuilder {
            name: name.into(),
            clock: Clock::system(),
            config: CircuitBreakerConfig::default(),
        }
    }

    /// Leave to call the service, or the reason why not.
    ///
    /// The permit must be told how the call ended with [`settle`](CircuitBreakerPermit::settle); dropped, the call was
    /// cancelled (or, in a panic, failed). `let _ = breaker.try_acquire()` drops it at once, and no lint says so: a permit belongs
    /// in a variable until the call has ended. [`call`](Self::call) sees to that by itself.
    ///
    /// # Errors
    ///
    /// [`Reason::Open`], [`Reason::HalfOpenFull`] or [`Reason::ForcedOpen`].
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub fn try_acquire(&self) -> Result<CircuitBreakerPermit, Rejected> {
        let now = Reading::new();
        match self.glance(&Reservation::default(), &now) {
            Some(permit) => Ok(permit),
            None => self.acquire_at(&now),
        }
    }

    pub(crate) fn acquire_at(&self, now: &Reading) -> Result<CircuitBreakerPermit, Rejected> {
        self.acquire_uncounted(now).inspect_err(|why| self.count(why, now))
    }

    /// Asks without leaving a trace of a refusal: `poll_ready` may ask many times for one call.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn acquire_uncounted(&self, now: &Reading) -> Result<CircuitBreakerPermit, Rejected> {
        let word = self.shared.hot().word().load(Ordering::Acquire);
        match NonZeroU64::new(word) {
            Some(word) if word.get() & word::MODE == word::CLOSED => {
                Ok(CircuitBreakerPermit::new(&self.shared, word, None, now))
            }
            _ => self.acquire_otherwise(word, now),
        }
    }

    #[cold]
    #[inline(never)]
    fn acquire_otherwise(&self, word: u64, now: &Reading) -> Result<CircuitBreakerPermit, Rejected> {
        match word & word::MODE {
            word::DISABLED => Ok(CircuitBreakerPermit::untracked()),
            word::FORCED_OPEN => Err(self.shared.rejected(Reason::ForcedOpen, None, None)),
            _ => self.ask_machine(word, now),
        }
    }

    fn ask_machine(&self, word: u64, reading: &Reading) -> Result<CircuitBreakerPermit, Rejected> {
        let core: &Core = &self.shared;
        let now = reading.at(&core.clock);
        let (answer, word) = match self.refused_by_word(word, now) {
            Some(refusal) => (Err(refusal), word),
            None => core.step(&Now::At(now), |machine| {
                let answer = machine.acquire(now);
                // The word is published after this step; what a permit needs of it does not wait for that.
                let timed = if machine.settings().slow_calls.is_some() {
                    word::TIMED
                } else {
                    0
                };
                let mode = if machine.forced() == Some(Override::Disabled) {
                    word::DISABLED
                } else {
                    word::ASK
                };
                let word = machine.generation() << word::GENERATION_SHIFT | core.constant | timed | mode;
                ((answer, word), None)
            }),
        };
        match answer {
            Ok(_) if word & word::MODE == word::DISABLED => Ok(CircuitBreakerPermit::untracked()),
            Ok(lease) => {
                let word = NonZeroU64::new(word).expect("no mode is 0");
                Ok(CircuitBreakerPermit::new(&self.shared, word, lease, reading))
            }
            Err(Refusal { reason, until }) => Err(core.rejected(reason, until, Some(now))),
        }
    }

    /// The refusal that the word alone tells: nobody queues for a lock in front of an open circuit.
    fn refused_by_word(&self, word: u64, now: Timestamp) -> Option<Refusal> {
        let until = self.refused_until(word, || now)?;
        Some(Refusal {
            reason: word::refusal(word),
            until: Some(until),
        })
    }

    /// Until when the word alone tells that every call is refused.
    #[inline]
    fn refused_until(&self, word: u64, now: impl FnOnce() -> Timestamp) -> Option<Timestamp> {
        if word & word::REFUSING == 0 {
            return None;
        }
        let hot = self.shared.hot();
        let until = Timestamp::from_nanos(hot.until().load(Ordering::Acquire));
        let refused = now() < until && hot.word().load(Ordering::Acquire) == word;
        refused.then_some(until)
    }

    /// What the word alone tells a service that is to be readied and holds nothing.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn ready_at_a_glance(&self, now: &Reading) -> Glance<Reservation> {
        let word = self.shared.hot().word().load(Ordering::Acquire);
        match word & word::MODE {
            word::CLOSED | word::DISABLED => Glance::Ready(Reservation::default()),
            _ if self.refuses_at_a_glance(word, now) => Glance::Refused(word::refusal(word)),
            _ => Glance::Unsure,
        }
    }

    /// Out of line, so that a closed circuit does not carry it along.
    #[inline(never)]
    fn refuses_at_a_glance(&self, word: u64, now: &Reading) -> bool {
        word & word::MODE == word::FORCED_OPEN || self.refused_until(word, || now.at(&self.shared.clock)).is_some()
    }

    /// The refusal of a call, counted, if the word alone tells.
    #[expect(
        clippy::inline_always,
        reason = "a rejection that is made here and moved there costs more than all the rest"
    )]
    #[inline(always)]
    pub(crate) fn refuse_at_a_glance(&self, now: &Reading) -> Option<Refusing<'_>> {
        let word = self.shared.hot().word().load(Ordering::Acquire);
        let wait = if word & word::MODE == word::FORCED_OPEN {
            None
        } else {
            let now = now.at(&self.shared.clock);
            Some(self.refused_until(word, || now)?.duration_since(now))
        };
        let core: &Core = &self.shared;
        let reason = word::refusal(word);
        self.shared.add(rejections(reason), 1);
        trace_rejection(&core.name, None, reason, wait);
        if core.hub.is_heard() {
            self.tell_refusal(word, wait, now);
        }
        Some(Refusing::new(&core.name, reason).retry_after(wait))
    }

    /// Handed numbers and no reference, so that what is refused at a glance need not lie in memory.
    #[cold]
    #[inline(never)]
    fn tell_refusal(&self, word: u64, retry_after: Option<Duration>, now: &Reading) {
        let core: &Core = &self.shared;
        let refusing = Refusing::new(&core.name, word::refusal(word)).retry_after(retry_after);
        core.hub.tell_rejection(&refusing.reject(), now.at(&core.clock));
    }

    /// The rejection of a call that was refused for that reason when its service was readied, and is no more.
    #[cold]
    pub(crate) fn lapsed(&self, reason: Reason) -> Rejected {
        Rejected {
            retry_after: (reason != Reason::ForcedOpen).then_some(Duration::ZERO),
            ..Rejected::new(self.name().clone(), reason)
        }
    }

    /// Counts a rejection and tells the listeners. Called once for every call that was rejected.
    pub(crate) fn count(&self, why: &Rejected, now: &Reading) {
        let core = &self.shared;
        core.add(rejections(why.reason), 1);
        core.hub.rejected(why, || now.at(&core.clock));
    }

    /// The refusal that the next call would meet, without taking anything.
    pub(crate) fn peek(&self, now: &Reading) -> Option<Rejected> {
        let core: &Core = &self.shared;
        let word = core.home.place().hot().word().load(Ordering::Acquire);
        match word & word::MODE {
            word::CLOSED | word::DISABLED => None,
            word::FORCED_OPEN => Some(core.rejected(Reason::ForcedOpen, None, None)),
            _ => {
                let now = now.at(&core.clock);
                let refusal = self
                    .refused_by_word(word, now)
                    .or_else(|| core.caught_up().view(now).refusal)?;
                Some(core.rejected(refusal.reason, refusal.until, Some(now)))
            }
        }
    }

    /// Keeps or takes what a readied service needs: a probe's slot if the circuit is half-open, nothing if it is closed.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn reserve(&self, held: Option<Reservation>, now: &Reading) -> Result<Reservation, Rejected> {
        // A closed circuit promises nothing: `call` looks again.
        if held.as_ref().is_none_or(Reservation::is_empty) && self.is_admitting() {
            Ok(Reservation::default())
        } else {
            self.reserve_probe(held, now)
        }
    }

    /// Whether the circuit is closed, or disabled, so that every call passes.
    #[inline]
    fn is_admitting(&self) -> bool {
        let mode = self.shared.hot().word().load(Ordering::Acquire) & word::MODE;
        mode == word::CLOSED || mode == word::DISABLED
    }

    #[cold]
    #[inline(never)]
    fn reserve_probe(&self, held: Option<Reservation>, now: &Reading) -> Result<Reservation, Rejected> {
        if let Some(held) = held
            && held.still_holds(now)
        {
            return Ok(held);
        }
        if self.is_admitting() {
            return Ok(Reservation::default());
        }
        self.acquire_uncounted(now).map(Reservation::of)
    }

    /// The permit for a call by a readied service.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn redeem(&self, reserved: Reservation, now: &Reading) -> Result<CircuitBreakerPermit, Rejected> {
        match self.redeem_uncounted(reserved, now) {
            Ok(permit) => Ok(permit),
            Err(why) => {
                self.count(&why, now);
                Err(why)
            }
        }
    }

    /// The same, a refusal leaving no trace.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn redeem_uncounted(
        &self,
        reserved: Reservation,
        now: &Reading,
    ) -> Result<CircuitBreakerPermit, Rejected> {
        if reserved.is_empty() {
            return self.acquire_uncounted(now);
        }
        match reserved.redeem(now) {
            Some(permit) => Ok(permit),
            None => self.acquire_uncounted(now),
        }
    }

    /// The permit for a call by a readied service, if the circuit is closed.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn glance(&self, reserved: &Reservation, now: &Reading) -> Option<CircuitBreakerPermit> {
        let word = self.shared.hot().word().load(Ordering::Acquire);
        let word = NonZeroU64::new(word).filter(|word| word.get() & word::MODE == word::CLOSED)?;
        let admitted = reserved.is_empty();
        admitted.then(|| CircuitBreakerPermit::new(&self.shared, word, None, now))
    }

    /// Whether a call by a readied service would be admitted now, without asking the machine.
    #[inline]
    pub(crate) fn surely_admits(&self, reserved: &Reservation) -> bool {
        reserved.is_empty() && self.is_admitting()
    }

    /// Makes a call if the breaker admits it; an error is a failure, unless it is a rejection by another portcullis policy (seen
    /// where [`ErrorsAreFailures`](crate::ErrorsAreFailures) sees it: not inside an error type of your own).
    ///
    /// Nothing happens before the future is polled. Cancel-safe: dropped, it gives its permit back as cancelled. A panic of the
    /// call counts as a failure and goes on to the caller.
    ///
    /// ```
    /// # use portcullis::CircuitBreaker;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder("search").build()?;
    /// let answer = breaker.call(async { Ok::<_, std::io::Error>(42) }).await?;
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

    /// [`call`](Self::call) with a classifier of its own: which errors count, and which successes do not.
    ///
    /// ```
    /// # use portcullis::{CircuitBreaker, Outcome};
    /// # use std::io;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::ConfigError> {
    /// let breaker = CircuitBreaker::builder("files").build()?;
    /// let classify = |result: &io::Result<()>| match result {
    ///     Err(error) if error.kind() == io::ErrorKind::NotFound => Outcome::Ignored,
    ///     Err(_) => Outcome::Failure,
    ///     Ok(()) => Outcome::Success,
    /// };
    /// let ask = async { Err(io::Error::from(io::ErrorKind::NotFound)) };
    /// breaker.call_with(classify, ask).await.unwrap_err();
    /// assert_eq!(breaker.status().metrics.ignored_requests, 1);
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
        run(permit, classify, future).await
    }

    /// The service's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.shared.name
    }

    /// The clock that the breaker reads.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// The state that the next call would meet. Reading changes nothing: a circuit whose open time is over reads as half-open.
    #[must_use]
    pub fn state(&self) -> State {
        let core: &Core = &self.shared;
        core.caught_up().view(core.clock.now()).state
    }

    /// Everything there is to see, at one moment. Reading changes nothing.
    #[must_use]
    pub fn status(&self) -> CircuitBreakerStatus {
        let core: &Core = &self.shared;
        let now = core.clock.now();
        let (view, config) = {
            let machine = core.caught_up();
            // Under the machine's lock, as `reconfigure` writes it: the config belongs to the view.
            (machine.view(now), self.config())
        };
        CircuitBreakerStatus::new(core.name.clone(), view, config, now, |counter| {
            self.shared.home.sum(counter)
        })
    }

    /// The config as it was given.
    #[must_use]
    pub fn config(&self) -> CircuitBreakerConfig {
        self.shared.config().clone()
    }

    /// Rejects every call until [`reset`](Self::reset).
    pub fn force_open(&self) {
        self.force(Override::ForcedOpen);
    }

    /// Admits every call and records it, but trips on nothing, until [`reset`](Self::reset).
    pub fn force_closed(&self) {
        self.force(Override::ForcedClosed);
    }

    /// Admits every call and records nothing, until [`reset`](Self::reset).
    pub fn disable(&self) {
        self.force(Override::Disabled);
    }

    fn force(&self, into: Override) {
        self.intervene(
            |machine, now| machine.force(into, now),
            |generation| EventKind::Overridden { into, generation },
        );
    }

    /// Back to closed, windows empty. Calls that are under way are counted and move nothing. The counters stay.
    pub fn reset(&self) {
        self.intervene(Machine::reset, |generation| EventKind::Reset { generation });
    }

    fn intervene(&self, change: impl FnOnce(&mut Machine, Timestamp), event: impl FnOnce(u64) -> EventKind) {
        let core: &Core = &self.shared;
        // Read under the machine's lock: a status that shows a due move, and so counts it, is not later than this.
        let (reading, clock) = (Reading::new(), &core.clock);
        let generation = core.step(&Now::Asked(&reading, clock), |machine| {
            change(machine, reading.at(clock));
            (machine.generation(), None)
        });
        core.emit(reading.at(clock), event(generation));
    }

    /// Takes another config and keeps what means the same under it: the state, the latest calls of the window, the counters.
    ///
    /// An open circuit keeps the instant at which it will probe; running probes keep their leases. Calls under way are counted
    /// and move nothing.
    ///
    /// ```
    /// # use portcullis::{CircuitBreaker, CircuitBreakerConfig, Outcome, State};
    /// let breaker = CircuitBreaker::builder("search").build()?;
    /// for _ in 0..4 {
    ///     breaker.try_acquire()?.settle(Outcome::Failure);
    /// }
    /// breaker.reconfigure(CircuitBreakerConfig::default().failure_threshold(10))?;
    /// assert_eq!(breaker.status().failure_count, 4, "the run of failures goes on");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A setting outside its range; nothing has changed then.
    pub fn reconfigure(&self, config: CircuitBreakerConfig) -> Result<(), ConfigError> {
        let settings = config.validate()?;
        self.intervene(
            |machine, now| {
                machine.reconfigure(settings, now);
                // Under the machine's lock: of two reconfigurations the later one wins in both places.
                *self.shared.config() = config;
            },
            |generation| EventKind::Reconfigured { generation },
        );
        Ok(())
    }

    /// Calls `listener` on every event of this breaker; see [`Event`] for how.
    pub fn on_event(&self, listener: impl Fn(&Event) + Send + Sync + 'static) -> ListenerId {
        self.shared.hub.on_event(listener)
    }

    /// Removes a listener; `false` if it is not there.
    pub fn remove_listener(&self, id: ListenerId) -> bool {
        self.shared.hub.remove(id)
    }

    /// A queue of this breaker's events that holds `capacity` (at least one) and loses the oldest.
    #[must_use = "dropping the queue ends the subscription"]
    pub fn subscribe(&self, capacity: usize) -> Events {
        self.shared.hub.subscribe(capacity)
    }

    pub(crate) fn add_listener(&self, listener: Listener) {
        self.shared.hub.add(listener);
    }

    /// Whether both are handles of one breaker.
    pub(crate) fn same(&self, other: &Self) -> bool {
        self.shared.same(&other.shared)
    }

    /// Whether the breaker's present config means the same as this one.
    pub(crate) fn matches(&self, config: &CircuitBreakerConfig) -> bool {
        let critical = self.shared.config().critical;
        critical == config.critical && config.validate().as_ref() == Ok(self.shared.machine().settings())
    }
}

impl Core {
    fn config(&self) -> MutexGuard<'_, CircuitBreakerConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for CircuitBreaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreaker")
            .field("name", self.name())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, portcullis_loom))]
mod model;
