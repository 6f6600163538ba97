use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

fn aggregate(function: Function, input: Type) -> Aggregate {
    Aggregate::new(function, Some(input)).unwrap()
}

fn state_of(aggregate: &Aggregate, values: &[Value]) -> State {
    let mut state = aggregate.zero();
    values.iter().for_each(|value| aggregate.push(&mut state, value, &Times::NONE));
    state
}

/// A value as it is pushed.
type Event = (Value, Times);

fn state_of_events(aggregate: &Aggregate, events: &[Event]) -> State {
    let mut state = aggregate.zero();
    events.iter().for_each(|(value, times)| aggregate.push(&mut state, value, times));
    state
}

fn merged(aggregate: &Aggregate, a: &State, b: &State) -> State {
    let mut state = a.clone();
    aggregate.merge(&mut state, b);
    state
}

fn encoded(aggregate: &Aggregate, state: &State) -> Vec<u8> {
    let mut bytes = Vec::new();
    aggregate.encode(state, &mut bytes);
    bytes
}

/// A value with all its bits: `Value`'s own equality overlooks the sign of zero.
fn bits(value: &Value) -> String {
    match value {
        Value::Float32(x) => format!("float32 {:x}", x.to_bits()),
        Value::Float64(x) => format!("float64 {:x}", x.to_bits()),
        Value::List(items) => format!("{:?}", items.iter().map(bits).collect::<Vec<_>>()),
        Value::Map(pairs) => format!("{:?}", pairs.iter().map(|(key, item)| (key, bits(item))).collect::<Vec<_>>()),
        other => format!("{other:?}"),
    }
}

#[track_caller]
fn assert_same(aggregate: &Aggregate, a: &State, b: &State) {
    assert_eq!(a, b);
    assert_eq!(encoded(aggregate, a), encoded(aggregate, b));
    assert_eq!(bits(&aggregate.finish(a)), bits(&aggregate.finish(b)));
}

#[track_caller]
fn check(function: Function, input: Option<Type>, values: &[Value], expected: Value) {
    let aggregate = Aggregate::new(function, input).unwrap();
    let state = state_of(&aggregate, values);
    assert_eq!(bits(&aggregate.finish(&state)), bits(&expected));
    assert_eq!(aggregate.is_empty(&state), values.iter().all(Value::is_null));
}

#[test]
fn nothing_is_null_but_a_count_of_nothing_is_zero() {
    for values in [[].as_slice(), &[Value::Null, Value::Null]] {
        check(Function::Count, None, values, Value::Int64(0));
        check(Function::Count, Some(Type::List(Box::new(Type::Int64))), values, Value::Int64(0));
        for input in [Type::Int32, Type::Int64, Type::Float32, Type::Float64, Type::Decimal { precision: 9, scale: 2 }]
        {
            for function in [Function::Sum, Function::Mean, Function::Min, Function::Max] {
                check(function, Some(input.clone()), values, Value::Null);
            }
        }
    }
}

#[test]
fn nulls_are_skipped_and_a_sum_of_zeros_is_not_nothing() {
    check(Function::Count, None, &[Value::Bool(true), Value::Null, Value::Bool(true)], Value::Int64(2));
    check(Function::Mean, Some(Type::Int64), &[Value::Int64(1), Value::Null, Value::Int64(2)], Value::Float64(1.5));
    check(Function::Sum, Some(Type::Float64), &[Value::Float64(-0.0), Value::Null], Value::Float64(0.0));
    check(Function::Sum, Some(Type::Int32), &[Value::Int32(i32::MAX), Value::Int32(1)], Value::Int64(1 << 31));
    check(Function::Min, Some(Type::Int32), &[Value::Null, Value::Int32(4)], Value::Int32(4));
}

#[test]
fn outputs_have_the_type_that_is_declared() {
    let decimal = Type::Decimal { precision: 9, scale: 2 };
    for (function, input, output) in [
        (Function::Count, Type::String, Type::Int64),
        (Function::Sum, Type::Int32, Type::Int64),
        (Function::Sum, Type::Float32, Type::Float64),
        (Function::Sum, decimal.clone(), Type::Decimal { precision: 38, scale: 2 }),
        (Function::Mean, decimal.clone(), Type::Float64),
        (Function::Mean, Type::Int32, Type::Float64),
        (Function::Max, decimal.clone(), decimal.clone()),
        (Function::Min, Type::String, Type::String),
        (Function::Max, Type::Float32, Type::Float32),
    ] {
        let aggregate = aggregate(function, input.clone());
        assert_eq!(aggregate.output(), output, "{}({input})", aggregate.function());
        let value = match input {
            Type::String => Value::String("a".into()),
            Type::Int32 => Value::Int32(5),
            Type::Float32 => Value::Float32(5.0),
            _ => Value::Decimal(5),
        };
        let answer = aggregate.finish(&state_of(&aggregate, &[value]));
        assert_eq!(Value::from_array(&Value::to_array([&answer], &output), 0, &output), answer);
    }
    assert_eq!(Aggregate::new(Function::Count, None).unwrap().output(), Type::Int64);
}

