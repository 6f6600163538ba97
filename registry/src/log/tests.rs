use std::collections::BTreeSet;

use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;

use super::*;

pub(crate) fn draft(kind: &str, body: serde_json::Value) -> Draft {
    Draft {
        id: EntryId::random(),
        at: "2026-07-01T12:00:00.123456Z".parse().unwrap(),
        project: ProjectName::try_new("flights").unwrap(),
        who: "ada".to_owned(),
        why: None,
        must_understand: true,
        kind: kind.to_owned(),
        body,
    }
}

fn in_memory() -> ControlLog {
    ControlLog::new(Arc::new(InMemory::new()), &Path::from("some/prefix"))
}

#[tokio::test]
async fn an_entry_is_stored_as_people_will_read_it() {
    let log = in_memory();
    let draft = Draft { why: Some("first".into()), ..draft("note", serde_json::json!({"text": "hello"})) };
    assert_eq!(log.append(&draft, EntryNumber::NONE).await.unwrap(), Append::Appended(EntryNumber(1)));

    let path = Path::from("some/prefix/control/00000000000000000001.json");
    let bytes = log.store().get(&path).await.unwrap().bytes().await.unwrap();
    let stored: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let expected = serde_json::json!({
        "format": 1,
        "number": 1,
        "id": draft.id.as_str(),
        "at": "2026-07-01T12:00:00.123456Z",
        "project": "flights",
        "who": "ada",
        "why": "first",
        "must_understand": true,
        "kind": "note",
        "body": {"text": "hello"},
    });
    assert_eq!(stored, expected);
}

#[tokio::test]
async fn an_append_on_an_old_head_is_told_the_new_one() {
    let log = in_memory();
    for head in 0..3 {
        log.append(&draft("note", head.into()), EntryNumber(head)).await.unwrap();
    }
    let late = log.append(&draft("note", "late".into()), EntryNumber(1)).await.unwrap();
    assert_eq!(late, Append::Conflict { head: EntryNumber(3) });
    assert_eq!(log.head().await.unwrap(), EntryNumber(3));
}

#[tokio::test]
async fn the_same_draft_again_is_known_as_its_own() {
    let log = in_memory();
    let draft = draft("note", 1.into());
    for _ in 0..2 {
        assert_eq!(log.append(&draft, EntryNumber::NONE).await.unwrap(), Append::Appended(EntryNumber(1)));
    }
    assert_eq!(log.head().await.unwrap(), EntryNumber(1));
}

#[tokio::test]
async fn an_append_after_a_head_that_is_not_there_leaves_no_hole() {
    let log = in_memory();
    let error = log.append(&draft("note", 1.into()), EntryNumber(7)).await.unwrap_err();
    assert!(matches!(error, LogError::Gap { .. }), "{error}");
    assert_eq!(log.head().await.unwrap(), EntryNumber::NONE);
}

#[tokio::test]
async fn an_entry_above_four_mebibytes_is_refused() {
    let log = in_memory();
    let large = "x".repeat(4 << 20);
    let error = log.append(&draft("apply", large.into()), EntryNumber::NONE).await.unwrap_err();
    assert!(matches!(error, LogError::TooLarge { limit: 4_194_304, .. }), "{error}");
    assert!(error.to_string().starts_with("the `apply` entry has 4194"), "{error}");
    assert!(!error.is_retryable());
    assert_eq!(log.head().await.unwrap(), EntryNumber::NONE);

    let fits = "x".repeat((4 << 20) - 1024);
    assert_eq!(
        log.append(&draft("apply", fits.into()), EntryNumber::NONE).await.unwrap(),
        Append::Appended(EntryNumber(1))
    );
    assert_eq!(log.read(EntryNumber(1)).await.unwrap().unwrap().body.as_str().unwrap().len(), (4 << 20) - 1024);
}

#[tokio::test]
async fn a_tail_hands_out_every_entry_once_in_order() {
    let log = in_memory();
    let mut tail = log.tail(EntryNumber::NONE);
    assert_eq!(tail.poll(10).await.unwrap(), []);
    for head in 0..100 {
        log.append(&draft("note", head.into()), EntryNumber(head)).await.unwrap();
    }
    let mut seen = Vec::new();
    loop {
        let entries = tail.poll(33).await.unwrap();
        assert!(entries.len() <= 33);
        if entries.is_empty() {
            break;
        }
        seen.extend(entries.iter().map(|entry| entry.body.as_u64().unwrap()));
    }
    assert_eq!(seen, (0..100).collect::<Vec<_>>());
    log.append(&draft("note", 100.into()), EntryNumber(100)).await.unwrap();
    assert_eq!(tail.poll(33).await.unwrap().len(), 1);
    assert_eq!(tail.read(), EntryNumber(101));
}

