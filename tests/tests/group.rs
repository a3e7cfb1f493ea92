//! A capture follows the name of its group, and nothing else.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use tunnel_tests::{
    Gateway, NET4, NODE4, PATIENCE, Process, TARGET4, Target, World,
    bpf::{self, CONNECT4, GETSOCKOPT, SOCK_OPS},
    bpffs::BpfFs,
    cgroup::{self, Cgroup},
    daemon::{Daemon, through},
    dialogue::ask,
    pki::GATEWAY_ID,
    process, programs, rules, target, wait_for,
};

/// How often a group is made anew, under load.
const TIMES: usize = 1000;
/// The same where each time is like the others.
const FEW: usize = 20;
/// What the tests' application connects in each incarnation.
const EACH: usize = 3;

/// A node that has a route to the targets, and a group on it of which the inner one is captured.
struct Scene<'w> {
    world: &'w World,
    gateway: Gateway<'w>,
    bpffs: BpfFs,
    outer: Cgroup,
    inside: Target,
    beside: Target,
}

impl<'w> Scene<'w> {
    fn new(world: &'w World) -> Result<Self> {
        Self::within(world, Cgroup::new()?)
    }

    fn within(world: &'w World, outer: Cgroup) -> Result<Self> {
        world.node().ip(&format!("route add default via {NET4}"))?;
        Ok(Self {
            world,
            gateway: world.gateway().start()?,
            bpffs: BpfFs::new(world)?,
            outer,
            inside: world.serve(TARGET4, target::echo())?,
            beside: world.serve(TARGET4, target::echo())?,
        })
    }

    /// The captured group.
    fn group(&self) -> PathBuf {
        self.outer.path().join("app")
    }

    /// A daemon's configuration; `captures` are its sections.
    fn config_of(&self, captures: &str) -> String {
        let (bpffs, identity) = (self.bpffs.toml(), self.world.pki().named("node").toml());
        let to = through(self.gateway.addr(), GATEWAY_ID);
        format!("[daemon]\n{bpffs}{identity}{captures}{to}")
    }

    fn config(&self, capture: &str) -> String {
        self.config_of(&format!("[[capture]]\ncgroup = \"{}\"\n{capture}\n", self.group().display()))
    }

    /// What is pinned, in the order of their names.
    fn pins(&self) -> Vec<PathBuf> {
        let mut pins = self.bpffs.pins();
        pins.sort();
        pins
    }

    /// A daemon that has got as far as to say so.
    fn daemon(&self, config: &str, says: &str) -> Result<Daemon> {
        let mut daemon = Daemon::spawn(self.world, self.world.node(), config)?;
        daemon.process().wait_for_line(says)?;
        Ok(daemon)
    }

    /// Has the application make the captured group anew, and connect in it and beside it; what it says.
    fn incarnations(&self, times: usize) -> Result<String> {
        let (inside, beside) = (self.inside.addr().to_string(), self.beside.addr().to_string());
        let mut command = self.world.node().command(programs::app()?);
        command.arg("incarnations").arg(self.outer.path()).args([
            "app",
            &inside,
            &beside,
            &times.to_string(),
        ]);
        self.outer.adopt(&mut command)?;
        process::output(&mut command)
    }

    /// An application in a group.
    fn app(&self, group: &Path, words: &[&str]) -> Result<Process> {
        let mut command = self.world.node().command(programs::app()?);
        command.args(words);
        cgroup::adopt(group, &mut command)?;
        Process::spawn_with_input("app", self.world.folder(), command)
    }

    /// Connects once in a group, and exchanges a byte; how that went.
    fn once(&self, group: &Path) -> Result<String> {
        let mut app = self.app(group, &["reconnect", &self.inside.addr().to_string()])?;
        app.wait_for_line("ready=1")?;
        let went = ask(&mut app, "once")?;
        app.hang_up();
        app.wait(PATIENCE)?;
        Ok(went)
    }

    /// Connects once in a group; whom the target saw.
    fn seen_from(&self, group: &Path) -> Result<IpAddr> {
        let before = self.inside.peers().len();
        assert_eq!(self.once(group)?, "ok");
        self.inside.peers().get(before).map(SocketAddr::ip).context("the target saw it")
    }

