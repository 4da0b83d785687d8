//! The commands of a runbook, as they stand in it. Knows nothing of what they do.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Blocks marked `sh` that were not run yet.
pub struct Runbook {
    name: String,
    blocks: VecDeque<String>,
}

impl Runbook {
    pub fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(Self {
            name: file.display().to_string(),
            blocks: blocks(&text),
        })
    }

    /// The next block.
    pub fn next(&mut self) -> Result<String> {
        let block = self.blocks.pop_front();
        block.with_context(|| format!("{} has no more blocks marked `sh`", self.name))
    }

    /// What is left, as one script.
    pub fn rest(&mut self) -> String {
        self.blocks.drain(..).collect()
    }

    pub fn is_done(&self) -> Result<()> {
        ensure!(
            self.blocks.is_empty(),
            "{} has blocks that nothing ran, from here on:\n{}",
            self.name,
            self.blocks[0]
        );
        Ok(())
    }
}

fn blocks(text: &str) -> VecDeque<String> {
    let blocks = text.split("\n```sh\n").skip(1);
    blocks
        .filter_map(|rest| rest.split_once("```"))
        .map(|(block, _)| block.to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::blocks;

    #[test]
    fn only_blocks_for_the_shell_are_taken_in_their_order() {
        let text = "# Title\n\n```sh\none\n```\n\n```text\ntwo\n```\n\n```sh\nthree\nfour\n```\n";
        assert_eq!(blocks(text), ["one\n", "three\nfour\n"]);
    }
}
