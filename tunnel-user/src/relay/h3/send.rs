//! What is sent on a stream, and how much of that its peer has acknowledged.
//!
//! quinn holds the bytes that it is given until they are acknowledged, and drops them then: so every chunk carries a counter,
//! which it leaves as it is dropped.

use std::{
    cell::RefCell,
    collections::VecDeque,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker, ready},
};

use bytes::{Bytes, BytesMut};
use quinn::{SendStream, StoppedError, VarInt, WriteError};
use tokio::{sync::Notify, task::JoinSet};

use super::{Broken, Queue, lost, reset_with, wire_code};
use crate::{
    process::memory::Account,
    relay::EarlyStream,
    transport::{
        http3::{
            Code,
            frame::{self, Kind},
        },
        quic::SEND_MAX,
    },
};

/// The most bytes in one DATA frame: one read of the other leg fills it.
const FRAME: usize = 64 * 1024;

/// Bytes of one stream that were given to quinn, or wait for that, and are not acknowledged.
#[derive(Debug, Default)]
struct Unacknowledged {
    count: AtomicUsize,
    /// Who waits for there to be fewer.
    waits: Mutex<Option<Waker>>,
}

/// A chunk that counts until it is dropped.
struct Counted {
    bytes: Bytes,
    among: Arc<Unacknowledged>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.among.count.fetch_sub(self.bytes.len(), Relaxed);
        let waits = self.among.waits.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waits) = waits {
            waits.wake();
        }
    }
}

/// Bytes that an account knows of, and is told that they are gone as this is dropped.
struct Returned(Rc<Account>, u64);

impl Drop for Returned {
    fn drop(&mut self) {
        self.0.sent(self.1);
    }
}

/// The streams of one connection that are open, or whose last bytes are not acknowledged: closed before that, the connection
/// would take them along.
#[derive(Clone, Default)]
pub struct Open(Rc<OpenStreams>);

#[derive(Default)]
struct OpenStreams {
    changed: Notify,
    /// Waits for the acknowledgement of those whose legs are gone.
    ending: RefCell<JoinSet<()>>,
}

impl Open {
    /// How many there are.
    pub fn count(&self) -> usize {
        // One is the connection's.
        Rc::strong_count(&self.0) - 1
    }

    /// Ready when there are none.
    pub async fn none(&self) {
        while self.count() > 0 {
            self.0.changed.notified().await;
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // The count changes right after this, before anybody is polled.
        self.0.changed.notify_one();
    }
}

type Stopped = Pin<Box<dyn Future<Output = Result<Option<VarInt>, StoppedError>>>>;

/// One direction of a stream.
pub struct Sender {
    stream: SendStream,
    unacknowledged: Arc<Unacknowledged>,
    /// What of it the account knows: as much as there was when that was last looked at.
    counted: usize,
    account: Rc<Account>,
    /// What quinn has not taken yet: a frame, or what stands in front of the first.
    out: VecDeque<Bytes>,
    /// It is to end behind that.
    ends: bool,
    /// It was ended.
    has_ended: bool,
    /// Ready when the peer takes no more, or has everything.
    stopped: Option<Stopped>,
    /// What the peer has said: it takes no more.
    refused: Option<u64>,
    /// It has everything, or nothing more is sent.
    is_done: bool,
    open: Option<Open>,
}

impl Sender {
    pub(super) fn new(stream: SendStream, open: Open, account: Rc<Account>) -> Self {
        Self {
            stream,
            unacknowledged: Arc::default(),
            counted: 0,
            account,
            out: VecDeque::new(),
            ends: false,
            has_ended: false,
            stopped: None,
            refused: None,
            is_done: false,
            open: Some(open),
        }
    }

    fn put(&mut self, bytes: Bytes) {
        self.unacknowledged.count.fetch_add(bytes.len(), Relaxed);
        let among = Arc::clone(&self.unacknowledged);
        self.out.push_back(Bytes::from_owner(Counted { bytes, among }));
    }

    /// Tells the account; what is on its way.
    fn count(&mut self) -> usize {
        let now = self.unacknowledged.count.load(Relaxed);
        match now.checked_sub(self.counted) {
            Some(more) => self.account.queue(more as u64),
            None => self.account.sent((self.counted - now) as u64),
        }
        self.counted = now;
        now
    }

    fn put_frame(&mut self, kind: Kind, payload: Bytes) {
        let mut head = BytesMut::new();
        frame::put_head(&mut head, kind, payload.len());
        self.put(head.freeze());
        self.put(payload);
    }

    /// Sends a head, as soon as it is polled.
    pub fn put_headers(&mut self, section: Bytes) {
        self.put_frame(Kind::HEADERS, section);
    }

