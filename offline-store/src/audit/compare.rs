//! Cell by cell: whether two columns hold the same bits, and what that says of what was served.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::kernels::cmp::distinct;
use arrow::datatypes::DataType;
use feature_defs::time::Status;
use feature_defs::value::{Type, Value};
use serde::Serialize;

/// What a served value is beside its two replays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The bits and the status are those of both replays.
    Equal,
    /// Not what the same code says of the events that had been applied.
    Bug,
    /// What had been applied gives it; what is known by now for the same time does not.
    Lateness,
    /// The store had not answered, and what was served is what the definitions say of that.
    Fallback,
}

/// One feature of many rows: values and statuses.
#[derive(Debug, Clone)]
pub struct Column {
    pub values: ArrayRef,
    pub statuses: Vec<u8>,
}

/// Whether each pair of values differs in being null or in a bit. NaNs of other bits differ, and so do 0.0 and -0.0: what
/// is served is canonical, so that either would be a mistake.
pub fn different(left: &ArrayRef, right: &ArrayRef) -> Vec<bool> {
    if left.len() != right.len() || left.data_type() != right.data_type() {
        return vec![true; left.len()];
    }
    // Among plain types, Arrow compares floats by IEEE's total order, which only equal bits are equal in.
    match distinct(left, right) {
        Ok(found) if !is_nested(left.data_type()) => found.values().iter().collect(),
        _ => {
            let same = |row: usize| left.slice(row, 1).to_data() == right.slice(row, 1).to_data();
            if left.to_data() == right.to_data() {
                return vec![false; left.len()];
            }
            (0..left.len()).map(|row| !same(row)).collect()
        }
    }
}

fn is_nested(of: &DataType) -> bool {
    of.is_nested() || matches!(of, DataType::Dictionary(_, _))
}

/// The verdict of every row of a feature.
pub fn judge(served: &Column, as_known: &Column, by_event_time: &Column) -> Vec<Verdict> {
    let is_bug = different(&served.values, &as_known.values);
    let is_late = different(&as_known.values, &by_event_time.values);
    (0..served.values.len())
        .map(|row| {
            let (status, known) = (served.statuses[row], as_known.statuses[row]);
            if is_bug[row] || status != known {
                Verdict::Bug
            } else if status == Status::Unavailable as u8 {
                Verdict::Fallback
            } else if is_late[row] || known != by_event_time.statuses[row] {
                Verdict::Lateness
            } else {
                Verdict::Equal
            }
        })
        .collect()
}

/// How bad a wrong value is, to show the worst: the relative difference of numbers; what is no difference of numbers, as
/// a null for a value or another status, is worse than any.
pub fn badness(served: &Column, as_known: &Column, row: usize, of: &Type) -> f64 {
    if served.statuses[row] != as_known.statuses[row] || served.values.is_null(row) != as_known.values.is_null(row) {
        return f64::MAX;
    }
    match (number(&served.values, row, of), number(&as_known.values, row, of)) {
        (Some(served), Some(known)) if (served - known).is_finite() => {
            (served - known).abs() / served.abs().max(known.abs()).max(f64::MIN_POSITIVE)
        }
        _ => f64::MAX,
    }
}

fn number(values: &ArrayRef, row: usize, of: &Type) -> Option<f64> {
    match Value::from_array(values, row, of) {
        Value::Int32(x) => Some(x.into()),
        Value::Int64(x) | Value::Timestamp(x) => Some(x as f64),
        Value::Float32(x) => Some(x.into()),
        Value::Float64(x) => Some(x),
        Value::Date(x) => Some(x.into()),
        Value::Decimal(x) => Some(x as f64),
        _ => None,
    }
}

