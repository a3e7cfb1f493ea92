//! `bypass`: busy connections of captured applications go past the loopback's TCP, and nobody sees a difference.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::Result;
use tunnel_tests::{
    Exec, Finished, Gateway, PATIENCE, Process, Running, TARGET4, TARGET6, Target, World,
    amount::amount,
    cgroup::Cgroup,
    daemon::Daemon,
    dialogue::ask,
    dmesg::Mark,
    node::Node,
    pattern::DOWN,
    programs, target, wait_for,
    world::{NET4, NET6},
};

const MIB: u64 = 1 << 20;
/// Exchanges after which a connection has long been promoted.
const BUSY: &str = "1000";

/// A node with a route to the targets, and what it captures goes there by itself.
struct Direct {
    world: World,
    config: PathBuf,
    kernel: Mark,
}

impl Direct {
    fn new(bypass: &str) -> Result<Self> {
        let world = World::new()?;
        world.node().ip(&format!("route add default via {NET4}"))?;
        world.node().ip(&format!("-6 route add default via {NET6}"))?;
        let config = format!(
            "[daemon]\nworkers = 1\nrelay = \"copy\"\n[[capture]]\nbypass = \"{bypass}\"\n[[route]]\nto = \"direct\"\n"
        );
        let config = world.file("direct.toml", config)?;
        Ok(Self { world, config, kernel: Mark::now()? })
    }

    fn exec(&self) -> Exec<'_> {
        // The counters are logged at the end.
        self.world.exec_with(&self.config).flag("--log", "info").limit(Duration::from_secs(120))
    }

    /// A busy application, and the echo that it talks to.
    fn busy(&self) -> Result<(Target, Running)> {
        let echo = self.world.serve(TARGET4, target::echo())?;
        let mut app = self.exec().spawn(&busy_app(&["busy", &echo.addr().to_string(), BUSY])?)?;
        app.says("busy=")?;
        Ok((echo, app))
    }

    fn end(mut self) -> Result<()> {
        assert_quiet(&mut self.kernel)
    }
}

/// The kernel has had nothing to complain of since.
fn assert_quiet(kernel: &mut Mark) -> Result<()> {
    assert_eq!(kernel.warnings()?, Vec::<String>::new());
    Ok(())
}

/// The command line of the busy application.
fn busy_app(words: &[&str]) -> Result<Vec<OsString>> {
    let program = programs::busy()?.into_os_string();
    Ok([program].into_iter().chain(words.iter().map(OsString::from)).collect())
}

/// A counter, as it is logged at the end.
fn counter(log: &str, name: &str) -> u64 {
    let found =
        log.split_once(&format!("(\"{name}\", ")).and_then(|(_, rest)| rest.split_once(')')?.0.parse().ok());
    found.unwrap_or(0)
}

fn count(done: &Finished, name: &str) -> u64 {
    counter(&done.stderr, name)
}

fn told(app: &mut Running, word: &str, answer: &str) -> Result<String> {
    app.tell(word)?;
    app.value(answer)
}

/// A busy captured connection is promoted to the bypass, and every byte arrives unchanged.
#[test]
fn a_busy_connection_goes_past_tcp_and_every_byte_arrives() -> Result<()> {
    for ip in [TARGET4, TARGET6] {
        let node = Direct::new("on")?;
        let echo = node.world.serve(ip, target::echo())?;
        let done = node.exec().run(&busy_app(&["busy", &echo.addr().to_string(), BUSY])?)?;
        assert!(done.success(), "{done}");
        assert_eq!(count(&done, "bypass_promoted"), 1, "{done}");
        // 1000 messages of 450 bytes both ways, less those before it was promoted.
        assert!(count(&done, "bypass_bytes") > 400_000, "{done}");
        node.end()?;
    }
    Ok(())
}

