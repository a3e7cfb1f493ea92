//! What the routes say of captured connections before anything but their address and port is known.
//!
//! # Invariants
//! - For every destination the first route that takes it says what [`Router::decide`](super::Router::decide) says of a flow
//!   whose first bytes nobody has looked at (a test holds it to that); where none does, no route takes the flow.

use std::net::{Ipv4Addr, SocketAddr};

use super::takes;
use crate::{
    config::{Action, AddrPattern, Route},
    model::flow::{ClientAddr, Direction, SourceKind, Target, Transport},
    routing::{flow::Flow, index::NOBODY},
};

/// What one route says.
#[derive(Clone, Copy, Debug)]
pub struct Fixed<'a> {
    /// Flows to these addresses; empty: to every one.
    pub to: &'a [AddrPattern],
    /// Whether it denies them, and needs to know nothing else of them.
    pub denies: bool,
}

/// Of the routes that may take flows of a capture, what each says, in their order.
pub fn fixed<'a>(routes: &'a [Route], capture: Option<&str>) -> impl Iterator<Item = Fixed<'a>> {
    // Routes are asked of the target by its place in their lists, and of nothing about the client.
    let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let target = Target::Addr(nowhere);
    let capture = capture.map(str::to_owned);
    routes.iter().filter_map(move |route| {
        let matches = &route.matches;
        let flow = Flow {
            transport: Transport::Tcp,
            direction: Direction::Outbound,
            source: SourceKind::Capture,
            name: capture.as_deref(),
            target: &target,
            client: ClientAddr(nowhere),
            identity: None,
            peer: &NOBODY,
            server_name: None,
            request: None,
            sniffed: None,
        };
        // Applications prove no identity, and what they connect to is an address.
        let never =
            !matches.identity.is_empty() || (matches.destination.is_empty() && !matches.host.is_empty());
        (!never && takes(matches, &flow)).then(|| Fixed {
            to: &matches.destination,
            denies: route.to == Action::Deny && !route.needs_sniff(),
        })
    })
}
