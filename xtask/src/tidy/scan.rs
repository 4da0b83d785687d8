//! Rules about the text of one file. Strings and comments are told apart from code first, so that
//! a rule about code does not see its own description.

use std::path::Path;

use crate::tidy::Violation;

const LONGEST_FILE: usize = 600;
const LONGEST_FUNCTION: usize = 80;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["common", "helper", "helpers", "manager", "misc", "util", "utils"];

/// (in code, why not)
const FORBIDDEN_CODE: &[(&str, &str)] = &[
    (
        "#[allow(",
        "use #[expect(…, reason = …)], which notices when it is no longer needed",
    ),
    (
        "#![allow(",
        "use #![expect(…, reason = …)], which notices when it is no longer needed",
    ),
    ("thread_rng", "randomness comes in as an argument"),
    ("Utc::now", "time comes in as an argument"),
];

/// Who holds platform secrets starts no programs: nothing that a request says may reach a shell or an argument list.
const STARTS_NOTHING: &[&str] = &["hypervisor/src", "crates"];
/// Files below those that must: the development runtime starts the agent, a fixed path with fixed arguments.
const STARTERS: &[&str] = &["crates/runtime/src/process.rs"];
/// System calls and their wrappers that start programs.
const STARTING_CALLS: &[&str] = &["execv", "execl", "posix_spawn", "fork()", "popen(", "libc::system"];

/// (in comments, why not)
const FORBIDDEN_COMMENTS: &[(&str, &str)] = &[
    ("TODO", "do it, or open an issue and say what is missing in a sentence"),
    ("FIXME", "do it, or open an issue and say what is missing in a sentence"),
    ("XXX", "say in a sentence what is meant"),
    ("====", "no banner comments: a file that needs chapters is two files"),
    ("----", "no banner comments: a file that needs chapters is two files"),
];

/// `name` is the path below the repository's root.
pub fn check(name: &Path, text: &str) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut report = |line: usize, sentence: String| {
        found.push(Violation {
            file: name.to_owned(),
            line,
            sentence,
        });
    };
    let lines = text.lines().count();
    if lines > LONGEST_FILE {
        report(
            LONGEST_FILE + 1,
            format!("{lines} lines: split the file, {LONGEST_FILE} are the limit"),
        );
    }
    if name.extension().is_none_or(|extension| extension != "rs") {
        return found;
    }
    for part in name.iter().map(|part| part.to_string_lossy()) {
        let stem = part.strip_suffix(".rs").unwrap_or(&part);
        if EMPTY_NAMES.contains(&stem) {
            report(
                1,
                format!("`{stem}` does not say what is inside: name it after its one purpose"),
            );
        }
    }
    if !text.starts_with("//!") {
        report(
            1,
            "start with `//!`: what the module is for and what it must not know".into(),
        );
    }
    let masked = mask(text);
    for (lines, rules) in [(&masked.code, FORBIDDEN_CODE), (&masked.comments, FORBIDDEN_COMMENTS)] {
        for (index, line) in lines.lines().enumerate() {
            for (words, why) in rules.iter().filter(|(words, _)| line.contains(words)) {
                report(index + 1, format!("`{words}`: {why}"));
            }
        }
    }
    if starts_nothing(name) {
        let starting = masked.code.lines().enumerate().filter(|(_, line)| starts_program(line));
        for (index, _) in starting {
            report(
                index + 1,
                "no program is started here: ask the agent, the volumes helper or the runtime to do it".into(),
            );
        }
    }
    for function in functions(&masked.code) {
        if function.lines > LONGEST_FUNCTION {
            report(
                function.line,
                format!(
                    "fn {} has {} lines: split it, {LONGEST_FUNCTION} are the limit",
                    function.name, function.lines
                ),
            );
        }
    }
    found
}

/// Whether a file is part of what must not start programs; its tests may.
fn starts_nothing(name: &Path) -> bool {
    let below = STARTS_NOTHING.iter().any(|directory| name.starts_with(directory));
    let source = name.iter().any(|part| part == "src");
    below && source && !STARTERS.iter().any(|starter| name == Path::new(starter))
}

