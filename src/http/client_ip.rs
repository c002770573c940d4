//! Where a request comes from.

use crate::{
    error::{ConfigError, within},
    key::Key,
};
use http::{HeaderName, Request, header::FORWARDED};
use std::{
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// The client's address as a key: the peer of the connection, or what a trusted proxy says it is.
///
/// Header fields with addresses are what anybody may write. So they are believed only from peers in
/// [trusted](Self::trust) networks, and only as far as these can know: from the right, the hops that are trusted are
/// passed by, and the first other one is the client. What stands further left was written by the client. If all hops are trusted it is the
/// left-most; an entry that is no address ends the walk at the last hop that was one. At most 64 hops are looked at.
///
/// The peer's address is found in the request's extensions: axum's `ConnectInfo<SocketAddr>` (feature `axum`, and
/// `into_make_service_with_connect_info`), tonic's `TcpConnectInfo` (feature `tonic`, not behind TLS), or a [`SocketAddr`] or [`IpAddr`] that
/// you have put there. Without one a request has no key.
///
/// IPv4 addresses count whole, also if written as IPv6 (mapped, or by a translator as `64:ff9b::/96`); of IPv6 addresses the first
/// 64 bits, see [`ipv6_prefix`](Self::ipv6_prefix): a client has that many addresses to choose from. The key is that [`IpAddr`],
/// the other bits zero: what [`fingerprint`](crate::KeyedRateLimiter::fingerprint) takes to find a client in a status.
///
/// ```
/// use http::Request;
/// use portcullis::{ClientIp, Forwarded};
/// use std::net::{IpAddr, SocketAddr};
///
/// let client = ClientIp::new().trust("10.0.0.0/8")?.forwarded(Forwarded::XForwardedFor);
/// let mut request = Request::get("/")
///     .header("x-forwarded-for", "1.1.1.1, 203.0.113.7, 10.0.0.2") // the first is the client's own invention
///     .body(())?;
/// request.extensions_mut().insert(SocketAddr::from(([10, 0, 0, 1], 4711)));
/// assert_eq!(client.of(&request), Some(IpAddr::from([203, 0, 113, 7])));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientIp {
    trusted: Vec<Network>,
    forwarded: Forwarded,
    ipv6_prefix: u8,
}

/// Which header field trusted proxies write the chain of addresses into.
///
/// ```
/// # use portcullis::{ClientIp, Forwarded};
/// let client = ClientIp::new().trust("192.0.2.1")?.forwarded(Forwarded::Rfc7239);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Forwarded {
    /// `X-Forwarded-For: client, proxy`.
    #[default]
    XForwardedFor,
    /// `Forwarded: for=client, for=proxy` (RFC 7239).
    Rfc7239,
}

/// The addresses that begin with these bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    fn parse(text: &str) -> Result<Self, ConfigError> {
        let refused = || {
            let shown: String = text.chars().take(60).collect();
            ConfigError::new(
                "trust",
                format!("{shown:?}"),
                "an address or a network like 10.0.0.0/8 or fd00::/8",
            )
        };
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| refused())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => bits,
            Some(prefix) if prefix.bytes().all(|byte| byte.is_ascii_digit()) => {
                prefix.parse().map_err(|_| refused())?
            }
            Some(_) => return Err(refused()),
        };
        if prefix > bits {
            return Err(refused());
        }
        // A network of mapped addresses is one of IPv4 addresses, as these are folded before they are compared.
        let folded = fold(address);
        match (address.is_ipv6() && folded.is_ipv4(), prefix) {
            (false, prefix) => Ok(Self { address, prefix }),
            (true, 96..) => Ok(Self {
                address: folded,
                prefix: prefix - 96,
            }),
            (true, _) => Err(refused()),
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                (network.to_bits() ^ address.to_bits()) & mask == 0
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                first_bits(network, self.prefix) == first_bits(address, self.prefix)
            }
            _ => false,
        }
    }
}

fn first_bits(address: Ipv6Addr, bits: u8) -> u128 {
    let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
    address.to_bits() & mask
}

/// An IPv4 address that is written as an IPv6 one is the IPv4 address.
fn fold(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    }
}

