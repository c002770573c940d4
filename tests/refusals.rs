//! What policies tell of their refusals to whoever asks them, as pairs and policies of a user's own do: without a trace until a call
//! is refused.

use futures_util::FutureExt;
use portcullis::{
    Adaptive, Algorithm, CircuitBreaker, CircuitBreakerConfig, Clock, GuardLayer, KeyedCircuitBreaker,
    KeyedRateLimiter, ManualClock, Outcome, RateLimiter, Reason, Rejected, SlidingWindow, TokenBucket,
    policy::{self, Admit, Gate, Missing, Never, Policy, Readiness, Reading, Refusing},
};
use std::{io, time::Duration};
use tower::{Layer, Service, service_fn};

const MINUTE: Duration = Duration::from_secs(60);
/// The one whose limit is spent, or whose circuit is open, and another.
const SPENT: u32 = 1;
const OTHER: u32 = 2;

/// Asks a policy for a service that was never readied.
fn ask<P: Gate>(policy: &P, ask: impl FnOnce(&P::Reserved, &Reading) -> Option<Rejected>) -> Option<Reason> {
    let now = Reading::new();
    let why = match policy.look(&now) {
        Readiness::Ready(looked) | Readiness::Pending(looked) => ask(&looked, &now),
        Readiness::Rejected(why) => Some(why),
    };
    why.map(|why| why.reason)
}

fn assert_refuses_the_spent<P: Policy<u32>>(name: &str, policy: &P, reason: Reason, rejections: impl Fn() -> u64) {
    let before = rejections();
    for _ in 0..2 {
        let told = ask(policy, |looked, now| policy.refusal(looked, &SPENT, now));
        assert_eq!(told, Some(reason), "{name}");
        let told = ask(policy, |looked, now| policy.refusal(looked, &OTHER, now));
        assert_eq!(told, None, "{name}: the other request");
    }
    assert_eq!(rejections(), before, "{name}: told, and nobody refused");
    let refused = ask(policy, |looked, now| policy.refuse(looked, &SPENT, now));
    assert_eq!((refused, rejections()), (Some(reason), before + 1), "{name}: refused");
    let refused = ask(policy, |looked, now| policy.refuse(looked, &OTHER, now));
    assert_eq!((refused, rejections()), (None, before + 1), "{name}: the other request");
}

fn limits() -> KeyedRateLimiter {
    let limits = KeyedRateLimiter::builder("api", TokenBucket::new(1, MINUTE))
        .clock(Clock::manual())
        .build()
        .expect("a valid limit");
    limits.try_acquire(&SPENT).expect("a full bucket");
    limits
}

fn spent() -> RateLimiter {
    let limiter = RateLimiter::builder("search", TokenBucket::new(1, MINUTE))
        .clock(Clock::manual())
        .build()
        .expect("a valid limit");
    limiter.try_acquire().expect("a full bucket");
    limiter
}

fn open() -> CircuitBreaker {
    let breaker = CircuitBreaker::builder("search").build().expect("a valid config");
    breaker.force_open();
    breaker
}

#[test]
fn a_policy_tells_what_it_would_refuse_and_counts_what_it_refuses() {
    let limiter = spent();
    let rejections = || limiter.status().rejected_requests;
    let by_cost = limiter.cost(|request: &u32| u32::from(*request == SPENT));
    assert_refuses_the_spent("a cost", &by_cost, Reason::OverLimit, rejections);

    let keyed = limits();
    let rejections = || keyed.status().rejected_requests;
    let by = || keyed.by(|request: &u32| Some(*request));
    assert_refuses_the_spent("a key", &by(), Reason::OverLimit, rejections);
    assert_refuses_the_spent(
        "a cost of a key",
        &by().cost(|_: &u32| 1),
        Reason::OverLimit,
        rejections,
    );

    let callers = limits();
    let rejections = || callers.status().rejected.missing_key;
    let named = callers
        .by(|request: &u32| (*request != SPENT).then_some(*request))
        .missing(Missing::Reject);
    assert_refuses_the_spent("no key", &named, Reason::MissingKey, rejections);

    let upstreams = KeyedCircuitBreaker::builder("upstreams")
        .build()
        .expect("a valid config");
    upstreams.get(&SPENT).force_open();
    let rejections = || upstreams.status().metrics.rejected_requests;
    let by_upstream = upstreams.by(|request: &u32| Some(*request));
    assert_refuses_the_spent("a circuit of a key", &by_upstream, Reason::ForcedOpen, rejections);

    let limiter = spent();
    let rejections = || limiter.status().rejected_requests;
    let selected = policy::select(|request: &u32| (*request == SPENT).then(|| limiter.clone()));
    assert_refuses_the_spent("a selected limit", &selected, Reason::OverLimit, rejections);

    let breaker = open();
    let rejections = || breaker.status().metrics.rejected_requests;
    let selected = policy::select(|request: &u32| (*request == SPENT).then(|| breaker.clone()));
    assert_refuses_the_spent("a selected circuit", &selected, Reason::ForcedOpen, rejections);
    let not_ready = policy::NotReady::new(breaker.clone());
    let refusal = ask(&not_ready, |looked, now| not_ready.refusal(looked, &SPENT, now));
    assert_eq!(
        refusal,
        Some(Reason::ForcedOpen),
        "a circuit that leaves its service not ready"
    );
    let pair = policy::select(|request: &u32| (*request == SPENT).then(|| (breaker.clone(), limiter.clone())));
    assert_refuses_the_spent("a selected pair", &pair, Reason::ForcedOpen, rejections);
}

