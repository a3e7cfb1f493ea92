//! Detects a peer that floods its connection: what it sends besides content is weighed against the work that it serves, as over
//! HTTP/2 (`transport::http2::flood`). QUIC's frames are read by quinn, which counts them.
//!
//! # Invariants
//! - Content costs nothing: windows bound it.
//! - A peer that does what it was connected for never runs out: what our frames and a second add is more than what any client
//!   sends for them.

use std::time::Duration;

use quinn::ConnectionStats;
use tokio::time::Instant;

/// What a connection begins with, and has at most, and what a second adds: the same as over HTTP/2.
const BALANCE_MAX: i64 = 2000;
const PER_SECOND: i64 = 200;
/// What a frame of ours with content adds: the peer may reset its stream, and give room for more, twice.
const FRAME_CREDIT: i64 = 3;
/// What as many bytes of ours add besides.
const BYTES_PER_CREDIT: u64 = 1024;
/// Acknowledgements beyond two for each of our datagrams: so many cost as much as another frame.
const ACKS_PER_COST: i64 = 8;
/// How often a connection is looked at: where many datagrams come, and where few do.
const LOOK_MIN: Duration = Duration::from_millis(250);
const LOOK_MAX: Duration = Duration::from_secs(4);
/// Many, between two looks.
const MANY: i64 = 50;

/// What the peer may send.
const KINDS: [&str; 11] = [
    "PING",
    "RESET_STREAM",
    "unanswerable request",
    "MAX_DATA",
    "MAX_STREAM_DATA",
    "MAX_STREAMS",
    "BLOCKED",
    "CONNECTION_ID",
    "PATH_CHALLENGE",
    "CRYPTO",
    "ACK",
];

/// See the module.
#[derive(Debug)]
pub struct FloodDetector {
    received: [i64; KINDS.len()],
    sent: i64,
    datagrams: i64,
    balance: i64,
    at: Instant,
    wait: Duration,
}

impl FloodDetector {
    /// Of a connection from now on.
    pub fn new(stats: &ConnectionStats) -> Self {
        Self {
            received: received(stats, 0),
            sent: credit(stats),
            datagrams: signed(stats.udp_rx.datagrams),
            balance: BALANCE_MAX,
            at: Instant::now(),
            wait: LOOK_MIN,
        }
    }

    /// When it is to be looked at again, if nothing else happens.
    pub fn next(&self) -> Instant {
        self.at + self.wait
    }

    /// What the peer floods us with, if it does. `wasted` are its streams so far that brought no request.
    pub fn look(&mut self, stats: &ConnectionStats, wasted: u64) -> Option<&'static str> {
        let (now, received, sent) = (Instant::now(), received(stats, wasted), credit(stats));
        let millis = i64::try_from((now - self.at).as_millis()).unwrap_or(i64::MAX);
        let mut costs: [i64; KINDS.len()] = std::array::from_fn(|i| received[i] - self.received[i]);
        let [.., acks] = &mut costs;
        *acks = (*acks).max(0) / ACKS_PER_COST;
        let credit = (sent - self.sent).saturating_add(millis.saturating_mul(PER_SECOND) / 1000);
        // What is paid for may come before it, or behind.
        self.balance =
            self.balance.saturating_add(credit).saturating_sub(costs.iter().sum()).min(BALANCE_MAX);
        let datagrams = signed(stats.udp_rx.datagrams);
        self.wait = if datagrams - self.datagrams >= MANY { LOOK_MIN } else { (self.wait * 2).min(LOOK_MAX) };
        (self.received, self.sent, self.datagrams, self.at) = (received, sent, datagrams, now);
        let most = costs.iter().zip(KINDS).max_by_key(|(cost, _)| **cost).map(|(_, kind)| kind);
        most.filter(|_| self.balance < 0)
    }
}

/// Frames of each kind that have come; of acknowledgements those that nothing of ours explains.
fn received(stats: &ConnectionStats, wasted: u64) -> [i64; KINDS.len()] {
    let frames = &stats.frame_rx;
    [
        frames.ping,
        // A client that has gone resets both directions.
        frames.reset_stream.max(frames.stop_sending),
        wasted,
        frames.max_data,
        frames.max_stream_data,
        frames.max_streams_bidi + frames.max_streams_uni,
        frames.data_blocked
            + frames.stream_data_blocked
            + frames.streams_blocked_bidi
            + frames.streams_blocked_uni,
        frames.new_connection_id + frames.retire_connection_id,
        frames.path_challenge + frames.path_response,
        frames.crypto,
        frames.acks,
    ]
    .map(signed)
    .map_last(|acks| acks - 2 * signed(stats.udp_tx.datagrams))
}

/// What our frames and bytes have added so far: content, and room that we gave, of which a peer may say that it waits for it.
fn credit(stats: &ConnectionStats) -> i64 {
    let frames = &stats.frame_tx;
    signed(frames.stream) * FRAME_CREDIT
        + signed(stats.udp_tx.bytes / BYTES_PER_CREDIT)
        + signed(frames.max_data + frames.max_stream_data)
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

trait MapLast {
    fn map_last(self, f: impl FnOnce(i64) -> i64) -> Self;
}

impl<const N: usize> MapLast for [i64; N] {
    fn map_last(mut self, f: impl FnOnce(i64) -> i64) -> Self {
        if let Some(last) = self.last_mut() {
            *last = f(*last);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Counts = fn(&mut ConnectionStats) -> &mut u64;

    #[tokio::test(start_paused = true)]
    async fn frames_without_work_run_out_and_are_named() {
        let kinds: [(&str, Counts); 6] = [
            ("PING", |s| &mut s.frame_rx.ping),
            ("RESET_STREAM", |s| &mut s.frame_rx.reset_stream),
            ("MAX_DATA", |s| &mut s.frame_rx.max_data),
            ("BLOCKED", |s| &mut s.frame_rx.stream_data_blocked),
            ("CONNECTION_ID", |s| &mut s.frame_rx.retire_connection_id),
            ("ACK", |s| &mut s.frame_rx.acks),
        ];
        for (kind, counts) in kinds {
            let mut stats = ConnectionStats::default();
            let mut flood = FloodDetector::new(&stats);
            *counts(&mut stats) += 2000;
            assert_eq!(flood.look(&stats, 0), None, "{kind}");
            let mut found = None;
            for _ in 0..10 {
                tokio::time::advance(Duration::from_millis(100)).await;
                *counts(&mut stats) += 2000;
                found = found.or(flood.look(&stats, 0));
            }
            assert_eq!(found, Some(kind));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_goes_with_work_never_runs_out() {
        let mut stats = ConnectionStats::default();
        let mut flood = FloodDetector::new(&stats);
        for _ in 0..1000 {
            tokio::time::advance(flood.next() - Instant::now()).await;
            // Requests that are reset in both directions as soon as they are answered.
            stats.frame_tx.stream += 1000;
            stats.frame_rx.reset_stream += 1000;
            stats.frame_rx.stop_sending += 1000;
            // What is sent is acknowledged, each datagram twice, and each 4 KiB give room for more, twice.
            stats.udp_tx.datagrams += 1000;
            stats.udp_tx.bytes += 1000 * 1400;
            stats.frame_rx.acks += 2000;
            stats.frame_rx.max_stream_data += 340;
            stats.frame_rx.max_data += 340;
            // What comes waits for room.
            stats.frame_tx.max_data += 100;
            stats.frame_rx.data_blocked += 100;
            // A PING every 10 ms.
            stats.frame_rx.ping += 25;
            stats.udp_rx.datagrams += 3000;
            assert_eq!(flood.look(&stats, 0), None);
        }
    }
}
