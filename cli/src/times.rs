//! Times on the command line.

use chrono::{DateTime, NaiveDate, NaiveDateTime, SecondsFormat, Utc};
use feature_defs::time::Micros;
use thiserror::Error;

#[derive(Debug, Error)]
#[error("`{text}` is not a time; write `2024-03-10`, `2024-03-10T12:30:00Z`, `2024-03-10T12:30:00+02:00` or `now`")]
pub struct TimeError {
    pub text: String,
}

/// A date is its midnight; a time without a zone is UTC.
pub fn parse(text: &str, now: Micros) -> Result<Micros, TimeError> {
    let trimmed = text.trim();
    if trimmed.eq_ignore_ascii_case("now") {
        return Ok(now);
    }
    if let Ok(time) = DateTime::parse_from_rfc3339(trimmed) {
        return Ok(time.timestamp_micros());
    }
    for format in ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"] {
        if let Ok(time) = NaiveDateTime::parse_from_str(trimmed, format) {
            return Ok(time.and_utc().timestamp_micros());
        }
    }
    match NaiveDate::parse_from_str(trimmed, "%Y-%m-%d").ok().and_then(|date| date.and_hms_opt(0, 0, 0)) {
        Some(midnight) => Ok(midnight.and_utc().timestamp_micros()),
        None => Err(TimeError { text: text.to_owned() }),
    }
}

pub fn now() -> Micros {
    Utc::now().timestamp_micros()
}

/// `2024-03-10T12:30:00Z`, with as many digits of a second as it has.
pub fn show(time: Micros) -> String {
    match DateTime::from_timestamp_micros(time) {
        Some(time) => time.to_rfc3339_opts(SecondsFormat::AutoSi, true),
        None => format!("{time} µs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        fn check(text: &str, expected: Option<&str>) {
            assert_eq!(parse(text, 0).ok().map(show).as_deref(), expected, "{text}");
        }
        check("now", Some("1970-01-01T00:00:00Z"));
        check("2024-03-10", Some("2024-03-10T00:00:00Z"));
        check("2024-03-10 12:30", Some("2024-03-10T12:30:00Z"));
        check("2024-03-10T12:30:00+02:00", Some("2024-03-10T10:30:00Z"));
        check("2024-03-10T12:30:00.000001Z", Some("2024-03-10T12:30:00.000001Z"));
        check("10 March", None);
        check("2024-02-30", None);
    }
}
