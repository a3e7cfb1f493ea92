//! What poll(2) and epoll(7) tell, and in which order.

use std::time::Duration;

use anyhow::Result;
use libc::{EPOLLET, EPOLLIN, EPOLLONESHOT, EPOLLOUT, EPOLLRDHUP, MSG_DONTWAIT, POLLIN, POLLOUT, POLLRDHUP};

use crate::{Behaviour, End, NOTHING, PATIENCE, Word, names, note, poll_names, sys, tell};

pub(crate) const ALL: &[Behaviour] = &[
    ("poll", poll, steps),
    ("poll-reset", poll_reset, reset),
    ("epoll-level", epoll_level, steps),
    ("epoll-edge", epoll_edge, steps),
    ("epoll-oneshot", epoll_oneshot, steps),
    ("epoll-edge-reset", epoll_edge_reset, reset),
    ("epoll-edge-full", epoll_edge_full, drain),
];

const EVERYTHING: i16 = POLLIN | POLLOUT | POLLRDHUP;

/// Sends 100 bytes each time it is told to, three times; then its end.
fn steps(end: &mut End) -> Result<()> {
    for at in [0, 100, 200] {
        end.hear(Word::Go)?;
        end.send_all(&end.bytes(300)[at..at + 100])?;
        end.tell(Word::Sent)?;
    }
    end.hear(Word::Go)?;
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    end.tell(Word::Ended)?;
    end.hear(Word::Got)?;
    note("the other end", sys::recv(end.socket()?, &mut [0; 8], 0));
    Ok(())
}

/// Has the next 100 bytes sent, and waits until they are there, beside `before` that were.
fn next(end: &mut End, before: usize) -> Result<()> {
    end.tell(Word::Go)?;
    end.hear(Word::Sent)?;
    tell("queued", end.wait_queued(before + 100)?);
    Ok(())
}

/// Reads all there is, at `offset` of what the partner sends.
fn read(end: &End, offset: usize) -> Result<()> {
    let mut buf = vec![0; 1000];
    let got = sys::recv(end.socket()?, &mut buf, MSG_DONTWAIT);
    note("read", got.map(|n| end.judge(offset, &buf[..n])));
    Ok(())
}

fn poll(end: &mut End) -> Result<()> {
    let look = |end: &End, key: &str| -> Result<()> {
        note(key, sys::poll(end.socket()?, EVERYTHING, Duration::ZERO).map(poll_names));
        Ok(())
    };
    look(end, "idle")?;
    next(end, 0)?;
    look(end, "with data")?;
    read(end, 0)?;
    look(end, "read")?;
    next(end, 0)?;
    next(end, 100)?;
    look(end, "with more")?;
    end.tell(Word::Go)?;
    end.hear(Word::Ended)?;
    tell("the end comes", poll_names(end.wait_events(POLLRDHUP)?));
    look(end, "data and the end")?;
    read(end, 100)?;
    look(end, "the end")?;
    note("end", sys::recv(end.socket()?, &mut [0; 8], MSG_DONTWAIT));
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    look(end, "both ends")?;
    end.tell(Word::Got)
}

/// Resets the connection when it is told to.
fn reset(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    end.send_all(&end.bytes(100))?;
    end.tell(Word::Sent)?;
    end.hear(Word::Go)?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    note("linger", sys::set(end.socket()?, libc::SOL_SOCKET, libc::SO_LINGER, &linger));
    end.close();
    end.tell(Word::Ended)
}

fn poll_reset(end: &mut End) -> Result<()> {
    next(end, 0)?;
    end.tell(Word::Go)?;
    end.hear(Word::Ended)?;
    tell("the reset comes", poll_names(end.wait_events(0)?));
    note("all of it", sys::poll(end.socket()?, EVERYTHING, Duration::ZERO).map(poll_names));
    // What came before the reset is still there: the kernel keeps the queue (tcp_reset, net/ipv4/tcp_input.c).
    read(end, 0)?;
    after_reset(end)
}

/// The error is told once; then there is an end.
fn after_reset(end: &End) -> Result<()> {
    let mut buf = [0; 8];
    note("the error", sys::recv(end.socket()?, &mut buf, 0));
    note("behind it", sys::recv(end.socket()?, &mut buf, 0));
    note("writing", sys::send(end.socket()?, b"x", 0));
    note("afterwards", sys::poll(end.socket()?, EVERYTHING, Duration::ZERO).map(poll_names));
    Ok(())
}

const LEVEL: u32 = (EPOLLIN | EPOLLOUT | EPOLLRDHUP).cast_unsigned();
const EDGE: u32 = LEVEL | EPOLLET.cast_unsigned();

fn epoll_level(end: &mut End) -> Result<()> {
    let epoll = sys::Epoll::new(end.socket()?, LEVEL)?;
    let look = |key: &str| note(key, epoll.wait(Duration::ZERO).map(names));
    look("idle");
    next(end, 0)?;
    look("with data");
    look("with data, again");
    read(end, 0)?;
    look("read");
    next(end, 0)?;
    look("with more");
    read(end, 100)?;
    next(end, 0)?;
    end.tell(Word::Go)?;
    end.hear(Word::Ended)?;
    end.wait_events(POLLRDHUP)?;
    look("data and the end");
    read(end, 200)?;
    look("the end");
    look("the end, again");
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    look("both ends");
    end.tell(Word::Got)
}

