//! "Ours" is what this daemon made: not a number that anybody can set, not a port that anybody can take, and not what another
//! daemon made.
//!
//! The targets here can be reached from the node by itself: what escapes shows itself.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tunnel_tests::{
    Gateway, NET4, NET6, NODE4, NODE6, PATIENCE, Process, TARGET4, TARGET6, Target, World,
    bpffs::BpfFs,
    cgroup::{self, Cgroup},
    daemon::{Daemon, through},
    dialogue::ask,
    gateway::PORT,
    node::Node,
    pki::{GATEWAY_ID, NODE_ID},
    process, programs, target, wait_for,
};

/// What `daemon.mark` is where nothing is configured, and what is configured here.
const DEFAULT_MARK: u32 = 0x1000;
const MARK: u32 = 0x777;

/// A node with a route to the targets.
fn world() -> Result<World> {
    let world = World::new()?;
    world.node().ip(&format!("route add default via {NET4}"))?;
    world.node().ip(&format!("-6 route add default via {NET6}"))?;
    Ok(world)
}

/// A mark, whatever it is and whoever may set it, makes nobody's socket the daemon's.
#[test]
fn a_process_with_cap_net_raw_alone_is_captured_whatever_mark_it_sets() -> Result<()> {
    let world = world()?;
    let gateway = world.gateway().start()?;
    let (four, six) =
        (world.serve(TARGET4, target::name_the_peer())?, world.serve(TARGET6, target::name_the_peer())?);
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, &format!("mark = {MARK}"), ""))?;
    for target in [&four, &six] {
        for mark in [MARK, DEFAULT_MARK, 1, u32::MAX] {
            let addr = target.addr().to_string();
            let mut app = node.app(&["marked", &addr, &mark.to_string()])?;
            let seen: SocketAddr = app.wait_for_line("seen=")?.trim_start_matches("seen=").parse()?;
            assert!([NET4, NET6].contains(&seen.ip()), "{mark:#x}: {seen}");
            app.wait(PATIENCE)?;
        }
    }
    daemon.process().stop()?;
    for mark in [DEFAULT_MARK, u32::MAX] {
        let done = world.exec(&gateway).run_app(&["marked", &four.addr().to_string(), &mark.to_string()])?;
        assert_eq!(done.value("seen")?.parse::<SocketAddr>()?.ip(), NET4, "{mark:#x}: {done}");
    }
    Ok(())
}

/// The daemon's listeners in the node: there are no others.
fn listeners(world: &World) -> Result<Vec<SocketAddr>> {
    let own = world.node().sockets()?.into_iter().filter(|s| s.listens()).map(|s| s.local);
    Ok(own.collect())
}

/// Every address at which whoever wants a captured connection could listen: those of the listeners, and all of the host's.
fn wanted(listeners: &[SocketAddr]) -> Vec<String> {
    let port = listeners.first().map_or(0, SocketAddr::port);
    let all = ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"].map(|ip| format!("{ip}:{port}"));
    listeners.iter().map(SocketAddr::to_string).chain(all).collect()
}

fn impostor(node: &Node<'_>, addresses: &[String]) -> Result<Process> {
    let mark = DEFAULT_MARK.to_string();
    let words: Vec<&str> =
        ["impostor", &mark].into_iter().chain(addresses.iter().map(String::as_str)).collect();
    let mut app = node.app(&words)?;
    app.wait_for_line("listens=")?;
    Ok(app)
}

/// Once the daemon is dead its port is free, and nobody who takes it is given a connection, neither then nor when there is a
/// daemon again.
#[test]
fn whoever_takes_a_dead_daemons_port_is_never_given_a_connection() -> Result<()> {
    let world = world()?;
    let gateway = world.gateway().start()?;
    let (four, six) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET6, target::echo())?);
    let node = Node::new(&world)?;
    let config = node.config(&gateway, "", "");
    let mut daemon = node.daemon(&config)?;
    let listeners = listeners(&world)?;
    assert!(listeners.len() >= 2, "{listeners:?}");
    daemon.process().kill()?;
    let addresses = wanted(&listeners);
    let mut thief = impostor(&node, &addresses)?;
    for at in &listeners {
        let taken = format!("bind-{at}=ok");
        assert!(thief.stdout().lines().any(|line| line == taken), "{taken}: {}", thief.stdout());
    }
    for target in [&four, &six] {
        for _ in 0..20 {
            assert_eq!(node.connect_error(target)?, "ECONNREFUSED");
        }
    }
    assert_eq!(ask(&mut thief, "dead")?, "0 0");

    let mut daemon = node.daemon(&config)?;
    for target in [&four, &six] {
        for _ in 0..20 {
            let mut app = node.hold(target)?;
            app.hang_up();
            app.wait(PATIENCE)?;
        }
    }
    assert_eq!(ask(&mut thief, "alive")?, "0 0");
    thief.hang_up();
    daemon.process().stop()?;
    Ok(())
}

