//! Captures every frame that passes the devices of a host, loopback left out, and reports the first one that holds a
//! secret.
//!
//! # Invariants
//! - No frame is missed: one that the kernel had no room for fails the test.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};

use crate::netns::NetNs;

/// `ETH_P_ALL`, `ARPHRD_LOOPBACK`, `PACKET_STATISTICS` of linux/if_ether.h, if_arp.h, if_packet.h.
const EVERY_PROTOCOL: u16 = 3;
const LOOPBACK: u16 = 772;
const PACKET_STATISTICS: libc::c_int = 6;
/// For what comes while nobody reads.
const ROOM: usize = 64 << 20;
/// The largest that a device joins segments to.
const FRAME_MAX: usize = 1 << 18;

/// Watches until it is asked what it saw.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Seen>>>,
}

/// What there was to see.
#[derive(Debug)]
pub struct Seen {
    /// Frames, on devices that are not loopback.
    pub frames: u64,
    /// The first frame that held the secret.
    pub secret: Option<Vec<u8>>,
}

impl Watch {
    /// Watches every device of a host.
    pub fn start(host: &NetNs, secret: &str) -> Result<Self> {
        let socket = host.run(open)?;
        let (stop, secret) = (Arc::new(AtomicBool::new(false)), secret.as_bytes().to_vec());
        let ending = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("frames".to_owned())
            .spawn(move || watch(&socket, &secret, &ending))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// What it saw.
    pub fn seen(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it is asked once")?;
        thread.join().ok().context("the thread panicked")?
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _seen = thread.join();
        }
    }
}

fn open() -> Result<OwnedFd> {
    let protocol = i32::from(EVERY_PROTOCOL.to_be());
    // SAFETY: socket(2) takes three numbers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    ensure!(fd >= 0, "a packet socket: {}", io::Error::last_os_error());
    // SAFETY: it was just opened, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    setsockopt(&fd, sockopt::RcvBufForce, &ROOM)?;
    // How often it looks whether it is to stop.
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(0, 100_000))?;
    Ok(fd)
}

fn watch(socket: &OwnedFd, secret: &[u8], stop: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen { frames: 0, secret: None };
    let mut frame = vec![0u8; FRAME_MAX];
    loop {
        // SAFETY: all zero is a valid address.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut length = libc::socklen_t::try_from(size_of_val(&from))?;
        // SAFETY: the buffer and the address are valid for writing, with their lengths.
        let n = unsafe {
            libc::recvfrom(
                socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
                (&raw mut from).cast(),
                &raw mut length,
            )
        };
        let Ok(n) = usize::try_from(n) else {
            let error = io::Error::last_os_error();
            ensure!(error.kind() == io::ErrorKind::WouldBlock, "reading frames: {error}");
            if stop.load(Ordering::Relaxed) {
                break;
            }
            continue;
        };
        if from.sll_hatype == LOOPBACK {
            continue;
        }
        seen.frames += 1;
        let frame = &frame[..n];
        if seen.secret.is_none() && frame.windows(secret.len()).any(|part| part == secret) {
            seen.secret = Some(frame.to_vec());
        }
    }
    ensure!(dropped(socket)? == 0, "the kernel had no room for every frame");
    Ok(seen)
}

/// struct tpacket_stats: packets, drops.
fn dropped(socket: &OwnedFd) -> Result<u32> {
    let mut counted = [0u32; 2];
    let mut length = libc::socklen_t::try_from(size_of_val(&counted))?;
    // SAFETY: two words, and their length.
    let asked = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_STATISTICS,
            counted.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    ensure!(asked == 0, "PACKET_STATISTICS: {}", io::Error::last_os_error());
    Ok(counted[1])
}
