//! Quantities as people write them: `1h30m`, `8GiB`, `0.5%`, `p99 < 60ms`.

use std::time::Duration;

use crate::catalog::Comparison;

/// A hundred years: beyond every real retention, and far from overflowing microseconds.
pub(super) const DURATION_MAX: Duration = Duration::from_secs(36_525 * 86_400);

/// From long to short, which is also the order in which parts must be written.
const DURATION_UNITS: [(&str, u64); 7] = [
    ("w", 7 * 86_400_000_000),
    ("d", 86_400_000_000),
    ("h", 3_600_000_000),
    ("m", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1_000),
    ("us", 1),
];

/// Whole numbers with units, longest first, each unit once. None when the text is something else or too long a time.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut micros: u64 = 0;
    let mut units = DURATION_UNITS.iter();
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (_, unit) = units.find(|(name, _)| *name == &rest[..letters])?;
        micros = micros.checked_add(number.checked_mul(*unit)?)?;
        rest = &rest[letters..];
    }
    let duration = Duration::from_micros(micros);
    (!text.is_empty() && duration <= DURATION_MAX).then_some(duration)
}

const SIZE_UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

pub(super) fn size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let (_, factor) = SIZE_UNITS.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*factor).filter(|bytes| *bytes > 0)
}

/// `0.5%` as 0.005.
pub(super) fn percentage(text: &str) -> Option<f64> {
    let number: f64 = decimal(text.strip_suffix('%')?.trim_end())?;
    Some(number / 100.0)
}

/// A plain number. Rust would also read `inf`, `nan` and `1e5`.
fn decimal(text: &str) -> Option<f64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text.parse().ok().filter(|_| plain)
}

/// What a guardrail compares with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bound {
    /// A percentage or a plain number.
    Number(f64),
    Seconds(f64),
}

/// `error_rate < 0.5%`: a metric's name, a comparison, a bound.
pub(super) fn comparison(text: &str) -> Option<(&str, Comparison, Bound)> {
    let at = text.find(['<', '>'])?;
    let (metric, rest) = text.split_at(at);
    let (comparison, bound) = [
        ("<=", Comparison::LessOrEqual),
        (">=", Comparison::GreaterOrEqual),
        ("<", Comparison::Less),
        (">", Comparison::Greater),
    ]
    .into_iter()
    .find_map(|(sign, comparison)| Some((comparison, rest.strip_prefix(sign)?)))?;
    let bound = bound.trim();
    let bound = if let Some(share) = percentage(bound) {
        Bound::Number(share)
    } else if let Some(number) = decimal(bound) {
        Bound::Number(number)
    } else {
        Bound::Seconds(duration(bound)?.as_secs_f64())
    };
    let metric = metric.trim();
    let named = metric.starts_with(|c: char| c.is_ascii_alphabetic())
        && metric.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    named.then_some((metric, comparison, bound))
}
