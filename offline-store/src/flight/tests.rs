//! The service over a real connection, with an engine over a few files.

use std::sync::Mutex;
use std::time::Duration;

use arrow::array::{
    ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt64Array,
};
use arrow::compute::concat_batches;
use arrow::datatypes::{Float32Type, Int64Type, UInt64Type};
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use feature_defs::plan::Plan;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use prost::Message as _;
use proto::v1::{DatasetTicket, TrainingSetCommand};
use tonic::Code;
use tonic::transport::Channel;

use super::*;
use crate::EngineOptions;
use crate::dataset::tests::plan;

const MIB: u64 = 1 << 20;

/// A process around the service that keeps datasets in a list.
struct Process {
    plan: Plan,
    created: Mutex<Vec<(Manifest, Path)>>,
}

#[async_trait]
impl Surroundings for Process {
    fn service(&self, _: &str, service: &str) -> Result<Arc<ServicePlan>, Status> {
        self.plan.service(service).cloned().ok_or_else(|| Status::not_found(service.to_string()))
    }
    fn model(&self, _: &str, model: &str) -> Result<Arc<ModelPlan>, Status> {
        let found = self.plan.models.iter().find(|known| &*known.name == model).cloned();
        found.ok_or_else(|| Status::not_found(model.to_string()))
    }
    async fn before_read(&self) -> Result<(), Status> {
        Ok(())
    }
    async fn dataset_created(&self, manifest: &Manifest, path: &Path) -> Result<(), Status> {
        self.created.lock().unwrap().push((manifest.clone(), path.clone()));
        Ok(())
    }
    fn dataset(&self, _: &str, name: &str, id: &str) -> Result<Path, Status> {
        let created = self.created.lock().unwrap();
        let found = created.iter().rev().find(|(known, _)| known.name == name && (id.is_empty() || known.id == id));
        found.map(|(_, path)| path.clone()).ok_or_else(|| Status::not_found(name.to_string()))
    }
    fn now(&self) -> String {
        "2013-01-01T00:00:00Z".into()
    }
}

struct World {
    client: FlightServiceClient<Channel>,
    process: Arc<Process>,
    engine: Arc<Engine>,
    store: Arc<InMemory>,
    _folder: tempfile::TempDir,
}

async fn world(memory_bytes: u64) -> World {
    let folder = tempfile::tempdir().unwrap();
    let sales = RecordBatch::try_from_iter([
        ("shop", Arc::new(StringArray::from(vec!["a", "a", "b"])) as ArrayRef),
        ("sold_at", Arc::new(TimestampMicrosecondArray::from(vec![10, 20, 10]).with_timezone("UTC"))),
        ("amount", Arc::new(Float64Array::from(vec![Some(1.5), Some(2.5), None]))),
        ("pieces", Arc::new(Int64Array::from(vec![1, 2, 3]))),
    ])
    .unwrap();
    let file = std::fs::File::create(folder.path().join("sales.parquet")).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, sales.schema(), None).unwrap();
    writer.write(&sales).unwrap();
    writer.close().unwrap();
    let store = Arc::new(InMemory::new());
    let engine = Engine::new(EngineOptions {
        project_folder: folder.path().to_path_buf(),
        project: "test".into(),
        store: store.clone(),
        prefix: Path::default(),
        memory_bytes,
        spill_folder: None,
    });
    let engine = Arc::new(engine.unwrap());
    let process = Arc::new(Process { plan: plan(), created: Mutex::default() });
    let server = service(engine.clone(), process.clone(), memory_bytes);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let client = FlightServiceClient::new(channel).max_decoding_message_size(64 << 20);
    World { client, process, engine, store, _folder: folder }
}

/// Shops a, b and c in turn, at times 0, 1, 2, ...
fn spine(count: i64) -> RecordBatch {
    let shops: StringArray = (0..count).map(|row| Some(["a", "b", "c"][row as usize % 3])).collect();
    RecordBatch::try_from_iter([
        ("shop", Arc::new(shops) as ArrayRef),
        ("event_timestamp", Arc::new(TimestampMicrosecondArray::from_iter_values(0..count).with_timezone("UTC"))),
        ("label", Arc::new(Int64Array::from_iter_values(0..count))),
    ])
    .unwrap()
}

fn command(dataset: &str) -> TrainingSetCommand {
    TrainingSetCommand { service: "selling".into(), dataset: dataset.into(), ..TrainingSetCommand::default() }
}

type Answer = Result<(RecordBatch, serde_json::Value), Status>;

