//! An authoritative name server over UDP, with the names that a test gives it. An answer is valid for a second, and a
//! name that the test has not given does not exist (NXDOMAIN).
//!
//! # Invariants
//! - A question is counted before it is answered.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use tokio::{net::UdpSocket, runtime, sync::oneshot};

use crate::netns::NetNs;

/// What resolvers have no other name for (RFC 1035 section 3.2.2, RFC 3596 section 2.1).
const A: u16 = 1;
const AAAA: u16 = 28;
/// How long an answer is good for, in seconds.
const TTL: u32 = 1;

#[derive(Debug, Default)]
struct Zone {
    names: HashMap<String, Vec<IpAddr>>,
    asked: usize,
    silent: bool,
    /// What names end with of which nothing is said.
    hanging: Option<String>,
    /// Whether nothing is said of any IPv6 address.
    only_v4: bool,
}

/// A running name server.
#[derive(Debug)]
pub struct Dns {
    zone: Arc<Mutex<Zone>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Dns {
    /// Starts one at port 53 of this address; returns when it can be asked.
    pub fn start(host: &NetNs, ip: IpAddr) -> Result<Self> {
        let zone = Arc::<Mutex<Zone>>::default();
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = mpsc::channel();
        let served = Arc::clone(&zone);
        let thread = host.spawn("dns", move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let socket = UdpSocket::bind(SocketAddr::new(ip, 53)).await?;
                ready.send(())?;
                tokio::select! {
                    served = serve(&socket, &served) => served,
                    _ = stopped => Ok(()),
                }
            })
        })?;
        is_ready.recv().context("it cannot be asked")?;
        Ok(Self { zone, stop: Some(stop), thread: Some(thread) })
    }

    fn zone(&self) -> MutexGuard<'_, Zone> {
        self.zone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on a name has these addresses, which may be none.
    pub fn says(&self, name: &str, addrs: &[IpAddr]) {
        let mut zone = self.zone();
        zone.silent = false;
        zone.names.insert(name.to_owned(), addrs.to_vec());
    }

    /// From now on it does not answer.
    pub fn falls_silent(&self) {
        self.zone().silent = true;
    }

    /// From now on it does not answer for names with this end.
    pub fn says_nothing_of(&self, end: &str) {
        self.zone().hanging = Some(end.to_owned());
    }

    /// From now on it does not answer for IPv6.
    pub fn says_nothing_of_ipv6(&self) {
        self.zone().only_v4 = true;
    }

    /// How many questions have come so far.
    pub fn asked(&self) -> usize {
        self.zone().asked
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Ok(Err(e))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("name server: {e:#}");
        }
    }
}

async fn serve(socket: &UdpSocket, zone: &Mutex<Zone>) -> Result<()> {
    let mut buf = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut buf).await?;
        let answer = {
            let mut zone = zone.lock().unwrap_or_else(PoisonError::into_inner);
            zone.asked += 1;
            if zone.silent { None } else { answer(&buf[..length], &zone) }
        };
        if let Some(answer) = answer {
            socket.send_to(&answer, from).await?;
        }
    }
}

/// RFC 1035 section 4: the question's head and the question, then one record for each address.
fn answer(question: &[u8], zone: &Zone) -> Option<Vec<u8>> {
    const HEAD: usize = 12;
    let (mut at, mut name) = (HEAD, Vec::new());
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        name.push(String::from_utf8(question.get(at..at + length)?.to_vec()).ok()?.to_ascii_lowercase());
        at += length;
    }
    let kind = u16::from_be_bytes([*question.get(at)?, *question.get(at + 1)?]);
    let question = question.get(..at + 4)?;
    let name = name.join(".");
    if zone.hanging.as_ref().is_some_and(|end| name.ends_with(end)) || (zone.only_v4 && kind == AAAA) {
        return None;
    }
    let found = zone.names.get(&name);
    let data = found.into_iter().flatten().filter_map(|ip| match (ip, kind) {
        (IpAddr::V4(ip), A) => Some(ip.octets().to_vec()),
        (IpAddr::V6(ip), AAAA) => Some(ip.octets().to_vec()),
        _ => None,
    });
    let data: Vec<_> = data.collect();
    let mut out = question[..2].to_vec();
    // A response, authoritative, recursion as it was wanted; NXDOMAIN for what there is not.
    let code = if found.is_some() { 0 } else { 3 };
    out.extend([0x84 | (question[2] & 1), 0x80 | code]);
    out.extend([0, 1]);
    out.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
    out.extend([0; 4]);
    out.extend(&question[HEAD..]);
    for data in data {
        // The name is that of the question.
        out.extend([0xc0, 0x0c]);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1]);
        out.extend(TTL.to_be_bytes());
        out.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
        out.extend(data);
    }
    Some(out)
}
