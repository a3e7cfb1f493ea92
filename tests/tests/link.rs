//! A link takes the time it was told to, carries what it was told to, and drops the rest; and the tunnel goes across.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use tunnel_tests::{
    Link, NetNs, Profile, TARGET4, World,
    load::{
        Outcome,
        driver::{Client, Server},
    },
    programs, target,
};

const LEFT: &str = "10.78.0.1/30";
const RIGHT: &str = "10.78.0.2/30";
const RIGHT6: &str = "fd78::2";
const MBIT: u64 = 1_000_000;
/// Some 48 round trips of 20 ms.
const SECOND: Duration = Duration::from_secs(1);
const WARM_UP: Duration = Duration::from_millis(200);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn nanos(nanos: u64) -> Duration {
    Duration::from_nanos(nanos)
}

/// Two hosts and the link between them. The link goes first.
struct Pair {
    link: Link,
    left: NetNs,
    right: NetNs,
    folder: TempDir,
}

impl Pair {
    fn new(profile: Profile) -> Result<Self> {
        let (left, right) = (NetNs::new("left")?, NetNs::new("right")?);
        let link = Link::join(&left, &[LEFT, "fd78::1/64"], &right, &[RIGHT, "fd78::2/64"], profile)?;
        Ok(Self { link, left, right, folder: tempfile::tempdir()? })
    }

    /// Has the left host do something to the right one.
    fn run(&self, to: IpAddr, workload: &str, length: Duration) -> Result<Outcome> {
        let server = Server::start(&self.right, self.folder.path(), to, None)?;
        let command = self.left.command(programs::load()?);
        let folder = self.folder.path();
        let mut client = Client::start(command, folder, server.addr(), workload.parse()?, length, WARM_UP)?;
        client.wait_ready()?;
        let outcome = client.measure()?;
        client.end()?;
        Ok(outcome)
    }

    fn run4(&self, workload: &str, length: Duration) -> Result<Outcome> {
        self.run("10.78.0.2".parse()?, workload, length)
    }
}

/// A simulated link delays a round trip by twice its delay.
#[test]
fn heavy_a_round_trip_takes_the_delay_twice_and_little_more() -> Result<()> {
    let pair = Pair::new(Profile::delay(millis(10)))?;
    for to in ["10.78.0.2", RIGHT6] {
        let outcome = pair.run(to.parse()?, "ping-pong:64", SECOND)?;
        let latency = outcome.latency.context("no latency")?;
        println!("{to}: {:?} (50 %), {:?} (99 %)", nanos(latency.p50), nanos(latency.p99));
        let fastest = latency.curve.first().context("no curve")?.1;
        // To the digits of the histogram.
        assert!(nanos(fastest) >= millis(20) - millis(20) / 1000, "{to}: {latency:?}");
        // The median is the promise where both ends run at once; on a machine that has something else to do, two
        // processes wait for it four times per round trip, and the link is what the fastest tenth shows.
        let tenth = latency.curve.iter().find(|(quantile, _)| *quantile >= 0.1).context("no curve")?.1;
        assert!(nanos(tenth) < millis(22), "{to}: {latency:?}");
    }
    let counts = pair.link.counts();
    assert!(
        counts.iter().all(|way| way.packets > 100 && way.bytes > 10_000 && way.dropped == 0),
        "{counts:?}"
    );
    Ok(())
}

/// A simulated link of 100 Mbit/s carries 85 to 100 Mbit/s of payload.
#[test]
fn heavy_a_link_of_100_mbit_carries_85_to_100_mbit_of_payload() -> Result<()> {
    let pair = Pair::new(Profile::delay(millis(10)).rate(100 * MBIT))?;
    for workload in ["up:1", "down:1", "down:4"] {
        let outcome = pair.run4(workload, 3 * SECOND)?;
        let bits = 8.0 * (outcome.bytes_up + outcome.bytes_down) as f64 / outcome.seconds;
        println!("{workload}: {bits:.0} bit/s, {:?}", pair.link.counts());
        assert!((85e6..100e6).contains(&bits), "{workload}: {bits:.0} bit/s, {:?}", pair.link.counts());
    }
    Ok(())
}

/// A simulated link drops what its queue cannot hold, and TCP recovers it.
#[test]
fn heavy_what_does_not_fit_the_queue_is_dropped_and_tcp_recovers_it() -> Result<()> {
    // Six packets, where a burst of TCP is ten.
    let pair = Pair::new(Profile::delay(millis(5)).rate(50 * MBIT).queue(6 * 1500))?;
    // Every byte is checked: an outcome is all of them.
    let outcome = pair.run4("up:8", 2 * SECOND)?;
    let [up, down] = pair.link.counts();
    println!("{} bytes of payload, up {up:?}, down {down:?}", outcome.bytes_up);
    assert!(up.dropped > 0, "{up:?}");
    assert!(up.bytes > outcome.bytes_up, "{up:?}");
    Ok(())
}

/// Dropping a simulated link removes its devices.
#[test]
fn a_links_devices_are_gone_when_it_drops() -> Result<()> {
    let Pair { link, left, right, .. } = Pair::new(Profile::delay(millis(1)))?;
    let devices = link.devices().map(str::to_owned);
    for (host, device) in [&left, &right].into_iter().zip(&devices) {
        assert!(host.ip("-o link show")?.contains(device.as_str()), "{device}");
    }
    drop(link);
    for (host, device) in [&left, &right].into_iter().zip(&devices) {
        assert!(!host.ip("-o link show")?.contains(device.as_str()), "{device}");
    }
    Ok(())
}

/// Bytes of an application arrive over a link with 20 ms delay.
#[test]
fn an_applications_bytes_cross_a_link_of_20_ms_through_the_tunnel() -> Result<()> {
    let world = World::with_link(Profile::delay(millis(10)))?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::duplex(300_000))?;
    let done = world.exec(&gateway).run_app(&["duplex", &target.addr().to_string(), "300000"])?;
    assert!(done.success(), "{done}");
    assert_eq!(target.outcomes(1)?, [Ok(())]);

    // On a tunnel that stands there is one round trip for CONNECT and its 200, and one for the byte.
    let server = Server::start(world.net(), world.folder(), TARGET4, None)?;
    let command = world.exec(&gateway).command(&[programs::load()?])?;
    let word = "first-byte".parse()?;
    let mut client = Client::start(command, world.folder(), server.addr(), word, SECOND, WARM_UP)?;
    world.note_exec(client.process().id());
    client.wait_ready()?;
    let latency = client.measure()?.latency.context("no latency")?;
    client.end()?;
    println!("time to the first byte: {:?} (50 %), {:?} (99 %)", nanos(latency.p50), nanos(latency.p99));
    assert!(nanos(latency.p50) >= millis(20), "faster than the link: {latency:?}");
    Ok(())
}
