//! What a daemon is left with after its start: its workers, its control thread, its local sockets.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tunnel_tests::{
    PATIENCE, Process, TARGET4, World, admin::Admin, daemon::Daemon, gateway, node::Node, process, programs,
    target, wait_for, world::NET4,
};

/// Has a worker of a debug build try what somebody's code in it would (`kernel/confine/hostile.rs`).
const HOSTILE: &str = "TUNNEL_TEST_HOSTILE_WORKER";

/// What each attempt of a hostile worker ended with: the number of an error, or `None` where it succeeded.
fn attempts(world: &World, daemon: &str) -> Result<BTreeMap<String, Option<i32>>> {
    let identity = world.pki().named("gateway").toml();
    let config = format!(
        "[daemon]\nworkers = 1\n{daemon}\n{identity}[[listener]]\naddress = \"{NET4}:{port}\"\n[[route]]\nto = \"direct\"\n",
        port = gateway::PORT
    );
    let config = world.file("hostile.toml", config)?;
    let mut command = world.net().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.env(HOSTILE, "1").args(["run", "--log", gateway::LOG, "--config"]).arg(&config);
    let mut daemon = Process::spawn("hostile", world.folder(), command)?;
    daemon.wait_for_line("listening")?;
    let log = daemon.stderr();
    daemon.stop()?;
    let tried = log.lines().filter(|line| line.contains("tried what a hostile worker would")).map(|line| {
        let attempt = line.split_once("attempt=\"").and_then(|(_, rest)| rest.split_once('"'));
        let (attempt, rest) = attempt.with_context(|| line.to_owned())?;
        let error = rest.split_once("error=").map(|(_, n)| n.split_whitespace().next().unwrap_or_default());
        Ok((attempt.to_owned(), error.map(str::parse).transpose()?))
    });
    tried.collect()
}

/// A worker that runs somebody else's code reads no file of the system, opens no raw socket, executes nothing, loads no
/// program and signals nobody; one that is not confined does.
#[test]
fn a_hostile_worker_reads_no_file_opens_no_raw_socket_and_starts_loads_and_signals_nothing() -> Result<()> {
    let world = World::new()?;
    let confined = attempts(&world, "")?;
    ensure!(confined.len() > 20, "a debug build tries more: {confined:?}");
    for (attempt, error) in &confined {
        let refused = [libc::EPERM, libc::EACCES].map(Some).contains(error);
        assert!(refused, "{attempt}: {error:?} ({confined:?})");
    }
    assert!(!Path::new("/tmp/tt-hostile").exists());
    let free = attempts(&world, "sandbox = false")?;
    for attempt in ["read /etc/shadow", "open a raw socket", "open a packet socket", "signal another process"]
    {
        assert_eq!(free.get(attempt), Some(&None), "{attempt}: {free:?}");
        assert!(confined.contains_key(attempt));
    }
    Ok(())
}

/// `tunnel status` and the admin interface name what the threads of a daemon that captures have kept, and it is what the
/// kernel says; nobody looks into its memory.
#[test]
fn status_names_what_a_daemon_has_kept_and_its_flows_pass() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "", ""))?;
    let admin = Admin::of(&daemon);
    let _app = node.hold(&target)?;

    let privileges = admin.json("/status")?["privileges"].clone();
    let workers = &privileges["workers"];
    // Whoever has started it may not have the other one.
    let kept = workers["capabilities"].as_array().context("no list")?;
    assert!(kept.iter().all(|kept| kept == "CAP_NET_RAW" || kept == "CAP_SYS_RESOURCE"), "{privileges}");
    assert!(kept.iter().any(|kept| kept == "CAP_NET_RAW"), "{privileges}");
    assert_eq!(workers["seccomp"], "filter", "{privileges}");
    assert_eq!((&workers["no_new_privs"], &privileges["core_dumps"]), (&true.into(), &false.into()));
    let control = privileges["control"]["capabilities"].to_string();
    assert!(control.contains("CAP_SYS_ADMIN") && !control.contains("CAP_SYS_MODULE"), "{control}");
    assert_eq!(privileges["control"]["no_new_privs"], true);

    let pid = daemon.process().id();
    let mut confined = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let said = |file: &str| fs::read_to_string(task.as_ref().ok()?.path().join(file)).ok();
        // Some threads are there for a moment only.
        let (Some(name), Some(status)) = (said("comm"), said("status")) else { continue };
        let field = |name: &str| {
            let found = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            found.unwrap_or_default().trim().to_owned()
        };
        assert_eq!(field("NoNewPrivs"), "1", "{name}{status}");
        if name.starts_with("worker-") {
            confined += 1;
            let set = |name| u64::from_str_radix(&field(name), 16);
            let (net_raw, sys_resource) = (1 << 13, 1 << 24);
            for name in ["CapPrm", "CapEff", "CapBnd"] {
                assert_eq!(set(name)? & !sys_resource, net_raw, "{name} {status}");
            }
            assert_eq!((set("CapInh")?, set("CapAmb")?), (0, 0), "{status}");
            assert_eq!(field("Seccomp"), "2", "{status}");
        }
    }
    assert!(confined > 0, "no worker was seen");
    // Its memory is root's, whoever its user is.
    assert_eq!(fs::metadata(format!("/proc/{pid}/mem"))?.uid(), 0);

    let mut status = Command::new(programs::tunnel()?);
    status.args(["status", "--config"]).arg(daemon.config());
    let said = process::output(&mut status)?;
    let line = said.lines().find(|line| line.trim_start().starts_with("workers: ")).context(said.clone())?;
    assert!(line.contains("CAP_NET_RAW") && line.contains("no_new_privs, seccomp filter"), "{line}");
    assert!(said.contains("user 0, no core dumps"), "{said}");
    Ok(())
}

