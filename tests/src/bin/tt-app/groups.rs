//! Cgroups that are created and removed around the application, and how the connections go that it makes in them.
//!
//! # Invariants
//! - The application connects immediately after it has joined a cgroup.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};

use crate::{once, result, say};

/// Connections in each group: the first, and others that come as fast as they can.
const EACH: usize = 3;

/// `times` over: makes the group `name` in `parent`, joins it, connects to `inside`, leaves it for a new sibling, connects
/// to `beside`, and removes both. Says how often each outcome came.
pub(crate) fn incarnations(
    parent: &Path,
    name: &str,
    inside: SocketAddr,
    beside: SocketAddr,
    times: usize,
) -> Result<()> {
    let group = parent.join(name);
    let (inside, beside) = (inside.to_string(), beside.to_string());
    let mut outcomes = BTreeMap::<String, usize>::new();
    let mut count = |whose: &str, outcome: io::Result<()>| {
        *outcomes.entry(format!("{whose}-{}", result(outcome))).or_default() += 1;
    };
    for n in 0..times {
        // Its name begins as the captured one's does.
        let sibling = parent.join(format!("{name}-{n}"));
        fs::create_dir(&group).context("making the group")?;
        join(&group)?;
        for _ in 0..EACH {
            count("inside", once(&inside));
        }
        fs::create_dir(&sibling).context("making a sibling")?;
        join(&sibling)?;
        count("beside", once(&beside));
        fs::remove_dir(&group).context("removing the group")?;
        join(parent)?;
        fs::remove_dir(&sibling).context("removing a sibling")?;
    }
    for (outcome, n) in outcomes {
        println!("{outcome}={n}");
    }
    say(&format!("incarnations={times}"));
    Ok(())
}

/// Makes a socket, joins a group, connects, and exchanges a byte.
pub(crate) fn socket_from_outside(group: &Path, addr: SocketAddr) -> Result<()> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::empty(), None)?;
    join(group)?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(addr))?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"p")?;
    stream.read_exact(&mut [0])?;
    println!("peer={}", stream.peer_addr()?);
    Ok(())
}

fn join(group: &Path) -> Result<()> {
    fs::write(group.join("cgroup.procs"), "0").with_context(|| format!("joining {}", group.display()))
}
