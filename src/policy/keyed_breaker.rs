//! A circuit breaker for each key.

use super::{Admit, Gate, Keyed, Missing, Never, Policy, Readiness, Reading};
use crate::{
    breaker::{CircuitBreakerPermit, KeyedCircuitBreaker},
    key::Key,
    rejected::Rejected,
};
use std::task::Context;

impl KeyedCircuitBreaker {
    /// The breakers as a policy: each request meets the breaker of its key, which the extractor finds.
    ///
    /// The breaker is known only when the request is: such a layer cannot keep a probe's slot in `poll_ready`, and it asks the
    /// inner service to be ready before it rejects.
    ///
    /// ```
    /// use portcullis::{CircuitBreakerLayer, KeyedCircuitBreaker};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[derive(Clone)]
    /// struct Order { shop: u32 }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
    /// let shops = KeyedCircuitBreaker::builder("shops").build()?;
    /// let service = ServiceBuilder::new()
    ///     .layer(CircuitBreakerLayer::new(shops.by(|order: &Order| Some(order.shop))))
    ///     .service(service_fn(async |order: Order| Ok::<_, std::io::Error>(order.shop)));
    /// shops.get(&7_u32).force_open();
    /// assert!(service.clone().oneshot(Order { shop: 7 }).await.is_err());
    /// assert_eq!(service.oneshot(Order { shop: 8 }).await?, 8);
    /// # Ok(()) }
    /// ```
    pub fn by<X>(&self, key: X) -> Keyed<Self, X> {
        Keyed {
            set: self.clone(),
            key,
            missing: Missing::default(),
        }
    }
}

/// Whose breaker a request meets.
enum Whose {
    Key(u64),
    /// The request is admitted without one.
    Nobodys,
    Rejected(Rejected),
}

impl<X> Keyed<KeyedCircuitBreaker, X> {
    fn whose<Req>(&self, request: &Req) -> Whose
    where
        X: Key<Req>,
    {
        let found = self.set.fingerprint_with(|hasher| self.key.hash_key(request, hasher));
        match (found, self.missing) {
            (Some(fingerprint), _) => Whose::Key(fingerprint),
            (None, Missing::Shared) => Whose::Key(self.set.keyless()),
            (None, Missing::Exempt) => Whose::Nobodys,
            (None, Missing::Reject) => Whose::Rejected(self.set.missing_key()),
        }
    }
}

impl<X> Gate for Keyed<KeyedCircuitBreaker, X> {
    type Reserved = ();

    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }
}

impl<X: Key<Req>, Req> Policy<Req> for Keyed<KeyedCircuitBreaker, X> {
    type Permit = Option<CircuitBreakerPermit>;
    type Wait = Never<Self::Permit>;

    fn refusal(&self, (): &(), request: &Req, now: &Reading) -> Option<Rejected> {
        match self.whose(request) {
            Whose::Key(fingerprint) => self.set.get_by_fingerprint(fingerprint)?.peek(now),
            Whose::Nobodys => None,
            Whose::Rejected(why) => Some(why),
        }
    }

    fn refuse(&self, (): &(), request: &Req, now: &Reading) -> Option<Rejected> {
        match self.whose(request) {
            Whose::Key(fingerprint) => {
                let breaker = self.set.get_by_fingerprint(fingerprint)?;
                let why = breaker.peek(now)?;
                breaker.count(&why, now);
                Some(why)
            }
            Whose::Nobodys => None,
            Whose::Rejected(why) => {
                self.set.count_missing(&why, now);
                Some(why)
            }
        }
    }

    fn admit(&self, (): (), request: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        match self.whose(request) {
            Whose::Key(fingerprint) => self.set.breaker(fingerprint).acquire_at(now).map(Some).into(),
            Whose::Nobodys => Admit::Now(None),
            Whose::Rejected(why) => {
                self.set.count_missing(&why, now);
                Admit::Rejected(why)
            }
        }
    }
}
