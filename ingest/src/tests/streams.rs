use std::sync::atomic::Ordering;
use std::time::Duration;

use feature_defs::time::Position;
use offline_store::history::FIRST_PUSHED;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::world::*;
use crate::{IngestError, Wait};

#[tokio::test]
async fn a_push_is_visible_and_becomes_history() {
    let mut world = World::new(STREAM).await;
    let pushed = world.push(&[sale("a", 1.0, "1", T0 - MINUTE), sale("b", 2.0, "2", T0 - HOUR)]).await;
    assert_eq!((pushed.accepted, pushed.duplicates, pushed.early), (2, 0, 0));
    assert_eq!(pushed.last_sequence, Some(FIRST_PUSHED + 1));
    world.check_online().await;
    world.check_history().await;
    world.set_clock(T0 + 2 * HOUR);
    world.check_online().await;
}

#[tokio::test]
async fn an_early_event_waits_for_its_time_also_over_a_crash() {
    let mut world = World::new(STREAM).await;
    let mut known_later = sale("a", 5.0, "2", T0 - MINUTE);
    known_later.seen_at = Some(T0 + 20 * MINUTE);
    let pushed = world.push(&[sale("a", 1.0, "1", T0 + 10 * MINUTE), known_later, sale("a", 3.0, "3", T0)]).await;
    assert_eq!((pushed.accepted, pushed.early), (3, 2));
    world.check_online().await;
    world.check_history().await;
    world.crash().await;
    world.open().await;
    world.check_online().await;
    for minutes in [10, 15, 20, 40] {
        world.set_clock(T0 + minutes * MINUTE);
        world.check_online().await;
    }
    world.check_history().await;
}

#[tokio::test]
async fn redelivery_is_recognised_within_a_push_between_pushes_and_after_restarts() {
    let mut world = World::new(STREAM).await;
    let first = sale("a", 1.0, "1", T0 - 1);
    let ingest = world.ingest();
    let pushed = ingest.push("sales", batch(&[first.clone(), first.clone()]), Wait::Durable).await.unwrap();
    assert_eq!((pushed.accepted, pushed.duplicates), (1, 1));
    world.events.push((first.clone(), Position { time: T0, sequence: FIRST_PUSHED }));
    assert_eq!(world.push(std::slice::from_ref(&first)).await.duplicates, 1);
    world.check_online().await;
    world.crash().await;
    world.open().await;
    assert_eq!(world.push(std::slice::from_ref(&first)).await.duplicates, 1, "from the log");
    world.check_history().await;
    world.stop().await;
    world.open().await;
    assert_eq!(world.push(&[first]).await.duplicates, 1, "from the history");
    world.check_history().await;
}

#[tokio::test]
async fn bad_rows_are_rejected_with_a_reason_and_the_rest_is_taken() {
    let mut world = World::new(STREAM).await;
    let mut timeless = sale("a", 1.0, "1", T0);
    timeless.sold_at = None;
    let mut keyless = sale("a", 1.0, "3", T0);
    keyless.shop = None;
    let far = sale("a", 1.0, "4", i64::MAX - 5);
    let pushed = world.push(&[timeless, sale("a", 2.0, "2", T0), keyless, far]).await;
    assert_eq!(pushed.accepted, 2);
    assert_eq!(
        pushed.rejected,
        [(0, "`sold_at` is null".to_owned()), (3, "`sold_at` is outside the years 0 to 9999".to_owned())]
    );
    world.check_online().await;
    world.check_history().await;
    let wrong = batch(&[sale("a", 1.0, "9", T0)]).project(&[1, 3]).unwrap();
    let error = world.ingest().push("sales", wrong, Wait::Durable).await.unwrap_err();
    assert_eq!(error.to_string(), "the push to `sales` lacks the column `sold_at`, which holds its event times");
    let error = world.ingest().push("sails", batch(&[]), Wait::Durable).await.unwrap_err();
    assert_eq!(error.to_string(), "there is no source `sails` to push to; the streams are: sales");
}

