//! A process that has CAP_NET_RAW and no other capability, as in a container, and uses the daemon's mark: to connect,
//! and to listen beside the daemon.
//!
//! # Invariants
//! - Nothing else is done before the other capabilities are dropped.

use std::{
    io::{self, BufRead as _, Read as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, listen, setsockopt, socket,
    sockopt,
};

use super::{PATIENCE, result, say};

/// `CAP_NET_RAW` of linux/capability.h.
const NET_RAW: u32 = 13;
/// `_LINUX_CAPABILITY_VERSION_3`
const VERSION: u32 = 0x2008_0522;

/// Gives up every capability but CAP_NET_RAW.
pub(super) fn limit_to_net_raw() -> Result<()> {
    // struct __user_cap_header_struct; two struct __user_cap_data_struct: effective, permitted, inheritable.
    let header = [VERSION, 0];
    let data: [u32; 6] = [1 << NET_RAW, 1 << NET_RAW, 0, 0, 0, 0];
    // SAFETY: both are as capset(2) has them, and valid for its reading.
    let done = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    ensure!(done == 0, "capset: {}", io::Error::last_os_error());
    Ok(())
}

/// A socket with a mark.
fn marked_socket(addr: SocketAddr, mark: u32) -> Result<OwnedFd> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::Mark, &mark).context("SO_MARK")?;
    Ok(fd)
}

/// Connects with a mark; says whom the target saw.
pub(super) fn marked(addr: SocketAddr, mark: u32) -> Result<()> {
    limit_to_net_raw()?;
    let fd = marked_socket(addr, mark)?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(addr)).context("connect")?;
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    io::BufReader::new(&stream).read_line(&mut line)?;
    println!("seen={}", line.trim_end());
    Ok(())
}

/// Listens with a mark on each of these that it gets, beside whoever may be there; says which those are. For every line of
/// standard input: how many have connected, and what they have sent.
pub(super) fn impostor(mark: u32, addresses: &[&str]) -> Result<()> {
    limit_to_net_raw()?;
    let mut listeners = Vec::new();
    for word in addresses {
        let bound = listen_beside(word.parse()?, mark);
        println!(
            "bind-{word}={}",
            result(bound.as_ref().map(drop).map_err(|e| io::Error::from_raw_os_error(*e)))
        );
        listeners.extend(bound.ok());
    }
    say(&format!("listens={}", listeners.len()));
    for line in io::stdin().lines() {
        let word = line?;
        let (mut accepted, mut heard) = (0, 0);
        for listener in &listeners {
            while let Ok((stream, _)) = listener.accept() {
                accepted += 1;
                stream.set_nonblocking(true)?;
                heard += (&stream).read(&mut [0; 4096]).unwrap_or(0);
            }
        }
        say(&format!("{word}={accepted} {heard}"));
    }
    Ok(())
}

/// Or the error's number.
fn listen_beside(addr: SocketAddr, mark: u32) -> Result<TcpListener, i32> {
    let number = |e: nix::errno::Errno| e as i32;
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None).map_err(number)?;
    setsockopt(&fd, sockopt::Mark, &mark).map_err(number)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true).map_err(number)?;
    setsockopt(&fd, sockopt::ReusePort, &true).map_err(number)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(addr)).map_err(number)?;
    listen(&fd, Backlog::new(64).map_err(number)?).map_err(number)?;
    Ok(fd.into())
}
