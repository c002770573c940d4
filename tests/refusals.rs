//! What policies tell of their refusals to whoever asks them, as pairs and policies of a user's own do: without a trace until a call
//! is refused.

use portcullis::{
    CircuitBreaker, Clock, KeyedCircuitBreaker, KeyedRateLimiter, RateLimiter, Reason, Rejected, TokenBucket,
    policy::{self, Gate, Missing, Policy, Readiness, Reading},
};
use std::time::Duration;

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