/// A connection that is carried through a tunnel is promoted to the bypass too.
#[test]
fn a_busy_connection_through_a_tunnel_goes_past_tcp_too() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let echo = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut kernel = Mark::now()?;
    let mut daemon = node.daemon(&node.config(&gateway, "", "bypass = \"auto\""))?;
    let mut app = busy_in(&world, &node, &echo)?;
    app.tell(&format!("duplex {}", 8 * MIB))?;
    app.wait_for_line("duplex=ok")?;
    app.hang_up();
    app.wait(PATIENCE)?;
    daemon.process().stop()?;
    let log = daemon.log();
    assert_eq!(counter(&log, "bypass_promoted"), 1, "{log}");
    assert!(counter(&log, "bypass_bytes") > 400_000, "{log}");
    assert_quiet(&mut kernel)
}

/// Bulk in both directions between small exchanges arrives unchanged over the bypass.
#[test]
fn heavy_bulk_both_ways_at_once_between_exchanges_arrives_unchanged() -> Result<()> {
    let node = Direct::new("on")?;
    let (_echo, mut app) = node.busy()?;
    for _ in 0..4 {
        assert_eq!(told(&mut app, &format!("duplex {}", 16 * MIB), "duplex")?, "ok");
        assert_eq!(told(&mut app, "chat 3000", "chat")?, "ok");
    }
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert_eq!(count(&done, "bypass_promoted"), 1, "{done}");
    assert!(count(&done, "bypass_demoted") >= 1, "bulk goes by TCP: {done}");
    node.end()
}

/// Over the bypass an application that does not read exerts backpressure as over TCP, and loses no byte.
#[test]
fn heavy_an_application_that_does_not_read_is_held_back_as_by_tcp_and_loses_nothing() -> Result<()> {
    /// What may be redirected into both queues, and what the buffers of four TCP connections differ by from one run to
    /// the next.
    const MORE_MAX: u64 = 8 * MIB;
    let mut taken = [0; 2];
    for (taken, bypass) in taken.iter_mut().zip(["off", "on"]) {
        let node = Direct::new(bypass)?;
        let (_echo, mut app) = node.busy()?;
        let before = app.process().memory()?;
        *taken = told(&mut app, "stall", "stall")?.parse()?;
        let grown = app.process().memory()?.saturating_sub(before);
        assert!(grown < 2 * MIB, "it grew by {grown} bytes");
        assert_eq!(told(&mut app, "drain", "drain")?, "ok");
        assert_eq!(told(&mut app, "chat 500", "chat")?, "ok");
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        assert_eq!(count(&done, "bypass_promoted"), u64::from(bypass == "on"), "{done}");
        node.end()?;
    }
    println!("taken by TCP alone {}, with bypass {}", taken[0], taken[1]);
    assert!(taken[1] < taken[0] + MORE_MAX, "{taken:?} bytes were taken");
    Ok(())
}

/// Half-close works over the bypass: the other direction goes on.
#[test]
fn the_end_of_one_direction_leaves_the_other() -> Result<()> {
    let node = Direct::new("on")?;
    let (echo, mut app) = node.busy()?;
    assert_eq!(told(&mut app, "half", "half")?, "end after 0");
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert_eq!(echo.outcomes(1)?, [Ok(())]);
    assert_eq!(done.flows()?[0]["reason"], "closed");
    assert_eq!(count(&done, "bypass_promoted"), 1, "{done}");
    node.end()
}

/// Bytes that were sent before a close arrive over the bypass, however many are queued.
#[test]
fn what_was_sent_before_the_end_arrives_whatever_is_queued() -> Result<()> {
    let node = Direct::new("on")?;
    let (_echo, mut app) = node.busy()?;
    let taken: u64 = told(&mut app, "stall", "stall")?.parse()?;
    assert_eq!(told(&mut app, "half", "half")?, format!("end after {taken}"));
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    node.end()
}

