use std::sync::Arc;

use arrow::array::ArrayRef;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::value::{Type, Value};

/// The columns every test may use.
fn columns() -> Vec<(Option<&'static str>, &'static str, Type)> {
    let fields = vec![("p".to_string(), Type::Int64), ("q".to_string(), Type::Float64)];
    vec![
        (None, "b", Type::Bool),
        (None, "j", Type::Int32),
        (None, "k", Type::Int32),
        (None, "i", Type::Int64),
        (None, "n", Type::Int64),
        (None, "f", Type::Float32),
        (None, "x", Type::Float64),
        (None, "y", Type::Float64),
        (None, "s", Type::String),
        (None, "t", Type::String),
        (None, "bin", Type::Binary),
        (None, "ts", Type::Timestamp),
        (None, "until", Type::Timestamp),
        (None, "d", Type::Date),
        (None, "dec", Type::Decimal { precision: 18, scale: 2 }),
        (None, "big", Type::Decimal { precision: 38, scale: 10 }),
        (None, "v", Type::Vector(3)),
        (None, "w", Type::Vector(3)),
        (None, "l", Type::List(Box::new(Type::Float64))),
        (None, "m", Type::Map(Box::new(Type::Int64))),
        (None, "st", Type::Struct(fields)),
        (None, "wind_speed", Type::Float64),
        (Some("weather"), "temp", Type::Float64),
        (Some("weather"), "visib", Type::Float64),
        (Some("load"), "temp", Type::Float64),
        (Some("load"), "late_6h", Type::Float64),
    ]
}

fn environment() -> Environment {
    let mut environment = Environment::new();
    for (relation, name, value_type) in columns() {
        environment.column(relation, name, value_type);
    }
    environment.relation_times("weather");
    environment.request_time();
    environment.vocabulary("carriers", ["9E", "AA", "UA"].map(str::to_string).into());
    environment
}

fn type_of(environment: &Environment, column: &ColumnRef) -> Type {
    environment.columns[&(column.relation.clone(), column.name.clone())].clone()
}

/// The row that `check` evaluates over: a value per column, in words a reader can compute with.
fn row(column: &ColumnRef) -> Value {
    let s = |text: &str| Value::String(text.into());
    match (column.relation.as_deref(), column.name.as_str()) {
        (None, "b") => Value::Bool(true),
        (None, "j") => Value::Int32(-3),
        (None, "k") => Value::Int32(i32::MAX),
        (None, "i") => Value::Int64(7),
        (None, "n") => Value::Null,
        (None, "f") => Value::Float32(0.1),
        (None, "x") => Value::Float64(2.5),
        (None, "y") => Value::Float64(f64::NAN),
        (None, "s") => s("Grüße, Welt"),
        (None, "t") => s("UA"),
        (None, "bin") => Value::Binary([1u8, 2].as_slice().into()),
        // 2013-07-01T05:30:15.250Z, a Monday
        (None, "ts") => Value::Timestamp(1_372_656_615_250_000),
        (None, "until") => Value::Timestamp(1_372_656_615_250_000 + 3_600_000_000),
        (None, "d") => Value::Date(15_887),
        (None, "dec") => Value::Decimal(1_234),
        (None, "big") => Value::Decimal(10i128.pow(37)),
        (None, "v") => Value::Vector([1.0, 2.0, 2.0].into()),
        (None, "w") => Value::Vector([3.0, 0.0, 4.0].into()),
        (None, "l") => Value::List(vec![Value::Float64(1.5), Value::Null, Value::Float64(3.5)]),
        (None, "m") => Value::Map(vec![("a".into(), Value::Int64(1)), ("b".into(), Value::Null)]),
        (None, "st") => Value::Struct(vec![Value::Int64(11), Value::Null]),
        (None, "wind_speed") => Value::Float64(10.0),
        (Some("weather"), "temp") => Value::Float64(40.0),
        (Some("weather"), "visib") => Value::Null,
        (Some("load"), "late_6h") => Value::Float64(0.25),
        (Some("weather"), EVENT_TIME_COLUMN) => Value::Timestamp(1_372_656_600_000_000),
        (None, AT_COLUMN) => Value::Timestamp(1_372_656_690_500_000),
        _ => Value::Null,
    }
}

fn compile(text: &str) -> Expression {
    Expression::compile(text, &environment(), None).unwrap_or_else(|e| panic!("{text}: {e:?}"))
}

fn evaluate_row(expression: &Expression) -> Value {
    let environment = environment();
    let columns: Vec<ArrayRef> = expression
        .columns()
        .iter()
        .map(|column| Value::to_array([&row(column)], &type_of(&environment, column)))
        .collect();
    let array = expression.evaluate(&columns, 1).unwrap();
    Value::from_array(&array, 0, expression.value_type())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_string(),
        Value::Bool(x) => x.to_string(),
        Value::Int32(x) => x.to_string(),
        Value::Int64(x) => x.to_string(),
        Value::Float32(x) => format!("{x:?}"),
        Value::Float64(x) => format!("{x:?}"),
        Value::String(x) => format!("{x:?}"),
        Value::Timestamp(x) => time::civil(*x).unwrap().format("%Y-%m-%d %H:%M:%S%.f").to_string(),
        Value::Date(x) => format!("day {x}"),
        other => format!("{other:?}"),
    }
}

/// The value of a text over the row above, and its type.
#[track_caller]
fn check(text: &str, expected: &str) {
    let expression = compile(text);
    let found = format!("{} {}", shown(&evaluate_row(&expression)), expression.value_type());
    assert_eq!(found, expected, "{text}");
}

/// An error's message, the text it underlines, and its help.
#[track_caller]
fn check_error(text: &str, message: &str, underlined: &str, help: Option<&str>) {
    let error = Expression::compile(text, &environment(), None).expect_err(text);
    let place = error.offset.map_or("", |(start, end)| &text[start..end]);
    assert_eq!((error.message.as_str(), place, error.help.as_deref()), (message, underlined, help), "{text}");
}

