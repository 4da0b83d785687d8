//! The btrfs ioctls and the inherited socket: the only unsafe code of this program. Every argument
//! is a plain `repr(C)` value of the layout in Linux's `btrfs.h`. Must not know what a volume is.

#![expect(unsafe_code, reason = "ioctls and an inherited descriptor have no safe form")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Setter, Updater, ioctl, opcode};

const BTRFS: u8 = 0x94;
const NAME_V1: usize = 4088;
const NAME_V2: usize = 4040;
const READONLY: u64 = 1 << 1;
const QUOTA_TREE: u64 = 8;
const FIRST_FREE_OBJECT: u64 = 256;
const MAX_REFERENCED: u64 = 1;
const STATUS_ON: u64 = 1;
const STATUS_INCONSISTENT: u64 = 1 << 2;
const STATUS_SIMPLE: u64 = 1 << 3;
const ENABLE: u64 = 1;
const ENABLE_SIMPLE: u64 = 4;

const SUBVOL_CREATE: Opcode = opcode::write::<VolArgs>(BTRFS, 14);
const SNAP_DESTROY: Opcode = opcode::write::<VolArgs>(BTRFS, 15);
const TREE_SEARCH: Opcode = opcode::read_write::<Search>(BTRFS, 17);
const INO_LOOKUP: Opcode = opcode::read_write::<InoLookup>(BTRFS, 18);
const SNAP_CREATE_V2: Opcode = opcode::write::<VolArgsV2>(BTRFS, 23);
const SUBVOL_GETFLAGS: Opcode = opcode::read::<u64>(BTRFS, 25);
const SUBVOL_SETFLAGS: Opcode = opcode::write::<u64>(BTRFS, 26);
const QUOTA_CTL: Opcode = opcode::read_write::<[u64; 2]>(BTRFS, 40);
const QGROUP_CREATE: Opcode = opcode::write::<[u64; 2]>(BTRFS, 42);
const QGROUP_LIMIT: Opcode = opcode::read::<[u64; 6]>(BTRFS, 43);
const GET_SUBVOL_INFO: Opcode = opcode::read::<SubvolumeInfo>(BTRFS, 60);
const QUOTA_RESCAN: Opcode = opcode::write::<[u64; 8]>(BTRFS, 44);

#[repr(C)]
struct VolArgs {
    fd: i64,
    name: [u8; NAME_V1],
}

#[repr(C)]
struct VolArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; NAME_V2],
}

#[repr(C)]
struct InoLookup {
    tree: u64,
    object: u64,
    name: [u8; 4080],
}

#[repr(C)]
struct SubvolumeInfo {
    tree: u64,
    name: [u8; 256],
    parent_directory_generation_flags: [u64; 4],
    ids: [[u8; 16]; 3],
    changed: u64,
    others: [u64; 3],
    times: [[u64; 2]; 4],
    reserved: [u64; 8],
}

#[repr(C)]
struct Search {
    tree: u64,
    object: [u64; 2],
    offset: [u64; 2],
    transid: [u64; 2],
    kind: [u32; 2],
    items: u32,
    unused: [u32; 9],
    found: [u8; 3992],
}

/// What the quota tree says about one subvolume, bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counted {
    pub referenced: u64,
    pub exclusive: u64,
    pub limit: Option<u64>,
}

fn name_of<const N: usize>(name: &[u8]) -> Result<[u8; N], Errno> {
    let mut field = [0; N];
    // One byte stays zero, the terminator.
    if name.len() >= N {
        return Err(Errno::NAMETOOLONG);
    }
    field[..name.len()].copy_from_slice(name);
    Ok(field)
}

/// Makes an empty subvolume `name` in `parent`.
pub fn create_subvolume(parent: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let args = VolArgs {
        fd: 0,
        name: name_of(name.as_bytes())?,
    };
    // SAFETY: BTRFS_IOC_SUBVOL_CREATE reads one btrfs_ioctl_vol_args.
    unsafe { ioctl(parent, Setter::<SUBVOL_CREATE, _>::new(args)) }
}

