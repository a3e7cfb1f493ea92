//! A host of the tests: one network namespace, with the commands, threads and futures that run in it. The namespace of
//! the test itself is not changed.
//!
//! # Invariants
//! - Its name is `tt-PID-N-ROLE`, by which `cargo xtask test` finds what a test left behind.
//! - It is removed when its guard is dropped, or when the test's process dies.

use std::{
    fs::{self, File},
    future::Future,
    io,
    net::IpAddr,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    panic,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::{Pid, getpid, getppid},
};

use crate::{
    janitor::Janitor,
    leftovers,
    sockets::{self, Socket},
};

/// Where `ip netns` keeps its names.
const FOLDER: &str = "/run/netns";
/// Who was told to end by the test's death has five seconds to do so; whoever is there then is killed by
/// id, so that the name's removal frees the namespace.
const CLEAN_UP: &str = r#"i=0; while [ -n "$(ip netns pids "$1")" ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i+1)); done
pids=$(ip netns pids "$1"); [ -z "$pids" ] || kill -9 $pids; ip netns delete "$1""#;

/// What a new namespace has from the machine's first one, and what it has on a machine where nobody has set it
/// (devinet_init_net, net/ipv4/devinet.c; tcp_sk_init, net/ipv4/tcp_ipv4.c; tcp_init, net/ipv4/tcp.c). The congestion
/// control stays the machine's: the suite is run under each.
const AS_IF_NEW: [(&str, &str); 12] = [
    ("ipv4/ip_forward", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/accept_local", "0"),
    ("ipv4/conf/default/accept_local", "0"),
    ("ipv4/conf/all/route_localnet", "0"),
    ("ipv4/conf/default/route_localnet", "0"),
    ("ipv4/conf/all/arp_ignore", "0"),
    ("ipv4/conf/default/arp_ignore", "0"),
    ("ipv4/tcp_rmem", "4096 131072 6291456"),
    ("ipv4/tcp_wmem", "4096 16384 4194304"),
    // Every test uses IPv6.
    ("ipv6/conf/all/disable_ipv6", "0"),
];

/// What a cable is made of.
const VETH: &str = "a cable takes veth devices (CONFIG_VETH; where it is a module: modprobe veth)";

/// What of the environment programs get. What a user has set besides (a proxy, a language, a folder of settings) is not
/// for them.
const ENVIRONMENT: [&str; 3] = ["PATH", "TMPDIR", "RUST_BACKTRACE"];

/// A network namespace.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    file: Arc<File>,
    janitor: Janitor,
}

