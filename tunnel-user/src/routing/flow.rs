//! What the router is asked about.

use super::index::PeerSet;
use crate::model::flow::{ClientAddr, Direction, Head, Identity, Sniffed, SourceKind, Target, Transport};

/// One connection, as the router sees it.
#[derive(Clone, Copy, Debug)]
pub struct Flow<'a> {
    /// What it is made of.
    pub transport: Transport,
    /// Which way it goes.
    pub direction: Direction,
    /// Who handed it to us.
    pub source: SourceKind,
    /// What the configuration calls the listener, or the capture, that it came by.
    pub name: Option<&'a str>,
    /// Where it is to end.
    pub target: &'a Target,
    /// Who opened it.
    pub client: ClientAddr,
    /// Who the peer behind a listener has proved to be.
    pub identity: Option<&'a Identity>,
    /// What the routes know of the peer behind a listener ([`crate::routing::router::Router::peer`]).
    pub peer: &'a PeerSet,
    /// The name by which that peer asked for us (SNI of the tunnel's own TLS).
    pub server_name: Option<&'a str>,
    /// The CONNECT request that it sent.
    pub request: Option<Head<'a>>,
    /// What the connection that it carries says of itself; `None` until somebody has looked.
    pub sniffed: Option<&'a Sniffed>,
}
