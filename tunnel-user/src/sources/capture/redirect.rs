//! Connections that a rule of the operator's redirected: conntrack knows where they wanted to go.
//!
//! # Invariants
//! - A connection that nobody redirected, or whose destination is one of our own listeners, is no flow: it would come back for
//!   ever.

use std::{io, net::SocketAddr};

use socket2::SockRef;
use tokio::net::TcpStream;

use super::accept::Stray;
use crate::{kernel::own::OwnListeners, model::flow::OriginalDst};

/// Where the connection wanted to go before REDIRECT changed it (`SO_ORIGINAL_DST` of
/// `linux/netfilter_ipv4.h`, `IP6T_SO_ORIGINAL_DST` of `linux/netfilter_ipv6/ip6_tables.h`). conntrack knows
/// a destination for every connection that it follows, also for those that no rule has changed.
pub fn original_dst(stream: &TcpStream, own: &OwnListeners) -> Result<OriginalDst, Stray> {
    let local = stream.local_addr().map_err(Stray::NotRedirected)?;
    let socket = SockRef::from(stream);
    // A listener on [::] takes IPv4 too, which conntrack follows as IPv4.
    let v4 = local.ip().to_canonical().is_ipv4();
    let found = if v4 { socket.original_dst_v4() } else { socket.original_dst_v6() };
    let found = found.map_err(Stray::NotRedirected)?;
    let dst = found.as_socket().ok_or_else(|| Stray::NotRedirected(io::ErrorKind::InvalidData.into()))?;
    let same = |a: SocketAddr, b: SocketAddr| a.port() == b.port() && a.ip() == b.ip();
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    if same(dst, local) || own.contains(dst) {
        return Err(Stray::ToUs(OriginalDst(dst)));
    }
    Ok(OriginalDst(dst))
}

/// Whether this kernel could be asked: it has conntrack, and loaded.
pub fn available() -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    match socket.original_dst_v4() {
        // It does not know this connection, which is none.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_nobody_redirected_has_no_origin() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let _client = std::net::TcpStream::connect(addr).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let own = OwnListeners::new(&[addr]);
        // Which of them it is depends on whether conntrack follows loopback connections here.
        match original_dst(&stream, &own) {
            Err(Stray::NotRedirected(_)) => {}
            Err(Stray::ToUs(OriginalDst(dst))) => assert_eq!(dst, addr),
            other => panic!("{other:?}"),
        }
    }
}
