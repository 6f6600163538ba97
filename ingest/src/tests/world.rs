//! A project in memory: definitions, stores, a clock, and what the reference says must be visible.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use async_trait::async_trait;
use feature_defs::as_of::{Row, Visibility, as_of, feature_value};
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::diagnose::render;
use feature_defs::plan::{Plan, SourceSchemas, ViewPlan, ViewPlanKind, compile_definitions, encode_entity_keys};
use feature_defs::time::{Micros, Position, Status};
use feature_defs::value::{Type, Value};
use feature_defs::window::{WindowEvent, window_value};
use futures::StreamExt;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use offline_store::history::History;
use offline_store::source::Sources;
use online_store::key::Generation;
use online_store::memory::MemoryStore;
use online_store::tile::Layout;
use online_store::{Answer, NodeReport, OnlineStore, Read, StoreError, Write, WriteOutcome, row};

use crate::{Ingest, IngestOptions, Phase, Pushed, Wait};

/// Some moment on a tile boundary.
pub const T0: Micros = 1_700_006_400_000_000;
pub const MINUTE: Micros = 60_000_000;
pub const HOUR: Micros = 60 * MINUTE;

pub const STREAM: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - name: sales
    stream: true
    schema:
      - {name: shop, type: string, nullable: true}
      - {name: amount, type: float64, nullable: true}
      - {name: gone, type: bool, nullable: true}
      - {name: id, type: string}
      - {name: seen_at, type: timestamp, nullable: true}
    event_time: sold_at
    created_time: seen_at
    event_id: id
    deleted: gone
    #history
feature_views:
  - name: last
    entity: shop
    source: sales
    ttl: 2h
    features:
      - {name: amount, type: float64}
      - {name: twice, expr: "amount * 2"}
  - name: load
    entity: shop
    source: sales
    windows: [1h, 24h]
    aggregates:
      - {name: n, function: count}
      - {name: total, function: sum, of: amount}
      - {name: top, function: max, of: amount, where: "amount < 50"}
"#;

pub const EXTRA_VIEW: &str = r#"
  - name: half
    entity: shop
    source: sales
    features:
      - {name: half, expr: "amount / 2"}
  - name: load6
    entity: shop
    source: sales
    windows: [6h]
    aggregates:
      - {name: mean, function: mean, of: amount}
"#;

/// One row of the test's sources.
#[derive(Debug, Clone, PartialEq)]
pub struct Sale {
    pub shop: Option<String>,
    pub amount: Option<f64>,
    pub gone: Option<bool>,
    pub id: String,
    pub seen_at: Option<Micros>,
    pub sold_at: Option<Micros>,
}

pub fn sale(shop: &str, amount: f64, id: &str, sold_at: Micros) -> Sale {
    Sale {
        shop: Some(shop.into()),
        amount: Some(amount),
        gone: None,
        id: id.into(),
        seen_at: None,
        sold_at: Some(sold_at),
    }
}

pub fn batch(sales: &[Sale]) -> RecordBatch {
    let times = |of: fn(&Sale) -> Option<Micros>| {
        Arc::new(sales.iter().map(of).collect::<TimestampMicrosecondArray>().with_timezone("UTC")) as ArrayRef
    };
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("shop", Arc::new(sales.iter().map(|sale| sale.shop.clone()).collect::<StringArray>())),
        ("amount", Arc::new(sales.iter().map(|sale| sale.amount).collect::<Float64Array>())),
        ("gone", Arc::new(sales.iter().map(|sale| sale.gone).collect::<BooleanArray>())),
        ("id", Arc::new(sales.iter().map(|sale| Some(sale.id.clone())).collect::<StringArray>())),
        ("seen_at", times(|sale| sale.seen_at)),
        ("sold_at", times(|sale| sale.sold_at)),
    ];
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true))).unwrap()
}

pub fn compiled(text: &str) -> Arc<Plan> {
    let columns = [
        ("shop", Type::String),
        ("amount", Type::Float64),
        ("gone", Type::Bool),
        ("id", Type::String),
        ("seen_at", Type::Timestamp),
        ("sold_at", Type::Timestamp),
    ];
    let columns: Vec<(String, Type)> = columns.into_iter().map(|(name, t)| (name.to_string(), t)).collect();
    let schemas: SourceSchemas = ["prices", "shops"].map(|name| (name.to_string(), columns.clone())).into();
    let files = Files::new(vec![SourceFile { path: "defs.yaml".into(), text: text.into() }]);
    match compile_definitions("test", &files, &schemas) {
        Ok(plan) => Arc::new(plan),
        Err(wrong) => panic!("{}", render(&wrong, &files, false)),
    }
}

