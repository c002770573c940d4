//! What a rejected caller is answered over HTTP and gRPC, and what an admitted one is told of its limits.
#![cfg(feature = "http")]

use allocation_counter::measure;
use axum::{Router, routing::get};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER},
};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use portcullis::{
    AnswerBody, AsResponse, CircuitBreaker, CircuitBreakerLayer, Clock, GuardLayer, KeyedRateLimiter, ManualClock,
    Name, Outcome, PerRoute, Quota, RateLimitHeaders, RateLimitLayer, RateLimiter, Reason, Rejected, SlidingWindow,
    TokenBucket, Verdict,
    policy::{Admit, Gate, Never, Permit, Policy, Readiness, Reading},
};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};
use tonic_types::StatusExt;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const QUOTA_EXCEEDED: &str = "https://iana.org/assignments/http-problem-types#quota-exceeded";
const REDUCED_CAPACITY: &str = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity";
const FORMS: [RateLimitHeaders; 6] = [
    RateLimitHeaders::Draft11,
    RateLimitHeaders::Draft7,
    RateLimitHeaders::Draft6,
    RateLimitHeaders::XRateLimitEpoch,
    RateLimitHeaders::XRateLimitDelta,
    RateLimitHeaders::Off,
];

fn name(text: &str) -> Name {
    Name::try_from(text).unwrap()
}

fn limiter(clock: &ManualClock, limit: &str, algorithm: TokenBucket) -> RateLimiter {
    let builder = RateLimiter::builder("search", algorithm).limit(limit).clock(clock);
    builder.build().unwrap()
}

fn forced_open() -> CircuitBreaker {
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    breaker.force_open();
    breaker
}

type Inner = Full<Bytes>;
type Answer = Response<AnswerBody<Inner>>;

fn get_it() -> Request<()> {
    Request::new(())
}

fn grpc_call() -> Request<()> {
    let mut request = get_it();
    let grpc = HeaderValue::from_static("application/grpc");
    request.headers_mut().insert(CONTENT_TYPE, grpc);
    request
}

/// One request through a service that answers at once.
fn ask<S, B>(service: &S, request: Request<()>) -> Response<B>
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible> + Clone,
{
    let answer = service.clone().oneshot(request).now_or_never();
    answer.expect("it answers at once").unwrap()
}

/// The same behind a layer.
fn through<L>(layer: L, request: Request<()>) -> Answer
where
    L: Layer<Hello>,
    L::Service: Service<Request<()>, Response = Answer, Error = Infallible> + Clone,
{
    ask(&layer.layer(Hello), request)
}

/// Answers every request with nothing.
#[derive(Clone)]
struct Hello;

impl Service<Request<()>> for Hello {
    type Response = Response<Inner>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Inner>, Infallible>>;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, _: Request<()>) -> Self::Future {
        ready(Ok(Response::new(Full::default())))
    }
}

fn bytes_of<B: Body<Data = Bytes>>(body: B) -> Bytes {
    let collected = body.collect().now_or_never().expect("the body is there at once");
    collected.ok().expect("it does not fail").to_bytes()
}

/// Every value of a header, in order.
fn all(headers: &HeaderMap, name: &str) -> Vec<String> {
    let values = headers.get_all(name).into_iter();
    values.map(|value| value.to_str().expect(name).to_owned()).collect()
}

/// The rate-limit headers, sorted by name.
fn told(headers: &HeaderMap) -> Vec<(String, String)> {
    let ours = headers.iter().filter(|(name, _)| name.as_str().contains("ratelimit"));
    let mut told: Vec<_> = ours
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    told.sort_by(|one, other| one.0.cmp(&other.0));
    told
}

type Lines<'a> = &'a [(&'a str, &'a str)];

#[track_caller]
fn assert_told(headers: &HeaderMap, expected: Lines<'_>) {
    let told = told(headers);
    let told: Vec<_> = told
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    assert_eq!(told, expected);
}

/// A policy that tells these quotas of each call that it admits, or refuses every call so.
#[derive(Clone, Default)]
struct Always {
    refuses: Option<Rejected>,
    tells: Vec<Quota>,
}

impl Always {
    fn refuse(why: Rejected) -> Self {
        Self {
            refuses: Some(why),
            tells: Vec::new(),
        }
    }
    fn tell(tells: Vec<Quota>) -> Self {
        Self { refuses: None, tells }
    }
}

impl Gate for Always {
    type Reserved = ();
    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }
}

impl<Req> Policy<Req> for Always {
    type Permit = Telling;
    type Wait = Never<Telling>;
    fn refusal(&self, (): &(), _: &Req, _: &Reading) -> Option<Rejected> {
        self.refuses.clone()
    }
    fn admit(&self, (): (), _: &Req, _: &Reading) -> Admit<Telling, Never<Telling>> {
        match &self.refuses {
            Some(why) => Admit::Rejected(why.clone()),
            None => Admit::Now(Telling(self.tells.clone())),
        }
    }
}

#[derive(Debug)]
struct Telling(Vec<Quota>);

impl Permit for Telling {
    fn settle(self, _: Verdict, _: &Reading) {}
    fn cancel(self, _: Option<u32>, _: &Reading) {}
    fn unused(self, _: &Reading) {}
    fn quotas(&self, _: &Reading, tell: &mut dyn FnMut(Quota)) {
        self.0.iter().cloned().for_each(tell);
    }
}

fn quota(limit: &str, quota: u64, remaining: u64, reset: Duration) -> Quota {
    let mut told = Quota::new(name(limit), 1, MINUTE);
    (told.quota, told.remaining, told.reset) = (quota, remaining, reset);
    told
}

// ---- Rate-limit headers ------------------------------------------------------------------------------------------------------

