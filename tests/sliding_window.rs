//! Pins what a sliding window promises whichever threads ask it: each has slots of its own to go to first, and nobody can tell.

mod limiters;

use limiters::{NANOSECOND, SECOND, YEAR, acquire_when_told, just_before, limiter, wait_of};
use portcullis::{ManualClock, RateLimitPermit, RateLimiter, Rejected, SlidingWindow};
use std::{
    future::Future,
    sync::{
        Barrier,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    task::{Context, Waker},
    thread,
    time::Duration,
};

const MINUTE: Duration = Duration::from_secs(60);

/// Quotas around the sizes at which a window is dealt to more threads, and beyond.
const QUOTAS: [u32; 14] = [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 71, 100, 1000];

// ---- threads in lockstep ----

type Job = Box<dyn FnOnce() + Send>;

/// Threads that do one thing at a time, as they are told.
struct Crew(Vec<mpsc::Sender<Job>>);

impl Crew {
    /// More threads than a window has parts, so that some share one.
    const SIZE: usize = 10;

    fn new() -> Self {
        let worker = |_| {
            let (jobs, todo) = mpsc::channel::<Job>();
            thread::spawn(move || todo.into_iter().for_each(|job| job()));
            jobs
        };
        Self((0..Self::SIZE).map(worker).collect())
    }

    /// Does it on this thread, and waits.
    fn on<T: Send + 'static>(&self, thread: usize, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, done) = mpsc::channel();
        let job = move || answer.send(job()).expect("somebody waits");
        self.0[thread % Self::SIZE].send(Box::new(job)).expect("it lives");
        done.recv().expect("no job panics")
    }

    fn take(&self, thread: usize, limiter: &RateLimiter, cost: u32) -> Result<RateLimitPermit, Rejected> {
        let limiter = limiter.clone();
        self.on(thread, move || limiter.try_acquire_n(cost))
    }

    /// How many requests are admitted before the first refusal, each on the next thread.
    fn drain(&self, limiter: &RateLimiter) -> u32 {
        (0..u32::MAX)
            .find(|call| self.take(*call as usize, limiter, 1).is_err())
            .expect("a limiter has an end")
    }
}

/// What a status says is there.
fn available(limiter: &RateLimiter) -> u32 {
    let available = limiter.status().available_tokens;
    (0..=1 << 24)
        .find(|n| f64::from(*n) >= available)
        .expect("no more than the largest quota")
}

#[test]
fn one_thread_gets_the_whole_quota() {
    let crew = Crew::new();
    for quota in QUOTAS {
        let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
        for thread in 0..Crew::SIZE {
            for left in (1..=quota).rev() {
                assert_eq!(available(&limiter), left);
                assert!(crew.take(thread, &limiter, 1).is_ok(), "{left} of {quota} are left");
            }
            assert_eq!(available(&limiter), 0);
            assert_eq!(wait_of(crew.take(thread, &limiter, 1)), MINUTE);
            clock.advance(MINUTE);
        }
    }
}

#[test]
fn threads_that_take_turns_get_the_quota_and_not_one_more() {
    let crew = Crew::new();
    for quota in QUOTAS {
        let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
        for _ in 0..5 {
            assert_eq!(crew.drain(&limiter), quota);
            clock.advance(just_before(MINUTE));
            for thread in 0..Crew::SIZE {
                assert_eq!(wait_of(crew.take(thread, &limiter, 1)), NANOSECOND);
            }
            clock.advance(NANOSECOND);
        }
    }
}

#[test]
fn the_wait_is_for_the_oldest_admissions_whoever_made_them() {
    let crew = Crew::new();
    let (clock, limiter) = limiter(SlidingWindow::new(64, MINUTE));
    for call in 0..64 {
        // Now and then one thread twice, so that no turn is like the one before.
        crew.take(call + call / 5, &limiter, 1).expect("there are 64");
        clock.advance(SECOND);
        if call < 59 {
            assert_eq!(available(&limiter), 63 - u32::try_from(call).unwrap());
        }
    }
    // 64 seconds have passed: those of the first four, and of the fifth, are a minute old.
    assert_eq!(available(&limiter), 5);
    for cost in 1..=64_u32 {
        let wait = SECOND * cost.saturating_sub(5);
        match crew.take(7, &limiter, cost) {
            Ok(permit) => {
                assert_eq!(wait, Duration::ZERO, "a cost of {cost}");
                permit.unused();
            }
            refused => assert_eq!(wait_of(refused), wait, "a cost of {cost}"),
        }
    }
    assert_eq!(acquire_when_told(&clock, &limiter, 40), 35 * SECOND);
    assert_eq!(limiter.quota().reset, MINUTE, "the latest are those just now");
}