/// Statuses as a log or a training set holds them; what is no status stays a number that equals no status.
pub fn statuses(column: &ArrayRef) -> Option<Vec<u8>> {
    let numbers = column.as_primitive_opt::<arrow::datatypes::UInt8Type>()?;
    Some((0..numbers.len()).map(|row| if numbers.is_null(row) { 0 } else { numbers.value(row) }).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Float32Array, Float64Array, StringArray};

    use super::*;

    fn values(values: &[Value], of: &Type) -> ArrayRef {
        Value::to_array(values, of)
    }

    #[test]
    fn only_the_same_bits_are_the_same() {
        let other_nan = f64::from_bits(0x7ff8_0000_0000_0001);
        let left: ArrayRef = Arc::new(Float64Array::from(vec![Some(0.0), Some(f64::NAN), Some(f64::NAN), None, None]));
        let right: ArrayRef =
            Arc::new(Float64Array::from(vec![Some(-0.0), Some(f64::NAN), Some(other_nan), None, Some(0.0)]));
        assert_eq!(different(&left, &right), [true, false, true, false, true]);

        let left: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some("")]));
        let right: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, None]));
        assert_eq!(different(&left, &right), [false, false, true]);
        let numbers: ArrayRef = Arc::new(Float32Array::from(vec![1.0, 2.0, 3.0]));
        assert_eq!(different(&left, &numbers), [true; 3], "another type is another value");
    }

    #[test]
    fn nested_values_are_compared_by_their_parts() {
        let vector = Type::Vector(2);
        let left = values(&[Value::Vector([1.0, 2.0].into()), Value::Null, Value::Vector([0.0, 1.0].into())], &vector);
        let right = values(&[Value::Vector([1.0, 2.0].into()), Value::Null, Value::Vector([0.5, 1.0].into())], &vector);
        assert_eq!(different(&left, &right), [false, false, true]);
        assert_eq!(different(&left, &left), [false; 3]);

        let list = Type::List(Box::new(Type::Int64));
        let left = values(&[Value::List(vec![Value::Int64(1)]), Value::List(vec![]), Value::Null], &list);
        let right = values(&[Value::List(vec![Value::Int64(1)]), Value::Null, Value::List(vec![])], &list);
        assert_eq!(different(&left, &right), [false, true, true]);
    }

    #[test]
    fn a_verdict_looks_at_bits_and_statuses() {
        use Status::{NotFound, Present, Unavailable};
        fn check(served: (f64, Status), known: (f64, Status), event_time: (f64, Status), expected: Verdict) {
            let column = |(value, status): (f64, Status)| Column {
                values: Arc::new(Float64Array::from(vec![value])),
                statuses: vec![status as u8],
            };
            let found = judge(&column(served), &column(known), &column(event_time));
            assert_eq!(found, [expected], "{served:?} {known:?} {event_time:?}");
        }
        let one = (1.0, Present);
        check(one, one, one, Verdict::Equal);
        check((2.0, Present), one, one, Verdict::Bug);
        check((2.0, Present), one, (2.0, Present), Verdict::Bug);
        check((1.0, NotFound), one, one, Verdict::Bug);
        check(one, one, (2.0, Present), Verdict::Lateness);
        check(one, one, (1.0, NotFound), Verdict::Lateness);
        check((1.0, Unavailable), (1.0, Unavailable), one, Verdict::Fallback);
        // Not what the definitions say of a store that did not answer.
        check((3.0, Unavailable), (1.0, Unavailable), one, Verdict::Bug);
        check((1.0, Unavailable), one, one, Verdict::Bug);
    }

    #[test]
    fn a_null_is_worse_than_any_number() {
        let of = Type::Float64;
        let column = |value: Value| Column { values: values(&[value], &of), statuses: vec![1] };
        let worst = |value| badness(&column(value), &column(Value::Float64(100.0)), 0, &of);
        assert!(worst(Value::Null) > worst(Value::Float64(1e9)));
        assert!(worst(Value::Float64(50.0)) > worst(Value::Float64(99.0)));
        assert_eq!(worst(Value::Float64(f64::NAN)), f64::MAX);
    }
}
