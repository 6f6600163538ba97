//! The serving log of a real server: killed while it writes, with an object store that does not take it, and asked to forget.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::AsArray;
use feature_defs::time::Micros;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use offline_store::serving_log::{self, Losses, Minute};
use proto::v1;
use proto::v1::control_client::ControlClient;
use proto::v1::gateway_client::GatewayClient;
use tests::Project;
use tests::column::strings;
use tonic::transport::Channel;

use crate::process::Process;

const SETTINGS: &str =
    "project: logged\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\nserving_log: {sample: 100%, flush: 1s}\n";

const DEFINITIONS: &str = r#"
entities:
  - {name: thing, keys: [{name: thing, type: string}]}
sources:
  - name: sightings
    stream: true
    schema: [{name: thing, type: string}, {name: size, type: float64}]
    event_time: seen_at
feature_views:
  - {name: last, entity: thing, source: sightings, features: [{name: size, type: float64}]}
feature_services:
  - {name: things, features: ["last:*"]}
"#;

const SERVICE: &str = "things";
/// A flush, and what a busy machine may add to it.
const LOST_AT_MOST: Duration = Duration::from_secs(4);

async fn ask(channel: &Channel, thing: &str) {
    let request = v1::GetFeaturesRequest {
        project: "logged".into(),
        what: Some(v1::get_features_request::What::Service(SERVICE.into())),
        rows: vec![strings("thing", &[Some(thing)])],
        ..v1::GetFeaturesRequest::default()
    };
    GatewayClient::new(channel.clone()).get_features(request).await.unwrap();
}

fn objects(project: &Project) -> (Arc<dyn ObjectStore>, ObjectPath) {
    let store = LocalFileSystem::new_with_prefix(project.path().join(".coeval")).unwrap();
    (Arc::new(store), ObjectPath::from("logged"))
}

/// How often each thing is in the log.
async fn logged(project: &Project) -> BTreeMap<String, usize> {
    let (store, root) = objects(project);
    let mut found = BTreeMap::new();
    for file in serving_log::files(&store, &root, SERVICE, Micros::MIN, Micros::MAX).await.unwrap() {
        let rows = serving_log::read(&store, &file).await.unwrap().unwrap();
        let things = rows.batch.column_by_name("in:thing").unwrap().as_string::<i32>().clone();
        for thing in things.iter().flatten() {
            *found.entry(thing.to_owned()).or_default() += 1;
        }
    }
    found
}

async fn accounts(project: &Project) -> Vec<Losses> {
    let (store, root) = objects(project);
    let today = chrono::Utc::now().date_naive();
    let yesterday = today.pred_opt().unwrap();
    serving_log::losses(&store, &root, SERVICE, yesterday, today).await.unwrap()
}

