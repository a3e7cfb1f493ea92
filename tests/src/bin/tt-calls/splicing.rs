//! splice(2) and sendfile(2): bytes that a program moves without seeing them, as io.Copy of Go does.

use std::{collections::BTreeSet, os::fd::OwnedFd, thread};

use anyhow::{Context as _, Result};
use libc::{POLLIN, POLLOUT, SPLICE_F_MORE, SPLICE_F_MOVE, SPLICE_F_NONBLOCK};
use nix::errno::Errno;

use crate::{Behaviour, End, PATIENCE, Word, note, sys, tell};

pub(crate) const ALL: &[Behaviour] = &[
    ("splice-blocking", splice_blocking, exchange),
    ("splice-as-go", splice_as_go, exchange),
    ("splice-nothing", splice_nothing, splice_nothing_partner),
    ("splice-both-ways", splice_both_ways, both_ways_partner),
    ("sendfile", sendfile, receive_all),
    ("vmsplice-out", splice_from_memory, receive_all),
];

/// What is exchanged: many times what a pipe holds.
const BYTES: usize = 1 << 20;
/// What is on its way at a time: less than any buffer, so that neither end waits for the other to read.
const STEP: usize = 24 * 1024;
/// What Go asks splice(2) for (maxSpliceSize, internal/poll/splice_linux.go).
const GO: usize = 1 << 20;

/// Sends, and gets back what it sent, step by step; then its end, and the other.
fn exchange(end: &mut End) -> Result<()> {
    let bytes = end.bytes(BYTES);
    let mut back = vec![0; STEP];
    for piece in bytes.chunks(STEP) {
        end.send_all(piece)?;
        let got = sys::recv(end.socket()?, &mut back[..piece.len()], libc::MSG_WAITALL)?;
        if back[..got] != *piece {
            tell("wrong", "other bytes came back");
            return Ok(());
        }
    }
    tell("exchanged", bytes.len());
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    note("the end", sys::recv(end.socket()?, &mut back, 0));
    Ok(())
}

/// Echoes until the end, by way of a pipe.
fn splice_blocking(end: &mut End) -> Result<()> {
    let (out, into) = sys::pipe()?;
    let (socket, mut moved) = (end.socket()?, 0);
    let last = loop {
        match sys::splice(socket, &into, 1 << 16, SPLICE_F_MOVE | SPLICE_F_MORE) {
            Ok(n) if n > 0 => moved += empty(&out, socket, n)?,
            last => break last,
        }
    };
    tell("moved", moved);
    note("the end", last);
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    Ok(())
}

/// All of `n` bytes, from the pipe to the socket.
fn empty(out: &OwnedFd, socket: &std::net::TcpStream, n: usize) -> Result<usize> {
    let mut left = n;
    while left > 0 {
        match sys::splice(out, socket, left, SPLICE_F_MOVE) {
            Ok(n) => left -= n,
            Err(Errno::EAGAIN) => drop(sys::poll(socket, POLLOUT, PATIENCE)?),
            Err(errno) => return Err(errno).context("splice to the socket"),
        }
    }
    Ok(n)
}

/// The same with a socket that does not block, a pipe that does not block, and poll in between.
fn splice_as_go(end: &mut End) -> Result<()> {
    let (out, into) = sys::pipe()?;
    let socket = end.socket()?;
    sys::set_nonblocking(socket, true)?;
    let (mut moved, mut errors) = (0, BTreeSet::new());
    let last = loop {
        match sys::splice(socket, &into, GO, SPLICE_F_NONBLOCK) {
            Ok(n) if n > 0 => moved += empty(&out, socket, n)?,
            Err(Errno::EAGAIN) => {
                if sys::poll(socket, POLLIN, PATIENCE)? == 0 {
                    break Err(Errno::ETIMEDOUT);
                }
                // Readable, and still nothing comes, is what must not be: it would spin.
                if sys::splice(socket, &into, 0, SPLICE_F_NONBLOCK).is_err() {
                    errors.insert("splice of nothing");
                }
            }
            last => break last,
        }
    };
    tell("moved", moved);
    tell("errors", format!("{errors:?}"));
    note("the end", last);
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    Ok(())
}

/// Without data there is EAGAIN, with data there is data, and at the end there is nothing.
fn splice_nothing(end: &mut End) -> Result<()> {
    let (out, into) = sys::pipe()?;
    let socket = end.socket()?;
    sys::set_nonblocking(socket, true)?;
    note("nothing there", sys::splice(socket, &into, 1000, SPLICE_F_NONBLOCK));
    end.tell(Word::Go)?;
    end.hear(Word::Sent)?;
    tell("queued", end.wait_queued(1000)?);
    let mut buf = vec![0; 1000];
    note("some", sys::splice(end.socket()?, &into, 400, SPLICE_F_NONBLOCK));
    let got = sys::read(&out, &mut buf);
    note("read from the pipe", got.map(|n| end.judge(0, &buf[..n])));
    note("the rest", sys::splice(end.socket()?, &into, 1000, SPLICE_F_NONBLOCK));
    let got = sys::read(&out, &mut buf);
    note("read from the pipe", got.map(|n| end.judge(400, &buf[..n])));
    note("nothing left", sys::splice(end.socket()?, &into, 1000, SPLICE_F_NONBLOCK));
    end.tell(Word::Got)?;
    end.hear(Word::Ended)?;
    tell("the end comes", crate::poll_names(end.wait_events(POLLIN)?));
    note("the end", sys::splice(end.socket()?, &into, 1000, SPLICE_F_NONBLOCK));
    Ok(())
}