#[track_caller]
fn check_refused(function: Function, input: Option<Type>, expected: &str) {
    assert_eq!(Aggregate::new(function, input).unwrap_err().to_string(), expected);
}

#[test]
fn inputs_that_do_not_fit_are_refused_with_advice() {
    check_refused(
        Function::Sum,
        None,
        "`sum` needs an input: say what to aggregate with `of` (only `count` works without)",
    );
    check_refused(
        Function::Mean,
        Some(Type::Bool),
        "`mean` takes a number (int32, int64, float32, float64, decimal), not bool; use CASE WHEN x THEN 1 ELSE 0 END",
    );
    check_refused(
        Function::Sum,
        Some(Type::String),
        "`sum` takes a number (int32, int64, float32, float64, decimal), not string; \
         if the text is a number, use CAST(x AS DOUBLE)",
    );
    check_refused(
        Function::Sum,
        Some(Type::Timestamp),
        "`sum` takes a number (int32, int64, float32, float64, decimal), not timestamp",
    );
    check_refused(
        Function::Max,
        Some(Type::Vector(3)),
        "`max` takes a value with an order (a number, string, binary, timestamp, date, bool), not vector(3)",
    );
}

#[track_caller]
fn check_name(name: &str, expected: &str) {
    assert_eq!(Function::parse(name).unwrap_err().to_string(), expected);
}

#[test]
fn names_are_parsed_or_answered() {
    let arguments = Arguments {
        q: Quantile::new(0.5),
        clamp: Clamp::new(0.0, 1.0),
        n: Some(1),
        k: Some(1),
        buckets: Buckets::edges(Type::Int64, vec![0.0]).ok(),
    };
    for name in FUNCTION_NAMES {
        let function = Function::new(name, arguments.clone()).unwrap();
        assert_eq!(function.name(), name);
        assert_eq!(function.to_string(), name);
    }
    check_name("avg", "`avg` is not an aggregate function; did you mean `mean`?");
    check_name("nunique", "`nunique` is not an aggregate function; did you mean `distinct_count`?");
    check_name("Sum", "`Sum` is not an aggregate function; did you mean `sum`?");
    check_name("cuont", "`cuont` is not an aggregate function; did you mean `count`?");
    let available = FUNCTION_NAMES.join(", ");
    check_name("wibble", &format!("`wibble` is not an aggregate function; available: {available}"));
    check_name("x", &format!("`x` is not an aggregate function; available: {available}"));
    check_name("last_n", "`last_n` needs `n`");
    check_name("top_k", "`top_k` needs `k`");
    check_name("percentile", "`percentile` needs `q`");
    check_name("histogram", "`histogram` needs either `edges` or `values`");
    let too_many = Function::new("top_k", Arguments { k: Some(1_001), ..Arguments::default() });
    assert_eq!(too_many.unwrap_err().to_string(), "`top_k` keeps from 1 to 1000 values, not 1001");
}

fn text(text: &str) -> Value {
    Value::String(text.into())
}

fn floats(values: &[f64]) -> Vec<Value> {
    values.iter().map(|x| Value::Float64(*x)).collect()
}

fn integers(values: &[i64]) -> Vec<Value> {
    values.iter().map(|x| Value::Int64(*x)).collect()
}

fn percentile(q: f64, low: f64, high: f64) -> Function {
    Function::Percentile { q: Quantile::new(q).unwrap(), clamp: Clamp::new(low, high).unwrap() }
}

fn at(event_time: i64, created_time: Option<i64>, sequence: u64) -> Times {
    let position = crate::time::Position { time: event_time, sequence };
    Times { event_time, created_time, known_time: event_time, position }
}

