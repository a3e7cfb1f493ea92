//! A link with a delay, a rate and a queue between two hosts, in place of a veth pair. Packets that one host sends into
//! its end, a TUN device, arrive in order at the other end; one that does not fit the queue is dropped and counted.
//!
//! It does what netem would (`tc qdisc add .. netem delay .. rate .. limit ..`), for kernels without it. One thread
//! waits for both devices and a timer, and does nothing while no packet is in flight. A direction is a clock: a packet
//! departs when the one in front of it has, or now, and its bits take the time that the rate gives; what departs later
//! than now is the queue. Bits are those of IP packets, without Ethernet's 38 bytes around each. A packet is late by
//! the time that the kernel takes to wake the thread, once to take it and once to deliver it; measured on a two-core
//! virtual machine, at delivery: 62 µs (50 %) and 222 µs (99 %) when it is idle, for then its cores have to wake up
//! too, and 13 µs and 202 µs when other processes keep them busy.
//!
//! # Invariants
//! - No packet arrives before its time, and none is inspected.
//! - The devices exist as long as the [`Link`] does.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    unistd::getpid,
};

use crate::{
    leftovers,
    netns::NetNs,
    tun::{MTU, Tun},
};

/// The shortest queue of [`Profile::rate`]: a sender may have this many packets under way when the product of rate
/// and delay is next to nothing.
const QUEUE: usize = 64 * MTU;
/// Packets of a direction that are under way, at most: 100 MB. Only a link without a rate gets there.
const UNDER_WAY: usize = 64 * 1024;
/// Packets taken from a device before it is looked what has to be delivered: some 100 µs.
const TAKEN: usize = 64;
/// Buffers that are kept for the next packets: what is under way at 1 Gbit/s and 20 ms.
const POOL: usize = 2048;

/// By which it is chosen what is lost.
const SEED: u64 = 20;

/// What a link is like; the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// From one end to the other.
    pub delay: Duration,
    /// Bits of IP packets per second; nothing: as fast as it goes.
    pub rate: Option<u64>,
    /// Bytes that may wait for their turn at the rate. One more packet, and it is dropped.
    pub queue: usize,
    /// Packets of a million that are lost, each by chance.
    pub loss: u32,
}

impl Profile {
    /// A link with a delay, and no rate that anything would have to wait for.
    pub fn delay(delay: Duration) -> Self {
        Self { delay, rate: None, queue: QUEUE, loss: 0 }
    }

    /// A rate in bits per second, and with it a queue of one product of rate and round trip, which is what a single
    /// flow needs to keep the link busy (Appenzeller et al., Sizing Router Buffers, 2004); at least 64 packets.
    #[must_use]
    pub fn rate(self, rate: u64) -> Self {
        let product = u128::from(rate) * (2 * self.delay).as_nanos() / 8 / NANOS;
        let queue = usize::try_from(product).unwrap_or(usize::MAX).max(QUEUE);
        Self { rate: Some(rate), queue, ..self }
    }

    /// Loses so many packets of a million. Which ones is the same for every link.
    #[must_use]
    pub const fn loss(self, loss: u32) -> Self {
        Self { loss, ..self }
    }

    /// Another queue, in bytes.
    #[must_use]
    pub fn queue(self, queue: usize) -> Self {
        Self { queue, ..self }
    }
}

/// Of a second.
const NANOS: u128 = 1_000_000_000;

/// What has gone through a direction so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Packets delivered.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that were lost, that did not fit the queue, or that the other end would not take.
    pub dropped: u64,
}

#[derive(Debug, Default)]
struct Counters {
    packets: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

/// A link.
#[derive(Debug)]
pub struct Link {
    devices: [String; 2],
    counters: [Arc<Counters>; 2],
    stop: Arc<EventFd>,
    carrying: Option<JoinHandle<Result<()>>>,
}

impl Link {
    /// Joins two hosts, of which each has these addresses at its end; they can be used at once.
    pub fn join(
        a: &NetNs,
        a_addresses: &[&str],
        b: &NetNs,
        b_addresses: &[&str],
        profile: Profile,
    ) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let tuns = [
            Tun::new(a, &format!("tt{}l{number}", getpid()), a_addresses)?,
            Tun::new(b, &format!("tt{}r{number}", getpid()), b_addresses)?,
        ];
        let devices = tuns.each_ref().map(|tun| tun.name().to_owned());
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let counters = [Arc::<Counters>::default(), Arc::default()];
        let mut wire = Wire::new(tuns, Arc::clone(&stop), profile, &counters)?;
        let carrying = thread::Builder::new().name("link".to_owned()).spawn(move || wire.carry())?;
        Ok(Self { devices, counters, stop, carrying: Some(carrying) })
    }

