use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::AtomicBool;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{Float64Type, Int64Type, UInt8Type};
use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult,
};
use offline_store::serving_log::{LogRows, columns};

use super::*;
use crate::observe::tests::{observed, service};

const DAY: Micros = 86_400_000_000;
const NOON: Micros = 1_000 * DAY + DAY / 2;

/// An object store that can be away.
#[derive(Debug, Default)]
pub(crate) struct Away {
    store: InMemory,
    pub(crate) is_away: AtomicBool,
}

impl fmt::Display for Away {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("away")
    }
}

#[async_trait]
impl ObjectStore for Away {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        if self.is_away.load(Ordering::SeqCst) {
            return Err(object_store::Error::Generic { store: "away", source: "it is away".into() });
        }
        self.store.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.store.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}

struct World {
    folder: tempfile::TempDir,
    objects: Arc<Away>,
    store: Arc<dyn ObjectStore>,
    root: Path,
    metrics: LogMetrics,
}

impl World {
    fn new() -> World {
        let objects = Arc::new(Away::default());
        let folder = tempfile::tempdir().unwrap();
        let root = Path::from("root/shops");
        World { folder, store: objects.clone(), objects, root, metrics: LogMetrics::default() }
    }

    async fn open(&self, settings: ServingLogSettings) -> ServingLog {
        let parts = LogParts {
            settings,
            project: "shops".into(),
            root: self.root.clone(),
            store: self.store.clone(),
            folder: self.folder.path().to_owned(),
        };
        ServingLog::open(parts, "127.0.0.1:1".into(), self.metrics.clone()).await.unwrap()
    }

    async fn logged(&self) -> Vec<LogRows> {
        let mut all = Vec::new();
        for file in serving_log::files(&self.store, &self.root, "selling", Micros::MIN, Micros::MAX).await.unwrap() {
            all.push(serving_log::read(&self.store, &file).await.unwrap().unwrap());
        }
        all
    }

    async fn losses(&self) -> Vec<Losses> {
        let day = serving_log::day(NOON);
        serving_log::losses(&self.store, &self.root, "selling", day, day).await.unwrap()
    }

    async fn rows(&self) -> usize {
        self.logged().await.iter().map(|rows| rows.batch.num_rows()).sum()
    }
}

fn everything() -> ServingLogSettings {
    ServingLogSettings { sample: 1.0, flush: Duration::from_secs(3_600), ..ServingLogSettings::default() }
}

#[tokio::test]
async fn a_logged_row_says_what_was_served_and_where_it_came_from() {
    let world = World::new();
    let ServingLog { mut observer, uploads } = world.open(everything()).await;
    observer.observe(&observed(&service(), &["a", "n", "x"], NOON));
    observer.end(NOON + 1);
    uploads.last(Duration::from_secs(5), &|| None).await;
    let logged = world.logged().await;
    let [LogRows { header, batch }] = &logged[..] else { panic!("{} files", logged.len()) };
    assert_eq!((header.rows, header.first_at, header.last_time), (3, NOON, NOON));
    assert_eq!(header.semantic_digest, service().semantic_digest.as_str());
    let column = |name: &str| batch.column_by_name(name).unwrap_or_else(|| panic!("no {name}")).clone();
    let keys = column(&columns::input("shop"));
    assert_eq!(keys.as_string::<i32>().iter().flatten().collect::<Vec<_>>(), ["a", "n", "x"]);
    let amounts = column(&columns::feature("last_sale:amount"));
    assert_eq!(amounts.as_primitive::<Float64Type>().values(), &[0.0, 7.0, 7.0]);
    let origins = |name: &str| column(&columns::origin(name)).as_primitive::<UInt8Type>().values().to_vec();
    let [stored, default, request, unavailable] = [
        serving_log::Origin::Stored,
        serving_log::Origin::Default,
        serving_log::Origin::Request,
        serving_log::Origin::Unavailable,
    ]
    .map(|origin| origin as u8);
    assert_eq!(origins("last_sale:amount"), [stored, default, unavailable]);
    // Without a default, null is what the store said.
    assert_eq!(origins("last_sale:secret"), [stored, stored, unavailable]);
    assert_eq!(origins("visit:people"), [request; 3]);
    let positions = column(&columns::position_time("last_sale"));
    let positions = positions.as_primitive::<Int64Type>();
    assert_eq!((positions.value(0), positions.is_null(1), positions.is_null(2)), (NOON - 5, true, true));
    let reasons = column(&columns::reason("last_sale"));
    assert_eq!((reasons.null_count(), reasons.is_valid(2)), (2, true));
    // Declared sensitive: a hash, and null stays null.
    assert_eq!(header.hashed, ["feature:last_sale:secret"]);
    let secrets = column(&columns::feature("last_sale:secret"));
    let secrets = secrets.as_string::<i32>();
    assert_eq!((secrets.value(0).len(), secrets.is_null(1)), (64, true));
    let status = column(columns::STATUS);
    assert_eq!(status.as_string::<i32>().iter().flatten().collect::<Vec<_>>(), ["ok", "ok", "fallback"]);
}

#[tokio::test]
async fn every_gateway_hashes_alike() {
    let world = World::new();
    let mut hashes = BTreeSet::new();
    for _ in 0..2 {
        let ServingLog { mut observer, uploads } = world.open(everything()).await;
        observer.observe(&observed(&service(), &["a"], NOON));
        observer.end(NOON);
        uploads.last(Duration::from_secs(5), &|| None).await;
    }
    for rows in world.logged().await {
        let secrets = rows.batch.column_by_name("feature:last_sale:secret").unwrap().clone();
        hashes.insert(secrets.as_string::<i32>().value(0).to_owned());
    }
    assert_eq!((world.logged().await.len(), hashes.len()), (2, 1));
}