/// One change of a store, for taking all but the last again.
#[derive(Clone)]
enum Taken {
    Write(Write),
    Remove(Generation),
    Claim(String, u64),
}

/// A store that fails when it is told to, and loses its newest writes, as one does that syncs now and then.
#[derive(Default)]
pub struct Flaky {
    inner: Mutex<Arc<MemoryStore>>,
    taken: tokio::sync::Mutex<Vec<Taken>>,
    /// After so many more writes, half as many are lost and nobody is told; 0: none.
    pub until_loss: AtomicU64,
    /// Every call fails.
    pub down: AtomicBool,
    /// Writes that still succeed before one call fails; 0: no limit.
    pub writes_left: AtomicU64,
    /// Reads of all tiles of an entity.
    pub whole_reads: AtomicU64,
}

impl Flaky {
    pub fn inner(&self) -> Arc<MemoryStore> {
        self.inner.lock().unwrap().clone()
    }

    /// Goes back by so many writes.
    pub async fn lose(&self, writes: usize) {
        let mut taken = self.taken.lock().await;
        self.lose_of(&mut taken, writes).await;
    }

    async fn lose_of(&self, taken: &mut Vec<Taken>, writes: usize) {
        let kept = taken.len().saturating_sub(writes);
        let lost = taken.split_off(kept);
        // A claim is durable when it returns, whatever is lost.
        taken.extend(lost.into_iter().filter(|change| matches!(change, Taken::Claim(..))));
        let fresh = Arc::new(MemoryStore::default());
        for change in taken.iter().cloned() {
            match change {
                Taken::Write(write) => drop(fresh.write(vec![write]).await.unwrap()),
                Taken::Remove(generation) => drop(fresh.remove_generation(&generation).await.unwrap()),
                Taken::Claim(name, epoch) => drop(fresh.claim(&name, epoch).await.unwrap()),
            }
        }
        *self.inner.lock().unwrap() = fresh;
    }

    async fn take(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        let mut taken = self.taken.lock().await;
        taken.extend(writes.iter().cloned().map(Taken::Write));
        let left = self.until_loss.load(Ordering::SeqCst);
        let count = writes.len() as u64;
        let outcome = self.inner().write(writes).await?;
        if left > 0 {
            self.until_loss.store(left.saturating_sub(count), Ordering::SeqCst);
            if left <= count {
                self.lose_of(&mut taken, left as usize / 2 + 1).await;
            }
        }
        Ok(outcome)
    }

    fn check(&self) -> Result<(), StoreError> {
        let unreachable = || StoreError::Unreachable { place: "test".into(), what: "told to".into() };
        if self.down.load(Ordering::SeqCst) { Err(unreachable()) } else { Ok(()) }
    }
}

#[async_trait]
impl OnlineStore for Flaky {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        self.check()?;
        let whole = reads.iter().filter(|read| matches!(read, Read::AllTiles(_))).count();
        self.whole_reads.fetch_add(whole as u64, Ordering::SeqCst);
        self.inner().read(reads).await
    }

    /// Fails in the middle of a call: what came before the failing write is there.
    async fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        self.check()?;
        let left = self.writes_left.load(Ordering::SeqCst);
        if left > 0 {
            let fails = writes.len() as u64 >= left;
            let kept = writes.len().min(left as usize);
            self.writes_left.store(left - kept as u64, Ordering::SeqCst);
            if fails {
                self.take(writes.into_iter().take(kept).collect()).await?;
                self.down.store(true, Ordering::SeqCst);
                return Err(StoreError::Timeout { place: "test".into(), millis: 1 });
            }
        }
        self.take(writes).await
    }

    async fn sync(&self) -> Result<(), StoreError> {
        self.check()?;
        self.inner().sync().await
    }

    async fn remove_generation(&self, generation: &Generation) -> Result<u64, StoreError> {
        self.check()?;
        self.taken.lock().await.push(Taken::Remove(generation.clone()));
        self.inner().remove_generation(generation).await
    }

    async fn claim(&self, name: &str, candidate: u64) -> Result<u64, StoreError> {
        self.check()?;
        let epoch = self.inner().claim(name, candidate).await?;
        self.taken.lock().await.push(Taken::Claim(name.to_owned(), epoch));
        Ok(epoch)
    }

    async fn collect_expired(&self, now: Micros) -> Result<u64, StoreError> {
        self.check()?;
        self.inner().collect_expired(now).await
    }

    async fn report(&self) -> Result<Vec<NodeReport>, StoreError> {
        self.inner().report().await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.check()
    }

    fn place(&self) -> String {
        "flaky".into()
    }
}

