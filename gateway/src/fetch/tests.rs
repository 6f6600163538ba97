//! What is fetched against the reference of `feature-defs`, on online state made by hand.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, StringArray};
use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::as_of::{MaxAge, Row, Times, Visibility as Seen, as_of};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Plan, ServicePlan, SourceSchemas, ViewPlanKind, compile_definitions};
use feature_defs::time::Status;
use feature_defs::value::{Type, Value, encode};
use feature_defs::window::{DAY, HOUR, MINUTE, Window, WindowEvent, window_value};
use online_store::key::Generation;
use online_store::memory::MemoryStore;
use online_store::tile::{Layout, Tiles};
use online_store::{Answer, NodeReport, Read, Write, WriteOutcome, row};

use super::*;

const DEFINITIONS: &str = "
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - name: sales
    stream: true
    schema: [{name: shop, type: string}, {name: amount, type: float64, nullable: true}]
    event_time: sold_at
    delay: 1m
feature_views:
  - name: last_sale
    entity: shop
    source: sales
    ttl: 3h
    freshness: 2h
    features: [{name: amount, type: float64, default: -1.0}]
  - name: takings
    entity: shop
    source: sales
    windows: [1h, 24h]
    aggregates:
      - {name: sales, function: count}
      - {name: amount_sum, function: sum, of: amount}
  - name: exact
    entity: shop
    source: sales
    windows: [1h]
    hop: none
    aggregates: [{name: sales, function: count}]
feature_services:
  - {name: selling, features: [last_sale, takings]}
  - {name: offline, features: [exact, last_sale]}
";

const T0: Micros = 20_000 * DAY;
const PROJECT: &str = "shops";

fn plan() -> Plan {
    let file = SourceFile { path: "shop.yaml".into(), text: DEFINITIONS.into() };
    compile_definitions(PROJECT, &Files::new(vec![file]), &SourceSchemas::new()).unwrap()
}

/// (shop, minutes after T0, known minutes after T0, amount, deleted)
type Sale = (&'static str, i64, i64, Option<f64>, bool);

const SALES: [Sale; 8] = [
    ("a", 0, 1, Some(1.0), false),
    ("a", 30, 31, Some(0.1), false),
    ("a", 31, 32, None, false),
    ("a", 85, 86, Some(0.2), false),
    ("a", 88, 93, Some(4.0), false),
    ("b", 10, 11, Some(7.0), false),
    ("b", 20, 21, None, true),
    ("c", -1500, -1499, Some(9.0), false),
];

fn entity(shop: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&Value::String(shop.into()), &mut bytes);
    bytes
}

fn rows_of(shop: &str) -> Vec<Row> {
    let sales = SALES.iter().enumerate().filter(|(_, sale)| sale.0 == shop);
    sales
        .map(|(sequence, (_, event, known, amount, deleted))| Row {
            times: Times {
                event_time: T0 + event * MINUTE,
                created_time: None,
                known_time: T0 + known * MINUTE,
                position: Position { time: T0 + known * MINUTE, sequence: sequence as u64 + 1 },
            },
            deleted: *deleted,
            values: vec![amount.map_or(Value::Null, Value::Float64)],
        })
        .collect()
}

fn events_of(shop: &str) -> Vec<WindowEvent> {
    let rows = rows_of(shop).into_iter().filter(|row| !row.deleted);
    rows.map(|row| WindowEvent { times: row.times, inputs: vec![Value::Bool(true), row.values[0].clone()] }).collect()
}

fn generation(plan: &Plan, view: &str) -> Generation {
    Generation::new(PROJECT, view, plan.view(view).unwrap().storage_digest.as_str())
}

fn layout(plan: &Plan) -> (Layout, Vec<(usize, Window)>) {
    let ViewPlanKind::Windowed { aggregates, outputs, windows, levels } = &plan.view("takings").unwrap().kind else {
        panic!("takings are windowed")
    };
    let layout = Layout {
        aggregates: aggregates.iter().map(|aggregate| aggregate.aggregate.clone()).collect(),
        windows: windows.clone(),
        levels: levels.clone().unwrap(),
    };
    (layout, outputs.iter().map(|output| (output.aggregate, output.window)).collect())
}