/// A reset by the target resets the application over the bypass.
#[test]
fn a_reset_by_the_target_resets_the_application() -> Result<()> {
    let node = Direct::new("on")?;
    // As many bytes as the exchanges are.
    let sizes: u64 = (0..1000u64).map(|round| 1 + round * 37 % 900).sum();
    let target = node.world.serve(TARGET4, move |stream: &TcpStream| {
        use std::io::{Read as _, Write as _};
        let (mut from, mut to, mut buf, mut left) = (stream, stream, [0; 1000], sizes);
        while left > 0 {
            let n = from.read(&mut buf)?;
            to.write_all(&buf[..n])?;
            left -= n as u64;
        }
        from.read_exact(&mut buf[..1])?;
        target::reset(stream)
    })?;
    let mut app = node.exec().spawn(&busy_app(&["busy", &target.addr().to_string(), BUSY])?)?;
    app.says("busy=")?;
    app.tell("chat 1")?;
    assert!(app.says("failed=")?.contains("reset"));
    let done = app.finish()?;
    assert_eq!(count(&done, "bypass_promoted"), 1, "{done}");
    node.end()
}

/// An application that dies with queued bytes leaves no state in the kernel.
#[test]
fn an_application_that_dies_with_bytes_queued_leaves_nothing() -> Result<()> {
    let node = Direct::new("on")?;
    let (_echo, mut app) = node.busy()?;
    told(&mut app, "stall", "stall")?;
    let done = app.finish()?;
    assert_eq!(count(&done, "bypass_promoted"), 1, "{done}");
    assert_eq!(done.flows()?[0]["reason"], "client_reset", "{done}");
    node.end()
}

/// A blocking socket is never promoted to the bypass.
#[test]
fn a_socket_that_blocks_is_never_touched() -> Result<()> {
    let node = Direct::new("on")?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    let done = node.exec().run(&busy_app(&["blocking", &echo.addr().to_string(), "2000"])?)?;
    assert!(done.success(), "{done}");
    assert_eq!(count(&done, "bypass_promoted"), 0, "{done}");
    assert_eq!(count(&done, "bypass_refused_blocking"), 1, "{done}");
    node.end()
}

/// A program that may call splice(2) is never promoted to the bypass.
#[test]
fn a_program_that_may_splice_is_never_touched() -> Result<()> {
    let node = Direct::new("on")?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    let program = programs::splices()?;
    let done = node.exec().run(&[program.as_os_str(), echo.addr().to_string().as_ref(), "2000".as_ref()])?;
    assert!(done.success(), "{done}");
    assert_eq!(count(&done, "bypass_promoted"), 0, "{done}");
    assert_eq!(count(&done, "bypass_refused_splices"), 1, "{done}");
    node.end()
}

/// Answers each request of a connection that is kept.
fn pages(stream: &TcpStream) -> std::io::Result<()> {
    let mut to = stream;
    for line in BufReader::new(stream).lines() {
        if line?.is_empty() {
            to.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
        }
    }
    Ok(())
}

/// A Go program is never promoted to the bypass.
#[test]
fn a_program_in_go_is_never_touched() -> Result<()> {
    const REQUESTS: usize = 2000;
    let node = Direct::new("on")?;
    let server = node.world.serve(TARGET4, pages)?;
    // HTTP load by one connection, which is kept: https://github.com/rakyll/hey.
    let hey = programs::system("hey")?.into_os_string();
    let words = ["-n", &REQUESTS.to_string(), "-c", "1", &format!("http://{}/", server.addr())];
    let words: Vec<OsString> = [hey].into_iter().chain(words.iter().map(OsString::from)).collect();
    let done = node.exec().run(&words)?;
    assert!(done.success(), "{done}");
    assert!(done.stdout.contains(&format!("[200]\t{REQUESTS} responses")), "{done}");
    assert_eq!(server.peers().len(), 1, "one connection: {done}");
    assert_eq!(count(&done, "bypass_promoted"), 0, "{done}");
    assert_eq!(count(&done, "bypass_refused_go"), 1, "{done}");
    node.end()
}

