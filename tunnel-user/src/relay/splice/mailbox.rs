//! Where bytes of a spliced flow wait that may not be passed to its own socket: both ends of a pair of Unix sockets, one
//! for what each side of the flow receives.
//!
//! # Invariants
//! - Nothing is ever written to either end: what can be read came from the program, in its order.
//! - A pair is one flow's, and goes with it: what it was not read is never another flow's.

use std::{
    io::{self, Read as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
};

use aya::maps::{MapData, MapError, SockMap};
use tunnel_common::fastpath::splice::MAIL_MAX;

use crate::kernel::helper;

/// The mailboxes of one flow.
pub(super) struct Mailboxes([UnixStream; 2]);

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoMailbox {
    #[error("a pair of Unix sockets: {0}")]
    Pair(#[from] io::Error),
    #[error("a mailbox of a flow: {0}")]
    Map(#[from] MapError),
}

impl Mailboxes {
    /// New ones, in these slots.
    pub(super) fn new(map: &mut SockMap<MapData>, slots: [u32; 2]) -> Result<Self, NoMailbox> {
        let (one, other) = UnixStream::pair()?;
        let both = [one, other];
        for (slot, end) in slots.into_iter().zip(&both) {
            end.set_nonblocking(true)?;
            // Beyond it the kernel's worker makes mail readable by the clock only.
            let room = usize::try_from(MAIL_MAX).unwrap_or(usize::MAX);
            helper::force_buffers(end.as_fd(), room, None)?;
            map.set(slot, end, 0)?;
        }
        Ok(Self(both))
    }

    /// The mailbox of one side's socket.
    pub(super) fn of(&self, side: usize) -> &UnixStream {
        &self.0[side & 1]
    }

    /// Reads what the program has mailed.
    pub(super) fn read(&self, side: usize, buf: &mut [u8]) -> io::Result<usize> {
        let mut mailbox = self.of(side);
        match mailbox.read(buf) {
            Ok(0) => Err(io::ErrorKind::BrokenPipe.into()),
            read => read,
        }
    }
}
