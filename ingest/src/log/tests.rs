use std::sync::atomic::AtomicI64;

use arrow::array::{ArrayRef, AsArray, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use online_store::conformance::redis_server::RedisServer;

use super::*;

mod in_redis;

const NOW: Micros = 1_700_000_000_000_000;

struct Fixture {
    folder: tempfile::TempDir,
    clock: Arc<AtomicI64>,
    options: LogOptions,
    redis: Option<RedisServer>,
}

impl Fixture {
    fn new() -> Fixture {
        let clock = Arc::new(AtomicI64::new(NOW));
        Fixture { folder: tempfile::tempdir().unwrap(), clock, options: LogOptions::default(), redis: None }
    }

    /// With a Redis that keeps the log; None where there is no program.
    fn in_redis() -> Option<Fixture> {
        let fixture = Fixture::new();
        let redis = RedisServer::start(fixture.folder.path())?;
        Some(Fixture { redis: Some(redis), ..fixture })
    }

    /// One of each kind.
    fn all() -> Vec<Fixture> {
        [Some(Fixture::new()), Fixture::in_redis()].into_iter().flatten().collect()
    }

    fn place(&self) -> Place {
        match &self.redis {
            None => Place::Disk,
            Some(redis) => Place::Redis { url: redis.url().into(), project: "test".into() },
        }
    }

    fn open(&self) -> Result<Opened, LogError> {
        self.open_in(&self.folder.path().join("log"))
    }

    fn open_in(&self, folder: &Path) -> Result<Opened, LogError> {
        let clock = self.clock.clone();
        Log::open(folder, self.place(), self.options.clone(), Arc::new(move || clock.load(Ordering::SeqCst)))
    }

    fn segments(&self) -> Vec<PathBuf> {
        if let Some(redis) = &self.redis {
            let keys = redis.ask(&["HKEYS", "c1:{test}log"]).unwrap();
            let keys: Vec<String> = ::redis::from_redis_value(keys).unwrap();
            return keys.iter().filter(|key| key.len() == 17 && key.starts_with('s')).map(PathBuf::from).collect();
        }
        let entries = fs::read_dir(self.folder.path().join("log")).unwrap().map(|entry| entry.unwrap().path());
        let mut paths: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "log")).collect();
        paths.sort();
        paths
    }

    /// The newest segment may have been begun just now, and a Redis is tidied up a little later.
    async fn comes_to_segments(&self, log: &Log, count: usize) {
        for _ in 0..500 {
            log.delete_released();
            if self.segments().len() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("there are {:?}, not {count} segments", self.segments());
    }
}

fn texts(texts: &[&str]) -> RecordBatch {
    let column: ArrayRef = Arc::new(StringArray::from(texts.to_vec()));
    RecordBatch::try_from_iter([("text", column)]).unwrap()
}

async fn append(log: &Log, rows: &[&str]) -> Result<Appended, LogError> {
    let permit = log.room(1).await;
    let encoded = Log::encode(texts(rows), vec![NOW; rows.len()])?;
    log.append(&"events".into(), encoded, None, permit)
}

async fn append_durably(log: &Log, rows: &[&str]) -> u64 {
    let appended = append(log, rows).await.unwrap();
    log.wait_durable(appended.durable, appended.ticket).await.unwrap();
    appended.first_sequence
}

#[tokio::test]
async fn records_come_back_in_order_after_a_restart() {
    for fixture in Fixture::all() {
        let Opened { log, records, mut durable, .. } = fixture.open().unwrap();
        assert!(records.is_empty());
        assert_eq!(append_durably(&log, &["a", "b"]).await, FIRST_PUSHED);
        fixture.clock.store(NOW - 50, Ordering::SeqCst);
        assert_eq!(append_durably(&log, &["c"]).await, FIRST_PUSHED + 2);
        let first = durable.recv().await.unwrap();
        assert_eq!(first.events.unwrap().batch, texts(&["a", "b"]));
        assert_eq!(log.read(&first.record).await.unwrap().batch, texts(&["a", "b"]));
        drop(log);
        let Opened { log, records, .. } = fixture.open().unwrap();
        assert_eq!(
            records.iter().map(|found| (found.record.first_sequence, found.record.rows)).collect::<Vec<_>>(),
            [(FIRST_PUSHED, 2), (FIRST_PUSHED + 2, 1)]
        );
        assert_eq!(records[1].record.arrival, NOW, "arrivals never go back");
        assert_eq!(log.read(&records[1].record).await.unwrap().due, [NOW]);
        assert_eq!(append_durably(&log, &["d"]).await, FIRST_PUSHED + 3);
    }
}

