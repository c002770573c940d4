//! What speaks HTTP.

mod accept;
mod admin;
mod answer;
mod grpc;
mod problem;
mod ratelimit;
mod told;
#[cfg(feature = "tonic")]
mod tonic;

pub use admin::{Admin, AdminFuture};
pub use answer::{AnswerBody, AnswerFuture, AsResponse, Passing};
pub use ratelimit::RateLimitHeaders;
