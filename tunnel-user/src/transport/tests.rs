//! Real handshakes in memory: what passes, what fails, and what is said.
//!
//! Every refusal is judged from both ends, by the error that each end sees.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use rustls::{
    CipherSuite, ClientConfig, ClientConnection, HandshakeKind, RootCertStore, ServerConfig,
    ServerConnection, version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tempfile::TempDir;

use super::record;
use crate::{
    cli::pki::{Ca, IssueRequest, Issued, Validity},
    config::Protocol,
};
use crate::{
    identity::{
        peer::peer_identity,
        provider::{FilesError, IdentityError, IdentityProvider, Material, Subscription},
        store::{TlsStore, watch},
        tls::{TlsIdentity, Wanted, provider},
        verify::{Check, check_expiry, explain, failed_check},
    },
    model::trust::{ClientCheck, IdentityFiles, ServerCheck},
};

const CLIENT: &str = "spiffe://example.org/ns/a/sa/client";
const SERVER: &str = "spiffe://example.org/gateway";

fn ca() -> Ca {
    Ca::generate(Validity::days(1)).unwrap()
}

fn request(id: &str) -> IssueRequest {
    let mut request = IssueRequest::new(id.parse().unwrap());
    request.dns = vec!["gw.internal".to_owned()];
    request.ip = vec!["10.9.0.1".parse().unwrap()];
    request
}

fn files_in(dir: &Path) -> IdentityFiles {
    let file = |name| dir.join(name);
    IdentityFiles {
        cert: file("cert.pem"),
        key: file("key.pem"),
        ca: file("ca.pem"),
        insecure_key_permissions: false,
    }
}

fn put(dir: &Path, issued: &Issued, ca_pem: &str) -> IdentityFiles {
    let files = files_in(dir);
    fs::write(&files.cert, &issued.cert_pem).unwrap();
    fs::write(&files.key, &issued.key_pem).unwrap();
    fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&files.ca, ca_pem).unwrap();
    files
}

fn identity_of(ca: &Ca, request: &IssueRequest, trusts: &Ca) -> TlsIdentity {
    let dir = tempfile::tempdir().unwrap();
    TlsIdentity::load(&put(dir.path(), &ca.issue(request).unwrap(), trusts.cert_pem())).unwrap()
}

fn servers(san: &[&str]) -> ServerCheck {
    ServerCheck { name: None, san: san.iter().map(|s| s.parse().unwrap()).collect() }
}

fn clients(san: &[&str]) -> ClientCheck {
    ClientCheck { san: san.iter().map(|s| s.parse().unwrap()).collect() }
}

/// A handshake, to its end or its failure.
struct Shaken {
    client: ClientConnection,
    server: ServerConnection,
    client_error: Option<rustls::Error>,
    server_error: Option<rustls::Error>,
}

impl Shaken {
    fn new(client: Arc<ClientConfig>, server: Arc<ServerConfig>, name: &str) -> Self {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut s = Self {
            client: ClientConnection::new(client, name).unwrap(),
            server: ServerConnection::new(server).unwrap(),
            client_error: None,
            server_error: None,
        };
        loop {
            let (mut out, mut back) = (Vec::new(), Vec::new());
            while s.client.wants_write() {
                s.client.write_tls(&mut out).unwrap();
            }
            feed(&mut s.server, &out, &mut s.server_error);
            while s.server.wants_write() {
                s.server.write_tls(&mut back).unwrap();
            }
            feed(&mut s.client, &back, &mut s.client_error);
            if out.is_empty() && back.is_empty() {
                return s;
            }
        }
    }

    fn passed(&self) -> bool {
        self.client_error.is_none() && self.server_error.is_none()
    }

    /// What the server says, and what the client says.
    fn said(&self) -> (String, String) {
        let text = |e: &Option<rustls::Error>| e.as_ref().map(|e| explain(e)).unwrap_or_default();
        (text(&self.server_error), text(&self.client_error))
    }
}

