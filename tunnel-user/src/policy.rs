//! Who may reach what through our listeners.
//!
//! Enters: a peer's identity, the target of its CONNECT request, and each address that a name resolved
//! to. Leaves: leave to dial, or the reason why not. Invariant: what no rule allows is refused, and a broad
//! rule never opens link-local, metadata or our own listeners. It never resolves a name, and never dials.
//!
//! A CIDR rule admits literal addresses and the addresses that names resolve to. A NAME rule admits that
//! name, whatever it resolves to. Neither opens a guarded range ([`GUARDED`]): for that a CIDR rule has to
//! lie inside the range; nor one of our own listeners: for that a rule has to state its address and its
//! port, and nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    config::{AddrPattern, Policy, TargetPattern},
    flow::{Identity, Target},
    own::OwnListeners,
};

/// Ranges that only a rule inside them opens.
pub const GUARDED: [IpNet; 7] = [
    // The gateway's own services, which trust whoever is on the same host.
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
    // Link-local; clouds serve credentials to whoever asks 169.254.169.254.
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10)),
    // The same credentials over IPv6 (AWS).
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128)),
    // "This host" (RFC 1122 section 3.2.1.3): Linux connects it to loopback.
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128)),
];

/// Why a peer may not reach a target. Each says what a peer and an operator may know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No rule speaks of this peer and target.
    #[error("no policy lets {who} reach {target}")]
    NoRule {
        /// The peer.
        who: String,
        /// What it asked for.
        target: Target,
    },
    /// The name is allowed only by the addresses it resolves to, and this is none of them.
    #[error("no policy lets {who} reach {addr}, to which {target} resolves")]
    Resolved {
        /// The peer.
        who: String,
        /// What it asked for.
        target: Target,
        /// What that resolved to.
        addr: SocketAddr,
    },
    /// Link-local, metadata, or unspecified.
    #[error("{addr} is in {range}, which only a policy for addresses inside that range opens")]
    Guarded {
        /// The address.
        addr: SocketAddr,
        /// The range.
        range: IpNet,
    },
    /// One of our own listeners.
    #[error("{0} is a listener of this gateway, which only a policy for exactly that address and port opens")]
    OwnListener(SocketAddr),
}

/// The rules of a configuration, and the listeners that they protect.
#[derive(Clone, Debug)]
pub struct Policies {
    rules: Vec<Policy>,
    own: OwnListeners,
}

impl Policies {
    /// The rules of the configuration, and the addresses that our listeners are bound to (with the ports
    /// that they got, where the configuration says 0).
    pub fn new(rules: Vec<Policy>, listeners: &[SocketAddr]) -> Self {
        Self { rules, own: OwnListeners::new(listeners) }
    }

    /// Whether this peer may ask for this target. A yes is a [`Permit`], which every address has to pass
    /// before it is dialled, also the address of a literal target. A name that only its addresses can
    /// admit gets a permit too.
    pub fn check_target<'a>(
        &'a self,
        who: Option<&'a Identity>,
        target: &'a Target,
    ) -> Result<Permit<'a>, Denied> {
        let permit = |by_name| Permit { policies: self, who, target, by_name };
        let for_peer = || self.patterns_of(who);
        match target {
            Target::Addr(addr) => {
                let permit = permit(false);
                permit.allows_addr(*addr)?;
                Ok(permit)
            }
            Target::Name(..) if for_peer().any(|p| p.contains(target)) => Ok(permit(true)),
            Target::Name(_, port) => {
                // Resolving is for those only whom some address could admit.
                let some =
                    for_peer().any(|p| matches!(p, TargetPattern::Addr(a) if a.ports().contains(*port)));
                if some { Ok(permit(false)) } else { Err(no_rule(who, target)) }
            }
        }
    }

    fn patterns_of<'a>(&'a self, who: Option<&'a Identity>) -> impl Iterator<Item = &'a TargetPattern> {
        self.rules.iter().filter(move |r| r.identity.contains(who)).flat_map(|r| &r.target)
    }

    fn addr_patterns_of<'a>(&'a self, who: Option<&'a Identity>) -> impl Iterator<Item = &'a AddrPattern> {
        self.patterns_of(who).filter_map(|p| match p {
            TargetPattern::Addr(a) => Some(a),
            TargetPattern::Name(_) => None,
        })
    }
}

