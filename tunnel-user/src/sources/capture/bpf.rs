//! Loads, attaches and detaches the kernel programs of one capture, and holds typed handles on their maps. The programs
//! make the decisions.
//!
//! # Invariants
//! - The maps hold the rules before anything is attached.
//! - A capture with pinned links is taken over without an interval in which nothing is attached.

mod attach;
mod pins;

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, RingBuf, lpm_trie::Key},
    programs::Program,
};
use ipnet::IpNet;
use socket2::Domain;
use tunnel_common::{
    addr::Endpoint,
    capture::{DAEMON, Listener, OnFailure, Rule, SocketKey},
    flow::{FlowKey, Origin},
    group,
    names::{self, Counter},
};

use self::pins::{PINNED, link_path, map_path};
pub use self::{
    attach::Owner,
    pins::{lock, unpin},
};
use super::{
    accept::Sockets,
    before::Before,
    rules::Rules,
    sources::Sources,
    steer::{self, Steering},
};
use crate::kernel::bpf::BpfError;
use crate::kernel::{
    group::ByName,
    map::TypedMap,
    sys::{self, AttachType},
};
use crate::{kernel::btf, transport::tcp::Register};

/// The programs, as the build script made or found them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tunnel-ebpf.bpf.o"));

/// Every program with the place it is attached to. `connect` comes last: until it is there nothing is
/// captured, and what it captures needs the others.
const PROGRAMS: [(&str, AttachType); 9] = [
    (names::SOCKOPS, AttachType::SockOps),
    (names::GETSOCKNAME4, AttachType::Getsockname4),
    (names::GETSOCKNAME6, AttachType::Getsockname6),
    (names::GETPEERNAME4, AttachType::Getpeername4),
    (names::GETPEERNAME6, AttachType::Getpeername6),
    (names::GETSOCKOPT, AttachType::Getsockopt),
    (names::SETSOCKOPT, AttachType::Setsockopt),
    (names::CONNECT4, AttachType::Connect4),
    (names::CONNECT6, AttachType::Connect6),
];

/// How long the programs stay attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// As long as the cgroup: they outlive a daemon that is killed (its connections are then refused,
    /// since no listener answers), and leave nothing behind when the cgroup is removed.
    Cgroup,
    /// Until detached: links and maps are pinned in this folder of a bpffs, and a later daemon finds them.
    Pinned(PathBuf),
}

/// What to load.
#[derive(Clone, Debug)]
pub struct Spec {
    /// What captured connections get while no listener is alive.
    pub on_failure: OnFailure,
    /// What tells the listening sockets of this daemon from those of the one before. Any number that that one has not.
    pub generation: u32,
    /// A proxy of the operator's takes the connections, and asks about them.
    pub for_proxy: bool,
    /// How the programs know the captured group. `None`: they are attached to it.
    pub group: Option<ByName>,
    /// How long the programs stay.
    pub lifetime: Lifetime,
}

/// The programs and maps of one capture.
pub struct Capture {
    ebpf: Ebpf,
    lifetime: Lifetime,
    by_name: bool,
    for_proxy: bool,
    /// Programs of an earlier daemon were attached already.
    adopted: bool,
    /// What was there before, until it is sure that this stays.
    before: Mutex<Option<Before>>,
    listeners: Mutex<HashMap<MapData, u64, Listener>>,
    flows: FlowTable,
    sockets: TypedMap<SocketKey, u32>,
    own: Arc<TypedMap<i32, u32>>,
    sources: Mutex<Sources>,
    /// Under which the listening sockets of this daemon are.
    generation: u32,
    sweeper: Sweeper,
    counters: PerCpuArray<MapData, u64>,
}

/// Where accepted connections wanted to go. Cheap to clone; every worker has one.
#[derive(Clone)]
pub struct FlowTable(Arc<TypedMap<FlowKey, Origin>>);

impl FlowTable {
    /// Takes the origin of the connection that `key` names; `None` if it was not captured.
    pub fn take(&self, key: &FlowKey) -> io::Result<Option<Origin>> {
        self.0.take(key)
    }
}

/// Forgets flows that nobody will accept any more: of connections that were dropped by a full backlog, or
/// that died with a daemon.
struct Sweeper(HashMap<MapData, FlowKey, Origin>);

