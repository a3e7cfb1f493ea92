//! The traffic of a soak: both directions at once, in random sizes and at random times. Each direction is generated
//! from a seed, and its receiver checks it, whatever pieces it arrives in.
//!
//! A connection begins with two seeds. A frame is a kind, three unused bytes, and a length; [`DATA`] is followed by
//! that many bytes of the direction's pattern. The client's [`GO`] starts the server's sending; its [`STOP`] ends what
//! it sends, and has the server stop too. A stop's length is the number of payload bytes so far, modulo 2³².
//!
//! # Invariants
//! - Every byte of a direction's payload is compared with the expected one, and each stop says how many there were, so
//!   that nothing is lost at the end either.

use std::time::{Duration, SystemTime};

use anyhow::{Result, bail, ensure};

use crate::pattern::Pattern;

/// The seeds at the beginning.
pub(super) const SEEDS: usize = 16;
/// Bytes of a frame in front of its payload.
const HEADER: usize = 8;
/// A frame with payload.
const DATA: u8 = b'd';
/// What has the server send.
const GO: u8 = b'g';
/// What ends a direction for now.
const STOP: u8 = b's';
/// The most that one call is given to read into: more than most frames, less than the longest.
pub(super) const READ_MAX: usize = 64 * 1024;
/// The longest payload: two pipes of the usual size.
const PAYLOAD_MAX: usize = 128 * 1024;

/// What a receiver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// To begin.
    Go,
    /// That nothing more comes for now.
    Stop,
}

/// What one direction's sender knows.
#[derive(Debug)]
pub(super) struct Sender {
    pattern: Pattern,
    sent: u64,
    frame: Vec<u8>,
}

impl Sender {
    pub(super) fn new(seed: u64) -> Self {
        Self { pattern: Pattern(seed), sent: 0, frame: Vec::new() }
    }

    /// Bytes of payload so far.
    pub(super) fn total(&self) -> u64 {
        self.sent
    }

    /// The next frame: most are short, as messages are; some are as long as bulk.
    pub(super) fn frame(&mut self) -> &[u8] {
        let most = match fastrand::u32(..10) {
            _ if chatting() => 256,
            0..5 => 256,
            5..9 => 8 * 1024,
            _ => PAYLOAD_MAX,
        };
        let length = fastrand::usize(1..=most);
        self.frame.resize(HEADER + length, 0);
        self.frame[..HEADER].copy_from_slice(&header(DATA, length as u64));
        self.pattern.fill(self.sent, &mut self.frame[HEADER..]);
        self.sent += length as u64;
        &self.frame
    }

    /// What has the other side send.
    pub(super) fn go(&self) -> [u8; HEADER] {
        header(GO, 0)
    }

    /// What ends this direction for now.
    pub(super) fn stop(&self) -> [u8; HEADER] {
        header(STOP, self.sent)
    }
}

fn header(kind: u8, number: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = kind;
    header[4..].copy_from_slice(&number.to_le_bytes()[..4]);
    header
}

/// How long to wait before the next frame. Mostly not at all; long enough for the other side to fall asleep, and now and
/// then for everything on the way to run dry. Who chats waits each time.
pub(super) fn pause() -> Option<Duration> {
    if chatting() { Some(Duration::from_micros(fastrand::u64(150..600))) } else { read_pause() }
}

/// How long to wait before the next read: now and then until everything on the way is full.
pub(super) fn read_pause() -> Option<Duration> {
    match fastrand::u32(..400) {
        _ if chatting() => None,
        0 => Some(Duration::from_millis(fastrand::u64(5..30))),
        1..16 => Some(Duration::from_micros(fastrand::u64(..1500))),
        _ => None,
    }
}

/// Whether both directions chat, in short messages one by one, or carry what they can. They take turns, on both sides at
/// the same moments, so that paths for the one and the other are gone over to and back all the time.
fn chatting() -> bool {
    const TURN: Duration = Duration::from_millis(400);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (now.as_millis() / TURN.as_millis()).is_multiple_of(2)
}

