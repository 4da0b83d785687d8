//! Carries steps out in the dev slot of a workspace, by the API of its sandbox. It must not know where steps come from,
//! nor run anything on this machine.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use choir_api::client::{Client, ExecEvent, SlotVerb};
use choir_api::sandbox::{Chunk, Command, Encoding, ExecExit, ExecRequest, OutputStream, Stdin};
use choir_api::workspaces::{CreateRelease, CreateWorkspace, Release};
use choir_core::{Name, ReleaseConfig, ReleaseId, Slot};
use data_encoding::BASE64;
use tar::{Builder, Header};

use super::sources::{self, Entry, Found};
use super::steps::{Action, CHOIR, HOME, Plan, Step, Values};
use crate::failure::Failure;
use crate::output;
use crate::verbs::exec;
use crate::waiting::until;

/// Ours in the home, which no release holds.
const DIRECTORY: &str = ".choir-build";
/// An image need not have a `sudo`; the agent is one under that name.
const PREPARE: &str = r#"mkdir -p "$1" && ln -sf /usr/libexec/choir/choir-sandbox "$1/sudo""#;
/// The step's own directory need not be open to the user that `sudo` is called by.
const ENTER: &str = r#"cd -- "$1" && shift && exec "$@""#;
/// $1: our directory, $2: the destination, $3: its owner, $4: the mode or nothing, $5: the one file's name where the
/// destination may be a file.
const COPY: &str = r#"set -e
stage=$1/stage
rm -rf "$stage" && mkdir "$stage"
tar -xf "$1/stage.tar" -C "$stage"
chown -R -h "$3" "$stage"
if [ -n "$4" ]; then chmod -R "$4" "$stage"; fi
if [ -n "$5" ] && [ ! -d "$2" ]; then
    mkdir -p "$(dirname "$2")"
    cp -a "$stage/$5" "$2"
