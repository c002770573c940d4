//! Pins how callers wait for a rate limiter: in order, without waste, and free to leave at any point.

mod limiters;

use limiters::{NANOSECOND, SECOND, YEAR, acquire_when_told, just_before, limiter, wait_of};
use portcullis::{Acquire, Adaptive, Algorithm, Outcome, RateLimitPermit, RateLimiter, Reason, Rejected};
use portcullis::{SlidingWindow, TokenBucket, Verdict};
use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};
use tokio_test::{
    assert_pending, assert_ready,
    task::{Spawn, spawn},
};

/// One call a second, of each kind.
fn one_a_second() -> [Algorithm; 3] {
    [
        TokenBucket::new(1, SECOND).into(),
        SlidingWindow::new(1, SECOND).into(),
        Adaptive::new(1).window(SECOND).into(),
    ]
}

/// A wait that has taken its place in line.
fn waiting(acquire: Acquire) -> Spawn<Acquire> {
    let mut waiting = spawn(acquire);
    assert_pending!(waiting.poll(), "there is nothing to have yet");
    waiting
}

fn admitted(waiting: &mut Spawn<Acquire>) -> RateLimitPermit {
    assert!(waiting.is_woken(), "a waiter is woken when it is its turn");
    assert_ready!(waiting.poll(), "a woken waiter whose time has come is served").expect("admitted")
}

/// Polls as an executor would, until it is quiet.
fn settle_down(waiting: &mut Spawn<Acquire>) {
    for _ in 0..2 {
        if waiting.is_woken() {
            assert_pending!(waiting.poll(), "its time has not come");
        }
    }
    assert!(!waiting.is_woken(), "no busy loop");
}

fn refused(waiting: &mut Spawn<Acquire>) -> Rejected {
    assert_ready!(waiting.poll(), "the answer is known").expect_err("refused")
}

#[test]
fn a_free_limiter_answers_at_the_first_poll() {
    for algorithm in one_a_second() {
        let (_, limiter) = limiter(algorithm);
        let permit = assert_ready!(spawn(limiter.acquire()).poll(), "there was room").expect("admitted");
        assert_eq!(permit.cost(), 1);
        assert_eq!(limiter.status().accepted_requests, 1);
    }
}

#[test]
fn a_wait_does_nothing_before_it_is_polled() {
    let (_, limiter) = limiter(TokenBucket::new(1, SECOND));
    let unpolled = limiter.acquire();
    assert_eq!(limiter.status().waiting, 0, "not in line");
    assert!(limiter.try_acquire().is_ok(), "and nothing taken");
    drop(unpolled);
    assert_eq!(limiter.status().accepted_requests, 1);
}

#[test]
fn waiters_are_served_in_order_of_arrival() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let mut line: Vec<_> = (0..4).map(|_| waiting(limiter.acquire())).collect();
        for turn in 0..4 {
            assert_eq!(limiter.status().waiting, 4 - turn, "{algorithm:?}");
            clock.advance(just_before(SECOND));
            for waiter in &mut line[turn..] {
                assert_pending!(waiter.poll(), "one nanosecond early");
            }
            clock.advance(NANOSECOND);
            // The last in line asks first; it is not its turn.
            for later in line[turn + 1..].iter_mut().rev() {
                assert_pending!(
                    later.poll(),
                    "turn {turn}: nobody is served before those who came earlier"
                );
            }
            drop(admitted(&mut line[turn]));
        }
        assert_eq!(limiter.status().accepted_requests, 5);
    }
}

#[test]
fn a_small_request_does_not_pass_a_large_one() {
    let (clock, limiter) = limiter(TokenBucket::new(10, 10 * SECOND));
    limiter.try_acquire_n(10).unwrap();
    let mut large = waiting(limiter.acquire_n(7));
    let mut small = waiting(limiter.acquire_n(1));
    let mut middle = waiting(limiter.acquire_n(2));
    clock.advance(6 * SECOND);
    assert_pending!(small.poll(), "six tokens are there, and they are the large one's");
    assert_eq!(wait_of(limiter.try_acquire()), 5 * SECOND, "1 + 1 + 2 come first");
    clock.advance(SECOND);
    admitted(&mut large);
    assert_pending!(small.poll());
    clock.advance(SECOND);
    admitted(&mut small);
    clock.advance(SECOND);
    assert_pending!(middle.poll());
    clock.advance(SECOND);
    admitted(&mut middle);
    assert_eq!(limiter.status().accepted_cost, 20);
}

