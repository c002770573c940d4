//! A response body that knows how its call ended.

use super::{classify::JudgeEnd, cost::CostMeter};
use crate::{
    clock::Reading,
    permit::{Held, OnUnwind, Outcome, Permit, Verdict},
    reject::Lift,
};
use bytes::Buf;
use http::Response;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use std::{
    fmt,
    pin::Pin,
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Poll, ready},
    thread,
};

pin_project! {
    /// The inner service's body with the permit of its call, which it settles once, when the stream ends.
    ///
    /// The end is the first of these: trailers, the end after the last frame, a frame behind which the body says that nothing
    /// follows, an error; a panic of the inner body is a failure. Dropped before its end, the call was cancelled, unless
    /// nothing was missing: a server asks for no more once it has sent the length that the head announces, or once the body
    /// has said that it is at its end. Frames, errors and the size hint pass unchanged.
    pub struct GuardedBody<B, P: Permit, J: JudgeEnd> {
        #[pin]
        inner: B,
        watched: Option<Watched<P, J>>,
    }
}

/// A permit in charge of a running stream, and who judges how it ended.
struct Watched<P: Permit, J: JudgeEnd> {
    held: Held<P>,
    /// Taken when it has judged.
    judge: Option<J>,
    meter: Option<CostMeter>,
    /// How many bytes are still to come, where that is known.
    left: Option<u64>,
    /// Whether somebody was told that the stream is at its end.
    told_end: AtomicBool,
}

impl<P: Permit, J: JudgeEnd> Watched<P, J> {
    /// Runs a step of the body or of its judge; a panic in it fails the permit, which is charged all the same.
    fn failing_on_unwind<T>(&mut self, step: impl FnOnce() -> T) -> T {
        let meter = self.meter.as_ref();
        let failure = || metered(Outcome::Failure.into(), meter);
        let stepping = OnUnwind::new(self.held.permit(), failure);
        let done = step();
        stepping.done();
        done
    }

    /// Settles the permit as the judge says, if it does, unless a panic of the body has done so.
    fn settle(&mut self, judge: impl FnOnce(J) -> Option<Verdict>) {
        if self.held.permit().is_some()
            && let Some(end) = self.judge.take()
            && let Some(verdict) = self.failing_on_unwind(|| judge(end))
            && let Some(permit) = self.held.permit().take()
        {
            permit.settle(metered(verdict, self.meter.as_ref()), &Reading::new());
        }
    }
}

impl<P: Permit, J: JudgeEnd> Drop for Watched<P, J> {
    fn drop(&mut self) {
        // Not while somebody's panic drops the body: a judge that panics as well would end the program.
        if !thread::panicking() {
            if *self.told_end.get_mut() {
                self.settle(|judge| Some(judge.end(None)));
            } else if self.left == Some(0) {
                self.settle(JudgeEnd::complete);
            }
        }
        if let Some(permit) = self.held.permit().take() {
            permit.cancel(self.meter.as_ref().and_then(CostMeter::counted), &Reading::new());
        }
    }
}

impl<B, P: Permit, J: JudgeEnd> GuardedBody<B, P, J> {
    /// A body whose end is to be judged, of so many bytes if that is known.
    pub(super) fn watched(inner: B, permit: P, judge: J, meter: Option<CostMeter>, length: Option<u64>) -> Self {
        let watched = Watched {
            held: Held::new(Some(permit)),
            judge: Some(judge),
            meter,
            left: length,
            told_end: AtomicBool::new(false),
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
        let (frame, is_last) = ready!(watched.failing_on_unwind(|| {
            this.inner.as_mut().poll_frame(cx).map(|frame| {
                // Nobody may ask for more behind these: a server that knows the length stops here.
                let is_last = match &frame {
                    Some(Ok(frame)) => frame.is_trailers() || this.inner.is_end_stream(),
                    Some(Err(_)) | None => true,
                };
                (frame, is_last)
            })
        }));
        if let Some(Ok(frame)) = &frame {
            let bytes = frame.data_ref().map_or(0, |data| data.remaining() as u64);
            watched.left = watched.left.map(|left| left.saturating_sub(bytes));
        }
        if is_last {
            watched.settle(|judge| {
                Some(match &frame {
                    None => judge.end(None),
                    Some(Ok(frame)) => judge.end(frame.trailers_ref()),
                    Some(Err(_)) => judge.error(),
                })
            });
            *this.watched = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let ended = self.inner.is_end_stream();
        if ended && let Some(watched) = &self.watched {
            // `Relaxed`: whoever drops the body comes after.
            watched.told_end.store(true, Ordering::Relaxed);
        }
        ended
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B: fmt::Debug, P: Permit, J: JudgeEnd> fmt::Debug for GuardedBody<B, P, J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardedBody")
            .field("inner", &self.inner)
            .field("settled", &self.watched.is_none())
            .finish()
    }
}

impl<B, P: Permit, J: JudgeEnd> Lift<Response<B>> for Response<GuardedBody<B, P, J>> {
    fn lift(plain: Response<B>) -> Self {
        plain.map(GuardedBody::settled)
    }
}
