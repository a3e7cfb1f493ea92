//! `tunnel run --takeover`, again and again: a daemon that has taken over can be replaced in its turn.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _},
            net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::sys::signal::Signal;
use tunnel_tests::{
    NetNs, PATIENCE, Process, TARGET4, Target, World, amount::amount, bpffs::BpfFs, cgroup::Cgroup,
    daemon::through, dialogue::ask, gateway, node::Node, pki::GATEWAY_ID, programs, rules, target, wait_for,
    world::NET4,
};

/// How often one daemon replaces another.
const TIMES: usize = 3;
/// The same over HTTP/3, in the suite of every merge and where tests are thorough.
const TIMES_OVER_HTTP_3: [usize; 2] = [2, 10];

fn daemon(world: &World, host: &NetNs, config: &Path, flags: &[&str]) -> Result<Process> {
    let mut command = host.command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--config"]).arg(config).args(flags);
    Process::spawn("daemon", world.folder(), command)
}

/// An application in the group.
fn app(world: &World, cgroup: &Cgroup, words: &[&str]) -> Result<Process> {
    let mut command = world.node().command(programs::app()?);
    command.args(words);
    cgroup.adopt(&mut command)?;
    Process::spawn_with_input("app", world.folder(), command)
}

/// Under load: a number of connections have come and gone.
fn load(target: &Target) -> Result<()> {
    let before = target.peers().len();
    wait_for("the load", PATIENCE, || (target.peers().len() > before + 20).then_some(()))
}

/// Replaces a daemon under load, several times; `hold` has a flow on the first. The first and the last daemon.
fn replace(
    world: &World,
    host: &NetNs,
    config: &Path,
    old: Process,
    target: &Target,
    hold: &mut Process,
) -> Result<[Process; 2]> {
    replace_times(TIMES, (world, host, config), old, target, hold)
}

fn replace_times(
    times: usize,
    (world, host, config): (&World, &NetNs, &Path),
    mut old: Process,
    target: &Target,
    hold: &mut Process,
) -> Result<[Process; 2]> {
    // Only the first has a flow that lasts, so it stays; the others end when they have been replaced.
    let mut first = None;
    let mut turns = 0;
    loop {
        load(target)?;
        let mut new = daemon(world, host, config, &["--takeover"])?;
        new.wait_for_line("took over from the old daemon")?;
        old.wait_for_line("another daemon has taken over: draining")?;
        load(target)?;
        assert_eq!(ask(hold, "ping")?, "ok", "the flow on the first daemon goes on");
        let mut replaced = std::mem::replace(&mut old, new);
        turns += 1;
        match first.take() {
            None => {
                assert!(replaced.ended()?.is_none());
                first = Some(replaced);
            }
            Some(stays) => {
                assert!(replaced.wait(PATIENCE)?.success());
                if turns == times {
                    return Ok([stays, old]);
                }
                first = Some(stays);
            }
        }
    }
}

/// No connection is refused while one gateway replaces another again and again.
///
/// Failure: daemon-upgraded.
#[test]
fn no_connection_is_refused_while_one_gateway_replaces_another_again_and_again() -> Result<()> {
    gateways_replace_each_other("h2", TIMES)
}

/// No stream over HTTP/3 is refused or lost while one gateway replaces another again and again: those of the first, those of
/// connections that are told to go away, and those of clients that come meanwhile.
///
/// Failure: daemon-upgraded.
#[test]
fn no_stream_is_lost_while_one_http_3_gateway_replaces_another_again_and_again() -> Result<()> {
    let [brief, thorough] = TIMES_OVER_HTTP_3;
    gateways_replace_each_other("h3", amount(brief, thorough))
}

