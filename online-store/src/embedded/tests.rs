use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;
use crate::conformance;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let folder = tempfile::tempdir().unwrap();
    let store: Arc<dyn OnlineStore> = Arc::new(EmbeddedStore::open(folder.path()).unwrap());
    conformance::run(store.clone(), "first").await;
    drop(store);
    // Once more over what the first run left, which now comes from the journal.
    let store = Arc::new(EmbeddedStore::open(folder.path()).unwrap());
    conformance::run(store, "second").await;
}

const ENTITIES: u64 = 2_000;

fn writes() -> Vec<Write> {
    let views = [Generation::new("p", "now", "0123456789abcdef"), Generation::new("p", "load", "0123456789abcdef")];
    let mut writes = Vec::new();
    for number in 0..ENTITIES {
        let [row, tiles] = [&views[0], &views[1]].map(|view| view.key(number.to_be_bytes()));
        writes.push(Write::Row {
            key: row,
            blob: conformance::row(number as i64, None, number, "value"),
            expires: None,
        });
        writes.push(Write::Tiles {
            key: tiles,
            position: Position { time: 1, sequence: number },
            set: vec![(TileId { level: 60, start: number as i64 * 60 }, Bytes::from(vec![7; 300]))],
            remove: vec![],
            epoch: 0,
            expires: None,
        });
    }
    writes.push(Write::Fact("checkpoint".to_owned(), Some(Bytes::from_static(b"4000"))));
    writes
}

fn expected_reads() -> Vec<Read> {
    let read = |write| match write {
        Write::Row { key, .. } | Write::Remove(key) => Read::Row(key),
        Write::Tiles { key, .. } => Read::AllTiles(key),
        Write::Fact(name, _) => Read::Fact(name),
        Write::Mark(name, _) => Read::Mark(name),
    };
    writes().into_iter().map(read).collect()
}

/// Run by the next test in a process of its own, which never ends by itself.
#[tokio::test]
#[ignore = "the victim of a_killed_process_loses_nothing_synced"]
async fn victim() {
    let Ok(folder) = std::env::var("COEVAL_TEST_VICTIM_FOLDER") else { return };
    let store = EmbeddedStore::open(folder).unwrap();
    store.write(writes()).await.unwrap();
    store.sync().await.unwrap();
    eprintln!("synced");
    std::future::pending().await
}

#[tokio::test]
async fn a_killed_process_loses_nothing_synced() {
    let folder = tempfile::tempdir().unwrap();
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "embedded::tests::victim", "--ignored", "--nocapture"])
        .env("COEVAL_TEST_VICTIM_FOLDER", folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(victim.stderr.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "synced"), "the victim ended early");

    let error = EmbeddedStore::open(folder.path()).err().expect("the victim holds the folder");
    let text = error.to_string();
    assert!(text.contains("another `coeval serve` uses this folder"), "{text}");
    assert!(text.contains(&folder.path().display().to_string()), "{text}");

    victim.kill().unwrap(); // SIGKILL
    victim.wait().unwrap();
    let store = EmbeddedStore::open(folder.path()).unwrap();
    let memory = crate::memory::MemoryStore::new();
    memory.write(writes()).await.unwrap();
    let reads = expected_reads();
    assert_eq!(store.read(&reads).await.unwrap(), memory.read(&reads).await.unwrap());
    assert_eq!(store.write(writes()).await.unwrap(), WriteOutcome { applied: 1, stale: 2 * ENTITIES });
}

#[tokio::test]
async fn a_call_larger_than_a_batch_sees_its_own_writes() {
    let folder = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(folder.path()).unwrap();
    let key = Generation::new("p", "v", "00").key(*b"e");
    // Each write is 1 MiB, so the call is committed in several batches, and later writes meet earlier ones in both.
    let writes = (0..20).map(|number| Write::Tiles {
        key: key.clone(),
        position: Position { time: 0, sequence: number / 2 },
        set: vec![(TileId { level: 60, start: 60 * (number % 4) as i64 }, Bytes::from(vec![number as u8; 1 << 20]))],
        remove: vec![],
        epoch: 0,
        expires: None,
    });
    let outcome = store.write(writes.collect()).await.unwrap();
    assert_eq!(outcome, WriteOutcome { applied: 10, stale: 10 });
    let answers = store.read(&[Read::AllTiles(key)]).await.unwrap();
    let Answer::AllTiles { position, tiles } = &answers[0] else { panic!("{answers:?}") };
    assert_eq!(*position, Some(Position { time: 0, sequence: 9 }));
    let tiles: Vec<_> = tiles.iter().map(|(id, tile)| (id.start, tile[0])).collect();
    assert_eq!(tiles, [(0, 16), (120, 18)]);
}

