//! Detects an HTTP/2 peer that floods its connection: control frames are weighed against the work that they serve.
//!
//! Every connection has a balance. A frame that moves nothing by itself takes from it; a request, DATA that we send, and time
//! add to it. So a peer may send what goes with its work, and some more, and one that only makes us work runs out.
//!
//! # Invariants
//! - DATA that carries something costs nothing: windows bound it, and [turns](crate::transport::turn) do.
//! - A peer that is within the rules of the protocol and does what it was connected for never runs out: what a request, a
//!   frame of ours and a second add is more than what any client sends for them.

use std::{cell::Cell, time::Duration};

use tokio::time::Instant;

use super::frames::{CONTINUATION, DATA, END_STREAM, Frame, HEADERS, PADDED, RST_STREAM, SETTINGS};

/// What a connection begins with, and has at most. nghttp2 allows 1,000 frames (`stream_reset_burst`, `max_outbound_ack`), as
/// does Envoy (`max_outbound_control_frames`).
pub(super) const BALANCE_MAX: i64 = 2000;
/// What a second adds. A peer that measures its round trip with a PING every 10 ms takes half of it.
pub(super) const PER_SECOND_CREDIT: i64 = 200;
/// What a request adds that was taken up: its HEADERS of 16 KiB.
const REQUEST_CREDIT: i64 = 18;
/// What its answer adds, and a reset takes: whoever waits for the answers may reset every stream, and who does not has as many
/// resets as [`BALANCE_MAX`] allows (CVE-2023-44487).
const ANSWER_CREDIT: i64 = 20;
/// What a DATA frame of ours adds: a WINDOW_UPDATE for the stream, one for the connection, a PING that measures.
pub(super) const FRAME_CREDIT: i64 = 3;
/// What as many bytes in it add besides: clients that read 4 KiB at a time give each 4 KiB back, twice.
const BYTES_PER_CREDIT: u32 = 1024;
/// Bytes of a header block that cost as much as a frame.
const HEADER_BYTES: u32 = 1024;
/// SETTINGS may change the window of every stream: so many cost as much as a frame.
const STREAMS_PER_COST: i64 = 8;

/// See the module.
#[derive(Debug)]
pub struct FloodDetector {
    balance: Cell<i64>,
    since: Cell<Option<Instant>>,
    /// The type of the frame that was one too many.
    detected: Cell<Option<u8>>,
}

impl Default for FloodDetector {
    fn default() -> Self {
        Self { balance: Cell::new(BALANCE_MAX), since: Cell::default(), detected: Cell::default() }
    }
}

impl FloodDetector {
    /// Adds what time has added.
    pub(super) fn tick(&self, now: Instant) {
        let Some(since) = self.since.get() else { return self.since.set(Some(now)) };
        let passed = now.saturating_duration_since(since);
        let credit =
            i64::try_from(passed.as_millis()).unwrap_or(i64::MAX).saturating_mul(PER_SECOND_CREDIT) / 1000;
        if credit > 0 {
            self.add(credit);
            // What is less than one counts later.
            let counted = credit.saturating_mul(1000) / PER_SECOND_CREDIT;
            self.since.set(Some(since + Duration::from_millis(counted.unsigned_abs())));
        }
    }

    /// A frame has come, while there are so many streams.
    pub(super) fn received(&self, frame: Frame, streams: u32) {
        let cost = match frame.kind {
            DATA if frame.flags & END_STREAM != 0 || frame.length > 0 && frame.flags & PADDED == 0 => return,
            HEADERS | CONTINUATION => 1 + i64::from(frame.length / HEADER_BYTES),
            RST_STREAM => ANSWER_CREDIT,
            SETTINGS => 1 + i64::from(streams) / STREAMS_PER_COST,
            _ => 1,
        };
        let left = self.balance.get() - cost;
        self.balance.set(left);
        if left < 0 && self.detected.get().is_none() {
            self.detected.set(Some(frame.kind));
        }
    }

    /// A frame of ours leaves. Our HEADERS are an answer to the peer, or a request that it will answer, and may reset.
    pub(super) fn sent(&self, frame: Frame) {
        match frame.kind {
            DATA => self.add(FRAME_CREDIT + i64::from(frame.length / BYTES_PER_CREDIT)),
            HEADERS => self.add(ANSWER_CREDIT),
            _ => {}
        }
    }

    /// A request of the peer's was taken up.
    pub fn took_request(&self) {
        self.add(REQUEST_CREDIT);
    }

    fn add(&self, credit: i64) {
        self.balance.set(self.balance.get().saturating_add(credit).min(BALANCE_MAX));
    }

    /// What the peer floods us with, if it does.
    pub fn detected(&self) -> Option<&'static str> {
        const NAMES: [&str; 10] = [
            "DATA",
            "HEADERS",
            "PRIORITY",
            "RST_STREAM",
            "SETTINGS",
            "PUSH_PROMISE",
            "PING",
            "GOAWAY",
            "WINDOW_UPDATE",
            "CONTINUATION",
        ];
        Some(NAMES.get(usize::from(self.detected.get()?)).unwrap_or(&"unknown"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW_UPDATE: u8 = 8;

    fn frame(kind: u8, length: u32, flags: u8) -> Frame {
        Frame { length, kind, flags }
    }

    #[test]
    fn control_frames_without_work_run_out_and_are_named() {
        for (kind, length, streams, most) in [
            (WINDOW_UPDATE, 4, 200, 2000),
            (6, 8, 0, 2000),
            (11, 0, 0, 2000),
            (SETTINGS, 6, 200, 77),
            (HEADERS, 16 * 1024, 0, 118),
            (RST_STREAM, 4, 0, 100),
            (DATA, 0, 10, 2000),
        ] {
            let flood = FloodDetector::default();
            for sent in 0.. {
                assert!(sent <= most + 1, "{kind}: {sent}");
                if flood.detected().is_some() {
                    break;
                }
                flood.received(frame(kind, length, 0), streams);
            }
            let name = flood.detected().unwrap();
            assert_eq!(name == "unknown", kind == 11, "{name}");
        }
    }

    #[test]
    fn what_goes_with_work_never_runs_out() {
        let flood = FloodDetector::default();
        for _ in 0..100_000 {
            // Requests that are reset as soon as they are answered.
            flood.received(frame(HEADERS, 60, 0), 1);
            flood.took_request();
            flood.sent(frame(HEADERS, 10, 0));
            flood.received(frame(RST_STREAM, 4, 0), 1);
            // Messages of one byte, both ways, each with two WINDOW_UPDATEs.
            flood.received(frame(DATA, 1, 0), 1);
            flood.sent(frame(DATA, 1, 0));
            flood.received(frame(WINDOW_UPDATE, 4, 0), 1);
            flood.received(frame(WINDOW_UPDATE, 4, 0), 1);
        }
        // Bulk, of which each 4 KiB is given back twice.
        for _ in 0..100_000 {
            flood.sent(frame(DATA, 16 * 1024, 0));
            for _ in 0..8 {
                flood.received(frame(WINDOW_UPDATE, 4, 0), 1);
            }
        }
        // A PING every 10 ms, for an hour.
        let start = Instant::now();
        for i in 0..360_000 {
            flood.tick(start + Duration::from_millis(10 * i));
            flood.received(frame(6, 8, 0), 1);
        }
        assert_eq!(flood.detected(), None);
    }
}
