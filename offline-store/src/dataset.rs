//! Datasets: training sets that stay. A dataset is a snapshot: Parquet on the object store and a manifest that says what
//! it was made from, so that the same inputs give the same identity and a model can say what it was trained on.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use arrow::array::{Array, RecordBatch};
use arrow::datatypes::{Schema, SchemaRef};
use feature_defs::aggregate::{Aggregate, Function, State};
use feature_defs::as_of::Times;
use feature_defs::digest::{Canonical, Digest};
use feature_defs::plan::ServicePlan;
use feature_defs::value::{Type, Value, encode_nullable};
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use parquet::arrow::AsyncArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Version of manifests.
pub const FORMAT: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("dataset object {path} could not be {verb}")]
    Store { path: String, verb: &'static str, source: object_store::Error },
    #[error("dataset object {path} is damaged ({what}); create the dataset again")]
    Damaged { path: String, what: String },
    #[error("dataset manifest {path} has format {found}, newer than this version knows ({FORMAT}); upgrade coeval")]
    Newer { path: String, found: u32 },
}

/// What a dataset is, beside its data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    pub name: String,
    pub id: String,
    pub service: String,
    /// Semantic digest of the service that computed it.
    pub service_digest: String,
    pub spine_digest: String,
    /// What each source was, by name.
    pub source_digests: BTreeMap<String, String>,
    pub visibility: String,
    pub seed: u64,
    pub rows: u64,
    pub files: Vec<DatasetFile>,
    pub columns: Vec<Column>,
    /// Of every feature, over all rows.
    pub profile: BTreeMap<String, Profile>,
    /// RFC 3339; information only.
    pub created_at: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetFile {
    pub path: String,
    pub rows: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    pub name: String,
    #[serde(rename = "type")]
    pub column_type: String,
}

/// Exact counts and moments of one feature.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    pub rows: u64,
    pub nulls: u64,
    pub nans: u64,
    pub infinities: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub max: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mean: Option<f64>,
}

/// What a dataset is made from: everything that decides its content.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub name: String,
    pub service: Arc<ServicePlan>,
    pub spine_digest: String,
    pub sources: Vec<(String, String)>,
    pub visibility: String,
    pub seed: u64,
    pub created_at: String,
}

impl Recipe {
    /// The same inputs give the same id.
    pub fn id(&self) -> String {
        let mut text = Canonical::new("dataset").with("service", &self.service.semantic_digest);
        text.add("spine", &self.spine_digest);
        self.sources.iter().for_each(|(name, digest)| text.add(name, digest));
        text.add("visibility", &self.visibility);
        text.add("seed", self.seed);
        text.digest().as_str()[..16].to_string()
    }
}

/// A digest of a table's content: independent of how its rows are dealt into batches.
pub fn table_digest(schema: &Schema, batches: &[RecordBatch]) -> String {
    let mut whole = Canonical::new("table");
    for (index, field) in schema.fields().iter().enumerate() {
        whole.add("column", field.name());
        whole.add("type", field.data_type());
        let mut hasher = Sha256::new();
        let mut bytes = Vec::new();
        for batch in batches {
            let column = batch.column(index);
            let known = Type::from_arrow(column.data_type()).filter(|known| known.arrow() == *column.data_type());
            for row in 0..column.len() {
                bytes.clear();
                match &known {
                    Some(known) => encode_nullable(&Value::from_array(column, row, known), &mut bytes),
                    // Columns of types that are not ours only pass through; their printed form is enough to tell
                    // tables apart.
                    None => {
                        let shown = arrow::util::display::array_value_to_string(column, row).unwrap_or_default();
                        encode_nullable(&Value::String(shown.into()), &mut bytes);
                    }
                }
                hasher.update(&bytes);
            }
        }
        let mut hex = String::new();
        for byte in hasher.finalize() {
            let _ = write!(hex, "{byte:02x}");
        }
        whole.add("values", hex);
    }
    whole.digest().to_string()
}

/// Writes a dataset while its batches pass by on their way to somebody else.
pub struct DatasetWriter {
    store: Arc<dyn ObjectStore>,
    folder: Path,
    recipe: Recipe,
    schema: SchemaRef,
    data: Path,
    writer: AsyncArrowWriter<BufWriter>,
    profiles: Vec<Profiler>,
    rows: u64,
}