/// Makes a snapshot of the subvolume `source` as `name` in `parent`.
pub fn snapshot(source: BorrowedFd<'_>, parent: BorrowedFd<'_>, name: &str, readonly: bool) -> Result<(), Errno> {
    let args = VolArgsV2 {
        fd: i64::from(source.as_raw_fd()),
        transid: 0,
        flags: if readonly { READONLY } else { 0 },
        unused: [0; 4],
        name: name_of(name.as_bytes())?,
    };
    // SAFETY: BTRFS_IOC_SNAP_CREATE_V2 reads one btrfs_ioctl_vol_args_v2.
    unsafe { ioctl(parent, Setter::<SNAP_CREATE_V2, _>::new(args)) }
}

/// Deletes the subvolume `name` in `parent`; NOTEMPTY when others are nested in it.
pub fn destroy_subvolume(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let args = VolArgs {
        fd: 0,
        name: name_of(name)?,
    };
    // SAFETY: BTRFS_IOC_SNAP_DESTROY reads one btrfs_ioctl_vol_args.
    unsafe { ioctl(parent, Setter::<SNAP_DESTROY, _>::new(args)) }
}

/// The id of the subvolume that holds `file`; its quota group is 0/id.
pub fn subvolume_id(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut args = InoLookup {
        tree: 0,
        object: FIRST_FREE_OBJECT,
        name: [0; 4080],
    };
    // SAFETY: BTRFS_IOC_INO_LOOKUP reads and writes one btrfs_ioctl_ino_lookup_args.
    unsafe { ioctl(file, Updater::<INO_LOOKUP, _>::new(&mut args))? };
    Ok(args.tree)
}

/// Whether the subvolume `file` is read-only.
pub fn is_readonly(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // SAFETY: BTRFS_IOC_SUBVOL_GETFLAGS writes one u64.
    let flags: u64 = unsafe { ioctl(file, Getter::<SUBVOL_GETFLAGS, u64>::new())? };
    Ok(flags & READONLY != 0)
}

/// Makes the subvolume `file` read-only.
pub fn set_readonly(file: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: BTRFS_IOC_SUBVOL_SETFLAGS reads one u64.
    unsafe { ioctl(file, Setter::<SUBVOL_SETFLAGS, _>::new(READONLY)) }
}

/// The transaction in which a file of the subvolume `file` was last changed.
pub fn changed(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    // SAFETY: BTRFS_IOC_GET_SUBVOL_INFO writes one btrfs_ioctl_get_subvol_info_args.
    let info: SubvolumeInfo = unsafe { ioctl(file, Getter::<GET_SUBVOL_INFO, SubvolumeInfo>::new())? };
    Ok(info.changed)
}

/// The item (0, kind, offset) of the quota tree as little-endian numbers.
fn quota_item(pool: BorrowedFd<'_>, kind: u32, offset: u64) -> Result<Option<[u64; 5]>, Errno> {
    let mut args = Search {
        tree: QUOTA_TREE,
        object: [0; 2],
        offset: [offset; 2],
        transid: [0, u64::MAX],
        kind: [kind; 2],
        items: 1,
        unused: [0; 9],
        found: [0; 3992],
    };
    // SAFETY: BTRFS_IOC_TREE_SEARCH reads and writes one btrfs_ioctl_search_args.
    unsafe { ioctl(pool, Updater::<TREE_SEARCH, _>::new(&mut args))? };
    if args.items == 0 {
        return Ok(None);
    }
    // A btrfs_ioctl_search_header (its last u32 is the item's length), then the item.
    let (header, item) = args.found.split_at(32);
    let length = u32::from_ne_bytes([header[28], header[29], header[30], header[31]]) as usize;
    let mut numbers = [0; 5];
    for (number, bytes) in numbers.iter_mut().zip(item[..length.min(40)].chunks_exact(8)) {
        *number = u64::from_le_bytes(bytes.try_into().map_err(|_| Errno::IO)?);
    }
    Ok(Some(numbers))
}

