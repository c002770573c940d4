//! The upstream, which does as it is asked.

use crate::{Entered, Gauge};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use futures_util::{StreamExt, stream};
use std::{
    collections::HashMap,
    future::pending,
    io,
    sync::{Arc, Mutex},
};
use tokio::{sync::oneshot, task::yield_now};

#[derive(Default, Clone)]
pub(crate) struct Upstream {
    /// Requests that are being answered.
    pub(crate) running: Gauge,
    /// Who wants to know when a request has come that hangs.
    waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<()>>>>,
}

impl Upstream {
    pub(crate) fn app(&self) -> Router {
        Router::new()
            .route("/{what}/{id}", get(answer))
            .with_state(self.clone())
    }

    /// Tells when that request hangs.
    pub(crate) fn hangs(&self, id: u64) -> oneshot::Receiver<()> {
        let (tell, told) = oneshot::channel();
        self.waiting.lock().unwrap().insert(id, tell);
        told
    }

    /// That request did not come.
    pub(crate) fn forget(&self, id: u64) {
        self.waiting.lock().unwrap().remove(&id);
    }
}

async fn answer(State(upstream): State<Upstream>, Path((what, id)): Path<(String, u64)>) -> Response {
    let running = upstream.running.enter();
    match &*what {
        "answer" => "an answer".into_response(),
        "stream" => streamed(running, ["one ", "two "].map(Ok)),
        "break" => streamed(running, [Ok("one "), Err(io::Error::other("broken"))]),
        "fail" => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        "stall" => {
            let first = stream::once(async { Ok::<_, io::Error>(Bytes::from_static(b"one ")) });
            let stalls = first.chain(stream::pending()).map(move |piece| {
                let _ = &running;
                piece
            });
            Body::from_stream(stalls).into_response()
        }
        "hang" => {
            let asked = upstream.waiting.lock().unwrap().remove(&id);
            let told = asked.map(|asked| asked.send(()));
            assert_eq!(told, Some(Ok(())), "somebody waits for it");
            pending().await
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

/// A turn between the pieces: else they are sent as one.
fn streamed<const N: usize>(running: Entered, pieces: [io::Result<&'static str>; N]) -> Response {
    let pieces = stream::iter(pieces).then(move |piece| {
        let _ = &running;
        async {
            yield_now().await;
            piece
        }
    });
    Body::from_stream(pieces).into_response()
}
