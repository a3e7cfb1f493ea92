//! What the kernel complains of meanwhile.
//!
//! Enters: a moment. Leaves: the warnings that the kernel has logged since, each with the lines behind it. Invariant:
//! what was logged before the moment is nobody's; a log that cannot be read, or that was overwritten, is an error and
//! never silence. It judges text: whatever a kernel says of a broken promise of its own has one of the `SIGNS` in it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
};

use anyhow::{Context as _, Result, bail};

/// What a complaint has in it: `WARN_ON` and `BUG_ON` (kernel/panic.c, lib/bug.c), page faults and traps
/// (arch/x86/kernel/traps.c, arch/x86/mm/fault.c), tasks that hang (kernel/hung_task.c, kernel/watchdog.c), counts of
/// references (lib/refcount.c), and the sanitizers.
const SIGNS: [&str; 16] = [
    "WARNING:",
    "BUG:",
    "kernel BUG at",
    "Oops",
    "general protection fault",
    "unable to handle",
    "Kernel panic",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "refcount_t:",
    "KASAN:",
    "UBSAN:",
    "scheduling while atomic",
    "possible recursive locking",
    "list_del corruption",
];
/// Lines behind a sign that are shown with it: registers and a trace are no longer.
const SHOWN: usize = 60;
/// A record has at most 8 KiB with its header (`PRINTK_MESSAGE_MAX`, kernel/printk/internal.h, and its dictionary).
const RECORD_MAX: usize = 16 * 1024;

/// A moment in the kernel's log.
#[derive(Debug)]
pub struct Mark(File);

impl Mark {
    /// This one.
    pub fn now() -> Result<Self> {
        let open = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open("/dev/kmsg");
        let mut log = open.context("opening /dev/kmsg, where the kernel's log is")?;
        // Behind the last record (devkmsg_llseek, kernel/printk/printk.c).
        log.seek(SeekFrom::End(0)).context("finding the end of the kernel's log")?;
        Ok(Self(log))
    }

    /// What the kernel has complained of since, or since this was last asked.
    pub fn warnings(&mut self) -> Result<Vec<String>> {
        self.lines().map(|lines| complaints(&lines))
    }

    fn lines(&mut self) -> Result<Vec<String>> {
        let (mut lines, mut record) = (Vec::new(), vec![0; RECORD_MAX]);
        loop {
            match self.0.read(&mut record) {
                Ok(n) => lines.push(message(&String::from_utf8_lossy(&record[..n]))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(lines),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // EPIPE: records were overwritten before they were read.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => bail!("the kernel's log was overwritten"),
                Err(e) => return Err(e).context("reading the kernel's log"),
            }
        }
    }
}

/// `O_NONBLOCK` of Linux, but for alpha, mips, parisc and sparc (asm-generic/fcntl.h).
const O_NONBLOCK: i32 = 0o4000;

/// The text of a record: `PRIORITY,NUMBER,TIME,FLAGS;TEXT`, and lines of a dictionary (Documentation/ABI/testing/dev-kmsg).
fn message(record: &str) -> String {
    let text = record.split_once(';').map_or(record, |(_, text)| text);
    text.lines().next().unwrap_or_default().to_owned()
}

/// The lines with signs, each with what comes behind it.
pub fn complaints(lines: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        if !SIGNS.iter().any(|sign| lines[at].contains(sign)) {
            at += 1;
            continue;
        }
        let end = lines.len().min(at + SHOWN);
        let trace = lines[at..end].iter().position(|line| line.contains("end trace"));
        let end = trace.map_or(end, |length| at + length + 1);
        found.push(lines[at..end].join("\n"));
        at = end;
    }
    found
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_complaint_has_its_trace_with_it_and_ordinary_lines_are_none() {
        let log = "eth0: link up\n------------[ cut here ]------------\nWARNING: CPU: 0 PID: 7 at net/core/x.c:1\n\
                   RIP: 0010:x\n---[ end trace 0 ]---\neth0: link down\nBUG: kernel NULL pointer dereference\nRIP";
        let lines: Vec<String> = log.lines().map(str::to_owned).collect();
        let found = complaints(&lines);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("WARNING: CPU") && found[0].ends_with("end trace 0 ]---"), "{found:?}");
        assert!(found[1].ends_with("RIP"), "{found:?}");
        assert_eq!(message("4,7,99,-;a message\n KEY=value\n"), "a message");
    }

    #[test]
    fn what_was_logged_since_a_moment_is_found_once_and_what_was_before_is_not() -> Result<()> {
        let log = |text: &str| -> Result<()> {
            let mut file = OpenOptions::new().write(true).open("/dev/kmsg")?;
            Ok(file.write_all(text.as_bytes())?)
        };
        // Not what another mark would take for a complaint of the kernel's while this test runs.
        let text = format!("tunnel-tests: a line of process {}", std::process::id());
        log(&text)?;
        let mut mark = Mark::now()?;
        assert!(!mark.lines()?.contains(&text));
        log(&text)?;
        assert!(mark.lines()?.contains(&text));
        assert!(!mark.lines()?.contains(&text));
        Ok(())
    }
}
