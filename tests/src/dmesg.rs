//! Warnings of the kernel since a moment, each with the lines that follow it. A line is judged by its text: whatever a
//! kernel says of a broken promise of its own has one of the `SIGNS` in it.
//!
//! # Invariants
//! - What was logged before the moment is not reported.
//! - A log that cannot be read, or that was overwritten, is an error and never silence.
//! - Most warnings are logged once a boot (`WARN_ON_ONCE`). They are re-armed before a moment; where the kernel does
//!   not permit that and has warned already, the check is blind, and [`NOTES`] records for which test.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
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

/// Names the folder in which a test notes what whoever runs the tests is to report at the end: see [`Notes`].
pub const NOTES: &str = "TUNNEL_TEST_NOTES";

/// A moment in the kernel's log.
#[derive(Debug)]
pub struct Mark {
    log: File,
    blind: bool,
}

impl Mark {
    /// This one.
    pub fn now() -> Result<Self> {
        let open = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open("/dev/kmsg");
        let log = open.context("opening /dev/kmsg, where the kernel's log is")?;
        let mut mark = Self { log, blind: false };
        mark.rearm()?;
        // Behind the last record (devkmsg_llseek, kernel/printk/printk.c).
        mark.log.seek(SeekFrom::End(0)).context("finding the end of the kernel's log")?;
        Ok(mark)
    }

    /// Makes warnings speak again that have spoken since this machine booted.
    pub fn rearm(&mut self) -> Result<()> {
        self.blind = !warnings_speak_again()? && has_warned()?;
        Ok(())
    }

    /// Whether this kernel may have no more to say, however much it has to complain of.
    pub fn is_blind(&self) -> bool {
        self.blind
    }

    /// What the kernel has complained of since, or since this was last asked, each with the lines behind it. Notes for the
    /// end of the run where nothing could be heard.
    pub fn warnings(&mut self) -> Result<Vec<String>> {
        let heard = self.heard()?;
        if let Some(folder) = Notes::folder().filter(|_| self.blind) {
            Notes::note(&folder, BLIND, &whose())?;
        }
        Ok(heard)
    }

    /// The same, and nothing is noted.
    pub fn heard(&mut self) -> Result<Vec<String>> {
        self.lines().map(|lines| complaints(&lines))
    }

    fn lines(&mut self) -> Result<Vec<String>> {
        let (mut lines, mut record) = (Vec::new(), vec![0; RECORD_MAX]);
        loop {
            match self.log.read(&mut record) {
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

/// Has every once-only warning speak again (Documentation/admin-guide/clearing-warn-once.rst), by a debugfs that only this
/// call sees; false where there is none, or where the kernel is locked down (fs/debugfs/inode.c, `debugfs_locked_down`).
fn warnings_speak_again() -> Result<bool> {
    const CLEAR: &str =
        "mount -t debugfs none /sys/kernel/debug && echo 1 >/sys/kernel/debug/clear_warn_once";
    let mut clear = Command::new("unshare");
    clear.args(["--mount", "/bin/sh", "-c", CLEAR]);
    clear.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(clear.status().context("unshare (util-linux) does not start")?.success())
}

/// Whether this kernel has warned since it booted: `TAINT_WARN` (Documentation/admin-guide/tainted-kernels.rst, bit 9).
fn has_warned() -> Result<bool> {
    const TAINTED: &str = "/proc/sys/kernel/tainted";
    const TAINT_WARN: u64 = 1 << 9;
    let text = fs::read_to_string(TAINTED).context(TAINTED)?;
    let taints: u64 = text.trim().parse().with_context(|| format!("{TAINTED}: {text}"))?;
    Ok(taints & TAINT_WARN != 0)
}

/// The test that this is, with the file that it is in.
fn whose() -> String {
    // What a test's thread is called; where a test has the main thread, it was named on the command line.
    let thread = thread::current().name().filter(|name| *name != "main").map(str::to_owned);
    let test = thread.or_else(|| env::args().skip_while(|word| word != "--exact").nth(1));
    let program = env::args().next().unwrap_or_default();
    let file = Path::new(&program).file_stem().unwrap_or_default().to_string_lossy();
    // Cargo puts a hash behind the name.
    let file = file.rsplit_once('-').map_or(&*file, |(name, _)| name);
    format!("{file}::{}", test.unwrap_or_default())
}

/// What the note is called of a check that could see nothing.
const BLIND: &str = "blind";

/// What tests have noted, for the end of a run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// The tests whose checks of the kernel's log could see nothing.
    pub blind: Vec<String>,
}

impl Notes {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    fn folder() -> Option<PathBuf> {
        env::var_os(NOTES).map(PathBuf::from)
    }

    fn note(folder: &Path, kind: &str, whose: &str) -> Result<()> {
        let path = folder.join(kind);
        let file = OpenOptions::new().append(true).create(true).open(&path);
        // In one write: tests run beside each other.
        file.and_then(|mut file| file.write_all(format!("{whose}\n").as_bytes()))
            .with_context(|| format!("noting in {}", path.display()))
    }

    /// Those of a folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let lines = |kind| match fs::read_to_string(folder.join(kind)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.with_context(|| format!("{}", folder.display())),
        };
        let mut notes = Self { blind: lines(BLIND)?.lines().map(str::to_owned).collect() };
        notes.blind.sort_unstable();
        notes.blind.dedup();
        Ok(notes)
    }
}

fn has_sign(line: &str) -> bool {
    SIGNS.iter().any(|sign| line.contains(sign))
}

/// The lines with signs, each with what comes behind it.
pub fn complaints(lines: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        if !has_sign(&lines[at]) {
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
    use super::*;

    /// Whoever runs the tests can say at the end which checks saw nothing.
    #[test]
    fn what_tests_note_is_read_at_the_end_by_their_names() -> Result<()> {
        let folder = env::temp_dir().join(format!("tunnel-tests-notes-{}", std::process::id()));
        assert_eq!(Notes::read(&folder)?, Notes::default());
        fs::create_dir(&folder)?;
        for whose in ["b::x", "a::y", "a::y"] {
            Notes::note(&folder, BLIND, whose)?;
        }
        let notes = Notes::read(&folder);
        fs::remove_dir_all(&folder)?;
        let notes = notes?;
        assert_eq!(notes.blind, ["a::y", "b::x"]);
        assert!(
            whose().ends_with("::dmesg::tests::what_tests_note_is_read_at_the_end_by_their_names"),
            "{}",
            whose()
        );
        Ok(())
    }

    /// A warning that nobody can hear is not taken for silence: a check is blind exactly where this kernel has warned and
    /// does not let its once-only warnings speak again.
    #[test]
    fn a_check_is_blind_where_the_kernel_has_warned_and_cannot_be_made_to_again() -> Result<()> {
        let warned = has_warned()?;
        let mark = Mark::now()?;
        let again = warnings_speak_again()?;
        // Another test may have it warn meanwhile.
        if warned == has_warned()? {
            assert_eq!(mark.is_blind(), warned && !again);
        }
        Ok(())
    }

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
            // Without its end the kernel keeps a line back for what may follow (prb_commit, kernel/printk/).
            Ok(file.write_all(format!("{text}\n").as_bytes())?)
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