fn feed<D>(to: &mut rustls::ConnectionCommon<D>, mut bytes: &[u8], error: &mut Option<rustls::Error>)
where
    D: rustls::SideData,
{
    while !bytes.is_empty() && error.is_none() {
        to.read_tls(&mut bytes).unwrap();
        *error = to.process_new_packets().err();
    }
}

fn shake(client: &TlsIdentity, wants: &ServerCheck, server: &TlsIdentity, takes: &ClientCheck) -> Shaken {
    Shaken::new(
        client.client_config(wants, Protocol::H2),
        server.server_config(takes, &[Protocol::H2]),
        "10.9.0.1",
    )
}

#[test]
fn both_sides_know_each_other_and_speak_h2_over_tls_1_3() {
    let ca = ca();
    let (client, server) = (identity_of(&ca, &request(CLIENT), &ca), identity_of(&ca, &request(SERVER), &ca));
    for (wants, takes) in [
        (servers(&[]), clients(&[])),
        (servers(&[SERVER]), clients(&["spiffe://example.org/ns/*/sa/client"])),
        (servers(&["spiffe://example.org/other", "gw.internal"]), clients(&["10.9.0.1"])),
    ] {
        let s = shake(&client, &wants, &server, &takes);
        assert!(s.passed(), "{:?}", s.said());
        assert_eq!(peer_identity(s.client.peer_certificates().unwrap()).unwrap().0.as_ref(), SERVER);
        assert_eq!(peer_identity(s.server.peer_certificates().unwrap()).unwrap().0.as_ref(), CLIENT);
        assert_eq!(s.client.alpn_protocol(), Some(&b"h2"[..]));
        assert_eq!(s.server.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    }
}

#[test]
fn our_two_sides_agree_on_aes_128_gcm_and_take_what_a_peer_prefers() {
    let ca = ca();
    let (client, server) = (identity_of(&ca, &request(CLIENT), &ca), identity_of(&ca, &request(SERVER), &ca));
    let suite = |client: Arc<ClientConfig>| {
        let s = Shaken::new(client, server.server_config(&clients(&[]), &[Protocol::H2]), "10.9.0.1");
        assert!(s.passed(), "{:?}", s.said());
        s.server.negotiated_cipher_suite().unwrap().suite()
    };
    let ours = client.client_config(&servers(&[]), Protocol::H2);
    assert_eq!(suite(Arc::clone(&ours)), CipherSuite::TLS13_AES_128_GCM_SHA256);
    // Also where a session is resumed.
    assert_eq!(suite(Arc::clone(&ours)), CipherSuite::TLS13_AES_128_GCM_SHA256);
    // A server takes what its peer would rather have.
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.cert_pem().as_bytes()).unwrap()).unwrap();
    for wanted in [CipherSuite::TLS13_AES_256_GCM_SHA384, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256] {
        let mut provider = (*provider()).clone();
        provider.cipher_suites.sort_by_key(|s| s.suite() != wanted);
        let mut peer = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_client_cert_resolver(Arc::clone(&ours.client_auth_cert_resolver));
        peer.alpn_protocols.clone_from(&ours.alpn_protocols);
        assert_eq!(suite(Arc::new(peer)), wanted);
    }
}

#[test]
fn a_resumed_session_still_knows_its_peer() {
    let ca = ca();
    let (client, server) = (identity_of(&ca, &request(CLIENT), &ca), identity_of(&ca, &request(SERVER), &ca));
    shake(&client, &servers(&[SERVER]), &server, &clients(&[CLIENT]));
    let s = shake(&client, &servers(&[SERVER]), &server, &clients(&[CLIENT]));
    assert_eq!(s.server.handshake_kind(), Some(HandshakeKind::Resumed));
    assert_eq!(peer_identity(s.server.peer_certificates().unwrap()).unwrap().0.as_ref(), CLIENT);
    assert_eq!(peer_identity(s.client.peer_certificates().unwrap()).unwrap().0.as_ref(), SERVER);
}

