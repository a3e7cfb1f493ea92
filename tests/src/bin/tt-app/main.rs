//! The application of the tests: it connects by ordinary system calls, as any program would, and knows nothing of
//! tunnels.
//!
//! Each subcommand prints lines `KEY=VALUE` on standard output. The exit status is 0 only if everything went as the
//! subcommand says.

mod beside;
mod elsewhere;
mod escape;
mod groups;
mod marks;
mod numbers;
mod options;
mod stuck;
mod uring;
mod ways;

use std::{
    collections::HashMap,
    env,
    io::{self, BufRead as _, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::{Command, ExitCode},
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use self::beside::{burst, churn, now_and_then};
use self::elsewhere::{
    by_a_socket_of_nobodys, from_a_new_namespace, from_a_thread, many_namespaces, new_namespaces,
};
use self::escape::{escape, escape_once};
use self::groups::{incarnations, socket_from_outside};
use self::marks::{impostor, marked};
use self::numbers::{hold_many, many_short, short_by_turns};
use self::options::{bind_range, options, sock_names};
use self::stuck::{offer, read_late, stick};
use self::ways::{again, bound, fastopen, fastopen_sendto, mptcp, nonblocking, v4mapped};
use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        socket::{getsockopt, sockopt},
    },
};
use tunnel_tests::{
    pattern::{DOWN, UP},
    target::reset,
};

/// No answer by then is none.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("failed={e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["duplex", addr, bytes] => duplex(&open(addr)?, bytes.parse()?),
        ["hold", addr] => hold(addr),
        ["many", addr, connections, bytes] => many(addr.parse()?, connections.parse()?, bytes.parse()?),
        ["keep-connecting", addr] => keep_connecting(addr),
        ["half-close", addr, bytes] => half_close(&open(addr)?, bytes.parse()?),
        ["hear-end", addr, bytes] => hear_end(&open(addr)?, bytes.parse()?),
        ["hear-end-first", addr, bytes] => hear_end_first(&open(addr)?, bytes.parse()?),
        ["expect-reset", addr, bytes] => expect_reset(addr, bytes.parse()?),
        ["write", addr, bytes] => Ok(UP.send(&mut &open(addr)?, bytes.parse()?)?),
        ["reset", addr, bytes] => reset_after(&open(addr)?, bytes.parse()?),
        ["reset-unanswered", addr, bytes] => reset_unanswered(&open(addr)?, bytes.parse()?),
        ["names", addr] => names(&open(addr)?),
        ["connect-error", addr] => connect_error(addr.parse()?),
        ["v4mapped", addr, bytes] => duplex(&v4mapped(addr.parse()?)?, bytes.parse()?),
        ["nonblocking", addr, bytes] => duplex(&nonblocking(addr.parse()?)?, bytes.parse()?),
        ["bound", addr, local, bytes] => duplex(&bound(addr.parse()?, local.parse()?)?, bytes.parse()?),
        ["fastopen", addr, bytes] => duplex(&fastopen(addr.parse()?)?, bytes.parse()?),
        ["fastopen-sendto", addr, bytes] => duplex(&fastopen_sendto(addr.parse()?)?, bytes.parse()?),
        ["mptcp", addr] => mptcp(addr.parse()?),
        ["again", first, second] => again(first.parse()?, second.parse()?),
        ["tree", addr, bytes, depth] => tree(addr, bytes, depth.parse()?),
        ["udp", addr] => udp(addr.parse()?),
        ["offer", addr, ping, bytes] => offer(addr, ping, bytes.parse()?),
        ["stick", addr, ping, connections] => stick(addr, ping, connections.parse()?),
        ["soak", addr, seconds, seed] => soak(&open(addr)?, seconds.parse()?, seed.parse()?),
        ["read-late", addr, ping, bytes] => read_late(addr, ping, bytes.parse()?),
        ["reconnect", addr] => reconnect(addr),
        ["churn", addr, threads] => churn(addr.parse()?, threads.parse()?),
        ["burst", addr, connections] => burst(addr, connections.parse()?),
        ["now-and-then", addr, connections, pause] => {
            now_and_then(addr, connections.parse()?, pause.parse()?)
        }
        ["swarm", addr, connections] => swarm(addr, connections.parse()?),
        ["incarnations", parent, name, inside, beside, times] => {
            incarnations(parent.as_ref(), name, inside.parse()?, beside.parse()?, times.parse()?)
        }
        ["socket-from-outside", group, addr] => socket_from_outside(group.as_ref(), addr.parse()?),
        ["options", rest @ ..] => options(rest),
        ["many-short", addr, connections, how] => many_short(addr.parse()?, connections.parse()?, how),
        ["short-by-turns", connections, targets @ ..] => short_by_turns(connections.parse()?, targets),
        ["hold-many", each, targets @ ..] => hold_many(each.parse()?, targets),
        ["marked", addr, mark] => marked(addr.parse()?, mark.parse()?),
        ["impostor", mark, addresses @ ..] => impostor(mark.parse()?, addresses),
        ["from-a-new-namespace", addr] => from_a_new_namespace(addr.parse()?),
        ["new-namespaces", addr, times] => new_namespaces(addr, times.parse()?),
        ["from-a-thread", addr] => from_a_thread(addr.parse()?),
        ["by-a-socket-of-nobodys", addr] => by_a_socket_of_nobodys(addr.parse()?),
        ["many-namespaces", addr, times] => many_namespaces(addr.parse()?, times.parse()?),
        ["escape", rest @ ..] => escape(rest),
        ["escape-once", rest @ ..] => escape_once(rest),
        ["sock-names", addr] => sock_names(addr.parse()?),
        ["bind-range", ip] => bind_range(ip.parse()?),
        ["original-dst", listen] => original_dst(listen.parse()?),
        _ => bail!("unknown: {words:?}"),
    }
}

