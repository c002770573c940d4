//! The only file that reads time. Everything else is handed a [`Timestamp`].
#![expect(clippy::disallowed_methods, reason = "this file is where the clock is read")]

use pin_project_lite::pin_project;
use std::{
    cell::Cell,
    collections::BTreeMap,
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

/// A point on a clock's own scale, in nanoseconds.
///
/// Comparable only with timestamps of the same clock. Arithmetic saturates: the scale has room for 146 years before a
/// clock's beginning and 438 years after it.
///
/// ```
/// # use portcullis::Clock;
/// # use std::time::Duration;
/// let clock = Clock::manual();
/// let before = clock.now();
/// clock.advance(Duration::from_secs(3));
/// assert_eq!(clock.now().duration_since(before), Duration::from_secs(3));
/// assert_eq!(before.duration_since(clock.now()), Duration::ZERO);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// Where a clock begins. So far from zero that zero is longer ago than any setting reaches (100 years).
    pub(crate) const BEGINNING: Self = Self(1 << 62);
    /// Behind which there is no time.
    pub(crate) const END: Self = Self(u64::MAX);

    #[inline]
    pub(crate) const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    #[inline]
    pub(crate) const fn nanos(self) -> u64 {
        self.0
    }

    /// The time from `earlier` to `self`; zero if `earlier` is in fact later.
    #[must_use]
    #[inline]
    pub const fn duration_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The timestamp `duration` later.
    #[must_use]
    #[inline]
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }

    /// The timestamp `duration` earlier.
    #[must_use]
    pub fn saturating_sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }
}

/// A duration in nanoseconds; 584 years and more are the same.
#[inline]
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Where breakers, limiters and registries read the time.
///
/// Builders and registries take one; without it they use [`Clock::system`]. Clones are the same clock.
///
/// ```
/// use portcullis::{CircuitBreaker, Clock, Outcome, State};
/// use std::time::Duration;
///
/// let clock = Clock::manual();
/// let breaker = CircuitBreaker::builder("search").clock(&clock).failure_threshold(1).build()?;
/// breaker.try_acquire()?.settle(Outcome::Failure);
/// assert_eq!(breaker.state(), State::Open);
/// clock.advance(Duration::from_secs(60));
/// assert_eq!(breaker.state(), State::HalfOpen);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Clock(Source);

#[derive(Clone)]
enum Source {
    System,
    Manual(ManualClock),
    #[cfg(feature = "fast-clock")]
    Fast(&'static FastClock),
}

impl Clock {
    /// Tokio's clock: monotonic time, and in a runtime whose time is paused, the paused time.
    #[must_use]
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that moves only when told to. Advancing it wakes whoever waits for the time it passes.
    ///
    /// For tests: where nobody advances it, an open circuit stays open, a limit never fills up again, and who waits waits for ever.
    #[must_use]
    pub fn manual() -> ManualClock {
        ManualClock(Arc::new(Manual {
            now: AtomicU64::new(Timestamp::BEGINNING.0),
            sleepers: Mutex::default(),
        }))
    }

    /// Time from the CPU's counter: about half the price of [`Clock::system`], blind to tokio's paused time. Waits still
    /// use tokio's timer.
    #[cfg(feature = "fast-clock")]
    #[cfg_attr(docsrs, doc(cfg(feature = "fast-clock")))]
    #[must_use]
    pub fn fast() -> Self {
        Self(Source::Fast(FastClock::get()))
    }

    /// The time now.
    #[must_use]
    #[inline]
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Source::System => system_now(),
            Source::Manual(manual) => manual.now(),
            #[cfg(feature = "fast-clock")]
            Source::Fast(clock) => clock.now(),
        }
    }

    /// The clock, if there is one of its kind: then it can be named by a bit.
    pub(crate) fn kind(&self) -> Option<ClockKind> {
        match &self.0 {
            Source::System => Some(ClockKind::System),
            Source::Manual(_) => None,
            #[cfg(feature = "fast-clock")]
            Source::Fast(_) => Some(ClockKind::Fast),
        }
    }

    /// A future that is ready once the clock has reached `deadline`, or a little earlier: whoever awaits it looks again.
    pub(crate) fn sleep_until(&self, deadline: Timestamp) -> Sleep {
        // Tokio's timer rounds up to its next millisecond; far instants overflow it.
        const FAR: Duration = Duration::from_secs(365 * 86_400);
        if let Source::Manual(clock) = &self.0 {
            return Sleep::Manual {
                entry: Entry {
                    clock: clock.clone(),
                    deadline,
                    id: None,
                },
            };
        }
        Sleep::Tokio {
            sleep: tokio::time::sleep(deadline.duration_since(self.now()).min(FAR)),
        }
    }

    /// Equal for clocks that always read the same, so that one reading serves them all.
    #[inline]
    fn id(&self) -> usize {
        match &self.0 {
            Source::System => SYSTEM_ID,
            #[cfg(feature = "fast-clock")]
            Source::Fast(_) => FAST_ID,
            Source::Manual(manual) => Arc::as_ptr(&manual.0).addr(),
        }
    }
}

