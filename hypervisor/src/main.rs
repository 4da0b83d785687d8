//! The command line of the hypervisor. It must not decide anything that the library should.

use std::path::PathBuf;
use std::process::ExitCode;

use choir_hypervisor::clock::{Clock as _, SystemClock};
use choir_hypervisor::config::{Config, LogFormat};
use choir_hypervisor::{audit, backup, console, places, serve};
use choir_store::AuditHead;
use clap::{Parser, Subcommand};

/// ChoirOS control plane: sign-in, routing, sandboxes.
#[derive(Parser)]
#[command(
    name = "choir-hypervisor",
    version,
    after_help = "Example: choir-hypervisor --config /etc/choir/hypervisor.toml serve"
)]
struct Cli {
    /// The configuration; development defaults with data in ./data where this file does not exist.
    #[arg(long, global = true, default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

const DEFAULT_CONFIG: &str = "/etc/choir/hypervisor.toml";

#[derive(Subcommand)]
enum Verb {
    /// Run until stopped.
    Serve,
    /// Say whether the configuration is complete and safe.
    CheckConfig,
    /// Print a new claim link, while there is no user.
    Claim,
    /// Print a one-time link with which USER can register a new passkey.
    Recover { user: String },
    /// Replace the master key; the hypervisor may go on running. Finishes a rotation that was stopped.
    RotateKey,
    /// Write a backup of the database, encrypted to [backup] recipients. The key file is not in it: keep a copy elsewhere.
    Backup {
        /// The directory it goes to
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
    /// Put a backup into an empty directory; put the key file beside it as `key`, and name both in the configuration.
    Restore {
        /// The backup
        from: PathBuf,
        #[arg(long, value_name = "DIR")]
        into: PathBuf,
        /// The age identity that can read it
        #[arg(long, value_name = "FILE")]
        identity: PathBuf,
    },
    /// Say where database, containers and volumes do not fit together, by invariants I1 to I6 (docs/invariants.md).
    #[command(after_help = "Example: choir-hypervisor --config /etc/choir/hypervisor.toml fsck")]
    Fsck {
        /// Remove containers and volumes that are in no row of the database. After a restore from a backup these may be
        /// what was made since.
        #[arg(long)]
        repair: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say whether the hypervisor answers and every part it relies on is well, and what to do where one is not.
    #[command(after_help = "Example: choir-hypervisor --config /etc/choir/hypervisor.toml doctor")]
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Look into the audit trail of this box.
    Audit {
        #[command(subcommand)]
        verb: AuditVerb,
    },
}

#[derive(Subcommand)]
enum AuditVerb {
    /// Say whether every row is as it was written, and name the first that is not. Changes nothing.
    Verify {
        /// A head that the hypervisor logged, to see that the trail was not cut before it
        #[arg(long, value_name = "ID:MAC")]
        head: Option<AuditHead>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("choir-hypervisor: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    places::keep_memory_private()?;
    let fall_back = cli.config == *DEFAULT_CONFIG && !cli.config.exists();
    let (config, warnings) = if fall_back {
        let config = Config::default();
        let warnings = config.judge()?;
        (config, warnings)
    } else {
        Config::load(&cli.config)?
    };
    // What these make is for who started them.
    if !matches!(
        cli.verb,
        Verb::Serve | Verb::CheckConfig | Verb::Backup { .. } | Verb::Restore { .. }
    ) {
        places::act_as_owner_of(&config.store.path)?;
    }
    match cli.verb {
        Verb::CheckConfig => {
            for warning in warnings {
                println!("warning: {warning}");
            }
            println!("{} is complete and safe", cli.config.display());
            Ok(())
        }
        Verb::Serve => {
            start_logging(&config)?;
            for warning in warnings {
                tracing::warn!("{warning}");
            }
            runtime()?.block_on(serve::serve(config))
        }
        Verb::Fsck { repair, json } => runtime()?.block_on(console::fsck(config, repair, json)),
        Verb::Doctor { json } => runtime()?.block_on(console::doctor(config, warnings, json)),
        Verb::Claim => {
            println!("{}", runtime()?.block_on(console::claim(config))?);
            Ok(())
        }
        Verb::Backup { to } => {
            let file = runtime()?.block_on(backup::backup(&config, &to, SystemClock.now()))?;
            println!("{}", file.display());
            Ok(())
        }
        Verb::Restore { from, into, identity } => {
            let database = backup::restore(&from, &into, &identity, SystemClock.now())?;
            println!("{}", database.display());
            Ok(())
        }
        Verb::Audit {
            verb: AuditVerb::Verify { head },
        } => {
            println!("{}", runtime()?.block_on(audit::verify(&config, head))?);
            Ok(())
        }
        Verb::RotateKey => {
            println!("{}", runtime()?.block_on(console::rotate_key(config))?);
            Ok(())
        }
        Verb::Recover { user } => {
            println!("{}", runtime()?.block_on(console::recover(config, &user))?);
            Ok(())
        }
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

fn start_logging(config: &Config) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log.level)?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match config.log.format {
        LogFormat::Json => log.json().flatten_event(true).init(),
        LogFormat::Text => log.with_ansi(false).init(),
    }
    Ok(())
}
