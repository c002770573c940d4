//! What speaks HTTP.

mod accept;
mod admin;
mod answer;
mod body;
mod classify;
mod client_ip;
mod cost;
mod grpc;
pub(crate) mod key;
mod problem;
mod ratelimit;
mod route;
mod told;
#[cfg(feature = "tonic")]
mod tonic;
#[cfg(feature = "tower-http")]
mod tower_http;

pub use admin::{Admin, AdminFuture};
pub use answer::{AnswerBody, AnswerFuture, AsResponse, Passing};
pub use body::GuardedBody;
pub use classify::{CleanEnd, GrpcClassifier, GrpcEnd, HttpClassifier, Judge, JudgeEnd, Judged};
pub use client_ip::{ClientIp, Forwarded};
pub use cost::CostMeter;
pub use ratelimit::RateLimitHeaders;
pub use route::{PerRoute, PerRouteBuilder};
#[cfg(feature = "tower-http")]
pub use tower_http::{TowerHttpClassifier, TowerHttpEnd};