/// The IPv4 address that a translator has written as one of its well-known network, `64:ff9b::/96` (RFC 6052). It is the client's
/// key, but not trusted for it: a network of IPv4 proxies is one of those who are reached by IPv4.
fn translated(address: Ipv6Addr) -> Option<Ipv4Addr> {
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))),
        _ => None,
    }
}

/// A chain has a hop for each proxy; more than these only an attacker writes.
const MOST_HOPS: usize = 64;

impl Default for ClientIp {
    fn default() -> Self {
        Self::new()
    }
}

impl ClientIp {
    /// The peer of the connection; no proxy is trusted.
    #[must_use]
    pub fn new() -> Self {
        Self {
            trusted: Vec::new(),
            forwarded: Forwarded::default(),
            ipv6_prefix: 64,
        }
    }

    /// Trusts the proxies of a network: `10.0.0.0/8`, `fd00::/8`, or one address. May be called for several.
    ///
    /// # Errors
    ///
    /// What is no network.
    pub fn trust(mut self, network: &str) -> Result<Self, ConfigError> {
        self.trusted.push(Network::parse(network)?);
        Ok(self)
    }

    /// Which header field the trusted proxies write. Default: [`Forwarded::XForwardedFor`]. It must be one that they do write: one
    /// that they pass on unchanged is the client's.
    #[must_use]
    pub fn forwarded(mut self, field: Forwarded) -> Self {
        self.forwarded = field;
        self
    }

    /// How many bits of an IPv6 address tell clients apart, 32 to 128. Default: 64.
    ///
    /// # Errors
    ///
    /// A number outside this range.
    pub fn ipv6_prefix(mut self, bits: u8) -> Result<Self, ConfigError> {
        self.ipv6_prefix = within("ipv6_prefix", bits, &(32..=128))?;
        Ok(self)
    }

    /// The client's address, whole: for a log. `None` if the peer's address is not known.
    #[must_use]
    pub fn of<B>(&self, request: &Request<B>) -> Option<IpAddr> {
        let peer = fold(peer(request)?);
        if !self.trusts(peer) {
            return Some(peer);
        }
        let mut client = peer;
        for hop in self.hops(request).take(MOST_HOPS) {
            let Some(address) = hop else {
                break;
            };
            client = fold(address);
            if !self.trusts(client) {
                break;
            }
        }
        Some(client)
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.contains(address))
    }

    /// The hops that proxies have written, the latest first: `None` for one that is no address. Lines are one list, in order.
    fn hops<'a, B>(&self, request: &'a Request<B>) -> impl Iterator<Item = Option<IpAddr>> + use<'a, B> {
        const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
        let forwarded = self.forwarded;
        let name = match forwarded {
            Forwarded::XForwardedFor => X_FORWARDED_FOR,
            Forwarded::Rfc7239 => FORWARDED,
        };
        let parse = move |hop: &[u8]| match forwarded {
            Forwarded::XForwardedFor => address(hop),
            Forwarded::Rfc7239 => forwarded_for(hop),
        };
        let lines = request.headers().get_all(name).into_iter().rev();
        lines
            .flat_map(move |line| from_the_right(line.as_bytes(), forwarded))
            .map(parse)
    }
}

/// The elements of a list, the last first.
fn from_the_right(line: &[u8], forwarded: Forwarded) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(line);
    std::iter::from_fn(move || {
        let line = rest?;
        let comma = last_comma(line, forwarded);
        rest = comma.map(|at| &line[..at]);
        Some(line[comma.map_or(0, |at| at + 1)..].trim_ascii())
    })
}

/// Where the last element of a list begins.
///
/// A host, which the client chooses and a proxy repeats in quotes, may have commas: they separate nothing. Read from the right,
/// what is a string depends only on what the proxies wrote behind it: a quotation mark that the client leaves open swallows
/// nothing of it.
fn last_comma(line: &[u8], forwarded: Forwarded) -> Option<usize> {
    let mut inside = false;
    line.iter().enumerate().rposition(|(at, byte)| match byte {
        b'"' if forwarded == Forwarded::Rfc7239 => {
            inside = !inside || is_escaped(line, at);
            false
        }
        byte => *byte == b',' && !inside,
    })
}