const SYSTEM_ID: usize = 0;
#[cfg(feature = "fast-clock")]
const FAST_ID: usize = 1;

/// A clock of which there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClockKind {
    System,
    #[cfg(feature = "fast-clock")]
    Fast,
}

impl ClockKind {
    /// How many bits a code has.
    pub(crate) const CODE_BITS: u32 = 2;

    /// Its code in a packed word; none is 0.
    pub(crate) const fn code(self) -> u64 {
        match self {
            Self::System => 1,
            #[cfg(feature = "fast-clock")]
            Self::Fast => 2,
        }
    }

    /// The kind of that code, if it is one.
    #[inline]
    pub(crate) const fn of_code(code: u64) -> Option<Self> {
        match code {
            1 => Some(Self::System),
            #[cfg(feature = "fast-clock")]
            2 => Some(Self::Fast),
            _ => None,
        }
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}
impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Source::System => "Clock::system",
            Source::Manual(_) => "Clock::manual",
            #[cfg(feature = "fast-clock")]
            Source::Fast(_) => "Clock::fast",
        })
    }
}
impl From<&Clock> for Clock {
    fn from(clock: &Clock) -> Self {
        clock.clone()
    }
}
impl From<ManualClock> for Clock {
    fn from(clock: ManualClock) -> Self {
        Self(Source::Manual(clock))
    }
}
impl From<&ManualClock> for Clock {
    fn from(clock: &ManualClock) -> Self {
        clock.clone().into()
    }
}

/// A call of its own, so that reading the CPU's counter is short enough to be copied to where it is wanted.
#[inline(never)]
fn system_now() -> Timestamp {
    from_system(tokio::time::Instant::now())
}

/// All system clocks count from one instant, so that policies built apart share a reading. A runtime paused before that
/// instant was taken reads times before it.
fn from_system(now: tokio::time::Instant) -> Timestamp {
    static BEGINNING: OnceLock<std::time::Instant> = OnceLock::new();
    let (now, beginning) = (now.into_std(), *BEGINNING.get_or_init(std::time::Instant::now));
    match now.checked_duration_since(beginning) {
        Some(after) => Timestamp::BEGINNING.saturating_add(after),
        None => Timestamp::BEGINNING.saturating_sub(beginning.duration_since(now)),
    }
}

/// The time of day, for those who are told an instant and not a wait. Zero on a machine that is set to before 1970.
#[cfg(feature = "http")]
pub(crate) fn since_1970() -> Duration {
    let passed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    passed.unwrap_or_default()
}

/// The CPU's counter, and where it stood at the beginning of the scale.
#[cfg(feature = "fast-clock")]
struct FastClock {
    counter: quanta::Clock,
    beginning: u64,
}

#[cfg(feature = "fast-clock")]
impl FastClock {
    /// Made once: calibration takes time, and `CPUID` is slow on virtual machines.
    #[inline]
    fn get() -> &'static Self {
        static CLOCK: OnceLock<FastClock> = OnceLock::new();
        CLOCK.get_or_init(|| {
            let counter = quanta::Clock::new();
            let beginning = counter.raw();
            Self { counter, beginning }
        })
    }

    #[inline]
    fn now(&self) -> Timestamp {
        let passed = self.counter.delta_as_nanos(self.beginning, self.counter.raw());
        Timestamp(Timestamp::BEGINNING.0.saturating_add(passed))
    }
}

/// A clock for tests: it stands still until [`advance`](Self::advance). Made by [`Clock::manual`]; clones are the same clock.
///
/// ```
/// # use portcullis::{Clock, RateLimiter, TokenBucket};
/// # use std::time::Duration;
/// let clock = Clock::manual();
/// let limiter = RateLimiter::builder("search", TokenBucket::new(1, Duration::from_secs(1))).clock(&clock).build()?;
/// limiter.try_acquire()?;
/// assert_eq!(limiter.try_acquire().unwrap_err().retry_after, Some(Duration::from_secs(1)));
/// clock.advance(Duration::from_secs(1));
/// limiter.try_acquire()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct ManualClock(Arc<Manual>);

struct Manual {
    now: AtomicU64,
    sleepers: Mutex<Sleepers>,
}

#[derive(Default)]
struct Sleepers {
    by_deadline: BTreeMap<(Timestamp, u64), Waker>,
    next: u64,
}

