//! The hosts that a page's commands are run on: a node, and a gateway that reaches a web server the node has no route to.
//!
//! Their addresses are those of the guide: the gateway is 10.9.0.1, and the server 10.200.0.10, on port 80.
//!
//! # Invariants
//! - Mounts are private to this process and those that it starts: what a page writes to /etc or /usr/local is not the machine's.
//! - A process of a page ends with it, or with this process.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::ErrorKind,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::blocks::{Host, Run};
use crate::run::{self, sh};

/// How long a block may take that ends, and how long one that stays may take to be ready.
const PATIENCE: Duration = Duration::from_secs(30);

const NODE: &str = "10.9.0.2";
const GATEWAY: &str = "10.9.0.1";
/// What can be reached through the gateway alone.
const SERVER: &str = "10.200.0.10";
/// Names that the guide has for hosts.
const NAMES: &str =
    "127.0.0.1 localhost\n10.9.0.1 gateway.example.org gateway.internal\n10.200.0.10 web.internal\n";
/// What units look for where a page has no file of its own.
const AGENT: &str = r#"
[identity]
cert = "node.pem"
key = "node-key.pem"
ca = "ca.pem"

[[capture]]
unit = "legacy.service"

[[route]]
to = [{ upstream = "gateway" }]

[[upstream]]
name = "gateway"
endpoints = ["10.9.0.1:15008"]
verify = ["spiffe://example.org/gateway"]
"#;
const CGROUPS: &str = "/sys/fs/cgroup";

/// Makes what pages write to theirs alone. Nothing is made on the machine itself: every folder is there already.
pub(super) fn mounts() -> Result<()> {
    for folder in ["/run", "/mnt"] {
        sh(&format!("mount -t tmpfs -o mode=0755 tunnel-guide {folder}"))?;
    }
    for folder in ["/etc", "/usr/local"] {
        // What is written goes to memory.
        let upper = format!("/mnt{folder}");
        for part in ["upper", "work"] {
            fs::create_dir_all(format!("{upper}/{part}"))?;
        }
        sh(&format!(
            "mount -t overlay overlay -o lowerdir={folder},upperdir={upper}/upper,workdir={upper}/work {folder}"
        ))?;
    }
    fs::write("/etc/hosts", NAMES)?;
    fs::create_dir_all("/etc/tunnel")?;
    sh(&format!("mount -t cgroup2 cgroup2 {CGROUPS}"))?;
    sh("mount -t bpf bpf /sys/fs/bpf")
}

pub(super) struct World {
    folder: PathBuf,
    daemons: Vec<(String, Child)>,
    groups: Vec<PathBuf>,
    count: usize,
}

