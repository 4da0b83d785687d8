//! The processes of this machine, by the container that they are of. It must not end any.

use std::fs;
use std::path::Path;

use anyhow::Result;
use rustix::process::Pid;

/// One that runs a program.
#[derive(Debug)]
pub struct Process {
    pub pid: Pid,
    /// The id of the container that it is in or watches over.
    pub container: Option<String>,
    arguments: Vec<String>,
}

/// Those that run now.
pub fn all() -> Result<Vec<Process>> {
    let entries = fs::read_dir("/proc")?.flatten();
    let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    Ok(pids.filter_map(Process::read).collect())
}

/// Those that are in this container or watch over it.
pub fn of(container: &str) -> Result<Vec<Process>> {
    let mut all = all()?;
    all.retain(|it| it.container.as_deref() == Some(container));
    Ok(all)
}

/// The monitors of all containers in this storage of Podman's.
pub fn monitors(storage: &Path) -> Result<Vec<Process>> {
    let mut all = all()?;
    all.retain(|it| it.is_monitor() && it.arguments.iter().any(|argument| Path::new(argument) == storage));
    Ok(all)
}

impl Process {
    /// None where it has ended.
    pub fn read(pid: Pid) -> Option<Self> {
        let file = |name: &str| fs::read(format!("/proc/{}/{name}", pid.as_raw_nonzero())).ok();
        let (line, cgroup) = (file("cmdline")?, file("cgroup")?);
        if line.is_empty() {
            return None;
        }
        let words = line.split(|byte| *byte == 0);
        let arguments = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let mut process = Self {
            pid,
            container: container_in(&String::from_utf8_lossy(&cgroup)),
            arguments,
        };
        if process.is_monitor() {
            let mut words = process.arguments.iter().skip_while(|word| *word != "-c");
            process.container = words.nth(1).cloned();
        }
        Some(process)
    }

    fn is_monitor(&self) -> bool {
        let program = self.arguments.first().map(Path::new);
        program.and_then(Path::file_name).is_some_and(|name| name == "conmon")
    }
}

/// The id in the names that Podman gives to control groups.
fn container_in(cgroup: &str) -> Option<String> {
    let mut ids = cgroup.split("libpod-").skip(1).filter_map(|rest| rest.get(..64));
    ids.find(|id| id.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::container_in;

    #[test]
    fn a_container_is_found_in_either_kind_of_control_group_and_a_monitor_is_in_none() {
        let id = "0123456789abcdef".repeat(4);
        let named = [
            format!("9:name=systemd:/\n8:pids:/libpod_parent/libpod-{id}\n"),
            format!("0::/machine.slice/libpod-{id}.scope/container\n"),
        ];
        for cgroup in named {
            assert_eq!(container_in(&cgroup).as_deref(), Some(id.as_str()), "{cgroup}");
        }
        assert_eq!(
            container_in(&format!("0::/machine.slice/libpod-conmon-{id}.scope\n")),
            None
        );
    }
}
