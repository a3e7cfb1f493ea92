//! The flows that a worker carries at this moment: what is known of each, how much it has moved, and a handle to end it.
//!
//! The access log, metrics, `--stats` and whatever ends flows (the drain timeout, a policy that has changed, an operator) are
//! its observers.
//!
//! # Invariants
//! - A registry is its worker's own, and is used on its thread only: nothing takes a lock, and no counter crosses a core.
//!   Other threads get copies, [`Snapshot`]s.
//! - A flow is in it from when its target has been reached until its end is recorded.
//! - Once [`Registry::end_all`] has been called, a flow that is opened ends at once.

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::{Future, poll_fn},
    ops::Deref,
    rc::Rc,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use serde::{Serialize, Serializer};

use super::{marks::Micros, stats::Record};
use crate::model::{admission::Admission, end::EndReason};

/// Which flow it is, as no other one while the process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId {
    worker: u16,
    number: u64,
}

impl FlowId {
    pub(super) fn worker(self) -> u16 {
        self.worker
    }

    pub(super) fn number(self) -> u64 {
        self.number
    }
}

impl fmt::Display for FlowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.worker, self.number)
    }
}

impl FromStr for FlowId {
    type Err = NoFlowId;

    fn from_str(text: &str) -> Result<Self, NoFlowId> {
        let (worker, number) = text.split_once('-').ok_or(NoFlowId)?;
        let parsed = (worker.parse().map_err(|_| NoFlowId)?, number.parse().map_err(|_| NoFlowId)?);
        Ok(Self { worker: parsed.0, number: parsed.1 })
    }
}

/// A text that no flow is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not the id of a flow, which is two numbers such as 0-1234")]
pub struct NoFlowId;

impl Serialize for FlowId {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// By what a flow's bytes are moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CurrentPath {
    /// Through this process.
    #[default]
    Copy,
    /// Through pipes.
    Pipe,
    /// By the kernel program that joins two sockets of ours.
    Splice,
    /// Between the application and us past TCP.
    Bypass,
}

impl CurrentPath {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Copy, Self::Pipe, Self::Splice, Self::Bypass];

    /// The word by which programs know it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Pipe => "pipe",
            Self::Splice => "splice",
            Self::Bypass => "bypass",
        }
    }
}

/// What a flow has moved, readable while it runs. Of one that is spliced the kernel's part is added when the program needs
/// this process, and by [`Meter::catch_up`], which whoever reads it through [`Registry`] has done.
#[derive(Clone, Debug)]
pub struct Meter {
    /// When the flow was accepted.
    pub started: Instant,
    /// Bytes from the client to the target.
    pub sent: Cell<u64>,
    /// Bytes from the target to the client.
    pub received: Cell<u64>,
    /// By what they are moved now.
    pub path: Cell<CurrentPath>,
    /// How long after its start the first byte from the target was passed on.
    pub first_byte: Cell<Option<Micros>>,
    /// What had moved when that was last asked, and at what age of the flow, in seconds, it first was as much.
    quiet: Cell<(u64, u32)>,
    /// What else is moved, by the kernel.
    kernel: Kernel,
}

/// Says how many bytes the kernel has moved since it last said so: from the client, and from the target.
type Uncounted = Box<dyn Fn() -> [u64; 2]>;

/// While a kernel program moves a flow's bytes. A copy of a meter has none, so that nothing is counted twice.
#[derive(Default)]
struct Kernel(Cell<Option<Box<Uncounted>>>);

impl Clone for Kernel {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").finish_non_exhaustive()
    }
}

impl Default for Meter {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Meter {
    /// That of a flow which was accepted then.
    pub fn new(started: Instant) -> Self {
        let (sent, received) = (Cell::default(), Cell::default());
        Self {
            started,
            sent,
            received,
            path: Cell::default(),
            first_byte: Cell::default(),
            quiet: Cell::default(),
            kernel: Kernel::default(),
        }
    }

