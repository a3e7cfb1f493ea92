//! The proxy on the node.

use std::fmt::Write as _;

use anyhow::Result;
use nix::sys::signal::Signal;

use super::{BARE_PORT, Bed, Capture, FAR, MAX_FLOWS, NEAR_PORT, Near, Place, unrelated};
use crate::{
    bench::{model::Role, peers::Peers},
    bpffs::BpfFs,
    pki::{Credentials, GATEWAY_ID},
    programs,
};

/// Warnings, as Envoy is told to log too; and when it captures, which is waited for.
pub(super) const LOG: &str = "warn,tunnel::daemon=info";

impl Bed {
    /// Starts it, if this arm has one, or only our hooks.
    pub(super) fn near(&mut self, workers: u32, peers: &Peers) -> Result<()> {
        match self.build.near {
            None if self.build.capture == Some(Capture::Ebpf) => self.ours("", workers, peers),
            None => Ok(()),
            Some(Near::Dialling(relay)) => self.ours(&format!("relay = \"{relay}\"\n"), workers, peers),
            Some(Near::Ours | Near::OursH3) => self.ours("", workers, peers),
            Some(Near::Envoy) => {
                let template = include_str!("envoy-near.yaml");
                self.envoy(Role::Near, template, ["node", GATEWAY_ID], NEAR_PORT, workers, peers)
            }
            Some(Near::EnvoyH3) => {
                let template = include_str!("envoy-near-h3.yaml");
                self.envoy(Role::Near, template, ["node", GATEWAY_ID], NEAR_PORT, workers, peers)
            }
            Some(Near::Redsocks) => {
                let config = format!(
                    "base {{ log_debug = off; log_info = off; log = stderr; daemon = off; redirector = iptables; \
                     redsocks_conn_max = {MAX_FLOWS}; rlimit_nofile = 20000; }}\n\
                     redsocks {{ local_ip = 127.0.0.1; local_port = {NEAR_PORT}; ip = {}; port = {}; \
                     type = http-connect; listenq = 1024; }}\n",
                    FAR.ip(),
                    FAR.port()
                );
                let config = self.world.file("redsocks.conf", config)?;
                let mut command = self.world.node().command(programs::system("redsocks")?);
                command.arg("-c").arg(config);
                self.spawn_listening(Role::Near, "redsocks", command, NEAR_PORT)
            }
        }
    }

    /// Envoy, with a template filled in; the names are those of its own certificate, and of
    /// the other side.
    pub(super) fn envoy(
        &mut self,
        role: Role,
        template: &str,
        [own, peer]: [&str; 2],
        port: u16,
        workers: u32,
        peers: &Peers,
    ) -> Result<()> {
        let Credentials { cert, key, ca } = self.world.pki().named(own);
        let config = [
            ("@PORT@", port.to_string()),
            ("@GATEWAY@", FAR.ip().to_string()),
            ("@GATEWAY_PORT@", FAR.port().to_string()),
            ("@CERT@", cert.display().to_string()),
            ("@KEY@", key.display().to_string()),
            ("@CA@", ca.display().to_string()),
            ("@PEER@", peer.to_owned()),
        ]
        .into_iter()
        .fold(template.to_owned(), |text, (place, value)| text.replace(place, &value));
        let name = if role == Role::Near { "envoy-near" } else { "envoy-far" };
        let config = self.world.file(&format!("{name}.yaml"), config)?;
        let host = if role == Role::Near { self.world.node() } else { self.world.net() };
        let mut command = host.command(peers.envoy()?);
        command.args(["--disable-hot-restart", "-l", "warn", "--concurrency", &workers.to_string(), "-c"]);
        command.arg(config);
        self.spawn_listening(role, name, command, port)
    }

    /// `tunnel run`, with what this arm captures.
    fn ours(&mut self, daemon: &str, workers: u32, peers: &Peers) -> Result<()> {
        let mut config = format!("[daemon]\nworkers = {workers}\nmax_flows = {MAX_FLOWS}\n{daemon}");
        let capture = self.capture_section()?;
        if let Some(bpffs) = &self._bpffs {
            config.push_str(&bpffs.toml());
        }
        if self.build.far.is_some() {
            config.push_str(&self.world.pki().named("node").toml());
        }
        config.push_str(&capture);
        match (self.build.near, self.build.far) {
            // The hooks lead straight to the server.
            (None, _) => {}
            (_, None) => config.push_str("[[route]]\nto = \"direct\"\n"),
            (near, Some(_)) => {
                config.push_str(&crate::daemon::through(FAR, GATEWAY_ID));
                if near == Some(Near::OursH3) {
                    config.push_str("protocol = \"h3\"\n");
                }
            }
        }
        let config = self.world.file("near.toml", config)?;
        let mut command = self.world.node().command_ended_by(peers.tunnel(&self.build)?, Signal::SIGTERM);
        command.args(["run", "--log", LOG, "--config"]).arg(config);
        if self.build.capture == Some(Capture::Iptables) {
            return self.spawn_listening(Role::Near, "tunnel-near", command, NEAR_PORT);
        }
        self.describe(Role::Near, &command);
        self.spawn(Role::Near, "tunnel-near", command)?.wait_for_line("capturing").map(drop)
    }

    fn capture_section(&mut self) -> Result<String> {
        if self.build.capture == Some(Capture::Iptables) {
            return Ok(format!("[[capture]]\nmode = \"redirect\"\nlisten = [\"127.0.0.1:{NEAR_PORT}\"]\n"));
        }
        self._bpffs = Some(BpfFs::new(&self.world)?);
        let group = self.groups[&Role::Client].path().display();
        let mut section = format!("[[capture]]\ncgroup = \"{group}\"\n");
        let captured = self.address(super::Whose::Captured).ip();
        write!(section, "include = [\"{captured}/32\"")?;
        for address in unrelated(self.build.rules) {
            write!(section, ", \"{address}/32\"")?;
        }
        section.push_str("]\n");
        if self.build.server == Place::Node {
            writeln!(section, "proxy = \"127.0.0.1:{BARE_PORT}\"")?;
        }
        Ok(section)
    }
}
