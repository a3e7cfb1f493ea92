//! The sockets of the admin interface.
//!
//! # Invariants
//! - A socket of a daemon that runs is not taken away from it, unless it is being replaced.
//! - A daemon removes its own socket only: the one that replaces it may have put another one in its place.

use std::{
    fs, io,
    net::TcpListener,
    os::unix::{
        fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use super::AdminError;
use crate::config;

/// Where the sockets of root's daemons are.
const RUNTIME: &str = "/run/tunnel";
/// What the names of sockets begin with where the configuration does not say them.
const PREFIX: &str = "admin-";

/// Sockets that listen and are not served yet. Dropped, they are gone.
#[derive(Debug)]
pub struct Bound {
    pub(super) unix: Option<Socket>,
    pub(super) tcp: Option<TcpListener>,
    write_over_tcp: bool,
}

/// A Unix socket in the file system, beside its place until it is put there; removed when dropped.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    beside: PathBuf,
    /// Device and inode: whether it is still ours.
    file: (u64, u64),
}

impl Socket {
    /// Puts it in its place, where it takes that of a daemon that is replaced.
    fn put_in_place(&self) -> Result<(), AdminError> {
        fs::rename(&self.beside, &self.path).map_err(|source| failed(&self.path, source))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        for path in [&self.beside, &self.path] {
            if fs::symlink_metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == self.file) {
                let _gone = fs::remove_file(path);
            }
        }
    }
}

impl Bound {
    /// Whether what changes something may come by TCP.
    pub fn writes_over_tcp(&self) -> bool {
        self.write_over_tcp
    }

    /// Puts the socket in its place: until then, who connects reaches the daemon that is replaced.
    pub(super) fn put_in_place(&self) -> Result<(), AdminError> {
        self.unix.as_ref().map_or(Ok(()), Socket::put_in_place)
    }

    /// The path of its Unix socket.
    pub fn socket(&self) -> Option<&Path> {
        self.unix.as_ref().map(|socket| socket.path.as_path())
    }

    /// Where it can be reached, for the log.
    pub fn addresses(&self) -> Vec<String> {
        let unix = self.unix.as_ref().map(|socket| socket.path.display().to_string());
        let tcp = self.tcp.as_ref().and_then(|tcp| tcp.local_addr().ok()).map(|addr| addr.to_string());
        unix.into_iter().chain(tcp).collect()
    }
}

/// Binds what a configuration says. `file` is the configuration file, by which the socket is named where the configuration
/// does not; `replacing`: a daemon that has the socket hands over to this one.
pub fn bind(admin: &config::Admin, file: &Path, replacing: bool) -> Result<Option<Bound>, AdminError> {
    if !admin.enabled {
        return Ok(None);
    }
    let unix = match &admin.socket {
        Some(path) => Some(socket(path, replacing)?),
        None => match by_default(file, replacing) {
            Ok(socket) => Some(socket),
            // Nobody has asked for it: the daemon does its work without.
            Err(error) => {
                tracing::warn!(%error, "no admin socket: set admin.socket to have it elsewhere");
                None
            }
        },
    };
    let tcp = admin.listen.map(|address| {
        let listening = || {
            let socket = socket2::Socket::new(
                socket2::Domain::for_address(address),
                socket2::Type::STREAM.cloexec(),
                Some(socket2::Protocol::TCP),
            )?;
            socket.set_reuse_address(true)?;
            // A daemon that is replaced has it too, and no other may: each would get requests that are the other's.
            socket.set_reuse_port(replacing)?;
            socket.bind(&address.into())?;
            // For the one that replaces this.
            socket.set_reuse_port(true)?;
            socket.listen(BACKLOG)?;
            socket.set_nonblocking(true)?;
            Ok(TcpListener::from(socket))
        };
        listening().map_err(|source| AdminError::Listen { address, source })
    });
    Ok(Some(Bound { unix, tcp: tcp.transpose()?, write_over_tcp: admin.write_over_tcp }))
}

/// The socket where the configuration does not name one.
fn by_default(file: &Path, replacing: bool) -> Result<Socket, AdminError> {
    let folder = folder(true).map_err(|source| failed(Path::new(RUNTIME), source))?;
    sweep(&folder);
    socket(&of_file(&folder, file), replacing)
}

/// Connections that wait to be accepted: as many as are served at once.
const BACKLOG: i32 = 64;

fn failed(path: &Path, source: io::Error) -> AdminError {
    AdminError::Socket { path: path.to_owned(), source }
}

