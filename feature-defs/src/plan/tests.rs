use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};

use super::*;
use crate::catalog::{Files, SourceFile};
use crate::diagnose::render;
use crate::time::{STATIC, Status};
use crate::window::{HOUR, SECOND};

const BASE: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - {name: sales, files: sales.parquet, event_time: sold_at}
feature_views:
  - name: last
    entity: shop
    source: sales
    ttl: 1h
    features:
      - {name: amount, type: float64, default: 1.5}
      - {name: double, expr: "amount * 2"}
  - name: load
    entity: shop
    source: sales
    windows: [1h, 24h]
    aggregates:
      - {name: n, function: count}
      - {name: total, function: sum, of: amount, where: "items > 1"}
requests:
  - {name: ask, fields: [{name: price, type: float64, nullable: true}, {name: kind, type: string}]}
transforms:
  - name: t
    inputs: [{view: last, as: mine, keys: {shop: my_shop}}, load, ask]
    features:
      - {name: gap, expr: "ask.price - mine.amount"}
      - {name: age, expr: "age(mine)"}
      - {name: kind_id, expr: "vocab(ask.kind, 'kinds')"}
vocabularies:
  - {name: kinds, values: [a, b]}
feature_services:
  - name: all
    features: [{view: last, as: mine, keys: {shop: my_shop}}, "load:n_1h", "t:*", "ask:price"]
models:
  - name: m
    features: all
    runtime: torchscript
    inputs:
      - {name: dense, dtype: float32, features: ["*", "!t:kind_id"], missing: 0.0}
      - {name: kind, dtype: int64, features: ["t:kind_id"]}
    outputs: [{name: p, dtype: float32}]
    post: [{name: q, expr: "p * 2"}]
    decision: "p > 0.5"
    fallback: {p: 0.1}
"#;

fn schemas() -> SourceSchemas {
    let columns =
        [("shop", Type::String), ("amount", Type::Float64), ("items", Type::Int64), ("sold_at", Type::Timestamp)];
    let columns = columns.into_iter().map(|(name, column_type)| (name.to_string(), column_type)).collect();
    SourceSchemas::from([("sales".to_string(), columns)])
}

fn compiled(text: &str) -> Result<Plan, String> {
    let files = Files::new(vec![SourceFile { path: "defs.yaml".into(), text: text.into() }]);
    compile_definitions("test", &files, &schemas()).map_err(|wrong| render(&wrong, &files, false))
}

fn plan(text: &str) -> Plan {
    compiled(text).unwrap_or_else(|wrong| panic!("{wrong}"))
}

/// Replaces one text by another; the first error must hold every one of the expected fragments.
#[track_caller]
fn check_error(from: &str, to: &str, expected: &[&str]) {
    assert!(BASE.contains(from), "the base text holds `{from}`");
    let wrong = compiled(&BASE.replacen(from, to, 1)).expect_err("it must not compile");
    for fragment in expected {
        assert!(wrong.contains(fragment), "`{fragment}` is not in\n{wrong}");
    }
}

