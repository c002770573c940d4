//! A policy for each method and route, with a default and exemptions.
#![cfg(feature = "http")]

use axum::{
    Router,
    body::Body,
    routing::{any, get},
};
use futures_util::FutureExt;
use http::{Method, Request, StatusCode};
use portcullis::{
    CircuitBreaker, CircuitBreakerLayer, Clock, GuardLayer, ManualClock, Outcome, PerRoute, RateLimitLayer,
    RateLimiter, Reason, Rejected, State, TokenBucket,
    policy::{self, Never, NotReady, Policy},
};
use std::{convert::Infallible, time::Duration};
use tower::{Layer, Service, ServiceExt, service_fn};

fn limiter(name: &str, limit: u32) -> RateLimiter {
    let bucket = TokenBucket::new(limit, Duration::from_secs(3600));
    RateLimiter::builder("api", bucket)
        .limit(name)
        .clock(Clock::manual())
        .build()
        .unwrap()
}

fn request(method: Method, path: &str) -> Request<Body> {
    Request::builder().method(method).uri(path).body(Body::empty()).unwrap()
}

struct Limits {
    users: RateLimiter,
    search: RateLimiter,
    other: RateLimiter,
    routes: PerRoute<RateLimiter>,
}

fn limits() -> Limits {
    let (users, search, other) = (limiter("users", 100), limiter("search", 100), limiter("other", 100));
    let routes = PerRoute::builder()
        .route(Method::GET, "/users/{id}", users.clone())
        .any("/search", search.clone())
        .exempt("/health")
        .default(other.clone())
        .build()
        .unwrap();
    Limits {
        users,
        search,
        other,
        routes,
    }
}

impl Limits {
    fn used(&self) -> [u64; 3] {
        [&self.users, &self.search, &self.other].map(|limiter| limiter.status().accepted_requests)
    }
}

/// Which limits these requests met: (users, search, other).
async fn met<S>(limits: &Limits, service: &S, requests: &[(Method, &str)]) -> [u64; 3]
where
    S: Service<Request<Body>, Error = Infallible> + Clone,
{
    let before = limits.used();
    for (method, path) in requests {
        let _ = service.clone().oneshot(request(method.clone(), path)).await;
    }
    let after = limits.used();
    std::array::from_fn(|at| after[at] - before[at])
}

fn no_router(
    routes: PerRoute<RateLimiter>,
) -> impl Service<Request<Body>, Response: Send, Error = Infallible, Future: Send> + Clone {
    RateLimitLayer::http(routes).layer(service_fn(async |_: Request<Body>| {
        Ok(http::Response::new(Body::empty()))
    }))
}

#[tokio::test]
async fn without_a_router_the_path_is_matched() {
    let limits = limits();
    let service = no_router(limits.routes.clone());
    let met = async |requests: &[(Method, &str)]| met(&limits, &service, requests).await;
    assert_eq!(
        met(&[(Method::GET, "/users/1"), (Method::GET, "/users/2?x=1")]).await,
        [2, 0, 0]
    );
    assert_eq!(met(&[(Method::HEAD, "/users/1")]).await, [1, 0, 0], "HEAD is as GET");
    assert_eq!(
        met(&[(Method::POST, "/users/1")]).await,
        [0, 0, 1],
        "a method that is not named"
    );
    assert_eq!(
        met(&[(Method::POST, "/search"), (Method::GET, "/search")]).await,
        [0, 2, 0]
    );
    assert_eq!(
        met(&[(Method::GET, "/health"), (Method::DELETE, "/health")]).await,
        [0, 0, 0],
        "exempt"
    );
    assert_eq!(met(&[(Method::GET, "/"), (Method::GET, "/users")]).await, [0, 0, 2]);
}

