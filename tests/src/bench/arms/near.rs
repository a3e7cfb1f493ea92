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
pub(super) const LOG: &str = "warn,tunnel::app=info";

impl Bed {
    /// Starts it, if this arm has one, or only our hooks.
    pub(super) fn near(&mut self, workers: u32, peers: &Peers) -> Result<()> {
        match self.build.near {
            None if self.build.capture == Some(Capture::Ebpf) => self.ours("", workers),
            None => Ok(()),
            Some(Near::Dialling(relay)) => self.ours(&format!("relay = \"{relay}\"\n"), workers),
            Some(Near::Ours) => self.ours("", workers),
            Some(Near::Envoy) => {
                let credentials = self.world.pki().named("node");
                let config = envoy(include_str!("envoy-near.yaml"), &credentials, GATEWAY_ID);
                let config = self.world.file("envoy-near.yaml", config)?;
                let mut command = self.world.node().command(peers.envoy()?);
                command.args([
                    "--disable-hot-restart",
                    "-l",
                    "warn",
                    "--concurrency",
                    &workers.to_string(),
                    "-c",
                ]);
                command.arg(config);
                self.spawn_listening(Role::Near, "envoy-near", command, NEAR_PORT)
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

    /// `tunnel run`, with what this arm captures.
    fn ours(&mut self, daemon: &str, workers: u32) -> Result<()> {
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
            (_, Some(_)) => config.push_str(&crate::daemon::through(FAR, GATEWAY_ID)),
        }
        let config = self.world.file("near.toml", config)?;
        let mut command = self.world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
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

/// Fills in one of Envoy's configurations.
pub(super) fn envoy(template: &str, own: &Credentials, peer: &str) -> String {
    let file = |path: &std::path::Path| path.display().to_string();
    [
        ("@PORT@", NEAR_PORT.to_string()),
        ("@GATEWAY@", FAR.ip().to_string()),
        ("@GATEWAY_PORT@", FAR.port().to_string()),
        ("@CERT@", file(&own.cert)),
        ("@KEY@", file(&own.key)),
        ("@CA@", file(&own.ca)),
        ("@PEER@", peer.to_owned()),
    ]
    .into_iter()
    .fold(template.to_owned(), |text, (place, value)| text.replace(place, &value))
}
