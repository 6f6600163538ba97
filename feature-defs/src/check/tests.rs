use super::*;
use crate::diagnose::render;
use crate::parse::parse_definitions;
use crate::parse::tests::{DEFINITIONS, files, lines};

/// The problems of the design's example after one replacement.
#[track_caller]
fn check_edit(from: &str, to: &str, expected: &[&str]) {
    assert_eq!(DEFINITIONS.matches(from).count(), 1, "`{from}` is in the example once");
    check_text(&DEFINITIONS.replace(from, to), expected);
}

/// The problems of the example with more definitions below it, in a second file.
#[track_caller]
fn check_more(more: &str, expected: &[&str]) {
    let files = files(&[("a.yaml", DEFINITIONS), ("b.yaml", more)]);
    let (catalog, diagnostics) = parse_definitions("p", &files);
    assert!(diagnostics.is_empty(), "{}", render(&diagnostics, &files, false));
    assert_eq!(lines(&check(&catalog), &files), expected);
}

#[track_caller]
fn check_text(text: &str, expected: &[&str]) {
    let files = files(&[("a.yaml", text)]);
    let (catalog, mut diagnostics) = parse_definitions("p", &files);
    diagnostics.extend(check(&catalog));
    assert_eq!(lines(&diagnostics, &files), expected);
}

#[test]
fn the_example_of_the_design_is_sound() {
    check_text(DEFINITIONS, &[]);
}

#[test]
fn a_second_object_of_one_name_shows_both_places() {
    let text = "entities:\n  - {name: airport, keys: []}\n  - {name: airport, keys: []}\n";
    let files = files(&[("a.yaml", text)]);
    let (catalog, _) = parse_definitions("p", &files);
    let expected = "\
error: there are two entities `airport`
 --> a.yaml:3:12
  |
3 |   - {name: airport, keys: []}
  |            ^^^^^^^
  |
 ::: a.yaml:2:12
  |
2 |   - {name: airport, keys: []}
  |            ------- the first is here
";
    let rendered = render(&check(&catalog), &files, false);
    assert_eq!(rendered, expected, "{rendered}");
}

#[test]
fn names_are_well_formed_and_unique() {
    check_more(
        "entities: [{name: 9lives, keys: []}]\n",
        &["1:19 `9lives` cannot be the name of an entity; use a letter, then letters, digits and `_`, 64 at most"],
    );
    check_more(
        "requests: [{name: a-b, fields: [{name: x, type: int64}]}]\n",
        &["1:19 `a-b` cannot be the name of a request; use a letter, then letters, digits and `_`, 64 at most"],
    );
    check_more(
        "requests: [{name: context, fields: [{name: x, type: int64}]}]\n",
        &[
            "67:11 there is already a request `context`; views, requests and transforms are addressed alike and need different names",
        ],
    );
    check_more("sources: [{name: weather, files: a.csv, event_time: t}]\n", &["1:18 there are two sources `weather`"]);
    check_more(
        "requests: [{name: r, fields: [{name: x, type: int64}, {name: x, type: int64}]}]\n",
        &["1:62 request `r` has two fields `x`"],
    );
    check_more(
        "requests: [{name: r, fields: [{name: event_timestamp, type: timestamp}]}]\n",
        &[
            "1:38 the name `event_timestamp` is taken; it is the column of a spine that says at what time a row is asked for",
        ],
    );
    check_more(
        "vocabularies: [{name: v, values: [a, b, a]}]\n",
        &["1:41 vocabulary `v` has `a` twice; each value has one number"],
    );
}

