//! Whose request it is: any header fields and networks, beside a slow reading of the same.

use super::input::{bytes, play, rarely, text};
use arbitrary::{Result, Unstructured};
use http::{HeaderName, HeaderValue, Request};
use portcullis::{ClientIp, Forwarded, key::Key};
use std::{
    hash::{DefaultHasher, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// As many as the documentation promises to look at.
const MOST_HOPS: usize = 64;

pub fn run(data: &[u8]) {
    play(data, scenario);
}

fn scenario(input: &mut Unstructured<'_>) -> Result<()> {
    match input.int_in_range(0..=3)? {
        0 => network(input),
        1 => x_forwarded_for(input),
        2 => behind_proxies(input),
        _ => any_lines(input),
    }
}

fn request(peer: IpAddr) -> Request<()> {
    let mut request = Request::new(());
    request.extensions_mut().insert(SocketAddr::new(peer, 4711));
    request
}

fn name(field: Forwarded) -> HeaderName {
    match field {
        Forwarded::Rfc7239 => http::header::FORWARDED,
        _ => HeaderName::from_static("x-forwarded-for"),
    }
}

fn append(request: &mut Request<()>, field: Forwarded, line: &[u8]) -> bool {
    match HeaderValue::from_bytes(line) {
        Ok(value) => {
            request.headers_mut().append(name(field), value);
            true
        }
        Err(_) => false,
    }
}

/// Addresses that meet each other, and any others.
fn address(input: &mut Unstructured<'_>) -> Result<IpAddr> {
    Ok(match input.int_in_range(0..=4)? {
        0 => Ipv4Addr::new(10, 0, 0, input.arbitrary()?).into(),
        1 => Ipv4Addr::from_bits(input.arbitrary()?).into(),
        2 => Ipv4Addr::from_bits(input.arbitrary()?).to_ipv6_mapped().into(),
        3 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, input.arbitrary()?).into(),
        _ => Ipv6Addr::from_bits(input.arbitrary()?).into(),
    })
}

fn plain(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// The bits as text: the slow way to compare the first of them.
fn bits(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("{:032b}", v4.to_bits()),
        IpAddr::V6(v6) => format!("{:0128b}", v6.to_bits()),
    }
}

/// A network of any text is refused, or holds exactly the addresses that begin as it says.
fn network(input: &mut Unstructured<'_>) -> Result<()> {
    let written = if rarely(input)? {
        text(input)?
    } else {
        format!("{}/{}", address(input)?, input.int_in_range(0..=129)?)
    };
    let Ok(client) = ClientIp::new().trust(&written) else {
        return Ok(());
    };
    let (peer, hop) = (address(input)?, IpAddr::from([192, 0, 2, 1]));
    let mut request = request(peer);
    append(&mut request, Forwarded::XForwardedFor, hop.to_string().as_bytes());
    let (base, prefix) = written.split_once('/').unwrap_or((&written, "128"));
    let base: IpAddr = base.parse().expect("it was accepted");
    let prefix: usize = prefix.parse().expect("it was accepted");
    // IPv4 that is written as IPv6 has 96 bits before the address.
    let before = if plain(base) == base { 0 } else { 96 };
    let (base, peer) = (plain(base), plain(peer));
    let first: String = bits(base).chars().take(prefix - before).collect();
    let trusted = base.is_ipv4() == peer.is_ipv4() && bits(peer).starts_with(&first);
    let expected = if trusted { hop } else { peer };
    assert_eq!(client.of(&request), Some(expected), "{peer} of {written}");
    Ok(())
}

fn behind(input: &mut Unstructured<'_>) -> Result<(ClientIp, u8)> {
    let prefix = input.int_in_range(32..=128)?;
    let client = ClientIp::new().trust("10.0.0.0/8").expect("a network");
    let client = client.trust("fd00::/8").expect("a network");
    Ok((client.ipv6_prefix(prefix).expect("in range"), prefix))
}

fn is_trusted(address: IpAddr) -> bool {
    match plain(address) {
        IpAddr::V4(v4) => v4.octets()[0] == 10,
        IpAddr::V6(v6) => v6.octets()[0] == 0xfd,
    }
}

/// `X-Forwarded-For` of any bytes, read from all of it at once.
fn x_forwarded_for(input: &mut Unstructured<'_>) -> Result<()> {
    let (client, prefix) = behind(input)?;
    let peer = address(input)?;
    let mut request = request(peer);
    let mut all: Vec<Vec<u8>> = Vec::new();
    for _ in 0..input.int_in_range(1..=3)? {
        let line = bytes(input)?;
        if append(&mut request, Forwarded::XForwardedFor, &line) {
            all.push(line);
        }
    }
    let all = all.join(&b","[..]);
    let mut hops: Vec<_> = all.split(|byte| *byte == b',').collect();
    hops.reverse();
    let mut expected = plain(peer);
    for hop in hops.into_iter().take(MOST_HOPS) {
        if !is_trusted(expected) {
            break;
        }
        let Some(address) = read_slowly(hop) else { break };
        expected = plain(address);
    }
    let client = client.forwarded(Forwarded::XForwardedFor);
    assert_eq!(client.of(&request), Some(expected));
    check_key(&client, prefix, &request, expected);
    Ok(())
}

/// Every way to write an address: tried one after the other.
fn read_slowly(hop: &[u8]) -> Option<IpAddr> {
    let hop = std::str::from_utf8(hop.trim_ascii()).ok()?;
    if hop.len() > 100 {
        return None;
    }
    let without_zone = |text: &str| text.split('%').next().unwrap_or_default().to_owned();
    let v6 = |text: &str| text.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    let is_port = |text: &str| text.parse::<u16>().is_ok();
    if let Some((inside, port)) = hop.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        let fine = port.is_empty() || port.starts_with(':') && is_port(&port[1..]);
        return if fine { v6(&without_zone(inside)) } else { None };
    }
    if hop.starts_with('[') {
        return None;
    }
    let v4 = match hop.split_once(':') {
        Some((v4, port)) if is_port(port) && !port.starts_with('+') => v4,
        _ => hop,
    };
    v4.parse::<Ipv4Addr>()
        .ok()
        .map(IpAddr::V4)
        .or_else(|| v6(&without_zone(hop)))
}