    /// The names of its devices: at the first host, and at the second.
    pub fn devices(&self) -> [&str; 2] {
        self.devices.each_ref().map(String::as_str)
    }

    /// What has gone from the first host to the second, and from the second to the first.
    pub fn counts(&self) -> [Counts; 2] {
        self.counters.each_ref().map(|counters| {
            let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            Counts {
                packets: read(&counters.packets),
                bytes: read(&counters.bytes),
                dropped: read(&counters.dropped),
            }
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let stopped = self.stop.write(1);
        let ended = self.carrying.take().map_or(Ok(()), |carrying| match carrying.join() {
            Ok(ended) => ended,
            Err(_) => bail!("its thread panicked"),
        });
        leftovers::report("a link", ended.and(stopped.map(drop).context("it cannot be stopped")));
    }
}

/// What the thread has.
struct Wire {
    tuns: [Tun; 2],
    lanes: [Lane; 2],
    timer: TimerFd,
    /// What the timer is set to.
    set: Option<Instant>,
    stop: Arc<EventFd>,
    epoll: Epoll,
    pool: Vec<Packet>,
}

type Packet = Box<[u8; MTU]>;

/// What the events of the timer are called; those of the devices are called by their index.
const TIMER: u64 = 2;
const STOP: u64 = 3;

impl Wire {
    fn new(
        tuns: [Tun; 2],
        stop: Arc<EventFd>,
        profile: Profile,
        counters: &[Arc<Counters>; 2],
    ) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for (tun, name) in tuns.iter().zip(0..) {
            epoll.add(tun, EpollEvent::new(EpollFlags::EPOLLIN, name))?;
        }
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        // Once per expiry: then it is set anew, or nothing is under way.
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, TIMER))?;
        epoll.add(&*stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        let lanes = counters.each_ref().map(|counters| Lane::new(profile, Arc::clone(counters)));
        Ok(Self { tuns, lanes, timer, set: None, stop, epoll, pool: Vec::new() })
    }

    fn carry(&mut self) -> Result<()> {
        put_first()?;
        let mut events = [EpollEvent::empty(); 4];
        loop {
            let n = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e).context("waiting for packets"),
            };
            self.deliver();
            for event in &events[..n] {
                match event.data() {
                    STOP => return self.stop.read().map(drop).context("being stopped"),
                    TIMER => self.set = None,
                    name => self.take(usize::try_from(name)?)?,
                }
            }
            self.deliver();
            self.set_timer()?;
        }
    }

    /// Takes what the host at this end has sent.
    fn take(&mut self, end: usize) -> Result<()> {
        for _ in 0..TAKEN {
            let mut packet = self.pool.pop().unwrap_or_else(|| Box::new([0; MTU]));
            let length = match self.tuns[end].take(&mut packet) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    keep(&mut self.pool, packet);
                    break;
                }
                Err(e) => return Err(e).with_context(|| format!("reading {}", self.tuns[end].name())),
            };
            if let Some(packet) = self.lanes[end].send(Instant::now(), packet, length) {
                keep(&mut self.pool, packet);
            }
        }
        Ok(())
    }

    /// Delivers what has arrived.
    fn deliver(&mut self) {
        for (lane, far) in self.lanes.iter_mut().zip(self.tuns.iter().rev()) {
            while let Some(Parcel { packet, length, .. }) = lane.arrived() {
                lane.count(length, far.give(&packet[..length]).is_ok());
                keep(&mut self.pool, packet);
            }
        }
    }

    /// Sets the timer to the next arrival.
    fn set_timer(&mut self) -> Result<()> {
        let next = self.lanes.iter().filter_map(Lane::next).min();
        if let Some(next) = next
            && self.set != Some(next)
        {
            // Nothing would mean: never.
            let left = next.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            let once = Expiration::OneShot(TimeSpec::from_duration(left));
            self.timer.set(once, TimerSetTimeFlags::empty()).context("setting the timer")?;
            self.set = Some(next);
        }
        Ok(())
    }
}

/// A wire does not wait for processes to let it run: with two of them on each core, and this thread as one of many,
/// one packet in a hundred was late by 3.6 ms.
fn put_first() -> Result<()> {
    // As far as nice(2) goes. To Linux a process that is 0 is the calling thread (setpriority(2), "C library/kernel
    // differences"), and the same number is a thread's id.
    const HIGHEST: libc::c_int = -20;
    // SAFETY: a system call on numbers.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, HIGHEST) } {
        0 => Ok(()),
        _ => {
            Err(io::Error::last_os_error()).context("raising the priority of a link's thread (CAP_SYS_NICE)")
        }
    }
}

