//! The breaker against a plain model of it: everything is kept, and everything is worked out anew when asked for.

use crate::{
    NANO, YEAR,
    services::{Guarded, Running},
    steps::{Dice, Kind, Share, Tally, run, steps},
};
use portcullis::{
    Backoff, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerMetrics, CircuitBreakerPermit, Clock, EventKind,
    Events, KeyedCircuitBreaker, ManualClock, Outcome, Override, Reason, State, Timestamp, Verdict, Window,
};
use proptest::{prelude::*, test_runner::TestCaseResult};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    time::Duration,
};

/// The calls over which rates are taken.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Over {
    Calls(usize),
    /// In nanoseconds.
    Time(u64),
}

/// How the open time grows.
#[derive(Debug, Clone, Copy)]
struct Growth {
    multiplier: u32,
    most: u64,
    /// In percent.
    jitter: u32,
}

/// The settings, in numbers and nanoseconds.
#[derive(Debug, Clone)]
struct Settings {
    consecutive: Option<u32>,
    within: Option<(u32, u64)>,
    failure_rate: Option<f64>,
    slow: Option<(f64, u64)>,
    over: Over,
    minimum: usize,
    open: u64,
    growth: Option<Growth>,
    honored: Option<u64>,
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
            .window(match self.over {
                Over::Calls(calls) => Window::calls(number(calls)),
                Over::Time(period) => Window::time(nanos(period)),
            })
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
        if let Some(growth) = self.growth {
            let backoff = Backoff::new(growth.multiplier.into(), nanos(growth.most));
            config = config.recovery_backoff(backoff.jitter(f64::from(growth.jitter) / 100.0));
        }
        if let Some(cap) = self.honored {
            config = config.honor_retry_after(nanos(cap));
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

    /// The length of a tenth of the window of time.
    fn tenth(&self) -> Option<u64> {
        match self.over {
            Over::Time(period) if self.watches_rates() => Some(period.div_ceil(10)),
            _ => None,
        }
    }

    fn reads_alike(&self, other: &Self) -> bool {
        let kind = |settings: &Self| {
            settings
                .watches_rates()
                .then_some(matches!(settings.over, Over::Calls(_)))
        };
        kind(self) == kind(other)
    }
}

/// In whose hands a call is.
enum Hands {
    Own(CircuitBreakerPermit),
    Services(Running),
}

/// A running call.
struct Call {
    hands: Hands,
    generation: u64,
    begun: u64,
    /// Whether slow calls were watched when it began.
    timed: bool,
    /// Its number as a probe.
    probe: Option<usize>,
    untracked: bool,
}

/// What a service has found when it was last asked whether it is ready.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Found {
    /// It was not asked since its last call.
    Unasked,
    /// It may call, and nothing is promised.
    Ready,
    /// It holds a probe's slot, by its number, in this generation.
    Slot(usize, u64),
    Refusal(Reason),
    /// It will be woken.
    Wait,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Closed,
    Open { until: u64 },
    HalfOpen { successes: u32 },
}

/// A call that is remembered.
#[derive(Debug, Clone, Copy)]
struct Recorded {
    at: u64,
    failed: bool,
    slow: bool,
}

/// What the listeners hear.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Told {
    Moved(State, State, u64),
    Forced(Override, u64),
    Reset(u64),
    Reconfigured(u64),
    Rejected(Reason),
}

/// What the breaker should be. Times are nanoseconds since the zero of the clock's scale, where the first tenth of every window begins.
struct Model<'a> {
    tally: &'a Tally,
    settings: Settings,
    now: u64,
    mode: Mode,
    /// Within what the end of the open time must lie, where chance had a part in it, until it is seen.
    unseen: Option<(u64, u64)>,
    forced: Option<Override>,
    generation: u64,
    since: u64,
    run: u32,
    failures: Vec<u64>,
    window: Vec<Recorded>,
    /// Lease ends by probe.
    leases: Vec<(usize, u64)>,
    probes_ever: usize,
    trips: u32,
    transitions: [u64; 4],
    /// Successful, failed, ignored, cancelled, slow.
    ended: [u64; 5],
    /// Open, half-open full, forced open.
    rejected: [u64; 3],
    told: Vec<(u64, Told)>,
}

fn newest<T>(all: &mut Vec<T>, most: usize) {
    all.drain(..all.len().saturating_sub(most));
}

