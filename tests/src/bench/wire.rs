//! What a TLS handshake agreed on, read off the wire: version, cipher and group of the last ServerHello from one address.
//!
//! A ServerHello is never encrypted (RFC 8446 section 4.1.3), and both sides have seen it. Headers are read as a peer's bytes.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use nix::sys::{
    socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt},
    time::TimeVal,
};

use super::model::Tls;
use crate::netns::NetNs;

/// No packet of the cables here is larger: 64 KiB is the most that segmentation offload puts together.
const PACKET_MAX: usize = 64 * 1024;
/// How soon the witness notices that it is no longer wanted, in microseconds.
const WAKE: i64 = 50_000;

/// Somebody who watches a cable.
#[derive(Debug)]
pub(super) struct Witness {
    watching: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Option<Tls>>>,
}

impl Witness {
    /// Watches what arrives in `host` from `server`; returns when nothing can be missed any more.
    pub(super) fn start(host: &NetNs, server: SocketAddr) -> Result<Self> {
        let packets = host.run(open).context("a packet socket")?;
        let (stop, seen) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Option<Tls>>>::default());
        let (stopped, note) = (Arc::clone(&stop), Arc::clone(&seen));
        let watch = move || {
            let mut packet = vec![0; PACKET_MAX];
            while !stopped.load(Ordering::Relaxed) {
                // The time-out, or a device that went away.
                let Ok(n) = recv(packets.as_raw_fd(), &mut packet, MsgFlags::empty()) else { continue };
                if let Some(tls) = packet.get(..n).and_then(|p| from_server(p, server)).and_then(server_hello)
                {
                    *note.lock().unwrap_or_else(PoisonError::into_inner) = Some(tls);
                }
            }
        };
        Ok(Self { watching: Some(host.spawn("witness", watch)?), stop, seen })
    }

    /// What was agreed on, if anything was.
    pub(super) fn finish(mut self) -> Option<Tls> {
        self.end();
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(watching) = self.watching.take() {
            let _panicked = watching.join();
        }
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.end();
    }
}

/// A socket that gets a copy of every packet of the thread's namespace, from the IP header on (packet(7)).
fn open() -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(0, WAKE))?;
    Ok(fd)
}

/// The payload of a TCP segment over IPv4 from this address.
fn from_server(packet: &[u8], server: SocketAddr) -> Option<&[u8]> {
    const TCP: u8 = 6;
    let first = *packet.first()?;
    if first >> 4 != 4 || *packet.get(9)? != TCP {
        return None;
    }
    let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    let segment = packet.get(usize::from(first & 0xf) * 4..)?;
    let port = u16::from_be_bytes(segment.get(..2)?.try_into().ok()?);
    let is_servers = IpAddr::V4(Ipv4Addr::from(source)) == server.ip() && port == server.port();
    let payload = usize::from(*segment.get(12)? >> 4) * 4;
    segment.get(payload..).filter(|_| is_servers)
}

/// A ServerHello that starts these bytes (RFC 8446 sections 4.1.3 and 5.1).
fn server_hello(bytes: &[u8]) -> Option<Tls> {
    const HANDSHAKE: u8 = 22;
    const SERVER_HELLO: u8 = 2;
    let mut rest = Reader(bytes);
    (rest.u8()? == HANDSHAKE).then_some(())?;
    let _legacy_version = rest.u16()?;
    let record = rest.u16()?;
    let mut rest = Reader(rest.take(record.into())?);
    (rest.u8()? == SERVER_HELLO).then_some(())?;
    let _length = rest.take(3)?;
    let legacy_version = rest.u16()?;
    let _random = rest.take(32)?;
    let session = rest.u8()?;
    rest.take(session.into())?;
    let cipher = rest.u16()?;
    let _compression = rest.u8()?;
    let (mut version, mut group) = (legacy_version, None);
    let extensions = rest.u16().unwrap_or(0);
    let mut extensions = Reader(rest.take(extensions.into())?);
    while let Some(kind) = extensions.u16() {
        const KEY_SHARE: u16 = 51;
        const SUPPORTED_VERSIONS: u16 = 43;
        let length = extensions.u16()?;
        let mut extension = Reader(extensions.take(length.into())?);
        match kind {
            SUPPORTED_VERSIONS => version = extension.u16()?,
            KEY_SHARE => group = extension.u16(),
            _ => {}
        }
    }
    Some(Tls {
        version: version_name(version),
        cipher: cipher_name(cipher),
        group: group.map_or("none".to_owned(), group_name),
    })
}

/// The rest of a message.
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, n: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }
}

fn version_name(version: u16) -> String {
    match version {
        0x0303 => "TLS 1.2".to_owned(),
        0x0304 => "TLS 1.3".to_owned(),
        other => format!("0x{other:04x}"),
    }
}

/// Those of TLS 1.3 by name (RFC 8446 appendix B.4), others by number.
fn cipher_name(cipher: u16) -> String {
    match cipher {
        0x1301 => "TLS_AES_128_GCM_SHA256".to_owned(),
        0x1302 => "TLS_AES_256_GCM_SHA384".to_owned(),
        0x1303 => "TLS_CHACHA20_POLY1305_SHA256".to_owned(),
        other => format!("0x{other:04x}"),
    }
}

/// IANA's "TLS Supported Groups".
fn group_name(group: u16) -> String {
    match group {
        0x0017 => "secp256r1".to_owned(),
        0x0018 => "secp384r1".to_owned(),
        0x001d => "x25519".to_owned(),
        0x11ec => "X25519MLKEM768".to_owned(),
        other => format!("0x{other:04x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ServerHello of RFC 8448 section 3, in its record.
    const HELLO: &str = "160303005a020000560303a6af06a4121860dc5e6e60249cd34c95930c8ac5cb1434dac155772ed3e2692800\
                         130100002e00330024001d0020c9828876112095fe66762bdbf7c672e156d6cc253b833df1dd69b1b04e751f0f\
                         002b00020304";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| {
            let text = std::str::from_utf8(pair).expect("hexadecimal digits");
            u8::from_str_radix(text, 16).expect("hexadecimal digits")
        };
        digits.chunks(2).map(byte).collect()
    }

    #[test]
    fn the_server_hello_of_rfc_8448_names_what_was_agreed_on() {
        let tls = server_hello(&bytes(HELLO)).expect("a ServerHello");
        assert_eq!((tls.version.as_str(), tls.cipher.as_str()), ("TLS 1.3", "TLS_AES_128_GCM_SHA256"));
        assert_eq!(tls.group, "x25519");
    }

    #[test]
    fn what_is_cut_short_or_something_else_is_no_server_hello() {
        let hello = bytes(HELLO);
        for end in 0..hello.len() {
            assert_eq!(server_hello(&hello[..end]), None, "{end} bytes");
        }
        assert_eq!(server_hello(b"HTTP/1.1 200 OK\r\n"), None);
        assert_eq!(from_server(&[0x4f; 30], ([79, 79, 79, 79], 1).into()), None);
    }
}
