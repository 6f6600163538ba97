//! The one suite that every store passes: each promise of [`OnlineStore`] as a function that panics where it is broken.
//!
//! It is public, so that a store of another crate can be held to it. Nothing here sleeps or depends on the speed of the
//! store; random cases come from fixed seeds.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use feature_defs::as_of::{Row, Times};
use feature_defs::time::{Micros, Position};
use feature_defs::value::{Type, Value};
use feature_defs::window::TileId;

use crate::key::{Generation, Key};
use crate::memory::{FACT_BYTES_MAX, KEY_BYTES_MAX, MemoryStore};
use crate::{Answer, OnlineStore, Read, StoreError, Write, WriteOutcome, row};

mod lifetime;
pub mod redis_cluster;
pub mod redis_server;

/// Checks every promise. The store may hold anything else, but nothing of projects whose names begin with `tag`.
pub async fn run(store: Arc<dyn OnlineStore>, tag: &str) {
    store.ping().await.expect("the store answers");
    assert!(!store.place().is_empty());
    nothing_is_there_at_first(&*store, tag).await;
    rows_end_the_same_in_every_order(&*store, tag).await;
    ties_are_settled_by_created_time_sequence_and_content(&*store, tag).await;
    tiles_follow_their_position(&*store, tag).await;
    repeats_and_prefixes_change_nothing(&*store, tag).await;
    keys_that_differ_never_meet(&*store, tag).await;
    long_keys_never_meet(&*store, tag).await;
    many_reads_are_answered_in_order(&*store, tag).await;
    large_values_come_back(&*store, tag).await;
    what_cannot_be_held_is_refused(&*store, tag).await;
    facts_are_remembered_and_forgotten(&*store, tag).await;
    a_removed_generation_leaves_its_neighbours(&*store, tag).await;
    large_batches_are_counted(&*store, tag).await;
    lifetime::rows_expire_with_the_one_that_stays(&*store, tag).await;
    lifetime::tiles_expire_with_the_latest_expiry(&*store, tag).await;
    lifetime::a_replaced_writer_is_fenced(&*store, tag).await;
    lifetime::claims_are_never_given_twice(store.clone(), tag).await;
    lifetime::marks_never_go_back(&*store, tag).await;
    lifetime::a_removed_entity_leaves_nothing(&*store, tag).await;
    lifetime::a_report_names_each_place(&*store).await;
    readers_never_see_half_a_write(store.clone(), tag).await;
    writers_of_one_entity_agree(store.clone(), tag).await;
    for seed in 0..8 {
        random_writes_agree_with_memory(&*store, tag, seed).await;
    }
    store.sync().await.expect("the store syncs");
}

/// A row blob with one string value; its sequence is also that of its position.
pub fn row(event_time: i64, created_time: Option<i64>, sequence: u64, content: &str) -> Bytes {
    encode(event_time, created_time, Position { time: event_time + 1_000, sequence }, Some(content))
}

/// Without content it is a tombstone.
fn encode(event_time: i64, created_time: Option<i64>, position: Position, content: Option<&str>) -> Bytes {
    let known_time = created_time.unwrap_or(event_time);
    let times = Times { event_time, created_time, known_time, position };
    let value = content.map_or(Value::Null, |content| Value::String(content.into()));
    row::encode(&Row { times, deleted: content.is_none(), values: vec![value] })
}

fn decode(blob: &[u8]) -> Row {
    row::decode(blob, &[Type::String]).expect("the blob is one of ours")
}

fn generation(tag: &str, view: &str) -> Generation {
    Generation::new(&format!("{tag}-project"), view, "0123456789abcdef")
}

fn tile(start: i64) -> TileId {
    TileId { level: 60, start }
}

fn at(sequence: u64) -> Position {
    Position { time: 1_700_000_000_000_000, sequence }
}

async fn read(store: &dyn OnlineStore, reads: &[Read]) -> Vec<Answer> {
    let answers = store.read(reads).await.expect("the store reads");
    assert_eq!(answers.len(), reads.len(), "one answer for each read");
    answers
}

async fn read_row(store: &dyn OnlineStore, key: &Key) -> Option<Bytes> {
    match read(store, &[Read::Row(key.clone())]).await.remove(0) {
        Answer::Row(row) => row,
        other => panic!("a row was asked for, not {other:?}"),
    }
}

async fn read_all(store: &dyn OnlineStore, key: &Key) -> (Option<Position>, Vec<(TileId, Bytes)>) {
    match read(store, &[Read::AllTiles(key.clone())]).await.remove(0) {
        Answer::AllTiles { position, tiles } => (position, tiles),
        other => panic!("all tiles were asked for, not {other:?}"),
    }
}

