//! Processes as /proc shows them: one, or one and everything below it. It must not know what they are for.

use std::collections::HashMap;
use std::fs;

use rustix::process::{Pid, Signal};

/// One process.
#[derive(Debug, Clone)]
pub(crate) struct Proc {
    pub pid: i32,
    parent: i32,
    state: char,
    /// Clock ticks since boot.
    pub started: u64,
    pub cpu_ns: u64,
    /// Bytes.
    pub resident: u64,
}

impl Proc {
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    pub fn is_stopped(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }
}

/// A process by its id.
pub(crate) fn one(pid: i32) -> Option<Proc> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// A process and its descendants, itself first.
pub(crate) fn below(root: i32) -> Vec<Proc> {
    let mut children: HashMap<i32, Vec<Proc>> = HashMap::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in entries.filter_map(|e| one(e.file_name().to_str()?.parse().ok()?)) {
        children.entry(process.parent).or_default().push(process);
    }
    let mut tree: Vec<Proc> = one(root).into_iter().collect();
    let mut next = 0;
    while let Some(pid) = tree.get(next).map(|p| p.pid) {
        tree.extend(children.remove(&pid).unwrap_or_default());
        next += 1;
    }
    tree
}

/// Sends a signal to each; those that have ended meanwhile do not mind.
pub(crate) fn signal(processes: &[Proc], signal: Signal) {
    for pid in processes.iter().filter_map(|p| Pid::from_raw(p.pid)) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// proc(5), `/proc/pid/stat`. The command's name may hold spaces and parentheses.
fn parse(stat: &str) -> Option<Proc> {
    let (head, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    let ticks = number(14)? + number(15)?;
    Some(Proc {
        pid: head.split(' ').next()?.parse().ok()?,
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        started: number(22)?,
        cpu_ns: ticks * (1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)),
        resident: number(24)? * rustix::param::page_size() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) T 7 0 0 0 0 0 0 0 0 0 3 4 0 0 20 0 1 0 555 1000 2 0";
        let process = parse(stat).unwrap();
        assert_eq!((process.pid, process.parent, process.started), (42, 7, 555));
        assert!(process.is_stopped());
    }

    #[test]
    fn this_process_is_in_its_own_tree() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(below(own)[0].pid, own);
    }
}
