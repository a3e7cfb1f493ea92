//! `[daemon.limits]`: what peers may use of the process, and flows of time.

use std::{
    num::{NonZeroU32, NonZeroUsize},
    time::Duration,
};

use super::section::section;

/// Connections of one peer: with `upstream.max_streams` of our own client, all of the flows that it may have, twice.
pub(super) const PEER_CONNECTIONS: NonZeroUsize = NonZeroUsize::new(256).expect("not 0");
/// New flows of one peer in a second: what one core takes up with a connection to the target for each.
pub(super) const PEER_FLOWS_PER_SECOND: NonZeroU32 = NonZeroU32::new(10_000).expect("not 0");

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

section! {
    /// `[daemon.limits]`
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Limits {
        /// Memory for what peers send and have not been relieved of, and for what waits to be sent to them: windows, queues and
        /// buffers. When half of it is in use windows shrink; when all of it is, new flows are refused with 503 and
        /// established ones go on. Default: half of the memory limit of the daemon's cgroup; without a limit, a quarter of the
        /// machine's memory.
        memory: optional Bytes,
        /// The same for one peer of the listeners: one identity, or where there is none, one address. Default: a quarter of memory.
        peer_memory: optional Bytes,
        /// Maximum of concurrent connections of one peer, divided among the workers; more are closed after their handshake. A
        /// connection of HTTP/1 counts until its request is answered.
        peer_connections: default NonZeroUsize = PEER_CONNECTIONS,
        /// Maximum of new flows of one peer in a second, divided among the workers; more are refused with 503.
        peer_flows_per_second: default NonZeroU32 = PEER_FLOWS_PER_SECOND,
        /// How long a flow may go on without a byte in either direction before it is reset. Default: as long as both sides
        /// keep it open.
        flow_idle_timeout: optional Duration,
        /// How long a flow may last before it is reset. Default: as long as both sides keep it open.
        flow_max_duration: optional Duration,
    }
    check |r| {
        if let (Some(memory), Some(peer)) = (memory, peer_memory)
            && peer > memory
        {
            r.wrong("peer_memory", "is more than memory");
        }
    }
    defaults new;
}

impl Default for Limits {
    fn default() -> Self {
        Self::new()
    }
}