/// Beside a daemon that lives nobody can listen where it does, with whatever options.
#[test]
fn nobody_joins_the_listeners_of_a_daemon_that_lives() -> Result<()> {
    let world = world()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "", ""))?;
    let listeners = listeners(&world)?;
    let addresses = wanted(&listeners);
    let mut thief = impostor(&node, &addresses)?;
    for at in listeners.iter().map(SocketAddr::to_string) {
        let refused = format!("bind-{at}=EADDRINUSE");
        assert!(thief.stdout().lines().any(|line| line == refused), "{refused}: {}", thief.stdout());
    }
    // Those that are not the listeners' own addresses may be bound, and get nothing of ours.
    let (four, six) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET6, target::echo())?);
    for target in [&four, &six] {
        for _ in 0..20 {
            let mut app = node.hold(target)?;
            app.hang_up();
            app.wait(PATIENCE)?;
        }
    }
    assert_eq!(ask(&mut thief, "asked")?, "0 0");
    thief.hang_up();
    daemon.process().stop()?;
    Ok(())
}

/// A connection to the listeners' own address is reset, whether loopback is captured or not, and goes around nowhere.
#[test]
fn a_connection_to_the_listeners_own_address_is_harmless() -> Result<()> {
    let world = world()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    for capture in ["", "include = [\"0.0.0.0/0\", \"::/0\", \"127.0.0.0/8\", \"::1/128\"]"] {
        let node = Node::new(&world)?;
        let mut daemon = node.daemon(&node.config(&gateway, "", capture))?;
        for at in listeners(&world)? {
            let mut app = node.app(&["expect-reset", &at.to_string(), "10"])?;
            let said = app.wait_for_line("ended=")?;
            assert_eq!(said, "ended=ECONNRESET", "{at}, {capture}");
            app.wait(PATIENCE)?;
        }
        let mut app = node.hold(&target)?;
        app.hang_up();
        app.wait(PATIENCE)?;
        let flows = gateway.log().lines().filter(|line| line.contains(" destination=")).count();
        assert!(flows < 10, "{}", gateway.log());
        daemon.process().stop()?;
        process::output(Command::new(programs::tunnel()?).args(["detach", "--config"]).arg(daemon.config()))?;
    }
    Ok(())
}

/// From another namespace nothing of a capture can be connected to.
#[test]
fn nothing_of_a_capture_listens_for_another_host() -> Result<()> {
    let world = world()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "", ""))?;
    let listeners = listeners(&world)?;
    let loopback = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()),
    };
    assert!(!listeners.is_empty() && listeners.iter().all(|at| loopback(at.ip())), "{listeners:?}");
    // Also where both hosts let loopback addresses pass: what the listeners are bound to is no other host's.
    for host in [world.node(), world.net()] {
        host.settings(&[("ipv4/conf/all/route_localnet", "1"), ("ipv4/conf/all/accept_local", "1")])?;
    }
    world.net().ip("rule add pref 0 to 127.84.0.0/16 lookup 100")?;
    world.net().ip(&format!("route add 127.84.0.0/16 via {NODE4} table 100"))?;
    world.net().ip("rule add pref 1 to 127.128.0.0/10 lookup 100")?;
    world.net().ip(&format!("route add 127.128.0.0/10 via {NODE4} table 100"))?;
    let spread = IpAddr::V4(Ipv4Addr::new(127, 130, 1, 1));
    for at in &listeners {
        let places = [NODE4, NODE6, spread].into_iter().chain(at.ip().is_ipv4().then_some(at.ip()));
        for ip in places {
            let to = SocketAddr::new(ip, at.port());
            let connected = world.net().run(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)));
            assert!(connected.is_err(), "{to} accepts a connection from another host");
        }
    }
    assert!(!daemon.log().contains("was not captured"), "{}", daemon.log());
    daemon.process().stop()?;
    Ok(())
}

/// A gateway behind the other one, and who goes to it.
struct Inner<'w> {
    gateway: Gateway<'w>,
    words: Vec<String>,
}

const INNER_ID: &str = "spiffe://test.tunnel/inner";

impl<'w> Inner<'w> {
    /// The node could reach it by itself.
    fn start(world: &'w World) -> Result<Self> {
        let gateway = world.gateway().listen(SocketAddr::new(TARGET4, PORT + 1)).start()?;
        let own = world.pki().issue("inner", INNER_ID, &[])?;
        let mut words = vec![programs::tunnel()?.display().to_string(), "exec".to_owned()];
        words.extend(["--gateway".to_owned(), gateway.addr().to_string()]);
        words.extend(own.flags().iter().map(|path| path.display().to_string()));
        words.extend(
            ["--verify", GATEWAY_ID, "--", &programs::app()?.display().to_string()].map(str::to_owned),
        );
        Ok(Self { gateway, words })
    }

