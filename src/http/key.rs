//! Keys out of HTTP requests.

use crate::{error::ConfigError, key::Key};
use http::{HeaderMap, HeaderName, Request, Uri, header, uri::Authority};
use std::{
    any::type_name,
    borrow::Cow,
    fmt,
    hash::{Hash, Hasher},
    marker::PhantomData,
};

/// The value of a header field: an API key, say.
///
/// A request without it, with an empty one or with several different ones has no key: it cannot be told whose it is. The value is
/// hashed as bytes (`[u8]`). Anybody can send any value: as a caller's identity it is worth what was done to check it before
/// this layer.
///
/// ```
/// use http::Request;
/// use portcullis::{KeyedRateLimiter, RateLimitLayer, TokenBucket, key};
/// use std::time::Duration;
///
/// let limiter = KeyedRateLimiter::new("api", TokenBucket::new(100, Duration::from_secs(60)))?;
/// let layer = RateLimitLayer::http(limiter.by(key::header("x-api-key")?));
/// let alice = limiter.fingerprint("alice".as_bytes()); // as a status shows her
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
///
/// # Errors
///
/// A name that no header field can have.
pub fn header(name: &str) -> Result<Header, ConfigError> {
    let parsed = HeaderName::try_from(name);
    parsed.map(Header).map_err(|_| {
        let shown: String = name.chars().take(40).collect();
        ConfigError::new("header", format!("{shown:?}"), "the name of a header field")
    })
}

/// A header field as a key: from [`header()`].
#[derive(Debug, Clone)]
pub struct Header(HeaderName);

impl<B> Key<Request<B>> for Header {
    fn hash_key<H: Hasher>(&self, request: &Request<B>, hasher: &mut H) -> bool {
        match only(request.headers(), &self.0) {
            Some(value) if !value.is_empty() => {
                value.hash(hasher);
                true
            }
            _ => false,
        }
    }
}

/// The value of a header field, if all its lines say the same.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).into_iter();
    let value = values.next()?;
    values.all(|other| other == value).then_some(value.as_bytes())
}

/// What another layer has put into the request's extensions: the tenant that was authenticated, say.
///
/// ```
/// use portcullis::{KeyedRateLimiter, RateLimitLayer, TokenBucket, key};
/// use std::time::Duration;
///
/// #[derive(Clone, Hash)]
/// struct Tenant(u64);
///
/// let limiter = KeyedRateLimiter::new("api", TokenBucket::new(100, Duration::from_secs(60)))?;
/// let layer = RateLimitLayer::http(limiter.by(key::extension::<Tenant>()));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[must_use]
pub fn extension<T: Hash + Send + Sync + 'static>() -> Extension<T> {
    Extension(PhantomData)
}

/// A request's extension as a key: from [`extension`].
pub struct Extension<T>(PhantomData<fn() -> T>);

impl<T> Clone for Extension<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Extension<T> {}
impl<T> fmt::Debug for Extension<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Extension").field(&type_name::<T>()).finish()
    }
}

impl<T: Hash + Send + Sync + 'static, B> Key<Request<B>> for Extension<T> {
    fn hash_key<H: Hasher>(&self, request: &Request<B>, hasher: &mut H) -> bool {
        match request.extensions().get::<T>() {
            Some(value) => {
                value.hash(hasher);
                true
            }
            None => false,
        }
    }
}

/// The host that a client's request goes to: of its URI, or else of its `Host` field. For a breaker for each host.
///
/// `Example.com`, `example.com.`, `example.com:443` over `https` and `example.com` are one host, and the key is its name as text:
/// `example.com`, or `example.com:8080` with a port that is not the scheme's own. A request that names none, or several, has no key.
///
/// ```
/// use portcullis::{CircuitBreakerLayer, KeyedCircuitBreaker, key};
///
/// let breakers = KeyedCircuitBreaker::builder("upstream").build()?;
/// let layer = CircuitBreakerLayer::http(breakers.by(key::host()));
/// breakers.get("example.com").reset(); // the breaker of that host
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[must_use]
pub fn host() -> Host {
    Host(())
}

/// The host as a key: from [`host`].
#[derive(Debug, Clone, Copy)]
pub struct Host(());

impl<B> Key<Request<B>> for Host {
    fn hash_key<H: Hasher>(&self, request: &Request<B>, hasher: &mut H) -> bool {
        let parsed;
        let authority = match request.uri().authority() {
            Some(authority) => authority,
            None => match only(request.headers(), &header::HOST).map(Authority::try_from) {
                Some(Ok(host)) => {
                    parsed = host;
                    &parsed
                }
                _ => return false,
            },
        };
        // The dot says that the name is whole.
        let host = authority.host();
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.is_empty() {
            return false;
        }
        name_of(host, authority, request.uri()).hash(hasher);
        true
    }
}

/// `host`, or `host:port` where the port is not the scheme's own; in lower case. Borrowed where it is written so already.
fn name_of<'a>(host: &'a str, authority: &'a Authority, uri: &Uri) -> Cow<'a, str> {
    let port = authority.port().filter(|port| port.as_u16() != default_port(uri));
    let Some(port) = port else {
        return lower(host);
    };
    // A number has many spellings, `08080`; and a name may have had its dot.
    let plain = port.as_str().starts_with(|first| matches!(first, '1'..='9')) && host == authority.host();
    if !plain {
        return format!("{}:{}", lower(host), port.as_u16()).into();
    }
    let text = authority.as_str();
    lower(text.rsplit_once('@').map_or(text, |(_, host_and_port)| host_and_port))
}

fn lower(text: &str) -> Cow<'_, str> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        text.to_ascii_lowercase().into()
    } else {
        text.into()
    }
}

fn default_port(uri: &Uri) -> u16 {
    match uri.scheme_str() {
        Some("https" | "wss") => 443,
        _ => 80,
    }
}
