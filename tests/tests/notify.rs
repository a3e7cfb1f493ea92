//! The daemon under a service manager, whose part the test plays: readiness, status, reloads, the watchdog, sockets.

use std::{
    fs,
    io::{self, Read as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        unix::{
            fs::MetadataExt as _,
            net::{UnixDatagram, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::{
        ptrace,
        signal::Signal,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tunnel_tests::{
    PATIENCE, Process, TARGET4, World, gateway,
    node::Node,
    peer::{ask, connect_request},
    programs, target, wait_for,
    world::NET4,
};

const AT: SocketAddr = SocketAddr::new(NET4, gateway::PORT);

/// A service manager.
struct Manager {
    path: PathBuf,
    socket: UnixDatagram,
    stored: Vec<OwnedFd>,
}

impl Manager {
    fn new(world: &World) -> Result<Self> {
        let path = world.folder().join("notify.socket");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { path, socket, stored: Vec::new() })
    }

    /// A daemon, told of this manager and by more variables, with these sockets from descriptor 3 on. The variable `ARGS` is more
    /// flags of the daemon's.
    fn start(
        &self,
        world: &World,
        config: &Path,
        more: &[(&str, &str)],
        sockets: &[OwnedFd],
    ) -> Result<Process> {
        let mut command = world.net().command_ended_by("/bin/bash", Signal::SIGTERM);
        self.tell(&mut command, more);
        // High, so that none is in another one's place; not closed by exec.
        let high = |fd: &OwnedFd| Ok(fcntl(fd, FcntlArg::F_DUPFD(100))?);
        let high = sockets.iter().map(high).collect::<Result<Vec<_>>>()?;
        let mut script = String::new();
        for (i, fd) in high.iter().enumerate() {
            script += &format!("exec {}<&{fd} {fd}<&-\n", i + 3);
        }
        if !high.is_empty() {
            script += &format!("export LISTEN_PID=$$ LISTEN_FDS={}\n", high.len());
        }
        script += "exec \"$0\" \"$@\"";
        command.arg("-c").arg(script).arg(programs::tunnel()?);
        command.args(["run", "--log", gateway::LOG, "--config"]).arg(config);
        command.args(more.iter().filter(|(name, _)| *name == "ARGS").map(|(_, flag)| flag));
        let process = Process::spawn("daemon", world.folder(), command);
        high.into_iter().try_for_each(nix::unistd::close)?;
        process
    }

    fn tell(&self, command: &mut Command, more: &[(&str, &str)]) {
        command.env("NOTIFY_SOCKET", &self.path).envs(more.iter().copied());
    }

    /// The next message, and the descriptors that it keeps.
    fn next(&mut self) -> Result<String> {
        let mut bytes = [0; 4096];
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(
            &self.socket,
            &mut [io::IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .context("the daemon has said nothing")?;
        let text = std::str::from_utf8(&bytes[..message.bytes])?.to_owned();
        if text.starts_with("FDSTOREREMOVE=1") {
            self.stored.clear();
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                ensure!(text.starts_with("FDSTORE=1\nFDNAME=tunnel-listener"), "{text}");
                self.stored.extend(descriptors);
            }
        }
        Ok(text)
    }

    /// The next message with this in it; others are passed over.
    fn hears(&mut self, wanted: &str) -> Result<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let text = self.next()?;
            if text.contains(wanted) {
                return Ok(text);
            }
            ensure!(Instant::now() < end, "waited for {wanted} in vain");
        }
    }

    /// Whether it hears nothing of that kind for so long.
    fn is_without(&mut self, what: &str, length: Duration) -> Result<bool> {
        let end = Instant::now() + length;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.socket.set_read_timeout(Some(left))?;
            match self.next() {
                Ok(text) if text.contains(what) => return Ok(false),
                Ok(_) | Err(_) => {}
            }
        }
        self.socket.set_read_timeout(Some(PATIENCE))?;
        Ok(true)
    }
}

fn config(world: &World, more: &str) -> Result<PathBuf> {
    let identity = world.pki().named("gateway").toml();
    let text = format!(
        "[daemon]\nworkers = 2\n{identity}[[listener]]\naddress = \"{AT}\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n{more}"
    );
    world.file("gateway.toml", text)
}

/// The status of an answer of the daemon.
fn status(world: &World, target: &target::Target) -> Result<u16> {
    let request = connect_request(&target.addr().to_string())?;
    Ok(ask(world.node(), AT, &world.pki().named("node"), request)?.status.as_u16())
}

/// READY=1 comes once captures are attached and listeners accept, a reload is announced and ends with its outcome, and the end
/// is announced with the time that it may take.
#[test]
fn readiness_reloads_and_the_end_are_notified() -> Result<()> {
    let world = World::new()?;
    let mut manager = Manager::new(&world)?;
    let node = Node::new(&world)?;
    let target = world.serve(TARGET4, target::echo())?;
    let capture = format!("[[capture]]\ncgroup = \"{}\"\n", node.cgroup.path().display());
    let file = config(&world, &capture)?;
    let text = fs::read_to_string(&file)?.replace("[daemon]\n", &format!("[daemon]\n{}", node.bpffs.toml()));
    fs::write(&file, &text)?;
    let mut daemon = manager.start(&world, &file, &[], &[])?;
    let ready = manager.next()?;
    assert_eq!(ready, "READY=1\nSTATUS=running: 1 capture, 1 listener, 0 upstreams");
    assert_eq!(status(&world, &target)?, 200, "what is ready accepts");

    daemon.signal(Signal::SIGHUP)?;
    let reloading = manager.next()?;
    let now = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").context(reloading.clone())?;
    assert!(now.parse::<u64>()? > 0);
    assert!(manager.next()?.starts_with("READY=1\nSTATUS=running: "));

    fs::write(&file, format!("{text}[nonsense]\n"))?;
    manager.hears("RELOADING=1")?;
    let failed = manager.next()?;
    assert!(failed.starts_with("READY=1\n") && failed.contains("the last reload failed"), "{failed}");

    daemon.signal(Signal::SIGTERM)?;
    let stopping = manager.next()?;
    assert_eq!(stopping, "STOPPING=1\nSTATUS=SIGTERM: draining\nEXTEND_TIMEOUT_USEC=40000000");
    assert!(daemon.wait(PATIENCE)?.success());
    Ok(())
}

/// A daemon that takes over says that it is the service, and the one before says that it ends.
#[test]
fn a_daemon_that_takes_over_is_the_service_from_then_on() -> Result<()> {
    let world = World::new()?;
    let mut manager = Manager::new(&world)?;
    let file = config(&world, "")?;
    let mut before = manager.start(&world, &file, &[], &[])?;
    manager.hears("READY=1")?;
    let mut next = manager.start(&world, &file, &[("ARGS", "--takeover")], &[])?;
    let (mut ready, mut stopping) = (false, false);
    while !(ready && stopping) {
        let message = manager.next()?;
        ready |= message.starts_with(&format!("MAINPID={}\nREADY=1\n", next.id()));
        stopping |= message.starts_with("STOPPING=1\nSTATUS=another daemon has taken over: draining");
    }
    assert!(before.wait(PATIENCE)?.success());
    next.stop()?;
    Ok(())
}

/// The watchdog is notified twice within its time, also while another daemon takes over and takes its time, and not while one
/// worker does not run.
#[test]
fn the_watchdog_is_notified_while_every_worker_answers() -> Result<()> {
    let world = World::new()?;
    let mut manager = Manager::new(&world)?;
    let mut daemon = manager.start(&world, &config(&world, "")?, &[("WATCHDOG_USEC", "400000")], &[])?;
    manager.hears("READY=1")?;
    let started = Instant::now();
    for _ in 0..5 {
        manager.hears("WATCHDOG=1")?;
    }
    // Every half of what systemd waits; the first may have been on their way when the clock was started.
    assert!(started.elapsed() >= Duration::from_millis(500), "{:?}", started.elapsed());

    // Another one begins to take over, and says nothing more. The listeners' namespace is in the name of the place.
    let netns = world.net().run(|| fs::metadata("/proc/thread-self/ns/net"))?.ino();
    let place = wait_for("the offer", PATIENCE, || {
        let mut places = fs::read_dir("/run/tunnel").ok()?.flatten().map(|entry| entry.path());
        places.find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&format!("{netns:x}-")) && name.ends_with(".sock")
        })
    })?;
    let mut silent = UnixStream::connect(place)?;
    silent.read_exact(&mut [0; 1])?;
    for _ in 0..5 {
        manager.hears("WATCHDOG=1")?;
    }
    drop(silent);

    // One thread of the daemon stops, and its others go on.
    let worker = fs::read_dir(format!("/proc/{}/task", daemon.id()))?
        .flatten()
        .find(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "worker-1\n"))
        .context("no worker")?;
    let worker = Pid::from_raw(worker.file_name().to_string_lossy().parse()?);
    ptrace::seize(worker, ptrace::Options::empty())?;
    ptrace::interrupt(worker)?;
    waitpid(worker, Some(WaitPidFlag::__WALL))?;
    daemon.wait_for_line("workers do not answer")?;
    // Those that were on their way.
    while !manager.is_without("WATCHDOG=1", Duration::from_millis(100))? {}
    assert!(manager.is_without("WATCHDOG=1", Duration::from_secs(1))?, "a worker does not run");
    ptrace::detach(worker, None)?;
    manager.hears("WATCHDOG=1")?;
    daemon.stop()?;
    Ok(())
}