#[test]
fn try_acquire_never_overtakes() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let mut first = waiting(limiter.acquire());
        let mut second = waiting(limiter.acquire());
        assert_eq!(wait_of(limiter.try_acquire()), 3 * SECOND, "two are before us");
        assert_eq!(limiter.status().retry_after, Some(3 * SECOND), "the status says so too");
        assert_eq!(limiter.status().waiting, 2);
        clock.advance(SECOND);
        assert_eq!(
            wait_of(limiter.try_acquire()),
            2 * SECOND,
            "the first waiter's second has come, and is the waiter's although it has not looked yet"
        );
        admitted(&mut first);
        clock.advance(SECOND);
        wait_of(limiter.try_acquire());
        admitted(&mut second);
        clock.advance(SECOND);
        assert!(limiter.try_acquire().is_ok(), "nobody waits any more");
    }
}

#[test]
fn a_free_request_waits_for_nobody() {
    let (_, limiter) = limiter(TokenBucket::new(1, SECOND));
    limiter.try_acquire().unwrap();
    let mut first = waiting(limiter.acquire());
    assert!(
        limiter.try_acquire_n(0).is_ok(),
        "a cost of zero takes nothing from anybody"
    );
    assert_ready!(spawn(limiter.acquire_n(0)).poll()).unwrap();
    assert_pending!(first.poll());
}

#[test]
fn a_cost_above_the_burst_is_never_waited_for() {
    for (algorithm, burst) in [
        (Algorithm::from(TokenBucket::new(10, SECOND).burst(3)), 3),
        (SlidingWindow::new(3, SECOND).into(), 3),
        (Adaptive::new(10).window(SECOND).burst(3).into(), 3),
    ] {
        let (_, limiter) = limiter(algorithm);
        for acquire in [limiter.acquire_n(4), limiter.acquire_within(4, YEAR)] {
            let rejected = refused(&mut spawn(acquire));
            assert_eq!(rejected.reason, Reason::CostExceedsBurst { cost: 4, burst });
            assert_eq!(rejected.retry_after, None, "no wait would help");
        }
        assert_eq!(limiter.status().rejected.cost_exceeds_burst, 2, "each is counted once");
        assert_eq!(limiter.status().waiting, 0);
    }
}

#[test]
fn one_tick_of_the_timer_serves_all_who_are_due() {
    for algorithm in [
        Algorithm::from(TokenBucket::new(3, 3 * SECOND)),
        SlidingWindow::new(3, 3 * SECOND).into(),
        Adaptive::new(3).window(3 * SECOND).into(),
    ] {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire_n(3).unwrap();
        let mut line: Vec<_> = (0..4).map(|_| waiting(limiter.acquire())).collect();
        clock.advance(3 * SECOND);
        admitted(&mut line[0]);
        for waiter in &mut line[1..3] {
            admitted(waiter);
        }
        assert_pending!(line[3].poll(), "three were due");
        assert_eq!(limiter.status().waiting, 1);
    }
}

#[test]
fn a_wait_that_cannot_fit_is_refused_at_once() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let rejected = refused(&mut spawn(limiter.acquire_within(1, just_before(SECOND))));
        assert_eq!(
            (rejected.reason, rejected.retry_after),
            (Reason::OverLimit, Some(SECOND))
        );
        assert_eq!(limiter.status().waiting, 0, "it never stood in line");
        let mut fits = waiting(limiter.acquire_within(1, SECOND));
        let behind = refused(&mut spawn(limiter.acquire_within(1, just_before(2 * SECOND))));
        assert_eq!(behind.retry_after, Some(2 * SECOND), "those before it count");
        let mut fits_too = waiting(limiter.acquire_within(1, 2 * SECOND));
        clock.advance(SECOND);
        admitted(&mut fits);
        clock.advance(SECOND);
        admitted(&mut fits_too);
        let status = limiter.status();
        assert_eq!(
            (status.accepted_requests, status.rejected_requests),
            (3, 2),
            "each answer is counted once"
        );
    }
}

#[test]
fn a_wait_of_nothing_is_a_try() {
    for algorithm in one_a_second() {
        let (_, limiter) = limiter(algorithm);
        assert_ready!(spawn(limiter.acquire_within(1, Duration::ZERO)).poll()).expect("there was room");
        assert_eq!(
            refused(&mut spawn(limiter.acquire_within(1, Duration::ZERO))).retry_after,
            Some(SECOND)
        );
    }
}

#[test]
fn a_wait_without_end_may_be_asked_for() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let mut patient = waiting(limiter.acquire_within(1, Duration::MAX));
        clock.advance(SECOND);
        admitted(&mut patient);
    }
}

#[test]
fn where_time_ends_a_wait_waits_for_what_is_given_back() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        clock.advance(Duration::MAX);
        let permit = limiter.try_acquire().expect("full");
        let mut front = waiting(limiter.acquire());
        let mut second = waiting(limiter.acquire());
        assert!(!front.is_woken() && !second.is_woken(), "no busy loop");
        permit.unused();
        drop(admitted(&mut front));
        settle_down(&mut second);
        clock.advance(SECOND);
        assert!(!second.is_woken(), "no time passes there");
        assert_eq!(limiter.status().waiting, 1);
    }
}

