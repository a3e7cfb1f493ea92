//! The bulk streams of the load generator: blocks that each hold their stream's id and their offset. The receiver
//! checks them, whatever pieces they arrive in.
//!
//! A block is 4,096 bytes: eight made of the stream's id and the block's offset, and then the same filler in every
//! block, so that to make one is to write eight bytes, and to check one is to compare two pieces of memory. Between two
//! blocks there may be a mark: eight bytes that no offset has, and the number of bytes of blocks in front of it.
//!
//! # Invariants
//! - Bytes that are lost, repeated, swapped, altered or of another stream are an error at the block that they are in.
//! - A [`Mark`] is accepted only when everything in front of it has arrived.

use std::{cell::RefCell, future::poll_fn, io, pin::Pin, sync::LazyLock};

use anyhow::{Result, bail, ensure};
use tokio::io::AsyncWrite;

use crate::pattern::Pattern;

/// A block.
pub(super) const BLOCK: usize = 4096;
/// A stamp, and a number.
const WORD: usize = 8;
/// One write: what iperf3 and many servers use would be 128 KiB and 16 KiB.
const CHUNK: usize = 64 * 1024;
/// Offset of a mark: no stream is as long.
const MARK: u64 = u64::MAX;

/// What is in a block behind its stamp.
static FILLER: LazyLock<[u8; BLOCK]> = LazyLock::new(|| {
    let mut block = [0; BLOCK];
    Pattern(3).fill(0, &mut block);
    block
});

thread_local! {
    /// Where all streams of a thread are written from.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(FILLER.repeat(CHUNK / BLOCK).into());
}

/// A stream's name: who makes one chooses it at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(pub(super) u64);

impl Id {
    fn stamp(self, offset: u64) -> u64 {
        // An odd factor, so that no two offsets have the same stamp.
        self.0.wrapping_add(offset.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The mark behind `total` bytes.
    pub(super) fn mark(self, total: u64) -> [u8; 2 * WORD] {
        let mut mark = [0; 2 * WORD];
        mark[..WORD].copy_from_slice(&self.stamp(MARK).to_le_bytes());
        mark[WORD..].copy_from_slice(&total.to_le_bytes());
        mark
    }

    /// Sends some of what belongs at `offset`, at most to the end of a block if `finish`; how much it was.
    pub(super) async fn send(
        self,
        to: &mut (impl AsyncWrite + Unpin),
        offset: u64,
        finish: bool,
    ) -> io::Result<u64> {
        let within = offset % BLOCK as u64;
        let sent = poll_fn(|cx| {
            BUFFER.with_borrow_mut(|buffer| {
                let end = if finish { BLOCK } else { CHUNK };
                let mut at = offset - within;
                for block in buffer[..end].chunks_exact_mut(BLOCK) {
                    block[..WORD].copy_from_slice(&self.stamp(at).to_le_bytes());
                    at += BLOCK as u64;
                }
                // Less than a block.
                let from = usize::try_from(within).unwrap_or_default();
                Pin::new(&mut *to).poll_write(cx, &buffer[from..end])
            })
        });
        sent.await.map(|n| n as u64)
    }
}

/// Everything in front of it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// How many bytes that was, from the stream's beginning.
    pub(super) total: u64,
}

/// Checks a stream.
#[derive(Debug)]
pub(super) struct Check {
    id: Option<Id>,
    /// Bytes of blocks so far.
    total: u64,
    /// Bytes of blocks in front of the last mark.
    marked: Option<u64>,
    /// Words that are not whole yet: a block's stamp; or all of a mark.
    head: [u8; 2 * WORD],
    have: usize,
}

impl Check {
    /// Of a stream with this id; without one, of whichever its first block says.
    pub(super) fn new(id: Option<Id>) -> Self {
        Self { id, total: 0, marked: None, head: [0; 2 * WORD], have: 0 }
    }