#[test]
fn each_form_tells_the_quota_on_admitted_and_on_rejected_answers() {
    let expected: [(_, Lines<'_>, Lines<'_>); 5] = [
        (
            RateLimitHeaders::Draft11,
            &[
                ("ratelimit", r#""per-minute";r=1;t=30"#),
                ("ratelimit-policy", r#""per-minute";q=2;w=60"#),
            ],
            &[
                ("ratelimit", r#""per-minute";r=0;t=29"#),
                ("ratelimit-policy", r#""per-minute";q=2;w=60"#),
            ],
        ),
        (
            RateLimitHeaders::Draft7,
            &[
                ("ratelimit", "limit=2, remaining=1, reset=30"),
                ("ratelimit-policy", "2;w=60"),
            ],
            &[
                ("ratelimit", "limit=2, remaining=0, reset=29"),
                ("ratelimit-policy", "2;w=60"),
            ],
        ),
        (
            RateLimitHeaders::Draft6,
            &[
                ("ratelimit-limit", "2"),
                ("ratelimit-policy", "2;w=60"),
                ("ratelimit-remaining", "1"),
                ("ratelimit-reset", "30"),
            ],
            &[
                ("ratelimit-limit", "2"),
                ("ratelimit-policy", "2;w=60"),
                ("ratelimit-remaining", "0"),
                ("ratelimit-reset", "29"),
            ],
        ),
        (
            RateLimitHeaders::XRateLimitDelta,
            &[
                ("x-ratelimit-limit", "2"),
                ("x-ratelimit-remaining", "1"),
                ("x-ratelimit-reset", "30"),
            ],
            &[
                ("x-ratelimit-limit", "2"),
                ("x-ratelimit-remaining", "0"),
                ("x-ratelimit-reset", "29"),
            ],
        ),
        (RateLimitHeaders::Off, &[], &[]),
    ];
    for (form, admitted, rejected) in expected {
        for request in [get_it, grpc_call] {
            let clock = Clock::manual();
            let limiter = limiter(&clock, "per-minute", TokenBucket::new(2, MINUTE));
            let service = RateLimitLayer::new(limiter).respond().headers(form).layer(Hello);
            assert_told(ask(&service, request()).headers(), admitted);
            ask(&service, request());
            clock.advance(Duration::from_millis(1_500));
            let answer = ask(&service, request());
            assert_told(answer.headers(), rejected);
            let retry_after = answer.headers().get(RETRY_AFTER).map(|value| value.to_str().unwrap());
            let grpc = answer.headers().contains_key("grpc-status");
            assert_eq!(
                retry_after,
                (!grpc).then_some("29"),
                "the wait of 28.5 s, as the quota has it"
            );
        }
    }
}

/// Without a word about the headers: what the layers of both protocols do by themselves.
#[test]
fn http_and_grpc_layers_tell_their_limits_on_admitted_and_on_rejected_answers() {
    let clock = Clock::manual();
    let limit = || limiter(&clock, "search", TokenBucket::new(1, Duration::from_secs(60)));
    let (http, grpc) = (
        RateLimitLayer::http(limit()).layer(Hello),
        RateLimitLayer::grpc(limit()).layer(Hello),
    );
    for _ in ["admitted", "rejected"] {
        for headers in [ask(&http, get_it()).headers(), ask(&grpc, grpc_call()).headers()] {
            assert_eq!(all(headers, "ratelimit-policy"), [r#""search";q=1;w=60"#]);
            assert_eq!(all(headers, "ratelimit"), [r#""search";r=0;t=60"#]);
        }
    }
}

#[test]
fn limits_for_keys_and_routes_tell_what_a_plain_one_tells() {
    fn check<P>(policy: &P)
    where
        P: Policy<Request<()>, Wait = Never<<P as Policy<Request<()>>>::Permit>> + Clone,
    {
        let [answer, _, refused] = [(); 3].map(|()| through(GuardLayer::new(policy.clone()).respond(), get_it()));
        let policy = ("ratelimit-policy", r#""per-minute";q=2;w=60"#);
        assert_told(answer.headers(), &[("ratelimit", r#""per-minute";r=1;t=30"#), policy]);
        assert_told(refused.headers(), &[("ratelimit", r#""per-minute";r=0;t=30"#), policy]);
    }
    let clock = Clock::manual();
    let algorithm = TokenBucket::new(2, MINUTE);
    let plain = || limiter(&clock, "per-minute", algorithm);
    check(&plain());
    let picked = plain();
    check(&portcullis::policy::select(move |_: &Request<()>| Some(picked.clone())));
    check(&PerRoute::builder().any("/", plain()).build().unwrap());
    let keys = KeyedRateLimiter::builder("search", algorithm).limit("per-minute");
    let keys = keys.clock(&clock).build().unwrap();
    check(&keys.by(|_: &Request<()>| Some(7)));
    check(&keys.by(|_: &Request<()>| None::<u32>));
}

#[test]
fn an_epoch_reset_lies_after_2025() {
    let clock = Clock::manual();
    let limiter = limiter(&clock, "per-minute", TokenBucket::new(2, MINUTE));
    let service = RateLimitLayer::new(limiter)
        .respond()
        .headers(RateLimitHeaders::XRateLimitEpoch);
    let headers = told(ask(&service.layer(Hello), get_it()).headers());
    assert_eq!(headers[0], ("x-ratelimit-limit".into(), "2".into()));
    assert_eq!(headers[1], ("x-ratelimit-remaining".into(), "1".into()));
    assert_eq!(headers[2].0, "x-ratelimit-reset");
    assert!(headers[2].1.parse::<u64>().unwrap() > 1_735_689_600, "{headers:?}");
}

/// The lines of two limits, in a pair, and each in a layer of its own.
fn lines_of_both(form: RateLimitHeaders, limits: [(&str, u32); 2]) -> [HeaderMap; 2] {
    let clock = Clock::manual();
    let pair = || limits.map(|(limit, quota)| limiter(&clock, limit, TokenBucket::new(quota, MINUTE)));
    let [one, other] = pair();
    let service = GuardLayer::new((one, other)).respond().headers(form).layer(Hello);
    let paired = ask(&service, get_it()).headers().clone();
    let [one, other] = pair();
    let service = ServiceBuilder::new()
        .layer(GuardLayer::new(other).respond().headers(form))
        .layer(GuardLayer::new(one).respond().headers(form))
        .service(Hello);
    [paired, ask(&service, get_it()).headers().clone()]
}

#[test]
fn the_limits_of_a_pair_and_of_nested_layers_add_up_in_lists() {
    for headers in lines_of_both(RateLimitHeaders::Draft11, [("burst", 10), ("daily", 20)]) {
        assert_eq!(
            all(&headers, "ratelimit"),
            [r#""burst";r=9;t=6"#, r#""daily";r=19;t=3"#]
        );
        let policies = [r#""burst";q=10;w=60"#, r#""daily";q=20;w=60"#];
        assert_eq!(all(&headers, "ratelimit-policy"), policies);
    }
}

#[test]
fn where_one_limit_can_stand_it_is_the_one_with_the_least_remaining() {
    for limits in [[("burst", 10), ("daily", 20)], [("daily", 20), ("burst", 10)]] {
        for headers in lines_of_both(RateLimitHeaders::Draft7, limits) {
            assert_eq!(all(&headers, "ratelimit"), ["limit=10, remaining=9, reset=6"]);
            let policies = limits.map(|(_, quota)| format!("{quota};w=60"));
            assert_eq!(all(&headers, "ratelimit-policy"), policies, "the policies are a list");
        }
        for headers in lines_of_both(RateLimitHeaders::Draft6, limits) {
            assert_eq!(all(&headers, "ratelimit-limit"), ["10"]);
            assert_eq!(all(&headers, "ratelimit-remaining"), ["9"]);
            assert_eq!(all(&headers, "ratelimit-reset"), ["6"]);
        }
        for headers in lines_of_both(RateLimitHeaders::XRateLimitDelta, limits) {
            let told = told(&headers).into_iter().map(|(_, value)| value);
            assert_eq!(told.collect::<Vec<_>>(), ["10", "9", "6"]);
        }
    }
    // Of two alike, the one that resets later.
    for resets in [[3, 7], [7, 3]] {
        let tells = resets.map(|reset| quota("api", 5, 1, SECOND * reset)).to_vec();
        let layer = GuardLayer::new(Always::tell(tells)).respond();
        let answer = through(layer.headers(RateLimitHeaders::Draft7), get_it());
        assert_eq!(all(answer.headers(), "ratelimit"), ["limit=5, remaining=1, reset=7"]);
    }
}

#[test]
fn an_upstreams_single_value_stands_if_it_is_tighter_and_yields_if_it_is_not_or_makes_no_sense() {
    for (said, stands) in [
        ("0", true),
        ("5", true),
        ("6", false),
        ("-1", false),
        ("many", false),
        ("", false),
        ("99999999999999999999999", false),
        ("\u{ff}", false),
    ] {
        let upstream = service_fn(move |_: Request<()>| {
            let mut response = Response::new(Inner::default());
            let headers = response.headers_mut();
            let value = HeaderValue::from_bytes(said.as_bytes()).unwrap();
            headers.insert("x-ratelimit-remaining", value);
            headers.insert("x-ratelimit-reset", 60.into());
            let member = HeaderValue::from_bytes(format!("limit=9,remaining={said},reset=60").as_bytes()).unwrap();
            headers.insert("ratelimit", member);
            ready(Ok::<_, Infallible>(response))
        });
        let policy = Always::tell(vec![quota("api", 9, 5, SECOND)]);
        let told = |form| {
            let layer = GuardLayer::new(policy.clone()).respond().headers(form);
            ask(&layer.layer(upstream), get_it())
        };
        let answer = told(RateLimitHeaders::XRateLimitDelta);
        let ours = answer.headers()["x-ratelimit-remaining"] == "5" && answer.headers()["x-ratelimit-reset"] == "1";
        assert_eq!(!ours, stands, "upstream says {said:?} remain");
        let answer = told(RateLimitHeaders::Draft7);
        let ours = answer.headers()["ratelimit"] == "limit=9, remaining=5, reset=1";
        assert_eq!(!ours, stands, "upstream says {said:?} remain");
    }
}

#[test]
fn an_upstream_that_tells_no_reset_yields_where_as_little_remains() {
    for (remaining, stands) in [(4, true), (5, false)] {
        let upstream = service_fn(move |_: Request<()>| {
            let mut response = Response::new(Inner::default());
            response.headers_mut().insert("x-ratelimit-remaining", remaining.into());
            ready(Ok::<_, Infallible>(response))
        });
        let layer = GuardLayer::new(Always::tell(vec![quota("api", 9, 5, SECOND)])).respond();
        let layer = layer.headers(RateLimitHeaders::XRateLimitDelta);
        let answer = ask(&layer.layer(upstream), get_it());
        let reset = answer.headers().get("x-ratelimit-reset");
        assert_eq!(reset.is_none(), stands, "upstream says {remaining} remain");
    }
}

#[test]
fn an_upstreams_dictionary_is_read_over_several_lines_and_with_parameters() {
    for (lines, stands) in [
        (&["limit=9, remaining=4, reset=60"][..], true),
        (&["limit=9", "remaining=4", "reset=60"], true),
        (&["limit=9", "remaining=6", "reset=60"], false),
        (&["limit=9,remaining=4;scope=\"a\",reset=60"], true),
        // What stands in a string is no member.
        (&[r#"limit=9, remaining=4;scope="a, remaining=6, b", reset=60"#], true),
        (&[r#"limit=9, remaining=6;scope="a, remaining=4, b", reset=60"#], false),
        (
            &[r#"limit=9, remaining=4;scope="a\\\", remaining=6, b", reset=60"#],
            true,
        ),
        (&[r#"limit=9, remaining=4;scope="a\\", remaining=6, reset=60"#], false),
        // Of a key that comes twice, the last counts.
        (&["limit=9, remaining=4", "remaining=6, reset=60"], false),
        (&["limit=9, remaining=6", "remaining=4, reset=60"], true),
    ] {
        let upstream = service_fn(move |_: Request<()>| {
            let mut response = Response::new(Inner::default());
            for line in lines {
                response
                    .headers_mut()
                    .append("ratelimit", HeaderValue::from_static(line));
            }
            ready(Ok::<_, Infallible>(response))
        });
        let layer = GuardLayer::new(Always::tell(vec![quota("api", 9, 5, SECOND)])).respond();
        let answer = ask(&layer.headers(RateLimitHeaders::Draft7).layer(upstream), get_it());
        let ours = ["limit=9, remaining=5, reset=1"];
        let expected = if stands { lines } else { &ours };
        assert_eq!(all(answer.headers(), "ratelimit"), expected);
    }
}

#[test]
fn windows_below_a_second_are_told_as_a_second() {
    let clock = Clock::manual();
    let limit = limiter(&clock, "bursts", TokenBucket::new(10, Duration::from_millis(100)));
    let service = RateLimitLayer::new(limit).respond().layer(Hello);
    assert_told(
        ask(&service, get_it()).headers(),
        &[
            ("ratelimit", r#""bursts";r=9;t=1"#),
            ("ratelimit-policy", r#""bursts";q=100;w=1"#),
        ],
    );
    // A policy of one's own may say anything.
    let mut odd = quota("odd", 3, 2, Duration::from_nanos(1));
    odd.window = Duration::ZERO;
    let answer = through(GuardLayer::new(Always::tell(vec![odd])).respond(), get_it());
    assert_told(
        answer.headers(),
        &[
            ("ratelimit", r#""odd";r=2;t=1"#),
            ("ratelimit-policy", r#""odd";q=3;w=1"#),
        ],
    );
}

#[test]
fn the_largest_quotas_fit_into_the_integers_of_structured_fields() {
    let clock = Clock::manual();
    let limit = limiter(
        &clock,
        "all",
        TokenBucket::new(u32::MAX, Duration::from_secs(86_400 * 365)),
    );
    let service = RateLimitLayer::new(limit).respond().layer(Hello);
    assert_told(
        ask(&service, get_it()).headers(),
        &[
            ("ratelimit", r#""all";r=4294967294;t=1"#),
            ("ratelimit-policy", r#""all";q=4294967295;w=31536000"#),
        ],
    );
    let mut endless = quota("all", u64::MAX, u64::MAX, Duration::MAX);
    endless.window = Duration::MAX;
    for form in FORMS {
        let layer = GuardLayer::new(Always::tell(vec![endless.clone()])).respond();
        let answer = through(layer.headers(form), get_it());
        let told = told(answer.headers());
        for (name, value) in &told {
            let numbers = value.split(|c: char| !c.is_ascii_digit());
            for number in numbers.filter(|number| !number.is_empty()) {
                assert_eq!(number, "999999999999999", "{name}: {value}");
            }
        }
        assert_eq!(told.is_empty(), form == RateLimitHeaders::Off);
    }
}

/// Reads an item of draft 11 back: the name, percent-decoded, and the rest.
fn sf_item(line: &str) -> (Vec<u8>, String) {
    let mut characters = line.strip_prefix('"').expect("a string in quotes").chars();
    let mut name = String::new();
    loop {
        match characters.next().expect("a closing quote") {
            '"' => break,
            '\\' => {
                let escaped = characters.next().unwrap();
                assert!(matches!(escaped, '"' | '\\'), "{escaped} is not escaped");
                name.push(escaped);
            }
            character => {
                assert!(matches!(character, ' '..='~'), "{character:?} in {line}");
                name.push(character);
            }
        }
    }
    let name = percent_encoding::percent_decode_str(&name).collect();
    (name, characters.collect())
}

#[test]
fn names_are_escaped_as_structured_strings() {
    for (limit, written) in [
        (r#"a"b\c"#, r#""a\"b\\c""#),
        ("per minute; q=9", r#""per minute; q=9""#),
        ("größe", r#""gr%C3%B6%C3%9Fe""#),
        (" !#[]{|}~", r#"" !#[]{|}~""#),
        // Else it would be read as another.
        ("a%0Ab", r#""a%250Ab""#),
        ("a\r\nset-cookie: b\0\u{7f}", r#""a%0D%0Aset-cookie: b%00%7F""#),
    ] {
        let tells = vec![quota(limit, 9, 5, SECOND)];
        let answer = through(GuardLayer::new(Always::tell(tells)).respond(), get_it());
        assert_eq!(all(answer.headers(), "ratelimit"), [format!("{written};r=5;t=1")]);
        assert_eq!(
            all(answer.headers(), "ratelimit-policy"),
            [format!("{written};q=9;w=60")]
        );
    }
}

proptest! {
    #[test]
    fn any_name_of_a_limit_comes_through_in_every_form(service in "\\PC{1,60}|[\\x00-\\x7f]{1,255}", limit in "(?s).{1,60}|[\\x00-\\x7f]{1,255}") {
        let why = Rejected::new(name(&service), Reason::OverLimit).limit(name(&limit)).retry_after(SECOND);
        let problem: Value = serde_json::from_slice(&bytes_of(why.to_response().into_body())).unwrap();
        prop_assert_eq!(&problem["violated-policies"], &json!([limit]));
        prop_assert_eq!(problem["detail"].as_str(), Some(&*why.to_string()));

        let response = why.to_grpc_response();
        let status = tonic::Status::from_header_map(response.headers()).unwrap();
        let message = why.to_string();
        prop_assert_eq!(status.message(), &*message);
        let details = status.get_error_details();
        prop_assert_eq!(&details.error_info().unwrap().metadata["service"], &service);
        prop_assert_eq!(&details.quota_failure().unwrap().violations[0].subject, &limit);

        for form in FORMS {
            let layer = GuardLayer::new(Always::tell(vec![quota(&limit, 9, 5, SECOND)])).respond();
            let answer = through(layer.headers(form), get_it());
            if form == RateLimitHeaders::Draft11 {
                let line = all(answer.headers(), "ratelimit").remove(0);
                prop_assert_eq!(sf_item(&line), (limit.clone().into_bytes(), ";r=5;t=1".to_owned()));
            }
        }
    }
}

#[test]
fn a_response_that_is_full_of_headers_goes_out_without_more() {
    let full = service_fn(|_: Request<()>| {
        let mut response = Response::new(Inner::default());
        let header = |at: usize| http::HeaderName::try_from(format!("x-{at}")).unwrap();
        let one = HeaderValue::from_static("1");
        let headers = response.headers_mut();
        while headers.try_insert(header(headers.len()), one.clone()).is_ok() {}
        ready(Ok::<_, Infallible>(response))
    });
    for form in FORMS {
        let layer = GuardLayer::new(Always::tell(vec![quota("api", 9, 5, SECOND); 2])).respond();
        let answer = ask(&layer.headers(form).layer(full), get_it());
        assert!(answer.headers().len() >= 24_576, "{form:?}");
    }
}

// ---- Answers over HTTP -------------------------------------------------------------------------------------------------------

#[test]
fn a_rejection_is_a_problem_with_the_status_of_its_reason() {
    let rejected = |reason| Rejected::new(name("search"), reason);
    let limited = |reason| rejected(reason).limit(name("per-ip"));
    let over_burst = Reason::CostExceedsBurst { cost: 9, burst: 4 };
    let wait = Duration::from_nanos(11_339_000_001);
    let quota = "Request cannot be satisfied as assigned quota has been exceeded";
    let capacity = "Request cannot be satisfied due to temporary server capacity constraints";
    for (why, retry_after, mut expected) in [
        (
            limited(Reason::OverLimit).retry_after(wait),
            Some("12"),
            json!({
                "type": QUOTA_EXCEEDED, "title": quota, "status": 429, "violated-policies": ["per-ip"],
                "retry-after-ms": 11_340,
            }),
        ),
        (
            limited(over_burst).retry_after(wait),
            None,
            json!({ "type": QUOTA_EXCEEDED, "title": quota, "status": 429, "violated-policies": ["per-ip"] }),
        ),
        (
            limited(Reason::Other),
            None,
            json!({ "type": QUOTA_EXCEEDED, "title": quota, "status": 429, "violated-policies": ["per-ip"] }),
        ),
        (
            limited(Reason::Open).retry_after(MINUTE),
            Some("60"),
            json!({
                "type": QUOTA_EXCEEDED, "title": quota, "status": 429, "violated-policies": ["per-ip"],
                "retry-after-ms": 60_000,
            }),
        ),
        (
            rejected(Reason::Open).retry_after(MINUTE),
            Some("60"),
            json!({
                "type": REDUCED_CAPACITY, "title": capacity, "status": 503, "violated-policies": ["search"],
                "retry-after-ms": 60_000, "circuit": "search", "circuit-state": "open",
            }),
        ),
        (
            rejected(Reason::HalfOpenFull).retry_after(Duration::from_micros(1)),
            Some("1"),
            json!({
                "type": REDUCED_CAPACITY, "title": capacity, "status": 503, "violated-policies": ["search"],
                "retry-after-ms": 1, "circuit": "search", "circuit-state": "half_open",
            }),
        ),
        (
            rejected(Reason::ForcedOpen),
            None,
            json!({
                "type": REDUCED_CAPACITY, "title": capacity, "status": 503, "violated-policies": ["search"],
                "circuit": "search", "circuit-state": "forced_open",
            }),
        ),
        (
            rejected(Reason::Other).retry_after(Duration::ZERO),
            Some("1"),
            json!({
                "type": REDUCED_CAPACITY, "title": capacity, "status": 503, "violated-policies": ["search"],
                "retry-after-ms": 0,
            }),
        ),
        (
            limited(Reason::MissingKey).retry_after(wait),
            None,
            json!({ "type": "about:blank", "title": "Bad Request", "status": 400 }),
        ),
    ] {
        expected["detail"] = why.to_string().into();
        let answers = [
            why.to_response().map(bytes_of),
            through(GuardLayer::new(Always::refuse(why.clone())).respond(), get_it()).map(bytes_of),
        ];
        for answer in answers {
            let problem: Value = serde_json::from_slice(answer.body()).unwrap();
            assert_eq!(problem, expected, "{why}");
            assert_eq!(u64::from(answer.status().as_u16()), expected["status"], "{why}");
            let headers = answer.headers();
            assert_eq!(headers[CONTENT_TYPE], "application/problem+json");
            assert_eq!(headers[CACHE_CONTROL], "no-store");
            assert_eq!(headers[CONTENT_LENGTH], answer.body().len().to_string());
            assert_eq!(
                headers.get(RETRY_AFTER).map(|value| value.to_str().unwrap()),
                retry_after
            );
            assert_eq!(answer.extensions().get::<Rejected>(), Some(&why), "for layers outside");
        }
    }
}

#[test]
fn a_cost_above_the_burst_tells_the_quota_and_no_time() {
    let clock = Clock::manual();
    let limit = limiter(&clock, "tokens", TokenBucket::new(10, MINUTE));
    let policy = limit.cost(|_: &Request<()>| 11);
    let answer = |form| through(GuardLayer::new(policy.clone()).respond().headers(form), get_it());
    let draft_11 = answer(RateLimitHeaders::Draft11);
    assert_eq!(draft_11.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(!draft_11.headers().contains_key(RETRY_AFTER));
    assert_told(
        draft_11.headers(),
        &[
            ("ratelimit", r#""tokens";r=10"#),
            ("ratelimit-policy", r#""tokens";q=10;w=60"#),
        ],
    );
    let problem = String::from_utf8(bytes_of(draft_11.into_body()).to_vec()).unwrap();
    assert!(
        problem.contains("admits at most 10 at once and was asked for 11"),
        "{problem}"
    );
    let draft_7 = answer(RateLimitHeaders::Draft7);
    assert_eq!(draft_7.headers()["ratelimit"], "limit=10, remaining=10, reset=60");
}

#[test]
fn a_cost_that_what_is_left_does_not_cover_tells_what_is_left() {
    let clock = Clock::manual();
    let limit = RateLimiter::builder("search", SlidingWindow::new(10, MINUTE)).clock(&clock);
    let limit = limit.build().unwrap();
    limit.try_acquire_n(7).unwrap();
    let policy = limit.cost(|_: &Request<()>| 5);
    let answer = through(GuardLayer::new(policy).respond(), get_it());
    assert_eq!(answer.headers()["ratelimit"], r#""default";r=3;t=60"#);
    assert_eq!(answer.headers()[RETRY_AFTER], "60");
}

#[test]
fn the_answer_to_a_head_has_the_headers_of_a_get_and_no_body() {
    let layer = CircuitBreakerLayer::new(forced_open()).respond();
    let get = through(layer.clone(), get_it());
    let head = through(layer, Request::head("/").body(()).unwrap());
    assert_eq!(head.headers(), get.headers());
    assert_ne!(head.headers()[CONTENT_LENGTH], "0");
    assert!(head.body().is_end_stream());
    assert!(bytes_of(head.into_body()).is_empty());
    for method in [
        Method::POST,
        Method::OPTIONS,
        Method::CONNECT,
        Method::from_bytes(b"X").unwrap(),
    ] {
        let request = Request::builder().method(method).body(()).unwrap();
        let answer = through(CircuitBreakerLayer::new(forced_open()).respond(), request);
        assert!(!bytes_of(answer.into_body()).is_empty());
    }
}

#[test]
fn errors_of_the_inner_service_pass_unchanged() {
    #[derive(Debug)]
    struct NotSend(#[expect(dead_code, reason = "there to be neither Send nor Sync")] Rc<()>);
    type Failure = Result<Response<Inner>, NotSend>;
    let inner = service_fn(|_: Request<()>| ready::<Failure>(Err(NotSend(Rc::new(())))));
    let policy = Always::tell(vec![quota("api", 9, 5, SECOND)]);
    let service = GuardLayer::new(policy).respond().layer(inner);
    let result: Result<_, NotSend> = service.oneshot(get_it()).now_or_never().unwrap();
    result.unwrap_err();
}

#[test]
fn nothing_is_allocated_for_an_admitted_call_whose_headers_are_off() {
    let clock = Clock::manual();
    let limit = limiter(&clock, "per-minute", TokenBucket::new(100, MINUTE));
    for (form, allocates) in [(RateLimitHeaders::Off, false), (RateLimitHeaders::Draft11, true)] {
        let layer = RateLimitLayer::new(limit.clone()).respond().headers(form);
        let mut service = layer.layer(Hello);
        let mut call = || {
            let request = get_it();
            let mut answer = None;
            let info = measure(|| {
                let _ = service.ready().now_or_never();
                answer = service.call(request).now_or_never();
            });
            assert_eq!(answer.unwrap().unwrap().status(), StatusCode::OK);
            info.count_total
        };
        call();
        assert_eq!(call() > 0, allocates, "{form:?}");
    }
}

// ---- Bodies ------------------------------------------------------------------------------------------------------------------

/// A body of its own kind: neither `Default` nor `Clone` nor `Send`.
struct Local(Rc<str>);

impl Body for Local {
    type Data = Bytes;
    type Error = Infallible;
    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = Bytes::copy_from_slice(self.0.as_bytes());
        let frame = (!bytes.is_empty()).then(|| Ok(Frame::data(bytes)));
        self.get_mut().0 = "".into();
        Poll::Ready(frame)
    }
}

struct Anything;

#[test]
fn the_inner_body_is_asked_for_nothing() {
    let breaker = CircuitBreaker::builder("search").build().unwrap();
    let inner = service_fn(|_: Request<()>| ready(Ok::<_, Infallible>(Response::new(Local("hello".into())))));
    let service = CircuitBreakerLayer::new(breaker.clone()).respond().layer(inner);
    assert_eq!(bytes_of(ask(&service, get_it()).into_body()), "hello");
    breaker.force_open();
    let answer = ask(&service, get_it());
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(bytes_of(answer.into_body()).starts_with(b"{"));

    // A stream may be pinned and tied to its thread, also where its end is judged.
    breaker.reset();
    let inner = service_fn(|_: Request<()>| {
        let text: Rc<str> = "streamed".into();
        let piece = async move { Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(text.as_bytes()))) };
        let body = StreamBody::new(futures_util::stream::once(piece));
        ready(Ok::<_, Infallible>(Response::new(body)))
    });
    let service = CircuitBreakerLayer::http(breaker.clone()).layer(inner);
    assert_eq!(bytes_of(ask(&service, get_it()).into_body()), "streamed");
    assert_eq!(breaker.status().metrics.successful_requests, 2);
    breaker.force_open();

    // Not even to be a body.
    let inner = service_fn(|_: Request<()>| ready(Ok::<_, Infallible>(Response::new(Anything))));
    let service = CircuitBreakerLayer::new(breaker).respond().layer(inner);
    let _: AnswerBody<Anything> = ask(&service, get_it()).into_body();
}

#[test]
fn an_inner_body_passes_with_its_data_its_trailers_its_errors_and_its_size() {
    fn passed<B: Body<Data = Bytes> + 'static>(make: impl Fn() -> B + Clone) -> AnswerBody<B> {
        let inner = service_fn(move |_: Request<()>| ready(Ok::<_, Infallible>(Response::new(make()))));
        let service = GuardLayer::new(Always::default()).respond().layer(inner);
        ask(&service, get_it()).into_body()
    }
    let frames = || {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", 0.into());
        let frames = [
            Ok(Frame::data(Bytes::from("one"))),
            Ok(Frame::trailers(trailers)),
            Err("reset"),
        ];
        StreamBody::new(futures_util::stream::iter(frames))
    };
    let mut body = passed(frames);
    let mut next = || body.frame().now_or_never().unwrap();
    assert_eq!(next().unwrap().unwrap().into_data().unwrap(), "one");
    assert_eq!(next().unwrap().unwrap().into_trailers().unwrap()["grpc-status"], "0");
    assert_eq!(next().unwrap().unwrap_err(), "reset");
    assert!(next().is_none());

    let full = passed(|| Full::new(Bytes::from("hello")));
    assert_eq!((full.size_hint().exact(), full.is_end_stream()), (Some(5), false));
    let empty = passed(Empty::<Bytes>::new);
    assert_eq!((empty.size_hint().exact(), empty.is_end_stream()), (Some(0), true));
    let unknown = passed(frames);
    assert_eq!((unknown.size_hint().exact(), unknown.is_end_stream()), (None, false));
    assert_eq!(unknown.size_hint().lower(), SizeHint::new().lower());
}

#[test]
fn the_body_of_a_rejection_is_one_frame_of_known_size() {
    let mut body = through(CircuitBreakerLayer::new(forced_open()).respond(), get_it()).into_body();
    let size = body.size_hint().exact().unwrap();
    assert!(size > 0 && !body.is_end_stream());
    let frame = body.frame().now_or_never().unwrap().unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap().len() as u64, size);
    assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(0), true));
    assert!(body.frame().now_or_never().unwrap().is_none());
    let empty = AnswerBody::<Inner>::default();
    assert_eq!((empty.size_hint().exact(), empty.is_end_stream()), (Some(0), true));
}

// ---- Answers over gRPC -------------------------------------------------------------------------------------------------------

/// The details, as a tonic client reads them.
#[track_caller]
fn assert_details(
    headers: &HeaderMap,
    why: &Rejected,
    code: i32,
    delay: Option<Duration>,
    reason: &str,
    metadata: &[(&str, &str)],
) {
    let status = tonic::Status::from_header_map(headers).unwrap();
    assert_eq!((status.code(), status.message()), (code.into(), &*why.to_string()));
    let details = status.get_error_details();
    let retry = details.retry_info().and_then(|info| info.retry_delay);
    assert_eq!(retry, delay, "{why}");
    let info = details.error_info().unwrap();
    assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason, "portcullis"));
    let metadata = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    assert_eq!(info.metadata, metadata.collect(), "{why}");
    let violation = details.quota_failure().map(|failure| &failure.violations[0]);
    assert_eq!(violation.is_some(), code == 8, "{why}");
    if let Some(violation) = violation {
        assert_eq!((&*violation.subject, &*violation.quota_id), ("per-user", "per-user"));
        assert_eq!(
            (&*violation.api_service, &violation.description),
            ("search", &why.to_string())
        );
    }
}

#[test]
fn a_grpc_call_is_rejected_in_its_headers_with_decodable_details() {
    let rejected = |reason| Rejected::new(name("search"), reason);
    let limited = |reason| rejected(reason).limit(name("per-user"));
    let over_burst = Reason::CostExceedsBurst { cost: 9, burst: 4 };
    let wait = Duration::from_nanos(1_499_000_001);
    let endless = Duration::MAX;
    let ages = Duration::from_secs(315_576_000_000);
    let of_limit = [("service", "search"), ("limit", "per-user")];
    let of_circuit = |state| vec![("service", "search"), ("circuit-state", state)];
    for (why, code, pushback, delay, reason, metadata) in [
        (
            limited(Reason::OverLimit).retry_after(wait),
            8,
            Some("1500"),
            Some(wait),
            "RATE_LIMITED",
            of_limit.to_vec(),
        ),
        (
            limited(Reason::OverLimit).retry_after(endless),
            8,
            Some("2147483647"),
            Some(ages),
            "RATE_LIMITED",
            of_limit.to_vec(),
        ),
        (
            limited(over_burst),
            8,
            Some("-1"),
            None,
            "COST_EXCEEDS_BURST",
            of_limit.to_vec(),
        ),
        (
            limited(Reason::MissingKey),
            3,
            Some("-1"),
            None,
            "MISSING_KEY",
            of_limit.to_vec(),
        ),
        (
            rejected(Reason::Open).retry_after(MINUTE),
            14,
            Some("60000"),
            Some(MINUTE),
            "CIRCUIT_OPEN",
            of_circuit("open"),
        ),
        (
            rejected(Reason::HalfOpenFull).retry_after(Duration::ZERO),
            14,
            Some("0"),
            Some(Duration::ZERO),
            "CIRCUIT_HALF_OPEN",
            of_circuit("half_open"),
        ),
        (
            rejected(Reason::ForcedOpen),
            14,
            Some("-1"),
            None,
            "CIRCUIT_FORCED_OPEN",
            of_circuit("forced_open"),
        ),
        (
            rejected(Reason::Other),
            14,
            None,
            None,
            "REJECTED",
            vec![("service", "search")],
        ),
    ] {
        let answers = [
            why.to_grpc_response().map(bytes_of),
            through(GuardLayer::new(Always::refuse(why.clone())).respond(), grpc_call()).map(bytes_of),
        ];
        for answer in answers {
            assert_eq!((answer.status(), &answer.body()[..]), (StatusCode::OK, &[][..]));
            assert_eq!(answer.extensions().get::<Rejected>(), Some(&why));
            let headers = answer.headers();
            assert_eq!(headers[CONTENT_TYPE], "application/grpc");
            assert_eq!(headers["grpc-status"], code.to_string(), "{why}");
            assert!(!headers["grpc-status-details-bin"].to_str().unwrap().ends_with('='));
            for absent in [RETRY_AFTER, CONTENT_LENGTH, CACHE_CONTROL] {
                assert!(!headers.contains_key(&absent), "{absent} belongs to HTTP");
            }
            let value = |value: &HeaderValue| value.to_str().unwrap().to_owned();
            let told = headers.get("grpc-retry-pushback-ms").map(value);
            assert_eq!(told.as_deref(), pushback, "{why}");

            assert_details(headers, &why, code, delay, reason, &metadata);
        }
    }
}

#[test]
fn a_policy_of_ones_own_may_tell_a_time_and_a_limit_with_any_reason() {
    let forced = Rejected::new(name("search"), Reason::ForcedOpen).retry_after(MINUTE);
    let limit = Rejected::new(name("search"), Reason::HalfOpenFull).limit(name("per-user"));
    let limit = limit.retry_after(MINUTE);
    let circuit = [("service", "search"), ("circuit-state", "forced_open")];
    let of_limit = [("service", "search"), ("limit", "per-user")];
    for (why, code, reason, metadata) in [
        (forced, 14, "CIRCUIT_FORCED_OPEN", circuit),
        (limit, 8, "CIRCUIT_HALF_OPEN", of_limit),
    ] {
        let answer = why.to_grpc_response();
        assert_eq!(answer.headers()["grpc-retry-pushback-ms"], "60000");
        assert_details(answer.headers(), &why, code, Some(MINUTE), reason, &metadata);
    }
}

#[test]
fn a_status_message_is_percent_encoded_byte_for_byte() {
    for (service, written) in [
        ("a b$&'~", r#"policy "a b$&'~" refuses"#),
        ("100% größe", r#"policy "100%25 gr%C3%B6%C3%9Fe" refuses"#),
        ("%41\u{1f980}", r#"policy "%2541%F0%9F%A6%80" refuses"#),
        // The text itself writes controls as Rust does.
        ("a\r\nb\u{7f}", r#"policy "a\r\nb\u{7f}" refuses"#),
    ] {
        let response = Rejected::new(name(service), Reason::Other).to_grpc_response();
        assert_eq!(response.headers()["grpc-message"], written);
    }
}

#[test]
fn a_quota_failure_tells_the_quota() {
    let clock = Clock::manual();
    let limit = limiter(&clock, "per-minute", TokenBucket::new(u32::MAX, MINUTE));
    limit.try_acquire_n(u32::MAX).unwrap();
    let answer = through(RateLimitLayer::new(limit).respond(), grpc_call());
    let status = tonic::Status::from_header_map(answer.headers()).unwrap();
    let details = status.get_error_details();
    let violation = &details.quota_failure().unwrap().violations[0];
    assert_eq!(violation.quota_value, i64::from(u32::MAX));
    assert_eq!(answer.headers()["ratelimit"], r#""per-minute";r=0;t=1"#);
}

#[test]
fn a_request_is_grpc_if_its_content_type_begins_so() {
    for (asked, answered) in [
        ("application/grpc", Some("application/grpc")),
        ("application/grpc+proto", Some("application/grpc")),
        ("Application/GRPC;charset=utf-8", Some("application/grpc")),
        ("application/grpc-web+proto", Some("application/grpc-web+proto")),
        ("application/grpc-web-text", Some("application/grpc-web-text")),
        ("application/grp", None),
        ("application/json", None),
        (" application/grpc", None),
        ("", None),
        ("application/\u{ff}grpc", None),
    ] {
        let mut request = get_it();
        let value = HeaderValue::from_bytes(asked.as_bytes()).unwrap();
        request.headers_mut().insert(CONTENT_TYPE, value);
        let answer = through(CircuitBreakerLayer::new(forced_open()).respond(), request);
        let told = answer.headers().contains_key("grpc-status");
        assert_eq!(told, answered.is_some(), "{asked:?}");
        if let Some(answered) = answered {
            assert_eq!(answer.headers()[CONTENT_TYPE], answered);
        }
    }
}

#[test]
fn the_longest_names_fit_into_the_headers_that_http_2_takes_by_default() {
    // Of what is escaped, it becomes the longest.
    let worst = "\u{7f}".repeat(Name::MAX_LEN);
    let clock = Clock::manual();
    let limit = RateLimiter::builder(&worst, TokenBucket::new(1, MINUTE))
        .limit(&worst)
        .clock(&clock);
    let limit = limit.build().unwrap();
    limit.try_acquire().unwrap();
    let answer = through(RateLimitLayer::new(limit).respond(), grpc_call());
    let size: usize = answer
        .headers()
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32)
        .sum();
    assert!(size < 16_384, "{size} bytes");
}

// ---- Stacks ------------------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn axum_routers_take_the_layers_without_an_error_handler() {
    let clock = Clock::manual();
    let breaker = CircuitBreaker::builder("search").clock(&clock).build().unwrap();
    let limit = limiter(&clock, "per-minute", TokenBucket::new(3, MINUTE));
    let app: Router = Router::new()
        .route("/", get(async || "hello"))
        .route_layer(GuardLayer::new((limit.clone(), breaker.clone())).respond())
        .layer(RateLimitLayer::new(limiter(&clock, "all", TokenBucket::new(9, MINUTE))).respond())
        .layer(
            RateLimitLayer::new(limiter(&clock, "queued", TokenBucket::new(9, MINUTE)))
                .wait(MINUTE)
                .reject_with(AsResponse::new()),
        );
    let ask = async || {
        let request = Request::get("/").body(axum::body::Body::empty()).unwrap();
        app.clone().oneshot(request).await.unwrap()
    };
    let answer = ask().await;
    assert_eq!(answer.status(), StatusCode::OK);
    let told = [r#""per-minute";r=2;t=20"#, r#""all";r=8;t=7"#, r#""queued";r=8;t=7"#];
    assert_eq!(all(answer.headers(), "ratelimit"), told);
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "hello");

    breaker.force_open();
    assert_eq!(ask().await.status(), StatusCode::SERVICE_UNAVAILABLE);
    breaker.reset();
    limit.try_acquire_n(2).unwrap();
    let answer = ask().await;
    assert_eq!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
    let told = [r#""per-minute";r=0;t=20"#, r#""all";r=6;t=20"#, r#""queued";r=6;t=20"#];
    assert_eq!(all(answer.headers(), "ratelimit"), told, "the outer limits admitted it");
    assert_eq!(answer.headers()[RETRY_AFTER], "20");
    assert_eq!(
        answer.extensions().get::<Rejected>().unwrap().limit,
        Some(name("per-minute"))
    );
}

#[tokio::test]
async fn on_one_http_1_connection_each_answer_ends_where_the_next_begins() {
    let inner =
        service_fn(async |_: Request<hyper::body::Incoming>| Ok::<_, Infallible>(Response::new(Inner::default())));
    let service = CircuitBreakerLayer::new(forced_open()).respond().layer(inner);
    let (near, far) = tokio::io::duplex(65_536);
    let service = hyper_util::service::TowerToHyperService::new(service);
    let server = hyper::server::conn::http1::Builder::new();
    tokio::spawn(server.serve_connection(hyper_util::rt::TokioIo::new(far), service));
    let near = hyper_util::rt::TokioIo::new(near);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(near).await.unwrap();
    tokio::spawn(connection);
    let mut lengths = Vec::new();
    for method in [Method::GET, Method::HEAD, Method::GET, Method::HEAD] {
        let request = Request::builder().method(method).body(Empty::<Bytes>::new()).unwrap();
        sender.ready().await.unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(all(answer.headers(), "content-length").len(), 1);
        lengths.push(answer.into_body().collect().await.unwrap().to_bytes().len());
    }
    assert!(lengths[0] > 0);
    assert_eq!(lengths, [lengths[0], 0, lengths[0], 0]);
}

#[tokio::test]
async fn on_http_2_an_answer_without_a_body_ends_with_its_headers() {
    let inner =
        service_fn(async |_: Request<hyper::body::Incoming>| Ok::<_, Infallible>(Response::new(Inner::default())));
    let service = CircuitBreakerLayer::new(forced_open()).respond().layer(inner);
    let (near, far) = tokio::io::duplex(65_536);
    let service = hyper_util::service::TowerToHyperService::new(service);
    let server = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
    tokio::spawn(server.serve_connection(hyper_util::rt::TokioIo::new(far), service));
    let near = hyper_util::rt::TokioIo::new(near);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, near).await.unwrap();
    tokio::spawn(connection);
    for (method, content_type, status, ends) in [
        (Method::GET, "text/plain", 503, false),
        (Method::HEAD, "text/plain", 503, true),
        (Method::POST, "application/grpc", 200, true),
    ] {
        let request = Request::builder().method(&method).uri("http://test/");
        let request = request
            .header(CONTENT_TYPE, content_type)
            .body(Empty::<Bytes>::new())
            .unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), status);
        assert_eq!(answer.body().is_end_stream(), ends, "{method} {content_type}");
        let length = all(answer.headers(), "content-length");
        assert_eq!(length.len(), usize::from(status == 503), "{method} {content_type}");
        let body = answer.into_body().collect().await.unwrap();
        assert!(body.trailers().is_none());
        assert_eq!(body.to_bytes().is_empty(), ends);
    }
}

#[test]
fn guards_that_answer_are_send_and_add_at_most_64_bytes_to_the_future_that_they_guard() {
    fn check<S: Service<Request<()>, Future: Send> + Clone + Send + Sync + 'static>(_: &S) -> usize {
        size_of::<S::Future>()
    }
    let limiter = || RateLimiter::new("search", TokenBucket::new(1, MINUTE)).unwrap();
    let inner = check(&Hello);
    for (layer, size) in [
        (
            "limiter, respond",
            check(&RateLimitLayer::new(limiter()).respond().layer(Hello)),
        ),
        ("limiter, http", check(&RateLimitLayer::http(limiter()).layer(Hello))),
        (
            "breaker, http",
            check(&CircuitBreakerLayer::http(forced_open()).layer(Hello)),
        ),
        (
            "breaker, grpc",
            check(&CircuitBreakerLayer::grpc(forced_open()).layer(Hello)),
        ),
    ] {
        println!("{layer}: {size} of {inner}");
        assert!(size <= inner + 64, "{layer}: {size} bytes around {inner}");
    }
}

/// Messages without content.
#[derive(Debug, Clone, Copy, Default)]
struct Unit;

impl tonic::codec::Codec for Unit {
    type Encode = ();
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for Unit {
    type Item = ();
    type Error = tonic::Status;
    fn encode(&mut self, (): (), _: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        Ok(())
    }
}

impl tonic::codec::Decoder for Unit {
    type Item = ();
    type Error = tonic::Status;
    fn decode(&mut self, _: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        Ok(Some(()))
    }
}

/// Makes one gRPC call, to a method that no server has.
async fn call<S>(service: S) -> tonic::Status
where
    S: tonic::client::GrpcService<tonic::body::Body>,
    S::ResponseBody: Send + 'static + Body<Data: Send, Error: Into<portcullis::BoxError>>,
{
    let mut client = tonic::client::Grpc::new(service);
    if let Err(error) = client.ready().await {
        return tonic::Status::from_error(error.into());
    }
    let path = http::uri::PathAndQuery::from_static("/Nobody/Home");
    let answer = client.unary(tonic::Request::new(()), path, Unit);
    answer.await.expect_err("no server has the method")
}

/// A channel to a tonic server behind this layer.
macro_rules! behind {
    ($layer:expr) => {{
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .layer($layer)
            .add_routes(tonic::service::Routes::default())
            .serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener));
        tokio::spawn(server);
        let endpoint = tonic::transport::Endpoint::new(format!("http://{address}"));
        endpoint.unwrap().connect_lazy()
    }};
}

#[track_caller]
fn assert_limited(status: &tonic::Status) {
    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("retry after 60s"), "{status:?}");
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "60000");
    let retry = status.get_details_retry_info().unwrap().retry_delay;
    assert_eq!(retry, Some(MINUTE));
}

#[tokio::test]
async fn tonic_servers_and_channels_take_the_layers() {
    let clock = Clock::manual();
    let layer = RateLimitLayer::new(limiter(&clock, "per-minute", TokenBucket::new(1, MINUTE))).respond();
    let channel = behind!(layer);
    let admitted = call(channel.clone()).await;
    assert_eq!(admitted.code(), tonic::Code::Unimplemented);
    assert_eq!(
        admitted.metadata().get("ratelimit").unwrap(),
        r#""per-minute";r=0;t=60"#
    );
    assert_limited(&call(channel).await);

    let empty = limiter(&clock, "per-minute", TokenBucket::new(1, MINUTE));
    empty.try_acquire().unwrap().settle(Outcome::Success);
    let nowhere = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
    let service = ServiceBuilder::new()
        .layer(RateLimitLayer::new(empty).respond())
        .service(nowhere);
    assert_limited(&call(service).await);
}

#[tokio::test]
async fn a_call_that_never_stops_sending_is_rejected_with_its_status() {
    let clock = Clock::manual();
    let empty = limiter(&clock, "per-minute", TokenBucket::new(1, MINUTE));
    empty.try_acquire().unwrap().settle(Outcome::Success);
    let channel = behind!(RateLimitLayer::new(empty).respond());
    for _ in 0..3 {
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.unwrap();
        let path = http::uri::PathAndQuery::from_static("/Nobody/Home");
        let endless = futures_util::stream::repeat(());
        let answer = client.streaming(tonic::Request::new(endless), path, Unit).await;
        assert_limited(&answer.expect_err("it is rejected"));
    }
}

// ---- Rejections as tonic's statuses ------------------------------------------------------------------------------------------

#[cfg(feature = "tonic")]
mod as_status {
    use super::*;
    use std::{
        error::Error,
        panic::{RefUnwindSafe, UnwindSafe},
        sync::Arc,
    };

    #[tokio::test]
    async fn a_tonic_server_makes_a_status_of_a_layers_error() {
        let clock = Clock::manual();
        let limit = limiter(&clock, "per-minute", TokenBucket::new(1, MINUTE));
        let channel = behind!(RateLimitLayer::new(limit));
        assert_eq!(call(channel.clone()).await.code(), tonic::Code::Unimplemented);
        assert_limited(&call(channel).await);
    }

    #[test]
    fn a_status_says_what_the_answer_says_and_carries_the_rejection() {
        for reason in [Reason::Open, Reason::ForcedOpen, Reason::MissingKey, Reason::Other] {
            let why = Rejected::new(name("search"), reason);
            let why = if reason == Reason::Open {
                why.retry_after(MINUTE)
            } else {
                why
            };
            let answered = tonic::Status::from_header_map(why.to_grpc_response().headers()).unwrap();
            let pushback = |status: &tonic::Status| status.metadata().get("grpc-retry-pushback-ms").cloned();
            for status in [tonic::Status::from(&why), tonic::Status::from(why.clone())] {
                assert_eq!(status.code(), answered.code());
                assert_eq!(status.message(), answered.message());
                assert_eq!(status.details(), answered.details());
                assert_eq!(pushback(&status), pushback(&answered), "{why}");
                assert_eq!(Rejected::find(&status), Some(&why));
            }
        }
    }

    #[tokio::test]
    async fn a_local_refusal_in_a_status_is_no_failure_of_the_service() {
        let why = Rejected::new(name("inner"), Reason::Open);
        let breaker = CircuitBreaker::builder("search").failure_threshold(1).build().unwrap();
        let refused = || tonic::Status::from(&why);
        breaker.call(async { Err::<(), _>(refused()) }).await.unwrap_err();
        let boxed = async { Err::<(), _>(Box::new(refused())) };
        breaker.call(boxed).await.unwrap_err();
        let nested = async { Err::<(), _>(portcullis::Error::Inner(refused())) };
        breaker.call(nested).await.unwrap_err();

        // What a generated client makes of an error of its channel.
        let of_channel = || tonic::Status::from_error(Box::new(why.clone()));
        breaker.call(async { Err::<(), _>(of_channel()) }).await.unwrap_err();
        let metrics = breaker.status().metrics;
        assert_eq!((metrics.ignored_requests, metrics.failed_requests), (4, 0));

        let upstream = async { Err::<(), _>(tonic::Status::unavailable("of the service itself")) };
        breaker.call(upstream).await.unwrap_err();
        assert_eq!(breaker.status().metrics.failed_requests, 1);
    }

    #[test]
    fn looking_for_the_status_changes_nothing_that_is_seen_of_a_rejection() {
        fn check<T: Send + Sync + UnwindSafe + RefUnwindSafe + Unpin>(_: &T) {}
        let why = Rejected::new(name("search"), Reason::Open);
        check(&why);
        let (fresh, debug) = (why.clone(), format!("{why:?}"));
        let status = why.source().unwrap().downcast_ref::<tonic::Status>().unwrap();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(status.source().is_none(), "the chain ends");
        assert!(
            std::ptr::eq(status, why.source().unwrap().downcast_ref().unwrap()),
            "made once"
        );
        assert_eq!(why, fresh);
        assert_eq!(why, why.clone());
        assert_eq!(format!("{why:?}"), debug);
    }

    #[test]
    fn one_status_is_made_however_many_threads_look() {
        let why = Arc::new(Rejected::new(name("search"), Reason::Open));
        let look = || {
            let why = Arc::clone(&why);
            std::thread::spawn(move || std::ptr::from_ref(why.source().unwrap()).addr())
        };
        let seen: Vec<_> = [look(), look(), look(), look()]
            .map(|thread| thread.join().unwrap())
            .into();
        assert!(seen.iter().all(|address| *address == seen[0]));
    }
}
