//! What a program observes of its own sockets and of its host's network, one line for each behaviour. A line holds no
//! time, no chosen port and nothing of a tunnel, so that direct and captured runs print the same. Lines that begin with
//! [`ONLY`] exist in a captured run only.
//!
//! # Invariants
//! - No row depends on another.

use std::{
    fs,
    io::{self, BufRead as _, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, getsockopt, listen,
        setsockopt, socket, sockopt,
    },
};

use super::{PATIENCE, ping, result, ways::wait_writable};

/// In front of what a program only sees behind a capture.
const ONLY: &str = "only.";
/// `IP_BIND_ADDRESS_NO_PORT` of linux/in.h.
const BIND_ADDRESS_NO_PORT: libc::c_int = 24;
/// `SO_BINDTOIFINDEX` of asm-generic/socket.h.
const BIND_TO_IFINDEX: libc::c_int = 62;

/// One behaviour; what there was to see of it.
type Row = fn(&Scene) -> Result<String>;

/// What the rows are tried with.
struct Scene {
    /// IPv6 sockets, and IPv4 addresses.
    mapped: bool,
    /// Echoes that the capture takes.
    targets: [SocketAddr; 2],
    /// connect() is refused there.
    refused: SocketAddr,
    /// Nobody captures what goes there; it tells its peer's address in one line.
    excluded: SocketAddr,
    /// The device that routes prefer.
    outgoing: String,
    /// Another one, by which there is a way too.
    device: String,
}

/// `options KIND FIRST SECOND REFUSED EXCLUDED OUTGOING DEVICE`
pub(super) fn options(words: &[&str]) -> Result<()> {
    let [kind, first, second, refused, excluded, outgoing, device] = words else {
        bail!("options KIND …: {words:?}")
    };
    let mapped = *kind == "mapped";
    let read = |word: &str| -> Result<SocketAddr> {
        let addr: SocketAddr = word.parse()?;
        Ok(if mapped { map(addr) } else { addr })
    };
    let scene = Scene {
        mapped,
        targets: [read(first)?, read(second)?],
        refused: read(refused)?,
        excluded: read(excluded)?,
        outgoing: (*outgoing).to_owned(),
        device: (*device).to_owned(),
    };
    let rows: &[(&str, Row)] = &[
        ("two-destinations-reuseaddr", Scene::two_destinations),
        ("two-destinations-both-bound-before", Scene::both_bound_before),
        ("two-destinations-reuseport-with-a-listener", Scene::beside_a_listener),
        ("two-destinations-after-a-close", Scene::after_a_close),
        ("bind-address-no-port", Scene::bind_address_no_port),
        ("getsockname-unbound", Scene::sock_name_unbound),
        ("getsockname-after-a-failed-connect", Scene::sock_name_after_a_failure),
        ("getsockname-after-af-unspec", Scene::sock_name_after_unspec),
        ("getsockname-bound-to-an-address", Scene::sock_name_bound),
        ("getsockname-bound-to-a-port", Scene::sock_name_of_a_port),
        ("getpeername", Scene::peer_name),
        ("so-bindtodevice", |scene| scene.by_device(scene.bind_by_name(&scene.outgoing))),
        ("so-bindtoifindex", |scene| scene.by_device(scene.bind_by_index(&scene.outgoing))),
        ("so-bindtodevice-of-a-connection", Scene::device_afterwards),
        // Whence it comes then, the device says; behind a capture it is the route that says it.
        ("so-bindtodevice-beside-the-route", |scene| scene.connects(scene.bind_by_name(&scene.device))),
        ("so-bindtoifindex-beside-the-route", |scene| scene.connects(scene.bind_by_index(&scene.device))),
        ("a-device-after-a-refusal", Scene::device_after_a_refusal),
        ("a-device-after-another-attempt", Scene::device_after_another_attempt),
        ("mptcp", |scene| scene.mptcp().map(|(seen, _)| seen)),
        ("non-blocking", Scene::non_blocking),
        ("a-closed-port-of-loopback", Scene::closed_port),
        ("a-failed-connect-repeated", Scene::repeated),
    ];
    for (name, row) in rows {
        match row(&scene) {
            Ok(seen) => println!("{name}={seen}"),
            Err(e) => println!("{name}=failed: {}", described(&e)),
        }
    }
    let asked = scene.original_dst().map_or_else(|e| described(&e), |addr| addr.to_string());
    println!("{ONLY}original-dst={asked}");
    let asked = scene.mptcp().map_or_else(|e| described(&e), |(_, addr)| addr);
    println!("{ONLY}mptcp-original-dst={asked}");
    Ok(())
}

