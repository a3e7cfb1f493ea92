//! Requests that are none, or that could be read in two ways: each gets the answer that RFC 9113 and RFC 9112 have for
//! it, and neither the connection's other streams nor anybody else notices.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail, ensure};
use tunnel_tests::{
    Gateway, NET4, TARGET4, Target, World,
    daemon::Daemon,
    dialogue::ask,
    exec::Running,
    peer,
    pki::Credentials,
    raw::{self, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, RST_STREAM, field},
    target,
};

/// Error codes of RFC 9113 section 7.
const PROTOCOL_ERROR: u32 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;
/// What every peer takes in one frame (RFC 9113 section 6.5.2).
const FRAME: usize = 16 * 1024;

/// Where a listener takes HTTP/1 in plaintext.
const PROXY: SocketAddr = SocketAddr::new(NET4, 3128);

/// What comes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comes {
    /// An answer with this status.
    Status(u16),
    /// A stream error of this code: the connection lives on.
    Reset(u32),
    /// A connection error of this code.
    Goaway(u32),
}
use Comes::{Goaway, Reset, Status};

/// A client that uses the connection for something else meanwhile.
struct Client {
    sender: raw::Sender,
    receiver: raw::Receiver,
    echo: String,
}

impl Client {
    async fn new(gateway: SocketAddr, who: &Credentials, echo: String) -> Result<Self> {
        let (sender, receiver) = raw::connect(gateway, who).await?;
        let mut me = Self { sender, receiver, echo };
        me.opens(1).await?;
        Ok(me)
    }

    /// Opens a tunnel on a stream, which works.
    async fn opens(&mut self, stream: u32) -> Result<()> {
        self.sender.frame(HEADERS, END_HEADERS, stream, &raw::connect_block(&self.echo)).await?;
        let answer = self.next(|f| f.stream == stream).await?;
        ensure!(answer.kind == HEADERS && raw::status(&answer.payload) == Some(200), "{answer:?}");
        self.echoes(stream).await
    }

    /// A tunnel that was opened works.
    async fn echoes(&mut self, stream: u32) -> Result<()> {
        self.sender.frame(DATA, 0, stream, b"hello").await?;
        let echo = self.next(|f| f.stream == stream).await?;
        ensure!(echo.kind == DATA && echo.payload == b"hello", "{echo:?}");
        Ok(())
    }

    /// The next frame of a kind.
    async fn next(&mut self, wanted: impl Fn(&Frame) -> bool) -> Result<Frame> {
        loop {
            let frame = self.receiver.frame().await?.context("the connection is closed")?;
            if wanted(&frame) {
                return Ok(frame);
            }
            ensure!(frame.kind != GOAWAY, "{frame:?}");
        }
    }

    /// Sends a head, in as many frames as it takes; what comes of it.
    async fn asks(&mut self, stream: u32, block: &[u8]) -> Result<Comes> {
        let mut parts = block.chunks(FRAME).peekable();
        let mut kind = HEADERS;
        loop {
            let part = parts.next().unwrap_or_default();
            let flags = if parts.peek().is_none() { END_HEADERS } else { 0 };
            self.sender.frame(kind, flags, stream, part).await?;
            if parts.peek().is_none() {
                break;
            }
            kind = CONTINUATION;
        }
        loop {
            let Some(frame) = self.receiver.frame().await? else { bail!("closed without a word") };
            match (frame.kind, frame.stream == stream) {
                (GOAWAY, _) => return Ok(Goaway(frame.code().context("a code")?)),
                (RST_STREAM, true) => return Ok(Reset(frame.code().context("a code")?)),
                (HEADERS, true) => {
                    let status = raw::status(&frame.payload).with_context(|| format!("{frame:?}"))?;
                    let over = frame.flags & END_STREAM != 0;
                    ensure!(over || status == 200, "{status}, and the stream goes on");
                    return Ok(Status(status));
                }
                _ => {}
            }
        }
    }
}

/// Somebody else, who must not notice anything.
struct Neighbour(Running);

impl Neighbour {
    fn new(mut app: Running) -> Result<Self> {
        app.says("held=1")?;
        let mut me = Self(app);
        me.does_not_notice("nothing")?;
        Ok(me)
    }

    fn does_not_notice(&mut self, what: &str) -> Result<()> {
        assert_eq!(ask(self.0.process(), "ping")?, "ok", "after {what} its flow goes on");
        Ok(())
    }
}

/// A head of these fields.
fn head(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| field(name.as_bytes(), value.as_bytes())).collect()
}

