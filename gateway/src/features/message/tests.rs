use std::time::Duration;

use arrow::array::ArrayRef;
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Assembled, SourceSchemas, ViewAnswer, compile_definitions};
use feature_defs::time::{Micros, Position};
use feature_defs::value::Value;
use proptest::prelude::*;

use super::*;
use crate::fetch::{Fetched, FetchedInput, Reason};

/// One feature of every type.
const TYPES: [&str; 14] = [
    "bool",
    "int32",
    "int64",
    "float32",
    "float64",
    "string",
    "binary",
    "timestamp",
    "date",
    "decimal(20,3)",
    "list<int64>",
    "map<string,float64>",
    "struct<a:int32,b:string>",
    "vector(2)",
];

fn service() -> Arc<ServicePlan> {
    let column = |(index, name): (usize, &&str)| format!("{{name: f{index}, type: \"{name}\"}}");
    let columns = TYPES.iter().enumerate().map(column).collect::<Vec<_>>().join(", ");
    let text = format!(
        "entities:\n  - {{name: shop, keys: [{{name: shop, type: string}}]}}\nsources:\n  - name: sales\n    stream: true\n    \
         schema: [{{name: shop, type: string}}, {columns}]\n    event_time: sold_at\nfeature_views:\n  - name: last_sale\n    \
         entity: shop\n    source: sales\n    features: [{columns}]\nfeature_services:\n  - {{name: selling, features: [last_sale]}}\n"
    );
    let file = SourceFile { path: "shop.yaml".into(), text };
    let plan = compile_definitions("shops", &Files::new(vec![file]), &SourceSchemas::new()).unwrap();
    plan.service("selling").unwrap().clone()
}

fn cell(value_type: &Type) -> BoxedStrategy<Value> {
    let int32 = prop_oneof![Just(0), Just(-1), Just(i32::MIN), Just(i32::MAX), any::<i32>()];
    let int64 = prop_oneof![Just(0), Just(-1), Just(i64::MIN), Just(i64::MAX), -200i64..200, any::<i64>()].boxed();
    let value = match value_type {
        Type::Bool => any::<bool>().prop_map(Value::Bool).boxed(),
        Type::Int32 => int32.prop_map(Value::Int32).boxed(),
        Type::Int64 => int64.prop_map(Value::Int64).boxed(),
        Type::Float32 => any::<f32>().prop_map(Value::Float32).boxed(),
        Type::Float64 => prop_oneof![Just(f64::NAN), any::<f64>()].prop_map(Value::Float64).boxed(),
        Type::String => "[a\0\u{e9}]{0,4}|[a-z]{150}".prop_map(|text| Value::String(text.into())).boxed(),
        Type::Binary => {
            prop::collection::vec(any::<u8>(), 0..200).prop_map(|bytes| Value::Binary(bytes.into())).boxed()
        }
        Type::Timestamp => int64.prop_map(Value::Timestamp).boxed(),
        Type::Date => int32.prop_map(Value::Date).boxed(),
        Type::Decimal { .. } => (-1_000_000i128..1_000_000).prop_map(Value::Decimal).boxed(),
        Type::List(item) => prop::collection::vec(cell(item), 0..3).prop_map(Value::List).boxed(),
        Type::Map(item) => prop::option::of(cell(item))
            .prop_map(|item| Value::Map(item.map(|item| ("k".into(), item)).into_iter().collect()))
            .boxed(),
        Type::Struct(fields) => {
            fields.iter().map(|(_, field)| cell(field)).collect::<Vec<_>>().prop_map(Value::Struct).boxed()
        }
        Type::Vector(_) => any::<[f32; 2]>().prop_map(|items| Value::Vector(items.to_vec().into())).boxed(),
    };
    prop_oneof![1 => Just(Value::Null), 3 => value].boxed()
}

fn status() -> impl Strategy<Value = Status> {
    (1u8..=5).prop_map(|number| Status::from_number(number).unwrap())
}

/// Values of every type, statuses that all columns share, and times.
type Row = (Vec<Value>, Status, Option<Reason>, Micros, u64);

fn row() -> impl Strategy<Value = Row> {
    let cells: Vec<_> = TYPES.iter().map(|name| cell(&Type::parse(name).unwrap())).collect();
    let reasons =
        [Reason::Timeout, Reason::Backfilling, Reason::AtBeforeStore, Reason::StoreError, Reason::OfflineOnly];
    (cells, status(), prop::option::of(prop::sample::select(reasons.to_vec())), any::<i64>(), any::<u64>())
}

fn answer(service: &Arc<ServicePlan>, rows: &[Row], stale: bool, include_provenance: bool) -> FeaturesAnswer {
    let column = |index: usize| -> ArrayRef {
        Value::to_array(rows.iter().map(|row| &row.0[index]), &service.outputs[index].feature_type)
    };
    let columns: Vec<ArrayRef> = (0..TYPES.len()).map(column).collect();
    let statuses: Vec<Status> = rows.iter().map(|row| row.1).collect();
    let input = FetchedInput {
        answer: ViewAnswer {
            values: columns.clone(),
            statuses: statuses.clone(),
            event_times: rows.iter().map(|row| (row.3 % 2 == 0).then_some(row.3)).collect(),
        },
        reasons: rows.iter().map(|row| row.2).collect(),
        positions: rows
            .iter()
            .map(|row| (row.4 % 2 == 0).then_some(Position { time: row.3, sequence: row.4 }))
            .collect(),
        age_max: None,
        stale_rows: 0,
    };
    let at = rows.iter().map(|row| row.3).collect();
    let features = Features {
        fetched: Fetched { inputs: vec![input], at, stale, store_error: None },
        assembled: Assembled {
            statuses: vec![statuses.into(); columns.len()],
            defaults: vec![0; columns.len()],
            columns,
        },
        fetch_time: Duration::ZERO,
        transform_time: Duration::ZERO,
    };
    FeaturesAnswer { service: service.clone(), features: Arc::new(features), include_provenance }
}

proptest! {
    #[test]
    fn bytes_are_those_of_the_message(
        rows in prop::collection::vec(row(), 0..6), stale in any::<bool>(), include_provenance in any::<bool>()
    ) {
        let service = service();
        let answer = answer(&service, &rows, stale, include_provenance);
        let bytes = answer.to_bytes();
        let message = answer.to_message();
        prop_assert_eq!(message.features.len(), TYPES.len());
        prop_assert_eq!(message.views.len(), usize::from(include_provenance));
        prop_assert_eq!(bytes, message.encode_to_vec());
    }

    #[test]
    fn a_slice_of_a_column_is_written_like_the_column(rows in prop::collection::vec(row(), 2..6)) {
        let service = service();
        let mut sliced = answer(&service, &rows, false, false);
        let features = Arc::get_mut(&mut sliced.features).unwrap();
        for column in &mut features.assembled.columns {
            *column = column.slice(1, rows.len() - 1);
        }
        for statuses in &mut features.assembled.statuses {
            *statuses = statuses[1..].into();
        }
        features.fetched.at.remove(0);
        features.fetched.inputs[0].reasons.remove(0);
        let whole = answer(&service, &rows[1..], false, false);
        prop_assert_eq!(sliced.to_bytes(), whole.to_bytes());
    }
}
