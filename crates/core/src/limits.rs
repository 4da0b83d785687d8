//! What one sandbox may use of the box.

use serde::{Deserialize, Serialize};

/// Limits of one sandbox. All are enforced by the kernel, not by us.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of memory; swap is not given on top.
    pub memory: u64,
    /// Cores, in fractions.
    pub cpus: f64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes on the volume, the release's files included.
    pub disk: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: 2 << 30,
            cpus: 1.5,
            pids: 2048,
            disk: 20 << 30,
        }
    }
}

/// Some limits, each replacing a default or an earlier value.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsPatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<u64>,
}

/// A limit that a sandbox could not run with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`limits.{field}` must be between {low} and {high}")]
pub struct LimitError {
    pub field: &'static str,
    pub low: String,
    pub high: String,
}

impl Limits {
    /// These limits with the patch's values in place of their own.
    pub fn patched(self, patch: &LimitsPatch) -> Self {
        Self {
            memory: patch.memory.unwrap_or(self.memory),
            cpus: patch.cpus.unwrap_or(self.cpus),
            pids: patch.pids.unwrap_or(self.pids),
            disk: patch.disk.unwrap_or(self.disk),
        }
    }

    /// Of the patch what is less than these limits.
    pub fn lowered_by(&self, patch: &LimitsPatch) -> LimitsPatch {
        LimitsPatch {
            memory: patch.memory.filter(|m| *m < self.memory),
            cpus: patch.cpus.filter(|c| *c < self.cpus),
            pids: patch.pids.filter(|p| *p < self.pids),
            disk: patch.disk.filter(|d| *d < self.disk),
        }
    }
}

impl LimitsPatch {
    /// The patch with the later one's values on top.
    pub fn merged(self, later: &LimitsPatch) -> Self {
        Self {
            memory: later.memory.or(self.memory),
            cpus: later.cpus.or(self.cpus),
            pids: later.pids.or(self.pids),
            disk: later.disk.or(self.disk),
        }
    }

    /// Refuses what a sandbox could not start with, or what no box has.
    pub fn validate(&self) -> Result<(), LimitError> {
        check("memory", self.memory, 64 << 20, 1 << 40)?;
        check("pids", self.pids, 16, 1 << 20)?;
        check("disk", self.disk, 64 << 20, 1 << 44)?;
        match self.cpus {
            Some(c) if !(0.05..=256.0).contains(&c) => Err(LimitError {
                field: "cpus",
                low: "0.05".into(),
                high: "256".into(),
            }),
            _ => Ok(()),
        }
    }
}

fn check(field: &'static str, value: Option<u64>, low: u64, high: u64) -> Result<(), LimitError> {
    match value {
        Some(v) if !(low..=high).contains(&v) => Err(LimitError {
            field,
            low: low.to_string(),
            high: high.to_string(),
        }),
        _ => Ok(()),
    }
}
