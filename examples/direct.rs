//! No tower at all: a circuit breaker and a rate limiter, used directly, out of one registry.
//!
//! Run it: `cargo run --example direct`

use portcullis::{BoxError, CircuitBreaker, CircuitBreakerConfig, Clock, Error, RateLimiter, Registry, TokenBucket};
use std::{io, time::Duration};

struct Agent {
    breaker: CircuitBreaker,
    limiter: RateLimiter,
}

impl Agent {
    fn new(registry: &Registry, name: &str) -> Result<Self, BoxError> {
        let config = CircuitBreakerConfig::default().failure_threshold(3);
        Ok(Self {
            breaker: registry.circuit_breaker(name, config.recovery_timeout(Duration::from_secs(30)))?,
            limiter: registry.rate_limiter(name, TokenBucket::new(100, Duration::from_secs(60)).burst(8))?,
        })
    }

    /// The limiter's permit is spent when it is dropped; the breaker judges what the future returns.
    async fn send(&self, message: &str, well: bool) -> Result<String, Error<io::Error>> {
        let _permit = self.limiter.try_acquire()?;
        self.breaker.call(communicate(message, well)).await
    }
}

/// Stands in for the network.
async fn communicate(message: &str, well: bool) -> io::Result<String> {
    tokio::time::sleep(Duration::from_millis(5)).await;
    if well {
        Ok(format!("an answer to {message:?}"))
    } else {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

fn tell(result: Result<String, Error<io::Error>>) {
    match result {
        Ok(answer) => println!("  answered: {answer}"),
        Err(Error::Inner(error)) => println!("  failed:   {error}"),
        Err(Error::Rejected(why)) => println!("  rejected: {why}"),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), BoxError> {
    // A clock moved by hand, so that nobody has to wait half a minute. `Registry::new()` takes the real one.
    let clock = Clock::manual();
    let registry = Registry::with_clock(&clock);
    let agent = Agent::new(&registry, "research")?;
    println!("The agent is well, then refuses connections; three failures in a row open the circuit:");
    for well in [true, false, false, false, true] {
        tell(agent.send("what is new?", well).await);
    }
    println!("open circuits: {:?}", registry.open_circuits());

    clock.advance(Duration::from_secs(30));
    let state = agent.breaker.state().as_str();
    println!("30 seconds later the circuit is {state}; two good answers close it:");
    for _ in 0..2 {
        tell(agent.send("and now?", true).await);
    }
    println!("More than the burst of 8 at once is too much for the limiter:");
    for _ in 0..9 {
        tell(agent.send("quick!", true).await);
    }

    let (breaker, limiter) = (agent.breaker.status(), agent.limiter.status());
    println!("circuit: {:?}", breaker.metrics.state_transitions);
    println!(
        "limiter: {} accepted, {} rejected",
        limiter.accepted_requests, limiter.rejected_requests
    );
    Ok(())
}
