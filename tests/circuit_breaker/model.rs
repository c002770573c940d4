//! The breaker against a plain model of it: the same random steps on both, and after each the same answers.

use crate::{NANO, breaker, just_before};
use portcullis::{
    Backoff, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerPermit, ManualClock, Outcome, Override, Reason, State,
    Window,
};
use proptest::{prelude::*, test_runner::TestCaseResult};
use std::time::Duration;

/// The settings, in numbers and nanoseconds.
#[derive(Debug, Clone)]
struct Settings {
    consecutive: Option<u32>,
    within: Option<(u32, u64)>,
    failure_rate: Option<f64>,
    slow: Option<(f64, u64)>,
    size: usize,
    minimum: usize,
    open: u64,
    /// Doubles the open time up to this many times itself.
    backoff: Option<u64>,
    probes: usize,
    successes: u32,
    lease: Option<u64>,
    cancelled: Outcome,
}

impl Settings {
    fn config(&self) -> CircuitBreakerConfig {
        let nanos = Duration::from_nanos;
        let number = |n: usize| u32::try_from(n).expect("small");
        let mut config = CircuitBreakerConfig::default()
            .window(Window::calls(number(self.size)))
            .minimum_calls(number(self.minimum))
            .recovery_timeout(nanos(self.open))
            .half_open_max_calls(number(self.probes))
            .success_threshold(self.successes)
            .cancelled(self.cancelled);
        if let Some(failures) = self.consecutive {
            config = config.failure_threshold(failures);
        }
        if let Some((failures, period)) = self.within {
            config = config.failures_within(failures, nanos(period));
        }
        if let Some(rate) = self.failure_rate {
            config = config.failure_rate(rate);
        }
        if let Some((rate, slow)) = self.slow {
            config = config.slow_calls(rate, nanos(slow));
        }
        if let Some(times) = self.backoff {
            config = config.recovery_backoff(Backoff::new(2.0, nanos(self.open * times)));
        }
        if let Some(lease) = self.lease {
            config = config.probe_lease(nanos(lease));
        }
        config
    }

    fn watches_rates(&self) -> bool {
        self.failure_rate.is_some() || self.slow.is_some()
    }

    /// The default threshold holds if nothing else is configured.
    fn threshold(&self) -> Option<u32> {
        let other = self.within.is_some() || self.watches_rates();
        self.consecutive.or((!other).then_some(5))
    }
}

/// A running call.
struct Call {
    permit: CircuitBreakerPermit,
    generation: u64,
    begun: u64,
    /// Whether slow calls were watched when it began.
    timed: bool,
    /// Its number as a probe.
    probe: Option<usize>,
    untracked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Closed,
    Open { until: u64 },
    HalfOpen { successes: u32 },
}

/// What the breaker should be: everything is kept, and everything is worked out anew when asked for.
struct Model {
    settings: Settings,
    now: u64,
    mode: Mode,
    forced: Option<Override>,
    generation: u64,
    since: u64,
    run: u32,
    failures: Vec<u64>,
    window: Vec<(bool, bool)>,
    /// Lease ends by probe.
    leases: Vec<(usize, u64)>,
    probes_ever: usize,
    trips: u32,
    transitions: [u64; 4],
    /// Successful, failed, ignored, cancelled, slow.
    ended: [u64; 5],
    /// Open, half-open full, forced open.
    rejected: [u64; 3],
}

fn newest<T>(all: &mut Vec<T>, most: usize) {
    all.drain(..all.len().saturating_sub(most));
}

impl Model {
    fn new(settings: Settings) -> Self {
        Self {
            settings,
            now: 0,
            mode: Mode::Closed,
            forced: None,
            generation: 1,
            since: 0,
            run: 0,
            failures: Vec::new(),
            window: Vec::new(),
            leases: Vec::new(),
            probes_ever: 0,
            trips: 0,
            transitions: [0; 4],
            ended: [0; 5],
            rejected: [0; 3],
        }
    }

    fn state(&self) -> State {
        match (self.forced, self.mode) {
            (Some(Override::ForcedOpen), _) | (None, Mode::Open { .. }) => State::Open,
            (Some(_), _) | (None, Mode::Closed) => State::Closed,
            (None, Mode::HalfOpen { .. }) => State::HalfOpen,
        }
    }

    fn enter(&mut self, mode: Mode, since: u64) {
        self.mode = mode;
        self.since = since;
        self.generation += 1;
    }

    fn advance(&mut self, nanos: u64) {
        self.now += nanos;
        if let Mode::Open { until } = self.mode
            && self.forced.is_none()
            && until <= self.now
        {
            self.transitions[1] += 1;
            self.enter(Mode::HalfOpen { successes: 0 }, until);
        }
    }

