use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, new_null_array};
use arrow::datatypes::{DataType, Float64Type};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{EncodedInput, InputValues, Plan, SourceSchemas, compile_definitions};
use feature_defs::value::Type;
use object_store::memory::InMemory;
use object_store::{ObjectStoreExt, PutPayload};

use super::*;

const DAY: Micros = 86_400_000_000;

const DEFINITIONS: &str = r#"
entities:
  - {name: user, keys: [{name: user, type: string, sensitive: true}]}
sources:
  - {name: ages, files: ages/*.parquet, event_time: at}
feature_views:
  - {name: user_now, entity: user, source: ages, features: [{name: age, type: float64, sensitive: true}, {name: size, type: float64}]}
requests:
  - {name: call, fields: [{name: city, type: string, sensitive: true}, {name: distance, type: float64}]}
feature_services:
  - {name: inputs, features: ["user_now:*", "call:city", "call:distance"]}
"#;

fn plan() -> Plan {
    let files = Files::new(vec![SourceFile { path: "definitions.yaml".into(), text: DEFINITIONS.into() }]);
    let columns = [("user", Type::String), ("at", Type::Timestamp), ("age", Type::Float64), ("size", Type::Float64)];
    let columns = columns.into_iter().map(|(name, column_type)| (name.to_string(), column_type)).collect();
    compile_definitions("p", &files, &SourceSchemas::from([("ages".to_string(), columns)])).unwrap()
}

fn header(rows: u64) -> Header {
    Header {
        format: FORMAT,
        project: "p".into(),
        gateway: "127.0.0.1:1".into(),
        incarnation: "abc".into(),
        service: "inputs".into(),
        semantic_digest: "d".into(),
        model: None,
        hashed: Vec::new(),
        first_at: 0,
        last_at: 9,
        first_time: 0,
        last_time: 9,
        rows,
    }
}

/// Rows with nothing in them but one feature.
fn rows(schema: &LogSchema, values: &[f64]) -> RecordBatch {
    let filled = |data_type: &DataType| -> ArrayRef {
        match data_type {
            DataType::Utf8 => Arc::new(arrow::array::StringArray::from(vec![""; values.len()])),
            other => {
                let nulls = new_null_array(other, values.len()).to_data().into_builder().nulls(None);
                arrow::array::make_array(nulls.build().unwrap())
            }
        }
    };
    let columns = schema.schema.fields().iter().map(|field| match field.name().as_str() {
        "feature:user_now:size" => Arc::new(Float64Array::from(values.to_vec())) as ArrayRef,
        _ if field.is_nullable() => new_null_array(field.data_type(), values.len()),
        _ => filled(field.data_type()),
    });
    RecordBatch::try_new(schema.schema.clone(), columns.collect()).unwrap()
}

#[test]
fn sensitive_columns_are_text_and_everything_else_keeps_its_type() {
    let plan = plan();
    let schema = LogSchema::of(plan.service("inputs").unwrap(), &[("p".into(), Type::Float32)]);
    let mut hashed = schema.hashed.clone();
    hashed.sort();
    assert_eq!(hashed, ["feature:call:city", "feature:user_now:age", "in:city", "in:user"]);
    let field = |name: &str| schema.schema.field_with_name(name).unwrap().data_type().clone();
    assert_eq!(field("feature:user_now:age"), DataType::Utf8);
    assert_eq!(field("feature:user_now:size"), DataType::Float64);
    assert_eq!(field("in:distance"), DataType::Float64);
    assert_eq!(field("output:p"), DataType::Float32);
}

#[test]
fn a_file_comes_back_as_it_was_written_bit_by_bit() {
    let plan = plan();
    let schema = LogSchema::of(plan.service("inputs").unwrap(), &[]);
    let values = [0.1 + 0.2, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE / 2.0];
    let mut bytes = Vec::new();
    let header = header(6);
    encode(&header, &schema.schema, &[rows(&schema, &values[..1]), rows(&schema, &values)], &mut bytes).unwrap();
    let found = decode("x", bytes.into()).unwrap();
    assert_eq!(found.header, header);
    let column = found.batch.column_by_name("feature:user_now:size").unwrap().as_primitive::<Float64Type>().values();
    let bits: Vec<u64> = column.iter().map(|x| x.to_bits()).collect();
    let expected: Vec<u64> = values[..1].iter().chain(&values).map(|x| x.to_bits()).collect();
    assert_eq!(bits, expected);
}

#[test]
fn what_is_no_log_says_so() {
    let text = decode("a/b", Bytes::from_static(b"nothing")).unwrap_err().to_string();
    assert!(text.contains("a/b is no file of a serving log"), "{text}");
    let plan = plan();
    let schema = LogSchema::of(plan.service("inputs").unwrap(), &[]);
    let mut bytes = Vec::new();
    let newer = Header { format: 9, ..header(1) };
    encode(&newer, &schema.schema, &[rows(&schema, &[1.0])], &mut bytes).unwrap();
    let text = decode("a/b", bytes.into()).unwrap_err().to_string();
    assert!(text.contains("format 9"), "{text}");
}

#[test]
fn names_of_files_sort_by_time_and_come_back() {
    let name = |first_at, last_at| FileName { first_at, last_at, incarnation: "abc".into(), number: 7 };
    let times = [Micros::MIN, -DAY, -1, 0, 1, DAY, Micros::MAX];
    let names: Vec<String> = times.iter().map(|time| name(*time, *time).to_string()).collect();
    assert!(names.is_sorted());
    for (text, time) in names.iter().zip(times) {
        assert_eq!(FileName::parse(text), Some(name(time, time)));
    }
    for text in ["losses-abc.json", "x.parquet", "0-0-a-1-2.parquet", ""] {
        assert_eq!(FileName::parse(text), None, "{text}");
    }
}

#[tokio::test]
async fn files_are_found_by_the_times_of_their_rows_and_go_by_the_day_they_were_logged() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let project = Path::from("root/p");
    let put = async |day: i64, first_at: Micros, last_at: Micros| {
        let name = FileName { first_at, last_at, incarnation: "abc".into(), number: 1 };
        let path = Place::of("inputs", day * DAY).folder(&project).join(name.to_string());
        store.put(&path, PutPayload::from_static(b"x")).await.unwrap();
    };
    put(100, 5, 10).await;
    put(100, 20, 30).await;
    // A replay: logged later, for earlier times.
    put(101, 0, 4).await;
    let found = async |from, to| {
        let files = files(&store, &project, "inputs", from, to).await.unwrap();
        files.into_iter().map(|file| file.name.first_at).collect::<Vec<_>>()
    };
    assert_eq!(found(0, 100).await, [0, 5, 20]);
    assert_eq!(found(10, 20).await, [5]);
    assert_eq!(found(31, 100).await, [0; 0]);
    assert_eq!(services(&store, &project).await.unwrap(), ["inputs"]);
    assert_eq!(remove_before(&store, &project, day(101 * DAY)).await.unwrap(), 2);
    assert_eq!(found(0, 100).await, [0]);
}

#[tokio::test]
async fn losses_are_read_beside_the_files() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let project = Path::from("root/p");
    let minute = Minute { offered: 10, chosen: 5, written: 3, dropped_buffer: 2, ..Minute::default() };
    let losses_of = Losses {
        format: FORMAT,
        gateway: "g".into(),
        incarnation: "abc".into(),
        service: "inputs".into(),
        day: day(DAY),
        flush_seconds: 30.0,
        flushed: DAY,
        ended: false,
        minutes: [(1440, minute), (1441, minute)].into(),
    };
    let bytes = serde_json::to_vec(&losses_of).unwrap();
    store.put(&losses_of.path(&project), bytes.into()).await.unwrap();
    let found = losses(&store, &project, "inputs", day(DAY), day(DAY)).await.unwrap();
    assert_eq!(found, [losses_of]);
    assert_eq!(found[0].total().lost(), 4);
    assert!(losses(&store, &project, "inputs", day(0), day(0)).await.unwrap().is_empty());
}

#[test]
fn a_sample_takes_its_share_and_others_every_day() {
    let keys: Vec<[u8; 8]> = (0..100_000u64).map(u64::to_le_bytes).collect();
    let taken = |project: &str, time, share| {
        let sampler = Sampler::new(project, day(time), share);
        keys.iter().map(|key| sampler.takes(key)).collect::<Vec<bool>>()
    };
    let count = |taken: &[bool]| taken.iter().filter(|taken| **taken).count();
    let today = taken("p", 0, 0.1);
    // Five standard deviations of a binomial.
    assert!(count(&today).abs_diff(10_000) < 475, "{}", count(&today));
    assert_eq!(today, taken("p", DAY - 1, 0.1));
    let tomorrow = taken("p", DAY, 0.1);
    let both = today.iter().zip(&tomorrow).filter(|(a, b)| **a && **b).count();
    assert!(both.abs_diff(1_000) < 160, "{both}");
    // A larger share takes what a smaller one takes, and more.
    assert!(taken("p", 0, 0.05).iter().zip(&today).all(|(small, large)| !small || *large));
    assert_eq!(count(&taken("p", 0, 1.0)), keys.len());
    assert_eq!(count(&taken("p", 0, 0.0)), 0);
    assert_ne!(today, taken("q", 0, 0.1));
}

#[test]
fn tensor_digests_tell_rows_and_shapes_apart() {
    let input =
        |width, values: &[f32]| EncodedInput { name: "x".into(), width, values: InputValues::Float32(values.to_vec()) };
    let inputs = [input(2, &[1.0, 2.0, 1.0, 2.0, 1.0, 3.0])];
    assert_eq!(tensor_digest(&inputs, 0), tensor_digest(&inputs, 1));
    assert_ne!(tensor_digest(&inputs, 0), tensor_digest(&inputs, 2));
    // The same bytes as two inputs of one column each are something else.
    assert_ne!(tensor_digest(&inputs, 0), tensor_digest(&[input(1, &[1.0]), input(1, &[2.0])], 0));
    let ints = [EncodedInput { name: "x".into(), width: 1, values: InputValues::Int64(vec![1, 2]) }];
    assert_ne!(tensor_digest(&ints, 0), tensor_digest(&ints, 1));
}

#[test]
fn hashes_of_sensitive_values_hang_on_the_key_and_the_column() {
    let of = |key: &[u8], column: &str| hashed(key, column, b"alice");
    assert_eq!(of(b"k", "in:user"), of(b"k", "in:user"));
    assert_ne!(of(b"k", "in:user"), of(b"k2", "in:user"));
    assert_ne!(of(b"k", "in:user"), of(b"k", "in:city"));
    assert!(!of(b"k", "in:user").contains("alice"));
}
