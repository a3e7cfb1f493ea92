//! The load generator: a [`Workload`], as `tt-load run` takes it on its command line, and its [`Outcome`], one line of
//! JSON.
//!
//! `tt-load run` and the process that started it take turns, so that processor time can be read at the right moments:
//! it connects, warms up, writes `ready` and waits for a line; measures, writes the outcome, and waits for another line
//! with its connections still open; closes them, checks that they end well, and exits with 0.
//!
//! # Invariants
//! - Every byte that an outcome counts was received and checked by the other side. A deviation is an error, never a
//!   smaller number.

mod buffer;
pub mod client;
pub mod driver;
mod latency;
mod message;
mod pace;
pub mod server;
mod soak;
mod stream;
#[cfg(test)]
mod tests;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The ports of `tt-load serve`, from its base port on.
pub mod port {
    /// Sends back what comes.
    pub const ECHO: u16 = 0;
    /// Takes what comes, checks it, and answers each mark with how much it was.
    pub const SINK: u16 = 1;
    /// Sends as long as it is asked to.
    pub const SOURCE: u16 = 2;
    /// Answers each request of a fixed size when it is complete.
    pub const MESSAGES: u16 = 3;
    /// Sends and receives at once, in random sizes.
    pub const SOAK: u16 = 4;
    /// How many there are.
    pub const COUNT: u16 = 5;
}

/// What to do to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Workload {
    /// One connection, one message of `size` bytes there and back at a time: `ping-pong:64`.
    PingPong {
        /// Bytes of a message.
        size: u32,
    },
    /// Connect, 64 bytes there and back, close, as often as it goes, `at_once` at a time: `connect:1`.
    Connect {
        /// Connections at a time.
        at_once: u32,
    },
    /// Connect, one byte there, and the time until the first byte back, one at a time: `first-byte`.
    FirstByte,
    /// As many bytes as it goes, on this many connections: `up:4`, `down:16`.
    Bulk {
        /// Connections.
        streams: u32,
        /// Which way.
        direction: Direction,
    },
    /// On each of so many connections one message of `size` bytes there and back at a time; beside them one connection
    /// that carries as many bytes as it goes, this way, or none: `crowd:99/64`, `crowd:99/64/up`. Latency is that of
    /// messages.
    Crowd {
        /// Connections with messages.
        connections: u32,
        /// Bytes of a message.
        size: u32,
        /// Which way the bulk goes.
        bulk: Option<Direction>,
    },
    /// Requests and answers of `size` bytes on `connections`, started `per_second` whatever the answers do:
    /// `rate:2000/100/16384`. Latency counts from when a request should have started.
    Rate {
        /// Requests per second, over all connections.
        per_second: u32,
        /// Connections.
        connections: u32,
        /// Bytes of a request, and of its answer.
        size: u32,
    },
    /// Connections that do nothing once they are there and have carried 64 bytes both ways: `idle:10000`.
    Idle {
        /// Connections.
        connections: u32,
    },
    /// Both directions of so many connections at once, in random sizes and with random pauses, by programs that block and
    /// by one that does not; every byte is compared: `soak:8`.
    Soak {
        /// Connections.
        connections: u32,
    },
}

/// Which way bulk goes, seen from the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the server.
    Up,
    /// From it.
    Down,
}

/// What came of it. Times are of the measured part only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How long it was measured; of idle connections, how long it took to make them.
    pub seconds: f64,
    /// Round trips, connections or requests that were completed, or connections that are idle; 0 for bulk and soak.
    pub operations: u64,
    /// Payload bytes that the server has received and checked.
    pub bytes_up: u64,
    /// Payload bytes that the client has received and checked.
    pub bytes_down: u64,
    /// How long operations took; nothing for bulk, soak and idle.
    pub latency: Option<Latency>,
}

/// A distribution of durations, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// How many were recorded.
    pub count: u64,
    /// Half took no longer.
    pub p50: u64,
    /// 90 % took no longer.
    pub p90: u64,
    /// 99 % took no longer.
    pub p99: u64,
    /// 99.9 % took no longer.
    pub p999: u64,
    /// None took longer.
    pub max: u64,
    /// The whole of it, for plots: `(quantile, nanoseconds)`, both rising, from the fastest to the slowest.
    pub curve: Vec<(f64, u64)>,
}

