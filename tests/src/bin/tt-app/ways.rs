//! Ways to connect that an application may use besides connect(2) on a blocking socket, with the system calls that a
//! program would make.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::{AsRawFd, FromRawFd as _, IntoRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn6, SockaddrStorage, bind, connect, getsockopt,
        setsockopt, socket, sockopt,
    },
};
use tunnel_tests::target::reset;

use super::{PATIENCE, names, result};

fn tcp(family: AddressFamily, flags: SockFlag) -> Result<OwnedFd> {
    Ok(socket(family, SockType::Stream, flags | SockFlag::SOCK_CLOEXEC, None)?)
}

fn stream(fd: OwnedFd) -> Result<TcpStream> {
    // SAFETY: the descriptor is an open TCP socket, and ours.
    let stream = unsafe { TcpStream::from_raw_fd(fd.into_raw_fd()) };
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn family(addr: SocketAddr) -> AddressFamily {
    if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// An IPv6 socket that connects to an IPv4 address.
pub(super) fn v4mapped(addr: SocketAddr) -> Result<TcpStream> {
    let IpAddr::V4(ip) = addr.ip() else { bail!("{addr} is not IPv4") };
    let fd = tcp(AddressFamily::Inet6, SockFlag::empty())?;
    let mapped: SockaddrIn6 = std::net::SocketAddrV6::new(ip.to_ipv6_mapped(), addr.port(), 0, 0).into();
    connect(fd.as_raw_fd(), &mapped).context("connect")?;
    let stream = stream(fd)?;
    println!("peer={}", stream.peer_addr()?);
    Ok(stream)
}

/// connect() that returns at once, poll(), SO_ERROR.
pub(super) fn nonblocking(addr: SocketAddr) -> Result<TcpStream> {
    let fd = tcp(family(addr), SockFlag::SOCK_NONBLOCK)?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(addr)) {
        Err(Errno::EINPROGRESS) => println!("connect=EINPROGRESS"),
        other => println!("connect={other:?}"),
    }
    wait_writable(&fd)?;
    let error = getsockopt(&fd, sockopt::SocketError)?;
    println!("so_error={error}");
    ensure!(error == 0, "SO_ERROR: {}", Errno::from_raw(error));
    // How some event loops ask whether it is done.
    println!("connect_again={:?}", connect(fd.as_raw_fd(), &SockaddrStorage::from(addr)).err());
    let stream = stream(fd)?;
    println!("peer={}", stream.peer_addr()?);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

pub(super) fn wait_writable(fd: &impl AsRawFd) -> Result<()> {
    let mut asked = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    let patience = i32::try_from(PATIENCE.as_millis())?;
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&raw mut asked, 1, patience) };
    ensure!(ready == 1, "not writable within {PATIENCE:?}");
    Ok(())
}

/// bind() before connect().
pub(super) fn bound(addr: SocketAddr, local: SocketAddr) -> Result<TcpStream> {
    let fd = tcp(family(addr), SockFlag::empty())?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(local)).with_context(|| format!("bind to {local}"))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(addr)).context("connect")?;
    let stream = stream(fd)?;
    println!("peer={}\nlocal={}", stream.peer_addr()?, stream.local_addr()?);
    Ok(stream)
}

/// TCP_FASTOPEN_CONNECT: connect() returns at once, and the SYN leaves with the first bytes.
pub(super) fn fastopen(addr: SocketAddr) -> Result<TcpStream> {
    let fd = tcp(family(addr), SockFlag::empty())?;
    let on: libc::c_int = 1;
    const LENGTH: libc::socklen_t = 4;
    let (level, name) = (libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT);
    // SAFETY: the option's value is one int, of four bytes.
    let set = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const on).cast(), LENGTH) };
    ensure!(set == 0, "TCP_FASTOPEN_CONNECT: {}", io::Error::last_os_error());
    connect(fd.as_raw_fd(), &SockaddrStorage::from(addr)).context("connect")?;
    stream(fd)
}

/// MSG_FASTOPEN: sendto() connects. Of a pattern that has not begun it sends nothing yet.
pub(super) fn fastopen_sendto(addr: SocketAddr) -> Result<TcpStream> {
    let stream = fastopen_with(addr, &[])?;
    println!("peer={}", stream.peer_addr()?);
    Ok(stream)
}

/// The same with the first bytes.
pub(super) fn fastopen_with(addr: SocketAddr, first: &[u8]) -> Result<TcpStream> {
    let fd = tcp(family(addr), SockFlag::empty())?;
    let to = SockaddrStorage::from(addr);
    nix::sys::socket::sendto(fd.as_raw_fd(), first, &to, MsgFlags::from_bits_retain(libc::MSG_FASTOPEN))
        .context("sendto")?;
    stream(fd)
}

/// A Multipath TCP socket; says what the kernel makes of it.
pub(super) fn mptcp(addr: SocketAddr) -> Result<()> {
    let domain = if addr.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: socket(2) takes three numbers.
    let fd = unsafe { libc::socket(domain, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_MPTCP) };
    if fd < 0 {
        println!("socket={}", result::<()>(Err(io::Error::last_os_error())));
        return Ok(());
    }
    println!("socket=ok");
    // SAFETY: it was just opened, and nobody else has it.
    let stream = unsafe { TcpStream::from_raw_fd(fd) };
    let connected = connect(stream.as_raw_fd(), &SockaddrStorage::from(addr)).map_err(io::Error::from);
    println!("connect={}", result(connected));
    stream.set_read_timeout(Some(PATIENCE))?;
    names(&stream)
}

/// One socket that connects to `first`, is disconnected, and connects to `second`.
pub(super) fn again(first: SocketAddr, second: SocketAddr) -> Result<()> {
    let fd = tcp(family(first), SockFlag::empty())?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(first)).context("connect")?;
    let stream = stream(fd)?;
    names(&stream)?;
    reset(&stream)?;
    println!("between={}", result(stream.peer_addr()));
    connect(stream.as_raw_fd(), &SockaddrStorage::from(second)).context("connect again")?;
    println!("then");
    names(&stream)
}
