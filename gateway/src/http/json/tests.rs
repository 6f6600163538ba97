use super::*;

#[test]
fn columns_come_back_as_they_went() {
    let check = |value_type: &str, sent: Json| {
        let list = sent.as_array().unwrap();
        let column = column("c", list, &Type::parse(value_type).unwrap()).unwrap();
        assert_eq!(Json::Array(values(&column)), sent, "{value_type}");
    };
    check("bool", json!([true, null, false]));
    check("int64", json!([9_223_372_036_854_775_807_i64, null]));
    check("float64", json!([0.1, "NaN", "Infinity", "-Infinity", null]));
    check("float32", json!([0.5, null]));
    check("string", json!(["x", null, ""]));
    check("binary", json!(["00ff", null]));
    check("timestamp", json!(["2013-07-01T12:00:00.000001Z", null]));
    check("date", json!(["2013-07-01", "1950-03-04"]));
    check("decimal(9,2)", json!(["-0.05", "123.40", null]));
    check("list<int64>", json!([[1, null], null, []]));
    check("map<string,bool>", json!([{"a": true}, null, {}]));
    check("struct<a:int32,b:string>", json!([{"a": 1, "b": null}, null]));
    check("vector(2)", json!([[1.0, 0.5], null]));
}

#[test]
fn what_is_no_value_is_shown() {
    let error = column("origin", &[json!("JFK"), json!(1)], &Type::String).unwrap_err();
    assert_eq!(error.message, "column `origin` must be string, but row 1 is 1");
    assert!(column("c", &[json!("1.234")], &Type::parse("decimal(9,2)").unwrap()).is_err());
    assert!(column("c", &[json!(1.5)], &Type::Int64).is_err());
    assert_eq!(times(&[json!("2013-07-01T00:00:00Z"), json!(5)]).unwrap(), [1_372_636_800_000_000, 5]);
    assert!(times(&[json!(null)]).is_err());
}
