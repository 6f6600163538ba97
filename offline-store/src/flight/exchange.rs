//! Training sets for a spine that the client streams in.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow_flight::FlightData;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::error::FlightError;
use bytes::Bytes;
use datafusion::execution::SendableRecordBatchStream;
use feature_defs::catalog::Visibility;
use feature_defs::plan::ServicePlan;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use prost::Message as _;
use proto::v1::TrainingSetCommand;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::{Status, Streaming};

use super::encode::{self, Change, Message};
use super::tensor::TensorEncoder;
use super::{Flight, MessageStream, Surroundings, dataset_status, engine_status, is_name, stream_error};
use crate::dataset::{self, Created, DatasetError, DatasetWriter, Recipe, Selection};
use crate::engine::{ProfiledSet, TrainingSet, TrainingSetRequest};
use crate::point_in_time::{ORDINAL, Order, SourceReport};

/// Batches that wait for being written to a dataset.
const WRITES_AHEAD: usize = 2;

/// What became of a training set; the `app_metadata` of the last message.
#[derive(serde::Serialize)]
struct Ended {
    /// What was kept. Nothing of this where nothing was to be.
    #[serde(flatten)]
    kept: Option<Kept>,
    known_at: Vec<SourceReport>,
}

#[derive(serde::Serialize)]
struct Kept {
    dataset: String,
    id: String,
    location: String,
    rows: u64,
    /// It was there before, and nothing was computed.
    existed: bool,
}

impl Ended {
    fn of(created: &Created) -> Ended {
        let manifest = &created.manifest;
        let kept = Kept {
            dataset: manifest.name.clone(),
            id: manifest.id.clone(),
            location: created.path.to_string(),
            rows: manifest.rows,
            existed: created.existed,
        };
        Ended { kept: Some(kept), known_at: manifest.known_at.clone() }
    }

    fn into_message(self) -> Message {
        Message::last(serde_json::to_vec(&self).unwrap_or_default().into())
    }
}

/// What the client asks for, checked.
struct Asked {
    command: TrainingSetCommand,
    service: Arc<ServicePlan>,
    visibility: Option<Visibility>,
    order: Order,
    compression: Option<arrow::ipc::CompressionType>,
}

/// The spine as it came.
struct Spine {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
}

enum Item {
    Batch(RecordBatch),
    Ended(Ended),
}

impl Flight {
    /// Answers a `TrainingSetCommand` and the spine that follows it.
    pub(super) async fn exchange(&self, incoming: Streaming<FlightData>) -> Result<MessageStream, Status> {
        let mut incoming = incoming.peekable();
        let first = match Pin::new(&mut incoming).peek().await {
            Some(Ok(first)) => first,
            Some(Err(status)) => return Err(status.clone()),
            None => return Err(Status::invalid_argument("the exchange ended before it began")),
        };
        let descriptor = first.flight_descriptor.clone().ok_or_else(|| {
            Status::invalid_argument("the first message carries no descriptor; its `cmd` must be a TrainingSetCommand")
        })?;
        let asked = self.asked(descriptor.cmd)?;
        let spine = self.receive(incoming).await?;
        self.surroundings.before_read().await?;
        if asked.command.dataset.is_empty() {
            let set = self.engine.training_set(self.request(&asked, spine, asked.order)).await;
            let set = set.map_err(|error| engine_status(&error))?;
            return self.answer(&asked, set);
        }
        self.keep(asked, spine).await
    }