/// The rows and what the last message says.
async fn collect(answer: Result<Response<Streaming<FlightData>>, Status>) -> Answer {
    let said = Arc::new(Mutex::new(serde_json::Value::Null));
    let hears = said.clone();
    let data = answer?.into_inner().try_filter(move |message| {
        if message.data_header.is_empty() {
            *hears.lock().unwrap() = serde_json::from_slice(&message.app_metadata).unwrap();
        }
        std::future::ready(!message.data_header.is_empty())
    });
    let data = data.map_err(|status| FlightError::Tonic(Box::new(status)));
    let mut batches = FlightRecordBatchStream::new_from_flight_data(data);
    let mut collected = Vec::new();
    while let Some(batch) = batches.try_next().await.map_err(Status::from)? {
        collected.push(batch);
    }
    let schema = batches.schema().cloned().unwrap();
    let said = said.lock().unwrap().clone();
    Ok((concat_batches(&schema, &collected).unwrap(), said))
}

impl World {
    async fn exchange(&self, command: TrainingSetCommand, spine: RecordBatch) -> Answer {
        let descriptor = FlightDescriptor::new_cmd(command.encode_to_vec());
        let encoded = FlightDataEncoderBuilder::new()
            .with_flight_descriptor(Some(descriptor))
            .with_schema(spine.schema())
            .build(stream::iter([Ok(spine)]))
            .filter_map(|data| std::future::ready(data.ok()));
        collect(self.client.clone().do_exchange(encoded).await).await
    }

    async fn get(&self, ticket: DatasetTicket) -> Answer {
        collect(self.client.clone().do_get(Ticket::new(ticket.encode_to_vec())).await).await
    }

    async fn info(&self, ticket: DatasetTicket) -> FlightInfo {
        let descriptor = FlightDescriptor::new_cmd(ticket.encode_to_vec());
        self.client.clone().get_flight_info(descriptor).await.unwrap().into_inner()
    }
}

fn ticket() -> DatasetTicket {
    DatasetTicket { name: "kept".into(), ..DatasetTicket::default() }
}

#[tokio::test]
async fn the_same_inputs_are_computed_once() {
    let world = world(64 * MIB).await;
    let (first, said) = world.exchange(command("kept"), spine(5_000)).await.unwrap();
    assert_eq!((first.num_rows(), &said["rows"], &said["existed"]), (5_000, &5_000.into(), &false.into()));
    let (again, said_again) = world.exchange(command("kept"), spine(5_000)).await.unwrap();
    assert_eq!((again, &said_again["existed"], &said_again["id"]), (first.clone(), &true.into(), &said["id"]));
    let (streamed, said_streamed) = world.exchange(command(""), spine(5_000)).await.unwrap();
    assert_eq!(streamed, first);
    assert!(said_streamed["known_at"].is_array() && said_streamed["id"].is_null(), "{said_streamed}");
    let (_, other) = world.exchange(command("kept"), spine(4_999)).await.unwrap();
    assert_eq!((&other["existed"], other["id"] == said["id"]), (&false.into(), false));
    // The name is of the newest, the id of the one.
    let (newest, _) = world.get(ticket()).await.unwrap();
    assert_eq!(newest.num_rows(), 4_999);
    let id = said["id"].as_str().unwrap().to_string();
    assert_eq!(world.get(DatasetTicket { id, ..ticket() }).await.unwrap().0, first);
    let created = world.process.created.lock().unwrap();
    assert_eq!(created.len(), 3);
    assert_eq!(created[0].0, created[1].0);
}

#[tokio::test]
async fn endpoints_shares_and_the_rest_of_a_stream() {
    let world = world(64 * MIB).await;
    let (whole, _) = world.exchange(command("kept"), spine(1_000)).await.unwrap();
    let labels =
        |batch: &RecordBatch| batch.column_by_name("label").unwrap().as_primitive::<Int64Type>().values().to_vec();
    for shuffle_seed in [None, Some(5)] {
        let asked = DatasetTicket { shuffle_seed, endpoints: 4, ..ticket() };
        let (all, _) = world.get(asked.clone()).await.unwrap();
        assert_eq!(all == whole, shuffle_seed.is_none());
        let mut together = Vec::new();
        for rank in 0..3 {
            let info = world.info(DatasetTicket { rank, world_size: 3, ..asked.clone() }).await;
            let manifest: Manifest = serde_json::from_slice(&info.app_metadata).unwrap();
            assert_eq!(manifest.rows, 1_000);
            let mut share = Vec::new();
            for endpoint in &info.endpoint {
                let answer = collect(world.client.clone().do_get(endpoint.ticket.clone().unwrap()).await).await;
                share.extend(labels(&answer.unwrap().0));
            }
            assert_eq!(info.total_records, share.len() as i64);
            together.extend(share);
        }
        assert_eq!(together, labels(&all));
        for compression in ["none", "lz4", "zstd"] {
            let rest = DatasetTicket { offset: 700, compression: compression.into(), ..asked.clone() };
            assert_eq!(labels(&world.get(rest).await.unwrap().0), labels(&all)[700..]);
        }
    }
    let columns = vec!["label".to_string(), "shop".to_string()];
    let (two, _) = world.get(DatasetTicket { columns, limit: Some(10), ..ticket() }).await.unwrap();
    assert_eq!(two, whole.slice(0, 10).project(&[2, 0]).unwrap());
    let (none, _) = world.get(DatasetTicket { limit: Some(0), ..ticket() }).await.unwrap();
    assert_eq!((none.num_rows(), none.schema()), (0, whole.schema()));
}

