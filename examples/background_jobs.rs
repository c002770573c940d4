//! Background jobs at a steady pace: a service that has nothing to do with HTTP, behind a limiter that lets jobs wait.
//!
//! Run it: `cargo run --example background_jobs`

use portcullis::{BoxError, Clock, RateLimitLayer, RateLimiter, Rejected, TokenBucket};
use std::{io, time::Duration};
use tokio::{task::JoinSet, time::sleep};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

#[derive(Clone)]
struct Job {
    id: u32,
}

/// The work itself; any service will do.
async fn run(job: Job) -> io::Result<String> {
    Ok(format!("report {}", job.id))
}

/// Runs a job, later if the line is too long now: a job must get done, so a rejection is only a later date.
async fn finish<S>(service: S, job: Job, say: impl Fn(String)) -> Result<(), BoxError>
where
    S: Service<Job, Response = String, Error = BoxError> + Clone,
{
    loop {
        match service.clone().oneshot(job.clone()).await {
            Ok(report) => {
                say(format!("job {:>2} done: {report}", job.id));
                return Ok(());
            }
            Err(error) => {
                let Some(Some(wait)) = Rejected::find(&*error).map(|why| why.retry_after) else {
                    return Err(error);
                };
                say(format!("job {:>2} put off for {wait:.1?}: {error}", job.id));
                sleep(wait).await;
            }
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Five jobs a second, evenly: no two at once.
    let limiter = RateLimiter::new("reports", TokenBucket::new(5, Duration::from_secs(1)).burst(1))?;
    let service = ServiceBuilder::new()
        // A job waits its turn for up to 0.9 s. One that could not start by then hears so at once.
        .layer(RateLimitLayer::new(limiter.clone()).wait(Duration::from_millis(900)))
        .service(service_fn(run));

    let start = Clock::system().now();
    let say = move |line| {
        let elapsed = Clock::system().now().duration_since(start);
        println!("{:.1} s  {line}", elapsed.as_secs_f64());
    };
    let mut jobs = JoinSet::new();
    for id in 1..=10 {
        jobs.spawn(finish(service.clone(), Job { id }, say));
    }
    while let Some(job) = jobs.join_next().await {
        job??;
    }
    let status = limiter.status();
    println!(
        "{} jobs run, {} rejections",
        status.accepted_requests, status.rejected_requests
    );
    Ok(())
}
