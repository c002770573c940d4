//! Pins every policy to a model of its rule that is plain, sequential and slow: both are driven by the same random steps on a
//! manual clock, and after each step must have given the same answer and show the same.
//!
//! All models together make a million steps, more if `PORTCULLIS_MODEL_STEPS` says so. What fails is shrunk, and its seed printed.

mod breaker;
mod keyed;
mod keyed_breaker;
mod limiters;
mod rules;
mod services;
mod steps;

use std::time::Duration;

const NANO: Duration = Duration::from_nanos(1);
const YEAR: Duration = Duration::from_secs(31_557_600);