#[test]
fn a_request_without_a_key_is_counted_as_such_where_it_shares_a_spent_quota_and_one_with_a_key_is_not() {
    let limits = limits();
    let by = limits.by(|request: &u32| (*request != OTHER).then_some(*request));
    let without_key = || limits.status().keys.expect("a keyed limit").missing_key_requests;
    let refused = |request| ask(&by, |looked, now| by.refuse(looked, &request, now));
    assert_eq!(
        (refused(OTHER), without_key()),
        (None, 0),
        "not refused, and not admitted yet"
    );
    drop(by.admit((), &OTHER, &Reading::new()));
    assert_eq!(without_key(), 1, "the first took what they share");
    assert_eq!((refused(OTHER), without_key()), (Some(Reason::OverLimit), 2));
    assert_eq!((refused(SPENT), without_key()), (Some(Reason::OverLimit), 2));
}

// ---- Two that refuse ---------------------------------------------------------------------------------------------------------

/// A policy of some kind, how to have it refuse a request for its wait, and how many it has refused.
struct Side<P> {
    policy: P,
    spend: Box<dyn Fn()>,
    rejections: Box<dyn Fn() -> u64>,
}

/// A policy that waits for nothing, as the parts of a pair are.
trait Prompt: Policy<u32, Wait = Never<Self::Leave>, Permit = Self::Leave> {
    type Leave: policy::Permit;
}

impl<P: Policy<u32, Wait = Never<<P as Policy<u32>>::Permit>>> Prompt for P {
    type Leave = P::Permit;
}

/// The three algorithms, each of which brings one request back in `wait`.
fn one_in(wait: Duration) -> [Algorithm; 3] {
    [
        TokenBucket::new(1, wait).into(),
        SlidingWindow::new(1, wait).into(),
        Adaptive::new(1).window(wait).into(),
    ]
}

fn trips_for(wait: Duration) -> CircuitBreakerConfig {
    CircuitBreakerConfig::default()
        .failure_threshold(1)
        .recovery_timeout(wait)
}

fn breaker(_: usize, wait: Duration, clock: &ManualClock) -> Side<CircuitBreaker> {
    let breaker = CircuitBreaker::builder("breaker").config(trips_for(wait)).clock(clock);
    let breaker = breaker.build().expect("a valid config");
    let (tripped, counts) = (breaker.clone(), breaker.clone());
    Side {
        policy: breaker,
        spend: Box::new(move || tripped.try_acquire().expect("closed").settle(Outcome::Failure)),
        rejections: Box::new(move || counts.status().metrics.rejected_requests),
    }
}

fn keyed_breaker(_: usize, wait: Duration, clock: &ManualClock) -> Side<impl Prompt + Clone + use<>> {
    let set = KeyedCircuitBreaker::builder("breakers")
        .config(trips_for(wait))
        .clock(clock);
    let set = set.build().expect("a valid config");
    let (tripped, counts) = (set.clone(), set.clone());
    Side {
        policy: set.by(|request: &u32| Some(*request)),
        spend: Box::new(move || {
            let breaker = tripped.get(&SPENT);
            breaker.try_acquire().expect("closed").settle(Outcome::Failure);
        }),
        rejections: Box::new(move || counts.status().metrics.rejected_requests),
    }
}

fn limiter(kind: usize, wait: Duration, clock: &ManualClock) -> Side<RateLimiter> {
    let limiter = RateLimiter::builder("limit", one_in(wait)[kind]).clock(clock);
    let limiter = limiter.build().expect("a valid limit");
    let (spent, counts) = (limiter.clone(), limiter.clone());
    Side {
        policy: limiter,
        spend: Box::new(move || drop(spent.try_acquire().expect("nothing is used"))),
        rejections: Box::new(move || counts.status().rejected_requests),
    }
}

fn by_cost(kind: usize, wait: Duration, clock: &ManualClock) -> Side<impl Prompt + Clone + use<>> {
    let Side {
        policy,
        spend,
        rejections,
    } = limiter(kind, wait, clock);
    Side {
        policy: policy.cost(|_: &u32| 1),
        spend,
        rejections,
    }
}

