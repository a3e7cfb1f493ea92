//! Whether this kernel repeats bytes to a socket whose bytes a program moves: found out with a connection of our own over
//! loopback, of which nothing is left behind. No step takes longer than [`PATIENCE`].
//!
//! A sender that has not heard that some bytes came may send them again together with new ones. TCP hands such a segment
//! to its reader as it is, and whoever reads the socket leaves out what it has had (`tcp_recvmsg_locked`,
//! `tcp_recv_skb`). `tcp_read_skb`, by which a verdict program is fed, does not, so that the program, and whoever reads or
//! is sent what it passes, gets those bytes twice.
//!
//! The segment is made with TCP_REPAIR (`tcp(7)` does not have it; CRIU does): the sending socket is put away without a
//! word, and another one made in its place which takes the last bytes for unsent.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    rc::Rc,
    time::Duration,
};

use socket2::{Domain, Socket, Type};

use super::map::{NoSlotPair, SlotPair, SpliceMap};
use crate::transport::sockopt::{option, set};

/// How long a step may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// What is sent first, how much of it is sent again, and what is new then.
const FIRST: &[u8] = b"0123456789";
const AGAIN: usize = 4;
const NEW: &[u8] = b"abcdef";

/// `linux/tcp.h`, as are all options here
const TCP_RECV_QUEUE: libc::c_int = 1;
const TCP_SEND_QUEUE: libc::c_int = 2;
const TCP_REPAIR_OFF_NO_WP: libc::c_int = -1;
/// `struct tcp_repair_window`: what the peer's window is taken for (`snd_wl1`, `snd_wnd`, `max_window`), and ours
/// (`rcv_wnd`, `rcv_wup`).
type RepairWindow = [u32; 5];

/// Whether a segment that overlaps what has come makes the kernel repeat those bytes, with the program in between.
pub(super) fn repeats(map: &Rc<SpliceMap>) -> io::Result<bool> {
    repeats_between(|receiver, beside| {
        SlotPair::take(map, receiver, beside).map_err(|e| {
            io::Error::other(match e {
                NoSlotPair::Full => "no place is free".to_owned(),
                NoSlotPair::Unmailed(e) => e.to_string(),
                NoSlotPair::Refused(why, _) => why,
            })
        })
    })
}

/// The same with whatever is done to both sockets before.
fn repeats_between<T>(join: impl FnOnce(&TcpStream, &TcpStream) -> io::Result<T>) -> io::Result<bool> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let connect = || -> io::Result<[TcpStream; 2]> {
        let one = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
        let (other, _) = listener.accept()?;
        other.set_read_timeout(Some(PATIENCE))?;
        Ok([one, other])
    };
    let [mut sender, mut receiver] = connect()?;
    // The other socket of the pair; nothing happens to it.
    let [_idle, beside] = connect()?;
    let _joined = join(&receiver, &beside)?;
    sender.write_all(FIRST)?;
    let mut got = [0; FIRST.len()];
    receiver.read_exact(&mut got)?;
    let mut again = replace(sender)?;
    again.write_all(&[&FIRST[FIRST.len() - AGAIN..], NEW].concat())?;
    let mut got = [0; AGAIN + NEW.len()];
    receiver.read_exact(&mut got[..NEW.len()])?;
    Ok(&got[..NEW.len()] != NEW)
}

/// Another socket in the place of this one, for which the last [`AGAIN`] bytes are not sent.
fn replace(old: TcpStream) -> io::Result<Socket> {
    let old = Socket::from(old);
    let (local, peer) = (old.local_addr()?, old.peer_addr()?);
    set(&old, libc::TCP_REPAIR, 1i32)?;
    let sent = sequence(&old, TCP_SEND_QUEUE)?.wrapping_sub(u32::try_from(AGAIN).unwrap_or(0));
    let received = sequence(&old, TCP_RECV_QUEUE)?;
    let window: RepairWindow = option(&old, libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW)?;
    // Under repair this says nothing to the peer.
    drop(old);
    let new = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None)?;
    new.set_reuse_address(true)?;
    set(&new, libc::TCP_REPAIR, 1i32)?;
    new.bind(&local)?;
    for (queue, at) in [(TCP_SEND_QUEUE, sent), (TCP_RECV_QUEUE, received)] {
        set(&new, libc::TCP_REPAIR_QUEUE, queue)?;
        set(&new, libc::TCP_QUEUE_SEQ, at.cast_signed())?;
    }
    new.connect(&peer)?;
    set(&new, libc::TCP_REPAIR_WINDOW, window)?;
    // Without a probe of the peer's window, which would tell of what has come.
    set(&new, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)?;
    Ok(new)
}

/// The next sequence number of one queue of a socket under repair.
fn sequence(socket: &Socket, queue: libc::c_int) -> io::Result<u32> {
    set(socket, libc::TCP_REPAIR_QUEUE, queue)?;
    option(socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ)
}

#[cfg(test)]
mod tests {
    use tunnel_common::fastpath::splice::MAIL_MAX;

    use super::*;

    #[test]
    fn what_is_sent_again_with_new_bytes_comes_once_with_the_program_and_without() {
        let map = Rc::new(SpliceMap::load(0, 0, MAIL_MAX).unwrap());
        for _ in 0..20 {
            assert!(!repeats_between(|_, _| Ok(())).unwrap(), "TCP itself");
            assert!(!repeats(&map).unwrap(), "the program");
        }
    }

    #[test]
    fn of_what_was_read_in_part_the_rest_comes_once() {
        let map = Rc::new(SpliceMap::load(0, 0, MAIL_MAX).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || {
            let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            [one, listener.accept().unwrap().0]
        };
        let ([mut sender, mut receiver], [_idle, beside]) = (connect(), connect());
        // Longer than what one call takes off a buffer.
        let text: Vec<u8> = (0..40_000_u32).map(|n| (n % 251) as u8).collect();
        let (first, second) = text.split_at(30_000);
        sender.write_all(first).unwrap();
        let mut got = vec![0; text.len()];
        receiver.read_exact(&mut got[..20_001]).unwrap();
        let _slots = SlotPair::take(&map, &receiver, &beside).ok().expect("a place");
        sender.write_all(second).unwrap();
        receiver.read_exact(&mut got[20_001..]).unwrap();
        assert!(got == text);
        receiver.set_nonblocking(true).unwrap();
        assert_eq!(receiver.read(&mut got).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