#[tokio::test]
async fn damaged_entries_name_their_object() {
    let check = async |bytes: &str, expected: &str| {
        let log = in_memory();
        let path = log.path(EntryNumber(1));
        log.store().put(&path, bytes.to_owned().into()).await.unwrap();
        let error = log.read_from(EntryNumber(1), 10).await.unwrap_err();
        assert!(matches!(error, LogError::Corrupt { .. }), "{error}");
        assert_eq!(
            error.to_string(),
            format!(
                "control log entry some/prefix/control/00000000000000000001.json is corrupt: {expected}; \
                 restore the object from a backup or another copy of the store"
            )
        );
    };
    check("", "EOF while parsing a value at line 1 column 0").await;
    check("{}", "missing field `format` at line 1 column 2").await;
    check(r#"{"format": 1}"#, "missing field `number` at line 1 column 13").await;
    check(
        r#"{"format":1,"number":2,"id":"a","at":"2026-01-01T00:00:00Z","project":"p","who":"w","must_understand":true,"kind":"k","body":null}"#,
        "it says that it is entry 2",
    )
    .await;
}

#[tokio::test]
async fn a_missing_entry_before_later_ones_is_found() {
    let log = in_memory();
    for head in 0..9 {
        log.append(&draft("note", head.into()), EntryNumber(head)).await.unwrap();
    }
    log.store().delete(&log.path(EntryNumber(6))).await.unwrap();
    for error in [log.head().await.unwrap_err(), log.read_from(EntryNumber(1), 100).await.unwrap_err()] {
        assert!(matches!(&error, LogError::Gap { missing } if *missing == log.path(EntryNumber(6))), "{error}");
    }
}

#[tokio::test]
async fn an_envelope_from_the_future_must_be_understood() {
    let log = in_memory();
    let bytes = r#"{"format": 2, "everything": "else"}"#;
    log.store().put(&log.path(EntryNumber(1)), bytes.into()).await.unwrap();
    let entry = log.read(EntryNumber(1)).await.unwrap().unwrap();
    assert_eq!((entry.format, entry.must_understand, entry.number), (2, true, EntryNumber(1)));
}

#[tokio::test]
async fn envelope_fields_of_later_builds_are_ignored() {
    let log = in_memory();
    let bytes = r#"{"format":1,"number":1,"id":"a","at":"2026-01-01T02:00:00+02:00","project":"p","who":"w","signed":"x","must_understand":false,"kind":"k","body":null}"#;
    log.store().put(&log.path(EntryNumber(1)), bytes.into()).await.unwrap();
    let entry = log.read(EntryNumber(1)).await.unwrap().unwrap();
    assert_eq!(entry.at, "2026-01-01T00:00:00Z".parse::<DateTime<Utc>>().unwrap());
    assert_eq!(entry.why, None);
}

/// Many writers, each with a log of its own over one store: every append gets a number of its own, and every reader sees
/// them all in the same order.
async fn race(stores: Vec<Arc<dyn ObjectStore>>) {
    const APPENDS_EACH: usize = 15;
    let prefix = Path::from("p");
    let tasks: Vec<_> = stores
        .iter()
        .enumerate()
        .map(|(writer, store)| {
            let log = ControlLog::new(store.clone(), &prefix);
            tokio::spawn(async move {
                let mut head = EntryNumber::NONE;
                let mut mine = Vec::new();
                for nth in 0..APPENDS_EACH {
                    let draft = draft("note", serde_json::json!([writer, nth]));
                    loop {
                        match log.append(&draft, head).await.unwrap() {
                            Append::Appended(number) => {
                                head = number;
                                mine.push((number, draft.body.clone()));
                                break;
                            }
                            Append::Conflict { head: newer } => {
                                assert!(newer > head, "a conflict means that the log has grown");
                                head = newer;
                            }
                        }
                    }
                }
                mine
            })
        })
        .collect();
    let mut appended = Vec::new();
    for task in tasks {
        appended.extend(task.await.unwrap());
    }
    appended.sort_by_key(|(number, _)| *number);

    let count = stores.len() * APPENDS_EACH;
    let numbers: BTreeSet<u64> = appended.iter().map(|(number, _)| number.0).collect();
    assert_eq!(numbers, (1..=count as u64).collect());
    for store in [&stores[0], &stores[stores.len() - 1]] {
        let log = ControlLog::new(store.clone(), &prefix);
        let entries = log.read_from(EntryNumber::FIRST, count + 1).await.unwrap();
        let seen: Vec<_> = entries.into_iter().map(|entry| (entry.number, entry.body)).collect();
        assert_eq!(seen, appended);
        assert_eq!(log.head().await.unwrap(), EntryNumber(count as u64));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_writers_lose_nothing_in_memory() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    race(vec![store; 8]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_writers_lose_nothing_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let stores = (0..8)
        .map(|_| Arc::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap()) as Arc<dyn ObjectStore>)
        .collect();
    race(stores).await;
}