    fn detach(&self, daemon: &Daemon) -> Result<String> {
        process::output(Command::new(programs::tunnel()?).args(["detach", "--config"]).arg(daemon.config()))
    }
}

/// How many of them have come from an address.
fn from(target: &Target, ip: IpAddr) -> usize {
    target.peers().iter().filter(|peer| peer.ip() == ip).count()
}

/// Removes a group once the last process of it has gone.
fn remove(group: &Path) -> Result<()> {
    wait_for("the group to be empty", PATIENCE, || fs::remove_dir(group).ok())
}

/// A group that is removed and made again is captured from its first connect(2) on, however soon that comes, and a group
/// beside it, however new, is not.
#[test]
fn a_group_that_is_made_anew_a_thousand_times_is_captured_from_its_first_connect_and_no_sibling_is()
-> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let mut daemon = scene.daemon(&scene.config(""), "waiting for cgroup")?;
    let said = scene.incarnations(TIMES)?;
    assert!(said.contains(&format!("inside-ok={}\n", TIMES * EACH)), "{said}");
    assert!(said.contains(&format!("beside-ok={TIMES}\n")), "{said}");
    assert_eq!(from(&scene.inside, NODE4), 0, "in plaintext");
    assert_eq!(from(&scene.inside, NET4), TIMES * EACH);
    assert_eq!((from(&scene.beside, NODE4), from(&scene.beside, NET4)), (TIMES, 0), "a sibling was captured");
    daemon.process().stop()?;
    scene.detach(&daemon)?;
    assert_eq!(scene.pins(), [] as [PathBuf; 0]);
    Ok(())
}

/// What `on_failure` says holds for a group that is made anew while no daemon runs: closed is refused.
#[test]
fn without_a_daemon_a_group_made_anew_is_refused() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    fs::create_dir(scene.group())?;
    let config = scene.config("");
    let mut daemon = scene.daemon(&config, "capturing")?;
    let pinned = scene.pins();
    daemon.process().kill()?;
    fs::remove_dir(scene.group())?;
    let said = scene.incarnations(FEW)?;
    assert!(said.contains(&format!("inside-ECONNREFUSED={}\n", FEW * EACH)), "{said}");
    assert!(said.contains(&format!("beside-ok={FEW}\n")), "{said}");
    assert_eq!(scene.inside.peers(), []);

    // The next daemon finds what is pinned, whether the group is there or not.
    let mut daemon = scene.daemon(&config, "waiting for cgroup")?;
    assert_eq!(scene.pins(), pinned, "the pins were adopted");
    let said = scene.incarnations(FEW)?;
    assert!(said.contains(&format!("inside-ok={}\n", FEW * EACH)), "{said}");
    daemon.process().stop()?;
    let said = scene.incarnations(1)?;
    assert!(said.contains(&format!("inside-ECONNREFUSED={EACH}\n")), "also after an orderly end: {said}");
    scene.detach(&daemon)?;
    let said = scene.incarnations(1)?;
    assert!(said.contains(&format!("inside-ok={EACH}\n")), "{said}");
    assert_eq!(from(&scene.inside, NODE4), EACH, "nobody captures it any more");
    Ok(())
}

/// ... and open goes out in plaintext, until there is a daemon again.
#[test]
fn without_a_daemon_a_group_made_anew_is_in_plaintext_where_on_failure_is_open() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    fs::create_dir(scene.group())?;
    let config = scene.config("on_failure = \"open\"");
    let mut daemon = scene.daemon(&config, "capturing")?;
    daemon.process().kill()?;
    fs::remove_dir(scene.group())?;
    let said = scene.incarnations(FEW)?;
    assert!(said.contains(&format!("inside-ok={}\n", FEW * EACH)), "{said}");
    assert_eq!((from(&scene.inside, NODE4), from(&scene.inside, NET4)), (FEW * EACH, 0));
    let mut daemon = scene.daemon(&config, "waiting for cgroup")?;
    scene.incarnations(FEW)?;
    assert_eq!((from(&scene.inside, NODE4), from(&scene.inside, NET4)), (FEW * EACH, FEW * EACH));
    daemon.process().stop()?;
    assert_eq!(scene.pins(), [] as [PathBuf; 0], "an orderly end ends an open capture");
    Ok(())
}

