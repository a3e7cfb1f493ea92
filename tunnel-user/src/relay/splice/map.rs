//! A worker's instance of the kernel program: its maps, the slots in them, and which flow waits for which event.
//!
//! # Invariants
//! - A slot is given away again only when the map has let go of its socket, which closing it does; nothing is ever taken
//!   out of the map (that drops what is queued in front of a socket).

mod slots;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    rc::{Rc, Weak},
    sync::atomic::{AtomicU64, Ordering},
    task::Waker,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, RingBuf, SockMap},
    programs::Program,
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tunnel_common::fastpath::splice::{self as abi, BACKLOG_MAX, FLOWS_MAX, MAIL_MAX};

pub(super) use self::slots::{NoSlotPair, SlotPair};
use self::slots::{Shared, WORDS};
use super::overlap::repeats;
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
};

/// The program, as the build script made or found it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/splice.bpf.o"));

/// Events taken from the kernel at a time.
const EVENTS: usize = 64;
/// What stands for the program's ring among the events; others are numbers of slot pairs.
const RING: u64 = u64::MAX;
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
    /// Flows that went back to being copied for good, because a mailbox was full.
    pub forced: u64,
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
    /// What mail may cost: [`MAIL_MAX`], but in tests.
    pub(super) mail: u64,
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
        let mut splices = Self::with(BACKLOG_MAX, super::INTERACTIVE_STREAK, MAIL_MAX)?;
        splices.places = most.clamp(1, FLOWS_MAX);
        splices.map.free.borrow_mut().truncate(splices.places);
        Ok(splices)
    }

    /// With less credit, fewer wake-ups before a flow is promoted, or less room for mail: to see many changes in little time.
    pub(crate) fn with(credit: u64, streak: u32, mail: u64) -> Result<Self, Unfit> {
        let map = Rc::new(SpliceMap::load(credit, streak, mail)?);
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
    let map = Rc::new(SpliceMap::load(BACKLOG_MAX, 0, MAIL_MAX)?);
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
    pub(super) fn load(credit: u64, streak: u32, mail: u64) -> Result<Self, Unfit> {
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
            mail,
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

    fn words_of(&self, number: u32, side: usize) -> Shared<'_> {
        Shared::new(self.words.at(2 * number as usize + (side & 1)))
    }

    fn uncounted(&self, number: u32, side: usize, counted: &[Cell<u64>; 2]) -> u64 {
        let redirected = self.words_of(number, side).redirected.load(Ordering::Acquire);
        let new = redirected - counted[side & 1].replace(redirected);
        self.count(|done| done.bytes += new);
        new
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

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, BpfError> {
    ebpf.take_map(name).ok_or(BpfError::Missing(name))
}

fn map_error(name: &'static str) -> impl FnOnce(MapError) -> BpfError {
    move |source| BpfError::Map { name, source }
}
