//! `[[capture]]`: whose TCP connections are captured, by kernel programs or by rules of the operator's.

use std::{net::SocketAddr, path::PathBuf};

use super::{
    AddrPattern,
    reader::{At, Reader, Section},
    value::{FuturePath, Mode},
};
use crate::model::names::{GroupName, IdentityName, SourceName};

/// `[[capture]]` with `mode = "ebpf"`, the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// What routes call it: its name, else its cgroup or unit.
    pub name: Option<String>,
    /// Whose connections.
    pub cgroup: CgroupRef,
    /// Which of them. The longest prefix over all lists decides; at the same prefix, exclude over refuse over include,
    /// and all of them over [`DEFAULT_EXCLUDE`](super::DEFAULT_EXCLUDE).
    pub include: Vec<AddrPattern>,
    /// Which fail in connect().
    pub refuse: Vec<AddrPattern>,
    /// Which are left alone.
    pub exclude: Vec<AddrPattern>,
    /// What captured applications get while no daemon runs.
    pub on_failure: OnFailure,
    /// Hand captured connections to this proxy, which asks SO_ORIGINAL_DST, and not to ourselves.
    pub proxy: Option<SocketAddr>,
    /// Whether busy connections go past TCP on their way to us.
    pub bypass: Bypass,
    /// Who we are to upstreams for its flows; `None`: whoever the upstream says.
    pub identity: Option<IdentityName>,
}

impl Capture {
    /// Its stable name.
    pub fn source(&self) -> SourceName {
        SourceName::Capture(self.cgroup.name())
    }
}

/// Whether busy connections of captured applications go past the loopback's TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bypass {
    /// None does.
    #[default]
    Off,
    /// Those of programs that nothing speaks against, where the kernel can.
    Auto,
    /// The same, and a kernel that cannot is an error.
    On,
}

/// `[[capture]]` with `mode = "redirect"`: iptables or nftables decide what is captured, and conntrack knows
/// where it wanted to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// Name, for routes.
    pub name: Option<String>,
    /// Where the rules send connections; at least one.
    pub listen: Vec<SocketAddr>,
    /// Who we are to upstreams for its flows; `None`: whoever the upstream says.
    pub identity: Option<IdentityName>,
}

impl Redirect {
    /// Its stable name.
    pub fn source(&self) -> SourceName {
        SourceName::Redirect(self.listen.as_slice().into())
    }
}

/// Which cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupRef {
    /// The one at this path.
    Path(PathBuf),
    /// The one of this systemd unit.
    Unit(String),
    /// A new one, made for the command that `exec` runs.
    Fresh,
}

impl CgroupRef {
    /// Its stable name.
    pub fn name(&self) -> GroupName {
        match self {
            Self::Path(path) => path.display().to_string().into(),
            Self::Unit(unit) => unit.as_str().into(),
            Self::Fresh => "(command)".into(),
        }
    }
}

/// What captured applications get while no daemon runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// Their connections are refused: nothing leaves in plaintext.
    #[default]
    Closed,
    /// Their connections go where they would without us.
    Open,
}

/// `[[capture]]` of either mode.
pub(super) enum AnyCapture {
    Ebpf(Capture),
    Redirect { name: Option<String>, listen: Vec<At<SocketAddr>>, identity: Option<IdentityName> },
}

/// A capture and the place of its group, or of its mode where the operator's rules decide.
impl Section for At<AnyCapture> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let capture = AnyCapture::read(r)?;
        let key = match &capture {
            AnyCapture::Ebpf(Capture { cgroup: CgroupRef::Path(_), .. }) => "cgroup",
            AnyCapture::Ebpf(Capture { cgroup: CgroupRef::Unit(_), .. }) => "unit",
            AnyCapture::Ebpf(_) | AnyCapture::Redirect { .. } => "mode",
        };
        Some(r.at(key, capture))
    }
}

/// Keys that say what only eBPF can be told, and who decides it in mode "redirect".
const EBPF_ONLY: [(&str, &str); 8] = [
    ("cgroup", "the rules decide whose connections they redirect"),
    ("unit", "the rules decide whose connections they redirect"),
    ("include", "the rules decide what is captured"),
    ("refuse", "the rules decide what is captured, and a route can deny it"),
    ("exclude", "the rules decide what is captured"),
    ("on_failure", "while no daemon runs, what the rules redirect is refused"),
    ("bypass", "whose connections they are is known only where eBPF captures"),
    ("proxy", "the rules can redirect to that proxy by themselves"),
];

