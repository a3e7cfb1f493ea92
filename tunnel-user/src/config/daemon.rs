//! `[daemon]`: the process itself.

use std::{
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use super::{limits::Limits, section::section};
use crate::model::mark::Mark;

/// The mark on our own sockets, for rules of the operator's: one bit, which is none of those that kube-proxy (0x4000, 0x8000),
/// the portmap plugin (0x2000), Cilium (0x0f00 and 16 bits above), Calico (16 bits above), Tailscale (0xff0000) and Istio
/// (0x539) use.
pub const MARK: Mark = Mark::new(0x1000, 0x1000).expect("one bit, inside");
/// Where systemd mounts bpffs.
pub const BPFFS: &str = "/sys/fs/bpf";
/// How long flows may go on after a daemon was told to stop. Twice the time in which interactive
/// programs finish a request; systemd kills after 90 s.
pub const DRAIN_RUN: Duration = Duration::from_secs(30);
/// The same for `exec`, where the command has ended by itself and only left-overs can be in flight.
pub const DRAIN_EXEC: Duration = Duration::from_secs(5);
/// Flows of one process at a time. At two sockets each it asks for 20,000 file descriptors of the
/// 524,288 that systemd's default hard limit gives.
pub const MAX_FLOWS: NonZeroUsize = NonZeroUsize::new(10_000).expect("not 0");
/// How long what a client sends first is waited for, where a route asks for it. An application on this node that
/// speaks first has sent it by then, and so has a peer within that round trip; whoever waits for its server to speak
/// loses no more.
pub const SNIFF_TIMEOUT: Duration = Duration::from_millis(50);
/// A TCP peer that is silent this long is asked whether it is there.
pub const TCP_KEEPALIVE_TIME: Duration = Duration::from_secs(75);
/// The most that Linux takes (MAX_TCP_KEEPIDLE, include/net/tcp.h).
pub const TCP_KEEPALIVE_MAX: Duration = Duration::from_secs(32_767);
/// Between two such questions.
pub const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// The most unanswered questions (MAX_TCP_KEEPCNT, include/net/tcp.h).
pub const TCP_KEEPALIVE_PROBES_MAX: u32 = 127;
/// Unanswered questions until it is taken for gone.
pub const TCP_KEEPALIVE_PROBES: NonZeroU32 = NonZeroU32::new(4).expect("not 0");

section! {
    /// `[daemon]`
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Daemon {
        /// What a process cannot change while it runs.
        bootstrap: flat Bootstrap,
        /// How long established flows may continue after the daemon was told to stop.
        drain_timeout: default Duration = DRAIN_RUN,
        /// Maximum of concurrent flows, divided among the workers; more are rejected. One peer of the listeners gets at
        /// most three quarters of them (7,500 of the default). The limit of file descriptors may allow fewer, which is
        /// logged.
        max_flows: default NonZeroUsize = MAX_FLOWS,
        /// How bytes are moved between two connections without framing or TLS of our own (captured, dialled by a route to
        /// "direct", or HTTP/1 without TLS): "copy", through this process; "splice", by a kernel program while a flow exchanges
        /// small messages, else as "copy"; "pipe", in the kernel (splice(2)), which takes less than half the CPU for bulk and as
        /// much for small messages; "auto", as "splice" where kernel and privileges allow it, else as "copy".
        relay: default Relay = Relay::Copy,
        /// How long to wait for a client's first bytes, where a route has sni or http_host. A client that waits for its
        /// server to speak first is delayed for as long.
        sniff_timeout: default Duration = SNIFF_TIMEOUT,
        /// Whether to reload this file when it changes. SIGHUP always reloads it.
        watch: default bool = true,
        /// What peers may use of the process, and how long flows may last.
        limits: section Limits,
    }
    check |r| {
        let sniff_timeout = r.renamed("inspect_timeout", "sniff_timeout").unwrap_or(sniff_timeout);
    }
    defaults new;
}

impl Default for Daemon {
    fn default() -> Self {
        Self::new()
    }
}

section! {
    /// The keys of `[daemon]` that a process takes at its start, and cannot change while it runs.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Bootstrap {
        /// Worker threads. Default: one per core.
        workers: optional NonZeroUsize,
        /// SO_MARK of the daemon's own sockets, for firewall rules to match: VALUE or VALUE/MASK. Choose bits that nothing
        /// else on the node uses (`tunnel doctor` names rules that match them). Captures do not depend on it.
        mark: default Mark = MARK,
        /// The bpffs mount.
        bpffs: default PathBuf = PathBuf::from(BPFFS),
        /// Whether the worker threads, which handle what peers send, run without privileges: no capabilities but those to mark
        /// sockets and to have large pipes, no system calls but those that they need, no files. `tunnel status` shows it.
        sandbox: default bool = true,
        /// Whether a crash may leave a core dump, which holds private keys and what flows carry. It also lets processes of
        /// the same user look into the daemon's memory (prctl(2), PR_SET_DUMPABLE).
        core_dumps: default bool = false,
        /// When a silent TCP peer is given up: after time + probes * interval (135 s), whether the connection is idle or
        /// has unacknowledged bytes. A peer that answers with a closed window is not silent.
        tcp_keepalive: section Keepalive,
    }
    check |r| {}
    defaults new;
}