fn socket(path: &Path, replacing: bool) -> Result<Socket, AdminError> {
    let failed = |source| failed(path, source);
    if UnixStream::connect(path).is_ok() && !replacing {
        return Err(AdminError::Taken(path.to_owned()));
    }
    match fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            return Err(failed(io::Error::other("there is a file of this name that is no socket")));
        }
        _ => {}
    }
    // Made beside it, with its mode before anybody can find it, and put in its place later.
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let _stale = fs::remove_file(&beside);
    let listener = UnixListener::bind(&beside).map_err(failed)?;
    let made = || {
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        fs::symlink_metadata(&beside)
    };
    match made() {
        Ok(there) => {
            let file = (there.dev(), there.ino());
            Ok(Socket { listener, path: path.to_owned(), beside, file })
        }
        Err(e) => {
            let _gone = fs::remove_file(&beside);
            Err(failed(e))
        }
    }
}

/// The socket of the daemon of a configuration file that does not name one.
pub fn default_socket(file: &Path) -> io::Result<PathBuf> {
    folder(false).map(|folder| of_file(&folder, file))
}

fn of_file(folder: &Path, file: &Path) -> PathBuf {
    let name = file.file_stem().map_or("tunnel".into(), |stem| stem.to_string_lossy());
    folder.join(format!("{PREFIX}{name}.sock"))
}

/// The sockets of daemons of this user whose configuration does not name one.
pub fn sockets() -> Vec<PathBuf> {
    let Ok(folder) = folder(false) else { return Vec::new() };
    let mut found = admin_sockets(&folder);
    found.retain(|path| UnixStream::connect(path).is_ok());
    found.sort();
    found
}

fn admin_sockets(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let ours = entries.filter(|e| {
        let name = e.file_name();
        let name = name.to_string_lossy();
        name.starts_with(PREFIX) && name.ends_with(".sock")
    });
    ours.map(|e| e.path()).collect()
}

/// Removes what daemons left that were killed.
fn sweep(folder: &Path) {
    for path in admin_sockets(folder) {
        if UnixStream::connect(&path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
            let _gone = fs::remove_file(&path);
        }
    }
    // What one was about to put in its place that ended before.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(".new"));
        let process = process.and_then(|name| name.rsplit_once('.')).map(|(_, process)| process);
        let is_gone = |process| {
            !Path::new("/proc").join(process).exists()
                && UnixStream::connect(entry.path())
                    .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
        };
        if process.is_some_and(is_gone) {
            let _gone = fs::remove_file(entry.path());
        }
    }
}

/// A folder that nobody but this user can put anything into.
fn folder(make: bool) -> io::Result<PathBuf> {
    let ours = nix::unistd::geteuid().as_raw();
    let places = match ours {
        0 => [RUNTIME.to_owned(), "/tmp/tunnel-0".to_owned()],
        user => [format!("/run/user/{user}/tunnel"), format!("/tmp/tunnel-{user}")],
    };
    let mut why = io::Error::from(io::ErrorKind::NotFound);
    for place in places.map(PathBuf::from) {
        if make
            && let Err(e) = fs::DirBuilder::new().mode(0o700).create(&place)
            && e.kind() != io::ErrorKind::AlreadyExists
        {
            why = e;
            continue;
        }
        match fs::symlink_metadata(&place) {
            Ok(found) if found.is_dir() && found.uid() == ours && found.mode() & 0o022 == 0 => {
                return Ok(place);
            }
            Ok(_) => {
                let what = format!(
                    "{} has to be a folder of user {ours} that nobody else can write to",
                    place.display()
                );
                why = io::Error::other(what);
            }
            Err(e) => why = e,
        }
    }
    Err(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_of_a_daemon_that_runs_is_kept_and_one_of_a_daemon_that_was_killed_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let first = socket(&path, false).unwrap();
        assert!(UnixStream::connect(&path).is_err(), "it is not in its place yet");
        first.put_in_place().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(socket(&path, false), Err(AdminError::Taken(_))));
        drop(socket(&path, true).unwrap());
        assert!(UnixStream::connect(&path).is_ok(), "one that was not put in its place has replaced nothing");
        let second = socket(&path, true).unwrap();
        second.put_in_place().unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).is_ok(), "the one that was replaced leaves it alone");
        drop(second);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        fs::write(&path, "").unwrap();
        let e = socket(&path, false).unwrap_err().to_string();
        assert!(e.contains("no socket"), "{e}");
    }

    #[test]
    fn what_a_daemon_left_that_was_killed_is_swept_and_what_a_starting_one_has_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let starting = socket(&of_file(folder.path(), Path::new("agent.toml")), false).unwrap();
        // Above the most that pid_max may be (linux/threads.h, PID_MAX_LIMIT).
        for left in ["admin-agent.4194305.new", "admin-other.sock"] {
            drop(UnixListener::bind(folder.path().join(left)).unwrap());
        }
        sweep(folder.path());
        assert!(starting.beside.exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
