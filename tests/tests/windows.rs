//! Windows of HTTP/2 are as large as the way is long, and no larger than their bounds.

use std::time::Duration;

use anyhow::Result;
use tunnel_tests::{Profile, TARGET4, World, target};

/// What daemons log when they give streams another window.
const GROWN: &str = "streams have another window";

/// 1 MiB in each round trip, which is the first window, takes 2 s for this; a window that doubles is there long before.
const BYTES: u64 = 32 << 20;

#[test]
fn heavy_over_a_long_link_the_windows_of_both_directions_grow() -> Result<()> {
    let world = World::with_link(Profile::delay(Duration::from_millis(30)))?;
    let gateway = world.gateway().flag("--workers", "1").start()?;
    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let exec = world.exec(&gateway).flag("--workers", "1");
    let done = exec.run_app(&["duplex", &target.addr().to_string(), &BYTES.to_string()])?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    assert!(gateway.log().contains(GROWN), "up: {}", gateway.log());
    assert!(done.stderr.contains(GROWN), "down: {done}");
    Ok(())
}
