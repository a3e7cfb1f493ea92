//! One read buffer for all connections of a thread, so that 10,000 idle connections cost 10,000 small tasks and nothing
//! else.
//!
//! # Invariants
//! - A connection that waits holds no buffer, and no byte is kept from one call to the next.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Poll, ready},
};

use tokio::io::{AsyncRead, ReadBuf};

/// What one read takes at most: the receive queue of a fast loopback connection is this long, and a level-two cache
/// still holds it.
const READ: usize = 256 * 1024;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());
}

/// Waits until something came, and has it looked at; nothing: the peer's end. `look` must not receive.
pub(super) async fn receive<S: AsyncRead + Unpin, T>(
    stream: &mut S,
    mut look: impl FnMut(&mut S, &[u8]) -> T,
) -> io::Result<Option<T>> {
    poll_fn(|cx| {
        BUFFER.with_borrow_mut(|buffer| {
            let mut into = ReadBuf::new(buffer);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut into))?;
            let bytes = into.filled();
            Poll::Ready(Ok((!bytes.is_empty()).then(|| look(stream, bytes))))
        })
    })
    .await
}
