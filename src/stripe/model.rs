//! Models of the seats and the shares in them, and of the numbers of threads.

use super::*;
use crate::sync::{explore, spawn};
// What the models themselves remember is no step of theirs.
use std::sync::atomic::AtomicUsize;

/// Gives this thread's number back. loom takes the statics away when the first thread ends, and does not wait until the others
/// have dropped their thread locals.
pub(crate) fn end_thread() {
    drop(TAKEN.with(Cell::take));
}

/// A state that tells when it is dropped.
struct Watched {
    home: Home,
    watch: Arc<Watch>,
}

#[derive(Default)]
struct Watch {
    /// Shares whose end has not begun.
    shares: AtomicUsize,
    dropped: AtomicUsize,
}

impl Homed for Watched {
    fn home(&self) -> &Home {
        &self.home
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        assert_eq!(
            self.watch.shares.load(Ordering::SeqCst),
            0,
            "dropped before its last share ended"
        );
        self.watch.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

impl Watch {
    fn dropped(&self) -> usize {
        self.dropped.load(Ordering::SeqCst)
    }
}

fn seated() -> (Striped<Watched>, Arc<Watch>) {
    let watch = Arc::new(Watch::default());
    let watched = watch.clone();
    let handle = Striped::new(|home| Watched { home, watch: watched });
    (handle, watch)
}

fn seat(handle: &Striped<Watched>) -> &'static Seat {
    handle.seat.expect("there are seats enough")
}

/// What the models count at the two ends of a share, and apart from any.
const BEGINNING: usize = BEGINNINGS.start;
const ENDING: usize = ENDINGS.start;
const APART: usize = BEGINNINGS.end;

/// A share, in the way of the fast paths: with a count.
fn begin(handle: &Striped<Watched>) -> Share<Watched> {
    handle.watch.shares.fetch_add(1, Ordering::SeqCst);
    handle.count_and_share(BEGINNING)
}

/// Ends a share with a count, and in its way looks at the state.
fn end(share: Share<Watched>, watch: &Watch) {
    watch.shares.fetch_sub(1, Ordering::SeqCst);
    match &share {
        Share::Sitting(sitting) => {
            let ending = sitting.ending();
            std::mem::forget(share);
            ending.count_and_end(ENDING);
        }
        Share::Standing(_) => share.place().add(ENDING, 1),
    }
}

/// Whether the seat waits for the next state that is taken or left: the one case in which it is not cleared at once.
fn is_left(seat: &Seat) -> bool {
    seat.hot.closing.load(Ordering::Acquire) && seat.is_left()
}

fn is_empty(seat: &Seat) -> bool {
    (0..WORDS).all(|counter| seat.sum(counter) == 0) && lock(&seat.state).is_none()
}

#[test]
fn a_share_ends_while_the_last_handle_goes() {
    explore("a share ends while the last handle goes", 3, || {
        let (handle, watch) = seated();
        let (other, _) = seated();
        let seat = seat(&handle);
        let share = begin(&handle);
        let goes = spawn(move || drop(handle));
        end(share, &watch);
        goes.join().unwrap();
        if watch.dropped() == 0 {
            assert!(is_left(seat), "neither cleared nor left to clear");
            drop(other);
        }
        assert_eq!(watch.dropped(), 1);
        assert!(is_empty(seat));
    });
}

/// Who ends a share may have begun another before, for what is still to do.
#[test]
fn a_share_ends_and_another_goes_on_while_the_last_handle_goes() {
    explore("a share ends and another goes on", 3, || {
        let (handle, watch) = seated();
        let (other, _) = seated();
        let seat = seat(&handle);
        let Share::Sitting(first) = begin(&handle) else {
            unreachable!("there are seats enough");
        };
        let goes = spawn(move || drop(handle));
        let second = first.another();
        watch.shares.fetch_add(1, Ordering::SeqCst);
        end(Share::Sitting(first), &watch);
        let second = Share::<Watched>::Sitting(second);
        drop(second.state());
        watch.shares.fetch_sub(1, Ordering::SeqCst);
        drop(second);
        goes.join().unwrap();
        if watch.dropped() == 0 {
            assert!(is_left(seat), "neither cleared nor left to clear");
            drop(other);
        }
        assert_eq!(watch.dropped(), 1);
        assert!(is_empty(seat));
    });
}

#[test]
fn one_who_takes_and_one_who_leaves_clear_what_was_left() {
    explore("a seat that was left is cleared once", 2, || {
        let (handle, watch) = seated();
        let (other, _) = seated();
        let left = seat(&handle);
        let share = begin(&handle);
        let goes = spawn(move || {
            drop(handle);
            drop(other);
        });
        end(share, &watch);
        let (taken, _) = seated();
        goes.join().unwrap();
        // The one may have come before the last handle went, and the other may not have seen the end of the share.
        if watch.dropped() == 0 {
            assert!(is_left(left), "neither cleared nor left to clear");
            drop(taken);
            seated();
        }
        assert_eq!(watch.dropped(), 1);
    });
}

#[test]
fn the_last_of_two_shares_clears_the_seat_at_once() {
    explore("two shares end after the last handle", 2, || {
        let (handle, watch) = seated();
        let seat = seat(&handle);
        let (one, two) = (begin(&handle), begin(&handle));
        drop(handle);
        assert_eq!(watch.dropped(), 0, "dropped before its shares ended");
        let watched = watch.clone();
        let ends = spawn(move || end(one, &watched));
        end(two, &watch);
        ends.join().unwrap();
        assert_eq!(watch.dropped(), 1);
        assert!(is_empty(seat));
    });
}

#[test]
fn a_share_that_begins_on_one_thread_and_ends_on_another_is_counted_once() {
    explore("a share moves to another thread", 2, || {
        let (handle, watch) = seated();
        let seat = seat(&handle);
        let (clone, watched) = (handle.clone(), watch.clone());
        let begins = spawn(move || begin(&clone));
        end(begin(&handle), &watch);
        end(begins.join().unwrap(), &watched);
        assert_eq!((handle.home.sum(BEGINNING), handle.home.sum(ENDING)), (2, 2));
        drop(handle);
        assert_eq!(watch.dropped(), 1, "nothing ended while the last handle went");
        assert!(is_empty(seat));
    });
}

#[test]
fn the_next_state_in_a_seat_counts_none_of_the_shares_before() {
    explore("a seat is used again", 2, || {
        let (handle, watch) = seated();
        // So that the next one sits where this one does, or stands.
        let (other, _) = seated();
        let share = begin(&handle);
        let old = spawn(move || end(share, &watch));
        drop(handle);
        let (next, watched) = seated();
        let ended = begin(&next);
        let new = spawn(move || end(ended, &watched));
        old.join().unwrap();
        new.join().unwrap();
        assert_eq!((next.home.sum(BEGINNING), next.home.sum(ENDING)), (1, 1));
        drop(other);
    });
}

#[test]
fn a_share_finds_its_state_until_it_ends() {
    explore("a share asks for its state", 2, || {
        let (handle, watch) = seated();
        let (one, two) = (begin(&handle), begin(&handle));
        let (watched, goes) = (watch.clone(), spawn(move || drop(handle)));
        let asks = spawn(move || {
            assert_eq!(one.state().watch.dropped(), 0);
            end(one, &watched);
        });
        assert_eq!(two.state().watch.dropped(), 0);
        end(two, &watch);
        goes.join().unwrap();
        asks.join().unwrap();
    });
}

#[test]
fn counters_are_exact_however_lines_are_handed_over() {
    explore("lines are handed over", 2, || {
        let (handle, _) = seated();
        // More threads than lines: one adds where all the others do, or in the line of one that has ended.
        let counts = |times| {
            let handle = handle.clone();
            spawn(move || (0..times).for_each(|_| handle.add(APART, 1)))
        };
        let (one, two) = (counts(2), counts(2));
        one.join().unwrap();
        let three = counts(1);
        handle.add(APART, 1);
        two.join().unwrap();
        three.join().unwrap();
        assert_eq!(handle.home.sum(APART), 6);
    });
}

#[test]
fn a_sum_never_falls() {
    explore("a sum is read twice", 3, || {
        let (handle, _) = seated();
        let counts = || {
            let handle = handle.clone();
            spawn(move || handle.add(APART, 1))
        };
        let (one, two) = (counts(), counts());
        let (first, second) = (handle.home.sum(APART), handle.home.sum(APART));
        assert!(first <= second);
        one.join().unwrap();
        two.join().unwrap();
        assert_eq!(handle.home.sum(APART), 2);
    });
}

#[test]
fn threads_that_have_no_number_share_a_line_and_lose_nothing() {
    explore("two threads share a line", 3, || {
        let (handle, watch) = seated();
        let seat = seat(&handle);
        // As if others had them all.
        while NUMBERS.take().is_some() {}
        let (clone, watched) = (handle.clone(), watch.clone());
        let counts = spawn(move || end(begin(&clone), &watched));
        end(begin(&handle), &watch);
        counts.join().unwrap();
        assert_eq!((handle.home.sum(BEGINNING), handle.home.sum(ENDING)), (2, 2));
        drop(handle);
        assert_eq!(watch.dropped(), 1, "nothing ended while the last handle went");
        assert!(is_empty(seat));
    });
}

#[test]
fn what_a_thread_counts_while_it_ends_is_counted_where_nobody_else_stores() {
    explore("a number is given back, and more is counted", 3, || {
        let (handle, _) = seated();
        let clone = handle.clone();
        let ends = spawn(move || {
            clone.add(APART, 1);
            end_thread();
            clone.add(APART, 1);
        });
        (0..2).for_each(|_| handle.add(APART, 1));
        ends.join().unwrap();
        assert_eq!(handle.home.sum(APART), 4);
    });
}
