//! Rounds, threads, medians and allocations: how a row is measured.

use crate::row::{Batch, Candidate, Expect, Row, Tally};
use std::{
    hint::{black_box, spin_loop},
    num::NonZero,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

/// How much to measure.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// How many nanoseconds one measurement should take.
    pub(crate) nanos: f64,
}

/// How many nanoseconds a slice should take: a small part of what a scheduler gives a thread at a time.
const SLICE: f64 = 100_000.0;

/// How many times as many rounds there may be for a row that is disturbed.
const PATIENCE: usize = 4;

/// How many measurements find out how long a slice is.
const TRIES: u32 = 10;

/// So many that it matters little how far apart two threads begin and end.
const FEWEST_CALLS: u64 = 50;

impl Effort {
    fn slices(self, nanos: f64) -> u32 {
        u32::try_from(whole(self.nanos / nanos)).map_or(u32::MAX, |slices| slices.clamp(3, 2_000))
    }
}

/// What was measured of one row.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) name: &'static str,
    /// On one thread and on two, each round's.
    pub(crate) rounds: [Vec<Measured>; 2],
    /// Heap allocations a call, and their bytes.
    pub(crate) allocations: f64,
    pub(crate) bytes: f64,
    pub(crate) future: Option<(usize, usize)>,
}

impl Figures {
    /// Nanoseconds a call: the median of the rounds with so many threads, of the undisturbed ones if there are any; `None` if the
    /// row is never shared.
    pub(crate) fn median(&self, threads: u32) -> Option<f64> {
        let rounds = &self.rounds[threads as usize - 1];
        let disturbed = self.is_disturbed(threads);
        let counted = rounds.iter().filter(|it| disturbed || it.is_undisturbed());
        median(counted.map(|it| it.nanos).collect())
    }

    /// Whether so few rounds with so many threads were undisturbed that another is worth its time.
    fn is_mostly_disturbed(&self, threads: u32, rounds: usize) -> bool {
        let undisturbed = self.rounds[threads as usize - 1]
            .iter()
            .filter(|it| it.is_undisturbed())
            .count();
        undisturbed * 3 < rounds
    }

    /// Whether every round with so many threads was disturbed.
    pub(crate) fn is_disturbed(&self, threads: u32) -> bool {
        !self.rounds[threads as usize - 1].iter().any(Measured::is_undisturbed)
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// A call.
    pub(crate) nanos: f64,
    /// Which share of its slices was undisturbed. If they are enough, the others are left out.
    pub(crate) undisturbed: f64,
}

impl Measured {
    fn of(slices: &[Slice], length: Length) -> Option<Self> {
        // In a row: one alone may have been lucky with its probes.
        let calm = |at: usize| (at.saturating_sub(1)..=at + 1).all(|at| slices.get(at).is_none_or(|it| it.undisturbed));
        let calm: Vec<_> = (0..slices.len()).map(calm).collect();
        let undisturbed = calm.iter().filter(|it| **it).count() as f64 / slices.len() as f64;
        let counted = slices
            .iter()
            .zip(calm)
            .filter(|(_, calm)| *calm || undisturbed < ENOUGH);
        let nanos = counted.map(|(it, _)| it.ended.saturating_sub(it.began).as_secs_f64() * 1e9);
        Some(Self {
            nanos: median(nanos.collect())? / length.calls as f64,
            undisturbed,
        })
    }

    pub(crate) fn is_undisturbed(&self) -> bool {
        self.undisturbed >= ENOUGH
    }
}

/// The least share of undisturbed slices that stands for all.
const ENOUGH: f64 = 0.02;

/// How many nanoseconds of a core's time a fixed piece of independent work takes, as a core does several at once if nobody else
/// uses its units. Where two hardware threads share a core, which a virtual machine is not told, it takes up to twice as long
/// while the other one works; a locked addition, which mostly waits, hardly longer. So ratios of the two tell of the neighbours.
#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
fn probe() -> u64 {
    let began = Instant::now();
    let (mut one, mut two, mut three, mut four, mut five) = (1_u64, 2_u64, 3_u64, 4_u64, 5_u64);
    for i in 0..4_000 {
        one = black_box(one + i);
        two ^= one;
        three = three.wrapping_add(i);
        four ^= i << 3;
        five = five.wrapping_add(four) ^ three;
        black_box((two, three, four, five));
    }
    u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The shortest that the probe took on any of the threads.
static FASTEST: AtomicU64 = AtomicU64::new(u64::MAX);

/// Whether the core was this thread's alone, as far as the probe tells.
fn is_undisturbed() -> bool {
    let took = probe();
    let fastest = FASTEST.fetch_min(took, Ordering::Relaxed).min(took);
    took * 4 <= fastest * 5
}

/// A run of a batch on one of the threads.
struct Job {
    batch: Batch,
    length: Length,
    start: Arc<Meeting>,
    epoch: Instant,
}

/// A measurement is many short slices, and its figure the median of them: a thread that the system takes off its core spoils
/// the slice it was in, not the measurement, nor does a neighbour who works at times.
#[derive(Debug, Clone, Copy)]
struct Length {
    slices: u32,
    calls: u64,
}

/// What a thread did: its slices, and how many calls were answered with `Ok`.
struct Done {
    slices: Vec<Slice>,
    ok: u64,
}

struct Slice {
    began: Duration,
    ended: Duration,
    /// Before it and after it.
    undisturbed: bool,
}

impl Slice {
    /// The slice of several threads.
    fn join(&mut self, other: &Self) {
        self.began = self.began.min(other.began);
        self.ended = self.ended.max(other.ended);
        self.undisturbed &= other.undisturbed;
    }
}

/// Where the threads meet before each slice. They spin, since being woken would take as long as a part of a slice.
struct Meeting {
    threads: u32,
    arrived: AtomicU32,
}

impl Meeting {
    fn wait(&self, slice: u32) {
        let all = (slice + 1) * self.threads;
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0_u32;
        while self.arrived.load(Ordering::Acquire) < all {
            spins += 1;
            // The other one may wait for this core.
            if spins > 2_000 {
                thread::yield_now();
            } else {
                spin_loop();
            }
        }
    }
}

/// Lets the others go on when its thread panics.
struct Leaving<'a>(&'a Meeting);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.arrived.store(u32::MAX / 2, Ordering::Release);
        }
    }
}

