//! An HTTP client with a circuit breaker for each host: one that fails does not cost the others anything.
//!
//! Run it: `cargo run --example http_client`

use http_body_util::{Empty, Full};
use hyper::{Request, Response, StatusCode, body::Bytes, service::service_fn};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use portcullis::{BoxError, CircuitBreakerConfig, CircuitBreakerLayer, KeyedCircuitBreaker, key};
use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};
use tokio::net::TcpListener;
use tower::{Service, ServiceBuilder, ServiceExt};

/// A host that always answers with this status.
async fn host(status: StatusCode) -> Result<SocketAddr, BoxError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let answer = service_fn(move |_| async move {
                    let mut answer = Response::new(Full::<Bytes>::from("an answer\n"));
                    *answer.status_mut() = status;
                    Ok::<_, Infallible>(answer)
                });
                auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), answer)
                    .await
            });
        }
    });
    Ok(address)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let well = host(StatusCode::OK).await?;
    let sick = host(StatusCode::INTERNAL_SERVER_ERROR).await?;

    let config = CircuitBreakerConfig::default()
        .failure_threshold(3)
        .recovery_timeout(Duration::from_secs(30));
    let breakers = KeyedCircuitBreaker::builder("upstream")
        .config(config)
        .max_keys(1_000)
        .build()?;
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let mut client = ServiceBuilder::new()
        // 5xx and errors are failures; an open circuit answers 503, with `Retry-After`.
        .layer(CircuitBreakerLayer::http(breakers.by(key::host())))
        .service(client);

    for (name, host) in [("sick", sick), ("well", well)].repeat(5) {
        let request = Request::get(format!("http://{host}/")).body(Empty::new())?;
        let answer = client.ready().await?.call(request).await?;
        match answer.headers().get("retry-after") {
            Some(seconds) => println!(
                "{name}: {}, not called, retry after {}",
                answer.status(),
                seconds.to_str()?
            ),
            None => println!("{name}: {}", answer.status()),
        }
    }
    Ok(())
}