/// A daemon runs without its group, and says what becomes of it.
#[test]
fn a_daemon_waits_for_its_group_and_says_when_it_comes_goes_and_comes_again() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let group = scene.group();
    let mut daemon = scene.daemon(&scene.config(""), "waiting for cgroup")?;
    assert_eq!(scene.seen_from(scene.outer.path())?, NODE4);
    fs::create_dir(&group)?;
    assert_eq!(scene.seen_from(&group)?, NET4, "from the first connection on");
    daemon.process().wait_for_line("cgroup appeared")?;
    remove(&group)?;
    daemon.process().wait_for_line("cgroup was removed: waiting for it")?;
    fs::create_dir(&group)?;
    let appeared = || (daemon.log().matches("cgroup appeared").count() == 2).then_some(());
    wait_for("the group to be found a second time", PATIENCE, appeared)?;
    remove(&group)?;
    fs::create_dir(&group)?;
    daemon.process().wait_for_line("created again")?;
    assert_eq!(scene.seen_from(&group)?, NET4);
    wait_for("SO_ORIGINAL_DST to be answered there", PATIENCE, || {
        (bpf::attached(&group, GETSOCKOPT).ok()? == 1).then_some(())
    })?;

    // A configuration that is read again finds the group that is there now.
    remove(&group)?;
    fs::create_dir(&group)?;
    daemon.tell(&scene.config("exclude = [\"10.200.0.0/24\"]"))?;
    assert_eq!(scene.seen_from(&group)?, NODE4);
    daemon.tell(&scene.config(""))?;
    assert_eq!(scene.seen_from(&group)?, NET4);
    daemon.process().stop()?;
    Ok(())
}

/// A daemon's take-over captures a group that was made anew meanwhile, without a moment in plaintext or refused.
#[test]
fn a_daemon_that_takes_over_captures_the_group_whatever_has_become_of_it() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let mut old = scene.daemon(&scene.config(""), "waiting for cgroup")?;
    let pinned = scene.pins();
    let (said, new) = std::thread::scope(|scope| -> Result<_> {
        let busy = scope.spawn(|| scene.incarnations(TIMES / 4));
        wait_for("the load", PATIENCE, || (scene.inside.peers().len() > 20).then_some(()))?;
        let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
        command.args(["run", "--takeover", "--config"]).arg(old.config());
        let mut new = Process::spawn("new", world.folder(), command)?;
        new.wait_for_line("took over from the old daemon")?;
        Ok((busy.join().ok().context("it does not panic")??, new))
    })?;
    assert!(said.contains(&format!("inside-ok={}\n", TIMES / 4 * EACH)), "{said}");
    assert_eq!(from(&scene.inside, NODE4), 0, "in plaintext");
    // What belongs to the group itself comes and goes with it.
    let lasting = scene
        .pins()
        .into_iter()
        .filter(|p| !["link_original_dst", "link_stay_off_device"].iter().any(|own| p.ends_with(own)));
    assert_eq!(lasting.collect::<Vec<_>>(), pinned);
    assert!(old.process().wait(PATIENCE)?.success());
    drop(new);
    Ok(())
}

/// A unit is the group of its name below slices. Who may make groups somewhere else has no unit of that name.
#[test]
fn a_unit_is_followed_by_its_name_below_slices_and_nowhere_else() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::within(&world, Cgroup::slice()?)?;
    let unit = format!("tt-{}.service", std::process::id());
    let captures = format!("[[capture]]\nunit = \"{unit}\"\n");
    let mut daemon = scene.daemon(&scene.config_of(&captures), "waiting for cgroup")?;
    let own = scene.outer.path().join("tt-a.slice").join(&unit);
    let delegated = scene.outer.path().join("user@1.service/app.slice").join(&unit);
    let plain = scene.outer.path().join("tt-b").join(&unit);
    for group in [&delegated, &plain, &own.join("payload")] {
        fs::create_dir_all(group)?;
    }
    for _ in 0..2 {
        assert_eq!(scene.seen_from(&own)?, NET4);
        assert_eq!(scene.seen_from(&own.join("payload"))?, NET4, "a group of the unit's own");
        for group in [&delegated, &plain] {
            assert_eq!(scene.seen_from(group)?, NODE4, "{}", group.display());
        }
        // A restart.
        remove(&own.join("payload"))?;
        remove(&own)?;
        fs::create_dir_all(own.join("payload"))?;
    }
    daemon.process().stop()?;
    assert_eq!(scene.once(&own)?, "ECONNREFUSED");
    Ok(())
}

