//! What speaks HTTP.

mod accept;
mod admin;

pub use admin::{Admin, AdminFuture};
