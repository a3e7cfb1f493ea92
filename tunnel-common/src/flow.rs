//! What the hooks record about a captured connection: its [`Origin`], kept with the application's socket and, from the
//! SYN on, in the flow map under [`FlowKey`], which the listener computes from a socket that it accepted.
//!
//! # Invariants
//! - Both sides compute equal bytes for the same connection.
//! - A flow in the map outlives the application's socket until it is taken, or stale (`STALE_AFTER`).

use crate::addr::Endpoint;

/// What connections over loopback are given in place of their host's congestion control (tcp(7), TCP_CONGESTION): nothing
/// is lost there, so the simplest is the best, and every kernel has it. BBR paces, which means timers and small segments:
/// where it is the host's, an upload through both proxies cost 1.29 s of their time for a GB, and takes 1.07 without.
pub const LOCAL_CONGESTION_CONTROL: [u8; 4] = *b"reno";

/// A connection of a captured application, as the application's own socket names it.
///
/// A 4-tuple is unique among the live sockets of one network namespace; the namespace's cookie
/// (`SO_NETNS_COOKIE`) makes it unique on the node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    netns: u64,
    local: Endpoint,
    remote: Endpoint,
}

impl FlowKey {
    /// `local` and `remote` as the *application's* socket has them: seen from an accepted socket,
    /// `local` is its peer and `remote` is its own address.
    #[inline(always)]
    pub const fn new(netns: u64, local: Endpoint, remote: Endpoint) -> Self {
        Self { netns, local, remote }
    }

    /// The cookie of the network namespace.
    #[inline(always)]
    pub const fn netns(&self) -> u64 {
        self.netns
    }
}

/// Where a captured socket wanted to go, and which socket it was.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    cookie: u64,
    dst: Endpoint,
    closed: u32,
    device: u32,
    flags: u32,
    generation: u32,
    _zero: u32,
}

/// See [`Origin::without_source`].
const UNBOUND: u32 = 1;
/// See [`Origin::waiting`].
const WAITING: u32 = 2;
/// See [`Origin::give_up`].
const GIVEN_UP: u32 = 4;

impl Origin {
    /// `cookie` is the socket's own (`SO_COOKIE`): never reused while the node is up.
    #[inline(always)]
    pub const fn new(cookie: u64, dst: Endpoint) -> Self {
        Self { cookie, dst, closed: 0, device: 0, flags: 0, generation: 0, _zero: 0 }
    }

    /// It is that of the socket with this cookie.
    #[inline(always)]
    pub const fn of_socket(mut self, cookie: u64) -> Self {
        self.cookie = cookie;
        self
    }

    /// The socket was bound to this network device (its index).
    #[inline(always)]
    pub const fn bound_to(mut self, device: u32) -> Self {
        self.device = device;
        self
    }

    /// The network device that the socket was bound to; 0 is none.
    #[inline(always)]
    pub const fn device(&self) -> u32 {
        self.device
    }

    /// The socket had no address of its own choice: its route was to give it one.
    #[inline(always)]
    pub const fn without_source(mut self) -> Self {
        self.flags |= UNBOUND;
        self
    }

    /// See [`Self::without_source`].
    #[inline(always)]
    pub const fn lacks_source(&self) -> bool {
        self.flags & UNBOUND != 0
    }

    /// Its SYN is held back until the daemon listens in its network namespace.
    #[inline(always)]
    pub const fn waiting(mut self) -> Self {
        self.flags |= WAITING;
        self
    }

    /// See [`Self::waiting`].
    #[inline(always)]
    pub const fn is_waiting(&self) -> bool {
        self.flags & WAITING != 0
    }

    /// Its SYN is held back for good: nobody could tell whose connection it is.
    #[inline(always)]
    pub const fn give_up(&mut self) {
        self.flags |= GIVEN_UP;
    }

    /// See [`Self::give_up`].
    #[inline(always)]
    pub const fn is_given_up(&self) -> bool {
        self.flags & GIVEN_UP != 0
    }

    /// It is for the daemon whose listening sockets are under this generation.
    #[inline(always)]
    pub const fn of_generation(mut self, generation: u32) -> Self {
        self.generation = generation;
        self
    }

    /// See [`Self::of_generation`].
    #[inline(always)]
    pub const fn generation(&self) -> u32 {
        self.generation
    }

    /// The cookie of the application's socket.
    #[inline(always)]
    pub const fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The address the application passed to `connect`.
    #[inline(always)]
    pub const fn dst(&self) -> Endpoint {
        self.dst
    }

    /// The application's socket closed at `now`, in nanoseconds since boot. An application may connect,
    /// write and close before anybody has accepted: its flow is still to be carried.
    #[inline(always)]
    pub const fn close(&mut self, now: u64) {
        self.closed = Self::seconds(now);
    }

    /// Whether the socket has closed.
    #[inline(always)]
    pub const fn is_closed(&self) -> bool {
        self.closed != 0
    }

    /// Whether the socket closed so long before `now` (nanoseconds since boot) that nobody will accept
    /// the connection any more.
    pub const fn is_stale(&self, now: u64) -> bool {
        self.closed != 0 && Self::seconds(now).saturating_sub(self.closed) > STALE_AFTER
    }

    /// Never 0, which says that the socket is open.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "136 years of uptime")]
    const fn seconds(ns: u64) -> u32 {
        (ns / 1_000_000_000) as u32 | 1
    }
}

/// Seconds after which a closed connection that nobody has accepted is forgotten: longer than a SYN-ACK is
/// retransmitted by default (tcp_synack_retries, 63 s).
const STALE_AFTER: u32 = 90;

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn a_flow_is_stale_only_long_after_its_socket_closed() {
        const SECOND: u64 = 1_000_000_000;
        let dst = Endpoint::from(std::net::SocketAddr::from(([10, 0, 0, 1], 80)));
        let mut origin = Origin::new(7, dst);
        assert!(!origin.is_stale(u64::MAX));
        origin.close(0);
        assert!(!origin.is_stale(60 * SECOND));
        assert!(origin.is_stale(100 * SECOND));
        // A clock that seems to go backwards makes nothing stale.
        origin.close(500 * SECOND);
        assert!(!origin.is_stale(0));
    }
}
