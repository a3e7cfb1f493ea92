//! Ways to read.

use std::time::{Duration, Instant};

use anyhow::Result;
use libc::{MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC, MSG_WAITALL, MSG_WAITFORONE};

use crate::{Behaviour, End, PATIENCE, Word, note, pause, sys, tell};

pub(crate) const ALL: &[Behaviour] = &[
    ("waitall", waitall, waitall_partner),
    ("peek", peek, send_1000),
    ("fionread", fionread, send_1000_and_read),
    ("receive-timeout", receive_timeout, receive_timeout_partner),
    ("readv", readv, send_1000),
    ("recvmmsg", recvmmsg, send_1000),
    ("lowat", lowat, lowat_partner),
];

/// Sends 1,000 bytes when it is told to, and waits until it has been looked at.
fn send_1000(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    end.send_all(&end.bytes(1000))?;
    end.tell(Word::Sent)?;
    end.hear(Word::Got)
}

/// Has 1,000 bytes sent, and waits until they are there.
fn have_1000(end: &mut End) -> Result<()> {
    end.tell(Word::Go)?;
    end.hear(Word::Sent)?;
    tell("queued", end.wait_queued(1000)?);
    Ok(())
}

/// One call returns everything, although it comes in two pieces; and what there is, when the end comes first.
fn waitall(end: &mut End) -> Result<()> {
    end.tell(Word::Go)?;
    let mut buf = vec![0; 3000];
    let got = sys::recv(end.socket()?, &mut buf, MSG_WAITALL);
    note("all", got.map(|n| end.judge(0, &buf[..n])));
    end.tell(Word::Got)?;
    let got = sys::recv(end.socket()?, &mut buf, MSG_WAITALL);
    note("until the end", got.map(|n| end.judge(0, &buf[..n])));
    note("the end", sys::recv(end.socket()?, &mut buf, MSG_WAITALL));
    end.tell(Word::Got)
}

fn waitall_partner(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    let bytes = end.bytes(3000);
    end.send_all(&bytes[..1000])?;
    // The other end waits in its call meanwhile.
    pause(Duration::from_millis(50));
    end.send_all(&bytes[1000..])?;
    end.hear(Word::Got)?;
    end.send_all(&bytes[..500])?;
    pause(Duration::from_millis(50));
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    end.hear(Word::Got)
}

/// What was looked at is still there; what was discarded is not.
fn peek(end: &mut End) -> Result<()> {
    have_1000(end)?;
    let mut buf = vec![0; 1000];
    for key in ["peek", "peek again"] {
        let got = sys::recv(end.socket()?, &mut buf[..400], MSG_PEEK);
        note(key, got.map(|n| end.judge(0, &buf[..n])));
    }
    let got = sys::recv(end.socket()?, &mut buf[..400], 0);
    note("read", got.map(|n| end.judge(0, &buf[..n])));
    let got = sys::recv(end.socket()?, &mut buf, MSG_PEEK | MSG_DONTWAIT);
    note("peek at the rest", got.map(|n| end.judge(400, &buf[..n])));
    note("discard", sys::recv(end.socket()?, &mut buf[..100], MSG_TRUNC));
    let got = sys::recv(end.socket()?, &mut buf, 0);
    note("read the rest", got.map(|n| end.judge(500, &buf[..n])));
    note("peek at nothing", sys::recv(end.socket()?, &mut buf, MSG_PEEK | MSG_DONTWAIT));
    note("read nothing", sys::recv(end.socket()?, &mut buf, MSG_DONTWAIT));
    end.tell(Word::Got)
}

/// How much there is to read, and how much the other end has not acknowledged.
fn fionread(end: &mut End) -> Result<()> {
    note("before", sys::ioctl(end.socket()?, sys::FIONREAD));
    have_1000(end)?;
    let mut buf = vec![0; 300];
    let got = sys::recv(end.socket()?, &mut buf, 0);
    note("read", got.map(|n| end.judge(0, &buf[..n])));
    note("left", sys::ioctl(end.socket()?, sys::FIONREAD));
    let got = sys::recv(end.socket()?, &mut vec![0; 1000], 0);
    note("the rest", got);
    note("nothing left", sys::ioctl(end.socket()?, sys::FIONREAD));
    end.send_all(&end.bytes(1000))?;
    end.tell(Word::Got)?;
    end.hear(Word::Got)?;
    let (mut unacknowledged, since) = (sys::ioctl(end.socket()?, sys::SIOCOUTQ), Instant::now());
    while unacknowledged != Ok(0) && since.elapsed() < PATIENCE {
        pause(crate::LOOK);
        unacknowledged = sys::ioctl(end.socket()?, sys::SIOCOUTQ);
    }
    note("unacknowledged", unacknowledged);
    Ok(())
}

