//! What the kernel programs and the daemon agree on: the layout of every map key and value, and every
//! decision the programs take, as pure functions that run and are tested on the host.
//!
//! Rules of the ABI, kept by every type here that crosses into a map: `repr(C)`, addresses and ports as
//! bytes in network order behind constructors, no `bool`, no `enum`, no hidden padding, size asserted at
//! compile time (`pod.rs`). The crate never allocates and never touches a pointer it did not get as a
//! reference.

#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod addr;
pub mod capture;
pub mod fastpath;
pub mod flow;
pub mod group;
pub mod names;
#[cfg(feature = "user")]
mod pod;
