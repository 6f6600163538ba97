//! From nodes to values: what every construct needs to say "expected a duration, got the integer 60" in one place.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::units;
use crate::catalog::{About, Field, Files, Guardrail, Literal, WindowLength};
use crate::diagnose::{Diagnostic, Span, Spanned, article, nearest, shown};
use crate::value::Type;
use crate::yaml::{Kind, Node};

/// Keys that every object takes.
pub(super) const ABOUT: [&str; 3] = ["description", "owner", "tags"];

pub(super) struct Reader<'a> {
    pub files: &'a Files,
    pub diagnostics: Vec<Diagnostic>,
}

/// A mapping whose keys are known to be allowed.
pub(super) struct Object<'n> {
    /// "feature view `weather_now`", for messages.
    pub what: String,
    /// Its name if it has one: where to point when something is missing.
    pub span: Span,
    entries: &'n [(Spanned<String>, Node)],
}

impl<'n> Object<'n> {
    pub fn get(&self, key: &str) -> Option<&'n Node> {
        self.entries.iter().find(|(name, _)| **name == key).map(|(_, node)| node)
    }

    pub fn key_span(&self, key: &str) -> Option<Span> {
        self.entries.iter().find(|(name, _)| **name == key).map(|(name, _)| name.span)
    }
}

