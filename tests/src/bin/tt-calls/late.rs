//! What comes late, or just in time: bytes in front of an end, of a reset, or of a close, and readers that take their time.

use anyhow::{Result, ensure};
use libc::{SO_SNDBUFFORCE, SOL_SOCKET};

use crate::{Behaviour, End, Instant, LOOK, PATIENCE, Word, ending, note, pause, sys, tell};

pub(crate) const ALL: &[Behaviour] = &[
    ("reset-behind-some", reset_behind_some, hear_when_it_is_over),
    ("reset-behind-much", reset_behind_much, hear_at_once),
    ("reset-at-once", reset_at_once, hear_when_it_is_over),
    ("answer-and-close-unread", answer_and_close_unread, ask_too_much),
    ("late-reader", close_behind_much, read_late),
];

/// More than fits anywhere in front of a reader that does not read, but a sender's own socket.
const MUCH: usize = 1_000_000;
/// A sender's own socket holds all of it.
const BUFFER: i32 = 4_000_000;
const SOME: usize = 5_000;
const ANSWER: usize = 40;
/// Longer than a forgetful host keeps a closed connection, and then some questions whether it is there.
const LATE: std::time::Duration = std::time::Duration::from_secs(3);

/// Waits until the peer's kernel has acknowledged everything.
fn acknowledged(end: &End) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while sys::ioctl(end.socket()?, sys::SIOCOUTQ)? > 0 {
        ensure!(Instant::now() < until, "it is not acknowledged");
        pause(LOOK);
    }
    Ok(())
}

fn reset_behind(end: &mut End, length: usize) -> Result<()> {
    end.send_all(&end.bytes(length))?;
    acknowledged(end)?;
    ending::reset(end)?;
    end.tell(Word::Ended)
}

/// Everything was acknowledged before the reset: all of it is there to be read, and then the reset.
fn reset_behind_some(end: &mut End) -> Result<()> {
    reset_behind(end, SOME)
}

/// The same with more than the peer's socket holds.
fn reset_behind_much(end: &mut End) -> Result<()> {
    reset_behind(end, MUCH)
}

/// The reset leaves right behind the bytes.
fn reset_at_once(end: &mut End) -> Result<()> {
    end.socket()?.set_nodelay(true)?;
    end.send_all(&end.bytes(SOME))?;
    ending::reset(end)?;
    end.tell(Word::Ended)
}

fn hear_when_it_is_over(end: &mut End) -> Result<()> {
    end.hear(Word::Ended)?;
    ending::receive(end, "heard")
}

fn hear_at_once(end: &mut End) -> Result<()> {
    ending::receive(end, "heard")?;
    end.hear(Word::Ended)
}

/// Answers before it has read what it was sent, and closes: an HTTP server that takes no such body.
fn answer_and_close_unread(end: &mut End) -> Result<()> {
    tell("queued", end.wait_queued(SOME)?);
    let got = sys::recv(end.socket()?, &mut [0], 0);
    note("read", got);
    end.send_all(&end.bytes(ANSWER))?;
    end.close();
    end.tell(Word::Ended)
}

fn ask_too_much(end: &mut End) -> Result<()> {
    end.send_all(&end.bytes(SOME))?;
    end.hear(Word::Ended)?;
    ending::receive(end, "answer")
}

/// Sends, and closes in order.
fn close_behind_much(end: &mut End) -> Result<()> {
    note("buffer", sys::set(end.socket()?, SOL_SOCKET, SO_SNDBUFFORCE, &BUFFER));
    end.send_all(&end.bytes(MUCH))?;
    end.close();
    end.tell(Word::Ended)
}

/// Reads only once the other side's kernel has forgotten the connection.
fn read_late(end: &mut End) -> Result<()> {
    end.hear(Word::Ended)?;
    pause(LATE);
    ending::receive(end, "heard")
}
