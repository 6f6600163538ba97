use prost::Message as _;

use super::*;

fn value_round_trip(value_type: &Type, values: &[Value]) {
    let array = Value::to_array(values, value_type);
    let column = from_array("c", &array, value_type);
    let back = to_array(&column, value_type, values.len()).unwrap();
    assert_eq!(back.data_type(), &value_type.arrow());
    let read: Vec<Value> = (0..values.len()).map(|row| Value::from_array(&back, row, value_type)).collect();
    assert_eq!(read, values, "{value_type}");
    // As bytes, because a NaN does not equal itself.
    let again = from_array("c", &back, value_type);
    assert_eq!(again.encode_to_vec(), column.encode_to_vec(), "{value_type}: equal columns are equal bytes");
    // A slice of an array is not the array.
    let sliced = array.slice(1, values.len() - 1);
    let column = from_array("c", &sliced, value_type);
    let back = to_array(&column, value_type, values.len() - 1).unwrap();
    let read: Vec<Value> = (0..back.len()).map(|row| Value::from_array(&back, row, value_type)).collect();
    assert_eq!(read, values[1..], "{value_type}, sliced");
}

#[test]
fn every_type_comes_back_as_it_went() {
    let check = |text: &str, values: Vec<Value>| {
        let value_type = Type::parse(text).unwrap();
        let mut with_nulls = vec![Value::Null];
        with_nulls.extend(values.iter().cloned());
        with_nulls.push(Value::Null);
        with_nulls.extend(values.iter().cloned());
        value_round_trip(&value_type, &with_nulls);
        value_round_trip(&value_type, &values);
    };
    check("bool", vec![Value::Bool(true), Value::Bool(false)]);
    check("int32", vec![Value::Int32(i32::MIN), Value::Int32(7)]);
    check("int64", vec![Value::Int64(i64::MIN), Value::Int64(i64::MAX)]);
    check("float32", vec![Value::Float32(f32::NAN), Value::Float32(-1.5e-40)]);
    check("float64", vec![Value::Float64(f64::INFINITY), Value::Float64(0.1), Value::Float64(f64::NAN)]);
    check("string", vec![Value::String("".into()), Value::String("Zürich\0".into())]);
    check("binary", vec![Value::Binary([0, 255].into()), Value::Binary([].into())]);
    check("timestamp", vec![Value::Timestamp(-1), Value::Timestamp(1_372_636_800_000_000)]);
    check("date", vec![Value::Date(-1), Value::Date(15_887)]);
    check("decimal(38,3)", vec![Value::Decimal(-1), Value::Decimal(10i128.pow(38) - 1)]);
    let list = |items: &[i64]| Value::List(items.iter().map(|x| Value::Int64(*x)).collect());
    check("list<int64>", vec![list(&[]), list(&[1, 2]), Value::List(vec![Value::Null, Value::Int64(3)])]);
    let map =
        |pairs: &[(&str, f64)]| Value::Map(pairs.iter().map(|(k, v)| ((*k).into(), Value::Float64(*v))).collect());
    check("map<string,float64>", vec![map(&[("a", 1.0), ("b", 2.0)]), map(&[])]);
    let pair = |a: Value, b: Value| Value::Struct(vec![a, b]);
    check(
        "struct<a:int32,b:list<string>>",
        vec![pair(Value::Int32(1), Value::List(vec![Value::String("x".into())])), pair(Value::Null, Value::Null)],
    );
    check("vector(3)", vec![Value::Vector([1.0, 2.0, 3.0].into()), Value::Vector([0.0, -1.0, 0.5].into())]);
    check("list<list<bool>>", vec![Value::List(vec![Value::List(vec![Value::Bool(true)]), Value::Null])]);
}

#[test]
fn nulls_travel_as_zeros() {
    let array = Value::to_array(&[Value::Null, Value::String("x".into())], &Type::String);
    let column = from_array("c", &array, &Type::String);
    assert_eq!(column.validity, [0b10]);
    let Some(Values::Strings(strings)) = column.values else { panic!("strings") };
    assert_eq!(strings.values, ["", "x"]);
}

#[test]
fn what_does_not_fit_is_named() {
    let column = |values: Values, validity: &[u8]| Column {
        name: "origin".into(),
        validity: validity.to_vec(),
        values: Some(values),
    };
    let check = |column: Column, value_type: &str, rows: usize, expected: &str| {
        let error = to_array(&column, &Type::parse(value_type).unwrap(), rows).unwrap_err();
        assert_eq!(error.to_string(), expected);
    };
    let ints = |values: &[i64]| Values::Int64s(Int64Values { values: values.to_vec() });
    check(column(ints(&[1]), &[]), "string", 1, "column `origin` must be string, but carries int64");
    check(column(ints(&[1]), &[]), "int32", 1, "column `origin` must be int32, but carries int64");
    check(column(ints(&[1]), &[]), "int64", 2, "column `origin` (int64) has 1 values where 2 are expected");
    check(
        column(ints(&[1, 2]), &[1, 0]),
        "int64",
        2,
        "column `origin` (int64) has a validity of 2 bytes where 2 rows take 1",
    );
    let empty = Column { name: "origin".into(), ..Column::default() };
    check(empty, "int64", 2, "column `origin` (int64) carries no values, and does not say that all of them are null");
    let decimals = |precision, scale, unscaled: &[u8]| {
        Values::Decimals(DecimalValues { precision, scale, unscaled: unscaled.to_vec() })
    };
    check(
        column(decimals(9, 2, &[0; 16]), &[]),
        "decimal(9,3)",
        1,
        "column `origin` must be decimal(9,3), but carries decimal(9,2)",
    );
    check(
        column(decimals(2, 0, &100i128.to_be_bytes()), &[]),
        "decimal(2,0)",
        1,
        "column `origin` (decimal(2,0)): the value of row 0 has more than 2 digits",
    );
    let items = Some(Box::new(Column { name: "item".into(), validity: vec![], values: Some(ints(&[1])) }));
    check(
        column(Values::Lists(Box::new(ListValues { lengths: vec![2], items })), &[]),
        "list<int64>",
        1,
        "column `origin.item` (int64) has 1 values where 2 are expected",
    );
    let keys = Values::Strings(StringValues { values: vec!["a".into(), "a".into()] });
    let keys = Some(Box::new(Column { name: "key".into(), validity: vec![], values: Some(keys) }));
    let values = Some(Box::new(Column { name: "value".into(), validity: vec![], values: Some(ints(&[1, 2])) }));
    check(
        column(Values::Maps(Box::new(MapValues { lengths: vec![2], keys, values })), &[]),
        "map<string,int64>",
        1,
        "column `origin` (map<string,int64>): row 0 has the key `a` twice",
    );
}

#[test]
fn a_small_message_cannot_stand_for_a_large_one() {
    let column = Column { name: "v".into(), validity: vec![0; 1250], values: None };
    let error = to_array(&column, &Type::Vector(65_536), 10_000).unwrap_err();
    assert!(matches!(error, ConvertError::TooLarge { .. }), "{error}");
    let lists = ListValues { lengths: vec![u32::MAX; 8], items: None };
    let column = Column { name: "l".into(), validity: vec![], values: Some(Values::Lists(Box::new(lists))) };
    let error = to_array(&column, &Type::parse("list<bool>").unwrap(), 8).unwrap_err();
    assert!(matches!(error, ConvertError::TooLarge { .. }), "{error}");
    let all_null = Column { name: "n".into(), validity: vec![0], values: None };
    assert_eq!(to_array(&all_null, &Type::Int64, 3).unwrap().null_count(), 3);
}
