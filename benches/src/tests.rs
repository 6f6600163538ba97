//! Every workload at size 1: small files, and answers worked out row by row.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, TimestampMicrosecondArray};
use arrow::datatypes::{Float64Type, Int64Type};
use arrow_flight::Ticket;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{FlightData, FlightDescriptor};
use futures::{StreamExt as _, TryStreamExt as _};
use offline_store::point_in_time::Order;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use prost::Message as _;
use proto::v1::{DatasetTicket, TrainingSetCommand};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::definitions::{FEATURES, Known, PROJECT, SERVICE, Setup, Tails, WINDOWS, Workload};
use crate::training_set::{Options, Outcome};
use crate::{floor, serve, training_set};

const SECOND: i64 = 1_000_000;
const HOUR: i64 = 3600 * SECOND;
const DAY: i64 = 24 * HOUR;
const START: i64 = 1_700_000_000 * SECOND;
const SPINE_ROWS: usize = 300;
const VIEW_ROWS: usize = 2000;
const KEYS: i64 = 200;
const VIEWS: usize = 2;

struct Row {
    key: i64,
    time: i64,
    created: i64,
    features: [f64; FEATURES],
}

/// The files of a run, and their contents as a reader of this page would hold them.
struct Files {
    folder: tempfile::TempDir,
    spine: Vec<(i64, i64)>,
    views: Vec<Vec<Row>>,
}

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn times(times: impl Iterator<Item = i64>) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC"))
}

fn files() -> Files {
    files_with_hot(0.0)
}

/// So many of all rows are of one key.
fn files_with_hot(share: f64) -> Files {
    let key = |random: &mut SmallRng| {
        let key = random.random_range(0..KEYS);
        if random.random_bool(share) { 0 } else { key }
    };
    let mut random = SmallRng::seed_from_u64(7);
    let folder = tempfile::tempdir().unwrap();
    let spine: Vec<(i64, i64)> =
        (0..SPINE_ROWS).map(|_| (key(&mut random), START + random.random_range(0..30 * DAY))).collect();
    let labels: Float64Array = spine.iter().map(|_| random.random::<f64>()).collect();
    write(
        &folder.path().join("spine.parquet"),
        vec![
            ("user_id", Arc::new(spine.iter().map(|(key, _)| *key).collect::<Int64Array>())),
            ("event_timestamp", times(spine.iter().map(|(_, time)| *time))),
            ("label", Arc::new(labels)),
        ],
    );
    let mut views = Vec::new();
    for view in 0..VIEWS {
        let rows: Vec<Row> = (0..VIEW_ROWS)
            .map(|_| {
                let time = START - DAY + random.random_range(0..31 * DAY);
                let late = random.random_bool(0.1);
                let created = if late { time + random.random_range(1..DAY) } else { time };
                Row { key: key(&mut random), time, created, features: random.random() }
            })
            .collect();
        let names: Vec<String> = (0..FEATURES).map(|feature| format!("v{view}_f{feature}")).collect();
        let mut columns: Vec<(&str, ArrayRef)> = vec![
            ("user_id", Arc::new(rows.iter().map(|row| row.key).collect::<Int64Array>())),
            ("event_timestamp", times(rows.iter().map(|row| row.time))),
            ("created", times(rows.iter().map(|row| row.created))),
        ];
        for (feature, name) in names.iter().enumerate() {
            let values: Float64Array = rows.iter().map(|row| row.features[feature]).collect();
            columns.push((name, Arc::new(values)));
        }
        write(&folder.path().join(format!("view{view}.parquet")), columns);
        views.push(rows);
    }
    Files { folder, spine, views }
}

impl Files {
    fn setup(&self) -> Setup {
        let path = self.folder.path();
        Setup { folder: path.into(), store: path.join("store"), spill: path.join("spill"), memory_bytes: 256 << 20 }
    }

    async fn run(&self, workload: Workload, options: &Options) -> Outcome {
        training_set::run(&self.setup(), workload, options).await.unwrap()
    }

