//! A client of the admin interface: which daemon, and what it answers.
//!
//! # Invariants
//! - An answer that is longer than `ANSWER_MAX`, or does not come, is an error and not a wait.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::{
    admin,
    config::Config,
    process::exit::{Cause, Failure},
};

/// How long a daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer that is read: 100,000 flows are 50 MB.
const ANSWER_MAX: usize = 256 << 20;

/// Which daemon.
#[derive(Clone, Debug, Default, Args)]
pub struct DaemonArgs {
    /// The daemon's configuration file.
    ///
    /// Default: the one daemon of this user that runs.
    #[arg(long, value_name = "FILE", conflicts_with = "socket")]
    pub config: Option<PathBuf>,
    /// The daemon's admin socket.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

impl DaemonArgs {
    /// Its admin socket.
    pub fn socket(&self) -> Result<PathBuf, Failure> {
        if let Some(socket) = &self.socket {
            return Ok(socket.clone());
        }
        if let Some(file) = &self.config {
            let by_default = || admin::default_socket(file).map_err(|e| nobody(&e.to_string()));
            return match Config::load_to_detach(file) {
                Ok(config) => config.admin.socket.map_or_else(by_default, Ok),
                // Of a daemon that goes on with what was there before, which is when it is asked.
                Err(mistakes) => match by_default() {
                    Ok(socket) if std::os::unix::net::UnixStream::connect(&socket).is_ok() => Ok(socket),
                    _ => Err(mistakes.into()),
                },
            };
        }
        let mut found = admin::sockets();
        match found.len() {
            0 => Err(nobody("no daemon of this user has an admin socket")),
            1 => Ok(found.remove(0)),
            _ => {
                let all: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
                let what = format!("several daemons run: {}", all.join(", "));
                Err(Failure::Other(Cause::new(what, "Say which with --config or --socket.")))
            }
        }
    }
}

fn nobody(what: &str) -> Failure {
    let remedy = "Start one with `tunnel run --config FILE`; as another user than the daemon's (sudo) its socket is not found. \
                  Daemons without a file have none.";
    Failure::Other(Cause::new(what, remedy))
}

/// A daemon that can be asked.
#[derive(Clone, Debug)]
pub struct Client(PathBuf);

impl Client {
    /// The one that is meant.
    pub fn new(which: &DaemonArgs) -> Result<Self, Failure> {
        which.socket().map(Self)
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.0
    }

    /// What a path answers, as what it is.
    pub fn read<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let body = self.get(path)?;
        serde_json::from_slice(&body).map_err(|e| {
            self.failed(&format!("{path}: it speaks another version of the admin interface: {e}"), "")
        })
    }

    /// What a path answers.
    pub fn get(&self, path: &str) -> Result<Bytes, Failure> {
        self.ask(&Method::GET, path)
    }

    /// Has it do something.
    pub fn post(&self, path: &str) -> Result<Bytes, Failure> {
        self.ask(&Method::POST, path)
    }

    fn ask(&self, method: &Method, path: &str) -> Result<Bytes, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| self.failed(&e.to_string(), ""))?;
        let answered =
            runtime.block_on(async { tokio::time::timeout(PATIENCE, self.exchange(method, path)).await });
        answered
            .unwrap_or_else(|_| Err(self.failed("it does not answer", "The log of the daemon may say why.")))
    }

    async fn exchange(&self, method: &Method, path: &str) -> Result<Bytes, Failure> {
        let failed = |e: &dyn std::fmt::Display| self.failed(&e.to_string(), "");
        let stream = UnixStream::connect(&self.0).await.map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => {
                self.failed(&e.to_string(), "Only the daemon's user may: sudo tunnel ...")
            }
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                self.failed("no daemon listens there", "Start it, or say which with --config or --socket.")
            }
            _ => failed(&e),
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed(&e))?;
        let request = Request::builder().method(method).uri(path).header("host", "tunnel");
        let request = request.body(Empty::<Bytes>::new()).map_err(|e| failed(&e))?;
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(|e| failed(&e))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map_err(|e| {
                if e.is::<LengthLimitError>() {
                    self.failed("its answer is too long", "")
                } else {
                    failed(&e)
                }
            })?;
            Ok::<_, Failure>((status, body.to_bytes()))
        };
        // The connection is driven until the answer is there.
        let mut connection = std::pin::pin!(connection);
        let mut exchange = std::pin::pin!(exchange);
        let (status, body) = tokio::select! {
            biased;
            answered = &mut exchange => answered?,
            ended = &mut connection => {
                if let Err(e) = ended {
                    return Err(failed(&e));
                }
                exchange.await?
            }
        };
        if status.is_success() || status == StatusCode::SERVICE_UNAVAILABLE && path.starts_with("/healthz") {
            return Ok(body);
        }
        let said: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let said = said["error"].as_str().map_or_else(|| status.to_string(), str::to_owned);
        Err(Failure::Other(Cause::new(said, "")))
    }

    fn failed(&self, why: &str, remedy: &str) -> Failure {
        Failure::Other(Cause::new(format!("the admin socket {}: {why}", self.0.display()), remedy))
    }
}

/// A parameter of a request, as it stands in a URI (RFC 3986 section 2.1).
pub(crate) fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            out.push(byte.into());
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}