#[test]
fn keys_have_key_types() {
    check_edit(
        "keys: [{name: tailnum, type: string}]",
        "keys: [{name: tailnum, type: float64}]",
        &["4:51 an entity key cannot be of type `float64`; use `int64` or `string`: a key must be found again exactly"],
    );
    check_edit(
        "keys: [{name: tailnum, type: string}]",
        "keys: [{name: tailnum, type: date}]",
        &["4:51 an entity key cannot be of type `date`; use `int64`, `string`, `bool` or `binary`"],
    );
    check_edit(
        "schema: [{name: airport, type: string}, {name: tailnum, type: string}, {name: dep_delay, type: float64}",
        "schema: [{name: airport, type: int64}, {name: tailnum, type: string}, {name: dep_delay, type: float64}",
        &[
            "47:13 key `airport` of entity `airport` is `string`, but column `airport` of source `departures` is `int64`",
        ],
    );
    check_edit(
        "event_id: event_id                  #",
        "event_id: evnt_id #",
        &["21:15 source `departures` has no column `evnt_id`; did you mean `event_id`?"],
    );
}

#[test]
fn references_lead_somewhere() {
    check_edit(
        "    source: weather\n",
        "    source: wether\n",
        &["36:13 there is no source `wether`; did you mean `weather`?"],
    );
    check_edit(
        "    entity: airport\n    keys",
        "    entity: airprot\n    keys",
        &["34:13 there is no entity `airprot`; did you mean `airport`?"],
    );
    check_edit(
        "keys: {airport: origin}             #",
        "keys: {airprt: origin} #",
        &["35:12 entity `airport` has no key `airprt`; did you mean `airport`?"],
    );
    check_edit(
        "keys: {airport: dest}}, flight]",
        "keys: {airport: dest}}, flihgt]",
        &["68:175 there is no feature view, request or transform `flihgt`; did you mean `flight`?"],
    );
    check_edit(
        "{view: airport_arrivals, as: dest_arrivals, keys: {airport: dest}}",
        "{view: airport_arrival, keys: {airport: dest}}",
        &["68:114 there is no feature view `airport_arrival`; did you mean `airport_arrivals`?"],
    );
    check_edit(
        "{view: airport_arrivals, as: dest_arrivals, keys: {airport: dest}}",
        "{view: flight}",
        &["68:114 there is no feature view `flight`; `flight` is a request: write its name alone, without `view:`"],
    );
    check_edit(
        "\"flight:distance\"]",
        "\"flight:distnace\"]",
        &["80:122 request `flight` has no feature `distnace`; did you mean `distance`?"],
    );
    check_edit(
        "features: delay_inputs",
        "features: delay_input",
        &["84:15 there is no feature service `delay_input`; did you mean `delay_inputs`?"],
    );
    check_edit(
        "unit: aircraft",
        "unit: aircrafts",
        &["98:20 there is no entity `aircrafts`; did you mean `aircraft`?"],
    );
    check_edit(
        "unit: aircraft",
        "unit: everything",
        &["98:20 entity `everything` has no keys, so it cannot be randomised"],
    );
    check_edit(
        "fallback: {p_late: 0.22}",
        "fallback: {model: delay_small}",
        &["96:23 there is no model `delay_small`; known here: `delay`"],
    );
    check_edit(
        "fallback: {p_late: 0.22}",
        "fallback: {model: delay}",
        &[
            "96:23 models fall back on each other in a circle: delay -> delay; the last model of a chain has values or none",
        ],
    );
    check_edit(
        "fallback: {p_late: 0.22}",
        "fallback: {late: 0.22}",
        &[
            "96:16 model `delay` has no output `late`; known here: `p_late`",
            "96:16 the fallback of model `delay` has no value for output `p_late`",
        ],
    );
    check_edit(
        "max_shape: {dense:",
        "max_shape: {dens:",
        &["83:11 `max_shape` of model `delay` names an input `dens` that it does not have; did you mean `dense`?"],
    );
    check_edit(
        "tiers: [interactive, batch]",
        "tiers: [a, b, c, d, e, f, g, h, i]",
        &["94:59 model `delay` has 9 tiers; use at most 8: each gets a quarter of the rows of the one above"],
    );
    check_edit(
        "devices: [cpu]",
        "devices: [gpu]",
        &["93:27 `gpu` is not a device; use `cpu`, `cuda` or `cuda:<number>`"],
    );
}

