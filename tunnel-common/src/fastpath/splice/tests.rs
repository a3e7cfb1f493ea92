//! A model of the kernel and the daemon around one direction, and what holds in every order of their steps.

extern crate std;

use std::{collections::VecDeque, vec::Vec};

use proptest::prelude::*;

use super::*;

/// What may happen next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The source sends so many bytes, in one buffer.
    Arrive(u64),
    /// Passed bytes come to where they can be read (they may have to wait behind the kernel's list).
    Surface,
    /// The kernel's worker gives the target's TCP what was sent on first.
    Send,
    /// The daemon reads so much.
    Read(usize),
    /// The daemon notes what was sent on, for the next `Write`, `Grant` or `Finish`.
    Look,
    /// The daemon asks the target's TCP, and writes what it holds when it may.
    Write,
    /// The same, and lets the program go on when it may.
    Grant(u64),
    /// The daemon copies from now on.
    Shut,
    /// The source has ended.
    End,
    /// The daemon passes the end on when it may.
    Finish,
}

#[derive(Default)]
struct World {
    words: Words,
    ledger: Ledger,
    /// Bytes are numbered.
    next: u64,
    ended: bool,
    finished: bool,
    deep: VecDeque<u64>,
    inbox: VecDeque<u64>,
    held: VecDeque<u64>,
    list: VecDeque<Vec<u64>>,
    out: Vec<u64>,
    seen: (u64, u64),
    granted: u64,
    checked: usize,
}

impl World {
    fn new() -> Self {
        Self { words: Words { gate: SHUT, ..Words::default() }, ..Self::default() }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Arrive(len) if !self.ended => {
                let bytes: Vec<u64> = (self.next..self.next + len).collect();
                self.next += len;
                match verdict(&self.words, len) {
                    Verdict::Pass => {
                        self.words.passed += len;
                        if tells(&self.words) {
                            self.words.told = 1;
                        }
                        self.deep.extend(bytes);
                    }
                    Verdict::Redirect => {
                        self.words.spent += cost(len);
                        self.words.redirected += len;
                        self.list.push_back(bytes);
                    }
                    Verdict::Drop => assert_eq!(len, 0),
                }
            }
            Step::Arrive(_) => {}
            Step::Surface => self.inbox.append(&mut self.deep),
            Step::Send => self.out.extend(self.list.pop_front().unwrap_or_default()),
            Step::Read(n) => {
                self.words.told = 0;
                let n = n.min(self.inbox.len());
                self.held.extend(self.inbox.drain(..n));
                self.ledger.took(n as u64);
            }
            Step::Look => self.seen = (self.words.spent, self.words.redirected),
            Step::Write => {
                // Not before the next look: what it holds was read after the gate was shut by its being passed.
                if self.held.is_empty() || self.seen.1 != self.words.redirected {
                    return;
                }
                if self.ledger.is_drained(self.seen.1, self.out.len() as u64) {
                    self.ledger.gave(self.held.len() as u64);
                    self.out.extend(self.held.drain(..));
                }
            }
            Step::Grant(room) => {
                let Some(gate) = self.ledger.gate() else { return };
                if self.ledger.is_drained(self.seen.1, self.out.len() as u64) {
                    let limit = grant(self.seen.0, room, BACKLOG_MAX);
                    self.words.limit = self.words.limit.max(limit);
                    self.words.gate = gate;
                    self.granted = self.granted.max(room.min(BACKLOG_MAX));
                }
            }
            Step::Shut => self.words.gate = SHUT,
            Step::End => self.ended = true,
            Step::Finish => {
                let level = self.ledger.has_read(self.words.passed) && self.held.is_empty();
                if self.ended && level && self.ledger.is_drained(self.words.redirected, self.out.len() as u64)
                {
                    self.finished = true;
                }
            }
        }
        self.check();
    }

    fn check(&mut self) {
        // What was right before is still there.
        let from = self.checked.min(self.out.len());
        assert!(
            self.out[from..].iter().copied().eq(from as u64..self.out.len() as u64),
            "order: {:?}",
            self.out
        );
        self.checked = self.out.len();
        let waiting: u64 = self.list.iter().map(|b| cost(b.len() as u64)).sum();
        assert!(waiting <= self.granted.max(BACKLOG_MAX), "{waiting} wait");
        if self.words.gate == self.words.passed {
            assert!(
                self.held.is_empty() && self.inbox.is_empty() && self.deep.is_empty(),
                "the gate is open ahead of bytes that were passed"
            );
        }
        if self.finished {
            assert_eq!(self.out.len() as u64, self.next, "an end ahead of bytes");
        }
    }

    /// However it stands, it gets to the end by what the daemon and the kernel do by themselves.
    fn settle(&mut self) {
        self.step(Step::End);
        for _ in 0..4 {
            self.step(Step::Surface);
            while !self.list.is_empty() {
                self.step(Step::Send);
            }
            for step in [Step::Read(usize::MAX), Step::Look, Step::Write, Step::Finish] {
                self.step(step);
            }
        }
        assert!(self.finished, "it hangs: {:?} {:?}", self.words, self.ledger);
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop_oneof![Just(0), Just(1), 1..40_u64].prop_map(Step::Arrive),
        2 => Just(Step::Surface),
        3 => Just(Step::Send),
        3 => prop_oneof![Just(usize::MAX), 0..3_usize].prop_map(Step::Read),
        3 => Just(Step::Look),
        3 => Just(Step::Write),
        3 => prop_oneof![Just(0), Just(1), cost(1)..20_000_u64, Just(u64::MAX / 4)].prop_map(Step::Grant),
        1 => Just(Step::Shut),
        1 => Just(Step::Finish),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn bytes_arrive_once_in_order_within_the_credit_in_every_order_of_steps(
        steps in prop::collection::vec(step(), 0..120)
    ) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.settle();
    }
}

#[test]
fn every_order_of_few_steps_holds() {
    const STEPS: [Step; 9] = [
        Step::Arrive(2),
        Step::Surface,
        Step::Send,
        Step::Read(1),
        Step::Look,
        Step::Write,
        Step::Grant(cost(2) + 1),
        Step::Shut,
        Step::Finish,
    ];
    const DEPTH: u32 = 6;
    for mut n in 0..STEPS.len().pow(DEPTH) {
        let mut world = World::new();
        // From the moment at which the program may go on, which takes three steps to come to.
        world.step(Step::Look);
        world.step(Step::Grant(cost(2) + 1));
        for _ in 0..DEPTH {
            world.step(STEPS[n % STEPS.len()]);
            n /= STEPS.len();
        }
        world.settle();
    }
}

#[test]
fn what_is_stuck_is_bounded_by_memory_and_not_by_bytes() {
    let mut world = World::new();
    world.step(Step::Look);
    world.step(Step::Grant(u64::MAX / 4));
    for _ in 0..10_000 {
        world.step(Step::Arrive(1));
    }
    assert_eq!(world.list.len() as u64, BACKLOG_MAX / cost(1));
    assert_eq!(world.words.told, 1, "the daemon was told once");
    world.settle();
}

#[test]
fn an_end_without_bytes_is_never_redirected_nor_passed() {
    let open = Words { limit: u64::MAX / 2, ..Words::default() };
    assert_eq!(verdict(&open, 0), Verdict::Drop);
    assert_eq!(verdict(&open, 1), Verdict::Redirect);
    assert_eq!(verdict(&Words { gate: SHUT, ..open }, 1), Verdict::Pass);
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
