//! Timestamps, dates and intervals. Time zones appear in one place only, [`local`]; everything else is arithmetic on
//! microseconds and the proleptic Gregorian calendar. A time outside the calendar (about ±262,000 years) is null.

use std::str::FromStr;
use std::sync::Arc;

use arrow::datatypes::{
    DataType as ArrowType, Date32Type, DurationMicrosecondType, Float64Type, Int32Type, Int64Type,
    IntervalMonthDayNano, IntervalMonthDayNanoType, TimeUnit, TimestampMicrosecondType,
};
use chrono::{DateTime, Datelike, Days, Months, NaiveDate, NaiveDateTime, Offset, TimeZone, Timelike};
use chrono_tz::Tz;

use super::arithmetic::Operation;
use super::call::{Argument, Body, try_map, try_map2};
use super::convert::timestamps;

const MICROS_PER_SECOND: i64 = 1_000_000;
pub(super) const MICROS_PER_DAY: i64 = 86_400 * MICROS_PER_SECOND;

/// The civil time of microseconds since 1970, read without a zone.
pub(super) fn civil(micros: i64) -> Option<NaiveDateTime> {
    DateTime::from_timestamp_micros(micros).map(|time| time.naive_utc())
}

fn micros(civil: NaiveDateTime) -> i64 {
    civil.and_utc().timestamp_micros()
}

pub(super) const FIELDS: [&str; 14] = [
    "year",
    "quarter",
    "month",
    "week",
    "day",
    "doy",
    "dow",
    "isodow",
    "hour",
    "minute",
    "second",
    "millisecond",
    "microsecond",
    "epoch",
];

pub(super) const UNITS: [&str; 9] =
    ["year", "quarter", "month", "week", "day", "hour", "minute", "second", "millisecond"];

/// One field of a time: integers, except `epoch`, which is seconds as float64.
pub(super) fn part(field: &str, of: &ArrowType) -> Option<(Arc<Body>, ArrowType)> {
    if field == "epoch" {
        let scale: fn(i64) -> f64 = |micros| micros as f64 / MICROS_PER_SECOND as f64;
        let body: Arc<Body> = match of {
            ArrowType::Timestamp(..) => Arc::new(move |a: &[Argument], n| {
                Ok(try_map::<TimestampMicrosecondType, Float64Type>(a, n, |x| Some(scale(x))))
            }),
            ArrowType::Duration(_) => Arc::new(move |a: &[Argument], n| {
                Ok(try_map::<DurationMicrosecondType, Float64Type>(a, n, |x| Some(scale(x))))
            }),
            _ => return None,
        };
        return Some((body, ArrowType::Float64));
    }
    let f: fn(NaiveDateTime) -> i64 = match field {
        "year" => |t| i64::from(t.year()),
        "quarter" => |t| i64::from(t.month0() / 3 + 1),
        "month" => |t| i64::from(t.month()),
        "week" => |t| i64::from(t.iso_week().week()),
        "day" => |t| i64::from(t.day()),
        "doy" => |t| i64::from(t.ordinal()),
        "dow" => |t| i64::from(t.weekday().num_days_from_sunday()),
        "isodow" => |t| i64::from(t.weekday().number_from_monday()),
        "hour" => |t| i64::from(t.hour()),
        "minute" => |t| i64::from(t.minute()),
        "second" => |t| i64::from(t.second()),
        "millisecond" => |t| i64::from(t.second()) * 1_000 + i64::from(t.nanosecond() / 1_000_000),
        "microsecond" => |t| i64::from(t.second()) * 1_000_000 + i64::from(t.nanosecond() / 1_000),
        _ => return None,
    };
    matches!(of, ArrowType::Timestamp(..)).then(|| {
        let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
            Ok(try_map::<TimestampMicrosecondType, Int64Type>(a, n, |x| civil(x).map(f)))
        });
        (body, ArrowType::Int64)
    })
}

