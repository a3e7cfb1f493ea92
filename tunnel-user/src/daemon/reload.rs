//! Another configuration for a daemon that runs.
//!
//! Enters: a configuration. Leaves: the same daemon, with it in force. Invariant: everything that can fail is done
//! before anything changes, and what had changed when something failed after all is put back; what is the same in both
//! goes on untouched, and flows keep what they began with. It never reads a file.

use std::{collections::HashMap, mem, sync::Arc};

use socket2::Socket;
use tokio::sync::mpsc;

use super::{
    Identity, Running,
    captures::{self, ActiveCapture, Loaded, Programs},
    following,
    listen::{self, ActiveListener, Opener, Sockets},
    load_identity, lock_if_pinned, other, path, require_privileges, rules, shared,
};
use crate::{
    config::{self, Config},
    identity::tls::Wanted,
    model::names::IdentityName,
    process::exit::{Cause, Failure},
    sinks::upstream,
    transport::tcp::OnClose,
    worker::{Change, More, SourceId},
};

/// What is different, counted for the log.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) listeners: usize,
    pub(super) captures: usize,
    pub(super) upstreams: usize,
}

/// What was made ready for another configuration.
struct Ready {
    /// One of another certificate.
    identity: Option<Option<Identity>>,
    listeners: Vec<ActiveListener>,
    redirects: Vec<SourceId>,
    sockets: Vec<Sockets>,
    /// New captures.
    captures: Vec<ActiveCapture>,
    /// Programs for captures that stay, by their source.
    programs: Vec<(SourceId, Programs)>,
    upstreams: Vec<Arc<upstream::Next<upstream::Settings>>>,
    kept: Vec<(std::net::SocketAddr, Vec<Socket>)>,
    /// See [`listen::retune`].
    retuned: Vec<(std::net::SocketAddr, OnClose)>,
}

impl Running {
    /// Puts another configuration in force. On an error the old one is.
    pub(super) async fn reload(&mut self, config: Config) -> Result<Changed, Failure> {
        self.can_become(&config)?;
        let path = path(&config)?;
        // From the first look at what is pinned until the last link.
        let _lock = lock_if_pinned(&config, self.config.captures.iter().chain(&config.captures))?;
        let ready = self.prepare(&config)?;
        let Ready {
            identity,
            listeners,
            redirects,
            sockets,
            mut captures,
            programs,
            upstreams,
            kept,
            retuned,
        } = ready;
        let changed = Changed {
            listeners: sockets.first().map_or(0, |s| s.listeners.len()),
            captures: captures.len() + programs.len(),
            upstreams: upstreams
                .iter()
                .filter(|u| !self.upstreams.iter().any(|old| Arc::ptr_eq(u, old)))
                .count(),
        };

        self.register(&captures);
        for active in &mut captures {
            active.scan(&self.more, self.fixed.own.mark());
        }
        if let Err(e) = self.attach(&mut captures, programs) {
            for active in &captures {
                active.take_back();
                active.forget(&self.more);
            }
            self.register(&[]);
            return Err(e);
        }

        following::order(self.captures.iter().chain(&captures));
        captures.iter().for_each(ActiveCapture::announce);

        // Nothing fails from here on.
        self.captures.iter().chain(&captures).for_each(|active| active.programs.capture.settle());
        listen::retune(&kept, &retuned);
        let stays = |c: &ActiveCapture| config.captures.iter().any(|w| w.cgroup == c.wanted.cgroup);
        let (mut active, gone): (Vec<_>, Vec<_>) = mem::take(&mut self.captures).into_iter().partition(stays);
        gone.iter().for_each(ActiveCapture::detach);
        let retire = self.retired(&listeners, &redirects, &gone);
        let mut renamed = Vec::new();
        for capture in &mut active {
            let Some(wanted) = config.captures.iter().find(|w| w.cgroup == capture.wanted.cgroup) else {
                continue;
            };
            if wanted.name != capture.wanted.name {
                renamed.push((capture.source, wanted.name.as_deref().map(Arc::from)));
            }
            capture.wanted = wanted.clone();
        }
        active.extend(captures);
        let shared = shared(&config, &self.fixed, &listeners, path);
        let (done, mut all_done) = mpsc::channel(1);
        self.upstreams = upstreams;
        for (worker, Sockets { captures, listeners }) in self.more.iter().zip(sockets) {
            let change = Change {
                shared: Arc::clone(&shared),
                upstreams: self.upstreams.clone(),
                renamed: renamed.clone(),
                retire: retire.clone(),
                captures,
                listeners,
                done: done.clone(),
            };
            worker.send(More::Change(Box::new(change))).await;
        }
        drop(done);
        let _all = all_done.recv().await;
        if let Some(identity) = identity {
            self.identity = identity;
        }
        (self.listeners, self.redirects, self.captures, self.kept) = (listeners, redirects, active, kept);
        self.config = config;
        self.register(&[]);
        following::nested(&self.config).iter().for_each(|warning| tracing::warn!("{warning}"));
        if let Some(identity) = &self.identity {
            identity.store.keep(&wanted_tls(&self.config));
        }
        Ok(changed)
    }

