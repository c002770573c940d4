//! One hot path, so many times: what `benches/instructions` counts the instructions of.
//!
//! `cargo bench --all-features --bench paths -- PATH CALLS` makes that many calls; without arguments, a few on every path.

use portcullis::{
    Adaptive, CircuitBreaker, CircuitBreakerLayer, Clock, GuardLayer, KeyedRateLimiter, Outcome, RateLimitLayer,
    RateLimiter, SlidingWindow, TokenBucket, Window,
};
use std::{
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};
use tower::{Layer, Service, service_fn};

const SECOND: Duration = Duration::from_secs(1);

type Inner = fn(u32) -> Ready<Result<u32, std::io::Error>>;
type Path = Box<dyn FnMut() -> bool>;
/// A path by name, whether its calls are answered as expected (or all rejected), and how it is made.
type Row = (&'static str, bool, fn() -> Path);

/// Readies and calls the service once; whether it was admitted.
fn call<S: Service<u32>>(service: &mut S) -> bool {
    ask(service, 1)
}

#[inline]
fn ask<S: Service<u32>>(service: &mut S, request: u32) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    let _ = black_box(service.poll_ready(&mut cx));
    matches!(pin!(service.call(black_box(request))).poll(&mut cx), Poll::Ready(Ok(_)))
}

fn through<L>(layer: L) -> Path
where
    L: Layer<tower::util::ServiceFn<Inner>>,
    L::Service: Service<u32> + 'static,
{
    let mut service = layer.layer(service_fn((|x| ready(Ok(x))) as Inner));
    Box::new(move || call(&mut service))
}

/// One call in so many fails.
fn failing<L>(layer: L, one_in: u32) -> Path
where
    L: Layer<tower::util::ServiceFn<Inner>>,
    L::Service: Service<u32> + 'static,
{
    fn answer(request: u32) -> Ready<Result<u32, std::io::Error>> {
        ready(match request {
            0 => Err(std::io::ErrorKind::TimedOut.into()),
            request => Ok(request),
        })
    }
    let mut service = layer.layer(service_fn(answer as Inner));
    let mut calls = 0;
    Box::new(move || {
        calls += 1;
        ask(&mut service, calls % one_in) == (calls % one_in != 0)
    })
}

fn cloned<L>(layer: L) -> Path
where
    L: Layer<tower::util::ServiceFn<Inner>>,
    L::Service: Service<u32> + Clone + 'static,
{
    let service = layer.layer(service_fn((|x| ready(Ok(x))) as Inner));
    Box::new(move || call(&mut service.clone()))
}

/// A clock that stands still: reading the time of the machine would be counted with the path.
fn limiter(algorithm: impl Into<portcullis::Algorithm>) -> RateLimiter {
    RateLimiter::builder("bench", algorithm)
        .clock(Clock::manual())
        .build()
        .expect("a valid limit")
}

fn breaker(
    configure: impl FnOnce(portcullis::CircuitBreakerBuilder) -> portcullis::CircuitBreakerBuilder,
) -> CircuitBreaker {
    let breaker = configure(CircuitBreaker::builder("bench").clock(Clock::manual()))
        .build()
        .expect("a valid config");
    for _ in 0..200 {
        breaker.try_acquire().expect("closed").settle(Outcome::Success);
    }
    breaker
}

