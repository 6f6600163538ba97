use std::sync::atomic::Ordering;

use feature_defs::time::Position;
use online_store::key::Generation;
use online_store::{Answer, OnlineStore, Read};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::world::*;
use crate::{IngestError, Mode, Progress, Stage};

const FILES: &str = r#"
entities:
  - {name: shop, keys: [{name: shop, type: string}]}
sources:
  - {name: prices, files: prices/*.parquet, event_time: sold_at, created_time: seen_at, deleted: gone, every: 5m}
  - {name: shops, files: shops.parquet, static: true}
feature_views:
  - name: price
    entity: shop
    source: prices
    features: [{name: amount, type: float64}]
  - name: prices_load
    entity: shop
    source: prices
    windows: [1h, 24h]
    aggregates:
      - {name: n, function: count}
      - {name: total, function: sum, of: amount}
  - name: shop
    entity: shop
    source: shops
    features: [{name: amount, type: float64}]
"#;

async fn materialize(world: &World, names: &[&str], through: i64, mode: Mode) -> Result<Vec<Progress>, IngestError> {
    // Nothing is made visible before its time: the clock is there already.
    world.set_clock(world.now().max(through));
    let (progress, mut messages) = tokio::sync::mpsc::channel(1_000);
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    world.ingest().materialize(&names, through, mode, progress).await?;
    let mut all = Vec::new();
    while let Some(message) = messages.recv().await {
        all.push(message);
    }
    Ok(all)
}

fn with_positions(world: &World, sales: &[Sale]) -> Vec<(Sale, Position)> {
    let source = world.plan.source("prices").unwrap();
    let times = source.times(&source.align(&batch(sales), None).unwrap(), None).unwrap();
    let position = |row: usize| times[row].unwrap().position;
    sales
        .iter()
        .enumerate()
        .filter(|(_, s)| s.sold_at.is_some())
        .map(|(row, sale)| (sale.clone(), position(row)))
        .collect()
}

async fn check(world: &World, sales: &[Sale], t: i64) {
    let events = with_positions(world, sales);
    for view in world.plan.views.iter().filter(|view| &*view.source.name == "prices") {
        world.check_view(view, &events, t, "files").await;
    }
}

async fn fresh() -> World {
    let mut world = World::new(STREAM).await;
    world.stop().await;
    world.adopt_text(FILES);
    world
}

#[tokio::test]
async fn runs_take_what_became_known_and_a_dry_run_only_counts() {
    let mut world = fresh().await;
    let mut late = sale("a", 9.0, "", T0 + MINUTE);
    late.seen_at = Some(T0 + 50 * MINUTE);
    let sales =
        [sale("a", 1.0, "", T0), sale("b", 2.0, "", T0 + 20 * MINUTE), late, sale("a", 3.0, "", T0 + 21 * MINUTE)];
    world.write_parquet("prices/0.parquet", &sales);
    world.write_parquet("shops.parquet", &[sale("a", 5.0, "", T0)]);
    world.open().await;
    assert!(world.ingest().backfilling().iter().any(|(generation, _)| &*generation.view == "price"));
    let messages = materialize(&world, &["prices"], T0 + 20 * MINUTE, Mode::DryRun).await.unwrap();
    let done = messages.last().unwrap();
    assert_eq!((done.stage, done.rows_read, done.rows_new, done.entities), (Stage::Done, 4, 4, 4));
    assert_eq!((done.rows_applied, done.rows_stale, done.rows_total), (4, 0, Some(4)), "{done:?}");
    assert!(!world.ingest().ready(&generation(&world, "price")));
    for (minutes, rows_new) in [(20, 4), (24, 0), (25, 2), (60, 2)] {
        let t = T0 + minutes * MINUTE;
        let messages = materialize(&world, &["prices"], t, Mode::Apply).await.unwrap();
        assert_eq!(messages.last().unwrap().rows_new, rows_new, "at {minutes} min");
        check(&world, &sales, t).await;
    }
    let messages = materialize(&world, &["prices"], T0, Mode::Apply).await.unwrap();
    assert_eq!(messages.last().unwrap().stage, Stage::Skipped);
    let message = messages.last().unwrap().message.clone().unwrap();
    assert!(message.starts_with("already materialized through 2023-11-15T01:00:00"), "{message}");
    let (progress, _messages) = tokio::sync::mpsc::channel(1_000);
    let future = world.now() + 1;
    let error = world.ingest().materialize(&[], future, Mode::Apply, progress).await.unwrap_err();
    assert!(matches!(error, IngestError::ThroughInFuture { .. }), "{error}");
    let error = materialize(&world, &["price"], T0, Mode::Apply).await.unwrap_err();
    assert_eq!(error.to_string(), "there is no source `price` to materialize; the sources of files are: prices, shops");
    world.stop().await;
    world.open().await;
    assert!(world.ingest().ready(&generation(&world, "price")));
}

fn generation(world: &World, view: &str) -> Generation {
    Generation::new("test", view, world.plan.view(view).unwrap().storage_digest.as_str())
}

#[tokio::test]
async fn static_sources_load_by_themselves_and_again_when_they_change() {
    let mut world = fresh().await;
    world.write_parquet("prices/0.parquet", &[sale("a", 1.0, "", T0)]);
    world.write_parquet("shops.parquet", &[sale("a", 5.0, "", T0), sale("b", 6.0, "", T0), sale("a", 4.0, "", T0)]);
    world.open().await;
    let view = generation(&world, "shop");
    for _ in 0..5_000 {
        if world.ingest().ready(&view) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert_eq!(stored(&world, "a").await, Some(5.0), "the greater content wins");
    assert_eq!(stored(&world, "b").await, Some(6.0));
    let messages = materialize(&world, &["shops"], T0, Mode::Apply).await.unwrap();
    assert_eq!(messages.last().unwrap().message.as_deref(), Some("its files have not changed since they were loaded"));
    world.write_parquet("shops.parquet", &[sale("a", 2.0, "", T0)]);
    materialize(&world, &[], T0, Mode::Apply).await.unwrap();
    assert_eq!(stored(&world, "a").await, Some(2.0), "a changed row need not be greater");
    assert_eq!(stored(&world, "b").await, None, "a row that is gone is gone");
}

async fn stored(world: &World, shop: &str) -> Option<f64> {
    use feature_defs::value::{Type, Value, encode};
    let mut entity = Vec::new();
    encode(&Value::String(shop.into()), &mut entity);
    let key = generation(world, "shop").key(entity);
    let answers = world.online.read(&[Read::Row(key)]).await.unwrap();
    let Answer::Row(blob) = &answers[0] else { panic!("{answers:?}") };
    let row = online_store::row::decode(blob.as_ref()?, &[Type::Float64]).unwrap();
    match row.values[0] {
        Value::Float64(x) => Some(x),
        _ => None,
    }
}

/// Runs of any T, crashed in the middle, with memory for a few rows only, answer as the reference does.
#[tokio::test]
async fn generated_files_answer_as_the_reference() {
    for seed in 0..10 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut world = fresh().await;
        if seed % 2 == 0 {
            world.tune = |options| options.limits.materialize_rows_max = 20;
        }
        let sales: Vec<Sale> = (0..300)
            .map(|_| {
                let sold_at = T0 + random.random_range(-30..240) * MINUTE;
                let mut sale = sale(["a", "b", "c", "d", "e"][random.random_range(0..5)], 0.0, "", sold_at);
                sale.amount = random.random_bool(0.9).then(|| f64::from(random.random_range(-50..50)) / 3.0);
                sale.seen_at = random.random_bool(0.5).then(|| sold_at + random.random_range(-20..90) * MINUTE);
                sale.gone = Some(random.random_bool(0.1));
                sale
            })
            .collect();
        world.write_parquet("prices/0.parquet", &sales[..150]);
        world.write_parquet("prices/1.parquet", &sales[150..]);
        world.write_parquet("shops.parquet", &[]);
        world.open().await;
        let mut t = T0;
        for _ in 0..12 {
            t += random.random_range(1..40) * MINUTE;
            if random.random_bool(0.4) {
                world.online.writes_left.store(random.random_range(1..12), Ordering::SeqCst);
                let crashed = materialize(&world, &["prices"], t, Mode::Apply).await;
                world.online.writes_left.store(0, Ordering::SeqCst);
                world.online.down.store(false, Ordering::SeqCst);
                if let Err(error) = crashed {
                    assert!(error.is_retryable(), "{error}");
                    world.crash().await;
                    world.open().await;
                    t += random.random_range(0..20) * MINUTE;
                }
            }
            materialize(&world, &["prices"], t, Mode::Apply).await.unwrap();
            check(&world, &sales, t).await;
        }
    }
}

#[tokio::test]
async fn unreadable_files_are_named() {
    let mut world = fresh().await;
    std::fs::create_dir_all(world.folder.path().join("prices")).unwrap();
    std::fs::write(world.folder.path().join("prices/0.parquet"), b"PAR1 and nothing else PAR1").unwrap();
    world.write_parquet("shops.parquet", &[]);
    world.open().await;
    let error = materialize(&world, &["prices"], T0, Mode::Apply).await.unwrap_err().to_string();
    assert!(error.contains("prices/0.parquet cannot be read as Parquet"), "{error}");
}
