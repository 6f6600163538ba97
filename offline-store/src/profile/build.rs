//! Profiles from the batches of a dataset: in one pass edges, moments and samples, in a second one exact bins.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{Schema, TimestampMicrosecondType, UInt8Type};
use drift::DriftError;
use drift::builder::{Builder, Options};
use drift::counts::{Counter, Counts};
use drift::layout::Layout;
use drift::noise::Clustered;
use drift::profile::Profile;
use feature_defs::plan::ServicePlan;
use feature_defs::time::Micros;
use feature_defs::value::Type;

use super::blocks::Blocks;
use super::column::{RowsOf, add, kind_of};
use super::{BLOCK, FLAGS, FORMAT, FeatureProfile, Profiles};
use crate::point_in_time::EVENT_TIMESTAMP;

/// All samples of a dataset together take about this much memory; with many features each has a smaller one.
const SAMPLES_BYTES_MAX: usize = 128 << 20;
/// A value of a sample, with its priority and its bucket, and room for as many again.
const SAMPLED_BYTES: usize = 48;
const SAMPLE_MIN: usize = 1_024;

/// Where a dataset's columns are.
#[derive(Debug, Clone)]
struct Columns {
    at: usize,
    /// By feature.
    features: Vec<Feature>,
}

#[derive(Debug, Clone)]
struct Feature {
    name: String,
    value_type: Type,
    column: usize,
    flags: Option<usize>,
    /// Names of blocks, with the columns of their buckets.
    blocks: Vec<(String, usize)>,
}

/// What a batch says of its rows.
struct Batch<'a> {
    batch: &'a RecordBatch,
    at: &'a [Micros],
}

/// A column that is to be profiled.
#[derive(Debug, Clone)]
pub struct ProfiledColumn {
    pub name: String,
    pub value_type: Type,
    /// The blocks that its values may share; one by one they are tried.
    pub blocks: Vec<String>,
}

impl Columns {
    fn named(schema: &Schema, columns: &[ProfiledColumn]) -> Option<Columns> {
        let place = |name: &str| schema.column_with_name(name).map(|(index, _)| index);
        let features = columns.iter().map(|column| {
            let blocks = column.blocks.iter().map(|name| Some((name.clone(), place(&format!("{BLOCK}{name}"))?)));
            Some(Feature {
                name: column.name.clone(),
                value_type: column.value_type.clone(),
                column: place(&column.name)?,
                flags: place(&format!("{FLAGS}{}", column.name)),
                blocks: blocks.collect::<Option<Vec<_>>>().filter(|blocks| !blocks.is_empty())?,
            })
        });
        Some(Columns { at: place(EVENT_TIMESTAMP)?, features: features.collect::<Option<_>>()? })
    }

    fn of(schema: &Schema, service: &ServicePlan) -> Option<Columns> {
        let blocks = Blocks::of(service);
        let names: Vec<&str> = blocks.names().collect();
        let columns = service.outputs.iter().enumerate().map(|(index, output)| ProfiledColumn {
            name: output.name.clone(),
            value_type: output.feature_type.clone(),
            blocks: blocks.of_output(index).iter().filter_map(|block| Some((*names.get(*block)?).to_owned())).collect(),
        });
        Columns::named(schema, &columns.collect::<Vec<_>>())
    }

    fn batch<'a>(&self, batch: &'a RecordBatch) -> Option<Batch<'a>> {
        let at = batch.columns().get(self.at)?.as_primitive_opt::<TimestampMicrosecondType>()?;
        Some(Batch { batch, at: at.values() })
    }
}

impl<'a> Batch<'a> {
    fn bytes(&self, column: usize) -> Option<&'a [u8]> {
        let column: &ArrayRef = self.batch.columns().get(column)?;
        Some(column.as_primitive_opt::<UInt8Type>()?.values())
    }

    /// The values of a feature, by one of its blocks.
    fn of(&self, feature: &Feature, block: usize) -> Option<(&'a ArrayRef, RowsOf<'a>)>
    where
        Self: 'a,
    {
        let buckets = self.bytes(feature.blocks.get(block)?.1)?;
        let flags = match feature.flags {
            Some(flags) => Some(self.bytes(flags)?),
            None => None,
        };
        Some((self.batch.columns().get(feature.column)?, RowsOf { buckets, flags, at: self.at }))
    }
}

