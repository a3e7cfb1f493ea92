//! Bytes that were received and not yet sent, in order, as slices for one vectored write. Small chunks are packed together, so
//! that a peer's one-byte frames cost their bytes and not a hundred times that. The window of the leg that fills a queue is its
//! bound.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf as _, Bytes, BytesMut};

/// A chunk below this is copied behind the one before it: cheaper than one more slice in a system call.
const SMALL: usize = 1024;
/// Packed chunks are closed at this size: a TLS record's worth.
const PACKED: usize = 16 * 1024;
/// The most slices one system call takes; what Linux allows is 1024 (UIO_MAXIOV).
const SLICES: usize = 64;

/// Chunks in order: first `chunks`, then what is being packed.
#[derive(Default)]
pub struct Queue {
    chunks: VecDeque<Bytes>,
    packing: BytesMut,
    ended: bool,
}

impl Queue {
    /// Appends.
    pub fn push(&mut self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        let alone = self.chunks.is_empty() && self.packing.is_empty();
        if chunk.len() < SMALL && !alone {
            self.packing.extend_from_slice(&chunk);
            if self.packing.len() >= PACKED {
                self.close();
            }
            return;
        }
        self.close();
        self.chunks.push_back(chunk);
    }

    /// The end comes right behind what is in here.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Puts something in front of all.
    pub fn put_first(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.chunks.push_front(chunk);
        }
    }

    fn close(&mut self) {
        if !self.packing.is_empty() {
            self.chunks.push_back(std::mem::take(&mut self.packing).freeze());
        }
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.packing.is_empty()
    }

    /// Calls `write` with the front of the queue as slices.
    pub fn with_slices<R>(&mut self, write: impl FnOnce(&[IoSlice<'_>]) -> R) -> R {
        self.with_slices_of(usize::MAX, |slices, _| write(slices))
    }

    /// The same with no more than `most` bytes; and `write` is told whether the end comes right behind them.
    pub fn with_slices_of<R>(&mut self, most: usize, write: impl FnOnce(&[IoSlice<'_>], bool) -> R) -> R {
        self.close();
        let (mut slices, mut n, mut left) = ([IoSlice::new(&[]); SLICES], 0, most);
        for (slot, chunk) in slices.iter_mut().zip(&self.chunks) {
            if left == 0 {
                break;
            }
            let part = &chunk[..chunk.len().min(left)];
            *slot = IoSlice::new(part);
            left -= part.len();
            n += 1;
        }
        write(&slices[..n], self.ended && left > 0 && n == self.chunks.len())
    }

    /// Forgets the first `n` bytes.
    pub fn advance(&mut self, mut n: usize) {
        while n > 0
            && let Some(front) = self.chunks.front_mut()
        {
            if front.len() > n {
                front.advance(n);
                return;
            }
            n -= front.len();
            self.chunks.pop_front();
        }
    }

    /// The size of the first chunk.
    pub fn front_len(&mut self) -> usize {
        if self.chunks.is_empty() {
            self.close();
        }
        self.chunks.front().map_or(0, Bytes::len)
    }

    /// Takes at most `n` bytes off the first chunk.
    pub fn take(&mut self, n: usize) -> Bytes {
        match self.chunks.front_mut() {
            Some(front) if front.len() > n => front.split_to(n),
            _ => self.chunks.pop_front().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_leave_as_they_came(
            sizes in proptest::collection::vec(0usize..3000, 0..40),
            steps in proptest::collection::vec(1usize..5000, 1..20),
        ) {
            let mut next = 0u8;
            let mut queue = Queue::default();
            let mut sent = Vec::new();
            let mut wanted = Vec::new();
            let mut steps = steps.iter().cycle();
            for size in sizes {
                let chunk: Vec<u8> = (0..size).map(|_| { next = next.wrapping_add(1); next }).collect();
                wanted.extend_from_slice(&chunk);
                queue.push(chunk.into());
                let step = *steps.next().unwrap();
                if step % 2 == 0 {
                    queue.front_len();
                    sent.extend_from_slice(&queue.take(step));
                } else {
                    let n = queue.with_slices(|s| {
                        let mut left = step;
                        let mut n = 0;
                        for slice in s {
                            let part = slice.len().min(left);
                            sent.extend_from_slice(&slice[..part]);
                            left -= part;
                            n += part;
                        }
                        n
                    });
                    queue.advance(n);
                }
            }
            while !queue.is_empty() {
                queue.front_len();
                sent.extend_from_slice(&queue.take(usize::MAX));
            }
            prop_assert_eq!(sent, wanted);
        }
    }
}