/// A daemon listens on the sockets that it is given: what waited in them before it ran is answered, and what comes after its
/// end waits for the next one.
#[test]
fn connections_wait_in_a_managers_socket_before_the_daemon_and_after_it() -> Result<()> {
    let world = World::new()?;
    let mut manager = Manager::new(&world)?;
    let target = world.serve(TARGET4, target::echo())?;
    let listener: OwnedFd = world.net().run(|| TcpListener::bind(AT))?.into();
    let file = config(&world, "")?;
    for _ in 0..2 {
        std::thread::scope(|scope| -> Result<()> {
            let early = scope.spawn(|| status(&world, &target));
            wait_for("a connection that waits", PATIENCE, || {
                let sockets = world.net().sockets().ok()?;
                sockets.iter().any(|s| s.listens() && s.local == AT && s.recv_queue > 0).then_some(())
            })?;
            let mut daemon = manager.start(&world, &file, &[], &[listener.try_clone()?])?;
            manager.hears("READY=1")?;
            assert_eq!(early.join().expect("it does not panic")?, 200);
            for _ in 0..8 {
                assert_eq!(status(&world, &target)?, 200, "by every worker");
            }
            daemon.stop()?;
            Ok(())
        })?;
    }
    Ok(())
}

/// A socket that is none for TCP is an error that says so, and one that nothing is configured for is closed with a warning.
#[test]
fn a_socket_that_does_not_fit_is_named() -> Result<()> {
    let world = World::new()?;
    let mut manager = Manager::new(&world)?;
    let file = config(&world, "")?;
    let other: OwnedFd = world.net().run(|| TcpListener::bind((NET4, 0)))?.into();
    let mut daemon = manager.start(&world, &file, &[], &[other])?;
    manager.hears("READY=1")?;
    daemon.wait_for_line("nothing is configured to listen there")?;
    daemon.stop()?;
    let udp: OwnedFd = std::net::UdpSocket::bind("127.0.0.1:0")?.into();
    let mut daemon = manager.start(&world, &file, &[], &[udp])?;
    assert!(!daemon.wait(PATIENCE)?.success());
    let said = daemon.stderr();
    assert!(said.contains("socket 0 of the service manager does not listen for TCP connections"), "{said}");
    Ok(())
}