#[test]
fn first_and_last_go_by_time_then_created_time_then_sequence_then_value() {
    #[track_caller]
    fn check(events: &[(i64, Times)], first: i64, last: i64) {
        for (function, expected) in [(Function::First, first), (Function::Last, last)] {
            let aggregate = aggregate(function, Type::Int64);
            let mut events: Vec<Event> = events.iter().map(|(x, times)| (Value::Int64(*x), *times)).collect();
            for _ in 0..2 {
                events.reverse();
                let state = state_of_events(&aggregate, &events);
                assert_eq!(aggregate.finish(&state), Value::Int64(expected), "{}", aggregate.function());
            }
        }
    }
    check(&[(3, at(1, None, 0)), (1, at(2, None, 0)), (2, at(3, None, 0))], 3, 2);
    check(&[(3, at(5, Some(9), 0)), (1, at(5, None, 8)), (2, at(5, Some(7), 9))], 1, 3);
    check(&[(3, at(5, Some(9), 4)), (1, at(5, Some(9), 6))], 3, 1);
    check(&[(3, at(5, None, 0)), (1, at(5, None, 0))], 1, 3);
}

#[test]
fn the_last_values_come_newest_first_and_the_largest_largest_first() {
    let last = aggregate(Function::LastN { n: 3 }, Type::String);
    let events: Vec<Event> =
        ["d", "a", "c", "b", "b"].iter().zip([4, 1, 3, 2, 2]).map(|(x, time)| (text(x), at(time, None, 0))).collect();
    let state = state_of_events(&last, &events);
    assert_eq!(last.finish(&state), Value::List(vec![text("d"), text("c"), text("b")]));
    assert_eq!(last.output(), Type::List(Box::new(Type::String)));
    let short = state_of_events(&last, &events[..1]);
    assert_eq!(last.finish(&short), Value::List(vec![text("d")]), "as many as there are");
    // A null is no value, and NaN is the greatest.
    let inputs = [floats(&[1.0, f64::NAN, -0.0, 3.0, 3.0]), vec![Value::Null]].concat();
    let largest = Value::List(floats(&[f64::NAN, 3.0, 3.0, 1.0]));
    check(Function::TopK { k: 4 }, Some(Type::Float64), &inputs, largest);
}

#[test]
fn variances_are_of_samples() {
    let spread = |function: &Function, values: &[Value], expected| {
        check(function.clone(), Some(Type::Int64), values, expected);
    };
    spread(&Function::Variance, &integers(&[2, 4, 4, 4, 5, 5, 7, 9]), Value::Float64(32.0 / 7.0));
    spread(&Function::Stddev, &integers(&[1, 3]), Value::Float64(2.0_f64.sqrt()));
    spread(&Function::Variance, &integers(&[7, 7, 7]), Value::Float64(0.0));
    spread(&Function::Stddev, &integers(&[7]), Value::Null);
    spread(&Function::Variance, &[], Value::Null);
    // (2^64 - 1)^2 / 2
    spread(&Function::Variance, &integers(&[i64::MIN, i64::MAX]), Value::Float64(2.0_f64.powi(127)));
    spread(&Function::Stddev, &integers(&[i64::MIN, i64::MAX]), Value::Float64(2.0_f64.sqrt() * 2.0_f64.powi(63)));

    let float = |function: Function, values: &[f64], expected| {
        check(function, Some(Type::Float64), &floats(values), Value::Float64(expected));
    };
    float(Function::Variance, &[1e16, 1e16 + 2.0], 2.0);
    float(Function::Variance, &[1.0, f64::NAN], f64::NAN);
    float(Function::Stddev, &[1.0, f64::INFINITY], canonical_f64(f64::NAN));
    float(Function::Stddev, &[f64::INFINITY, f64::INFINITY], canonical_f64(f64::NAN));
    float(Function::Variance, &[-0.0, 0.0], 0.0);
    // The squares are beyond what floats hold, above and below; the deviation is not.
    float(Function::Variance, &[f64::MAX, 0.0], f64::INFINITY);
    float(Function::Stddev, &[f64::MAX, 0.0], 2.0_f64.sqrt().next_down() * 2.0_f64.powi(1023));
    float(Function::Variance, &[5e-324, 0.0], 0.0);
    float(Function::Stddev, &[5e-324, 0.0], 5e-324);

    let decimal = Type::Decimal { precision: 38, scale: 2 };
    let largest = 10_i128.pow(38) - 1;
    let cents = |values: &[i128]| values.iter().map(|x| Value::Decimal(*x)).collect::<Vec<_>>();
    check(Function::Variance, Some(decimal.clone()), &cents(&[110, 120, 130]), Value::Float64(0.01));
    check(Function::Variance, Some(decimal), &cents(&[largest, -largest]), Value::Float64(2e72));
}