else
    if [ ! -d "$2" ]; then mkdir -p "$2" && chown "$3" "$2"; fi
    for entry in "$stage"/* "$stage"/.[!.]* "$stage"/..?*; do
        if [ -e "$entry" ] || [ -L "$entry" ]; then cp -a "$entry" "$2/"; fi
    done
fi
rm -rf "$stage" "$stage.tar""#;
/// Bytes sent in one call; in base64 they are within what a sandbox takes.
const PART: usize = 4 << 20;
/// How long a RUN may take.
const MINUTES: u64 = 30;

/// Where it is built.
pub struct Site<'a> {
    pub client: &'a Client,
    pub workspace: Name,
    /// Where copies come from; canonical.
    pub context: &'a Path,
}

impl Site<'_> {
    /// All steps, then a release of what they made.
    pub async fn build(&self, base: &ReleaseId, plan: &Plan, name: &str) -> Result<Release, Failure> {
        let asked = CreateWorkspace {
            name: self.workspace.clone(),
            release: Some(base.clone()),
        };
        self.client.create_workspace_from(&asked).await?;
        until(self.client, &self.workspace, Slot::Dev, SlotVerb::Start).await?;
        self.quietly(shell(PREPARE, &[directory().as_str()]), CHOIR, None)
            .await?;
        for (n, step) in plan.steps.iter().enumerate() {
            eprintln!("Step {}/{}: {}", n + 1, plan.steps.len(), output::plain(&step.text));
            let begun = Instant::now();
            self.carry_out(step).await?;
            let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            eprintln!("    took {}", output::duration(took));
        }
        self.release(name, &plan.config).await
    }

    async fn release(&self, name: &str, config: &ReleaseConfig) -> Result<Release, Failure> {
        let slots = self.client.workspace(&self.workspace).await?.slots;
        let asked = CreateRelease {
            name: Some(name.to_owned()),
            config: Some(config.clone()),
            ..CreateRelease::of_sandbox(slots.dev.sandbox)
        };
        Ok(self.client.create_release(&asked).await?)
    }

    async fn carry_out(&self, step: &Step) -> Result<(), Failure> {
        let failed = |why: String| Failure::Failed(format!("{}: {why}", step.at));
        match &step.action {
            Action::Run {
                argv,
                user,
                directory,
                env,
            } => {
                let words: Vec<&str> = [directory].into_iter().chain(argv).map(String::as_str).collect();
                let exit = self.shown(request(shell(ENTER, &words), user, env)).await?;
                match exit.exit_code {
                    _ if exit.timed_out => Err(failed(format!(
                        "it took over {MINUTES} minutes; split it into smaller steps"
                    ))),
                    0 => Ok(()),
                    code => Err(failed(format!(
                        "`{}` ended with {code}; its output is above",
                        step.text
                    ))),
                }
            }
            Action::Copy {
                sources,
                destination,
                into,
                owner,
                mode,
            } => {
                let found = sources::find(self.context, sources).map_err(failed)?;
                self.send(&found).await?;
                let file = match &found.entries[..] {
                    [one] if !into && !found.has_directory => one.name.to_string_lossy().into_owned(),
                    _ => String::new(),
                };
                let mode = mode.as_deref().unwrap_or_default();
                let ours = directory();
                let words = [ours.as_str(), destination.as_str(), owner.as_str(), mode, file.as_str()];
                self.quietly(shell(COPY, &words), "root", None)
                    .await
                    .map_err(|error| match error {
                        Failure::Failed(why) => failed(why),
                        other => other,
                    })
            }
        }
    }

    /// Puts an archive of what was found into our directory.
    async fn send(&self, found: &Found) -> Result<(), Failure> {
        let mut archive = Builder::new(Vec::new());
        for entry in &found.entries {
            append(&mut archive, entry)
                .map_err(|e| Failure::Failed(format!("{} cannot be read: {e}", entry.path.display())))?;
            if archive.get_ref().len() >= PART {
                let whole = std::mem::take(archive.get_mut());
                self.append(&whole).await?;
            }
        }
        self.append(&archive.into_inner()?).await
    }

    async fn append(&self, bytes: &[u8]) -> Result<(), Failure> {
        for part in bytes.chunks(PART) {
            let stdin = Stdin::Chunk(Chunk {
                data: BASE64.encode(part),
                encoding: Encoding::Base64,
            });
            let line = r#"cat >> "$1/stage.tar""#;
            self.quietly(shell(line, &[directory().as_str()]), CHOIR, Some(stdin))
                .await?;
        }
        Ok(())
    }

    /// Runs something of ours; its output is told only where it fails.
    async fn quietly(&self, argv: Vec<String>, user: &str, stdin: Option<Stdin>) -> Result<(), Failure> {
        let asked = ExecRequest {
            stdin,
            ..request(argv, user, &Values::new())
        };
        let done = self.client.sandbox(&self.workspace, Slot::Dev).exec(&asked).await?;
        match done.exit.exit_code {
            0 => Ok(()),
            _ => Err(Failure::Failed(format!(
                "it failed in the sandbox: {}",
                done.stderr.trim()
            ))),
        }
    }

    /// Runs a command; its output goes to our standard error as it comes.
    async fn shown(&self, asked: ExecRequest) -> Result<ExecExit, Failure> {
        let mut stream = self
            .client
            .sandbox(&self.workspace, Slot::Dev)
            .exec_stream(&asked)
            .await?;
        while let Some(event) = stream.next().await? {
            match event {
                ExecEvent::Output(_, bytes) => exec::write(OutputStream::Stderr, &bytes)?,
                ExecEvent::Exit(exit) => return Ok(exit),
            }
        }
        Err(Failure::Failed(
            "the connection ended before the step did; build it again".to_owned(),
        ))
    }
}

fn directory() -> String {
    format!("{HOME}/{DIRECTORY}")
}

fn shell(script: &str, words: &[&str]) -> Vec<String> {
    let all = ["/bin/sh", "-c", script, "sh"].into_iter().chain(words.iter().copied());
    all.map(str::to_owned).collect()
}

/// The home's user runs things itself, everybody else through `sudo`.
fn request(argv: Vec<String>, user: &str, env: &Values) -> ExecRequest {
    let (argv, env) = if user == CHOIR {
        (argv, env.clone())
    } else {
        let sudo = [format!("{}/sudo", directory()), "-u".to_owned(), user.to_owned()];
        let set = env.iter().map(|(name, value)| format!("{name}={value}"));
        (sudo.into_iter().chain(set).chain(argv).collect(), Values::new())
    };
    ExecRequest {
        command: Command::Argv(argv),
        cwd: None,
        env,
        stdin: None,
        timeout_ms: Some(MINUTES * 60 * 1000),
        max_output_bytes: None,
    }
}

/// With its mode, and as root's.
fn append(archive: &mut Builder<Vec<u8>>, entry: &Entry) -> io::Result<()> {
    let meta = entry.path.symlink_metadata()?;
    let mut header = Header::new_gnu();
    header.set_metadata(&meta);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    if meta.is_symlink() {
        return archive.append_link(&mut header, &entry.name, fs::read_link(&entry.path)?);
    }
    let bytes = if meta.is_dir() {
        Vec::new()
    } else {
        fs::read(&entry.path)?
    };
    header.set_size(bytes.len() as u64);
    archive.append_data(&mut header, &entry.name, &bytes[..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_homes_user_runs_things_itself_and_others_through_sudo() {
        let env: Values = [("A".to_owned(), "1 2".to_owned())].into();
        let words = |argv: &[&str]| argv.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let own = request(words(&["id"]), CHOIR, &env);
        assert_eq!((own.command, own.env), (Command::Argv(words(&["id"])), env.clone()));
        let others = request(words(&["id"]), "root", &env);
        let sudo = ["/home/choir/.choir-build/sudo", "-u", "root", "A=1 2", "id"];
        assert_eq!(
            (others.command, others.env),
            (Command::Argv(words(&sudo)), Values::new())
        );
    }

    #[test]
    fn an_archive_in_parts_is_the_archive() {
        let place = tempfile::tempdir().unwrap();
        let long = "n".repeat(150);
        fs::write(place.path().join("a"), "one").unwrap();
        fs::write(place.path().join(&long), "two").unwrap();
        let mut archive = Builder::new(Vec::new());
        let mut bytes = Vec::new();
        for name in ["a", long.as_str()] {
            let entry = Entry {
                path: place.path().join(name),
                name: name.into(),
            };
            append(&mut archive, &entry).unwrap();
            bytes.append(archive.get_mut());
        }
        bytes.extend(archive.into_inner().unwrap());
        let mut read = tar::Archive::new(&bytes[..]);
        let names: Vec<_> = read
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["a", long.as_str()]);
    }
}
