//! A tonic server with a limit for each method and a tonic client behind a circuit breaker, without interceptors.
//!
//! Run it: `cargo run --example grpc`
//!
//! The service is gRPC's own health service: `Check` is a plain call, `Watch` a stream.

use portcullis::{BoxError, CircuitBreaker, CircuitBreakerLayer, PerRoute, RateLimitLayer, RateLimiter, TokenBucket};
use std::{net::Ipv4Addr, time::Duration};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint, Server},
};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_check_response, health_client::HealthClient},
    server::health_reporter,
};
use tonic_types::StatusExt;
use tower::ServiceBuilder;

/// Serves until told to stop.
async fn serve(stop: oneshot::Receiver<()>) -> Result<(Endpoint, JoinHandle<()>), BoxError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let endpoint = Endpoint::from_shared(format!("http://{}", listener.local_addr()?))?;
    let (health, service) = health_reporter();
    health.set_service_status("search", ServingStatus::Serving).await;

    let checks = RateLimiter::builder("health", TokenBucket::new(2, Duration::from_secs(60)))
        .limit("checks")
        .build()?;
    let limits = PerRoute::builder()
        .any("/grpc.health.v1.Health/Check", checks)
        .build()?;
    let server = Server::builder()
        .layer(RateLimitLayer::grpc(limits))
        .add_service(service);
    let serving = tokio::spawn(async move {
        let stopped = async { stop.await.unwrap_or(()) };
        if let Err(error) = server
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped)
            .await
        {
            eprintln!("the server: {error}");
        }
    });
    Ok((endpoint, serving))
}

fn explain(status: &Status) {
    let wait = status
        .get_error_details()
        .retry_info()
        .and_then(|retry| retry.retry_delay);
    let pushback = status.metadata().get("grpc-retry-pushback-ms").is_some();
    println!("{:?}: {}", status.code(), status.message());
    println!(
        "  RetryInfo: {}, pushback: {pushback}",
        if wait.is_some() { "in some seconds" } else { "none" }
    );
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let (stop, stopped) = oneshot::channel();
    let (endpoint, serving) = serve(stopped).await?;

    let breaker = CircuitBreaker::builder("health").failure_threshold(2).build()?;
    let channel: Channel = endpoint.connect_lazy();
    let mut client = HealthClient::new(
        ServiceBuilder::new()
            .layer(CircuitBreakerLayer::grpc(breaker.clone()))
            .service(channel),
    );
    let search = || HealthCheckRequest {
        service: "search".into(),
    };

    // A stream: it is judged when it ends, and cut off by the server it is a failure.
    let mut stream = client.watch(search()).await?.into_inner();
    let first = stream.message().await?.expect("the state of now");
    println!(
        "watch: {:?}",
        health_check_response::ServingStatus::try_from(first.status)?
    );

    for _ in 0..2 {
        let answer = client.check(search()).await?.into_inner();
        println!(
            "check: {:?}",
            health_check_response::ServingStatus::try_from(answer.status)?
        );
    }
    // The third within a minute: the server's limit. It says nothing of the server's health.
    explain(&client.check(search()).await.expect_err("over the limit"));
    println!("circuit: {}", breaker.state().as_str());

    drop(stream);
    let _ = stop.send(());
    serving.await?;
    for _ in 0..2 {
        let status = client.check(search()).await.expect_err("nobody serves");
        println!("check: {:?}", status.code());
    }
    println!("circuit: {}", breaker.state().as_str());
    explain(&client.check(search()).await.expect_err("the circuit is open"));
    Ok(())
}