#[test]
fn percentiles_take_the_rank_above() {
    let hundred: Vec<Value> = (1..=100).map(|x| Value::Float64(f64::from(x))).collect();
    for (q, expected) in [(0.5, 50.0), (0.9, 90.0), (0.55, 55.0), (0.555, 56.0), (0.999, 100.0), (0.001, 1.0)] {
        let aggregate = aggregate(percentile(q, 0.0, 1000.0), Type::Float64);
        let Value::Float64(x) = aggregate.finish(&state_of(&aggregate, &hundred)) else { panic!("a float") };
        assert!((x / expected - 1.0_f64).abs() <= 0.01 + 1e-12, "{q}: {x} is not near {expected}");
    }
    let median = |values: &[f64], expected| {
        check(percentile(0.5, -10.0, 10.0), Some(Type::Float64), &floats(values), Value::Float64(expected));
    };
    median(&[0.0], 0.0);
    median(&[-1e-300], 0.0);
    median(&[1e9, f64::INFINITY, -3.0], 10.0);
    median(&[f64::NEG_INFINITY, -1e9, 0.0], -10.0);
    median(&[f64::NAN, f64::NAN, 1.0], f64::NAN);
    median(&[f64::NAN, 0.0, -0.0], 0.0);
    check(percentile(0.5, 0.0, 1.0), Some(Type::Int32), &[], Value::Null);
    assert_eq!(Quantile::new(0.123_456_789_1), None, "more digits than a rank needs");
    assert!(Quantile::new(0.0).is_none() && Quantile::new(1.0).is_none() && Quantile::new(f64::NAN).is_none());
    assert!(Clamp::new(1.0, 1.0).is_none() && Clamp::new(0.0, 1e19).is_none() && Clamp::new(f64::NAN, 1.0).is_none());
}

#[test]
fn histograms_count_what_lies_between_edges_or_is_named() {
    let edges = |input| Function::Histogram(Buckets::edges(input, vec![0.0, 10.0]).unwrap());
    let values = floats(&[-0.0, 10.0, 9.99, -1.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN]);
    // Below 0, from 0 to 10, from 10, OTHER.
    check(edges(Type::Float64), Some(Type::Float64), &values, Value::List(integers(&[2, 2, 2, 1])));
    let decimal = Type::Decimal { precision: 9, scale: 1 };
    let tenths = [Value::Decimal(99), Value::Decimal(100), Value::Null];
    check(edges(decimal.clone()), Some(decimal), &tenths, Value::List(integers(&[0, 1, 1, 0])));
    let names = Function::Histogram(Buckets::values(Type::String, vec![text("b"), text("a")]).unwrap());
    let letters = [text("a"), text("b"), text("z"), text("a"), Value::Null];
    check(names.clone(), Some(Type::String), &letters, Value::List(integers(&[1, 2, 1])));
    check(names, Some(Type::String), &[Value::Null], Value::Null);
}

#[test]
fn parts_are_apart_by_bucket() {
    let buckets = || Buckets::values(Type::String, vec![text("b"), text("a")]).unwrap();
    let part = |bucket: i32, x: Value| Value::Struct(vec![Value::Int32(bucket), x]);
    let map = |pairs: &[(&str, Value)]| Value::Map(pairs.iter().map(|(key, x)| ((*key).into(), x.clone())).collect());
    let sum = aggregate(Function::Sum, Type::Int64).by(buckets()).unwrap();
    assert_eq!(sum.output(), Type::Map(Box::new(Type::Int64)));
    let values = [part(1, Value::Int64(1)), part(2, Value::Int64(5)), part(1, Value::Int64(2)), part(0, Value::Null)];
    let sums = map(&[("OTHER", Value::Int64(5)), ("a", Value::Int64(3)), ("b", Value::Null)]);
    assert_eq!(sum.finish(&state_of(&sum, &values)), sums);
    assert_eq!(sum.finish(&sum.zero()), Value::Null);
    let count = Aggregate::new(Function::Count, None).unwrap().by(buckets()).unwrap();
    let counts = |other: i64| map(&[("OTHER", Value::Int64(other)), ("a", Value::Int64(0)), ("b", Value::Int64(0))]);
    assert_eq!(count.finish(&count.zero()), counts(0), "a count of nothing is 0, part by part");
    // What a damaged store may hold is somewhere.
    let state = state_of(&count, &[part(-1, Value::Bool(true)), part(9, Value::Bool(true))]);
    assert_eq!(count.finish(&state), counts(2));
    assert_eq!(count.by(buckets()).unwrap_err(), AggregateError::SplitTwice);

    let labels = |buckets: Buckets| buckets.labels().join(" ");
    assert_eq!(labels(Buckets::edges(Type::Int32, vec![-1.0, 0.5, 15.0]).unwrap()), "<-1 -1..0.5 0.5..15 >=15 OTHER");
    assert_eq!(labels(Buckets::values(Type::Bool, vec![Value::Bool(true)]).unwrap()), "true OTHER");
}

