//! Header fields of any requests and answers: what is read out of them, and that what is written is well-formed.

use super::input::{bytes, duration, play, rarely, text};
use arbitrary::{Result, Unstructured};
use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use percent_encoding::percent_decode_str;
use portcullis::{
    AsResponse, CircuitBreaker, Clock, GrpcClassifier, GuardLayer, HttpClassifier, Name, PerRoute, RateLimitHeaders,
    RateLimiter, Reason, Rejected, TokenBucket,
    classify::Judge,
    key::{self, Key},
};
use std::{
    convert::Infallible,
    future::Ready,
    hash::{DefaultHasher, Hasher},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tower_layer::Layer;
use tower_service::Service;

const RECOVERY: Duration = Duration::from_secs(1);
const LONGEST_RECOVERY: Duration = Duration::from_secs(3600);
const FORMS: [RateLimitHeaders; 6] = [
    RateLimitHeaders::Draft11,
    RateLimitHeaders::Draft7,
    RateLimitHeaders::Draft6,
    RateLimitHeaders::XRateLimitEpoch,
    RateLimitHeaders::XRateLimitDelta,
    RateLimitHeaders::Off,
];
/// All that are read or written here.
const NAMES: [&str; 14] = [
    "content-type",
    "grpc-status",
    "grpc-retry-pushback-ms",
    "retry-after",
    "date",
    "content-length",
    "ratelimit",
    "ratelimit-policy",
    "ratelimit-remaining",
    "ratelimit-reset",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "x-other",
];

pub fn run(data: &[u8]) {
    play(data, |input| match input.int_in_range(0..=4)? {
        0 => hosts(input),
        1 => routes(input),
        2 => rejections(input),
        3 => answers(input, HttpClassifier::new()),
        _ => answers(input, GrpcClassifier::new()),
    });
}

fn fields(input: &mut Unstructured<'_>) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for _ in 0..input.int_in_range(0..=4)? {
        let name = HeaderName::from_static(input.choose(&NAMES)?);
        if let Ok(value) = HeaderValue::from_bytes(&bytes(input)?) {
            headers.append(name, value);
        }
    }
    Ok(headers)
}

fn request(input: &mut Unstructured<'_>) -> Result<Request<()>> {
    let mut request = Request::new(());
    *request.headers_mut() = fields(input)?;
    *request.method_mut() = input.choose(&[Method::GET, Method::HEAD, Method::POST])?.clone();
    if rarely(input)?
        && let Ok(uri) = Uri::try_from(bytes(input)?)
    {
        *request.uri_mut() = uri;
    }
    Ok(request)
}

fn name(input: &mut Unstructured<'_>) -> Result<Name> {
    let name = text(input)?;
    Ok(Name::try_from(name.as_str()).unwrap_or_else(|_| Name::try_from("api").expect("valid")))
}

/// An upstream that always answers the same head.
#[derive(Clone)]
struct Upstream(StatusCode, HeaderMap);

impl Service<Request<()>> for Upstream {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<std::result::Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        let mut response = Response::new(Full::from("an answer"));
        *response.status_mut() = self.0;
        *response.headers_mut() = self.1.clone();
        std::future::ready(Ok(response))
    }
}

fn call<S: Service<Request<()>, Error = Infallible>>(service: &mut S, request: &Request<()>) -> S::Response {
    assert!(service.poll_ready(&mut Context::from_waker(Waker::noop())).is_ready());
    let Ok(response) = super::ready(service.call(request.clone()));
    response
}

/// A call that is admitted and one that is not, of a client that says anything to an upstream that says anything.
fn answers(input: &mut Unstructured<'_>, judge: impl Judge) -> Result<()> {
    let form = *input.choose(&FORMS)?;
    let clock = Clock::manual();
    let (service, limit) = (name(input)?, name(input)?);
    let breaker = CircuitBreaker::builder(service.as_str())
        .clock(&clock)
        .failure_threshold(1)
        .recovery_timeout(RECOVERY)
        .honor_retry_after(LONGEST_RECOVERY)
        .build()
        .expect("valid");
    let bucket = TokenBucket::new(2, Duration::from_secs(60));
    let limiter = RateLimiter::builder(service.as_str(), bucket)
        .limit(limit.as_str())
        .clock(&clock)
        .build();
    let policy = (breaker.clone(), limiter.expect("valid"));
    let status = StatusCode::from_u16(input.int_in_range(100..=599)?).expect("in range");
    let upstream = Upstream(status, fields(input)?);
    let request = request(input)?;
    let mut guarded = GuardLayer::new(policy)
        .classify_with(judge)
        .reject_with(AsResponse::new().headers(form))
        .layer(upstream.clone());

    let admitted = call(&mut guarded, &request);
    assert_eq!(admitted.status(), status);
    check_told(form, &upstream.1, admitted.headers());
    let body = super::ready(admitted.into_body().collect())
        .expect("it does not fail")
        .to_bytes();
    assert_eq!(body, "an answer", "the body passes");
    let ended = breaker.status();
    assert_eq!(ended.metrics.total_requests, 1, "the call has ended");
    if let Some(wait) = ended.retry_after {
        assert!(
            (RECOVERY..=LONGEST_RECOVERY).contains(&wait),
            "an upstream closes nobody out for {wait:?}"
        );
    }

    breaker.force_open();
    let refused = call(&mut guarded, &request);
    let why = refused.extensions().get::<Rejected>().expect("it says why").clone();
    assert_eq!(why.reason, Reason::ForcedOpen);
    let (head, body) = refused.into_parts();
    let body = super::ready(body.collect()).expect("it does not fail").to_bytes();
    if head.headers.contains_key("grpc-status") {
        let asked = request.headers()["content-type"].as_bytes().to_ascii_lowercase();
        assert!(
            asked.starts_with(b"application/grpc"),
            "only who speaks gRPC is answered in it"
        );
        check_grpc(&why, head.status, &head.headers, &body);
    } else {
        check_problem(&why, head.status, &head.headers, &body, request.method());
    }
    Ok(())
}

