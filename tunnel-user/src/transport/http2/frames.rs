//! The frames of an HTTP/2 connection, found as their bytes pass (RFC 9113 section 4.1). Only headers are looked at.

/// DATA.
pub(super) const DATA: u8 = 0;
/// HEADERS.
pub(super) const HEADERS: u8 = 1;
/// RST_STREAM.
pub(super) const RST_STREAM: u8 = 3;
/// SETTINGS.
pub(super) const SETTINGS: u8 = 4;
/// WINDOW_UPDATE.
pub(super) const WINDOW_UPDATE: u8 = 8;
/// CONTINUATION.
pub(super) const CONTINUATION: u8 = 9;
/// The flag of DATA and HEADERS that ends a stream.
pub(super) const END_STREAM: u8 = 1;
/// The flag of DATA and HEADERS with padding.
pub(super) const PADDED: u8 = 8;
/// Length, type, flags, stream.
const HEADER: usize = 9;

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// Bytes that follow the header.
    pub(super) length: u32,
    /// Its type.
    pub(super) kind: u8,
    /// Its flags.
    pub(super) flags: u8,
}

/// One direction of a connection.
#[derive(Debug)]
pub(super) struct Frames {
    /// Bytes until the next header: of a payload, or of the preface.
    skip: usize,
    header: [u8; HEADER],
    /// So many of the header have come.
    have: usize,
}

impl Frames {
    /// Of a direction in which `skip` bytes come before the first frame.
    pub(super) const fn after(skip: usize) -> Self {
        Self { skip, header: [0; HEADER], have: 0 }
    }

    /// Calls `frame` for each frame whose header is complete with these bytes; how many.
    pub(super) fn pass(&mut self, mut bytes: &[u8], mut frame: impl FnMut(Frame)) -> usize {
        let mut frames = 0;
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return frames;
            }
            let taken = (HEADER - self.have).min(bytes.len());
            self.header[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have < HEADER {
                return frames;
            }
            self.have = 0;
            let [a, b, c, kind, flags, ..] = self.header;
            let length = u32::from_be_bytes([0, a, b, c]);
            self.skip = length as usize;
            frames += 1;
            frame(Frame { length, kind, flags });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(frames: &[(u8, u8, usize)]) -> Vec<u8> {
        let mut out = b"preface".to_vec();
        for (kind, flags, length) in frames {
            out.extend(&u32::try_from(*length).unwrap().to_be_bytes()[1..]);
            out.extend([*kind, *flags, 0, 0, 0, 1]);
            out.extend(vec![0xff; *length]);
        }
        out
    }

    proptest! {
        #[test]
        fn every_frame_is_found_once_however_its_bytes_are_cut(
            frames in proptest::collection::vec((0u8..12, any::<u8>(), 0usize..300), 0..40),
            cuts in proptest::collection::vec(1usize..200, 1..40),
        ) {
            let (bytes, mut found, mut walker) = (encoded(&frames), Vec::new(), Frames::after(7));
            let (mut rest, mut counted) = (&bytes[..], 0);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (part, behind) = rest.split_at((*cut).min(rest.len()));
                counted += walker.pass(part, |f| found.push((f.kind, f.flags, f.length as usize)));
                rest = behind;
            }
            prop_assert_eq!(counted, frames.len());
            prop_assert_eq!(found, frames);
        }
    }
}
