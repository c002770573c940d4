//! Counters that threads do not fight over, and shared state that a permit reaches without a reference count.
//!
//! One cache line that two cores write costs more than everything else on the admit path, and an atomic addition costs as
//! much as the rest of it even where nobody else writes the line. A permit that held an `Arc` would pay for two.
//!
//! So a state that is built takes a *seat* in a table of fixed size, which lives as long as the program: a permit refers to the
//! seat, and needs no count to keep it there. A seat has what the fast paths read, and a *line* of counters for each thread; a
//! thread that has a line to itself adds with a load and a store. When the table is full, and for the many small states
//! of a keyed set, a state *stands*: its permits hold an `Arc`, and its counters are shared. That is slower, and otherwise the
//! same.
//!
//! # How a thread comes by a line of its own
//!
//! A thread takes the lowest free number when it first needs one, and gives it back when it ends; see [`Numbers`]. Line *n* of
//! every seat is written by the thread with number *n* and by nobody else. One more line is for all others: threads beyond the
//! last number, and those that drop a permit while their thread locals are torn down. They add atomically.
//!
//! # How a seat becomes free
//!
//! Every line counts the shares that were begun there and those that were ended there; a share may end on another thread than
//! it began on. Some of the state's own counters count that along: a call that is admitted begins a share, and its outcome ends it.
//! When the last handle is gone only who has a share can begin another, so once the sums are equal nobody refers to the seat.
//! Whoever drops the last handle marks the seat as *closing* and looks at the sums; whoever ends a share looks for that mark, and
//! then at the sums. The end of a share is a `Release` store and the sums are read with `Acquire`: what was done with a share
//! happened before the seat is cleared. A share that ends in the very moment in which the last handle goes may miss the mark while
//! the other misses its end (neither pays for a fence); then the seat is cleared with the next one that is taken or left.
//!
//! # What pairs with what
//!
//! - What a breaker keeps under a lock lies in the seat, so that a failure needs no way to the breaker; it is taken out where
//!   the seat is cleared.
//! - A count: only the owner of a line stores there, by a load and a store, or many by an addition; both with Release, sums
//!   are read with Acquire. So who sees the end of a share sees the counts of it, and clears them too.
//! - The mark: stored by who drops the last handle, who has seen (by the handle's `Arc`) that every share was begun; loaded with
//!   Acquire. So who sees the mark misses no beginning by a handle. One by a share comes before the end of that share: ends are
//!   summed up first, so who sees that end sees the beginning, too.
//! - Clearing is done under the lock of the seat (and in it, for a moment, that of what is kept; nobody takes them the other way
//!   round), where the mark is looked at again. Of two who end the last shares at once, the
//!   later one to lock sees the end of both. What is cleared is handed to the next state by the lock of the taken seats, and to
//!   its threads as the state is.

use crate::breaker::Machine;
use crate::sync::{
    self, Mutex, MutexGuard, array,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    constant, global, local,
};
use std::{
    any::Any,
    cell::Cell,
    ops::{Deref, DerefMut, Range},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError},
};

/// How large the tables are: small in a model, whose every word costs.
#[cfg(not(all(test, portcullis_loom)))]
mod size {
    /// How many states may sit at once. A seat takes 8 kB, of which only those pages exist that were ever used.
    pub(super) const SEATS: usize = 256;
    /// How many threads have lines of their own. Reading a status walks all of them.
    pub(super) const OWN_LINES: usize = 64;
    /// How many counters a state may have.
    pub(super) const COUNTERS: usize = 12;
}
#[cfg(all(test, portcullis_loom))]
mod size {
    pub(super) const SEATS: usize = 2;
    pub(super) const OWN_LINES: usize = 2;
    pub(super) const COUNTERS: usize = 12;
}

use size::{COUNTERS, OWN_LINES, SEATS};

/// How many words a line has. The first are counters of the state's own; two count what was done in one generation of the state,
/// and two its shares.
const WORDS: usize = COUNTERS + 4;
/// The counters each of which counts the end of a share, too, and those that count the beginning of one: so a call writes two words
/// less. All others are the state's own affair.
pub(crate) const ENDINGS: Range<usize> = 0..4;
pub(crate) const BEGINNINGS: Range<usize> = 4..6;
const GENERATION: usize = COUNTERS;
const DONE: usize = COUNTERS + 1;
const BEGUN: usize = COUNTERS + 2;
const ENDED: usize = COUNTERS + 3;

