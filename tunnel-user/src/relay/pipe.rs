//! One direction between two sockets of ours, through a pipe: splice(2), which moves references to pages. A direction that can
//! have no pipe copies.
//!
//! # Invariants
//! - A pipe is filled only when it is empty, so EAGAIN has one meaning on each side: nothing to read, or no room to write.
//! - An idle direction holds no pipe.

use std::{
    cell::{Cell, RefCell},
    io, mem,
    os::fd::{AsFd, OwnedFd},
    task::{Context, Poll, ready},
};

use nix::unistd::{SysconfVar, sysconf};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;

use super::{
    Broken, Direction, Leg as _, Queue, TcpLeg,
    ends::{State, Way, discard, finish, theirs},
    tcp::reset,
};
use crate::transport::sockopt::at_mark;

/// What one direction of a flow holds at most: four times a pipe's usual size, because a segment takes a
/// place of its own, of which there is one per page. Over loopback a GB costs 0.15 s of CPU with 64 KiB, 0.14
/// with 256 and 0.12 with 1 MiB, where copying costs 0.31.
pub const PIPE_CAPACITY: usize = 256 * 1024;
/// Pipes of one worker, those in use and those kept; whoever finds none copies. In use are those of directions
/// whose receiver is slower than their sender.
pub const PIPES_MAX: usize = 256;
/// Empty pipes kept for the next who has something to move. Within one turn of a worker's loop, only those in
/// the middle of a step hold one, and those whose receiver has no room.
const SPARE_MAX: usize = 16;
/// Steps that one direction takes before the task lets the worker's others have a turn: 1 MiB, as when it
/// copies.
const STEPS: u32 = 4;

/// The pipes of one worker.
#[derive(Debug)]
pub struct Pipes {
    most: usize,
    open: Cell<usize>,
    spare: RefCell<Vec<Pipe>>,
    /// Not reported yet.
    moved: Cell<u64>,
    missed: Cell<u64>,
}

/// What was done since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piped {
    /// Bytes moved through pipes.
    pub moved: u64,
    /// Directions that copied because there was no pipe for them.
    pub missed: u64,
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    /// It holds as many pieces, of one byte at least.
    places: usize,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // A user's pipes beyond fs.pipe-user-pages-soft keep the size that they have, which does as well.
        let _as_it_is = fcntl_setpipe_size(&write, PIPE_CAPACITY);
        let capacity = fcntl_getpipe_size(&write)?;
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|n| usize::try_from(n).ok()).unwrap_or(capacity);
        Ok(Self { read, write, capacity: capacity.min(PIPE_CAPACITY), places: capacity / page.max(1) })
    }
}

impl Pipes {
    /// As many as `most`, and no more than [`PIPES_MAX`]; none is open yet.
    pub fn new(most: usize) -> Self {
        Self {
            most: most.min(PIPES_MAX),
            open: Cell::default(),
            spare: RefCell::default(),
            moved: Cell::default(),
            missed: Cell::default(),
        }
    }

    /// Pipes that are open.
    pub fn open(&self) -> usize {
        self.open.get()
    }

    /// Of those: with something in them, or about to be filled.
    pub fn in_use(&self) -> usize {
        self.open.get() - self.spare.borrow().len()
    }

    /// What was done since this was last called.
    pub fn report(&self) -> Piped {
        Piped { moved: self.moved.take(), missed: self.missed.take() }
    }

    /// An empty pipe; `None` at the limit of pipes, or of descriptors.
    fn take(&self) -> Option<Held<'_>> {
        let held = |pipe| Some(Held { pipes: self, pipe: Some(pipe), bytes: 0 });
        // Apart: the borrow must end before anything is dropped.
        let spare = self.spare.borrow_mut().pop();
        if let Some(pipe) = spare {
            return held(pipe);
        }
        if self.open.get() < self.most {
            match Pipe::new() {
                Ok(pipe) => {
                    self.open.set(self.open.get() + 1);
                    return held(pipe);
                }
                Err(e) => tracing::debug!("no pipe: {e}"),
            }
        }
        self.missed.set(self.missed.get() + 1);
        None
    }
}

