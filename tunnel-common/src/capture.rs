//! The capture decision on a connect(2), from its destination, the rule that its address matches, and the listener of
//! its network namespace: capture it, hold it for the daemon, leave it alone, or refuse it.
//!
//! # Invariants
//! - The cost is one trie lookup and a walk over at most [`PORT_RANGES`] ranges, whatever the number of rules.
//! - A connection that should be captured and cannot be leaves in plaintext only if the operator configured that; a
//!   denied one does not leave.

use crate::addr::Endpoint;

/// The most port ranges that one prefix can hold once its less specific prefixes are folded in, those that are
/// captured, denied and refused together. Sixteen fit one cache line and keep the program's loop short. More is a
/// configuration error, unless routes are the cause: then the daemon denies.
pub const PORT_RANGES: usize = 16;

/// An inclusive range of ports, each end in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    first: [u8; 2],
    last: [u8; 2],
}

impl PortRange {
    /// From `first` to `last`, both included.
    #[inline(always)]
    pub const fn new(first: u16, last: u16) -> Self {
        Self { first: first.to_be_bytes(), last: last.to_be_bytes() }
    }

    /// Whether `port` lies in the range.
    #[inline(always)]
    pub const fn contains(&self, port: u16) -> bool {
        u16::from_be_bytes(self.first) <= port && port <= u16::from_be_bytes(self.last)
    }
}

/// What a rule says of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is captured.
    Captured,
    /// A route denies it, or no route takes it.
    Denied,
    /// The capture refuses it.
    Refused,
}

/// What stands at one prefix of the trie: the ports that are captured, denied and refused there; all others are
/// left alone. The daemon folds the prefixes that contain this one into it, so the longest match alone decides.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where the ranges that are captured end, those that are denied, and those that are refused; then zero.
    ends: [u8; 4],
    ranges: [PortRange; PORT_RANGES],
}

impl Rule {
    /// From ranges that do not overlap. `None` if there are more than [`PORT_RANGES`] in all.
    pub fn new(captured: &[PortRange], denied: &[PortRange], refused: &[PortRange]) -> Option<Self> {
        let mut rule = Self { ends: [0; 4], ranges: [PortRange::new(1, 0); PORT_RANGES] };
        let mut len = 0;
        for (end, segment) in rule.ends.iter_mut().zip([captured, denied, refused]) {
            rule.ranges.get_mut(len..len + segment.len())?.copy_from_slice(segment);
            len += segment.len();
            *end = u8::try_from(len).ok()?;
        }
        Some(rule)
    }

    /// What it says of `port`; `None`: leave it alone.
    #[inline(always)]
    pub fn look(&self, port: u16) -> Option<Kind> {
        let [captured, denied, refused, _] = self.ends;
        let mut i = 0;
        // Bounded by the constant, for the verifier; by the end, for speed.
        while i < PORT_RANGES && i < refused as usize {
            if self.ranges[i].contains(port) {
                return Some(if i < captured as usize {
                    Kind::Captured
                } else if i < denied as usize {
                    Kind::Denied
                } else {
                    Kind::Refused
                });
            }
            i += 1;
        }
        None
    }
}

/// Where captured connections of one network namespace go. Ports are in network order, zero where nothing listens for that
/// address family.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    v4: [u8; 2],
    v6: [u8; 2],
    lanes: u16,
    spread: u16,
    generation: u32,
}

impl Listener {
    /// A proxy of the operator's, on 127.0.0.1 and `::1`; `None` where it does not listen.
    pub fn proxy(v4: Option<u16>, v6: Option<u16>) -> Self {
        Self {
            v4: v4.unwrap_or(0).to_be_bytes(),
            v6: v6.unwrap_or(0).to_be_bytes(),
            lanes: 0,
            spread: 0,
            generation: 0,
        }
    }

    /// The daemon's own sockets on `port`, as many of each address family as there are `lanes`, which it put into the map of
    /// sockets under `generation`. `spread`: the steering program is attached in the namespace, so that any loopback address
    /// reaches them.
    pub const fn own(port: u16, lanes: u16, generation: u32, spread: bool) -> Self {
        Self { v4: port.to_be_bytes(), v6: port.to_be_bytes(), lanes, spread: spread as u16, generation }
    }

    /// Whether the daemon listens, and no proxy in its place.
    #[inline(always)]
    pub const fn is_own(&self) -> bool {
        self.lanes != 0
    }

