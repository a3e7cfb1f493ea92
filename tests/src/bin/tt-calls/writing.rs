//! Ways to write.

use std::time::{Duration, Instant};

use anyhow::Result;
use libc::{MSG_DONTWAIT, MSG_MORE, MSG_OOB, MSG_WAITALL, POLLIN, POLLPRI};

use crate::{Behaviour, End, NOTHING, Word, note, pause, poll_names, sys, tell};

pub(crate) const ALL: &[Behaviour] = &[
    ("zero-length", zero_length, zero_length_partner),
    ("small-writes", small_writes, judge_to_the_end),
    ("vectors", vectors, judge_to_the_end),
    ("large-write", large_write, slow_reader),
    ("send-timeout", send_timeout, late_reader),
    ("urgent", urgent, urgent_partner),
    ("urgent-inline", urgent, urgent_inline_partner),
];

/// Nothing is written, and nothing comes of it; then one byte, and that comes.
fn zero_length(end: &mut End) -> Result<()> {
    note("send nothing", sys::send(end.socket()?, &[], 0));
    note("write nothing", sys::write(end.socket()?, &[]));
    note("vector of nothing", sys::writev(end.socket()?, &[&[], &[]]));
    note("receive nothing", sys::recv(end.socket()?, &mut [], MSG_DONTWAIT));
    end.tell(Word::Sent)?;
    end.hear(Word::Got)?;
    end.send_all(&end.bytes(1))?;
    end.tell(Word::Sent)?;
    end.hear(Word::Got)
}

fn zero_length_partner(end: &mut End) -> Result<()> {
    end.hear(Word::Sent)?;
    note("poll", sys::poll(end.socket()?, POLLIN, NOTHING).map(poll_names));
    note("receive", sys::recv(end.socket()?, &mut [0; 8], MSG_DONTWAIT));
    end.tell(Word::Got)?;
    end.hear(Word::Sent)?;
    tell("queued", end.wait_queued(1)?);
    // With something to be read, a buffer of no length still gets nothing, and leaves it.
    note("into nothing", sys::recv(end.socket()?, &mut [], 0));
    let mut buf = [0; 8];
    note("the byte", sys::recv(end.socket()?, &mut buf, 0));
    end.tell(Word::Got)
}

/// 3,000 of them, of 1 to 7 bytes, with and without Nagle's algorithm.
fn small_writes(end: &mut End) -> Result<()> {
    let bytes = end.bytes(12_000);
    let (mut at, mut short) = (0, 0);
    for n in 0..3000usize {
        if n == 1500 {
            note("nodelay", sys::set(end.socket()?, libc::IPPROTO_TCP, libc::TCP_NODELAY, &1i32));
        }
        let next = bytes.len().min(at + 1 + n % 7);
        if sys::send(end.socket()?, &bytes[at..next], 0) != Ok(next - at) {
            short += 1;
        }
        at = next;
    }
    tell("not taken whole", short);
    tell("sent", at);
    finish(end)
}

fn finish(end: &mut End) -> Result<()> {
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    note("the other end", sys::recv(end.socket()?, &mut [0; 8], 0));
    Ok(())
}

/// Out of several buffers, with MSG_MORE in between, and several messages at a time.
fn vectors(end: &mut End) -> Result<()> {
    let bytes = end.bytes(10_000);
    let socket = end.socket()?;
    note("writev", sys::writev(socket, &[&bytes[..10], &[], &bytes[10..3000], &bytes[3000..4000]]));
    note("more", sys::send(socket, &bytes[4000..4500], MSG_MORE));
    note("no more", sys::send(socket, &bytes[4500..5000], 0));
    let mut messages: Vec<_> = bytes[5000..8000].chunks(1000).map(<[u8]>::to_vec).collect();
    note("sendmmsg", sys::sendmmsg(socket, &mut messages).map(|lengths| format!("{lengths:?}")));
    note("cork", sys::set(socket, libc::IPPROTO_TCP, libc::TCP_CORK, &1i32));
    note("corked", sys::send(socket, &bytes[8000..9000], 0));
    note("corked", sys::send(socket, &bytes[9000..], 0));
    note("uncork", sys::set(socket, libc::IPPROTO_TCP, libc::TCP_CORK, &0i32));
    finish(end)
}

/// Receives everything, judges it, and says its own end.
fn judge_to_the_end(end: &mut End) -> Result<()> {
    let (mut at, mut buf, mut wrong) = (0, vec![0; 1 << 16], None);
    let last = loop {
        match sys::recv(end.socket()?, &mut buf, 0) {
            Ok(n) if n > 0 => {
                wrong = wrong.or(end.peers_pattern().check(at, &buf[..n]).err());
                at += n as u64;
            }
            last => break last,
        }
    };
    tell("received", at);
    tell("wrong", wrong.map_or_else(|| "nothing".to_owned(), |e| e.to_string()));
    note("the end", last);
    Ok(())
}

