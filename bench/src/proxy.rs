//! An authenticated small GET over 64 kept connections: the hypervisor beside nginx, Caddy and
//! configurable-http-proxy. Whatever authenticates and proxies shares one processor; client and app share the other.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::measure::{Bound, Outcome, Row, Series};
use crate::peers::{COOKIE, LOAD, PROXY, Peers};
use crate::podman::timed;
use crate::stage::Stage;

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 9;

/// One proxy, and what was measured of it.
struct Contender {
    name: &'static str,
    port: u16,
    headers: Vec<String>,
    rate: Series,
    p99: Series,
}

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    let processors = std::thread::available_parallelism()?.get();
    ensure!(
        processors >= 2,
        "this benchmark needs two processors: one for the proxy, one for the load"
    );
    stage.restart_hypervisor(&[PROXY]).await?;
    stage.start_app().await?;
    let peers = Peers::start(&stage.setup, stage.scratch.path()).await?;
    let script = stage.scratch.path().join("wrk.lua");
    fs::write(&script, SCRIPT)?;
    stage.pin_app(&[LOAD]).await?;
    let mut all = contenders(stage, &peers)?;
    let seconds = if stage.quick { 1 } else { 2 };
    for contender in &all {
        contender.load(&script, 1)?;
    }
    for _ in 0..stage.rounds(ROUNDS) {
        for contender in &mut all {
            stage.quiet().await?;
            let (rate, p99) = contender.load(&script, seconds)?;
            contender.rate.round([rate]);
            contender.p99.round([p99]);
        }
    }
    stage.restart_hypervisor(&(0..processors).collect::<Vec<_>>()).await?;
    Ok(outcome(name, &all))
}

/// Ourselves first, the bare app last.
fn contenders(stage: &Stage, peers: &Peers) -> Result<Vec<Contender>> {
    let contender = |name: &'static str, port: u16, headers: Vec<String>| Contender {
        name,
        port,
        headers,
        rate: Series::new(format!("{name}, requests per second"), "req/s"),
        p99: Series::new(format!("{name}, p99"), "ms"),
    };
    let session = vec![format!("Cookie: {}={}", COOKIE.0, COOKIE.1)];
    let ours = vec![format!("Host: {}", stage.host()), format!("Cookie: {}", stage.cookie)];
    let port = stage
        .app
        .port_or_known_default()
        .context("the app's address has no port")?;
    Ok(vec![
        contender("ChoirOS", port, ours),
        contender("nginx auth_request", peers.nginx_auth, session.clone()),
        contender("nginx, check on the other core", peers.nginx_helped, session.clone()),
        contender("nginx, no check (return 204)", peers.nginx_return, session.clone()),
        contender("Caddy forward_auth", peers.caddy, session.clone()),
        contender("configurable-http-proxy", peers.node, session.clone()),
        contender("nothing in between", peers.app, session),
    ])
}

/// wrk prints for people; this prints requests, microseconds, p99 in microseconds, and what went wrong.
const SCRIPT: &str = r#"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("\nresult %d %d %d %d\n", summary.requests, summary.duration, latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"#;

impl Contender {
    /// Requests per second, and the 99th percentile in milliseconds.
    fn load(&self, script: &Path, seconds: u32) -> Result<(f64, f64)> {
        let mut wrk = Command::new("taskset");
        wrk.arg("--cpu-list").arg(LOAD.to_string()).args(["wrk", "-t1"]);
        wrk.arg(format!("-c{CONNECTIONS}"))
            .arg(format!("-d{seconds}s"))
            .arg("-s")
            .arg(script);
        for header in &self.headers {
            wrk.arg("-H").arg(header);
        }
        let (_, output) = timed(wrk.arg(format!("http://127.0.0.1:{}/", self.port)))?;
        let result = output.lines().find_map(|line| line.strip_prefix("result "));
        let result = result.with_context(|| format!("wrk wrote no result: {output}"))?;
        let numbers: Vec<f64> = result.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let [requests, duration, p99, wrong] = numbers[..] else {
            anyhow::bail!("wrk wrote {result}");
        };
        ensure!(wrong == 0.0, "{}: {wrong} of {requests} requests went wrong", self.name);
        Ok((requests / duration * 1e6, p99 / 1e3))
    }
}

fn outcome(name: &'static str, all: &[Contender]) -> Outcome {
    let ours = &all[0];
    let rate = |peer: usize, bound: Option<f64>| {
        let peer = &all[peer];
        let row = Row::new("proxy: requests per second", ours.rate.percentile(50.0), "req/s").against(
            peer.name,
            peer.rate.percentile(50.0),
            ours.rate.ratio(&peer.rate),
        );
        match bound {
            Some(least) => row.asked(Bound::RatioAtLeast(least)),
            None => row,
        }
    };
    let p99 = Row::new("proxy: p99", ours.p99.percentile(50.0), "ms")
        .against(all[1].name, all[1].p99.percentile(50.0), ours.p99.ratio(&all[1].p99))
        .asked(Bound::RatioAtMost(1.5));
    Outcome {
        name,
        rows: vec![
            rate(1, Some(0.8)),
            p99,
            rate(2, None),
            rate(3, None),
            rate(4, Some(3.0)),
            rate(5, Some(5.0)),
            rate(6, None),
        ],
        series: all.iter().flat_map(|c| [c.rate.clone(), c.p99.clone()]).collect(),
    }
}
