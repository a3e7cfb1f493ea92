//! Both directions at once, for a while: every byte is judged, and every error is counted.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use libc::{POLLIN, POLLOUT};
use nix::errno::Errno;

use crate::{Behaviour, End, PATIENCE, note, pause, sys, tell};

pub(crate) const ALL: &[Behaviour] = &[
    ("duplex-blocking", duplex_blocking, duplex_blocking),
    ("duplex-polling", duplex_polling, duplex_blocking),
];

/// What each end sends.
const BYTES: u64 = 6 << 20;
/// Sizes of one call.
const SIZES: std::ops::RangeInclusive<usize> = 1..=20_000;
/// How often a sender pauses, so that receivers fall asleep and are woken up: one time in so many.
const PAUSES: u32 = 40;

type Errors = BTreeMap<String, u32>;

/// Sends everything in pieces and at moments that nobody foresees.
fn send(end: &End, errors: &mut Errors, mut call: impl FnMut(&[u8]) -> sys::Answer) {
    let (mut at, mut buf) = (0, vec![0; *SIZES.end()]);
    while at < BYTES {
        let size = fastrand::usize(SIZES).min(usize::try_from(BYTES - at).unwrap_or(usize::MAX));
        end.pattern().fill(at, &mut buf[..size]);
        match call(&buf[..size]) {
            Ok(n) => at += n as u64,
            Err(errno) => {
                *errors.entry(format!("send: {errno:?}")).or_default() += 1;
                if errno != Errno::EAGAIN {
                    return;
                }
            }
        }
        if fastrand::u32(..PAUSES) == 0 {
            pause(Duration::from_micros(fastrand::u64(..2000)));
        }
    }
}

/// Receives and judges everything.
fn receive(end: &End, errors: &mut Errors, mut call: impl FnMut(&mut [u8]) -> sys::Answer) -> u64 {
    let (mut at, mut buf) = (0, vec![0; *SIZES.end()]);
    while at < BYTES {
        let size = fastrand::usize(SIZES);
        match call(&mut buf[..size]) {
            Ok(0) => break,
            Ok(n) => {
                if let Err(e) = end.peers_pattern().check(at, &buf[..n]) {
                    *errors.entry(e.to_string()).or_default() += 1;
                    break;
                }
                at += n as u64;
            }
            Err(errno) => {
                *errors.entry(format!("recv: {errno:?}")).or_default() += 1;
                if errno != Errno::EAGAIN {
                    break;
                }
            }
        }
    }
    at
}

/// One thread blocks in send(2), the other in recv(2).
fn duplex_blocking(end: &mut End) -> Result<()> {
    let end = &*end;
    let socket = end.socket()?;
    let (received, mut errors) = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut errors = Errors::new();
            send(end, &mut errors, |bytes| sys::send(socket, bytes, 0));
            errors
        });
        let mut errors = Errors::new();
        let received = receive(end, &mut errors, |buf| sys::recv(socket, buf, 0));
        errors.extend(sending.join().unwrap_or_default());
        (received, errors)
    });
    tell("received", received);
    last(end, &mut errors)
}

/// Neither thread blocks but in poll(2); that the other direction has errors of its own is seen here.
fn duplex_polling(end: &mut End) -> Result<()> {
    let end = &*end;
    let socket = end.socket()?;
    sys::set_nonblocking(socket, true)?;
    let wait = |events: i16, mut call: Box<dyn FnMut() -> sys::Answer + '_>| -> sys::Answer {
        let start = Instant::now();
        loop {
            match call() {
                Err(Errno::EAGAIN) if start.elapsed() < PATIENCE => {
                    sys::poll(socket, events, PATIENCE)?;
                }
                done => return done,
            }
        }
    };
    let (received, mut errors) = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut errors = Errors::new();
            send(end, &mut errors, |bytes| wait(POLLOUT, Box::new(|| sys::send(socket, bytes, 0))));
            errors
        });
        let mut errors = Errors::new();
        let received =
            receive(end, &mut errors, |buf| wait(POLLIN, Box::new(|| sys::recv(socket, &mut *buf, 0))));
        errors.extend(sending.join().unwrap_or_default());
        (received, errors)
    });
    sys::set_nonblocking(socket, false)?;
    tell("received", received);
    last(end, &mut errors)
}

fn last(end: &End, errors: &mut Errors) -> Result<()> {
    tell("errors", format!("{errors:?}"));
    note("shutdown", sys::shutdown(end.socket()?, libc::SHUT_WR));
    note("the end", sys::recv(end.socket()?, &mut [0; 8], 0));
    Ok(())
}
