//! A page that names a test as its proof must name one that exists. It must not know what the test shows.

use std::collections::HashSet;
use std::path::Path;

use crate::tidy::Violation;

/// Pages whose claims rest on tests.
pub const PAGES: &[&str] = &["SECURITY.md", "docs/security-cases.md", "docs/gates.md"];

/// The names of all functions of a source file.
pub fn functions(text: &str) -> impl Iterator<Item = &str> {
    text.split("fn ").skip(1).filter_map(|rest| {
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))?;
        (end > 0).then(|| &rest[..end])
    })
}

/// Paths in backticks, such as `fleet::backup::a_stolen_backup_is_closed`, whose last part looks like a test of ours and
/// is no function.
pub fn check(name: &Path, text: &str, functions: &HashSet<String>) -> Vec<Violation> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let quoted = line.split('`').skip(1).step_by(2);
        for path in quoted.filter_map(|text| text.split_whitespace().last()) {
            let last = path.rsplit("::").next().unwrap_or_default();
            // A sentence about behaviour has several words.
            let sentence = path.contains("::") && last.matches('_').count() >= 3;
            if sentence && !functions.contains(last) {
                found.push(Violation {
                    file: name.to_owned(),
                    line: at + 1,
                    sentence: format!("there is no test `{last}`"),
                });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_good_where_its_test_exists_and_named_where_it_does_not() {
        let source = "#[test]\nfn a_b_c_d() {}\npub async fn of_a_fake_one<T>() {}\n";
        let known: HashSet<String> = functions(source).map(str::to_owned).collect();
        let page = "| D01 | `x::a_b_c_d`, `choir-e2e y::a_b_c_e` | `mod::tests` and `grants add x` |\n";
        let found = check(Path::new("p.md"), page, &known);
        let sentences: Vec<_> = found.iter().map(|v| v.sentence.as_str()).collect();
        assert_eq!(sentences, ["there is no test `a_b_c_e`"]);
    }
}
