//! What the agent sees of its own confinement, for the runtime to compare with the template. It must not judge it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use choir_link::SelfReport;
use rustix::process::{Resource, getrlimit};

use crate::agent::Place;

/// In the sandbox's root, which is on its volume.
const PROOF: &str = "/var/lib/choir/proof";

/// Looks, and writes the proof: a file with the nonce on the volume, whose owner on the host tells the id mapping.
pub fn gather(place: &Place, nonce: &str) -> std::io::Result<SelfReport> {
    let proof = if place.is_dev() {
        place.agent.join("proof")
    } else {
        PathBuf::from(PROOF)
    };
    write_proof(&proof, nonce)?;
    let status = fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    Ok(SelfReport {
        cap_bounding: field("CapBnd:"),
        cap_effective: field("CapEff:"),
        no_new_privs: field("NoNewPrivs:").parse().unwrap_or_default(),
        seccomp: field("Seccomp:").parse().unwrap_or_default(),
        uid_map: fs::read_to_string("/proc/self/uid_map")?
            .lines()
            .map(single_spaced)
            .collect(),
        mounts: mounts(&fs::read_to_string("/proc/self/mountinfo")?),
        interfaces: interfaces(&fs::read_to_string("/proc/net/dev")?),
        rlimits: BTreeMap::from([
            ("nofile".to_owned(), soft(Resource::Nofile)),
            ("nproc".to_owned(), soft(Resource::Nproc)),
            ("core".to_owned(), soft(Resource::Core)),
        ]),
        env_names: std::env::vars_os()
            .map(|(name, _)| name.to_string_lossy().into_owned())
            .collect(),
        proof_file: proof.to_string_lossy().into_owned(),
    })
}

/// A new file each time: what is there may be a link that the sandbox's root left.
fn write_proof(path: &PathBuf, nonce: &str) -> std::io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    file.write_all(nonce.as_bytes())
}

/// Soft limit; the greatest number where there is none.
fn soft(resource: Resource) -> u64 {
    getrlimit(resource).current.unwrap_or(u64::MAX)
}

fn single_spaced(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// proc_pid_mountinfo(5): `id parent major:minor root mount-point options [tags] - type source super-options`.
fn mounts(text: &str) -> BTreeMap<String, String> {
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(4);
        let (point, options) = (left.next()?, left.next()?);
        let above = right.split(' ').nth(2)?;
        Some((point.to_owned(), format!("{options},{above}")))
    };
    text.lines().filter_map(parse).collect()
}

fn interfaces(text: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_carry_both_kinds_of_options() {
        let text = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                    40 36 0:30 / /tmp rw,nosuid,nodev - tmpfs tmpfs rw,size=65536k\nbroken\n";
        let got = mounts(text);
        assert_eq!(got["/mnt2"], "rw,noatime,rw,errors=continue");
        assert_eq!(got["/tmp"], "rw,nosuid,nodev,rw,size=65536k");
        assert_eq!(got.len(), 2);
    }

    #[test]
    fn interfaces_are_the_names_before_the_colon() {
        let text = "Inter-|   Receive\n face |bytes packets\n    lo:  100 1 0\n  eth0: 0 0\n";
        assert_eq!(interfaces(text), ["lo", "eth0"]);
    }
}
