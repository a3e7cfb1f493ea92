//! Reads fields of the kernel's own structures, at offsets from its BTF. Nothing is written there.
//!
//! # Invariants
//! - An address that cannot be read, whatever it is, yields `None`.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;

/// Reads a field.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a number has eight bytes at most")]
pub(crate) fn read<T: Copy>(base: u64, offset: u32) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    let at = base.wrapping_add(u64::from(offset)) as *const _;
    // SAFETY: the helper checks the address that it reads from, and writes as many bytes as `value` has.
    let failed = unsafe { bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, at) };
    // SAFETY: it has written all of them; `T` is a plain number.
    (failed == 0).then(|| unsafe { value.assume_init() })
}