#[tokio::test]
async fn a_row_that_the_store_refuses_becomes_a_dead_letter_and_stops_nobody() {
    use object_store::ObjectStoreExt;
    let mut world = World::new(STREAM).await;
    world.settle().await;
    let long = "x".repeat(70_000);
    let sales = [sale(&long, 1.0, "1", T0 - 1), sale("a", 2.0, "2", T0 - 1)];
    let pushed = world.ingest().push("sales", batch(&sales), Wait::Visible).await.unwrap();
    assert_eq!(pushed.accepted, 2);
    let path = format!("root/test/dead-letters/sales/{T0}-{FIRST_PUSHED}-last.jsonl");
    let letter = world.store.get(&path.into()).await.unwrap().bytes().await.unwrap();
    let letter: serde_json::Value = serde_json::from_slice(&letter).unwrap();
    assert!(letter["reason"].as_str().unwrap().contains("shorten the entity's key values"), "{letter}");
    assert_eq!((letter["view"].as_str(), letter["row"]["id"].as_str()), (Some("last"), Some("1")));
    let position = |sequence| Position { time: T0, sequence };
    world.events = vec![(sales[1].clone(), position(FIRST_PUSHED + 1))];
    world.check_online().await;
    world.events = vec![(sales[0].clone(), position(FIRST_PUSHED)), (sales[1].clone(), position(FIRST_PUSHED + 1))];
    world.check_history().await;
}

#[tokio::test]
async fn while_the_store_is_away_pushes_are_logged_and_applied_later() {
    let mut world = World::new(STREAM).await;
    world.settle().await;
    world.online.down.store(true, Ordering::SeqCst);
    for index in 0..20 {
        let sales = [sale("a", f64::from(index), &format!("e{index}"), T0 - i64::from(index) * MINUTE)];
        let pushed = world.ingest().push("sales", batch(&sales), Wait::Durable).await.unwrap();
        world.remember(&sales, &pushed);
    }
    tokio::time::sleep(Duration::from_millis(120)).await;
    let status = world.ingest().status();
    assert!(status[0].trouble.as_ref().is_some_and(|trouble| trouble.contains("cannot be reached")), "{status:?}");
    assert!(status[0].waiting_rows > 0);
    world.online.down.store(false, Ordering::SeqCst);
    world.check_online().await;
    world.check_history().await;
    assert_eq!(world.ingest().status()[0].trouble, None);
}

#[tokio::test]
async fn a_full_log_pushes_back_and_recovers() {
    let mut world = World::new(STREAM).await;
    world.stop().await;
    world.tune = |options| {
        options.log.log_bytes_max = 20_000;
        options.log.segment_bytes = 4_000;
    };
    world.open().await;
    let mut refused = None;
    for index in 0..100 {
        let sales = [sale("a", 1.0, &format!("e{index}"), T0 - index)];
        match world.ingest().push("sales", batch(&sales), Wait::Visible).await {
            Ok(pushed) => world.remember(&sales, &pushed),
            Err(error) => {
                assert!(error.is_retryable());
                refused = Some((sales, error));
                break;
            }
        }
    }
    let (sales, error) = refused.expect("a log of 20 kB fills up");
    assert!(error.to_string().contains("are not in the history yet, 20000 are allowed"), "{error}");
    world.ingest().flush().await.unwrap();
    assert!(world.ingest().log_bytes() < 8_000, "segments in history are deleted");
    assert_eq!(world.push(&sales).await.accepted, 1, "an id that was refused is not taken for a duplicate");
    world.check_history().await;
}

#[tokio::test]
async fn a_clock_that_goes_back_changes_no_order() {
    let mut world = World::new(STREAM).await;
    world.push(&[sale("a", 1.0, "1", T0 + MINUTE)]).await;
    world.set_clock(T0 + 2 * MINUTE);
    world.check_online().await;
    world.crash().await;
    world.clock.store(T0 - HOUR, Ordering::SeqCst);
    world.open().await;
    world.ingest().push("sales", batch(&[sale("a", 2.0, "2", T0)]), Wait::Visible).await.unwrap();
    let history = {
        world.ingest().flush().await.unwrap();
        world.history().await
    };
    assert_eq!(history.manifest().applied, Position { time: T0 + 2 * MINUTE, sequence: FIRST_PUSHED + 1 });
    world.clock.store(T0 + 3 * MINUTE, Ordering::SeqCst);
    world.events.push((sale("a", 2.0, "2", T0), history.manifest().applied));
    world.check_online().await;
    world.check_history().await;
}

