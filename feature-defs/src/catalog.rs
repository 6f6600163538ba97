//! The catalog: what the definition files say, checked, with the place each thing was said.
//!
//! Everything a user may write is a type here. Text becomes these types in `parse.rs`; names are resolved and rules across
//! objects checked in `check.rs`; expressions are still text and become typed in `plan.rs`, which needs source schemas.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::diagnose::{Span, Spanned};
use crate::value::Type;

/// All definitions of a project. Lists are in file order (files sorted by path), names are unique per kind.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    pub project: String,
    pub entities: Vec<Entity>,
    pub sources: Vec<Source>,
    pub feature_views: Vec<FeatureView>,
    pub requests: Vec<Request>,
    pub transforms: Vec<Transform>,
    pub vocabularies: Vec<Vocabulary>,
    pub feature_services: Vec<FeatureService>,
    pub models: Vec<Model>,
}

/// What every object carries. None of it changes a digest.
#[derive(Debug, Clone, Default)]
pub struct About {
    pub description: Option<String>,
    pub owner: Option<String>,
    pub tags: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
pub struct Entity {
    pub name: Spanned<String>,
    pub about: About,
    /// May be empty: a view of such an entity has one row for everybody.
    pub keys: Vec<Field>,
}

/// A named, typed column: an entity key, a request field, a column of a stream.
#[derive(Debug, Clone)]
pub struct Field {
    pub name: Spanned<String>,
    pub field_type: Spanned<Type>,
    pub nullable: bool,
    pub sensitive: bool,
}

#[derive(Debug, Clone)]
pub struct Source {
    pub name: Spanned<String>,
    pub about: About,
    pub kind: SourceKind,
    /// None only for static sources.
    pub event_time: Option<Spanned<String>>,
    /// The column that says when a row became known. Excludes `delay`.
    pub created_time: Option<Spanned<String>>,
    /// A row becomes known this long after its event time.
    pub delay: Duration,
    /// Rows of file sources become visible online on this grid.
    pub every: Option<Duration>,
    /// Boolean expression over the source's columns; true makes the row a tombstone.
    pub deleted: Option<Spanned<String>>,
    pub visibility: Visibility,
    /// Declared columns: required for streams, optional for files (then checked against them).
    pub schema: Vec<Field>,
}

#[derive(Debug, Clone)]
pub enum SourceKind {
    /// Files that somebody else owns. `static: true` means no event time: every row is always known.
    Files { pattern: Spanned<String>, is_static: bool },
    /// A stream that Coeval owns: pushed, logged, kept as history.
    Stream {
        /// Column by which redelivery is recognised.
        event_id: Option<Spanned<String>>,
        /// Files holding what happened before the stream began.
        history: Option<Spanned<String>>,
    },
}

/// Which condition hides rows from a training row besides event time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Visibility {
    /// Known at the row's time: the default.
    #[default]
    Known,
    /// No condition beside event time.
    EventTime,
    /// What had actually arrived.
    Ingested,
}

#[derive(Debug, Clone)]
pub struct FeatureView {
    pub name: Spanned<String>,
    pub about: About,
    pub entity: Spanned<String>,
    /// Entity key -> source column, where they differ.
    pub keys: Vec<(Spanned<String>, Spanned<String>)>,
    pub source: Spanned<String>,
    pub filter: Option<Spanned<String>>,
    pub freshness: Option<Duration>,
    pub kind: ViewKind,
}

#[derive(Debug, Clone)]
pub enum ViewKind {
    /// The latest row as of t.
    AsOf {
        ttl: Option<Duration>,
        /// A row older than ttl + keep is NOT_FOUND. Default: the larger of ttl and one day.
        keep: Option<Duration>,
        features: Vec<Feature>,
    },
    /// Aggregates over windows of events.
    Windowed {
        windows: Vec<Spanned<WindowLength>>,
        hop: Option<Spanned<Hop>>,
        head: Head,
        aggregates: Vec<AggregateDef>,
    },
}

