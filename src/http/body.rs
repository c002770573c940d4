//! A response body that knows how its call ended.

use super::{classify::JudgeEnd, cost::CostMeter};
use crate::{
    clock::Reading,
    permit::{Held, Permit, Verdict},
    reject::Lift,
};
use http::Response;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

pin_project! {
    /// The inner service's body with the permit of its call, which it settles once, when the stream ends.
    ///
    /// The end is the first of these: trailers, the end after the last frame, a frame behind which the body says that nothing
    /// follows, an error; a panic of the inner body is a failure. Dropped before its end, the call was cancelled. Frames, errors
    /// and the size hint pass unchanged.
    pub struct GuardedBody<B, P: Permit, J> {
        #[pin]
        inner: B,
        watched: Option<Watched<P, J>>,
    }
}

/// A permit in charge of a running stream, and who judges how it ended.
struct Watched<P: Permit, J> {
    held: Held<P>,
    /// Taken when it has judged.
    judge: Option<J>,
    meter: Option<CostMeter>,
}

impl<P: Permit, J> Drop for Watched<P, J> {
    fn drop(&mut self) {
        if let Some(permit) = self.held.0.take() {
            permit.cancel(self.meter.as_ref().map(CostMeter::get), &Reading::new());
        }
    }
}

impl<B, P: Permit, J> GuardedBody<B, P, J> {
    /// A body whose end is to be judged.
    pub(super) fn watched(inner: B, permit: P, judge: J, meter: Option<CostMeter>) -> Self {
        let watched = Watched {
            held: Held(Some(permit)),
            judge: Some(judge),
            meter,
        };
        Self {
            inner,
            watched: Some(watched),
        }
    }

    /// A body of which everything is known.
    pub(super) fn settled(inner: B) -> Self {
        Self { inner, watched: None }
    }
}

/// Settles the permit, unless a panic of the body has done so.
fn settle<P: Permit, J>(watched: &mut Option<Watched<P, J>>, judge: impl FnOnce(J) -> Verdict) {
    if let Some(mut watched) = watched.take()
        && let (Some(permit), Some(end)) = (watched.held.0.take(), watched.judge.take())
    {
        let verdict = metered(judge(end), watched.meter.as_ref());
        permit.settle(verdict, &Reading::new());
    }
}

pub(super) fn metered(mut verdict: Verdict, meter: Option<&CostMeter>) -> Verdict {
    verdict.metered = meter.map(CostMeter::get);
    verdict
}

impl<B: Body, P: Permit, J: JudgeEnd> Body for GuardedBody<B, P, J> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        let Some(watched) = this.watched else {
            return this.inner.poll_frame(cx);
        };
        let frame = ready!(watched.held.failing_on_unwind(|| this.inner.as_mut().poll_frame(cx)));
        match &frame {
            None => settle(this.watched, |judge| judge.end(None)),
            Some(Err(_)) => settle(this.watched, JudgeEnd::error),
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    settle(this.watched, |judge| judge.end(Some(trailers)));
                } else if this.inner.is_end_stream() {
                    // Nobody may ask for more: a server that knows the length stops here.
                    settle(this.watched, |judge| judge.end(None));
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B: fmt::Debug, P: Permit, J> fmt::Debug for GuardedBody<B, P, J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardedBody")
            .field("inner", &self.inner)
            .field("settled", &self.watched.is_none())
            .finish()
    }
}

impl<B, P: Permit, J> Lift<Response<B>> for Response<GuardedBody<B, P, J>> {
    fn lift(plain: Response<B>) -> Self {
        plain.map(GuardedBody::settled)
    }
}