#[tokio::test]
async fn inputs_are_made_by_the_encoder_of_serving() {
    let world = world(64 * MIB).await;
    let asked = TrainingSetCommand { statuses: true, ..command("kept") };
    let (features, _) = world.exchange(asked.clone(), spine(60)).await.unwrap();
    let model = world.process.model("", "sells").unwrap();
    let column = |name: &str| features.column_by_name(name).unwrap().clone();
    let columns = model.service.outputs.iter().map(|output| column(&output.name)).collect();
    let expected =
        model.encode(&feature_defs::plan::Assembled { columns, statuses: Vec::new(), defaults: Vec::new() }, 60);
    let by_ticket = world.get(DatasetTicket { encode_for: "sells".into(), ..ticket() }).await.unwrap().0;
    let by_command = TrainingSetCommand { encode_for: "sells".into(), ..command("") };
    let by_command = world.exchange(by_command, spine(60)).await.unwrap().0;
    assert_eq!(by_ticket, by_command);
    let names: Vec<String> = by_ticket.schema().fields().iter().map(|field| field.name().clone()).collect();
    assert_eq!(names, ["shop", "event_timestamp", "label", "dense", "count", REFUSED]);
    let values = |name: &str| by_ticket.column_by_name(name).unwrap().as_fixed_size_list().values().clone();
    let dense = values("dense").as_primitive::<Float32Type>().values().to_vec();
    let count = values("count").as_primitive::<Int64Type>().values().to_vec();
    assert_eq!(feature_defs::plan::InputValues::Float32(dense.clone()), expected.inputs[0].values);
    assert_eq!(feature_defs::plan::InputValues::Int64(count), expected.inputs[1].values);
    assert!(dense.contains(&0.5) && dense.contains(&2.5));
    let refused = by_ticket.column_by_name(REFUSED).unwrap().as_boolean();
    let refused: Vec<usize> = (0..60).filter(|row| refused.value(*row)).collect();
    assert_eq!(refused, expected.refused.iter().map(|(row, _)| *row).collect::<Vec<_>>());
    assert!(refused.contains(&2) && !refused.contains(&30));
    let only = DatasetTicket { encode_for: "sells".into(), columns: vec!["label".into()], ..ticket() };
    assert_eq!(world.get(only.clone()).await.unwrap().0.num_columns(), 4);
    let only = DatasetTicket { inputs_only: true, ..only };
    assert_eq!(world.get(only).await.unwrap().0.num_columns(), 3);
}

#[tokio::test]
async fn any_order_comes_with_ordinals() {
    let world = world(64 * MIB).await;
    let (in_order, _) = world.exchange(command(""), spine(3_000)).await.unwrap();
    for dataset in ["", "kept", "kept"] {
        let asked = TrainingSetCommand { order: "any".into(), ..command(dataset) };
        let (any, _) = world.exchange(asked, spine(3_000)).await.unwrap();
        let ordinals = any.column_by_name("__ordinal").unwrap().as_primitive::<UInt64Type>().clone();
        let mut sorted = ordinals.values().to_vec();
        sorted.sort_unstable();
        assert_eq!(UInt64Array::from(sorted), UInt64Array::from_iter_values(0..3_000));
        let labels = any.column_by_name("label").unwrap().as_primitive::<Int64Type>();
        assert!((0..3_000).all(|row| labels.value(row) as u64 == ordinals.value(row)));
    }
    // What is kept is in the spine's order, and is the same dataset.
    assert_eq!(world.get(ticket()).await.unwrap().0, in_order);
    let (_, said) = world.exchange(command("kept"), spine(3_000)).await.unwrap();
    assert_eq!(said["existed"], true);
}

