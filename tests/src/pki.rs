//! A throwaway CA and what it signs, made by `tunnel pki`; and certificates that `tunnel pki` would not make.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};

use crate::{process, programs};

/// Who gateways are.
pub const GATEWAY_ID: &str = "spiffe://test.tunnel/gateway";
/// Who nodes are.
pub const NODE_ID: &str = "spiffe://test.tunnel/node";

/// A directory with a CA.
#[derive(Clone, Debug)]
pub struct Pki {
    folder: PathBuf,
}

/// A certificate, its key, and the CA that its owner believes.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The certificate, PEM.
    pub cert: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Whom its owner believes, PEM.
    pub ca: PathBuf,
}

impl Pki {
    /// Makes a CA in `folder`.
    pub fn new(folder: &Path) -> Result<Self> {
        process::output(Command::new(programs::tunnel()?).args(["pki", "init"]).arg(folder))?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// The CA's certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Has `tunnel pki issue` sign a certificate; `flags` are more of its flags, such as `--dns NAME`.
    pub fn issue(&self, name: &str, id: &str, flags: &[&str]) -> Result<Credentials> {
        let mut command = Command::new(programs::tunnel()?);
        command.args(["pki", "issue", "--id", id, "--name", name, "--dir"]).arg(&self.folder).args(flags);
        process::output(&mut command)?;
        Ok(self.named(name))
    }

    /// A certificate that this CA signed and that was valid until an hour ago.
    pub fn issue_expired(&self, name: &str, id: &str) -> Result<Credentials> {
        const HOUR: Duration = Duration::from_secs(60 * 60);
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.not_before = (now - 48 * HOUR).into();
        params.not_after = (now - HOUR).into();
        let ca_key = KeyPair::from_pem(&fs::read_to_string(self.folder.join("ca-key.pem"))?)?;
        let issuer = Issuer::from_ca_cert_pem(&fs::read_to_string(self.ca())?, ca_key)?;
        let key = KeyPair::generate()?;
        let made = self.named(name);
        fs::write(&made.cert, params.signed_by(&key, &issuer)?.pem())?;
        fs::write(&made.key, key.serialize_pem())?;
        Ok(made)
    }

    /// The files of a certificate that was issued as `name`.
    pub fn named(&self, name: &str) -> Credentials {
        let file = |kind: &str| self.folder.join(format!("{name}{kind}.pem"));
        Credentials { cert: file(""), key: file("-key"), ca: self.ca() }
    }
}

impl Credentials {
    /// As flags of `tunnel exec` and `tunnel gateway`.
    pub fn flags(&self) -> [PathBuf; 6] {
        ["--ca".into(), self.ca.clone(), "--cert".into(), self.cert.clone(), "--key".into(), self.key.clone()]
    }

    /// As the table of a configuration file.
    pub fn toml(&self) -> String {
        let (cert, key, ca) = (self.cert.display(), self.key.display(), self.ca.display());
        format!("[identity]\ncert = \"{cert}\"\nkey = \"{key}\"\nca = \"{ca}\"\n")
    }

    /// The same certificate, of an owner who believes another CA.
    pub fn believing(&self, ca: &Path) -> Self {
        Self { ca: ca.to_owned(), ..self.clone() }
    }
}
