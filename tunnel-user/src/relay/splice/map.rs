//! A worker's instance of the kernel program: its maps, the slots in them, and which flow waits for which event.
//!
//! # Invariants
//! - A slot is given away again only when the map has let go of its socket, which closing it does; nothing is ever taken
//!   out of the map (that drops what is queued in front of a socket).

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io,
    mem::offset_of,
    net::TcpStream,
    os::fd::{AsFd, OwnedFd},
    rc::{Rc, Weak},
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, Waker},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, RingBuf, SockMap},
    programs::Program,
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tunnel_common::fastpath::splice::{self as abi, BACKLOG_MAX, FLOWS_MAX, SHUT, Words};

use super::{
    mailbox::{Mailboxes, NoMailbox},
    overlap::repeats,
};
use crate::{
    kernel::{
        bpf::BpfError,
        btf::{self, OffsetsError},
        helper::{self, Loaded},
        mapped::MappedArray,
        privileges, ready,
    },
    process::drain::Tasks,
    relay::tcp::Accounts,
    transport::sockopt,
};

/// The program, as the build script made or found it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/splice.bpf.o"));

/// How many words a direction has.
const WORDS: usize = size_of::<Words>() / size_of::<u64>();
/// Events taken from the kernel at a time.
const EVENTS: usize = 64;
/// What stands for the program's ring among the events; others are numbers of slot pairs.
const RING: u64 = u64::MAX;
/// Places that are tried for a flow: one whose last sockets are not closed yet is passed over.
const TRIES: usize = 4;
/// `BPF_NOEXIST`: a place is not taken from anybody.
const NOEXIST: u64 = 1;

/// What a worker's flows are spliced with. See the module.
pub struct Splices {
    map: Rc<SpliceMap>,
    /// Flows that it can have.
    places: usize,
    /// Tells flows what the program has told; ends with this.
    _watch: Tasks,
}

/// What was done since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spliced {
    /// Flows whose sockets were joined.
    pub flows: u64,
    /// Bytes that the program sent on.
    pub bytes: u64,
    /// Times that a flow went from being copied to the program.
    pub promotions: u64,
    /// Times that the program passed bytes to the daemon because its credit was used up.
    pub credit: u64,
    /// Times that a flow went back to being copied: its messages had become large, or its receiver slow.
    pub demotions: u64,
    /// Bytes that the program mailed to the daemon.
    pub mailed: u64,
    /// Flows that were copied because no place was free.
    pub no_slot: u64,
    /// Flows that were copied because the kernel did not take their sockets.
    pub refused: u64,
    /// Sockets whose account of memory was looked at just before they were closed.
    pub accounts: u64,
    /// Of these: those whose account was wrong.
    pub accounts_wrong: u64,
}

pub(super) struct SpliceMap {
    /// What was granted at most: [`BACKLOG_MAX`], but in tests.
    pub(super) credit: u64,
    /// Wake-ups before a flow is promoted.
    pub(super) streak: u32,
    pub(super) done: Cell<Spliced>,
    pub(super) accounts: Rc<Accounts>,
    /// One read of any flow.
    pub(super) scratch: RefCell<Vec<u8>>,
    words: MappedArray<[AtomicU64; WORDS]>,
    slots: RefCell<HashMap<MapData, u64, u32>>,
    sockets: RefCell<SockMap<MapData>>,
    mailboxes: RefCell<SockMap<MapData>>,
    told: RefCell<RingBuf<MapData>>,
    events: Epoll,
    free: RefCell<VecDeque<u32>>,
    waiting: RefCell<Vec<Waiting>>,
    /// The program; detached when dropped.
    _ebpf: Loaded<Ebpf>,
}

/// Whether something has happened to a pair of slots, and who wants to know.
#[derive(Default)]
struct Waiting {
    happened: bool,
    waker: Option<Waker>,
}

impl Splices {
    /// Loads the program, for so many flows at most, because each has a pair of mailboxes. In a worker's runtime.
    pub fn load(most: usize) -> Result<Self, Unfit> {
        let mut splices = Self::with(BACKLOG_MAX, super::INTERACTIVE_STREAK)?;
        splices.places = most.clamp(1, FLOWS_MAX);
        splices.map.free.borrow_mut().truncate(splices.places);
        Ok(splices)
    }

    /// With less credit, or fewer wake-ups before a flow is promoted: to see many changes in little time.
    pub(crate) fn with(credit: u64, streak: u32) -> Result<Self, Unfit> {
        let map = Rc::new(SpliceMap::load(credit, streak)?);
        let watch = Tasks::default();
        // Without it the flows would sleep for ever: then nothing is spliced.
        let ready = map.notifier().map_err(Unfit::Unheard)?;
        watch.spawn(tell(Rc::downgrade(&map), ready));
        Ok(Self { map, places: FLOWS_MAX, _watch: watch })
    }

    /// What was done since this was last called.
    pub fn report(&self) -> Spliced {
        let (accounts, accounts_wrong) = self.map.accounts.take();
        Spliced { accounts, accounts_wrong, ..self.map.done.take() }
    }