    /// Under which the daemon's own sockets are in the map.
    #[inline(always)]
    pub const fn generation(&self) -> u32 {
        self.generation
    }

    /// Where a connection to `dst` is sent that waits until the daemon listens in its network namespace. Nobody listens on that
    /// port (tcpmux, RFC 1078), and once the daemon does the port does not matter.
    #[inline(always)]
    pub const fn via_waiting(dst: &Endpoint, v4: bool) -> Endpoint {
        if v4 {
            Endpoint::from_v4_be((SPREAD_V4 | dst.mix() & SPREAD_MASK).to_be(), WAITING_PORT)
        } else {
            Endpoint::from_v6_be(LOCALHOST_V6, WAITING_PORT)
        }
    }

    /// The first of the daemon's own sockets: when that one is alive, all are.
    #[inline(always)]
    pub const fn first(&self, netns: u64, v4: bool) -> SocketKey {
        SocketKey::new(netns, self.generation, 0, v4)
    }

    /// Where a connection to `dst` is sent, or `None` where nothing listens for its address family.
    ///
    /// A TCP connection is told from others by its two addresses and ports. If every destination became the same one, an
    /// application could not use one local port for two of them, nor have more connections than there are local ports. So
    /// each destination has an address of its own: one of 2^22 for IPv4, in a part of 127.0.0.0/8 that nobody uses; for
    /// IPv6, which has only one loopback address, a port of its own.
    #[inline(always)]
    pub const fn via(&self, dst: &Endpoint, v4: bool) -> Option<Endpoint> {
        let port = u16::from_be_bytes(if v4 { self.v4 } else { self.v6 });
        if port == 0 {
            return None;
        }
        Some(match (v4, self.spread != 0) {
            (true, true) => Endpoint::from_v4_be((SPREAD_V4 | dst.mix() & SPREAD_MASK).to_be(), port),
            (true, false) if self.is_own() => Endpoint::from_v4_be(lane_v4(0).to_be(), port),
            (true, false) => Endpoint::from_v4_be(LOCALHOST_V4.to_be(), port),
            (false, true) => Endpoint::from_v6_be(LOCALHOST_V6, spread_port(dst.mix())),
            (false, false) => Endpoint::from_v6_be(LOCALHOST_V6, port),
        })
    }
}

const WAITING_PORT: u16 = 1;
/// 127.0.0.1.
const LOCALHOST_V4: u32 = 0x7f00_0001;
/// `::1`, in network order.
const LOCALHOST_V6: [u32; 4] = [0, 0, 0, 1u32.to_be()];
/// 127.128.0.0/10: captured IPv4 destinations are spread over it. Nothing else is there, and the broadcast address of
/// 127.0.0.0/8 is not in it.
const SPREAD_V4: u32 = 0x7f80_0000;
const SPREAD_MASK: u32 = 0x003f_ffff;
/// 127.84.0.1 and those that follow: where the daemon's IPv4 listeners are bound.
const LANES_V4: u32 = 0x7f54_0001;

/// The address that the daemon's IPv4 listener of a lane is bound to, in host order. Connections come by the map of sockets,
/// so the address is only one that nobody else uses.
#[inline(always)]
pub const fn lane_v4(lane: u16) -> u32 {
    LANES_V4 + lane as u32
}

/// Every port but 0, evenly.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "less than 2^16")]
const fn spread_port(mixed: u32) -> u16 {
    1 + ((mixed as u64 * 0xffff) >> 32) as u16
}

/// Whether an IPv4 address is one that captured destinations are rewritten to, by this daemon or by another one: never
/// captured again.
#[inline(always)]
pub const fn is_spread_v4(addr_be: u32) -> bool {
    u32::from_be(addr_be) & !SPREAD_MASK == SPREAD_V4
}

/// Which of the daemon's listening sockets: of which namespace, from which start of a daemon, for which worker and address
/// family.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketKey {
    netns: u64,
    generation: u32,
    lane: u16,
    v4: u16,
}

impl SocketKey {
    /// `generation` keeps apart what two daemons put into one map, while one takes over from the other.
    #[inline(always)]
    pub const fn new(netns: u64, generation: u32, lane: u16, v4: bool) -> Self {
        Self { netns, generation, lane, v4: v4 as u16 }
    }
}

/// The key of the daemon itself among network namespaces, whose cookies are never 0: while the socket under it is alive, a
/// daemon runs.
pub const DAEMON: u64 = 0;

