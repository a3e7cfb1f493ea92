//! The PROXY protocol: in front of our listeners, and in front of targets.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::Request;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;
use tunnel_tests::{
    NET4, NODE4, PATIENCE, TARGET4, World,
    daemon::{Daemon, through},
    gateway,
    hop::Hop,
    peer::{self, connect_request},
    pki::{GATEWAY_ID, NODE_ID},
    target,
};

const SECURE: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
const PLAIN: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 1);
const NEXT: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 2);
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// What targets are told a name by, and an identity.
const TLV_AUTHORITY: u8 = 0x02;
const TLV_IDENTITY: u8 = 0xE5;

/// A gateway of ours whose listeners, with TLS and without, are behind a balancer.
fn gateway(world: &World, routes: &str) -> Result<Daemon> {
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{SECURE}\"\nproxy_protocol = true\n\
         [[listener]]\naddress = \"{PLAIN}\"\ntls = false\nprotocols = [\"h2\", \"h1\"]\nproxy_protocol = true\n\
         [[upstream]]\nname = \"next\"\nendpoints = [\"{NEXT}\"]\nverify = [\"{GATEWAY_ID}\"]\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\", \"*.internal\"]\n{routes}",
        world.pki().named("gateway").toml()
    );
    Daemon::start(world, world.net(), &config)
}

/// A header of version 2.
fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).expect("it is short").to_be_bytes();
    [SIGNATURE, &[command, family], &length, block].concat()
}

/// Sends a header byte by byte, then speaks HTTP/2, with TLS or without.
async fn after(header: &[u8], world: &World, tls: bool) -> Result<http::StatusCode> {
    let mut tcp = tokio::net::TcpStream::connect(if tls { SECURE } else { PLAIN }).await?;
    tcp.set_nodelay(true)?;
    for byte in header {
        tcp.write_all(&[*byte]).await?;
        tokio::task::yield_now().await;
    }
    if tls {
        let name = ServerName::IpAddress(NET4.into());
        let config = peer::tls(&world.pki().named("node"))?;
        ask(TlsConnector::from(config).connect(name, tcp).await?).await
    } else {
        ask(tcp).await
    }
}

async fn ask(wire: impl AsyncRead + AsyncWrite + Unpin + 'static) -> Result<http::StatusCode> {
    let (mut requests, connection) = h2::client::handshake(wire).await?;
    let driving = tokio::task::spawn_local(async move { connection.await.ok() });
    let (response, _send) = requests.send_request(connect_request("10.200.0.10:80")?, false)?;
    let status = response.await?.status();
    driving.abort();
    Ok(status)
}

fn forwarded(request: &Request<()>) -> String {
    request.headers()["forwarded"].to_str().unwrap_or_default().to_owned()
}

/// With `proxy_protocol` the client address is that of the PROXY header, whatever protocol follows.
#[test]
fn who_a_balancer_says_a_connection_is_from_is_the_client_whatever_is_spoken_behind_it() -> Result<()> {
    let world = World::new()?;
    let next = Hop::start(world.net(), NEXT, &world.pki().named("gateway"))?;
    let mut gateway = gateway(&world, "[[route]]\nto = [{ upstream = \"next\" }]\n")?;
    let one = b"PROXY TCP4 192.0.2.7 10.77.0.2 40000 15008\r\n".to_vec();
    let two = v2(0x21, 0x11, &[192, 0, 2, 7, 10, 77, 0, 2, 0x9c, 0x40, 0x3a, 0xa0, 0x20, 0, 2, 1, 0]);
    let local = v2(0x20, 0, &[]);
    let unknown = b"PROXY UNKNOWN\r\n".to_vec();
    let told = "for=192.0.2.7".to_owned();
    let socket = format!("for={NODE4}");
    let mut wanted = Vec::new();
    for tls in [true, false] {
        for (header, from) in [(&one, &told), (&two, &told), (&local, &socket), (&unknown, &socket)] {
            let world = &world;
            assert_eq!(world.node().block_on(|| after(header, world, tls))?, 200, "{tls} {header:?}");
            wanted.push(from.clone());
        }
    }
    // And HTTP/1, in one write with the header.
    let answer = world.node().run(|| -> io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(PLAIN)?;
        stream.write_all(&[&one[..], b"CONNECT 10.200.0.10:80 HTTP/1.1\r\n\r\n"].concat())?;
        let mut answer = vec![0; 12];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    })?;
    assert_eq!(answer, b"HTTP/1.1 200");
    wanted.push(told);
    assert_eq!(next.asked().iter().map(forwarded).collect::<Vec<_>>(), wanted);
    gateway.process().wait_for_line("client=192.0.2.7:40000")?;
    Ok(())
}