#[test]
fn a_cost_is_met_from_what_all_threads_have_left() {
    let crew = Crew::new();
    for quota in QUOTAS {
        for cost in [1, 2, 3, 5, 8, 30, 64, 71].into_iter().filter(|cost| *cost <= quota) {
            let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
            for call in 0..quota - cost {
                crew.take(call as usize, &limiter, 1).expect("there is room");
            }
            if cost < quota {
                assert_eq!(wait_of(crew.take(3, &limiter, cost + 1)), MINUTE, "one too many");
                assert_eq!(available(&limiter), cost, "a refusal takes nothing");
            }
            crew.take(3, &limiter, cost).expect("just enough");
            assert_eq!(wait_of(crew.take(4, &limiter, 1)), MINUTE, "nothing is left");
            clock.advance(MINUTE);
            assert_eq!(crew.drain(&limiter), quota, "and all comes back");
        }
    }
}

#[test]
fn a_cost_that_was_met_from_many_threads_slots_is_given_back_whole() {
    let crew = Crew::new();
    for quota in QUOTAS {
        for cost in [2, 9, 30, 64, 71, quota].into_iter().filter(|cost| *cost <= quota) {
            let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
            for call in 0..quota - cost {
                crew.take(call as usize, &limiter, 1).expect("there is room");
            }
            clock.advance(SECOND);
            for thread in 0..Crew::SIZE {
                let permit = crew.take(thread, &limiter, cost).expect("there is room");
                assert_eq!(available(&limiter), 0);
                // On another thread than it was taken on.
                crew.on(thread + 3, move || permit.unused());
                assert_eq!(available(&limiter), cost, "{cost} of {quota}");
            }
            assert_eq!(limiter.status().returned_requests, Crew::SIZE as u64);
            assert_eq!(crew.drain(&limiter), cost);
            clock.advance(MINUTE);
            assert_eq!(crew.drain(&limiter), quota);
        }
    }
}

#[test]
fn a_cost_is_given_back_whole_or_not_at_all() {
    let crew = Crew::new();
    let (clock, limiter) = limiter(SlidingWindow::new(64, MINUTE));
    let all = crew.take(0, &limiter, 64).expect("all are there");
    clock.advance(MINUTE);
    // Newer than a part of it, wherever that lies.
    crew.take(1, &limiter, 1).expect("a window later");
    all.unused();
    assert_eq!(limiter.status().returned_requests, 0, "others have come since");
    assert_eq!(available(&limiter), 63);
    assert_eq!(crew.drain(&limiter), 63);
}

#[test]
fn from_64_requests_on_calls_of_other_threads_need_not_keep_a_permit_from_coming_back() {
    let crew = Crew::new();
    let (_, first) = limiter(SlidingWindow::new(100, MINUTE));
    // Each thread has a part of its own once it has called.
    (0..Crew::SIZE).for_each(|thread| drop(crew.take(thread, &first, 1).expect("there is room")));
    for (quota, may) in [(63, false), (64, true)] {
        let comes_back = |thread| {
            let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
            let permit = crew.take(0, &limiter, 1).expect("there is room");
            clock.advance(SECOND);
            crew.take(thread, &limiter, 1).expect("there is room");
            crew.on(0, move || permit.unused());
            limiter.status().returned_requests == 1
        };
        assert!(!comes_back(0), "{quota}: a call of the same thread came later");
        assert_eq!((1..Crew::SIZE).any(comes_back), may, "a quota of {quota}");
    }
}

#[test]
fn a_window_that_refuses_tells_that_nothing_remains_whatever_the_order_of_the_times() {
    for quota in [2, 62] {
        let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
        clock.advance(10 * SECOND);
        limiter.try_acquire_n(quota / 2).expect("there is room");
        clock.rewind(10 * SECOND);
        // As of a thread that has read the time before the others, and is served after them.
        limiter.try_acquire_n(quota / 2).expect("there is room");
        clock.advance(MINUTE);
        assert_eq!(available(&limiter), 0, "a quota of {quota}");
        let refused = limiter.try_acquire().expect_err("the first are not a minute old");
        assert_eq!(refused.retry_after, Some(10 * SECOND));
        assert_eq!(refused.quota().expect("told").remaining, 0, "a quota of {quota}");
    }
}

