//! The `tonic::Status` that a rejection makes of itself when somebody looks for one, and not before.

use std::{
    fmt,
    panic::{RefUnwindSafe, UnwindSafe},
    sync::OnceLock,
};

/// Says nothing that the rejection does not say, so it takes no part in its equality, and a clone makes its own.
#[derive(Default)]
pub(crate) struct LazyStatus(OnceLock<Box<tonic::Status>>);

impl LazyStatus {
    pub(crate) fn get_or_make(&self, make: impl FnOnce() -> tonic::Status) -> &tonic::Status {
        self.0.get_or_init(|| Box::new(make()))
    }
}

impl Clone for LazyStatus {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for LazyStatus {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for LazyStatus {}

impl fmt::Debug for LazyStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("_")
    }
}

// A status of somebody else's making may hold any error; one made of a rejection holds none, and is never changed.
impl UnwindSafe for LazyStatus {}
impl RefUnwindSafe for LazyStatus {}
