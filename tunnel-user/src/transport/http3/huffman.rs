//! The Huffman code of header strings (RFC 7541 appendix B), to be read only: what we send is short, and not coded.
//!
//! # Invariants
//! - A string is padded with less than a byte of ones; anything else is an error (RFC 7541 section 5.2).

use std::sync::LazyLock;

/// The length of each byte's code, in bits. The code is canonical: codes of one length follow each other in the order of their
/// bytes, and longer codes follow shorter ones. So the lengths say it all.
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28,
    28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6,
    6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7,
    8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7,
    15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24,
    23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23,
    23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26,
    26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20,
    21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27,
    27, 27, 26,
];

/// The longest code; what is longer is EOS, which is not to appear.
const LONGEST: usize = 30;

/// What decoding needs of a canonical code.
struct Code {
    /// For each length: the first code, how many there are, and where their bytes stand in `bytes`.
    of_length: [(u32, u32, usize); LONGEST + 1],
    /// All bytes in the order of their codes.
    bytes: Vec<u8>,
}

static CODE: LazyLock<Code> = LazyLock::new(|| {
    let mut of_length = [(0, 0, 0); LONGEST + 1];
    let mut bytes = Vec::with_capacity(LENGTHS.len());
    let mut next = 0;
    for (length, slot) in of_length.iter_mut().enumerate().skip(1) {
        next <<= 1;
        let before = bytes.len();
        bytes.extend((0..=u8::MAX).filter(|byte| usize::from(LENGTHS[usize::from(*byte)]) == length));
        let count = u32::try_from(bytes.len() - before).unwrap_or_default();
        *slot = (next, count, before);
        next += count;
    }
    Code { of_length, bytes }
});

/// Decodes a string into at most `most` bytes; `None` where it is malformed, or longer.
pub(super) fn decode(coded: &[u8], most: usize) -> Option<Vec<u8>> {
    let code = &*CODE;
    let mut out = Vec::new();
    let (mut bits, mut length) = (0_u32, 0_usize);
    for byte in coded {
        for shift in (0..8).rev() {
            bits = (bits << 1) | u32::from((byte >> shift) & 1);
            length += 1;
            if length > LONGEST {
                return None;
            }
            let (first, count, at) = code.of_length[length];
            // A prefix of a longer code is greater than all codes of this length.
            if let Some(nth) = bits.checked_sub(first).filter(|nth| *nth < count) {
                if out.len() == most {
                    return None;
                }
                out.push(code.bytes[at + usize::try_from(nth).ok()?]);
                (bits, length) = (0, 0);
            }
        }
    }
    let is_padding = length < 8 && bits == (1 << length) - 1;
    is_padding.then_some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The code of each byte, and its length.
    fn codes() -> Vec<(u32, u32)> {
        let mut codes = vec![(0, 0); 256];
        for ((first, count, at), length) in CODE.of_length.iter().zip(0..) {
            for nth in 0..*count {
                codes[usize::from(CODE.bytes[at + nth as usize])] = (first + nth, length);
            }
        }
        codes
    }

    fn encode(text: &[u8]) -> Vec<u8> {
        let (codes, mut bits) = (codes(), Vec::new());
        for byte in text {
            let (code, length) = codes[usize::from(*byte)];
            bits.extend((0..length).rev().map(|shift| (code >> shift) & 1 == 1));
        }
        bits.resize(bits.len().next_multiple_of(8), true);
        bits.chunks(8).map(|eight| eight.iter().fold(0, |byte, bit| byte << 1 | u8::from(*bit))).collect()
    }

    #[test]
    fn strings_of_the_rfc_are_read() {
        // RFC 7541 appendix C.4 and C.6.
        for (coded, text) in [
            (&b"\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff"[..], "www.example.com"),
            (&b"\xa8\xeb\x10\x64\x9c\xbf"[..], "no-cache"),
            (&b"\x64\x02"[..], "302"),
            (&b"\xae\xc3\x77\x1a\x4b"[..], "private"),
        ] {
            assert_eq!(decode(coded, 100).as_deref(), Some(text.as_bytes()));
            assert_eq!(encode(text.as_bytes()), coded);
        }
    }

    #[test]
    fn padding_of_a_byte_or_of_zeros_is_refused_and_so_is_what_is_too_long() {
        assert_eq!(decode(b"\xff", 10), None);
        assert_eq!(decode(b"\x64\x02\xff", 10), None);
        assert_eq!(decode(b"\x64\x00\x00", 10), None);
        assert_eq!(decode(b"\x64\x02", 2), None);
        // EOS.
        assert_eq!(decode(b"\xff\xff\xff\xff", 10), None);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(decode(&encode(&text), 200), Some(text));
        }

        #[test]
        fn arbitrary_bytes_are_a_string_or_none(coded in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(text) = decode(&coded, 1000) {
                prop_assert_eq!(encode(&text), coded);
            }
        }
    }
}
