use super::*;
use crate::window::{DAY, HOUR};

const T: Micros = 1_700_000_000_000_000;

fn row(event_time: Micros, created_time: Option<Micros>, sequence: u64, value: i64) -> Row {
    let known_time = created_time.unwrap_or(event_time);
    let position = Position { time: known_time, sequence };
    Row {
        times: Times { event_time, created_time, known_time, position },
        deleted: false,
        values: vec![Value::Int64(value)],
    }
}

#[track_caller]
fn check(rows: &[Row], t: Micros, max_age: MaxAge, expected: (Value, Status)) {
    let mut reversed = rows.to_vec();
    reversed.reverse();
    for rows in [rows, &reversed] {
        assert_eq!(feature_value(&as_of(rows, t, max_age, Visibility::Known), 0, None), expected);
    }
}

#[test]
fn the_latest_row_at_or_before_t_wins() {
    let rows = [row(T - 2, None, 1, 1), row(T, None, 2, 2), row(T + 1, None, 3, 3)];
    check(&rows, T, MaxAge::default(), (Value::Int64(2), Status::Present));
    check(&rows, T - 3, MaxAge::default(), (Value::Null, Status::NotFound));
}

#[test]
fn a_row_is_not_seen_before_it_is_known() {
    let rows = [row(T - 10, None, 1, 1), row(T - 5, Some(T + 5), 2, 2)];
    check(&rows, T, MaxAge::default(), (Value::Int64(1), Status::Present));
    check(&rows, T + 5, MaxAge::default(), (Value::Int64(2), Status::Present));
}

#[test]
fn ties_go_to_created_time_then_sequence_then_content() {
    check(&[row(T, None, 9, 1), row(T, Some(T - 1), 1, 2)], T, MaxAge::default(), (Value::Int64(2), Status::Present));
    check(&[row(T, None, 1, 7), row(T, None, 2, 3)], T, MaxAge::default(), (Value::Int64(3), Status::Present));
    check(&[row(T, None, 0, -7), row(T, None, 0, 3)], T, MaxAge::default(), (Value::Int64(3), Status::Present));
}

#[test]
fn ttl_and_keep_are_inclusive() {
    let rows = [row(T, None, 1, 1)];
    let max_age = MaxAge { ttl: Some(HOUR), keep: DAY };
    check(&rows, T + HOUR, max_age, (Value::Int64(1), Status::Present));
    check(&rows, T + HOUR + 1, max_age, (Value::Null, Status::OutsideMaxAge));
    check(&rows, T + HOUR + DAY, max_age, (Value::Null, Status::OutsideMaxAge));
    check(&rows, T + HOUR + DAY + 1, max_age, (Value::Null, Status::NotFound));
}

#[test]
fn a_winning_tombstone_is_not_found() {
    let mut tombstone = row(T, None, 2, 0);
    tombstone.deleted = true;
    check(&[row(T - 1, None, 1, 1), tombstone.clone()], T, MaxAge::default(), (Value::Null, Status::NotFound));
    check(&[row(T - 1, None, 1, 1), tombstone.clone()], T - 1, MaxAge::default(), (Value::Int64(1), Status::Present));
    check(&[tombstone, row(T + 1, None, 3, 4)], T + 1, MaxAge::default(), (Value::Int64(4), Status::Present));
}

#[test]
fn a_default_fills_the_value_and_leaves_the_status() {
    let rows = [row(T, None, 1, 1)];
    let default = Value::Int64(42);
    let max_age = MaxAge { ttl: Some(HOUR), keep: DAY };
    let answer = as_of(&rows, T + 2 * HOUR, max_age, Visibility::Known);
    assert_eq!(feature_value(&answer, 0, Some(&default)), (default.clone(), Status::OutsideMaxAge));
    let answer = as_of(&rows, T - 1, max_age, Visibility::Known);
    assert_eq!(feature_value(&answer, 0, Some(&default)), (default.clone(), Status::NotFound));
}

#[test]
fn null_nan_and_default() {
    let mut null = row(T, None, 1, 0);
    null.values = vec![Value::Null];
    check(&[null.clone()], T, MaxAge::default(), (Value::Null, Status::NullValue));
    let mut nan = null;
    nan.values = vec![Value::Float64(f64::NAN)];
    check(&[nan], T, MaxAge::default(), (Value::Float64(f64::NAN), Status::Present));
}