/// What the daemon is told of a connection from a network namespace in which it does not listen.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The cookie of the namespace.
    pub netns: u64,
    /// The cookie of the socket.
    pub socket: u64,
    /// The process that connects, as the first PID namespace has it.
    pub process: u32,
    /// Its thread.
    pub thread: u32,
}

impl Missing {
    /// From the bytes that the programs wrote; none where there are not enough.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
        let half = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        Some(Self { netns: word(0)?, socket: word(8)?, process: half(16)?, thread: half(20)? })
    }
}

/// A key of the trie of source addresses: the network namespace first, so that one trie holds those of all.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceV4 {
    netns: [u32; 2],
    dst: u32,
}

/// See [`SourceV4`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceV6 {
    netns: [u32; 2],
    dst: [u32; 4],
}

/// The bits of a key in front of the destination: the cookie of the namespace.
pub const SOURCE_NETNS_BITS: u32 = 64;

impl SourceV4 {
    /// `dst` in network order.
    #[inline(always)]
    pub const fn new(netns: u64, dst: u32) -> Self {
        Self { netns: halves(netns), dst }
    }

    /// Whether the key is of this namespace.
    pub const fn is_in(&self, netns: u64) -> bool {
        let [a, b] = halves(netns);
        self.netns[0] == a && self.netns[1] == b
    }
}

impl SourceV6 {
    /// `dst` in network order.
    #[inline(always)]
    pub const fn new(netns: u64, dst: [u32; 4]) -> Self {
        Self { netns: halves(netns), dst }
    }

    /// Whether the key is of this namespace.
    pub const fn is_in(&self, netns: u64) -> bool {
        let [a, b] = halves(netns);
        self.netns[0] == a && self.netns[1] == b
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "halves")]
const fn halves(n: u64) -> [u32; 2] {
    [(n >> 32) as u32, n as u32]
}

/// The lane that takes a connection from this port: the same for every segment of it, and all lanes alike. The kernel gives
/// connections even ports first (`__inet_hash_connect`), so the lowest bit says little.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "less than the lanes")]
pub const fn lane_of(client: &Endpoint, lanes: u16) -> u16 {
    ((client.mix() as u64 * lanes as u64) >> 32) as u16
}

/// What the operator wants while no daemon listens: [`ON_FAILURE_CLOSED`] or [`ON_FAILURE_OPEN`].
pub type OnFailure = u32;
/// Refuse: nothing leaves in plaintext.
pub const ON_FAILURE_CLOSED: OnFailure = 0;
/// Leave the connection alone, as if there were no capture.
pub const ON_FAILURE_OPEN: OnFailure = 1;

/// `IPPROTO_TCP`.
pub const TCP: u32 = 6;

/// What the program does with one `connect`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send it there, to a capture listener, and record where it wanted to go.
    Capture(Endpoint),
    /// Send it there, and hold its SYN back until the daemon, which is told, listens in its network namespace.
    Wait(Endpoint),
    /// Not ours: the kernel goes on as if we were not here.
    Leave,
    /// It should be captured and cannot be: `connect` fails with ECONNREFUSED.
    Refuse,
    /// A route denies it, or no route takes it: `connect` fails with ECONNREFUSED, as a target would have it.
    Deny,
    /// The capture refuses it: `connect` fails with ENETUNREACH, as without a route to such an address.
    Unreachable,
    /// It should be captured and cannot be, and the operator prefers plaintext to failure.
    LeaveOpen,
}

