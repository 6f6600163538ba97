use super::*;
use crate::table::KeyColumn;

fn clustering(column: &str, buckets: u32) -> Clustering {
    let keys = vec![KeyColumn { column: column.into(), key_type: Type::String }];
    Clustering { keys, event_time: Some("at".into()), created_time: None, buckets }
}

/// Runs of these sizes, and then small files of ten rows each.
fn manifest(runs: &[u64], small: usize) -> Manifest {
    let mut manifest = Manifest::empty("sales");
    let mut file = |run: u64, rows: u64| {
        manifest.files.push(TableFile {
            path: format!("{run}-{}", manifest.files.len()),
            level: u8::from(run > 0),
            run,
            bucket: (run > 0).then_some(0),
            rows,
            bytes: rows,
            first: Position::START,
            last: Position::START,
            event_time_min: None,
            event_time_max: None,
        });
    };
    runs.iter().enumerate().for_each(|(run, rows)| file(run as u64 + 1, *rows));
    (0..small).for_each(|_| file(0, 10));
    manifest.clustering = (!runs.is_empty()).then(|| clustering("shop", 4));
    manifest
}

#[track_caller]
fn check(runs: &[u64], small: usize, wanted: &str, extent: Extent, expected: Option<(usize, u32)>) {
    let work = Work { bucket_rows: 1_000, ..Work::default() };
    let found = choose(&manifest(runs, small), &clustering(wanted, 1), extent, &work);
    assert_eq!(found.as_ref().map(|choice| (choice.from, choice.clustering.buckets)), expected);
    assert!(found.is_none_or(|choice| choice.clustering.keys == clustering(wanted, 1).keys));
}

#[test]
fn a_compaction_takes_the_newest_part_that_pays() {
    use Extent::{All, Due};
    check(&[], 0, "shop", All, None);
    check(&[], 31, "shop", Due, None);
    check(&[], 32, "shop", Due, Some((0, 1)));
    check(&[], 1, "shop", All, Some((0, 1)));
    // 320 rows in small files: a run is taken when it is at most twice that, and so on with both.
    check(&[5_000, 641], 32, "shop", Due, Some((2, 4)));
    check(&[5_000, 640], 32, "shop", Due, Some((1, 4)));
    check(&[1_920, 640], 32, "shop", Due, Some((0, 2)));
    check(&[1_921, 640], 32, "shop", Due, Some((1, 4)));
    // By hand: one run, unless that is what there is.
    check(&[4_000], 0, "shop", All, None);
    check(&[4_000, 10], 0, "shop", All, Some((0, 4)));
    check(&[4_000], 1, "shop", All, Some((0, 4)));
    check(&[20_000], 0, "shop", All, Some((0, 32)));
    // Another order means writing everything, when something is written.
    check(&[5_000], 0, "till", All, Some((0, 8)));
    check(&[5_000], 31, "till", Due, None);
    check(&[5_000], 32, "till", Due, Some((0, 8)));
}

#[test]
fn there_are_few_runs_however_many_appends() {
    let work = Work { bucket_rows: 1 << 40, ..Work::default() };
    let mut runs: Vec<u64> = Vec::new();
    let mut rewritten = 0;
    for _ in 0..2_000 {
        let before = manifest(&runs, 32);
        let before = Manifest { clustering: before.clustering.map(|_| clustering("shop", 1)), ..before };
        let choice = choose(&before, &clustering("shop", 1), Extent::Due, &work).unwrap();
        let taken: u64 = before.files[choice.from..].iter().map(|file| file.rows).sum();
        runs.truncate(choice.from);
        runs.push(taken);
        rewritten += taken;
        assert!(runs.len() <= 16, "{runs:?}");
    }
    let rows: u64 = runs.iter().sum();
    assert_eq!(rows, 2_000 * 320);
    assert!(rewritten <= 16 * rows, "each row was written {} times", rewritten / rows);
}