#[test]
fn windows_and_hops_fit() {
    check_edit(
        "    source: departures\n    windows: [1h, 6h, 24h]\n",
        "    source: departures\n    windows: [1h, 60m, 24h]\n",
        &["48:19 feature view `airport_load` has the window `60m` twice"],
    );
    check_edit(
        "    source: departures\n",
        "    source: departures\n    hop: 7m\n",
        &[
            "48:10 the hop does not divide the window `1h`, `6h`, `24h`; choose a hop that divides every window of the view",
        ],
    );
    check_edit("    source: departures\n", "    source: departures\n    hop: 15m\n", &[]);
    check_edit(
        "    source: departures\n",
        "    source: departures\n    hop: 12m\n",
        &[
            "48:10 the hop neither divides 5 minutes nor is a multiple of it; hops divide each other: use 1m, 5m, 10m, 15m, 30m, 1h, 2h, 6h or 1d",
        ],
    );
    check_edit("    source: departures\n", "    source: departures\n    hop: none\n", &[]);
    check_edit(
        "    source: departures\n",
        "    source: planes\n",
        &[
            "47:13 feature view `airport_load` aggregates over time, but rows of `planes` have no time; windows need a source with an `event_time`",
        ],
    );
    check_edit(
        "{name: departures, function: count}",
        "{name: departures, function: cuont}",
        &["50:38 there is no aggregate function `cuont`; did you mean `count`?"],
    );
    check_edit(
        "{name: dep_delay_mean, function: mean, of: dep_delay, default: 0.0}",
        "{name: dep_delay_mean, function: mean, q: 0.5}",
        &[
            "51:42 `mean` needs `of`: what to aggregate; write `of: column`, or an expression over the source's columns",
            "51:51 `mean` does not take `q`",
        ],
    );
    check_edit(
        "q: 0.9, of: dep_delay, clamp: [-120, 2880]",
        "q: 90, of: dep_delay, clamp: [2880, -120]",
        &["53:56 `q` must lie between 0 and 1", "53:82 the lower end of `clamp` must be below the upper"],
    );
    check_edit(
        "q: 0.9, of: dep_delay, clamp: [-120, 2880]",
        "of: dep_delay",
        &[
            "53:41 `percentile` needs `q` and `clamp`; write like `of: delay, q: 0.9, clamp: [0, 1000]`: 90 % of the values, which lie in this range",
        ],
    );
}

/// The problems of the example's percentile after its parameters are replaced: `function: ` stands at column 31.
#[track_caller]
fn check_aggregate(parameters: &str, expected: &[&str]) {
    let percentile = "function: percentile, q: 0.9, of: dep_delay, clamp: [-120, 2880], windows: [24h]";
    check_edit(percentile, &format!("windows: [24h], {parameters}"), expected);
}

