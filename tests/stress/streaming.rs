//! The upstream as a server of streams, and a caller that reads them: dropped at any await, a call has been dropped before its head,
//! or in the middle of its body.

use crate::upstream::{Call, Running, Stack, Upstream};
use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use portcullis::{BoxError, CircuitBreaker, CircuitBreakerLayer, Rejected};
use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tower::{Layer, Service, ServiceBuilder};

type Pieces = Pin<Box<dyn futures_util::Stream<Item = io::Result<Frame<Bytes>>> + Send>>;
type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

#[derive(Clone)]
struct Server(Upstream);

impl Service<Request<Call>> for Server {
    type Response = Response<StreamBody<Pieces>>;
    type Error = io::Error;
    type Future = Later<io::Result<Self::Response>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Call>) -> Self::Future {
        let call = request.into_body();
        let running = self.0.begin(&call);
        Box::pin(async move {
            call.head().await;
            Ok(Response::new(StreamBody::new(pieces(call, running))))
        })
    }
}

/// A piece, whatever the call comes to, and the end.
fn pieces(call: Call, running: Running) -> Pieces {
    Box::pin(stream::try_unfold(
        (0, call, running),
        |(sent, call, running)| async move {
            match sent {
                0 => {}
                1 => call.body().await?,
                _ => return Ok(None),
            }
            Ok(Some((
                Frame::data(Bytes::from_static(b"a piece")),
                (sent + 1, call, running),
            )))
        },
    ))
}

/// Reads answers to their end.
#[derive(Clone)]
struct Reader<S>(S);

impl<S, B> Service<Call> for Reader<S>
where
    S: Service<Request<Call>, Response = Response<B>, Error = io::Error>,
    S::Future: Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    type Response = ();
    type Error = BoxError;
    type Future = Later<Result<(), BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let head = self.0.call(Request::new(call));
        Box::pin(async move {
            let response = head.await?;
            if let Some(why) = response.extensions().get::<Rejected>() {
                return Err(why.clone().into());
            }
            response.into_body().collect().await.map_err(Into::into)?;
            Ok(())
        })
    }
}

pub(crate) fn stack(breaker: CircuitBreaker, upstream: Upstream) -> Stack {
    let guard = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::http(breaker))
        .service(Server(upstream));
    Stack::new(tower::layer::layer_fn(Reader).layer(guard))
}
