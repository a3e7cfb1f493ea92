//! A flow's place in the maps of a worker's program, and the words that program and daemon share there.
//!
//! # Invariants
//! - A place is given away again only when the map has let go of its sockets, which closing them does.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    mem::offset_of,
    net::TcpStream,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
};

use aya::maps::MapError;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use tunnel_common::fastpath::splice::{SHUT, Words};

use super::{
    super::mailbox::{Mailboxes, NoMailbox},
    SpliceMap, Waiting,
};
use crate::transport::sockopt;

/// How many words a direction has.
pub(super) const WORDS: usize = size_of::<Words>() / size_of::<u64>();
/// Places that are tried for a flow: one whose last sockets are not closed yet is passed over.
const TRIES: usize = 4;
/// `BPF_NOEXIST`: a place is not taken from anybody.
const NOEXIST: u64 = 1;

/// Why a flow has no pair of slots.
pub(in crate::relay::splice) enum NoSlotPair {
    /// None is free.
    Full,
    /// It has no mailboxes.
    Unmailed(NoMailbox),
    /// The kernel did not take its sockets. It may have taken one of them: as long as it has the slots, everything
    /// that this one receives is passed.
    Refused(String, Option<SlotPair>),
}

/// A flow's place in the maps, until it is dropped. Its sockets stay in the map until they are closed.
pub(in crate::relay::splice) struct SlotPair {
    map: Rc<SpliceMap>,
    number: u32,
    cookies: [u64; 2],
    boxes: Mailboxes,
    /// Bytes of each direction that the program has sent on and that are counted.
    counted: Rc<[Cell<u64>; 2]>,
}

impl SlotPair {
    /// Gives both sockets to the program, which passes everything to the daemon for now.
    pub(in crate::relay::splice) fn take(
        map: &Rc<SpliceMap>,
        client: &TcpStream,
        target: &TcpStream,
    ) -> Result<Self, NoSlotPair> {
        let cookies = [client, target].map(sockopt::cookie);
        let [Ok(own), Ok(theirs)] = cookies else {
            return Err(NoSlotPair::Refused("SO_COOKIE".to_owned(), None));
        };
        for _ in 0..TRIES {
            let Some(number) = map.free.borrow_mut().pop_front() else { break };
            let boxes = match Mailboxes::new(&mut map.mailboxes.borrow_mut(), [2 * number, 2 * number + 1]) {
                Ok(boxes) => boxes,
                Err(e) => {
                    map.free.borrow_mut().push_back(number);
                    return Err(NoSlotPair::Unmailed(e));
                }
            };
            let (map, cookies) = (Rc::clone(map), [own, theirs]);
            let slots = Self { map, number, cookies, boxes, counted: Rc::default() };
            for side in 0..2 {
                slots.words(side).reset();
            }
            match slots.insert([client, target]) {
                // Those who had it are not closed yet.
                Err((0, MapError::SyscallError(e))) if e.io_error.raw_os_error() == Some(libc::EEXIST) => {}
                Err((_, e)) => return Err(NoSlotPair::Refused(e.to_string(), Some(slots))),
                Ok(()) => return Ok(slots),
            }
        }
        Err(NoSlotPair::Full)
    }

    /// The error says how many sockets the program has got before it.
    fn insert(&self, sockets: [&TcpStream; 2]) -> Result<(), (usize, MapError)> {
        let mut slots = self.map.slots.borrow_mut();
        for (slot, cookie) in self.slots().into_iter().zip(self.cookies) {
            slots.insert(cookie, slot, 0).map_err(|e| (0, e))?;
        }
        let mut map = self.map.sockets.borrow_mut();
        for (given, (slot, socket)) in self.slots().into_iter().zip(sockets).enumerate() {
            map.set(slot, socket, NOEXIST).map_err(|e| (given, e))?;
        }
        Ok(())
    }

    fn slots(&self) -> [u32; 2] {
        [2 * self.number, 2 * self.number + 1]
    }

