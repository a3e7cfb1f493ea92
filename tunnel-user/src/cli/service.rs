//! What a service manager says in the environment: where it is to be notified, when it takes the daemon for dead, and which
//! sockets it has opened.

use std::{
    env,
    ffi::{OsStr, OsString},
    time::Duration,
};

use crate::{
    kernel::passed,
    process::{
        exit::{Cause, Failure},
        service::{Notifier, Service},
    },
};

/// Reads the environment. A variable that is meant for another process is none.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the command line's part: what it reads is passed on as a type"
)]
pub fn read() -> Result<Service, Failure> {
    service(&|name| env::var_os(name), std::process::id())
}

fn service(variable: &dyn Fn(&str) -> Option<OsString>, pid: u32) -> Result<Service, Failure> {
    let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
    let number = |name: &str| text(name).and_then(|value| value.parse::<u64>().ok());
    let notify = variable("NOTIFY_SOCKET").filter(|address| !address.is_empty());
    let notify = notify.as_deref().map(notifier).unwrap_or_default();
    // sd_watchdog_enabled(3), sd_listen_fds(3).
    let is_ours = |name: &str| number(name).is_none_or(|named| named == u64::from(pid));
    let watchdog = number("WATCHDOG_USEC").filter(|n| *n > 0 && is_ours("WATCHDOG_PID"));
    let passed = number("LISTEN_FDS").filter(|_| number("LISTEN_PID") == Some(u64::from(pid)));
    let passed = u32::try_from(passed.unwrap_or(0)).unwrap_or(u32::MAX);
    let sockets = if passed == 0 { Ok(Vec::new()) } else { passed::take(passed) };
    let sockets = sockets.map_err(|e| {
        let what = format!("LISTEN_FDS says {passed}, and not all of them are there: {e}");
        Failure::Other(Cause::new(what, "Start it by its unit, or without LISTEN_FDS."))
    })?;
    Ok(Service {
        notify,
        watchdog: watchdog.map(Duration::from_micros),
        keeps_sockets: number("FDSTORE").is_some_and(|most| most > 0),
        sockets,
    })
}

fn notifier(address: &OsStr) -> Notifier {
    Notifier::new(address).unwrap_or_else(|error| {
        tracing::warn!(address = %address.display(), %error, "NOTIFY_SOCKET: the service manager cannot be notified");
        Notifier::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Service {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
        service(&find, 42).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn what_is_meant_for_another_process_is_not_heard() {
        let ours = read(&[("WATCHDOG_USEC", "3000000"), ("WATCHDOG_PID", "42")]);
        assert_eq!(ours.watchdog, Some(Duration::from_secs(3)));
        let others = read(&[
            ("WATCHDOG_USEC", "3000000"),
            ("WATCHDOG_PID", "7"),
            ("LISTEN_FDS", "2"),
            ("LISTEN_PID", "7"),
        ]);
        assert!(others.watchdog.is_none() && others.sockets.is_empty());
        assert!(read(&[("WATCHDOG_USEC", "3000000")]).watchdog.is_some(), "nobody is named");
        let none = read(&[("FDSTORE", "0"), ("LISTEN_FDS", "1")]);
        assert!(!none.keeps_sockets && !none.notify.is_there() && none.sockets.is_empty());
        assert!(read(&[("FDSTORE", "512")]).keeps_sockets);
    }

    #[test]
    fn a_manager_that_is_not_there_is_not_notified() {
        assert!(!read(&[("NOTIFY_SOCKET", "/nowhere/notify")]).notify.is_there());
    }
}
