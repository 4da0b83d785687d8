//! Gives up every privilege the work at hand does not need. Must run before the first thread.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

/// What the unpacker needs, inside its root.
pub const UNPACK: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP);

/// What the packer needs, inside its volume.
pub const PACK: CapabilitySet = CapabilitySet::DAC_OVERRIDE;

/// What the server needs: the unpacker's, subvolumes and quotas, and to confine its children.
pub const SERVE: CapabilitySet = UNPACK.union(CapabilitySet::SYS_ADMIN).union(CapabilitySet::SYS_CHROOT);

/// Keeps at most `kept`, for this process and whatever it starts.
pub fn keep_only(kept: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    let held = capabilities(None)?;
    if held.effective.contains(CapabilitySet::SETPCAP) {
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            if kept.contains(one) {
                continue;
            }
            match remove_capability_from_bounding_set(one) {
                Ok(()) => {}
                // Beyond the last capability this kernel knows.
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(set_capabilities(
        None,
        CapabilitySets {
            effective: held.permitted & kept,
            permitted: held.permitted & kept,
            inheritable: CapabilitySet::empty(),
        },
    )?)
}