pub struct World {
    pub folder: tempfile::TempDir,
    pub store: Arc<dyn ObjectStore>,
    pub online: Arc<Flaky>,
    pub clock: Arc<AtomicI64>,
    pub plan: Arc<Plan>,
    ingest: Option<Ingest>,
    pub tune: fn(&mut IngestOptions),
    /// The Redis that keeps the log, from the next opening on.
    pub log_redis: Option<Arc<str>>,
    /// Every event taken in, with its position.
    pub events: Vec<(Sale, Position)>,
}

impl World {
    pub async fn new(text: &str) -> World {
        let mut world = World {
            folder: tempfile::tempdir().unwrap(),
            store: Arc::new(InMemory::new()),
            online: Arc::default(),
            clock: Arc::new(AtomicI64::new(T0)),
            plan: compiled(text),
            ingest: None,
            tune: |_| {},
            log_redis: None,
            events: Vec::new(),
        };
        world.open().await;
        world
    }

    /// Another process over the same online store, with a log and a history of its own.
    pub async fn beside(&self) -> World {
        let mut world = World {
            folder: tempfile::tempdir().unwrap(),
            store: Arc::new(InMemory::new()),
            online: self.online.clone(),
            clock: self.clock.clone(),
            plan: self.plan.clone(),
            ingest: None,
            tune: self.tune,
            log_redis: None,
            events: Vec::new(),
        };
        world.open().await;
        world
    }

    /// The same project on another machine, which goes on where this one is or was.
    pub async fn elsewhere(&self) -> World {
        let mut world = World {
            folder: tempfile::tempdir().unwrap(),
            store: self.store.clone(),
            online: self.online.clone(),
            clock: self.clock.clone(),
            plan: self.plan.clone(),
            ingest: None,
            tune: self.tune,
            log_redis: self.log_redis.clone(),
            events: self.events.clone(),
        };
        world.open().await;
        world
    }

