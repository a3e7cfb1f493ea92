//! Flows between two sockets, moved in every way that there is, over loopback: the ways differ in nothing that either side
//! could see. Nothing here waits for time, but to show that nothing more happens.

mod ends;

use std::{future::Future, io, rc::Rc, time::Duration};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, LocalSet},
    time::timeout,
};

use tunnel_common::fastpath::splice::{BACKLOG_MAX, MAIL_MAX};

use super::*;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// The ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Copy,
    /// Through as many pipes at most.
    Pipes(usize),
    /// By the kernel program, with so much credit, after so many wake-ups.
    Splice(u64, u32),
    /// The same, with mailboxes that are always full.
    NoMail,
}

/// Copied; through pipes; through pipes of which there are none; through one pipe for all; by the program as a daemon
/// has it; from the first byte on; with so little credit that it has to be renewed all the time; and without room for mail.
const WAYS: [By; 8] = [
    By::Copy,
    By::Pipes(PIPES_MAX),
    By::Pipes(0),
    By::Pipes(1),
    By::Splice(BACKLOG_MAX, INTERACTIVE_STREAK),
    By::Splice(BACKLOG_MAX, 1),
    By::Splice(6_000, 1),
    By::NoMail,
];

impl By {
    fn path(self) -> Path {
        let (credit, streak, mail) = match self {
            Self::Copy => return Path::Copy,
            Self::Pipes(most) => return Path::Pipe(Rc::new(Pipes::new(most))),
            Self::Splice(credit, streak) => (credit, streak, MAIL_MAX),
            Self::NoMail => (6_000, 1, 0),
        };
        Path::Splice(Rc::new(Splices::with(credit, streak, mail).expect("this kernel takes the program")))
    }
}

/// A flow that runs.
struct Flow {
    app: TcpStream,
    target: TcpStream,
    path: Path,
    relayed: JoinHandle<(EndReason, u64, u64)>,
}

async fn pair() -> (TcpStream, TcpLeg) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let outside = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (inside, _) = listener.accept().await.unwrap();
    for stream in [&outside, &inside] {
        stream.set_nodelay(true).unwrap();
    }
    (outside, TcpLeg::new(inside))
}

impl Flow {
    async fn start(way: By) -> Self {
        Self::start_with(way.path()).await
    }

    async fn start_with(path: Path) -> Self {
        Self::start_after(Early::default(), path).await
    }

    /// With what was read before.
    async fn start_after(mut early: Early, path: Path) -> Self {
        let ((app, mut client), (target, mut onward)) = (pair().await, pair().await);
        let through = path.clone();
        let relayed = tokio::task::spawn_local(async move {
            let meter = Meter::default();
            let outcome = relay(&mut client, &mut onward, &mut early, &meter, &through).await;
            (outcome.reason(), meter.sent.get(), meter.received.get())
        });
        Self { app, target, path, relayed }
    }

    fn in_use(&self) -> usize {
        in_use(&self.path)
    }
}

/// How a flow ended, and how much it moved each way.
async fn end_of_flow(relayed: JoinHandle<(EndReason, u64, u64)>) -> (EndReason, u64, u64) {
    timeout(PATIENCE, relayed).await.expect("it ends").unwrap()
}

/// Pipes that are in use.
fn in_use(path: &Path) -> usize {
    if let Path::Pipe(pipes) = path { pipes.in_use() } else { 0 }
}

/// Pipes that are open.
fn open(path: &Path) -> usize {
    if let Path::Pipe(pipes) = path { pipes.open() } else { 0 }
}

fn run_each<F: Future<Output = ()>>(test: impl Fn(By) -> F) {
    for way in WAYS {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let played = LocalSet::new().block_on(&runtime, async { timeout(PATIENCE, test(way)).await });
        assert!(played.is_ok(), "{way:?} hangs");
    }
}

/// Byte `i` of direction `seed`.
fn byte(seed: u64, i: u64) -> u8 {
    let mixed = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed.to_be_bytes()[3]
}

