//! The header fields that tell a client its quota. The only place that knows how they are written; it reads no clock.

use crate::quota::{Quota, whole_seconds};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::{cmp::Reverse, iter, time::Duration};

/// How answers tell clients what their limits admit and what is left: on admitted and on rejected calls alike.
///
/// Draft 11 of the IETF's [RateLimit fields](https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/) has lists:
/// each limit that a call passed adds an item, also through nested layers and to what an upstream said, so give limits names
/// that differ. The other forms have room for one limit (drafts 6 and 7 for one beside the list of policies): there the one
/// with the least remaining stands, of two alike the one that resets later.
///
/// Nested layers should use one form. Browsers show the fields to scripts only if `Access-Control-Expose-Headers` names them.
///
/// ```
/// use portcullis::{Clock, GuardLayer, RateLimiter, RateLimitHeaders, TokenBucket};
/// use std::time::Duration;
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let clock = Clock::manual();
/// let limiter = RateLimiter::builder("search", TokenBucket::new(100, Duration::from_secs(60))).clock(&clock).build()?;
/// let service = ServiceBuilder::new()
///     .layer(GuardLayer::new(limiter).respond().headers(RateLimitHeaders::Draft7))
///     .service(service_fn(async |_: http::Request<()>| Ok::<_, std::io::Error>(http::Response::new(()))));
/// let response = service.oneshot(http::Request::new(())).await?;
/// assert_eq!(response.headers()["ratelimit"], "limit=100, remaining=99, reset=1");
/// assert_eq!(response.headers()["ratelimit-policy"], "100;w=60");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum RateLimitHeaders {
    /// `RateLimit-Policy: "per-minute";q=100;w=60` and `RateLimit: "per-minute";r=99;t=1`. What a name may not hold there
    /// (all but printable ASCII), and `%`, is percent-encoded.
    #[default]
    Draft11,
    /// `RateLimit-Policy: 100;w=60` and `RateLimit: limit=100, remaining=99, reset=1`.
    Draft7,
    /// `RateLimit-Policy: 100;w=60`, `RateLimit-Limit: 100`, `RateLimit-Remaining: 99` and `RateLimit-Reset: 1`.
    Draft6,
    /// `X-RateLimit-Limit: 100`, `X-RateLimit-Remaining: 99` and `X-RateLimit-Reset: 1767225601`, in seconds since 1970, as
    /// GitHub has it.
    XRateLimitEpoch,
    /// The same with `X-RateLimit-Reset: 1`, in seconds from now.
    XRateLimitDelta,
    /// None.
    Off,
}

const RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Limit, remaining, reset.
type Names = [HeaderName; 3];
const DRAFT_6: Names = [
    HeaderName::from_static("ratelimit-limit"),
    HeaderName::from_static("ratelimit-remaining"),
    HeaderName::from_static("ratelimit-reset"),
];
const X_RATELIMIT: Names = [
    HeaderName::from_static("x-ratelimit-limit"),
    HeaderName::from_static("x-ratelimit-remaining"),
    HeaderName::from_static("x-ratelimit-reset"),
];

/// The most that an integer of RFC 9651 holds: 15 digits.
const MOST: u64 = 999_999_999_999_999;

impl RateLimitHeaders {
    /// How much room a quota takes as text, unless its name is full of what has to be escaped.
    pub(super) fn room(quota: &Quota) -> usize {
        // Draft 11 has the name twice and at most 76 bytes more, of numbers and what stands between them; draft 7 has 104. The
        // lengths of up to four values take two bytes each.
        2 * quota.limit.as_bytes().len() + 112
    }

    /// Writes the values of the header fields, each behind its length. `reset` is in seconds, `None` if no time can be told: then
    /// draft 11 leaves it out, and the other forms, which must have one, say the whole window. `unix_now` is read by
    /// [`XRateLimitEpoch`](Self::XRateLimitEpoch) alone.
    pub(super) fn write(self, text: &mut BytesMut, quota: &Quota, reset: Option<u64>, unix_now: Duration) {
        let window = whole_seconds(quota.window).as_secs().clamp(1, MOST);
        let told = reset.map(|seconds| seconds.min(MOST));
        let limit = quota.quota.min(MOST);
        let remaining = quota.remaining.min(MOST);
        let reset = told.unwrap_or(window);
        match self {
            Self::Draft11 => draft_11(text, quota.limit.as_bytes(), [limit, window, remaining], told),
            Self::Draft7 => {
                policy(text, limit, window);
                value(text, |text| {
                    numbers(
                        text,
                        [("limit=", limit), (", remaining=", remaining), (", reset=", reset)],
                    );
                });
            }
            Self::Draft6 => {
                policy(text, limit, window);
                each(text, [limit, remaining, reset]);
            }
            Self::XRateLimitEpoch => {
                // Rounded up as the wait is: else the sum might be too early.
                let now = whole_seconds(unix_now).as_secs();
                each(text, [limit, remaining, now.saturating_add(reset).min(MOST)]);
            }
            Self::XRateLimitDelta => each(text, [limit, remaining, reset]),
            Self::Off => {}
        }
    }