/// Leave to dial the addresses of one target.
#[derive(Clone, Copy, Debug)]
pub struct Permit<'a> {
    policies: &'a Policies,
    who: Option<&'a Identity>,
    target: &'a Target,
    by_name: bool,
}

impl Permit<'_> {
    /// Whether the target may be passed on to a next hop, which resolves a name itself: a name that only
    /// its addresses could admit may not.
    pub fn allows_unresolved(&self) -> Result<(), Denied> {
        match self.target {
            Target::Name(..) if !self.by_name => Err(no_rule(self.who, self.target)),
            _ => Ok(()),
        }
    }

    /// Whether `addr`, to which the target resolved or which it is, may be dialled.
    pub fn allows_addr(&self, addr: SocketAddr) -> Result<(), Denied> {
        let addr = SocketAddr::new(reached_by(addr.ip()), addr.port());
        let rules = || self.policies.addr_patterns_of(self.who).filter(|p| p.contains(addr));
        if self.policies.own.contains(addr) && !rules().any(|p| is_exactly(p, addr)) {
            return Err(Denied::OwnListener(addr));
        }
        // An exact rule is inside every range that it could concern.
        if let Some(range) = GUARDED.into_iter().find(|g| g.contains(&addr.ip()))
            && !rules().any(|p| range.contains(&p.net()))
        {
            return Err(Denied::Guarded { addr, range });
        }
        if self.by_name || rules().next().is_some() {
            return Ok(());
        }
        Err(match self.target {
            Target::Addr(_) => no_rule(self.who, self.target),
            Target::Name(..) => {
                Denied::Resolved { who: name_of(self.who), target: self.target.clone(), addr }
            }
        })
    }
}

fn no_rule(who: Option<&Identity>, target: &Target) -> Denied {
    Denied::NoRule { who: name_of(who), target: target.clone() }
}

fn name_of(who: Option<&Identity>) -> String {
    who.map_or_else(|| "a peer without identity".to_owned(), ToString::to_string)
}

fn is_exactly(pattern: &AddrPattern, addr: SocketAddr) -> bool {
    pattern.net() == IpNet::from(addr.ip()) && pattern.ports().ranges() == [(addr.port(), addr.port())]
}

/// The well-known NAT64 prefix, 64:ff9b::/96 (RFC 6052 section 2.1).
const NAT64: [u16; 6] = [0x64, 0xff9b, 0, 0, 0, 0];