    /// When a probe's slot is free, asked at `at`.
    fn slot_free(&self, at: u64) -> u64 {
        let mut ends: Vec<u64> = self
            .leases
            .iter()
            .map(|lease| lease.1)
            .filter(|end| *end > at)
            .collect();
        ends.sort_unstable();
        match ends.len().checked_sub(self.settings.probes) {
            None => at,
            Some(surplus) => ends[surplus],
        }
    }

    fn refusal(&self) -> Option<(Reason, Option<Duration>)> {
        let wait = |until: u64| Some(Duration::from_nanos(until - self.now));
        match (self.forced, self.mode) {
            (Some(Override::ForcedOpen), _) => Some((Reason::ForcedOpen, None)),
            (None, Mode::Open { until }) => Some((Reason::Open, wait(self.slot_free(until)))),
            (None, Mode::HalfOpen { .. }) if self.slot_free(self.now) > self.now => {
                Some((Reason::HalfOpenFull, wait(self.slot_free(self.now))))
            }
            _ => None,
        }
    }

    /// A call that was admitted.
    fn begin(&mut self, permit: CircuitBreakerPermit) -> Call {
        let probe = matches!((self.forced, self.mode), (None, Mode::HalfOpen { .. })).then(|| {
            self.probes_ever += 1;
            let lease = self.settings.lease.unwrap_or(self.settings.open);
            self.leases.push((self.probes_ever, self.now + lease));
            self.probes_ever
        });
        Call {
            permit,
            generation: self.generation,
            begun: self.now,
            timed: self.settings.slow.is_some(),
            probe,
            untracked: self.forced == Some(Override::Disabled),
        }
    }

    fn release(&mut self, call: &Call) {
        self.leases.retain(|lease| Some(lease.0) != call.probe);
    }

    /// A call that ended; without an outcome it was dropped.
    fn end(&mut self, call: &Call, outcome: Option<Outcome>) {
        self.release(call);
        if call.untracked {
            return;
        }
        let slow_duration = self.settings.slow.map(|(_, slow)| slow);
        let long = call.timed && slow_duration.is_some_and(|slow| self.now - call.begun >= slow);
        let verdict = outcome.unwrap_or(self.settings.cancelled);
        let slow = long && (outcome.is_none() || verdict != Outcome::Ignored);
        self.ended[4] += u64::from(slow);
        self.ended[match (verdict, outcome) {
            (Outcome::Success, _) => 0,
            (Outcome::Failure, _) => 1,
            (_, Some(_)) => 2,
            (_, None) => 3,
        }] += 1;
        let says_nothing = verdict == Outcome::Ignored && !slow;
        if says_nothing || call.generation != self.generation || self.forced == Some(Override::Disabled) {
            return;
        }
        match self.mode {
            Mode::Closed => self.end_closed(verdict, slow),
            Mode::HalfOpen { .. } if verdict == Outcome::Failure || slow => {
                self.transitions[3] += 1;
                self.open();
            }
            Mode::HalfOpen { successes } if successes + 1 < self.settings.successes => {
                self.mode = Mode::HalfOpen {
                    successes: successes + 1,
                }
            }
            Mode::HalfOpen { .. } => {
                self.transitions[2] += 1;
                self.close();
            }
            Mode::Open { .. } => panic!("no call begins while the circuit is open"),
        }
    }

    fn end_closed(&mut self, verdict: Outcome, was_slow: bool) {
        let failed = verdict == Outcome::Failure;
        match verdict {
            Outcome::Success => self.run = 0,
            Outcome::Failure => self.run += 1,
            _ => {}
        }
        if let Some((most, _)) = self.settings.within
            && failed
        {
            self.failures.push(self.now);
            newest(&mut self.failures, most as usize);
        }
        if self.settings.watches_rates() {
            self.window.push((failed, was_slow));
            newest(&mut self.window, self.settings.size);
        }
        let Settings {
            within,
            failure_rate,
            slow,
            ..
        } = self.settings;
        let run = self.settings.threshold().is_some_and(|most| self.run >= most);
        let recent = within.is_some_and(|(most, _)| self.recent_failures() >= most as usize);
        let calls = self.window.len();
        let reaches = |part: usize, rate: Option<f64>| {
            calls >= self.settings.minimum && rate.is_some_and(|rate| part as f64 / calls as f64 >= rate)
        };
        let failures = self.window.iter().filter(|call| call.0).count();
        let slow_calls = self.window.iter().filter(|call| call.1).count();
        let tripping = failed && (run || recent)
            || reaches(failures, failure_rate)
            || reaches(slow_calls, slow.map(|(rate, _)| rate));
        if tripping && self.forced.is_none() {
            self.transitions[0] += 1;
            self.open();
        }
    }

    fn recent_failures(&self) -> usize {
        let (_, period) = self.settings.within.expect("watched");
        self.failures.iter().filter(|at| self.now - **at < period).count()
    }

