use crate::error::ConfigError;
use std::{borrow::Borrow, fmt, ops::Deref, sync::Arc};

/// A validated name: of a service (the key in the [`Registry`](crate::Registry)) or of one of its limits.
///
/// Any non-empty UTF-8 text of at most [`Name::MAX_LEN`] bytes. Endpoints escape what their format asks for. It reads as a
/// `str` and clones without an allocation.
///
/// ```
/// # use portcullis::{CircuitBreaker, Name};
/// let breaker = CircuitBreaker::builder("search").build()?;
/// assert_eq!(breaker.name(), "search");
/// assert!(CircuitBreaker::builder("").build().is_err());
/// assert!(CircuitBreaker::builder("x".repeat(Name::MAX_LEN + 1)).build().is_err());
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 255;

    pub(crate) fn new(field: &'static str, name: &str) -> Result<Self, ConfigError> {
        if name.is_empty() || name.len() > Self::MAX_LEN {
            // The value of a name that is too long would drown the message.
            let shown: String = name.chars().take(40).collect();
            let more = if shown.len() < name.len() { "…" } else { "" };
            return Err(ConfigError::new(
                field,
                format!("{shown:?}{more} ({} bytes)", name.len()),
                format!("1 to {} bytes of text", Self::MAX_LEN),
            ));
        }
        Ok(Self(name.into()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for Name {
    type Error = ConfigError;
    /// For a policy of your own; the builders of this crate take text.
    fn try_from(name: &str) -> Result<Self, ConfigError> {
        Self::new("name", name)
    }
}

impl Deref for Name {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}
impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}
impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}
impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        &*self.0 == other
    }
}
impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        &*self.0 == *other
    }
}
impl PartialEq<Name> for &str {
    fn eq(&self, other: &Name) -> bool {
        *self == &*other.0
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}