#[tokio::test]
async fn a_new_view_is_built_from_history_and_joins_the_live_ones() {
    let mut world = World::new(STREAM).await;
    for index in 0..200 {
        let shop = ["a", "b", "c"][index % 3];
        world.push(&[sale(shop, index as f64, &format!("e{index}"), T0 - index as i64 * MINUTE)]).await;
    }
    world.adopt(&format!("{STREAM}{EXTRA_VIEW}")).await;
    world.push(&[sale("a", 7.0, "later", T0)]).await;
    world.check_online().await;
    world.push(&[sale("b", 8.0, "later still", T0)]).await;
    world.check_online().await;
    // A view that leaves and comes back has missed events, and is built again.
    world.adopt(STREAM).await;
    world.push(&[sale("c", 9.0, "meanwhile", T0)]).await;
    world.adopt(&format!("{STREAM}{EXTRA_VIEW}")).await;
    world.check_online().await;
    world.stop().await;
    world.open().await;
    assert_eq!(world.ingest().backfilling(), [], "what was ready is ready after a restart");
    world.check_online().await;
    world.check_history().await;
}

#[tokio::test]
async fn a_store_that_lost_everything_is_built_again() {
    let mut world = World::new(STREAM).await;
    for index in 0..50 {
        world.push(&[sale("a", index as f64, &format!("e{index}"), T0 - index * MINUTE)]).await;
    }
    world.stop().await;
    world.online = std::sync::Arc::default();
    world.open().await;
    world.check_online().await;
}

#[tokio::test]
async fn the_prior_history_is_imported_once_before_the_first_event() {
    let mut world = World::new(STREAM).await;
    world.stop().await;
    let mut prior: Vec<Sale> = (0..300)
        .map(|index| {
            sale(["a", "b"][index % 2], index as f64, &format!("p{}", index % 280), T0 - (index as i64 / 3) * MINUTE)
        })
        .collect();
    prior[7].seen_at = Some(T0 - 5);
    prior[8].sold_at = None;
    prior[9].sold_at = Some(T0 + 5 * MINUTE);
    prior[10].gone = Some(true);
    world.write_parquet("data/1.parquet", &prior[..100]);
    world.write_parquet("data/0.parquet", &prior[100..]);
    world.adopt_text(&STREAM.replace("#history", "history: data/*.parquet"));
    world.open().await;
    assert_eq!(world.push(&[sale("a", 1.0, "p3", T0)]).await.duplicates, 1);
    world.push(&[sale("a", 1.0, "new", T0 - 3 * MINUTE)]).await;
    // The reference numbers rows by (event time, content), the first of each id wins, early ones come through the log.
    let history = world.history().await;
    let imported = history.manifest().imported.clone().unwrap();
    assert_eq!((imported.rows, imported.skipped), (280, 20));
    let mut usable: Vec<Sale> = prior.iter().filter(|sale| sale.sold_at.is_some()).cloned().collect();
    usable.sort_by_key(|sale| (sale.sold_at, sale.shop.clone(), sale.amount.map(|amount| amount as i64)));
    let mut seen = std::collections::HashSet::new();
    usable.retain(|sale| seen.insert(sale.id.clone()));
    for (index, sale) in usable.into_iter().enumerate() {
        let sold_at = sale.sold_at.unwrap();
        let time = sold_at.max(sale.seen_at.unwrap_or(sold_at));
        let sequence = if time > T0 { FIRST_PUSHED } else { index as u64 + 1 };
        world.events.push((sale, Position { time, sequence }));
    }
    world.check_online().await;
    world.check_history().await;
    world.crash().await;
    world.open().await;
    world.set_clock(T0 + HOUR);
    world.check_online().await;
    world.check_history().await;
}

#[tokio::test]
async fn a_prior_history_that_comes_too_late_is_refused() {
    let mut world = World::new(STREAM).await;
    world.push(&[sale("a", 1.0, "1", T0)]).await;
    world.write_parquet("data/0.parquet", &[sale("a", 1.0, "p", T0 - HOUR)]);
    let plan = compiled(&STREAM.replace("#history", "history: data/*.parquet"));
    let error = world.ingest().adopt(plan).await.unwrap_err();
    assert!(matches!(error, IngestError::HistoryAfterLive { .. }), "{error}");
    assert!(error.to_string().contains("remove `history:`, or push its rows as events"), "{error}");
}