/// Heads that ought to be CONNECT for `to`, and what is to come of each.
fn heads(to: &str) -> Vec<(&'static str, Vec<u8>, Comes)> {
    const CONNECT: (&str, &str) = (":method", "CONNECT");
    let is = (":authority", to);
    let mut table = Vec::new();
    let mut row = |what, fields: &[(&str, &str)], comes| table.push((what, head(fields), comes));
    // What the library takes for the end of the connection is in the other table.

    // Pseudo-header fields: RFC 9113 sections 8.1.1, 8.3, 8.5.
    row("two :method", &[CONNECT, CONNECT, is], Reset(PROTOCOL_ERROR));
    row("two :method that differ", &[CONNECT, (":method", "GET"), is], Reset(PROTOCOL_ERROR));
    row("no :method", &[is], Reset(PROTOCOL_ERROR));
    row("two :authority", &[CONNECT, is, is], Reset(PROTOCOL_ERROR));
    row(
        "two :authority that differ",
        &[CONNECT, is, (":authority", "10.200.0.11:80")],
        Reset(PROTOCOL_ERROR),
    );
    row("no :authority", &[CONNECT], Status(400));
    row("no :authority but a Host", &[CONNECT, ("host", to)], Status(400));
    row("a :scheme", &[CONNECT, (":scheme", "https"), is], Reset(PROTOCOL_ERROR));
    row("a :path", &[CONNECT, is, (":path", "/")], Reset(PROTOCOL_ERROR));
    row("a :scheme and a :path", &[CONNECT, (":scheme", "https"), is, (":path", "/")], Reset(PROTOCOL_ERROR));
    let extended = [CONNECT, (":protocol", "websocket"), (":scheme", "https"), is, (":path", "/")];
    row("a :protocol", &extended, Reset(PROTOCOL_ERROR));
    row("a :status", &[CONNECT, is, (":status", "200")], Reset(PROTOCOL_ERROR));
    row("a pseudo-header field behind others", &[CONNECT, ("x", "y"), is], Reset(PROTOCOL_ERROR));

    // Other methods: RFC 9110 section 15.5.6.
    let get = |method| [(":method", method), (":scheme", "https"), is, (":path", "/")];
    row("GET", &get("GET"), Status(405));
    row("POST", &get("POST"), Status(405));
    row("connect", &get("connect"), Status(405));
    row("connect without a :path", &[(":method", "connect"), is], Reset(PROTOCOL_ERROR));

    // The authority: RFC 9110 sections 7.2, 9.3.6, 17.1.
    let long = format!("{}:80", "a".repeat(255));
    let longer = format!("{}:80", "a".repeat(20 * 1024));
    for (what, authority, comes) in [
        ("an empty :authority", "", Reset(PROTOCOL_ERROR)),
        ("an authority without a port", "10.200.0.10", Status(400)),
        ("a name without a port", "web.internal", Status(400)),
        ("an empty port", "10.200.0.10:", Status(400)),
        ("port 0", "10.200.0.10:0", Status(400)),
        ("port 65536", "10.200.0.10:65536", Status(400)),
        ("a port with a sign", "10.200.0.10:+80", Status(400)),
        ("a user", "user@10.200.0.10:80", Status(400)),
        ("a user and a password", "user:password@10.200.0.10:80", Status(400)),
        ("an IPv6 zone", "[fe80::1%25eth0]:80", Status(400)),
        ("an IPv6 zone as it is written elsewhere", "[fe80::1%eth0]:80", Status(400)),
        ("an IPv6 address without brackets", "fd00:200::10:80", Reset(PROTOCOL_ERROR)),
        ("an IPv6 address that is none", "[fd00:200::10::]:80", Status(400)),
        ("an address that some read as one", "127.1:80", Status(400)),
        ("a number that some read as an address", "0x7f000001:80", Status(400)),
        ("a name with a space", "web internal:80", Reset(PROTOCOL_ERROR)),
        ("a name with a NUL", "web\0internal:80", Reset(PROTOCOL_ERROR)),
        ("a name with a line feed", "web.internal:80\r\nx: y", Reset(PROTOCOL_ERROR)),
        ("a URI", "https://10.200.0.10:80/", Reset(PROTOCOL_ERROR)),
        ("a path", "10.200.0.10:80/", Reset(PROTOCOL_ERROR)),
        ("a name of 255 bytes", &long, Status(400)),
        ("a name of 20 KiB", &longer, Status(431)),
    ] {
        row(what, &[CONNECT, (":authority", authority)], comes);
    }

    // Fields: RFC 9113 sections 8.2.1, 8.2.2; RFC 9110 section 9.3.6.
    for (what, name, value, comes) in [
        ("Transfer-Encoding", "transfer-encoding", "chunked", Reset(PROTOCOL_ERROR)),
        ("Connection", "connection", "close", Reset(PROTOCOL_ERROR)),
        ("Keep-Alive", "keep-alive", "timeout=5", Reset(PROTOCOL_ERROR)),
        ("Proxy-Connection", "proxy-connection", "keep-alive", Reset(PROTOCOL_ERROR)),
        ("Upgrade", "upgrade", "websocket", Reset(PROTOCOL_ERROR)),
        ("TE other than trailers", "te", "gzip", Reset(PROTOCOL_ERROR)),
        ("Content-Length 0", "content-length", "0", Status(400)),
        ("Content-Length", "content-length", "5", Status(400)),
        ("a Content-Length that is none", "content-length", "five", Reset(PROTOCOL_ERROR)),
    ] {
        row(what, &[CONNECT, is, (name, value)], comes);
    }
    let two = [CONNECT, is, ("content-length", "5"), ("content-length", "6")];
    row("two Content-Length", &two, Reset(PROTOCOL_ERROR));
    table
}