    /// `tunnel exec … -- names TARGET`.
    fn names(&self, target: &Target) -> Vec<String> {
        let more = ["names".to_owned(), target.addr().to_string()];
        self.words.iter().cloned().chain(more).collect()
    }

    /// It was reached through the outer one, whose log has it.
    fn assert_nested(&self, outer: &mut Gateway<'_>, said: &str) -> Result<()> {
        let seen = said.lines().find_map(|line| line.strip_prefix("seen=")).context(said.to_owned())?;
        assert_eq!(seen.parse::<SocketAddr>()?.ip(), NET4, "{said}");
        let inside = self.gateway.log();
        let accepted: Vec<&str> = inside.lines().filter(|line| line.contains("tunnel accepted")).collect();
        let through = |line: &&str| line.contains(&format!("peer={NET4}:")) && line.contains(INNER_ID);
        assert!(!accepted.is_empty() && accepted.iter().all(through), "{inside}");
        let flow = outer.logs(&format!("destination={} ", self.gateway.addr()))?;
        assert!(flow.contains(NODE_ID), "{flow}");
        Ok(())
    }
}

/// A command under `exec` that is `exec` itself is an application like any other: its tunnel goes through the outer one.
#[test]
fn exec_inside_exec_reaches_its_gateway_through_the_outer_tunnel() -> Result<()> {
    let world = world()?;
    let mut outer = world.gateway().start()?;
    let inner = Inner::start(&world)?;
    let target = world.serve(TARGET4, target::name_the_peer())?;
    let done = world.exec(&outer).run(&inner.names(&target))?;
    assert!(done.success(), "{done}");
    assert_eq!(done.value("peer")?, target.addr().to_string(), "{done}");
    inner.assert_nested(&mut outer, &done.stdout)?;
    assert_eq!(done.flows()?.len(), 1, "the inner tunnel, once: {done}");
    Ok(())
}

/// `exec` in a group that a daemon captures reaches its gateway through the daemon's tunnel, and each connection is carried once.
#[test]
fn exec_inside_a_captured_group_reaches_its_gateway_through_the_daemons_tunnel() -> Result<()> {
    let world = world()?;
    let mut outer = world.gateway().start()?;
    let inner = Inner::start(&world)?;
    let target = world.serve(TARGET4, target::name_the_peer())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&outer, "", ""))?;
    let words = inner.names(&target);
    let mut command = world.node().command(words.first().context("a program")?);
    command.args(&words[1..]);
    node.cgroup.adopt(&mut command)?;
    let said = process::output(&mut command)?;
    assert!(said.contains(&format!("peer={}", target.addr())), "{said}");
    daemon.process().stop()?;
    inner.assert_nested(&mut outer, &said)
}

/// Two groups, one in the other, and a gateway for each.
struct Family<'w> {
    world: &'w World,
    parent: Cgroup,
    bpffs: [BpfFs; 2],
    gateways: [Gateway<'w>; 2],
    targets: [Target; 2],
}

/// What is included beside everything else. With `::1/128` here, what the inner capture has taken would be taken once more over
/// IPv6, by the outer one: nothing tells it from a connection to the application's own loopback.
const NOTHING_MORE: &str = "";
const LOOPBACK_TOO: &str = "include = [\"0.0.0.0/0\", \"::/0\", \"127.0.0.0/8\"]\n";

impl<'w> Family<'w> {
    fn new(world: &'w World) -> Result<Self> {
        let parent = Cgroup::new()?;
        fs::create_dir(parent.path().join("child"))?;
        Ok(Self {
            world,
            parent,
            bpffs: [BpfFs::new(world)?, BpfFs::new(world)?],
            gateways: [
                world.gateway().start()?,
                world.gateway().listen(SocketAddr::new(NET4, PORT + 1)).start()?,
            ],
            targets: [
                world.serve(TARGET4, target::name_the_peer())?,
                world.serve(TARGET6, target::name_the_peer())?,
            ],
        })
    }

    fn head(&self, n: usize) -> String {
        format!("[daemon]\nworkers = 1\n{}{}", self.bpffs[n].toml(), self.world.pki().named("node").toml())
    }

    fn capture(&self, name: &str, more: &str) -> String {
        let below = if name == "child" { "/child" } else { "" };
        let group = self.parent.path().display();
        format!("[[capture]]\nname = \"{name}\"\ncgroup = \"{group}{below}\"\n{more}")
    }

    fn parents(&self, more: &str) -> String {
        format!(
            "{}{}{}",
            self.head(0),
            self.capture("parent", more),
            through(self.gateways[0].addr(), GATEWAY_ID)
        )
    }

