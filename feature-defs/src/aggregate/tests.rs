use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::value;

fn aggregate(function: Function, input: Type) -> Aggregate {
    Aggregate::new(function, Some(input)).unwrap()
}

fn state_of(aggregate: &Aggregate, values: &[Value]) -> State {
    let mut state = aggregate.zero();
    values.iter().for_each(|value| aggregate.push(&mut state, value, &Times::NONE));
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
    for name in FUNCTION_NAMES {
        let function = Function::parse(name).unwrap();
        assert_eq!(function.name(), name);
        assert_eq!(function.to_string(), name);
    }
    for name in PLANNED_NAMES {
        let expected = format!("`{name}` is not available in this version; available: count, sum, mean, min, max");
        check_name(name, &expected);
    }
    check_name("avg", "`avg` is not an aggregate function; did you mean `mean`?");
    check_name("Sum", "`Sum` is not an aggregate function; did you mean `sum`?");
    check_name("cuont", "`cuont` is not an aggregate function; did you mean `count`?");
    check_name("wibble", "`wibble` is not an aggregate function; available: count, sum, mean, min, max");
    check_name("x", "`x` is not an aggregate function; available: count, sum, mean, min, max");
}

#[test]
fn states_stay_small() {
    assert!(size_of::<State>() <= 48, "windows hold one state per slot; this one has {} bytes", size_of::<State>());
}

// The laws.

/// Every kind of state there is, with inputs that try it.
fn cases() -> impl Strategy<Value = (Aggregate, Vec<Value>)> {
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
    let numbers = (
        prop::sample::select(vec![Function::Count, Function::Sum, Function::Mean, Function::Min, Function::Max]),
        inputs,
    );
    let texts = (
        prop::sample::select(vec![Function::Count, Function::Min, Function::Max]),
        (Just(Type::String), column("[a-c\0]{0,3}".prop_map(|text| Value::String(text.into())))),
    );
    prop_oneof![6 => numbers, 1 => texts].prop_map(|(function, (input, values))| (aggregate(function, input), values))
}

fn column(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Vec<Value>> {
    prop::collection::vec(prop_oneof![1 => Just(Value::Null), 9 => value], 0..60)
}

/// An aggregate, and its values as they are, shuffled, and where to cut them.
fn shuffled_cases() -> impl Strategy<Value = (Aggregate, Vec<Value>, Vec<Value>, Vec<Index>)> {
    cases().prop_flat_map(|(aggregate, values)| {
        (
            Just(aggregate),
            Just(values.clone()),
            Just(values).prop_shuffle(),
            prop::collection::vec(any::<Index>(), 0..6),
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn order_and_partitions_mean_nothing((aggregate, values, shuffled, cuts) in shuffled_cases()) {
        let whole = state_of(&aggregate, &values);
        assert_same(&aggregate, &state_of(&aggregate, &shuffled), &whole);

        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(values.len() + 1)).chain([0, values.len()]).collect();
        cuts.sort();
        let mut parts: Vec<State> = cuts.windows(2).map(|cut| state_of(&aggregate, &shuffled[cut[0]..cut[1]])).collect();
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
    fn merging_obeys_its_laws((aggregate, values, _, cuts) in shuffled_cases()) {
        let cut = |i: usize| cuts.get(i).map_or(values.len(), |cut| cut.index(values.len() + 1));
        let (first, second) = (cut(0).min(cut(1)), cut(0).max(cut(1)));
        let a = state_of(&aggregate, &values[..first]);
        let b = state_of(&aggregate, &values[first..second]);
        let c = state_of(&aggregate, &values[second..]);
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
            // The same with the debt first, as prefix sums of differences have it.
            let mut debt = aggregate.zero();
            aggregate.unmerge(&mut debt, &b);
            aggregate.finish(&debt);
            let debt = aggregate.decode(&mut encoded(&aggregate, &debt).as_slice()).unwrap();
            assert_same(&aggregate, &merged(&aggregate, &debt, &ab), &a);
        } else {
            assert_same(&aggregate, &back, &ab);
        }
    }

    #[test]
    fn answers_are_those_of_plain_arithmetic((aggregate, values) in cases()) {
        let present: Vec<&Value> = values.iter().filter(|value| !value.is_null()).collect();
        let answer = aggregate.finish(&state_of(&aggregate, &values));
        let floats: Option<Vec<f64>> = present.iter().map(|value| match value {
            Value::Float64(x) => Some(*x),
            Value::Float32(x) => Some(f64::from(*x)),
            _ => None,
        }).collect();
        match (aggregate.function(), floats) {
            (Function::Count, _) => prop_assert_eq!(answer, Value::Int64(present.len() as i64)),
            (_, _) if present.is_empty() => prop_assert_eq!(answer, Value::Null),
            (Function::Sum | Function::Mean, Some(floats)) => {
                let (Value::Float64(answer), count) = (&answer, floats.len() as u32) else { panic!("{answer:?} is not a float") };
                let naive: f64 = floats.iter().filter(|x| !x.is_finite()).sum();
                if naive.is_nan() || naive.is_infinite() {
                    prop_assert_eq!(answer.to_bits(), value::canonical_f64(naive).to_bits());
                } else {
                    let exact = floats.iter().fold(oracle::Integer::ZERO, |sum, x| sum.plus(&oracle::Integer::of_float(*x)));
                    let divisors = if *aggregate.function() == Function::Mean { vec![count] } else { vec![] };
                    oracle::assert_nearest(*answer, &exact, &divisors);
                }
            }
            (Function::Min | Function::Max, Some(floats)) => {
                let numbers = floats.iter().copied().filter(|x| !x.is_nan());
                let expected = if *aggregate.function() == Function::Min {
                    numbers.reduce(f64::min).unwrap_or(f64::NAN)
                } else if floats.iter().any(|x| x.is_nan()) {
                    f64::NAN
                } else {
                    numbers.reduce(f64::max).unwrap()
                };
                let answer = match answer {
                    Value::Float32(x) => f64::from(x),
                    Value::Float64(x) => x,
                    other => panic!("{other:?} is not a float"),
                };
                prop_assert_eq!(value::canonical_f64(answer).to_bits(), value::canonical_f64(expected).to_bits());
            }
            (Function::Min | Function::Max, None) => {
                let keys = present.iter().map(|value| {
                    let mut key = Vec::new();
                    value::encode(value, &mut key);
                    key
                });
                let expected = if *aggregate.function() == Function::Min { keys.min() } else { keys.max() };
                let mut key = Vec::new();
                value::encode(&answer, &mut key);
                prop_assert_eq!(Some(key), expected);
            }
            // The sums of integers and decimals have their own oracle beside their code.
            (Function::Sum | Function::Mean, None) => {}
        }
    }

    #[test]
    fn decoding_undoes_encoding((aggregate, values) in cases(), after: Vec<u8>) {
        let state = state_of(&aggregate, &values);
        let mut bytes = encoded(&aggregate, &state);
        bytes.extend_from_slice(&after);
        let mut rest = bytes.as_slice();
        let decoded = aggregate.decode(&mut rest).unwrap();
        prop_assert_eq!(rest, after.as_slice());
        assert_same(&aggregate, &decoded, &state);
    }

    /// Any bytes, and bytes that were nearly a state: an error, or the one state that encodes to them.
    #[test]
    fn garbage_is_refused_or_canonical((aggregate, values) in cases(), mut garbage: Vec<u8>, flips: Vec<(Index, u8)>) {
        let mut damaged = encoded(&aggregate, &state_of(&aggregate, &values));
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