    /// From now on, and until the guard is dropped, the kernel moves bytes too.
    pub fn count_kernel(&self, uncounted: Uncounted) -> CountedKernel<'_> {
        // Boxed twice: most flows have none, and a pointer's room for it.
        self.kernel.0.set(Some(Box::new(uncounted)));
        CountedKernel(self)
    }

    /// Adds what the kernel has moved.
    pub fn catch_up(&self) {
        let Some(uncounted) = self.kernel.0.take() else { return };
        let [sent, received] = uncounted();
        self.kernel.0.set(Some(uncounted));
        self.sent.set(self.sent.get() + sent);
        self.received.set(self.received.get() + received);
    }

    /// To be told after bytes may have been passed on.
    pub fn note(&self) {
        if self.first_byte.get().is_none() && self.received.get() > 0 {
            self.first_byte.set(Some(self.started.elapsed().into()));
        }
    }

    /// Whether nothing has moved for so long on a flow of this age, as far as is known to who asks every second.
    pub fn is_idle(&self, age: Duration, idle: Duration) -> bool {
        self.catch_up();
        let moved = self.sent.get() + self.received.get();
        let (before, since) = self.quiet.get();
        if before == moved {
            return age.saturating_sub(Duration::from_secs(since.into())) >= idle;
        }
        self.quiet.set((moved, u32::try_from(age.as_secs()).unwrap_or(u32::MAX)));
        false
    }
}

/// A meter's, while the kernel moves bytes of its flow; the last ones are added when it is dropped.
#[must_use]
pub struct CountedKernel<'m>(&'m Meter);

impl Drop for CountedKernel<'_> {
    fn drop(&mut self) {
        self.0.catch_up();
        self.0.kernel.0.take();
    }
}

/// A flow that is carried.
pub struct LiveFlow {
    id: FlowId,
    slot: u32,
    /// Everything that is known but for how much it has moved and how it ends.
    record: Record,
    meter: Meter,
    /// What it was admitted with, by each listener that it passed in this process.
    admissions: Box<[Admission]>,
    end: Cell<Option<EndReason>>,
    cause: Cell<Option<Box<Cause>>>,
    waker: Cell<Option<Waker>>,
}

/// What else there is to say of an end.
#[derive(Clone, Debug, Default)]
pub struct Cause {
    /// The name of the policy or the route.
    pub rule: Option<Arc<str>>,
    /// A text.
    pub detail: Option<String>,
}

impl fmt::Debug for LiveFlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveFlow")
            .field("id", &self.id)
            .field("record", &self.record)
            .field("meter", &self.meter)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl LiveFlow {
    /// Which one it is.
    pub fn id(&self) -> FlowId {
        self.id
    }

    /// What is known of it. Bytes and duration are those of [`Self::meter`] and [`Self::started`].
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// When it was accepted.
    pub fn started(&self) -> Instant {
        self.meter.started
    }

    /// What it has moved.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// What it was admitted with.
    pub fn admissions(&self) -> &[Admission] {
        &self.admissions
    }

    /// Has it end soon, with a reset of both sides. The first reason stays.
    pub fn end(&self, reason: EndReason) {
        self.end_because(reason, None);
    }

    /// The same, with more to say.
    pub fn end_because(&self, reason: EndReason, cause: Option<Cause>) {
        if self.end.get().is_none() {
            self.end.set(Some(reason));
            self.cause.set(cause.map(Box::new));
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
    }

    /// Why it is to end, if it is.
    pub fn ending(&self) -> Option<EndReason> {
        self.end.get()
    }

    /// What else there is to say of that, once.
    pub fn take_cause(&self) -> Option<Cause> {
        self.cause.take().map(|cause| *cause)
    }

    /// Ready when it is to end. For the task that carries it, which is the only one that waits.
    pub fn ended(&self) -> impl Future<Output = EndReason> {
        poll_fn(|cx| {
            if let Some(reason) = self.end.get() {
                return Poll::Ready(reason);
            }
            let waker = self.waker.take().filter(|waker| waker.will_wake(cx.waker()));
            self.waker.set(Some(waker.unwrap_or_else(|| cx.waker().clone())));
            Poll::Pending
        })
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        self.meter.catch_up();
        let mut record = self.record.clone();
        record.has_moved(&self.meter);
        record.lasted(self.meter.started.elapsed());
        Snapshot { id: self.id, path: self.meter.path.get(), record }
    }
}

/// What a flow was at one moment. Its record's reason means nothing yet.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Which one it is.
    pub id: FlowId,
    /// By what its bytes are moved.
    pub path: CurrentPath,
    /// What is known of it, with its bytes and its age.
    pub record: Record,
}

