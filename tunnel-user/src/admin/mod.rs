//! The admin interface: what a running daemon does, for operators and monitoring, and what they may have it do.
//!
//! It has a thread and a runtime of its own, with a lower priority than the workers. What it shows comes from three places:
//! counters of the workers, which it reads; questions that each worker answers between its flows; and an overview by the
//! control loop.
//!
//! # Invariants
//! - Nothing on the data path waits for it, whatever its clients do: connections, headers, requests, answers and the time for
//!   each are bounded.
//! - What changes something takes POST, and a Unix socket, or the operator's word that TCP may do the same.
//! - No answer holds key material.

mod api;
mod bind;
mod flows;
mod guard;
mod history;
mod metrics;
mod problems;
mod server;
mod sight;
pub mod view;

use std::{io, path::PathBuf, thread};

use tokio::sync::{mpsc, oneshot};

pub use self::{
    api::{admits, capture_of},
    bind::{Bound, bind, default_socket, sockets},
    flows::FlowView,
    metrics::table::{Kind, METRICS, Metric},
    view::{Certificate, Command, Overview, Status},
};
use self::{server::Context, sight::Sight};
use crate::{observe::telemetry::LogHandle, process::drain::Watch, proxy::questions::Asked};

/// Requests that wait for the control loop; more are answered that it is busy.
const COMMANDS_MAX: usize = 16;

/// Why there is no admin interface.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Its socket could not be made.
    #[error("the admin socket {}: {source}", .path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another daemon has its socket.
    #[error("the admin socket {} belongs to another daemon that runs", .0.display())]
    Taken(PathBuf),
    /// Its address could not be listened at.
    #[error("the admin address {address}: {source}")]
    Listen {
        /// Which.
        address: std::net::SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Its thread could not be started.
    #[error("the admin thread: {0}")]
    Thread(io::Error),
}

/// What it looks at.
pub struct Sources {
    /// The workers.
    pub workers: Vec<Asked>,
    /// What the control loop has said first.
    pub overview: Overview,
    /// Whether the daemon drains.
    pub drain: Watch,
    /// By which the log's filter is changed.
    pub log: LogHandle,
}

/// A running admin interface. Dropped, it ends, and its thread with it.
pub struct Admin {
    /// What the control loop is to answer, or to do.
    commands: mpsc::Receiver<Command>,
    stop: Option<oneshot::Sender<()>>,
    close_tcp: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Admin {
    /// Serves what was bound.
    pub fn start(bound: Bound, sources: Sources) -> Result<Self, AdminError> {
        bound.put_in_place()?;
        let (tell, commands) = mpsc::channel(COMMANDS_MAX);
        let Sources { workers, overview, drain, log } = sources;
        let (stop, stopped) = oneshot::channel();
        let (close_tcp, tcp_closed) = oneshot::channel();
        let sight = Sight::new(workers, tell, overview, drain);
        let context = Context::new(sight, log, bound.writes_over_tcp());
        let thread = thread::Builder::new()
            .name("admin".to_owned())
            .spawn(move || {
                if let Err(error) = server::run(bound, context, stopped, tcp_closed) {
                    tracing::error!(%error, "the admin interface has failed");
                }
            })
            .map_err(AdminError::Thread)?;
        Ok(Self { commands, stop: Some(stop), close_tcp: Some(close_tcp), thread: Some(thread) })
    }

    /// Nobody answers commands any more: what was known last is shown at once.
    pub fn close_commands(&mut self) {
        self.commands.close();
        // Whoever waits for one of these hears of it.
        while self.commands.try_recv().is_ok() {}
    }

    /// Stops listening for TCP: another daemon does at the same address. The Unix socket stays.
    pub fn close_tcp(&mut self) {
        // The thread may have failed, which it has said.
        let _gone = self.close_tcp.take().map(|close| close.send(()));
    }

    /// What the control loop is asked next.
    pub async fn command(&mut self) -> Command {
        match self.commands.recv().await {
            Some(command) => command,
            // The thread has failed, which it has said.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // It ends with the sender too.
        drop(self.stop.take());
        if let Some(Err(_)) = self.thread.take().map(thread::JoinHandle::join) {
            tracing::error!("the admin thread panicked");
        }
    }
}
