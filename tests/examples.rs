//! The examples do what they say, run as a user runs them: built by cargo, started as processes, called over HTTP.
#![cfg(all(feature = "http", unix))]

use axum::body::Body;
use http_body_util::BodyExt;
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    process::{ExitStatus, Output, Stdio},
    sync::OnceLock,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::sleep,
};

/// The example's executable, built with the features and the profile of this test.
fn example(name: &str) -> PathBuf {
    static BUILT: OnceLock<HashMap<String, PathBuf>> = OnceLock::new();
    BUILT.get_or_init(build)[name].clone()
}

fn build() -> HashMap<String, PathBuf> {
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo.args(["build", "--examples", "--message-format=json-render-diagnostics"]);
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    // Each that is on, not only what the examples ask for: the crate is then compiled already.
    for (on, feature) in [
        (cfg!(feature = "axum"), "axum"),
        (cfg!(feature = "fast-clock"), "fast-clock"),
        (cfg!(feature = "retry"), "retry"),
        (cfg!(feature = "tonic"), "tonic"),
        (cfg!(feature = "tower-http"), "tower-http"),
        (cfg!(feature = "tracing"), "tracing"),
    ] {
        if on {
            cargo.args(["--features", feature]);
        }
    }
    let output = cargo.stderr(Stdio::inherit()).output().expect("cargo runs");
    assert!(output.status.success(), "the examples compile");
    let messages = output.stdout.split(|byte| *byte == b'\n');
    messages
        .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
        .filter(|message| message["target"]["kind"][0] == "example")
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, message["executable"].as_str()?.into()))
        })
        .collect()
}

async fn run_to_end(name: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(example(name));
    command.args(arguments).kill_on_drop(true);
    command.output().await.expect("the example starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("examples print UTF-8")
}

/// A gateway in a process of its own, on a free port.
struct Gateway {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    url: String,
    client: Client<HttpConnector, Body>,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().expect("ASCII"))
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }
}

impl Gateway {
    /// Comes back when the gateway has said where it listens.
    async fn start(arguments: &[&str]) -> Self {
        let mut process = Command::new(example("gateway"))
            .args(["--port", "0"])
            .args(arguments)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the gateway starts");
        let stdout = process.stdout.take().expect("piped");
        let mut gateway = Self {
            process,
            lines: BufReader::new(stdout).lines(),
            url: String::new(),
            client: Client::builder(TokioExecutor::new()).build_http(),
        };
        let line = gateway.line_with("http://").await;
        let url = &line[line.find("http://").expect("looked for")..];
        gateway.url = url[..url.find("/agents").expect("the first URL is an agent's")].into();
        gateway
    }

