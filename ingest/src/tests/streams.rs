use std::sync::atomic::Ordering;
use std::time::Duration;

use feature_defs::time::Position;
use offline_store::history::FIRST_PUSHED;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use online_store::key::Generation;
use online_store::{Answer, OnlineStore, Read};

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
async fn a_full_log_makes_pushers_wait_then_refuses_and_recovers() {
    let mut world = World::new(STREAM).await;
    world.stop().await;
    world.tune = |options| {
        options.log.log_bytes_max = 20_000;
        options.log.segment_bytes = 4_000;
        options.limits.room_wait = Duration::from_secs(3);
    };
    world.open().await;
    // The log is many times as small as what goes through it: it is flushed when it is full, not half a minute later.
    for index in 0..100 {
        world.push(&[sale("a", 1.0, &format!("e{index}"), T0 - index)]).await;
    }
    assert!(world.ingest().log_bytes() <= 20_000);
    world.check_online().await;
    // What cannot be applied stays in the log.
    world.online.down.store(true, Ordering::SeqCst);
    let mut refused = None;
    for index in 100..200 {
        let sales = [sale("a", 1.0, &format!("e{index}"), T0 - index)];
        let started = std::time::Instant::now();
        match world.ingest().push("sales", batch(&sales), Wait::Durable).await {
            Ok(pushed) => world.remember(&sales, &pushed),
            Err(error) => {
                assert!(error.is_retryable());
                refused = Some((sales, error, started.elapsed()));
                break;
            }
        }
    }
    let (sales, error, waited) = refused.expect("a log of 20 kB fills up");
    assert!(error.to_string().contains("are not in the history yet, 20000 are allowed"), "{error}");
    assert!((Duration::from_secs(2)..Duration::from_secs(20)).contains(&waited), "waited {waited:?}");
    world.online.down.store(false, Ordering::SeqCst);
    assert_eq!(world.push(&sales).await.accepted, 1, "an id that was refused is not taken for a duplicate");
    world.check_online().await;
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
            match random.random_range(0..13) {
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
                8 => {
                    world.settle().await;
                    world.online.lose(random.random_range(1..40)).await;
                    if random.random_bool(0.5) {
                        world.noticed().await;
                    }
                }
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
        world.settle().await;
        world.noticed().await;
        world.check_online().await;
        world.check_history().await;
        world.set_clock(world.now() + 3 * HOUR);
        world.check_online().await;
        world.check_history().await;
    }
}

