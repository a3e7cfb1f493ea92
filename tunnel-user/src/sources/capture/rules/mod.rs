//! From patterns and routes to what the kernel looks up: one [`Rule`] per distinct prefix, with everything that its less
//! specific prefixes say folded in.
//!
//! Which pattern wins: the longest prefix that speaks about the port; on the same prefix, exclude over refuse over
//! include over what is excluded by default. What is included then goes by the routes, in their order.
//!
//! # Invariants
//! - The longest prefix that matches an address decides by itself, so the kernel does one lookup however many rules there are.
//! - Nothing is denied that the router would not deny.

mod ports;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tunnel_common::{
    capture::{PORT_RANGES, PortRange, Rule},
    names::RULES_MAX,
};

pub use self::ports::Ports;
use self::ports::{intersect, subtract, union};

/// Every port.
const ALL: [(u16, u16); 1] = [(0, u16::MAX)];

/// A network and ports in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// The prefix. A v4-mapped one means IPv4.
    pub net: IpNet,
    /// The ports; empty means all.
    pub ports: Ports,
}

/// What a capture says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patterns {
    /// What is left alone unless another pattern of the same or a longer prefix says otherwise.
    pub default_exclude: Vec<Pattern>,
    /// What goes by the routes.
    pub include: Vec<Pattern>,
    /// What fails.
    pub refuse: Vec<Pattern>,
    /// What is left alone.
    pub exclude: Vec<Pattern>,
}

/// What one route says of captured connections before a byte of theirs has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which of them it may take; empty: all.
    pub to: Vec<Pattern>,
    /// Whether it takes them for certain, and denies them.
    pub denies: bool,
}

/// Rules for both tries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// IPv4, v4-mapped destinations included.
    pub v4: Vec<(Ipv4Net, Rule)>,
    /// IPv6.
    pub v6: Vec<(Ipv6Net, Rule)>,
    /// At how many prefixes the daemon has to deny what could be denied here, for want of room.
    pub left_to_daemon: usize,
}

/// Why patterns do not fit the kernel's tables.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RulesError {
    /// More ranges than a rule holds.
    #[error(
        "{0} would need {1} port ranges once the patterns that contain it are counted in; the limit is {PORT_RANGES}"
    )]
    TooManyRanges(IpNet, usize),
    /// More prefixes than a trie holds.
    #[error("{0} prefixes of one address family; the limit is {RULES_MAX}")]
    TooManyPrefixes(usize),
}

/// What stands on one prefix.
#[derive(Default)]
struct Entry {
    default_exclude: Ports,
    include: Ports,
    refuse: Ports,
    exclude: Ports,
    /// By their places.
    steps: Vec<(usize, Ports)>,
}

impl Entry {
    /// Whether only routes speak of it.
    fn is_of_routes(&self) -> bool {
        [&self.default_exclude, &self.include, &self.refuse, &self.exclude]
            .iter()
            .all(|ports| ports.is_empty())
    }
}

/// The routes, as far as one of them takes every connection.
struct Steps<'a> {
    limited: &'a [Step],
    /// What becomes of connections that none of those takes.
    rest_denied: bool,
}

impl<'a> Steps<'a> {
    fn new(all: &'a [Step]) -> Self {
        let every = all.iter().position(|step| step.to.is_empty());
        let limited = &all[..every.unwrap_or(all.len())];
        Self { limited, rest_denied: every.is_none_or(|i| all[i].denies) }
    }
}

/// What one prefix says of the ports.
#[derive(Default)]
struct Says {
    captured: Ports,
    denied: Ports,
    refused: Ports,
}

impl Says {
    fn rule(&self) -> Option<Rule> {
        let ranges = |ports: &Ports| ports.iter().map(|&(a, b)| PortRange::new(a, b)).collect::<Vec<_>>();
        Rule::new(&ranges(&self.captured), &ranges(&self.denied), &ranges(&self.refused))
    }
}

/// What a capture says of the ports of one prefix; the rest is left alone.
#[derive(Default)]
struct Wanted {
    included: Ports,
    refused: Ports,
}

impl Wanted {
    fn leave_alone(&mut self, ports: &[(u16, u16)]) {
        self.included = subtract(mem::take(&mut self.included), ports);
        self.refused = subtract(mem::take(&mut self.refused), ports);
    }

    fn include(&mut self, ports: &[(u16, u16)]) {
        self.included = union(mem::take(&mut self.included), ports);
        self.refused = subtract(mem::take(&mut self.refused), ports);
    }

    fn refuse(&mut self, ports: &[(u16, u16)]) {
        self.included = subtract(mem::take(&mut self.included), ports);
        self.refused = union(mem::take(&mut self.refused), ports);
    }
}

type Entries = BTreeMap<IpNet, Entry>;