#[derive(Debug, Clone)]
pub struct Feature {
    pub name: Spanned<String>,
    pub about: About,
    pub feature_type: Option<Spanned<Type>>,
    /// Absent: the source column of the same name.
    pub expr: Option<Spanned<String>>,
    pub default: Option<Spanned<Literal>>,
    pub sensitive: bool,
}

#[derive(Debug, Clone)]
pub struct AggregateDef {
    pub name: Spanned<String>,
    pub about: About,
    pub function: Spanned<String>,
    pub of: Option<Spanned<String>>,
    pub filter: Option<Spanned<String>>,
    /// Overrides the view's windows.
    pub windows: Option<Vec<Spanned<WindowLength>>>,
    pub default: Option<Spanned<Literal>>,
    pub sensitive: bool,
    pub parameters: AggregateParameters,
}

/// How long a window is. The text is kept because it names features: `24h` makes `departures_24h`, `1d` makes
/// `departures_1d`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowLength {
    pub duration: Duration,
    pub text: String,
}

/// Parameters of particular aggregate functions, and `by`; which apply is checked with the function.
#[derive(Debug, Clone, Default)]
pub struct AggregateParameters {
    pub q: Option<Spanned<f64>>,
    pub clamp: Option<Spanned<(f64, f64)>>,
    pub n: Option<Spanned<u32>>,
    pub k: Option<Spanned<u32>>,
    pub edges: Option<Spanned<Vec<f64>>>,
    pub values: Option<Spanned<Vec<Literal>>>,
    pub by: Option<By>,
}

/// An aggregate for each part of the events: `{of: carrier, values: [AA, UA]}`.
#[derive(Debug, Clone)]
pub struct By {
    /// Where to point when something is missing.
    pub span: Span,
    /// What tells the parts apart. Empty where it was missing and reported.
    pub of: Spanned<String>,
    pub edges: Option<Spanned<Vec<f64>>>,
    pub values: Option<Spanned<Vec<Literal>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    Every(Duration),
    /// Exact tails, offline only.
    None,
}

/// Whether an event at exactly t is inside a window that ends at t.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Head {
    #[default]
    Exclusive,
    Inclusive,
}

/// A constant written in YAML, before it meets the type it must have.
#[derive(Debug, Clone, PartialEq)]
pub enum Literal {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    String(String),
    List(Vec<Literal>),
    Map(Vec<(String, Literal)>),
}

#[derive(Debug, Clone)]
pub struct Request {
    pub name: Spanned<String>,
    pub about: About,
    pub fields: Vec<Field>,
}

#[derive(Debug, Clone)]
pub struct Transform {
    pub name: Spanned<String>,
    pub about: About,
    pub inputs: Vec<Input>,
    pub features: Vec<Feature>,
}

/// One input of a transform or line of a service.
#[derive(Debug, Clone)]
pub enum Input {
    /// `{view: v, as: alias, keys: {entity key: request column}, features: [a, b]}`
    View(ViewInput),
    /// The name of a request, a view (with its entity's own key names) or another transform; in services also with
    /// `:feature` or `:*`.
    Name(Spanned<String>),
}

#[derive(Debug, Clone)]
pub struct ViewInput {
    pub view: Spanned<String>,
    pub alias: Option<Spanned<String>>,
    /// Entity key -> column of the request or spine, where they differ.
    pub keys: Vec<(Spanned<String>, Spanned<String>)>,
    /// Absent: all features of the view.
    pub features: Option<Vec<Spanned<String>>>,
}

#[derive(Debug, Clone)]
pub struct Vocabulary {
    pub name: Spanned<String>,
    pub about: About,
    pub values: Vec<Spanned<String>>,
}

#[derive(Debug, Clone)]
pub struct FeatureService {
    pub name: Spanned<String>,
    pub about: About,
    pub features: Vec<Input>,
}

