//! A throwaway CA and what it signs, made by `tunnel pki`; and certificates that `tunnel pki` would not make.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};

use crate::{process, programs};

const HOUR: Duration = Duration::from_secs(60 * 60);

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

    /// The one whose CA has signed these.
    pub fn of(credentials: &Credentials) -> Self {
        Self { folder: credentials.cert.parent().unwrap_or(Path::new("")).to_owned() }
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
        self.issue_until(name, id, SystemTime::now() - HOUR)
    }

    /// A certificate that this CA signed and that is valid until then.
    pub fn issue_until(&self, name: &str, id: &str, end: SystemTime) -> Result<Credentials> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.not_before = (end - 48 * HOUR).into();
        params.not_after = end.into();
        self.sign(name, &params)
    }

    fn sign(&self, name: &str, params: &CertificateParams) -> Result<Credentials> {
        let ca_key = KeyPair::from_pem(&fs::read_to_string(self.folder.join("ca-key.pem"))?)?;
        let issuer = Issuer::from_ca_cert_pem(&fs::read_to_string(self.ca())?, ca_key)?;
        let key = KeyPair::generate()?;
        let made = self.named(name);
        fs::write(&made.cert, params.signed_by(&key, &issuer)?.pem())?;
        fs::write(&made.key, key.serialize_pem())?;
        fs::set_permissions(&made.key, fs::Permissions::from_mode(0o600))?;
        Ok(made)
    }

    /// A certificate that this CA signed for several URI names.
    pub fn issue_with_names(&self, name: &str, ids: &[&str]) -> Result<Credentials> {
        let mut params = CertificateParams::default();
        let uri = |id: &&str| Ok(SanType::URI((*id).try_into()?));
        params.subject_alt_names = ids.iter().map(uri).collect::<Result<_>>()?;
        params.not_before = (SystemTime::now() - HOUR).into();
        params.not_after = (SystemTime::now() + HOUR).into();
        self.sign(name, &params)
    }

    /// A certificate of a CA below this one which has these name constraints, as openssl's x509v3_config writes them.
    pub fn issue_constrained(&self, name: &str, id: &str, constraints: &str) -> Result<Credentials> {
        let script = format!(
            "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout c.key -subj /CN=constrained -out c.csr
             printf 'basicConstraints=critical,CA:true\nkeyUsage=keyCertSign\nnameConstraints={constraints}\n' > c.ext
             openssl x509 -req -in c.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile c.ext -out c.pem
             openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}-key.pem -subj / -out l.csr
             printf 'subjectAltName=critical,{id}\nextendedKeyUsage=serverAuth,clientAuth\n' > l.ext
             openssl x509 -req -in l.csr -CA c.pem -CAkey c.key -CAcreateserial -days 1 -extfile l.ext -out l.pem
             cat l.pem c.pem > {name}.pem"
        );
        let mut command = Command::new(programs::system("sh")?);
        process::output(command.args(["-euc", &script]).current_dir(&self.folder))?;
        Ok(self.named(name))
    }

    /// A certificate with the subject "subject", of a CA below this one with the name constraints "constraints".
    pub fn issue_by(&self, name: &str, with: &[(&str, &str)], id: &str) -> Result<Credentials> {
        let part = |key: &str| with.iter().find(|(k, _)| *k == key).map_or("", |(_, value)| *value);
        let made = self.issue_constrained(name, id, part("constraints"))?;
        let script = format!(
            "openssl req -new -key {name}-key.pem -subj {} -out l.csr
             openssl x509 -req -in l.csr -CA c.pem -CAkey c.key -CAcreateserial -days 1 -extfile l.ext -out l.pem
             cat l.pem c.pem > {name}.pem",
            part("subject")
        );
        let mut command = Command::new(programs::system("sh")?);
        process::output(command.args(["-euc", &script]).current_dir(&self.folder))?;
        Ok(made)
    }

    /// Runs a script of commands in a folder of its own; that folder.
    pub fn run(&self, name: &str, script: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir(&folder)?;
        let mut command = Command::new(programs::system("sh")?);
        process::output(command.args(["-euc", script]).current_dir(&folder))?;
        Ok(folder)
    }

    /// A revocation list of this CA with these certificates, PEM.
    pub fn crl(&self, revoked: &[&Credentials]) -> Result<String> {
        use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
        let serial = |of: &&Credentials| -> Result<RevokedCertParams> {
            let mut command = Command::new(programs::system("openssl")?);
            command.args(["x509", "-noout", "-serial", "-in"]).arg(&of.cert);
            let text = process::output(&mut command)?;
            let hex = text.trim().trim_start_matches("serial=").to_owned();
            let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16);
            let bytes: Vec<u8> = (0..hex.len() / 2).map(byte).collect::<Result<_, _>>()?;
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from(bytes),
                revocation_time: (SystemTime::now() - HOUR).into(),
                reason_code: None,
                invalidity_date: None,
            })
        };
        let params = CertificateRevocationListParams {
            this_update: (SystemTime::now() - HOUR).into(),
            next_update: (SystemTime::now() + HOUR).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(serial).collect::<Result<_>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let ca_key = KeyPair::from_pem(&fs::read_to_string(self.folder.join("ca-key.pem"))?)?;
        let issuer = Issuer::from_ca_cert_pem(&fs::read_to_string(self.ca())?, ca_key)?;
        Ok(params.signed_by(&issuer)?.pem()?)
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
