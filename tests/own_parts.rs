//! Policies, classifiers and rejecters that a user writes.
#![expect(clippy::float_cmp, reason = "tokens are taken and given back whole")]

use futures_util::FutureExt;
use portcullis::{
    Adaptive, Algorithm, BoxError, CircuitBreaker, Clock, GuardLayer, KeyedRateLimiter, Name, Outcome, Quota,
    RateLimitLayer, RateLimiter, Reason, Rejected, TokenBucket, Verdict,
    classify::Classify,
    policy::{Admit, Gate, Glance, Later, Never, Permit, Policy, Readiness, Reading, Refusing},
    reject::Reject,
};
use std::{
    future::{Future, Ready, ready},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio_test::{assert_pending, assert_ready, assert_ready_ok};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxService};

type Log = Arc<Mutex<Vec<String>>>;

fn name(text: &str) -> Name {
    Name::try_from(text).unwrap()
}

fn echo() -> impl Service<u32, Response = u32, Error = std::io::Error, Future: Send> + Clone {
    service_fn(async |n: u32| {
        if n == 500 {
            Err(std::io::Error::other("broken"))
        } else {
            Ok(n)
        }
    })
}

/// Admits even numbers, and notes what becomes of them.
#[derive(Clone, Default)]
struct Even {
    log: Log,
}

impl Gate for Even {
    type Reserved = ();
    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }
    fn count(&self, why: &Rejected, _: &Reading) -> bool {
        let own = why.service == "even";
        if own {
            self.log.lock().unwrap().push("rejected".into());
        }
        own
    }
}

impl Policy<u32> for Even {
    type Permit = Noted;
    type Wait = Never<Noted>;
    fn refusal(&self, (): &(), request: &u32, _: &Reading) -> Option<Rejected> {
        (request % 2 == 1).then(|| Rejected::new(name("even"), Reason::OverLimit).limit(name("parity")))
    }
    fn admit(&self, (): (), request: &u32, now: &Reading) -> Admit<Noted, Never<Noted>> {
        match self.refuse(&(), request, now) {
            Some(why) => Admit::Rejected(why),
            None => Admit::Now(Noted(self.log.clone())),
        }
    }
}

struct Noted(Log);

impl Noted {
    fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }
}

impl Permit for Noted {
    fn settle(self, verdict: Verdict, _: &Reading) {
        self.note(verdict.outcome.as_str());
    }
    fn cancel(self, cost: Option<u32>, _: &Reading) {
        self.note(format!("cancelled {cost:?}"));
    }
    fn unused(self, _: &Reading) {
        self.note("unused");
    }
    fn quotas(&self, _: &Reading, tell: &mut dyn FnMut(Quota)) {
        tell(Quota::new(name("parity"), 2, Duration::from_secs(1)));
    }
}

#[tokio::test]
async fn a_policy_of_ones_own_sees_the_request_and_how_its_call_ended() {
    let even = Even::default();
    let service = GuardLayer::new(even.clone()).layer(echo());
    assert_eq!(service.clone().oneshot(2).await.unwrap(), 2);
    service.clone().oneshot(500).await.unwrap_err();
    let error = service.clone().oneshot(3).await.unwrap_err();
    let why = Rejected::find(&*error).unwrap();
    assert_eq!(why.to_string(), r#"rate limit "parity" of "even" is exhausted"#);
    drop(
        GuardLayer::new(even.clone())
            .layer(service_fn(async |_: u32| {
                std::future::pending::<Result<u32, BoxError>>().await
            }))
            .call(4),
    );
    assert_eq!(
        *even.log.lock().unwrap(),
        ["success", "failure", "rejected", "cancelled None"]
    );
}

/// How a permit takes its end.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Manner {
    Slow,
    Quick,
    PanicsSlowly,
    PanicsQuickly,
}

/// Admits every call, with a permit that notes how it ends.
#[derive(Clone)]
struct Mannered(Manner, Log);

struct MannerlyPermit(Manner, Log);

impl Gate for Mannered {
    type Reserved = ();
    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }
}

impl Policy<u32> for Mannered {
    type Permit = MannerlyPermit;
    type Wait = Never<MannerlyPermit>;
    fn refusal(&self, (): &(), _: &u32, _: &Reading) -> Option<Rejected> {
        None
    }
    fn admit(&self, (): (), _: &u32, _: &Reading) -> Admit<MannerlyPermit, Never<MannerlyPermit>> {
        Admit::Now(MannerlyPermit(self.0, self.1.clone()))
    }
}

impl MannerlyPermit {
    fn note(&self, what: &str) {
        self.1.lock().unwrap().push(what.into());
    }
}