    /// What a running daemon cannot change.
    fn can_become(&self, config: &Config) -> Result<(), Failure> {
        let remedy = "`tunnel run --takeover` with the same file starts another daemon in its place, and no connection \
                      is refused.";
        if let Some(key) = self.config.daemon.bootstrap.differs_in(&config.daemon.bootstrap) {
            let what = format!("daemon.{key} cannot change while the daemon runs");
            return Err(Failure::Config(Cause::new(what, remedy)));
        }
        let proxied = |c: &config::Capture| self.same_group(c).is_some_and(|a| a.wanted.proxy != c.proxy);
        if config.captures.iter().any(proxied) {
            let what = "the proxy of a capture cannot change while the daemon runs";
            return Err(Failure::Config(Cause::new(what, remedy)));
        }
        let bypassed = |c: &config::Capture| self.same_group(c).is_some_and(|a| a.wanted.bypass != c.bypass);
        if config.captures.iter().any(bypassed) {
            let what = "bypass of a capture cannot change while the daemon runs";
            return Err(Failure::Config(Cause::new(what, remedy)));
        }
        require_privileges(config)
    }

    fn same_group(&self, wanted: &config::Capture) -> Option<&ActiveCapture> {
        self.captures.iter().find(|a| a.wanted.cgroup == wanted.cgroup)
    }

    /// Does everything that can fail and that nobody notices.
    fn prepare(&mut self, config: &Config) -> Result<Ready, Failure> {
        let name = IdentityName::default();
        let files = config.identities.get(&name);
        let same_identity = files == self.config.identities.get(&name);
        let identity = match files {
            _ if same_identity => None,
            files => Some(files.cloned().map(load_identity).transpose()?),
        };
        let tls = identity.as_ref().unwrap_or(&self.identity).as_ref().map(|i| &i.store);

        let mut sockets: Vec<Sockets> = (0..self.fixed.workers).map(|_| Sockets::default()).collect();
        let mut opener = self.opener()?;
        let mut listeners = Vec::new();
        for wanted in &config.listeners {
            let same = |l: &&ActiveListener| l.wanted == *wanted && (same_identity || !wanted.tls);
            listeners.push(match self.listeners.iter().find(same) {
                Some(listener) => {
                    opener.keep(wanted.address);
                    listener.clone()
                }
                None => opener.open_listener(self.sources.next(), wanted, tls, &mut sockets)?,
            });
        }
        let redirects = if config.redirects == self.config.redirects {
            config.redirects.iter().flat_map(|r| &r.listen).for_each(|address| opener.keep(*address));
            self.redirects.clone()
        } else {
            opener.open_redirects(&config.redirects, &mut self.sources, &mut sockets)?
        };

        let (mut captures, mut programs) = (Loaded::default(), Vec::new());
        for wanted in &config.captures {
            let Some(active) = self.same_group(wanted) else {
                captures.0.push(captures::load(self.sources.next(), wanted, config, None)?);
                let Some(new) = captures.0.last_mut() else { continue };
                for (own, opened) in
                    sockets.iter_mut().zip(new.listen_here(self.fixed.workers, self.fixed.own.mark())?)
                {
                    own.captures.extend(opened);
                }
                continue;
            };
            // Routes are part of them.
            let rules = rules::compile(wanted, config)?;
            if !active.is_attached_as(wanted, &rules) {
                programs.push((
                    active.source,
                    captures::programs(wanted, config, rules, &active.group, active.generation)?,
                ));
            }
        }

        let upstream = |u: &config::Upstream| {
            let kept = is_kept(u, &config.upstreams, &self.config.upstreams, same_identity);
            let old = self.upstreams.iter().find(|old| kept && *old.name() == *u.name);
            old.map_or_else(|| self.discover.upstream(u, tls).map(Arc::new), |old| Ok(Arc::clone(old)))
        };
        let upstreams = config.upstreams.iter().map(upstream).collect::<Result<_, _>>()?;
        let Opener { kept, retuned, .. } = opener;
        let captures = captures.keep();
        Ok(Ready { identity, listeners, redirects, sockets, captures, programs, upstreams, kept, retuned })
    }

