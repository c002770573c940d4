//! What a row is: a candidate, how its calls are made, and what it must have done with them.

use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::{black_box, spin_loop},
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    thread,
};
use tower::{Layer, Service};

/// Makes so many calls and counts those that were answered with `Ok` (over HTTP: with status 200).
///
/// A batch is a loop of its own type, so that a call is inlined into it as it would be into a user's program.
pub(crate) type Batch = Box<dyn FnMut(u64) -> u64 + Send>;

/// Calls made, and those among them that were answered with `Ok`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) calls: u64,
    pub(crate) ok: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, calls: u64, ok: u64) {
        self.calls += calls;
        self.ok += ok;
    }

    pub(crate) fn join(&mut self, other: Self) {
        self.add(other.calls, other.ok);
    }

    pub(crate) fn errors(self) -> u64 {
        self.calls - self.ok
    }
}

/// What becomes of a row's calls.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expect {
    Accept,
    /// The same on one thread, and nineteen of twenty on two.
    AcceptMost,
    Reject,
    /// All are admitted; of each thread's calls one in so many fails.
    FailOneIn(u64),
}

/// One instance of what is measured.
pub(crate) struct Candidate {
    /// Makes the batch of a thread, given its index; the batches of one candidate share its state.
    pub(crate) batch: Box<dyn Fn(usize) -> Batch>,
    /// Asks the candidate itself, as far as its API tells, whether it did the work of all its calls.
    pub(crate) check: Box<dyn Fn(Tally) -> Result<(), String>>,
    /// All its calls so far.
    pub(crate) total: Tally,
    /// The size of the response future, and of the inner service's.
    pub(crate) future: Option<(usize, usize)>,
}

pub(crate) struct Row {
    /// "group: candidate".
    pub(crate) name: &'static str,
    pub(crate) expect: Expect,
    /// 1 if the candidate cannot be shared.
    pub(crate) threads: u32,
    /// Calls in a measurement, if they are to be few.
    pub(crate) calls: Option<u64>,
    /// Whether each measurement gets an instance of its own, since calls change what the row is about.
    pub(crate) fresh: bool,
    pub(crate) build: Box<dyn Fn() -> Candidate>,
}

impl Row {
    pub(crate) fn new(name: &'static str, expect: Expect, build: impl Fn() -> Candidate + 'static) -> Self {
        Self {
            name,
            expect,
            threads: 2,
            calls: None,
            fresh: false,
            build: Box::new(build),
        }
    }

    pub(crate) fn accept(name: &'static str, build: impl Fn() -> Candidate + 'static) -> Self {
        Self::new(name, Expect::Accept, build)
    }

    pub(crate) fn reject(name: &'static str, build: impl Fn() -> Candidate + 'static) -> Self {
        Self::new(name, Expect::Reject, build)
    }

    pub(crate) fn fresh(mut self) -> Self {
        self.fresh = true;
        self
    }

    pub(crate) fn calls(mut self, calls: u64) -> Self {
        self.calls = Some(calls);
        self
    }

    pub(crate) fn never_shared(mut self) -> Self {
        self.threads = 1;
        self
    }
}

impl Candidate {
    pub(crate) fn new(batch: impl Fn(usize) -> Batch + 'static) -> Self {
        Self {
            batch: Box::new(batch),
            check: Box::new(|_| Ok(())),
            total: Tally::default(),
            future: None,
        }
    }

    pub(crate) fn check(mut self, check: impl Fn(Tally) -> Result<(), String> + 'static) -> Self {
        self.check = Box::new(check);
        self
    }

    pub(crate) fn future(mut self, whole: usize, inner: usize) -> Self {
        self.future = Some((whole, inner));
        self
    }

    /// With so many calls made before it is measured.
    pub(crate) fn after(mut self, calls: u64) -> Self {
        let ok = (self.batch)(0)(calls);
        self.total.add(calls, ok);
        self
    }

    /// Plain calls: a function for each call, which makes it and says whether it was answered with `Ok`.
    pub(crate) fn plain<F: FnMut() -> bool + Send + 'static>(step: impl Fn(usize) -> F + 'static) -> Self {
        Self::new(move |thread| batch(step(thread)))
    }

    /// Calls of a tower service: ready, call, poll.
    pub(crate) fn service<L>(layer: L) -> Self
    where
        L: Layer<Echo> + 'static,
        L::Service: Service<u32> + Send + 'static,
    {
        Self::plain(move |_| {
            let mut service = layer.layer(Echo);
            move || ask(&mut service, 1, is_ok)
        })
        .sized::<<L::Service as Service<u32>>::Future, Echo, u32>()
    }

    /// The same as axum does it: each request gets a clone of the service.
    pub(crate) fn cloned<L>(layer: L) -> Self
    where
        L: Layer<Echo> + 'static,
        L::Service: Service<u32> + Clone + Send + 'static,
    {
        Self::plain(move |_| {
            let service = layer.layer(Echo);
            move || ask(&mut service.clone(), 1, is_ok)
        })
        .sized::<<L::Service as Service<u32>>::Future, Echo, u32>()
    }

    /// The same with a service that fails one call in so many.
    pub(crate) fn failing<L>(layer: L, one_in: u64) -> Self
    where
        L: Layer<Echo> + 'static,
        L::Service: Service<u32> + Send + 'static,
    {
        Self::plain(move |_| {
            let mut service = layer.layer(Echo);
            let mut mix = Mix::new(one_in);
            move || ask(&mut service, mix.next(), is_ok)
        })
        .sized::<<L::Service as Service<u32>>::Future, Echo, u32>()
    }

    /// The same with a key for each request.
    pub(crate) fn keyed<L>(layer: L, keys: u32) -> Self
    where
        L: Layer<Echo> + 'static,
        L::Service: Service<u32> + Send + 'static,
    {
        Self::plain(move |thread| {
            let mut service = layer.layer(Echo);
            let mut keys = Keys::new(keys, thread);
            move || ask(&mut service, keys.next(), is_ok)
        })
        .sized::<<L::Service as Service<u32>>::Future, Echo, u32>()
    }

    /// Calls of an HTTP service, answered with `Ok` if the status is 200.
    pub(crate) fn http<L, B>(layer: L) -> Self
    where
        L: Layer<Web> + 'static,
        L::Service: Service<Request, Response = axum::http::Response<B>> + Send + 'static,
    {
        Self::plain(move |_| {
            let mut service = layer.layer(Web);
            move || {
                ask(&mut service, Request::new(()), |answer| {
                    answer.as_ref().is_ok_and(|response| response.status() == 200)
                })
            }
        })
        .sized::<<L::Service as Service<Request>>::Future, Web, Request>()
    }

    fn sized<F, S: Service<R>, R>(self) -> Self {
        self.future(size_of::<F>(), size_of::<S::Future>())
    }
}

