//! From instructions to steps in a sandbox and the configuration of what they make, with every variable put in. It must
//! not read a file or call anybody.

use std::collections::BTreeMap;

use choir_core::ReleaseConfig;
use choir_core::host::{AGENT_PORT, RESERVED_PORTS};

use super::dockerfile::{CopyFiles, Dockerfile, Form, Kind};
use super::words::{is_name, quoted, split, whole};

/// Values by name.
pub type Values = BTreeMap<String, String>;

/// Where a sandbox's home is, which belongs to the slot and is in no release.
pub const HOME: &str = "/home/choir";
/// Whose it is.
pub const CHOIR: &str = "choir";
/// Where programs are searched where nobody says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One thing to do.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it was asked for.
    pub at: String,
    pub text: String,
    pub action: Action,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    Run {
        argv: Vec<String>,
        user: String,
        /// Absolute.
        directory: String,
        env: Values,
    },
    Copy {
        sources: Vec<String>,
        /// Absolute.
        destination: String,
        /// Whether the destination is a directory in any case.
        into: bool,
        /// As `chown` takes it.
        owner: String,
        mode: Option<String>,
    },
}

/// All of it.
#[derive(Debug, Default)]
pub struct Plan {
    pub steps: Vec<Step>,
    pub config: ReleaseConfig,
    /// Sentences about what is otherwise than one might expect.
    pub notes: Vec<String>,
}

/// What a line of a shell is as a program and its arguments.
pub fn argv(form: &Form) -> Vec<String> {
    match form {
        Form::Line(line) => vec!["/bin/sh".to_owned(), "-c".to_owned(), line.clone()],
        Form::Words(words) => words.clone(),
    }
}

/// The base that a Dockerfile names, and where; `given` are values for its `ARG`s.
pub fn base(file: &Dockerfile, given: &Values) -> Result<(String, String), String> {
    let args = first_args(file, given)?;
    for instruction in &file.instructions {
        if let Kind::From(text) = &instruction.kind {
            let named = whole(text, &|name| args.get(name).cloned());
            return match named {
                Ok(base) if !base.is_empty() => Ok((file.at(instruction.line), base)),
                Ok(_) => Err(file.wrong(instruction.line, "FROM names nothing; give its ARG a value with --arg")),
                Err(why) => Err(file.wrong(instruction.line, &why)),
            };
        }
    }
    Ok((file.at(1), String::new()))
}

/// The values of the `ARG`s above FROM.
fn first_args(file: &Dockerfile, given: &Values) -> Result<Values, String> {
    let mut args = Values::new();
    for instruction in &file.instructions {
        match &instruction.kind {
            Kind::Arg(text) => {
                let declared = declared(text, &args).map_err(|why| file.wrong(instruction.line, &why))?;
                for (name, default) in declared {
                    if let Some(value) = given.get(&name).cloned().or(default) {
                        args.insert(name, value);
                    }
                }
            }
            _ => break,
        }
    }
    Ok(args)
}

/// What one `ARG` names, with its defaults.
fn declared(text: &str, values: &Values) -> Result<Vec<(String, Option<String>)>, String> {
    let mut all = Vec::new();
    for word in split(text, &|name| values.get(name).cloned())? {
        let (name, default) = match word.split_once('=') {
            Some((name, default)) => (name.to_owned(), Some(default.to_owned())),
            None => (word, None),
        };
        if !is_name(&name) {
            return Err(format!("{name:?} is no variable's name; use letters, digits and _"));
        }
        all.push((name, default));
    }
    Ok(all)
}

/// The steps of a Dockerfile on a base that is run like this.
pub fn plan(file: &Dockerfile, given: &Values, base: &ReleaseConfig) -> Result<Plan, String> {
    let above = first_args(file, given)?;
    let mut planner = Planner {
        given,
        known: above.keys().cloned().collect(),
        above,
        args: Values::new(),
        user: "root".to_owned(),
        directory: None,
        entrypoint: None,
        command: None,
        port: None,
        plan: Plan {
            config: base.clone(),
            ..Plan::default()
        },
    };
    let begun = file.instructions.iter().position(|i| matches!(i.kind, Kind::From(_)));
    for instruction in file.instructions.iter().skip(begun.map_or(0, |at| at + 1)) {
        let at = file.at(instruction.line);
        let done = planner.take(&at, &instruction.text, &instruction.kind);
        done.map_err(|why| format!("{at}: {why}"))?;
    }
    let unknown = given.keys().find(|name| !planner.known.contains(name));
    match unknown {
        Some(name) => Err(format!(
            "--arg {name} belongs to no ARG of the Dockerfile; correct the name"
        )),
        None => Ok(planner.finish()),
    }
}