#[derive(Debug, Clone)]
pub struct Model {
    pub name: Spanned<String>,
    pub about: About,
    pub features: Spanned<String>,
    pub runtime: Runtime,
    pub inputs: Vec<ModelInput>,
    pub outputs: Vec<ModelOutput>,
    /// Named expressions over the outputs: calibration, thresholds.
    pub post: Vec<Feature>,
    pub decision: Option<Spanned<String>>,
    pub label: Option<Label>,
    pub placement: Placement,
    pub slo: Slo,
    pub batching: Batching,
    pub fallback: Option<Fallback>,
    pub shadow: Option<Shadow>,
    pub canary: Option<Canary>,
    /// How long the champion before stays loaded for a rollback.
    pub keep_previous: Option<Duration>,
    /// None: every row is run.
    pub cache: Option<ResponseCacheSettings>,
}

/// Answers that are given again for the same inputs, in the gateway's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResponseCacheSettings {
    /// Of every version that is loaded.
    pub memory_bytes: u64,
    /// An answer is given again for so long at most.
    pub ttl: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    TorchScript,
    Pt2,
}

#[derive(Debug, Clone)]
pub struct ModelInput {
    pub name: Spanned<String>,
    pub dtype: Spanned<Type>,
    /// `*`, `view:*`, `view:feature`, each with an optional leading `!`; applied in order.
    pub features: Vec<Spanned<String>>,
    pub missing: Missing,
}

/// What becomes of a null when features become tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Missing {
    /// The row fails.
    Refuse,
    Nan,
    Value(f64),
}

#[derive(Debug, Clone)]
pub struct ModelOutput {
    pub name: Spanned<String>,
    pub dtype: Spanned<Type>,
}

#[derive(Debug, Clone)]
pub struct Label {
    pub name: Spanned<String>,
    pub label_type: Spanned<Type>,
    pub within: Option<Duration>,
}

#[derive(Debug, Clone)]
pub struct Placement {
    pub devices: Vec<Spanned<String>>,
    pub executors: u32,
    pub threads: u32,
    pub max_shape: BTreeMap<String, Vec<u64>>,
}

#[derive(Debug, Clone)]
pub struct Slo {
    pub deadline: Option<Duration>,
    pub tiers: Vec<Spanned<String>>,
}

