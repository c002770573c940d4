//! Refusals as `application/problem+json` (RFC 9457).

use super::told::{self, Kind};
use crate::{quota::whole_millis, rejected::Rejected};
use bytes::{BufMut, Bytes, BytesMut};
use http::StatusCode;
use serde::{Serialize, Serializer};
use std::fmt;

pub(super) const PROBLEM_JSON: &str = "application/problem+json";

/// A problem and its extension members, in the order in which people read them.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Problem<'a> {
    r#type: &'static str,
    title: &'static str,
    status: u16,
    #[serde(serialize_with = "as_text")]
    detail: &'a dyn fmt::Display,
    #[serde(skip_serializing_if = "Option::is_none")]
    violated_policies: Option<[&'a str; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    circuit: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    circuit_state: Option<&'static str>,
}

/// Written where it goes, without a string in between.
fn as_text<S: Serializer>(text: &&dyn fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(text)
}

impl<'a> Problem<'a> {
    /// A problem that its status says it all about.
    pub(super) fn blank(status: StatusCode, detail: &'a dyn fmt::Display) -> Self {
        Self {
            r#type: "about:blank",
            title: status.canonical_reason().unwrap_or_default(),
            status: status.as_u16(),
            detail,
            violated_policies: None,
            retry_after_ms: None,
            circuit: None,
            circuit_state: None,
        }
    }

    /// A rejection, with the types and titles of draft-ietf-httpapi-ratelimit-headers.
    pub(super) fn of(why: &'a Rejected) -> (StatusCode, Self) {
        let (status, r#type, title) = match Kind::of(why) {
            Kind::Quota => (
                StatusCode::TOO_MANY_REQUESTS,
                "https://iana.org/assignments/http-problem-types#quota-exceeded",
                "Request cannot be satisfied as assigned quota has been exceeded",
            ),
            Kind::Capacity => (
                StatusCode::SERVICE_UNAVAILABLE,
                "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity",
                "Request cannot be satisfied due to temporary server capacity constraints",
            ),
            Kind::Request => return (StatusCode::BAD_REQUEST, Self::blank(StatusCode::BAD_REQUEST, why)),
        };
        let circuit_state = told::circuit_state(why);
        let problem = Self {
            r#type,
            title,
            violated_policies: Some([why.limit.as_ref().unwrap_or(&why.service)]),
            retry_after_ms: told::wait(why).map(whole_millis),
            circuit: circuit_state.map(|_| why.service.as_str()),
            circuit_state,
            ..Self::blank(status, why)
        };
        (status, problem)
    }

    /// The document.
    pub(super) fn json(&self) -> Bytes {
        let mut text = BytesMut::new();
        self.write(&mut text);
        text.freeze()
    }

    /// Writes the document.
    pub(super) fn write(&self, text: &mut BytesMut) {
        serde_json::to_writer(text.writer(), self).expect("numbers and strings in named fields");
    }
}
