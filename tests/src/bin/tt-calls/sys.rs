//! System calls on a connected socket, as a C program makes them, with the result of each and errors by name.
//!
//! # Invariants
//! - One call is one system call. Nothing is retried, not even after a signal, because the result of the call is what
//!   is tested.

use std::{
    io, mem,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd},
    ptr,
    time::Duration,
};

use nix::errno::Errno;

/// What a call that counts bytes answered.
pub(crate) type Answer = Result<usize, Errno>;

fn answer(n: isize) -> Answer {
    usize::try_from(n).map_err(|_| Errno::last())
}

fn done(n: i32) -> Result<i32, Errno> {
    if n < 0 { Err(Errno::last()) } else { Ok(n) }
}

/// recv(2).
pub(crate) fn recv(fd: &impl AsRawFd, buf: &mut [u8], flags: i32) -> Answer {
    // SAFETY: the buffer is valid for its length, and the kernel writes no more than that.
    answer(unsafe { libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), flags) })
}

/// send(2), without a signal.
pub(crate) fn send(fd: &impl AsRawFd, buf: &[u8], flags: i32) -> Answer {
    let flags = flags | libc::MSG_NOSIGNAL;
    // SAFETY: the buffer is valid for its length, and only read.
    answer(unsafe { libc::send(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len(), flags) })
}

/// readv(2).
pub(crate) fn readv(fd: &impl AsRawFd, bufs: &mut [&mut [u8]]) -> Answer {
    let iov: Vec<_> = bufs.iter_mut().map(|b| iovec(b.as_mut_ptr(), b.len())).collect();
    // SAFETY: each vector is valid for its length, for as long as the buffers are borrowed.
    answer(unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), count(iov.len())) })
}

/// writev(2).
pub(crate) fn writev(fd: &impl AsRawFd, bufs: &[&[u8]]) -> Answer {
    let iov: Vec<_> = bufs.iter().map(|b| iovec(b.as_ptr().cast_mut(), b.len())).collect();
    // SAFETY: each vector is valid for its length, and the kernel only reads it.
    answer(unsafe { libc::writev(fd.as_raw_fd(), iov.as_ptr(), count(iov.len())) })
}

fn iovec(at: *mut u8, length: usize) -> libc::iovec {
    libc::iovec { iov_base: at.cast(), iov_len: length }
}

fn count(n: usize) -> i32 {
    i32::try_from(n).expect("a handful of buffers")
}

/// recvmmsg(2) into buffers of one size each: the lengths that came.
pub(crate) fn recvmmsg(fd: &impl AsRawFd, bufs: &mut [Vec<u8>], flags: i32) -> Result<Vec<usize>, Errno> {
    with_messages(bufs, |messages| {
        let vlen = u32::try_from(messages.len()).expect("a handful of messages");
        // SAFETY: the messages point to vectors that are valid for the call; there is no timeout.
        unsafe { libc::recvmmsg(fd.as_raw_fd(), messages.as_mut_ptr(), vlen, flags as _, ptr::null_mut()) }
    })
}

/// sendmmsg(2): the lengths that went.
pub(crate) fn sendmmsg(fd: &impl AsRawFd, bufs: &mut [Vec<u8>]) -> Result<Vec<usize>, Errno> {
    with_messages(bufs, |messages| {
        let vlen = u32::try_from(messages.len()).expect("a handful of messages");
        // SAFETY: as for recvmmsg; the kernel only reads the vectors.
        unsafe { libc::sendmmsg(fd.as_raw_fd(), messages.as_mut_ptr(), vlen, libc::MSG_NOSIGNAL as _) }
    })
}

fn with_messages(
    bufs: &mut [Vec<u8>],
    call: impl FnOnce(&mut [libc::mmsghdr]) -> i32,
) -> Result<Vec<usize>, Errno> {
    let mut iov: Vec<_> = bufs.iter_mut().map(|b| iovec(b.as_mut_ptr(), b.len())).collect();
    let mut messages: Vec<libc::mmsghdr> = iov
        .iter_mut()
        .map(|iov| {
            // SAFETY: zeros are a message header without a name and control data.
            let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
            message.msg_hdr.msg_iov = iov;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    let n = usize::try_from(call(&mut messages)).map_err(|_| Errno::last())?;
    Ok(messages[..n].iter().map(|m| m.msg_len as usize).collect())
}

/// splice(2).
pub(crate) fn splice(from: &impl AsRawFd, to: &impl AsRawFd, length: usize, flags: u32) -> Answer {
    let none = ptr::null_mut();
    // SAFETY: both descriptors are open, and there are no offsets.
    answer(unsafe { libc::splice(from.as_raw_fd(), none, to.as_raw_fd(), none, length, flags) })
}

/// sendfile(2), from the file's own position.
pub(crate) fn sendfile(to: &impl AsRawFd, from: &impl AsRawFd, length: usize) -> Answer {
    // SAFETY: both descriptors are open, and there is no offset.
    answer(unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), ptr::null_mut(), length) })
}

/// read(2).
pub(crate) fn read(fd: &impl AsRawFd, buf: &mut [u8]) -> Answer {
    // SAFETY: the buffer is valid for its length.
    answer(unsafe { libc::read(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) })
}

