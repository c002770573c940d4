//! Circuit breakers of any settings that are accepted, at any times, whatever comes of their calls.

use super::input::{NANOSECOND, Step, YEAR, duration, just_before, play, rarely};
use arbitrary::{Result, Unstructured};
use portcullis::{
    Backoff, CircuitBreaker, CircuitBreakerConfig, CircuitBreakerPermit, CircuitBreakerStatus, Clock, ManualClock,
    Outcome, Override, Reason, Rejected, State, Verdict, Window,
};
use std::time::Duration;

/// Keeps a run short; what is larger differs in memory alone.
const LARGEST_WINDOW: u32 = 1 << 10;
/// The longest of any setting.
const LONGEST: Duration = YEAR.saturating_mul(100);

pub fn run(data: &[u8]) {
    play(data, scenario);
}

fn scenario(input: &mut Unstructured<'_>) -> Result<()> {
    let config = config(input)?;
    let clock = Clock::manual();
    let Ok(breaker) = CircuitBreaker::builder("fuzzed").config(config).clock(&clock).build() else {
        return Ok(());
    };
    let mut run = Run {
        last: breaker.status(),
        clock,
        breaker,
        flying: Vec::new(),
    };
    while let Some(step) = Step::next(input)? {
        run.step(step, input)?;
        run.check_status();
        if run.clock.now() > Clock::manual().now().saturating_add(YEAR * 90) {
            return Ok(());
        }
    }
    run.heal();
    Ok(())
}

fn number(input: &mut Unstructured<'_>) -> Result<u32> {
    Ok(if rarely(input)? {
        input.arbitrary()?
    } else {
        u32::from(input.arbitrary::<u8>()? % 8)
    })
}

fn share(input: &mut Unstructured<'_>) -> Result<f64> {
    Ok(if rarely(input)? {
        input.arbitrary()?
    } else {
        f64::from(input.arbitrary::<u8>()?) / 255.0
    })
}

fn outcome(input: &mut Unstructured<'_>) -> Result<Outcome> {
    input
        .choose(&[Outcome::Success, Outcome::Failure, Outcome::Ignored])
        .copied()
}

fn config(input: &mut Unstructured<'_>) -> Result<CircuitBreakerConfig> {
    let mut config = CircuitBreakerConfig::default().half_open_max_calls(number(input)?);
    config = config
        .success_threshold(number(input)?)
        .recovery_timeout(duration(input)?)
        .cancelled(outcome(input)?);
    let which: u8 = input.arbitrary()?;
    let has = |bit: u8| which >> bit & 1 == 1;
    if has(0) {
        config = config.failure_threshold(number(input)?);
    }
    if has(1) {
        config = config.failures_within(number(input)? % LARGEST_WINDOW, duration(input)?);
    }
    if has(2) {
        config = config.failure_rate(share(input)?).minimum_calls(number(input)?);
    }
    if has(3) {
        config = config.slow_calls(share(input)?, duration(input)?);
    }
    if has(4) {
        config = config.window(Window::time(duration(input)?));
    } else {
        config = config.window(Window::calls(number(input)? % LARGEST_WINDOW));
    }
    if has(5) {
        config = config.probe_lease(duration(input)?);
    }
    if has(6) {
        config = config.honor_retry_after(duration(input)?);
    }
    if has(7) {
        let backoff = Backoff::new(1.0 / share(input)?, duration(input)?);
        config = config.recovery_backoff(backoff.jitter(share(input)?).seed(input.arbitrary()?));
    }
    Ok(config)
}

struct Run {
    clock: ManualClock,
    breaker: CircuitBreaker,
    last: CircuitBreakerStatus,
    flying: Vec<CircuitBreakerPermit>,
}

impl Run {
    fn step(&mut self, step: Step, input: &mut Unstructured<'_>) -> Result<()> {
        match step {
            Step::Advance(by) => self.clock.advance(by.min(YEAR)),
            Step::Rewind(_) => self.command(input)?,
            Step::Take => self.take(input.arbitrary()?),
            Step::End => self.end(input)?,
        }
        Ok(())
    }