#[tokio::test]
async fn no_odd_spelling_is_an_exempt_path() {
    let limits = limits();
    let service = no_router(limits.routes.clone());
    let long = format!("/health/{}", "x".repeat(20_000));
    let odd = [
        "/health/",
        "//health",
        "/./health",
        "/x/../health",
        "/%68ealth",
        "/Health",
        "/health%00",
        "/health;a=b",
        "/health/x",
        &long,
    ];
    let requests: Vec<_> = odd.iter().map(|path| (Method::GET, *path)).collect();
    assert_eq!(met(&limits, &service, &requests).await, [0, 0, odd.len() as u64]);
}

#[tokio::test]
async fn a_limit_of_a_route_holds_for_all_its_paths() {
    let users = limiter("users", 2);
    let routes = PerRoute::builder().any("/users/{id}", users).build().unwrap();
    let app = Router::new()
        .route("/users/{id}", any(async || "a user"))
        .layer(RateLimitLayer::http(routes));
    let mut statuses = Vec::new();
    for id in 0..4 {
        let answer = app
            .clone()
            .oneshot(request(Method::GET, &format!("/users/{id}")))
            .await
            .unwrap();
        statuses.push(answer.status());
    }
    assert_eq!(
        statuses,
        [
            StatusCode::OK,
            StatusCode::OK,
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::TOO_MANY_REQUESTS
        ]
    );
}

#[cfg(feature = "axum")]
#[tokio::test]
async fn in_axum_the_route_is_the_one_that_axum_has_matched() {
    let limits = limits();
    let layer = RateLimitLayer::http(limits.routes.clone());
    let ok = || any(async || "ok");
    let app = Router::new()
        .route("/users/{user}", ok())
        .route("/users/me", ok())
        .route("/search", ok())
        .route("/health", ok())
        .nest("/v2", Router::new().route("/search", ok()))
        .fallback(async || "none")
        .layer(layer);
    let met = async |requests: &[(Method, &str)]| met(&limits, &app, requests).await;
    assert_eq!(
        met(&[(Method::GET, "/users/1")]).await,
        [1, 0, 0],
        "a parameter of another name"
    );
    assert_eq!(met(&[(Method::GET, "/users/me")]).await, [1, 0, 0]);
    assert_eq!(
        met(&[(Method::GET, "/search"), (Method::GET, "/health")]).await,
        [0, 1, 0]
    );
    assert_eq!(
        met(&[(Method::GET, "/v2/search")]).await,
        [0, 0, 1],
        "a template of its own"
    );
    assert_eq!(
        met(&[(Method::GET, "/nothing"), (Method::GET, "/health/")]).await,
        [0, 0, 2]
    );
}