impl Permit for MannerlyPermit {
    fn settle(self, verdict: Verdict, _: &Reading) {
        self.note(verdict.outcome.as_str());
        assert_ne!(self.0, Manner::PanicsSlowly);
    }
    fn settle_quickly(&mut self, verdict: &Verdict, _: &Reading) -> bool {
        assert_ne!(self.0, Manner::PanicsQuickly);
        let quick = self.0 == Manner::Quick;
        if quick {
            self.note(verdict.outcome.as_str());
        }
        quick
    }
    fn cancel(self, _: Option<u32>, _: &Reading) {
        self.note("cancelled");
    }
    fn unused(self, _: &Reading) {
        self.note("unused");
    }
}

#[test]
fn each_permit_of_a_pair_is_settled_once_however_the_other_takes_it() {
    use Manner::{PanicsQuickly, PanicsSlowly, Quick, Slow};
    let manners = [Slow, Quick, PanicsSlowly, PanicsQuickly];
    let mut every_two = manners.map(|one| manners.map(|other| (one, other))).concat();
    // A second panic while the first unwinds is the end of any program.
    every_two.retain(|two| *two != (PanicsQuickly, PanicsSlowly));
    for (request, (one, other)) in [2, 500]
        .into_iter()
        .flat_map(|n| every_two.iter().map(move |two| (n, *two)))
    {
        let what = format!("{one:?} and {other:?} at the end of call {request}");
        // In one pair with each other, and in one with a pair of ours.
        for nested in [false, true] {
            let logs = [Log::default(), Log::default()];
            let breaker = CircuitBreaker::builder("search").build().unwrap();
            let limiter = RateLimiter::new("search", TokenBucket::new(10, Duration::from_secs(60))).unwrap();
            let (first, second) = (Mannered(one, logs[0].clone()), Mannered(other, logs[1].clone()));
            let call = || {
                if nested {
                    let pair = ((breaker.clone(), first.clone()), (limiter.clone(), second.clone()));
                    let _ = GuardLayer::new(pair).layer(echo()).call(request).now_or_never();
                } else {
                    let pair = (first.clone(), second.clone());
                    let _ = GuardLayer::new(pair).layer(echo()).call(request).now_or_never();
                }
            };
            let panicked = catch_unwind(AssertUnwindSafe(call)).is_err();
            let [first, second] = logs.map(|log| log.lock().unwrap().len());
            assert_eq!(first, 1, "{what}");
            // One who panics while it is settled takes the other with it, which is dropped then.
            let dropped = one == PanicsSlowly;
            assert_eq!(second, usize::from(!dropped), "{what}");
            assert!(panicked || !dropped, "{what}");
            let metrics = breaker.status().metrics;
            let ends = metrics.successful_requests + metrics.failed_requests;
            assert_eq!((metrics.total_requests, ends), (nested.into(), nested.into()), "{what}");
        }
        for manner in [one, other] {
            let log = Log::default();
            let breaker = CircuitBreaker::builder("search").build().unwrap();
            let policy = Mannered(manner, log.clone());
            let pair = (breaker.clone(), policy.clone());
            let call = || GuardLayer::new(pair).layer(echo()).call(request).now_or_never();
            let _ = catch_unwind(AssertUnwindSafe(call));
            assert_eq!(log.lock().unwrap().len(), 1, "{what}");
            let metrics = breaker.status().metrics;
            assert_eq!(metrics.failed_requests, u64::from(request == 500), "{what}");
            assert_eq!(metrics.total_requests, 1, "{what}");
        }
    }
}

#[test]
fn a_limiters_permit_tells_what_it_took_when_it_was_settled_where_it_lies() {
    let a_minute = Duration::from_secs(60);
    let algorithms: [Algorithm; 2] = [
        TokenBucket::new(u32::MAX, a_minute).into(),
        Adaptive::new(u32::MAX).into(),
    ];
    let (success, now) = (Outcome::Success.into(), Reading::new());
    for algorithm in algorithms {
        let limiter = RateLimiter::new("search", algorithm).unwrap();
        let callers = KeyedRateLimiter::new("search", algorithm).unwrap();
        for cost in [0, 1, 3, 1 << 31] {
            let mut permit = limiter.try_acquire_n(cost).unwrap();
            assert!(permit.settle_quickly(&success, &now));
            assert!(!permit.settle_quickly(&success, &now), "it has ended");
            assert_eq!(permit.cost(), cost);
            let mut permit = callers.try_acquire_n("alice", cost).unwrap();
            permit.settle_quickly(&success, &now);
            assert_eq!(permit.cost(), cost);
        }
    }
}

#[test]
fn what_a_readied_service_holds_is_shown_without_how_it_is_held() {
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    let readied = breaker.reserve(None, &Reading::new(), &mut Context::from_waker(Waker::noop()));
    assert_eq!(format!("{readied:?}"), "Ready(Reservation(None))");
}

