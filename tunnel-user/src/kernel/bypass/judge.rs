//! Whether a program can bear what a sockmap does to its socket. What cannot be inspected is rejected.
//!
//! splice(2) on a socket in a sockmap does not see what is redirected: it waits for ever. A program that calls it by name has the
//! name among its dynamic symbols; Go calls the kernel directly, and so may what is statically linked. No more of a file is
//! read than its tables.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use super::Refusal;

/// Files mapped into one process. More than any program here has (a browser: 250); beyond it nothing is judged.
const FILES_MAX: usize = 1024;
/// Bytes of a table of names: of the largest libraries (LLVM's, 6 MB) several times over.
const TABLE_MAX: u64 = 32 << 20;
/// Files whose verdict is kept: then all are forgotten.
const KEPT_MAX: usize = 4096;

/// A file as it is now: its device, inode, and when it was changed, in seconds and nanoseconds.
type File = (u64, u64, i64, i64);

/// Verdicts that were found before.
#[derive(Default)]
pub(super) struct Judge(Mutex<HashMap<File, Option<Refusal>>>);

impl Judge {
    /// Judges every file that process `pid` may execute.
    pub(super) fn process(&self, pid: u32) -> Result<(), Refusal> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        self.file(&proc.join("exe"), true)?;
        let maps = fs::read_to_string(proc.join("maps")).map_err(|_| Refusal::Gone)?;
        let mut seen = HashSet::new();
        for line in maps.lines() {
            // Addresses, permissions, offset, device, inode, path (proc_pid_maps(5)).
            let mut fields = line.split_ascii_whitespace();
            let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else { continue };
            let Some(path) = fields.nth(3) else { continue };
            if !permissions.contains('x') || !path.starts_with('/') || is_libc(path) || !seen.insert(path) {
                continue;
            }
            if seen.len() > FILES_MAX {
                return Err(Refusal::Unknown);
            }
            self.file(&proc.join("map_files").join(range), false)?;
        }
        Ok(())
    }

    fn file(&self, path: &Path, program: bool) -> Result<(), Refusal> {
        let file = fs::File::open(path).map_err(|_| Refusal::Unknown)?;
        let meta = file.metadata().map_err(|_| Refusal::Unknown)?;
        let key = (meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec());
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept().get(&key).copied();
        let verdict = known.unwrap_or_else(|| {
            let verdict = elf(&file, program).unwrap_or(Some(Refusal::Unknown));
            let mut all = kept();
            if all.len() >= KEPT_MAX {
                all.clear();
            }
            all.insert(key, verdict);
            verdict
        });
        verdict.map_or(Ok(()), Err)
    }
}

/// The C library has `splice`, for others to call.
fn is_libc(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    ["libc.so", "libc-2", "libc.musl", "ld-musl", "ld-linux"].iter().any(|p| name.starts_with(p))
}

/// `None`: it is no ELF of this machine's kind, or it ends early.
fn elf(file: &fs::File, program: bool) -> Option<Option<Refusal>> {
    const INTERP: u32 = 3;
    const NOTE: u32 = 4;
    const LOAD: u32 = 1;
    const DYNAMIC: u32 = 2;
    let head = read(file, 0, 64)?;
    // 64 bits, least significant byte first: what the programs are built for too.
    if head.get(..6)? != [0x7f, b'E', b'L', b'F', 2, 1] {
        return None;
    }
    let (size, count) = (u64::from(u16_at(&head, 54)?), u64::from(u16_at(&head, 56)?));
    let table = read(file, u64_at(&head, 32)?, size * count)?;
    let segments: Vec<&[u8]> = table.chunks_exact(usize::try_from(size).ok()?.max(56)).collect();
    let of = |kind| segments.iter().filter(move |s| u32_at(s, 0) == Some(kind));
    for note in of(NOTE) {
        let bytes = read(file, u64_at(note, 8)?, u64_at(note, 32)?)?;
        if bytes.windows(8).any(|w| w == b"\x04\0\0\0Go\0\0") || has(&bytes, b"Go\0\0") {
            return Some(Some(Refusal::Go));
        }
    }
    if sections(file, &head).is_some_and(|names| has(&names, b".go.buildinfo\0")) {
        return Some(Some(Refusal::Go));
    }
    let Some(dynamic) = of(DYNAMIC).next() else { return Some(Some(Refusal::Static)) };
    if program && of(INTERP).next().is_none() {
        return Some(Some(Refusal::Static));
    }
    let entries = read(file, u64_at(dynamic, 8)?, u64_at(dynamic, 32)?)?;
    let value =
        |tag: u64| entries.chunks_exact(16).find(|e| u64_at(e, 0) == Some(tag)).and_then(|e| u64_at(e, 8));
    // DT_STRTAB, DT_STRSZ.
    let (address, size) = (value(5)?, value(10)?);
    let at = of(LOAD).find_map(|s| {
        let (offset, from, len) = (u64_at(s, 8)?, u64_at(s, 16)?, u64_at(s, 32)?);
        (from..from.checked_add(len)?).contains(&address).then(|| offset + (address - from))
    })?;
    // A name may be the end of another, so "vmsplice" is refused along with it.
    Some(has(&read(file, at, size)?, b"splice\0").then_some(Refusal::Splices))
}

/// The names of sections, where there are any.
fn sections(file: &fs::File, head: &[u8]) -> Option<Vec<u8>> {
    let (at, size, index) = (u64_at(head, 40)?, u64::from(u16_at(head, 58)?), u64::from(u16_at(head, 62)?));
    let names = read(file, at.checked_add(size * index)?, size)?;
    read(file, u64_at(&names, 24)?, u64_at(&names, 32)?)
}

fn read(file: &fs::File, at: u64, len: u64) -> Option<Vec<u8>> {
    if len > TABLE_MAX {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    file.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

fn has(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|w| w == what)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn verdict(path: &str) -> Result<(), Refusal> {
        Judge::default().file(Path::new(path), true)
    }

    #[test]
    fn a_program_that_does_not_name_splice_is_let_through() {
        assert_eq!(verdict("/bin/true"), Ok(()));
    }

    #[test]
    fn what_is_no_program_is_refused() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(verdict(file.path().to_str().unwrap()), Err(Refusal::Unknown));
        file.write_all(b"\x7fELF\x02\x01").unwrap();
        assert_eq!(verdict(file.path().to_str().unwrap()), Err(Refusal::Unknown));
    }

    #[test]
    fn the_c_library_which_has_splice_for_others_is_known_by_its_name() {
        for libc in
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2", "/lib/ld-musl-x86_64.so.1"]
        {
            assert!(is_libc(libc), "{libc}");
        }
        assert!(!is_libc("/usr/lib/libcurl.so.4"));
    }
}