fn starts_program(line: &str) -> bool {
    let imported = line.contains("process::") && line.contains("Command");
    imported || line.contains("Command::new(") || STARTING_CALLS.iter().any(|call| line.contains(call))
}

/// The same text twice, line for line: once with only its code, once with only its comments. All
/// else is spaces.
struct Masked {
    code: String,
    comments: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

fn mask(text: &str) -> Masked {
    let mut masked = Masked {
        code: String::new(),
        comments: String::new(),
    };
    let mut rest = text;
    while !rest.is_empty() {
        let after_word = masked
            .code
            .ends_with(|last: char| last.is_alphanumeric() || last == '_');
        let (kind, length) = next_piece(rest, after_word);
        let (piece, remaining) = rest.split_at(length);
        for character in piece.chars() {
            let blank = if character == '\n' { '\n' } else { ' ' };
            masked.code.push(if kind == Kind::Code { character } else { blank });
            masked
                .comments
                .push(if kind == Kind::Comment { character } else { blank });
        }
        rest = remaining;
    }
    masked
}

/// What the text starts with, and how many bytes of it belong together.
fn next_piece(text: &str, after_word: bool) -> (Kind, usize) {
    let first = text.chars().next().map_or(1, char::len_utf8);
    if text.starts_with("//") {
        (Kind::Comment, text.find('\n').unwrap_or(text.len()))
    } else if text.starts_with("/*") {
        (Kind::Comment, block_comment(text))
    } else if text.starts_with('"') {
        (Kind::Literal, quoted(text, '"'))
    } else if let Some(length) = raw_string(text).filter(|_| !after_word) {
        (Kind::Literal, length)
    } else if let Some(length) = character(text) {
        (Kind::Literal, length)
    } else {
        (Kind::Code, first)
    }
}

/// Block comments nest in Rust.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

fn quoted(text: &str, end: char) -> usize {
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == end => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// `r"…"`, `r#"…"#`, and the same after `b` or `c`.
fn raw_string(text: &str) -> Option<usize> {
    let start = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('r')?;
    let inner = start.trim_start_matches('#');
    let hashes = start.len() - inner.len();
    let inner = inner.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = inner.find(&end).map_or(inner.len(), |at| at + end.len());
    Some(text.len() - inner.len() + length)
}

/// A character literal; a lifetime has no closing apostrophe where one would be.
fn character(text: &str) -> Option<usize> {
    let inner = text.strip_prefix('\'')?;
    if inner.starts_with('\\') {
        return Some(quoted(text, '\''));
    }
    let length = inner.chars().next()?.len_utf8();
    inner[length..].starts_with('\'').then_some(length + 2)
}

struct Function {
    name: String,
    line: usize,
    lines: usize,
}

/// Every function with a body, nested ones too.
fn functions(code: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let after_word = code[..at].ends_with(|last: char| last.is_alphanumeric() || last == '_');
        let rest = &code[at + 3..];
        let name: String = rest
            .chars()
            .take_while(|next| next.is_alphanumeric() || *next == '_')
            .collect();
        if after_word || name.is_empty() {
            continue;
        }
        if let Some(length) = body_end(rest) {
            found.push(Function {
                name,
                line: code[..at].matches('\n').count() + 1,
                lines: rest[..length].matches('\n').count() + 1,
            });
        }
    }
    found
}

/// Where the braces after a signature close; none for a declaration without a body.
fn body_end(signature: &str) -> Option<usize> {
    let (mut braces, mut brackets) = (0_usize, 0_usize);
    for (at, character) in signature.char_indices() {
        match character {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets = brackets.saturating_sub(1),
            ';' if braces == 0 && brackets == 0 => return None,
            '{' => braces += 1,
            '}' if braces == 1 => return Some(at),
            '}' => braces = braces.checked_sub(1)?,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{check, functions, mask};

    fn sentences(name: &str, text: &str) -> Vec<String> {
        check(Path::new(name), text).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_module_without_a_purpose_is_named() {
        let found = sentences("a/b.rs", "fn f() {}\n");
        assert_eq!(
            found,
            ["a/b.rs:1: start with `//!`: what the module is for and what it must not know"]
        );
    }

    #[test]
    fn a_file_over_the_limit_is_named_at_the_first_line_too_many() {
        let text = format!("//! x\n{}", "\n".repeat(600));
        assert_eq!(
            sentences("b.rs", &text),
            ["b.rs:601: 601 lines: split the file, 600 are the limit"]
        );
        assert!(sentences("b.rs", &text[..text.len() - 1]).is_empty());
    }

    #[test]
    fn a_function_over_the_limit_is_named_where_it_starts() {
        let body = "    x();\n".repeat(79);
        let text = format!("//! x\n\nfn long() {{\n{body}}}\n");
        assert_eq!(
            sentences("b.rs", &text),
            ["b.rs:3: fn long has 81 lines: split it, 80 are the limit"]
        );
        assert!(sentences("b.rs", &text.replacen("    x();\n", "", 1)).is_empty());
    }

    #[test]
    fn forbidden_words_count_in_code_and_comments_but_not_in_strings() {
        let text =
            "//! x\nconst A: &str = \"#[allow( TODO\"; // all of it\n#[allow(dead_code)]\nfn f() {} // TODO: more\n";
        let found = sentences("b.rs", text);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("b.rs:3:") && found[1].starts_with("b.rs:4:"));
    }

    #[test]
    fn who_holds_secrets_starts_no_programs_and_others_may() {
        for code in [
            "use std::process::Command;",
            "use std::process::{Child, Command, Stdio};",
            "use tokio::process::Command as C;",
            "fn f() { Command::new(\"sh\"); }",
            "fn f() { unsafe { libc::execve(a, b, c) }; }",
        ] {
            let text = format!("//! x\n{code}\n");
            for name in ["hypervisor/src/a/b.rs", "crates/broker/src/lib.rs"] {
                assert_eq!(sentences(name, &text).len(), 1, "{name}: {code}");
            }
            let may = [
                "crates/runtime/src/process.rs",
                "hypervisor/tests/a.rs",
                "sandbox/src/spawn.rs",
                "cli/src/a.rs",
            ];
            for name in may {
                assert!(sentences(name, &text).is_empty(), "{name}: {code}");
            }
        }
        let harmless = "//! x\n// Command::new(\nuse std::process::ExitCode;\n#[derive(Subcommand)]\nenum Command {}\n";
        assert!(sentences("hypervisor/src/main.rs", harmless).is_empty());
    }

    #[test]
    fn a_name_that_says_nothing_is_refused() {
        assert_eq!(sentences("src/utils/a.rs", "//! x\n").len(), 1);
        assert_eq!(sentences("src/helpers.rs", "//! x\n").len(), 1);
        assert!(sentences("src/utilities_of_rust.rs", "//! x\n").is_empty());
    }

    #[test]
    fn braces_in_literals_and_comments_do_not_count() {
        let text = "fn f<'a>(x: &'a str) {\n let a = '{'; let b = \"}\\\"}\"; /* { /* } */ */ let c = r#\"\"}\"#;\n // }\n}\nfn g() {}\n";
        let found = functions(&mask(text).code);
        let seen: Vec<_> = found.iter().map(|it| (it.name.as_str(), it.line, it.lines)).collect();
        assert_eq!(seen, [("f", 1, 4), ("g", 5, 1)]);
    }

    #[test]
    fn a_declaration_without_a_body_is_no_function() {
        let text = "trait T { fn a(&self, x: [u8; 3]); fn b() -> u8 { 1 } }\ntype F = fn (u8) -> u8;\n";
        let names: Vec<_> = functions(&mask(text).code).into_iter().map(|it| it.name).collect();
        assert_eq!(names, ["b"]);
    }

    #[test]
    fn masking_keeps_every_line_where_it_was() {
        let text = "a\n\"b\nc\" // d\né 'é' \n";
        let masked = mask(text);
        assert_eq!(masked.code.lines().count(), text.lines().count());
        assert_eq!(masked.comments.lines().nth(2).unwrap().trim(), "// d");
    }
}