#[test]
fn a_wait_that_did_not_fit_after_all_is_refused_at_its_deadline() {
    let (clock, limiter) = limiter(TokenBucket::new(1, SECOND));
    let reserved = limiter.try_acquire().unwrap();
    let mut late = waiting(limiter.acquire_within(1, 3 * SECOND / 2));
    // The call before it turns out to have cost twice as much.
    reserved.settle(Verdict::new(Outcome::Success).cost(2));
    clock.advance(SECOND);
    assert_pending!(late.poll(), "its token has been used by the call before");
    clock.advance(just_before(SECOND / 2));
    assert_pending!(late.poll(), "its time is not over yet");
    clock.advance(NANOSECOND);
    assert!(late.is_woken(), "the deadline wakes it");
    let rejected = refused(&mut late);
    assert_eq!(
        (rejected.reason, rejected.retry_after),
        (Reason::OverLimit, Some(SECOND / 2))
    );
    assert_eq!(limiter.status().waiting, 0, "it has left the line");
    clock.advance(SECOND / 2);
    assert!(limiter.try_acquire().is_ok(), "and holds up nobody");
}

#[test]
fn who_gives_up_in_the_middle_of_the_line_is_told_when_its_turn_would_have_been() {
    let (clock, limiter) = limiter(TokenBucket::new(1, SECOND).burst(10));
    let reserved = limiter.try_acquire_n(10).unwrap();
    let mut first = waiting(limiter.acquire());
    let _second = waiting(limiter.acquire());
    let mut third = waiting(limiter.acquire_within(2, 4 * SECOND));
    let _fourth = waiting(limiter.acquire());
    clock.advance(SECOND);
    admitted(&mut first);
    // The call before them turns out to have cost five more.
    reserved.settle(Verdict::new(Outcome::Success).cost(15));
    clock.advance(3 * SECOND);
    assert_eq!(refused(&mut third).retry_after, Some(5 * SECOND), "one is before it");
}

#[test]
fn who_gives_up_is_told_its_turn_whoever_was_served_before_it_came() {
    let (clock, limiter) = limiter(TokenBucket::new(1, SECOND).burst(10));
    let reserved = limiter.try_acquire_n(10).unwrap();
    let mut first = waiting(limiter.acquire());
    clock.advance(SECOND);
    admitted(&mut first);
    let _second = waiting(limiter.acquire());
    let mut third = waiting(limiter.acquire_within(2, 3 * SECOND));
    let _fourth = waiting(limiter.acquire());
    // The call before them turns out to have cost five more.
    reserved.settle(Verdict::new(Outcome::Success).cost(15));
    clock.advance(3 * SECOND);
    assert_eq!(refused(&mut third).retry_after, Some(5 * SECOND), "one is before it");
}

#[test]
fn who_comes_to_a_window_is_told_when_those_who_wait_leave_it_room() {
    let (clock, limiter) = limiter(SlidingWindow::new(2, 60 * SECOND));
    limiter.try_acquire().unwrap();
    clock.advance(10 * SECOND);
    limiter.try_acquire().unwrap();
    let mut line = Vec::new();
    // Two places come back 50 and 60 seconds from now, and each again a window after it was taken.
    for wait in [50, 60, 110, 120, 170] {
        assert_eq!(
            limiter.status().retry_after,
            Some(wait * SECOND),
            "behind {}",
            line.len()
        );
        assert_eq!(wait_of(limiter.try_acquire()), wait * SECOND, "behind {}", line.len());
        line.push(waiting(limiter.acquire()));
    }
}

#[test]
fn who_tries_when_all_who_waited_have_been_served_gets_what_is_left() {
    for algorithm in [
        Algorithm::from(TokenBucket::new(1, SECOND).burst(3)),
        SlidingWindow::new(3, SECOND).into(),
        Adaptive::new(1).window(SECOND).burst(3).into(),
    ] {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire_n(3).unwrap();
        let mut waiter = waiting(limiter.acquire());
        clock.advance(3 * SECOND);
        assert!(limiter.try_acquire().is_ok(), "three have come back, and one waited");
        admitted(&mut waiter);
    }
}

#[test]
fn what_a_call_turns_out_not_to_have_cost_goes_to_who_waits_at_once() {
    let (_clock, limiter) = limiter(TokenBucket::new(2, 2 * SECOND));
    let reserved = limiter.try_acquire_n(2).unwrap();
    let mut next = waiting(limiter.acquire());
    reserved.settle(Verdict::new(Outcome::Success).cost(1));
    assert_eq!(limiter.status().waiting, 0, "served before it looks");
    assert!(next.is_woken());
    admitted(&mut next);
    assert!(limiter.try_acquire().is_err());
}

