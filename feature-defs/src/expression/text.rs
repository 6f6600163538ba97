//! Functions of strings. Positions and lengths count characters, as SQL does; what PostgreSQL refuses is null here.

use std::sync::Arc;

use arrow::array::*;
use arrow::datatypes::Int64Type;
use arrow::error::ArrowError;

use super::call::{Argument, Body};

/// `lpad` and `rpad` beyond this many characters, and replacements beyond this many bytes, have no value: one row may
/// not take the memory of all others.
pub(super) const PAD_CHARACTERS_MAX: i64 = 65_536;
const REPLACED_BYTES_MAX: usize = 1 << 20;

/// A body that makes a string of each row.
fn texts(f: impl Fn(&[Argument], usize) -> Option<String> + Send + Sync + 'static) -> Arc<Body> {
    Arc::new(move |a: &[Argument], n| {
        let mut builder = StringBuilder::with_capacity(n, n * 8);
        for i in 0..n {
            let text = f(a, i);
            let bytes = builder.values_slice().len() + text.as_deref().map_or(0, str::len);
            if bytes > i32::MAX as usize {
                return Err(ArrowError::ComputeError("more than 2 GiB of text in one batch".to_string()));
            }
            builder.append_option(text);
        }
        Ok(Arc::new(builder.finish()) as ArrayRef)
    })
}

fn numbers(f: impl Fn(&[Argument], usize) -> Option<i64> + Send + Sync + 'static) -> Arc<Body> {
    Arc::new(move |a: &[Argument], n| Ok(Arc::new((0..n).map(|i| f(a, i)).collect::<Int64Array>()) as ArrayRef))
}

fn truths(f: impl Fn(&[Argument], usize) -> Option<bool> + Send + Sync + 'static) -> Arc<Body> {
    Arc::new(move |a: &[Argument], n| Ok(Arc::new((0..n).map(|i| f(a, i)).collect::<BooleanArray>()) as ArrayRef))
}

pub(super) fn function(name: &str) -> Option<Arc<Body>> {
    Some(match name {
        "lower" => texts(|a, i| Some(a[0].text(i)?.to_lowercase())),
        "upper" => texts(|a, i| Some(a[0].text(i)?.to_uppercase())),
        "trim" => texts(|a, i| trim(a, i, true, true)),
        "ltrim" => texts(|a, i| trim(a, i, true, false)),
        "rtrim" => texts(|a, i| trim(a, i, false, true)),
        "length" => numbers(|a, i| Some(a[0].text(i)?.chars().count() as i64)),
        "octet_length" => numbers(|a, i| Some(a[0].text(i)?.len() as i64)),
        "substr" => texts(|a, i| {
            let (text, start) = (a[0].text(i)?, a[1].get::<Int64Type>(i)?);
            let end = match a.get(2) {
                None => i64::MAX,
                Some(length) => start.saturating_add(length.get::<Int64Type>(i).filter(|length| *length >= 0)?),
            };
            Some(slice(text, start - i64::from(start > i64::MIN), end.saturating_sub(1)))
        }),
        "left" => texts(|a, i| {
            let (text, n) = (a[0].text(i)?, a[1].get::<Int64Type>(i)?);
            let end = if n >= 0 { n } else { (text.chars().count() as i64).saturating_add(n) };
            Some(slice(text, 0, end))
        }),
        "right" => texts(|a, i| {
            let (text, n) = (a[0].text(i)?, a[1].get::<Int64Type>(i)?);
            let length = text.chars().count() as i64;
            Some(slice(text, if n >= 0 { length - n.min(length) } else { n.saturating_neg() }, length))
        }),
        "lpad" => texts(|a, i| pad(a, i, true)),
        "rpad" => texts(|a, i| pad(a, i, false)),
        "replace" => texts(|a, i| {
            let (text, from, to) = (a[0].text(i)?, a[1].text(i)?, a[2].text(i)?);
            if from.is_empty() {
                return Some(text.to_string());
            }
            let grown = text.matches(from).count().checked_mul(to.len().saturating_sub(from.len()))?;
            (text.len().checked_add(grown)? <= REPLACED_BYTES_MAX.max(text.len())).then(|| text.replace(from, to))
        }),
        "split_part" => texts(|a, i| {
            let (text, delimiter, n) = (a[0].text(i)?, a[1].text(i)?, a[2].get::<Int64Type>(i)?);
            let position = usize::try_from(n.unsigned_abs()).ok()?.checked_sub(1)?;
            let part = match (delimiter.is_empty(), n > 0) {
                (true, _) => (position == 0).then_some(text),
                (false, true) => text.split(delimiter).nth(position),
                (false, false) => text.rsplit(delimiter).nth(position),
            };
            Some(part.unwrap_or("").to_string())
        }),
        "strpos" => numbers(|a, i| {
            let (text, wanted) = (a[0].text(i)?, a[1].text(i)?);
            Some(text.find(wanted).map_or(0, |at| text[..at].chars().count() as i64 + 1))
        }),
        "starts_with" => truths(|a, i| Some(a[0].text(i)?.starts_with(a[1].text(i)?))),
        "ends_with" => truths(|a, i| Some(a[0].text(i)?.ends_with(a[1].text(i)?))),
        "contains" => truths(|a, i| Some(a[0].text(i)?.contains(a[1].text(i)?))),
        // The function skips nulls, the operator `||` does not: both as SQL has them.
        "concat" => texts(|a, i| Some(a.iter().filter_map(|argument| argument.text(i)).collect())),
        "||" => texts(|a, i| a.iter().map(|argument| argument.text(i)).collect::<Option<String>>()),
        _ => return None,
    })
}

