use super::{Admission, Core, RateLimitPermit, RateLimiter, queue::Turn};
use crate::{
    clock::{Reading, Sleep, Timestamp},
    rejected::Rejected,
};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

pin_project! {
    /// A wait for a permit: from [`RateLimiter::acquire`] and its kin.
    ///
    /// Takes its place in line when first polled, leaves it when dropped.
    ///
    /// ```
    /// # use portcullis::{RateLimiter, TokenBucket};
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let limiter = RateLimiter::new("search", TokenBucket::new(1, Duration::from_secs(1)))?;
    /// let (first, second) = tokio::join!(limiter.acquire(), limiter.acquire());
    /// first?;
    /// second?; // one second later
    /// # Ok(()) }
    /// ```
    #[must_use = "a wait does nothing unless it is polled"]
    pub struct Acquire {
        limiter: RateLimiter,
        cost: u32,
        max_wait: Option<Duration>,
        estimated: bool,
        place: Option<Place>,
        #[pin]
        sleep: Option<Sleep>,
    }
}

impl Acquire {
    pub(super) fn new(limiter: RateLimiter, cost: u32, max_wait: Option<Duration>) -> Self {
        Self {
            limiter,
            cost,
            max_wait,
            estimated: false,
            place: None,
            sleep: None,
        }
    }

    /// The cost is an estimate.
    pub(crate) fn estimated(mut self) -> Self {
        self.estimated = true;
        self
    }
}

impl fmt::Debug for Acquire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire")
            .field("limiter", &self.limiter)
            .field("cost", &self.cost)
            .field("waiting", &self.place.is_some())
            .finish_non_exhaustive()
    }
}

/// A place in line. Dropped, it is left.
struct Place {
    limiter: RateLimiter,
    number: u64,
    cost: u32,
    deadline: Option<Timestamp>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let core: &Core = &self.limiter.shared;
        // Out of the line first: a sliding window could not take back what it served to who leaves once the next is served too.
        match core.queue.leave(self.number) {
            (Some(admission), _) => {
                core.give_back(admission, self.cost, core.clock.now());
            }
            (None, true) => core.serve(core.clock.now()),
            (None, false) => {}
        }
    }
}

/// What one look at the line brought.
enum Look {
    Admitted(Admission),
    Refused {
        until: Timestamp,
    },
    /// Look again then; or when woken, if nothing can be told.
    Waiting {
        until: Option<Timestamp>,
    },
}

impl Place {
    /// Is admitted at once, refused at once, or joins the line.
    fn join(
        limiter: &RateLimiter,
        cost: u32,
        max_wait: Option<Duration>,
        waker: &Waker,
        now: Timestamp,
    ) -> (Option<Self>, Look) {
        let core: &Core = &limiter.shared;
        let deadline = max_wait.map(|wait| now.saturating_add(wait));
        core.queue.serve(
            |cost| core.state().take_in_line(cost, now),
            |waiters| {
                if waiters.is_empty() {
                    let taken = core.state().take(cost, now).or_else(|_| {
                        core.queue.announce(waiters);
                        core.state().take(cost, now)
                    });
                    if let Ok(admission) = taken {
                        return (None, Look::Admitted(admission));
                    }
                }
                let before = waiters.cost();
                let until = core.state().due_behind(waiters.costs(), before, cost, now);
                if deadline.is_some_and(|deadline| until > deadline) {
                    return (None, Look::Refused { until });
                }
                let place = Self {
                    limiter: limiter.clone(),
                    number: waiters.join(cost, waker.clone()),
                    cost,
                    deadline,
                };
                let until = if before == 0 { core.settled(until, now) } else { until };
                (Some(place), Look::Waiting { until: Some(until) })
            },
        )
    }

    fn look(&self, waker: &Waker, now: Timestamp) -> Look {
        let core: &Core = &self.limiter.shared;
        let (turn, _replaced) = core.queue.serve(
            |cost| core.state().take_in_line(cost, now),
            |waiters| waiters.turn(self.number, waker),
        );
        match turn {
            Turn::Served(admission) => Look::Admitted(admission),
            Turn::Waiting(cost) => {
                let until = core.state().due(cost, now).max(core.state().peek(self.cost, now));
                if self.deadline.is_some_and(|deadline| now >= deadline) {
                    return Look::Refused { until };
                }
                let until = if cost == u64::from(self.cost) {
                    // Something changed between the two looks: not everybody who changes something wakes the front (an
                    // admission that is written late does not), so it looks again by itself.
                    let soon = now.saturating_add(Duration::from_nanos(1));
                    Some(core.settled(until, now).max(soon))
                } else {
                    // Woken as the front, at the latest.
                    Some(until).filter(|until| now < *until)
                };
                Look::Waiting { until }
            }
        }
    }
}

impl Future for Acquire {
    type Output = Result<RateLimitPermit, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let core: &Core = &this.limiter.shared;
        let estimated = *this.estimated;
        let admitted = |permit: RateLimitPermit| if estimated { permit.estimated() } else { permit };
        if let Err(why) = core.check_cost(*this.cost) {
            this.limiter.count(&why, &Reading::new());
            return Poll::Ready(Err(why));
        }
        if *this.cost == 0 {
            return Poll::Ready(Ok(admitted(this.limiter.permit(Admission::Tokens, 0))));
        }
        loop {
            let reading = Reading::new();
            let now = reading.at(&core.clock);
            core.roll(now);
            let look = if let Some(place) = this.place.as_ref() {
                place.look(cx.waker(), now)
            } else {
                let (place, look) = Place::join(this.limiter, *this.cost, *this.max_wait, cx.waker(), now);
                *this.place = place;
                look
            };
            let until = match look {
                Look::Admitted(admission) => {
                    *this.place = None;
                    return Poll::Ready(Ok(admitted(this.limiter.permit(admission, *this.cost))));
                }
                Look::Refused { until } => {
                    *this.place = None;
                    let why = core.over_limit(*this.cost, until, now);
                    this.limiter.count(&why, &reading);
                    return Poll::Ready(Err(why));
                }
                Look::Waiting { until } => until,
            };
            let deadline = this.place.as_ref().and_then(|place| place.deadline);
            if now == Timestamp::END && deadline.is_none() {
                // No timer is later: only what is given back wakes it.
                return Poll::Pending;
            }
            let Some(until) = until.into_iter().chain(deadline).min() else {
                return Poll::Pending;
            };
            this.sleep.set(Some(core.clock.sleep_until(until)));
            let sleep = this.sleep.as_mut().as_pin_mut().expect("just set");
            ready!(sleep.poll(cx));
        }
    }
}
