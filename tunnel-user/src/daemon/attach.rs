//! Captures that an operator has attached to a running daemon: a layer of desired state of its own.
//!
//! It is kept over a reload, and over a take-over by a file beside the admin socket. A daemon that ends otherwise takes it along.
//!
//! # Invariants
//! - What is attached is in the file before the operator hears of it, and what could not be attached is not.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::{Interval, MissedTickBehavior};

use super::{Running, layers::Owner, leavers};
use crate::{
    admin::view::{Attach, Until},
    config::Config,
    kernel::group::Group,
    process::exit::Failure,
};

/// How often it is looked whether what captures are to end with has ended.
const LOOK: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Attachments {
    /// Where they are kept for the next daemon.
    file: Option<PathBuf>,
    list: Vec<Attached>,
    look: Interval,
}

/// One of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Attached {
    /// The group.
    group: String,
    /// The table of a configuration that says so.
    text: String,
    /// With what it ends.
    until: Option<End>,
}

/// With what a capture ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum End {
    /// A process, which was started then, in clock ticks since boot.
    Process { pid: u32, started: u64 },
    /// When nothing runs in the group any more.
    Empty,
}

impl Attachments {
    /// `socket` is the admin socket. Those of a daemon that is replaced are taken over; others have ended with theirs. In a
    /// runtime.
    pub(super) fn new(socket: Option<&Path>, replacing: bool) -> Self {
        let file = socket.map(|socket| socket.with_extension("attached"));
        // Of a daemon that was killed: its captures have ended with it. The admin socket is ours, so nobody else's are there.
        if let Some(stale) = file.as_deref().filter(|_| !replacing) {
            let _none = fs::remove_file(stale);
        }
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let kept = file.as_deref().filter(|_| replacing).and_then(|file| fs::read(file).ok());
        let list = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Self { file, list, look }
    }

    /// The layer; none where nothing is attached.
    pub(super) fn layer(&self) -> Result<Option<Config>, Failure> {
        if self.list.is_empty() { Ok(None) } else { layer(&self.list).map(Some) }
    }

    /// The group of one that has ended with what it was to end with. Never ready while there is none.
    pub(super) async fn expired(&mut self) -> String {
        loop {
            self.look.tick().await;
            if let Some(ended) = self.list.iter().find(|attached| attached.has_ended()) {
                return ended.group.clone();
            }
        }
    }

    /// Captures one more group. The error is for the operator.
    pub(super) async fn attach(&mut self, running: &mut Running, wanted: Attach) -> Result<String, String> {
        let Attach { text, until } = wanted;
        let parsed = parse(&text)?;
        let [capture] = parsed.captures.as_slice() else { return Err("this is not one capture".to_owned()) };
        if running.config.routes.is_empty() {
            return Err("the daemon has no [[route]]: every captured connection would be refused".to_owned());
        }
        let group = capture.cgroup.name().to_string();
        let until = match until {
            None => None,
            Some(Until::Empty) => Some(End::Empty),
            Some(Until::Process(pid)) => {
                let started = leavers::started(pid).ok_or_else(|| format!("there is no process {pid}"))?;
                Some(End::Process { pid, started })
            }
        };
        let mut next = self.list.clone();
        next.push(Attached { group: group.clone(), text, until });
        self.put(running, next).await?;
        tracing::info!(cgroup = group, "attached by an operator");
        Ok(group)
    }

    /// Ends the capture of a group, or of a name.
    pub(super) async fn detach(&mut self, running: &mut Running, which: &str) -> Result<String, String> {
        let named = |attached: &Attached| {
            let config = parse(&attached.text).ok();
            config.is_some_and(|c| c.captures.iter().any(|c| c.name.as_deref() == Some(which)))
        };
        let Some(at) = self.list.iter().position(|a| a.group == which || named(a)) else {
            return Err(format!(
                "no capture of \"{which}\" was attached to this daemon: those of its configuration file end with that"
            ));
        };
        let mut next = self.list.clone();
        let group = next.remove(at).group;
        self.put(running, next).await?;
        tracing::info!(cgroup = group, "detached");
        Ok(group)
    }

    async fn put(&mut self, running: &mut Running, next: Vec<Attached>) -> Result<(), String> {
        let wanted = layer(&next).map_err(|e| e.to_string())?;
        running.set_layer(Owner::ADMIN, wanted).await.map_err(|e| e.to_string())?;
        self.list = next;
        if let Some(file) = &self.file
            && let Err(error) = keep(file, &self.list)
        {
            tracing::error!(file = %file.display(), %error, "failed to keep what is attached for a take-over");
        }
        Ok(())
    }

    /// The daemon ends, and no other takes over: nobody shall find them.
    pub(super) fn forget(self) {
        if let Some(file) = &self.file {
            let _gone = fs::remove_file(file);
        }
    }
}

impl Attached {
    fn has_ended(&self) -> bool {
        match &self.until {
            None => false,
            Some(End::Process { pid, started }) => leavers::started(*pid) != Some(*started),
            Some(End::Empty) => {
                let group = if self.group.starts_with('/') {
                    Group::at(Path::new(&self.group))
                } else {
                    Group::of_unit(&self.group)
                };
                group.is_ok_and(|group| group.now().is_none() || group.processes().is_empty())
            }
        }
    }
}

fn parse(text: &str) -> Result<Config, String> {
    Config::parse_layer(text, Path::new("attach")).map_err(|e| e.to_string())
}

fn layer(list: &[Attached]) -> Result<Config, Failure> {
    if list.is_empty() {
        return Ok(Config::empty(Default::default()));
    }
    let text: String = list.iter().map(|attached| attached.text.as_str()).collect();
    Ok(Config::parse_layer(&text, Path::new("attach"))?)
}

fn keep(file: &Path, list: &[Attached]) -> io::Result<()> {
    if list.is_empty() {
        return match fs::remove_file(file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
    }
    let next = file.with_extension("attached-next");
    let mut options = fs::OpenOptions::new();
    let to = options.create(true).truncate(true).write(true).mode(0o600).open(&next)?;
    serde_json::to_writer(&to, list)?;
    to.sync_all()?;
    fs::rename(next, file)
}
