//! The router: from what is known about a flow to where it goes.
//!
//! Enters: a flow's source and target. Leaves: an upstream, or the order to dial or to refuse. Invariant:
//! the first route that matches decides, and no match is a refusal. It never resolves a name, and has no
//! state: chance is an argument.

use crate::{
    config::{Action, Route},
    flow::Target,
};

/// Who handed us a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// eBPF redirected an application's connect() to us.
    Captured,
    /// A peer sent a CONNECT request to one of our listeners.
    Listener,
}

/// Where a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Through this upstream: an index into the configuration's.
    Upstream(usize),
    /// We dial the target.
    Direct,
    /// A route refuses it.
    Deny,
    /// No route takes it; it is refused.
    NoRoute,
}

/// The routes of a configuration.
#[derive(Clone, Debug)]
pub struct Router {
    routes: Vec<Route>,
}

impl Router {
    /// From the configuration's routes, in their order.
    pub fn new(routes: Vec<Route>) -> Self {
        Self { routes }
    }

    /// Where a flow goes. `random` picks among weighted upstreams; each value of a u32 should be as likely.
    pub fn decide(&self, source: Source, target: &Target, random: u32) -> Decision {
        match self.routes.iter().find(|r| matches(r, source, target)).map(|r| &r.to) {
            None => Decision::NoRoute,
            Some(Action::Deny) => Decision::Deny,
            Some(Action::Direct) => Decision::Direct,
            Some(Action::Upstreams(shares)) => {
                pick(shares, random).map_or(Decision::NoRoute, Decision::Upstream)
            }
        }
    }
}

fn matches(route: &Route, source: Source, target: &Target) -> bool {
    if !route.source.is_empty() && !route.source.contains(&source) {
        return false;
    }
    if route.destination.is_empty() && route.host.is_empty() {
        return true;
    }
    match target {
        Target::Addr(addr) => route.destination.iter().any(|p| p.contains(*addr)),
        Target::Name(name, port) => route.host.iter().any(|p| p.contains(name, *port)),
    }
}

/// The upstream into whose share `random` falls. `None` only when all weights are 0, which the
/// configuration does not admit.
fn pick(shares: &[(usize, u32)], random: u32) -> Option<usize> {
    let sum: u64 = shares.iter().map(|(_, weight)| u64::from(*weight)).sum();
    // Scaled rather than reduced modulo the sum: no share gains by the remainder.
    let mut point = (u64::from(random) * sum) >> u32::BITS;
    for (upstream, weight) in shares {
        match point.checked_sub(u64::from(*weight)) {
            None => return Some(*upstream),
            Some(left) => point = left,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(source: &[Source], destination: &[&str], host: &[&str], to: Action) -> Route {
        Route {
            source: source.to_vec(),
            destination: destination.iter().map(|s| s.parse().unwrap()).collect(),
            host: host.iter().map(|s| s.parse().unwrap()).collect(),
            to,
        }
    }

    #[test]
    fn the_first_match_wins_and_no_match_is_refused() {
        let router = Router::new(vec![
            route(&[], &["10.1.0.0/16"], &[], Action::Deny),
            route(&[Source::Captured], &["10.0.0.0/8:80"], &[], Action::Upstreams(vec![(3, 1)])),
            route(&[Source::Listener], &[], &["*.internal"], Action::Direct),
        ]);
        let decide = |source, target: &str| router.decide(source, &target.parse().unwrap(), 0);
        assert_eq!(decide(Source::Captured, "10.1.0.1:80"), Decision::Deny);
        assert_eq!(decide(Source::Captured, "10.2.0.1:80"), Decision::Upstream(3));
        assert_eq!(decide(Source::Captured, "[::ffff:10.2.0.1]:80"), Decision::Upstream(3));
        assert_eq!(decide(Source::Captured, "10.2.0.1:81"), Decision::NoRoute);
        assert_eq!(decide(Source::Listener, "10.2.0.1:80"), Decision::NoRoute);
        assert_eq!(decide(Source::Listener, "a.internal:80"), Decision::Direct);
        assert_eq!(decide(Source::Listener, "a.example:80"), Decision::NoRoute);
    }

    #[test]
    fn weights_divide_the_flows_exactly() {
        let router =
            Router::new(vec![route(&[], &[], &[], Action::Upstreams(vec![(0, 90), (1, 0), (2, 10)]))]);
        let target = "10.0.0.1:80".parse().unwrap();
        let mut count = [0; 3];
        for i in 0..1000u32 {
            let Decision::Upstream(n) = router.decide(Source::Captured, &target, i * (u32::MAX / 1000))
            else {
                panic!("refused")
            };
            count[n] += 1;
        }
        assert_eq!(count[1], 0);
        assert!((899..=901).contains(&count[0]), "{count:?}");
        assert_eq!(router.decide(Source::Captured, &target, u32::MAX), Decision::Upstream(2));
    }
}
