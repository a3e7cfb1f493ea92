//! `tunnel run` and `tunnel gateway`: a daemon from its start to its end.
//!
//! # Invariants
//! - Whatever asks for another state (the file, SIGHUP, a daemon that takes over) is heard by one loop, one after the other.

use std::{os::unix::net::UnixStream, path::Path, pin::pin, time::Duration};

use super::{
    Options, Running, admin, attach::Attachments, begin, control_runtime, file::ConfigFile,
    lifecycle::Lifecycle, other, workers::not_confined,
};
use crate::{
    admin::{Admin, Bound, Command},
    config::Config,
    daemon::takeover::{self, Offer, TakeoverError},
    kernel::confine,
    process::{
        drain::Phase,
        exit::Failure,
        service::Service,
        signal::{Hangup, Reopen, Terminate},
    },
};

/// Why it ends, where another daemon goes on.
const TAKEN_OVER: &str = "another daemon has taken over";
/// How often the place where the next daemon can take over is tried, while the last one has it.
const OFFER_RETRY: Duration = Duration::from_millis(100);

/// What a running daemon is asked.
enum Event {
    Stop(&'static str),
    /// `asked`: by somebody who wants to hear of it.
    Reload {
        asked: bool,
    },
    TakeOver(Result<UnixStream, TakeoverError>),
    ReopenLogs,
    FeedWatchdog,
    Asked(Command),
    /// What a group that was attached was to end with has ended.
    Expired(String),
}

/// Until a signal ends it, or another daemon takes over. A second signal ends the draining. `file` names the daemon: the
/// one that replaces it is started with the same.
pub fn run(config: Config, file: Option<&Path>, take_over: bool, service: Service) -> Result<(), Failure> {
    if config.daemon.bootstrap.sandbox {
        // Every thread that is started from here on has no more.
        confine::control_thread().map_err(|e| not_confined("the control thread", &e))?;
    }
    let runtime = control_runtime()?;
    runtime.block_on(async {
        let signal_failed = |e| other(&format!("signals: {e}"));
        let mut signals = Terminate::new().map_err(signal_failed)?;
        let mut hangup = Hangup::new().map_err(signal_failed)?;
        let mut reopen = Reopen::new().map_err(signal_failed)?;
        // Before it is used: a change in between is seen.
        let mut source = file.map(|file| ConfigFile::new(file, config.daemon.watch));
        // From here on the old daemon only waits for this one: what is attached to it stays what it is.
        let old = replaced(file.filter(|_| take_over))?;
        let bound = admin::bind(&config, file, old.is_some())?;
        let (mut lifecycle, passed) = Lifecycle::new(service, &config)?;
        let mut attachments = Attachments::new(bound.as_ref().and_then(Bound::socket), file, &config);
        let options = Options { attached: attachments.layer()?, taken: passed, ..Options::default() };
        let (mut running, took_over) = start(config, old, options)?;
        running.workers.in_force().await;
        // The listeners are this daemon's by now: it does its work without.
        let mut admin = bound.and_then(|bound| {
            let served = running.serve_admin(bound, file);
            served.inspect_err(|error| tracing::error!(%error, "there is no admin interface")).ok()
        });
        lifecycle.ready(&running, took_over);
        let mut offer = None;
        let why = loop {
            let event = tokio::select! {
                why = signals.next() => Event::Stop(why),
                () = running.watch_captures() => return Ok(()),
                () = hangup.next() => Event::Reload { asked: true },
                () = lifecycle.watchdog_due() => Event::FeedWatchdog,
                () = reopen.next() => Event::ReopenLogs,
                () = changed(&mut source) => Event::Reload { asked: false },
                stream = requested(file, &mut offer) => Event::TakeOver(stream),
                command = asked(&mut admin) => Event::Asked(command),
                group = attachments.expired() => Event::Expired(group),
            };
            match (event, &mut source) {
                (Event::Stop(why), _) => break why,
                (Event::Reload { asked }, Some(source)) => {
                    lifecycle.reloading();
                    let in_force = source.reload(&mut running, asked).await;
                    lifecycle.reloaded(&running, in_force);
                }
                (Event::FeedWatchdog, _) => lifecycle.feed_watchdog(&mut running),
                (Event::Reload { .. }, None) => {
                    lifecycle.reloading();
                    tracing::warn!("SIGHUP: there is no configuration file to read again");
                    lifecycle.reloaded(&running, true);
                }
                (Event::ReopenLogs, _) => running.reopen_access_logs(),
                // Whoever was told that nobody answers must not find it done later.
                (Event::Asked(Command::Attach(wanted, tell)), _) if !tell.is_closed() => {
                    let _gone = tell.send(attachments.attach(&mut running, wanted).await);
                }
                (Event::Asked(Command::Detach(which, tell)), _) if !tell.is_closed() => {
                    let _gone = tell.send(attachments.detach(&mut running, &which).await);
                }
                (Event::Expired(group), _) => attachments.expire(&mut running, &group).await,
                (Event::Asked(command), _) => {
                    if let Some(why) = running.answer(command) {
                        break why;
                    }
                }
                (Event::TakeOver(Err(e)), _) => tracing::warn!("{e}"),
                (Event::TakeOver(Ok(stream)), _) => {
                    // The new daemon makes the same offer as soon as it runs.
                    offer = None;
                    if let Some(why) = give(&mut running, stream, &mut lifecycle, &mut signals).await {
                        break why;
                    }
                }
            }
        };
        drop((offer, source));
        tracing::info!("{why}: draining");
        admin.iter_mut().for_each(Admin::close_commands);
        if why == TAKEN_OVER {
            // What asks there is for the other daemon, and may be far from this one.
            admin.iter_mut().for_each(Admin::close_tcp);
        } else {
            running.release(&attachments.forget());
        }
        lifecycle.stopping(why, running.config.daemon.drain_timeout);
        // The admin interface is there until the last flow has ended.
        let stopped = stop(running, &mut signals).await;
        drop(admin);
        stopped
    })
}

/// Gives the listeners to a daemon that replaces this one, which takes its time; why this one ends, if it does.
async fn give(
    running: &mut Running,
    stream: UnixStream,
    lifecycle: &mut Lifecycle,
    signals: &mut Terminate,
) -> Option<&'static str> {
    let given = match running.give(stream) {
        Ok(given) => given,
        Err(e) => {
            tracing::warn!("{e}");
            return None;
        }
    };
    let mut given = pin!(given);
    loop {
        tokio::select! {
            // Dropped, it is over: the other side hears of it.
            why = signals.next() => return Some(why),
            () = lifecycle.watchdog_due() => lifecycle.feed_watchdog(running),
            given = given.as_mut() => match given {
                Ok(()) => return Some(TAKEN_OVER),
                Err(e) => {
                    tracing::warn!("{e}");
                    return None;
                }
            }
        }
    }
}

