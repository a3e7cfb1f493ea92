//! Files that are read again when they change.
//!
//! Enters: names of files, and the kernel's word that something changed beside them. Leaves: a call, once
//! they have been quiet for a moment. Invariant: no change is missed for longer than [`POLL`], and a call does not
//! mean that something has changed. It never reads the files.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use notify::{EventKind, RecursiveMode, Watcher as _, event::AccessKind};

/// How long the files must be quiet before they are read: certificate and key are two writes.
const QUIET: Duration = Duration::from_millis(200);
/// How long a directory that is never quiet can put the reading off.
const QUIET_MAX: Duration = Duration::from_secs(2);
/// How often the files are looked at without being told to: network file systems report nothing, and a
/// symlink further up the path can be swapped.
const POLL: Duration = Duration::from_secs(60);

/// Watches files for as long as it lives.
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
            tracing::error!("a thread that watched files had panicked");
        }
    }
}

/// Calls `look` on a thread of this name when something changes beside one of `files`. The directories are watched,
/// not the files: Kubernetes and certbot swap symlinks, others rename.
pub fn watch<'a>(
    files: impl IntoIterator<Item = &'a Path>,
    thread: &str,
    look: impl FnMut() + Send + 'static,
) -> Result<Watch, notify::Error> {
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
    let dirs: BTreeSet<PathBuf> = files.into_iter().map(dir).collect();
    for dir in dirs {
        watcher.watch(&dir, RecursiveMode::NonRecursive)?;
    }
    let thread = thread::Builder::new()
        .name(thread.to_owned())
        .spawn(move || follow(&changes, look))
        .map_err(notify::Error::io)?;
    Ok(Watch { watcher: Some(watcher), thread: Some(thread) })
}

fn dir(file: &Path) -> PathBuf {
    match file.parent() {
        Some(dir) if dir != Path::new("") => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn follow(changes: &mpsc::Receiver<()>, mut look: impl FnMut()) {
    loop {
        match changes.recv_timeout(POLL) {
            Ok(()) => {
                let first = Instant::now();
                while first.elapsed() < QUIET_MAX && changes.recv_timeout(QUIET).is_ok() {}
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
        look();
    }
}
