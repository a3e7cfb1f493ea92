//! A next hop that accepts every CONNECT request, echoes, and keeps the heads of the requests. It requires no client
//! certificate.
//!
//! # Invariants
//! - A request is recorded before it is answered.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{Request, Response};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio::{net::TcpListener, runtime, sync::oneshot, task};
use tokio_rustls::TlsAcceptor;

use crate::{netns::NetNs, pki::Credentials};

type Asked = Arc<Mutex<Vec<Request<()>>>>;

/// A running next hop.
#[derive(Debug)]
pub struct Hop {
    addr: SocketAddr,
    asked: Asked,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Hop {
    /// Starts one on `host` that shows this certificate; returns when it listens.
    pub fn start(host: &NetNs, addr: SocketAddr, who: &Credentials) -> Result<Self> {
        let (acceptor, asked) = (acceptor(who)?, Asked::default());
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let noted = Arc::clone(&asked);
        let thread = host.spawn("hop", move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            task::LocalSet::new().block_on(&runtime, async {
                let listener = TcpListener::bind(addr).await?;
                tell.send(listener.local_addr()?)?;
                tokio::select! {
                    served = serve(listener, acceptor, noted) => served,
                    _ = stopped => Ok(()),
                }
            })
        })?;
        let addr = told.recv().context("it does not listen")?;
        Ok(Self { addr, asked, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it was asked for so far.
    pub fn asked(&self) -> Vec<Request<()>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Ok(Err(e))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("next hop {}: {e:#}", self.addr);
        }
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, asked: Asked) -> Result<()> {
    loop {
        let (tcp, _) = listener.accept().await?;
        let (acceptor, asked) = (acceptor.clone(), Arc::clone(&asked));
        task::spawn_local(async move {
            let tls = acceptor.accept(tcp).await?;
            let mut connection = h2::server::handshake(tls).await?;
            while let Some(stream) = connection.accept().await {
                let (request, respond) = stream?;
                let (head, body) = request.into_parts();
                let request = Request::from_parts(head, ());
                asked.lock().unwrap_or_else(PoisonError::into_inner).push(request);
                task::spawn_local(echo(body, respond));
            }
            anyhow::Ok(())
        });
    }
}

/// Answers 200, and then with whatever comes.
pub async fn echo(mut body: RecvStream, mut respond: SendResponse<Bytes>) -> Result<()> {
    let mut send = respond.send_response(Response::new(()), false)?;
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        // The end may come with nothing. Sent on as a frame of its own it would be one of the hundred on a connection
        // that h2 takes for an attack.
        if !chunk.is_empty() {
            send.send_data(chunk, false)?;
        }
    }
    send.send_data(Bytes::new(), true)?;
    Ok(())
}

/// TLS that shows this certificate, and ALPN h2.
pub fn acceptor(who: &Credentials) -> Result<TlsAcceptor> {
    let chain = CertificateDer::pem_slice_iter(&std::fs::read(&who.cert)?).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(&std::fs::read(&who.key)?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
