//! The proxy at the other end.

use anyhow::Result;
use nix::sys::signal::Signal;

use super::{Bed, FAR, Far, MAX_FLOWS, Near, near::LOG};
use crate::{
    bench::{model::Role, peers::Peers},
    pki::{GATEWAY_ID, NODE_ID},
    programs,
    world::{NODE4, TARGET4},
};

impl Bed {
    /// Starts it, if this arm has one.
    pub(super) fn far(&mut self, workers: u32, peers: &Peers) -> Result<()> {
        match self.build.far {
            None => Ok(()),
            Some(Far::Ours) => {
                let mut config = format!("[daemon]\nworkers = {workers}\nmax_flows = {MAX_FLOWS}\n");
                config.push_str(&self.world.pki().named("gateway").toml());
                config.push_str(&format!(
                    "[[listener]]\naddress = \"{FAR}\"\nprotocols = [{}]\n[[route]]\nto = \"direct\"\n\
                     [[policy]]\nidentity = [\"{NODE_ID}\"]\ntarget = [\"{TARGET4}/32\"]\n",
                    if self.build.near == Some(Near::OursH3) { "\"h3\", \"h2\"" } else { "\"h2\"" }
                ));
                let config = self.world.file("far.toml", config)?;
                let mut command =
                    self.world.net().command_ended_by(peers.tunnel(&self.build)?, Signal::SIGTERM);
                command.args(["run", "--log", LOG, "--config"]).arg(config);
                self.spawn_listening(Role::Far, "tunnel-far", command, FAR.port())
            }
            Some(Far::Envoy) => {
                let template = include_str!("envoy-far.yaml");
                self.envoy(Role::Far, template, ["gateway", NODE_ID], FAR.port(), workers, peers)
            }
            Some(Far::EnvoyH3) => {
                let template = include_str!("envoy-far-h3.yaml");
                // Over QUIC its clients check that name too.
                self.world.pki().issue("gateway-h3", GATEWAY_ID, &["--dns", "gateway.example.org"])?;
                self.envoy(Role::Far, template, ["gateway-h3", NODE_ID], FAR.port(), workers, peers)
            }
            Some(Far::Tinyproxy) => {
                let config = format!(
                    "Port {}\nListen {}\nTimeout 600\nMaxClients {MAX_FLOWS}\nAllow {NODE4}\nLogLevel Critical\n",
                    FAR.port(),
                    FAR.ip()
                );
                let config = self.world.file("tinyproxy.conf", config)?;
                let mut command = self.world.net().command(programs::system("tinyproxy")?);
                command.arg("-d").arg("-c").arg(config);
                self.spawn_listening(Role::Far, "tinyproxy", command, FAR.port())
            }
        }
    }
}