/// Asks a gateway for each of these on a connection on which a tunnel is open; everything that was not right.
fn played(
    world: &World,
    gateway: &Gateway<'_>,
    target: &Target,
    table: Vec<(&'static str, u32, Vec<u8>, Comes)>,
) -> Result<Vec<String>> {
    let (addr, who, echo) = (gateway.addr(), world.pki().named("node"), target.addr().to_string());
    let mut neighbour = Neighbour::new(world.exec(gateway).spawn_app(&["hold", &echo])?)?;
    let mut wrong = Vec::new();
    for (what, stream, block, right) in table {
        let (who, echo) = (&who, echo.clone());
        let came = world.node().block_on(|| async move {
            let mut client = Client::new(addr, who, echo).await?;
            let came = client.asks(stream, &block).await?;
            if !matches!(came, Goaway(_)) {
                client.echoes(1).await.context("the connection's other stream")?;
                client.opens(stream + 2).await.context("a new stream")?;
            }
            anyhow::Ok(came)
        });
        match came {
            Ok(came) if came == right => {}
            other => wrong.push(format!("{what}: {other:?}, not {right:?}")),
        }
        neighbour.does_not_notice(what)?;
    }
    Ok(wrong)
}

/// A malformed request over HTTP/2 fails its own stream only.
///
/// Failure: hostile-peers.
#[test]
fn a_bad_head_over_http_2_is_refused_and_the_other_streams_of_its_connection_go_on() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let table = heads(&target.addr().to_string());
    let lives = |comes: &Comes| !matches!(comes, Goaway(_));
    let opened: usize = table.iter().map(|(_, _, comes)| 1 + usize::from(lives(comes))).sum();
    let table = table.into_iter().map(|(what, block, comes)| (what, 3, block, comes)).collect();
    let wrong = played(&world, &gateway, &target, table)?;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(target.peers().len(), 1 + opened, "no bad head reached the target");
    Ok(())
}