#[test]
fn who_leaves_the_line_lets_the_others_move_up() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let first = waiting(limiter.acquire());
        let mut second = waiting(limiter.acquire());
        let third = waiting(limiter.acquire());
        let mut fourth = waiting(limiter.acquire());
        drop(first);
        assert!(second.is_woken(), "the new front sets its timer anew");
        assert_pending!(second.poll());
        drop(third);
        assert_eq!(limiter.status().waiting, 2);
        clock.advance(SECOND);
        admitted(&mut second);
        assert_pending!(fourth.poll());
        clock.advance(SECOND);
        admitted(&mut fourth);
    }
}

#[test]
fn who_leaves_after_being_woken_takes_nothing() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let first = waiting(limiter.acquire());
        let mut second = waiting(limiter.acquire());
        clock.advance(SECOND);
        assert!(first.is_woken());
        drop(first);
        admitted(&mut second);
        assert_eq!(limiter.status().accepted_requests, 2, "who left was never admitted");
    }
}

#[test]
fn who_leaves_after_being_served_gives_back() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let first = waiting(limiter.acquire());
        let mut second = waiting(limiter.acquire());
        clock.advance(SECOND);
        // Whoever comes by serves those who are due.
        assert_eq!(wait_of(limiter.try_acquire()), 2 * SECOND);
        assert_eq!(
            limiter.status().waiting,
            1,
            "the first is served and does not know it yet"
        );
        drop(first);
        admitted(&mut second);
        assert_eq!(limiter.status().waiting, 0);
        wait_of(limiter.try_acquire());
    }
}

#[test]
fn who_leaves_when_several_are_due_takes_no_room_from_them() {
    for algorithm in [
        Algorithm::from(TokenBucket::new(2, 10 * SECOND)),
        SlidingWindow::new(2, 10 * SECOND).into(),
        Adaptive::new(2).window(10 * SECOND).into(),
    ] {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire_n(2).unwrap();
        let first = waiting(limiter.acquire());
        let mut others = [waiting(limiter.acquire()), waiting(limiter.acquire())];
        clock.advance(10 * SECOND);
        drop(first);
        for other in &mut others {
            admitted(other);
        }
    }
}

#[test]
fn a_refund_serves_who_waits() {
    for algorithm in one_a_second() {
        let (_, limiter) = limiter(algorithm);
        let permit = limiter.try_acquire().unwrap();
        let mut first = waiting(limiter.acquire());
        permit.unused();
        admitted(&mut first);
    }
}

#[test]
fn a_refund_that_is_not_enough_brings_the_time_nearer() {
    for algorithm in [
        Algorithm::from(TokenBucket::new(2, 10 * SECOND)),
        Adaptive::new(2).window(10 * SECOND).into(),
    ] {
        for by_verdict in [false, true] {
            let (clock, limiter) = limiter(algorithm);
            limiter.try_acquire().unwrap();
            let permit = limiter.try_acquire().unwrap();
            let mut waiter = waiting(limiter.acquire_n(2));
            if by_verdict {
                permit.settle(Verdict::new(Outcome::Ignored).cost(0));
            } else {
                permit.unused();
            }
            let _ = waiter.poll();
            clock.advance(5 * SECOND);
            admitted(&mut waiter);
        }
    }
}

#[test]
fn a_front_that_gets_a_part_back_is_woken_to_look_again() {
    let (clock, limiter) = limiter(TokenBucket::new(2, 10 * SECOND));
    limiter.try_acquire().unwrap();
    let permit = limiter.try_acquire().unwrap();
    let mut waiter = waiting(limiter.acquire_n(2));
    permit.unused();
    // Nobody else comes by: the waiter itself must have set its timer anew.
    settle_down(&mut waiter);
    clock.advance(5 * SECOND);
    admitted(&mut waiter);
}

#[test]
fn a_waiter_sees_the_rate_rise_while_it_waits() {
    // A poll that nobody asked for forgets nothing.
    for polled_for_nothing in [false, true] {
        let (clock, limiter) = limiter(
            Adaptive::new(10)
                .burst(20)
                .window(60 * SECOND)
                .minimum_calls(1)
                .adjustment_factor(0.5),
        );
        let permit = limiter.try_acquire_n(20).unwrap();
        let mut waiter = waiting(limiter.acquire_n(20));
        clock.advance(30 * SECOND);
        permit.settle(Outcome::Success);
        if polled_for_nothing {
            assert_pending!(waiter.poll());
        }
        clock.advance(30 * SECOND);
        // The window has ended with a success: 10 tokens are there, 15 a minute come from now on. Nobody else comes by.
        assert!(waiter.is_woken(), "the end of the window may bring its time nearer");
        settle_down(&mut waiter);
        clock.advance(just_before(40 * SECOND));
        assert!(!waiter.is_woken(), "not before the tokens are there");
        clock.advance(NANOSECOND);
        admitted(&mut waiter);
    }
}

