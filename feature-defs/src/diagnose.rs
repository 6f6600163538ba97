//! Diagnostics: where something was said, what is wrong with it, and how the terminal shows it.
//!
//! Everything a user writes carries a [`Span`], so that an error found late (a cycle between transforms, a column that
//! no source has) still points at the words that caused it. A span is a range of bytes; lines and columns are computed
//! only when somebody looks.

use std::ops::Deref;

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Element, Group, Level, Origin, Renderer, Snippet};
use serde::Serialize;

use crate::catalog::{Files, SourceFile};

/// A range of bytes in one definition file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Span {
    /// Index into [`crate::catalog::Files`].
    pub file: u32,
    pub start: u32,
    pub end: u32,
}

impl Span {
    /// For what is wrong in no file at all, such as a missing one.
    pub const NOWHERE: Span = Span { file: u32::MAX, start: 0, end: 0 };
}

/// A value and where it was written. Derefs to the value.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spanned<T> {
    pub value: T,
    pub span: Span,
}

impl<T> Spanned<T> {
    pub fn new(value: T, span: Span) -> Spanned<T> {
        Spanned { value, span }
    }
}

impl<T> Deref for Spanned<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: PartialEq> PartialEq for Spanned<T> {
    fn eq(&self, other: &Spanned<T>) -> bool {
        self.value == other.value
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Error,
    Warning,
}

/// One thing that is wrong, in one place.
#[derive(Debug, Clone)]
pub struct Diagnostic {
    pub severity: Severity,
    /// What is wrong: a sentence fragment without a full stop.
    pub message: String,
    pub span: Span,
    /// Shown under the marked text.
    pub label: Option<String>,
    /// The next step: "did you mean `temp`?".
    pub help: Option<String>,
    /// Another place that belongs to it, and why: "the first is here".
    pub related: Option<(String, Span)>,
}

impl Diagnostic {
    pub fn error(message: impl Into<String>, span: Span) -> Diagnostic {
        Diagnostic { severity: Severity::Error, message: message.into(), span, label: None, help: None, related: None }
    }

    pub fn warning(message: impl Into<String>, span: Span) -> Diagnostic {
        Diagnostic { severity: Severity::Warning, ..Diagnostic::error(message, span) }
    }

    pub fn label(mut self, label: impl Into<String>) -> Diagnostic {
        self.label = Some(label.into());
        self
    }

    pub fn help(mut self, help: impl Into<String>) -> Diagnostic {
        self.help = Some(help.into());
        self
    }

    pub fn related(mut self, message: impl Into<String>, span: Span) -> Diagnostic {
        self.related = Some((message.into(), span));
        self
    }

    /// Adds "did you mean" when one of the candidates is near `name`, else the list of candidates when it is short.
    pub fn nearest<'a>(self, name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Diagnostic {
        let candidates: Vec<&str> = candidates.into_iter().collect();
        match nearest(name, candidates.iter().copied()) {
            Some(near) => self.help(format!("did you mean `{near}`?")),
            None if (1..=LISTED_MAX).contains(&candidates.len()) => {
                let listed: Vec<String> =
                    candidates.iter().map(|candidate| format!("`{}`", shown(candidate))).collect();
                self.help(format!("known here: {}", listed.join(", ")))
            }
            None => self,
        }
    }
}

/// Longer lists of known names help nobody.
const LISTED_MAX: usize = 20;

/// Names longer than this are not compared (the comparison is quadratic) and are cut when shown.
const NAME_CHARS_MAX: usize = 96;

/// A user's text as it may appear inside a message: cut when it is long, one line.
pub fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(NAME_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(NAME_CHARS_MAX).is_some() {
        out.push('…');
    }
    out
}

/// "an entity", "a source".
pub(crate) fn article(what: &str) -> String {
    let vowel = what.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {what}", if vowel { "an" } else { "a" })
}

/// The candidate that a misspelt name most likely meant: other capitals, words in another order, or at most a third of
/// the letters wrong.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if name.is_empty() || name.chars().nth(NAME_CHARS_MAX).is_some() {
        return None;
    }
    let lower = name.to_lowercase();
    let words = sorted_words(&lower);
    let edits_max = lower.chars().count().max(3) / 3;
    candidates
        .into_iter()
        .filter(|candidate| candidate.chars().nth(NAME_CHARS_MAX).is_none())
        .filter_map(|candidate| {
            let other = candidate.to_lowercase();
            let edits = strsim::damerau_levenshtein(&lower, &other);
            let edits = if edits > edits_max && words == sorted_words(&other) { edits_max } else { edits };
            (edits <= edits_max).then_some((edits, candidate))
        })
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

fn sorted_words(name: &str) -> Vec<&str> {
    let mut words: Vec<&str> = name.split(['_', '-', ' ']).collect();
    words.sort_unstable();
    words
}

/// A diagnostic as programs want it: `--json`, an editor, a review comment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Located {
    pub severity: Severity,
    pub message: String,
    /// None where the diagnostic is about no file.
    pub file: Option<String>,
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// `the first is here: features/airport.yaml:3:11`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub related: Option<String>,
}

