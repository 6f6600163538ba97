use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use arrow::array::{Float64Array, StringArray};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Assembled, SourceSchemas, ViewAnswer, compile_definitions};
use feature_defs::time::{Position, Status};

use super::*;
use crate::fetch::{Fetched, FetchedInput, Reason};

const DEFINITIONS: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - name: sales
    stream: true
    schema: [{name: shop, type: string}, {name: amount, type: float64}, {name: secret, type: float64}]
    event_time: sold_at
feature_views:
  - name: last_sale
    entity: shop
    source: sales
    features: [{name: amount, type: float64, default: 7.0}, {name: secret, type: float64, sensitive: true}]
requests:
  - {name: visit, fields: [{name: people, type: float64}]}
feature_services:
  - {name: selling, features: ["last_sale:*", "visit:people"]}
"#;

pub(crate) fn service() -> Arc<ServicePlan> {
    let files = Files::new(vec![SourceFile { path: "shop.yaml".into(), text: DEFINITIONS.into() }]);
    let plan = compile_definitions("shops", &files, &SourceSchemas::new()).unwrap();
    plan.service("selling").unwrap().clone()
}

/// An answer with one row for each shop. Of a shop whose name begins with `x` the store said nothing in time, and one that
/// begins with `n` it does not know.
pub(crate) fn observed(service: &Arc<ServicePlan>, shops: &[&str], time: Micros) -> Observed {
    let rows = shops.len();
    let of = |begin: char| shops.iter().map(move |shop| shop.starts_with(begin)).collect::<Vec<bool>>();
    let (late, unknown) = (of('x'), of('n'));
    let given = |row: usize| !late[row] && !unknown[row];
    let stored: ArrayRef = Arc::new((0..rows).map(|row| given(row).then_some(row as f64)).collect::<Float64Array>());
    let filled: ArrayRef =
        Arc::new((0..rows).map(|row| Some(if given(row) { row as f64 } else { 7.0 })).collect::<Float64Array>());
    let people: ArrayRef = Arc::new(Float64Array::from(vec![2.0; rows]));
    let status = |row: usize| match (late[row], unknown[row]) {
        (true, _) => Status::Unavailable,
        (_, true) => Status::NotFound,
        _ => Status::Present,
    };
    let statuses: Vec<Status> = (0..rows).map(status).collect();
    let present: Arc<[Status]> = vec![Status::Present; rows].into();
    let input = FetchedInput {
        answer: ViewAnswer {
            values: vec![stored.clone(), stored.clone()],
            statuses: statuses.clone(),
            event_times: (0..rows).map(|row| given(row).then_some(time - 5)).collect(),
        },
        reasons: late.iter().map(|late| late.then_some(Reason::Timeout)).collect(),
        positions: (0..rows)
            .map(|row| given(row).then_some(Position { time: time - 5, sequence: row as u64 }))
            .collect(),
        age_max: None,
        stale_rows: 0,
    };
    let statuses: Arc<[Status]> = statuses.into();
    let features = Features {
        fetched: Fetched { inputs: vec![input], at: vec![time; rows], stale: false, store_error: None },
        assembled: Assembled {
            columns: vec![filled, stored, people.clone()],
            statuses: vec![statuses.clone(), statuses, present],
            defaults: vec![0; 3],
        },
        fetch_time: Duration::from_micros(100),
        transform_time: Duration::from_micros(10),
    };
    let keys: ArrayRef = Arc::new(StringArray::from(shops.to_vec()));
    Observed {
        service: service.clone(),
        rows: Rows { count: rows, columns: vec![keys, people], incomplete: Vec::new() },
        features: Arc::new(features),
        places: None,
        request_id: "r".into(),
        time,
        total: Duration::from_micros(300),
        prediction: None,
    }
}

/// Counts what it sees, and takes as long for it as it is told.
struct Counting {
    rows: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
    wait: Option<Receiver<()>>,
}

impl Observer for Counting {
    fn observe(&mut self, observed: &Observed) {
        if let Some(wait) = &self.wait {
            let _ = wait.recv();
        }
        self.rows.fetch_add(observed.rows.count as u64, Ordering::SeqCst);
    }

    fn dropped(&mut self, _: &About, _: Micros, rows: u64) {
        self.dropped.fetch_add(rows, Ordering::SeqCst);
    }

    fn tick(&mut self, _: Micros) {}

    fn end(&mut self, _: Micros) {}
}

fn counting(wait: Option<Receiver<()>>) -> (Observing, Arc<AtomicU64>, Arc<AtomicU64>) {
    let (rows, dropped) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let observer = Counting { rows: rows.clone(), dropped: dropped.clone(), wait };
    let observing = Observing::start(vec![Box::new(observer)], Arc::new(|| 1)).unwrap();
    (observing, rows, dropped)
}

#[test]
fn the_end_waits_for_everything_that_was_handed_over() {
    let service = service();
    let (observing, rows, dropped) = counting(None);
    for _ in 0..1_000 {
        observing.hand_over(observed(&service, &["a", "b"], 10));
    }
    observing.end();
    assert_eq!((rows.load(Ordering::SeqCst), dropped.load(Ordering::SeqCst)), (2_000, 0));
    // Whoever comes late is not kept waiting either.
    observing.hand_over(observed(&service, &["a"], 10));
    assert_eq!(rows.load(Ordering::SeqCst), 2_000);
}

#[test]
fn a_full_queue_drops_and_counts_and_never_waits() {
    let service = service();
    let (go, wait): (Sender<()>, _) = channel();
    let (observing, rows, dropped) = counting(Some(wait));
    let all = ANSWERS_MAX as u64 * 3;
    for _ in 0..all {
        observing.hand_over(observed(&service, &["a"], 10));
    }
    // The observer waits; the queue holds one bound's worth, and another may be in its hands.
    drop(go);
    observing.end();
    let (rows, dropped) = (rows.load(Ordering::SeqCst), dropped.load(Ordering::SeqCst));
    assert_eq!(rows + dropped, all);
    assert!((ANSWERS_MAX as u64..=2 * ANSWERS_MAX as u64).contains(&rows), "{rows}");
}

#[test]
fn without_observers_nothing_is_kept() {
    let observing = Observing::start(Vec::new(), Arc::new(|| 1)).unwrap();
    assert!(!observing.is_on());
    observing.end();
}