/// All that the upstream said is still there, and what was added is well-formed.
fn check_told(form: RateLimitHeaders, theirs: &HeaderMap, told: &HeaderMap) {
    let lines =
        |headers: &HeaderMap, name: &str| -> Vec<HeaderValue> { headers.get_all(name).iter().cloned().collect() };
    let written: &[&str] = match form {
        RateLimitHeaders::Draft11 | RateLimitHeaders::Draft7 => &["ratelimit", "ratelimit-policy"],
        RateLimitHeaders::Draft6 => &[
            "ratelimit-policy",
            "ratelimit-limit",
            "ratelimit-remaining",
            "ratelimit-reset",
        ],
        RateLimitHeaders::Off => &[],
        _ => &["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"],
    };
    for name in theirs.keys().chain(told.keys()) {
        if !written.contains(&name.as_str()) {
            assert_eq!(
                lines(told, name.as_str()),
                lines(theirs, name.as_str()),
                "{name} passes unchanged"
            );
        }
    }
    for name in written {
        let (before, after) = (lines(theirs, name), lines(told, name));
        let is_list = form == RateLimitHeaders::Draft11 || *name == "ratelimit-policy";
        if is_list {
            let (ours, kept) = after.split_last().expect("a limit is told");
            assert_eq!(kept, before, "{name} is a list: ours is added to it");
            check_line(form, ours);
        } else if after != before {
            // The tighter of two stands: it is theirs as it was, or ours alone.
            let [ours] = &after[..] else {
                panic!("{name} has one value, not {after:?}")
            };
            check_line(form, ours);
        }
    }
}

fn check_line(form: RateLimitHeaders, line: &HeaderValue) {
    let line = line.to_str().expect("printable ASCII");
    if form == RateLimitHeaders::Draft11 {
        let name = line.strip_prefix('"').expect("a string");
        let mut escaped = false;
        let end = name.bytes().position(|byte| {
            let ends = byte == b'"' && !escaped;
            assert!(
                !escaped || matches!(byte, b'"' | b'\\'),
                "nothing else is escaped: {line}"
            );
            escaped = byte == b'\\' && !escaped;
            ends
        });
        let parameters = &name[end.expect("the string ends") + 1..];
        for parameter in parameters.split(';').skip(1) {
            let (key, value) = parameter.split_once('=').expect("a parameter");
            assert!(matches!(key, "q" | "w" | "r" | "t"), "{line}");
            assert!(value.len() <= 15 && value.parse::<u64>().is_ok(), "{line}");
        }
    } else {
        assert!(
            line.bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'z' | b'=' | b';' | b',' | b' ')),
            "{line}"
        );
    }
}

/// A rejection of any service, limit, reason and time, over HTTP and gRPC.
fn rejections(input: &mut Unstructured<'_>) -> Result<()> {
    let (cost, burst) = (input.arbitrary()?, input.arbitrary()?);
    let reason = *input.choose(&[
        Reason::Open,
        Reason::HalfOpenFull,
        Reason::ForcedOpen,
        Reason::OverLimit,
        Reason::CostExceedsBurst { cost, burst },
        Reason::MissingKey,
        Reason::Other,
    ])?;
    let mut why = Rejected::new(name(input)?, reason);
    if input.arbitrary()? {
        why = why.limit(name(input)?);
    }
    if input.arbitrary()? {
        why = why.retry_after(duration(input)?);
    }
    let (head, body) = why.to_response().into_parts();
    let Ok(body) = super::ready(body.collect());
    check_problem(&why, head.status, &head.headers, &body.to_bytes(), &Method::GET);
    let (head, body) = why.to_grpc_response().into_parts();
    let Ok(body) = super::ready(body.collect());
    check_grpc(&why, head.status, &head.headers, &body.to_bytes());
    Ok(())
}

