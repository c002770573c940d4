//! A soak over real HTTP on loopback: callers with keys, a gateway behind limits and in front of a breaker, and an upstream that
//! answers, fails, hangs, stalls in the middle of its answer and breaks it off. Callers retry and go away. What must hold: the
//! metrics page counts what the callers saw, to the call; nothing stays held; memory and keys stay within bounds.
//!
//! `PORTCULLIS_SOAK_REQUESTS` says how many requests, `PORTCULLIS_SEED` repeats what they are.
#![cfg(feature = "http")]

#[path = "../chance/mod.rs"]
mod chance;

mod callers;
mod gateway;
mod upstream;

use callers::{Caller, Tally};
use chance::{Dice, seed, setting};
use futures_util::future::join_all;
use gateway::{Gateway, KEYS, SUCCESSES};
use portcullis::{Clock, State};
use std::{
    fs,
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, task::yield_now, time::timeout};
use upstream::Upstream;

const CALLERS: u64 = 32;
/// Slices of a run, in every second of which the upstream is ill.
const SLICES: u64 = 16;
/// Those after which everything is as large as it gets.
const WARM_UP: u64 = 6;
/// By how much the process may grow after that, in kB.
const GROWTH: u64 = 6 * 1024;

async fn serve(app: axum::Router) -> SocketAddr {
    let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async { axum::serve(listener, app).await });
    address
}

/// Waits for a condition, and tells whether it has come to hold.
async fn comes_to_hold<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) -> bool {
    let wait = async {
        while !condition().await {
            yield_now().await;
        }
    };
    // Not a measure of time: the test would otherwise hang where it should fail.
    timeout(Duration::from_secs(60), wait).await.is_ok()
}

/// How much memory the process has, in kB; nothing where that cannot be told.
fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_long_run_leaks_nothing_holds_nothing_and_is_counted_as_the_callers_saw_it() {
    let requests = setting("PORTCULLIS_SOAK_REQUESTS", 2_560);
    let root = seed();
    let clock = Clock::manual();
    let upstream = Upstream::default();
    let gateway = Gateway::new(&clock, serve(upstream.app()).await);
    let address = serve(gateway.app()).await;

    let mut seen = Tally::default();
    let mut warm = None;
    for slice in 0..SLICES {
        let is_ill = slice % 2 == 1;
        let callers = (0..CALLERS).map(|number| {
            let dice = Dice::new(root, slice * CALLERS + number);
            let caller = Caller::new(address, &upstream, &clock, dice);
            tokio::spawn(caller.make(requests.div_ceil(SLICES * CALLERS), is_ill))
        });
        // Not a measure of time, as above.
        let slice_of_all = timeout(Duration::from_secs(300), join_all(callers)).await;
        for tally in slice_of_all.expect("nobody waits for ever") {
            seen += tally.expect("every caller is answered, or goes away");
        }
        let keys = gateway.keys();
        assert!(keys.tracked <= KEYS, "{keys:?}");
        let memory = resident();
        let (tracked, evicted, overflow) = (keys.tracked, keys.evicted, keys.overflow_requests);
        println!("slice {slice}: {memory:?} kB, {tracked} keys, {evicted} evicted, {overflow} overflowed, {seen:?}");
        if slice + 1 == WARM_UP {
            warm = memory;
        }
        if let (Some(warm), Some(now)) = (warm, memory) {
            assert!(now <= warm + GROWTH, "grown from {warm} to {now} kB");
        }
    }
    assert!(
        seen.met_everything() && gateway.keys().overflow_requests > 0,
        "{seen:?}"
    );

    let idle = comes_to_hold(async || gateway.running.now() + upstream.running.now() == 0);
    assert!(idle.await, "a request is still running");
    let monitor = Caller::new(address, &upstream, &clock, Dice::new(root, 0));
    // An answer is counted at the end of its body, of which a caller may know earlier.
    comes_to_hold(async || gateway::counted(&monitor.metrics().await) == seen).await;
    let metrics = monitor.metrics().await;
    assert_eq!(
        gateway::counted(&metrics),
        seen,
        "what the page says, and what the callers saw"
    );
    for gauge in [
        r#"circuit_breaker_probes_in_flight{service="upstream"}"#,
        r#"rate_limiter_waiting{service="api",limit="all"}"#,
        r#"rate_limiter_waiting{service="api",limit="per-caller"}"#,
    ] {
        assert_eq!(gateway::value(&metrics, gauge), 0, "{gauge}");
    }
    check_that_keys_make_room(&gateway, &clock);
    check_that_the_circuit_closes(&gateway, monitor).await;
}

/// Once everybody has his whole quota back, as many new keys find room as there is, and none meets the overflow.
fn check_that_keys_make_room(gateway: &Gateway, clock: &portcullis::ManualClock) {
    clock.advance(Duration::from_secs(3_600));
    let before = gateway.keys();
    for key in 0..KEYS {
        gateway.callers.try_acquire(&("new", key)).expect("a quota of its own");
    }
    let after = gateway.keys();
    assert_eq!(after.overflow_requests, before.overflow_requests);
    assert_eq!(
        after.evicted + after.tracked as u64,
        before.evicted + (before.tracked + KEYS) as u64
    );
}

/// With the upstream well again.
async fn check_that_the_circuit_closes(gateway: &Gateway, mut caller: Caller) {
    let mut seen = Tally::default();
    while gateway.breaker.state() != State::Closed {
        caller.ask_well(&mut seen).await;
        assert!(
            seen.answered <= SUCCESSES.into(),
            "closed by so many successes: {seen:?}"
        );
    }
    caller.ask_well(&mut seen).await;
    assert!(seen.answered > 0, "{seen:?}");
}

/// How many there are of something.
#[derive(Default, Clone)]
struct Gauge(Arc<AtomicUsize>);

impl Gauge {
    fn now(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    /// One more, until it is dropped.
    fn enter(&self) -> Entered {
        self.0.fetch_add(1, Ordering::SeqCst);
        Entered(self.clone())
    }
}

struct Entered(Gauge);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}
