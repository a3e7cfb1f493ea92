//! A captured application sees its own network: what it sees of its sockets is what it would see without us.
//!
//! The targets here can be reached from the node by itself, so that a program can be run both ways.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tunnel_tests::{
    Gateway, NET4, NET6, NODE4, NODE6, PATIENCE, Process, TARGET4, TARGET6, Target, World,
    amount::amount,
    crowd::Crowd,
    daemon::{Daemon, through},
    dialogue::ask,
    gateway::PORT,
    node::Node,
    pki::GATEWAY_ID,
    process, programs,
    target::{self, Handler},
    wait_for,
};

/// A second target of each family.
const OTHER4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 200, 0, 11));
const OTHER6: &str = "fd00:200::11";
/// What nobody captures; routes prefer the first cable, and the second one leads there too.
const EXCLUDED4: &str = "10.79.0.1";
const EXCLUDED6: &str = "fd79::1";

/// A port that nobody listens on.
const CLOSED: u16 = 9;

/// What 20,000 descriptors of a process allow, where tests are thorough.
const HELD: [usize; 2] = [4_000, 18_000];
/// What all of them may take, one after the other, on a busy machine.
const LONG: Duration = Duration::from_secs(220);

/// The node with two ways to `net`, and routes to the targets.
struct Scene<'w> {
    world: &'w World,
    gateway: Gateway<'w>,
    /// The node's ends of the first cable and of the second.
    devices: [String; 2],
    targets: Vec<Target>,
}

impl<'w> Scene<'w> {
    fn new(world: &'w World) -> Result<Self> {
        let (node, net) = (world.node(), world.net());
        node.join(&["10.78.0.1/30", "fd78::1/64"], net, &["10.78.0.2/30", "fd78::2/64"])?;
        node.ip(&format!("route add default via {NET4}"))?;
        node.ip(&format!("-6 route add default via {NET6}"))?;
        let device = |network: &str| -> Result<String> {
            let route = node.ip(&format!("-4 route show {network}"))?;
            let device = route.split_whitespace().skip_while(|word| *word != "dev").nth(1);
            Ok(device.context("the route of a cable")?.to_owned())
        };
        let devices = [device("10.77.0.0/30")?, device("10.78.0.0/30")?];
        let device = &devices[1];
        // By the device alone.
        node.ip(&format!("route add default via 10.78.0.2 dev {device} metric 900"))?;
        node.ip(&format!("-6 route add default via fd78::2 dev {device} metric 9000"))?;
        for address in [format!("{OTHER4}/32"), format!("{OTHER6}/128")] {
            net.add_address(&address, "lo")?;
        }
        for address in [format!("{EXCLUDED4}/32"), format!("{EXCLUDED6}/128")] {
            net.add_address(&address, "lo")?;
        }
        let gateway = world.gateway().start()?;
        Ok(Self { world, gateway, devices, targets: Vec::new() })
    }

    /// A target in `net`.
    fn serve(&mut self, ip: IpAddr, handler: impl Handler) -> Result<SocketAddr> {
        let target = self.world.serve(ip, handler)?;
        let addr = target.addr();
        self.targets.push(target);
        Ok(addr)
    }

    /// What the application is told: `options KIND …`.
    fn words(&mut self, kind: &str) -> Result<Vec<String>> {
        let (one, two, excluded): (IpAddr, IpAddr, IpAddr) = match kind {
            "6" => (TARGET6, OTHER6.parse()?, EXCLUDED6.parse()?),
            _ => (TARGET4, OTHER4, EXCLUDED4.parse()?),
        };
        let words = [
            self.serve(one, target::echo())?,
            self.serve(two, target::echo())?,
            SocketAddr::new(one, CLOSED),
            self.serve(excluded, target::name_the_peer())?,
        ];
        let words = words.iter().map(SocketAddr::to_string);
        Ok(["options", kind]
            .map(str::to_owned)
            .into_iter()
            .chain(words)
            .chain(self.devices.clone())
            .collect())
    }

    fn command(&self, words: &[String]) -> Result<std::process::Command> {
        let mut command = self.world.node().command(programs::app()?);
        command.args(words);
        Ok(command)
    }

    /// What a capture has besides.
    fn excludes() -> String {
        format!("exclude = [\"{EXCLUDED4}/32\", \"{EXCLUDED6}/128\"]\n")
    }