/// A name may be as long as a directory's, and one that only begins as it does is another.
#[test]
fn names_are_compared_to_their_last_byte() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let long = "n".repeat(255);
    let name = |len: usize| scene.outer.path().join(&long[..len]);
    for len in [31, 32, 33, 64, 255] {
        let captures = format!("[[capture]]\ncgroup = \"{}\"\n", name(len).display());
        let mut daemon = scene.daemon(&scene.config_of(&captures), "waiting for cgroup")?;
        for other in [len - 1, (len + 1).min(254)] {
            fs::create_dir(name(other))?;
            assert_eq!(scene.seen_from(&name(other))?, NODE4, "{other} of {len}");
            remove(&name(other))?;
            if other == 254 {
                break;
            }
        }
        fs::create_dir_all(name(len).join("below"))?;
        assert_eq!(scene.seen_from(&name(len))?, NET4, "{len}");
        assert_eq!(scene.seen_from(&name(len).join("below"))?, NET4, "{len}");
        remove(&name(len).join("below"))?;
        remove(&name(len))?;
        daemon.process().stop()?;
        scene.detach(&daemon)?;
    }
    Ok(())
}

/// What an earlier version has pinned, links to the group itself, is replaced: nothing of it is left, and the group is
/// captured all the while.
#[test]
fn links_of_an_earlier_version_are_replaced() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let group = scene.group();
    fs::create_dir(&group)?;
    let config = scene.config("");
    let mut daemon = scene.daemon(&config, "capturing")?;
    let pinned = scene.pins();
    daemon.process().kill()?;
    for link in
        pinned.iter().filter(|p| p.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"link_")))
    {
        bpf::move_link(link, &group)?;
    }
    // It called a program by another name, and its maps meant something else.
    let named =
        |end: &str| pinned.iter().find(|p| p.to_string_lossy().ends_with(end)).context("it is pinned");
    let events = named("link_tcp_events")?;
    fs::rename(events, events.with_file_name("link_established"))?;
    let flows = pinned.iter().find(|p| p.to_string_lossy().contains("/FLOWS_")).context("it is pinned")?;
    fs::hard_link(flows, flows.with_file_name("FLOWS_1"))?;
    assert_eq!(bpf::attached(&group, CONNECT4)?, 1);
    assert_eq!(scene.once(&group)?, "ECONNREFUSED");

    let mut daemon = scene.daemon(&config, "capturing")?;
    assert_eq!(bpf::attached(&group, CONNECT4)?, 0, "theirs is detached");
    wait_for("what it pinned to go", PATIENCE, || (scene.pins() == pinned).then_some(()))?;
    assert_eq!(bpf::attached(&group, SOCK_OPS)?, 0, "that of another name too");
    assert_eq!(scene.seen_from(&group)?, NET4);
    remove(&group)?;
    fs::create_dir(&group)?;
    assert_eq!(scene.seen_from(&group)?, NET4, "and its name is followed");
    daemon.process().stop()?;
    scene.detach(&daemon)?;
    assert_eq!(scene.seen_from(&group)?, NODE4);
    Ok(())
}

/// A start that fails after it has replaced what an earlier version pinned puts that back.
#[test]
fn a_start_that_fails_puts_the_links_of_an_earlier_version_back() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let group = scene.group();
    fs::create_dir(&group)?;
    let mut daemon = scene.daemon(&scene.config(""), "capturing")?;
    let pinned = scene.pins();
    daemon.process().kill()?;
    let links = || {
        pinned.iter().filter(|p| p.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"link_")))
    };
    for link in links() {
        bpf::move_link(link, &group)?;
    }
    // The last program's link cannot be pinned where a folder stands.
    let last = links().find(|p| p.ends_with("link_capture_connect6")).context("it is pinned")?;
    fs::remove_file(last)?;
    fs::create_dir(last)?;
    let mut next = Daemon::spawn(&world, world.node(), &scene.config(""))?;
    assert!(!next.process().wait(PATIENCE)?.success());
    assert!(next.log().contains("link_capture_connect6"), "{}", next.log());
    assert_eq!(bpf::attached(&group, CONNECT4)?, 1, "what was there is back");
    assert_eq!(scene.once(&group)?, "ECONNREFUSED", "nothing that fails opens a closed capture");
    fs::remove_dir(last)?;
    let mut daemon = scene.daemon(&scene.config(""), "capturing")?;
    assert_eq!(bpf::attached(&group, CONNECT4)?, 0);
    assert_eq!(scene.seen_from(&group)?, NET4);
    daemon.process().stop()?;
    scene.detach(&daemon)?;
    assert_eq!(scene.pins(), [] as [PathBuf; 0]);
    Ok(())
}

