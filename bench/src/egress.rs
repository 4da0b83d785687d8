//! What the way out costs: the same program asks the same server over TLS, from the host directly and from sandboxes
//! through the gateway. It stands on a ChoirOS of its own, beside which that server can be found and believed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use choir_api::client::{Client, Credential, SlotVerb};
use choir_api::grants::CreateGrant;
use choir_api::sandbox::{Command as Line, CreateTask, ExecRequest};
use choir_api::secrets::{PutSecret, SecretText};
use choir_core::{Name, Slot, WorkspaceSettings};
use choir_e2e::instance::Instance;
use choir_e2e::upstream::{Answer, Seen, Upstream, pieces, streamed, whole};
use futures_util::stream;
use http::StatusCode;
use tempfile::TempDir;
use tokio::process::Command;

use crate::measure::{Bound, Outcome, Row, Series};
use crate::memory;
use crate::person::Person;
use crate::stage::{PATIENCE, Stage, until};

const HOST: &str = "api.bench.example";
const ROUNDS: usize = 12;
const DOWNLOADS: usize = 5;
/// Requests on one connection; the first, which makes it, does not count.
const REQUESTS: usize = 300;
/// At once from one sandbox, which has 64 connections in all.
const AT_ONCE: usize = 60;
/// Two sandboxes each; so many that a thousand streams are open.
const WORKSPACES: usize = 8;
const STREAMS: usize = 1000;
const GIB: usize = 1 << 30;
const PIECE: usize = 64 * 1024;

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    let open = Arc::<AtomicUsize>::default();
    let counted = open.clone();
    let upstream = Upstream::start(&[HOST], move |seen| answer(seen, counted.clone())).await?;
    let outside = Outside::beside(&upstream).await?;
    let mut series = Vec::new();
    let mut rows = Vec::new();
    outside.latency(stage, &mut series, &mut rows).await?;
    outside.download(stage, &mut series, &mut rows).await?;
    outside.streams(stage, &open, &mut rows).await?;
    Ok(Outcome { name, series, rows })
}

/// What the server says; `open` counts the streams that are under way.
async fn answer(seen: Seen, open: Arc<AtomicUsize>) -> Answer {
    match seen.path().split('/').nth(1) {
        Some("big") => pieces(
            "application/octet-stream",
            vec![Bytes::from(vec![7; PIECE]); GIB / PIECE],
        ),
        Some("events") => {
            let ticks = (tokio::time::interval(Duration::from_secs(1)), Open::new(open));
            let events = stream::unfold(ticks, |(mut every, open)| async move {
                every.tick().await;
                Some((Bytes::from_static(b"data: tick\n\n"), (every, open)))
            });
            streamed("text/event-stream", events)
        }
        _ => whole(StatusCode::OK, "text/plain", "small"),
    }
}

/// One stream that is under way.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(all: Arc<AtomicUsize>) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self(all)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How a program gets out.
#[derive(Clone, Copy)]
enum Way {
    /// From the host, with nothing in between.
    Direct,
    /// Through the gateway, TLS from end to end.
    Through,
    /// By the broker's base URL, with a secret put in.
    Broker,
    /// In TLS that the gateway answers in the host's name, with a secret put in.
    Taken,
}

/// A ChoirOS beside a server that it can find, with one granted secret.
struct Outside<'u> {
    instance: Instance,
    upstream: &'u Upstream,
    client: Client,
    authority: TempDir,
}

impl<'u> Outside<'u> {
    async fn beside(upstream: &'u Upstream) -> Result<Self> {
        let instance = Instance::up_beside(&[upstream], &[upstream.network()])?;
        let anonymous = Client::new(instance.origin().as_str(), Credential::None)?;
        let link = instance.claim_link()?;
        let (_, invite) = link.split_once("invite=").context("the claim link has no invite")?;
        let client = Person::default().register(&anonymous, "ada", invite).await?;
        let put = PutSecret {
            value: SecretText::new("bench-8f3a61c07d2be94518f3a61c07d2be945".to_owned()),
            reveal: false,
        };
        client.put_secret(&"API".parse()?, &put).await?;
        for nth in 0..WORKSPACES {
            client.create_workspace(&workspace(nth)?).await?;
        }
        let authority = tempfile::tempdir()?;
        std::fs::write(authority.path().join("authority.pem"), upstream.authority())?;
        let outside = Self {
            instance,
            upstream,
            client,
            authority,
        };
        outside.grant(0, Slot::Live).await?;
        Ok(outside)
    }

