//! `tunnel run --takeover`: a new daemon in place of an old one, under load.

use std::path::Path;

use anyhow::Result;
use nix::sys::signal::Signal;
use tunnel_tests::{
    NetNs, PATIENCE, Process, TARGET4, World, bpffs::BpfFs, cgroup::Cgroup, daemon::through, dialogue::ask,
    pki::GATEWAY_ID, programs, target, world::NET4,
};

const PORT: u16 = 15008;

fn daemon(world: &World, host: &NetNs, config: &Path, flags: &[&str]) -> Result<Process> {
    let mut command = host.command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--config"]).arg(config).args(flags);
    Process::spawn("daemon", world.folder(), command)
}

#[test]
fn a_daemon_that_takes_over_refuses_no_connection_and_breaks_no_flow() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let gateway = world.file(
        "gateway.toml",
        format!(
            "[[listener]]\naddress = \"{NET4}:{PORT}\"\n[[route]]\nto = \"direct\"\n\
             [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/16\"]\n{}",
            world.pki().named("gateway").toml()
        ),
    )?;
    let (cgroup, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let agent = world.file(
        "agent.toml",
        format!(
            "[daemon]\n{}{}[[capture]]\ncgroup = \"{}\"\n{}",
            bpffs.toml(),
            world.pki().named("node").toml(),
            cgroup.path().display(),
            through((NET4, PORT).into(), GATEWAY_ID),
        ),
    )?;
    let mut old_gateway = daemon(&world, world.net(), &gateway, &[])?;
    old_gateway.wait_for_line("listening")?;
    let mut old_agent = daemon(&world, world.node(), &agent, &[])?;
    old_agent.wait_for_line("capturing")?;

    let app = |words: &[&str]| -> Result<Process> {
        let mut command = world.node().command(programs::app()?);
        command.args(words).arg(target.addr().to_string());
        cgroup.adopt(&mut command)?;
        Process::spawn_with_input("app", world.folder(), command)
    };
    let mut held = app(&["hold"])?;
    held.wait_for_line("held=1")?;
    assert_eq!(ask(&mut held, "ping")?, "ok");
    let mut busy = app(&["keep-connecting"])?;
    busy.wait_for_line("started=1")?;

    let mut new_agent = daemon(&world, world.node(), &agent, &["--takeover"])?;
    new_agent.wait_for_line("took over")?;
    old_agent.wait_for_line("another daemon has taken over: draining")?;
    let mut new_gateway = daemon(&world, world.net(), &gateway, &["--takeover"])?;
    new_gateway.wait_for_line("took over")?;
    old_gateway.wait_for_line("another daemon has taken over: draining")?;
    // Through both old daemons, which are draining.
    assert_eq!(ask(&mut held, "ping")?, "ok");
    // Through the new agent; the old gateway serves what it took before the agent had heard its GOAWAY.
    let mut late = app(&["hold"])?;
    late.wait_for_line("held=1")?;
    assert_eq!(ask(&mut late, "ping")?, "ok");

    busy.hang_up();
    assert!(busy.wait(PATIENCE)?.success(), "{}", busy.stdout());
    for mut flow in [held, late] {
        flow.hang_up();
        assert!(flow.wait(PATIENCE)?.success());
    }
    // The last flow has ended: the old daemons have nothing left to wait for.
    assert!(old_agent.wait(PATIENCE)?.success());
    assert!(old_gateway.wait(PATIENCE)?.success());
    new_agent.stop()?;
    new_gateway.stop()?;
    Ok(())
}
