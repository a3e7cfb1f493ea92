//! Handing the listeners of a daemon over to the one that replaces it.
//!
//! Enters: a configuration file, which names the daemon, and its listening sockets. Leaves: the same sockets
//! in another process, with the connections that wait in them. Invariant: a socket is given only to a
//! process of the same user, and the old daemon goes on until the new one has said that it runs. It never
//! decides when to stop.
//!
//! The two meet at an abstract Unix socket (unix(7)): it belongs to the network namespace, as the listeners
//! do, and is gone with the daemon, however that ends. One message per listening address holds the
//! address and its descriptors (SCM_RIGHTS), an empty address ends the list, and one byte from the new daemon says
//! that it has taken over.

use std::{
    collections::HashMap,
    fs, io,
    io::{IoSlice, IoSliceMut, Write as _},
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
        },
    },
    path::Path,
    time::Duration,
};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt::PeerCredentials,
};
use socket2::Socket;

/// The most descriptors in one message (SCM_MAX_FD of `include/net/scm.h`).
const DESCRIPTORS_MAX: usize = 253;
/// Every message is this long: an address and zeros. `[v6]:port` has 47 characters at most.
const MESSAGE: usize = 64;
/// The new daemon loads its programs and attaches them in this time.
const PATIENCE: Duration = Duration::from_secs(30);
/// What the new daemon says when it has taken over.
const TAKEN: u8 = b'T';

/// Why the listeners could not be handed over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// A system call failed.
    #[error("handing over: {0}")]
    Io(#[from] io::Error),
    /// Somebody else's process.
    #[error("handing over: the other side runs as user {theirs}, not {ours}")]
    Stranger {
        /// Its effective user.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// The other side said something else.
    #[error("handing over: the other side does not speak this protocol")]
    Protocol,
}

/// Listening sockets by the address that they share.
pub type Listeners = HashMap<SocketAddr, Vec<Socket>>;

/// Where the daemon of a configuration file is found.
fn meeting_point(config: &Path) -> io::Result<UnixAddr> {
    let path = fs::canonicalize(config)?;
    // Abstract names have 107 bytes; paths may be longer. The end differs more than the beginning.
    let bytes = path.as_os_str().as_bytes();
    let tail = &bytes[bytes.len().saturating_sub(80)..];
    UnixAddr::from_abstract_name([b"tunnel-takeover:".as_slice(), tail].concat())
}

/// The offer of a running daemon.
pub struct Offer(tokio::net::UnixListener);

impl Offer {
    /// Opens the meeting point, in a runtime. Fails when another daemon of the same file has it.
    pub fn open(config: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind_addr(&meeting_point(config)?)?;
        listener.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(listener).map(Self)
    }

    /// The next daemon that wants to take over.
    pub async fn requested(&self) -> Result<UnixStream, TakeoverError> {
        let (stream, _) = self.0.accept().await?;
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        trusted(&stream)?;
        Ok(stream)
    }
}

/// Gives the sockets away; ready when the other side has taken over. Blocks for half a minute at most.
pub fn give(stream: &UnixStream, listeners: &[(SocketAddr, Vec<Socket>)]) -> Result<(), TakeoverError> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    for (address, sockets) in listeners {
        for part in sockets.chunks(DESCRIPTORS_MAX) {
            let descriptors: Vec<RawFd> = part.iter().map(AsRawFd::as_raw_fd).collect();
            send(stream, &address.to_string(), &descriptors)?;
        }
    }
    send(stream, "", &[])?;
    let mut said = [0];
    io::Read::read_exact(&mut &*stream, &mut said)?;
    if said == [TAKEN] { Ok(()) } else { Err(TakeoverError::Protocol) }
}

/// What was taken from a running daemon.
pub struct Taken {
    listeners: Listeners,
    stream: UnixStream,
}

/// The way to tell the old daemon.
pub struct Done(UnixStream);

impl Taken {
    /// The sockets, and the way to tell the old daemon that they are in use.
    pub fn split(self) -> (Listeners, Done) {
        (self.listeners, Done(self.stream))
    }
}

impl Done {
    /// Tells the old daemon that it can stop.
    pub fn done(mut self) -> io::Result<()> {
        self.0.write_all(&[TAKEN])
    }
}