fn gateways_replace_each_other(protocol: &str, times: usize) -> Result<()> {
    let world = World::new()?;
    let addr = SocketAddr::new(NET4, gateway::PORT);
    let config = format!(
        "[daemon]\ndrain_timeout = \"60s\"\nworkers = 2\n{}[[listener]]\naddress = \"{addr}\"\n\
         protocols = [\"{protocol}\"]\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    let config = world.file("gateway.toml", config)?;
    let mut first = daemon(&world, world.net(), &config, &[])?;
    first.wait_for_line("listening")?;
    let target = world.serve(TARGET4, target::echo())?;
    let agent = format!(
        "{}{}protocol = \"{protocol}\"\n",
        world.pki().named("node").toml(),
        through(addr, GATEWAY_ID)
    );
    let agent = world.file("agent.toml", agent)?;
    let mut hold = world.exec_with(&agent).spawn_app(&["hold", &target.addr().to_string()])?;
    hold.says("held=1")?;
    let mut busy = world.exec_with(&agent).spawn_app(&["keep-connecting", &target.addr().to_string()])?;
    busy.says("started=1")?;
    let _both = replace_times(times, (&world, world.net(), &config), first, &target, hold.process())?;
    let done = busy.finish()?;
    assert!(done.success(), "{done}");
    Ok(())
}

/// No captured connection is refused while one agent replaces another again and again.
///
/// Failure: daemon-upgraded.
#[test]
fn no_captured_connection_is_refused_while_one_agent_replaces_another_again_and_again() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let (cgroup, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let config = format!(
        "[daemon]\n{}drain_timeout = \"60s\"\n{}[[capture]]\ncgroup = \"{}\"\n{}",
        bpffs.toml(),
        world.pki().named("node").toml(),
        cgroup.path().display(),
        through(gateway.addr(), GATEWAY_ID),
    );
    let config = world.file("agent.toml", config)?;
    let mut first = daemon(&world, world.node(), &config, &[])?;
    first.wait_for_line("capturing")?;
    let addr = target.addr().to_string();
    let mut hold = app(&world, &cgroup, &["hold", &addr])?;
    hold.wait_for_line("held=1")?;
    let mut busy = app(&world, &cgroup, &["keep-connecting", &addr])?;
    busy.wait_for_line("started=1")?;
    let _both = replace(&world, world.node(), &config, first, &target, &mut hold)?;
    busy.hang_up();
    assert!(busy.wait(PATIENCE)?.success(), "{busy}");
    assert_eq!(ask(&mut hold, "peer")?, addr, "it still sees the address that it asked for");
    Ok(())
}

/// No redirected connection is refused while one agent replaces another again and again.
#[test]
fn no_redirected_connection_is_refused_while_one_agent_replaces_another_again_and_again() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let cgroup = Cgroup::new()?;
    world.node().ip(&format!("route add default via {NET4}"))?;
    rules::redirect(world.node(), &cgroup, 15001)?;
    let config = format!(
        "[daemon]\ndrain_timeout = \"60s\"\n{}[[capture]]\nmode = \"redirect\"\nlisten = [\"127.0.0.1:15001\"]\n{}",
        world.pki().named("node").toml(),
        through(gateway.addr(), GATEWAY_ID),
    );
    let config = world.file("agent.toml", config)?;
    let mut first = daemon(&world, world.node(), &config, &[])?;
    first.wait_for_line("capturing")?;
    let addr = target.addr().to_string();
    let mut hold = app(&world, &cgroup, &["hold", &addr])?;
    hold.wait_for_line("held=1")?;
    let mut busy = app(&world, &cgroup, &["keep-connecting", &addr])?;
    busy.wait_for_line("started=1")?;
    let _both = replace(&world, world.node(), &config, first, &target, &mut hold)?;
    busy.hang_up();
    assert!(busy.wait(PATIENCE)?.success(), "{busy}");
    assert!(target.peers().iter().all(|p| p.ip() == NET4), "all came through the gateway");
    Ok(())
}

/// A gateway and its configuration file.
fn gateway(world: &World) -> Result<(PathBuf, Process)> {
    let config = format!(
        "{}[[listener]]\naddress = \"{}\"\n[[route]]\nto = \"direct\"\n",
        world.pki().named("gateway").toml(),
        SocketAddr::new(NET4, gateway::PORT)
    );
    let file = world.file("gateway.toml", config)?;
    let mut running = daemon(world, world.net(), &file, &[])?;
    running.wait_for_line("listening")?;
    Ok((file, running))
}

