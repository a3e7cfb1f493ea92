//! The identities of a daemon, by name.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    other,
    reconcile::{Gate, Step},
};
use crate::{
    admin::view,
    config::{Config, IdentitySettings, Protocol},
    identity::{
        configured::Configured,
        provider::Subscription,
        store::{self, TlsOptions, TlsStore},
        tls::Wanted,
    },
    model::names::IdentityName,
    process::exit::{Cause, Failure},
};

/// See the module.
#[derive(Clone, Default)]
pub(super) struct Identities(BTreeMap<IdentityName, Identity>);

#[derive(Clone)]
struct Identity {
    wanted: IdentitySettings,
    store: Arc<TlsStore>,
    _notices: Arc<Subscription>,
}

impl Identities {
    /// Those of a configuration: what is the same as here goes on, anything else is loaded.
    pub(super) fn next(&self, config: &Config, gate: Gate<'_>) -> Result<Self, Failure> {
        let mut next = Self::default();
        for (name, wanted) in &config.identities {
            let identity = match self.0.get(name).filter(|before| before.wanted == *wanted) {
                Some(before) => before.clone(),
                None => {
                    gate(&Step::LoadIdentity(name.clone()))?;
                    load(wanted)?
                }
            };
            next.0.insert(name.clone(), identity);
        }
        Ok(next)
    }

    /// Whether an identity is the same in both.
    pub(super) fn is_same(&self, other: &Self, name: &IdentityName) -> bool {
        let store = |of: &Self| of.0.get(name).map(|identity| Arc::as_ptr(&identity.store));
        store(self) == store(other)
    }

    /// What operators may know of them.
    pub(super) fn describe(&self) -> Vec<view::Identity> {
        let each = self.0.iter().map(|(name, Identity { store, .. })| {
            let (origin, chain, roots) = store.describe();
            let identity = store.identity().map(|identity| identity.to_string());
            view::Identity { name: name.to_string(), origin, identity, chain, roots }
        });
        each.collect()
    }

    /// The one of this name.
    pub(super) fn store(&self, name: &IdentityName) -> Result<Arc<TlsStore>, Failure> {
        let found = self.0.get(name).map(|identity| Arc::clone(&identity.store));
        found.ok_or_else(|| {
            let what = format!("TLS needs the identity \"{name}\", which is not configured");
            Failure::Config(Cause::new(what, "Add an [identity] section."))
        })
    }

    /// Forgets the sessions of connections that a configuration no longer makes or takes.
    pub(super) fn forget_unused(&self, config: &Config) {
        for (name, identity) in &self.0 {
            let (upstreams, listeners) = (config.upstreams.iter(), config.listeners.iter());
            identity.store.keep(&Wanted {
                clients: upstreams
                    .filter(|u| u.identity == *name || config.identities_of_captures().any(|own| own == name))
                    .filter_map(|u| u.check().map(|check| (check.san, u.protocol)))
                    .flat_map(|(san, protocol)| protocol.all().map(move |spoken| (san.clone(), spoken)))
                    .collect(),
                servers: listeners
                    .filter(|l| l.identity == *name)
                    .filter_map(|l| l.check().map(|check| (check, l)))
                    .flat_map(|(check, l)| {
                        let (tcp, udp) = (l.over_tcp(), l.has_h3().then(|| vec![Protocol::H3]));
                        [Some(tcp), udp].into_iter().flatten().map(move |spoken| (check.clone(), spoken))
                    })
                    .collect(),
            });
        }
    }
}

fn load(wanted: &IdentitySettings) -> Result<Identity, Failure> {
    let IdentitySettings { on_expiry, key_exchange, .. } = wanted;
    let options = TlsOptions { on_expiry: *on_expiry, key_exchange: key_exchange.clone() };
    let store = TlsStore::load_with(Box::new(Configured::new(wanted)?), options)?;
    let notices = store::watch(&store, || {})
        .map_err(|e| other(&format!("changes of the identity cannot be watched: {e}")))?;
    Ok(Identity { wanted: wanted.clone(), store, _notices: Arc::new(notices) })
}
