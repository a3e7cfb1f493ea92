//! Integers of variable length (RFC 9000 section 16).

use bytes::{BufMut as _, BytesMut};

/// The most that one holds.
pub const MAX: u64 = (1 << 62) - 1;
/// The most bytes that one takes.
pub const LONGEST: usize = 8;

/// Appends one, in as few bytes as it takes. Of more than [`MAX`] there is none: it is written as that.
pub fn put(out: &mut BytesMut, value: u64) {
    // Each cast is of a value that fits.
    match value.min(MAX) {
        v @ 0..=0x3f => out.put_u8(low(v)),
        v @ 0x40..=0x3fff => out.put_slice(&(v | 0x4000).to_be_bytes()[6..]),
        v @ 0x4000..=0x3fff_ffff => out.put_slice(&(v | 0x8000_0000).to_be_bytes()[4..]),
        v => out.put_u64(v | 0xc000_0000_0000_0000),
    }
}

fn low(v: u64) -> u8 {
    v.to_be_bytes()[7]
}

/// The one at the front of `bytes`, and its length; nothing while it is not whole.
pub fn get(bytes: &[u8]) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    let length = 1_usize << (first >> 6);
    let rest = bytes.get(1..length)?;
    let value = rest.iter().fold(u64::from(first & 0x3f), |value, byte| value << 8 | u64::from(*byte));
    Some((value, length))
}

/// The same, where nothing follows it.
pub fn only(bytes: &[u8]) -> Option<u64> {
    get(bytes).filter(|(_, length)| *length == bytes.len()).map(|(value, _)| value)
}
