//! How the endpoints of one upstream fare: what flows meet there, and what checks find. It is one worker's, as its
//! connections are: nothing is shared, and each worker checks by itself.
//!
//! # Invariants
//! - An endpoint that is ejected or unhealthy comes back by itself when it is available; every wait of its way back is
//!   bounded by the configuration.

use std::{
    cell::RefCell,
    rc::{Rc, Weak},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    CheckError, ConnectError,
    connector::Connector,
    endpoints::{Endpoint, Endpoints},
};
use crate::config::{CheckKind, HealthCheck, OutlierDetection};

/// Checks come up to one part in this many earlier or later than the interval says, by chance: those of many workers
/// and endpoints spread.
const JITTER: u32 = 10;

/// Looks after endpoints.
pub struct Health(Rc<Inner>);

struct Inner {
    upstream: String,
    outlier: OutlierDetection,
    check: Option<HealthCheck>,
    connector: Rc<Connector>,
    endpoints: Rc<Endpoints>,
    /// They hold the rest weakly.
    tasks: RefCell<JoinSet<()>>,
}

impl Health {
    /// Nothing is checked until an endpoint comes.
    pub fn new(
        upstream: &str,
        outlier: OutlierDetection,
        check: Option<HealthCheck>,
        connector: Rc<Connector>,
        endpoints: Rc<Endpoints>,
    ) -> Self {
        let tasks = RefCell::default();
        Self(Rc::new(Inner { upstream: upstream.to_owned(), outlier, check, connector, endpoints, tasks }))
    }

    /// Checks these from now on, if endpoints are checked.
    pub fn watch(&self, came: &[Rc<Endpoint>]) {
        let Some(check) = &self.0.check else { return };
        for endpoint in came {
            let task = watch(Rc::downgrade(&self.0), check.clone(), Rc::downgrade(endpoint));
            self.0.attach_task(endpoint, task);
        }
    }

    /// Ends everything.
    pub fn stop(&self) {
        self.0.tasks.borrow_mut().abort_all();
    }

    /// A connection has failed.
    pub fn failed(&self, endpoint: &Rc<Endpoint>, why: &ConnectError) {
        let inner = &self.0;
        endpoint.note(&why.to_string());
        endpoint.failures.set(endpoint.failures.get().saturating_add(1));
        if endpoint.failures.get() >= inner.outlier.consecutive_failures.get() {
            inner.eject(endpoint, why);
        }
    }

    /// A connection was made, or was there.
    pub fn connected(&self, endpoint: &Endpoint) {
        endpoint.failures.set(0);
    }

    /// It has answered a request as a gateway does that is at fault, or not at all.
    pub fn refused(&self, endpoint: &Rc<Endpoint>, why: &dyn std::fmt::Display) {
        let Some(most) = self.0.outlier.consecutive_gateway_failures else { return };
        endpoint.note(&why.to_string());
        endpoint.refusals.set(endpoint.refusals.get().saturating_add(1));
        if endpoint.refusals.get() >= most.get() {
            self.0.eject(endpoint, why);
        }
    }

    /// It has answered a request otherwise.
    pub fn answered(&self, endpoint: &Endpoint) {
        endpoint.refusals.set(0);
        endpoint.ejections.set(0);
    }
}

impl Inner {
    fn eject(self: &Rc<Self>, endpoint: &Rc<Endpoint>, why: &dyn std::fmt::Display) {
        if !self.endpoints.eject(endpoint, self.outlier.max_ejection_percent) {
            return;
        }
        tracing::warn!(upstream = self.upstream, endpoint = %endpoint.site.at, "ejected: {why}");
        let OutlierDetection { base_ejection_time, max_ejection_time, .. } = self.outlier;
        let first = back_off(base_ejection_time, max_ejection_time, endpoint.ejections.get());
        endpoint.ejections.set(endpoint.ejections.get().saturating_add(1));
        let probe = probe(Rc::downgrade(self), Rc::downgrade(endpoint), first, max_ejection_time);
        self.attach_task(endpoint, probe);
    }

    /// Starts a task that ends with the endpoint, and with us.
    fn attach_task(&self, endpoint: &Endpoint, task: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        while tasks.try_join_next().is_some() {}
        endpoint.attach_task(tasks.spawn_local(task));
    }

    /// An interval, more or less.
    fn jittered(&self, interval: Duration) -> Duration {
        interval - interval / JITTER + (interval / JITTER).mul_f64(2.0 * fastrand::f64())
    }
}

/// The first wait, doubled for each time before.
fn back_off(base: Duration, max: Duration, times: u32) -> Duration {
    base.saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX)).min(max)
}

/// Connects to an ejected endpoint until it succeeds; the connection stays in the pool, if there is one.
async fn probe(health: Weak<Inner>, endpoint: Weak<Endpoint>, first: Duration, max: Duration) {
    let mut wait = first;
    loop {
        sleep(wait).await;
        let (Some(health), Some(endpoint)) = (health.upgrade(), endpoint.upgrade()) else { return };
        match health.connector.probe(&endpoint.site).await {
            // At a limit of ours there is nothing to try it with: a flow will.
            Ok(()) | Err(ConnectError::Limit { .. } | ConnectError::Overflow { .. }) => {
                health.endpoints.readmit(&endpoint);
                tracing::info!(upstream = health.upstream, endpoint = %endpoint.site.at, "readmitted");
                return;
            }
            Err(e) => endpoint.note(&e.to_string()),
        }
        wait = (wait * 2).min(max);
    }
}

/// Checks an endpoint again and again. The first time after a part of the interval: workers start together.
async fn watch(health: Weak<Inner>, check: HealthCheck, endpoint: Weak<Endpoint>) {
    let (mut good, mut bad) = (0_u32, 0_u32);
    let mut wait = check.interval.mul_f64(fastrand::f64());
    loop {
        sleep(wait).await;
        let (Some(health), Some(endpoint)) = (health.upgrade(), endpoint.upgrade()) else { return };
        wait = health.jittered(check.interval);
        let asked = async {
            match check.kind {
                CheckKind::Tcp => health.connector.reach(&endpoint.site, check.timeout).await,
                CheckKind::Ping => health.connector.ping(&endpoint.site).await,
            }
        };
        let found = timeout(check.timeout, asked).await.unwrap_or_else(|_| {
            Err(CheckError::Failed(format!("no answer to a health check within {:?}", check.timeout)))
        });
        match found {
            Ok(()) => {
                (good, bad) = (good.saturating_add(1), 0);
                if endpoint.is_unhealthy() && good >= check.healthy_threshold.get() {
                    health.endpoints.set_unhealthy(&endpoint, false);
                    tracing::info!(upstream = health.upstream, endpoint = %endpoint.site.at, "healthy");
                }
            }
            Err(CheckError::Inconclusive) => {}
            Err(CheckError::Failed(why)) => {
                (good, bad) = (0, bad.saturating_add(1));
                endpoint.note(&why);
                if !endpoint.is_unhealthy() && bad >= check.unhealthy_threshold.get() {
                    health.endpoints.set_unhealthy(&endpoint, true);
                    tracing::warn!(upstream = health.upstream, endpoint = %endpoint.site.at, "unhealthy: {why}");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time until an ejected endpoint is probed doubles with each failure, up to `max_ejection_time`.
    #[test]
    fn the_way_back_gets_longer_up_to_a_bound() {
        let ms = Duration::from_millis;
        let waits = [0, 1, 2, 3, 4, 40].map(|times| back_off(ms(100), ms(1000), times));
        assert_eq!(waits, [ms(100), ms(200), ms(400), ms(800), ms(1000), ms(1000)]);
    }
}
