use super::*;

#[track_caller]
fn check(input: Type, values: &[Value], least: Value, greatest: Value) {
    for (replaces, expected) in [(Ordering::Less, least), (Ordering::Greater, greatest)] {
        let extremum = Extremum { replaces, input: input.clone() };
        let mut state = extremum.zero();
        values.iter().for_each(|value| extremum.push(&mut state, value, &Times::NONE));
        assert_eq!(extremum.finish(&state), expected);
        assert!(!extremum.unmerge(&mut state, &expected), "an extremum forgets what a removal would need");
        assert_eq!(state, expected);
        let mut bytes = Vec::new();
        extremum.encode(&state, &mut bytes);
        assert_eq!(extremum.decode(&mut bytes.as_slice()), Ok(expected));
    }
}

#[test]
fn every_ordered_type_has_a_least_and_a_greatest() {
    check(Type::Int64, &[], Value::Null, Value::Null);
    check(Type::Int64, &[3, i64::MIN, 7].map(Value::Int64), Value::Int64(i64::MIN), Value::Int64(7));
    check(Type::Int32, &[3, -7].map(Value::Int32), Value::Int32(-7), Value::Int32(3));
    check(Type::Bool, &[true, false].map(Value::Bool), Value::Bool(false), Value::Bool(true));
    let texts = ["b", "", "é", "ab"].map(|text| Value::String(text.into()));
    check(Type::String, &texts, texts[1].clone(), texts[2].clone());
    let blobs = [[255, 0].as_slice(), &[255], &[1]].map(|bytes| Value::Binary(bytes.into()));
    check(Type::Binary, &blobs, blobs[2].clone(), blobs[0].clone());
    check(Type::Timestamp, &[-1, 5].map(Value::Timestamp), Value::Timestamp(-1), Value::Timestamp(5));
    check(Type::Date, &[9, 5].map(Value::Date), Value::Date(5), Value::Date(9));
    let decimal = Type::Decimal { precision: 38, scale: 2 };
    check(decimal, &[i128::MAX, -5].map(Value::Decimal), Value::Decimal(-5), Value::Decimal(i128::MAX));
}

#[test]
fn nan_is_the_greatest_float_and_zero_has_no_sign() {
    let floats = [1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(Value::Float64);
    check(Type::Float64, &floats, Value::Float64(f64::NEG_INFINITY), Value::Float64(f64::NAN));
    check(Type::Float64, &[Value::Float64(-f64::NAN)], Value::Float64(f64::NAN), Value::Float64(f64::NAN));
    check(Type::Float32, &[2.0, -0.5].map(Value::Float32), Value::Float32(-0.5), Value::Float32(2.0));
    let minimum = Extremum { replaces: Ordering::Less, input: Type::Float64 };
    let mut state = minimum.zero();
    minimum.push(&mut state, &Value::Float64(-0.0), &Times::NONE);
    assert!(matches!(state, Value::Float64(x) if x.to_bits() == 0), "-0.0 is stored as 0.0");
}

#[test]
fn bytes_that_no_state_encodes_to_are_refused() {
    let minimum = Extremum { replaces: Ordering::Less, input: Type::Float64 };
    let decode = |bytes: &[u8]| minimum.decode(&mut { bytes });
    assert_eq!(decode(&[]), Err(DecodeError::Truncated));
    assert_eq!(decode(&[2]), Err(DecodeError::Invalid("a null mark is neither 0 nor 1")));
    let negative_zero = [&[1], (!(-0.0_f64).to_bits()).to_be_bytes().as_slice()].concat();
    assert_eq!(decode(&negative_zero), Err(DecodeError::Invalid("a float is -0.0 or a NaN other than ours")));
}
