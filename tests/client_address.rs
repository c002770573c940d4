//! Whose request it is: by the connection, by what trusted proxies say, by header fields and extensions.
#![cfg(feature = "http")]

use http::{HeaderValue, Request};
use portcullis::{
    ClientIp, Forwarded, KeyedCircuitBreaker, KeyedRateLimiter, TokenBucket,
    key::{self, Key},
};
use proptest::prelude::*;
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn request(peer: &str, lines: &[(&'static str, &str)]) -> Request<()> {
    let mut request = Request::new(());
    request.extensions_mut().insert(SocketAddr::new(ip(peer), 4711));
    for (name, value) in lines {
        request
            .headers_mut()
            .append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    request
}

fn hashed<R>(key: &impl Key<R>, request: &R) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    key.hash_key(request, &mut hasher).then(|| hasher.finish())
}

/// A request's key as a value.
struct Of<'a, K, R>(&'a K, &'a R);

impl<K: Key<R>, R> Hash for Of<'_, K, R> {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        assert!(self.0.hash_key(self.1, hasher), "the request has a key");
    }
}

fn behind_proxies() -> ClientIp {
    ClientIp::new().trust("10.0.0.0/8").unwrap().trust("fd00::/8").unwrap()
}

#[test]
fn without_trusted_proxies_the_peer_is_the_client_whatever_it_says() {
    let client = ClientIp::new();
    for field in [Forwarded::XForwardedFor, Forwarded::Rfc7239] {
        let client = client.clone().forwarded(field);
        let lines = [("x-forwarded-for", "1.2.3.4"), ("forwarded", "for=1.2.3.4")];
        assert_eq!(client.of(&request("203.0.113.7", &lines)), Some(ip("203.0.113.7")));
    }
    assert_eq!(client.of(&Request::new(())), None, "nobody knows");
    assert_eq!(hashed(&client, &Request::new(())), None);
}

