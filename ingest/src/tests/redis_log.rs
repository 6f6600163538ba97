//! The event log in a Redis, under all of ingestion: a server may end with its machine.

use std::sync::atomic::Ordering;
use std::time::Duration;

use feature_defs::time::Position;
use futures::StreamExt;
use online_store::conformance::redis_server::RedisServer;

use super::world::*;
use crate::log::LogError;
use crate::{Ingest, IngestError, Wait};

async fn world(folder: &tempfile::TempDir) -> Option<(World, RedisServer)> {
    let redis = RedisServer::start(folder.path())?;
    let mut world = World::new(STREAM).await;
    world.stop().await;
    world.log_redis = Some(redis.url().into());
    world.tune = |options| options.log.confirm_wait = Duration::from_millis(700);
    world.open().await;
    Some((world, redis))
}

#[tokio::test]
async fn another_machine_goes_on_with_what_was_pushed_and_not_applied() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut world, _redis)) = world(&folder).await else { return };
    assert!(world.ingest().log_place().is_some_and(|place| place.starts_with("redis://")));
    world.push(&[sale("a", 1.0, "1", T0), sale("b", 2.0, "2", T0 - MINUTE)]).await;
    world.ingest().flush().await.unwrap();
    world.push(&[sale("a", 4.0, "3", T0 - 1)]).await;
    world.online.down.store(true, Ordering::SeqCst);
    for (number, sales) in [[sale("a", 8.0, "4", T0 - 2)], [sale("b", 16.0, "5", T0 + 2 * MINUTE)]].iter().enumerate() {
        let pushed = world.ingest().push("sales", batch(sales), Wait::Durable).await.unwrap();
        assert_eq!((pushed.accepted, pushed.early), (1, number as u64));
        world.remember(sales, &pushed);
    }
    world.crash().await;
    world.online.down.store(false, Ordering::SeqCst);
    let mut next = world.elsewhere().await;
    next.check_online().await;
    // What the first one acknowledged is known to the next one.
    let again = next.ingest().push("sales", batch(&[sale("a", 8.0, "4", T0 - 2)]), Wait::Visible).await.unwrap();
    assert_eq!((again.accepted, again.duplicates), (0, 1));
    next.push(&[sale("a", 32.0, "6", T0)]).await;
    next.set_clock(T0 + 3 * MINUTE);
    next.check_online().await;
    next.check_history().await;
    next.stop().await;
}

#[tokio::test]
async fn machines_that_die_one_after_the_other_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut world, mut redis)) = world(&folder).await else { return };
    for round in 0..6i64 {
        for number in 0..15 {
            let id = format!("{round}-{number}");
            let ahead = if number % 4 == 0 { 3 * MINUTE } else { -number };
            world.push(&[sale(["a", "b"][number as usize % 2], number as f64, &id, world.now() + ahead)]).await;
            if number == 7 && round % 2 == 0 {
                world.ingest().flush().await.unwrap();
            }
        }
        world.crash().await;
        if round % 3 == 1 {
            redis.restart().unwrap();
        }
        world = world.elsewhere().await;
        world.set_clock(T0 + round * MINUTE);
        world.check_online().await;
    }
    world.set_clock(T0 + HOUR);
    world.check_online().await;
    world.check_history().await;
}

#[tokio::test]
async fn a_machine_that_was_replaced_acknowledges_nothing_and_writes_no_history() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut world, _redis)) = world(&folder).await else { return };
    // Building views puts into history what is there.
    world.settle().await;
    // Applied, so that there is something to put into history.
    let sales = [sale("a", 1.0, "1", T0)];
    let pushed = world.ingest().push("sales", batch(&sales), Wait::Visible).await.unwrap();
    world.remember(&sales, &pushed);
    let mut next = world.elsewhere().await;
    let error = world.ingest().flush().await.unwrap_err();
    assert!(matches!(error, IngestError::Log(LogError::Superseded { .. })), "{error}");
    let error = world.ingest().push("sales", batch(&[sale("a", 2.0, "2", T0)]), Wait::Durable).await.unwrap_err();
    assert!(!error.is_retryable() && error.to_string().contains("has taken over"), "{error}");
    let troubles = world.ingest().troubles();
    assert!(troubles.iter().any(|trouble| trouble.contains("another process has taken over")), "{troubles:?}");
    next.push(&[sale("b", 4.0, "3", T0)]).await;
    next.check_online().await;
    next.check_history().await;
}

