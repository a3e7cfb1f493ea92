//! Captures that an operator has attached to a running daemon: a layer of desired state of its own.
//!
//! It is kept over a reload, and by a file beside the admin socket over a take-over and over a daemon that was killed. A daemon
//! that ends in order releases what was attached, whatever captures of its file get.
//!
//! # Invariants
//! - A file that somebody else could have written is not read.
//! - What is attached is in the file before the operator hears of it, and what could not be attached is not.

use std::{
    collections::HashSet,
    fs,
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
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

/// The longest file that is read: some thousand captures.
const FILE_MAX: u64 = 4 * 1024 * 1024;

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
    /// `socket` is the admin socket. What was attached to a daemon that is replaced, or was killed, is attached to this one. In a
    /// runtime.
    pub(super) fn new(socket: Option<&Path>, config: &Config) -> Self {
        let file = socket.map(|socket| socket.with_extension("attached"));
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut list = Vec::new();
        if let Some(file) = &file {
            match kept(file) {
                Ok(kept) => list = kept,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::error!(file = %file.display(), %error, "what was attached before is not attached again");
                }
            }
        }
        // The file owns what it captures, and what another version wrote may say nothing to this one.
        let owned: HashSet<_> = config.captures.iter().map(|c| c.cgroup.name().to_string()).collect();
        list.retain(|attached| {
            let why = match parse(&attached.text) {
                Err(e) => e,
                Ok(_) if owned.contains(&attached.group) => "the configuration captures it".to_owned(),
                Ok(_) => return true,
            };
            tracing::warn!(cgroup = attached.group, why, "what was attached before is not attached again");
            false
        });
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
        // A group before a name: another one may be called like it.
        let at = self.list.iter().position(|a| a.group == which);
        let Some(at) = at.or_else(|| self.list.iter().position(named)) else {
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

    /// The daemon ends, and no other takes over: nobody shall find them. Their groups, which are to be released.
    pub(super) fn forget(self) -> HashSet<String> {
        if let Some(file) = &self.file {
            let _gone = fs::remove_file(file);
        }
        self.list.into_iter().map(|attached| attached.group).collect()
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

/// What is in the file, which has to be one that only this user can write to.
fn kept(file: &Path) -> io::Result<Vec<Attached>> {
    let mut options = fs::OpenOptions::new();
    // Neither another file nor a pipe that never ends.
    let mut from = options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(file)?;
    let found = from.metadata()?;
    let ours = rustix::process::geteuid().as_raw();
    if !found.is_file() || found.uid() != ours || found.mode() & 0o022 != 0 {
        let what = format!("it has to be a file of user {ours} that nobody else can write to");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    let mut bytes = Vec::new();
    from.by_ref().take(FILE_MAX).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
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
    // What a daemon left that was killed meanwhile.
    let _stale = fs::remove_file(&next);
    let to = options.create_new(true).write(true).mode(0o600).open(&next)?;
    serde_json::to_writer(&to, list)?;
    to.sync_all()?;
    fs::rename(next, file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn attached(group: &str) -> Attached {
        Attached {
            group: group.to_owned(),
            text: format!("[[capture]]\ncgroup = \"{group}\"\n"),
            until: None,
        }
    }

    #[test]
    fn what_was_attached_is_read_from_a_file_of_ours_and_from_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("admin.attached");
        assert_eq!(kept(&file).unwrap_err().kind(), io::ErrorKind::NotFound);
        keep(&file, &[attached("/sys/fs/cgroup/a")]).unwrap();
        assert_eq!(kept(&file).unwrap()[0].group, "/sys/fs/cgroup/a");
        let link = folder.path().join("link.attached");
        symlink(&file, &link).unwrap();
        assert!(kept(&link).is_err());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(kept(&file).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&file, "[{").unwrap();
        assert!(kept(&file).is_err());
        keep(&file, &[]).unwrap();
        assert!(!file.exists());
    }

    #[tokio::test]
    async fn what_the_configuration_captures_by_now_is_not_attached_again() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("admin.sock");
        let wrong = Attached { text: "[[captured]]".to_owned(), ..attached("/c") };
        keep(&socket.with_extension("attached"), &[attached("/a"), attached("/b"), wrong]).unwrap();
        let file = "[[capture]]\ncgroup = \"/a\"\n[[route]]\nto = \"deny\"\n";
        let config = Config::parse_layer(file, Path::new("agent.toml")).unwrap();
        let attachments = Attachments::new(Some(&socket), &config);
        assert_eq!(attachments.forget(), HashSet::from(["/b".to_owned()]));
        assert!(!socket.with_extension("attached").exists());
    }
}
