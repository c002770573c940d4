//! The header fields that tell a client its quota. The only place that knows how they are written; it reads no clock.

use crate::quota::{Quota, whole_seconds};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::{cmp::Reverse, fmt::Write, time::Duration};

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
    /// (all but printable ASCII) is percent-encoded.
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

/// A quota in the numbers that go over the wire.
#[derive(Clone, Copy)]
struct Numbers {
    limit: u64,
    window: u64,
    remaining: u64,
    reset: u64,
}

impl RateLimitHeaders {
    /// Adds the quota to the headers. `reset` is in seconds, `None` if no time can be told: then draft 11 leaves it out, and the
    /// other forms, which must have one, say the whole window. `unix_now` is read by [`XRateLimitEpoch`](Self::XRateLimitEpoch)
    /// alone.
    pub(super) fn write(self, headers: &mut HeaderMap, quota: &Quota, reset: Option<u64>, unix_now: Duration) {
        let window = whole_seconds(quota.window).as_secs().clamp(1, MOST);
        let told = reset.map(|seconds| seconds.min(MOST));
        let numbers = Numbers {
            limit: quota.quota.min(MOST),
            window,
            remaining: quota.remaining.min(MOST),
            reset: told.unwrap_or(window),
        };
        match self {
            Self::Draft11 => draft_11(headers, &quota.limit, numbers, told),
            Self::Draft7 => {
                policy(headers, numbers);
                draft_7(headers, numbers);
            }
            Self::Draft6 => {
                policy(headers, numbers);
                single(headers, &DRAFT_6, numbers);
            }
            Self::XRateLimitEpoch => {
                // Rounded up as the wait is: else the sum might be too early.
                let now = whole_seconds(unix_now).as_secs();
                let reset = now.saturating_add(numbers.reset).min(MOST);
                single(headers, &X_RATELIMIT, Numbers { reset, ..numbers });
            }
            Self::XRateLimitDelta => single(headers, &X_RATELIMIT, numbers),
            Self::Off => {}
        }
    }
}

fn draft_11(headers: &mut HeaderMap, limit: &str, numbers: Numbers, reset: Option<u64>) {
    let Numbers {
        limit: quota,
        window,
        remaining,
        ..
    } = numbers;
    let name = sf_string(limit);
    append(headers, RATELIMIT_POLICY, format!("{name};q={quota};w={window}"));
    let mut item = name;
    // Writing to a string cannot fail.
    let _ = write!(item, ";r={remaining}");
    if let Some(reset) = reset {
        let _ = write!(item, ";t={reset}");
    }
    append(headers, RATELIMIT, item);
}

/// The list of policies of drafts 4 to 7, in which limits have no names.
fn policy(headers: &mut HeaderMap, Numbers { limit, window, .. }: Numbers) {
    append(headers, RATELIMIT_POLICY, format!("{limit};w={window}"));
}

fn draft_7(headers: &mut HeaderMap, ours: Numbers) {
    // A dictionary of RFC 9651: over any number of lines, of a key that comes twice the last.
    let member = |name: &str| {
        let lines = headers.get_all(RATELIMIT).into_iter();
        let members = lines
            .filter_map(|line| line.to_str().ok())
            .flat_map(|line| line.split(','));
        let named = members.filter_map(|member| member.trim().split_once('='));
        let (_, value) = named.rev().find(|(key, _)| *key == name)?;
        let without_parameters = value.split(';').next()?;
        without_parameters.trim().parse().ok()
    };
    if stands(member("remaining"), member("reset"), ours) {
        return;
    }
    let Numbers {
        limit,
        remaining,
        reset,
        ..
    } = ours;
    insert(
        headers,
        RATELIMIT,
        format!("limit={limit}, remaining={remaining}, reset={reset}"),
    );
}

fn single(headers: &mut HeaderMap, [limit, remaining, reset]: &Names, ours: Numbers) {
    let number = |name: &HeaderName| headers.get(name)?.to_str().ok()?.trim().parse().ok();
    if stands(number(remaining), number(reset), ours) {
        return;
    }
    insert(headers, limit.clone(), ours.limit.to_string());
    insert(headers, remaining.clone(), ours.remaining.to_string());
    insert(headers, reset.clone(), ours.reset.to_string());
}

/// Whether what an inner layer or the service itself said is at least as tight.
fn stands(remaining: Option<u64>, reset: Option<u64>, ours: Numbers) -> bool {
    remaining.is_some_and(|theirs| (theirs, Reverse(reset.unwrap_or(0))) <= (ours.remaining, Reverse(ours.reset)))
}

/// A string of RFC 9651: printable ASCII in quotes.
fn sf_string(text: &str) -> String {
    let mut string = String::with_capacity(text.len() + 32);
    string.push('"');
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => string.extend(['\\', char::from(byte)]),
            b' '..=b'~' => string.push(char::from(byte)),
            _ => {
                let _ = write!(string, "%{byte:02X}");
            }
        }
    }
    string.push('"');
    string
}

/// A response with so many headers that there is no room goes out without this one.
fn append(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Some(value) = header_value(value) {
        let _ = headers.try_append(name, value);
    }
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Some(value) = header_value(value) {
        let _ = headers.try_insert(name, value);
    }
}

/// Takes the string over as it is. All that is written here is printable ASCII.
fn header_value(value: String) -> Option<HeaderValue> {
    HeaderValue::from_maybe_shared(bytes::Bytes::from(value)).ok()
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
            RateLimitHeaders::XRateLimitEpoch.write(headers, quota, reset, unix_now);
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