#[test]
fn a_waiter_that_is_the_front_sees_every_rise_of_the_rate() {
    let adaptive = Adaptive::new(10).burst(40).window(60 * SECOND).minimum_calls(1);
    let (clock, limiter) = limiter(adaptive.adjustment_factor(0.5));
    let permits = [limiter.try_acquire_n(20).unwrap(), limiter.try_acquire_n(20).unwrap()];
    let mut waiter = waiting(limiter.acquire_n(40));
    let [in_the_first, in_the_second] = permits;
    clock.advance(30 * SECOND);
    in_the_first.settle(Outcome::Success);
    settle_down(&mut waiter);
    clock.advance(30 * SECOND);
    // 15 a minute from now on.
    settle_down(&mut waiter);
    clock.advance(30 * SECOND);
    // More than half of what the rate brings in a window.
    in_the_second.settle(Verdict::new(Outcome::Success).cost(28));
    settle_down(&mut waiter);
    clock.advance(30 * SECOND);
    // 10 and 15 have come, 8 of them are used; 20 a minute from now on. Nobody else comes by.
    assert!(waiter.is_woken(), "the end of the window may bring its time nearer");
    settle_down(&mut waiter);
    clock.advance(60 * SECOND);
    settle_down(&mut waiter);
    clock.advance(just_before(9 * SECOND));
    assert!(!waiter.is_woken(), "23 are missing at the end of the second window");
    clock.advance(NANOSECOND);
    admitted(&mut waiter);
}

#[test]
fn a_waiter_that_is_never_polled_again_holds_up_nobody() {
    for algorithm in [
        Algorithm::from(TokenBucket::new(1, SECOND).burst(3)),
        Adaptive::new(1).window(SECOND).burst(3).into(),
    ] {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire_n(3).unwrap();
        let forgotten = waiting(limiter.acquire());
        let forgotten_too = waiting(limiter.acquire());
        let mut third = waiting(limiter.acquire());
        clock.advance(3 * SECOND);
        admitted(&mut third);
        clock.advance(SECOND);
        assert!(limiter.try_acquire().is_ok(), "{algorithm:?}: nor those who come later");
        drop((forgotten, forgotten_too));
    }
}

/// A window counts from the moment somebody is served, so a place in it that nobody fetches costs the others a window, no more.
#[test]
fn a_waiter_that_is_never_polled_again_does_not_block_a_window() {
    let (clock, limiter) = limiter(SlidingWindow::new(1, SECOND));
    limiter.try_acquire().unwrap();
    let forgotten = waiting(limiter.acquire());
    let mut second = waiting(limiter.acquire());
    clock.advance(2 * SECOND);
    assert_pending!(second.poll(), "the place before it has just been served");
    clock.advance(SECOND);
    admitted(&mut second);
    drop(forgotten);
}

#[test]
fn a_waiter_is_polled_no_more_than_it_needs() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let mut line: Vec<_> = (0..3).map(|_| waiting(limiter.acquire())).collect();
        for _ in 0..1000 {
            clock.advance(Duration::from_micros(999));
            assert!(
                !line.iter().any(Spawn::is_woken),
                "{algorithm:?}: nobody is woken before somebody is due"
            );
        }
        clock.advance(Duration::from_millis(1));
        assert!(line[0].is_woken());
        admitted(&mut line[0]);
        assert!(line[1].is_woken(), "the new front sets its timer");
        assert_pending!(line[1].poll());
        assert!(
            !line[1].is_woken() && !line[2].is_woken(),
            "{algorithm:?}: one wake-up each, and then silence"
        );
    }
}

#[test]
fn a_waiter_is_woken_through_its_latest_waker() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        limiter.try_acquire().unwrap();
        let mut before = waiting(limiter.acquire());
        let mut acquire = Box::pin(limiter.acquire());
        let mut there = spawn(std::future::poll_fn(|cx| acquire.as_mut().poll(cx).map(|_| ())));
        assert_pending!(there.poll());
        let polled_there = there.is_woken();
        drop(there);
        assert!(!polled_there);
        let mut here = spawn(acquire);
        assert_pending!(here.poll());
        clock.advance(SECOND);
        admitted(&mut before);
        if here.is_woken() {
            assert_pending!(here.poll());
        }
        clock.advance(SECOND);
        assert!(here.is_woken(), "the task that polled last is the one that waits");
        assert_ready!(here.poll()).expect("admitted");
    }
}

