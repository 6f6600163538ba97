//! What the user sees. Standard output carries the answer, and with `--json` one JSON value and nothing else; everything
//! that is about the work rather than its result goes to standard error.
//!
//! A reader that goes away (`coeval model list | head`) is no error, so failed writes are passed over.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::ColorWhen;

const TICK: Duration = Duration::from_millis(120);

#[derive(Debug)]
pub struct Output {
    json: bool,
    color: bool,
    verbosity: u8,
}

impl Output {
    pub fn new(json: bool, color: ColorWhen, verbosity: u8) -> Self {
        let color = match color {
            ColorWhen::Always => true,
            ColorWhen::Never => false,
            ColorWhen::Auto => {
                let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
                let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
                io::stderr().is_terminal() && !unwanted && !dumb
            }
        };
        Self { json, color, verbosity }
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether standard error takes colours.
    pub fn has_color(&self) -> bool {
        self.color
    }

    pub fn verbosity(&self) -> u8 {
        self.verbosity
    }

    /// A line of the answer; nothing with `--json`.
    pub fn line(&self, text: impl AsRef<str>) {
        if !self.json {
            let _ = writeln!(io::stdout().lock(), "{}", text.as_ref());
        }
    }

    /// The whole answer; nothing without `--json`.
    pub fn json(&self, value: &impl Serialize) {
        if self.json {
            // What is printed has text keys, so JSON can say it.
            let text = serde_json::to_string_pretty(value).expect("answers are representable in JSON");
            let _ = writeln!(io::stdout().lock(), "{text}");
        }
    }

    /// Rows under headings, in columns as wide as they need to be.
    pub fn table(&self, headings: &[&str], rows: &[Vec<String>]) {
        for line in aligned(headings, rows) {
            self.line(line);
        }
    }

    /// Something about the work.
    pub fn note(&self, text: impl AsRef<str>) {
        let _ = writeln!(io::stderr().lock(), "{}", text.as_ref());
    }

    /// Text that has its own line ends, on standard error.
    pub fn raw(&self, text: &str) {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// An error and its causes, each once.
    pub fn error(&self, error: &(dyn std::error::Error + 'static)) {
        let (bold, plain) = if self.color { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
        self.note(format!("{bold}error{plain}: {error}"));
        let mut said = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            if !said.contains(&text) {
                self.note(format!("  caused by: {text}"));
                said = text;
            }
            source = cause.source();
        }
    }

    /// A bar over a known total, or a counter where it is not known. Drawn on a terminal only.
    pub fn progress(&self, total: Option<u64>, unit: &str) -> ProgressBar {
        if self.json || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                format!("{{msg}} [{{bar:30}}] {{human_pos}}/{{human_len}} {unit}, {{per_sec}}, {{eta}} left"),
            ),
            None => (ProgressBar::new_spinner(), format!("{{spinner}} {{msg}} {{human_pos}} {unit}, {{per_sec}}")),
        };
        let style = ProgressStyle::with_template(&template).expect("the template is a constant that indicatif accepts");
        bar.set_style(style.progress_chars("=> "));
        bar.enable_steady_tick(TICK);
        bar
    }

    /// A spinner with words.
    pub fn waiting(&self) -> ProgressBar {
        if self.json || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {elapsed} {msg}");
        bar.set_style(style.expect("the template is a constant that indicatif accepts"));
        bar.enable_steady_tick(TICK);
        bar
    }
}

fn aligned(headings: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headings[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let head = line(headings.to_vec());
    std::iter::once(head).chain(rows.iter().map(|row| line(row.iter().map(String::as_str).collect()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), String::new()]];
        assert_eq!(aligned(&["NAME", "ROWS"], &rows), ["NAME  ROWS", "a     1", "long"]);
    }
}