impl Bootstrap {
    /// The first key that another configuration says something else about.
    pub fn differs_in(&self, other: &Self) -> Option<&'static str> {
        let Self { workers, mark, bpffs, sandbox, core_dumps, tcp_keepalive } = self;
        let keys = [
            ("workers", *workers != other.workers),
            ("mark", *mark != other.mark),
            ("bpffs", *bpffs != other.bpffs),
            ("sandbox", *sandbox != other.sandbox),
            ("core_dumps", *core_dumps != other.core_dumps),
            ("tcp_keepalive", *tcp_keepalive != other.tcp_keepalive),
        ];
        keys.into_iter().find_map(|(key, differs)| differs.then_some(key))
    }
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self::new()
    }
}

section! {
    /// `[daemon.tcp_keepalive]`: when a silent peer is taken for gone (tcp(7): TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT),
    /// whether the connection is idle or bytes are on their way.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Keepalive {
        /// Idle time before the first probe (TCP_KEEPIDLE), in whole seconds.
        time: default Duration = TCP_KEEPALIVE_TIME,
        /// Time between probes (TCP_KEEPINTVL), in whole seconds.
        interval: default Duration = TCP_KEEPALIVE_INTERVAL,
        /// Number of unanswered probes (TCP_KEEPCNT).
        probes: default NonZeroU32 = TCP_KEEPALIVE_PROBES,
    }
    check |r| {
        for (key, value) in [("time", time), ("interval", interval)] {
            if value.as_secs() == 0 || value.subsec_nanos() != 0 || value > TCP_KEEPALIVE_MAX {
                r.wrong(
                    key,
                    "is not a whole number of seconds from \"1s\" to \"32767s\" (tcp(7), TCP_KEEPIDLE)",
                );
            }
        }
        if probes.get() > TCP_KEEPALIVE_PROBES_MAX {
            r.wrong("probes", format!("is more than {TCP_KEEPALIVE_PROBES_MAX} (tcp(7), TCP_KEEPCNT)"));
        }
    }
    defaults new;
}

impl Keepalive {
    /// How long a peer may be silent.
    pub fn bound(&self) -> Duration {
        self.time + self.interval * self.probes.get()
    }
}

impl Default for Keepalive {
    fn default() -> Self {
        Self::new()
    }
}

/// How bytes are moved between two sockets of ours: captured, dialled, or an HTTP/1 tunnel in plaintext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Relay {
    /// As [`Splice`](Self::Splice) where that can be, else as [`Copy`](Self::Copy).
    Auto,
    /// By a kernel program while a flow is interactive, else as [`Copy`](Self::Copy).
    Splice,
    /// Read and written.
    #[default]
    Copy,
    /// In the kernel, through a pipe (splice(2)).
    Pipe,
}