#[tokio::test]
async fn the_time_of_a_tick_is_kept() {
    for fixture in Fixture::all() {
        let log = fixture.open().unwrap().log;
        fixture.clock.store(NOW + 9, Ordering::SeqCst);
        assert_eq!(log.horizon("events", 0), Some(NOW + 9));
        log.tick().await.unwrap();
        drop(log);
        fixture.clock.store(NOW, Ordering::SeqCst);
        let log = fixture.open().unwrap().log;
        assert_eq!(append(&log, &["a"]).await.unwrap().arrival, NOW + 9);
    }
}

#[test]
fn one_process_at_a_time() {
    let fixture = Fixture::new();
    let _first = fixture.open().unwrap();
    let error = fixture.open().err().unwrap().to_string();
    assert!(error.contains("is in use by another process; stop the other server"), "{error}");
}

#[tokio::test]
async fn a_torn_end_is_cut_off_wherever_it_was_torn() {
    let fixture = Fixture::new();
    let log = fixture.open().unwrap().log;
    append_durably(&log, &["kept"]).await;
    let kept = fs::metadata(&fixture.segments()[0]).unwrap().len();
    append_durably(&log, &["torn"]).await;
    drop(log);
    let path = fixture.segments()[0].clone();
    let whole = fs::read(&path).unwrap();
    for length in (kept..whole.len() as u64).step_by(41).chain([whole.len() as u64 - 1]) {
        fs::write(&path, &whole[..length as usize]).unwrap();
        for newer in fixture.segments().iter().skip(1) {
            fs::remove_file(newer).unwrap();
        }
        let Opened { log, records, .. } = fixture.open().unwrap();
        assert_eq!(records.len(), 1, "torn at {length}");
        assert_eq!(log.read(&records[0].record).await.unwrap().batch, texts(&["kept"]));
        assert_eq!(fs::metadata(&path).unwrap().len(), kept);
        assert_eq!(append_durably(&log, &["again"]).await, FIRST_PUSHED + 1);
    }
}

#[tokio::test]
async fn damage_in_what_was_durable_is_an_error_that_names_the_place() {
    let fixture = Fixture::new();
    let log = fixture.open().unwrap().log;
    append_durably(&log, &["first"]).await;
    append_durably(&log, &["second"]).await;
    drop(log);
    let path = fixture.segments()[0].clone();
    let whole = fs::read(&path).unwrap();
    for at in [HEADER_BYTES as usize, HEADER_BYTES as usize + 5, HEADER_BYTES as usize + 100] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        fs::write(&path, damaged).unwrap();
        for newer in fixture.segments().iter().skip(1) {
            fs::remove_file(newer).unwrap();
        }
        let error = fixture.open().err().unwrap().to_string();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(error.contains(name) && error.contains("damaged at byte 28"), "{error}");
        assert!(error.contains("restore it from a backup"), "{error}");
    }
    let mut newer = whole;
    newer[7] = b'2';
    fs::write(&path, newer).unwrap();
    let error = fixture.open().err().unwrap().to_string();
    assert!(error.contains("has format `coevlog2`") && error.contains("upgrade"), "{error}");
}

#[tokio::test]
async fn segments_are_deleted_when_their_events_are_in_history() {
    for mut fixture in Fixture::all() {
        fixture.options.segment_bytes = 1_000;
        let Opened { log, mut durable, .. } = fixture.open().unwrap();
        for _ in 0..10 {
            append_durably(&log, &["text"]).await;
        }
        assert!(fixture.segments().len() > 2);
        let mut records = Vec::new();
        while let Ok(found) = durable.try_recv() {
            records.push(found.record);
        }
        for record in &records {
            log.release(record.place(), 1);
        }
        fixture.comes_to_segments(&log, 1).await;
        drop(log);
        let newest = records.iter().map(|record| record.place().0).max();
        let Opened { log, records, .. } = fixture.open().unwrap();
        // The newest segment stays until another is begun, which may not have happened yet.
        assert!(records.iter().all(|left| Some(left.record.place().0) == newest), "of {newest:?} at most");
        assert_eq!(append_durably(&log, &["next"]).await, FIRST_PUSHED + 10, "sequences never repeat");
    }
}

