//! Endpoints from DNS: one for each address of a name, as long as the answers are good for.
//!
//! getaddrinfo(3) does not say how long an answer is good for; the look-ups of [`names`](crate::transport::resolver) do.
//!
//! # Invariants
//! - What is known stays when a question is not answered; an answer that there is nothing is an answer.
//! - No name is asked for more often than every `AGAIN_MIN`, whatever the answers say.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle},
    sync::{oneshot, watch},
    task::{AbortHandle, JoinSet},
    time::sleep,
};

use super::{EndpointSet, Feed, Site, tell};
use crate::{
    model::flow::Target,
    transport::{
        resolver::{Answer, Answers, both_families},
        tcp::Own,
    },
};

/// The shortest time after which a name is resolved again, also where that failed: CoreDNS gives the names of
/// Kubernetes services 5 s, and answers with less are those of load balancers that count on caches.
const AGAIN_MIN: Duration = Duration::from_secs(5);
/// The longest, so that a moved service is found although its old answer was good for a day.
const AGAIN_MAX: Duration = Duration::from_secs(5 * 60);
/// Asks the questions of this process, on a thread of its own: the answers come late, and workers have flows to carry.
pub struct Questions {
    own: Own,
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

impl Questions {
    /// Starts the thread. What it connects is ours.
    pub fn start(own: Own) -> io::Result<Arc<Self>> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let asking = move || {
            // An error means that the other end is gone, which is the order to stop.
            let _stop = runtime.block_on(stopped);
        };
        let thread = thread::Builder::new().name("endpoints-dns".to_owned()).spawn(asking)?;
        Ok(Arc::new(Self { own, handle, stop: Some(stop), thread: Mutex::new(Some(thread)) }))
    }

    /// Resolves the names among `endpoints` for an upstream, again and again as long as a copy of the feed lives.
    pub fn follow(self: &Arc<Self>, upstream: &str, endpoints: &[Target]) -> Feed {
        let (feed, told) = watch::channel(None);
        let task = follow(upstream.to_owned(), endpoints.to_vec(), self.own.clone(), feed);
        let task = self.handle.spawn(task).abort_handle();
        Feed::new(told, Keeper { task, _questions: Arc::clone(self) })
    }
}

impl Drop for Questions {
    fn drop(&mut self) {
        drop(self.stop.take());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|t| t.join().is_err()) {
            tracing::error!("the thread that resolved the names of endpoints had panicked");
        }
    }
}

/// Ends the questions for one upstream.
struct Keeper {
    task: AbortHandle,
    _questions: Arc<Questions>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(
    upstream: String,
    endpoints: Vec<Target>,
    own: Own,
    feed: watch::Sender<Option<EndpointSet>>,
) {
    let mut names: Vec<_> = endpoints.into_iter().map(Name::new).collect();
    loop {
        let mut asked = JoinSet::new();
        for (i, name) in names.iter().enumerate() {
            if let Target::Name(text, _) = &name.target {
                let text = text.clone();
                let own = own.clone();
                asked.spawn(async move { (i, both_families(&text, &own).await) });
            }
        }
        let mut again = AGAIN_MAX;
        while let Some(answered) = asked.join_next().await {
            let Ok((i, answers)) = answered else { continue };
            again = again.min(names[i].learn(&upstream, answers));
        }
        tell(&upstream, &feed, known(&names));
        sleep(again.max(AGAIN_MIN)).await;
    }
}

/// One name, and what is known of it.
struct Name {
    target: Target,
    /// The addresses of the newest answers, IPv4 and IPv6.
    addrs: [Vec<IpAddr>; 2],
    /// Why there are none, or why they are old.
    problem: Option<String>,
}

impl Name {
    fn new(target: Target) -> Self {
        Self { target, addrs: Default::default(), problem: None }
    }