/// Of two captures in one another the inner one carries what both capture, and a connection is carried once; `config check`
/// tells of them.
#[test]
fn of_groups_in_one_another_the_inner_one_carries_and_what_it_leaves_alone_the_outer_one_does() -> Result<()>
{
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let group = scene.group();
    fs::create_dir(&group)?;
    let capture = |name: &str, path: &Path, more: &str| {
        let local = "exclude = [\"127.0.0.0/8\", \"::1\"]";
        format!("[[capture]]\nname = \"{name}\"\ncgroup = \"{}\"\n{local}\n{more}\n", path.display())
    };
    let only_beside = format!("include = [\"{TARGET4}/32:{}\"]", scene.beside.addr().port());
    let (outer, inner) = (capture("outer", scene.outer.path(), ""), capture("inner", &group, &only_beside));
    let denied = "[[route]]\nmatch = { capture = [\"inner\"] }\nto = \"direct\"\n";
    // The inner one dials from the node itself, by which the targets tell them apart.
    let config = |captures: &str| scene.config_of(&format!("{captures}{denied}"));
    let mut daemon = scene.daemon(&config(&format!("{outer}{inner}")), "capturing")?;
    let check = |scene: &Scene<'_>, daemon: &mut Daemon| -> Result<()> {
        let words = ["reconnect", &scene.beside.addr().to_string()];
        let mut app = scene.app(&group, &words)?;
        app.wait_for_line("ready=1")?;
        assert_eq!(ask(&mut app, "once")?, "ok");
        assert_eq!(scene.beside.peers().last().map(SocketAddr::ip), Some(NODE4), "the inner one carries it");
        daemon.process().wait_for_line("reason=closed destination=")?;
        assert_eq!(scene.seen_from(&group)?, NET4, "what the inner one leaves alone");
        assert_eq!(scene.seen_from(scene.outer.path())?, NET4);
        app.hang_up();
        app.wait(PATIENCE)?;
        Ok(())
    };
    check(&scene, &mut daemon)?;
    assert!(daemon.log().contains("may lie in that of capture"), "{}", daemon.log());
    let words = ["config", "check"];
    let checked = Command::new(programs::tunnel()?).args(words).arg(daemon.config()).output()?;
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(
        checked.status.success() && said.contains("\"inner\" may lie in that of capture \"outer\""),
        "{said}"
    );
    daemon.process().stop()?;
    scene.detach(&daemon)?;

    // The inner one comes later.
    let mut daemon = scene.daemon(&config(&outer).replace(denied, ""), "capturing")?;
    daemon.tell(&config(&format!("{outer}{inner}")))?;
    check(&scene, &mut daemon)?;
    daemon.process().stop()?;
    scene.detach(&daemon)?;
    assert_eq!(scene.pins(), [] as [PathBuf; 0]);
    Ok(())
}

/// A program that keeps others away is named, with its group, to whoever is root and yet told EPERM.
#[test]
fn a_program_that_keeps_ours_away_is_named_with_its_group() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    bpf::attach_exclusively(scene.outer.path())?;
    let done = world.exec(&scene.gateway).within(&scene.outer).run(&["true"])?;
    assert_eq!(done.code(), 69, "{done}");
    let group = scene.outer.path().file_name().context("a name")?.to_string_lossy().into_owned();
    for part in ["somebody", &group, "BPF_F_ALLOW_MULTI", "bpftool prog show id"] {
        assert!(done.stderr.contains(part), "{part}: {done}");
    }
    let mut doctor = world.node().command(programs::tunnel()?);
    doctor.arg("doctor");
    scene.outer.adopt(&mut doctor)?;
    let output = doctor.output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(said.contains("somebody") && said.contains(&group), "{said}");

    // Ours is above it, and both run.
    fs::create_dir(scene.group())?;
    let mut daemon = scene.daemon(&scene.config(""), "capturing")?;
    assert_eq!(scene.seen_from(&scene.group())?, NET4);
    daemon.process().stop()?;
    Ok(())
}