/// For every line of standard input: whence a program's connection comes as it sees it, and as the route says.
pub(super) fn sock_names(addr: SocketAddr) -> Result<()> {
    let scene = Scene {
        mapped: false,
        targets: [addr, addr],
        refused: addr,
        excluded: addr,
        outgoing: String::new(),
        device: String::new(),
    };
    super::say("ready=1");
    for line in io::stdin().lines() {
        let word = line?;
        let stream = scene.connected(addr)?;
        super::say(&format!("{word}={} {}", stream.local_addr()?.ip(), scene.source(addr)?));
    }
    Ok(())
}

/// Binds every port of `ip_local_port_range`, on an address; says how many of how many.
pub(super) fn bind_range(ip: IpAddr) -> Result<()> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut ends = range.split_whitespace().map(str::parse::<u16>);
    let (first, last) = ends.next().zip(ends.next()).context("two numbers")?;
    let all: Vec<_> = (first?..=last?).map(|port| (port, TcpListener::bind((ip, port)))).collect();
    let taken: Vec<_> =
        all.iter().filter_map(|(port, bound)| bound.as_ref().err().map(|e| format!("{port}: {e}"))).collect();
    println!("bound={} of {}", all.len() - taken.len(), all.len());
    ensure!(taken.is_empty(), "{}", taken.join("; "));
    Ok(())
}

impl Scene {
    fn first(&self) -> SocketAddr {
        self.targets[0]
    }

    fn domain(&self) -> AddressFamily {
        if self.first().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
    }

    fn socket(&self) -> Result<OwnedFd> {
        Ok(socket(self.domain(), SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
    }

    fn unspecified(&self) -> IpAddr {
        if self.first().is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
    }

    /// Whence the route to it says that a connection comes.
    fn source(&self, to: SocketAddr) -> Result<IpAddr> {
        let asked = UdpSocket::bind((self.unspecified(), 0))?;
        asked.connect(to)?;
        Ok(asked.local_addr()?.ip())
    }

    fn connected(&self, to: SocketAddr) -> Result<TcpStream> {
        talk(self.socket()?, to)
    }

    /// Two sockets with one local port and these options, each connected to a target of its own once both are made by
    /// `made`; both get an answer.
    fn pair(&self, made: impl Fn(u16) -> Result<OwnedFd>) -> Result<String> {
        let one = made(0)?;
        let port = local(&one)?.port();
        let one = talk(one, self.targets[0])?;
        let two = talk(made(port)?, self.targets[1])?;
        both(&one, &two)
    }

    fn own(&self, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.source(self.first())?, port))
    }

    fn bound(&self, to: SocketAddr, options: &[(libc::c_int, libc::c_int)]) -> Result<OwnedFd> {
        let fd = self.socket()?;
        for (level, name) in options {
            set(&fd, *level, *name, 1)?;
        }
        bind(fd.as_raw_fd(), &SockaddrStorage::from(to)).context("bind")?;
        Ok(fd)
    }

    fn two_destinations(&self) -> Result<String> {
        self.pair(|port| self.bound(self.own(port)?, &[(libc::SOL_SOCKET, libc::SO_REUSEADDR)]))
    }

    fn both_bound_before(&self) -> Result<String> {
        let made = |port| {
            self.bound(SocketAddr::new(self.unspecified(), port), &[(libc::SOL_SOCKET, libc::SO_REUSEADDR)])
        };
        let one = made(0)?;
        let two = made(local(&one)?.port())?;
        both(&talk(one, self.targets[0])?, &talk(two, self.targets[1])?)
    }