fn is_escaped(text: &[u8], at: usize) -> bool {
    let backslashes = text[..at].iter().rev().take_while(|byte| **byte == b'\\');
    backslashes.count() % 2 == 1
}

/// An address, with a port or a zone perhaps: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]:80`, `fe80::1%eth0`.
fn address(text: &[u8]) -> Option<IpAddr> {
    // The longest there is: an IPv6 address in brackets with a zone and a port.
    const LONGEST: usize = 100;
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= LONGEST)?;
    if let Some(rest) = text.strip_prefix('[') {
        let (inside, port) = rest.split_once(']')?;
        let valid = port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok());
        return if valid { v6(inside) } else { None };
    }
    if let Ok(v4) = text.parse::<Ipv4Addr>() {
        return Some(v4.into());
    }
    match text.parse::<SocketAddr>() {
        Ok(address) => Some(address.ip()),
        Err(_) => v6(text),
    }
}

fn v6(text: &str) -> Option<IpAddr> {
    let address = text.split_once('%').map_or(text, |(address, _)| address);
    address.parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}

/// The `for` of an element of `Forwarded`. An obfuscated or unknown one is no address, nor is one of an element that is not as
/// RFC 7239 has it.
fn forwarded_for(element: &[u8]) -> Option<IpAddr> {
    let (mut found, mut pairs) = (None, element);
    loop {
        pairs = match pairs.trim_ascii_start() {
            [] => return found,
            [b';', others @ ..] => others,
            pairs => {
                let at = pairs.iter().position(|byte| matches!(byte, b'=' | b';'))?;
                let (name, value) = (pairs[..at].trim_ascii(), pairs[at..].strip_prefix(b"=")?);
                let (value, others) = first_value(value.trim_ascii_start())?;
                if name.eq_ignore_ascii_case(b"for") {
                    if found.is_some() {
                        return None;
                    }
                    found = Some(address(without_hidden_port(value))?);
                }
                others
            }
        }
    }
}

/// A value, without the quotes that it may have, and what follows it: nothing or a semicolon.
fn first_value(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let (value, others) = if let Some(text) = text.strip_prefix(b"\"") {
        let end = |(at, byte): (usize, &u8)| *byte == b'"' && !is_escaped(text, at);
        let end = text.iter().enumerate().position(end)?;
        (&text[..end], text[end + 1..].trim_ascii_start())
    } else {
        let end = text.iter().position(|byte| matches!(byte, b';' | b'"'));
        text.split_at(end.unwrap_or(text.len()))
    };
    matches!(others, [] | [b';', ..]).then(|| (value.trim_ascii_end(), others))
}

/// `192.0.2.1:_port` has one that says nothing.
fn without_hidden_port(node: &[u8]) -> &[u8] {
    match node.iter().rposition(|byte| *byte == b':') {
        Some(at) if node[at + 1..].starts_with(b"_") => &node[..at],
        _ => node,
    }
}

fn peer<B>(request: &Request<B>) -> Option<IpAddr> {
    let extensions = request.extensions();
    #[cfg(feature = "axum")]
    if let Some(axum::extract::ConnectInfo(peer)) = extensions.get::<axum::extract::ConnectInfo<SocketAddr>>() {
        return Some(peer.ip());
    }
    #[cfg(feature = "tonic")]
    if let Some(peer) = super::tonic::peer(extensions) {
        return Some(peer.ip());
    }
    let socket = extensions.get::<SocketAddr>().map(SocketAddr::ip);
    socket.or_else(|| extensions.get::<IpAddr>().copied())
}

impl<B> Key<Request<B>> for ClientIp {
    fn hash_key<H: Hasher>(&self, request: &Request<B>, hasher: &mut H) -> bool {
        let Some(client) = self.of(request) else {
            return false;
        };
        let key = match client {
            IpAddr::V4(_) => client,
            IpAddr::V6(address) => match translated(address) {
                Some(address) => IpAddr::V4(address),
                None => IpAddr::V6(first_bits(address, self.ipv6_prefix).into()),
            },
        };
        key.hash(hasher);
        true
    }
}
