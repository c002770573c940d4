//! Rounds, threads, medians and allocations: how a row is measured.

use crate::row::{Batch, Candidate, Expect, Row, Tally};
use std::{
    hint::spin_loop,
    num::NonZero,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
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
const SLICE: f64 = 400_000.0;

/// So many that it matters little how far apart two threads begin and end.
const FEWEST_CALLS: u64 = 50;

impl Effort {
    fn slices(self, nanos: f64) -> u32 {
        u32::try_from(whole(self.nanos / nanos)).map_or(u32::MAX, |slices| slices.clamp(3, 1_000))
    }
}

/// What was measured of one row.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) name: &'static str,
    /// Nanoseconds a call on one thread and on two, each round's.
    pub(crate) nanos: [Vec<f64>; 2],
    /// Heap allocations a call, and their bytes.
    pub(crate) allocations: f64,
    pub(crate) bytes: f64,
    pub(crate) future: Option<(usize, usize)>,
}

impl Figures {
    /// The median of the rounds with so many threads; `None` if the row is never shared.
    pub(crate) fn median(&self, threads: u32) -> Option<f64> {
        median(self.nanos[threads as usize - 1].clone())
    }
}

/// A run of a batch on one of the threads.
struct Job {
    batch: Batch,
    length: Length,
    start: Arc<Meeting>,
    epoch: Instant,
}

/// A measurement is many short slices, and its figure the median of them: a thread that the system takes off its core spoils
/// the slice it was in, not the measurement.
#[derive(Debug, Clone, Copy)]
struct Length {
    slices: u32,
    calls: u64,
}

/// What a thread did: when each slice began and ended, and how many calls were answered with `Ok`.
struct Done {
    slices: Vec<(Duration, Duration)>,
    ok: u64,
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
    fn run(&self, candidate: &Candidate, threads: u32, length: Length) -> Result<(f64, Tally), String> {
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
        let mut spans: Vec<(Duration, Duration)> = Vec::new();
        for (worker, _) in workers() {
            let done = worker.done.recv().map_err(|_| "it panicked")?;
            tally.add(u64::from(length.slices) * length.calls, done.ok);
            if spans.is_empty() {
                spans = done.slices;
            } else {
                for (span, other) in spans.iter_mut().zip(done.slices) {
                    *span = (span.0.min(other.0), span.1.max(other.1));
                }
            }
        }
        let nanos = spans
            .iter()
            .map(|(began, ended)| ended.saturating_sub(*began).as_secs_f64() * 1e9);
        let median = median(nanos.collect()).ok_or("no slices")?;
        Ok((median / length.calls as f64, tally))
    }
}

fn work(mut job: Job) -> Done {
    let _leaving = Leaving(&job.start);
    let mut ok = 0;
    let slices = (0..job.length.slices)
        .map(|slice| {
            job.start.wait(slice);
            let began = job.epoch.elapsed();
            ok += (job.batch)(job.length.calls);
            (began, job.epoch.elapsed())
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
            nanos: [Vec::new(), Vec::new()],
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
    fn measure(&mut self, crew: &Crew, threads: u32, length: Length) -> Result<f64, String> {
        let named = |error: String| format!("{}: {error}", self.row.name);
        let (nanos, tally) = crew.run(&self.candidate, threads, length).map_err(named)?;
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
        Ok(nanos)
    }

    /// Finds how many calls make a slice.
    fn calibrate(&mut self, crew: &Crew, effort: Effort) -> Result<(), String> {
        if self.row.calls.is_some() {
            return Ok(());
        }
        for threads in 1..=self.row.threads {
            let mut calls = 20;
            let nanos = loop {
                let nanos = self.measure(crew, threads, Length { slices: 5, calls })?;
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

/// Measures the rows: every row once in every round, each round beginning with another row.
pub(crate) fn measure(rows: Vec<Row>, crew: &Crew, effort: Effort) -> Result<Vec<Figures>, String> {
    let mut running: Vec<_> = rows.into_iter().map(Running::new).collect();
    for row in &mut running {
        row.count_allocations();
        row.calibrate(crew, effort)?;
    }
    for round in 0..effort.rounds {
        let first = round * running.len() / effort.rounds;
        for index in 0..running.len() {
            let at = (first + index) % running.len();
            let row = &mut running[at];
            for threads in 1..=row.row.threads {
                if row.row.fresh {
                    row.candidate = (row.row.build)();
                }
                let nanos = row.measure(crew, threads, row.lengths[threads as usize - 1])?;
                row.figures.nanos[threads as usize - 1].push(nanos);
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
