//! How numbers and states are shown, once for every snapshot.

/// A share in percent; `None` of nothing.
pub(crate) fn percent(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 * 100.0 / whole as f64)
}

#[cfg(feature = "serde")]
mod serialize {
    use crate::state::{Override, State};
    use serde::{Serialize, Serializer};
    use std::time::Duration;

    pub(crate) fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(duration.as_secs_f64())
    }

    #[expect(clippy::ref_option, reason = "serde hands a field over by reference")]
    pub(crate) fn optional_seconds<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        duration.map(|duration| duration.as_secs_f64()).serialize(serializer)
    }

    impl Serialize for State {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_str(self.as_str())
        }
    }

    impl Serialize for Override {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_str(self.as_str())
        }
    }
}
#[cfg(feature = "serde")]
pub(crate) use serialize::{optional_seconds, seconds};

#[cfg(feature = "serde")]
#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
pub(crate) fn is_zero(n: &u64) -> bool {
    *n == 0
}
