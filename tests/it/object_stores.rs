//! Sources and the project's store in a bucket, asked over S3's own protocol.

use std::path::Path as FilePath;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{SourcePlan, SourceSchemas, compile_definitions};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use offline_store::source::Sources;
use registry::id::{EntryId, EntryNumber, ProjectName};
use registry::log::{Append, ControlLog, Draft};
use registry::store::{Variables, open_bucket};
use tests::s3::{BUCKET, S3Server, variables};

use super::process::{Process, binary};

fn bucket(server: &S3Server) -> Arc<dyn ObjectStore> {
    open_bucket(&format!("s3://{BUCKET}"), &server.variables()).unwrap().0
}

async fn put(store: &Arc<dyn ObjectStore>, path: &str, bytes: impl Into<PutPayload>) {
    store.put(&Path::parse(path).unwrap(), bytes.into()).await.unwrap();
}

fn source(pattern: &str, schema: &str) -> Arc<SourcePlan> {
    let text = format!("sources:\n  - {{name: s, files: '{pattern}', static: true, schema: [{schema}]}}\n");
    let files = Files::new(vec![SourceFile { path: "definitions.yaml".into(), text }]);
    compile_definitions("test", &files, &SourceSchemas::new()).unwrap().sources[0].clone()
}

async fn sum(sources: &Sources, pattern: &str) -> i64 {
    let source = source(pattern, "{name: n, type: int64}");
    let stream = sources.scan(&source, &["n".into()]).await.unwrap();
    let batches: Vec<RecordBatch> = stream.try_collect().await.unwrap();
    batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec()).sum()
}