    fn beside_a_listener(&self) -> Result<String> {
        const BOTH: [(libc::c_int, libc::c_int); 2] =
            [(libc::SOL_SOCKET, libc::SO_REUSEADDR), (libc::SOL_SOCKET, libc::SO_REUSEPORT)];
        let listener = self.bound(self.own(0)?, &BOTH)?;
        let port = local(&listener)?.port();
        listen(&listener, Backlog::new(5)?)?;
        let one = talk(self.bound(self.own(port)?, &BOTH)?, self.targets[0])?;
        let two = talk(self.bound(self.own(port)?, &BOTH)?, self.targets[1])?;
        both(&one, &two)
    }

    /// The first one is in TIME-WAIT by then.
    fn after_a_close(&self) -> Result<String> {
        let reuse = [(libc::SOL_SOCKET, libc::SO_REUSEADDR)];
        let one = self.bound(self.own(0)?, &reuse)?;
        let port = local(&one)?.port();
        drop(talk(one, self.targets[0])?);
        drop(talk(self.bound(self.own(port)?, &reuse)?, self.targets[1])?);
        Ok("both".to_owned())
    }

    fn bind_address_no_port(&self) -> Result<String> {
        let made = || self.bound(self.own(0)?, &[(libc::SOL_IP, BIND_ADDRESS_NO_PORT)]);
        let (one, two) = (talk(made()?, self.targets[0])?, talk(made()?, self.targets[1])?);
        Ok(format!("{} {}", one.local_addr()?.ip(), two.local_addr()?.ip()))
    }

    /// And nothing before it connects.
    fn sock_name_unbound(&self) -> Result<String> {
        let fd = self.socket()?;
        let before = local(&fd)?;
        let stream = talk(fd, self.first())?;
        let name = stream.local_addr()?;
        ensure!(name.port() != 0, "no port");
        Ok(format!("{before} {} by its route {}", name.ip(), self.source(self.first())?))
    }

    fn sock_name_after_a_failure(&self) -> Result<String> {
        let fd = self.socket()?;
        let failed = connect(fd.as_raw_fd(), &SockaddrStorage::from(self.refused));
        let between = local(&fd)?.ip();
        let stream = talk(fd, self.first())?;
        Ok(format!("{failed:?} {between} {}", stream.local_addr()?.ip()))
    }

    fn sock_name_after_unspec(&self) -> Result<String> {
        let stream = self.connected(self.first())?;
        disconnect(&stream)?;
        let between = (stream.local_addr()?.ip(), result(stream.peer_addr()));
        connect(stream.as_raw_fd(), &SockaddrStorage::from(self.targets[1])).context("connect again")?;
        ping(&stream)?;
        Ok(format!("{between:?} {} {}", stream.local_addr()?.ip(), stream.peer_addr()?.ip()))
    }

    fn sock_name_bound(&self) -> Result<String> {
        let own = self.own(0)?;
        let fd = self.bound(own, &[])?;
        let port = local(&fd)?.port();
        let name = talk(fd, self.first())?.local_addr()?;
        ensure!(name.port() == port, "another port than it was bound to");
        Ok(name.ip().to_string())
    }

    fn sock_name_of_a_port(&self) -> Result<String> {
        let fd = self.bound(SocketAddr::new(self.unspecified(), 0), &[])?;
        let before = local(&fd)?;
        let name = talk(fd, self.first())?.local_addr()?;
        ensure!(name.port() == before.port(), "another port than it was bound to");
        Ok(format!("{} {}", before.ip(), name.ip()))
    }

    fn peer_name(&self) -> Result<String> {
        let peer = self.connected(self.first())?.peer_addr()?;
        ensure!(peer == self.first(), "{peer}");
        Ok("the target".to_owned())
    }

    fn bind_by_name(&self, device: &str) -> Result<OwnedFd> {
        let fd = self.socket()?;
        setsockopt(&fd, sockopt::BindToDevice, &device.to_owned().into())?;
        Ok(fd)
    }

