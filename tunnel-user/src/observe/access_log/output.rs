//! Where lines of the access log are written to: standard output, a file, or the journal.
//!
//! # Invariants
//! - Nothing here blocks for longer than [`PATIENCE`], but for a file system that does not answer.
//! - What was written of a line that could not be written whole ends before the next line begins.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::OpenOptionsExt as _, net::UnixDatagram},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Entry, format};
use crate::config::{AccessLog, FuturePath, JOURNAL, LineFormat, Output};

/// How long a write waits for a reader, until the thread looks at what else it was told.
const PATIENCE: Duration = Duration::from_millis(100);
/// Bytes of one write to what may be a pipe: a pipe that has room takes as much without blocking (`PIPE_BUF`, pipe(7)).
const PIPE_WRITE: usize = 4096;
/// Bytes of one write to a file.
const FILE_WRITE: usize = 64 * 1024;
/// Who may read the file: its owner and its group.
const MODE: u32 = 0o640;

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file.
    #[error("cannot open the access log {}: {source}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Standard output is closed.
    #[error("cannot write an access log to standard output: {0}")]
    Stdout(io::Error),
    /// There is no socket for the journal.
    #[error("cannot open a socket for the journal: {0}")]
    Journal(io::Error),
    /// There is no thread for it.
    #[error("the thread of an access log could not start: {0}")]
    Thread(io::Error),
}

/// What came of a write.
pub(super) enum Wrote {
    All,
    /// Nobody reads for now: once more.
    Later,
    /// So many lines are lost.
    Failed {
        lines: usize,
        error: io::Error,
    },
}

/// See the module.
pub(super) enum Target {
    Stream(Stream),
    Journal { socket: UnixDatagram, path: PathBuf },
}

/// A file, or standard output.
pub(super) struct Stream {
    file: File,
    /// Where it is reopened; not standard output.
    path: Option<PathBuf>,
    format: LineFormat,
    /// Lines that were not written yet, and how much of them was.
    buf: Vec<u8>,
    at: usize,
    lines: usize,
    /// A line was written in part.
    torn: bool,
}

impl Target {
    pub(super) fn open(settings: &AccessLog) -> Result<Self, OpenError> {
        let path = settings.path.as_ref().map(|FuturePath(path)| path.clone());
        let stream = |file, path| Self::Stream(Stream::new(file, path, settings.format));
        match settings.output {
            Output::Stdout => {
                let copy: io::Result<OwnedFd> = io::stdout().as_fd().try_clone_to_owned();
                Ok(stream(copy.map_err(OpenError::Stdout)?.into(), None))
            }
            Output::File => {
                let path = path.unwrap_or_default();
                Ok(stream(append(&path)?, Some(path)))
            }
            Output::Journal => {
                let socket = UnixDatagram::unbound().map_err(OpenError::Journal)?;
                // A journal that does not read in this time does not read.
                socket.set_write_timeout(Some(PATIENCE)).map_err(OpenError::Journal)?;
                Ok(Self::Journal { socket, path: path.unwrap_or_else(|| JOURNAL.into()) })
            }
        }
    }

    /// What the log calls it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Stream(Stream { path: None, .. }) => "stdout".to_owned(),
            Self::Stream(Stream { path: Some(path), .. }) | Self::Journal { path, .. } => {
                path.display().to_string()
            }
        }
    }

    /// Opens the file by its name again.
    pub(super) fn reopen(&mut self) -> Result<(), OpenError> {
        if let Self::Stream(Stream { file, path: Some(path), torn, .. }) = self {
            *file = append(path)?;
            *torn = false;
        }
        Ok(())
    }

    /// Takes an entry; for a stream it is to be [`flushed`](Self::flush).
    pub(super) fn put(&mut self, entry: &Entry) -> Wrote {
        match self {
            Self::Stream(stream) => {
                format::line(&mut stream.buf, entry, stream.format);
                stream.lines += 1;
                Wrote::All
            }
            Self::Journal { socket, path } => match socket.send_to(&format::journal(entry), &*path) {
                Ok(_) => Wrote::All,
                Err(error) => Wrote::Failed { lines: 1, error },
            },
        }
    }

    /// Whether there is as much to be flushed as one write takes.
    pub(super) fn is_full(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.buf.len() >= FILE_WRITE)
    }

    /// Writes what was put.
    pub(super) fn flush(&mut self) -> Wrote {
        match self {
            Self::Stream(stream) => stream.flush(),
            Self::Journal { .. } => Wrote::All,
        }
    }
}