/// Counters that one thread writes, or all those that have no line to themselves. The alignment keeps neighbours (and the line that a prefetcher
/// pulls along) apart.
#[repr(align(128))]
struct Line([AtomicU64; WORDS]);

impl Line {
    constant! {
        fn zero() -> Self {
            Self(array![AtomicU64::new(0); WORDS])
        }
    }

    /// Adds to a line that only this thread writes. `Release`, for the ends of shares; counters order nothing, and a reader that
    /// joined the writing threads sees their sums.
    #[inline]
    fn add_as_owner(&self, counter: usize, n: u64) {
        let count = &self.0[counter];
        count.store(count.load(Ordering::Relaxed).wrapping_add(n), Ordering::Release);
    }

    /// Counts what was done in a generation, from nothing if it is the line's first in that generation; tells the count. Those of
    /// one thread only rise. The count is put back before the generation is named: nobody takes an old count for one of the new
    /// generation.
    #[inline]
    fn count_done(&self, generation: u64) -> u64 {
        if self.0[GENERATION].load(Ordering::Relaxed) != generation {
            self.0[DONE].store(0, Ordering::Release);
            self.0[GENERATION].store(generation, Ordering::Release);
        }
        let done = self.0[DONE].load(Ordering::Relaxed).wrapping_add(1);
        self.0[DONE].store(done, Ordering::Release);
        done
    }

    /// What this line's thread has done in a generation that is not over.
    fn done(&self, generation: u64) -> u64 {
        if self.0[GENERATION].load(Ordering::Acquire) == generation {
            self.0[DONE].load(Ordering::Acquire)
        } else {
            0
        }
    }

    fn add_as_one_of_many(&self, counter: usize, n: u64) {
        self.0[counter].fetch_add(n, Ordering::Release);
    }
}

/// What the fast paths of a state read: words of its own choice, on a line that only changes when the state does.
#[repr(align(128))]
pub(crate) struct Hot {
    pub(crate) words: [AtomicU64; 4],
    /// Whether the last handle is gone and shares are left.
    closing: AtomicBool,
}

impl Hot {
    constant! {
        fn new() -> Self {
            Self {
                words: array![AtomicU64::new(0); 4],
                closing: AtomicBool::new(false),
            }
        }
    }
}

struct Seat {
    hot: Hot,
    /// For the threads without a line.
    shared: Line,
    /// By the number of the thread that writes it.
    own: [Line; OWN_LINES],
    /// What the state keeps under a lock, for those who have a share and record something.
    kept: Kept,
    /// The state that sits here, for those who have a share and need all of it.
    state: Mutex<Option<Arc<dyn Any + Send + Sync>>>,
}

/// What a breaker keeps under a lock. Of its own type and not of any: to ask for the type would be paid for by every failure.
type Kept = Mutex<Option<Box<Machine>>>;

global! {
    static TABLE: [Seat; SEATS] = array![Seat::new(); SEATS];
}

// Which seats are taken.
global! {
    static TAKEN_SEATS: Mutex<[bool; SEATS]> = Mutex::new([false; SEATS]);
}