/// All flows of a registry together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes from clients, of flows that are gone and of those that are here.
    pub sent: u64,
    /// Bytes from targets.
    pub received: u64,
    /// Flows that are here, by [`CurrentPath`].
    pub live: [usize; CurrentPath::ALL.len()],
}

/// See the module.
#[derive(Debug)]
pub struct Registry {
    worker: u16,
    next: Cell<u64>,
    slots: RefCell<Slots>,
    /// Flows that are opened end at once.
    ending: Cell<Option<EndReason>>,
    /// What flows had moved that are gone.
    gone: Cell<[u64; 2]>,
}

#[derive(Debug, Default)]
struct Slots {
    flows: Vec<Option<Rc<LiveFlow>>>,
    free: Vec<u32>,
}

impl Default for Registry {
    fn default() -> Self {
        static WORKERS: AtomicU16 = AtomicU16::new(0);
        Self {
            worker: WORKERS.fetch_add(1, Ordering::Relaxed),
            next: Cell::default(),
            slots: RefCell::default(),
            ending: Cell::default(),
            gone: Cell::default(),
        }
    }
}

impl Registry {
    /// Takes up a flow that was admitted with this.
    pub fn open(self: &Rc<Self>, record: Record, started: Instant, admissions: Box<[Admission]>) -> Open {
        let number = self.next.get();
        self.next.set(number + 1);
        let slots = &mut *self.slots.borrow_mut();
        let slot = slots.free.pop().unwrap_or_else(|| {
            slots.flows.push(None);
            // Flows are bounded by far less (`daemon.max_flows`).
            u32::try_from(slots.flows.len() - 1).unwrap_or(u32::MAX)
        });
        let flow = Rc::new(LiveFlow {
            id: FlowId { worker: self.worker, number },
            slot,
            record,
            meter: Meter::new(started),
            admissions,
            end: self.ending.clone(),
            cause: Cell::default(),
            waker: Cell::default(),
        });
        if let Some(place) = slots.flows.get_mut(slot as usize) {
            *place = Some(Rc::clone(&flow));
        }
        Open { registry: Rc::clone(self), flow }
    }

