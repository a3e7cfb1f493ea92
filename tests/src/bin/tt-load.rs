//! The load generator of the benchmarks; `tunnel_tests::load` does the work. It prints `ready` and an outcome on
//! standard output, errors on standard error, and exits with 0 only if there were none.

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use clap::{Parser, Subcommand};
use tunnel_tests::load::{Workload, client, server};

/// Make TCP traffic, check every byte of it, and say how long it took.
#[derive(Debug, Parser)]
#[command(name = "tt-load", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Be the target of every workload.
    ///
    /// Prints "ready" when all ports listen, and serves until it is killed. What goes wrong with a connection is said
    /// on standard error, and its client sees a reset.
    Serve {
        /// Address to listen at.
        #[arg(long, value_name = "IP")]
        listen: IpAddr,
        /// First of five ports: echo, sink, source, messages and soak, in this order.
        #[arg(long, value_name = "PORT")]
        base_port: u16,
    },
    /// Do something to a server, and print what came of it as one line of JSON.
    ///
    /// Connects, warms up, prints "ready" and waits for a line; measures, prints the outcome and waits for a line with
    /// its connections open; closes them, and checks that they end well. The end of standard input is its end.
    Run {
        /// Where the server is: its address and its base port.
        #[arg(long, value_name = "IP:PORT")]
        to: SocketAddr,
        /// What to do: ping-pong:SIZE, connect:AT_ONCE, first-byte, up:STREAMS, down:STREAMS,
        /// crowd:CONNECTIONS/SIZE (with /up or /down behind it, beside bulk), rate:PER_SECOND/CONNECTIONS/SIZE,
        /// idle:CONNECTIONS, or soak:CONNECTIONS.
        #[arg(long, value_name = "WORKLOAD")]
        workload: Workload,
        /// How long to measure.
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        seconds: Duration,
        /// How long to do the same beforehand; at least once in any case.
        #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "0.2")]
        warm_up: Duration,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve { listen, base_port } => server::serve(listen, base_port, ready),
        Command::Run { to, workload, seconds, warm_up } => {
            client::run(to, workload, seconds, warm_up, io::stdin().lock(), io::stdout().lock())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tt-load: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn ready() -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()
}

fn seconds(text: &str) -> Result<Duration> {
    Ok(Duration::try_from_secs_f64(text.parse()?)?)
}