    fn asked(&self, command: Bytes) -> Result<Asked, Status> {
        let command = TrainingSetCommand::decode(command).map_err(|error| {
            Status::invalid_argument(format!("the descriptor's `cmd` is no TrainingSetCommand: {error}"))
        })?;
        let service = self.surroundings.service(&command.project, &command.service)?;
        let visibility = match command.visibility.as_str() {
            "" => None,
            "known" => Some(Visibility::Known),
            "event_time" => Some(Visibility::EventTime),
            "ingested" => Some(Visibility::Ingested),
            other => {
                let message = format!("visibility `{other}` is unknown; it is known, event_time or ingested");
                return Err(Status::invalid_argument(message));
            }
        };
        let order = match command.order.as_str() {
            "" | "spine" => Order::Spine,
            "any" => Order::Any,
            other => {
                return Err(Status::invalid_argument(format!("order `{other}` is unknown; it is spine or any")));
            }
        };
        if !command.dataset.is_empty() && !is_name(&command.dataset) {
            let message =
                format!("`{}` is not a dataset name: letters, digits, `_` and `-`, at most 64", command.dataset);
            return Err(Status::invalid_argument(message));
        }
        let compression = encode::compression(&command.compression)?;
        Ok(Asked { command, service, visibility, order, compression })
    }

    async fn receive(&self, incoming: stream::Peekable<Streaming<FlightData>>) -> Result<Spine, Status> {
        // Clients of the C++ library send the descriptor in a message of its own, which holds nothing to decode.
        let mut bytes = 0;
        let bytes_max = self.spine_bytes_max;
        let data = incoming.try_filter_map(move |message| {
            // What comes is counted, not what arrays of it say: they share the message that they came in.
            bytes += message.data_body.len();
            let taken = if bytes > bytes_max {
                let limit = bytes_max >> 20;
                let text = format!("the spine is larger than {limit} MiB, half of offline.memory; send it in parts");
                Err(Status::resource_exhausted(text))
            } else {
                Ok((!message.data_header.is_empty()).then_some(message))
            };
            std::future::ready(taken)
        });
        let data = data.map_err(|status| FlightError::Tonic(Box::new(status)));
        let mut spine = FlightRecordBatchStream::new_from_flight_data(data);
        let mut batches: Vec<RecordBatch> = Vec::new();
        while let Some(batch) = spine.next().await {
            batches.push(batch.map_err(|error| match error {
                FlightError::Tonic(status) => *status,
                error => Status::invalid_argument(format!("the spine could not be read: {error}")),
            })?);
        }
        let schema = spine.schema().cloned().ok_or_else(|| {
            Status::invalid_argument("the spine has no schema; send record batches after the descriptor")
        })?;
        Ok(Spine { schema, batches })
    }

    fn request(&self, asked: &Asked, spine: Spine, order: Order) -> TrainingSetRequest {
        TrainingSetRequest {
            service: asked.service.clone(),
            spine_schema: spine.schema,
            spine: spine.batches,
            statuses: asked.command.statuses,
            visibility: asked.visibility,
            order,
        }
    }

    /// A training set that nobody keeps.
    fn answer(&self, asked: &Asked, set: TrainingSet) -> Result<MessageStream, Status> {
        let TrainingSet { schema, stream: batches, report, .. } = set;
        let batches = batches.map(|batch| batch.map(Item::Batch).map_err(|error| stream_error(&error)));
        let ended = stream::once(async move {
            Ok(Item::Ended(Ended { kept: None, known_at: report.get().cloned().unwrap_or_default() }))
        });
        self.send(asked, &schema, batches.chain(ended).boxed())
    }