#[tokio::test]
async fn in_a_pair_it_is_all_or_nothing_with_the_others() {
    let even = Even::default();
    let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(3600))).unwrap();
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    let service = GuardLayer::new(((even.clone(), limiter.clone()), breaker)).layer(echo());
    service.clone().oneshot(3).await.unwrap_err();
    assert_eq!(
        limiter.status().accepted_requests,
        0,
        "nothing is burnt on the refusal of another"
    );
    service.clone().oneshot(2).await.unwrap();
    let error = service.oneshot(2).await.unwrap_err();
    assert_eq!(
        Rejected::find(&*error).unwrap().service,
        "search",
        "the answer names the one that refused"
    );
    assert_eq!(*even.log.lock().unwrap(), ["rejected", "success"]);
}

/// Refuses in `poll_ready` while it is closed, by the required methods alone.
#[derive(Clone, Default)]
struct Closing(Arc<AtomicBool>);

impl Closing {
    fn refusal(&self) -> Option<Rejected> {
        let closed = self.0.load(Ordering::Relaxed);
        closed.then(|| Rejected::new(name("shop"), Reason::Other).retry_after(Duration::from_secs(3600)))
    }
}

impl Gate for Closing {
    type Reserved = ();
    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        self.refusal().map_or(Readiness::Ready(()), Readiness::Rejected)
    }
}

impl Policy<u32> for Closing {
    type Permit = ();
    type Wait = Never<()>;
    fn refusal(&self, (): &(), _: &u32, _: &Reading) -> Option<Rejected> {
        self.refusal()
    }
    fn admit(&self, (): (), _: &u32, _: &Reading) -> Admit<(), Never<()>> {
        self.refusal().map_or(Admit::Now(()), Admit::Rejected)
    }
}

#[test]
fn who_refused_a_service_when_it_was_readied_rejects_its_call_whatever_the_other_of_the_pair_says() {
    fn rejection<P: Policy<u32, Wait: portcullis::policy::Hold<BoxService<u32, u32, std::io::Error>, u32>> + Clone>(
        policy: P,
        between: impl FnOnce(),
    ) -> Rejected {
        let mut service = GuardLayer::new(policy).layer(BoxService::new(echo()));
        assert_ready_ok!(service.poll_ready(&mut Context::from_waker(Waker::noop())));
        between();
        let error = service.call(2).now_or_never().unwrap().unwrap_err();
        Rejected::find(&*error).unwrap().clone()
    }
    let closed = Closing::default();
    closed.0.store(true, Ordering::Relaxed);
    let own = closed.refusal().unwrap();
    let limiter = RateLimiter::builder("search", TokenBucket::new(1, Duration::from_secs(60)))
        .clock(Clock::manual())
        .build()
        .unwrap();
    limiter.try_acquire().unwrap();
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    let open = || breaker.force_open();

    assert_eq!(rejection((closed.clone(), limiter.clone()), || ()), own);
    assert_eq!(rejection((limiter.clone(), closed.clone()), || ()), own);
    assert_eq!(
        rejection(((closed.clone(), limiter.clone()), limiter.clone()), || ()),
        own
    );
    assert_eq!(
        rejection((closed.clone(), (limiter.clone(), breaker.clone())), open),
        own,
        "it refuses still, and is asked first"
    );
    assert_eq!(limiter.status().rejected_requests, 0);
    assert_eq!(breaker.status().metrics.rejected.forced_open, 0);
    let reopened = || closed.0.store(false, Ordering::Relaxed);
    breaker.reset();
    let lapsed = rejection((closed.clone(), limiter.clone()), reopened);
    assert_eq!(
        (lapsed.reason, lapsed.retry_after),
        (Reason::Other, Some(Duration::ZERO))
    );
    assert_eq!(limiter.status().rejected_requests, 0);
}

/// Refuses at a glance while it is off, for so long, and notes each rejection that it counts.
#[derive(Clone)]
struct Switch {
    name: Name,
    off: Arc<Mutex<Option<Duration>>>,
    counted: Log,
}

impl Switch {
    fn new(text: &str) -> Self {
        Self {
            name: name(text),
            off: Arc::default(),
            counted: Log::default(),
        }
    }

    fn set(&self, off: Option<u64>) {
        *self.off.lock().unwrap() = off.map(Duration::from_secs);
    }

    fn refusing(&self) -> Option<Refusing<'_>> {
        let wait = (*self.off.lock().unwrap())?;
        Some(Refusing::new(&self.name, Reason::Other).retry_after(wait))
    }

    fn note(&self, how: &str) {
        self.counted.lock().unwrap().push(how.into());
    }

    fn counted(&self) -> Vec<String> {
        std::mem::take(&mut self.counted.lock().unwrap())
    }
}

impl Gate for Switch {
    type Reserved = ();
    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        self.refusing()
            .map_or(Readiness::Ready(()), |it| Readiness::Rejected(it.reject()))
    }
    const REFUSES_AT_A_GLANCE: bool = true;
    fn ready_at_a_glance(&self, _: &Reading) -> Glance<()> {
        self.refusing()
            .map_or(Glance::Ready(()), |_| Glance::Refused(Reason::Other))
    }
    fn lapsed(&self, reason: Reason) -> Rejected {
        Rejected::new(self.name.clone(), reason)
    }
    fn count(&self, why: &Rejected, _: &Reading) -> bool {
        let own = why.service == self.name;
        if own {
            self.note("told");
        }
        own
    }
}

