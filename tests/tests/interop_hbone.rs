//! HBONE as the mesh speaks it: port 15008, SPIFFE names of cluster.local, an authority of address and port, `baggage`,
//! `forwarded`, `traceparent`; and what an HTTP/2 peer may say about windows, streams and things that we do not know.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use http::{HeaderName, HeaderValue, Method, Request};
use tokio::{
    net::TcpListener,
    runtime,
    sync::{oneshot, watch},
    task,
};
use tokio_rustls::TlsAcceptor;
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, TARGET6, World,
    daemon::Daemon,
    dialogue::ask,
    gateway,
    hop::{self, Hop},
    pattern::UP,
    peer::{self, connect_request},
    pki::Credentials,
    raw::{
        self, ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, SETTINGS, field,
    },
    target, wait_for,
};

const HBONE: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// Who waypoints are.
const WAYPOINT: &str = "spiffe://cluster.local/ns/infra/sa/waypoint";
/// Who applications are.
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
/// What Envoy and ztunnel offer, or more.
const WINDOW: u32 = 16 << 20;

fn waypoint(world: &World) -> Result<Credentials> {
    world.pki().issue("waypoint", WAYPOINT, &["--ip", &NET4.to_string()])
}

/// For `tunnel exec`: one worker, everything through the waypoint.
fn agent(world: &World) -> Result<PathBuf> {
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[route]]\nto = [{{ upstream = \"waypoint\" }}]\n[[upstream]]\nname = \"waypoint\"\n\
         endpoints = [\"{HBONE}\"]\nverify = [\"{WAYPOINT}\"]\nresponse_timeout = \"2s\"\n\
         headers = {{ baggage = \"k8s.cluster.name=Kubernetes,k8s.namespace.name=shop\" }}\n",
        world.pki().issue("web", WEB, &[])?.toml()
    );
    world.file("agent.toml", config)
}

/// The value of the only line of a header.
fn only<'a>(request: &'a Request<()>, name: &str) -> &'a str {
    let lines: Vec<_> = request.headers().get_all(name).iter().collect();
    assert_eq!(lines.len(), 1, "{name}: {request:?}");
    lines[0].to_str().expect("a text")
}

/// Our CONNECT request has the form that HBONE peers require.
#[test]
fn a_request_has_what_the_mesh_expects_and_nothing_that_it_forbids() -> Result<()> {
    let world = World::new()?;
    let hop = Hop::start(world.net(), HBONE, &waypoint(&world)?)?;
    let exec = world.exec_with(&agent(&world)?);
    for (ip, authority) in [(TARGET4, "10.200.0.10:8080"), (TARGET6, "[fd00:200::10]:8080")] {
        let done = exec.run_app(&["many", &SocketAddr::new(ip, 8080).to_string(), "1", "1000"])?;
        assert!(done.success(), "{done}");
        let asked = hop.asked();
        let request = asked.last().context("a request")?;
        assert_eq!((request.method(), request.uri().to_string().as_str()), (&Method::CONNECT, authority));
        // The scripted peer's library refuses :scheme and :path by itself.
        assert!(request.extensions().get::<h2::ext::Protocol>().is_none(), "{request:?}");
        assert_eq!(only(request, "baggage"), "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop");
        let client = only(request, "forwarded").strip_prefix("for=").context("for=")?;
        client.trim_matches(['"', '[', ']']).parse::<IpAddr>()?;
        let parent: Vec<_> = only(request, "traceparent").split('-').map(str::len).collect();
        assert_eq!(parent, [2, 32, 16, 2], "{request:?}");
        assert_eq!(request.headers().len(), 3, "nothing else: {request:?}");
    }
    Ok(())
}

/// A waypoint of another trust domain gets no request.
#[test]
fn a_waypoint_of_another_trust_domain_gets_no_request() -> Result<()> {
    let world = World::new()?;
    let other = world.pki().issue("waypoint", "spiffe://other.local/ns/infra/sa/waypoint", &[])?;
    let hop = Hop::start(world.net(), HBONE, &other)?;
    let done = world.exec_with(&agent(&world)?).run_app(&["expect-reset", "10.200.0.10:8080", "1"])?;
    assert_eq!(done.value("ended")?, "ECONNRESET", "{done}");
    assert_eq!(hop.asked().len(), 0);
    Ok(())
}