/// Columns that are not what the service says of them.
fn other_columns() -> DriftError {
    DriftError::WrongKind { profiled: "the columns of a dataset", given: "other columns" }
}

/// The first pass.
pub struct Collector {
    service: String,
    service_digest: String,
    columns: Columns,
    builders: Vec<Builder>,
    rows: u64,
    from: Option<Micros>,
    to: Option<Micros>,
}

impl Collector {
    /// None where the table has no blocks: it was not made to be profiled.
    pub fn new(schema: &Schema, service: &ServicePlan) -> Result<Option<Collector>, DriftError> {
        let Some(columns) = Columns::of(schema, service) else { return Ok(None) };
        Collector::over(columns, service.name.to_string(), service.semantic_digest.to_string()).map(Some)
    }

    /// The same for columns that are no features.
    pub fn of_columns(
        schema: &Schema,
        columns: &[ProfiledColumn],
        service: String,
        service_digest: String,
    ) -> Result<Option<Collector>, DriftError> {
        let Some(columns) = Columns::named(schema, columns) else { return Ok(None) };
        Collector::over(columns, service, service_digest).map(Some)
    }

    fn over(columns: Columns, service: String, service_digest: String) -> Result<Collector, DriftError> {
        let most = SAMPLES_BYTES_MAX / SAMPLED_BYTES / columns.features.len().max(1);
        let options = Options::default();
        let options = Options { sample: options.sample.min(most).max(SAMPLE_MIN), ..options };
        let builders = columns.features.iter().map(|feature| Builder::new(kind_of(&feature.value_type), options, 0));
        let builders = builders.collect::<Result<_, _>>()?;
        Ok(Collector { service, service_digest, columns, builders, rows: 0, from: None, to: None })
    }

    pub fn add(&mut self, batch: &RecordBatch) -> Result<(), DriftError> {
        let given = self.columns.batch(batch).ok_or_else(other_columns)?;
        for (feature, builder) in self.columns.features.iter().zip(&mut self.builders) {
            let (column, rows) = given.of(feature, 0).ok_or_else(other_columns)?;
            add(builder, column, &feature.value_type, &rows)?;
        }
        self.rows += batch.num_rows() as u64;
        self.from = given.at.iter().copied().min().into_iter().chain(self.from).min();
        self.to = given.at.iter().copied().max().into_iter().chain(self.to).max();
        Ok(())
    }

    /// What counts the same rows again, in so many shares of the features that can work beside each other.
    pub fn recounts(&mut self, shares: usize) -> Result<Vec<Recount>, DriftError> {
        let layouts = self.builders.iter_mut().map(|builder| builder.layout().map(Arc::new));
        let layouts = layouts.collect::<Result<Vec<_>, _>>()?;
        let all: Vec<(Feature, Arc<Layout>)> = self.columns.features.iter().cloned().zip(layouts).collect();
        let share = all.len().div_ceil(shares.max(1)).max(1);
        let recounts = all.chunks(share).map(|features| Recount::new(self.columns.at, features));
        Ok(recounts.collect())
    }

    /// The profiles of the first pass alone, whose bins hold samples.
    pub fn sampled(self) -> Result<Profiles, DriftError> {
        let profile = |(mut builder, feature): (Builder, Feature)| {
            let blocks = feature.blocks.first().map(|(name, _)| name.clone()).unwrap_or_default();
            let profile = builder.profile()?;
            Ok(FeatureProfile { name: feature.name, value_type: feature.value_type, blocks, profile })
        };
        let features = self.builders.into_iter().zip(self.columns.features).map(profile);
        Ok(Profiles {
            format: FORMAT,
            features: features.collect::<Result<_, DriftError>>()?,
            service: self.service,
            service_digest: self.service_digest,
            rows: self.rows,
            from: self.from,
            to: self.to,
            exact: false,
        })
    }