/// A connection without a valid PROXY header is closed, and others are not affected.
#[test]
fn a_connection_without_a_header_that_can_be_read_is_closed_and_nobody_else_notices() -> Result<()> {
    let world = World::new()?;
    let next = Hop::start(world.net(), NEXT, &world.pki().named("gateway"))?;
    let mut gateway = gateway(&world, "[[route]]\nto = [{ upstream = \"next\" }]\n")?;
    let connect = b"CONNECT 10.200.0.10:80 HTTP/1.1\r\n\r\n";
    for (bytes, said) in [
        (connect.to_vec(), "error=no PROXY header"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), "error=no PROXY header"),
        ([&b"PROXY TCP4 a b 1 2\r\n"[..], connect].concat(), "it has a wrong address"),
        (b"PROXY ".repeat(20), "longer than 107 bytes"),
        (v2(0x21, 0x11, &[0; 4]), "it is too short"),
        (v2(0x31, 0x11, &[0; 12]), "its version or command is none"),
        ([SIGNATURE, &[0x21, 0x11, 0xff, 0xff]].concat(), "longer than 4096 bytes"),
    ] {
        let heard = world.node().run(|| -> Result<usize> {
            let mut stream = TcpStream::connect(PLAIN)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&bytes)?;
            match stream.read(&mut [0; 64]) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(0),
                other => other.context("the connection is still open"),
            }
        })?;
        assert_eq!(heard, 0, "{bytes:?}");
        gateway.process().wait_for_line(said)?;
    }
    let world = &world;
    let good = b"PROXY TCP4 192.0.2.7 10.77.0.2 40000 15008\r\n";
    assert_eq!(world.node().block_on(|| after(good, world, true))?, 200);
    assert_eq!(next.asked().len(), 1);
    Ok(())
}

/// An incomplete PROXY header is ended after `handshake_timeout`.
#[test]
fn a_header_that_does_not_end_is_waited_for_no_longer_than_a_handshake() -> Result<()> {
    let world = World::new()?;
    let config = format!(
        "[daemon]\nworkers = 1\n[[listener]]\naddress = \"{PLAIN}\"\ntls = false\nproxy_protocol = true\n\
         handshake_timeout = \"300ms\"\n[[route]]\nto = \"direct\"\n"
    );
    let mut daemon = Daemon::start(&world, world.net(), &config)?;
    world.node().run(|| -> Result<()> {
        let mut stream = TcpStream::connect(PLAIN)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"PROXY TCP4")?;
        let ended =
            stream.read(&mut [0]).map_or_else(|e| e.kind() == io::ErrorKind::ConnectionReset, |n| n == 0);
        ensure!(ended, "the connection is still open");
        Ok(())
    })?;
    daemon.process().wait_for_line("no complete handshake within 300ms")?;
    Ok(())
}

/// What a target was told.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    client: SocketAddr,
    destination: SocketAddr,
    tlvs: Vec<(u8, String)>,
}

type Notes = Arc<Mutex<Vec<Told>>>;