#[derive(Debug, Clone)]
pub struct Batching {
    pub policy: BatchingPolicy,
    pub max_rows: u32,
    pub max_queue_rows: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchingPolicy {
    Adaptive,
    Window(Duration),
}

#[derive(Debug, Clone)]
pub enum Fallback {
    /// Values of the outputs.
    Values(Vec<(Spanned<String>, f64)>),
    Model(Spanned<String>),
}

#[derive(Debug, Clone)]
pub struct Shadow {
    pub min_rows: u64,
    pub max_skew_rows: u64,
    /// `hold` or `ignore`.
    pub drift: Spanned<String>,
    pub max_flip_rate: Option<f64>,
    pub max_forward_ratio: Option<f64>,
    pub ends_after: Option<Duration>,
}

#[derive(Debug, Clone)]
pub struct Canary {
    /// The entity that is randomised.
    pub unit: Spanned<String>,
    /// What a request without the unit gets: `champion`.
    pub without_unit: Spanned<String>,
    /// Ascending shares of traffic, each in (0, 1].
    pub steps: Vec<f64>,
    pub bake: Option<Duration>,
    pub min_units: u64,
    pub ends_after: Option<Duration>,
    /// How long the window of a unit is open: its rows within are averaged.
    pub window: Option<Duration>,
    /// The first is the primary metric, which decides.
    pub success: Vec<Success>,
    pub guardrails: Vec<Guardrail>,
    /// Whether a promotion waits for a whole number of weeks.
    pub whole_weeks: bool,
    /// Times in which nothing is advanced or promoted, in microseconds: from, until.
    pub blackouts: Vec<(i64, i64)>,
    /// The chance that anything is stopped or called met falsely, in each of shadow and canary.
    pub alpha: Option<f64>,
}

/// A metric that is compared between the versions, once labels have come: `log_loss`, or a mapping.
#[derive(Debug, Clone)]
pub struct Success {
    pub metric: Spanned<String>,
    /// What 0 and 1 of the counted scale stand for; values beyond are taken for the ends.
    pub range: Option<(f64, f64)>,
    /// About where values lie.
    pub centre: Option<f64>,
    pub lower_is_better: Option<bool>,
    /// Enough is that the challenger is not worse by so much.
    pub not_worse_by: Option<f64>,
}

/// `error_rate < 0.5%`, `p99 < 60ms`: a metric, a comparison and a bound in the metric's own unit (a share, or seconds).
#[derive(Debug, Clone)]
pub struct Guardrail {
    pub text: Spanned<String>,
    pub metric: String,
    pub comparison: Comparison,
    pub bound: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// `coeval.yaml`.
#[derive(Debug, Clone)]
pub struct Settings {
    pub project: Spanned<String>,
    /// An object-store URL: a folder, s3://, gs://, az://.
    pub store: Spanned<String>,
    pub online: Spanned<OnlineUrl>,
    pub log: LogKind,
    pub offline: OfflineSettings,
    pub serve: ServeSettings,
    /// None: nothing of what is served is written down.
    pub serving_log: Option<ServingLogSettings>,
    /// None: what is served is audited only when somebody asks.
    pub audit: Option<AuditSettings>,
    pub guardrails: Vec<Guardrail>,
}

/// How the server audits what it served.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AuditSettings {
    /// The length of the windows, one after the other.
    pub every: Duration,
    /// The share of values that may differ before the server says that something is wrong.
    pub max_bug_rate: f64,
}

impl Default for AuditSettings {
    fn default() -> AuditSettings {
        AuditSettings { every: Duration::from_secs(3_600), max_bug_rate: 0.0 }
    }
}

/// What of the served rows is written down, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub struct ServingLogSettings {
    /// Share of the entity-key tuples of which everything is logged; which ones changes daily.
    pub sample: f64,
    /// Share of all other rows.
    pub uniform: f64,
    /// Rows with a fallback or an unavailable feature that are logged beside the samples, per second and service.
    pub fallbacks_per_second: u32,
    /// Rows wait at most so long in memory: what a kill can lose.
    pub flush: Duration,
    pub retention: Duration,
    /// Of this machine's disk, while the object store is away.
    pub spool_bytes: u64,
    /// What values of sensitive columns are hashed with. None: a random one, kept on the object store.
    pub key: Option<String>,
}

