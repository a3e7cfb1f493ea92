//! What writes down what workers do: access logs and traces, each with a thread of its own.
//!
//! # Invariants
//! - What is configured as before goes on, with its thread and what waits in it.
//! - What is no longer configured ends only once no worker writes to it.

use std::{io, net::TcpStream, sync::Arc, time::Duration};

use super::{
    bootstrap::Process,
    control_runtime, other,
    reconcile::{Gate, Step},
};
use crate::{
    config::{AccessLog, Config, Traces},
    model::flow::Target,
    observe::{
        access_log::{Logs, Writer},
        traces::{Connect, Exporter, Tracer},
    },
    process::exit::Failure,
    sinks::dial::Dialer,
    transport::tcp::{FirstSpeaker, Own},
};

/// See the module.
#[derive(Default)]
pub(super) struct Observers {
    logs: Vec<Arc<Writer>>,
    traces: Option<Arc<Exporter>>,
}

impl Observers {
    /// Those of another configuration.
    pub(super) fn next(&self, config: &Config, process: &Process, gate: Gate<'_>) -> Result<Self, Failure> {
        let open = |(at, wanted): (usize, &AccessLog)| {
            if let Some(same) = self.logs.iter().find(|writer| writer.settings() == wanted) {
                return Ok(Arc::clone(same));
            }
            gate(&Step::OpenAccessLog(at))?;
            Writer::open(wanted).map(Arc::new).map_err(|e| other(&e.to_string()))
        };
        let logs = config.access_logs.iter().enumerate().map(open).collect::<Result<_, _>>()?;
        let start = |wanted: &Traces| {
            if let Some(same) = self.traces.as_ref().filter(|exporter| exporter.settings() == wanted) {
                return Ok(Arc::clone(same));
            }
            gate(&Step::StartTraces)?;
            let started = Exporter::start(wanted, connect(process.own.clone()));
            started.map(Arc::new).map_err(|e| other(&format!("the thread of traces could not start: {e}")))
        };
        Ok(Self { logs, traces: config.traces.as_ref().map(start).transpose()? })
    }

    /// Where workers write lines.
    pub(super) fn logs(&self) -> Logs {
        self.logs.iter().map(|writer| Arc::clone(writer.log())).collect()
    }

    /// What workers trace by.
    pub(super) fn tracer(&self) -> Option<Arc<Tracer>> {
        self.traces.as_ref().map(|exporter| Arc::clone(exporter.tracer()))
    }

    /// Opens files by their names again.
    pub(super) fn reopen(&self) {
        self.logs.iter().for_each(|writer| writer.reopen());
    }
}

/// Connects to a collector by a socket that is known for ours, so that no capture takes it.
fn connect(own: Own) -> Connect {
    let dialer = Dialer::new(own);
    Box::new(move |target: &Target, allowed: Duration| -> io::Result<TcpStream> {
        let runtime = control_runtime().map_err(io::Error::other)?;
        runtime.block_on(async {
            let deadline = tokio::time::Instant::now() + allowed;
            let addrs = dialer.resolve(target).await.map_err(io::Error::other)?;
            let connecting = dialer.connect(target, &addrs, FirstSpeaker::Local, deadline, allowed);
            let (connected, _) = connecting.await.map_err(io::Error::other)?;
            let stream = connected.stream.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(stream)
        })
    })
}