    fn bind_by_index(&self, device: &str) -> Result<OwnedFd> {
        let fd = self.socket()?;
        let index = libc::c_int::try_from(if_nametoindex(device)?)?;
        set(&fd, libc::SOL_SOCKET, BIND_TO_IFINDEX, index)?;
        Ok(fd)
    }

    fn by_device(&self, bound: Result<OwnedFd>) -> Result<String> {
        let stream = talk(bound?, self.first())?;
        Ok(format!("from {} to {}", stream.local_addr()?.ip(), stream.peer_addr()?.ip()))
    }

    /// Once it is connected: what is said on it goes on.
    fn device_afterwards(&self) -> Result<String> {
        let stream = self.connected(self.first())?;
        setsockopt(&stream, sockopt::BindToDevice, &self.outgoing.clone().into())?;
        (0..3).try_for_each(|_| ping(&stream))?;
        let index = libc::c_int::try_from(if_nametoindex(self.outgoing.as_str())?)?;
        set(&stream, libc::SOL_SOCKET, BIND_TO_IFINDEX, index)?;
        ping(&stream)?;
        Ok(stream.peer_addr()?.ip().to_string())
    }

    fn connects(&self, bound: Result<OwnedFd>) -> Result<String> {
        Ok(format!("to {}", talk(bound?, self.first())?.peer_addr()?.ip()))
    }

    /// The excluded address says whence it was connected to: by the device, and not as routes prefer.
    fn seen_by_excluded(&self, fd: OwnedFd) -> Result<String> {
        connect(fd.as_raw_fd(), &SockaddrStorage::from(self.excluded)).context("connect to the excluded")?;
        let stream = TcpStream::from(fd);
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        io::BufReader::new(&stream).read_line(&mut line)?;
        Ok(format!("{}", line.trim().parse::<SocketAddr>()?.ip()))
    }

    fn device_after_a_refusal(&self) -> Result<String> {
        let routed = self.seen_by_excluded(self.socket()?)?;
        let fd = self.bind_by_name(&self.device)?;
        let failed = connect(fd.as_raw_fd(), &SockaddrStorage::from(self.refused));
        Ok(format!("{failed:?} {routed} {}", self.seen_by_excluded(fd)?))
    }

    fn device_after_another_attempt(&self) -> Result<String> {
        let stream = talk(self.bind_by_name(&self.device)?, self.first())?;
        disconnect(&stream)?;
        self.seen_by_excluded(stream.into())
    }

    /// With what SO_ORIGINAL_DST says of it.
    fn mptcp(&self) -> Result<(String, String)> {
        // SAFETY: socket(2) takes three numbers.
        let fd = unsafe {
            libc::socket(self.domain() as i32, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_MPTCP)
        };
        if fd < 0 {
            bail!(io::Error::last_os_error());
        }
        // SAFETY: it was just opened, and nobody else has it.
        let stream = talk(unsafe { OwnedFd::from_raw_fd(fd) }, self.first())?;
        for n in 0..8 {
            let part = [n; 10_000];
            (&stream).write_all(&part)?;
            let mut back = part.map(|_| 0);
            (&stream).read_exact(&mut back)?;
            ensure!(part == back, "other bytes came back");
        }
        ensure!(stream.peer_addr()? == self.first(), "{}", stream.peer_addr()?);
        let asked = original_dst_of(&stream, self.first()).map_or_else(|e| described(&e), |a| a.to_string());
        Ok((format!("{} the target", stream.local_addr()?.ip()), asked))
    }

