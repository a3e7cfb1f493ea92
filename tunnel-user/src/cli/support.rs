//! `tunnel support`: a folder for a bug report, of what a daemon and its node say, without secrets.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use clap::Args;

use super::{
    client::{Client, DaemonArgs},
    doctor,
};
use crate::process::exit::{Cause, Failure};

/// Arguments of `tunnel support`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel support
  sudo tunnel support --config /etc/tunnel/agent.toml --output /tmp/report")]
pub struct SupportArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// Folder to create. Default: tunnel-support-TIME in the current one.
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// What is asked of the daemon, and where it is written.
const ANSWERS: [(&str, &str); 10] = [
    ("status.json", "/status"),
    ("metrics.txt", "/metrics"),
    ("config.json", "/config_dump"),
    ("upstreams.json", "/upstreams"),
    ("certificates.json", "/certificates"),
    // Of more there is little to learn.
    ("flows.json", "/flows?limit=1000"),
    ("history.json", "/history"),
    ("logging.json", "/logging"),
    ("ready.json", "/healthz/ready"),
    ("log.txt", "/log"),
];

/// Files of the kernel that say what there is on this node, and where they are written.
const KERNEL: [(&str, &str); 6] = [
    ("kernel-version.txt", "/proc/version"),
    ("cgroup-mounts.txt", "/proc/self/mountinfo"),
    ("os-release.txt", "/etc/os-release"),
    ("meminfo.txt", "/proc/meminfo"),
    ("sockstat.txt", "/proc/net/sockstat"),
    ("netstat.txt", "/proc/net/netstat"),
];

/// Writes the folder; which one, and what could not be had.
pub fn run(args: &SupportArgs) -> Result<(PathBuf, Vec<String>), Failure> {
    let folder = args.output.clone().unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        PathBuf::from(format!("tunnel-support-{now}"))
    });
    let failed = |e: io::Error| {
        let what = format!("{}: {e}", folder.display());
        Failure::Other(Cause::new(what, "Say --output with a folder that does not exist yet."))
    };
    DirBuilder::new().mode(0o700).create(&folder).map_err(failed)?;
    let write = |name: &str, bytes: &[u8]| write(&folder, name, bytes).map_err(failed);
    let mut missing = Vec::new();
    write("version.txt", format!("tunnel {}\n", env!("CARGO_PKG_VERSION")).as_bytes())?;
    write("doctor.json", doctor::json(&doctor::examine()).as_bytes())?;
    for (name, file) in KERNEL {
        match std::fs::read(file) {
            Ok(bytes) => write(name, &bytes)?,
            Err(e) => missing.push(format!("{file}: {e}")),
        }
    }
    // What this node says is worth having without a daemon too.
    match Client::new(&args.daemon) {
        Err(e) => missing.push(e.to_string()),
        Ok(client) => {
            for (name, path) in ANSWERS {
                match client.get(path) {
                    Ok(bytes) => write(name, &bytes)?,
                    Err(e) => missing.push(format!("{path}: {e}")),
                }
            }
        }
    }
    write("missing.txt", (missing.join("\n") + "\n").as_bytes())?;
    Ok((folder, missing))
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(folder.join(name));
    file?.write_all(bytes)
}