#[test]
fn errors_point_at_the_place_and_name_the_nearest() {
    check_error(
        "amount * 2",
        "amont * 2",
        &["no column `amont`", "defs.yaml:13:31", "did you mean `amount`?", "amont * 2"],
    );
    check_error(
        "{name: amount, type: float64, default: 1.5}",
        "{name: amounts, type: float64}",
        &["source `sales` has no column `amounts`", "did you mean `amount`?", "defs.yaml:12:16"],
    );
    check_error("amount * 2", "shop * 2", &["defs.yaml:13", "string"]);
    check_error("default: 1.5", "default: much", &["the default does not fit"]);
    check_error("function: sum, of: amount", "function: sum, of: shop", &["`sum` takes", "string"]);
    check_error(
        "function: count",
        "function: percentile, of: shop, q: 0.5, clamp: [0, 1]",
        &["`percentile` takes a number", "not string", "defs.yaml:19"],
    );
    check_error(
        "function: count",
        "function: histogram, of: items, values: [1, two]",
        &["a value of `values` does not fit: the string `two` is not a `int64`"],
    );
    check_error(
        "function: count",
        "function: histogram, of: amount, values: [1, 2]",
        &["`values` are strings, integers or bools, not float64; divide them with `edges`"],
    );
    check_error(
        "function: count",
        "function: count, by: {of: shap, values: [a]}",
        &["no column `shap`", "did you mean `shop`?"],
    );
    check_error(
        "function: count",
        "function: count, by: {of: shop, edges: [1]}",
        &["`edges` divide numbers, not string; name single ones with `values`"],
    );
    check_error("\"load:n_1h\"", "\"load:n_2h\"", &["`load` has no feature `n_2h`", "did you mean `n_1h`?"]);
    check_error("\"t:*\"", "\"tt:*\"", &["tt", "did you mean `t`?"]);
    check_error("\"!t:kind_id\"", "\"!t:kind\"", &["no feature of service `all` is `t:kind`", "t:kind_id"]);
    check_error(
        "\"t:*\", \"ask:price\"",
        "\"t:*\", \"ask:*\"",
        &["feature `ask:kind` is string and cannot be part of the float32 input `dense`", "vocab(ask:kind"],
    );
    check_error(
        "entity: shop\n    source: sales\n    ttl",
        "entity: shop\n    keys: {shop: place}\n    source: sales\n    ttl",
        &["source `sales` has no column `place` for key `shop`"],
    );
    check_error(
        "fallback: {p: 0.1}",
        "fallback: {p: 0.1}\n    label: {name: y, type: bool, wthin: 1h}",
        &["wthin", "within"],
    );
    check_error(
        "fallback: {p: 0.1}",
        "placement: {max_shape: {dense: [64, 2], kind: [64]}}",
        &[
            "input `dense` is 6 wide, but its `max_shape` says 2",
            "write rows and width: `dense: [64, 6]`",
            "the `max_shape` of input `kind` has 1 numbers",
        ],
    );
}

#[test]
fn batches_are_no_larger_than_the_declared_shapes() {
    let rows = |placement: &str| {
        let text = BASE.replace("fallback: {p: 0.1}", placement);
        let file = SourceFile { path: "all.yaml".into(), text };
        compile_definitions("p", &Files::new(vec![file]), &schemas()).unwrap().models[0].max_rows
    };
    assert_eq!(rows("fallback: {p: 0.1}"), 256);
    assert_eq!(rows("placement: {max_shape: {dense: [64, 6], kind: [32, 1]}}"), 32);
    assert_eq!(rows("placement: {max_shape: {dense: [1000, 40]}}"), 256);
}

#[test]
fn a_fallback_is_asked_with_the_rows_of_the_other_and_answers_with_its_outputs() {
    let with = |service: &str, dtype: &str| {
        format!(
            "fallback: {{model: small}}\n  - name: small\n    features: {service}\n    runtime: torchscript\n    inputs: \
             [{{name: x, dtype: float32, features: [\"*\"], missing: 0.0}}]\n    outputs: [{{name: p, dtype: {dtype}}}]"
        )
    };
    let services =
        "feature_services:\n  - {name: asked, features: [\"ask:price\"]}\n  - {name: other, features: [load]}\n";
    let compiled = |service: &str, dtype: &str| {
        let text = BASE.replace("fallback: {p: 0.1}", &with(service, dtype)).replace("feature_services:\n", services);
        let file = SourceFile { path: "all.yaml".into(), text };
        let compiled = compile_definitions("p", &Files::new(vec![file]), &schemas());
        compiled.map(|_| ()).map_err(|diagnostics| diagnostics.into_iter().map(|d| d.message).collect::<Vec<_>>())
    };
    assert_eq!(compiled("asked", "float32"), Ok(()));
    assert_eq!(
        compiled("asked", "float64"),
        Err(vec!["output `p` is float32, but float64 in the fallback `small`".to_owned()])
    );
    // `load` is read by the key `shop`, and requests for `m` carry `my_shop` as well.
    assert_eq!(compiled("other", "float32"), Ok(()));
    let text = BASE.replace("fallback: {p: 0.1}", &with("other", "float32")).replace("feature_services:\n", services);
    let text = text.replace("\"load:n_1h\", ", "");
    let file = SourceFile { path: "all.yaml".into(), text };
    let diagnostics = compile_definitions("p", &Files::new(vec![file]), &schemas()).unwrap_err();
    assert_eq!(
        diagnostics[0].message,
        "the fallback `small` needs `shop` (string), which requests for model `m` do not carry"
    );
}

