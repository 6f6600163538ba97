//! Little memory, and what is wrong with files, folders and spines.

use rand::Rng;

use super::*;

/// Enough rows that a bound on memory can be felt.
fn large(keys: Keys, seed: u64) -> Case {
    let mut random = SmallRng::seed_from_u64(seed);
    let time = |random: &mut SmallRng| random.random_range(-60..60) * 15 * MINUTE;
    let given = (0..3_000)
        .map(|i| {
            let happened = time(&mut random);
            Given {
                // Every third row has one key.
                key: (Some(if i % 3 == 0 { 1 } else { random.random_range(0..4) }), Some(random.random_range(0..2))),
                happened: Some(happened),
                created: (i % 7 > 0).then(|| happened + random.random_range(-2..20) * 20 * MINUTE),
                x: (i % 11 > 0).then(|| f64::from(random.random_range(-99..99)) / 7.0),
                n: (i % 5 > 0).then(|| random.random_range(0..5)),
                gone: Some(i % 50 == 0),
            }
        })
        .collect();
    let asked = (0..600)
        .map(|_| Asked {
            key: (Some(random.random_range(1..5)), Some(random.random_range(0..2))),
            t: time(&mut random),
        })
        .collect();
    Case { keys, clock: Clock::Created, rule: catalog::Visibility::Known, given, asked }
}

fn bounded(folder: &std::path::Path, memory_bytes: u64, spill_folder: Option<std::path::PathBuf>) -> Engine {
    Engine::new(EngineOptions {
        project_folder: folder.into(),
        project: "test".into(),
        store: Arc::new(InMemory::new()),
        prefix: Path::default(),
        memory_bytes,
        spill_folder,
    })
    .unwrap()
}

const HOW: (usize, Order, Option<catalog::Visibility>) = (1_000, Order::Spine, None);

/// Down to where it is refused, less memory means more slices and events on disk, and the same answer. Whether events
/// go to disk is seen by taking the folder away.
async fn less_and_less_memory(case: Case, layout: Layout) {
    let folder = tempfile::tempdir().unwrap();
    case.write(folder.path(), &layout);
    let plan = case.plan(layout.format);
    let spine = || case.spine(Unit::Micros);
    let whole = ask(&bounded(folder.path(), 1 << 30, None), &plan, spine(), HOW).await.unwrap();
    assert_eq!(whole.batches, 1);
    let (mut slices, mut spilled, mut refused) = (1, false, 0);
    let mut memory = 4u64 << 20;
    while memory > 10_000 {
        let spill = folder.path().join("spill");
        match ask(&bounded(folder.path(), memory, Some(spill.clone())), &plan, spine(), HOW).await {
            Ok(found) => {
                assert!(found.rows == whole.rows, "{memory} bytes in {} slices", found.batches);
                // A slice is a batch here: it has fewer rows than a batch may have.
                slices = slices.max(found.batches);
                let left: Vec<_> = std::fs::read_dir(&spill).unwrap().collect();
                assert!(left.is_empty(), "{left:?}");
                let engine = bounded(folder.path(), memory, Some(spill.clone()));
                std::fs::remove_dir(&spill).unwrap();
                std::fs::write(&spill, "not a folder").unwrap();
                if let Err(error) = ask(&engine, &plan, spine(), HOW).await {
                    let error = error.to_string();
                    assert!(error.contains("could not be written to"), "{error}");
                    assert!(error.contains("free some space there, or set offline.spill"), "{error}");
                    assert!(error.contains(&spill.display().to_string()), "{error}");
                    spilled = true;
                }
                std::fs::remove_file(&spill).unwrap();
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("does not fit into offline.memory"), "{memory}: {error}");
                refused += 1;
            }
        }
        memory = memory * 4 / 5;
    }
    assert!(slices >= 3, "{slices} slices");
    assert!(spilled, "events were never written to disk");
    assert!(refused > 0, "a bound of nothing was accepted");
}

#[tokio::test]
async fn memory_changes_nothing_but_the_way() {
    let layout = Layout { file_rows: 1_000, group_rows: 100, ..Layout::plain() };
    less_and_less_memory(large(Keys::Pair, 1), layout).await;
}

#[tokio::test]
async fn memory_changes_nothing_where_all_rows_have_one_key() {
    let layout = Layout { file_rows: 2_000, group_rows: 250, ..Layout::plain() };
    less_and_less_memory(large(Keys::None, 2), layout).await;
}

#[tokio::test]
async fn sources_that_are_written_down_need_a_folder() {
    let case = Case { given: large(Keys::Text, 3).given[..50].to_vec(), ..large(Keys::Text, 3) };
    let folder = tempfile::tempdir().unwrap();
    case.write(folder.path(), &Layout { format: Format::Csv, ..Layout::plain() });
    let spill = folder.path().join("spill");
    let engine = bounded(folder.path(), 1 << 30, Some(spill.clone()));
    std::fs::remove_dir(&spill).unwrap();
    std::fs::write(&spill, "not a folder").unwrap();
    let error = ask(&engine, &case.plan(Format::Csv), case.spine(Unit::Micros), HOW).await.map(|_| ()).unwrap_err();
    let error = error.to_string();
    let expected = format!("the rows of source `events` could not be written to {}", spill.display());
    assert!(error.contains(&expected), "{error}");
}

