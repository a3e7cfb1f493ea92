//! A model of the kernel and the daemon around both directions of a flow, and what holds in every order of their steps.
//!
//! A verdict is made of the steps between which the other socket's verdict, the kernel's workers and the daemon may come.

extern crate std;

use std::{
    collections::{HashSet, VecDeque},
    println, vec,
    vec::Vec,
};

use proptest::prelude::*;

use super::*;

/// What may happen next, at the socket of one side: 0 or 1.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// It receives so many bytes, in one buffer, and takes its lock for them.
    Arrive(u64),
    /// The verdict on them goes on.
    Judge,
    /// The kernel's worker gives the socket's TCP what waits first in front of it,
    Send,
    /// and takes it off the list.
    TakeOff,
    /// The worker of its mailbox makes mail readable.
    Deliver,
    /// The daemon reads so much of what was kept.
    Read(usize),
    /// The daemon writes what it holds of what this side has sent, when it may.
    Write,
    /// The daemon goes on with opening both gates.
    Open(u64),
    /// The daemon goes on with leaving both directions.
    Leave,
    /// It has ended.
    End,
}

/// Where the verdict on a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Flight {
    /// It has announced that it is to be sent on.
    Announced,
    /// It has been counted as kept.
    Counted,
    Redirect,
    Pass,
    Mail,
}

/// Where the daemon is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Doing {
    #[default]
    Copying,
    /// Both gates are open, or have been.
    Open,
    /// How far it is with it, and whether each side had turned.
    Opening(u8, [bool; 2]),
    /// How far it is with it.
    Leaving(u8),
}

/// A buffer in front of a socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Waiting {
    /// To be sent by it.
    Out(Vec<u64>),
    /// Passed to it behind what is to be sent.
    Own(Vec<u64>),
}

/// A socket, and the direction that begins there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Side {
    words: Words,
    ledger: Ledger,
    /// Bytes are numbered.
    next: u64,
    ended: bool,
    flight: Option<(Flight, u64)>,
    own: VecDeque<u64>,
    mail: VecDeque<u64>,
    mailbox: VecDeque<u64>,
    mail_read: u64,
    held: VecDeque<u64>,
    /// In front of it; the first one may have been sent.
    list: VecDeque<Waiting>,
    first_sent: bool,
    /// What it has sent: the other side's bytes.
    out: Vec<u64>,
    /// What the other direction had sent on when the gates were opened.
    at_open: u64,
    /// Nothing waited in front of it then.
    was_clear: bool,
    finished: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct World {
    sides: [Side; 2],
    doing: Doing,
    granted: u64,
    /// What mail may cost from one opening of the gates to the next.
    mail_max: u64,
}

impl World {
    fn new() -> Self {
        Self::with(MAIL_MAX)
    }

    fn with(mail_max: u64) -> Self {
        let mut world = Self { mail_max, ..Self::default() };
        for side in &mut world.sides {
            side.words = Words { gate: SHUT, turned: 1, ..Words::default() };
            side.was_clear = true;
        }
        world
    }

    /// Whether the daemon may call what takes the lock of a socket.
    fn is_free(&self, at: usize) -> bool {
        self.sides[at].flight.is_none()
    }

    fn is_drained(&self, at: usize) -> bool {
        let (from, to) = (&self.sides[at], &self.sides[1 - at]);
        from.ledger.is_drained(from.words.redirected, to.out.len() as u64)
    }

    /// Does it where it can be done; whether it could.
    fn step(&mut self, at: usize, step: Step) -> bool {
        let before = self.doing;
        let done = match step {
            Step::Arrive(len) => self.arrive(at, len),
            Step::Judge => self.judge(at),
            Step::Send => self.send(at),
            Step::TakeOff => {
                let side = &mut self.sides[at];
                std::mem::take(&mut side.first_sent) && side.list.pop_front().is_some()
            }
            Step::Deliver => {
                let side = &mut self.sides[at];
                let some = !side.mail.is_empty();
                side.mailbox.append(&mut side.mail);
                some
            }
            Step::Read(n) => self.read(at, n),
            Step::Write => self.write(at),
            Step::Open(room) => self.open(room),
            Step::Leave => self.leave(),
            Step::End => {
                let side = &mut self.sides[at];
                side.flight.is_none() && !std::mem::replace(&mut side.ended, true)
            }
        };
        self.check();
        done || before != self.doing
    }

