//! A pair of sockets as the program and this process share it.

#![expect(unsafe_code, reason = "says what may be mapped")]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tunnel_common::fastpath::bypass::{Side, Slot};

use crate::kernel::mapped::Shared;

/// A slot as it lies in memory that the kernel writes too.
#[repr(C)]
pub(super) struct SharedSlot {
    pub(super) generation: AtomicU32,
    pub(super) gates: AtomicU32,
    pub(super) sides: [SharedSide; 2],
}

#[repr(C)]
pub(super) struct SharedSide {
    pub(super) cookie: AtomicU64,
    pub(super) sock: AtomicU64,
    pub(super) redirected: AtomicU64,
    pub(super) passed: AtomicU64,
    pub(super) burst: AtomicU32,
    pub(super) queued: AtomicU32,
    pub(super) unread: AtomicU32,
    pub(super) unacked: AtomicU32,
    pub(super) alive: AtomicU32,
    reserved: AtomicU32,
}

const _: () =
    assert!(size_of::<SharedSlot>() == size_of::<Slot>() && size_of::<SharedSide>() == size_of::<Side>());

// SAFETY: `repr(C)`, made of atomics; the size of `Slot`, which has no padding (`tunnel_common::pod`), 120 bytes.
unsafe impl Shared for SharedSlot {}

impl SharedSide {
    pub(super) fn clear(&self, cookie: u64) {
        for word in [&self.sock, &self.redirected, &self.passed] {
            word.store(0, Ordering::Relaxed);
        }
        for word in [&self.burst, &self.queued, &self.unread, &self.unacked, &self.alive] {
            word.store(0, Ordering::Relaxed);
        }
        self.cookie.store(cookie, Ordering::Relaxed);
    }
}
