//! `tunnel attach` and `tunnel detach`: captures of a running daemon, beside those of its configuration file.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use clap::{Args, ValueEnum};

use super::client::{Client, DaemonArgs, encoded};
use crate::{
    config::AddrPattern,
    kernel::cgroup,
    process::exit::{Cause, Failure},
};

/// Cgroups that are searched for a container. A node has a few hundred.
const GROUPS_MAX: usize = 20_000;
/// The shortest part of a container's ID that is searched for.
const ID_MIN: usize = 8;

/// Whose connections.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "whose", multiple = false)]
pub struct GroupArgs {
    /// A cgroup, by its path.
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// A systemd unit.
    #[arg(long, value_name = "NAME")]
    pub unit: Option<String>,
    /// The cgroup that this process is in, with everything else in it.
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
    /// A container, by its ID, or by its name where podman or docker knows that.
    #[arg(long, value_name = "ID|NAME")]
    pub container: Option<String>,
}

/// What captured applications get while no daemon runs.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OnFailure {
    /// Their connections are refused.
    Closed,
    /// They connect directly.
    Open,
}

/// Arguments of `tunnel attach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel attach --unit legacy.service
  sudo tunnel attach --pid 4711 --until-exit --capture 10.0.0.0/8
  sudo tunnel attach --container web --name web --until-exit")]
#[command(group(clap::ArgGroup::new("one").args(["cgroup", "unit", "pid", "container"]).required(true)))]
pub struct AttachArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// Whose connections.
    #[command(flatten)]
    pub group: GroupArgs,
    /// What routes call the capture.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Capture only these destinations: a network and optional ports.
    ///
    /// Default: everything except loopback, link-local and multicast addresses.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub capture: Vec<AddrPattern>,
    /// Refuse these destinations: connect() fails with ENETUNREACH.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub refuse: Vec<AddrPattern>,
    /// Do not capture these destinations.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub exclude: Vec<AddrPattern>,
    /// What its applications get while no daemon runs.
    #[arg(long, value_enum, default_value = "open", value_name = "WHAT")]
    pub on_failure: OnFailure,
    /// Detach it when the process ends, or, of a cgroup, unit or container, when nothing runs in it any more.
    #[arg(long)]
    pub until_exit: bool,
}

/// Attaches; what to print.
pub fn attach(args: &AttachArgs) -> Result<String, Failure> {
    let client = Client::new(&args.daemon)?;
    let (key, group) = args.group.resolve()?;
    let mut query = vec![format!("{key}={}", encoded(&group))];
    let mut add = |name: &str, value: &str| query.push(format!("{name}={}", encoded(value)));
    if let Some(name) = &args.name {
        add("name", name);
    }
    for (name, patterns) in [("include", &args.capture), ("refuse", &args.refuse), ("exclude", &args.exclude)]
    {
        patterns.iter().for_each(|pattern| add(name, &pattern.to_string()));
    }
    add(
        "on_failure",
        match args.on_failure {
            OnFailure::Closed => "closed",
            OnFailure::Open => "open",
        },
    );
    match (args.until_exit, args.group.pid) {
        (false, _) => {}
        (true, Some(pid)) => add("until", &pid.to_string()),
        (true, None) => add("until", "empty"),
    }
    client.post(&format!("/captures?{}", query.join("&")))?;
    Ok(format!("attached {group}\n"))
}

/// Detaches what was attached; what to print.
pub fn detach(daemon: &DaemonArgs, group: &GroupArgs) -> Result<String, Failure> {
    let client = Client::new(daemon)?;
    let (_, group) = group.resolve()?;
    client.post(&format!("/captures/detach?which={}", encoded(&group)))?;
    Ok(format!("detached {group}\n"))
}

impl GroupArgs {
    /// Whether one was said.
    pub fn is_said(&self) -> bool {
        self.cgroup.is_some() || self.unit.is_some() || self.pid.is_some() || self.container.is_some()
    }

    /// By which key of `[[capture]]` it is named, and its name.
    fn resolve(&self) -> Result<(&'static str, String), Failure> {
        let shown = |path: &Path| ("cgroup", path.display().to_string());
        match self {
            Self { unit: Some(unit), .. } => Ok(("unit", unit.clone())),
            Self { pid: Some(pid), .. } => of_process(*pid).map(|path| shown(&path)),
            Self { container: Some(container), .. } => of_container(container).map(|path| shown(&path)),
            Self { cgroup: Some(path), .. } => Ok(shown(path)),
            _ => Err(failed("no cgroup was named", "Say --cgroup, --unit, --pid or --container.")),
        }
    }
}

fn failed(what: &str, remedy: &str) -> Failure {
    Failure::Other(Cause::new(what, remedy))
}

fn mount() -> Result<PathBuf, Failure> {
    cgroup::mounted()
        .ok_or_else(|| failed("no cgroup2 hierarchy is mounted", "`tunnel doctor` says how to mount it."))
}

fn of_process(pid: u32) -> Result<PathBuf, Failure> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .map_err(|e| failed(&format!("process {pid}: {e}"), "It may have ended."))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.ok_or_else(|| failed(&format!("process {pid} is in no cgroup of cgroup2"), ""))?;
    if path.is_empty() {
        let remedy =
            "The capture would be of everything on this node: start it in a cgroup of its own (systemd-run).";
        return Err(failed(&format!("process {pid} is in the root cgroup"), remedy));
    }
    Ok(mount()?.join(path))
}

/// The cgroup of a container: engines name it after the container's ID (`libpod-ID`, `docker-ID.scope`,
/// `cri-containerd-ID.scope`).
fn of_container(container: &str) -> Result<PathBuf, Failure> {
    let is_id = container.len() >= ID_MIN && container.bytes().all(|b| b.is_ascii_hexdigit());
    let id = if is_id { container.to_owned() } else { id_of(container)? };
    let mut found: Vec<PathBuf> = Vec::new();
    let mut open = vec![mount()?];
    let mut seen = 0;
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) || seen == GROUPS_MAX {
                continue;
            }
            seen += 1;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // podman has a group for the monitor too.
            if name.contains(&id) && !name.contains("conmon") {
                found.push(entry.path());
            } else {
                open.push(entry.path());
            }
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(failed(
            &format!("no cgroup is named after container {id}"),
            "Name its cgroup with --cgroup: see /proc/PID/cgroup.",
        )),
        _ => {
            let all: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
            Err(failed(
                &format!("several cgroups are named after {id}: {}", all.join(", ")),
                "Name one with --cgroup.",
            ))
        }
    }
}

/// The ID of a container, from the engine that knows its name.
fn id_of(name: &str) -> Result<String, Failure> {
    for engine in ["podman", "docker"] {
        let asked = Command::new(engine)
            .args(["inspect", "--type", "container", "--format", "{{.Id}}", "--", name])
            .output();
        let id = asked.ok().filter(|done| done.status.success());
        let id = id.map(|done| String::from_utf8_lossy(&done.stdout).trim().to_owned());
        if let Some(id) = id.filter(|id| id.len() >= ID_MIN) {
            return Ok(id);
        }
    }
    let remedy = "Say its ID, or its cgroup with --cgroup.";
    Err(failed(&format!("neither podman nor docker knows a container \"{name}\""), remedy))
}