    fn arrive(&mut self, at: usize, len: u64) -> bool {
        let side = &mut self.sides[at];
        if side.flight.is_some() || side.ended {
            return false;
        }
        side.next += len;
        side.flight = Some(if may_redirect(&side.words, len) {
            side.words.announced = side.words.redirected + len;
            (Flight::Announced, len)
        } else {
            side.words.kept += len;
            (Flight::Counted, len)
        });
        true
    }

    fn judge(&mut self, at: usize) -> bool {
        let other = self.sides[1 - at].words;
        let side = &mut self.sides[at];
        let Some((flight, len)) = side.flight.take() else { return false };
        let bytes = side.next - len..side.next;
        match flight {
            Flight::Announced if other.is_open() => {
                side.words.spent += cost(len);
                side.words.redirected += len;
                side.flight = Some((Flight::Redirect, len));
            }
            Flight::Announced => {
                side.words.announced = side.words.redirected;
                side.words.kept += len;
                side.flight = Some((Flight::Counted, len));
            }
            Flight::Counted => {
                let waiting = u32::try_from(side.list.len()).unwrap();
                let empty = asks_if_empty(&side.words) && is_empty(side.out.len() as u64, &other, waiting);
                side.flight = Some(match keep(&side.words, len, empty) {
                    Kept::Passed => {
                        if side.words.turned != 0 && empty {
                            side.words.forced = PASSING;
                        }
                        side.words.turned = 1;
                        (Flight::Pass, len)
                    }
                    Kept::Mailed => {
                        side.words.mail_spent += cost(len);
                        side.words.mailed += len;
                        (Flight::Mail, len)
                    }
                    Kept::Forced => {
                        (side.words.forced, side.words.turned) = (FORCED, 1);
                        (Flight::Pass, len)
                    }
                });
                if tells(&side.words) {
                    side.words.told = 1;
                }
            }
            Flight::Pass if side.list.is_empty() => side.own.extend(bytes),
            Flight::Pass => {
                assert!(side.words.forced == FORCED, "passed behind something that waits");
                side.list.push_back(Waiting::Own(bytes.collect()));
            }
            Flight::Mail => side.mail.extend(bytes),
            Flight::Redirect => self.sides[1 - at].list.push_back(Waiting::Out(bytes.collect())),
        }
        true
    }

    fn send(&mut self, at: usize) -> bool {
        let side = &mut self.sides[at];
        // It takes the socket's lock.
        if side.flight.is_some() || side.first_sent || side.list.is_empty() {
            return false;
        }
        side.first_sent = true;
        match &side.list[0] {
            Waiting::Out(bytes) => side.out.extend(bytes),
            Waiting::Own(bytes) => side.own.extend(bytes),
        }
        true
    }

    fn read(&mut self, at: usize, n: usize) -> bool {
        let opening = matches!(self.doing, Doing::Opening(..));
        let side = &mut self.sides[at];
        if opening || side.flight.is_some() {
            return false;
        }
        // In this order: once it has turned, nothing more is mailed.
        let turned = side.words.turned != 0;
        side.words.told = 0;
        let mail = side.mail_read < side.words.mailed;
        let from = if mail { &mut side.mailbox } else { &mut side.own };
        if !mail && !turned {
            return false;
        }
        let n = n.min(from.len());
        side.held.extend(from.drain(..n));
        side.ledger.took(n as u64);
        side.mail_read += if mail { n as u64 } else { 0 };
        n > 0
    }

