//! How long a peer that answers nothing is waited for.

use std::net::SocketAddr;

use anyhow::Result;
use nix::sys::signal::Signal;
use tunnel_tests::{NET4, Running, TARGET4, World, daemon::Daemon, dialogue::ask, pki::GATEWAY_ID, target};

/// A gateway whose listener has these keys too.
fn gateway(world: &World, port: u16, keys: &str) -> Result<Daemon> {
    let config = format!(
        "{}[[listener]]\naddress = \"{}\"\n{keys}\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml(),
        SocketAddr::new(NET4, port)
    );
    Daemon::start(world, world.net(), &config)
}

/// An application with one flow through the gateway at this port.
fn held(world: &World, port: u16, target: SocketAddr) -> Result<Running> {
    let config = format!(
        "{}[[route]]\nto = [{{ upstream = \"next\" }}]\n[[upstream]]\nname = \"next\"\nendpoints = [\"{}\"]\n\
         verify = [\"{GATEWAY_ID}\"]\n",
        world.pki().named("node").toml(),
        SocketAddr::new(NET4, port)
    );
    let config = world.file(&format!("agent-{port}.toml"), config)?;
    let mut app = world.exec_with(&config).spawn_app(&["hold", &target.to_string()])?;
    app.says("held=1")?;
    assert_eq!(ask(app.process(), "ping")?, "ok");
    Ok(app)
}

/// The flows of an agent that is stopped end when its PING has gone unanswered for `keepalive_timeout`, and live on where
/// the listener waits longer than it is stopped.
///
/// Failure: connection-lost.
#[test]
fn an_agent_that_is_suspended_keeps_its_flows_for_as_long_as_the_listener_waits() -> Result<()> {
    let world = World::new()?;
    let mut hasty = gateway(&world, 15031, "keepalive_interval = \"200ms\"\nkeepalive_timeout = \"300ms\"")?;
    let _patient = gateway(&world, 15032, "keepalive_interval = \"200ms\"\nkeepalive_timeout = \"10m\"")?;
    let target = world.serve(TARGET4, target::echo())?;
    let mut of_hasty = held(&world, 15031, target.addr())?;
    let mut of_patient = held(&world, 15032, target.addr())?;
    for app in [&mut of_hasty, &mut of_patient] {
        app.process().signal(Signal::SIGSTOP)?;
    }
    hasty.process().wait_for_line("no answer to PING")?;
    for app in [&mut of_hasty, &mut of_patient] {
        app.process().signal(Signal::SIGCONT)?;
    }
    assert_eq!(ask(of_patient.process(), "ping")?, "ok");
    assert_ne!(ask(of_hasty.process(), "ping")?, "ok");
    for app in [of_hasty, of_patient] {
        app.finish()?;
    }
    Ok(())
}