#[test]
fn buckets_that_cannot_be_are_refused() {
    #[track_caller]
    fn check(buckets: Result<Buckets, BucketsError>, expected: &str) {
        assert_eq!(buckets.unwrap_err().to_string(), expected);
    }
    check(Buckets::edges(Type::Int64, vec![]), "there are no buckets");
    check(Buckets::edges(Type::Int64, vec![1.0, 1.0]), "`edges` must ascend");
    check(Buckets::edges(Type::Int64, vec![f64::NAN]), "`edges` must ascend");
    check(
        Buckets::edges(Type::String, vec![1.0]),
        "`edges` divide numbers, not string; name single ones with `values`",
    );
    let float = "`values` are strings, integers or bools, not float64; divide them with `edges`";
    check(Buckets::values(Type::Float64, vec![Value::Float64(1.0)]), float);
    check(Buckets::values(Type::Date, vec![]), "`values` are strings, integers or bools, not date");
    check(Buckets::values(Type::Int64, integers(&[1, 2, 1])), "the value `1` is there twice");
    check(Buckets::values(Type::Int64, vec![Value::Null]), "null is no value: it belongs to OTHER");
    let other = "the value `OTHER` is the name of what is in no other bucket";
    check(Buckets::values(Type::String, vec![text("OTHER")]), other);
    let many = "there are 1001 buckets, and 1000 is the most";
    check(Buckets::values(Type::Int64, integers(&(0..1_001).collect::<Vec<_>>())), many);
}

/// Stored tiles hold these bytes.
#[test]
fn encodings_are_fixed() {
    #[track_caller]
    fn check(function: Function, values: &[Value], expected: &[u8]) {
        let input = if matches!(values[0], Value::String(_)) { Type::String } else { Type::Int64 };
        let aggregate = aggregate(function, input);
        let mut state = aggregate.zero();
        values.iter().for_each(|value| aggregate.push(&mut state, value, &at(1, Some(2), 3)));
        assert_eq!(encoded(&aggregate, &state), expected, "{}", aggregate.function());
    }
    let two = integers(&[1, 3]);
    check(Function::Variance, &two, &[4, 1, 4, 2, 0, 10]);
    check(Function::Stddev, &two, &[4, 1, 4, 2, 0, 10]);
    let stamped = [&[1, 0x80, 0, 0, 0, 0, 0, 0, 1, 1, 0x80, 0, 0, 0, 0, 0, 0, 2, 3][..], b"b\0\0"].concat();
    check(Function::Last, &[text("b"), text("a")], &stamped);
    check(Function::TopK { k: 2 }, &[text("b"), text("a"), text("c")], b"\x02c\0\0b\0\0");
    check(percentile(0.5, -1e3, 1e3), &integers(&[-1, 1, 1, 0]), &[3, 0x99, 0x10, 2, 0x8c, 8, 2, 0x8c, 8, 4]);
    check(Function::Histogram(Buckets::edges(Type::Int64, vec![2.0]).unwrap()), &two, &[2, 0, 2, 0, 2]);
    check(Function::DistinctCount, &[text("a"), text("a")], &[1, 83, 159, 250, 72, 146]);
}

#[test]
fn states_stay_small() {
    assert!(size_of::<State>() <= 48, "windows hold one state per slot; this one has {} bytes", size_of::<State>());
}

// The laws.

