//! What the types forbid. Each example that must not compile stands behind one that does and differs from it in the one thing that
//! is wrong: so it fails for that, and not because a name has changed. The code of the error is checked by a compiler that takes
//! nightly's features: `RUSTC_BOOTSTRAP=1 cargo test --all-features --doc misuse`.

/// A keyed limiter is a policy by its key.
///
/// ```
/// # use portcullis::{GuardLayer, KeyedRateLimiter, TokenBucket};
/// let callers = KeyedRateLimiter::new("api", TokenBucket::new(1, std::time::Duration::from_secs(60)))?;
/// let layer = GuardLayer::new(callers.by(|caller: &u32| Some(*caller)));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail,E0277
/// # use portcullis::{GuardLayer, KeyedRateLimiter, TokenBucket};
/// let callers = KeyedRateLimiter::new("api", TokenBucket::new(1, std::time::Duration::from_secs(60)))?;
/// let layer = GuardLayer::new(callers);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
mod a_layer_takes_no_keyed_limiter_without_a_key {}

/// ```
/// # use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
/// let settings = TokenBucket::new(1, std::time::Duration::from_secs(60));
/// let layer = RateLimitLayer::new(RateLimiter::new("api", settings)?);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail,E0277
/// # use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
/// let settings = TokenBucket::new(1, std::time::Duration::from_secs(60));
/// let layer = RateLimitLayer::new(settings);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
mod a_layer_takes_no_settings {}

/// ```
/// # use portcullis::{CircuitBreaker, GuardLayer};
/// let breaker = |name: &str| CircuitBreaker::builder(name).build();
/// let (a, b, c) = (breaker("a")?, breaker("b")?, breaker("c")?);
/// let layer = GuardLayer::new(((a, b), c));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail,E0277
/// # use portcullis::{CircuitBreaker, GuardLayer};
/// let breaker = |name: &str| CircuitBreaker::builder(name).build();
/// let (a, b, c) = (breaker("a")?, breaker("b")?, breaker("c")?);
/// let layer = GuardLayer::new((a, b, c));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
mod three_policies_are_a_pair_in_a_pair {}

/// ```
/// # use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
/// # use std::time::Duration;
/// let limiter = RateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60)))?;
/// let layer = RateLimitLayer::new(limiter).wait(Duration::from_secs(1));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail,E0599
/// # use portcullis::{CircuitBreaker, CircuitBreakerLayer};
/// # use std::time::Duration;
/// let breaker = CircuitBreaker::builder("api").build()?;
/// let layer = CircuitBreakerLayer::new(breaker).wait(Duration::from_secs(1));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail,E0599
/// # use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
/// # use std::time::Duration;
/// let limiter = RateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60)))?;
/// let layer = RateLimitLayer::new((limiter.clone(), limiter)).wait(Duration::from_secs(1));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
mod neither_a_breaker_nor_a_pair_waits {}

/// ```
/// # use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
/// # use std::time::Duration;
/// # fn is_service<Req, S: tower::Service<Req>>(_: &S) {}
/// # struct NotClone;
/// # impl tower::Service<()> for NotClone {
/// #     type Response = ();
/// #     type Error = std::io::Error;
/// #     type Future = std::future::Ready<Result<(), std::io::Error>>;
/// #     fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), std::io::Error>> { Ok(()).into() }
/// #     fn call(&mut self, (): ()) -> Self::Future { std::future::ready(Ok(())) }
/// # }
/// let limiter = RateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60)))?;
/// let layer = RateLimitLayer::new(limiter);
/// is_service::<(), _>(&tower::Layer::layer(&layer, NotClone));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail,E0277
/// # use portcullis::{RateLimitLayer, RateLimiter, TokenBucket};
/// # use std::time::Duration;
/// # fn is_service<Req, S: tower::Service<Req>>(_: &S) {}
/// # struct NotClone;
/// # impl tower::Service<()> for NotClone {
/// #     type Response = ();
/// #     type Error = std::io::Error;
/// #     type Future = std::future::Ready<Result<(), std::io::Error>>;
/// #     fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), std::io::Error>> { Ok(()).into() }
/// #     fn call(&mut self, (): ()) -> Self::Future { std::future::ready(Ok(())) }
/// # }
/// let limiter = RateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60)))?;
/// let layer = RateLimitLayer::new(limiter).wait(Duration::from_secs(1));
/// is_service::<(), _>(&tower::Layer::layer(&layer, NotClone));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
mod a_layer_that_waits_needs_a_service_that_can_be_cloned {}

/// ```
/// # use portcullis::{KeyedRateLimiter, RateLimitLayer, TokenBucket};
/// # fn is_service<Req, S: tower::Service<Req>>(_: &S) {}
/// let callers = KeyedRateLimiter::new("api", TokenBucket::new(1, std::time::Duration::from_secs(60)))?;
/// let layer = RateLimitLayer::new(callers.by(|caller: &u32| Some(*caller)));
/// let inner = tower::service_fn(async |caller: u32| Ok::<_, std::io::Error>(caller));
/// is_service::<u32, _>(&tower::Layer::layer(&layer, inner));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail,E0631
/// # use portcullis::{KeyedRateLimiter, RateLimitLayer, TokenBucket};
/// # fn is_service<Req, S: tower::Service<Req>>(_: &S) {}
/// let callers = KeyedRateLimiter::new("api", TokenBucket::new(1, std::time::Duration::from_secs(60)))?;
/// let layer = RateLimitLayer::new(callers.by(|caller: &u32| Some(*caller)));
/// let inner = tower::service_fn(async |caller: u64| Ok::<_, std::io::Error>(caller));
/// is_service::<u64, _>(&tower::Layer::layer(&layer, inner));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
mod a_key_is_of_the_request_that_the_service_takes {}

