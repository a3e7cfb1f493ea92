//! The capture decision.
//!
//! Enters: one `connect` (protocol, mark, port), the rule its address matched, the listener of its
//! network namespace. Leaves: capture it, leave it alone, or refuse it, and with which error. Invariant: the
//! cost is one trie lookup and a walk over at most [`PORT_RANGES`] ranges, whatever the number of rules; a
//! connection that ought to be captured and cannot be never leaves in plaintext unless the operator said so,
//! and one that is denied never does. It never looks at more than it is given.

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

/// Where captured connections of one network namespace go: ports of the capture listener there, in
/// network order, zero where there is none for that address family.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    v4: [u8; 2],
    v6: [u8; 2],
}

impl Listener {
    /// Ports of the listeners on 127.0.0.1 and `::1`; `None` where there is none.
    pub fn new(v4: Option<u16>, v6: Option<u16>) -> Self {
        Self { v4: v4.unwrap_or(0).to_be_bytes(), v6: v6.unwrap_or(0).to_be_bytes() }
    }

    /// The port for a connection that goes over IPv4 (v4-mapped included) or IPv6.
    #[inline(always)]
    pub const fn port(&self, v4: bool) -> Option<u16> {
        let port = u16::from_be_bytes(if v4 { self.v4 } else { self.v6 });
        if port == 0 { None } else { Some(port) }
    }
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
    /// Send it to the capture listener on this port, and record where it wanted to go.
    Capture(u16),
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

/// Whether a `connect` is a candidate at all, from what costs nothing to know: only TCP, and no socket
/// that carries the daemon's mark (which takes CAP_NET_ADMIN to set).
#[inline(always)]
pub const fn is_candidate(protocol: u32, mark: u32, our_mark: u32) -> bool {
    protocol == TCP && mark != our_mark
}

/// The verdict on a candidate. `port_alive` says whether a listener of the daemon's is alive on a port.
#[inline(always)]
pub fn decide(
    rule: Option<&Rule>,
    listener: Option<&Listener>,
    v4: bool,
    port: u16,
    on_failure: OnFailure,
    port_alive: impl FnOnce(u16) -> bool,
) -> Verdict {
    match rule.and_then(|rule| rule.look(port)) {
        None => return Verdict::Leave,
        // Whether a daemon listens or not, and whatever is to happen while none does.
        Some(Kind::Denied) => return Verdict::Deny,
        Some(Kind::Refused) => return Verdict::Unreachable,
        Some(Kind::Captured) => {}
    }
    if let Some(to) = listener.and_then(|l| l.port(v4))
        && port_alive(to)
    {
        return Verdict::Capture(to);
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

    #[test]
    fn only_tcp_without_our_mark_is_a_candidate() {
        assert!(is_candidate(TCP, 0, 7));
        assert!(is_candidate(TCP, 8, 7));
        assert!(!is_candidate(TCP, 7, 7));
        assert!(!is_candidate(17, 0, 7));
    }

    #[test]
    fn no_rule_leaves_the_connection_alone_and_asks_nobody() {
        let asked = |_| panic!("no listener is looked up for a connection that is not captured");
        assert_eq!(decide(None, None, true, 80, ON_FAILURE_CLOSED, asked), Verdict::Leave);
        let other = rule(&[PortRange::new(443, 443)]);
        assert_eq!(decide(Some(&other), None, true, 80, ON_FAILURE_CLOSED, asked), Verdict::Leave);
    }

    #[test]
    fn captured_goes_to_the_listener_of_its_family() {
        let l = Listener::new(Some(15001), Some(15006));
        let r = rule(&[ALL]);
        assert_eq!(decide(Some(&r), Some(&l), true, 80, 0, |_| true), Verdict::Capture(15001));
        assert_eq!(decide(Some(&r), Some(&l), false, 80, 0, |_| true), Verdict::Capture(15006));
    }

    #[test]
    fn no_live_listener_is_refused_unless_the_operator_said_open() {
        let r = rule(&[ALL]);
        let v4_only = Listener::new(Some(15001), None);
        for listener in [None, Some(&v4_only)] {
            assert_eq!(decide(Some(&r), listener, false, 80, ON_FAILURE_CLOSED, |_| true), Verdict::Refuse);
            assert_eq!(decide(Some(&r), listener, false, 80, ON_FAILURE_OPEN, |_| true), Verdict::LeaveOpen);
        }
        assert_eq!(decide(Some(&r), Some(&v4_only), true, 80, ON_FAILURE_CLOSED, |_| false), Verdict::Refuse);
        // A value nobody defined is the safe one.
        assert_eq!(decide(Some(&r), None, true, 80, 99, |_| true), Verdict::Refuse);
    }

    #[test]
    fn what_is_denied_or_refused_fails_whether_a_daemon_listens_or_not_and_asks_nobody() {
        let asked = |_| panic!("no listener is looked up for a connection that fails anyway");
        let port = |port| PortRange::new(port, port);
        let r = Rule::new(&[port(80)], &[port(25)], &[port(53)]).expect("few enough");
        let l = Listener::new(Some(15001), None);
        for listener in [None, Some(&l)] {
            for on_failure in [ON_FAILURE_CLOSED, ON_FAILURE_OPEN] {
                let at = |port| decide(Some(&r), listener, true, port, on_failure, asked);
                assert_eq!((at(25), at(53), at(81)), (Verdict::Deny, Verdict::Unreachable, Verdict::Leave));
            }
        }
        assert_eq!(
            decide(Some(&r), Some(&l), true, 80, ON_FAILURE_CLOSED, |_| true),
            Verdict::Capture(15001)
        );
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