    /// Adds what was written, of any number of quotas, to the headers. The values share the text's buffer.
    pub(super) fn add(self, headers: &mut HeaderMap, text: BytesMut) {
        let mut values = values(text.freeze());
        while self.add_one(headers, || values.next()).is_some() {}
    }

    /// Adds the next quota; `None` if there is none.
    fn add_one(self, headers: &mut HeaderMap, mut next: impl FnMut() -> Option<HeaderValue>) -> Option<()> {
        match self {
            Self::Draft11 => {
                append(headers, RATELIMIT_POLICY, next()?);
                append(headers, RATELIMIT, next()?);
            }
            Self::Draft7 => {
                append(headers, RATELIMIT_POLICY, next()?);
                draft_7(headers, next()?);
            }
            Self::Draft6 => {
                append(headers, RATELIMIT_POLICY, next()?);
                single(headers, &DRAFT_6, [next()?, next()?, next()?]);
            }
            Self::XRateLimitEpoch | Self::XRateLimitDelta => {
                single(headers, &X_RATELIMIT, [next()?, next()?, next()?]);
            }
            Self::Off => return None,
        }
        Some(())
    }
}

fn draft_11(text: &mut BytesMut, name: &[u8], [limit, window, remaining]: [u64; 3], reset: Option<u64>) {
    value(text, |text| {
        sf_string(text, name);
        numbers(text, [(";q=", limit), (";w=", window)]);
    });
    value(text, |text| {
        sf_string(text, name);
        numbers(text, [(";r=", remaining)]);
        numbers(text, reset.map(|reset| (";t=", reset)));
    });
}

/// The list of policies as drafts 6 and 7 have it.
fn policy(text: &mut BytesMut, limit: u64, window: u64) {
    value(text, |text| numbers(text, [("", limit), (";w=", window)]));
}

/// Values that are a number each.
fn each(text: &mut BytesMut, values: [u64; 3]) {
    for number in values {
        value(text, |text| decimal(text, number));
    }
}

/// Numbers, each behind what introduces it.
fn numbers<'a>(text: &mut BytesMut, numbers: impl IntoIterator<Item = (&'a str, u64)>) {
    for (before, number) in numbers {
        text.put_slice(before.as_bytes());
        decimal(text, number);
    }
}

/// A number in digits, without the detours of a format string: every admitted call writes some.
pub(super) fn decimal(text: &mut BytesMut, mut number: u64) {
    let mut digits = [0; 20];
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    text.put_slice(&digits[first..]);
}

/// Writes a value behind its length.
fn value(text: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    let start = text.len();
    text.put_u16(0);
    write(text);
    let length = u16::try_from(text.len() - start - LENGTH).expect("a name of at most 255 bytes and three numbers");
    text[start..start + LENGTH].copy_from_slice(&length.to_be_bytes());
}

const LENGTH: usize = size_of::<u16>();

/// What was written by [`value`], which is printable ASCII.
fn values(mut text: Bytes) -> impl Iterator<Item = HeaderValue> {
    iter::from_fn(move || {
        let length = text.has_remaining().then(|| text.get_u16())?;
        HeaderValue::from_maybe_shared(text.split_to(length.into())).ok()
    })
}

fn draft_7(headers: &mut HeaderMap, ours: HeaderValue) {
    const NAMES: [&str; 2] = ["remaining", "reset"];
    let theirs = NAMES.map(|name| member(headers.get_all(RATELIMIT).iter(), name));
    let own = NAMES.map(|name| member(iter::once(&ours), name));
    if !stands(theirs, own) {
        insert(headers, RATELIMIT, ours);
    }
}