impl Policy<u32> for Switch {
    type Permit = ();
    type Wait = Never<()>;
    fn refusal(&self, (): &(), _: &u32, _: &Reading) -> Option<Rejected> {
        self.refusing().map(Refusing::reject)
    }
    fn refuse_at_a_glance(&self, _: Option<&()>, _: &u32, _: &Reading) -> Option<Refusing<'_>> {
        let refusing = self.refusing()?;
        self.note("at a glance");
        Some(refusing)
    }
    fn admit(&self, (): (), request: &u32, now: &Reading) -> Admit<(), Never<()>> {
        self.refuse(&(), request, now).map_or(Admit::Now(()), Admit::Rejected)
    }
}

#[test]
fn a_refusal_at_a_glance_is_told_as_it_is_at_the_call_and_counted_once_wherever_in_a_pair_it_is() {
    fn readied<P>(policy: P, between: impl FnOnce()) -> (Option<Duration>, String)
    where
        P: Policy<u32, Wait: portcullis::policy::Hold<BoxService<u32, u32, std::io::Error>, u32>> + Clone,
    {
        let mut service = GuardLayer::new(policy).layer(BoxService::new(echo()));
        for _ in 0..3 {
            assert_ready_ok!(service.poll_ready(&mut Context::from_waker(Waker::noop())));
        }
        between();
        let error = service.call(2).now_or_never().unwrap().unwrap_err();
        let why = Rejected::find(&*error).unwrap();
        (why.retry_after, why.service.to_string())
    }
    let (switch, other) = (Switch::new("switch"), Switch::new("other"));
    let limiter = RateLimiter::builder("search", TokenBucket::new(1, Duration::from_secs(60)))
        .clock(Clock::manual())
        .build()
        .unwrap();
    limiter.try_acquire().unwrap();
    let closing = Closing::default();
    let told = |seconds: Option<u64>, who: &str| (seconds.map(Duration::from_secs), String::from(who));
    macro_rules! in_every_place {
        ($check:ident) => {
            $check!(switch.clone());
            $check!((switch.clone(), limiter.clone()));
            $check!((limiter.clone(), switch.clone()));
            $check!(((limiter.clone(), switch.clone()), limiter.clone()));
            $check!((limiter.clone(), (closing.clone(), switch.clone())));
            $check!((switch.clone(), other.clone()));
            $check!((
                (closing.clone(), other.clone()),
                (limiter.clone(), switch.clone())
            ));
        };
    }
    macro_rules! shorter_by_now {
        ($policy:expr) => {
            switch.set(Some(10));
            assert_eq!(readied($policy, || switch.set(Some(4))), told(Some(4), "switch"));
            assert_eq!(switch.counted().len(), 1);
        };
    }
    macro_rules! over_by_now {
        ($policy:expr) => {
            switch.set(Some(10));
            let (wait, who) = readied($policy, || switch.set(None));
            assert!(wait.is_none_or(|wait| wait.is_zero()));
            assert_eq!((who.as_str(), switch.counted()), ("switch", vec!["told".into()]));
        };
    }
    macro_rules! off_by_now {
        ($policy:expr) => {
            switch.set(None);
            assert_eq!(
                readied($policy, || switch.set(Some(3600))),
                told(Some(3600), "switch")
            );
            assert_eq!(switch.counted().len(), 1);
        };
    }
    in_every_place!(shorter_by_now);
    in_every_place!(over_by_now);
    in_every_place!(off_by_now);
    switch.set(None);
    other.set(Some(5));
    let pair = || (switch.clone(), other.clone());
    assert_eq!(
        readied(pair(), || switch.set(Some(9))),
        told(Some(9), "switch"),
        "asked first"
    );
    assert_eq!((switch.counted().len(), other.counted().len()), (1, 0));
    assert_eq!(readied(pair(), || switch.set(None)), told(Some(5), "other"));
    assert_eq!((switch.counted().len(), other.counted().len()), (0, 1));
    let (wait, who) = readied(pair(), || other.set(None));
    assert!(wait.is_none_or(|wait| wait.is_zero()));
    assert_eq!(who, "other", "it is the one that refused");
    assert_eq!((switch.counted().len(), other.counted().len()), (0, 1));
    assert_eq!(limiter.status().rejected_requests, 0);
}

