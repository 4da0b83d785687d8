//! `choir.toml`: what the home of a sandbox itself says about how to run it. It wins over what is set on the workspace,
//! which wins over the release. The sandbox wrote it, so it is believed in what concerns only the sandbox, and can ask for
//! less of the box, never for more. It must not know how the file comes here.

use std::collections::BTreeMap;

use crate::limits::Limits;
use crate::settings::ReleaseConfig;

/// The file's name, in the home.
pub const FILE: &str = "choir.toml";
/// Its longest, in bytes: it travels in one message with everything else an agent says of itself.
pub const MOST_BYTES: usize = 16 << 10;

const MOST_REASON: usize = 400;

/// What a generation found in its home when it started.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Own {
    /// There is no such file.
    #[default]
    Silent,
    Says(ReleaseConfig),
    /// Nothing of it is in effect, for this reason.
    Refused(String),
}

impl Own {
    /// Judges the file's text, or why it could not be read.
    pub fn of(file: Option<Result<String, String>>) -> Self {
        let text = match file {
            None => return Self::Silent,
            Some(Err(reason)) => return Self::Refused(plain(&reason)),
            Some(Ok(text)) => text,
        };
        match read(&text) {
            Ok(config) => Self::Says(config),
            Err(reason) => Self::Refused(plain(&reason)),
        }
    }

    /// What it says, where it is in effect.
    pub fn config(&self) -> Option<&ReleaseConfig> {
        match self {
            Self::Says(config) => Some(config),
            Self::Silent | Self::Refused(_) => None,
        }
    }

    /// Why it is not in effect.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused(reason) => Some(reason),
            Self::Silent | Self::Says(_) => None,
        }
    }

    /// What a release says with this on top, but for limits, which are not raised here.
    pub fn over(&self, release: &ReleaseConfig) -> ReleaseConfig {
        let mut all = release.clone();
        let Some(own) = self.config() else {
            return all;
        };
        all.env.extend(own.env.clone());
        all.services.extend(own.services.clone());
        all.start = own.start.clone().or(all.start);
        all.app_port = own.app_port.or(all.app_port);
        all.health = own.health.clone().or(all.health);
        all
    }

    /// Puts environment and commands on top of those that a generation was made with.
    pub fn apply(&self, env: &mut BTreeMap<String, String>, commands: &mut BTreeMap<String, String>) {
        let Some(own) = self.config() else {
            return;
        };
        env.extend(own.env.clone());
        commands.extend(own.services.clone());
        commands.extend(own.start.iter().map(|start| ("start".to_owned(), start.clone())));
        commands.retain(|_, line| !line.trim().is_empty());
    }

    /// These limits, or less where it asks for less.
    pub fn within(&self, limits: Limits) -> Limits {
        self.config()
            .map_or(limits, |own| limits.patched(&limits.lowered_by(&own.limits)))
    }
}

fn read(text: &str) -> Result<ReleaseConfig, String> {
    if text.len() > MOST_BYTES {
        return Err(format!("it is longer than {} KiB", MOST_BYTES >> 10));
    }
    let config: ReleaseConfig = toml::from_str(text).map_err(|error| {
        let line = |at: usize| text.bytes().take(at).filter(|b| *b == b'\n').count() + 1;
        match error.span() {
            Some(span) => format!("line {}: {}", line(span.start), error.message()),
            None => error.message().to_owned(),
        }
    })?;
    config.validate().map_err(|error| error.to_string())?;
    if config.limits.disk.is_some() {
        // It would outlast the file, and a volume that is full already could not start again.
        return Err("`limits.disk` is set on the workspace: `choir config set limits.disk=…`".to_owned());
    }
    Ok(config)
}

/// One line, of at most so many bytes: it has to fit beside the environment into one message.
fn plain(reason: &str) -> String {
    let mut line = reason.replace(char::is_control, " ");
    line.truncate(line.floor_char_boundary(MOST_REASON));
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn own(text: &str) -> Own {
        Own::of(Some(Ok(text.to_owned())))
    }

    fn release() -> ReleaseConfig {
        let text = r#"{"start": "old", "services": {"db": "redis", "log": "tail"}, "env": {"A": "1", "B": "1"},
                       "app_port": 3001, "health": {"path": "/up"}}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_the_file_says_wins_and_what_it_leaves_open_stays() {
        let file = own("start = \"new\"\napp_port = 5173\n[env]\nB = \"2\"\n[services]\nlog = \"\"\n");
        let all = file.over(&release());
        assert_eq!((all.start.as_deref(), all.app_port), (Some("new"), Some(5173)));
        assert_eq!((all.env["A"].as_str(), all.env["B"].as_str()), ("1", "2"));
        assert_eq!(all.health, release().health);
        let commands = all.commands();
        let names: Vec<&str> = commands.keys().map(String::as_str).collect();
        assert_eq!(names, ["db", "start"], "an empty line takes a service away");
        assert_eq!(Own::Silent.over(&release()), release());
        let (mut env, mut applied) = (release().env, release().commands());
        file.apply(&mut env, &mut applied);
        assert_eq!(
            (&env, &applied),
            (&all.env, &commands),
            "it makes no difference where it is put on top"
        );
    }

    #[test]
    fn a_file_that_is_wrong_is_refused_whole_with_its_line() {
        for (text, says) in [
            ("app_port = 5173\nstrat = \"x\"", "line 2: unknown field `strat`"),
            ("app_port = 9091", "`app_port` cannot be 9091"),
            ("[env]\nCHOIR_SLOT = \"x\"", "reserved"),
            ("[health]\npath = \"up\"", "begins with /"),
            ("start = ", "line 1"),
            ("[limits]\npids = 1", "limits.pids"),
            ("[limits]\ndisk = 1073741824", "is set on the workspace"),
        ] {
            let refused = own(text);
            assert!(
                refused.refusal().is_some_and(|why| why.contains(says)),
                "{text}: {refused:?}"
            );
            assert_eq!(refused.over(&release()), release());
        }
        let long = format!("# {}", "x".repeat(MOST_BYTES));
        assert!(own(&long).refusal().is_some_and(|why| why.contains("16 KiB")));
        let wide = own(&format!("\"{}\" = 1", "\u{1f4a5}".repeat(300)));
        assert!(wide.refusal().is_some_and(|why| why.len() <= MOST_REASON), "{wide:?}");
        let unread = Own::of(Some(Err("it is a directory\u{1b}[2J".to_owned())));
        assert_eq!(unread.refusal(), Some("it is a directory [2J"));
    }

    #[test]
    fn a_sandbox_can_ask_for_less_of_the_box_and_not_for_more() {
        let allowed = Limits::default();
        let less = own("[limits]\nmemory = 268435456\ncpus = 0.5").within(allowed);
        assert_eq!((less.memory, less.cpus, less.pids), (256 << 20, 0.5, allowed.pids));
        let more = own("[limits]\nmemory = 1099511627776\npids = 100000\ncpus = 64");
        assert_eq!(more.within(allowed), allowed);
    }

    proptest! {
        #[test]
        fn no_text_breaks_it_and_no_refusal_has_a_control_character(text in "\\PC*|(start|env|[a-z]+) ?= ?.{0,20}|[\\[\\]{}=\"\n]{0,80}") {
            let found = own(&text);
            prop_assert!(found.refusal().is_none_or(|why| !why.contains(char::is_control)));
        }
    }
}
