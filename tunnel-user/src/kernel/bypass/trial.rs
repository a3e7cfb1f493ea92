//! Self-test of bypass on a connection of our own, before any application's is touched.
//!
//! It shows that the program redirects on this kernel, and that what it redirects is charged to its reader, which bounds the queue
//! (Linux 6.13, "tcp_bpf: Add sk_rmem_alloc related logic for tcp_bpf ingress redirection"). No version number is trusted.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tunnel_common::fastpath::bypass::{APPLICATION, DAEMON};

use super::{Bypass, BypassError};

/// Exchanges until both have sent and nothing is on its way: the second one is, unless an acknowledgement is late.
const EXCHANGES: u32 = 8;
/// What is left unread, to see it charged.
const UNREAD: [u8; 1000] = [0; 1000];
/// No answer of our own by then is none.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was written already, and is here as soon as the kernel has brought it.
fn read(from: &mut &TcpStream, mut into: &mut [u8]) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    while !into.is_empty() {
        match from.read(into) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => into = &mut into[n..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => thread::yield_now(),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

pub(super) fn run(bypass: &Arc<Bypass>) -> Result<(), BypassError> {
    let connected = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let theirs = TcpStream::connect(listener.local_addr()?)?;
        let (ours, _) = listener.accept()?;
        for socket in [&theirs, &ours] {
            socket.set_nodelay(true)?;
            socket.set_nonblocking(true)?;
        }
        Ok((theirs, ours))
    };
    let (theirs, ours) = connected().map_err(BypassError::Trial)?;
    let pair = bypass.pair(theirs.as_fd(), ours.as_fd()).map_err(BypassError::Trial)?;
    pair.open(APPLICATION);
    pair.open(DAEMON);
    for _ in 0..EXCHANGES {
        for (mut from, mut to) in [(&theirs, &ours), (&ours, &theirs)] {
            let mut got = [0];
            from.write_all(b"x").and_then(|()| read(&mut to, &mut got)).map_err(BypassError::Trial)?;
        }
    }
    if pair.redirected(APPLICATION) == 0 || pair.redirected(DAEMON) == 0 {
        return Err(BypassError::Proof(
            "nothing was redirected, or TCP memory (net.ipv4.tcp_mem) is exhausted",
        ));
    }
    let charged = |n: usize| u32::try_from(n).is_ok_and(|n| pair.look().queued == n);
    (&ours).write_all(&UNREAD).map_err(BypassError::Trial)?;
    if !charged(UNREAD.len()) {
        return Err(BypassError::Proof(
            "redirected bytes are not charged to their reader, so they would be unbounded",
        ));
    }
    read(&mut &theirs, &mut UNREAD.clone()).map_err(BypassError::Trial)?;
    if !charged(0) {
        return Err(BypassError::Proof("bytes stay charged to their reader after they were read"));
    }
    Ok(())
}