#[test]
fn a_service_that_is_refused_by_another_when_it_is_asked_again_is_rejected_by_that() {
    let (switch, closing) = (Switch::new("switch"), Closing::default());
    let mut service = GuardLayer::new((switch.clone(), closing.clone())).layer(echo());
    let mut context = Context::from_waker(Waker::noop());
    switch.set(Some(10));
    assert_ready_ok!(service.poll_ready(&mut context));
    switch.set(None);
    closing.0.store(true, Ordering::Relaxed);
    assert_ready_ok!(service.poll_ready(&mut context));
    closing.0.store(false, Ordering::Relaxed);
    let error = service.call(2).now_or_never().unwrap().unwrap_err();
    let why = Rejected::find(&*error).unwrap();
    assert_eq!((why.service.as_str(), why.retry_after), ("shop", Some(Duration::ZERO)));
    assert!(switch.counted().is_empty());
}

#[test]
fn a_true_cost_that_a_classifier_tells_is_charged_alone_and_in_a_pair() {
    let bucket = || {
        RateLimiter::builder("search", TokenBucket::new(10, Duration::from_secs(60)))
            .clock(Clock::manual())
            .build()
            .unwrap()
    };
    let judge = |result: &Result<u32, std::io::Error>| match result {
        Ok(cost) => Verdict::new(Outcome::Success).cost(*cost),
        Err(_) => Outcome::Failure.into(),
    };
    let limiter = bucket();
    let mut service = RateLimitLayer::new(limiter.clone()).classify(judge).layer(echo());
    for (cost, left) in [(4, 6.0), (1, 5.0), (0, 5.0)] {
        assert_eq!((&mut service).oneshot(cost).now_or_never().unwrap().unwrap(), cost);
        assert_eq!(limiter.status().available_tokens, left);
    }
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    for breaker_first in [false, true] {
        let limiter = bucket();
        let (pair, turned) = ((limiter.clone(), breaker.clone()), (breaker.clone(), limiter.clone()));
        let answer = if breaker_first {
            let service = GuardLayer::new(turned).classify(judge).layer(echo());
            service.oneshot(4).now_or_never()
        } else {
            let service = GuardLayer::new(pair).classify(judge).layer(echo());
            service.oneshot(4).now_or_never()
        };
        assert_eq!(answer.unwrap().unwrap(), 4);
        assert_eq!(limiter.status().available_tokens, 6.0);
    }
    assert_eq!(breaker.status().metrics.successful_requests, 2);
}

/// The permit of a call, as a policy that combines others holds it.
fn permit_of<P: Policy<u32>>(policy: &P) -> P::Permit {
    let now = Reading::new();
    let Readiness::Ready(reserved) = policy.look(&now) else {
        panic!("a limit refuses nobody before it sees the request")
    };
    match policy.admit(reserved, &7, &now) {
        Admit::Now(permit) => permit,
        Admit::Later(_) | Admit::Rejected(_) => panic!("there is room"),
    }
}

#[test]
fn a_call_that_is_cancelled_costs_what_is_known_by_then_where_its_cost_was_an_estimate() {
    let bucket = TokenBucket::new(20, Duration::from_secs(60));
    for (known, charged) in [(None, 5), (Some(2), 2), (Some(5), 5), (Some(8), 8), (Some(0), 0)] {
        let limiter = RateLimiter::builder("search", bucket).clock(Clock::manual()).build();
        let limiter = limiter.unwrap();
        let remains = || limiter.quota().remaining;
        permit_of(&limiter.cost(|_: &u32| 5)).cancel(known, &Reading::new());
        assert_eq!(remains(), 20 - charged, "{known:?}");
        permit_of(&limiter).cancel(known, &Reading::new());
        assert_eq!(remains(), 19 - charged, "{known:?}: who counts calls counts one");

        let keyed = KeyedRateLimiter::builder("search", bucket)
            .clock(Clock::manual())
            .build();
        let keyed = keyed.unwrap();
        let by = || keyed.by(|request: &u32| Some(*request));
        let remains = || {
            keyed
                .try_acquire_n(&7_u32, 21)
                .unwrap_err()
                .quota()
                .expect("told")
                .remaining
        };
        permit_of(&by().cost(|_: &u32| 5)).cancel(known, &Reading::new());
        assert_eq!(remains(), 20 - charged, "{known:?}, of a key");
        permit_of(&by()).cancel(known, &Reading::new());
        assert_eq!(
            remains(),
            19 - charged,
            "{known:?}, of a key: who counts calls counts one"
        );
    }
}

#[test]
fn an_adaptive_limit_learns_from_a_call_that_is_cancelled_what_it_was_told_to() {
    let window = Duration::from_secs(60);
    let adaptive = Adaptive::new(10).window(window).minimum_calls(1).adjustment_factor(0.5);
    for (cancelled, rate) in [(Outcome::Failure, 5.0), (Outcome::Ignored, 10.0)] {
        let clock = Clock::manual();
        let limiter = RateLimiter::builder("search", adaptive.cancelled(cancelled)).clock(&clock);
        let limiter = limiter.build().unwrap();
        permit_of(&limiter).cancel(None, &Reading::new());
        clock.advance(window);
        assert_eq!(limiter.status().rate, rate);
    }
}