#[test]
fn arithmetic() {
    check("i + 1", "8 int64");
    check("k + k", "-2 int32");
    check("9223372036854775807 + i", "-9223372036854775802 int64");
    check("-9223372036854775808 - 1", "9223372036854775807 int64");
    check("-(-9223372036854775807 - 1)", "-9223372036854775808 int64");
    check("i / 2", "3 int64");
    check("i / (i - 7)", "null int64");
    check("i % 0", "null int64");
    check("(-9223372036854775807 - 1) / (j + 2)", "null int64");
    check("x / 0", "inf float64");
    check("-x / 0.0", "-inf float64");
    check("0.0 / (x - 2.5)", "NaN float64");
    check("-(x - 2.5)", "0.0 float64");
    check("i + x", "9.5 float64");
    check("f + f", "0.2 float32");
    check("f + 1.0", "1.1000000014901161 float64");
    check("f + i", "7.100000001490116 float64");
    check("i + n", "null int64");
    check("i + NULL", "null int64");
    check("+i - -i", "14 int64");
    check("mod(i, 4)", "3 int64");
    check("1 + 2 * 3", "7 int64");
    check("dec + dec", "Decimal(2468) decimal(19,2)");
    check("dec / 0.0", "inf float64");
    check("CAST(dec / (dec - dec) AS float64)", "null float64");
    check("CAST(big * big * big AS float64)", "null float64");
    check("dec > 12", "true bool");
}

#[test]
fn comparison_and_logic() {
    check("i > j", "true bool");
    check("y > x", "true bool");
    check("y = y", "true bool");
    check("y = 0.0 / 0.0", "true bool");
    check("y > 1e308 * 10", "true bool");
    check("-0.0 = 0.0", "true bool");
    check("-(x - 2.5) < 0.0", "false bool");
    check("n = 1", "null bool");
    check("n = 1 AND false", "false bool");
    check("n = 1 OR true", "true bool");
    check("NOT b", "false bool");
    check("(n = 1) IS TRUE", "false bool");
    check("(n = 1) IS NOT FALSE", "true bool");
    check("(n = 1) IS UNKNOWN", "true bool");
    check("n IS NULL", "true bool");
    check("i IS NOT NULL", "true bool");
    check("n IS DISTINCT FROM i", "true bool");
    check("y IS NOT DISTINCT FROM y", "true bool");
    check("i BETWEEN 1 AND 7", "true bool");
    check("i NOT BETWEEN 1 AND x", "true bool");
    check("i IN (1, 7)", "true bool");
    check("i IN (1, NULL)", "null bool");
    check("i NOT IN (1, 7)", "false bool");
    check("y IN (1.0, y)", "true bool");
    check("y IN (1.0, 0.0/0.0)", "true bool");
    check("(x - 2.5) IN (-0.0)", "true bool");
    check("t IN ('AA', 'UA')", "true bool");
    check("t LIKE 'U%'", "true bool");
    check("t NOT LIKE '_A'", "false bool");
    check("s ILIKE 'GR%WELT'", "true bool");
    check("s LIKE NULL", "null bool");
    check("ts > '2013-07-01'", "true bool");
    check("d = '2013-07-01'", "true bool");
    check("ts >= d", "true bool");
    check("ts BETWEEN '2013-06-30' AND '2013-07-02T00:00:00+02:00'", "true bool");
    check("until - ts = INTERVAL '1 hour'", "true bool");
}

#[test]
fn choosing() {
    check("CASE WHEN i > 5 THEN 1.0 ELSE 0.0 END", "1.0 float64");
    check("CASE WHEN n > 5 THEN 1 END", "null int64");
    check("CASE WHEN b THEN 1 ELSE 2.5 END", "1.0 float64");
    check("CASE t WHEN 'AA' THEN 1 WHEN 'UA' THEN 2 ELSE 0 END", "2 int64");
    check("CASE WHEN i = 0 THEN 0 ELSE 10 / i END", "1 int64");
    check("coalesce(n, j, 5)", "-3 int64");
    check("coalesce(NULL, NULL, i)", "7 int64");
    check("coalesce(n, n)", "null int64");
    check("nullif(i, 7)", "null int64");
    check("nullif(i, n)", "7 int64");
    check("nullif(y, y)", "null float64");
    check("greatest(i, j, 2.5)", "7.0 float64");
    check("greatest(x, y)", "NaN float64");
    check("least(x, y)", "2.5 float64");
    check("least(n, i)", "7 int64");
    check("greatest('a', t)", "\"a\" string");
}

#[test]
fn mathematics() {
    check("abs(j)", "3 int32");
    check("abs(-9223372036854775807 - 1)", "null int64");
    check("abs(-x)", "2.5 float64");
    check("abs(-dec)", "Decimal(1234) decimal(18,2)");
    check("ceil(x)", "3.0 float64");
    check("floor(-x)", "-3.0 float64");
    check("ceil(-0.5)", "0.0 float64");
    check("round(x)", "3.0 float64");
    check("round(-x)", "-3.0 float64");
    check("round(2.345678, 2)", "2.35 float64");
    check("round(12345.0, -2)", "12300.0 float64");
    check("trunc(-2.39, 1)", "-2.3 float64");
    check("round(i)", "7 int64");
    check("sign(j)", "-1 int32");
    check("sign(-0.0)", "0.0 float64");
    check("sign(y)", "NaN float64");
    check("sqrt(-1)", "NaN float64");
    check("sqrt(16)", "4.0 float64");
    check("isnan(y)", "true bool");
    check("isnan(i)", "false bool");
    check("exp(0)", "1.0 float64");
    check("ln(0)", "-inf float64");
    check("log(100)", "2.0 float64");
    check("log(2, 8)", "3.0 float64");
    check("log2(8)", "3.0 float64");
    check("power(2, 10)", "1024.0 float64");
    check("pow(wind_speed, 0.16)", "1.4454397707459274 float64");
    check("sin(pi() / 2)", "1.0 float64");
    check("atan2(1, 0) * 2 = pi()", "true bool");
    check("degrees(pi())", "180.0 float64");
    check("cbrt(27)", "3.0 float64");
    check("tanh(1e9)", "1.0 float64");
    check(
        "35.74 + 0.6215*weather.temp - 35.75*power(wind_speed, 0.16) + 0.4275*weather.temp*power(wind_speed, 0.16)",
        "33.64254827558847 float64",
    );
}