impl Default for ServingLogSettings {
    fn default() -> ServingLogSettings {
        ServingLogSettings {
            sample: 0.01,
            uniform: 0.001,
            fallbacks_per_second: 10,
            flush: Duration::from_secs(30),
            retention: Duration::from_secs(30 * 24 * 3600),
            spool_bytes: 1 << 30,
            key: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OnlineUrl {
    Embedded,
    /// `redis://` or `rediss://`, whole.
    Redis(String),
    /// `redis+cluster://` or `rediss+cluster://`, whole.
    RedisCluster(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogKind {
    Disk,
    Redis,
}

#[derive(Debug, Clone)]
pub struct OfflineSettings {
    /// `local` is the one engine so far.
    pub engine: String,
    pub memory_bytes: u64,
    pub spill: Option<String>,
}

#[derive(Debug, Clone)]
pub struct ServeSettings {
    pub grpc: Spanned<String>,
    pub http: Spanned<String>,
    pub request_time: RequestTime,
    /// Listening beyond loopback without authentication has to be asked for in words.
    pub beyond_loopback: bool,
    /// None: every request reads the online store.
    pub cache: Option<CacheSettings>,
    /// How often every model that is served is asked for rows whose outputs are known.
    pub golden_checks: Duration,
}

/// A cache of what the online store answered, in the gateway's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSettings {
    /// An answer is at most so old.
    pub staleness: Duration,
    pub memory_bytes: u64,
}

/// Whether a request may say at what time it wants to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestTime {
    Refused,
    Allowed,
}

/// The texts the spans point into.
#[derive(Debug, Clone, Default)]
pub struct Files {
    pub files: Vec<Arc<SourceFile>>,
}

#[derive(Debug)]
pub struct SourceFile {
    /// As shown to the user, relative to the project folder.
    pub path: String,
    pub text: String,
}

impl Catalog {
    pub fn entity(&self, name: &str) -> Option<&Entity> {
        self.entities.iter().find(|entity| *entity.name == name)
    }
    pub fn source(&self, name: &str) -> Option<&Source> {
        self.sources.iter().find(|source| *source.name == name)
    }
    pub fn view(&self, name: &str) -> Option<&FeatureView> {
        self.feature_views.iter().find(|view| *view.name == name)
    }
    pub fn request(&self, name: &str) -> Option<&Request> {
        self.requests.iter().find(|request| *request.name == name)
    }
    pub fn transform(&self, name: &str) -> Option<&Transform> {
        self.transforms.iter().find(|transform| *transform.name == name)
    }
    pub fn vocabulary(&self, name: &str) -> Option<&Vocabulary> {
        self.vocabularies.iter().find(|vocabulary| *vocabulary.name == name)
    }
    pub fn service(&self, name: &str) -> Option<&FeatureService> {
        self.feature_services.iter().find(|service| *service.name == name)
    }
    pub fn model(&self, name: &str) -> Option<&Model> {
        self.models.iter().find(|model| *model.name == name)
    }
}

impl FeatureView {
    /// Whether the view can only be computed offline, because its windows have exact tails.
    pub fn is_offline_only(&self) -> bool {
        matches!(&self.kind, ViewKind::Windowed { hop: Some(hop), .. } if hop.value == Hop::None)
    }

    /// The names of the view's features, in order. A windowed aggregate yields one per window.
    pub fn feature_names(&self) -> Vec<String> {
        match &self.kind {
            ViewKind::AsOf { features, .. } => features.iter().map(|feature| feature.name.value.clone()).collect(),
            ViewKind::Windowed { windows, aggregates, .. } => aggregates
                .iter()
                .flat_map(|aggregate| {
                    aggregate
                        .windows_in(windows)
                        .iter()
                        .map(|window| aggregate.feature_name(window))
                        .collect::<Vec<_>>()
                })
                .collect(),
        }
    }
}

impl AggregateDef {
    /// Its own windows, else those of its view.
    pub fn windows_in<'a>(&'a self, view_windows: &'a [Spanned<WindowLength>]) -> &'a [Spanned<WindowLength>] {
        self.windows.as_deref().unwrap_or(view_windows)
    }

    /// `departures_1h`.
    pub fn feature_name(&self, window: &WindowLength) -> String {
        format!("{}_{}", *self.name, window.text)
    }
}

impl ViewInput {
    /// By what name the view's features are addressed: its alias, else its own.
    pub fn address(&self) -> &Spanned<String> {
        self.alias.as_ref().unwrap_or(&self.view)
    }
}

impl Input {
    /// By what name expressions and services address this input.
    pub fn address(&self) -> &str {
        match self {
            Input::View(view) => view.address(),
            Input::Name(name) => name.split_once(':').map_or(name.as_str(), |(object, _)| object),
        }
    }

    pub fn span(&self) -> Span {
        match self {
            Input::View(view) => view.view.span,
            Input::Name(name) => name.span,
        }
    }
}

impl Files {
    /// Sorts by path, so that everything derived from the files is the same on every machine.
    pub fn new(mut files: Vec<SourceFile>) -> Files {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Files { files: files.into_iter().map(Arc::new).collect() }
    }

    pub fn file(&self, span: Span) -> &SourceFile {
        &self.files[span.file as usize]
    }
}