/// Unknown headers, settings and frames of a client are ignored.
#[test]
fn what_a_request_says_that_we_do_not_know_is_ignored() -> Result<()> {
    let world = World::new()?;
    let config = format!(
        "{}[[listener]]\naddress = \"{HBONE}\"\nverify = [\"spiffe://cluster.local/ns/*/sa/*\"]\n[[route]]\n\
         to = \"direct\"\n[[policy]]\nidentity = [\"{WEB}\"]\ntarget = [\"10.200.0.0/24\"]\n",
        waypoint(&world)?.toml()
    );
    let _ours = Daemon::start(&world, world.net(), &config)?;
    let target = world.serve(TARGET4, target::echo())?;
    let web = world.pki().issue("web", WEB, &[])?;
    let plain = || connect_request(&target.addr().to_string());
    let with = |fields: &[(&str, &[u8])]| {
        let mut request = plain()?;
        for (name, value) in fields {
            request.headers_mut().append(name.parse::<HeaderName>()?, HeaderValue::from_bytes(value)?);
        }
        anyhow::Ok(request)
    };
    for request in [
        plain()?,
        with(&[
            ("x-istio-attributes", b"abc"),
            ("x-envoy-decorator-operation", b"d"),
            ("x-forwarded-proto", b"https"),
        ])?,
        with(&[("baggage", b"k8s.cluster.name=Kubernetes"), ("forwarded", b"for=192.0.2.1;proto=hbone")])?,
        with(&[("traceparent", b"not one"), ("tracestate", b"="), ("baggage", b",,=,")])?,
        with(&[("forwarded", b"\xff\xfe"), ("via", b"\xff"), ("x-bytes", b"\x80\xff")])?,
        with(&[("te", b"trailers"), ("cookie", b"a=b"), ("cookie", b"c=d"), ("priority", b"u=1")])?,
        with(&[("host", b"elsewhere.internal"), ("expect", b"100-continue"), ("range", b"bytes=0-1")])?,
    ] {
        let shown = format!("{request:?}");
        let answer = peer::ask(world.node(), HBONE, &web, request)?;
        assert_eq!(answer.status, 200, "{shown}: {answer:?}");
    }
    let answer = peer::ask(world.node(), HBONE, &world.pki().named("waypoint"), plain()?)?;
    assert_eq!(answer.status, 403, "it was let in, and has no policy: {answer:?}");
    Ok(())
}

/// An answer: the kind, the flags and the payload of each of its frames.
type Answer = Vec<(u8, u8, Vec<u8>)>;

/// A head, whole, and the tunnel goes on.
fn whole(block: Vec<u8>) -> (u8, u8, Vec<u8>) {
    (HEADERS, END_HEADERS, block)
}

/// A peer that speaks frame by frame: it takes every stream, answers with frames of ours, but to the first stream of a
/// connection with 200, and echoes.
struct Scripted {
    /// The connection and the number of each stream so far.
    streams: Arc<Mutex<Vec<(usize, u32)>>>,
    /// How many SETTINGS were acknowledged, the first of each connection included.
    acknowledged: Arc<AtomicU64>,
    /// SETTINGS for the first connection.
    settings: watch::Sender<Option<u32>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// SETTINGS_MAX_CONCURRENT_STREAMS (RFC 9113 section 6.5.2), and one that nobody knows.
fn max_streams(most: u32) -> Vec<u8> {
    let mut out = vec![0, 3];
    out.extend(most.to_be_bytes());
    out.extend([0xf0, 0xf0, 1, 2, 3, 4]);
    out
}

impl Scripted {
    fn start(world: &World, who: &Credentials, answer: Answer) -> Result<Self> {
        let acceptor = hop::acceptor(who)?;
        let (streams, acknowledged) = (Arc::default(), Arc::new(AtomicU64::new(0)));
        let (settings, told) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let (tell, ready) = mpsc::channel();
        let (noted, counted) = (Arc::clone(&streams), Arc::clone(&acknowledged));
        let thread = world.net().spawn("scripted", move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            task::LocalSet::new().block_on(&runtime, async {
                let listener = TcpListener::bind(HBONE).await?;
                tell.send(())?;
                tokio::select! {
                    served = accept(listener, acceptor, Rc::new(answer), noted, counted, told) => served,
                    _ = stopped => Ok(()),
                }
            })
        })?;
        ready.recv_timeout(PATIENCE).context("it does not listen")?;
        Ok(Self { streams, acknowledged, settings, stop: Some(stop), thread: Some(thread) })
    }

    /// Changes the limit of the first connection, and waits until it is acknowledged.
    fn allows(&self, most: u32) -> Result<()> {
        let before = self.acknowledged.load(Ordering::Relaxed);
        self.settings.send_replace(Some(most));
        wait_for("SETTINGS to be acknowledged", PATIENCE, || {
            (self.acknowledged.load(Ordering::Relaxed) > before).then_some(())
        })
    }