// How many seats are closing, so that nobody looks for them where there are none.
global! {
    static CLOSING: AtomicUsize = AtomicUsize::new(0);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seat {
    constant! {
        fn new() -> Self {
            Self {
                hot: Hot::new(),
                shared: Line::zero(),
                own: array![Line::zero(); OWN_LINES],
                kept: Mutex::new(None),
                state: Mutex::new(None),
            }
        }
    }

    /// The line that only this thread writes, if it has one.
    #[inline]
    fn own_line(&self) -> Option<&Line> {
        self.own.get(number())
    }

    #[inline]
    fn add(&self, counter: usize, n: u64) {
        match self.own_line() {
            Some(line) => line.add_as_owner(counter, n),
            None => self.add_otherwise(counter, n),
        }
    }

    #[cold]
    #[inline(never)]
    fn add_otherwise(&self, counter: usize, n: u64) {
        if number() == UNSET {
            take_number();
        }
        match self.own_line() {
            Some(line) => line.add_as_owner(counter, n),
            None => self.shared.add_as_one_of_many(counter, n),
        }
    }

    fn lines(&self) -> impl Iterator<Item = &Line> {
        // Nobody has ever written the others.
        let written = NUMBERS.handed_out.load(Ordering::Acquire);
        self.own[..written].iter().chain([&self.shared])
    }

    fn sum(&self, counter: usize) -> u64 {
        self.lines()
            .map(|line| line.0[counter].load(Ordering::Acquire))
            .fold(0, u64::wrapping_add)
    }

    /// Whether every share has ended. Ends are summed up first: who ends a share may have begun another before.
    fn is_left(&self) -> bool {
        let sum =
            |counters: &mut dyn Iterator<Item = usize>| counters.map(|it| self.sum(it)).fold(0, u64::wrapping_add);
        let ended = sum(&mut ENDINGS.chain([ENDED]));
        ended == sum(&mut BEGINNINGS.chain([BEGUN]))
    }

    /// The number of a free seat, if there is one. Seats that were left unnoticed are found here.
    fn take() -> Option<u8> {
        Self::clear_all_left();
        let mut taken = lock(&TAKEN_SEATS);
        let free = taken.iter().position(|taken| !taken)?;
        taken[free] = true;
        u8::try_from(free).ok()
    }

    #[inline]
    fn numbered(number: u8) -> &'static Self {
        &TABLE[usize::from(number)]
    }

    /// Marks that the last handle is gone.
    fn leave(&self) {
        CLOSING.fetch_add(1, Ordering::SeqCst);
        self.hot.closing.store(true, Ordering::SeqCst);
        self.clear_if_left();
        Self::clear_all_left();
    }

    /// Clears those that were left in the moment in which their last share ended, so that nobody noticed.
    fn clear_all_left() {
        if CLOSING.load(Ordering::SeqCst) > 0 {
            TABLE.iter().for_each(Self::clear_for_others);
        }
    }

    /// What panics there when it is dropped is no affair of a thread that happens to come by.
    fn clear_for_others(&self) {
        let _ = catch_unwind(AssertUnwindSafe(|| self.clear_if_left()));
    }

    /// Clears the seat for the next state if the last handle is gone and every share has ended.
    #[cold]
    #[inline(never)]
    fn clear_if_left(&self) {
        if !self.hot.closing.load(Ordering::Acquire) {
            return;
        }
        let mut state = lock(&self.state);
        // Again, under the lock: another may have cleared it and a new state may sit here.
        if !self.hot.closing.load(Ordering::Acquire) || !self.is_left() {
            return;
        }
        let left = (lock(&self.kept).take(), state.take());
        let hot = self.hot.words.iter();
        let counts = self.lines().flat_map(|line| &line.0);
        hot.chain(counts).for_each(|word| word.store(0, Ordering::Relaxed));
        self.hot.closing.store(false, Ordering::Release);
        CLOSING.fetch_sub(1, Ordering::SeqCst);
        drop(state);
        if let Some(place) = TABLE.iter().position(|seat| std::ptr::eq(seat, self)) {
            lock(&TAKEN_SEATS)[place] = false;
        }
        // Outside the locks: listeners are dropped with it.
        drop(left);
    }
}

/// A seat by its number, for those parts of a state that count or publish something there. Good for as long as the state sits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seated(u8);

impl Seated {
    #[inline]
    pub(crate) fn hot(self) -> &'static Hot {
        &Seat::numbered(self.0).hot
    }

    /// The sum of one counter over all lines.
    pub(crate) fn sum(self, counter: usize) -> u64 {
        Seat::numbered(self.0).sum(counter)
    }
}

/// Where a state keeps what the fast paths read, its counters, and what it changes under a lock.
pub(crate) struct Home(HomeKind);

enum HomeKind {
    Seat(u8),
    // The lock is no part of the box, whose alignment would make much of it.
    Standing(Box<Standing>, Kept),
}

pub(crate) struct Standing {
    hot: Hot,
    line: Line,
}