async fn write(store: &dyn OnlineStore, writes: Vec<Write>) -> WriteOutcome {
    let count = writes.len() as u64;
    let outcome = store.write(writes).await.expect("the store writes");
    assert_eq!(outcome.applied + outcome.stale, count, "each write is counted once");
    outcome
}

fn all(applied: u64) -> WriteOutcome {
    WriteOutcome { applied, stale: 0 }
}

fn none(stale: u64) -> WriteOutcome {
    WriteOutcome { applied: 0, stale }
}

async fn nothing_is_there_at_first(store: &dyn OnlineStore, tag: &str) {
    let key = generation(tag, "absent").key(*b"e");
    let reads = [
        Read::Row(key.clone()),
        Read::Tiles(key.clone(), vec![tile(0), tile(60)]),
        Read::Tiles(key.clone(), vec![]),
        Read::AllTiles(key),
        Read::Fact(format!("{tag}/absent")),
    ];
    let expected = [
        Answer::Row(None),
        Answer::Tiles { position: None, tiles: vec![None, None] },
        Answer::Tiles { position: None, tiles: vec![] },
        Answer::AllTiles { position: None, tiles: vec![] },
        Answer::Fact(None),
    ];
    assert_eq!(read(store, &reads).await, expected);
    assert_eq!(read(store, &[]).await, []);
    assert_eq!(write(store, vec![]).await, all(0));
}

async fn rows_end_the_same_in_every_order(store: &dyn OnlineStore, tag: &str) {
    let position = |time, sequence| Position { time, sequence };
    // The latest row is neither the one with the largest position nor the last to be created.
    let history = [
        encode(10, None, position(500, 1), Some("ten")),
        encode(20, Some(25), position(100, 2), Some("twenty")),
        encode(20, None, position(900, 3), Some("twenty, never created")),
        encode(-5, Some(99), position(-7, 4), Some("before 1970")),
        encode(20, Some(24), position(901, 0), None),
    ];
    let view = generation(tag, "permuted");
    for (number, order) in permutations(history.len()).into_iter().enumerate() {
        let key = view.key((number as u32).to_be_bytes());
        let writes = order
            .iter()
            .map(|row| Write::Row { key: key.clone(), blob: history[*row].clone(), expires: None })
            .collect();
        write(store, writes).await;
        let kept = decode(&read_row(store, &key).await.expect("a row was written"));
        assert_eq!(kept.values, [Value::String("twenty".into())], "in order {order:?}");
        assert_eq!(kept.times.position, position(901, 0), "in order {order:?}");
        assert_eq!((kept.times.event_time, kept.times.created_time), (20, Some(25)));
    }
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    let mut orders = vec![vec![]];
    for item in 0..count {
        let insert = |order: Vec<usize>| {
            (0..=order.len()).map(move |place| {
                let mut longer = order.clone();
                longer.insert(place, item);
                longer
            })
        };
        orders = orders.into_iter().flat_map(insert).collect();
    }
    orders
}

async fn ties_are_settled_by_created_time_sequence_and_content(store: &dyn OnlineStore, tag: &str) {
    let position = |sequence| Position { time: 0, sequence };
    let long = "x".repeat(10_000);
    // Each is later than the one before.
    let ascending = [
        encode(5, None, position(9), Some("created null is lowest")),
        encode(5, Some(-1), position(3), Some("a")),
        encode(5, Some(2), position(0), Some("")),
        encode(5, Some(2), position(0), Some("A")),
        encode(5, Some(2), position(0), Some("a")),
        encode(5, Some(2), position(0), Some("a\0")),
        encode(5, Some(2), position(0), Some("aa")),
        encode(5, Some(2), position(0), Some(&long)),
        encode(5, Some(2), position(0), Some(&format!("{long}x"))),
        encode(5, Some(2), position(0), Some(&format!("{long}y"))),
        // Where a comparison by locale, or of signed bytes, would say otherwise.
        encode(5, Some(2), position(0), Some("\u{e9}")),
        encode(5, Some(2), position(0), Some("\u{10ffff}")),
        encode(5, Some(2), position(0), None),
        encode(5, Some(2), position(1), Some("")),
        encode(5, Some(2), position(256), Some("")),
        encode(6, None, position(0), None),
        encode(i64::MAX, None, position(0), Some("")),
    ];
    let view = generation(tag, "ties");
    for (i, earlier) in ascending.iter().enumerate() {
        for (j, later) in ascending.iter().enumerate().skip(i + 1) {
            assert!(row::order(earlier) < row::order(later), "{i} and {j}");
            for (turn, pair) in [[earlier, later], [later, earlier]].into_iter().enumerate() {
                let key = view.key([i as u8, j as u8, turn as u8]);
                let outcomes = [
                    write(store, vec![Write::Row { key: key.clone(), blob: pair[0].clone(), expires: None }]).await,
                    write(store, vec![Write::Row { key: key.clone(), blob: pair[1].clone(), expires: None }]).await,
                ];
                assert_eq!(outcomes, [all(1), if turn == 0 { all(1) } else { none(1) }], "{i} and {j}");
                let kept = read_row(store, &key).await.expect("a row was written");
                assert_eq!(row::order(&kept), row::order(later), "{i} and {j}, turn {turn}");
                assert_eq!(row::position(&kept), row::position(earlier).max(row::position(later)));
            }
        }
    }
}

