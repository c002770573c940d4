//! The three agents: HTTP servers on ports of their own, as they might be anywhere.

use crate::{Stop, console::Console, options::Options, serve};
use axum::{
    Json, Router,
    http::{Method, StatusCode, Uri},
    response::{IntoResponse, Response},
};
use serde_json::json;
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{net::TcpListener, task::JoinSet, time::sleep};

pub(crate) struct Agents {
    pub(crate) research: Agent,
    pub(crate) data_processing: Agent,
    pub(crate) summarizer: Agent,
}

#[derive(Clone)]
pub(crate) struct Agent {
    name: &'static str,
    pub(crate) address: SocketAddr,
    down: Arc<AtomicBool>,
}

impl Agents {
    pub(crate) async fn start(tasks: &mut JoinSet<()>, stop: &Stop) -> io::Result<Self> {
        Ok(Self {
            research: Agent::start("research", tasks, stop).await?,
            data_processing: Agent::start("data_processing", tasks, stop).await?,
            summarizer: Agent::start("summarizer", tasks, stop).await?,
        })
    }

    /// The schedule, for ever: research is down for a quarter of the cycle, later the summarizer is.
    pub(crate) fn fail_and_recover(
        &self,
        Options { cycle, traffic, .. }: Options,
        console: Console,
    ) -> impl Future<Output = ()> + use<> {
        let turns = [self.research.clone(), self.summarizer.clone()];
        let say = move |agent: &Agent, what: &str| {
            if traffic {
                console.say(agent.name, what);
            }
        };
        async move {
            loop {
                for agent in &turns {
                    sleep(cycle / 8).await;
                    agent.down.store(true, Ordering::Relaxed);
                    say(agent, "the agent is down: it answers every call with a 500");
                    sleep(cycle / 4).await;
                    agent.down.store(false, Ordering::Relaxed);
                    say(agent, "the agent is well again, which its circuit has yet to find out");
                    sleep(cycle / 8).await;
                }
            }
        }
    }
}

impl Agent {
    async fn start(name: &'static str, tasks: &mut JoinSet<()>, stop: &Stop) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let agent = Self {
            name,
            address: listener.local_addr()?,
            down: Arc::default(),
        };
        let answering = agent.clone();
        let answer = async move |method: Method, uri: Uri, message: String| answering.answer(&method, &uri, &message);
        serve(tasks, stop, listener, Router::new().fallback(answer));
        Ok(agent)
    }

    fn answer(&self, method: &Method, uri: &Uri, message: &str) -> Response {
        if self.down.load(Ordering::Relaxed) {
            let error = json!({ "agent": self.name, "error": "down, by schedule" });
            return (StatusCode::INTERNAL_SERVER_ERROR, Json(error)).into_response();
        }
        Json(json!({
            "agent": self.name,
            "answer": "done",
            "method": method.as_str(),
            "query": uri.query(),
            "message": message,
        }))
        .into_response()
    }
}