#[test]
fn a_session_made_under_one_check_is_not_resumed_under_another() {
    let ca = ca();
    let (client, server) = (identity_of(&ca, &request(CLIENT), &ca), identity_of(&ca, &request(SERVER), &ca));
    let wants = servers(&[SERVER]);
    assert!(shake(&client, &wants, &server, &clients(&[])).passed());
    let s = shake(&client, &wants, &server, &clients(&["spiffe://example.org/other"]));
    assert_eq!(s.server_error.as_ref().and_then(|e| failed_check(e)), Some(Check::San));
}

#[test]
fn a_client_without_a_certificate_is_told_so() {
    let ca = ca();
    let (client, server) = (identity_of(&ca, &request(CLIENT), &ca), identity_of(&ca, &request(SERVER), &ca));
    let mut bare = (*client.client_config(&servers(&[]), Protocol::H2)).clone();
    bare.client_auth_cert_resolver = Arc::new(NoCert);
    let s = Shaken::new(Arc::new(bare), server.server_config(&clients(&[]), &[Protocol::H2]), "10.9.0.1");
    let (server_said, client_said) = s.said();
    assert_eq!(server_said, "the peer's certificate failed the presence check: it presented none");
    assert_eq!(client_said, "the peer wants a certificate, and we presented none");
    assert_eq!(s.server_error.as_ref().and_then(|e| failed_check(e)), Some(Check::Missing));
}

#[derive(Debug)]
struct NoCert;

