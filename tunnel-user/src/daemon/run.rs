//! `tunnel run` and `tunnel gateway`: a daemon from its start to its end.
//!
//! Enters: signals, the word that the configuration file may have changed, and daemons that want to take over.
//! Leaves: a daemon that has stopped in order. Invariant: the configuration in force is the last one that was read
//! without a mistake; a bad one changes nothing and says why. It never carries a flow.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::sync::mpsc;

use super::{Options, Running, control_runtime, other, start};
use crate::{
    config::{CheckFiles, Config},
    daemon::takeover::{self, Offer, TakeoverError},
    process::{
        drain::Phase,
        exit::Failure,
        files,
        signal::{Hangup, Terminate},
    },
};

/// How often the place where the next daemon can take over is tried, while the last one has it.
const OFFER_RETRY: Duration = Duration::from_millis(100);

/// Until a signal ends it, or another daemon takes over. A second signal ends the draining. `file` names the daemon: the
/// one that replaces it is started with the same.
pub fn run(config: Config, file: Option<&Path>, take_over: bool) -> Result<(), Failure> {
    let runtime = control_runtime()?;
    runtime.block_on(async {
        let signal_failed = |e| other(&format!("signals: {e}"));
        let mut signals = Terminate::new().map_err(signal_failed)?;
        let mut hangup = Hangup::new().map_err(signal_failed)?;
        let old = match file {
            Some(file) if take_over => takeover::take(file).map_err(|e| other(&e.to_string()))?,
            _ => None,
        };
        if take_over && old.is_none() {
            tracing::warn!("no daemon runs with this configuration file: nothing to take over");
        }
        let (taken, old) = old.map(takeover::Taken::split).unzip();
        let options = Options { taken: taken.unwrap_or_default(), ..Options::default() };
        // Before it is used: a change in between is seen.
        let mut source = file.map(|file| Source::new(file, config.daemon.watch));
        let mut running = start(config, options)?;
        for address in running.addresses() {
            tracing::info!(%address, "listening");
        }
        if let Some(old) = old {
            if let Err(e) = old.done() {
                // It may go on without us: it gave up waiting, or was told to stop.
                running.take_back();
                return Err(other(&format!("the old daemon no longer hands over: {e}")));
            }
            tracing::info!("took over from the old daemon");
        }
        running.settle();
        let mut offer = None;
        let why = loop {
            let wanted = tokio::select! {
                why = signals.next() => break why,
                () = running.watch_captures() => return Ok(()),
                () = hangup.next() => {
                    match &mut source {
                        Some(source) => source.reload(&mut running, true).await,
                        None => tracing::warn!("SIGHUP: there is no configuration file to read again"),
                    }
                    continue;
                }
                () = changed(&mut source) => {
                    if let Some(source) = &mut source {
                        source.reload(&mut running, false).await;
                    }
                    continue;
                }
                wanted = requested(file, &mut offer) => wanted,
            };
            let given = match wanted {
                Ok(stream) => {
                    // The new daemon makes the same offer as soon as it runs.
                    offer = None;
                    tokio::select! {
                        // Dropped, it is over: the other side hears of it.
                        why = signals.next() => break why,
                        given = running.give(stream) => given,
                    }
                }
                Err(e) => Err(e),
            };
            match given {
                Ok(()) => break "another daemon has taken over",
                Err(e) => tracing::warn!("{e}"),
            }
        };
        drop((offer, source));
        tracing::info!("{why}: draining");
        let trigger = running.trigger.clone();
        let stopped = tokio::task::spawn_blocking(move || running.stop());
        tokio::pin!(stopped);
        let ended = tokio::select! {
            ended = &mut stopped => ended,
            _ = signals.next() => {
                tracing::info!("a second signal: no longer draining");
                trigger.enter(Phase::Stop);
                stopped.await
            }
        };
        ended.map(drop).map_err(|e| other(&format!("stopping failed: {e}")))
    })
}

/// Waits for a daemon that wants to take over.
async fn requested(file: Option<&Path>, offer: &mut Option<Offer>) -> Result<UnixStream, TakeoverError> {
    let Some(file) = file else { return std::future::pending().await };
    let mut said = false;
    loop {
        if let Some(offer) = offer {
            return offer.requested().await;
        }
        match Offer::open(file) {
            Ok(open) => *offer = Some(open),
            Err(e) => {
                // The daemon that this one has replaced lets go in a moment.
                if !said && !matches!(e, TakeoverError::Taken) {
                    tracing::warn!("no other daemon can take over from this one: {e}");
                    said = true;
                }
                tokio::time::sleep(OFFER_RETRY).await;
            }
        }
    }
}

/// The configuration file of a daemon that runs.
struct Source {
    file: PathBuf,
    /// What it said when it was last read, with or without mistakes.
    text: String,
    changes: mpsc::Receiver<()>,
    tell: mpsc::Sender<()>,
    watch: Option<files::Watch>,
}

impl Source {
    fn new(file: &Path, watch: bool) -> Self {
        // One waiting token says all there is to say.
        let (tell, changes) = mpsc::channel(1);
        let text = fs::read_to_string(file).unwrap_or_default();
        let mut source = Self { file: file.to_owned(), text, changes, tell, watch: None };
        source.watch(watch);
        source
    }

    /// Watches the file, or no longer. Where the kernel has no more watches to give, the daemon does without.
    fn watch(&mut self, wanted: bool) {
        if wanted == self.watch.is_some() {
            return;
        }
        self.watch = None;
        if wanted {
            let tell = self.tell.clone();
            let look = move || {
                let _full = tell.try_send(());
            };
            match files::watch([&*self.file], "config-watch", look) {
                Ok(watch) => self.watch = Some(watch),
                Err(e) => {
                    let file = self.file.display();
                    tracing::warn!("{file} cannot be watched, so that only SIGHUP has it read again: {e}");
                }
            }
        }
    }

    /// Reads the file again. `asked`: somebody wants to hear of it, also if nothing is different.
    async fn reload(&mut self, running: &mut Running, asked: bool) {
        let file = self.file.display();
        let text = match fs::read_to_string(&self.file) {
            Ok(text) => text,
            // A file that is being replaced is there again in a moment, and then there is another word.
            Err(e) if !asked => return tracing::debug!("{file}: {e}"),
            Err(e) => {
                return tracing::error!("failed to reload {file}: {e}; keeping the previous configuration");
            }
        };
        if text == self.text && !asked {
            return;
        }
        self.text = text;
        let config = match Config::parse(&self.text, &self.file, CheckFiles::Yes) {
            Ok(config) => config,
            Err(e) => {
                return tracing::error!("failed to reload {file}: {e}; keeping the previous configuration");
            }
        };
        let watch = config.daemon.watch;
        match running.reload(config).await {
            Ok(changed) => tracing::info!(
                %file,
                listeners = changed.listeners,
                captures = changed.captures,
                upstreams = changed.upstreams,
                "reloaded configuration"
            ),
            Err(e) => {
                return tracing::error!("failed to reload {file}: {e}; keeping the previous configuration");
            }
        }
        self.watch(watch);
    }
}

/// Ready when the file may have changed.
async fn changed(source: &mut Option<Source>) {
    match source {
        // It is never closed: the source has a sender too.
        Some(source) => drop(source.changes.recv().await),
        None => std::future::pending().await,
    }
}
