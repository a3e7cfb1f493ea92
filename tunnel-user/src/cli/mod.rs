//! The command line.
//!
//! Enters: what was typed. Leaves: a [`Command`] whose arguments are typed already. Invariant: what is not
//! understood is refused here, with what would have been. It never does anything but parse.

pub mod doctor;
pub mod exec;
pub mod pki;

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
  64  the configuration or the command line is wrong
  69  the kernel lacks what is needed (\"tunnel doctor\" says what)
  77  a privilege is missing
  1   anything else";

/// Carry the TCP connections of unmodified programs through mutually authenticated HTTP/2 CONNECT tunnels.
///
/// A cgroup's connections are captured by eBPF at connect(), carried over TLS to a gateway, and dialled
/// from there. The program notices nothing, and needs no route to its target.
#[derive(Debug, Parser)]
#[command(name = "tunnel", version, propagate_version = true, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// What to log: error, warn, info, debug or trace, or a filter such as warn,tunnel::relay=debug.
    ///
    /// Log lines go to standard error. Default: info, and warn for exec.
    #[arg(long, global = true, env = "TUNNEL_LOG", value_name = "LEVEL|FILTER", help_heading = "Logging")]
    pub log: Option<LogFilter>,
    /// How log lines look.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT", help_heading = "Logging")]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// What to log, when nothing was said: a command's own output should not drown.
    pub fn log_filter(&self) -> LogFilter {
        let default = if matches!(self.command, Command::Exec(_)) { "warn" } else { "info" };
        self.log.clone().unwrap_or_else(|| default.parse().expect("a level is a filter"))
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command with its TCP connections captured.
    ///
    /// The command runs in a fresh cgroup, with this terminal, environment and working directory; signals are
    /// passed on, and its exit status is ours. Everything it connects to goes through the gateway, except
    /// loopback, link-local and multicast addresses. The cgroup is removed at the end.
    ///
    /// Needs root (CAP_BPF, CAP_NET_ADMIN and a writable cgroup): "tunnel doctor" says what is missing.
    Exec(Box<ExecArgs>),
    /// Run the daemon: agent, gateway, or both, as the configuration says.
    ///
    /// Listeners are bound and programs loaded before anything is captured. On SIGTERM new connections are
    /// refused, and those that are up may go on for daemon.drain_timeout.
    Run(RunArgs),
    /// End the captures of a configuration, whether or not a daemon runs.
    ///
    /// A daemon that stops leaves its captures in place where on_failure is "closed": the connections that
    /// they cover are refused until a daemon is back, or until this.
    Detach(DetachArgs),
    /// Run a gateway without a configuration file.
    ///
    /// Takes CONNECT requests (HTTP/2 over TLS 1.3) from clients with a certificate of the CA, and dials what
    /// they ask for, as far as --allow goes. Nothing is allowed until a rule says so; loopback, link-local and
    /// metadata
    /// addresses and the gateway's own listeners only when a rule names them.
    Gateway(GatewayArgs),
    /// Say what this kernel, cgroup set-up and privilege allow, each with its remedy.
    ///
    /// Exits with 69 when the kernel lacks something that is needed, and with 77 when a privilege is missing.
    Doctor(DoctorArgs),
    /// Check a configuration file, or print the schema of all keys.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Make a throwaway CA and certificates, for trying and testing.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Print the completion script for a shell.
    Completions(CompletionsArgs),
    /// Print the manual page, or write the pages of every command.
    Man(ManArgs),
}

/// What `tunnel exec` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel exec --gateway gw.example:15008 --ca ca.pem --cert node.pem --key node-key.pem \\
      -- curl http://10.0.0.5/
  tunnel exec --config agent.toml --stats -- psql -h 10.0.0.6
  tunnel exec --config agent.toml --capture 127.0.0.1/32:8080 -- ./legacy-app")]
pub struct ExecArgs {
    /// A configuration file: its identity, routes and upstreams.
    #[arg(long, value_name = "FILE", required_unless_present = "gateway", conflicts_with_all = ["gateway", "ca", "cert", "key", "verify", "sni", "header", "workers"])]
    pub config: Option<PathBuf>,
    /// The gateway to tunnel through.
    #[arg(long, value_name = "HOST:PORT", requires_all = ["ca", "cert", "key"])]
    pub gateway: Option<Target>,
    /// The CA that signs the gateway's certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "gateway")]
    pub ca: Option<PathBuf>,
    /// Our certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "gateway")]
    pub cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE", requires = "gateway")]
    pub key: Option<PathBuf>,
    /// A name that the gateway's certificate must carry; one of several is enough.
    ///
    /// A URI such as spiffe://example.org/gateway (* stands for one path segment), a DNS name or an
    /// address. Without it the certificate must be valid for --sni, or for the host of --gateway.
    #[arg(long, value_name = "SAN", requires = "gateway")]
    pub verify: Vec<SanPattern>,
    /// The server name to ask the gateway for. Default: the host of --gateway.
    #[arg(long, value_name = "NAME", value_parser = parse_server_name, requires = "gateway")]
    pub sni: Option<ServerName<'static>>,
    /// Capture only these, a network and optional ports: 10.0.0.0/8, 10.0.0.0/8:80,8000-8999, fd00::/8:443.
    ///
    /// Default: everything but loopback, link-local and multicast. The longest prefix over --capture, --refuse and
    /// --exclude decides, so 127.0.0.1/32:8080 is captured although loopback is not.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub capture: Vec<AddrPattern>,
    /// Refuse these, a network and optional ports: connect() fails with ENETUNREACH.
    ///
    /// With ::/0 a command that also knows an IPv4 address falls back to it at once. At the same prefix, --refuse wins
    /// over --capture.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub refuse: Vec<AddrPattern>,
    /// Leave these alone, a network and optional ports. At the same prefix, --exclude wins over --refuse and --capture.
    #[arg(long, value_name = "CIDR[:PORTS]")]
    pub exclude: Vec<AddrPattern>,
    /// Add a header to every CONNECT request, such as baggage=k8s.cluster.name=a.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_header_flag, requires = "gateway")]
    pub header: Vec<(HeaderName, HeaderValue)>,
    /// Mark our own connections (SO_MARK), for rules of yours that are to leave them alone. Default: 0x1000/0x1000.
    #[arg(long, value_name = "VALUE[/MASK]", requires = "gateway")]
    pub mark: Option<Mark>,
    /// Worker threads. Default: one per core.
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroUsize>,
    /// Print what was carried, at the end, to standard error.
    #[arg(long)]
    pub stats: bool,
    /// Write what was carried to a file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub stats_json: Option<PathBuf>,
    /// The command and its arguments, behind "--".
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

impl ExecArgs {
    /// The configuration that the flags mean, or that the file and the flags mean together.
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
            identity: IdentityFiles { cert: file(&self.cert), key: file(&self.key), ca: file(&self.ca) },
            verify: self.verify.clone(),
            sni: self.sni.clone(),
            wanted,
            headers: self.header.clone(),
            mark: self.mark,
            workers: self.workers,
        }))
    }
}