/// A pipe in use. Dropped empty it is kept for the next; with bytes in it, it is closed.
struct Held<'p> {
    pipes: &'p Pipes,
    /// Only `drop` takes it.
    pipe: Option<Pipe>,
    bytes: usize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut spare = self.pipes.spare.borrow_mut();
        match self.pipe.take() {
            Some(pipe) if self.bytes == 0 && spare.len() < SPARE_MAX => spare.push(pipe),
            _ => self.pipes.open.set(self.pipes.open.get() - 1),
        }
    }
}

/// One direction of a flow.
pub(super) struct Through<'p> {
    pipes: &'p Pipes,
    /// What was read before; it goes first.
    early: Queue,
    /// Bytes at its front that did not come from the source.
    ours: usize,
    held: Option<Held<'p>>,
    state: State,
    /// The last write took less than there was: the kernel may have met an error, which it does not tell again
    /// (`splice_to_socket`, fs/splice.c).
    short: bool,
    /// Bytes were dropped because the sink took no more.
    lost: bool,
    /// In the place of all that, once there was no pipe.
    copy: Option<Direction<Box<Queue>>>,
}

enum Filled {
    Bytes,
    End,
    /// Or none that would do.
    NoPipe,
}

impl<'p> Through<'p> {
    /// With what was read before, and how that ended if it did.
    pub(super) fn new(pipes: &'p Pipes, early: Queue, ours: usize, broken: Option<Broken>) -> Self {
        let state = broken.map_or(State::Open, State::Failing);
        Self { pipes, early, ours, held: None, state, short: false, lost: false, copy: None }
    }

    /// Sends what was read before; ready when nothing of it is left.
    fn poll_early(
        &mut self,
        cx: &mut Context<'_>,
        dst: &mut TcpLeg,
        moved: &Cell<u64>,
    ) -> Poll<Result<(), Broken>> {
        while !self.early.is_empty() {
            let n = theirs(&mut self.ours, ready!(dst.poll_send(cx, &mut self.early))?);
            moved.set(moved.get() + n as u64);
        }
        Poll::Ready(Ok(()))
    }

    /// Takes a pipe and fills it, when there is something to fill it with.
    fn poll_fill(&mut self, cx: &mut Context<'_>, src: &TcpLeg) -> Poll<Result<Filled, Broken>> {
        loop {
            ready!(src.stream().poll_read_ready(cx)).map_err(reset)?;
            let Some(mut held) = self.pipes.take() else { return Poll::Ready(Ok(Filled::NoPipe)) };
            let Some(Pipe { write, capacity, places, .. }) = &held.pipe else { continue };
            let fill = || shift(src.stream(), write, *capacity);
            let read = match src.stream().try_io(Interest::READABLE, fill) {
                // splice(2) never gets beyond urgent data, be they inline or not (tcp_read_sock, net/ipv4/tcp.c).
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && src.has_unread() => match fill() {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        return Poll::Ready(Ok(Filled::NoPipe));
                    }
                    // They came in between.
                    read => read,
                },
                read => read,
            };
            match read {
                Ok(0) => return Poll::Ready(Ok(Filled::End)),
                Ok(n) => {
                    // Fewer bytes than places: not the pipe was full, but the socket is empty, or something urgent is next.
                    if n < *places && !at_mark(src.stream()) {
                        src.not_ready(Interest::READABLE);
                    }
                    held.bytes = n;
                    self.held = Some(held);
                    return Poll::Ready(Ok(Filled::Bytes));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Poll::Ready(Err(reset(e))),
            }
        }
    }