/// Where the daemon of a configuration file on this host is met.
fn meeting_point(host: &NetNs, config: &Path) -> Result<PathBuf> {
    let netns = host.run(|| fs::metadata("/proc/thread-self/ns/net"))?.ino();
    let config = fs::canonicalize(config)?;
    // FNV-1a.
    let hash = config
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    Ok(Path::new("/run/tunnel").join(format!("{netns:x}-{hash:016x}.sock")))
}

/// Waits until a daemon can be met there.
fn offered(place: &Path) -> Result<()> {
    wait_for("the offer", PATIENCE, || place.exists().then_some(()))
}

/// Somebody who stands at the abstract name where daemons of earlier releases met is in nobody's way.
///
/// Failure: daemon-upgraded.
#[test]
fn whoever_takes_an_abstract_name_first_keeps_no_daemon_from_taking_over() -> Result<()> {
    let world = World::new()?;
    let path = world.folder().join("gateway.toml");
    fs::write(&path, "")?;
    let path = fs::canonicalize(path)?;
    let name = path.as_os_str().as_encoded_bytes();
    let name = [b"tunnel-takeover:", &name[name.len().saturating_sub(80)..]].concat();
    let _squatter = world.net().run(move || UnixListener::bind_addr(&UnixAddr::from_abstract_name(name)?))?;
    let (file, mut old) = gateway(&world)?;
    let place = meeting_point(world.net(), &file)?;
    offered(&place)?;
    let mut new = daemon(&world, world.net(), &file, &["--takeover"])?;
    new.wait_for_line("took over from the old daemon")?;
    assert!(old.wait(PATIENCE)?.success());
    new.stop()?;
    assert!(!place.exists() && !place.with_extension("lock").exists(), "nothing is left behind");
    Ok(())
}

/// A daemon that hands over to one that says nothing more hears a signal all the same, and ends.
///
/// Failure: daemon-upgraded.
#[test]
fn a_daemon_that_hands_over_hears_signals_meanwhile() -> Result<()> {
    let world = World::new()?;
    let (file, mut old) = gateway(&world)?;
    let socket = meeting_point(world.net(), &file)?;
    // What a daemon leaves that is killed, the next one removes.
    offered(&socket)?;
    old.kill()?;
    let mut old = daemon(&world, world.net(), &file, &[])?;
    old.wait_for_line("listening")?;
    let mut silent = wait_for("a new socket", PATIENCE, || UnixStream::connect(&socket).ok())?;
    assert_eq!(fs::metadata("/run/tunnel")?.mode() & 0o022, 0, "nobody else can put anything there");
    // The first message has come: it waits for the last word now.
    silent.read_exact(&mut [0; 1])?;
    let asked = Instant::now();
    old.signal(Signal::SIGTERM)?;
    assert!(old.wait(PATIENCE)?.success());
    // Half a minute is what the other side has for its word.
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    Ok(())
}

/// A daemon whose predecessor hangs up before it has heard that it can stop takes back what it has attached, and ends.
///
/// Failure: daemon-upgraded.
#[test]
fn a_daemon_whose_predecessor_hangs_up_takes_everything_back() -> Result<()> {
    let world = World::new()?;
    let node = Node::new(&world)?;
    let gateway = world.gateway().start()?;
    let file = world.file("agent.toml", node.config(&gateway, "", ""))?;
    fs::create_dir_all("/run/tunnel")?;
    fs::set_permissions("/run/tunnel", fs::Permissions::from_mode(0o700))?;
    let place = meeting_point(world.node(), &file)?;
    let old = UnixListener::bind(&place)?;
    let mut new = daemon(&world, world.node(), &file, &["--takeover"])?;
    let (mut stream, _) = old.accept()?;
    // An empty list, and no ear for what comes of it.
    stream.write_all(&[0; 64])?;
    drop(stream);
    assert!(!new.wait(PATIENCE)?.success());
    assert!(new.stderr().contains("no longer hands over"), "{new}");
    assert_eq!(node.bpffs.pins(), [] as [PathBuf; 0]);
    fs::remove_file(&place)?;
    Ok(())
}