    /// The routes: what is closed at the targets is denied here, so that connect() says the same.
    fn routes(&self) -> String {
        let denied = [TARGET4.to_string(), TARGET6.to_string()];
        let denied = denied
            .map(|ip| if ip.contains(':') { format!("[{ip}]:{CLOSED}") } else { format!("{ip}:{CLOSED}") });
        format!(
            "[[route]]\nmatch = {{ destination = {denied:?} }}\nto = \"deny\"\n{}",
            through(self.gateway.addr(), GATEWAY_ID)
        )
    }

    fn exec_config(&self) -> Result<PathBuf> {
        let identity = self.world.pki().named("node").toml();
        self.world.file("exec.toml", format!("[daemon]\nworkers = 2\n{identity}{}", self.routes()))
    }

    /// For `tunnel run`.
    fn run_config(&self, node: &Node<'_>) -> String {
        let text = node.config(&self.gateway, "", &Self::excludes());
        let end = text.find("[[route]]").unwrap_or(text.len());
        format!("{}{}", &text[..end], self.routes())
    }
}

/// The lines that are about the network, and those about the capture.
fn lines(said: &str) -> (Vec<&str>, Vec<&str>) {
    said.lines().partition(|line| !line.starts_with("only."))
}

/// What direct and captured runs say of themselves is equal, and what is right for a direct one is what was meant.
fn same(kind: &str) -> Result<()> {
    let world = World::new()?;
    let mut scene = Scene::new(&world)?;
    let words = scene.words(kind)?;
    let own = match kind {
        "6" => NODE6.to_string(),
        "mapped" => format!("::ffff:{NODE4}"),
        _ => NODE4.to_string(),
    };
    let target = words.get(2).context("the first target")?.clone();

    let direct = process::output(&mut scene.command(&words)?)?;
    let (direct, _) = lines(&direct);
    assert!(direct.len() > 15 && !direct.iter().any(|line| line.contains("=failed: ")), "{direct:#?}");
    let by_route = format!(" {own} by its route {own}");
    assert!(
        direct.iter().any(|l| l.starts_with("getsockname-unbound=") && l.ends_with(&by_route)),
        "{direct:#?}"
    );
    let second = if kind == "6" { "fd78::1" } else { "10.78.0.1" };
    assert!(direct.contains(&&*format!("a-device-after-another-attempt={second}")), "{direct:#?}");
    let gateways = |scene: &Scene<'_>, from: usize| -> Result<()> {
        let peers: Vec<SocketAddr> =
            scene.targets[..2].iter().flat_map(|t| t.peers().split_off(from.min(t.peers().len()))).collect();
        ensure!(!peers.is_empty() && peers.iter().all(|p| [NET4, NET6].contains(&p.ip())), "{peers:?}");
        Ok(())
    };
    let seen = scene.targets.iter().map(|t| t.peers().len()).max().unwrap_or_default();

    let app = programs::app()?.display().to_string();
    let all: Vec<&str> = std::iter::once(&app).chain(&words).map(String::as_str).collect();
    let exec = world.exec_with(&scene.exec_config()?);
    let exec =
        exec.flag("--exclude", format!("{EXCLUDED4}/32")).flag("--exclude", format!("{EXCLUDED6}/128"));
    let done = exec.run(&all)?;
    assert!(done.success(), "{done}");
    let (captured, only) = lines(&done.stdout);
    assert_eq!(captured, direct, "under exec\n{done}");
    for name in ["original-dst", "mptcp-original-dst"] {
        assert!(only.contains(&&*format!("only.{name}={target}")), "{only:?}");
    }
    assert!(!done.stderr.contains("was not captured"), "{done}");
    gateways(&scene, seen)?;

    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&scene.run_config(&node))?;
    let seen = scene.targets.iter().map(|t| t.peers().len()).max().unwrap_or_default();
    let mut command = scene.command(&words)?;
    node.cgroup.adopt(&mut command)?;
    let said = process::output(&mut command)?;
    let (captured, only) = lines(&said);
    assert_eq!(captured, direct, "in a group that a daemon captures\n{}", daemon.log());
    for name in ["original-dst", "mptcp-original-dst"] {
        assert!(only.contains(&&*format!("only.{name}={target}")), "{only:?}");
    }
    assert!(!daemon.log().contains("was not captured"), "{}", daemon.log());
    gateways(&scene, seen)?;
    daemon.process().stop()?;
    Ok(())
}

/// Local ports, names, devices, Multipath TCP, and failures are those of a program that is run without us.
#[test]
fn over_ipv4_a_captured_program_sees_what_it_sees_without_us() -> Result<()> {
    same("4")
}

