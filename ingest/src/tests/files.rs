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
    for _ in 0..30_000 {
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

/// What became of the views of a run, by name: new, applied and stale rows.
fn counts(progress: &Progress) -> Vec<(String, u64, u64, u64)> {
    let of_view =
        |view: &crate::ViewProgress| (view.view.to_string(), view.rows_new, view.rows_applied, view.rows_stale);
    progress.views.iter().map(of_view).collect()
}

#[tokio::test]
async fn rows_of_files_that_come_late_are_not_lost_and_count_once() {
    let mut world = fresh().await;
    let mut sales = vec![sale("a", 1.0, "", T0), sale("b", 2.0, "", T0 + 10 * MINUTE)];
    world.write_parquet("prices/0.parquet", &sales);
    world.write_parquet("shops.parquet", &[]);
    world.open().await;
    materialize(&world, &["prices"], T0 + 20 * MINUTE, Mode::Apply).await.unwrap();
    // Known long before the last run's time, in a file that was not there.
    let late = [sale("a", 3.0, "", T0 + 5 * MINUTE), sale("c", 4.0, "", T0 - HOUR)];
    world.write_parquet("prices/1.parquet", &late);
    sales.extend(late);
    let dry = materialize(&world, &["prices"], T0 + 30 * MINUTE, Mode::DryRun).await.unwrap();
    assert_eq!(dry.last().unwrap().rows_applied, 4, "{dry:?}");
    let done = materialize(&world, &["prices"], T0 + 30 * MINUTE, Mode::Apply).await.unwrap();
    let done = done.last().unwrap();
    assert_eq!(done.rows_read, 2, "a file whose rows are all taken is not read again: {done:?}");
    assert_eq!(counts(done), [("price".to_owned(), 2, 2, 0), ("prices_load".to_owned(), 2, 2, 0)]);
    check(&world, &sales, T0 + 30 * MINUTE).await;
    let again = materialize(&world, &["prices"], T0 + 40 * MINUTE, Mode::Apply).await.unwrap();
    assert_eq!(again.last().unwrap().rows_new, 0, "each row counts once");
    check(&world, &sales, T0 + 40 * MINUTE).await;

    // A file that is another one now: rows are taken again, and windows built anew, since they take nothing back.
    sales.remove(0);
    sales.insert(0, sale("a", 9.0, "", T0 + 12 * MINUTE));
    world.write_parquet("prices/0.parquet", &sales[..2]);
    let done = materialize(&world, &["prices"], T0 + 50 * MINUTE, Mode::Apply).await.unwrap();
    let message = done.last().unwrap().message.clone().unwrap();
    assert!(message.starts_with("the windows of `prices_load` were built anew: "), "{message}");
    assert!(message.contains("prices/0.parquet is another file than at the run before"), "{message}");
    assert_eq!(counts(done.last().unwrap()), [("price".to_owned(), 2, 1, 1), ("prices_load".to_owned(), 4, 4, 0)]);
    check(&world, &sales, T0 + 50 * MINUTE).await;

    // The same rows under another name.
    let (from, to) = ("prices/1.parquet", "prices/2.parquet");
    std::fs::rename(world.folder.path().join(from), world.folder.path().join(to)).unwrap();
    let done = materialize(&world, &["prices"], T0 + 60 * MINUTE, Mode::Apply).await.unwrap();
    let message = done.last().unwrap().message.clone().unwrap();
    assert!(message.contains("1 files of the run before are gone, and"), "{message}");
    check(&world, &sales, T0 + 60 * MINUTE).await;

    // What has gone without anything coming stays.
    std::fs::remove_file(world.folder.path().join(to)).unwrap();
    let done = materialize(&world, &["prices"], T0 + 70 * MINUTE, Mode::Apply).await.unwrap();
    assert_eq!((done.last().unwrap().rows_read, &done.last().unwrap().message), (0, &None));
    check(&world, &sales, T0 + 70 * MINUTE).await;
}

#[tokio::test]
async fn files_that_change_after_a_run_that_crashed_are_seen() {
    let mut world = fresh().await;
    let shops: Vec<String> = (0..40).map(|n| format!("s{n}")).collect();
    let mut sales: Vec<Sale> = shops.iter().map(|shop| sale(shop, 1.0, "", T0)).collect();
    world.write_parquet("prices/0.parquet", &sales);
    world.write_parquet("shops.parquet", &[]);
    world.open().await;
    materialize(&world, &["prices"], T0 + 5 * MINUTE, Mode::Apply).await.unwrap();
    let more: Vec<Sale> = shops.iter().map(|shop| sale(shop, 2.0, "", T0 + MINUTE)).collect();
    world.write_parquet("prices/1.parquet", &more);
    sales.extend(more);
    world.online.writes_left.store(60, Ordering::SeqCst);
    materialize(&world, &["prices"], T0 + 10 * MINUTE, Mode::Apply).await.unwrap_err();
    world.online.down.store(false, Ordering::SeqCst);
    world.online.writes_left.store(0, Ordering::SeqCst);
    let more: Vec<Sale> = shops.iter().map(|shop| sale(shop, 3.0, "", T0 + 2 * MINUTE)).collect();
    world.write_parquet("prices/2.parquet", &more);
    sales.extend(more);
    let done = materialize(&world, &["prices"], T0 + 15 * MINUTE, Mode::Apply).await.unwrap();
    let message = done.last().unwrap().message.clone().unwrap();
    assert!(message.contains("files changed after a run that did not end"), "{message}");
    check(&world, &sales, T0 + 15 * MINUTE).await;
}

#[tokio::test]
async fn runs_are_written_down() {
    use crate::runs::{By, Outcome, RunFiles};
    let mut world = fresh().await;
    world.write_parquet("prices/0.parquet", &[sale("a", 1.0, "", T0), sale("a", 2.0, "", T0 + 10 * MINUTE)]);
    world.write_parquet("shops.parquet", &[]);
    world.open().await;
    materialize(&world, &["prices"], T0 + 5 * MINUTE, Mode::Apply).await.unwrap();
    materialize(&world, &["prices"], T0 + 20 * MINUTE, Mode::DryRun).await.unwrap();
    materialize(&world, &["prices"], T0 + 20 * MINUTE, Mode::Apply).await.unwrap();
    std::fs::write(world.folder.path().join("prices/1.parquet"), b"PAR1 and nothing else PAR1").unwrap();
    for _ in 0..3 {
        materialize(&world, &["prices"], T0 + 30 * MINUTE, Mode::Apply).await.unwrap_err();
    }
    let runs = world.ingest().runs("prices", 10).await.unwrap();
    assert_eq!(runs.len(), 3, "a dry run leaves nothing, and the same failure is told once: {runs:?}");
    let [failed, second, first] = &runs[..] else { panic!("three runs") };
    assert!(matches!(&failed.outcome, Outcome::Failed { reason } if reason.contains("prices/1.parquet")), "{failed:?}");
    assert_eq!(
        (first.number, first.by, first.through, &first.outcome),
        (1, By::Request, T0 + 5 * MINUTE, &Outcome::Done)
    );
    assert_eq!((first.rows_read, first.rows_new, first.rows_applied, first.rows_stale), (2, 2, 2, 0));
    let RunFiles::Listed(files) = &first.files else { panic!("the first run lists its files: {first:?}") };
    assert!(files[0].path.ends_with("prices/0.parquet") && files[0].size > 0 && files[0].modified > 0);
    assert_eq!(files[0].newest, Some(T0 + 10 * MINUTE));
    assert_eq!(second.files, RunFiles::SameAs(1));
    let views: Vec<(&str, Option<i64>, u64)> =
        second.views.iter().map(|view| (view.view.as_str(), view.from, view.rows_applied)).collect();
    let from = Some(T0 + 5 * MINUTE);
    assert_eq!(views, [("price", from, 1), ("prices_load", from, 1)]);
    let digest = world.plan.view("price").unwrap().storage_digest.as_str()[..16].to_owned();
    assert_eq!((second.views[0].digest.as_str(), second.started), (digest.as_str(), world.now() - 10 * MINUTE));
}

#[tokio::test]
async fn a_dry_run_compares_with_the_store() {
    let mut world = fresh().await;
    let sales = [sale("a", 1.0, "", T0), sale("b", 1.0, "", T0), sale("c", 1.0, "", T0)];
    world.write_parquet("prices/0.parquet", &sales);
    world.write_parquet("shops.parquet", &[]);
    world.open().await;
    materialize(&world, &["prices"], T0 + 5 * MINUTE, Mode::Apply).await.unwrap();
    // One that is older than what is there, one that is later, one of an entity that is new.
    let mut older = sale("a", 5.0, "", T0 - HOUR);
    older.seen_at = Some(T0 + 9 * MINUTE);
    world.write_parquet("prices/1.parquet", &[older, sale("b", 2.0, "", T0 + MINUTE), sale("d", 1.0, "", T0)]);
    let before = world.ingest().runs("prices", 9).await.unwrap();
    for mode in [Mode::DryRun, Mode::Apply] {
        let done = materialize(&world, &["prices"], T0 + 10 * MINUTE, mode).await.unwrap();
        let done = done.last().unwrap();
        assert_eq!(counts(done), [("price".to_owned(), 3, 2, 1), ("prices_load".to_owned(), 3, 3, 0)], "{mode:?}");
        if mode == Mode::DryRun {
            let entities: Vec<u64> = done.views.iter().map(|view| view.entities).collect();
            assert_eq!(entities, [2, 3], "entities that would change");
            assert_eq!(world.ingest().runs("prices", 9).await.unwrap(), before);
        }
    }
}

/// More rows than go into one call, in several files, several of each entity: several calls are under way at once, and what
/// the store loses meanwhile without a word is noticed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_rows_stream_to_the_store_and_losses_on_the_way_are_noticed() {
    let mut world = fresh().await;
    let mut random = SmallRng::seed_from_u64(7);
    let sales: Vec<Sale> = (0..40_000)
        .map(|n| {
            let sold_at = T0 - random.random_range(0..20 * 60) * MINUTE;
            sale(&format!("s{}", random.random_range(0..15_000)), f64::from(n), "", sold_at)
        })
        .collect();
    for (file, sales) in sales.chunks(9_000).enumerate() {
        world.write_parquet(&format!("prices/{file}.parquet"), sales);
    }
    world.write_parquet("shops.parquet", &[]);
    world.open().await;
    world.online.until_loss.store(20_000, Ordering::SeqCst);
    let error = materialize(&world, &["prices"], T0, Mode::Apply).await.unwrap_err();
    assert!(matches!(error, IngestError::Lost) && error.is_retryable(), "{error}");
    let done = materialize(&world, &["prices"], T0, Mode::Apply).await.unwrap();
    let price = &counts(done.last().unwrap())[0];
    assert_eq!((price.1, price.2 + price.3), (40_000, 40_000), "{price:?}");
    let view = world.plan.view("price").unwrap();
    let mut newest: std::collections::BTreeMap<String, (i64, f64)> = std::collections::BTreeMap::new();
    for sale in &sales {
        let (shop, row) = (sale.shop.clone().unwrap(), (sale.sold_at.unwrap(), sale.amount.unwrap()));
        let known = newest.entry(shop).or_insert(row);
        *known = if row > *known { row } else { *known };
    }
    for (shop, (_, amount)) in newest {
        let mut entity = Vec::new();
        feature_defs::value::encode(&feature_defs::value::Value::String(shop.as_str().into()), &mut entity);
        let answers = world.online.read(&[Read::Row(generation(&world, "price").key(entity))]).await.unwrap();
        let Answer::Row(Some(blob)) = &answers[0] else { panic!("{shop} is missing") };
        let row = online_store::row::decode(blob, &view.row_types()).unwrap();
        assert_eq!(row.values[0], feature_defs::value::Value::Float64(amount), "{shop}");
    }
}

