use crate::{
    clock::nanos,
    error::{ConfigError, duration, share, within},
    permit::Outcome,
};
use std::time::Duration;

/// How a circuit breaker trips, waits and recovers.
///
/// The settings are checked where a breaker is made of them: by [`build`](super::CircuitBreakerBuilder::build),
/// [`reconfigure`](super::CircuitBreaker::reconfigure) and the registry. A [`CircuitBreaker::builder`](super::CircuitBreaker::builder)
/// takes the same settings.
///
/// It is a value: two breakers of one config share nothing, and to change it changes no breaker that was built, which
/// [`reconfigure`](crate::CircuitBreaker::reconfigure) does.
///
/// # What trips a closed circuit
///
/// Any of the configured conditions, judged after every recorded call:
///
/// | condition | setting | default |
/// |---|---|---|
/// | consecutive failures | [`failure_threshold`](Self::failure_threshold) | 5, unless another condition is configured |
/// | failures within a time | [`failures_within`](Self::failures_within) | off |
/// | failure rate | [`failure_rate`](Self::failure_rate) over the [`window`](Self::window) | off |
/// | slow-call rate | [`slow_calls`](Self::slow_calls) over the [`window`](Self::window) | off |
///
/// ```
/// use portcullis::{Backoff, CircuitBreakerConfig, Registry, Window};
/// use std::time::Duration;
///
/// let config = CircuitBreakerConfig::default()
///     .failure_rate(0.5)
///     .window(Window::calls(100))
///     .minimum_calls(20)
///     .slow_calls(0.8, Duration::from_secs(2))
///     .recovery_timeout(Duration::from_secs(30))
///     .recovery_backoff(Backoff::new(2.0, Duration::from_secs(600)).jitter(0.2));
/// let breaker = Registry::new().circuit_breaker("search", config)?;
/// # Ok::<(), portcullis::RegistryError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct CircuitBreakerConfig {
    pub(super) failure_threshold: Option<u32>,
    pub(super) failures_within: Option<(u32, Duration)>,
    pub(super) failure_rate: Option<f64>,
    pub(super) slow_calls: Option<(f64, Duration)>,
    pub(super) window: Window,
    pub(super) minimum_calls: Option<u32>,
    pub(super) recovery_timeout: Duration,
    pub(super) recovery_backoff: Option<Backoff>,
    pub(super) half_open_max_calls: u32,
    pub(super) success_threshold: u32,
    pub(super) probe_lease: Option<Duration>,
    pub(super) cancelled: Outcome,
    pub(super) honor_retry_after: Option<Duration>,
    pub(super) critical: bool,
}

impl Default for CircuitBreakerConfig {
    fn default() -> Self {
        Self {
            failure_threshold: None,
            failures_within: None,
            failure_rate: None,
            slow_calls: None,
            window: Window::calls(100),
            minimum_calls: None,
            recovery_timeout: Duration::from_secs(60),
            recovery_backoff: None,
            half_open_max_calls: 3,
            success_threshold: 2,
            probe_lease: None,
            cancelled: Outcome::Ignored,
            honor_retry_after: None,
            critical: false,
        }
    }
}

/// The calls over which a rate is taken.
///
/// ```
/// # use portcullis::{CircuitBreaker, Window};
/// # use std::time::Duration;
/// CircuitBreaker::builder("search").failure_rate(0.5).window(Window::calls(50)).build()?;
/// CircuitBreaker::builder("search").failure_rate(0.5).window(Window::time(Duration::from_secs(30))).build()?;
/// assert!(CircuitBreaker::builder("search").failure_rate(0.5).window(Window::calls(0)).build().is_err());
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window(pub(super) WindowKind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WindowKind {
    Calls(u32),
    Time(Duration),
}

impl Window {
    /// The last `n` recorded calls, 1 to 1,048,576. It slides by one with every call. A quarter of a byte each.
    #[must_use]
    pub const fn calls(n: u32) -> Self {
        Self(WindowKind::Calls(n))
    }

    /// The calls of the last `period`, in ten buckets: what is counted reaches between nine and ten tenths of the period back.
    /// 320 bytes, whatever the traffic.
    #[must_use]
    pub const fn time(period: Duration) -> Self {
        Self(WindowKind::Time(period))
    }
}

/// How the open time grows while a circuit trips again and again without closing in between.
///
/// The open time after the n-th trip is `recovery_timeout × multiplierⁿ⁻¹`, at most `max`, less a random share of up to
/// `jitter`. It starts over when the circuit closes.
///
/// ```
/// # use portcullis::{Backoff, CircuitBreaker};
/// # use std::time::Duration;
/// let breaker = CircuitBreaker::builder("search")
///     .recovery_timeout(Duration::from_secs(1))
///     .recovery_backoff(Backoff::new(2.0, Duration::from_secs(60)).jitter(0.1))
///     .build()?;
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    pub(super) multiplier: f64,
    pub(super) max: Duration,
    pub(super) jitter: f64,
    pub(super) seed: Option<u64>,
}

