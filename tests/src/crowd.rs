//! An echo server for more connections than there are threads or descriptors to spare. It counts the connections that
//! are up, and how many have come from which address.
//!
//! # Invariants
//! - A connection costs one descriptor, and nothing once it has ended.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::LocalSet,
};

use crate::netns::NetNs;

/// What echoes, in a thread of its own.
pub struct Crowd {
    addresses: Vec<SocketAddr>,
    counted: Arc<Mutex<Counted>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Counted {
    held: usize,
    from: BTreeMap<IpAddr, usize>,
}

impl Crowd {
    /// Listens on each of these; port 0 means any.
    pub fn start(host: &NetNs, addresses: &[SocketAddr]) -> Result<Self> {
        let bind = |at: &SocketAddr| -> io::Result<std::net::TcpListener> {
            let listener = host.run(|| std::net::TcpListener::bind(at))?;
            // The backlog of std is 128.
            nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listeners = addresses.iter().map(bind).collect::<io::Result<Vec<_>>>().context("listening")?;
        let addresses = listeners.iter().map(std::net::TcpListener::local_addr).collect::<io::Result<_>>()?;
        let counted = Arc::new(Mutex::new(Counted::default()));
        let (stop, stopped) = oneshot::channel();
        let theirs = Arc::clone(&counted);
        let thread = host.spawn("crowd", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime takes two descriptors");
            let tasks = LocalSet::new();
            tasks.block_on(&runtime, async move {
                for listener in listeners {
                    let listener = TcpListener::from_std(listener).expect("it listens");
                    tokio::task::spawn_local(accept(listener, Arc::clone(&theirs)));
                }
                let _dropped = stopped.await;
            });
        })?;
        Ok(Self { addresses, counted, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Connections that are up.
    pub fn held(&self) -> usize {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).held
    }

    /// How many have come from which address so far.
    pub fn from(&self) -> BTreeMap<IpAddr, usize> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).from.clone()
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, counted: Arc<Mutex<Counted>>) {
    // Without descriptors there is nothing to wait for but the end of the test.
    while let Ok((stream, peer)) = listener.accept().await {
        {
            let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
            counted.held += 1;
            *counted.from.entry(peer.ip()).or_default() += 1;
        }
        let counted = Arc::clone(&counted);
        tokio::task::spawn_local(async move {
            let _reset = echo(stream).await;
            counted.lock().unwrap_or_else(PoisonError::into_inner).held -= 1;
        });
    }
}

async fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buf = [0; 1024];
    loop {
        match stream.read(&mut buf).await? {
            0 => return Ok(()),
            n => stream.write_all(&buf[..n]).await?,
        }
    }
}
