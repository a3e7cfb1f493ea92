//! A program that tries to bypass its capture in every way that it knows, from several threads, for a given time. It
//! prints for each way how often each outcome came.
//!
//! # Invariants
//! - Each connection that is established sends the secret, so that a bypass shows on the wire.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::PathBuf,
    process::Command,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, sendto, setsockopt, socket,
    sockopt,
};

use super::{
    elsewhere, marks, result,
    uring::{self, By},
};

/// How long a connection may take, and be quiet.
const LIMIT: libc::time_t = 5;
/// Threads that try at once.
const THREADS: usize = 3;
/// `TCP_REPAIR` of linux/tcp.h.
const TCP_REPAIR: libc::c_int = 19;

/// How a connection is made, and the secret sent.
type Way = fn(&Plan, SocketAddr) -> io::Result<()>;

/// The ways, by their names. A way that ends with an error has connected to nobody.
const WAYS: &[(&str, Way)] = &[
    ("plain", |plan, to| plan.send(plain(to)?, to)),
    ("non-blocking", non_blocking),
    ("v4-mapped", |plan, to| plan.send(plain(mapped(to))?, mapped(to))),
    ("fork", |plan, to| plan.child("plain", to)),
    ("thread", |plan, to| in_a_thread(|| plan.send(plain(to)?, to))),
    ("new-namespace", |plan, to| in_a_thread(|| elsewhere::go().and_then(|()| plan.send(plain(to)?, to)))),
    ("socket-of-a-new-namespace", |plan, to| {
        plan.send(in_a_thread(|| elsewhere::go().and_then(|()| plain(to)))?, to)
    }),
    ("mark-default", |plan, to| plan.marked(to, 0x1000)),
    ("mark-all-bits", |plan, to| plan.marked(to, u32::MAX)),
    ("cap-net-raw-alone", |plan, to| plan.child("limited-mark", to)),
    ("limited-mark", |plan, to| {
        marks::limit_to_net_raw().map_err(io::Error::other)?;
        plan.marked(to, 0x1000)
    }),
    ("group-below", |plan, to| plan.child("group-below-in", to)),
    ("group-below-in", |plan, to| plan.in_a_group(&plan.group, to)),
    ("group-made-anew", |plan, to| plan.child("group-made-anew-in", to)),
    ("group-made-anew-in", Plan::made_anew),
    ("io-uring", |plan, to| plan.by_uring(to, By::Caller)),
    ("io-uring-worker", |plan, to| plan.by_uring(to, By::Worker)),
    ("io-uring-poller", |plan, to| plan.by_uring(to, By::Poller)),
    ("mptcp", |plan, to| plan.send(with_protocol(to, libc::IPPROTO_MPTCP)?, to)),
    ("fast-open", fast_open),
    ("af-unspec-between", Plan::unspec_between),
    ("two-at-once", Plan::two_at_once),
    ("bind-to-device", Plan::by_device),
    ("bind-to-device-after", Plan::by_device_after),
    ("bound-to-an-address", Plan::bound_to_an_address),
    ("repair", repair),
];

/// What only runs in a process of its own, which another way starts.
const INSIDE: [&str; 3] = ["limited-mark", "group-below-in", "group-made-anew-in"];

struct Plan {
    secret: String,
    /// The captured group, which this process is in.
    group: PathBuf,
    /// The group around it.
    around: PathBuf,
    /// The name, there, of another captured group, which is not there.
    anew: String,
    device: String,
    words: Vec<String>,
}

/// `escape SECONDS SECRET GROUP AROUND ANEW DEVICE TARGET…`
pub(super) fn escape(words: &[&str]) -> Result<()> {
    let [seconds, rest @ ..] = words else { bail!("escape SECONDS …") };
    let (plan, targets) = Plan::read(rest)?;
    let end = Instant::now() + Duration::from_secs(seconds.parse()?);
    let outcomes = Mutex::new(BTreeMap::<String, usize>::new());
    let tried = WAYS.iter().filter(|(name, _)| !INSIDE.contains(name));
    let all: Vec<_> = tried.flat_map(|way| targets.iter().map(move |to| (way, *to))).collect();
    thread::scope(|scope| {
        for n in 0..THREADS {
            let (plan, outcomes, all) = (&plan, &outcomes, &all);
            scope.spawn(move || {
                // Each thread begins somewhere else; what has begun is finished, and every way is tried at least once.
                let mut ways = all.iter().cycle().skip(n * all.len() / THREADS);
                let mut done = 0;
                while (Instant::now() < end || done < all.len().div_ceil(THREADS))
                    && let Some(((name, way), to)) = ways.next()
                {
                    let outcome = format!("{name}-{}", result(way(plan, *to)));
                    *outcomes.lock().unwrap_or_else(PoisonError::into_inner).entry(outcome).or_default() += 1;
                    done += 1;
                }
            });
        }
    });
    for (outcome, n) in outcomes.into_inner().unwrap_or_else(PoisonError::into_inner) {
        println!("{outcome}={n}");
    }
    println!("escaped=tried");
    Ok(())
}

