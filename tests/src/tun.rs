//! A TUN device whose other end is a descriptor (`Documentation/networking/tuntap.rst`): one packet that the host sends
//! per read, one that it receives per write. No call blocks.
//!
//! # Invariants
//! - The device exists as long as its [`Tun`] does.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use anyhow::{Context as _, Result, ensure};

use crate::netns::NetNs;

/// Where devices come from.
const CLONE: &str = "/dev/net/tun";
/// The longest packet: that of Ethernet, and what the kernel gives a new device.
pub const MTU: usize = 1500;
/// Packets that wait to be taken: 24 MB, more than the windows of TCP and HTTP/2 let be on their way. With the 500 that the
/// kernel gives a new device, the first burst of a bulk flow over a link that loses nothing would lose some.
const WAITING: usize = 16 * 1024;

/// A device.
#[derive(Debug)]
pub struct Tun {
    file: File,
    name: String,
}

impl Tun {
    /// Makes one on a host, with these addresses, and up.
    pub fn new(host: &NetNs, name: &str, addresses: &[&str]) -> Result<Self> {
        // The device is in the namespace in which the file was opened.
        let file = host.run(|| open(name))?;
        let tun = Self { file, name: name.to_owned() };
        for address in addresses {
            host.add_address(address, name)?;
        }
        host.ip(&format!("link set {name} mtu {MTU} txqueuelen {WAITING} up"))?;
        Ok(tun)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next packet that the host has sent; `WouldBlock` when there is none.
    pub fn take(&self, packet: &mut [u8; MTU]) -> io::Result<usize> {
        (&self.file).read(packet)
    }

    /// Has the host receive a packet.
    pub fn give(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open(name: &str) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(CLONE);
    let file = file.with_context(|| {
        format!(
            "opening {CLONE}, of which a link is made: load the kernel module (modprobe tun), or make the \
             device (mkdir -p /dev/net && mknod {CLONE} c 10 200)"
        )
    })?;
    ensure!(name.len() < libc::IFNAMSIZ, "a device cannot be called {name}");
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // Packets as they are, without anything in front of them.
    let flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
    let mut request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes an `ifreq`, which lives until it returns.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    match made {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()).with_context(|| format!("making the device {name}")),
    }
}