fn keep(pool: &mut Vec<Packet>, packet: Packet) {
    if pool.len() < POOL {
        pool.push(packet);
    }
}

/// A direction.
struct Lane {
    profile: Profile,
    /// When the last packet has departed.
    free: Instant,
    under_way: VecDeque<Parcel>,
    counters: Arc<Counters>,
    chance: fastrand::Rng,
}

struct Parcel {
    arrives: Instant,
    packet: Packet,
    length: usize,
}

impl Lane {
    fn new(profile: Profile, counters: Arc<Counters>) -> Self {
        let (free, chance) = (Instant::now(), fastrand::Rng::with_seed(SEED));
        Self { profile, free, under_way: VecDeque::new(), counters, chance }
    }

    /// Sends a packet on its way; gives it back when it is dropped.
    fn send(&mut self, now: Instant, packet: Packet, length: usize) -> Option<Packet> {
        let lost = self.profile.loss > 0 && self.chance.u32(..1_000_000) < self.profile.loss;
        let departs = self.departs(now, length).filter(|_| self.under_way.len() < UNDER_WAY);
        let Some(departs) = departs.filter(|_| !lost) else {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
            return Some(packet);
        };
        self.free = departs;
        self.under_way.push_back(Parcel { arrives: departs + self.profile.delay, packet, length });
        None
    }

    /// When a packet that came now would be on the link with its last bit; never, when it does not fit the queue.
    fn departs(&self, now: Instant, length: usize) -> Option<Instant> {
        let Some(rate) = self.profile.rate else { return Some(now) };
        let waits = self.free.saturating_duration_since(now);
        let queued = waits.as_nanos() * u128::from(rate) / 8 / NANOS;
        if queued + length as u128 > self.profile.queue as u128 {
            return None;
        }
        let bits = 8 * length as u128;
        let takes = u64::try_from(bits * NANOS / u128::from(rate.max(1))).ok()?;
        Some(now + waits + Duration::from_nanos(takes))
    }

    fn next(&self) -> Option<Instant> {
        self.under_way.front().map(|parcel| parcel.arrives)
    }

    /// The next packet, if it has arrived.
    fn arrived(&mut self) -> Option<Parcel> {
        self.under_way.pop_front_if(|parcel| parcel.arrives <= Instant::now())
    }

    fn count(&self, length: usize, taken: bool) {
        if taken {
            self.counters.packets.fetch_add(1, Ordering::Relaxed);
            self.counters.bytes.fetch_add(length as u64, Ordering::Relaxed);
        } else {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(lane: &mut Lane, now: Instant, length: usize) -> bool {
        lane.send(now, Box::new([0; MTU]), length).is_none()
    }

    #[test]
    fn a_packet_departs_behind_the_one_in_front_of_it_and_arrives_after_the_delay() {
        // A byte takes a microsecond.
        let profile = Profile::delay(Duration::from_millis(10)).rate(8_000_000);
        let mut lane = Lane::new(profile, Arc::default());
        let now = Instant::now() + Duration::from_secs(1);
        assert!(send(&mut lane, now, 1000));
        assert!(send(&mut lane, now, 500));
        assert!(send(&mut lane, now + Duration::from_millis(5), 100));
        let arrivals: Vec<_> = lane.under_way.iter().map(|p| (p.arrives - now).as_micros()).collect();
        assert_eq!(arrivals, [11_000, 11_500, 15_100]);
        assert_eq!(lane.next(), Some(now + Duration::from_millis(11)));
        assert!(lane.arrived().is_none());
    }

    #[test]
    fn what_does_not_fit_the_queue_is_dropped_and_counted() {
        let profile = Profile::delay(Duration::ZERO).rate(8_000_000).queue(3000);
        let mut lane = Lane::new(profile, Arc::default());
        let now = Instant::now() + Duration::from_secs(1);
        let fit = [1000; 5].map(|length| send(&mut lane, now, length));
        assert_eq!(fit, [true, true, true, false, false]);
        assert_eq!(lane.counters.dropped.load(Ordering::Relaxed), 2);
        // A millisecond later there is room for what has departed meanwhile.
        let later = now + Duration::from_millis(1);
        assert_eq!([1000; 2].map(|length| send(&mut lane, later, length)), [true, false]);
    }

    #[test]
    fn the_queue_is_a_product_of_rate_and_round_trip_or_64_packets() {
        let profile = Profile::delay(Duration::from_millis(10)).rate(100_000_000);
        assert_eq!(profile.queue, 250_000);
        assert_eq!(Profile::delay(Duration::ZERO).rate(1_000_000).queue, 96_000);
    }
}
