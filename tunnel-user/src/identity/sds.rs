//! Envoy's secret discovery service (SDS, `envoy.service.secret.v3`): two streams on one connection, one for the secret with
//! certificate and key, one for the validation context with the CA certificates, as Envoy itself asks for them.
//!
//! # Invariants
//! - A certificate is used only together with a validation context, and each answer is taken whole or rejected with its reason
//!   (NACK).

use std::{collections::BTreeMap, path::Path, sync::Arc};

use prost::Message;
use rustls::sign::CertifiedKey;
use zeroize::Zeroizing;

use super::{
    files::bundle_of,
    grpc::{Call, Channel, GrpcError, NOT_FOUND, PERMISSION_DENIED},
    pem,
    provider::{Material, TrustBundles, fingerprint},
    pushed::{Broken, Sink, Source},
    workload_api::certified,
};
use crate::config::ProviderAddr;

/// The method.
const STREAM: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
/// The type of the resources.
const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// The type of a validator with a bundle for each trust domain.
const SPIFFE: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";
/// The longest file that a server may name in place of its contents.
const FILE_MAX: u64 = 4 << 20;
/// `INVALID_ARGUMENT`, for what is rejected.
const INVALID_ARGUMENT: i32 = 3;

#[derive(Clone, PartialEq, Message)]
struct DiscoveryRequest {
    #[prost(string, tag = "1")]
    version_info: String,
    #[prost(message, optional, tag = "2")]
    node: Option<Node>,
    #[prost(string, repeated, tag = "3")]
    resource_names: Vec<String>,
    #[prost(string, tag = "4")]
    type_url: String,
    #[prost(string, tag = "5")]
    response_nonce: String,
    #[prost(message, optional, tag = "6")]
    error_detail: Option<Status>,
}

