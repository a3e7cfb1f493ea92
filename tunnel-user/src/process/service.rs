//! What a service manager is told (sd_notify(3)): readiness, a status text, reloads, the end, and that the daemon is alive.
//!
//! # Invariants
//! - Without a manager nothing is sent, and nothing fails. A message that cannot be sent is logged, and changes nothing else.
//! - Nothing blocks: a manager that does not read loses messages.

use std::{
    ffi::OsStr,
    io::{self, IoSlice},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use nix::{
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
    time::{ClockId, clock_gettime},
};

/// What our descriptors are called in the manager's store.
const STORED: &str = "tunnel-listener";
/// Descriptors in one message (SCM_MAX_FD, include/net/scm.h).
const DESCRIPTORS_MAX: usize = 253;
/// What a stop may take beyond the drain timeout: connections are closed, and kernel programs detached.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// What the manager has told us at the start, and a way to tell it something.
#[derive(Debug, Default)]
pub struct Service {
    /// Where it listens.
    pub notify: Notifier,
    /// It restarts a daemon from which it has heard nothing for so long.
    pub watchdog: Option<Duration>,
    /// Whether it keeps descriptors for the next daemon.
    pub keeps_sockets: bool,
    /// Sockets that it has opened for us, or that the daemon before has left with it.
    pub sockets: Vec<OwnedFd>,
}

/// The socket of the manager.
#[derive(Debug, Default)]
pub struct Notifier(Option<UnixDatagram>);

impl Notifier {
    /// By the address in `NOTIFY_SOCKET`: a path, or `@` and an abstract name.
    ///
    /// # Errors
    /// When it is neither, or nobody listens there.
    pub fn new(address: &OsStr) -> io::Result<Self> {
        let bytes = address.as_bytes();
        let address = match bytes.split_first() {
            Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
            Some((b'/', _)) => SocketAddr::from_pathname(address)?,
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "neither a path nor an abstract name",
                ));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_nonblocking(true)?;
        Ok(Self(Some(socket)))
    }

    /// Whether anybody listens.
    pub fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// Everything is attached, bound and valid. After a take-over `main` is the process that is the service from now on.
    pub fn ready(&self, status: &str, main: Option<u32>) {
        let main = main.map(|pid| format!("MAINPID={pid}\n")).unwrap_or_default();
        self.send(&format!("{main}READY=1\nSTATUS={}", one_line(status)), &[]);
    }

    /// The status text of `systemctl status`.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", one_line(status)), &[]);
    }

    /// The configuration is being read again; [`ready`](Self::ready) ends that.
    pub fn reloading(&self) {
        // Type=notify-reload compares it with when it asked for that.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()), &[]);
    }

    /// It ends, after so much time for flows to finish at most.
    pub fn stopping(&self, why: &str, drain: Duration) {
        let allowed = (drain + STOP_GRACE).as_micros();
        self.send(&format!("STOPPING=1\nSTATUS={}\nEXTEND_TIMEOUT_USEC={allowed}", one_line(why)), &[]);
    }

    /// It is alive.
    pub fn alive(&self) {
        self.send("WATCHDOG=1", &[]);
    }

    /// Leaves these descriptors with the manager in place of those that it has, for the daemon after this one.
    pub fn store<F: AsFd>(&self, descriptors: &[F]) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={STORED}"), &[]);
        for some in descriptors.chunks(DESCRIPTORS_MAX) {
            let some: Vec<_> = some.iter().map(AsFd::as_fd).collect();
            self.send(&format!("FDSTORE=1\nFDNAME={STORED}"), &some);
        }
    }

    fn send(&self, message: &str, descriptors: &[BorrowedFd<'_>]) {
        let Some(socket) = &self.0 else { return };
        let raw: Vec<_> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let bytes = [IoSlice::new(message.as_bytes())];
        let sent = sendmsg::<()>(socket.as_raw_fd(), &bytes, control, MsgFlags::MSG_NOSIGNAL, None);
        if let Err(error) = sent {
            let what = message.lines().next().unwrap_or_default();
            tracing::warn!(what, %error, "failed to notify the service manager");
        }
    }
}

/// A message is lines of `NAME=VALUE`.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager() -> (UnixDatagram, Notifier) {
        let name = format!("tunnel-test-{}-{:x}", std::process::id(), fastrand::u64(..));
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        manager.set_nonblocking(true).unwrap();
        (manager, Notifier::new(OsStr::new(&format!("@{name}"))).unwrap())
    }

    fn heard(manager: &UnixDatagram) -> String {
        let mut message = [0; 4096];
        let n = manager.recv(&mut message).unwrap();
        String::from_utf8(message[..n].to_vec()).unwrap()
    }

    #[test]
    fn messages_are_those_of_sd_notify() {
        let (manager, notifier) = manager();
        notifier.ready("1 listener\nREADY=0", Some(7));
        assert_eq!(heard(&manager), "MAINPID=7\nREADY=1\nSTATUS=1 listener READY=0");
        notifier.reloading();
        assert!(heard(&manager).starts_with("RELOADING=1\nMONOTONIC_USEC="));
        notifier.stopping("SIGTERM: draining", Duration::from_secs(30));
        assert_eq!(heard(&manager), "STOPPING=1\nSTATUS=SIGTERM: draining\nEXTEND_TIMEOUT_USEC=40000000");
        notifier.alive();
        assert_eq!(heard(&manager), "WATCHDOG=1");
    }

    #[test]
    fn a_manager_that_does_not_read_and_one_that_is_gone_hold_up_nothing() {
        let (manager, notifier) = manager();
        for _ in 0..10_000 {
            notifier.alive();
        }
        drop(manager);
        notifier.alive();
        assert!(Notifier::new(OsStr::new("relative")).is_err());
        Notifier::default().ready("nobody hears it", None);
    }
}