#[tokio::test]
async fn a_damaged_history_names_the_object_and_the_next_step() {
    use object_store::{ObjectStoreExt, PutPayload};
    let mut world = World::new(STREAM).await;
    world.push(&[sale("a", 1.0, "1", T0)]).await;
    world.stop().await;
    let history = world.history().await;
    let path = history.object_path(&history.manifest().files[0]);
    world.store.put(&path, PutPayload::from_static(b"PAR1 but no more")).await.unwrap();
    let ingest = crate::Ingest::open(world.options()).await.unwrap();
    let error = ingest.adopt(world.plan.clone()).await.unwrap_err().to_string();
    assert!(error.contains(path.as_ref()) && error.contains("restore it from a backup"), "{error}");
    let manifest = object_store::path::Path::from("root/test/history/sales/manifest.json");
    world.store.put(&manifest, PutPayload::from_static(b"{\"format\": 7}")).await.unwrap();
    let error = ingest.adopt(world.plan.clone()).await.unwrap_err().to_string();
    assert!(error.contains("manifest.json has format 7") && error.contains("upgrade"), "{error}");
}

/// Any order of early, late, tied, doubled, deleted and keyless events, with crashes and flushes in between, answers as
/// the reference does.
#[tokio::test]
async fn generated_streams_answer_as_the_reference() {
    for seed in 0..12 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut world = World::new(STREAM).await;
        let mut next_id = 0;
        for _ in 0..60 {
            match random.random_range(0..12) {
                0 => {
                    world.crash().await;
                    world.open().await;
                }
                1 => {
                    world.ingest().flush().await.unwrap();
                }
                2 => {
                    world.stop().await;
                    world.open().await;
                }
                3 => {
                    world.online.writes_left.store(random.random_range(1..4), Ordering::SeqCst);
                    let sales = [generated(&mut random, world.now(), &mut next_id)];
                    let pushed = world.ingest().push("sales", batch(&sales), Wait::Durable).await.unwrap();
                    world.remember(&sales, &pushed);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    world.online.writes_left.store(0, Ordering::SeqCst);
                    world.online.down.store(false, Ordering::SeqCst);
                }
                4 | 5 => world.set_clock(world.now() + random.random_range(0..40) * MINUTE),
                6 => world.check_online().await,
                7 => {
                    let extra = if random.random_bool(0.5) { EXTRA_VIEW } else { "" };
                    world.adopt(&format!("{STREAM}{extra}")).await;
                }
                _ => {
                    let rows = random.random_range(1..8);
                    let sales: Vec<Sale> =
                        (0..rows).map(|_| generated(&mut random, world.now(), &mut next_id)).collect();
                    world.push(&sales).await;
                }
            }
        }
        world.check_online().await;
        world.check_history().await;
        world.set_clock(world.now() + 3 * HOUR);
        world.check_online().await;
        world.check_history().await;
    }
}

