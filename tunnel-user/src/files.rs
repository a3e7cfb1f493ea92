//! Files that are read again when they change.
//!
//! Enters: names of files, and the kernel's word that something changed beside them. Leaves: a call, once
//! they have been quiet for a moment. Invariant: no change is missed for longer than a minute, and a call does not
//! mean that something has changed. It never reads the files.

use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsString,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use notify::{
    EventKind, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind},
};

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
    mut look: impl FnMut() + Send + 'static,
) -> Result<Watch, notify::Error> {
    // One waiting token says all there is to say.
    let (changed, changes) = mpsc::sync_channel::<()>(1);
    let files: Vec<PathBuf> = files.into_iter().map(Path::to_owned).collect();
    let names = Arc::new(Mutex::new(names(&files)));
    let known = Arc::clone(&names);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // An error (a queue that overflowed) may have hidden a change.
        if !event.is_ok_and(|e| means_nothing(&e, &known.lock().unwrap_or_else(PoisonError::into_inner))) {
            // Full means that a token waits already.
            let _ = changed.try_send(());
        }
    })?;
    for dir in files.iter().map(|file| dir(file)).collect::<BTreeSet<_>>() {
        watcher.watch(&dir, RecursiveMode::NonRecursive)?;
    }
    let look_again = move || {
        *names.lock().unwrap_or_else(PoisonError::into_inner) = self::names(&files);
        look();
    };
    let thread = thread::Builder::new()
        .name(thread.to_owned())
        .spawn(move || follow(&changes, look_again))
        .map_err(notify::Error::io)?;
    Ok(Watch { watcher: Some(watcher), thread: Some(thread) })
}

/// Whether an event is none of ours: somebody reads, as we do, or writes into another file, such as a log beside
/// ours, without end. What is made, renamed or removed may be a link on the way to one of ours.
fn means_nothing(event: &notify::Event, names: &HashSet<OsString>) -> bool {
    let written = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) | EventKind::Modify(ModifyKind::Data(_)) => {
            true
        }
        EventKind::Access(_) => return true,
        _ => false,
    };
    let ours = |path: &PathBuf| path.file_name().is_none_or(|name| names.contains(name));
    written && !event.paths.iter().any(ours)
}

/// What the files are called, and what they are links to.
fn names(files: &[PathBuf]) -> HashSet<OsString> {
    let targets = files.iter().filter_map(|file| file.canonicalize().ok());
    files.iter().cloned().chain(targets).filter_map(|path| path.file_name().map(ToOwned::to_owned)).collect()
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn nobody_looks_for_the_sake_of_a_log_that_is_written_beside_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let (file, log) = (dir.path().join("agent.toml"), dir.path().join("agent.log"));
        fs::write(&file, "1").unwrap();
        let mut log = fs::File::create(log).unwrap();
        let (tell, told) = mpsc::channel();
        let watch = watch([&*file], "test", move || tell.send(()).unwrap()).unwrap();
        for _ in 0..20 {
            std::io::Write::write_all(&mut log, b"line\n").unwrap();
            assert!(told.recv_timeout(QUIET / 4).is_err());
        }
        fs::write(&file, "2").unwrap();
        told.recv_timeout(POLL / 2).expect("the file has changed");
        drop(watch);
        assert!(told.recv().is_err(), "the watching thread has ended");
    }
}