    fn childs(&self) -> String {
        format!(
            "{}{}{}",
            self.head(1),
            self.capture("child", ""),
            through(self.gateways[1].addr(), GATEWAY_ID)
        )
    }

    /// One file for both, with a gateway for each.
    fn both(&self, more: &str) -> String {
        let to = through(self.gateways[1].addr(), GATEWAY_ID);
        let (route, upstream) = to.split_once("[[upstream]]").unwrap_or((&to, ""));
        let inner =
            route.replace("to =", "match = { capture = [\"child\"] }\nto =").replace("gateway", "inner");
        let upstream = upstream.replacen("name = \"gateway\"", "name = \"inner\"", 1);
        format!(
            "{}{}{}{inner}{}[[upstream]]{upstream}",
            self.head(0),
            self.capture("parent", more),
            self.capture("child", ""),
            through(self.gateways[0].addr(), GATEWAY_ID)
        )
    }

    fn flows(&self) -> [usize; 2] {
        let of = |gateway: &Gateway<'_>| {
            gateway.log().lines().filter(|line| line.contains(" destination=")).count()
        };
        [of(&self.gateways[0]), of(&self.gateways[1])]
    }

    /// Connects in the child group over both families; by which gateway each went, and that it was carried once.
    fn carried_once(&self, what: &str) -> Result<usize> {
        let mut by = None;
        for target in &self.targets {
            let (before, peers) = (self.flows(), target.peers().len());
            let mut command = self.world.node().command(programs::app()?);
            command.args(["names", &target.addr().to_string()]);
            cgroup::adopt(&self.parent.path().join("child"), &mut command)?;
            let said = process::output(&mut command).with_context(|| format!("{what}: {target:?}"))?;
            assert!(said.contains(&format!("peer={}\n", target.addr())), "{what}: {said}");
            let all = || self.flows().iter().sum::<usize>();
            wait_for("the flow in a gateway's log", PATIENCE, || {
                (all() > before.iter().sum()).then_some(())
            })?;
            let after = self.flows();
            assert_eq!(all(), before.iter().sum::<usize>() + 1, "{what}: carried once");
            let seen = target.peers();
            assert_eq!(seen.len(), peers + 1, "{what}: {seen:?}");
            assert!(seen.iter().all(|p| [NET4, NET6].contains(&p.ip())), "{what}: {seen:?}");
            let gateway = usize::from(after[1] > before[1]);
            assert!(by.is_none_or(|other| other == gateway), "{what}: one family here, one there");
            by = Some(gateway);
        }
        by.context("there are targets")
    }

    fn detach(&self, daemon: &Daemon) -> Result<()> {
        detach(daemon.config())
    }
}

fn detach(config: &Path) -> Result<()> {
    process::output(Command::new(programs::tunnel()?).args(["detach", "--config"]).arg(config)).map(drop)
}

/// A group in a captured group, captured by another daemon: each connection is carried once, by the daemon that attached
/// first, over both families, also where the loopback of IPv4 is captured.
#[test]
fn of_two_daemons_that_capture_a_group_and_one_in_it_one_carries_each_connection_once() -> Result<()> {
    for more in [NOTHING_MORE, LOOPBACK_TOO] {
        for child_first in [false, true] {
            let world = world()?;
            let family = Family::new(&world)?;
            let (parent, child) = (family.parents(more), family.childs());
            let (first, second) = if child_first { (&child, &parent) } else { (&parent, &child) };
            let mut first = Daemon::start(&world, world.node(), first)?;
            let mut second = Daemon::start(&world, world.node(), second)?;
            let what = format!("child first: {child_first}, {more}");
            assert_eq!(family.carried_once(&what)?, usize::from(child_first), "{what}");
            // The other one carries it when the first is gone.
            first.process().stop()?;
            family.detach(&first)?;
            assert_eq!(family.carried_once(&what)?, usize::from(!child_first), "{what}, alone");
            second.process().stop()?;
            family.detach(&second)?;
        }
    }
    Ok(())
}

/// Of two captures of one daemon, one in the other, the inner one carries each connection, once.
#[test]
fn of_two_captures_of_one_daemon_the_inner_one_carries_each_connection_once() -> Result<()> {
    for more in [NOTHING_MORE, LOOPBACK_TOO] {
        let world = world()?;
        let family = Family::new(&world)?;
        let mut daemon = Daemon::start(&world, world.node(), &family.both(more))?;
        wait_for("both captures", PATIENCE, || {
            (daemon.log().matches("capturing").count() >= 2).then_some(())
        })?;
        assert_eq!(family.carried_once(more)?, 1, "{more}: {}", daemon.log());
        daemon.process().stop()?;
        family.detach(&daemon)?;
    }
    Ok(())
}
