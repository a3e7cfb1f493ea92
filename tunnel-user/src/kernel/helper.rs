//! What needs privileges while workers run, which have none: a thread beside them that does it.
//!
//! There are three requests; the code of the third is the relay's own. It shares the process's memory, so that this keeps a
//! worker from *calling* what it should not, and not one that has taken over the process: docs/adr/0050.
//!
//! # Invariants
//! - Nothing that a peer has sent is parsed here.
//! - A thread that was given no helper, such as a test's or that of `tunnel doctor`, does it itself.

use std::{
    cell::RefCell,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    thread,
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{RcvBufForce, SndBufForce},
};

/// Requests that wait. A worker has at most one that it blocks for, and what it hands back to be dropped.
const WAITING_MAX: usize = 256;

/// A file that says how names are resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemFile {
    /// hosts(5)
    Hosts,
    /// resolv.conf(5)
    ResolvConf,
}

impl SystemFile {
    /// Where it is.
    pub fn path(self) -> &'static str {
        match self {
            Self::Hosts => "/etc/hosts",
            Self::ResolvConf => "/etc/resolv.conf",
        }
    }
}

/// Everything that can be asked for.
enum Request {
    /// Buffers beyond the limits of the system, of a socket that is the worker's.
    Buffers { socket: OwnedFd, receive: usize, send: Option<usize>, done: mpsc::SyncSender<io::Result<()>> },
    /// What a file says.
    Read { file: SystemFile, read: mpsc::SyncSender<io::Result<Vec<u8>>> },
    /// The programs of the splice relay are loaded, by the room that has them.
    Load(Box<dyn FnOnce() + Send>),
}

thread_local! {
    static HELPER: RefCell<Option<Asking>> = const { RefCell::new(None) };
}

/// Where workers ask.
#[derive(Clone)]
pub struct Asking(mpsc::SyncSender<Request>);

impl Asking {
    /// From now on the calling thread asks here.
    pub fn adopt(self) {
        HELPER.set(Some(self));
    }
}

/// The thread; ends when this is dropped, and every thread that asks has ended.
pub struct Helper {
    requests: Option<Asking>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Helper {
    /// Starts it, with the privileges of the calling thread.
    pub fn start() -> io::Result<Self> {
        let (requests, asked) = mpsc::sync_channel(WAITING_MAX);
        let serve = move || {
            for request in asked {
                // Of one that panics the hook says so, and whoever has asked hears of it: the next ones are served.
                let _panicked = catch_unwind(AssertUnwindSafe(|| perform(request)));
            }
        };
        let thread = thread::Builder::new().name("privileged".to_owned()).spawn(serve)?;
        Ok(Self { requests: Some(Asking(requests)), thread: Some(thread) })
    }

    /// For a worker.
    pub fn asking(&self) -> Option<Asking> {
        self.requests.clone()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn perform(request: Request) {
    // Whoever has asked may have ended.
    match request {
        Request::Buffers { socket, receive, send, done } => {
            let _gone = done.send(set_buffers(socket.as_fd(), receive, send));
        }
        Request::Read { file, read } => {
            let _gone = read.send(fs::read(file.path()));
        }
        Request::Load(load) => load(),
    }
}

fn unanswered() -> io::Error {
    io::Error::other("the thread for what needs privileges has not answered")
}

/// Asks the helper of this thread, if it has one, and waits.
fn ask<T>(
    request: impl FnOnce(mpsc::SyncSender<io::Result<T>>) -> Request,
    otherwise: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let Some(Asking(requests)) = HELPER.with_borrow(Clone::clone) else { return otherwise() };
    let (answer, answered) = mpsc::sync_channel(1);
    requests.send(request(answer)).map_err(|_| unanswered())?;
    answered.recv().map_err(|_| unanswered())?
}

fn set_buffers(socket: BorrowedFd<'_>, receive: usize, send: Option<usize>) -> io::Result<()> {
    setsockopt(&socket, RcvBufForce, &receive)?;
    send.map_or(Ok(()), |send| Ok(setsockopt(&socket, SndBufForce, &send)?))
}

/// Buffers of so many bytes for a socket, beyond the limits of the system (CAP_NET_ADMIN). Waits.
pub fn force_buffers(socket: BorrowedFd<'_>, receive: usize, send: Option<usize>) -> io::Result<()> {
    if HELPER.with_borrow(Option::is_none) {
        return set_buffers(socket, receive, send);
    }
    let socket = socket.try_clone_to_owned()?;
    ask(|done| Request::Buffers { socket, receive, send, done }, || Ok(()))
}

/// What a file of the system says. Waits.
pub fn read(file: SystemFile) -> io::Result<Vec<u8>> {
    ask(|read| Request::Read { file, read }, || fs::read(file.path()))
}

/// What the helper has loaded; it is dropped there too, which may take a privilege as well.
pub struct Loaded<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Loaded<T> {
    /// Of a thread that has a helper, or has the privileges itself.
    pub fn new(loaded: T) -> Self {
        Self(Some(loaded))
    }
}

impl<T: Send + 'static> Drop for Loaded<T> {
    fn drop(&mut self) {
        let loaded = self.0.take();
        // At the end of a thread it may have none any more. What is not detached then, ends with its maps.
        if let Ok(Some(Asking(requests))) = HELPER.try_with(|helper| helper.borrow().clone()) {
            let _ended = requests.send(Request::Load(Box::new(move || drop(loaded))));
        }
    }
}

/// Has a room load its programs, which it hands over as they are to be used. Waits.
pub fn load<T: Send + 'static>(programs: fn() -> T) -> io::Result<T> {
    ask(
        |loaded| {
            Request::Load(Box::new(move || {
                let _gone = loaded.send(Ok(programs()));
            }))
        },
        || Ok(programs()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_asks_its_helper_and_one_without_does_it_itself() {
        let helper = Helper::start().unwrap();
        let name = || thread::current().name().map(ToOwned::to_owned);
        assert_ne!(load(name).unwrap().as_deref(), Some("privileged"));
        let asking = helper.asking().unwrap();
        let asked = thread::spawn(move || {
            asking.adopt();
            let hosts = read(SystemFile::Hosts);
            let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
            force_buffers(one.as_fd(), 1 << 20, None).unwrap();
            // A request that panics has no answer, and the next one has.
            assert!(load::<()>(|| panic!("a test")).is_err());
            (load(name).unwrap(), hosts.is_ok())
        });
        let by = fs::exists("/etc/hosts").unwrap();
        assert_eq!(asked.join().unwrap(), (Some("privileged".to_owned()), by));
        drop(helper);
    }
}