#[test]
fn nothing_is_promised_while_others_wait() {
    let (_, limiter) = limiter(TokenBucket::new(10, 10 * SECOND));
    limiter.try_acquire_n(7).unwrap();
    let _large = waiting(limiter.acquire_n(5));
    let status = limiter.status();
    assert_eq!(status.retry_after, Some(3 * SECOND));
    assert!(
        status.available_tokens.abs() < 1e-9,
        "the three tokens there are the waiter's"
    );
}

#[test]
fn a_thread_that_lies_behind_serves_nobody_too_early() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        clock.advance(YEAR);
        limiter.try_acquire().unwrap();
        let mut waiter = waiting(limiter.acquire());
        clock.rewind(YEAR);
        assert_pending!(waiter.poll(), "{algorithm:?}: held up for a year");
        clock.advance(just_before(YEAR + SECOND));
        assert_pending!(waiter.poll());
        clock.advance(NANOSECOND);
        admitted(&mut waiter);
    }
}

#[test]
fn a_clock_that_leaps_serves_all_who_have_become_due() {
    let (clock, limiter) = limiter(TokenBucket::new(1, SECOND).burst(5));
    limiter.try_acquire_n(5).unwrap();
    let mut line: Vec<_> = (0..8).map(|_| waiting(limiter.acquire())).collect();
    clock.advance(YEAR);
    for waiter in &mut line {
        admitted(waiter);
    }
    let burst = std::iter::from_fn(|| limiter.try_acquire().ok()).count();
    assert_eq!(
        burst, 5,
        "each was charged when it was due: the year after them brings a burst"
    );
}

/// A window counts whole admissions: two that came apart are free again apart, and a cost of two needs both.
#[test]
fn a_wait_behind_larger_ones_that_cannot_fit_a_window_is_refused_at_once() {
    let (clock, limiter) = limiter(SlidingWindow::new(2, 10 * SECOND));
    limiter.try_acquire().unwrap();
    clock.advance(5 * SECOND);
    limiter.try_acquire().unwrap();
    clock.advance(SECOND);
    let mut large = waiting(limiter.acquire_n(2));
    let rejected = assert_ready!(spawn(limiter.acquire_within(1, 18 * SECOND)).poll()).unwrap_err();
    assert_eq!(
        rejected.retry_after,
        Some(19 * SECOND),
        "at 25 s, when both places of the large one are free"
    );
    let mut small = waiting(limiter.acquire_within(1, 19 * SECOND));
    clock.advance(9 * SECOND);
    admitted(&mut large);
    clock.advance(just_before(10 * SECOND));
    assert_pending!(small.poll());
    clock.advance(NANOSECOND);
    admitted(&mut small);
}

