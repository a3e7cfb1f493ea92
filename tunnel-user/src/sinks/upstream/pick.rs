//! Which endpoint, and which of its connections: the choices that every new stream waits for, as pure functions of how busy each
//! is.

use std::net::IpAddr;

use crate::{config::Balance, model::flow::Target};

/// A new connection is opened when fewer than one stream in this many is free.
const HEADROOM: usize = 10;

/// The order in which endpoints are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From this one on, and around.
    Around(usize),
    /// By their scores for this hash, the highest first.
    Ranked(u64),
}

/// The order for one flow. `turn` counts up; `random` is evenly spread; `hash` is asked for where the target decides.
///
/// - in turn;
/// - by chance;
/// - the less busy of two picked by chance (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
///   IEEE TPDS 12(10), 2001): looking at all would send every worker's flows to the same one;
/// - by rendezvous (D. Thaler, C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM ToN 6(1),
///   1998): each endpoint has a score for each target, and when one leaves, only its targets move.
pub fn order<T>(
    balance: Balance,
    turn: usize,
    random: u64,
    hash: impl FnOnce() -> u64,
    endpoints: &[T],
    busy: impl Fn(&T) -> usize,
) -> Order {
    let n = endpoints.len().max(1);
    match balance {
        Balance::RoundRobin => Order::Around(turn % n),
        Balance::Random => Order::Around(below(random >> 32, n)),
        Balance::LeastRequest => {
            let one = below(random >> 32, n);
            if n == 1 {
                return Order::Around(0);
            }
            let other = below(random & 0xffff_ffff, n - 1);
            let other = if other < one { other } else { other + 1 };
            Order::Around(if busy(&endpoints[other]) < busy(&endpoints[one]) { other } else { one })
        }
        Balance::ConsistentHash => Order::Ranked(hash()),
    }
}

/// A number below `n`, from one of 32 bits (D. Lemire, "Fast Random Integer Generation in an Interval", ACM TOMACS
/// 29(1), 2019, without its correction: `n` is small).
fn below(random: u64, n: usize) -> usize {
    usize::try_from((random * n as u64) >> 32).unwrap_or(0)
}

/// The endpoints in this order, each once. `seed` is an endpoint's own number, the same wherever it stands. Nothing is
/// allocated.
pub fn in_order<T>(order: Order, endpoints: &[T], seed: impl Fn(&T) -> u64) -> impl Iterator<Item = &T> {
    let (mut given, mut last) = (0, None);
    std::iter::from_fn(move || {
        if given == endpoints.len() {
            return None;
        }
        given += 1;
        let at = match order {
            Order::Around(from) => (from + given - 1) % endpoints.len(),
            Order::Ranked(hash) => {
                let scores = endpoints.iter().enumerate().map(|(i, e)| (mix(hash ^ seed(e)), i));
                last = scores.filter(|score| last.is_none_or(|last| *score < last)).max();
                last?.1
            }
        };
        endpoints.get(at)
    })
}

/// A number for a target, or for an endpoint: the same in every process and every version. FNV-1a, and mixed, since
/// that alone spreads short keys badly over the high bits.
pub fn hash(target: &Target) -> u64 {
    let fnv = |hash: u64, bytes: &[u8]| {
        bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
    };
    let hash = match target {
        Target::Addr(addr) => match addr.ip().to_canonical() {
            IpAddr::V4(ip) => fnv(FNV_BASIS, &ip.octets()),
            IpAddr::V6(ip) => fnv(FNV_BASIS, &ip.octets()),
        },
        Target::Name(name, _) => fnv(FNV_BASIS, name.as_bytes()),
    };
    mix(fnv(hash, &target.port().to_be_bytes()))
}

/// The offset basis of FNV-1a with 64 bits.
const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// Every bit of the input in every bit of the output: the end of SplitMix64 (Steele, Lea, Flood 2014).
pub fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The first connection with a free stream: those that are not needed become idle.
pub fn with_room<T>(connections: &[T], free: impl Fn(&T) -> usize) -> Option<&T> {
    connections.iter().find(|c| free(c) > 0)
}

