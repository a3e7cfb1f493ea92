//! An identity that a server pushes: the thread that listens to it, and what it has sent last.
//!
//! # Invariants
//! - The last material is used until it expires, whatever becomes of the server; but not once the server has taken it back.
//! - The thread ends with the provider.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime,
    sync::{oneshot, watch},
    time::sleep,
};

use super::provider::{IdentityError, IdentityProvider, Material, Subscription};

/// How long a start, or a reload, waits for the first material.
const FIRST_WAIT: Duration = Duration::from_secs(10);
/// Between two attempts to reach the server: the first, and the longest, each up to that much less by chance.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Listens to a server.
pub(super) trait Source: Send + 'static {
    /// Listens until something goes wrong; what comes goes to `sink`.
    fn listen(&self, sink: &Sink) -> impl Future<Output = Broken>;
}

/// Why nobody listens any more.
pub(super) enum Broken {
    /// The server cannot be reached, or has ended the stream: tried again.
    Lost(String),
    /// There is no identity for us: what there was is given up. Tried again.
    Withdrawn(String),
}

/// Takes what a server sends.
pub(super) struct Sink(Arc<Shared>);

impl Sink {
    /// There is new material.
    pub(super) fn put(&self, material: Material) {
        self.0.set(Latest::Have(Box::new(material)));
    }
}

enum Latest {
    /// Nothing has come yet; why, as far as is known.
    Waiting(String),
    Have(Box<Material>),
    Withdrawn(String),
}

struct Shared {
    origin: String,
    latest: Mutex<Latest>,
    settled: Condvar,
    /// Counts the changes of `latest`.
    changes: watch::Sender<u64>,
}

impl Shared {
    fn latest(&self) -> MutexGuard<'_, Latest> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, latest: Latest) {
        *self.latest() = latest;
        self.settled.notify_all();
        self.changes.send_modify(|n| *n += 1);
    }
}

/// See the module.
pub(super) struct Pushed {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Pushed {
    /// Listens on a thread of its own. `origin`: the server, for errors.
    pub(super) fn start(origin: String, source: impl Source) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            origin,
            latest: Mutex::new(Latest::Waiting("nothing was sent yet".to_owned())),
            settled: Condvar::new(),
            changes: watch::Sender::new(0),
        });
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let sink = Sink(Arc::clone(&shared));
        let listen = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = again_and_again(&source, &sink) => {}
                    _ = stopped => {}
                }
            });
        };
        let thread = thread::Builder::new().name("identity-source".to_owned()).spawn(listen)?;
        Ok(Self { shared, stop: Some(stop), thread: Some(thread) })
    }
}

async fn again_and_again(source: &impl Source, sink: &Sink) {
    let shared = &sink.0;
    let mut pause = BACK_OFF.0;
    // What was logged last: said once, and not every few seconds while it lasts.
    let mut said = String::new();
    loop {
        let before = *shared.changes.borrow();
        let broken = source.listen(sink).await;
        if *shared.changes.borrow() != before {
            pause = BACK_OFF.0;
            said.clear();
        }
        let (Broken::Lost(why) | Broken::Withdrawn(why)) = &broken;
        if said != *why {
            tracing::warn!(
                provider = shared.origin,
                reason = why,
                "lost the identity provider: trying again"
            );
            said.clone_from(why);
        }
        match broken {
            Broken::Lost(why) => {
                let mut latest = shared.latest();
                if let Latest::Waiting(said) = &mut *latest {
                    said.clone_from(&why);
                }
            }
            Broken::Withdrawn(why) => {
                let news = match &mut *shared.latest() {
                    Latest::Waiting(said) => {
                        said.clone_from(&why);
                        false
                    }
                    Latest::Have(_) => true,
                    Latest::Withdrawn(_) => false,
                };
                if news {
                    shared.set(Latest::Withdrawn(why));
                }
            }
        }
        sleep(pause.mul_f32(0.5 + fastrand::f32() / 2.0)).await;
        pause = (pause * 2).min(BACK_OFF.1);
    }
}

impl Drop for Pushed {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that listens for identities panicked");
        }
    }
}

impl IdentityProvider for Pushed {
    fn fetch(&self) -> Result<Material, IdentityError> {
        let until = Instant::now() + FIRST_WAIT;
        let mut latest = self.shared.latest();
        loop {
            let origin = self.shared.origin.clone();
            match &*latest {
                Latest::Have(material) => return Ok((**material).clone()),
                Latest::Withdrawn(why) => return Err(IdentityError::Withdrawn { origin, why: why.clone() }),
                Latest::Waiting(why) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(IdentityError::Unavailable { origin, why: why.clone() });
                    }
                    let waited = self.shared.settled.wait_timeout(latest, left);
                    latest = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    fn subscribe(&self, mut changed: Box<dyn FnMut() + Send>) -> io::Result<Subscription> {
        let mut changes = self.shared.changes.subscribe();
        // What has come since it was fetched last.
        changes.mark_changed();
        let runtime = runtime::Builder::new_current_thread().build()?;
        let (stop, mut stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new().name("identity-watch".to_owned()).spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        biased;
                        _ = &mut stopped => return,
                        news = changes.changed() => match news {
                            Ok(()) => changed(),
                            Err(_) => return,
                        },
                    }
                }
            });
        })?;
        Ok(Subscription::new(Watching { stop: Some(stop), thread: Some(thread) }))
    }
}

/// The thread that tells of changes; ends when this is dropped.
struct Watching {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        drop(self.stop.take());
        // Not joined where it is the one that drops this.
        if let Some(thread) = self.thread.take().filter(|t| t.thread().id() != thread::current().id()) {
            let _panicked = thread.join();
        }
    }
}