/// The key is the address, of IPv6 its first bits, and IPv4 in the clothes of a translator is IPv4.
fn check_key(client: &ClientIp, prefix: u8, request: &Request<()>, found: IpAddr) {
    let hashed = |request: &Request<()>| {
        let mut hasher = DefaultHasher::new();
        assert!(client.hash_key(request, &mut hasher), "it has a peer, so it has a key");
        hasher.finish()
    };
    let direct = match found {
        IpAddr::V6(v6) if !matches!(v6.segments(), [0x64, 0xff9b, 0, 0, 0, 0, ..]) => {
            // The last bits, the other way round: the same client, unless it is in another network by that.
            let flipped = if prefix == 128 { 0 } else { u128::MAX >> prefix };
            let other = Ipv6Addr::from_bits(v6.to_bits() ^ flipped);
            if other.to_ipv4_mapped().is_some() || matches!(other.segments(), [0x64, 0xff9b, 0, 0, 0, 0, ..]) {
                found
            } else {
                other.into()
            }
        }
        other => other,
    };
    assert_eq!(
        hashed(request),
        hashed(&super::client_address::request(direct)),
        "one client, one key"
    );
}

/// What trusted proxies have appended decides, whatever stood there before.
fn behind_proxies(input: &mut Unstructured<'_>) -> Result<()> {
    let (client, prefix) = behind(input)?;
    let field = if input.arbitrary()? {
        Forwarded::Rfc7239
    } else {
        Forwarded::XForwardedFor
    };
    let client = client.forwarded(field);
    let forged = bytes(input)?;
    // The first of the trusted proxies writes whom it saw; each further one whom it had for a peer.
    let mut seen = address(input)?;
    if is_trusted(seen) {
        seen = IpAddr::from([203, 0, 113, 7]);
    }
    let mut lines = vec![forged];
    let mut chain = vec![seen];
    for _ in 0..input.int_in_range(0..=4)? {
        chain.push(Ipv4Addr::new(10, 1, 2, input.arbitrary()?).into());
    }
    for hop in &chain {
        let element = element(input, field, *hop)?;
        match lines.last_mut() {
            Some(line) if input.arbitrary()? => {
                line.extend(b", ");
                line.extend(element.into_bytes());
            }
            _ => lines.push(element.into_bytes()),
        }
    }
    let mut request = request(Ipv4Addr::new(10, 9, 9, 9).into());
    for line in &lines {
        // What no header field may hold never arrives.
        let arrives = append(&mut request, field, line);
        if !arrives {
            return Ok(());
        }
    }
    let expected = plain(seen);
    assert_eq!(client.of(&request), Some(expected), "behind {lines:?}");
    check_key(&client, prefix, &request, expected);
    Ok(())
}

/// An element as a proxy writes it that repeats the client's host.
fn element(input: &mut Unstructured<'_>, field: Forwarded, hop: IpAddr) -> Result<String> {
    let with_port: bool = input.arbitrary()?;
    let port: u16 = input.arbitrary()?;
    let bare = match (hop, with_port) {
        (_, true) => SocketAddr::new(hop, port).to_string(),
        (IpAddr::V6(_), false) if field == Forwarded::Rfc7239 => format!("[{hop}]"),
        _ => hop.to_string(),
    };
    if field == Forwarded::XForwardedFor {
        return Ok(bare);
    }
    let node = if bare.contains(':') || input.arbitrary()? {
        format!("\"{bare}\"")
    } else {
        bare
    };
    let name = if input.arbitrary()? { "for" } else { "For" };
    let node = format!("{name}={node}");
    let host: String = text(input)?
        .chars()
        .filter(|char| matches!(char, ' '..='~'))
        .flat_map(|char| ['\\', char].into_iter().skip(usize::from(!matches!(char, '"' | '\\'))))
        .collect();
    Ok(match input.int_in_range(0..=3)? {
        0 => node,
        1 => format!("{node};host=\"{host}\""),
        2 => format!("host=\"{host}\"; {node} ;proto=https"),
        _ => format!("by=_hidden;{node};proto=http;host=\"{host}\""),
    })
}

/// Any lines of either field: an address comes out, and the peer's own unless that is trusted.
fn any_lines(input: &mut Unstructured<'_>) -> Result<()> {
    let (client, prefix) = behind(input)?;
    let field = if input.arbitrary()? {
        Forwarded::Rfc7239
    } else {
        Forwarded::XForwardedFor
    };
    let client = client.forwarded(field);
    let peer = address(input)?;
    let mut request = request(peer);
    for _ in 0..input.int_in_range(0..=3)? {
        append(&mut request, field, &bytes(input)?);
    }
    let found = client.of(&request).expect("there is a peer");
    assert!(
        is_trusted(peer) || found == plain(peer),
        "nobody is believed who is not trusted"
    );
    assert_eq!(found, plain(found), "IPv4 is written as IPv4");
    assert_eq!(
        ClientIp::new().forwarded(field).of(&request),
        Some(plain(peer)),
        "and without networks nobody is"
    );
    check_key(&client, prefix, &request, found);
    Ok(())
}
