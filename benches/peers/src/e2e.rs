//! End to end: an axum server on loopback under load by `wrk`, without layers, with ours and with the peers'.
//!
//! All servers live in this process and are loaded by turns, every one once in every round. A row's figure is the median of the
//! rounds: requests per second, and their ratio in each round to the row without layers (of those that refuse: to a handler that
//! gives the very answer that our limiter gives). Beside it stands the time on a core that a request takes the server, which a
//! busy machine distorts less.

use crate::{
    goals::Goal,
    measure::{self, cores},
    options::Options,
    ours, peers, report,
};
use axum::{
    Router,
    body::{Body, Bytes},
    error_handling::HandleErrorLayer,
    http::{Request, Response, StatusCode},
    response::IntoResponse,
    routing::get,
};
use cpu_time::ProcessTime;
use portcullis::{CircuitBreaker, Clock, GuardLayer, RateLimitLayer, RateLimiter, State};
use serde_json::json;
use std::{
    convert::Infallible,
    fmt::Write,
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    time::Duration,
};
use tower::{ServiceBuilder, ServiceExt, util::MapResponseLayer};
use tower_resilience_circuitbreaker::{CircuitBreakerError, CircuitBreakerLayer, CircuitState};
use tower_resilience_ratelimiter::{RateLimiterLayer, RateLimiterServiceError};

const CONNECTIONS: &str = "32";
const PLAIN: &str = "accepting: no layer";
const HANDLER: &str = "refusing: a handler answers the same";
const OURS_ACCEPTING: &str = "accepting: portcullis, limiter + breaker";
const OURS_REFUSING: &str = "refusing: portcullis, limiter";
const GOVERNOR_ACCEPTING: &str = "accepting: tower_governor";
const GOVERNOR_REFUSING: &str = "refusing: tower_governor";
/// It tells its quota in header fields, as ours does.
const GOVERNOR_TELLING: &str = "accepting: tower_governor, with headers";
const RESILIENCE_ACCEPTING: &str = "accepting: tower-resilience, limiter + breaker";

type Check = Box<dyn Fn(&Load) -> Result<(), String>>;

struct Server {
    name: &'static str,
    address: SocketAddr,
    /// Asks the layers themselves whether they did the work.
    check: Check,
    /// Requests per second, each round's.
    rates: Vec<f64>,
    /// Microseconds on a core for each request.
    micros: Vec<f64>,
}

/// What `wrk` says of one run.
#[derive(Debug, Default)]
struct Load {
    requests: u64,
    /// Of these, those with another status than 2xx or 3xx.
    refused: u64,
    socket_errors: bool,
    rate: f64,
    /// How long the server was on a core, all threads together.
    on_core: Duration,
}

impl Server {
    fn rate(&self) -> f64 {
        median(self.rates.clone())
    }
}

fn median(values: Vec<f64>) -> f64 {
    measure::median(values).unwrap_or(f64::NAN)
}

pub(crate) fn run(options: &Options) -> Result<(), String> {
    let wrk = Command::new("wrk").arg("--version").output();
    wrk.map_err(|error| format!("wrk, which makes the load, does not run ({error}): apt-get install wrk"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores())
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let mut servers = runtime
        .block_on(servers(&options.only))
        .map_err(|error| error.to_string())?;
    let seconds = if options.quick { 1 } else { 2 };
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 5 });
    for server in &servers {
        // The first connections, and the pages they touch.
        load(server.address, 1)?;
    }
    for round in 0..rounds {
        let count = servers.len();
        for index in 0..count {
            let server = &mut servers[(round * count / rounds + index) % count];
            let load = load(server.address, seconds)?;
            verify(server, &load).map_err(|error| format!("{}: {error}", server.name))?;
            server.rates.push(load.rate);
            let micros = load.on_core.as_secs_f64() * 1e6;
            server.micros.push(micros / load.requests as f64);
        }
    }
    let goals = goals(&servers);
    if options.json {
        let rows: Vec<_> = servers.iter().map(|server| row(server, &servers)).collect();
        println!(
            "{}",
            json!({ "cores": cores(), "rows": rows, "goals": report::goals_json(&goals) })
        );
    } else {
        print!("{}{}", table(&servers), report::verdicts(&goals));
    }
    Ok(())
}

