//! The compiled plan: what a catalog means, with every expression typed and every name resolved.
//!
//! A plan is made once from a checked catalog and the schemas of its sources, and is then only read. Both sides run it:
//! the offline engine and the appliers turn source batches into rows with [`ViewPlan::rows`], and the offline engine and
//! the gateway turn what they found into features with [`ServicePlan::assemble`].

mod assemble;
mod compile;
mod model;
mod project;
mod redact;
mod rows;
mod sensitive;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::aggregate::Aggregate;
use crate::as_of::MaxAge;
use crate::catalog::{self, Visibility};
use crate::digest::Digest;
use crate::expression::Expression;
use crate::forgotten::{Forgotten, ForgottenList};
use crate::time::{Micros, SourceClock};
use crate::value::{Type, Value};
use crate::window::{Levels, Window};

pub use assemble::{AssembleError, Assembled, ViewAnswer};
pub use compile::{SourceSchemas, compile};
pub use model::{EncodedInput, EncodedModelInputs, InputValues};
pub use project::{compile_definitions, read_definitions};
pub use redact::{Judge, KeysOfViews, Redaction, redact};
pub use rows::{EntityKeys, RowsError, ViewRows, align_batch, canonical, encode_entity_keys};

/// Everything a project defines, compiled.
#[derive(Debug, Clone)]
pub struct Plan {
    pub project: Arc<str>,
    pub sources: Vec<Arc<SourcePlan>>,
    pub views: Vec<Arc<ViewPlan>>,
    pub services: Vec<Arc<ServicePlan>>,
    pub models: Vec<Arc<ModelPlan>>,
    /// Of the whole: two plans with this digest answer everything alike.
    pub digest: Digest,
    /// What all views of the plan consult; whoever follows the control log keeps it up to date.
    pub forgotten: Arc<ForgottenList>,
}

#[derive(Debug)]
pub struct SourcePlan {
    pub name: Arc<str>,
    pub kind: SourceKind,
    /// Columns of the source, in its own order, in our types.
    pub schema: Vec<(String, Type)>,
    pub event_time: Option<String>,
    pub created_time: Option<String>,
    pub clock: SourceClock,
    pub deleted: Option<Expression>,
    pub visibility: Visibility,
    pub digest: Digest,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceKind {
    Files { pattern: String },
    Static { pattern: String },
    Stream { event_id: Option<String>, history: Option<String> },
}

#[derive(Debug)]
pub struct ViewPlan {
    pub name: Arc<str>,
    pub entity: Arc<str>,
    pub source: Arc<SourcePlan>,
    pub keys: Vec<ViewKey>,
    pub filter: Option<Expression>,
    pub freshness: Option<Micros>,
    pub kind: ViewPlanKind,
    /// Covers only what changes stored bytes.
    pub storage_digest: Digest,
    pub semantic_digest: Digest,
    /// The plan's: rows of entities that were forgotten are no rows of the view.
    pub forgotten: Arc<ForgottenList>,
    /// The entities that a row of this view is about: the view's own, and those of other views over the same source whose
    /// key columns are among this view's. Who forgets an origin forgets the routes from it.
    pub about: Vec<KeyPart>,
}

/// An entity, and which keys of a view, in the entity's order, are its key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyPart {
    pub entity: Arc<str>,
    pub keys: Vec<usize>,
}

/// One key of the view's entity and the source column that holds it.
#[derive(Debug, Clone)]
pub struct ViewKey {
    pub name: String,
    pub key_type: Type,
    pub column: String,
}

#[derive(Debug)]
pub enum ViewPlanKind {
    AsOf {
        max_age: MaxAge,
        features: Vec<ViewFeature>,
    },
    Windowed {
        aggregates: Vec<ViewAggregate>,
        outputs: Vec<WindowOutput>,
        windows: Vec<Window>,
        levels: Option<Levels>,
    },
}

