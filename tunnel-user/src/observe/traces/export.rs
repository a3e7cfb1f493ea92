//! The thread that sends spans to a collector: OTLP over HTTP/1.1, one POST for each batch, on a connection of its own.
//!
//! A request every few seconds needs no connection that is kept, and an answer no more than its status and a few bytes.
//!
//! # Invariants
//! - A batch that a collector cannot take for now is sent again, [`TRIES`] times at most; what it refuses for good is dropped.
//! - The thread ends when its [`Exporter`] is dropped, within [`FLUSH`].

use std::{
    io::{self, Read as _, Write as _},
    net::TcpStream,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use prost::Message as _;

use super::{
    DROPPED, EXPORTED, Message, QUEUE_MAX, Span, Tracer,
    otlp::{self, ExportResponse},
};
use crate::{config::Traces, model::flow::Target};

/// Spans of one request, and how long they gather (defaults of OpenTelemetry's batch processors).
const BATCH: usize = 512;
/// How long.
const GATHER: Duration = Duration::from_secs(5);
/// How often a batch is sent: a collector that restarts is back by then.
const TRIES: u32 = 4;
/// The wait before it is sent again; twice as long each time.
const BACK_OFF: Duration = Duration::from_secs(1);
/// How often losses are logged.
const REPORT: Duration = Duration::from_secs(10);
/// How long what waits is sent for at the end.
const FLUSH: Duration = Duration::from_secs(2);
/// The longest answer that is read.
const ANSWER_MAX: usize = 64 * 1024;
/// Fields of its head.
const FIELDS_MAX: usize = 64;

/// Connects to a collector in this time.
pub type Connect = Box<dyn Fn(&Target, Duration) -> io::Result<TcpStream> + Send>;

/// What the thread is told beside spans.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
}

/// The owner of the thread.
pub struct Exporter {
    settings: Traces,
    tracer: Arc<Tracer>,
    queue: SyncSender<Message>,
    orders: Arc<Orders>,
    /// Locked by nobody but the end.
    ended: Mutex<Receiver<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Exporter {
    /// Starts the thread; nothing is connected before there are spans.
    pub fn start(settings: &Traces, connect: Connect) -> io::Result<Self> {
        let (queue, spans) = sync_channel(QUEUE_MAX);
        let (overflowed, orders) = (Arc::<AtomicU64>::default(), Arc::<Orders>::default());
        let (end, ended) = mpsc::channel();
        let sender = Sender {
            settings: settings.clone(),
            connect,
            spans,
            overflowed: Arc::clone(&overflowed),
            orders: Arc::clone(&orders),
            losses: Losses::default(),
        };
        let thread = thread::Builder::new().name("traces".to_owned()).spawn(move || {
            let _ends_with_it: mpsc::Sender<()> = end;
            sender.run();
        })?;
        let tracer = Arc::new(Tracer { sample: settings.sample, queue: queue.clone(), overflowed });
        let (settings, ended) = (settings.clone(), Mutex::new(ended));
        Ok(Self { settings, tracer, queue, orders, ended, thread: Some(thread) })
    }

    /// What workers trace by.
    pub fn tracer(&self) -> &Arc<Tracer> {
        &self.tracer
    }

    /// What it was started with.
    pub fn settings(&self) -> &Traces {
        &self.settings
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.orders.stop.store(true, Ordering::Release);
        // Where there is no room it is awake, and looks soon.
        let _full = self.queue.try_send(Message::Wake);
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        match ended.recv_timeout(2 * FLUSH) {
            Err(RecvTimeoutError::Timeout) => tracing::error!("the thread of traces does not end"),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
                    tracing::error!("the thread of traces panicked");
                }
            }
        }
    }
}

/// Spans that were dropped, until that is logged.
#[derive(Default)]
struct Losses {
    spans: u64,
    why: Option<String>,
    reported: Option<Instant>,
}

/// Why a collector did not take a batch.
enum Refused {
    /// It may later (OTLP, "Retryable Response Codes").
    ForNow(String),
    ForGood(String),
}

struct Sender {
    settings: Traces,
    connect: Connect,
    spans: Receiver<Message>,
    overflowed: Arc<AtomicU64>,
    orders: Arc<Orders>,
    losses: Losses,
}

