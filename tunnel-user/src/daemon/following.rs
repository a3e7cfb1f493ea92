//! Captured groups that come and go, and those that lie in one another.
//!
//! # Invariants
//! - Of two captures of one daemon the one of the inner group is asked first, and what it captures the other one leaves alone.
//! - Nothing is captured later because this module has not looked yet: the programs know groups by their names.

use std::{collections::HashMap, os::fd::AsFd as _, path::Path, thread};

use super::captures::ActiveCapture;
use crate::{
    config::{self, CgroupRef, Config},
    kernel::{
        blockers, firewall,
        group::{Group, News},
        sys::{self, AttachType},
    },
    sources::capture::bpf::{self, Owner},
};

impl ActiveCapture {
    /// Says that it captures, or what it waits for.
    pub(super) fn announce(&self) {
        if self.group.now().is_some() {
            tracing::info!(cgroup = self.called, "capturing");
            self.warn_of_filters();
        } else {
            tracing::warn!(
                cgroup = self.called,
                "waiting for cgroup: it does not exist yet, and is captured from its first connection on"
            );
        }
    }

    /// Looks what has become of the group. It may lock what is pinned: nothing that has done so calls it.
    pub(super) fn follow(&mut self) {
        let news = self.group.look();
        match news {
            News::None => return,
            News::Gone => {
                tracing::info!(cgroup = self.called, "cgroup was removed: waiting for it");
                return;
            }
            News::Appeared => tracing::info!(cgroup = self.called, "cgroup appeared: capturing"),
            News::MadeAnew => {
                tracing::info!(cgroup = self.called, "cgroup was removed and created again: capturing");
            }
        }
        self.warn_of_filters();
        let by_name = self.programs.capture.is_by_name();
        let bpffs = self.pins.as_deref().and_then(Path::parent).and_then(Path::parent);
        let lock = bpffs.map(bpf::lock).transpose();
        // What another daemon has attached is that one's to care for.
        if self.programs.capture.owner() == Owner::Another {
            return;
        }
        // What is attached to the group itself went with the one before.
        let attached = lock.and_then(|_lock| match self.group.now() {
            Some(group) if by_name => self.programs.capture.attach_to_group(&group),
            _ => self.put_in_place(),
        });
        match attached {
            Ok(()) if by_name => {}
            Ok(()) => tracing::warn!(cgroup = self.called, "connections made before this were not captured"),
            Err(e) if by_name => {
                tracing::warn!(cgroup = self.called, "SO_ORIGINAL_DST is not answered there: {e}");
            }
            Err(e) => tracing::error!(cgroup = self.called, "its connections are NOT captured: {e}"),
        }
    }

    fn warn_of_filters(&self) {
        let Some(group) = self.group.now() else { return };
        for program in blockers::filters(group.as_fd()) {
            tracing::warn!(
                cgroup = self.called,
                %program,
                "packets are filtered by a program that sees captured connections go to the loopback: what it says of \
                 destinations is void (IPAddressDeny= is such a program)"
            );
        }
    }
}

/// Has the programs of inner groups run before those of the groups around them, where several are attached to one root.
/// The kernel runs them in the order in which they were attached.
pub(super) fn order<'a>(captures: impl IntoIterator<Item = &'a ActiveCapture>) {
    let mut all: Vec<_> = captures.into_iter().filter(|c| c.programs.capture.is_by_name()).collect();
    // Those with the most others around them first.
    let depths: HashMap<_, _> = all
        .iter()
        .map(|c| (c.name(), all.iter().filter(|other| c.group.is_within(&other.group)).count()))
        .collect();
    all.sort_by_key(|c| std::cmp::Reverse(depths.get(&c.name()).copied()));
    for outer in &all {
        let inner = all.iter().filter(|c| c.group.is_within(&outer.group));
        let Some(root) = outer.group.root() else { continue };
        let attached = sys::prog_query(root, AttachType::Connect4).unwrap_or_default().programs;
        let place = |c: &ActiveCapture| {
            c.programs.capture.connect_id().and_then(|id| attached.iter().position(|other| *other == id))
        };
        let Some(last) = inner.filter_map(|c| place(c)).max() else { continue };
        if place(outer) < Some(last)
            && let Err(e) = outer.programs.capture.attach_last(root)
        {
            tracing::warn!(cgroup = outer.called, "captures connections of captured groups within it: {e}");
        }
    }
}

/// Warns of rules that break a capture or that it makes void. They are looked for beside the start, which waits for no other
/// program.
pub(super) fn warn_of_firewall(config: &Config) -> Option<thread::JoinHandle<()>> {
    // A command's group is its own, and it may be over before.
    if config.captures.iter().all(|c| c.cgroup == CgroupRef::Fresh) {
        return None;
    }
    let mark = config.daemon.bootstrap.mark.value();
    let look = move || firewall::examine(mark).iter().for_each(|rule| tracing::warn!("{rule}"));
    thread::Builder::new().name("firewall".to_owned()).spawn(look).ok()
}

/// Which captured groups of a configuration lie in other ones, for a person.
pub fn nested(config: &Config) -> Vec<String> {
    let group = |c: &config::Capture| match &c.cgroup {
        CgroupRef::Path(path) => Group::at(path).ok(),
        CgroupRef::Unit(unit) => Group::of_unit(unit).ok(),
        CgroupRef::Fresh => None,
    };
    let groups: Vec<_> = config.captures.iter().map(|c| (c, group(c))).collect();
    let mut found = Vec::new();
    for (inner, own) in &groups {
        for (outer, other) in &groups {
            let within = match (own, other, &inner.cgroup, &outer.cgroup) {
                (Some(own), Some(other), ..) => own.is_within(other),
                // On another machine than the one that it is for.
                (_, _, CgroupRef::Path(own), CgroupRef::Path(other)) => {
                    own != other && own.starts_with(other)
                }
                _ => false,
            };
            if within {
                let called = |c: &config::Capture| c.name.clone().unwrap_or_default();
                found.push(format!(
                    "the group of capture \"{inner}\" may lie in that of capture \"{outer}\": what both capture, \"{inner}\" \
                     carries; what \"{inner}\" leaves alone, \"{outer}\" carries",
                    inner = called(inner),
                    outer = called(outer),
                ));
            }
        }
    }
    found
}
