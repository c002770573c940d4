//! The breaker's state machine: plain data and sequential steps. The time is an argument, a step returns what happened, and
//! whoever holds the machine tells the world.

use super::{
    config::Settings,
    window::{FailureTimes, RateWindow, Tally},
};
use crate::{
    clock::{Now, Timestamp, nanos},
    permit::{Outcome, Verdict},
    rejected::Reason,
    state::{Override, State, StateTransitions},
};
use std::{
    collections::BTreeSet,
    hash::{BuildHasher, RandomState},
    num::NonZeroU64,
    time::Duration,
};

/// A probe's place, until it ends or its lease does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lease {
    pub(super) end: Timestamp,
    id: NonZeroU64,
}

/// Why not, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) reason: Reason,
    pub(super) until: Option<Timestamp>,
}

/// A move that the machine made by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Transition {
    pub(super) from: State,
    pub(super) to: State,
    pub(super) generation: u64,
    pub(super) at: Timestamp,
}

/// An ended call, as the machine needs to know it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended<'a> {
    pub(super) generation: u64,
    pub(super) verdict: &'a Verdict,
    pub(super) slow: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Closed,
    Open { until: Timestamp },
    HalfOpen { successes: u32 },
}

/// What becomes of a success that was not slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quick {
    /// Nothing: it would leave the machine as it is.
    Nothing,
    /// It is enough that it is counted, and told by the next [`catch_up`](Machine::catch_up).
    Count,
    /// The same, for those that end in this time.
    CountWithin(Timestamp, Timestamp),
    /// It may move the machine.
    Record,
}

/// What readers see: the machine as the next mutator would find it.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub(super) state: State,
    pub(super) forced: Option<Override>,
    pub(super) generation: u64,
    pub(super) refusal: Option<Refusal>,
    pub(super) failure_count: u64,
    pub(super) success_count: u32,
    pub(super) probes: usize,
    pub(super) window: Option<Tally>,
    pub(super) minimum_calls: u64,
    pub(super) transitions: StateTransitions,
    pub(super) since: Timestamp,
}

#[derive(Debug)]
pub(crate) struct Machine {
    settings: Settings,
    mode: Mode,
    forced: Option<Override>,
    generation: u64,
    /// When the generation's state began.
    since: Timestamp,
    consecutive: u32,
    /// When a failure or a slow call was last recorded, if anybody wants to know: it takes a look at the clock.
    blamed: Option<Timestamp>,
    /// How many of this generation's counted successes are recorded, and the time for which those that follow are counted.
    caught_up: u64,
    tenth: Timestamp,
    times: Option<FailureTimes>,
    window: Option<RateWindow>,
    /// Whether a rate of a window of calls was reached by the last call that was recorded. Those that are only counted lower the
    /// rates: it is never wrongly `false`.
    is_high: bool,
    /// Running probes with their leases, of every generation: a slot is taken as long as its probe may be in the service.
    probes: BTreeSet<Lease>,
    last_probe: u64,
    /// Trips since the circuit was last closed.
    trips: u32,
    random: u64,
    transitions: StateTransitions,
}