/// What `tunnel run` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel run --config /etc/tunnel/agent.toml
  tunnel run --config gateway.toml --log debug --log-format json
  tunnel run --config /etc/tunnel/agent.toml --takeover")]
pub struct RunArgs {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Replace the daemon that runs with the same configuration file, without refusing a connection.
    ///
    /// Its listeners pass to the new daemon with the connections that wait in them; then it drains.
    #[arg(long)]
    pub takeover: bool,
}

/// What `tunnel detach` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel detach --config /etc/tunnel/agent.toml")]
pub struct DetachArgs {
    /// The configuration file whose captures end.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// What `tunnel gateway` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel gateway --listen 0.0.0.0:15008 --ca ca.pem --cert gw.pem --key gw-key.pem --allow 10.0.0.0/8
  tunnel gateway --listen [::]:15008 --ca ca.pem --cert gw.pem --key gw-key.pem \\
      --verify spiffe://example.org/ns/*/sa/web --allow 10.0.0.0/8:80,443 --allow '*.internal:5432'")]
pub struct GatewayArgs {
    /// Where to listen; may be repeated.
    #[arg(long, value_name = "ADDR:PORT", required = true, value_parser = parse_listen)]
    pub listen: Vec<SocketAddr>,
    /// The CA that signs the clients' certificates, PEM.
    #[arg(long, value_name = "FILE")]
    pub ca: PathBuf,
    /// Our certificate, PEM.
    #[arg(long, value_name = "FILE")]
    pub cert: PathBuf,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// A name that a client's certificate must carry; one of several is enough. Default: any name.
    #[arg(long, value_name = "SAN")]
    pub verify: Vec<SanPattern>,
    /// What clients may reach: a network or a name (or *.suffix), and optional ports; may be repeated.
    #[arg(long, value_name = "TARGET")]
    pub allow: Vec<TargetPattern>,
    /// How long a dial may take, such as 10s or 500ms.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub dial_timeout: Duration,
    /// Worker threads. Default: one per core.
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroUsize>,
}

impl GatewayArgs {
    /// The configuration that the flags mean.
    pub fn to_config(&self) -> Config {
        let identity = IdentityFiles { cert: self.cert.clone(), key: self.key.clone(), ca: self.ca.clone() };
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

/// What `tunnel doctor` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel doctor
  sudo tunnel doctor --json | jq '.[] | select(.ok | not)'")]
pub struct DoctorArgs {
    /// For programs.
    #[arg(long)]
    pub json: bool,
}

/// `tunnel config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration file: every mistake is listed, with line, column and key.
    #[command(after_help = "Example:\n  tunnel config check /etc/tunnel/agent.toml")]
    Check {
        /// The file.
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
    /// Make a CA: DIR/ca.pem and DIR/ca-key.pem.
    #[command(after_help = "Example:\n  tunnel pki init ./pki")]
    Init {
        /// The directory; it is made when missing.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// Replace a CA that is there. What it has signed is worthless then.
        #[arg(long)]
        force: bool,
    },
    /// Have the CA in DIR sign a certificate: DIR/NAME.pem and DIR/NAME-key.pem.
    Issue(IssueArgs),
}

/// What `tunnel pki issue` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel pki issue --dir ./pki --id spiffe://example.org/ns/default/sa/web --name web
  tunnel pki issue --dir ./pki --id spiffe://example.org/gateway --name gw \\
      --dns gw.internal --ip 10.9.0.1")]
pub struct IssueArgs {
    /// The SPIFFE ID that the certificate proves.
    #[arg(long, value_name = "SPIFFE-ID")]
    pub id: SpiffeId,
    /// Where the CA is, and where the files go.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// What the files are called.
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// A DNS name to add; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub dns: Vec<String>,
    /// An address to add; may be repeated.
    #[arg(long, value_name = "ADDR")]
    pub ip: Vec<IpAddr>,
    /// For how many days it is valid.
    #[arg(long, value_name = "N", default_value_t = LEAF_DAYS, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,
    /// Replace files that are there, as a rotation does.
    #[arg(long)]
    pub force: bool,
}

impl IssueArgs {
    /// What the certificate is to say.
    pub fn to_request(&self) -> IssueRequest {
        IssueRequest {
            id: Some(self.id.clone()),
            dns: self.dns.clone(),
            ip: self.ip.clone(),
            validity: Validity::days(self.days),
        }
    }
}

/// What `tunnel completions` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tunnel completions bash > /etc/bash_completion.d/tunnel
  tunnel completions fish > ~/.config/fish/completions/tunnel.fish")]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// What `tunnel man` is told.
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
        config::{Action, CgroupRef},
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
        assert_eq!(leaves, 11);
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
        assert_eq!(config.identities[&IdentityName::default()].key, PathBuf::from("k.pem"));

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
        assert_eq!(config.policies[0].target.len(), 2);
        assert_eq!(config.routes[0].to, Action::Direct);
        let e = parse("gateway --listen 0.0.0.0 --ca a --cert b --key c").unwrap_err().to_string();
        assert!(e.contains("it has no port"), "{e}");
    }
}