    /// The next line that holds this.
    async fn line_with(&mut self, part: &str) -> String {
        while let Some(line) = self.lines.next_line().await.expect("UTF-8") {
            if line.contains(part) {
                return line;
            }
        }
        panic!("the gateway ended without a line that holds {part:?}");
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body.to_owned())).expect("a valid request");
        let answer = self.client.request(request).await.expect("the gateway answers");
        let (status, headers) = (answer.status(), answer.headers().clone());
        let bytes = answer.into_body().collect().await.expect("a whole body").to_bytes();
        let text = text(&bytes).to_owned();
        Answer { status, headers, text }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], "").await
    }

    /// Asks again and again, until the answer is the one looked for.
    async fn get_until(&self, path: &str, what: &str, mut looked_for: impl FnMut(&Answer) -> bool) -> Answer {
        for _ in 0..2000 {
            let answer = self.get(path).await;
            if looked_for(&answer) {
                return answer;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{path} never showed: {what}");
    }

    /// Ctrl-C; how it ended, and what it still had to say.
    async fn interrupt(mut self) -> (ExitStatus, Vec<String>) {
        let id = self.process.id().expect("it still runs").to_string();
        let kill = Command::new("kill").args(["-INT", &id]).status().await;
        assert!(kill.expect("kill runs").success(), "the signal is sent");
        let mut rest = Vec::new();
        while let Some(line) = self.lines.next_line().await.expect("UTF-8") {
            rest.push(line);
        }
        (self.process.wait().await.expect("it ends"), rest)
    }
}

#[tokio::test]
async fn the_gateway_shows_a_circuit_open_half_open_and_closed_again_in_the_status() {
    let gateway = Gateway::start(&["--cycle", "2"]).await;
    let mut seen = HashSet::new();
    let answer = gateway
        .get_until(
            "/admin/status/research",
            "open, half_open, and closed after that",
            |answer| {
                let state = answer.json()["state"].as_str().expect("a state").to_owned();
                let again = state == "closed" && seen.len() == 3;
                seen.insert(state);
                again
            },
        )
        .await;
    let moved = &answer.json()["metrics"]["state_transitions"];
    for transition in ["closed_to_open", "open_to_half_open", "half_open_to_closed"] {
        assert!(
            moved[transition].as_u64() >= Some(1),
            "{transition} is counted: {moved}"
        );
    }
}

#[tokio::test]
async fn the_gateway_shows_a_limiter_that_rejects_in_the_status() {
    let gateway = Gateway::start(&[]).await;
    let answer = gateway
        .get_until("/admin/status", "data_processing over its limit", |answer| {
            let limiter = &answer.json()["services"]["data_processing"]["rate_limiters"][0];
            limiter["rejected_requests"].as_u64() > Some(0) && !limiter["retry_after"].is_null()
        })
        .await;
    let status = answer.json();
    let limiter = &status["services"]["data_processing"]["rate_limiters"][0];
    let retry_after = limiter["retry_after"]
        .as_f64()
        .expect("an exhausted limit says when to come back");
    assert!(
        retry_after > 0.0 && retry_after <= 5.0,
        "within its window of 5 s: {retry_after}"
    );
}

#[tokio::test]
async fn the_gateway_tells_the_whole_story_on_the_terminal() {
    let mut gateway = Gateway::start(&["--cycle", "2"]).await;
    // In this order, whatever stands between.
    for part in [
        "What to watch",
        "research         the agent is down",
        "research         CIRCUIT closed -> open",
        "research         CIRCUIT open -> half_open",
        "research         CIRCUIT half_open -> closed",
        "summarizer       the agent is down",
        "summarizer       CIRCUIT closed -> open",
        "summarizer       the agent is well again",
        "summarizer       CIRCUIT half_open -> closed",
        "status           data_processing closed",
    ] {
        gateway.line_with(part).await;
    }
    // Degraded instead of refused, and a limiter's rejection with its time: both come back again and again.
    for part in [
        "summarizer: 200 OK from simple_summarizer",
        "summarizer: 200 OK from cache",
    ] {
        gateway.line_with(part).await;
    }
    let line = gateway
        .line_with("rejected: rate limit \"default\" of \"data_processing\"")
        .await;
    assert!(line.contains("; retry after "), "it says when to come back: {line}");
}

#[tokio::test]
async fn a_caller_over_the_limit_gets_a_429_that_says_why_and_when_to_come_back() {
    let gateway = Gateway::start(&["--no-traffic"]).await;
    for _ in 0..5 {
        assert_eq!(gateway.get("/agents/data_processing").await.status, StatusCode::OK);
    }
    let refused = gateway.get("/agents/data_processing").await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.header("content-type"), "application/problem+json");
    let problem = refused.json();
    assert_eq!(problem["service"], "data_processing");
    assert_eq!(problem["limit"], "default");
    assert_eq!(problem["reason"], "over_limit");
    assert_eq!(problem["status"], 429);
    let detail = problem["detail"].as_str().expect("an explanation");
    assert!(
        detail.starts_with("rate limit \"default\" of \"data_processing\" is exhausted"),
        "{detail}"
    );
    let exact = problem["retry_after"].as_f64().expect("a time");
    let whole: u32 = refused.header("retry-after").parse().expect("whole seconds");
    assert!(f64::from(whole) >= exact, "rounded up, never down: {whole} for {exact}");
    assert!((1..=5).contains(&whole), "within the window of 5 s: {whole}");
}