    /// The newest row at most 7 days old. Times do not repeat, so there is one.
    fn as_of(&self, view: usize, (key, time): (i64, i64), known: Known) -> Option<&Row> {
        let visible = |row: &&Row| match known {
            Known::AtOnce => row.time <= time,
            Known::Created => row.time <= time && row.created <= time,
        };
        let newest = self.views[view].iter().filter(|row| row.key == key).filter(visible).max_by_key(|row| row.time);
        newest.filter(|row| row.time >= time - 7 * DAY)
    }
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{found} is not {expected}");
}

#[tokio::test]
async fn as_of_answers_every_row_in_its_order() {
    check_as_of(&files()).await;
}

#[tokio::test]
async fn as_of_answers_every_row_where_many_rows_are_of_one_key() {
    check_as_of(&files_with_hot(0.3)).await;
}

async fn check_as_of(files: &Files) {
    for known in [Known::AtOnce, Known::Created] {
        let out = files.folder.path().join("out.parquet");
        let options = Options { known, out: Some(out.clone()), ..Options::default() };
        let found = files.run(Workload::AsOf { views: VIEWS }, &options).await;
        assert_eq!(found.rows, SPINE_ROWS as u64);
        let mut checksum = 0.0;
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(out).unwrap()).unwrap().build().unwrap();
        let mut spine = files.spine.iter();
        let mut nulls = 0;
        for batch in reader {
            let batch = batch.unwrap();
            for row in 0..batch.num_rows() {
                let asked = *spine.next().unwrap();
                assert_eq!(batch.column_by_name("user_id").unwrap().as_primitive::<Int64Type>().value(row), asked.0);
                for view in 0..VIEWS {
                    let expected = files.as_of(view, asked, known);
                    checksum += expected.map_or(0.0, |row| row.features[0]);
                    nulls += usize::from(expected.is_none());
                    for feature in 0..FEATURES {
                        let column = batch.column_by_name(&format!("view{view}:v{view}_f{feature}")).unwrap();
                        let column = column.as_primitive::<Float64Type>();
                        let value = (!arrow::array::Array::is_null(column, row)).then(|| column.value(row));
                        assert_eq!(value, expected.map(|row| row.features[feature]), "row {asked:?}, {known:?}");
                    }
                }
            }
        }
        assert_eq!(spine.len(), 0);
        assert!(nulls > 0, "no row without an answer: the case is not covered");
        close(found.checksum, checksum);
    }
}

#[tokio::test]
async fn windows_hold_what_lies_in_them() {
    let files = files();
    let lengths = [HOUR, DAY, 7 * DAY];
    let hops = [300 * SECOND, HOUR, HOUR];
    assert_eq!(lengths.len(), WINDOWS.len());
    for tails in [Tails::Exact, Tails::Hops] {
        let (mut count, mut sum, mut largest) = (0, 0.0, 0.0);
        for &(key, time) in &files.spine {
            for (length, hop) in lengths.into_iter().zip(hops) {
                let tail = time - length;
                let tail = if tails == Tails::Hops { tail - tail.rem_euclid(hop) } else { tail };
                let inside =
                    || files.views[0].iter().filter(|row| row.key == key && row.time >= tail && row.time < time);
                count += inside().count() as i64;
                sum += inside().map(|row| row.features[0]).sum::<f64>();
                largest += inside().map(|row| row.features[0]).reduce(f64::max).unwrap_or(0.0);
            }
        }
        let found = files.run(Workload::Windows(tails), &Options::default()).await;
        assert_eq!((found.rows, found.count), (SPINE_ROWS as u64, Some(count)), "{tails:?}");
        close(found.checksum, sum);
        close(found.largest.unwrap(), largest);
    }
}

