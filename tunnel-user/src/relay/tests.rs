//! Flows between two sockets, moved in every way that there is, over loopback.
//!
//! Enters: what an application and a target do. Leaves: what each of them sees. Invariant: the ways differ in
//! nothing that either side could see. It never waits for time, but to show that nothing more happens.

use std::{future::Future, io, rc::Rc, time::Duration};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, LocalSet},
    time::timeout,
};

use tunnel_common::fastpath::splice::BACKLOG_MAX;

use super::*;
use crate::transport::sockopt;

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
}

/// Copied; through pipes; through pipes of which there are none; through one pipe for all; by the program as a daemon
/// has it; from the first byte on; and with so little credit that it has to be renewed all the time.
const WAYS: [By; 7] = [
    By::Copy,
    By::Pipes(PIPES_MAX),
    By::Pipes(0),
    By::Pipes(1),
    By::Splice(BACKLOG_MAX, CHATTY_STREAK),
    By::Splice(BACKLOG_MAX, 1),
    By::Splice(6_000, 1),
];

impl By {
    fn path(self) -> Path {
        match self {
            Self::Copy => Path::Copy,
            Self::Pipes(most) => Path::Pipe(Rc::new(Pipes::new(most))),
            Self::Splice(credit, streak) => {
                Path::Splice(Rc::new(Splices::with(credit, streak).expect("this kernel takes the program")))
            }
        }
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
                assert_eq!(splices.seated(), 0);
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

/// What ends a connection: never bytes.
async fn end_of(stream: &mut TcpStream) -> Result<(), io::ErrorKind> {
    let mut buf = [0; 4096];
    loop {
        match stream.read(&mut buf).await {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) => return Err(e.kind()),
        }
    }
}

fn reset_of(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

#[test]
fn a_reset_of_either_side_resets_the_other_and_says_whose_it_was() {
    run_each(|way| async move {
        for by_app in [true, false] {
            for idle in [true, false] {
                let mut flow = Flow::start(way).await;
                if !idle {
                    flow.app.write_all(b"x").await.unwrap();
                    flow.target.read_exact(&mut [0]).await.unwrap();
                }
                let Flow { app, target, path, relayed } = flow;
                let (gone, mut left) = if by_app { (app, target) } else { (target, app) };
                reset_of(gone);
                assert_eq!(end_of(&mut left).await, Err(io::ErrorKind::ConnectionReset), "{way:?}");
                assert_eq!(in_use(&path), 0);
                let said = end_of_flow(relayed).await.0;
                let whose = if by_app { EndReason::ClientReset } else { EndReason::TargetReset };
                assert_eq!(said, whose, "{way:?}");
            }
        }
    });
}

#[test]
fn a_reset_behind_a_stuck_direction_is_heard() {
    run_each(|way| async move {
        for after_end in [false, true] {
            let flow = Flow::start(way).await;
            fill(&flow.app).await;
            if after_end {
                SockRef::from(&flow.app).shutdown(std::net::Shutdown::Write).unwrap();
            }
            // Nobody reads from the application: the target is full.
            let Flow { app, mut target, path, relayed } = flow;
            reset_of(app);
            assert_eq!(end_of(&mut target).await, Err(io::ErrorKind::ConnectionReset), "{way:?}");
            assert_eq!(end_of_flow(relayed).await.0, EndReason::ClientReset, "{way:?}");
            assert_eq!(in_use(&path), 0, "a pipe with bytes in it is closed");
        }
    });
}

/// Writes until nothing more is taken for a while; how much.
async fn fill(to: &TcpStream) -> usize {
    const QUIET: Duration = Duration::from_millis(200);
    let (mut taken, chunk) = (0, pattern(1, 0, 64 * 1024));
    while timeout(QUIET, to.writable()).await.is_ok() {
        match to.try_write(&chunk[..]) {
            Ok(n) => taken += n,
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
        }
    }
    taken
}

#[test]
fn a_reader_that_does_not_read_stops_the_sender_and_holds_one_pipe_at_most() {
    /// Four socket buffers as Linux grows them over loopback (net.ipv4.tcp_rmem, tcp_wmem), and what we hold.
    const TAKEN_MAX: usize = 32 << 20;
    run_each(|way| async move {
        let mut flow = Flow::start(way).await;
        let taken = fill(&flow.app).await;
        assert!((1..TAKEN_MAX).contains(&taken), "{way:?}: {taken} bytes were taken");
        assert!(flow.in_use() <= 1, "{way:?}");
        // The other direction goes on meanwhile.
        flow.target.write_all(b"on").await.unwrap();
        flow.app.read_exact(&mut [0; 2]).await.unwrap();
        // Everything arrives once it is read.
        flow.app.shutdown().await.unwrap();
        let mut got = 0;
        let mut buf = vec![0; 64 * 1024];
        loop {
            match flow.target.read(&mut buf).await.unwrap() {
                0 => break,
                n => got += n,
            }
        }
        assert_eq!(got, taken, "{way:?}");
        assert_eq!(flow.in_use(), 0, "{way:?}");
    });
}

#[test]
fn a_flow_that_is_stopped_resets_both_sides() {
    run_each(|way| async move {
        let Flow { mut app, mut target, path, relayed } = Flow::start(way).await;
        app.write_all(b"x").await.unwrap();
        target.read_exact(&mut [0]).await.unwrap();
        relayed.abort();
        assert_eq!(end_of(&mut app).await, Err(io::ErrorKind::ConnectionReset), "{way:?}");
        assert_eq!(end_of(&mut target).await, Err(io::ErrorKind::ConnectionReset), "{way:?}");
        assert_eq!(in_use(&path), 0, "{way:?}");
    });
}

#[test]
fn flows_of_one_worker_share_few_pipes() {
    const FLOWS: usize = 100;
    run_each(|way| async move {
        let path = way.path();
        let mut flows = Vec::new();
        for _ in 0..FLOWS {
            flows.push(Flow::start_with(path.clone()).await);
        }
        for flow in &mut flows {
            flow.app.write_all(b"x").await.unwrap();
        }
        for flow in &mut flows {
            flow.target.read_exact(&mut [0]).await.unwrap();
        }
        assert!(open(&path) <= 1);
    });
}

/// Bytes that the peer's kernel has not acknowledged.
fn in_flight(stream: &TcpStream) -> u64 {
    sockopt::unacknowledged(stream).unwrap()
}

/// Resets the connection once the kernel of its peer has acknowledged everything.
async fn reset_once_acknowledged(stream: TcpStream) {
    while in_flight(&stream) > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    reset_of(stream);
}

/// All bytes that come, and how the connection ends.
async fn read_all(from: &mut TcpStream) -> (usize, Result<(), io::ErrorKind>) {
    let (mut got, mut buf) = (0, vec![0; 64 * 1024]);
    loop {
        match from.read(&mut buf).await {
            Ok(0) => return (got, Ok(())),
            Ok(n) => got += n,
            Err(e) => return (got, Err(e.kind())),
        }
    }
}

/// What a side's kernel was acknowledged before that side reset its connection arrives, and the reset behind it.
#[test]
fn what_was_acknowledged_before_a_reset_arrives_in_front_of_it() {
    run_each(|way| async move {
        for by_app in [true, false] {
            for len in [1, 5_000, 1_000_000] {
                let flow = Flow::start(way).await;
                let Flow { app, target, path, relayed } = flow;
                let (mut sender, mut reader) = if by_app { (app, target) } else { (target, app) };
                let sent = async {
                    sender.write_all(&pattern(1, 0, len)).await.unwrap();
                    reset_once_acknowledged(sender).await;
                };
                let ((), got) = tokio::join!(sent, read_all(&mut reader));
                assert_eq!(
                    got,
                    (len, Err(io::ErrorKind::ConnectionReset)),
                    "{way:?}, by the application: {by_app}"
                );
                let said = end_of_flow(relayed).await.0;
                let whose = if by_app { EndReason::ClientReset } else { EndReason::TargetReset };
                assert_eq!(said, whose, "{way:?}");
                assert_eq!(in_use(&path), 0);
            }
        }
    });
}

/// A side that answers and closes without having read everything has its answer read, and then the reset.
#[test]
fn an_answer_in_front_of_a_close_with_bytes_unread_is_read() {
    const ANSWER: &[u8] = b"HTTP/1.1 413 x\r\nContent-Length: 3\r\n\r\nno\n";
    run_each(|way| async move {
        for by_app in [true, false] {
            for _ in 0..10 {
                let Flow { app, target, path: _path, relayed } = Flow::start(way).await;
                let (mut closes, mut sends) = if by_app { (app, target) } else { (target, app) };
                let answered = async {
                    closes.read_exact(&mut [0]).await.unwrap();
                    closes.write_all(ANSWER).await.unwrap();
                    drop(closes);
                };
                let heard = async {
                    let (mut read, mut write) = sends.split();
                    let chunk = pattern(1, 0, 64 * 1024);
                    let sent = async {
                        loop {
                            if let Err(e) = write.write_all(&chunk).await {
                                return e.kind();
                            }
                        }
                    };
                    let answer = async {
                        let mut got = Vec::new();
                        let end = read.read_to_end(&mut got).await;
                        (got, end.map_err(|e| e.kind()).map(drop))
                    };
                    tokio::join!(answer, sent)
                };
                let ((), ((got, end), sent)) = tokio::join!(answered, heard);
                assert_eq!(got, ANSWER, "{way:?}, by the application: {by_app}");
                // The kernel tells it once: who sends, or who reads.
                let reset = io::ErrorKind::ConnectionReset;
                assert!(sent == reset || end == Err(reset), "{way:?}: {sent:?}, {end:?}");
                end_of_flow(relayed).await;
            }
        }
    });
}

/// An error of a side that has ended takes nothing away from whoever has not read everything yet.
#[test]
fn an_error_behind_an_end_discards_nothing_in_front_of_it() {
    run_each(|way| async move {
        for by_app in [true, false] {
            let Flow { app, target, path: _path, relayed } = Flow::start(way).await;
            let (mut first, mut late) = if by_app { (app, target) } else { (target, app) };
            // More than the reader's socket holds, and a close behind it.
            let len = 1_500_000;
            first.write_all(&pattern(1, 0, len)).await.unwrap();
            drop(first);
            let mut got = vec![0; 100_000];
            late.read_exact(&mut got).await.unwrap();
            // Nobody is there any more who could take it: its kernel answers with RST.
            late.write_all(b"x").await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let got = read_all(&mut late).await;
            assert_eq!(got, (len - 100_000, Ok(())), "{way:?}, by the application: {by_app}");
            end_of_flow(relayed).await;
        }
    });
}

/// A side that reads only once it has written all it has hears of the other's reset, behind what that sent, although both
/// directions were full.
#[test]
fn a_side_that_writes_before_it_reads_hears_of_a_reset() {
    run_each(|way| async move {
        for by_app in [true, false] {
            let Flow { app, target, path: _path, relayed } = Flow::start(way).await;
            let (gone, mut left) = if by_app { (app, target) } else { (target, app) };
            fill(&gone).await;
            fill(&left).await;
            reset_of(gone);
            // More than there is room for.
            left.write_all(&pattern(2, 0, 1_000_000)).await.unwrap();
            assert_eq!(end_of(&mut left).await, Err(io::ErrorKind::ConnectionReset), "{way:?}");
            let whose = if by_app { EndReason::ClientReset } else { EndReason::TargetReset };
            assert_eq!(end_of_flow(relayed).await.0, whose, "{way:?}");
        }
    });
}

/// A reader that does not read holds a reset up for [`RESET_LINGER`], and no longer.
#[test]
fn a_reset_goes_ahead_of_bytes_that_do_not_move_after_a_while() {
    for way in WAYS {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let Flow { app, mut target, path: _path, relayed } = Flow::start(way).await;
            let sent = fill(&app).await;
            reset_of(app);
            // Nothing else happens: time passes as far as the next timer.
            tokio::time::pause();
            let began = tokio::time::Instant::now();
            let (said, ..) = relayed.await.unwrap();
            let waited = began.elapsed();
            tokio::time::resume();
            assert_eq!(said, EndReason::ClientReset, "{way:?}");
            assert!((RESET_LINGER..RESET_LINGER * 2).contains(&waited), "{way:?}: {waited:?}");
            let (got, end) = read_all(&mut target).await;
            assert!(
                got < sent && end == Err(io::ErrorKind::ConnectionReset),
                "{way:?}: {got} of {sent}, {end:?}"
            );
        });
    }
}
