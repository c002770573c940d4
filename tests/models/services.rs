//! Services behind a breaker, polled by hand: what is reserved for a call before it is made, and who waits for that.

use portcullis::{CircuitBreaker, CircuitBreakerLayer, Outcome, Rejected, Verdict};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};
use tokio::sync::oneshot::{Receiver, Sender, channel, error::RecvError};
use tower::{BoxError, Layer, Service, service_fn, util::BoxService};

/// How a call is told to end.
#[derive(Debug)]
enum End {
    With(Verdict),
    Panic,
}

/// A call is a channel through which it is told.
type Boxed = BoxService<Receiver<End>, Verdict, BoxError>;

async fn run(call: Receiver<End>) -> Result<Verdict, RecvError> {
    match call.await? {
        End::With(verdict) => Ok(verdict),
        End::Panic => resume_unwind(Box::new(())),
    }
}

#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A service behind the breaker.
pub(crate) struct Guarded {
    service: Boxed,
    woken: Arc<Flag>,
}

impl Guarded {
    /// One that is ready to reject, or one that waits instead.
    pub(crate) fn new(breaker: &CircuitBreaker, waits: bool) -> Self {
        let layer = CircuitBreakerLayer::new(breaker.clone()).classify(|end: &Result<Verdict, RecvError>| {
            let never_told = Outcome::Failure.into();
            end.as_ref().copied().unwrap_or(never_told)
        });
        let inner = service_fn(run);
        Self {
            service: if waits {
                BoxService::new(layer.not_ready().layer(inner))
            } else {
                BoxService::new(layer.layer(inner))
            },
            woken: Arc::default(),
        }
    }

    /// Asks whether it is ready; if not, it will be woken.
    pub(crate) fn is_ready(&mut self) -> bool {
        self.woken.0.store(false, Ordering::Relaxed);
        let waker = self.woken.clone().into();
        self.service.poll_ready(&mut Context::from_waker(&waker)).is_ready()
    }

    pub(crate) fn is_woken(&self) -> bool {
        self.woken.0.load(Ordering::Relaxed)
    }

    pub(crate) fn call(&mut self) -> Running {
        let (tell, told) = channel();
        Running {
            tell,
            future: self.service.call(told),
        }
    }
}

fn poll(mut future: impl Future<Output = Result<Verdict, BoxError>> + Unpin) -> Poll<Result<Verdict, BoxError>> {
    Pin::new(&mut future).poll(&mut Context::from_waker(Waker::noop()))
}

/// A call by a service.
pub(crate) struct Running {
    tell: Sender<End>,
    future: <Boxed as Service<Receiver<End>>>::Future,
}

impl Running {
    /// Why it was rejected; nothing if it runs.
    pub(crate) fn rejection(&mut self) -> Option<Rejected> {
        match poll(self.future.as_mut()) {
            Poll::Pending => None,
            Poll::Ready(end) => {
                let error = end.expect_err("nobody told it to end");
                Some(Rejected::find(&*error).expect("a rejection").clone())
            }
        }
    }

    pub(crate) fn end(self, verdict: Verdict) {
        let end = self.told(End::With(verdict));
        assert!(matches!(end, Poll::Ready(Ok(_))), "it was told to end");
    }

    pub(crate) fn panic(self) {
        let panics = catch_unwind(AssertUnwindSafe(|| self.told(End::Panic)));
        assert!(panics.is_err(), "it was told to panic");
    }

    fn told(self, end: End) -> Poll<Result<Verdict, BoxError>> {
        let Self { tell, future } = self;
        tell.send(end).expect("it runs");
        poll(future)
    }
}