/// How a file system counts.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    /// By who wrote it, not by who refers to it.
    pub simple: bool,
    /// Whether the counts are to be trusted.
    pub consistent: bool,
}

/// `None` when quotas are off.
pub fn quota(pool: BorrowedFd<'_>) -> Result<Option<Quota>, Errno> {
    let status = match quota_item(pool, 240, 0) {
        Err(Errno::NOENT) => None,
        other => other?,
    };
    Ok(status.filter(|s| s[2] & STATUS_ON != 0).map(|s| Quota {
        simple: s[2] & STATUS_SIMPLE != 0,
        consistent: s[2] & STATUS_INCONSISTENT == 0,
    }))
}

/// Begins to count, simply or fully.
pub fn enable_quota(pool: BorrowedFd<'_>, simple: bool) -> Result<(), Errno> {
    let mut args = [if simple { ENABLE_SIMPLE } else { ENABLE }, 0];
    // SAFETY: BTRFS_IOC_QUOTA_CTL reads and writes one btrfs_ioctl_quota_ctl_args {cmd, status}.
    unsafe { ioctl(pool, Updater::<QUOTA_CTL, _>::new(&mut args)) }
}

/// Starts to count anew in the background.
pub fn rescan_quota(pool: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: BTRFS_IOC_QUOTA_RESCAN reads one btrfs_ioctl_quota_rescan_args, all zero.
    match unsafe { ioctl(pool, Setter::<QUOTA_RESCAN, _>::new([0_u64; 8])) } {
        Err(Errno::INPROGRESS) => Ok(()),
        other => other,
    }
}

/// Counts of the subvolume with this id, as of the last commit.
pub fn counted(pool: BorrowedFd<'_>, id: u64) -> Result<Counted, Errno> {
    let info = quota_item(pool, 242, id)?.unwrap_or_default();
    let limit = quota_item(pool, 244, id)?.unwrap_or_default();
    Ok(Counted {
        referenced: info[1],
        exclusive: info[3],
        limit: (limit[0] & MAX_REFERENCED != 0).then_some(limit[1]),
    })
}

/// Sets or clears the most bytes the subvolume with this id may refer to.
pub fn set_limit(pool: BorrowedFd<'_>, id: u64, bytes: Option<u64>) -> Result<(), Errno> {
    // All ones clears a limit.
    let args = [id, MAX_REFERENCED, bytes.unwrap_or(u64::MAX), 0, 0, 0];
    // SAFETY: BTRFS_IOC_QGROUP_LIMIT reads one btrfs_ioctl_qgroup_limit_args.
    unsafe { ioctl(pool, Setter::<QGROUP_LIMIT, _>::new(args)) }
}

/// Removes the quota group of a deleted subvolume. Newer kernels do so themselves once the last of
/// it is gone, and answer BUSY or NOENT here.
pub fn remove_group(pool: BorrowedFd<'_>, id: u64) -> Result<(), Errno> {
    // SAFETY: BTRFS_IOC_QGROUP_CREATE reads one btrfs_ioctl_qgroup_create_args {create: 0, id}.
    match unsafe { ioctl(pool, Setter::<QGROUP_CREATE, _>::new([0, id])) } {
        Err(Errno::BUSY | Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// The listening socket systemd left in descriptor 3, when it was meant for this process.
pub fn inherited_listener() -> io::Result<Option<OwnedFd>> {
    const FIRST: RawFd = 3;
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) || number("LISTEN_FDS") != Some(1) {
        return Ok(None);
    }
    // SAFETY: by the protocol descriptor 3 is open and ours alone; nothing was opened before.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST) };
    rustix::io::fcntl_setfd(socket.as_fd(), rustix::io::FdFlags::CLOEXEC)?;
    Ok(Some(socket))
}
