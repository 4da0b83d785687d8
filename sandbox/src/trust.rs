//! Whom programs inside believe: the certificates that the image trusts, and the authority of this generation. They are
//! one file of the agent's own, so that nothing of a generation stays on the volume. It must not know who signs what.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use choir_link::message::BUNDLE;

/// Where distributions keep the certificates that they trust, in one file.
const SYSTEM: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Writes the file anew, in one step: programs read the old one or the new.
pub fn write(directory: &Path, authority: Option<&str>) -> io::Result<()> {
    let mut bundle = SYSTEM
        .iter()
        .find_map(|path| std::fs::read(path).ok())
        .unwrap_or_default();
    if !bundle.is_empty() && !bundle.ends_with(b"\n") {
        bundle.push(b'\n');
    }
    bundle.extend_from_slice(authority.unwrap_or_default().as_bytes());
    let new = directory.join(format!("{BUNDLE}.new"));
    std::fs::write(&new, bundle)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o644))?;
    std::fs::rename(&new, directory.join(BUNDLE))
}
