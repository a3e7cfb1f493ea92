//! Handing the listeners of a daemon over to the one that replaces it, with the connections that wait in them.
//!
//! The two meet at a Unix socket in a folder that only their user can write to, so nobody else can stand in its place. Its
//! name says the network namespace, to which the listeners belong, and the configuration file. A lock beside it tells a
//! daemon that runs from one that was killed. One message per listening address holds the address and its descriptors
//! (SCM_RIGHTS), an empty address ends the list, and one byte from the new daemon says that it has taken over. UDP sockets, of
//! HTTP/3, go the same way, each address with a descriptor for every daemon that has connections there: see
//! [`Group`].
//!
//! # Invariants
//! - A socket is given only to a process of the same user.
//! - The old daemon goes on until the new one has said that it runs.

use std::{
    collections::HashMap,
    fs, io,
    io::{IoSlice, IoSliceMut, Write as _},
    mem::MaybeUninit,
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
            net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt::PeerCredentials};
use rustix::{
    fs::FlockOperation,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
};
use socket2::Socket;

use crate::transport::quic::{Group, Parts};

/// The most descriptors in one message (SCM_MAX_FD of `include/net/scm.h`).
const DESCRIPTORS_MAX: usize = 253;
/// Every message is this long: what it is about, and zeros. `[v6]:port` has 47 characters at most, and places 11.
const MESSAGE: usize = 64;
/// In front of the address of UDP sockets,
const UDP: &str = "u ";
/// and of that of what says how long some of their places are in use.
const IN_USE: &str = "p ";
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
    /// Others can write to the folder where daemons meet.
    #[error(
        "handing over: {} has to be a folder of user {ours} that nobody else can write to: remove it, it is made again", .path.display()
    )]
    Folder {
        /// Which.
        path: PathBuf,
        /// Our user.
        ours: u32,
    },
    /// Another daemon of the same file offers it.
    #[error("handing over: another daemon of this file runs")]
    Taken,
    /// The other side said something else.
    #[error("handing over: the other side does not speak this protocol")]
    Protocol,
}

/// Listening sockets by the address that they share.
pub type Listeners = HashMap<SocketAddr, Vec<Socket>>;

/// UDP sockets of HTTP/3, by the address that is configured for them.
pub type Groups = HashMap<SocketAddr, Group>;

/// Where the daemon of a configuration file is found, without `.sock` or `.lock`.
fn meeting_point(config: &Path) -> Result<PathBuf, TakeoverError> {
    let config = fs::canonicalize(config)?;
    let netns = fs::metadata("/proc/self/ns/net")?.ino();
    let name = format!("{netns:x}-{:016x}", fnv1a(config.as_os_str().as_bytes()));
    let ours = nix::unistd::geteuid().as_raw();
    let places = match ours {
        0 => ["/run/tunnel".to_owned(), "/tmp/tunnel-0".to_owned()],
        // The runtime directory of systemd's users (file-hierarchy(7)).
        user => [format!("/run/user/{user}/tunnel"), format!("/tmp/tunnel-{user}")],
    };
    let mut why = None;
    for place in places.map(PathBuf::from) {
        match private(&place, ours) {
            Ok(()) => return Ok(place.join(&name)),
            // There is no such place, or it cannot be written to: the next daemon finds the same.
            Err(TakeoverError::Io(e)) => why = Some(e),
            Err(e) => return Err(e),
        }
    }
    Err(why.unwrap_or_else(|| io::ErrorKind::NotFound.into()).into())
}

/// Makes a folder, or finds one, that nobody but this user can put anything into.
fn private(place: &Path, ours: u32) -> Result<(), TakeoverError> {
    match fs::DirBuilder::new().mode(0o700).create(place) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e.into()),
        _ => {}
    }
    let found = fs::symlink_metadata(place)?;
    let safe = found.is_dir() && found.uid() == ours && found.mode() & 0o022 == 0;
    if safe { Ok(()) } else { Err(TakeoverError::Folder { path: place.to_owned(), ours }) }
}