/// What a daemon of this file hands over, if one runs.
fn replaced(file: Option<&Path>) -> Result<Option<takeover::Taken>, Failure> {
    let Some(file) = file else { return Ok(None) };
    let old = takeover::take(file).map_err(|e| other(&e.to_string()))?;
    if old.is_none() {
        tracing::warn!("no daemon runs with this configuration file: nothing to take over");
    }
    Ok(old)
}

/// Starts, in place of the daemon `old` if there is one; whether it has taken over from one. Of `options` the sockets are
/// those of the service manager.
fn start(
    config: Config,
    old: Option<takeover::Taken>,
    mut options: Options<'_>,
) -> Result<(Running, bool), Failure> {
    let (mut taken, old) = match old {
        Some(takeover::Taken { listeners, groups, done }) => {
            options.groups = groups;
            (listeners, Some(done))
        }
        None => Default::default(),
    };
    for (address, sockets) in options.taken {
        // The daemon before has them, too.
        taken.entry(address).or_insert(sockets);
    }
    options.taken = taken;
    let starting = begin(config, options)?;
    for address in starting.addresses() {
        tracing::info!(%address, "listening");
    }
    let took_over = old.is_some();
    if let Some(old) = old {
        // It may go on without us: it gave up waiting, or was told to stop. What is begun is taken back then.
        old.done().map_err(|e| other(&format!("the old daemon no longer hands over: {e}")))?;
        tracing::info!("took over from the old daemon");
    }
    Ok((starting.commit(), took_over))
}

/// Drains, until a second signal.
async fn stop(running: Running, signals: &mut Terminate) -> Result<(), Failure> {
    let trigger = running.workers.trigger().clone();
    let stopped = tokio::task::spawn_blocking(move || running.stop());
    tokio::pin!(stopped);
    let ended = tokio::select! {
        ended = &mut stopped => ended,
        _ = signals.next() => {
            tracing::info!("a second signal: no longer draining");
            trigger.enter(Phase::Stop);
            stopped.await
        }
    };
    ended.map(drop).map_err(|e| other(&format!("stopping failed: {e}")))
}

/// Waits for a daemon that wants to take over.
async fn requested(file: Option<&Path>, offer: &mut Option<Offer>) -> Result<UnixStream, TakeoverError> {
    let Some(file) = file else { return std::future::pending().await };
    let mut said = false;
    loop {
        if let Some(offer) = offer {
            return offer.requested().await;
        }
        match Offer::open(file) {
            Ok(open) => *offer = Some(open),
            Err(e) => {
                // The daemon that this one has replaced lets go in a moment.
                if !said && !matches!(e, TakeoverError::Taken) {
                    tracing::warn!("no other daemon can take over from this one: {e}");
                    said = true;
                }
                tokio::time::sleep(OFFER_RETRY).await;
            }
        }
    }
}

/// What the admin interface asks.
async fn asked(admin: &mut Option<Admin>) -> Command {
    match admin {
        Some(admin) => admin.command().await,
        None => std::future::pending().await,
    }
}

/// Ready when the file may have changed.
async fn changed(source: &mut Option<ConfigFile>) {
    match source {
        Some(source) => source.changed().await,
        None => std::future::pending().await,
    }
}
