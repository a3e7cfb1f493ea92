//! Network namespaces that a program creates, and connects from.
//!
//! # Invariants
//! - A new namespace's loopback is up before its first connection, and nothing else is set up in it.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    process::Command,
    sync::{Arc, Barrier},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket},
};

use super::{PATIENCE, ping, result, say};

/// Goes into a namespace of this thread's own, with a loopback that is up.
pub(super) fn go() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed() as libc::c_char;
    request.ifr_name[1] = b'o'.cast_signed() as libc::c_char;
    #[expect(clippy::cast_possible_truncation, reason = "IFF_UP is 1")]
    let up = libc::IFF_UP as libc::c_short;
    request.ifr_ifru.ifru_flags = up;
    // SAFETY: the request is valid, and the kernel reads it.
    match unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn tcp(addr: SocketAddr) -> io::Result<OwnedFd> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    Ok(socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Connects a socket, and exchanges a byte.
fn talk(fd: OwnedFd, addr: SocketAddr) -> io::Result<TcpStream> {
    connect(fd.as_raw_fd(), &SockaddrStorage::from(addr))?;
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE))?;
    ping(&stream)?;
    Ok(stream)
}

/// One connection from a new namespace; says how it went, and how long connect(2) took.
pub(super) fn from_a_new_namespace(addr: SocketAddr) -> Result<()> {
    go()?;
    let began = Instant::now();
    let went = tcp(addr).and_then(|fd| talk(fd, addr));
    println!("went={}\nafter_ms={}", result(went), began.elapsed().as_millis());
    Ok(())
}

/// So many new namespaces one after the other, each in a process of its own with one connection.
pub(super) fn new_namespaces(addr: &str, times: usize) -> Result<()> {
    let mut ok = 0;
    for n in 0..times {
        let mut one = Command::new(std::env::current_exe()?);
        let output = one.args(["from-a-new-namespace", addr]).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if said.contains("went=ok") {
            ok += 1;
        } else {
            println!("{n}: {}", said.replace('\n', " "));
        }
    }
    println!("ok={ok} of {times}");
    Ok(())
}

/// A thread in a namespace of its own, in a process that stays where it is.
pub(super) fn from_a_thread(addr: SocketAddr) -> Result<()> {
    let there = thread::spawn(move || go().and_then(|()| tcp(addr)).and_then(|fd| talk(fd, addr)));
    let went = there.join().ok().context("the thread panicked")?;
    println!("went={}", result(went));
    Ok(())
}

/// A socket that a thread has made in a namespace, in which there is nobody by now, connected from here.
pub(super) fn by_a_socket_of_nobodys(addr: SocketAddr) -> Result<()> {
    let there = thread::spawn(move || go().and_then(|()| tcp(addr)));
    let fd = there.join().ok().context("the thread panicked")?.context("a socket there")?;
    println!("went={}", result(talk(fd, addr)));
    Ok(())
}

/// So many namespaces at once, each with a connection, which is asked once more when all are there, and again for every line
/// of standard input.
pub(super) fn many_namespaces(addr: SocketAddr, times: usize) -> Result<()> {
    let all = Arc::new(Barrier::new(times));
    let threads: Vec<_> = (0..times)
        .map(|_| {
            let all = Arc::clone(&all);
            thread::spawn(move || {
                let there = go();
                all.wait();
                there.and_then(|()| tcp(addr)).and_then(|fd| talk(fd, addr))
            })
        })
        .collect();
    let mut streams = Vec::new();
    for thread in threads {
        match thread.join().ok().context("a thread panicked")? {
            Ok(stream) => streams.push(stream),
            Err(e) => println!("failed={}", result::<()>(Err(e))),
        }
    }
    say(&format!("held={} of {times}", streams.len()));
    for line in io::stdin().lines() {
        let word = line?;
        let alive = streams.iter().filter(|stream| ping(stream).is_ok()).count();
        say(&format!("{word}={alive}"));
    }
    ensure!(io::stdout().flush().is_ok());
    drop(streams);
    // Whoever waits for the end knows that they are closed.
    let _end = io::stdin().read(&mut [0]);
    Ok(())
}