    /// Flows that have a pair of slots.
    pub fn slots_in_use(&self) -> usize {
        self.places - self.map.free.borrow().len()
    }

    pub(super) fn map(&self) -> &Rc<SpliceMap> {
        &self.map
    }
}

/// Whether this kernel takes the program, and does right by it: tries it on a connection of our own.
pub fn probe() -> Result<(), Unfit> {
    let missing = privileges::missing_for_splice();
    if !missing.is_empty() {
        return Err(Unfit::Privileges(missing));
    }
    let map = Rc::new(SpliceMap::load(BACKLOG_MAX, 0)?);
    match repeats(&map) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Unfit::Repeats),
        Err(e) => Err(Unfit::Untried(e)),
    }
}

/// Why nothing is spliced.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// Without these capabilities the kernel would find fault with the program.
    #[error("this process lacks {}", .0.join(" and "))]
    Privileges(Vec<&'static str>),
    /// The kernel does not say where its fields are.
    #[error(transparent)]
    Offsets(#[from] OffsetsError),
    /// The program could not be loaded.
    #[error(transparent)]
    Load(#[from] BpfError),
    /// It could not be tried.
    #[error("the splice program could not be tried on a connection over loopback: {0}")]
    Untried(#[source] io::Error),
    /// What the program tells could not be waited for.
    #[error("what the splice program tells cannot be heard: {0}")]
    Unheard(#[source] io::Error),
    /// Bytes would be repeated; see `overlap.rs`.
    #[error(
        "bytes that are sent again together with new ones come twice on this kernel (tcp_read_skb), and cannot be left out"
    )]
    Repeats,
}

impl Unfit {
    /// One line.
    pub fn summary(&self) -> String {
        match self {
            Self::Load(e) => e.summary(),
            other => other.to_string(),
        }
    }

    /// Whether it was for want of a privilege.
    pub fn is_privilege(&self) -> bool {
        match self {
            Self::Privileges(_) => true,
            Self::Load(e) => e.is_privilege(),
            Self::Untried(e) => e.kind() == io::ErrorKind::PermissionDenied,
            Self::Offsets(_) | Self::Unheard(_) | Self::Repeats => false,
        }
    }
}

/// Makes the maps, loads the program and attaches it to the map of sockets, which takes privileges.
fn load_program() -> Result<(Ebpf, SockMap<MapData>), Unfit> {
    let offsets = btf::of_buffers()?;
    let mut ebpf = EbpfLoader::new()
        .override_global(abi::OFFSETS, &offsets, true)
        .load(OBJECT)
        .map_err(|e| BpfError::Load(Box::new(e)))?;
    let sockets = SockMap::try_from(take(&mut ebpf, abi::SOCKETS)?).map_err(map_error(abi::SOCKETS))?;
    let refused = |source| BpfError::Program { name: abi::PROGRAM, source: Box::new(source) };
    let Some(Program::SkSkb(program)) = ebpf.program_mut(abi::PROGRAM) else {
        return Err(BpfError::Missing(abi::PROGRAM).into());
    };
    program.load().map_err(refused)?;
    program.attach(sockets.fd()).map_err(refused)?;
    Ok((ebpf, sockets))
}

impl SpliceMap {
    pub(super) fn load(credit: u64, streak: u32) -> Result<Self, Unfit> {
        let (mut ebpf, sockets) = helper::load(load_program).map_err(Unfit::Untried)??;
        let Some(Map::Array(words)) = ebpf.take_map(abi::DIRECTIONS) else {
            return Err(BpfError::Missing(abi::DIRECTIONS).into());
        };
        let io = |name| move |source| BpfError::MapIo { name, source };
        let words = MappedArray::new(words.fd().as_fd()).map_err(io(abi::DIRECTIONS))?;
        let slots = HashMap::try_from(take(&mut ebpf, abi::SLOTS)?).map_err(map_error(abi::SLOTS))?;
        let mailboxes =
            SockMap::try_from(take(&mut ebpf, abi::MAILBOXES)?).map_err(map_error(abi::MAILBOXES))?;
        let told = RingBuf::try_from(take(&mut ebpf, abi::TOLD)?).map_err(map_error(abi::TOLD))?;
        let os = |e: nix::Error| io::Error::from(e);
        let events = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(os).map_err(io(abi::TOLD))?;
        let ring = EpollEvent::new(EpollFlags::EPOLLIN, RING);
        events.add(&told, ring).map_err(os).map_err(io(abi::TOLD))?;
        let flows = u32::try_from(FLOWS_MAX).unwrap_or(u32::MAX);
        Ok(Self {
            credit,
            streak,
            done: Cell::default(),
            accounts: Rc::default(),
            scratch: RefCell::new(vec![0; super::pair::READ_MAX]),
            words,
            slots: RefCell::new(slots),
            sockets: RefCell::new(sockets),
            mailboxes: RefCell::new(mailboxes),
            told: RefCell::new(told),
            events,
            free: RefCell::new((0..flows).collect()),
            waiting: RefCell::new((0..flows).map(|_| Waiting::default()).collect()),
            _ebpf: Loaded::new(ebpf),
        })
    }

    /// What is ready when something has happened, in the worker's runtime.
    fn notifier(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let events: OwnedFd = self.events.0.try_clone()?;
        ready::readable(events)
    }

    /// Counts.
    pub(super) fn count(&self, what: impl FnOnce(&mut Spliced)) {
        let mut done = self.done.get();
        what(&mut done);
        self.done.set(done);
    }

    /// Takes what has happened, and wakes whom it concerns. Nothing is left when it returns.
    fn take_events(&self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let n = self.events.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
            for event in &events[..n] {
                if event.data() == RING {
                    self.take_told();
                } else if let Ok(pair) = usize::try_from(event.data()) {
                    self.wake(pair);
                }
            }
            if n < EVENTS {
                return;
            }
        }
    }

    fn take_told(&self) {
        while let Some(slot) = self.told.borrow_mut().next() {
            if let Ok(slot) = <[u8; 8]>::try_from(&*slot).map(u64::from_ne_bytes) {
                self.wake(usize::try_from(slot / 2).unwrap_or(usize::MAX));
            }
        }
    }

    fn wake(&self, pair: usize) {
        if let Some(waiting) = self.waiting.borrow_mut().get_mut(pair) {
            waiting.happened = true;
            if let Some(waker) = waiting.waker.take() {
                waker.wake();
            }
        }
    }
}

/// Waits for what the program and the sockets of joined flows say.
async fn tell(map: Weak<SpliceMap>, ready: AsyncFd<OwnedFd>) {
    while let Ok(mut readable) = ready.readable().await {
        let Some(map) = map.upgrade() else { return };
        // First: what comes while it looks is another edge.
        readable.clear_ready();
        map.take_events();
    }
}

/// Why a flow has no pair of slots.
pub(super) enum NoSlotPair {
    /// None is free.
    Full,
    /// It has no mailboxes.
    Unmailed(NoMailbox),
    /// The kernel did not take its sockets. It may have taken one of them: as long as it has the slots, everything
    /// that this one receives is passed.
    Refused(String, Option<SlotPair>),
}

/// A flow's place in the maps, until it is dropped. Its sockets stay in the map until they are closed.
pub(super) struct SlotPair {
    map: Rc<SpliceMap>,
    number: u32,
    cookies: [u64; 2],
    boxes: Mailboxes,
}

impl SlotPair {
    /// Gives both sockets to the program, which passes everything to the daemon for now.
    pub(super) fn take(
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
            let slots = Self { map: Rc::clone(map), number, cookies: [own, theirs], boxes };
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
    pub(super) fn words(&self, side: usize) -> Shared<'_> {
        Shared::new(self.map.words.at(self.slots()[side & 1] as usize))
    }

    /// Whether everything of this pair is told from now on: ends, resets, and what the program passes.
    pub(super) fn watch(&self, sockets: [&TcpStream; 2]) -> io::Result<()> {
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
    pub(super) fn unwatch(&self, sockets: [&TcpStream; 2]) {
        for socket in sockets {
            // Fails where it was not watched.
            let _not_there = self.map.events.delete(socket);
        }
        for side in 0..2 {
            let _not_there = self.map.events.delete(self.boxes.of(side));
        }
    }

    /// Their mailboxes.
    pub(super) fn boxes(&self) -> &Mailboxes {
        &self.boxes
    }

    /// Why bytes of either direction are gone, if they are; wakes who asks when that becomes so.
    pub(super) fn broken(&self, cx: &Context<'_>) -> Option<u64> {
        if let Some(waiting) = self.map.waiting.borrow_mut().get_mut(self.number as usize) {
            waiting.waker = Some(cx.waker().clone());
        }
        (0..2).map(|side| self.words(side).broken.load(Ordering::Acquire)).find(|why| *why != 0)
    }

    /// Ready when something has happened since this was last ready.
    pub(super) async fn happened(&self) {
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
pub(super) struct Shared<'a> {
    pub(super) kept: &'a AtomicU64,
    pub(super) mailed: &'a AtomicU64,
    pub(super) redirected: &'a AtomicU64,
    pub(super) announced: &'a AtomicU64,
    pub(super) spent: &'a AtomicU64,
    pub(super) mail_spent: &'a AtomicU64,
    pub(super) turned: &'a AtomicU64,
    pub(super) told: &'a AtomicU64,
    pub(super) gate: &'a AtomicU64,
    pub(super) limit: &'a AtomicU64,
    pub(super) mail_limit: &'a AtomicU64,
    pub(super) due: &'a AtomicU64,
    pub(super) next: &'a AtomicU64,
    pub(super) broken: &'a AtomicU64,
}

impl<'a> Shared<'a> {
    fn new(words: &'a [AtomicU64; WORDS]) -> Self {
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
        ];
        for word in others {
            word.store(0, Ordering::Relaxed);
        }
        // Nothing waits in front of a socket that nothing was sent on to.
        self.turned.store(1, Ordering::Relaxed);
    }
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, BpfError> {
    ebpf.take_map(name).ok_or(BpfError::Missing(name))
}

fn map_error(name: &'static str) -> impl FnOnce(MapError) -> BpfError {
    move |source| BpfError::Map { name, source }
}