#[test]
fn functions_have_their_arguments() {
    for sound in [
        "function: stddev, of: dep_delay",
        "function: variance, of: dep_delay",
        "function: first, of: tailnum",
        "function: last, of: tailnum",
        "function: last_n, of: tailnum, n: 5",
        "function: distinct_count, of: tailnum",
        "function: top_k, of: dep_delay, k: 5",
        "function: histogram, of: dep_delay, edges: [0, 15.5, 60]",
        "function: histogram, of: tailnum, values: [N1, N2]",
        "function: count, by: {of: tailnum, values: [N1, N2]}",
        "function: histogram, of: tailnum, values: [N1], by: {of: dep_delay, edges: [0]}",
    ] {
        check_aggregate(sound, &[]);
    }
    check_aggregate(
        "function: percentile",
        &[
            "53:57 `percentile` needs `of`, `q` and `clamp`; write like `of: delay, q: 0.9, clamp: [0, 1000]`: 90 % of the values, which lie in this range",
        ],
    );
    check_aggregate(
        "function: last_n, of: tailnum",
        &["53:57 `last_n` needs `n`; write like `of: price, n: 3`: how many values to keep"],
    );
    check_aggregate("function: top_k, of: dep_delay, n: 5", &["53:82 `top_k` does not take `n`; write `k`"]);
    check_aggregate(
        "function: top_k, of: dep_delay, k: 1001",
        &["53:82 expected an integer from 1 to 1000, got the integer 1001"],
    );
    let buckets = "write `edges: [0, 15, 60]`, or `values: [AA, UA]`; what is in none is OTHER";
    check_aggregate(
        "function: histogram, of: dep_delay",
        &[&format!("53:57 `histogram` needs either `edges` or `values`; {buckets}")],
    );
    check_aggregate(
        "function: count, by: {of: tailnum, values: [N1], edges: [0]}",
        &[&format!("53:69 `by` needs either `edges` or `values`; {buckets}")],
    );
    check_aggregate(
        "function: count, by: tailnum",
        &[
            "53:68 `by` needs its buckets: all values there may be, or the edges between them; write `by: {of: tailnum, values: [...]}` or `by: {of: tailnum, edges: [...]}`",
        ],
    );
    check_aggregate(
        "function: count, by: {off: tailnum, values: []}",
        &["53:69 unknown key `off` in `by`; did you mean `of`?", "53:69 `by` has no `of`", "53:91 `values` is empty"],
    );
    check_aggregate("function: histogram, of: dep_delay, edges: [5, 5]", &["53:90 `edges` must ascend"]);
    check_aggregate(
        "function: percentile, of: dep_delay, q: 0.12345678901, clamp: [0, 1e19]",
        &[
            "53:87 `q` has more than nine decimals",
            "53:109 `clamp` must lie within ±1e18; a narrow range keeps tiles small: name what values can really be",
        ],
    );
    check_aggregate(
        "function: quantile, of: dep_delay",
        &["53:57 there is no aggregate function `quantile`; did you mean `percentile`?"],
    );
}

#[test]
fn defaults_fit_their_types() {
    check_edit(
        "{name: visib, type: float64, default: 10.0}",
        "{name: visib, type: float64, default: ten}",
        &["43:47 the default does not fit: the string `ten` is not a `float64`"],
    );
    check_edit(
        "{name: visib, type: float64, default: 10.0}",
        "{name: visib, type: float64, default: null}",
        &["43:47 a default of null changes nothing; leave it out: without a default a missing value is null"],
    );
    check_edit(
        "{name: visib, type: float64, default: 10.0}",
        "{name: visib__status, type: float64}",
        &["43:16 a feature's name cannot end in `__status`; columns of such names hold the statuses of features"],
    );
}

#[test]
fn aliases_mean_one_thing() {
    check_edit(
        "as: dest_arrivals",
        "as: weather_now",
        &["68:136 `weather_now` is the name of a feature view; choose an alias that means nothing else"],
    );
    check_edit(
        "as: dest_arrivals",
        "as: flight",
        &["68:136 `flight` is the name of a request; choose an alias that means nothing else"],
    );
    check_edit(
        "\"context:*\", ",
        "\"context:*\", \"context:hour_sin\", ",
        &["80:122 feature service `delay_inputs` has `context:hour_sin` twice"],
    );
    check_edit(
        "\"context:*\", ",
        "{view: weather_now, keys: {airport: dest}}, ",
        &[
            "80:116 feature service `delay_inputs` already uses the name `weather_now` with other keys; tell them apart by `as`",
        ],
    );
}

#[test]
fn circles_are_shown_whole() {
    let feature = "features: [{name: x, expr: \"1\"}]";
    check_more(
        &format!(
            "transforms:\n  - {{name: a, inputs: [b], {feature}}}\n  - {{name: b, inputs: [flight, c], {feature}}}\n  - {{name: c, inputs: [a], {feature}}}\n  - {{name: d, inputs: [d, a], {feature}}}\n"
        ),
        &[
            "4:24 transforms depend on each other in a circle: a -> b -> c -> a; a transform can only read what is computed before it",
            "5:24 transforms depend on each other in a circle: d -> d; a transform can only read what is computed before it",
        ],
    );
    let mut chain = "transforms:\n".to_string();
    for i in 0..5000 {
        chain += &format!("  - {{name: t{i}, inputs: [t{}], {feature}}}\n", i + 1);
    }
    chain += &format!("  - {{name: t5000, inputs: [], {feature}}}\n");
    check_more(&chain, &[]);
}

