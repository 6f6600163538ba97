use super::*;

fn check_type(text: &str, expected: Type) {
    assert_eq!(Type::parse(text), Ok(expected.clone()));
    assert_eq!(Type::parse(&expected.to_string()), Ok(expected.clone()), "the printed type parses back");
    assert_eq!(Type::from_arrow(&expected.arrow()), Some(expected), "the Arrow type maps back");
}

#[test]
fn types_parse_and_print() {
    check_type("float64", Type::Float64);
    check_type("decimal(10, 2)", Type::Decimal { precision: 10, scale: 2 });
    check_type("list<list<int64>>", Type::List(Box::new(Type::List(Box::new(Type::Int64)))));
    check_type("map<string, float64>", Type::Map(Box::new(Type::Float64)));
    check_type(
        "struct<a: int32, b: vector(3)>",
        Type::Struct(vec![("a".into(), Type::Int32), ("b".into(), Type::Vector(3))]),
    );
}

#[test]
fn wrong_types_suggest_the_nearest() {
    assert_eq!(Type::parse("flot64").unwrap_err().nearest, Some("float64"));
    assert_eq!(Type::parse("double").unwrap_err().nearest, Some("float64"));
    assert_eq!(Type::parse("decimal(99,2)").unwrap_err().nearest, Some("decimal(18,2)"));
    assert_eq!(Type::parse("float64 x").unwrap_err().text, "float64 x");
    assert_eq!(Type::parse("wibble").unwrap_err().nearest, None);
}

/// Values of one type, in order: the encoding must keep the order and come back the same.
fn check_ordered(value_type: Type, values: &[Value]) {
    let encoded: Vec<Vec<u8>> = values
        .iter()
        .map(|value| {
            let mut bytes = Vec::new();
            encode(value, &mut bytes);
            bytes
        })
        .collect();
    for (i, bytes) in encoded.iter().enumerate() {
        let mut rest = bytes.as_slice();
        assert_eq!(decode(&mut rest, &value_type).unwrap(), values[i]);
        assert!(rest.is_empty());
        for (j, other) in encoded.iter().enumerate() {
            assert_eq!(bytes.cmp(other), i.cmp(&j), "{:?} against {:?}", values[i], values[j]);
        }
    }
    let array = Value::to_array(values, &value_type);
    for (i, value) in values.iter().enumerate() {
        assert_eq!(&Value::from_array(&array, i, &value_type), value);
    }
}

#[test]
fn the_encoding_sorts_like_the_values() {
    check_ordered(Type::Int64, &[i64::MIN, -1, 0, 1, i64::MAX].map(Value::Int64));
    check_ordered(Type::Int32, &[i32::MIN, -1, 0, 1, i32::MAX].map(Value::Int32));
    let floats = [f64::NEG_INFINITY, -1.5, -f64::MIN_POSITIVE, 0.0, f64::MIN_POSITIVE, 2.0, f64::INFINITY, f64::NAN];
    check_ordered(Type::Float64, &floats.map(Value::Float64));
    check_ordered(Type::Float32, &[f32::NEG_INFINITY, -1.5, 0.0, 1e-40, f32::INFINITY, f32::NAN].map(Value::Float32));
    check_ordered(
        Type::Decimal { precision: 38, scale: 2 },
        &[i128::MIN / 2, -1, 0, 1, i128::MAX / 2].map(Value::Decimal),
    );
    let strings = ["", "\0", "\0\0", "\0a", "1", "12", "a", "ab", "b", "é"].map(|text| Value::String(text.into()));
    check_ordered(Type::String, &strings);
    let list = |items: &[i64]| Value::List(items.iter().copied().map(Value::Int64).collect());
    check_ordered(Type::List(Box::new(Type::Int64)), &[list(&[]), list(&[1]), list(&[1, 2]), list(&[2])]);
    let map =
        |pairs: &[(&str, f64)]| Value::Map(pairs.iter().map(|(k, v)| ((*k).into(), Value::Float64(*v))).collect());
    check_ordered(Type::Map(Box::new(Type::Float64)), &[map(&[]), map(&[("a", 1.0)]), map(&[("a", 1.0), ("b", 0.0)])]);
    let vector = |x: f32, y: f32| Value::Vector([x, y].into());
    check_ordered(Type::Vector(2), &[vector(-1.0, 5.0), vector(0.0, 0.0), vector(0.0, 1.0)]);
    let record = |x: Value| Value::Struct(vec![x]);
    check_ordered(
        Type::Struct(vec![("a".into(), Type::Bool)]),
        &[record(Value::Null), record(Value::Bool(false)), record(Value::Bool(true))],
    );
}

#[test]
fn composite_keys_do_not_collide() {
    let encoded = |a: &str, b: &str| {
        let mut bytes = Vec::new();
        encode(&Value::String(a.into()), &mut bytes);
        encode(&Value::String(b.into()), &mut bytes);
        bytes
    };
    assert_ne!(encoded("1", "23"), encoded("12", "3"));
    assert_ne!(encoded("1\0", "2"), encoded("1", "\x002"));
}

#[test]
fn negative_zero_and_nan_payloads_are_one_value() {
    assert_eq!(canonical_f64(-0.0).to_bits(), 0);
    assert_eq!(canonical_f64(-f64::NAN).to_bits(), canonical_f64(f64::NAN).to_bits());
    assert_eq!(canonical_f64(f64::from_bits(0x7ff0_0000_0000_0001)).to_bits(), 0x7ff8_0000_0000_0000);
    assert_eq!(canonical_f32(-0.0).to_bits(), 0);
}

#[test]
fn rows_round_trip_and_reject_damage() {
    let types = [Type::Float64, Type::String, Type::Int64];
    let row = [Value::Float64(f64::NAN), Value::Null, Value::Int64(-7)];
    let mut bytes = Vec::new();
    encode_row(&row, &mut bytes);
    assert_eq!(bytes.len(), 1 + 8 + 8);
    assert_eq!(decode_row(&bytes, &types).unwrap(), row);
    assert_eq!(decode_row(&bytes[..10], &types), Err(DecodeError::Truncated));
    bytes.push(0);
    assert_eq!(decode_row(&bytes, &types), Err(DecodeError::Trailing(1)));
    assert_eq!(decode_row(&[], &types), Err(DecodeError::Truncated));
}