fn send_1000_and_read(end: &mut End) -> Result<()> {
    send_1000(end)?;
    let mut buf = vec![0; 1000];
    let got = sys::recv(end.socket()?, &mut buf, MSG_WAITALL);
    note("read", got.map(|n| end.judge(0, &buf[..n])));
    end.tell(Word::Got)
}

/// Nothing, or less than was asked for, comes within a timeout.
fn receive_timeout(end: &mut End) -> Result<()> {
    const LIMIT: Duration = Duration::from_millis(200);
    note("set", sys::set_timeout(end.socket()?, libc::SO_RCVTIMEO, LIMIT));
    let (mut buf, start) = (vec![0; 1000], Instant::now());
    note("nothing", sys::recv(end.socket()?, &mut buf, 0));
    // The kernel's clock for timeouts ticks every 1 to 10 ms.
    tell("not before its time", start.elapsed() + Duration::from_millis(10) >= LIMIT);
    end.tell(Word::Go)?;
    end.hear(Word::Sent)?;
    tell("queued", end.wait_queued(300)?);
    let got = sys::recv(end.socket()?, &mut buf, MSG_WAITALL);
    note("less", got.map(|n| end.judge(0, &buf[..n])));
    note("nothing again", sys::recv(end.socket()?, &mut buf, 0));
    end.tell(Word::Got)
}

fn receive_timeout_partner(end: &mut End) -> Result<()> {
    end.hear(Word::Go)?;
    end.send_all(&end.bytes(300))?;
    end.tell(Word::Sent)?;
    end.hear(Word::Got)
}

/// Into several buffers at a time.
fn readv(end: &mut End) -> Result<()> {
    have_1000(end)?;
    let (mut a, mut b, mut c) = (vec![0; 10], vec![0; 500], vec![0; 1000]);
    let got = sys::readv(end.socket()?, &mut [&mut a, &mut [], &mut b, &mut c]);
    let all = [a, b, c].concat();
    note("read", got.map(|n| end.judge(0, &all[..n])));
    end.tell(Word::Got)
}

/// Into several messages at a time, which a byte stream has no bounds for.
fn recvmmsg(end: &mut End) -> Result<()> {
    have_1000(end)?;
    let mut bufs = vec![vec![0; 300]; 5];
    let got = sys::recvmmsg(end.socket()?, &mut bufs, MSG_WAITFORONE);
    match got {
        Ok(lengths) => {
            let pieces = bufs.iter().zip(&lengths).map(|(buf, n)| buf[..*n].to_vec());
            tell("bytes", end.judge(0, &pieces.collect::<Vec<_>>().concat()));
            tell("lengths", format!("{lengths:?}"));
        }
        Err(errno) => note::<usize>("recvmmsg", Err(errno)),
    }
    end.tell(Word::Got)
}

/// Below SO_RCVLOWAT there is nothing to be read.
fn lowat(end: &mut End) -> Result<()> {
    note("set", sys::set(end.socket()?, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &1000i32));
    end.tell(Word::Go)?;
    end.hear(Word::Sent)?;
    tell("queued", end.wait_queued(500)?);
    let events = sys::poll(end.socket()?, libc::POLLIN, crate::NOTHING);
    note("half of it", events.map(crate::poll_names));
    end.tell(Word::Got)?;
    let events = end.wait_events(libc::POLLIN)?;
    tell("all of it", crate::poll_names(events));
    tell("queued", end.wait_queued(1000)?);
    end.tell(Word::Got)
}

fn lowat_partner(end: &mut End) -> Result<()> {
    let bytes = end.bytes(1000);
    end.hear(Word::Go)?;
    end.send_all(&bytes[..500])?;
    end.tell(Word::Sent)?;
    end.hear(Word::Got)?;
    end.send_all(&bytes[500..])?;
    end.hear(Word::Got)
}
