//! Buffers for TLS records in transit.
//!
//! A returned buffer is the next one taken, so it is warm. It is not cleared: its contents were, or will be, on the wire of this
//! process. An idle connection holds none.

use std::{cell::RefCell, ops::Range};

use super::{ASIDE, SEALED_MAX};

/// Eight records of ours: two DATA frames of 64 KiB. With four the other side is woken twice as often: of 25 pairs of runs in
/// bulk, eight moved 1.03 × as much at the median.
const SIZE: usize = 8 * SEALED_MAX + ASIDE;
/// Kept for the next ones, of each thread. Within one turn of a worker's loop only the connections whose socket is full,
/// or whose record is not whole, hold one.
const SPARE_MAX: usize = 16;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes between `start` and `end`.
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// An empty one.
    pub(super) fn take() -> Self {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        Self { bytes: spare.unwrap_or_else(|| vec![0; SIZE].into()), start: 0, end: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn filled_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    /// Where more can be put behind what is there.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// Moves what is there to the front: all the room there is lies behind it.
    pub(super) fn compact(&mut self) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    /// `n` bytes were put into the room.
    pub(super) fn filled_by(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.end <= self.bytes.len(), "more than there was room for");
    }

    /// Forgets the first `n` bytes.
    pub(super) fn advance(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end, "more than there was");
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Where in the buffer a part of what is there lies, so that the rest can go on.
    pub(super) fn place(&self, part: Range<usize>) -> Range<usize> {
        self.start + part.start..self.start + part.end
    }

    /// What lies there.
    pub(super) fn at(&self, place: Range<usize>) -> &[u8] {
        &self.bytes[place]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        // A thread that ends has none left to keep it for.
        let _ended = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < SPARE_MAX {
                spare.push(bytes);
            }
        });
    }
}
