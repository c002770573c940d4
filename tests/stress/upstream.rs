//! A service that does all that a service may do, and callers who do all that callers may do to it.

use crate::chance::Dice;
use futures_util::FutureExt;
use portcullis::{BoxError, Clock, ManualClock, Outcome, Reason, Rejected, Timestamp};
use std::{
    future::{Future, pending, poll_fn},
    io,
    ops::AddAssign,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};
use tokio::task::yield_now;
use tower::{Service, util::BoxCloneSyncService};

/// What all parts of one run share.
pub(crate) struct World {
    pub(crate) manual: ManualClock,
    pub(crate) clock: Clock,
    start: Timestamp,
    seed: u64,
    running: AtomicUsize,
    most_running: AtomicUsize,
    /// Odd while the breaker is disabled, and round about.
    pub(crate) disabled: AtomicU64,
    services: AtomicU64,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let manual = Clock::manual();
        Self {
            clock: Clock::from(&manual),
            start: manual.now(),
            manual,
            seed,
            running: AtomicUsize::new(0),
            most_running: AtomicUsize::new(0),
            disabled: AtomicU64::new(0),
            services: AtomicU64::new(0),
        }
    }

    pub(crate) fn with_clock(mut self, clock: Clock) -> Self {
        self.start = clock.now();
        self.clock = clock;
        self
    }

    pub(crate) fn dice(&self, task: u64) -> Dice {
        Dice::new(self.seed, task)
    }

    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    pub(crate) fn most_running(&self) -> usize {
        self.most_running.load(Ordering::SeqCst)
    }

    /// Nanoseconds since the start.
    fn now(&self) -> u64 {
        let passed = self.clock.now().duration_since(self.start).as_nanos();
        u64::try_from(passed).expect("not five hundred years")
    }
}

/// How a call ends, if nobody drops it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Answer,
    Fail,
    Panic,
    PanicAtOnce,
    Hang,
}

/// One call, and where it has come to.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) key: u64,
    end: End,
    /// How often it is pending before its head is there, and before its body is.
    pauses: [u64; 2],
    /// When the upstream was called: zero before that, else the time and one.
    reached: Arc<AtomicU64>,
}

impl Call {
    pub(crate) fn of(end: End) -> Self {
        Self {
            key: 0,
            end,
            pauses: [0; 2],
            reached: Arc::default(),
        }
    }

    fn any(dice: &mut Dice) -> Self {
        let end = match dice.below(20) {
            0..12 => End::Answer,
            12..15 => End::Fail,
            15 => End::Panic,
            16 => End::PanicAtOnce,
            _ => End::Hang,
        };
        Self {
            key: dice.below(16),
            pauses: [dice.below(4), dice.below(4)],
            ..Self::of(end)
        }
    }

    pub(crate) async fn head(&self) {
        pause(self.pauses[0]).await;
    }

    pub(crate) async fn body(&self) -> io::Result<()> {
        pause(self.pauses[1]).await;
        match self.end {
            End::Answer => Ok(()),
            End::Fail => Err(unwell()),
            End::Panic | End::PanicAtOnce => panic_quietly(),
            End::Hang => pending().await,
        }
    }

    fn reached(&self) -> Option<u64> {
        self.reached.load(Ordering::SeqCst).checked_sub(1)
    }
}

async fn pause(times: u64) {
    for _ in 0..times {
        yield_now().await;
    }
}

fn unwell() -> io::Error {
    io::Error::other("unwell")
}

/// A panic as any other, but that nobody prints it.
fn panic_quietly() -> ! {
    resume_unwind(Box::new("a panic of the upstream"))
}

/// A call that runs inside the upstream.
pub(crate) struct Running(Arc<World>);

impl Running {
    fn begin(world: &Arc<World>) -> Self {
        let running = world.running.fetch_add(1, Ordering::SeqCst) + 1;
        world.most_running.fetch_max(running, Ordering::SeqCst);
        Self(world.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The service inside. A clone is in another mood.
pub(crate) struct Upstream {
    world: Arc<World>,
    /// Whether `poll_ready` ever fails.
    moody: bool,
    dice: Dice,
}

impl Upstream {
    pub(crate) fn new(world: &Arc<World>, moody: bool) -> Self {
        let number = world.services.fetch_add(1, Ordering::Relaxed);
        Self {
            world: world.clone(),
            moody,
            dice: world.dice(1_000 + number),
        }
    }

    /// Begins a call, or panics.
    pub(crate) fn begin(&self, call: &Call) -> Running {
        call.reached.store(self.world.now() + 1, Ordering::SeqCst);
        let running = Running::begin(&self.world);
        if call.end == End::PanicAtOnce {
            panic_quietly();
        }
        running
    }

    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.dice.once_in(8) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match self.dice.below(128) {
            0 if self.moody => panic_quietly(),
            1 | 2 if self.moody => Poll::Ready(Err(unwell())),
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl Clone for Upstream {
    fn clone(&self) -> Self {
        Self::new(&self.world, self.moody)
    }
}

impl Service<Call> for Upstream {
    type Response = ();
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let running = self.begin(&call);
        Box::pin(async move {
            let _running = running;
            call.head().await;
            call.body().await
        })
    }
}

/// Any service that is made of an upstream.
pub(crate) type Stack = BoxCloneSyncService<Call, (), BoxError>;

/// Calls that ran, by how they ended.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    pub(crate) answered: u64,
    pub(crate) failed: u64,
    pub(crate) dropped: u64,
}

/// When a call was asked for, and when it had reached the upstream: it was admitted in between.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Admission {
    pub(crate) key: u64,
    pub(crate) asked: u64,
    pub(crate) reached: u64,
}

/// What callers have seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) ended: Ended,
    /// Those that may have been admitted by a breaker that was disabled, and so are not counted.
    pub(crate) perhaps: Ended,
    /// Failures to become ready.
    pub(crate) unready: u64,
    pub(crate) open: u64,
    pub(crate) half_open_full: u64,
    pub(crate) forced_open: u64,
    pub(crate) over_limit: u64,
    /// Calls that were dropped before they reached the upstream or were told anything.
    pub(crate) unheard: u64,
    pub(crate) admissions: Vec<Admission>,
}

impl AddAssign for Ended {
    fn add_assign(&mut self, other: Self) {
        self.answered += other.answered;
        self.failed += other.failed;
        self.dropped += other.dropped;
    }
}

impl AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        self.ended += other.ended;
        self.perhaps += other.perhaps;
        self.unready += other.unready;
        self.open += other.open;
        self.half_open_full += other.half_open_full;
        self.forced_open += other.forced_open;
        self.over_limit += other.over_limit;
        self.unheard += other.unheard;
        self.admissions.extend(other.admissions);
    }
}