async fn servers(only: &str) -> Result<Vec<Server>, Box<dyn std::error::Error>> {
    let hello = || Router::new().route("/", get(async || "hello"));
    let none: fn() -> Check = || Box::new(|_| Ok(()));
    let mut servers = Vec::new();
    let mut add = |name, app, check| servers.push((name, app, check));

    add(PLAIN, hello(), none());
    // What axum itself pays for a layer: one more box around each service, future and body.
    let boxed = MapResponseLayer::new(|response: axum::response::Response| response.map(Body::new));
    add(
        "accepting: a layer that only boxes the body",
        hello().layer(boxed),
        none(),
    );
    for (name, clock) in [
        (OURS_ACCEPTING, Clock::fast()),
        (
            "accepting: portcullis, limiter + breaker, default clock",
            Clock::system(),
        ),
    ] {
        let limiter = ours::limiter(ours::plenty(), clock.clone());
        let breaker = CircuitBreaker::builder("bench").clock(clock).build()?;
        let layer = GuardLayer::http((limiter.clone(), breaker.clone()));
        add(
            name,
            hello().layer(layer),
            Box::new(move |load| all_admitted(&limiter, &breaker, load)),
        );
    }
    let generous = peers::tower_governor_layer(Duration::from_nanos(1), 1_000_000_000);
    add(GOVERNOR_ACCEPTING, hello().layer(generous), none());
    let telling = peers::tower_governor_layer_with_headers(Duration::from_nanos(1), 1_000_000_000);
    add(GOVERNOR_TELLING, hello().layer(telling), none());
    let (app, check) = tower_resilience(hello());
    add(RESILIENCE_ACCEPTING, app, check);

    let refused = refusal().await?;
    add(
        HANDLER,
        Router::new().route("/", get(async move || refused.response())),
        none(),
    );
    let exhausted = ours::exhausted();
    let layer = RateLimitLayer::http(exhausted.clone());
    add(
        OURS_REFUSING,
        hello().layer(layer),
        Box::new(move |load| {
            let rejected = exhausted.status().rejected_requests;
            (rejected >= load.requests)
                .then_some(())
                .ok_or(format!("it has rejected only {rejected}"))
        }),
    );
    let exhausted = peers::tower_governor_layer(Duration::from_secs(1_000_000), 1);
    let app = hello().layer(exhausted);
    app.clone().oneshot(Request::get("/").body(Body::empty())?).await?;
    add(GOVERNOR_REFUSING, app, none());

    let mut listening = Vec::new();
    for (name, app, check) in servers {
        let compared = [PLAIN, HANDLER].contains(&name);
        if compared || name.contains(only) {
            listening.push(listen(name, app, check).await?);
        }
    }
    Ok(listening)
}

async fn listen(name: &'static str, app: Router, check: Check) -> std::io::Result<Server> {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async { axum::serve(listener, app).await });
    Ok(Server {
        name,
        address,
        check,
        rates: Vec::new(),
        micros: Vec::new(),
    })
}

fn all_admitted(limiter: &RateLimiter, breaker: &CircuitBreaker, load: &Load) -> Result<(), String> {
    let (limit, circuit) = (limiter.status(), breaker.status());
    if limit.rejected_requests > 0 || circuit.metrics.rejected_requests > 0 || circuit.state != State::Closed {
        return Err("it rejected".into());
    }
    let judged = circuit.metrics.successful_requests;
    (judged >= load.requests)
        .then_some(())
        .ok_or(format!("it has judged only {judged}"))
}

/// Its two layers with the error handler that axum asks for.
fn tower_resilience(app: Router) -> (Router, Check) {
    type Refused = RateLimiterServiceError<CircuitBreakerError<Infallible>>;
    const PLENTY: usize = 1_000_000_000;
    let limiter = RateLimiterLayer::builder()
        .limit_for_period(PLENTY)
        .refresh_period(Duration::from_secs(1))
        .burst_size(PLENTY);
    let (limiter, limits) = peers::shared_limiter(limiter);
    let (breaker, circuit) = peers::shared(CircuitBreakerLayer::builder());
    let layers = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(async |_: Refused| {
            StatusCode::SERVICE_UNAVAILABLE
        }))
        .layer(limiter)
        .layer(breaker);
    let check = move |_: &Load| match (limits.is_throttling(), circuit.state()) {
        (false, CircuitState::Closed) => Ok(()),
        other => Err(format!("it throttles, and its state: {other:?}")),
    };
    (app.layer(layers), Box::new(check))
}

/// Our limiter's answer, to be given by a handler.
#[derive(Clone)]
struct Refusal {
    parts: axum::http::response::Parts,
    body: Bytes,
}

impl Refusal {
    fn response(&self) -> Response<Body> {
        let mut response = Body::from(self.body.clone()).into_response();
        *response.status_mut() = self.parts.status;
        *response.headers_mut() = self.parts.headers.clone();
        response
    }
}