#[test]
fn the_right_most_hop_that_is_not_trusted_is_the_client() {
    const TABLE: [(&str, &[&str], &str); 22] = [
        ("10.0.0.1", &["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", &["1.1.1.1, 203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", &["1.1.1.1, 203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        ("10.0.0.1", &["1.1.1.1", "203.0.113.7", "10.0.0.2"], "203.0.113.7"),
        ("10.0.0.1", &["1.1.1.1,203.0.113.7 ,\t10.0.0.2"], "203.0.113.7"),
        ("203.0.113.9", &["1.1.1.1"], "203.0.113.9"),
        ("10.0.0.1", &[], "10.0.0.1"),
        ("10.0.0.1", &[""], "10.0.0.1"),
        ("10.0.0.1", &["1.1.1.1, "], "10.0.0.1"),
        ("10.0.0.1", &["1.1.1.1,, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", &["1.1.1.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", &["1.1.1.1, nonsense, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", &["10.0.0.4, 10.0.0.3, 10.0.0.2"], "10.0.0.4"),
        ("10.0.0.1", &["203.0.113.7:8080"], "203.0.113.7"),
        ("10.0.0.1", &["2001:db8::7"], "2001:db8::7"),
        ("10.0.0.1", &["[2001:db8::7]:443"], "2001:db8::7"),
        ("10.0.0.1", &["[2001:db8::7]"], "2001:db8::7"),
        ("10.0.0.1", &["[2001:db8::7]:x"], "10.0.0.1"),
        ("10.0.0.1", &["fe80::1%eth0"], "fe80::1"),
        ("10.0.0.1", &["::ffff:203.0.113.7"], "203.0.113.7"),
        ("::ffff:10.0.0.1", &["203.0.113.7, ::ffff:10.0.0.2"], "203.0.113.7"),
        ("fd00::1", &["203.0.113.7, fd12::2"], "203.0.113.7"),
    ];
    for (peer, lines, client) in TABLE {
        let lines: Vec<_> = lines.iter().map(|line| ("x-forwarded-for", *line)).collect();
        assert_eq!(
            behind_proxies().of(&request(peer, &lines)),
            Some(ip(client)),
            "{peer} {lines:?}"
        );
    }
}

#[test]
fn rfc_7239_is_read_as_it_is_written() {
    const TABLE: [(&[&str], &str); 33] = [
        (&["for=203.0.113.7"], "203.0.113.7"),
        (&["For=\"203.0.113.7:80\";proto=https;by=10.0.0.1"], "203.0.113.7"),
        (&["proto=https; for = \"[2001:db8::7]:4711\""], "2001:db8::7"),
        (&["for=1.1.1.1, for=203.0.113.7, for=10.0.0.2"], "203.0.113.7"),
        (&["for=1.1.1.1", "for=203.0.113.7;by=10.0.0.3"], "203.0.113.7"),
        (&["for=1.1.1.1, for=unknown"], "10.0.0.1"),
        (&["for=1.1.1.1, for=_hidden"], "10.0.0.1"),
        (&["for=1.1.1.1, proto=https"], "10.0.0.1"),
        (&["for=1.1.1.1, for=2.2.2.2;for=3.3.3.3"], "10.0.0.1"),
        (&["for=1.1.1.1, for"], "10.0.0.1"),
        (&["for=1.1.1.1, 203.0.113.7"], "10.0.0.1"),
        (&["for=1.1.1.1, for=\"203.0.113.7"], "10.0.0.1"),
        (&["for=\"1.1.1.1, for=203.0.113.7"], "203.0.113.7"),
        (&["for=\"1.1.1.1", "for=203.0.113.7"], "203.0.113.7"),
        (&["for=;"], "10.0.0.1"),
        (&["for=\"\""], "10.0.0.1"),
        (&["for=203.0.113.7;"], "203.0.113.7"),
        (&[";;for=203.0.113.7 ;; proto=https;"], "203.0.113.7"),
        (&["for=\"203.0.113.7:_port\""], "203.0.113.7"),
        (&["for=\"[2001:db8::7]:_port.1\""], "2001:db8::7"),
        (&["for=1.1.1.1, for=203.0.113.7;host=\"a,b\""], "203.0.113.7"),
        (&["for=1.1.1.1, for=203.0.113.7;host=\"a;b\""], "203.0.113.7"),
        (&["host=\"a,b\";for=203.0.113.7, for=10.0.0.2"], "203.0.113.7"),
        (&["for=203.0.113.7;host=\"a\\\",for=1.1.1.1;x=\\\"b\""], "203.0.113.7"),
        (&["for=203.0.113.7;host=\"a\\\\\", for=10.0.0.2"], "203.0.113.7"),
        (&["for=1.1.1.1;x=\", for=203.0.113.7;host=\"a\"b\""], "10.0.0.1"),
        (&["for=1.1.1.1, for=203.0.113.7;host=a\"b\""], "10.0.0.1"),
        (&["for=1.1.1.1, for=203.0.113.7;host=\"a\"b"], "10.0.0.1"),
        (&["for=1.1.1.1, for;x=1"], "10.0.0.1"),
        (&["for=1.1.1.1, for=203.0.113.7;x"], "10.0.0.1"),
        (&["for=\"203.0.113.7\\"], "10.0.0.1"),
        (&["for=\"203.0.113.7\\\""], "10.0.0.1"),
        (&["\"", "for=203.0.113.7;x=\"\""], "203.0.113.7"),
    ];
    let client = behind_proxies().forwarded(Forwarded::Rfc7239);
    for (lines, expected) in TABLE {
        let mut lines: Vec<_> = lines.iter().map(|line| ("forwarded", *line)).collect();
        lines.push(("x-forwarded-for", "9.9.9.9"));
        assert_eq!(client.of(&request("10.0.0.1", &lines)), Some(ip(expected)), "{lines:?}");
    }
}

#[test]
fn a_host_that_the_proxy_quotes_passes_for_no_address() {
    let client = behind_proxies().forwarded(Forwarded::Rfc7239);
    // All of these are hosts by RFC 3986, which the client chooses and the proxy repeats.
    for host in [
        "a,for=1.1.1.1;x=",
        "a;for=1.1.1.1",
        ",for=1.1.1.1",
        "for=1.1.1.1,",
        ";",
        ",",
    ] {
        for line in [
            format!("for=203.0.113.7;host=\"{host}\";proto=https"),
            format!("proto=https;host=\"{host}\";for=\"203.0.113.7:1234\""),
            format!("for=203.0.113.7;host=\"{host}\", for=10.0.0.2;host=\"{host}\""),
        ] {
            let request = request("10.0.0.1", &[("forwarded", &line)]);
            assert_eq!(client.of(&request), Some(ip("203.0.113.7")), "{line}");
        }
    }
}

#[test]
fn a_chain_as_long_as_a_header_may_be_is_looked_at_only_so_far() {
    let long = format!("203.0.113.7, {}", vec!["10.0.0.2"; 5_000].join(", "));
    assert_eq!(
        behind_proxies().of(&request("10.0.0.1", &[("x-forwarded-for", &long)])),
        Some(ip("10.0.0.2")),
        "a chain of so many proxies is nobody's"
    );
    let mut lines = vec![("x-forwarded-for", "10.0.0.2"); 5_000];
    lines[0].1 = "203.0.113.7";
    assert_eq!(
        behind_proxies().of(&request("10.0.0.1", &lines)),
        Some(ip("10.0.0.2")),
        "as many lines"
    );
    let quotes = format!("{}, for=203.0.113.7", "\"\\".repeat(5_000));
    let client = behind_proxies().forwarded(Forwarded::Rfc7239);
    assert_eq!(
        client.of(&request("10.0.0.1", &[("forwarded", &quotes)])),
        Some(ip("203.0.113.7"))
    );
    let one = "9".repeat(10_000);
    assert_eq!(
        behind_proxies().of(&request("10.0.0.1", &[("x-forwarded-for", &one)])),
        Some(ip("10.0.0.1"))
    );
}

#[test]
fn the_addresses_of_one_ipv6_network_are_one_key() {
    let client = ClientIp::new();
    let key = |client: &ClientIp, peer: &str| hashed(client, &request(peer, &[])).unwrap();
    let first = key(&client, "2001:db8:0:1::1");
    for n in 2..1_000 {
        assert_eq!(key(&client, &format!("2001:db8:0:1:{n:x}::{n:x}")), first);
    }
    assert_ne!(key(&client, "2001:db8:0:2::1"), first);
    let wide = client.clone().ipv6_prefix(48).unwrap();
    assert_eq!(key(&wide, "2001:db8:0:2::1"), key(&wide, "2001:db8:0:1::1"));
    let whole = client.clone().ipv6_prefix(128).unwrap();
    assert_ne!(key(&whole, "2001:db8:0:1::1"), key(&whole, "2001:db8:0:1::2"));
    assert_eq!(
        key(&client, "::ffff:203.0.113.7"),
        key(&client, "203.0.113.7"),
        "one address, two spellings"
    );
    assert_ne!(key(&client, "203.0.113.7"), key(&client, "203.0.113.8"));
    assert_eq!(
        key(&client, "64:ff9b::203.0.113.7"),
        key(&client, "203.0.113.7"),
        "a translator's (RFC 6052): else all who come through one are one"
    );
    assert_ne!(
        key(&client, "64:ff9b::203.0.113.7"),
        key(&client, "64:ff9b::203.0.113.8")
    );
    assert_eq!(key(&client, "64:ff9b:1::1"), key(&client, "64:ff9b:1::2"));
    for bits in [0, 31, 129, 255] {
        assert_eq!(client.clone().ipv6_prefix(bits).unwrap_err().field(), "ipv6_prefix");
    }
}

/// So an operator finds an address among the worst offenders of a status.
#[test]
fn a_client_has_the_fingerprint_of_its_address() {
    let limiter = KeyedRateLimiter::new("api", TokenBucket::new(1, Duration::from_secs(60))).unwrap();
    let fingerprint_of = |peer: &str| limiter.fingerprint(&Of(&ClientIp::new(), &request(peer, &[])));
    for (peer, key) in [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:0:1::7", "2001:db8:0:1::"),
    ] {
        assert_eq!(fingerprint_of(peer), limiter.fingerprint(&ip(key)), "{peer}");
    }
}

#[test]
fn networks_are_checked() {
    for bad in [
        "",
        "10.0.0.0/33",
        "10.0.0/8",
        "fd00::/129",
        "10.0.0.0/",
        "10.0.0.0/-1",
        "10.0.0.0/+8",
        "x/8",
        "::ffff:10.0.0.0/8",
    ] {
        let error = ClientIp::new().trust(bad).unwrap_err();
        assert_eq!(error.field(), "trust", "{bad}");
    }
    let chain = [("x-forwarded-for", "203.0.113.7")];
    for (network, peer, inside) in [
        ("10.0.0.0/8", "10.255.255.255", true),
        ("10.0.0.0/8", "11.0.0.0", false),
        ("0.0.0.0/0", "192.0.2.1", true),
        ("0.0.0.0/0", "2001:db8::1", false),
        ("::/0", "2001:db8::1", true),
        ("192.0.2.1", "192.0.2.1", true),
        ("192.0.2.1", "192.0.2.2", false),
        ("::ffff:10.0.0.0/104", "10.1.2.3", true),
        ("2001:db8::/33", "2001:db8:7fff::1", true),
        ("2001:db8::/33", "2001:db8:8000::1", false),
        ("10.0.0.0/32", "10.0.0.0", true),
        ("10.0.0.0/32", "10.0.0.1", false),
        ("2001:db8::1/128", "2001:db8::1", true),
        ("2001:db8::1/128", "2001:db8::2", false),
        ("::/0", "192.0.2.1", false),
        ("::ffff:0:0/96", "192.0.2.1", true),
        ("::ffff:0:0/96", "2001:db8::1", false),
        ("::ffff:10.0.0.1", "10.0.0.1", true),
        ("::ffff:10.0.0.1", "10.0.0.2", false),
        ("10.0.0.0/8", "64:ff9b::10.0.0.1", false),
        ("10.0.0.0/8", "::10.0.0.1", false),
        ("10.1.2.3/8", "10.3.2.1", true),
    ] {
        let client = ClientIp::new().trust(network).unwrap();
        let expected = if inside { "203.0.113.7" } else { peer };
        assert_eq!(
            client.of(&request(peer, &chain)),
            Some(ip(expected)),
            "{network} {peer}"
        );
    }
}

#[cfg(feature = "axum")]
#[test]
fn axums_peer_is_found() {
    let mut request = Request::new(());
    let peer = SocketAddr::new(ip("203.0.113.7"), 1);
    request.extensions_mut().insert(axum::extract::ConnectInfo(peer));
    assert_eq!(ClientIp::new().of(&request), Some(peer.ip()));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_and_none_of_a_stranger_change_his_key(
        lines in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..4),
        rfc: bool,
    ) {
        let mut strange = request("203.0.113.7", &[]);
        for line in &lines {
            if let Ok(value) = HeaderValue::from_bytes(line) {
                strange.headers_mut().append("x-forwarded-for", value.clone());
                strange.headers_mut().append("forwarded", value);
            }
        }
        let field = if rfc { Forwarded::Rfc7239 } else { Forwarded::XForwardedFor };
        let client = behind_proxies().forwarded(field);
        prop_assert_eq!(client.of(&strange), Some(ip("203.0.113.7")));
        strange.extensions_mut().insert(SocketAddr::new(ip("10.0.0.1"), 1));
        prop_assert!(client.of(&strange).is_some());
    }

    #[test]
    fn what_the_client_writes_never_hides_what_the_proxy_wrote(
        invented in "[ -~]{0,40}", host in "[a-z,;=.!$&'()*+]{0,20}", lines in 1..3_usize, rfc: bool,
    ) {
        let mut request = request("10.0.0.1", &[]);
        let proxys = if rfc { format!("for=203.0.113.7;host=\"{host}\"") } else { "203.0.113.7".into() };
        let name = if rfc { "forwarded" } else { "x-forwarded-for" };
        if lines == 1 {
            let value = HeaderValue::from_str(&format!("{invented}, {proxys}")).unwrap();
            request.headers_mut().append(name, value);
        } else {
            request.headers_mut().append(name, HeaderValue::from_str(&invented).unwrap());
            request.headers_mut().append(name, HeaderValue::from_str(&proxys).unwrap());
        }
        let field = if rfc { Forwarded::Rfc7239 } else { Forwarded::XForwardedFor };
        prop_assert_eq!(behind_proxies().forwarded(field).of(&request), Some(ip("203.0.113.7")));
    }
}

#[test]
fn a_header_field_is_a_key_if_it_says_one_thing() {
    let key = key::header("X-Api-Key").unwrap();
    let of = |values: &[&str]| {
        let lines: Vec<_> = values.iter().map(|value| ("x-api-key", *value)).collect();
        hashed(&key, &request("203.0.113.7", &lines))
    };
    assert!(of(&["alice"]).is_some());
    assert_eq!(of(&["alice", "alice"]), of(&["alice"]));
    assert_ne!(of(&["alice"]), of(&["bob"]));
    assert_ne!(of(&["alice"]), of(&["Alice"]));
    assert_eq!(of(&[]), None);
    assert_eq!(of(&[""]), None);
    assert_eq!(of(&["alice", "bob"]), None, "whose?");
    assert!(of(&[&"x".repeat(10_000)]).is_some());
    for bad in ["", "two words", "näme", "a:b"] {
        assert_eq!(key::header(bad).unwrap_err().field(), "header");
    }
}

#[test]
fn an_extension_is_a_key_where_it_is_there() {
    #[derive(Clone, Hash)]
    struct Tenant(u32);
    let key = key::extension::<Tenant>();
    let with = |tenant| {
        let mut request = Request::new(());
        request.extensions_mut().insert(Tenant(tenant));
        hashed(&key, &request)
    };
    assert!(with(1).is_some());
    assert_ne!(with(1), with(2));
    assert_eq!(hashed(&key, &Request::new(())), None);
}

#[test]
fn a_host_is_the_same_in_every_spelling() {
    let of = |uri: &str, host: &[&'static str]| {
        let mut request = Request::get(uri).body(()).unwrap();
        for host in host {
            request.headers_mut().append("host", HeaderValue::from_static(host));
        }
        hashed(&key::host(), &request)
    };
    let plain = of("http://example.com/a", &[]);
    assert!(plain.is_some());
    for same in [
        "http://EXAMPLE.com/b",
        "http://example.com:80/",
        "https://example.com:443/",
        "http://user@example.com/",
        "http://example.com./",
        "https://example.com.:443/",
        "wss://example.com:443/",
        "ws://example.com:80/",
        "http://example.com:/",
    ] {
        assert_eq!(of(same, &[]), plain, "{same}");
    }
    assert_eq!(of("/path", &["Example.com"]), plain);
    assert_eq!(
        of("http://example.com/", &["other.com"]),
        plain,
        "the URI's is the one that is called"
    );
    for other in [
        "http://example.com:8080/",
        "http://example.org/",
        "http://example.com.evil.org/",
    ] {
        assert_ne!(of(other, &[]), plain, "{other}");
    }
    assert_eq!(of("/path", &[]), None);
    assert_eq!(of("/path", &["a.com", "b.com"]), None);
    assert_eq!(of("/path", &["not a host"]), None);
    assert_eq!(of("/path", &[""]), None);
    assert_eq!(of("/path", &["."]), None);
    assert_eq!(of("/path", &["user@"]), None);
    assert_eq!(of("http://[2001:DB8::1]:80/", &[]), of("http://[2001:db8::1]/", &[]));
}

/// So the breaker of a host is found by its name: to reset it, say.
#[test]
fn a_host_has_the_breaker_of_its_name() {
    let breakers = KeyedCircuitBreaker::builder("upstream").build().unwrap();
    for (uri, name) in [
        ("http://example.com/a", "example.com"),
        ("http://EXAMPLE.com:80/", "example.com"),
        ("https://example.com:443/", "example.com"),
        ("https://example.com:80/", "example.com:80"),
        ("http://user@Example.com:8080/", "example.com:8080"),
        ("http://example.com:08080/", "example.com:8080"),
        ("http://user@example.com/", "example.com"),
        ("http://127.0.0.1:3774/", "127.0.0.1:3774"),
        ("http://[2001:DB8::1]:8080/", "[2001:db8::1]:8080"),
    ] {
        let request = Request::get(uri).body(()).unwrap();
        let found = breakers.fingerprint(&Of(&key::host(), &request));
        assert_eq!(found, breakers.fingerprint(name), "{uri}");
    }
}

#[test]
fn a_pair_of_keys_is_there_if_both_are() {
    let pair = (key::header("x-api-key").unwrap(), ClientIp::new());
    let with = |key: &str| hashed(&pair, &request("203.0.113.7", &[("x-api-key", key)]));
    assert!(with("a").is_some());
    assert_ne!(with("a"), with("b"));
    assert_eq!(hashed(&pair, &request("203.0.113.7", &[])), None);
}
