//! A rejection as a `tonic::Status`.

use super::grpc;
use crate::rejected::Rejected;
use std::{net::SocketAddr, sync::Arc};
use tonic::{Code, Status, metadata::MetadataMap};

/// The peer of a connection that tonic serves. Behind its TLS it is another type, which is not looked for.
pub(super) fn peer(extensions: &http::Extensions) -> Option<SocketAddr> {
    let info: &tonic::transport::server::TcpConnectInfo = extensions.get()?;
    info.remote_addr()
}

impl Rejected {
    /// Without a source: a status that the rejection holds cannot hold the rejection.
    pub(crate) fn to_status(&self) -> Status {
        let message = self.to_string();
        let mut metadata = MetadataMap::new();
        if let Some(wait) = grpc::pushback(self).and_then(|wait| wait.parse().ok()) {
            metadata.insert(grpc::GRPC_RETRY_PUSHBACK, wait);
        }
        let details = grpc::details(self, &message);
        Status::with_details_and_metadata(
            Code::from(i32::from(grpc::code(self))),
            message,
            details.into(),
            metadata,
        )
    }
}

/// Says what [`Rejected::to_grpc_response`] says; [`Rejected::find`] finds the rejection in the status.
///
/// ```
/// # use portcullis::{RateLimiter, TokenBucket};
/// # use std::time::Duration;
/// let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(60)))?;
/// let answer = || -> Result<tonic::Response<()>, tonic::Status> {
///     limiter.try_acquire()?;
///     Ok(tonic::Response::new(()))
/// };
/// assert!(answer().is_ok());
/// assert_eq!(answer().unwrap_err().code(), tonic::Code::ResourceExhausted);
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[cfg_attr(docsrs, doc(cfg(feature = "tonic")))]
impl From<Rejected> for Status {
    fn from(why: Rejected) -> Self {
        let mut status = why.to_status();
        status.set_source(Arc::new(why));
        status
    }
}

/// The same, of a rejection that is still needed.
#[cfg_attr(docsrs, doc(cfg(feature = "tonic")))]
impl From<&Rejected> for Status {
    fn from(why: &Rejected) -> Self {
        why.clone().into()
    }
}
