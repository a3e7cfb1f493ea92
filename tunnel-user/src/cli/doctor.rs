//! `tunnel doctor`: what this kernel, cgroup set-up and privilege allow, each with its remedy.
//!
//! # Invariants
//! - A requirement is checked by trying what a capture would do, not by comparing version numbers.
//! - Nothing is changed, and nothing is left behind.

mod others;

use std::{
    fmt::Write as _,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::AsFd as _,
    path::Path,
};

use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;
use socket2::{Domain, Socket, Type};

use crate::{
    config,
    kernel::{
        bpf::BpfError,
        bypass::{Bypass, BypassError},
        cgroup::{self, CgroupError, Hierarchy},
        confine, privileges, sys,
        version::{Feature, Kernel},
    },
    process::{
        exit::{EXIT_KERNEL, EXIT_OTHER, EXIT_PRIVILEGE},
        limits,
    },
    relay,
    sources::capture::{bpf, redirect},
    transport::tcp,
};

/// The oldest kernel line that capture is tested on.
const TESTED: (u32, u32) = (6, 1);
/// What capture takes of the kernel, and since when upstream has it, newest first. Distributions have
/// some of it earlier: the programs' own checks decide.
const SINCE: [((u32, u32), &str); 4] = [
    ((5, 18), "bpf_set_retval (a refused connect says ECONNREFUSED)"),
    ((5, 15), "bpf_get_netns_cookie in sockops and getsockopt programs"),
    ((5, 14), "SO_NETNS_COOKIE, lookup-and-delete in hash maps"),
    ((5, 8), "getpeername programs, BPF ring buffers"),
];

/// How good or bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Nothing depends on it.
    Info,
    /// Capture works, with less than it could.
    Warn,
    /// Capture does not work.
    Fail,
}

/// What a failed check means for the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacks {
    Kernel,
    Privilege,
    Setup,
}

/// The answer to one question.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// Whether nothing needs to be done about it.
    pub ok: bool,
    /// How good or bad it is.
    pub level: Level,
    /// What is there.
    pub found: String,
    /// What to do about it; empty when there is nothing to do.
    pub remedy: String,
    #[serde(skip)]
    lacks: Option<Lacks>,
}

impl Finding {
    fn new(
        check: impl Into<String>,
        level: Level,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let ok = matches!(level, Level::Ok | Level::Info);
        Self { check: check.into(), ok, level, found: found.into(), remedy: remedy.into(), lacks: None }
    }

    fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(check, Level::Ok, found, "")
    }

    fn info(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(check, Level::Info, found, "")
    }

    fn warn(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, Level::Warn, found, remedy)
    }

    fn fail(
        check: impl Into<String>,
        lacks: Lacks,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { lacks: Some(lacks), ..Self::new(check, Level::Fail, found, remedy) }
    }
}

/// Asks every question.
pub fn examine() -> Vec<Finding> {
    let mut findings = vec![kernel(), capabilities(), cgroups(), bpffs()];
    findings.extend(programs());
    findings.extend([
        steering(),
        new_namespaces(),
        socket_mark(),
        sandbox(),
        conntrack(),
        netns_cookie(),
        loopback(),
        ipv6(),
        open_files(),
        somaxconn(),
        btf(),
        others::by_name(),
        others::exclusive(),
        others::packet_filters(),
        others::rules(),
        splice(),
        bypass(),
        kernel_tls(),
    ]);
    findings
}

/// What the findings mean for a script. A missing privilege hides what the kernel can do, so it comes
/// first.
pub fn exit_code(findings: &[Finding]) -> u8 {
    let any = |lacks| findings.iter().any(|f| f.lacks == Some(lacks));
    if any(Lacks::Privilege) {
        EXIT_PRIVILEGE
    } else if any(Lacks::Kernel) {
        EXIT_KERNEL
    } else if any(Lacks::Setup) {
        EXIT_OTHER
    } else {
        0
    }
}

/// For programs: an array, one object per finding.
pub fn json(findings: &[Finding]) -> String {
    // Strings and booleans: there is nothing in it that JSON could not say.
    serde_json::to_string_pretty(findings).unwrap_or_default() + "\n"
}