/// Not ready until a door is opened; wakes who waits for it.
#[derive(Clone, Default)]
struct Door(Arc<Mutex<(bool, Vec<Waker>)>>);

impl Door {
    fn open(&self) {
        let mut door = self.0.lock().unwrap();
        door.0 = true;
        let wakers = std::mem::take(&mut door.1);
        drop(door);
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Gate for Door {
    type Reserved = ();
    fn reserve(&self, _: Option<()>, _: &Reading, cx: &mut Context<'_>) -> Readiness<()> {
        let mut door = self.0.lock().unwrap();
        if door.0 {
            return Readiness::Ready(());
        }
        door.1.push(cx.waker().clone());
        Readiness::Pending(())
    }
}

impl<Req> Policy<Req> for Door {
    type Permit = ();
    type Wait = Never<()>;
    fn refusal(&self, (): &(), _: &Req, _: &Reading) -> Option<Rejected> {
        None
    }
    fn admit(&self, (): (), _: &Req, _: &Reading) -> Admit<(), Never<()>> {
        Admit::Now(())
    }
}

/// Counts how often it is asked whether it is ready.
#[derive(Clone, Default)]
struct Asked(Arc<AtomicU32>);

impl Service<u32> for Asked {
    type Response = u32;
    type Error = std::io::Error;
    type Future = Ready<Result<u32, std::io::Error>>;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: u32) -> Self::Future {
        ready(Ok(request))
    }
}

#[test]
fn a_policy_that_is_not_ready_holds_the_service_back_and_wakes_it() {
    let (door, inner) = (Door::default(), Asked::default());
    let mut service = tokio_test::task::spawn(GuardLayer::new(door.clone()).layer(inner.clone()));
    assert_pending!(service.enter(|cx, mut service| service.poll_ready(cx)));
    assert_eq!(inner.0.load(Ordering::Relaxed), 0, "the inner service is not asked");
    assert!(!service.is_woken());
    door.open();
    assert!(service.is_woken());
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
    assert_eq!(inner.0.load(Ordering::Relaxed), 1);
}

#[test]
fn a_pair_is_ready_when_both_are_and_refuses_when_either_does() {
    let (left, right) = (Door::default(), Door::default());
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    let policy = ((left.clone(), right.clone()), breaker.clone());
    let mut service = tokio_test::task::spawn(GuardLayer::new(policy).layer(Asked::default()));
    assert_pending!(service.enter(|cx, mut service| service.poll_ready(cx)));
    left.open();
    assert!(service.is_woken());
    assert_pending!(service.enter(|cx, mut service| service.poll_ready(cx)));
    breaker.force_open();
    assert_ready_ok!(
        service.enter(|cx, mut service| service.poll_ready(cx)),
        "ready to reject"
    );
    breaker.reset();
    right.open();
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
}

/// Refuses every service when it is readied, in the name of whomever, and notes what it is told of.
#[derive(Clone)]
struct Shut {
    why: Rejected,
    /// Says so at a glance, although it does not say that it may.
    at_a_glance: bool,
    told: Log,
}

impl Shut {
    fn new(why: Rejected) -> Self {
        Self {
            why,
            at_a_glance: false,
            told: Log::default(),
        }
    }
}

impl Gate for Shut {
    type Reserved = ();
    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Rejected(self.why.clone())
    }
    fn ready_at_a_glance(&self, _: &Reading) -> Glance<()> {
        if self.at_a_glance {
            Glance::Refused(Reason::Other)
        } else {
            Glance::Unsure
        }
    }
    fn count(&self, why: &Rejected, _: &Reading) -> bool {
        self.told.lock().unwrap().push(why.service.to_string());
        true
    }
}

impl Policy<u32> for Shut {
    type Permit = ();
    type Wait = Never<()>;
    fn refusal(&self, (): &(), _: &u32, _: &Reading) -> Option<Rejected> {
        Some(self.why.clone())
    }
    fn admit(&self, (): (), _: &u32, _: &Reading) -> Admit<(), Never<()>> {
        Admit::Rejected(self.why.clone())
    }
}

/// The rejection of a call that the service was readied for.
fn rejected_when_readied<P>(policy: P) -> Rejected
where
    P: Policy<u32, Wait: portcullis::policy::Hold<BoxService<u32, u32, std::io::Error>, u32>> + Clone,
{
    let mut service = GuardLayer::new(policy).layer(BoxService::new(echo()));
    assert_ready_ok!(service.poll_ready(&mut Context::from_waker(Waker::noop())));
    let error = service.call(2).now_or_never().unwrap().unwrap_err();
    Rejected::find(&*error).unwrap().clone()
}

#[test]
fn a_breaker_counts_no_rejection_but_its_own() {
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    let foreign = [
        Rejected::new(name("search"), Reason::OverLimit).limit(name("default")),
        Rejected::new(name("agent"), Reason::Open),
    ];
    for why in foreign {
        let shut = Shut::new(why.clone());
        assert_eq!(rejected_when_readied((breaker.clone(), shut.clone())), why);
        assert_eq!(shut.told.lock().unwrap().len(), 1, "the pair asks on whose it is");
    }
    assert_eq!(breaker.status().metrics.rejected_requests, 0);
}

