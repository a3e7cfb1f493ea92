//! The configuration file as a source of desired state.
//!
//! # Invariants
//! - The configuration in force is the last one that was read without a mistake and could be made so.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tokio::sync::mpsc;

use super::{Running, layers::Owner};
use crate::{
    config::{CheckFiles, Config},
    process::{exit::Failure, files},
};

/// See the module.
pub(super) struct ConfigFile {
    file: PathBuf,
    /// What it said when it was last read, with or without mistakes.
    text: String,
    changes: mpsc::Receiver<()>,
    tell: mpsc::Sender<()>,
    watch: Option<files::Watch>,
}

impl ConfigFile {
    /// `watch`: whether it is read again when it changes.
    pub(super) fn new(file: &Path, watch: bool) -> Self {
        // One waiting token says all there is to say.
        let (tell, changes) = mpsc::channel(1);
        let text = fs::read_to_string(file).unwrap_or_default();
        let mut source = Self { file: file.to_owned(), text, changes, tell, watch: None };
        source.watch(watch);
        source
    }

    /// Ready when it may have changed.
    pub(super) async fn changed(&mut self) {
        // It is never closed: there is a sender here too.
        let _token = self.changes.recv().await;
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
    /// Whether what it says is in force.
    pub(super) async fn reload(&mut self, running: &mut Running, asked: bool) -> bool {
        let file = self.file.display().to_string();
        let failed = |running: &mut Running, e: &dyn std::fmt::Display| {
            tracing::error!("failed to reload {file}: {e}; keeping the previous configuration");
            running.notes.reloaded(Err(e));
            false
        };
        let text = match fs::read_to_string(&self.file) {
            Ok(text) => text,
            // A file that is being replaced is there again in a moment, and then there is another word.
            Err(e) if !asked => {
                tracing::debug!("{file}: {e}");
                return true;
            }
            Err(e) => return failed(running, &e),
        };
        if text == self.text && !asked {
            return true;
        }
        self.text = text;
        let config = match Config::parse(&self.text, &self.file, CheckFiles::Yes) {
            Ok(config) => config,
            Err(e) => return failed(running, &e),
        };
        let watch = config.daemon.watch;
        match running.set_layer(Owner::FILE, config).await {
            Ok(changed) => {
                running.notes.reloaded::<Failure>(Ok(()));
                tracing::info!(
                    file = %file,
                    listeners = changed.listeners,
                    captures = changed.captures,
                    upstreams = changed.upstreams,
                    "reloaded configuration"
                );
            }
            Err(e) => return failed(running, &e),
        }
        self.watch(watch);
        true
    }
}
