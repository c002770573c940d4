//! Whole services under stress: 64 tasks call them on several threads, drop calls and readied services wherever one can, panic, fail
//! and hang, while an operator overrides, resets and reconfigures, time passes, and a watcher looks on. What must hold meanwhile: never more
//! probes or admissions than allowed, no counter falls. And at the end: the counters are what the callers saw, nothing is held, and a
//! circuit whose upstream is well closes.
//!
//! `PORTCULLIS_STRESS` multiplies the calls, `PORTCULLIS_SEED` repeats what the tasks do.

#[path = "../chance/mod.rs"]
mod chance;

mod breakers;
mod limits;
#[cfg(feature = "http")]
mod streaming;
mod upstream;

use chance::setting;
use futures_util::future::join_all;
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{runtime, task::JoinHandle, task::yield_now};
use upstream::{Seen, Stack, World, pester};

const TASKS: u64 = 64;

fn on_several_threads<F: Future>(run: F) -> F::Output {
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_time()
        .build()
        .expect("threads");
    runtime.block_on(run)
}

/// Something that goes on beside the callers until they are done.
fn beside(done: &Arc<AtomicBool>, mut step: impl FnMut() + Send + 'static) -> JoinHandle<()> {
    let done = done.clone();
    tokio::spawn(async move {
        while !done.load(Ordering::SeqCst) {
            step();
            yield_now().await;
        }
    })
}

/// Lets all tasks call these services, one after the other in turn, and adds up what they saw. `steps` go on beside them.
async fn stress(
    world: &Arc<World>,
    stacks: &[Stack],
    calls: u64,
    steps: impl IntoIterator<Item = Box<dyn FnMut() + Send>>,
) -> Seen {
    let done = Arc::new(AtomicBool::new(false));
    let beside: Vec<_> = steps.into_iter().map(|step| beside(&done, step)).collect();
    let factor = setting("PORTCULLIS_STRESS", 1);
    let tasks = (0..TASKS).zip(stacks.iter().cycle());
    let tasks = tasks.map(|(task, stack)| tokio::spawn(pester(world.clone(), stack.clone(), task, calls * factor)));
    // Not a measure of time: the test would otherwise hang where it should fail.
    let patience = Duration::from_secs(120 * factor);
    let tasks = tokio::time::timeout(patience, join_all(tasks));
    let tasks = tasks.await.expect("nobody waits for ever: a wake-up was lost");
    done.store(true, Ordering::SeqCst);
    for step in beside {
        step.await.expect("what goes on beside the callers holds");
    }
    let mut seen = Seen::default();
    for task in tasks {
        seen += task.expect("a task ends");
    }
    seen
}
