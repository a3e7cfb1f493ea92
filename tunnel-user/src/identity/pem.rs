//! Certificates and keys as files hold them, and what is wrong with a file that does not hold what it should, with how to
//! convert it.
//!
//! # Invariants
//! - What stands beside the wanted sections (text, other sections, CRLF, a byte order mark) changes nothing.
//! - No password is asked for.

use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem, pem::PemObject as _,
};
use x509_parser::{
    asn1_rs::{Any, FromDer as _, Integer, Oid, Sequence, Tag, ToDer as _},
    oid_registry as oid,
    prelude::X509Certificate,
    revocation_list::CertificateRevocationList,
    x509::AlgorithmIdentifier,
};

/// The byte order mark of UTF-8: editors on Windows put it in front, OpenSSL 3 skips it.
const BOM: &[u8] = b"\xef\xbb\xbf";
/// The first bytes of a line that begins a section (RFC 7468 section 3).
const BEGIN: &[u8] = b"-----BEGIN ";
/// What rustls's provider takes (aws-lc-rs: RSA keys of 2048 to 8192 bits).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// What is wrong with a file, and what helps. In `remedy`, `{file}` is the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// What was found.
    pub(super) what: String,
    /// What to do, with the command for it.
    pub(super) remedy: String,
}

impl Problem {
    fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: remedy.into() }
    }
}

/// What a file should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Certificates,
    Key,
}

impl Wanted {
    fn noun(self) -> &'static str {
        match self {
            Self::Certificates => "certificate",
            Self::Key => "private key",
        }
    }

    fn takes(self, label: &str) -> bool {
        match self {
            Self::Certificates => label == "CERTIFICATE",
            Self::Key => matches!(label, "PRIVATE KEY" | "RSA PRIVATE KEY" | "EC PRIVATE KEY"),
        }
    }
}

/// One section of a PEM file.
struct Section<'a> {
    label: &'a str,
    /// Where it begins, counted from 1.
    line: usize,
    /// From its first line to its last.
    text: &'a [u8],
}

/// A certificate, and where in its file it stands.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    /// The certificate.
    pub(super) der: CertificateDer<'static>,
    /// The number among the file's certificates and the line, for errors.
    pub(super) place: String,
}

impl Placed {
    /// Its number, its line, and its subject if that can be read.
    pub(super) fn describe(&self) -> String {
        match subject(&self.der) {
            Some(name) => format!("{}, {name}", self.place),
            None => self.place.clone(),
        }
    }
}

/// A certificate's subject, as one line.
pub(super) fn subject(der: &[u8]) -> Option<String> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    Some(cert.subject().to_string()).filter(|name| !name.is_empty())
}

/// What is wrong with a certificate whose curve is written out in place of its name (RFC 5480 section 2.1.1 forbids it):
/// no key has the same public key then, since a key is read with the curve's name.
pub(super) fn explicit_curve(placed: &Placed) -> Option<Problem> {
    let (_, cert) = X509Certificate::from_der(&placed.der).ok()?;
    let algorithm = &cert.public_key().algorithm;
    let explicit = algorithm.algorithm == oid::OID_KEY_TYPE_EC_PUBLIC_KEY
        && algorithm.parameters.as_ref().is_some_and(|parameters| parameters.tag() == Tag::Sequence);
    explicit.then(|| {
        Problem::new(
            format!(
                "{} has a curve that is written out (explicit parameters) in place of its name",
                placed.place
            ),
            UNSUPPORTED,
        )
    })
}

/// All certificates of a file, at least one, in its order.
pub(super) fn certificates(bytes: &[u8]) -> Result<Vec<Placed>, Problem> {
    each_certificate(bytes)?.into_iter().collect()
}

/// The same, each with what is wrong with it.
pub(super) fn each_certificate(bytes: &[u8]) -> Result<Vec<Result<Placed, Problem>>, Problem> {
    let sections = sections(bytes, Wanted::Certificates)?;
    let wanted = sections.iter().filter(|section| Wanted::Certificates.takes(section.label));
    Ok(wanted.zip(1..).map(|(section, number)| certificate(section, number)).collect())
}

fn certificate(section: &Section<'_>, number: usize) -> Result<Placed, Problem> {
    let place = format!("certificate {number} (line {})", section.line);
    let der = CertificateDer::from_pem_slice(section.text).map_err(|e| {
        Problem::new(format!("{place} cannot be decoded: {}", why(&e)), "copy the file again, or remove it")
    })?;
    match X509Certificate::from_der(&der) {
        Ok(_) => Ok(Placed { der, place }),
        Err(_) => Err(Problem::new(
            format!("{place} is not an X.509 certificate"),
            "look at it with: openssl x509 -in {file} -noout -text; replace or remove it",
        )),
    }
}

