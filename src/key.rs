//! What a keyed limiter or breaker tells callers apart by.
//!
//! Any closure `Fn(&Request) -> Option<K>` over a hashable `K` is a [`Key`]; a pair of keys is one, of which both must be there.
//!
//! Whoever can choose his key can choose another one for each request, or that of somebody else: what this costs, and whom, says the
//! [README](crate#under-attack).
#![cfg_attr(
    feature = "http",
    doc = "
Over HTTP:

| key | tells apart | mind |
|---|---|---|
| [`header`] | API keys | whoever may send any value may take any key: check it before |
| [`extension`] | what another layer has put there: the user that was authenticated | that layer must be outside this one |
| [`ClientIp`](crate::ClientIp) | client addresses | many may share one, and one may have many |
| [`host`] | where a client's requests go | for breakers |
"
)]

#[cfg(feature = "http")]
pub use crate::http::key::{Extension, Header, Host, extension, header, host};

use std::hash::{Hash, Hasher};

/// Finds the key in a request. Of the key only a hash is kept, so it is written into a hasher and never copied.
///
/// What a closure returns cannot borrow from the request (the compiler says that a lifetime may not live long enough): it returns a
/// number or a copy, or a type of your own implements this and writes what it finds.
///
/// ```
/// use portcullis::key::Key;
/// use std::hash::{DefaultHasher, Hasher};
///
/// struct Order { customer: Option<u64> }
/// let by_customer = |order: &Order| order.customer;
/// assert!(by_customer.hash_key(&Order { customer: Some(7) }, &mut DefaultHasher::new()));
/// assert!(!by_customer.hash_key(&Order { customer: None }, &mut DefaultHasher::new()), "there is no key");
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` finds no key in `{Req}`",
    note = "a key is a closure `|request: &{Req}| -> Option<K>` over a hashable `K`, a pair of keys, or, of an `http::Request`, one of the module `portcullis::key`"
)]
pub trait Key<Req> {
    /// Writes the key into the hasher; `false` if the request has none.
    fn hash_key<H: Hasher>(&self, request: &Req, hasher: &mut H) -> bool;
}

impl<F, Req, K> Key<Req> for F
where
    F: Fn(&Req) -> Option<K>,
    K: Hash,
{
    #[inline]
    fn hash_key<H: Hasher>(&self, request: &Req, hasher: &mut H) -> bool {
        match self(request) {
            Some(key) => {
                key.hash(hasher);
                true
            }
            None => false,
        }
    }
}

impl<Req, A: Key<Req>, B: Key<Req>> Key<Req> for (A, B) {
    #[inline]
    fn hash_key<H: Hasher>(&self, request: &Req, hasher: &mut H) -> bool {
        self.0.hash_key(request, hasher) && self.1.hash_key(request, hasher)
    }
}
