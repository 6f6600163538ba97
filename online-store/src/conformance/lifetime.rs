//! How things end, and who may write them: expiry, removal, epochs, marks.

use super::*;

/// Before and after every clock. What expires in the past may be forgotten at once or when it is collected.
const PAST: Option<Micros> = Some(1_000_000);
const FUTURE: Option<Micros> = Some(4_102_444_800_000_000);
/// Between the two, and before the clock of any machine that runs this.
const NOW: Micros = 1_700_000_000_000_000;

/// Writes to one entity, with their expiry, and what is left of it.
type Case<W, L> = (&'static [(W, Option<Micros>)], L);

pub(super) async fn rows_expire_with_the_one_that_stays(store: &dyn OnlineStore, tag: &str) {
    // (event time, expiry) of writes to one entity, and the event time of the row that is left.
    let cases: [Case<i64, Option<i64>>; 13] = [
        (&[(1, PAST)], None),
        (&[(1, FUTURE)], Some(1)),
        (&[(1, None)], Some(1)),
        // A stale row changes nothing.
        (&[(2, FUTURE), (1, PAST)], Some(2)),
        (&[(2, None), (1, PAST)], Some(2)),
        (&[(2, FUTURE), (1, None)], Some(2)),
        // The same row again: the later expiry.
        (&[(2, FUTURE), (2, PAST)], Some(2)),
        (&[(2, PAST), (2, FUTURE)], Some(2)),
        (&[(2, None), (2, PAST)], Some(2)),
        (&[(2, PAST), (2, None)], Some(2)),
        // A later row brings its own.
        (&[(1, FUTURE), (2, PAST)], None),
        (&[(1, None), (2, PAST)], None),
        (&[(1, FUTURE), (2, FUTURE), (1, PAST), (3, None)], Some(3)),
    ];
    let view = generation(tag, "expiring");
    let key = |number: usize| view.key([number as u8]);
    for (number, (writes, _)) in cases.iter().enumerate() {
        for (turn, (event_time, expires)) in writes.iter().enumerate() {
            // The position grows with every write, so that each changes something.
            let position = Position { time: 0, sequence: 1 + turn as u64 };
            let blob = encode(*event_time, Some(9), Position { sequence: 0, ..position }, Some("value"));
            let blob = with_position(&blob, position);
            write(store, vec![Write::Row { key: key(number), blob, expires: *expires }]).await;
        }
    }
    let gone = cases.iter().filter(|(_, left)| left.is_none()).count() as u64;
    let collected = store.collect_expired(NOW).await.expect("what expired is collected");
    assert!(collected == 0 || collected >= gone, "{collected}");
    assert_eq!(store.collect_expired(NOW).await.expect("what expired is collected"), 0, "again");
    for (number, (writes, left)) in cases.iter().enumerate() {
        let row = read_row(store, &key(number)).await.map(|blob| decode(&blob));
        assert_eq!(row.as_ref().map(|row| row.times.event_time), *left, "{writes:?}");
        if let Some(row) = row {
            assert_eq!(row.times.position.sequence, writes.len() as u64, "{writes:?}");
        }
        // Whether it expired or not, it can be written again and then stays.
        write(store, vec![Write::Row { key: key(number), blob: row_blob(9), expires: FUTURE }]).await;
    }
    store.collect_expired(NOW).await.expect("what expired is collected");
    for number in 0..cases.len() {
        let kept = read_row(store, &key(number)).await.expect("it has not expired");
        assert_eq!(decode(&kept).times.event_time, 9);
    }
}

fn row_blob(event_time: i64) -> Bytes {
    row(event_time, None, 0, "value")
}

/// The same row, applied at another position.
fn with_position(blob: &[u8], position: Position) -> Bytes {
    let mut bytes = blob.to_vec();
    bytes[row::POSITION_AT..row::POSITION_AT + 16].copy_from_slice(&row::encode_position(position));
    bytes.into()
}

pub(super) async fn tiles_expire_with_the_latest_expiry(store: &dyn OnlineStore, tag: &str) {
    let cases: [Case<u64, bool>; 9] = [
        (&[(1, PAST)], false),
        (&[(1, FUTURE)], true),
        (&[(1, None)], true),
        (&[(1, FUTURE), (2, PAST)], true),
        (&[(2, FUTURE), (1, PAST)], true),
        (&[(2, None), (1, PAST)], true),
        (&[(1, FUTURE), (2, None)], true),
        (&[(1, None), (2, PAST)], false),
        (&[(1, PAST), (2, FUTURE)], true),
    ];
    let view = generation(tag, "expiring_tiles");
    let key = |number: usize| view.key([number as u8]);
    for (number, (writes, _)) in cases.iter().enumerate() {
        for (position, expires) in writes.iter() {
            let set = vec![(tile(60 * *position as i64), Bytes::from_static(b"tile"))];
            let (position, expires) = (at(*position), *expires);
            let tiles = Write::Tiles { key: key(number), position, epoch: 1, set, remove: vec![], expires };
            write(store, vec![tiles]).await;
        }
    }
    store.collect_expired(NOW).await.expect("what expired is collected");
    for (number, (writes, stays)) in cases.iter().enumerate() {
        let (position, tiles) = read_all(store, &key(number)).await;
        let last = writes.iter().map(|(position, _)| at(*position)).max();
        assert_eq!(position, last.filter(|_| *stays), "{writes:?}");
        assert_eq!(tiles.is_empty(), !stays, "{writes:?}");
        if !stays {
            // It begins anew: with any position, by any writer, and without the tiles it had.
            let set = vec![(tile(0), Bytes::from_static(b"new"))];
            let (key, position) = (key(number), Position::START);
            let again =
                Write::Tiles { key: key.clone(), position, epoch: 0, set: set.clone(), remove: vec![], expires: None };
            assert_eq!(write(store, vec![again]).await, all(1));
            assert_eq!(read_all(store, &key).await, (Some(Position::START), set));
        }
    }
}

pub(super) async fn a_replaced_writer_is_fenced(store: &dyn OnlineStore, tag: &str) {
    let key = generation(tag, "fenced").key(*b"e");
    let other = generation(tag, "fenced").key(*b"other");
    let change = |key: &Key, epoch: u64, position: u64, content: &str| Write::Tiles {
        key: key.clone(),
        position: at(position),
        epoch,
        set: vec![(tile(0), Bytes::from(content.to_owned()))],
        remove: vec![],
        expires: None,
    };
    let content = |text: &'static str| vec![(tile(0), Bytes::from_static(text.as_bytes()))];
    assert_eq!(write(store, vec![change(&key, 5, 10, "five")]).await, all(1));
    for position in [9, 10, 11] {
        let fact = Write::Fact(format!("{tag}/behind a fenced write"), Some(Bytes::from_static(b"1")));
        let mark = Write::Mark(format!("{tag}/behind a fenced write"), at(position));
        let writes = vec![change(&key, 4, position, "four"), fact, mark];
        let error = store.write(writes).await.expect_err("the writer was replaced");
        assert!(matches!(error, StoreError::Fenced { epoch: 4, newest: 5, .. }), "{error}");
        assert!(!error.is_retryable(), "{error}");
    }
    let behind = format!("{tag}/behind a fenced write");
    let reads = [Read::Fact(behind.clone()), Read::Mark(behind)];
    assert_eq!(read(store, &reads).await, [Answer::Fact(None), Answer::Mark(None)], "they stood behind a failure");
    assert_eq!(read_all(store, &key).await, (Some(at(10)), content("five")));
    assert_eq!(write(store, vec![change(&other, 0, 1, "other")]).await, all(1), "epochs belong to entities");

    // What is stale changes nothing, so it fences nobody.
    assert_eq!(write(store, vec![change(&key, 7, 10, "stale")]).await, none(1));
    assert_eq!(write(store, vec![change(&key, 5, 11, "five again")]).await, all(1));
    assert_eq!(write(store, vec![change(&key, 1 << 40, 12, "later")]).await, all(1));
    assert_eq!(write(store, vec![change(&key, u64::MAX, 13, "last")]).await, all(1));
    let error = store.write(vec![change(&key, u64::MAX - 1, 14, "late")]).await.expect_err("the writer was replaced");
    assert!(matches!(error, StoreError::Fenced { newest: u64::MAX, .. }), "{error}");
    assert_eq!(read_all(store, &key).await, (Some(at(13)), content("last")));
}

pub(super) async fn claims_are_never_given_twice(store: Arc<dyn OnlineStore>, tag: &str) {
    let name = format!("{tag}/writer");
    let claim = |candidate| store.claim(&name, candidate);
    let mut given = Vec::new();
    for candidate in [10, 10, 5, 100, 254, 0, 0, 0, u64::from(u32::MAX), 1] {
        given.push(claim(candidate).await.expect("it is claimed"));
    }
    assert_eq!(given, [10, 11, 12, 100, 254, 255, 256, 257, u64::from(u32::MAX), 1 << 32]);
    assert_eq!(store.claim(&format!("{tag}/another writer"), 0).await.expect("it is claimed"), 0);

    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let (store, name) = (store.clone(), format!("{tag}/contended"));
            tokio::spawn(async move { store.claim(&name, 7).await.expect("it is claimed") })
        })
        .collect();
    let mut given = BTreeSet::new();
    for task in tasks {
        given.insert(task.await.expect("the task ends well"));
    }
    assert_eq!(given, (7..27).collect());

    assert_eq!(claim(u64::MAX).await.expect("it is claimed"), u64::MAX);
    let error = claim(3).await.expect_err("there is no later epoch");
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
}