/// Where the manager keeps descriptors it gets the listening sockets: connections that come after a daemon was killed wait for
/// the next one, and none is refused.
///
/// Failure: daemon-killed.
#[test]
fn connections_wait_for_the_next_daemon_where_the_manager_keeps_the_sockets() -> Result<()> {
    let world = World::new()?;
    let mut manager = Manager::new(&world)?;
    let target = world.serve(TARGET4, target::echo())?;
    let file = config(&world, "")?;
    let mut daemon = manager.start(&world, &file, &[("FDSTORE", "16")], &[])?;
    manager.hears("READY=1")?;
    manager.hears("FDSTORE=1")?;
    assert_eq!(manager.stored.len(), 2, "one for each worker");
    daemon.kill()?;
    let waiting = world.node().run(|| TcpStream::connect(AT)).context("refused")?;
    let stored = std::mem::take(&mut manager.stored);
    std::thread::scope(|scope| -> Result<()> {
        let early = scope.spawn(|| status(&world, &target));
        let mut daemon = manager.start(&world, &file, &[("FDSTORE", "16")], &stored)?;
        manager.hears("READY=1")?;
        assert_eq!(early.join().expect("it does not panic")?, 200);
        manager.hears("FDSTORE=1")?;
        assert_eq!(manager.stored.len(), 2, "the same two");
        drop(waiting);
        daemon.stop()?;
        Ok(())
    })?;
    Ok(())
}
