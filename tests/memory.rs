//! What is allocated, and what is not: the memory of the parts, and the admit path that allocates nothing.

use allocation_counter::{AllocationInfo, measure};
use portcullis::{
    Adaptive, Algorithm, CircuitBreaker, CircuitBreakerLayer, Clock, GuardLayer, KeyedCircuitBreaker, KeyedRateLimiter,
    ManualClock, Outcome, RateLimitLayer, RateLimiter, SlidingWindow, TokenBucket, Window,
};
use std::{
    future::{Ready, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};
use tower::{Layer, Service, service_fn};

const MINUTE: Duration = Duration::from_secs(60);

fn limiter(algorithm: impl Into<Algorithm>, clock: &ManualClock) -> RateLimiter {
    RateLimiter::builder("agent", algorithm).clock(clock).build().unwrap()
}

/// What `make` leaves allocated, in bytes.
fn size<T>(make: impl Fn() -> T) -> i64 {
    // Names, clocks and thread locals of a first time are not part of it.
    drop(make());
    let mut kept = None;
    let info = measure(|| kept = Some(make()));
    let freed = measure(|| drop(kept.take()));
    assert_eq!(
        info.bytes_current, -freed.bytes_current,
        "the last handle frees everything"
    );
    info.bytes_current
}

#[test]
fn a_sliding_window_takes_8_bytes_for_each_request_of_its_quota() {
    let clock = Clock::manual();
    let window = |n: u32| size(|| limiter(SlidingWindow::new(n, MINUTE), &clock));
    for n in [1, 100, 10_000, 1_000_000] {
        assert_eq!(window(2 * n) - window(n), 8 * i64::from(n), "{n} requests more");
    }
    let small = window(1);
    for n in [63, 64, 10_000] {
        let more = window(n) - small - 8 * i64::from(n - 1);
        assert!((0..=2_100).contains(&more), "{more} bytes beside those of {n} requests");
    }
}

#[test]
fn use_grows_nothing() {
    let clock = Clock::manual();
    let limiters = [
        limiter(TokenBucket::new(1000, MINUTE), &clock),
        limiter(SlidingWindow::new(1000, MINUTE), &clock),
        limiter(Adaptive::new(1000), &clock),
    ];
    let breaker = CircuitBreaker::builder("agent")
        .clock(&clock)
        .failure_rate(1.0)
        .window(Window::time(MINUTE))
        .build()
        .unwrap();
    let go = || {
        for _ in 0..3 {
            for _ in 0..1000 {
                for limiter in &limiters {
                    limiter.try_acquire().unwrap().settle(Outcome::Success);
                }
                breaker.try_acquire().unwrap().settle(Outcome::Success);
            }
            clock.advance(MINUTE);
        }
    };
    go();
    assert_eq!(measure(go), AllocationInfo::default(), "after a first round");
}

/// What a set has allocated for each of its keys, in bytes: filled, and when as many again have come ten times.
fn for_each_key(keys: u64, mut visit: impl FnMut(u64)) -> (u64, u64) {
    let filled = measure(|| (0..keys).for_each(&mut visit)).bytes_current;
    let grown = measure(|| (keys..11 * keys).for_each(&mut visit)).bytes_current;
    let each = |bytes: i64| u64::try_from(bytes).unwrap().div_ceil(keys);
    (each(filled), each(filled + grown))
}

#[test]
fn a_key_that_learns_takes_no_more_than_it_says_wherever_keys_fall() {
    // Every set has other hashes, and so shards that grow at other times.
    for _ in 0..20 {
        let limiter = KeyedRateLimiter::builder("agent", Adaptive::new(10)).clock(Clock::manual());
        let limiter = limiter.max_keys(4_100).build().unwrap();
        let filled = measure(|| (0..4_100).for_each(|key: u64| drop(limiter.try_acquire(&key)))).bytes_current;
        let each = filled / 4_100;
        assert!(each < 110 + 250, "{each} bytes a key");
    }
}

#[test]
fn a_keyed_limit_takes_no_more_for_a_key_than_it_says_whoever_comes_and_goes() {
    let algorithms: [(Algorithm, u64); 3] = [
        (TokenBucket::new(10, MINUTE).into(), 0),
        (SlidingWindow::new(10, MINUTE).into(), 60 + 8 * 10),
        (Adaptive::new(10).into(), 250),
    ];
    for (algorithm, more) in algorithms {
        // Whose keys make room; and whose all stay, so that new ones meet the overflow. Maps grow in steps: several sizes.
        for (pause, keys) in [
            (MINUTE, 3_250),
            (MINUTE, 4_000),
            (MINUTE, 4_100),
            (MINUTE, 5_000),
            (Duration::ZERO, 5_000),
        ] {
            let clock = Clock::manual();
            let limiter = KeyedRateLimiter::builder("agent", algorithm).clock(&clock);
            let limiter = limiter.max_keys(usize::try_from(keys).unwrap()).build().unwrap();
            let (filled, churned) = for_each_key(keys, |key| {
                let _ = limiter.try_acquire(&key);
                if key % (keys / 10) == 0 {
                    clock.advance(pause);
                }
            });
            let status = limiter.status().keys.unwrap();
            assert_eq!(status.tracked as u64, keys);
            assert_eq!(status.evicted > 0, pause > Duration::ZERO);
            let (most, most_churned) = match algorithm {
                Algorithm::TokenBucket(_) => (66, 66),
                _ if pause > Duration::ZERO => (110, 220),
                _ => (110, 110),
            };
            assert!(filled <= most + more, "{algorithm:?}, {keys}: {filled} bytes a key");
            assert!(
                churned <= most_churned + more,
                "{algorithm:?}, {keys}: {churned} bytes a key"
            );
        }
    }
}

#[test]
fn what_is_no_keys_yet_is_refused_and_shown_without_a_quota_being_made() {
    let limiter = KeyedRateLimiter::builder("agent", SlidingWindow::new(100_000, MINUTE));
    let limiter = limiter.clock(Clock::manual()).build().unwrap();
    let refuse = || assert!(limiter.try_acquire_n("stranger", 100_001).is_err());
    refuse();
    let made = measure(refuse).bytes_total;
    assert!(made < 1_000, "{made} bytes for a refusal");
    let made = measure(|| assert!(limiter.status().available_tokens > 99_999.0)).bytes_total;
    assert!(made < 1_000, "{made} bytes for a status");
}

#[test]
fn a_keyed_breaker_takes_about_a_kilobyte_for_a_key_whoever_comes_and_goes() {
    const KEYS: u64 = 2_000;
    let clock = Clock::manual();
    // Whose breakers make room; and whose all stay, so that new keys meet the overflow.
    for outcome in [Outcome::Success, Outcome::Failure] {
        let breakers = KeyedCircuitBreaker::builder("agent").clock(&clock);
        let breakers = breakers.max_keys(usize::try_from(KEYS).unwrap()).build().unwrap();
        let (filled, churned) = for_each_key(KEYS, |key| {
            if let Ok(permit) = breakers.try_acquire(&key) {
                permit.settle(outcome);
            }
        });
        let status = breakers.status();
        assert_eq!(status.tracked as u64, KEYS);
        assert_eq!(status.evicted > 0, outcome == Outcome::Success);
        assert!(filled.max(churned) <= 1_300, "{filled}, {churned} bytes a key");
    }
}

fn call<S: Service<u32>>(service: &mut S) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(service.poll_ready(&mut cx).is_ready());
    matches!(pin!(service.call(1)).poll(&mut cx), Poll::Ready(Ok(_)))
}