#[test]
fn one_name_means_one_view_under_one_set_of_keys() {
    // The service reads `last` under its own key; the transform means another one by the same name.
    check_error(
        "features: [{view: last, as: mine, keys: {shop: my_shop}}, ",
        "features: [{view: last, as: mine, keys: {shop: her_shop}}, ",
        &[
            "transform `t` reads `mine` as something else than another part of the same service does",
            "give one of them a name of its own with `as`",
        ],
    );
}

#[test]
fn transforms_that_no_service_reads_are_checked_too() {
    let unread = "transforms:\n  - {name: u, inputs: [ask], features: [{name: x, expr: \"ask.nothing\"}]}\n";
    let wrong = compiled(&BASE.replacen("transforms:\n", unread, 1)).expect_err("it must not compile");
    assert!(wrong.contains("ask.nothing"), "{wrong}");
    assert_eq!(wrong.matches("error").count(), 1, "said once:\n{wrong}");
}

#[test]
fn storage_digests_cover_stored_bytes_and_semantic_digests_values() {
    let digests = |text: &str, view: &str| {
        let plan = plan(text);
        let view = plan.view(view).unwrap().clone();
        (
            view.storage_digest.clone(),
            view.semantic_digest.clone(),
            plan.service("all").unwrap().semantic_digest.clone(),
        )
    };
    let base = digests(BASE, "last");
    let same = |from: &str, to: &str| digests(&BASE.replacen(from, to, 1), "last");
    // Owner, description and layout change nothing.
    assert_eq!(same("  - name: last\n", "  - name: last\n    owner: me\n    description: the last sale\n"), base);
    assert_eq!(same("amount * 2", "amount   *  2"), base);
    // A default and a ttl change values, not bytes.
    for (from, to) in [("default: 1.5", "default: 2.5"), ("ttl: 1h", "ttl: 2h")] {
        let changed = same(from, to);
        assert_eq!(changed.0, base.0, "{to}");
        assert_ne!(changed.1, base.1, "{to}");
        assert_ne!(changed.2, base.2, "{to}");
    }
    // An expression changes bytes, and everything that depends on them.
    let changed = same("amount * 2", "amount * 3");
    assert!(changed.0 != base.0 && changed.1 != base.1 && changed.2 != base.2);
    // A vocabulary is part of what a service means.
    let changed = same("values: [a, b]", "values: [a, b, c]");
    assert_eq!((&changed.0, &changed.1), (&base.0, &base.1));
    assert_ne!(changed.2, base.2);
    // Wherever an expression is read, its vocabulary is: in a view's own filter, and in an aggregate's.
    for (from, to, view) in [
        ("    ttl: 1h\n", "    ttl: 1h\n    where: \"vocab(shop, 'kinds') > 0\"\n", "last"),
        ("where: \"items > 1\"", "where: \"vocab(shop, 'kinds') > 0\"", "load"),
        (
            "function: sum, of: amount",
            "function: sum, of: amount, by: {of: \"vocab(shop, 'kinds')\", values: [1, 2]}",
            "load",
        ),
    ] {
        assert!(BASE.contains(from));
        let short = BASE.replacen(from, to, 1);
        let long = short.replacen("values: [a, b]", "values: [a, b, c]", 1);
        assert_ne!(digests(&short, view).0, digests(&long, view).0, "{to}");
    }
    // Arguments of functions change what is stored; the rank of a percentile only what is answered.
    let of_total = |to: &str| digests(&BASE.replacen("function: sum, of: amount", to, 1), "load");
    let median = of_total("function: percentile, of: amount, q: 0.5, clamp: [0, 10]");
    let upper = of_total("function: percentile, of: amount, q: 0.9, clamp: [0, 10]");
    assert_eq!(median.0, upper.0);
    assert!(median.1 != upper.1 && median.2 != upper.2);
    let stored = [
        "function: percentile, of: amount, q: 0.5, clamp: [0, 11]",
        "function: last_n, of: amount, n: 3",
        "function: last_n, of: amount, n: 4",
        "function: top_k, of: amount, k: 3",
        "function: top_k, of: amount, k: 4",
        "function: histogram, of: amount, edges: [1, 2]",
        "function: histogram, of: amount, edges: [1, 3]",
        "function: histogram, of: items, values: [1, 2]",
        "function: histogram, of: items, values: [2, 1]",
        "function: count, by: {of: shop, values: [a, b]}",
        "function: count, by: {of: shop, values: [a, c]}",
        "function: count, by: {of: \"lower(shop)\", values: [a, c]}",
    ];
    let mut seen = std::collections::BTreeSet::from([median.0]);
    for to in stored {
        assert!(seen.insert(of_total(to).0), "{to}");
    }
    // Other files are other rows.
    assert_ne!(same("files: sales.parquet", "files: sales_v2.parquet").0, base.0);
    // Another view's change does not move this one.
    assert_eq!(same("of: amount, where", "of: items, where").0, base.0);
}

