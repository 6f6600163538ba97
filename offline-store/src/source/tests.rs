use std::fs;
use std::io::Write as _;

use ::parquet::arrow::ArrowWriter;
use ::parquet::file::properties::WriterProperties;
use arrow::array::{
    Array, AsArray, DictionaryArray, Float32Array, Float64Array, Int32Array, Int64Array, StringArray,
    TimestampMicrosecondArray, TimestampNanosecondArray, UInt64Array,
};
use arrow::compute::concat_batches;
use arrow::datatypes::{Int8Type, Int64Type, TimestampMicrosecondType};
use feature_defs::catalog::{Files, SourceFile as Text};
use feature_defs::plan::{SourceSchemas, compile_definitions};

use super::*;

/// Files of sources in a folder of their own, read by whoever asks.
struct Folder {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl Folder {
    fn new() -> Folder {
        let folder = tempfile::tempdir().unwrap();
        let sources = Sources::new(folder.path()).unwrap();
        Folder { folder, sources }
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    async fn columns(&self, pattern: &str) -> String {
        let columns = self.sources.schema(pattern).await.unwrap();
        columns.iter().map(|(name, of)| format!("{name} {of}")).collect::<Vec<_>>().join(", ")
    }

    async fn wrong(&self, pattern: &str) -> String {
        chain(&self.sources.schema(pattern).await.unwrap_err())
    }

    /// Every row of a source with these columns, as text, sorted.
    async fn rows(&self, pattern: &str, schema: &str) -> Result<Vec<String>, String> {
        let source = source(pattern, schema);
        let columns: Vec<String> = source.schema.iter().map(|(name, _)| name.clone()).collect();
        let stream = self.sources.scan(&source, &columns).await.map_err(|error| chain(&error))?;
        let schema = stream.schema();
        let batches: Vec<RecordBatch> = stream.try_collect().await.map_err(|error| chain(&error))?;
        let all = concat_batches(&schema, &batches).unwrap();
        let mut rows: Vec<String> = (0..all.num_rows())
            .map(|row| {
                let shown = |column: &ArrayRef| match column.is_null(row) {
                    true => "null".to_owned(),
                    false => arrow::util::display::array_value_to_string(column, row).unwrap(),
                };
                all.columns().iter().map(shown).collect::<Vec<_>>().join(" ")
            })
            .collect();
        rows.sort();
        Ok(rows)
    }
}

/// What a caller shows of an error: its text and its causes'.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        if !text.contains(&error.to_string()) {
            text.push_str(&format!(": {error}"));
        }
        source = error.source();
    }
    text
}

/// A static source, so that no column is special.
fn source(pattern: &str, schema: &str) -> Arc<SourcePlan> {
    let text = format!("sources:\n  - {{name: s, files: '{pattern}', static: true, schema: [{schema}]}}\n");
    let files = Files::new(vec![Text { path: "definitions.yaml".into(), text }]);
    compile_definitions("test", &files, &SourceSchemas::new()).unwrap().sources[0].clone()
}

fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true))).unwrap()
}

fn parquet_bytes(batch: &RecordBatch) -> Vec<u8> {
    let mut bytes = Vec::new();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(100)).build();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    bytes
}

