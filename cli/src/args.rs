//! What can be typed: the global options and the list of verbs. It must not know what a verb does.

use choir_core::Name;
use clap::{Parser, Subcommand};

use crate::verbs::{
    audit, completions, config, deploy, deployments, doctor, drill, exec, export, fork, grants, import, invites, login,
    logs, new, open, pause, prove, releases, restart, rollback, run, secrets, shell, smoke, snapshots, start, stop,
    swap, tasks, tokens, usage, workspaces,
};

/// Where `choir` looks when nothing says otherwise.
pub const DEFAULT_URL: &str = "http://localhost:9090";

/// Coding sandboxes in live and dev pairs, on your own box
#[derive(Debug, Parser)]
#[command(
    name = "choir",
    version,
    propagate_version = true,
    after_help = "Example:\n  choir login --url https://choir.example.com\n  choir exec dev -- cargo test && choir swap\n\nExit codes: 0 done, 1 failed, 2 wrong usage; `exec` and `run` give the command's own."
)]
pub struct Cli {
    /// Address of the hypervisor [default: the one last logged in to, else http://localhost:9090]
    #[arg(long, global = true, env = "CHOIR_URL", value_name = "URL")]
    pub url: Option<String>,
    /// Which workspace
    #[arg(long, short, global = true, default_value = "main", value_name = "NAME")]
    pub workspace: Name,
    /// Print JSON for programs
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    Login(login::Args),
    /// End this machine's login and forget its token
    #[command(after_help = "Example:\n  choir logout")]
    Logout,
    /// Show who is logged in, and where
    #[command(after_help = "Example:\n  choir whoami --json")]
    Whoami,
    /// Show both slots of a workspace
    #[command(after_help = "Example:\n  choir status --workspace blog")]
    Status,
    Open(open::Args),
    Start(start::Args),
    Stop(stop::Args),
    Restart(restart::Args),
    Pause(pause::Args),
    Swap(swap::Args),
    Rollback(rollback::Args),
    Fork(fork::Args),
    Deploy(deploy::Args),
    Deployments(deployments::Args),
    Snapshots(snapshots::Args),
    Export(export::Args),
    Import(import::Args),
    Exec(exec::Args),
    Run(run::Args),
    Tasks(tasks::Args),
    Shell(shell::Args),
    Logs(logs::Args),
    Config(config::Args),
    New(new::Args),
    Workspaces(workspaces::Args),
    Releases(releases::Args),
    /// List the people of this box (admins only)
    #[command(after_help = "Example:\n  choir users")]
    Users,
    Invites(invites::Args),
    Tokens(tokens::Args),
    Secrets(secrets::Args),
    Grants(grants::Args),
    Usage(usage::Args),
    Audit(audit::Args),
    Prove(prove::Args),
    Smoke(smoke::Args),
    Drill(drill::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_grammar_is_sound_and_every_verb_has_an_example() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for verb in command.get_subcommands().filter(|v| v.get_name() != "help") {
            let text = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(text.starts_with("Example:"), "{} has no example", verb.get_name());
        }
    }

    #[test]
    fn everything_after_two_hyphens_is_the_command() {
        let cli = Cli::try_parse_from(["choir", "exec", "dev", "--", "ls", "--json", "-l"]).unwrap();
        let Verb::Exec(exec) = cli.verb else { panic!("not exec") };
        assert_eq!(exec.command, ["ls", "--json", "-l"]);
        assert!(!cli.json);
    }

    #[test]
    fn wrong_usage_is_exit_code_2() {
        for wrong in [
            &["choir"][..],
            &["choir", "start"],
            &["choir", "start", "prod"],
            &["choir", "exec", "dev"],
            &["choir", "--workspace", "A B", "status"],
            &["choir", "flyto"],
        ] {
            assert_eq!(Cli::try_parse_from(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