/// The address that a connection to `ip` reaches: the IPv4 address behind a v4-mapped or a NAT64 one.
fn reached_by(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) if v6.segments()[..6] == NAT64 => {
            let [.., a, b, c, d] = v6.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        other => other.to_canonical(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Peers;

    fn policies(rules: &[(&str, &[&str])], listeners: &[&str]) -> Policies {
        let rule = |(who, what): &(&str, &[&str])| Policy {
            identity: match *who {
                "any" => Peers::Any,
                name => Peers::Of(vec![name.parse().unwrap()]),
            },
            target: what.iter().map(|t| t.parse().unwrap()).collect(),
        };
        let listeners: Vec<_> = listeners.iter().map(|l| l.parse().unwrap()).collect();
        let mut p = Policies::new(rules.iter().map(rule).collect(), &listeners);
        let local = || Some(vec!["10.9.0.1".parse().unwrap(), "fd00::9".parse().unwrap()]);
        p.own = OwnListeners::with_local(&listeners, local);
        p
    }

    /// Whether web may reach `target` at `addr`.
    fn reach(p: &Policies, target: &str, addr: &str) -> Result<(), Denied> {
        let web = Identity("spiffe://example.org/ns/a/sa/web".into());
        let target = target.parse().unwrap();
        let permit = p.check_target(Some(&web), &target)?;
        permit.allows_addr(addr.parse().unwrap())
    }

    fn addr(p: &Policies, addr: &str) -> Result<(), Denied> {
        reach(p, addr, addr)
    }

    #[test]
    fn nothing_is_allowed_until_a_rule_says_so() {
        let none = policies(&[], &[]);
        assert!(matches!(addr(&none, "10.0.0.1:80"), Err(Denied::NoRule { .. })));
        assert!(matches!(reach(&none, "web.internal:80", "10.0.0.1:80"), Err(Denied::NoRule { .. })));

        let web = "spiffe://example.org/ns/*/sa/web";
        let p =
            policies(&[(web, &["10.0.0.0/8:80"]), ("spiffe://example.org/db", &["10.0.0.0/8:5432"])], &[]);
        assert_eq!(addr(&p, "10.0.0.1:80"), Ok(()));
        assert_eq!(addr(&p, "[::ffff:10.0.0.1]:80"), Ok(()));
        assert_eq!(
            addr(&p, "10.0.0.1:5432").unwrap_err().to_string(),
            "no policy lets spiffe://example.org/ns/a/sa/web reach 10.0.0.1:5432"
        );
        assert!(p.check_target(None, &"10.0.0.1:80".parse().unwrap()).is_err(), "nobody is not web");
    }

    #[test]
    fn a_name_passes_by_its_name_or_by_every_address() {
        let by_name = policies(&[("any", &["*.internal:80"])], &[]);
        assert_eq!(reach(&by_name, "web.internal:80", "203.0.113.1:80"), Ok(()));
        assert!(reach(&by_name, "web.internal:81", "203.0.113.1:81").is_err());
        assert!(addr(&by_name, "203.0.113.1:80").is_err(), "a name rule admits no literal address");

        let by_addr = policies(&[("any", &["10.0.0.0/8:80"])], &[]);
        assert_eq!(reach(&by_addr, "web.internal:80", "10.0.0.1:80"), Ok(()));
        assert!(matches!(reach(&by_addr, "web.internal:80", "203.0.113.1:80"), Err(Denied::Resolved { .. })));
        let web: Target = "web.internal:81".parse().unwrap();
        assert!(by_addr.check_target(None, &web).is_err(), "not even resolved");
    }

    #[test]
    fn link_local_opens_only_to_a_rule_inside_it() {
        let broad = policies(&[("any", &["0.0.0.0/0", "::/0", "169.0.0.0/8", "*.internal"])], &[]);
        for guarded in [
            "169.254.169.254:80",
            "[::ffff:169.254.169.254]:80",
            "[64:ff9b::169.254.169.254]:80",
            "[fe80::1]:80",
            "[fd00:ec2::254]:80",
            "0.0.0.0:80",
            "[::]:80",
            "[::ffff:0.0.0.0]:80",
        ] {
            assert!(matches!(addr(&broad, guarded), Err(Denied::Guarded { .. })), "{guarded}");
            assert!(
                matches!(reach(&broad, "rebound.internal:80", guarded), Err(Denied::Guarded { .. })),
                "a name that resolves to {guarded}"
            );
        }
        let narrow = policies(&[("any", &["169.254.169.254:80", "fe80::/10", "*.internal"])], &[]);
        assert_eq!(addr(&narrow, "169.254.169.254:80"), Ok(()));
        assert_eq!(reach(&narrow, "metadata.internal:80", "169.254.169.254:80"), Ok(()));
        assert_eq!(addr(&narrow, "[fe80::1]:22"), Ok(()));
        assert!(addr(&narrow, "169.254.169.254:81").is_err());
        assert!(addr(&narrow, "169.254.1.1:80").is_err());
    }

    #[test]
    fn our_own_listeners_open_only_to_their_exact_address() {
        let all: &[(&str, &[&str])] = &[("any", &["0.0.0.0/0", "::/0", "*.internal"])];
        let p = policies(all, &["0.0.0.0:15008", "[fd00::1]:15009"]);
        for own in [
            "127.0.0.1:15008",
            "127.9.9.9:15008",
            "10.9.0.1:15008",
            "[::ffff:10.9.0.1]:15008",
            "[fd00::1]:15009",
        ] {
            assert!(matches!(addr(&p, own), Err(Denied::OwnListener(_))), "{own}");
            assert!(matches!(reach(&p, "me.internal:15008", own), Err(Denied::OwnListener(_))), "{own}");
        }
        for other in ["10.9.0.2:15008", "10.9.0.1:15009", "[fd00::9]:15008", "[fd00::2]:15009"] {
            assert_eq!(addr(&p, other), Ok(()), "{other}");
        }
        let dual = policies(all, &["[::]:15008"]);
        for own in ["10.9.0.1:15008", "[fd00::9]:15008", "[::1]:15008", "127.0.0.1:15008"] {
            assert!(matches!(addr(&dual, own), Err(Denied::OwnListener(_))), "{own}");
        }
        let lo =
            policies(&[("any", &["0.0.0.0/8", "10.9.0.1:15008", "127.0.0.0/8:15008"])], &["127.0.0.1:15008"]);
        assert!(matches!(addr(&lo, "0.0.0.0:15008"), Err(Denied::OwnListener(_))));
        assert!(matches!(addr(&lo, "127.0.0.1:15008"), Err(Denied::OwnListener(_))));

        let exact = policies(&[("any", &["10.9.0.1:15008", "127.0.0.1"])], &["0.0.0.0:15008"]);
        assert_eq!(addr(&exact, "10.9.0.1:15008"), Ok(()));
        assert!(addr(&exact, "127.0.0.1:15008").is_err(), "the port has to be stated");
    }

    #[test]
    fn a_name_is_passed_on_unresolved_only_by_a_rule_for_names() {
        let p = policies(&[("any", &["10.0.0.0/8", "*.internal"])], &[]);
        let passed = |text: &str| {
            let target: Target = text.parse().unwrap();
            p.check_target(None, &target).and_then(|permit| permit.allows_unresolved())
        };
        assert_eq!(passed("web.internal:80"), Ok(()));
        assert_eq!(passed("10.1.2.3:80"), Ok(()));
        assert!(matches!(passed("web.example:80"), Err(Denied::NoRule { .. })));
    }

    #[test]
    fn unknown_local_addresses_count_as_ours() {
        let mut p = policies(&[("any", &["0.0.0.0/0"])], &["0.0.0.0:15008"]);
        p.own = OwnListeners::with_local(&["0.0.0.0:15008".parse().unwrap()], || None);
        assert!(matches!(addr(&p, "203.0.113.1:15008"), Err(Denied::OwnListener(_))));
        assert_eq!(addr(&p, "203.0.113.1:15009"), Ok(()));
    }

    proptest! {
        /// Any rule whose network is not inside the guarded range leaves it closed.
        #[test]
        fn no_broader_rule_opens_link_local(
            prefix in 0..=16u8, host: u16, port in 1..=u16::MAX, v6 in any::<u128>(), prefix6 in 0..10u8,
        ) {
            let ip = Ipv4Addr::from(0xa9fe_0000 | u32::from(host));
            let rule = IpNet::from(Ipv4Net::new(ip, prefix).unwrap()).trunc();
            let p = policies(&[("any", &[&rule.to_string(), "*.internal"])], &[]);
            let open = rule.prefix_len() == 16;
            for at in [SocketAddr::from((ip, port)), SocketAddr::from((ip.to_ipv6_mapped(), port))] {
                prop_assert_eq!(addr(&p, &at.to_string()).is_ok(), open);
                prop_assert_eq!(reach(&p, &format!("a.internal:{port}"), &at.to_string()).is_ok(), open);
            }

            let ip = Ipv6Addr::from(0xfe80 << 112 | v6 >> 10);
            let rule = IpNet::from(Ipv6Net::new(ip, prefix6).unwrap()).trunc();
            let p = policies(&[("any", &[&rule.to_string()])], &[]);
            prop_assert!(addr(&p, &SocketAddr::from((ip, port)).to_string()).is_err());
        }
    }
}