    /// How many there are by each path, and the bytes from clients and from targets that all flows have moved: those that are
    /// gone, and those that are here.
    pub fn totals(&self) -> Totals {
        let [sent, received] = self.gone.get();
        let mut totals = Totals { sent, received, ..Totals::default() };
        for flow in self.slots.borrow().flows.iter().flatten() {
            flow.meter.catch_up();
            totals.sent += flow.meter.sent.get();
            totals.received += flow.meter.received.get();
            totals.live[flow.meter.path.get() as usize] += 1;
        }
        totals
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        let slots = self.slots.borrow();
        slots.flows.len() - slots.free.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes from clients and from targets that all flows have moved: those that are gone, and those that are here.
    pub fn moved(&self) -> [u64; 2] {
        self.slots.borrow().flows.iter().flatten().fold(self.gone.get(), |[sent, received], flow| {
            flow.meter.catch_up();
            [sent + flow.meter.sent.get(), received + flow.meter.received.get()]
        })
    }

    /// Copies of as many flows as `most`, from the place `from` on, and the place where the next ones are. The first ones are
    /// at 0; `None` says that there are no more. A flow that is there all the time is in one of the answers.
    pub fn page(&self, from: usize, most: usize) -> (Vec<Snapshot>, Option<usize>) {
        let slots = self.slots.borrow();
        let mut page = Vec::new();
        for (place, flow) in slots.flows.iter().enumerate().skip(from) {
            if page.len() == most {
                return (page, Some(place));
            }
            page.extend(flow.as_ref().map(|flow| flow.snapshot()));
        }
        (page, None)
    }

    /// Calls `look` for each of them. It may not open or close any.
    pub fn for_each(&self, mut look: impl FnMut(&LiveFlow)) {
        for flow in self.slots.borrow().flows.iter().flatten() {
            flow.meter.catch_up();
            look(flow);
        }
    }

    /// Has those flows end of which `which` says so; how many. It may not open or close any.
    pub fn end_where(&self, reason: EndReason, which: impl Fn(&LiveFlow) -> bool) -> usize {
        let slots = self.slots.borrow();
        let ending = slots.flows.iter().flatten().filter(|flow| which(flow));
        ending.map(|flow| flow.end(reason)).count()
    }

    /// Has those flows end for which `why` has a cause; how many. It may not open or close any.
    pub fn end_because(&self, reason: EndReason, why: impl Fn(&LiveFlow) -> Option<Cause>) -> usize {
        let slots = self.slots.borrow();
        let ending = slots.flows.iter().flatten().filter(|flow| flow.ending().is_none());
        let ended = ending.filter_map(|flow| why(flow).map(|cause| flow.end_because(reason, Some(cause))));
        ended.count()
    }

    /// Has all flows end, and those that come.
    pub fn end_all(&self, reason: EndReason) -> usize {
        self.ending.set(Some(reason));
        self.end_where(reason, |_| true)
    }

    fn remove(&self, flow: &LiveFlow) {
        let slots = &mut *self.slots.borrow_mut();
        if let Some(place) = slots.flows.get_mut(flow.slot as usize) {
            *place = None;
            slots.free.push(flow.slot);
        }
        let [sent, received] = self.gone.get();
        self.gone.set([sent + flow.meter.sent.get(), received + flow.meter.received.get()]);
    }
}

/// A flow's place in the registry, given back when dropped.
#[derive(Debug)]
pub struct Open {
    registry: Rc<Registry>,
    flow: Rc<LiveFlow>,
}

impl Deref for Open {
    type Target = LiveFlow;

    fn deref(&self) -> &LiveFlow {
        &self.flow
    }
}

impl Open {
    /// Takes the flow out; what is known of it, with what it has moved, and when it was accepted.
    pub fn close(self) -> (Record, Instant) {
        let flow = Rc::clone(&self.flow);
        drop(self);
        let started = flow.meter.started;
        // Nobody else holds it: what looks at it borrows it.
        let (mut record, meter) = match Rc::try_unwrap(flow) {
            Ok(flow) => (flow.record, flow.meter),
            Err(flow) => (flow.record.clone(), flow.meter.clone()),
        };
        record.has_moved(&meter);
        (record, started)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.registry.remove(&self.flow);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        pin::pin,
        sync::{Arc, atomic::AtomicUsize},
        task::{Context, Wake},
    };

    use super::*;
    use crate::model::flow::ClientAddr;

    fn record(port: u16) -> Record {
        Record::new(&format!("a.example:{port}").parse().unwrap(), ClientAddr("127.0.0.1:9".parse().unwrap()))
    }

    fn open(registry: &Rc<Registry>, port: u16) -> Open {
        registry.open(record(port), Instant::now(), Box::default())
    }

    #[test]
    fn what_a_flow_has_moved_can_be_read_while_it_runs_and_counts_once_when_it_is_gone() {
        let registry = Rc::new(Registry::default());
        let (one, two) = (open(&registry, 1), open(&registry, 2));
        one.meter().sent.set(5);
        two.meter().received.set(7);
        assert_eq!((registry.len(), registry.moved()), (2, [5, 7]));
        let (page, next) = registry.page(0, 10);
        assert_eq!((page.len(), next), (2, None));
        assert_eq!((page[0].record.sent, page[1].record.received), (5, 7));
        one.meter().sent.set(6);
        let (record, _) = one.close();
        assert_eq!((record.sent, record.destination.to_string().as_str()), (6, "a.example:1"));
        drop(two);
        assert_eq!((registry.is_empty(), registry.moved()), (true, [6, 7]));
    }