/// Tokio's timer ticks once a millisecond: ten tokens come between two ticks, and the bucket holds one.
#[tokio::test(start_paused = true)]
async fn a_line_moves_at_the_rate_however_coarse_the_timer_and_small_the_burst() {
    let limiter = RateLimiter::new("agent", TokenBucket::new(10_000, SECOND).burst(1)).unwrap();
    limiter.try_acquire().unwrap();
    let before = limiter.clock().now();
    let line: Vec<_> = (0..1000).map(|_| tokio::spawn(limiter.acquire())).collect();
    for waiter in line {
        waiter.await.unwrap().unwrap();
    }
    let took = limiter.clock().now().duration_since(before);
    let tick = Duration::from_millis(1);
    assert!(
        SECOND / 10 <= took && took <= SECOND / 10 + tick,
        "1000 at 10,000 a second took {took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_fits_when_it_begins_is_not_refused_because_timers_were_late() {
    let limiter = RateLimiter::new("agent", TokenBucket::new(7, SECOND).burst(1)).unwrap();
    limiter.try_acquire().unwrap();
    // The seventh is due after exactly one second; each of those before it is noticed up to a millisecond late.
    let line: Vec<_> = (0..7)
        .map(|_| tokio::spawn(limiter.acquire_within(1, SECOND)))
        .collect();
    for waiter in line {
        waiter.await.unwrap().expect("it fitted");
    }
}

/// Counts how often a future is polled.
async fn counting<F: Future>(polls: &AtomicUsize, future: F) -> F::Output {
    let mut future = pin!(future);
    std::future::poll_fn(|cx| {
        polls.fetch_add(1, Ordering::Relaxed);
        future.as_mut().poll(cx)
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn waits_run_on_paused_time() {
    for algorithm in one_a_second() {
        let limiter = RateLimiter::new("agent", algorithm).unwrap();
        let before = limiter.clock().now();
        let polls = AtomicUsize::new(0);
        for _ in 0..=100 {
            drop(counting(&polls, limiter.acquire()).await.unwrap());
        }
        let took = limiter.clock().now().duration_since(before);
        // Tokio's timer has a grain of a millisecond, and a sliding window counts from when it served.
        assert!(
            took >= 100 * SECOND && took <= 100 * (SECOND + Duration::from_millis(2)),
            "{algorithm:?}: took {took:?}"
        );
        assert!(polls.into_inner() <= 1 + 100 * 3, "{algorithm:?}: no busy loop");
    }
}

#[tokio::test(start_paused = true)]
async fn a_long_wait_sleeps() {
    let limiter = RateLimiter::new("agent", TokenBucket::new(1, 5 * YEAR)).unwrap();
    limiter.try_acquire().unwrap();
    let before = limiter.clock().now();
    let polls = AtomicUsize::new(0);
    counting(&polls, limiter.acquire()).await.unwrap();
    assert!(limiter.clock().now().duration_since(before) >= 5 * YEAR);
    assert!(polls.into_inner() <= 10, "a year at a time at the most");
}

#[tokio::test(start_paused = true)]
async fn a_crowd_is_served_in_order_and_each_is_polled_a_few_times() {
    let limiter = RateLimiter::new("agent", TokenBucket::new(100, SECOND).burst(1)).unwrap();
    limiter.try_acquire().unwrap();
    let (served, polls) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..500 {
        let (limiter, served, polls) = (limiter.clone(), served.clone(), polls.clone());
        tasks.spawn(async move {
            counting(&polls, limiter.acquire()).await.unwrap();
            served.lock().unwrap().push(number);
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(
        *served.lock().unwrap(),
        (0..500).collect::<Vec<_>>(),
        "first come, first served"
    );
    assert!(
        polls.load(Ordering::Relaxed) <= 500 * 5,
        "polled {} times",
        polls.load(Ordering::Relaxed)
    );
}

#[tokio::test(start_paused = true)]
async fn a_timeout_around_a_wait_takes_nothing() {
    let limiter = RateLimiter::new("agent", TokenBucket::new(1, SECOND)).unwrap();
    limiter.try_acquire().unwrap();
    for _ in 0..50 {
        assert!(
            tokio::time::timeout(Duration::from_millis(10), limiter.acquire())
                .await
                .is_err()
        );
    }
    assert_eq!(limiter.status().waiting, 0);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(
        limiter.try_acquire().is_ok(),
        "the second has passed, and nobody who gave up used its token"
    );
}

/// A reproducible source of randomness (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Polls a future a few times at most and then drops it.
async fn impatient<F: Future>(polls: u64, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        // Looks again by itself, so that it leaves at moments when nobody woke it.
        if left == 0 {
            cx.waker().wake_by_ref();
        }
        future.as_mut().poll(cx).map(Some)
    })
    .await
}

#[test]
fn no_wake_up_is_lost_among_threads_that_come_and_go() {
    const SEED: u64 = 0x5EED_0F0A_CEA5_E1E5;
    for algorithm in [
        Algorithm::from(TokenBucket::new(3, Duration::from_nanos(100))),
        SlidingWindow::new(3, Duration::from_nanos(100)).into(),
        Adaptive::new(3).window(Duration::from_nanos(100)).into(),
    ] {
        let (clock, limiter) = limiter(algorithm);
        let admitted = Arc::new(AtomicUsize::new(0));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(3)
            .build()
            .unwrap();
        let tasks: Vec<_> = (1..=24)
            .map(|task| {
                let (limiter, admitted) = (limiter.clone(), admitted.clone());
                runtime.spawn(async move {
                    let mut dice = Dice(SEED ^ task);
                    for _ in 0..200 {
                        let acquire = limiter.acquire_n(u32::try_from(dice.roll(3) + 1).unwrap());
                        let permit = match dice.roll(3) {
                            0 => impatient(dice.roll(4), acquire).await,
                            _ => Some(acquire.await),
                        };
                        match permit.transpose().expect("no cost is above the burst") {
                            Some(permit) if dice.roll(4) == 0 => {
                                admitted.fetch_add(1, Ordering::Relaxed);
                                permit.unused();
                            }
                            Some(permit) => {
                                admitted.fetch_add(1, Ordering::Relaxed);
                                permit.settle(Outcome::Ignored);
                            }
                            None => {}
                        }
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        let mut idle = 0_u32;
        let mut seen = 0;
        while !tasks.iter().all(tokio::task::JoinHandle::is_finished) {
            clock.advance(Duration::from_nanos(10));
            std::thread::yield_now();
            let now = admitted.load(Ordering::Relaxed);
            idle = if now == seen { idle + 1 } else { 0 };
            seen = now;
            assert!(
                idle < 20_000_000,
                "seed {SEED:#x}: somebody waits for ever: {:?}",
                limiter.status()
            );
        }
        runtime.block_on(async {
            for task in tasks {
                task.await.unwrap();
            }
        });
        let status = limiter.status();
        assert_eq!(status.waiting, 0, "seed {SEED:#x}: the line is empty");
        assert_eq!(
            status.accepted_requests,
            seen.max(admitted.load(Ordering::Relaxed)) as u64,
            "seed {SEED:#x}"
        );
        clock.advance(SECOND);
        assert!(
            limiter.try_acquire_n(3).is_ok(),
            "seed {SEED:#x}: everything is there again"
        );
        acquire_when_told(&clock, &limiter, 1);
    }
}

#[test]
fn a_limiter_that_is_waited_for_is_freed_with_its_last_handle() {
    for algorithm in one_a_second() {
        let (clock, limiter) = limiter(algorithm);
        let alive = Arc::new(AtomicBool::new(true));
        let watched = Arc::downgrade(&alive);
        limiter.on_event(move |_| assert!(alive.load(Ordering::Relaxed)));
        let permit = limiter.try_acquire().unwrap();
        let first = waiting(limiter.acquire());
        let second = waiting(limiter.acquire());
        clock.advance(SECOND);
        drop(limiter);
        assert!(watched.upgrade().is_some(), "permits and waits keep it alive");
        drop(first);
        drop(second);
        drop(permit);
        assert!(watched.upgrade().is_none(), "{algorithm:?}: freed");
    }
}

/// A task as small executors make it: its wakers own it, and the last one to go takes its future along.
struct OwnedByItsWaker(#[expect(dead_code, reason = "held for its drop")] Mutex<Spawn<Acquire>>);

impl Wake for OwnedByItsWaker {
    fn wake(self: Arc<Self>) {}
}

/// A wait that is kept alive by nothing but the waker it hands out.
fn owned_by_its_waker(acquire: Acquire) -> Waker {
    Arc::new(OwnedByItsWaker(Mutex::new(waiting(acquire)))).into()
}

#[test]
fn the_last_waker_of_a_task_that_waits_itself_may_go_with_a_wait() {
    for algorithm in one_a_second() {
        let (_clock, limiter) = limiter(algorithm);
        limiter.try_acquire().expect("full");
        let waker = owned_by_its_waker(limiter.acquire());
        let mut wait = Box::pin(limiter.acquire());
        assert_pending!(wait.as_mut().poll(&mut Context::from_waker(&waker)));
        drop(waker);
        drop(wait);
        assert_eq!(limiter.status().waiting, 0, "both have left the line: {algorithm:?}");
    }
}

#[test]
fn the_last_waker_of_a_task_that_waits_itself_may_be_replaced() {
    for algorithm in one_a_second() {
        let (_clock, limiter) = limiter(algorithm);
        limiter.try_acquire().expect("full");
        let waker = owned_by_its_waker(limiter.acquire());
        let mut wait = Box::pin(limiter.acquire());
        assert_pending!(wait.as_mut().poll(&mut Context::from_waker(&waker)));
        drop(waker);
        assert_pending!(wait.as_mut().poll(&mut Context::from_waker(Waker::noop())));
        assert_eq!(
            limiter.status().waiting,
            1,
            "the other one has left the line: {algorithm:?}"
        );
    }
}

#[test]
fn a_true_cost_charges_nobody_who_was_due_before() {
    for algorithm in [
        Algorithm::from(TokenBucket::new(1, SECOND)),
        Adaptive::new(1).window(SECOND).max_rate(1).into(),
    ] {
        let (clock, limiter) = limiter(algorithm);
        let permit = limiter.try_acquire().expect("full");
        let mut line: Vec<_> = (0..3).map(|_| waiting(limiter.acquire())).collect();
        clock.advance(3 * SECOND);
        permit.settle(Verdict::new(Outcome::Success).cost(2));
        for waiter in &mut line {
            drop(admitted(waiter));
        }
        assert_eq!(
            wait_of(limiter.try_acquire()),
            2 * SECOND,
            "what the call cost more is paid by who comes after them: {algorithm:?}"
        );
    }
}

#[test]
fn what_comes_back_while_somebody_joins_the_line_is_not_overlooked() {
    for round in 0..20_000 {
        let (_clock, limiter) = limiter(TokenBucket::new(1, SECOND));
        let permit = limiter.try_acquire().expect("full");
        let start = Barrier::new(2);
        let mut wait = thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                permit.unused();
            });
            start.wait();
            let mut wait = spawn(limiter.acquire());
            let first = wait.poll();
            (wait, first)
        });
        let served = wait.1.is_ready() || wait.0.is_woken() && wait.0.poll().is_ready();
        assert!(served, "round {round}: a token lies there and the only waiter sleeps");
    }
}
