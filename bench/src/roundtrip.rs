//! What the proxy adds to a websocket's round trip, over the same app reached directly.

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::measure::{Bound, Outcome, Row, Series};
use crate::peers::Running;
use crate::stage::{Stage, until};
use crate::wire::Wire;

const ROUNDS: usize = 30;
const ECHOES: usize = 200;

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    stage.start_app().await?;
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let mut app = Command::new(&stage.setup.app);
    app.arg("serve")
        .arg(format!("tcp:127.0.0.1:{port}"))
        .stdin(Stdio::null());
    let _app = Running::new(app.spawn().context("cannot start the app")?);
    until("the app does not answer", async || {
        Ok(Wire::connect(port, "localhost", None).is_ok())
    })
    .await?;
    let mut direct = Wire::connect(port, "localhost", None)?;
    direct.upgrade()?;
    let mut proxied = stage.proxied()?;
    proxied.upgrade()?;
    let mut ours = Series::new("through the proxy", "µs");
    let mut base = Series::new("direct", "µs");
    for _ in 0..=stage.rounds(ROUNDS) {
        stage.quiet().await?;
        base.round(echoes(&mut direct)?);
        ours.round(echoes(&mut proxied)?);
    }
    // The first round warms up.
    base.rounds.remove(0);
    ours.rounds.remove(0);
    let added = Row::new("websocket: added round trip, p50", ours.added(&base), "µs").asked(Bound::AtMost(100.0));
    let whole = Row::new("websocket: round trip, p50", ours.percentile(50.0), "µs").against(
        "direct",
        base.percentile(50.0),
        ours.ratio(&base),
    );
    Ok(Outcome {
        name,
        series: vec![ours, base],
        rows: vec![added, whole],
    })
}

fn echoes(wire: &mut Wire) -> Result<Vec<f64>> {
    (0..ECHOES).map(|_| Ok(wire.echo()?.as_secs_f64() * 1e6)).collect()
}
