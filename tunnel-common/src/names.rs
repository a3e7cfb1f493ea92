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
/// The daemon's listening sockets.
pub const SOCKETS: &str = "SOCKETS";
/// Kept with sockets that the daemon made to connect them.
pub const OWN: &str = "OWN";
/// Trie of network namespaces and IPv4 destinations to the source addresses that routes would give.
pub const SOURCES_V4: &str = "SOURCES_V4";
/// The same for IPv6.
pub const SOURCES_V6: &str = "SOURCES_V6";
/// Captured connections from their SYN to their close.
pub const FLOWS: &str = "FLOWS";
/// Original destination, kept with the application's socket.
pub const ORIGINS: &str = "ORIGINS";
/// Per-CPU counters, indexed by [`Counter`].
pub const COUNTERS: &str = "COUNTERS";
/// The ids of control groups to whether they are captured: what was found out once.
pub const GROUPS: &str = "GROUPS";
/// The names on the way to the captured group, by how many levels below the attach root they are; a unit's at 0.
pub const GROUP_NAMES: &str = "GROUP_NAMES";
/// Wakes the daemon when a connection came from a namespace without a listener.
pub const EVENTS: &str = "EVENTS";
/// The version of everything that is kept in pinned maps: part of the names of the pins, so that a daemon
/// adopts only what it understands. Raised with every change of a key, a value, or what they mean.
pub const ABI: u32 = 2;
/// Every map, for the test that loads them all.
pub const MAPS: [&str; 13] = [
    RULES_V4,
    RULES_V6,
    LISTENERS,
    SOCKETS,
    OWN,
    SOURCES_V4,
    SOURCES_V6,
    FLOWS,
    ORIGINS,
    COUNTERS,
    EVENTS,
    GROUPS,
    GROUP_NAMES,
];

/// [`crate::capture::OnFailure`]; a global of the programs.
pub const ON_FAILURE: &str = "ON_FAILURE";
/// Non-zero where the kernel has Multipath TCP (`struct mptcp_sock`); a global of the programs.
pub const HAS_MPTCP: &str = "HAS_MPTCP";
/// How the captured group is known, [`crate::group::BY_PATH`] and so on; a global of the programs.
pub const GROUP_KIND: &str = "GROUP_KIND";
/// [`crate::group::Place`]; a global of the programs.
pub const GROUP_PLACE: &str = "GROUP_PLACE";
/// [`crate::group::Offsets`]; a global of the programs.
pub const GROUP_OFFSETS: &str = "GROUP_OFFSETS";

/// The programs: `cgroup/connect4` and so on. None may be named like its ELF section.
pub const CONNECT4: &str = "capture_connect4";
/// See [`CONNECT4`].
pub const CONNECT6: &str = "capture_connect6";
/// See [`CONNECT4`].
pub const GETPEERNAME4: &str = "peer_name4";
/// See [`CONNECT4`].
pub const GETPEERNAME6: &str = "peer_name6";
/// See [`CONNECT4`].
pub const GETSOCKNAME4: &str = "sock_name4";
/// See [`CONNECT4`].
pub const GETSOCKNAME6: &str = "sock_name6";
/// See [`CONNECT4`].
pub const GETSOCKOPT: &str = "original_dst";
/// See [`CONNECT4`].
pub const SETSOCKOPT: &str = "stay_off_device";
/// See [`CONNECT4`].
pub const SOCKOPS: &str = "tcp_events";
/// See [`CONNECT4`]; in an object of its own, loaded for each network namespace.
pub const STEER: &str = "steer";
/// What stands in that program in place of the cookie of its namespace, until it is loaded.
pub const STEER_NETNS: u64 = 0x6e65_746e_735f_6964;
/// What stands there in place of the generation (upper half) and the number of lanes (lower half).
pub const STEER_LANES: u64 = 0x6c61_6e65_735f_6e6f;

/// The most connections that can be captured at once, over all namespaces of one capture. A flow takes
/// 96 bytes of kernel memory in a map that allocates as it fills.
pub const FLOWS_MAX: usize = 1 << 18;
/// The most prefixes of one address family.
pub const RULES_MAX: usize = 1 << 16;
/// The most network namespaces that one capture covers.
pub const LISTENERS_MAX: usize = 1 << 12;
/// The most listening sockets of one capture, over all namespaces, workers and both address families: all namespaces with
/// eight workers. The map takes 16 bytes for each in advance.
pub const SOCKETS_MAX: usize = 1 << 16;

/// The most routes of one address family, over all namespaces of one capture, of which the source address is known.
pub const SOURCES_MAX: usize = 1 << 16;

/// What the programs count, each an index into [`COUNTERS`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connections sent to the capture listener.
    Captured = 0,
    /// TCP connections that no rule captures.
    Left = 1,
    /// Connections of the daemon's own sockets.
    Own = 2,
    /// Connections refused because no listener of ours was alive.
    RefusedNoListener = 3,
    /// Connections let through in plaintext because no listener was alive and the operator said so.
    LeftOpen = 4,
    /// Connections refused because the original destination could not be kept with the socket.
    RefusedNoMemory = 5,
    /// Connections whose flow could not be recorded: they are refused.
    FlowsFull = 6,
    /// `getpeername` calls answered with the original destination.
    PeerNames = 7,
    /// `SO_ORIGINAL_DST` questions answered.
    OriginalDsts = 8,
    /// Captured connections of sockets that were bound to a network device.
    Unbound = 9,
    /// Connections refused because their socket could not be taken off the network device that it was bound to.
    RefusedBound = 10,
    /// `getsockname` calls answered with the address that the route would have given.
    SockNames = 11,
    /// Connections refused because the routes deny them, by their address and port alone.
    DeniedByRoute = 12,
    /// Connections refused because the capture refuses such addresses.
    RefusedByRule = 13,
    /// Connections that wait for the daemon to listen in their network namespace.
    Waiting = 14,
    /// Connections left alone because the kernel's memory could not be read for the names of their groups.
    GroupUnknown = 15,
}

impl Counter {
    /// Every counter with the name it has in statistics.
    pub const ALL: [(Self, &'static str); 16] = [
        (Self::Captured, "captured"),
        (Self::Left, "left_alone"),
        (Self::Own, "own_sockets"),
        (Self::RefusedNoListener, "refused_no_listener"),
        (Self::LeftOpen, "left_open"),
        (Self::RefusedNoMemory, "refused_no_memory"),
        (Self::FlowsFull, "flows_full"),
        (Self::PeerNames, "peer_names_answered"),
        (Self::OriginalDsts, "original_dsts_answered"),
        (Self::Unbound, "taken_off_device"),
        (Self::RefusedBound, "refused_on_device"),
        (Self::SockNames, "sock_names_answered"),
        (Self::DeniedByRoute, "denied_by_route"),
        (Self::RefusedByRule, "refused_by_rule"),
        (Self::Waiting, "waited_for_listener"),
        (Self::GroupUnknown, "group_unknown"),
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
