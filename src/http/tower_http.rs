//! tower-http's classifiers as judges.

use super::classify::{Judge, JudgeEnd, Judged};
use crate::permit::{Outcome, Verdict};
use http::{HeaderMap, Request, Response};
use tower_http::classify::{ClassifiedResponse, ClassifyEos, ClassifyResponse, MakeClassifier};

/// A classifier of tower-http as a classifier of a layer: what it calls a failure is one.
///
/// It is asked about heads and ends of streams. Errors, of a call or of a body, are failures without asking it: it knows no other
/// answer. Note that tower-http's gRPC classifier takes a stream without a status for a success;
/// [`GrpcClassifier`](crate::GrpcClassifier) does not.
///
/// ```
/// use portcullis::{CircuitBreaker, CircuitBreakerLayer, TowerHttpClassifier};
/// use tower_http::classify::{SharedClassifier, StatusInRangeAsFailures};
///
/// let breaker = CircuitBreaker::builder("search").build()?;
/// let failures = SharedClassifier::new(StatusInRangeAsFailures::new(400..=599));
/// let layer = CircuitBreakerLayer::http(breaker).classify_with(TowerHttpClassifier::new(failures));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct TowerHttpClassifier<M>(M);

impl<M> TowerHttpClassifier<M> {
    /// Asks the classifiers that this makes: a [`SharedClassifier`](tower_http::classify::SharedClassifier), say.
    #[must_use]
    pub fn new(make: M) -> Self {
        Self(make)
    }
}

impl<M: MakeClassifier + Clone> Judge for TowerHttpClassifier<M> {
    type Seen = M::Classifier;
    type AtEnd = TowerHttpEnd<M::ClassifyEos>;

    fn see<B>(&self, request: &Request<B>) -> M::Classifier {
        self.0.make_classifier(request)
    }

    fn head<B>(&self, classifier: M::Classifier, response: &Response<B>) -> Judged<Self::AtEnd> {
        match classifier.classify_response(response) {
            ClassifiedResponse::Ready(Err(_)) => Judged::Now(Outcome::Failure.into()),
            ClassifiedResponse::Ready(Ok(())) => Judged::AtEnd(TowerHttpEnd(None)),
            ClassifiedResponse::RequiresEos(eos) => Judged::AtEnd(TowerHttpEnd(Some(eos))),
        }
    }
}

/// The end of a stream: see [`TowerHttpClassifier`].
#[derive(Debug, Clone, Copy)]
pub struct TowerHttpEnd<E>(Option<E>);

impl<E: ClassifyEos> JudgeEnd for TowerHttpEnd<E> {
    fn end(self, trailers: Option<&HeaderMap>) -> Verdict {
        match self.0.map(|eos| eos.classify_eos(trailers)) {
            Some(Err(_)) => Outcome::Failure.into(),
            Some(Ok(())) | None => Outcome::Success.into(),
        }
    }
}
