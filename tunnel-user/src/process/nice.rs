//! The priority of a thread.

use rustix::process::{getpriority_process, setpriority_process};

/// Has the kernel favour the calling thread less by so much (on Linux nice(2) is of a thread); what it was before. A priority
/// may always be lowered.
pub fn lower_this_thread(by: i32) -> Option<i32> {
    let before = getpriority_process(None).ok()?;
    setpriority_process(None, before + by).ok()?;
    Some(before)
}