/// The certificate revocation lists of a file, in PEM or DER.
pub(super) fn crls(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, Problem> {
    let found: Vec<_> = if bytes.windows(BEGIN.len()).any(|window| window == BEGIN) {
        CertificateRevocationListDer::pem_slice_iter(bytes).collect::<Result<_, _>>().map_err(|e| {
            Problem::new(
                format!("a revocation list in it cannot be decoded: {}", why(&e)),
                "copy the file again",
            )
        })?
    } else {
        vec![bytes.to_vec().into()]
    };
    let remedy = "look at it with: openssl crl -in {file} -noout -text";
    if found.is_empty() {
        return Err(Problem::new("there is no revocation list (X509 CRL) in it", remedy));
    }
    match found.iter().position(|crl| CertificateRevocationList::from_der(crl).is_err()) {
        None => Ok(found),
        Some(at) => Err(Problem::new(format!("revocation list {} in it cannot be read", at + 1), remedy)),
    }
}

/// The first private key of a file.
pub(super) fn key(bytes: &[u8]) -> Result<PrivateKeyDer<'static>, Problem> {
    let sections = sections(bytes, Wanted::Key)?;
    let section = sections.iter().find(|section| Wanted::Key.takes(section.label));
    let Some(section) = section else { return Err(instead(&sections, Wanted::Key)) };
    if section.text.windows(PROC_TYPE.len()).any(|text| text == PROC_TYPE) {
        return Err(encrypted());
    }
    PrivateKeyDer::from_pem_slice(section.text).map_err(|e| {
        let line = section.line;
        Problem::new(
            format!("the private key in line {line} cannot be decoded: {}", why(&e)),
            "copy the file again",
        )
    })
}

/// What OpenSSL's own format says of an encrypted key (RFC 1421 section 4.6.1.1).
const PROC_TYPE: &[u8] = b"4,ENCRYPTED";

fn encrypted() -> Problem {
    Problem::new(
        "the private key is encrypted with a passphrase, and nobody is there to type it",
        "decrypt it into a file that only the daemon's user may read: openssl pkey -in {file} -out KEY.pem",
    )
}

fn why(e: &pem::Error) -> String {
    match e {
        pem::Error::Base64Decode(_) => "its base64 is damaged".to_owned(),
        other => other.to_string(),
    }
}

/// The sections of a file, of which one is wanted.
fn sections(bytes: &[u8], wanted: Wanted) -> Result<Vec<Section<'_>>, Problem> {
    let bytes = bytes.strip_prefix(BOM).unwrap_or(bytes);
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(Problem::new("the file is empty", format!("write a {} in PEM to it", wanted.noun())));
    }
    let mut found = Vec::new();
    // The label, line and first byte of the section that is open.
    let mut open: Option<(&str, usize, usize)> = None;
    let (mut at, mut begun_inside) = (0, None);
    for (text, line) in bytes.split_inclusive(|b| *b == b'\n').zip(1..) {
        let start = at;
        at += text.len();
        if let Some(label) = label(text, BEGIN) {
            if let Some((label, line, _)) = open {
                return Err(cut(label, line));
            }
            open = Some((label, line, start));
        } else if let Some((begun, line, start)) = open
            && label(text, b"-----END ") == Some(begun)
        {
            found.push(Section { label: begun, line, text: &bytes[start..at] });
            open = None;
        } else if begun_inside.is_none() && text.windows(BEGIN.len()).any(|window| window == BEGIN) {
            begun_inside = Some(line);
        }
    }
    if let Some((label, line, _)) = open {
        return Err(cut(label, line));
    }
    if found.iter().any(|section| wanted.takes(section.label)) {
        return Ok(found);
    }
    if found.is_empty() {
        return Err(match begun_inside {
            Some(line) => Problem::new(
                format!(
                    "line {line} has text around \"-----BEGIN …-----\", which has to be a line by itself"
                ),
                "remove the indentation, and write line breaks where \"\\n\" stands",
            ),
            None => not_pem(bytes, wanted),
        });
    }
    Err(instead(&found, wanted))
}

/// The label of a line that begins or ends a section.
fn label<'a>(line: &'a [u8], start: &[u8]) -> Option<&'a str> {
    let label = line.strip_prefix(start)?.trim_ascii_end().strip_suffix(b"-----")?;
    std::str::from_utf8(label).ok()
}

fn cut(label: &str, line: usize) -> Problem {
    Problem::new(
        format!("the section \"{label}\" that begins in line {line} does not end: the file is cut short"),
        "copy the file again",
    )
}

