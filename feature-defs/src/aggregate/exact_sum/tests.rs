use proptest::prelude::*;

use super::super::oracle::{Integer, assert_nearest};
use super::*;

fn total<T: Total>(values: &[Value]) -> T {
    let mut total = T::default();
    values.iter().for_each(|value| total.push(value));
    total
}

fn answers<T: Total>(values: &[Value], scale: i8) -> (Value, Value) {
    let total = total::<T>(values);
    let answer = |answer| ExactSum::<T>::new(answer).finish(&total);
    (answer(Answer::Sum), answer(Answer::Mean { scale }))
}

#[track_caller]
fn check_integers(values: &[i64], sum: Option<i64>, mean: Option<f64>) {
    let values: Vec<Value> = values.iter().map(|x| Value::Int64(*x)).collect();
    let expected = (sum.map_or(Value::Null, Value::Int64), mean.map_or(Value::Null, Value::Float64));
    assert_eq!(answers::<IntegerTotal>(&values, 0), expected);
}

#[test]
fn integers() {
    check_integers(&[], None, None);
    check_integers(&[1, 2], Some(3), Some(1.5));
    check_integers(&[-1, 0, 0], Some(-1), Some(-1.0 / 3.0));
    check_integers(&[0, 0], Some(0), Some(0.0));
    // Out of range on the way is no harm; at the end it is null, and the mean does not care.
    check_integers(&[i64::MAX, 1, -1], Some(i64::MAX), Some(3_074_457_345_618_258_602.0));
    check_integers(&[i64::MAX, i64::MAX], None, Some(9_223_372_036_854_775_807.0));
    check_integers(&[i64::MIN, i64::MIN], None, Some(-9_223_372_036_854_775_808.0));
    // Rounding the sum to a float64 before dividing would give 7205759403792795.
    check_integers(&[1 << 55, 4, 6, 0, 0], Some((1 << 55) + 10), Some(7_205_759_403_792_796.0));
}

#[track_caller]
fn check_decimals(values: &[i128], scale: i8, sum: Option<i128>, mean: Option<f64>) {
    let values: Vec<Value> = values.iter().map(|x| Value::Decimal(*x)).collect();
    let expected = (sum.map_or(Value::Null, Value::Decimal), mean.map_or(Value::Null, Value::Float64));
    assert_eq!(answers::<DecimalTotal>(&values, scale), expected);
}

#[test]
fn decimals() {
    const NINES: i128 = 10_i128.pow(38) - 1;
    check_decimals(&[], 2, None, None);
    check_decimals(&[110, 220], 2, Some(330), Some(1.65));
    check_decimals(&[-5], 1, Some(-5), Some(-0.5));
    check_decimals(&[NINES], 38, Some(NINES), Some(1.0));
    check_decimals(&[NINES, 1], 0, None, Some(5e37));
    check_decimals(&[-NINES, -1], 0, None, Some(-5e37));
    check_decimals(&[NINES, 1, -1], 0, Some(NINES), Some(3.3333333333333333e37));
    check_decimals(&[NINES; 5], 38, None, Some(1.0));
    check_decimals(&[NINES, NINES, NINES, -NINES, -NINES, -NINES], 2, Some(0), Some(0.0));
    check_decimals(&[5], -3, Some(5), Some(5000.0));
    check_decimals(&[1], -128, Some(1), Some(1e128));
    check_decimals(&[1], 127, Some(1), Some(1e-127));
}

#[track_caller]
fn check_floats(values: &[f64], sum: Option<f64>, mean: Option<f64>) {
    let values: Vec<Value> = values.iter().map(|x| Value::Float64(*x)).collect();
    let expected = (sum.map_or(Value::Null, Value::Float64), mean.map_or(Value::Null, Value::Float64));
    assert_eq!(answers::<FloatTotal>(&values, 0), expected);
}

#[test]
fn floats() {
    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;
    check_floats(&[], None, None);
    check_floats(&[-0.0], Some(0.0), Some(0.0));
    check_floats(&[0.1, 0.2], Some(0.30000000000000004), Some(0.15000000000000002));
    check_floats(&[f64::MAX, f64::MAX], Some(INF), Some(f64::MAX));
    check_floats(&[1.0, INF], Some(INF), Some(INF));
    check_floats(&[-INF, 1e308, -INF], Some(-INF), Some(-INF));
    check_floats(&[INF, -INF], Some(NAN), Some(NAN));
    check_floats(&[1.0, NAN], Some(NAN), Some(NAN));
    check_floats(&[INF, NAN], Some(NAN), Some(NAN));
    // The mean is that of the exact sum, not of 9007199254740996, which is the nearest to it.
    check_floats(&[9_007_199_254_740_992.0, 3.0], Some(9_007_199_254_740_996.0), Some(4_503_599_627_370_497.5));
    assert_eq!(
        answers::<FloatTotal>(&[Value::Float32(0.1), Value::Float32(1e30)], 0).0,
        Value::Float64(f64::from(1e30_f32))
    );
}

