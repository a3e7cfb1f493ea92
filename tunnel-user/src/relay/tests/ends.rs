//! How flows end, in each of the ways to move their bytes.

use crate::relay::{
    copy::Direction,
    ends::{self, State, step},
};

use super::*;

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
        let of_way = way.path();
        for by_app in [true, false] {
            for idle in [true, false] {
                let mut flow = Flow::start_with(of_way.clone()).await;
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
        let of_way = way.path();
        for after_end in [false, true] {
            let flow = Flow::start_with(of_way.clone()).await;
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
    crate::transport::sockopt::unacknowledged(stream).unwrap()
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
        let of_way = way.path();
        for by_app in [true, false] {
            for len in [1, 5_000, 1_000_000] {
                let flow = Flow::start_with(of_way.clone()).await;
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
        let of_way = way.path();
        for by_app in [true, false] {
            for _ in 0..10 {
                let Flow { app, target, path: _path, relayed } = Flow::start_with(of_way.clone()).await;
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
        let of_way = way.path();
        for by_app in [true, false] {
            let Flow { app, target, path: _path, relayed } = Flow::start_with(of_way.clone()).await;
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

/// From here on whatever arrives for a socket is lost, also what would be acknowledged.
fn lose_what_arrives(stream: &TcpStream) {
    // `ret #0`: nothing of a packet is kept (Documentation/networking/filter.rst).
    let drop_all = socket2::SockFilter::new(0x06, 0, 0, 0);
    SockRef::from(stream).attach_filter(&[drop_all]).unwrap();
}

/// An end that was under way when its peer reset the connection is not waited for: nobody will acknowledge it.
#[test]
fn an_end_that_crosses_a_reset_does_not_keep_a_flow() {
    const MOMENT: Duration = Duration::from_millis(50);
    run_each(|way| async move {
        let of_way = way.path();
        for by_app in [true, false] {
            for bytes in [&b""[..], b"more"] {
                let Flow { app, target, path: _path, relayed } = Flow::start_with(of_way.clone()).await;
                let (mut first, mut other) = if by_app { (app, target) } else { (target, app) };
                first.write_all(b"x").await.unwrap();
                other.read_exact(&mut [0]).await.unwrap();
                lose_what_arrives(&other);
                first.write_all(bytes).await.unwrap();
                first.shutdown().await.unwrap();
                tokio::time::sleep(MOMENT).await;
                drop(first);
                // Nobody is there who takes it.
                other.write_all(b"y").await.unwrap();
                tokio::time::sleep(MOMENT).await;
                reset_of(other);
                end_of_flow(relayed).await;
            }
        }
    });
}

/// A leg at which nothing happens, with something that its peer has not acknowledged.
struct Quiet;

impl Leg for Quiet {
    fn prefetches(&self) -> bool {
        false
    }

    fn poll_recv(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        Poll::Pending
    }

    fn accepted(&mut self, _n: usize) {}

    fn poll_send(&mut self, _cx: &mut Context<'_>, _queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        Poll::Pending
    }

    fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        Poll::Pending
    }

    fn poll_broken(&mut self, _cx: &mut Context<'_>) -> Poll<Broken> {
        Poll::Pending
    }

    fn unacknowledged(&self) -> u64 {
        1
    }

    fn close(&mut self) {}

    fn release(&mut self) {}

    fn abort(&mut self) {}
}

/// A target that has reset the connection acknowledges nothing any more, whoever noticed the reset and however the other
/// direction ended; one that has ended in order still may.
#[test]
fn nothing_is_waited_for_from_a_target_that_is_gone() {
    let reset = || Broken::Reset(Cause::Tcp(io::ErrorKind::ConnectionReset.into()));
    run_each(|_| async move {
        for (before, is_gone) in
            [(State::Failing(reset()), true), (State::Draining, false), (State::Done, false)]
        {
            let mut down = Direction::new(Box::new(Queue::default()), 0, before);
            // The client takes no more.
            down.stop(Some(reset()));
            let mut up = Direction::new(Box::new(Queue::default()), 0, State::Done);
            let (meter, mut linger) = (Meter::default(), ends::Linger::default());
            let ended = std::future::poll_fn(|cx| {
                Poll::Ready(step(cx, &mut Quiet, &mut Quiet, &meter, &mut up, &mut down, &mut linger))
            });
            assert_eq!(ended.await.is_ready(), is_gone);
        }
    });
}

/// A side that reads only once it has written all it has hears of the other's reset, behind what that sent, although both
/// directions were full.
#[test]
fn a_side_that_writes_before_it_reads_hears_of_a_reset() {
    run_each(|way| async move {
        let of_way = way.path();
        for by_app in [true, false] {
            let Flow { app, target, path: _path, relayed } = Flow::start_with(of_way.clone()).await;
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
