//! Name resolution, for everything that this process connects to.
//!
//! It follows the system's files as getaddrinfo(3) does with `hosts: files dns`: first /etc/hosts, then the name servers, search list
//! and options of /etc/resolv.conf, each read again when it has changed. `localhost`, and names below it, are this host (RFC 6761
//! section 6.3). Other sources of /etc/nsswitch.conf (mDNS, LDAP, sssd) are not used. Answers are not cached.
//!
//! # Invariants
//! - A look-up ends with the future that awaits it: its sockets and tasks go at once, and no thread waits for it.
//! - Concurrent look-ups of one peer are bounded by [`Lookups`], so that its slow names delay nobody else's.

use std::{
    cell::RefCell,
    collections::HashMap,
    fs,
    future::Future,
    hash::Hash,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    pin::Pin,
    rc::{Rc, Weak},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use hickory_resolver::{
    Hosts, Resolver,
    config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts, ServerOrderingStrategy},
    lookup::Lookup,
    net::{
        NetError,
        runtime::{RuntimeProvider, Spawn, TokioRuntimeProvider, TokioTime, iocompat::AsyncIoTokioAsStd},
    },
    proto::{
        op::Query,
        rr::{Name, RecordType},
    },
    system_conf,
};
use socket2::SockRef;
use tokio::{
    net::UdpSocket,
    sync::{Semaphore, SemaphorePermit},
    task::JoinSet,
    time::timeout,
};

use crate::{
    kernel::helper::{self, SystemFile},
    transport::tcp::{self, FirstSpeaker, Own},
};

/// How long one name may take, with every server and search domain: twice resolv.conf's timeout for one server.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long the answer for one family waits for that of the other, once it holds an address: the Resolution Delay of
/// RFC 8305 section 3 for IPv6, and what IPv6 is ahead of IPv4 in trying addresses (section 5) for IPv4.
const OTHER_FAMILY: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(250)];
/// Look-ups of a worker at the same time. Each has two sockets, one for a family.
const LOOKUPS_MAX: usize = 1024;
/// One in this many of a worker's flows may be looking a name up: where descriptors are few, [`LOOKUPS_MAX`] is less.
const FLOWS_PER_LOOKUP: usize = 4;
/// One peer has at most one in this many of a worker's look-ups, and the others of its flows wait for these: 64, so that
/// with names that take 100 ms it still has 640 a second.
const PEER_SHARE: usize = 16;

/// How long after a file could not be read it is tried again, if it does not change before.
const REREAD: Duration = Duration::from_secs(10);

const HOSTS: SystemFile = SystemFile::Hosts;
const RESOLV_CONF: SystemFile = SystemFile::ResolvConf;

/// Why a question was not answered.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Unanswered {
    /// No server has answered in time.
    #[error("no answer from the name servers in time")]
    Late,
    /// It cannot be asked, or a server says that it cannot answer.
    #[error("{0}")]
    Failed(String),
}

/// The addresses of one family, which may be none, and how long that is good for.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// The addresses.
    pub addrs: Vec<IpAddr>,
    /// As the server says; nothing where it says nothing.
    pub good_for: Duration,
}

/// What was asked for both families, IPv4 and IPv6.
pub type Answers = [Result<Answer, Unanswered>; 2];

/// What this host's own files say of a name, IPv4 first. It waits for nobody.
pub fn of_this_host(name: &str) -> Option<Vec<IpAddr>> {
    let name = Name::from_ascii(name).ok()?;
    let system = System::current();
    let listed = |kind| {
        let found = system.hosts.lookup_static_host(&Query::query(name.clone(), kind));
        found.map(|lookup| addresses(&lookup)).unwrap_or_default()
    };
    let found = [listed(RecordType::A), listed(RecordType::AAAA)].concat();
    if !found.is_empty() {
        return Some(found);
    }
    name.is_localhost().then(|| vec![Ipv4Addr::LOCALHOST.into(), std::net::Ipv6Addr::LOCALHOST.into()])
}