/// Folds the patterns, and the routes in their order. Without routes, what is included is captured: somebody else
/// carries it.
pub fn compile(patterns: &Patterns, routes: Option<&[Step]>) -> Result<Rules, RulesError> {
    let mut entries = Entries::new();
    let mut add = |list: &[Pattern], of: fn(&mut Entry) -> &mut Ports| {
        for p in list {
            of(entries.entry(canonical(p.net)).or_default()).extend_from_slice(ranges(&p.ports));
        }
    };
    add(&patterns.default_exclude, |entry| &mut entry.default_exclude);
    add(&patterns.include, |entry| &mut entry.include);
    add(&patterns.refuse, |entry| &mut entry.refuse);
    add(&patterns.exclude, |entry| &mut entry.exclude);
    let steps = routes.map(Steps::new);
    for (place, step) in steps.iter().flat_map(|steps| steps.limited.iter().enumerate()) {
        for p in &step.to {
            let entry = entries.entry(canonical(p.net)).or_default();
            entry.steps.push((place, ranges(&p.ports).to_vec()));
        }
    }
    let (v4, left4) = family(&entries, steps.as_ref(), |net| matches!(net, IpNet::V4(_)))?;
    let (v6, left6) = family(&entries, steps.as_ref(), |net| matches!(net, IpNet::V6(_)))?;
    let mut rules = Rules { left_to_daemon: left4 + left6, ..Rules::default() };
    for (net, rule) in v4.into_iter().chain(v6) {
        match net {
            IpNet::V4(net) => rules.v4.push((net, rule)),
            IpNet::V6(net) => rules.v6.push((net, rule)),
        }
    }
    Ok(rules)
}

/// The rules of one address family, and at how many prefixes they leave to the daemon what could be denied. What the
/// capture itself says has to fit; where the routes do not, the daemon denies.
fn family(
    entries: &Entries,
    steps: Option<&Steps<'_>>,
    is_of: fn(&IpNet) -> bool,
) -> Result<(BTreeMap<IpNet, Rule>, usize), RulesError> {
    let (rules, left) = fold(entries, steps, is_of)?;
    if rules.len() <= RULES_MAX {
        return Ok((rules, left));
    }
    let without_routes = fold(entries, None, is_of)?.0;
    match without_routes.len() {
        n if n > RULES_MAX => Err(RulesError::TooManyPrefixes(n)),
        _ => Ok((without_routes, rules.len())),
    }
}

/// The rules of one address family, however many.
fn fold(
    entries: &Entries,
    steps: Option<&Steps<'_>>,
    is_of: fn(&IpNet) -> bool,
) -> Result<(BTreeMap<IpNet, Rule>, usize), RulesError> {
    let mut rules: BTreeMap<IpNet, Rule> = BTreeMap::new();
    let mut left = 0;
    let entries_of = || entries.iter().filter(|(net, _)| is_of(net));
    let lengths: BTreeSet<u8> = entries_of().map(|(net, _)| net.prefix_len()).collect();
    for (net, entry) in entries_of() {
        if steps.is_none() && entry.is_of_routes() {
            continue;
        }
        let mut says = says(entries, *net, &lengths, steps);
        let rule = match says.rule() {
            Some(rule) => rule,
            None => {
                left += usize::from(!says.denied.is_empty());
                says.captured = union(says.captured, &mem::take(&mut says.denied));
                let needed = says.captured.len() + says.refused.len();
                says.rule().ok_or(RulesError::TooManyRanges(*net, needed))?
            }
        };
        // Networks come before those that they contain. One that only routes speak of, and that says what the next one
        // that contains it says, is not needed.
        let wider = || containing(*net, &lengths).rev().find_map(|wider| rules.get(&wider)).copied();
        if entry.is_of_routes() && wider().or_else(|| Says::default().rule()) == Some(rule) {
            continue;
        }
        rules.insert(*net, rule);
    }
    Ok((rules, left))
}

/// What becomes of connections to a network, without those networks in it that somebody speaks of.
fn says(entries: &Entries, net: IpNet, lengths: &BTreeSet<u8>, steps: Option<&Steps<'_>>) -> Says {
    let mut wanted = Wanted::default();
    let mut taken_by = Vec::new();
    for entry in containing(net, lengths).filter_map(|wider| entries.get(&wider)) {
        // The last word on a port counts.
        wanted.leave_alone(&entry.default_exclude);
        wanted.include(&entry.include);
        wanted.refuse(&entry.refuse);
        wanted.leave_alone(&entry.exclude);
        taken_by.extend(&entry.steps);
    }
    let Wanted { included, refused } = wanted;
    let Some(steps) = steps else { return Says { captured: included, denied: Ports::new(), refused } };
    taken_by.sort_by_key(|(place, _)| *place);
    let (mut captured, mut denied, mut rest) = (Ports::new(), Ports::new(), included);
    for (place, ports) in taken_by {
        if rest.is_empty() {
            break;
        }
        let taken = intersect(&rest, ports);
        rest = subtract(rest, &taken);
        let into = if steps.limited[*place].denies { &mut denied } else { &mut captured };
        *into = union(mem::take(into), &taken);
    }
    let into = if steps.rest_denied { &mut denied } else { &mut captured };
    *into = union(mem::take(into), &rest);
    Says { captured, denied, refused }
}

/// A v4-mapped prefix as the IPv4 prefix that it is, host bits cleared.
fn canonical(net: IpNet) -> IpNet {
    const MAPPED_LEN: u8 = 96;
    match net {
        IpNet::V6(v6) if v6.prefix_len() >= MAPPED_LEN => match v6.addr().to_ipv4_mapped() {
            Some(v4) => Ipv4Net::new(v4, v6.prefix_len() - MAPPED_LEN).map_or(net, IpNet::V4),
            None => net,
        },
        _ => net,
    }
    .trunc()
}

/// The prefixes of these lengths that contain `net`, from the least specific to itself.
fn containing(net: IpNet, lengths: &BTreeSet<u8>) -> impl DoubleEndedIterator<Item = IpNet> {
    let of_length = move |len: &u8| IpNet::new(net.addr(), *len).ok();
    lengths.range(..=net.prefix_len()).filter_map(of_length).map(|n| n.trunc())
}

fn ranges(ports: &Ports) -> &[(u16, u16)] {
    if ports.is_empty() { &ALL } else { ports }
}
