//! The identity in use, and its replacement when the files change.
//!
//! Enters: the files' names, and the kernel's word that something changed beside them. Leaves: the
//! configurations of the newest identity that loaded. Invariant: a bad or half-written set of files never
//! replaces a good one. It never touches connections that are up: they keep what they were made with.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use notify::{EventKind, RecursiveMode, Watcher as _, event::AccessKind};
use rustls::{ClientConfig, ServerConfig};

use crate::{
    config::Protocol,
    flow::Identity,
    transport::{
        tls::{IdentityFiles, TlsError, TlsIdentity},
        verify::{ClientCheck, PeerRejected, ServerCheck},
    },
};

/// How long the files must be quiet before they are read: certificate and key are two writes.
const QUIET: Duration = Duration::from_millis(200);
/// How long a directory that is never quiet can put the reading off.
const QUIET_MAX: Duration = Duration::from_secs(2);
/// How often the files are looked at without being told to: network file systems report nothing, and a
/// symlink further up the path can be swapped.
const POLL: Duration = Duration::from_secs(60);

/// The identity in use.
pub struct TlsStore {
    files: IdentityFiles,
    current: ArcSwap<TlsIdentity>,
}

impl TlsStore {
    /// Loads the files.
    pub fn load(files: IdentityFiles) -> Result<Arc<Self>, TlsError> {
        let current = ArcSwap::from_pointee(TlsIdentity::load(&files)?);
        Ok(Arc::new(Self { files, current }))
    }

    /// Reads the files again. `true`: they had changed, and new connections use them from now on; sessions
    /// of before cannot be resumed any more. On an error the old identity stays.
    pub fn reload(&self) -> Result<bool, TlsError> {
        if self.current.load().is_current(&self.files)? {
            return Ok(false);
        }
        self.current.store(Arc::new(TlsIdentity::load(&self.files)?));
        Ok(true)
    }

    /// See [`TlsIdentity::client_config`].
    pub fn client_config(&self, check: &ServerCheck, protocol: Protocol) -> Arc<ClientConfig> {
        self.current.load().client_config(check, protocol)
    }

    /// See [`TlsIdentity::server_config`].
    pub fn server_config(&self, check: &ClientCheck, protocols: &[Protocol]) -> Arc<ServerConfig> {
        self.current.load().server_config(check, protocols)
    }

    /// See [`TlsIdentity::as_client`].
    pub fn as_client(&self, check: &ClientCheck) -> Result<Option<Identity>, PeerRejected> {
        self.current.load().as_client(check)
    }

    /// Who we are to our peers now.
    pub fn identity(&self) -> Option<Identity> {
        self.current.load().identity().cloned()
    }
}

/// Watches the files of a [`TlsStore`] for as long as it lives.
pub struct Watch {
    watcher: Option<notify::RecommendedWatcher>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The watcher owns the sender; without it the thread's receiver ends.
        drop(self.watcher.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watched the identity's files had panicked");
        }
    }
}

/// Reloads `store` when something changes beside its files; `on_reload` hears of each new identity. The
/// directories are watched, not the files: Kubernetes and certbot swap symlinks, others rename.
pub fn watch(store: Arc<TlsStore>, on_reload: impl Fn() + Send + 'static) -> Result<Watch, notify::Error> {
    // One waiting token says all there is to say.
    let (changed, changes) = mpsc::sync_channel::<()>(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the files is an event too; answering it would never end. An error (a queue that
        // overflowed) may have hidden a change.
        let read_only = |kind: EventKind| match kind {
            EventKind::Access(access) => {
                !matches!(access, AccessKind::Close(notify::event::AccessMode::Write))
            }
            _ => false,
        };
        if !event.is_ok_and(|e| read_only(e.kind)) {
            // Full means that a token waits already.
            let _ = changed.try_send(());
        }
    })?;
    for dir in dirs(&store.files) {
        watcher.watch(&dir, RecursiveMode::NonRecursive)?;
    }
    let thread = thread::Builder::new()
        .name("identity-watch".to_owned())
        .spawn(move || follow(&store, &changes, on_reload))
        .map_err(notify::Error::io)?;
    Ok(Watch { watcher: Some(watcher), thread: Some(thread) })
}

fn dirs(files: &IdentityFiles) -> BTreeSet<PathBuf> {
    let dir = |file: &PathBuf| match file.parent() {
        Some(dir) if dir != Path::new("") => dir.to_owned(),
        _ => PathBuf::from("."),
    };
    [&files.cert, &files.key, &files.ca].map(dir).into()
}

fn follow(store: &TlsStore, changes: &mpsc::Receiver<()>, on_reload: impl Fn()) {
    loop {
        match changes.recv_timeout(POLL) {
            Ok(()) => {
                let first = Instant::now();
                while first.elapsed() < QUIET_MAX && changes.recv_timeout(QUIET).is_ok() {}
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
        match store.reload() {
            Ok(false) => {}
            Ok(true) => {
                let id = store.identity();
                tracing::info!(identity = id.as_ref().map(|i| &*i.0), "identity reloaded");
                on_reload();
            }
            Err(e) => tracing::error!("the identity's files changed, but the old one stays in use: {e}"),
        }
    }
}