async fn wait_for<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_loses_at_most_one_flush_and_doubles_nothing() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let (mut answered, mut must_be_there) = (BTreeSet::new(), BTreeSet::new());
    for life in 0..2 {
        let process = Process::start_with(project.path(), &[]).await;
        let begun = Instant::now();
        let mut asked: Vec<(String, Instant)> = Vec::new();
        while begun.elapsed() < LOST_AT_MOST + Duration::from_secs(2) {
            let thing = format!("{life}-{}", asked.len());
            ask(&process.channel(), &thing).await;
            asked.push((thing, Instant::now()));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let killed = Instant::now();
        // SIGKILL.
        drop(process);
        let old = asked.iter().filter(|(_, at)| killed.duration_since(*at) > LOST_AT_MOST);
        must_be_there.extend(old.map(|(thing, _)| thing.clone()));
        answered.extend(asked.into_iter().map(|(thing, _)| thing));
    }
    assert!(must_be_there.len() > 100, "{}", must_be_there.len());
    // What the killed ones left on disk goes up with the next one, which ends in good order.
    let mut process = Process::start_with(project.path(), &[]).await;
    ask(&process.channel(), "last").await;
    answered.insert("last".to_owned());
    must_be_there.insert("last".to_owned());
    process.terminate();
    assert_eq!(process.exit_code(Duration::from_secs(60)).await, Some(0));
    let logged = logged(&project).await;
    let missing: Vec<&String> = must_be_there.iter().filter(|thing| !logged.contains_key(*thing)).collect();
    assert!(
        missing.is_empty(),
        "{} rows older than a flush are lost: {:?}",
        missing.len(),
        &missing[..missing.len().min(5)]
    );
    assert!(logged.iter().all(|(thing, times)| *times == 1 && answered.contains(thing)));
    // The accounts say who ended, and what each knew of when it was killed.
    let accounts = accounts(&project).await;
    let incarnations: BTreeMap<&str, bool> =
        accounts.iter().map(|account| (account.incarnation.as_str(), account.ended)).collect();
    assert_eq!(incarnations.len(), 3);
    assert_eq!(incarnations.values().filter(|ended| **ended).count(), 1);
    let mut total = Minute::default();
    accounts.iter().for_each(|account| total.add(&account.total()));
    assert_eq!(total.lost(), 0);
    assert!(total.written as usize <= logged.len());
    let own: u64 = accounts.iter().filter(|account| account.ended).map(|account| account.total().written).sum();
    assert_eq!(own, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_store_that_does_not_take_the_log_delays_nobody_and_loses_nothing() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    // Where the folder should be there is a file: nothing can be put below it, and everything else of the store works.
    let place = project.path().join(".coeval/logged/serving-log");
    std::fs::write(&place, b"in the way").unwrap();
    let process = Process::start_with(project.path(), &[]).await;
    let mut slowest = Duration::ZERO;
    for thing in 0..500 {
        let begun = Instant::now();
        ask(&process.channel(), &format!("t{thing}")).await;
        slowest = slowest.max(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    let spool = project.path().join(".coeval/local/logged/serving-log");
    wait_for("files wait on disk", || async { count(&spool) > 0 }).await;
    std::fs::remove_file(&place).unwrap();
    wait_for("everything is uploaded", || async { logged(&project).await.len() == 500 }).await;
    wait_for("the disk is free again", || async { count(&spool) == 0 }).await;
    drop(process);
}

/// Parquet files below a folder.
fn count(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let of = |path: std::path::PathBuf| match path.is_dir() {
        true => count(&path),
        false => usize::from(path.extension().is_some_and(|extension| extension == "parquet")),
    };
    entries.map(|entry| of(entry.path())).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_entity_is_in_no_log() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let process = Process::start_with(project.path(), &[]).await;
    for thing in ["ada", "bob", "ada"] {
        ask(&process.channel(), thing).await;
    }
    wait_for("the log is there", || async { logged(&project).await.values().sum::<usize>() == 3 }).await;
    // One more waits in memory or on disk when the server is told.
    ask(&process.channel(), "ada").await;
    let request = v1::ForgetRequest {
        project: "logged".into(),
        entity: "thing".into(),
        keys: vec![strings("thing", &[Some("ada")])],
        who: "eve".into(),
        why: "asked for".into(),
        ..v1::ForgetRequest::default()
    };
    let mut progress = ControlClient::new(process.channel()).forget(request).await.unwrap().into_inner();
    let mut removed = 0;
    while let Some(step) = progress.message().await.unwrap() {
        let places = step.result.into_iter().flat_map(|result| result.places);
        removed += places.filter(|place| place.kind == "serving log").map(|place| place.rows_removed).sum::<u64>();
    }
    assert_eq!(removed, 2);
    ask(&process.channel(), "carl").await;
    wait_for("what came after is there", || async { logged(&project).await.contains_key("carl") }).await;
    let left: Vec<String> = logged(&project).await.into_keys().collect();
    assert_eq!(left, ["bob", "carl"]);
}