#[derive(Clone, PartialEq, Message)]
struct Node {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    cluster: String,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct DiscoveryResponse {
    #[prost(string, tag = "1")]
    version_info: String,
    #[prost(message, repeated, tag = "2")]
    resources: Vec<Any>,
    #[prost(string, tag = "5")]
    nonce: String,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Secret {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    tls_certificate: Option<TlsCertificate>,
    #[prost(message, optional, tag = "4")]
    validation_context: Option<ValidationContext>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct TlsCertificate {
    #[prost(message, optional, tag = "1")]
    certificate_chain: Option<DataSource>,
    #[prost(message, optional, tag = "2")]
    private_key: Option<DataSource>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct ValidationContext {
    #[prost(message, optional, tag = "1")]
    trusted_ca: Option<DataSource>,
    #[prost(message, optional, tag = "7")]
    crl: Option<DataSource>,
    #[prost(message, optional, tag = "12")]
    custom_validator_config: Option<Extension>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Extension {
    #[prost(message, optional, tag = "2")]
    typed_config: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct SpiffeValidator {
    #[prost(message, repeated, tag = "1")]
    trust_domains: Vec<SpiffeDomain>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct SpiffeDomain {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    trust_bundle: Option<DataSource>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct DataSource {
    #[prost(oneof = "Specifier", tags = "1, 2, 3")]
    specifier: Option<Specifier>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
#[prost(skip_debug)]
enum Specifier {
    #[prost(string, tag = "1")]
    Filename(String),
    #[prost(bytes, tag = "2")]
    InlineBytes(Vec<u8>),
    #[prost(string, tag = "3")]
    InlineString(String),
}

impl DataSource {
    fn bytes(self, files: Files) -> Result<Vec<u8>, String> {
        match self.specifier {
            Some(Specifier::InlineBytes(bytes)) => Ok(bytes),
            Some(Specifier::InlineString(text)) => Ok(text.into_bytes()),
            Some(Specifier::Filename(name)) if files == Files::Read => read(Path::new(&name)),
            Some(Specifier::Filename(_)) => Err("it names a file".to_owned()),
            None => Err("it is empty, or of a kind that is not supported".to_owned()),
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let length = path.metadata().map_err(failed)?.len();
    if length > FILE_MAX {
        return Err(format!("{}: {length} bytes are more than {FILE_MAX}", path.display()));
    }
    std::fs::read(path).map_err(failed)
}

/// Whether files that an answer names are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    Read,
    Reject,
}

/// What a secret is.
enum Content {
    Certificate(Arc<CertifiedKey>, u64),
    Context(TrustBundles, u64),
}

/// An SDS server.
pub(super) struct Sds {
    pub(super) endpoint: ProviderAddr,
    pub(super) secret: String,
    pub(super) validation_context: String,
}

impl Source for Sds {
    async fn listen(&self, sink: &Sink) -> Broken {
        match self.follow(sink).await {
            Ok(never) => match never {},
            Err(e @ GrpcError::Status { code: PERMISSION_DENIED | NOT_FOUND, .. }) => {
                Broken::Withdrawn(e.to_string())
            }
            Err(e) => Broken::Lost(e.to_string()),
        }
    }
}

impl Sds {
    async fn follow(&self, sink: &Sink) -> Result<std::convert::Infallible, GrpcError> {
        let channel = Channel::connect(&self.endpoint).await?;
        let mut certificate = Subscription::start(&channel, &self.secret).await?;
        let mut context = Subscription::start(&channel, &self.validation_context).await?;
        let (mut own, mut trusted) = (None, None);
        loop {
            tokio::select! {
                next = certificate.next() => match next? {
                    Some(Content::Certificate(key, of)) => {
                        certificate.accept()?;
                        own = Some((key, of));
                    }
                    Some(Content::Context(..)) => {
                        certificate.reject("it is a validation context, where a certificate is wanted")?;
                    }
                    None => {}
                },
                next = context.next() => match next? {
                    Some(Content::Context(bundles, of)) => {
                        context.accept()?;
                        trusted = Some((bundles, of));
                    }
                    Some(Content::Certificate(..)) => {
                        context.reject("it is a certificate, where a validation context is wanted")?;
                    }
                    None => {}
                },
            }
            if let (Some((key, one)), Some((bundles, other))) = (&own, &trusted) {
                sink.put(Material {
                    certificate: Arc::clone(key),
                    bundles: bundles.clone(),
                    origin: format!("secret \"{}\" of {}", self.secret, self.endpoint),
                    fingerprint: fingerprint((one, other)),
                });
            }
        }
    }
}

/// The stream of one secret.
struct Subscription {
    name: String,
    call: Call,
    /// The version that is in use, and the answer that is to be acknowledged.
    version: String,
    latest: (String, String),
}

impl Subscription {
    async fn start(channel: &Channel, name: &str) -> Result<Self, GrpcError> {
        let call = channel.call(STREAM, &[]).await?;
        let mut this = Self {
            name: name.to_owned(),
            call,
            version: String::new(),
            latest: (String::new(), String::new()),
        };
        this.request(None)?;
        Ok(this)
    }

    fn request(&mut self, error_detail: Option<Status>) -> Result<(), GrpcError> {
        let node = Node { id: "tunnel".to_owned(), cluster: "tunnel".to_owned() };
        let request = DiscoveryRequest {
            version_info: self.version.clone(),
            node: Some(node),
            resource_names: vec![self.name.clone()],
            type_url: SECRET.to_owned(),
            response_nonce: self.latest.1.clone(),
            error_detail,
        };
        self.call.send(&request, false)
    }

    /// The next answer, if it is a good one; another is rejected here. Dropped before it is ready, nothing is lost.
    async fn next(&mut self) -> Result<Option<Content>, GrpcError> {
        let response: DiscoveryResponse = self.call.next().await?;
        self.latest = (response.version_info.clone(), response.nonce.clone());
        match content(response, &self.name, Files::Read) {
            Ok(Some(content)) => Ok(Some(content)),
            // Of other secrets only: this one is as it was.
            Ok(None) => self.accept().map(|()| None),
            Err(why) => self.reject(&why).map(|()| None),
        }
    }

    fn accept(&mut self) -> Result<(), GrpcError> {
        self.version.clone_from(&self.latest.0);
        self.request(None)
    }

    fn reject(&mut self, why: &str) -> Result<(), GrpcError> {
        tracing::error!(secret = self.name, reason = why, "rejected a secret");
        let message = format!("{}: {why}", self.name);
        self.request(Some(Status { code: INVALID_ARGUMENT, message }))
    }
}

/// Reads an answer of an SDS server that holds the secret `"a"`, as the program does; but no file that it names.
///
/// # Errors
/// What is wrong with it, in a sentence.
pub fn read_answer(bytes: &[u8]) -> Result<(), String> {
    let response = DiscoveryResponse::decode(bytes).map_err(|e| e.to_string())?;
    content(response, "a", Files::Reject).map(drop)
}

fn content(response: DiscoveryResponse, name: &str, files: Files) -> Result<Option<Content>, String> {
    for resource in response.resources {
        if resource.type_url != SECRET {
            return Err(format!("it is of type \"{}\"", resource.type_url.escape_debug()));
        }
        let secret = Secret::decode(&*resource.value).map_err(|e| format!("it cannot be decoded: {e}"))?;
        if secret.name != name {
            continue;
        }
        return match (secret.tls_certificate, secret.validation_context) {
            (Some(certificate), _) => self::certificate(certificate, files).map(Some),
            (None, Some(context)) => self::context(context, name, files).map(Some),
            (None, None) => Err("it is neither a certificate nor a validation context".to_owned()),
        };
    }
    Ok(None)
}

fn certificate(from: TlsCertificate, files: Files) -> Result<Content, String> {
    let part = |source: Option<DataSource>, what: &str| {
        let source = source.ok_or_else(|| format!("it has no {what}"))?;
        source.bytes(files).map_err(|e| format!("its {what}: {e}"))
    };
    let chain = part(from.certificate_chain, "certificate_chain")?;
    let key = Zeroizing::new(part(from.private_key, "private_key")?);
    let of = fingerprint((&chain, &*key));
    let chain = pem::certificates(&chain).map_err(|e| format!("its certificate_chain: {}", e.what))?;
    let key = pem::key(&key).map_err(|e| format!("its private_key: {}", e.what))?;
    let certified = certified(chain.into_iter().map(|placed| placed.der).collect(), key)?;
    Ok(Content::Certificate(Arc::new(certified), of))
}

fn context(from: ValidationContext, name: &str, files: Files) -> Result<Content, String> {
    let mut parts = Vec::new();
    let mut bundle = |source: DataSource, what: &str| {
        let pem = source.bytes(files).map_err(|e| format!("its {what}: {e}"))?;
        let bundle = bundle_of(Path::new(what), &pem).map_err(|e| e.to_string());
        parts.push(pem);
        bundle
    };
    let general = from.trusted_ca.map(|source| bundle(source, "trusted_ca")).transpose()?;
    let mut domains = BTreeMap::new();
    if let Some(typed) = from.custom_validator_config.and_then(|config| config.typed_config) {
        if typed.type_url != SPIFFE {
            return Err(format!("its validator \"{}\" is not supported", typed.type_url.escape_debug()));
        }
        let config = SpiffeValidator::decode(&*typed.value)
            .map_err(|e| format!("its validator cannot be decoded: {e}"))?;
        for domain in config.trust_domains {
            let source = domain
                .trust_bundle
                .ok_or_else(|| format!("\"{}\" has no bundle", domain.name.escape_debug()))?;
            domains.insert(domain.name, bundle(source, "trust_bundle")?);
        }
    }
    if general.is_none() && domains.is_empty() {
        return Err(format!("\"{name}\" has no trusted_ca"));
    }
    let crl = from.crl.map(|source| source.bytes(files).map_err(|e| format!("its crl: {e}"))).transpose()?;
    let crls = match &crl {
        Some(crl) => pem::crls(crl).map_err(|e| format!("its crl: {}", e.what))?,
        None => Vec::new(),
    };
    let of = fingerprint((parts, domains.keys().collect::<Vec<_>>(), crl));
    Ok(Content::Context(TrustBundles { general, domains, crls }, of))
}