/// Until the newest run of `prices` is what is wanted.
async fn until_run(world: &World, what: &str, is_wanted: impl Fn(&crate::runs::Run) -> bool) -> Vec<crate::runs::Run> {
    for _ in 0..30_000 {
        let runs = world.ingest().runs("prices", 50).await.unwrap();
        if runs.first().is_some_and(&is_wanted) && world.ingest().ready(&generation(world, "price")) {
            return runs;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    panic!("no run {what}: {:?} {:?}", world.ingest().runs("prices", 50).await.unwrap(), world.ingest().troubles());
}

#[tokio::test]
async fn sources_are_materialized_on_their_grid_by_themselves() {
    use crate::runs::By;
    let mut world = fresh().await;
    world.tune = |options| options.schedule = true;
    let mut sales: Vec<Sale> =
        (0..40).map(|n| sale(["a", "b"][n % 2], n as f64, "", T0 + n as i64 * 2 * MINUTE)).collect();
    world.write_parquet("prices/0.parquet", &sales);
    world.write_parquet("shops.parquet", &[]);
    world.clock.store(T0 + 2 * MINUTE, Ordering::SeqCst);
    world.open().await;
    let runs = until_run(&world, "at the start", |run| run.through == T0).await;
    assert_eq!((runs.len(), runs[0].by), (1, By::Schedule));
    check(&world, &sales, T0).await;
    // Nothing happens between two instants.
    world.set_clock(T0 + 5 * MINUTE - 1);
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert_eq!(world.ingest().runs("prices", 50).await.unwrap().len(), 1);
    world.set_clock(T0 + 5 * MINUTE);
    let runs = until_run(&world, "at the instant", |run| run.through == T0 + 5 * MINUTE).await;
    assert_eq!(runs.len(), 2);
    check(&world, &sales, T0 + 5 * MINUTE).await;
    // Missed ones are made up by one.
    world.stop().await;
    world.clock.store(T0 + 63 * MINUTE, Ordering::SeqCst);
    world.open().await;
    let runs = until_run(&world, "after the stop", |run| run.through == T0 + HOUR).await;
    assert_eq!(runs.len(), 3, "{runs:?}");
    check(&world, &sales, T0 + HOUR).await;
    let message = materialize(&world, &["prices"], T0 + 30 * MINUTE, Mode::Apply).await.unwrap();
    assert!(message[0].message.as_ref().unwrap().starts_with("already materialized through 2023-11-15T01:00:00"));
    // A run that fails says so, and is tried again.
    world.write_parquet("prices/1.parquet", &[]);
    let whole = std::fs::read(world.folder.path().join("prices/1.parquet")).unwrap();
    std::fs::write(world.folder.path().join("prices/1.parquet"), &whole[..whole.len() / 2]).unwrap();
    world.set_clock(T0 + 65 * MINUTE);
    for _ in 0..30_000 {
        if !world.ingest().troubles().is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let troubles = world.ingest().troubles();
    let text = troubles.first().cloned().unwrap_or_default();
    assert!(text.starts_with("source `prices` is due on its schedule and cannot be materialized: "), "{troubles:?}");
    assert!(text.contains("prices/1.parquet"), "{text}");
    sales.push(sale("c", 1.0, "", T0));
    world.write_parquet("prices/1.parquet", &sales[40..]);
    until_run(&world, "after the failure", |run| run.through == T0 + 65 * MINUTE).await;
    for _ in 0..30_000 {
        if world.ingest().troubles().is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert_eq!(world.ingest().troubles(), Vec::<String>::new());
    check(&world, &sales, T0 + 65 * MINUTE).await;
}

#[tokio::test]
async fn files_that_the_store_lost_are_materialized_again_through_the_last_run() {
    use crate::runs::By;
    let mut world = fresh().await;
    let sales: Vec<Sale> = (0..30).map(|n| sale(["a", "b"][n % 2], n as f64, "", T0 + n as i64 * MINUTE)).collect();
    world.write_parquet("prices/0.parquet", &sales);
    world.write_parquet("shops.parquet", &[sale("a", 5.0, "", T0)]);
    world.open().await;
    let through = T0 + 20 * MINUTE;
    materialize(&world, &["prices"], through, Mode::Apply).await.unwrap();
    let is_again = |number: u64| move |run: &crate::runs::Run| run.number == number && run.by == By::Recovery;
    world.online.lose(usize::MAX).await;
    world.ingest().wake();
    until_run(&world, "after the loss", is_again(2)).await;
    check(&world, &sales, through).await;
    for _ in 0..30_000 {
        if world.ingest().ready(&generation(&world, "shop")) && stored(&world, "a").await == Some(5.0) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert_eq!(stored(&world, "a").await, Some(5.0), "static rows are loaded again");
    // While nobody ran.
    world.stop().await;
    world.online.lose(usize::MAX).await;
    world.open().await;
    until_run(&world, "after the start", is_again(3)).await;
    check(&world, &sales, through).await;
    // A view that is new is filled as far as the others are.
    world.adopt(&FILES.replace("windows: [1h, 24h]", "windows: [6h]")).await;
    until_run(&world, "of the new view", is_again(4)).await;
    for _ in 0..30_000 {
        if world.ingest().backfilling().is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    check(&world, &sales, through).await;
}
