//! Watches files, and reports a change once they have been quiet for a moment. docs/adr/0012 says why not with `notify`.
//!
//! # Invariants
//! - No change is missed for longer than a minute: what inotify does not report (network file systems, a link further up) is
//!   found by comparing the files' metadata.
//! - Where nothing has changed, nothing is reported, except once what changed between the first reading and the first watch.
//! - Whatever others do beside the files, and however often, this thread wakes five times a second at most.
//! - What happens to other files is not logged.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::{OsStr, OsString},
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

/// How long the files must be quiet before they are read: certificate and key are two writes. Also how long what happens
/// waits in the kernel before it is looked at.
const QUIET: Duration = Duration::from_millis(200);
/// How long files that are never quiet can put the reading off.
const QUIET_MAX: Duration = Duration::from_secs(2);
/// How often the files are compared with what they were without being told to.
const POLL: Duration = Duration::from_secs(60);
/// Events that are taken at once: as many as the kernel keeps (fs.inotify.max_queued_events, by default).
const TAKEN: usize = 16_384;
/// Bytes of a read of events: some 2,000 with short names.
const EVENTS: usize = 64 * 1024;
/// Links that are followed on the way to a file, as by the kernel (`MAXSYMLINKS`, include/linux/namei.h).
const LINKS_MAX: usize = 40;

/// What can happen to a name in a directory. That others write into a file there is not among it.
const NAMES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);
/// What can happen to a file itself.
const CONTENTS: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF);

/// Watches files for as long as it lives.
pub struct Watch {
    stop: Arc<EventFd>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Fails only where the counter is full, and then the thread has been told.
        let _told = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("file watcher thread panicked");
        }
    }
}

/// Calls `look` on a thread of this name when one of `files` has changed, or what a link on the way to it leads to:
/// Kubernetes and certbot swap symlinks, others rename.
pub fn watch<'a>(
    files: impl IntoIterator<Item = &'a Path>,
    thread: &str,
    look: impl FnMut() + Send + 'static,
) -> io::Result<Watch> {
    watch_every(POLL, files, thread, look)
}

fn watch_every<'a>(
    every: Duration,
    files: impl IntoIterator<Item = &'a Path>,
    thread: &str,
    look: impl FnMut() + Send + 'static,
) -> io::Result<Watch> {
    let files = files.into_iter().map(std::path::absolute).collect::<io::Result<Vec<_>>>()?;
    let places = Places::new(files)?;
    let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let told = Arc::clone(&stop);
    let thread = thread::Builder::new()
        .name(thread.to_owned())
        .spawn(move || follow(places, told.as_fd(), every, look))?;
    Ok(Watch { stop, thread: Some(thread) })
}

fn follow(mut places: Places, stop: BorrowedFd<'_>, every: Duration, mut look: impl FnMut()) {
    let mut known = places.state();
    // They may have changed since somebody has read them, and before this knew.
    let mut unsure = true;
    let mut next = Instant::now() + every;
    loop {
        let concerned = match wait(stop, Some(places.inotify.as_fd()), next) {
            Woken::Stop => return,
            Woken::Time => {
                next = Instant::now() + every;
                if unsure { Concerned::Yes } else { Concerned::Unknown }
            }
            Woken::Event => {
                let first = Instant::now();
                let mut concerned = places.take();
                loop {
                    if wait(stop, None, Instant::now() + QUIET) == Woken::Stop {
                        return;
                    }
                    let more = places.take();
                    concerned = concerned.max(more);
                    if more == Concerned::No || first.elapsed() >= QUIET_MAX {
                        break concerned;
                    }
                }
            }
        };
        let changed = match concerned {
            Concerned::No => false,
            Concerned::Unknown => known != places.state(),
            Concerned::Yes => true,
        };
        if changed {
            // Before they are read: what changes from here on is told, or found.
            places.renew();
            (known, unsure) = (places.state(), false);
            look();
        }
    }
}

#[derive(PartialEq, Eq)]
enum Woken {
    Stop,
    Event,
    Time,
}

/// Whether what has happened concerns the files.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Concerned {
    No,
    Unknown,
    Yes,
}

fn wait(stop: BorrowedFd<'_>, events: Option<BorrowedFd<'_>>, until: Instant) -> Woken {
    loop {
        let asked = [Some(stop), events].into_iter().flatten();
        let mut asked: Vec<_> = asked.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up: not again and again for less than a millisecond.
        let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut asked, left) {
            Ok(0) if Instant::now() >= until => return Woken::Time,
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) if asked[0].any().unwrap_or(true) => return Woken::Stop,
            Ok(_) => return Woken::Event,
            // ENOMEM: in a moment, perhaps.
            Err(_) => return Woken::Time,
        }
    }
}

/// What tells one state of a file from another: which file it is, how long, and when it was changed.
type State = Option<(u64, u64, u64, [i64; 4])>;

/// Where something may happen to the files.
struct Places {
    inotify: OwnedFd,
    files: Vec<PathBuf>,
    watched: HashMap<i32, Place>,
    /// Where events are read to.
    buf: Vec<MaybeUninit<u8>>,
}