impl<'a> Model<'a> {
    fn new(settings: Settings, now: u64, tally: &'a Tally) -> Self {
        Self {
            tally,
            settings,
            now,
            mode: Mode::Closed,
            unseen: None,
            forced: None,
            generation: 1,
            since: now,
            run: 0,
            failures: Vec::new(),
            window: Vec::new(),
            leases: Vec::new(),
            probes_ever: 0,
            trips: 0,
            transitions: [0; 4],
            ended: [0; 5],
            rejected: [0; 3],
            told: Vec::new(),
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

    /// A move that the circuit makes by itself.
    fn step(&mut self, into: Mode, since: u64) {
        let from = self.state();
        self.enter(into, since);
        let to = self.state();
        let (index, met) = match (from, to) {
            (State::Closed, State::Open) => (0, "closed to open"),
            (State::Open, State::HalfOpen) => (1, "open to half-open"),
            (State::HalfOpen, State::Closed) => (2, "half-open to closed"),
            (State::HalfOpen, State::Open) => (3, "half-open to open"),
            _ => panic!("no circuit moves from {from} to {to}"),
        };
        self.transitions[index] += 1;
        self.tally.meet(met);
        self.told.push((since, Told::Moved(from, to, self.generation)));
    }

    fn advance(&mut self, nanos: u64) {
        self.now += nanos;
        if let Mode::Open { until } = self.mode
            && self.forced.is_none()
            && until <= self.now
        {
            self.step(Mode::HalfOpen { successes: 0 }, until);
        }
    }

    /// The instants at which time alone changes something, whoever looks.
    fn instants(&self) -> Vec<u64> {
        let mut instants: Vec<u64> = self.leases.iter().map(|lease| lease.1).collect();
        if let Mode::Open { until } = self.mode {
            instants.push(until);
        }
        if let (Some((_, period)), Some(oldest)) = (self.settings.within, self.failures.first()) {
            instants.push(oldest + period);
        }
        if let Some(tenth) = self.settings.tenth() {
            instants.push((self.now / tenth + 1) * tenth);
        }
        instants.retain(|instant| *instant > self.now);
        instants
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

    fn refuse(&mut self, reason: Reason) {
        let (index, met) = match reason {
            Reason::Open => (0, "refused: open"),
            Reason::HalfOpenFull => (1, "refused: half-open full"),
            _ => (2, "refused: forced open"),
        };
        if let Mode::Open { until } = self.mode
            && reason == Reason::Open
            && self.slot_free(until) > until
        {
            self.tally.meet("probes that outlast the open time");
        }
        self.rejected[index] += 1;
        self.tally.meet(met);
        self.told.push((self.now, Told::Rejected(reason)));
    }

    /// Takes a probe's slot, if the circuit is half-open.
    fn take_slot(&mut self) -> Option<usize> {
        let is_half_open = matches!((self.forced, self.mode), (None, Mode::HalfOpen { .. }));
        is_half_open.then(|| {
            self.probes_ever += 1;
            let lease = self.settings.lease.unwrap_or(self.settings.open);
            self.leases.push((self.probes_ever, self.now + lease));
            self.probes_ever
        })
    }

    /// A call that was admitted, and has this slot if it is a probe.
    fn begin(&mut self, hands: Hands, probe: Option<usize>) -> Call {
        Call {
            hands,
            generation: self.generation,
            begun: self.now,
            timed: self.settings.slow.is_some(),
            probe,
            untracked: self.forced == Some(Override::Disabled),
        }
    }

    /// Whether a slot that a service holds is still worth a call.
    fn holds(&self, probe: usize, generation: u64) -> bool {
        let live = |lease: &(usize, u64)| lease.0 == probe && lease.1 > self.now;
        generation == self.generation && self.leases.iter().any(live)
    }

    /// What a service finds that is asked whether it is ready, and has found this before.
    fn ready(&mut self, before: Found, waits: bool) -> Found {
        if let Found::Slot(probe, generation) = before {
            if self.holds(probe, generation) {
                return before;
            }
            self.release(Some(probe));
        }
        match self.refusal() {
            None => match self.take_slot() {
                None => Found::Ready,
                Some(probe) => Found::Slot(probe, self.generation),
            },
            Some(_) if waits => Found::Wait,
            Some((reason, _)) => Found::Refusal(reason),
        }
    }

    fn release(&mut self, probe: Option<usize>) {
        self.leases.retain(|lease| Some(lease.0) != probe);
    }

    /// A call that ended; without a verdict it was dropped.
    fn end(&mut self, call: &Call, verdict: Option<Verdict>) {
        let lease = self.leases.iter().find(|lease| Some(lease.0) == call.probe);
        let late = lease.is_some_and(|lease| lease.1 <= self.now);
        self.release(call.probe);
        if call.untracked {
            return;
        }
        let slow_duration = self.settings.slow.map(|(_, slow)| slow);
        let long = call.timed && slow_duration.is_some_and(|slow| self.now - call.begun >= slow);
        let outcome = verdict.map_or(self.settings.cancelled, |verdict| verdict.outcome);
        let slow = long && (verdict.is_none() || outcome != Outcome::Ignored);
        self.ended[4] += u64::from(slow);
        self.ended[match (outcome, verdict) {
            (Outcome::Success, _) => 0,
            (Outcome::Failure, _) => 1,
            (_, Some(_)) => 2,
            (_, None) => 3,
        }] += 1;
        let says_nothing = outcome == Outcome::Ignored && !slow;
        if says_nothing || self.forced == Some(Override::Disabled) {
            return;
        }
        if call.generation != self.generation {
            self.tally.meet("a result of an earlier generation");
            return;
        }
        if late {
            self.tally.meet("a result after the end of its lease");
        }
        if verdict.is_none() && slow {
            self.tally.meet("a slow call that was dropped");
        }
        let asked = verdict.and_then(|verdict| verdict.retry_after);
        match self.mode {
            Mode::Closed => self.end_closed(outcome, slow, asked),
            Mode::HalfOpen { .. } if outcome == Outcome::Failure || slow => {
                if outcome != Outcome::Failure {
                    self.tally.meet("a slow probe");
                }
                self.open(asked);
            }
            Mode::HalfOpen { successes } if successes + 1 < self.settings.successes => {
                self.mode = Mode::HalfOpen {
                    successes: successes + 1,
                }
            }
            Mode::HalfOpen { .. } => {
                self.forget();
                self.step(Mode::Closed, self.now);
            }
            Mode::Open { .. } => panic!("no call begins while the circuit is open"),
        }
    }

    fn end_closed(&mut self, outcome: Outcome, was_slow: bool, asked: Option<Duration>) {
        let failed = outcome == Outcome::Failure;
        match outcome {
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
            let recorded = Recorded {
                at: self.now,
                failed,
                slow: was_slow,
            };
            self.window.push(recorded);
            self.slide();
        }
        let Settings {
            within,
            failure_rate,
            slow,
            over,
            ..
        } = self.settings;
        let run = failed && self.settings.threshold().is_some_and(|most| self.run >= most);
        let recent = failed && within.is_some_and(|(most, _)| self.recent_failures() >= most as usize);
        let calls = self.window.len();
        let reaches = |part: usize, rate: Option<f64>| {
            calls >= self.settings.minimum && rate.is_some_and(|rate| part as f64 / calls as f64 >= rate)
        };
        let (failures, slow_calls) = self.marked();
        let by_failures = reaches(failures, failure_rate);
        let by_slow_calls = reaches(slow_calls, slow.map(|(rate, _)| rate));
        if self.forced.is_some() || !(run || recent || by_failures || by_slow_calls) {
            return;
        }
        self.tally.meet(match (run, recent, by_failures, over) {
            (true, ..) => "a trip by consecutive failures",
            (_, true, ..) => "a trip by failures within a time",
            (_, _, true, Over::Calls(_)) => "a trip by the failure rate of some calls",
            (_, _, true, Over::Time(_)) => "a trip by the failure rate of some time",
            (_, _, _, Over::Calls(_)) => "a trip by the slow-call rate of some calls",
            (_, _, _, Over::Time(_)) => "a trip by the slow-call rate of some time",
        });
        self.open(asked);
    }

    /// Forgets what has left the window.
    fn slide(&mut self) {
        match (self.settings.over, self.settings.tenth()) {
            (_, Some(tenth)) => {
                let newest = self.now / tenth;
                self.window.retain(|call| call.at / tenth + 10 > newest);
            }
            (Over::Calls(size), _) => newest(&mut self.window, size),
            (Over::Time(_), None) => {}
        }
    }

    /// How many calls of the window failed, and how many were slow.
    fn marked(&self) -> (usize, usize) {
        let failed = self.window.iter().filter(|call| call.failed).count();
        (failed, self.window.iter().filter(|call| call.slow).count())
    }

    fn recent_failures(&self) -> usize {
        let (_, period) = self.settings.within.expect("watched");
        self.failures.iter().filter(|at| self.now - **at < period).count()
    }

    /// Between what the configured open time must lie.
    fn open_time(&self) -> (u64, u64) {
        let open = self.settings.open;
        let Some(growth) = self.settings.growth else {
            return (open, open);
        };
        if self.trips > 0 {
            self.tally.meet("an open time that grew");
        }
        let multiplier: u128 = growth.multiplier.into();
        let grown = multiplier.saturating_pow(self.trips).saturating_mul(open.into());
        // A product that is no power of two times the open time may be rounded.
        let slack = if multiplier.is_power_of_two() { 0 } else { grown >> 50 };
        let nanos = |grown: u128| u64::try_from(grown).unwrap_or(u64::MAX).min(growth.most);
        let (least, most) = (nanos(grown - slack), nanos(grown.saturating_add(slack)));
        if growth.jitter == 0 {
            return (least, most);
        }
        let share = u128::from(least) * u128::from(growth.jitter) / 100;
        let share = u64::try_from(share + (share >> 50)).expect("no more than all");
        (least.saturating_sub(share + 1).max(1), most)
    }

    /// Opens: for the configured time, or for as long as the service asked.
    fn open(&mut self, asked: Option<Duration>) {
        let (mut least, mut most) = self.open_time();
        self.trips += 1;
        if let (Some(asked), Some(cap)) = (asked, self.settings.honored) {
            let honored = u64::try_from(asked.as_nanos()).expect("within the scale").min(cap);
            if honored > most {
                self.tally.meet("an open time that the service asked for");
            }
            (least, most) = (least.max(honored), most.max(honored));
        }
        self.unseen = (least < most).then_some((self.now + least, self.now + most));
        self.step(Mode::Open { until: self.now + most }, self.now);
    }

    fn forget(&mut self) {
        (self.run, self.trips) = (0, 0);
        self.failures.clear();
        self.window.clear();
    }

    /// What an operator does is remembered together with what it was done to.
    fn meet_operator(&self, forced: &'static str, closed: &'static str, open: &'static str, half_open: &'static str) {
        self.tally.meet(match (self.forced, self.state()) {
            (Some(_), _) => forced,
            (None, State::Closed) => closed,
            (None, State::Open) => open,
            (None, State::HalfOpen) => half_open,
        });
    }

    fn force(&mut self, into: Override) {
        match into {
            Override::ForcedOpen => self.meet_operator(
                "forced open while forced",
                "forced open while closed",
                "forced open while open",
                "forced open while half-open",
            ),
            Override::ForcedClosed => self.meet_operator(
                "forced closed while forced",
                "forced closed while closed",
                "forced closed while open",
                "forced closed while half-open",
            ),
            Override::Disabled => self.meet_operator(
                "disabled while forced",
                "disabled while closed",
                "disabled while open",
                "disabled while half-open",
            ),
        }
        (self.forced, self.trips) = (Some(into), 0);
        self.enter(Mode::Closed, self.now);
        self.told.push((self.now, Told::Forced(into, self.generation)));
    }

    fn reset(&mut self) {
        self.meet_operator(
            "reset while forced",
            "reset while closed",
            "reset while open",
            "reset while half-open",
        );
        self.forced = None;
        self.forget();
        self.enter(Mode::Closed, self.now);
        self.told.push((self.now, Told::Reset(self.generation)));
    }

    fn reconfigure(&mut self, settings: Settings) {
        self.meet_operator(
            "reconfigured while forced",
            "reconfigured while closed",
            "reconfigured while open",
            "reconfigured while half-open",
        );
        match settings.within {
            Some((most, _)) => newest(&mut self.failures, most as usize),
            None => self.failures.clear(),
        }
        self.slide();
        if !settings.reads_alike(&self.settings) {
            self.window.clear();
        }
        if let Some(tenth) = self.settings.tenth()
            && settings.tenth() != Some(tenth)
        {
            // All that is known of a call is its tenth.
            for call in &mut self.window {
                call.at = call.at / tenth * tenth;
            }
        }
        self.settings = settings;
        self.slide();
        self.generation += 1;
        self.told.push((self.now, Told::Reconfigured(self.generation)));
    }

    fn failure_count(&self) -> u64 {
        if self.settings.threshold().is_some() {
            return self.run.into();
        }
        let count = match self.settings.within {
            Some(_) => self.recent_failures(),
            None => self.marked().0,
        };
        count as u64
    }

    /// The breaker shows what the model says, and tells its next caller the same.
    fn check(&mut self, breaker: &CircuitBreaker) -> TestCaseResult {
        self.slide();
        let status = breaker.status();
        if let Some((least, most)) = self.unseen.take() {
            let until = self.now + nanos(status.retry_after.expect("open"));
            prop_assert!((least..=most).contains(&until), "{} < {} < {}", least, until, most);
            self.mode = Mode::Open { until };
        }
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
        let calls = self.window.len();
        let window = self.settings.watches_rates().then(|| {
            let (failed, slow) = self.marked();
            let rate = |part: usize| (calls >= self.settings.minimum).then(|| part as f64 / calls as f64);
            (calls as u64, failed as u64, slow as u64, rate(failed), rate(slow))
        });
        let shown = status.window.map(|window| {
            let (failure_rate, slow_rate) = (window.failure_rate, window.slow_call_rate);
            (window.calls, window.failures, window.slow, failure_rate, slow_rate)
        });
        prop_assert_eq!(shown, window);
        self.check_metrics(&status.metrics)
    }

    fn check_metrics(&self, metrics: &CircuitBreakerMetrics) -> TestCaseResult {
        let moves = metrics.state_transitions;
        let transitions = [
            moves.closed_to_open,
            moves.open_to_half_open,
            moves.half_open_to_closed,
            moves.half_open_to_open,
        ];
        prop_assert_eq!(transitions, self.transitions);
        let ended = [
            metrics.successful_requests,
            metrics.failed_requests,
            metrics.ignored_requests,
            metrics.cancelled_requests,
            metrics.slow_requests,
        ];
        prop_assert_eq!(ended, self.ended);
        let rejected = [
            metrics.rejected.open,
            metrics.rejected.half_open_full,
            metrics.rejected.forced_open,
        ];
        prop_assert_eq!(rejected, self.rejected);
        let all_rejected: u64 = rejected.iter().sum();
        prop_assert_eq!(metrics.rejected_requests, all_rejected);
        let total = ended[..4].iter().sum::<u64>() + all_rejected;
        prop_assert_eq!(metrics.total_requests, total);
        let percent = (total > 0).then(|| ended[0] as f64 * 100.0 / total as f64);
        prop_assert_eq!(metrics.success_rate, percent);
        Ok(())
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).expect("within the scale")
}

#[derive(Debug, Clone)]
enum Step {
    Acquire,
    /// Ends a call, perhaps with the wish to be left alone for so many units.
    Settle(usize, Outcome, Option<u64>),
    Drop(usize),
    Unused(usize),
    /// A call is dropped by a panic.
    Panic(usize),
    /// Asks a service whether it is ready.
    Ready(usize),
    /// Calls a service, if it is ready.
    Call(usize),
    /// Does away with a service.
    Unready(usize),
    /// So many whole calls without a look in between. By their bits, some of them fail.
    Calls(u64, u64),
    Tick,
    /// In units.
    Advance(u64),
    Years(u64),
    /// To a moment at which something happens, or one nanosecond before.
    Instant(usize, bool),
    /// Waits for `retry_after`: refused one nanosecond earlier, admitted at that instant.
    Retry,
    Force(Override),
    Reset,
    /// Takes another of the case's settings.
    Reconfigure(usize),
    /// Reads twice.
    Look,
}

impl Step {
    fn read(dice: &mut Dice) -> Self {
        match dice.below(100) {
            0..20 => Self::Acquire,
            20..24 => Self::Ready(dice.index()),
            24..32 => Self::Call(dice.index()),
            32 => Self::Unready(dice.index()),
            33..50 => Self::Settle(
                dice.index(),
                outcome(dice),
                (dice.below(4) == 3).then(|| dice.below(100)),
            ),
            50..66 => Self::Drop(dice.index()),
            66 => Self::Unused(dice.index()),
            67 => Self::Panic(dice.index()),
            68..70 => {
                let most = dice.one_of(&[8, 40, 40, 600]);
                let failures = [0, dice.index() as u64, dice.below(1 << 40)];
                Self::Calls(dice.up_to(most), dice.one_of(&failures))
            }
            70..73 => Self::Tick,
            73..81 => Self::Advance(dice.below(20)),
            81..83 => Self::Advance(dice.below(200)),
            83 => Self::Years(dice.below(3)),
            84..88 => Self::Instant(dice.index(), dice.below(2) == 1),
            88..93 => Self::Retry,
            93 => Self::Force(dice.one_of(&[Override::ForcedOpen, Override::ForcedClosed, Override::Disabled])),
            94..97 => Self::Reset,
            97..99 => Self::Reconfigure(dice.index()),
            _ => Self::Look,
        }
    }
}

fn outcome(dice: &mut Dice) -> Outcome {
    match dice.below(9) {
        0..4 => Outcome::Success,
        4..8 => Outcome::Failure,
        _ => Outcome::Ignored,
    }
}

/// Both side by side.
struct Pair<'a> {
    breaker: CircuitBreaker,
    clock: ManualClock,
    /// The zero of the clock's scale.
    zero: Timestamp,
    events: Events,
    heard: usize,
    model: Model<'a>,
    calls: Vec<Call>,
    /// The latter half of them waits instead of rejecting.
    services: [(Guarded, Found); 4],
    settings: Vec<Settings>,
    unit: u64,
}

fn waits(service: usize) -> bool {
    service >= 2
}

impl<'a> Pair<'a> {
    fn new(case: Case, tally: &'a Tally) -> Self {
        let clock = Clock::manual();
        clock.advance(Duration::from_nanos(case.phase));
        let config = case.settings[0].config();
        let breaker = if case.keyed {
            let set = KeyedCircuitBreaker::builder("search").config(config).clock(&clock);
            set.build().expect("the settings are valid").get("key")
        } else {
            let builder = CircuitBreaker::builder("search").config(config).clock(&clock);
            builder.build().expect("the settings are valid")
        };
        let service = |number| (Guarded::new(&breaker, waits(number)), Found::Unasked);
        let services = std::array::from_fn(service);
        let zero = clock.now().saturating_sub(Duration::MAX);
        let now = nanos(clock.now().duration_since(zero));
        Self {
            events: breaker.subscribe(1_000),
            breaker,
            clock,
            zero,
            heard: 0,
            model: Model::new(case.settings[0].clone(), now, tally),
            calls: Vec::new(),
            services,
            settings: case.settings,
            unit: case.unit,
        }
    }

    /// The end of a step.
    fn done(&mut self, kind: Kind) -> TestCaseResult {
        self.model.check(&self.breaker)?;
        self.listen()?;
        for (service, found) in &self.services {
            let waits = *found == Found::Wait && !service.is_woken();
            prop_assert!(!waits || self.model.refusal().is_some(), "a service that nobody wakes");
        }
        self.model.tally.count(kind);
        Ok(())
    }

    /// Everything is told, in order. Only of a move that is due, and that nobody has found so far, nothing may be told yet.
    fn listen(&mut self) -> TestCaseResult {
        while let Some(event) = self.events.try_recv() {
            let at = nanos(event.at.duration_since(self.zero));
            let told = match event.kind {
                EventKind::Transition { from, to, generation } => Told::Moved(from, to, generation),
                EventKind::Overridden { into, generation } => Told::Forced(into, generation),
                EventKind::Reset { generation } => Told::Reset(generation),
                EventKind::Reconfigured { generation } => Told::Reconfigured(generation),
                EventKind::Rejected(why) => Told::Rejected(why.reason),
                other => return Err(TestCaseError::fail(format!("no breaker tells {other:?}"))),
            };
            prop_assert_eq!(Some(&(at, told)), self.model.told.get(self.heard));
            self.heard += 1;
        }
        match self.model.told[self.heard..] {
            [] | [(_, Told::Moved(_, State::HalfOpen, _))] => Ok(()),
            ref untold => Err(TestCaseError::fail(format!("never told: {untold:?}"))),
        }
    }

    /// Asks for a call; whether there is one more.
    fn ask(&mut self) -> Result<bool, TestCaseError> {
        let expected = self.model.refusal();
        match self.breaker.try_acquire() {
            Ok(permit) => {
                prop_assert_eq!(expected, None, "the breaker admits what the model refuses");
                let probe = self.model.take_slot();
                self.calls.push(self.model.begin(Hands::Own(permit), probe));
                Ok(true)
            }
            Err(why) => {
                prop_assert_eq!(Some((why.reason, why.retry_after)), expected);
                self.model.refuse(why.reason);
                Ok(false)
            }
        }
    }

    fn acquire(&mut self) -> Result<bool, TestCaseError> {
        let admitted = self.ask()?;
        self.done(if admitted { Kind::Admitted } else { Kind::Other })?;
        Ok(admitted)
    }

    /// How far the time may move: the scale has room for it, and for what is to come then.
    fn left(&self) -> Duration {
        let start = self.zero.saturating_add(Duration::from_nanos(1 << 62));
        (250 * YEAR).saturating_sub(self.clock.now().duration_since(start))
    }

    fn advance(&mut self, by: u64) -> TestCaseResult {
        let by = Duration::from_nanos(by.max(1)).min(self.left());
        if by == Duration::ZERO {
            return Ok(());
        }
        if by == NANO {
            self.model.tally.meet("a nanosecond");
        } else if by >= YEAR {
            self.model.tally.meet("a year or more");
        }
        self.clock.advance(by);
        self.model.advance(nanos(by));
        self.done(Kind::Time)
    }

    fn ready(&mut self, index: usize) -> TestCaseResult {
        let number = index % self.services.len();
        let (service, found) = &mut self.services[number];
        if *found == Found::Wait && service.is_woken() {
            self.model.tally.meet("a service that was woken");
        }
        *found = self.model.ready(*found, waits(number));
        if let Found::Slot(..) = found {
            self.model.tally.meet("a slot that waits for a call");
        }
        prop_assert_eq!(service.is_ready(), *found != Found::Wait);
        self.done(Kind::Other)
    }

    fn call(&mut self, index: usize) -> TestCaseResult {
        let number = index % self.services.len();
        let (service, found) = &mut self.services[number];
        if matches!(found, Found::Unasked | Found::Wait) {
            return self.ready(index);
        }
        let found = std::mem::replace(found, Found::Unasked);
        let mut running = service.call();
        let mut slot = None;
        if let Found::Slot(probe, generation) = found {
            if self.model.holds(probe, generation) {
                slot = Some(probe);
            } else {
                self.model.tally.meet("a slot that was lost before the call");
                self.model.release(Some(probe));
            }
        }
        let refusal = self.model.refusal().filter(|_| slot.is_none());
        let expected = match found {
            // The inner service was not asked: there is no way back.
            Found::Refusal(reason) => refusal.or_else(|| {
                self.model.tally.meet("a refusal that is over when its call comes");
                Some((reason, (reason != Reason::ForcedOpen).then_some(Duration::ZERO)))
            }),
            _ => refusal,
        };
        let rejection = running.rejection().map(|why| (why.reason, why.retry_after));
        prop_assert_eq!(&rejection, &expected);
        let Some((reason, _)) = rejection else {
            let slot = slot.or_else(|| self.model.take_slot());
            self.calls.push(self.model.begin(Hands::Services(running), slot));
            return self.done(Kind::Admitted);
        };
        self.model.refuse(reason);
        self.done(Kind::Other)
    }

    fn unready(&mut self, index: usize) -> TestCaseResult {
        let number = index % self.services.len();
        if let Found::Slot(probe, _) = self.services[number].1 {
            self.model.release(Some(probe));
        }
        self.services[number] = (Guarded::new(&self.breaker, waits(number)), Found::Unasked);
        self.done(Kind::Other)
    }

    fn settle(&mut self, call: Call, verdict: Verdict) {
        self.model.end(&call, Some(verdict));
        match call.hands {
            Hands::Own(permit) => permit.settle(verdict),
            Hands::Services(running) => running.end(verdict),
        }
    }

    fn take(&mut self, index: usize) -> Option<Call> {
        (!self.calls.is_empty()).then(|| self.calls.swap_remove(index % self.calls.len()))
    }

    /// Ends one of the calls in flight; asks for one if there is none.
    fn end(&mut self, index: usize, kind: Kind, end: impl FnOnce(&mut Self, Call)) -> TestCaseResult {
        let Some(call) = self.take(index) else {
            return self.acquire().map(|_| ());
        };
        end(self, call);
        self.done(kind)
    }

    fn calls(&mut self, calls: u64, failures: u64) -> TestCaseResult {
        for number in 0..calls {
            if !self.ask()? {
                continue;
            }
            let call = self.calls.pop().expect("just asked for");
            let failed = failures >> (number % 64) & 1 == 1;
            let outcome = if failed { Outcome::Failure } else { Outcome::Success };
            self.settle(call, outcome.into());
            // What chance had a part in must be seen before it is told again.
            if self.model.unseen.is_some() {
                break;
            }
        }
        self.done(Kind::Other)
    }

    fn step(&mut self, step: &Step) -> TestCaseResult {
        match *step {
            Step::Acquire => self.acquire().map(|_| ()),
            Step::Settle(index, outcome, wish) => {
                let mut verdict = Verdict::new(outcome);
                if let Some(units) = wish {
                    verdict = verdict.retry_after(Duration::from_nanos(units * self.unit));
                }
                self.end(index, Kind::Settled, |pair, call| pair.settle(call, verdict))
            }
            Step::Drop(index) => self.end(index, Kind::Dropped, |pair, call| {
                pair.model.end(&call, None);
                drop(call.hands);
            }),
            Step::Unused(index) => self.end(index, Kind::Other, |pair, call| match call.hands {
                Hands::Own(permit) => {
                    pair.model.release(call.probe);
                    permit.unused();
                }
                Hands::Services(_) => {
                    pair.model.end(&call, None);
                    drop(call.hands);
                }
            }),
            Step::Panic(index) => self.end(index, Kind::Dropped, |pair, call| {
                pair.model.end(&call, Some(Outcome::Failure.into()));
                pair.model.tally.meet("a panic");
                match call.hands {
                    Hands::Own(permit) => {
                        let panics = AssertUnwindSafe(|| {
                            let _permit = permit;
                            resume_unwind(Box::new(()))
                        });
                        let _: Result<(), _> = catch_unwind(panics);
                    }
                    Hands::Services(running) => running.panic(),
                }
            }),
            Step::Ready(index) => self.ready(index),
            Step::Call(index) => self.call(index),
            Step::Unready(index) => self.unready(index),
            Step::Calls(calls, failures) => self.calls(calls, failures),
            Step::Tick => self.advance(1),
            Step::Advance(units) => self.advance(units * self.unit),
            Step::Years(years) => self.advance(nanos(YEAR) * years),
            Step::Instant(index, before) => {
                let instants = self.model.instants();
                let Some(instant) = instants.get(index % instants.len().max(1)) else {
                    return self.advance(self.unit);
                };
                self.advance(instant - self.model.now - u64::from(before))
            }
            Step::Retry => {
                let Some(wait) = self.breaker.status().retry_after.filter(|wait| *wait <= self.left()) else {
                    return self.acquire().map(|_| ());
                };
                if wait > NANO {
                    self.advance(nanos(wait) - 1)?;
                }
                prop_assert!(!self.acquire()?, "refused one nanosecond early");
                self.advance(1)?;
                prop_assert!(self.acquire()?, "admitted after {:?}", wait);
                Ok(())
            }
            Step::Force(into) => {
                self.model.force(into);
                match into {
                    Override::ForcedOpen => self.breaker.force_open(),
                    Override::ForcedClosed => self.breaker.force_closed(),
                    Override::Disabled => self.breaker.disable(),
                }
                self.done(Kind::Other)
            }
            Step::Reset => self.reset(),
            Step::Reconfigure(index) => {
                let settings = self.settings[index % self.settings.len()].clone();
                self.breaker
                    .reconfigure(settings.config())
                    .expect("the settings are valid");
                self.model.reconfigure(settings);
                self.done(Kind::Other)
            }
            Step::Look => {
                let status = self.breaker.status();
                prop_assert_eq!(&status.config, &self.model.settings.config());
                prop_assert_eq!(self.breaker.status(), status, "reading changes nothing");
                self.done(Kind::Other)
            }
        }
    }

    fn reset(&mut self) -> TestCaseResult {
        self.model.reset();
        self.breaker.reset();
        self.done(Kind::Other)
    }

    /// Whatever has happened: every slot comes back, everything is told, and the circuit is closed.
    fn close(mut self) -> TestCaseResult {
        self.reset()?;
        for call in std::mem::take(&mut self.calls) {
            self.settle(call, Outcome::Ignored.into());
        }
        for number in 0..self.services.len() {
            self.unready(number)?;
        }
        prop_assert_eq!(self.breaker.status().probes_in_flight, 0);
        self.model.check(&self.breaker)?;
        self.listen()?;
        prop_assert_eq!(self.heard, self.model.told.len());
        prop_assert_eq!(self.events.lost(), 0);
        Ok(())
    }
}

#[derive(Debug, Clone)]
struct Case {
    /// The one that it begins with, and others.
    settings: Vec<Settings>,
    /// What its times are multiples of, in nanoseconds.
    unit: u64,
    /// When it begins.
    phase: u64,
    /// Whether it is the breaker of a key.
    keyed: bool,
    steps: Vec<Step>,
}

impl Settings {
    /// The other's, but for the numbers on which it trips: a reconfiguration keeps what means the same.
    fn like(&self, other: &Self) -> Self {
        let over = match (self.over, other.over) {
            (Over::Calls(_), Over::Calls(_)) | (Over::Time(_), Over::Time(_)) => self.over,
            _ => other.over,
        };
        Self {
            consecutive: other.consecutive.and(self.consecutive.or(other.consecutive)),
            within: other.within.and(self.within.or(other.within)),
            failure_rate: other.failure_rate.and(self.failure_rate.or(other.failure_rate)),
            slow: other.slow.and(self.slow.or(other.slow)),
            over,
            minimum: match over {
                Over::Calls(calls) => self.minimum.min(calls),
                Over::Time(_) => self.minimum,
            },
            ..other.clone()
        }
    }

    /// With times that count this unit. If chance has a part in the open time, no lease outlasts it: the end of one is not taken for
    /// that of the other.
    fn in_units(self, unit: u64, chance: bool) -> Self {
        let times = |time: u64| time * unit;
        let growth = self.growth.map(|growth| Growth {
            multiplier: growth.multiplier.min(if chance { 3 } else { 2 }),
            most: times(growth.most),
            jitter: if chance { growth.jitter } else { 0 },
        });
        Self {
            within: self.within.map(|(failures, period)| (failures, times(period))),
            slow: self.slow.map(|(rate, slow)| (rate, times(slow))),
            over: match self.over {
                Over::Calls(calls) => Over::Calls(calls),
                Over::Time(thousandths) => {
                    let time = (u128::from(unit) * u128::from(thousandths)).div_ceil(1_000);
                    Over::Time(u64::try_from(time).expect("years"))
                }
            },
            open: times(self.open),
            growth,
            honored: self.honored.map(times),
            lease: if chance { Some(1) } else { self.lease.map(times) },
            ..self
        }
    }
}

fn settings() -> impl Strategy<Value = Settings> {
    let share = || prop_oneof![Just(0.5), Just(1.0), 0.05f64..1.0];
    let calls = prop_oneof![4 => 1usize..12, 1 => 12usize..200].prop_map(Over::Calls);
    let time = (1..100_000u64).prop_map(Over::Time);
    let trips = (
        prop::option::of(1u32..5),
        prop::option::of((1u32..5, 1u64..60)),
        prop::option::of(share()),
        prop::option::of((share(), 1u64..30)),
        (prop_oneof![calls, time], 1usize..12),
    );
    let recovery = (
        1u64..50,
        prop::option::of((1u32..4, 1u64..20, 0..=100u32)),
        prop::option::of(1u64..100),
        (1u32..4, 0usize..3),
        prop::option::of(1u64..200),
        prop_oneof![Just(Outcome::Success), Just(Outcome::Failure), Just(Outcome::Ignored)],
    );
    (trips, recovery).prop_map(|(trips, recovery)| {
        let (consecutive, within, failure_rate, slow, (over, minimum)) = trips;
        let (open, growth, honored, (successes, more), lease, cancelled) = recovery;
        Settings {
            consecutive,
            within,
            failure_rate,
            slow,
            over,
            minimum: match over {
                Over::Calls(calls) => minimum.min(calls),
                Over::Time(_) => minimum,
            },
            open,
            growth: growth.map(|(multiplier, times, jitter)| Growth {
                multiplier,
                most: open * times,
                jitter,
            }),
            honored,
            probes: successes as usize + more,
            successes,
            lease,
            cancelled,
        }
    })
}

fn cases() -> impl Strategy<Value = Case> {
    const UNITS: [u64; 9] = [
        1,
        1,
        1,
        7,
        1_000,
        1_000_003,
        1_000_000_000,
        86_400_000_000_000,
        3_000_000_000_000_000,
    ];
    let unit = prop::sample::select(UNITS.as_slice());
    let chance = prop::bool::weighted(0.2);
    let settings = prop::collection::vec(settings(), 4);
    let times = (unit, 0u64..1 << 40, any::<bool>());
    (times, chance, any::<bool>(), settings, steps(300, Step::read)).prop_map(
        |((unit, phase, alike), chance, keyed, settings, steps)| Case {
            settings: settings
                .iter()
                .map(|one| if alike { one.like(&settings[0]) } else { one.clone() })
                .map(|one| one.in_units(unit, chance))
                .collect(),
            unit,
            phase,
            keyed,
            steps,
        },
    )
}

const TO_MEET: [&str; 47] = [
    "closed to open",
    "open to half-open",
    "half-open to closed",
    "half-open to open",
    "refused: open",
    "refused: half-open full",
    "refused: forced open",
    "probes that outlast the open time",
    "a result of an earlier generation",
    "a result after the end of its lease",
    "a slow call that was dropped",
    "a slow probe",
    "a trip by consecutive failures",
    "a trip by failures within a time",
    "a trip by the failure rate of some calls",
    "a trip by the failure rate of some time",
    "a trip by the slow-call rate of some calls",
    "a trip by the slow-call rate of some time",
    "an open time that grew",
    "an open time that the service asked for",
    "a panic",
    "a slot that waits for a call",
    "a slot that was lost before the call",
    "a refusal that is over when its call comes",
    "a service that was woken",
    "a nanosecond",
    "a year or more",
    "forced open while forced",
    "forced open while closed",
    "forced open while open",
    "forced open while half-open",
    "forced closed while forced",
    "forced closed while closed",
    "forced closed while open",
    "forced closed while half-open",
    "disabled while forced",
    "disabled while closed",
    "disabled while open",
    "disabled while half-open",
    "reset while forced",
    "reset while closed",
    "reset while open",
    "reset while half-open",
    "reconfigured while forced",
    "reconfigured while closed",
    "reconfigured while open",
    "reconfigured while half-open",
];

#[test]
fn the_breaker_does_what_its_model_does() {
    run("the breaker", Share::BREAKER, &TO_MEET, &cases(), |tally, case| {
        let steps = case.steps.clone();
        let mut pair = Pair::new(case, tally);
        pair.model.check(&pair.breaker)?;
        for step in &steps {
            pair.step(step)?;
        }
        pair.close()
    });
}