/// An error of the HTTP/2 connection closes that connection and no other.
///
/// Failure: hostile-peers.
#[test]
fn what_breaks_http_2_for_every_stream_ends_its_own_connection_only() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let to = target.addr().to_string();
    let good = raw::connect_block(&to);
    let with = |name: &str, value: &str| [good.clone(), field(name.as_bytes(), value.as_bytes())].concat();
    let long = head(&[(":method", "CONNECT"), (":authority", &format!("{}:80", "a".repeat(64 * 1024)))]);
    // RFC 9113 sections 4.3, 5.1.1, 10.5.1. The library says PROTOCOL_ERROR where it could say COMPRESSION_ERROR, and
    // gives the connection up for a field that is none, where an error of the stream would do (section 8.1.1).
    let table: Vec<_> = [
        ("a stream of the server's", 2, good.clone()),
        ("stream 0", 0, good.clone()),
        ("index 0", 3, vec![0x80]),
        ("an index that is not there", 3, vec![0xff, 0x80, 0x7f]),
        ("a string that is cut off", 3, vec![0, 5, b'x']),
        ("a Huffman code that is none", 3, vec![0, 0x81, 0x00, 0x84, 0xff, 0xff, 0xff, 0xff]),
        ("an empty :method", 3, head(&[(":method", ""), (":authority", &to)])),
        ("an unknown pseudo-header field", 3, with(":foo", "bar")),
        ("a NUL in a value", 3, with("x", "a\0b")),
        ("a carriage return in a value", 3, with("x", "a\rb")),
        ("a line feed in a value", 3, with("x", "a\nb")),
        ("a field in a value", 3, with("x", "a\r\ny: b")),
        ("a NUL in a name", 3, with("x\0y", "a")),
        ("a line feed in a name", 3, with("x\r\ny", "a")),
        ("a space in a name", 3, with("x y", "a")),
        ("a colon in a name", 3, with("x:y", "a")),
        ("an upper-case name", 3, with("X-Route", "a")),
        ("an empty name", 3, with("", "a")),
    ]
    .into_iter()
    .map(|(what, stream, block)| (what, stream, block, Goaway(PROTOCOL_ERROR)))
    .chain([("a name of 64 KiB", 3, long, Goaway(ENHANCE_YOUR_CALM))])
    .collect();
    let opened = table.len();
    let wrong = played(&world, &gateway, &target, table)?;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(target.peers().len(), 1 + opened, "no bad head reached the target");
    Ok(())
}

/// A second request on an established stream ends the stream and is never dialled.
///
/// Failure: hostile-peers.
#[test]
fn a_second_head_on_a_tunnel_ends_it_and_is_never_a_request() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let (target, other) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET4, target::echo())?);
    let (addr, who, echo) = (gateway.addr(), world.pki().named("node"), target.addr().to_string());
    let block = raw::connect_block(&other.addr().to_string());
    let came = world.node().block_on(|| async move {
        let mut client = Client::new(addr, &who, echo).await?;
        client.opens(3).await?;
        let came = client.asks(3, &block).await?;
        client.echoes(1).await.context("the connection's other stream")?;
        anyhow::Ok(came)
    })?;
    assert_eq!(came, Reset(PROTOCOL_ERROR));
    assert_eq!((target.peers().len(), other.peers().len()), (2, 0));
    Ok(())
}