impl ManualClock {
    /// The time now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp(self.0.now.load(Ordering::Acquire))
    }

    /// Moves the clock forward and wakes the waits that become due, in the order of their deadlines. What was woken goes on when
    /// its runtime polls it: a test yields (`tokio::task::yield_now().await`) before it looks.
    pub fn advance(&self, by: Duration) {
        let by = nanos(by);
        let step = |now: u64| Some(now.saturating_add(by));
        let before = self.0.now.fetch_update(Ordering::AcqRel, Ordering::Acquire, step);
        let now = Timestamp(before.unwrap_or_else(|now| now).saturating_add(by));
        let due = {
            let mut sleepers = self.sleepers();
            let later = sleepers.by_deadline.split_off(&(Timestamp(now.0.saturating_add(1)), 0));
            std::mem::replace(&mut sleepers.by_deadline, later)
        };
        due.into_values().for_each(Waker::wake);
    }

    /// Moves the clock back: what a thread sees that read the time and was then held up.
    pub fn rewind(&self, by: Duration) {
        let by = nanos(by);
        let step = |now: u64| Some(now.saturating_sub(by));
        let _ = self.0.now.fetch_update(Ordering::AcqRel, Ordering::Acquire, step);
    }

    fn sleepers(&self) -> MutexGuard<'_, Sleepers> {
        self.0.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ManualClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ManualClock").field(&self.now()).finish()
    }
}

pin_project! {
    /// See [`Clock::sleep_until`].
    #[project = SleepProjection]
    pub(crate) enum Sleep {
        Tokio { #[pin] sleep: tokio::time::Sleep },
        Manual { entry: Entry },
    }
}

/// A place among the sleepers of a manual clock.
pub(crate) struct Entry {
    clock: ManualClock,
    deadline: Timestamp,
    id: Option<u64>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let waker = self.clock.sleepers().by_deadline.remove(&(self.deadline, id));
            // Outside the lock: the last waker of a task drops its future, which may sleep here as well.
            drop(waker);
        }
    }
}

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let entry = match self.project() {
            SleepProjection::Tokio { sleep } => return sleep.poll(cx),
            SleepProjection::Manual { entry } => entry,
        };
        let mut sleepers = entry.clock.sleepers();
        // Under the lock: an `advance` that this reading misses has yet to collect the sleepers.
        if entry.clock.now() >= entry.deadline {
            return Poll::Ready(());
        }
        let id = *entry.id.get_or_insert_with(|| {
            sleepers.next += 1;
            sleepers.next
        });
        let replaced = sleepers.by_deadline.insert((entry.deadline, id), cx.waker().clone());
        drop(sleepers);
        drop(replaced);
        Poll::Pending
    }
}

/// The time now, read when it is asked for: a step that needs none does not pay for it.
#[derive(Debug)]
pub(crate) enum Now<'a> {
    At(Timestamp),
    Asked(&'a Reading, &'a Clock),
    OfKind(&'a Reading, ClockKind),
}

impl Now<'_> {
    #[inline]
    pub(crate) fn get(&self) -> Timestamp {
        match self {
            Self::At(now) => *now,
            Self::Asked(reading, clock) => reading.at(clock),
            Self::OfKind(reading, kind) => reading.at_kind(*kind),
        }
    }
}

/// One request's reading of the clock: taken when first asked for, then shared by every policy on the same clock.
#[derive(Debug, Default)]
pub struct Reading(Cell<Option<(usize, Timestamp)>>);

impl Reading {
    /// A reading not taken yet.
    #[must_use]
    #[inline]
    pub fn new() -> Self {
        Self::default()
    }

    /// A reading that a request took when `clock` showed this time.
    #[cfg(all(test, portcullis_loom))]
    pub(crate) fn of(clock: &Clock, time: Timestamp) -> Self {
        Self(Cell::new(Some((clock.id(), time))))
    }

    /// The same reading, for a step out of line: this one need not lie in memory for its sake.
    #[inline]
    pub(crate) fn again(&self) -> Self {
        Self(Cell::new(self.0.get()))
    }

    /// The time on `clock`, read now or earlier in this request.
    #[inline]
    pub fn at(&self, clock: &Clock) -> Timestamp {
        self.taken(clock.id(), || clock.now())
    }

    /// The same of a clock of which there is one.
    #[inline]
    pub(crate) fn at_kind(&self, kind: ClockKind) -> Timestamp {
        match kind {
            ClockKind::System => self.taken(SYSTEM_ID, system_now),
            #[cfg(feature = "fast-clock")]
            ClockKind::Fast => self.taken(FAST_ID, || FastClock::get().now()),
        }
    }

    #[inline]
    fn taken(&self, id: usize, now: impl FnOnce() -> Timestamp) -> Timestamp {
        match self.0.get() {
            Some((of, now)) if of == id => now,
            _ => {
                let now = now();
                self.0.set(Some((id, now)));
                now
            }
        }
    }
}
