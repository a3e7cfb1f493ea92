//! What the control loop tells the admin interface, and what `tunnel status` reads.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::history::Rates;
pub use crate::identity::describe::Certificate;
use crate::{
    model::flow::Target,
    routing::router::Explained,
    sinks::upstream::report::{EndpointReport, UpstreamTotals},
};

/// What the control loop is asked.
pub enum Command {
    /// What it is doing.
    Overview(oneshot::Sender<Overview>),
    /// What is configured, by where that came from.
    ConfigDump(oneshot::Sender<serde_json::Value>),
    /// Where a flow would go.
    Explain(Question, oneshot::Sender<Result<Explanation, String>>),
    /// To capture one more group; which, or why not.
    Attach(Attach, oneshot::Sender<Result<String, String>>),
    /// No longer to capture a group that was attached.
    Detach(String, oneshot::Sender<Result<String, String>>),
    /// To drain and end, as on SIGTERM.
    Drain(oneshot::Sender<()>),
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overview(_) => "Overview",
            Self::ConfigDump(_) => "ConfigDump",
            Self::Explain(..) => "Explain",
            Self::Attach(..) => "Attach",
            Self::Detach(..) => "Detach",
            Self::Drain(_) => "Drain",
        })
    }
}

/// What the control loop knows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Overview {
    /// The version of this program.
    pub version: String,
    /// The kernel's release.
    pub kernel: String,
    /// The process.
    pub pid: u32,
    /// The configuration file, if there is one.
    pub config_file: Option<PathBuf>,
    /// When it began, in seconds since 1970.
    pub started_at: u64,
    /// Worker threads.
    pub workers: usize,
    /// Flows that all workers take together.
    pub flows_max: usize,
    /// How bytes are moved between two sockets of ours.
    pub relay: String,
    /// What is captured.
    pub captures: Vec<Capture>,
    /// What listens.
    pub listeners: Vec<Listener>,
    /// Its identities, by name.
    pub identities: Vec<Identity>,
    /// Its upstreams, by name, and whether they are this process itself.
    pub upstreams: Vec<UpstreamOverview>,
    /// Changes of the configuration.
    pub reloads: Reloads,
    /// What the process may do.
    pub privileges: Privileges,
}

/// What the process may do.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Privileges {
    /// Its user.
    pub user: u32,
    /// Whether it may leave a core dump.
    pub core_dumps: bool,
    /// What the control thread may do.
    pub control: ThreadPrivileges,
    /// What a worker may do; `None` where the one that was looked at has ended.
    pub workers: Option<ThreadPrivileges>,
}

/// What a thread may do.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ThreadPrivileges {
    /// Its capabilities, as capabilities(7) names them.
    pub capabilities: Vec<String>,
    /// Whether executing a program gives it no more.
    pub no_new_privs: bool,
    /// Its filter of system calls: "none", "strict" or "filter".
    pub seccomp: String,
    /// The version of Landlock that keeps files from it; `None` where nothing does.
    pub landlock: Option<u32>,
}

/// A capture.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Capture {
    /// What routes call it.
    pub name: Option<String>,
    /// Its group.
    pub group: String,
    /// Whether its programs are attached, by this daemon.
    pub attached: bool,
    /// Whether the group exists at present.
    pub present: bool,
    /// What its applications get while no daemon runs: "closed" or "open".
    pub on_failure: String,
    /// Network namespaces with listeners.
    pub namespaces: usize,
    /// Its processes.
    pub processes: usize,
    /// Warnings of processes that have left it.
    pub left: u64,
    /// What its programs have counted.
    pub counters: BTreeMap<String, u64>,
}

impl Capture {
    /// By what it is told from others: its name, else its group.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.group)
    }
}

/// Something that listens.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Listener {
    /// What routes call it.
    pub name: Option<String>,
    /// Where.
    pub address: String,
    /// "connect" for CONNECT requests, "redirect" for connections that rules redirect.
    pub kind: String,
    /// Whether it speaks TLS.
    pub tls: bool,
}

/// An identity.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// Its name in the configuration.
    pub name: String,
    /// Where it comes from.
    pub origin: String,
    /// Who we are with it.
    pub identity: Option<String>,
    /// The certificate, and those of its CAs that are sent with it.
    pub chain: Vec<Certificate>,
    /// The roots that peers are verified with.
    pub roots: Vec<Certificate>,
}

