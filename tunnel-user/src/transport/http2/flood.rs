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

use super::frames::{
    CONTINUATION, DATA, END_STREAM, Frame, HEADERS, PADDED, RST_STREAM, SETTINGS, WINDOW_UPDATE,
};

/// What a connection begins with, and has at most. nghttp2 allows 1,000 frames (`stream_reset_burst`, `max_outbound_ack`), as
/// does Envoy (`max_outbound_control_frames`).
pub(super) const BALANCE_MAX: i64 = 2000;
/// What a second adds. A peer that measures its round trip with a PING every 10 ms takes half of it.
pub(super) const PER_SECOND_CREDIT: i64 = 200;
/// The most a request adds that was taken up, which is what its HEADERS took: those of 16 KiB.
const REQUEST_CREDIT: i64 = 18;
/// What its answer adds, and a reset takes of a stream that was no request: whoever waits for the answers may reset every
/// stream, and who does not, as many as [`BALANCE_MAX`] allows, all at once too (CVE-2023-44487).
const ANSWER_CREDIT: i64 = 20;
/// What a DATA frame of ours adds: a WINDOW_UPDATE for the stream, one for the connection, a PING that measures.
pub(super) const FRAME_CREDIT: i64 = 3;
/// What as many bytes in it add besides: clients that read 4 KiB at a time give each 4 KiB back, twice.
const BYTES_PER_CREDIT: u32 = 1024;
/// Bytes of a header block that cost as much as a frame.
const HEADER_BYTES: u32 = 1024;
/// SETTINGS may change the window of every stream: so many cost as much as a frame.
const STREAMS_PER_COST: i64 = 8;
/// WINDOW_UPDATEs that DATA of ours has paid for and that have not come, at most: a peer may read 256 MiB late.
const RETURNS_MAX: i64 = 1 << 18;
/// Answers whose streams were not reset yet, at most: all streams may be reset at once.
const ANSWERS_MAX: i64 = 1 << 14;
/// The most padding and the field of its length take (RFC 9113 section 6.1): a longer frame carries something.
const PAD_MAX: u32 = 256;
/// The flag of SETTINGS that acknowledges ours.
const ACK: u8 = 1;

/// See the module.
#[derive(Debug)]
pub struct FloodDetector {
    balance: Cell<i64>,
    /// What is paid for and may come late: WINDOW_UPDATEs, and resets of answered streams. Not in the balance, whose bound
    /// would forget it.
    returns: Cell<i64>,
    answers: Cell<i64>,
    /// Requests that were taken up and not reset.
    requests: Cell<i64>,
    /// What HEADERS have taken since the last request.
    heads: Cell<i64>,
    since: Cell<Option<Instant>>,
    /// The type of the frame that was one too many.
    detected: Cell<Option<u8>>,
}

impl Default for FloodDetector {
    fn default() -> Self {
        Self {
            balance: Cell::new(BALANCE_MAX),
            returns: Cell::default(),
            answers: Cell::default(),
            requests: Cell::default(),
            heads: Cell::default(),
            since: Cell::default(),
            detected: Cell::default(),
        }
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
            DATA if frame.length > PAD_MAX => return,
            HEADERS | CONTINUATION => 1 + i64::from(frame.length / HEADER_BYTES),
            RST_STREAM if paid(&self.answers) => return,
            RST_STREAM if paid(&self.requests) => 1,
            RST_STREAM => ANSWER_CREDIT,
            // h2 ends the connection for one that acknowledges nothing.
            SETTINGS if frame.flags & ACK != 0 => return,
            SETTINGS => 1 + i64::from(streams) / STREAMS_PER_COST,
            WINDOW_UPDATE if paid(&self.returns) => return,
            _ => 1,
        };
        if matches!(frame.kind, HEADERS | CONTINUATION) {
            self.heads.set(self.heads.get() + cost);
        }
        let left = self.balance.get() - cost;
        self.balance.set(left);
        if left < 0 && self.detected.get().is_none() {
            self.detected.set(Some(frame.kind));
        }
    }

    /// A frame of ours leaves. Our HEADERS are an answer to the peer, or a request that it will answer, and may reset.
    pub(super) fn sent(&self, frame: Frame) {
        match frame.kind {
            DATA => {
                let credit = FRAME_CREDIT + i64::from(frame.length / BYTES_PER_CREDIT);
                self.returns.set((self.returns.get() + credit).min(RETURNS_MAX));
                self.add(credit);
            }
            HEADERS => {
                self.answers.set((self.answers.get() + 1).min(ANSWERS_MAX));
                self.add(ANSWER_CREDIT);
            }
            _ => {}
        }
    }

    /// A request of the peer's was taken up.
    pub fn took_request(&self) {
        self.requests.set((self.requests.get() + 1).min(ANSWERS_MAX));
        self.add(self.heads.take().min(REQUEST_CREDIT));
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

/// Takes one of what was paid for, if there is one.
fn paid(left: &Cell<i64>) -> bool {
    let before = left.get();
    left.set((before - 1).max(0));
    before > 0
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn requests_that_nobody_waits_for_run_out_one_by_one_and_all_at_once() {
        for at_once in [1, 500] {
            let flood = FloodDetector::default();
            let mut reset = 0;
            while flood.detected().is_none() {
                for _ in 0..at_once {
                    flood.received(frame(HEADERS, 60, 0), at_once);
                    flood.took_request();
                }
                (0..at_once).for_each(|_| flood.received(frame(RST_STREAM, 4, 0), at_once));
                reset += i64::from(at_once);
            }
            assert!((BALANCE_MAX..=BALANCE_MAX + 500).contains(&reset), "{at_once} at once: {reset}");
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
        // All streams are answered, and reset together.
        (0..1000).for_each(|_| flood.sent(frame(HEADERS, 10, 0)));
        (0..1000).for_each(|_| flood.received(frame(RST_STREAM, 4, 0), 1000));
        // 32 MiB are sent ahead, and read late, in pieces of 4 KiB.
        (0..2048).for_each(|_| flood.sent(frame(DATA, 16 * 1024, 0)));
        (0..16_384).for_each(|_| flood.received(frame(WINDOW_UPDATE, 4, 0), 8));
        // A PING every 10 ms, for an hour.
        let start = Instant::now();
        for i in 0..360_000 {
            flood.tick(start + Duration::from_millis(10 * i));
            flood.received(frame(6, 8, 0), 1);
        }
        assert_eq!(flood.detected(), None);
    }
}