#[tokio::test]
async fn samples_are_chosen_by_key_and_fallbacks_up_to_their_rate() {
    let world = World::new();
    let settings = ServingLogSettings { sample: 0.2, uniform: 0.0, fallbacks_per_second: 2, ..everything() };
    let ServingLog { mut observer, uploads } = world.open(settings).await;
    let service = service();
    let names: Vec<String> = (0..500).map(|shop| format!("s{shop}")).collect();
    let shops: Vec<&str> = names.iter().map(String::as_str).collect();
    // Each shop twice: all of a chosen one is logged, and nothing of the others.
    observer.observe(&observed(&service, &shops, NOON));
    observer.observe(&observed(&service, &shops, NOON + 1));
    let late: Vec<String> = (0..500).map(|shop| format!("x{shop}")).collect();
    let late: Vec<&str> = late.iter().map(String::as_str).collect();
    observer.observe(&observed(&service, &late, NOON + 2));
    observer.end(NOON + 3);
    uploads.last(Duration::from_secs(5), &|| None).await;
    let mut by_key: HashMap<String, usize> = HashMap::new();
    let mut fallbacks = 0;
    for rows in world.logged().await {
        let (keys, why) = (
            rows.batch.column_by_name("in:shop").unwrap().clone(),
            rows.batch.column_by_name("sampled").unwrap().clone(),
        );
        for (key, why) in keys.as_string::<i32>().iter().flatten().zip(why.as_string::<i32>().iter().flatten()) {
            match why {
                "key" if key.starts_with('s') => *by_key.entry(key.to_owned()).or_default() += 1,
                "fallback" => fallbacks += 1,
                _ => {}
            }
        }
    }
    // Five standard deviations of a binomial of 500 at 0.2.
    assert!(by_key.len().abs_diff(100) <= 45, "{}", by_key.len());
    assert!(by_key.values().all(|times| *times == 2));
    assert_eq!(fallbacks, 2 * BURST_SECONDS as usize);
    let total = world.losses().await[0].total();
    assert_eq!((total.offered, total.chosen, total.lost()), (1_500, total.written, 0));
    assert!(total.fallbacks_over > 300, "{total:?}");
}

#[tokio::test]
async fn an_object_store_that_is_away_costs_disk_and_a_full_disk_is_counted() {
    let world = World::new();
    let settings = ServingLogSettings { spool_bytes: 40_000, flush: Duration::ZERO, ..everything() };
    let ServingLog { mut observer, uploads } = world.open(settings).await;
    world.objects.is_away.store(true, Ordering::SeqCst);
    let service = service();
    let mut offered = 0;
    for minute in 0..40 {
        let now = NOON + minute * 60_000_000;
        observer.observe(&observed(&service, &["a", "b", "x"], now));
        offered += 3;
        observer.tick(now);
        // The encoder has its own thread; a flush that finds it busy keeps the rows.
        std::thread::sleep(Duration::from_millis(20));
        if minute == 3 {
            uploads.last(Duration::from_secs(5), &|| None).await;
            assert_eq!(world.rows().await, 0);
        }
    }
    observer.end(NOON + DAY / 4);
    world.objects.is_away.store(false, Ordering::SeqCst);
    uploads.last(Duration::from_secs(5), &|| None).await;
    let losses = world.losses().await;
    let [losses] = &losses[..] else { panic!("{} accounts", losses.len()) };
    let total = losses.total();
    assert!(losses.ended);
    assert_eq!((total.offered, total.chosen), (offered, offered));
    assert!(total.dropped_spool > 0 && total.written > 0, "{total:?}");
    assert_eq!(total.written + total.lost(), total.chosen);
    assert_eq!(world.rows().await as u64, total.written);
    assert_eq!(losses.minutes.len(), 40);
}

#[tokio::test]
async fn what_a_killed_server_left_on_disk_is_uploaded_by_the_next() {
    let world = World::new();
    let ServingLog { mut observer, uploads } = world.open(everything()).await;
    observer.observe(&observed(&service(), &["a", "b"], NOON));
    observer.end(NOON);
    // Killed: nothing of it was uploaded, and its lock is free.
    drop((observer, uploads));
    assert_eq!(world.rows().await, 0);
    let ServingLog { observer, uploads } = world.open(everything()).await;
    let clock: crate::answer::Clock = Arc::new(|| NOON);
    let found = async {
        while world.rows().await < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = uploads.run(&clock, &|| None) => {}
        found = tokio::time::timeout(Duration::from_secs(20), found) => found.unwrap(),
    }
    drop(observer);
    assert_eq!(world.losses().await[0].total().written, 2);
}

#[tokio::test]
async fn a_day_that_is_over_gets_files_and_an_account_of_its_own() {
    let world = World::new();
    let ServingLog { mut observer, uploads } = world.open(everything()).await;
    let service = service();
    observer.observe(&observed(&service, &["a"], NOON));
    observer.observe(&observed(&service, &["a"], NOON + DAY));
    observer.end(NOON + DAY);
    uploads.last(Duration::from_secs(5), &|| None).await;
    let days = serving_log::days(&world.store, &world.root, "selling").await.unwrap();
    assert_eq!(days, [serving_log::day(NOON), serving_log::day(NOON + DAY)]);
    assert_eq!(world.losses().await[0].total().offered, 1);
}
