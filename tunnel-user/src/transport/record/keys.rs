//! One direction's key: seals or opens records, and counts them.
//!
//! A nonce is used once: the sequence number grows with each record, and restarts only with a new key (RFC 8446 section 5.3).

use std::ops::Range;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

use super::{CIPHERTEXT_MAX, Content, HEADER, PLAIN_MAX, RecordError, TAG};

/// A key, and the number of the next record.
pub(super) struct Key {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    seq: u64,
}

impl Key {
    /// Of one direction, of which `seq` records have passed.
    pub(super) fn new((seq, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&aead::CHACHA20_POLY1305, key, iv),
            _ => return Err(RecordError::Suite),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Suite)?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Suite)?;
        Ok(Self { key: LessSafeKey::new(key), iv, seq })
    }

    /// Records that passed under this key.
    pub(super) fn records(&self) -> u64 {
        self.seq
    }

    /// RFC 8446 section 5.3. The sequence number is used up whatever becomes of the record.
    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = self.iv;
        for (byte, seq) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.seq.to_be_bytes()) {
            *byte ^= seq;
        }
        self.seq = self.seq.checked_add(1).ok_or(RecordError::Exhausted)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Seals a record whose plaintext lies in one piece, at the front of `out`; how long the record is.
    pub(super) fn seal(
        &mut self,
        content: Content,
        plain: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let (header, rest) = out.split_at_mut(HEADER);
        let (text, rest) = rest.split_at_mut(plain.len());
        let tail = &mut rest[..1 + TAG];
        header.copy_from_slice(&header_of(plain.len()));
        let (nonce, aad) = (self.nonce()?, Aad::from(header_of(plain.len())));
        let sealed = self.key.seal_out_of_place_scatter(nonce, aad, plain, text, &[content as u8], tail);
        sealed.map_err(|_| RecordError::Crypto)?;
        Ok(HEADER + plain.len() + 1 + TAG)
    }

    /// Seals a record of data whose plaintext, `len` bytes, the caller has put where it goes: behind the header.
    pub(super) fn seal_in_place(&mut self, len: usize, out: &mut [u8]) -> Result<usize, RecordError> {
        let (header, rest) = out.split_at_mut(HEADER);
        let (text, rest) = rest.split_at_mut(len);
        let tail = &mut rest[..1 + TAG];
        header.copy_from_slice(&header_of(len));
        let (nonce, aad) = (self.nonce()?, Aad::from(header_of(len)));
        let sealed = self.key.seal_in_place_scatter(nonce, aad, text, &[Content::Data as u8], tail);
        sealed.map_err(|_| RecordError::Crypto)?;
        Ok(HEADER + len + 1 + TAG)
    }

    /// Opens a whole record where it lies: what it carries, and where in it that is.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<(Content, Range<usize>), RecordError> {
        let (header, text) = record.split_at_mut(HEADER);
        let aad = Aad::from([header[0], header[1], header[2], header[3], header[4]]);
        let nonce = self.nonce()?;
        let inner = self.key.open_in_place(nonce, aad, text).map_err(|_| RecordError::Decrypt)?;
        // Behind the content comes its type, and behind that zeros (RFC 8446 section 5.4).
        let last = inner
            .iter()
            .rposition(|byte| *byte != 0)
            .ok_or(RecordError::Unexpected("a record of no type"))?;
        let content = match inner[last] {
            21 => Content::Alert,
            22 => Content::Handshake,
            23 => Content::Data,
            _ => return Err(RecordError::Unexpected("a record of a type that does not exist")),
        };
        if last > PLAIN_MAX {
            return Err(RecordError::Oversized);
        }
        Ok((content, HEADER..HEADER + last))
    }
}

/// The header of a record of ours (RFC 8446 section 5.2).
fn header_of(plain: usize) -> [u8; HEADER] {
    // At most PLAIN_MAX and a little more: it fits.
    let [.., high, low] = (plain + 1 + TAG).to_be_bytes();
    [Content::Data as u8, 3, 3, high, low]
}

/// How long the record at the front of `received` is, header included; `None` while that is not known.
pub(super) fn record_len(received: &[u8]) -> Result<Option<usize>, RecordError> {
    let [kind, _, _, high, low, ..] = *received else { return Ok(None) };
    if kind != Content::Data as u8 {
        // A change_cipher_spec belongs to the handshake, and everything else is sealed by now.
        return Err(RecordError::Unexpected("a record that is not sealed"));
    }
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len > CIPHERTEXT_MAX {
        return Err(RecordError::Oversized);
    }
    if len < 1 + TAG {
        return Err(RecordError::Decrypt);
    }
    Ok(Some(HEADER + len))
}