fn batch(mut step: impl FnMut() -> bool + Send + 'static) -> Batch {
    Box::new(move |calls| {
        let mut ok = 0;
        for _ in 0..calls {
            ok += u64::from(step());
        }
        ok
    })
}

fn is_ok<T, E>(answer: &Result<T, E>) -> bool {
    answer.is_ok()
}

/// One call of a tower service, and whether its answer is good. The answer is looked at where it is: to move it would be counted
/// with the call.
#[inline]
fn ask<S: Service<R>, R>(
    service: &mut S,
    request: R,
    is_good: impl FnOnce(&Result<S::Response, S::Error>) -> bool,
) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    let mut waiting = Waiting::default();
    loop {
        match service.poll_ready(&mut cx) {
            Poll::Ready(Ok(())) => break,
            Poll::Ready(Err(_)) => return false,
            Poll::Pending => waiting.go_on(),
        }
    }
    // Pinned where `call` leaves it, as `await` does.
    black_box(settle(pin!(service.call(black_box(request))), is_good))
}

/// Polls until it is ready. Ours is at once; a peer whose lock another thread holds is polled again, which costs it less than
/// being woken by a runtime.
#[inline]
pub(crate) fn settle<F: Future, T>(mut future: Pin<&mut F>, look: impl FnOnce(&F::Output) -> T) -> T {
    let mut cx = Context::from_waker(Waker::noop());
    let mut waiting = Waiting::default();
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(output) => return look(&output),
            Poll::Pending => waiting.go_on(),
        }
    }
}

#[derive(Default)]
struct Waiting(u32);

impl Waiting {
    #[cold]
    fn go_on(&mut self) {
        self.0 += 1;
        // The holder of a lock may wait for this core.
        if self.0 > 2_000 {
            thread::yield_now();
        } else {
            spin_loop();
        }
    }
}

/// The service behind the layers: it answers with the request, at once, and fails on [`Mix::FAIL`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Echo;

impl Service<u32> for Echo {
    type Response = u32;
    type Error = io::Error;
    type Future = Ready<io::Result<u32>>;

    #[inline]
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: u32) -> Self::Future {
        ready(echo(request))
    }
}

/// What [`Echo`] answers, for the peers that take a closure.
#[inline]
pub(crate) fn echo(request: u32) -> io::Result<u32> {
    if black_box(request) == Mix::FAIL {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(request)
    }
}

pub(crate) type Request = axum::http::Request<()>;

/// The HTTP service behind the layers: status 200, no body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Web;

impl Service<Request> for Web {
    type Response = axum::http::Response<axum::body::Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    #[inline]
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, _: Request) -> Self::Future {
        ready(Ok(Self::Response::default()))
    }
}

/// Requests of which one in so many fails.
pub(crate) struct Mix {
    one_in: u64,
    left: u64,
}

impl Mix {
    const FAIL: u32 = u32::MAX;

    pub(crate) fn new(one_in: u64) -> Self {
        Self { one_in, left: one_in }
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u32 {
        self.left -= 1;
        if self.left == 0 {
            self.left = self.one_in;
            Self::FAIL
        } else {
            1
        }
    }
}

/// So many keys by turns, neighbours far apart; two threads begin at different ones.
pub(crate) struct Keys {
    count: u32,
    step: u32,
    key: u32,
}

impl Keys {
    pub(crate) fn new(keys: u32, thread: usize) -> Self {
        Self {
            count: keys,
            // Prime to the numbers of keys that are measured, so that every key has its turn.
            step: 7919 % keys,
            key: if thread == 0 { 0 } else { keys / 2 },
        }
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u32 {
        self.key += self.step;
        if self.key >= self.count {
            self.key -= self.count;
        }
        self.key
    }
}

/// `Ok` if what the candidate says of itself is what it should be.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(what: &str, says: &T, should: &T) -> Result<(), String> {
    if says == should {
        Ok(())
    } else {
        Err(format!("{what}: it says {says:?}, and should say {should:?}"))
    }
}
