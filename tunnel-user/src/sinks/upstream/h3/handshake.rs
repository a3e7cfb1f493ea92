//! The start of an HTTP/3 connection: a UDP socket, QUIC with TLS and its checks, and SETTINGS.

use std::{
    cell::{Cell, RefCell},
    future::{Future as _, poll_fn},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use quinn::{ConnectionError, Endpoint};
use rustls_pki_types::{ServerName, UnixTime};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout_at},
};

use super::{Draining, H3Connection};
use crate::{
    config::{Congestion, Protocol},
    identity::{peer::peer_identity, quic::explain, standing::Standing, verify::check_expiry},
    model::flow::{FarEnd, PeerAddr, Target},
    sinks::{
        dial::DialError,
        upstream::{
            ConnectError,
            connect::{Far, ForgetSessions, Key, TlsKey, still_stands},
            settings::PoolSettings,
        },
    },
    transport::{
        http3::Code,
        quic::{self, Control, Ended, Heard, Role, Tuning},
    },
};

/// How long an address may take before the next is tried, where a name has several: RFC 8305 section 5 waits as long with TCP,
/// where only a round trip is waited for; a handshake of QUIC takes one too.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// Nothing tells that the peer has confirmed the handshake, so it is looked at after this time, and then after twice as much
/// each time.
const LOOK_MIN: Duration = Duration::from_micros(500);
const LOOK_MAX: Duration = Duration::from_millis(50);

/// Makes connections from one socket of each family.
#[derive(Default)]
pub(in crate::sinks::upstream) struct Quic {
    endpoints: RefCell<[Option<Endpoint>; 2]>,
    congestion: Congestion,
}

impl Quic {
    /// With this congestion control. Nothing is bound yet.
    pub(in crate::sinks::upstream) fn new(congestion: Congestion) -> Self {
        Self { endpoints: RefCell::default(), congestion }
    }

    /// Connects, within the time that the settings allow.
    pub(in crate::sinks::upstream) async fn connect(
        &self,
        key: &Key,
        settings: &PoolSettings,
    ) -> Result<H3Connection, ConnectError> {
        let (endpoint, after) = (&key.endpoint, settings.connect.timeout);
        let wrong = |why: &str| ConnectError::Http {
            protocol: Protocol::H3,
            endpoint: endpoint.clone(),
            why: why.to_owned(),
        };
        // The configuration has made sure of both.
        let Some(tls) = &key.tls else { return Err(wrong("there is no HTTP/3 without TLS")) };
        if key.via.is_some() {
            return Err(wrong("no other upstream carries QUIC"));
        }
        let deadline = Instant::now() + after;
        let late = || ConnectError::Timeout { endpoint: endpoint.clone(), after, long_hello: false };
        let connected = timeout_at(deadline, async {
            let failed = |e| ConnectError::Dial(Rc::new(e));
            let addrs = settings.connect.dialer.resolve(endpoint).await.map_err(failed)?;
            let (mut last, mut rest, mut attempts) = (None, addrs.iter(), Vec::new());
            let mut forget = ForgetSessions::new(tls);
            loop {
                let next = rest.next();
                match next {
                    Some(addr) => attempts.push(Box::pin(self.attempt(*addr, endpoint, tls, settings))),
                    None if attempts.is_empty() => return Err(last.unwrap_or_else(late)),
                    None => {}
                }
                // Those before it go on.
                let first = poll_fn(|cx| {
                    for at in 0..attempts.len() {
                        if let Poll::Ready(done) = attempts[at].as_mut().poll(cx) {
                            drop(attempts.swap_remove(at));
                            return Poll::Ready(done);
                        }
                    }
                    Poll::Pending
                });
                let until = if next.is_some() { Instant::now() + NEXT_ADDRESS } else { deadline };
                match timeout_at(until, first).await {
                    Ok(Ok(connection)) => {
                        forget.succeeded();
                        return Ok(connection);
                    }
                    Ok(Err(e)) => last = Some(e),
                    Err(_) if next.is_none() => return Err(late()),
                    Err(_) => {}
                }
            }
        });
        connected.await.map_err(|_| late())?
    }