#[tokio::test]
async fn a_full_log_in_redis_makes_pushers_wait_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut world, _redis)) = world(&folder).await else { return };
    world.stop().await;
    world.tune = |options| {
        options.log.log_bytes_max = 20_000;
        options.log.segment_bytes = 4_000;
        options.limits.room_wait = Duration::from_millis(500);
    };
    world.open().await;
    for index in 0..60 {
        world.push(&[sale("a", 1.0, &format!("e{index}"), T0 - index)]).await;
    }
    assert!(world.ingest().log_bytes() <= 20_000);
    world.online.down.store(true, Ordering::SeqCst);
    let mut refused = None;
    for index in 100..200 {
        let sales = [sale("a", 1.0, &format!("e{index}"), T0 - index)];
        match world.ingest().push("sales", batch(&sales), Wait::Durable).await {
            Ok(pushed) => world.remember(&sales, &pushed),
            Err(error) => {
                refused = Some((sales, error));
                break;
            }
        }
    }
    let (sales, error) = refused.expect("a log of 20 kB fills up");
    assert!(error.is_retryable() && error.to_string().contains("are not in the history yet"), "{error}");
    world.online.down.store(false, Ordering::SeqCst);
    // The applier may have paused for longer than a push waits for room.
    let start = std::time::Instant::now();
    let pushed = loop {
        match world.ingest().push("sales", batch(&sales), Wait::Visible).await {
            Ok(pushed) => break pushed,
            Err(error) => assert!(error.is_retryable() && start.elapsed() < Duration::from_secs(20), "{error}"),
        }
    };
    assert_eq!((pushed.accepted, pushed.duplicates), (1, 0));
    world.remember(&sales, &pushed);
    world.check_online().await;
    world.check_history().await;
}

#[tokio::test]
async fn a_redis_that_comes_back_needs_no_hand() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut world, mut redis)) = world(&folder).await else { return };
    world.push(&[sale("a", 1.0, "1", T0)]).await;
    redis.kill();
    let sales = [sale("a", 2.0, "2", T0)];
    let error = world.ingest().push("sales", batch(&sales), Wait::Durable).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(world.ingest().troubles().iter().any(|trouble| trouble.contains("takes no events now")));
    redis.restart().unwrap();
    let mut pushed = Err(error);
    for _ in 0..500 {
        pushed = world.ingest().push("sales", batch(&sales), Wait::Visible).await;
        if pushed.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The first try is in the log, and the second one was told so.
    let pushed = pushed.unwrap();
    assert_eq!((pushed.accepted, pushed.duplicates), (0, 1));
    assert!(world.ingest().troubles().is_empty());
    world.push(&[sale("a", 4.0, "3", T0)]).await;
    world.ingest().flush().await.unwrap();
    let history = world.history().await;
    let mut scan = history.scan(world.plan.source("sales").unwrap(), None, Position::START);
    let mut rows = 0;
    while let Some(part) = scan.next().await {
        rows += part.unwrap().positions.len();
    }
    assert_eq!(rows, 3, "each event once");
}

#[tokio::test]
async fn events_in_a_log_on_disk_are_not_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let Some(redis) = RedisServer::start(folder.path()) else { return };
    let mut world = World::new(STREAM).await;
    world.push(&[sale("a", 1.0, "1", T0)]).await;
    world.ingest().flush().await.unwrap();
    world.push(&[sale("a", 2.0, "2", T0)]).await;
    world.crash().await;
    world.log_redis = Some(redis.url().into());
    let ingest = Ingest::open(world.options()).await.unwrap();
    let error = ingest.adopt(world.plan.clone()).await.unwrap_err().to_string();
    assert!(error.contains("holds events of `sales` that are not in the history"), "{error}");
    ingest.abandon().await;
    world.log_redis = None;
    world.open().await;
    world.stop().await;
    world.log_redis = Some(redis.url().into());
    world.open().await;
    world.push(&[sale("a", 4.0, "3", T0)]).await;
    world.check_online().await;
    world.check_history().await;
}
