//! A snapshot of a volume with 200,000 files through choir-volumes, beside `btrfs subvolume snapshot` of its home.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::measure::{Bound, Outcome, Row, Series};
use crate::podman::timed;
use crate::stage::Stage;

const ROUNDS: usize = 25;
const DIRECTORIES: usize = 200;
const FILES: usize = 1000;
const VOLUME: &str = "bench-files";
const COPY: &str = "bench-copy";
/// Not a volume of choir-volumes: the peer's.
const PEER: &str = "bench-peer";

pub async fn run(name: &'static str, stage: &mut Stage) -> Result<Outcome> {
    let mut helper = Helper::connect(&stage.setup.volumes_socket)?;
    let hello = helper.ask(&json!({"verb": "hello"}))?;
    ensure!(
        hello["backend"] == "btrfs",
        "volumes are not on btrfs here: there is nothing to compare"
    );
    helper.ask(&json!({"verb": "create", "volume": VOLUME}))?;
    let done = measure(name, stage, &mut helper).await;
    for volume in [COPY, VOLUME] {
        helper.ask(&json!({"verb": "delete", "volume": volume}))?;
    }
    done
}

async fn measure(name: &'static str, stage: &mut Stage, helper: &mut Helper) -> Result<Outcome> {
    let home = stage.setup.volumes.join(VOLUME).join("home");
    let peer = stage.setup.volumes.join(PEER);
    fill(&home)?;
    timed(
        Command::new("btrfs")
            .args(["filesystem", "sync"])
            .arg(&stage.setup.volumes),
    )?;
    let mut ours = Series::new("choir-volumes, snapshot", "ms");
    let mut theirs = Series::new("btrfs subvolume snapshot", "ms");
    for _ in 0..=stage.rounds(ROUNDS) {
        stage.quiet().await?;
        let begun = Instant::now();
        helper.ask(&json!({"verb": "snapshot", "source": VOLUME, "volume": COPY, "readonly": true}))?;
        ours.round([begun.elapsed().as_secs_f64() * 1e3]);
        let mut snapshot = Command::new("btrfs");
        let (took, _) = timed(snapshot.args(["subvolume", "snapshot", "-r"]).arg(&home).arg(&peer))?;
        theirs.round([took.as_secs_f64() * 1e3]);
        timed(Command::new("btrfs").args(["subvolume", "delete"]).arg(&peer))?;
        helper.ask(&json!({"verb": "delete", "volume": COPY}))?;
    }
    // The first round warms up.
    ours.rounds.remove(0);
    theirs.rounds.remove(0);
    let row = Row::new("snapshot of 200,000 files, p50", ours.percentile(50.0), "ms")
        .against("btrfs subvolume snapshot", theirs.percentile(50.0), ours.ratio(&theirs))
        .asked(Bound::AtMost(50.0));
    Ok(Outcome {
        name,
        series: vec![ours, theirs],
        rows: vec![row],
    })
}

fn fill(home: &Path) -> Result<()> {
    for directory in 0..DIRECTORIES {
        let directory = home.join(directory.to_string());
        fs::create_dir(&directory).with_context(|| format!("cannot write {}", directory.display()))?;
        for file in 0..FILES {
            fs::write(directory.join(file.to_string()), "a small file\n")?;
        }
    }
    Ok(())
}

/// A connection to choir-volumes: a line out, a line back.
struct Helper(BufReader<UnixStream>);

impl Helper {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot reach {}", socket.display()))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        self.0.get_mut().write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line).context("choir-volumes hung up")?;
        ensure!(
            answer.get("error").is_none(),
            "choir-volumes refused {request}: {answer}"
        );
        Ok(answer)
    }
}
