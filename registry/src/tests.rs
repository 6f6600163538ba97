use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};

use super::*;
use crate::state::tests::{activate, catalog, flights, model, prepare};

fn clock() -> Clock {
    let seconds = AtomicI64::new(1_000_000_000);
    Arc::new(move || DateTime::from_timestamp(seconds.fetch_add(1, Ordering::Relaxed), 0).expect("a second of 2001"))
}

async fn open(store: &Arc<dyn ObjectStore>) -> Registry {
    Registry::open(store.clone(), &Path::from("p"), clock()).await.unwrap()
}

fn in_memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

#[tokio::test]
async fn a_model_goes_from_definitions_to_deployed() {
    let store = in_memory();
    let registry = open(&store).await;
    let follower = open(&store).await;

    let receipt = registry.submit(&flights(), &Change::Apply(catalog("d1")), "ada", Some("begin")).await.unwrap();
    assert_eq!((receipt.outcome, receipt.entry, receipt.version), (Outcome::Appended, EntryNumber(1), None));
    let change = Change::RegisterModel(Box::new(model("a", "d1")));
    let receipt = registry.submit(&flights(), &change, "ada", None).await.unwrap();
    assert_eq!((receipt.outcome, receipt.version), (Outcome::Appended, Some(ModelVersion(1))));
    let receipt = registry.submit(&flights(), &change, "bob", None).await.unwrap();
    assert_eq!((receipt.outcome, receipt.version), (Outcome::AlreadySo, Some(ModelVersion(1))));
    assert_eq!(receipt.entry, EntryNumber(2));
    let receipt = registry.submit(&flights(), &prepare(1), "ada", None).await.unwrap();
    assert_eq!(receipt.entry, EntryNumber(3));
    assert!(receipt.state.project("flights").unwrap().champion("delay").is_none());
    let receipt = registry.submit(&flights(), &activate(1, 3), "ada", None).await.unwrap();
    assert_eq!(receipt.entry, EntryNumber(4));
    assert_eq!(receipt.state.project("flights").unwrap().champion("delay").unwrap().model, model("a", "d1"));

    assert_eq!(follower.state().head, EntryNumber::NONE);
    let mut news = follower.subscribe();
    assert_eq!(*follower.refresh().await.unwrap(), *registry.state());
    assert!(news.has_changed().unwrap());
    assert_eq!(news.borrow_and_update().head, EntryNumber(4));

    let trail: Vec<_> = registry
        .history(EntryNumber::FIRST, 10)
        .await
        .unwrap()
        .into_iter()
        .map(|entry| (entry.kind, entry.who, entry.why, entry.at.timestamp()))
        .collect();
    assert_eq!(
        trail,
        [
            ("apply".to_owned(), "ada".to_owned(), Some("begin".to_owned()), 1_000_000_000),
            ("model_register".to_owned(), "ada".to_owned(), None, 1_000_000_001),
            ("model_prepare".to_owned(), "ada".to_owned(), None, 1_000_000_002),
            ("model_activate".to_owned(), "ada".to_owned(), None, 1_000_000_003),
        ]
    );
}

#[tokio::test]
async fn refusals_and_unsigned_changes_write_nothing() {
    let registry = open(&in_memory()).await;
    registry.submit(&flights(), &Change::Apply(catalog("d1")), "ada", None).await.unwrap();
    let change = prepare(2);
    let error = registry.submit(&flights(), &change, "ada", None).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "model `delay` has no version 2 (it has none); register it with `coeval model register`"
    );
    let error = registry.submit(&flights(), &Change::Apply(catalog("d2")), " ", None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unsigned { .. }), "{error}");
    assert_eq!(registry.log().head().await.unwrap(), EntryNumber(1));
}

#[tokio::test]
async fn earlier_definitions_are_read_from_the_log() {
    let registry = open(&in_memory()).await;
    for digest in ["d1", "d2"] {
        registry.submit(&flights(), &Change::Apply(catalog(digest)), "ada", None).await.unwrap();
    }
    registry.submit(&flights(), &Change::RegisterModel(Box::new(model("a", "d1"))), "ada", None).await.unwrap();
    let state = registry.state();
    let record = state.project("flights").unwrap().model("delay", ModelVersion(1)).unwrap();
    assert_eq!(registry.catalog(record.definitions).await.unwrap(), catalog("d1"));
    let error = registry.catalog(EntryNumber(3)).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotDefinitions { entry: EntryNumber(3) }), "{error}");
}

