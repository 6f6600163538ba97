//! A server killed in the middle of pushes: nothing acknowledged is lost, nothing is counted twice.
//!
//! The test starts itself again as a child, which pushes as fast as it can and prints what was acknowledged, and kills it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::AsArray;
use feature_defs::time::{Micros, Position};
use futures::StreamExt;
use object_store::local::LocalFileSystem;
use offline_store::source::Sources;
use online_store::embedded::EmbeddedStore;

use super::world::*;
use crate::{Ingest, IngestOptions, Wait};

const FOLDER: &str = "COEVAL_TEST_KILL_FOLDER";

fn clock() -> Micros {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as Micros
}

async fn open(folder: &Path) -> Ingest {
    let store = folder.join("store");
    std::fs::create_dir_all(&store).unwrap();
    let mut options = IngestOptions::new(
        "test",
        folder.join("log"),
        Arc::new(LocalFileSystem::new_with_prefix(store).unwrap()),
        object_store::path::Path::default(),
        Arc::new(EmbeddedStore::open(folder.join("online")).unwrap()),
        Arc::new(Sources::new(folder).unwrap()),
        Arc::new(clock),
    );
    options.flush_after = Duration::from_millis(50);
    options.log.segment_bytes = 64 << 10;
    let ingest = Ingest::open(options).await.unwrap();
    ingest.adopt(compiled(STREAM)).await.unwrap();
    ingest
}

/// Not a test of its own: what the child does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let ingest = Arc::new(open(Path::new(&folder)).await);
    let run = clock();
    let pushers: Vec<_> = (0..4)
        .map(|pusher| {
            let ingest = ingest.clone();
            tokio::spawn(async move {
                for number in 0.. {
                    let ids: Vec<String> = (0..3).map(|row| format!("{run}-{pusher}-{number}-{row}")).collect();
                    let early = if number % 5 == 0 { 30_000 } else { 0 };
                    let sales: Vec<Sale> =
                        ids.iter().map(|id| sale(["a", "b"][pusher % 2], 1.0, id, clock() + early)).collect();
                    let wait = if number % 2 == 0 { Wait::Visible } else { Wait::Durable };
                    ingest.push("sales", batch(&sales), wait).await.unwrap();
                    std::io::stdout().write_all(format!("\nacked {}\n", ids.join(" ")).as_bytes()).unwrap();
                }
            })
        })
        .collect();
    for pusher in pushers {
        pusher.await.unwrap();
    }
}

#[test]
fn nothing_acknowledged_is_lost_or_doubled_by_sigkill() {
    if std::env::var(FOLDER).is_ok() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<String> = Vec::new();
    for round in 0..4 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::kill::child", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            let mut ids: Vec<String> = Vec::new();
            for line in lines.map_while(Result::ok) {
                if let Some(acked) = line.strip_prefix("acked ") {
                    ids.extend(acked.split(' ').map(str::to_owned));
                }
            }
            ids
        });
        std::thread::sleep(Duration::from_millis(900 + 137 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut ids = reader.join().unwrap();
        // The last line may have been cut; it was acknowledged, but its ids cannot be told.
        ids.truncate(ids.len() / 3 * 3);
        assert!(!ids.is_empty(), "round {round} pushed something");
        acknowledged.extend(ids.into_iter().filter(|id| id.split('-').count() == 4));
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(check(folder.path(), &acknowledged));
}

async fn check(folder: &Path, acknowledged: &[String]) {
    // Early events are at most 30 ms early.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let ingest = open(folder).await;
    for _ in 0..10_000 {
        ingest.wake();
        let status = ingest.status();
        if status.iter().all(|status| status.waiting_rows == 0 && status.early_rows == 0)
            && ingest.backfilling().is_empty()
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    ingest.shutdown().await.unwrap();
    drop(ingest);
    let plan = compiled(STREAM);
    let store = Arc::new(LocalFileSystem::new_with_prefix(folder.join("store")).unwrap());
    let history =
        offline_store::history::History::open(store, object_store::path::Path::from("test"), "sales").await.unwrap();
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    let mut last = Position::START;
    let mut scan = history.scan(plan.source("sales").unwrap(), None, Position::START);
    while let Some(events) = scan.next().await {
        let events = events.unwrap();
        for (row, position) in events.positions.iter().enumerate() {
            assert!(*position > last, "positions ascend and never repeat");
            last = *position;
            let id = events.batch.column_by_name("id").unwrap().as_string::<i32>().value(row).to_owned();
            *seen.entry(id).or_default() += 1;
        }
    }
    let lost: Vec<&String> = acknowledged.iter().filter(|id| !seen.contains_key(*id)).collect();
    assert!(
        lost.is_empty(),
        "{} of {} acknowledged events were lost: {:?}",
        lost.len(),
        acknowledged.len(),
        &lost[..3.min(lost.len())]
    );
    let doubled: Vec<_> = seen.iter().filter(|(_, count)| **count > 1).collect();
    assert!(doubled.is_empty(), "doubled: {doubled:?}");
    // Online, every event was counted once, however often it was replayed.
    let online = EmbeddedStore::open(folder.join("online")).unwrap();
    assert_eq!(online_count(&online, &plan).await, seen.len() as i64);
}

async fn online_count(online: &EmbeddedStore, plan: &feature_defs::plan::Plan) -> i64 {
    use feature_defs::plan::ViewPlanKind;
    use feature_defs::value::{Value, encode};
    use online_store::key::Generation;
    use online_store::tile::Layout;
    use online_store::{Answer, OnlineStore, Read};
    let view = plan.view("load").unwrap();
    let ViewPlanKind::Windowed { aggregates, windows, levels, outputs } = &view.kind else {
        panic!("load has windows")
    };
    let layout = Layout {
        aggregates: aggregates.iter().map(|aggregate| aggregate.aggregate.clone()).collect(),
        windows: windows.clone(),
        levels: levels.clone().unwrap(),
    };
    let n = outputs.iter().find(|output| output.name == "n_24h").unwrap();
    let generation = Generation::new("test", &view.name, view.storage_digest.as_str());
    let t = clock() + 1_000_000;
    let mut count = 0;
    for shop in ["a", "b"] {
        let mut entity = Vec::new();
        encode(&Value::String(shop.into()), &mut entity);
        let asked = layout.tiles_at(t);
        let answers = online.read(&[Read::Tiles(generation.key(entity), asked.clone())]).await.unwrap();
        let Answer::Tiles { position, tiles } = answers[0].clone() else { panic!("{answers:?}") };
        let present = asked.into_iter().zip(tiles).filter_map(|(id, tile)| Some((id, tile?)));
        let tiles = layout.decode_answer(position, present).unwrap();
        let values = layout.read(&tiles, &[(n.aggregate, n.window)], t).unwrap();
        let Value::Int64(n) = values[0] else { panic!("{values:?}") };
        count += n;
    }
    count
}
