//! HTTP/3 over a link that takes its time, while the address of its client changes.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tokio::time::timeout;
use tunnel_tests::{
    NET4, PATIENCE, Profile, TARGET4, World,
    daemon::Daemon,
    gateway,
    h3::{self, Comes, DATA, Peer},
    pattern::DOWN,
    target,
};

const HBONE: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// From one end of the link to the other: long beside what processes wait for their turn on a busy machine.
const DELAY: Duration = Duration::from_millis(50);
/// How often the address changes, after as many bytes each.
const TIMES: u64 = 2;
const BYTES: u64 = 1 << 20;

/// Takes DATA frames apart.
#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    /// What is left of a frame.
    left: u64,
    offset: u64,
}

impl Content {
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        loop {
            if self.left == 0 {
                let Some((kind, first)) = integer(&self.bytes) else { return Ok(()) };
                let Some((length, second)) = integer(&self.bytes[first..]) else { return Ok(()) };
                ensure!(kind == DATA, "a frame of type {kind}");
                self.bytes.drain(..first + second);
                self.left = length;
            }
            let have = self.bytes.len().min(usize::try_from(self.left)?);
            if have == 0 {
                return Ok(());
            }
            DOWN.check(self.offset, &self.bytes[..have])?;
            self.bytes.drain(..have);
            (self.left, self.offset) = (self.left - have as u64, self.offset + have as u64);
        }
    }
}

/// RFC 9000 section 16: its value and its length.
fn integer(bytes: &[u8]) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    let length = 1 << (first >> 6);
    let rest = bytes.get(1..length)?;
    Some((rest.iter().fold(u64::from(first & 0x3f), |n, byte| n << 8 | u64::from(*byte)), length))
}

/// A download over a link of 100 ms there and back goes on when the client's address changes: no byte is lost, and nothing comes
/// for three round trips at most, and as long as processes wait for their turn: what it pauses before, beyond a round trip.
#[test]
fn a_transfer_goes_on_within_three_round_trips_when_the_address_changes() -> Result<()> {
    let world = World::with_link(Profile::delay(DELAY))?;
    let config = format!(
        "[daemon]\nworkers = 2\n{}[[listener]]\naddress = \"{HBONE}\"\nprotocols = [\"h3\"]\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml()
    );
    let _ours = Daemon::start(&world, world.net(), &config)?;
    let bytes = BYTES * (TIMES + 1);
    let target = world.serve(TARGET4, target::offer(bytes, &Arc::new(AtomicU64::new(0))))?;
    let (to, who) = (target.addr().to_string(), world.pki().named("node"));
    let (longest, before) = world.node().block_on(|| async move {
        let peer = Peer::connect(HBONE, &who).await?;
        let (_send, mut recv) = peer.request(&h3::connect(&to), false).await?;
        ensure!(peer.comes(&mut recv).await? == Comes::Status(200));
        let (mut content, mut moved, mut last) = (Content::default(), 0, Instant::now());
        // From a move on until as much as a round trip brings has come.
        let (mut longest, mut before, mut begun) = (Duration::ZERO, Duration::ZERO, None);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read =
                timeout(PATIENCE, recv.read(&mut buffer)).await.context("nothing comes any more")??;
            let now = Instant::now();
            if begun.is_some_and(|at: Instant| now - at < 10 * DELAY) || begun.is_some_and(|at| last <= at) {
                longest = longest.max(now - last);
            } else if begun.is_none() {
                before = before.max(now - last);
            }
            last = now;
            let Some(read) = read else { break };
            content.push(&buffer[..read])?;
            if moved < TIMES && content.offset >= BYTES * (moved + 1) {
                peer.moves()?;
                moved += 1;
                begun = Some(now);
            }
        }
        ensure!(content.offset == bytes && moved == TIMES, "{} bytes", content.offset);
        peer.leaves().await;
        Ok((longest, before))
    })?;
    println!("nothing for {longest:?}, and {before:?} before");
    let waits = before.saturating_sub(2 * DELAY);
    assert!(longest <= 6 * DELAY + waits, "nothing for {longest:?}, and {before:?} before");
    Ok(())
}