#[derive(Debug)]
pub struct ViewFeature {
    pub name: String,
    pub feature_type: Type,
    pub expression: Expression,
    pub default: Option<Value>,
}

/// One aggregate function over the view's events, whatever its windows.
#[derive(Debug)]
pub struct ViewAggregate {
    pub name: String,
    pub aggregate: Aggregate,
    /// None counts rows.
    pub of: Option<Expression>,
    pub filter: Option<Expression>,
    /// What tells the parts apart when the aggregate is split.
    pub by: Option<Expression>,
}

impl ViewAggregate {
    /// What is evaluated over the source's rows.
    pub fn expressions(&self) -> impl Iterator<Item = &Expression> {
        self.of.iter().chain(&self.filter).chain(&self.by)
    }
}

/// One feature of a windowed view.
#[derive(Debug)]
pub struct WindowOutput {
    pub name: String,
    /// Index into the view's aggregates.
    pub aggregate: usize,
    pub window: Window,
    pub feature_type: Type,
    pub default: Option<Value>,
}

#[derive(Debug)]
pub struct ServicePlan {
    pub name: Arc<str>,
    /// Columns that a request or a spine must carry, keys first.
    pub columns: Vec<RequestColumn>,
    /// Views that are read, once per alias.
    pub inputs: Vec<ServiceInput>,
    /// Request-time features in an order in which each reads only earlier ones.
    pub transforms: Vec<TransformFeature>,
    /// The features, in the order asked.
    pub outputs: Vec<ServiceOutput>,
    pub semantic_digest: Digest,
}

#[derive(Debug, Clone)]
pub struct RequestColumn {
    pub name: String,
    pub column_type: Type,
    pub nullable: bool,
    /// An entity key: null matches nothing, and is always allowed.
    pub is_key: bool,
    /// `request:field` for request fields.
    pub address: Option<String>,
    /// What is written down of a request holds a keyed hash in its place. No part of a digest.
    pub sensitive: bool,
}

/// One view as read by a service.
#[derive(Debug)]
pub struct ServiceInput {
    pub alias: String,
    pub view: Arc<ViewPlan>,
    /// For each key of the view's entity, the index of its request column.
    pub keys: Vec<usize>,
}

#[derive(Debug)]
pub struct TransformFeature {
    /// `transform:feature`
    pub address: String,
    pub feature_type: Type,
    pub expression: Expression,
    /// What each column of the expression is.
    pub reads: Vec<Slot>,
    pub default: Option<Value>,
}

/// Where a value comes from while features are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// Feature of a view, after its default.
    Feature { input: usize, feature: usize },
    /// Event time of the row that a view answered with.
    EventTime { input: usize },
    /// The time the row is answered at.
    At,
    /// A request column.
    Request(usize),
    /// An earlier transform feature.
    Transform(usize),
}

#[derive(Debug)]
pub struct ServiceOutput {
    /// `view:feature`, `alias:feature`, `transform:feature` or `request:field`.
    pub name: String,
    pub feature_type: Type,
    pub slot: Slot,
    /// As of a [`RequestColumn`].
    pub sensitive: bool,
}

#[derive(Debug)]
pub struct ModelPlan {
    pub name: Arc<str>,
    pub service: Arc<ServicePlan>,
    pub runtime: catalog::Runtime,
    pub inputs: Vec<TensorPlan>,
    pub outputs: Vec<ModelOutput>,
    /// Named expressions over outputs, in order.
    pub post: Vec<PostFeature>,
    pub decision: Option<Expression>,
    /// For each column of the decision, an output (or, past the outputs, a post feature).
    pub decision_reads: Vec<usize>,
    /// What becomes known of a prediction later. No part of a digest.
    pub label: Option<LabelPlan>,
    /// A value per output, when declared as values.
    pub fallback: Option<Vec<f64>>,
    pub fallback_model: Option<String>,
    pub executors: u32,
    pub threads: u32,
    pub devices: Vec<String>,
    pub max_rows: u32,
    pub max_queue_rows: u32,
    pub batching: catalog::BatchingPolicy,
    pub deadline: Option<Micros>,
    /// The most important first; at least one.
    pub tiers: Vec<String>,
    /// How versions of it reach users. No part of a digest.
    pub rollout: RolloutPlan,
    /// Whether answers are given again, and for how long. No part of a digest.
    pub cache: Option<catalog::ResponseCacheSettings>,
    pub semantic_digest: Digest,
}