/// A file with sections, and none of them is what is wanted.
fn instead(found: &[Section<'_>], wanted: Wanted) -> Problem {
    let has = |label: &str| found.iter().any(|section| section.label == label);
    let ends = |end: &str| found.iter().find(|section| section.label.ends_with(end));
    let convert = "openssl x509 -in {file} -out CERT.pem";
    if wanted == Wanted::Key {
        if has("ENCRYPTED PRIVATE KEY") {
            return encrypted();
        }
        if has("OPENSSH PRIVATE KEY") {
            return Problem::new(
                "the key in it has OpenSSH's format",
                "convert a copy of it: ssh-keygen -p -m PKCS8 -f COPY",
            );
        }
        if let Some(section) = ends("PRIVATE KEY") {
            return Problem::new(
                format!("the key in it (\"{}\") is of a kind that is not supported", section.label),
                UNSUPPORTED,
            );
        }
        if has("CERTIFICATE") {
            return Problem::new(
                "there is a certificate in it and no private key",
                "name the file of the certificate's key (were both confused?)",
            );
        }
        if ends("PUBLIC KEY").is_some() {
            return Problem::new(
                "there is a public key in it and no private key",
                "name the file of the private key",
            );
        }
    } else {
        if has("TRUSTED CERTIFICATE") || has("X509 CERTIFICATE") {
            return Problem::new(
                "the certificate in it has OpenSSL's own label",
                format!("convert it: {convert}"),
            );
        }
        if ends("PRIVATE KEY").is_some() {
            return Problem::new(
                "there is a private key in it and no certificate",
                "name the file of the certificate (were both confused?)",
            );
        }
        if has("PKCS7") || has("CMS") {
            return Problem::new(
                "the certificates in it are inside a PKCS#7 message",
                "extract them: openssl pkcs7 -print_certs -in {file} -out CERT.pem",
            );
        }
        if ends("PUBLIC KEY").is_some() {
            return Problem::new(
                "there is a public key in it and no certificate",
                "have a CA issue a certificate for it",
            );
        }
    }
    if ends("CERTIFICATE REQUEST").is_some() {
        return Problem::new(
            format!("there is a request for a certificate (CSR) in it and no {}", wanted.noun()),
            match wanted {
                Wanted::Certificates => {
                    "have a CA sign it: openssl x509 -req -in {file} -CA CA.pem -CAkey CA-KEY.pem -copy_extensions copy -out CERT.pem"
                }
                Wanted::Key => "name the file of the key that the request was made with",
            },
        );
    }
    let labels: Vec<_> = found.iter().map(|section| format!("\"{}\"", section.label)).collect();
    Problem::new(
        format!("there is no {} in it, only {}", wanted.noun(), labels.join(", ")),
        format!("name a file with a {} in PEM", wanted.noun()),
    )
}

const UNSUPPORTED: &str = "use a key of RSA (2048 bits or more), ECDSA (P-256, P-384, P-521) or Ed25519, and have it \
                           certified anew: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY.pem";

/// A file without a section.
fn not_pem(bytes: &[u8], wanted: Wanted) -> Problem {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Problem::new(
            "the file is text in UTF-16",
            "convert it: iconv -f UTF-16 -t ASCII {file} -o NEW.pem",
        );
    }
    if X509Certificate::from_der(bytes).is_ok() {
        return match wanted {
            Wanted::Certificates => Problem::new(
                "it is a certificate in DER, where PEM is wanted",
                "convert it: openssl x509 -inform DER -in {file} -out CERT.pem",
            ),
            Wanted::Key => {
                Problem::new("it is a certificate and no private key", "name the file of the private key")
            }
        };
    }
    let convert = Problem::new(
        "it is a private key in DER, where PEM is wanted",
        "convert it: openssl pkey -inform DER -in {file} -out KEY.pem",
    );
    let swapped = Problem::new(
        "it is a private key in DER and no certificate",
        "name the file of the certificate (were both confused?)",
    );
    let key = if wanted == Wanted::Key { convert } else { swapped };
    let mut inside = match Any::from_der(bytes) {
        Ok((_, whole)) if whole.tag() == Tag::Sequence => elements(whole.data).into_iter(),
        _ => {
            let noun = wanted.noun();
            return Problem::new(
                format!("it is not PEM: no line begins with \"-----BEGIN {}-----\"", noun.to_uppercase()),
                format!("name a file with a {noun} in PEM"),
            );
        }
    };
    match (inside.next().as_ref(), inside.next().as_ref()) {
        // RFC 7292 section 4: version 3, then the contents.
        (Some(version), Some(second)) if version.data == [3] && second.tag() == Tag::Sequence => {
            Problem::new(
                "it is a PKCS#12 file (.p12, .pfx), where PEM is wanted",
                match wanted {
                    Wanted::Certificates => {
                        "extract the certificates: openssl pkcs12 -in {file} -nokeys -out CERT.pem"
                    }
                    Wanted::Key => "extract the key: openssl pkcs12 -in {file} -nocerts -noenc -out KEY.pem",
                },
            )
        }
        // RFC 2315 section 7: the type of the contents.
        (Some(kind), _) if kind.tag() == Tag::Oid && wanted == Wanted::Certificates => Problem::new(
            "it is a PKCS#7 message in DER (.p7b), where PEM is wanted",
            "extract the certificates: openssl pkcs7 -inform DER -print_certs -in {file} -out CERT.pem",
        ),
        // RFC 5208 sections 5 and 6, RFC 5915, RFC 8017 appendix A.1.2.
        (Some(version), Some(second))
            if version.tag() == Tag::Integer
                && matches!(second.tag(), Tag::Sequence | Tag::OctetString | Tag::Integer) =>
        {
            key
        }
        (Some(first), Some(second))
            if first.tag() == Tag::Sequence && second.tag() == Tag::OctetString && wanted == Wanted::Key =>
        {
            encrypted()
        }
        _ => {
            Problem::new("it is binary, and not PEM", format!("name a file with a {} in PEM", wanted.noun()))
        }
    }
}