    /// Takes what was answered, and leaves what was not as it is; when to ask again.
    fn learn(&mut self, upstream: &str, answers: Answers) -> Duration {
        let (mut again, mut problem) = (AGAIN_MAX, None);
        for (known, answer) in self.addrs.iter_mut().zip(answers) {
            match answer {
                Ok(Answer { addrs, good_for }) => {
                    *known = addrs;
                    again = again.min(good_for);
                }
                Err(why) => {
                    again = AGAIN_MIN;
                    problem = Some(why.to_string());
                }
            }
        }
        if problem.is_none() && self.addrs.iter().all(Vec::is_empty) {
            problem = Some("it has no address".to_owned());
        }
        // A problem that stays is said once.
        if let Some(why) = problem.as_ref().filter(|why| self.problem.as_ref() != Some(why)) {
            let stays =
                if self.addrs.iter().all(Vec::is_empty) { "" } else { "; what was known of it stays" };
            tracing::warn!(upstream, name = %self.target, "does not resolve: {why}{stays}");
        }
        self.problem = problem;
        again
    }
}

/// What all names give together. Answers come in any order: sorted, the same set is the same.
fn known(names: &[Name]) -> EndpointSet {
    let mut sites = BTreeSet::new();
    let mut lack = Vec::new();
    for Name { target, addrs, problem } in names {
        match target {
            Target::Addr(_) => {
                sites.insert(Site::from(target.clone()));
            }
            Target::Name(name, port) => {
                let site = |ip: &IpAddr| Site {
                    at: Target::Addr(SocketAddr::new(*ip, *port)),
                    named: target.clone(),
                };
                sites.extend(addrs.iter().flatten().map(site));
                lack.extend(problem.as_ref().map(|why| format!("{name} does not resolve: {why}")));
            }
        }
    }
    EndpointSet::new(sites, lack.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::resolver::Unanswered;

    fn name(text: &str) -> Name {
        Name::new(text.parse().unwrap())
    }

    fn answer(addrs: &[&str], seconds: u64) -> Result<Answer, Unanswered> {
        let addrs = addrs.iter().map(|a| a.parse().unwrap()).collect();
        Ok(Answer { addrs, good_for: Duration::from_secs(seconds) })
    }

    fn sites(names: &[Name]) -> Vec<String> {
        known(names).sites.iter().map(|s| format!("{} {}", s.at, s.named)).collect()
    }

    #[test]
    fn each_address_is_an_endpoint_that_is_called_by_its_name() {
        let mut names = [name("gw.test:15008"), name("10.0.0.9:1"), name("other.test:15008")];
        names[0].learn("east", [answer(&["10.0.0.2", "10.0.0.1"], 30), answer(&["fd00::1"], 60)]);
        names[2].learn("east", [answer(&["10.0.0.1"], 30), answer(&[], 60)]);
        assert_eq!(
            sites(&names),
            [
                "10.0.0.1:15008 gw.test:15008",
                "10.0.0.2:15008 gw.test:15008",
                "10.0.0.9:1 10.0.0.9:1",
                "[fd00::1]:15008 gw.test:15008"
            ]
        );
        let first = known(&names);
        names[0].learn("east", [answer(&["10.0.0.1", "10.0.0.2"], 30), answer(&["fd00::1"], 60)]);
        assert_eq!(known(&names), first, "the order of an answer means nothing");
    }

    #[test]
    fn what_is_not_answered_stays_known_and_an_answer_that_there_is_nothing_is_one() {
        let mut gw = name("gw.test:1");
        let failed = || Err(Unanswered::Failed("refused".to_owned()));
        assert_eq!(gw.learn("east", [failed(), failed()]), AGAIN_MIN);
        assert_eq!(known(std::slice::from_ref(&gw)).unavailable, "gw.test does not resolve: refused");
        assert_eq!(
            gw.learn("east", [answer(&["10.0.0.1"], 30), answer(&["fd00::1"], 20)]),
            Duration::from_secs(20)
        );
        assert_eq!(gw.learn("east", [answer(&["10.0.0.2"], 30), failed()]), AGAIN_MIN);
        assert_eq!(sites(std::slice::from_ref(&gw)), ["10.0.0.2:1 gw.test:1", "[fd00::1]:1 gw.test:1"]);
        gw.learn("east", [failed(), failed()]);
        assert_eq!(sites(std::slice::from_ref(&gw)).len(), 2);
        gw.learn("east", [answer(&[], 5), answer(&[], 5)]);
        let none = known(std::slice::from_ref(&gw));
        assert!(none.sites.is_empty());
        assert_eq!(none.unavailable, "gw.test does not resolve: it has no address");
    }
}
