//! From what a daemon does to what a configuration wants: a start, a reload and a take-over are the same.
//!
//! Both are compared by name. What is new or different is prepared, then attached, and then, all at once, put in force.
//!
//! # Invariants
//! - A change is made whole or not at all. Everything that can fail is done before anything changes that others notice, and
//!   what had changed when something failed after all is put back.
//! - What is the same in both goes on untouched, and flows keep what they began with, but for those that policies or routes no
//!   longer allow: each worker ends them (`proxy/policy.rs`).

use std::{mem, net::SocketAddr, os::fd::OwnedFd};

use super::{
    Running,
    bootstrap::require_same,
    captures::{self, ActiveCapture, Loaded, Programs},
    following,
    identities::Identities,
    listen::{self, ActiveListener, ActiveRedirect, Opened, Opener},
    observers::Observers,
    other,
    pins::lock_if_pinned,
    rules,
    shared::{path, shared},
    upstreams::{self, ActiveUpstream},
};
use crate::{
    config::Config,
    daemon::takeover::{Groups, Listeners},
    kernel::cgroup::Fresh,
    model::names::{GroupName, IdentityName, UpstreamName},
    process::exit::Failure,
    relay::PathKind,
    worker::State,
};

/// One step of a change, which may fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    LoadIdentity(IdentityName),
    Listen(SocketAddr),
    ListenForRedirects,
    LoadCapture(GroupName),
    LoadRules(GroupName),
    AddUpstream(UpstreamName),
    OpenAccessLog(usize),
    StartTraces,
    ReplaceRules(GroupName),
    Attach(GroupName),
}

/// Asked before each step, and where it fails the change fails.
pub(super) type Gate<'g> = &'g dyn Fn(&Step) -> Result<(), Failure>;

/// Lets every step be taken.
pub(super) fn proceed(step: &Step) -> Result<(), Failure> {
    tracing::debug!(?step, "reconciling");
    Ok(())
}

/// What is different, counted for the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) listeners: usize,
    pub(super) captures: usize,
    pub(super) upstreams: usize,
}

/// What was made ready for another configuration. Dropped, it leaves everything as it was.
pub(super) struct Prepared {
    config: Config,
    path: PathKind,
    identities: Identities,
    listeners: Vec<ActiveListener>,
    redirects: Vec<ActiveRedirect>,
    opened: Opened,
    upstreams: Vec<ActiveUpstream>,
    observers: Observers,
    /// New captures.
    captures: Loaded,
    /// Programs for captures that stay.
    programs: Vec<(GroupName, Programs)>,
    changed: Changed,
    /// From the first look at what is pinned until the last link. Dropped last.
    _lock: Option<OwnedFd>,
}

impl Prepared {
    /// The addresses of the CONNECT listeners, with the ports that they got.
    pub(super) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().map(|l| l.bound)
    }
}

impl Running {
    /// Makes this daemon what a configuration says. On an error it stays what it was.
    pub(super) async fn reconcile(&mut self, config: Config) -> Result<Changed, Failure> {
        let changed = self.change(config, &proceed)?;
        self.workers.in_force().await;
        self.identities.forget_unused(&self.config);
        // Until here workers wrote to them.
        self.retired.clear();
        Ok(changed)
    }

    /// The same, but for waiting until the workers have it in force.
    pub(super) fn change(&mut self, config: Config, gate: Gate<'_>) -> Result<Changed, Failure> {
        require_same(&self.config, &config)?;
        let failed = |e| other(&format!("copying a listening socket: {e}"));
        let existing = listen::copies(&self.kept).map_err(failed)?.into_iter().collect();
        let groups = listen::copies_of(&self.groups).map_err(failed)?;
        let mut next = self.prepare(config, (existing, groups), None, gate)?;
        self.attach(&mut next, gate)?;
        Ok(self.commit(next))
    }

