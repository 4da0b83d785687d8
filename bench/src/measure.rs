//! Samples, percentiles and what is asked of them. It must not know what was measured.

use serde::Serialize;

/// Samples of one thing, by round.
#[derive(Clone)]
pub struct Series {
    pub name: String,
    pub unit: &'static str,
    pub rounds: Vec<Vec<f64>>,
}

impl Series {
    pub fn new(name: impl Into<String>, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            unit,
            rounds: Vec::new(),
        }
    }

    /// One round's samples.
    pub fn round(&mut self, samples: impl IntoIterator<Item = f64>) {
        self.rounds.push(samples.into_iter().collect());
    }

    /// Over all rounds' samples together.
    pub fn percentile(&self, percent: f64) -> f64 {
        percentile(&self.rounds.concat(), percent)
    }

    /// Round by round against `peer`: the median of the ratios of both medians.
    pub fn ratio(&self, peer: &Self) -> f64 {
        let ratios = self.rounds.iter().zip(&peer.rounds);
        median(
            &ratios
                .map(|(ours, theirs)| median(ours) / median(theirs))
                .collect::<Vec<_>>(),
        )
    }

    /// Round by round: the median of the differences of both medians.
    pub fn added(&self, base: &Self) -> f64 {
        let both = self.rounds.iter().zip(&base.rounds);
        median(
            &both
                .map(|(ours, theirs)| median(ours) - median(theirs))
                .collect::<Vec<_>>(),
        )
    }

    pub fn summary(&self) -> Summary {
        Summary {
            unit: self.unit,
            all: Percentiles::of(&self.rounds.concat()),
            rounds: self.rounds.iter().map(|round| Percentiles::of(round)).collect(),
        }
    }
}

/// A series as it is written down.
#[derive(Serialize)]
pub struct Summary {
    unit: &'static str,
    #[serde(flatten)]
    all: Percentiles,
    rounds: Vec<Percentiles>,
}

#[derive(Serialize)]
struct Percentiles {
    samples: usize,
    p50: f64,
    p99: f64,
}

impl Percentiles {
    fn of(samples: &[f64]) -> Self {
        Self {
            samples: samples.len(),
            p50: median(samples),
            p99: percentile(samples, 99.0),
        }
    }
}

/// One line of the table.
#[derive(Serialize)]
pub struct Row {
    pub what: String,
    pub ours: f64,
    pub unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<Peer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<Bound>,
}

/// The peer's figure, and ours as a multiple of it.
#[derive(Serialize)]
pub struct Peer {
    pub name: String,
    pub value: f64,
    pub ratio: f64,
}

/// What is asked, of our figure or of the ratio.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtMost(f64),
    RatioAtMost(f64),
    RatioAtLeast(f64),
}

impl Row {
    pub fn new(what: impl Into<String>, ours: f64, unit: &'static str) -> Self {
        Self {
            what: what.into(),
            ours,
            unit,
            peer: None,
            bound: None,
        }
    }

    pub fn against(mut self, name: impl Into<String>, value: f64, ratio: f64) -> Self {
        self.peer = Some(Peer {
            name: name.into(),
            value,
            ratio,
        });
        self
    }

    pub fn asked(mut self, bound: Bound) -> Self {
        self.bound = Some(bound);
        self
    }

    /// `met`, or by how much it was missed; nothing where nothing is asked.
    pub fn verdict(&self) -> String {
        let ratio = self.peer.as_ref().map_or(f64::NAN, |peer| peer.ratio);
        let excess = match self.bound {
            None => return String::new(),
            Some(Bound::AtMost(limit)) => self.ours / limit - 1.0,
            Some(Bound::RatioAtMost(limit)) => ratio / limit - 1.0,
            Some(Bound::RatioAtLeast(limit)) => 1.0 - ratio / limit,
        };
        // A ratio that is no number is a miss.
        if excess <= 0.0 {
            "met".to_owned()
        } else {
            format!("MISSED by {:.0} %", excess * 100.0)
        }
    }
}

/// One benchmark's result.
pub struct Outcome {
    pub name: &'static str,
    pub series: Vec<Series>,
    pub rows: Vec<Row>,
}

pub fn median(samples: &[f64]) -> f64 {
    percentile(samples, 50.0)
}

/// Nearest rank; not a number where there are no samples.
pub fn percentile(samples: &[f64], percent: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank is a small whole number"
    )]
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_that_were_measured() {
        let samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!((median(&samples), percentile(&samples, 99.0)), (100.0, 198.0));
        assert!(percentile(&[], 50.0).is_nan());
    }

    #[test]
    fn a_slow_round_of_both_does_not_change_the_ratio() {
        let (mut ours, mut theirs) = (Series::new("a", "ms"), Series::new("b", "ms"));
        for noise in [1.0, 10.0, 1.0] {
            ours.round([2.0 * noise]);
            theirs.round([4.0 * noise]);
        }
        assert_eq!(ours.ratio(&theirs), 0.5);
    }

    #[test]
    fn a_miss_is_named_with_its_size_and_a_ratio_without_a_peer_is_a_miss() {
        let row = |bound| {
            Row::new("x", 6.0, "ms")
                .against("peer", 10.0, 0.6)
                .asked(bound)
                .verdict()
        };
        assert_eq!(row(Bound::AtMost(5.0)), "MISSED by 20 %");
        assert_eq!(row(Bound::RatioAtLeast(0.8)), "MISSED by 25 %");
        assert_eq!(row(Bound::RatioAtMost(1.0)), "met");
        let alone = Row::new("x", 1.0, "").asked(Bound::RatioAtMost(1.0));
        assert!(alone.verdict().starts_with("MISSED"));
    }
}
