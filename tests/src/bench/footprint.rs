//! What the program takes before it carries anything: its size, the time of `exec -- true`, the memory of daemons.
//!
//! # Invariants
//! - `exec -- true` is measured whole, from its start until it is waited for, with one run before that is not counted.

use std::{fs, process::Command, time::Instant};

use anyhow::{Context as _, Result, ensure};

use super::model::Footprint;
use crate::{process::output, programs, world::World};

/// How often `exec -- true` is run.
const RUNS: usize = 15;

/// Measures it on hosts of its own.
pub(super) fn measure() -> Result<Footprint> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    Ok(Footprint {
        stripped: stripped(&world)?,
        exec_ms: exec(&world, &gateway)?,
        gateway: gateway.process().memory()?,
    })
}

/// Bytes of the program without symbols.
fn stripped(world: &World) -> Result<u64> {
    let copy = world.folder().join("stripped");
    output(Command::new("strip").arg("-o").arg(&copy).arg(programs::tunnel()?))?;
    Ok(fs::metadata(&copy)?.len())
}

fn exec(world: &World, gateway: &crate::Gateway<'_>) -> Result<Vec<f64>> {
    let exec = world.exec(gateway);
    let once = || {
        let mut command = exec.command(&["true"])?;
        let began = Instant::now();
        let ended = command.output().context("tunnel exec")?;
        let took = began.elapsed().as_secs_f64() * 1e3;
        ensure!(ended.status.success(), "tunnel exec -- true: {}", String::from_utf8_lossy(&ended.stderr));
        Ok(took)
    };
    once()?;
    let mut times = (0..RUNS).map(|_| once()).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times)
}
