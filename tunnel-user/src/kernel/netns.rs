//! Network namespaces: finding them, and working in one.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns};
use tunnel_common::capture::Missing;

use super::sys;

/// The descriptors of one process that are looked through for a socket: 1 µs each.
const DESCRIPTORS_MAX: usize = 4096;
/// The inode of the first PID namespace (`PROC_PID_INIT_INO` of linux/proc_ns.h).
const FIRST_PID_NAMESPACE: u64 = 0xeffffffc;

/// The inode number of the network namespace that process `pid` is in.
pub fn inode_of_process(pid: u32) -> io::Result<u64> {
    fs::metadata(path(pid)).map(|m| m.ino())
}

/// The network namespace that process (or thread) `pid` is in.
pub fn of_process(pid: u32) -> io::Result<OwnedFd> {
    fs::File::open(path(pid)).map(OwnedFd::from)
}

fn path(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("ns/net")
}

/// Its inode number.
pub fn inode(netns: &OwnedFd) -> io::Result<u64> {
    fs::metadata(format!("/proc/self/fd/{}", netns.as_raw_fd())).map(|m| m.ino())
}

/// The network namespace that a connection came from: its thread's, or, where that is another one, that of the socket, which
/// the thread may have made elsewhere, in a namespace without a process.
pub fn of_connection(missing: &Missing) -> io::Result<OwnedFd> {
    let own = fs::metadata("/proc/self/ns/pid").map(|m| m.ino())?;
    if own != FIRST_PID_NAMESPACE {
        return Err(io::Error::other(
            "this daemon has a PID namespace of its own, and the kernel tells others' numbers",
        ));
    }
    let thread = of_process(missing.thread);
    if let Ok(netns) = &thread {
        let copy = netns.try_clone()?;
        if within(copy, cookie_here)? == missing.netns {
            return thread;
        }
    }
    let socket = socket_of(missing).ok_or(io::ErrorKind::NotFound)?;
    sys::netns_of(socket.as_fd())
}

/// A duplicate of the socket.
fn socket_of(missing: &Missing) -> Option<OwnedFd> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", missing.process)).ok()?;
    descriptors
        .flatten()
        .take(DESCRIPTORS_MAX)
        .filter(|entry| {
            fs::read_link(entry.path())
                .is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|fd| sys::duplicate(missing.process, fd).ok())
        .find(|fd| sys::socket_cookie(fd.as_fd()).is_ok_and(|cookie| cookie == missing.socket))
}

/// The cookie of the namespace that the calling thread is in.
fn cookie_here() -> io::Result<u64> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    sys::netns_cookie(socket.as_fd())
}

/// Does something in a namespace, on a thread of its own that goes there and ends.
pub fn within<T: Send + 'static>(
    netns: OwnedFd,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let there = thread::Builder::new().name("netns".to_owned()).spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        work()
    })?;
    there.join().map_err(|_| io::Error::other("the thread that entered the namespace panicked"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A socket's network namespace is the one that it was made in; of what is no socket nothing is asked but whether it is one.
    #[test]
    fn the_namespace_of_a_socket_is_known_and_nothing_else_has_one() {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let netns = fs::File::from(sys::netns_of(socket.as_fd()).unwrap());
        assert_eq!(netns.metadata().unwrap().ino(), fs::metadata("/proc/thread-self/ns/net").unwrap().ino());
        let (reader, _writer) = io::pipe().unwrap();
        let file = fs::File::open("/dev/null").unwrap();
        for fd in [reader.as_fd(), file.as_fd()] {
            let error = sys::netns_of(fd).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
        }
    }
}