    /// A training set that is kept, or that was before.
    async fn keep(&self, asked: Asked, spine: Spine) -> Result<MessageStream, Status> {
        let (schema, batches) = (spine.schema.clone(), spine.batches.clone());
        let digest = tokio::task::spawn_blocking(move || dataset::table_digest(&schema, &batches)).await;
        let spine_digest = digest.map_err(|error| Status::internal(error.to_string()))?;
        // A dataset does not keep again what was forgotten, and has the identity of the spine as it came all the same.
        let now = self.surroundings.now();
        let left = dataset::redact::leave_out(&asked.service, spine.batches, &now);
        let (batches, redacted) = left.map_err(|error| dataset_status(&error))?;
        let spine = Spine { schema: spine.schema, batches };
        // Planned before it is looked for, because the plan says what the sources are; nothing is computed before the
        // first batch is asked for.
        let profiled = self.engine.profiled_training_set(self.request(&asked, spine, Order::Spine)).await;
        let ProfiledSet { set, whole_schema } = profiled.map_err(|error| engine_status(&error))?;
        let command = &asked.command;
        let recipe = Recipe {
            name: command.dataset.clone(),
            service: asked.service.clone(),
            spine_digest,
            sources: set.sources.clone(),
            visibility: if command.visibility.is_empty() { "known".into() } else { command.visibility.clone() },
            statuses: command.statuses,
            seed: command.seed,
            created_at: now,
        };
        let (store, project) = (self.engine.store(), self.engine.project_path());
        let found = dataset::find(store, &project, &recipe).await.map_err(|error| dataset_status(&error))?;
        let folder = self.surroundings.store_folder();
        let Some((manifest, path)) = found else {
            let writer = DatasetWriter::create(store.clone(), &project, recipe, whole_schema);
            let writer = writer.with_local(folder).with_redacted(redacted).with_seen(set.schema.fields().len());
            let schema = set.schema.clone();
            return self.send(&asked, &schema, write(set, writer, self.surroundings.clone()));
        };
        drop(set);
        if let Err(error) = dataset::sweep(store, &manifest, &path, folder.as_deref()).await {
            tracing::warn!(%error, dataset = %path, "leftovers of a dataset could not be removed");
        }
        let created = Created { manifest, path, existed: true };
        // A process that was killed between the manifest and the control log left this to do.
        self.surroundings.dataset_created(&created.manifest, &created.path).await?;
        let stored = self.open_at(&created.path).await?;
        let columns: Vec<usize> = (0..stored.schema.fields().len()).collect();
        let batches = self.batches(&stored, &Selection::default(), &columns, 0)?;
        let batches = batches.map_ok(Item::Batch);
        let ended = stream::once(async move { Ok(Item::Ended(Ended::of(&created))) });
        self.send(&asked, &stored.schema, batches.chain(ended).boxed())
    }

    fn send(
        &self,
        asked: &Asked,
        schema: &SchemaRef,
        items: BoxStream<'static, Result<Item, Status>>,
    ) -> Result<MessageStream, Status> {
        let mut schema = schema.clone();
        let mut changes: Vec<Change> = Vec::new();
        // What comes in the spine's order has its place there for a number.
        if asked.order == Order::Any && schema.column_with_name(ORDINAL).is_none() {
            let mut fields: Vec<Field> = schema.fields().iter().map(|field| Field::clone(field)).collect();
            fields.push(Field::new(ORDINAL, DataType::UInt64, false));
            schema = Arc::new(Schema::new(fields));
            changes.push(number(schema.clone()));
        }
        if !asked.command.encode_for.is_empty() {
            let model = self.surroundings.model(&asked.command.project, &asked.command.encode_for)?;
            if !Arc::ptr_eq(&model.service, &asked.service)
                && model.service.semantic_digest != asked.service.semantic_digest
            {
                let text = format!(
                    "model `{}` reads feature service `{}`, not `{}`",
                    model.name, model.service.name, asked.service.name
                );
                return Err(Status::invalid_argument(text));
            }
            let encoder = TensorEncoder::new(model, &schema, None)?;
            schema = encoder.schema().clone();
            changes.push(encoder.into_change());
        }
        let change: Option<Change> = match changes.len() {
            0 => None,
            _ => Some(Arc::new(move |batch| changes.iter().try_fold(batch, |batch, change| change(batch)))),
        };
        // The encoder sends schema and batches; how it ended follows in a message of its own.
        let (sender, receiver) = tokio::sync::oneshot::channel::<Ended>();
        let mut sender = Some(sender);
        let batches = items.filter_map(move |item| {
            let batch = match item {
                Ok(Item::Batch(batch)) => Some(Ok(batch)),
                Ok(Item::Ended(ended)) => {
                    if let Some(sender) = sender.take() {
                        // The receiver is gone only when the client is.
                        let _ = sender.send(ended);
                    }
                    None
                }
                Err(error) => Some(Err(error)),
            };
            std::future::ready(batch)
        });
        let messages = encode::messages(&schema, batches.boxed(), change, asked.compression)?;
        let last = stream::once(receiver)
            .filter_map(|ended| std::future::ready(ended.ok().map(|ended| Ok(ended.into_message()))));
        Ok(messages.chain(last).boxed())
    }
}