#[cfg(feature = "axum")]
#[tokio::test]
async fn where_axums_route_catches_all_the_path_tells_more() {
    let (place, files, other) = (limiter("place", 100), limiter("files", 100), limiter("other", 100));
    let limits = Limits {
        routes: PerRoute::builder()
            .any("/shop.Orders/Place", place.clone())
            .any("/v2/shop.Orders/Place", place.clone())
            .any("/files/{*path}", files.clone())
            .exempt("/pages/{name}")
            .exempt("/v2/pages/{name}")
            .default(other.clone())
            .build()
            .unwrap(),
        users: place,
        search: files,
        other,
    };
    let layer = RateLimitLayer::http(limits.routes.clone());
    let router = || {
        Router::new()
            // As tonic does it: a route for each service.
            .route("/shop.Orders/{*rest}", any(async || "placed"))
            .route("/files/{*path}", any(async || "a file"))
            .route("/pages/{*path}", any(async || "a page"))
    };
    let requests = |paths: &[&'static str]| paths.iter().map(|path| (Method::GET, *path)).collect::<Vec<_>>();
    let outside = router().nest("/v2", router()).layer(layer.clone());
    let inside = router().layer(layer.clone());
    let inside = inside.clone().nest("/v2/", inside);
    let service = router().nest_service("/v2", router()).layer(layer.clone());
    let in_service = router().layer(layer.clone());
    let in_service = in_service.clone().nest_service("/v2", in_service);
    for app in [outside, inside, service, in_service] {
        let met = async |paths: &[&'static str]| met(&limits, &app, &requests(paths)).await;
        assert_eq!(met(&["/shop.Orders/Place", "/shop.Orders/Place?x"]).await, [2, 0, 0]);
        assert_eq!(met(&["/v2/shop.Orders/Place"]).await, [1, 0, 0]);
        assert_eq!(met(&["/shop.Orders/List", "/v2/shop.Orders/List"]).await, [0, 0, 2]);
        assert_eq!(met(&["/files/a/b", "/files//"]).await, [0, 2, 0]);
        assert_eq!(met(&["/v2/files/a/b"]).await, [0, 0, 1]);
        assert_eq!(met(&["/pages/a", "/v2/pages/a"]).await, [0, 0, 0], "exempt");
        assert_eq!(
            met(&["/pages/a/b", "/v2/pages/a/b"]).await,
            [0, 0, 2],
            "no name has a slash"
        );
    }
}

#[tokio::test]
async fn every_form_of_a_target_meets_a_rule() {
    let limits = limits();
    let service = no_router(limits.routes.clone());
    let met = async |requests: &[(Method, &str)]| met(&limits, &service, requests).await;
    assert_eq!(met(&[(Method::GET, "http://example.com/users/1")]).await, [1, 0, 0]);
    assert_eq!(met(&[(Method::GET, "http://example.com/health?x")]).await, [0, 0, 0]);
    assert_eq!(
        met(&[
            (Method::CONNECT, "example.com:443"),
            (Method::OPTIONS, "*"),
            (Method::GET, "http://example.com"),
            (Method::GET, "http://example.com?/health"),
        ])
        .await,
        [0, 0, 4]
    );
}

/// axum takes the prefix off the path before a nested router's layers see it; the template that it has matched stays whole.
#[cfg(feature = "axum")]
#[tokio::test]
async fn in_a_nested_router_the_route_is_the_whole_template_whatever_is_left_of_the_path() {
    let (nested, other) = (limiter("nested", 100), limiter("other", 100));
    let routes = PerRoute::builder()
        .route(Method::GET, "/api/users/{id}", nested.clone())
        .default(other.clone())
        .build()
        .unwrap();
    let users = Router::new()
        .route("/users/{id}", any(async || "ok"))
        .layer(RateLimitLayer::http(routes));
    let app: Router = Router::new().nest("/api", users);
    app.oneshot(request(Method::GET, "/api/users/7")).await.unwrap();
    let used = [&nested, &other].map(|limiter| limiter.status().accepted_requests);
    assert_eq!(used, [1, 0]);
}

#[tokio::test]
async fn a_route_layer_limits_one_route() {
    let report = limiter("report", 1);
    let app = Router::new()
        .route(
            "/report",
            get(async || "well").route_layer(RateLimitLayer::http(report)),
        )
        .route("/search", any(async || "found"));
    let mut statuses = Vec::new();
    for path in ["/report", "/report", "/search"] {
        statuses.push(
            app.clone()
                .oneshot(request(Method::GET, path))
                .await
                .unwrap()
                .status()
                .as_u16(),
        );
    }
    assert_eq!(statuses, [200, 429, 200]);
}

#[tokio::test]
async fn breakers_and_pairs_go_by_route_as_well() {
    let clock = Clock::manual();
    let breaker = |name: &str| {
        CircuitBreaker::builder(name)
            .failure_threshold(1)
            .half_open_max_calls(1)
            .success_threshold(1)
            .clock(&clock)
            .build()
            .unwrap()
    };
    let (sick, well) = (breaker("sick"), breaker("well"));
    let routes = PerRoute::builder()
        .any("/shop.Orders/{method}", (limiter("orders", 10), sick.clone()))
        .any("/shop.Carts/Get", (limiter("carts", 10), well.clone()))
        .build()
        .unwrap();
    let service = CircuitBreakerLayer::http(routes).layer(service_fn(async |request: Request<Body>| {
        let mut answer = http::Response::new(Body::empty());
        if request.uri().path().starts_with("/shop.Orders") && request.method() != Method::PUT {
            *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        }
        Ok::<_, Infallible>(answer)
    }));
    let ask = async |method, path: &str| {
        service
            .clone()
            .oneshot(request(method, path))
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    assert_eq!(ask(Method::POST, "/shop.Orders/Place").await, 500);
    assert_eq!((sick.state(), well.state()), (State::Open, State::Closed));
    assert_eq!(
        ask(Method::POST, "/shop.Orders/Cancel").await,
        503,
        "one circuit for the service"
    );
    assert_eq!(ask(Method::POST, "/shop.Carts/Get").await, 200);
    assert_eq!(ask(Method::POST, "/elsewhere").await, 200, "without a default");
    assert_eq!(sick.status().metrics.rejected_requests, 1, "counted once");
    clock.advance(Duration::from_secs(60));
    assert_eq!(sick.state(), State::HalfOpen);
    assert_eq!(ask(Method::PUT, "/shop.Orders/Place").await, 200, "a probe");
    assert_eq!(sick.state(), State::Closed);
    assert_eq!(sick.status().probes_in_flight, 0);
}

#[tokio::test]
async fn in_a_pair_the_refusal_of_a_route_burns_nothing() {
    let (search, all) = (limiter("search", 1), limiter("all", 10));
    let routes = PerRoute::builder().any("/search", search.clone()).build().unwrap();
    let service =
        GuardLayer::new((all.clone(), routes)).layer(service_fn(async |_: Request<Body>| Ok::<_, Infallible>(())));
    for admitted in [true, false, false] {
        let answer = service.clone().oneshot(request(Method::GET, "/search")).await;
        assert_eq!(answer.is_ok(), admitted);
    }
    assert_eq!(
        (all.status().accepted_requests, search.status().rejected_requests),
        (1, 2)
    );
}

#[test]
fn in_a_pair_a_refused_call_takes_no_probe_of_the_breaker_that_is_picked_for_it() {
    /// Half-open by the clock, and nobody has called since.
    fn due() -> (ManualClock, CircuitBreaker) {
        let clock = Clock::manual();
        let breaker = CircuitBreaker::builder("search")
            .failure_threshold(1)
            .half_open_max_calls(1)
            .success_threshold(1)
            .clock(&clock)
            .build()
            .unwrap();
        breaker.try_acquire().unwrap().settle(Outcome::Failure);
        clock.advance(Duration::from_secs(60));
        (clock, breaker)
    }
    fn check<P>(shape: &str, pick: impl Fn(&CircuitBreaker) -> P)
    where
        P: Policy<Request<Body>, Wait = Never<<P as Policy<Request<Body>>>::Permit>> + Clone,
    {
        let (_clock, breaker) = due();
        let (all, mut events) = (limiter("all", 1), breaker.subscribe(8));
        all.try_acquire().unwrap();
        let picked = pick(&breaker);
        for first in [true, false] {
            let exhausted = all.clone();
            let answer = if first {
                let guard = GuardLayer::new((picked.clone(), exhausted)).layer(service_fn(ok));
                guard.oneshot(request(Method::GET, "/search")).now_or_never()
            } else {
                let guard = GuardLayer::new((exhausted, picked.clone())).layer(service_fn(ok));
                guard.oneshot(request(Method::GET, "/search")).now_or_never()
            };
            let error = answer.unwrap().unwrap_err();
            assert_eq!(Rejected::find(&*error).unwrap().reason, Reason::OverLimit, "{shape}");
            assert!(
                events.try_recv().is_none(),
                "{shape}: it probes when a call comes through, not when one is refused"
            );
        }
        let guard = GuardLayer::new(picked).layer(service_fn(ok));
        guard
            .oneshot(request(Method::GET, "/search"))
            .now_or_never()
            .unwrap()
            .unwrap();
        assert_eq!(
            breaker.state(),
            State::Closed,
            "{shape}: the first call that comes through"
        );
    }
    async fn ok(_: Request<Body>) -> Result<(), Infallible> {
        Ok(())
    }
    let by_route = |breaker: &CircuitBreaker| PerRoute::builder().any("/search", breaker.clone()).build().unwrap();
    check("by route", by_route);
    check("by closure", |breaker| {
        let picked = breaker.clone();
        policy::select(move |_: &Request<Body>| Some(picked.clone()))
    });
    check("one that is not ready", |breaker| {
        let not_ready = NotReady::new(breaker.clone());
        PerRoute::builder().any("/search", not_ready).build().unwrap()
    });
    check("in a pair", |breaker| {
        let pair = (limiter("search", 9), breaker.clone());
        PerRoute::builder().any("/search", pair).build().unwrap()
    });
    check("twice", |breaker| {
        PerRoute::builder().any("/search", by_route(breaker)).build().unwrap()
    });
}

#[test]
fn routes_that_make_no_sense_are_refused() {
    let build = |templates: &[&str]| {
        let builder = templates.iter().fold(PerRoute::builder(), |builder, template| {
            builder.any(*template, limiter("x", 1))
        });
        builder.build().map(|_| ()).map_err(|error| error.to_string())
    };
    for bad in [
        &["search"][..],
        &[""],
        &["/a/{"],
        &["/a/{}"],
        &["/a/{*rest}/b"],
        &["/a", "/a"],
        &["/a/{x}", "/a/{y}"],
    ] {
        let error = build(bad).unwrap_err();
        assert!(error.starts_with("template is "), "{error}");
    }
    build(&["/a/{x}", "/a/me", "/{*rest}"]).unwrap();
    let twice = PerRoute::builder()
        .route(Method::GET, "/a", limiter("x", 1))
        .route(Method::GET, "/a", limiter("y", 1));
    assert!(twice.build().is_err());
}

#[test]
fn a_template_has_at_most_twenty_five_parameters() {
    let build = |template: String| PerRoute::builder().any(template, limiter("x", 1)).build().map(|_| ());
    let parameters = |count| (0..count).map(|n| format!("/{{p{n}}}")).collect::<Vec<_>>().concat();
    build(parameters(25)).unwrap();
    build(format!("{}/{{{{braces}}}}", parameters(25))).unwrap();
    for count in [26, 27, 1_000] {
        let error = build(parameters(count)).unwrap_err();
        assert_eq!(error.field(), "template");
        assert!(error.expected().contains("25"), "{error}");
    }
}

#[test]
fn a_closure_may_pick_the_policy() {
    let clock = Clock::manual();
    let odd = CircuitBreaker::builder("odd")
        .failure_threshold(1)
        .clock(&clock)
        .build()
        .unwrap();
    let picked = odd.clone();
    let pick = policy::select(move |n: &u32| (n % 2 == 1).then(|| picked.clone()));
    let service = GuardLayer::new(pick)
        .classify(|result: &Result<u32, Infallible>| match result {
            Ok(3) => Outcome::Failure,
            _ => Outcome::Success,
        })
        .layer(service_fn(async |n: u32| Ok::<_, Infallible>(n)));
    let ask = |n| service.clone().oneshot(n).now_or_never().unwrap();
    ask(3).unwrap();
    ask(2).unwrap();
    let error = ask(1).unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().service, "odd");
    assert_eq!(odd.status().metrics.rejected_requests, 1);
    clock.advance(Duration::from_secs(60));
    ask(1).unwrap();
    assert_eq!(odd.status().success_count, 1, "a probe");
}
