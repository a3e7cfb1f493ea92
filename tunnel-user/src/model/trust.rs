//! Who we are, by which files, and which peers are taken.

use std::path::PathBuf;

use rustls_pki_types::ServerName;

use super::{flow::Target, san::SanPattern};

/// Where a certificate, its key and the CA stand.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdentityFiles {
    /// The certificate, PEM; the leaf first, intermediates after it.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The CA certificates that peers are verified against, PEM.
    pub ca: PathBuf,
    /// Whether the key's file may be readable by others.
    pub insecure_key_permissions: bool,
}

/// What the certificate of a server that we connect to must say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServerCheck {
    /// The name to send as SNI, and to verify when `san` is empty. `None`: the dialled name or address.
    pub name: Option<ServerName<'static>>,
    /// One of the certificate's names must match one of these. Empty: the certificate must be valid for
    /// [`ServerCheck::server_name`].
    pub san: Vec<SanPattern>,
}

impl ServerCheck {
    /// The name to give to rustls when connecting to `endpoint`.
    pub fn server_name(&self, endpoint: &Target) -> ServerName<'static> {
        if let Some(name) = &self.name {
            return name.clone();
        }
        match endpoint {
            Target::Addr(a) => ServerName::IpAddress(a.ip().into()),
            // What `Target` takes for a name, rustls takes for one. If it ever did not: this address is
            // reserved for documentation (RFC 6666), no certificate is valid for it, the check fails.
            Target::Name(name, _) => ServerName::try_from(name.clone())
                .unwrap_or(ServerName::IpAddress(std::net::Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0).into())),
        }
    }
}

/// What the certificate of a client that connects to us must say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClientCheck {
    /// One of the certificate's names must match one of these. Empty: any name that our CA vouches for,
    /// but there must be one.
    pub san: Vec<SanPattern>,
}