#[tokio::test]
async fn a_full_log_refuses_and_concurrent_pushers_share_syncs() {
    for mut fixture in Fixture::all() {
        fixture.options.log_bytes_max = 200_000;
        let log = Arc::new(fixture.open().unwrap().log);
        let pushers: Vec<_> = (0..32)
            .map(|_| {
                let log = log.clone();
                tokio::spawn(async move { append_durably(&log, &["together"]).await })
            })
            .collect();
        let mut sequences = Vec::new();
        for pusher in pushers {
            sequences.push(pusher.await.unwrap());
        }
        sequences.sort_unstable();
        assert_eq!(sequences, (FIRST_PUSHED..FIRST_PUSHED + 32).collect::<Vec<_>>());
        let error = loop {
            if let Err(error) = append(&log, &["more"]).await {
                break error;
            }
        };
        assert!(error.is_retryable() && matches!(error, LogError::Full { .. }), "{error}");
    }
}

/// Takes `gone` out of every record that has it.
fn without_gone(_: &RecordRef, events: &Events) -> Result<Option<Events>, LogError> {
    let texts = events.batch.column(0).as_string::<i32>();
    if !texts.iter().flatten().any(|text| text == "gone") {
        return Ok(None);
    }
    let left = texts.iter().map(|text| text.filter(|text| *text != "gone")).collect::<StringArray>();
    let due = texts.iter().zip(&events.due).map(|(text, due)| if text == Some("gone") { BLANK } else { *due });
    let fields = vec![Field::new("text", DataType::Utf8, true)];
    let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), vec![Arc::new(left) as ArrayRef]).unwrap();
    Ok(Some(Events { batch, due: due.collect() }))
}

#[tokio::test]
async fn rows_are_taken_out_and_the_others_stay_where_they_are() {
    let fixture = Fixture::new();
    let Opened { log, mut durable, .. } = fixture.open().unwrap();
    for rows in [&["a", "gone"][..], &["b"], &["gone", "c", "gone"], &["d"]] {
        append_durably(&log, rows).await;
    }
    let mut known = Vec::new();
    for _ in 0..4 {
        known.push(durable.recv().await.unwrap().record);
    }
    assert_eq!(log.look(&mut without_gone).unwrap(), 1);
    assert_eq!(log.rewrite_sealed(&mut without_gone).unwrap(), 0, "the newest segment is still being written");
    log.seal().await.unwrap();
    let bytes = log.bytes();
    assert_eq!(log.rewrite_sealed(&mut without_gone).unwrap(), 1);
    assert_eq!(log.rewrite_sealed(&mut without_gone).unwrap(), 0, "once is enough");
    assert_ne!(log.bytes(), bytes);
    let on_disk =
        |fixture: &Fixture| fixture.segments().iter().map(|path| fs::metadata(path).unwrap().len()).sum::<u64>();
    assert_eq!(log.bytes(), on_disk(&fixture));
    append_durably(&log, &["e"]).await;
    let expected: [(&[Option<&str>], &[Micros]); 4] = [
        (&[Some("a"), None], &[NOW, BLANK]),
        (&[Some("b")], &[NOW]),
        (&[None, Some("c"), None], &[BLANK, NOW, BLANK]),
        (&[Some("d")], &[NOW]),
    ];
    for (record, (texts, due)) in known.iter().zip(expected) {
        let found = log.read(record).await.unwrap();
        let column = found.batch.column(0).as_string::<i32>();
        assert_eq!((column.iter().collect::<Vec<_>>(), found.due), (texts.to_vec(), due.to_vec()), "{record:?}");
    }
    // Those who know the first places find the rows after another time as well.
    let gone = |path: &PathBuf| fs::read(path).unwrap().windows(4).any(|window| window == b"gone");
    assert!(!fixture.segments().iter().any(gone));
    let mut other = |record: &RecordRef, events: &Events| {
        let same = Events { batch: texts(&["a longer text than before"]), due: events.due.clone() };
        Ok((record.rows == 1 && events.batch.column(0).as_string::<i32>().value(0) == "b").then_some(same))
    };
    assert_eq!(log.rewrite_sealed(&mut other).unwrap(), 1);
    assert_eq!(log.read(&known[1]).await.unwrap().batch, texts(&["a longer text than before"]));
    assert_eq!(log.read(&known[3]).await.unwrap().batch, texts(&["d"]));
    drop(log);
    // A process that died while it wrote a segment anew leaves this.
    fs::write(fixture.folder.path().join("log/0000000000000001.new"), b"half").unwrap();
    let Opened { log, records, .. } = fixture.open().unwrap();
    assert_eq!(records.len(), 5);
    let sequences: Vec<u64> = records.iter().map(|found| found.record.first_sequence - FIRST_PUSHED).collect();
    assert_eq!(sequences, [0, 2, 3, 6, 7]);
    assert_eq!(log.read(&records[0].record).await.unwrap().due, [NOW, BLANK]);
    assert!(!fixture.folder.path().join("log/0000000000000001.new").exists());
}