    /// The profiles, with all rows in their bins.
    pub fn exact(self, recounts: Vec<Recount>) -> Result<Profiles, DriftError> {
        let counted = recounts.into_iter().flat_map(|recount| recount.features);
        let features = self.builders.into_iter().zip(counted).map(|(mut builder, counted)| {
            let Counting { feature, layout, counters } = counted;
            let mut best: Option<(f64, String, Counts)> = None;
            for (mut counter, (name, _)) in counters.into_iter().zip(&feature.blocks) {
                let counts = counter.take();
                let rows = rows_effective(&counts);
                if best.as_ref().is_none_or(|(least, ..)| rows < *least) {
                    best = Some((rows, name.clone(), counts));
                }
            }
            let (_, blocks, counts) = best.ok_or_else(other_columns)?;
            let profile: Profile = builder.profile_of(layout, counts)?;
            Ok(FeatureProfile { name: feature.name, value_type: feature.value_type, blocks, profile })
        });
        Ok(Profiles {
            format: FORMAT,
            features: features.collect::<Result<_, DriftError>>()?,
            service: self.service,
            service_digest: self.service_digest,
            rows: self.rows,
            from: self.from,
            to: self.to,
            exact: true,
        })
    }
}

/// What the rows are worth, by the distribution that says least.
fn rows_effective(counts: &Counts) -> f64 {
    let parts = counts.parts().iter().map(|part| Clustered::new(part.cells(), part.totals().len()).rows_effective());
    parts.fold(f64::INFINITY, f64::min)
}

/// The second pass, over some of the features.
pub struct Recount {
    at: usize,
    features: Vec<Counting>,
}

struct Counting {
    feature: Feature,
    layout: Arc<Layout>,
    /// One for each of the feature's blocks.
    counters: Vec<Counter>,
}

impl Recount {
    fn new(at: usize, features: &[(Feature, Arc<Layout>)]) -> Recount {
        let counting = |(feature, layout): &(Feature, Arc<Layout>)| Counting {
            feature: feature.clone(),
            layout: layout.clone(),
            counters: feature.blocks.iter().map(|_| Counter::new(layout.clone())).collect(),
        };
        Recount { at, features: features.iter().map(counting).collect() }
    }

    /// The columns that it needs, ascending.
    pub fn columns(&self) -> Vec<usize> {
        let of_feature = |counting: &Counting| {
            let Feature { column, flags, blocks, .. } = &counting.feature;
            let blocks = blocks.iter().map(|(_, column)| *column).collect::<Vec<_>>();
            std::iter::once(*column).chain(*flags).chain(blocks)
        };
        let mut columns: Vec<usize> = self.features.iter().flat_map(of_feature).chain([self.at]).collect();
        columns.sort_unstable();
        columns.dedup();
        columns
    }

    /// From now on batches have these columns of the dataset only, in this order.
    pub fn projected(mut self, columns: &[usize]) -> Recount {
        let place = |column: usize| columns.iter().position(|known| *known == column).unwrap_or(usize::MAX);
        self.at = place(self.at);
        for counting in &mut self.features {
            let feature = &mut counting.feature;
            feature.column = place(feature.column);
            feature.flags = feature.flags.map(place);
            feature.blocks.iter_mut().for_each(|(_, column)| *column = place(*column));
        }
        self
    }

    pub fn add(&mut self, batch: &RecordBatch) -> Result<(), DriftError> {
        let columns = Columns { at: self.at, features: Vec::new() };
        let given = columns.batch(batch).ok_or_else(other_columns)?;
        for Counting { feature, counters, .. } in &mut self.features {
            for (block, counter) in counters.iter_mut().enumerate() {
                let (column, rows) = given.of(feature, block).ok_or_else(other_columns)?;
                add(counter, column, &feature.value_type, &rows)?;
            }
        }
        Ok(())
    }
}