/// The start of the unit that a time lies in. Weeks begin on Monday.
pub(super) fn truncate(unit: &str, of: &ArrowType) -> Option<Arc<Body>> {
    let f: fn(i64) -> Option<i64> = match unit {
        "millisecond" => |x| floor(x, 1_000),
        "second" => |x| floor(x, MICROS_PER_SECOND),
        "minute" => |x| floor(x, 60 * MICROS_PER_SECOND),
        "hour" => |x| floor(x, 3_600 * MICROS_PER_SECOND),
        "day" => |x| floor(x, MICROS_PER_DAY),
        // 1970-01-01 was a Thursday.
        "week" => |x| floor(x.checked_add(3 * MICROS_PER_DAY)?, 7 * MICROS_PER_DAY)?.checked_sub(3 * MICROS_PER_DAY),
        "month" => |x| start_of_month(x, |month0| month0),
        "quarter" => |x| start_of_month(x, |month0| month0 / 3 * 3),
        "year" => |x| start_of_month(x, |_| 0),
        _ => return None,
    };
    let output = of.clone();
    matches!(of, ArrowType::Timestamp(..)).then(|| {
        let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
            Ok(timestamps((0..n).map(|i| f(a[0].get::<TimestampMicrosecondType>(i)?)), &output))
        });
        body
    })
}

fn floor(x: i64, step: i64) -> Option<i64> {
    x.div_euclid(step).checked_mul(step)
}

fn start_of_month(x: i64, month0: fn(u32) -> u32) -> Option<i64> {
    let time = civil(x)?;
    let date = NaiveDate::from_ymd_opt(time.year(), month0(time.month0()) + 1, 1)?;
    Some(micros(date.and_hms_opt(0, 0, 0)?))
}

/// The wall clock of a zone at a moment. The zone is usually a constant, then parsed once.
pub(super) fn local(constant: Option<Tz>) -> Arc<Body> {
    Arc::new(move |a: &[Argument], n| {
        let wall = (0..n).map(|i| {
            let moment = a[0].get::<TimestampMicrosecondType>(i)?;
            let zone = match constant {
                Some(zone) => zone,
                None => Tz::from_str(a[1].text(i)?).ok()?,
            };
            let offset = zone.offset_from_utc_datetime(&civil(moment)?).fix().local_minus_utc();
            moment.checked_add(i64::from(offset) * MICROS_PER_SECOND)
        });
        Ok(timestamps(wall, &ArrowType::Timestamp(TimeUnit::Microsecond, None)))
    })
}

/// Seconds from the second argument to the first.
pub(super) fn seconds_between() -> Arc<Body> {
    Arc::new(|a: &[Argument], n| {
        Ok(try_map2::<TimestampMicrosecondType, TimestampMicrosecondType, Float64Type>(a, n, |later, earlier| {
            // Exact in i128; rounded once. A difference of zero is +0.0, whatever its sign.
            Some((i128::from(later) - i128::from(earlier)) as f64 / MICROS_PER_SECOND as f64)
        }))
    })
}

/// Numbers since 1970, in units of `unit_micros` microseconds (floats are truncated to microseconds).
pub(super) fn from_epoch(unit_micros: i64, of: &ArrowType, to: ArrowType) -> Option<Arc<Body>> {
    Some(match of {
        ArrowType::Int64 => Arc::new(move |a: &[Argument], n| {
            Ok(timestamps((0..n).map(|i| a[0].get::<Int64Type>(i)?.checked_mul(unit_micros)), &to))
        }),
        ArrowType::Float64 => Arc::new(move |a: &[Argument], n| {
            let micros = (0..n).map(|i| {
                let micros = a[0].get::<Float64Type>(i)? * unit_micros as f64;
                // 2^63 itself does not fit; NaN fails both comparisons.
                (micros >= -(2f64.powi(63)) && micros < 2f64.powi(63)).then_some(micros as i64)
            });
            Ok(timestamps(micros, &to))
        }),
        _ => return None,
    })
}