    /// Does everything that can fail and that nobody notices. `existing` are sockets that listen already; `fresh` is the
    /// group of a command.
    pub(super) fn prepare(
        &mut self,
        config: Config,
        existing: (Listeners, Groups),
        fresh: Option<&Fresh>,
        gate: Gate<'_>,
    ) -> Result<Prepared, Failure> {
        let mut changed = Changed::default();
        let path = path(&config)?;
        let identities = self.identities.next(&config, gate)?;
        let same_identity = |name: &IdentityName| self.identities.is_same(&identities, name);

        let mut opener = Opener::new(&self.process, existing.0, existing.1);
        let mut listeners = Vec::new();
        for wanted in &config.listeners {
            let same =
                |l: &&ActiveListener| l.wanted == *wanted && (!wanted.tls || same_identity(&wanted.identity));
            if let Some(listener) = self.listeners.iter().find(same) {
                opener.keep(wanted.address);
                listeners.push(listener.clone());
            } else {
                gate(&Step::Listen(wanted.address))?;
                listeners.push(opener.listener(wanted, &identities)?);
                changed.listeners += 1;
            }
        }
        let redirects = if config.redirects == self.config.redirects {
            config.redirects.iter().flat_map(|r| &r.listen).for_each(|address| opener.keep(*address));
            self.redirects.clone()
        } else {
            gate(&Step::ListenForRedirects)?;
            opener.redirects(&config.redirects)?
        };
        let opened = opener.finish();
        let observers = self.observers.next(&config, &self.process, gate)?;

        // Only from here on: what may block above, or fail more often, keeps no other daemon of this node waiting, and leaves
        // no file system mounted. Dropped after what is loaded.
        let lock = lock_if_pinned(&config, self.config.captures.iter().chain(&config.captures))?;
        let (mut captures, mut programs) = (Loaded::default(), Vec::new());
        for wanted in &config.captures {
            let group = wanted.cgroup.name();
            let Some(active) = self.captures.iter().find(|a| a.wanted.cgroup.name() == group) else {
                gate(&Step::LoadCapture(group))?;
                captures.0.extend(captures::load(wanted, &config, fresh, &self.process)?.keep());
                continue;
            };
            // Routes are part of them.
            let rules = rules::compile(wanted, &config)?;
            if !active.is_attached_as(wanted, &rules) {
                gate(&Step::LoadRules(group.clone()))?;
                let next = captures::programs(wanted, &config, rules, &active.group, active.generation)?;
                programs.push((group, next));
            }
        }
        changed.captures = captures.0.len() + programs.len();

        let mut upstreams = Vec::new();
        // Whose flows show another identity than the upstream's own.
        let of_captures: Vec<_> = config.identities_of_captures().cloned().collect();
        let same_of_captures =
            self.config.identities_of_captures().eq(&of_captures) && of_captures.iter().all(same_identity);
        for wanted in &config.upstreams {
            let before = &self.upstreams;
            let same =
                upstreams::is_same(wanted, &config.upstreams, before, &same_identity, same_of_captures);
            if let Some(before) = self.upstreams.iter().find(|u| same && u.wanted.name == wanted.name) {
                upstreams.push(before.clone());
            } else {
                gate(&Step::AddUpstream(wanted.name.clone()))?;
                upstreams.push(self.discover.upstream(wanted, &identities, &of_captures)?);
                changed.upstreams += 1;
            }
        }
        Ok(Prepared {
            config,
            path,
            identities,
            listeners,
            redirects,
            opened,
            upstreams,
            observers,
            captures,
            programs,
            changed,
            _lock: lock,
        })
    }

