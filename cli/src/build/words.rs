//! Words of a Dockerfile: quotes, backslashes and variables, as Docker reads them. It must not know any instruction.

use std::iter::Peekable;
use std::str::Chars;

/// What a variable is, where it is set.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The words between spaces that are not quoted.
pub fn split(text: &str, variables: Variables<'_>) -> Result<Vec<String>, String> {
    read(text, variables, true)
}

/// The text as one word.
pub fn whole(text: &str, variables: Variables<'_>) -> Result<String, String> {
    Ok(read(text, variables, false)?.concat())
}

/// One word that a shell reads as this text.
pub fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Whether a shell takes it as a variable's name.
pub fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    first && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn read(text: &str, variables: Variables<'_>, splits: bool) -> Result<Vec<String>, String> {
    let mut reader = Reader {
        rest: text.chars().peekable(),
        variables,
    };
    let (mut words, mut quote) = (Vec::new(), None);
    let mut word: Option<String> = None;
    while let Some(c) = reader.rest.next() {
        if quote.is_none() && splits && c.is_whitespace() {
            words.extend(word.take());
            continue;
        }
        let word = word.get_or_insert_default();
        match (c, quote) {
            ('\'' | '"', None) => quote = Some(c),
            (_, Some(open)) if c == open => quote = None,
            ('\\', None) => word.push(reader.rest.next().unwrap_or(c)),
            ('\\', Some('"')) => match reader.rest.next_if(|next| matches!(next, '"' | '$' | '\\')) {
                Some(next) => word.push(next),
                None => word.push(c),
            },
            ('$', None | Some('"')) => word.push_str(&reader.variable()?),
            _ => word.push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed; close it, or put a backslash before it".to_owned());
    }
    words.extend(word);
    Ok(words)
}

struct Reader<'a> {
    rest: Peekable<Chars<'a>>,
    variables: Variables<'a>,
}

impl Reader<'_> {
    /// What follows a dollar sign.
    fn variable(&mut self) -> Result<String, String> {
        if self.rest.next_if_eq(&'{').is_none() {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok((self.variables)(&name).unwrap_or_default());
        }
        let name = self.name();
        let inside = self.inside()?;
        let (or_empty, rest) = match inside.strip_prefix(':') {
            Some(rest) => (true, rest),
            None => (false, inside.as_str()),
        };
        let value = (self.variables)(&name).filter(|value| !(or_empty && value.is_empty()));
        if is_name(&name) {
            if inside.is_empty() {
                return Ok(value.unwrap_or_default());
            }
            if let Some(default) = rest.strip_prefix('-') {
                return value.map_or_else(|| whole(default, self.variables), Ok);
            }
            if let Some(alternative) = rest.strip_prefix('+') {
                return value.map_or(Ok(String::new()), |_| whole(alternative, self.variables));
            }
        }
        Err(format!(
            "${{{name}{inside}}} cannot be read; write ${{NAME}}, ${{NAME:-default}} or ${{NAME:+instead}}"
        ))
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self
            .rest
            .next_if(|c| c.is_ascii_alphabetic() || *c == '_' || (!name.is_empty() && c.is_ascii_digit()))
        {
            name.push(c);
        }
        name
    }

    /// Up to the brace that closes it.
    fn inside(&mut self) -> Result<String, String> {
        let (mut inside, mut depth) = (String::new(), 1);
        for c in self.rest.by_ref() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Ok(inside);
            }
            inside.push(c);
        }
        Err("a brace is not closed; write ${NAME}".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(name: &str) -> Option<String> {
        match name {
            "A" => Some("one two".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[test]
    fn variables_are_put_in_with_their_defaults_and_alternatives() {
        for (text, read) in [
            ("$A/x", "one two/x"),
            ("${A}b", "one twob"),
            ("${NO:-${A}!}", "one two!"),
            ("${EMPTY:-x}${EMPTY-y}", "x"),
            ("${A:+yes}${NO:+no}${EMPTY+set}", "yesset"),
            (r"\$A '$A' $", "$A $A $"),
            (r#""\"$A" $NO."#, "\"one two ."),
        ] {
            assert_eq!(whole(text, &variables).unwrap(), read, "{text}");
        }
    }

    #[test]
    fn only_spaces_outside_of_quotes_and_values_separate_words() {
        let words = split(r#"K="a b" L=c\ d  $A '' "#, &variables).unwrap();
        assert_eq!(words, ["K=a b", "L=c d", "one two", ""]);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for bad in ["'a", "\"a", "${A", "${A#x}", "${1}", "${}"] {
            assert!(whole(bad, &variables).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_quoted_word_is_one_word_of_a_shell() {
        assert_eq!(quoted("a/b-c.d"), "a/b-c.d");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }
}