/// Arithmetic between times, and what it returns. `date - date` is days, `timestamp - timestamp` a duration.
pub(super) fn operation(operation: Operation, left: &ArrowType, right: &ArrowType) -> Option<(Arc<Body>, ArrowType)> {
    use ArrowType::*;
    let sign = match operation {
        Operation::Add => 1,
        Operation::Subtract => -1,
        _ => return None,
    };
    let output = left.clone();
    Some(match (left, right) {
        (Timestamp(..), Interval(_)) => {
            let to = output.clone();
            let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
                let moved = (0..n).map(|i| {
                    shift(a[0].get::<TimestampMicrosecondType>(i)?, a[1].get::<IntervalMonthDayNanoType>(i)?, sign)
                });
                Ok(timestamps(moved, &to))
            });
            (body, output)
        }
        (Timestamp(..), Duration(_)) => {
            let to = output.clone();
            let body: Arc<Body> = Arc::new(move |a: &[Argument], n| {
                let moved = (0..n).map(|i| {
                    let by = a[1].get::<DurationMicrosecondType>(i)?.checked_mul(sign)?;
                    a[0].get::<TimestampMicrosecondType>(i)?.checked_add(by)
                });
                Ok(timestamps(moved, &to))
            });
            (body, output)
        }
        (Timestamp(_, a), Timestamp(_, b)) if sign == -1 && a == b => (
            Arc::new(|a: &[Argument], n| {
                Ok(try_map2::<TimestampMicrosecondType, TimestampMicrosecondType, DurationMicrosecondType>(
                    a,
                    n,
                    i64::checked_sub,
                ))
            }),
            Duration(TimeUnit::Microsecond),
        ),
        (Duration(_), Duration(_)) => (
            Arc::new(move |a: &[Argument], n| {
                Ok(try_map2::<DurationMicrosecondType, DurationMicrosecondType, DurationMicrosecondType>(
                    a,
                    n,
                    |x, y| {
                        if sign == 1 { x.checked_add(y) } else { x.checked_sub(y) }
                    },
                ))
            }),
            output,
        ),
        (Date32, Date32) if sign == -1 => (
            Arc::new(|a: &[Argument], n| {
                Ok(try_map2::<Date32Type, Date32Type, Int64Type>(a, n, |x, y| Some(i64::from(x) - i64::from(y))))
            }),
            Int64,
        ),
        (Date32, Int64) => (
            Arc::new(move |a: &[Argument], n| {
                Ok(try_map2::<Date32Type, Int64Type, Date32Type>(a, n, |x, y| {
                    i32::try_from(i64::from(x).checked_add(y.checked_mul(sign)?)?).ok()
                }))
            }),
            Date32,
        ),
        (Date32, Int32) => (
            Arc::new(move |a: &[Argument], n| {
                Ok(try_map2::<Date32Type, Int32Type, Date32Type>(a, n, |x, y| {
                    i32::try_from(i64::from(x) + i64::from(y) * sign).ok()
                }))
            }),
            Date32,
        ),
        _ => return None,
    })
}

/// Months first, clipped to the month's last day; then days; then the rest.
fn shift(moment: i64, by: IntervalMonthDayNano, sign: i64) -> Option<i64> {
    let mut moment = moment;
    if by.months != 0 || by.days != 0 {
        let months = i64::from(by.months) * sign;
        let days = i64::from(by.days) * sign;
        let mut time = civil(moment)?;
        let count = Months::new(u32::try_from(months.unsigned_abs()).ok()?);
        time = if months >= 0 { time.checked_add_months(count)? } else { time.checked_sub_months(count)? };
        let count = Days::new(days.unsigned_abs());
        time = if days >= 0 { time.checked_add_days(count)? } else { time.checked_sub_days(count)? };
        moment = micros(time);
    }
    moment.checked_add((by.nanoseconds / 1_000).checked_mul(sign)?)
}