#[test]
fn strings() {
    check("upper(s)", "\"GRÜSSE, WELT\" string");
    check("lower(s)", "\"grüße, welt\" string");
    check("length(s)", "11 int64");
    check("octet_length(s)", "13 int64");
    check("substr(s, 3, 3)", "\"üße\" string");
    check("substr(s, 0, 3)", "\"Gr\" string");
    check("substr(s, -5)", "\"Grüße, Welt\" string");
    check("substring(s FROM 8 FOR 2)", "\"We\" string");
    check("substr(s, 2, -1)", "null string");
    check("left(s, 2)", "\"Gr\" string");
    check("left(s, -6)", "\"Grüße\" string");
    check("right(s, 4)", "\"Welt\" string");
    check("right(s, -7)", "\"Welt\" string");
    check("trim('  a ')", "\"a\" string");
    check("trim(both 'x' from 'xxaxx')", "\"a\" string");
    check("ltrim('xya', 'yx')", "\"a\" string");
    check("rtrim('a  ')", "\"a\" string");
    check("concat(t, NULL, '!')", "\"UA!\" string");
    check("t || '-' || s", "\"UA-Grüße, Welt\" string");
    check("t || NULL", "null string");
    check("starts_with(s, 'Gr')", "true bool");
    check("ends_with(s, 'Gr')", "false bool");
    check("contains(s, 'üß')", "true bool");
    check("replace('abcabc', 'b', 'XX')", "\"aXXcaXXc\" string");
    check("replace('abc', '', 'X')", "\"abc\" string");
    check("split_part('a,b,c', ',', 2)", "\"b\" string");
    check("split_part('a,b,c', ',', -1)", "\"c\" string");
    check("split_part('a,b,c', ',', 9)", "\"\" string");
    check("split_part('a,b,c', ',', 0)", "null string");
    check("strpos(s, 'W')", "8 int64");
    check("position('z' IN s)", "0 int64");
    check("lpad('7', 3, '0')", "\"007\" string");
    check("rpad('abc', 2)", "\"ab\" string");
    check("lpad('a', 100000)", "null string");
    check("'it''s'", "\"it's\" string");
}

#[test]
fn casts() {
    check("CAST('12' AS int64)", "12 int64");
    check("CAST('12x' AS int64)", "null int64");
    check("'1.5'::float64", "1.5 float64");
    check("TRY_CAST(t AS double precision)", "null float64");
    check("CAST(x AS int32)", "2 int32");
    check("CAST(1e30 AS int64)", "null int64");
    check("CAST(y AS int64)", "null int64");
    check("CAST('-0' AS float64)", "0.0 float64");
    check("CAST('-nan' AS float64)", "NaN float64");
    check("CAST(i AS string)", "\"7\" string");
    check("CAST(b AS int32)", "1 int32");
    check("CAST('yes' AS bool)", "true bool");
    check("CAST(ts AS date)", "day 15887 date");
    check("CAST(d AS timestamp)", "2013-07-01 00:00:00 timestamp");
    check("CAST(ts AS string)", "\"2013-07-01T05:30:15.250Z\" string");
    check("CAST(d AS text)", "\"2013-07-01\" string");
    check("CAST('2013-07-01 01:30:15+02:00' AS timestamp)", "2013-06-30 23:30:15 timestamp");
    check("CAST('soon' AS timestamp)", "null timestamp");
    check("TIMESTAMP '2013-07-01 12:00:00'", "2013-07-01 12:00:00 timestamp");
    check("DATE '2013-07-01'", "day 15887 date");
    check("CAST(x AS decimal(10,2))", "Decimal(250) decimal(10,2)");
    check("CAST(123456.0 AS numeric(4,1))", "null decimal(4,1)");
    check("CAST(dec AS float64)", "12.34 float64");
    check("CAST(dec AS int64)", "12 int64");
    check("CAST(1e39 AS float32)", "inf float32");
    check("CAST(t AS binary)", "Binary([85, 65]) binary");
}

#[test]
fn times() {
    check("date_part('hour', ts)", "5 int64");
    check("EXTRACT(YEAR FROM ts)", "2013 int64");
    check("date_part('dow', ts)", "1 int64");
    check("date_part('isodow', d)", "1 int64");
    check("date_part('doy', ts)", "182 int64");
    check("date_part('quarter', ts)", "3 int64");
    check("date_part('week', ts)", "27 int64");
    check("date_part('millisecond', ts)", "15250 int64");
    check("date_part('epoch', ts)", "1372656615.25 float64");
    check("date_part('epoch', until - ts)", "3600.0 float64");
    check("date_trunc('hour', ts)", "2013-07-01 05:00:00 timestamp");
    check("date_trunc('week', ts + INTERVAL '3 days')", "2013-07-01 00:00:00 timestamp");
    check("date_trunc('quarter', ts)", "2013-07-01 00:00:00 timestamp");
    check("date_trunc('year', d)", "2013-01-01 00:00:00 timestamp");
    check("ts + INTERVAL '1 month' - INTERVAL '1' DAY", "2013-07-31 05:30:15.250 timestamp");
    check("TIMESTAMP '2013-01-31 00:00:00' + INTERVAL '1 month'", "2013-02-28 00:00:00 timestamp");
    check("INTERVAL '90 minutes' + d", "2013-07-01 01:30:00 timestamp");
    check("d - DATE '2013-06-30'", "1 int64");
    check("d + 1", "day 15888 date");
    check("to_timestamp_seconds(1372656615)", "2013-07-01 05:30:15 timestamp");
    check("to_timestamp_seconds(9223372036854775807)", "null timestamp");
    check("to_timestamp_seconds(y)", "null timestamp");
    check("to_timestamp_millis(1.5)", "1970-01-01 00:00:00.001500 timestamp");
    // New York is four hours behind in summer and five in winter.
    check("local(ts, 'America/New_York')", "2013-07-01 01:30:15.250 timestamp");
    check("date_part('hour', local(ts, 'America/New_York'))", "1 int64");
    check("date_part('hour', local(ts + INTERVAL '6 months', 'America/New_York'))", "0 int64");
    check("date_trunc('day', local(ts, 'America/New_York')) = d", "true bool");
}

