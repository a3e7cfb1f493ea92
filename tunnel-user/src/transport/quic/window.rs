//! What a peer may send on all streams of its connection before it is read, taken from its part of the memory.
//!
//! # Invariants
//! - It is [`WINDOW`] at least, so that every stream goes on; and more only if the account has it then.
//! - It grows, and does not shrink while the connection lives: what was announced stays announced (RFC 9000 section 4.1), and
//!   quinn, told to shrink and to grow again, announces the difference once more. So what was taken is held to the end.

use std::rc::Rc;

use quinn::{Connection, VarInt};

use super::WINDOW;
use crate::process::memory::Account;

/// See the module. Dropped, it gives back what it took.
#[derive(Debug)]
pub struct ReceiveWindow {
    connection: Connection,
    account: Rc<Account>,
    taken: u64,
}

impl ReceiveWindow {
    /// Of a connection that was made with a window of [`WINDOW`].
    pub fn new(connection: &Connection, account: &Rc<Account>) -> Self {
        let taken = u64::from(WINDOW);
        account.take(taken);
        Self { connection: connection.clone(), account: Rc::clone(account), taken }
    }

    /// There are so many streams, or about to be: each gets its own window, while there is room for that.
    pub fn fit(&mut self, streams: usize) {
        let one = u64::from(WINDOW);
        let wanted = one * streams.max(1) as u64;
        if wanted <= self.taken || self.account.memory().is_short() {
            return;
        }
        // From half of it on it is short: the rest is for what is received and queued.
        if self.account.try_take(wanted - self.taken, self.account.most() / 4) {
            self.taken = wanted;
            self.connection.set_receive_window(VarInt::from_u64(wanted).unwrap_or(VarInt::MAX));
        }
    }
}

impl Drop for ReceiveWindow {
    fn drop(&mut self) {
        self.account.give_back(self.taken);
    }
}