    #[test]
    fn what_the_kernel_moves_is_counted_once_whoever_asks_and_when_it_stops() {
        let registry = Rc::new(Registry::default());
        let flow = open(&registry, 1);
        let new = Rc::new(Cell::new([3, 4]));
        let uncounted = Rc::clone(&new);
        let counted = flow.meter().count_kernel(Box::new(move || uncounted.take()));
        assert_eq!(registry.moved(), [3, 4]);
        assert_eq!((registry.moved(), flow.meter().clone().sent.get()), ([3, 4], 3));
        new.set([10, 0]);
        assert_eq!(registry.page(0, 1).0[0].record.sent, 13);
        // At an age at which it would be idle but for what has moved meanwhile.
        let (age, idle) = (Duration::from_secs(9), Duration::from_secs(5));
        assert!(!flow.meter().is_idle(age, idle));
        new.set([1, 0]);
        assert!(!flow.meter().is_idle(age * 2, idle) && flow.meter().is_idle(age * 3, idle));
        new.set([0, 100]);
        drop(counted);
        new.set([1000, 1000]);
        assert_eq!(registry.moved(), [14, 104]);
    }

    #[test]
    fn pages_hold_every_flow_that_is_there_all_the_time_once() {
        let registry = Rc::new(Registry::default());
        let mut flows: Vec<_> = (1..=10).map(|port| open(&registry, port)).collect();
        let kept: BTreeSet<_> = flows.iter().skip(5).map(|flow| flow.id()).collect();
        let (mut seen, mut from) = (Vec::new(), Some(0));
        while let Some(place) = from {
            let (page, next) = registry.page(place, 3);
            seen.extend(page.into_iter().map(|flow| flow.id));
            from = next;
            // Others come and go meanwhile, in the same places.
            drop(flows.remove(0));
            flows.push(open(&registry, 99));
        }
        for id in kept {
            assert_eq!(seen.iter().filter(|seen| **seen == id).count(), 1, "{id}");
        }
    }

    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_flow_that_is_to_end_is_woken_once_and_the_first_reason_stays() {
        let registry = Rc::new(Registry::default());
        let (one, two) = (open(&registry, 1), open(&registry, 2));
        let woken = Arc::new(Woken(AtomicUsize::default()));
        let waker = Arc::clone(&woken).into();
        let mut cx = Context::from_waker(&waker);
        let mut ended = pin!(one.ended());
        assert!(ended.as_mut().poll(&mut cx).is_pending());
        assert!(ended.as_mut().poll(&mut cx).is_pending());
        let id = one.id();
        assert_eq!(registry.end_where(EndReason::Killed, |flow| flow.id() == id), 1);
        assert_eq!(registry.end_all(EndReason::DrainTimeout), 2);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert_eq!(ended.as_mut().poll(&mut cx), Poll::Ready(EndReason::Killed));
        assert_eq!(pin!(two.ended()).poll(&mut cx), Poll::Ready(EndReason::DrainTimeout));
        let late = open(&registry, 3);
        assert_eq!(pin!(late.ended()).poll(&mut cx), Poll::Ready(EndReason::DrainTimeout));
    }

    /// The registry reuses the places of flows that are gone, and never their identifiers.
    #[test]
    fn places_are_given_again_and_numbers_are_not() {
        let registry = Rc::new(Registry::default());
        let ids: BTreeSet<_> = (0..100).map(|_| open(&registry, 1).id()).collect();
        assert_eq!((ids.len(), registry.slots.borrow().flows.len()), (100, 1));
    }

    #[test]
    fn what_the_registry_adds_to_an_idle_flow_is_bounded() {
        // A pointer to it, and its place; two counters of the `Rc`; what a record does not hold; since when nothing has moved; and
        // three pointers, to what it was admitted with, to why it ends, and to what the kernel moves.
        let added = size_of::<LiveFlow>() - size_of::<Record>() - size_of::<Instant>();
        assert!(added <= 112, "{added}");
        // One for each listener that it passed in this process, beside the names and headers of its request.
        assert!(size_of::<Admission>() <= 224, "{}", size_of::<Admission>());
    }
}