impl rustls::client::ResolvesClientCert for NoCert {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[test]
fn another_ca_fails_the_chain_check_at_the_server() {
    let (ours, theirs) = (ca(), ca());
    let client = identity_of(&theirs, &request(CLIENT), &ours);
    let server = identity_of(&ours, &request(SERVER), &ours);
    let (server_said, client_said) = shake(&client, &servers(&[]), &server, &clients(&[])).said();
    assert_eq!(server_said, "the peer's certificate failed the chain check: it is not from our CA");
    assert_eq!(client_said, "the peer refused our certificate: it is not from the peer's CA (chain check)");
}

#[test]
fn another_ca_fails_the_chain_check_at_the_client() {
    let (ours, theirs) = (ca(), ca());
    let client = identity_of(&ours, &request(CLIENT), &ours);
    let server = identity_of(&theirs, &request(SERVER), &ours);
    for san in [&[][..], &[SERVER]] {
        let s = shake(&client, &servers(san), &server, &clients(&[]));
        let (server_said, client_said) = s.said();
        assert_eq!(client_said, "the peer's certificate failed the chain check: it is not from our CA");
        assert_eq!(
            server_said,
            "the peer refused our certificate: it is not from the peer's CA (chain check)"
        );
        assert_eq!(s.client_error.as_ref().and_then(|e| failed_check(e)), Some(Check::Chain));
    }
}

#[test]
fn an_expired_client_fails_the_expiry_check() {
    let ca = ca();
    let mut old = request(CLIENT);
    old.validity = Validity::past();
    let (client, server) = (identity_of(&ca, &old, &ca), identity_of(&ca, &request(SERVER), &ca));
    let (server_said, client_said) = shake(&client, &servers(&[]), &server, &clients(&[])).said();
    assert_eq!(server_said, "the peer's certificate failed the expiry check: it expired 24 h ago");
    assert_eq!(client_said, "the peer refused our certificate: expired, or not valid yet (expiry check)");
}

#[test]
fn an_expired_server_fails_the_expiry_check() {
    let ca = ca();
    let mut old = request(SERVER);
    old.validity = Validity::past();
    let (client, server) = (identity_of(&ca, &request(CLIENT), &ca), identity_of(&ca, &old, &ca));
    for san in [&[][..], &[SERVER]] {
        let (server_said, client_said) = shake(&client, &servers(san), &server, &clients(&[])).said();
        assert_eq!(client_said, "the peer's certificate failed the expiry check: it expired 24 h ago");
        assert_eq!(server_said, "the peer refused our certificate: expired, or not valid yet (expiry check)");
    }
}

#[test]
fn the_wrong_name_fails_the_san_check_and_says_both() {
    let ca = ca();
    let (client, server) = (identity_of(&ca, &request(CLIENT), &ca), identity_of(&ca, &request(SERVER), &ca));
    let names = |id: &str| format!("{id} or gw.internal or 10.9.0.1");

    let s = shake(&client, &servers(&["spiffe://example.org/east"]), &server, &clients(&[]));
    let (server_said, client_said) = s.said();
    assert_eq!(
        client_said,
        format!(
            "the peer's certificate failed the SAN check: wanted spiffe://example.org/east, presented {}",
            names(SERVER)
        )
    );
    assert!(server_said.contains("SAN check"), "{server_said}");

    let s = Shaken::new(
        client.client_config(&servers(&[]), Protocol::H2),
        server.server_config(&clients(&[]), &[Protocol::H2]),
        "other.internal",
    );
    assert_eq!(
        s.said().1,
        format!(
            "the peer's certificate failed the SAN check: wanted other.internal, presented {}",
            names(SERVER)
        )
    );

    let s =
        shake(&client, &servers(&[]), &server, &clients(&["spiffe://example.org/ns/*/sa/db", "db.internal"]));
    let (server_said, client_said) = s.said();
    assert_eq!(
        server_said,
        format!(
            "the peer's certificate failed the SAN check: wanted spiffe://example.org/ns/*/sa/db or \
             db.internal, presented {}",
            names(CLIENT)
        )
    );
    assert!(client_said.contains("SAN check"), "{client_said}");
}

#[test]
fn a_client_without_any_name_fails_the_san_check() {
    let ca = ca();
    let nobody = IssueRequest { id: None, dns: Vec::new(), ip: Vec::new(), validity: Validity::days(1) };
    let (client, server) = (identity_of(&ca, &nobody, &ca), identity_of(&ca, &request(SERVER), &ca));
    assert_eq!(client.identity(), None);
    assert_eq!(
        shake(&client, &servers(&[]), &server, &clients(&[])).said().0,
        "the peer's certificate failed the SAN check: wanted a URI, DNS or IP name, presented no name at all"
    );
}

#[test]
fn explanations_survive_io_errors_and_h2() {
    let expired = || rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired);
    let wanted = "the peer refused our certificate: expired, or not valid yet (expiry check)";
    let io = io::Error::new(io::ErrorKind::InvalidData, expired());
    assert_eq!(explain(&io), wanted);
    assert_eq!(explain(&io::Error::other(io)), wanted);
    // h2 hands on the text only.
    assert_eq!(explain(&io::Error::other(expired().to_string())), wanted);
    assert_eq!(explain(&io::Error::other("cable cut")), "cable cut");
}

#[test]
fn expiry_is_checked_by_the_clock_given() {
    let ca = ca();
    let s = shake(
        &identity_of(&ca, &request(CLIENT), &ca),
        &servers(&[]),
        &identity_of(&ca, &request(SERVER), &ca),
        &clients(&[]),
    );
    let certs = s.server.peer_certificates().unwrap();
    let now = rustls_pki_types::UnixTime::now();
    assert_eq!(check_expiry(certs, now), Ok(()));
    let later =
        rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() + 31 * 86_400));
    assert_eq!(check_expiry(certs, later).unwrap_err().check, Check::Expiry);
    assert_eq!(check_expiry(&[], now).unwrap_err().check, Check::Missing);
}

#[test]
fn what_is_no_longer_configured_keeps_no_configuration_and_no_session() {
    let ca = ca();
    let identity = identity_of(&ca, &request(SERVER), &ca);
    let (old, new) = (servers(&["old.internal"]), servers(&["new.internal"]));
    let (gone, stays) =
        (identity.client_config(&old, Protocol::H2), identity.client_config(&new, Protocol::H2));
    let taken = identity.server_config(&clients(&[]), &[Protocol::H2]);
    let wanted = Wanted { clients: [(new.san.clone(), Protocol::H2)].into(), servers: Default::default() };
    identity.keep(&wanted);
    let again = |check| identity.client_config(check, Protocol::H2);
    assert!(Arc::ptr_eq(&stays, &again(&new)), "its sessions resume");
    assert!(!Arc::ptr_eq(&gone, &again(&old)));
    assert_eq!(Arc::strong_count(&gone), 1, "nobody else has it");
    assert_eq!(Arc::strong_count(&taken), 1);
}