fn paths() -> Vec<Row> {
    fn plenty() -> RateLimiter {
        limiter(TokenBucket::new(u32::MAX, SECOND))
    }
    fn spent() -> RateLimiter {
        let limiter = limiter(TokenBucket::new(1, SECOND));
        drop(limiter.try_acquire());
        limiter
    }
    fn open() -> CircuitBreaker {
        let breaker = breaker(|it| it.failure_threshold(1));
        breaker.try_acquire().expect("closed").settle(Outcome::Failure);
        breaker
    }
    vec![
        ("nothing", true, || through(tower::layer::util::Identity::new())),
        ("breaker", true, || through(CircuitBreakerLayer::new(breaker(|it| it)))),
        ("breaker-cloned", true, || {
            cloned(CircuitBreakerLayer::new(breaker(|it| it)))
        }),
        ("breaker-count-window", true, || {
            through(CircuitBreakerLayer::new(breaker(|it| it.failure_rate(0.5))))
        }),
        ("breaker-count-window-failing", true, || {
            let breaker = breaker(|it| it.failure_rate(0.9).window(Window::calls(1_000)));
            breaker.try_acquire().expect("closed").settle(Outcome::Failure);
            through(CircuitBreakerLayer::new(breaker))
        }),
        ("breaker-time-window", true, || {
            // So long that no tenth of it ends; on a clock of the program's, where successes are only counted.
            let window = Window::time(100_000 * SECOND);
            through(CircuitBreakerLayer::new(breaker(|it| {
                it.clock(Clock::system()).failure_rate(0.5).window(window)
            })))
        }),
        ("breaker-failure", true, || {
            let breaker = breaker(|it| it.clock(Clock::system()).failure_threshold(u32::MAX));
            failing(CircuitBreakerLayer::new(breaker), 1)
        }),
        ("breaker-count-window-tenth-fails", true, || {
            let breaker = breaker(|it| it.clock(Clock::system()).failure_rate(0.5));
            failing(CircuitBreakerLayer::new(breaker), 10)
        }),
        ("breaker-open", false, || through(CircuitBreakerLayer::new(open()))),
        ("token-bucket", true, || through(RateLimitLayer::new(plenty()))),
        ("token-bucket-cloned", true, || cloned(RateLimitLayer::new(plenty()))),
        ("token-bucket-refusing", false, || through(RateLimitLayer::new(spent()))),
        ("sliding-window", true, || {
            through(RateLimitLayer::new(limiter(SlidingWindow::new(1 << 20, SECOND))))
        }),
        // By a clock that a permit names: an outcome is only counted then.
        ("adaptive", true, || {
            let limiter = RateLimiter::new("bench", Adaptive::new(u32::MAX).burst(1 << 20));
            through(RateLimitLayer::new(limiter.expect("a valid limit")))
        }),
        ("keyed", true, || {
            let limiter = KeyedRateLimiter::builder("bench", TokenBucket::new(u32::MAX, SECOND))
                .clock(Clock::manual())
                .build()
                .expect("a valid limit");
            through(RateLimitLayer::new(limiter.by(|key: &u32| Some(*key))))
        }),
        ("pair", true, || through(GuardLayer::new((plenty(), breaker(|it| it))))),
        #[cfg(feature = "http")]
        ("http-nothing", true, || {
            http::served(tower::layer::util::Identity::new())
        }),
        #[cfg(feature = "http")]
        ("http-pair", true, || {
            http::served(GuardLayer::http((plenty(), breaker(|it| it))))
        }),
    ]
}

#[cfg(feature = "http")]
mod http {
    use super::{Path, black_box};
    use axum::{
        BoxError,
        body::{Body, Bytes, HttpBody},
        http::{Request, Response},
        response::IntoResponse,
    };
    use std::{
        convert::Infallible,
        future::{Future, Ready, ready},
        pin::{Pin, pin},
        task::{Context, Poll, Waker},
    };
    use tower::{Layer, Service, service_fn};

    type Inner = fn(Request<Body>) -> Ready<Result<Response<Body>, Infallible>>;

    fn hello(_: Request<Body>) -> Ready<Result<Response<Body>, Infallible>> {
        ready(Ok("hello".into_response()))
    }

    /// What axum does for each request: the service is cloned, and its answer's body is boxed and read to its end.
    pub(crate) fn served<L, B>(layer: L) -> Path
    where
        L: Layer<tower::util::ServiceFn<Inner>>,
        L::Service: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let service = layer.layer(service_fn(hello as Inner));
        Box::new(move || {
            let mut cx = Context::from_waker(Waker::noop());
            let mut service = service.clone();
            let _ = black_box(service.poll_ready(&mut cx));
            let request = black_box(Request::new(Body::empty()));
            let Poll::Ready(Ok(response)) = pin!(service.call(request)).poll(&mut cx) else {
                return false;
            };
            let mut body = response.map(Body::new).into_body();
            let frame = Pin::new(&mut body).poll_frame(&mut cx);
            frame.is_ready() && body.is_end_stream()
        })
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let (only, calls) = (arguments.next(), arguments.next());
    let calls: u32 = calls.map_or(10, |calls| calls.parse().expect("a number of calls"));
    for (name, admits, make) in paths() {
        if only.as_ref().is_none_or(|only| only == name) {
            let mut path = make();
            let admitted = (0..calls).filter(|_| path()).count();
            let expected = if admits { calls as usize } else { 0 };
            assert_eq!(admitted, expected, "{name} did not do its work");
            if only.is_none() {
                println!("{name}");
            }
        }
    }
}
