//! `choir grants`: which slot may use which secret where, and what sandboxes asked for. It must not know any rule.

use std::path::PathBuf;

use choir_api::grants::{CreateGrant, Decision, Grant, GrantRequest};
use choir_core::{Capability, GrantId, GrantRequestId, HostName, Inject, Name, SecretName, Slot, SshUse};
use clap::Subcommand;
use jiff::SignedDuration;
use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;
use crate::known_hosts;
use crate::output::{ago, table};

/// Let a slot use a secret at some hosts, without seeing it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  choir grants add github --slot dev --secret GITHUB_TOKEN\n  choir grants add mail --slot live --secret MAIL_KEY --template bearer --host api.mail.example --method POST --path /v1/send\n  choir grants add deploy --slot dev --secret DEPLOY_KEY --template ssh --host github.com --namespace git\n  choir grants requests"
)]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// List the grants of all workspaces (the default)
    List,
    /// Grant a capability to a slot of the workspace
    Add(Box<Add>),
    /// End a grant
    Rm { id: GrantId },
    /// List what sandboxes were refused and you may allow
    Requests,
    /// Put a host that was asked for on the workspace's allow list
    Approve { id: GrantRequestId },
    /// Let a request go
    Dismiss { id: GrantRequestId },
}

#[derive(Debug, clap::Args)]
pub struct Add {
    /// The name by which programs ask for it
    pub capability: Capability,
    #[arg(long)]
    pub slot: Slot,
    /// Which of your secrets; see `choir secrets`
    #[arg(long, value_name = "NAME")]
    pub secret: SecretName,
    /// A service (github, gitlab, openai, anthropic, npm, pypi, crates-io, claude, codex, gh) or a way to use the secret
    /// (bearer, basic:USER, header:NAME, query:NAME, ssh) [default: the service that is called like the capability]
    #[arg(long, value_name = "NAME")]
    pub template: Option<String>,
    /// Where it may go; several times for several hosts
    #[arg(long = "host", value_name = "HOST")]
    pub hosts: Vec<HostName>,
    /// With which method; several times for several
    #[arg(long = "method", value_name = "METHOD")]
    pub methods: Vec<String>,
    /// Only at and below this path
    #[arg(long = "path", value_name = "PATH")]
    pub path_prefix: Option<String>,
    /// For ssh: a host's public key; several times for several [default: as github.com and gitlab.com publish theirs]
    #[arg(long = "host-key", value_name = "KEY")]
    pub host_keys: Vec<String>,
    /// For ssh: take the hosts' keys from this file
    #[arg(long, value_name = "FILE", conflicts_with = "host_keys")]
    pub known_hosts: Option<PathBuf>,
    /// For ssh: as whom to sign in; several times for several [default: git]
    #[arg(long = "user", value_name = "USER")]
    pub users: Vec<String>,
    /// For ssh: what may be signed besides, `git` for commits; several times for several
    #[arg(long = "namespace", value_name = "NAME")]
    pub namespaces: Vec<String>,
    /// End by itself after so many hours
    #[arg(long, value_name = "HOURS", value_parser = clap::value_parser!(u32).range(1..=87_600))]
    pub hours: Option<u32>,
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let client = ctx.client()?;
    match &args.what {
        None | Some(What::List) => {
            let page = client.grants().await?;
            ctx.show(&page, || {
                let rows: Vec<Vec<String>> = page
                    .items
                    .iter()
                    .map(|grant| {
                        let hosts: Vec<&str> = grant.hosts.iter().map(HostName::as_str).collect();
                        let ended = grant.expires_at.is_some_and(|at| at <= ctx.now);
                        let until = grant.expires_at.map_or("-".to_owned(), |at| at.to_string());
                        vec![
                            grant.id.to_string(),
                            format!("{}/{}", grant.workspace, grant.slot),
                            grant.capability.to_string(),
                            grant.secret.to_string(),
                            match grant.inject {
                                Inject::Ssh { .. } => "ssh".to_owned(),
                                _ => grant.methods.join(","),
                            },
                            format!("{}{}", hosts.join(","), grant.path_prefix),
                            if ended { "ended".to_owned() } else { until },
                        ]
                    })
                    .collect();
                table(
                    &["ID", "SLOT", "CAPABILITY", "SECRET", "METHODS", "WHERE", "UNTIL"],
                    &rows,
                )
            })
        }
        Some(What::Add(add)) => {
            let made = client.create_grant(&asked(ctx, add)?).await?;
            ctx.show(&made, || match &made.inject {
                Inject::Ssh { ssh } => format!(
                    "{}/{} may use {} over SSH; programs there find it at $SSH_AUTH_SOCK. Its public half, for the host:\n{}",
                    made.workspace, made.slot, made.secret, ssh.public_key
                ),
                _ => format!(
                    "{}/{} may use {} as {}: programs there call $CHOIR_BROKER_URL/v1/egress/{}/…",
                    made.workspace, made.slot, made.secret, made.capability, made.capability
                ),
            })
        }
        Some(What::Rm { id }) => {
            client.delete_grant(id).await?;
            ctx.show(&json!({ "id": id }), || format!("Grant {id} has ended."))
        }
        Some(What::Requests) => {
            let page = client.grant_requests().await?;
            ctx.show(&page, || requests(&page.items, ctx))
        }
        Some(What::Approve { id }) => {
            client.decide_request(id, Decision::Approve).await?;
            ctx.show(&json!({ "id": id }), || {
                "The host is on the workspace's allow list.".to_owned()
            })
        }
        Some(What::Dismiss { id }) => {
            client.decide_request(id, Decision::Dismiss).await?;
            ctx.show(&json!({ "id": id }), || "The request is dismissed.".to_owned())
        }
    }
}