fn keyed_limiter(kind: usize, wait: Duration, clock: &ManualClock) -> Side<impl Prompt + Clone + use<>> {
    let set = KeyedRateLimiter::builder("limits", one_in(wait)[kind]).clock(clock);
    let set = set.build().expect("a valid limit");
    let (spent, counts) = (set.clone(), set.clone());
    Side {
        policy: set.by(|request: &u32| Some(*request)),
        spend: Box::new(move || drop(spent.try_acquire(&SPENT).expect("nothing is used"))),
        rejections: Box::new(move || counts.status().rejected_requests),
    }
}

/// Whoever asks the pair learns the wait of the one that refuses longer, and only that one counts what is refused.
fn assert_the_longer_tells<A: Prompt + Clone, B: Prompt + Clone>(
    name: &str,
    first: fn(usize, Duration, &ManualClock) -> Side<A>,
    second: fn(usize, Duration, &ManualClock) -> Side<B>,
) {
    const HOUR: Duration = Duration::from_secs(3600);
    for (one, other) in (0..3).flat_map(|one| (0..3).map(move |other| (one, other))) {
        for (for_one, for_other) in [(MINUTE, HOUR), (HOUR, MINUTE)] {
            let name = format!("{name}, {one} and {other}, for {for_one:?} and {for_other:?}");
            let clock = Clock::manual();
            let (first, second) = (first(one, for_one, &clock), second(other, for_other, &clock));
            let counted = || ((first.rejections)(), (second.rejections)());
            let times = |n| if for_one > for_other { (n, 0) } else { (0, n) };
            let pair = (first.policy.clone(), second.policy.clone());
            let mut service = GuardLayer::new(pair.clone()).layer(service_fn(async |_: u32| Ok::<_, io::Error>(())));
            let ready = std::future::poll_fn(|cx| service.poll_ready(cx)).now_or_never();
            assert!(ready.is_some_and(|ready| ready.is_ok()), "{name}: nothing is spent yet");
            (first.spend)();
            (second.spend)();

            let now = Reading::new();
            let Readiness::Ready(reserved) = pair.look(&now) else {
                panic!("{name}: a look takes nothing and so refuses nothing")
            };
            let wait = |why: Option<Rejected>| why.and_then(|why| why.retry_after);
            assert_eq!(wait(pair.refusal(&reserved, &SPENT, &now)), Some(HOUR), "{name}: told");
            assert_eq!(counted(), (0, 0), "{name}: told, and nobody refused");
            assert_eq!(
                wait(pair.refuse(&reserved, &SPENT, &now)),
                Some(HOUR),
                "{name}: refused"
            );
            assert_eq!(counted(), times(1), "{name}: refused");
            let Admit::Rejected(why) = pair.admit(reserved, &SPENT, &now) else {
                panic!("{name}: both are spent")
            };
            assert_eq!((why.retry_after, counted()), (Some(HOUR), times(2)), "{name}: rejected");
            let answer = service.call(SPENT).now_or_never().expect("does not wait");
            let error = answer.expect_err("both are spent");
            let why = Rejected::find(&*error).expect("a rejection");
            assert_eq!(
                (why.retry_after, counted()),
                (Some(HOUR), times(3)),
                "{name}: in a layer"
            );
        }
    }
}

#[test]
fn of_two_refusals_in_a_pair_the_longer_tells_whatever_kinds_they_are_and_in_either_order() {
    macro_rules! each_with_all {
        ($($first:ident),*; $all:tt) => { $(each_with_all!(@ $first $all);)* };
        (@ $first:ident ($($second:ident),*)) => { $(
            let name = concat!(stringify!($first), " and ", stringify!($second));
            assert_the_longer_tells(name, $first, $second);
        )* };
    }
    each_with_all!(
        breaker, keyed_breaker, limiter, by_cost, keyed_limiter;
        (breaker, keyed_breaker, limiter, by_cost, keyed_limiter)
    );
}

#[test]
fn a_look_at_a_limiter_refuses_nothing_that_would_be_admitted() {
    let clock = Clock::manual();
    for algorithm in [
        Algorithm::from(TokenBucket::new(3, MINUTE)),
        SlidingWindow::new(3, MINUTE).into(),
        Adaptive::new(3).window(MINUTE).into(),
    ] {
        let limiter = RateLimiter::builder("search", algorithm).clock(&clock);
        let limiter = limiter.build().expect("a valid limit");
        let look = || {
            let why = Policy::refuse_at_a_glance(&limiter, Some(&()), &SPENT, &Reading::new());
            why.map(Refusing::reject)
        };
        for left in (0..3).rev() {
            assert_eq!(look(), None, "{algorithm:?}: {} are left", left + 1);
            limiter.try_acquire().expect("there is room");
        }
        assert_eq!(limiter.status().rejected_requests, 0);
        // A look need not tell; what it tells is the refusal itself, and counted.
        if let Some(why) = look() {
            assert_eq!(limiter.status().rejected_requests, 1, "{algorithm:?}");
            assert_eq!(Some(why), limiter.try_acquire().err(), "{algorithm:?}");
        }
    }
}