    /// Empties the pipe as far as there is room; ready when it is empty, and given back.
    fn poll_empty(
        &mut self,
        cx: &mut Context<'_>,
        dst: &mut TcpLeg,
        moved: &Cell<u64>,
    ) -> Poll<Result<(), Broken>> {
        while let Some(held) = &mut self.held
            && let Some(pipe) = &held.pipe
        {
            ready!(dst.stream().poll_write_ready(cx)).map_err(reset)?;
            let left = held.bytes;
            match dst.stream().try_io(Interest::WRITABLE, || shift(&pipe.read, dst.stream(), left)) {
                // Less than there is does not always mean that the socket is full: the next call will say.
                Ok(n) if n > 0 => {
                    self.short = n < left;
                    held.bytes -= n;
                    moved.set(moved.get() + n as u64);
                    self.pipes.moved.set(self.pipes.moved.get() + n as u64);
                    if held.bytes == 0 {
                        self.held = None;
                    }
                }
                Ok(_) => return Poll::Ready(Err(reset(io::ErrorKind::WriteZero.into()))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.short = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // What is left once the error was told: that the socket takes nothing.
                    let told = self.short && e.raw_os_error() == Some(libc::EPIPE);
                    let e = if told { io::Error::from_raw_os_error(libc::ECONNRESET) } else { e };
                    dst.note(&e);
                    return Poll::Ready(Err(reset(e)));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Through<'_> {
    /// The sink takes no more: what waits for it is dropped.
    fn stop(&mut self, why: Option<Broken>) {
        self.lost |= self.held.is_some() || !self.early.is_empty();
        (self.held, self.early) = (None, Queue::default());
        self.state.refuse(why);
    }
}

/// Moves at most `most` bytes, without waiting. (Where a write would raise SIGPIPE, this does too; the standard
/// library has it ignored.)
fn shift(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    splice(from, None, to, None, most, SpliceFlags::NONBLOCK | SpliceFlags::MOVE).map_err(io::Error::from)
}

impl Way<TcpLeg, TcpLeg> for Through<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, src: &mut TcpLeg, dst: &mut TcpLeg, moved: &Cell<u64>) {
        if let Some(copy) = &mut self.copy {
            return copy.poll(cx, src, dst, moved);
        }
        for _ in 0..STEPS {
            match &mut self.state {
                State::Done => return,
                State::Refused { source, .. } => {
                    self.lost |= discard(cx, src, source);
                    return;
                }
                State::Open | State::Draining | State::Failing(_) => {}
            }
            let sent = match self.poll_early(cx, dst, moved) {
                Poll::Ready(Ok(())) => self.poll_empty(cx, dst, moved),
                not => not,
            };
            match sent {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(why)) => {
                    self.stop(Some(why));
                    continue;
                }
                Poll::Pending => return,
            }
            match self.state {
                State::Open => match self.poll_fill(cx, src) {
                    Poll::Ready(Ok(Filled::Bytes)) => {}
                    Poll::Ready(Ok(Filled::End)) => match src.ended() {
                        Ok(_) => self.state = State::Draining,
                        Err(why) => self.state = State::Failing(why),
                    },
                    Poll::Ready(Ok(Filled::NoPipe)) => {
                        let copy = Direction::new(Box::default(), 0, State::Open);
                        return self.copy.insert(copy).poll(cx, src, dst, moved);
                    }
                    Poll::Ready(Err(why)) => self.state = State::Failing(why),
                    Poll::Pending => return,
                },
                State::Draining => {
                    if let Some(ended) = finish(cx, dst) {
                        self.state = ended;
                    }
                    return;
                }
                State::Failing(_) | State::Done | State::Refused { .. } => return,
            }
        }
        cx.waker().wake_by_ref();
    }

    fn state(&self) -> &State {
        self.copy.as_ref().map_or(&self.state, |copy| &copy.state)
    }

    fn take_state(&mut self) -> State {
        let state = self.copy.as_mut().map_or(&mut self.state, |copy| &mut copy.state);
        mem::replace(state, State::Done)
    }

    fn is_empty(&self) -> bool {
        match &self.copy {
            Some(copy) => copy.queue.is_empty(),
            None => self.held.is_none() && self.early.is_empty(),
        }
    }

    fn has_lost(&self) -> bool {
        self.lost || self.copy.as_ref().is_some_and(|copy| copy.lost)
    }

    fn refuse(&mut self, why: Option<Broken>) {
        match &mut self.copy {
            Some(copy) => copy.stop(why),
            None => self.stop(why),
        }
    }
}