/// What stands one after the other in a sequence, as far as it can be read.
fn elements(mut rest: &[u8]) -> Vec<Any<'_>> {
    let mut found = Vec::new();
    while let Ok((behind, any)) = Any::from_der(rest) {
        found.push(any);
        rest = behind;
    }
    found
}

/// Why a key that could be decoded cannot be used, as far as it says of what kind it is.
pub(super) fn unsupported(key: &PrivateKeyDer<'_>) -> Problem {
    let what = kind_of(key).map_or_else(
        || "the private key in it is damaged, or of a kind that is not supported".to_owned(),
        |kind| format!("the private key in it is {kind}, which is not supported"),
    );
    Problem::new(what, UNSUPPORTED)
}

fn kind_of(key: &PrivateKeyDer<'_>) -> Option<String> {
    let (_, whole) = Sequence::from_der(key.secret_der()).ok()?;
    let inside = elements(&whole.content);
    match key {
        PrivateKeyDer::Pkcs1(_) => rsa(&whole.content),
        PrivateKeyDer::Sec1(_) => {
            let curve = inside.iter().find(|any| any.tag().0 == 0)?;
            curve_name(&Any::from_der(curve.data).ok()?.1)
        }
        PrivateKeyDer::Pkcs8(_) => {
            let [_version, algorithm, key, ..] = &inside[..] else { return None };
            let algorithm = algorithm.to_der_vec().ok()?;
            let (_, algorithm) = AlgorithmIdentifier::from_der(&algorithm).ok()?;
            let id = &algorithm.algorithm;
            if *id == oid::OID_PKCS1_RSAENCRYPTION {
                return rsa(&Sequence::from_der(key.data).ok()?.1.content);
            }
            if *id == oid::OID_KEY_TYPE_EC_PUBLIC_KEY {
                return curve_name(algorithm.parameters.as_ref()?);
            }
            Some(match id.to_id_string().as_str() {
                "1.2.840.113549.1.1.10" => "bound to RSA-PSS".to_owned(),
                "1.3.101.110" | "1.3.101.111" => "for key agreement (X25519 or X448)".to_owned(),
                "1.3.101.113" => "of Ed448".to_owned(),
                "1.2.840.10040.4.1" => "of DSA".to_owned(),
                other => format!("of the algorithm {other}"),
            })
        }
        _ => None,
    }
}

/// RFC 8017 appendix A.1.2: version, modulus, and the rest.
fn rsa(content: &[u8]) -> Option<String> {
    let inside = elements(content);
    let modulus =
        Integer::from_der(&inside.get(1)?.to_der_vec().ok()?).ok().map(|(_, n)| n.as_ref().to_vec())?;
    let zeros = modulus.iter().take_while(|b| **b == 0).count();
    let bits = (modulus.len() - zeros) * 8 - modulus.get(zeros)?.leading_zeros() as usize;
    let why = if RSA_BITS.contains(&bits) { "but damaged" } else { "too short, or too long" };
    Some(format!("of RSA with {bits} bits ({why})"))
}

fn curve_name(parameters: &Any<'_>) -> Option<String> {
    if parameters.tag() == Tag::Sequence {
        return Some("of a curve that is written out (explicit parameters) in place of its name".to_owned());
    }
    let id = Oid::from_der(&parameters.to_der_vec().ok()?).ok()?.1.to_id_string();
    Some(match id.as_str() {
        "1.3.132.0.10" => "of the curve secp256k1".to_owned(),
        "1.3.132.0.33" => "of the curve P-224".to_owned(),
        "1.2.840.10045.3.1.7" | "1.3.132.0.34" | "1.3.132.0.35" => return None,
        other => format!("of the curve {other}"),
    })
}