#[test]
fn ours() {
    check("vocab(t, 'carriers')", "3 int64");
    check("vocab(s, 'carriers')", "0 int64");
    check("vocab(NULL, 'carriers')", "0 int64");
    check("bucketize(x, [0, 2.5, 3])", "2 int64");
    check("bucketize(y, [0, 2.5, 3])", "3 int64");
    check("bucketize(n, [0])", "null int64");
    check("bucketize(-5, [-10, -5.0, 0])", "2 int64");
    check("at()", "2013-07-01 05:31:30.500 timestamp");
    check("event_time(weather)", "2013-07-01 05:30:00 timestamp");
    check("age(weather)", "90.5 float64");
    check("dot(v, w)", "11.0 float64");
    check("norm(v)", "3.0 float64");
    check("cosine(v, w)", "0.7333333333333333 float64");
    check("v[1]", "1.0 float32");
    check("v[4]", "null float32");
    check("l[-1]", "3.5 float64");
    check("l[2]", "null float64");
    check("m['a']", "1 int64");
    check("m['zzz']", "null int64");
    check("st.p", "11 int64");
    check("st.q", "null float64");
    check("weather.temp - load.late_6h", "39.75 float64");
    // The hash is part of stored assignments: these values never change.
    check("hash_bucket('abc', 1000000)", "111139 int64");
    check("hash_bucket(7, 1000000)", "14184 int64");
    check("hash_bucket(n, 10)", "null int64");
    check("hash_bucket(CAST(7 AS int32), 1000000) = hash_bucket(7, 1000000)", "true bool");
    check("2 * pi() * date_part('hour', local(ts, 'America/New_York')) / 24", "0.2617993877991494 float64");
}

/// A change of any result of any mathematical function, on any machine, shows here and asks for a new FUNCTION_EPOCH.
#[test]
fn mathematics_is_pinned() {
    let values: Vec<Value> =
        (-200..=200).map(|i| Value::Float64(f64::from(i) * 0.37 + f64::from(i * i * i) * 1e-3)).collect();
    let column = Value::to_array(&values, &Type::Float64);
    let digest = |text: &str| {
        let array = compile(text).evaluate(std::slice::from_ref(&column), values.len()).unwrap();
        (0..values.len()).fold(0xcbf2_9ce4_8422_2325_u64, |digest, i| {
            match Value::from_array(&array, i, &Type::Float64) {
                Value::Float64(x) => (digest ^ x.to_bits()).wrapping_mul(0x100_0000_01b3),
                other => panic!("{text}: {other:?}"),
            }
        })
    };
    let names = [
        "exp", "ln", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "cbrt",
        "sqrt", "degrees", "radians",
    ];
    let mut found: Vec<(String, u64)> =
        names.iter().map(|name| format!("{name}(x)")).map(|text| (text.clone(), digest(&text))).collect();
    for text in ["power(x, 0.16)", "power(1.7, x)", "atan2(x, 2.0)", "log(3.0, x)", "round(x, 2)"] {
        found.push((text.to_string(), digest(text)));
    }
    let folded = found.iter().fold(0u64, |all, (_, digest)| all.rotate_left(7) ^ digest);
    assert_eq!(folded, PINNED_MATHEMATICS, "{found:#x?}");
}

const PINNED_MATHEMATICS: u64 = 11_970_202_435_429_656_883;