/// Registries over one store register models all at once. Each is judged on the newest state, so the versions have no holes.
async fn race(registries: Vec<Arc<Registry>>) {
    const MODELS_EACH: usize = 8;
    registries[0].submit(&flights(), &Change::Apply(catalog("d1")), "ada", None).await.unwrap();
    let tasks: Vec<_> = registries
        .iter()
        .enumerate()
        .flat_map(|(registry_at, registry)| {
            // Two tasks share each registry.
            (0..2).map(move |task| {
                let registry = registry.clone();
                tokio::spawn(async move {
                    let mut versions = Vec::new();
                    for nth in 0..MODELS_EACH {
                        let bytes = format!("{registry_at}/{task}/{nth}");
                        let change = Change::RegisterModel(Box::new(model(&bytes, "d1")));
                        let receipt = registry.submit(&flights(), &change, "ada", None).await.unwrap();
                        let version = receipt.version.unwrap();
                        let held = receipt.state.project("flights").unwrap().model("delay", version).unwrap();
                        assert_eq!(held.model, model(&bytes, "d1"));
                        versions.push(version.0);
                    }
                    versions
                })
            })
        })
        .collect();
    let mut versions = Vec::new();
    for task in tasks {
        versions.extend(task.await.unwrap());
    }
    versions.sort_unstable();
    let count = (registries.len() * 2 * MODELS_EACH) as u32;
    assert_eq!(versions, (1..=count).collect::<Vec<_>>());
    let first = registries[0].refresh().await.unwrap();
    for registry in &registries {
        assert_eq!(*registry.refresh().await.unwrap(), *first);
    }
    assert_eq!(first.without_effect, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_registries_agree_in_memory() {
    let store = in_memory();
    let mut registries = Vec::new();
    for _ in 0..4 {
        registries.push(Arc::new(open(&store).await));
    }
    race(registries).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_registries_agree_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut registries = Vec::new();
    for _ in 0..4 {
        let (store, _) = store::open_store(folder.path().to_str().unwrap()).unwrap();
        registries.push(Arc::new(open(&store).await));
    }
    race(registries).await;
}

#[tokio::test]
async fn a_start_reads_the_snapshot_and_needs_it_not() {
    let store = in_memory();
    let registry = open(&store).await;
    for nth in 0..300 {
        registry.submit(&flights(), &Change::Apply(catalog(&format!("d{nth}"))), "ada", None).await.unwrap();
    }
    let snapshot = Path::from("p/control/snapshots/00000000000000000256-f4.json");
    assert!(store.head(&snapshot).await.is_ok());
    assert_eq!(snapshot::load(registry.log()).await.unwrap().head, EntryNumber(256));
    assert_eq!(*open(&store).await.state(), *registry.state());

    // A damaged one is passed over, and mended by whoever folds past it.
    store.put(&snapshot, "{".into()).await.unwrap();
    assert_eq!(*open(&store).await.state(), *registry.state());
    assert_eq!(snapshot::load(registry.log()).await.unwrap().head, EntryNumber(256));
    store.delete(&snapshot).await.unwrap();
    assert_eq!(*open(&store).await.state(), *registry.state());
}

#[tokio::test]
async fn a_kind_from_the_future_stops_changes_and_not_serving() {
    let store = in_memory();
    let registry = open(&store).await;
    let applied = registry.submit(&flights(), &Change::Apply(catalog("d1")), "ada", None).await.unwrap();
    let future = log::tests::draft("rollout_shadow", serde_json::json!({}));
    registry.log().append(&future, applied.entry).await.unwrap();

    let state = registry.refresh().await.unwrap();
    assert_eq!(state.changes_stopped.as_ref().unwrap().kind, "rollout_shadow");
    assert_eq!(state.project("flights").unwrap().catalog(), &catalog("d1"));
    let error = registry.submit(&flights(), &Change::Apply(catalog("d2")), "ada", None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Refused(Refusal::ChangesStopped(_))), "{error}");
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn a_damaged_entry_keeps_the_last_fold_and_names_the_object() {
    let store = in_memory();
    let registry = open(&store).await;
    registry.submit(&flights(), &Change::Apply(catalog("d1")), "ada", None).await.unwrap();
    let body = log::tests::draft("model_deploy", serde_json::json!({"model": "delay"}));
    registry.log().append(&body, EntryNumber(1)).await.unwrap();
    for _ in 0..2 {
        let error = registry.refresh().await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "control log entry p/control/00000000000000000002.json is corrupt: its `model_deploy` body cannot be read: \
             missing field `version`; restore the object from a backup or another copy of the store"
        );
        assert_eq!(registry.state().head, EntryNumber(1));
    }
}

#[tokio::test]
async fn a_hole_in_the_log_is_found_on_start() {
    let store = in_memory();
    let registry = open(&store).await;
    for digest in ["d1", "d2", "d3"] {
        registry.submit(&flights(), &Change::Apply(catalog(digest)), "ada", None).await.unwrap();
    }
    store.delete(&registry.log().path(EntryNumber(2))).await.unwrap();
    let error = Registry::open(store.clone(), &Path::from("p"), clock()).await.err().unwrap();
    assert!(matches!(error, RegistryError::Log(LogError::Gap { .. })), "{error}");
}

/// A store that can be away, or can lose the answer to a put that it has done.
#[derive(Debug, Default)]
struct Unsteady {
    inner: InMemory,
    away: AtomicBool,
    loses_answers: AtomicBool,
}

impl Unsteady {
    fn failure() -> object_store::Error {
        object_store::Error::Generic { store: "unsteady", source: "connection reset".into() }
    }

    fn check(&self) -> object_store::Result<()> {
        if self.away.load(Ordering::Relaxed) { Err(Self::failure()) } else { Ok(()) }
    }
}

impl std::fmt::Display for Unsteady {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("unsteady")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Unsteady {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.check()?;
        let put = self.inner.put_opts(location, payload, options).await?;
        if self.loses_answers.load(Ordering::Relaxed) { Err(Self::failure()) } else { Ok(put) }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.check()?;
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.check()?;
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.check()?;
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.check()?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.check()?;
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn a_store_that_is_away_leaves_the_last_fold() {
    let unsteady = Arc::new(Unsteady::default());
    let store: Arc<dyn ObjectStore> = unsteady.clone();
    let registry = open(&store).await;
    let other = open(&store).await;
    registry.submit(&flights(), &Change::Apply(catalog("d1")), "ada", None).await.unwrap();

    unsteady.away.store(true, Ordering::Relaxed);
    let error = other.refresh().await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert_eq!(
        error.to_string(),
        "could not read p/control/00000000000000000001.json in the control log; \
         check that the store is there and try again"
    );
    let error = registry.submit(&flights(), &Change::Apply(catalog("d2")), "ada", None).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert_eq!(registry.state().project("flights").unwrap().catalog(), &catalog("d1"));

    unsteady.away.store(false, Ordering::Relaxed);
    assert_eq!(*other.refresh().await.unwrap(), *registry.state());
}

#[tokio::test]
async fn a_process_that_starts_while_the_store_is_away_begins_with_what_it_kept() {
    let unsteady = Arc::new(Unsteady::default());
    let store: Arc<dyn ObjectStore> = unsteady.clone();
    let prefix = Path::from("p");
    let registry = open(&store).await;
    registry.submit(&flights(), &Change::Apply(catalog("d1")), "ada", None).await.unwrap();
    let kept = registry.keep().unwrap();
    registry.submit(&flights(), &Change::Apply(catalog("d2")), "ada", None).await.unwrap();

    unsteady.away.store(true, Ordering::Relaxed);
    let opened = |kept: Option<Vec<u8>>| {
        let (store, prefix) = (store.clone(), prefix.clone());
        async move { Registry::open_or_kept(store, &prefix, clock(), kept.as_deref()).await }
    };
    assert!(opened(None).await.err().unwrap().is_retryable());
    let mut damaged = kept.clone();
    *damaged.iter_mut().rfind(|byte| **byte == b'1').unwrap() = b'2';
    assert!(opened(Some(damaged)).await.err().unwrap().is_retryable());
    let (late, why) = opened(Some(kept.clone())).await.unwrap();
    assert!(why.unwrap().is_retryable());
    assert_eq!(late.state().project("flights").unwrap().catalog(), &catalog("d1"));
    // Serving goes on, changes do not.
    assert!(late.submit(&flights(), &Change::Apply(catalog("d3")), "ada", None).await.unwrap_err().is_retryable());

    unsteady.away.store(false, Ordering::Relaxed);
    assert_eq!(*late.refresh().await.unwrap(), *registry.state());
    let (fresh, why) = opened(Some(kept)).await.unwrap();
    assert!(why.is_none());
    assert_eq!(*fresh.state(), *registry.state());
}

#[tokio::test]
async fn what_was_kept_of_another_log_is_given_up_when_the_store_is_back() {
    let other = open(&in_memory()).await;
    for digest in ["x1", "x2", "x3"] {
        other.submit(&flights(), &Change::Apply(catalog(digest)), "eve", None).await.unwrap();
    }
    let unsteady = Arc::new(Unsteady::default());
    let store: Arc<dyn ObjectStore> = unsteady.clone();
    let registry = open(&store).await;
    registry.submit(&flights(), &Change::Apply(catalog("d1")), "ada", None).await.unwrap();
    unsteady.away.store(true, Ordering::Relaxed);
    let kept = other.keep().unwrap();
    let (late, _) = Registry::open_or_kept(store, &Path::from("p"), clock(), Some(&kept)).await.unwrap();
    assert_eq!(late.state().head, EntryNumber(3));
    assert!(late.refresh().await.is_err());
    unsteady.away.store(false, Ordering::Relaxed);
    assert_eq!(*late.refresh().await.unwrap(), *registry.state());
}

#[tokio::test]
async fn a_put_whose_answer_is_lost_is_counted_once() {
    let unsteady = Arc::new(Unsteady::default());
    let store: Arc<dyn ObjectStore> = unsteady.clone();
    let registry = open(&store).await;
    unsteady.loses_answers.store(true, Ordering::Relaxed);
    for digest in ["d1", "d2"] {
        let receipt = registry.submit(&flights(), &Change::Apply(catalog(digest)), "ada", None).await.unwrap();
        assert_eq!(receipt.outcome, Outcome::Appended);
    }
    assert_eq!(registry.log().head().await.unwrap(), EntryNumber(2));
}

/// Two operators who have looked at the same state, over two registries: one advances the rollout, the other takes it back.
/// Whatever the order, the log holds both facts or one refusal with its reason, and both registries agree.
#[tokio::test]
async fn of_two_operators_at_once_one_is_told_why() {
    use crate::deployment::DeploymentChange;
    use crate::rollout::{End, Ending, Evidence, RolloutChange, Stage, Step};
    use crate::state::Refusal;
    use crate::state::tests::{begin_rollout, delay};
    for _ in 0..8 {
        let store = in_memory();
        let (first, second) = (open(&store).await, open(&store).await);
        first.submit(&flights(), &Change::Apply(catalog("d1")), "ada", None).await.unwrap();
        for (version, bytes) in (1..).zip(["a", "b"]) {
            let change = Change::RegisterModel(Box::new(model(bytes, "d1")));
            first.submit(&flights(), &change, "ada", None).await.unwrap();
            let prepared = first.submit(&flights(), &prepare(version), "ada", None).await.unwrap().entry;
            first.submit(&flights(), &activate(version, prepared.0), "ada", None).await.unwrap();
        }
        let begun = first.submit(&flights(), &begin_rollout(2, 1), "ada", Some("try it")).await.unwrap().entry;
        second.refresh().await.unwrap();

        let numbers = serde_json::json!({"rows": 6000});
        let evidence = Evidence { judged_on: begun, reasons: vec!["met".to_owned()], numbers };
        let (model, version, rollout) = (delay(), ModelVersion(2), begun);
        let (from, to) = (Stage::Shadow, Stage::Canary { step: 0, share: 2_500 });
        let step = Step { model: model.clone(), version, rollout, from, to, evidence: evidence.clone() };
        let end = End { model, version, rollout, ending: Ending::Abandoned, evidence };
        let change = |change| Change::Deployment(DeploymentChange::Rollout(change));
        let (step, end) = (change(RolloutChange::Step(step)), change(RolloutChange::End(end)));
        let (project, why) = (flights(), Some("too slow"));
        let (stepped, ended) =
            tokio::join!(first.submit(&project, &step, "gateway", None), second.submit(&project, &end, "bob", why));
        ended.unwrap();
        match stepped {
            Ok(receipt) => assert_eq!(receipt.entry, EntryNumber(begun.0 + 1)),
            Err(RegistryError::Refused(Refusal::Deployment(error))) => {
                assert!(error.to_string().contains("does not run any more: Abandoned"), "{error}");
            }
            Err(other) => panic!("{other}"),
        }
        let (left, right) = (first.refresh().await.unwrap(), second.refresh().await.unwrap());
        assert_eq!(*left, *right);
        assert_eq!(left.without_effect, 0);
        let deployment = &left.project("flights").unwrap().deployments["delay"];
        assert_eq!((deployment.rollout.clone(), deployment.champion_version()), (None, Some(ModelVersion(1))));
        let last = first.history(left.head, 1).await.unwrap().remove(0);
        assert_eq!((last.kind.as_str(), last.who.as_str(), last.why.as_deref()), ("rollout_end", "bob", why));
    }
}
