//! The table people read and the JSON files that stay. It must not judge beyond what a row says.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::measure::{Bound, Outcome, Row, Summary};
use crate::setup::{About, Setup};

/// What was measured so far.
#[derive(Default)]
pub struct Report {
    results: Vec<Written>,
}

#[derive(Serialize)]
struct Written {
    name: &'static str,
    #[serde(flatten)]
    about: About,
    quick: bool,
    rounds: usize,
    rows: Vec<Judged>,
    series: BTreeMap<String, Summary>,
}

#[derive(Serialize)]
struct Judged {
    #[serde(flatten)]
    row: Row,
    verdict: String,
}

impl Report {
    /// Keeps a result, and writes it to its file.
    pub fn add(&mut self, setup: &Setup, quick: bool, outcome: Outcome) -> Result<()> {
        let written = Written {
            name: outcome.name,
            about: setup.about.clone(),
            quick,
            rounds: outcome.series.iter().map(|s| s.rounds.len()).max().unwrap_or_default(),
            series: outcome.series.iter().map(|s| (s.name.clone(), s.summary())).collect(),
            rows: outcome
                .rows
                .into_iter()
                .map(|row| Judged {
                    verdict: row.verdict(),
                    row,
                })
                .collect(),
        };
        let file = setup.out.join(format!("{}.json", outcome.name));
        fs::write(&file, serde_json::to_string_pretty(&written)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        self.results.push(written);
        Ok(())
    }

    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(&self.results)?)
    }

    /// GitHub's table syntax, so that a README can quote it.
    pub fn table(&self) -> String {
        let head = ["benchmark", "ChoirOS", "peer", "ratio", "asked", ""].map(str::to_owned);
        let mut lines = vec![head];
        for result in &self.results {
            lines.extend(result.rows.iter().map(cells));
        }
        let widths = [0, 1, 2, 3, 4, 5].map(|column| {
            let lengths = lines.iter().map(|line| line[column].chars().count());
            lengths.max().unwrap_or_default()
        });
        lines.insert(1, widths.map(|width| "-".repeat(width.max(1))));
        lines.iter().map(|line| aligned(line, &widths)).collect()
    }
}

fn aligned(line: &[String; 6], widths: &[usize; 6]) -> String {
    let cells = line.iter().zip(widths).map(|(cell, width)| format!(" {cell:width$} |"));
    format!("|{}\n", cells.collect::<String>())
}

fn cells(judged: &Judged) -> [String; 6] {
    let row = &judged.row;
    let (peer, ratio) = match &row.peer {
        Some(peer) => (
            format!("{}: {}", peer.name, figure(peer.value, row.unit)),
            format!("{:.2} x", peer.ratio),
        ),
        None => (String::new(), String::new()),
    };
    let asked = match row.bound {
        Some(Bound::AtMost(limit)) => format!("<= {}", figure(limit, row.unit)),
        Some(Bound::RatioAtMost(limit)) => format!("<= {limit} x"),
        Some(Bound::RatioAtLeast(limit)) => format!(">= {limit} x"),
        None => String::new(),
    };
    [
        row.what.clone(),
        figure(row.ours, row.unit),
        peer,
        ratio,
        asked,
        judged.verdict.clone(),
    ]
}

/// Three digits are more than a shared machine can vouch for.
fn figure(value: f64, unit: &str) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$} {unit}")
}
