use crate::error::ConfigError;
use std::{
    borrow::Borrow,
    cmp::Ordering,
    fmt,
    hash::{Hash, Hasher},
    ops::Deref,
    str,
    sync::Arc,
};

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
pub struct Name(Text);

/// A short name lies in the value itself: every rejection carries one or two, and a reference count that all threads write would
/// make them wait for each other.
enum Text {
    Short(Short),
    Long(Arc<str>),
}

/// As large as the whole, so that it is copied in one piece: pieces that are read otherwise than they were just written make
/// the processor wait.
#[derive(Clone, Copy)]
pub(crate) struct Short {
    _is: Is,
    len: u8,
    bytes: [u8; SHORT],
}

/// What tells a short name from a long one: a byte of which one value is taken.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Is {
    Short,
}

/// As long as fits beside that and the length where the other kind has its pointer and its length.
const SHORT: usize = 22;

const _: () = assert!(size_of::<Option<Name>>() == 24);

impl From<&Short> for Name {
    #[inline]
    fn from(short: &Short) -> Self {
        Self(Text::Short(*short))
    }
}

impl Clone for Name {
    #[inline]
    fn clone(&self) -> Self {
        match &self.0 {
            Text::Short(short) => Self(Text::Short(*short)),
            Text::Long(text) => Self::share(text),
        }
    }
}

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
        let mut bytes = [0; SHORT];
        Ok(Self(match (bytes.get_mut(..name.len()), u8::try_from(name.len())) {
            (Some(place), Ok(len)) => {
                place.copy_from_slice(name.as_bytes());
                Text::Short(Short {
                    _is: Is::Short,
                    len,
                    bytes,
                })
            }
            _ => Text::Long(name.into()),
        }))
    }

    /// The name, if it lies in the value itself. By reference: one that is copied is to be copied to where it is wanted.
    #[inline]
    pub(crate) fn as_short(&self) -> Option<&Short> {
        match &self.0 {
            Text::Short(short) => Some(short),
            Text::Long(_) => None,
        }
    }

    #[cold]
    #[inline(never)]
    fn share(text: &Arc<str>) -> Self {
        Self(Text::Long(text.clone()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match &self.0 {
            Text::Short(Short { len, bytes, .. }) => match str::from_utf8(&bytes[..usize::from(*len)]) {
                Ok(text) => text,
                Err(_) => unreachable!("copied from text as a whole"),
            },
            Text::Long(text) => text,
        }
    }

    /// The same as bytes, which nobody has to check.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Text::Short(Short { len, bytes, .. }) => &bytes[..usize::from(*len)],
            Text::Long(text) => text.as_bytes(),
        }
    }
}

impl TryFrom<&str> for Name {
    type Error = ConfigError;
    /// For a policy of your own; the builders of this crate take text.
    fn try_from(name: &str) -> Result<Self, ConfigError> {
        Self::new("name", name)
    }
}

// As the text does, all of them: a map with names as keys is asked with text.
impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}
impl Eq for Name {}
impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_bytes().cmp(other.as_bytes())
    }
}
impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl Deref for Name {
    type Target = str;
    fn deref(&self) -> &str {
        self.as_str()
    }
}
impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}
impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}
impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}
impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}
impl PartialEq<Name> for &str {
    fn eq(&self, other: &Name) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}