/// Every kind of state there is, with inputs that try it.
fn cases() -> impl Strategy<Value = (Aggregate, Vec<Event>)> {
    let float = prop_oneof![
        4 => any::<u64>().prop_map(f64::from_bits),
        4 => (-10_000..10_000_i32).prop_map(|x| f64::from(x) / 100.0),
        1 => prop::sample::select(vec![
            f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 0.0, 1e308, -1e308, 1e-308, 5e-324, -5e-324,
            f64::MAX, f64::MIN_POSITIVE,
        ]),
    ];
    let finite = (-10_000..10_000_i32).prop_map(|x| Value::Float64(f64::from(x) / 7.0));
    let float32 = prop_oneof![any::<u32>().prop_map(f32::from_bits), (-9..9_i8).prop_map(f32::from)];
    let integer = prop_oneof![any::<i64>(), -9..9_i64];
    let decimal = prop_oneof![-10_i128.pow(38) + 1..10_i128.pow(38), -999..999_i128];
    let inputs = prop_oneof![
        3 => (Just(Type::Float64), column(float.prop_map(Value::Float64))),
        1 => (Just(Type::Float64), column(finite)),
        1 => (Just(Type::Float32), column(float32.prop_map(Value::Float32))),
        1 => (Just(Type::Int64), column(integer.prop_map(Value::Int64))),
        1 => (Just(Type::Int32), column(any::<i32>().prop_map(Value::Int32))),
        1 => (Just(Type::Decimal { precision: 38, scale: 3 }), column(decimal.prop_map(Value::Decimal))),
    ];
    let numbers = (prop::sample::select(FUNCTION_NAMES.to_vec()), inputs);
    let of_texts = vec!["count", "min", "max", "first", "last", "last_n", "distinct_count", "top_k", "histogram"];
    let texts = (
        prop::sample::select(of_texts),
        (Just(Type::String), column("[a-c\0]{0,3}".prop_map(|text| Value::String(text.into())))),
    );
    let is_split = prop::sample::select(vec![false, false, true]);
    (prop_oneof![6 => numbers, 1 => texts], is_split).prop_map(|((name, (input, events)), is_split)| {
        let buckets = match input {
            Type::String => Buckets::values(Type::String, vec![text("b"), text("ab"), text("")]),
            _ => Buckets::edges(input.clone(), EDGES.to_vec()),
        };
        let arguments = Arguments {
            q: Quantile::new(Q),
            clamp: Clamp::new(-CLAMP, CLAMP),
            n: Some(3),
            k: Some(4),
            buckets: buckets.ok(),
        };
        let aggregate = aggregate(Function::new(name, arguments).unwrap(), input);
        if !is_split {
            return (aggregate, events);
        }
        // The part is told from the times, so that it stays with its value.
        let split = |(value, times): Event| {
            let bucket = Value::Int32((times.event_time % PARTS) as i32);
            (if value.is_null() { value } else { Value::Struct(vec![bucket, value]) }, times)
        };
        let buckets = Buckets::values(Type::Int64, integers(&(1..PARTS).collect::<Vec<_>>())).unwrap();
        (aggregate.by(buckets).unwrap(), events.into_iter().map(split).collect())
    })
}

const EDGES: [f64; 3] = [-1.0, 0.0, 1e9];
const Q: f64 = 0.7;
const CLAMP: f64 = 1e12;
const PARTS: i64 = 3;