    fn write(&mut self, at: usize) -> bool {
        let opening = matches!(self.doing, Doing::Opening(..));
        // It has read something, so the program has kept something, and sends nothing on.
        if opening || self.sides[at].held.is_empty() || !self.is_free(at) || !self.is_drained(at) {
            return false;
        }
        let side = &mut self.sides[at];
        let bytes: Vec<u64> = side.held.drain(..).collect();
        side.ledger.gave(bytes.len() as u64);
        self.sides[1 - at].out.extend(bytes);
        true
    }

    fn open(&mut self, room: u64) -> bool {
        let levels = self.sides.clone().map(|side| side.ledger.gate() == Some(side.words.kept));
        let closed = self.sides.iter().any(|side| !side.words.is_open());
        let forced = self.sides.iter().any(|side| side.words.forced != 0);
        let ready =
            !forced && levels == [true; 2] && (0..2).all(|at| self.is_drained(at) && self.is_free(at));
        self.doing = match self.doing {
            Doing::Copying | Doing::Open if closed && ready => {
                let was = [0, 1].map(|at| std::mem::take(&mut self.sides[at].words.turned) != 0);
                Doing::Opening(0, was)
            }
            Doing::Opening(at @ (0 | 1), was) if self.is_free(usize::from(at)) => Doing::Opening(at + 1, was),
            Doing::Opening(2, was) if levels == [true; 2] => {
                for (at, was) in was.into_iter().enumerate() {
                    self.sides[at].was_clear = was || self.was_left_alone(at);
                }
                for at in 0..2 {
                    let side = &mut self.sides[at];
                    side.words.due = side.ledger.due();
                    side.words.limit = grant(side.words.spent, room, BACKLOG_MAX);
                    side.words.mail_limit = side.words.mail_spent + self.mail_max;
                    self.sides[1 - at].at_open = self.sides[at].words.redirected;
                }
                self.granted = self.granted.max(room.min(BACKLOG_MAX));
                Doing::Opening(3, was)
            }
            // Something has come.
            Doing::Opening(2, was) => {
                for (side, was) in self.sides.iter_mut().zip(was) {
                    if was {
                        side.words.turned = 1;
                    }
                }
                Doing::Open
            }
            Doing::Opening(at @ (3 | 4), was) => {
                let side = &mut self.sides[usize::from(at - 3)];
                side.words.gate = side.ledger.gate().unwrap();
                if at == 3 { Doing::Opening(4, was) } else { Doing::Open }
            }
            _ => return false,
        };
        true
    }

    /// Whether nothing waited in front of it when the gates were opened, and nothing was sent on to it since.
    fn was_left_alone(&self, at: usize) -> bool {
        self.sides[at].was_clear && self.sides[at].at_open == self.sides[1 - at].words.redirected
    }

    fn leave(&mut self) -> bool {
        self.doing = match self.doing {
            Doing::Open => {
                self.sides.iter_mut().for_each(|side| side.words.gate = SHUT);
                Doing::Leaving(0)
            }
            Doing::Leaving(at @ (0 | 1)) if self.is_free(usize::from(at)) => Doing::Leaving(at + 1),
            Doing::Leaving(2) => {
                for at in 0..2 {
                    // Nothing was sent on to it since it was last seen to be empty.
                    if self.is_free(at) && self.was_left_alone(at) {
                        self.sides[at].words.turned = 1;
                    }
                }
                let all = |side: &Side| {
                    side.words.turned != 0
                        && side.words.forced != FORCED
                        && side.mail_read == side.words.mailed
                };
                if self.sides.iter().all(all) { Doing::Copying } else { return false }
            }
            _ => return false,
        };
        true
    }

    fn finish(&mut self, at: usize) {
        let level = self.sides[at].ledger.has_read(self.sides[at].words.kept);
        let drained = self.is_free(at) && self.is_drained(at);
        let side = &mut self.sides[at];
        side.finished |= side.ended && level && side.held.is_empty() && drained;
        assert!(!side.finished || self.sides[1 - at].out.len() as u64 == self.sides[at].next, "early");
    }

