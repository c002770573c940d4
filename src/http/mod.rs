//! What speaks HTTP.

mod accept;
mod admin;
mod answer;
mod body;
mod classify;
mod cost;
mod grpc;
mod problem;
mod ratelimit;
mod told;
#[cfg(feature = "tonic")]
mod tonic;
#[cfg(feature = "tower-http")]
mod tower_http;

pub use admin::{Admin, AdminFuture};
pub use answer::{AnswerBody, AnswerFuture, AsResponse, Passing};
pub use body::GuardedBody;
pub use classify::{CleanEnd, GrpcClassifier, GrpcEnd, HttpClassifier, Judge, JudgeEnd, Judged};
pub use cost::CostMeter;
pub use ratelimit::RateLimitHeaders;
#[cfg(feature = "tower-http")]
pub use tower_http::{TowerHttpClassifier, TowerHttpEnd};