/// How much the next call reads at most.
pub(super) fn read_size() -> usize {
    if fastrand::bool() { READ_MAX } else { fastrand::usize(1..=READ_MAX) }
}

/// How the next frame is cut into calls: a piece's length.
pub(super) fn cut(length: usize) -> usize {
    if fastrand::u32(..4) == 0 { fastrand::usize(1..=length) } else { length }
}

/// Checks one direction.
#[derive(Debug)]
pub(super) struct Receiver {
    pattern: Pattern,
    received: u64,
    /// Payload of the frame that has begun which has not come yet.
    left: usize,
    head: [u8; HEADER],
    have: usize,
}

impl Receiver {
    pub(super) fn new(seed: u64) -> Self {
        Self { pattern: Pattern(seed), received: 0, left: 0, head: [0; HEADER], have: 0 }
    }

    /// Bytes of payload so far, all of them right.
    pub(super) fn total(&self) -> u64 {
        self.received
    }

    /// Whether nothing has begun that is not whole.
    pub(super) fn between_frames(&self) -> bool {
        self.left == 0 && self.have == 0
    }

    /// Takes what came, to the next word or to the end of it.
    pub(super) fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Word>> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let (now, rest) = bytes.split_at(bytes.len().min(self.left));
                self.pattern.check(self.received, now)?;
                self.received += now.len() as u64;
                (self.left, *bytes) = (self.left - now.len(), rest);
                continue;
            }
            let n = bytes.len().min(HEADER - self.have);
            self.head[self.have..self.have + n].copy_from_slice(&bytes[..n]);
            (self.have, *bytes) = (self.have + n, &bytes[n..]);
            if self.have < HEADER {
                return Ok(None);
            }
            self.have = 0;
            ensure!(self.head[1..4] == [0; 3], "a frame that begins with {:?}", self.head);
            let number = u32::from_le_bytes([self.head[4], self.head[5], self.head[6], self.head[7]]);
            match self.head[0] {
                DATA => {
                    self.left = usize::try_from(number)?;
                    ensure!((1..=PAYLOAD_MAX).contains(&self.left), "a frame of {number} bytes");
                }
                GO => return Ok(Some(Word::Go)),
                STOP => {
                    let sent = header(STOP, self.received);
                    ensure!(
                        self.head == sent,
                        "{} bytes came, and modulo 2^32 {number} were sent",
                        self.received
                    );
                    return Ok(Some(Word::Stop));
                }
                other => bail!("a frame that begins with {other:#04x}, behind {} bytes", self.received),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_taken_in_any_pieces_and_every_wrong_byte_is_found() {
        let mut sender = Sender::new(7);
        let mut wire = Vec::new();
        for _ in 0..50 {
            wire.extend_from_slice(sender.frame());
        }
        wire.extend_from_slice(&sender.stop());
        for size in [1, 7, 4096, wire.len()] {
            let mut receiver = Receiver::new(7);
            let words: Vec<_> =
                wire.chunks(size).filter_map(|mut piece| receiver.take(&mut piece).unwrap()).collect();
            assert_eq!(words, [Word::Stop]);
            assert_eq!(receiver.total(), sender.total());
            assert!(receiver.between_frames());
        }
        for at in [0, 4, HEADER, wire.len() / 2, wire.len() - 1] {
            let mut wrong = wire.clone();
            wrong[at] ^= 1;
            let mut receiver = Receiver::new(7);
            let taken = receiver.take(&mut &wrong[..]);
            // A wrong length may also be the beginning of a frame that never ends.
            assert!(taken.is_err() || taken.is_ok_and(|word| word.is_none()), "at {at}");
            let mut less = wire.clone();
            less.remove(at);
            assert!(!matches!(Receiver::new(7).take(&mut &less[..]), Ok(Some(Word::Stop))), "at {at}");
        }
    }
}