/// A number for names, unique in this process.
fn next() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl NetNs {
    /// Makes one, with its loopback up.
    pub fn new(role: &str) -> Result<Self> {
        let name = format!("tt-{}-{}-{role}", getpid(), next());
        let mut janitor = Janitor::new(CLEAN_UP, &name)?;
        if let Err(e) = run(&["netns", "add", &name]) {
            // There is nothing to remove, and it says so.
            let _failed = janitor.finish();
            return Err(e);
        }
        let file = File::open(Path::new(FOLDER).join(&name))?;
        let host = Self { name, file: Arc::new(file), janitor };
        host.settings(&AS_IF_NEW)?;
        host.ip("link set lo up")?;
        Ok(host)
    }

    /// Sets what is below `/proc/sys/net` in it.
    pub fn settings(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            settings.iter().try_for_each(|(name, value)| {
                let path = Path::new("/proc/sys/net").join(name);
                fs::write(&path, value).with_context(|| format!("{}: {value}", path.display()))
            })
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip`, with words as they would be typed, in it.
    pub fn ip(&self, words: &str) -> Result<String> {
        let mut args = vec!["-n", &self.name];
        args.extend(words.split_whitespace());
        run(&args)
    }

    /// Joins two hosts with a cable; each end has these addresses.
    pub fn join(&self, mine: &[&str], other: &Self, theirs: &[&str]) -> Result<()> {
        let number = next();
        let ends = [format!("tt{}a{number}", getpid()), format!("tt{}b{number}", getpid())];
        self.ip(&format!("link add {} type veth peer name {} netns {}", ends[0], ends[1], other.name))
            .context(VETH)?;
        for (host, end, addresses) in [(self, &ends[0], mine), (other, &ends[1], theirs)] {
            for address in addresses {
                host.add_address(address, end)?;
            }
            host.ip(&format!("link set {end} up"))?;
        }
        Ok(())
    }

    /// A network that takes what is sent to `address`, and never answers.
    pub fn add_hole(&self, network: &str, address: IpAddr) -> Result<()> {
        let number = next();
        let (mouth, end) = (format!("tt{}a{number}", getpid()), format!("tt{}b{number}", getpid()));
        self.ip(&format!("link add {mouth} type veth peer name {end}")).context(VETH)?;
        self.ip(&format!("link set {end} up"))?;
        self.ip(&format!("link set {mouth} up"))?;
        self.ip(&format!("route add {network} dev {mouth}"))?;
        // Nobody has this hardware address, so nobody takes the packets; and nobody is asked for it.
        self.ip(&format!("neigh add {address} lladdr 02:00:00:00:00:99 dev {mouth}")).map(drop)
    }

    /// Has TCP connections from and to its own addresses use this congestion control, whatever the host's default is: its
    /// IPv4 routes name it, as far as there are any yet, for whoever connects and for whoever accepts. What goes over
    /// 127.0.0.0/8 and whatever has no such route gets reno, which every kernel has. False: this kernel has no `name`.
    ///
    /// A namespace's own default may only be what the host's `tcp_allowed_congestion_control` lists; a route may name
    /// whatever the kernel has, and it loads what is a module (`tcp_ca_get_key_by_name`, net/ipv4/tcp_cong.c).
    pub fn congestion_control(&self, name: &str) -> Result<bool> {
        const FOLDER: &str = "/proc/sys/net/ipv4";
        let default = format!("{FOLDER}/tcp_congestion_control");
        self.run(|| fs::write(&default, "reno")).context(default)?;
        for table in ["main", "local"] {
            let routes = self.ip(&format!("-4 route show table {table}"))?;
            // What goes over 127.0.0.0/8 is left out because a route would prevail over what a socket is given before it
            // connects (tcp_connect_init, net/ipv4/tcp_output.c), and captured ones are given theirs then.
            let routes =
                routes.lines().filter(|route| !route.contains(" 127.") && !route.starts_with("broadcast"));
            for route in routes {
                // Said of a route whose device has only just come up; `ip` does not take it back.
                let route = route.replace("linkdown", "");
                let Err(error) = self.ip(&format!("-4 route change {route} table {table} congctl {name}"))
                else {
                    continue;
                };
                let available = format!("{FOLDER}/tcp_available_congestion_control");
                let available = fs::read_to_string(&available).context(available)?;
                if available.split_whitespace().any(|known| known == name) {
                    return Err(error);
                }
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives a device an address, usable at once.
    pub fn add_address(&self, address: &str, device: &str) -> Result<()> {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("address add {address} dev {device} {nodad}")).map(drop)
    }

    /// A command that will run in it, and be killed with the thread that spawned it (the kernel's
    /// definition of a parent, see prctl(2)). Everything but the network is this machine's, `/sys` included.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        self.command_ended_by(program, Signal::SIGKILL)
    }

    /// Like [`command`](Self::command), for a program that cleans up on another signal.
    pub fn command_ended_by(&self, program: impl AsRef<Path>, signal: Signal) -> Command {
        let mut command = plain(program);
        command.stdin(Stdio::null());
        let (namespace, parent) = (Arc::clone(&self.file), getpid());
        let enter = move || enter(&namespace, parent, signal);
        // SAFETY: between fork and exec the closure makes system calls only; it does not allocate.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs `work` in it, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = &self.file;
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
                work()
            });
            inside.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
        })
    }

    /// Starts a thread in it; threads that it starts are there too.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<thread::JoinHandle<T>> {
        let namespace = Arc::clone(&self.file);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
            // The thread must not keep the namespace longer than its own network does.
            drop(namespace);
            work()
        })
    }

    /// Runs a future to its end in it, on a current-thread runtime.
    pub fn block_on<F: Future>(&self, future: impl FnOnce() -> F + Send) -> F::Output
    where
        F::Output: Send,
    {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime takes two descriptors");
            tokio::task::LocalSet::new().block_on(&runtime, future())
        })
    }

    /// Its TCP sockets.
    pub fn sockets(&self) -> Result<Vec<Socket>> {
        self.run(sockets::table)
    }

    /// Whether something listens on `port`.
    pub fn listens(&self, port: u16) -> Result<bool> {
        Ok(self.sockets()?.iter().any(|s| s.listens() && s.local.port() == port))
    }

    /// Whether somebody has this port for UDP.
    pub fn takes_udp(&self, port: u16) -> Result<bool> {
        let read = |which| fs::read_to_string(format!("/proc/thread-self/net/{which}"));
        let text = self.run(|| Ok::<_, io::Error>(read("udp")? + &read("udp6").unwrap_or_default()))?;
        let port = format!(":{port:04X}");
        Ok(text.lines().filter_map(|line| line.split_whitespace().nth(1)).any(|local| local.ends_with(&port)))
    }

    /// The processes that are in it.
    pub fn processes(&self) -> Result<Vec<leftovers::Found>> {
        leftovers::in_namespace(&self.file)
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        let cleaned = self.janitor.finish().and_then(|()| {
            let path = PathBuf::from(FOLDER).join(&self.name);
            ensure!(!path.exists(), "{} is still there", path.display());
            Ok(())
        });
        leftovers::report(&self.name, cleaned);
    }
}

/// A command whose environment is that of no user in particular.
pub fn plain(program: impl AsRef<Path>) -> Command {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let kept = std::env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        // With what `cargo xtask test` finds them by.
        ENVIRONMENT.contains(&&*name) || name.starts_with("TUNNEL_")
    });
    let mut command = Command::new(program.as_ref());
    command.env_clear().envs(kept);
    // What is logged is searched, and what programs say is read.
    command.env("NO_COLOR", "1").env("LC_ALL", "C").env("TZ", "UTC").env("HOME", "/nonexistent");
    command
}

/// What a child does before it becomes the program.
fn enter(namespace: &File, parent: Pid, signal: Signal) -> io::Result<()> {
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
    set_pdeathsig(signal)?;
    // The parent may have died before the line above.
    if getppid() != parent {
        return Err(io::ErrorKind::Interrupted.into());
    }
    Ok(())
}

/// Runs `ip`.
fn run(args: &[&str]) -> Result<String> {
    let output = Command::new("ip")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .context("ip (iproute2) does not start")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    /// What somebody has set on this machine changes no test.
    #[test]
    fn a_host_has_what_a_new_machine_has_whatever_this_one_was_set_to() -> Result<()> {
        let host = NetNs::new("new")?;
        for (name, value) in AS_IF_NEW {
            let is = host.run(|| fs::read_to_string(Path::new("/proc/sys/net").join(name)))?;
            assert_eq!(is.split_whitespace().collect::<Vec<_>>().join(" "), value, "{name}");
        }
        Ok(())
    }

    /// What a user has set for programs (a proxy, a language, a time zone) changes no test.
    #[test]
    fn programs_on_a_host_get_the_environment_of_no_user_in_particular() -> Result<()> {
        let host = NetNs::new("env")?;
        let given = process::output(&mut host.command("env"))?;
        for line in given.lines() {
            let name = line.split('=').next().unwrap_or_default();
            let ours = ["NO_COLOR", "LC_ALL", "TZ", "HOME"].contains(&name) || name.starts_with("TUNNEL_");
            assert!(ours || ENVIRONMENT.contains(&name), "{line}");
        }
        assert!(given.lines().any(|line| line == "LC_ALL=C"), "{given}");
        Ok(())
    }
}