/// `escape-once WAY SECRET GROUP AROUND ANEW DEVICE TARGET`
pub(super) fn escape_once(words: &[&str]) -> Result<()> {
    let [name, rest @ ..] = words else { bail!("escape-once WAY …") };
    let (plan, targets) = Plan::read(rest)?;
    let (_, way) = WAYS.iter().find(|(known, _)| known == name).context("an unknown way")?;
    for to in targets {
        println!("outcome={}", way(&plan, to).map_or_else(|e| e.raw_os_error().unwrap_or(-1), |()| 0));
    }
    Ok(())
}

impl Plan {
    fn read(words: &[&str]) -> Result<(Self, Vec<SocketAddr>)> {
        let [secret, group, around, anew, device, targets @ ..] = words else { bail!("too few words") };
        let plan = Self {
            secret: (*secret).to_owned(),
            group: group.into(),
            around: around.into(),
            anew: (*anew).to_owned(),
            device: (*device).to_owned(),
            words: words.iter().take(5).map(|&word| word.to_owned()).collect(),
        };
        let targets = targets.iter().map(|word| word.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
        Ok((plan, targets))
    }

    /// Connects a socket, and sends the secret.
    fn send(&self, fd: OwnedFd, to: SocketAddr) -> io::Result<()> {
        connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        self.tell(fd)
    }

    /// Of a socket that is connected.
    fn tell(&self, fd: OwnedFd) -> io::Result<()> {
        let mut stream = TcpStream::from(fd);
        stream.write_all(self.secret.as_bytes())?;
        // The target's answer, or what else becomes of it.
        io::Read::read_exact(&mut stream, &mut [0])
    }

    /// A process of its own that tries this way; what it says.
    fn child(&self, way: &str, to: SocketAddr) -> io::Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        let output = command.args(["escape-once", way]).args(&self.words).arg(to.to_string()).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        match said.trim().strip_prefix("outcome=").map(str::parse::<i32>) {
            Some(Ok(0)) => Ok(()),
            Some(Ok(-1)) | None => Err(io::Error::other(said)),
            Some(Ok(n)) => Err(io::Error::from_raw_os_error(n)),
            Some(Err(_)) => Err(io::Error::other(said)),
        }
    }

    fn marked(&self, to: SocketAddr, mark: u32) -> io::Result<()> {
        let fd = plain(to)?;
        setsockopt(&fd, sockopt::Mark, &mark)?;
        self.send(fd, to)
    }

    /// Makes a group in another one, joins it, connects, goes back, and removes it.
    fn in_a_group(&self, parent: &std::path::Path, to: SocketAddr) -> io::Result<()> {
        let group = parent.join(format!("below-{}", std::process::id()));
        fs::create_dir(&group)?;
        fs::write(group.join("cgroup.procs"), "0")?;
        let sent = plain(to).and_then(|fd| self.send(fd, to));
        fs::write(parent.join("cgroup.procs"), "0")?;
        fs::remove_dir(&group)?;
        sent
    }

    /// Makes a captured group that was not there; the process is in none that is captured before, and not for long.
    fn made_anew(&self, to: SocketAddr) -> io::Result<()> {
        let group = self.around.join(&self.anew);
        fs::write(self.around.join("cgroup.procs"), "0")?;
        match fs::create_dir(&group) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        fs::write(group.join("cgroup.procs"), "0")?;
        let sent = plain(to).and_then(|fd| self.send(fd, to));
        fs::write(self.around.join("cgroup.procs"), "0")?;
        // Another one may be in it.
        let _left = fs::remove_dir(&group);
        sent
    }

    fn by_uring(&self, to: SocketAddr, by: By) -> io::Result<()> {
        let fd = plain(to)?;
        uring::connect(&fd, to, by)?;
        self.tell(fd)
    }

