//! The program on real sockets, as root.

#![expect(clippy::disallowed_methods, reason = "threads of a test, none of which is a worker")]

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tunnel_common::fastpath::bypass::{Budget, QUEUE_MAX};

use super::*;

/// The application's socket and ours, not blocking.
fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let application = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    for socket in [&application, &ours] {
        socket.set_nonblocking(true).unwrap();
        socket.set_nodelay(true).unwrap();
    }
    (application, ours)
}

fn load() -> Arc<Bypass> {
    Bypass::load().expect("run as root, on a kernel with BTF")
}

fn pair(bypass: &Arc<Bypass>, application: &TcpStream, ours: &TcpStream) -> Pair {
    bypass.pair(application.as_fd(), ours.as_fd()).expect("both are established")
}

fn wait(socket: &TcpStream, what: PollFlags) {
    let mut fds = [PollFd::new(socket.as_fd(), what)];
    let ready = poll(&mut fds, PollTimeout::from(10_000u16)).unwrap();
    assert!(ready > 0, "nothing happened for ten seconds: {what:?}");
}

fn read_some(mut socket: &TcpStream, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.read(buf) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => wait(socket, PollFlags::POLLIN),
            done => return done,
        }
    }
}

fn read_all(socket: &TcpStream, mut buf: &mut [u8]) {
    while !buf.is_empty() {
        let n = read_some(socket, buf).unwrap();
        assert!(n > 0, "the end came early");
        buf = &mut buf[n..];
    }
}

fn write_all(mut socket: &TcpStream, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match socket.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == ErrorKind::WouldBlock => wait(socket, PollFlags::POLLOUT),
            Err(e) => panic!("{e}"),
        }
    }
}

fn exchange(application: &TcpStream, ours: &TcpStream) {
    let mut got = [0; 4];
    write_all(application, b"ping");
    read_all(ours, &mut got);
    assert_eq!(&got, b"ping");
    write_all(ours, b"pong");
    read_all(application, &mut got);
    assert_eq!(&got, b"pong");
}

/// Joined, and quiet: what comes next is redirected.
fn joined(bypass: &Arc<Bypass>) -> (TcpStream, TcpStream, Pair) {
    let (application, ours) = sockets();
    let pair = pair(bypass, &application, &ours);
    pair.open(APPLICATION);
    pair.open(DAEMON);
    for _ in 0..3 {
        exchange(&application, &ours);
    }
    // The last answer is not acknowledged yet.
    let until = Instant::now() + Duration::from_secs(5);
    while pair.redirected(DAEMON) == 0 {
        assert!(Instant::now() < until, "nothing is redirected");
        exchange(&application, &ours);
    }
    (application, ours, pair)
}

#[test]
fn an_exchange_goes_past_tcp_in_both_directions_once_both_have_sent() {
    let bypass = load();
    let (application, ours, pair) = joined(&bypass);
    let passed = [pair.passed(APPLICATION), pair.passed(DAEMON)];
    let redirected = [pair.redirected(APPLICATION), pair.redirected(DAEMON)];
    for _ in 0..100 {
        exchange(&application, &ours);
    }
    assert_eq!([pair.passed(APPLICATION), pair.passed(DAEMON)], passed, "something went by TCP");
    assert_eq!(pair.redirected(APPLICATION), redirected[0] + 400);
    assert_eq!(pair.redirected(DAEMON), redirected[1] + 400);
}

#[test]
fn nothing_is_redirected_while_the_gates_are_shut() {
    let bypass = load();
    let (application, ours) = sockets();
    let pair = pair(&bypass, &application, &ours);
    for _ in 0..100 {
        exchange(&application, &ours);
    }
    assert_eq!(pair.redirected(APPLICATION) + pair.redirected(DAEMON), 0);
    assert!(pair.passed(APPLICATION) > 0);
}