#[test]
fn values_apart_can_be_taken_out_again() {
    let number = |x: f64| total::<FloatTotal>(&[Value::Float64(x)]);
    let mut state = number(2.5);
    for x in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        state.merge(&number(x));
    }
    state.unmerge(&number(f64::NAN));
    assert_eq!(state.sum(), Value::Float64(f64::NAN));
    state.unmerge(&number(f64::INFINITY));
    assert_eq!(state.sum(), Value::Float64(f64::NEG_INFINITY));
    state.unmerge(&number(f64::NEG_INFINITY));
    assert_eq!(state, number(2.5));
    let encoded = |state: &FloatTotal| {
        let mut bytes = Vec::new();
        state.encode(&mut bytes);
        bytes
    };
    assert_eq!(encoded(&state), encoded(&number(2.5)));
}

#[track_caller]
fn check_bytes<T: Total>(values: &[Value], expected: &[u8]) {
    let state = total::<T>(values);
    let mut bytes = Vec::new();
    state.encode(&mut bytes);
    assert_eq!(bytes, expected);
    assert_eq!(T::decode(&mut { expected }), Ok(state));
}

#[test]
fn the_encodings_are_small_and_fixed() {
    check_bytes::<IntegerTotal>(&[], &[0, 0]);
    check_bytes::<IntegerTotal>(&[Value::Int32(0)], &[2, 0]);
    check_bytes::<IntegerTotal>(&[Value::Int64(100), Value::Int64(28)], &[4, 2, 128, 0]);
    check_bytes::<IntegerTotal>(&[Value::Int64(-128)], &[2, 1, 128]);
    check_bytes::<IntegerTotal>(&[Value::Int64(-129)], &[2, 2, 127, 255]);
    check_bytes::<DecimalTotal>(&[Value::Decimal(-1)], &[2, 1, 255]);
    // Three times 2^127 - 1 is 2^128 + 2^127 - 3.
    let large = [[6, 17, 253].as_slice(), &[255; 14], &[127, 1]].concat();
    check_bytes::<DecimalTotal>(&[i128::MAX; 3].map(Value::Decimal), &large);
    check_bytes::<FloatTotal>(&[], &[0, 0]);
    check_bytes::<FloatTotal>(&[Value::Float64(1.0)], &[2, 4, 134, 1, 0, 4]);
    check_bytes::<FloatTotal>(&[Value::Float64(f64::NAN), Value::Float64(1.0)], &[4, 6, 134, 1, 0, 4, 2, 0, 0]);
}

#[test]
fn other_spellings_are_refused() {
    assert!(matches!(IntegerTotal::decode(&mut [2, 1, 0].as_slice()), Err(DecodeError::Invalid(_))));
    assert!(matches!(IntegerTotal::decode(&mut [2, 2, 1, 0].as_slice()), Err(DecodeError::Invalid(_))));
    assert!(matches!(IntegerTotal::decode(&mut [2, 2, 255, 255].as_slice()), Err(DecodeError::Invalid(_))));
    assert!(matches!(IntegerTotal::decode(&mut [2, 17].as_slice()), Err(DecodeError::Invalid(_))));
    assert_eq!(IntegerTotal::decode(&mut [2, 16, 1].as_slice()), Err(DecodeError::Truncated));
    assert!(matches!(DecimalTotal::decode(&mut [2, 25].as_slice()), Err(DecodeError::Invalid(_))));
    assert!(matches!(FloatTotal::decode(&mut [2, 2, 0, 0, 0].as_slice()), Err(DecodeError::Invalid(_))));
}

proptest! {
    #[test]
    fn integer_answers_are_exact(values in proptest::collection::vec(prop_oneof![any::<i64>(), -9..9_i64], 1..50)) {
        let exact: i128 = values.iter().map(|x| i128::from(*x)).sum();
        let (sum, mean) = answers::<IntegerTotal>(&values.iter().map(|x| Value::Int64(*x)).collect::<Vec<_>>(), 0);
        prop_assert_eq!(sum, i64::try_from(exact).map_or(Value::Null, Value::Int64));
        let Value::Float64(mean) = mean else { panic!("{mean:?} is not a float") };
        assert_nearest(mean, &Integer::new(exact).shifted(1074), &[values.len() as u32]);
    }

    #[test]
    fn decimal_answers_are_exact(
        values in proptest::collection::vec(prop_oneof![any::<i128>(), -999..999_i128, -10_i128.pow(38)..10_i128.pow(38)], 1..50),
        scale in 0..39_i8,
    ) {
        let exact = values.iter().fold(Integer::ZERO, |sum, x| sum.plus(&Integer::new(*x)));
        let (sum, mean) = answers::<DecimalTotal>(&values.iter().map(|x| Value::Decimal(*x)).collect::<Vec<_>>(), scale);
        match sum {
            Value::Decimal(sum) => {
                prop_assert_eq!(Integer::new(sum), exact.clone());
                prop_assert!(sum.unsigned_abs() < DECIMAL_END);
            }
            _ => prop_assert!(exact.absolute().minus(&Integer::new(DECIMAL_END as i128)).is_not_negative()),
        }
        let Value::Float64(mean) = mean else { panic!("{mean:?} is not a float") };
        let divisors: Vec<u32> = std::iter::once(values.len() as u32).chain((0..scale).map(|_| 10)).collect();
        assert_nearest(mean, &exact.shifted(1074), &divisors);
    }
}