#[tokio::test]
async fn a_caller_of_an_open_circuit_gets_a_503_that_says_why_and_when_to_come_back() {
    let gateway = Gateway::start(&["--no-traffic", "--cycle", "2"]).await;
    let is_open = |answer: &Answer| answer.status == StatusCode::SERVICE_UNAVAILABLE;
    let refused = gateway.get_until("/agents/research", "503", is_open).await;
    assert_eq!(refused.header("content-type"), "application/problem+json");
    // The open time is a quarter of a second: rounded down this would be 0, which invites to come back at once.
    assert_eq!(refused.header("retry-after"), "1");
    let problem = refused.json();
    assert_eq!(problem["service"], "research");
    assert_eq!(problem["limit"], Value::Null);
    assert_eq!(problem["reason"], "open");
    let detail = problem["detail"].as_str().expect("an explanation");
    assert!(detail.starts_with("circuit breaker \"research\" is open"), "{detail}");

    let mut opened = false;
    for _ in 0..2000 {
        gateway.get("/agents/research").await;
        opened = is_open(&gateway.get("/admin/readyz").await);
        if opened {
            break;
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert!(opened, "the gateway is not ready while a critical circuit is open");
    assert_eq!(
        gateway.get("/admin/livez").await.status,
        StatusCode::OK,
        "but it is alive"
    );
}

#[tokio::test]
async fn a_summarizer_that_fails_is_replaced_by_a_simpler_one_and_then_by_the_cache() {
    let gateway = Gateway::start(&["--no-traffic", "--cycle", "2"]).await;
    for expected in ["summarizer", "simple_summarizer", "cache", "summarizer"] {
        gateway
            .get_until("/agents/summarizer", expected, |answer| {
                let refused = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE];
                assert!(
                    !refused.contains(&answer.status),
                    "degraded, not refused: {}",
                    answer.text
                );
                answer.status == StatusCode::OK && answer.json()["agent"] == expected
            })
            .await;
    }
}

#[tokio::test]
async fn the_gateway_forwards_any_method_query_and_body() {
    let gateway = Gateway::start(&["--no-traffic", "--cycle", "3600"]).await;
    for method in ["POST", "PUT", "PATCH", "DELETE", "REPORT"] {
        let sent = Method::from_bytes(method.as_bytes()).expect("a token");
        let headers = [("connection", "x-private, close"), ("x-private", "1")];
        let answer = gateway
            .send(sent, "/agents/research?depth=2&q=a%20b", &headers, "what is new?")
            .await;
        assert_eq!(answer.status, StatusCode::OK);
        let echo = answer.json();
        assert_eq!(echo["agent"], "research");
        assert_eq!(echo["method"], method);
        assert_eq!(echo["query"], "depth=2&q=a%20b");
        assert_eq!(echo["message"], "what is new?");
    }
}

#[tokio::test]
async fn what_the_gateway_does_not_know_is_a_404() {
    let gateway = Gateway::start(&["--no-traffic"]).await;
    for path in [
        "/agents/nobody",
        "/",
        "/admin/status/nobody",
        "/admin/nothing",
        "/agents/research/more",
    ] {
        let answer = gateway.get(path).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(answer.header("content-type"), "application/problem+json", "{path}");
        assert_eq!(answer.json()["status"], 404, "{path}");
    }
}

#[tokio::test]
async fn the_admin_service_is_mounted_under_admin() {
    let gateway = Gateway::start(&["--no-traffic", "--cycle", "3600"]).await;
    for agent in ["research", "data_processing", "summarizer"] {
        assert_eq!(gateway.get(&format!("/agents/{agent}")).await.status, StatusCode::OK);
        let status = gateway.get(&format!("/admin/status/{agent}")).await.json();
        assert_eq!(status["state"], "closed", "{agent}");
        assert_eq!(status["metrics"]["successful_requests"], 1, "{agent}");
    }
    let all = gateway.get("/admin/status").await.json();
    let names: Vec<_> = all["services"].as_object().expect("an object").keys().collect();
    assert_eq!(names, ["data_processing", "research", "summarizer"]);

    let metrics = gateway.get("/admin/metrics").await;
    assert!(metrics.header("content-type").starts_with("text/plain; version=0.0.4"));
    assert!(
        metrics.text.contains("circuit_breaker_state{service=\"research\"} 0\n"),
        "{}",
        metrics.text
    );
    let accept = [("accept", "application/openmetrics-text; version=1.0.0")];
    let metrics = gateway.send(Method::GET, "/admin/metrics", &accept, "").await;
    assert!(
        metrics
            .header("content-type")
            .starts_with("application/openmetrics-text")
    );
    assert!(metrics.text.ends_with("# EOF\n"), "OpenMetrics ends with its mark");

    assert_eq!(gateway.get("/admin/livez").await.status, StatusCode::OK);
    assert_eq!(gateway.get("/admin/readyz").await.status, StatusCode::OK);
    let refused = gateway.send(Method::POST, "/admin/status", &[], "").await;
    assert_eq!(refused.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(refused.header("allow"), "GET, HEAD");
}

#[tokio::test]
async fn without_traffic_the_gateway_calls_nobody_and_says_nothing() {
    let gateway = Gateway::start(&["--no-traffic", "--cycle", "1"]).await;
    // The breaker's own age tells that the agents have failed and recovered meanwhile.
    let aged = |answer: &Answer| answer.json()["state_age_seconds"].as_f64() > Some(1.5);
    let status = gateway
        .get_until("/admin/status/research", "an age above 1.5 s", aged)
        .await
        .json();
    assert_eq!(status["metrics"]["total_requests"], 0, "nobody called");
    assert_eq!(status["rate_limiters"][0]["accepted_requests"], 0, "nobody called");
    let (_, said) = gateway.interrupt().await;
    let events = said.iter().filter(|line| line.contains(" s  "));
    assert!(
        events.clone().all(|line| line.contains(" s  gateway ")),
        "only of its own end: {said:?}"
    );
    assert_eq!(events.count(), 2, "stopping, stopped: {said:?}");
}

#[tokio::test]
async fn ctrl_c_ends_the_gateway_well() {
    for arguments in [&[][..], &["--no-traffic"]] {
        let gateway = Gateway::start(arguments).await;
        // Leaves a connection open and idle, which must not hold up the end.
        gateway.get("/agents/research").await;
        let (status, said) = gateway.interrupt().await;
        assert_eq!(status.code(), Some(0), "Ctrl-C is no failure");
        let last = said.last().expect("it says so");
        assert!(last.ends_with("gateway          stopped"), "{last}");
    }
}

#[tokio::test]
async fn a_port_in_use_is_one_clear_line_and_exit_code_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let output = run_to_end("gateway", &["--port", &port]).await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout), "", "it does not say that it listens");
    let errors = text(&output.stderr);
    assert!(
        errors.starts_with(&format!("error: cannot listen on 127.0.0.1:{port}: ")),
        "{errors}"
    );
    assert!(
        errors.contains("in use") && errors.contains("--port"),
        "what is wrong and what helps: {errors}"
    );
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

