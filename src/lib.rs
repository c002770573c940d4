// The examples of the README show the admin service as well.
#![cfg_attr(feature = "http", doc = include_str!("../README.md"))]
#![cfg_attr(not(feature = "http"), doc = "Circuit breakers and rate limiters as tower layers.")]
#![cfg_attr(docsrs, feature(doc_cfg))]

// In the order in which a request meets them; each imports only from those below it.
mod guard;

pub mod classify;
pub mod key;
pub mod policy;
pub mod reject;
#[cfg(feature = "retry")]
#[cfg_attr(docsrs, doc(cfg(feature = "retry")))]
pub mod retry;

#[cfg(feature = "http")]
mod http;
mod metrics;
mod registry;
mod status;

mod breaker;
mod limit;

#[cfg(feature = "tonic")]
mod lazy_status;
mod permit;
mod rejected;
mod shards;

mod clock;
mod error;
mod event;
mod fingerprint;
mod name;
mod numbers;
mod quota;
mod state;
mod stripe;
mod subscribe;
mod sync;

#[cfg(doctest)]
mod misuse;

#[doc(inline)]
pub use crate::{
    breaker::{
        Backoff, CircuitBreaker, CircuitBreakerBuilder, CircuitBreakerConfig, CircuitBreakerMetrics,
        CircuitBreakerPermit, CircuitBreakerStatus, KeyedCircuitBreaker, KeyedCircuitBreakerBuilder,
        KeyedCircuitBreakerStatus, RejectedByCircuit, Window, WindowStatus,
    },
    classify::ErrorsAreFailures,
    clock::{Clock, ManualClock, Timestamp},
    error::ConfigError,
    event::{Event, EventKind, ListenerId},
    guard::{CircuitBreakerLayer, Guard, GuardLayer, RateLimitLayer, ResponseFuture},
    limit::{
        Acquire, Adaptive, Algorithm, KeyStatus, KeyedPermit, KeyedRateLimiter, KeyedRateLimiterBuilder, KeysStatus,
        RateLimitPermit, RateLimiter, RateLimiterBuilder, RateLimiterStatus, RejectedByLimit, SlidingWindow,
        TokenBucket,
    },
    metrics::MetricsFormat,
    name::Name,
    permit::{Outcome, Verdict},
    quota::Quota,
    registry::{Registrable, Registry, RegistryError},
    reject::AsError,
    rejected::{BoxError, Error, Reason, Rejected},
    state::{Override, State, StateTransitions},
    status::{RegistryStatus, ServiceStatus},
    subscribe::Events,
};

#[cfg(feature = "tower-http")]
#[doc(inline)]
pub use crate::http::TowerHttpClassifier;
#[cfg(feature = "http")]
#[doc(inline)]
pub use crate::http::{
    Admin, AdminFuture, AnswerBody, AsResponse, ClientIp, CostMeter, Forwarded, GrpcClassifier, GuardedBody,
    HttpClassifier, PerRoute, PerRouteBuilder, RateLimitHeaders,
};
