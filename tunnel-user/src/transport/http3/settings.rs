//! SETTINGS (RFC 9114 section 7.2.4).

use bytes::{Bytes, BytesMut};

use super::{
    Code, HEADERS, ProtocolError,
    frame::{self, Kind},
    varint,
};

/// What both ends of ours say: how many bytes of headers they take. The dynamic table has no room unless it is said
/// (RFC 9204 section 5).
const MAX_FIELD_SECTION_SIZE: u64 = 0x06;
/// Identifiers that HTTP/2 uses otherwise (RFC 9114 section 7.2.4.1).
const RESERVED: [u64; 5] = [0x00, 0x02, 0x03, 0x04, 0x05];
/// More than a dozen were never registered.
const COUNT_MAX: usize = 64;

/// What a peer has said, as far as it concerns us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How many bytes of headers it takes.
    pub max_field_section_size: u64,
}

/// The frame that we send.
pub fn ours(out: &mut BytesMut) {
    let mut payload = BytesMut::new();
    varint::put(&mut payload, MAX_FIELD_SECTION_SIZE);
    varint::put(&mut payload, HEADERS as u64);
    frame::put_head(out, Kind::SETTINGS, payload.len());
    out.extend_from_slice(&payload);
}

/// Reads the payload of a peer's.
pub fn parse(mut payload: Bytes) -> Result<Settings, ProtocolError> {
    let wrong = |why| ProtocolError::new(Code::SETTINGS_ERROR, why);
    let mut settings = Settings { max_field_section_size: varint::MAX };
    let mut seen: Vec<u64> = Vec::new();
    while !payload.is_empty() {
        let mut number = || {
            let cut = ProtocolError::new(Code::FRAME_ERROR, "SETTINGS end within a setting");
            let (number, length) = varint::get(&payload).ok_or(cut)?;
            let _read = payload.split_to(length);
            Ok(number)
        };
        let (name, value) = (number()?, number()?);
        if RESERVED.contains(&name) {
            return Err(wrong("a setting of HTTP/2"));
        }
        if seen.contains(&name) {
            return Err(wrong("a setting that is given twice"));
        }
        if seen.len() == COUNT_MAX {
            return Err(ProtocolError::new(Code::EXCESSIVE_LOAD, "too many settings"));
        }
        seen.push(name);
        if name == MAX_FIELD_SECTION_SIZE {
            settings.max_field_section_size = value;
        }
    }
    Ok(settings)
}