#[test]
fn errors() {
    check_error("wnd_speed + 1", "no column `wnd_speed`", "wnd_speed", Some("did you mean `wind_speed`?"));
    check_error("1 +\n  wnd_speed", "no column `wnd_speed`", "wnd_speed", Some("did you mean `wind_speed`?"));
    check_error("visib", "no column `visib`", "visib", Some("did you mean `weather.visib`?"));
    check_error("temp", "no column `temp`", "temp", Some("say which: `load.temp`, `weather.temp`"));
    check_error("wether.temp", "no input `wether`", "wether", Some("did you mean `weather`?"));
    check_error("weather.tmp", "`weather` has no column `tmp`", "tmp", Some("did you mean `temp`?"));
    check_error(
        "weather.__event_time",
        "`weather` has no column `__event_time`",
        "__event_time",
        Some("`weather` has `temp`, `visib`"),
    );
    check_error("__at", "no column `__at`", "__at", None);
    check_error("st.r", "struct<p:int64,q:float64> has no field `r`", "r", Some("did you mean `p`?"));
    check_error("sqr(x)", "no function `sqr`", "sqr", Some("did you mean `sqrt`?"));
    check_error("frobnicate(x)", "no function `frobnicate`", "frobnicate", None);
    check_error("power(x)", "`power` is given 1 argument", "power", Some("it is used as power(x, y)"));
    check_error(
        "now()",
        "`now` is not allowed in an expression",
        "now",
        Some("an expression has no clock; at() is the time that is asked about"),
    );
    check_error(
        "x - avg(x)",
        "`avg` is not allowed in an expression",
        "avg",
        Some("aggregates are declared under `aggregates` of a view with windows"),
    );
    check_error(
        "x + s",
        "cannot add float64 and string",
        "x + s",
        Some("CAST(... AS float64) makes a number of a string"),
    );
    check_error(
        "i * (1 - s)",
        "cannot subtract string from int64",
        "1 - s",
        Some("CAST(... AS int64) makes a number of a string"),
    );
    check_error("s + t", "cannot add string and string", "s + t", Some("|| joins strings"));
    check_error(
        "s = 1",
        "cannot compare string with int64",
        "s = 1",
        Some("CAST(... AS int64) makes a number of a string"),
    );
    check_error("v = w", "cannot compare vector(3) values", "v = w", Some("compare their elements"));
    check_error("NOT i", "NOT needs a bool, not int64", "i", None);
    check_error("CASE WHEN i THEN 1 END", "WHEN needs a bool, not int64", "i", None);
    check_error(
        "CASE WHEN b THEN 1 ELSE 'a' END",
        "cannot return both int64 and string",
        "1 ELSE 'a'",
        Some("CAST(... AS int64) makes a number of a string"),
    );
    check_error("upper(i)", "upper needs a string, not int64", "i", Some("CAST(... AS string) makes a string of it"));
    check_error(
        "sqrt(s)",
        "sqrt needs a number, not string",
        "s",
        Some("CAST(... AS float64) makes a number of a string"),
    );
    check_error("ts > 'soon'", "'soon' is not a timestamp", "'soon'", None);
    check_error(
        "ts = local(ts, 'UTC')",
        "cannot compare timestamp with local timestamp",
        "ts = local(ts, 'UTC'",
        Some("a wall clock and a moment differ by the zone; convert neither or both with local"),
    );
    check_error(
        "local(ts, 'America/NewYork')",
        "no time zone `America/NewYork`",
        "'America/NewYork'",
        Some("did you mean `America/New_York`?"),
    );
    check_error("vocab(t, 'carrier')", "no vocabulary `carrier`", "'carrier'", Some("did you mean `carriers`?"));
    check_error("date_part('hor', ts)", "a time has no field `hor`", "ts", Some("did you mean `hour`?"));
    check_error(
        "age(load)",
        "no input `load` with an event time",
        "load",
        Some("inputs with an event time are `weather`"),
    );
    check_error("bucketize(x, [1, 1])", "the edges must ascend", "1", None);
    check_error("hash_bucket(s, 0)", "hash_bucket needs a constant, positive number of buckets", "0", None);
    check_error("CAST(x AS flot64)", "`flot64` is not a type", "x", Some("did you mean `float64`?"));
    check_error(
        "CAST(i AS timestamp)",
        "cannot cast int64 to timestamp",
        "i",
        Some("to_timestamp_seconds, to_timestamp_millis and to_timestamp_micros turn numbers into timestamps"),
    );
    check_error(
        "9223372036854775808",
        "9223372036854775808 does not fit into an int64",
        "9223372036854775808",
        Some("write it with a decimal point to make it a float64"),
    );
    check_error(
        "until - ts",
        "a value of type duration cannot be kept",
        "until - ts",
        Some("date_part('epoch', ...) gives its seconds"),
    );
    check_error(
        "NULL",
        "a value of type null cannot be kept",
        "NULL",
        Some("declare a type, or write CAST(NULL AS ...)"),
    );
    check_error("x +", "expected: an expression, found: the end", "", None);
    check_error("x y", "the expression ends before `y`", "y", None);
    check_error("x = 'a", "unterminated string literal", "'", None);
    check_error("", "the expression is empty", "", None);
    check_error(
        "(SELECT 1)",
        "an expression cannot contain a subquery",
        "(SELECT 1)",
        Some("join by making the other table a view and an input"),
    );
    check_error("x > $1", "an expression has no parameters such as `$1`", "$1", None);
    check_error(
        "sum(x) OVER ()",
        "`sum` is not allowed in an expression",
        "sum",
        Some("aggregates are declared under `aggregates` of a view with windows"),
    );
    check_error("concat(*)", "an expression cannot contain a wildcard", "concat", None);
    check_error("\"Grü\" + wnd_speed", "no column `Grü`", "\"Grü\"", None);
    check_error("'ü' || wnd_speed", "no column `wnd_speed`", "wnd_speed", Some("did you mean `wind_speed`?"));
}

#[test]
fn declared_types() {
    let declare = |text: &str, declared: &str| {
        Expression::compile(text, &environment(), Some(&Type::parse(declared).unwrap()))
            .map(|expression| format!("{} {}", shown(&evaluate_row(&expression)), expression.value_type()))
            .map_err(|e| (e.message, e.help))
    };
    assert_eq!(declare("i", "float64"), Ok("7.0 float64".to_string()));
    assert_eq!(declare("j", "int64"), Ok("-3 int64".to_string()));
    assert_eq!(declare("x", "float32"), Ok("2.5 float32".to_string()));
    assert_eq!(declare("i", "decimal(10,2)"), Ok("Decimal(700) decimal(10,2)".to_string()));
    assert_eq!(declare("d", "timestamp"), Ok("2013-07-01 00:00:00 timestamp".to_string()));
    assert_eq!(declare("NULL", "string"), Ok("null string".to_string()));
    assert_eq!(declare("local(ts, 'UTC')", "timestamp"), Ok("2013-07-01 05:30:15.250 timestamp".to_string()));
    assert_eq!(
        declare("s", "float64"),
        Err((
            "the expression is string, but the feature is declared float64".to_string(),
            Some("CAST(... AS float64) converts it; what does not fit becomes null".to_string())
        ))
    );
    assert_eq!(
        declare("i", "int32"),
        Err((
            "the expression is int64, but the feature is declared int32".to_string(),
            Some("CAST(... AS int32) converts it; what does not fit becomes null".to_string())
        ))
    );
    assert_eq!(
        declare("v", "bool"),
        Err(("the expression is vector(3), but the feature is declared bool".to_string(), None))
    );
}