fn epoll_edge(end: &mut End) -> Result<()> {
    let epoll = sys::Epoll::new(end.socket()?, EDGE)?;
    let wait = |key: &str| note(key, epoll.wait(PATIENCE).map(names));
    let none = |key: &str| note(key, epoll.wait(NOTHING).map(names));
    wait("at first");
    none("then");
    next(end, 0)?;
    wait("data");
    none("the same data");
    next(end, 100)?;
    wait("more data, none was read");
    none("the same data");
    read(end, 0)?;
    none("it was read");
    next(end, 0)?;
    wait("more data");
    read(end, 200)?;
    end.tell(Word::Go)?;
    end.hear(Word::Ended)?;
    told_once(&epoll, "the end", "the same end");
    note("end", sys::recv(end.socket()?, &mut [0; 8], MSG_DONTWAIT));
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    wait("both ends");
    end.tell(Word::Got)
}

fn epoll_oneshot(end: &mut End) -> Result<()> {
    let wanted = (EPOLLIN | EPOLLRDHUP | EPOLLONESHOT).cast_unsigned();
    let epoll = sys::Epoll::new(end.socket()?, wanted)?;
    let wait = |key: &str| note(key, epoll.wait(PATIENCE).map(names));
    let none = |key: &str| note(key, epoll.wait(NOTHING).map(names));
    none("idle");
    next(end, 0)?;
    wait("data");
    next(end, 100)?;
    none("disarmed");
    epoll.again(end.socket()?, wanted)?;
    wait("armed");
    read(end, 0)?;
    epoll.again(end.socket()?, wanted)?;
    none("it was read");
    next(end, 0)?;
    wait("more data");
    end.tell(Word::Go)?;
    end.hear(Word::Ended)?;
    end.wait_events(POLLRDHUP)?;
    epoll.again(end.socket()?, wanted)?;
    wait("the end");
    end.tell(Word::Got)?;
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    Ok(())
}

/// An end or a reset, and that nothing more is told. The kernel tells of each twice, by the socket's state and by what can be
/// read or by its error (`tcp_fin`, `tcp_reset`, net/ipv4/tcp_input.c): who was waiting when it came may wake in between.
fn told_once(epoll: &sys::Epoll, key: &str, again: &str) {
    let first = epoll.wait(PATIENCE).map(names);
    let second = match epoll.wait(NOTHING).map(names) {
        second if second == first => epoll.wait(NOTHING).map(names),
        other => other,
    };
    note(key, first);
    note(again, second);
}

fn epoll_edge_reset(end: &mut End) -> Result<()> {
    let epoll = sys::Epoll::new(end.socket()?, EDGE)?;
    note("at first", epoll.wait(PATIENCE).map(names));
    next(end, 0)?;
    note("data", epoll.wait(PATIENCE).map(names));
    read(end, 0)?;
    end.tell(Word::Go)?;
    end.hear(Word::Ended)?;
    told_once(&epoll, "the reset", "once more");
    tell("SO_ERROR", sys::so_error(end.socket()?));
    tell("SO_ERROR again", sys::so_error(end.socket()?));
    note("reading", sys::recv(end.socket()?, &mut [0; 8], 0));
    note("writing", sys::send(end.socket()?, b"x", 0));
    Ok(())
}

/// Fills what there is room for, and is told when there is room again.
fn epoll_edge_full(end: &mut End) -> Result<()> {
    let epoll = sys::Epoll::new(end.socket()?, EDGE)?;
    note("at first", epoll.wait(PATIENCE).map(names));
    note("nonblocking", sys::set_nonblocking(end.socket()?, true));
    let (bytes, mut sent) = (end.bytes(1 << 16), 0u64);
    // Buffers grow while they are emptied on the way: full is what stays full.
    let full = loop {
        match sys::send(end.socket()?, &bytes, 0) {
            Ok(n) => sent += n as u64,
            Err(errno) => match sys::poll(end.socket()?, POLLOUT, 4 * NOTHING)? {
                0 => break errno,
                _ => continue,
            },
        }
    };
    note("full", Ok(format!("{full:?}")));
    tell("some was taken, and not all that a machine has", (1..256 << 20).contains(&sent));
    // What was told while it filled.
    while epoll.wait(Duration::ZERO)? != 0 {}
    end.tell(Word::Go)?;
    note("room again", epoll.wait(PATIENCE).map(names));
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    end.hear(Word::Got)?;
    let mut count = [0; 8];
    note("nonblocking", sys::set_nonblocking(end.socket()?, false));
    note("the count", sys::recv(end.socket()?, &mut count, libc::MSG_WAITALL));
    tell("all of it", u64::from_le_bytes(count) == sent);
    Ok(())
}

/// Reads nothing until it is told to; then everything, and counts it.
fn drain(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    let (mut buf, mut count) = (vec![0; 1 << 16], 0u64);
    let last = loop {
        match sys::recv(end.socket()?, &mut buf, 0) {
            Ok(n) if n > 0 => count += n as u64,
            last => break last,
        }
    };
    note("the end", last);
    end.send_all(&count.to_le_bytes())?;
    end.tell(Word::Got)
}
