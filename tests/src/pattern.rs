//! Byte patterns in which each byte depends on its offset: a lost, repeated, swapped or foreign byte is found at the
//! first one, and neither side keeps what it sent.

use std::io::{self, Read, Write};

/// One read or write.
pub const CHUNK: usize = 64 * 1024;

/// An endless sequence of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern(pub u64);

/// What applications send, by convention.
pub const UP: Pattern = Pattern(1);
/// What targets send, by convention.
pub const DOWN: Pattern = Pattern(2);

impl Pattern {
    /// Writes the bytes from `offset` on into `buf`.
    pub fn fill(self, offset: u64, buf: &mut [u8]) {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let word = self.word(at / 8).to_le_bytes();
            let from = (at % 8) as usize;
            let n = rest.len().min(8 - from);
            rest[..n].copy_from_slice(&word[from..from + n]);
            rest = &mut rest[n..];
            at += n as u64;
        }
    }

    /// Fails, naming the first wrong offset, unless `buf` is what belongs at `offset`.
    pub fn check(self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut expected = [0; CHUNK];
        for (i, part) in buf.chunks(CHUNK).enumerate() {
            let start = offset + (i * CHUNK) as u64;
            let expected = &mut expected[..part.len()];
            self.fill(start, expected);
            if let Some(at) = part.iter().zip(&*expected).position(|(a, b)| a != b) {
                let text = format!("wrong byte at offset {} of pattern {}", start + at as u64, self.0);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
        Ok(())
    }

    /// Sends `len` bytes from the beginning.
    pub fn send(self, to: &mut impl Write, len: u64) -> io::Result<()> {
        self.send_from(to, 0, len)
    }

    /// Sends the bytes from `offset` to `end`.
    pub fn send_from(self, to: &mut impl Write, offset: u64, end: u64) -> io::Result<()> {
        let mut buf = vec![0; CHUNK];
        let mut at = offset;
        while at < end {
            let n = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
            self.fill(at, &mut buf[..n]);
            to.write_all(&buf[..n])?;
            at += n as u64;
        }
        Ok(())
    }

    /// Receives and checks exactly `len` bytes from the beginning.
    pub fn receive(self, from: &mut impl Read, len: u64) -> io::Result<()> {
        self.receive_from(from, 0, len)
    }

    /// Receives and checks the bytes from `offset` to `end`.
    pub fn receive_from(self, from: &mut impl Read, offset: u64, end: u64) -> io::Result<()> {
        let mut at = offset;
        let mut buf = vec![0; CHUNK];
        while at < end {
            let n = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
            let n = from.read(&mut buf[..n])?;
            if n == 0 {
                let text = format!("end after {at} of {end} bytes");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            self.check(at, &buf[..n])?;
            at += n as u64;
        }
        Ok(())
    }

    /// Receives and checks until the peer's end; how many bytes came.
    pub fn receive_to_end(self, from: &mut impl Read) -> io::Result<u64> {
        let mut at = 0;
        let mut buf = vec![0; CHUNK];
        loop {
            let n = from.read(&mut buf)?;
            if n == 0 {
                return Ok(at);
            }
            self.check(at, &buf[..n])?;
            at += n as u64;
        }
    }

    /// splitmix64: every bit of the word depends on every bit of its number.
    fn word(self, number: u64) -> u64 {
        let mut z = number
            .wrapping_add(self.0.wrapping_mul(0xd6e8_feb8_6659_fd93))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_the_same_in_any_pieces_and_a_wrong_byte_is_found() {
        let mut whole = vec![0; 1000];
        UP.fill(0, &mut whole);
        for (offset, len) in [(0, 1), (3, 8), (5, 500), (999, 1)] {
            let mut part = vec![0; len];
            UP.fill(offset as u64, &mut part);
            assert_eq!(part, whole[offset..offset + len]);
        }
        UP.receive(&mut &whole[..], 1000).unwrap();
        assert_eq!(UP.receive_to_end(&mut &whole[..]).unwrap(), 1000);
        assert!(UP.receive(&mut &whole[..], 1001).is_err());
        assert!(DOWN.check(0, &whole).is_err());
        whole[700] ^= 1;
        let e = UP.receive(&mut &whole[..], 1000).unwrap_err();
        assert!(e.to_string().contains("offset 700"), "{e}");
    }
}