#[test]
fn canonical_text_ignores_spelling_only() {
    let canonical = |text: &str| compile(text).canonical_text();
    assert_eq!(canonical("x+1.50 * (y)"), "(\"x\" + (1.5 * \"y\"))");
    assert_eq!(canonical("  X1.p ".trim().replace("X1", "st").as_str()), "\"st\".\"p\"");
    for (a, b) in [
        ("power(x,2)", "POW( x , 2 )"),
        ("x::int64", "CAST(x AS BIGINT)"),
        ("(a_ and b)".replace("a_", "b").as_str(), "b   AND b"),
        ("extract(hour from ts)", "date_part('HOUR', ts)"),
        ("case when b then 1 end", "CASE WHEN (b) THEN 1 END"),
    ] {
        assert_eq!(canonical(a), canonical(b));
    }
    for (a, b) in [
        ("x - y - 1", "x - (y - 1)"),
        ("'A'", "'a'"),
        ("1", "1.0"),
        ("x", "\"wind_speed\""),
        ("b and b or b", "b and (b or b)"),
    ] {
        assert_ne!(canonical(a), canonical(b), "{a} / {b}");
    }
}

#[test]
fn reads_what_it_names() {
    let expression = compile("age(weather) + weather.temp + x + x + vocab(t, 'carriers')");
    let columns: Vec<(String, bool)> = expression.columns().iter().map(|c| (c.to_string(), c.is_hidden())).collect();
    let expected =
        [("__at", true), ("weather.__event_time", true), ("weather.temp", false), ("x", false), ("t", false)];
    assert_eq!(columns, expected.map(|(name, hidden)| (name.to_string(), hidden)));
    assert_eq!(expression.vocabularies(), ["carriers".to_string()]);
}

#[test]
fn a_wrong_batch_is_an_error() {
    let expression = compile("x + 1");
    let strings = Value::to_array([&Value::String("a".into())], &Type::String);
    assert!(matches!(expression.evaluate(&[], 1), Err(EvaluateError::ColumnCount { expected: 1, found: 0 })));
    assert!(matches!(expression.evaluate(&[strings], 1), Err(EvaluateError::Columns(_))));
}

#[test]
fn size_and_depth_have_limits() {
    let compile = |text: String| Expression::compile(&text, &environment(), None).map(|_| ()).map_err(|e| e.kind);
    assert_eq!(compile(vec!["x"; 30_000].join("+")), Err(ErrorKind::Limit));
    assert_eq!(compile(vec!["x"; 40_000].join("+")), Err(ErrorKind::Limit));
    assert_eq!(compile(vec!["x"; 190].join("+")), Ok(()));
    assert_eq!(compile(vec!["b"; 3_000].join(" OR ")), Ok(()));
    assert_eq!(compile("(".repeat(3_000) + "x" + &")".repeat(3_000)), Err(ErrorKind::Limit));
    assert_eq!(compile("-".repeat(3_000) + "x"), Err(ErrorKind::Syntax)); // a comment
    // The parser notices prefix operators itself, and gives up with an error of syntax.
    assert_eq!(compile("NOT ".repeat(3_000) + "b"), Err(ErrorKind::Syntax));
    let expression = Expression::compile(&vec!["x"; 190].join("+"), &environment(), None).unwrap();
    assert_eq!(shown(&evaluate_row(&expression)), "475.0");
    let expression = Expression::compile(&vec!["NOT b"; 3_000].join(" OR "), &environment(), None).unwrap();
    assert_eq!(shown(&evaluate_row(&expression)), "false");
}

/// Values at the edges of a type, and some inside.
fn edge(value_type: &Type, random: &mut SmallRng) -> Value {
    if random.random_ratio(1, 7) {
        return Value::Null;
    }
    fn pick<T: Clone>(random: &mut SmallRng, from: &[T]) -> T {
        from[random.random_range(0..from.len())].clone()
    }
    let real = |random: &mut SmallRng| {
        let edges = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.5,
            2.5,
            f64::NAN,
            -f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            f64::MAX,
            f64::MIN_POSITIVE,
            1e-310,
            9.3e18,
            -9.3e18,
            1e300,
        ];
        if random.random_bool(0.6) { pick(random, &edges) } else { random.random_range(-1e6..1e6) }
    };
    match value_type {
        Type::Bool => Value::Bool(random.random()),
        Type::Int32 => Value::Int32(if random.random_bool(0.6) {
            pick(random, &[0, 1, -1, 2, 7, i32::MAX, i32::MIN])
        } else {
            random.random()
        }),
        Type::Int64 => Value::Int64(if random.random_bool(0.6) {
            pick(random, &[0, 1, -1, 2, 3, 7, 64, i64::MAX, i64::MIN, i64::MIN + 1, 65_536, 65_537, 1 << 53])
        } else {
            random.random()
        }),
        Type::Float32 => Value::Float32(real(random) as f32),
        Type::Float64 => Value::Float64(real(random)),
        Type::String => Value::String(
            pick(
                random,
                &[
                    "",
                    " ",
                    "a",
                    "UA",
                    "AA",
                    "12",
                    "-7.5",
                    "1e400",
                    "nan",
                    "-inf",
                    "true",
                    "2013-07-01",
                    "2013-07-01T00:00:00Z",
                    "+262142-12-31T23:59:59Z",
                    "Grüße",
                    "a,b,,c",
                    "%_\\",
                    "\\",
                    "a\nb",
                    "\u{0}",
                    "America/New_York",
                    "İ",
                ],
            )
            .into(),
        ),
        Type::Binary => Value::Binary(pick(random, &[&b""[..], b"\x00", b"\xff\xfe", b"abc"]).into()),
        Type::Timestamp => Value::Timestamp(if random.random_bool(0.5) {
            pick(
                random,
                &[
                    0,
                    -1,
                    1,
                    i64::MAX,
                    i64::MIN,
                    8_210_266_876_799_999_999,
                    8_210_266_876_800_000_000,
                    -8_334_601_228_800_000_000,
                    1_372_656_615_250_000,
                ],
            )
        } else {
            random.random_range(-4_000_000_000_000_000..4_000_000_000_000_000)
        }),
        Type::Date => Value::Date(if random.random_bool(0.5) {
            pick(random, &[0, -1, i32::MAX, i32::MIN, 15_887])
        } else {
            random.random_range(-100_000..100_000)
        }),
        Type::Decimal { precision, .. } => {
            let most = 10i128.pow(u32::from(*precision)) - 1;
            Value::Decimal(if random.random_bool(0.5) {
                pick(random, &[0, 1, -1, 100, most, -most])
            } else {
                random.random_range(-most..=most)
            })
        }
        Type::List(item) => Value::List((0..random.random_range(0..4)).map(|_| edge(item, random)).collect()),
        Type::Map(item) => {
            let keys = ["", "a", "b"];
            Value::Map(
                keys[..random.random_range(0..=3)].iter().map(|key| ((*key).into(), edge(item, random))).collect(),
            )
        }
        Type::Struct(fields) => Value::Struct(fields.iter().map(|(_, field)| edge(field, random)).collect()),
        Type::Vector(n) => Value::Vector((0..*n).map(|_| real(random) as f32).collect()),
    }
}

