//! Stored datasets: who gets which rows, and their streams.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::datatypes::SchemaRef;
use arrow_flight::{FlightDescriptor, FlightEndpoint, FlightInfo, Ticket};
use bytes::Bytes;
use datafusion::execution::memory_pool::MemoryConsumer;
use futures::stream::{BoxStream, StreamExt};
use object_store::path::Path;
use prost::Message as _;
use proto::v1::DatasetTicket;
use tonic::Status;

use super::encode::{self, Change};
use super::tensor::TensorEncoder;
use super::{Flight, MessageStream, dataset_status};
use crate::dataset::{self, DatasetError, Manifest, Selection, StoredDataset};

/// Datasets whose footers are kept: readers of many endpoints come back at once.
const OPENED_MAX: usize = 16;
/// Endpoints of one dataset; each costs a call.
const ENDPOINTS_MAX: u32 = 4_096;

/// Datasets that were read lately.
#[derive(Default)]
pub struct Opened(Mutex<VecDeque<(Path, Arc<StoredDataset>)>>);

impl Opened {
    fn get(&self, path: &Path, manifest: &Manifest) -> Option<Arc<StoredDataset>> {
        let opened = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A dataset that was removed and made again has other files.
        opened.iter().find(|(at, known)| at == path && known.manifest == *manifest).map(|(_, known)| known.clone())
    }

    fn put(&self, path: &Path, dataset: Arc<StoredDataset>) {
        let mut opened = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        opened.retain(|(at, _)| at != path);
        opened.push_front((path.clone(), dataset));
        opened.truncate(OPENED_MAX);
    }
}

/// What is sent of a dataset.
struct View {
    columns: Vec<usize>,
    schema: SchemaRef,
    change: Option<Change>,
}

impl Flight {
    /// Answers a `DatasetTicket`.
    pub(super) async fn get(&self, ticket: &Bytes) -> Result<MessageStream, Status> {
        let ticket = ticket_of(ticket)?;
        let dataset = self.open(&ticket).await?;
        let compression = encode::compression(&ticket.compression)?;
        let View { columns, schema, change } = self.view(&dataset, &ticket)?;
        let batches = self.batches(&dataset, &selection(&ticket), &columns, ticket.batch_rows)?;
        Ok(encode::messages(&schema, batches, change, compression)?.boxed())
    }

    /// Describes what a `DatasetTicket` would give, in endpoints.
    pub(super) async fn info(&self, descriptor: FlightDescriptor) -> Result<FlightInfo, Status> {
        let ticket = ticket_of(&descriptor.cmd)?;
        let dataset = self.open(&ticket).await?;
        encode::compression(&ticket.compression)?;
        let view = self.view(&dataset, &ticket)?;
        let manifest = &dataset.manifest;
        let selection = selection(&ticket);
        let range = dataset.range(&selection).map_err(|error| dataset_status(&error))?;
        let parts = dataset.parts(&selection, ticket.endpoints.min(ENDPOINTS_MAX));
        let rows = range.end - range.start;
        let all: u64 = manifest.files.iter().map(|file| file.bytes).sum();
        let bytes = (u128::from(all) * u128::from(rows) / u128::from(manifest.rows.max(1))) as i64;
        let metadata = serde_json::to_vec(manifest).map_err(|error| Status::internal(error.to_string()))?;
        let mut info = FlightInfo::new()
            .try_with_schema(&encode::plain_schema(&view.schema))
            .map_err(|error| Status::internal(error.to_string()))?
            .with_total_records(rows as i64)
            .with_total_bytes(bytes)
            .with_ordered(true)
            .with_app_metadata(metadata)
            .with_descriptor(descriptor);
        for part in parts.map_err(|error| dataset_status(&error))? {
            // The endpoints are of this snapshot, whatever the name comes to mean.
            let ticket = DatasetTicket {
                name: manifest.name.clone(),
                id: manifest.id.clone(),
                offset: ticket.offset + part.offset,
                limit: Some(part.limit),
                endpoints: 0,
                ..ticket.clone()
            };
            info = info.with_endpoint(FlightEndpoint::new().with_ticket(Ticket::new(ticket.encode_to_vec())));
        }
        Ok(info)
    }

