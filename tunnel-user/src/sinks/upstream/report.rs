//! What one upstream does at this moment on one worker, for whoever looks at it from outside.

use serde::{Deserialize, Serialize};

use crate::observe::histogram::Buckets;

/// One upstream on one worker, or, added up, on several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamReport {
    /// Its name, with those that it goes through.
    pub path: String,
    /// Its endpoints.
    pub endpoints: Vec<EndpointReport>,
    /// Why there is no endpoint, if there is none.
    pub unavailable: Option<String>,
    /// What it has counted.
    pub totals: UpstreamTotals,
    /// How long its connections took to be made, handshakes included.
    pub connect: Buckets,
}

/// Numbers of one upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamTotals {
    /// Shared connections that are open.
    pub connections: usize,
    /// Connections that are being made.
    pub dialing: usize,
    /// Streams that are open, on shared connections or on ones of their own.
    pub streams: usize,
    /// Flows that wait for a connection.
    pub waiting: usize,
    /// Connections opened since it was configured.
    pub connections_opened: u64,
    /// Connections that could not be made.
    pub connect_failures: u64,
    /// Streams opened.
    pub streams_opened: u64,
    /// Streams that could not be opened.
    pub streams_failed: u64,
    /// Times that an endpoint was ejected.
    pub ejections: u64,
}

/// One endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointReport {
    /// What is connected to.
    pub address: String,
    /// What it is called.
    pub name: String,
    /// Its streams.
    pub streams: usize,
    /// Shared connections to it.
    pub connections: usize,
    /// Workers at which it may get new flows.
    pub available: usize,
    /// Workers at which it is ejected for what flows have met there.
    pub ejected: usize,
    /// Workers at which its health checks fail.
    pub unhealthy: usize,
    /// What failed last; empty where nothing has.
    pub last_error: String,
}

impl UpstreamReport {
    /// Takes in what another worker says of the same upstream.
    pub fn add(&mut self, other: Self) {
        if self.path.is_empty() {
            self.path = other.path;
        }
        for more in other.endpoints {
            match self.endpoints.iter_mut().find(|e| e.address == more.address) {
                Some(endpoint) => endpoint.add(more),
                None => self.endpoints.push(more),
            }
        }
        // A worker that has not heard yet says nothing against one that has.
        self.unavailable = if self.endpoints.is_empty() { other.unavailable } else { None };
        self.totals.add(&other.totals);
        self.connect.add(&other.connect);
    }
}

impl UpstreamTotals {
    fn add(&mut self, other: &Self) {
        self.connections += other.connections;
        self.dialing += other.dialing;
        self.streams += other.streams;
        self.waiting += other.waiting;
        self.connections_opened += other.connections_opened;
        self.connect_failures += other.connect_failures;
        self.streams_opened += other.streams_opened;
        self.streams_failed += other.streams_failed;
        self.ejections += other.ejections;
    }
}

impl EndpointReport {
    fn add(&mut self, other: Self) {
        self.streams += other.streams;
        self.connections += other.connections;
        self.available += other.available;
        self.ejected += other.ejected;
        self.unhealthy += other.unhealthy;
        if self.last_error.is_empty() {
            self.last_error = other.last_error;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(address: &str, ejected: usize) -> EndpointReport {
        EndpointReport { address: address.to_owned(), ejected, available: 1 - ejected, ..Default::default() }
    }

    #[test]
    fn reports_of_workers_are_added_up_by_endpoint() {
        let totals = UpstreamTotals { streams: 2, ..UpstreamTotals::default() };
        let one = UpstreamReport {
            endpoints: vec![endpoint("a:1", 0), endpoint("b:1", 1)],
            totals,
            ..Default::default()
        };
        let other = UpstreamReport { endpoints: vec![endpoint("b:1", 0)], totals, ..Default::default() };
        let mut both = UpstreamReport::default();
        both.add(one);
        both.add(other);
        assert_eq!(both.endpoints.len(), 2);
        assert_eq!((both.endpoints[1].available, both.endpoints[1].ejected), (1, 1));
        assert_eq!((both.totals.streams, both.unavailable), (4, None));
    }
}
