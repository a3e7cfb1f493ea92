//! A client of the gateway that sends single HTTP/2 CONNECT requests, good and bad, and returns the gateway's answers
//! as they are. For plaintext it sends bytes, and reads until the other side closes.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::{Method, Request, StatusCode};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{netns::NetNs, pki::Credentials, wait::PATIENCE, world::NET4};

/// What a gateway answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The `proxy-status` header (RFC 9209), empty if there is none.
    pub proxy_status: String,
}

/// A connection to a gateway, for tests that need more than one answer.
pub type Peer = (SendRequest<Bytes>, Connection<TlsStream<TcpStream>, Bytes>);

/// Sends one request, on a connection of its own, from `host`, and returns the answer.
pub fn ask(host: &NetNs, gateway: SocketAddr, who: &Credentials, request: Request<()>) -> Result<Answer> {
    let config = tls(who)?;
    host.block_on(|| async move {
        let (mut requests, connection) = connect(gateway, config).await?;
        let driving = tokio::task::spawn_local(connection);
        let (response, _body) = requests.send_request(request, false)?;
        let response = response.await.context("no answer to the request")?;
        driving.abort();
        let proxy_status = response.headers().get("proxy-status").map(|value| value.to_str()).transpose()?;
        Ok(Answer { status: response.status(), proxy_status: proxy_status.unwrap_or_default().to_owned() })
    })
}

/// Says something in plaintext, word by word, ends if it is to end, and hears the other side out, which has to close
/// the connection.
pub fn say_and_hear(host: &NetNs, to: SocketAddr, said: &[u8], end: bool) -> Result<String> {
    let stream = host.run(|| std::net::TcpStream::connect(to))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    (&stream).write_all(said)?;
    if end {
        stream.shutdown(Shutdown::Write)?;
    }
    let mut heard = Vec::new();
    (&stream).read_to_end(&mut heard).with_context(|| format!("{:?}", String::from_utf8_lossy(said)))?;
    Ok(String::from_utf8(heard)?)
}

/// CONNECT for an authority, which may be none.
pub fn connect_request(authority: &str) -> Result<Request<()>> {
    Ok(Request::builder().method(Method::CONNECT).uri(authority).body(())?)
}

/// Connects and completes the handshakes. The connection has to be polled for anything to move.
pub async fn connect(gateway: SocketAddr, config: Arc<ClientConfig>) -> Result<Peer> {
    let stream = TcpStream::connect(gateway).await?;
    let name = ServerName::IpAddress(NET4.into());
    let stream = TlsConnector::from(config).connect(name, stream).await.context("TLS")?;
    h2::client::handshake(stream).await.context("HTTP/2")
}

/// TLS with a certificate, and ALPN h2.
pub fn tls(who: &Credentials) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&fs::read(&who.ca)?)?)?;
    let chain = CertificateDer::pem_slice_iter(&fs::read(&who.cert)?).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(&fs::read(&who.key)?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}