/// Evaluates a batch whole, in two unequal parts, and row by row: the same bits each time, all of them canonical.
fn assert_rowwise(text: &str, expression: &Expression, rows: usize, random: &mut SmallRng) {
    let environment = environment();
    let columns: Vec<ArrayRef> = expression
        .columns()
        .iter()
        .map(|column| {
            let value_type = type_of(&environment, column);
            let values: Vec<Value> = (0..rows).map(|_| edge(&value_type, random)).collect();
            Value::to_array(&values, &value_type)
        })
        .collect();
    let evaluate = |start: usize, length: usize| {
        let part: Vec<ArrayRef> = columns.iter().map(|column| column.slice(start, length)).collect();
        let array = expression.evaluate(&part, length).unwrap_or_else(|e| panic!("{text}: {e:?}"));
        assert_eq!(array.len(), length, "{text}");
        assert_eq!(*array.data_type(), expression.value_type().arrow(), "{text}");
        let canonical = call::canonical(array.clone());
        assert!(Arc::ptr_eq(&canonical, &array) || canonical.to_data() == array.to_data(), "{text}: not canonical");
        (0..length).map(|i| Value::from_array(&array, i, expression.value_type())).collect::<Vec<_>>()
    };
    let whole = evaluate(0, rows);
    let cut = rows / 3;
    let parts = [evaluate(0, cut), evaluate(cut, rows - cut)].concat();
    assert_eq!(whole, parts, "{text} in parts");
    let single: Vec<Value> = (0..rows).flat_map(|i| evaluate(i, 1)).collect();
    assert_eq!(whole, single, "{text} row by row");
    assert!(evaluate(0, 0).is_empty());
}

#[test]
fn a_batch_agrees_with_its_rows() {
    let corpus = [
        "i / n",
        "i % n",
        "j / k",
        "i * n + j",
        "-i",
        "-x",
        "x / y",
        "x % y",
        "x * 0.0",
        "f / CAST(x AS float32)",
        "dec / big",
        "dec * big",
        "big + big",
        "dec % CAST(i AS decimal(10,0))",
        "abs(i)",
        "x > y",
        "x = y",
        "x < -0.0",
        "greatest(x, y, f)",
        "least(x, y, i)",
        "coalesce(n, i, j)",
        "nullif(x, y)",
        "CASE WHEN i > 0 THEN 10 / i ELSE n END",
        "CASE WHEN x > y THEN x ELSE y END",
        "CASE i WHEN 0 THEN 'zero' WHEN 1 THEN 'one' ELSE s END",
        "CASE WHEN b THEN CAST(s AS int64) WHEN i = 0 THEN 1 / i ELSE i / n END",
        "b AND i / n > 0",
        "b OR CAST(s AS float64) > 1",
        "i <> 0 AND 100 / i > 1",
        "x IN (0.0, 1.0, 0.0 / 0.0)",
        "i IN (1, 2, n)",
        "s IN ('a', 'UA', '')",
        "s NOT IN ('a', NULL)",
        "s LIKE t",
        "s LIKE '%a%'",
        "s NOT ILIKE t",
        "s LIKE '\\'",
        "x BETWEEN y AND f",
        "x IS DISTINCT FROM y",
        "n IS NULL OR x IS NOT NULL",
        "CAST(s AS float64)",
        "CAST(s AS timestamp)",
        "CAST(s AS bool)",
        "CAST(x AS int64)",
        "CAST(x AS decimal(20,4))",
        "CAST(s AS decimal(10,3))",
        "CAST(ts AS string)",
        "CAST(big AS float32)",
        "sin(x)",
        "power(x, y)",
        "exp(x)",
        "ln(x)",
        "log(x, y)",
        "atan2(x, y)",
        "sqrt(x)",
        "round(x, 2)",
        "round(x, i)",
        "cosine(v, w)",
        "dot(v, w)",
        "norm(v)",
        "v[i]",
        "l[i]",
        "m[t]",
        "st.q",
        "bucketize(x, [0, 1, 2])",
        "vocab(t, 'carriers')",
        "hash_bucket(s, 16)",
        "hash_bucket(x, 16)",
        "hash_bucket(l, 7)",
        "local(ts, 'America/New_York')",
        "local(ts, s)",
        "date_part('hour', ts)",
        "date_trunc('month', ts)",
        "date_trunc('week', ts)",
        "ts + INTERVAL '1 month 3 days 2 hours'",
        "ts - INTERVAL '100000 months'",
        "d + i",
        "d + INTERVAL '1 day'",
        "date_part('epoch', until - ts)",
        "until - ts > INTERVAL '1 hour'",
        "age(weather)",
        "event_time(weather) < at()",
        "substr(s, i, n)",
        "lpad(s, i, t)",
        "replace(s, t, s)",
        "split_part(s, t, i)",
        "left(s, i) || right(t, n)",
        "concat(s, t)",
        "upper(s)",
        "strpos(s, t)",
        "trim(s, t)",
        "pi() * x",
        "1 / 0",
        "x",
        "l",
        "m",
        "st",
        "v",
        "bin",
    ];
    let mut random = SmallRng::seed_from_u64(7);
    for text in corpus {
        let expression = compile(text);
        for _ in 0..8 {
            assert_rowwise(text, &expression, 60, &mut random);
        }
    }
}