async fn store(plan: &Plan) -> MemoryStore {
    let store = MemoryStore::new();
    let (layout, _) = layout(plan);
    let mut writes = Vec::new();
    for view in ["last_sale", "takings"] {
        writes.push(Write::Fact(generation(plan, view).ready_fact(), Some(Bytes::from_static(b"1"))));
    }
    for shop in ["a", "b", "c"] {
        for row in rows_of(shop) {
            writes.push(Write::Row {
                key: generation(plan, "last_sale").key(entity(shop)),
                blob: row::encode(&row),
                expires: None,
            });
        }
        let mut tiles = Tiles::default();
        let events = events_of(shop);
        let last = events.iter().map(|event| event.times.position).max().unwrap();
        let change = layout.apply(&mut tiles, &events, last).unwrap();
        let key = generation(plan, "takings").key(entity(shop));
        writes.push(Write::Tiles {
            key,
            position: change.position,
            set: change.set,
            remove: change.remove,
            epoch: 0,
            expires: None,
        });
    }
    store.write(writes).await.unwrap();
    store
}

fn ask(shops: &[Option<&str>]) -> Rows {
    let columns: Vec<ArrayRef> = vec![Arc::new(StringArray::from(shops.to_vec()))];
    Rows { count: shops.len(), columns, incomplete: Vec::new() }
}