/// The characters from `start` (0-based, may lie before the text) up to `end`.
fn slice(text: &str, start: i64, end: i64) -> String {
    let start = start.max(0);
    let count = usize::try_from(end.saturating_sub(start)).unwrap_or(0);
    text.chars().skip(usize::try_from(start).unwrap_or(usize::MAX)).take(count).collect()
}

fn trim(a: &[Argument], i: usize, left: bool, right: bool) -> Option<String> {
    let text = a[0].text(i)?;
    let set = match a.get(1) {
        None => " ",
        Some(set) => set.text(i)?,
    };
    let text = if left { text.trim_start_matches(|c| set.contains(c)) } else { text };
    Some((if right { text.trim_end_matches(|c| set.contains(c)) } else { text }).to_string())
}

fn pad(a: &[Argument], i: usize, left: bool) -> Option<String> {
    let (text, width) = (a[0].text(i)?, a[1].get::<Int64Type>(i)?);
    let fill = match a.get(2) {
        None => " ",
        Some(fill) => fill.text(i)?,
    };
    if width > PAD_CHARACTERS_MAX {
        return None;
    }
    let width = usize::try_from(width).unwrap_or(0);
    let length = text.chars().count();
    if length >= width {
        return Some(text.chars().take(width).collect());
    }
    let padding: String = fill.chars().cycle().take(if fill.is_empty() { 0 } else { width - length }).collect();
    Some(if left { padding + text } else { format!("{text}{padding}") })
}

/// LIKE in its four forms.
pub(super) fn like(negated: bool, ignore_case: bool) -> Arc<Body> {
    use arrow::compute::kernels::comparison::{ilike, like, nilike, nlike};
    Arc::new(move |a: &[Argument], n| {
        let kernel = match (negated, ignore_case) {
            (false, false) => like,
            (false, true) => ilike,
            (true, false) => nlike,
            (true, true) => nilike,
        };
        let text = a[0].column(n)?;
        let matched = if a[1].is_constant() {
            kernel(&text, &Scalar::new(a[1].array.clone()))
        } else {
            kernel(&text, &a[1].array)
        }?;
        Ok(Arc::new(matched) as ArrayRef)
    })
}
