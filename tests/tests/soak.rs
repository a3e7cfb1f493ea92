//! Both directions of many connections at once, in random sizes and with random pauses, by programs that block and by one
//! that does not: every byte is compared, and no call gives an error that plain TCP would not give.
//!
//! Ten minutes of the same are `cargo xtask bench --hold ours --workload soak:16 --seconds 600`, and with
//! `--scenario relay --hold splice` those of a kernel program. What these seconds a mode do not show, they do: bytes that came
//! twice did so once in some 10 GB.

use std::time::Duration;

use anyhow::Result;
use tunnel_tests::{
    TARGET4,
    amount::amount,
    dmesg::Mark,
    each_mode,
    load::{
        Workload,
        driver::{Client, Server},
    },
    modes::{Mode, Stage},
    programs,
};

/// How long, in seconds, and where tests are thorough; each of several modes takes as long.
const LENGTH: [u64; 2] = [2, 10];
/// More than there are workers, and as many as keep a two-core machine busy with a pause in them.
const SOAK: Workload = Workload::Soak { connections: 8 };

each_mode! {
    /// No byte is lost, altered or repeated in both directions at once, in random sizes, by blocking and non-blocking programs.
    heavy_a_soak_loses_alters_and_repeats_no_byte = soak;
}

fn soak(mode: &Mode) -> Result<()> {
    let (stage, mut kernel) = (Stage::new()?, Mark::now()?);
    let server = Server::start(stage.world.net(), stage.world.folder(), TARGET4, None)?;
    let gateway = stage.gateway(mode)?;
    let mut daemon = stage.daemon(mode, gateway.as_ref())?;
    let command = stage.program(programs::load()?, true)?;
    let length = Duration::from_secs(amount(LENGTH[0], LENGTH[1]));
    let warm_up = Duration::from_secs(1);
    let mut client = Client::start(command, stage.world.folder(), server.addr(), SOAK, length, warm_up)?;
    client.wait_ready()?;
    let outcome = client.measure()?;
    client.end()?;
    let (up, down) = (outcome.bytes_up, outcome.bytes_down);
    println!("{up} bytes up, {down} bytes down in {:.1} s", outcome.seconds);
    // Far below what any machine carries: a soak that carries nothing shows nothing.
    assert!(up > 1 << 20 && down > 1 << 20, "{outcome:?}");
    stage.end(&mut daemon, mode)?;
    assert_eq!(kernel.warnings()?, Vec::<String>::new());
    Ok(())
}