fn reader(service: &Arc<ServicePlan>) -> ServiceReader {
    ServiceReader::new(service.clone(), PROJECT)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

/// Everything said about some shops at t, feature by feature: value and status.
fn said(service: &ServicePlan, rows: &Rows, fetched: &Fetched) -> Vec<Vec<(Value, Status)>> {
    let assembled = service.assemble(&fetched.answers().collect::<Vec<_>>(), &rows.columns, &fetched.at).unwrap();
    let outputs = service.outputs.iter().zip(assembled.columns.iter().zip(&assembled.statuses));
    let column = outputs.map(|(output, (values, statuses))| {
        let value = |row| (Value::from_array(values, row, &output.feature_type), statuses[row]);
        (0..rows.count).map(value).collect()
    });
    column.collect()
}

#[tokio::test]
async fn what_is_fetched_is_what_the_reference_says() {
    let plan = plan();
    let service = plan.service("selling").unwrap();
    let store = store(&plan).await;
    let (layout, outputs) = layout(&plan);
    let shops = ["a", "b", "c", "nobody"];
    let rows = ask(&[Some("a"), Some("b"), Some("c"), Some("nobody"), None, Some("a")]);
    let mut exact = 0;
    for minutes in 94..400 {
        let t = T0 + minutes * MINUTE;
        let fetched = fetch(&reader(service), &rows, When::At(vec![t; 6]), soon(), &store).await.unwrap();
        let now = fetch(&reader(service), &rows, When::Now(t), soon(), &store).await.unwrap();
        let said_at = said(service, &rows, &fetched);
        assert_eq!(said_at, said(service, &rows, &now), "minute {minutes}");
        assert_eq!(now.at, vec![t; 6]);
        for (index, shop) in shops.iter().enumerate() {
            let reference = rows_of(shop);
            let max_age = MaxAge { ttl: Some(3 * HOUR), keep: DAY };
            let answer = as_of(&reference, t, max_age, Seen::Known);
            let default = Value::Float64(-1.0);
            let expected = feature_defs::as_of::feature_value(&answer, 0, Some(&default));
            assert_eq!(said_at[0][index], expected, "{shop} at minute {minutes}");
            let events = events_of(shop);
            for (output, (aggregate, window)) in outputs.iter().enumerate() {
                let expected =
                    window_value(&events, *aggregate, &layout.aggregates[*aggregate], window, t, Seen::Known);
                assert_eq!(said_at[1 + output][index].0, expected, "{shop}, window {output} at minute {minutes}");
                exact += 1;
            }
        }
        // A null key matches nothing, and a repeated one answers alike.
        assert_eq!(said_at[0][4], (Value::Float64(-1.0), Status::NotFound));
        assert_eq!(said_at[1][4], (Value::Int64(0), Status::Present));
        assert!(said_at.iter().all(|column| column[0] == column[5]));
    }
    assert_eq!(exact, 306 * 4 * 4);
}

#[tokio::test]
async fn what_the_store_cannot_know_is_said_to_be_unavailable() {
    let plan = plan();
    let service = plan.service("selling").unwrap();
    let store = store(&plan).await;
    let rows = ask(&[Some("a"), Some("a"), Some("a")]);
    // The newest row of `a` happened at minute 88 and was known at 93.
    let at = [87, 90, 93].map(|minutes| T0 + minutes * MINUTE).to_vec();
    let fetched = fetch(&reader(service), &rows, When::At(at.clone()), soon(), &store).await.unwrap();
    let sale = &fetched.inputs[0];
    assert_eq!(sale.answer.statuses, [Status::Unavailable, Status::Unavailable, Status::Present]);
    assert_eq!(sale.reasons, [Some(Reason::AtBeforeStore), Some(Reason::AtBeforeStore), None]);
    assert_eq!(sale.answer.event_times, [None, None, Some(T0 + 88 * MINUTE)]);
    // The raw head reaches minutes 80 to 90, so the windows are still exact then.
    let windows = &fetched.inputs[1];
    assert_eq!(windows.answer.statuses, [Status::Present; 3]);
    let counts: Vec<Value> =
        (0..3).map(|row| Value::from_array(&windows.answer.values[0], row, &Type::Int64)).collect();
    let (layout, outputs) = layout(&plan);
    let expected: Vec<Value> = at
        .iter()
        .map(|t| window_value(&events_of("a"), 0, &layout.aggregates[0], &outputs[0].1, *t, Seen::Known))
        .collect();
    assert_eq!(counts, expected);
    // An hour earlier it does not.
    let at = vec![T0 + 33 * MINUTE; 3];
    let fetched = fetch(&reader(service), &rows, When::At(at), soon(), &store).await.unwrap();
    assert_eq!(fetched.inputs[1].reasons, [Some(Reason::AtBeforeStore); 3]);
}

#[tokio::test]
async fn a_store_ahead_of_the_clock_is_answered_at_its_newest_position() {
    let plan = plan();
    let service = plan.service("selling").unwrap();
    let store = store(&plan).await;
    let rows = ask(&[Some("a")]);
    let clock = T0 - 30 * DAY;
    let fetched = fetch(&reader(service), &rows, When::Now(clock), soon(), &store).await.unwrap();
    let newest = T0 + 93 * MINUTE;
    assert_eq!(fetched.at, [newest]);
    let at_newest = fetch(&reader(service), &rows, When::At(vec![newest]), soon(), &store).await.unwrap();
    assert_eq!(said(service, &rows, &fetched), said(service, &rows, &at_newest));
    assert_eq!(fetched.inputs[0].positions, [Some(Position { time: newest, sequence: 5 })]);
}

#[tokio::test]
async fn freshness_marks_the_answer_stale() {
    let plan = plan();
    let service = plan.service("selling").unwrap();
    let store = store(&plan).await;
    let stale = async |shop: &'static str, minutes: i64| {
        let rows = ask(&[Some(shop)]);
        let when = When::At(vec![T0 + minutes * MINUTE]);
        fetch(&reader(service), &rows, when, soon(), &store).await.unwrap().stale
    };
    assert!(!stale("a", 88 + 120).await);
    assert!(stale("a", 88 + 121).await);
    assert!(!stale("b", 88 + 121).await, "a tombstone has no age");
    assert!(!stale("nobody", 88 + 121).await);
}