#[test]
fn a_limiter_that_charges_by_the_request_counts_no_rejection_but_its_own() {
    let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(60))).unwrap();
    let shut = Shut::new(Rejected::new(name("search"), Reason::Other));
    rejected_when_readied((limiter.cost(|_: &u32| 1), shut.clone()));
    assert_eq!(shut.told.lock().unwrap().len(), 1);
    assert_eq!(limiter.status().rejected_requests, 0);
}

#[test]
fn a_refusal_at_a_glance_that_was_not_announced_is_asked_for_as_any_other() {
    let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(60))).unwrap();
    let own = Rejected::new(name("shut"), Reason::Other);
    let shut = Shut {
        at_a_glance: true,
        ..Shut::new(own.clone())
    };
    assert_eq!(rejected_when_readied((shut.clone(), limiter.clone())), own);
    assert_eq!(rejected_when_readied((limiter, shut)), own);
}

/// Admits when a future says so.
#[derive(Clone)]
struct Ticket(Arc<Mutex<Vec<tokio::sync::oneshot::Receiver<bool>>>>);

type Drawn = Pin<Box<dyn Future<Output = Result<(), Rejected>> + Send>>;

impl Gate for Ticket {
    type Reserved = ();
    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }
}

impl<Req> Policy<Req> for Ticket {
    type Permit = ();
    type Wait = Later<Drawn>;
    fn refusal(&self, (): &(), _: &Req, _: &Reading) -> Option<Rejected> {
        None
    }
    fn admit(&self, (): (), _: &Req, _: &Reading) -> Admit<(), Later<Drawn>> {
        let ticket = self.0.lock().unwrap().pop().unwrap();
        Admit::Later(Later::new(Box::pin(async move {
            match ticket.await {
                Ok(true) => Ok(()),
                _ => Err(Rejected::new(name("tickets"), Reason::Other)),
            }
        })))
    }
}

