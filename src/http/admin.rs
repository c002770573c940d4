use super::{
    accept::metrics_format,
    problem::{PROBLEM_JSON, Problem},
};
use crate::{Registry, name::Name, state::State};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
};
use http_body_util::Full;
use percent_encoding::percent_decode_str;
use std::{
    borrow::Cow,
    convert::Infallible,
    fmt::Write,
    future::{Ready, ready},
    task::{Context, Poll},
};
use tower_service::Service;

/// Status, metrics and health over HTTP: a tower service from [`Registry::admin`].
///
/// | path | answer |
/// |---|---|
/// | `/status` | every service, as JSON: [`RegistryStatus`](crate::RegistryStatus) |
/// | `/status/{service}` | one service, as JSON: [`ServiceStatus`](crate::ServiceStatus); the name percent-encoded where need be |
/// | `/metrics` | Prometheus text 0.0.4, or `OpenMetrics` 1.0 if the `Accept` header prefers it |
/// | `/livez` | 200: the process answers. Never depends on a circuit |
/// | `/readyz` | 200, or 503 while a circuit marked [`critical`](crate::CircuitBreakerConfig::critical) is open |
///
/// `GET` and `HEAD`; other methods are answered 405, unknown paths and services 404, each as `application/problem+json`
/// (RFC 9457). It only reads, and lets everybody read: mount it where only operators come, see the
/// [README](crate#under-attack). It takes any request body, which it does not read, and never fails, so it mounts in axum
/// (`nest_service("/admin", registry.admin())`), in hyper (`TowerToHyperService`) and in a test alike.
///
/// ```
/// use portcullis::{CircuitBreakerConfig, Registry};
/// use tower::ServiceExt;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let registry = Registry::new();
/// registry.circuit_breaker("search", CircuitBreakerConfig::default())?;
/// let request = http::Request::get("/status/search").body(())?;
/// let response = registry.admin().oneshot(request).await?;
/// assert_eq!(response.status(), 200);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Admin {
    registry: Registry,
}

/// The future of an [`Admin`] answer: it is ready at once.
pub type AdminFuture = Ready<Result<Response<Full<Bytes>>, Infallible>>;

impl Registry {
    /// A service that shows this registry over HTTP: see [`Admin`].
    #[cfg_attr(docsrs, doc(cfg(feature = "http")))]
    #[must_use]
    pub fn admin(&self) -> Admin {
        Admin { registry: self.clone() }
    }
}

impl<B> Service<Request<B>> for Admin {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = AdminFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let path = request.uri().path();
        // Asked first: a page costs work, and only readers get one.
        if !matches!(*request.method(), Method::GET | Method::HEAD) && self.has(path) {
            return ready(Ok(not_allowed()));
        }
        let answer = self.answer(path, request.headers());
        ready(Ok(match *request.method() {
            // The headers of a GET, its length included, and no body.
            Method::HEAD => answer.map(|_| Full::default()),
            _ => answer,
        }))
    }
}

/// The method is not repeated: it may be as long as the server lets a request be.
fn not_allowed() -> Response<Full<Bytes>> {
    let detail = "the admin service only reads: GET and HEAD";
    let mut refusal = problem(StatusCode::METHOD_NOT_ALLOWED, detail);
    let allow = HeaderValue::from_static("GET, HEAD");
    refusal.headers_mut().insert(ALLOW, allow);
    refusal
}

impl Admin {
    /// Whether there is anything at this path.
    fn has(&self, path: &str) -> bool {
        match path.strip_prefix("/status/") {
            Some(service) => decode(service).is_some_and(|name| self.registry.has(&name)),
            None => matches!(path, "/status" | "/metrics" | "/livez" | "/readyz"),
        }
    }

    fn answer(&self, path: &str, headers: &HeaderMap) -> Response<Full<Bytes>> {
        match path {
            "/status" => json_page(&self.registry.status()),
            "/metrics" => {
                let format = metrics_format(headers);
                page(
                    StatusCode::OK,
                    format.content_type(),
                    self.registry.metrics_text(format),
                )
            }
            "/livez" => page(StatusCode::OK, TEXT, "ok\n"),
            "/readyz" => self.readiness(),
            _ => match path.strip_prefix("/status/") {
                Some(service) => self.service(service),
                None => problem(
                    StatusCode::NOT_FOUND,
                    "there are /status, /status/{service}, /metrics, /livez and /readyz",
                ),
            },
        }
    }

    fn service(&self, encoded: &str) -> Response<Full<Bytes>> {
        let status = decode(encoded).and_then(|name| self.registry.service_status(&name));
        match status {
            Some(status) => json_page(&status),
            None => problem(StatusCode::NOT_FOUND, "no such service; /status lists them"),
        }
    }

    /// One line a critical circuit, as Kubernetes prints its own checks.
    fn readiness(&self) -> Response<Full<Bytes>> {
        let (mut ready, mut text) = (true, String::new());
        for breaker in self.registry.circuits() {
            if !breaker.config.is_critical() {
                continue;
            }
            let open = breaker.state == State::Open;
            ready &= !open;
            let mark = if open { '-' } else { '+' };
            // A name may hold line breaks: quoted, it cannot forge a line. Writing to a string cannot fail.
            let _ = writeln!(text, "[{mark}]circuit {:?} {}", breaker.service, breaker.state.as_str());
        }
        let (status, verdict) = if ready {
            (StatusCode::OK, "ready\n")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
        };
        text.push_str(verdict);
        page(status, TEXT, text)
    }
}

/// A path segment as a name. What is not UTF-8 is nobody's name, and what is longer than any name with every byte encoded is not
/// even looked at.
fn decode(encoded: &str) -> Option<Cow<'_, str>> {
    const LONGEST: usize = "%00".len() * Name::MAX_LEN;
    if encoded.len() > LONGEST {
        return None;
    }
    percent_decode_str(encoded).decode_utf8().ok()
}

const TEXT: &str = "text/plain; charset=utf-8";

fn json_page(value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_vec(value) {
        Ok(body) => page(StatusCode::OK, "application/json", body),
        // Not reached with the types of this crate; a panic here would take a connection down.
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn problem(status: StatusCode, detail: &str) -> Response<Full<Bytes>> {
    page(status, PROBLEM_JSON, Problem::blank(status, &detail).json())
}

fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let body = body.into();
    let length = body.len();
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_LENGTH, length.into());
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // A service may be named like a page: no browser is to take text for one.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
