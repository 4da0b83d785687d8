//! `choir doctor`: whether this machine can work with the hypervisor, and the hypervisor with its parts. It must not
//! change anything, nor wake a sandbox.

use choir_core::Slot;
use serde::Serialize;

use crate::context::Context;
use crate::failure::Failure;
use crate::output;

/// Check the way to the hypervisor and the parts it relies on
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir doctor --url https://choir.example.com")]
pub struct Args {}

#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    /// It works, and would be better otherwise.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    advice: bool,
    detail: String,
}

pub async fn run(ctx: &Context, _args: &Args) -> Result<(), Failure> {
    let mut checks = vec![good("version", format!("choir {}", env!("CARGO_PKG_VERSION")))];
    let client = ctx.anonymous()?;
    checks.push(match client.alive().await {
        Ok(()) => good("reachable", ctx.url.clone()),
        Err(error) => bad("reachable", error.to_string()),
    });
    // Without an answer to the first there is nothing to learn from the others.
    if checks[1].ok {
        match client.readiness().await {
            Ok(parts) => {
                checks.push(match parts.ready {
                    true => good("ready", String::new()),
                    false => bad("ready", parts.missing().join(", ")),
                });
                checks.extend(parts.degraded.into_iter().map(|what| bad("degraded", what)));
            }
            Err(error) => checks.push(bad("ready", error.to_string())),
        }
        signed_in(ctx, &mut checks).await;
    }
    let failed = checks.iter().filter(|c| !c.ok).count();
    if ctx.json {
        output::json(&checks)?;
    } else {
        let rows: Vec<Vec<String>> = checks
            .iter()
            .map(|c| {
                let mark = match (c.ok, c.advice) {
                    (false, _) => "FAILED",
                    (true, true) => "advice",
                    (true, false) => "ok",
                };
                vec![mark.to_owned(), c.name.to_owned(), c.detail.clone()]
            })
            .collect();
        output::line(&output::table(&["RESULT", "CHECK", "DETAIL"], &rows))?;
    }
    if failed == 0 { Ok(()) } else { Err(Failure::Exit(1)) }
}

async fn signed_in(ctx: &Context, checks: &mut Vec<Check>) {
    let client = match ctx.client() {
        Ok(client) => client,
        Err(Failure::Failed(text) | Failure::Usage(text)) => return checks.push(bad("login", text)),
        Err(Failure::Exit(_)) => return,
    };
    match client.me().await {
        Ok(me) => checks.push(match me.user {
            Some(user) => good("login", user.name),
            None => bad("login", "the token is not valid any more; run `choir login`".to_owned()),
        }),
        Err(error) => checks.push(bad("login", error.to_string())),
    }
    match client.box_stats().await {
        Ok(stats) => {
            for (name, version) in &stats.versions {
                checks.push(good("version", format!("{name} {version}")));
            }
            checks.extend(stats.findings.into_iter().map(|finding| bad("box", finding)));
            checks.extend(stats.advice.into_iter().map(|sentence| advice("box", sentence)));
        }
        // Only an admin sees the whole box.
        Err(error) if error.code() == Some("admin_only") || error.code() == Some("scope") => {}
        Err(error) => checks.push(bad("box", error.to_string())),
    }
    match client.workspace(&ctx.workspace).await {
        Ok(workspace) => {
            for slot in Slot::ALL {
                let view = workspace.slots.get(slot);
                let detail = format!("{} {}", view.state, view.reason.as_deref().unwrap_or_default());
                let ok = !matches!(view.state.as_str(), "failed" | "unhealthy");
                let judged = if ok { good } else { bad };
                checks.push(judged(slot.as_str(), detail.trim().to_owned()));
            }
        }
        // Nobody needs to have one, for the box to be well.
        Err(error) if error.status() == Some(404) => {
            checks.push(advice(
                "workspace",
                format!("{} is not there; name another with --workspace", ctx.workspace),
            ));
        }
        Err(error) => checks.push(bad("workspace", error.to_string())),
    }
}

fn good(name: &'static str, detail: String) -> Check {
    Check {
        name,
        ok: true,
        advice: false,
        detail,
    }
}

fn advice(name: &'static str, detail: String) -> Check {
    Check {
        advice: true,
        ..good(name, detail)
    }
}

fn bad(name: &'static str, detail: String) -> Check {
    Check {
        ok: false,
        ..good(name, detail)
    }
}