#[tokio::test]
async fn a_policy_of_ones_own_may_wait() {
    for admits in [true, false] {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let service = GuardLayer::new(Ticket(Arc::new(Mutex::new(vec![receiver])))).layer(echo());
        let mut call = tokio_test::task::spawn(service.oneshot(7));
        assert_pending!(call.poll());
        sender.send(admits).unwrap();
        assert!(call.is_woken());
        match assert_ready!(call.poll()) {
            Ok(answer) => assert!(admits && answer == 7),
            Err(error) => {
                assert!(!admits);
                let why = Rejected::find(&*error).unwrap();
                assert_eq!(why.to_string(), r#"policy "tickets" refuses"#);
            }
        }
    }
}

/// Judges by the request that was sent.
#[derive(Clone)]
struct EvenIsFine;

impl<Res, Err> Classify<u32, Res, Err> for EvenIsFine {
    type Seen = bool;
    type Response<P: Permit> = Res;
    fn see(&self, request: &u32) -> bool {
        request.is_multiple_of(2)
    }
    fn finish<P: Permit>(even: bool, result: Result<Res, Err>, permit: P, now: &Reading) -> Result<Res, Err> {
        let outcome = if even { Outcome::Success } else { Outcome::Failure };
        permit.settle(outcome.into(), now);
        result
    }
    fn unready(&self, error: Err) -> (Verdict, Err) {
        (Outcome::Failure.into(), error)
    }
}

/// Answers with a number, and notes the quotas of admitted calls.
#[derive(Clone, Default)]
struct Answer42(Log);

impl<Raw, Err> Reject<u32, Raw, u32, Err> for Answer42 {
    type Response = u32;
    type Error = Err;
    type Future = Ready<Result<u32, Err>>;
    type Pass = Log;
    type Told = Log;
    fn reject(&self, _: u32, _: Rejected) -> Self::Future {
        ready(Ok(42))
    }
    fn admitted(&self, _: &u32) -> Log {
        self.0.clone()
    }
    fn tell(log: &mut Log, permit: &impl Permit, now: &Reading) {
        permit.quotas(now, &mut |quota| {
            let line = format!("{} {} left", quota.limit, quota.remaining);
            log.lock().unwrap().push(line);
        });
    }
    fn pass(_: Log, result: Result<u32, Err>) -> Result<u32, Err> {
        result
    }
    fn error(error: Err) -> Err {
        error
    }
}

#[tokio::test]
async fn a_classifier_of_ones_own_sees_the_request_and_a_rejecter_the_quotas() {
    let clock = Clock::manual();
    let breaker = CircuitBreaker::builder("search")
        .failure_threshold(1)
        .clock(&clock)
        .build()
        .unwrap();
    let limiter = RateLimiter::builder("search", TokenBucket::new(3, Duration::from_secs(60)))
        .limit("calls")
        .clock(&clock);
    let answers = Answer42::default();
    let service = GuardLayer::new((limiter.build().unwrap(), breaker))
        .classify_with(EvenIsFine)
        .reject_with(answers.clone())
        .layer(echo());
    assert_eq!(service.clone().oneshot(2).await.unwrap(), 2);
    assert_eq!(
        service.clone().oneshot(3).await.unwrap(),
        3,
        "a failure, says the classifier"
    );
    assert_eq!(service.oneshot(2).await.unwrap(), 42, "the circuit is open");
    assert_eq!(
        *answers.0.lock().unwrap(),
        ["calls 2 left", "calls 1 left"],
        "rejected calls pass nothing"
    );
}

#[tokio::test]
async fn a_cost_is_told_from_the_request_and_charged_whole_or_not_at_all() {
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("search", TokenBucket::new(10, Duration::from_secs(10)))
        .clock(&clock)
        .build()
        .unwrap();
    let service = RateLimitLayer::new(limiter.cost(|n: &u32| *n)).layer(echo());
    service.clone().oneshot(6).await.unwrap();
    let error = service.clone().oneshot(5).await.unwrap_err();
    assert_eq!(
        Rejected::find(&*error).unwrap().retry_after,
        Some(Duration::from_secs(1))
    );
    assert_eq!(limiter.status().available_tokens, 4.0, "nothing was taken");
    service.clone().oneshot(4).await.unwrap();
    service.clone().oneshot(0).await.expect("nothing is free");
    let error = service.clone().oneshot(11).await.unwrap_err();
    let why = Rejected::find(&*error).unwrap();
    assert_eq!(why.reason, Reason::CostExceedsBurst { cost: 11, burst: 10 });
    assert_eq!(
        (limiter.status().accepted_cost, limiter.status().rejected_requests),
        (10, 2)
    );
}

#[test]
fn a_panic_of_the_cost_takes_nothing_and_holds_nothing() {
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("search", TokenBucket::new(10, Duration::from_secs(10)))
        .clock(&clock)
        .build()
        .unwrap();
    let breaker = CircuitBreaker::builder("search")
        .failure_threshold(1)
        .half_open_max_calls(1)
        .success_threshold(1)
        .recovery_timeout(Duration::from_secs(1))
        .clock(&clock)
        .build()
        .unwrap();
    breaker.try_acquire().unwrap().settle(Outcome::Failure);
    clock.advance(Duration::from_secs(1));
    let before = breaker.status().metrics;
    let cost = limiter.cost(|n: &u32| 100 / n);
    for guard in [
        GuardLayer::new((breaker.clone(), (limiter.clone(), cost.clone())))
            .layer(echo())
            .boxed(),
        GuardLayer::new(((limiter.clone(), breaker.clone()), cost.clone()))
            .layer(echo())
            .boxed(),
    ] {
        catch_unwind(AssertUnwindSafe(|| guard.oneshot(0).now_or_never())).unwrap_err();
        let status = limiter.status();
        assert_eq!((status.available_tokens, status.accepted_requests), (10.0, 0));
        assert_eq!(breaker.status().metrics, before);
        breaker.try_acquire().expect("the probe's slot is free").unused();
    }
}

#[tokio::test]
async fn a_limit_that_charges_by_the_request_may_wait_and_may_be_in_a_pair() {
    let clock = Clock::manual();
    let limiter = RateLimiter::builder("search", TokenBucket::new(10, Duration::from_secs(10)))
        .clock(&clock)
        .build()
        .unwrap();
    let breaker = CircuitBreaker::builder("search").clock(&clock).build().unwrap();
    let pair = GuardLayer::new((limiter.cost(|n: &u32| *n), breaker.clone())).layer(echo());
    pair.clone().oneshot(8).await.unwrap();
    breaker.force_open();
    pair.oneshot(2).await.unwrap_err();
    assert_eq!(
        limiter.status().available_tokens,
        2.0,
        "the open circuit spends nothing"
    );

    let waiting = RateLimitLayer::new(limiter.cost(|n: &u32| *n))
        .wait(Duration::from_secs(3))
        .layer(echo());
    let mut call = tokio_test::task::spawn(waiting.clone().oneshot(4));
    assert_pending!(call.poll());
    clock.advance(Duration::from_secs(2));
    assert!(call.is_woken());
    assert_eq!(assert_ready!(call.poll()).unwrap(), 4);
    let error = waiting.oneshot(9).await.unwrap_err();
    assert_eq!(
        Rejected::find(&*error).unwrap().retry_after,
        Some(Duration::from_secs(9)),
        "does not fit in 3 s"
    );
}

#[test]
fn a_name_of_ones_own_is_checked() {
    assert_eq!(Name::try_from("").unwrap_err().field(), "name");
    assert!(Name::try_from("x".repeat(256).as_str()).is_err());
}