fn check_problem(why: &Rejected, status: StatusCode, headers: &HeaderMap, body: &Bytes, method: &Method) {
    assert!(matches!(status.as_u16(), 400 | 429 | 503), "{status}");
    assert_eq!(headers["content-type"], "application/problem+json");
    let length: usize = headers["content-length"]
        .to_str()
        .expect("digits")
        .parse()
        .expect("digits");
    if let Some(seconds) = headers.get("retry-after") {
        let seconds: u64 = seconds.to_str().expect("digits").parse().expect("digits");
        let exact = why.retry_after.expect("it is told because it is known");
        assert!(
            Duration::from_secs(seconds) >= exact || seconds == u64::MAX,
            "{seconds} s are too early"
        );
    }
    if *method == Method::HEAD {
        assert!(body.is_empty(), "a HEAD is answered without a body");
        return;
    }
    assert_eq!(body.len(), length);
    let problem: serde_json::Value = serde_json::from_slice(body).expect("it is JSON");
    assert_eq!(problem["status"], status.as_u16());
    assert_eq!(problem["detail"], why.to_string());
}

fn check_grpc(why: &Rejected, status: StatusCode, headers: &HeaderMap, body: &Bytes) {
    assert_eq!(status, StatusCode::OK);
    assert!(body.is_empty(), "the headers are the trailers");
    let code: u8 = headers["grpc-status"]
        .to_str()
        .expect("digits")
        .parse()
        .expect("digits");
    assert!(matches!(code, 3 | 8 | 14), "{code}");
    let message = headers["grpc-message"].to_str().expect("printable ASCII");
    let message = percent_decode_str(message).decode_utf8().expect("UTF-8");
    assert_eq!(message, why.to_string());
    let details = headers["grpc-status-details-bin"].as_bytes();
    let details = STANDARD_NO_PAD.decode(details).expect("base64");
    check_message(&details, &[u64::from(code)]);
    if let Some(pushback) = headers.get("grpc-retry-pushback-ms") {
        let pushback: i32 = pushback.to_str().expect("a number").parse().expect("a number");
        assert!(pushback >= -1);
    }
}

/// The fields of a protobuf message, one behind the other: numbers and lengths. The first number is one of these.
fn check_message(mut message: &[u8], first: &[u64]) {
    let mut numbers = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message);
        match tag & 7 {
            0 => numbers.push(varint(&mut message)),
            2 => {
                let length = usize::try_from(varint(&mut message)).expect("short");
                message = message.get(length..).expect("as much as it says");
            }
            other => panic!("there is no wire type {other}"),
        }
    }
    assert!(numbers.starts_with(first), "{numbers:?}");
}

fn varint(message: &mut &[u8]) -> u64 {
    let mut number = 0;
    for shift in (0..).step_by(7) {
        let (byte, rest) = message.split_first().expect("a number ends");
        *message = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if *byte < 0x80 {
            break;
        }
    }
    number
}

/// A host is the same in capitals, and with a dot behind it.
fn hosts(input: &mut Unstructured<'_>) -> Result<()> {
    let host = text(input)?;
    let in_host_field = |host: &str| {
        let mut request = Request::new(());
        let value = HeaderValue::from_str(host).ok()?;
        request.headers_mut().insert("host", value);
        Some(hashed(&key::host(), &request))
    };
    let key = in_host_field(&host);
    assert_eq!(in_host_field(&host.to_ascii_uppercase()), key, "{host:?} in capitals");
    let request = request(input)?;
    let _ = hashed(&key::host(), &request);
    if let Ok(header) = key::header(&text(input)?) {
        let _ = hashed(&header, &request);
    }
    Ok(())
}

fn hashed<R>(key: &impl Key<R>, request: &R) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    key.hash_key(request, &mut hasher).then(|| hasher.finish())
}

/// Any templates are refused or serve, and a request of any path meets one policy.
fn routes(input: &mut Unstructured<'_>) -> Result<()> {
    let clock = Clock::manual();
    let limiter = || {
        let bucket = TokenBucket::new(1, Duration::from_secs(60));
        RateLimiter::builder("route", bucket)
            .clock(&clock)
            .build()
            .expect("valid")
    };
    let limiters = [limiter(), limiter(), limiter()];
    let [first, second, other] = limiters.clone();
    let routes = PerRoute::builder()
        .any(format!("/{}", text(input)?), first)
        .route(Method::GET, text(input)?, second)
        .default(other)
        .build();
    let Ok(routes) = routes else { return Ok(()) };
    let Ok(uri) = Uri::try_from(bytes(input)?) else {
        return Ok(());
    };
    let mut request = request(input)?;
    *request.uri_mut() = uri;
    let upstream = Upstream(StatusCode::OK, HeaderMap::new());
    let mut guarded = GuardLayer::new(routes).respond().layer(upstream);
    let _ = call(&mut guarded, &request);
    let asked: u64 = limiters.iter().map(|limiter| limiter.status().accepted_requests).sum();
    assert_eq!(asked, 1, "one policy is asked");
    Ok(())
}