/// Allocations of a hundred calls that are answered so.
fn allocations<L>(layer: &L, admitted: bool) -> u64
where
    L: Layer<tower::util::ServiceFn<fn(u32) -> Ready<Result<u32, std::io::Error>>>>,
    L::Service: Service<u32>,
{
    let mut service = layer.layer(service_fn(|x| ready(Ok(x))));
    assert_eq!(call(&mut service), admitted);
    let calls = || (0..100).for_each(|_| assert_eq!(black_box(call(&mut service)), admitted));
    measure(calls).count_total
}

#[test]
fn an_admitted_call_allocates_nothing_and_a_rejected_one_its_boxed_error() {
    let clock = Clock::manual();
    let breaker = |rate: Option<f64>| {
        let builder = CircuitBreaker::builder("agent").clock(&clock);
        rate.map_or(builder.clone(), |rate| builder.failure_rate(rate))
            .build()
            .unwrap()
    };
    let plenty = [
        Algorithm::from(TokenBucket::new(1_000_000, MINUTE)),
        SlidingWindow::new(1000, MINUTE).into(),
        Adaptive::new(1_000_000).into(),
    ];
    assert_eq!(allocations(&CircuitBreakerLayer::new(breaker(None)), true), 0);
    assert_eq!(
        allocations(&CircuitBreakerLayer::new(breaker(Some(0.5))), true),
        0,
        "a count window"
    );
    for algorithm in plenty {
        assert_eq!(
            allocations(&RateLimitLayer::new(limiter(algorithm, &clock)), true),
            0,
            "{algorithm:?}"
        );
        let pair = (limiter(algorithm, &clock), breaker(None));
        assert_eq!(
            allocations(&GuardLayer::new(pair), true),
            0,
            "{algorithm:?} and a breaker"
        );
    }
    let open = breaker(None);
    open.force_open();
    assert_eq!(allocations(&CircuitBreakerLayer::new(open), false), 100, "one each");
    let exhausted = limiter(TokenBucket::new(1, MINUTE), &clock);
    exhausted.try_acquire().unwrap();
    assert_eq!(allocations(&RateLimitLayer::new(exhausted), false), 100, "one each");
}