/// write(2).
pub(crate) fn write(fd: &impl AsRawFd, buf: &[u8]) -> Answer {
    // SAFETY: the buffer is valid for its length.
    answer(unsafe { libc::write(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len()) })
}

/// shutdown(2).
pub(crate) fn shutdown(fd: &impl AsRawFd, how: i32) -> Result<i32, Errno> {
    // SAFETY: it takes numbers.
    done(unsafe { libc::shutdown(fd.as_raw_fd(), how) })
}

/// ioctl(2) with a number for an answer: FIONREAD, SIOCOUTQ, SIOCATMARK.
pub(crate) fn ioctl(fd: &impl AsRawFd, request: libc::c_ulong) -> Result<i32, Errno> {
    let mut value = 0;
    // SAFETY: these requests write one int.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw mut value) })?;
    Ok(value)
}

/// Bytes that can be read.
pub(crate) const FIONREAD: libc::c_ulong = 0x541B;
/// Bytes that the peer has not acknowledged (linux/sockios.h).
pub(crate) const SIOCOUTQ: libc::c_ulong = 0x5411;
/// Whether the next byte is behind the urgent one (asm-generic/sockios.h).
pub(crate) const SIOCATMARK: libc::c_ulong = 0x8905;

/// setsockopt(2).
pub(crate) fn set<T>(fd: &impl AsRawFd, level: i32, name: i32, value: &T) -> Result<i32, Errno> {
    let length = u32::try_from(size_of::<T>()).expect("options are small");
    // SAFETY: the value is valid for its length, and only read.
    done(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, ptr::from_ref(value).cast(), length) })
}

/// The error that waits on the socket, by its name, or "none".
pub(crate) fn so_error(fd: &impl AsRawFd) -> String {
    let (mut value, mut length) = (0i32, 4);
    let at = (&raw mut value).cast();
    // SAFETY: the option is an int.
    let got =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ERROR, at, &raw mut length) };
    match (got, value) {
        (0, 0) => "none".to_owned(),
        (0, errno) => format!("{:?}", Errno::from_raw(errno)),
        _ => format!("getsockopt: {:?}", Errno::last()),
    }
}

/// A timeout of a socket: SO_RCVTIMEO, SO_SNDTIMEO.
pub(crate) fn set_timeout(fd: &impl AsRawFd, name: i32, after: Duration) -> Result<i32, Errno> {
    let value = libc::timeval {
        tv_sec: i64::try_from(after.as_secs()).expect("seconds"),
        tv_usec: i64::from(after.subsec_micros()),
    };
    set(fd, libc::SOL_SOCKET, name, &value)
}

/// Sets O_NONBLOCK, or takes it away.
pub(crate) fn set_nonblocking(fd: &impl AsRawFd, on: bool) -> Result<i32, Errno> {
    // SAFETY: it takes numbers.
    let flags = done(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let flags = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
    // SAFETY: the same.
    done(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) })
}

/// poll(2) on one descriptor: what it has of `events`, and what is always told. Empty after the time.
pub(crate) fn poll(fd: &impl AsRawFd, events: i16, limit: Duration) -> Result<i16, Errno> {
    let mut asked = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    let limit = i32::try_from(limit.as_millis()).expect("seconds");
    // SAFETY: one valid pollfd.
    done(unsafe { libc::poll(&raw mut asked, 1, limit) })?;
    Ok(asked.revents)
}

/// What one descriptor is waited for with epoll(7).
pub(crate) struct Epoll(OwnedFd);

impl Epoll {
    pub(crate) fn new(fd: &impl AsRawFd, events: u32) -> io::Result<Self> {
        // SAFETY: it takes a number.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made, and is nobody else's.
        let epoll = Self(unsafe { OwnedFd::from_raw_fd(epoll) });
        epoll.control(libc::EPOLL_CTL_ADD, fd, events)?;
        Ok(epoll)
    }

    /// Asks for other events, or for the same once more.
    pub(crate) fn again(&self, fd: &impl AsRawFd, events: u32) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, events)
    }

    fn control(&self, what: i32, fd: &impl AsRawFd, events: u32) -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: 0 };
        // SAFETY: one valid event, which the kernel only reads.
        match unsafe { libc::epoll_ctl(self.0.as_raw_fd(), what, fd.as_raw_fd(), &raw mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The next event; 0 after the time.
    pub(crate) fn wait(&self, limit: Duration) -> Result<u32, Errno> {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        let limit = i32::try_from(limit.as_millis()).expect("seconds");
        // SAFETY: room for one event.
        let n = done(unsafe { libc::epoll_wait(self.0.as_raw_fd(), &raw mut event, 1, limit) })?;
        Ok(if n == 0 { 0 } else { event.events })
    }
}

/// A pipe: the end to read from, and the end to write to.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    match unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } {
        // SAFETY: they were just made, and are nobody else's.
        0 => Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends this process when it has not ended by itself: a call that never comes back is an observation as well.
pub(crate) fn alarm(after: Duration) {
    let seconds = u32::try_from(after.as_secs()).expect("seconds");
    // SAFETY: it takes a number; nothing here catches the signal.
    unsafe { libc::alarm(seconds) };
}
