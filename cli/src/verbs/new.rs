//! `choir new`: from a repository's address to a workspace with a clone of it in dev. It runs nothing of the repository,
//! and each step that was done already is passed over, so that it can be repeated after a failure.

use std::path::{Path, PathBuf};
use std::process::Command as Local;

use choir_api::client::{Client, SlotVerb};
use choir_api::grants::CreateGrant;
use choir_api::sandbox::{Command, ExecRequest};
use choir_core::settings::GitIdentity;
use choir_core::{Inject, Name, SecretName, Slot, SshUse, WorkspaceSettings};
use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;
use crate::repository::Repository;
use crate::{known_hosts, progress, waiting};

/// Make a workspace for a Git repository, and clone it in dev
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir new https://github.com/ada/blog\n  choir new git@github.com:ada/blog.git --secret DEPLOY_KEY\n\nIt runs nothing of the repository. After a failure, run it again: what is done is passed over."
)]
pub struct Args {
    /// `https://host/path` or `git@host:path`
    #[arg(value_name = "GIT_URL")]
    pub repository: Repository,
    /// The workspace, and the directory in dev [default: the repository's name]
    #[arg(long)]
    pub name: Option<Name>,
    /// Let dev use this secret at the repository's host: a token for https, a private key for git@
    #[arg(long, value_name = "NAME")]
    pub secret: Option<SecretName>,
    /// The SSH host's public key; several times for several [default: as published, or as your own known hosts have it]
    #[arg(long = "host-key", value_name = "KEY")]
    pub host_keys: Vec<String>,
    /// Take the SSH host's keys from this file
    #[arg(long, value_name = "FILE", conflicts_with = "host_keys")]
    pub known_hosts: Option<PathBuf>,
}

/// Clones beside the place and moves the whole there, so that half a clone is never taken for one. 65: something else is
/// in the place.
const CLONE: &str = "cd || exit 1
if [ -e \"$2\" ]; then
    [ \"$(git -C \"$2\" config --get remote.origin.url)\" = \"$1\" ] && exit 0
    exit 65
fi
rm -rf \".$2.new\" && git clone -q -- \"$1\" \".$2.new\" && mv -T \".$2.new\" \"$2\"";
const TAKEN: i32 = 65;
/// A large repository over a slow line.
const CLONE_WITHIN_MS: u64 = 60 * 60 * 1000;

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let repository = &args.repository;
    let name = args.name.clone().or_else(|| repository.name());
    let name = name.ok_or_else(|| {
        Failure::Usage("the repository's name makes no workspace's name; choose one with --name".to_owned())
    })?;
    let client = ctx.client()?;
    let created = workspace(ctx, &client, &name).await?;
    let go_on = |failure| left_off(failure, &name);
    settle(&client, &name, args).await.map_err(go_on)?;
    if let Some(secret) = &args.secret {
        grant(&client, &name, args, secret).await.map_err(go_on)?;
    }
    let starting = waiting::until(&client, &name, Slot::Dev, SlotVerb::Start);
    progress::watch("start dev", ctx.json, starting).await.map_err(go_on)?;
    progress::watch("clone", ctx.json, clone(&client, &name, args))
        .await
        .map_err(go_on)?;
    let shown = json!({
        "workspace": name, "slot": "dev", "directory": format!("~/{name}"), "url": repository.url, "created": created,
    });
    ctx.show(&shown, || {
        format!(
            "Workspace {name} is set up: ~/{name} in dev is a clone of {}. Nothing of it was run.\nNext: choir -w {name} \
             shell dev",
            repository.url
        )
    })
}

/// Whether it was made just now.
async fn workspace(ctx: &Context, client: &Client, name: &Name) -> Result<bool, Failure> {
    match client.workspace(name).await {
        Ok(_) => return Ok(false),
        Err(error) if error.status() == Some(404) => {}
        Err(error) => return Err(error.into()),
    }
    progress::watch("create", ctx.json, client.create_workspace(name)).await?;
    Ok(true)
}

/// Who commits are by, as on this machine; and what a secret over HTTPS needs.
async fn settle(client: &Client, name: &Name, args: &Args) -> Result<(), Failure> {
    let now = client.workspace(name).await?.settings;
    let patch = WorkspaceSettings {
        git: if now.git.is_none() { identity() } else { None },
        intercept_tls: (args.secret.is_some() && !args.repository.is_ssh() && now.intercept_tls != Some(true))
            .then_some(true),
        ..WorkspaceSettings::default()
    };
    if patch != WorkspaceSettings::default() {
        client.patch_workspace(name, &patch).await?;
    }
    Ok(())
}

fn identity() -> Option<GitIdentity> {
    let config = |key| {
        let output = Local::new("git").args(["config", "--get", key]).output().ok()?;
        let value = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !value.is_empty()).then_some(value)
    };
    Some(GitIdentity {
        name: config("user.name")?,
        email: config("user.email")?,
    })
}

