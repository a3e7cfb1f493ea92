//! Replaces files of `/etc` for one command, in a mount namespace of its own, so that no other process sees them.

use std::{ffi::CString, io, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::Result;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Shows the process these files in place of those; each pair is (file, in place of).
pub fn show(command: &mut Command, files: &[(PathBuf, &str)]) -> Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let path = |text: &[u8]| CString::new(text);
    let pairs = files
        .iter()
        .map(|(file, place)| Ok((path(file.as_os_str().as_encoded_bytes())?, path(place.as_bytes())?)));
    let pairs = pairs.collect::<Result<Vec<_>>>()?;
    let show = move || -> io::Result<()> {
        const NONE: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        for (file, place) in &pairs {
            mount(Some(file.as_c_str()), place.as_c_str(), NONE, MsFlags::MS_BIND, NONE)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only; its short paths are copied to the stack.
    unsafe { command.pre_exec(show) };
    Ok(())
}