/// Takes the sockets of the daemon that runs with this configuration file; `None` if none does.
pub fn take(config: &Path) -> Result<Option<Taken>, TakeoverError> {
    let stream = match UnixStream::connect_addr(&meeting_point(config)?) {
        Ok(stream) => stream,
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    trusted(&stream)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut listeners = Listeners::new();
    loop {
        let (address, descriptors) = receive(&stream)?;
        if address.is_empty() {
            return Ok(Some(Taken { listeners, stream }));
        }
        let address: SocketAddr = address.parse().map_err(|_| TakeoverError::Protocol)?;
        listeners.entry(address).or_default().extend(descriptors.into_iter().map(Socket::from));
    }
}

/// Anybody may open or connect to an abstract socket; only our own user's processes are talked to.
fn trusted(stream: &UnixStream) -> Result<(), TakeoverError> {
    let theirs = getsockopt(&stream.as_fd(), PeerCredentials).map_err(io::Error::from)?.uid();
    let ours = nix::unistd::geteuid().as_raw();
    if theirs == ours { Ok(()) } else { Err(TakeoverError::Stranger { theirs, ours }) }
}

fn send(stream: &UnixStream, text: &str, descriptors: &[RawFd]) -> Result<(), TakeoverError> {
    let mut message = [0; MESSAGE];
    message.get_mut(..text.len()).ok_or(TakeoverError::Protocol)?.copy_from_slice(text.as_bytes());
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &[][..] } else { &rights[..] };
    let sent =
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&message)], rights, MsgFlags::MSG_NOSIGNAL, None);
    // Smaller than the socket's buffer: all or nothing.
    if sent.map_err(io::Error::from)? == MESSAGE { Ok(()) } else { Err(TakeoverError::Protocol) }
}

/// One message. The kernel ends a read where the next message's descriptors begin (unix(7)), and every
/// message but the last has some.
fn receive(stream: &UnixStream) -> Result<(String, Vec<OwnedFd>), TakeoverError> {
    let mut message = [0; MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let mut slices = [IoSliceMut::new(&mut message)];
    let received =
        recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(io::Error::from)?;
    let mut descriptors = Vec::new();
    for control in received.cmsgs().map_err(io::Error::from)? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just installed these descriptors in this process; nobody else owns them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if received.bytes != MESSAGE {
        return Err(TakeoverError::Protocol);
    }
    let end = message.iter().position(|b| *b == 0).unwrap_or(MESSAGE);
    let text = str::from_utf8(&message[..end]).map_err(|_| TakeoverError::Protocol)?;
    Ok((text.to_owned(), descriptors))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::transport::tcp;

    #[test]
    fn a_connection_that_waits_in_a_listener_is_accepted_by_the_next_owner() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("agent.toml");
        fs::write(&config, "").unwrap();
        assert!(take(&config).unwrap().is_none(), "nobody runs with this file");

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let at = "127.0.0.1:0".parse().unwrap();
        let sockets = tcp::listen(at, 3, None, tcp::OnClose::Deliver).unwrap();
        let address = sockets[0].local_addr().unwrap().as_socket().unwrap();
        let waiting: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        let new = {
            let _inside = runtime.enter();
            let offer = Offer::open(&config).unwrap();
            assert!(Offer::open(&config).is_err(), "one daemon per file");
            let new = thread::spawn(move || {
                let (sockets, old) = take(&config).unwrap().expect("the old daemon is there").split();
                let listeners = sockets.iter().map(|(a, s)| (*a, s.len())).collect::<Vec<_>>();
                let mut accepted = 0;
                for socket in sockets.values().flatten() {
                    socket.set_nonblocking(true).unwrap();
                    while socket.accept().is_ok() {
                        accepted += 1;
                    }
                }
                old.done().unwrap();
                (listeners, accepted)
            });
            runtime.block_on(async {
                let stream = offer.requested().await.unwrap();
                give(&stream, &[(address, sockets)]).unwrap();
            });
            new
        };
        assert_eq!(new.join().unwrap(), (vec![(address, 3)], waiting.len()));
    }
}