/// For people. `colour`: marks in colours, for a terminal.
pub fn text(findings: &[Finding], colour: bool) -> String {
    let width = findings.iter().map(|f| f.check.chars().count()).max().unwrap_or_default();
    let mut out = String::new();
    for f in findings {
        let (mark, paint) = match f.level {
            Level::Ok => ("ok  ", "32"),
            Level::Info => ("-   ", "2"),
            Level::Warn => ("warn", "33"),
            Level::Fail => ("FAIL", "31;1"),
        };
        let mark = if colour { format!("\x1b[{paint}m{mark}\x1b[0m") } else { mark.to_owned() };
        // Writing to a String does not fail.
        let _written = writeln!(out, "{mark}  {:<width$}  {}", f.check, f.found);
        for line in f.remedy.lines() {
            let _written = writeln!(out, "      {:<width$}  {line}", "");
        }
    }
    let failed: Vec<_> = findings.iter().filter(|f| f.level == Level::Fail).map(|f| &*f.check).collect();
    let verdict = if failed.is_empty() {
        "Capture works here.".to_owned()
    } else {
        let because = match exit_code(findings) {
            EXIT_PRIVILEGE => "a privilege is missing",
            EXIT_KERNEL => "the kernel lacks something that is required",
            _ => "the set-up does not permit it",
        };
        format!("Capture does not work here, {because}: {}.", failed.join(", "))
    };
    let _written = writeln!(out, "\n{verdict}");
    out
}

fn kernel() -> Finding {
    const CHECK: &str = "kernel";
    let release = nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_else(|e| format!("unknown ({e})"));
    match version_of(&release) {
        Some(version) if version >= TESTED => Finding::ok(CHECK, format!("Linux {release}")),
        Some(version) => {
            let lacks: Vec<_> =
                SINCE.iter().filter(|(since, _)| version < *since).map(|(_, what)| *what).collect();
            let lacks = if lacks.is_empty() { "nothing that is known".to_owned() } else { lacks.join("; ") };
            Finding::warn(
                CHECK,
                format!("Linux {release}, older than {}.{}", TESTED.0, TESTED.1),
                format!(
                    "Capture is tested on Linux {}.{} and newer. Upstream kernels of this version lack: \
                     {lacks}.",
                    TESTED.0, TESTED.1
                ),
            )
        }
        None => Finding::warn(CHECK, format!("Linux {release}"), "The version could not be parsed."),
    }
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn capabilities() -> Finding {
    const CHECK: &str = "capabilities";
    let missing = privileges::missing_for_capture();
    if missing.is_empty() {
        return Finding::ok(CHECK, privileges::names_for_capture().join(", "));
    }
    let names: Vec<_> = missing.iter().map(|(name, what)| format!("{name} ({what})")).collect();
    Finding::fail(
        CHECK,
        Lacks::Privilege,
        format!("missing {}", names.join(", ")),
        format!(
            "Run as root: sudo tunnel ...; or in a systemd unit: AmbientCapabilities={}.",
            privileges::names_for_capture().join(" ")
        ),
    )
}

fn cgroups() -> Finding {
    const CHECK: &str = "cgroup2";
    let mounted = cgroup::mounted();
    let place = mounted.as_ref().map_or_else(
        || "not mounted; a private mount is used".to_owned(),
        |path| format!("mounted at {}", path.display()),
    );
    // Made and removed again, as `tunnel exec` does.
    match Hierarchy::open().and_then(|h| h.create_fresh()).and_then(|mut fresh| fresh.remove()) {
        Ok(()) => Finding::ok(CHECK, format!("{place}; cgroups can be created")),
        Err(e @ (CgroupError::Mount(_) | CgroupError::Io { .. })) => {
            let (CgroupError::Mount(source) | CgroupError::Io { source, .. }) = &e else {
                return Finding::fail(CHECK, Lacks::Setup, e.to_string(), "");
            };
            let found = if mounted.is_some() { format!("{place}; {e}") } else { e.to_string() };
            match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES | libc::EROFS) => Finding::fail(
                    CHECK,
                    Lacks::Privilege,
                    found,
                    "Creating a cgroup requires root, and in a container a writable cgroup2 hierarchy.",
                ),
                Some(libc::ENODEV) => {
                    Finding::fail(CHECK, Lacks::Kernel, found, "Requires a kernel with CONFIG_CGROUPS.")
                }
                _ => Finding::fail(CHECK, Lacks::Setup, found, "mount -t cgroup2 none /sys/fs/cgroup"),
            }
        }
        Err(e) => Finding::fail(CHECK, Lacks::Setup, e.to_string(), ""),
    }
}

