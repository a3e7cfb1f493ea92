//! Nothing of what a captured program sends leaves its host in plaintext, however it connects.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use tunnel_tests::{
    NET4, NET6, NODE4, NODE6, Process, TARGET4, TARGET6, World,
    bpffs::BpfFs,
    cgroup::{self, Cgroup},
    crowd::Crowd,
    daemon::{Daemon, through},
    frames::Watch,
    pki::GATEWAY_ID,
    process, programs,
};

/// How long it tries in the suite; `TUNNEL_ESCAPE_SECONDS` says otherwise.
const SECONDS: u64 = 8;
/// What every way may take that has begun when the time is up.
const REST: Duration = Duration::from_secs(60);

/// The ways of the application that end in the tunnel on any kernel that capture is for.
const CARRIED: [&str; 16] = [
    "plain",
    "non-blocking",
    "v4-mapped",
    "fork",
    "thread",
    "new-namespace",
    "socket-of-a-new-namespace",
    "mark-default",
    "mark-all-bits",
    "cap-net-raw-alone",
    "group-below",
    "group-made-anew",
    "fast-open",
    "af-unspec-between",
    "bind-to-device",
    "bound-to-an-address",
];

fn seconds() -> Result<u64> {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let said = std::env::var("TUNNEL_ESCAPE_SECONDS").ok();
    said.map_or(Ok(SECONDS), |said| said.parse().context("TUNNEL_ESCAPE_SECONDS"))
}

/// A program that tries every way out of its capture (processes, threads, namespaces, marks, groups, io_uring, Multipath TCP,
/// fast open, AF_UNSPEC, devices, repair) sends its secret to nobody but the gateway, encrypted: no frame between the hosts
/// holds it, and the targets see nobody else.
#[test]
fn whatever_a_captured_program_tries_none_of_its_bytes_leave_in_plaintext() -> Result<()> {
    let world = World::new()?;
    world.node().ip(&format!("route add default via {NET4}"))?;
    world.node().ip(&format!("-6 route add default via {NET6}"))?;
    world.node().settings(&[("ipv4/tcp_fastopen", "1543")])?; // 0x607
    let gateway = world.gateway().start()?;
    let targets = Crowd::start(world.net(), &[(TARGET4, 0).into(), (TARGET6, 0).into()])?;
    let (around, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let group = around.path().join("app");
    fs::create_dir(&group)?;
    let capture = |name: &str| format!("[[capture]]\ncgroup = \"{}\"\n", around.path().join(name).display());
    let config = format!(
        "[daemon]\n{}{}{}{}{}",
        bpffs.toml(),
        world.pki().named("node").toml(),
        capture("app"),
        capture("anew"),
        through(gateway.addr(), GATEWAY_ID)
    );
    let link = world.node().ip(&format!("-4 route get {NET4}"))?;
    let device = link.split_whitespace().skip_while(|word| *word != "dev").nth(1).context("a device")?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
    let secret = format!("<a-secret-of-{}-{now}>", std::process::id());

    // What is in plaintext is seen.
    let watch = Watch::start(world.net(), &secret)?;
    let words = |verb: &str, first: &str| -> Vec<String> {
        let (group, around) = (group.display().to_string(), around.path().display().to_string());
        let targets = targets.addresses().iter().map(SocketAddr::to_string);
        [verb, first, &secret, &group, &around, "anew", device]
            .map(str::to_owned)
            .into_iter()
            .chain(targets)
            .collect()
    };
    let mut direct = world.node().command(programs::app()?);
    let said = process::output(direct.args(words("escape-once", "plain")))?;
    assert_eq!(said, "outcome=0\noutcome=0\n");
    assert!(watch.seen()?.secret.is_some(), "the control");
    let before = targets.from();
    assert_eq!(before.keys().copied().collect::<Vec<_>>(), [NODE4, NODE6], "the control");

    let mut daemon = Daemon::start(&world, world.node(), &config)?;
    daemon.process().wait_for_line("waiting for cgroup")?;
    let watch = Watch::start(world.net(), &secret)?;
    let seconds = seconds()?;
    let mut command = world.node().command(programs::app()?);
    command.args(words("escape", &seconds.to_string()));
    cgroup::adopt(&group, &mut command)?;
    let mut app = Process::spawn("escape", world.folder(), command)?;
    let status = app.wait(Duration::from_secs(seconds) + REST)?;
    assert!(status.success(), "{app}");
    let said = app.stdout();
    let seen = watch.seen()?;
    println!("{} frames\n{said}", seen.frames);
    assert!(seen.frames > 1000, "{seen:?}");
    assert!(seen.secret.is_none(), "in plaintext: {:?}\n{said}", seen.secret);
    let mut peers = targets.from();
    for (ip, n) in before {
        assert_eq!(peers.remove(&ip), Some(n), "{ip} has come by itself\n{said}");
    }
    assert_eq!(peers.keys().copied().collect::<Vec<_>>(), [NET4, NET6], "{said}");
    let outcomes: BTreeMap<&str, u64> = said
        .lines()
        .filter_map(|l| l.split_once('='))
        .filter_map(|(k, n)| Some((k, n.parse().ok()?)))
        .collect();
    // That none fails is what other tests are about: these are so many at once that some get in each other's way.
    for way in CARRIED {
        assert!(outcomes.contains_key(&*format!("{way}-ok")), "{way}\n{said}");
    }
    for way in ["io-uring", "io-uring-worker", "io-uring-poller"] {
        let forbidden = ["ENOSYS", "EPERM"].iter().any(|e| outcomes.contains_key(&*format!("{way}-{e}")));
        if forbidden {
            println!("NOT tested: {way}: this kernel forbids io_uring (kernel.io_uring_disabled)");
        }
        assert!(forbidden || outcomes.contains_key(&*format!("{way}-ok")), "{way}\n{said}");
    }
    daemon.process().stop()?;
    Ok(())
}