impl World {
    pub(super) fn new(program: &Path, page: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("tunnel-guide-{}-{page}", std::process::id()));
        fs::create_dir(&folder)?;
        let mut world = Self { folder, daemons: Vec::new(), groups: Vec::new(), count: 0 };
        world.set(program)?;
        Ok(world)
    }

    fn set(&mut self, program: &Path) -> Result<()> {
        for name in ["node", "gateway"] {
            sh(&format!("ip netns add {name}"))?;
            sh(&format!("ip -n {name} link set lo up"))?;
        }
        sh("ip -n node link add eth0 type veth peer name eth0 netns gateway")?;
        for (name, address) in [("node", NODE), ("gateway", GATEWAY)] {
            sh(&format!("ip -n {name} address add {address}/24 dev eth0"))?;
            sh(&format!("ip -n {name} link set eth0 up"))?;
        }
        sh(&format!("ip -n gateway address add {SERVER}/32 dev lo"))?;

        for folder in ["bin", "work", "www", "log"] {
            fs::create_dir(self.folder.join(folder))?;
        }
        // As a package would have it, before everything else on the PATH.
        std::os::unix::fs::symlink(program, self.folder.join("bin/tunnel"))?;
        self.tool("sudo", "exec \"$@\"")?;
        fs::write(self.folder.join("www/index.html"), "<p>hello</p>\n")?;
        let mut server = self.enter(Host::Gateway);
        server.args(["python3", "-m", "http.server", "80", "--bind", SERVER, "--directory"]);
        server.arg(self.folder.join("www"));
        self.start("server", server)?;
        self.until(|| {
            let heard = Command::new("ip")
                .args(["netns", "exec", "gateway", "ss", "-Hltn", "sport = :80"])
                .output()?;
            Ok(!heard.stdout.is_empty())
        })
    }

    /// A program of a few words.
    fn tool(&self, name: &str, script: &str) -> Result<()> {
        let file = self.folder.join("bin").join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n"))?;
        Ok(fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?)
    }

    /// What the page "Quick start" makes, in the folder of the commands and where units look for it: `pki`, and the names that
    /// configurations have.
    pub(super) fn certificates(&mut self) -> Result<()> {
        let script = "tunnel pki init pki\n\
                      tunnel pki issue --dir pki --id spiffe://example.org/node --name node\n\
                      tunnel pki issue --dir pki --id spiffe://example.org/gateway --name gateway --ip 10.9.0.1\n\
                      cp pki/* .\n\
                      cp pki/* /etc/tunnel/\n";
        self.play(&Run::default(), script).context("certificates")?;
        self.write("/etc/tunnel/agent.toml", AGENT)
    }

    /// A gateway as that of the page "Quick start".
    pub(super) fn gateway(&mut self) -> Result<()> {
        let script = "tunnel gateway --listen 10.9.0.1:15008 --ca pki/ca.pem --cert pki/gateway.pem --key pki/gateway-key.pem \
                      --allow 10.200.0.0/24:80";
        let run = Run { host: Host::Gateway, stays: true, ..Run::default() };
        self.play(&run, script).context("a gateway")
    }

    pub(super) fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.join("work").join(name);
        fs::create_dir_all(path.parent().context("a file is in a folder")?)?;
        fs::write(&path, text).with_context(|| format!("writing {name}"))
    }

    /// Runs a block.
    pub(super) fn play(&mut self, run: &Run, text: &str) -> Result<()> {
        let &Run { host, stays, fails, .. } = run;
        self.count += 1;
        let name = format!("{}", self.count);
        let mut script = String::from("set -euo pipefail\n");
        if let Some(unit) = &run.group {
            let folder = self.group(unit)?;
            script += &format!("echo $$ >{}/cgroup.procs\n", folder.display());
        }
        // The last command is the daemon itself, as under a service manager.
        script += &if stays {
            format!("exec {}", text.trim_start().trim_start_matches("sudo "))
        } else {
            text.to_owned()
        };
        let file = self.folder.join("log").join(format!("{name}.sh"));
        fs::write(&file, script)?;
        let notify = self.folder.join(format!("notify-{name}"));
        let mut command = self.enter(host);
        command.args(["bash", "--noprofile"]).arg(&file);
        let heard = stays.then(|| UnixDatagram::bind(&notify)).transpose()?;
        if let Some(socket) = &heard {
            socket.set_read_timeout(Some(Duration::from_millis(200)))?;
            command.env("NOTIFY_SOCKET", &notify);
        }
        self.start(&name, command)?;
        if let Some(socket) = heard {
            let mut message = [0; 4096];
            return self.until(|| match socket.recv(&mut message) {
                Ok(length) => Ok(message[..length].windows(7).any(|word| word == b"READY=1")),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
                Err(e) => Err(e.into()),
            });
        }
        let (_, mut child) = self.daemons.pop().context("it was started")?;
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if let Err(error) = run::pause(Duration::from_millis(20)).and_then(|()| {
                ensure!(Instant::now() < end, "it did not end within {PATIENCE:?}\n{}", self.said(&name));
                Ok(())
            }) {
                run::stop(&mut child)?;
                return Err(error);
            }
        };
        ensure!(status.success() != fails, "{status}\n{}", self.said(&name));
        Ok(())
    }

    /// A cgroup as systemd has it for a unit.
    fn group(&mut self, unit: &str) -> Result<PathBuf> {
        let folder = Path::new(CGROUPS).join("system.slice").join(unit);
        for folder in [Path::new(CGROUPS).join("system.slice"), folder.clone()] {
            match fs::create_dir(&folder) {
                Ok(()) => self.groups.push(folder),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| folder.display().to_string()),
            }
        }
        Ok(folder)
    }

    /// A command on a host, in the folder of the commands.
    fn enter(&self, host: Host) -> Command {
        let mut command = Command::new("nsenter");
        let name = if host == Host::Node { "node" } else { "gateway" };
        command.arg(format!("--net=/run/netns/{name}")).args(["setpriv", "--pdeathsig", "TERM"]);
        command.stdin(Stdio::null()).current_dir(self.folder.join("work"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let with_ours = [self.folder.join("bin").into_os_string(), path].join(OsStr::new(":"));
        command.env("PATH", with_ours);
        command
    }

    fn start(&mut self, name: &str, mut command: Command) -> Result<()> {
        let log = File::create(self.folder.join("log").join(name))?;
        let child = command.stdout(log.try_clone()?).stderr(log).spawn().with_context(|| name.to_owned())?;
        self.daemons.push((name.to_owned(), child));
        Ok(())
    }

    /// Waits for what the newest process is started for.
    fn until(&mut self, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !done()? {
            run::pause(Duration::from_millis(20))?;
            let (name, child) = self.daemons.last_mut().context("it was started")?;
            let (name, ended) = (name.clone(), child.try_wait()?);
            if let Some(status) = ended {
                bail!("it ended ({status})\n{}", self.said(&name));
            }
            ensure!(Instant::now() < end, "it was not ready within {PATIENCE:?}\n{}", self.said(&name));
        }
        Ok(())
    }

    fn said(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join("log").join(name)).unwrap_or_default()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (name, child) in self.daemons.iter_mut().rev() {
            if let Err(error) = run::stop(child) {
                eprintln!("block {name} (process {}) did not end: {error}", child.id());
            }
        }
        for host in ["node", "gateway"] {
            let _gone = sh(&format!("ip netns delete {host}"));
        }
        for group in self.groups.iter().rev() {
            if let Err(error) = fs::remove_dir(group) {
                eprintln!("remove {} by hand: {error}", group.display());
            }
        }
        // Pins, and what daemons were to find: of this process's mounts.
        for folder in ["/sys/fs/bpf", "/run/tunnel"] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                let _gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("remove {} by hand: {error}", self.folder.display());
        }
    }
}
