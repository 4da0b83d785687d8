//! Which actions the workflows run: each by the commit that somebody read, not by a name that its owner can move. It must
//! not know what a workflow does.

use std::path::Path;

use crate::tidy::Violation;

/// Where GitHub looks for workflows.
pub const DIRECTORY: &str = ".github/workflows";

pub fn check(name: &Path, text: &str) -> Vec<Violation> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        for action in used(line).filter(|action| !is_pinned(action)) {
            found.push(Violation {
                file: name.to_owned(),
                line: at + 1,
                sentence: format!("`{action}` can become something else: name it by the 40 digits of its commit"),
            });
        }
    }
    found
}

/// The actions that a line uses, in block or in flow style; an empty one where the name is not on the line.
fn used(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split(" #").next().unwrap_or_default();
    let code = if code.trim_start().starts_with('#') { "" } else { code };
    code.match_indices("uses").filter_map(move |(at, word)| {
        let inside_a_word = code[..at].ends_with(|last: char| last.is_alphanumeric() || last == '_' || last == '-');
        let rest = code[at + word.len()..].trim_start_matches(['"', '\'', ' ']);
        let value = rest.strip_prefix(':').filter(|_| !inside_a_word)?.trim_start();
        let end = value.find(|next: char| next.is_whitespace() || next == ',' || next == '}');
        Some(value[..end.unwrap_or(value.len())].trim_matches(['"', '\'']))
    })
}

/// What lies in this repository is at the commit that is checked out.
fn is_pinned(action: &str) -> bool {
    let commit = action.rsplit_once('@').map_or("", |(_, commit)| commit);
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    action.starts_with("./") || (commit.len() == 40 && commit.bytes().all(is_digit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn lines(text: &str) -> Vec<usize> {
        check(Path::new("w.yml"), text).iter().map(|found| found.line).collect()
    }

    #[test]
    fn an_action_by_its_commit_is_good() {
        let text = format!(
            "steps:\n  - uses: a/b@{COMMIT} # v1.2.3\n  - name: x\n    uses: 'a/b/c@{COMMIT}'\n  - {{ uses: \"a/b@{COMMIT}\" }}\n  - uses: ./here\n"
        );
        assert!(lines(&text).is_empty());
    }

    #[test]
    fn an_action_by_a_tag_a_branch_or_part_of_a_commit_is_named() {
        for action in ["a/b@v4", "a/b@main", "a/b", "a/b@0123456", "docker://debian:13", ""] {
            for line in [
                format!("  - uses: {action}"),
                format!("    \"uses\" : '{action}' # {COMMIT}"),
                format!("  - {{ name: x, uses: {action} }}"),
            ] {
                assert_eq!(lines(&format!("steps:\n{line}\n")), [2], "{line}");
            }
        }
        let sentence = check(Path::new("w.yml"), "- uses: a/b@v4\n").remove(0).to_string();
        assert_eq!(
            sentence,
            "w.yml:1: `a/b@v4` can become something else: name it by the 40 digits of its commit"
        );
    }

    #[test]
    fn a_comment_and_another_word_use_nothing() {
        assert!(lines("# uses: a/b@v4\nkey: x # uses: a/b@v4\npauses: a/b@v4\nre-uses: a/b@v4\n").is_empty());
    }
}