    fn open(&mut self) {
        let factor = self
            .settings
            .backoff
            .map_or(1, |most| most.min(1 << self.trips.min(40)));
        self.trips += 1;
        let until = self.now + self.settings.open * factor;
        self.enter(Mode::Open { until }, self.now);
    }

    fn close(&mut self) {
        (self.run, self.trips) = (0, 0);
        self.failures.clear();
        self.window.clear();
        self.enter(Mode::Closed, self.now);
    }

    fn force(&mut self, forced: Override) {
        (self.forced, self.trips) = (Some(forced), 0);
        self.enter(Mode::Closed, self.now);
    }

    fn reset(&mut self) {
        self.forced = None;
        self.close();
    }

    fn reconfigure(&mut self, settings: Settings) {
        match settings.within {
            Some((most, _)) => newest(&mut self.failures, most as usize),
            None => self.failures.clear(),
        }
        if settings.watches_rates() {
            newest(&mut self.window, settings.size);
        } else {
            self.window.clear();
        }
        self.settings = settings;
        self.generation += 1;
    }

    fn failure_count(&self) -> u64 {
        if self.settings.threshold().is_some() {
            return self.run.into();
        }
        let count = match self.settings.within {
            Some(_) => self.recent_failures(),
            None => self.window.iter().filter(|call| call.0).count(),
        };
        count as u64
    }

    /// The breaker shows what the model says, twice, and tells its next caller the same.
    fn check(&self, breaker: &CircuitBreaker) -> TestCaseResult {
        let status = breaker.status();
        prop_assert_eq!(&breaker.status(), &status, "reading changes nothing");
        prop_assert_eq!(breaker.state(), status.state);
        prop_assert_eq!(status.state, self.state());
        prop_assert_eq!(status.forced, self.forced);
        prop_assert_eq!(status.generation, self.generation);
        prop_assert_eq!(status.state_age, Duration::from_nanos(self.now - self.since));
        prop_assert_eq!(status.failure_count, self.failure_count());
        let successes = match self.mode {
            Mode::HalfOpen { successes } => successes,
            _ => 0,
        };
        prop_assert_eq!(status.success_count, successes);
        let live = self.leases.iter().filter(|lease| lease.1 > self.now).count();
        prop_assert_eq!(status.probes_in_flight, live);
        prop_assert_eq!(status.retry_after, self.refusal().and_then(|refusal| refusal.1));
        let window = status.window.map(|window| (window.calls, window.failures, window.slow));
        let expected = self.settings.watches_rates().then(|| {
            let failed = self.window.iter().filter(|call| call.0).count();
            let slow = self.window.iter().filter(|call| call.1).count();
            (self.window.len() as u64, failed as u64, slow as u64)
        });
        prop_assert_eq!(window, expected);
        prop_assert_eq!(crate::transitions(breaker), self.transitions);
        let metrics = status.metrics;
        let ended = [
            metrics.successful_requests,
            metrics.failed_requests,
            metrics.ignored_requests,
            metrics.cancelled_requests,
            metrics.slow_requests,
        ];
        prop_assert_eq!(ended, self.ended);
        let rejected = metrics.rejected;
        prop_assert_eq!(
            [rejected.open, rejected.half_open_full, rejected.forced_open],
            self.rejected
        );
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Acquire,
    Settle(prop::sample::Index, Outcome),
    Drop(prop::sample::Index),
    Unused(prop::sample::Index),
    /// Makes a whole call at once.
    Call(Outcome),
    Advance(u64),
    /// Waits for `retry_after`: refused one nanosecond earlier, admitted at that instant.
    Retry,
    Force(Override),
    Reset,
    Reconfigure(Box<Settings>),
}

/// Both side by side.
struct Pair {
    breaker: CircuitBreaker,
    clock: ManualClock,
    model: Model,
    calls: Vec<Call>,
}

impl Pair {
    fn acquire(&mut self) -> Result<Option<Call>, TestCaseError> {
        let expected = self.model.refusal();
        match self.breaker.try_acquire() {
            Ok(permit) => {
                prop_assert_eq!(expected, None, "the breaker admits what the model refuses");
                Ok(Some(self.model.begin(permit)))
            }
            Err(why) => {
                prop_assert_eq!(Some((why.reason, why.retry_after)), expected);
                let index = match why.reason {
                    Reason::Open => 0,
                    Reason::HalfOpenFull => 1,
                    _ => 2,
                };
                self.model.rejected[index] += 1;
                Ok(None)
            }
        }
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
        self.model
            .advance(u64::try_from(by.as_nanos()).expect("within the scale"));
    }

    fn settle(&mut self, call: Call, outcome: Outcome) {
        self.model.end(&call, Some(outcome));
        call.permit.settle(outcome);
    }