pub(super) async fn marks_never_go_back(store: &dyn OnlineStore, tag: &str) {
    let name = |name: &str| format!("{tag}/{name}");
    let mark = |name: String, position| Write::Mark(name, position);
    let writes = vec![
        mark(name("a"), at(5)),
        mark(name("a"), at(4)),
        mark(name("a"), at(5)),
        mark(name("a/b"), Position::START),
        mark(name("a/b"), Position { time: -1, sequence: 3 }),
        mark(name("last"), Position::END),
        Write::Fact(name("a"), Some(Bytes::from_static(b"a fact of the same name"))),
    ];
    assert_eq!(write(store, writes).await, WriteOutcome { applied: 5, stale: 2 });
    assert_eq!(write(store, vec![mark(name("a"), at(256))]).await, all(1));
    assert_eq!(write(store, vec![mark(name("a"), at(7))]).await, none(1));
    let reads = ["a", "a/b", "last", "absent"].map(|mark| Read::Mark(name(mark)));
    let expected = [Some(at(256)), Some(Position { time: -1, sequence: 3 }), Some(Position::END), None];
    assert_eq!(read(store, &reads).await, expected.map(Answer::Mark));
    // Among reads of entities it is the same.
    let entity = Read::Row(generation(tag, "absent").key(*b"e"));
    let both = [entity, reads[0].clone()];
    assert_eq!(read(store, &both).await, [Answer::Row(None), Answer::Mark(Some(at(256)))]);
}