fn notes(notes: &Notes) -> Vec<Told> {
    notes.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Reads a header of version 2 for IPv4, and notes it.
fn note(mut stream: &TcpStream, notes: &Notes) -> io::Result<()> {
    let mut fixed = [0; 16];
    stream.read_exact(&mut fixed)?;
    if !fixed.starts_with(SIGNATURE) || fixed[12..14] != [0x21, 0x11] {
        return Err(io::Error::other(format!("no header: {fixed:?}")));
    }
    let mut block = vec![0; usize::from(u16::from_be_bytes([fixed[14], fixed[15]]))];
    stream.read_exact(&mut block)?;
    let addr = |ip: usize, port: usize| {
        let ip = IpAddr::V4(Ipv4Addr::new(block[ip], block[ip + 1], block[ip + 2], block[ip + 3]));
        SocketAddr::new(ip, u16::from_be_bytes([block[port], block[port + 1]]))
    };
    let (mut tlvs, mut rest) = (Vec::new(), &block[12..]);
    while let [kind, high, low, behind @ ..] = rest {
        let (value, next) = behind.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        tlvs.push((*kind, String::from_utf8_lossy(value).into_owned()));
        rest = next;
    }
    let told = Told { client: addr(0, 8), destination: addr(4, 10), tlvs };
    notes.lock().unwrap_or_else(PoisonError::into_inner).push(told);
    Ok(())
}

/// A target with `proxy_protocol = "v2"` gets a PROXY header with client and identity, then every byte.
#[test]
fn a_target_is_told_who_comes_and_by_what_name_and_then_gets_every_byte() -> Result<()> {
    const BYTES: usize = 3_000_000;
    let world = World::new()?;
    let told = Notes::default();
    let noted = Arc::clone(&told);
    let echo = target::echo();
    let target = world.serve(TARGET4, move |stream: &TcpStream| {
        note(stream, &noted)?;
        echo(stream)
    })?;
    let addr = target.addr();
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{SECURE}\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\", \"*.internal\"]\n\
         [[route]]\nmatch = {{ host = [\"db.internal\"] }}\nto = {{ dial = \"{addr}\" }}\nproxy_protocol = \"v2\"\n\
         [[route]]\nto = \"direct\"\nproxy_protocol = \"v2\"\n",
        world.pki().named("gateway").toml()
    );
    let mut gateway = Daemon::start(&world, world.net(), &config)?;
    for authority in ["db.internal:5432".to_owned(), addr.to_string()] {
        let tls = peer::tls(&world.pki().named("node"))?;
        let request = connect_request(&authority)?;
        world.node().block_on(|| async move {
            let (mut requests, connection) = peer::connect(SECURE, tls).await?;
            let driving = tokio::task::spawn_local(connection);
            let (response, mut send) = requests.send_request(request, false)?;
            // At once, and more than a stream's window.
            let data = Bytes::from(vec![7; BYTES]);
            send.send_data(data.clone(), true)?;
            let mut body = response.await?.into_body();
            let mut back = 0;
            while let Some(chunk) = body.data().await {
                let chunk = chunk?;
                ensure!(chunk.iter().all(|byte| *byte == 7), "the header came back, or something else");
                back += chunk.len();
                body.flow_control().release_capacity(chunk.len())?;
            }
            ensure!(back == BYTES, "{back} bytes came back");
            driving.abort();
            Ok(())
        })?;
        let line = gateway.process().wait_for_line("reason=closed destination=")?;
        assert!(
            line.contains(&format!("sent={BYTES} received={BYTES}")),
            "the header is not the client's: {line}"
        );
    }
    let told = notes(&told);
    let [named, literal] = &told[..] else { panic!("{told:?}") };
    let identity = (TLV_IDENTITY, NODE_ID.to_owned());
    assert_eq!(named.tlvs, [(TLV_AUTHORITY, "db.internal".to_owned()), identity.clone()]);
    assert_eq!(literal.tlvs, [identity]);
    for told in [named, literal] {
        assert_eq!((told.client.ip(), told.destination), (NODE4, addr));
    }
    Ok(())
}

/// The PROXY header is sent before the client's first byte.
#[test]
fn a_target_that_speaks_first_is_told_before_the_client_has_said_a_word() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let told = Notes::default();
    let (noted, names) = (Arc::clone(&told), target::name_the_peer());
    let near = world.serve(NET4, move |stream: &TcpStream| {
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        note(stream, &noted)?;
        names(stream)
    })?;
    for relay in ["copy", "pipe", "splice"] {
        let config = format!(
            "[daemon]\nrelay = \"{relay}\"\n{}[[route]]\nmatch = {{ destination = [\"{NET4}/32\"] }}\n\
             to = \"direct\"\nproxy_protocol = \"v2\"\n{}",
            world.pki().named("node").toml(),
            through(SECURE, GATEWAY_ID)
        );
        let exec = world.exec_with(&world.file("agent.toml", config)?);
        let done = exec.run_app(&["names", &near.addr().to_string()])?;
        assert!(done.success(), "{done}");
    }
    let told = notes(&told);
    assert!(
        told.len() == 3 && told.iter().all(|t| t.destination == near.addr() && t.tlvs.is_empty()),
        "{told:?}"
    );
    Ok(())
}