    /// Attaches new captures, and other programs for those that stay. Where one fails, those that stay have what they had;
    /// the new ones are taken back when `next` is dropped.
    pub(super) fn attach(&mut self, next: &mut Prepared, gate: Gate<'_>) -> Result<(), Failure> {
        self.register(&next.captures.0);
        for active in &mut next.captures.0 {
            active.scan(&self.process);
        }
        let mut replaced = Vec::new();
        let attached =
            self.replace_programs(mem::take(&mut next.programs), &mut replaced, gate).and_then(|()| {
                next.captures.0.iter_mut().try_for_each(|active| {
                    gate(&Step::Attach(active.wanted.cgroup.name()))?;
                    active.attach()
                })
            });
        for (group, before) in replaced {
            let Some(active) = self.captures.iter_mut().find(|a| a.wanted.cgroup.name() == group) else {
                continue;
            };
            if attached.is_ok() {
                active.count(&before);
            } else if let Err(e) = active.replace(before) {
                tracing::error!(cgroup = active.called, "failed to restore the previous rules: {e}");
            }
        }
        if attached.is_err() {
            self.register(&[]);
        } else {
            following::order(self.captures.iter().chain(&next.captures.0));
        }
        attached
    }

    fn replace_programs(
        &mut self,
        programs: Vec<(GroupName, Programs)>,
        replaced: &mut Vec<(GroupName, Programs)>,
        gate: Gate<'_>,
    ) -> Result<(), Failure> {
        for (group, next) in programs {
            let Some(active) = self.captures.iter_mut().find(|a| a.wanted.cgroup.name() == group) else {
                return Err(other(&format!("new rules for {group}, which is not captured")));
            };
            gate(&Step::ReplaceRules(group.clone()))?;
            replaced.push((group, active.replace(next)?));
        }
        Ok(())
    }

    /// Puts in force what was attached. Nothing fails here.
    pub(super) fn commit(&mut self, next: Prepared) -> Changed {
        let Prepared { config, path, identities, listeners, redirects, opened, upstreams, observers, .. } =
            next;
        let new = next.captures.keep();
        for capture in &new {
            capture.announce();
            capture.forget_other_versions();
        }
        self.captures.iter().chain(&new).for_each(|capture| capture.programs.capture.settle());
        opened.settle();
        for mut capture in mem::take(&mut self.captures) {
            match config.captures.iter().find(|wanted| wanted.cgroup.name() == capture.wanted.cgroup.name()) {
                Some(wanted) => {
                    capture.wanted = wanted.clone();
                    self.captures.push(capture);
                }
                None => capture.detach(),
            }
        }
        self.captures.extend(new);
        self.register(&[]);
        let (logs, tracer) = (observers.logs(), observers.tracer());
        self.shared =
            Some(shared(&config, &self.process, listeners.iter().map(|l| l.bound), path, logs, tracer));
        self.retired.push(mem::replace(&mut self.observers, observers));
        (self.config, self.identities) = (config, identities);
        (self.listeners, self.redirects, self.upstreams) = (listeners, redirects, upstreams);
        (self.kept, self.groups) = (opened.kept, opened.groups);
        self.forget_unused_groups();
        self.publish();
        let nested = following::nested(&self.config);
        self.config.warnings.iter().chain(&nested).for_each(|warning| tracing::warn!("{warning}"));
        next.changed
    }

    /// Tells the workers what they are to do: what is configured, and in which network namespaces.
    pub(super) fn publish(&self) {
        let Some(shared) = self.shared.clone() else { return };
        let listeners = self.listeners.iter().map(ActiveListener::source);
        let redirects = self.redirects.iter().map(ActiveRedirect::source);
        let captures = self.captures.iter().flat_map(ActiveCapture::sources);
        self.workers.publish(State {
            version: self.workers.version() + 1,
            shared,
            upstreams: self.upstreams.iter().map(|u| u.settings.clone()).collect(),
            sources: listeners.chain(redirects).chain(captures).collect(),
        });
    }

    /// Closes the UDP sockets of listeners that there are no longer, once the last connection there has ended.
    pub(super) fn forget_unused_groups(&mut self) {
        let listeners = &self.config.listeners;
        let wanted = |at: &SocketAddr| listeners.iter().any(|l| l.has_h3() && l.address == *at);
        self.groups.retain(|address, group| wanted(address) || group.is_used());
    }

    /// Has the sockets that we connect registered with every capture, those to come included.
    fn register(&self, more: &[ActiveCapture]) {
        let all = self.captures.iter().chain(more).map(|active| active.programs.capture.register());
        self.process.own.set_captures(all.collect());
    }
}