#[test]
fn what_was_reported_is_not_reported_again() {
    check_text(
        "entities: [{name: e}]\nfeature_views:\n  - {name: v, source: 3, features: [{name: a, type: flot64}]}\nfeature_services: [{name: s, features: [\"v:a\"]}]\n",
        &[
            "1:19 entity `e` has no `keys`",
            "3:12 feature view `v` has no `entity`",
            "3:23 expected a string, got the integer 3; quote it: \"3\"",
            "3:53 `flot64` is not a type; did you mean `float64`?",
        ],
    );
}

#[test]
fn literals_become_values() {
    use crate::value::Value;
    #[track_caller]
    fn fits(literal: Literal, wanted: &str, expected: Value) {
        assert_eq!(literal.to_value(&Type::parse(wanted).unwrap()), Ok(expected));
    }
    #[track_caller]
    fn fails(literal: Literal, wanted: &str, expected: &str) {
        let error = literal.to_value(&Type::parse(wanted).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    let text = |text: &str| Literal::String(text.to_string());
    fits(Literal::Int(3), "int64", Value::Int64(3));
    fits(Literal::Int(3), "float64", Value::Float64(3.0));
    fits(Literal::Float(-0.0), "float32", Value::Float32(0.0));
    fits(Literal::Float(12.5), "decimal(5,2)", Value::Decimal(1250));
    fits(text("-0.07"), "decimal(5,2)", Value::Decimal(-7));
    fits(text("1970-01-02T00:00:01+01:00"), "timestamp", Value::Timestamp(82_801_000_000));
    fits(text("1969-12-31"), "date", Value::Date(-1));
    fits(
        Literal::List(vec![Literal::Int(1), Literal::Null]),
        "list<int32>",
        Value::List(vec![Value::Int32(1), Value::Null]),
    );
    fits(Literal::List(vec![Literal::Int(1), Literal::Float(0.5)]), "vector(2)", Value::Vector([1.0, 0.5].into()));
    fits(
        Literal::Map(vec![("b".into(), Literal::Int(1)), ("a".into(), Literal::Int(2))]),
        "map<string,int64>",
        Value::Map(vec![("a".into(), Value::Int64(2)), ("b".into(), Value::Int64(1))]),
    );
    fits(
        Literal::Map(vec![("b".into(), Literal::Int(1))]),
        "struct<a:int64,b:int64>",
        Value::Struct(vec![Value::Null, Value::Int64(1)]),
    );
    fails(Literal::Float(3.0), "int64", "the number 3 is not a `int64`");
    fails(Literal::Int(1 << 31), "int32", "the integer 2147483648 is not a `int32`, it does not fit into 32 bits");
    fails(Literal::Int((1 << 53) + 1), "float64", "the integer 9007199254740993 is not a `float64`");
    fails(
        Literal::Float(1e39),
        "float32",
        "the number 1000000000000000000000000000000000000000 is not a `float32`, it is too large",
    );
    fails(text("12.345"), "decimal(5,2)", "the string `12.345` is not a `decimal(5,2)`");
    fails(Literal::Int(1000), "decimal(5,2)", "the integer 1000 is not a `decimal(5,2)`");
    fails(
        text("yesterday"),
        "timestamp",
        "the string `yesterday` is not a `timestamp`, write it like \"2013-07-01T12:00:00Z\"",
    );
    fails(Literal::List(vec![Literal::Int(1)]), "vector(2)", "a list of 1 is not a `vector(2)`, it has another length");
    fails(
        Literal::List(vec![Literal::Null]),
        "vector(1)",
        "a list of 1 is not a `vector(1)`, no element of a vector is null",
    );
}