    /// The batches of a selection, on account of the engine's memory.
    pub(super) fn batches(
        &self,
        dataset: &Arc<StoredDataset>,
        selection: &Selection,
        columns: &[usize],
        batch_rows: u32,
    ) -> Result<BoxStream<'static, Result<arrow::array::RecordBatch, Status>>, Status> {
        let needed = dataset.stream_bytes(selection);
        let memory = MemoryConsumer::new("dataset stream").register(self.engine.memory_pool());
        memory.try_grow(usize::try_from(needed).unwrap_or(usize::MAX)).map_err(|_| {
            let dataset = dataset.manifest.name.clone();
            dataset_status(&DatasetError::Memory { dataset, needed_mib: needed.div_ceil(1 << 20) })
        })?;
        let batches = dataset.read(selection, columns, batch_rows).map_err(|error| dataset_status(&error))?;
        let batches = batches.map(move |batch| {
            // Held for as long as there is a stream.
            let _ = &memory;
            batch.map_err(|error| dataset_status(&error))
        });
        Ok(batches.boxed())
    }

    /// The profile of a dataset, as JSON for people.
    pub(super) async fn profile(&self, ticket: &Bytes) -> Result<Bytes, Status> {
        let ticket = ticket_of(ticket)?;
        let path = self.surroundings.dataset(&ticket.project, &ticket.name, &ticket.id)?;
        let store = self.engine.store();
        let manifest = dataset::open(store, &path).await.map_err(|error| dataset_status(&error))?;
        let profiles = dataset::profiles(store, &path, &manifest).await.map_err(|error| dataset_status(&error))?;
        let profiles = profiles.ok_or_else(|| {
            let text = format!(
                "dataset `{}` has no profile: it was made by a version that made none; create it again under another name",
                manifest.name
            );
            Status::failed_precondition(text)
        })?;
        Ok(profiles.describe().to_string().into())
    }

    pub(super) async fn open_at(&self, path: &Path) -> Result<Arc<StoredDataset>, Status> {
        let store = self.engine.store();
        let manifest = dataset::open(store, path).await.map_err(|error| dataset_status(&error))?;
        if let Some(known) = self.opened.get(path, &manifest) {
            return Ok(known);
        }
        let opened = StoredDataset::open(store.clone(), path).await.map_err(|error| dataset_status(&error))?;
        let opened = Arc::new(opened);
        self.opened.put(path, opened.clone());
        Ok(opened)
    }

    async fn open(&self, ticket: &DatasetTicket) -> Result<Arc<StoredDataset>, Status> {
        self.open_at(&self.surroundings.dataset(&ticket.project, &ticket.name, &ticket.id)?).await
    }

    fn view(&self, dataset: &StoredDataset, ticket: &DatasetTicket) -> Result<View, Status> {
        let failed = |error: DatasetError| dataset_status(&error);
        if ticket.encode_for.is_empty() {
            let columns = dataset.columns(&ticket.columns).map_err(failed)?;
            let schema = dataset.schema.project(&columns).map_err(|error| Status::internal(error.to_string()))?;
            return Ok(View { columns, schema: Arc::new(schema), change: None });
        }
        let model = self.surroundings.model(&ticket.project, &ticket.encode_for)?;
        let manifest = &dataset.manifest;
        if *model.service.name != *manifest.service {
            let text = format!(
                "model `{}` reads feature service `{}`, and dataset `{}` is of `{}`; use a dataset of its service",
                model.name, model.service.name, manifest.name, manifest.service
            );
            return Err(Status::failed_precondition(text));
        }
        if model.service.semantic_digest.as_str() != manifest.service_digest {
            let text = format!(
                "feature service `{}` has changed since dataset `{}` was made; create the dataset again",
                manifest.service, manifest.name
            );
            return Err(Status::failed_precondition(text));
        }
        let passed = match (ticket.inputs_only, ticket.columns.is_empty()) {
            (true, _) => Some(Vec::new()),
            (false, true) => None,
            (false, false) => Some(ticket.columns.clone()),
        };
        // Only what is needed is decoded: the features that the model reads, and the columns that pass.
        let outputs = &model.service.outputs;
        let all = TensorEncoder::new(model.clone(), &dataset.schema, passed.as_deref())?;
        let passes = |name: &str| all.schema().column_with_name(name).is_some();
        let needed = |name: &str| outputs.iter().any(|output| output.name == name) || passes(name);
        let fields = dataset.schema.fields().iter().enumerate();
        let columns: Vec<usize> = fields.filter(|(_, field)| needed(field.name())).map(|(index, _)| index).collect();
        let projected = dataset.schema.project(&columns).map_err(|error| Status::internal(error.to_string()))?;
        let encoder = TensorEncoder::new(model, &projected, passed.as_deref())?;
        Ok(View { columns, schema: encoder.schema().clone(), change: Some(encoder.into_change()) })
    }
}

fn selection(ticket: &DatasetTicket) -> Selection {
    Selection {
        rank: ticket.rank,
        world_size: ticket.world_size,
        shuffle_seed: ticket.shuffle_seed,
        offset: ticket.offset,
        limit: ticket.limit,
    }
}

fn ticket_of(bytes: &Bytes) -> Result<DatasetTicket, Status> {
    DatasetTicket::decode(bytes.clone())
        .map_err(|error| Status::invalid_argument(format!("these bytes are no DatasetTicket: {error}")))
}