    fn check(&mut self) {
        for at in 0..2 {
            let side = &self.sides[at];
            assert!(side.out.iter().copied().eq(0..side.out.len() as u64), "order: {:?}", side.out);
            let costs = side.list.iter().map(|waiting| match waiting {
                Waiting::Out(bytes) => cost(bytes.len() as u64),
                Waiting::Own(_) => 0,
            });
            let (waiting, first): (u64, _) = (costs.clone().sum(), costs.clone().next().unwrap_or(0));
            assert!(waiting <= self.granted + first, "{waiting}");
            if self.sides[at].words.gate == self.sides[at].words.kept {
                let kept = [&side.held, &side.own, &side.mail, &side.mailbox];
                let passed = side.list.iter().any(|waiting| matches!(waiting, Waiting::Own(_)));
                assert!(
                    kept.iter().all(|kept| kept.is_empty()) && (side.first_sent || !passed),
                    "the gate is open ahead of bytes that were kept"
                );
            }
            self.finish(at);
        }
    }

    /// However it stands, it gets to the end by what the daemon and the kernel do by themselves.
    fn settle(&mut self) {
        let mut rounds = 0;
        loop {
            let mut some = false;
            for at in 0..2 {
                for step in [
                    Step::Judge,
                    Step::End,
                    Step::Send,
                    Step::TakeOff,
                    Step::Deliver,
                    Step::Read(usize::MAX),
                    Step::Write,
                ] {
                    some |= self.step(at, step);
                }
            }
            if matches!(self.doing, Doing::Opening(..)) {
                some |= self.step(0, Step::Open(1000));
            }
            if !some {
                break;
            }
            rounds += 1;
            assert!(rounds < 1000, "it goes round in circles: {self:?}");
        }
        assert!(self.sides.iter().all(|side| side.finished), "it hangs: {self:?}");
    }
}

fn step() -> impl Strategy<Value = (usize, Step)> {
    let step = prop_oneof![
        6 => prop_oneof![Just(1), 1..40_u64].prop_map(Step::Arrive),
        14 => Just(Step::Judge),
        3 => Just(Step::Send),
        3 => Just(Step::TakeOff),
        2 => Just(Step::Deliver),
        3 => prop_oneof![Just(usize::MAX), 0..3_usize].prop_map(Step::Read),
        3 => Just(Step::Write),
        12 => prop_oneof![cost(1)..20_000_u64, Just(u64::MAX / 4)].prop_map(Step::Open),
        1 => Just(Step::Leave),
    ];
    (0..2_usize, step)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn bytes_arrive_once_in_order_and_nothing_is_passed_behind_what_waits_in_every_order_of_steps(
        steps in prop::collection::vec(step(), 0..200),
        mail_max in prop_oneof![Just(MAIL_MAX), 0..cost(1) * 4],
    ) {
        let mut world = World::with(mail_max);
        for (at, step) in steps {
            world.step(at, step);
        }
        world.settle();
    }
}

/// All that can become of a flow with so many buffers from each side, with room for all mail or for none.
#[test]
fn every_order_of_all_steps_with_two_buffers_from_each_side_holds() {
    let met = |seen: &HashSet<World>, what: fn(&Side) -> bool| {
        seen.iter().any(|world| world.sides.iter().any(what))
    };
    let seen = all_orders(MAIL_MAX);
    // What it is about has been met.
    assert!(met(&seen, |side| side.words.mailed > 0
        && side.words.turned != 0
        && side.words.kept > side.words.mailed));
    assert!(met(&seen, |side| side.words.mailed > 0 && !side.list.is_empty()));
    assert!(met(&seen, |side| side.words.redirected > 1));
    assert!(!met(&seen, |side| side.words.forced != 0));
    let seen = all_orders(0);
    let behind = |side: &Side| side.list.iter().any(|waiting| matches!(waiting, Waiting::Own(_)));
    assert!(met(&seen, |side| side.words.forced == FORCED));
    assert!(seen.iter().any(|world| world.doing == Doing::Copying && world.sides[0].words.forced == PASSING));
    assert!(seen.iter().any(|world| world.sides.iter().any(behind)));
}