/// Opens a file to append to. A FIFO that nobody reads is an error, and holds up nobody.
fn append(path: &Path) -> Result<File, OpenError> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(MODE).custom_flags(libc::O_NONBLOCK);
    options.open(path).map_err(|source| OpenError::File { path: path.to_owned(), source })
}

impl Stream {
    fn new(file: File, path: Option<PathBuf>, format: LineFormat) -> Self {
        Self { file, path, format, buf: Vec::new(), at: 0, lines: 0, torn: false }
    }

    fn flush(&mut self) -> Wrote {
        while self.at < self.buf.len() {
            if !self.has_room() {
                return Wrote::Later;
            }
            if self.at == 0 && self.torn {
                // One byte is written whole or not at all.
                if let Err(error) = self.file.write_all(b"\n") {
                    return self.give_up(error);
                }
                self.torn = false;
            }
            let most = if self.path.is_some() { FILE_WRITE } else { PIPE_WRITE };
            let end = self.buf.len().min(self.at + most);
            match self.file.write(&self.buf[self.at..end]) {
                Ok(0) => return self.give_up(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Wrote::Later,
                Err(error) => return self.give_up(error),
            }
        }
        self.clear();
        Wrote::All
    }

    /// Waits for room, for a moment.
    fn has_room(&self) -> bool {
        let mut asked = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        let wait = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::ZERO);
        // An error is the write's to report.
        !matches!(poll(&mut asked, wait), Ok(0))
    }

    /// What was not written is lost.
    fn give_up(&mut self, error: io::Error) -> Wrote {
        let newlines = |bytes: &[u8]| bytes.iter().filter(|b| **b == b'\n').count();
        let written = &self.buf[..self.at];
        let lines = self.lines - newlines(written);
        self.torn |= written.last().is_some_and(|last| *last != b'\n');
        self.clear();
        Wrote::Failed { lines, error }
    }

    /// Forgets what waits, and how many lines that were.
    pub(super) fn abandon(&mut self) -> usize {
        let Wrote::Failed { lines, .. } = self.give_up(io::ErrorKind::TimedOut.into()) else { return 0 };
        lines
    }

    fn clear(&mut self) {
        self.buf.clear();
        (self.at, self.lines) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn stream(file: File, path: Option<PathBuf>, text: &str) -> Stream {
        let mut stream = Stream::new(file, path, LineFormat::Json);
        stream.buf.extend_from_slice(text.as_bytes());
        stream.lines = text.lines().count();
        stream
    }

    #[test]
    fn a_full_disk_costs_the_lines_that_had_no_room() {
        // Every write to it fails with ENOSPC (full(4)).
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut stream = stream(full, Some("/dev/full".into()), "{}\n{}\n");
        let Wrote::Failed { lines, error } = stream.flush() else { panic!("it was written") };
        assert_eq!((lines, error.kind()), (2, io::ErrorKind::StorageFull));
        assert!(stream.buf.is_empty() && !stream.torn);
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_waited_for_and_loses_nothing() {
        let (mut reader, writer) = io::pipe().unwrap();
        let text = "{}\n".repeat(100_000);
        let mut stream = stream(File::from(OwnedFd::from(writer)), None, &text);
        assert!(matches!(stream.flush(), Wrote::Later));
        let read = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text)
        });
        while !matches!(stream.flush(), Wrote::All) {}
        drop(stream);
        assert_eq!(read.join().unwrap().unwrap(), text);
    }

    #[test]
    fn the_line_behind_one_that_was_cut_begins_on_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let mut stream = stream(append(&path).unwrap(), Some(path.clone()), "{\"a\":1}\n");
        stream.file.write_all(b"{\"a\"").unwrap();
        stream.at = 4;
        assert_eq!(stream.abandon(), 1);
        stream.buf.extend_from_slice(b"{\"b\":2}\n");
        stream.lines = 1;
        assert!(matches!(stream.flush(), Wrote::All));
        assert_eq!(std::fs::read_to_string(path).unwrap(), "{\"a\"\n{\"b\":2}\n");
    }
}
