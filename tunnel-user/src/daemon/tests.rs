//! A change that fails at any of its steps leaves everything as it was.
//!
//! With real sockets and real kernel programs; the failures are injected before each step in turn.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

use super::{
    Running, begin_by, other,
    reconcile::{Step, proceed},
};
use crate::{
    cli::pki::{self, IssueRequest},
    config::{CheckFiles, Config},
    daemon::Options,
    kernel::sys,
    process::exit::Failure,
};

/// Addresses and folders of one daemon.
struct Host {
    dir: TempDir,
    /// Nobody listens there.
    addresses: [SocketAddr; 4],
}

impl Host {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "capturing takes root: run the tests as root");
        let dir = tempfile::tempdir().expect("a folder");
        pki::init(dir.path(), false).expect("a CA");
        for name in ["one", "other"] {
            let id = format!("spiffe://example.org/{name}").parse().expect("a SPIFFE ID");
            pki::issue(dir.path(), name, &IssueRequest::new(id), false).expect("a certificate");
        }
        let listeners = [(); 4].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let addresses = listeners.each_ref().map(|l| l.local_addr().expect("its address"));
        Self { dir, addresses }
    }

    /// The configuration before, or the one that differs in everything.
    fn config(&self, differs: bool) -> Config {
        let [plain, tls, more, redirect] = self.addresses;
        // The groups do not exist: programs are attached where the hierarchy is mounted, and capture nobody.
        let mounts = fs::read_to_string("/proc/self/mounts").expect("the kernel says");
        let mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let cgroup2 =
            mounts.into_iter().find(|m| m[2] == "cgroup2").expect("cgroup2 is mounted")[1].to_owned();
        let (dir, pid) = (self.dir.path().display(), std::process::id());
        let name = if differs { "other" } else { "one" };
        let mut text = format!(
            "[daemon]\nworkers = 2\nbpffs = \"{dir}/bpf\"\n\
             [identity]\ncert = \"{dir}/{name}.pem\"\nkey = \"{dir}/{name}-key.pem\"\nca = \"{dir}/ca.pem\"\n\
             [[listener]]\naddress = \"{plain}\"\ntls = false\ndial_timeout = \"{timeout}\"\n\
             [[listener]]\naddress = \"{tls}\"\n\
             [[capture]]\ncgroup = \"{cgroup2}/tunnel-{pid}-one\"\ninclude = [\"{net}\"]\n\
             [[route]]\nto = \"direct\"\n\
             [[upstream]]\nname = \"one\"\nendpoints = [\"192.0.2.1:1\"]\n",
            timeout = if differs { "3s" } else { "4s" },
            net = if differs { "192.0.2.0/25" } else { "192.0.2.0/24" },
        );
        if differs {
            text += &format!(
                "[[listener]]\naddress = \"{more}\"\ntls = false\n\
                 [[capture]]\nmode = \"redirect\"\nlisten = [\"{redirect}\"]\n\
                 [[capture]]\ncgroup = \"{cgroup2}/tunnel-{pid}-other\"\ninclude = [\"192.0.2.0/24\"]\n\
                 [[upstream]]\nname = \"other\"\nendpoints = [\"192.0.2.2:1\"]\ntls = false\n\
                 [[access_log]]\noutput = \"file\"\npath = \"{dir}/access.log\"\n\
                 [traces]\nendpoint = \"http://127.0.0.1:1\"\n"
            );
        }
        Config::parse(&text, Path::new("test.toml"), CheckFiles::No).unwrap_or_else(|e| panic!("{e}"))
    }

    /// What is pinned, and for a link which program is behind it.
    fn pins(&self) -> BTreeMap<PathBuf, u32> {
        let mut pins = BTreeMap::new();
        let mut folders = vec![self.dir.path().join("bpf/tunnel")];
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let link = sys::obj_get(&path).and_then(|link| sys::link_info(link.as_fd()));
                pins.insert(path, link.map_or(0, |link| link.program));
            }
        }
        pins
    }

    /// Where somebody listens.
    fn listening(&self) -> Vec<SocketAddr> {
        self.addresses.into_iter().filter(|address| TcpStream::connect(address).is_ok()).collect()
    }

    /// Everything that others can see of a daemon, and what its workers do.
    fn state(&self, running: &Running) -> (BTreeMap<PathBuf, u32>, Vec<SocketAddr>, u64, String) {
        let kept: Vec<_> = running.kept.iter().map(|(address, sockets)| (address, sockets.len())).collect();
        let known = format!("{:?} {kept:?} {}", running.config, running.captures.len());
        (self.pins(), self.listening(), running.workers.version(), known)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The daemon has mounted it; where that failed there is none.
        let _none = umount2(&self.dir.path().join("bpf"), MntFlags::MNT_DETACH);
    }
}