impl Backoff {
    /// Multiplies the open time by `multiplier` (at least 1) from trip to trip, up to `max` (at least the recovery timeout).
    #[must_use]
    pub const fn new(multiplier: f64, max: Duration) -> Self {
        Self {
            multiplier,
            max,
            jitter: 0.0,
            seed: None,
        }
    }

    /// Shortens each open time by a random share of up to `jitter`, 0 to 1, so that many clients do not probe at once.
    #[must_use]
    pub const fn jitter(mut self, jitter: f64) -> Self {
        self.jitter = jitter;
        self
    }

    /// Makes the jitter repeatable. Without a seed every breaker draws its own.
    #[must_use]
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }
}

/// The settings, once for the config and once for the builder that owns one.
macro_rules! settings {
    ($($(#[doc = $doc:literal])+ fn $name:ident($self:ident, $($arg:ident: $type:ty),+) $body:block)+) => {
        impl CircuitBreakerConfig {
            $($(#[doc = $doc])+ #[must_use] pub fn $name(mut $self, $($arg: $type),+) -> Self { $body; $self })+
        }
        impl super::CircuitBreakerBuilder {
            $($(#[doc = $doc])+ pub fn $name(mut self, $($arg: $type),+) -> Self {
                self.config = self.config.$name($($arg),+);
                self
            })+
        }
    };
}

settings! {
    /// Trips after so many failures in a row, 1 or more. Default 5, unless another condition is configured and this one is not.
    fn failure_threshold(self, failures: u32) { self.failure_threshold = Some(failures) }

    /// Trips on so many failures (1 to 65,536) within `period`, whatever succeeds in between. Exact: the failures' times are
    /// kept, 8 bytes each.
    fn failures_within(self, failures: u32, period: Duration) { self.failures_within = Some((failures, period)) }

    /// Trips when at least this share of the calls in the window failed, above 0 and at most 1.
    fn failure_rate(self, threshold: f64) { self.failure_rate = Some(threshold) }

    /// Trips when at least this share of the calls in the window (above 0, at most 1) took `slow` or longer, from the call to
    /// its result; of an HTTP response, to its head. A half-open probe that is slow then counts as a failure, and a cancelled
    /// call that was already slow counts as slow.
    fn slow_calls(self, threshold: f64, slow: Duration) { self.slow_calls = Some((threshold, slow)) }

    /// The calls over which both rates are taken. Default: the last 100.
    fn window(self, window: Window) { self.window = window }

    /// The rates trip nothing before the window holds so many calls, 1 or more, and no more than a window of calls has.
    /// Default: 20, or the size of a smaller window.
    fn minimum_calls(self, calls: u32) { self.minimum_calls = Some(calls) }

    /// How long the circuit stays open before it lets probes through, 1 ns to 100 years. Default: 60 s.
    fn recovery_timeout(self, open: Duration) { self.recovery_timeout = open }

    /// Grows the open time over repeated trips. Default: it stays the same.
    fn recovery_backoff(self, backoff: Backoff) { self.recovery_backoff = Some(backoff) }

    /// How many probes a half-open circuit lets through at once, at least `success_threshold`. Default: 3.
    fn half_open_max_calls(self, probes: u32) { self.half_open_max_calls = probes }

    /// How many probes must succeed to close a half-open circuit, 1 or more; a single failure opens it again. Default: 2.
    fn success_threshold(self, successes: u32) { self.success_threshold = successes }

    /// How long a probe may hold its slot, 1 ns to 100 years. A probe that takes longer loses the slot, not its vote: its
    /// result still counts. Default: the recovery timeout.
    fn probe_lease(self, lease: Duration) { self.probe_lease = Some(lease) }

    /// What a call counts as that was begun and dropped. Default: [`Outcome::Ignored`].
    fn cancelled(self, outcome: Outcome) { self.cancelled = outcome }

    /// Lets a service that says when to come back (`Retry-After`, in [`Verdict::retry_after`](crate::Verdict::retry_after))
    /// lengthen the open time, up to `cap`. Default: off.
    fn honor_retry_after(self, cap: Duration) { self.honor_retry_after = Some(cap) }

    /// Whether `/readyz` fails while this circuit is open. Default: no. On the breakers of keys it does nothing: none of them
    /// alone is what the program cannot do without.
    fn critical(self, critical: bool) { self.critical = critical }
}

/// A config that has been checked, with every default filled in.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Settings {
    pub(super) failure_threshold: Option<u32>,
    pub(super) failures_within: Option<(u32, u64)>,
    pub(super) failure_rate: Option<f64>,
    pub(super) slow_calls: Option<(f64, u64)>,
    /// `None` if no rate is watched.
    pub(super) window: Option<WindowKind>,
    pub(super) minimum_calls: u64,
    pub(super) recovery_timeout: u64,
    pub(super) backoff: Option<Backoff>,
    pub(super) half_open_max_calls: usize,
    pub(super) success_threshold: u32,
    pub(super) probe_lease: Duration,
    pub(super) cancelled: Outcome,
    pub(super) honor_retry_after: Option<u64>,
}

impl CircuitBreakerConfig {
    /// Whether `/readyz` fails while this circuit is open.
    #[must_use]
    pub fn is_critical(&self) -> bool {
        self.critical
    }

    const LARGEST_WINDOW: u32 = 1 << 20;
    const MOST_TIMES: u32 = 1 << 16;

    pub(super) fn validate(&self) -> Result<Settings, ConfigError> {
        let rates = self.failure_rate.is_some() || self.slow_calls.is_some();
        let failure_threshold = match self.failure_threshold {
            None if rates || self.failures_within.is_some() => None,
            threshold => Some(within("failure_threshold", threshold.unwrap_or(5), &(1..=u32::MAX))?),
        };
        let failures_within = self.failures_within.map(|(failures, period)| {
            let failures = within("failures_within (failures)", failures, &(1..=Self::MOST_TIMES))?;
            Ok((failures, nanos(duration("failures_within (period)", period)?)))
        });
        let failure_rate = self.failure_rate.map(|rate| share("failure_rate", rate));
        let slow_calls = self.slow_calls.map(|(rate, slow)| {
            let rate = share("slow_calls (threshold)", rate)?;
            Ok((rate, nanos(duration("slow_calls (slow)", slow)?)))
        });
        let largest_minimum = match self.window.0 {
            WindowKind::Calls(calls) => within("window (calls)", calls, &(1..=Self::LARGEST_WINDOW))?,
            WindowKind::Time(period) => {
                duration("window (time)", period)?;
                u32::MAX
            }
        };
        let minimum_calls = self.minimum_calls.unwrap_or(20.min(largest_minimum));
        let minimum_calls = within("minimum_calls", minimum_calls, &(1..=largest_minimum))?;
        let recovery_timeout = duration("recovery_timeout", self.recovery_timeout)?;
        if let Some(backoff) = &self.recovery_backoff {
            self.validate_backoff(backoff)?;
        }
        let success_threshold = within("success_threshold", self.success_threshold, &(1..=u32::MAX))?;
        if self.half_open_max_calls < success_threshold {
            return Err(ConfigError::new(
                "half_open_max_calls",
                self.half_open_max_calls.to_string(),
                format!("at least success_threshold, which is {success_threshold}"),
            ));
        }
        let probe_lease = duration("probe_lease", self.probe_lease.unwrap_or(recovery_timeout))?;
        let honor_retry_after = self.honor_retry_after.map(|cap| duration("honor_retry_after", cap));
        Ok(Settings {
            failure_threshold,
            failures_within: failures_within.transpose()?,
            failure_rate: failure_rate.transpose()?,
            slow_calls: slow_calls.transpose()?,
            window: rates.then_some(self.window.0),
            // Without a rate to watch it means nothing, and configs that mean the same are equal.
            minimum_calls: if rates { minimum_calls.into() } else { 0 },
            recovery_timeout: nanos(recovery_timeout),
            backoff: self.recovery_backoff,
            half_open_max_calls: self.half_open_max_calls.try_into().unwrap_or(usize::MAX),
            success_threshold,
            probe_lease,
            cancelled: self.cancelled,
            honor_retry_after: honor_retry_after.transpose()?.map(nanos),
        })
    }

    fn validate_backoff(&self, backoff: &Backoff) -> Result<(), ConfigError> {
        let refuse = |field, value: String, expected: String| Err(ConfigError::new(field, value, expected));
        if !(backoff.multiplier >= 1.0 && backoff.multiplier.is_finite()) {
            let value = backoff.multiplier.to_string();
            return refuse("recovery_backoff (multiplier)", value, "1 or more".into());
        }
        duration("recovery_backoff (max)", backoff.max)?;
        if backoff.max < self.recovery_timeout {
            let expected = format!("at least recovery_timeout, which is {:?}", self.recovery_timeout);
            return refuse("recovery_backoff (max)", format!("{:?}", backoff.max), expected);
        }
        if !(0.0..=1.0).contains(&backoff.jitter) {
            return refuse("recovery_backoff (jitter)", backoff.jitter.to_string(), "0 to 1".into());
        }
        Ok(())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for CircuitBreakerConfig {
    /// Durations in seconds; settings that are off are `null`.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let settings = self.validate().ok();
        let settings = settings.as_ref();
        let seconds = |duration: Option<Duration>| duration.map(|duration| duration.as_secs_f64());
        let (window_calls, window_seconds) = match settings.and_then(|settings| settings.window) {
            Some(WindowKind::Calls(calls)) => (Some(calls), None),
            Some(WindowKind::Time(period)) => (None, Some(period.as_secs_f64())),
            None => (None, None),
        };
        let mut out = serializer.serialize_struct("CircuitBreakerConfig", 19)?;
        out.serialize_field(
            "failure_threshold",
            &settings.and_then(|settings| settings.failure_threshold),
        )?;
        out.serialize_field("failures_within", &self.failures_within.map(|(failures, _)| failures))?;
        out.serialize_field(
            "failures_within_seconds",
            &seconds(self.failures_within.map(|(_, period)| period)),
        )?;
        out.serialize_field("failure_rate", &self.failure_rate)?;
        out.serialize_field("slow_call_rate", &self.slow_calls.map(|(rate, _)| rate))?;
        out.serialize_field("slow_call_seconds", &seconds(self.slow_calls.map(|(_, slow)| slow)))?;
        out.serialize_field("window_calls", &window_calls)?;
        out.serialize_field("window_seconds", &window_seconds)?;
        out.serialize_field(
            "minimum_calls",
            &settings.and_then(|s| s.window.map(|_| s.minimum_calls)),
        )?;
        out.serialize_field("recovery_timeout", &self.recovery_timeout.as_secs_f64())?;
        out.serialize_field(
            "recovery_backoff_multiplier",
            &self.recovery_backoff.map(|backoff| backoff.multiplier),
        )?;
        out.serialize_field(
            "recovery_backoff_max",
            &seconds(self.recovery_backoff.map(|backoff| backoff.max)),
        )?;
        out.serialize_field(
            "recovery_backoff_jitter",
            &self.recovery_backoff.map(|backoff| backoff.jitter),
        )?;
        out.serialize_field("half_open_max_calls", &self.half_open_max_calls)?;
        out.serialize_field("success_threshold", &self.success_threshold)?;
        out.serialize_field(
            "probe_lease",
            &seconds(Some(self.probe_lease.unwrap_or(self.recovery_timeout))),
        )?;
        out.serialize_field("cancelled", self.cancelled.as_str())?;
        out.serialize_field("honor_retry_after", &seconds(self.honor_retry_after))?;
        out.serialize_field("critical", &self.critical)?;
        out.end()
    }
}