fn pattern(seed: u64, from: u64, len: usize) -> Vec<u8> {
    (from..).take(len).map(|i| byte(seed, i)).collect()
}

/// Sends `len` bytes in pieces of changing size.
async fn send(to: &mut (impl tokio::io::AsyncWrite + Unpin), seed: u64, len: usize) {
    let (mut at, mut step) = (0, 1);
    while at < len {
        let n = step.min(len - at);
        to.write_all(&pattern(seed, at as u64, n)).await.unwrap();
        at += n;
        step = if step > 200_000 { 1 } else { step * 3 + 1 };
    }
}

/// Receives to the end; how much.
async fn receive(from: &mut (impl tokio::io::AsyncRead + Unpin), seed: u64) -> usize {
    let (mut at, mut buf) = (0, vec![0; 64 * 1024]);
    loop {
        let n = from.read(&mut buf).await.unwrap();
        if n == 0 {
            return at;
        }
        assert!(buf[..n] == pattern(seed, at as u64, n), "other bytes within {n} from {at}");
        at += n;
    }
}

#[test]
fn bytes_arrive_once_in_order_unchanged_both_ways_at_once() {
    const BYTES: usize = 5_000_000;
    run_each(|way| async move {
        let mut flow = Flow::start(way).await;
        let (mut app_in, mut app_out) = flow.app.split();
        let (mut target_in, mut target_out) = flow.target.split();
        let up = async {
            send(&mut app_out, 1, BYTES).await;
            app_out.shutdown().await.unwrap();
        };
        let down = async {
            send(&mut target_out, 2, BYTES).await;
            target_out.shutdown().await.unwrap();
        };
        let all = tokio::join!(up, down, receive(&mut target_in, 1), receive(&mut app_in, 2));
        assert_eq!((all.2, all.3), (BYTES, BYTES), "{way:?}");
        assert_eq!(flow.in_use(), 0, "{way:?}");
        let path = flow.path.clone();
        let total = 2 * BYTES as u64;
        assert_eq!(
            end_of_flow(flow.relayed).await,
            (EndReason::Closed, BYTES as u64, BYTES as u64),
            "{way:?}"
        );
        match (way, path) {
            (By::Pipes(most), Path::Pipe(pipes)) => match (most, pipes.report()) {
                (0, Piped { moved: 0, missed: 2 }) => {}
                (1, Piped { missed: 0..=1, moved }) => assert!((1..=total).contains(&moved)),
                (_, Piped { moved, missed: 0 }) => assert_eq!(moved, total),
                other => panic!("{other:?}"),
            },
            (_, Path::Splice(splices)) => {
                let report = splices.report();
                assert!(report.bytes <= total && report.refused + report.no_slot == 0, "{report:?}");
                assert!(report.forced == 0 || way == By::NoMail, "{report:?}");
                assert!(report.mailed == 0 || way != By::NoMail, "{report:?}");
                assert_eq!(splices.slots_in_use(), 0);
            }
            _ => {}
        }
    });
}

#[test]
fn what_was_read_before_goes_first_each_way_and_counts() {
    const BEFORE: usize = 3_000_000;
    const AFTER: usize = 100_000;
    const OURS: usize = 1_234;
    run_each(|way| async move {
        let queue = |seed| {
            let mut queue = Queue::default();
            // Of which some are packed together, and all are more than a socket takes at once.
            let bytes = Bytes::from(pattern(seed, 0, BEFORE));
            let (mut at, mut step) = (0, 1);
            while at < BEFORE {
                let n = step.min(BEFORE - at);
                queue.push(bytes.slice(at..at + n));
                (at, step) = (at + n, if step > 200_000 { 1 } else { step * 3 + 1 });
            }
            queue
        };
        let path = way.path();
        let early = Early { sent: queue(1), ours: OURS, received: queue(2), ..Early::default() };
        let mut flow = Flow::start_after(early, path).await;
        let (mut app_in, mut app_out) = flow.app.split();
        let (mut target_in, mut target_out) = flow.target.split();
        let up = async {
            app_out.write_all(&pattern(1, BEFORE as u64, AFTER)).await.unwrap();
            app_out.shutdown().await.unwrap();
        };
        let down = async {
            target_out.write_all(&pattern(2, BEFORE as u64, AFTER)).await.unwrap();
            target_out.shutdown().await.unwrap();
        };
        let all = tokio::join!(up, down, receive(&mut target_in, 1), receive(&mut app_in, 2));
        assert_eq!((all.2, all.3), (BEFORE + AFTER, BEFORE + AFTER), "{way:?}");
        let total = (BEFORE + AFTER) as u64;
        // But not as the client's, where it was our own.
        let sent = total - OURS as u64;
        assert_eq!(end_of_flow(flow.relayed).await, (EndReason::Closed, sent, total), "{way:?}");
    });
}

