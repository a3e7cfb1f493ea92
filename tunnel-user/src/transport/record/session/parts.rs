//! The pieces that one write takes its bytes from.

use std::io::IoSlice;

/// Plaintext in several places.
pub(super) struct Parts<'p, 's> {
    parts: &'p [IoSlice<'s>],
    /// Bytes of the first one that are done.
    at: usize,
}

impl<'p, 's> Parts<'p, 's> {
    pub(super) fn new(parts: &'p [IoSlice<'s>]) -> Self {
        Self { parts, at: 0 }
    }

    pub(super) fn left(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum::<usize>() - self.at
    }

    /// The next `len` bytes, where they lie in one piece.
    pub(super) fn whole(&mut self, len: usize) -> Option<&[u8]> {
        self.skip_empty();
        let (first, rest) = self.parts.split_first()?;
        let plain = first.get(self.at..self.at + len)?;
        self.at += len;
        if self.at == first.len() {
            (self.parts, self.at) = (rest, 0);
        }
        Some(plain)
    }

    /// Copies the next bytes, of which there are enough.
    pub(super) fn gather(&mut self, mut to: &mut [u8]) {
        while let Some((first, rest)) = self.parts.split_first()
            && !to.is_empty()
        {
            let part = &first[self.at..];
            let n = part.len().min(to.len());
            to[..n].copy_from_slice(&part[..n]);
            to = &mut to[n..];
            self.at += n;
            if self.at == first.len() {
                (self.parts, self.at) = (rest, 0);
            }
        }
    }

    fn skip_empty(&mut self) {
        while let Some((first, rest)) = self.parts.split_first()
            && first.len() == self.at
        {
            (self.parts, self.at) = (rest, 0);
        }
    }
}
