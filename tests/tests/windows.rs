//! Windows of HTTP/2 are as large as the way is long, and no larger than their bounds.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use tokio::{net::TcpStream, task::spawn_local};
use tokio_rustls::TlsConnector;
use tunnel_tests::{NET4, Profile, TARGET4, World, gateway, peer, stopped, target};

/// What daemons log when they give streams another window.
const GROWN: &str = "stream window changed";

/// 1 MiB in each round trip, which is the first window, takes 2 s for this; a window that doubles is there long before.
const BYTES: u64 = 32 << 20;

/// Over a link with a large bandwidth-delay product the windows of both directions grow.
#[test]
fn heavy_over_a_long_link_the_windows_of_both_directions_grow() -> Result<()> {
    let world = World::with_link(Profile::delay(Duration::from_millis(30)))?;
    let gateway = world.gateway().flag("--workers", "1").start()?;
    let target = world.serve(TARGET4, target::duplex(BYTES))?;
    let exec = world.exec(&gateway).flag("--workers", "1").flag("--log", gateway::LOG);
    let done = exec.run_app(&["duplex", &target.addr().to_string(), &BYTES.to_string()])?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    assert!(gateway.log().contains(GROWN), "up: {}", gateway.log());
    assert!(done.stderr.contains(GROWN), "down: {done}");
    Ok(())
}

/// A peer that offers large windows, has taken much, and then reads no more of its socket: what it has not been sent
/// waits with those who have it, not in front of everybody else's bytes in the kernel.
///
/// Failure: misbehaviour.
#[test]
fn heavy_little_waits_in_the_kernel_for_a_peer_that_offers_large_windows_and_does_not_read() -> Result<()> {
    const MIB: u64 = 1 << 20;
    const OFFERED: u64 = 128 * MIB;
    const READ: u64 = 64 * MIB;
    /// What the gateway lets the kernel take, and a write, as it counts whole buffers.
    const UNSENT_MAX: u64 = 512 * 1024;
    let world = World::new()?;
    let gateway = world.gateway().flag("--workers", "1").start()?;
    let taken = Arc::new(AtomicU64::new(0));
    let source = world.serve(TARGET4, target::offer(OFFERED, &taken))?;
    let (addr, to) = (gateway.addr(), source.addr().to_string());
    let config = peer::tls(&world.pki().named("node"))?;
    let sockets = world.node().block_on(|| async {
        let name = rustls_pki_types::ServerName::IpAddress(NET4.into());
        let stream = TlsConnector::from(config).connect(name, TcpStream::connect(addr).await?).await?;
        let window = u32::try_from(16 * MIB)?;
        let (mut requests, connection) = h2::client::Builder::new()
            .initial_window_size(window)
            .initial_connection_window_size(window)
            .handshake::<_, Bytes>(stream)
            .await?;
        let driving = spawn_local(connection);
        let (response, _send) = requests.send_request(peer::connect_request(&to)?, false)?;
        let mut body = response.await?.into_body();
        let mut read = 0;
        while read < READ {
            let chunk = body.data().await.context("it ended")??;
            read += chunk.len() as u64;
            body.flow_control().release_capacity(chunk.len())?;
        }
        // From here on nobody reads the socket, which stays.
        let _held = driving;
        stopped(&taken)?;
        world.net().sockets()
    })?;
    let of_gateway = sockets.iter().filter(|s| s.established() && s.local.port() == gateway::PORT);
    let waiting = of_gateway.map(|s| s.send_queue).max().context("the connection is gone")?;
    println!("{waiting} bytes wait in the kernel, of {} taken", taken.load(Ordering::Relaxed));
    assert!(waiting <= UNSENT_MAX, "{waiting} bytes wait in the kernel");
    Ok(())
}
