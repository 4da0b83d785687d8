//! The instructions of a Dockerfile, each with its line. It must not know what any variable is, nor run anything.

/// One build stage.
#[derive(Debug)]
pub struct Dockerfile {
    /// As messages name it.
    name: String,
    pub instructions: Vec<Instruction>,
}

/// One of them.
#[derive(Debug)]
pub struct Instruction {
    pub line: usize,
    /// As it was written, on one line.
    pub text: String,
    pub kind: Kind,
}

/// What it asks for; variables are still in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    From(String),
    Arg(String),
    Env(String),
    Workdir(String),
    User(String),
    Run(Form),
    Copy(CopyFiles),
    Expose(String),
    Cmd(Form),
    Entrypoint(Form),
    /// It says nothing that a release could keep.
    Ignored(String),
}

/// How a command is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    Line(String),
    /// A JSON array.
    Words(Vec<String>),
}

/// `COPY` or `ADD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyFiles {
    /// Sources and the destination.
    pub paths: Form,
    pub owner: Option<String>,
    pub mode: Option<String>,
    /// Whether it is `ADD`, which would unpack archives.
    pub adds: bool,
}

impl Dockerfile {
    /// Reads it; `name` is for messages.
    pub fn parse(name: &str, text: &str) -> Result<Self, String> {
        let mut file = Self {
            name: name.to_owned(),
            instructions: Vec::new(),
        };
        if let Some(line) = escape_directive(text) {
            return Err(file.wrong(line, "`escape` cannot be changed; continue lines with a backslash"));
        }
        let mut based = false;
        for (line, text) in logical_lines(text) {
            let kind = instruction(&text).map_err(|why| file.wrong(line, &why))?;
            match kind {
                Kind::From(_) if based => return Err(file.wrong(line, ONE_STAGE)),
                Kind::From(_) => based = true,
                Kind::Arg(_) => {}
                _ if !based => return Err(file.wrong(line, "a Dockerfile begins with FROM; write it above this line")),
                _ => {}
            }
            file.instructions.push(Instruction { line, text, kind });
        }
        if based {
            Ok(file)
        } else {
            Err(format!("{name} has no FROM; say in its first line what to start from"))
        }
    }

    /// Where a line is.
    pub fn at(&self, line: usize) -> String {
        format!("{}:{line}", self.name)
    }

    pub fn wrong(&self, line: usize, why: &str) -> String {
        format!("{}: {why}", self.at(line))
    }
}

const ONE_STAGE: &str = "only one stage can be built; put the steps of all stages into one, or build the first stage as a \
                         release and start FROM it";

/// The line of `# escape=`, which counts only above everything else.
fn escape_directive(text: &str) -> Option<usize> {
    for (n, line) in text.lines().enumerate() {
        let (key, _) = line
            .trim_start_matches('\u{feff}')
            .trim()
            .strip_prefix('#')?
            .split_once('=')?;
        if key.trim().eq_ignore_ascii_case("escape") {
            return Some(n + 1);
        }
    }
    None
}

/// Lines with those that continue them, without comments, and where each begins.
fn logical_lines(text: &str) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (n, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let line = line.trim_end();
        if line.is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        let (begun, so_far) = open.take().unwrap_or((n + 1, String::new()));
        match line.strip_suffix('\\').filter(|part| !part.ends_with('\\')) {
            Some(part) => open = Some((begun, so_far + part)),
            None => all.push((begun, so_far + line)),
        }
    }
    all.extend(open);
    let trimmed = |(line, text): (usize, String)| (line, text.trim().to_owned());
    all.into_iter()
        .map(trimmed)
        .filter(|(_, text)| !text.is_empty())
        .collect()
}