/// Values, and times that tie in every way.
fn column(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Vec<Event>> {
    let times = (0..5_i64, prop::option::of(0..2_i64), 0..3_u64)
        .prop_map(|(event_time, created_time, sequence)| at(event_time, created_time, sequence));
    prop::collection::vec((prop_oneof![1 => Just(Value::Null), 9 => value], times), 0..60)
}

/// An aggregate, and its events as they are, shuffled, and where to cut them.
fn shuffled_cases() -> impl Strategy<Value = (Aggregate, Vec<Event>, Vec<Event>, Vec<Index>)> {
    cases().prop_flat_map(|(aggregate, events)| {
        (
            Just(aggregate),
            Just(events.clone()),
            Just(events).prop_shuffle(),
            prop::collection::vec(any::<Index>(), 0..6),
        )
    })
}

/// The answer for values that are not null, by plain arithmetic on sorted ones; None where another test has the oracle.
fn oracle_of(aggregate: &Aggregate, events: &[Event]) -> Option<Value> {
    let mut sorted: Vec<Event> = events.to_vec();
    let key = |times: &Times| (times.event_time, times.created_time, times.position.sequence);
    sorted.sort_by(|(a, a_times), (b, b_times)| key(a_times).cmp(&key(b_times)).then_with(|| a.compare(b)));
    let mut values: Vec<Value> = events.iter().map(|(value, _)| canonical(value)).collect();
    values.sort_by(Value::compare);
    let some_or_null = |values: Vec<Value>| if values.is_empty() { Value::Null } else { Value::List(values) };
    let scale = if let Some(Type::Decimal { scale, .. }) = aggregate.input() { *scale } else { 0 };
    Some(match aggregate.function() {
        Function::Count => Value::Int64(values.len() as i64),
        Function::Min => {
            // NaN is the greatest, so it is the least only where there is nothing else.
            values.first().cloned().unwrap_or(Value::Null)
        }
        Function::Max => values.last().cloned().unwrap_or(Value::Null),
        Function::First => sorted.first().map_or(Value::Null, |(value, _)| canonical(value)),
        Function::Last => sorted.last().map_or(Value::Null, |(value, _)| canonical(value)),
        Function::LastN { n } => {
            some_or_null(sorted.iter().rev().take(*n as usize).map(|(value, _)| canonical(value)).collect())
        }
        Function::TopK { k } => some_or_null(values.iter().rev().take(*k as usize).cloned().collect()),
        Function::DistinctCount => {
            values.dedup();
            Value::Int64(values.len() as i64)
        }
        Function::Histogram(buckets) if !values.is_empty() => {
            let mut counts = vec![0; buckets.len()];
            for value in &values {
                let bucket = match value {
                    Value::String(text) => ["b", "ab", ""].iter().position(|known| **known == **text).unwrap_or(3),
                    value => {
                        let x = as_float(value, scale);
                        if x.is_nan() { 4 } else { EDGES.iter().filter(|edge| **edge <= x).count() }
                    }
                };
                counts[bucket] += 1;
            }
            Value::List(integers(&counts))
        }
        Function::Histogram(_) => Value::Null,
        _ => return None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn order_and_partitions_mean_nothing((aggregate, events, shuffled, cuts) in shuffled_cases()) {
        let whole = state_of_events(&aggregate, &events);
        assert_same(&aggregate, &state_of_events(&aggregate, &shuffled), &whole);

        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(events.len() + 1)).chain([0, events.len()]).collect();
        cuts.sort();
        let mut parts: Vec<State> =
            cuts.windows(2).map(|cut| state_of_events(&aggregate, &shuffled[cut[0]..cut[1]])).collect();
        // From the left, from the right, and as a tree through the encoding.
        let left = parts.iter().fold(aggregate.zero(), |state, part| merged(&aggregate, &state, part));
        assert_same(&aggregate, &left, &whole);
        let right = parts.iter().rev().fold(aggregate.zero(), |state, part| merged(&aggregate, part, &state));
        assert_same(&aggregate, &right, &whole);
        while parts.len() > 1 {
            parts = parts
                .chunks(2)
                .map(|pair| {
                    let state = pair.iter().skip(1).fold(pair[0].clone(), |state, part| merged(&aggregate, &state, part));
                    aggregate.decode(&mut encoded(&aggregate, &state).as_slice()).unwrap()
                })
                .collect();
        }
        assert_same(&aggregate, &parts[0], &whole);
    }

    #[test]
    fn merging_obeys_its_laws((aggregate, events, _, cuts) in shuffled_cases()) {
        let cut = |i: usize| cuts.get(i).map_or(events.len(), |cut| cut.index(events.len() + 1));
        let (first, second) = (cut(0).min(cut(1)), cut(0).max(cut(1)));
        let a = state_of_events(&aggregate, &events[..first]);
        let b = state_of_events(&aggregate, &events[first..second]);
        let c = state_of_events(&aggregate, &events[second..]);
        let ab = merged(&aggregate, &a, &b);
        assert_same(&aggregate, &merged(&aggregate, &b, &a), &ab);
        assert_same(&aggregate, &merged(&aggregate, &ab, &c), &merged(&aggregate, &a, &merged(&aggregate, &b, &c)));
        assert_same(&aggregate, &merged(&aggregate, &a, &aggregate.zero()), &a);
        assert_same(&aggregate, &merged(&aggregate, &aggregate.zero(), &a), &a);

        if aggregate.laws().idempotent {
            assert_same(&aggregate, &merged(&aggregate, &ab, &b), &ab);
        }
        let mut back = ab.clone();
        prop_assert_eq!(aggregate.unmerge(&mut back, &b), aggregate.laws().invertible);
        if aggregate.laws().invertible {
            assert_same(&aggregate, &back, &a);
            // The same with the debt first, as prefix sums of differences have it, merged or pushed.
            let mut debt = aggregate.zero();
            aggregate.unmerge(&mut debt, &b);
            aggregate.finish(&debt);
            let debt = aggregate.decode(&mut encoded(&aggregate, &debt).as_slice()).unwrap();
            assert_same(&aggregate, &merged(&aggregate, &debt, &ab), &a);
            let mut paid = debt;
            events[..second].iter().for_each(|(value, times)| aggregate.push(&mut paid, value, times));
            assert_same(&aggregate, &paid, &a);
        } else {
            assert_same(&aggregate, &back, &ab);
        }
    }

    #[test]
    fn answers_are_those_of_plain_arithmetic((aggregate, events) in cases()) {
        let answer = aggregate.finish(&state_of_events(&aggregate, &events));
        let present: Vec<Event> = events.into_iter().filter(|(value, _)| !value.is_null()).collect();
        let Some((buckets, part)) = aggregate.split() else {
            return check_answer(&aggregate, &present, &answer);
        };
        // Each part by itself.
        let labels = buckets.labels();
        let nothing = part.finish(&part.zero());
        if present.is_empty() && nothing.is_null() {
            prop_assert_eq!(answer, Value::Null);
            return Ok(());
        }
        let Value::Map(answers) = answer else { panic!("{answer:?} is not a map") };
        prop_assert_eq!(answers.len(), labels.len());
        for (number, label) in labels.iter().enumerate() {
            let events: Vec<Event> = present
                .iter()
                .filter_map(|(value, times)| match value {
                    Value::Struct(fields) if fields[0] == Value::Int32(number as i32) => Some((fields[1].clone(), *times)),
                    _ => None,
                })
                .collect();
            let (_, answer) = answers.iter().find(|(key, _)| **key == **label).unwrap();
            check_answer(part, &events, answer)?;
        }
    }

    #[test]
    fn decoding_undoes_encoding((aggregate, events) in cases(), after: Vec<u8>) {
        let state = state_of_events(&aggregate, &events);
        let mut bytes = encoded(&aggregate, &state);
        bytes.extend_from_slice(&after);
        let mut rest = bytes.as_slice();
        let decoded = aggregate.decode(&mut rest).unwrap();
        prop_assert_eq!(rest, after.as_slice());
        assert_same(&aggregate, &decoded, &state);
    }

    /// Any bytes, and bytes that were nearly a state: an error, or the one state that encodes to them.
    #[test]
    fn garbage_is_refused_or_canonical((aggregate, events) in cases(), mut garbage: Vec<u8>, flips: Vec<(Index, u8)>) {
        let mut damaged = encoded(&aggregate, &state_of_events(&aggregate, &events));
        for (at, byte) in &flips {
            let at = at.index(damaged.len());
            damaged[at] = *byte;
        }
        // Small numbers at the start make plausible headers.
        if let Some((_, byte)) = flips.first() {
            garbage.splice(0..0, [2, byte % 16]);
        }
        for bytes in [garbage, damaged] {
            let mut rest = bytes.as_slice();
            if let Ok(state) = aggregate.decode(&mut rest) {
                aggregate.finish(&state);
                let used = bytes.len() - rest.len();
                prop_assert_eq!(encoded(&aggregate, &state), &bytes[..used]);
            }
        }
    }
}

/// Judges the answer over events whose values are not null.
fn check_answer(aggregate: &Aggregate, events: &[Event], answer: &Value) -> Result<(), TestCaseError> {
    if let Some(expected) = oracle_of(aggregate, events) {
        prop_assert_eq!(bits(answer), bits(&expected));
        return Ok(());
    }
    if events.is_empty() {
        prop_assert_eq!(answer, &Value::Null);
        return Ok(());
    }
    let scale = if let Some(Type::Decimal { scale, .. }) = aggregate.input() { *scale } else { 0 };
    let mut floats: Vec<f64> = events.iter().map(|(value, _)| as_float(value, scale)).collect();
    let is_float = aggregate.input().is_some_and(Type::is_float);
    match aggregate.function() {
        Function::Sum | Function::Mean if is_float => {
            let (Value::Float64(answer), count) = (answer, floats.len() as u32) else { panic!("{answer:?}") };
            let naive: f64 = floats.iter().filter(|x| !x.is_finite()).sum();
            if naive.is_nan() || naive.is_infinite() {
                prop_assert_eq!(answer.to_bits(), canonical_f64(naive).to_bits());
            } else {
                let exact =
                    floats.iter().fold(oracle::Integer::ZERO, |sum, x| sum.plus(&oracle::Integer::of_float(*x)));
                let divisors = if *aggregate.function() == Function::Mean { vec![count] } else { vec![] };
                oracle::assert_nearest(*answer, &exact, &divisors);
            }
        }
        Function::Percentile { .. } => {
            let Value::Float64(answer) = *answer else { panic!("{answer:?}") };
            floats.iter_mut().for_each(|x| *x = canonical_f64(*x).clamp(-CLAMP, CLAMP));
            floats.sort_by(f64::total_cmp);
            let rank = (floats.len() * 7).div_ceil(10);
            let exact = floats[rank - 1];
            // The bound has a hair of room for the rounding of logarithms.
            let is_near = (answer - exact).abs() <= exact.abs() * (0.01 + 1e-12);
            let is_zero = answer == 0.0 && exact.abs() < 1e-9;
            prop_assert!(is_near || is_zero || (answer.is_nan() && exact.is_nan()), "{} is not near {}", answer, exact);
        }
        // The sums of integers and decimals, and what is made of squares, have their own oracles beside their code.
        _ => {}
    }
    Ok(())
}