#[tokio::test]
async fn broken_files_are_named() {
    let case = Case { given: large(Keys::Text, 4).given[..200].to_vec(), ..large(Keys::Text, 4) };
    let layout = Layout { file_rows: 100, group_rows: 50, ..Layout::plain() };
    let folder = tempfile::tempdir().unwrap();
    case.write(folder.path(), &layout);
    let path = folder.path().join("events/part-1.parquet");
    let good = std::fs::read(&path).unwrap();
    let plan = case.plan(Format::Parquet);
    let asked = || ask_of(folder.path(), &plan, &case);
    asked().await.unwrap();
    let footer = u32::from_le_bytes(good[good.len() - 8..good.len() - 4].try_into().unwrap()) as usize + 8;

    // The footer is gone; the footer is there and pages before it are not.
    std::fs::write(&path, &good[..good.len() / 2]).unwrap();
    let error = asked().await.unwrap_err();
    assert!(error.contains("part-1.parquet"), "{error}");
    let torn = [&good[..good.len() / 4], &good[good.len() - footer..]].concat();
    std::fs::write(&path, torn).unwrap();
    let error = asked().await.unwrap_err();
    assert!(error.contains("part-1.parquet"), "{error}");
    assert_eq!(error.matches("part-1.parquet").count(), 1, "{error}");

    // Any bytes of any page may be anything: an answer or an error with the file's name, no panic.
    let mut random = SmallRng::seed_from_u64(5);
    let mut errors = 0;
    for _ in 0..60 {
        let mut bad = good.clone();
        let from = random.random_range(4..good.len() - footer);
        let to = (from + random.random_range(1..200)).min(good.len() - footer);
        bad[from..to].iter_mut().for_each(|byte| *byte = random.random());
        std::fs::write(&path, bad).unwrap();
        if let Err(error) = asked().await {
            assert!(error.contains("part-1.parquet"), "bytes {from}..{to}: {error}");
            errors += 1;
        }
    }
    assert!(errors > 10, "{errors} errors");
}

async fn ask_of(folder: &std::path::Path, plan: &Plan, case: &Case) -> Result<(), String> {
    let engine = bounded(folder, 1 << 30, None);
    let found = ask(&engine, plan, case.spine(Unit::Micros), HOW).await;
    found.map(|_| ()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_file_that_shrinks_while_it_is_read_is_named() {
    let case = Case { given: large(Keys::Text, 6).given[..200].to_vec(), ..large(Keys::Text, 6) };
    let folder = tempfile::tempdir().unwrap();
    case.write(folder.path(), &Layout::plain());
    let plan = case.plan(Format::Parquet);
    let spine = case.spine(Unit::Micros);
    let engine = bounded(folder.path(), 1 << 30, None);
    let set = engine
        .training_set(TrainingSetRequest {
            service: plan.service("all").unwrap().clone(),
            spine_schema: spine.schema(),
            spine: vec![spine],
            statuses: true,
            visibility: None,
            order: Order::Spine,
        })
        .await
        .unwrap();
    let path = folder.path().join("events/part-0.parquet");
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, &good[..good.len() / 8]).unwrap();
    let error = set.stream.try_collect::<Vec<_>>().await.unwrap_err().to_string();
    assert!(error.contains("part-0.parquet cannot be read"), "{error}");
}

#[tokio::test]
async fn nanoseconds_of_a_spine_must_be_whole_microseconds() {
    let case = Case { given: large(Keys::Text, 7).given[..50].to_vec(), ..large(Keys::Text, 7) };
    let folder = tempfile::tempdir().unwrap();
    case.write(folder.path(), &Layout::plain());
    let spine = case.spine(Unit::Nanos);
    let engine = bounded(folder.path(), 1 << 30, None);
    let plan = case.plan(Format::Parquet);
    ask(&engine, &plan, spine.clone(), HOW).await.unwrap();
    let mut columns = spine.columns().to_vec();
    let at = spine.schema().index_of("event_timestamp").unwrap();
    let times = (0..spine.num_rows() as i64).map(|row| Some(if row < 3 { -2_000 } else { -1 }));
    columns[at] = Arc::new(times.collect::<TimestampNanosecondArray>().with_timezone("UTC"));
    let wrong = RecordBatch::try_new(spine.schema(), columns).unwrap();
    let error = ask(&engine, &plan, wrong, HOW).await.map(|_| ()).unwrap_err().to_string();
    assert_eq!(
        error,
        "spine column `event_timestamp` has nanoseconds beyond whole microseconds in 597 rows (the first is row 3), and \
         would be cut; round it to microseconds"
    );
}
