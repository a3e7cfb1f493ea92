//! Alerts of a peer, with what we know of their cause.

use std::sync::Arc;

/// Between an alert and the hint: of an error that has passed h2 the text is left.
pub const HINT: &str = "; of our certificate is known: ";

/// An alert of the peer's, and why it may refuse our certificate.
#[derive(Debug, thiserror::Error)]
#[error("{alert}{HINT}{hint}")]
pub struct HintedAlert {
    /// What came.
    pub alert: rustls::Error,
    /// See `identity::verify`.
    pub hint: Arc<str>,
}