    /// To a listener of its own on loopback, then nowhere, then to the target.
    fn unspec_between(&self, to: SocketAddr) -> io::Result<()> {
        let own = TcpListener::bind((loopback(to), 0))?;
        let fd = plain(to)?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(own.local_addr()?))?;
        let nobody = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
        const LENGTH: libc::socklen_t = 16;
        // SAFETY: the address is valid for `LENGTH` bytes and the descriptor is open.
        if unsafe { libc::connect(fd.as_raw_fd(), &raw const nobody, LENGTH) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.send(fd, to)
    }

    /// Two threads connect one socket, one of them to where it may go.
    fn two_at_once(&self, to: SocketAddr) -> io::Result<()> {
        let own = TcpListener::bind((loopback(to), 0))?;
        let (fd, near) = (plain(to)?, SockaddrStorage::from(own.local_addr()?));
        let raw = fd.as_raw_fd();
        thread::scope(|scope| {
            let other = scope.spawn(move || connect(raw, &near));
            let went = connect(raw, &SockaddrStorage::from(to));
            let _either = other.join();
            went
        })?;
        self.tell(fd)
    }

    fn by_device(&self, to: SocketAddr) -> io::Result<()> {
        let fd = plain(to)?;
        setsockopt(&fd, sockopt::BindToDevice, &self.device.clone().into())?;
        self.send(fd, to)
    }

    /// While it connects.
    fn by_device_after(&self, to: SocketAddr) -> io::Result<()> {
        let fd =
            socket(family(to), SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
        let _in_progress = connect(fd.as_raw_fd(), &SockaddrStorage::from(to));
        setsockopt(&fd, sockopt::BindToDevice, &self.device.clone().into())?;
        let _again = connect(fd.as_raw_fd(), &SockaddrStorage::from(to));
        // Of what is not connected this says why.
        let sent = nix::sys::socket::send(fd.as_raw_fd(), self.secret.as_bytes(), MsgFlags::MSG_NOSIGNAL);
        sent.map(drop).map_err(io::Error::from)
    }

    fn bound_to_an_address(&self, to: SocketAddr) -> io::Result<()> {
        let own = std::net::UdpSocket::bind((unspecified(to), 0)).and_then(|asked| {
            asked.connect(to)?;
            asked.local_addr()
        })?;
        let fd = plain(to)?;
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        setsockopt(&fd, sockopt::ReusePort, &true)?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(own.ip(), 0)))?;
        self.send(fd, to)
    }
}

fn family(to: SocketAddr) -> AddressFamily {
    if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn loopback(to: SocketAddr) -> IpAddr {
    if to.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

fn unspecified(to: SocketAddr) -> IpAddr {
    if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn mapped(to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
        IpAddr::V6(_) => to,
    }
}

fn with_protocol(to: SocketAddr, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes three numbers.
    let fd = unsafe { libc::socket(family(to) as i32, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just opened, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let limit = nix::sys::time::TimeVal::new(LIMIT, 0);
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
    setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    Ok(fd)
}

fn plain(to: SocketAddr) -> io::Result<OwnedFd> {
    with_protocol(to, 0)
}

fn in_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

fn non_blocking(plan: &Plan, to: SocketAddr) -> io::Result<()> {
    let fd = socket(family(to), SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    let _in_progress = connect(fd.as_raw_fd(), &SockaddrStorage::from(to));
    let stream = TcpStream::from(fd);
    super::ways::wait_writable(&stream).map_err(io::Error::other)?;
    if let Some(e) = stream.take_error()? {
        return Err(e);
    }
    stream.set_nonblocking(false)?;
    plan.tell(stream.into())
}

fn fast_open(plan: &Plan, to: SocketAddr) -> io::Result<()> {
    let fd = plain(to)?;
    let flags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
    sendto(fd.as_raw_fd(), plan.secret.as_bytes(), &SockaddrStorage::from(to), flags)?;
    io::Read::read_exact(&mut TcpStream::from(fd), &mut [0])
}

/// A connection that is declared to be there, without a handshake.
fn repair(plan: &Plan, to: SocketAddr) -> io::Result<()> {
    let fd = plain(to)?;
    let set = |value: libc::c_int| {
        const LENGTH: libc::socklen_t = 4;
        let value = &raw const value;
        // SAFETY: the option's value is one int, of four bytes.
        match unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_TCP, TCP_REPAIR, value.cast(), LENGTH) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    set(1)?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    set(0)?;
    plan.tell(fd)
}