#[test]
fn what_waits_is_charged_to_its_reader_and_seen() {
    let bypass = load();
    let (application, ours, pair) = joined(&bypass);
    assert_eq!(pair.look(), Waiting { queued: 0 });
    write_all(&ours, &[7; 1000]);
    assert_eq!(pair.look(), Waiting { queued: 1000 });
    let mut got = [0; 1000];
    read_all(&application, &mut got);
    assert_eq!(pair.look(), Waiting { queued: 0 });
    // What nobody will read any more is not waited for.
    write_all(&ours, &[7; 1000]);
    drop(application);
    let until = Instant::now() + Duration::from_secs(5);
    while pair.look().queued != 0 {
        assert!(Instant::now() < until, "a closed socket holds what it has not read");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The peer has shut its direction down.
const RDHUP: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);

/// What a program that does not block sees of one exchange with its peer.
fn observed(application: &TcpStream, ours: &TcpStream) -> Vec<String> {
    let fd = application.as_raw_fd();
    let mut seen = Vec::new();
    let mut buf = [0; 64];
    let mut note = |what: &str, n: io::Result<i64>| {
        seen.push(format!("{what}: {}", n.map_or_else(|e| e.to_string(), |n| n.to_string())));
    };
    let result = |n: libc::ssize_t| {
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(i64::try_from(n).unwrap()) }
    };
    let recv = |buf: &mut [u8], flags| {
        // SAFETY: `buf` is valid for writes of its length.
        result(unsafe { libc::recv(fd, buf.as_mut_ptr().cast(), buf.len(), flags) })
    };
    let unread = || {
        let mut n: libc::c_int = -1;
        // SAFETY: `n` is valid for a write.
        result(unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut n) } as libc::ssize_t).map(|_| i64::from(n))
    };
    let ready = || {
        let events = libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP;
        let mut one = libc::pollfd { fd, events, revents: 0 };
        // SAFETY: one entry, valid for a read and a write.
        result(unsafe { libc::poll(&raw mut one, 1, 0) } as libc::ssize_t).map(|_| i64::from(one.revents))
    };
    note("recv of nothing", recv(&mut buf, 0));
    note("poll with nothing", ready());
    write_all(ours, b"0123456789");
    wait(application, PollFlags::POLLIN);
    note("poll", ready());
    note("FIONREAD", unread());
    note("MSG_PEEK", recv(&mut buf[..4], libc::MSG_PEEK));
    note("FIONREAD behind a peek", unread());
    note("a part", recv(&mut buf[..4], 0));
    note("FIONREAD of the rest", unread());
    note("MSG_WAITALL", recv(&mut buf, libc::MSG_WAITALL));
    note("recv again", recv(&mut buf, 0));
    note("MSG_DONTWAIT", recv(&mut buf, libc::MSG_DONTWAIT));
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let mut offset: libc::off_t = 0;
    // SAFETY: both descriptors are open, and `offset` is valid for a read and a write.
    note("sendfile", result(unsafe { libc::sendfile(fd, file.as_raw_fd(), &raw mut offset, 5000) }));
    read_all(ours, &mut [0; 5000]);
    let parts = [io::IoSlice::new(b"ab"), io::IoSlice::new(b""), io::IoSlice::new(b"cde")];
    note("writev", (&mut &*application).write_vectored(&parts).map(|n| i64::try_from(n).unwrap()));
    read_all(ours, &mut buf[..5]);
    note("what came", Ok(i64::from(&buf[..5] == b"abcde")));
    // SAFETY: the buffer is valid for reads of its length.
    note("MSG_MORE", result(unsafe { libc::send(fd, b"xyz".as_ptr().cast(), 3, libc::MSG_MORE) }));
    write_all(application, b"!");
    read_all(ours, &mut buf[..4]);
    note("behind it", Ok(i64::from(&buf[..4] == b"xyz!")));
    write_all(ours, b"bye");
    ours.shutdown(Shutdown::Write).unwrap();
    wait(application, RDHUP);
    note("poll at the end", ready());
    note("the last bytes", recv(&mut buf, 0));
    note("the end", recv(&mut buf, 0));
    note("the end again", recv(&mut buf, 0));
    application.shutdown(Shutdown::Write).unwrap();
    note("send behind one's own end", (&*application).write(b"x").map(|n| i64::try_from(n).unwrap()));
    seen
}

