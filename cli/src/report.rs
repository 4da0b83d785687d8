//! The steps that were run, each with its time. A step that was not run is not in it.

use std::future::Future;
use std::time::Instant;

use serde::Serialize;

use crate::failure::Failure;
use crate::output;

/// One step that was run.
#[derive(Debug, Serialize)]
pub struct Step {
    pub name: String,
    pub ok: bool,
    pub ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// All of them, in order.
#[derive(Debug, Serialize)]
pub struct Report {
    pub ok: bool,
    pub steps: Vec<Step>,
    /// Whether lines are written as steps end.
    #[serde(skip)]
    quiet: bool,
}

impl Report {
    pub fn new(quiet: bool) -> Self {
        Self {
            ok: true,
            steps: Vec::new(),
            quiet,
        }
    }

    /// Runs one step and writes it down.
    pub async fn step<T>(&mut self, name: &str, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let begun = Instant::now();
        let outcome = work.await;
        let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let reason = match &outcome {
            Ok(_) => None,
            Err(Failure::Usage(text) | Failure::Failed(text)) => Some(text.clone()),
            Err(Failure::Exit(code)) => Some(format!("exit code {code}")),
        };
        self.ok &= reason.is_none();
        if !self.quiet {
            let mark = if reason.is_none() { "ok    " } else { "FAILED" };
            let reason = reason
                .as_ref()
                .map_or(String::new(), |r| format!("  {}", output::plain(r)));
            output::line(&format!("{mark}  {:>9}  {name}{reason}", output::duration(ms)))?;
        }
        self.steps.push(Step {
            name: name.to_owned(),
            ok: reason.is_none(),
            ms,
            reason,
        });
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_was_run_is_reported_and_one_failure_is_enough() {
        let mut report = Report::new(true);
        report.step("one", async { Ok(()) }).await.unwrap();
        let failed = report
            .step("two", async { Err::<(), _>(Failure::Failed("why".into())) })
            .await;
        assert!(failed.is_err() && !report.ok);
        let names: Vec<(&str, bool)> = report.steps.iter().map(|s| (s.name.as_str(), s.ok)).collect();
        assert_eq!(names, [("one", true), ("two", false)]);
        assert_eq!(report.steps[1].reason.as_deref(), Some("why"));
    }
}