/// Echoes so many bytes, and then speaks of itself, a little at a time: so many bytes, and its end.
fn speaks_after(echoed: u64, spoken: u64) -> impl target::Handler {
    const MESSAGE: u64 = 100;
    /// Between two of them, nothing is heard of the client.
    const PAUSE: Duration = Duration::from_millis(5);
    move |stream: &TcpStream| {
        let (mut from, mut to) = (stream, stream);
        let (mut buf, mut left) = (vec![0; 4096], echoed);
        while left > 0 {
            let n = from.read(&mut buf)?;
            if n == 0 {
                return Ok(());
            }
            left = left.saturating_sub(n as u64);
            to.write_all(&buf[..n])?;
        }
        stream.set_read_timeout(Some(PAUSE))?;
        for at in (0..spoken).step_by(usize::try_from(MESSAGE).unwrap_or(usize::MAX)) {
            DOWN.send_from(&mut to, at, at + MESSAGE)?;
            let _nothing = from.read(&mut buf);
        }
        Ok(())
    }
}

/// Under memory pressure the bypass delivers every byte and fails no call that would succeed over TCP.
#[test]
fn heavy_under_memory_pressure_every_byte_arrives_and_nothing_fails_that_would_not_by_tcp() -> Result<()> {
    const FLOWS: u64 = 20;
    const MEMORY: u64 = 4 * MIB;
    const ROUNDS: u64 = 400;
    const SPOKEN: u64 = 25_000;
    let mut taken = [0; 2];
    for (taken, bypass) in taken.iter_mut().zip(["off", "on"]) {
        let node = Direct::new(bypass)?;
        let Some(group) = Cgroup::with_tcp_memory(MEMORY)? else { return Ok(()) };
        node.world.buffers_of_64_kib()?;
        let exec = node.exec().within(&group);
        let echo = node.world.serve(TARGET4, target::echo())?;
        let words = ["crowd", &echo.addr().to_string(), &ROUNDS.to_string(), &FLOWS.to_string()];
        let mut crowd = exec.spawn(&busy_app(&words)?)?;
        crowd.says(&format!("crowd={FLOWS}"))?;
        let chatted = (0..ROUNDS).map(|round| 1 + round * 37 % 900).sum();
        let speaker = node.world.serve(TARGET4, speaks_after(chatted, SPOKEN))?;
        let words = ["follow", &speaker.addr().to_string(), &ROUNDS.to_string()];
        let mut follower = exec.spawn(&busy_app(&words)?)?;
        assert_eq!(follower.value("follow")?, chatted.to_string());

        *taken = told(&mut crowd, "stall", "stall")?.parse()?;
        let most = group.most_tcp_memory()?;
        assert!(most >= MEMORY, "{most} bytes: there was no pressure");
        assert_eq!(told(&mut crowd, "drain", "drain")?, "ok", "every byte came back");
        let (crowd, follower) = (crowd.finish()?, follower.finish()?);
        assert!(crowd.success() && follower.success(), "{crowd}\n{follower}");
        assert_eq!(follower.value("followed")?, SPOKEN.to_string());
        let promoted = if bypass == "on" { [FLOWS, 1] } else { [0, 0] };
        assert_eq!(
            [&crowd, &follower].map(|done| count(done, "bypass_promoted")),
            promoted,
            "{crowd}\n{follower}"
        );
        node.end()?;
    }
    println!("{taken:?} bytes were taken of {FLOWS} connections, by TCP alone and with bypass");
    Ok(())
}

/// Applications that do not read, 500 of them where tests are thorough, are held back over the bypass and lose no byte.
#[test]
fn heavy_many_applications_that_do_not_read_are_held_back_and_lose_nothing() -> Result<()> {
    let flows: u64 = amount(100, 500);
    let mut taken = [0; 2];
    for (taken, bypass) in taken.iter_mut().zip(["off", "on"]) {
        let node = Direct::new(bypass)?;
        node.world.buffers_of_64_kib()?;
        let echo = node.world.serve(TARGET4, target::echo())?;
        let words = ["crowd", &echo.addr().to_string(), "400", &flows.to_string()];
        let mut app = node.exec().spawn(&busy_app(&words)?)?;
        for there in (100..=flows).step_by(100) {
            app.says(&format!("crowd={there}"))?;
        }
        *taken = told(&mut app, "stall", "stall")?.parse()?;
        assert_eq!(told(&mut app, "drain", "drain")?, "ok", "every byte came back");
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        let promoted = if bypass == "on" { flows } else { 0 };
        assert_eq!(count(&done, "bypass_promoted"), promoted, "{done}");
        node.end()?;
    }
    println!("{taken:?} bytes were taken of {flows} connections, by TCP alone and with bypass");
    assert!(taken[1] < taken[0] + flows * MIB, "{taken:?}");
    assert!(taken[1] < flows * 8 * MIB, "{taken:?}");
    Ok(())
}