async fn refusal() -> Result<Refusal, Box<dyn std::error::Error>> {
    let app = Router::new()
        .route("/", get(async || "hello"))
        .layer(RateLimitLayer::http(ours::exhausted()));
    let response = app.oneshot(Request::get("/").body(Body::empty())?).await?;
    let (parts, body) = response.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await?;
    Ok(Refusal { parts, body })
}

/// `wrk` on one thread; it needs a core of its own, and leaves the others to the server.
fn load(address: SocketAddr, seconds: u32) -> Result<Load, String> {
    let began = ProcessTime::now();
    let output = Command::new("wrk")
        .args(["--threads", "1", "--connections", CONNECTIONS, "--duration"])
        .arg(format!("{seconds}s"))
        .arg(format!("http://{address}/"))
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut load = Load {
        on_core: began.elapsed(),
        ..Load::default()
    };
    for line in text.lines().map(str::trim) {
        if let Some((requests, _)) = line.split_once(" requests in ") {
            load.requests = requests.parse().unwrap_or(0);
        } else if let Some(refused) = line.strip_prefix("Non-2xx or 3xx responses:") {
            load.refused = refused.trim().parse().unwrap_or(0);
        } else if let Some(rate) = line.strip_prefix("Requests/sec:") {
            load.rate = rate.trim().parse().unwrap_or(0.0);
        } else if line.starts_with("Socket errors:") {
            load.socket_errors = true;
        }
    }
    if load.requests == 0 {
        return Err(format!(
            "wrk made no requests: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok(load)
}

/// That every request was answered, and as the row says.
fn verify(server: &Server, load: &Load) -> Result<(), String> {
    let expected = if server.name.starts_with("refusing") {
        load.requests
    } else {
        0
    };
    if load.socket_errors {
        return Err(format!("socket errors: {load:?}"));
    }
    if load.refused != expected {
        return Err(format!("{} of {} requests were refused", load.refused, load.requests));
    }
    (server.check)(load)
}

/// The row that a row is compared with.
fn yardstick<'a>(server: &Server, servers: &'a [Server]) -> Option<&'a Server> {
    let name = if server.name.starts_with("refusing") {
        HANDLER
    } else {
        PLAIN
    };
    servers.iter().find(|server| server.name == name)
}

/// The rates of a row to those of its yardstick, round by round.
fn ratio(server: &Server, servers: &[Server]) -> f64 {
    let compared = yardstick(server, servers).map_or(&[][..], |other| &other.rates);
    let ratios = server.rates.iter().zip(compared).map(|(rate, other)| rate / other);
    median(ratios.collect())
}

fn table(servers: &[Server]) -> String {
    let mut out = format!(
        "axum on loopback, {} cores, wrk with {CONNECTIONS} connections\n\n{:60} {:>12} {:>8} {:>18}\n",
        cores(),
        "",
        "requests/s",
        "ratio",
        "on a core"
    );
    for server in servers {
        let _ = writeln!(
            out,
            "{:60} {:12.0} {:8.2} {:11.2} µs each",
            server.name,
            server.rate(),
            ratio(server, servers),
            median(server.micros.clone())
        );
    }
    out
}

fn row(server: &Server, servers: &[Server]) -> serde_json::Value {
    json!({
        "name": server.name,
        "requests_per_second": server.rate(),
        "ratio": ratio(server, servers),
        "micros_on_core": median(server.micros.clone()),
        "rounds": server.rates,
    })
}

/// The goals whose rows were measured.
fn goals(servers: &[Server]) -> Vec<Goal> {
    [
        (0.95, PLAIN, OURS_ACCEPTING),
        (1.0, GOVERNOR_TELLING, OURS_ACCEPTING),
        (1.0, RESILIENCE_ACCEPTING, OURS_ACCEPTING),
        (0.9, HANDLER, OURS_REFUSING),
        (1.0, GOVERNOR_REFUSING, OURS_REFUSING),
    ]
    .into_iter()
    .filter_map(|(share, other, ours)| {
        let ratio = |name| {
            let server = servers.iter().find(|server| server.name == name)?;
            Some(ratio(server, servers))
        };
        // At least so much is, the other way round, at most so much: as all other goals are.
        Some(Goal {
            what: format!("{ours} ≥ {share} {}", other.split_once(": ")?.1),
            value: share * ratio(other)?,
            bound: ratio(ours)?,
            unit: "as ratios: needed of measured",
        })
    })
    .collect()
}
