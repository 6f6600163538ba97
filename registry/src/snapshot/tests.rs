use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::memory::InMemory;

use super::*;
use crate::log::{Append, Draft};
use crate::state::{Change, Judgement};

/// Folds one entry at a time from the beginning: what every snapshot is measured by.
async fn fold(log: &ControlLog) -> State {
    let mut state = State::default();
    for entry in log.read_from(EntryNumber::FIRST, usize::MAX).await.unwrap() {
        state.apply(&entry).unwrap();
    }
    state
}

async fn log_with(entries: u64) -> (ControlLog, Vec<State>) {
    let log = ControlLog::new(Arc::new(InMemory::new()) as Arc<dyn ObjectStore>, &Path::from("p"));
    let mut state = State::default();
    let mut states = vec![state.clone()];
    for nth in 0..entries {
        use crate::state::tests::{catalog, flights, model, prepare};
        let change = match nth % 3 {
            0 => Change::Apply(catalog(&format!("d{nth}"))),
            1 => Change::RegisterModel(Box::new(model(&format!("bytes{nth}"), &format!("d{}", nth - 1)))),
            _ => prepare((nth / 3 + 1) as u32),
        };
        let Judgement::Append { kind, must_understand, body, .. } = state.judge(&flights(), &change).unwrap() else {
            panic!("every one of these changes something");
        };
        let draft = Draft { must_understand, ..crate::log::tests::draft(kind, body) };
        assert_eq!(log.append(&draft, state.head).await.unwrap(), Append::Appended(state.head.next()));
        state.apply(&log.read(state.head.next()).await.unwrap().unwrap()).unwrap();
        states.push(state.clone());
    }
    (log, states)
}

#[tokio::test]
async fn the_fold_from_a_snapshot_is_the_fold_from_the_log() {
    let (log, states) = log_with(60).await;
    let whole = fold(&log).await;
    assert_eq!(whole, states[60]);
    for state in &states[1..] {
        write(&log, state).await.unwrap();
        let mut from_snapshot = load_one(&log, state.head).await.unwrap().unwrap();
        assert_eq!(&from_snapshot, state);
        for entry in log.read_from(state.head.next(), usize::MAX).await.unwrap() {
            from_snapshot.apply(&entry).unwrap();
        }
        assert_eq!(from_snapshot, whole);
    }
    assert_eq!(load(&log).await.unwrap(), whole);
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_trusted_gives_way_to_the_one_before() {
    let (log, states) = log_with(6).await;
    let newest = path(&log, EntryNumber(6));
    for number in [3, 6] {
        write(&log, &states[number]).await.unwrap();
    }
    assert_eq!(load(&log).await.unwrap(), states[6]);
    let good: Bytes = log.store().get(&newest).await.unwrap().bytes().await.unwrap();
    let text = std::str::from_utf8(&good).unwrap();
    let elsewhere: Bytes = {
        let (other, states) = log_with(6).await;
        write(&other, &states[6]).await.unwrap();
        other.store().get(&newest).await.unwrap().bytes().await.unwrap()
    };
    let damaged = [
        ("cut", good.slice(..good.len() / 2)),
        ("empty", Bytes::new()),
        ("another number", text.replace("\"number\":6", "\"number\":5").into()),
        ("another fold", text.replace("\"fold\":4", "\"fold\":2").into()),
        ("a changed name", text.replace("\"who\":\"ada\"", "\"who\":\"bob\"").into()),
        ("of another log", elsewhere),
    ];
    for (what, bytes) in damaged {
        assert_ne!(bytes, good, "{what}");
        log.store().put(&newest, bytes.into()).await.unwrap();
        assert_eq!(load(&log).await.unwrap(), states[3], "{what}");
    }
    for number in [3, 6] {
        log.store().delete(&path(&log, EntryNumber(number))).await.unwrap();
    }
    assert_eq!(load(&log).await.unwrap(), State::default());
}

#[test]
fn snapshots_are_due_every_256_entries_unless_changes_stopped() {
    #[track_caller]
    fn check(head: u64, stopped: bool, expected: bool) {
        let stopped = stopped.then(|| crate::state::ChangesStopped { entry: EntryNumber(1), kind: "x".into() });
        let state = State { head: EntryNumber(head), changes_stopped: stopped, ..State::default() };
        assert_eq!(is_due(&state), expected, "{head}");
    }
    check(0, false, false);
    check(255, false, false);
    check(256, false, true);
    check(512, false, true);
    check(512, true, false);
}
