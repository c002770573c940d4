//! What portcullis promises: each goal compares a row with others of the same run.

use crate::{
    measure::Figures,
    ours, peers,
    primitives::{FLOOR, SMALL_ALLOCATION},
};

/// So many times the median of this row, on so many threads.
type Term = (f64, &'static str, u32);

pub(crate) struct Goal {
    pub(crate) what: String,
    /// What was measured, and what it may be at most; `unit` says of what.
    pub(crate) value: f64,
    pub(crate) bound: f64,
    pub(crate) unit: &'static str,
}

impl Goal {
    pub(crate) fn is_held(&self) -> bool {
        self.value <= self.bound
    }
}

/// "The same" in a goal means: within a quarter.
const FLAT: f64 = 1.25;

/// The goals whose rows were all measured.
pub(crate) fn judge(figures: &[Figures]) -> Vec<Goal> {
    let find = |name: &str| figures.iter().find(|row| row.name == name);
    let mut goals: Vec<_> = times()
        .into_iter()
        .filter_map(|(row, threads, bound)| {
            let median = |name, threads| find(name)?.median(threads);
            let value = median(row, threads)?;
            let mut sum = 0.0;
            for &(factor, other, threads) in &bound {
                sum += factor * median(other, threads)?;
            }
            Some(Goal {
                what: format!("{row}, {} ≤ {}", on(threads), spelt(&bound, threads)),
                value,
                bound: sum,
                unit: "ns",
            })
        })
        .collect();
    goals.extend(allocations(figures));
    goals.extend(futures(figures, "over HTTP", |name| name.ends_with("HTTP")));
    goals.extend(futures(figures, "otherwise", |name| !name.ends_with("HTTP")));
    goals
}

/// No accepted call allocates; the worst row stands for all.
fn allocations(figures: &[Figures]) -> Option<Goal> {
    let accepting = figures.iter().filter(|row| is_accepting(row.name));
    let worst = accepting.max_by(|one, other| one.allocations.total_cmp(&other.allocations))?;
    Some(Goal {
        what: format!("no heap allocation in an accepted call (most: {})", worst.name),
        value: worst.allocations,
        bound: 0.0,
        unit: "allocations",
    })
}

/// A response future is the inner one and at most 64 bytes; the worst row stands for all.
fn futures(figures: &[Figures], which: &str, is_meant: fn(&str) -> bool) -> Option<Goal> {
    let (added, worst) = figures
        .iter()
        // Two layers have two futures.
        .filter(|row| is_ours(row.name) && is_meant(row.name) && !row.name.ends_with("two layers"))
        .filter_map(|row| row.future.map(|(whole, inner)| (whole - inner, row.name)))
        .max_by_key(|(added, _)| *added)?;
    Some(Goal {
        what: format!("the response future adds ≤ 64 bytes to the inner one, {which} (most: {worst})"),
        value: added as f64,
        bound: 64.0,
        unit: "bytes",
    })
}

/// Those that are not about a row; measured apart, by the allocator.
pub(crate) fn memory() -> Vec<Goal> {
    let keyed = |keys: u32, named: &str| Goal {
        what: format!(
            "keyed limiter of {named} keys: ≤ 64 bytes a key (governor: {:.1})",
            peers::governor_bytes_a_key(keys)
        ),
        value: ours::bytes_a_key(keys),
        bound: 64.0,
        unit: "bytes",
    };
    vec![
        Goal {
            what: "sliding window: ≤ 8 bytes a request of its quota".into(),
            value: ours::bytes_a_slot(),
            bound: 8.0,
            unit: "bytes",
        },
        keyed(1_000, "1,000"),
        keyed(100_000, "100,000"),
    ]
}

fn is_ours(name: &str) -> bool {
    name.contains(": portcullis")
}

fn is_accepting(name: &str) -> bool {
    is_ours(name)
        && !name.contains("open:")
        && !name.contains("empty:")
        // Over HTTP the answer gets header fields.
        && !name.contains("HTTP")
        // The service's own error is boxed into the error of the layer.
        && !name.contains("failures:")
}

fn on(threads: u32) -> &'static str {
    if threads == 1 { "1 thread" } else { "2 threads" }
}

