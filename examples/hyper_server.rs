//! Plain hyper, HTTP/1.1 and HTTP/2 on one port: a limit for each client address in front of a service.
//!
//! Run it: `cargo run --example hyper_server`

use http_body_util::{Empty, Full};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use portcullis::{BoxError, ClientIp, KeyedRateLimiter, RateLimitLayer, SlidingWindow};
use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};
use tokio::net::TcpListener;
use tower::{ServiceBuilder, service_fn};

async fn serve(listener: TcpListener) -> Result<(), BoxError> {
    let limiter = KeyedRateLimiter::new("api", SlidingWindow::new(3, Duration::from_secs(60)))?;
    let limit = RateLimitLayer::http(limiter.by(ClientIp::new()));
    loop {
        let (stream, peer) = listener.accept().await?;
        let service = ServiceBuilder::new()
            // hyper keeps the peer's address to itself: it goes into the request's extensions.
            .map_request(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(peer);
                request
            })
            .layer(limit.clone())
            .service(service_fn(async |_| {
                Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("an answer\n")))
            }));
        tokio::spawn(async move {
            let connection = auto::Builder::new(TokioExecutor::new());
            let served = connection.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
            if let Err(error) = served.await {
                eprintln!("{peer}: {error}");
            }
        });
    }
}

async fn ask(server: SocketAddr, http2: bool) -> Result<(), BoxError> {
    let client = Client::builder(TokioExecutor::new())
        .http2_only(http2)
        .build_http::<Empty<Bytes>>();
    let request = Request::get(format!("http://{server}/")).body(Empty::new())?;
    let answer = client.request(request).await?;
    let remaining = answer
        .headers()
        .get("ratelimit")
        .map_or("", |value| value.to_str().unwrap_or("?"));
    println!("{:?} {} {remaining}", answer.version(), answer.status());
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let server = listener.local_addr()?;
    tokio::spawn(serve(listener));
    for http2 in [false, true, false, true] {
        ask(server, http2).await?;
    }
    Ok(())
}