/// FNV-1a: stable between versions of this program, which the standard library's hashes are not.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// Where daemons of releases before this one meet: an abstract name, which anybody can take. Read for one release more, so
/// that one of them can be replaced.
fn meeting_point_before(config: &Path) -> io::Result<UnixAddr> {
    let path = fs::canonicalize(config)?;
    // Abstract names have 107 bytes; paths may be longer. The end differs more than the beginning.
    let bytes = path.as_os_str().as_bytes();
    let tail = &bytes[bytes.len().saturating_sub(80)..];
    UnixAddr::from_abstract_name([b"tunnel-takeover:".as_slice(), tail].concat())
}

/// The offer of a running daemon.
pub struct Offer {
    listener: tokio::net::UnixListener,
    place: PathBuf,
    /// Held as long as the offer stands.
    _lock: fs::File,
}

impl Offer {
    /// Opens the meeting point, in a runtime. [`TakeoverError::Taken`] while another daemon of the same file has it.
    pub fn open(config: &Path) -> Result<Self, TakeoverError> {
        let place = meeting_point(config)?;
        sweep(&place);
        let lock = lock(&place.with_extension("lock"))?;
        let socket = place.with_extension("sock");
        // Of a daemon that was killed: nobody has the lock.
        match fs::remove_file(&socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let listener = UnixListener::bind(&socket)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: tokio::net::UnixListener::from_std(listener)?, place, _lock: lock })
    }

    /// The next daemon that wants to take over.
    pub async fn requested(&self) -> Result<UnixStream, TakeoverError> {
        let (stream, _) = self.listener.accept().await?;
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        trusted(&stream)?;
        Ok(stream)
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        // While the lock is held: nobody else's are removed.
        for end in ["sock", "lock"] {
            let _gone = fs::remove_file(self.place.with_extension(end));
        }
    }
}

/// Removes what daemons left that were killed: nobody has their locks.
fn sweep(place: &Path) {
    let Some(Ok(entries)) = place.parent().map(fs::read_dir) else { return };
    let locks = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "lock"));
    for path in locks {
        // Held until both are gone.
        if let Ok(_lock) = lock(&path) {
            let _gone = fs::remove_file(path.with_extension("sock"));
            let _gone = fs::remove_file(&path);
        }
    }
}

/// The lock of a meeting point, which whoever has it removes in the end.
fn lock(path: &Path) -> Result<fs::File, TakeoverError> {
    loop {
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(TakeoverError::Taken),
            locked => locked.map_err(io::Error::from)?,
        }
        let there = fs::metadata(path).is_ok_and(|there| {
            file.metadata().is_ok_and(|own| (own.dev(), own.ino()) == (there.dev(), there.ino()))
        });
        // Otherwise it was removed between the two calls.
        if there {
            return Ok(file);
        }
    }
}

/// Gives the sockets away; ready when the other side has taken over. Blocks for half a minute at most.
pub fn give(
    stream: &UnixStream,
    listeners: &[(SocketAddr, Vec<Socket>)],
    groups: &Groups,
) -> Result<(), TakeoverError> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    for (address, sockets) in listeners {
        for part in sockets.chunks(DESCRIPTORS_MAX) {
            let descriptors: Vec<RawFd> = part.iter().map(AsRawFd::as_raw_fd).collect();
            send(stream, &address.to_string(), &descriptors)?;
        }
    }
    for (address, group) in groups {
        let parts = group.parts();
        for part in parts.sockets.chunks(DESCRIPTORS_MAX) {
            let descriptors: Vec<RawFd> = part.iter().map(AsRawFd::as_raw_fd).collect();
            send(stream, &format!("{UDP}{address}"), &descriptors)?;
        }
        for (places, ended) in parts.uses {
            let what = format!("{IN_USE}{address} {} {}", places.start, places.end);
            send(stream, &what, &[ended.as_raw_fd()])?;
        }
    }
    send(stream, "", &[])?;
    let mut said = [0];
    io::Read::read_exact(&mut &*stream, &mut said)?;
    if said == [TAKEN] { Ok(()) } else { Err(TakeoverError::Protocol) }
}

