//! Every function, whole and by parts, with tails on a grid and exact ones.

use feature_defs::plan::ViewPlanKind;

use super::*;

/// Twice: `grid` has the default hops, `exact` none.
const AGGREGATES: &str = r#"
    entity: everything
    source: events
    windows: [1h, 24h]
    aggregates:
      - {name: rows, function: count}
      - {name: counted, function: count, of: x, where: "n > 1"}
      - {name: total, function: sum, of: x}
      - {name: spread, function: variance, of: x}
      - {name: deviation, function: stddev, of: n}
      - {name: opening, function: first, of: x}
      - {name: closing, function: last, of: b}
      - {name: recent, function: last_n, of: n, n: 3}
      - {name: keys, function: distinct_count, of: b}
      - {name: amounts, function: distinct_count, of: x}
      - {name: p90, function: percentile, of: x, q: 0.9, clamp: [-100, 100]}
      - {name: largest, function: top_k, of: x, k: 4, where: "n <> 2"}
      - {name: shape, function: histogram, of: x, edges: [-10, 0, 10]}
      - {name: kinds, function: histogram, of: b, values: ["12", "1"]}
      - {name: rows_by, function: count, by: {of: b, values: ["12", "1"]}}
      - {name: rows_by_n, function: count, by: {of: n, edges: [2, 4]}}
      - {name: total_by, function: sum, of: n, by: {of: b, values: ["12", "1"]}}
      - {name: low_by, function: min, of: x, where: "n > 1", by: {of: n, values: [2, 3]}}
      - {name: recent_by, function: last_n, of: x, n: 2, by: {of: b, values: ["12", "1"]}}
      - {name: p50_by, function: percentile, of: x, q: 0.5, clamp: [-100, 100], by: {of: n, edges: [3]}}
"#;

async fn compiled(engine: &Engine) -> Plan {
    let (before, after) = DEFINITIONS.split_once("feature_views:\n").unwrap();
    let views = format!("feature_views:\n  - name: grid{AGGREGATES}  - name: exact\n    hop: none{AGGREGATES}");
    let services = "feature_services:\n  - {name: functions, features: [{view: grid}, {view: exact}]}\n";
    assert!(after.contains("feature_services"));
    let schema = engine.sources().schema("events/*.parquet").await.unwrap();
    let schemas = SourceSchemas::from([("events".into(), schema.clone()), ("delayed".into(), schema)]);
    let files = Files::new(vec![SourceFile { path: "all.yaml".into(), text: format!("{before}{views}{services}") }]);
    compile_definitions("test", &files, &schemas)
        .unwrap_or_else(|wrong| panic!("{}", feature_defs::diagnose::render(&wrong, &files, false)))
}

#[tokio::test]
async fn every_function_agrees_with_the_reference() {
    for seed in 0..2 {
        let mut random = SmallRng::seed_from_u64(seed);
        let records = records(&mut random, 250);
        let folder = tempfile::tempdir().unwrap();
        write_files(folder.path(), &[&records[..100], &records[100..]]);
        let engine = engine(folder.path(), 1 << 30);
        let plan = compiled(&engine).await;
        let rows = spine(&mut random, &records, 60);
        let output = run(&engine, &plan, "functions", vec![spine_batch(&rows)]).await.unwrap();
        let mut present = 0;
        for name in ["grid", "exact"] {
            let view = plan.view(name).unwrap();
            assert_eq!(view.is_offline_only(), name == "exact");
            let ViewPlanKind::Windowed { aggregates, outputs, .. } = &view.kind else { panic!("windows") };
            let aligned = view.source.align(&batch(&records), None).unwrap();
            let evaluated = view.rows(&aligned, &view.source.times(&aligned, None).unwrap()).unwrap();
            let types = view.row_types();
            let events: Vec<WindowEvent> = (0..evaluated.len())
                .map(|row| WindowEvent { times: evaluated.times[row], inputs: evaluated.values(row, &types) })
                .collect();
            for feature in outputs {
                let aggregate = &aggregates[feature.aggregate].aggregate;
                let address = format!("{name}:{}", feature.name);
                let column = output.column_by_name(&address).unwrap();
                let statuses = output.column_by_name(&format!("{address}__status")).unwrap();
                for (i, row) in rows.iter().enumerate() {
                    let found = Value::from_array(column, i, &feature.feature_type);
                    let expected =
                        window_value(&events, feature.aggregate, aggregate, &feature.window, row.t, Visibility::Known);
                    assert_eq!(found, expected, "seed {seed} row {i} {address}");
                    let status = if expected.is_null() { Status::NullValue } else { Status::Present };
                    assert_eq!(statuses.as_primitive::<UInt8Type>().value(i), status as u8, "{address}");
                    present += usize::from(!expected.is_null());
                }
            }
        }
        assert!(present > 2_000, "{present} values");
    }
}
