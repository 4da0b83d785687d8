//! One file per verb. This one only picks; it must not do anything itself.

pub mod audit;
pub mod completions;
pub mod config;
pub mod deploy;
pub mod deployments;
pub mod doctor;
pub mod drill;
pub mod exec;
pub mod export;
pub mod fork;
pub mod grants;
pub mod import;
pub mod invites;
pub mod login;
pub mod logout;
pub mod logs;
pub mod new;
pub mod open;
pub mod pause;
pub mod prove;
pub mod releases;
pub mod restart;
pub mod rollback;
pub mod run;
pub mod secrets;
pub mod shell;
pub mod smoke;
pub mod snapshots;
pub mod start;
pub mod status;
pub mod stop;
pub mod swap;
pub mod tasks;
pub mod tokens;
pub mod usage;
pub mod users;
pub mod whoami;
pub mod workspaces;

use jiff::Timestamp;

use crate::args::{Cli, Verb};
use crate::context::Context;
use crate::failure::Failure;

pub async fn run(cli: Cli) -> Result<(), Failure> {
    if let Verb::Completions(args) = &cli.verb {
        return completions::run(args);
    }
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where this program asks what time it is"
    )]
    let now = Timestamp::now();
    let mut ctx = Context::new(cli.url, cli.workspace, cli.json, now)?;
    match cli.verb {
        Verb::Login(args) => login::run(&mut ctx, &args).await,
        Verb::Logout => logout::run(&mut ctx).await,
        Verb::Whoami => whoami::run(&ctx).await,
        Verb::Status => status::run(&ctx).await,
        Verb::Open(args) => open::run(&ctx, &args).await,
        Verb::Start(args) => start::run(&ctx, &args).await,
        Verb::Stop(args) => stop::run(&ctx, &args).await,
        Verb::Restart(args) => restart::run(&ctx, &args).await,
        Verb::Pause(args) => pause::run(&ctx, &args).await,
        Verb::Swap(args) => swap::run(&ctx, &args).await,
        Verb::Rollback(args) => rollback::run(&ctx, &args).await,
        Verb::Fork(args) => fork::run(&ctx, &args).await,
        Verb::Deploy(args) => deploy::run(&ctx, &args).await,
        Verb::Snapshots(args) => snapshots::run(&ctx, &args).await,
        Verb::Export(args) => export::run(&ctx, &args).await,
        Verb::Import(args) => import::run(&ctx, &args).await,
        Verb::Deployments(args) => deployments::run(&ctx, &args).await,
        Verb::Exec(args) => exec::run(&ctx, args).await,
        Verb::Run(args) => run::run(&ctx, args).await,
        Verb::Tasks(args) => tasks::run(&ctx, &args).await,
        Verb::Shell(args) => shell::run(&ctx, args).await,
        Verb::Logs(args) => logs::run(&ctx, &args).await,
        Verb::Config(args) => config::run(&ctx, &args).await,
        Verb::New(args) => new::run(&ctx, &args).await,
        Verb::Workspaces(args) => workspaces::run(&ctx, &args).await,
        Verb::Releases(args) => releases::run(&ctx, &args).await,
        Verb::Users => users::run(&ctx).await,
        Verb::Invites(args) => invites::run(&ctx, &args).await,
        Verb::Tokens(args) => tokens::run(&ctx, &args).await,
        Verb::Grants(args) => grants::run(&ctx, &args).await,
        Verb::Secrets(args) => secrets::run(&ctx, &args).await,
        Verb::Usage(args) => usage::run(&ctx, &args).await,
        Verb::Audit(args) => audit::run(&ctx, args).await,
        Verb::Prove(args) => prove::run(&ctx, &args).await,
        Verb::Smoke(args) => smoke::run(&ctx, args).await,
        Verb::Drill(args) => drill::run(&ctx, &args).await,
        Verb::Doctor(args) => doctor::run(&ctx, &args).await,
        Verb::Completions(_) => Ok(()),
    }
}