    fn command(&self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.int_in_range(0..=5)? {
            0 => self.breaker.force_open(),
            1 => self.breaker.force_closed(),
            2 => self.breaker.disable(),
            3 | 4 => self.breaker.reset(),
            _ => {
                let before = self.breaker.config();
                if self.breaker.reconfigure(config(input)?).is_err() {
                    assert_eq!(self.breaker.config(), before, "what is refused changes nothing");
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, waits: bool) {
        let Err(refused) = self.ask() else { return };
        let Some(wait) = refused.retry_after else {
            assert_eq!(
                refused.reason,
                Reason::ForcedOpen,
                "only who is forced open knows no time"
            );
            return;
        };
        assert!(wait > Duration::ZERO, "refused now, so the time to retry is not now");
        if waits && wait < YEAR {
            self.clock.advance(just_before(wait));
            let early = self.ask().expect_err("refused one nanosecond early");
            assert_eq!(early.retry_after, Some(NANOSECOND));
            self.clock.advance(NANOSECOND);
            self.ask().expect("admitted after the time it was told");
        }
    }

    /// The status tells what the next call meets.
    fn ask(&mut self) -> std::result::Result<(), Rejected> {
        let before = self.breaker.status();
        let answer = self.breaker.try_acquire();
        let reason = answer.as_ref().err().map(|why| why.reason);
        let full = before.probes_in_flight >= most_probes(&before);
        let expected = match (before.forced, before.state) {
            (Some(Override::ForcedOpen), _) => Some(Reason::ForcedOpen),
            (Some(_), _) | (None, State::Closed) => None,
            (None, State::Open) => Some(Reason::Open),
            (None, State::HalfOpen) => full.then_some(Reason::HalfOpenFull),
        };
        assert_eq!(reason, expected, "{before:?}");
        let wait = answer.as_ref().err().and_then(|why| why.retry_after);
        assert_eq!(wait, before.retry_after, "{before:?}");
        self.flying.push(answer?);
        Ok(())
    }

    fn end(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (which, how) = (input.arbitrary::<u8>()?, input.int_in_range(0..=5)?);
        let outcome = outcome(input)?;
        let Some(last) = self.flying.len().checked_sub(1) else {
            return Ok(());
        };
        let permit = self.flying.swap_remove(usize::from(which) % (last + 1));
        match how {
            0 => drop(permit),
            1 => permit.unused(),
            2 => permit.settle(Verdict::new(outcome).retry_after(duration(input)?)),
            _ => permit.settle(outcome),
        }
        Ok(())
    }

    fn check_status(&mut self) {
        let status = self.breaker.status();
        let metrics = status.metrics;
        let rejected = metrics.rejected;
        let ended = [
            metrics.successful_requests,
            metrics.failed_requests,
            metrics.ignored_requests,
            metrics.cancelled_requests,
        ];
        assert_eq!(
            metrics.rejected_requests,
            rejected.open + rejected.half_open_full + rejected.forced_open
        );
        assert_eq!(
            metrics.total_requests,
            ended.iter().sum::<u64>() + metrics.rejected_requests
        );
        assert!(
            metrics.total_requests >= self.last.metrics.total_requests,
            "a counter only grows"
        );
        assert!(status.generation >= self.last.generation, "a generation only rises");
        assert!(status.state_age <= LONGEST);
        assert!(status.probes_in_flight <= self.flying.len(), "a probe is a call");
        if let Some(window) = status.window {
            assert!(
                window.failures <= window.calls && window.slow <= window.calls,
                "{window:?}"
            );
            for rate in [window.failure_rate, window.slow_call_rate].into_iter().flatten() {
                assert!((0.0..=1.0).contains(&rate), "{window:?}");
            }
        }
        if let Some(rate) = metrics.success_rate {
            assert!((0.0..=100.0).contains(&rate));
        }
        let moves = metrics.state_transitions;
        let opened = moves.closed_to_open + moves.half_open_to_open;
        assert!(moves.open_to_half_open <= opened, "{moves:?}");
        assert!(
            moves.half_open_to_closed + moves.half_open_to_open <= moves.open_to_half_open,
            "{moves:?}"
        );
        self.last = status;
    }

    /// An upstream that is well again is called again.
    fn heal(mut self) {
        self.flying.clear();
        if self.breaker.status().forced.is_some() {
            self.breaker.reset();
        }
        // In half-open one success after the other closes it; the largest threshold takes too long to reach.
        for _ in 0..64 {
            let status = self.breaker.status();
            match (status.state, status.retry_after) {
                (State::Closed, _) => return,
                (_, Some(wait)) if wait > LONGEST => return,
                (_, Some(wait)) => self.clock.advance(wait),
                (_, None) => self
                    .breaker
                    .try_acquire()
                    .expect("nothing is in its way")
                    .settle(Outcome::Success),
            }
        }
        let status = self.breaker.status();
        // The last step may have been the one that closed it.
        assert!(
            status.state == State::Closed || status.success_count >= 32,
            "it does not close: {status:?}"
        );
    }
}

/// As many as may be on their way in half-open, as far as a config tells: in its JSON.
fn most_probes(status: &CircuitBreakerStatus) -> usize {
    let config = serde_json::to_value(&status.config).expect("it is JSON");
    let most = config["half_open_max_calls"].as_u64().expect("a number");
    usize::try_from(most).expect("a number of calls")
}