/// A malformed or unsupported HTTP/1 request is answered and its connection closed; other connections are not
/// affected.
///
/// Failure: hostile-peers.
#[test]
fn what_is_no_connect_request_over_http_1_is_answered_and_closed_and_nobody_else_notices() -> Result<()> {
    let world = World::new()?;
    let config = format!(
        "[[listener]]\naddress = \"{PROXY}\"\nprotocols = [\"h1\"]\ntls = false\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24:1024-65535\"]\n"
    );
    let mut daemon = Daemon::start(&world, world.net(), &config)?;
    let target = world.serve(TARGET4, target::echo())?;
    let to = target.addr().to_string();
    let config = format!(
        "[[route]]\nto = [{{ upstream = \"next\" }}]\n[[upstream]]\nname = \"next\"\n\
         endpoints = [\"{PROXY}\"]\nprotocol = \"h1\"\ntls = false\n"
    );
    let exec = world.exec_with(&world.file("agent.toml", config)?);
    let mut neighbour = Neighbour::new(exec.spawn_app(&["hold", &to])?)?;
    let connect = |fields: &str| format!("CONNECT {to} HTTP/1.1\r\n{fields}\r\n");
    let long = connect(&format!("x: {}\r\n", "y".repeat(20_000)));
    let endless = format!("CONNECT {to} HTTP/1.1\r\n{}", "x: y\r\n".repeat(5_000));
    // RFC 9112 sections 2.2, 3, 5, 6.1; RFC 9110 sections 7.2, 9.3.6.
    let table: Vec<(String, u16)> = vec![
        (connect(""), 200),
        (connect(&format!("Host: {to}\r\n")), 200),
        // A recipient may take a single line feed for the end of a line.
        (format!("CONNECT {to} HTTP/1.1\nx: y\n\n"), 200),
        (format!("CONNECT  {to} HTTP/1.1\r\n\r\n"), 400),
        (format!("CONNECT\t{to} HTTP/1.1\r\n\r\n"), 400),
        (format!("CONNECT {to}\r\n\r\n"), 400),
        (format!("CONNECT {to} HTTP/1.2\r\n\r\n"), 400),
        (format!("CONNECT {to} HTTP/2.0\r\n\r\n"), 400),
        (format!("connect {to} HTTP/1.1\r\n\r\n"), 405),
        (format!("CONNECT / HTTP/1.1\r\nHost: {to}\r\n\r\n"), 400),
        (connect("x : a\r\n"), 400),
        (connect(" x: a\r\n"), 400),
        (connect("x\r\n"), 400),
        (connect(": a\r\n"), 400),
        (connect("x y: a\r\n"), 400),
        (connect("x: a\r\n\tfolded\r\n"), 400),
        (connect("Content-Length: 5\r\nContent-Length: 5\r\n"), 400),
        (connect("Content-Length: +5\r\n"), 400),
        (connect("Transfer-Encoding: identity\r\n"), 400),
        (connect("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"), 400),
        (connect("Transfer-Encoding: \x0bchunked\r\n"), 400),
        (connect(&format!("Host: {to}\r\nHost: {to}\r\n")), 400),
        (connect("Host:\r\n"), 400),
        (format!("CONNECT {} HTTP/1.1\r\n\r\n", "a".repeat(20_000)), 414),
        (format!("{} / HTTP/1.1\r\n\r\n", "A".repeat(20_000)), 414),
        (format!("CONNECT {TARGET4} HTTP/1.1\r\n\r\n"), 400),
        (format!("CONNECT {TARGET4}:0 HTTP/1.1\r\n\r\n"), 400),
        (format!("CONNECT {TARGET4}:65536 HTTP/1.1\r\n\r\n"), 400),
        (format!("CONNECT me@{to} HTTP/1.1\r\n\r\n"), 400),
        ("CONNECT [fe80::1%25eth0]:80 HTTP/1.1\r\n\r\n".to_owned(), 400),
        (format!("CONNECT {to}\0 HTTP/1.1\r\n\r\n"), 400),
        (connect("x: a\rb\r\n"), 400),
        (connect("x: a\r\n folded\r\n"), 400),
        (connect("x: a\0\r\n"), 400),
        (connect("Content-Length: 0\r\n"), 400),
        (connect("Content-Length: 1\r\nContent-Length: 2\r\n"), 400),
        (connect("Transfer-Encoding: chunked\r\n"), 400),
        (connect("Host: 10.200.0.11:80\r\n"), 400),
        (format!("CONNECT http://{to}/ HTTP/1.1\r\n\r\n"), 400),
        (format!("CONNECT {} HTTP/1.1\r\n\r\n", "a".repeat(10_000)), 400),
        (format!("CONNECT {to} HTTP/1.1\r\n{}: x\r\n\r\n", "a".repeat(10_000)), 200),
        (long, 431),
        (endless, 431),
        (connect(&"x: y\r\n".repeat(101)), 431),
        (format!("GET http://{to}/ HTTP/1.1\r\nHost: {to}\r\n\r\n"), 405),
        ("POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".to_owned(), 405),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), 400),
        ("\u{16}\u{3}\u{1}\u{2}\0hello".to_owned(), 400),
        ("CONNECT 10.200.0.10:81 HTTP/1.1\r\n\r\n".to_owned(), 403),
        ("CONNECT 169.254.169.254:80 HTTP/1.1\r\n\r\n".to_owned(), 403),
        (format!("CONNECT {PROXY} HTTP/1.1\r\n\r\n"), 403),
        ("CONNECT 10.200.0.10:1024 HTTP/1.1\r\n\r\n".to_owned(), 502),
    ];
    let mut wrong = Vec::new();
    for (said, status) in &table {
        let shown = &said[..said.len().min(80)];
        // An echo ends when we do.
        let heard = peer::say_and_hear(world.node(), PROXY, said.as_bytes(), *status == 200)?;
        let is = |text: &str| *status == 200 || heard.contains(text);
        let right = heard.starts_with(&format!("HTTP/1.1 {status} "))
            && is("\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            && is("\r\nproxy-status: tunnel; error=")
            && (*status != 405 || is("\r\nallow: CONNECT\r\n"));
        if !right {
            wrong.push(format!("{shown:?}: {heard:?}, not {status}"));
        }
        neighbour.does_not_notice(shown)?;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // A request that ends before it is whole gets no answer.
    assert_eq!(peer::say_and_hear(world.node(), PROXY, b"CONNECT ", true)?, "");
    assert_eq!(ask(neighbour.0.process(), "again")?, "ok", "and it can have another");
    let let_through = table.iter().filter(|(_, status)| *status == 200).count();
    assert_eq!(target.peers().len(), 2 + let_through, "nobody else was let through");
    daemon.process().wait_for_line("closed before the head was complete")?;
    Ok(())
}