impl DatasetWriter {
    /// `project` is the project's root on the store.
    pub fn create(
        store: Arc<dyn ObjectStore>,
        project: &Path,
        recipe: Recipe,
        schema: SchemaRef,
    ) -> Result<DatasetWriter, DatasetError> {
        let folder = dataset_folder(project, &recipe.name, &recipe.id());
        let data = folder.clone().join("part-0.parquet");
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(131_072))
            .build();
        let sink = BufWriter::new(store.clone(), data.clone());
        let writer = AsyncArrowWriter::try_new(sink, schema.clone(), Some(properties))
            .map_err(|error| DatasetError::Damaged { path: data.to_string(), what: error.to_string() })?;
        let profiles = recipe
            .service
            .outputs
            .iter()
            .filter_map(|output| Profiler::new(&schema, &output.name, &output.feature_type))
            .collect();
        Ok(DatasetWriter { store, folder, recipe, schema, data, writer, profiles, rows: 0 })
    }

    pub async fn write(&mut self, batch: &RecordBatch) -> Result<(), DatasetError> {
        self.profiles.iter_mut().for_each(|profile| profile.add(batch));
        self.rows += batch.num_rows() as u64;
        let (writer, path) = (&mut self.writer, &self.data);
        writer.write(batch).await.map_err(|e| DatasetError::Damaged { path: path.to_string(), what: e.to_string() })
    }

    /// The manifest is written last: a dataset without one does not exist.
    pub async fn finish(self) -> Result<(Manifest, Path), DatasetError> {
        let damaged = |e: parquet::errors::ParquetError| DatasetError::Damaged {
            path: self.data.to_string(),
            what: e.to_string(),
        };
        let mut writer = self.writer;
        writer.finish().await.map_err(damaged)?;
        let bytes = writer.bytes_written() as u64;
        let columns = self.schema.fields().iter().map(|field| Column {
            name: field.name().clone(),
            column_type: Type::from_arrow(field.data_type())
                .map_or_else(|| field.data_type().to_string(), |known| known.to_string()),
        });
        let manifest = Manifest {
            format: FORMAT,
            id: self.recipe.id(),
            name: self.recipe.name.clone(),
            service: self.recipe.service.name.to_string(),
            service_digest: self.recipe.service.semantic_digest.to_string(),
            spine_digest: self.recipe.spine_digest.clone(),
            source_digests: self.recipe.sources.iter().cloned().collect(),
            visibility: self.recipe.visibility.clone(),
            seed: self.recipe.seed,
            rows: self.rows,
            files: vec![DatasetFile { path: "part-0.parquet".into(), rows: self.rows, bytes }],
            columns: columns.collect(),
            profile: self.profiles.into_iter().map(Profiler::finish).collect(),
            created_at: self.recipe.created_at.clone(),
        };
        let path = self.folder.clone().join("manifest.json");
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| DatasetError::Damaged { path: path.to_string(), what: e.to_string() })?;
        self.store.put(&path, PutPayload::from(text)).await.map_err(|source| DatasetError::Store {
            path: path.to_string(),
            verb: "written",
            source,
        })?;
        Ok((manifest, path))
    }
}

pub fn dataset_folder(project: &Path, name: &str, id: &str) -> Path {
    project.clone().join("datasets").join(name).join(id)
}

/// Reads a manifest.
pub async fn open(store: &Arc<dyn ObjectStore>, manifest: &Path) -> Result<Manifest, DatasetError> {
    let failed = |source| DatasetError::Store { path: manifest.to_string(), verb: "read", source };
    let bytes = store.get(manifest).await.map_err(failed)?.bytes().await.map_err(failed)?;
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let damaged = |e: serde_json::Error| DatasetError::Damaged { path: manifest.to_string(), what: e.to_string() };
    let Versioned { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
    if format > FORMAT {
        return Err(DatasetError::Newer { path: manifest.to_string(), found: format });
    }
    serde_json::from_slice(&bytes).map_err(damaged)
}

/// Counts one feature's values as they pass.
struct Profiler {
    name: String,
    column: usize,
    value_type: Type,
    profile: Profile,
    numeric: Option<[(Aggregate, State); 3]>,
}

impl Profiler {
    fn new(schema: &Schema, name: &str, value_type: &Type) -> Option<Profiler> {
        let (column, _) = schema.column_with_name(name)?;
        let aggregates = || {
            let make = |function| {
                let aggregate = Aggregate::new(function, Some(value_type.clone())).ok()?;
                let zero = aggregate.zero();
                Some((aggregate, zero))
            };
            Some([make(Function::Min)?, make(Function::Max)?, make(Function::Mean)?])
        };
        let numeric = if value_type.is_numeric() { aggregates() } else { None };
        Some(Profiler {
            name: name.into(),
            column,
            value_type: value_type.clone(),
            profile: Profile::default(),
            numeric,
        })
    }

    fn add(&mut self, batch: &RecordBatch) {
        let column = batch.column(self.column);
        self.profile.rows += column.len() as u64;
        self.profile.nulls += column.null_count() as u64;
        let Some(numeric) = &mut self.numeric else { return };
        for row in 0..column.len() {
            let value = Value::from_array(column, row, &self.value_type);
            match value {
                Value::Null => continue,
                Value::Float64(x) if x.is_nan() => self.profile.nans += 1,
                Value::Float32(x) if x.is_nan() => self.profile.nans += 1,
                Value::Float64(x) if x.is_infinite() => self.profile.infinities += 1,
                Value::Float32(x) if x.is_infinite() => self.profile.infinities += 1,
                value => numeric.iter_mut().for_each(|(aggregate, state)| aggregate.push(state, &value, &Times::NONE)),
            }
        }
    }

    fn finish(self) -> (String, Profile) {
        let mut profile = self.profile;
        if let Some([min, max, mean]) = &self.numeric {
            let number =
                |(aggregate, state): &(Aggregate, State)| as_number(&aggregate.finish(state), &self.value_type);
            profile.min = number(min);
            profile.max = number(max);
            profile.mean = number(mean);
        }
        (self.name, profile)
    }
}

fn as_number(value: &Value, value_type: &Type) -> Option<f64> {
    Some(match (value, value_type) {
        (Value::Int32(x), _) => f64::from(*x),
        (Value::Int64(x), _) => *x as f64,
        (Value::Float32(x), _) => f64::from(*x),
        (Value::Float64(x), _) => *x,
        (Value::Decimal(x), Type::Decimal { scale, .. }) => *x as f64 / 10f64.powi(i32::from(*scale)),
        _ => return None,
    })
}

/// Of a manifest's canonical content, for records that point at it.
pub fn manifest_digest(manifest: &Manifest) -> Digest {
    Digest::of_bytes(&serde_json::to_vec(manifest).unwrap_or_default())
}