/// Over IPv6 a captured program observes at its sockets what it observes without us.
#[test]
fn over_ipv6_a_captured_program_sees_what_it_sees_without_us() -> Result<()> {
    same("6")
}

/// With v4-mapped addresses a captured program observes at its sockets what it observes without us.
#[test]
fn with_v4_mapped_addresses_a_captured_program_sees_what_it_sees_without_us() -> Result<()> {
    same("mapped")
}

/// getsockname() follows the routes: another source address, in force while the daemon runs, is seen soon after.
#[test]
fn getsockname_follows_a_route_that_changes_while_the_daemon_runs() -> Result<()> {
    let world = World::new()?;
    let mut scene = Scene::new(&world)?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&scene.run_config(&node))?;
    for (target, own, new, family) in
        [(TARGET4, NODE4, "10.77.9.9", "-4"), (TARGET6, NODE6, "fd77::99", "-6")]
    {
        let addr = scene.serve(target, target::echo())?;
        let mut app = node.app(&["sock-names", &addr.to_string()])?;
        app.wait_for_line("ready=1")?;
        assert_eq!(ask(&mut app, "before")?, format!("{own} {own}"));
        world.node().add_address(new, "lo")?;
        let via = if family == "-4" { NET4 } else { NET6 };
        world.node().ip(&format!("{family} route add {target} via {via} src {new}"))?;
        wait_for("the new source address", PATIENCE, || {
            (ask(&mut app, "asked").ok()? == format!("{new} {new}")).then_some(())
        })?;
        world.node().ip(&format!("{family} route delete {target}"))?;
        wait_for("the old source address", PATIENCE, || {
            (ask(&mut app, "again").ok()? == format!("{own} {own}")).then_some(())
        })?;
        app.hang_up();
        app.wait(PATIENCE)?;
    }
    daemon.process().stop()?;
    Ok(())
}

/// With fast open on both sides of every socket of the namespace, none of some thousand connections is reset.
#[test]
fn with_fast_open_for_every_listener_no_connection_is_reset() -> Result<()> {
    const CONNECTIONS: &str = "1000";
    let world = World::new()?;
    world.node().settings(&[("ipv4/tcp_fastopen", "1543")])?; // 0x607
    let gateway = world.gateway().start()?;
    for ip in [TARGET4, TARGET6] {
        let target = world.serve(ip, target::echo())?;
        for how in ["connect", "fastopen", "sendto"] {
            let done = world.exec(&gateway).run_app(&[
                "many-short",
                &target.addr().to_string(),
                CONNECTIONS,
                how,
            ])?;
            assert!(done.success(), "{how}: {done}");
            assert_eq!(done.value("ok")?, CONNECTIONS, "{how}: {done}");
            assert!(!done.stderr.contains("was not captured"), "{how}: {done}");
        }
    }
    Ok(())
}

/// No listener of ours has a port that programs of the namespace are given, or an address that they bind.
#[test]
fn a_program_can_bind_every_port_of_its_range() -> Result<()> {
    let world = World::new()?;
    world.node().settings(&[("ipv4/ip_local_port_range", "40000 40009")])?;
    let gateway = world.gateway().start()?;
    for _ in 0..3 {
        for ip in ["127.0.0.1", "0.0.0.0", "::1", "::"] {
            let done = world.exec(&gateway).run_app(&["bind-range", ip])?;
            assert_eq!(done.value("bound")?, "10 of 10", "{ip}: {done}");
        }
    }
    Ok(())
}

/// What an application holds open at once, over `targets` by turns.
struct Held {
    app: Process,
}

impl Held {
    /// `words` after `hold-many`.
    fn direct(scene: &Scene<'_>, words: &[String]) -> Result<Self> {
        let all: Vec<String> = std::iter::once("hold-many".to_owned()).chain(words.iter().cloned()).collect();
        Ok(Self { app: Process::spawn_with_input("direct", scene.world.folder(), scene.command(&all)?)? })
    }

    fn count(&mut self) -> Result<String> {
        let said = self.app.wait_for_line_while_it_goes_on("held=")?;
        self.app.hang_up();
        self.app.wait(PATIENCE)?;
        Ok(said)
    }
}

