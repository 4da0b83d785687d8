//! What a devcontainer.json says that a release can keep. It must not read another file, nor run anything.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::dockerfile::Form;
use super::steps::{Action, CHOIR, HOME, Plan, Step, Values, argv, shell_line};

/// One that was read.
#[derive(Debug)]
pub struct Devcontainer {
    pub base: Base,
    pub name: Option<String>,
    env: Values,
    /// What is run once, under the name of its field.
    commands: Vec<(&'static str, Form)>,
    start: Option<String>,
    port: Option<u16>,
    /// Fields of no effect.
    ignored: Vec<String>,
}

/// What it begins with.
#[derive(Debug, PartialEq, Eq)]
pub enum Base {
    Named(String),
    Dockerfile(Build),
}

/// A Dockerfile; its paths begin where the devcontainer.json is.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Build {
    pub dockerfile: String,
    #[serde(default = "here")]
    pub context: String,
    #[serde(default)]
    pub args: Values,
}

fn here() -> String {
    ".".to_owned()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    image: Option<String>,
    build: Option<Build>,
    name: Option<String>,
    #[serde(default)]
    container_env: Values,
    #[serde(default)]
    remote_env: Values,
    on_create_command: Option<Commands>,
    update_content_command: Option<Commands>,
    post_create_command: Option<Commands>,
    post_start_command: Option<Commands>,
    #[serde(default)]
    forward_ports: Vec<Value>,
    #[serde(default)]
    features: BTreeMap<String, Value>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Commands {
    Line(String),
    Words(Vec<String>),
    Several(BTreeMap<String, Commands>),
}

impl Commands {
    fn forms(self) -> Vec<Form> {
        match self {
            Self::Line(line) => vec![Form::Line(line)],
            Self::Words(words) => vec![Form::Words(words)],
            Self::Several(all) => all.into_values().flat_map(Self::forms).collect(),
        }
    }
}

impl Devcontainer {
    /// Reads it; `file` is for messages.
    pub fn parse(file: &str, text: &str) -> Result<Self, String> {
        let written: Written =
            jsonc_parser::parse_to_serde_value(text, &Default::default()).map_err(|e| format!("{file}: {e}"))?;
        if !written.features.is_empty() {
            return Err(format!(
                "{file}: `features` are not supported; install what they would in a Dockerfile, and name it in `build`"
            ));
        }
        let base = match (written.build, written.image) {
            (Some(build), _) => Base::Dockerfile(build),
            (None, Some(image)) => Base::Named(image),
            (None, None) => {
                return Err(format!(
                    "{file}: there is neither `image` nor `build`; say what to start from"
                ));
            }
        };
        let mut env = written.container_env;
        env.extend(written.remote_env);
        if let Some((name, _)) = env.iter().find(|(_, value)| value.contains("${")) {
            return Err(format!(
                "{file}: the value of {name} has a variable in it; write the value itself"
            ));
        }
        let mut commands = Vec::new();
        for (field, given) in [
            ("onCreateCommand", written.on_create_command),
            ("updateContentCommand", written.update_content_command),
            ("postCreateCommand", written.post_create_command),
        ] {
            commands.extend(given.into_iter().flat_map(Commands::forms).map(|form| (field, form)));
        }
        let starts = written.post_start_command.map(Commands::forms).unwrap_or_default();
        let start = match &starts[..] {
            [] => None,
            [Form::Line(line)] => Some(line.clone()),
            [Form::Words(words)] => Some(shell_line(words)),
            _ => {
                return Err(format!(
                    "{file}: `postStartCommand` has several commands; write one that starts them"
                ));
            }
        };
        if starts.iter().chain(commands.iter().map(|(_, form)| form)).any(is_empty) {
            return Err(format!("{file}: a command is an empty list; take it out"));
        }
        let port = written.forward_ports.first().and_then(Value::as_u64);
        Ok(Self {
            base,
            name: written.name,
            env,
            commands,
            start,
            port: port.and_then(|port| u16::try_from(port).ok()),
            ignored: written.others.into_keys().filter(|name| name != "$schema").collect(),
        })
    }

    /// Puts what it says on top of its base's plan.
    pub fn extend(self, plan: &mut Plan, file: &str) {
        plan.config.env.extend(self.env);
        for (field, form) in self.commands {
            let shown = match &form {
                Form::Line(line) => line.clone(),
                Form::Words(words) => words.join(" "),
            };
            plan.steps.push(Step {
                at: file.to_owned(),
                text: format!("{field} {shown}"),
                action: Action::Run {
                    argv: argv(&form),
                    user: CHOIR.to_owned(),
                    directory: HOME.to_owned(),
                    env: plan.config.env.clone(),
                },
            });
        }
        if plan.config.start.is_none() {
            plan.config.start = self.start;
        }
        plan.config.app_port = self.port.or(plan.config.app_port);
        if !self.ignored.is_empty() {
            plan.notes
                .push(format!("{file}: of no effect here: {}", self.ignored.join(", ")));
        }
    }
}

fn is_empty(form: &Form) -> bool {
    matches!(form, Form::Words(words) if words.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Devcontainer, String> {
        Devcontainer::parse("devcontainer.json", text)
    }

    #[test]
    fn comments_and_trailing_commas_are_read_over() {
        let text = r#"{
            // A name.
            "name": "blog", "image": "default", /* where */ "forwardPorts": [5173, "db:5432",],
            "containerEnv": {"A": "1"}, "remoteEnv": {"B": "2"},
            "customizations": {"vscode": {}},
            "onCreateCommand": "one && two", "postCreateCommand": {"b": ["four", "4"], "a": "three"},
            "postStartCommand": ["npm", "run dev"],
        }"#;
        let read = read(text).unwrap();
        assert_eq!(
            (&read.base, read.name.as_deref()),
            (&Base::Named("default".to_owned()), Some("blog"))
        );
        let mut plan = Plan::default();
        read.extend(&mut plan, "devcontainer.json");
        let texts: Vec<_> = plan.steps.iter().map(|step| step.text.as_str()).collect();
        assert_eq!(
            texts,
            [
                "onCreateCommand one && two",
                "postCreateCommand three",
                "postCreateCommand four 4"
            ]
        );
        assert_eq!(plan.config.app_port, Some(5173));
        assert_eq!(plan.config.start.as_deref(), Some("exec npm 'run dev'"));
        assert_eq!(plan.config.env.len(), 2);
        assert_eq!(plan.notes, ["devcontainer.json: of no effect here: customizations"]);
    }

    #[test]
    fn a_build_has_a_dockerfile_a_context_and_arguments() {
        let text = r#"{"build": {"dockerfile": "Dockerfile", "args": {"V": "3"}}}"#;
        let build = Build {
            dockerfile: "Dockerfile".to_owned(),
            context: ".".to_owned(),
            args: [("V".to_owned(), "3".to_owned())].into(),
        };
        assert_eq!(read(text).unwrap().base, Base::Dockerfile(build));
    }

    #[test]
    fn a_start_of_the_dockerfile_stays() {
        let mut plan = Plan::default();
        plan.config.start = Some("exec own".to_owned());
        let text = r#"{"image": "a", "postStartCommand": "other"}"#;
        read(text).unwrap().extend(&mut plan, "devcontainer.json");
        assert_eq!(plan.config.start.as_deref(), Some("exec own"));
    }

    #[test]
    fn what_a_release_cannot_keep_is_refused_by_name() {
        for (bad, told) in [
            (r#"{"name": "a"}"#, "neither `image` nor `build`"),
            (r#"{"image": "a", "features": {"ghcr.io/x": {}}}"#, "`features`"),
            (
                r#"{"image": "a", "remoteEnv": {"T": "${localEnv:T}"}}"#,
                "the value of T",
            ),
            (
                r#"{"image": "a", "postStartCommand": {"a": "b", "c": "d"}}"#,
                "`postStartCommand`",
            ),
            (r#"{"image": "a", "postCreateCommand": []}"#, "empty list"),
            (r#"{"image": 1}"#, "devcontainer.json"),
        ] {
            let error = read(bad).unwrap_err();
            assert!(
                error.starts_with("devcontainer.json: ") && error.contains(told),
                "{error}"
            );
        }
        assert!(read(r#"{"image": "a", "features": {}}"#).is_ok());
    }
}
