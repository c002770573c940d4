use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

/// Counts what a call costs while its answer streams: tokens of a language model, say.
///
/// The service puts one into its response's extensions and counts on with a clone. [`HttpClassifier`](super::HttpClassifier) and
/// [`GrpcClassifier`](super::GrpcClassifier) read it when the stream ends, however it ends, and the limits that charge by
/// [`cost`](crate::RateLimiter::cost) charge or return the difference to what they reserved. A limit that charges each call one
/// counts calls, whatever the meter says; so a pair may limit calls and tokens at once. The difference may take a bucket into
/// debt, by at most one burst.
///
/// Where the caller goes away before anything has been counted, what was reserved stays charged: a service that learns the cost
/// with the last message of a stream is not asked for nothing by callers who leave before it. An answer that its head judges (a
/// 5xx, say) is charged what the meter says by then.
///
/// ```
/// use http::{Request, Response};
/// use portcullis::{CostMeter, RateLimitLayer, RateLimiter, TokenBucket};
/// use std::{convert::Infallible, time::Duration};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let tokens = RateLimiter::new("model", TokenBucket::new(1_000, Duration::from_secs(60)))?;
/// let model = service_fn(async |_: Request<()>| {
///     let meter = CostMeter::new();
///     meter.add(70); // here at once; a streaming body goes on with a clone
///     let mut response = Response::new(String::from("an answer"));
///     response.extensions_mut().insert(meter);
///     Ok::<_, Infallible>(response)
/// });
/// let service = ServiceBuilder::new()
///     .layer(RateLimitLayer::http(tokens.cost(|_: &Request<()>| 500))) // reserves 500
///     .service(model);
/// let answer = service.oneshot(Request::new(())).await?;
/// assert_eq!(tokens.quota().remaining, 500);
/// http_body_util::BodyExt::collect(answer).await?;
/// assert_eq!(tokens.quota().remaining, 930);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default)]
pub struct CostMeter(Arc<AtomicU32>);

impl CostMeter {
    /// A meter at zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts on; stays at the largest number.
    pub fn add(&self, cost: u32) {
        let add = |sum: u32| Some(sum.saturating_add(cost));
        // `Relaxed`: the number orders nothing else, and a sum that saturates is never refused.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Puts another number in place: what a final message says it was in truth.
    pub fn set(&self, cost: u32) {
        self.0.store(cost, Ordering::Relaxed);
    }

    /// The cost as far as it is known.
    #[must_use]
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// The cost, if anything has been counted.
    pub(super) fn counted(&self) -> Option<u32> {
        Some(self.get()).filter(|cost| *cost > 0)
    }
}