#[test]
fn small_messages_go_back_and_forth_and_an_idle_flow_holds_no_pipe() {
    run_each(|way| async move {
        let mut flow = Flow::start(way).await;
        for i in 0..200_u16 {
            let message = pattern(3, u64::from(i), 1 + usize::from(i) * 37 % 3000);
            let mut got = vec![0; message.len()];
            flow.app.write_all(&message).await.unwrap();
            flow.target.read_exact(&mut got).await.unwrap();
            assert_eq!(got, message);
            flow.target.write_all(&message).await.unwrap();
            flow.app.read_exact(&mut got).await.unwrap();
            assert_eq!(got, message);
            assert_eq!(flow.in_use(), 0, "{way:?}");
        }
        assert!(open(&flow.path) <= 1, "one pipe is enough");
        if let (By::Splice(credit, _), Path::Splice(splices)) = (way, &flow.path) {
            drop(flow.app);
            drop(flow.target);
            end_of_flow(flow.relayed).await;
            let report = splices.report();
            assert!(report.flows == 1 && report.bytes > 100_000, "{report:?}");
            assert_eq!(report.credit > 10, credit < BACKLOG_MAX, "{report:?}");
        }
    });
}

#[test]
fn each_side_may_end_first_and_the_other_goes_on() {
    const BYTES: usize = 300_000;
    run_each(|way| async move {
        for app_first in [true, false] {
            let mut flow = Flow::start(way).await;
            let (first, second) =
                if app_first { (&mut flow.app, &mut flow.target) } else { (&mut flow.target, &mut flow.app) };
            let (sent, heard) = tokio::join!(
                async {
                    send(first, 1, BYTES).await;
                    first.shutdown().await.unwrap();
                },
                receive(second, 1)
            );
            assert_eq!((sent, heard), ((), BYTES));
            // An end without a byte of its own behind it, and then the other direction.
            let (sent, heard) = tokio::join!(
                async {
                    send(second, 2, BYTES).await;
                    second.shutdown().await.unwrap();
                },
                receive(first, 2)
            );
            assert_eq!((sent, heard), ((), BYTES));
            assert_eq!(
                end_of_flow(flow.relayed).await,
                (EndReason::Closed, BYTES as u64, BYTES as u64),
                "{way:?}"
            );
        }
        // Without a byte.
        let mut flow = Flow::start(way).await;
        flow.app.shutdown().await.unwrap();
        assert_eq!(receive(&mut flow.target, 1).await, 0);
        flow.target.shutdown().await.unwrap();
        assert_eq!(receive(&mut flow.app, 1).await, 0);
        assert_eq!(end_of_flow(flow.relayed).await, (EndReason::Closed, 0, 0), "{way:?}");
    });
}

/// That a side wanted no more is its end; where the flow was reset all the same, it is booked as reset by that side.
#[test]
fn a_reset_is_booked_as_one_whatever_its_side_had_said_before() {
    use crate::model::end::EndReason;

    assert_eq!(Outcome::Closed.reason(), EndReason::Closed);
    assert_eq!(Outcome::Reset(Side::Client, Broken::Done).reason(), EndReason::ClientReset);
    assert_eq!(Outcome::Reset(Side::Target, Broken::Done).reason(), EndReason::TargetReset);
}
