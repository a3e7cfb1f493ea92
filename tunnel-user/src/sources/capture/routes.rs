//! What the routes of a network namespace would give captured sockets for their own addresses.
//!
//! A captured connection goes over loopback, so its socket has an address of loopback; `getsockname` answers with the one that
//! the route to the original destination would have given it. No kernel program can ask for that, so the daemon asks, for every
//! prefix that has a route, and again when something changes.
//!
//! # Invariants
//! - The kernel says which address it is, whatever rules, tables and preferences it goes by; it is asked for one destination of
//!   each prefix. Rules that go by something else than the destination are not seen.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use ipnet::IpNet;

use super::ring::Wake;
use crate::kernel::netlink::Netlink;

/// The most prefixes of one namespace that are asked about: more than any host has that is no router, and a tenth of a second's
/// work.
const DESTINATIONS_MAX: usize = 4096;
/// Routes that change all the time are asked about this often.
const PERIOD: Duration = Duration::from_millis(200);

/// The sockets by which a namespace is asked, made in it.
#[derive(Debug)]
pub struct Sockets {
    questions: Netlink,
    news: Netlink,
}

impl Sockets {
    /// Those of the namespace that the calling thread is in.
    pub fn open() -> io::Result<Self> {
        Ok(Self { questions: Netlink::open()?, news: Netlink::watch()? })
    }
}

/// The routes of one namespace.
pub struct Routes {
    sockets: Sockets,
    wake: Option<Wake>,
    /// When they were read last; none if they have changed since.
    read: Option<Instant>,
    next: Instant,
}

impl Routes {
    /// In a runtime.
    pub fn new(sockets: Sockets) -> Self {
        let wake = Wake::new(&sockets.news);
        // Whoever polls looks now and then all the same.
        let wake = wake.map_err(|e| tracing::warn!("failed to watch routes: {e}")).ok();
        Self { sockets, wake, read: None, next: Instant::now() }
    }

    /// Ready when something has changed since the last time.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.wake {
            Some(wake) => wake.poll(cx).map(drop),
            None => Poll::Pending,
        }
    }

    /// The source address for each prefix, if that may be different from the last time.
    pub fn changed(&mut self) -> Option<io::Result<Vec<(IpNet, IpAddr)>>> {
        let now = Instant::now();
        if self.sockets.news.read_news() {
            self.read = None;
        }
        if self.read.is_some() || now < self.next {
            return None;
        }
        (self.read, self.next) = (Some(now), now + PERIOD);
        Some(sources(&self.sockets.questions))
    }
}

fn sources(kernel: &Netlink) -> io::Result<Vec<(IpNet, IpAddr)>> {
    let nets = kernel.destinations(DESTINATIONS_MAX)?;
    let mut found = Vec::with_capacity(nets.len());
    for net in &nets {
        let source =
            kernel.route(example(net, &nets))?.filter(|route| !route.local).and_then(|route| route.source);
        found.extend(source.map(|source| (*net, source)));
    }
    Ok(found)
}

/// An address of a prefix that is in no longer one, as far as a few tries find it.
fn example(net: &IpNet, all: &[IpNet]) -> IpAddr {
    // For everything: addresses for documentation (RFC 5737, RFC 3849), which are nobody's.
    const ANY_V4: [Ipv4Addr; 3] =
        [Ipv4Addr::new(203, 0, 113, 1), Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(192, 0, 2, 1)];
    const ANY_V6: [Ipv6Addr; 2] =
        [Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), Ipv6Addr::new(0x2600, 0, 0, 0, 0, 0, 0, 1)];
    let any = ANY_V4.into_iter().map(IpAddr::V4).chain(ANY_V6.into_iter().map(IpAddr::V6));
    let own = [net.hosts().next(), net.hosts().nth(1), last(net)].into_iter().flatten();
    let is_longer =
        |ip: &IpAddr| all.iter().any(|other| other.prefix_len() > net.prefix_len() && other.contains(ip));
    any.filter(|ip| net.contains(ip)).chain(own).find(|ip| !is_longer(ip)).unwrap_or(net.addr())
}

/// The last host.
fn last(net: &IpNet) -> Option<IpAddr> {
    match net {
        IpNet::V4(net) => Some(IpAddr::V4(Ipv4Addr::from_bits(net.broadcast().to_bits().checked_sub(1)?))),
        IpNet::V6(net) => Some(IpAddr::V6(net.broadcast())),
    }
    .filter(|ip| net.contains(ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_a_prefix_is_in_no_longer_one() {
        let all: Vec<IpNet> =
            ["0.0.0.0/0", "203.0.113.0/24", "10.0.0.0/8", "10.0.0.0/24", "10.0.0.1/32", "::/0"]
                .map(|net| net.parse().unwrap())
                .into();
        let of = |net: &str| example(&net.parse().unwrap(), &all).to_string();
        assert_eq!(of("0.0.0.0/0"), "198.51.100.1");
        assert_eq!(of("10.0.0.0/8"), "10.255.255.254");
        assert_eq!(of("10.0.0.0/24"), "10.0.0.2");
        assert_eq!(of("10.0.0.1/32"), "10.0.0.1");
        assert_eq!(of("::/0"), "2001:db8::1");
    }
}