fn parquet_bytes(numbers: std::ops::Range<i64>) -> Vec<u8> {
    let column = Arc::new(arrow::array::Int64Array::from_iter_values(numbers));
    let batch = RecordBatch::try_from_iter([("n", column as _)]).unwrap();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_sources_are_read_from_a_bucket() {
    let Some(server) = S3Server::start() else { return };
    let store = bucket(&server);
    for (n, day) in ["2026-01-01", "2026-01-02"].iter().enumerate() {
        let from = n as i64 * 1_000;
        put(&store, &format!("data/day={day}/a.parquet"), parquet_bytes(from..from + 1_000)).await;
    }
    put(&store, "data/_SUCCESS", "").await;
    put(&store, "text/a b.csv", "n,k\n1,x\n2,y\n").await;
    put(&store, "text/c.csv", "k,n\nz,39\n").await;
    let folder = tempfile::tempdir().unwrap();
    let sources = Sources::new(folder.path()).unwrap().with_variables(server.variables());
    let at = |path: &str| format!("s3://{BUCKET}/{path}");
    for pattern in ["data", "data/", "data/*/*.parquet", "data/**/*.parquet"] {
        assert_eq!(sum(&sources, &at(pattern)).await, 2_000 * 1_999 / 2, "{pattern}");
    }
    assert_eq!(sum(&sources, &at("data/day=2026-01-01/a.parquet")).await, 1_000 * 999 / 2);
    assert_eq!(sum(&sources, &at("text/*.csv")).await, 42);
    let columns = sources.schema(&at("data")).await.unwrap();
    assert_eq!(columns.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["n", "day"]);
    let before = sources.fingerprint(&at("text")).await.unwrap();
    put(&store, "text/c.csv", "k,n\nz,40\n").await;
    assert_ne!(sources.fingerprint(&at("text")).await.unwrap(), before);
    assert_eq!(sum(&sources, &at("text")).await, 43);

    put(&store, "bad/x.parquet", "PAR1 and no more").await;
    let wrong = sources.schema(&at("bad")).await.unwrap_err().to_string();
    assert!(wrong.starts_with(&format!("s3://{BUCKET}/bad/x.parquet cannot be read as Parquet")), "{wrong}");
    let wrong = sources.schema(&at("none/*.csv")).await.unwrap_err().to_string();
    assert!(wrong.starts_with(&format!("no file matches `s3://{BUCKET}/none/*.csv`")), "{wrong}");
    let wrong = sources.schema("s3://no-such-bucket/x/*.csv").await.unwrap_err();
    assert!(wrong.to_string().contains("check that the bucket `s3://no-such-bucket` is there"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_does_not_answer_is_one_error_in_time() {
    let folder = tempfile::tempdir().unwrap();
    // Nothing listens at this port: it was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let sources = Sources::new(folder.path()).unwrap().with_variables(variables(port));
    let begun = Instant::now();
    let wrong = sources.schema("s3://away/data/*.parquet").await.unwrap_err().to_string();
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert!(wrong.starts_with("s3://away/data cannot be read; check that the bucket `s3://away` is there"), "{wrong}");
    assert!(wrong.contains("AWS_ENDPOINT_URL"), "{wrong}");
}

fn draft(id: &str) -> Draft {
    Draft {
        id: EntryId::try_new(id).unwrap(),
        at: chrono::DateTime::UNIX_EPOCH,
        project: ProjectName::try_new("test").unwrap(),
        who: "test".into(),
        why: None,
        must_understand: false,
        kind: "note".into(),
        body: serde_json::Value::Null,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_entries_at_one_number_a_bucket_keeps_the_first() {
    let Some(server) = S3Server::start() else { return };
    let logs = [bucket(&server), bucket(&server)].map(|store| ControlLog::new(store, &Path::from("store/test")));
    let first = EntryNumber::NONE.next();
    assert_eq!(logs[0].append(&draft("one"), EntryNumber::NONE).await.unwrap(), Append::Appended(first));
    assert_eq!(logs[1].append(&draft("two"), EntryNumber::NONE).await.unwrap(), Append::Conflict { head: first });
    assert_eq!(logs[1].append(&draft("two"), first).await.unwrap(), Append::Appended(first.next()));
    assert_eq!(logs[0].head().await.unwrap(), first.next());
    let entries = logs[0].read_from(EntryNumber::FIRST, 10).await.unwrap();
    assert_eq!(entries.iter().map(|entry| entry.id.to_string()).collect::<Vec<_>>(), ["one", "two"]);
}

const DEFINITIONS: &str = r#"
entities:
  - {name: airport, keys: [{name: airport, type: string}]}
sources:
  - {name: weather, files: "s3://coeval-test/weather", event_time: observed_at}
  - name: landings
    stream: true
    schema: [{name: airport, type: string}, {name: id, type: string}]
    event_time: landed_at
    event_id: id
feature_views:
  - {name: now, entity: airport, source: weather, features: [{name: temp, type: float64}, {name: zone, type: string}]}
  - {name: traffic, entity: airport, source: landings, windows: [24h], aggregates: [{name: n, function: count}]}
feature_services:
  - {name: all, features: ["now:*", "traffic:*"]}
"#;

fn coeval(project: &FilePath, variables: &Variables, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.arg("-C").arg(project).args(arguments).stdin(Stdio::null());
    command.envs(variables.iter().cloned()).env("USER", "tester").output().unwrap()
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The whole way: definitions put in force, served, trained on; the store and the sources in a bucket.
#[tokio::test(flavor = "multi_thread")]
async fn a_project_lives_in_a_bucket() {
    let Some(server) = S3Server::start() else { return };
    let store = bucket(&server);
    let text = "airport,temp,observed_at\nJFK,1.5,2026-01-01T00:00:00Z\nJFK,2.5,2026-01-01T02:00:00Z\n";
    put(&store, "weather/zone=1/a.csv", text).await;
    put(&store, "weather/zone=2/a.csv", "observed_at,airport,temp\n2026-01-01T01:00:00Z,EWR,3.5\n").await;
    let folder = tempfile::tempdir().unwrap();
    let settings =
        format!("project: cloud\nstore: s3://{BUCKET}/store\nserve: {{grpc: 127.0.0.1:0, http: 127.0.0.1:0}}\n");
    std::fs::write(folder.path().join("coeval.yaml"), settings).unwrap();
    std::fs::write(folder.path().join("definitions.yaml"), DEFINITIONS).unwrap();
    let spine = folder.path().join("spine.csv");
    let rows =
        "event_timestamp,airport\n2026-01-01T01:30:00Z,JFK\n2026-01-01T02:30:00Z,EWR\n2026-01-01T03:00:00Z,JFK\n";
    std::fs::write(&spine, rows).unwrap();
    let on = server.variables();
    succeeds(&coeval(folder.path(), &on, &["validate"]));
    succeeds(&coeval(folder.path(), &on, &["apply"]));
    assert!(!folder.path().join(".coeval").exists(), "nothing of the store is on this machine");

    let process = Process::start_with(folder.path(), &on).await;
    let pushed = [("JFK", "1", "2026-01-01T01:00:00Z")];
    for (airport, id, at) in pushed {
        let events = folder.path().join("events.csv");
        std::fs::write(&events, format!("airport,id,landed_at\n{airport},{id},{at}\n")).unwrap();
        let address = process.address();
        succeeds(&coeval(folder.path(), &on, &["ingest", "landings", events.to_str().unwrap(), "--server", &address]));
    }
    let address = process.address();
    let create = ["dataset", "create", "first", "--service", "all", "--spine", spine.to_str().unwrap(), "--json"];
    let made = succeeds(&coeval(folder.path(), &on, &[&create[..], &["--server", &address]].concat()));
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    assert_eq!(made["rows"].as_u64(), Some(3), "{made}");
    drop(process);

    // All of it is in the bucket, and the rows are right.
    let listed: Vec<_> =
        store.list(Some(&Path::from("store"))).map_ok(|file| file.location).try_collect().await.unwrap();
    let part = listed.iter().find(|path| path.as_ref().contains("/datasets/") && path.as_ref().ends_with(".parquet"));
    assert!(listed.iter().any(|path| path.as_ref().contains("/control/")), "{listed:?}");
    let bytes = store.get(part.expect("the dataset has a part")).await.unwrap().bytes().await.unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(bytes, 100).unwrap();
    let batches: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
    let shown = arrow::util::pretty::pretty_format_batches(&batches).unwrap().to_string();
    for row in [" 1.5 ", " 3.5 ", " 2.5 "] {
        assert!(shown.contains(row), "{shown}");
    }

    // Another machine sees the same head; a bucket that went away is one error.
    let again = succeeds(&coeval(folder.path(), &on, &["apply"]));
    assert!(again.contains("nothing to do: entry 1 put just this in force"), "{again}");
    server.stop();
    let begun = Instant::now();
    let output = coeval(folder.path(), &on, &["apply"]);
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("check that the bucket `s3://{BUCKET}` is there")), "{said}");
}
