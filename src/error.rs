use std::{fmt, ops::RangeInclusive, time::Duration};

/// A setting that cannot be accepted: which field, what it was, what would be valid.
///
/// ```
/// # use portcullis::CircuitBreaker;
/// let error = CircuitBreaker::builder("search").failure_threshold(0).build().unwrap_err();
/// assert_eq!(error.to_string(), "failure_threshold is 0; expected 1 to 4294967295");
/// assert_eq!(error.field(), "failure_threshold");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}; expected {expected}")]
pub struct ConfigError {
    field: &'static str,
    value: String,
    expected: String,
}

impl ConfigError {
    pub(crate) fn new(field: &'static str, value: impl Into<String>, expected: impl Into<String>) -> Self {
        Self {
            field,
            value: value.into(),
            expected: expected.into(),
        }
    }

    /// The setting's name, as the method that sets it is called.
    #[must_use]
    pub fn field(&self) -> &'static str {
        self.field
    }

    /// The value that was refused.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }

    /// What would have been valid.
    #[must_use]
    pub fn expected(&self) -> &str {
        &self.expected
    }
}

/// The longest duration that any setting takes: 100 years of 365.25 days.
pub(crate) const LONGEST: Duration = Duration::from_secs(100 * 31_557_600);

/// Refuses a value outside the range.
pub(crate) fn within<T: PartialOrd + fmt::Display>(
    field: &'static str,
    value: T,
    range: &RangeInclusive<T>,
) -> Result<T, ConfigError> {
    if range.contains(&value) {
        return Ok(value);
    }
    let expected = format!("{} to {}", range.start(), range.end());
    Err(ConfigError::new(field, value.to_string(), expected))
}

/// Refuses a duration of zero or of more than 100 years.
pub(crate) fn duration(field: &'static str, value: Duration) -> Result<Duration, ConfigError> {
    if value > Duration::ZERO && value <= LONGEST {
        return Ok(value);
    }
    Err(ConfigError::new(field, format!("{value:?}"), "1 ns to 100 years"))
}

/// Refuses a share outside (0, 1], NaN included.
pub(crate) fn share(field: &'static str, value: f64) -> Result<f64, ConfigError> {
    if value > 0.0 && value <= 1.0 {
        return Ok(value);
    }
    Err(ConfigError::new(
        field,
        value.to_string(),
        "a share above 0 and at most 1",
    ))
}