struct Planner<'a> {
    given: &'a Values,
    /// Above FROM.
    above: Values,
    /// Every `ARG`.
    known: Vec<String>,
    args: Values,
    user: String,
    directory: Option<String>,
    entrypoint: Option<Form>,
    command: Option<Form>,
    port: Option<u16>,
    plan: Plan,
}

impl Planner<'_> {
    fn take(&mut self, at: &str, text: &str, kind: &Kind) -> Result<(), String> {
        match kind {
            Kind::From(_) => {}
            Kind::Arg(text) => self.arg(text)?,
            Kind::Env(text) => self.env(text)?,
            Kind::Workdir(path) => {
                let directory = absolute(self.place(), &self.whole(path)?);
                if directory != HOME {
                    kept(&directory)?;
                    let mkdir = ["mkdir", "-p", "--", directory.as_str()].map(str::to_owned).to_vec();
                    self.run(at, text, mkdir, "root", "/");
                }
                self.directory = Some(directory);
            }
            Kind::User(name) => self.user = user(&self.whole(name)?)?,
            Kind::Run(form) => {
                let (user, directory) = (self.user.clone(), self.place().to_owned());
                self.run(at, text, argv(form), &user, &directory);
            }
            Kind::Copy(copy) => {
                let action = self.copy(copy)?;
                self.step(at, text, action);
            }
            Kind::Expose(ports) => self.expose(at, ports)?,
            Kind::Cmd(form) => self.command = Some(form.clone()),
            Kind::Entrypoint(form) => self.entrypoint = Some(form.clone()),
            Kind::Ignored(keyword) => self.plan.notes.push(format!("{at}: {keyword} is of no effect here")),
        }
        Ok(())
    }

    fn step(&mut self, at: &str, text: &str, action: Action) {
        self.plan.steps.push(Step {
            at: at.to_owned(),
            text: text.to_owned(),
            action,
        });
    }

    fn run(&mut self, at: &str, text: &str, argv: Vec<String>, user: &str, directory: &str) {
        let mut env = self.args.clone();
        env.extend(self.plan.config.env.clone());
        let action = Action::Run {
            argv,
            user: user.to_owned(),
            directory: directory.to_owned(),
            env,
        };
        self.step(at, text, action);
    }

    /// Where relative paths begin.
    fn place(&self) -> &str {
        self.directory.as_deref().unwrap_or("/")
    }

    fn variable(&self, name: &str) -> Option<String> {
        let set = self.plan.config.env.get(name).or_else(|| self.args.get(name));
        set.cloned().or_else(|| (name == "PATH").then(|| PATH.to_owned()))
    }

    fn whole(&self, text: &str) -> Result<String, String> {
        whole(text, &|name| self.variable(name))
    }

    fn split(&self, text: &str) -> Result<Vec<String>, String> {
        split(text, &|name| self.variable(name))
    }

    fn arg(&mut self, text: &str) -> Result<(), String> {
        let mut visible = self.args.clone();
        visible.extend(self.plan.config.env.clone());
        for (name, default) in declared(text, &visible)? {
            let value = self.given.get(&name).cloned().or(default);
            if let Some(value) = value.or_else(|| self.above.get(&name).cloned()) {
                self.args.insert(name.clone(), value);
            }
            self.known.push(name);
        }
        Ok(())
    }

    fn env(&mut self, text: &str) -> Result<(), String> {
        let first = text.split_whitespace().next().unwrap_or_default();
        let pairs = if first.contains('=') {
            let pair = |word: String| match word.split_once('=') {
                Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
                None => Err(format!(
                    "{word:?} has no value; write it as NAME=VALUE, and quote values with spaces"
                )),
            };
            self.split(text)?.into_iter().map(pair).collect::<Result<Vec<_>, _>>()?
        } else {
            let (name, value) = text
                .split_once(char::is_whitespace)
                .ok_or_else(|| format!("{text:?} has no value; write it as NAME=VALUE"))?;
            vec![(name.to_owned(), self.whole(value.trim_start())?)]
        };
        self.plan.config.env.extend(pairs);
        choir_core::settings::validate_env(&self.plan.config.env).map_err(|e| e.to_string())
    }

    fn copy(&self, copy: &CopyFiles) -> Result<Action, String> {
        let mut paths = match &copy.paths {
            Form::Line(line) => self.split(line)?,
            Form::Words(words) => words
                .iter()
                .map(|word| self.whole(word))
                .collect::<Result<Vec<_>, _>>()?,
        };
        let destination = paths.pop().filter(|_| !paths.is_empty());
        let given = destination.ok_or("name what to copy, and where to")?;
        for source in paths.iter().filter(|_| copy.adds) {
            if source.contains("://") || source.starts_with("git@") {
                return Err(format!(
                    "ADD of {source} is not supported; fetch it in a RUN, with curl for example"
                ));
            }
            if ARCHIVES.iter().any(|ending| source.ends_with(ending)) {
                return Err(format!("ADD would unpack {source}; COPY it and unpack it in a RUN"));
            }
        }
        let into = paths.len() > 1 || given.ends_with('/') || given.ends_with("/.") || given == ".";
        let destination = absolute(self.place(), &given);
        kept(&destination)?;
        let owner = copy.owner.as_deref().map(|owner| self.whole(owner)).transpose()?;
        let mode = copy.mode.as_deref().map(|mode| self.whole(mode)).transpose()?;
        let octal = |mode: &String| (3..=4).contains(&mode.len()) && mode.bytes().all(|b| (b'0'..=b'7').contains(&b));
        if let Some(mode) = mode.as_ref().filter(|mode| !octal(mode)) {
            return Err(format!(
                "--chmod={mode} is no mode; write it as three or four digits such as 755"
            ));
        }
        Ok(Action::Copy {
            sources: paths,
            destination,
            into,
            owner: owner.map_or_else(|| Ok("0:0".to_owned()), |owner| chown(&owner))?,
            mode,
        })
    }

    fn expose(&mut self, at: &str, ports: &str) -> Result<(), String> {
        for written in self.split(ports)? {
            let (port, protocol) = written.split_once('/').unwrap_or((written.as_str(), "tcp"));
            let first = port.split('-').next().unwrap_or_default();
            let first: u16 = first
                .parse()
                .map_err(|_| format!("{written:?} is no port; write a number such as 3000"))?;
            if first == 0 || first == AGENT_PORT || RESERVED_PORTS.contains(&first) {
                let note = format!(
                    "{at}: port {first} belongs to ChoirOS, so it is not the app's; have the app listen on another"
                );
                self.plan.notes.push(note);
            } else if protocol == "tcp" {
                self.port.get_or_insert(first);
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Plan {
        if let Some(line) = start(self.entrypoint.as_ref(), self.command.as_ref()) {
            let enter = self.directory.map(|directory| format!("cd {} && ", quoted(&directory)));
            self.plan.config.start = Some(enter.unwrap_or_default() + &line);
            if self.user != CHOIR {
                let note = format!("what the release starts runs as {CHOIR}, not as {}", self.user);
                self.plan.notes.push(note);
            }
        }
        self.plan.config.app_port = self.port.or(self.plan.config.app_port);
        self.plan
    }
}

/// What `ADD` unpacks.
const ARCHIVES: [&str; 8] = [
    ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst",
];

/// The shell line of an entry point and what follows it. The shell makes way for the program.
fn start(entrypoint: Option<&Form>, command: Option<&Form>) -> Option<String> {
    let words = match (entrypoint, command) {
        // A shell's line takes no arguments.
        (Some(line @ Form::Line(_)), _) => argv(line),
        (Some(Form::Words(words)), command) => [words.clone(), command.map(argv).unwrap_or_default()].concat(),
        (None, command) => argv(command?),
    };
    Some(shell_line(&words))
}

/// A program and its arguments as a shell's last command.
pub fn shell_line(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    format!("exec {}", words.join(" "))
}

/// A path from a directory on, without `.` and `..`.
fn absolute(directory: &str, path: &str) -> String {
    let from = if path.starts_with('/') { "" } else { directory };
    let mut parts = Vec::new();
    for part in from.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Refuses what a release would not hold.
fn kept(path: &str) -> Result<(), String> {
    for lost in [HOME, "/run"] {
        if path == lost || path.starts_with(&format!("{lost}/")) {
            return Err(format!(
                "{path} is in no release, as {lost} is each sandbox's own; use another place such as /srv"
            ));
        }
    }
    Ok(())
}

/// Who runs what follows.
fn user(text: &str) -> Result<String, String> {
    match text {
        "0" | "root" => Ok("root".to_owned()),
        _ if text.contains(':') => Err(format!("USER {text} names a group; name the user alone")),
        _ if !text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') => {
            Err(format!("USER {text:?} is no name; name a user that a RUN has made"))
        }
        _ => Ok(text.to_owned()),
    }
}

/// An owner in full: a number's group is the same number, a name's the one that the system knows.
fn chown(owner: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.-:".contains(c);
    if owner.is_empty() || owner.starts_with(['-', ':']) || !owner.chars().all(plain) {
        return Err(format!("--chown={owner} is no owner; write it as USER or USER:GROUP"));
    }
    Ok(match owner.contains(':') {
        true => owner.to_owned(),
        false if owner.bytes().all(|b| b.is_ascii_digit()) => format!("{owner}:{owner}"),
        false => format!("{owner}:"),
    })
}

#[cfg(test)]
mod tests;