    /// Until the online store has again what the streams have written.
    pub async fn noticed(&self) {
        let views = || self.plan.views.iter().filter(|view| &*view.source.name == "sales");
        for _ in 0..20_000 {
            self.ingest().wake();
            let mut reads = vec![Read::Mark("mark/test/sales".into())];
            reads.extend(views().map(|view| {
                Read::Fact(Generation::new("test", &view.name, view.storage_digest.as_str()).ready_fact())
            }));
            let answers = self.online.inner().read(&reads).await.unwrap();
            let applied = self.ingest().status().iter().find(|status| &*status.source == "sales").unwrap().applied;
            let has_facts = answers[1..].iter().all(|answer| matches!(answer, Answer::Fact(Some(_))));
            let is_marked = matches!(answers[0], Answer::Mark(Some(mark)) if mark >= applied);
            if has_facts && is_marked && self.ingest().backfilling().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("nobody notices: {:?} {:?}", self.ingest().status(), self.ingest().backfilling());
    }

    pub fn options(&self) -> IngestOptions {
        let clock = self.clock.clone();
        let mut options = IngestOptions::new(
            "test",
            self.log_folder(),
            self.store.clone(),
            object_store::path::Path::from("root"),
            self.online.clone(),
            Arc::new(Sources::new(self.folder.path()).unwrap()),
            Arc::new(move || clock.load(Ordering::SeqCst)),
        );
        // Runs are what the tests say; those of schedules switch it on.
        options.schedule = false;
        options.log_redis = self.log_redis.clone();
        (self.tune)(&mut options);
        options
    }

    pub fn log_folder(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    pub async fn open(&mut self) {
        let ingest = Ingest::open(self.options()).await.unwrap();
        self.ingest = Some(ingest);
        self.ingest().adopt(self.plan.clone()).await.unwrap();
    }

    pub async fn adopt(&mut self, text: &str) {
        self.plan = compiled(text);
        self.ingest().adopt(self.plan.clone()).await.unwrap();
    }

    /// For the next opening.
    pub fn adopt_text(&mut self, text: &str) {
        self.plan = compiled(text);
    }

    pub fn ingest(&self) -> &Ingest {
        self.ingest.as_ref().unwrap()
    }

    pub async fn crash(&mut self) {
        self.ingest.take().unwrap().abandon().await;
    }

    pub async fn stop(&mut self) {
        self.ingest.take().unwrap().shutdown().await.unwrap();
    }

    pub fn now(&self) -> Micros {
        self.clock.load(Ordering::SeqCst)
    }

    pub fn set_clock(&self, now: Micros) {
        self.clock.store(now, Ordering::SeqCst);
        self.ingest().wake();
    }

    /// Pushes, and remembers what the reference has to know. Ids in `sales` must be new, except those in `known`.
    pub async fn push(&mut self, sales: &[Sale]) -> Pushed {
        let pushed = self.ingest().push("sales", batch(sales), Wait::Visible).await.unwrap();
        self.remember(sales, &pushed);
        pushed
    }

    pub fn remember(&mut self, sales: &[Sale], pushed: &Pushed) {
        let Some(last) = pushed.last_sequence else { return };
        let mut sequence = last + 1 - pushed.accepted;
        let arrival = self.now();
        for (row, sale) in sales.iter().enumerate() {
            let is_known = self.events.iter().any(|(known, _)| known.id == sale.id);
            if is_known || pushed.rejected.iter().any(|(rejected, _)| *rejected == row as u32) {
                continue;
            }
            let sold_at = sale.sold_at.unwrap();
            let time = arrival.max(sold_at).max(sale.seen_at.unwrap_or(sold_at));
            self.events.push((sale.clone(), Position { time, sequence }));
            sequence += 1;
        }
        assert_eq!(sequence, last + 1, "as many events were taken as the reference expects");
    }

    /// Until everything that is due has been applied, and everything is built.
    pub async fn settle(&self) {
        let ingest = self.ingest();
        for _ in 0..20_000 {
            ingest.wake();
            let mut busy = ingest.backfilling().iter().any(|(_, phase)| matches!(phase, Phase::Building { .. }));
            for stream in ingest.inner.streams().values() {
                let state = stream.state.lock().await;
                busy |= !state.imported || state.waiting_rows() > 0 || !state.has_received_all(&ingest.inner.log);
                busy |= state.next_due().is_some_and(|due| due <= self.now());
            }
            if !busy {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("ingestion does not settle: {:?} {:?}", ingest.status(), ingest.backfilling());
    }

    /// Every view over `sales` answers at the clock's time what the reference says, for every shop.
    #[track_caller]
    pub fn check_online(&self) -> impl Future<Output = ()> + '_ {
        let place = std::panic::Location::caller();
        async move {
            self.settle().await;
            for view in self.plan.views.iter().filter(|view| &*view.source.name == "sales") {
                self.check_view(view, &self.events, self.now(), &format!("{}:{}", place.file(), place.line())).await;
            }
        }
    }

    pub async fn check_view(&self, view: &Arc<ViewPlan>, events: &[(Sale, Position)], t: Micros, place: &str) {
        let mut shops: Vec<String> = events.iter().filter_map(|(sale, _)| sale.shop.clone()).collect();
        shops.push("nobody".into());
        shops.sort();
        shops.dedup();
        let sales: Vec<Sale> = events.iter().map(|(sale, _)| sale.clone()).collect();
        let positions: Vec<Position> = events.iter().map(|(_, position)| *position).collect();
        let aligned = view.source.align(&batch(&sales), None).unwrap();
        let times = view.source.times(&aligned, Some(&positions)).unwrap();
        let rows = view.rows(&aligned, &times).unwrap();
        let mut by_entity: BTreeMap<Vec<u8>, Vec<usize>> = BTreeMap::new();
        for row in 0..rows.len() {
            by_entity.entry(rows.keys.get(row).unwrap().to_vec()).or_default().push(row);
        }
        let generation = Generation::new("test", &view.name, view.storage_digest.as_str());
        assert!(self.ingest().ready(&generation), "{place}: {} is ready", view.name);
        let types = view.row_types();
        for shop in shops {
            let column: ArrayRef = Arc::new(StringArray::from(vec![shop.as_str()]));
            let entity = encode_entity_keys(&[(column, &Type::String)], 1).get(0).unwrap().to_vec();
            let mine = by_entity.get(&entity).cloned().unwrap_or_default();
            let key = generation.key(entity);
            let mut context = String::new();
            write!(context, "{place}: {} of {shop} at T0+{}", view.name, t - T0).unwrap();
            match &view.kind {
                ViewPlanKind::AsOf { max_age, features } => {
                    let all: Vec<Row> = mine
                        .iter()
                        .map(|row| Row {
                            times: rows.times[*row],
                            deleted: rows.deleted[*row],
                            values: rows.values(*row, &types),
                        })
                        .collect();
                    let expected = as_of(&all, t, *max_age, Visibility::Known);
                    let answers = self.online.inner().read(&[Read::Row(key)]).await.unwrap();
                    let Answer::Row(blob) = &answers[0] else { panic!("{context}: {answers:?}") };
                    let stored: Vec<Row> = blob.iter().map(|blob| row::decode(blob, &types).unwrap()).collect();
                    let found = as_of(&stored, t, *max_age, Visibility::Known);
                    for feature in 0..features.len() {
                        assert_eq!(
                            feature_value(&found, feature, None),
                            feature_value(&expected, feature, None),
                            "{context}"
                        );
                    }
                    let last =
                        all.iter().filter(|row| row.times.position.time <= t).map(|row| row.times.position).max();
                    if last.is_some_and(|last| last.sequence > 0) {
                        assert_eq!(stored.first().map(|row| row.times.position), last, "{context}: position");
                    }
                    assert!(expected.status != Status::Present || !stored.is_empty());
                }
                ViewPlanKind::Windowed { aggregates, outputs, windows, levels } => {
                    let layout = Layout {
                        aggregates: aggregates.iter().map(|aggregate| aggregate.aggregate.clone()).collect(),
                        windows: windows.clone(),
                        levels: levels.clone().unwrap(),
                    };
                    let all: Vec<WindowEvent> = mine
                        .iter()
                        .map(|row| WindowEvent { times: rows.times[*row], inputs: rows.values(*row, &types) })
                        .collect();
                    let asked = layout.tiles_at(t);
                    let answers = self.online.inner().read(&[Read::Tiles(key, asked.clone())]).await.unwrap();
                    let Answer::Tiles { position, tiles } = answers[0].clone() else {
                        panic!("{context}: {answers:?}")
                    };
                    let present = asked.into_iter().zip(tiles).filter_map(|(id, tile)| Some((id, tile?)));
                    let tiles = layout.decode_answer(position, present).unwrap();
                    let wanted: Vec<_> = outputs.iter().map(|output| (output.aggregate, output.window)).collect();
                    let found = layout.read(&tiles, &wanted, t).unwrap_or_else(|_| panic!("{context}: not exact"));
                    for (output, found) in outputs.iter().zip(found) {
                        let aggregate = &aggregates[output.aggregate].aggregate;
                        let expected: Value =
                            window_value(&all, output.aggregate, aggregate, &output.window, t, Visibility::Known);
                        assert_eq!(found, expected, "{context}: {}", output.name);
                    }
                }
            }
        }
    }

    /// History holds exactly the events that are visible by now, once each, in order of position.
    pub async fn check_history(&self) {
        self.settle().await;
        self.ingest().flush().await.unwrap();
        let history = self.history().await;
        let source = self.plan.source("sales").unwrap();
        let found: Vec<_> = history.scan(source, None, Position::START).collect().await;
        let mut expected: Vec<&(Sale, Position)> =
            self.events.iter().filter(|(_, position)| position.time <= self.now()).collect();
        expected.sort_by_key(|(_, position)| *position);
        let mut at = 0;
        for part in found {
            let part = part.unwrap();
            let sales: Vec<Sale> =
                expected[at..at + part.positions.len()].iter().map(|(sale, _)| sale.clone()).collect();
            let positions: Vec<Position> =
                expected[at..at + part.positions.len()].iter().map(|(_, position)| *position).collect();
            assert_eq!(part.positions, positions);
            assert_eq!(part.batch, source.align(&batch(&sales), None).unwrap());
            at += part.positions.len();
        }
        assert_eq!(at, expected.len(), "every visible event is in history");
        assert_eq!(history.manifest().applied, expected.last().map_or(Position::START, |(_, position)| *position));
    }

    pub async fn history(&self) -> History {
        History::open(self.store.clone(), object_store::path::Path::from("root/test"), "sales").await.unwrap()
    }

    pub fn write_parquet(&self, path: &str, sales: &[Sale]) {
        let path = self.folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = std::fs::File::create(path).unwrap();
        let batch = batch(sales);
        let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
}
