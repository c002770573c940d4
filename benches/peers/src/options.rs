//! The command line.

use crate::measure::Effort;

pub(crate) const HELP: &str = "\
portcullis beside its peers: what a guarded call costs (takes about two minutes)

  --axum            an axum server under load by wrk in place of single calls
  --only SUBSTRING  only the rows with this in their name, and the floor they are compared with
  --rounds N        so many rounds (default: 9; with --axum 5)
  --quick           few calls, to see that all rows work; the figures mean little
  --json            the same for machines
";

#[derive(Debug, Default)]
pub(crate) struct Options {
    pub(crate) axum: bool,
    pub(crate) json: bool,
    pub(crate) quick: bool,
    pub(crate) only: String,
    pub(crate) rounds: Option<usize>,
}

impl Options {
    /// `None` if help was asked for.
    pub(crate) fn read(mut arguments: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--axum" => options.axum = true,
                "--json" => options.json = true,
                "--quick" => options.quick = true,
                "--only" => options.only = value()?,
                "--rounds" => {
                    let rounds = value()?.parse().ok().filter(|rounds| *rounds > 0);
                    options.rounds = Some(rounds.ok_or("--rounds needs a number, 1 or more")?);
                }
                "--help" | "-h" => return Ok(None),
                _ => return Err(format!("unknown option {argument}")),
            }
        }
        Ok(Some(options))
    }

    pub(crate) fn effort(&self) -> Effort {
        let (rounds, nanos) = if self.quick { (1, 2e6) } else { (9, 25e6) };
        Effort {
            rounds: self.rounds.unwrap_or(rounds),
            nanos,
        }
    }
}