impl Sweeper {
    /// Goes through the table once; how many were forgotten.
    fn sweep(&mut self) -> usize {
        // Never fails: the clock is always there.
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, |t| {
            let since_boot = Duration::from(t);
            u64::try_from(since_boot.as_nanos()).unwrap_or(u64::MAX)
        });
        let stale: Vec<_> = self.0.iter().filter_map(Result::ok).filter(|(_, o)| o.is_stale(now)).collect();
        stale.iter().filter(|(key, _)| self.0.remove(key).is_ok()).count()
    }
}

impl Capture {
    /// Loads every program and fills the rules. Nothing is attached yet.
    pub fn load(spec: &Spec, rules: &Rules) -> Result<Self, BpfError> {
        let Lifetime::Pinned(dir) = &spec.lifetime else { return Self::load_here(spec, rules, false) };
        pins::check(dir)?;
        // Maps alone capture nothing: they are what a start left that failed.
        let adopted = PROGRAMS.iter().any(|(name, _)| sys::obj_get(&link_path(dir, name)).is_ok());
        let loaded = Self::load_here(spec, rules, adopted);
        if loaded.is_err() && !adopted {
            let _best_effort = unpin(dir);
        }
        loaded
    }

    fn load_here(spec: &Spec, rules: &Rules, adopted: bool) -> Result<Self, BpfError> {
        let mut loader = EbpfLoader::new();
        let has_mptcp = u32::from(Path::new("/proc/sys/net/mptcp").exists());
        loader.override_global(names::HAS_MPTCP, &has_mptcp, true).override_global(
            names::ON_FAILURE,
            &spec.on_failure,
            true,
        );
        let offsets = spec.group.as_ref().map(|_| btf::of_groups()).transpose()?;
        if let (Some(by_name), Some(offsets)) = (&spec.group, &offsets) {
            loader
                .override_global(names::GROUP_KIND, &by_name.kind, true)
                .override_global(names::GROUP_PLACE, &by_name.place, true)
                .override_global(names::GROUP_OFFSETS, offsets, true);
        }
        if let Lifetime::Pinned(dir) = &spec.lifetime {
            fs::create_dir_all(dir).map_err(|source| BpfError::Pin { path: dir.clone(), source })?;
            // What the next one has to find: the flows of connections that live on, the sockets' origins, where their
            // listeners are, and whose sockets a daemon made that still drains. The rules are the programs' own, so that
            // both are replaced as one.
            for name in PINNED {
                loader.map_pin_path(name, map_path(dir, name));
            }
        }
        let mut ebpf = loader.load(OBJECT).map_err(|e| BpfError::Load(Box::new(e)))?;
        load_programs(&mut ebpf)?;
        fill(
            take(&mut ebpf, names::RULES_V4)?,
            names::RULES_V4,
            rules.v4.iter().map(|(net, rule)| {
                (Key::new(u32::from(net.prefix_len()), net.network().to_bits().to_be()), *rule)
            }),
        )?;
        fill(
            take(&mut ebpf, names::RULES_V6)?,
            names::RULES_V6,
            rules.v6.iter().map(|(net, rule)| {
                (
                    Key::new(
                        u32::from(net.prefix_len()),
                        Endpoint::from(SocketAddr::from((net.network(), 0))).v6_be(),
                    ),
                    *rule,
                )
            }),
        )?;
        let mut on_the_way: Array<MapData, group::Name> =
            Array::try_from(take(&mut ebpf, names::GROUP_NAMES)?).map_err(map(names::GROUP_NAMES))?;
        for (level, name) in spec.group.iter().flat_map(|by_name| &by_name.names) {
            on_the_way.set(*level, name, 0).map_err(map(names::GROUP_NAMES))?;
        }
        let listeners =
            HashMap::try_from(take(&mut ebpf, names::LISTENERS)?).map_err(map(names::LISTENERS))?;
        let shared_flows = typed(&ebpf, names::FLOWS)?;
        let flows = take(&mut ebpf, names::FLOWS)?;
        let (sockets, own) = (typed(&ebpf, names::SOCKETS)?, typed(&ebpf, names::OWN)?);
        let sources = Sources::new(take(&mut ebpf, names::SOURCES_V4)?, take(&mut ebpf, names::SOURCES_V6)?)?;
        let sweeper = Sweeper(HashMap::try_from(flows).map_err(map(names::FLOWS))?);
        let counters =
            PerCpuArray::try_from(take(&mut ebpf, names::COUNTERS)?).map_err(map(names::COUNTERS))?;
        Ok(Self {
            ebpf,
            lifetime: spec.lifetime.clone(),
            by_name: spec.group.is_some(),
            for_proxy: spec.for_proxy,
            adopted,
            before: Mutex::new(adopted.then(Before::default)),
            listeners: Mutex::new(listeners),
            flows: FlowTable(Arc::new(shared_flows)),
            sockets,
            own: Arc::new(own),
            sources: Mutex::new(sources),
            generation: spec.generation,
            sweeper,
            counters,
        })
    }

