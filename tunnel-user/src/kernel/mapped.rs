//! Arrays of a kernel program that this process has mapped: words that both read and write.
//!
//! # Invariants
//! - A word is read and written as a whole, on both sides, and nothing else is done with the memory.

#![expect(unsafe_code, reason = "mmap(2), and references into what it returns")]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr::{self, NonNull},
    sync::atomic::AtomicU64,
};

use super::sys;

/// What the kernel and this process may both write at any time.
///
/// # Safety
/// The type is `repr(C)`, made of atomic integers without padding, and its size is a multiple of eight bytes.
pub unsafe trait Shared: Sync {}

// SAFETY: an array of atomics of eight bytes.
unsafe impl<const WORDS: usize> Shared for [AtomicU64; WORDS] {}

/// A `BPF_MAP_TYPE_ARRAY` with `BPF_F_MMAPABLE` whose values are `T`.
pub struct MappedArray<T> {
    start: NonNull<T>,
    entries: usize,
}

// SAFETY: it owns its mapping, which any thread may use and unmap, and hands out references to what is `Sync`.
unsafe impl<T: Shared> Send for MappedArray<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for MappedArray<T> {}

impl<T: Shared> MappedArray<T> {
    /// Maps all of an array. One whose values have another size is refused.
    pub fn new(array: BorrowedFd<'_>) -> io::Result<Self> {
        let info = sys::map_info(array)?;
        let value = usize::try_from(info.value_size).map_err(io::Error::other)?;
        let entries = usize::try_from(info.max_entries).map_err(io::Error::other)?;
        const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() <= 64) };
        if info.kind != sys::BPF_MAP_TYPE_ARRAY || value != size_of::<T>() || entries == 0 {
            let what = format!("its values have {value} bytes, and not {}", size_of::<T>());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), entries * value, protection, libc::MAP_SHARED, array.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, entries })
    }

    /// The words of one entry; beyond the last one, those of the last one.
    pub fn at(&self, index: usize) -> &T {
        let index = index.min(self.entries - 1);
        // SAFETY: within the mapping, which lasts as long as `self`: it has `entries` values (not none) that lie `value_size`
        // bytes apart, rounded up to eight (`array_map_alloc`), which is the size of this type. A mapping begins at a page, so
        // every value is aligned. The memory is shared with the kernel, which changes it at any time: that is what atomics
        // allow, any bits are a value of them, and no other reference into it is ever made.
        unsafe { self.start.add(index).as_ref() }
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: what `new` mapped, with the same length; whoever borrowed from it borrowed `self`.
        let _unmapped = unsafe { libc::munmap(self.start.as_ptr().cast(), self.entries * size_of::<T>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsFd as _, sync::atomic::Ordering};

    use super::*;

    #[test]
    fn an_array_of_another_size_is_refused_and_one_of_this_size_is_shared_with_the_kernel() {
        type Two = [AtomicU64; 2];
        /// `linux/bpf.h`
        const BPF_F_MMAPABLE: u32 = 1 << 10;
        let make = |value| {
            sys::map_create(sys::BPF_MAP_TYPE_ARRAY, 4, value, 3, BPF_F_MMAPABLE).expect("run as root")
        };
        for wrong in [8, 24, 16 + 64] {
            assert!(MappedArray::<Two>::new(make(wrong).as_fd()).is_err(), "{wrong}");
        }
        let fd = make(16);
        let array = MappedArray::<Two>::new(fd.as_fd()).unwrap();
        array.at(1)[1].store(7, Ordering::Relaxed);
        array.at(99)[0].store(9, Ordering::Relaxed);
        let map: super::super::map::TypedMap<u32, [u64; 2]> = super::super::map::TypedMap::new(fd).unwrap();
        assert_eq!((map.get(&1).unwrap(), map.get(&2).unwrap()), (Some([0, 7]), Some([9, 0])));
    }
}
