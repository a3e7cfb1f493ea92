//! What the hooks record about a captured connection.
//!
//! Enters: what `connect` and the established callback saw. Leaves: [`Origin`], kept with the
//! application's socket and, from establishment to close, in the flow map under [`FlowKey`], which the
//! listener computes from a socket it accepted. Invariant: both sides compute equal bytes for the same
//! connection. It never holds anything that outlives the application's socket.

use crate::addr::Endpoint;

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
}

/// Where a captured socket wanted to go, and which socket it was.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    cookie: u64,
    dst: Endpoint,
    _zero: [u8; 4],
}

impl Origin {
    /// `cookie` is the socket's own (`SO_COOKIE`): never reused while the node is up.
    #[inline(always)]
    pub const fn new(cookie: u64, dst: Endpoint) -> Self {
        Self { cookie, dst, _zero: [0; 4] }
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
}