/// The sockets by which a daemon is administered and taken over are its user's alone, and the admin interface answers nobody
/// else, whatever becomes of its file's mode.
#[test]
fn local_sockets_are_their_users_alone() -> Result<()> {
    let world = World::new()?;
    // Everybody can come to the admin socket here.
    let folder = tempfile::tempdir_in("/tmp")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let socket = folder.path().join("admin.sock");
    let identity = world.pki().named("gateway").toml();
    let config = format!(
        "[admin]\nsocket = \"{}\"\n{identity}[[listener]]\naddress = \"{NET4}:{}\"\n[[route]]\nto = \"direct\"\n",
        socket.display(),
        gateway::PORT
    );
    let mut daemon = Daemon::start(&world, world.net(), &config)?;
    wait_for("the admin socket", PATIENCE, || socket.exists().then_some(()))?;
    assert_eq!(fs::metadata(&socket)?.mode() & 0o777, 0o600);

    let pid = daemon.process().id();
    let takeover = || -> Option<PathBuf> {
        let inodes: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
            .ok()?
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|link| link.to_string_lossy().trim_matches(|c: char| !c.is_ascii_digit()).to_owned())
            .collect();
        // The inode is the seventh field, and the path the eighth (proc_net_unix(5)).
        let sockets = fs::read_to_string(format!("/proc/{pid}/net/unix")).ok()?;
        let paths = sockets.lines().filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let own = inodes.iter().any(|inode| Some(&inode.as_str()) == fields.get(6));
            fields.get(7).filter(|_| own).map(PathBuf::from)
        });
        paths.into_iter().find(|path| path.starts_with("/run/tunnel"))
    };
    let takeover = wait_for("the socket for a take-over", PATIENCE, takeover)?;
    wait_for("its mode", PATIENCE, || (fs::metadata(&takeover).ok()?.mode() & 0o777 == 0o600).then_some(()))?;
    let place = fs::metadata("/run/tunnel")?;
    assert_eq!((place.uid(), place.mode() & 0o022), (0, 0));

    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666))?;
    let ask = |user: &str| -> Result<Output> {
        let mut curl = Command::new(programs::system("setpriv")?);
        curl.args(["--reuid", user, "--clear-groups"]).arg(programs::system("curl")?);
        curl.args(["-sS", "--max-time", "5", "--unix-socket"]).arg(&socket);
        Ok(curl.arg("http://localhost/status").output()?)
    };
    let answered = ask("0")?;
    assert!(answered.status.success() && !answered.stdout.is_empty(), "{answered:?}");
    let rejected = ask("65534")?;
    // It has connected, and the connection has ended without an answer: CURLE_GOT_NOTHING, CURLE_SEND_ERROR or CURLE_RECV_ERROR.
    assert!(matches!(rejected.status.code(), Some(52 | 55 | 56)), "{rejected:?}");
    daemon.process().wait_for_line("rejected an admin connection of another user")?;
    Ok(())
}