#[test]
fn admissions_of_one_instant_are_given_back_in_any_order() {
    let crew = Crew::new();
    for quota in QUOTAS {
        let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
        let permits: Vec<_> = (0..quota as usize)
            .map(|call| crew.take(call, &limiter, 1).expect("there is room"))
            .collect();
        for permit in permits {
            permit.unused();
        }
        assert_eq!(limiter.status().returned_requests, u64::from(quota));
        assert_eq!(crew.drain(&limiter), quota);
        clock.advance(MINUTE);
        assert_eq!(crew.drain(&limiter), quota);
    }
}

#[test]
fn waits_and_times_beyond_all_measure_are_told_on_every_thread() {
    let crew = Crew::new();
    let (clock, limiter) = limiter(SlidingWindow::new(100, 100 * YEAR));
    assert_eq!(crew.drain(&limiter), 100);
    clock.advance(just_before(100 * YEAR));
    assert_eq!(wait_of(crew.take(1, &limiter, 100)), NANOSECOND);
    clock.advance(NANOSECOND);
    crew.take(2, &limiter, 99).expect("a window later").unused();
    assert_eq!(crew.drain(&limiter), 100);
    // The end of the scale: no more is admitted, and nothing overflows.
    for _ in 0..10 {
        clock.advance(100 * YEAR);
    }
    for thread in 0..Crew::SIZE {
        for cost in [1, 50, 100] {
            if let Ok(permit) = crew.take(thread, &limiter, cost) {
                permit.unused();
            }
        }
    }
    crew.drain(&limiter);
    let _ = (limiter.status(), limiter.quota());
    assert_eq!(crew.drain(&limiter), 0);
}

#[test]
fn everything_is_there_again_one_window_after_the_latest_admission_whoever_made_it() {
    let crew = Crew::new();
    for quota in QUOTAS {
        let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
        let mut permits = Vec::new();
        for call in 0..quota.min(20) {
            permits.push(crew.take(call as usize, &limiter, 1).unwrap());
            assert_eq!(limiter.quota().reset, MINUTE);
            clock.advance(SECOND);
            assert_eq!(limiter.quota().reset, 59 * SECOND);
        }
        // Given back, latest first, they leave those before them.
        for (ago, permit) in (1..).zip(permits.into_iter().rev()) {
            assert_eq!(limiter.quota().reset, (60 - ago) * SECOND);
            crew.on(ago as usize, move || permit.unused());
        }
        assert_eq!(limiter.quota().reset, Duration::ZERO);
        assert_eq!(crew.drain(&limiter), quota);
    }
}

// ---- against a list of admissions ----

/// Numbers that look random, by Steele, Lea and Flood (2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// The same calls on a limiter, by threads of a crew, and on a list of the times of its admissions.
struct Beside {
    crew: Crew,
    random: Random,
    quota: u32,
    window: Duration,
    clock: ManualClock,
    limiter: RateLimiter,
    /// The time since the start of each admission that counts, in order.
    admitted: Vec<Duration>,
    permits: Vec<(Duration, RateLimitPermit)>,
    /// Whether the clock only goes forward.
    in_order: bool,
}

impl Beside {
    fn new(seed: u64, in_order: bool) -> Self {
        let mut random = Random(seed);
        let quotas = QUOTAS.len() as u64 - 1;
        let quota = QUOTAS[usize::try_from(random.below(quotas)).unwrap()];
        let window = Duration::from_nanos(1 + random.below(300));
        println!("seed {seed}: {quota} in {window:?}");
        let (clock, limiter) = limiter(SlidingWindow::new(quota, window));
        Self {
            crew: Crew::new(),
            random,
            quota,
            window,
            clock,
            limiter,
            admitted: Vec::new(),
            permits: Vec::new(),
            in_order,
        }
    }

    fn now(&self, start: portcullis::Timestamp) -> Duration {
        self.clock.now().duration_since(start)
    }

    fn thread(&mut self) -> usize {
        // Mostly one of a few, which fill what is theirs.
        let few = if self.random.below(4) == 0 { Crew::SIZE } else { 3 };
        usize::try_from(self.random.below(few as u64)).unwrap()
    }

    fn cost(&mut self) -> u32 {
        let most = match self.random.below(8) {
            0 => self.quota,
            1 | 2 => self.quota.min(12),
            _ => 1,
        };
        1 + u32::try_from(self.random.below(most.into())).unwrap()
    }

    /// How long until so much is there, by the list; `None` if it is there.
    fn missing(&self, cost: u32, now: Duration) -> Option<Duration> {
        let too_many = (self.admitted.len() + cost as usize).checked_sub(self.quota as usize)?;
        let last_to_go = self.admitted[too_many.checked_sub(1)?] + self.window;
        last_to_go.checked_sub(now).filter(|wait| *wait > Duration::ZERO)
    }

