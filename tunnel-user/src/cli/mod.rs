//! The command line: arguments are parsed into a typed [`Command`].
//!
//! Values that are not valid are rejected here, with an example of a valid one.

pub mod attach;
pub mod client;
pub mod doctor;
pub mod exec;
pub mod explain;
pub mod flows;
pub mod pki;
pub mod service;
pub mod status;
pub mod support;
mod table;
pub mod top;

use std::{ffi::OsString, net::IpAddr, net::SocketAddr, num::NonZeroUsize, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use http::{HeaderName, HeaderValue};
use rustls_pki_types::ServerName;

use crate::{
    cli::pki::{IssueRequest, LEAF_DAYS, Validity},
    config::{
        AddrPattern, Config, ConfigErrors, ExecOptions, GatewayOptions, TargetPattern, Wanted,
        parse_duration, parse_header_flag, parse_server_name, parse_socket_addr,
    },
    model::{
        flow::Target,
        mark::Mark,
        san::{SanPattern, SpiffeId},
        trust::IdentityFiles,
    },
    observe::telemetry::{LogFilter, LogFormat},
};

const EXIT_CODES: &str = "\
Exit codes:
  0   fine (exec: the command's own status, or 128 + the signal that ended it)
  64  the configuration or the command line is invalid
  69  the kernel lacks something that is required (\"tunnel doctor\" lists it)
  77  a privilege is missing
  1   any other error";

/// Carry the TCP connections of unmodified programs through mutually authenticated HTTP/2 CONNECT tunnels.
///
/// The connections of a cgroup are captured by eBPF at connect(), carried over TLS to a gateway, and dialled
/// from there. The program needs no configuration, and no route to its target.
#[derive(Debug, Parser)]
#[command(name = "tunnel", version, propagate_version = true, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// Log level: error, warn, info, debug or trace; or a filter such as warn,tunnel::relay=debug.
    ///
    /// Log lines go to standard error. Default: info; for exec: warn.
    #[arg(long, global = true, env = "TUNNEL_LOG", value_name = "LEVEL|FILTER", help_heading = "Logging")]
    pub log: Option<LogFilter>,
    /// Format of log lines.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT", help_heading = "Logging")]
    pub log_format: LogFormat,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The log filter. The default for `exec` is `warn`, because the output of the command matters more.
    pub fn log_filter(&self) -> LogFilter {
        let default = if matches!(self.command, Command::Exec(_)) { "warn" } else { "info" };
        self.log.clone().unwrap_or_else(|| default.parse().expect("a level is a filter"))
    }
}

/// A command of `tunnel`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command with its TCP connections captured.
    ///
    /// The command runs in a new cgroup, with this terminal, environment and working directory. Signals are forwarded to
    /// it, and its exit status is returned. All its TCP connections go through the gateway, except those to loopback,
    /// link-local and multicast addresses. The cgroup is removed at the end.
    ///
    /// Requires root (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN and a writable cgroup): "tunnel doctor" lists what is missing.
    Exec(Box<ExecArgs>),
    /// Run the daemon: agent, gateway, or both, depending on the configuration.
    ///
    /// Listeners are bound and programs are loaded before anything is captured. On SIGTERM the daemon drains: new
    /// connections are refused, and established flows may finish within daemon.drain_timeout.
    Run(RunArgs),
    /// Capture one more cgroup, unit, process or container by a running daemon.
    ///
    /// It lasts over reloads, take-overs and a daemon that is killed and started again, until it is detached, until its process
    /// ends (--until-exit), or until the daemon ends in order, which releases it whatever --on-failure says.
    Attach(Box<attach::AttachArgs>),
    /// End a capture that was attached to a running daemon, or the captures of a configuration, whether or not a daemon is running.
    ///
    /// With --cgroup, --unit, --pid or --container: what `tunnel attach` has attached. With --config alone: what the configuration
    /// captures.
    ///
    /// A daemon that stops leaves captures with on_failure = "closed" in place: their connections are refused until a
    /// daemon is running again, or until the captures are detached.
    Detach(DetachArgs),
    /// Show what a running daemon is doing: captures, listeners, upstreams, certificates, rates and problems, each with its
    /// remedy.
    ///
    /// Asks the daemon's admin socket. Exits with 1 if the daemon is not ready.
    Status(status::StatusArgs),
    /// List the flows that a running daemon carries, watch them, or end one.
    ///
    /// Asks the daemon's admin socket.
    Flows(Box<flows::FlowsArgs>),
    /// Show the flows of a running daemon by their rate, its upstreams and its throughput, kept up to date.
    ///
    /// Asks the daemon's admin socket, and goes on when another daemon takes over. Without colours where NO_COLOR is set.
    Top(Box<top::TopArgs>),
    /// Explain where a connection would go, and why: whether it is captured, what policy and each route say, and which upstream
    /// and endpoints it may take.
    ///
    /// Asks the daemon's admin socket; nothing is sent to any target.
    Explain(Box<explain::ExplainArgs>),
    /// Write a folder for a bug report: versions, doctor, status, metrics, the configuration without secrets, and the latest log
    /// lines.
    ///
    /// Nothing is sent anywhere. It names addresses, identities and file names: read it before you pass it on.
    Support(support::SupportArgs),
    /// Run a gateway without a configuration file.
    ///
    /// Accepts CONNECT requests (HTTP/2 over TLS 1.3) from clients with a certificate of the CA, and dials the targets that
    /// --allow permits. By default nothing is allowed. Loopback, link-local and metadata addresses and the gateway's own
    /// listeners are allowed only by a rule that names them.
    Gateway(GatewayArgs),
    /// Check what this kernel, cgroup set-up and privilege allow, with a remedy for what is missing.
    ///
    /// Exits with 69 if the kernel lacks something that is required, and with 77 if a privilege is missing.
    Doctor(DoctorArgs),
    /// Check a configuration file, or print the schema of all keys.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Create a throwaway CA and certificates, for trials and tests.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Print the completion script for a shell.
    Completions(CompletionsArgs),
    /// Print the manual page, or write the pages of every command.
    Man(ManArgs),
}

/// Arguments of `tunnel exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel exec --gateway gw.example:15008 --ca ca.pem --cert node.pem --key node-key.pem \\
      -- curl http://10.0.0.5/
  tunnel exec --config agent.toml --stats -- psql -h 10.0.0.6
  tunnel exec --config agent.toml --capture 127.0.0.1/32:8080 -- ./legacy-app")]
pub struct ExecArgs {
    /// Configuration file; its identity, routes and upstreams are used.
    #[arg(long, value_name = "FILE", required_unless_present = "gateway", conflicts_with_all = ["gateway", "ca", "cert", "key", "verify", "sni", "header", "workers", "insecure_key_permissions"])]
    pub config: Option<PathBuf>,
    /// Address of the gateway.
    #[arg(long, value_name = "HOST:PORT", requires_all = ["ca", "cert", "key"])]
    pub gateway: Option<Target>,
    /// CA certificates that the gateway's certificate is verified with, PEM.
    #[arg(long, value_name = "FILE", requires = "gateway")]
    pub ca: Option<PathBuf>,
    /// Client certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "gateway")]
    pub cert: Option<PathBuf>,
    /// Private key of the client certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "gateway")]
    pub key: Option<PathBuf>,
    /// Accept a private key whose file other users can read.
    #[arg(long, requires = "gateway")]
    pub insecure_key_permissions: bool,
    /// Name (SAN) that the gateway's certificate must have; may be repeated, and one has to match.
    ///
    /// A URI such as spiffe://example.org/gateway (* matches one path segment), a DNS name or an address. Default: the
    /// certificate must be valid for --sni, or for the host of --gateway.
    #[arg(long, value_name = "SAN", requires = "gateway")]
    pub verify: Vec<SanPattern>,
    /// Server name to send to the gateway (SNI). Default: the host of --gateway.
    #[arg(long, value_name = "NAME", value_parser = parse_server_name, requires = "gateway")]
    pub sni: Option<ServerName<'static>>,
    /// Capture only these destinations: a network and optional ports, such as 10.0.0.0/8:80,8000-8999 or fd00::/8:443.
    ///
    /// Default: everything except loopback, link-local and multicast addresses. The longest prefix of --capture, --refuse
    /// and --exclude decides, so 127.0.0.1/32:8080 is captured although loopback is not.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub capture: Vec<AddrPattern>,
    /// Refuse these destinations, a network and optional ports: connect() fails with ENETUNREACH.
    ///
    /// With ::/0, a command that also knows an IPv4 address falls back to it at once. At the same prefix, --refuse takes
    /// precedence over --capture.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub refuse: Vec<AddrPattern>,
    /// Do not capture these destinations, a network and optional ports: they are connected to directly.
    ///
    /// At the same prefix, --exclude takes precedence over --refuse and --capture.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub exclude: Vec<AddrPattern>,
    /// Add a header to every CONNECT request, such as baggage=k8s.cluster.name=a.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_header_flag, requires = "gateway")]
    pub header: Vec<(HeaderName, HeaderValue)>,
    /// Mark (SO_MARK) of the connections to the gateway, for firewall rules to match. Default: 0x1000/0x1000.
    #[arg(long, value_name = "VALUE[/MASK]", requires = "gateway")]
    pub mark: Option<Mark>,
    /// Worker threads. Default: one per core.
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroUsize>,
    /// At the end, print a table of all flows to standard error.
    #[arg(long)]
    pub stats: bool,
    /// At the end, write a list of all flows to a file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub stats_json: Option<PathBuf>,
    /// The command and its arguments, after "--".
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

impl ExecArgs {
    /// The configuration from the flags, or from the file and the flags together.
    pub fn to_config(&self) -> Result<Config, ConfigErrors> {
        let wanted = Wanted {
            capture: self.capture.clone(),
            refuse: self.refuse.clone(),
            exclude: self.exclude.clone(),
        };
        if let Some(file) = &self.config {
            return Config::load_for_exec(file, wanted);
        }
        let file = |f: &Option<PathBuf>| f.clone().expect("--gateway requires it");
        Ok(Config::for_exec(ExecOptions {
            gateway: self.gateway.clone().expect("required where --config is not there"),
            identity: IdentityFiles {
                cert: file(&self.cert),
                key: file(&self.key),
                ca: file(&self.ca),
                insecure_key_permissions: self.insecure_key_permissions,
            },
            verify: self.verify.clone(),
            sni: self.sni.clone(),
            wanted,
            headers: self.header.clone(),
            mark: self.mark,
            workers: self.workers,
        }))
    }
}

/// Arguments of `tunnel run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel run --config /etc/tunnel/agent.toml
  tunnel run --config gateway.toml --log debug --log-format json
  tunnel run --config /etc/tunnel/agent.toml --takeover")]
pub struct RunArgs {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Replace the running daemon that has the same configuration file, without refusing a connection.
    ///
    /// It hands over its listening sockets, with the connections that wait in them, and then drains.
    #[arg(long)]
    pub takeover: bool,
}

/// Arguments of `tunnel detach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel detach --config /etc/tunnel/agent.toml
  sudo tunnel detach --unit legacy.service")]
#[command(group(clap::ArgGroup::new("what").args(["config", "cgroup", "unit", "pid", "container"]).required(true).multiple(true)))]
pub struct DetachArgs {
    /// Which daemon; alone, the configuration file whose captures are ended.
    #[command(flatten)]
    pub daemon: client::DaemonArgs,
    /// What was attached.
    #[command(flatten)]
    pub group: attach::GroupArgs,
}

/// Arguments of `tunnel gateway`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel gateway --listen 0.0.0.0:15008 --ca ca.pem --cert gw.pem --key gw-key.pem --allow 10.0.0.0/8
  tunnel gateway --listen [::]:15008 --ca ca.pem --cert gw.pem --key gw-key.pem \\
      --verify spiffe://example.org/ns/*/sa/web --allow 10.0.0.0/8:80,443 --allow '*.internal:5432'")]
pub struct GatewayArgs {
    /// Address to listen on; may be repeated.
    #[arg(long, value_name = "ADDR:PORT", required = true, value_parser = parse_listen)]
    pub listen: Vec<SocketAddr>,
    /// CA certificates that client certificates are verified with, PEM.
    #[arg(long, value_name = "FILE")]
    pub ca: PathBuf,
    /// Server certificate, PEM.
    #[arg(long, value_name = "FILE")]
    pub cert: PathBuf,
    /// Private key of the server certificate, PEM.
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// Accept a private key whose file other users can read.
    #[arg(long)]
    pub insecure_key_permissions: bool,
    /// Name (SAN) that a client certificate must have; may be repeated, and one has to match. Default: any name.
    #[arg(long, value_name = "SAN")]
    pub verify: Vec<SanPattern>,
    /// Target that clients may reach: a network, a name or *.suffix, and optional ports; may be repeated.
    #[arg(long, value_name = "TARGET")]
    pub allow: Vec<TargetPattern>,
    /// Timeout for dialling a target, such as 10s or 500ms.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub dial_timeout: Duration,
    /// Worker threads. Default: one per core.
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroUsize>,
}

impl GatewayArgs {
    /// The configuration from the flags.
    pub fn to_config(&self) -> Config {
        let identity = IdentityFiles {
            cert: self.cert.clone(),
            key: self.key.clone(),
            ca: self.ca.clone(),
            insecure_key_permissions: self.insecure_key_permissions,
        };
        Config::for_gateway(GatewayOptions {
            listen: self.listen.clone(),
            identity,
            verify: self.verify.clone(),
            allow: self.allow.clone(),
            dial_timeout: self.dial_timeout,
            workers: self.workers,
        })
    }
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    parse_socket_addr(text).map_err(|e| format!("it {e}"))
}

/// Arguments of `tunnel doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel doctor
  sudo tunnel doctor --json | jq '.[] | select(.ok | not)'")]
pub struct DoctorArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `tunnel config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration file, and list every mistake with line, column and key.
    #[command(after_help = "Example:\n  tunnel config check /etc/tunnel/agent.toml")]
    Check {
        /// Configuration file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print the JSON Schema of the configuration, for editors and for CI.
    #[command(after_help = "Example:\n  tunnel config schema > tunnel.schema.json")]
    Schema,
}

/// `tunnel pki`
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Create a CA: DIR/ca.pem and DIR/ca-key.pem.
    #[command(after_help = "Example:\n  tunnel pki init ./pki")]
    Init {
        /// Directory; it is created if it does not exist.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// Replace an existing CA. Certificates that it has signed become invalid.
        #[arg(long)]
        force: bool,
    },
    /// Issue a certificate, signed by the CA in DIR: DIR/NAME.pem and DIR/NAME-key.pem.
    Issue(IssueArgs),
}

/// Arguments of `tunnel pki issue`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel pki issue --dir ./pki --id spiffe://example.org/ns/default/sa/web --name web
  tunnel pki issue --dir ./pki --id spiffe://example.org/gateway --name gw \\
      --dns gw.internal --ip 10.9.0.1")]
pub struct IssueArgs {
    /// SPIFFE ID of the certificate.
    #[arg(long, value_name = "SPIFFE-ID")]
    pub id: SpiffeId,
    /// Directory of the CA, and of the new files.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Name of the new files, without extension.
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// DNS name to add; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub dns: Vec<String>,
    /// IP address to add; may be repeated.
    #[arg(long, value_name = "ADDR")]
    pub ip: Vec<IpAddr>,
    /// Days of validity.
    #[arg(long, value_name = "N", default_value_t = LEAF_DAYS, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,
    /// Replace existing files, as a rotation does.
    #[arg(long)]
    pub force: bool,
}

impl IssueArgs {
    /// The contents of the certificate.
    pub fn to_request(&self) -> IssueRequest {
        IssueRequest {
            id: Some(self.id.clone()),
            dns: self.dns.clone(),
            ip: self.ip.clone(),
            validity: Validity::days(self.days),
        }
    }
}

/// Arguments of `tunnel completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel completions bash > /etc/bash_completion.d/tunnel
  tunnel completions fish > ~/.config/fish/completions/tunnel.fish")]
pub struct CompletionsArgs {
    /// Shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// Arguments of `tunnel man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel man | man -l -
  tunnel man --dir /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Write one page per command into this directory.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::{
        config::{Action, CgroupRef, IdentitySource},
        model::names::IdentityName,
    };

    fn parse(args: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["tunnel"].into_iter().chain(args.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_examples() {
        Cli::command().debug_assert();
        let mut leaves = 0;
        let mut open = vec![Cli::command()];
        while let Some(command) = open.pop() {
            assert!(command.get_about().is_some(), "{} has no about", command.get_name());
            if command.has_subcommands() {
                open.extend(command.get_subcommands().cloned());
                continue;
            }
            leaves += 1;
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("tunnel "), "{} has no examples", command.get_name());
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {} has no help", command.get_name(), arg.get_id());
            }
        }
        assert_eq!(leaves, 17);
    }

    #[test]
    fn exec_takes_flags_or_a_file() {
        let id = "--ca ca.pem --cert c.pem --key k.pem";
        let exec = parse(&format!(
            "exec --gateway gw:15008 {id} --header baggage=a=b --verify spiffe://a/b --sni gw -- curl -s x"
        ));
        let Command::Exec(args) = exec.unwrap().command else { panic!("not exec") };
        assert_eq!(args.command, ["curl", "-s", "x"]);
        let config = args.to_config().unwrap();
        assert_eq!(config.captures[0].cgroup, CgroupRef::Fresh);
        assert_eq!(config.routes[0].to, Action::Upstreams(vec![("gateway".into(), 1)]));
        assert_eq!(config.upstreams[0].headers[0].1, "a=b");
        assert_eq!(config.upstreams[0].check().unwrap().server_name(&args.gateway.unwrap()).to_str(), "gw");
        let identity = &config.identities[&IdentityName::default()].source;
        assert!(
            matches!(identity, IdentitySource::Files(files) if files.key == std::path::Path::new("k.pem"))
        );

        let exec = parse(&format!("exec --gateway gw:1 {id} --refuse ::/0 --exclude 10.0.0.0/8:22 -- curl"));
        let Command::Exec(args) = exec.unwrap().command else { panic!("not exec") };
        let capture = &args.to_config().unwrap().captures[0];
        assert_eq!((capture.include.len(), capture.refuse.len(), capture.exclude.len()), (2, 1, 1));

        for (wrong, said) in [
            ("exec -- curl".to_owned(), "--config"),
            ("exec --gateway gw:15008 -- curl".to_owned(), "--ca"),
            (format!("exec --gateway gw {id} -- curl"), "no port"),
            (format!("exec --gateway gw:1 {id} --config f -- curl"), "cannot be used with"),
            (format!("exec --gateway gw:1 {id}"), "CMD"),
            (format!("exec --gateway gw:1 {id} --header :path=x -- curl"), "pseudo"),
            (format!("exec --gateway gw:1 {id} --capture 10.0.0.1/8 -- curl"), "10.0.0.0/8"),
            (format!("exec --gateway gw:1 {id} --refuse ::/129 -- curl"), "--refuse"),
            (format!("exec --gateway gw:1 {id} --log ,,=,x -- curl"), "--log"),
        ] {
            let e = parse(&wrong).unwrap_err().to_string();
            assert!(e.contains(said), "{wrong}: {e}");
        }
    }

    #[test]
    fn a_gateway_needs_no_file() {
        let args = parse(
            "gateway --listen [::]:15008 --listen 10.0.0.1:1 --ca a --cert b --key c --allow 10.0.0.0/8 \
             --allow *.internal:80 --dial-timeout 500ms",
        );
        let Command::Gateway(args) = args.unwrap().command else { panic!("not gateway") };
        let config = args.to_config();
        assert_eq!(config.listeners.len(), 2);
        assert_eq!(config.listeners[1].dial_timeout, Duration::from_millis(500));
        assert_eq!(config.policies[0].targets().len(), 2);
        assert_eq!(config.routes[0].to, Action::Direct);
        let e = parse("gateway --listen 0.0.0.0 --ca a --cert b --key c").unwrap_err().to_string();
        assert!(e.contains("it has no port"), "{e}");
    }
}
