//! One connection's records, without the connection: what was received goes in, what is to be sent comes out.
//!
//! # Invariants
//! - Nothing that was not opened with the peer's key leaves as plaintext; close_notify is the only end.
//! - After an error nothing is opened any more, and the peer is told by an alert.
//! - Each direction holds one buffer at most, and none while nothing is on its way.

mod parts;

use std::{io::IoSlice, ops::Range};

use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets, client::ClientConnectionData,
    kernel::KernelConnection, server::ServerConnectionData,
};

use self::parts::Parts;
use super::{
    ASIDE, Content, HEADER, PLAIN_MAX, SEALED_MAX, TAG,
    buffer::Buffer,
    keys::{Key, record_len},
};

/// Handshake messages after the handshake that the peer may send without any data in between: tickets, and new keys. The
/// number of new keys that rustls takes.
const MESSAGES_MAX: u32 = 32;
/// The longest of them; a ticket that carries a chain of certificates has 64 KiB at most (RFC 8446 section 4.6.1).
const MESSAGE_MAX: usize = 1 << 17;
/// Records without content that the peer may send one behind the other.
const EMPTY_MAX: u32 = 32;
/// Warnings that are no end, of a connection's life: as many as rustls takes.
const WARNINGS_MAX: u32 = 4;
/// Type and length in front of a handshake message (RFC 8446 section 4).
const MESSAGE_HEADER: usize = 4;
/// RFC 8446 section 4.
const NEW_SESSION_TICKET: u8 = 4;
/// RFC 8446 section 4.
const KEY_UPDATE: u8 = 24;
/// RFC 8446 section 6.1.
const WARNING: u8 = 1;
/// RFC 8446 section 6.2.
const FATAL: u8 = 2;

/// Why a connection cannot go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RecordError {
    /// The peer says why.
    #[error(transparent)]
    Alert(rustls::Error),
    /// Altered on the way, or sealed with another key.
    #[error("record cannot be decrypted")]
    Decrypt,
    /// Longer than TLS allows.
    #[error("record too long")]
    Oversized,
    /// Not now, or not at all.
    #[error("unexpected message from the peer: {0}")]
    Unexpected(&'static str),
    /// A ticket that cannot be read, or a key that cannot be made.
    #[error("message from the peer rejected: {0}")]
    Message(rustls::Error),
    /// So many records that nothing is sealed any more.
    #[error("record limit of the key reached")]
    Exhausted,
    /// A cipher suite that this is not made for.
    #[error("unsupported cipher suite")]
    Suite,
    /// The cipher failed.
    #[error("record cannot be encrypted")]
    Crypto,
    /// Our own word: close_notify was sent.
    #[error("data after close_notify")]
    Ended,
}

impl RecordError {
    /// What the peer is told; nothing where it has spoken last.
    fn alert(&self) -> Option<AlertDescription> {
        Some(match self {
            Self::Alert(_) => return None,
            Self::Decrypt => AlertDescription::BadRecordMac,
            Self::Oversized => AlertDescription::RecordOverflow,
            Self::Unexpected(_) => AlertDescription::UnexpectedMessage,
            Self::Message(_) => AlertDescription::DecodeError,
            Self::Exhausted | Self::Suite | Self::Crypto | Self::Ended => AlertDescription::InternalError,
        })
    }
}

/// What comes next from the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// There is plaintext: [`Session::data`].
    Data,
    /// More has to be received first.
    More,
    /// The peer has no more to send.
    End,
}

/// What is left of rustls: keys that follow, and where tickets are kept.
pub(super) enum Kernel {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Kernel {
    fn next_rx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        }
    }

    fn next_tx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        }
    }

    /// After so many records a key is to be replaced.
    fn limit(&self) -> u64 {
        let suite = match self {
            Self::Client(kernel) => kernel.negotiated_cipher_suite(),
            Self::Server(kernel) => kernel.negotiated_cipher_suite(),
        };
        suite.tls13().map_or(0, |suite| suite.common.confidentiality_limit)
    }
}

/// See the module.
pub struct Session {
    tx: Key,
    rx: Key,
    /// Records after which our key is replaced.
    limit: u64,
    kernel: Kernel,
    /// Plaintext that came with the handshake.
    early: Vec<u8>,
    incoming: Option<Buffer>,
    /// Where in it the plaintext lies of the record at its front, and how long that record is.
    opened: Option<(Range<usize>, usize)>,
    outgoing: Option<Buffer>,
    /// The part of a handshake message that has come.
    message: Vec<u8>,
    messages: u32,
    empty: u32,
    warnings: u32,
    /// A new key is among what is to be sent.
    updating: bool,
    ending: bool,
    ended: bool,
    failed: Option<RecordError>,
}

