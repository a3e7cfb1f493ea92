//! Maps of kernel programs, by bpf(2).
//!
//! The kernel reads and writes as many bytes as the *map* says a key and a value have, whatever it is handed a pointer to. A
//! map that was pinned by another version, or by somebody else, may say something else than this program expects.
//!
//! # Invariants
//! - A [`TypedMap`] exists only where the map's keys and values are as large as its types.

#![expect(unsafe_code, reason = "bpf(2) takes pointers to keys and values")]

use std::{
    io,
    marker::PhantomData,
    mem,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
};

use aya::Pod;

use super::sys::{self, MapInfo};

/// Commands and flags of `linux/bpf.h`.
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_ANY: u64 = 0;
const BPF_NOEXIST: u64 = 1;
/// Types of maps that have a value for each CPU, all of which the kernel reads and writes at once.
const PER_CPU: [u32; 4] = [5, 6, 10, 21];

/// What is not of the size that it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Its keys.
    #[error("has keys of {has} bytes, this version needs {needs}")]
    Keys {
        /// What the map says.
        has: u32,
        /// What is expected.
        needs: u32,
    },
    /// Its values.
    #[error("has values of {has} bytes, this version needs {needs}")]
    Values {
        /// What the map says.
        has: u32,
        /// What is expected.
        needs: u32,
    },
    /// It is another kind of map.
    #[error("is a map of type {has}, this version needs type {needs}")]
    Kind {
        /// `enum bpf_map_type`.
        has: u32,
        /// `enum bpf_map_type`.
        needs: u32,
    },
}

impl Mismatch {
    /// Compares what a map says of itself with what is expected.
    pub fn check(has: MapInfo, needs: MapInfo) -> Result<(), Self> {
        if has.kind != needs.kind {
            return Err(Self::Kind { has: has.kind, needs: needs.kind });
        }
        if has.key_size != needs.key_size {
            return Err(Self::Keys { has: has.key_size, needs: needs.key_size });
        }
        if has.value_size != needs.value_size {
            return Err(Self::Values { has: has.value_size, needs: needs.value_size });
        }
        Ok(())
    }
}

/// A map whose keys are `K` and whose values, as system calls see them, are `V`.
#[derive(Debug)]
pub struct TypedMap<K, V> {
    fd: OwnedFd,
    types: PhantomData<fn(K) -> V>,
}

impl<K, V> AsFd for TypedMap<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The part of `union bpf_attr` for commands on one element.
#[repr(C)]
struct Element {
    map_fd: u32,
    _hole: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl<K: Pod, V: Pod> TypedMap<K, V> {
    /// Takes over a map; one whose keys or values have another size than these types is refused.
    pub fn new(map: OwnedFd) -> io::Result<Self> {
        let has = sys::map_info(map.as_fd())?;
        let size = |bytes: usize| u32::try_from(bytes).map_err(io::Error::other);
        let needs = MapInfo { key_size: size(size_of::<K>())?, value_size: size(size_of::<V>())?, ..has };
        Mismatch::check(has, needs).map_err(io::Error::other)?;
        if PER_CPU.contains(&has.kind) {
            return Err(io::Error::other("the map has a value for each CPU"));
        }
        Ok(Self { fd: map, types: PhantomData })
    }

    /// The value under a key.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        self.read(BPF_MAP_LOOKUP_ELEM, key)
    }

    /// Takes an entry out of a hash map (Linux 5.14). `None` when it is not there.
    pub fn take(&self, key: &K) -> io::Result<Option<V>> {
        self.read(BPF_MAP_LOOKUP_AND_DELETE_ELEM, key)
    }

    /// Puts an entry in place of what is there.
    pub fn update(&self, key: &K, value: &V) -> io::Result<()> {
        self.write(key, value, BPF_ANY)
    }

    /// Puts an entry where there is none under this key.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        self.write(key, value, BPF_NOEXIST)
    }

    fn read(&self, command: libc::c_int, key: &K) -> io::Result<Option<V>> {
        let mut value = mem::MaybeUninit::<V>::uninit();
        let mut attr = self.element(key, value.as_mut_ptr() as u64, 0);
        // SAFETY: the kernel reads a key and writes a value, as long as the map says, which `new` has found to be the sizes of
        // these types (they never change); both live for the call.
        match unsafe { sys::bpf(command, &mut attr) } {
            // SAFETY: the kernel has written a whole value, and any bytes are a `Pod`.
            Ok(_) => Ok(Some(unsafe { value.assume_init() })),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn write(&self, key: &K, value: &V, flags: u64) -> io::Result<()> {
        let mut attr = self.element(key, std::ptr::from_ref(value) as u64, flags);
        // SAFETY: the kernel reads a key and a value, as long as the map says, which `new` has found to be the sizes of these
        // types; both live for the call.
        unsafe { sys::bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    fn element(&self, key: &K, value: u64, flags: u64) -> Element {
        let map_fd = self.fd.as_raw_fd().cast_unsigned();
        Element { map_fd, _hole: 0, key: std::ptr::from_ref(key) as u64, value, flags }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(key: u32, value: u32) -> OwnedFd {
        /// `BPF_MAP_TYPE_HASH` of `linux/bpf.h`.
        const HASH: u32 = 1;
        sys::map_create(HASH, key, value, 8, 0).expect("making maps takes root: run the tests as root")
    }

    #[test]
    fn a_map_of_another_size_is_refused_and_says_of_which() {
        for (key, value, said) in [
            (8, 16, "has values of 16 bytes, this version needs 8"),
            (8, 4, "has values of 4 bytes, this version needs 8"),
            (4, 8, "has keys of 4 bytes, this version needs 8"),
        ] {
            let refused = TypedMap::<u64, u64>::new(make(key, value)).unwrap_err();
            assert_eq!(refused.to_string(), said);
        }
    }

    #[test]
    fn a_map_with_a_value_for_each_cpu_is_refused() {
        const PER_CPU_HASH: u32 = 5;
        let map = sys::map_create(PER_CPU_HASH, 8, 8, 8, 0).expect("a map");
        assert!(TypedMap::<u64, u64>::new(map).is_err());
    }

    #[test]
    fn what_was_put_in_is_there_until_it_is_taken() {
        let map: TypedMap<u64, u64> = TypedMap::new(make(8, 8)).unwrap();
        assert_eq!(map.take(&1).unwrap(), None);
        map.insert(&1, &11).unwrap();
        assert_eq!(map.insert(&1, &12).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        map.update(&1, &13).unwrap();
        assert_eq!(
            (map.get(&1).unwrap(), map.take(&1).unwrap(), map.take(&1).unwrap()),
            (Some(13), Some(13), None)
        );
    }
}
