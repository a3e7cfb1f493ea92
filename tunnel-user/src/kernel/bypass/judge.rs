//! Whether a process can bear what a sockmap does to its socket, by the ELF files that it has mapped.
//!
//! splice(2) on a socket in a sockmap does not see what is redirected, and waits for ever. A program that calls it by name
//! has the name among its dynamic symbols; Go makes system calls by itself, and so may a statically linked program.
//!
//! # Invariants
//! - What cannot be judged is refused.
//! - Of a file no more is read than its tables, and those are bounded.

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    fs,
    ops::Range,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use object::{
    LittleEndian,
    elf::{DT_STRSZ, DT_STRTAB, FileHeader64, PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_NOTE},
    read::{
        ReadCache, ReadRef,
        elf::{Dyn as _, FileHeader as _, ProgramHeader as _},
    },
};

use super::Refusal;

/// Files mapped into one process. More than any program here has (a browser: 250); beyond it nothing is judged.
const FILES_MAX: usize = 1024;
/// Bytes that are read of one file: the tables of the largest libraries (LLVM's names, 6 MB) several times over.
const READ_MAX: u64 = 32 << 20;
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

/// What refuses a program or a library; `None` where its ELF cannot be read.
fn elf(file: &fs::File, program: bool) -> Option<Option<Refusal>> {
    let (cache, left) = (ReadCache::new(file), Cell::new(READ_MAX));
    let data = Bounded { cache: &cache, left: &left };
    let header = FileHeader64::<LittleEndian>::parse(data).ok()?;
    let endian = header.endian().ok()?;
    let segments = header.program_headers(endian, data).ok()?;
    let of = |kind| segments.iter().filter(move |s| s.p_type(endian) == kind);
    for segment in of(PT_NOTE) {
        let mut notes = segment.notes(endian, data).ok()??;
        while let Some(note) = notes.next().ok()? {
            if note.name() == b"Go" {
                return Some(Some(Refusal::Go));
            }
        }
    }
    // A stripped program may have no sections.
    let sections = header.sections(endian, data).ok();
    if sections.is_some_and(|all| all.section_by_name(endian, b".go.buildinfo").is_some()) {
        return Some(Some(Refusal::Go));
    }
    let Some(dynamic) = of(PT_DYNAMIC).next() else { return Some(Some(Refusal::Static)) };
    if program && of(PT_INTERP).next().is_none() {
        return Some(Some(Refusal::Static));
    }
    let entries = dynamic.dynamic(endian, data).ok()??;
    let value = |tag| entries.iter().find(|e| e.tag(endian) == tag).map(|e| e.val(endian));
    let (address, size) = (value(DT_STRTAB)?, value(DT_STRSZ)?);
    // By the segments, as the loader finds it: sections may be stripped.
    let at = of(PT_LOAD).find_map(|s| {
        let (from, (offset, len)) = (s.p_vaddr(endian), s.file_range(endian));
        (from..from.checked_add(len)?).contains(&address).then(|| offset.checked_add(address - from))?
    })?;
    let names = data.read_bytes_at(at, size).ok()?;
    // A name may be the end of another, so "vmsplice" is refused along with it.
    Some(has(names, b"splice\0").then_some(Refusal::Splices))
}

/// A file of which no more than [`READ_MAX`] bytes are read: whoever made it may have made it for us.
#[derive(Clone, Copy)]
struct Bounded<'a> {
    cache: &'a ReadCache<&'a fs::File>,
    left: &'a Cell<u64>,
}

impl Bounded<'_> {
    fn take(self, size: u64) -> Result<(), ()> {
        self.left.set(self.left.get().checked_sub(size).ok_or(())?);
        Ok(())
    }
}

impl<'a> ReadRef<'a> for Bounded<'a> {
    fn len(self) -> Result<u64, ()> {
        self.cache.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        self.take(size)?;
        self.cache.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        let found = self.cache.read_bytes_at_until(range, delimiter)?;
        self.take(found.len() as u64)?;
        Ok(found)
    }
}

fn has(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|w| w == what)
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
