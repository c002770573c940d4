//! Rejections as gRPC says them: a Trailers-Only response. Needs no gRPC library.

use super::told::{self, Kind};
use crate::{
    quota::whole_millis,
    rejected::{Reason, Rejected},
};
use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use http::{HeaderMap, HeaderName, HeaderValue, header::CONTENT_TYPE};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use std::time::Duration;

const GRPC: &str = "application/grpc";
const GRPC_WEB: &str = "application/grpc-web";
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_STATUS_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
/// gRFC A6.
pub(super) const GRPC_RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";

/// What a status message escapes: all but %x20-24 and %x26-7E.
const MESSAGE: &AsciiSet = &CONTROLS.add(b'%');

/// The content type to answer a gRPC call with; `None` if the request is none. A browser's gRPC-Web client is answered in its
/// own type: it takes no other.
pub(super) fn content_type(request: &HeaderMap) -> Option<HeaderValue> {
    let asked = request.get(CONTENT_TYPE)?;
    if is_web(request) {
        return Some(asked.clone());
    }
    is_grpc(request).then(plain_content_type)
}

/// Whether a message has a content type of gRPC, or of gRPC-Web.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    begins_with(headers, GRPC)
}

/// Whether a message has the content type of gRPC-Web.
pub(super) fn is_web(headers: &HeaderMap) -> bool {
    begins_with(headers, GRPC_WEB)
}

fn begins_with(headers: &HeaderMap, prefix: &str) -> bool {
    let start = headers
        .get(CONTENT_TYPE)
        .and_then(|found| found.as_bytes().get(..prefix.len()));
    start.is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()))
}

pub(super) fn plain_content_type() -> HeaderValue {
    HeaderValue::from_static(GRPC)
}

/// The headers that are the trailers.
pub(super) fn write(headers: &mut HeaderMap, why: &Rejected) {
    let message = why.to_string();
    headers.insert(GRPC_STATUS, code(why).into());
    let details = STANDARD_NO_PAD.encode(details(why, &message));
    for (name, value) in [
        (GRPC_MESSAGE, Some(utf8_percent_encode(&message, MESSAGE).to_string())),
        (GRPC_STATUS_DETAILS, Some(details)),
        (HeaderName::from_static(GRPC_RETRY_PUSHBACK), pushback(why)),
    ] {
        // Printable ASCII, all three.
        if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
            headers.insert(name, value);
        }
    }
}

/// `RESOURCE_EXHAUSTED`, `UNAVAILABLE` or `INVALID_ARGUMENT`.
pub(super) fn code(why: &Rejected) -> u16 {
    match Kind::of(why) {
        Kind::Quota => 8,
        Kind::Capacity => 14,
        Kind::Request => 3,
    }
}

/// In how many milliseconds a client may retry by itself; -1 for never. `None` leaves it to the client.
pub(super) fn pushback(why: &Rejected) -> Option<String> {
    if told::is_final(why) {
        return Some("-1".to_owned());
    }
    let millis = whole_millis(told::wait(why)?);
    Some(millis.min(i32::MAX.unsigned_abs().into()).to_string())
}

/// A `google.rpc.Status`, encoded.
pub(super) fn details(why: &Rejected, message: &str) -> Vec<u8> {
    let mut status = Message::default();
    status.number(1, code(why).into());
    status.bytes(2, message.as_bytes());
    if let Some(wait) = told::wait(why) {
        status.detail("RetryInfo", &retry_info(wait));
    }
    if Kind::of(why) == Kind::Quota {
        status.detail("QuotaFailure", &quota_failure(why, message));
    }
    status.detail("ErrorInfo", &error_info(why));
    status.0
}

fn retry_info(wait: Duration) -> Message {
    // The longest that a protobuf `Duration` may be: 10,000 years.
    const LONGEST: Duration = Duration::from_secs(315_576_000_000);
    let wait = wait.min(LONGEST);
    let (mut info, mut delay) = (Message::default(), Message::default());
    delay.number(1, wait.as_secs());
    delay.number(2, wait.subsec_nanos().into());
    info.bytes(1, &delay.0);
    info
}

fn quota_failure(why: &Rejected, message: &str) -> Message {
    let (mut failure, mut violation) = (Message::default(), Message::default());
    let limit = why.limit.as_ref().unwrap_or(&why.service);
    violation.bytes(1, limit.as_bytes());
    violation.bytes(2, message.as_bytes());
    violation.bytes(3, why.service.as_bytes());
    violation.bytes(5, limit.as_bytes());
    if let Some(quota) = why.quota() {
        violation.number(7, quota.quota);
    }
    failure.bytes(1, &violation.0);
    failure
}

fn error_info(why: &Rejected) -> Message {
    let reason = match why.reason {
        Reason::Open => "CIRCUIT_OPEN",
        Reason::HalfOpenFull => "CIRCUIT_HALF_OPEN",
        Reason::ForcedOpen => "CIRCUIT_FORCED_OPEN",
        Reason::OverLimit => "RATE_LIMITED",
        Reason::CostExceedsBurst { .. } => "COST_EXCEEDS_BURST",
        Reason::MissingKey => "MISSING_KEY",
        Reason::Other => "REJECTED",
    };
    let mut info = Message::default();
    info.bytes(1, reason.as_bytes());
    info.bytes(2, b"portcullis");
    let metadata = [
        ("service", Some(why.service.as_str())),
        ("limit", why.limit.as_deref()),
        ("circuit-state", told::circuit_state(why)),
    ];
    for (key, value) in metadata {
        let Some(value) = value else { continue };
        let mut entry = Message::default();
        entry.bytes(1, key.as_bytes());
        entry.bytes(2, value.as_bytes());
        info.bytes(3, &entry.0);
    }
    info
}

/// A protobuf message under construction: as much of the encoding as a status takes.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number.to_le_bytes()[0] | 0x80);
            number >>= 7;
        }
        self.0.push(number.to_le_bytes()[0]);
    }

    /// A number that is not negative. Zero is what an absent one reads as.
    fn number(&mut self, field: u64, number: u64) {
        if number > 0 {
            self.varint(field << 3);
            self.varint(number);
        }
    }

    /// A string, some bytes, or another message.
    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    /// One of a status's details: a message and its name, in an `Any`.
    fn detail(&mut self, name: &str, message: &Message) {
        let mut any = Message::default();
        any.bytes(1, format!("type.googleapis.com/google.rpc.{name}").as_bytes());
        any.bytes(2, &message.0);
        self.bytes(3, &any.0);
    }
}
