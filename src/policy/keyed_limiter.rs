//! A rate limiter for each key.

use super::{Admit, Cost, Gate, Keyed, Limiter, Missing, Never, Policy, Readiness, Reading};
use crate::{
    key::Key,
    limit::{KeyedPermit, KeyedRateLimiter},
    rejected::Rejected,
};
use std::task::Context;

impl KeyedRateLimiter {
    /// The limiters as a policy: each request meets the quota of its key, which the extractor finds. See [`key`](crate::key).
    ///
    /// ```
    /// use portcullis::{KeyedRateLimiter, RateLimitLayer, TokenBucket, policy::Missing};
    /// use std::time::Duration;
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[derive(Clone)]
    /// struct Order { customer: Option<u32> }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), portcullis::BoxError> {
    /// let customers = KeyedRateLimiter::new("shop", TokenBucket::new(1, Duration::from_secs(60)))?;
    /// let per_customer = customers.by(|order: &Order| order.customer).missing(Missing::Exempt);
    /// let service = ServiceBuilder::new()
    ///     .layer(RateLimitLayer::new(per_customer))
    ///     .service(service_fn(async |_: Order| Ok::<_, std::io::Error>(())));
    /// service.clone().oneshot(Order { customer: Some(7) }).await?;
    /// assert!(service.clone().oneshot(Order { customer: Some(7) }).await.is_err());
    /// service.clone().oneshot(Order { customer: Some(8) }).await?;
    /// service.oneshot(Order { customer: None }).await?;
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

/// Whose quota a request meets.
enum Whose {
    Key(u64),
    /// The request is admitted without one.
    Nobodys,
    Rejected(Rejected),
}

impl<X> Keyed<KeyedRateLimiter, X> {
    /// These limiters as a policy that charges for each request what `cost` says, in place of one: see
    /// [`RateLimiter::cost`](crate::RateLimiter::cost).
    ///
    /// ```
    /// use portcullis::{KeyedRateLimiter, RateLimitLayer, TokenBucket};
    /// use std::time::Duration;
    ///
    /// # #[derive(Clone)]
    /// struct Order { customer: u32, items: u32 }
    ///
    /// let customers = KeyedRateLimiter::new("shop", TokenBucket::new(100, Duration::from_secs(60)))?;
    /// let items = customers.by(|order: &Order| Some(order.customer)).cost(|order: &Order| order.items);
    /// let layer = RateLimitLayer::new(items);
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    pub fn cost<F, Req>(self, cost: F) -> Cost<Self, F>
    where
        F: Fn(&Req) -> u32,
    {
        Cost::new(self, cost)
    }

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

    /// Refuses and counts.
    fn refuse_cost<Req>(&self, cost: u32, request: &Req, now: &Reading) -> Option<Rejected>
    where
        X: Key<Req>,
    {
        match self.whose(request) {
            Whose::Key(key) => {
                let why = self.set.refuse(key, cost, now)?;
                if key == self.set.keyless() {
                    self.set.count_keyless();
                }
                Some(why)
            }
            Whose::Nobodys => None,
            Whose::Rejected(why) => {
                self.set.count(None, &why, now);
                Some(why)
            }
        }
    }
}

impl<X> Gate for Keyed<KeyedRateLimiter, X> {
    type Reserved = ();

    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }
}

impl<X: Key<Req>, Req> Limiter<Req> for Keyed<KeyedRateLimiter, X> {
    type Permit = Option<KeyedPermit>;

    fn refusal_of(&self, cost: u32, request: &Req, now: &Reading) -> Option<Rejected> {
        match self.whose(request) {
            Whose::Key(key) => self.set.peek(key, cost, now),
            Whose::Nobodys => None,
            Whose::Rejected(why) => Some(why),
        }
    }

    fn refuse_of(&self, cost: u32, request: &Req, now: &Reading) -> Option<Rejected> {
        self.refuse_cost(cost, request, now)
    }

    fn admit_of(&self, cost: u32, request: &Req, now: &Reading) -> Result<Self::Permit, Rejected> {
        let whose = self.whose(request);
        match whose {
            Whose::Key(key) => {
                if key == self.set.keyless() {
                    self.set.count_keyless();
                }
                let permit = self.set.acquire_at(key, cost, now)?;
                Ok(Some(permit.estimated()))
            }
            Whose::Nobodys => {
                self.set.count_keyless();
                Ok(None)
            }
            Whose::Rejected(why) => {
                self.set.count(None, &why, now);
                Err(why)
            }
        }
    }
}

impl<X: Key<Req>, Req> Policy<Req> for Keyed<KeyedRateLimiter, X> {
    type Permit = Option<KeyedPermit>;
    type Wait = Never<Self::Permit>;

    fn refusal(&self, (): &(), request: &Req, now: &Reading) -> Option<Rejected> {
        self.refusal_of(1, request, now)
    }

    fn refuse(&self, (): &(), request: &Req, now: &Reading) -> Option<Rejected> {
        self.refuse_cost(1, request, now)
    }

    #[inline]
    fn glance(&self, (): &(), request: &Req, now: &Reading) -> Option<Self::Permit> {
        let found = self.set.fingerprint_with(|hasher| self.key.hash_key(request, hasher));
        let fingerprint = found.filter(|found| *found != self.set.keyless())?;
        self.set.glance(fingerprint, now).map(Some)
    }

    fn admit(&self, (): (), request: &Req, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        self.admit_of(1, request, now)
            .map(|permit| permit.map(KeyedPermit::counting))
            .into()
    }
}