    /// Gives quinn what waits.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !self.out.is_empty() {
            let written = ready!(pin!(self.stream.write_chunks(self.out.make_contiguous())).poll(cx));
            match written {
                Ok(written) => drop(self.out.drain(..written.chunks)),
                Err(e) => {
                    self.out.clear();
                    return Poll::Ready(Err(self.failed(&e)));
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// What it means that quinn takes no more.
    fn failed(&mut self, e: &WriteError) -> Broken {
        match e {
            WriteError::Stopped(code) => self.refuse(code.into_inner()),
            WriteError::ConnectionLost(e) => lost(e),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                self.refused.map_or_else(|| reset_with(Code::INTERNAL_ERROR.0), stopped_with)
            }
        }
    }

    /// The peer takes no more: it waits for us to say that there is none (RFC 9000 section 3.5).
    fn refuse(&mut self, code: u64) -> Broken {
        self.refused = Some(code);
        self.reset(Code(code));
        stopped_with(code)
    }

    /// The same, while there is nothing else to send. What is wrong is told by who asks for it.
    pub(super) fn flush(&mut self, cx: &mut Context<'_>) {
        let _told_later = self.poll_out(cx);
        if self.ends && !self.has_ended && self.out.is_empty() {
            let _told_later = self.poll_finish(cx);
        }
    }

    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        queue: &mut Queue,
    ) -> Poll<Result<usize, Broken>> {
        if let Some(code) = self.refused {
            return Poll::Ready(Err(stopped_with(code)));
        }
        ready!(self.poll_out(cx))?;
        ready!(self.poll_room(cx));
        let most = queue.front_len().min(FRAME);
        let chunk = queue.take(most);
        let n = chunk.len();
        self.put_frame(Kind::DATA, chunk);
        match self.poll_out(cx) {
            Poll::Ready(Err(why)) => Poll::Ready(Err(why)),
            // What is left goes as there is room.
            _ => Poll::Ready(Ok(n)),
        }
    }

    /// Ready when less is on its way than may be.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let now = self.count();
        if now < SEND_MAX && self.account.may_queue(now, cx.waker()) {
            return Poll::Ready(());
        }
        let mut waits = self.unacknowledged.waits.lock().unwrap_or_else(PoisonError::into_inner);
        *waits = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(super) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.ends = true;
        if let Some(code) = self.refused {
            return Poll::Ready(Err(stopped_with(code)));
        }
        ready!(self.poll_out(cx))?;
        if !self.has_ended {
            self.has_ended = true;
            // Fails only on a stream that was reset, which is known here.
            let _reset = self.stream.finish();
        }
        Poll::Ready(Ok(()))
    }

    /// Ready when the peer takes no more.
    pub(super) fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        if let Some(code) = self.refused {
            return Poll::Ready(stopped_with(code));
        }
        if self.is_done {
            return Poll::Pending;
        }
        let stream = &self.stream;
        let stopped = self.stopped.get_or_insert_with(|| Box::pin(stream.stopped()));
        let stopped = ready!(stopped.as_mut().poll(cx));
        self.stopped = None;
        match stopped {
            Ok(Some(code)) => Poll::Ready(self.refuse(code.into_inner())),
            Ok(None) => {
                self.is_done = true;
                Poll::Pending
            }
            Err(StoppedError::ConnectionLost(e)) => Poll::Ready(lost(&e)),
            Err(StoppedError::ZeroRttRejected) => Poll::Ready(reset_with(Code::INTERNAL_ERROR.0)),
        }
    }

    /// Whether it was said that there is no more.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Bytes that could still be lost, and the end.
    pub(super) fn unacknowledged(&self) -> u64 {
        let bytes = self.unacknowledged.count.load(Relaxed) as u64;
        bytes + u64::from(bytes == 0 && self.end_is_on_its_way())
    }

    fn end_is_on_its_way(&self) -> bool {
        let asked = || pin!(self.stream.stopped()).poll(&mut Context::from_waker(Waker::noop()));
        self.has_ended && !self.is_done && asked().is_pending()
    }

    /// Resets it, and drops what has not been acknowledged.
    pub(super) fn reset(&mut self, code: Code) {
        self.out.clear();
        self.is_done = true;
        // Fails only on a stream that has ended.
        let _ended = self.stream.reset(wire_code(code));
    }
}

/// What it means that the peer takes no more.
fn stopped_with(code: u64) -> Broken {
    if Code(code) == Code::NO_ERROR { Broken::Done } else { reset_with(code) }
}

/// What is on its way still arrives: it counts among the streams that are open, and in the account, until then.
impl Drop for Sender {
    fn drop(&mut self) {
        self.count();
        let returned = Returned(Rc::clone(&self.account), self.counted as u64);
        let Some(open) = self.open.take() else { return };
        if self.end_is_on_its_way() {
            let stopped = self.stream.stopped();
            let streams = Rc::clone(&open.0);
            let mut ending = streams.ending.borrow_mut();
            while ending.try_join_next().is_some() {}
            ending.spawn_local(async move {
                let (_open, _returned) = (open, returned);
                let _acknowledged = stopped.await;
            });
        }
    }
}

/// A stream that has asked, and waits for its answer, is polled by both.
impl EarlyStream for &RefCell<&mut Sender> {
    fn poll_room(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Option<usize>> {
        let mut sender = self.borrow_mut();
        if sender.refused.is_some() {
            return Poll::Ready(None);
        }
        match ready!(sender.poll_out(cx)) {
            Ok(()) => sender.poll_room(cx).map(|()| Some(want)),
            Err(_) => Poll::Ready(None),
        }
    }

    fn send(&mut self, bytes: Bytes) {
        self.borrow_mut().put_frame(Kind::DATA, bytes);
    }

    fn end(&mut self) {
        self.borrow_mut().ends = true;
    }
}

impl Sender {
    /// Gives quinn what waits, and the end behind it, where something else is being waited for.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) {
        self.flush(cx);
    }
}
