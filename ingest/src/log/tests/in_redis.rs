//! What only a log in a Redis can come to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use online_store::conformance::redis_cluster::RedisCluster;

use super::*;

const INDEX: &str = "c1:{test}log";

/// With pushers that do not wait long.
fn hasty() -> Option<Fixture> {
    let mut fixture = Fixture::in_redis()?;
    fixture.options.confirm_wait = Duration::from_millis(500);
    Some(fixture)
}

async fn text_of(log: &Log, found: &[Durable]) -> Vec<String> {
    let mut texts = Vec::new();
    for Durable { record, .. } in found {
        let batch = log.read(record).await.unwrap().batch;
        let column = batch.column(0).as_any().downcast_ref::<StringArray>().unwrap().clone();
        texts.extend(column.iter().flatten().map(str::to_owned));
    }
    texts
}

async fn acknowledged(log: &Log, text: &str) -> Result<u64, LogError> {
    let appended = append(log, &[text]).await?;
    log.wait_durable(appended.durable, appended.ticket).await?;
    Ok(appended.first_sequence)
}

/// Until the log takes events again.
async fn comes_back(log: &Log) {
    let start = Instant::now();
    while let Some(trouble) = log.trouble() {
        assert!(start.elapsed() < Duration::from_secs(20), "{trouble}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_redis_that_may_forget_is_refused() {
    for (options, part) in [
        (&["--appendonly", "no"][..], "its `appendonly` is `no`"),
        (&["--appendonly", "yes", "--appendfsync", "everysec"], "its `appendfsync` is `everysec`"),
        (
            &["--appendonly", "yes", "--appendfsync", "always", "--no-appendfsync-on-rewrite", "yes"],
            "its `no-appendfsync-on-rewrite` is `yes`",
        ),
    ] {
        let mut fixture = Fixture::new();
        let Some(redis) = RedisServer::start_with(fixture.folder.path(), options) else { return };
        fixture.redis = Some(redis);
        let error = fixture.open().err().unwrap();
        assert!(matches!(error, LogError::Refused { .. }) && !error.is_retryable());
        let looked = look(&fixture.redis.as_ref().unwrap().url(), "test").await.unwrap_err();
        assert_eq!(looked.to_string(), error.to_string());
        let text = error.to_string();
        assert!(text.contains(part) && text.contains("or write `log: disk`"), "{text}");
        assert!(fixture.segments().is_empty(), "nothing was written");
    }
}

#[tokio::test]
async fn a_redis_that_does_not_say_whether_it_forgets_is_refused() {
    let Some(fixture) = Fixture::in_redis() else { return };
    fixture.redis.as_ref().unwrap().ask(&["ACL", "SETUSER", "default", "-config"]).unwrap();
    let text = fixture.open().err().unwrap().to_string();
    assert!(text.contains("does not answer CONFIG GET") && text.contains("`+config|get`"), "{text}");
}

#[tokio::test]
async fn a_redis_that_begins_to_forget_acknowledges_nothing_until_it_stops() {
    let Some(fixture) = hasty() else { return };
    let redis = fixture.redis.as_ref().unwrap();
    let log = fixture.open().unwrap().log;
    acknowledged(&log, "before").await.unwrap();
    redis.ask(&["CONFIG", "SET", "appendfsync", "everysec"]).unwrap();
    let error = acknowledged(&log, "meanwhile").await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("its `appendfsync` is `everysec`"), "{error}");
    let error = acknowledged(&log, "refused").await.unwrap_err();
    assert!(matches!(error, LogError::Away { .. }), "{error}");
    redis.ask(&["CONFIG", "SET", "appendfsync", "always"]).unwrap();
    comes_back(&log).await;
    acknowledged(&log, "after").await.unwrap();
    drop(log);
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert_eq!(text_of(&log, &records).await, ["before", "meanwhile", "after"]);
    let looked = look(&fixture.redis.as_ref().unwrap().url(), "test").await.unwrap();
    assert!(looked.ends_with("0.0 MiB in 2 segments, appendfsync always"), "{looked}");
    acknowledged(&log, "not disturbed").await.unwrap();
}

#[tokio::test]
async fn a_dead_redis_refuses_in_time_and_the_log_comes_back_by_itself() {
    let Some(mut fixture) = hasty() else { return };
    let Opened { log, mut durable, .. } = fixture.open().unwrap();
    acknowledged(&log, "before").await.unwrap();
    fixture.redis.as_mut().unwrap().kill();
    let start = Instant::now();
    let error = acknowledged(&log, "unconfirmed").await.unwrap_err();
    assert!(matches!(error, LogError::Unconfirmed { .. }) && error.is_retryable(), "{error}");
    let error = acknowledged(&log, "refused").await.unwrap_err();
    assert!(matches!(error, LogError::Away { .. }) && error.is_retryable(), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(log.trouble().unwrap().contains("takes no events now"));
    fixture.redis.as_mut().unwrap().restart().unwrap();
    comes_back(&log).await;
    assert_eq!(acknowledged(&log, "after").await.unwrap(), FIRST_PUSHED + 2);
    for text in ["before", "unconfirmed", "after"] {
        assert_eq!(durable.recv().await.unwrap().events.unwrap().batch, texts(&[text]));
    }
    // A log that is closed does not wait for a Redis that is away.
    fixture.redis.as_mut().unwrap().kill();
    let _ = append(&log, &["never"]).await.unwrap();
    let start = Instant::now();
    drop(log);
    assert!(start.elapsed() < Duration::from_secs(15));
    fixture.redis.as_mut().unwrap().restart().unwrap();
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert_eq!(text_of(&log, &records).await, ["before", "unconfirmed", "after"]);
}

#[tokio::test]
async fn a_redis_that_is_silent_refuses_in_time() {
    let Some(fixture) = hasty() else { return };
    let redis = fixture.redis.as_ref().unwrap();
    let log = fixture.open().unwrap().log;
    acknowledged(&log, "before").await.unwrap();
    redis.signal("STOP");
    let start = Instant::now();
    let error = acknowledged(&log, "unconfirmed").await.unwrap_err();
    assert!(matches!(error, LogError::Unconfirmed { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5));
    redis.signal("CONT");
    let (durable, ticket) = log.everything();
    log.wait_durable(durable, ticket).await.unwrap();
    drop(log);
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert_eq!(text_of(&log, &records).await, ["before", "unconfirmed"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_sigkill_of_the_redis_once() {
    let Some(mut fixture) = Fixture::in_redis() else { return };
    fixture.options.confirm_wait = Duration::from_secs(20);
    fixture.options.segment_bytes = 20_000;
    let log = Arc::new(fixture.open().unwrap().log);
    let mut kept: BTreeMap<String, u64> = BTreeMap::new();
    for round in 0..20u64 {
        let pushers: Vec<_> = (0..4)
            .map(|pusher| {
                let log = log.clone();
                tokio::spawn(async move {
                    let mut kept = Vec::new();
                    for number in 0..100 {
                        let text = format!("{round}-{pusher}-{number}");
                        match acknowledged(&log, &text).await {
                            Ok(sequence) => kept.push((text, sequence)),
                            Err(LogError::Away { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
                            Err(error) => panic!("{error}"),
                        }
                    }
                    kept
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(3 + 7 * round % 60)).await;
        fixture.redis.as_mut().unwrap().restart().unwrap();
        let mut news = 0;
        for pusher in pushers {
            let acknowledged = pusher.await.unwrap();
            news += acknowledged.len();
            kept.extend(acknowledged);
        }
        assert!(news > 0, "round {round} pushed something");
        comes_back(&log).await;
    }
    drop(log);
    fixture.redis.as_mut().unwrap().restart().unwrap();
    let Opened { log, records, .. } = fixture.open().unwrap();
    let found = text_of(&log, &records).await;
    let once: BTreeSet<&String> = found.iter().collect();
    assert_eq!(once.len(), found.len(), "nothing is doubled");
    for (number, text) in found.iter().enumerate() {
        assert_eq!(records[number].record.first_sequence, FIRST_PUSHED + number as u64);
        assert_eq!(kept.remove(text).unwrap_or(FIRST_PUSHED + number as u64), FIRST_PUSHED + number as u64);
    }
    assert!(kept.is_empty(), "acknowledged and lost: {kept:?}");
}

#[tokio::test]
async fn a_second_process_takes_over_and_the_first_appends_nothing_more() {
    let Some(mut fixture) = hasty() else { return };
    fixture.options.segment_bytes = 1_000;
    let Opened { log: first, mut durable, .. } = fixture.open().unwrap();
    for text in ["1", "2", "3", "4"] {
        acknowledged(&first, text).await.unwrap();
    }
    let other = tempfile::tempdir().unwrap();
    let Opened { log: second, records, .. } = fixture.open_in(other.path()).unwrap();
    assert_eq!(text_of(&second, &records).await, ["1", "2", "3", "4"]);
    assert!(first.check_writer().await.is_err() && second.check_writer().await.is_ok());
    // What the first one thinks to be done stays for the second.
    let count = fixture.segments().len();
    while let Ok(Durable { record, .. }) = durable.try_recv() {
        first.release(record.place(), 1);
    }
    first.delete_released();
    let error = acknowledged(&first, "late").await.unwrap_err();
    assert!(matches!(error, LogError::Superseded { .. }) && !error.is_retryable(), "{error}");
    let error = append(&first, &["later"]).await.unwrap_err();
    assert!(error.to_string().contains("another process has taken over the event log"), "{error}");
    assert_eq!(fixture.segments().len(), count);
    assert_eq!(acknowledged(&second, "5").await.unwrap(), FIRST_PUSHED + 4);
    drop((first, second));
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert_eq!(text_of(&log, &records).await, ["1", "2", "3", "4", "5"]);
}

#[tokio::test]
async fn a_redis_without_memory_refuses_and_loses_nothing() {
    let Some(fixture) = hasty() else { return };
    let redis = fixture.redis.as_ref().unwrap();
    let log = fixture.open().unwrap().log;
    acknowledged(&log, "before").await.unwrap();
    redis.ask(&["CONFIG", "SET", "maxmemory", "100000"]).unwrap();
    let error = acknowledged(&log, "unconfirmed").await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("its memory is full"), "{error}");
    let error = acknowledged(&log, "refused").await.unwrap_err();
    assert!(matches!(error, LogError::Away { .. }), "{error}");
    redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).unwrap();
    comes_back(&log).await;
    acknowledged(&log, "after").await.unwrap();
    drop(log);
    // A server that starts while there is no memory comes to where it can make room.
    redis.ask(&["CONFIG", "SET", "maxmemory", "100000"]).unwrap();
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert_eq!(text_of(&log, &records).await, ["before", "unconfirmed", "after"]);
    for Durable { record, .. } in &records {
        log.release(record.place(), 1);
    }
    fixture.comes_to_segments(&log, 1).await;
}

#[tokio::test]
async fn a_redis_that_was_emptied_ends_the_log_and_a_new_one_begins() {
    let Some(fixture) = hasty() else { return };
    let log = fixture.open().unwrap().log;
    acknowledged(&log, "lost").await.unwrap();
    fixture.redis.as_ref().unwrap().ask(&["FLUSHALL"]).unwrap();
    let error = acknowledged(&log, "refused").await.unwrap_err();
    let text = error.to_string();
    assert!(!error.is_retryable() && text.contains("has lost events") && text.contains("restart"), "{text}");
    drop(log);
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert!(records.is_empty());
    acknowledged(&log, "new").await.unwrap();
}

#[tokio::test]
async fn a_redis_that_came_back_without_its_newest_writes_is_noticed() {
    let Some(mut fixture) = hasty() else { return };
    let log = fixture.open().unwrap().log;
    acknowledged(&log, "kept").await.unwrap();
    let (there, aside) = (fixture.folder.path().join("appendonlydir"), fixture.folder.path().join("aside"));
    let copy = |from: &Path, to: &Path| {
        let _ = fs::remove_dir_all(to);
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    };
    copy(&there, &aside);
    acknowledged(&log, "lost").await.unwrap();
    fixture.redis.as_mut().unwrap().kill();
    copy(&aside, &there);
    fixture.redis.as_mut().unwrap().restart().unwrap();
    let error = acknowledged(&log, "refused").await.unwrap_err().to_string();
    assert!(error.contains("has lost events of the log that it had acknowledged"), "{error}");
    drop(log);
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert_eq!(text_of(&log, &records).await, ["kept"]);
}

#[tokio::test]
async fn the_group_shows_what_is_in_history_and_the_next_process_begins_there() {
    let Some(fixture) = Fixture::in_redis() else { return };
    let redis = fixture.redis.as_ref().unwrap();
    let Opened { log, mut durable, .. } = fixture.open().unwrap();
    let mut places = Vec::new();
    for text in ["1", "2", "3", "4"] {
        acknowledged(&log, text).await.unwrap();
        places.push(durable.recv().await.unwrap().record.place());
    }
    // The third waits for its time: the group stays before it.
    for number in [0, 1, 3] {
        log.release(places[number], 1);
    }
    log.delete_released();
    log.tick().await.unwrap();
    let groups = redis.ask(&["XINFO", "GROUPS", "c1:{test}log:0000000000000001"]).unwrap();
    let groups: Vec<HashMap<String, ::redis::Value>> = ::redis::from_redis_value(groups).unwrap();
    let said = |name: &str| ::redis::from_redis_value::<String>(groups[0][name].clone()).unwrap();
    assert_eq!(said("name"), "appliers");
    assert_eq!(said("last-delivered-id"), format!("{}-0", places[1].1));
    assert_eq!((said("entries-read"), said("lag")), ("2".to_owned(), "3".to_owned()));
    drop(log);
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert_eq!(text_of(&log, &records).await, ["3", "4"]);
    assert_eq!(acknowledged(&log, "5").await.unwrap(), FIRST_PUSHED + 4);
}

#[tokio::test]
async fn many_records_are_read_back_in_order_with_little_memory() {
    let Some(mut fixture) = Fixture::in_redis() else { return };
    let log = fixture.open().unwrap().log;
    let long = "x".repeat(60_000);
    let texts: Vec<String> = (0..300).map(|number| format!("{number}-{long}")).collect();
    for text in &texts {
        acknowledged(&log, text).await.unwrap();
    }
    drop(log);
    fixture.options.cached_bytes_max = 200_000;
    let Opened { log, records, .. } = fixture.open().unwrap();
    let cached = records.iter().filter(|durable| durable.events.is_some()).count();
    assert!((1..10).contains(&cached), "{cached}");
    let references: Vec<&RecordRef> = records.iter().map(|durable| &durable.record).collect();
    let read = log.read_all(&references).await.unwrap();
    for (events, text) in read.iter().zip(&texts) {
        assert_eq!(events.batch, super::texts(&[text]));
    }
    assert_eq!(read.len(), texts.len());
}

#[tokio::test]
async fn an_entry_that_somebody_deleted_is_an_error_that_names_the_place() {
    let Some(fixture) = Fixture::in_redis() else { return };
    let redis = fixture.redis.as_ref().unwrap();
    let log = fixture.open().unwrap().log;
    for text in ["1", "2", "3"] {
        acknowledged(&log, text).await.unwrap();
    }
    drop(log);
    let first = format!("{HEADER_BYTES}-0");
    redis.ask(&["XDEL", "c1:{test}log:0000000000000001", &first]).unwrap();
    let error = fixture.open().err().unwrap().to_string();
    assert!(error.contains("c1:{test}log:0000000000000001 in redis://"), "{error}");
    assert!(error.contains("another entry was expected before it"), "{error}");
    redis.ask(&["DEL", "c1:{test}log:0000000000000001"]).unwrap();
    let error = fixture.open().err().unwrap().to_string();
    assert!(error.contains("the stream is gone") && error.contains(INDEX), "{error}");
}

#[tokio::test]
async fn the_functions_are_loaded_again() {
    let Some(fixture) = hasty() else { return };
    let log = fixture.open().unwrap().log;
    acknowledged(&log, "before").await.unwrap();
    fixture.redis.as_ref().unwrap().ask(&["FUNCTION", "FLUSH"]).unwrap();
    acknowledged(&log, "after").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_keeps_a_log_on_one_of_its_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let Some(cluster) =
        RedisCluster::start(folder.path(), 3, false, &["--appendonly", "yes", "--appendfsync", "always"])
    else {
        return;
    };
    let clock: Arc<dyn Fn() -> Micros + Send + Sync> = Arc::new(|| NOW);
    let open = || {
        let place = Place::Redis { url: cluster.url().into(), project: "test".into() };
        Log::open(&folder.path().join("log"), place, LogOptions::default(), clock.clone())
    };
    let log = open().unwrap().log;
    for text in ["1", "2"] {
        acknowledged(&log, text).await.unwrap();
    }
    drop(log);
    let Opened { log, records, .. } = open().unwrap();
    assert_eq!(text_of(&log, &records).await, ["1", "2"]);
}

#[tokio::test]
async fn rows_are_taken_out_of_a_log_in_redis_and_the_others_stay_where_they_are() {
    let Some(fixture) = Fixture::in_redis() else { return };
    let redis = fixture.redis.as_ref().unwrap();
    let Opened { log, mut durable, .. } = fixture.open().unwrap();
    let log = Arc::new(log);
    let mut known = Vec::new();
    for rows in [&["a", "gone"][..], &["b"], &["gone", "c", "gone"], &["d"]] {
        append_durably(&log, rows).await;
        known.push(durable.recv().await.unwrap().record);
    }
    let blocking = async |work: fn(&Log) -> Result<u64, LogError>| {
        let log = log.clone();
        tokio::task::spawn_blocking(move || work(&log)).await.unwrap().unwrap()
    };
    assert_eq!(blocking(|log| log.look(&mut without_gone)).await, 1);
    assert_eq!(blocking(|log| log.rewrite_sealed(&mut without_gone)).await, 0, "the newest is still being written");
    log.seal().await.unwrap();
    assert_eq!(blocking(|log| log.rewrite_sealed(&mut without_gone)).await, 1);
    assert_eq!(blocking(|log| log.rewrite_sealed(&mut without_gone)).await, 0, "once is enough");
    let entries = redis.ask(&["XRANGE", "c1:{test}log:0000000000000001", "-", "+"]).unwrap();
    assert!(!format!("{entries:?}").contains("103, 111, 110, 101"), "nothing says `gone`");
    assert_eq!(log.read(&known[0]).await.unwrap().due, [NOW, BLANK]);
    assert_eq!(log.read(&known[3]).await.unwrap().batch, texts(&["d"]));
    // What was done before stays done, and the next process finds its way from there.
    log.release(known[0].place(), 2);
    log.delete_released();
    append_durably(&log, &["e"]).await;
    drop(log);
    let Opened { log, records, .. } = fixture.open().unwrap();
    let sequences: Vec<u64> = records.iter().map(|found| found.record.first_sequence - FIRST_PUSHED).collect();
    assert_eq!(sequences, [2, 3, 6, 7]);
    assert_eq!(log.read(&records[1].record).await.unwrap().due, [BLANK, NOW, BLANK]);
    assert_eq!(log.read(&records[2].record).await.unwrap().batch, texts(&["d"]));
}