fn bpffs() -> Finding {
    const CHECK: &str = "bpffs";
    if let Some(path) = cgroup::mount_point("bpf") {
        let found = format!("mounted at {}", path.display());
        return if path == Path::new(config::BPFFS) {
            Finding::ok(CHECK, found)
        } else {
            Finding::warn(
                CHECK,
                found,
                format!("For `tunnel run`, set daemon.bpffs = \"{}\" in the configuration.", path.display()),
            )
        };
    }
    match cgroup::detached_mount("bpf") {
        Ok(_) => Finding::ok(CHECK, format!("not mounted; `tunnel run` mounts it at {}", config::BPFFS)),
        // exec pins nothing.
        Err(e) => Finding::warn(
            CHECK,
            format!("not mounted, and cannot be mounted: {e}"),
            format!("Required by `tunnel run`, not by `tunnel exec`: mount -t bpf bpf {}", config::BPFFS),
        ),
    }
}

/// One finding for the maps if they cannot be made, else one per program.
fn programs() -> Vec<Finding> {
    let failed = |check: String, e: &BpfError| {
        let found = e.summary();
        if e.is_privilege() {
            let remedy = "Loading BPF programs requires CAP_BPF and CAP_NET_ADMIN: run as root.";
            Finding::fail(check, Lacks::Privilege, found, remedy)
        } else {
            let remedy = "The kernel lacks something that this program uses: capture requires Linux 6.1 or newer, with \
                          CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF.\nAlternative: [[capture]] mode = \"redirect\", \
                          with iptables or nftables rules.";
            Finding::fail(check, Lacks::Kernel, found, remedy)
        }
    };
    match bpf::probe(false) {
        Err(e) => vec![failed("bpf maps".to_owned(), &e)],
        Ok(programs) => programs
            .into_iter()
            .map(|(name, loaded)| {
                let check = format!("program {name}");
                match loaded {
                    Ok(()) => Finding::ok(check, "accepted by the kernel"),
                    Err(e) => failed(check, &e),
                }
            })
            .collect(),
    }
}

/// What gives each destination an address of its own; a capture works without, as far as one address goes.
fn steering() -> Finding {
    const CHECK: &str = "program steer";
    let why = match bpf::probe_steering() {
        Ok(Ok(())) => {
            return Finding::ok(CHECK, "accepted by the kernel: a local port serves several destinations");
        }
        Ok(Err(e)) => e.to_string(),
        Err(e) => e.summary(),
    };
    Finding::warn(
        CHECK,
        why,
        "Captured connections share one local address: a local port serves one destination at a time. Requires \
         CONFIG_INET, CAP_BPF and CAP_NET_ADMIN.",
    )
}

/// By what the first connection from a new network namespace waits for our listeners there.
fn new_namespaces() -> Finding {
    const CHECK: &str = "new network namespaces";
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None);
    if socket.is_ok_and(|socket| sys::has_tcp_md5(socket.as_fd())) {
        Finding::ok(CHECK, "a container's first connection waits until the daemon listens there")
    } else {
        let remedy = "A container's first connection fails with ECONNREFUSED and has to be retried, on a kernel without \
                      TCP MD5 signatures (CONFIG_TCP_MD5SIG).";
        Finding::warn(CHECK, "the kernel has no TCP MD5 signatures", remedy)
    }
}