/// Whose group it is, is asked when a task connects: a socket that was made elsewhere is captured too.
#[test]
fn a_socket_that_was_made_outside_and_is_connected_inside_is_captured() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    fs::create_dir(scene.group())?;
    let mut daemon = scene.daemon(&scene.config(""), "capturing")?;
    let addr = scene.inside.addr().to_string();
    let mut command = world.node().command(programs::app()?);
    command.arg("socket-from-outside").arg(scene.group()).arg(&addr);
    scene.outer.adopt(&mut command)?;
    let said = process::output(&mut command)?;
    assert!(said.contains(&format!("peer={addr}")), "{said}");
    assert_eq!((from(&scene.inside, NET4), from(&scene.inside, NODE4)), (1, 0));
    daemon.process().stop()?;
    Ok(())
}

/// What others have set up that a capture makes void, or that breaks it, is named when a daemon starts, and by `doctor`.
#[test]
fn filters_and_rules_of_others_are_named() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    fs::create_dir(scene.group())?;
    bpf::attach_filter(scene.outer.path())?;
    for rule in ["-A OUTPUT -o lo -p udp -j DROP", "-A OUTPUT -m owner --uid-owner 33 -d 10.0.0.1 -j REJECT"]
    {
        let mut iptables = world.node().command(programs::system("iptables-nft")?);
        process::output(iptables.args(rule.split(' '))).context(rules::NEEDS)?;
    }
    let mut daemon = scene.daemon(&scene.config(""), "capturing")?;
    let line = daemon.process().wait_for_line("packets are filtered by a program")?;
    let outer = scene.outer.path().display().to_string();
    assert!(line.contains("somebody") && line.contains(&outer), "{line}");
    let line = daemon.process().wait_for_line("may drop captured connections")?;
    assert!(line.contains("-o lo"), "{line}");
    daemon.process().wait_for_line("--uid-owner 33")?;
    daemon.process().stop()?;
    let output = world.node().command(programs::tunnel()?).arg("doctor").output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in ["somebody", "-o lo", "--uid-owner 33"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

/// A process that has left the captured group is told of, by the daemon and by `exec`.
#[test]
fn a_process_that_leaves_a_captured_group_is_told_of() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let group = scene.group();
    fs::create_dir(&group)?;
    let mut daemon = scene.daemon(&scene.config(""), "capturing")?;
    let mut app = scene.app(&group, &["hold", &scene.inside.addr().to_string()])?;
    app.wait_for_line("held=1")?;
    // It is seen there first.
    #[expect(clippy::disallowed_methods, reason = "longer than the daemon takes between two looks")]
    std::thread::sleep(std::time::Duration::from_secs(3));
    fs::write(scene.outer.path().join("cgroup.procs"), app.id().to_string())?;
    let line = daemon.process().wait_for_line("has left the captured group")?;
    assert!(line.contains(&format!("pid={}", app.id())) && line.contains("tt-app"), "{line}");
    app.hang_up();
    app.wait(PATIENCE)?;
    daemon.process().stop()?;

    // A child of the command's, somewhere else.
    let procs = scene.outer.path().join("cgroup.procs");
    let script = format!("sleep 30 & echo $! > {}; exec sleep 2", procs.display());
    let done = world.exec(&scene.gateway).run(&["sh", "-c", &script])?;
    assert!(done.success() && done.stderr.contains("has left the captured group"), "{done}");
    Ok(())
}

/// A path that is in no hierarchy is a mistake, and not something to wait for.
#[test]
fn a_path_outside_of_every_hierarchy_is_a_mistake() -> Result<()> {
    let world = World::new()?;
    let scene = Scene::new(&world)?;
    let config = scene.config_of("[[capture]]\ncgroup = \"/no/such/hierarchy\"\n");
    let mut daemon = Daemon::spawn(&world, world.node(), &config)?;
    assert_eq!(process::code(daemon.process().wait(PATIENCE)?), 64, "{}", daemon.log());
    assert!(daemon.log().contains("/no/such/hierarchy"), "{}", daemon.log());
    Ok(())
}