    /// Gives back one of the permits that are out, on any thread. The list follows if it is taken back, which it is if nothing came
    /// later that may have overwritten it.
    fn give_one_back(&mut self, now: Duration) {
        if self.permits.is_empty() {
            return;
        }
        let which = match self.random.below(3) {
            0 => usize::try_from(self.random.next() % self.permits.len() as u64).unwrap(),
            _ => self.permits.len() - 1,
        };
        let (at, permit) = self.permits.remove(which);
        let (cost, thread) = (permit.cost(), self.thread());
        let returned = self.limiter.status().returned_requests;
        self.crew.on(thread, move || permit.unused());
        let is_taken_back = self.limiter.status().returned_requests > returned;
        let is_newest = self.in_order && self.admitted.last() == Some(&at) && at + self.window > now;
        assert!(is_taken_back || !is_newest, "nothing came later");
        if is_taken_back {
            for _ in 0..cost {
                let place = self.admitted.iter().rposition(|admitted| *admitted == at);
                self.admitted.remove(place.expect("it was there"));
            }
        }
    }
}

#[test]
fn threads_in_any_order_are_answered_as_by_a_list_of_all_admissions() {
    for seed in 0..150 {
        let mut run = Beside::new(seed, true);
        let start = run.clock.now();
        for _ in 0..400 {
            let now = run.now(start);
            match run.random.below(10) {
                0..3 => {
                    let most = if run.random.below(5) == 0 { 400 } else { 12 };
                    run.clock.advance(Duration::from_nanos(run.random.below(most)));
                }
                3 => run.give_one_back(now),
                _ => {
                    let (thread, cost) = (run.thread(), run.cost());
                    let missing = run.missing(cost, now);
                    let recent = run.admitted.iter().filter(|at| **at + run.window > now).count();
                    let left = run.quota - u32::try_from(recent).unwrap();
                    assert_eq!(available(&run.limiter), left, "the status knows what is there");
                    assert_eq!(run.limiter.status().retry_after, run.missing(1, now));
                    match run.crew.take(thread, &run.limiter, cost) {
                        Ok(permit) => {
                            assert_eq!(missing, None, "a cost of {cost} was admitted too early");
                            run.admitted.extend((0..cost).map(|_| now));
                            run.permits.push((now, permit));
                        }
                        refused => assert_eq!(Some(wait_of(refused)), missing, "a cost of {cost}"),
                    }
                }
            }
        }
    }
}

#[test]
fn a_place_behind_those_who_wait_is_told_as_by_a_list_of_all_admissions() {
    for seed in 0..150 {
        let mut run = Beside::new(seed, true);
        let start = run.clock.now();
        run.clock.advance(SECOND);
        // Everything is taken, by threads in turn at any times.
        while run.missing(1, run.now(start)).is_none() {
            let (thread, now) = (run.thread(), run.now(start));
            let permit = run.crew.take(thread, &run.limiter, 1).expect("there is room");
            run.admitted.push(now);
            run.permits.push((now, permit));
            let most = 1 + u64::from(run.window.subsec_nanos() / run.quota);
            run.clock.advance(Duration::from_nanos(run.random.below(most)));
            if run.admitted.len() > 10_000 {
                break;
            }
        }
        let now = run.now(start);
        let quota = run.quota as usize;
        let mut slots: Vec<_> = run.admitted[run.admitted.len() - quota..].to_vec();
        let mut context = Context::from_waker(Waker::noop());
        let (mut at, mut waiting, mut waiters) = (now, 0, Vec::new());
        for _ in 0..run.random.below(12) {
            let cost = run.cost();
            let mut waiter = Box::pin(run.limiter.acquire_n(cost));
            if waiter.as_mut().poll(&mut context).is_ready() {
                // Nobody waits, and there was room.
                slots.drain(..cost as usize);
                slots.extend((0..cost).map(|_| now));
                continue;
            }
            at = at.max(slots[cost as usize - 1] + run.window);
            waiters.push(waiter);
            waiting += cost;
            slots.drain(..cost as usize);
            slots.extend((0..cost).map(|_| at));
        }
        if waiting == 0 {
            continue;
        }
        let cost = run.cost();
        let told = wait_of(run.crew.take(0, &run.limiter, cost));
        let exact = at.max(slots[cost as usize - 1] + run.window);
        assert_eq!(now + told, exact, "a cost of {cost} behind {waiting}");
        drop(waiters);
        assert_eq!(run.limiter.status().waiting, 0);
    }
}

