//! Makes a capture ready: its group, its programs, its first listeners.
//!
//! # Invariants
//! - Nothing that captures is attached here. What is dropped before it is kept leaves everything as it was.

use std::{io, net::SocketAddr, os::fd::AsFd as _, sync::Arc};

use super::{ActiveCapture, Loaded, Programs, bpf_failure, hand_out};
use crate::{
    config::{self, CgroupRef, Config, OnFailure},
    daemon::{bootstrap::Process, leavers::Leavers, namespaces::Namespaces, other, pins::pin_dir, rules},
    kernel::{
        bpf::BpfError,
        bypass::{Bypass, BypassError, Promotions},
        cgroup::{CgroupError, Fresh},
        group::Group,
        sys,
        version::{Feature, Kernel},
    },
    process::exit::{Cause, Failure},
    sources::capture::{
        accept,
        bpf::{Capture, Lifetime, Spec},
        ring::Rings,
        rules::Rules,
    },
};

/// Loads the programs of one capture, in a runtime, and opens its listeners in the daemon's own network namespace. Nothing is
/// attached yet.
pub(in crate::daemon) fn load(
    wanted: &config::Capture,
    config: &Config,
    fresh: Option<&Fresh>,
    process: &Process,
) -> Result<Loaded, Failure> {
    let (group, name) = group(&wanted.cgroup, fresh)?;
    let bypass = bypass(wanted, &group, &name)?;
    let generation = fastrand::u32(1..);
    let mut loaded = Loaded::from(ActiveCapture {
        wanted: wanted.clone(),
        programs: programs(wanted, config, rules::compile(wanted, config)?, &group, generation)?,
        generation,
        counted: Vec::new(),
        group,
        called: name,
        leavers: Leavers::default(),
        pins: pin_dir(config, wanted),
        released: false,
        bypass,
        namespaces: Namespaces::default(),
    });
    for capture in &mut loaded.0 {
        listen_here(capture, process)?;
    }
    Ok(loaded)
}

/// What takes busy connections of a capture past TCP, where it is wanted and can be.
fn bypass(wanted: &config::Capture, group: &Arc<Group>, name: &str) -> Result<Option<Promotions>, Failure> {
    if wanted.bypass == config::Bypass::Off || wanted.proxy.is_some() {
        return Ok(None);
    }
    let known = Kernel::running().allows(Feature::Bypass).map_err(BypassError::Kernel);
    let started = known
        .and_then(|()| Bypass::load())
        .and_then(|bypass| Promotions::start(bypass, Arc::clone(group)).map_err(BypassError::Start));
    match started {
        Ok(promotions) => Ok(Some(promotions)),
        Err(e) if wanted.bypass == config::Bypass::Auto => {
            tracing::warn!(cgroup = name, "busy connections stay with TCP: {e}");
            Ok(None)
        }
        Err(e) if e.is_privilege() => Err(Failure::Privilege(Cause::new(
            e,
            "bypass = \"on\" takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN: run as root, or set it to \"auto\".",
        ))),
        Err(e) => Err(Failure::Kernel(Cause::new(
            e,
            "`tunnel doctor` says what this kernel lacks; with bypass = \"auto\" connections stay with TCP there.",
        ))),
    }
}

/// Loads programs with the rules of a capture; where those of an earlier daemon, or of an earlier configuration, are
/// attached, they find the flows of these.
pub(in crate::daemon) fn programs(
    wanted: &config::Capture,
    config: &Config,
    rules: Rules,
    group: &Group,
    generation: u32,
) -> Result<Programs, Failure> {
    if rules.left_to_daemon > 0 {
        tracing::info!(
            capture = wanted.name,
            prefixes = rules.left_to_daemon,
            "routes deny more ports or prefixes than the kernel's rules have room for: the daemon resets those \
             connections, after connect() has succeeded"
        );
    }
    let mut spec = Spec {
        on_failure: match wanted.on_failure {
            OnFailure::Closed => tunnel_common::capture::ON_FAILURE_CLOSED,
            OnFailure::Open => tunnel_common::capture::ON_FAILURE_OPEN,
        },
        generation,
        for_proxy: wanted.proxy.is_some(),
        group: group.by_name(),
        lifetime: pin_dir(config, wanted).map_or(Lifetime::Cgroup, Lifetime::Pinned),
    };
    let mut loaded = Capture::load(&spec, &rules);
    if let Err(e @ (BpfError::Program { .. } | BpfError::Offsets(_))) = &loaded
        && spec.group.take().is_some()
    {
        tracing::warn!(
            group = group.called(),
            error = e.summary(),
            "the group cannot be followed by its name: when it is removed and created again, its connections are in \
             plaintext for up to a second (`tunnel doctor` names what is missing)"
        );
        loaded = Capture::load(&spec, &rules);
    }
    let mut capture = loaded.map_err(bpf_failure)?;
    let rings = Rings::new(&mut capture);
    Ok(Programs { capture, rings, rules })
}

