//! TLS over another leg (a socket, or a stream of another tunnel): the tunnel is what remains of an HTTP/1 connection after its
//! 200.
//!
//! # Invariants
//! - close_notify is the end of one direction, as FIN is, and a connection that ends without it was cut off: a reset (RFC 8446
//!   section 6.1). What breaks the leg below breaks this one in the same way.
//! - Bytes count as sent once the leg below has taken their records.
//! - It holds what one read of the leg below gave it, and what its session holds; idle, nothing.

use std::{
    io,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};

use super::{Broken, Cause, Leg, Queue, tcp::reset};
use crate::{
    identity::verify::explain,
    transport::record::{Next, RecordError, Session},
};

/// See the module.
pub struct TlsLeg<L> {
    below: L,
    session: Session,
    /// What has come from below and was not given to the session yet: it takes no more than it has room for.
    received: Bytes,
    /// Records on their way down: what one write of the session sealed.
    records: Queue,
    /// Bytes at the front of the caller's queue that are among the records.
    sealed: usize,
}

fn broken(why: &RecordError) -> Broken {
    Broken::Reset(Cause::Connection(explain(why)))
}

impl<L: Leg> TlsLeg<L> {
    /// Takes over a connection, and what its session has received already.
    pub fn new(below: L, session: Session) -> Self {
        Self { below, session, received: Bytes::new(), records: Queue::default(), sealed: 0 }
    }

    /// The leg below.
    pub fn below(&self) -> &L {
        &self.below
    }

    /// Hands records down; ready when none is left.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            let sealed = self.session.unsent().len();
            if sealed > 0 {
                self.records.push(Bytes::copy_from_slice(self.session.unsent()));
                self.session.sent(sealed);
            }
            if self.records.is_empty() {
                return Poll::Ready(Ok(()));
            }
            ready!(self.below.poll_send(cx, &mut self.records))?;
        }
    }
}