/// What loading says after `spoil` had its way with the files.
fn load_after(spoil: impl Fn(&IdentityFiles)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let ca = ca();
    let files = put(dir.path(), &ca.issue(&request(CLIENT)).unwrap(), ca.cert_pem());
    spoil(&files);
    let Err(e) = TlsIdentity::load(&files) else { panic!("it loaded") };
    e.to_string().replace(&format!("{}/", dir.path().display()), "")
}

#[test]
fn a_key_that_others_can_read_is_refused_unless_that_is_accepted() {
    let mode = |f: &IdentityFiles, mode| {
        fs::set_permissions(&f.key, fs::Permissions::from_mode(mode)).unwrap();
    };
    let refused = load_after(|f| mode(f, 0o644));
    assert!(
        refused.starts_with("key.pem: the private key can be read by every user: chmod 600"),
        "{refused}"
    );
    let dir = tempfile::tempdir().unwrap();
    let ca = ca();
    let mut files = put(dir.path(), &ca.issue(&request(CLIENT)).unwrap(), ca.cert_pem());
    mode(&files, 0o644);
    files.insecure_key_permissions = true;
    TlsIdentity::load(&files).unwrap();
}

#[test]
fn a_file_that_does_not_load_is_named_with_what_is_wrong() {
    assert!(load_after(|f| fs::remove_file(&f.ca).unwrap()).starts_with("ca.pem: No such file"));
    assert!(load_after(|f| fs::write(&f.cert, "").unwrap()).starts_with("cert.pem: the file is empty"));
    assert!(
        load_after(|f| fs::write(&f.key, fs::read(&f.cert).unwrap()).unwrap())
            .starts_with("key.pem: there is a certificate in it and no private key")
    );
    assert!(
        load_after(|f| fs::write(&f.key, ca().issue(&request(CLIENT)).unwrap().key_pem).unwrap())
            .starts_with("key.pem: the key is not the one of the certificate in cert.pem")
    );
    let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(load_after(|f| fs::write(&f.ca, junk).unwrap()).starts_with("ca.pem: certificate 1 (line 1)"));
    assert!(
        load_after(|f| fs::write(&f.cert, junk).unwrap()).starts_with("cert.pem: certificate 1 (line 1)")
    );
    let cut = "-----BEGIN CERTIFICATE-----\nAAAA\n";
    assert!(load_after(|f| fs::write(&f.ca, cut).unwrap()).contains("does not end: the file is cut short"));
}

/// What has failed with a resumed hello may succeed with the shorter one of a full handshake.
#[test]
fn after_its_sessions_are_forgotten_a_client_shakes_hands_in_full() {
    let ca = ca();
    let client = identity_of(&ca, &request(CLIENT), &ca);
    let server = identity_of(&ca, &request(SERVER), &ca);
    let side = client.client_side(&servers(&[]), Protocol::H2);
    let shake = || {
        let taken = server.server_config(&clients(&[]), &[Protocol::H2]);
        Shaken::new(Arc::clone(&side.config), taken, "10.9.0.1").server.handshake_kind()
    };
    assert_eq!(shake(), Some(HandshakeKind::Full));
    assert_eq!(shake(), Some(HandshakeKind::Resumed));
    side.forget_sessions(&ServerName::try_from("10.9.0.1").unwrap());
    assert_eq!(shake(), Some(HandshakeKind::Full));
}