    /// The words of the direction that begins at one side: 0 is the client's.
    pub(in crate::relay::splice) fn words(&self, side: usize) -> Shared<'_> {
        self.map.words_of(self.number, side)
    }

    /// Bytes that the program has sent on in one direction since this was last asked.
    pub(in crate::relay::splice) fn uncounted(&self, side: usize) -> u64 {
        self.map.uncounted(self.number, side, &self.counted)
    }

    /// The same of both directions, for whoever asks while the flow's task sleeps.
    pub(in crate::relay::splice) fn uncounted_by_others(&self) -> Box<dyn Fn() -> [u64; 2]> {
        let (map, number, counted) = (Rc::clone(&self.map), self.number, Rc::clone(&self.counted));
        Box::new(move || [0, 1].map(|side| map.uncounted(number, side, &counted)))
    }

    /// Whether everything of this pair is told from now on: ends, resets, and what the program passes.
    pub(in crate::relay::splice) fn watch(&self, sockets: [&TcpStream; 2]) -> io::Result<()> {
        // Not what arrives: since Linux 6.4 the kernel says that of bytes too which the program has sent on.
        let ends = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        for socket in sockets {
            self.map.events.add(socket, EpollEvent::new(ends, u64::from(self.number)))?;
        }
        let mail = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        for side in 0..2 {
            self.map.events.add(self.boxes.of(side), EpollEvent::new(mail, u64::from(self.number)))?;
        }
        Ok(())
    }

    /// No longer.
    pub(in crate::relay::splice) fn unwatch(&self, sockets: [&TcpStream; 2]) {
        for socket in sockets {
            // Fails where it was not watched.
            let _not_there = self.map.events.delete(socket);
        }
        for side in 0..2 {
            let _not_there = self.map.events.delete(self.boxes.of(side));
        }
    }

    /// Their mailboxes.
    pub(in crate::relay::splice) fn boxes(&self) -> &Mailboxes {
        &self.boxes
    }

    /// Whether bytes of either direction were passed because a mailbox was full. Then the list in front of a socket is not
    /// known to be empty any more, and the flow is copied to its end.
    pub(in crate::relay::splice) fn was_forced(&self) -> bool {
        (0..2).any(|side| self.words(side).forced.load(Ordering::SeqCst) != 0)
    }

    /// Why bytes of either direction are gone, if they are; wakes who asks when that becomes so.
    pub(in crate::relay::splice) fn broken(&self, cx: &Context<'_>) -> Option<u64> {
        if let Some(waiting) = self.map.waiting.borrow_mut().get_mut(self.number as usize) {
            waiting.waker = Some(cx.waker().clone());
        }
        (0..2).map(|side| self.words(side).broken.load(Ordering::Acquire)).find(|why| *why != 0)
    }

    /// Ready when something has happened since this was last ready.
    pub(in crate::relay::splice) async fn happened(&self) {
        poll_fn(|cx| {
            let mut waiting = self.map.waiting.borrow_mut();
            let Some(waiting) = waiting.get_mut(self.number as usize) else { return Poll::Ready(()) };
            if std::mem::take(&mut waiting.happened) {
                return Poll::Ready(());
            }
            waiting.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl Drop for SlotPair {
    fn drop(&mut self) {
        for side in 0..2 {
            self.words(side).gate.store(SHUT, Ordering::Release);
        }
        let mut slots = self.map.slots.borrow_mut();
        for cookie in self.cookies {
            // What arrives from here on is dropped: the flow is over.
            let _not_there = slots.remove(&cookie);
        }
        if let Some(waiting) = self.map.waiting.borrow_mut().get_mut(self.number as usize) {
            *waiting = Waiting::default();
        }
        // To the end: the sockets are not closed yet.
        self.map.free.borrow_mut().push_back(self.number);
    }
}

/// The words of one direction, as the daemon sees them.
pub(in crate::relay::splice) struct Shared<'a> {
    pub(in crate::relay::splice) kept: &'a AtomicU64,
    pub(in crate::relay::splice) mailed: &'a AtomicU64,
    pub(in crate::relay::splice) redirected: &'a AtomicU64,
    pub(in crate::relay::splice) announced: &'a AtomicU64,
    pub(in crate::relay::splice) spent: &'a AtomicU64,
    pub(in crate::relay::splice) mail_spent: &'a AtomicU64,
    pub(in crate::relay::splice) turned: &'a AtomicU64,
    pub(in crate::relay::splice) told: &'a AtomicU64,
    pub(in crate::relay::splice) gate: &'a AtomicU64,
    pub(in crate::relay::splice) limit: &'a AtomicU64,
    pub(in crate::relay::splice) mail_limit: &'a AtomicU64,
    pub(in crate::relay::splice) due: &'a AtomicU64,
    pub(in crate::relay::splice) next: &'a AtomicU64,
    pub(in crate::relay::splice) broken: &'a AtomicU64,
    pub(in crate::relay::splice) forced: &'a AtomicU64,
}

impl<'a> Shared<'a> {
    pub(super) fn new(words: &'a [AtomicU64; WORDS]) -> Self {
        macro_rules! word {
            ($name:ident) => {
                &words[offset_of!(Words, $name) / size_of::<u64>()]
            };
        }
        Self {
            kept: word!(kept),
            mailed: word!(mailed),
            redirected: word!(redirected),
            announced: word!(announced),
            spent: word!(spent),
            mail_spent: word!(mail_spent),
            turned: word!(turned),
            told: word!(told),
            gate: word!(gate),
            limit: word!(limit),
            mail_limit: word!(mail_limit),
            due: word!(due),
            next: word!(next),
            broken: word!(broken),
            forced: word!(forced),
        }
    }

    /// For a new flow: no program runs on this direction.
    fn reset(&self) {
        self.gate.store(SHUT, Ordering::Relaxed);
        let others = [
            self.kept,
            self.mailed,
            self.redirected,
            self.announced,
            self.spent,
            self.mail_spent,
            self.told,
            self.limit,
            self.mail_limit,
            self.due,
            self.next,
            self.broken,
            self.forced,
        ];
        for word in others {
            word.store(0, Ordering::Relaxed);
        }
        // Nothing waits in front of a socket that nothing was sent on to.
        self.turned.store(1, Ordering::Relaxed);
    }
}
