//! Header sections (RFC 9204), without a dynamic table.

use bytes::{BufMut as _, Bytes, BytesMut};

use super::{Code, ProtocolError, fields::STATIC, huffman};

/// What a field counts beyond its bytes (RFC 9114 section 4.2.2).
pub const FIELD_OVERHEAD: usize = 32;

/// A name and its value.
pub type Field = (Bytes, Bytes);

/// Why a header section is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The connection has failed (RFC 9204 section 2.2).
    Malformed(ProtocolError),
    /// Its fields have more bytes than are taken.
    TooLong,
}

const fn malformed(why: &'static str) -> DecodeError {
    DecodeError::Malformed(ProtocolError::new(Code::QPACK_DECOMPRESSION_FAILED, why))
}

/// Encodes fields: by their index where the table has them, else as they are.
pub fn encode<'f>(fields: impl IntoIterator<Item = (&'f str, &'f [u8])>) -> Bytes {
    let mut out = BytesMut::new();
    // No field needs the dynamic table, and the base is 0.
    out.put_slice(&[0, 0]);
    for (name, value) in fields {
        let named = STATIC.iter().position(|(n, _)| *n == name);
        let whole = STATIC.iter().position(|(n, v)| *n == name && v.as_bytes() == value);
        match (whole, named) {
            (Some(index), _) => put_int(&mut out, 0b1100_0000, 6, index),
            (None, Some(index)) => {
                put_int(&mut out, 0b0101_0000, 4, index);
                put_string(&mut out, 0, 7, value);
            }
            (None, None) => {
                put_string(&mut out, 0b0010_0000, 3, name.as_bytes());
                put_string(&mut out, 0, 7, value);
            }
        }
    }
    out.freeze()
}

fn put_string(out: &mut BytesMut, flags: u8, prefix: u32, text: &[u8]) {
    put_int(out, flags, prefix, text.len());
    out.put_slice(text);
}

/// RFC 7541 section 5.1.
fn put_int(out: &mut BytesMut, flags: u8, prefix: u32, value: usize) {
    let most = (1_usize << prefix) - 1;
    let byte = |v: usize| v.to_le_bytes()[0];
    if value < most {
        return out.put_u8(flags | byte(value));
    }
    out.put_u8(flags | byte(most));
    let mut rest = value - most;
    while rest >= 0x80 {
        out.put_u8(byte(rest & 0x7f) | 0x80);
        rest >>= 7;
    }
    out.put_u8(byte(rest));
}

/// Decodes a header section, whose fields may have `most` bytes, as RFC 9114 section 4.2.2 counts them.
pub fn decode(section: &[u8], most: usize) -> Result<Vec<Field>, DecodeError> {
    let mut rest = section;
    if get_int(&mut rest, 8)? != 0 {
        return Err(malformed("a header section that needs the dynamic table, which has no room"));
    }
    let is_negative = rest.first().is_some_and(|first| first & 0x80 != 0);
    get_int(&mut rest, 7)?;
    if is_negative {
        return Err(malformed("a header section with a base below 0"));
    }
    let (mut fields, mut size) = (Vec::new(), 0);
    while let Some(first) = rest.first().copied() {
        let left = most.checked_sub(size + FIELD_OVERHEAD).ok_or(DecodeError::TooLong)?;
        let (name, value) = match first {
            // An index into the static table.
            0b1100_0000.. => {
                let (name, value) = of_table(get_int(&mut rest, 6)?)?;
                (Bytes::from_static(name.as_bytes()), Bytes::from_static(value.as_bytes()))
            }
            // A name of the static table. Whether it may be indexed further on makes no difference here.
            0b0100_0000..=0b0111_1111 if first & 0b0001_0000 != 0 => {
                let (name, _) = of_table(get_int(&mut rest, 4)?)?;
                (Bytes::from_static(name.as_bytes()), get_string(&mut rest, 7, left)?)
            }
            0b0010_0000..=0b0011_1111 => {
                let name = get_string(&mut rest, 3, left)?;
                (name, get_string(&mut rest, 7, left)?)
            }
            _ => return Err(malformed("a field of the dynamic table, which has no room")),
        };
        size += name.len() + value.len() + FIELD_OVERHEAD;
        if size > most {
            return Err(DecodeError::TooLong);
        }
        fields.push((name, value));
    }
    Ok(fields)
}

fn of_table(index: usize) -> Result<(&'static str, &'static str), DecodeError> {
    STATIC.get(index).copied().ok_or(malformed("an index that the static table does not have"))
}

const CUT: DecodeError = malformed("a header section that ends within a field");

fn get_int(rest: &mut &[u8], prefix: u32) -> Result<usize, DecodeError> {
    /// More continuation bytes than the longest section has a use for.
    const BYTES_MAX: u32 = 4;
    let most = (1_usize << prefix) - 1;
    let (first, mut after) = rest.split_first().ok_or(CUT)?;
    let mut value = usize::from(*first) & most;
    if value == most {
        let mut nth = 0;
        loop {
            let (byte, behind) = after.split_first().ok_or(CUT)?;
            after = behind;
            if nth == BYTES_MAX {
                return Err(malformed("an integer that is too large"));
            }
            value += usize::from(byte & 0x7f) << (7 * nth);
            nth += 1;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *rest = after;
    Ok(value)
}

/// A string of at most `most` bytes; the bit in front of its length says whether it is coded.
fn get_string(rest: &mut &[u8], prefix: u32, most: usize) -> Result<Bytes, DecodeError> {
    let coded = rest.first().ok_or(CUT)? >> prefix & 1 == 1;
    let length = get_int(rest, prefix)?;
    let (text, after) = rest.split_at_checked(length).ok_or(CUT)?;
    *rest = after;
    if coded {
        // No code is shorter than five bits, and the section itself is bounded.
        return huffman::decode(text, text.len() * 8 / 5)
            .map(Bytes::from)
            .ok_or(malformed("a string whose Huffman code is malformed"))
            .and_then(|text| if text.len() > most { Err(DecodeError::TooLong) } else { Ok(text) });
    }
    if length > most {
        return Err(DecodeError::TooLong);
    }
    Ok(Bytes::copy_from_slice(text))
}