impl Reader<'_> {
    pub fn report(&mut self, diagnostic: Diagnostic) {
        self.diagnostics.push(diagnostic);
    }

    /// The text as written.
    pub fn written(&self, span: Span) -> &str {
        let file = self.files.files.get(span.file as usize);
        file.and_then(|file| file.text.get(span.start as usize..span.end as usize)).unwrap_or("")
    }

    /// Reports that a node is of the wrong kind. Scalars that YAML took for something else get the advice to quote them.
    pub fn mismatch<T>(&mut self, node: &Node, expected: &str) -> Option<T> {
        let diagnostic = Diagnostic::error(format!("expected {expected}, got {}", node.describe()), node.span);
        let written = shown(self.written(node.span));
        let scalar = matches!(node.kind, Kind::Bool(_) | Kind::Int(_) | Kind::Float(_))
            || (node.kind == Kind::Null && !written.is_empty());
        let quotable =
            scalar && expected.contains("string") && !written.ends_with(':') && !written.starts_with(['"', '\'']);
        let help = quotable.then(|| format!("quote it: \"{written}\""));
        self.report(Diagnostic { help, ..diagnostic });
        None
    }

    /// Opens a mapping and reports keys that it may not have. `what` is its kind: "feature view".
    pub fn object<'n>(&mut self, node: &'n Node, what: &str, keys: &[&str]) -> Option<Object<'n>> {
        let Kind::Mapping(entries) = &node.kind else {
            return self.mismatch(node, &format!("a mapping that describes {}", article(what)));
        };
        let name = entries.iter().find(|(key, _)| **key == "name").and_then(|(_, node)| match &node.kind {
            Kind::String(name) => Some((name, node.span)),
            _ => None,
        });
        let object = match name {
            Some((name, span)) => Object { what: format!("{what} `{}`", shown(name)), span, entries },
            None => {
                Object { what: what.to_string(), span: entries.first().map_or(node.span, |(key, _)| key.span), entries }
            }
        };
        for (key, _) in entries.iter().filter(|(key, _)| !keys.contains(&key.as_str())) {
            let diagnostic = Diagnostic::error(format!("unknown key `{}` in {}", shown(key), object.what), key.span);
            let diagnostic = if key.ends_with([')', '>']) {
                diagnostic.help("quote a type that contains a comma: \"decimal(18,2)\"")
            } else {
                diagnostic.nearest(key, keys.iter().copied())
            };
            self.report(diagnostic);
        }
        Some(object)
    }

    pub fn missing<T>(&mut self, object: &Object<'_>, key: &str) -> Option<T> {
        self.report(Diagnostic::error(format!("{} has no `{key}`", object.what), object.span));
        None
    }

    pub fn required<T>(
        &mut self,
        object: &Object<'_>,
        key: &str,
        read: impl FnOnce(&mut Self, &Node) -> Option<T>,
    ) -> Option<T> {
        match object.get(key) {
            Some(node) => read(self, node),
            None => self.missing(object, key),
        }
    }

    pub fn optional<T>(
        &mut self,
        object: &Object<'_>,
        key: &str,
        read: impl FnOnce(&mut Self, &Node) -> Option<T>,
    ) -> Option<T> {
        object.get(key).and_then(|node| read(self, node))
    }

    /// A required name. Where it is missing or wrong, and therefore already reported, it is empty; the check passes
    /// over empty names, so that one mistake is reported once.
    pub fn name(&mut self, object: &Object<'_>, key: &str) -> Spanned<String> {
        self.required(object, key, Self::string).unwrap_or_else(|| Spanned::new(String::new(), object.span))
    }

    pub fn string(&mut self, node: &Node) -> Option<Spanned<String>> {
        match &node.kind {
            Kind::String(text) if text.trim().is_empty() => {
                self.report(Diagnostic::error("this string is empty", node.span));
                None
            }
            Kind::String(text) => Some(Spanned::new(text.clone(), node.span)),
            _ => self.mismatch(node, "a string"),
        }
    }

    pub fn bool(&mut self, node: &Node) -> Option<bool> {
        match &node.kind {
            Kind::Bool(x) => Some(*x),
            _ => self.mismatch(node, "`true` or `false`"),
        }
    }

    pub fn integer(&mut self, node: &Node, range: RangeInclusive<i64>) -> Option<i64> {
        match &node.kind {
            Kind::Int(x) if range.contains(x) => Some(*x),
            _ => self.mismatch(node, &format!("an integer from {} to {}", range.start(), range.end())),
        }
    }

    pub fn number(&mut self, node: &Node) -> Option<f64> {
        match &node.kind {
            Kind::Int(x) => Some(*x as f64),
            Kind::Float(x) if x.is_finite() => Some(*x),
            _ => self.mismatch(node, "a finite number"),
        }
    }

    pub fn list<T>(&mut self, node: &Node, mut read: impl FnMut(&mut Self, &Node) -> Option<T>) -> Option<Vec<T>> {
        match &node.kind {
            Kind::Sequence(items) => Some(items.iter().filter_map(|item| read(self, item)).collect()),
            _ => self.mismatch(node, "a list"),
        }
    }

    pub fn strings(&mut self, node: &Node) -> Option<Vec<Spanned<String>>> {
        self.list(node, Self::string)
    }

    /// A mapping from names to names.
    pub fn renames(&mut self, node: &Node) -> Option<Vec<(Spanned<String>, Spanned<String>)>> {
        match &node.kind {
            Kind::Mapping(entries) => {
                Some(entries.iter().filter_map(|(key, node)| Some((key.clone(), self.string(node)?))).collect())
            }
            _ => self.mismatch(node, "a mapping from key to column"),
        }
    }

    pub fn one_of<T: Copy>(&mut self, node: &Node, choices: &[(&str, T)]) -> Option<Spanned<T>> {
        let listed: Vec<String> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
        let Kind::String(text) = &node.kind else { return self.mismatch(node, &listed.join(" or ")) };
        if let Some((_, choice)) = choices.iter().find(|(name, _)| name == text) {
            return Some(Spanned::new(*choice, node.span));
        }
        let diagnostic =
            Diagnostic::error(format!("expected {}, got {}", listed.join(" or "), node.describe()), node.span);
        let near = nearest(text, choices.iter().map(|(name, _)| *name)).map(|near| format!("did you mean `{near}`?"));
        self.report(Diagnostic { help: near, ..diagnostic });
        None
    }

    /// A moment in microseconds, or the midnight in UTC that a date begins with.
    pub fn time(&mut self, node: &Node) -> Option<i64> {
        let text = match &node.kind {
            Kind::String(text) => Some(text),
            _ => None,
        };
        let moment = |text: &String| {
            let date = || chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.and_hms_opt(0, 0, 0);
            let time = chrono::DateTime::parse_from_rfc3339(text).ok().map(|time| time.timestamp_micros());
            time.or_else(|| date().map(|date| date.and_utc().timestamp_micros()))
        };
        match text.and_then(moment) {
            Some(time) => Some(time),
            None => self.mismatch(node, "a time such as \"2026-12-24T00:00:00Z\" or a date such as \"2026-12-24\""),
        }
    }

    pub fn duration(&mut self, node: &Node) -> Option<Duration> {
        let duration = self.duration_or_zero(node)?;
        if duration.is_zero() {
            self.report(Diagnostic::error("this duration must be longer than zero", node.span));
            return None;
        }
        Some(duration)
    }

    pub fn duration_or_zero(&mut self, node: &Node) -> Option<Duration> {
        let Kind::String(text) = &node.kind else { return self.mismatch(node, "a duration such as `10m`") };
        let duration = units::duration(text);
        if duration.is_none() {
            self.report(
                Diagnostic::error(format!("`{}` is not a duration", shown(text)), node.span)
                    .help("write whole numbers with units, longest first: `50ms`, `10m`, `1h30m`, `14d`"),
            );
        }
        duration
    }

    pub fn window(&mut self, node: &Node) -> Option<Spanned<WindowLength>> {
        let duration = self.duration(node)?;
        let Kind::String(text) = &node.kind else { return None };
        Some(Spanned::new(WindowLength { duration, text: text.clone() }, node.span))
    }

    pub fn size(&mut self, node: &Node) -> Option<u64> {
        let Kind::String(text) = &node.kind else { return self.mismatch(node, "a size such as `8GiB`") };
        let size = units::size(text);
        if size.is_none() {
            let diagnostic = Diagnostic::error(format!("`{}` is not a size", shown(text)), node.span);
            self.report(diagnostic.help("write it like `512MiB` or `8GiB`"));
        }
        size
    }

    /// A share in [0, 1], written as `1%` or as a number.
    pub fn share(&mut self, node: &Node) -> Option<f64> {
        let share = match &node.kind {
            Kind::String(text) => units::percentage(text),
            Kind::Int(x) => Some(*x as f64),
            Kind::Float(x) => Some(*x),
            _ => None,
        };
        match share.filter(|share| (0.0..=1.0).contains(share)) {
            Some(share) => Some(share),
            None => self.mismatch(node, "a share from `0%` to `100%`"),
        }
    }

    pub fn field_type(&mut self, node: &Node) -> Option<Spanned<Type>> {
        let text = self.string(node)?;
        match Type::parse(&text) {
            Ok(parsed) => Some(Spanned::new(parsed, text.span)),
            Err(error) => {
                let help = error.nearest.map(|near| format!("did you mean `{near}`?"));
                let diagnostic = Diagnostic::error(format!("`{}` is not a type", shown(&text)), text.span);
                self.report(Diagnostic { help, ..diagnostic });
                None
            }
        }
    }

    /// A constant of any kind.
    pub fn literal(&mut self, node: &Node) -> Option<Spanned<Literal>> {
        Some(Spanned::new(literal(node), node.span))
    }

    pub fn guardrail(&mut self, node: &Node) -> Option<Guardrail> {
        /// Shares of requests or values.
        const RATES: [&str; 4] = ["error_rate", "fallback_rate", "stale_rate", "nan_rate"];
        /// Latencies.
        const PERCENTILES: [&str; 3] = ["p50", "p95", "p99"];
        let text = self.string(node)?;
        let Some((metric, comparison, bound)) = units::comparison(&text) else {
            self.report(
                Diagnostic::error(format!("`{}` is not a comparison", shown(&text)), text.span)
                    .help("write a metric, a sign and a bound: `error_rate < 0.5%`, `p99 < 60ms`"),
            );
            return None;
        };
        let wrong = match bound {
            units::Bound::Number(_) if PERCENTILES.contains(&metric) => Some("a duration such as `60ms`"),
            units::Bound::Seconds(_) if RATES.contains(&metric) => Some("a share such as `0.5%`"),
            units::Bound::Number(x) if RATES.contains(&metric) && x > 1.0 => Some("a share from `0%` to `100%`"),
            _ => None,
        };
        if let Some(wanted) = wrong {
            self.report(Diagnostic::error(format!("`{metric}` is compared with {wanted}"), text.span));
            return None;
        }
        let known = RATES.iter().chain(&PERCENTILES).copied();
        // Metrics may have any name, so a near miss can only be warned about; short names are near too much.
        if metric.len() > 4
            && !RATES.contains(&metric)
            && let Some(near) = nearest(metric, known)
        {
            let message = format!("`{}` is taken for a metric of your own", shown(metric));
            self.report(Diagnostic::warning(message, text.span).help(format!("did you mean `{near}`?")));
        }
        let bound = match bound {
            units::Bound::Number(x) | units::Bound::Seconds(x) => x,
        };
        Some(Guardrail { metric: metric.to_string(), comparison, bound, text })
    }

    pub fn about(&mut self, object: &Object<'_>) -> About {
        About {
            description: self.optional(object, "description", Self::string).map(|text| text.value),
            owner: self.optional(object, "owner", Self::string).map(|text| text.value),
            tags: self.optional(object, "tags", Self::tags).unwrap_or_default(),
        }
    }

    fn tags(&mut self, node: &Node) -> Option<BTreeMap<String, String>> {
        match &node.kind {
            Kind::Sequence(_) => Some(self.strings(node)?.into_iter().map(|tag| (tag.value, String::new())).collect()),
            Kind::Mapping(entries) => Some(
                entries
                    .iter()
                    .filter_map(|(key, node)| match &node.kind {
                        Kind::String(value) => Some((key.value.clone(), value.clone())),
                        _ => self.mismatch(node, "a string"),
                    })
                    .collect(),
            ),
            _ => self.mismatch(node, "a list of tags or a mapping of strings"),
        }
    }

    /// A named, typed column. `what` says of what: "entity key".
    pub fn field(&mut self, node: &Node, what: &str, keys: &[&str]) -> Option<Field> {
        let object = self.object(node, what, keys)?;
        let name = self.required(&object, "name", Self::string)?;
        let field_type = self.required(&object, "type", Self::field_type);
        Some(Field {
            // A wrong type was reported; strings are allowed everywhere and cause no second report.
            field_type: field_type.unwrap_or(Spanned::new(Type::String, name.span)),
            name,
            nullable: self.optional(&object, "nullable", Self::bool).unwrap_or(false),
            sensitive: self.optional(&object, "sensitive", Self::bool).unwrap_or(false),
        })
    }
}

pub(super) fn literal(node: &Node) -> Literal {
    match &node.kind {
        Kind::Null => Literal::Null,
        Kind::Bool(x) => Literal::Bool(*x),
        Kind::Int(x) => Literal::Int(*x),
        Kind::Float(x) => Literal::Float(*x),
        Kind::String(x) => Literal::String(x.clone()),
        Kind::Sequence(items) => Literal::List(items.iter().map(literal).collect()),
        Kind::Mapping(entries) => {
            Literal::Map(entries.iter().map(|(key, node)| (key.value.clone(), literal(node))).collect())
        }
    }
}