struct Worker {
    jobs: mpsc::Sender<Job>,
    done: mpsc::Receiver<Done>,
}

/// Two threads that live as long as the run, as a server's do, each on a core of its own where the system allows it.
pub(crate) struct Crew {
    workers: Vec<Worker>,
    pub(crate) pinned: bool,
}

/// Threads on one core measure the scheduler, not the candidates.
pub(crate) fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

impl Crew {
    pub(crate) fn new(runtime: &tokio::runtime::Handle) -> Self {
        let mut cores = core_affinity::get_core_ids().unwrap_or_default().into_iter();
        let mut pinned = true;
        let workers = (0..2)
            .map(|_| {
                let core = cores.next();
                let (jobs, to_do) = mpsc::channel::<Job>();
                let (report, done) = mpsc::channel();
                let (tell, told) = mpsc::channel();
                let runtime = runtime.clone();
                thread::spawn(move || {
                    // Some peers make a timer of tokio's for each call.
                    let _entered = runtime.enter();
                    let _ = tell.send(core.is_some_and(core_affinity::set_for_current));
                    for job in to_do {
                        if report.send(work(job)).is_err() {
                            break;
                        }
                    }
                });
                pinned &= told.recv().unwrap_or(false);
                Worker { jobs, done }
            })
            .collect();
        Self { workers, pinned }
    }

    /// Runs the candidate on so many threads: nanoseconds a call, from when the first began until the last had ended, and what
    /// was answered.
    #[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
    fn run(&self, candidate: &Candidate, threads: u32, length: Length) -> Result<(Measured, Tally), String> {
        let start = Arc::new(Meeting {
            threads,
            arrived: AtomicU32::new(0),
        });
        let epoch = Instant::now();
        let workers = || self.workers.iter().zip(0..threads);
        for (worker, index) in workers() {
            let job = Job {
                batch: (candidate.batch)(index as usize),
                length,
                start: start.clone(),
                epoch,
            };
            worker.jobs.send(job).map_err(|_| "a thread is gone")?;
        }
        let mut tally = Tally::default();
        let mut slices: Vec<Slice> = Vec::new();
        for (worker, _) in workers() {
            let done = worker.done.recv().map_err(|_| "it panicked")?;
            tally.add(u64::from(length.slices) * length.calls, done.ok);
            if slices.is_empty() {
                slices = done.slices;
            } else {
                slices.iter_mut().zip(&done.slices).for_each(|(all, one)| all.join(one));
            }
        }
        Ok((Measured::of(&slices, length).ok_or("no slices")?, tally))
    }
}

fn work(mut job: Job) -> Done {
    let _leaving = Leaving(&job.start);
    let mut ok = 0;
    let slices = (0..job.length.slices)
        .map(|slice| {
            let before = is_undisturbed();
            job.start.wait(slice);
            let began = job.epoch.elapsed();
            ok += (job.batch)(job.length.calls);
            let ended = job.epoch.elapsed();
            Slice {
                began,
                ended,
                undisturbed: is_undisturbed() && before,
            }
        })
        .collect();
    Done { slices, ok }
}

pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// A row while it is measured.
struct Running {
    row: Row,
    candidate: Candidate,
    /// With one thread and with two.
    lengths: [Length; 2],
    figures: Figures,
}