    fn take(&mut self, index: prop::sample::Index) -> Option<Call> {
        (!self.calls.is_empty()).then(|| self.calls.swap_remove(index.index(self.calls.len())))
    }

    fn step(&mut self, step: Step) -> TestCaseResult {
        match step {
            Step::Acquire => {
                let call = self.acquire()?;
                self.calls.extend(call);
            }
            Step::Settle(index, outcome) => {
                if let Some(call) = self.take(index) {
                    self.settle(call, outcome);
                }
            }
            Step::Drop(index) => {
                if let Some(call) = self.take(index) {
                    self.model.end(&call, None);
                    drop(call.permit);
                }
            }
            Step::Unused(index) => {
                if let Some(call) = self.take(index) {
                    self.model.release(&call);
                    call.permit.unused();
                }
            }
            Step::Call(outcome) => {
                if let Some(call) = self.acquire()? {
                    self.settle(call, outcome);
                }
            }
            Step::Advance(nanos) => self.advance(Duration::from_nanos(nanos)),
            Step::Retry => {
                if let Some(wait) = self.breaker.status().retry_after {
                    self.advance(just_before(wait));
                    prop_assert!(self.acquire()?.is_none(), "refused one nanosecond early");
                    self.advance(NANO);
                    let call = self.acquire()?;
                    prop_assert!(call.is_some(), "admitted after {:?}", wait);
                    self.calls.extend(call);
                }
            }
            Step::Force(into) => {
                self.model.force(into);
                match into {
                    Override::ForcedOpen => self.breaker.force_open(),
                    Override::ForcedClosed => self.breaker.force_closed(),
                    Override::Disabled => self.breaker.disable(),
                }
            }
            Step::Reset => {
                self.model.reset();
                self.breaker.reset();
            }
            Step::Reconfigure(settings) => {
                self.breaker
                    .reconfigure(settings.config())
                    .expect("the settings are valid");
                self.model.reconfigure(*settings);
            }
        }
        self.model.check(&self.breaker)
    }
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        4 => Just(Outcome::Success),
        4 => Just(Outcome::Failure),
        1 => Just(Outcome::Ignored),
    ]
}

/// A nanosecond, a few, about an open time, or years.
fn time() -> impl Strategy<Value = u64> {
    const YEAR: u64 = 31_557_600_000_000_000;
    prop_oneof![3 => Just(1u64), 6 => 0u64..20, 3 => 0u64..200, 1 => 0..2 * YEAR]
}

fn settings() -> impl Strategy<Value = Settings> {
    let share = || prop_oneof![Just(0.5), Just(1.0), 0.05f64..1.0];
    let trips = (
        prop::option::of(1u32..5),
        prop::option::of((1u32..5, 1u64..60)),
        prop::option::of(share()),
        prop::option::of((share(), 1u64..30)),
        (1usize..12, 1usize..12),
    );
    let recovery = (
        1u64..50,
        prop::option::of(1u64..20),
        (1u32..4, 0usize..3),
        prop::option::of(1u64..200),
        outcome(),
    );
    (trips, recovery).prop_map(|(trips, (open, backoff, (successes, more), lease, cancelled))| {
        let (consecutive, within, failure_rate, slow, (size, minimum)) = trips;
        Settings {
            consecutive,
            within,
            failure_rate,
            slow,
            size,
            minimum: minimum.min(size),
            open,
            backoff,
            probes: successes as usize + more,
            successes,
            lease,
            cancelled,
        }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let forced = prop_oneof![
        Just(Override::ForcedOpen),
        Just(Override::ForcedClosed),
        Just(Override::Disabled)
    ];
    prop_oneof![
        12 => Just(Step::Acquire),
        10 => (index(), outcome()).prop_map(|(index, outcome)| Step::Settle(index, outcome)),
        3 => index().prop_map(Step::Drop),
        2 => index().prop_map(Step::Unused),
        8 => outcome().prop_map(Step::Call),
        8 => time().prop_map(Step::Advance),
        4 => Just(Step::Retry),
        1 => forced.prop_map(Step::Force),
        2 => Just(Step::Reset),
        1 => settings().prop_map(|settings| Step::Reconfigure(Box::new(settings))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn the_breaker_does_what_its_model_does(
        settings in settings(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let (breaker, clock) = breaker(|builder| builder.config(settings.config()));
        let mut pair = Pair { breaker, clock, model: Model::new(settings), calls: Vec::new() };
        pair.model.check(&pair.breaker)?;
        for step in steps {
            pair.step(step)?;
        }
        // Whatever has happened: every slot comes back, and the circuit can be closed by its service alone.
        pair.step(Step::Reset)?;
        for call in std::mem::take(&mut pair.calls) {
            pair.settle(call, Outcome::Ignored);
        }
        prop_assert_eq!(pair.breaker.status().probes_in_flight, 0);
        pair.model.check(&pair.breaker)?;
    }
}
