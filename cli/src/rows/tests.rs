use super::*;

fn inputs() -> Vec<NamedType> {
    let named = |name: &str, text: &str, nullable| NamedType { name: name.into(), r#type: text.into(), nullable };
    vec![named("origin", "string", true), named("distance", "float64", false), named("ids", "list<int64>", true)]
}

fn check(row: &str, expected: &str) {
    let inputs = inputs();
    let types: Vec<(String, Type)> =
        inputs.iter().map(|input| (input.name.clone(), Type::parse(&input.r#type).unwrap())).collect();
    let found = match parse_rows("service `s`", &inputs, &types, &[row.to_owned()]) {
        Ok(columns) => columns.iter().map(|values| format!("{:?}", values[0])).collect::<Vec<_>>().join(" "),
        Err(error) => error.to_string(),
    };
    assert_eq!(found, expected, "{row}");
}

#[test]
fn rows() {
    check("origin=JFK,distance=2475", "String(\"JFK\") Float64(2475.0) Null");
    check(" origin = JFK , distance = nan ", "String(\"JFK\") Float64(NaN) Null");
    check("origin=null,distance=1", "Null Float64(1.0) Null");
    check("origin=\"null\",distance=1", "String(\"null\") Float64(1.0) Null");
    check("origin=\"a,b\",distance=1", "String(\"a,b\") Float64(1.0) Null");
    check("origin=,distance=1e3", "String(\"\") Float64(1000.0) Null");
    check("distance=1,ids=[1,2,null]", "Null Float64(1.0) List([Int64(1), Int64(2), Null])");
}

#[test]
fn wrong_rows() {
    check("origin=JFK", "`--row origin=JFK` lacks `distance`, which service `s` takes; write `distance=...`");
    check("origin", "`origin` in `--row origin` is no `column=value`");
    check("distance=far", "`far` is not a float64, which column `distance` is");
    check("distance=1,distance=2", "`--row distance=1,distance=2` says `distance` twice");
    check("orgin=JFK,distance=1", "`orgin` is not a column that service `s` takes; did you mean `origin`?");
    check("origin=\"JFK,distance=1", "the quotes in `--row origin=\"JFK,distance=1` are not closed");
    check("distance=1,ids=[1,x]", "`[1,x]` is not a list<int64>, which column `ids` is: write JSON");
}

#[test]
fn values_of_every_type() {
    fn check(text: &str, value_type: &str, expected: Option<Value>) {
        let written = Written { text: text.to_owned(), quoted: false };
        let found = parse_value("c", &written, &Type::parse(value_type).unwrap()).ok();
        assert_eq!(format!("{found:?}"), format!("{expected:?}"), "{text} as {value_type}");
    }
    check("true", "bool", Some(Value::Bool(true)));
    check("1", "bool", None);
    check("2147483648", "int32", None);
    check("-5", "int64", Some(Value::Int64(-5)));
    check("1.5", "int64", None);
    check("inf", "float32", Some(Value::Float32(f32::INFINITY)));
    check("0xff00", "binary", Some(Value::Binary([255, 0].into())));
    check("f", "binary", None);
    check("1970-01-02", "date", Some(Value::Date(1)));
    check("1970-01-01T00:00:01Z", "timestamp", Some(Value::Timestamp(1_000_000)));
    check("-12.5", "decimal(5,2)", Some(Value::Decimal(-1250)));
    check("12.555", "decimal(5,2)", None);
    check("1234.5", "decimal(5,2)", None);
    check("0.00", "decimal(5,2)", Some(Value::Decimal(0)));
    check("[1, 2.5]", "vector(2)", Some(Value::Vector([1.0, 2.5].into())));
    check("[1]", "vector(2)", None);
    check(
        "{\"b\":1,\"a\":2}",
        "map<string,int64>",
        Some(Value::Map(vec![("a".into(), Value::Int64(2)), ("b".into(), Value::Int64(1))])),
    );
    check("{\"a\":1}", "struct<a:int64,b:string>", Some(Value::Struct(vec![Value::Int64(1), Value::Null])));
    check("{\"c\":1}", "struct<a:int64,b:string>", None);
}