/// A word that names no workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownWorkload(String);

impl fmt::Display for UnknownWorkload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\"{}\" is none of ping-pong:SIZE, connect:AT_ONCE, first-byte, up:STREAMS, down:STREAMS, \
             crowd:CONNECTIONS/SIZE, crowd:CONNECTIONS/SIZE/up, crowd:CONNECTIONS/SIZE/down, \
             rate:PER_SECOND/CONNECTIONS/SIZE, idle:CONNECTIONS, soak:CONNECTIONS (with numbers from 1)",
            self.0
        )
    }
}

impl std::error::Error for UnknownWorkload {}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PingPong { size } => write!(f, "ping-pong:{size}"),
            Self::Connect { at_once } => write!(f, "connect:{at_once}"),
            Self::FirstByte => f.write_str("first-byte"),
            Self::Bulk { streams, direction: Direction::Up } => write!(f, "up:{streams}"),
            Self::Bulk { streams, direction: Direction::Down } => write!(f, "down:{streams}"),
            Self::Crowd { connections, size, bulk } => {
                let bulk = match bulk {
                    None => "",
                    Some(Direction::Up) => "/up",
                    Some(Direction::Down) => "/down",
                };
                write!(f, "crowd:{connections}/{size}{bulk}")
            }
            Self::Rate { per_second, connections, size } => {
                write!(f, "rate:{per_second}/{connections}/{size}")
            }
            Self::Idle { connections } => write!(f, "idle:{connections}"),
            Self::Soak { connections } => write!(f, "soak:{connections}"),
        }
    }
}

impl FromStr for Workload {
    type Err = UnknownWorkload;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.parse::<u32>().ok().filter(|n| *n > 0);
        let (name, of) = text.split_once(':').unwrap_or((text, ""));
        let bulk = |direction| Some(Self::Bulk { streams: number(of)?, direction });
        let rate = || {
            let mut numbers = of.split('/').map(number);
            let all = (numbers.next()??, numbers.next()??, numbers.next()??);
            let (per_second, connections, size) = all;
            numbers.next().is_none().then_some(Self::Rate { per_second, connections, size })
        };
        let crowd = || {
            let mut words = of.split('/');
            let (connections, size) = (number(words.next()?)?, number(words.next()?)?);
            let bulk = match words.next() {
                None => None,
                Some("up") => Some(Direction::Up),
                Some("down") => Some(Direction::Down),
                Some(_) => return None,
            };
            words.next().is_none().then_some(Self::Crowd { connections, size, bulk })
        };
        match name {
            "ping-pong" => number(of).map(|size| Self::PingPong { size }),
            "connect" => number(of).map(|at_once| Self::Connect { at_once }),
            "first-byte" => of.is_empty().then_some(Self::FirstByte),
            "up" => bulk(Direction::Up),
            "down" => bulk(Direction::Down),
            "crowd" => crowd(),
            "rate" => rate(),
            "idle" => number(of).map(|connections| Self::Idle { connections }),
            "soak" => number(of).map(|connections| Self::Soak { connections }),
            _ => None,
        }
        .ok_or_else(|| UnknownWorkload(text.to_owned()))
    }
}

impl From<Workload> for String {
    fn from(workload: Workload) -> Self {
        workload.to_string()
    }
}

impl TryFrom<String> for Workload {
    type Error = UnknownWorkload;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod words {
    use super::*;

    #[test]
    fn a_workload_is_what_its_word_says_and_nothing_else_is_one() {
        let words =
            ["ping-pong:64", "connect:1", "first-byte", "up:4", "down:16", "rate:2000/100/16384", "idle:9"];
        for word in words.into_iter().chain(["crowd:99/64", "crowd:99/64/up", "crowd:1/1/down", "soak:3"]) {
            assert_eq!(word.parse::<Workload>().map(|w| w.to_string()), Ok(word.to_owned()));
        }
        let words =
            ["", "ping-pong", "ping-pong:0", "up:-1", "rate:1/2", "rate:1/2/3/4", "first-byte:1", "idle:x"];
        for word in words.into_iter().chain(["crowd:1", "crowd:0/64", "crowd:1/64/", "crowd:1/64/up/up"]) {
            assert_eq!(word.parse::<Workload>(), Err(UnknownWorkload(word.to_owned())));
        }
    }
}