impl Sender {
    fn run(mut self) {
        loop {
            let (batch, ended) = self.gather();
            let stop = ended || self.is_stopping();
            if !batch.is_empty() {
                self.send(batch);
            }
            if stop {
                break;
            }
            self.report(false);
        }
        // Nobody waits for the rest any longer than for one more batch.
        let (batch, _) = self.take(Vec::new());
        if !batch.is_empty() {
            self.send(batch);
        }
        let left = self.spans.try_iter().filter(|message| matches!(message, Message::Span(_))).count();
        self.dropped(left, None);
        self.report(true);
    }

    /// Waits for spans, and for as many as there are in a while; whether there will be none.
    fn gather(&mut self) -> (Vec<Span>, bool) {
        let told = if self.losses.spans > 0 || self.overflowed.load(Ordering::Relaxed) > 0 {
            self.spans.recv_timeout(REPORT)
        } else {
            self.spans.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        let first = match told {
            Ok(Message::Span(span)) => *span,
            Ok(Message::Wake) | Err(RecvTimeoutError::Timeout) => return (Vec::new(), false),
            Err(RecvTimeoutError::Disconnected) => return (Vec::new(), true),
        };
        let (mut batch, until) = (vec![first], Instant::now() + GATHER);
        while batch.len() < BATCH && !self.is_stopping() {
            match self.spans.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Message::Span(span)) => batch.push(*span),
                Ok(Message::Wake) => {}
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return (batch, true),
            }
        }
        self.take(batch)
    }

    /// Adds what is there.
    fn take(&self, mut batch: Vec<Span>) -> (Vec<Span>, bool) {
        while batch.len() < BATCH
            && let Ok(message) = self.spans.try_recv()
        {
            if let Message::Span(span) = message {
                batch.push(*span);
            }
        }
        (batch, false)
    }

    fn is_stopping(&self) -> bool {
        self.orders.stop.load(Ordering::Acquire)
    }

    fn send(&mut self, batch: Vec<Span>) {
        let spans = batch.len();
        let body = otlp::request(&self.settings.service_name, batch).encode_to_vec();
        let mut back_off = BACK_OFF;
        for attempt in 1.. {
            match self.post(&body) {
                Ok(rejected) => {
                    let rejected = usize::try_from(rejected).unwrap_or(0).min(spans);
                    EXPORTED.fetch_add((spans - rejected) as u64, Ordering::Relaxed);
                    if rejected > 0 {
                        self.dropped(rejected, Some("the collector rejected them".to_owned()));
                    }
                    return;
                }
                Err(Refused::ForNow(why)) if attempt < TRIES && !self.is_stopping() => {
                    tracing::debug!(endpoint = %self.settings.endpoint, why, "sending spans again");
                    self.pause(back_off);
                    back_off *= 2;
                }
                Err(Refused::ForNow(why) | Refused::ForGood(why)) => return self.dropped(spans, Some(why)),
            }
        }
    }

    /// Waits, unless it is to end. What comes meanwhile stays in the queue.
    fn pause(&mut self, length: Duration) {
        let until = Instant::now() + length;
        while Instant::now() < until && !self.is_stopping() {
            self.report(false);
            thread::park_timeout(Duration::from_millis(100));
        }
    }

    /// Sends one request; how many of its spans were rejected.
    fn post(&self, body: &[u8]) -> Result<i64, Refused> {
        let allowed =
            if self.is_stopping() { FLUSH.min(self.settings.timeout) } else { self.settings.timeout };
        let deadline = Instant::now() + allowed;
        let later = |e: io::Error| Refused::ForNow(e.to_string());
        let mut stream = (self.connect)(&self.settings.endpoint.target, allowed).map_err(later)?;
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_write_timeout(Some(left)).map_err(later)?;
        let request = [self.head(body.len()).as_slice(), body].concat();
        stream.write_all(&request).map_err(later)?;
        let answer = read(&mut stream, deadline).map_err(later)?;
        judge(&answer)
    }

    fn head(&self, length: usize) -> Vec<u8> {
        let Traces { endpoint, headers, .. } = &self.settings;
        let mut head = format!(
            "POST {} HTTP/1.1\r\nhost: {}\r\nuser-agent: tunnel/{}\r\ncontent-type: application/x-protobuf\r\n\
             content-length: {length}\r\nconnection: close\r\n",
            endpoint.path,
            endpoint.target,
            env!("CARGO_PKG_VERSION"),
        )
        .into_bytes();
        for (name, value) in headers {
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        head
    }

    fn dropped(&mut self, spans: usize, why: Option<String>) {
        DROPPED.fetch_add(spans as u64, Ordering::Relaxed);
        self.losses.spans += spans as u64;
        self.losses.why = why.or(self.losses.why.take());
    }

    /// Logs what was dropped, the first at once, later ones once in a while, and the last ones at the end.
    fn report(&mut self, last: bool) {
        self.losses.spans += self.overflowed.swap(0, Ordering::Relaxed);
        let due = self.losses.reported.is_none_or(|at| at.elapsed() >= REPORT);
        if self.losses.spans == 0 || !(due || last) {
            return;
        }
        let Losses { spans: dropped, why, .. } = std::mem::take(&mut self.losses);
        self.losses.reported = Some(Instant::now());
        let why = why.unwrap_or_else(|| "the queue is full".to_owned());
        tracing::warn!(endpoint = %self.settings.endpoint, dropped, error = why, "spans dropped");
    }
}