/// What is to be typed for a slot of this workspace to have such a grant. When it ends is left out.
pub fn command(workspace: &Name, grant: &Grant) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut say = |option: &str, value: &str| words.extend([option.to_owned(), quoted(value)]);
    say("--slot", grant.slot.as_str());
    say("--secret", grant.secret.as_str());
    if let Some(template) = way(&grant.inject) {
        say("--template", &template);
    }
    for host in &grant.hosts {
        say("--host", host.as_str());
    }
    if let Inject::Ssh { ssh } = &grant.inject {
        for (option, values) in [
            ("--host-key", &ssh.host_keys),
            ("--user", &ssh.users),
            ("--namespace", &ssh.namespaces),
        ] {
            for value in values {
                say(option, value);
            }
        }
    } else {
        for method in &grant.methods {
            say("--method", method);
        }
        say("--path", &grant.path_prefix);
    }
    format!(
        "choir -w {workspace} grants add {} {}",
        grant.capability,
        words.join(" ")
    )
}

/// A template that uses a secret like this, if one can be named.
fn way(inject: &Inject) -> Option<String> {
    match inject {
        Inject::Header { header, format } => match (header.as_str(), format.as_str()) {
            ("authorization", "Bearer {secret}") => Some("bearer".to_owned()),
            ("authorization", "token {secret}") => Some("gh".to_owned()),
            (name, "{secret}") => Some(format!("header:{name}")),
            _ => None,
        },
        Inject::Basic { basic } => Some(format!("basic:{basic}")),
        Inject::Query { query } => Some(format!("query:{query}")),
        Inject::Ssh { .. } => Some("ssh".to_owned()),
    }
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@=+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn asked(ctx: &Context, add: &Add) -> Result<CreateGrant, Failure> {
    Ok(CreateGrant {
        workspace: ctx.workspace.clone(),
        slot: add.slot,
        capability: add.capability.clone(),
        secret: add.secret.clone(),
        template: add.template.clone(),
        hosts: (!add.hosts.is_empty()).then(|| add.hosts.clone()),
        methods: (!add.methods.is_empty()).then(|| add.methods.iter().map(|m| m.to_ascii_uppercase()).collect()),
        path_prefix: add.path_prefix.clone(),
        inject: ssh(add)?,
        expires_at: add
            .hours
            .map(|hours| ctx.now + SignedDuration::from_hours(i64::from(hours))),
    })
}

/// What was said about SSH, if anything was.
fn ssh(add: &Add) -> Result<Option<Inject>, Failure> {
    let mut host_keys = add.host_keys.clone();
    if let Some(file) = &add.known_hosts {
        for host in &add.hosts {
            host_keys.extend(known_hosts::of(host.as_str(), file)?);
        }
    }
    let said = !(host_keys.is_empty() && add.users.is_empty() && add.namespaces.is_empty());
    if !said {
        return Ok(None);
    }
    if add.template.as_deref() != Some("ssh") {
        let message = "--host-key, --known-hosts, --user and --namespace go with --template ssh";
        return Err(Failure::Usage(message.to_owned()));
    }
    let mut ssh = SshUse {
        host_keys,
        namespaces: add.namespaces.clone(),
        ..SshUse::default()
    };
    if !add.users.is_empty() {
        ssh.users.clone_from(&add.users);
    }
    Ok(Some(Inject::Ssh { ssh }))
}

fn requests(items: &[GrantRequest], ctx: &Context) -> String {
    let rows: Vec<Vec<String>> = items
        .iter()
        .map(|request| {
            let wanted = match (&request.host, &request.capability) {
                (Some(host), _) => format!("to reach {host}"),
                (None, Some(capability)) => format!("the capability {capability}"),
                (None, None) => {
                    let ssh = request.ssh.as_deref();
                    ssh.map(|what| format!("to {what} over SSH")).unwrap_or_default()
                }
            };
            vec![
                request.id.to_string(),
                format!("{}/{}", request.workspace, request.slot),
                wanted,
                request.count.to_string(),
                ago(Some(request.last_at), ctx.now),
            ]
        })
        .collect();
    table(&["ID", "SLOT", "ASKED FOR", "TIMES", "LAST"], &rows)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Verb};

    fn grant(inject: Inject, methods: &[&str]) -> Grant {
        Grant {
            id: GrantId::from_random([1; 16]),
            workspace: "main".parse().unwrap(),
            slot: Slot::Dev,
            capability: "mail".parse().unwrap(),
            secret: "MAIL_KEY".parse().unwrap(),
            hosts: vec!["api.mail.example".parse().unwrap()],
            methods: methods.iter().map(|m| (*m).to_owned()).collect(),
            path_prefix: "/v1/it's".to_owned(),
            inject,
            created_at: "2026-01-02T03:04:05Z".parse().unwrap(),
            expires_at: None,
        }
    }

    #[test]
    fn what_is_to_be_typed_for_a_grant_says_all_of_it_in_words_that_a_shell_leaves_whole() {
        let header = Inject::Header {
            header: "x-api-key".to_owned(),
            format: "{secret}".to_owned(),
        };
        let line = command(&"blog".parse().unwrap(), &grant(header, &["GET", "POST"]));
        let expected = "choir -w blog grants add mail --slot dev --secret MAIL_KEY --template header:x-api-key \
                        --host api.mail.example --method GET --method POST --path '/v1/it'\\''s'";
        assert_eq!(line, expected);
        let ssh = SshUse {
            host_keys: vec!["ssh-ed25519 AAAA".to_owned()],
            namespaces: vec!["git".to_owned()],
            ..SshUse::default()
        };
        let line = command(&"blog".parse().unwrap(), &grant(Inject::Ssh { ssh }, &[]));
        assert!(
            line.ends_with("--host-key 'ssh-ed25519 AAAA' --user git --namespace git"),
            "{line}"
        );
        let words = line.replace("'ssh-ed25519 AAAA'", "ssh-ed25519");
        let typed = Cli::try_parse_from(words.split(' ')).unwrap();
        assert!(matches!(typed.verb, Verb::Grants(_)));
    }
}