fn generated(random: &mut SmallRng, now: i64, next_id: &mut u32) -> Sale {
    let grid = [MINUTE, 5 * MINUTE, 1][random.random_range(0..3)];
    let sold_at = match random.random_range(0..10) {
        0 => now + random.random_range(0..30) * grid,
        1 => now,
        2 => now - random.random_range(0..26) * HOUR,
        _ => now - random.random_range(0..90) * grid,
    };
    let amount = match random.random_range(0..10) {
        0 => None,
        1 => Some(f64::NAN),
        2 => Some(-0.0),
        3 => Some(f64::INFINITY),
        _ => Some(f64::from(random.random_range(-100..100)) / 7.0),
    };
    // Ids come back now and then; a repeated one is the same to the store, whatever else the row says.
    *next_id += u32::from(random.random_bool(0.85));
    Sale {
        shop: random.random_bool(0.95).then(|| ["a", "b", "c", ""][random.random_range(0..4)].to_owned()),
        amount,
        gone: random.random_bool(0.5).then(|| random.random_bool(0.2)),
        id: next_id.to_string(),
        seen_at: random.random_bool(0.2).then(|| sold_at + random.random_range(-10..40) * MINUTE),
        sold_at: Some(sold_at),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn history_being_away_does_not_stop_what_answers_online() {
    let mut world = World::new(STREAM).await;
    world.stop().await;
    let objects = world.folder.path().join("objects");
    std::fs::create_dir(&objects).unwrap();
    world.store = std::sync::Arc::new(object_store::local::LocalFileSystem::new_with_prefix(&objects).unwrap());
    world.tune = |options| options.flush_after = Duration::from_millis(10);
    world.open().await;
    world.push(&[sale("a", 1.0, "1", T0)]).await;
    world.ingest().flush().await.unwrap();

    // Where the folder was is a file, so nothing below it can be written.
    let history = objects.join("root/test/history");
    let away = objects.join("away");
    std::fs::rename(&history, &away).unwrap();
    std::fs::write(&history, "in the way").unwrap();
    for n in 2..6 {
        let sales = [sale("a", 1.0, &n.to_string(), T0 + n)];
        let pushed = tokio::time::timeout(Duration::from_secs(5), world.push(&sales)).await;
        assert_eq!(pushed.expect("events go on becoming visible").accepted, 1);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    world.set_clock(T0 + MINUTE);
    world.check_online().await;
    assert!(world.ingest().flush().await.is_err(), "history really is away");

    std::fs::remove_file(&history).unwrap();
    std::fs::rename(&away, &history).unwrap();
    world.ingest().flush().await.unwrap();
    world.check_history().await;
}

/// Until the history of `sales` has sorted files, which only a compaction writes.
async fn compacted(world: &World) {
    for _ in 0..20_000 {
        if world.history().await.manifest().files.iter().any(|file| file.is_sorted()) {
            return;
        }
        world.ingest().wake();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("the history is not compacted: {:?}", world.ingest().status());
}

#[tokio::test]
async fn history_is_compacted_beside_live_events_and_changes_nothing() {
    let mut world = World::new(STREAM).await;
    for index in 0..40 {
        let shop = ["a", "b", "c"][index % 3];
        world.push(&[sale(shop, index as f64, &format!("e{index}"), T0 - index as i64 * MINUTE)]).await;
        world.ingest().flush().await.unwrap();
    }
    compacted(&world).await;
    world.push(&[sale("a", 7.0, "later", T0)]).await;
    world.check_history().await;
    // A view that is new is built from runs and small files alike, in order of position.
    world.adopt(&format!("{STREAM}{EXTRA_VIEW}")).await;
    world.check_online().await;
    world.crash().await;
    world.open().await;
    assert_eq!(world.push(&[sale("a", 0.0, "e3", T0)]).await.duplicates, 1, "ids are found in runs as well");

    // By hand, it is one run; what was applied and not written yet is in it.
    world.push(&[sale("b", 8.0, "last", T0)]).await;
    world.settle().await;
    let (progress, _reports) = tokio::sync::mpsc::channel(16);
    let looked = world.ingest().compact(&["sales".into()], crate::Mode::DryRun, progress.clone()).await.unwrap();
    assert!(looked[0].changed && looked[0].files_taken > 1, "{looked:?}");
    let done = world.ingest().compact(&[], crate::Mode::Apply, progress.clone()).await.unwrap();
    assert_eq!((done.len(), done[0].changed, done[0].files_after, done[0].rows), (1, true, 1, 42));
    let again = world.ingest().compact(&[], crate::Mode::Apply, progress.clone()).await.unwrap();
    assert!(!again[0].changed);
    world.check_history().await;
    let error = world.ingest().compact(&["sails".into()], crate::Mode::Apply, progress.clone()).await.unwrap_err();
    assert!(error.to_string().contains("there is no source `sails`; there are: sales"), "{error}");
    let error = world.ingest().import_files("sales", progress).await.unwrap_err();
    assert!(error.to_string().contains("`coeval ingest sales FILE`"), "{error}");
    world.stop().await;
    assert!(
        !world.folder.path().join("spill").exists()
            || world.folder.path().join("spill").read_dir().unwrap().next().is_none()
    );
}