/// Every function and operator over every combination of column types: what compiles must evaluate, on any values.
#[test]
fn nothing_that_compiles_fails() {
    const SOME: [&str; 5] = ["j", "i", "s", "x", "NULL"];
    let names = [
        "b",
        "j",
        "i",
        "f",
        "x",
        "s",
        "bin",
        "ts",
        "d",
        "dec",
        "big",
        "v",
        "l",
        "m",
        "st",
        "NULL",
        "local(ts, 'Asia/Kathmandu')",
        "(until - ts)",
        "INTERVAL '1 month 2 days'",
    ];
    let mut texts: Vec<String> = Vec::new();
    for (name, least, most) in function::names() {
        let most = most.min(3);
        for count in least..=most {
            match count {
                0 => texts.push(format!("{name}()")),
                1 => texts.extend(names.iter().map(|a| format!("{name}({a})"))),
                2 => texts.extend(names.iter().flat_map(|a| names.iter().map(move |b| format!("{name}({a}, {b})")))),
                _ => texts.extend(names.iter().flat_map(|a| {
                    SOME.iter().flat_map(move |b| SOME.iter().map(move |c| format!("{name}({a}, {b}, {c})")))
                })),
            }
        }
    }
    for operator in ["+", "-", "*", "/", "%", "||", "=", "<>", "<", ">=", "AND", "OR", "LIKE", "IS DISTINCT FROM"] {
        texts.extend(names.iter().flat_map(|a| names.iter().map(move |b| format!("{a} {operator} {b}"))));
    }
    for value_type in [
        "bool",
        "int32",
        "int64",
        "float32",
        "float64",
        "string",
        "binary",
        "timestamp",
        "date",
        "decimal(5,2)",
        "decimal(38,30)",
    ] {
        texts.extend(names.iter().map(|a| format!("CAST({a} AS {value_type})")));
    }
    for field in time::FIELDS {
        texts.extend(names.iter().map(|a| format!("date_part('{field}', {a})")));
    }
    for unit in time::UNITS {
        texts.extend(names.iter().map(|a| format!("date_trunc('{unit}', {a})")));
    }
    for form in [
        "{} IN ({}, NULL)",
        "CASE WHEN b THEN {} ELSE {} END",
        "{}[i]",
        "{}[s]",
        "-{}",
        "NOT {}",
        "{} IS TRUE",
        "{} BETWEEN {} AND {}",
        "hash_bucket({}, 5)",
        "local({}, s)",
        "bucketize({}, [0, 1])",
    ] {
        texts.extend(names.iter().map(|a| form.replace("{}", a)));
    }
    let environment = environment();
    let mut random = SmallRng::seed_from_u64(11);
    let mut compiled = 0;
    for text in &texts {
        match Expression::compile(text, &environment, None) {
            Ok(expression) => {
                compiled += 1;
                assert_rowwise(text, &expression, 24, &mut random);
            }
            Err(error) => {
                assert!(!error.message.is_empty() && !error.message.contains('\n'), "{text}: {error:?}");
                if let Some((start, end)) = error.offset {
                    assert!(text.get(start..end).is_some(), "{text}: {error:?}");
                }
            }
        }
    }
    assert!(compiled > 900, "{compiled} of {} compile", texts.len());
}

proptest::proptest! {
    /// Any text is answered, with an expression or with an error that points into it.
    #[test]
    fn any_text_is_answered(words in proptest::collection::vec(proptest::sample::select(vec![
        "x", "i", "s", "ts", "(", ")", "[", "]", ",", "+", "-", "*", "/", "=", "<", "AND", "OR", "NOT", "NULL", "CASE", "WHEN", "THEN", "ELSE", "END", "IN", "BETWEEN", "IS",
        "LIKE", "1", "2.5", "'a'", "'", "\"", "CAST", "AS", "int64", "power", "vocab", "local", "age", "weather", ".", "temp", "INTERVAL", "'1 day'", "EXTRACT", "HOUR", "FROM",
        "SELECT", "::", "||", "ü", "\n", "--", "/*", "$1", "?", "{", "}", ";", "->", "OVER", "at", "DATE", "ARRAY", "MAP", "STRUCT", "EXISTS", "ANY", "TRIM", "POSITION",
    ]), 0..14)) {
        let text = words.join(" ");
        if let Err(error) = Expression::compile(&text, &environment(), None)
            && let Some((start, end)) = error.offset
        {
            proptest::prop_assert!(text.get(start..end).is_some(), "{text}: {error:?}");
        }
    }
}

#[test]
fn names_without_a_schema_are_null_and_listed() {
    let declared = environment();
    let mut environment = declared.clone();
    environment.undeclared_is_null();
    #[track_caller]
    fn check(environment: &Environment, text: &str, undeclared: &[&str]) {
        let compiled = Expression::compile(text, environment, Some(&Type::Bool)).unwrap();
        let found: Vec<String> = compiled.undeclared().iter().map(ColumnRef::to_string).collect();
        assert_eq!(found, undeclared, "{text}");
    }
    check(&environment, "country = 'DE' AND account.age >= 18 AND country <> 'x'", &["country", "account.age"]);
    check(&environment, "s = nowhere", &["nowhere"]);
    check(&environment, "upper(country) IN ('DE', 'AT') OR substr(s, k) = plan", &["country", "plan"]);
    check(&environment, "hash_bucket(unit, 10) < 3 AND weather.temp > 1", &["unit"]);
    check(&environment, "s = 'a'", &[]);
    let error = |text: &str| Expression::compile(text, &environment, Some(&Type::Bool)).unwrap_err().kind;
    assert_eq!(error("a.b.c = 1"), ErrorKind::UnknownColumn);
    assert_eq!(error("weather.__event_time > ts"), ErrorKind::UnknownColumn);
    assert_eq!(error("nothing(country)"), ErrorKind::UnknownFunction);
    assert_eq!(error("country + 1"), ErrorKind::Type);
    // As before where names have to be declared.
    assert!(Expression::compile("country = 'DE'", &declared, None).is_err());
}