/// Each of these times is one that some thread read; the order in which they arrive is anybody's.
#[test]
fn a_window_is_never_exceeded_by_threads_whose_time_lies_behind() {
    for seed in 0..300 {
        let mut run = Beside::new(seed, false);
        let start = run.clock.now();
        run.clock.advance(SECOND);
        let mut latest = run.clock.now();
        for _ in 0..300 {
            let now = run.now(start);
            match run.random.below(8) {
                0 => run.clock.advance(Duration::from_nanos(run.random.below(400))),
                1 => run.clock.advance(Duration::from_nanos(run.random.below(12))),
                2 => run.clock.rewind(Duration::from_nanos(run.random.below(300))),
                3 => run.give_one_back(now),
                _ => {
                    let (thread, cost) = (run.thread(), run.cost());
                    if let Ok(permit) = run.crew.take(thread, &run.limiter, cost) {
                        run.admitted.extend((0..cost).map(|_| now));
                        run.permits.push((now, permit));
                    }
                }
            }
            latest = latest.max(run.clock.now());
        }
        run.admitted.sort();
        for crowd in run.admitted.windows(run.quota as usize + 1) {
            let (first, last) = (crowd[0], crowd[run.quota as usize]);
            assert!(
                last >= first + run.window,
                "one too many in the window from {first:?} on"
            );
        }
        // However confused the times were, one quiet window later everything is as new.
        run.clock.advance(latest.duration_since(run.clock.now()) + run.window);
        for _ in 0..3 {
            assert_eq!(available(&run.limiter), run.quota);
            assert_eq!(run.crew.drain(&run.limiter), run.quota);
            run.clock.advance(run.window);
        }
    }
}

// ---- threads at once ----

/// Lets two threads do something at once, so many times, and looks at what they got.
fn race(
    rounds: u32,
    one: impl Fn() -> bool + Sync,
    other: impl Fn() -> bool + Sync,
    mut after: impl FnMut(u32, bool, bool),
) {
    let (go, done) = (Barrier::new(3), Barrier::new(3));
    let results = [AtomicU32::new(0), AtomicU32::new(0)];
    thread::scope(|scope| {
        let jobs: [&(dyn Fn() -> bool + Sync); 2] = [&one, &other];
        for (job, result) in jobs.into_iter().zip(&results) {
            let (go, done) = (&go, &done);
            scope.spawn(move || {
                for _ in 0..rounds {
                    go.wait();
                    result.store(job().into(), Ordering::SeqCst);
                    done.wait();
                }
            });
        }
        for round in 0..rounds {
            go.wait();
            done.wait();
            let [one, other] = results.each_ref().map(|result| result.load(Ordering::SeqCst) == 1);
            after(round, one, other);
        }
    });
}

#[test]
fn of_two_who_race_for_more_than_there_is_for_both_one_is_admitted() {
    for (quota, cost, other_cost) in [(64, 64, 64), (64, 33, 40), (100, 100, 1), (17, 9, 9), (64, 64, 5)] {
        let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
        let take = |cost| limiter.try_acquire_n(cost).is_ok();
        race(
            5_000,
            || take(cost),
            || take(other_cost),
            |_, one, other| {
                assert!(one ^ other, "{cost} and {other_cost} of {quota}: exactly one of them");
                clock.advance(MINUTE);
            },
        );
    }
}

#[test]
fn a_cost_that_is_given_back_while_another_comes_is_there_once() {
    for (quota, cost, other_cost) in [(64, 64, 64), (64, 40, 30), (100, 100, 1), (16, 16, 9)] {
        let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
        let take = |cost| limiter.try_acquire_n(cost);
        race(
            5_000,
            || take(cost).map(RateLimitPermit::unused).is_ok(),
            || take(other_cost).is_ok(),
            |round, _, other| {
                let left = available(&limiter);
                let used = if other { other_cost } else { 0 };
                // Where the other came in between, the first is spent with it.
                assert!(
                    left == quota - used || (other && left + cost + used <= quota),
                    "round {round}: {left} left of {quota}, {used} used"
                );
                clock.advance(MINUTE);
                assert_eq!(available(&limiter), quota);
            },
        );
    }
}

#[test]
fn threads_that_hammer_a_window_get_its_quota_to_the_request() {
    for quota in QUOTAS {
        let (clock, limiter) = limiter(SlidingWindow::new(quota, MINUTE));
        for _ in 0..20 {
            let drain = || (0..4 * quota).filter(|_| limiter.try_acquire().is_ok()).count();
            let admitted: usize = thread::scope(|scope| {
                let threads: Vec<_> = (0..3).map(|_| scope.spawn(drain)).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().expect("no thread panics"))
                    .sum()
            });
            assert_eq!(admitted, quota as usize, "not one more, not one less");
            clock.advance(MINUTE);
        }
    }
}