    /// How many streams each connection has had.
    fn counts(&self) -> Vec<usize> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let last = streams.iter().map(|(connection, _)| *connection).max().unwrap_or(0);
        (1..=last).map(|n| streams.iter().filter(|(connection, _)| *connection == n).count()).collect()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Ok(Err(e))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("the scripted peer: {e:#}");
        }
    }
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    answer: Rc<Answer>,
    streams: Arc<Mutex<Vec<(usize, u32)>>>,
    acknowledged: Arc<AtomicU64>,
    told: watch::Receiver<Option<u32>>,
) -> Result<()> {
    for number in 1.. {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let (acceptor, answer, streams) = (acceptor.clone(), Rc::clone(&answer), Arc::clone(&streams));
        let (acknowledged, mut told) = (Arc::clone(&acknowledged), told.clone());
        task::spawn_local(async move {
            let (sender, mut receiver) = raw::accept(acceptor.accept(tcp).await?, &max_streams(100)).await?;
            let sender = Rc::new(tokio::sync::Mutex::new(sender));
            let ended = answer.iter().any(|(_, flags, _)| flags & END_STREAM != 0);
            // An interim answer opens nothing: an echo behind it would be bytes in front of the answer.
            let opens = answer.iter().any(|(_, _, block)| *block != field(b":status", b"101"));
            let settling = Rc::clone(&sender);
            let settings = task::spawn_local(async move {
                while number == 1 && told.changed().await.is_ok() {
                    let most = *told.borrow_and_update();
                    let payload = max_streams(most.unwrap_or(100));
                    settling.lock().await.frame(SETTINGS, 0, 0, &payload).await?;
                }
                anyhow::Ok(())
            });
            while let Some(frame) = receiver.frame().await? {
                let mut sender = sender.lock().await;
                match (frame.kind, frame.flags & ACK != 0) {
                    (SETTINGS, false) => sender.frame(SETTINGS, ACK, 0, &[]).await?,
                    (SETTINGS, true) => drop(acknowledged.fetch_add(1, Ordering::Relaxed)),
                    (PING, false) => sender.frame(PING, ACK, 0, &frame.payload).await?,
                    (HEADERS, _) => {
                        streams.lock().unwrap_or_else(PoisonError::into_inner).push((number, frame.stream));
                        let good = vec![whole(vec![OK])];
                        for (kind, flags, payload) in if frame.stream == 1 { &good } else { &*answer } {
                            sender.frame(*kind, *flags, frame.stream, payload).await?;
                        }
                    }
                    // Nothing comes behind an end.
                    (DATA, _) if frame.stream != 1 && (ended || !opens) => {}
                    // END_STREAM is echoed too.
                    (DATA, _) => sender.frame(DATA, frame.flags, frame.stream, &frame.payload).await?,
                    _ => {}
                }
            }
            // It holds the connection open.
            settings.abort();
            anyhow::Ok(())
        });
    }
    Ok(())
}

/// `:status: 200`, which the static table has at 8.
const OK: u8 = 0x88;

/// A changed limit of concurrent streams of a peer is honoured at once.
#[test]
fn what_a_peer_allows_in_streams_holds_when_it_changes() -> Result<()> {
    let world = World::new()?;
    let peer = Scripted::start(&world, &waypoint(&world)?, vec![whole(vec![OK])])?;
    let mut app = world.exec_with(&agent(&world)?).spawn_app(&["hold", "10.200.0.10:80"])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    assert_eq!(ask(app.process(), "again")?, "ok");
    assert_eq!(peer.counts(), [2], "both are on one connection");
    // No more than the one that is there.
    peer.allows(1)?;
    assert_eq!(ask(app.process(), "again")?, "ok");
    assert_eq!(ask(app.process(), "again")?, "ok");
    assert_eq!(peer.counts(), [2, 2], "new streams are elsewhere");
    assert_eq!(ask(app.process(), "ping")?, "ok", "the old one goes on");
    // Fewer than there are, which ends none of them.
    peer.allows(0)?;
    assert_eq!(ask(app.process(), "ping")?, "ok", "the old one goes on");
    assert_eq!(ask(app.process(), "again")?, "ok");
    assert_eq!(peer.counts(), [2, 3]);
    // As many as in the beginning: there is room on the first again.
    peer.allows(100)?;
    assert_eq!(ask(app.process(), "again")?, "ok");
    assert_eq!(peer.counts(), [3, 3], "what is allowed is used");
    let done = app.finish()?;
    assert!(done.success() && !done.stdout.contains("ECONNRESET"), "{done}");
    Ok(())
}