fn socket_mark() -> Finding {
    const CHECK: &str = "SO_MARK";
    let set = Socket::new(Domain::IPV4, Type::STREAM, None).and_then(|s| tcp::set_mark(&s, config::MARK));
    match set {
        Ok(()) => Finding::ok(CHECK, "permitted"),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Finding::fail(
            CHECK,
            Lacks::Privilege,
            e.to_string(),
            "Firewall rules can exclude the daemon's own sockets by their mark, which requires CAP_NET_ADMIN.",
        ),
        Err(e) => Finding::fail(CHECK, Lacks::Kernel, e.to_string(), ""),
    }
}

/// What keeps worker threads from what they do not need; capture does not depend on it, and a daemon starts without Landlock.
fn sandbox() -> Finding {
    const CHECK: &str = "sandbox of workers";
    if !confine::has_seccomp() {
        let remedy = "A daemon starts with daemon.sandbox = false in its configuration file only, and its workers keep its \
                      privileges. Requires CONFIG_SECCOMP_FILTER.";
        return Finding::warn(CHECK, "the kernel has no filters of system calls (seccomp)", remedy);
    }
    let landlock = match confine::landlock_abi() {
        Some(version) => format!("Landlock {version}"),
        None => "no Landlock, which daemons do without".to_owned(),
    };
    Finding::ok(
        CHECK,
        format!("seccomp filters, {landlock}; `tunnel status` shows what a daemon has dropped"),
    )
}

/// What capture by rules takes; nothing else depends on it.
fn conntrack() -> Finding {
    const CHECK: &str = "conntrack";
    match redirect::available() {
        Ok(()) => Finding::info(
            CHECK,
            "answers SO_ORIGINAL_DST: mode = \"redirect\" works too, with firewall rules",
        ),
        Err(e) => Finding::info(
            CHECK,
            format!(
                "SO_ORIGINAL_DST: {e}; mode = \"redirect\" requires nf_conntrack, which firewall rules load"
            ),
        ),
    }
}

fn netns_cookie() -> Finding {
    const CHECK: &str = "SO_NETNS_COOKIE";
    let cookie = Socket::new(Domain::IPV4, Type::STREAM, None).and_then(|s| sys::netns_cookie(s.as_fd()));
    match cookie {
        Ok(cookie) => Finding::ok(CHECK, format!("this network namespace is {cookie}")),
        Err(e) => Finding::fail(CHECK, Lacks::Kernel, e.to_string(), "Requires Linux 5.14 or newer."),
    }
}

fn loopback() -> Finding {
    const CHECK: &str = "loopback";
    match TcpListener::bind((Ipv4Addr::LOCALHOST, 0)) {
        Ok(_) => Finding::ok(CHECK, "up, with 127.0.0.1"),
        Err(e) => Finding::fail(
            CHECK,
            Lacks::Setup,
            format!("cannot listen on 127.0.0.1: {e}"),
            "Captured connections go to a listener there: ip link set lo up",
        ),
    }
}

fn ipv6() -> Finding {
    const CHECK: &str = "IPv6";
    if let Err(e) = Socket::new(Domain::IPV6, Type::STREAM, None) {
        return Finding::info(CHECK, format!("not supported by this kernel, for applications neither: {e}"));
    }
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))) {
        Ok(_) => Finding::ok(CHECK, "up, with ::1"),
        Err(e) => Finding::warn(
            CHECK,
            format!("cannot listen on ::1: {e}"),
            "Captured connections to IPv6 addresses are refused. To carry them: sysctl \
             net.ipv6.conf.lo.disable_ipv6=0",
        ),
    }
}

fn open_files() -> Finding {
    const CHECK: &str = "open files";
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return Finding::warn(CHECK, "RLIMIT_NOFILE cannot be read", "");
    };
    let default = config::MAX_FLOWS.get();
    let flows = limits::flows_per_worker(default, hard, 1, limits::PER_FLOW);
    let limit = if soft < hard { format!("{soft}, raised to {hard}") } else { hard.to_string() };
    let found = format!("{limit}: {flows} concurrent flows");
    if flows >= default {
        return Finding::ok(CHECK, found);
    }
    Finding::warn(
        CHECK,
        format!("{found}, of the default {default}"),
        format!(
            "For more, raise the hard limit, to {} for the default: `ulimit -Hn`, LimitNOFILE= in a systemd unit.",
            limits::nofile_for(default)
        ),
    )
}