impl Home {
    #[inline]
    pub(crate) fn place(&self) -> Place<'_> {
        match &self.0 {
            HomeKind::Seat(number) => Place::Seat(Seat::numbered(*number)),
            HomeKind::Standing(standing, kept) => Place::Standing(standing, kept),
        }
    }

    /// The number of the seat, in which threads have lines of their own.
    pub(crate) fn seat(&self) -> Option<u8> {
        match self.0 {
            HomeKind::Seat(number) => Some(number),
            HomeKind::Standing(..) => None,
        }
    }

    pub(crate) fn seated(&self) -> Option<Seated> {
        self.seat().map(Seated)
    }

    /// Keeps this under the lock; see [`Place::lock`].
    pub(crate) fn keep(&self, machine: Machine) {
        *lock(self.place().kept()) = Some(Box::new(machine));
    }

    /// The sum of one counter over all lines. It never falls between two calls.
    pub(crate) fn sum(&self, counter: usize) -> u64 {
        match self.place() {
            Place::Seat(seat) => seat.sum(counter),
            Place::Standing(standing, _) => standing.line.0[counter].load(Ordering::Relaxed),
        }
    }
}

/// A home, for whoever has a handle or a share.
#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    #[expect(private_interfaces, reason = "nobody else looks into it")]
    Seat(&'static Seat),
    Standing(&'a Standing, &'a Kept),
}

impl<'a> Place<'a> {
    #[inline]
    pub(crate) fn hot(self) -> &'a Hot {
        match self {
            Self::Seat(seat) => &seat.hot,
            Self::Standing(standing, _) => &standing.hot,
        }
    }

    fn kept(self) -> &'a Kept {
        match self {
            Self::Seat(seat) => &seat.kept,
            Self::Standing(_, kept) => kept,
        }
    }

    /// Locks what [`Home::keep`] was given. No user code may run under the lock: one that is poisoned was left whole.
    #[inline]
    pub(crate) fn lock(self) -> Locked<'a> {
        Locked(lock(self.kept()))
    }

    /// Adds to one of the counters.
    #[inline]
    pub(crate) fn add(self, counter: usize, n: u64) {
        match self {
            Self::Seat(seat) => seat.add(counter, n),
            Self::Standing(standing, _) => standing.line.add_as_one_of_many(counter, n),
        }
    }

    /// What all threads together have done in a generation that is not over. It only grows.
    pub(crate) fn done(self, generation: u64) -> u64 {
        match self {
            Self::Seat(seat) => seat.lines().map(|line| line.done(generation)).sum(),
            Self::Standing(..) => 0,
        }
    }
}

/// What a state keeps, locked.
pub(crate) struct Locked<'a>(MutexGuard<'a, Option<Box<Machine>>>);

const KEPT: &str = "what was given to keep is there while there are handles or shares";

impl Deref for Locked<'_> {
    type Target = Machine;
    #[inline]
    fn deref(&self) -> &Machine {
        self.0.as_deref().expect(KEPT)
    }
}

impl DerefMut for Locked<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Machine {
        self.0.as_deref_mut().expect(KEPT)
    }
}

/// What a state of handles and shares must tell.
pub(crate) trait Homed: Send + Sync + 'static {
    fn home(&self) -> &Home;
}

/// A handle of a state that every clone shares.
pub(crate) struct Striped<T: Homed> {
    /// Where the state sits; here, too, because the hot paths begin here.
    seat: Option<&'static Seat>,
    root: sync::Arc<Root<T>>,
}

struct Root<T: Homed> {
    is_seated: bool,
    /// The number of the seat, if there is one. Apart from whether there is: who looks for it knows that.
    number: u8,
    state: Arc<T>,
}

impl<T: Homed> Drop for Root<T> {
    fn drop(&mut self) {
        if self.is_seated {
            Seat::numbered(self.number).leave();
        }
    }
}

impl<T: Homed> Striped<T> {
    /// A state that sits, if there is a seat left.
    pub(crate) fn new(make: impl FnOnce(Home) -> T) -> Self {
        let Some(number) = Seat::take() else {
            return Self::standing(make);
        };
        let seat = Seat::numbered(number);
        let mut root = Self::with(make, Home(HomeKind::Seat(number)));
        (root.is_seated, root.number) = (true, number);
        *lock(&seat.state) = Some(root.state.clone());
        Self {
            seat: Some(seat),
            root: sync::Arc::new(root),
        }
    }

    /// A state that stands: for many of which each is used little.
    pub(crate) fn standing(make: impl FnOnce(Home) -> T) -> Self {
        let standing = Standing {
            hot: Hot::new(),
            line: Line::zero(),
        };
        let home = Home(HomeKind::Standing(Box::new(standing), Mutex::new(None)));
        Self {
            seat: None,
            root: sync::Arc::new(Self::with(make, home)),
        }
    }

