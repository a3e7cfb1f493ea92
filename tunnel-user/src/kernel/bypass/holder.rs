//! Finds the process at the other end of a connection over loopback: the inode of its socket, and who holds it.
//!
//! More than one process, or more descriptors than can be searched, is no answer.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};

use super::Refusal;
use crate::kernel::{group::Group, sys};

/// Processes of a captured group, and descriptors of all of them, that are looked through for one connection: 1 µs each,
/// on a thread of its own. A group with more has no bypass.
const PROCESSES_MAX: usize = 256;
const DESCRIPTORS_MAX: usize = 16_384;

/// Asks the kernel about sockets, in one network namespace after the other.
pub(super) struct Diag {
    netns: u64,
    netlink: OwnedFd,
}

impl Diag {
    /// In the namespace of `socket`, which this thread enters.
    pub(super) fn enter(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let netns = sys::netns_cookie(socket)?;
        let netlink = netlink()?;
        if sys::netns_cookie(netlink.as_fd())? == netns {
            return Ok(Self { netns, netlink });
        }
        nix::sched::setns(sys::netns_of(socket)?, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(Self { netns, netlink: self::netlink()? })
    }

    pub(super) fn is_of(&self, socket: BorrowedFd<'_>) -> bool {
        sys::netns_cookie(socket).is_ok_and(|netns| netns == self.netns)
    }

    /// The inode of the socket with this cookie, which is connected from `local` to `remote`
    /// (`linux/inet_diag.h`, sock_diag(7)).
    pub(super) fn inode(&self, local: SocketAddr, remote: SocketAddr, cookie: u64) -> io::Result<u32> {
        const SOCK_DIAG_BY_FAMILY: u16 = 20;
        const NLM_F_REQUEST: u16 = 1;
        /// Header of the message, then family, protocol, extensions, states, and the socket.
        const REQUEST: usize = 16 + 8 + 48;
        let mut request = Vec::with_capacity(REQUEST);
        request.extend(u32::try_from(REQUEST).unwrap_or_default().to_ne_bytes());
        request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request.extend(NLM_F_REQUEST.to_ne_bytes());
        request.extend([0; 8]);
        let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        request.extend([
            u8::try_from(family).unwrap_or_default(),
            u8::try_from(libc::IPPROTO_TCP).unwrap_or_default(),
            0,
            0,
        ]);
        request.extend(u32::MAX.to_ne_bytes());
        request.extend(local.port().to_be_bytes());
        request.extend(remote.port().to_be_bytes());
        for ip in [local.ip(), remote.ip()] {
            match ip {
                IpAddr::V4(v4) => {
                    request.extend(v4.octets());
                    request.extend([0; 12]);
                }
                IpAddr::V6(v6) => request.extend(v6.octets()),
            }
        }
        request.extend(0u32.to_ne_bytes());
        // Two words, the lower one first.
        request.extend((cookie & u64::from(u32::MAX)).to_ne_bytes().iter().take(4));
        request.extend((cookie >> 32).to_ne_bytes().iter().take(4));
        sys::send(self.netlink.as_fd(), &request)?;
        let mut answer = [0; 1024];
        let n = sys::receive(self.netlink.as_fd(), &mut answer)?;
        let answer = &answer[..n];
        let word = |at: usize| answer.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
        let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
        // `struct inet_diag_msg` ends with the inode.
        match (kind, word(84)) {
            (Some(SOCK_DIAG_BY_FAMILY), Some(inode)) if inode != 0 => Ok(inode),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

fn netlink() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?)
}

/// The one process of a group that has this socket, and one of its descriptors for it.
pub(super) fn only_one(group: &Group, inode: u32) -> Result<(u32, i32), Refusal> {
    let link = format!("socket:[{inode}]");
    let processes = group.processes();
    if processes.len() > PROCESSES_MAX {
        return Err(Refusal::Unknown);
    }
    let (mut found, mut looked) = (None, 0);
    for pid in processes {
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            looked += 1;
            if looked > DESCRIPTORS_MAX {
                return Err(Refusal::Unknown);
            }
            if !fs::read_link(entry.path()).is_ok_and(|l| l.as_os_str().as_encoded_bytes() == link.as_bytes())
            {
                continue;
            }
            let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
            match found {
                Some((other, _)) if other != pid => return Err(Refusal::Shared),
                _ => found = Some((pid, fd)),
            }
        }
    }
    found.ok_or(Refusal::Gone)
}