impl Running {
    fn new(row: Row) -> Self {
        let candidate = (row.build)();
        let figures = Figures {
            name: row.name,
            rounds: [Vec::new(), Vec::new()],
            allocations: 0.0,
            bytes: 0.0,
            future: candidate.future,
        };
        let length = Length {
            slices: 1,
            calls: row.calls.unwrap_or(0),
        };
        Self {
            row,
            candidate,
            lengths: [length; 2],
            figures,
        }
    }

    /// It fails unless the candidate did what the row says.
    fn measure(&mut self, crew: &Crew, threads: u32, length: Length) -> Result<Measured, String> {
        let named = |error: String| format!("{}: {error}", self.row.name);
        let (measured, tally) = crew.run(&self.candidate, threads, length).map_err(named)?;
        self.candidate.total.join(tally);
        let expected = self
            .row
            .expect
            .of(u64::from(length.slices) * length.calls, threads.into());
        if !expected.contains(&tally.ok) {
            return Err(named(format!(
                "of {} calls on {threads} threads {} were answered with Ok; expected {expected:?}",
                tally.calls, tally.ok
            )));
        }
        (self.candidate.check)(self.candidate.total).map_err(named)?;
        Ok(measured)
    }

    fn measure_again(&mut self, crew: &Crew, threads: u32) -> Result<(), String> {
        if self.row.fresh {
            self.candidate = (self.row.build)();
        }
        let measured = self.measure(crew, threads, self.lengths[threads as usize - 1])?;
        self.figures.rounds[threads as usize - 1].push(measured);
        Ok(())
    }

    /// The least of a few measurements, undisturbed or not: a thread that the system takes off its core shows in no probe. What it
    /// makes of one would be taken for dear calls, and so few of them for a slice that it measured how the threads meet, in
    /// every round.
    fn quickest(&mut self, crew: &Crew, threads: u32, length: Length) -> Result<f64, String> {
        let mut least = f64::INFINITY;
        for _ in 0..TRIES {
            least = least.min(self.measure(crew, threads, length)?.nanos);
        }
        Ok(least)
    }

    /// Finds how many calls make a slice.
    fn calibrate(&mut self, crew: &Crew, effort: Effort) -> Result<(), String> {
        if self.row.calls.is_some() {
            return Ok(());
        }
        for threads in 1..=self.row.threads {
            let mut calls = 20;
            let nanos = loop {
                let nanos = self.quickest(crew, threads, Length { slices: 5, calls })?;
                if nanos * calls as f64 > SLICE / 4.0 {
                    break nanos;
                }
                calls *= 4;
            };
            let calls = whole(SLICE / nanos).max(FEWEST_CALLS);
            let slice = nanos * calls as f64;
            self.lengths[threads as usize - 1] = Length {
                slices: effort.slices(slice),
                calls,
            };
        }
        Ok(())
    }

    /// Counts on this thread, by the allocator; the other threads do the same work.
    fn count_allocations(&mut self) {
        const CALLS: u64 = 200;
        let mut batch = (self.candidate.batch)(0);
        // The first call of a thread may set up what belongs to the thread.
        let warm = batch(CALLS);
        let mut ok = 0;
        let info = allocation_counter::measure(|| ok = batch(CALLS));
        self.candidate.total.join(Tally {
            calls: 2 * CALLS,
            ok: warm + ok,
        });
        self.figures.allocations = info.count_total as f64 / CALLS as f64;
        self.figures.bytes = info.bytes_total as f64 / CALLS as f64;
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a number of calls"
)]
fn whole(number: f64) -> u64 {
    number as u64
}

/// Measures the rows: every row once in every round, each round beginning with another row. Then again those that were
/// disturbed too often.
pub(crate) fn measure(rows: Vec<Row>, crew: &Crew, effort: Effort) -> Result<Vec<Figures>, String> {
    let mut running: Vec<_> = rows.into_iter().map(Running::new).collect();
    for row in &mut running {
        row.count_allocations();
        row.calibrate(crew, effort)?;
    }
    let count = running.len();
    for round in 0..effort.rounds * PATIENCE {
        let first = round * count / effort.rounds;
        for index in 0..count {
            let row = &mut running[(first + index) % count];
            for threads in 1..=row.row.threads {
                if round < effort.rounds || row.figures.is_mostly_disturbed(threads, effort.rounds) {
                    row.measure_again(crew, threads)?;
                }
            }
        }
    }
    Ok(running.into_iter().map(|row| row.figures).collect())
}

impl Expect {
    /// How many calls are answered with `Ok`, if each of the threads makes so many.
    fn of(self, calls: u64, threads: u64) -> RangeInclusive<u64> {
        let all = calls * threads;
        let exactly = |ok| ok..=ok;
        match self {
            Self::Reject => exactly(0),
            Self::FailOneIn(n) => exactly(all - calls / n * threads),
            Self::AcceptMost if threads > 1 => all - all / 20..=all,
            Self::Accept | Self::AcceptMost => exactly(all),
        }
    }
}