async fn grant(client: &Client, name: &Name, args: &Args, secret: &SecretName) -> Result<(), Failure> {
    let repository = &args.repository;
    let over = if repository.is_ssh() { "git-ssh" } else { "git-https" };
    let (template, methods, inject) = match (&repository.user, repository.host.as_str()) {
        (Some(user), _) => (None, None, Some(key(args, user)?)),
        (None, "github.com") => (Some("github-git"), None, None),
        (None, "gitlab.com") => (Some("gitlab-git"), None, None),
        (None, _) => (Some("basic:git"), Some(["GET", "HEAD", "POST"]), None),
    };
    let asked = CreateGrant {
        workspace: name.clone(),
        slot: Slot::Dev,
        capability: over
            .parse()
            .map_err(|_| Failure::Failed("no name for the grant".to_owned()))?,
        secret: secret.clone(),
        template: template.map(str::to_owned),
        hosts: Some(vec![repository.host.clone()]),
        methods: methods.map(|all| all.map(str::to_owned).to_vec()),
        path_prefix: None,
        inject,
        expires_at: None,
    };
    match client.create_grant(&asked).await {
        Err(error) if error.code() == Some("granted_already") => Ok(()),
        made => Ok(made.map(drop)?),
    }
}

/// Where nothing is said, the hypervisor knows what well-known hosts publish, and this person's own file the rest.
fn key(args: &Args, user: &str) -> Result<Inject, Failure> {
    let host = args.repository.host.as_str();
    let own = known_hosts::own().filter(|file| Path::is_file(file));
    let host_keys = match (&args.known_hosts, own) {
        (Some(file), _) => known_hosts::of(host, file)?,
        (None, Some(own)) if args.host_keys.is_empty() => known_hosts::of(host, &own).unwrap_or_default(),
        _ => args.host_keys.clone(),
    };
    let ssh = SshUse {
        host_keys,
        users: vec![user.to_owned()],
        namespaces: vec!["git".to_owned()],
        ..SshUse::default()
    };
    Ok(Inject::Ssh { ssh })
}

async fn clone(client: &Client, name: &Name, args: &Args) -> Result<(), Failure> {
    let words = ["sh", "-c", CLONE, "sh", &args.repository.url, name.as_str()];
    let env = [
        ("GIT_TERMINAL_PROMPT", "0"),
        ("GIT_SSH_COMMAND", "ssh -o BatchMode=yes"),
    ];
    let request = ExecRequest {
        command: Command::Argv(words.map(str::to_owned).to_vec()),
        cwd: None,
        env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        stdin: None,
        timeout_ms: Some(CLONE_WITHIN_MS),
        max_output_bytes: None,
    };
    let done = client.sandbox(name, Slot::Dev).exec(&request).await?;
    match done.exit.exit_code {
        0 => Ok(()),
        TAKEN => Err(Failure::Failed(format!(
            "~/{name} in dev is something else than a clone of {}; move it away, or choose another --name",
            args.repository.url
        ))),
        _ => Err(Failure::Failed(advice(&done.stderr, args))),
    }
}

/// What Git said, and what to do where it is about credentials.
fn advice(stderr: &str, args: &Args) -> String {
    let said = stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    let said = said.collect::<Vec<_>>().join("; ");
    let about = [
        "could not read Username",
        "Authentication failed",
        "Permission denied",
        "Host key verification failed",
        "not found",
        "returned error: 40",
    ];
    if !about.iter().any(|words| said.contains(words)) {
        return format!("the clone failed: {said}");
    }
    let what = if args.repository.is_ssh() {
        "a private key (`choir secrets set DEPLOY_KEY < FILE`), and add --secret DEPLOY_KEY"
    } else {
        "a token (`choir secrets set GIT_TOKEN`), and add --secret GIT_TOKEN"
    };
    let granted = match &args.secret {
        Some(secret) => format!(
            "dev is granted {secret}; see that it is the right one at {}",
            args.repository.host
        ),
        None => format!("dev has no credentials for {}; store {what}", args.repository.host),
    };
    format!("the clone failed: {said}. {granted}")
}

/// A failure, and how to go on after it.
fn left_off(failure: Failure, name: &Name) -> Failure {
    match failure {
        Failure::Failed(text) => Failure::Failed(format!(
            "{}. The workspace {name} is there; run the same command again to go on, or `choir workspaces delete {name}`",
            text.trim_end_matches('.')
        )),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_that_lacks_credentials_is_told_which_secret_to_add() {
        let args = |url: &str, secret: Option<&str>| Args {
            repository: url.parse().unwrap(),
            name: None,
            secret: secret.map(|name| name.parse().unwrap()),
            host_keys: vec![],
            known_hosts: None,
        };
        let https = "fatal: could not read Username for 'https://github.com': terminal prompts disabled\n";
        let told = advice(https, &args("https://github.com/a/b", None));
        assert!(
            told.contains("--secret GIT_TOKEN") && told.contains("github.com"),
            "{told}"
        );
        let ssh = "git@github.com: Permission denied (publickey).\nfatal: Could not read from remote repository.\n";
        let told = advice(ssh, &args("git@github.com:a/b", None));
        assert!(told.contains("--secret DEPLOY_KEY"), "{told}");
        let told = advice(ssh, &args("git@github.com:a/b", Some("K")));
        assert!(told.contains("granted K"), "{told}");
        // The control: what is not about credentials gets no such advice.
        let told = advice(
            "fatal: unable to access: disk full\n",
            &args("git@github.com:a/b", None),
        );
        assert!(!told.contains("--secret"), "{told}");
    }
}
