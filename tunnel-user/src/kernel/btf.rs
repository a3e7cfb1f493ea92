//! Offsets of fields in structures of the kernel, from its own description of its types (BTF, `/sys/kernel/btf/vmlinux`).
//!
//! `/sys/kernel/btf/vmlinux` gives the offsets of a few fields. The format is that of `linux/btf.h`
//! (Documentation/bpf/btf.rst); docs/adr/0013 says why it is parsed here.
//!
//! # Invariants
//! - No offset is guessed: a field that is not found by its name is an error, and nothing is loaded.

use std::{collections::HashMap, fs, io};

use tunnel_common::{
    fastpath::{bypass, splice},
    group,
};

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
/// Structures inside structures, on the way to a field.
const DEPTH_MAX: u32 = 8;

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub enum OffsetsError {
    /// The kernel does not describe itself.
    #[error("cannot read {VMLINUX}: {0}")]
    Unreadable(#[source] io::Error),
    /// It does, in a way that is not known.
    #[error("cannot parse {VMLINUX}")]
    Format,
    /// It has no such field.
    #[error("this kernel has no {0}")]
    Missing(&'static str),
}

/// What the bypass program reads of sockets.
pub fn of_sockets() -> Result<bypass::Offsets, OffsetsError> {
    with_kernel(|btf| {
        let field = |of, path| btf.field(of, path);
        let limits = || {
            let [memcg, tcpmem] = [btf.offset("sock", "sk_memcg")?, btf.offset("mem_cgroup", "tcpmem")?];
            let active = btf.offset("mem_cgroup", "tcpmem_active")?;
            let [usage, max, parent] =
                ["usage", "max", "parent"].map(|field| btf.offset("page_counter", field));
            Some([memcg, tcpmem, active, usage?, max?, parent?])
        };
        // A kernel that is built without them has no limits there.
        let [memcg, tcpmem, tcpmem_active, usage, max, parent] = limits().unwrap_or_default();
        Ok(bypass::Offsets {
            cookie: field("sock", "__sk_common.skc_cookie")?,
            rmem_alloc: field("sock", "sk_backlog.rmem_alloc")?,
            rcv_nxt: field("tcp_sock", "rcv_nxt")?,
            copied_seq: field("tcp_sock", "copied_seq")?,
            write_seq: field("tcp_sock", "write_seq")?,
            snd_una: field("tcp_sock", "snd_una")?,
            prot: field("sock", "__sk_common.skc_prot")?,
            memory_allocated: field("proto", "memory_allocated")?,
            sysctl_mem: field("proto", "sysctl_mem")?,
            memcg,
            tcpmem,
            tcpmem_active,
            usage,
            max,
            parent,
        })
    })
}

/// What the splice program reads of buffers and their socket.
pub fn of_buffers() -> Result<splice::Offsets, OffsetsError> {
    with_kernel(|btf| {
        Ok(splice::Offsets {
            seq: btf.field("sk_buff", "cb")? + btf.field("tcp_skb_cb", "seq")?,
            sk: btf.field("sk_buff", "sk")?,
            copied_seq: btf.field("tcp_sock", "copied_seq")?,
            write_seq: btf.field("tcp_sock", "write_seq")?,
            snd_una: btf.field("tcp_sock", "snd_una")?,
            bytes_acked: btf.field("tcp_sock", "bytes_acked")?,
            user_data: btf.field("sock", "sk_user_data")?,
            waiting: btf.field("sk_psock", "ingress_skb.qlen")?,
        })
    })
}

/// What the capture programs read of the group of a task.
pub fn of_groups() -> Result<group::Offsets, OffsetsError> {
    with_kernel(|btf| {
        Ok(group::Offsets {
            cgroups: btf.field("task_struct", "cgroups")?,
            dfl_cgrp: btf.field("css_set", "dfl_cgrp")?,
            level: btf.field("cgroup", "level")?,
            ancestors: btf.field("cgroup", "ancestors")?,
            kn: btf.field("cgroup", "kn")?,
            name: btf.field("kernfs_node", "name")?,
        })
    })
}

fn with_kernel<T>(ask: impl FnOnce(&Btf<'_>) -> Result<T, OffsetsError>) -> Result<T, OffsetsError> {
    let bytes = fs::read(VMLINUX).map_err(OffsetsError::Unreadable)?;
    ask(&Btf::parse(&bytes).ok_or(OffsetsError::Format)?)
}

/// The types, each at its number.
struct Btf<'b> {
    types: Vec<&'b [u8]>,
    strings: &'b [u8],
    /// Structures by their names: the first of each.
    structs: HashMap<&'b str, u32>,
}

/// `struct btf_type`: name, kind and number of members, size or type.
const TYPE: usize = 12;
/// `struct btf_member`: name, type, offset in bits.
const MEMBER: usize = 12;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn kind(t: &[u8]) -> Option<u32> {
    word(t, 4).map(|info| info >> 24 & 0x1f)
}

impl<'b> Btf<'b> {
    fn parse(bytes: &'b [u8]) -> Option<Self> {
        let at = |n| word(bytes, n).and_then(|n| usize::try_from(n).ok());
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let (header, types, types_len, strings, strings_len) = (at(4)?, at(8)?, at(12)?, at(16)?, at(20)?);
        let body = bytes.get(header..)?;
        let strings = body.get(strings..strings.checked_add(strings_len)?)?;
        let mut rest = body.get(types..types.checked_add(types_len)?)?;
        // Type 0 is void.
        let mut btf = Self { types: vec![&[]], strings, structs: HashMap::new() };
        while !rest.is_empty() {
            let members = usize::try_from(word(rest, 4)? & 0xffff).ok()?;
            // What follows the type itself.
            let more = match kind(rest)? {
                // An integer, a variable, a declaration's tag.
                1 | 14 | 17 => 4,
                KIND_ARRAY => 12,
                KIND_STRUCT | KIND_UNION | 19 => members * MEMBER,
                // Values of an enum, parameters of a function.
                6 | 13 => members * 8,
                // Variables of a section.
                15 => members * 12,
                2 | 7..=12 | 16 | 18 => 0,
                _ => return None,
            };
            let (this, others) = rest.split_at_checked(TYPE + more)?;
            if kind(this)? == KIND_STRUCT {
                let id = u32::try_from(btf.types.len()).ok()?;
                btf.structs.entry(btf.name(word(this, 0)?)?).or_insert(id);
            }
            btf.types.push(this);
            rest = others;
        }
        Some(btf)
    }

    fn name(&self, at: u32) -> Option<&'b str> {
        let from = self.strings.get(usize::try_from(at).ok()?..)?;
        let end = from.iter().position(|b| *b == 0)?;
        std::str::from_utf8(&from[..end]).ok()
    }

    fn field(&self, of: &str, path: &'static str) -> Result<u32, OffsetsError> {
        self.offset(of, path).ok_or(OffsetsError::Missing(path))
    }

    /// The offset in bytes of a field, through named structures and those without names.
    fn offset(&self, of: &str, path: &str) -> Option<u32> {
        let mut id = *self.structs.get(of)?;
        let mut bits = 0;
        for name in path.split('.') {
            let (more, t) = self.member(id, name, 0)?;
            bits += more;
            id = t;
        }
        (bits % 8 == 0).then_some(bits / 8)
    }

    fn member(&self, id: u32, wanted: &str, depth: u32) -> Option<(u32, u32)> {
        let t = self.types.get(usize::try_from(id).ok()?)?;
        if !matches!(kind(t)?, KIND_STRUCT | KIND_UNION) || depth > DEPTH_MAX {
            return None;
        }
        // With the flag the offset has the size of a bit field in its upper byte.
        let bit_fields = word(t, 4)? >> 31 != 0;
        t[TYPE..].chunks_exact(MEMBER).find_map(|m| {
            let (name, id, raw) = (self.name(word(m, 0)?)?, word(m, 4)?, word(m, 8)?);
            let at = if bit_fields { raw & 0x00ff_ffff } else { raw };
            if name == wanted {
                return Some((at, id));
            }
            if !name.is_empty() {
                return None;
            }
            self.member(id, wanted, depth + 1).map(|(more, id)| (at + more, id))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_says_where_its_fields_are() {
        let found = of_sockets().expect("the kernel has BTF");
        // The first three are in cache lines of their own, and none is at the start of a socket.
        for offset in [
            found.cookie,
            found.rmem_alloc,
            found.rcv_nxt,
            found.copied_seq,
            found.write_seq,
            found.snd_una,
            found.prot,
            found.memory_allocated,
            found.sysctl_mem,
        ] {
            assert!(offset > 0 && offset < 8192, "{found:?}");
        }
        let limits = [found.memcg, found.tcpmem, found.tcpmem_active, found.max, found.parent];
        assert!(
            limits.iter().all(|offset| *offset > 0) || limits.iter().all(|offset| *offset == 0),
            "{found:?}"
        );
        let buffers = of_buffers().expect("the kernel has BTF");
        assert!(
            buffers.seq > 0 && buffers.seq < 256 && buffers.copied_seq == found.copied_seq,
            "{buffers:?}"
        );
        assert!(
            buffers.write_seq == found.write_seq
                && buffers.snd_una == found.snd_una
                && buffers.bytes_acked > 0,
            "{buffers:?}"
        );
        assert!(buffers.user_data > 0 && buffers.waiting > 0, "{buffers:?}");
    }

    #[test]
    fn this_kernel_says_where_the_names_of_groups_are() {
        let found = of_groups().expect("the kernel has BTF");
        assert!(found.cgroups > 0 && found.dfl_cgrp > 0 && found.name > 0, "{found:?}");
        // The array is the last of its fields.
        assert!(found.ancestors > found.level && found.ancestors > found.kn, "{found:?}");
    }

    #[test]
    fn what_is_no_btf_is_refused() {
        for bytes in [
            &[][..],
            &[0; 64],
            &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert!(Btf::parse(bytes).is_none());
        }
    }
}