    fn non_blocking(&self) -> Result<String> {
        let fd =
            socket(self.domain(), SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
        let began = connect(fd.as_raw_fd(), &SockaddrStorage::from(self.first()));
        wait_writable(&fd)?;
        let error = getsockopt(&fd, sockopt::SocketError)?;
        let stream = TcpStream::from(fd);
        stream.set_nonblocking(false)?;
        ping(&stream)?;
        Ok(format!("{began:?} {error} {} {}", stream.local_addr()?.ip(), stream.peer_addr()?.ip()))
    }

    fn closed_port(&self) -> Result<String> {
        let loopback: IpAddr = match (self.mapped, self.first()) {
            (true, _) => Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
            (_, SocketAddr::V4(_)) => Ipv4Addr::LOCALHOST.into(),
            _ => Ipv6Addr::LOCALHOST.into(),
        };
        let port = TcpListener::bind((loopback, 0))?.local_addr()?.port();
        let failed =
            connect(self.socket()?.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(loopback, port)));
        Ok(format!("{failed:?}"))
    }

    fn repeated(&self) -> Result<String> {
        let fd = self.socket()?;
        let again = SockaddrStorage::from(self.refused);
        let failed = [(); 3].map(|()| connect(fd.as_raw_fd(), &again).err());
        let peer = talk(fd, self.first())?.peer_addr()?;
        Ok(format!("{failed:?} {}", peer.ip()))
    }

    fn original_dst(&self) -> Result<SocketAddr> {
        original_dst_of(&self.connected(self.first())?, self.first())
    }
}

fn original_dst_of(socket: &impl AsFd, target: SocketAddr) -> Result<SocketAddr> {
    if target.is_ipv4() || is_mapped(target) {
        let found = getsockopt(socket, sockopt::OriginalDst)?;
        let ip = u32::from_be(found.sin_addr.s_addr).to_be_bytes();
        return Ok(SocketAddr::from((ip, u16::from_be(found.sin_port))));
    }
    let found = getsockopt(socket, sockopt::Ip6tOriginalDst)?;
    Ok(SocketAddr::from((found.sin6_addr.s6_addr, u16::from_be(found.sin6_port))))
}

fn is_mapped(addr: SocketAddr) -> bool {
    matches!(addr.ip(), IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some())
}

fn map(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), addr.port()),
        IpAddr::V6(_) => addr,
    }
}

/// Connects, and exchanges a byte.
fn talk(fd: OwnedFd, to: SocketAddr) -> Result<TcpStream> {
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to)).context("connect")?;
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE))?;
    ping(&stream).context("ping")?;
    Ok(stream)
}

/// Both still carry, and have one port.
fn both(one: &TcpStream, two: &TcpStream) -> Result<String> {
    ping(one)?;
    ping(two)?;
    let (one, two) = (one.local_addr()?, two.local_addr()?);
    ensure!(one.port() == two.port(), "{one} and {two}");
    Ok(format!("both, {} and {}", one.ip(), two.ip()))
}

fn local(fd: &OwnedFd) -> Result<SocketAddr> {
    Ok(TcpStream::from(fd.try_clone()?).local_addr()?)
}

fn disconnect(stream: &TcpStream) -> Result<()> {
    // AF_UNSPEC is 0 (linux/socket.h).
    let nobody = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
    const LENGTH: libc::socklen_t = 16;
    // SAFETY: the address is valid for `LENGTH` bytes and the descriptor is open.
    match unsafe { libc::connect(stream.as_raw_fd(), &raw const nobody, LENGTH) } {
        0 => Ok(()),
        _ => bail!(io::Error::last_os_error()),
    }
}

fn set(fd: &impl AsFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> Result<()> {
    const LENGTH: libc::socklen_t = 4;
    // SAFETY: the option's value is one int, of four bytes.
    let done =
        unsafe { libc::setsockopt(fd.as_fd().as_raw_fd(), level, name, (&raw const value).cast(), LENGTH) };
    ensure!(done == 0, "option {level} {name}: {}", io::Error::last_os_error());
    Ok(())
}

/// The error, by its name.
fn described(error: &anyhow::Error) -> String {
    let cause = error.chain().find_map(|e| {
        let by_number = |e: &io::Error| e.raw_os_error().map(Errno::from_raw);
        e.downcast_ref::<Errno>().copied().or_else(|| e.downcast_ref::<io::Error>().and_then(by_number))
    });
    let cause = cause.map(|errno| format!(": {errno:?}")).unwrap_or_default();
    format!("{error}{cause}")
}