/// What was taken from a running daemon.
pub struct Taken {
    /// Listening sockets.
    pub listeners: Listeners,
    /// UDP sockets.
    pub groups: Groups,
    /// The way to tell the old daemon that they are in use.
    pub done: Done,
}

/// The way to tell the old daemon.
pub struct Done(UnixStream);

impl Done {
    /// Tells the old daemon that it can stop.
    pub fn done(mut self) -> io::Result<()> {
        self.0.write_all(&[TAKEN])
    }
}

/// Takes the sockets of the daemon that runs with this configuration file; `None` if none does.
pub fn take(config: &Path) -> Result<Option<Taken>, TakeoverError> {
    let stream = match UnixStream::connect(meeting_point(config)?.with_extension("sock")) {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            match UnixStream::connect_addr(&meeting_point_before(config)?) {
                Ok(stream) if trusted(&stream).is_ok() => stream,
                // Nobody, or somebody who has no business there.
                Ok(_) | Err(_) => return Ok(None),
            }
        }
        Err(e) => return Err(e.into()),
    };
    trusted(&stream)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut listeners, mut groups) = (Listeners::new(), HashMap::<SocketAddr, Parts<OwnedFd>>::new());
    loop {
        let (what, mut descriptors) = receive(&stream)?;
        if what.is_empty() {
            let groups = groups.into_iter().map(|(address, parts)| (address, Group::of(parts))).collect();
            return Ok(Some(Taken { listeners, groups, done: Done(stream) }));
        }
        if let Some(address) = what.strip_prefix(UDP) {
            groups.entry(parsed(address)?).or_default().sockets.append(&mut descriptors);
        } else if let Some(places) = what.strip_prefix(IN_USE) {
            let mut words = places.split(' ');
            let mut word = || words.next().ok_or(TakeoverError::Protocol);
            let (address, places) = (parsed(word()?)?, parsed(word()?)?..parsed(word()?)?);
            let ended = descriptors.pop().ok_or(TakeoverError::Protocol)?;
            groups.entry(address).or_default().uses.push((places, ended));
        } else {
            let sockets = descriptors.into_iter().map(Socket::from);
            listeners.entry(parsed(&what)?).or_default().extend(sockets);
        }
    }
}

fn parsed<T: FromStr>(text: &str) -> Result<T, TakeoverError> {
    text.parse().map_err(|_| TakeoverError::Protocol)
}

/// Only our own user's processes are talked to, whatever the permissions of files say.
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
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut message)];
    let received = loop {
        match recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received.map_err(io::Error::from)?,
        }
    };
    let descriptors = control
        .drain()
        .filter_map(
            |message| if let RecvAncillaryMessage::ScmRights(fds) = message { Some(fds) } else { None },
        )
        .flatten()
        .collect();
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
        let mut group = Group::bind(at, None).unwrap();
        let _places = group.take(3, None).unwrap();
        let groups = Groups::from([(address, group)]);
        let waiting: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        let new = {
            let _inside = runtime.enter();
            let offer = Offer::open(&config).unwrap();
            assert!(Offer::open(&config).is_err(), "one daemon per file");
            let new = thread::spawn(move || {
                let Taken { listeners: sockets, groups, done: old } =
                    take(&config).unwrap().expect("the old daemon is there");
                let listeners = sockets.iter().map(|(a, s)| (*a, s.len())).collect::<Vec<_>>();
                let mut accepted = 0;
                for socket in sockets.values().flatten() {
                    socket.set_nonblocking(true).unwrap();
                    while socket.accept().is_ok() {
                        accepted += 1;
                    }
                }
                old.done().unwrap();
                let group = groups.into_values().map(|mut group| group.take(2, None).unwrap().first);
                (listeners, accepted, group.collect::<Vec<_>>())
            });
            runtime.block_on(async {
                let stream = offer.requested().await.unwrap();
                give(&stream, &[(address, sockets)], &groups).unwrap();
            });
            new
        };
        // Three places are in use.
        assert_eq!(new.join().unwrap(), (vec![(address, 3)], waiting.len(), vec![3]));
    }
}