/// The verdict on a TCP connection of a socket that is not the daemon's. `is_alive` says whether anything listens there;
/// `has_daemon` whether a daemon runs that could listen in this network namespace too.
#[inline(always)]
pub fn decide(
    rule: Option<&Rule>,
    listener: Option<&Listener>,
    dst: &Endpoint,
    v4: bool,
    on_failure: OnFailure,
    is_alive: impl FnOnce(&Listener, &Endpoint) -> bool,
    has_daemon: impl FnOnce() -> bool,
) -> Verdict {
    // What another program has captured already.
    if v4 && is_spread_v4(dst.v4_be()) {
        return Verdict::Leave;
    }
    match rule.and_then(|rule| rule.look(dst.port())) {
        None => return Verdict::Leave,
        // Whether a daemon listens or not, and whatever is to happen while none does.
        Some(Kind::Denied) => return Verdict::Deny,
        Some(Kind::Refused) => return Verdict::Unreachable,
        Some(Kind::Captured) => {}
    }
    match listener {
        Some(listener) => {
            if let Some(via) = listener.via(dst, v4)
                && is_alive(listener, &via)
            {
                return Verdict::Capture(via);
            }
        }
        None if has_daemon() => return Verdict::Wait(Listener::via_waiting(dst, v4)),
        None => {}
    }
    if on_failure == ON_FAILURE_OPEN { Verdict::LeaveOpen } else { Verdict::Refuse }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;

    const ALL: PortRange = PortRange::new(0, u16::MAX);

    fn rule(captured: &[PortRange]) -> Rule {
        Rule::new(captured, &[], &[]).expect("few enough")
    }

    fn to(address: &str) -> Endpoint {
        Endpoint::from(address.parse::<std::net::SocketAddr>().expect("an address"))
    }

    fn addr(endpoint: Endpoint) -> std::net::SocketAddr {
        endpoint.into()
    }

    #[test]
    fn no_rule_leaves_the_connection_alone_and_asks_nobody() {
        let asked =
            |_: &Listener, _: &Endpoint| panic!("nothing is looked up for a connection that is not captured");
        let dst = to("192.0.2.1:80");
        assert_eq!(decide(None, None, &dst, true, ON_FAILURE_CLOSED, asked, || true), Verdict::Leave);
        let other = rule(&[PortRange::new(443, 443)]);
        assert_eq!(decide(Some(&other), None, &dst, true, ON_FAILURE_CLOSED, asked, || true), Verdict::Leave);
        // What another program has captured already.
        let rewritten = to("127.130.7.9:15001");
        assert_eq!(decide(Some(&rule(&[ALL])), None, &rewritten, true, 0, asked, || true), Verdict::Leave);
    }

    #[test]
    fn captured_goes_to_the_listener_of_its_family() {
        let r = rule(&[ALL]);
        let (v4, v6) = (to("192.0.2.1:80"), to("[2001:db8::1]:80"));
        let proxy = Listener::proxy(Some(15001), Some(15006));
        assert_eq!(
            decide(Some(&r), Some(&proxy), &v4, true, 0, |_, _| true, || true),
            Verdict::Capture(to("127.0.0.1:15001"))
        );
        assert_eq!(
            decide(Some(&r), Some(&proxy), &v6, false, 0, |_, _| true, || true),
            Verdict::Capture(to("[::1]:15006"))
        );
        let own = Listener::own(61001, 2, 7, false);
        assert_eq!(own.via(&v4, true), Some(to("127.84.0.1:61001")));
        assert_eq!(own.via(&v6, false), Some(to("[::1]:61001")));
        assert!(own.is_own() && !proxy.is_own());
    }

    #[test]
    fn no_live_listener_is_refused_unless_the_operator_said_open() {
        let r = rule(&[ALL]);
        let v4_only = Listener::proxy(Some(15001), None);
        let (v4, v6) = (to("192.0.2.1:80"), to("[2001:db8::1]:80"));
        for listener in [None, Some(&v4_only)] {
            let ask = |on_failure| decide(Some(&r), listener, &v6, false, on_failure, |_, _| true, || false);
            assert_eq!(ask(ON_FAILURE_CLOSED), Verdict::Refuse);
            assert_eq!(ask(ON_FAILURE_OPEN), Verdict::LeaveOpen);
        }
        let dead = |_: &Listener, _: &Endpoint| false;
        assert_eq!(
            decide(Some(&r), Some(&v4_only), &v4, true, ON_FAILURE_CLOSED, dead, || true),
            Verdict::Refuse
        );
        // A value nobody defined is the safe one.
        assert_eq!(decide(Some(&r), None, &v4, true, 99, |_, _| true, || false), Verdict::Refuse);
    }

    #[test]
    fn every_lane_takes_its_share() {
        for lanes in [1, 2, 3, 64] {
            let mut taken = std::vec![0; usize::from(lanes)];
            // What the kernel gives first: even ports.
            for port in (32768..60999u16).step_by(2) {
                taken[usize::from(lane_of(&Endpoint::from_v4_be(LOCALHOST_V4.to_be(), port), lanes))] += 1;
            }
            let fair = (60999 - 32768) / 2 / i32::from(lanes);
            assert!(taken.iter().all(|n| (fair * 3 / 4..=fair * 5 / 4).contains(n)), "{lanes}: {taken:?}");
        }
    }

    proptest! {
        #[test]
        fn destinations_are_spread_over_addresses_that_nobody_uses(ip: u32, words: [u32; 4], port: u16) {
            let own = Listener::own(61001, 2, 7, true);
            let via = addr(own.via(&Endpoint::from_v4_be(ip, port), true).expect("it listens"));
            prop_assert!(via.port() == 61001 && via.ip().is_loopback());
            prop_assert!(is_spread_v4(Endpoint::from(via).v4_be()));
            let via = addr(own.via(&Endpoint::from_v6_be(words, port), false).expect("it listens"));
            prop_assert_eq!(via.ip(), std::net::IpAddr::V6(std::net::Ipv6Addr::LOCALHOST));
            prop_assert!(via.port() != 0);
        }

        #[test]
        fn neighbouring_destinations_do_not_meet(ip: u32, port: u16) {
            let own = Listener::own(61001, 2, 7, true);
            let ports: std::collections::HashSet<_> = (0..16u16)
                .map(|n| own.via(&Endpoint::from_v6_be([ip, 0, 0, (u32::from(n) + 1).to_be()], port), false))
                .collect();
            // Of 2^16 places, 16 meet once in 546 times: two pairs would be no accident.
            prop_assert!(ports.len() >= 15);
        }
    }

    #[test]
    fn what_is_denied_or_refused_fails_whether_a_daemon_listens_or_not_and_asks_nobody() {
        let asked =
            |_: &Listener, _: &Endpoint| panic!("nothing is looked up for a connection that fails anyway");
        let port = |port| PortRange::new(port, port);
        let r = Rule::new(&[port(80)], &[port(25)], &[port(53)]).expect("few enough");
        let l = Listener::own(61001, 2, 7, true);
        for listener in [None, Some(&l)] {
            for on_failure in [ON_FAILURE_CLOSED, ON_FAILURE_OPEN] {
                let at = |port| {
                    let dst = Endpoint::from_v4_be(LOCALHOST_V4.to_be(), port);
                    decide(Some(&r), listener, &dst, true, on_failure, asked, || true)
                };
                assert_eq!((at(25), at(53), at(81)), (Verdict::Deny, Verdict::Unreachable, Verdict::Leave));
            }
        }
    }

    #[test]
    fn a_namespace_without_listeners_waits_for_the_daemon_where_one_runs() {
        let r = rule(&[ALL]);
        for (dst, v4, via) in [("192.0.2.1:80", true, None), ("[2001:db8::1]:80", false, Some("[::1]:1"))] {
            let ask = |daemon| decide(Some(&r), None, &to(dst), v4, ON_FAILURE_OPEN, |_, _| true, || daemon);
            let Verdict::Wait(to_nobody) = ask(true) else { panic!("it does not wait") };
            assert_eq!(to_nobody.port(), 1);
            assert!(via.is_none_or(|via| to(via) == to_nobody) && addr(to_nobody).ip().is_loopback());
            assert_eq!(ask(false), Verdict::LeaveOpen);
        }
    }

    #[test]
    fn too_many_ranges_are_refused() {
        assert!(Rule::new(&[ALL; PORT_RANGES], &[], &[]).is_some());
        assert!(Rule::new(&[ALL; PORT_RANGES + 1], &[], &[]).is_none());
        assert!(Rule::new(&[], &[ALL; PORT_RANGES - 1], &[ALL]).is_some());
        assert!(Rule::new(&[], &[ALL; PORT_RANGES], &[ALL]).is_none());
        assert!(Rule::new(&[ALL], &[ALL; PORT_RANGES], &[]).is_none());
    }

    proptest! {
        #[test]
        fn a_rule_says_what_its_ranges_contain(
            ranges in proptest::collection::vec((any::<u16>(), any::<u16>(), 0..3usize), 0..=PORT_RANGES),
            port: u16,
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(a, b, kind)| (a.min(b), a.max(b), kind)).collect();
            let of = |wanted| {
                let of_kind = ranges.iter().filter(move |(.., kind)| *kind == wanted);
                of_kind.map(|&(a, b, _)| PortRange::new(a, b)).collect::<Vec<_>>()
            };
            let r = Rule::new(&of(0), &of(1), &of(2)).expect("few enough");
            let contains = |kind| of(kind).iter().any(|range| range.contains(port));
            // Ranges of a rule do not overlap; where these do, the first kind holds.
            let kinds = [Kind::Captured, Kind::Denied, Kind::Refused];
            let wanted = kinds.into_iter().enumerate().find(|(kind, _)| contains(*kind));
            prop_assert_eq!(r.look(port), wanted.map(|(_, kind)| kind));
        }
    }
}
