//! Ends, in every order; and resets, which are not ends.

use anyhow::Result;
use libc::{MSG_DONTWAIT, POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, SHUT_RD, SHUT_RDWR, SHUT_WR};

use crate::{Behaviour, End, NOTHING, Word, note, poll_names, sys, tell};

pub(crate) const ALL: &[Behaviour] = &[
    ("end-first", end_first, end_second),
    ("end-second", end_second, end_first),
    ("end-at-once", end_at_once, end_at_once),
    ("end-and-close", end_and_close, hear_end_and_answer),
    ("close-at-once", close_at_once, hear_all_and_close),
    ("shutdown-read", shutdown_read, shutdown_read_partner),
    ("shutdown-both", shutdown_both, send_into_the_void),
    ("shutdown-again", shutdown_again, end_when_told),
    ("closed-peer", closed_peer, close_when_told),
    ("linger-zero", linger_zero, hear_reset),
    ("linger-zero-after-end", linger_zero_after_end, hear_reset_after_end),
    ("close-unread", close_unread, send_and_hear_reset),
];

const BYTES: usize = 100_000;

/// Receives to the end, and judges.
pub(crate) fn receive(end: &End, key: &str) -> Result<()> {
    let (mut all, mut buf) = (Vec::new(), vec![0; 1 << 16]);
    let last = loop {
        match sys::recv(end.socket()?, &mut buf, 0) {
            Ok(n) if n > 0 => all.extend_from_slice(&buf[..n]),
            last => break last,
        }
    };
    tell(key, end.judge(0, &all));
    note("and then", last);
    Ok(())
}

fn shut(end: &End, how: i32) -> Result<()> {
    note("shutdown", sys::shutdown(end.socket()?, how));
    Ok(())
}

/// Sends, ends, and hears the answer.
fn end_first(end: &mut End) -> Result<()> {
    end.send_all(&end.bytes(BYTES))?;
    shut(end, SHUT_WR)?;
    note("sending behind the end", sys::send(end.socket()?, b"x", 0));
    receive(end, "answer")?;
    note("both ends", sys::poll(end.socket()?, POLLIN | POLLOUT | POLLRDHUP, NOTHING).map(poll_names));
    Ok(())
}

/// Hears everything to the end, and only then sends, and ends.
fn end_second(end: &mut End) -> Result<()> {
    receive(end, "heard")?;
    note("reading again", sys::recv(end.socket()?, &mut [0; 8], 0));
    end.send_all(&end.bytes(BYTES))?;
    shut(end, SHUT_WR)
}

/// Both send and end without having heard of the other.
fn end_at_once(end: &mut End) -> Result<()> {
    end.tell(Word::Go)?;
    end.hear(Word::Go)?;
    end.send_all(&end.bytes(1000))?;
    shut(end, SHUT_WR)?;
    receive(end, "heard")
}

/// Ends, and closes when it has heard the other end; nothing was unread.
fn end_and_close(end: &mut End) -> Result<()> {
    end.send_all(&end.bytes(BYTES))?;
    shut(end, SHUT_WR)?;
    receive(end, "answer")?;
    end.close();
    end.tell(Word::Ended)
}

fn hear_end_and_answer(end: &mut End) -> Result<()> {
    receive(end, "heard")?;
    end.send_all(&end.bytes(BYTES))?;
    shut(end, SHUT_WR)?;
    end.hear(Word::Ended)?;
    tell("error", sys::so_error(end.socket()?));
    Ok(())
}

/// close(2) without a word, right behind the data: all of it arrives, and then an end.
fn close_at_once(end: &mut End) -> Result<()> {
    end.send_all(&end.bytes(BYTES))?;
    end.close();
    end.hear(Word::Got)
}

fn hear_all_and_close(end: &mut End) -> Result<()> {
    receive(end, "heard")?;
    end.tell(Word::Got)
}

/// What comes behind shutdown(SHUT_RD) is still there to be read, and so is the end that it pretends.
fn shutdown_read(end: &mut End) -> Result<()> {
    shut(end, SHUT_RD)?;
    note("at once", sys::recv(end.socket()?, &mut [0; 8], 0));
    note("events", sys::poll(end.socket()?, POLLIN | POLLOUT | POLLRDHUP, NOTHING).map(poll_names));
    note("sending", sys::send(end.socket()?, &end.bytes(1000), 0));
    end.tell(Word::Go)?;
    end.hear(Word::Sent)?;
    tell("queued", end.wait_queued(1000)?);
    let mut buf = vec![0; 2000];
    let got = sys::recv(end.socket()?, &mut buf, MSG_DONTWAIT);
    note("what came all the same", got.map(|n| end.judge(0, &buf[..n])));
    note("behind it", sys::recv(end.socket()?, &mut buf, 0));
    shut(end, SHUT_WR)?;
    end.tell(Word::Got)
}

fn shutdown_read_partner(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    note("sent", sys::send(end.socket()?, &end.bytes(1000), 0));
    end.tell(Word::Sent)?;
    end.hear(Word::Got)?;
    receive(end, "heard")?;
    tell("error", sys::so_error(end.socket()?));
    Ok(())
}

