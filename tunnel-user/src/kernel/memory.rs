//! Configures the allocator once: how much freed memory it keeps.

#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "mallopt(3)"))]

/// Freed memory at the top of a heap that is kept for the next: each worker has a heap, and a bulk flow takes and gives
/// back 64 KiB many times a millisecond. With glibc's 128 KiB the kernel gets it back each time, and clears it again: 15 %
/// of a busy gateway's time.
#[cfg(target_env = "gnu")]
const KEPT_MAX: i32 = 16 << 20;
/// A heap grows by this much more than is asked for; what is not touched takes no memory.
#[cfg(target_env = "gnu")]
const AHEAD: i32 = 4 << 20;
/// Above it an allocation is a mapping of its own, which costs a page fault for each of its pages every time.
#[cfg(target_env = "gnu")]
const MAPPED_MIN: i32 = 8 << 20;

/// Before the workers start. With another C library than glibc there is nothing to tell.
pub fn keep_freed() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_TRIM_THRESHOLD, KEPT_MAX), (libc::M_TOP_PAD, AHEAD), (libc::M_MMAP_THRESHOLD, MAPPED_MIN)]
    {
        // SAFETY: two numbers. glibc locks what it changes, so that other threads may allocate meanwhile.
        let understood = unsafe { libc::mallopt(parameter, value) };
        if understood == 0 {
            tracing::debug!(parameter, value, "mallopt rejected the parameter");
        }
    }
}