    /// Opens what listens; what listens already where something else is wanted of it is used again.
    fn opener(&self) -> Result<Opener, Failure> {
        let copies = |(address, sockets): &(_, Vec<Socket>)| {
            let copies: Result<Vec<_>, _> = sockets.iter().map(Socket::try_clone).collect();
            copies.map(|copies| (*address, copies))
        };
        let taken: Result<HashMap<_, _>, _> = self.kept.iter().map(copies).collect();
        let taken = taken.map_err(|e| other(&format!("copying a listening socket: {e}")))?;
        Ok(Opener {
            workers: self.fixed.workers,
            mark: self.fixed.own.mark(),
            taken,
            kept: Vec::new(),
            retuned: Vec::new(),
        })
    }

    /// Attaches new captures, and other programs for those that stay. Where one fails, those that stay have what they had;
    /// the new ones are the caller's to take back.
    fn attach(
        &mut self,
        new: &mut [ActiveCapture],
        programs: Vec<(SourceId, Programs)>,
    ) -> Result<(), Failure> {
        let mut replaced = Vec::new();
        let mut failed = None;
        for (source, next) in programs {
            let Some(active) = self.captures.iter_mut().find(|a| a.source == source) else { continue };
            match active.replace(next) {
                Ok(old) => replaced.push((source, old)),
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        for active in &mut *new {
            if failed.is_some() {
                break;
            }
            failed = active.attach().err();
        }
        for (source, old) in replaced {
            let Some(active) = self.captures.iter_mut().find(|a| a.source == source) else { continue };
            if failed.is_none() {
                active.count(&old);
            } else if let Err(e) = active.replace(old) {
                tracing::error!(cgroup = active.name, "the old rules are not back: {e}");
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// The sources of which nothing more is taken.
    fn retired(
        &self,
        listeners: &[ActiveListener],
        redirects: &[SourceId],
        gone: &[ActiveCapture],
    ) -> Vec<SourceId> {
        let before =
            self.listeners.iter().map(|l| l.source).filter(|s| listeners.iter().all(|l| l.source != *s));
        let redirected = self.redirects.iter().copied().filter(|s| !redirects.contains(s));
        before.chain(redirected).chain(gone.iter().map(|a| a.source)).collect()
    }
}

/// What connections are made and taken with by a configuration.
fn wanted_tls(config: &Config) -> Wanted {
    Wanted {
        clients: config
            .upstreams
            .iter()
            .filter_map(|u| u.check().map(|check| (check.san, u.protocol)))
            .collect(),
        servers: config
            .listeners
            .iter()
            .filter_map(|l| l.check().map(|check| (check, l.protocols.clone())))
            .collect(),
    }
}

/// Whether an upstream is what it was before, and so is the one that it goes through.
fn is_kept(
    u: &config::Upstream,
    all: &[config::Upstream],
    before: &[config::Upstream],
    same_identity: bool,
) -> bool {
    let outer = || all.iter().find(|outer| Some(&outer.name) == u.via.as_ref());
    before.contains(u)
        && (same_identity || !u.tls)
        && (u.via.is_none() || outer().is_some_and(|outer| is_kept(outer, all, before, same_identity)))
}
