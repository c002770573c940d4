//! What a run prints.

use crate::{
    goals::Goal,
    measure::{Crew, Figures, Measured, cores},
    primitives::FLOOR,
};
use serde_json::{Value, json};
use std::fmt::Write;

/// For people: the rows by group, then the goals.
pub(crate) fn table(figures: &[Figures], goals: &[Goal], crew: &Crew) -> String {
    let mut out = format!(
        "{} cores, threads {}pinned\n",
        cores(),
        if crew.pinned { "" } else { "not " }
    );
    out += &disturbances(figures);
    let floors = floors(figures);
    let mut group = "";
    for (name, rows) in by_group(figures) {
        if name != group {
            group = name;
            let _ = writeln!(
                out,
                "\n{:56} {:>11} {:>8} {:>12} {:>8} {:>7} {:>7} {:>12}",
                group, "1 thread", "floors", "2 threads", "floors", "allocs", "bytes", "future"
            );
        }
        for row in rows {
            let _ = write!(out, "  {:54}", candidate(row.name));
            for (threads, width) in [(1_u32, 8), (2, 9)] {
                match row.median(threads) {
                    Some(nanos) => {
                        let mark = if row.is_disturbed(threads) { '~' } else { ' ' };
                        let floors = nanos / floors[threads as usize - 1];
                        let _ = write!(out, " {nanos:width$.1} ns{mark}{floors:8.2}");
                    }
                    None => {
                        let _ = write!(out, " {:>width$}    {:>8}", "–", "");
                    }
                }
            }
            let future = row
                .future
                .map(|(whole, inner)| format!("{whole} ({inner})"))
                .unwrap_or_default();
            let _ = writeln!(
                out,
                " {:>7} {:>7} {future:>12}",
                short(row.allocations),
                short(row.bytes)
            );
        }
    }
    out + &verdicts(goals)
}

/// How much of the run the machine was this program's alone.
fn disturbances(figures: &[Figures]) -> String {
    let share = |threads: usize| {
        let rounds: Vec<_> = figures.iter().flat_map(|row| &row.rounds[threads - 1]).collect();
        let all: f64 = rounds.iter().map(|it| it.undisturbed).sum();
        100.0 * all / rounds.len() as f64
    };
    format!(
        "undisturbed: {:.0} % of the slices on one thread, {:.0} % on two; the others count only in figures marked ~\n",
        share(1),
        share(2)
    )
}

/// The goals, the missed ones last.
pub(crate) fn verdicts(goals: &[Goal]) -> String {
    let mut out = String::from("\nGoals\n");
    for held in [true, false] {
        for goal in goals.iter().filter(|goal| goal.is_held() == held) {
            let share = if goal.bound > 0.0 {
                format!("{:.2} of the bound", goal.value / goal.bound)
            } else {
                String::new()
            };
            let _ = writeln!(
                out,
                "  {:6} {share:>17}  {} ({} of {} {})",
                if held { "held" } else { "MISSED" },
                goal.what,
                short(goal.value),
                short(goal.bound),
                goal.unit
            );
        }
    }
    let held = goals.iter().filter(|goal| goal.is_held()).count();
    let _ = writeln!(out, "{held} of {} goals held", goals.len());
    out
}

/// For machines: the same, and the figures of every round.
pub(crate) fn json(figures: &[Figures], goals: &[Goal], crew: &Crew) -> Value {
    let floors = floors(figures);
    let time = |row: &Figures, threads: u32| {
        let rounds = |of: fn(&Measured) -> f64| row.rounds[threads as usize - 1].iter().map(of).collect::<Vec<_>>();
        row.median(threads).map(|nanos| {
            json!({
                "nanos": nanos,
                "floors": nanos / floors[threads as usize - 1],
                "disturbed": row.is_disturbed(threads),
                "rounds": rounds(|it| it.nanos),
                "undisturbed": rounds(|it| it.undisturbed),
            })
        })
    };
    let rows: Vec<_> = figures
        .iter()
        .map(|row| {
            json!({
                "name": row.name,
                "one_thread": time(row, 1),
                "two_threads": time(row, 2),
                "allocations": row.allocations,
                "allocated_bytes": row.bytes,
                "future_bytes": row.future.map(|(whole, _)| whole),
                "inner_future_bytes": row.future.map(|(_, inner)| inner),
            })
        })
        .collect();
    json!({ "cores": cores(), "pinned": crew.pinned, "rows": rows, "goals": goals_json(goals) })
}

pub(crate) fn goals_json(goals: &[Goal]) -> Vec<Value> {
    let goal = |goal: &Goal| {
        json!({
            "goal": goal.what,
            "value": goal.value,
            "bound": goal.bound,
            "unit": goal.unit,
            "held": goal.is_held(),
        })
    };
    goals.iter().map(goal).collect()
}

/// The floor with one thread and with two.
fn floors(figures: &[Figures]) -> [f64; 2] {
    let floor = figures.iter().find(|row| row.name == FLOOR);
    [1, 2].map(|threads| floor.and_then(|row| row.median(threads)).unwrap_or(f64::NAN))
}

/// The rows of each group together, in the order in which the groups and their rows first appear.
fn by_group(figures: &[Figures]) -> Vec<(&str, Vec<&Figures>)> {
    let mut groups: Vec<(&str, Vec<&Figures>)> = Vec::new();
    for row in figures {
        let name = group(row.name);
        match groups.iter_mut().find(|(other, _)| *other == name) {
            Some((_, rows)) => rows.push(row),
            None => groups.push((name, vec![row])),
        }
    }
    groups
}

fn group(name: &str) -> &str {
    name.split_once(": ").map_or(name, |(group, _)| group)
}

fn candidate(name: &str) -> &str {
    name.split_once(": ").map_or(name, |(_, candidate)| candidate)
}

/// Whole numbers without a fraction.
fn short(number: f64) -> String {
    if number.fract() == 0.0 {
        format!("{number:.0}")
    } else {
        format!("{number:.2}")
    }
}
