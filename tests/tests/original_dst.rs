//! Proxies written for iptables work behind our capture, unmodified.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use anyhow::Result;
use tunnel_tests::{
    NET4, NetNs, Process, TARGET4, TARGET6, Target, World, bpffs::BpfFs, cgroup::Cgroup, daemon::Daemon,
    process, programs, target,
};

/// A configuration that hands what the group connects to to a proxy.
fn hand_over(group: &Cgroup, bpffs: &BpfFs, proxy: &str) -> String {
    let (group, bpffs) = (group.path().display(), bpffs.toml());
    format!(
        "[daemon]\n{bpffs}\n[[capture]]\ncgroup = \"{group}\"\ninclude = [\"10.200.0.0/24\", \"fd00:200::/64\"]\n\
         proxy = \"{proxy}\"\n"
    )
}

/// A command of the tests' application in a group.
fn app(host: &NetNs, group: &Cgroup, words: &[&str]) -> Result<std::process::Command> {
    let mut command = host.command(programs::app()?);
    command.args(words);
    group.adopt(&mut command)?;
    Ok(command)
}

fn asks_for_original_dst(proxy: &str, target: SocketAddr) -> Result<()> {
    let world = World::new()?;
    let (group, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let listen = app(world.node(), &group, &["original-dst", proxy])?;
    let mut server = Process::spawn("proxy", world.folder(), listen)?;
    server.wait_for_line("listening")?;
    let _daemon = Daemon::start(&world, world.node(), &hand_over(&group, &bpffs, proxy))?;
    let client =
        process::output(&mut app(world.node(), &group, &["many", &target.to_string(), "1", "1000"])?)?;
    assert!(client.contains("many=1"), "{client}");
    assert_eq!(server.wait_for_line("original=")?, format!("original={target}"));
    assert!(server.wait(tunnel_tests::PATIENCE)?.success());
    Ok(())
}

/// SO_ORIGINAL_DST on a captured connection returns the original destination.
#[test]
fn so_original_dst_answers_where_the_application_wanted_to_go() -> Result<()> {
    asks_for_original_dst("127.0.0.1:12345", SocketAddr::new(TARGET4, 4321))
}

/// IP6T_SO_ORIGINAL_DST on a captured connection returns the original destination.
#[test]
fn ip6t_so_original_dst_answers_where_the_application_wanted_to_go() -> Result<()> {
    asks_for_original_dst("[::1]:12345", SocketAddr::new(TARGET6, 4321))
}

/// An unmodified redsocks carries captured connections.
#[test]
fn an_unmodified_redsocks_carries_what_we_capture() -> Result<()> {
    const BYTES: u64 = 300_000;
    let world = World::new()?;
    let (group, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let upstream = Target::start(world.net(), SocketAddr::new(NET4, 3128), target::connect_proxy(&asked))?;
    let config = format!(
        "base {{ log_debug = off; log_info = on; log = stderr; daemon = off; redirector = iptables; }}\n\
         redsocks {{ local_ip = 127.0.0.1; local_port = 12345; ip = {}; port = {}; type = http-connect; }}\n",
        upstream.addr().ip(),
        upstream.addr().port()
    );
    let config = world.file("redsocks.conf", config)?;
    let mut redsocks = world.node().command(programs::system("redsocks")?);
    redsocks.arg("-c").arg(config);
    // It is asked about connections of the group's, so it is in the group.
    group.adopt(&mut redsocks)?;
    let mut redsocks = Process::spawn("redsocks", world.folder(), redsocks)?;
    tunnel_tests::wait_for("redsocks to listen", tunnel_tests::PATIENCE, || {
        (world.node().listens(12345).is_ok_and(|listens| listens)
            || redsocks.ended().is_ok_and(|e| e.is_some()))
        .then_some(())
    })?;
    let _daemon = Daemon::start(&world, world.node(), &hand_over(&group, &bpffs, "127.0.0.1:12345"))?;

    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let addr = target.addr().to_string();
    let client = process::output(&mut app(world.node(), &group, &["duplex", &addr, &BYTES.to_string()])?)?;
    assert!(client.contains(&format!("duplex={BYTES}")), "{client}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    assert_eq!(*asked.lock().expect("no handler panicked"), [addr]);
    Ok(())
}