/// Lets so many steps be taken, and notes them.
fn until(most: usize, taken: &RefCell<Vec<Step>>) -> impl Fn(&Step) -> Result<(), Failure> {
    move |step| {
        let mut taken = taken.borrow_mut();
        if taken.len() == most {
            return Err(other("injected"));
        }
        taken.push(step.clone());
        Ok(())
    }
}

/// Every kind of step is among them.
fn assert_complete(taken: &[Step], with_changes: bool) {
    let has = |is: fn(&Step) -> bool| taken.iter().any(is);
    assert!(has(|s| matches!(s, Step::LoadIdentity(_))), "{taken:?}");
    assert!(has(|s| matches!(s, Step::Listen(_))), "{taken:?}");
    assert!(has(|s| matches!(s, Step::ListenForRedirects)), "{taken:?}");
    assert!(has(|s| matches!(s, Step::LoadCapture(_))), "{taken:?}");
    assert!(has(|s| matches!(s, Step::AddUpstream(_))), "{taken:?}");
    assert!(has(|s| matches!(s, Step::Attach(_))), "{taken:?}");
    assert_eq!(has(|s| matches!(s, Step::LoadRules(_))), with_changes, "{taken:?}");
    assert_eq!(has(|s| matches!(s, Step::ReplaceRules(_))), with_changes, "{taken:?}");
}

/// A start that fails at any step, or is begun and not committed, leaves nothing pinned and nobody listening.
#[tokio::test]
async fn a_start_that_fails_at_any_step_leaves_nothing() {
    let host = Host::new();
    for most in 0.. {
        let taken = RefCell::default();
        let begun = begin_by(host.config(true), Options::default(), &until(most, &taken));
        if let Err(e) = &begun {
            assert!(e.to_string().contains("injected"), "{e}");
        }
        let whole = begun.is_ok();
        assert!(!whole || host.pins().len() > 2, "the links of two captures, and their maps");
        drop(begun);
        assert_eq!((host.pins(), host.listening()), (BTreeMap::new(), Vec::new()), "after {taken:?}");
        if whole {
            return assert_complete(&taken.borrow(), false);
        }
    }
}

/// A reload that fails at any step changes nothing that others see and nothing that the workers do; then it succeeds.
#[tokio::test]
async fn a_reload_that_fails_at_any_step_changes_nothing() {
    let host = Host::new();
    let mut running = begin_by(host.config(false), Options::default(), &proceed).expect("it starts").commit();
    running.workers.in_force().await;
    let before = host.state(&running);
    assert_eq!(before.1, host.addresses[..2]);
    for most in 0.. {
        let taken = RefCell::default();
        match running.change(host.config(true), &until(most, &taken)) {
            Err(e) => {
                assert!(e.to_string().contains("injected"), "{e}");
                assert_eq!(host.state(&running), before, "after {taken:?}");
            }
            Ok(_) => {
                assert_complete(&taken.borrow(), true);
                break;
            }
        }
    }
    running.workers.in_force().await;
    assert_eq!(host.listening(), host.addresses);
    let after = host.state(&running);
    assert!(after.0.len() > before.0.len() && after.2 == before.2 + 1);

    // And back: what is gone is closed and unpinned.
    running.reconcile(host.config(false)).await.expect("it is as good as before");
    // A listener that has ended takes what waits first.
    while host.listening().len() > 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(host.listening(), host.addresses[..2]);
    assert_eq!(host.pins().len(), before.0.len());
    running.stop();
}