/// Asks for the addresses of a name, and does not wait for one family much longer than for the other.
pub async fn addresses_of(name: &str, own: &Own) -> Result<Vec<IpAddr>, Unanswered> {
    if let Some(addrs) = of_this_host(name) {
        return Ok(addrs);
    }
    let asking = Asking::start(own)?;
    let (v4, v6) = (asking.ask(name, RecordType::A), asking.ask(name, RecordType::AAAA));
    tokio::pin!(v4, v6);
    let has_some = |answer: &Result<Answer, Unanswered>| answer.as_ref().is_ok_and(|a| !a.addrs.is_empty());
    let answers = tokio::select! {
        first = &mut v4 => {
            let wait = if has_some(&first) { OTHER_FAMILY[0] } else { PATIENCE };
            [first, timeout(wait, v6).await.unwrap_or(Err(Unanswered::Late))]
        }
        first = &mut v6 => {
            let wait = if has_some(&first) { OTHER_FAMILY[1] } else { PATIENCE };
            [first, timeout(wait, v4).await.unwrap_or(Err(Unanswered::Late))]
        }
    };
    let found: Vec<_> = answers.iter().flatten().flat_map(|a| a.addrs.iter().copied()).collect();
    match answers {
        _ if !found.is_empty() => Ok(found),
        [Err(Unanswered::Late), _] | [_, Err(Unanswered::Late)] => Err(Unanswered::Late),
        [Err(why), _] | [_, Err(why)] => Err(why),
        [Ok(_), Ok(_)] => Ok(found),
    }
}

/// Asks for both families at once, and waits for both.
pub async fn both_families(name: &str, own: &Own) -> Answers {
    if let Some(addrs) = of_this_host(name) {
        let (v4, v6) = addrs.into_iter().partition(IpAddr::is_ipv4);
        return [v4, v6].map(|addrs| Ok(Answer { addrs, good_for: Duration::ZERO }));
    }
    match Asking::start(own) {
        Ok(asking) => {
            tokio::join!(asking.ask(name, RecordType::A), asking.ask(name, RecordType::AAAA)).into()
        }
        Err(e) => [Err(e.clone()), Err(e)],
    }
}

fn addresses(lookup: &Lookup) -> Vec<IpAddr> {
    lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect()
}

/// What the system's files said when they were last read.
struct System {
    stamps: [Option<Stamp>; 2],
    /// When a file is read again that could not be.
    again: Option<Instant>,
    config: ResolverConfig,
    options: ResolverOpts,
    hosts: Arc<Hosts>,
}