impl Session {
    /// After the handshake. `received` came behind it, and with it `early`, and then the end if it has `ended`.
    pub(super) fn new(
        secrets: ExtractedSecrets,
        kernel: Kernel,
        early: Vec<u8>,
        received: Buffer,
        ended: bool,
    ) -> Result<Self, RecordError> {
        Ok(Self {
            tx: Key::new(secrets.tx)?,
            rx: Key::new(secrets.rx)?,
            limit: kernel.limit(),
            kernel,
            early,
            incoming: Some(received).filter(|buffer| !buffer.is_empty()),
            opened: None,
            outgoing: None,
            message: Vec::new(),
            messages: 0,
            empty: 0,
            warnings: 0,
            updating: false,
            ending: false,
            ended,
            failed: None,
        })
    }

    /// Opens what has been received, as far as needed; what comes next.
    pub fn advance(&mut self) -> Result<Next, RecordError> {
        if let Some(why) = &self.failed {
            return Err(why.clone());
        }
        if !self.early.is_empty() {
            return Ok(Next::Data);
        }
        loop {
            if self.opened.is_some() {
                return Ok(Next::Data);
            }
            if self.ended {
                self.incoming = None;
                return Ok(Next::End);
            }
            match self.open() {
                Ok(true) => {}
                Ok(false) => return Ok(Next::More),
                Err(why) => {
                    self.failed = Some(why.clone());
                    self.incoming = None;
                    if let Some(alert) = why.alert() {
                        // It says more than that the peer is not told.
                        let _untold = self.aside(Content::Alert, &[FATAL, alert.into()]);
                    }
                    return Err(why);
                }
            }
        }
    }

    /// The plaintext that is there, of one record.
    pub fn data(&self) -> &[u8] {
        if !self.early.is_empty() {
            return &self.early;
        }
        match (&self.opened, &self.incoming) {
            (Some((place, _)), Some(buffer)) => buffer.at(place.clone()),
            _ => &[],
        }
    }

    /// The first `n` bytes of it were taken.
    pub fn taken(&mut self, n: usize) {
        if !self.early.is_empty() {
            self.early.drain(..n);
            if self.early.is_empty() {
                self.early = Vec::new();
            }
            return;
        }
        let Some((place, record)) = &mut self.opened else { return };
        place.start += n;
        if place.start == place.end {
            let record = *record;
            self.opened = None;
            self.received_by(record);
        }
    }

    /// Where received bytes go; there is room after [`Next::More`].
    pub fn room(&mut self) -> &mut [u8] {
        let buffer = self.incoming.get_or_insert_with(Buffer::take);
        buffer.compact();
        buffer.room()
    }

    /// `n` bytes were received there; with none, and none before, the room is given back.
    pub fn received(&mut self, n: usize) {
        if let Some(buffer) = &mut self.incoming {
            buffer.filled_by(n);
            if buffer.is_empty() {
                self.incoming = None;
            }
        }
    }

    fn received_by(&mut self, record: usize) {
        if let Some(buffer) = &mut self.incoming {
            buffer.advance(record);
            if buffer.is_empty() {
                self.incoming = None;
            }
        }
    }

    /// Opens the record at the front; whether it was whole.
    fn open(&mut self) -> Result<bool, RecordError> {
        let Some(buffer) = &mut self.incoming else { return Ok(false) };
        let Some(len) = record_len(buffer.filled())? else { return Ok(false) };
        if buffer.filled().len() < len {
            return Ok(false);
        }
        let (content, inside) = self.rx.open(&mut buffer.filled_mut()[..len])?;
        if !self.message.is_empty() && content != Content::Handshake {
            return Err(RecordError::Unexpected("record of another type within a handshake message"));
        }
        let place = buffer.place(inside);
        match content {
            Content::Data if place.start == place.end => {
                self.empty += 1;
                if self.empty > EMPTY_MAX {
                    return Err(RecordError::Unexpected("too many empty records"));
                }
                self.received_by(len);
            }
            Content::Data => {
                (self.empty, self.messages) = (0, 0);
                self.opened = Some((place, len));
            }
            Content::Handshake => {
                self.message.extend_from_slice(buffer.at(place));
                self.received_by(len);
                self.messages()?;
            }
            Content::Alert => {
                let [_level, alert] = *buffer.at(place) else {
                    return Err(RecordError::Unexpected("malformed alert"));
                };
                self.received_by(len);
                self.alerted(AlertDescription::from(alert))?;
            }
        }
        Ok(true)
    }

    /// RFC 8446 section 6: the level says nothing.
    fn alerted(&mut self, alert: AlertDescription) -> Result<(), RecordError> {
        match alert {
            AlertDescription::CloseNotify => self.ended = true,
            AlertDescription::UserCanceled => {
                self.warnings += 1;
                if self.warnings > WARNINGS_MAX {
                    return Err(RecordError::Unexpected("too many warning alerts"));
                }
            }
            alert => return Err(RecordError::Alert(rustls::Error::AlertReceived(alert))),
        }
        Ok(())
    }