/// Connects; to "ADDR+N", and exchanges N single bytes.
fn open(addr: &str) -> Result<TcpStream> {
    let (addr, pings) = addr.split_once('+').unwrap_or((addr, "0"));
    let stream =
        TcpStream::connect(addr.parse::<SocketAddr>()?).with_context(|| format!("connect to {addr}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    for _ in 0..pings.parse()? {
        ping(&stream)?;
    }
    Ok(stream)
}

/// Both directions at once, every byte checked.
fn duplex(stream: &TcpStream, bytes: u64) -> Result<()> {
    let (mut from, mut to) = (stream, stream);
    let (sent, received) = thread::scope(|scope| {
        let sending = scope.spawn(move || UP.send(&mut to, bytes));
        let received = DOWN.receive(&mut from, bytes);
        (sending.join(), received)
    });
    sent.ok().context("the sender panicked")?.context("sending")?;
    received.context("receiving")?;
    stream.shutdown(Shutdown::Write)?;
    expect_end(stream)?;
    println!("duplex={bytes}");
    Ok(())
}

/// Connects, then does what it is told by lines: "ping" exchanges one byte, "read" reads on, "peer" asks who
/// the peer is, "local" what its own address is, "connect" connects once more, "again" does so and exchanges one byte there.
fn hold(addr: &str) -> Result<()> {
    let stream = open(addr)?;
    say("held=1");
    for line in io::stdin().lines() {
        match line?.as_str() {
            "ping" => say(&format!("ping={}", result(ping(&stream)))),
            "read" => say(&format!("read={}", result(read_on(&stream)))),
            "peer" => {
                say(&format!(
                    "peer={}",
                    stream.peer_addr().map_or_else(|e| e.to_string(), |a| a.to_string())
                ));
            }
            "local" => {
                say(&format!(
                    "local={}",
                    stream.local_addr().map_or_else(|e| e.to_string(), |a| a.to_string())
                ));
            }
            "again" => say(&format!("again={}", result(once(addr)))),
            "connect" => say(&format!("connect={}", result(TcpStream::connect(addr).map(drop)))),
            other => bail!("unknown: {other}"),
        }
    }
    Ok(())
}

fn ping(mut stream: &TcpStream) -> io::Result<()> {
    stream.write_all(b"p")?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer == *b"p" { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// What ends the connection: an end is an error too, called by its name.
fn read_on(mut stream: &TcpStream) -> io::Result<()> {
    loop {
        if stream.read(&mut [0; 4096])? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// "ok", or the error's name.
fn result<T>(outcome: io::Result<T>) -> String {
    match outcome {
        Ok(_) => "ok".to_owned(),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => "EOF".to_owned(),
        Err(e) => e.raw_os_error().map_or_else(|| e.to_string(), |n| format!("{:?}", Errno::from_raw(n))),
    }
}

/// N connections from N threads, all up at once: each echoes half of its bytes, all wait for a line on
/// standard input, each echoes the other half.
fn many(addr: SocketAddr, connections: usize, bytes: u64) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let (up, go) = (Arc::new(Barrier::new(connections + 1)), Arc::new(Barrier::new(connections + 1)));
    let mut threads = Vec::new();
    for _ in 0..connections {
        let (up, go) = (Arc::clone(&up), Arc::clone(&go));
        let talk = move || -> io::Result<()> {
            let first = TcpStream::connect(addr).and_then(|stream| {
                stream.set_read_timeout(Some(PATIENCE))?;
                echo_range(&stream, 0, bytes / 2)?;
                Ok(stream)
            });
            // Whatever happened: who does not come to a barrier stops everybody.
            up.wait();
            go.wait();
            let stream = first?;
            echo_range(&stream, bytes / 2, bytes)?;
            stream.shutdown(Shutdown::Write)?;
            if (&stream).read(&mut [0])? == 0 { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
        };
        threads.push(thread::Builder::new().stack_size(256 * 1024).spawn(talk)?);
    }
    up.wait();
    say(&format!("held={connections}"));
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    go.wait();
    let mut failures: HashMap<String, usize> = HashMap::new();
    for thread in threads {
        let outcome = thread.join().ok().context("a thread panicked")?;
        if let Err(e) = outcome {
            *failures.entry(e.to_string()).or_default() += 1;
        }
    }
    ensure!(failures.is_empty(), "of {connections} connections: {failures:?}");
    println!("many={connections}");
    Ok(())
}

/// Sends a range of the pattern to an echo, and checks what comes back.
fn echo_range(stream: &TcpStream, from: u64, to: u64) -> io::Result<()> {
    let (mut reader, mut writer) = (stream, stream);
    // Less than any socket buffer: the echo cannot block us.
    const STEP: u64 = 16 * 1024;
    let mut at = from;
    while at < to {
        let next = to.min(at + STEP);
        UP.send_from(&mut writer, at, next)?;
        UP.receive_from(&mut reader, at, next)?;
        at = next;
    }
    Ok(())
}

/// One connection after the other, a kilobyte there and back on each, until standard input ends.
fn keep_connecting(addr: &str) -> Result<()> {
    const BYTES: usize = 1024;
    let end = thread::spawn(|| io::stdin().lines().count());
    let (mut made, mut failed) = (0, Vec::new());
    while !end.is_finished() {
        let once = || -> Result<()> {
            let mut stream = open(addr)?;
            stream.write_all(&[7; BYTES])?;
            let mut back = [0; BYTES];
            stream.read_exact(&mut back)?;
            ensure!(back == [7; BYTES], "other bytes came back");
            Ok(())
        };
        made += 1;
        if let Err(e) = once() {
            failed.push(format!("{made}: {e:#}"));
        }
        if made == 1 {
            println!("started=1");
        }
    }
    println!("made={made}\nfailed={}", failed.len());
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Sends, ends, and only then gets an answer.
fn half_close(stream: &TcpStream, bytes: u64) -> Result<()> {
    let (mut from, mut to) = (stream, stream);
    UP.send(&mut to, bytes).context("sending")?;
    stream.shutdown(Shutdown::Write)?;
    let answer = DOWN.receive_to_end(&mut from).context("receiving")?;
    println!("answer={answer}");
    ensure!(answer == bytes, "the answer has {answer} bytes of {bytes}");
    Ok(())
}

/// Receives and hears the end.
fn hear_end(mut stream: &TcpStream, bytes: u64) -> Result<()> {
    let heard = DOWN.receive_to_end(&mut stream).context("receiving")?;
    ensure!(heard == bytes, "heard {heard} bytes of {bytes}");
    println!("heard={heard}");
    Ok(())
}

/// Receives and hears the end, and only then sends.
fn hear_end_first(stream: &TcpStream, bytes: u64) -> Result<()> {
    hear_end(stream, bytes)?;
    UP.send(&mut &*stream, bytes).context("sending")?;
    stream.shutdown(Shutdown::Write)?;
    Ok(())
}

/// Says how connect went, sends, and says what ends the connection and after how many bytes.
fn expect_reset(addr: &str, bytes: u64) -> Result<()> {
    let started = Instant::now();
    let stream = match open(addr) {
        Ok(stream) => stream,
        Err(e) => {
            let e = e.downcast::<io::Error>()?;
            println!("connect={}", result::<()>(Err(e)));
            return Ok(());
        }
    };
    println!("connect=ok");
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut from, mut to) = (&stream, &stream);
    let sent = UP.send(&mut to, bytes);
    let mut received = 0;
    let ended = loop {
        if sent.is_err() {
            // An error is reported once: a read would not see it again.
            break sent;
        }
        match from.read(&mut [0; 4096]) {
            Ok(0) => break Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => received += n,
            Err(e) => break Err::<(), _>(e),
        }
    };
    println!("received={received}\nended={}\nafter_ms={}", result(ended), started.elapsed().as_millis());
    Ok(())
}

/// Sends, hears one byte, and resets the connection when it is told to.
fn reset_after(stream: &TcpStream, bytes: u64) -> Result<()> {
    let (mut from, mut to) = (stream, stream);
    UP.send(&mut to, bytes)?;
    from.read_exact(&mut [0])?;
    say("answered=1");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    reset(stream)?;
    println!("reset=1");
    Ok(())
}

/// Sends, hears nothing, and resets the connection when it is told to.
fn reset_unanswered(stream: &TcpStream, bytes: u64) -> Result<()> {
    UP.send(&mut &*stream, bytes)?;
    say("sent=1");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    reset(stream)?;
    println!("reset=1");
    Ok(())
}

/// What the system says about the connection, and what the target sends in one line.
fn names(stream: &TcpStream) -> Result<()> {
    println!("peer={}\nlocal={}", stream.peer_addr()?, stream.local_addr()?);
    let mut line = String::new();
    io::BufReader::new(stream).read_line(&mut line)?;
    println!("seen={}", line.trim_end());
    Ok(())
}

/// How connect fails.
fn connect_error(addr: SocketAddr) -> Result<()> {
    println!("connect={}", result(TcpStream::connect(addr).map(drop)));
    Ok(())
}

/// A process that starts a process that starts a process; the last one connects.
fn tree(addr: &str, bytes: &str, depth: u32) -> Result<()> {
    if depth == 0 {
        return duplex(&open(addr)?, bytes.parse()?);
    }
    let mut child = Command::new("/bin/sh");
    child.args(["-c", "\"$0\" \"$@\" & wait $!"]).arg(env::current_exe()?);
    let status = child.args(["tree", addr, bytes, &(depth - 1).to_string()]).status()?;
    ensure!(status.success(), "at depth {depth}: {status}");
    Ok(())
}

/// A datagram and its answer, over a socket that is connected, and one that is not.
fn udp(addr: SocketAddr) -> Result<()> {
    let any = if addr.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut buf = [0; 16];
    let loose = socket.send_to(b"ping", addr).and_then(|_| socket.recv_from(&mut buf));
    match loose {
        Ok((_, peer)) => println!("loose=ok\nfrom={peer}"),
        Err(e) => println!("loose={}", result::<()>(Err(e))),
    }
    let joined = socket.connect(addr).and_then(|()| socket.send(b"ping")).and_then(|_| socket.recv(&mut buf));
    println!("joined={}", result(joined));
    if let Ok(peer) = socket.peer_addr() {
        println!("peer={peer}");
    }
    Ok(())
}

/// Exchanges bytes with an echo, now in small messages, now many at once, with pauses; checks every byte.
fn soak(stream: &TcpStream, seconds: u64, seed: u64) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut at, mut state) = (0, seed | 1);
    // xorshift64: what is drawn only has to be the same for the same seed.
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut phases = 0;
    while Instant::now() < end {
        for _ in 0..16 + random(30) {
            let next = at + 1 + random(2000);
            echo_range(stream, at, next)?;
            at = next;
            if random(16) == 0 {
                #[expect(clippy::disallowed_methods, reason = "a pause is what it does here")]
                thread::sleep(Duration::from_micros(random(2000)));
            }
        }
        // More than sockets hold, now and then.
        let most = if random(4) == 0 { 6 << 20 } else { 300_000 };
        let next = at + 1 + random(most);
        let (mut from, mut to) = (stream, stream);
        let (sent, received) = thread::scope(|scope| {
            let sending = scope.spawn(move || UP.send_from(&mut to, at, next));
            let received = UP.receive_from(&mut from, at, next);
            (sending.join(), received)
        });
        sent.ok().context("the sender panicked")?.context("sending")?;
        received.context("receiving")?;
        (at, phases) = (next, phases + 1);
    }
    stream.shutdown(Shutdown::Write)?;
    expect_end(stream)?;
    println!("soaked={at}\nphases={phases}");
    Ok(())
}

/// Connects, echoes one byte, and hangs up, once for every line of standard input; says how it went.
fn reconnect(addr: &str) -> Result<()> {
    say("ready=1");
    for line in io::stdin().lines() {
        let _any = line?;
        say(&format!("once={}", result(once(addr))));
    }
    Ok(())
}

/// A connection for one byte.
fn once(addr: &str) -> io::Result<()> {
    let stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    ping(&stream)
}

/// So many connections that exchange bytes until each ends; says how they ended. Then, for every line of
/// standard input, connects once more.
fn swarm(addr: &str, connections: usize) -> Result<()> {
    let streams = (0..connections).map(|_| open(addr)).collect::<Result<Vec<_>>>()?;
    for stream in &streams {
        ping(stream).context("the first byte")?;
    }
    say(&format!("swarm={connections}"));
    let busy = |stream: TcpStream| loop {
        if let Err(e) = ping(&stream) {
            break result::<()>(Err(e));
        }
    };
    let threads: Vec<_> = streams.into_iter().map(|stream| thread::spawn(move || busy(stream))).collect();
    let mut ends: Vec<String> = threads.into_iter().filter_map(|t| t.join().ok()).collect();
    ends.sort();
    ends.dedup();
    say(&format!("ends={}", ends.join(",")));
    for line in io::stdin().lines() {
        let _any = line?;
        say(&format!("again={}", result(once(addr))));
    }
    Ok(())
}

/// A proxy's first question: accepts one connection and asks where it wanted to go; then echoes.
fn original_dst(listen: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen)?;
    say(&format!("listening={}", listener.local_addr()?));
    let (stream, peer) = listener.accept()?;
    println!("client={peer}");
    let original = match listen.ip() {
        IpAddr::V4(_) => {
            let found = getsockopt(&stream, sockopt::OriginalDst)?;
            SocketAddr::from((
                u32::from_be(found.sin_addr.s_addr).to_be_bytes(),
                u16::from_be(found.sin_port),
            ))
        }
        IpAddr::V6(_) => {
            let found = getsockopt(&stream, sockopt::Ip6tOriginalDst)?;
            SocketAddr::from((found.sin6_addr.s6_addr, u16::from_be(found.sin6_port)))
        }
    };
    say(&format!("original={original}"));
    let (mut from, mut to) = (&stream, &stream);
    io::copy(&mut from, &mut to)?;
    Ok(())
}

fn expect_end(mut stream: &TcpStream) -> Result<()> {
    ensure!(stream.read(&mut [0]).context("waiting for the end")? == 0, "more bytes than there should be");
    Ok(())
}

/// Prints a line that somebody waits for.
fn say(line: &str) {
    println!("{line}");
    // Who does not listen any more has ended.
    let _gone = io::stdout().flush();
}