#[test]
fn a_service_reads_only_what_it_needs() {
    let plan = plan(BASE);
    let service = plan.service("all").unwrap();
    let names: Vec<&str> = service.outputs.iter().map(|output| output.name.as_str()).collect();
    assert_eq!(names, ["mine:amount", "mine:double", "load:n_1h", "t:gap", "t:age", "t:kind_id", "ask:price"]);
    let inputs: Vec<&str> = service.inputs.iter().map(|input| input.alias.as_str()).collect();
    assert_eq!(inputs, ["mine", "load"]);
    let columns: Vec<&str> = service.columns.iter().map(|column| column.name.as_str()).collect();
    assert_eq!(columns, ["my_shop", "shop", "price", "kind"]);
    assert_eq!(plan.view("last").unwrap().source_columns(), ["shop", "amount", "sold_at"]);
    let model = plan.model("m").unwrap();
    assert_eq!((model.inputs[0].width, model.inputs[1].width), (6, 1));
}

fn answer(columns: Vec<ArrayRef>, statuses: &[Status], event_times: &[Option<Micros>]) -> ViewAnswer {
    ViewAnswer { values: columns, statuses: statuses.to_vec(), event_times: event_times.to_vec() }
}

#[test]
fn assembly_fills_defaults_and_keeps_statuses_truthful() {
    use Status::*;
    let plan = plan(BASE);
    let service = plan.service("all").unwrap();
    let floats = |values: &[Option<f64>]| Arc::new(Float64Array::from(values.to_vec())) as ArrayRef;
    let t = 100 * HOUR;
    let mine = answer(
        vec![floats(&[Some(2.0), None, None, None]), floats(&[Some(4.0), None, None, None])],
        &[Present, Present, NotFound, OutsideMaxAge],
        &[Some(t - 90 * SECOND), Some(STATIC), None, Some(t - 2 * HOUR)],
    );
    let counts = Arc::new(Int64Array::from(vec![0, 1, 2, 3])) as ArrayRef;
    let nothing = floats(&[None; 4]);
    let load = answer(vec![counts.clone(), counts, nothing.clone(), nothing], &[Present; 4], &[None; 4]);
    let texts = |values: [Option<&str>; 4]| Arc::new(StringArray::from(values.to_vec())) as ArrayRef;
    let requests = vec![
        texts([Some("x"); 4]),
        texts([Some("x"); 4]),
        floats(&[Some(10.0), None, Some(10.0), Some(10.0)]),
        texts([Some("b"), Some("z"), None, Some("a")]),
    ];
    let assembled = service.assemble(&[mine, load], &requests, &[t; 4]).unwrap();
    let column = |name: &str| {
        let index = service.output(name).unwrap();
        let value_type = &service.outputs[index].feature_type;
        let values: Vec<Value> =
            (0..4).map(|row| Value::from_array(&assembled.columns[index], row, value_type)).collect();
        (values, assembled.statuses[index].to_vec())
    };
    let float = Value::Float64;
    // The default fills every null; what is true of the row stays said.
    assert_eq!(
        column("mine:amount"),
        (vec![float(2.0), float(1.5), float(1.5), float(1.5)], vec![Present, NullValue, NotFound, OutsideMaxAge])
    );
    assert_eq!(column("load:n_1h").1, [Present; 4], "a count of 0 is PRESENT");
    // Transforms read inputs after defaults; the worst input decides.
    assert_eq!(
        column("t:gap"),
        (vec![float(8.0), Value::Null, float(8.5), float(8.5)], vec![Present, NullValue, NotFound, OutsideMaxAge])
    );
    let (ages, statuses) = column("t:age");
    assert_eq!(ages, [float(90.0), Value::Null, Value::Null, float(7200.0)]);
    assert_eq!(statuses, [Present, NullValue, NotFound, OutsideMaxAge]);
    assert_eq!(column("t:kind_id").0, [2, 0, 0, 1].map(Value::Int64));
    assert_eq!(column("ask:price").1, [Present, NullValue, Present, Present]);

    let encoded = plan.model("m").unwrap().encode(&assembled, 4);
    assert!(encoded.refused.is_empty());
    let InputValues::Float32(dense) = &encoded.inputs[0].values else { panic!("dense is float32") };
    // mine:amount, mine:double, load:n_1h, t:gap, t:age, ask:price; nulls are the declared 0.0.
    assert_eq!(dense[..6], [2.0, 4.0, 0.0, 8.0, 90.0, 10.0]);
    assert_eq!(dense[6..12], [1.5, 0.0, 1.0, 0.0, 0.0, 0.0]);
    assert_eq!(encoded.inputs[1].values, InputValues::Int64(vec![2, 0, 0, 1]));
}

