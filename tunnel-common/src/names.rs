//! The names of programs, maps and counters, in one place for both sides.
//!
//! The kernel side spells its `#[map]` statics and functions as these constants say; a test that loads
//! every program checks that each name is there.

/// Trie of IPv4 prefixes to capture rules.
pub const RULES_V4: &str = "RULES_V4";
/// Trie of IPv6 prefixes to capture rules.
pub const RULES_V6: &str = "RULES_V6";
/// Network namespace cookie to the capture listener there.
pub const LISTENERS: &str = "LISTENERS";
/// Captured connections from establishment to close.
pub const FLOWS: &str = "FLOWS";
/// Original destination, kept with the application's socket.
pub const ORIGINS: &str = "ORIGINS";
/// Per-CPU counters, indexed by [`Counter`].
pub const COUNTERS: &str = "COUNTERS";
/// Wakes the daemon when a connection came from a namespace without a listener.
pub const EVENTS: &str = "EVENTS";
/// The version of everything that is kept in pinned maps: part of the names of the pins, so that a daemon
/// adopts only what it understands. Raised with every change of a key, a value, or what they mean.
pub const ABI: u32 = 1;
/// Every map, for the test that loads them all.
pub const MAPS: [&str; 7] = [RULES_V4, RULES_V6, LISTENERS, FLOWS, ORIGINS, COUNTERS, EVENTS];

/// The socket mark of the daemon's own sockets; a global of the programs.
pub const OUR_MARK: &str = "OUR_MARK";
/// [`crate::capture::OnFailure`]; a global of the programs.
pub const ON_FAILURE: &str = "ON_FAILURE";
/// Non-zero where the listener must carry our mark to count as alive; a global of the programs.
pub const LISTENER_MARKED: &str = "LISTENER_MARKED";

/// The programs: `cgroup/connect4` and so on. None may be named like its ELF section.
pub const CONNECT4: &str = "capture_connect4";
/// See [`CONNECT4`].
pub const CONNECT6: &str = "capture_connect6";
/// See [`CONNECT4`].
pub const GETPEERNAME4: &str = "peer_name4";
/// See [`CONNECT4`].
pub const GETPEERNAME6: &str = "peer_name6";
/// See [`CONNECT4`].
pub const GETSOCKOPT: &str = "original_dst";
/// See [`CONNECT4`].
pub const SOCKOPS: &str = "established";

/// The most connections that can be captured at once, over all namespaces of one capture. A flow takes
/// 80 bytes of kernel memory in a map that allocates as it fills.
pub const FLOWS_MAX: usize = 1 << 18;
/// The most prefixes of one address family.
pub const RULES_MAX: usize = 1 << 16;
/// The most network namespaces that one capture covers.
pub const LISTENERS_MAX: usize = 1 << 12;

/// What the programs count, each an index into [`COUNTERS`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connections sent to the capture listener.
    Captured = 0,
    /// TCP connections that no rule captures.
    Left = 1,
    /// Connections of sockets that carry our mark.
    Own = 2,
    /// Connections refused because no listener of ours was alive.
    RefusedNoListener = 3,
    /// Connections let through in plaintext because no listener was alive and the operator said so.
    LeftOpen = 4,
    /// Connections refused because the original destination could not be kept with the socket.
    RefusedNoMemory = 5,
    /// Established connections whose flow could not be recorded: the listener resets them.
    FlowsFull = 6,
    /// `getpeername` calls answered with the original destination.
    PeerNames = 7,
    /// `SO_ORIGINAL_DST` questions answered.
    OriginalDsts = 8,
    /// Connections refused because the routes deny them, by their address and port alone.
    DeniedByRoute = 9,
    /// Connections refused because the capture refuses such addresses.
    RefusedByRule = 10,
}

impl Counter {
    /// Every counter with the name it has in statistics.
    pub const ALL: [(Self, &'static str); 11] = [
        (Self::Captured, "captured"),
        (Self::Left, "left_alone"),
        (Self::Own, "own_sockets"),
        (Self::RefusedNoListener, "refused_no_listener"),
        (Self::LeftOpen, "left_open"),
        (Self::RefusedNoMemory, "refused_no_memory"),
        (Self::FlowsFull, "flows_full"),
        (Self::PeerNames, "peer_names_answered"),
        (Self::OriginalDsts, "original_dsts_answered"),
        (Self::DeniedByRoute, "denied_by_route"),
        (Self::RefusedByRule, "refused_by_rule"),
    ];
}

/// How many counters there are.
pub const COUNTERS_LEN: usize = Counter::ALL.len();

/// The object for bypass: its maps, globals and programs.
pub mod bypass {
    /// Sockets by their cookies.
    pub const SOCKETS: &str = "BYPASSED";
    /// Kept with each of them: whose pair it is.
    pub const TAGS: &str = "TAGS";
    /// The pairs.
    pub const SLOTS: &str = "SLOTS";
    /// Where the kernel keeps what is to be seen; a global.
    pub const OFFSETS: &str = "OFFSETS";
    /// Decides on each message.
    pub const VERDICT: &str = "bypass";
    /// Looks at a pair for the daemon.
    pub const LOOK: &str = "look";
}