#[tokio::test]
async fn wrong_asks_are_answered_well() {
    let world = world(64 * MIB).await;
    world.exchange(command("kept"), spine(10)).await.unwrap();
    let check = |answer: Answer, code: Code, text: &str| {
        let status = answer.unwrap_err();
        assert!(status.code() == code && status.message().contains(text), "{status:?}");
    };
    let exchange = |change: fn(&mut TrainingSetCommand)| {
        let mut command = command("");
        change(&mut command);
        world.exchange(command, spine(3))
    };
    check(exchange(|c| c.order = "up".into()).await, Code::InvalidArgument, "spine or any");
    check(exchange(|c| c.visibility = "all".into()).await, Code::InvalidArgument, "event_time");
    check(exchange(|c| c.compression = "gzip".into()).await, Code::InvalidArgument, "lz4");
    check(exchange(|c| c.dataset = "a/b".into()).await, Code::InvalidArgument, "not a dataset name");
    check(exchange(|c| c.service = "nothing".into()).await, Code::NotFound, "nothing");
    let get = |change: fn(&mut DatasetTicket)| {
        let mut ticket = ticket();
        change(&mut ticket);
        world.get(ticket)
    };
    check(get(|t| t.name = "other".into()).await, Code::NotFound, "other");
    check(get(|t| t.columns = vec!["lable".into()]).await, Code::InvalidArgument, "`lable`");
    check(get(|t| t.rank = 1).await, Code::InvalidArgument, "rank 1");
    check(get(|t| t.offset = 11).await, Code::InvalidArgument, "offset 11");
    check(get(|t| t.encode_for = "bought".into()).await, Code::NotFound, "bought");
    let nothing = collect(world.client.clone().do_get(Ticket::new(vec![0xff, 0xff])).await).await;
    check(nothing, Code::InvalidArgument, "DatasetTicket");
}

#[tokio::test]
async fn a_spine_beyond_the_bound_is_refused() {
    let world = world(MIB).await;
    let answer = world.exchange(command("kept"), spine(100_000)).await;
    let status = answer.unwrap_err();
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("in parts"), "{status:?}");
}

#[tokio::test]
async fn memory_of_streams_is_the_engines_and_comes_back() {
    let world = world(64 * MIB).await;
    world.exchange(command("kept"), spine(200_000)).await.unwrap();
    let used = || world.engine.memory_pool().reserved();
    let before = used();
    let answer = world.client.clone().do_get(Ticket::new(ticket().encode_to_vec())).await.unwrap();
    let mut stream = answer.into_inner();
    stream.next().await.unwrap().unwrap();
    assert!(used() > before);
    // A reader that goes frees what it held, wherever the work was.
    drop(stream);
    let freed = async {
        while used() > before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), freed).await.unwrap();
    let tight = world_with(&world, 8 * MIB).await;
    let status = collect(tight.clone().do_get(Ticket::new(ticket().encode_to_vec())).await).await.unwrap_err();
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("offline.memory"), "{status:?}");
}

/// Another server over the same datasets.
async fn world_with(world: &World, memory_bytes: u64) -> FlightServiceClient<Channel> {
    let engine = Engine::new(EngineOptions {
        project_folder: world._folder.path().to_path_buf(),
        project: "test".into(),
        store: world.store.clone(),
        prefix: Path::default(),
        memory_bytes,
        spill_folder: None,
    });
    let server = service(Arc::new(engine.unwrap()), world.process.clone(), memory_bytes);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming));
    FlightServiceClient::new(Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap())
}

#[tokio::test]
async fn a_client_that_goes_leaves_no_dataset() {
    let world = world(64 * MIB).await;
    let rows = spine(200_000);
    let descriptor = FlightDescriptor::new_cmd(command("kept").encode_to_vec());
    let encoded = FlightDataEncoderBuilder::new()
        .with_flight_descriptor(Some(descriptor))
        .with_schema(rows.schema())
        .build(stream::iter([Ok(rows)]))
        .filter_map(|data| std::future::ready(data.ok()));
    let mut answer = world.client.clone().do_exchange(encoded).await.unwrap().into_inner();
    answer.next().await.unwrap().unwrap();
    drop(answer);
    let gone = async {
        loop {
            let left: Vec<_> = world.store.list(None).try_collect().await.unwrap();
            // Nobody holds the engine's answer any more, and what was written is removed.
            if left.is_empty() && world.engine.memory_pool().reserved() == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
    assert!(world.process.created.lock().unwrap().is_empty());
}