    /// Starts a sandbox in which the secret may be used.
    async fn grant(&self, nth: usize, slot: Slot) -> Result<()> {
        let grant = CreateGrant {
            workspace: workspace(nth)?,
            slot,
            capability: "api".parse()?,
            secret: "API".parse()?,
            template: Some("bearer".to_owned()),
            hosts: Some(vec![HOST.parse()?]),
            methods: Some(vec!["GET".to_owned()]),
            path_prefix: None,
            inject: None,
            expires_at: None,
        };
        self.client.create_grant(&grant).await?;
        let view = self
            .client
            .ask_slot(&workspace(nth)?, slot, SlotVerb::Start, PATIENCE)
            .await?;
        ensure!(view.state == "ready", "{slot} does not start: {:?}", view.reason);
        Ok(())
    }

    /// What curl says of each request of a path, which may be a range of paths. It makes one connection for all, or
    /// `at_once`.
    async fn curl(&self, way: Way, path: &str, tell: &str, at_once: usize) -> Result<Vec<f64>> {
        let parallel = match at_once {
            1 => String::new(),
            many => format!("-Z --parallel-immediate --parallel-max {many}"),
        };
        let base = match way {
            Way::Broker => "$CHOIR_BROKER_URL/v1/egress/api".to_owned(),
            _ => format!("https://{HOST}"),
        };
        let line = format!("curl -fsS {parallel} -o /dev/null -w '%{{{tell}}}\\n' \"{base}/{path}\"");
        let told = match way {
            Way::Direct => {
                let mut command = Command::new("sh");
                let resolve = format!(
                    "--resolve {HOST}:443:{} --cacert {}",
                    self.upstream.wire.address,
                    self.authority.path().join("authority.pem").display()
                );
                command
                    .arg("-c")
                    .arg(line.replacen("curl", &format!("curl {resolve}"), 1));
                let output = command.output().await?;
                let told = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "`{line}` failed on the host: {told}");
                String::from_utf8(output.stdout)?
            }
            Way::Through => self.inside(&line.replacen("curl", "curl -k", 1)).await?,
            Way::Broker | Way::Taken => self.inside(&line).await?,
        };
        told.lines().map(|line| Ok(line.parse()?)).collect()
    }

    async fn inside(&self, line: &str) -> Result<String> {
        let request = ExecRequest {
            command: Line::Line(line.to_owned()),
            cwd: None,
            env: BTreeMap::new(),
            stdin: None,
            timeout_ms: Some(300_000),
            max_output_bytes: None,
        };
        let done = self.client.sandbox(&workspace(0)?, Slot::Live).exec(&request).await?;
        ensure!(done.exit.exit_code == 0, "`{line}` failed: {}", done.stderr);
        Ok(done.stdout)
    }

    async fn intercept(&self, on: bool) -> Result<()> {
        let settings = WorkspaceSettings {
            intercept_tls: Some(on),
            ..WorkspaceSettings::default()
        };
        self.client.patch_workspace(&workspace(0)?, &settings).await?;
        Ok(())
    }

    /// Small requests one after another on a kept connection, and a thousand of them at once.
    async fn latency(&self, stage: &mut Stage, series: &mut Vec<Series>, rows: &mut Vec<Row>) -> Result<()> {
        let mut all = [
            (Way::Direct, Series::new("small request, direct", "ms")),
            (Way::Through, Series::new("small request, through the gateway", "ms")),
            (Way::Broker, Series::new("small request, by the broker", "ms")),
            (Way::Taken, Series::new("small request, in the host's name", "ms")),
        ];
        let path = format!("small/[1-{}]", REQUESTS + 1);
        for round in 0..=stage.rounds(ROUNDS) {
            stage.quiet().await?;
            for (way, samples) in &mut all {
                self.intercept(matches!(way, Way::Taken)).await?;
                let told = self.curl(*way, &path, "time_total", 1).await?;
                ensure!(told.len() == REQUESTS + 1, "{} answers came", told.len());
                // The first round warms up.
                if round > 0 {
                    samples.round(told[1..].iter().map(|seconds| seconds * 1e3));
                }
            }
        }
        let [direct, ways @ ..] = all.map(|(_, samples)| samples);
        for (what, samples, limit) in [
            ("passed on", &ways[0], 1.0),
            ("with a secret, by the broker", &ways[1], 6.0),
            ("with a secret, in the host's name", &ways[2], 6.0),
        ] {
            let row = Row::new(
                format!("egress: small request {what}, added p50"),
                samples.added(&direct),
                "ms",
            );
            let (value, ratio) = (direct.percentile(50.0), samples.ratio(&direct));
            rows.push(row.against("direct", value, ratio).asked(Bound::AtMost(limit)));
        }
        series.extend([direct].into_iter().chain(ways));
        let mut many = Series::new("1,000 requests at once, by the broker", "ms");
        for _ in 0..stage.rounds(ROUNDS) {
            stage.quiet().await?;
            let begun = Instant::now();
            self.curl(Way::Broker, "small/[1-1000]", "time_total", AT_ONCE).await?;
            many.round([begun.elapsed().as_secs_f64() * 1e3]);
        }
        let each = many.percentile(50.0) / 1000.0;
        rows.push(Row::new(
            format!("egress: a request of 1,000 with a secret, {AT_ONCE} at once"),
            each,
            "ms",
        ));
        series.push(many);
        Ok(())
    }

    async fn download(&self, stage: &mut Stage, series: &mut Vec<Series>, rows: &mut Vec<Row>) -> Result<()> {
        let mut all = [
            (Way::Direct, Series::new("download, direct", "MiB/s")),
            (Way::Through, Series::new("download, through the gateway", "MiB/s")),
            (Way::Broker, Series::new("download, by the broker", "MiB/s")),
        ];
        self.intercept(false).await?;
        for round in 0..=stage.rounds(DOWNLOADS) {
            stage.quiet().await?;
            for (way, samples) in &mut all {
                let told = self.curl(*way, "big", "speed_download", 1).await?;
                if round > 0 {
                    samples.round(told.iter().map(|speed| speed / 1024.0 / 1024.0));
                }
            }
        }
        let [direct, through, broker] = all.map(|(_, samples)| samples);
        let against =
            |row: Row, samples: &Series| row.against("direct", direct.percentile(50.0), samples.ratio(&direct));
        let row = Row::new("egress: 1 GiB passed on", through.percentile(50.0), "MiB/s");
        rows.push(against(row, &through).asked(Bound::RatioAtLeast(0.8)));
        let row = Row::new(
            "egress: 1 GiB with a secret, by the broker",
            broker.percentile(50.0),
            "MiB/s",
        );
        rows.push(against(row, &broker));
        series.extend([direct, through, broker]);
        Ok(())
    }

    /// A thousand streams of events with a secret, from as many sandboxes as that takes.
    async fn streams(&self, stage: &mut Stage, open: &AtomicUsize, rows: &mut Vec<Row>) -> Result<()> {
        let sandboxes: Vec<(usize, Slot)> = (0..WORKSPACES)
            .flat_map(|nth| Slot::ALL.map(|slot| (nth, slot)))
            .collect();
        for (nth, slot) in sandboxes.iter().filter(|one| **one != (0, Slot::Live)) {
            self.grant(*nth, *slot).await?;
        }
        let hypervisor = u32::try_from(self.instance.hypervisor_pid()?)?;
        let each = STREAMS.div_ceil(sandboxes.len());
        let (mut wanted, mut held) = (0, Vec::new());
        // What the first half costs once, such as code that was never run before, is no stream's.
        for half in sandboxes.chunks(sandboxes.len() / 2) {
            for (nth, slot) in half {
                self.listen(*nth, *slot, each).await?;
            }
            wanted += each * half.len();
            let all = until("not all streams are open", async || {
                Ok(open.load(Ordering::Relaxed) == wanted)
            });
            let told = all.await;
            told.with_context(|| format!("{} of {wanted} are", open.load(Ordering::Relaxed)))?;
            stage.quiet().await?;
            held.push(memory::of(hypervisor)?.0);
        }
        let still = open.load(Ordering::Relaxed);
        ensure!(still == wanted, "{still} of {wanted} streams are open");
        #[expect(clippy::cast_precision_loss, reason = "a number of streams is small")]
        let one = (held[1] - held[0]) * 1024.0 / (wanted / 2) as f64;
        let row = Row::new(
            format!("egress: memory of one of {wanted} streams with a secret"),
            one,
            "KiB",
        );
        rows.push(row.asked(Bound::AtMost(32.0)));
        Ok(())
    }

    /// Leaves this many streams of events open in a sandbox.
    async fn listen(&self, nth: usize, slot: Slot, many: usize) -> Result<()> {
        let line = format!(
            "curl -sSN -Z --parallel-immediate --parallel-max {many} -o /dev/null \
             \"$CHOIR_BROKER_URL/v1/egress/api/events/[1-{many}]\""
        );
        let task = CreateTask {
            command: Line::Line(line),
            cwd: None,
            env: BTreeMap::new(),
            timeout_ms: None,
        };
        self.client.sandbox(&workspace(nth)?, slot).create_task(&task).await?;
        Ok(())
    }
}

fn workspace(nth: usize) -> Result<Name> {
    Ok(format!("w{nth}").parse()?)
}