    /// Forgets every listener but those of these namespaces: what an earlier daemon left in an adopted map.
    /// Until then they harm nobody, since a listener that is not alive is not used.
    pub fn keep_listeners(&self, netns_cookies: &[u64]) -> Result<(), BpfError> {
        let mut map_ = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let all: Vec<u64> = map_.keys().filter_map(Result::ok).collect();
        for netns in all.into_iter().filter(|netns| *netns != DAEMON && !netns_cookies.contains(netns)) {
            self.note_listener(&map_, netns);
            map_.remove(&netns).map_err(map(names::LISTENERS))?;
        }
        Ok(())
    }

    /// Forgets the listener of a namespace: its connections are refused from now on.
    pub fn remove_listener(&self, netns_cookie: u64) -> Result<(), BpfError> {
        let mut map_ = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        map_.remove(&netns_cookie).map_err(map(names::LISTENERS))
    }

    /// Says where connections of one network namespace go. May be called while attached.
    pub fn set_listener(&self, netns_cookie: u64, listener: Listener) -> Result<(), BpfError> {
        let mut map_ = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        self.note_listener(&map_, netns_cookie);
        map_.insert(netns_cookie, listener, 0).map_err(map(names::LISTENERS))
    }

    /// Has connections of a network namespace go to listening sockets of ours there. May be called while attached. What is
    /// returned is to be kept as long as they are used; where it is none, all destinations share one address.
    pub fn add_listeners(&self, sockets: &Sockets) -> Result<Option<Steering>, BpfError> {
        let lanes = u16::try_from(sockets.per_worker.len()).unwrap_or(u16::MAX);
        for (lane, own) in (0..lanes).zip(&sockets.per_worker) {
            for socket in own {
                let v4 = socket.domain().is_ok_and(|domain| domain == Domain::IPV4);
                let key = SocketKey::new(sockets.netns, self.generation, lane, v4);
                let fd = socket.as_raw_fd().cast_unsigned();
                self.sockets.update(&key, &fd).map_err(|e| map(names::SOCKETS)(MapError::IoError(e)))?;
            }
        }
        let first = sockets.per_worker.first().and_then(|own| own.first());
        let netns =
            first.ok_or_else(|| io::ErrorKind::InvalidInput.into()).and_then(|s| sys::netns_of(s.as_fd()));
        let netns = netns.map_err(|source| BpfError::Attach { name: names::STEER, source })?;
        let maps = steer::Maps { flows: self.flows.0.as_fd(), sockets: self.sockets.as_fd() };
        let steering = match Steering::attach(netns.as_fd(), sockets.netns, self.generation, lanes, &maps) {
            Ok(steering) => Some(steering),
            Err(e) => {
                tracing::warn!(
                    netns = sockets.netns,
                    "captured destinations share one local address in this network namespace, so that one local port serves \
                     one connection at a time: {e}"
                );
                None
            }
        };
        let listener = Listener::own(sockets.port, lanes, self.generation, steering.is_some());
        self.set_listener(sockets.netns, listener)?;
        Ok(steering)
    }

    /// From now on, and as long as these sockets of ours listen, connections from namespaces where we do not listen yet wait.
    pub fn add_daemon(&self, sockets: &Sockets) -> Result<(), BpfError> {
        let Some(first) = sockets.per_worker.first().and_then(|own| own.first()) else { return Ok(()) };
        let listener = Listener::own(sockets.port, 1, self.generation, true);
        let fd = first.as_raw_fd().cast_unsigned();
        self.sockets
            .update(&listener.first(DAEMON, true), &fd)
            .map_err(|e| map(names::SOCKETS)(MapError::IoError(e)))?;
        self.set_listener(DAEMON, listener)
    }