impl Seen {
    /// Calls of which a breaker has told that it rejected them.
    pub(crate) fn rejected_by_circuit(&self) -> u64 {
        self.open + self.half_open_full + self.forced_open
    }

    fn rejected(&mut self, reason: Reason) {
        *match reason {
            Reason::Open => &mut self.open,
            Reason::HalfOpenFull => &mut self.half_open_full,
            Reason::ForcedOpen => &mut self.forced_open,
            Reason::OverLimit => &mut self.over_limit,
            other => panic!("rejected for {other:?}"),
        } += 1;
    }
}

/// What an awaited step came to.
enum Came<T> {
    To(T),
    Panicked,
    Dropped,
}

/// Polls a step to its end, or so many times at most, and then drops it.
async fn poll_some<F: Future>(patience: Option<u64>, step: F) -> Came<F::Output> {
    let mut step = pin!(AssertUnwindSafe(step).catch_unwind());
    let mut polls = 0;
    poll_fn(|cx| {
        if patience == Some(polls) {
            return Poll::Ready(Came::Dropped);
        }
        polls += 1;
        if patience.is_some() {
            // Else it might be left alone with a step that nobody wakes.
            cx.waker().wake_by_ref();
        }
        step.as_mut().poll(cx).map(|end| end.map_or(Came::Panicked, Came::To))
    })
    .await
}

/// Makes one call, and sees what it comes to.
pub(crate) async fn call(world: &World, stack: &mut Stack, call: Call, patience: Option<u64>, seen: &mut Seen) {
    let asked = world.now();
    let disabled = world.disabled.load(Ordering::SeqCst);
    let future = catch_unwind(AssertUnwindSafe(|| stack.call(call.clone())));
    let was_disabled = world.disabled.load(Ordering::SeqCst);
    let came = match future {
        Ok(future) => poll_some(patience, future).await,
        Err(_) => Came::Panicked,
    };
    let Some(reached) = call.reached() else {
        match came {
            Came::To(Err(error)) => {
                let why = Rejected::find(&*error).expect("the upstream was not called");
                seen.rejected(why.reason);
            }
            Came::Dropped => seen.unheard += 1,
            Came::To(Ok(())) | Came::Panicked => panic!("nobody but the upstream answers or panics: {call:?}"),
        }
        return;
    };
    seen.admissions.push(Admission {
        key: call.key,
        asked,
        reached,
    });
    let ended = if disabled == was_disabled && disabled.is_multiple_of(2) {
        &mut seen.ended
    } else {
        &mut seen.perhaps
    };
    match came {
        Came::To(Ok(())) => ended.answered += 1,
        Came::To(Err(_)) | Came::Panicked => ended.failed += 1,
        Came::Dropped => ended.dropped += 1,
    }
}

/// Makes so many calls, or thinks better of it, in every way in which one can.
pub(crate) async fn pester(world: Arc<World>, stack: Stack, task: u64, calls: u64) -> Seen {
    let mut dice = world.dice(task);
    let mut own = stack.clone();
    let mut seen = Seen::default();
    for _ in 0..calls {
        // Else the instance of the last call, perhaps with what it holds.
        if dice.once_in(2) {
            own = stack.clone();
        }
        let patience = |dice: &mut Dice| dice.once_in(3).then(|| dice.below(6));
        match poll_some(patience(&mut dice), poll_fn(|cx| own.poll_ready(cx))).await {
            Came::To(Ok(())) => {}
            Came::Dropped => continue,
            Came::To(Err(_)) | Came::Panicked => {
                seen.unready += 1;
                continue;
            }
        }
        pause(dice.below(3)).await;
        if dice.once_in(8) {
            // Readied, and not called.
            continue;
        }
        let any = Call::any(&mut dice);
        let patience = if any.end == End::Hang {
            Some(dice.below(12))
        } else {
            patience(&mut dice)
        };
        call(&world, &mut own, any, patience, &mut seen).await;
    }
    seen
}

/// What a breaker counts a dropped call as: failed or cancelled.
pub(crate) fn split_dropped(ended: &Ended, cancelled: Outcome) -> (u64, u64) {
    match cancelled {
        Outcome::Failure => (ended.failed + ended.dropped, 0),
        _ => (ended.failed, ended.dropped),
    }
}