/// Adds each row's number.
fn number(schema: SchemaRef) -> Change {
    let next = AtomicU64::new(0);
    Arc::new(move |batch: RecordBatch| {
        let rows = batch.num_rows() as u64;
        let first = next.fetch_add(rows, Ordering::Relaxed);
        let mut columns = batch.columns().to_vec();
        columns.push(Arc::new(UInt64Array::from_iter_values(first..first + rows)) as ArrayRef);
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(schema.clone(), columns, &options)
            .map_err(|error| Status::internal(error.to_string()))
    })
}

enum Write {
    Batch(RecordBatch),
    Finish(Vec<SourceReport>),
}

/// Passes batches on while another task writes them, and then says what was stored. When the client goes before the end,
/// what was written is removed.
fn write(
    set: TrainingSet,
    writer: DatasetWriter,
    surroundings: Arc<dyn Surroundings>,
) -> BoxStream<'static, Result<Item, Status>> {
    struct Writing {
        /// The columns that the client sees.
        schema: SchemaRef,
        batches: SendableRecordBatchStream,
        report: Arc<std::sync::OnceLock<Vec<SourceReport>>>,
        writes: mpsc::Sender<Write>,
        task: JoinHandle<Result<Option<Created>, DatasetError>>,
        surroundings: Arc<dyn Surroundings>,
    }
    let (writes, mut incoming) = mpsc::channel(WRITES_AHEAD);
    let task = tokio::spawn(async move {
        let mut writer = writer;
        while let Some(next) = incoming.recv().await {
            match next {
                Write::Batch(batch) => {
                    if let Err(error) = writer.write(&batch).await {
                        writer.discard().await;
                        return Err(error);
                    }
                }
                Write::Finish(report) => return writer.finish(report).await.map(Some),
            }
        }
        writer.discard().await;
        Ok(None)
    });
    let TrainingSet { schema, stream: batches, report, .. } = set;
    let state = Writing { schema, batches, report, writes, task, surroundings };
    let why = |ended: Result<Result<Option<Created>, DatasetError>, tokio::task::JoinError>| match ended {
        Ok(Ok(_)) => Status::internal("the writer of the dataset ended before its batches did"),
        Ok(Err(error)) => dataset_status(&error),
        Err(error) => Status::internal(format!("the writer of the dataset broke: {error}")),
    };
    stream::try_unfold(Some(state), move |state| async move {
        let Some(mut state) = state else { return Ok(None) };
        match state.batches.next().await {
            Some(Ok(batch)) => {
                if state.writes.send(Write::Batch(batch.clone())).await.is_err() {
                    return Err(why(state.task.await));
                }
                let seen = batch.columns()[..state.schema.fields().len()].to_vec();
                let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
                let batch = RecordBatch::try_new_with_options(state.schema.clone(), seen, &options);
                let batch = batch.map_err(|error| Status::internal(error.to_string()))?;
                Ok(Some((Item::Batch(batch), Some(state))))
            }
            Some(Err(error)) => Err(stream_error(&error)),
            None => {
                let report = state.report.get().cloned().unwrap_or_default();
                // Where the writer is gone, its task says why.
                let _ = state.writes.send(Write::Finish(report)).await;
                let created = match state.task.await {
                    Ok(Ok(Some(created))) => created,
                    ended => return Err(why(ended)),
                };
                state.surroundings.dataset_created(&created.manifest, &created.path).await?;
                Ok(Some((Item::Ended(Ended::of(&created)), None)))
            }
        }
    })
    .boxed()
}
