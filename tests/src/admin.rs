//! The admin interface of a daemon, as programs ask it: over its Unix socket or over TCP, in bytes of our own.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value as Json;

use crate::{
    Gateway,
    daemon::Daemon,
    netns::NetNs,
    node::Node,
    process::code,
    programs,
    wait::{PATIENCE, wait_for},
};

/// What was answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The head, as it came.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Result<Json> {
        serde_json::from_str(&self.body).with_context(|| format!("no JSON: {self:?}"))
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(':'));
        let mut named = lines.filter(|(n, _)| n.eq_ignore_ascii_case(name));
        named.next().map(|(_, value)| value.trim())
    }
}

/// The admin socket of a daemon.
#[derive(Clone, Debug)]
pub struct Admin(PathBuf);

impl Admin {
    /// That of a daemon whose configuration does not name one. Waits until it is there: it comes after what is captured.
    pub fn of(daemon: &Daemon) -> Self {
        let name = daemon.config().file_stem().unwrap_or_default().to_string_lossy();
        let path = PathBuf::from(format!("/run/tunnel/admin-{name}.sock"));
        // Where it does not come, the first request says so.
        let _late = wait_for("the admin socket", PATIENCE, || path.exists().then_some(()));
        Self(path)
    }

    /// That at a path.
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// GET.
    pub fn get(&self, path: &str) -> Result<Answer> {
        self.ask("GET", path, "")
    }

    /// GET, which must be answered 200 with JSON.
    pub fn json(&self, path: &str) -> Result<Json> {
        let answer = self.get(path)?;
        ensure!(answer.status == 200, "{path}: {answer:?}");
        answer.json()
    }

    /// POST, without a body.
    pub fn post(&self, path: &str) -> Result<Answer> {
        self.ask("POST", path, "")
    }

    /// A request with more headers, each with its line's end.
    pub fn ask(&self, method: &str, path: &str, headers: &str) -> Result<Answer> {
        let stream = UnixStream::connect(&self.0).with_context(|| format!("{}", self.0.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        exchange(stream, &request(method, path, &format!("Host: tunnel\r\n{headers}")))
    }

    /// The value of one series, by how its line begins.
    pub fn metric(&self, series: &str) -> Result<f64> {
        let text = self.get("/metrics")?.body;
        value(&text, series).with_context(|| format!("there is no series {series} in:\n{text}"))
    }
}

/// The value of a series in a text, by its name with labels.
pub fn value(text: &str, series: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

/// A request over TCP from a host, with all its headers.
pub fn over_tcp(host: &NetNs, to: SocketAddr, method: &str, path: &str, headers: &str) -> Result<Answer> {
    host.run(|| {
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        exchange(stream, &request(method, path, headers))
    })
}

fn request(method: &str, path: &str, headers: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n")
}

fn exchange(mut stream: impl Read + Write, request: &str) -> Result<Answer> {
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes)?;
    let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no answer: {text:?}"))?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no status")?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunk(body)? } else { body.to_owned() };
    Ok(Answer { status, head: head.to_owned(), body })
}

fn unchunk(mut rest: &str) -> Result<String> {
    let mut body = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n").context("a chunk has no size")?;
        let size = usize::from_str_radix(size, 16)?;
        if size == 0 {
            return Ok(body);
        }
        let (Some(chunk), Some(after)) = (after.get(..size), after.get(size + 2..)) else {
            bail!("the answer ends within a chunk");
        };
        body += chunk;
        rest = after;
    }
}

impl Admin {
    /// Waits until the status says so.
    pub fn until(&self, what: &str, is: impl Fn(&Json) -> bool) -> Result<Json> {
        wait_for(what, PATIENCE, || match self.json("/status") {
            Ok(status) if is(&status) => Some(Ok(status)),
            Ok(_) => None,
            // At no moment is nobody there.
            Err(e) => Some(Err(e)),
        })?
    }
}

/// A configuration of a node that captures, with more in `[admin]`; the capture is called "apps".
pub fn config(node: &Node<'_>, gateway: &Gateway<'_>, admin: &str) -> String {
    format!("[admin]\n{admin}\n{}", node.config(gateway, "", "name = \"apps\""))
}

/// `tunnel` with words, about a daemon; its status and what it prints.
pub fn tunnel(daemon: &Daemon, words: &[&str]) -> Result<(i32, String)> {
    // The socket comes after what is captured, which is what starting a daemon waits for.
    let _there = Admin::of(daemon);
    run(&[words, &["--config", &daemon.config().display().to_string()]].concat())
}

/// `tunnel` with words; its status and what it prints.
pub fn run(words: &[&str]) -> Result<(i32, String)> {
    let done = Command::new(programs::tunnel()?).args(words).output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    Ok((code(done.status), said))
}
