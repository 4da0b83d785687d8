//! How results look: JSON for programs, aligned tables for people. It must not know where results come from.

use std::io::{self, Write as _};

use jiff::Timestamp;
use serde::Serialize;

use crate::failure::Failure;

/// Writes one line to the standard output; a reader that left is not an error worth a sentence.
pub fn line(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(())
}

pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::Failed(e.to_string()))?;
    line(&text)
}

/// Text from elsewhere without what could move the cursor, recolour the terminal or turn the line around.
pub fn plain(text: &str) -> String {
    let hostile = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if hostile(c) { '\u{fffd}' } else { c }).collect()
}

/// Rows under headings, columns aligned, nothing behind the last column.
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let cells: Vec<Vec<String>> = std::iter::once(headings.iter().map(|h| (*h).to_owned()).collect())
        .chain(rows.iter().map(|row| row.iter().map(|c| plain(c)).collect()))
        .collect();
    let width = |column: usize| {
        let widths = cells.iter().filter_map(|row: &Vec<String>| row.get(column));
        widths.map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let lines: Vec<String> = cells
        .iter()
        .map(|row| {
            let padded: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            padded.join("  ").trim_end().to_owned()
        })
        .collect();
    lines.join("\n")
}

/// How long ago, in the largest unit that fits.
pub fn ago(then: Option<Timestamp>, now: Timestamp) -> String {
    let Some(then) = then else { return "-".to_owned() };
    let seconds = now.as_second() - then.as_second();
    match seconds {
        i64::MIN..=0 => "now".to_owned(),
        1..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Milliseconds as people read them.
pub fn duration(ms: u64) -> String {
    if ms < 1000 {
        format!("{ms} ms")
    } else {
        format!("{}.{} s", ms / 1000, ms % 1000 / 100)
    }
}

/// Bytes as people read them, in powers of 1024.
pub fn bytes(bytes: u64) -> String {
    let (unit, shift) = match bytes {
        0..0x400 => return format!("{bytes} B"),
        0x400..0x10_0000 => ("KiB", 10),
        0x10_0000..0x4000_0000 => ("MiB", 20),
        _ => ("GiB", 30),
    };
    let tenths = bytes.saturating_mul(10) >> shift;
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        let rows = [
            vec!["live".to_owned(), "ready".to_owned(), "1".to_owned()],
            vec!["dev".to_owned(), "ä".to_owned(), String::new()],
        ];
        let expected = "SLOT  STATE  GEN\nlive  ready  1\ndev   ä";
        assert_eq!(table(&["SLOT", "STATE", "GEN"], &rows), expected);
    }

    #[test]
    fn a_name_cannot_write_escape_sequences_to_the_terminal() {
        let text = table(&["A"], &[vec!["\u{1b}[2Jx\u{202e}\n".to_owned()]]);
        assert_eq!(text, "A\n\u{fffd}[2Jx\u{fffd}\u{fffd}");
    }

    #[test]
    fn times_and_durations_read_well() {
        let at = |s| Timestamp::from_second(s).unwrap();
        let ago = |s: i64| ago(Some(at(1_000_000 - s)), at(1_000_000));
        assert_eq!([ago(-5), ago(5), ago(65)], ["now", "5 s ago", "1 min ago"]);
        assert_eq!([ago(7200), ago(200_000)], ["2 h ago", "2 days ago"]);
        assert_eq!([duration(42), duration(1234)], ["42 ms", "1.2 s"]);
        let sizes = [20, 1536, 5 << 20, 3 << 29].map(bytes);
        assert_eq!(sizes, ["20 B", "1.5 KiB", "5.0 MiB", "1.5 GiB"]);
    }
}