/// shutdown(SHUT_RDWR): what comes behind it is answered with a reset.
fn shutdown_both(end: &mut End) -> Result<()> {
    shut(end, SHUT_RDWR)?;
    note("receiving", sys::recv(end.socket()?, &mut [0; 8], 0));
    note("sending", sys::send(end.socket()?, b"x", 0));
    end.tell(Word::Ended)?;
    end.hear(Word::Got)
}

/// Hears the end, sends all the same, and waits for what comes of it.
fn send_into_the_void(end: &mut End) -> Result<()> {
    end.hear(Word::Ended)?;
    receive(end, "heard")?;
    note("sending", sys::send(end.socket()?, b"x", 0));
    tell("it comes to", poll_names(end.wait_events(0)? & (POLLERR | POLLHUP)));
    tell("error", sys::so_error(end.socket()?));
    note("sending again", sys::send(end.socket()?, b"x", 0));
    end.tell(Word::Got)
}

/// What was shut down can be shut down again, until there is nothing left.
fn shutdown_again(end: &mut End) -> Result<()> {
    end.send_all(&end.bytes(1000))?;
    shut(end, SHUT_WR)?;
    shut(end, SHUT_WR)?;
    end.tell(Word::Ended)?;
    receive(end, "answer")?;
    let once_more = sys::shutdown(end.socket()?, SHUT_WR);
    // ENOTCONN once the last acknowledgement is there, whenever that is.
    tell("once more", matches!(once_more, Ok(0) | Err(nix::errno::Errno::ENOTCONN)));
    Ok(())
}

fn end_when_told(end: &mut End) -> Result<()> {
    receive(end, "heard")?;
    end.hear(Word::Ended)?;
    end.send_all(&end.bytes(BYTES))?;
    shut(end, SHUT_WR)
}

/// The other end has closed: there is an end, then bytes that it does not want, then an error.
fn closed_peer(end: &mut End) -> Result<()> {
    end.tell(Word::Go)?;
    end.hear(Word::Ended)?;
    receive(end, "heard")?;
    note("sending", sys::send(end.socket()?, b"x", 0));
    tell("it comes to", poll_names(end.wait_events(0)? & (POLLERR | POLLHUP)));
    note("sending again", sys::send(end.socket()?, b"x", 0));
    note("receiving", sys::recv(end.socket()?, &mut [0; 8], 0));
    Ok(())
}

fn close_when_told(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    end.send_all(&end.bytes(1000))?;
    end.close();
    end.tell(Word::Ended)
}

pub(crate) fn reset(end: &mut End) -> Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    note("linger", sys::set(end.socket()?, libc::SOL_SOCKET, libc::SO_LINGER, &linger));
    end.close();
    Ok(())
}

/// close(2) with SO_LINGER 0, when everything that was sent has arrived.
fn linger_zero(end: &mut End) -> Result<()> {
    end.send_all(&end.bytes(1000))?;
    end.hear(Word::Got)?;
    reset(end)?;
    end.tell(Word::Ended)
}

fn hear_reset(end: &mut End) -> Result<()> {
    let mut buf = vec![0; 1000];
    let got = sys::recv(end.socket()?, &mut buf, libc::MSG_WAITALL);
    note("heard", got.map(|n| end.judge(0, &buf[..n])));
    end.tell(Word::Got)?;
    note("the reset", sys::recv(end.socket()?, &mut buf, 0));
    note("behind it", sys::recv(end.socket()?, &mut buf, 0));
    note("sending", sys::send(end.socket()?, b"x", 0));
    end.hear(Word::Ended)
}

/// The same when the end was said before.
fn linger_zero_after_end(end: &mut End) -> Result<()> {
    end.send_all(&end.bytes(1000))?;
    shut(end, SHUT_WR)?;
    end.hear(Word::Got)?;
    reset(end)?;
    end.tell(Word::Ended)
}

fn hear_reset_after_end(end: &mut End) -> Result<()> {
    receive(end, "heard")?;
    end.tell(Word::Got)?;
    tell("it comes to", poll_names(end.wait_events(0)? & (POLLERR | POLLHUP)));
    tell("error", sys::so_error(end.socket()?));
    end.hear(Word::Ended)
}

/// close(2) with bytes that were not read.
fn close_unread(end: &mut End) -> Result<()> {
    end.tell(Word::Go)?;
    end.hear(Word::Sent)?;
    tell("queued", end.wait_queued(1000)?);
    let mut buf = vec![0; 300];
    let got = sys::recv(end.socket()?, &mut buf, 0);
    note("some of it", got.map(|n| end.judge(0, &buf[..n])));
    end.close();
    end.tell(Word::Ended)
}

fn send_and_hear_reset(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    end.send_all(&end.bytes(1000))?;
    end.tell(Word::Sent)?;
    end.hear(Word::Ended)?;
    note("the reset", sys::recv(end.socket()?, &mut [0; 8], 0));
    note("behind it", sys::recv(end.socket()?, &mut [0; 8], 0));
    Ok(())
}