#[tokio::test]
async fn a_digest_tells_answers_apart_and_a_bound_on_memory_does_not_change_it() {
    let files = files();
    let workload = Workload::AsOf { views: 1 };
    let options = Options { digest: true, ..Options::default() };
    let first = files.run(workload, &options).await;
    let kept = files.run(workload, &Options { keep: true, ..options.clone() }).await;
    assert_eq!(first.digest, kept.digest);
    let bounded = Setup { memory_bytes: 16 << 20, ..files.setup() };
    let bounded = training_set::run(&bounded, workload, &options).await.unwrap();
    assert_eq!(first.digest, bounded.digest);
    let late = files.run(workload, &Options { known: Known::Created, ..options }).await;
    assert_ne!(first.digest, late.digest);
}

#[tokio::test]
async fn any_order_has_the_same_rows() {
    let files = files();
    let workload = Workload::AsOf { views: 1 };
    let in_order = files.run(workload, &Options::default()).await;
    let any = files.run(workload, &Options { order: Order::Any, ..Options::default() }).await;
    assert_eq!(in_order.rows, any.rows);
    close(any.checksum, in_order.checksum);
}

#[test]
fn the_floor_reads_all_rows_of_all_files() {
    let files = files();
    for threads in [1, 2] {
        let found = floor::run(files.folder.path(), Workload::AsOf { views: VIEWS }, Known::Created, threads).unwrap();
        assert_eq!(found.rows, (SPINE_ROWS + VIEWS * VIEW_ROWS) as u64);
    }
    let missing = floor::run(files.folder.path(), Workload::AsOf { views: VIEWS + 1 }, Known::AtOnce, 2).unwrap_err();
    assert!(missing.to_string().contains("view2.parquet"), "{missing}");
}

#[tokio::test]
async fn a_stored_dataset_is_read_over_flight() {
    let files = files();
    let setup = files.setup();
    let (sender, address) = tokio::sync::oneshot::channel();
    let server = tokio::spawn(async move {
        let ready = |address| sender.send(address).unwrap();
        serve::run(&setup, VIEWS, ready).await
    });
    let address = format!("http://{}", address.await.unwrap());
    let channel = tonic::transport::Endpoint::from_shared(address).unwrap().connect().await.unwrap();
    let mut client = FlightServiceClient::new(channel);

    let (schema, spine) = training_set::read_spine(&files.folder.path().join("spine.parquet")).unwrap();
    let command = TrainingSetCommand {
        project: PROJECT.into(),
        service: SERVICE.into(),
        dataset: "stored".into(),
        ..TrainingSetCommand::default()
    };
    let messages: Vec<FlightData> = FlightDataEncoderBuilder::new()
        .with_schema(schema)
        .with_flight_descriptor(Some(FlightDescriptor::new_cmd(command.encode_to_vec())))
        .build(futures::stream::iter(spine.into_iter().map(Ok)))
        .try_collect()
        .await
        .unwrap();
    let answer = client.do_exchange(futures::stream::iter(messages)).await.unwrap().into_inner();
    answer.try_for_each(|_| async { Ok(()) }).await.unwrap();

    let ticket = DatasetTicket { project: PROJECT.into(), name: "stored".into(), ..DatasetTicket::default() };
    let data = client.do_get(Ticket::new(ticket.encode_to_vec())).await.unwrap().into_inner();
    let data = data.map_err(|status| FlightError::Tonic(Box::new(status)));
    let batches: Vec<RecordBatch> =
        FlightRecordBatchStream::new_from_flight_data(data.boxed()).try_collect().await.unwrap();
    assert_eq!(batches.iter().map(RecordBatch::num_rows).sum::<usize>(), SPINE_ROWS);
    let expected: f64 = (0..VIEWS)
        .flat_map(|view| files.spine.iter().map(move |asked| (view, *asked)))
        .filter_map(|(view, asked)| files.as_of(view, asked, Known::AtOnce))
        .map(|row| row.features[0])
        .sum();
    let found: f64 = batches
        .iter()
        .flat_map(|batch| (0..VIEWS).map(move |view| batch.column_by_name(&format!("view{view}:v{view}_f0")).unwrap()))
        .map(|column| arrow::compute::sum(column.as_primitive::<Float64Type>()).unwrap_or(0.0))
        .sum();
    close(found, expected);
    server.abort();
}