/// How versions of a model reach users, as declared.
#[derive(Debug, Clone, Default)]
pub struct RolloutPlan {
    pub shadow: Option<catalog::Shadow>,
    pub canary: Option<catalog::Canary>,
    /// How long the champion before is kept loaded for a rollback.
    pub keep_previous: Option<Micros>,
    /// The key of the entity that is randomised; empty without a canary.
    pub unit: Vec<UnitKey>,
}

/// One part of a unit's key.
#[derive(Debug, Clone, PartialEq)]
pub struct UnitKey {
    /// The column of a request that carries it.
    pub name: String,
    pub key_type: Type,
    /// Its place among the service's columns; none where the service takes no such column, and requests may carry it all the
    /// same.
    pub column: Option<usize>,
}

/// What becomes known of a prediction later.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelPlan {
    pub name: String,
    pub label_type: Type,
    /// How long after the prediction at most.
    pub within: Option<Micros>,
}

/// How features become one input tensor of shape [rows, width].
#[derive(Debug, Clone)]
pub struct TensorPlan {
    pub name: String,
    pub dtype: TensorType,
    /// Outputs of the service, in order; a vector feature spreads over its dimensions.
    pub features: Vec<usize>,
    pub width: usize,
    pub missing: catalog::Missing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    Float32,
    Float64,
    Int32,
    Int64,
    Bool,
}

#[derive(Debug, Clone)]
pub struct ModelOutput {
    pub name: String,
    pub dtype: TensorType,
}

#[derive(Debug)]
pub struct PostFeature {
    pub name: String,
    pub feature_type: Type,
    pub expression: Expression,
    /// For each column of the expression, an output (or, past the outputs, an earlier post feature).
    pub reads: Vec<usize>,
}

impl Plan {
    pub fn source(&self, name: &str) -> Option<&Arc<SourcePlan>> {
        self.sources.iter().find(|source| &*source.name == name)
    }
    pub fn view(&self, name: &str) -> Option<&Arc<ViewPlan>> {
        self.views.iter().find(|view| &*view.name == name)
    }
    pub fn service(&self, name: &str) -> Option<&Arc<ServicePlan>> {
        self.services.iter().find(|service| &*service.name == name)
    }
    pub fn model(&self, name: &str) -> Option<&Arc<ModelPlan>> {
        self.models.iter().find(|model| &*model.name == name)
    }
    /// From now on rows of these entities are absent, whoever reads by this plan.
    pub fn forget(&self, forgotten: &Arc<Forgotten>) {
        self.forgotten.set(forgotten);
    }
}

impl SourcePlan {
    pub fn is_stream(&self) -> bool {
        matches!(self.kind, SourceKind::Stream { .. })
    }
    pub fn is_static(&self) -> bool {
        matches!(self.kind, SourceKind::Static { .. })
    }
    pub fn column_type(&self, name: &str) -> Option<&Type> {
        self.schema.iter().find(|(column, _)| column == name).map(|(_, column_type)| column_type)
    }
}

impl ViewPlan {
    /// Names, types and defaults of the features, in order.
    pub fn features(&self) -> Vec<(&str, &Type, Option<&Value>)> {
        match &self.kind {
            ViewPlanKind::AsOf { features, .. } => features
                .iter()
                .map(|feature| (feature.name.as_str(), &feature.feature_type, feature.default.as_ref()))
                .collect(),
            ViewPlanKind::Windowed { outputs, .. } => outputs
                .iter()
                .map(|output| (output.name.as_str(), &output.feature_type, output.default.as_ref()))
                .collect(),
        }
    }

