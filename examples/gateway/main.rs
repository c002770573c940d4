//! The main job: a gateway in front of three agents, each behind a rate limiter and a circuit breaker from one registry.
//!
//! Run it: `cargo run --example gateway`, watch it for a minute, stop it with Ctrl-C. `--help` tells the options.
//!
//! - `gateway.rs` is what to read: how the layers are put together, and what a rejected caller gets
//! - `agents.rs` the three agents, and the schedule by which they fail and recover
//! - `traffic.rs` the clients
//! - `console.rs` what is printed, from the registry's events and status

mod agents;
mod console;
mod gateway;
mod options;
mod traffic;

use crate::{agents::Agents, console::Console, options::Options};
use axum::Router;
use portcullis::{BoxError, Registry};
use std::{io, net::Ipv4Addr, process::ExitCode};
use tokio::{net::TcpListener, select, signal::ctrl_c, sync::watch, task::JoinSet};

#[tokio::main]
async fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("error: {wrong}\n\n{}", options::HELP);
            return ExitCode::from(2);
        }
    };
    match run(&options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> Result<(), BoxError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, options.port))
        .await
        .map_err(|error| {
            format!(
                "cannot listen on 127.0.0.1:{}: {error}; `--port` chooses another",
                options.port
            )
        })?;
    let address = listener.local_addr()?;
    let (shutdown, stop) = watch::channel(());
    let stop = Stop(stop);
    let mut tasks = JoinSet::new();

    let registry = Registry::new();
    let agents = Agents::start(&mut tasks, &stop).await?;
    let router = gateway::router(&registry, &agents, options)?;
    serve(&mut tasks, &stop, listener, router);

    let console = Console::new();
    tasks.spawn(stop.clone().or(agents.fail_and_recover(*options, console.clone())));
    if options.traffic {
        tasks.spawn(stop.clone().or(traffic::run(address, options.cycle, console.clone())));
    }
    select! {
        // In this order: Ctrl-C is listened to before anything is printed.
        biased;
        interrupt = ctrl_c() => interrupt?,
        () = console.watch(&registry, address, options) => {}
    }

    console.say(
        "gateway",
        "stopping; Ctrl-C once more does not wait for the calls under way",
    );
    drop(shutdown);
    select! {
        interrupt = ctrl_c() => interrupt?,
        () = async { while tasks.join_next().await.is_some() {} } => console.say("gateway", "stopped"),
    }
    Ok(())
}

/// Serves until told to stop, and then until the last answer is out.
fn serve(tasks: &mut JoinSet<()>, stop: &Stop, listener: TcpListener, router: Router) {
    let server = axum::serve(listener, router).with_graceful_shutdown(stop.clone().wait());
    tasks.spawn(async {
        // It never ends by itself, and an error is never returned: axum goes on after a connection that failed.
        let _: io::Result<()> = server.await;
    });
}

/// Comes when the other end of the channel is dropped.
#[derive(Clone)]
struct Stop(watch::Receiver<()>);

impl Stop {
    async fn wait(mut self) {
        while self.0.changed().await.is_ok() {}
    }

    /// Does something until then.
    async fn or(self, endless: impl Future<Output = ()>) {
        select! {
            () = self.wait() => {}
            () = endless => {}
        }
    }
}
