//! The X.509 half of the SPIFFE Workload API: one stream, on which a server sends this process's identity and the bundles of
//! its own and of other trust domains, again whenever one of them changes (SPIFFE Workload API, section 5).
//!
//! # Invariants
//! - An answer is taken whole or not at all.
//! - The roots of a trust domain are used for its members only.

use std::{collections::HashMap, sync::Arc};

use prost::Message;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{
    grpc::{Channel, GrpcError, PERMISSION_DENIED},
    provider::{Material, TrustBundle, TrustBundles, fingerprint},
    pushed::{Broken, Sink, Source},
    svid,
    tls::signing_key,
};
use crate::config::ProviderAddr;

/// The method (SPIFFE Workload API, section 5.1).
const FETCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
/// What every request has to carry, so that nobody is made to send one (SPIFFE Workload Endpoint, section 6.1).
const METADATA: [(&str, &str); 1] = [("workload.spiffe.io", "true")];
/// Certificates in one chain, or one bundle, that are taken.
const CERTIFICATES_MAX: usize = 1024;
/// Trust domains that are taken.
const DOMAINS_MAX: usize = 1024;

#[derive(Clone, PartialEq, Message)]
struct X509SvidRequest {}

/// What a server sends.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct X509SvidResponse {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<X509Svid>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    crl: Vec<Vec<u8>>,
    #[prost(map = "string, bytes", tag = "3")]
    federated_bundles: HashMap<String, Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct X509Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    x509_svid: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    x509_svid_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    bundle: Vec<u8>,
}

/// The Workload API of one agent.
pub(super) struct WorkloadApi {
    pub(super) endpoint: ProviderAddr,
    /// Which of several identities; `None`: the first.
    pub(super) spiffe_id: Option<String>,
}

impl Source for WorkloadApi {
    async fn listen(&self, sink: &Sink) -> Broken {
        let ended: Result<std::convert::Infallible, GrpcError> = async {
            let channel = Channel::connect(&self.endpoint).await?;
            let mut call = channel.call(FETCH, &METADATA).await?;
            call.send(&X509SvidRequest {}, true)?;
            loop {
                let answer: X509SvidResponse = call.next().await?;
                if answer.svids.is_empty() {
                    let detail = "the answer holds no identity".to_owned();
                    return Err(GrpcError::Status { code: PERMISSION_DENIED, detail });
                }
                match material(&answer, self.spiffe_id.as_deref(), &self.endpoint.to_string()) {
                    Ok(material) => sink.put(material),
                    // The next one may be better, and the one before is valid still.
                    Err(why) => {
                        tracing::error!(provider = %self.endpoint, reason = why, "rejected an identity");
                    }
                }
            }
        }
        .await;
        match ended {
            Ok(never) => match never {},
            Err(e @ GrpcError::Status { code: PERMISSION_DENIED, .. }) => Broken::Withdrawn(e.to_string()),
            Err(e) => Broken::Lost(e.to_string()),
        }
    }
}

/// Reads an answer of a Workload API, as the program does.
///
/// # Errors
/// What is wrong with it, in a sentence.
pub fn read_answer(bytes: &[u8]) -> Result<Material, String> {
    let answer = X509SvidResponse::decode(bytes).map_err(|e| e.to_string())?;
    material(&answer, None, "a Workload API")
}

fn material(answer: &X509SvidResponse, wanted: Option<&str>, origin: &str) -> Result<Material, String> {
    let of_wanted = |svid: &&X509Svid| wanted.is_none_or(|id| svid.spiffe_id == id);
    let Some(own) = answer.svids.iter().find(of_wanted) else {
        let ids: Vec<_> = answer.svids.iter().map(|svid| svid.spiffe_id.escape_debug().to_string()).collect();
        return Err(format!(
            "none of its identities is \"{}\": {}",
            wanted.unwrap_or_default(),
            ids.join(", ")
        ));
    };
    let chain = certificates(&own.x509_svid).map_err(|e| format!("its certificates: {e}"))?;
    let domain = chain.first().map(svid::trust_domain).transpose()?.flatten();
    let domain = domain.ok_or("its certificate is no SVID: it has no SPIFFE ID")?;
    let mut domains = std::collections::BTreeMap::new();
    domains.insert(domain.to_string(), bundle(&own.bundle).map_err(|e| format!("its bundle: {e}"))?);
    if answer.federated_bundles.len() > DOMAINS_MAX {
        return Err(format!("it has bundles of more than {DOMAINS_MAX} trust domains"));
    }
    for (name, roots) in &answer.federated_bundles {
        let name = name.strip_prefix("spiffe://").unwrap_or(name);
        let bundle = bundle(roots).map_err(|e| format!("the bundle of \"{}\": {e}", name.escape_debug()))?;
        domains.entry(name.to_owned()).or_insert(bundle);
    }
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.x509_svid_key.clone()));
    let crls: Vec<_> = answer.crl.iter().map(|crl| crl.clone().into()).collect();
    let mut sorted: Vec<_> = answer.federated_bundles.iter().collect();
    sorted.sort();
    Ok(Material {
        certificate: Arc::new(certified(chain, key)?),
        bundles: TrustBundles { general: None, domains, crls },
        origin: format!("{} of {origin}", own.spiffe_id),
        fingerprint: fingerprint((&own.x509_svid, &own.x509_svid_key, &own.bundle, sorted, &answer.crl)),
    })
}

/// A key with its certificates, where it is theirs.
pub(super) fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, String> {
    let problem = super::pem::unsupported(&key);
    let key = signing_key(key).map_err(|_says_less| problem.what)?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(certified),
        Err(e) => Err(format!("the key is not that of the certificate: {e}")),
    }
}

/// Certificates that stand one after the other, in DER.
fn certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut found = Vec::new();
    while !der.is_empty() {
        if found.len() == CERTIFICATES_MAX {
            return Err(format!("there are more than {CERTIFICATES_MAX}"));
        }
        let (rest, _) = X509Certificate::from_der(der)
            .map_err(|_| format!("certificate {} cannot be read", found.len() + 1))?;
        found.push(CertificateDer::from(der[..der.len() - rest.len()].to_vec()));
        der = rest;
    }
    if found.is_empty() { Err("there is none".to_owned()) } else { Ok(found) }
}

/// The roots of a trust domain. One that cannot be used is left out, where there are others.
fn bundle(der: &[u8]) -> Result<TrustBundle, String> {
    let (mut bundle, mut wrong) = (TrustBundle::default(), None);
    for root in certificates(der)? {
        if let Err(e) = bundle.add(root) {
            tracing::warn!(reason = %e, "left out a CA certificate: it is not trusted");
            wrong = Some(e.to_string());
        }
    }
    if bundle.is_empty() { Err(wrong.unwrap_or_default()) } else { Ok(bundle) }
}