/// A range of local ports holds as many connections as it holds without us: of each port one to each target.
#[test]
fn as_many_connections_as_without_us_fit_into_a_range_of_local_ports() -> Result<()> {
    let world = World::new()?;
    let mut scene = Scene::new(&world)?;
    world.net().add_address("10.200.0.12/32", "lo")?;
    world.net().add_address("fd00:200::12/128", "lo")?;
    world.node().settings(&[("ipv4/ip_local_port_range", "40000 40099")])?;
    for addresses in
        [["10.200.0.10", "10.200.0.11", "10.200.0.12"], ["fd00:200::10", "fd00:200::11", "fd00:200::12"]]
    {
        let mut words = vec!["60".to_owned()];
        for address in addresses {
            words.push(scene.serve(address.parse()?, target::echo())?.to_string());
        }
        let direct = Held::direct(&scene, &words)?.count()?;
        assert_eq!(direct, "held=180 of 180", "without us");
        let words: Vec<&str> = std::iter::once("hold-many").chain(words.iter().map(String::as_str)).collect();
        let mut app = world.exec(&scene.gateway).spawn_app(&words)?;
        assert_eq!(format!("held={}", app.value_in_the_end("held")?), direct);
        assert!(app.finish()?.success());
    }
    Ok(())
}

/// Short connections, one after the other, whose ends are in TIME-WAIT and may not be used again: as many as without us.
#[test]
fn as_many_short_connections_as_without_us_come_from_a_range_of_local_ports() -> Result<()> {
    const CONNECTIONS: &str = "240";
    let world = World::new()?;
    let mut scene = Scene::new(&world)?;
    world.net().add_address("10.200.0.12/32", "lo")?;
    world.net().add_address("fd00:200::12/128", "lo")?;
    world.node().settings(&[("ipv4/ip_local_port_range", "40000 40099"), ("ipv4/tcp_tw_reuse", "0")])?;
    for addresses in
        [["10.200.0.10", "10.200.0.11", "10.200.0.12"], ["fd00:200::10", "fd00:200::11", "fd00:200::12"]]
    {
        let mut words = vec!["short-by-turns".to_owned(), CONNECTIONS.to_owned()];
        for address in addresses {
            words.push(scene.serve(address.parse()?, target::echo())?.to_string());
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let done = world.exec(&scene.gateway).run_app(&words)?;
        assert_eq!(done.value("ok")?, CONNECTIONS, "{done}");
    }
    Ok(())
}

/// One daemon holds as many connections as descriptors allow, from few local ports to some targets.
#[test]
fn heavy_one_daemon_holds_thousands_of_connections_from_1_000_local_ports_to_20_targets() -> Result<()> {
    const TARGETS: u8 = 20;
    let held = amount(HELD[0], HELD[1]);
    let each = held / usize::from(TARGETS);
    let world = World::new()?;
    world.node().settings(&[("ipv4/ip_local_port_range", "40000 40999")])?;
    let addresses: Vec<SocketAddr> =
        (0..TARGETS).map(|n| SocketAddr::new(Ipv4Addr::new(10, 200, 0, 100 + n).into(), 7000)).collect();
    for address in &addresses {
        world.net().add_address(&format!("{}/32", address.ip()), "lo")?;
    }
    let targets = Crowd::start(world.net(), &addresses)?;
    // One peer gets three quarters of the flows that a gateway's descriptors allow.
    const LIMITS: &str = "[daemon]\nmax_flows = 40000\n";
    let at = [PORT, PORT + 1].map(|port| SocketAddr::new(NET4, port));
    let gateway = |at: &SocketAddr| {
        let identity = world.pki().named("gateway").toml();
        let config = format!(
            "{LIMITS}{identity}[[listener]]\naddress = \"{at}\"\n[[route]]\nto = \"direct\"\n\
             [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n"
        );
        Daemon::start(&world, world.net(), &config)
    };
    let _gateways = at.iter().map(gateway).collect::<Result<Vec<_>>>()?;
    let config = format!(
        "{LIMITS}{}[[route]]\nto = [{{ upstream = \"both\" }}]\n\
         [[upstream]]\nname = \"both\"\nendpoints = {:?}\nbalance = \"round_robin\"\nverify = [\"{GATEWAY_ID}\"]\n",
        world.pki().named("node").toml(),
        at.map(|at| at.to_string())
    );
    let config = world.file("agent.toml", config)?;
    let words = ["hold-many".to_owned(), each.to_string()];
    let words: Vec<String> = words.into_iter().chain(addresses.iter().map(SocketAddr::to_string)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let began = Instant::now();
    let mut app = world.exec_with(&config).limit(LONG).spawn_app(&words)?;
    let said = app.value_in_the_end("held")?;
    println!("{held} connections after {:?}", began.elapsed());
    assert_eq!(said, format!("{held} of {held}"));
    assert_eq!(targets.held(), held);
    let done = app.finish()?;
    assert_eq!(done.value("alive")?, held.to_string());
    Ok(())
}
