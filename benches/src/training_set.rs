//! A training set from the first byte read to the last batch handed out.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Float64Type, Int64Type, SchemaRef, UInt64Type};
use feature_defs::plan::ServicePlan;
use futures::TryStreamExt as _;
use offline_store::point_in_time::Order;
use offline_store::{TrainingSet, TrainingSetRequest};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Serialize;

use crate::definitions::{Known, Setup, Workload, open};

/// Rows in one batch of the spine.
const SPINE_BATCH_ROWS: usize = 65_536;

#[derive(Debug, Clone, Default)]
pub struct Options {
    pub known: Known,
    pub order: Order,
    /// Hash every value of every feature: two runs that agree in this gave the same answers in the same order.
    pub digest: bool,
    /// Keep all batches until the end, as engines that answer with one table do.
    pub keep: bool,
    /// Write the answer here, as Parquet. Its time counts, so this is for comparing answers.
    pub out: Option<PathBuf>,
}

/// What came of one run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Outcome {
    pub rows: u64,
    /// Of the first feature of every view, or of the sums over all windows.
    pub checksum: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<i64>,
    /// Of the maxima over all windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// From before the first file is opened to the last batch.
    pub seconds: f64,
    pub first_batch_seconds: f64,
    /// How the engine says that it went about it.
    pub explain: String,
}

pub async fn run(setup: &Setup, workload: Workload, options: &Options) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let (engine, service) = open(setup, workload, options.known).await?;
    let (spine_schema, spine) = read_spine(&setup.folder.join("spine.parquet"))?;
    let request = TrainingSetRequest {
        service: service.clone(),
        spine_schema,
        spine,
        statuses: false,
        visibility: None,
        order: options.order,
    };
    let TrainingSet { schema, mut stream, explain, .. } = engine.training_set(request).await?;
    let mut totals = Totals::new(&service, &schema)?;
    let mut writer = match &options.out {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
            Some(ArrowWriter::try_new(file, schema.clone(), None)?)
        }
        None => None,
    };
    let mut digest = options.digest.then(|| Digest::new(&service, &schema)).transpose()?;
    let mut kept = Vec::new();
    let mut first_batch_seconds = None;
    while let Some(batch) = stream.try_next().await? {
        first_batch_seconds.get_or_insert_with(|| started.elapsed().as_secs_f64());
        totals.add(&batch)?;
        if let Some(digest) = &mut digest {
            digest.add(&batch)?;
        }
        if let Some(writer) = &mut writer {
            writer.write(&batch)?;
        }
        if options.keep {
            kept.push(batch);
        }
    }
    if let Some(writer) = writer {
        writer.close()?;
    }
    let seconds = started.elapsed().as_secs_f64();
    // What was kept must have lived until here.
    drop(kept);
    let windowed = matches!(workload, Workload::Windows(_));
    Ok(Outcome {
        rows: totals.rows,
        checksum: totals.checksum,
        count: windowed.then_some(totals.count),
        largest: windowed.then_some(totals.largest),
        digest: digest.map(Digest::finish),
        seconds,
        first_batch_seconds: first_batch_seconds.unwrap_or(seconds),
        explain,
    })
}

/// The spine, whole.
pub fn read_spine(path: &Path) -> anyhow::Result<(SchemaRef, Vec<RecordBatch>)> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)?.with_batch_size(SPINE_BATCH_ROWS);
    let schema = reader.schema().clone();
    let batches: Result<Vec<_>, _> = reader.build()?.collect();
    Ok((schema, batches?))
}

/// What the peers' scripts sum, summed while the batches go by.
struct Totals {
    sums: Vec<usize>,
    counts: Vec<usize>,
    maxima: Vec<usize>,
    rows: u64,
    checksum: f64,
    count: i64,
    largest: f64,
}

impl Totals {
    fn new(service: &ServicePlan, schema: &SchemaRef) -> anyhow::Result<Totals> {
        let columns = |wanted: &dyn Fn(&str) -> bool| -> anyhow::Result<Vec<usize>> {
            let names = service.outputs.iter().map(|output| output.name.as_str());
            let feature = |name: &str| name.rsplit(':').next().is_some_and(wanted);
            names.filter(|name| feature(name)).map(|name| Ok(schema.index_of(name)?)).collect()
        };
        Ok(Totals {
            sums: columns(&|name| name.ends_with("_f0") || name.starts_with("sum_"))?,
            counts: columns(&|name| name.starts_with("count_"))?,
            maxima: columns(&|name| name.starts_with("max_"))?,
            rows: 0,
            checksum: 0.0,
            count: 0,
            largest: 0.0,
        })
    }

    fn add(&mut self, batch: &RecordBatch) -> anyhow::Result<()> {
        let float = |column: &usize| -> anyhow::Result<f64> {
            let column = batch.column(*column).as_primitive_opt::<Float64Type>().context("a feature is no float64")?;
            Ok(arrow::compute::sum(column).unwrap_or(0.0))
        };
        self.rows += batch.num_rows() as u64;
        for column in &self.sums {
            self.checksum += float(column)?;
        }
        for column in &self.maxima {
            self.largest += float(column)?;
        }
        for column in &self.counts {
            let counts = batch.column(*column).as_primitive_opt::<Int64Type>().context("a count is no int64")?;
            self.count += arrow::compute::sum(counts).unwrap_or(0);
        }
        Ok(())
    }
}

/// A hash of every feature's values in order, which does not depend on how rows are dealt into batches.
struct Digest {
    columns: Vec<(usize, u64)>,
}

impl Digest {
    fn new(service: &ServicePlan, schema: &SchemaRef) -> anyhow::Result<Digest> {
        let columns = service.outputs.iter().map(|output| Ok((schema.index_of(&output.name)?, 0)));
        Ok(Digest { columns: columns.collect::<anyhow::Result<_>>()? })
    }

    fn add(&mut self, batch: &RecordBatch) -> anyhow::Result<()> {
        for (column, hash) in &mut self.columns {
            let bits = as_bits(batch.column(*column))?;
            let bits = bits.as_primitive::<UInt64Type>();
            for row in 0..bits.len() {
                // A null is no bit pattern of a value: it changes the hash in another way.
                *hash = if bits.is_null(row) { mix(!*hash) } else { mix(*hash ^ bits.value(row)) };
            }
        }
        Ok(())
    }

    fn finish(self) -> String {
        let whole = self.columns.iter().fold(0, |whole, (_, hash)| mix(whole ^ hash));
        format!("{whole:016x}")
    }
}

/// The same eight bytes, named otherwise.
fn as_bits(column: &ArrayRef) -> anyhow::Result<ArrayRef> {
    anyhow::ensure!(
        matches!(column.data_type(), DataType::Float64 | DataType::Int64),
        "a feature of type {} has no digest here",
        column.data_type()
    );
    let data = column.to_data().into_builder().data_type(DataType::UInt64);
    Ok(arrow::array::make_array(data.build()?))
}

/// The finaliser of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