#[test]
fn a_program_that_does_not_block_sees_what_it_sees_with_tcp() {
    let (application, ours) = sockets();
    let by_tcp = observed(&application, &ours);
    let bypass = load();
    let (application, ours, pair) = joined(&bypass);
    let before = pair.redirected(APPLICATION);
    assert_eq!(observed(&application, &ours), by_tcp);
    assert!(pair.redirected(APPLICATION) > before, "nothing of it went past TCP");
}

/// Sends until nothing more is taken; how much that was.
fn fill(mut socket: &TcpStream, chunk: usize, mut next: u8) -> Vec<u8> {
    let mut sent = Vec::new();
    let mut quiet = Instant::now();
    while quiet.elapsed() < Duration::from_millis(300) {
        let bytes: Vec<u8> = (0..chunk)
            .map(|_| {
                next = next.wrapping_mul(31).wrapping_add(7);
                next
            })
            .collect();
        match socket.write(&bytes) {
            Ok(n) => {
                sent.extend_from_slice(&bytes[..n]);
                next = *sent.last().unwrap();
                quiet = Instant::now();
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(5)),
            Err(e) => panic!("{e}"),
        }
        assert!(sent.len() < 64 << 20, "there is no bound");
    }
    sent
}

#[test]
fn an_application_that_writes_to_a_reader_that_does_not_is_stopped_and_nothing_is_lost() {
    let bypass = load();
    for chunk in [100_000, 3000] {
        let (application, ours, _pair) = joined(&bypass);
        let sent = fill(&application, chunk, 1);
        assert!(sent.len() <= 8 << 20, "{} bytes are held", sent.len());
        application.shutdown(Shutdown::Write).unwrap();
        let mut got = vec![0; sent.len()];
        read_all(&ours, &mut got);
        assert!(got == sent, "bytes differ");
        assert_eq!(read_some(&ours, &mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn the_end_comes_behind_what_is_queued_both_ways() {
    let bypass = load();
    let (application, ours, _pair) = joined(&bypass);
    write_all(&application, b"request");
    application.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&application).write(b"more").unwrap_err().kind(), ErrorKind::BrokenPipe);
    let mut got = [0; 7];
    read_all(&ours, &mut got);
    assert_eq!(&got, b"request");
    assert_eq!(read_some(&ours, &mut got).unwrap(), 0);
    // Half-closed: the answer still goes the short way.
    write_all(&ours, b"answer!");
    ours.shutdown(Shutdown::Write).unwrap();
    read_all(&application, &mut got);
    assert_eq!(&got, b"answer!");
    assert_eq!(read_some(&application, &mut got).unwrap(), 0);
}

#[test]
fn who_closes_with_bytes_on_their_way_has_them_delivered() {
    let bypass = load();
    let (application, ours, _pair) = joined(&bypass);
    write_all(&application, b"last words");
    drop(application);
    let mut got = [0; 10];
    read_all(&ours, &mut got);
    assert_eq!(&got, b"last words");
    assert_eq!(read_some(&ours, &mut got).unwrap(), 0);
}

#[test]
fn a_reset_is_a_reset_behind_what_was_queued() {
    let bypass = load();
    let (application, ours, _pair) = joined(&bypass);
    write_all(&ours, b"queued");
    socket2::SockRef::from(&ours).set_linger(Some(Duration::ZERO)).unwrap();
    drop(ours);
    let mut got = [0; 6];
    read_all(&application, &mut got);
    assert_eq!(&got, b"queued");
    assert_eq!(read_some(&application, &mut got).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn when_the_maps_are_gone_the_sockets_go_on_by_tcp() {
    let bypass = load();
    let (application, ours, pair) = joined(&bypass);
    drop(pair);
    exchange(&application, &ours);
    drop(bypass);
    thread::sleep(Duration::from_millis(100));
    for _ in 0..10 {
        exchange(&application, &ours);
    }
}

/// As [`write_all`], within a budget as the daemon keeps it; switches between the ways now and then.
fn write_within(pair: &Pair, socket: &TcpStream, mut bytes: &[u8], budget: &mut Option<Budget>) {
    let drained = || {
        let until = Instant::now() + Duration::from_secs(10);
        while pair.look().queued != 0 {
            assert!(Instant::now() < until, "the application does not read");
            thread::sleep(Duration::from_micros(200));
        }
    };
    if below(20) == 0 {
        match budget {
            Some(_) => {
                drained();
                pair.shut(DAEMON);
                *budget = None;
            }
            None => {
                pair.open(DAEMON);
                *budget = Some(Budget::default());
            }
        }
    }
    while !bytes.is_empty() {
        let mut now = bytes.len();
        if let Some(budget) = budget {
            if budget.room() == 0 {
                drained();
                *budget = Budget::default();
            }
            now = now.min(budget.room() as usize);
        }
        match (&*socket).write(&bytes[..now]) {
            Ok(n) => {
                if let Some(budget) = budget {
                    budget.spend(u32::try_from(n).unwrap());
                }
                bytes = &bytes[n..];
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => wait(socket, PollFlags::POLLOUT),
            Err(e) => panic!("{e}"),
        }
    }
}

/// A number below `most`.
fn below(most: u64) -> u64 {
    fastrand::u64(..most)
}

/// Bytes that say where in the stream they stand.
fn byte_at(position: u64) -> u8 {
    (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn check(socket: &TcpStream) -> u64 {
    let mut buf = vec![0; 100_000];
    let mut position = 0;
    loop {
        let size = 1 + usize::try_from(below(buf.len() as u64)).unwrap();
        let n = read_some(socket, &mut buf[..size]).unwrap();
        if n == 0 {
            return position;
        }
        for (i, byte) in buf[..n].iter().enumerate() {
            assert_eq!(*byte, byte_at(position + i as u64), "at {}", position + i as u64);
        }
        position += n as u64;
        if below(50) == 0 {
            thread::sleep(Duration::from_micros(below(3000)));
        }
    }
}

#[test]
fn bytes_arrive_once_and_in_order_in_full_duplex_while_the_way_changes() {
    const TIME: Duration = Duration::from_secs(5);
    let bypass = load();
    let (application, ours) = sockets();
    let pair = pair(&bypass, &application, &ours);
    let until = Instant::now() + TIME;
    let (mut switches, mut sent) = (0, [0, 0]);
    let message = |position: u64| -> Vec<u8> {
        let size = match below(10) {
            0 => below(300_000),
            1..4 => below(20_000),
            _ => below(300),
        };
        (0..=size).map(|i| byte_at(position + i)).collect()
    };
    thread::scope(|scope| {
        let up = scope.spawn(|| {
            let mut position = 0;
            while Instant::now() < until {
                let bytes = message(position);
                write_all(&application, &bytes);
                position += bytes.len() as u64;
                if below(10) == 0 {
                    thread::sleep(Duration::from_micros(below(2000)));
                }
            }
            application.shutdown(Shutdown::Write).unwrap();
            position
        });
        let down = scope.spawn(|| {
            let (mut position, mut budget) = (0, None);
            let mut switches = 0;
            while Instant::now() < until {
                let bytes = message(position);
                let before = budget.is_some();
                write_within(&pair, &ours, &bytes, &mut budget);
                switches += u32::from(before != budget.is_some());
                if below(20) == 0 {
                    if below(2) == 0 {
                        pair.open(APPLICATION);
                    } else {
                        pair.shut(APPLICATION);
                    }
                    switches += 1;
                }
                position += bytes.len() as u64;
                if below(10) == 0 {
                    thread::sleep(Duration::from_micros(below(2000)));
                }
            }
            ours.shutdown(Shutdown::Write).unwrap();
            (position, switches)
        });
        let received_up = scope.spawn(|| check(&ours));
        let received_down = scope.spawn(|| check(&application));
        sent[0] = up.join().unwrap();
        (sent[1], switches) = down.join().unwrap();
        assert_eq!(received_up.join().unwrap(), sent[0]);
        assert_eq!(received_down.join().unwrap(), sent[1]);
    });
    println!(
        "{sent:?} bytes, {switches} switches, redirected {} {}",
        pair.redirected(APPLICATION),
        pair.redirected(DAEMON)
    );
    assert!(switches > 10);
    assert!(pair.redirected(APPLICATION) > 0 && pair.redirected(DAEMON) > 0);
    assert!(u64::from(QUEUE_MAX) < sent[0]);
}