fn instruction(text: &str) -> Result<Kind, String> {
    let (keyword, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let (keyword, rest) = (keyword.to_ascii_uppercase(), rest.trim());
    if rest.is_empty() {
        return Err(format!("{keyword} says nothing; write its value behind it"));
    }
    let own = rest.to_owned();
    match keyword.as_str() {
        "FROM" => from(rest).map(Kind::From),
        "ARG" => Ok(Kind::Arg(own)),
        "ENV" => Ok(Kind::Env(own)),
        "WORKDIR" => Ok(Kind::Workdir(own)),
        "USER" => Ok(Kind::User(own)),
        "RUN" => run(rest).map(Kind::Run),
        "COPY" | "ADD" => copy(rest, &keyword).map(Kind::Copy),
        "EXPOSE" => Ok(Kind::Expose(own)),
        "CMD" => Ok(Kind::Cmd(form(rest))),
        "ENTRYPOINT" => Ok(Kind::Entrypoint(form(rest))),
        "LABEL" | "MAINTAINER" | "STOPSIGNAL" | "VOLUME" => Ok(Kind::Ignored(keyword)),
        "HEALTHCHECK" => Err("HEALTHCHECK is not supported; take it out, and give the release a `health`".to_owned()),
        "SHELL" => {
            Err("SHELL is not supported; name the shell in RUN, such as RUN [\"bash\", \"-c\", \"…\"]".to_owned())
        }
        "ONBUILD" => Err("ONBUILD is not supported; write the instruction where it is to happen".to_owned()),
        _ => Err(format!("{keyword} is no instruction of a Dockerfile; correct it")),
    }
}

/// The base. A stage's name is of no use where there is one stage.
fn from(rest: &str) -> Result<String, String> {
    if rest.starts_with("--") {
        return Err("FROM has no options here, as a release fits its box; leave them out".to_owned());
    }
    let words: Vec<&str> = rest.split_whitespace().collect();
    match words[..] {
        [base] => Ok(base.to_owned()),
        [base, between, _] if between.eq_ignore_ascii_case("as") => Ok(base.to_owned()),
        _ => Err("FROM names one base; write it as FROM NAME".to_owned()),
    }
}

fn run(rest: &str) -> Result<Form, String> {
    if let Some((flag, _)) = flag(rest) {
        return Err(format!("RUN --{flag} is not supported; leave the option out"));
    }
    no_heredoc(rest)?;
    Ok(form(rest))
}

fn copy(rest: &str, keyword: &str) -> Result<CopyFiles, String> {
    let (mut owner, mut mode, mut rest) = (None, None, rest);
    while let Some((given, behind)) = flag(rest) {
        match given.split_once('=') {
            Some(("chown", value)) => owner = Some(value.to_owned()),
            Some(("chmod", value)) => mode = Some(value.to_owned()),
            Some(("from", _)) => return Err(format!("{keyword} --from needs a second stage, but {ONE_STAGE}")),
            // It changes how Docker keeps layers, and there are none here.
            None if given == "link" => {}
            _ => return Err(format!("{keyword} --{given} is not supported; leave the option out")),
        }
        rest = behind;
    }
    no_heredoc(rest)?;
    Ok(CopyFiles {
        paths: form(rest),
        owner,
        mode,
        adds: keyword == "ADD",
    })
}

/// An option at the beginning without its hyphens, and what is behind it.
fn flag(rest: &str) -> Option<(&str, &str)> {
    let (flag, behind) = rest.strip_prefix("--")?.split_once(char::is_whitespace)?;
    Some((flag, behind.trim_start()))
}

fn no_heredoc(rest: &str) -> Result<(), String> {
    let begins = |(at, _): (usize, &str)| {
        let word = rest[at + 2..].trim_start_matches('-').trim_start_matches(['\'', '"']);
        !rest[..at].ends_with('<') && word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
    };
    if rest.match_indices("<<").any(begins) {
        return Err(
            "a here-document is not supported; join the lines with && and a backslash, or COPY a file".to_owned(),
        );
    }
    Ok(())
}

fn form(rest: &str) -> Form {
    match serde_json::from_str::<Vec<String>>(rest) {
        Ok(words) if !words.is_empty() => Form::Words(words),
        _ => Form::Line(rest.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<(usize, Kind)>, String> {
        let file = Dockerfile::parse("Dockerfile", text)?;
        Ok(file.instructions.into_iter().map(|i| (i.line, i.kind)).collect())
    }

    #[test]
    fn lines_go_on_after_a_backslash_and_comments_between_them_are_left_out() {
        let text =
            "# syntax=docker/dockerfile:1\n\nFROM a as b\nrun one \\\n  # why\n\n  && two \\  \n  three\nUSER x\n";
        let line = |text: &str| Form::Line(text.to_owned());
        assert_eq!(
            parsed(text).unwrap(),
            [
                (3, Kind::From("a".to_owned())),
                (4, Kind::Run(line("one   && two   three"))),
                (9, Kind::User("x".to_owned())),
            ]
        );
    }

    #[test]
    fn an_array_is_words_and_anything_else_a_line() {
        let words = Form::Words(vec!["a".to_owned(), "b c".to_owned()]);
        let all = parsed("FROM a\nRUN [\"a\", \"b c\"]\nCMD [ -f x ]\n").unwrap();
        assert_eq!(all[1].1, Kind::Run(words));
        assert_eq!(all[2].1, Kind::Cmd(Form::Line("[ -f x ]".to_owned())));
    }

    #[test]
    fn options_of_copy_are_read() {
        let all = parsed("FROM a\nADD --chown=a:b --link --chmod=755 x y /z/\n").unwrap();
        let copy = CopyFiles {
            paths: Form::Line("x y /z/".to_owned()),
            owner: Some("a:b".to_owned()),
            mode: Some("755".to_owned()),
            adds: true,
        };
        assert_eq!(all[1].1, Kind::Copy(copy));
    }

    #[test]
    fn what_cannot_be_built_is_refused_with_its_line() {
        for (line, told) in [
            ("FROM b", "only one stage"),
            ("COPY --from=b /x /y", "only one stage"),
            ("RUN --mount=type=cache,target=/x y", "--mount"),
            ("RUN cat <<EOF > /x", "here-document"),
            ("COPY <<-'EOF' /x", "here-document"),
            ("HEALTHCHECK NONE", "HEALTHCHECK"),
            ("SHELL [\"bash\"]", "SHELL"),
            ("ONBUILD RUN x", "ONBUILD"),
            ("RUM x", "RUM is no instruction"),
            ("ENV", "says nothing"),
        ] {
            let error = parsed(&format!("FROM a\n{line}\n")).unwrap_err();
            assert!(error.starts_with("Dockerfile:2: ") && error.contains(told), "{error}");
        }
        for shell in ["RUN cat <<< x", "RUN echo $((1<<2))"] {
            assert!(parsed(&format!("FROM a\n{shell}\n")).is_ok(), "{shell}");
        }
    }

    #[test]
    fn a_file_begins_with_its_base_and_its_own_way_to_continue_lines_is_refused() {
        assert!(parsed("RUN x\n").unwrap_err().contains("begins with FROM"));
        assert!(parsed("ARG X=1\n").unwrap_err().contains("has no FROM"));
        let error = parsed("# syntax=x\n# escape=`\nFROM a\n").unwrap_err();
        assert!(error.starts_with("Dockerfile:2: `escape`"), "{error}");
        assert!(parsed("FROM a\n# escape=`\n").is_ok());
    }
}