    fn with(make: impl FnOnce(Home) -> T, home: Home) -> Root<T> {
        Root {
            is_seated: false,
            number: 0,
            state: Arc::new(make(home)),
        }
    }

    /// Whether nobody else holds this handle or, of a state that stands, a share.
    pub(crate) fn is_sole(&mut self) -> bool {
        sync::Arc::get_mut(&mut self.root).is_some_and(|root| Arc::get_mut(&mut root.state).is_some())
    }

    #[inline]
    pub(crate) fn hot(&self) -> &Hot {
        match self.seat {
            Some(seat) => &seat.hot,
            None => self.root.state.home().place().hot(),
        }
    }

    /// Adds to one of the counters.
    #[inline]
    pub(crate) fn add(&self, counter: usize, n: u64) {
        match self.seat {
            Some(seat) => seat.add(counter, n),
            None => self.root.state.home().place().add(counter, n),
        }
    }

    /// A share, for a permit, counted as one of [`BEGINNINGS`].
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn count_and_share(&self, counter: usize) -> Share<T> {
        debug_assert!(BEGINNINGS.contains(&counter), "counted as a beginning");
        match self.seat {
            Some(seat) => {
                seat.add(counter, 1);
                Share::Sitting(Sitting(self.root.number))
            }
            None => self.count_and_stand(counter),
        }
    }

    #[inline(never)]
    fn count_and_stand(&self, counter: usize) -> Share<T> {
        self.root.state.home().place().add(counter, 1);
        Share::Standing(self.root.state.clone())
    }

    /// Whether both are handles of one state.
    pub(crate) fn same(&self, other: &Self) -> bool {
        sync::Arc::ptr_eq(&self.root, &other.root)
    }
}

impl<T: Homed> Clone for Striped<T> {
    #[inline]
    fn clone(&self) -> Self {
        Self {
            seat: self.seat,
            root: self.root.clone(),
        }
    }
}

impl<T: Homed> Deref for Striped<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.root.state
    }
}

/// What a permit holds of a state: as long as there is one, the state is there.
pub(crate) enum Share<T: Homed> {
    Sitting(Sitting),
    Standing(Arc<T>),
}

/// A share in a seat: begun, and ended when dropped.
pub(crate) struct Sitting(u8);

impl Drop for Sitting {
    #[inline]
    fn drop(&mut self) {
        self.ending().end();
    }
}

impl Sitting {
    /// A share that was taken apart: the number of its seat is all there is of it.
    #[inline]
    pub(crate) fn of(number: u8) -> Self {
        Self(number)
    }

    #[inline]
    fn seat(&self) -> &'static Seat {
        Seat::numbered(self.0)
    }

    #[inline]
    pub(crate) fn hot(&self) -> &'static Hot {
        &self.seat().hot
    }

    /// One more share, while there is this one.
    pub(crate) fn another(&self) -> Self {
        self.seat().add(BEGUN, 1);
        Self(self.0)
    }

    /// Counts one as done in a generation, and tells how many this thread has done; zero, and nothing has happened, if the thread
    /// has no line to itself.
    #[inline]
    pub(crate) fn count_done(&self, generation: u64) -> u64 {
        self.seat().own_line().map_or(0, |line| line.count_done(generation))
    }

    /// The end of this share, apart from it: the share is to be forgotten before it is ended, for to end the last one drops the
    /// state, and what listeners hold may panic.
    #[inline]
    pub(crate) fn ending(&self) -> Ending {
        Ending(self.seat())
    }
}