#[tokio::test]
async fn arguments_that_mean_nothing_are_refused_with_the_usage() {
    for (arguments, wrong) in [
        (&["--no-trafic"][..], "unknown argument `--no-trafic`"),
        (&["3773"], "unknown argument `3773`"),
        (&["--port"], "`--port` needs a value"),
        (
            &["--port", "65536"],
            "`--port 65536`: expected a whole number, 0 to 65535",
        ),
        (&["--cycle", "0"], "`--cycle 0`: expected a whole number, 1 to 3600"),
        (
            &["--cycle", "soon"],
            "`--cycle soon`: expected a whole number, 1 to 3600",
        ),
    ] {
        let output = run_to_end("gateway", arguments).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let errors = text(&output.stderr);
        assert!(
            errors.starts_with(&format!("error: {wrong}\n")),
            "{arguments:?}: {errors}"
        );
        assert!(errors.contains("Usage:"), "{arguments:?}: {errors}");
    }
    let help = run_to_end("gateway", &["--help"]).await;
    assert_eq!(help.status.code(), Some(0));
    for option in ["--port", "--cycle", "--no-traffic", "--help"] {
        assert!(text(&help.stdout).contains(option), "the help tells {option}");
    }
}

#[tokio::test]
async fn direct_use_walks_a_breaker_and_a_limiter_through_their_states() {
    let output = run_to_end("direct", &[]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut lines = text(&output.stdout).lines();
    // In this order, whatever stands between.
    for part in [
        "  answered: ",
        "  failed:   connection refused",
        "  rejected: circuit breaker \"research\" is open; retry after 30s",
        "open circuits: [\"research\"]",
        "the circuit is half_open",
        "  answered: ",
        "  rejected: rate limit \"default\" of \"research\" is exhausted; retry after 600ms",
        "closed_to_open: 1, open_to_half_open: 1, half_open_to_closed: 1",
    ] {
        assert!(
            lines.any(|line| line.contains(part)),
            "{part:?} in its turn in {}",
            text(&output.stdout)
        );
    }
}

#[tokio::test]
async fn background_jobs_are_all_done_those_put_off_included() {
    let output = run_to_end("background_jobs", &[]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    for job in 1..=10 {
        assert!(
            said.contains(&format!("job {job:>2} done: report {job}\n")),
            "job {job} in {said}"
        );
    }
    let put_off = said.lines().filter(|line| line.contains(" put off for ")).count();
    assert!(put_off > 0, "ten jobs do not fit into the wait: {said}");
    assert!(
        said.ends_with(&format!("10 jobs run, {put_off} rejections\n")),
        "each rejection is one line: {said}"
    );
}

/// What an example prints that ends by itself.
async fn printed(name: &str) -> Vec<String> {
    let output = run_to_end(name, &[]).await;
    assert!(output.status.success(), "{name}: {}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "", "{name} has nothing to complain of");
    text(&output.stdout).lines().map(str::to_owned).collect()
}

#[cfg(feature = "axum")]
#[tokio::test]
async fn the_axum_server_limits_each_route_and_each_caller() {
    let lines = printed("axum_server").await;
    let answers: Vec<_> = lines.iter().filter(|line| line.contains(" /")).collect();
    let expected = [
        ("alice", "/search/rust", "200"),
        ("alice", "/search/tower", "200"),
        ("alice", "/search/gates", "200"),
        ("alice", "/search/moats", "429"),
        ("alice", "/report", "200"),
        ("alice", "/health", "429"),
        ("bob", "/report", "429"),
    ];
    assert_eq!(answers.len(), expected.len(), "{lines:#?}");
    for (line, (caller, path, status)) in answers.iter().zip(expected) {
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words[..3], [caller, path, status], "{line}");
    }
    let refusals: Vec<_> = lines.iter().filter(|line| line.contains("violated-policies")).collect();
    for (line, limit) in refusals.iter().zip(["search", "per-caller", "report"]) {
        assert!(line.contains(&format!(r#""violated-policies":["{limit}"]"#)), "{line}");
    }
    assert_eq!(lines.last().map(String::as_str), Some("callers known: 2"));
}

#[tokio::test]
async fn the_http_client_stops_calling_the_sick_host_and_no_other() {
    let lines = printed("http_client").await;
    let sick: Vec<_> = lines.iter().filter(|line| line.starts_with("sick")).collect();
    assert_eq!(sick.len(), 5);
    assert!(sick[..3].iter().all(|line| line.contains("500")), "{lines:#?}");
    assert!(
        sick[3..].iter().all(|line| line.contains("not called, retry after 30")),
        "{lines:#?}"
    );
    let well = lines.iter().filter(|line| *line == "well: 200 OK").count();
    assert_eq!(well, 5);
}

#[tokio::test]
async fn the_grpc_pair_meets_limit_and_circuit() {
    let lines = printed("grpc").await;
    let begin = [
        "watch: Serving",
        "check: Serving",
        "check: Serving",
        r#"ResourceExhausted: rate limit "checks" of "health" is exhausted"#,
        "  RetryInfo: in some seconds, pushback: true",
        "circuit: closed",
        "check: Unavailable",
        "check: Unavailable",
        "circuit: open",
        r#"Unavailable: circuit breaker "health" is open"#,
        "  RetryInfo: in some seconds, pushback: true",
    ];
    assert_eq!(lines.len(), begin.len(), "{lines:#?}");
    for (line, begin) in lines.iter().zip(begin) {
        assert!(line.starts_with(begin), "{line}");
    }
}

#[tokio::test]
async fn the_hyper_server_limits_an_address_over_both_versions() {
    let lines = printed("hyper_server").await;
    let begin = ["HTTP/1.1 200", "HTTP/2.0 200", "HTTP/1.1 200", "HTTP/2.0 429"];
    assert_eq!(lines.len(), begin.len(), "{lines:#?}");
    for (line, begin) in lines.iter().zip(begin) {
        assert!(line.starts_with(begin), "{line}");
    }
}

#[tokio::test]
async fn the_token_budget_settles_what_a_stream_has_cost() {
    let lines = printed("token_budget").await;
    let left: Vec<u32> = lines
        .iter()
        .filter_map(|line| line.strip_suffix(" left")?.rsplit(' ').next()?.parse().ok())
        .collect();
    // The bucket fills by three tokens a second: a slow machine may see a few more.
    for (left, least) in left.iter().zip([137, 177, 173, 10]) {
        assert!((least..least + 15).contains(left), "{lines:#?}");
    }
    assert_eq!(left.len(), 4, "{lines:#?}");
    assert!(lines.last().is_some_and(|line| line.starts_with("429")), "{lines:#?}");
}