    /// One address.
    async fn attempt(
        &self,
        addr: SocketAddr,
        endpoint: &Target,
        TlsKey { side, server_name, check, store, ours }: &TlsKey,
        settings: &PoolSettings,
    ) -> Result<H3Connection, ConnectError> {
        let local = |source| ConnectError::Dial(Rc::new(DialError::Local { addr, source }));
        let tls = |why| ConnectError::Tls { endpoint: endpoint.clone(), why };
        let http = |why| ConnectError::Http { protocol: Protocol::H3, endpoint: endpoint.clone(), why };
        let streams = u32::try_from(settings.max_streams).unwrap_or(u32::MAX);
        let tuning = Tuning {
            peer_streams: 0,
            streams,
            keepalive_interval: settings.keepalive_interval,
            keepalive_timeout: settings.keepalive_timeout,
            congestion: self.congestion,
        };
        let config = quic::client_config(Arc::clone(&side.config), &tuning).map_err(tls)?;
        let name = match server_name {
            ServerName::IpAddress(ip) => std::net::IpAddr::from(*ip).to_string(),
            other => other.to_str().into_owned(),
        };
        let from = self.endpoint(addr, settings).map_err(local)?;
        let connecting = from
            .connect_with(config, addr, &name)
            .map_err(|e| http(format!("this node cannot connect: {e}")))?;
        let lost = |e: ConnectionError| match e {
            ConnectionError::TimedOut => {
                let after = settings.connect.timeout;
                ConnectError::Timeout { endpoint: endpoint.clone(), after, long_hello: false }
            }
            ConnectionError::TransportError(_) | ConnectionError::ConnectionClosed(_) => {
                tls(explain(&e, ours.hint().as_deref()))
            }
            e => http(quic::why_lost(&e)),
        };
        // There is no connection of TCP before the handshake: its beginning counts.
        let connected = std::time::Instant::now();
        let connection = connecting.await.map_err(lost)?;
        let quic::Agreed { certificates, .. } = quic::agreed(&connection);
        // A resumed session brings its certificate along, and nobody has looked at the date since.
        if let Err(why) = check_expiry(&certificates, UnixTime::now()) {
            let why = why.to_string();
            connection.close(quic::wire_code(Code::GENERAL_PROTOCOL_ERROR), why.as_bytes());
            return Err(tls(why));
        }
        let control = Control::open(&connection).await.map_err(lost)?;
        let (draining, greeted) = (Rc::new(Draining::default()), Rc::new((Cell::new(false), Notify::new())));
        let heard = {
            let (draining, greeted) = (Rc::clone(&draining), Rc::clone(&greeted));
            move |heard| match heard {
                Heard::Settings(_) => {
                    greeted.0.set(true);
                    greeted.1.notify_one();
                }
                Heard::Goaway(from) => draining.goaway(from),
            }
        };
        let watched = connection.clone();
        let mut watching: super::Watching =
            Box::pin(async move { quic::watch(&watched, Role::Client, Rc::new(heard)).await });
        // A server judges our certificate after we have finished (RFC 8446 section 4.4.2), and only then confirms the handshake
        // (RFC 9001 section 4.1.2).
        let confirmed = async {
            while !greeted.0.get() {
                greeted.1.notified().await;
            }
            let mut look = LOOK_MIN;
            while connection.stats().frame_rx.handshake_done == 0 {
                sleep(look).await;
                look = (look * 2).min(LOOK_MAX);
            }
        };
        tokio::select! {
            biased;
            ended = &mut watching => return Err(match ended {
                Ended::Wrong(e) => http(e.to_string()),
                Ended::Lost(e) => lost(e),
            }),
            () = confirmed => {}
        }
        tracing::debug!(%endpoint, "QUIC handshake completed");
        let identity = peer_identity(&certificates);
        let (store, ours) = (Arc::clone(store), Arc::clone(ours));
        let standing = Standing::of_server(store, ours, certificates, server_name.clone(), check);
        still_stands(&standing, endpoint)?;
        let standing = Some(Rc::new(standing));
        let far = Far { peer: FarEnd::Socket(PeerAddr(addr)), identity, standing, connected };
        Ok(H3Connection {
            connection,
            far,
            max_streams: settings.max_streams,
            allowed: Cell::default(),
            open: Default::default(),
            draining,
            overdue: Cell::default(),
            lost: RefCell::default(),
            watching: RefCell::new(Some(watching)),
            _control: control,
        })
    }

    /// The endpoint of an address's family, bound when it is first needed.
    fn endpoint(&self, to: SocketAddr, settings: &PoolSettings) -> std::io::Result<Endpoint> {
        let slot = &mut self.endpoints.borrow_mut()[usize::from(to.is_ipv6())];
        if let Some(endpoint) = slot {
            return Ok(endpoint.clone());
        }
        let endpoint = quic::client(settings.connect.dialer.udp_socket(to)?)?;
        Ok(slot.insert(endpoint).clone())
    }
}