/// A bundle of corporate roots goes on with those that can be used; one without any is named.
#[test]
fn a_broken_root_is_left_out_of_a_bundle_with_others() {
    let (ours, other, dir) = (ca(), ca(), tempfile::tempdir().unwrap());
    let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let roots = other.cert_pem().repeat(100) + junk + ours.cert_pem() + &other.cert_pem().repeat(99);
    let files = put(dir.path(), &ours.issue(&request(CLIENT)).unwrap(), &roots);
    let client = TlsIdentity::load(&files).unwrap();
    let server = identity_of(&ours, &request(SERVER), &ours);
    let s = Shaken::new(
        client.client_config(&servers(&[]), Protocol::H2),
        server.server_config(&clients(&[]), &[Protocol::H2]),
        "10.9.0.1",
    );
    assert!(s.client_error.is_none() && s.server_error.is_none());
}

struct Rotation {
    ca: Ca,
    dir: TempDir,
    store: Arc<TlsStore>,
    peer: TlsIdentity,
}

impl Rotation {
    fn new() -> Self {
        let (ca, dir) = (ca(), tempfile::tempdir().unwrap());
        let files = put(dir.path(), &ca.issue(&request(CLIENT)).unwrap(), ca.cert_pem());
        let peer = identity_of(&ca, &request(SERVER), &ca);
        Self { store: TlsStore::load(files).unwrap(), ca, dir, peer }
    }

    fn rotate(&self, id: &str) {
        put(self.dir.path(), &self.ca.issue(&request(id)).unwrap(), self.ca.cert_pem());
    }

    fn shake(&self) -> (String, Option<HandshakeKind>) {
        let s = Shaken::new(
            self.store.client_config(&servers(&[SERVER]), Protocol::H2).unwrap(),
            self.peer.server_config(&clients(&[]), &[Protocol::H2]),
            "10.9.0.1",
        );
        assert!(s.passed(), "{:?}", s.said());
        let id = peer_identity(s.server.peer_certificates().unwrap()).unwrap();
        (id.0.to_string(), s.server.handshake_kind())
    }
}

#[test]
fn after_a_rotation_nothing_of_before_is_resumed() {
    let r = Rotation::new();
    r.shake();
    assert_eq!(r.shake().1, Some(HandshakeKind::Resumed));
    assert!(!r.store.reload().unwrap(), "unchanged files change nothing");
    assert_eq!(r.shake().1, Some(HandshakeKind::Resumed));

    let renewed = "spiffe://example.org/ns/a/sa/renewed";
    r.rotate(renewed);
    assert!(r.store.reload().unwrap());
    assert_eq!(r.shake(), (renewed.to_owned(), Some(HandshakeKind::Full)));
}

#[test]
fn a_bad_rotation_keeps_the_old_identity() {
    let r = Rotation::new();
    fs::write(r.dir.path().join("key.pem"), ca().issue(&request(CLIENT)).unwrap().key_pem).unwrap();
    assert!(matches!(r.store.reload(), Err(IdentityError::Files(FilesError::KeyMismatch { .. }))));
    assert_eq!(r.shake().0, CLIENT);
}

/// A server that pushes certificates: it knows no files.
#[derive(Clone, Default)]
struct Pushing(Arc<Mutex<Pushed>>);

#[derive(Default)]
struct Pushed {
    now: Option<Material>,
    notify: Option<Box<dyn FnMut() + Send>>,
}

impl Pushing {
    /// Nothing: the server cannot be reached.
    fn push(&self, material: Option<Material>) {
        let mut pushed = self.0.lock().unwrap();
        pushed.now = material;
        let notify = pushed.notify.take();
        drop(pushed);
        if let Some(mut notify) = notify {
            notify();
            self.0.lock().unwrap().notify = Some(notify);
        }
    }
}

impl IdentityProvider for Pushing {
    fn fetch(&self) -> Result<Material, IdentityError> {
        let none = || IdentityError::Roots { origin: "the server".to_owned(), why: "none yet".to_owned() };
        self.0.lock().unwrap().now.clone().ok_or_else(none)
    }

