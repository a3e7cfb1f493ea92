//! The sources of desired state, each of which owns a layer: what it says, and no other may say.
//!
//! The file, or the flags, are the lowest layer. Layers above it add sections; what they say refers by name to what is in any
//! layer.
//!
//! # Invariants
//! - A name is defined in one layer.
//! - `[daemon]` is the lowest layer's. Routes of a lower layer come before those of a higher one.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
};

use crate::{
    config::Config,
    process::exit::{Cause, Failure},
};

/// Whose layer. The lowest has the lowest number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Owner(u8);

impl Owner {
    /// The configuration file, or the flags in its place.
    pub(super) const FILE: Self = Self(0);
    /// What operators have attached.
    pub(super) const ADMIN: Self = Self(1);
}

impl Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::FILE => f.write_str("file"),
            Self::ADMIN => f.write_str("attached"),
            Self(number) => write!(f, "layer {number}"),
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Layers(BTreeMap<Owner, Config>);

impl Layers {
    /// These layers, but for one that says something else now.
    pub(super) fn with(&self, owner: Owner, layer: Config) -> Self {
        let mut next = self.clone();
        next.0.insert(owner, layer);
        next
    }

    /// What each of them says, by whose it is.
    pub(super) fn describe(&self) -> serde_json::Value {
        let each = self.0.iter().map(|(owner, config)| {
            serde_json::json!({ "source": owner.to_string(), "config": &*config.effective })
        });
        each.collect()
    }

    /// What all of them want together.
    pub(super) fn merged(&self) -> Result<Config, Failure> {
        let mut layers = self.0.values().cloned();
        let Some(mut all) = layers.next() else { return Ok(Config::empty(Default::default())) };
        for layer in layers {
            for (name, identity) in layer.identities {
                let before = all.identities.insert(name.clone(), identity);
                before.map_or(Ok(()), |_| Err(defined_twice("identity", &name)))?;
            }
            merge("capture", &mut all.captures, layer.captures, |c| c.cgroup.name())?;
            merge("listener", &mut all.listeners, layer.listeners, |l| l.address)?;
            merge("upstream", &mut all.upstreams, layer.upstreams, |u| u.name.clone())?;
            all.redirects.extend(layer.redirects);
            all.routes.extend(layer.routes);
            all.policies.extend(layer.policies);
            all.access_logs.extend(layer.access_logs);
            all.traces = all.traces.or(layer.traces);
        }
        Ok(all)
    }
}

fn merge<T, N: PartialEq + Display>(
    kind: &str,
    all: &mut Vec<T>,
    more: Vec<T>,
    name: impl Fn(&T) -> N,
) -> Result<(), Failure> {
    for one in more {
        if all.iter().any(|other| name(other) == name(&one)) {
            return Err(defined_twice(kind, &name(&one)));
        }
        all.push(one);
    }
    Ok(())
}

fn defined_twice(kind: &str, name: &impl Display) -> Failure {
    let what = format!("{kind} \"{name}\" is defined by more than one source");
    Failure::Config(Cause::new(what, "Each name has one owner: remove it from one of them, or rename it."))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Action, CheckFiles};

    fn layer(text: &str) -> Config {
        Config::parse(text, Path::new("layer.toml"), CheckFiles::No).unwrap_or_else(|e| panic!("{e}"))
    }

    const OTHER: Owner = Owner(1);
    const FILE: &str = "[daemon]\nworkers = 1\n[[listener]]\naddress = \"127.0.0.1:1\"\ntls = false\n\
        [[route]]\nto = [{ upstream = \"gw\" }]\n\
        [[upstream]]\nname = \"gw\"\nendpoints = [\"10.0.0.1:1\"]\ntls = false\n";

    /// What two sources say is in force together, the lower one's routes first, and by the lower one's process.
    #[test]
    fn layers_are_merged_by_name() {
        let more = "[daemon]\nworkers = 2\n[[listener]]\naddress = \"127.0.0.1:2\"\ntls = false\n[[route]]\nto = \"deny\"\n";
        let all = Layers::default().with(OTHER, layer(more)).with(Owner::FILE, layer(FILE));
        let all = all.merged().unwrap();
        assert_eq!(all.daemon.bootstrap.workers.map(usize::from), Some(1));
        assert_eq!(all.listeners.iter().map(|l| l.address.port()).collect::<Vec<_>>(), [1, 2]);
        assert!(matches!(all.routes[0].to, Action::Upstreams(_)) && all.routes[1].to == Action::Deny);
        assert_eq!(all.upstreams.len(), 1);
    }

    /// A name that two sources define is an error that says which, and the layers stay what they were.
    #[test]
    fn a_name_in_two_layers_is_refused() {
        let file = Layers::default().with(Owner::FILE, layer(FILE));
        let e = file.with(OTHER, layer(FILE)).merged().unwrap_err();
        assert!(e.to_string().contains("listener \"127.0.0.1:1\""), "{e}");
        assert!(file.merged().is_ok());
    }
}