    /// Takes the handshake messages that are whole.
    fn messages(&mut self) -> Result<(), RecordError> {
        let mut message = std::mem::take(&mut self.message);
        let mut rest = &message[..];
        while let [kind, a, b, c, behind @ ..] = rest {
            let len = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            if len > MESSAGE_MAX {
                return Err(RecordError::Oversized);
            }
            let Some((body, behind)) = behind.split_at_checked(len) else { break };
            self.messages += 1;
            if self.messages > MESSAGES_MAX {
                return Err(RecordError::Unexpected("too many handshake messages"));
            }
            rest = behind;
            match (*kind, &mut self.kernel) {
                (NEW_SESSION_TICKET, Kernel::Client(kernel)) => {
                    kernel.handle_new_session_ticket(body).map_err(RecordError::Message)?;
                }
                (KEY_UPDATE, _) => {
                    // The next record has another key: nothing of this one is left (RFC 8446 section 5.1).
                    let ([wanted @ (0 | 1)], []) = (body, rest) else {
                        return Err(RecordError::Unexpected("malformed KeyUpdate"));
                    };
                    self.rx = Key::new(self.kernel.next_rx().map_err(RecordError::Message)?)?;
                    // One answer is enough for all that came meanwhile (RFC 8446 section 4.6.3).
                    if *wanted == 1 && !self.updating {
                        self.update_tx()?;
                    }
                }
                _ => return Err(RecordError::Unexpected("handshake message after the handshake")),
            }
        }
        let left = rest.len();
        if left > 0 {
            // What is longer than its first bytes say has been refused.
            debug_assert!(left < MESSAGE_HEADER + MESSAGE_MAX, "a whole message was left");
            // Moved only behind a message that was whole: one that comes byte by byte is not copied with each.
            message.drain(..message.len() - left);
            self.message = message;
        }
        Ok(())
    }

    /// Says that what follows is sealed with the next key.
    fn update_tx(&mut self) -> Result<(), RecordError> {
        self.aside(Content::Handshake, &[KEY_UPDATE, 0, 0, 1, 0])?;
        self.tx = Key::new(self.kernel.next_tx().map_err(RecordError::Message)?)?;
        self.updating = true;
        Ok(())
    }

    /// Seals what is said beside the data.
    fn aside(&mut self, content: Content, message: &[u8]) -> Result<(), RecordError> {
        let buffer = self.outgoing.get_or_insert_with(Buffer::take);
        if buffer.room().len() < HEADER + message.len() + 1 + TAG {
            buffer.compact();
        }
        if buffer.room().len() < HEADER + message.len() + 1 + TAG {
            return Err(RecordError::Exhausted);
        }
        let n = self.tx.seal(content, message, buffer.room())?;
        buffer.filled_by(n);
        Ok(())
    }

    /// Seals plaintext, as much as there is room for; how much. With none, what is there has to be sent first.
    pub fn write(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, RecordError> {
        if let Some(why) = &self.failed {
            return Err(why.clone());
        }
        if self.ending {
            return Err(RecordError::Ended);
        }
        let mut parts = Parts::new(parts);
        let mut written = 0;
        loop {
            let left = parts.left();
            if left == 0 {
                return Ok(written);
            }
            if self.tx.records() >= self.limit && !self.updating {
                self.update_tx()?;
            }
            let buffer = self.outgoing.get_or_insert_with(Buffer::take);
            let room = buffer.room().len().saturating_sub(ASIDE + SEALED_MAX - PLAIN_MAX);
            // A record that is cut short for want of room costs as much as a whole one.
            let len = left.min(PLAIN_MAX);
            if room < len {
                return Ok(written);
            }
            let record = buffer.room();
            let n = match parts.whole(len) {
                Some(plain) => self.tx.seal(Content::Data, plain, record)?,
                None => {
                    parts.gather(&mut record[HEADER..HEADER + len]);
                    self.tx.seal_in_place(len, record)?
                }
            };
            buffer.filled_by(n);
            written += len;
        }
    }

    /// Says that no more data follows.
    pub fn end(&mut self) -> Result<(), RecordError> {
        if !self.ending && self.failed.is_none() {
            self.ending = true;
            self.aside(Content::Alert, &[WARNING, AlertDescription::CloseNotify.into()])?;
        }
        Ok(())
    }

    /// Refuses the peer: an alert is the last that it hears.
    pub fn refuse(&mut self, alert: AlertDescription) {
        if self.failed.is_none() && !self.ending {
            // Without room for it the peer is told nothing.
            let _untold = self.aside(Content::Alert, &[FATAL, alert.into()]);
            self.failed = Some(RecordError::Ended);
        }
    }

    /// What is to be sent.
    pub fn unsent(&self) -> &[u8] {
        self.outgoing.as_ref().map_or(&[], Buffer::filled)
    }

    /// The first `n` bytes of it were sent.
    pub fn sent(&mut self, n: usize) {
        let Some(buffer) = &mut self.outgoing else { return };
        buffer.advance(n);
        if buffer.is_empty() {
            self.outgoing = None;
            self.updating = false;
        }
    }
}

#[cfg(test)]
mod tests;
