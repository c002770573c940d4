//! What a guarded call costs beside an unguarded one: `cargo bench --all-features`.
//!
//! Each row is one service call (ready, call, poll) on one thread and on two threads that share the policy; the median of nine
//! rounds, the rows interleaved, so that a machine that slows down slows all of them. Beside the nanoseconds, which do not travel
//! between machines, stands the ratio to one addition to a counter of the thread's own, measured in the same run.

use portcullis::{
    CircuitBreaker, CircuitBreakerLayer, Clock, GuardLayer, Outcome, RateLimitLayer, RateLimiter, SlidingWindow,
    TokenBucket, Window,
};
use std::{
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Waker},
    thread,
    time::{Duration, Instant},
};
use tower::{Layer, Service, service_fn};

const CALLS: u32 = 200_000;
const ROUNDS: usize = 9;

type Inner = fn(u32) -> Ready<Result<u32, std::io::Error>>;
/// Makes one thread's step; steps of one row share a policy.
type Row = (&'static str, Box<dyn Fn() -> Box<dyn FnMut() + Send>>);

fn call<S: Service<u32>>(service: &mut S) {
    let mut cx = Context::from_waker(Waker::noop());
    let _ = black_box(service.poll_ready(&mut cx));
    let future = pin!(service.call(1));
    let _ = black_box(future.poll(&mut cx));
}

fn row<L>(name: &'static str, layer: L) -> Row
where
    L: Layer<tower::util::ServiceFn<Inner>> + 'static,
    L::Service: Service<u32> + Send + 'static,
{
    let make = move || {
        let mut service = layer.layer(service_fn((|x| ready(Ok(x))) as Inner));
        Box::new(move || call(&mut service)) as Box<dyn FnMut() + Send>
    };
    (name, Box::new(make))
}

fn limited(algorithm: impl Into<portcullis::Algorithm>, clock: Clock) -> RateLimiter {
    RateLimiter::builder("bench", algorithm)
        .clock(clock)
        .build()
        .expect("a valid limit")
}

fn breaker(
    configure: impl FnOnce(portcullis::CircuitBreakerBuilder) -> portcullis::CircuitBreakerBuilder,
) -> CircuitBreaker {
    configure(CircuitBreaker::builder("bench"))
        .build()
        .expect("a valid config")
}

fn rows() -> Vec<Row> {
    let second = Duration::from_secs(1);
    let plenty = TokenBucket::new(1_000_000_000, second);
    let exhausted = limited(TokenBucket::new(1, 1_000_000 * second), Clock::fast());
    let _ = exhausted.try_acquire();
    let open = breaker(|it| {
        it.clock(Clock::fast())
            .failure_threshold(1)
            .recovery_timeout(1_000_000 * second)
    });
    open.try_acquire().expect("closed").settle(Outcome::Failure);
    let own = || {
        let counter = Box::new(AtomicU64::new(0));
        Box::new(move || {
            black_box(counter.fetch_add(1, Ordering::Relaxed));
        }) as Box<dyn FnMut() + Send>
    };
    vec![
        ("one addition (the floor)", Box::new(own)),
        row("no layer", tower::layer::util::Identity::new()),
        row("breaker, closed", CircuitBreakerLayer::new(breaker(|it| it))),
        row(
            "breaker, closed, last 100 calls",
            CircuitBreakerLayer::new(breaker(|it| it.failure_rate(0.5))),
        ),
        row(
            "breaker, closed, last 10 s",
            CircuitBreakerLayer::new(breaker(|it| {
                it.clock(Clock::fast())
                    .failure_rate(0.5)
                    .window(Window::time(10 * second))
            })),
        ),
        row("breaker, open", CircuitBreakerLayer::new(open)),
        row("token bucket", RateLimitLayer::new(limited(plenty, Clock::system()))),
        row(
            "token bucket, fast clock",
            RateLimitLayer::new(limited(plenty, Clock::fast())),
        ),
        row("token bucket, exhausted", RateLimitLayer::new(exhausted)),
        row(
            "sliding window of 10,000",
            RateLimitLayer::new(limited(
                SlidingWindow::new(10_000, Duration::from_nanos(1)),
                Clock::fast(),
            )),
        ),
        row(
            "token bucket and breaker, a pair",
            GuardLayer::new((limited(plenty, Clock::fast()), breaker(|it| it.clock(Clock::fast())))),
        ),
    ]
}

/// Nanoseconds a call, with this many threads at once.
#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
fn measure(make: &dyn Fn() -> Box<dyn FnMut() + Send>, threads: usize) -> f64 {
    let start = Barrier::new(threads);
    let steps: Vec<_> = (0..threads).map(|_| make()).collect();
    let slowest = thread::scope(|scope| {
        let running: Vec<_> = steps
            .into_iter()
            .map(|mut step| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    let began = Instant::now();
                    (0..CALLS).for_each(|_| step());
                    began.elapsed()
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().expect("no panic")).max()
    });
    slowest.unwrap_or_default().as_secs_f64() * 1e9 / f64::from(CALLS)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    // `cargo test --benches` runs this to see that it still works.
    let rounds = if std::env::args().any(|argument| argument == "--test") {
        1
    } else {
        ROUNDS
    };
    let rows = rows();
    let mut times = vec![[Vec::new(), Vec::new()]; rows.len()];
    for _ in 0..rounds {
        for ((_, make), times) in rows.iter().zip(&mut times) {
            for (threads, times) in (1..).zip(times) {
                times.push(measure(make, threads));
            }
        }
    }
    let medians: Vec<[f64; 2]> = times.into_iter().map(|times| times.map(median)).collect();
    let floor = medians[0];
    println!(
        "{:34} {:>10} {:>8} {:>12} {:>8}",
        "", "1 thread", "floors", "2 threads", "floors"
    );
    for ((name, _), [one, two]) in rows.iter().zip(medians) {
        println!(
            "{name:34} {one:7.1} ns {:8.1} {two:9.1} ns {:8.1}",
            one / floor[0],
            two / floor[1]
        );
    }
}