impl<L: Leg> Leg for TlsLeg<L> {
    fn prefetches(&self) -> bool {
        false
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            let next = self.session.advance();
            if !self.session.unsent().is_empty() && !matches!(next, Ok(Next::Data)) {
                // An alert, or the answer to a new key, neither of which anybody waits for.
                let _later = self.poll_flush(cx);
            }
            match next {
                Ok(Next::Data) => {
                    let chunk = Bytes::copy_from_slice(self.session.data());
                    self.session.taken(chunk.len());
                    return Poll::Ready(Ok(Some(chunk)));
                }
                Ok(Next::End) => return Poll::Ready(Ok(None)),
                Ok(Next::More) => {}
                Err(why) => return Poll::Ready(Err(broken(&why))),
            }
            if self.received.is_empty() {
                match ready!(self.below.poll_recv(cx))? {
                    Some(chunk) => self.received = chunk,
                    None => return Poll::Ready(Err(reset(io::ErrorKind::UnexpectedEof.into()))),
                }
            }
            let room = self.session.room();
            let n = room.len().min(self.received.len());
            room[..n].copy_from_slice(&self.received[..n]);
            self.session.received(n);
            self.received.advance(n);
            self.below.accepted(n);
        }
    }

    fn accepted(&mut self, _n: usize) {
        // The window below follows what the session has taken, which is no more than it has room for.
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Broken>> {
        // They stay in the queue meanwhile: nobody else would ask for the rest of their records.
        while self.sealed == 0 {
            ready!(self.poll_flush(cx))?;
            let sealed = queue.with_slices(|slices| self.session.write(slices));
            self.sealed = sealed.map_err(|why| broken(&why))?;
        }
        ready!(self.poll_flush(cx))?;
        let n = std::mem::take(&mut self.sealed);
        queue.advance(n);
        Poll::Ready(Ok(n))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.session.end().map_err(|why| broken(&why))?;
        ready!(self.poll_flush(cx))?;
        self.below.poll_finish(cx)
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.below.poll_broken(cx)
    }

    fn is_acknowledged(&self) -> bool {
        self.below.is_acknowledged()
    }

    fn was_forgotten(&self) -> bool {
        self.below.was_forgotten()
    }

    fn unacknowledged(&self) -> u64 {
        self.session.unsent().len() as u64 + self.below.unacknowledged()
    }

    fn close(&mut self) {
        self.below.close();
    }

    fn release(&mut self) {
        self.below.release();
    }

    fn abort(&mut self) {
        self.below.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use socket2::SockRef;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        task::{JoinHandle, LocalSet},
        time::timeout,
    };
    use tokio_rustls::{TlsConnector, client::TlsStream};

    use super::{
        super::{Early, IntoLeg as _, Meter, TcpLeg, relay},
        *,
    };
    use crate::{
        cli::pki::{Ca, IssueRequest, Validity},
        config::Protocol,
        identity::tls::TlsIdentity,
        model::{
            end::EndReason,
            flow::Target,
            trust::{ClientCheck, IdentityFiles, ServerCheck},
        },
        relay::nested::Nested,
        transport::record,
    };

    /// Far longer than anything here takes.
    const PATIENCE: Duration = Duration::from_secs(30);
    /// More than the sockets and rustls hold together.
    const BYTES: usize = 16_000_000;

    fn identity() -> TlsIdentity {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::generate(Validity::days(1)).unwrap();
        let mut request = IssueRequest::new("spiffe://t.test/both".parse().unwrap());
        request.ip = vec!["127.0.0.1".parse().unwrap()];
        let issued = ca.issue(&request).unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            path
        };
        let cert = file("cert.pem", &issued.cert_pem);
        let (key, ca) = (file("key.pem", &issued.key_pem), file("ca.pem", ca.cert_pem()));
        TlsIdentity::load(&IdentityFiles { cert, key, ca, insecure_key_permissions: false }).unwrap()
    }

    /// An application that speaks TLS, a target that does not, and a flow between them.
    struct Flow {
        app: TlsStream<TcpStream>,
        target: TcpStream,
        relayed: JoinHandle<EndReason>,
    }

    async fn accepted() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let outside = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (outside, listener.accept().await.unwrap().0)
    }

    /// What it speaks TLS with: a socket, or another leg.
    #[derive(Clone, Copy)]
    enum Below {
        Socket,
        Leg,
    }

    const BOTH: [Below; 2] = [Below::Socket, Below::Leg];

    impl Flow {
        async fn start(below: Below) -> Self {
            let (identity, check) = (identity(), ServerCheck::default());
            let ((app, inside), (target, onward)) = (accepted().await, accepted().await);
            let name = check.server_name(&Target::Addr(app.peer_addr().unwrap()));
            let connector = TlsConnector::from(identity.client_config(&check, Protocol::H1));
            let config = identity.server_config(&ClientCheck::default(), &[Protocol::H1]);
            let (app, inside) = tokio::join!(connector.connect(name, app), record::accept(&config, inside));
            let (inside, mut onward) = (inside.map_err(|(e, _)| e).unwrap().0, TcpLeg::new(onward));
            let relayed = tokio::task::spawn_local(async move {
                let (mut early, meter) = (Early::default(), Meter::default());
                let ended = match below {
                    Below::Socket => {
                        relay(
                            &mut inside.into_leg(0),
                            &mut onward,
                            &mut early,
                            &meter,
                            &crate::relay::Path::Copy,
                        )
                        .await
                    }
                    Below::Leg => {
                        let (stream, session) = inside.into_parts();
                        let below = Nested::new(TcpLeg::new(stream), Queue::default());
                        let mut client = TlsLeg::new(below, session);
                        relay(&mut client, &mut onward, &mut early, &meter, &crate::relay::Path::Copy).await
                    }
                };
                ended.reason()
            });
            Self { app: app.unwrap(), target, relayed }
        }
    }

    fn run(test: impl AsyncFn(Below)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for below in BOTH {
            LocalSet::new()
                .block_on(&runtime, async { timeout(PATIENCE, test(below)).await.expect("in time") });
        }
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[3]).collect()
    }

    #[test]
    fn bytes_arrive_once_in_order_unchanged_both_ways_at_once_and_each_end_by_itself() {
        run(async |below| {
            let Flow { app, mut target, relayed } = Flow::start(below).await;
            let (mut app_in, mut app_out) = tokio::io::split(app);
            let (mut target_in, mut target_out) = target.split();
            let up = async {
                app_out.write_all(&pattern(BYTES)).await.unwrap();
                app_out.shutdown().await.unwrap();
            };
            let down = async {
                target_out.write_all(&pattern(BYTES)).await.unwrap();
                target_out.shutdown().await.unwrap();
            };
            let (mut sent, mut received) = (Vec::new(), Vec::new());
            let all =
                tokio::join!(up, down, target_in.read_to_end(&mut sent), app_in.read_to_end(&mut received));
            assert!(all.2.is_ok() && all.3.is_ok(), "{all:?}");
            assert!(sent == pattern(BYTES) && received == pattern(BYTES));
            assert_eq!(relayed.await.unwrap(), EndReason::Closed);
        });
    }

    #[test]
    fn a_direction_that_is_read_late_ends_cleanly_and_the_other_goes_on_meanwhile_and_afterwards() {
        run(async |below| {
            let Flow { mut app, mut target, relayed } = Flow::start(below).await;
            // More than there is room for, and the end behind it.
            let (mut target_in, target_out) = target.split();
            let offered = pattern(BYTES);
            let down = async {
                let mut target_out = target_out;
                target_out.write_all(&offered).await.unwrap();
                target_out.shutdown().await.unwrap();
            };
            let up = async {
                app.write_all(b"meanwhile").await.unwrap();
                let mut got = [0; 9];
                target_in.read_exact(&mut got).await.unwrap();
                assert_eq!(&got, b"meanwhile");
                let mut received = Vec::new();
                app.read_to_end(&mut received).await.unwrap();
                assert!(received == offered);
            };
            tokio::join!(down, up);
            app.write_all(b"afterwards").await.unwrap();
            app.shutdown().await.unwrap();
            let mut got = Vec::new();
            target.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"afterwards");
            assert_eq!(relayed.await.unwrap(), EndReason::Closed);
        });
    }

    #[test]
    fn an_end_without_close_notify_and_a_broken_record_are_resets_and_a_reset_is_never_an_end() {
        run(async |below| {
            for broken in [false, true] {
                let Flow { mut app, mut target, relayed } = Flow::start(below).await;
                app.write_all(b"x").await.unwrap();
                target.read_exact(&mut [0]).await.unwrap();
                let (mut tcp, _session) = app.into_inner();
                if broken {
                    tcp.write_all(&[23, 3, 3, 0, 20]).await.unwrap();
                    tcp.write_all(&[0; 20]).await.unwrap();
                } else {
                    tcp.shutdown().await.unwrap();
                }
                let reset = target.read(&mut [0]).await.unwrap_err();
                assert_eq!(reset.kind(), io::ErrorKind::ConnectionReset);
                // A broken record is TLS's own end.
                let wanted = if broken { EndReason::ClientLost } else { EndReason::ClientReset };
                assert_eq!(relayed.await.unwrap(), wanted);
            }
            let Flow { mut app, target, relayed } = Flow::start(below).await;
            SockRef::from(&target).set_linger(Some(Duration::ZERO)).unwrap();
            drop(target);
            let reset = app.read(&mut [0]).await.unwrap_err();
            assert_eq!(reset.kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(relayed.await.unwrap(), EndReason::TargetReset);
        });
    }

    #[test]
    fn a_reset_behind_a_stuck_direction_is_heard() {
        run(async |below| {
            let Flow { mut app, mut target, relayed } = Flow::start(below).await;
            // Nobody reads from the target: it is full.
            let chunk = pattern(64 * 1024);
            while timeout(Duration::from_millis(200), app.write_all(&chunk)).await.is_ok() {}
            SockRef::from(app.get_ref().0).set_linger(Some(Duration::ZERO)).unwrap();
            drop(app);
            let mut buf = vec![0; 64 * 1024];
            let end = loop {
                match target.read(&mut buf).await {
                    Ok(0) => break Ok(()),
                    Ok(_) => {}
                    Err(e) => break Err(e.kind()),
                }
            };
            assert_eq!(end, Err(io::ErrorKind::ConnectionReset));
            assert_eq!(relayed.await.unwrap(), EndReason::ClientReset);
        });
    }
}
