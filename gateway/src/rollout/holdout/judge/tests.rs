use drift::sequential::policy::Policy;
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{SourceSchemas, compile_definitions};

use super::*;

const DEFINITIONS: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
requests:
  - {name: visit, fields: [{name: people, type: float64}]}
feature_services:
  - {name: selling, features: ["visit:people"]}
models:
  - name: sells
    features: selling
    runtime: torchscript
    inputs: [{name: dense, dtype: float32, features: ["*"], missing: 0.0}]
    outputs: [{name: p, dtype: float32}]
    decision: "p > 0.5"
    label: {name: sold, type: bool, within: 1h}
"#;

fn asked(success: &str) -> HoldoutAsked {
    let canary = format!(
        r#"{{"canary": {{"unit": "shop", "steps": [5000], "bake_us": 0, "min_units": 1, "ends_after_us": 1, "success": [{success}]}}}}"#
    );
    let policy: Policy = serde_json::from_str(&canary).unwrap();
    let (model, dataset) = ("sells".to_owned(), "spring".to_owned());
    HoldoutAsked { model, champion: Some(1), challenger: 2, dataset, policy, unit: vec!["shop".into()] }
}

fn evaluate(asked: &HoldoutAsked, champion: Option<u32>, rows: Vec<Row>) -> Evaluation {
    let files = Files::new(vec![SourceFile { path: "shop.yaml".into(), text: DEFINITIONS.into() }]);
    let plan = compile_definitions("shops", &files, &SourceSchemas::new()).unwrap();
    evaluated(asked, "spring 1", plan.model("sells").unwrap(), champion, rows, Vec::new())
}

fn row(unit: u64, label: bool, challenger: f64, champion: f64) -> Row {
    let scored = |score: f64| (Some(score), Some(score > 0.5));
    Row {
        unit,
        label: Some(f64::from(u8::from(label))),
        challenger: scored(challenger),
        champion: Some(scored(champion)),
    }
}

#[test]
fn both_versions_are_told_with_what_differs() {
    let rows = vec![
        row(1, true, 0.75, 0.5),
        row(1, false, 0.5, 0.25),
        row(2, true, 1.0, 0.25),
        Row { label: None, ..row(3, true, 0.5, 0.5) },
        Row { challenger: (None, None), ..row(4, false, 0.0, 0.0) },
    ];
    let found = evaluate(&asked(r#"{"metric": "brier"}"#), Some(1), rows);
    assert_eq!((found.rows, found.labelled, found.challenger.scored), (5, 4, 4));
    // Both decided four rows, two of them otherwise.
    assert_eq!(found.flips, Some(Flips { rows: 4, flipped: 2, rate: 0.5 }));
    let classes = found.challenger.classes.as_ref().unwrap();
    assert_eq!(classes.auc, Some(1.0));
    assert_eq!(classes.brier, Some((0.0625 + 0.25 + 0.0) / 3.0));
    // Over units: (0.0625 + 0.25)/2, 0, and 1 for what got no score; (0.25 + 0.0625)/2, 0.5625, 0.
    assert_eq!(found.challenger.success["brier"], (0.15625 + 0.0 + 1.0) / 3.0);
    assert_eq!(found.champion.as_ref().unwrap().success["brier"], (0.15625 + 0.5625 + 0.0) / 3.0);
    let difference = found.difference.as_ref().unwrap();
    assert_eq!(difference.units, 3);
    assert!((difference.estimate - (1.0 - 0.5625) / 3.0).abs() < 1e-6, "{difference:?}");
    assert!(difference.interval.0 < 0.0 && difference.interval.1 > difference.estimate);
    assert!(!found.worse, "three units show nothing");
    assert!(found.text.iter().any(|line| line == "2 of 4 decisions differ (50.00 %)"), "{:?}", found.text);
    let text = serde_json::to_string(&found).unwrap();
    assert_eq!(serde_json::from_str::<Evaluation>(&text).unwrap(), found);
}

#[test]
fn worse_is_what_is_shown_to_be_and_a_margin_forgives() {
    let rows =
        |units: u64, challenger: f64| (0..units).map(|unit| row(unit, true, challenger, 0.9)).collect::<Vec<_>>();
    let brier = asked(r#"{"metric": "brier"}"#);
    // 0.36 against 0.01, a hundred times.
    let worse = evaluate(&brier, Some(1), rows(100, 0.4));
    assert!(worse.worse, "{:?}", worse.difference);
    assert!(worse.text.iter().any(|line| line.ends_with("100 units: it is worse")), "{:?}", worse.text);
    assert!(!evaluate(&brier, Some(1), rows(5, 0.4)).worse);
    let better = evaluate(&brier, Some(1), rows(100, 1.0));
    assert!(!better.worse && better.difference.as_ref().unwrap().ln_better > 0.0);
    // More rows of few units are no more evidence.
    let few = (0..1_000).map(|number| row(number % 3, true, 0.4, 0.9)).collect();
    assert!(!evaluate(&brier, Some(1), few).worse);
    let margin = asked(r#"{"metric": "brier", "needs": {"not_worse_by": 0.5}}"#);
    assert!(!evaluate(&margin, Some(1), rows(100, 0.4)).worse);
}

#[test]
fn alone_a_version_is_not_compared() {
    let rows = (0..10).map(|unit| Row { champion: None, ..row(unit, unit % 2 == 0, 0.25, 0.0) }).collect();
    let found = evaluate(&asked(r#"{"metric": "error"}, {"metric": "paid"}"#), None, rows);
    assert_eq!((found.champion.is_none(), found.difference.is_none(), found.worse), (true, true, false));
    assert_eq!(found.challenger.success, BTreeMap::from([("error".to_owned(), 0.5)]));
    assert_eq!(found.notes, ["`paid` is a value of the business: no dataset tells it"]);
}
