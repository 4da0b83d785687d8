//! A page of memory for one key: kept out of swap and core dumps, and wiped when it goes. It must not know what a key
//! is for.

use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use zeroize::Zeroize;

/// 32 bytes at the start of a page of their own.
pub struct KeyPage {
    bytes: NonNull<[u8; 32]>,
    length: usize,
    locked: bool,
}

// SAFETY: the page belongs to this value alone, and is written only through `&mut`.
unsafe impl Send for KeyPage {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for KeyPage {}

impl KeyPage {
    /// A page filled by `fill`, so that the bytes are nowhere else. It is not locked where the limit of locked memory
    /// (`RLIMIT_MEMLOCK`) is reached.
    pub fn filled(fill: impl FnOnce(&mut [u8; 32])) -> Self {
        let length = rustix::param::page_size();
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        let start = start.expect("there is memory for one page");
        // SAFETY: the mapping was made above with this length. Either call may fail and leaves a usable page.
        let (lock, _) = unsafe { (mlock(start, length), madvise(start, length, Advice::LinuxDontDump)) };
        let mut page = Self {
            bytes: NonNull::new(start.cast()).expect("a mapping is never at address 0"),
            length,
            locked: lock.is_ok(),
        };
        // SAFETY: the page is mapped, zeroed, large enough, and borrowed by nobody else.
        fill(unsafe { page.bytes.as_mut() });
        page
    }

    /// Whether it stays out of swap.
    pub fn is_locked(&self) -> bool {
        self.locked
    }

    pub fn bytes(&self) -> &[u8; 32] {
        // SAFETY: mapped for as long as `self` lives, and written only through `&mut`.
        unsafe { self.bytes.as_ref() }
    }
}

impl Drop for KeyPage {
    fn drop(&mut self) {
        // SAFETY: as in `filled`; nothing can refer to the page any more. Unmapping unlocks it.
        unsafe {
            self.bytes.as_mut().zeroize();
            let _ = munmap(self.bytes.as_ptr().cast(), self.length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_locked_in_memory_and_left_out_of_dumps() {
        let ordinary = vec![7u8; 1 << 16];
        let page = KeyPage::filled(|bytes| bytes.fill(7));
        assert_eq!(page.bytes(), &[7; 32]);
        assert!(page.is_locked());
        for flag in ["lo", "dd"] {
            let of = |address: *const u8| flags(address as usize).split(' ').any(|found| found == flag);
            assert!(of(page.bytes().as_ptr()), "the page of a key lacks {flag}");
            assert!(!of(ordinary.as_ptr()), "ordinary memory has {flag}");
        }
    }

    /// The flags of the mapping that holds an address.
    fn flags(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bounds = range.and_then(|(from, to)| {
                Some((
                    usize::from_str_radix(from, 16).ok()?,
                    usize::from_str_radix(to, 16).ok()?,
                ))
            });
            if let Some((from, to)) = bounds {
                inside = (from..to).contains(&address);
            } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                return flags.to_owned();
            }
        }
        panic!("no mapping holds {address:x}")
    }
}