/// Of a dictionary of RFC 9651: over any number of lines, of a key that comes twice the last.
fn member<'a>(lines: impl Iterator<Item = &'a HeaderValue>, name: &str) -> Option<u64> {
    let members = lines.filter_map(|line| line.to_str().ok()).flat_map(split);
    let named = members.filter_map(|member| member.trim().split_once('='));
    let (_, value) = named.filter(|(key, _)| *key == name).last()?;
    let without_parameters = value.split(';').next()?;
    without_parameters.trim().parse().ok()
}

/// The members of a dictionary: what its commas part, but for those in strings.
fn split(line: &str) -> impl Iterator<Item = &str> {
    let (mut in_string, mut escaped) = (false, false);
    line.split(move |character| {
        match character {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            _ => {}
        }
        character == ',' && !in_string
    })
}

fn single(headers: &mut HeaderMap, names: &Names, ours: [HeaderValue; 3]) {
    let number = |value: &HeaderValue| value.to_str().ok()?.trim().parse().ok();
    let [_, remaining, reset] = names;
    let theirs = [remaining, reset].map(|name| headers.get(name).and_then(number));
    let [_, remaining, reset] = &ours;
    if stands(theirs, [remaining, reset].map(number)) {
        return;
    }
    for (name, value) in names.iter().zip(ours) {
        insert(headers, name.clone(), value);
    }
}

/// Whether what an inner layer or the service itself said is at least as tight. Both are what remains, and the reset.
fn stands(theirs: [Option<u64>; 2], ours: [Option<u64>; 2]) -> bool {
    let tightness = |[remaining, reset]: [Option<u64>; 2]| Some((remaining?, Reverse(reset.unwrap_or(0))));
    tightness(theirs).is_some_and(|theirs| Some(theirs) <= tightness(ours))
}

/// A string of RFC 9651: printable ASCII in quotes. `%` is escaped as well, so that no two names are written alike.
fn sf_string(text: &mut BytesMut, string: &[u8]) {
    let is_plain = |byte: &u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\' | b'%');
    text.put_slice(b"\"");
    if string.iter().all(is_plain) {
        text.put_slice(string);
    } else {
        for byte in string {
            match byte {
                b'"' | b'\\' => text.put_slice(&[b'\\', *byte]),
                b' '..=b'~' if *byte != b'%' => text.put_slice(&[*byte]),
                _ => text.put_slice(&escaped(*byte)),
            }
        }
    }
    text.put_slice(b"\"");
}

/// A byte percent-encoded.
fn escaped(byte: u8) -> [u8; 3] {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    [b'%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]
}

/// A response with so many headers that there is no room goes out without this one.
fn append(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) {
    let _ = headers.try_append(name, value);
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) {
    let _ = headers.try_insert(name, value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Name;

    fn quota(limit: u32, remaining: u64) -> Quota {
        let mut quota = Quota::new(Name::try_from("api").unwrap(), limit, Duration::from_secs(60));
        quota.remaining = remaining;
        quota
    }

    fn epoch(headers: &HeaderMap) -> [&str; 3] {
        X_RATELIMIT.map(|name| headers[name].to_str().unwrap())
    }

    #[test]
    fn an_epoch_reset_is_the_time_of_day_plus_the_wait() {
        let write = |headers: &mut HeaderMap, quota: &Quota, reset, unix_now| {
            let mut text = BytesMut::new();
            RateLimitHeaders::XRateLimitEpoch.write(&mut text, quota, reset, unix_now);
            RateLimitHeaders::XRateLimitEpoch.add(headers, text);
        };
        let mut headers = HeaderMap::new();
        let new_year = Duration::from_secs(1_767_225_600);
        write(&mut headers, &quota(100, 5), Some(30), new_year);
        assert_eq!(epoch(&headers), ["100", "5", "1767225630"]);
        write(&mut headers, &quota(9, 5), Some(29), new_year);
        assert_eq!(epoch(&headers), ["100", "5", "1767225630"], "it resets earlier");
        write(&mut headers, &quota(9, 5), Some(31), new_year);
        assert_eq!(epoch(&headers), ["9", "5", "1767225631"]);
        write(&mut headers, &quota(7, 4), Some(31), new_year + Duration::from_nanos(1));
        assert_eq!(
            epoch(&headers),
            ["7", "4", "1767225632"],
            "not before the 31 seconds are over"
        );
        write(&mut headers, &quota(7, 3), None, Duration::MAX);
        assert_eq!(epoch(&headers), ["7", "3", "999999999999999"]);
    }
}