fn arrow_bytes(batches: &[RecordBatch]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = arrow::ipc::writer::FileWriter::try_new(&mut bytes, &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    drop(writer);
    bytes
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    writer.write_all(text).unwrap();
    writer.finish().unwrap()
}

const K_X: &str = "{name: k, type: string}, {name: x, type: float64}";

#[tokio::test]
async fn folders_and_globs() {
    let folder = Folder::new();
    folder.write("data/a.csv", "k,x\nJFK,1.5\n");
    folder.write("data/b.csv", "k,x\nEWR,2.5\n");
    folder.write("data/deep/c.csv", "k,x\nLGA,3.5\n");
    for passed_over in ["data/.d.csv", "data/_e.csv", "data/_tmp/f.csv", "data/_SUCCESS"] {
        folder.write(passed_over, if passed_over.ends_with("csv") { "not,to,be\nread" } else { "" });
    }
    let both = ["EWR 2.5", "JFK 1.5"];
    for pattern in ["data/*.csv", "data/", "data", "./data/../data/[ab].csv", "data/?.csv"] {
        assert_eq!(folder.columns(pattern).await, "k string, x float64", "{pattern}");
        assert_eq!(folder.rows(pattern, K_X).await.unwrap(), both, "{pattern}");
    }
    assert_eq!(folder.rows("data/a.csv", K_X).await.unwrap(), ["JFK 1.5"]);
    assert_eq!(folder.rows("data/**/*.csv", K_X).await.unwrap(), ["EWR 2.5", "JFK 1.5", "LGA 3.5"]);
    let url = format!("file://{}/data/a.csv", folder.folder.path().display());
    assert_eq!(folder.rows(&url, K_X).await.unwrap(), ["JFK 1.5"]);
    let before = folder.sources.fingerprint("data").await.unwrap();
    folder.write("data/c.csv", "k,x\nLGA,3.5\n");
    assert_ne!(folder.sources.fingerprint("data").await.unwrap(), before, "a new file is seen");
}

#[tokio::test]
async fn every_format_gives_the_same_rows() {
    let folder = Folder::new();
    let rows = batch(vec![
        ("k", Arc::new(StringArray::from(vec![Some("a, \"b\""), None, Some("two\nlines")]))),
        ("x", Arc::new(Float64Array::from(vec![Some(1.5), Some(-0.0), None]))),
        ("t", Arc::new(TimestampMicrosecondArray::from(vec![-1, 0, 1_000_000]).with_timezone("UTC"))),
    ]);
    let csv = "t,k,x\n1969-12-31T23:59:59.999999Z,\"a, \"\"b\"\"\",1.5\r\n1970-01-01T00:00:00Z,,-0.0\n\
               1970-01-01T01:00:01+01:00,\"two\nlines\",";
    let json = "{\"k\": \"a, \\\"b\\\"\", \"x\": 1.5, \"t\": \"1969-12-31T23:59:59.999999Z\", \"other\": []}\n\
                {\"x\": -0.0, \"t\": \"1970-01-01T00:00:00Z\"}\n\
                {\"k\": \"two\\nlines\", \"x\": null, \"t\": \"1970-01-01T00:00:01Z\"}\n";
    folder.write("parquet/a.parquet", parquet_bytes(&rows));
    folder.write("arrow/a.arrow", arrow_bytes(&[rows.slice(0, 1), rows.slice(1, 2)]));
    folder.write("feather/a.feather", arrow_bytes(std::slice::from_ref(&rows)));
    folder.write("csv/a.csv", csv);
    folder.write("csv_mark/a.csv", [b"\xEF\xBB\xBF", csv.as_bytes()].concat());
    folder.write("csv_gz/a.csv.gz", [gzip(&csv.as_bytes()[..40]), gzip(&csv.as_bytes()[40..])].concat());
    folder.write("csv_zst/a.csv.zst", zstd::encode_all(csv.as_bytes(), 3).unwrap());
    folder.write("json/a.jsonl", json);
    folder.write("json_gz/a.ndjson.gz", gzip(json.as_bytes()));
    let schema = "{name: k, type: string}, {name: x, type: float64}, {name: t, type: timestamp}";
    let expected = folder.rows("parquet", schema).await.unwrap();
    assert_eq!(expected.len(), 3);
    assert!(expected.contains(&"null 0.0 1970-01-01T00:00:00Z".to_owned()), "{expected:?}");
    for other in ["arrow", "feather", "csv", "csv_mark", "csv_gz", "csv_zst", "json", "json_gz"] {
        assert_eq!(folder.rows(other, schema).await.unwrap(), expected, "{other}");
    }
}

#[tokio::test]
async fn long_text_is_cut_where_rows_end_and_read_in_order_of_nothing() {
    let folder = Folder::new();
    let filler = "quite a long line, ".repeat(25);
    let note = |n: i64| format!("line {n}\nand {filler}");
    let mut text = String::from("n,note\n");
    for n in 0..2_000 {
        text.push_str(&format!("{n},\"{}\"\n", note(n)));
    }
    assert!(text.len() > 10 * (64 << 10), "more than ten chunks");
    folder.write("long.csv", &text);
    folder.write("long.csv.gz", gzip(text.as_bytes()));
    for pattern in ["long.csv", "long.csv.gz"] {
        let source = source(pattern, "{name: n, type: int64}, {name: note, type: string}");
        let stream = folder.sources.scan(&source, &["n".into(), "note".into()]).await.unwrap();
        let batches: Vec<RecordBatch> = stream.try_collect().await.unwrap();
        let mut sum = 0;
        for batch in &batches {
            for row in 0..batch.num_rows() {
                let n = batch.column(0).as_primitive::<Int64Type>().value(row);
                sum += n;
                assert_eq!(batch.column(1).as_string::<i32>().value(row), note(n));
            }
        }
        assert_eq!(sum, 2_000 * 1_999 / 2, "{pattern}");
    }
}

#[tokio::test]
async fn folders_give_columns() {
    let folder = Folder::new();
    folder.write("p/day=1/city=New%20York/a.csv", "x\n1.5\n");
    folder.write("p/day=-2/city=Paris/a.csv", "x\n2.5\n");
    folder.write("p/day=__HIVE_DEFAULT_PARTITION__/city=7/b.csv", "x\n3.5\n");
    assert_eq!(folder.columns("p").await, "x float64, day int64, city string");
    let schema = "{name: city, type: string}, {name: day, type: int64}, {name: x, type: float64}";
    let all = ["7 null 3.5", "New York 1 1.5", "Paris -2 2.5"];
    for pattern in ["p", "p/*/*/*.csv", "p/**/*.csv", "p/day=*/city=*/?.csv"] {
        assert_eq!(folder.rows(pattern, schema).await.unwrap(), all, "{pattern}");
    }
    assert_eq!(folder.rows("p/day=1", schema).await.unwrap(), all[1..2], "the pattern's own folders count");
    let as_text = "{name: day, type: string}";
    assert_eq!(folder.rows("p/day=-2", as_text).await.unwrap(), ["-2"], "the declared type");
    let wrong = folder.rows("p", "{name: city, type: int64}").await.unwrap_err();
    assert!(wrong.contains("column `city` of p/day="), "{wrong}");
    assert!(wrong.contains("does not become Int64"), "{wrong}");

    // The file's own column is the column.
    folder.write("own/day=1/a.csv", "day,x\n5,1.5\n");
    assert_eq!(folder.rows("own", "{name: day, type: int64}").await.unwrap(), ["5"]);
    // A folder that lacks the column is an error, as a file would be.
    folder.write("half/day=1/a.csv", "x\n1\n");
    folder.write("half/b.csv", "x\n1\n");
    let wrong = folder.rows("half", "{name: day, type: int64}").await.unwrap_err();
    assert!(wrong.starts_with("column `day` is absent in half/b.csv, but Int64 in half/day=1/a.csv"), "{wrong}");
}

#[tokio::test]
async fn schemas_that_differ_without_loss_are_one() {
    let check = async |a: ArrayRef, b: ArrayRef, declared: &str, expected: Result<&[&str], &str>| {
        let folder = Folder::new();
        folder.write(
            "d/a.parquet",
            parquet_bytes(&batch(vec![("x", a), ("only_a", Arc::new(Int64Array::from(vec![1])))])),
        );
        folder.write(
            "d/b.parquet",
            parquet_bytes(&batch(vec![("extra", Arc::new(Int64Array::from(vec![1]))), ("x", b)])),
        );
        let rows = folder.rows("d", &format!("{{name: x, type: {declared}}}")).await;
        let rows = rows.as_ref().map(|rows| rows.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(rows.as_deref().map_err(|error| error.as_str()), expected, "{declared}");
    };
    let int32 = || Arc::new(Int32Array::from(vec![7])) as ArrayRef;
    let int64 = || Arc::new(Int64Array::from(vec![1 << 40])) as ArrayRef;
    check(int32(), int64(), "int64", Ok(&["1099511627776", "7"])).await;
    check(int32(), Arc::new(Float64Array::from(vec![0.5])), "float64", Ok(&["0.5", "7.0"])).await;
    check(int32(), Arc::new(Float32Array::from(vec![0.5])), "float64", Ok(&["0.5", "7.0"])).await;
    check(
        Arc::new(Float32Array::from(vec![0.5])),
        Arc::new(Float64Array::from(vec![0.1])),
        "float64",
        Ok(&["0.1", "0.5"]),
    )
    .await;
    let drift = "column `x` is Float64 in d/b.parquet, but Int64 in d/a.parquet; files of one source have one schema";
    check(int64(), Arc::new(Float64Array::from(vec![0.5])), "float64", Err(drift)).await;
    let drift = "column `x` is Utf8 in d/b.parquet, but Int64 in d/a.parquet; files of one source have one schema";
    check(int64(), Arc::new(StringArray::from(vec!["a"])), "int64", Err(drift)).await;
    check(Arc::new(arrow::array::NullArray::new(1)), int64(), "int64", Ok(&["1099511627776", "null"])).await;
    let words: DictionaryArray<Int8Type> = vec!["a"].into_iter().collect();
    check(Arc::new(words), Arc::new(arrow::array::LargeStringArray::from(vec!["b"])), "string", Ok(&["a", "b"])).await;
    check(
        Arc::new(arrow::array::StringViewArray::from(vec!["a"])),
        Arc::new(StringArray::from(vec!["b"])),
        "string",
        Ok(&["a", "b"]),
    )
    .await;
    // Both become what is declared, though neither becomes the other.
    check(Arc::new(UInt64Array::from(vec![5])), int64(), "int64", Ok(&["1099511627776", "5"])).await;
    // Nanoseconds go towards the past, on both sides of 1970; zones do not change the instant, and none is UTC.
    check(
        Arc::new(TimestampNanosecondArray::from(vec![-1]).with_timezone("America/New_York")),
        Arc::new(TimestampMicrosecondArray::from(vec![1])),
        "timestamp",
        Ok(&["1969-12-31T23:59:59.999999Z", "1970-01-01T00:00:00.000001Z"]),
    )
    .await;
    check(
        Arc::new(arrow::array::TimestampSecondArray::from(vec![-1])),
        Arc::new(arrow::array::TimestampMillisecondArray::from(vec![1]).with_timezone("+05:30")),
        "timestamp",
        Ok(&["1969-12-31T23:59:59Z", "1970-01-01T00:00:00.001Z"]),
    )
    .await;
}

#[tokio::test]
async fn a_column_that_a_file_lacks_is_an_error_for_who_reads_it() {
    let folder = Folder::new();
    folder.write("mixed/a.csv", "k,x\nJFK,1.5\n");
    folder.write("mixed/b.csv", "k,y\nEWR,1.5\n");
    assert_eq!(
        folder.rows("mixed", K_X).await.unwrap_err(),
        "column `x` is absent in mixed/b.csv, but Float64 in mixed/a.csv; files of one source have one schema"
    );
    assert_eq!(folder.rows("mixed", "{name: k, type: string}").await.unwrap(), ["EWR", "JFK"]);
    // JSON has no columns but keys of rows, and a row without a key has null there.
    folder.write("json/a.jsonl", "{\"k\": \"a\", \"x\": 1}\n");
    folder.write("json/b.jsonl", "{\"k\": \"b\"}\n");
    assert_eq!(folder.rows("json", K_X).await.unwrap(), ["a 1.0", "b null"]);
}

#[tokio::test]
async fn text_is_read_as_declared_and_guessed_alike_in_all_files() {
    let folder = Folder::new();
    folder.write("d/a.csv", "zip,n,t\n01234,1,2026-01-01\n");
    folder.write("d/b.csv", "n,zip,t\n2.5,56789,2026-01-02T03:04:05\n");
    assert_eq!(folder.columns("d").await, "zip int64, n float64, t timestamp");
    let declared = [("zip".to_owned(), Type::String)];
    let columns = folder.sources.schema_with("d", &declared).await.unwrap();
    assert_eq!(columns[0], ("zip".to_owned(), Type::String));
    let schema = "{name: zip, type: string}, {name: n, type: float64}, {name: t, type: timestamp}";
    let expected = ["01234 1.0 2026-01-01T00:00:00Z", "56789 2.5 2026-01-02T03:04:05Z"];
    assert_eq!(folder.rows("d", schema).await.unwrap(), expected);
}

#[tokio::test]
async fn what_is_wrong_names_the_file() {
    let folder = Folder::new();
    folder.write("bad/x.parquet", "this is no parquet file at all");
    folder.write("short/x.parquet", "PAR1");
    folder.write("odd/a.xlsx", "?");
    folder.write("two/a.csv", "k\n1\n");
    folder.write("two/b.jsonl", "{}\n");
    folder.write("array/a.json", "[{\"k\": 1}]");
    folder.write("stream/a.arrow", "\u{0}\u{0}\u{0}\u{0}");
    folder.write("old/a.feather", "FEA1....FEA1");
    folder.write("same/a.csv", "k,k\n1,2\n");
    for name in ["a.parquet", "a.csv", "a.jsonl", "a.arrow", "a.csv.gz"] {
        folder.write(&format!("empty/{name}"), "");
    }
    let cases = [
        (
            "bad/*.parquet",
            "bad/x.parquet cannot be read as Parquet; replace or remove the file, then try again: it does not end",
        ),
        ("short", "short/x.parquet cannot be read as Parquet"),
        ("none/*.parquet", "no file matches `none/*.parquet` (looked below /"),
        ("none.parquet", "no file matches `none.parquet`"),
        ("odd/*", "odd/a.xlsx is of no known format; files end in .parquet, .csv"),
        ("two", "two/b.jsonl is JSON lines, but two/a.csv is CSV; files of one source have one format"),
        (
            "array",
            "array/a.json cannot be read as JSON lines; replace or remove the file, then try again: it is one JSON array",
        ),
        (
            "stream",
            "stream/a.arrow cannot be read as Arrow IPC; replace or remove the file, then try again: it does not begin",
        ),
        (
            "old",
            "old/a.feather cannot be read as Arrow IPC; replace or remove the file, then try again: it is a Feather file",
        ),
        ("same", "same/a.csv has two columns `k`; rename one of them"),
        ("empty/a.parquet", "empty/a.parquet cannot be read as Parquet: it has 0 bytes"),
        ("empty/a.csv", "empty/a.csv cannot be read as CSV: it has 0 bytes"),
        ("empty/a.jsonl", "empty/a.jsonl cannot be read as JSON lines: it has 0 bytes"),
        ("empty/a.arrow", "empty/a.arrow cannot be read as Arrow IPC: it has 0 bytes"),
        ("empty/a.csv.gz", "empty/a.csv.gz cannot be read as CSV: it has 0 bytes"),
        ("a/[b", "`a/[b` is not a pattern of files: "),
        (
            "gs://b/x.csv",
            "`gs://b/x.csv` is not a pattern of files: `gs://` is not supported in this version; use a path or s3://",
        ),
    ];
    for (pattern, expected) in cases {
        let wrong = folder.wrong(pattern).await;
        assert!(wrong.starts_with(expected), "{pattern}: {wrong}");
    }
}

#[tokio::test]
async fn a_wrong_value_is_found_by_its_line() {
    let folder = Folder::new();
    let mut text = String::from("k,x\n");
    (0..2_000).for_each(|n| text.push_str(&format!("k{n},{n}.5\n")));
    folder.write("value.csv", format!("{text}\"two\nlines\",oops\n"));
    folder.write("fields.csv", format!("{text}JFK,1.5,more\n"));
    folder.write("open.csv", format!("{text}\"JFK,1.5\n"));
    folder.write("packed.csv.gz", gzip(format!("{text}k,1e\n").as_bytes()));
    folder.write("value.jsonl", "{\"k\": \"a\", \"x\": 1}\n\n{\"k\": \"b\", \"x\": \"high\"}\n");
    folder.write("row.jsonl", "{\"k\": \"a\", \"x\": 1}\n{\"k\": \"b\", \"x\"\n");
    let cases = [
        ("value.csv", "value.csv line 2002: column `x` has `oops`, which is no Float64; mend it, or declare"),
        ("fields.csv", "fields.csv line 2002 has not the 2 fields that the header has; mend or remove the file"),
        ("open.csv", "open.csv line 2002 opens a quote that is never closed"),
        ("packed.csv.gz", "packed.csv.gz line 2002: column `x` has `1e`, which is no Float64"),
        ("value.jsonl", "value.jsonl line 3: column `x` has `\"high\"`, which is no Float64"),
        ("row.jsonl", "row.jsonl"),
    ];
    for (pattern, expected) in cases {
        let wrong = folder.rows(pattern, K_X).await.unwrap_err();
        assert!(wrong.contains(expected), "{pattern}: {wrong}");
    }
}

#[tokio::test]
async fn a_guess_that_the_rest_of_the_file_breaks_is_an_error() {
    let folder = Folder::new();
    let mut text = String::from("k,x\n");
    let row = format!("{},1\n", "a".repeat(200));
    while text.len() < 2 << 20 {
        text.push_str(&row);
    }
    let line = text.lines().count() + 1;
    folder.write("late.csv", format!("{text}b,0.5\n"));
    assert_eq!(folder.columns("late.csv").await, "k string, x int64");
    let wrong = folder.rows("late.csv", "{name: k, type: string}, {name: x, type: int64}").await.unwrap_err();
    assert!(wrong.contains(&format!("late.csv line {line}: column `x` has `0.5`, which is no Int64")), "{wrong}");
    let rows = folder.rows("late.csv", K_X).await.unwrap();
    assert_eq!(rows.last().unwrap(), "b 0.5");
}

/// Wherever a file is cut off or overwritten, reading it gives its rows or one error that names it.
#[tokio::test]
async fn damage_anywhere_is_one_error() {
    let n = 300;
    let rows = batch(vec![
        ("k", Arc::new((0..n).map(|n| Some(format!("key {n}"))).collect::<StringArray>())),
        ("x", Arc::new(Float64Array::from_iter_values((0..n).map(|n| f64::from(n) / 7.0)))),
    ]);
    let csv: String = std::iter::once("k,x\n".to_owned()).chain((0..n).map(|n| format!("key {n},{n}.5\n"))).collect();
    let files = [
        ("a.parquet", parquet_bytes(&rows)),
        ("a.arrow", arrow_bytes(&[rows.slice(0, 150), rows.slice(150, 150)])),
        ("a.csv.gz", gzip(csv.as_bytes())),
        ("a.csv.zst", zstd::encode_all(csv.as_bytes(), 3).unwrap()),
    ];
    for (name, whole) in files {
        let folder = Folder::new();
        folder.write(name, &whole);
        assert_eq!(folder.rows(name, K_X).await.unwrap().len(), 300, "{name}");
        for part in 1..24 {
            let cut = whole.len() * part / 24;
            folder.write(name, &whole[..cut]);
            let wrong = folder.rows(name, K_X).await.unwrap_err();
            assert!(wrong.contains(name), "{name} cut at {cut}: {wrong}");

            let mut damaged = whole.clone();
            damaged[cut..(cut + 16).min(whole.len())].fill(0xA5);
            folder.write(name, &damaged);
            if let Err(wrong) = folder.rows(name, K_X).await {
                assert!(wrong.contains(name), "{name} damaged at {cut}: {wrong}");
            }
        }
    }
}

#[tokio::test]
async fn a_column_of_another_type_than_declared_is_named() {
    let folder = Folder::new();
    folder.write("a.parquet", parquet_bytes(&batch(vec![("x", Arc::new(StringArray::from(vec!["1.5"])))])));
    let wrong = folder.rows("a.parquet", "{name: x, type: float64}").await.unwrap_err();
    assert!(wrong.contains("column `x` of source `s` is Utf8, but float64 was expected"), "{wrong}");
}

#[tokio::test]
async fn times_are_what_the_file_means() {
    let folder = Folder::new();
    let times = batch(vec![
        ("n", Arc::new(TimestampNanosecondArray::from(vec![Some(-1), Some(i64::MAX), None]))),
        ("z", Arc::new(TimestampMicrosecondArray::from(vec![Some(-1), Some(0), None]).with_timezone("Europe/Paris"))),
    ]);
    folder.write("t.parquet", parquet_bytes(&times));
    let rows = folder.rows("t.parquet", "{name: n, type: timestamp}, {name: z, type: timestamp}").await.unwrap();
    let expected = [
        "1969-12-31T23:59:59.999999Z 1969-12-31T23:59:59.999999Z",
        "2262-04-11T23:47:16.854775Z 1970-01-01T00:00:00Z",
        "null null",
    ];
    assert_eq!(rows, expected, "towards the past, in UTC");
}

#[tokio::test]
async fn thousands_of_files_are_looked_at_once() {
    let folder = Folder::new();
    let bytes = parquet_bytes(&batch(vec![("x", Arc::new(Int64Array::from(vec![1, 2])))]));
    for n in 0..2_000 {
        folder.write(&format!("many/day={}/{n}.parquet", n % 10), &bytes);
    }
    let first = std::time::Instant::now();
    let files = folder.sources.files("many").await.unwrap();
    let first = first.elapsed();
    assert_eq!(files.files.len(), 2_000);
    let again = std::time::Instant::now();
    let files_again = folder.sources.files("many").await.unwrap();
    let again = again.elapsed();
    // Files share what they have in common, so that remembering them costs little.
    assert!(files_again.files.iter().all(|file| Arc::ptr_eq(&file.schema, &files.files[0].schema)));
    assert!(again < first, "{again:?} the second time, {first:?} the first");
    // A file that changes is looked at again.
    folder.write("many/day=1/1.parquet", parquet_bytes(&batch(vec![("x", Arc::new(StringArray::from(vec!["a"])))])));
    let changed = folder.sources.files("many").await.unwrap();
    assert!(matches!(changed.select(["x"]), Err(SourceError::Drift { .. })));
}

#[tokio::test]
async fn unify_takes_any_subset_and_order() {
    let folder = Folder::new();
    let time = TimestampMicrosecondArray::from(vec![1]).with_timezone("UTC");
    folder.write(
        "d/day=3/a.parquet",
        parquet_bytes(&batch(vec![("x", Arc::new(Int32Array::from(vec![7]))), ("t", Arc::new(time))])),
    );
    folder.write("d/day=4/b.parquet", parquet_bytes(&batch(vec![("x", Arc::new(Int64Array::from(vec![8])))])));
    let files = folder.sources.files("d").await.unwrap().select(["day", "x"]).unwrap();
    assert_eq!((files.format(), files.path(0).as_str()), (Format::Parquet, "d/day=3/a.parquet"));
    assert_eq!(files.files[0].schema.fields().len(), 2, "the file's own");
    let unified = files.unify(0, batch(vec![("x", Arc::new(Int32Array::from(vec![7])))])).unwrap();
    assert_eq!(unified.schema(), files.schema);
    assert_eq!(unified.column(0).as_primitive::<Int64Type>().values(), &[3]);
    assert_eq!(unified.column(1).as_primitive::<Int64Type>().values(), &[7]);
    let metadata = files.parquet_metadata(0).await.unwrap();
    assert_eq!(metadata.metadata().file_metadata().num_rows(), 1);
    let reader =
        ::parquet::arrow::ParquetRecordBatchStreamBuilder::new_with_metadata(files.parquet_reader(0), metadata);
    let read: Vec<RecordBatch> = reader.build().unwrap().try_collect().await.unwrap();
    assert_eq!(read[0].column(1).as_primitive::<TimestampMicrosecondType>().values(), &[1]);
}
