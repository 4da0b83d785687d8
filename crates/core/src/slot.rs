//! The two slots of a workspace.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A pointer from a workspace to one of its two sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    Live,
    Dev,
}

impl Slot {
    pub const ALL: [Slot; 2] = [Slot::Live, Slot::Dev];

    pub fn as_str(self) -> &'static str {
        match self {
            Slot::Live => "live",
            Slot::Dev => "dev",
        }
    }

    pub fn other(self) -> Self {
        match self {
            Slot::Live => Slot::Dev,
            Slot::Dev => Slot::Live,
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Text that is neither `live` nor `dev`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a slot is `live` or `dev`")]
pub struct SlotError;

impl FromStr for Slot {
    type Err = SlotError;

    fn from_str(text: &str) -> Result<Self, SlotError> {
        match text {
            "live" => Ok(Slot::Live),
            "dev" => Ok(Slot::Dev),
            _ => Err(SlotError),
        }
    }
}
