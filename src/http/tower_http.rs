//! tower-http's classifiers as judges.

use super::classify::{Judge, JudgeEnd, Judged, asks_for_body, may_have_body, retry_after};
use crate::permit::{Outcome, Verdict};
use http::{HeaderMap, Request, Response};
use tower_http::classify::{ClassifiedResponse, ClassifyEos, ClassifyResponse, MakeClassifier};

/// A classifier of tower-http as a classifier of a layer: what it calls a failure is one.
///
/// It is asked about heads and ends of streams. Errors, of a call or of a body, are failures without asking it: it knows no other
/// answer. Where there is no body the head is the end, and a `Retry-After` goes to the breaker, as with
/// [`HttpClassifier`](crate::HttpClassifier). Note that tower-http's gRPC classifier takes a stream without a status for a success;
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
    /// And whether the response will have a body.
    type Seen = (M::Classifier, bool);
    type AtEnd = TowerHttpEnd<M::ClassifyEos>;

    fn see<B>(&self, request: &Request<B>) -> Self::Seen {
        (self.0.make_classifier(request), asks_for_body(request.method()))
    }

    fn head<B>(&self, (classifier, has_body): Self::Seen, response: &Response<B>) -> Judged<Self::AtEnd> {
        let end = match classifier.classify_response(response) {
            ClassifiedResponse::Ready(Err(_)) => {
                return Judged::Now(Verdict {
                    retry_after: retry_after(response),
                    ..Outcome::Failure.into()
                });
            }
            ClassifiedResponse::Ready(Ok(())) => TowerHttpEnd(None),
            ClassifiedResponse::RequiresEos(eos) => TowerHttpEnd(Some(eos)),
        };
        if has_body && may_have_body(response.status()) {
            Judged::AtEnd(end)
        } else {
            Judged::Now(end.end(None))
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