/// The end of a share that was forgotten.
#[must_use = "a share that is never ended keeps its seat"]
pub(crate) struct Ending(&'static Seat);

impl Ending {
    #[inline]
    pub(crate) fn end(self) {
        self.end_as(ENDED);
    }

    /// Ends the share with a count, one of [`ENDINGS`].
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn count_and_end(self, counter: usize) {
        debug_assert!(ENDINGS.contains(&counter), "counted as an end");
        self.end_as(counter);
    }

    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    fn end_as(self, counter: usize) {
        let Self(seat) = self;
        seat.add(counter, 1);
        if seat.hot.closing.load(Ordering::Acquire) {
            seat.clear_if_left();
        }
    }
}

impl<T: Homed> Share<T> {
    /// Takes the share apart: the number of its seat, or its state if that stands. Nothing ends it but the one that is
    /// [put together](Self::of) again.
    #[expect(clippy::inline_always, reason = "every call passes, and most of it folds away")]
    #[inline(always)]
    pub(crate) fn into_parts(self) -> (u8, Option<Arc<T>>) {
        match self {
            Self::Sitting(sitting) => {
                let number = sitting.0;
                std::mem::forget(sitting);
                (number, None)
            }
            Self::Standing(state) => (0, Some(state)),
        }
    }

    /// Puts a share together again.
    #[inline]
    pub(crate) fn of(number: u8, standing: Option<Arc<T>>) -> Self {
        match standing {
            Some(state) => Self::Standing(state),
            None => Self::Sitting(Sitting(number)),
        }
    }

    /// Ends it with a count, one of [`ENDINGS`].
    pub(crate) fn count_and_end(self, counter: usize) {
        match self {
            Self::Sitting(sitting) => {
                let ending = sitting.ending();
                std::mem::forget(sitting);
                ending.count_and_end(counter);
            }
            Self::Standing(state) => state.home().place().add(counter, 1),
        }
    }

    #[inline]
    pub(crate) fn place(&self) -> Place<'_> {
        match self {
            Self::Sitting(sitting) => Place::Seat(sitting.seat()),
            Self::Standing(state) => state.home().place(),
        }
    }

    /// The whole state, for what is not hot.
    #[cold]
    #[inline(never)]
    pub(crate) fn state(&self) -> Arc<T> {
        match self {
            Self::Sitting(sitting) => {
                let state = lock(&sitting.seat().state).clone();
                match state.map(Arc::downcast) {
                    Some(Ok(state)) => state,
                    _ => unreachable!("a state stays in its seat while there are shares"),
                }
            }
            Self::Standing(state) => state.clone(),
        }
    }
}

/// Which numbers are taken, a bit each. The lock also hands a line over: what the thread before wrote there happened before
/// its number was given back, and that before the next thread takes it.
struct Numbers {
    taken: Mutex<u64>,
    /// Above every number that was ever handed out. It is raised before its thread writes a line: who sees what is written, because
    /// it happened before, sees this as well.
    handed_out: AtomicUsize,
}

global! {
    static NUMBERS: Numbers = Numbers {
        taken: Mutex::new(0),
        handed_out: AtomicUsize::new(0),
    };
}

impl Numbers {
    /// The lowest free number, if there is one.
    fn take(&self) -> Option<usize> {
        let mut taken = lock(&self.taken);
        let number = taken.trailing_ones() as usize;
        if number >= OWN_LINES {
            return None;
        }
        *taken |= 1 << number;
        self.handed_out.fetch_max(number + 1, Ordering::AcqRel);
        Some(number)
    }

    fn give_back(&self, number: usize) {
        *lock(&self.taken) &= !(1 << number);
    }
}

/// A thread's number, until the thread ends.
struct Taken(usize);

impl Drop for Taken {
    fn drop(&mut self) {
        // What other thread locals still drop after this is counted in the line of all.
        set_number(NONE);
        NUMBERS.give_back(self.0);
    }
}

/// In place of a number: not asked for yet, or none to be had. Neither is the number of a line.
const UNSET: usize = usize::MAX;
const NONE: usize = usize::MAX - 1;

// Without a destructor, so there is no moment at which it cannot be read, and nothing to look at before it is.
local! {
    static NUMBER: Cell<usize> = Cell::new(UNSET);
}
local! {
    static TAKEN: Cell<Option<Taken>> = Cell::new(None);
}

/// This thread's number. A model takes the thread locals away all at once, this one too.
#[inline]
fn number() -> usize {
    NUMBER.try_with(Cell::get).unwrap_or(NONE)
}

/// A number that no other thread has, once this one has counted something; until then, and for threads beyond the last line, some
/// large number. For those who deal something to threads.
#[inline]
pub(crate) fn thread_number() -> usize {
    number()
}

fn set_number(number: usize) {
    let _ = NUMBER.try_with(|mine| mine.set(number));
}

fn take_number() {
    // Where the thread is ending already nobody would give a number back.
    let number = TAKEN.try_with(|kept| {
        let number = NUMBERS.take()?;
        kept.set(Some(Taken(number)));
        Some(number)
    });
    set_number(number.ok().flatten().unwrap_or(NONE));
}

#[cfg(all(test, portcullis_loom))]
pub(crate) mod model;