/// Every state that can be reached.
fn all_orders(mail_max: u64) -> HashSet<World> {
    const BUFFERS: u64 = 2;
    const ROOM: u64 = cost(1) + 1;
    let steps = [
        Step::Arrive(1),
        Step::Judge,
        Step::Send,
        Step::TakeOff,
        Step::Deliver,
        Step::Read(usize::MAX),
        Step::Write,
        Step::Open(ROOM),
        Step::Leave,
    ];
    let mut seen = HashSet::new();
    let mut open = vec![World::with(mail_max)];
    while let Some(world) = open.pop() {
        world.clone().settle();
        for at in 0..2 {
            for step in steps {
                if matches!(step, Step::Arrive(_)) && world.sides[at].next >= BUFFERS
                    || matches!(step, Step::Open(_) | Step::Leave) && at == 1
                {
                    continue;
                }
                let mut next = world.clone();
                if next.step(at, step) && seen.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
    }
    println!("{} states", seen.len());
    seen
}

#[test]
fn what_is_stuck_is_bounded_by_memory_and_not_by_bytes() {
    let mut world = World::new();
    while world.doing != Doing::Open {
        world.step(0, Step::Open(u64::MAX / 4));
    }
    for _ in 0..10_000 {
        world.step(0, Step::Arrive(1));
        while world.step(0, Step::Judge) {}
    }
    assert_eq!(world.sides[1].list.len() as u64, BACKLOG_MAX / cost(1));
    assert_eq!(world.sides[0].words.told, 1, "the daemon was told once");
    // Nothing waits in front of the sender, so its own window is what stops it.
    assert_eq!((world.sides[0].words.mailed, world.sides[0].words.turned), (0, 1));
    world.settle();
}

#[test]
fn mail_has_a_bound() {
    let words = Words { mail_limit: MAIL_MAX, ..Words::default() };
    assert_eq!(keep(&words, 1, false), Kept::Mailed);
    assert_eq!(keep(&words, 1, true), Kept::Passed);
    let full = Words { mail_spent: MAIL_MAX - cost(1) + 1, ..words };
    assert_eq!(keep(&full, 1, false), Kept::Forced);
    assert_eq!(keep(&Words { turned: 1, ..full }, 1, false), Kept::Passed);
}

#[test]
fn an_end_without_bytes_is_never_sent_on() {
    let open = Words { limit: u64::MAX / 2, ..Words::default() };
    assert!(!may_redirect(&open, 0) && may_redirect(&open, 1));
    assert!(!may_redirect(&Words { gate: SHUT, ..open }, 1));
}

proptest! {
    #[test]
    fn of_segments_that_overlap_what_has_come_exactly_the_rest_is_taken(
        start in prop_oneof![Just(0), Just(u32::MAX - 20), any::<u32>()],
        segments in prop::collection::vec((0..40_u32, 1..60_u32), 1..60),
    ) {
        let (mut expected, mut taken) = (start, 0);
        for (back, len) in segments {
            // TCP gives away nothing ahead of a hole; what it gives may begin before what has come.
            let seq = expected.wrapping_sub(back);
            match fresh(expected, seq, len) {
                Fresh::From(old) => {
                    prop_assert_eq!(old, back);
                    taken += len - old;
                    expected = seq.wrapping_add(len);
                }
                Fresh::Nothing => prop_assert!(back >= len),
                Fresh::Hole => prop_assert!(false, "there is none"),
            }
            prop_assert_eq!(expected, start.wrapping_add(taken));
        }
        prop_assert_eq!(fresh(expected, expected.wrapping_add(1), 1), Fresh::Hole);
    }
}