    /// Registers sockets of ours, which are never captured.
    pub fn register(&self) -> Register {
        let own = Arc::clone(&self.own);
        Arc::new(move |socket| own.update(&socket.as_raw_fd(), &1))
    }

    /// Says what source addresses the routes of a network namespace give.
    pub fn set_sources(&self, netns_cookie: u64, sources: &[(IpNet, IpAddr)]) -> Result<(), BpfError> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).set(netns_cookie, sources)
    }

    fn note_listener(&self, map_: &HashMap<MapData, u64, Listener>, netns_cookie: u64) {
        if let Some(before) = &mut *self.before.lock().unwrap_or_else(PoisonError::into_inner) {
            before.listener(netns_cookie, map_.get(&netns_cookie, 0).ok());
        }
    }

    /// From now on it is not rolled back any more.
    pub fn settle(&self) {
        *self.before.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Removes what another version has pinned here and this one does not use (`pins`). The caller keeps other daemons away.
    pub fn forget_other_versions(&self) -> Result<(), BpfError> {
        match &self.lifetime {
            Lifetime::Pinned(dir) => pins::forget_other_versions(dir),
            Lifetime::Cgroup => Ok(()),
        }
    }

    /// Puts back what was there before this was loaded: nothing, or what an earlier daemon had attached, with its
    /// listeners. The caller keeps other daemons away.
    pub fn roll_back(&self) -> Result<(), BpfError> {
        let Lifetime::Pinned(dir) = &self.lifetime else { return Ok(()) };
        if !self.adopted {
            return unpin(dir);
        }
        let Some(before) = self.before.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        before.put_back(&mut self.listeners.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The flows, for the workers.
    pub fn flows(&self) -> FlowTable {
        self.flows.clone()
    }

    /// Forgets flows that nobody will accept any more; how many. To be called now and then.
    pub fn sweep(&mut self) -> usize {
        self.sweeper.sweep()
    }

    /// Every counter, summed over the CPUs.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        Counter::ALL
            .into_iter()
            .map(|(counter, name)| {
                (name, self.counters.get(&(counter as u32), 0).map_or(0, |cpus| cpus.iter().sum()))
            })
            .collect()
    }

    /// The ring that tells of namespaces without a listener, once.
    pub fn take_events(&mut self) -> Result<RingBuf<MapData>, BpfError> {
        RingBuf::try_from(take(&mut self.ebpf, names::EVENTS)?).map_err(map(names::EVENTS))
    }

    /// What the programs log, through the `log` crate, once.
    pub fn take_log(&mut self) -> Option<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(&mut self.ebpf).ok()
    }
}