fn spelt(bound: &[Term], threads: u32) -> String {
    let term = |&(factor, row, on_threads): &Term| {
        let row = match row {
            FLOOR => "floor",
            SMALL_ALLOCATION => "small allocation",
            row => row.split_once(": ").map_or(row, |(_, candidate)| candidate),
        };
        let elsewhere = if on_threads == threads {
            String::new()
        } else {
            format!(" on {}", on(on_threads))
        };
        if factor < 0.2 {
            format!("1/{:.0} {row}{elsewhere}", 1.0 / factor)
        } else {
            format!("{} {row}{elsewhere}", (factor * 100.0).round() / 100.0)
        }
    };
    bound.iter().map(term).collect::<Vec<_>>().join(" + ")
}

fn times() -> Vec<(&'static str, u32, Vec<Term>)> {
    let mut goals = Vec::new();
    let recloser = "breaker closed: recloser";
    let tower_resilience = "breaker closed: tower-resilience, count window";
    for row in ["breaker closed: portcullis", "breaker closed: portcullis, count window"] {
        goals.push((row, 1, vec![(2.5, FLOOR, 1)]));
        goals.push((row, 2, vec![(2.5, FLOOR, 2)]));
        goals.push((row, 1, vec![(1.1, recloser, 1)]));
        goals.push((row, 2, vec![(1.0 / 15.0, recloser, 2)]));
        goals.push((row, 1, vec![(0.1, tower_resilience, 1)]));
        goals.push((row, 2, vec![(0.01, tower_resilience, 2)]));
    }
    let few = "breaker closed: portcullis, time window after 1,000 calls";
    let many = "breaker closed: portcullis, time window after 10,000,000 calls";
    for threads in [1, 2] {
        goals.push((few, threads, vec![(4.0, FLOOR, threads)]));
        goals.push((many, threads, vec![(4.0, FLOOR, threads)]));
        goals.push((many, threads, vec![(FLAT, few, threads)]));
    }
    for (row, peer) in [
        ("breaker, 1 % failures: portcullis", "breaker, 1 % failures: recloser"),
        (
            "breaker, 1 % failures: portcullis, count window",
            "breaker, 1 % failures: recloser",
        ),
        ("breaker, 10 % failures: portcullis", "breaker, 10 % failures: recloser"),
        (
            "breaker, 10 % failures: portcullis, count window",
            "breaker, 10 % failures: recloser",
        ),
    ] {
        goals.push((row, 1, vec![(3.0, FLOOR, 1)]));
        goals.push((row, 2, vec![(1.0 / 3.0, peer, 2)]));
    }
    let open = "breaker open: portcullis";
    goals.push((open, 1, vec![(3.0, FLOOR, 1), (1.0, SMALL_ALLOCATION, 1)]));
    goals.push((open, 2, vec![(FLAT, open, 1)]));
    let governor = "token bucket: governor, plain";
    goals.push(("token bucket: portcullis", 1, vec![(1.0, governor, 1)]));
    goals.push(("token bucket: portcullis", 2, vec![(0.5, governor, 2)]));
    let refused = "token bucket empty: governor, plain";
    let tower_governor = "token bucket empty: tower_governor, HTTP";
    for threads in [1, 2] {
        let bound = vec![(1.0, refused, threads), (1.0, SMALL_ALLOCATION, threads)];
        goals.push(("token bucket empty: portcullis", threads, bound));
        let bound = vec![(1.0 / 20.0, tower_governor, threads)];
        goals.push(("token bucket empty: portcullis, HTTP", threads, bound));
    }
    let (small, middle, large) = (
        "sliding window: portcullis, 100",
        "sliding window: portcullis, 10,000",
        "sliding window: portcullis, 1,000,000",
    );
    for threads in [1, 2] {
        for row in [small, middle, large] {
            goals.push((row, threads, vec![(4.0, FLOOR, threads)]));
        }
        goals.push((large, threads, vec![(FLAT, small, threads)]));
    }
    for (row, peer) in [
        ("keyed: portcullis, 1 key", "keyed: governor, plain, 1 key"),
        ("keyed: portcullis, 1,000 keys", "keyed: governor, plain, 1,000 keys"),
        (
            "keyed: portcullis, 100,000 keys",
            "keyed: governor, plain, 100,000 keys",
        ),
    ] {
        goals.push((row, 1, vec![(0.8, peer, 1)]));
        goals.push((row, 2, vec![(0.5, peer, 2)]));
    }
    let stacked = "limiter + breaker: portcullis, two layers";
    for threads in [1, 2] {
        goals.push((
            "limiter + breaker: portcullis, one layer",
            threads,
            vec![(0.8, stacked, threads)],
        ));
    }
    goals
}
