//! An identity as a configuration describes it: a provider, and the trust domains and revocation lists that files add to it.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    files::{FilesError, Readers, accept, bundle_of, material, read},
    pem,
    provider::{IdentityError, IdentityProvider, Material, Subscription, TrustBundles, fingerprint},
    pushed::{Pushed, Source},
    sds::Sds,
    tls::TlsIdentity,
    workload_api::WorkloadApi,
};
use crate::{
    config::{IdentitySettings, IdentitySource, ProviderAddr, TrustDomain},
    process::files,
};

/// See the module.
pub struct Configured {
    provider: Box<dyn IdentityProvider>,
    trust_domains: Vec<TrustDomain>,
    crls: Vec<PathBuf>,
}

impl Configured {
    /// Starts the provider, where it is one that has to be.
    pub fn new(settings: &IdentitySettings) -> Result<Self, IdentityError> {
        let provider: Box<dyn IdentityProvider> = match &settings.source {
            IdentitySource::Files(files) => Box::new(files.clone()),
            IdentitySource::WorkloadApi { endpoint, spiffe_id } => {
                let source = WorkloadApi { endpoint: endpoint.clone(), spiffe_id: spiffe_id.clone() };
                Box::new(start(endpoint, source)?)
            }
            IdentitySource::Sds { endpoint, secret, validation_context } => {
                let (secret, validation_context) = (secret.clone(), validation_context.clone());
                let source = Sds { endpoint: endpoint.clone(), secret, validation_context };
                Box::new(start(endpoint, source)?)
            }
        };
        let (trust_domains, crls) = (settings.trust_domains.clone(), settings.crls.clone());
        Ok(Self { provider, trust_domains, crls })
    }
}

fn start(endpoint: &ProviderAddr, source: impl Source) -> Result<Pushed, IdentityError> {
    let origin = endpoint.to_string();
    let failed = |e: io::Error| IdentityError::Unavailable { origin: origin.clone(), why: e.to_string() };
    Pushed::start(origin.clone(), source).map_err(failed)
}

/// Checks what is configured as far as files say it: no provider is asked, which is perhaps on another machine. Returns what
/// depends on who the daemon is: whoever checks may be in other groups.
pub fn check(settings: &IdentitySettings) -> Result<Option<String>, IdentityError> {
    let IdentitySettings { source, trust_domains, crls, .. } = settings;
    let IdentitySource::Files(files) = source else {
        return add(&mut TrustBundles::default(), trust_domains, crls).map(|_| None);
    };
    let (mut material, exposed) = material(files)?;
    let warning = match exposed {
        Some(Readers::Group(group)) if !files.insecure_key_permissions => Some(format!(
            "{}: group {group} can read the private key: the daemon has to be in that group",
            files.key.display()
        )),
        exposed => accept(files, exposed).map(|()| None)?,
    };
    add(&mut material.bundles, trust_domains, crls)?;
    TlsIdentity::new(material, &[])?;
    Ok(warning)
}

/// Adds what is in files; the contents of those.
fn add(
    bundles: &mut TrustBundles,
    trust_domains: &[TrustDomain],
    crls: &[PathBuf],
) -> Result<Vec<Vec<u8>>, IdentityError> {
    let mut added = Vec::new();
    for TrustDomain { name, ca, verify } in trust_domains {
        let pem = read(ca)?;
        let mut bundle = bundle_of(ca, &pem)?;
        bundle.verify.clone_from(verify);
        bundles.domains.insert(name.clone(), bundle);
        added.push(pem);
    }
    for path in crls {
        let bytes = read(path)?;
        let found = pem::crls(&bytes).map_err(|e| FilesError::content(path, e))?;
        bundles.crls.extend(found);
        added.push(bytes);
    }
    Ok(added)
}

impl IdentityProvider for Configured {
    fn fetch(&self) -> Result<Material, IdentityError> {
        let mut material = self.provider.fetch()?;
        let added = add(&mut material.bundles, &self.trust_domains, &self.crls)?;
        material.fingerprint = fingerprint((material.fingerprint, added));
        Ok(material)
    }

    fn subscribe(&self, changed: Box<dyn FnMut() + Send>) -> io::Result<Subscription> {
        let paths: Vec<_> =
            self.trust_domains.iter().map(|d| &*d.ca).chain(self.crls.iter().map(|p| &**p)).collect();
        if paths.is_empty() {
            return self.provider.subscribe(changed);
        }
        // Either may call at any time; one call at a time is enough, because it fetches everything.
        let changed = Arc::new(Mutex::new(changed));
        let call = |changed: Arc<Mutex<Box<dyn FnMut() + Send>>>| {
            move || {
                (changed.lock().unwrap_or_else(PoisonError::into_inner))();
            }
        };
        let provider = self.provider.subscribe(Box::new(call(Arc::clone(&changed))))?;
        let files = files::watch(paths, "trust-watch", call(changed))?;
        Ok(Subscription::new((provider, files)))
    }
}