/// A program by its name, and whether this kernel takes it.
pub type Probed = (&'static str, Result<(), BpfError>);

/// Loads every program and throws it away: whether this kernel has what capture needs. The error is that
/// of the maps, without which no program can be tried. `by_name`: as they are where they follow a group by its name.
pub fn probe(by_name: bool) -> Result<Vec<Probed>, BpfError> {
    let mut loader = EbpfLoader::new();
    let offsets = by_name.then(btf::of_groups).transpose()?;
    if let Some(offsets) = &offsets {
        loader.override_global(names::GROUP_KIND, &group::BY_UNIT, true).override_global(
            names::GROUP_OFFSETS,
            offsets,
            true,
        );
    }
    let mut ebpf = loader.load(OBJECT).map_err(|e| BpfError::Load(Box::new(e)))?;
    Ok(PROGRAMS.map(|(name, _)| (name, load_program(&mut ebpf, name))).into())
}

/// The same for the program that gives captured connections to our listeners. Without it all of them go to one address.
pub fn probe_steering() -> Result<Result<(), steer::SteerError>, BpfError> {
    let ebpf = EbpfLoader::new().load(OBJECT).map_err(|e| BpfError::Load(Box::new(e)))?;
    let (flows, sockets) = (fd_of(&ebpf, names::FLOWS)?, fd_of(&ebpf, names::SOCKETS)?);
    Ok(steer::probe(&steer::Maps { flows: flows.as_fd(), sockets: sockets.as_fd() }))
}

pub(super) fn map(name: &'static str) -> impl FnOnce(MapError) -> BpfError {
    move |source| BpfError::Map { name, source }
}

fn fd_of(ebpf: &Ebpf, name: &'static str) -> Result<OwnedFd, BpfError> {
    let data = match ebpf.map(name) {
        Some(Map::HashMap(data) | Map::SockHash(data) | Map::SkStorage(data)) => data,
        _ => return Err(BpfError::Missing(name)),
    };
    data.fd().as_fd().try_clone_to_owned().map_err(|e| map(name)(MapError::IoError(e)))
}

fn typed<K: aya::Pod, V: aya::Pod>(ebpf: &Ebpf, name: &'static str) -> Result<TypedMap<K, V>, BpfError> {
    TypedMap::new(fd_of(ebpf, name)?).map_err(|source| BpfError::MapIo { name, source })
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, BpfError> {
    ebpf.take_map(name).ok_or(BpfError::Missing(name))
}

/// Fills a trie that was made with its programs.
fn fill<K: aya::Pod>(
    trie: Map,
    name: &'static str,
    rules: impl Iterator<Item = (Key<K>, Rule)>,
) -> Result<(), BpfError> {
    let mut trie: LpmTrie<MapData, K, Rule> = LpmTrie::try_from(trie).map_err(map(name))?;
    for (key, rule) in rules {
        trie.insert(&key, rule, 0).map_err(map(name))?;
    }
    Ok(())
}

/// Loads every program. Those of connect(2) take the verifier nine tenths of the time, so one of them is loaded beside the others.
fn load_programs(ebpf: &mut Ebpf) -> Result<(), BpfError> {
    let found: Vec<_> = ebpf.programs().map(|(name, _)| name.to_owned()).collect();
    if let Some((name, _)) = PROGRAMS.iter().find(|(name, _)| !found.iter().any(|f| f == name)) {
        return Err(BpfError::Missing(name));
    }
    let ours = ebpf.programs_mut().filter_map(|(name, program)| {
        PROGRAMS.iter().find(|(ours, _)| *ours == name).map(|(name, _)| (*name, program))
    });
    let (beside, rest): (Vec<_>, Vec<_>) = ours.partition(|(name, _)| *name == names::CONNECT6);
    let load = |programs: Vec<(&'static str, &mut Program)>| {
        programs.into_iter().try_for_each(|(name, program)| load(program, name))
    };
    thread::scope(|scope| {
        let beside = scope.spawn(move || load(beside));
        let rest = load(rest);
        rest.and(beside.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), BpfError> {
    load(ebpf.program_mut(name).ok_or(BpfError::Missing(name))?, name)
}

fn load(program: &mut Program, name: &'static str) -> Result<(), BpfError> {
    match program {
        Program::CgroupSockAddr(p) => p.load(),
        Program::CgroupSockopt(p) => p.load(),
        Program::SockOps(p) => p.load(),
        _ => return Err(BpfError::Missing(name)),
    }
    .map_err(|e| BpfError::Program { name, source: Box::new(e) })
}

fn program_fd<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<&'a aya::programs::ProgramFd, BpfError> {
    let fd = match ebpf.program(name) {
        Some(Program::CgroupSockAddr(p)) => p.fd(),
        Some(Program::CgroupSockopt(p)) => p.fd(),
        Some(Program::SockOps(p)) => p.fd(),
        _ => return Err(BpfError::Missing(name)),
    };
    fd.map_err(|e| BpfError::Program { name, source: Box::new(e) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_in_the_object_and_every_program_passes_the_verifier() {
        assert!(nix::unistd::geteuid().is_root(), "loading programs takes root: run the tests as root");
        for by_name in [false, true] {
            for (name, loaded) in probe(by_name).expect("this kernel has the maps that capture needs") {
                loaded.unwrap_or_else(|e| panic!("{name}: {e}"));
            }
        }
        let spec =
            Spec { on_failure: 0, generation: 1, for_proxy: false, group: None, lifetime: Lifetime::Cgroup };
        probe_steering().expect("maps can be made").expect("the kernel takes the steering program");
        Capture::load(&spec, &Rules::default()).expect("maps and globals have the types of this daemon");
        let ebpf = aya_obj_names();
        for name in names::MAPS {
            assert!(ebpf.contains(&name.to_owned()), "no map {name}");
        }
    }

    fn aya_obj_names() -> Vec<String> {
        let ebpf = EbpfLoader::new().load(OBJECT).expect("maps can be made");
        ebpf.maps().map(|(name, _)| name.to_owned()).collect()
    }
}
