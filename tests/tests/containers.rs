//! Containers of podman and runc: captured by name, two with the same addresses, one that is made again, and what `tunnel exec`
//! captures of `podman run`.
//!
//! They take programs that the other tests do not: `cargo xtask verify --only containers`.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::symlink,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use tunnel_tests::{
    PATIENCE, TARGET4, Target, World,
    admin::{Admin, config},
    cgroup::Cgroup,
    daemon::Daemon,
    janitor::Janitor,
    node::Node,
    process::output,
    programs, target,
    terminal::Guarded,
    wait_for,
};

/// What every container is made of: a shell and netcat.
const IMAGE: &str = "tt-busybox";
/// From which each of them connects.
const PORT: &str = "40000";
const CLEAN_UP: &str = r#"export CONTAINERS_STORAGE_CONF="$1/storage.conf" CONTAINERS_CONF="$1/containers.conf"
podman rm --all --force --time 0
for group in /sys/fs/cgroup/*/"$(cat "$1/parent")"* /sys/fs/cgroup/"$(cat "$1/parent")"*; do
[ -d "$group" ] && find "$group" -depth -type d -exec rmdir {} ';'; done
rm -rf "$1"; [ ! -e "$1" ]"#;

/// An engine with an image and a state of its own.
struct Podman {
    folder: PathBuf,
    /// The cgroup that its containers are in.
    parent: String,
    janitor: Janitor,
}

impl Podman {
    fn new() -> Result<Self> {
        for program in ["podman", "runc", "busybox"] {
            programs::system(program)?;
        }
        let folder = env::temp_dir().join(format!("tt-podman-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let shown = folder.display().to_string();
        let parent = format!("tunnel-test-podman-{}", std::process::id());
        fs::write(folder.join("parent"), &parent)?;
        fs::write(
            folder.join("storage.conf"),
            format!(
                "[storage]\ndriver = \"overlay\"\ngraphroot = \"{shown}/root\"\nrunroot = \"{shown}/run\"\n"
            ),
        )?;
        // Limits that whoever runs this may set, and a runtime that works with both versions of cgroups mounted.
        fs::write(
            folder.join("containers.conf"),
            format!(
                "[containers]\ndefault_ulimits = [\"nofile=4096:4096\", \"nproc=4096:4096\"]\n[engine]\nruntime = \"runc\"\n\
                 cgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\ntmp_dir = \"{shown}/tmp\"\n"
            ),
        )?;
        let podman = Self { janitor: Janitor::new(CLEAN_UP, &shown)?, folder, parent };
        let bin = podman.folder.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        fs::copy(programs::system("busybox")?, bin.join("busybox"))?;
        for name in ["sh", "sleep", "nc", "echo"] {
            symlink("busybox", bin.join(name))?;
        }
        let tar = podman.folder.join("image.tar");
        output(
            Command::new("tar").arg("-C").arg(podman.folder.join("rootfs")).arg("-cf").arg(&tar).arg("."),
        )?;
        output(&mut podman.command(&["import", "--quiet", &tar.display().to_string(), IMAGE]))?;
        Ok(podman)
    }

    /// Tells a program of this engine.
    fn env<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env("CONTAINERS_STORAGE_CONF", self.folder.join("storage.conf"));
        command.env("CONTAINERS_CONF", self.folder.join("containers.conf"))
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("podman");
        self.env(&mut command).args(words);
        command
    }

    /// Starts a container that does nothing, without a network but loopback.
    fn start(&self, name: &str) -> Result<()> {
        let words = ["run", "--detach", "--name", name, "--network", "none", "--cgroup-parent", &self.parent];
        output(&mut self.command(&[&words[..], &[IMAGE, "/bin/sleep", "600"]].concat())).map(drop)
    }

    fn remove(&self, name: &str) -> Result<()> {
        output(&mut self.command(&["rm", "--force", "--time", "0", name])).map(drop)
    }

    /// What comes back to a container that sends a word to a target.
    fn asks(&self, name: &str, target: &Target) -> Result<String> {
        let said = output(&mut self.command(&["exec", name, "/bin/sh", "-c", &asking(target)]))?;
        Ok(said.trim().to_owned())
    }

    /// `tunnel` with words, about a daemon.
    fn tunnel(&self, daemon: &Daemon, words: &[&str]) -> Result<String> {
        let _there = Admin::of(daemon);
        let mut command = Command::new(programs::tunnel()?);
        output(self.env(&mut command).args(words).arg("--config").arg(daemon.config()))
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // It is done at the end of this process otherwise.
        if let Err(e) = self.janitor.finish() {
            eprintln!("{}: {e}", self.folder.display());
        }
    }
}

fn asking(target: &Target) -> String {
    format!("echo word | nc -w 5 {} {}", target.addr().ip(), target.addr().port())
}

/// A daemon whose file captures another group.
fn daemon(
    world: &World,
    node: &Node<'_>,
    gateway: &tunnel_tests::Gateway<'_>,
    cgroup: &str,
) -> Result<Daemon> {
    let mine = node.cgroup.path().display().to_string();
    Daemon::start(world, world.node(), &config(node, gateway, "").replace(&mine, cgroup))
}

/// A container is captured by its name, beside another one with the same addresses and ports, and its capture ends with it; one of
/// the same name that is made again is another container, which is attached again.
#[test]
#[ignore = "takes podman: cargo xtask verify --only containers"]
fn containers_with_equal_addresses_are_captured_by_name() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let (node, elsewhere, podman) = (Node::new(&world)?, Cgroup::new()?, Podman::new()?);
    let daemon = daemon(&world, &node, &gateway, &elsewhere.path().display().to_string())?;
    let admin = Admin::of(&daemon);
    let names = ["tt-one", "tt-two"];
    for name in names {
        podman.start(name)?;
        assert!(podman.asks(name, &target).is_err(), "it has no network");
        podman.tunnel(&daemon, &["attach", "--container", name, "--name", name, "--until-exit"])?;
        assert_eq!(podman.asks(name, &target)?, "word");
    }
    // Both from the same address and port, at the same time, to the same target.
    let mut held = Vec::new();
    for name in names {
        let (ip, port) = (target.addr().ip().to_string(), target.addr().port().to_string());
        let mut command = podman.command(&["exec", "--interactive", name, "/bin/nc", "-p", PORT, &ip, &port]);
        let mut nc = Guarded(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        let (mut to, from) =
            (nc.0.stdin.take().context("no stdin")?, nc.0.stdout.take().context("no stdout")?);
        writeln!(to, "{name}")?;
        held.push((nc, to, BufReader::new(from)));
    }
    for ((_, _, from), name) in held.iter_mut().zip(names) {
        let mut line = String::new();
        from.read_line(&mut line)?;
        assert_eq!(line.trim(), name, "each gets its own bytes");
    }
    let flows = admin.json("/flows")?;
    let of = |field: &str| -> Vec<_> {
        flows.as_array().into_iter().flatten().map(|f| f[field].to_string()).collect()
    };
    let (clients, sources) = (of("client"), of("source"));
    ensure!(clients.len() == 2 && clients[0] == clients[1] && sources[0] != sources[1], "{flows:#}");
    drop(held);

    podman.remove("tt-one")?;
    let captured = |n: usize| {
        move |status: &serde_json::Value| status["captures"].as_array().is_some_and(|c| c.len() == n)
    };
    admin.until("the end of its capture", captured(2))?;
    podman.start("tt-one")?;
    assert!(podman.asks("tt-one", &target).is_err(), "another container, which nobody has attached");
    podman.tunnel(&daemon, &["attach", "--container", "tt-one", "--until-exit"])?;
    assert_eq!(podman.asks("tt-one", &target)?, "word");
    Ok(())
}

/// Containers below a captured cgroup (`--cgroup-parent`) are captured from their first connection, however often they are made
/// again; so is what `tunnel exec -- podman run` runs below the command's cgroup, and not what it runs elsewhere.
#[test]
#[ignore = "takes podman: cargo xtask verify --only containers"]
fn a_captured_parent_captures_every_container_below_it() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let (node, podman) = (Node::new(&world)?, Podman::new()?);
    let root = node.cgroup.path().parent().context("no root")?.to_owned();
    let daemon = daemon(&world, &node, &gateway, &root.join(&podman.parent).display().to_string())?;
    for _ in 0..2 {
        podman.start("tt-again")?;
        assert_eq!(podman.asks("tt-again", &target)?, "word");
        podman.remove("tt-again")?;
    }
    let admin = Admin::of(&daemon);
    wait_for("two flows", PATIENCE, || {
        (admin.metric("tunnel_flows_opened_total").ok()? >= 2.0).then_some(())
    })?;
    drop(daemon);

    let run = format!("podman run --rm --network none {{}} {IMAGE} /bin/sh -c '{}'", asking(&target));
    let exec = |parent: &str| -> Result<(bool, String)> {
        let mut command = world.exec(&gateway).command(&["/bin/sh", "-c", &run.replace("{}", parent)])?;
        let done = podman.env(&mut command).output()?;
        Ok((done.status.success(), String::from_utf8_lossy(&done.stdout).trim().to_owned()))
    };
    let (_, said) = exec(&format!("--cgroup-parent {}-other", podman.parent))?;
    assert_eq!(said, "", "the container is in a cgroup of its own, beside the command's");
    let (done, said) = exec("--cgroup-parent \"$(sed -n s/^0:://p /proc/self/cgroup)\"")?;
    assert!(done && said == "word", "{said}");
    Ok(())
}
