//! Captures that an operator has attached to a running daemon: a layer of desired state of its own.
//!
//! It is kept over a reload, and by a file beside the admin socket over a take-over and over a daemon that was killed. A daemon
//! that ends in order releases what was attached, whatever captures of its file get.
//!
//! # Invariants
//! - A file that somebody else could have written is not read, and what it says of another configuration is not attached.
//! - What is attached is in the file before the operator hears of it, and what could not be attached, or kept there, is not.

use std::{
    collections::HashSet,
    fs,
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{self, Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::time::{Interval, MissedTickBehavior};

use super::{Running, layers::Owner, leavers, pins::pin_dir_of};
use crate::{
    admin::view::{Attach, Until},
    config::Config,
    kernel::group::Group,
    process::exit::Failure,
};

/// How often it is looked whether what captures are to end with has ended.
const LOOK: Duration = Duration::from_secs(1);
/// After which time one that has ended and could not be detached is tried again.
const RETRY: Duration = Duration::from_secs(60);

/// The longest file that is read: some thousand captures.
const FILE_MAX: u64 = 4 * 1024 * 1024;

/// See the module.
pub(super) struct Attachments {
    /// Where they are kept for the next daemon.
    file: Option<PathBuf>,
    /// Whether what is there is of another configuration.
    is_others: bool,
    /// The configuration file that they are attached beside.
    config: Option<String>,
    list: Vec<Attached>,
    look: Interval,
}

/// What is in the file.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// Beside which configuration file.
    config: Option<String>,
    attached: Vec<Attached>,
}

/// The same, in each way that it was ever written.
#[derive(Deserialize)]
#[serde(untagged)]
enum Found {
    Now(Kept),
    Before(Vec<Attached>),
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
    /// When it is detached if it has ended, where that has failed.
    #[serde(skip)]
    retry: Option<Instant>,
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
    /// `socket` is the admin socket, `named` the configuration file. What was attached to a daemon of that file that is replaced, or
    /// was killed, is attached to this one. In a runtime.
    pub(super) fn new(socket: Option<&Path>, named: Option<&Path>, config: &Config) -> Self {
        let file = socket.map(beside);
        let named = named.map(stable);
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut list, mut is_others) = (Vec::new(), false);
        if let Some(file) = &file {
            match kept(file) {
                Ok(kept) if kept.config.is_none() || kept.config == named => list = kept.attached,
                Ok(kept) => {
                    is_others = true;
                    let cgroups: Vec<_> = kept.attached.iter().map(|attached| &attached.group).collect();
                    tracing::warn!(
                        file = %file.display(),
                        config = kept.config,
                        ?cgroups,
                        "what was attached beside another configuration file is not attached again"
                    );
                }
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
                Err(e) => {
                    warn_of_pins(config, &attached.group);
                    e
                }
                Ok(_) if owned.contains(&attached.group) => "the configuration captures it".to_owned(),
                Ok(_) => return true,
            };
            tracing::warn!(cgroup = attached.group, why, "what was attached before is not attached again");
            false
        });
        Self { file, is_others, config: named, list, look }
    }

    /// The layer; none where nothing is attached.
    pub(super) fn layer(&self) -> Result<Option<Config>, Failure> {
        if self.list.is_empty() { Ok(None) } else { layer(&self.list).map(Some) }
    }

    /// The group of one that has ended with what it was to end with. Never ready while there is none.
    pub(super) async fn expired(&mut self) -> String {
        loop {
            self.look.tick().await;
            let due = |attached: &&Attached| attached.retry.is_none_or(|at| at <= Instant::now());
            if let Some(ended) = self.list.iter().filter(due).find(|attached| attached.has_ended()) {
                return ended.group.clone();
            }
        }
    }

    /// Detaches one that has ended with what it was to end with, or tries it again later.
    pub(super) async fn expire(&mut self, running: &mut Running, group: &str) {
        if let Err(error) = self.detach(running, group).await {
            tracing::error!(cgroup = group, error, "failed to detach");
            let failed = self.list.iter_mut().filter(|attached| attached.group == group);
            failed.for_each(|attached| attached.retry = Some(Instant::now() + RETRY));
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
        let before = self.list.clone();
        let mut next = before.clone();
        next.push(Attached { group: group.clone(), text, until, retry: None });
        self.put(running, next).await?;
        if let Err(error) = self.keep() {
            // If this daemon was killed, nobody would know of it.
            self.put(running, before).await?;
            return Err(error);
        }
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
        self.keep()
            .map_err(|error| format!("it is detached, but the next daemon attaches it again: {error}"))?;
        Ok(group)
    }

    async fn put(&mut self, running: &mut Running, next: Vec<Attached>) -> Result<(), String> {
        let wanted = layer(&next).map_err(|e| e.to_string())?;
        running.set_layer(Owner::ADMIN, wanted).await.map_err(|e| e.to_string())?;
        self.list = next;
        Ok(())
    }

    /// Writes down what is attached. The error is for the operator.
    fn keep(&mut self) -> Result<(), String> {
        let Some(file) = &self.file else { return Ok(()) };
        let kept = Kept { config: self.config.clone(), attached: self.list.clone() };
        keep(file, &kept).map_err(|e| format!("writing {}, for the next daemon: {e}", file.display()))?;
        self.is_others = false;
        Ok(())
    }

    /// The daemon ends, and no other takes over: nobody shall find them. Their groups, which are to be released.
    pub(super) fn forget(self) -> HashSet<String> {
        if let Some(file) = self.file.filter(|_| !self.is_others) {
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

/// The file beside a socket.
fn beside(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".attached");
    name.into()
}

/// The path of a configuration file, however it was written. Not that which a link of its name leads to: where each version of
/// a file has a folder of its own, that is another one each time.
fn stable(file: &Path) -> String {
    let absolute = path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let folder = absolute.parent().and_then(|folder| fs::canonicalize(folder).ok());
    let stable = folder.zip(absolute.file_name()).map(|(folder, name)| folder.join(name));
    stable.unwrap_or(absolute).display().to_string()
}

/// Says what stays of a capture that is not attached again.
fn warn_of_pins(config: &Config, group: &str) {
    let pins = pin_dir_of(config, group);
    if pins.exists() {
        tracing::warn!(
            cgroup = group,
            pins = %pins.display(),
            "what is pinned of it stays, and refuses its connections if it is closed on failure; `tunnel detach --config F` with a \
             configuration that captures it ends that"
        );
    }
}

/// What is in the file, which has to be one that only this user can write to.
fn kept(file: &Path) -> io::Result<Kept> {
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
    Ok(match serde_json::from_slice(&bytes)? {
        Found::Now(kept) => kept,
        Found::Before(attached) => Kept { config: None, attached },
    })
}

fn keep(file: &Path, kept: &Kept) -> io::Result<()> {
    if kept.attached.is_empty() {
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
    serde_json::to_writer(&to, kept)?;
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
            retry: None,
        }
    }

    fn of(config: &str, attached: Vec<Attached>) -> Kept {
        Kept { config: Some(config.to_owned()), attached }
    }

    #[test]
    fn what_was_attached_is_read_from_a_file_of_ours_and_from_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("admin.attached");
        assert_eq!(kept(&file).unwrap_err().kind(), io::ErrorKind::NotFound);
        keep(&file, &of("/a.toml", vec![attached("/sys/fs/cgroup/a")])).unwrap();
        assert_eq!(kept(&file).unwrap().attached[0].group, "/sys/fs/cgroup/a");
        let link = folder.path().join("link.attached");
        symlink(&file, &link).unwrap();
        assert!(kept(&link).is_err());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(kept(&file).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&file, "[{").unwrap();
        assert!(kept(&file).is_err());
        keep(&file, &of("/a.toml", Vec::new())).unwrap();
        assert!(!file.exists());
    }

    /// One socket may be that of one configuration, and then of another.
    #[tokio::test]
    async fn what_was_attached_beside_another_configuration_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let [socket, a, b] = ["x.sock", "a.toml", "b.toml"].map(|name| folder.path().join(name));
        let file = beside(&socket);
        assert_ne!(file, beside(&folder.path().join("x.socket")));
        let config = Config::empty(Default::default());
        keep(&file, &of(&stable(&a), vec![attached("/g")])).unwrap();
        let others = Attachments::new(Some(&socket), Some(&b), &config);
        assert!(others.forget().is_empty() && file.exists());
        let again = folder.path().join("..").join(folder.path().file_name().unwrap()).join("a.toml");
        let ours = Attachments::new(Some(&socket), Some(&again), &config);
        assert_eq!(ours.forget(), HashSet::from(["/g".to_owned()]));
        assert!(!file.exists());

        // As it was before it said whose it is.
        keep(&file, &of("", vec![attached("/g")])).unwrap();
        fs::write(&file, serde_json::to_vec(&[attached("/g")]).unwrap()).unwrap();
        assert_eq!(Attachments::new(Some(&socket), Some(&b), &config).forget().len(), 1);
    }

    #[tokio::test]
    async fn what_has_ended_and_could_not_be_detached_is_not_tried_again_at_once() {
        let ended = |group: &str, retry| Attached {
            until: Some(End::Process { pid: u32::MAX, started: 0 }),
            retry,
            ..attached(group)
        };
        let mut attachments = Attachments::new(None, None, &Config::empty(Default::default()));
        attachments.list = vec![ended("/a", Some(Instant::now() + RETRY)), ended("/b", None)];
        assert_eq!(attachments.expired().await, "/b");
    }

    #[tokio::test]
    async fn what_the_configuration_captures_by_now_is_not_attached_again() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("admin.sock");
        let wrong = Attached { text: "[[captured]]".to_owned(), ..attached("/c") };
        let named = Path::new("/agent.toml");
        keep(&beside(&socket), &of("/agent.toml", vec![attached("/a"), attached("/b"), wrong])).unwrap();
        let file = "[[capture]]\ncgroup = \"/a\"\n[[route]]\nto = \"deny\"\n";
        let config = Config::parse_layer(file, Path::new("agent.toml")).unwrap();
        let attachments = Attachments::new(Some(&socket), Some(named), &config);
        assert_eq!(attachments.forget(), HashSet::from(["/b".to_owned()]));
        assert!(!beside(&socket).exists());
    }
}