    /// Type and default of one feature.
    pub fn feature(&self, index: usize) -> (&Type, Option<&Value>) {
        match &self.kind {
            ViewPlanKind::AsOf { features, .. } => (&features[index].feature_type, features[index].default.as_ref()),
            ViewPlanKind::Windowed { outputs, .. } => (&outputs[index].feature_type, outputs[index].default.as_ref()),
        }
    }

    /// Types of the columns of [`ViewRows`]: what is stored, or what aggregates take.
    pub fn row_types(&self) -> Vec<Type> {
        match &self.kind {
            ViewPlanKind::AsOf { features, .. } => {
                features.iter().map(|feature| feature.feature_type.clone()).collect()
            }
            ViewPlanKind::Windowed { aggregates, .. } => {
                aggregates.iter().map(|aggregate| aggregate.aggregate.input().cloned().unwrap_or(Type::Bool)).collect()
            }
        }
    }

    pub fn is_windowed(&self) -> bool {
        matches!(self.kind, ViewPlanKind::Windowed { .. })
    }

    /// A view with exact tails has no tiles and answers offline only.
    pub fn is_offline_only(&self) -> bool {
        matches!(&self.kind, ViewPlanKind::Windowed { levels: None, .. })
    }

    /// The source columns that rows of this view are made of, in the source's order.
    pub fn source_columns(&self) -> Vec<String> {
        self.in_source_order(|name| self.decides(name) || self.says(name))
    }

    /// Those of [`ViewPlan::source_columns`] that decide which rows there are and when: keys, times, filter, tombstones.
    pub fn deciding_columns(&self) -> Vec<String> {
        self.in_source_order(|name| self.decides(name))
    }

    /// Those of [`ViewPlan::source_columns`] that values are computed from: features, or inputs of aggregates.
    pub fn value_columns(&self) -> Vec<String> {
        self.in_source_order(|name| self.says(name))
    }

    fn decides(&self, name: &str) -> bool {
        let reads = |expression: &Expression| expression.columns().iter().any(|column| column.name == name);
        self.keys.iter().any(|key| key.column == name)
            || self.filter.iter().chain(&self.source.deleted).any(reads)
            || self.source.event_time.as_deref() == Some(name)
            || self.source.created_time.as_deref() == Some(name)
    }

    fn says(&self, name: &str) -> bool {
        let reads = |expression: &Expression| expression.columns().iter().any(|column| column.name == name);
        match &self.kind {
            ViewPlanKind::AsOf { features, .. } => features.iter().any(|feature| reads(&feature.expression)),
            ViewPlanKind::Windowed { aggregates, .. } => {
                aggregates.iter().flat_map(ViewAggregate::expressions).any(reads)
            }
        }
    }

    fn in_source_order(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        self.source.schema.iter().map(|(name, _)| name).filter(|name| wanted(name)).cloned().collect()
    }
}

impl ServicePlan {
    pub fn output(&self, name: &str) -> Option<usize> {
        self.outputs.iter().position(|output| output.name == name)
    }
}

impl TensorType {
    pub fn from_type(value_type: &Type) -> Option<TensorType> {
        Some(match value_type {
            Type::Float32 => TensorType::Float32,
            Type::Float64 => TensorType::Float64,
            Type::Int32 => TensorType::Int32,
            Type::Int64 => TensorType::Int64,
            Type::Bool => TensorType::Bool,
            _ => return None,
        })
    }

    pub fn value_type(self) -> Type {
        match self {
            TensorType::Float32 => Type::Float32,
            TensorType::Float64 => Type::Float64,
            TensorType::Int32 => Type::Int32,
            TensorType::Int64 => Type::Int64,
            TensorType::Bool => Type::Bool,
        }
    }
}

/// Vocabularies by name, as expressions see them.
pub(crate) type Vocabularies = BTreeMap<String, Arc<[String]>>;

#[cfg(test)]
mod tests;