#[tokio::test]
async fn many_entities_are_removed_in_steps() {
    let folder = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(folder.path()).unwrap();
    store.write(writes()).await.unwrap();
    let removed = store.remove_generation(&Generation::new("p", "load", "0123456789abcdef")).await.unwrap();
    assert_eq!(removed, ENTITIES);
    assert_eq!(store.inner.tiles.len().unwrap(), 0);
    assert_eq!(store.inner.headers.len().unwrap(), 0);
    assert_eq!(store.inner.rows.len().unwrap(), ENTITIES as usize);
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, b"in the way").unwrap();
    let text = EmbeddedStore::open(file.join("store")).err().unwrap().to_string();
    assert!(text.contains("file/store"), "{text}");
}

/// Whether any file of a folder has a text in it, as it is.
fn is_in_files(folder: &Path, text: &str) -> bool {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.into_iter().any(|path| match path.is_dir() {
        true => is_in_files(&path, text),
        // A table may go while they are looked through.
        false => std::fs::read(&path).unwrap_or_default().windows(text.len()).any(|window| window == text.as_bytes()),
    })
}

/// Threads of the database may hold replaced tables for a moment.
fn is_gone_from_files(folder: &Path, text: &str) -> bool {
    (0..100).any(|_| {
        let is_gone = !is_in_files(folder, text);
        if !is_gone {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        is_gone
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_removed_is_purged_from_the_files() {
    const GONE: &str = "KEY-TO-BE-FORGOTTEN-7351";
    let folder = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(folder.path()).unwrap();
    store.write(writes()).await.unwrap();
    let views = [Generation::new("p", "now", "0123456789abcdef"), Generation::new("p", "load", "0123456789abcdef")];
    let [row, tiles] = views.map(|view| view.key(GONE.as_bytes()));
    let write_both = async || {
        let blob = conformance::row(1, None, 1, "value");
        let (position, tile) = (Position { time: 1, sequence: 1 }, TileId { level: 60, start: 60 });
        let set = vec![(tile, Bytes::from_static(b"tile"))];
        let tiles = Write::Tiles { key: tiles.clone(), position, set, remove: vec![], epoch: 0, expires: None };
        store.write(vec![Write::Row { key: row.clone(), blob, expires: None }, tiles]).await.unwrap();
    };
    write_both().await;
    store.sync().await.unwrap();
    assert!(is_in_files(folder.path(), GONE));
    store.write(vec![Write::Remove(row.clone()), Write::Remove(tiles.clone())]).await.unwrap();
    store.sync().await.unwrap();
    assert!(is_in_files(folder.path(), GONE), "removing alone leaves it in the journal");
    let before = store.read(&expected_reads()).await.unwrap();
    assert!(store.purge().await.unwrap());
    assert!(is_gone_from_files(folder.path(), GONE));
    assert_eq!(store.read(&expected_reads()).await.unwrap(), before);
    // Once more, now that tables have it too; and a store that is opened again has everything else.
    write_both().await;
    store.purge().await.unwrap();
    assert!(is_in_files(folder.path(), GONE), "what is there stays");
    store.write(vec![Write::Remove(row), Write::Remove(tiles)]).await.unwrap();
    store.purge().await.unwrap();
    assert!(is_gone_from_files(folder.path(), GONE));
    drop(store);
    let store = EmbeddedStore::open(folder.path()).unwrap();
    assert_eq!(store.read(&expected_reads()).await.unwrap(), before);
    assert!(is_gone_from_files(folder.path(), GONE));
}