/// Reads until the peer has ended, or has said all it announced, or more than anybody wants to know.
fn read(stream: &mut TcpStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let (mut answer, mut buf) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buf) {
            Ok(0) => return Ok(answer),
            Ok(n) => answer.extend_from_slice(&buf[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // Reset behind its answer, which counts.
            Err(_) if is_whole(&answer) => return Ok(answer),
            Err(e) => return Err(e),
        }
        if answer.len() > ANSWER_MAX || is_whole(&answer) {
            return Ok(answer);
        }
    }
}

/// The status, the length of the head, and that of the body where it is announced.
fn parsed(answer: &[u8]) -> Option<(u16, usize, Option<usize>)> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut head = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(length) = head.parse(answer).ok()? else { return None };
    let announced = head.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
    let body = announced.and_then(|h| std::str::from_utf8(h.value).ok()?.trim().parse().ok());
    Some((head.code?, length, body))
}

fn is_whole(answer: &[u8]) -> bool {
    parsed(answer).is_some_and(|(_, head, body)| body.is_some_and(|body| answer.len() - head >= body))
}

/// How many spans an answer rejects.
fn judge(answer: &[u8]) -> Result<i64, Refused> {
    let Some((status, head, body)) = parsed(answer) else {
        return Err(Refused::ForNow("its answer is not one of HTTP".to_owned()));
    };
    match status {
        // A body of another encoding says nothing that we need.
        200..=299 => {
            let end = body.and_then(|length| head.checked_add(length));
            let body = end.and_then(|end| answer.get(head..end)).unwrap_or_default();
            let partial = ExportResponse::decode(body).ok().and_then(|response| response.partial_success);
            if let Some(message) = partial.as_ref().map(|p| &p.error_message).filter(|m| !m.is_empty()) {
                tracing::warn!(message, "the collector took a part of the spans");
            }
            Ok(partial.map_or(0, |partial| partial.rejected_spans.max(0)))
        }
        429 | 502..=504 => Err(Refused::ForNow(format!("it answered {status}"))),
        _ => Err(Refused::ForGood(format!("it answered {status}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_collector_answers_is_taken_refused_or_tried_again() {
        let judged = |answer: &str| match judge(answer.as_bytes()) {
            Ok(rejected) => format!("ok {rejected}"),
            Err(Refused::ForNow(why)) => format!("again: {why}"),
            Err(Refused::ForGood(why)) => format!("dropped: {why}"),
        };
        for (answer, wanted) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "ok 0"),
            ("HTTP/1.0 200 OK\r\n\r\n", "ok 0"),
            // partial_success { rejected_spans: 3 }
            ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\x0a\x02\x08\x03", "ok 3"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}", "ok 0"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551615\r\n\r\n{}", "ok 0"),
            ("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", "again: it answered 503"),
            ("HTTP/1.1 400 Bad\r\ncontent-length: 0\r\n\r\n", "dropped: it answered 400"),
            ("SSH-2.0-x\r\n", "again: its answer is not one of HTTP"),
            ("", "again: its answer is not one of HTTP"),
        ] {
            assert_eq!(judged(answer), wanted, "{answer}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_answer_is_more_than_an_error(answer: Vec<u8>, body: Vec<u8>, length: usize) {
            let _any = judge(&answer);
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
            let _whole = (judge(&[head.as_bytes(), &body].concat()), is_whole(&body));
        }
    }
}