/// ```
/// # use portcullis::{CircuitBreaker, CircuitBreakerLayer, Outcome};
/// # use std::{fmt, io};
/// # fn is_service<Req, S: tower::Service<Req>>(_: &S) {}
/// let judge = |error: &io::Error| Outcome::Failure;
/// let layer = CircuitBreakerLayer::new(CircuitBreaker::builder("api").build()?).classify_error(judge);
/// let inner = tower::service_fn(async |_: ()| Err::<(), _>(io::Error::other("")));
/// is_service::<(), _>(&tower::Layer::layer(&layer, inner));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail,E0631
/// # use portcullis::{CircuitBreaker, CircuitBreakerLayer, Outcome};
/// # use std::{fmt, io};
/// # fn is_service<Req, S: tower::Service<Req>>(_: &S) {}
/// let judge = |error: &io::Error| Outcome::Failure;
/// let layer = CircuitBreakerLayer::new(CircuitBreaker::builder("api").build()?).classify_error(judge);
/// let inner = tower::service_fn(async |_: ()| Err::<(), _>(fmt::Error));
/// is_service::<(), _>(&tower::Layer::layer(&layer, inner));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
mod a_classifier_is_of_the_error_that_the_service_has {}

/// ```
/// # use portcullis::{CircuitBreaker, Outcome};
/// let permit = CircuitBreaker::builder("api").build()?.try_acquire()?;
/// permit.settle(Outcome::Success);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// ```compile_fail,E0382
/// # use portcullis::{CircuitBreaker, Outcome};
/// let permit = CircuitBreaker::builder("api").build()?.try_acquire()?;
/// permit.settle(Outcome::Success);
/// permit.settle(Outcome::Failure);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
mod a_permit_is_settled_once {}

/// The lint that warns here is an error.
///
/// ```
/// #![deny(unused_must_use)]
/// # use portcullis::{CircuitBreaker, Outcome};
/// # let breaker = CircuitBreaker::builder("api").build()?;
/// breaker.try_acquire()?.settle(Outcome::Success);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use portcullis::{CircuitBreaker, Outcome};
/// # let breaker = CircuitBreaker::builder("api").build()?;
/// breaker.try_acquire()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
mod a_breakers_permit_is_not_dropped_unseen {}

/// ```
/// #![deny(unused_must_use)]
/// # use portcullis::{CircuitBreaker, CircuitBreakerLayer};
/// # let layer = CircuitBreakerLayer::new(CircuitBreaker::builder("api").build()?);
/// let layer = layer.fallback_with(async |_: (), _| Ok::<(), std::io::Error>(()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use portcullis::{CircuitBreaker, CircuitBreakerLayer};
/// # let layer = CircuitBreakerLayer::new(CircuitBreaker::builder("api").build()?);
/// layer.fallback_with(async |_: (), _| Ok::<(), std::io::Error>(()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
mod a_layer_is_not_dropped_unseen {}

/// ```
/// #![deny(unused_must_use)]
/// # use portcullis::{RateLimiter, TokenBucket};
/// # let limiter = RateLimiter::new("api", TokenBucket::new(1, std::time::Duration::from_secs(60)))?;
/// let wait = limiter.acquire();
/// let events = limiter.subscribe(8);
/// let builder = RateLimiter::builder("api", limiter.algorithm());
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use portcullis::{RateLimiter, TokenBucket};
/// # let limiter = RateLimiter::new("api", TokenBucket::new(1, std::time::Duration::from_secs(60)))?;
/// limiter.acquire();
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use portcullis::{RateLimiter, TokenBucket};
/// # let limiter = RateLimiter::new("api", TokenBucket::new(1, std::time::Duration::from_secs(60)))?;
/// limiter.subscribe(8);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use portcullis::{RateLimiter, TokenBucket};
/// # let limiter = RateLimiter::new("api", TokenBucket::new(1, std::time::Duration::from_secs(60)))?;
/// RateLimiter::builder("api", limiter.algorithm());
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
mod a_wait_a_subscription_and_a_builder_are_not_dropped_unseen {}

#[cfg_attr(
    feature = "http",
    doc = r#"
```
# use portcullis::{CircuitBreaker, CircuitBreakerLayer};
# fn is_service<Req, S: tower::Service<Req>>(_: &S) {}
let layer = CircuitBreakerLayer::http(CircuitBreaker::builder("api").build()?);
let inner = tower::service_fn(async |_: http::Request<()>| Ok::<_, std::io::Error>(http::Response::new(String::new())));
is_service::<http::Request<()>, _>(&tower::Layer::layer(&layer, inner));
# Ok::<(), portcullis::ConfigError>(())
```
```compile_fail,E0271
# use portcullis::{CircuitBreaker, CircuitBreakerLayer};
# fn is_service<Req, S: tower::Service<Req>>(_: &S) {}
let layer = CircuitBreakerLayer::http(CircuitBreaker::builder("api").build()?);
let inner = tower::service_fn(async |_: http::Request<()>| Ok::<_, std::io::Error>(String::new()));
is_service::<http::Request<()>, _>(&tower::Layer::layer(&layer, inner));
# Ok::<(), portcullis::ConfigError>(())
```
"#
)]
mod what_judges_http_takes_no_other_response {}
