//! portcullis beside its peers: what a guarded call costs, measured in one process and one run.
//!
//! `cargo run --release --manifest-path benches/peers/Cargo.toml`, with `-- --help` for the options.
//!
//! # How it measures
//!
//! Every row is measured once in every round, on one thread and then on two threads that share the instance; each round begins
//! with another row, so that a machine that slows down slows all of them. The threads are pinned to a core each where the system
//! allows it. A measurement is many slices of about a hundred microseconds, which both threads begin together; its figure is the
//! median of the slices, from when the first thread begins until the last has ended, divided by the calls of one thread. A row's
//! figure is the median of the rounds.
//!
//! Before and after each slice every thread does a fixed piece of work. Where that takes over a quarter longer than the fastest
//! so far (there are thousands before the first round, when the length of the slices is found), the core is shared at that moment: two hardware threads of one core are sold as two, and a neighbour in another
//! virtual machine is not to be seen otherwise. Such a slice is left out with its neighbours, a round in which hardly any other is left
//! counts no more than they do, and rows with few rounds that count are measured up to four times as often. A figure for which that was not
//! enough is the median of all and marked `~`.
//!
//! Nanoseconds do not travel between machines. The ratio to the *floor*, one addition to a counter of the thread's own in the
//! same run, does so better.
//!
//! A call of a tower service is ready, call, poll; `clone + ready + call` is what axum does for each request. The service behind
//! the layers answers at once. Rows without a word about the clock use `Clock::fast()`. Heap allocations are counted on one thread
//! by a counting allocator; it makes each allocation dearer by a few nanoseconds, for all candidates alike and for the row of one
//! allocation. The size of a response future is given beside that of the inner service's; tower-resilience's is a box, and what is
//! in it shows among the bytes allocated. In the rows with failures a layer in error mode boxes the service's own error.
//!
//! # What makes a run fail
//!
//! A candidate that did not do the work: every call's answer is counted, and after every measurement the candidate is asked, as
//! far as its API tells, whether its breaker is closed or open and what it has admitted and rejected. Our own counters must agree
//! with the answers to the call. The run ends with exit code 1 and the name of the row. A goal that is missed ends no run.
//!
//! # Which peers
//!
//! Their newest releases when this was written: `Cargo.lock` has the versions. See [`peers`] for how each is called. Those that
//! offer a plain function call are called that way, so they are measured without tower's part.

#![forbid(unsafe_code)]

mod e2e;
mod goals;
mod measure;
mod options;
mod ours;
mod peers;
mod primitives;
mod report;
mod row;

use options::Options;
use primitives::FLOOR;
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = match Options::read(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}\n\n{}", options::HELP);
            return ExitCode::FAILURE;
        }
    };
    let done = if options.axum {
        e2e::run(&options)
    } else {
        run(&options)
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), String> {
    // Some peers make a timer of tokio's for each call or service, though none of them is waited for.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .map_err(|error| error.to_string())?;
    let _entered = runtime.enter();
    let rows: Vec<_> = [
        primitives::rows(),
        ours::breakers(),
        peers::closed(),
        peers::failing(),
        peers::open(),
        ours::limiters(),
        peers::accepting(),
        peers::rejecting(),
        peers::sliding(),
        peers::keyed(),
        ours::pairs(),
    ]
    .into_iter()
    .flatten()
    .filter(|row| row.name == FLOOR || row.name.contains(&options.only))
    .collect();
    let crew = measure::Crew::new(runtime.handle());
    let figures = measure::measure(rows, &crew, options.effort())?;
    let mut goals = goals::judge(&figures);
    if options.only.is_empty() {
        goals.extend(goals::memory());
    }
    if options.json {
        println!("{}", report::json(&figures, &goals, &crew));
    } else {
        print!("{}", report::table(&figures, &goals, &crew));
    }
    Ok(())
}