impl Section for AnyCapture {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let name = r.optional::<String>("name", "Name, for routes. Default: its cgroup or unit.");
        let mode = r.optional::<Mode>(
            "mode",
            "\"ebpf\": kernel programs on a cgroup, which this daemon attaches; \"redirect\": iptables or nftables rules, which the operator writes. Default: \"ebpf\".",
        );
        let listen: Option<Vec<At<SocketAddr>>> = r.optional(
            "listen",
            "Addresses that the rules redirect connections to: ADDRESS:PORT. Required in mode \"redirect\", and only there.",
        );
        let path = r.optional::<FuturePath>(
            "cgroup",
            "Path of a cgroup (version 2), which need not exist yet and may be removed and created again. Either this or unit.",
        );
        let unit =
            r.optional::<String>("unit", "Name of a systemd unit below slices, such as legacy.service, which need not run yet. Either this or cgroup.");
        let everything = || super::flags::EVERYTHING.map(AddrPattern::net_only).to_vec();
        let include = r.default("include", "Destinations that are captured: CIDR[:PORTS]. Those that a \"deny\" route matches by address and port alone, or that match no route, fail in connect() with ECONNREFUSED.", everything());
        let refuse: Vec<AddrPattern> = r.default(
            "refuse",
            "Destinations that fail in connect() with ENETUNREACH, as without a route: CIDR[:PORTS]. With \"::/0\" clients fall back to IPv4 at once.",
            Vec::new(),
        );
        let exclude: Vec<AddrPattern> = r.default(
            "exclude",
            "Destinations that are not captured. The longest prefix of include, refuse and exclude decides; at the same prefix, exclude takes precedence over refuse, and refuse over include. Loopback, link-local, multicast and unspecified addresses are excluded unless include or refuse names the same prefix or a longer one.",
            Vec::new(),
        );
        let on_failure = r.default(
            "on_failure",
            "What happens to captured connections while no daemon runs: \"closed\", they are refused; \"open\", they connect directly, in plaintext.",
            OnFailure::Closed,
        );
        let proxy = r.optional(
            "proxy",
            "Address of another proxy that receives the captured connections instead of this daemon, and queries SO_ORIGINAL_DST.",
        );
        let bypass = r.default(
            "bypass",
            "Whether busy connections bypass the loopback's TCP: \"off\"; \"auto\", those of suitable programs, if the kernel supports it; \"on\", the same, and a kernel without support is an error.",
            Bypass::Off,
        );
        let identity: Option<IdentityName> = r.optional(
            "identity",
            "Name of the identity that upstreams with TLS are shown for its flows. Default: the identity of the upstream.",
        );

        match mode {
            // It is a mistake; what else it makes a mistake cannot be said.
            None if r.has("mode") => return None,
            Some(Mode::Redirect) => return redirect(r, name, listen, identity),
            Some(Mode::Ebpf) | None => {}
        }
        if r.has("listen") {
            r.wrong("listen", "is for mode = \"redirect\": what eBPF captures finds its listener by itself");
        }
        if include.is_empty() {
            r.wrong("include", "is empty: nothing would be captured");
        }
        if unit.as_ref().is_some_and(|unit| unit.contains('/')) {
            r.wrong("unit", "is a path: a unit is a name, such as legacy.service; a path is for cgroup");
        }
        let called = path.as_ref().map(|p| p.0.display().to_string()).or_else(|| unit.clone());
        let cgroup = match (r.has("cgroup"), r.has("unit")) {
            (true, true) => {
                r.wrong("unit", "stands beside cgroup: only one of them can be meant");
                None
            }
            (false, false) if r.for_exec() => Some(CgroupRef::Fresh),
            (false, false) => {
                r.demand("cgroup");
                None
            }
            _ => path.map(|p| CgroupRef::Path(p.0)).or(unit.map(CgroupRef::Unit)),
        };
        if !r.for_exec() && !r.is_layer() && !r.has("proxy") && !r.root_has("route") {
            r.wrong("", "has no [[route]] and no proxy: every captured connection would be refused");
        }
        let name = name.or(called);
        let cgroup = cgroup?;
        Some(Self::Ebpf(Capture {
            name,
            cgroup,
            include,
            refuse,
            exclude,
            on_failure,
            proxy,
            bypass,
            identity,
        }))
    }
}

fn redirect(
    r: &Reader<'_>,
    name: Option<String>,
    listen: Option<Vec<At<SocketAddr>>>,
    identity: Option<IdentityName>,
) -> Option<AnyCapture> {
    for (key, why) in EBPF_ONLY {
        if r.has(key) {
            r.wrong(key, format!("has no meaning in mode = \"redirect\": {why}"));
        }
    }
    r.demand("listen");
    if !r.for_exec() && !r.root_has("route") {
        r.wrong("", "has no [[route]]: every redirected connection would be refused");
    }
    let listen = listen?;
    if listen.is_empty() {
        r.wrong("listen", "is empty: rules could redirect to nothing");
    }
    for at in listen.iter().filter(|at| at.value.port() == 0) {
        r.wrong_at(at, "has port 0, which is another one each time: rules name one");
    }
    Some(AnyCapture::Redirect { name, listen, identity })
}