/// An upstream, as it is configured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct UpstreamOverview {
    /// Its name.
    pub name: String,
    /// What it speaks: "h2", "h1", or "in-process".
    pub protocol: String,
    /// Whether it speaks TLS.
    pub tls: bool,
}

/// Changes of the configuration since the start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Reloads {
    /// Those that were made.
    pub succeeded: u64,
    /// Those that were not.
    pub failed: u64,
    /// Why the latest was not made; none if it was.
    pub last_error: Option<String>,
    /// When the configuration in force was put in force, in seconds since 1970.
    pub last_success_at: u64,
}

/// Everything on one screen.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// "running" or "draining".
    pub state: String,
    /// Whether it is ready; see [`Problem`] for what is missing.
    pub ready: bool,
    /// What the control loop knows.
    #[serde(flatten)]
    pub overview: Overview,
    /// Seconds since the overview was made, where the control loop has not answered in time.
    pub overview_age: u64,
    /// What the upstreams are doing.
    pub upstream_reports: Vec<Upstream>,
    /// Flows.
    pub flows: Flows,
    /// What has happened in the last minute.
    pub rates: Rates,
    /// What is wrong, the worst first.
    pub problems: Vec<Problem>,
}

/// Flows of all workers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Flows {
    /// Those that are carried now.
    pub live: usize,
    /// Those whose target is being reached.
    pub pending: usize,
    /// Those that have reached their target since the start.
    pub opened: u64,
    /// Bytes from clients.
    pub sent: u64,
    /// Bytes from targets.
    pub received: u64,
    /// Flows by how they ended, and how often.
    pub ended: BTreeMap<String, u64>,
}

/// What an upstream is doing on all workers together.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Upstream {
    /// Its name.
    pub name: String,
    /// Its name with those that it goes through.
    pub path: String,
    /// Its endpoints.
    pub endpoints: Vec<EndpointReport>,
    /// Why there is no endpoint, if there is none.
    pub unavailable: Option<String>,
    /// What it has counted.
    #[serde(flatten)]
    pub totals: UpstreamTotals,
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work.
    Error,
    /// Something will not work soon, or not as well as it could.
    #[default]
    Warning,
}

/// Something that is wrong, and what helps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// Whether it keeps the daemon from being ready.
    pub blocks_ready: bool,
    /// What is wrong.
    pub what: String,
    /// What helps.
    pub remedy: String,
}

/// A flow that there may be.
#[derive(Clone, Debug)]
pub struct Question {
    /// What it wants to reach.
    pub to: Target,
    /// By what it comes.
    pub by: By,
    /// Who the peer of a listener has proved to be.
    pub identity: Option<String>,
    /// The server name in the TLS that it carries.
    pub sni: Option<String>,
    /// The host of the HTTP/1 request that it carries.
    pub http_host: Option<String>,
}

/// By what a flow comes.
#[derive(Clone, Debug)]
pub enum By {
    /// An application of the only capture, or of the first.
    AnyCapture,
    /// An application of a capture, by its name or its group.
    Capture(String),
    /// An application in a cgroup, by its path.
    Cgroup(String),
    /// A peer of a listener, by its name or its address.
    Listener(String),
}

/// Where a flow would go, and why.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Explanation {
    /// What it wants to reach.
    pub to: String,
    /// By what it comes.
    pub by: String,
    /// Whether a capture takes it, of an application.
    pub capture: Option<Step>,
    /// Whether policy allows it, of a listener's peer.
    pub policy: Option<Step>,
    /// What each route says, in order; nothing where it does not come so far.
    pub routes: Vec<Explained>,
    /// What becomes of it.
    pub decision: String,
    /// The upstreams that it may go through, with their part of such flows.
    pub upstreams: Vec<Share>,
}

/// One step on the way.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Step {
    /// Whether it goes on.
    pub passes: bool,
    /// Why.
    pub why: String,
}

/// An upstream of a route.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Share {
    /// Its name.
    pub upstream: String,
    /// How many of the flows of its route go through it, in percent.
    pub percent: f64,
    /// Its endpoints, as they are now.
    pub endpoints: Vec<EndpointReport>,
    /// Why there is no endpoint, if there is none.
    pub unavailable: Option<String>,
}

/// A capture that an operator wants.
#[derive(Clone, Debug)]
pub struct Attach {
    /// The table of a configuration that says so.
    pub text: String,
    /// With what it ends.
    pub until: Option<Until>,
}

/// With what a capture ends.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// A process.
    Process(u32),
    /// When nothing runs in the group any more.
    Empty,
}