/// More than all buffers hold, in one blocking call.
fn large_write(end: &mut End) -> Result<()> {
    const BYTES: usize = 16 << 20;
    let bytes = end.bytes(BYTES);
    end.tell(Word::Go)?;
    note("sent", sys::send(end.socket()?, &bytes, 0));
    finish(end)
}

/// Reads in small pieces at first, with pauses.
fn slow_reader(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    let (mut at, mut buf, mut wrong) = (0, vec![0; 1 << 16], None);
    let last = loop {
        let slow = at < 100_000;
        let length = if slow { 5000 } else { buf.len() };
        if slow {
            pause(Duration::from_millis(5));
        }
        match sys::recv(end.socket()?, &mut buf[..length], 0) {
            Ok(n) if n > 0 => {
                wrong = wrong.or(end.peers_pattern().check(at, &buf[..n]).err());
                at += n as u64;
            }
            last => break last,
        }
    };
    tell("received", at);
    tell("wrong", wrong.map_or_else(|| "nothing".to_owned(), |e| e.to_string()));
    note("the end", last);
    Ok(())
}

/// A call that finds no room ends in time, and says what it got rid of.
fn send_timeout(end: &mut End) -> Result<()> {
    const LIMIT: Duration = Duration::from_millis(800);
    note("set", sys::set_timeout(end.socket()?, libc::SO_SNDTIMEO, LIMIT));
    let (bytes, mut sent) = (end.bytes(1 << 20), 0usize);
    let (outcome, took) = loop {
        let start = Instant::now();
        match sys::send(end.socket()?, &bytes, 0) {
            // Whole, or as much as there was room for when the time was up.
            Ok(n) => sent += n,
            Err(errno) => break (errno, start.elapsed()),
        }
    };
    tell("outcome", format!("{outcome:?}"));
    tell("not before its time", took + Duration::from_millis(10) >= LIMIT);
    tell("some was taken, and not all that a machine has", (1..256 << 20).contains(&sent));
    end.tell(Word::Go)?;
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    let mut count = [0; 8];
    note("the count", sys::recv(end.socket()?, &mut count, MSG_WAITALL));
    tell("all of it", u64::from_le_bytes(count) == sent as u64);
    Ok(())
}

/// Begins to read when the other end has given up.
fn late_reader(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    let (mut count, mut buf) = (0u64, vec![0; 1 << 16]);
    let last = loop {
        match sys::recv(end.socket()?, &mut buf, 0) {
            Ok(n) if n > 0 => count += n as u64,
            last => break last,
        }
    };
    note("the end", last);
    end.send_all(&count.to_le_bytes())
}

/// Three bytes, an urgent one, and two more (RFC 6093); one more when those have been waited for.
fn urgent(end: &mut End) -> Result<()> {
    let socket = end.socket()?;
    note("abc", sys::send(socket, b"abc", 0));
    note("urgent", sys::send(socket, b"!", MSG_OOB));
    note("de", sys::send(socket, b"de", 0));
    end.tell(Word::Sent)?;
    end.hear(Word::Go)?;
    note("f", sys::send(end.socket()?, b"f", 0));
    end.hear(Word::Got)
}

fn urgent_partner(end: &mut End) -> Result<()> {
    end.hear(Word::Sent)?;
    read_urgent(end)
}

/// With SO_OOBINLINE the urgent byte is where it was sent.
fn urgent_inline_partner(end: &mut End) -> Result<()> {
    note("inline", sys::set(end.socket()?, libc::SOL_SOCKET, libc::SO_OOBINLINE, &1i32));
    end.hear(Word::Sent)?;
    read_urgent(end)
}

fn read_urgent(end: &mut End) -> Result<()> {
    let pri = sys::poll(end.socket()?, POLLPRI, 2 * NOTHING);
    note("poll", pri.map(poll_names));
    // FIONREAD counts to the mark, and where that is, differs: nothing else says that all of it is there.
    pause(2 * NOTHING);
    let (mut buf, mut all, mut marks) = ([0; 16], Vec::new(), 0);
    let urgent = sys::recv(end.socket()?, &mut buf[..1], MSG_OOB | MSG_DONTWAIT);
    note("out of band", urgent.map(|n| text(&buf[..n])));
    end.tell(Word::Go)?;
    // A read stops at the mark, and takes what is behind it with the next call.
    while !all.ends_with(b"f") && end.wait_events(POLLIN)? & POLLIN != 0 {
        match sys::recv(end.socket()?, &mut buf, MSG_DONTWAIT) {
            Ok(n) if n > 0 => all.extend_from_slice(&buf[..n]),
            other => {
                note("no more", other);
                break;
            }
        }
        marks += sys::ioctl(end.socket()?, sys::SIOCATMARK)?;
    }
    tell("in band", text(&all));
    tell("marks", marks);
    end.tell(Word::Got)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