fn somaxconn() -> Finding {
    const CHECK: &str = "net.core.somaxconn";
    let limit = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
    match limit.trim().parse::<i32>() {
        Ok(n) if n >= tcp::BACKLOG => Finding::ok(CHECK, n.to_string()),
        Ok(n) => Finding::warn(
            CHECK,
            format!("{n}, less than the {} that listeners request", tcp::BACKLOG),
            format!(
                "More simultaneous connections than that wait for a second SYN: sysctl \
                 net.core.somaxconn={}",
                tcp::BACKLOG
            ),
        ),
        Err(_) => Finding::info(CHECK, "cannot be read"),
    }
}

fn btf() -> Finding {
    const CHECK: &str = "kernel BTF";
    let there = Path::new("/sys/kernel/btf/vmlinux").exists();
    const USE: &str = "required to follow cgroups by name, by relay = \"splice\" and by bypass";
    Finding::info(CHECK, format!("{}; {USE}", if there { "available" } else { "not available" }))
}

/// What `relay = "splice"` takes; without it bytes are copied.
fn splice() -> Finding {
    const CHECK: &str = "relay = \"splice\"";
    let known = Kernel::running().allows(Feature::Splice);
    match known.and_then(|()| relay::probe().map_err(|e| e.summary())) {
        Ok(()) => Finding::info(CHECK, "works; with relay = \"auto\" the kernel moves interactive flows"),
        Err(why) => Finding::info(CHECK, format!("not available, so bytes are copied: {why}")),
    }
}

/// What `bypass` takes; without it connections stay with TCP.
fn bypass() -> Finding {
    const CHECK: &str = "bypass";
    let known = Kernel::running().allows(Feature::Bypass).map_err(BypassError::Kernel);
    match known.and_then(|()| Bypass::load()) {
        Ok(_) => Finding::info(CHECK, "works; used by captures with bypass = \"auto\""),
        Err(why) => Finding::info(CHECK, format!("not available, so connections use TCP: {why}")),
    }
}

fn kernel_tls() -> Finding {
    const CHECK: &str = "kernel TLS";
    let ulps = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp").unwrap_or_default();
    let there = ulps.split_whitespace().any(|ulp| ulp == "tls");
    Finding::info(CHECK, if there { "available; not used yet" } else { "not loaded; not used yet" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_has_a_version_whatever_follows() {
        assert_eq!(version_of("6.18.0"), Some((6, 18)));
        assert_eq!(version_of("5.14.0-503.el9.x86_64"), Some((5, 14)));
        assert_eq!(version_of("6.1-rc3+"), Some((6, 1)));
        assert_eq!(version_of("unknown"), None);
    }

    #[test]
    fn a_missing_privilege_decides_before_a_missing_feature() {
        let fail = |lacks| Finding::fail("x", lacks, "", "");
        let code = |lacks: &[Lacks]| exit_code(&lacks.iter().map(|l| fail(*l)).collect::<Vec<_>>());
        assert_eq!(code(&[]), 0);
        assert_eq!(code(&[Lacks::Setup]), 1);
        assert_eq!(code(&[Lacks::Setup, Lacks::Kernel]), 69);
        assert_eq!(code(&[Lacks::Kernel, Lacks::Privilege]), 77);
        assert_eq!(exit_code(&[Finding::warn("x", "", ""), Finding::info("y", "")]), 0);
    }

    #[test]
    fn the_text_lines_up_and_ends_with_a_verdict() {
        let findings = [
            Finding::ok("short", "good"),
            Finding::fail("much longer", Lacks::Kernel, "bad", "do this\nand that"),
        ];
        let text = text(&findings, false);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "ok    short        good");
        assert_eq!(lines[1], "FAIL  much longer  bad");
        assert_eq!(lines[2], "                   do this");
        assert_eq!(lines[3], "                   and that");
        assert_eq!(
            lines[5],
            "Capture does not work here, the kernel lacks something that is required: much longer."
        );
        assert!(super::text(&findings, true).contains("\x1b[31;1mFAIL\x1b[0m"));
    }
}