pub(super) async fn a_removed_entity_leaves_nothing(store: &dyn OnlineStore, tag: &str) {
    let [rows, tiles] = ["removed_rows", "removed_tiles"].map(|view| generation(tag, view));
    // Keys of which one begins like the other.
    let entities: [&[u8]; 4] = [b"a", b"", b"a\0", b"a}"];
    let change = |entity: &[u8], position, start: i64| Write::Tiles {
        key: tiles.key(entity),
        position,
        epoch: 3,
        set: vec![(tile(start), Bytes::from_static(b"tile"))],
        remove: vec![],
        expires: FUTURE,
    };
    for entity in entities {
        let blob = row(0, None, 0, "row");
        let row = Write::Row { key: rows.key(entity), blob, expires: FUTURE };
        let writes = vec![row, change(entity, at(1), 0), change(entity, at(2), 60)];
        assert_eq!(write(store, writes).await, all(3));
    }
    let remove = || vec![Write::Remove(rows.key(*b"a")), Write::Remove(tiles.key(*b"a"))];
    assert_eq!(write(store, remove()).await, all(2));
    assert_eq!(write(store, remove()).await, none(2), "there is nothing left");
    assert_eq!(read_row(store, &rows.key(*b"a")).await, None);
    assert_eq!(read_all(store, &tiles.key(*b"a")).await, (None, vec![]));
    for entity in &entities[1..] {
        assert!(read_row(store, &rows.key(*entity)).await.is_some(), "{}", entity.escape_ascii());
        let (position, left) = read_all(store, &tiles.key(*entity)).await;
        assert_eq!((position, left.len()), (Some(at(2)), 2), "{}", entity.escape_ascii());
    }
    // Between two writes of one call, too; what was before is not there afterwards.
    let writes = vec![
        change(b"a", at(9), 0),
        change(b"a", at(10), 120),
        Write::Remove(tiles.key(*b"a")),
        change(b"a", at(1), 180),
        Write::Row { key: rows.key(*b"a"), blob: row(9, None, 0, "later"), expires: None },
        Write::Remove(rows.key(*b"a")),
        Write::Row { key: rows.key(*b"a"), blob: row(3, None, 0, "earlier"), expires: None },
    ];
    assert_eq!(write(store, writes).await, all(7));
    let expected = vec![(tile(180), Bytes::from_static(b"tile"))];
    assert_eq!(read_all(store, &tiles.key(*b"a")).await, (Some(at(1)), expected));
    let kept = read_row(store, &rows.key(*b"a")).await.expect("it was written last");
    assert_eq!(decode(&kept).times.event_time, 3);
}

pub(super) async fn a_report_names_each_place(store: &dyn OnlineStore) {
    let nodes = store.report().await.expect("the store reports");
    assert!(!nodes.is_empty());
    for node in nodes {
        assert!(!node.place.is_empty() && !node.role.is_empty() && !node.durability.is_empty(), "{node:?}");
        assert_eq!(node.problems, Vec::<String>::new(), "{node:?}");
    }
}
