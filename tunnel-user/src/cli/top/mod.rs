//! `tunnel top`: the flows of a running daemon by their rate, its upstreams, and its throughput over time, kept up to date.
//!
//! # Invariants
//! - Whatever ends it, but SIGKILL, the terminal is as it was: not raw, its own screen, the cursor visible.
//! - A daemon is asked again only when it has answered, and is left alone for at least `REST` times as long as it took.

mod model;
mod screen;
mod terminal;

use std::{
    io::{self, IsTerminal as _},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use self::{
    model::{Doing, Model, Sample, Sort},
    terminal::{Screen, Typed},
};
use super::client::{Client, DaemonArgs};
use crate::{
    config::parse_duration,
    process::exit::{Cause, Failure},
};

/// An answer with 100,000 flows takes a daemon's admin thread some seconds: four fifths of its time are not ours.
const REST: u32 = 4;
/// Samples, keys and answers that wait to be shown.
const WAITING_MAX: usize = 16;

/// Arguments of `tunnel top`.
#[derive(Debug, Args)]
#[command(after_help = "\
Keys: q quit; r, b, a sort by rate, bytes or age; / filter, Esc clear it; space pause;
      up, down, page up, page down select; k end the selected flow, after y

Examples:
  sudo tunnel top
  sudo tunnel top --sort bytes --filter 10.0.0.5:
  sudo tunnel top --once --json | jq '.flows[:10]'")]
pub struct TopArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// By what flows are sorted at first.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Only flows that have this text in their ID, client, destination, source, upstream, endpoint, identity or path.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    filter: String,
    /// How often the daemon is asked.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    interval: Duration,
    /// Ask twice, an interval apart, print the result, and exit.
    #[arg(long)]
    once: bool,
    /// Print JSON; with --once.
    #[arg(long, requires = "once")]
    json: bool,
}

/// What the loop waits for.
enum News {
    Sample(Result<Box<Sample>, String>),
    Typed(io::Result<Typed>),
    /// What became of a flow that was to end.
    Ended(Result<String, String>),
}

/// Shows it until it is ended; with `--once`, the text to print.
pub fn run(args: &TopArgs) -> Result<String, Failure> {
    // An interval of nothing is no interval.
    let interval = args.interval.max(Duration::from_millis(100));
    let client = Client::new(&args.daemon)?;
    let mut model = Model::new(args.sort, args.filter.clone());
    model.take(sample(&client)?);
    if args.once {
        pause(interval);
        model.take(sample(&client)?);
        return Ok(if args.json { model.json() } else { screen::text(&model) });
    }
    if !io::stdout().is_terminal() {
        let what = "standard output is not a terminal";
        return Err(Failure::Other(Cause::new(
            what,
            "For a program that reads it: tunnel top --once --json.",
        )));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| failed(&e))?;
    runtime.block_on(show(&client, model, interval)).map_err(|e| failed(&e))?;
    Ok(String::new())
}

fn failed(e: &io::Error) -> Failure {
    Failure::Other(Cause::new(format!("the terminal: {e}"), ""))
}

/// What a daemon says now.
fn sample(client: &Client) -> Result<Sample, Failure> {
    Ok(Sample { status: client.read("/status")?, flows: client.read("/flows")?, at: Instant::now() })
}

#[expect(clippy::disallowed_methods, reason = "a thread that has nothing else to do, and no worker")]
fn pause(duration: Duration) {
    thread::sleep(duration);
}

async fn show(client: &Client, mut model: Model, interval: Duration) -> io::Result<()> {
    let (tell, mut told) = mpsc::channel(WAITING_MAX);
    let mut end = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    // Keys make none of a raw terminal; somebody else may send them.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut screen = Screen::open()?;
    // Both threads end with the process, which has nothing to do after this.
    let (asking, asked) = (client.clone(), tell.clone());
    thread::Builder::new().name("daemon".to_owned()).spawn(move || keep_asking(&asking, interval, &asked))?;
    let typing = tell.clone();
    thread::Builder::new().name("keys".to_owned()).spawn(move || {
        loop {
            let typed = terminal::typed();
            let ends = typed.is_err();
            if typing.blocking_send(News::Typed(typed)).is_err() || ends {
                return;
            }
        }
    })?;
    loop {
        screen.draw(&mut model)?;
        let news = tokio::select! {
            news = told.recv() => news,
            _ = end.recv() => return Ok(()),
            _ = hang_up.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = quit.recv() => return Ok(()),
        };
        let doing = match news {
            // Somebody holds the other end: we do.
            None => return Ok(()),
            Some(News::Sample(Ok(sample))) => {
                model.take(*sample);
                Doing::Showing
            }
            Some(News::Sample(Err(why))) => {
                model.lost(why);
                Doing::Showing
            }
            Some(News::Ended(what)) => {
                model.say(what);
                Doing::Showing
            }
            // Without keys, nobody could end it.
            Some(News::Typed(typed)) => match typed? {
                Typed::Resized => Doing::Showing,
                Typed::Key(key) => model.key(key),
            },
        };
        match doing {
            Doing::Showing => {}
            Doing::Quitting => return Ok(()),
            Doing::Ending(id) => {
                let (client, tell) = (client.clone(), tell.clone());
                thread::Builder::new().name("kill".to_owned()).spawn(move || {
                    let ended = client.post(&format!("/flows/{id}/kill"));
                    let what = ended.map(|_| format!("ended flow {id}")).map_err(|e| e.to_string());
                    // Where nobody is there any more, nobody wants to know.
                    let _gone = tell.blocking_send(News::Ended(what));
                })?;
            }
        }
    }
}

/// Until nobody listens.
fn keep_asking(client: &Client, interval: Duration, tell: &mpsc::Sender<News>) {
    loop {
        let begun = Instant::now();
        let sample = sample(client).map(Box::new).map_err(|e| e.to_string());
        let took = begun.elapsed();
        if tell.blocking_send(News::Sample(sample)).is_err() {
            return;
        }
        pause(interval.max(took * REST));
    }
}