fn splice_nothing_partner(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    end.send_all(&end.bytes(1000))?;
    end.tell(Word::Sent)?;
    end.hear(Word::Got)?;
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    end.tell(Word::Ended)
}

/// Out of the socket by one thread, into it by another, through a pipe each.
fn splice_both_ways(end: &mut End) -> Result<()> {
    let bytes = end.bytes(BYTES);
    let ((in_out, in_into), (out_out, out_into)) = (sys::pipe()?, sys::pipe()?);
    let end = &*end;
    let socket = end.socket()?;
    let received = thread::scope(|scope| -> Result<Vec<u8>> {
        let filling =
            scope.spawn(|| bytes.chunks(4096).all(|piece| sys::write(&out_into, piece) == Ok(piece.len())));
        let sending = scope.spawn(|| {
            let mut left = BYTES;
            while left > 0 {
                left -= sys::splice(&out_out, socket, left.min(1 << 16), SPLICE_F_MOVE)?;
            }
            Ok::<_, Errno>(())
        });
        let reading = scope.spawn(|| {
            let (mut all, mut buf) = (Vec::new(), vec![0; 1 << 16]);
            while all.len() < BYTES {
                let n = sys::read(&in_out, &mut buf)?;
                all.extend_from_slice(&buf[..n]);
            }
            Ok::<_, Errno>(all)
        });
        let mut left = BYTES;
        while left > 0 {
            match sys::splice(socket, &in_into, left.min(1 << 16), SPLICE_F_MOVE) {
                Ok(n) if n > 0 => left -= n,
                other => {
                    note("splice from the socket", other);
                    // The threads wait for what does not come: the alarm ends them.
                    break;
                }
            }
        }
        tell("filled", filling.join().unwrap_or(false));
        note("sent", sending.join().unwrap_or(Err(Errno::ECANCELED)).map(|()| BYTES));
        Ok(reading.join().unwrap_or(Err(Errno::ECANCELED))?)
    })?;
    tell("received", end.judge(0, &received));
    Ok(())
}

fn both_ways_partner(end: &mut End) -> Result<()> {
    let bytes = end.bytes(BYTES);
    let end = &*end;
    let mut all = vec![0; BYTES];
    thread::scope(|scope| -> Result<()> {
        let sending = scope.spawn(|| end.send_all(&bytes));
        note("received", sys::recv(end.socket()?, &mut all, libc::MSG_WAITALL));
        tell("sent", sending.join().is_ok_and(|sent| sent.is_ok()));
        Ok(())
    })?;
    tell("received", end.judge(0, &all));
    Ok(())
}

/// A file, by sendfile(2), from its middle.
fn sendfile(end: &mut End) -> Result<()> {
    use std::io::{Seek as _, SeekFrom, Write as _};
    let mut file = tempfile::tempfile()?;
    file.write_all(&vec![7; 1000])?;
    file.write_all(&end.bytes(BYTES))?;
    file.seek(SeekFrom::Start(1000))?;
    let (mut sent, mut last) = (0, Ok(0));
    while sent < BYTES {
        last = sys::sendfile(end.socket()?, &file, BYTES - sent);
        match last {
            Ok(n) if n > 0 => sent += n,
            _ => break,
        }
    }
    tell("sent", sent);
    note("all of it", last.map(|_| "yes"));
    note("behind it", sys::sendfile(end.socket()?, &file, 10));
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    note("the other end", sys::recv(end.socket()?, &mut [0; 8], 0));
    Ok(())
}

/// From memory by way of a pipe.
fn splice_from_memory(end: &mut End) -> Result<()> {
    let (out, into) = sys::pipe()?;
    let mut sent = 0;
    for piece in end.bytes(BYTES).chunks(4096) {
        note_if_not(piece.len(), sys::write(&into, piece));
        sent += empty(&out, end.socket()?, piece.len())?;
    }
    tell("sent", sent);
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    note("the other end", sys::recv(end.socket()?, &mut [0; 8], 0));
    Ok(())
}

fn note_if_not(wanted: usize, answer: sys::Answer) {
    if answer != Ok(wanted) {
        note("wrong", answer);
    }
}

/// Receives and judges everything to the end; then says its own.
fn receive_all(end: &mut End) -> Result<()> {
    let (mut all, mut buf) = (Vec::new(), vec![0; 1 << 16]);
    let last = loop {
        match sys::recv(end.socket()?, &mut buf, 0) {
            Ok(n) if n > 0 => all.extend_from_slice(&buf[..n]),
            last => break last,
        }
    };
    tell("received", end.judge(0, &all));
    note("the end", last);
    Ok(())
}