/// What tells a file from its next version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: SystemFile) -> Option<Self> {
        let meta = fs::metadata(file.path()).ok()?;
        Some(Self {
            file: (meta.dev(), meta.ino()),
            size: meta.size(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

thread_local! {
    /// Of each worker its own: nothing on the way of a flow takes a lock.
    static SYSTEM: RefCell<Option<Rc<System>>> = const { RefCell::new(None) };
}

impl System {
    /// What the files say now. Asked for each look-up: two calls of stat(2).
    fn current() -> Rc<Self> {
        let stamps = [Stamp::of(HOSTS), Stamp::of(RESOLV_CONF)];
        SYSTEM.with_borrow_mut(|known| match known {
            Some(system)
                if system.stamps == stamps && system.again.is_none_or(|again| Instant::now() < again) =>
            {
                Rc::clone(system)
            }
            _ => {
                let read = [HOSTS, RESOLV_CONF].map(helper::read);
                let system = Self::of(stamps, read, known.as_deref());
                Rc::clone(known.insert(Rc::new(system)))
            }
        })
    }

    /// From what was read of both. A file that is not there says nothing; of one that cannot be read, what it said `before` holds.
    fn of(stamps: [Option<Stamp>; 2], read: [io::Result<Vec<u8>>; 2], before: Option<&Self>) -> Self {
        let mut again = None;
        let mut said = |file: SystemFile, read: io::Result<Vec<u8>>| match read {
            Ok(said) => Some(said),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Some(Vec::new()),
            Err(error) => {
                // Once, until all is read.
                if before.is_none_or(|before| before.again.is_none()) {
                    tracing::warn!(file = file.path(), %error, "failed to read; using what it said before");
                }
                again = Some(Instant::now() + REREAD);
                None
            }
        };
        let [hosts, resolv_conf] = read;
        let (hosts, resolv_conf) = (said(HOSTS, hosts), said(RESOLV_CONF, resolv_conf));
        let (config, options) = match (resolv_conf, before) {
            (None, Some(before)) => (before.config.clone(), before.options.clone()),
            (said, _) => servers(&said.unwrap_or_default()),
        };
        let hosts = match (hosts, before) {
            (None, Some(before)) => Arc::clone(&before.hosts),
            (said, _) => {
                let mut hosts = Hosts::default();
                // What cannot be read of it is left out.
                let _partly = hosts.read_hosts_conf(&said.unwrap_or_default()[..]);
                Arc::new(hosts)
            }
        };
        Self { stamps, again, config, options, hosts }
    }
}

/// The name servers that resolv.conf says, and how they are asked.
fn servers(resolv_conf: &[u8]) -> (ResolverConfig, ResolverOpts) {
    let (config, mut options) = system_conf::parse_resolv_conf(resolv_conf).unwrap_or_else(|e| {
        tracing::debug!(file = RESOLV_CONF.path(), "no usable name server; using the one on this host: {e}");
        // resolv.conf(5).
        let own = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
        (ResolverConfig::from_parts(None, Vec::new(), vec![own]), ResolverOpts::default())
    });
    // Nothing is kept from one question to the next.
    options.cache_size = 0;
    options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
    // One server after the other, as resolv.conf(5) says.
    options.num_concurrent_reqs = 1;
    // Looked into by whoever asks: hickory looks for the first name of the search list only.
    options.use_hosts_file = ResolveHosts::Never;
    (config, options)
}

/// One look-up. Dropped, it takes its tasks and sockets along.
struct Asking {
    resolver: Resolver<Claimed>,
    tasks: Tasks,
}

impl Asking {
    fn start(own: &Own) -> Result<Self, Unanswered> {
        let system = System::current();
        let tasks = Tasks::default();
        let mut builder = Resolver::builder_with_config(
            system.config.clone(),
            Claimed { own: own.clone(), tasks: tasks.clone() },
        );
        *builder.options_mut() = system.options.clone();
        let resolver = builder.build().map_err(|e| Unanswered::Failed(e.to_string()))?;
        Ok(Self { resolver, tasks })
    }

    async fn ask(&self, name: &str, kind: RecordType) -> Result<Answer, Unanswered> {
        let failed = |e: &dyn std::fmt::Display| Unanswered::Failed(e.to_string());
        let name = Name::from_ascii(name).map_err(|e| failed(&e))?;
        let asked = timeout(PATIENCE, self.resolver.lookup(name, kind));
        match asked.await.map_err(|_| Unanswered::Late)? {
            Ok(lookup) => Ok(Answer {
                addrs: addresses(&lookup),
                good_for: lookup.valid_until().saturating_duration_since(Instant::now()),
            }),
            // There is no such name, or it has no such address.
            Err(e) if e.is_no_records_found() => Ok(Answer::default()),
            Err(NetError::Timeout) => Err(Unanswered::Late),
            Err(e) => Err(failed(&e)),
        }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.tasks.0.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

/// What the resolver does beside the look-up itself. The lock is never waited for: all of it is on one thread.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Spawn for Tasks {
    fn spawn_bg(&mut self, future: impl Future<Output = ()> + Send + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).spawn(future);
    }
}

/// Sockets that are not captured where everything around us is: long answers come over TCP.
#[derive(Clone)]
struct Claimed {
    own: Own,
    tasks: Tasks,
}

impl RuntimeProvider for Claimed {
    type Handle = Tasks;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = <TokioRuntimeProvider as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Tasks {
        self.tasks.clone()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        _from: Option<SocketAddr>,
        within: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        let own = self.own.clone();
        Box::pin(async move {
            let connected =
                timeout(within.unwrap_or(PATIENCE), tcp::connect(server, &own, FirstSpeaker::Local)).await;
            let connected = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            Ok(AsyncIoTokioAsStd(connected.up()?))
        })
    }

    fn bind_udp(
        &self,
        from: SocketAddr,
        _server: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<UdpSocket>>>> {
        let mark = self.own.mark();
        Box::pin(async move {
            let socket = UdpSocket::bind(from).await?;
            if let Some(mark) = mark {
                tcp::set_mark(&SockRef::from(&socket), mark)?;
            }
            Ok(socket)
        })
    }
}

/// Whose turn it is to look a name up.
pub struct Lookups<K> {
    all: Semaphore,
    each: usize,
    peers: RefCell<HashMap<K, Weak<Semaphore>>>,
}

impl<K: Clone + Eq + Hash> Lookups<K> {
    /// For a worker of so many flows.
    pub fn new(flows_max: usize) -> Self {
        let all = (flows_max / FLOWS_PER_LOOKUP).clamp(PEER_SHARE, LOOKUPS_MAX);
        Self { all: Semaphore::new(all), each: all / PEER_SHARE, peers: RefCell::default() }
    }

    /// Waits for one's turn, and does `work` in it.
    pub async fn in_turn<T>(&self, who: &K, work: impl Future<Output = T>) -> T {
        let own = self.of(who);
        // One's own first: who waits for that has no place in the other queue. Neither is ever closed.
        let _own: Option<SemaphorePermit<'_>> = own.acquire().await.ok();
        let _all = self.all.acquire().await.ok();
        work.await
    }

    fn of(&self, who: &K) -> Rc<Semaphore> {
        let mut peers = self.peers.borrow_mut();
        if let Some(own) = peers.get(who).and_then(Weak::upgrade) {
            return own;
        }
        let own = Rc::new(Semaphore::new(self.each));
        peers.retain(|_, own| own.strong_count() > 0);
        peers.insert(who.clone(), Rc::downgrade(&own));
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn localhost_is_this_host_whatever_the_files_say() {
        for name in ["localhost", "a.localhost", "localhost."] {
            let found = of_this_host(name).unwrap_or_default();
            assert!(!found.is_empty() && found.iter().all(IpAddr::is_loopback), "{name}: {found:?}");
        }
        assert_eq!(of_this_host("localhost.invalid"), None);
    }

    /// Only a file that is not there is an empty one.
    #[test]
    fn what_a_file_said_holds_while_it_cannot_be_read() {
        let failed = |kind: io::ErrorKind| Err(io::Error::from(kind));
        let server = |system: &System| system.config.name_servers()[0].ip;
        let is_known = |system: &System| {
            let query = Query::query(Name::from_ascii("a.test").unwrap(), RecordType::A);
            system.hosts.lookup_static_host(&query).is_some()
        };
        let read = || [Ok(b"192.0.2.7 a.test\n".to_vec()), Ok(b"nameserver 192.0.2.1\n".to_vec())];
        let before = System::of([None; 2], read(), None);
        assert_eq!((server(&before), is_known(&before)), (IpAddr::from([192, 0, 2, 1]), true));
        assert!(before.again.is_none());

        let other = [failed(io::ErrorKind::PermissionDenied), failed(io::ErrorKind::Other)];
        let kept = System::of([None; 2], other, Some(&before));
        assert_eq!((server(&kept), is_known(&kept)), (server(&before), true));
        assert!(kept.again.is_some());

        let gone = [failed(io::ErrorKind::NotFound), failed(io::ErrorKind::NotFound)];
        let empty = System::of([None; 2], gone, Some(&kept));
        assert_eq!((server(&empty), is_known(&empty)), (Ipv4Addr::LOCALHOST.into(), false));
        assert!(empty.again.is_none());
    }

    #[test]
    fn a_peer_has_a_share_of_the_look_ups_and_leaves_nothing_behind() {
        let lookups = Lookups::new(usize::MAX);
        assert_eq!((lookups.all.available_permits(), lookups.each), (1024, 64));
        let few = Lookups::<u8>::new(10);
        assert_eq!((few.all.available_permits(), few.each), (16, 1));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let hung: Vec<_> =
                (0..100).map(|_| Box::pin(lookups.in_turn(&1, std::future::pending::<()>()))).collect();
            let mut hung = futures(hung);
            assert!(timeout(Duration::from_millis(1), &mut hung).await.is_err());
            assert_eq!(lookups.all.available_permits(), 1024 - 64);
            lookups.in_turn(&2, async {}).await;
            drop(hung);
            assert_eq!(lookups.all.available_permits(), 1024);
            lookups.in_turn(&3, async {}).await;
            assert!(!lookups.peers.borrow().contains_key(&1), "who has none is forgotten");
        });
    }

    /// Polls all of them.
    fn futures<F: Future + Unpin>(mut all: Vec<F>) -> impl Future<Output = ()> + Unpin {
        std::future::poll_fn(move |cx| {
            all.retain_mut(|f| Pin::new(f).poll(cx).is_pending());
            if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
    }
}
