use std::{fmt::Display, ops::RangeInclusive, time::Duration};

pub(crate) const HELP: &str = "\
A gateway with circuit breakers and rate limiters in front of three agents, two of which fail and recover by turns.

Usage: cargo run --example gateway -- [OPTIONS]

Options:
  --port <PORT>      where the gateway listens on 127.0.0.1; 0 takes a free port [default: 3773]
  --cycle <SECONDS>  how long it takes until each failing agent has failed and recovered once, 1 to 3600; all that
                     belongs to it scales along: outages, traffic to these agents, open times [default: 24]
  --no-traffic       makes no calls of its own, and prints nothing but what your calls cause
  --help             prints this";

#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) port: u16,
    pub(crate) cycle: Duration,
    pub(crate) traffic: bool,
}

impl Options {
    /// `None` if help was asked for.
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut options = Self {
            port: 3773,
            cycle: Duration::from_secs(24),
            traffic: true,
        };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--port" => options.port = number(&argument, arguments.next(), &(0..=u16::MAX))?,
                "--cycle" => options.cycle = Duration::from_secs(number(&argument, arguments.next(), &(1..=3600))?),
                "--no-traffic" => options.traffic = false,
                "--help" | "-h" => return Ok(None),
                unknown => return Err(format!("unknown argument `{unknown}`")),
            }
        }
        Ok(Some(options))
    }
}

fn number<T>(option: &str, value: Option<String>, range: &RangeInclusive<T>) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + Display,
{
    let value = value.ok_or_else(|| format!("`{option}` needs a value"))?;
    let number = value.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| {
        let (first, last) = (range.start(), range.end());
        format!("`{option} {value}`: expected a whole number, {first} to {last}")
    })
}