/// Whether it is time to open the next connection: fewer streams are free than one connection's share.
pub fn is_nearly_full<T>(connections: &[T], free: impl Fn(&T) -> usize, limit: impl Fn(&T) -> usize) -> bool {
    let most = connections.iter().map(limit).max().unwrap_or(0);
    connections.iter().map(free).sum::<usize>() < most / HEADROOM
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Numbers for targets and for chance.
    fn number(n: usize) -> u64 {
        mix(n as u64)
    }

    /// The endpoint that flow `flow` gets first, of these seeds.
    fn first(balance: Balance, flow: usize, seeds: &[u64], busy: impl Fn(&u64) -> usize) -> u64 {
        let order = order(balance, flow, number(flow), || number(flow + 1_000_000), seeds, busy);
        *in_order(order, seeds, |s| *s).next().unwrap()
    }

    proptest! {
        #[test]
        fn each_endpoint_is_tried_once_whatever_the_order(n in 0_usize..40, flow: usize, random: u64) {
            let seeds: Vec<u64> = (0..n).map(number).collect();
            for balance in [Balance::RoundRobin, Balance::Random, Balance::LeastRequest, Balance::ConsistentHash] {
                let order = order(balance, flow, random, || random, &seeds, |s| s.trailing_zeros() as usize);
                let mut tried: Vec<_> = in_order(order, &seeds, |s| *s).copied().collect();
                tried.sort_unstable();
                let mut all = seeds.clone();
                all.sort_unstable();
                prop_assert_eq!(tried, all);
            }
        }

        #[test]
        fn when_an_endpoint_leaves_only_its_targets_move_and_each_to_its_second_choice(
            n in 2_usize..30,
            leaves in 0_usize..30,
        ) {
            let seeds: Vec<u64> = (0..n).map(number).collect();
            let gone = seeds[leaves % n];
            let left: Vec<u64> = seeds.iter().copied().filter(|s| *s != gone).collect();
            for target in 0..200 {
                let order = Order::Ranked(number(target + 5000));
                let mut before = in_order(order, &seeds, |s| *s);
                let after = in_order(order, &left, |s| *s).next();
                let was = before.next();
                prop_assert_eq!(after, if was == Some(&gone) { before.next() } else { was });
            }
        }

        #[test]
        fn the_place_in_the_list_does_not_matter_to_consistent_hashing(n in 1_usize..20, target: u64) {
            let seeds: Vec<u64> = (0..n).map(number).collect();
            let turned: Vec<u64> = seeds.iter().rev().copied().collect();
            let order = Order::Ranked(target);
            prop_assert!(in_order(order, &seeds, |s| *s).eq(in_order(order, &turned, |s| *s)));
        }
    }

    #[test]
    fn flows_are_spread_evenly() {
        const FLOWS: usize = 10_000;
        for n in [1_usize, 2, 3, 7, 20] {
            let seeds: Vec<u64> =
                (0..n).map(|i| hash(&format!("10.9.0.{i}:15008").parse().unwrap())).collect();
            for balance in
                [Balance::RoundRobin, Balance::Random, Balance::LeastRequest, Balance::ConsistentHash]
            {
                let mut counts = vec![0_usize; n];
                for flow in 0..FLOWS {
                    let got = first(balance, flow, &seeds, |_| 0);
                    counts[seeds.iter().position(|s| *s == got).unwrap()] += 1;
                }
                // Five standard deviations of a binomial distribution.
                let mean = FLOWS as f64 / n as f64;
                let bound = 5.0 * (mean * (1.0 - 1.0 / n as f64)).sqrt() + 1.0;
                for count in counts {
                    assert!((count as f64 - mean).abs() <= bound, "{balance:?} over {n}: {count}");
                }
            }
        }
    }

    /// `least_request` takes the less busy of two endpoints that are picked by chance.
    #[test]
    fn of_two_picked_by_chance_the_less_busy_is_taken_and_nobody_looks_at_more_than_two() {
        let seeds: Vec<u64> = (0..10).collect();
        let mut counts = [0_usize; 10];
        for flow in 0..10_000 {
            let looked = std::cell::Cell::new(0);
            let got = first(Balance::LeastRequest, flow, &seeds, |s| {
                looked.set(looked.get() + 1);
                usize::try_from(*s).unwrap()
            });
            assert_eq!(looked.get(), 2);
            counts[usize::try_from(got).unwrap()] += 1;
        }
        // The busiest is taken only when it is picked twice, which it is not; the least busy by every fifth flow.
        assert_eq!(counts[9], 0);
        assert!((1_800..2_200).contains(&counts[0]), "{counts:?}");
        assert!(counts.windows(2).all(|two| two[0] > two[1]), "{counts:?}");
    }

    #[test]
    fn hashes_stay_the_same_from_version_to_version() {
        let of = |text: &str| hash(&text.parse().unwrap());
        assert_eq!(of("10.0.0.1:80"), 0x0186_1fbf_7d07_dea9);
        assert_eq!(of("db.internal:5432"), 0x7ffc_8b4f_c52c_9dc3);
        assert_eq!(of("[::ffff:10.0.0.1]:80"), of("10.0.0.1:80"));
    }

    #[test]
    fn the_next_connection_is_opened_before_the_last_place_is_taken() {
        let free = |n: &usize| *n;
        assert_eq!(with_room(&[0, 3, 9], free), Some(&3));
        assert_eq!(with_room(&[0, 0], free), None);
        assert!(is_nearly_full(&[0, 9], free, |_| 100));
        assert!(!is_nearly_full(&[0, 10], free, |_| 100));
        assert!(
            !is_nearly_full(&[5], free, |_| 5),
            "a handful of streams is no reason for another connection"
        );
    }
}
