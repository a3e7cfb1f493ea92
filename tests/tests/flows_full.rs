//! The kernel's table of flows has an end; who comes after it is refused, and nobody else notices.

use std::{ffi::CString, io, os::fd::RawFd, path::Path};

use anyhow::{Context as _, Result};
use tunnel_tests::{
    PATIENCE, Process, TARGET4, TARGET6, World,
    bpffs::BpfFs,
    cgroup::Cgroup,
    daemon::{Daemon, through},
    dialogue::ask,
    pki::GATEWAY_ID,
    process, programs, target,
};

/// `FLOWS_MAX` of tunnel-common.
const FLOWS_MAX: u64 = 1 << 18;
/// Commands of `linux/bpf.h`.
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
/// Sizes of `FlowKey` and `Origin`.
const KEY: usize = 48;
const VALUE: usize = 48;

/// A map that is pinned, filled and emptied as bpf(2) does it.
struct Map(RawFd);

impl Map {
    fn open(path: &Path) -> Result<Self> {
        #[repr(C)]
        struct Attr {
            pathname: u64,
            bpf_fd: u32,
            file_flags: u32,
        }
        const BPF_OBJ_GET: libc::c_long = 7;
        let path = CString::new(path.as_os_str().as_encoded_bytes())?;
        let fd = bpf(BPF_OBJ_GET, &Attr { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 })?;
        Ok(Self(RawFd::try_from(fd)?))
    }

    /// An entry that no connection has: namespaces have no such cookie.
    fn key(i: u64) -> [u8; KEY] {
        let mut key = [0xff; KEY];
        key[8..16].copy_from_slice(&i.to_ne_bytes());
        key
    }

    fn element(&self, command: libc::c_long, i: u64) -> io::Result<libc::c_long> {
        #[repr(C)]
        struct Attr {
            map_fd: u32,
            _hole: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let (key, value) = (Self::key(i), [0u8; VALUE]);
        // bpf(2) wants fields that a command does not use to be zero.
        let value = if command == BPF_MAP_UPDATE_ELEM { value.as_ptr() as u64 } else { 0 };
        let key = key.as_ptr() as u64;
        bpf(command, &Attr { map_fd: self.0.cast_unsigned(), _hole: 0, key, value, flags: 0 })
    }

    /// How many entries it took to fill it.
    fn fill(&self) -> Result<u64> {
        for i in 0..=FLOWS_MAX {
            match self.element(BPF_MAP_UPDATE_ELEM, i) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::E2BIG) => return Ok(i),
                Err(e) => return Err(e).context("filling"),
            }
        }
        anyhow::bail!("it has room for more than {FLOWS_MAX}")
    }

    fn empty(&self, n: u64) -> Result<()> {
        (0..n).try_for_each(|i| self.element(BPF_MAP_DELETE_ELEM, i).map(drop)).context("emptying")
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let _closed = nix::unistd::close(self.0);
    }
}

fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` for this command; what it points to lives for the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// When the kernel's table of flows is full, new connections are refused and established ones continue.
///
/// Failure: limits.
#[test]
fn when_the_table_of_flows_is_full_new_connections_are_refused_and_established_ones_live_on() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let target6 = world.serve(TARGET6, target::echo())?;
    let (cgroup, bpffs) = (Cgroup::new()?, BpfFs::new(&world)?);
    let config = format!(
        "[daemon]\n{}{}[[capture]]\ncgroup = \"{}\"\n{}",
        bpffs.toml(),
        world.pki().named("node").toml(),
        cgroup.path().display(),
        through(gateway.addr(), GATEWAY_ID),
    );
    let mut daemon = Daemon::start(&world, world.node(), &config)?;
    let mut command = world.node().command(programs::app()?);
    command.args(["hold", &target.addr().to_string()]);
    cgroup.adopt(&mut command)?;
    let mut app = Process::spawn_with_input("app", world.folder(), command)?;
    app.wait_for_line("held=1")?;
    assert_eq!(ask(&mut app, "ping")?, "ok");

    let pins = bpffs.pins();
    let flows = pins.iter().find(|p| p.to_string_lossy().contains("/FLOWS_")).context("FLOWS is pinned")?;
    let flows = Map::open(flows)?;
    let filled = flows.fill()?;
    assert!(filled > FLOWS_MAX - 10, "{filled}");
    for _ in 0..5 {
        assert_eq!(ask(&mut app, "again")?, "ECONNREFUSED");
        assert_eq!(ask(&mut app, "ping")?, "ok", "the established flow lives on");
    }
    daemon.process().wait_for_line("flow map is full")?;
    // Over IPv6 the address that it is sent to may be a service's of the node: its SYN never reaches anybody.
    let mut command = world.node().command(programs::app()?);
    command.args(["connect-error", &target6.addr().to_string()]);
    cgroup.adopt(&mut command)?;
    assert_eq!(process::output(&mut command)?.trim(), "connect=ETIMEDOUT");
    let sent = (target.peers().len(), target6.peers().len());
    assert_eq!(sent, (1, 0), "nothing has gone out, tunnelled or not");

    flows.empty(filled)?;
    assert_eq!(ask(&mut app, "again")?, "ok");
    app.hang_up();
    app.wait(PATIENCE)?;
    daemon.process().stop()?;
    assert!(daemon.log().contains("(\"flows_full\", 6)"), "{}", daemon.log());
    Ok(())
}
