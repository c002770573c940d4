//! The snapshots that join what a registry holds.

use crate::{
    breaker::{CircuitBreakerStatus, KeyedCircuitBreakerStatus},
    limit::RateLimiterStatus,
    name::Name,
    state::State,
};
use std::collections::BTreeMap;

/// All services of a registry: from [`Registry::status`](crate::Registry::status).
///
/// ```
/// # use portcullis::{CircuitBreakerConfig, Registry, State};
/// let registry = Registry::new();
/// registry.circuit_breaker("search", CircuitBreakerConfig::default())?;
/// let status = registry.status();
/// let search = status.services["search"].circuit_breaker.as_ref().unwrap();
/// assert_eq!(search.state, State::Closed);
/// # Ok::<(), portcullis::RegistryError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct RegistryStatus {
    /// Each service by its name.
    pub services: BTreeMap<Name, ServiceStatus>,
    /// The services whose circuit is open.
    pub open_circuits: Vec<Name>,
}

impl RegistryStatus {
    pub(crate) fn new(services: BTreeMap<Name, ServiceStatus>) -> Self {
        let open = |status: &ServiceStatus| {
            status
                .circuit_breaker
                .as_ref()
                .is_some_and(|it| it.state == State::Open)
        };
        let open_circuits = services.iter().filter(|(_, status)| open(status));
        Self {
            open_circuits: open_circuits.map(|(name, _)| name.clone()).collect(),
            services,
        }
    }
}

/// One service's breaker and limiters: from [`Registry::service_status`](crate::Registry::service_status).
///
/// Serialized, the breaker's fields stand beside `rate_limiters`.
///
/// ```
/// # use portcullis::{Registry, TokenBucket};
/// # use std::time::Duration;
/// let registry = Registry::new();
/// registry.rate_limiter("search", TokenBucket::new(50, Duration::from_secs(60)))?;
/// let status = registry.service_status("search").unwrap();
/// assert_eq!(status.rate_limiters[0].available_tokens, 50.0);
/// # Ok::<(), portcullis::RegistryError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ServiceStatus {
    /// The service's name.
    pub service: Name,
    /// Its breaker, if it has one.
    pub circuit_breaker: Option<CircuitBreakerStatus>,
    /// Its breakers, if it has one for each key.
    pub circuit_breakers: Option<KeyedCircuitBreakerStatus>,
    /// Its limiters, by the names of their limits.
    pub rate_limiters: Vec<RateLimiterStatus>,
}

#[cfg(feature = "serde")]
impl serde::Serialize for ServiceStatus {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(serde::Serialize)]
        struct Beside<'a> {
            // The breaker brings the name along.
            #[serde(skip_serializing_if = "Option::is_none")]
            service: Option<&'a Name>,
            #[serde(flatten)]
            circuit_breaker: Option<&'a CircuitBreakerStatus>,
            #[serde(skip_serializing_if = "Option::is_none")]
            circuit_breakers: Option<&'a KeyedCircuitBreakerStatus>,
            rate_limiters: &'a [RateLimiterStatus],
        }
        Beside {
            service: self.circuit_breaker.is_none().then_some(&self.service),
            circuit_breaker: self.circuit_breaker.as_ref(),
            circuit_breakers: self.circuit_breakers.as_ref(),
            rate_limiters: &self.rate_limiters,
        }
        .serialize(serializer)
    }
}