impl Machine {
    pub(super) fn new(settings: Settings, now: Timestamp) -> Self {
        Self {
            mode: Mode::Closed,
            forced: None,
            generation: 1,
            since: now,
            consecutive: 0,
            blamed: None,
            caught_up: 0,
            tenth: now,
            times: new_times(&settings),
            window: settings.window.map(RateWindow::new),
            is_high: false,
            probes: BTreeSet::new(),
            last_probe: 0,
            trips: 0,
            random: seed(&settings),
            transitions: StateTransitions::default(),
            settings,
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn forced(&self) -> Option<Override> {
        self.forced
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The state as last written: a due transition is not projected.
    pub(super) fn state(&self) -> State {
        match (self.forced, self.mode) {
            (Some(Override::ForcedOpen), _) | (None, Mode::Open { .. }) => State::Open,
            (Some(Override::ForcedClosed | Override::Disabled), _) | (None, Mode::Closed) => State::Closed,
            (None, Mode::HalfOpen { .. }) => State::HalfOpen,
        }
    }

    /// What becomes of the quick successes of a closed circuit from now on, until the next step.
    ///
    /// A success cannot trip where no rate is reached: it only makes the rates smaller, and so do those after it, until a tenth
    /// of a window of time runs out and takes other successes with it. Where a rate is reached, and only the minimum of calls is
    /// not, a success may trip.
    pub(super) fn quick(&mut self, now: &Now<'_>) -> Quick {
        let Some(RateWindow::Time(window)) = &self.window else {
            return self.quick_at_any_time();
        };
        if self.is_reached(&window.tally(now.get())) {
            return Quick::Record;
        }
        let (start, end) = window.tenth(now.get());
        self.tenth = start;
        Quick::CountWithin(start, end)
    }

    /// The same where there is no window of time.
    #[inline]
    pub(super) fn quick_at_any_time(&self) -> Quick {
        match &self.window {
            Some(RateWindow::Calls(window)) if !window.is_clean() => {
                if self.is_high {
                    Quick::Record
                } else {
                    Quick::Count
                }
            }
            // It ends a run of failures.
            _ if self.consecutive > 0 => Quick::Count,
            _ => Quick::Nothing,
        }
    }

    #[inline]
    pub(super) fn has_window_of_time(&self) -> bool {
        matches!(self.window, Some(RateWindow::Time(_)))
    }

    /// Records the successes that were only counted since the last step, told how many there are in this generation.
    pub(super) fn catch_up(&mut self, counted: u64) {
        let new = counted.saturating_sub(self.caught_up);
        if new > 0 {
            self.caught_up = counted;
            self.consecutive = 0;
            if let Some(window) = &mut self.window {
                window.succeed(new, self.tenth);
            }
        }
    }

    /// Whether a new machine would do the same from now on: closed by itself, and without a failure or a slow call to remember.
    /// What succeeded is no loss.
    pub(super) fn is_as_new(&self, now: Timestamp) -> bool {
        let blameless = |tally: Tally| tally.failures == 0 && tally.slow == 0;
        matches!((self.forced, self.mode), (None, Mode::Closed))
            // A run that nobody watches is counted on and on.
            && (self.consecutive == 0 || self.settings.failure_threshold.is_none())
            && self.times.as_ref().is_none_or(|times| times.within(now) == 0)
            && self.window.as_ref().is_none_or(|window| blameless(window.tally(&Now::At(now))))
            && self.probes.iter().all(|lease| lease.end <= now)
    }

    /// From now on it is kept when a failure or a slow call was last recorded, for [`is_outdated`](Self::is_outdated).
    pub(super) fn date_blame(&mut self) {
        self.blamed = Some(self.since);
    }

    /// Whether what it has seen happened so long ago, and it refuses nobody, by itself or by hand. Asked of one that nobody has a permit
    /// of.
    pub(super) fn is_outdated(&self, age: Duration, now: Timestamp) -> bool {
        let refuses = matches!(self.mode, Mode::Open { until } if now < until);
        let is_old = |blamed| now.duration_since(blamed) >= age;
        self.forced.is_none() && !refuses && self.blamed.is_some_and(is_old)
    }

    /// Until when every acquire is refused for one reason, if that is so: the end of the open time, or of the first lease of a
    /// full set.
    pub(super) fn refused_until(&self) -> Option<Timestamp> {
        match self.mode {
            _ if self.forced.is_some() => None,
            Mode::Closed => None,
            // Refused for another reason once the open time is over.
            Mode::Open { until } if self.admits_at(until) > until => None,
            Mode::Open { until } => Some(until),
            Mode::HalfOpen { .. } if self.probes.len() < self.settings.half_open_max_calls => None,
            Mode::HalfOpen { .. } => self.first_lease_end(),
        }
    }

    /// When enough leases have ended for one more probe. More may run than are allowed, after a reconfiguration.
    fn first_lease_end(&self) -> Option<Timestamp> {
        let surplus = self.probes.len().checked_sub(self.settings.half_open_max_calls)?;
        self.probes.iter().nth(surplus).map(|lease| lease.end)
    }

    /// When a circuit that is open until then admits again: probes that outlast the open time may fill the half-open one.
    fn admits_at(&self, until: Timestamp) -> Timestamp {
        self.first_lease_end().map_or(until, |end| end.max(until))
    }

    /// Whether it is closed and moves by itself only.
    #[inline]
    pub(super) fn is_plainly_closed(&self) -> bool {
        matches!((self.forced, self.mode), (None, Mode::Closed))
    }

    /// From when on a call would be admitted, if nothing happens until then: any time if one is now, never if nobody can tell.
    pub(super) fn admits_from(&self) -> Timestamp {
        const ANY_TIME: Timestamp = Timestamp::from_nanos(0);
        const NEVER: Timestamp = Timestamp::from_nanos(u64::MAX);
        match (self.forced, self.mode) {
            (Some(Override::ForcedOpen), _) => NEVER,
            (Some(Override::ForcedClosed | Override::Disabled), _) | (None, Mode::Closed) => ANY_TIME,
            (None, Mode::Open { until }) => self.admits_at(until),
            (None, Mode::HalfOpen { .. }) => self.first_lease_end().unwrap_or(ANY_TIME),
        }
    }

    /// Makes a due transition real.
    pub(super) fn advance(&mut self, now: &Now<'_>) -> Option<Transition> {
        match self.mode {
            Mode::Open { until } if self.forced.is_none() && until <= now.get() => {
                self.transitions.open_to_half_open += 1;
                Some(self.enter(Mode::HalfOpen { successes: 0 }, until))
            }
            _ => None,
        }
    }

    /// Takes a probe's slot, or refuses. Only a half-open circuit asks; the others admit or refuse without a trace.
    /// The caller has made a due transition real.
    pub(super) fn acquire(&mut self, now: Timestamp) -> Result<Option<Lease>, Refusal> {
        match (self.forced, self.mode) {
            (Some(Override::ForcedOpen), _) => Err(Refusal {
                reason: Reason::ForcedOpen,
                until: None,
            }),
            (Some(Override::ForcedClosed | Override::Disabled), _) | (None, Mode::Closed) => Ok(None),
            (None, Mode::Open { until }) => Err(Refusal {
                reason: Reason::Open,
                until: Some(self.admits_at(until)),
            }),
            (None, Mode::HalfOpen { .. }) => {
                while self.probes.first().is_some_and(|lease| lease.end <= now) {
                    self.probes.pop_first();
                }
                if let Some(until) = self.first_lease_end() {
                    return Err(Refusal {
                        reason: Reason::HalfOpenFull,
                        until: Some(until),
                    });
                }
                self.last_probe += 1;
                let lease = Lease {
                    end: now.saturating_add(self.settings.probe_lease),
                    id: NonZeroU64::new(self.last_probe).unwrap_or(NonZeroU64::MAX),
                };
                self.probes.insert(lease);
                Ok(Some(lease))
            }
        }
    }

    /// Whether the lease still holds its slot.
    pub(super) fn holds(&self, lease: Lease, now: Timestamp) -> bool {
        now < lease.end && self.probes.contains(&lease)
    }

    /// Frees a probe's slot, whatever generation it was taken in.
    pub(super) fn release(&mut self, lease: Lease) {
        self.probes.remove(&lease);
    }

    /// Records how a call ended. The result of a call begun in an earlier generation moves nothing.
    pub(super) fn record(&mut self, ended: &Ended<'_>, now: &Now<'_>) -> Option<Transition> {
        if ended.generation != self.generation || self.forced == Some(Override::Disabled) {
            return None;
        }
        let failed = match ended.verdict.outcome {
            Outcome::Success => false,
            Outcome::Failure => true,
            // A cancelled call that was slow already says one thing: slow.
            Outcome::Ignored if ended.slow => false,
            Outcome::Ignored => return None,
        };
        if let Some(blamed) = &mut self.blamed
            && (failed || ended.slow)
        {
            *blamed = now.get().max(*blamed);
        }
        match self.mode {
            Mode::Closed => self.record_closed(failed, ended, now),
            Mode::HalfOpen { .. } if failed || ended.slow => {
                self.transitions.half_open_to_open += 1;
                Some(self.open(ended.verdict.retry_after, now.get()))
            }
            Mode::HalfOpen { successes } if successes + 1 < self.settings.success_threshold => {
                self.mode = Mode::HalfOpen {
                    successes: successes + 1,
                };
                None
            }
            Mode::HalfOpen { .. } => {
                self.transitions.half_open_to_closed += 1;
                self.trips = 0;
                self.clear_windows();
                Some(self.enter(Mode::Closed, now.get()))
            }
            // No call begins while the circuit is open.
            Mode::Open { .. } => None,
        }
    }

    fn record_closed(&mut self, failed: bool, ended: &Ended<'_>, now: &Now<'_>) -> Option<Transition> {
        // Ignored but slow is no success: it leaves a run of failures alone.
        if failed {
            self.consecutive = self.consecutive.saturating_add(1);
        } else if ended.verdict.outcome == Outcome::Success {
            self.consecutive = 0;
        }
        if let Some(times) = &mut self.times
            && failed
        {
            times.record(now.get());
        }
        if let Some(window) = &mut self.window {
            window.record(failed, ended.slow, now);
        }
        if let Some(RateWindow::Calls(window)) = &self.window {
            self.is_high = self.is_reached(window.tally());
        }
        if self.forced.is_some() || !self.is_tripping(failed, now) {
            return None;
        }
        self.transitions.closed_to_open += 1;
        Some(self.open(ended.verdict.retry_after, now.get()))
    }

    fn is_tripping(&self, failed: bool, now: &Now<'_>) -> bool {
        let settings = &self.settings;
        let consecutive = settings.failure_threshold.is_some_and(|most| self.consecutive >= most);
        // Only a failure adds to these; that a reconfiguration has lowered their numbers is no reason to trip on a success.
        if failed && (consecutive || self.times.as_ref().is_some_and(|times| times.is_tripping(now.get()))) {
            return true;
        }
        match &self.window {
            None => false,
            Some(RateWindow::Calls(window)) => window.tally().calls >= settings.minimum_calls && self.is_high,
            Some(RateWindow::Time(window)) => {
                let tally = window.tally(now.get());
                tally.calls >= settings.minimum_calls && self.is_reached(&tally)
            }
        }
    }

    /// Whether one of the rates is as high as may be.
    fn is_reached(&self, tally: &Tally) -> bool {
        let settings = &self.settings;
        settings.failure_rate.is_some_and(|most| tally.failures_reach(most))
            || settings.slow_calls.is_some_and(|(most, _)| tally.slow_reach(most))
    }

    /// Opens: for the configured time, or for as long as the service asked.
    fn open(&mut self, asked: Option<Duration>, now: Timestamp) -> Transition {
        self.trips = self.trips.saturating_add(1);
        let own = self.open_time();
        let asked = asked.zip(self.settings.honor_retry_after);
        let open = asked.map_or(own, |(wait, cap)| own.max(nanos(wait).min(cap)));
        let until = now.saturating_add(Duration::from_nanos(open));
        self.enter(Mode::Open { until }, now)
    }

    fn open_time(&mut self) -> u64 {
        let Some(backoff) = self.settings.backoff else {
            return self.settings.recovery_timeout;
        };
        // The first trip takes the timeout as it is: a float would round a long one.
        let full = match self.trips.saturating_sub(1) {
            0 => self.settings.recovery_timeout,
            again => {
                let exponent = i32::try_from(again).unwrap_or(i32::MAX);
                let grown = self.settings.recovery_timeout as f64 * backoff.multiplier.powi(exponent);
                to_nanos(grown).min(nanos(backoff.max))
            }
        };
        let share = backoff.jitter * self.next_random();
        full.saturating_sub(to_nanos(full as f64 * share)).max(1)
    }

    /// A number in [0, 1): splitmix64 (Steele, Lea and Flood, 2014), which is enough to keep clients apart.
    fn next_random(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1u64 << 53) as f64
    }

    fn enter(&mut self, mode: Mode, at: Timestamp) -> Transition {
        let from = self.state();
        self.mode = mode;
        self.begin_generation(at);
        Transition {
            from,
            to: self.state(),
            generation: self.generation,
            at,
        }
    }

    fn begin_generation(&mut self, at: Timestamp) {
        self.generation += 1;
        self.caught_up = 0;
        self.since = at;
    }

    fn clear_windows(&mut self) {
        self.consecutive = 0;
        self.times = new_times(&self.settings);
        self.window = self.settings.window.map(RateWindow::new);
        self.is_high = false;
    }

    pub(super) fn force(&mut self, forced: Override, now: Timestamp) {
        self.forced = Some(forced);
        self.mode = Mode::Closed;
        self.trips = 0;
        self.begin_generation(now);
    }

    pub(super) fn reset(&mut self, now: Timestamp) {
        self.forced = None;
        self.mode = Mode::Closed;
        self.trips = 0;
        self.clear_windows();
        self.begin_generation(now);
    }

    /// Takes other settings and keeps what means the same under them: the state (an open circuit keeps its due instant, running
    /// probes their leases), the latest calls of a window, a run of failures.
    pub(super) fn reconfigure(&mut self, settings: Settings, now: Timestamp) {
        self.times = match (self.times.take(), settings.failures_within) {
            (Some(times), Some((failures, period))) => Some(times.resize(failures, period)),
            _ => new_times(&settings),
        };
        self.window = match (self.window.take(), settings.window) {
            (Some(window), Some(kind)) => Some(window.resize(kind, now)),
            (_, kind) => kind.map(RateWindow::new),
        };
        let seed_of = |settings: &Settings| settings.backoff.and_then(|backoff| backoff.seed);
        if seed_of(&settings) != seed_of(&self.settings) {
            self.random = seed(&settings);
        }
        self.settings = settings;
        // Perhaps not: the next call tells.
        self.is_high = true;
        self.generation += 1;
        self.caught_up = 0;
    }

    pub(super) fn view(&self, now: Timestamp) -> View {
        let mut view = View {
            state: self.state(),
            forced: self.forced,
            generation: self.generation,
            refusal: None,
            failure_count: 0,
            success_count: 0,
            probes: self.probes.iter().filter(|lease| now < lease.end).count(),
            window: None,
            minimum_calls: self.settings.minimum_calls,
            transitions: self.transitions,
            since: self.since,
        };
        if let Mode::Open { until } = self.mode
            && self.forced.is_none()
            && until <= now
        {
            view.state = State::HalfOpen;
            view.generation += 1;
            view.transitions.open_to_half_open += 1;
            view.since = until;
        }
        let refuse = |reason, until| Some(Refusal { reason, until });
        view.refusal = match (self.forced, view.state, self.mode) {
            (Some(Override::ForcedOpen), ..) => refuse(Reason::ForcedOpen, None),
            (_, State::Open, Mode::Open { until }) => refuse(Reason::Open, Some(self.admits_at(until))),
            (_, State::HalfOpen, _) if view.probes >= self.settings.half_open_max_calls => {
                let free = view.probes - self.settings.half_open_max_calls;
                let live = self.probes.iter().filter(|lease| now < lease.end);
                refuse(Reason::HalfOpenFull, live.map(|lease| lease.end).nth(free))
            }
            _ => None,
        };
        if let Mode::HalfOpen { successes } = self.mode {
            view.success_count = successes;
        }
        view.window = self.window.as_ref().map(|window| window.tally(&Now::At(now)));
        view.failure_count = match (&self.settings.failure_threshold, &self.times, view.window) {
            (Some(_), ..) => self.consecutive.into(),
            (None, Some(times), _) => times.within(now) as u64,
            (None, None, window) => window.map_or(0, |tally| tally.failures),
        };
        view
    }
}

fn new_times(settings: &Settings) -> Option<FailureTimes> {
    settings
        .failures_within
        .map(|(failures, period)| FailureTimes::new(failures, period))
}

fn seed(settings: &Settings) -> u64 {
    let chosen = settings.backoff.and_then(|backoff| backoff.seed);
    // The standard library keys every hasher differently: a seed of its own for each breaker.
    chosen.unwrap_or_else(|| RandomState::new().hash_one(()))
}

/// Saturating, as float casts are.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a length of time: saturates, never negative"
)]
fn to_nanos(nanos: f64) -> u64 {
    nanos as u64
}