#[tokio::test]
async fn views_that_do_not_answer_say_why() {
    let plan = plan();
    let store = store(&plan).await;
    let rows = ask(&[Some("a"), None]);
    let when = || When::At(vec![T0 + 100 * MINUTE; 2]);
    let offline = plan.service("offline").unwrap();
    let fetched = fetch(&reader(offline), &rows, when(), soon(), &store).await.unwrap();
    assert_eq!(fetched.inputs[0].reasons, [Some(Reason::OfflineOnly); 2]);
    assert_eq!(fetched.inputs[1].answer.statuses, [Status::Present, Status::NotFound]);

    let service = plan.service("selling").unwrap();
    store.write(vec![Write::Fact(generation(&plan, "takings").ready_fact(), None)]).await.unwrap();
    let fetched = fetch(&reader(service), &rows, when(), soon(), &store).await.unwrap();
    assert_eq!(fetched.inputs[0].reasons, [None, None]);
    assert_eq!(fetched.inputs[1].reasons, [Some(Reason::Backfilling), None]);

    let key = generation(&plan, "last_sale").key(entity("a"));
    let mut blob = row::encode(&rows_of("a")[0]).to_vec();
    blob[row::ORDER_AT] = 0xff;
    blob.push(0);
    store.write(vec![Write::Row { key, blob: blob.into(), expires: None }]).await.unwrap();
    let fetched = fetch(&reader(service), &rows, when(), soon(), &store).await.unwrap();
    assert_eq!(fetched.inputs[0].reasons, [Some(Reason::StoreError), None]);
}

/// A store that never answers, or always refuses.
struct Away {
    refuses: bool,
}

#[async_trait]
impl OnlineStore for Away {
    async fn read(&self, _: &[Read]) -> Result<Vec<Answer>, StoreError> {
        if self.refuses {
            return Err(StoreError::Unreachable { place: "nowhere".into(), what: "gone".into() });
        }
        std::future::pending().await
    }
    async fn write(&self, _: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        Ok(WriteOutcome::default())
    }
    async fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }
    async fn remove_generation(&self, _: &Generation) -> Result<u64, StoreError> {
        Ok(0)
    }
    async fn claim(&self, _: &str, candidate: u64) -> Result<u64, StoreError> {
        Ok(candidate)
    }
    async fn collect_expired(&self, _: Micros) -> Result<u64, StoreError> {
        Ok(0)
    }
    async fn report(&self) -> Result<Vec<NodeReport>, StoreError> {
        Ok(Vec::new())
    }
    async fn ping(&self) -> Result<(), StoreError> {
        Ok(())
    }
    fn place(&self) -> String {
        "nowhere".into()
    }
}

#[tokio::test]
async fn a_store_that_is_away_makes_values_unavailable_and_fills_defaults() {
    let plan = plan();
    let service = plan.service("selling").unwrap();
    let rows = ask(&[Some("a")]);
    let check = async |refuses: bool, reason: Reason| {
        let by = Instant::now() + Duration::from_millis(20);
        let fetched = fetch(&reader(service), &rows, When::Now(T0), by, &Away { refuses }).await.unwrap();
        assert_eq!(fetched.at, [T0]);
        assert!(fetched.inputs.iter().all(|input| input.reasons == [Some(reason)]));
        let said = said(service, &rows, &fetched);
        assert_eq!(said[0], [(Value::Float64(-1.0), Status::Unavailable)]);
        assert_eq!(said[1], [(Value::Null, Status::Unavailable)]);
    };
    check(false, Reason::Timeout).await;
    check(true, Reason::StoreError).await;
}

#[test]
fn every_entity_is_read_once() {
    let plan = plan();
    let service = plan.service("selling").unwrap();
    let rows = ask(&[Some("a"), Some("b"), Some("a"), None, Some("b")]);
    let reader = reader(service);
    let read = Asked::new(&reader, &rows);
    assert_eq!(read.reader.generations.len(), 2);
    assert_eq!(read.slots.len(), 4);

    // As many as are looked up by their hash.
    let names: Vec<String> = (0..60).map(|row| format!("shop {}", row % 30)).collect();
    let shops: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
    let read = Asked::new(&reader, &ask(&shops));
    assert_eq!(read.slots.len(), 60, "thirty entities of two views");
    for slots in &read.of_inputs {
        assert_eq!(slots[..30], slots[30..]);
        assert_eq!(slots.iter().collect::<std::collections::HashSet<_>>().len(), 30);
    }
}
