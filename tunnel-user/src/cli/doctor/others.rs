//! Programs on cgroups and firewall rules of others that break a capture, or that a capture makes ineffective.
//!
//! Only the network namespace of this process is inspected, and nothing is changed.

use std::os::fd::{AsFd as _, OwnedFd};

use super::{Finding, Lacks};
use crate::{
    config,
    kernel::{
        blockers::{self, Program},
        cgroup::{self, Hierarchy},
        firewall,
        sys::AttachType,
    },
    sources::capture::bpf,
};

/// Groups that are looked at. A node with more has most of them in containers, which look alike.
const GROUPS_MAX: usize = 4096;
/// Findings of a kind that are named.
const NAMED_MAX: usize = 5;

/// Whether captures follow groups by their names.
pub(super) fn by_name() -> Finding {
    const CHECK: &str = "groups by name";
    let refused = match bpf::probe(true) {
        Ok(programs) => programs.into_iter().find_map(|(_, loaded)| loaded.err()),
        Err(e) => Some(e),
    };
    match refused {
        None => Finding::ok(
            CHECK,
            "a cgroup that is removed and created again is captured from its first connection",
        ),
        Some(e) => Finding::warn(
            CHECK,
            e.summary(),
            "`tunnel run` captures a cgroup that is created again up to a second late; its first connections are in plaintext.\nIt \
             takes kernel BTF (CONFIG_DEBUG_INFO_BTF), CAP_PERFMON, and a kernel that is not locked down to \
             \"confidentiality\".",
        ),
    }
}

/// Programs that keep ours away.
pub(super) fn exclusive() -> Finding {
    const CHECK: &str = "other programs";
    let own = match Hierarchy::open().and_then(|h| h.own()) {
        Ok(own) => own,
        Err(e) => return Finding::info(CHECK, e.to_string()),
    };
    let places = [
        AttachType::Connect4,
        AttachType::Connect6,
        AttachType::SockOps,
        AttachType::Getsockopt,
        AttachType::Setsockopt,
        AttachType::Getsockname4,
        AttachType::Getsockname6,
        AttachType::Getpeername4,
        AttachType::Getpeername6,
    ];
    match places.into_iter().find_map(|at| blockers::exclusive(own.as_fd(), at)) {
        Some(program) => Finding::fail(
            CHECK,
            Lacks::Kernel,
            format!(
                "{program} was attached without BPF_F_ALLOW_MULTI: no other program can be attached beside or below it"
            ),
            format!(
                "Have its owner attach it with BPF_F_ALLOW_MULTI, or detach it: bpftool prog show id {}",
                program.id
            ),
        ),
        None => Finding::ok(CHECK, "none prevents attaching to this cgroup"),
    }
}

/// Programs that see packets, for which a captured connection goes to the loopback.
pub(super) fn packet_filters() -> Finding {
    const CHECK: &str = "packet filters";
    let Some(root) = Hierarchy::open().ok().map(Hierarchy::into_root) else {
        return Finding::info(CHECK, "no cgroup2 hierarchy");
    };
    let (mut found, mut looked) = (Vec::<Program>::new(), 0);
    let mut rest = vec![root];
    while let Some(dir) = rest.pop()
        && looked < GROUPS_MAX
    {
        looked += 1;
        found.extend(blockers::own_filters(&dir));
        rest.extend(below(&dir));
    }
    if found.is_empty() {
        return Finding::ok(CHECK, format!("no program filters packets of a cgroup ({looked} inspected)"));
    }
    Finding::info(
        CHECK,
        format!(
            "{}; rules by destination (IPAddressDeny=) do not see the destinations of captured connections",
            named(found.iter().map(ToString::to_string))
        ),
    )
}

/// Rules of firewalls.
pub(super) fn rules() -> Finding {
    const CHECK: &str = "firewall";
    let found = firewall::examine(config::MARK.value());
    if found.is_empty() {
        return Finding::ok(CHECK, "no rule found that interferes");
    }
    Finding::warn(
        CHECK,
        named(found.iter().map(ToString::to_string)),
        "Accept packets on lo, and filter captured applications at the gateway, or with \
         routes and `exclude`.",
    )
}

fn below(dir: &OwnedFd) -> Vec<OwnedFd> {
    let entries = std::fs::read_dir(cgroup::fd_path(dir.as_fd())).into_iter().flatten().flatten();
    let groups = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    groups.filter_map(|e| cgroup::open_below(dir.as_fd(), e.file_name().as_ref()).ok()).collect()
}

fn named(all: impl ExactSizeIterator<Item = String>) -> String {
    let more = all.len().saturating_sub(NAMED_MAX);
    let first: Vec<_> = all.take(NAMED_MAX).collect();
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    first.join("; ") + &more
}