#[test]
fn a_null_that_missing_refuses_names_the_feature() {
    let text = BASE.replacen(", missing: 0.0", "", 1);
    let plan = plan(&text);
    let service = plan.service("all").unwrap();
    let floats = |values: &[Option<f64>]| Arc::new(Float64Array::from(values.to_vec())) as ArrayRef;
    let one = floats(&[Some(1.0), Some(1.0)]);
    let mine = answer(vec![one.clone(), one.clone()], &[Status::Present; 2], &[Some(0); 2]);
    let counts = Arc::new(Int64Array::from(vec![1, 1])) as ArrayRef;
    let load = answer(vec![counts.clone(), counts, one.clone(), one], &[Status::Present; 2], &[None; 2]);
    let shop = Arc::new(StringArray::from(vec!["x", "x"])) as ArrayRef;
    let requests = vec![shop.clone(), shop.clone(), floats(&[Some(1.0), None]), shop];
    let assembled = service.assemble(&[mine, load], &requests, &[0, 0]).unwrap();
    let refused = plan.model("m").unwrap().encode(&assembled, 2).refused;
    assert_eq!(refused, [(1, "feature `t:gap` is null and `missing` is `refuse`".to_string())]);
}

#[test]
fn rows_are_filtered_evaluated_and_keyed() {
    let plan = plan(BASE);
    let batch = RecordBatch::try_from_iter_with_nullable([
        ("shop", Arc::new(StringArray::from(vec![Some("a"), None, Some("b"), Some("c")])) as ArrayRef, true),
        ("amount", Arc::new(Float64Array::from(vec![Some(-0.0), Some(1.0), None, Some(f64::NAN)])), true),
        ("items", Arc::new(Int64Array::from(vec![Some(1), Some(2), Some(3), None])), true),
        (
            "sold_at",
            Arc::new(TimestampMicrosecondArray::from(vec![Some(5), Some(6), Some(7), None]).with_timezone("UTC")),
            true,
        ),
    ])
    .unwrap();
    let source = plan.source("sales").unwrap();
    let aligned = source.align(&batch, None).unwrap();
    let times = source.times(&aligned, None).unwrap();
    assert_eq!(times.iter().filter(|times| times.is_some()).count(), 3, "a row without a time is no row");
    let last = plan.view("last").unwrap();
    let rows = last.rows(&aligned, &times).unwrap();
    assert_eq!(rows.source_rows, [0, 2], "a null key and a null time match nothing");
    assert_eq!(rows.keys.get(0), Some(&b"a\0\0"[..]));
    let types = last.row_types();
    assert_eq!(rows.values(0, &types), [Value::Float64(0.0), Value::Float64(0.0)]);
    let Value::Float64(zero) = rows.values(0, &types)[0] else { panic!("amount is a float") };
    assert_eq!(zero.to_bits(), 0, "-0.0 is 0.0 at the source");
    let load = plan.view("load").unwrap();
    let rows = load.rows(&aligned, &times).unwrap();
    let types = load.row_types();
    assert_eq!(rows.values(0, &types), [Value::Bool(true), Value::Null], "`where` leaves the row out of one aggregate");
    assert_eq!(rows.values(1, &types), [Value::Bool(true), Value::Null], "a null is skipped");

    // The parts of an aggregate are told from the row, whatever its value.
    let text = "{name: total, function: last, of: amount, where: \"items > 1\", by: {of: shop, values: [b, x]}}";
    let split =
        compiled(&BASE.replacen("{name: total, function: sum, of: amount, where: \"items > 1\"}", text, 1)).unwrap();
    let load = split.view("load").unwrap();
    assert_eq!(load.source_columns(), ["shop", "amount", "items", "sold_at"]);
    let full = RecordBatch::try_from_iter_with_nullable([
        ("shop", Arc::new(StringArray::from(vec!["a", "b", "b", "x"])) as ArrayRef, true),
        ("amount", Arc::new(Float64Array::from(vec![Some(1.0), Some(2.0), None, Some(4.0)])), true),
        ("items", Arc::new(Int64Array::from(vec![2, 2, 2, 1])), true),
        ("sold_at", Arc::new(TimestampMicrosecondArray::from(vec![5; 4]).with_timezone("UTC")), true),
    ])
    .unwrap();
    let aligned_full = source.align(&full, None).unwrap();
    let rows = load.rows(&aligned_full, &source.times(&aligned_full, None).unwrap()).unwrap();
    let part = |bucket: i32, x: f64| Value::Struct(vec![Value::Int32(bucket), Value::Float64(x)]);
    let inputs: Vec<Value> = (0..4).map(|row| rows.values(row, &load.row_types())[1].clone()).collect();
    assert_eq!(inputs, [part(2, 1.0), part(0, 2.0), Value::Null, Value::Null]);

    let missing = RecordBatch::try_from_iter([("shop", batch.column(0).clone())]).unwrap();
    let error = source.align(&missing, None).unwrap_err().to_string();
    assert_eq!(error, "source `sales` has no column `amount`; it has: shop");
}
