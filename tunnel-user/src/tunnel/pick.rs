//! Which endpoint, and which of its connections: the choices that every new stream waits for.
//!
//! Enters: how busy each is. Leaves: which is next. Invariant: pure; whoever asks does the counting. It never
//! opens a connection.

use crate::config::Balance;

/// A new connection is opened when fewer than one place in this many is free.
const HEADROOM: usize = 10;

/// The order in which endpoints are tried: in turn; with least_request those with fewer streams first, in
/// turn where they are level. `turn` counts up.
pub fn in_order<T>(balance: Balance, turn: usize, endpoints: &[T], busy: impl Fn(&T) -> usize) -> Vec<&T> {
    let (before, from) = endpoints.split_at(turn % endpoints.len().max(1));
    let mut order: Vec<_> = from.iter().chain(before).collect();
    if balance == Balance::LeastRequest {
        order.sort_by_key(|e| busy(e));
    }
    order
}

/// The first connection with a free place: those that are not needed become idle.
pub fn with_room<T>(connections: &[T], free: impl Fn(&T) -> usize) -> Option<&T> {
    connections.iter().find(|c| free(c) > 0)
}

/// Whether it is time to open the next connection: fewer places are free than one connection's share.
pub fn is_nearly_full<T>(connections: &[T], free: impl Fn(&T) -> usize, limit: impl Fn(&T) -> usize) -> bool {
    let most = connections.iter().map(limit).max().unwrap_or(0);
    connections.iter().map(free).sum::<usize>() < most / HEADROOM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_take_turns_and_those_with_fewer_streams_come_first() {
        let busy = [2, 0, 0, 1];
        let order = |balance, turn| {
            let all: Vec<_> = (0..busy.len()).collect();
            in_order(balance, turn, &all, |i| busy[*i]).into_iter().copied().collect::<Vec<_>>()
        };
        assert_eq!(order(Balance::RoundRobin, 0), [0, 1, 2, 3]);
        assert_eq!(order(Balance::RoundRobin, 6), [2, 3, 0, 1]);
        assert_eq!(order(Balance::LeastRequest, 0), [1, 2, 3, 0]);
        assert_eq!(order(Balance::LeastRequest, 2), [2, 1, 3, 0], "those that are level take turns");
        assert!(in_order(Balance::LeastRequest, 7, &[0_usize; 0], |n| *n).is_empty());
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
            "a handful of places is no reason for another connection"
        );
    }
}
