//! What is fuzzed: functions that take any bytes, do what these say, and panic where something does not hold.
//!
//! libFuzzer calls them (`tests/fuzz/run`), and so does the crate's own test (`main.rs`), with the seeds and some random bytes.
#![allow(
    unreachable_pub,
    reason = "public for libFuzzer's side, which is a package of its own"
)]

pub mod admin;
pub mod bodies;
pub mod breakers;
pub mod client_address;
pub mod headers;
pub mod limits;

mod input;

use std::{
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
};

/// What comes of a future that waits for nobody.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("it waits"),
    }
}