/// Unknown headers of a peer's answer are ignored.
#[test]
fn what_an_answer_says_that_we_do_not_know_is_ignored() -> Result<()> {
    let ok = |fields: &[(&str, &str)]| {
        let fields = fields.iter().flat_map(|(name, value)| field(name.as_bytes(), value.as_bytes()));
        [OK].into_iter().chain(fields).collect::<Vec<u8>>()
    };
    let known_to_others = [("x-envoy-upstream-service-time", "1"), ("server", "envoy"), ("date", "never")];
    let odd = [("proxy-status", "\""), ("content-type", "x"), ("set-cookie", "a=b"), ("set-cookie", "c=d")];
    let early = [field(b":status", b"103"), field(b"link", b"</style.css>")].concat();
    let world = World::new()?;
    let (who, exec) = (waypoint(&world)?, world.exec_with(&agent(&world)?));
    for (what, answer) in [
        ("fields of others", vec![whole(ok(&known_to_others))]),
        ("fields that make no sense here", vec![whole(ok(&odd))]),
        ("another status of success", vec![whole(field(b":status", b"201"))]),
        ("an early hint", vec![whole(early), whole(ok(&[]))]),
    ] {
        let _peer = Scripted::start(&world, &who, answer)?;
        let done = exec.run_app(&["many", "10.200.0.10:80", "3", "1000"])?;
        assert!(done.success(), "{what}: {done}");
    }
    Ok(())
}