    fn subscribe(&self, changed: Box<dyn FnMut() + Send>) -> io::Result<Subscription> {
        self.0.lock().unwrap().notify = Some(changed);
        let pushing = self.clone();
        Ok(Subscription::new(Held(pushing)))
    }
}

struct Held(Pushing);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().notify = None;
    }
}

/// A provider needs no files: what one pushes is used from its notice on, what it cannot give leaves what is in use, and
/// without a subscription nobody hears of it.
#[test]
fn a_store_follows_a_provider_that_pushes() {
    let ca = ca();
    let material = |id: &str| {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &ca.issue(&request(id)).unwrap(), ca.cert_pem()).fetch().unwrap()
    };
    let server = Pushing::default();
    assert!(TlsStore::load(server.clone()).is_err(), "there is nothing to start with");
    server.push(Some(material(CLIENT)));
    let store = TlsStore::load(server.clone()).unwrap();
    let notices = watch(&store, || {}).unwrap();
    let who = || store.identity().unwrap().0.to_string();

    server.push(Some(material("spiffe://example.org/renewed")));
    assert_eq!(who(), "spiffe://example.org/renewed");
    server.push(None);
    assert_eq!(who(), "spiffe://example.org/renewed");
    drop(notices);
    server.push(Some(material(CLIENT)));
    assert_eq!(who(), "spiffe://example.org/renewed");
}

#[test]
fn a_watched_store_follows_a_symlink_swap() {
    let (ca, dir) = (ca(), tempfile::tempdir().unwrap());
    // As a Kubernetes secret volume: cert.pem -> ..data/cert.pem, ..data -> a folder per version.
    let version = |name: &str, id: &str| {
        fs::create_dir(dir.path().join(name)).unwrap();
        put(&dir.path().join(name), &ca.issue(&request(id)).unwrap(), ca.cert_pem());
        std::os::unix::fs::symlink(name, dir.path().join("..data_tmp")).unwrap();
        fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
    };
    version("..1", CLIENT);
    for name in ["cert.pem", "key.pem", "ca.pem"] {
        std::os::unix::fs::symlink(format!("..data/{name}"), dir.path().join(name)).unwrap();
    }
    let store = TlsStore::load(files_in(dir.path())).unwrap();
    let (tell, told) = mpsc::channel();
    let watch = watch(&store, move || tell.send(()).unwrap()).unwrap();

    let renewed = "spiffe://example.org/ns/a/sa/renewed";
    version("..2", renewed);
    told.recv_timeout(Duration::from_secs(10)).expect("the swap is noticed");
    assert_eq!(store.identity().unwrap().0.as_ref(), renewed);
    drop(watch);
    assert!(told.recv().is_err(), "the watching thread has ended");
}

/// What a client of a tunnel sees when the server refuses its certificate: the handshake is over for it,
/// and the alert arrives where h2 reads.
#[tokio::test]
async fn a_refusal_is_explained_through_h2() {
    let (ours, theirs) = (ca(), ca());
    let client = identity_of(&theirs, &request(CLIENT), &ours);
    let server = identity_of(&ours, &request(SERVER), &ours);
    let (near, far) = tokio::io::duplex(64 * 1024);
    let config = server.server_config(&clients(&[]), &[Protocol::H2]);
    let accept = record::accept(&config, far);
    let connect = async {
        let name = ServerName::try_from("10.9.0.1").unwrap();
        let config = client.client_config(&servers(&[]), Protocol::H2);
        let (tls, _) = record::connect(config, name, near).await.unwrap();
        let (_requests, connection) = h2::client::handshake(tls).await.unwrap();
        connection.await.unwrap_err()
    };
    let (accepted, client_error) = tokio::join!(accept, connect);
    let server_error = accepted.err().expect("it is refused").0;
    assert_eq!(
        explain(&server_error),
        "the peer's certificate failed the chain check: it is not from our CA"
    );
    assert_eq!(failed_check(&server_error), Some(Check::Chain));
    assert_eq!(
        explain(&client_error),
        "the peer refused our certificate: it is not from the peer's CA (chain check)"
    );
}