/// With `bypass = "off"` no connection is promoted.
#[test]
fn where_it_is_off_nothing_is_promoted() -> Result<()> {
    let node = Direct::new("off")?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    let done = node.exec().run(&busy_app(&["busy", &echo.addr().to_string(), BUSY])?)?;
    assert!(done.success(), "{done}");
    assert_eq!(count(&done, "bypass_promoted"), 0, "{done}");
    node.end()
}

/// A busy application in a captured group.
fn busy_in(world: &World, node: &Node<'_>, echo: &Target) -> Result<Process> {
    let mut command = world.node().command(programs::busy()?);
    command.args(["busy", &echo.addr().to_string(), BUSY]);
    node.cgroup.adopt(&mut command)?;
    let mut app = Process::spawn_with_input("busy", world.folder(), command)?;
    app.wait_for_line("busy=")?;
    Ok(app)
}

/// A captured group, its daemon, and a busy application whose bytes go past TCP.
fn promoted(
    world: &World,
    gateway: &Gateway<'_>,
    node: &Node<'_>,
    echo: &Target,
) -> Result<(Daemon, Process)> {
    let daemon = node.daemon(&node.config(gateway, "", "bypass = \"on\""))?;
    let app = busy_in(world, node, echo)?;
    Ok((daemon, app))
}

/// The kernel programs of a bypass that are loaded.
fn programs_left() -> Vec<String> {
    let listed = Command::new("bpftool").args(["prog", "list"]).output();
    let text = listed.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().filter(|l| l.contains("name bypass") || l.contains("sk_msg")).map(str::to_owned).collect()
}

/// When the daemon is killed, bypassed applications are reset and the kernel keeps no state.
#[test]
fn when_the_daemon_is_killed_the_application_is_reset_and_nothing_is_left() -> Result<()> {
    let world = World::new()?;
    let echo = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut kernel = Mark::now()?;
    let before = programs_left().len();
    let gateway = world.gateway().start()?;
    let (mut daemon, mut app) = promoted(&world, &gateway, &node, &echo)?;
    daemon.process().kill()?;
    assert_eq!(ask(&mut app, "read")?, "ECONNRESET");
    app.hang_up();
    app.wait(PATIENCE)?;
    wait_for("the bypass program to be unloaded", PATIENCE, || {
        (programs_left().len() <= before).then_some(())
    })?;
    assert_quiet(&mut kernel)
}

/// When a bypassed application is killed, its target is reset and the kernel keeps no state.
#[test]
fn when_the_application_is_killed_its_target_hears_it_and_nothing_is_left() -> Result<()> {
    let world = World::new()?;
    let echo = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut kernel = Mark::now()?;
    let before = programs_left().len();
    let gateway = world.gateway().start()?;
    let (mut daemon, mut app) = promoted(&world, &gateway, &node, &echo)?;
    app.kill()?;
    assert_eq!(echo.outcomes(1)?, [Ok(())]);
    daemon.process().stop()?;
    wait_for("the bypass program to be unloaded", PATIENCE, || {
        (programs_left().len() <= before).then_some(())
    })?;
    assert_eq!(counter(&daemon.log(), "bypass_promoted"), 1);
    assert_quiet(&mut kernel)
}

/// A socket that two processes share is never promoted to the bypass.
#[test]
fn a_socket_that_two_processes_have_is_never_touched() -> Result<()> {
    let node = Direct::new("on")?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    let done = node.exec().run(&busy_app(&["shared", &echo.addr().to_string(), BUSY])?)?;
    assert!(done.success(), "{done}");
    assert_eq!(count(&done, "bypass_promoted"), 0, "{done}");
    assert_eq!(count(&done, "bypass_refused_shared"), 1, "{done}");
    node.end()
}