/// What concerns us of what happens there.
enum Place {
    /// A file of ours: everything.
    File,
    /// A directory: its own end, and what happens to these names.
    Directory(HashSet<OsString>),
}

impl Places {
    /// Fails where the directory of a file cannot be watched.
    fn new(files: Vec<PathBuf>) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(|e| match e {
            rustix::io::Errno::MFILE => io::Error::other(
                "limit of inotify instances of this user reached (sysctl fs.inotify.max_user_instances)",
            ),
            e => e.into(),
        })?;
        let buf = vec![MaybeUninit::uninit(); EVENTS];
        let mut places = Self { inotify, files, watched: HashMap::new(), buf };
        for file in &places.files {
            let directory = file.parent().unwrap_or(file);
            inotify::add_watch(&places.inotify, directory, NAMES).map_err(|e| match e {
                rustix::io::Errno::NOSPC => io::Error::other(
                    "limit of inotify watches of this user reached (sysctl fs.inotify.max_user_watches)",
                ),
                e => io::Error::new(
                    io::Error::from(e).kind(),
                    format!("{}: {}", directory.display(), io::Error::from(e)),
                ),
            })?;
        }
        places.renew();
        Ok(places)
    }

    /// Watches where the files are now. What cannot be watched is compared once in a while.
    fn renew(&mut self) {
        let mut watched = HashMap::new();
        let mut directories: BTreeMap<PathBuf, HashSet<OsString>> = BTreeMap::new();
        for file in &self.files {
            for (directory, name) in way(file) {
                directories.entry(directory).or_default().insert(name);
            }
            if let Ok(watch) = inotify::add_watch(&self.inotify, file, CONTENTS) {
                watched.insert(watch, Place::File);
            }
        }
        for (directory, names) in directories {
            if let Ok(watch) = inotify::add_watch(&self.inotify, &directory, NAMES) {
                watched.insert(watch, Place::Directory(names));
            }
        }
        for gone in self.watched.keys().filter(|watch| !watched.contains_key(watch)) {
            // It has gone by itself with what it was a watch of, or goes now.
            let _gone = inotify::remove_watch(&self.inotify, *gone);
        }
        self.watched = watched;
    }

    /// Takes what has happened.
    fn take(&mut self) -> Concerned {
        let mut reader = inotify::Reader::new(&self.inotify, &mut self.buf);
        let mut concerned = Concerned::No;
        for _ in 0..TAKEN {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                    concerned = concerned.max(concerns(self.watched.get(&event.wd()), event.events(), name));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                // Whatever was to be heard is found by comparing.
                Err(_) => return concerned.max(Concerned::Unknown),
            }
        }
        concerned
    }

    fn state(&self) -> Vec<State> {
        let state = |file: &PathBuf| {
            let is = fs::metadata(file).ok()?;
            Some((is.dev(), is.ino(), is.size(), [is.mtime(), is.mtime_nsec(), is.ctime(), is.ctime_nsec()]))
        };
        self.files.iter().map(state).collect()
    }
}

fn concerns(place: Option<&Place>, what: ReadFlags, name: Option<&OsStr>) -> Concerned {
    // More has happened than the kernel could keep.
    if what.contains(ReadFlags::QUEUE_OVERFLOW) {
        return Concerned::Unknown;
    }
    match (place, name) {
        // Of a watch that is no more, or that this is the end of.
        (None, _) => Concerned::No,
        _ if what.contains(ReadFlags::IGNORED) => Concerned::No,
        (Some(Place::Directory(names)), Some(name)) if !names.contains(name) => Concerned::No,
        (Some(Place::File | Place::Directory(_)), _) => Concerned::Yes,
    }
}

