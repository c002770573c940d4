//! The floor, and what else the machine charges for the parts that a gate is made of.

use crate::row::{Candidate, Row};
use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tower::layer::util::Identity;

pub(crate) const FLOOR: &str = "floor: one addition, a line of its own";
pub(crate) const SMALL_ALLOCATION: &str = "primitive: one small allocation";

/// A counter with the cache line, and the one that the prefetcher pulls along, to itself.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

impl Line {
    #[inline]
    fn add(&self) -> bool {
        black_box(self.0.fetch_add(1, Ordering::Relaxed));
        true
    }
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        Row::accept(FLOOR, || {
            Candidate::plain(|_| {
                let own = Box::new(Line::default());
                move || own.add()
            })
        }),
        Row::accept("primitive: one addition, a shared line", || {
            let shared = Arc::new(Line::default());
            Candidate::plain(move |_| {
                let shared = shared.clone();
                move || shared.add()
            })
        }),
        Row::accept("primitive: clone and drop of a shared Arc", || {
            let shared = Arc::new(());
            Candidate::plain(move |_| {
                let shared = shared.clone();
                move || Arc::strong_count(black_box(&shared.clone())) > 0
            })
        }),
        Row::accept("primitive: Instant::now", || Candidate::plain(|_| instant)),
        Row::accept("primitive: quanta's now", || {
            let clock = quanta::Clock::new();
            Candidate::plain(move |_| {
                let clock = clock.clone();
                move || {
                    black_box(clock.now());
                    true
                }
            })
        }),
        // As large as the rejection that the error mode boxes.
        Row::accept(SMALL_ALLOCATION, || {
            Candidate::plain(|_| {
                || {
                    drop(black_box(Box::new([0_u64; 9])));
                    true
                }
            })
        }),
        Row::accept("primitive: a tower service without layers", || {
            Candidate::service(Identity::new())
        }),
        Row::accept("primitive: an HTTP service without layers", || {
            Candidate::http(Identity::new())
        }),
    ]
}

#[expect(clippy::disallowed_methods, reason = "what it costs is measured")]
fn instant() -> bool {
    black_box(std::time::Instant::now());
    true
}