fn group(wanted: &CgroupRef, fresh: Option<&Fresh>) -> Result<(Arc<Group>, String), Failure> {
    let group = match wanted {
        CgroupRef::Path(path) => Group::at(path),
        CgroupRef::Unit(unit) => Group::of_unit(unit),
        CgroupRef::Fresh => {
            let fresh = fresh.ok_or_else(|| other("this capture needs a command: use `tunnel exec`"))?;
            let fd = fresh.fd().try_clone_to_owned().map_err(|e| other(&e.to_string()))?;
            Group::fixed(fd, "of the command")
        }
    };
    let group = group.map_err(|e| {
        let cause = Cause::new(&e, "`tunnel doctor` shows where cgroup2 is mounted on this system.");
        match e {
            CgroupError::NoHierarchy(_) | CgroupError::TooDeep(_) => Failure::Config(cause),
            CgroupError::Mount(_) | CgroupError::Io { .. } => Failure::Other(cause),
        }
    })?;
    let name = group.called().to_owned();
    Ok((Arc::new(group), name))
}

/// Opens listeners in the daemon's own network namespace, or says where the proxy listens that takes their place.
fn listen_here(active: &mut ActiveCapture, process: &Process) -> Result<(), Failure> {
    let capture = &active.programs.capture;
    if let Some(proxy) = active.wanted.proxy {
        return capture.set_listener(own_netns_cookie()?, proxy_listener(proxy)).map_err(bpf_failure);
    }
    let opened = accept::listen(process.workers, process.own.mark()).map_err(|e| capture_listener(&e))?;
    capture.add_daemon(&opened).map_err(bpf_failure)?;
    let entered = hand_out(capture, active.bypass.as_ref(), opened)?;
    active.namespaces.add_own(entered);
    Ok(())
}

fn proxy_listener(proxy: SocketAddr) -> tunnel_common::capture::Listener {
    let port = Some(proxy.port());
    // A proxy on `[::1]` takes IPv6 only; one on `[::]` takes both.
    match proxy {
        SocketAddr::V4(_) => tunnel_common::capture::Listener::proxy(port, None),
        SocketAddr::V6(a) if a.ip().is_unspecified() => tunnel_common::capture::Listener::proxy(port, port),
        SocketAddr::V6(_) => tunnel_common::capture::Listener::proxy(None, port),
    }
}

fn own_netns_cookie() -> Result<u64, Failure> {
    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .and_then(|s| sys::netns_cookie(s.as_fd()))
        .map_err(|e| {
            Failure::Kernel(Cause::new(format!("SO_NETNS_COOKIE: {e}"), "It takes Linux 5.14 or newer."))
        })
}

fn capture_listener(e: &io::Error) -> Failure {
    let what = format!("the capture listener could not be opened: {e}");
    match e.kind() {
        io::ErrorKind::PermissionDenied => Failure::Privilege(Cause::new(
            what,
            "Marking sockets (SO_MARK) takes CAP_NET_ADMIN: run as root.",
        )),
        io::ErrorKind::AddrNotAvailable => Failure::Other(Cause::new(
            what,
            "The loopback interface of this network namespace is down: `ip link set lo up`.",
        )),
        _ => Failure::Other(Cause::new(what, "")),
    }
}