/// The directories on the way to a file in which a link, or the file, has a name, with that name.
fn way(file: &Path) -> Vec<(PathBuf, OsString)> {
    let mut found = Vec::new();
    let mut ahead: Vec<PathBuf> = file.components().rev().map(|c| PathBuf::from(c.as_os_str())).collect();
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(step) = ahead.pop() {
        match step.components().next() {
            Some(Component::RootDir) => at = PathBuf::from("/"),
            Some(Component::ParentDir) => drop(at.pop()),
            Some(Component::Normal(name)) => {
                let path = at.join(name);
                let target = fs::read_link(&path);
                if target.is_ok() || ahead.is_empty() {
                    found.push((at.clone(), name.to_owned()));
                }
                match target {
                    Ok(target) if links < LINKS_MAX => {
                        links += 1;
                        ahead.extend(target.components().rev().map(|c| PathBuf::from(c.as_os_str())));
                    }
                    Ok(_) => return found,
                    Err(_) => at = path,
                }
            }
            Some(Component::CurDir | Component::Prefix(_)) | None => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::fs::symlink, sync::mpsc};

    use super::*;

    /// A watch over `file`, and its calls.
    fn watched(file: &Path, every: Duration, thread: &str) -> (Watch, mpsc::Receiver<()>) {
        let (tell, told) = mpsc::channel();
        let watch = watch_every(every, [file], thread, move || tell.send(()).unwrap()).unwrap();
        (watch, told)
    }

    #[test]
    fn nobody_looks_for_the_sake_of_a_log_that_is_written_beside_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let (file, log) = (dir.path().join("agent.toml"), dir.path().join("agent.log"));
        fs::write(&file, "1").unwrap();
        let mut log = fs::File::create(log).unwrap();
        let (watch, told) = watched(&file, POLL, "test");
        for _ in 0..20 {
            log.write_all(b"line\n").unwrap();
            assert!(told.recv_timeout(QUIET / 4).is_err());
        }
        fs::write(&file, "2").unwrap();
        told.recv_timeout(POLL / 2).expect("the file has changed");
        drop(watch);
        assert!(told.recv().is_err(), "the watching thread has ended");
    }

    /// Where nothing changes nobody is called, and what the kernel tells nothing of is found all the same.
    #[test]
    fn a_look_without_notice_calls_only_for_what_has_changed() {
        let every = Duration::from_millis(20);
        let dir = tempfile::tempdir().unwrap();
        let [one, two, three] = ["one", "two", "three"].map(|name| dir.path().join(name));
        for folder in [&one, &two] {
            fs::create_dir_all(folder.join("inner")).unwrap();
            fs::write(folder.join("inner/file"), "1").unwrap();
        }
        let (_watch, told) = watched(&one.join("inner/file"), every, "test");
        told.recv_timeout(POLL).expect("what changed before the watch began is found");
        assert!(told.recv_timeout(20 * every).is_err(), "nothing has changed");
        // Two levels up, where nobody watches.
        fs::rename(&one, &three).unwrap();
        fs::rename(&two, &one).unwrap();
        told.recv_timeout(POLL).expect("it is another file now");
    }

    /// Every way in which a file is replaced in practice is seen at once.
    #[test]
    fn a_file_that_is_rewritten_renamed_or_reached_by_other_links_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two, links] = ["one", "two", "links"].map(|name| dir.path().join(name));
        for folder in [&one, &two, &links] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(one.join("tls.crt"), "1").unwrap();
        fs::write(two.join("tls.crt"), "2").unwrap();
        // As Kubernetes has it: tls.crt -> ..data/tls.crt, ..data -> a folder.
        symlink("../one", links.join("..data")).unwrap();
        symlink("..data/tls.crt", links.join("tls.crt")).unwrap();
        let (_watch, told) = watched(&links.join("tls.crt"), POLL, "test");
        let seen = |what: &str| {
            told.recv_timeout(POLL / 2).expect(what);
            // Of one change there may be two words.
            while told.recv_timeout(2 * QUIET).is_ok() {}
        };
        symlink("../two", links.join("..tmp")).unwrap();
        fs::rename(links.join("..tmp"), links.join("..data")).unwrap();
        seen("a link on the way was swapped");
        fs::write(two.join("tls.crt"), "3").unwrap();
        seen("what the links lead to was written to");
        fs::write(two.join("tls.new"), "4").unwrap();
        fs::rename(two.join("tls.new"), two.join("tls.crt")).unwrap();
        seen("what the links lead to was replaced");
        fs::remove_file(links.join("tls.crt")).unwrap();
        fs::write(links.join("tls.crt"), "5").unwrap();
        seen("the link was replaced by a file");
    }

    /// The processor time of the thread of this name, in this process; it may have yet to begin.
    fn spent(name: &str) -> Duration {
        let started = Instant::now();
        while started.elapsed() < POLL {
            if let Some(spent) = spent_by(name) {
                return spent;
            }
            thread::yield_now();
        }
        panic!("there is no thread {name}");
    }

    fn spent_by(thread: &str) -> Option<Duration> {
        for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
            let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
            if read("comm").trim_end() == thread {
                // The first number: nanoseconds on a processor (Documentation/scheduler/sched-stats.rst).
                let stat = read("schedstat");
                return Some(Duration::from_nanos(stat.split(' ').next()?.parse().ok()?));
            }
        }
        None
    }

    /// A process that makes, renames and removes files beside ours all the time costs next to nothing here.
    #[test]
    fn who_is_busy_beside_the_files_keeps_nobody_else_busy() {
        const BUSY: Duration = Duration::from_secs(2);
        let dir = tempfile::tempdir().unwrap();
        let [file, other, third] = ["cert.pem", "other", "third"].map(|name| dir.path().join(name));
        fs::write(&file, "1").unwrap();
        let (_watch, told) = watched(&file, POLL, "busy-beside");
        let (before, started) = (spent("busy-beside"), Instant::now());
        while started.elapsed() < BUSY {
            fs::write(&other, "line\n").unwrap();
            fs::rename(&other, &third).unwrap();
            fs::remove_file(&third).unwrap();
        }
        let spent = spent("busy-beside") - before;
        // A watch that woke for each of them took 0.43 of a core on a machine where this takes 0.05.
        assert!(spent < BUSY / 8, "{spent:?} of {BUSY:?}");
        assert!(told.try_recv().is_err(), "nothing of ours has changed");
        // And it is not deaf.
        fs::write(&file, "2").unwrap();
        told.recv_timeout(POLL / 2).expect("the file has changed");
    }
}
