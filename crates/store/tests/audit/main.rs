//! What the audit trail promises: every decision is one row, an intent is on the disk before its action, whoever changes
//! the file offline is found, and what is pruned leaves a whole trail (D19, D20, D21).

mod decisions;
mod prune;
mod sealed;
mod tamper;
mod trail;