#[cfg(feature = "http")]
mod over_http {
    use super::*;
    use bytes::Bytes;
    use http::{HeaderValue, Request, Response, header::CONTENT_TYPE};
    use http_body_util::Empty;
    use portcullis::RateLimitHeaders;
    use std::convert::Infallible;

    type Answer = Ready<Result<Response<Empty<Bytes>>, Infallible>>;

    fn bare(_: Request<()>) -> Answer {
        ready(Ok(Response::new(Empty::new())))
    }

    fn typed(_: Request<()>) -> Answer {
        let mut response = Response::new(Empty::new());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        ready(Ok(response))
    }

    /// What one call allocates, from the request to the answer.
    fn allocations<S, B>(mut service: S, status: u16) -> u64
    where
        S: Service<Request<()>, Response = Response<B>, Error = Infallible>,
    {
        let mut call = || {
            let mut cx = Context::from_waker(Waker::noop());
            assert!(service.poll_ready(&mut cx).is_ready());
            let Poll::Ready(Ok(answer)) = pin!(service.call(Request::new(()))).poll(&mut cx) else {
                panic!("it is there at once")
            };
            assert_eq!(black_box(answer).status(), status);
        };
        call();
        let all = measure(|| (0..100).for_each(|_| call())).count_total;
        assert_eq!(all % 100, 0, "each call allocates the same");
        all / 100
    }

    #[test]
    fn an_admitted_answer_is_told_its_quotas_in_two_allocations() {
        let clock = Clock::manual();
        let of_its_own = allocations(service_fn(typed), 200);
        let limit = |name: &str| {
            let builder = RateLimiter::builder("api", TokenBucket::new(1_000_000, MINUTE)).limit(name);
            builder.clock(&clock).build().unwrap()
        };
        for form in [
            RateLimitHeaders::Draft11,
            RateLimitHeaders::Draft7,
            RateLimitHeaders::Draft6,
            RateLimitHeaders::XRateLimitDelta,
        ] {
            let layer = RateLimitLayer::http(limit("per-minute")).headers(form);
            assert_eq!(
                allocations(layer.layer(service_fn(typed)), 200) - of_its_own,
                2,
                "{form:?}"
            );
        }
        let first = RateLimitLayer::http(limit("per-minute")).layer(service_fn(bare));
        assert_eq!(
            allocations(first, 200),
            4,
            "two are the map of an answer that has no headers"
        );
        let pair = RateLimitLayer::http((limit("per-minute"), limit("daily"))).layer(service_fn(typed));
        assert_eq!(
            allocations(pair, 200) - of_its_own,
            4,
            "room for the text of the second, and for second values in the map"
        );
        let off = RateLimitLayer::http(limit("per-minute")).headers(RateLimitHeaders::Off);
        assert_eq!(allocations(off.layer(service_fn(typed)), 200), of_its_own);
        let breaker = CircuitBreaker::builder("api").clock(&clock).build().unwrap();
        let breaker = CircuitBreakerLayer::http(breaker).layer(service_fn(typed));
        assert_eq!(allocations(breaker, 200), of_its_own);
    }

    /// Two for the header map, three for the rejection in the extensions, two for the buffer of all the text.
    #[test]
    fn a_refusal_is_answered_in_seven_allocations() {
        let clock = Clock::manual();
        let exhausted = limiter(TokenBucket::new(1, MINUTE), &clock);
        exhausted.try_acquire().unwrap();
        let open = CircuitBreaker::builder("agent").clock(&clock).failure_threshold(1);
        let open = open.build().unwrap();
        open.try_acquire().unwrap().settle(Outcome::Failure);
        let limit = RateLimitLayer::http(exhausted).layer(service_fn(bare));
        assert_eq!(allocations(limit, 429), 7);
        let breaker = CircuitBreakerLayer::http(open).layer(service_fn(bare));
        assert_eq!(allocations(breaker, 503), 7);
    }
}