    /// Bytes of blocks so far.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Takes what came. A mark is the last of what came: after it, the sender waits.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<Option<Mark>> {
        while !bytes.is_empty() {
            // Less than a block.
            let within = usize::try_from(self.total % BLOCK as u64)?;
            if within != 0 {
                bytes = self.filler(within, bytes)?;
                continue;
            }
            let wanted = if self.marking() { 2 * WORD } else { WORD };
            let n = bytes.len().min(wanted - self.have);
            self.head[self.have..self.have + n].copy_from_slice(&bytes[..n]);
            (self.have, bytes) = (self.have + n, &bytes[n..]);
            if self.have == 2 * WORD {
                ensure!(bytes.is_empty(), "{} bytes behind a mark", bytes.len());
                return self.mark().map(Some);
            }
            if self.have == WORD && !self.marking() {
                self.stamp()?;
            }
        }
        Ok(None)
    }

    /// Fails unless everything is marked, and so the stream may end.
    pub(super) fn ended(&self) -> Result<()> {
        ensure!(
            self.marked == Some(self.total) && self.have == 0,
            "the end after {} bytes, in the middle of a stream",
            self.total
        );
        Ok(())
    }

    /// Whether the head begins with a mark's stamp.
    fn marking(&self) -> bool {
        self.have >= WORD && self.id.is_some_and(|id| self.word(0) == id.stamp(MARK))
    }

    fn word(&self, at: usize) -> u64 {
        self.head[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
    }

    fn stamp(&mut self) -> Result<()> {
        let id = *self.id.get_or_insert(Id(self.word(0)));
        ensure!(self.word(0) == id.stamp(self.total), "a wrong block at offset {} of a stream", self.total);
        self.total += WORD as u64;
        self.have = 0;
        Ok(())
    }

    fn filler<'b>(&mut self, within: usize, bytes: &'b [u8]) -> Result<&'b [u8]> {
        let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - within));
        if now != &FILLER[within..within + now.len()] {
            bail!("a wrong byte in the block at offset {} of a stream", self.total - within as u64);
        }
        self.total += now.len() as u64;
        Ok(rest)
    }

    fn mark(&mut self) -> Result<Mark> {
        let total = self.word(WORD);
        ensure!(total == self.total, "{} bytes came, and {total} were sent", self.total);
        (self.have, self.marked) = (0, Some(total));
        Ok(Mark { total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Id = Id(0x1234_5678_9abc_def0);

    /// Two blocks, a mark, another block, another mark.
    fn parts() -> [Vec<u8>; 2] {
        let block = |number: u64| {
            let mut block = FILLER.to_vec();
            block[..WORD].copy_from_slice(&ID.stamp(number * BLOCK as u64).to_le_bytes());
            block
        };
        let mark = |blocks: u64| ID.mark(blocks * BLOCK as u64).to_vec();
        [[block(0), block(1), mark(2)].concat(), [block(2), mark(3)].concat()]
    }

    fn check(parts: &[Vec<u8>], piece: usize) -> Result<Vec<u64>> {
        let mut check = Check::new(None);
        let mut marks = Vec::new();
        for piece in parts.iter().flat_map(|part| part.chunks(piece)) {
            marks.extend(check.take(piece)?.map(|mark| mark.total / BLOCK as u64));
        }
        check.ended()?;
        Ok(marks)
    }

    #[test]
    fn a_stream_is_right_in_any_pieces() {
        for piece in [1, 7, 8, 15, 4095, 4096, 4097, 100_000] {
            assert_eq!(check(&parts(), piece).unwrap(), [2, 3], "pieces of {piece}");
        }
    }

    #[test]
    fn one_byte_too_few_too_many_or_another_is_found_wherever_it_is() {
        let [first, second] = parts();
        for at in [0, 5, 8, 4095, 4096, 4100, 8191, 8192, 8199, 8200, 8207] {
            let (mut lost, mut twice, mut other) = (first.clone(), first.clone(), first.clone());
            lost.remove(at);
            // Of two bytes that are the same it cannot be said which was there first, nor does it matter.
            twice.insert(at, first[at]);
            other[at] ^= 1;
            for wrong in [lost, twice, other] {
                assert!(check(&[wrong, second.clone()], 1000).is_err(), "byte {at}");
            }
        }
        assert!(check(&[first], 1000).is_ok());
        assert!(check(&[second], 1000).is_err());
    }

    #[test]
    fn another_streams_block_is_found() {
        let [mut first, second] = parts();
        let other = Id(1).stamp(BLOCK as u64);
        first[BLOCK..BLOCK + WORD].copy_from_slice(&other.to_le_bytes());
        assert!(check(&[first, second], 1000).is_err());
    }
}
