//! Which tasks are captured: those whose cgroup, or one above it, is the configured one, by its name in the kernel.
//!
//! # Invariants
//! - A cgroup that is recreated under the captured name is captured from its first connection on.
//! - A verdict may be cached by the cgroup's id, because an id is never another's (`kernfs_node.id`, 64 bits that only
//!   grow), and cgroup2 renames no cgroup (`cgroup_kf_syscall_ops` has no `rename`).

use aya_ebpf::{
    Global,
    btf_maps::{Array, LruHashMap},
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_task,
        bpf_probe_read_kernel_str,
    },
    macros::btf_map,
};
use tunnel_common::{
    group::{
        BY_UNIT, CHUNK, CHUNKS, DEPTH_MAX, EVERYTHING, GROUPS_MAX, Name, Offsets, Place, ROOT_DEPTH_MAX,
        SLICE, Step, WORDS, is_slice, step,
    },
    names::Counter,
};

use crate::{field::read, maps};

#[btf_map]
static GROUPS: LruHashMap<u64, u32, GROUPS_MAX> = LruHashMap::new();
#[btf_map]
static GROUP_NAMES: Array<Name, { DEPTH_MAX as usize + 1 }> = Array::new();

/// How the group is known. Where the programs are attached to the group itself there is nothing to find out, and the
/// verifier removes what does.
#[unsafe(no_mangle)]
static GROUP_KIND: Global<u32> = Global::new(EVERYTHING);
/// Which group.
#[unsafe(no_mangle)]
static GROUP_PLACE: Global<Place> = Global::new(Place { root: 0, depth: 0, reserved: 0 });
/// Where the kernel keeps what is to be seen.
#[unsafe(no_mangle)]
static GROUP_OFFSETS: Global<Offsets> =
    Global::new(Offsets { cgroups: 0, dfl_cgrp: 0, level: 0, ancestors: 0, kn: 0, name: 0 });

/// A chunk and the terminator.
#[expect(clippy::cast_possible_truncation, reason = "129")]
const READ: u32 = CHUNK as u32 + 1;
/// [`CHUNKS`], which LLVM does not know: it would have all chunks on the stack at once.
#[expect(clippy::cast_possible_truncation, reason = "two")]
static GROUP_CHUNKS: Global<u32> = Global::new(CHUNKS as u32);

/// Whether connections of the current task are captured.
#[inline(always)]
pub(crate) fn is_captured() -> bool {
    let kind = GROUP_KIND.load();
    if kind == EVERYTHING {
        return true;
    }
    // SAFETY: takes nothing, returns a number.
    let id = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: a word that is written once, before it can be found.
    if let Some(known) = unsafe { GROUPS.get(id) } {
        return *known != 0;
    }
    match find(kind) {
        Some(captured) => {
            // Without room, it is found out again the next time.
            let _full = GROUPS.insert(id, u32::from(captured), 0);
            captured
        }
        None => {
            maps::count(Counter::GroupUnknown);
            false
        }
    }
}

/// Goes from the attach root towards the task's group. `None`: the kernel's memory could not be read.
#[inline(never)]
fn find(kind: u32) -> Option<bool> {
    let (offsets, place) = (GROUP_OFFSETS.load(), GROUP_PLACE.load());
    // SAFETY: takes nothing, returns a number.
    let task = unsafe { bpf_get_current_task() };
    // The task's set of groups, the group, and the groups above it stay where they are while it runs.
    let group: u64 = read(read(task, offsets.cgroups)?, offsets.dfl_cgrp)?;
    let level: u32 = read(group, offsets.level)?;
    let Some(root) = level_of(place.root, group, &offsets) else { return Some(false) };
    for depth in 1..=DEPTH_MAX {
        let at = root + depth;
        if at > level {
            return Some(false);
        }
        let above: u64 = read(group, offsets.ancestors.wrapping_add(at * 8))?;
        let name: u64 = read(read(above, offsets.kn)?, offsets.name)?;
        let wanted = if kind == BY_UNIT { 0 } else { depth };
        let (same, len) = compare(name, GROUP_NAMES.get(wanted)?)?;
        match step(kind, place.depth, depth, same, || ends_as_slice(name, len)) {
            Step::Captured => return Some(true),
            Step::Outside => return Some(false),
            Step::Deeper => {}
        }
    }
    Some(false)
}

/// The level of the group with this id, if the task is below it. Read where the kernel keeps it: a number that the verifier
/// knows nothing of, where it would try what follows with each one that the loop can end with.
#[inline(always)]
fn level_of(root: u64, group: u64, offsets: &Offsets) -> Option<u32> {
    for level in 0..ROOT_DEPTH_MAX {
        // SAFETY: takes and returns a number.
        if unsafe { bpf_get_current_ancestor_cgroup_id(level.cast_signed()) } == root {
            return read(read(group, offsets.ancestors.wrapping_add(level * 8))?, offsets.level);
        }
    }
    None
}

/// Whether a name in the kernel's memory is the wanted one, and its length. Without branches but for what cannot be read: the
/// verifier goes through the rest of the walk once for each way to get there.
#[inline(always)]
fn compare(name: u64, wanted: &Name) -> Option<(bool, u32)> {
    let (mut differs, mut len, mut chunk) = (0, 0, 0);
    while chunk < GROUP_CHUNKS.load() {
        // A chunk and the terminator, which the helper always writes.
        let mut buffer = [0u64; WORDS + 1];
        // Of a name that has ended before, its terminator is the next chunk.
        let at = name.wrapping_add(u64::from(len)) as *const _;
        // SAFETY: the helper checks the address that it reads from, and writes no more than it is told.
        let read = unsafe { bpf_probe_read_kernel_str(buffer.as_mut_ptr().cast(), READ, at) };
        if read <= 0 {
            return None;
        }
        // SAFETY: all but the last of its words.
        let words = unsafe { &*buffer.as_ptr().cast::<[u64; WORDS]>() };
        differs |= wanted.differs(chunk as usize, words);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to CHUNK + 1")]
        let read = read as u32;
        len += read - 1;
        chunk += 1;
    }
    Some((differs == 0, len))
}

/// Whether a name of this length is a slice's.
#[inline(always)]
fn ends_as_slice(name: u64, len: u32) -> bool {
    // Of a shorter name this is what lies before it, which says nothing.
    let end = name.wrapping_add(u64::from(len)).wrapping_sub(SLICE.len() as u64);
    // What was read a moment ago can be read.
    is_slice(read(end, 0).unwrap_or(0), read(end, 4).unwrap_or(0), len)
}
