//! Upstreams, as workers are told of them.
//!
//! # Invariants
//! - What finds out the endpoints of an upstream runs once for the whole process, and as long as a worker has the upstream.

use std::sync::Arc;

use super::{identities::Identities, other};
use crate::{
    config::{self, Discovery},
    model::names::IdentityName,
    process::exit::{Cause, Failure},
    sinks::{
        dial::Dialer,
        upstream::{
            self, Next, PoolSettings,
            discovery::{EndpointSource, dns, file},
            limit::Limits,
            settings::ConnectSettings,
        },
    },
    transport::tcp,
};

/// An upstream of the configuration in force.
#[derive(Clone)]
pub(super) struct ActiveUpstream {
    pub(super) wanted: config::Upstream,
    /// The same as long as nothing is different about it.
    pub(super) settings: Arc<Next<upstream::UpstreamSettings>>,
}

/// Whether an upstream is what it was before, and so are its identity and the one that it goes through.
pub(super) fn is_same(
    u: &config::Upstream,
    all: &[config::Upstream],
    before: &[ActiveUpstream],
    same_identity: &dyn Fn(&IdentityName) -> bool,
    same_of_captures: bool,
) -> bool {
    let outer = || all.iter().find(|outer| Some(&outer.name) == u.via.as_ref());
    before.iter().any(|b| b.wanted == *u)
        && (!u.tls || (same_of_captures && same_identity(&u.identity)))
        && (u.via.is_none()
            || outer().is_some_and(|outer| is_same(outer, all, before, same_identity, same_of_captures)))
}

/// Finds out endpoints.
pub(super) struct Discover {
    own: tcp::Own,
    workers: usize,
    /// One thread for all names, once there is one.
    questions: Option<Arc<dns::Questions>>,
}

impl Discover {
    pub(super) fn new(own: tcp::Own, workers: usize) -> Self {
        Self { own, workers, questions: None }
    }

    /// Makes an upstream ready.
    pub(super) fn upstream(
        &mut self,
        u: &config::Upstream,
        identities: &Identities,
        of_captures: &[IdentityName],
    ) -> Result<ActiveUpstream, Failure> {
        let settings = Arc::new(self.settings(u, identities, of_captures)?);
        Ok(ActiveUpstream { wanted: u.clone(), settings })
    }

    fn settings(
        &mut self,
        u: &config::Upstream,
        identities: &Identities,
        of_captures: &[IdentityName],
    ) -> Result<Next<upstream::UpstreamSettings>, Failure> {
        let store = || identities.store(&u.identity);
        let of_captures = || {
            let stores = of_captures.iter().map(|name| Ok((name.clone(), identities.store(name)?)));
            stores.collect::<Result<_, Failure>>()
        };
        if let Some(in_process) = &u.in_process {
            let proof = |check| {
                Ok::<_, Failure>(upstream::Proof {
                    store: store()?,
                    of_captures: Arc::new(of_captures()?),
                    check,
                })
            };
            let proof = in_process.check.clone().map(proof).transpose()?;
            let (listener, dial_timeout) = (in_process.listener.clone(), in_process.dial_timeout);
            let own = upstream::InProcessUpstream { name: u.name.to_string(), listener, proof, dial_timeout };
            return Ok(Next::InProcess(Arc::new(own)));
        }
        let proving = |check| {
            let (store, of_captures) = (store()?, Arc::new(of_captures()?));
            Ok::<_, Failure>(upstream::UpstreamTls { store, of_captures, check })
        };
        let limits = Limits::share(&u.limits, self.workers);
        Ok(Next::Tunnel(upstream::UpstreamSettings {
            name: u.name.to_string(),
            endpoints: self.source(u)?,
            via: u.via.clone(),
            balance: u.balance,
            protocol: u.protocol,
            tls: u.check().map(proving).transpose()?,
            headers: u.headers.clone(),
            response_timeout: u.response_timeout,
            optimistic_data: u.optimistic_data,
            pool: PoolSettings {
                max_streams: usize::try_from(u.max_streams.get()).unwrap_or(usize::MAX),
                max_connections: limits.connections.unwrap_or(usize::MAX),
                connect: ConnectSettings {
                    timeout: u.connect_timeout,
                    dialer: Dialer::new(self.own.clone()),
                },
                idle_timeout: u.idle_timeout,
                keepalive_interval: u.keepalive_interval,
                keepalive_timeout: u.keepalive_timeout,
                congestion: u.congestion_control,
            },
            outlier: u.outlier_detection.clone(),
            check: u.health_check.clone(),
            limits,
        }))
    }

    fn source(&mut self, u: &config::Upstream) -> Result<EndpointSource, Failure> {
        Ok(match &u.discovery {
            Discovery::Static => EndpointSource::fixed(&u.endpoints),
            Discovery::Dns => {
                let questions = match self.questions.take() {
                    Some(questions) => questions,
                    None => dns::Questions::start(self.own.clone())
                        .map_err(|e| other(&format!("names of endpoints could not be resolved: {e}")))?,
                };
                let feed = questions.follow(&u.name, &u.endpoints);
                self.questions = Some(questions);
                EndpointSource::Fed(feed)
            }
            Discovery::File(file) => {
                let help = "One HOST:PORT on each line; # starts a comment.";
                let wrong = |e: file::FileError| Failure::Config(Cause::new(e.to_string(), help));
                EndpointSource::Fed(file::follow(&u.name, file).map_err(wrong)?)
            }
        })
    }
}