/// The diagnostics in reading order, with lines and columns.
pub fn locate(diagnostics: &[Diagnostic], files: &Files) -> Vec<Located> {
    sorted(diagnostics, files)
        .into_iter()
        .map(|diagnostic| {
            let place = Place::of(diagnostic.span, files);
            Located {
                severity: diagnostic.severity,
                message: diagnostic.message.clone(),
                file: place.as_ref().map(|place| place.file.path.clone()),
                line: place.as_ref().map_or(1, |place| place.line),
                column: place.as_ref().map_or(1, |place| place.column),
                label: diagnostic.label.clone(),
                help: diagnostic.help.clone(),
                related: diagnostic.related.as_ref().map(|(why, span)| format!("{why}: {}", self::place(*span, files))),
            }
        })
        .collect()
}

/// `features/airport.yaml:12:7`, to point at another place from inside a message.
pub fn place(span: Span, files: &Files) -> String {
    match Place::of(span, files) {
        Some(place) => format!("{}:{}:{}", place.file.path, place.line, place.column),
        None => "an unknown place".to_string(),
    }
}

/// More than this many at once scroll past; the rest is counted.
const SHOWN_MAX: usize = 100;

/// The diagnostics in reading order as the terminal shows them, each with its line and a mark under the words meant.
/// Ends with a newline unless there are none.
pub fn render(diagnostics: &[Diagnostic], files: &Files, color: bool) -> String {
    let renderer = if color { Renderer::styled() } else { Renderer::plain() }.decor_style(DecorStyle::Ascii);
    let mut out = String::new();
    for diagnostic in sorted(diagnostics, files).into_iter().take(SHOWN_MAX) {
        let level = match diagnostic.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut group = Group::with_title(level.primary_title(diagnostic.message.as_str()));
        if let Some(place) = Place::of(diagnostic.span, files) {
            group = group.element(place.element(AnnotationKind::Primary, diagnostic.label.as_deref()));
        }
        if let Some((why, span)) = &diagnostic.related
            && let Some(place) = Place::of(*span, files)
        {
            group = group.element(place.element(AnnotationKind::Context, Some(why)));
        }
        if let Some(help) = &diagnostic.help {
            group = group.element(Level::HELP.message(help.as_str()));
        }
        out.push_str(&renderer.render(&[group]));
        out.push_str("\n\n");
    }
    if diagnostics.len() > SHOWN_MAX {
        out.push_str(&format!("and {} more\n\n", diagnostics.len() - SHOWN_MAX));
    }
    out.pop();
    out
}

fn sorted<'a>(diagnostics: &'a [Diagnostic], files: &Files) -> Vec<&'a Diagnostic> {
    let mut out: Vec<&Diagnostic> = diagnostics.iter().collect();
    let path = |span: Span| files.files.get(span.file as usize).map(|file| file.path.as_str());
    out.sort_by(|a, b| {
        path(a.span).cmp(&path(b.span)).then(a.span.start.cmp(&b.span.start)).then(a.span.end.cmp(&b.span.end))
    });
    out
}

/// The first line of a span: what is shown of it.
struct Place<'a> {
    file: &'a SourceFile,
    line: u32,
    column: u32,
    text: &'a str,
    /// Bytes within `text`.
    marked: std::ops::Range<usize>,
}

impl<'a> Place<'a> {
    /// None when the span points into no file. Offsets outside the text are moved inside: a wrong mark is better than
    /// no error message.
    fn of(span: Span, files: &'a Files) -> Option<Place<'a>> {
        let file = files.files.get(span.file as usize)?;
        let text = file.text.as_str();
        let inside = |offset: u32| {
            let mut offset = (offset as usize).min(text.len());
            while !text.is_char_boundary(offset) {
                offset -= 1;
            }
            offset
        };
        let (start, end) = (inside(span.start), inside(span.end));
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let line_text = text[line_start..line_end].trim_end_matches('\r');
        let from = (start - line_start).min(line_text.len());
        let to = end.saturating_sub(line_start).clamp(from, line_text.len());
        let trimmed = from + line_text[from..to].trim_end().len();
        Some(Place {
            file,
            line: text[..line_start].matches('\n').count() as u32 + 1,
            column: text[line_start..start].chars().count() as u32 + 1,
            text: line_text,
            marked: from..trimmed,
        })
    }

    fn element(self, kind: AnnotationKind, label: Option<&'a str>) -> Element<'a> {
        if self.text.trim().is_empty() {
            // There is nothing to mark on an empty line; say where it is.
            return Origin::path(self.file.path.as_str())
                .line(self.line as usize)
                .char_column(self.column as usize)
                .into();
        }
        Snippet::source(self.text)
            .line_start(self.line as usize)
            .path(self.file.path.as_str())
            .annotation(kind.span(self.marked).label(label))
            .into()
    }
}

#[cfg(test)]
mod tests;