#[tokio::test]
async fn what_the_store_lost_is_written_again_before_anything_new() {
    let mut world = World::new(STREAM).await;
    for index in 0..40 {
        world.push(&[sale("a", f64::from(index), &format!("e{index}"), T0 - i64::from(index) * MINUTE)]).await;
        if index == 20 {
            world.ingest().flush().await.unwrap();
        }
    }
    // Some of it is in history and some in memory. The next event must not hide what is missing.
    world.online.lose(90).await;
    world.push(&[sale("a", 7.0, "next", T0)]).await;
    world.check_online().await;
    // Nothing is pushed: it is noticed all the same, within a second or so, and nobody wakes anybody.
    world.online.lose(25).await;
    let started = std::time::Instant::now();
    while world.online.inner().read(&[Read::Mark("mark/test/sales".into())]).await.unwrap()
        != [Answer::Mark(Some(world.ingest().status()[0].applied))]
    {
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", world.ingest().backfilling());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.check_online().await;
    // Everything is gone, facts and all.
    world.online.lose(usize::MAX).await;
    world.noticed().await;
    world.check_online().await;
    // And while nobody ran.
    world.stop().await;
    world.online.lose(60).await;
    world.open().await;
    world.noticed().await;
    world.check_online().await;
    world.check_history().await;
}

#[tokio::test]
async fn a_build_that_lost_something_begins_again() {
    let mut world = World::new(STREAM).await;
    let sales: Vec<Sale> =
        (0..600).map(|n| sale(&format!("s{n}"), f64::from(n), &format!("e{n}"), T0 - i64::from(n) * MINUTE)).collect();
    world.push(&sales).await;
    world.settle().await;
    world.online.until_loss.store(700, Ordering::SeqCst);
    world.adopt(&format!("{STREAM}{EXTRA_VIEW}")).await;
    world.noticed().await;
    assert_eq!(world.online.until_loss.load(Ordering::SeqCst), 0, "something was lost");
    world.check_online().await;
}

#[tokio::test]
async fn a_process_that_was_replaced_stops_and_changes_nothing() {
    let mut old = World::new(STREAM).await;
    let first = [sale("a", 1.0, "1", T0 - 1), sale("b", 1.0, "1b", T0 - 1)];
    old.push(&first).await;
    let mut new = old.beside().await;
    new.push(&first).await;
    new.check_online().await;
    let second = [sale("a", 2.0, "2", T0 - 2)];
    new.push(&second).await;
    let third = [sale("a", 3.0, "3", T0 - 3)];
    let error = old.ingest().push("sales", batch(&second), Wait::Visible).await.unwrap_err();
    assert!(error.to_string().starts_with("another process has taken over writing the online store"), "{error}");
    assert!(!error.is_retryable());
    let error = old.ingest().push("sales", batch(&third), Wait::Durable).await.unwrap_err();
    assert!(matches!(error, IngestError::Fenced { .. }), "{error}");
    new.check_online().await;
    let trouble = old.ingest().status()[0].trouble.clone();
    assert!(trouble.is_some_and(|trouble| trouble.contains("stop one of the two")), "{:?}", old.ingest().status());
    new.push(&third).await;
    new.check_online().await;
    // What the old one had taken is still in its log, and a new process over it goes on from there.
    old.stop().await;
    old.open().await;
    let again = old.ingest().push("sales", batch(&second), Wait::Visible).await.unwrap();
    assert_eq!(again.duplicates, 1);
    new.check_online().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_appliers_at_once_change_nothing() {
    let mut one = World::new(STREAM).await;
    let mut two = one.beside().await;
    for round in 0..30 {
        let sales: Vec<Sale> = (0..20)
            .map(|n| {
                let shop = ["a", "b", "c"][n % 3];
                sale(shop, (round * n) as f64, &format!("{round}-{n}"), T0 - (n * round) as i64 * MINUTE)
            })
            .collect();
        let (batch_one, batch_two) = (batch(&sales), batch(&sales));
        let (first, second) = tokio::join!(
            one.ingest().push("sales", batch_one, Wait::Visible),
            two.ingest().push("sales", batch_two, Wait::Visible)
        );
        two.remember(&sales, &second.unwrap());
        match first {
            Ok(pushed) => one.remember(&sales, &pushed),
            Err(error) => {
                assert!(matches!(error, IngestError::Fenced { .. }), "{error}");
                // Whoever was replaced comes back with its log, and replaces the other.
                one.stop().await;
                two.check_online().await;
                return;
            }
        }
    }
    panic!("the second process has not replaced the first");
}

#[tokio::test]
async fn an_id_that_is_used_again_for_another_event_is_rejected() {
    let mut world = World::new(STREAM).await;
    let first = sale("a", 1.0, "1", T0 - 1);
    let mut other = first.clone();
    other.amount = Some(2.0);
    let pushed = world.push(&[first.clone(), other.clone(), sale("b", 5.0, "2", T0 - 1)]).await;
    let reason = "`id` was used before for an event that said something else; give every event its own".to_owned();
    assert_eq!((pushed.accepted, pushed.duplicates, &pushed.rejected), (2, 1, &vec![(1, reason.clone())]));
    for when in ["at once", "after a crash, from the log", "after a stop, from the history"] {
        let pushed = world.push(&[sale("b", 5.0, "2", T0 - 1), other.clone(), first.clone()]).await;
        assert_eq!((pushed.accepted, pushed.duplicates), (0, 3), "{when}");
        assert_eq!(pushed.rejected, [(1, reason.clone())], "{when}");
        world.check_online().await;
        if when == "at once" {
            world.crash().await;
        } else {
            world.stop().await;
        }
        world.open().await;
    }
    // A column that is new says nothing about what was said before.
    world
        .adopt(&STREAM.replace(
            "    event_time: sold_at",
            "      - {name: note, type: string, nullable: true}\n    event_time: sold_at",
        ))
        .await;
    assert_eq!(
        world.ingest().push("sales", batch(std::slice::from_ref(&first)), Wait::Durable).await.unwrap().duplicates,
        1
    );
    world.adopt(STREAM).await;
    world.check_history().await;
}

#[tokio::test]
async fn events_of_the_far_future_are_rejected() {
    let mut world = World::new(STREAM).await;
    let day = 24 * HOUR;
    let pushed = world.push(&[sale("a", 1.0, "1", T0 + 7 * day + 1), sale("a", 1.0, "2", T0 + 7 * day)]).await;
    assert_eq!((pushed.accepted, pushed.early), (1, 1));
    assert_eq!(pushed.rejected, [(0, "`sold_at` is more than 7 days ahead of the server's clock".to_owned())]);
    world.check_history().await;
    // Nothing of it was kept: a day later the same event is a new one.
    world.set_clock(T0 + day);
    assert_eq!(world.push(&[sale("a", 1.0, "1", T0 + 7 * day + 1)]).await.accepted, 1);
}

#[tokio::test]
async fn freshness_is_measured_when_events_are_visible() {
    #[derive(Default)]
    struct Seen(std::sync::Mutex<Vec<(String, crate::Visible)>>);
    impl crate::Meter for Seen {
        fn visible(&self, source: &str, events: &[crate::Visible]) {
            self.0.lock().unwrap().extend(events.iter().map(|event| (source.to_owned(), *event)));
        }
    }
    static SEEN: std::sync::OnceLock<std::sync::Arc<Seen>> = std::sync::OnceLock::new();
    let mut world = World::new(STREAM).await;
    world.stop().await;
    world.tune = |options| options.meter = Some(SEEN.get_or_init(Default::default).clone());
    world.open().await;
    world.push(&[sale("a", 1.0, "1", T0 - 3 * MINUTE), sale("a", 1.0, "early", T0 + MINUTE)]).await;
    world.set_clock(T0 + 3 * MINUTE);
    world.settle().await;
    let visible = |since_event, since_arrival| crate::Visible { since_event, since_arrival };
    let seen = SEEN.get().unwrap().0.lock().unwrap().clone();
    let expected = [visible(3 * MINUTE, 0), visible(2 * MINUTE, 2 * MINUTE)].map(|event| ("sales".to_owned(), event));
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn what_no_request_can_see_any_more_may_be_forgotten() {
    let mut world = World::new(STREAM).await;
    world.push(&[sale("a", 1.0, "1", T0), sale("b", 1.0, "2", T0 - HOUR)]).await;
    world.check_online().await;
    let entities = |world: &World| {
        let online = world.online.inner();
        let views: Vec<Generation> = ["last", "load"]
            .map(|view| Generation::new("test", view, world.plan.view(view).unwrap().storage_digest.as_str()))
            .into();
        async move {
            let mut left = Vec::new();
            for shop in ["a", "b"] {
                let mut entity = Vec::new();
                feature_defs::value::encode(&feature_defs::value::Value::String(shop.into()), &mut entity);
                let reads = [Read::Row(views[0].key(entity.clone())), Read::Tiles(views[1].key(entity), vec![])];
                let answers = online.read(&reads).await.unwrap();
                left.push((
                    matches!(answers[0], Answer::Row(Some(_))),
                    matches!(answers[1], Answer::Tiles { position: Some(_), .. }),
                ));
            }
            left
        }
    };
    // ttl 2 h and keep 1 d; windows of 24 h on a grid of 1 h, and a day.
    for (hours, left) in [(25, [(true, true); 2]), (26, [(true, true), (false, true)]), (27, [(false, true); 2])] {
        world.set_clock(T0 + hours * HOUR - MINUTE);
        crate::keep::collect(&world.ingest().inner).await;
        assert_eq!(entities(&world).await, left, "{hours} h");
    }
    world.set_clock(T0 + 49 * HOUR);
    world.stop().await;
    world.tune = |options| options.expires = false;
    world.open().await;
    crate::keep::collect(&world.ingest().inner).await;
    assert_eq!(entities(&world).await, [(false, true); 2], "nothing is forgotten where requests bring their times");
    world.stop().await;
    world.tune = |_| {};
    world.open().await;
    crate::keep::collect(&world.ingest().inner).await;
    assert_eq!(entities(&world).await, [(false, false); 2]);
}

#[tokio::test]
async fn a_push_that_waits_to_be_visible_does_not_wait_for_ever() {
    let mut world = World::new(STREAM).await;
    world.stop().await;
    world.tune = |options| options.limits.visible_wait = Duration::from_millis(50);
    world.open().await;
    world.settle().await;
    world.online.down.store(true, Ordering::SeqCst);
    let sales = [sale("a", 1.0, "1", T0 - 1)];
    let error = world.ingest().push("sales", batch(&sales), Wait::Visible).await.unwrap_err();
    assert!(matches!(error, IngestError::NotVisible { .. }) && error.is_retryable(), "{error}");
    assert!(error.to_string().contains("need not be pushed again"), "{error}");
    world.events.push((sales[0].clone(), Position { time: T0, sequence: FIRST_PUSHED }));
    world.online.down.store(false, Ordering::SeqCst);
    world.check_online().await;
    world.check_history().await;
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
    let again = [sale("a", 3.0, "e3", T0 - 3 * MINUTE)];
    assert_eq!(world.push(&again).await.duplicates, 1, "ids are found in runs as well");
    assert_eq!(world.push(&[sale("a", 0.0, "e3", T0)]).await.rejected.len(), 1, "and what was said");

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