/// A malformed answer to CONNECT resets its flow, and the peer stays usable.
#[test]
fn an_answer_that_is_none_resets_its_flow_and_the_peer_can_be_asked_again() -> Result<()> {
    const FAILS: &str = "ECONNRESET";
    let world = World::new()?;
    let (who, exec) = (waypoint(&world)?, world.exec_with(&agent(&world)?));
    let status = |code: &str| whole(field(b":status", code.as_bytes()));
    let ok = |name: &str, value: &str| whole([vec![OK], field(name.as_bytes(), value.as_bytes())].concat());
    let long = (0..20).flat_map(|_| field(b"x", &[b'y'; 1000]));
    let parts: Vec<u8> = [OK].into_iter().chain(long).collect();
    let (first, rest) = parts.split_at(16 * 1024);
    let long = vec![(HEADERS, 0, first.to_vec()), (CONTINUATION, END_HEADERS, rest.to_vec())];
    let refused = 7u32.to_be_bytes().to_vec();
    let mut wrong = Vec::new();
    // What the flow sees, and whether the connection's other stream goes on.
    for (what, answer, sees, lives) in [
        ("no :status", vec![whole(field(b"server", b"x"))], FAILS, true),
        ("two :status", vec![whole(vec![OK, OK])], FAILS, true),
        ("a :status that is none", vec![status("ok")], FAILS, false),
        ("a :status too short", vec![status("20")], FAILS, false),
        ("a status of HTTP/1", vec![status("101")], FAILS, true),
        ("Transfer-Encoding", vec![ok("transfer-encoding", "chunked")], FAILS, true),
        ("a line feed in a value", vec![ok("x", "a\nb")], FAILS, false),
        ("an upper-case name", vec![ok("X", "a")], FAILS, false),
        ("a head of 20 KiB", long, FAILS, true),
        ("a redirection", vec![status("302")], FAILS, true),
        ("a refusal that goes on", vec![status("403"), (DATA, 0, b"because".to_vec())], FAILS, true),
        ("a refusal with its end", vec![(HEADERS, END_HEADERS | END_STREAM, vec![0x8d])], FAILS, true),
        ("an end at once", vec![(HEADERS, END_HEADERS | END_STREAM, vec![OK])], "EOF", true),
        ("bytes in front of the answer", vec![(DATA, 0, b"early".to_vec())], FAILS, false),
        ("a stream that is refused, each time", vec![(RST_STREAM, 0, refused)], FAILS, true),
    ] {
        let _peer = Scripted::start(&world, &who, answer)?;
        let mut app = exec.spawn_app(&["hold", "10.200.0.10:80"])?;
        app.says("held=1")?;
        assert_eq!(ask(app.process(), "ping")?, "ok", "{what}");
        let saw = ask(app.process(), "again")?;
        let lived = ask(app.process(), "ping")? == "ok";
        // On another connection, where this one is gone.
        let again = if lived { "ok".to_owned() } else { ask(app.process(), "again")? };
        if (saw.as_str(), lived, again.as_str()) != (sees, lives, "ok") {
            wrong.push(format!("{what}: {saw}, the other stream lives: {lived}, again: {again}"));
        }
        assert!(app.finish()?.success(), "{what}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Where this is not as RFC 9110 section 9.3.6 wants it: a Content-Length in a 200 to CONNECT, which has no content, is
/// held against the tunnel's bytes by the HTTP/2 library (the book, "Envoy and HBONE"). A flow whose bytes are as many goes on;
/// one that has more is reset, by itself.
#[test]
fn a_content_length_in_a_200_over_http_2_bounds_its_flow_and_no_other() -> Result<()> {
    let world = World::new()?;
    let (who, exec) = (waypoint(&world)?, world.exec_with(&agent(&world)?));
    for (length, sees) in [("1", "ok"), ("0", "ECONNRESET")] {
        let answer = whole([vec![OK], field(b"content-length", length.as_bytes())].concat());
        let _peer = Scripted::start(&world, &who, vec![answer])?;
        let mut app = exec.spawn_app(&["hold", "10.200.0.10:80"])?;
        app.says("held=1")?;
        assert_eq!(ask(app.process(), "again")?, sees, "one byte comes back, and {length} was announced");
        assert_eq!(ask(app.process(), "ping")?, "ok", "the other stream goes on");
        assert!(app.finish()?.success());
    }
    Ok(())
}

/// A peer that offers such windows, takes what comes, and gives nothing back until it is told; all of it is checked.
async fn offering(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    taken: Arc<AtomicU64>,
    mut generous: watch::Receiver<bool>,
) -> Result<u64> {
    let (tcp, _) = listener.accept().await?;
    let mut connection = h2::server::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake::<_, bytes::Bytes>(acceptor.accept(tcp).await?)
        .await?;
    let (request, mut respond) = connection.accept().await.context("no request")??;
    let driving = task::spawn_local(async move { while connection.accept().await.is_some() {} });
    let mut send = respond.send_response(http::Response::new(()), false)?;
    let mut body = request.into_body();
    let (mut at, mut held) = (0, 0);
    loop {
        tokio::select! {
            chunk = body.data() => {
                let Some(chunk) = chunk.transpose()? else { break };
                UP.check(at, &chunk)?;
                at += chunk.len() as u64;
                held += chunk.len();
                taken.store(at, Ordering::Relaxed);
            }
            told = generous.wait_for(|yes| *yes), if !*generous.borrow() => drop(told?),
        }
        if *generous.borrow() {
            body.flow_control().release_capacity(held)?;
            held = 0;
        }
    }
    send.send_data(bytes::Bytes::new(), true)?;
    driving.await?;
    Ok(at)
}

/// A flow control window of 16 MiB that a peer offers is used.
#[test]
fn a_window_of_16_mib_that_a_peer_offers_is_used() -> Result<()> {
    const OFFERED: u64 = 20 << 20;
    let world = World::new()?;
    let acceptor = hop::acceptor(&waypoint(&world)?)?;
    let taken = Arc::new(AtomicU64::new(0));
    let (tell, told) = watch::channel(false);
    let (ready, is_ready) = mpsc::channel();
    let counted = Arc::clone(&taken);
    let peer = world.net().spawn("peer", move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        task::LocalSet::new().block_on(&runtime, async {
            let listener = TcpListener::bind(HBONE).await?;
            ready.send(())?;
            tokio::time::timeout(2 * PATIENCE, offering(listener, acceptor, counted, told)).await?
        })
    })?;
    is_ready.recv_timeout(PATIENCE).context("it does not listen")?;
    let exec = world.exec_with(&agent(&world)?);
    let mut app = exec.spawn_app(&["half-close", "10.200.0.10:80", &OFFERED.to_string()])?;
    wait_for("the whole window to be in flight", PATIENCE, || {
        (taken.load(Ordering::Relaxed) >= u64::from(WINDOW)).then_some(())
    })?;
    assert_eq!(taken.load(Ordering::Relaxed), u64::from(WINDOW), "and no more than that");
    assert!(app.process().ended()?.is_none());
    tell.send_replace(true);
    // It has answered with its end and nothing else.
    assert_eq!(app.finish()?.value("answer")?, "0");
    assert_eq!(peer.join().ok().context("the peer panicked")??, OFFERED);
    Ok(())
}