async fn tiles_follow_their_position(store: &dyn OnlineStore, tag: &str) {
    let key = generation(tag, "tiles").key(*b"e");
    let change = |position, set: &[(i64, &'static str)], remove: &[i64]| {
        let set = set.iter().map(|(start, text)| (tile(*start), Bytes::from_static(text.as_bytes()))).collect();
        vec![Write::Tiles {
            key: key.clone(),
            position,
            set,
            remove: remove.iter().copied().map(tile).collect(),
            epoch: 0,
            expires: None,
        }]
    };
    let expected = |tiles: &[(i64, &'static str)]| {
        tiles.iter().map(|(start, text)| (tile(*start), Bytes::from_static(text.as_bytes()))).collect::<Vec<_>>()
    };

    assert_eq!(write(store, change(at(5), &[(0, "a"), (-60, "b"), (120, "")], &[])).await, all(1));
    assert_eq!(read_all(store, &key).await, (Some(at(5)), expected(&[(-60, "b"), (0, "a"), (120, "")])));

    for stale in [at(5), at(4), Position { time: 0, sequence: u64::MAX }, Position::START] {
        assert_eq!(write(store, change(stale, &[(0, "stale")], &[-60])).await, none(1));
    }
    assert_eq!(read_all(store, &key).await, (Some(at(5)), expected(&[(-60, "b"), (0, "a"), (120, "")])));

    // The sequence counts within a time, the time before it. Removing what is not there is no error, and a tile that is
    // set and removed at once is gone.
    assert_eq!(write(store, change(at(256), &[(0, "c"), (180, "gone")], &[-60, 999, 180])).await, all(1));
    let later = Position { time: at(0).time + 1, sequence: 0 };
    assert_eq!(write(store, change(later, &[], &[])).await, all(1));
    let reads = [
        Read::Tiles(key.clone(), vec![tile(120), tile(-60), tile(0), tile(0), TileId { level: 3600, start: 0 }]),
        Read::Tiles(key.clone(), vec![]),
    ];
    let text = |text: &'static str| Some(Bytes::from_static(text.as_bytes()));
    let answers = [
        Answer::Tiles { position: Some(later), tiles: vec![text(""), None, text("c"), text("c"), None] },
        Answer::Tiles { position: Some(later), tiles: vec![] },
    ];
    assert_eq!(read(store, &reads).await, answers);

    // In order of level, then start, over the whole range of times; the last of equal ids counts.
    let ids = [(60, i64::MIN), (60, -1), (60, 0), (60, i64::MAX), (3_600, -3_600), (86_400_000_000, 0)];
    let ids = ids.map(|(level, start)| TileId { level, start });
    let mut set: Vec<_> = ids.iter().rev().map(|id| (*id, Bytes::from(format!("{id:?}")))).collect();
    set.insert(0, (ids[2], Bytes::from_static(b"hidden")));
    let key = generation(tag, "tiles").key(*b"ordered");
    let change =
        Write::Tiles { key: key.clone(), position: Position::START, set, remove: vec![], epoch: 0, expires: None };
    assert_eq!(write(store, vec![change.clone()]).await, all(1), "nothing was applied, so even START is after it");
    assert_eq!(write(store, vec![change]).await, none(1));
    let expected = ids.map(|id| (id, Bytes::from(format!("{id:?}"))));
    assert_eq!(read_all(store, &key).await, (Some(Position::START), expected.to_vec()));
}

async fn repeats_and_prefixes_change_nothing(store: &dyn OnlineStore, tag: &str) {
    let history = |entity: &[u8]| {
        let row_key = generation(tag, "repeated_rows").key(entity);
        let tile_key = generation(tag, "repeated_tiles").key(entity);
        let mut writes = Vec::new();
        for number in 0..6 {
            let event_time = [3, 1, 4, 1, 5, 2][number as usize];
            writes.push(Write::Row {
                key: row_key.clone(),
                blob: row(event_time, None, number, &format!("row {number}")),
                expires: None,
            });
            let set = vec![(tile(60 * (number as i64 % 3)), Bytes::from(format!("tile {number}")))];
            let remove = vec![tile(60 * ((number as i64 + 1) % 3))];
            writes.push(Write::Tiles {
                key: tile_key.clone(),
                position: at(number),
                set,
                remove,
                epoch: 0,
                expires: None,
            });
        }
        let reads = [Read::Row(row_key), Read::AllTiles(tile_key)];
        (writes, reads)
    };
    let (writes, reads) = history(b"once");
    write(store, writes).await;
    let expected = read(store, &reads).await;
    for prefix in 0..=12 {
        let (writes, reads) = history(format!("prefix {prefix}").as_bytes());
        write(store, writes[..prefix].to_vec()).await;
        write(store, writes[..prefix / 2].to_vec()).await;
        write(store, writes.clone()).await;
        assert_eq!(read(store, &reads).await, expected, "after a prefix of {prefix} writes");
        assert_eq!(write(store, writes.clone()).await, none(12), "all of it again");
        assert_eq!(read(store, &reads).await, expected, "all of it again, after a prefix of {prefix} writes");
    }
}

async fn keys_that_differ_never_meet(store: &dyn OnlineStore, tag: &str) {
    let entities: [&[u8]; 20] = [
        b"",
        b"\0",
        b"\0\0",
        b"\xff",
        b"\xff\xff",
        b"a",
        b"a\0",
        b"ab",
        b"{",
        b"}",
        b"{}",
        b"}view@",
        b"a}b",
        b"*",
        b"?",
        b"[a]",
        b"\\",
        b"\r\n$3\r\n",
        // What would be the end of a shorter key, or the tile of one, if keys were only put together.
        b"a\0\0\0\x01",
        b"a\0\0\0\x01\x80\0\0\0\0\0\0\x3c\x80\0\0\0\0\0\0\0",
    ];
    let projects = [format!("{tag}-p"), format!("{tag}-p2"), tag.to_owned()];
    let mut keys = Vec::new();
    for project in &projects {
        for view in ["v", "v2", "vv"] {
            for digest in ["0000000000000000", "0000000000000001"] {
                let generation = Generation::new(project, view, digest);
                keys.extend(entities.map(|entity| generation.key(entity)));
            }
        }
    }
    for (salt, form) in ["rows", "tiles"].into_iter().enumerate() {
        let key = |key: &Key| {
            let Generation { project, view, digest } = &key.generation;
            Generation::new(project, &format!("{form}_{view}"), digest).key(key.entity.clone())
        };
        let content = |number: usize| format!("{salt} {number}");
        let writes = keys.iter().enumerate().map(|(number, plain)| match salt {
            0 => Write::Row { key: key(plain), blob: row(0, None, 0, &content(number)), expires: None },
            _ => Write::Tiles {
                key: key(plain),
                position: at(number as u64),
                set: vec![(tile(0), Bytes::from(content(number))), (tile(60), Bytes::new())],
                remove: vec![],
                epoch: 0,
                expires: None,
            },
        });
        assert_eq!(write(store, writes.collect()).await, all(keys.len() as u64));
        for (number, plain) in keys.iter().enumerate() {
            let key = key(plain);
            if salt == 0 {
                let kept = read_row(store, &key).await.expect("a row was written");
                assert_eq!(decode(&kept).values, [Value::String(content(number).as_str().into())], "{key}");
            } else {
                let expected = vec![(tile(0), Bytes::from(content(number))), (tile(60), Bytes::new())];
                assert_eq!(read_all(store, &key).await, (Some(at(number as u64)), expected), "{key}");
            }
        }
    }
}

async fn long_keys_never_meet(store: &dyn OnlineStore, tag: &str) {
    let view = generation(tag, "long");
    let keys = [vec![b'k'; 60_000], vec![b'k'; 60_001], [vec![b'k'; 60_000], vec![b'l']].concat()];
    let writes = keys.iter().enumerate().map(|(number, entity)| Write::Row {
        key: view.key(entity.clone()),
        blob: row(0, None, 0, &number.to_string()),
        expires: None,
    });
    write(store, writes.collect()).await;
    for (number, entity) in keys.iter().enumerate() {
        let kept = read_row(store, &view.key(entity.clone())).await.expect("a row was written");
        assert_eq!(decode(&kept).values, [Value::String(number.to_string().as_str().into())]);
    }
}

async fn many_reads_are_answered_in_order(store: &dyn OnlineStore, tag: &str) {
    let view = generation(tag, "many");
    let tiles = generation(tag, "many_tiles");
    let count = 1_500u32;
    let mut writes: Vec<_> = (0..count)
        .map(|n| Write::Row { key: view.key(n.to_be_bytes()), blob: row(0, None, 0, &n.to_string()), expires: None })
        .collect();
    let set = vec![(tile(0), Bytes::from_static(b"zero"))];
    writes.push(Write::Tiles { key: tiles.key([]), position: at(1), set, remove: vec![], epoch: 0, expires: None });
    write(store, writes).await;
    // Every entity twice, with absent ones and other kinds of reads between.
    let order: Vec<u32> = (0..2 * count).map(|n| n.wrapping_mul(7_919) % (count + 100)).collect();
    let mut reads = Vec::new();
    for n in &order {
        reads.push(Read::Row(view.key(n.to_be_bytes())));
        if n % 50 == 0 {
            reads.push(Read::Tiles(tiles.key([]), vec![tile(60), tile(0)]));
        }
    }
    let mut answers = read(store, &reads).await.into_iter();
    for n in order {
        match answers.next() {
            Some(Answer::Row(Some(blob))) if n < count => {
                assert_eq!(decode(&blob).values, [Value::String(n.to_string().as_str().into())]);
            }
            Some(Answer::Row(None)) if n >= count => {}
            other => panic!("for row {n}: {other:?}"),
        }
        if n % 50 == 0 {
            let expected = vec![None, Some(Bytes::from_static(b"zero"))];
            assert_eq!(answers.next(), Some(Answer::Tiles { position: Some(at(1)), tiles: expected }));
        }
    }
}

async fn large_values_come_back(store: &dyn OnlineStore, tag: &str) {
    let mut random = Random(7);
    let bytes: Vec<u8> = (0..1 << 20).map(|_| random.next() as u8).collect();
    let key = generation(tag, "large").key(*b"row");
    let base = "x".repeat(1 << 20);
    let blobs = [row(0, None, 0, &base), row(0, None, 0, &format!("{base}x"))];
    for blob in &blobs {
        assert_eq!(
            write(store, vec![Write::Row { key: key.clone(), blob: blob.clone(), expires: None }]).await,
            all(1)
        );
        assert_eq!(read_row(store, &key).await.as_ref(), Some(blob));
    }
    assert_eq!(
        write(store, vec![Write::Row { key: key.clone(), blob: blobs[0].clone(), expires: None }]).await,
        none(1)
    );

    // More tiles than any command takes at once.
    let key = generation(tag, "large").key(*b"many tiles");
    let set: Vec<_> = (0..3_001).map(|n| (tile(60 * n), Bytes::from(n.to_string()))).collect();
    let many = |position, set, remove| Write::Tiles {
        key: key.clone(),
        position: at(position),
        epoch: 0,
        set,
        remove,
        expires: None,
    };
    assert_eq!(write(store, vec![many(1, set.clone(), vec![])]).await, all(1));
    assert_eq!(read_all(store, &key).await, (Some(at(1)), set.clone()));
    let remove = set[1..].iter().map(|(id, _)| *id).collect();
    assert_eq!(write(store, vec![many(2, vec![], remove)]).await, all(1));
    assert_eq!(read_all(store, &key).await, (Some(at(2)), set[..1].to_vec()));

    let key = generation(tag, "large").key(*b"tiles");
    let set: Vec<_> = (0..12).map(|n| (tile(60 * n), Bytes::from(bytes[n as usize..].to_vec()))).collect();
    write(
        store,
        vec![Write::Tiles {
            key: key.clone(),
            position: at(1),
            set: set.clone(),
            remove: vec![],
            epoch: 0,
            expires: None,
        }],
    )
    .await;
    assert_eq!(read_all(store, &key).await, (Some(at(1)), set));
}

async fn what_cannot_be_held_is_refused(store: &dyn OnlineStore, tag: &str) {
    let view = generation(tag, "refused");
    let good = view.key(*b"good");
    let bad = [
        Write::Row { key: view.key(vec![0; KEY_BYTES_MAX]), blob: row(0, None, 0, "long key"), expires: None },
        Write::Row { key: view.key(*b"short"), blob: Bytes::from_static(b"not a row"), expires: None },
        Write::Fact("f".repeat(KEY_BYTES_MAX + 1), None),
        Write::Mark("m".repeat(KEY_BYTES_MAX + 1), Position::END),
        Write::Remove(view.key(vec![0; KEY_BYTES_MAX])),
        Write::Fact(format!("{tag}/large"), Some(Bytes::from(vec![0; FACT_BYTES_MAX + 1]))),
    ];
    for bad in bad {
        let writes = vec![Write::Row { key: good.clone(), blob: row(0, None, 0, "good"), expires: None }, bad];
        let error = store.write(writes).await.expect_err("the write is refused");
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
        assert!(!error.is_retryable());
        assert!(error.to_string().contains(&store.place()), "{error}");
    }
    let long = view.key(vec![0; KEY_BYTES_MAX]);
    let reads = [
        Read::Row(good),
        Read::Row(long.clone()),
        Read::AllTiles(long.clone()),
        Read::Tiles(long, vec![tile(0)]),
        Read::Fact("f".repeat(KEY_BYTES_MAX + 1)),
        Read::Mark("m".repeat(KEY_BYTES_MAX + 1)),
    ];
    let expected = [
        Answer::Row(None),
        Answer::Row(None),
        Answer::AllTiles { position: None, tiles: vec![] },
        Answer::Tiles { position: None, tiles: vec![None] },
        Answer::Fact(None),
        Answer::Mark(None),
    ];
    assert_eq!(read(store, &reads).await, expected, "a refused call changes nothing");
}

async fn facts_are_remembered_and_forgotten(store: &dyn OnlineStore, tag: &str) {
    let name = |name: &str| format!("{tag}/{name}");
    let fact = |text: &'static [u8]| Some(Bytes::from_static(text));
    let largest = Some(Bytes::from(vec![0xa5; FACT_BYTES_MAX]));
    let writes = vec![
        Write::Fact(name("a"), fact(b"old")),
        Write::Fact(name("a/b"), fact(b"\0\xff}")),
        Write::Fact(name("a"), fact(b"new")),
        Write::Fact(name("empty"), fact(b"")),
        Write::Fact(name("largest"), largest.clone()),
        Write::Fact(name("gone"), fact(b"soon")),
        Write::Fact(name("gone"), None),
        Write::Fact(name("never there"), None),
    ];
    assert_eq!(write(store, writes).await, all(8));
    let reads = ["a", "a/b", "empty", "largest", "gone", "never there"].map(|fact| Read::Fact(name(fact)));
    let expected = [fact(b"new"), fact(b"\0\xff}"), fact(b""), largest, None, None].map(Answer::Fact);
    assert_eq!(read(store, &reads).await, expected);
}

async fn a_removed_generation_leaves_its_neighbours(store: &dyn OnlineStore, tag: &str) {
    let digests = ["aaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaab"];
    // Names that would match each other if they were patterns or prefixes.
    let names = [("p", "v"), ("p", "v2"), ("p2", "v"), ("p*", "v"), ("p", "v*"), ("p[2]", "v?")];
    let mut generations = Vec::new();
    for (project, view) in names {
        generations.extend(digests.map(|digest| Generation::new(&format!("{tag}-removed-{project}"), view, digest)));
    }
    let entities: [&[u8]; 6] = [b"", b"a", b"\xff\xff", b"}v@aaaaaaaaaaaaaaaa", b"*", b"\n"];
    let tiled = |number: usize| number % 4 >= 2;
    let writes = |generation: &Generation, number: usize| -> Vec<Write> {
        let each = |entity: &&[u8]| match tiled(number) {
            false => Write::Row { key: generation.key(*entity), blob: row(0, None, 0, "kept"), expires: None },
            true => Write::Tiles {
                key: generation.key(*entity),
                position: at(3),
                set: (0..5).map(|n| (tile(60 * n), Bytes::from_static(b"kept"))).collect(),
                remove: vec![],
                epoch: 0,
                expires: None,
            },
        };
        entities.iter().map(each).collect()
    };
    let reads = |generation: &Generation, number: usize| -> Vec<Read> {
        let each = |entity: &&[u8]| match tiled(number) {
            false => Read::Row(generation.key(*entity)),
            true => Read::AllTiles(generation.key(*entity)),
        };
        entities.iter().map(each).collect()
    };
    let mut left = BTreeSet::new();
    for (number, generation) in generations.iter().enumerate() {
        assert_eq!(write(store, writes(generation, number)).await, all(6), "{generation:?}");
        write(store, vec![Write::Fact(generation.ready_fact(), Some(Bytes::from_static(b"ready")))]).await;
        left.insert(number);
    }
    for (removed, generation) in generations.iter().enumerate() {
        assert_eq!(store.remove_generation(generation).await.expect("it is removed"), 6, "{generation:?}");
        assert_eq!(store.remove_generation(generation).await.expect("it is removed"), 0, "again");
        left.remove(&removed);
        for (number, generation) in generations.iter().enumerate() {
            let there = |answer: &Answer| match answer {
                Answer::Row(row) => row.is_some(),
                Answer::AllTiles { position, tiles } => {
                    assert!(tiles.len() == if position.is_some() { 5 } else { 0 });
                    position.is_some()
                }
                other => panic!("not asked for: {other:?}"),
            };
            let answers = read(store, &reads(generation, number)).await;
            let expected = left.contains(&number);
            assert!(answers.iter().all(|answer| there(answer) == expected), "{generation:?} after {removed}");
            let fact = read(store, &[Read::Fact(generation.ready_fact())]).await;
            assert_eq!(fact, [Answer::Fact(Some(Bytes::from_static(b"ready")))], "facts stay");
        }
        // It can be filled again, and what was removed does not come back.
        if removed == 2 {
            let key = generation.key(*b"a");
            let set = vec![(tile(0), Bytes::from_static(b"new"))];
            let change = Write::Tiles {
                key: key.clone(),
                position: at(1),
                set: set.clone(),
                remove: vec![],
                epoch: 0,
                expires: None,
            };
            assert_eq!(write(store, vec![change]).await, all(1));
            assert_eq!(read_all(store, &key).await, (Some(at(1)), set));
            assert_eq!(store.remove_generation(generation).await.expect("it is removed"), 1);
        }
    }
}

async fn large_batches_are_counted(store: &dyn OnlineStore, tag: &str) {
    let view = generation(tag, "batch");
    let writes: Vec<_> = (0..5_000u32)
        .map(|n| Write::Row {
            key: view.key((n % 2_500).to_be_bytes()),
            blob: row(-i64::from(n), None, 0, "batch"),
            expires: None,
        })
        .chain([Write::Fact(format!("{tag}/batch"), Some(Bytes::from_static(b"done")))])
        .collect();
    assert_eq!(write(store, writes).await, WriteOutcome { applied: 2_501, stale: 2_500 });
}

/// Writers replace the tiles of an entity as a whole; whatever readers see must come from one write.
async fn readers_never_see_half_a_write(store: Arc<dyn OnlineStore>, tag: &str) {
    const ROUNDS: u64 = 150;
    let key = generation(tag, "concurrent").key(*b"e");
    let content = |round: u64| Bytes::from(vec![round as u8; 2_000]);
    let writer = |turn: u64| {
        let (store, key) = (store.clone(), key.clone());
        tokio::spawn(async move {
            for round in (1..=ROUNDS).filter(|round| round % 2 == turn) {
                // Odd rounds remove the last tile.
                let set = (0..4 - (round % 2) as i64).map(|n| (tile(60 * n), content(round))).collect();
                let remove = if round % 2 == 1 { vec![tile(180)] } else { vec![] };
                write(
                    &*store,
                    vec![Write::Tiles { key: key.clone(), position: at(round), set, remove, epoch: 0, expires: None }],
                )
                .await;
                // Whoever looks after the write returned sees it, or a later one.
                let (position, _) = read_all(&*store, &key).await;
                assert!(position >= Some(at(round)));
            }
        })
    };
    let reader = || {
        let (store, key) = (store.clone(), key.clone());
        tokio::spawn(async move {
            let mut last = None;
            while last < Some(at(ROUNDS)) {
                let ids: Vec<_> = (0..4).map(|n| tile(60 * n)).collect();
                let reads = [Read::Tiles(key.clone(), ids.clone()), Read::AllTiles(key.clone())];
                for answer in read(&*store, &reads).await {
                    let (position, tiles) = match answer {
                        Answer::Tiles { position, tiles } => (position, tiles),
                        Answer::AllTiles { position, tiles } => {
                            let find = |id| tiles.iter().find(|(found, _)| found == id).map(|(_, tile)| tile.clone());
                            (position, ids.iter().map(find).collect())
                        }
                        other => panic!("not asked for: {other:?}"),
                    };
                    assert!(position >= last, "positions never go back");
                    last = position;
                    let round = position.map(|position| position.sequence);
                    let expected = |n| round.filter(|round| n < 4 - round % 2).map(content);
                    assert_eq!(tiles, (0..4).map(expected).collect::<Vec<_>>(), "of round {round:?}");
                }
                tokio::task::yield_now().await;
            }
        })
    };
    let tasks = [writer(0), reader(), writer(1), reader()];
    for task in tasks {
        task.await.expect("the task ends well");
    }
}

async fn writers_of_one_entity_agree(store: Arc<dyn OnlineStore>, tag: &str) {
    let key = generation(tag, "contended").key(*b"e");
    let tasks = (0..4u64).map(|writer| {
        let (store, key) = (store.clone(), key.clone());
        tokio::spawn(async move {
            for round in 0..50u64 {
                let (event_time, position) = ((round * 7 + writer * 13) % 200, at(round * 4 + writer));
                let blob = encode(event_time as i64, None, position, Some(&format!("{writer}")));
                write(&*store, vec![Write::Row { key: key.clone(), blob, expires: None }]).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("the task ends well");
    }
    let all = (0..4u64).flat_map(|writer| (0..50u64).map(move |round| (writer, round)));
    let latest = all.max_by_key(|(writer, round)| ((round * 7 + writer * 13) % 200, round * 4 + writer));
    let (writer, round) = latest.expect("there were writes");
    let kept = decode(&read_row(&*store, &key).await.expect("a row was written"));
    assert_eq!(kept.times.event_time as u64, (round * 7 + writer * 13) % 200);
    assert_eq!(kept.values, [Value::String(writer.to_string().as_str().into())]);
    assert_eq!(kept.times.position, at(49 * 4 + 3));
}

/// The same random writes into this store and into memory, and everything read back after each call.
async fn random_writes_agree_with_memory(store: &dyn OnlineStore, tag: &str, seed: u64) {
    let memory = MemoryStore::new();
    let mut random = Random(seed);
    let generations = ["rows", "tiles"].map(|view| generation(tag, &format!("random_{view}_{seed}")));
    let entities: [&[u8]; 4] = [b"", b"a", b"a\0", b"\xff}"];
    let ids: Vec<TileId> =
        [60, 3_600].into_iter().flat_map(|level| (-2..2).map(move |n| TileId { level, start: n * level })).collect();
    for round in 0..60 {
        let mut writes = Vec::new();
        for _ in 0..random.below(12) {
            let entity = entities[random.below(4)];
            let position = Position { time: random.below(5) as i64, sequence: random.below(5) as u64 };
            // Nothing expires while this runs.
            let expires = (random.below(2) == 0).then(|| 4_102_444_800_000_000 + random.below(3) as i64);
            writes.push(match random.below(10) {
                0..4 => {
                    let created = (random.below(2) == 0).then(|| random.below(3) as i64);
                    let content = ["", "a", "\u{e9}", "z"].get(random.below(5)).copied();
                    Write::Row {
                        key: generations[0].key(entity),
                        blob: encode(random.below(4) as i64, created, position, content),
                        expires,
                    }
                }
                4..7 => {
                    // Positions grow slowly, so that about half of the writes come late.
                    let position = Position { time: round / 4 + position.time, ..position };
                    let bytes = random.next().to_be_bytes();
                    let set = (0..random.below(4)).map(|n| (ids[random.below(8)], Bytes::from(bytes[n..].to_vec())));
                    let set = set.collect();
                    let remove = (0..random.below(3)).map(|_| ids[random.below(8)]).collect();
                    Write::Tiles {
                        key: generations[1].key(entity),
                        position,
                        epoch: round as u64 / 15,
                        set,
                        remove,
                        expires,
                    }
                }
                7 => Write::Remove(generations[random.below(2)].key(entity)),
                8 => Write::Mark(format!("{tag}/random/{seed}/{}", random.below(3)), position),
                _ => {
                    let value = (random.below(3) > 0).then(|| Bytes::from(random.next().to_string()));
                    Write::Fact(format!("{tag}/random/{seed}/{}", random.below(3)), value)
                }
            });
        }
        if random.below(20) == 0 {
            let generation = &generations[random.below(2)];
            let counts = (store.remove_generation(generation).await, memory.remove_generation(generation).await);
            assert_eq!(counts.0.expect("it is removed"), counts.1.expect("memory removes"));
        }
        assert_eq!(write(store, writes.clone()).await, write(&memory, writes.clone()).await, "seed {seed}: {writes:?}");
        let mut reads = Vec::new();
        for entity in entities {
            reads.push(Read::Row(generations[0].key(entity)));
            reads.push(Read::AllTiles(generations[1].key(entity)));
            let some = (0..random.below(9)).map(|_| ids[random.below(8)]).collect();
            reads.push(Read::Tiles(generations[1].key(entity), some));
        }
        reads.extend((0..3).map(|fact| Read::Fact(format!("{tag}/random/{seed}/{fact}"))));
        reads.extend((0..3).map(|mark| Read::Mark(format!("{tag}/random/{seed}/{mark}"))));
        let answers = (read(store, &reads).await, read(&memory, &reads).await);
        for (i, (found, expected)) in answers.0.iter().zip(&answers.1).enumerate() {
            assert_eq!(found, expected, "seed {seed}, round {round}, {:?} after {writes:?}", reads[i]);
        }
    }
}

/// SplitMix64: enough for test cases, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

#[cfg(test)]
mod tests;
