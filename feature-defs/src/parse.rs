//! Files to catalog: every construct that a user may write, with all that is wrong with how it is written.
//!
//! Parsing looks at one object at a time; names are resolved and objects compared in `check.rs`. All mistakes are
//! collected. An object that has a name is kept even when something in it is wrong, so that references to it do not
//! look broken too; what could not be read stands as an empty name, which the check passes over.

mod reader;
mod settings;
mod units;

use std::collections::BTreeMap;
use std::time::Duration;

use self::reader::{ABOUT, Object, Reader};
pub use self::settings::parse_settings;
use crate::aggregate::KEPT_MAX;
use crate::catalog::*;
use crate::diagnose::{Diagnostic, Span, Spanned};
use crate::value::Type;
use crate::yaml::{self, Kind, Node};

/// At the root of every project.
pub const SETTINGS_FILE: &str = "coeval.yaml";

/// Where the settings of one environment are.
pub fn overlay_path(environment: &str) -> String {
    format!("coeval.{environment}.yaml")
}

/// Whether a file, by its path inside the project, holds settings rather than definitions.
pub fn is_settings_path(path: &str) -> bool {
    path == SETTINGS_FILE || (path.starts_with("coeval.") && path.ends_with(".yaml") && !path.contains('/'))
}

/// The sections of a definition file.
const SECTIONS: [&str; 8] =
    ["entities", "sources", "feature_views", "requests", "transforms", "vocabularies", "feature_services", "models"];

/// Reads every definition file. Settings files among them are passed over.
pub fn parse_definitions(project: &str, files: &Files) -> (Catalog, Vec<Diagnostic>) {
    let mut reader = Reader { files, diagnostics: Vec::new() };
    let mut catalog = Catalog { project: project.to_string(), ..Catalog::default() };
    for (index, file) in files.files.iter().enumerate().filter(|(_, file)| !is_settings_path(&file.path)) {
        let (node, diagnostics) = yaml::parse(index as u32, &file.text);
        reader.diagnostics.extend(diagnostics);
        if let Some(node) = node {
            reader.definition_file(&node, &mut catalog);
        }
    }
    (catalog, reader.diagnostics)
}

/// The keys of an object: its own and those that every object takes.
macro_rules! keys {
    ($($key:literal),*) => { &[$($key,)* ABOUT[0], ABOUT[1], ABOUT[2]] };
}

const FEATURE_KEYS: &[&str] = keys!["name", "type", "expr", "default", "sensitive"];
const TIERS_DEFAULT: [&str; 2] = ["interactive", "batch"];
const MAX_ROWS_DEFAULT: i64 = 256;
/// The longest window: far beyond what anybody waits for a prediction.
const WINDOW_MAX: Duration = Duration::from_secs(10);
const MAX_QUEUE_ROWS_DEFAULT: i64 = 4096;
const RESPONSE_CACHE_DEFAULT: u64 = 64 << 20;
const RESPONSE_CACHE_MIN: u64 = 64 << 10;
const RESPONSE_TTL_DEFAULT: Duration = Duration::from_secs(300);
const CANARY_MIN_UNITS_DEFAULT: i64 = 100;
/// Numbers of rows, units and elements beyond this are typing errors.
const COUNT_MAX: i64 = 1 << 40;

impl Reader<'_> {
    fn definition_file(&mut self, root: &Node, catalog: &mut Catalog) {
        let entries = match &root.kind {
            Kind::Null => return,
            Kind::Mapping(entries) => entries,
            _ => {
                let _: Option<()> = self.mismatch(root, "a mapping with sections such as `feature_views`");
                return;
            }
        };
        for (section, node) in entries {
            match section.as_str() {
                "entities" => self.section(node, &mut catalog.entities, Self::entity),
                "sources" => self.section(node, &mut catalog.sources, Self::source),
                "feature_views" => self.section(node, &mut catalog.feature_views, Self::feature_view),
                "requests" => self.section(node, &mut catalog.requests, Self::request),
                "transforms" => self.section(node, &mut catalog.transforms, Self::transform),
                "vocabularies" => self.section(node, &mut catalog.vocabularies, Self::vocabulary),
                "feature_services" => self.section(node, &mut catalog.feature_services, Self::feature_service),
                "models" => self.section(node, &mut catalog.models, Self::model),
                other => {
                    let shown = crate::diagnose::shown(other);
                    let diagnostic = Diagnostic::error(format!("unknown section `{shown}`"), section.span);
                    self.report(if settings::KEYS.contains(&other) {
                        diagnostic.help(format!("settings belong in `{SETTINGS_FILE}`"))
                    } else {
                        diagnostic.nearest(other, SECTIONS)
                    });
                }
            }
        }
    }

    /// A section with nothing in it yet is fine.
    fn section<T>(&mut self, node: &Node, into: &mut Vec<T>, read: fn(&mut Self, &Node) -> Option<T>) {
        if node.kind != Kind::Null {
            into.extend(self.list(node, read).unwrap_or_default());
        }
    }

    fn entity(&mut self, node: &Node) -> Option<Entity> {
        let object = self.object(node, "entity", keys!["name", "keys"])?;
        let name = self.required(&object, "name", Self::string)?;
        let keys = self.required(&object, "keys", |reader, node| {
            reader.list(node, |reader, node| reader.field(node, "entity key", &["name", "type", "sensitive"]))
        });
        Some(Entity { name, about: self.about(&object), keys: keys.unwrap_or_default() })
    }

    fn columns(&mut self, node: &Node, what: &str) -> Option<Vec<Field>> {
        self.list(node, |reader, node| reader.field(node, what, &["name", "type", "nullable", "sensitive"]))
    }

    fn source(&mut self, node: &Node) -> Option<Source> {
        let object = self.object(
            node,
            "source",
            keys![
                "name",
                "files",
                "stream",
                "static",
                "event_time",
                "created_time",
                "delay",
                "every",
                "deleted",
                "visibility",
                "schema",
                "event_id",
                "history"
            ],
        )?;
        let name = self.required(&object, "name", Self::string)?;
        let is_static = self.optional(&object, "static", Self::bool).unwrap_or(false);
        let is_stream = object.get("stream").is_some();
        if self.optional(&object, "stream", Self::bool) == Some(false) {
            let span = object.key_span("stream").unwrap_or(object.span);
            self.report(
                Diagnostic::error(format!("{} says `stream: false`", object.what), span)
                    .help("leave it out and name its `files`"),
            );
        }
        let event_id = self.optional(&object, "event_id", Self::string);
        let history = self.optional(&object, "history", Self::string);
        let files = self.optional(&object, "files", Self::string);
        let kind = match (object.get("files").is_some(), is_stream) {
            (true, true) => {
                let span = object.key_span("stream").unwrap_or(object.span);
                self.report(
                    Diagnostic::error(format!("{} has both `files` and `stream`", object.what), span)
                        .help("files from before the stream began go under `history`"),
                );
                SourceKind::Stream { event_id, history }
            }
            (false, true) => SourceKind::Stream { event_id, history },
            (has_files, false) => {
                if !has_files {
                    let diagnostic =
                        Diagnostic::error(format!("{} has neither `files` nor `stream`", object.what), object.span);
                    self.report(diagnostic.help("write `files: data/*.parquet`, or `stream: true`"));
                }
                self.excluded(&object, &["event_id", "history"], "goes with `stream: true`");
                let pattern = files.unwrap_or(Spanned::new(String::new(), object.span));
                SourceKind::Files { pattern, is_static }
            }
        };
        if is_stream {
            self.excluded(&object, &["static"], "goes with `files`; a stream has times");
            self.excluded(&object, &["every"], "goes with `files`; events of a stream are visible as they arrive");
            if object.get("schema").is_none() {
                let diagnostic =
                    Diagnostic::error(format!("{} is a stream and has no `schema`", object.what), object.span);
                self.report(diagnostic.help("declare its columns: `schema: [{name: airport, type: string}]`"));
            }
        } else if is_static {
            let excluded = ["event_time", "created_time", "delay", "every", "visibility"];
            self.excluded(&object, &excluded, "has no meaning for a static source, whose rows are always known");
        }
        let event_time = self.optional(&object, "event_time", Self::string);
        if object.get("event_time").is_none() && (is_stream || !is_static) {
            let diagnostic = Diagnostic::error(format!("{} has no `event_time`", object.what), object.span);
            let help = if is_stream {
                "name the column that says when an event happened"
            } else {
                "name the column, or write `static: true`"
            };
            self.report(diagnostic.help(help));
        }
        if object.get("delay").is_some()
            && let Some(span) = object.key_span("created_time")
        {
            self.report(
                Diagnostic::error(format!("{} has both `delay` and `created_time`", object.what), span)
                    .help("both say when a row becomes known: keep one"),
            );
        }
        let visibility = self.optional(&object, "visibility", |reader, node| {
            let choices = [
                ("known", Visibility::Known),
                ("event_time", Visibility::EventTime),
                ("ingested", Visibility::Ingested),
            ];
            reader.one_of(node, &choices)
        });
        Some(Source {
            name,
            about: self.about(&object),
            kind,
            event_time: event_time.filter(|_| is_stream || !is_static),
            created_time: self.optional(&object, "created_time", Self::string),
            delay: self.optional(&object, "delay", Self::duration_or_zero).unwrap_or(Duration::ZERO),
            every: self.optional(&object, "every", Self::duration),
            deleted: self.optional(&object, "deleted", Self::string),
            visibility: visibility.map_or(Visibility::Known, |choice| choice.value),
            schema: self.optional(&object, "schema", |reader, node| reader.columns(node, "column")).unwrap_or_default(),
        })
    }

    /// Reports those of `keys` that are there but make no sense beside the object's other keys.
    fn excluded(&mut self, object: &Object<'_>, keys: &[&str], reason: &str) {
        for key in keys {
            if let Some(span) = object.key_span(key) {
                self.report(Diagnostic::error(format!("`{key}` of {} {reason}", object.what), span));
            }
        }
    }

    fn feature_view(&mut self, node: &Node) -> Option<FeatureView> {
        let object = self.object(
            node,
            "feature view",
            keys![
                "name",
                "entity",
                "keys",
                "source",
                "where",
                "ttl",
                "keep",
                "freshness",
                "features",
                "windows",
                "hop",
                "head",
                "aggregates"
            ],
        )?;
        let name = self.required(&object, "name", Self::string)?;
        let kind = match (object.get("features"), object.get("aggregates")) {
            (_, Some(aggregates)) => {
                if let Some(span) = object.key_span("features") {
                    self.report(
                        Diagnostic::error(format!("{} has both `features` and `aggregates`", object.what), span)
                            .help("split it into two views"),
                    );
                }
                self.excluded(&object, &["ttl", "keep"], "goes with `features`; aggregates have `windows`");
                let windows = self.optional(&object, "windows", |reader, node| reader.list(node, Self::window));
                let aggregates = self.list(aggregates, Self::aggregate).unwrap_or_default();
                self.refuse_empty(&object, "aggregates");
                self.refuse_empty(&object, "windows");
                if object.get("windows").is_none()
                    && let Some(aggregate) = aggregates.iter().find(|aggregate| aggregate.windows.is_none())
                {
                    let message = format!("{} has no `windows`", object.what);
                    let label = format!("`{}` has none of its own either", *aggregate.name);
                    let diagnostic = Diagnostic::error(message, object.span).label(label);
                    self.report(diagnostic.help("write `windows: [1h, 24h]`"));
                }
                let hop = self.optional(&object, "hop", |reader, node| match &node.kind {
                    Kind::String(text) if text == "none" => Some(Spanned::new(Hop::None, node.span)),
                    _ => Some(Spanned::new(Hop::Every(reader.duration(node)?), node.span)),
                });
                let head = self.optional(&object, "head", |reader, node| {
                    reader.one_of(node, &[("exclusive", Head::Exclusive), ("inclusive", Head::Inclusive)])
                });
                ViewKind::Windowed {
                    windows: windows.unwrap_or_default(),
                    hop,
                    head: head.map_or(Head::Exclusive, |choice| choice.value),
                    aggregates,
                }
            }
            (features, None) => {
                if features.is_none() {
                    self.report(
                        Diagnostic::error(
                            format!("{} has neither `features` nor `aggregates`", object.what),
                            object.span,
                        )
                        .help("`features` reads the latest row, `aggregates` summarises windows of events"),
                    );
                }
                self.refuse_empty(&object, "features");
                self.excluded(&object, &["windows", "hop", "head"], "goes with `aggregates`");
                ViewKind::AsOf {
                    ttl: self.optional(&object, "ttl", Self::duration),
                    keep: self.optional(&object, "keep", Self::duration_or_zero),
                    features: features
                        .and_then(|node| self.list(node, |reader, node| reader.feature(node, "feature", FEATURE_KEYS)))
                        .unwrap_or_default(),
                }
            }
        };
        Some(FeatureView {
            name,
            about: self.about(&object),
            entity: self.name(&object, "entity"),
            keys: self.optional(&object, "keys", Self::renames).unwrap_or_default(),
            source: self.name(&object, "source"),
            filter: self.optional(&object, "where", Self::string),
            freshness: self.optional(&object, "freshness", Self::duration),
            kind,
        })
    }

    fn refuse_empty(&mut self, object: &Object<'_>, key: &str) {
        if let Some(Node { kind: Kind::Sequence(items), span }) = object.get(key)
            && items.is_empty()
        {
            self.report(Diagnostic::error(format!("`{key}` of {} is empty", object.what), *span));
        }
    }

    fn feature(&mut self, node: &Node, what: &str, keys: &[&str]) -> Option<Feature> {
        let object = self.object(node, what, keys)?;
        Some(Feature {
            name: self.required(&object, "name", Self::string)?,
            about: self.about(&object),
            feature_type: self.optional(&object, "type", Self::field_type),
            expr: self.optional(&object, "expr", Self::string),
            default: self.optional(&object, "default", Self::literal),
            sensitive: self.optional(&object, "sensitive", Self::bool).unwrap_or(false),
        })
    }

    /// A feature with nothing but an expression to come from.
    fn computed(&mut self, node: &Node, what: &str, keys: &[&str]) -> Option<Feature> {
        let feature = self.feature(node, what, keys)?;
        if node.get("expr").is_none() {
            let diagnostic = Diagnostic::error(format!("{what} `{}` has no `expr`", *feature.name), feature.name.span);
            self.report(diagnostic.help("there is no column that it could be read from"));
        }
        Some(feature)
    }

    fn aggregate(&mut self, node: &Node) -> Option<AggregateDef> {
        let object = self.object(
            node,
            "aggregate",
            keys![
                "name",
                "function",
                "of",
                "where",
                "windows",
                "default",
                "q",
                "clamp",
                "n",
                "k",
                "edges",
                "values",
                "by",
                "sensitive"
            ],
        )?;
        let name = self.required(&object, "name", Self::string)?;
        self.refuse_empty(&object, "windows");
        let parameters = AggregateParameters {
            q: self.optional(&object, "q", |reader, node| {
                Some(Spanned::new(reader.number(node).unwrap_or(0.5), node.span))
            }),
            clamp: self.optional(&object, "clamp", |reader, node| {
                let range = match reader.list(node, Reader::number).as_deref() {
                    Some([low, high]) => (*low, *high),
                    Some(_) => reader.mismatch(node, "a pair of numbers such as `[0, 100]`").unwrap_or((0.0, 1.0)),
                    None => (0.0, 1.0),
                };
                Some(Spanned::new(range, node.span))
            }),
            n: self.optional(&object, "n", Self::kept),
            k: self.optional(&object, "k", Self::kept),
            edges: self.optional(&object, "edges", Self::edges),
            values: self.optional(&object, "values", Self::literals),
            by: self.optional(&object, "by", Self::by),
        };
        Some(AggregateDef {
            name,
            about: self.about(&object),
            function: self.name(&object, "function"),
            of: self.optional(&object, "of", Self::string),
            filter: self.optional(&object, "where", Self::string),
            windows: self.optional(&object, "windows", |reader, node| reader.list(node, Self::window)),
            default: self.optional(&object, "default", Self::literal),
            sensitive: self.optional(&object, "sensitive", Self::bool).unwrap_or(false),
            parameters,
        })
    }

    /// How many values a state keeps. Here and below: what is wrong was reported, and something stands for it, so that
    /// the check does not say that it is missing too.
    fn kept(&mut self, node: &Node) -> Option<Spanned<u32>> {
        Some(Spanned::new(self.integer(node, 1..=i64::from(KEPT_MAX)).unwrap_or(1) as u32, node.span))
    }

    fn edges(&mut self, node: &Node) -> Option<Spanned<Vec<f64>>> {
        Some(Spanned::new(self.list(node, Self::number).unwrap_or(vec![0.0]), node.span))
    }

    fn literals(&mut self, node: &Node) -> Option<Spanned<Vec<Literal>>> {
        let values = self.list(node, |_, node| Some(reader::literal(node))).unwrap_or(vec![Literal::Null]);
        Some(Spanned::new(values, node.span))
    }

    fn by(&mut self, node: &Node) -> Option<By> {
        if let Kind::String(text) = &node.kind {
            let message = "`by` needs its buckets: all values there may be, or the edges between them";
            let shown = crate::diagnose::shown(text);
            let help = format!("write `by: {{of: {shown}, values: [...]}}` or `by: {{of: {shown}, edges: [...]}}`");
            self.report(Diagnostic::error(message, node.span).help(help));
            return None;
        }
        let object = self.object(node, "`by`", &["of", "edges", "values"])?;
        Some(By {
            span: object.span,
            of: self.name(&object, "of"),
            edges: self.optional(&object, "edges", Self::edges),
            values: self.optional(&object, "values", Self::literals),
        })
    }

    fn request(&mut self, node: &Node) -> Option<Request> {
        let object = self.object(node, "request", keys!["name", "fields"])?;
        let name = self.required(&object, "name", Self::string)?;
        self.refuse_empty(&object, "fields");
        let fields = self.required(&object, "fields", |reader, node| reader.columns(node, "request field"));
        Some(Request { name, about: self.about(&object), fields: fields.unwrap_or_default() })
    }

    fn transform(&mut self, node: &Node) -> Option<Transform> {
        let object = self.object(node, "transform", keys!["name", "inputs", "features"])?;
        let name = self.required(&object, "name", Self::string)?;
        self.refuse_empty(&object, "features");
        let inputs = self.required(&object, "inputs", |reader, node| reader.list(node, Self::input));
        let features = self.required(&object, "features", |reader, node| {
            reader.list(node, |reader, node| reader.computed(node, "feature", FEATURE_KEYS))
        });
        Some(Transform {
            name,
            about: self.about(&object),
            inputs: inputs.unwrap_or_default(),
            features: features.unwrap_or_default(),
        })
    }

    fn input(&mut self, node: &Node) -> Option<Input> {
        match &node.kind {
            Kind::String(_) => Some(Input::Name(self.string(node)?)),
            Kind::Mapping(_) => {
                let object = self.object(node, "input", &["view", "as", "keys", "features"])?;
                self.refuse_empty(&object, "features");
                Some(Input::View(ViewInput {
                    view: self.required(&object, "view", Self::string)?,
                    alias: self.optional(&object, "as", Self::string),
                    keys: self.optional(&object, "keys", Self::renames).unwrap_or_default(),
                    features: self.optional(&object, "features", Self::strings),
                }))
            }
            _ => {
                self.mismatch(node, "a name (a string) or a mapping such as `{view: weather, keys: {airport: origin}}`")
            }
        }
    }

    fn vocabulary(&mut self, node: &Node) -> Option<Vocabulary> {
        let object = self.object(node, "vocabulary", keys!["name", "values"])?;
        let name = self.required(&object, "name", Self::string)?;
        let values = self.required(&object, "values", |reader, node| {
            reader.list(node, |reader, node| match &node.kind {
                // An empty value is a value.
                Kind::String(text) => Some(Spanned::new(text.clone(), node.span)),
                _ => reader.mismatch(node, "a string"),
            })
        });
        Some(Vocabulary { name, about: self.about(&object), values: values.unwrap_or_default() })
    }

    fn feature_service(&mut self, node: &Node) -> Option<FeatureService> {
        let object = self.object(node, "feature service", keys!["name", "features"])?;
        let name = self.required(&object, "name", Self::string)?;
        self.refuse_empty(&object, "features");
        let features = self.required(&object, "features", |reader, node| reader.list(node, Self::input));
        Some(FeatureService { name, about: self.about(&object), features: features.unwrap_or_default() })
    }

    fn model(&mut self, node: &Node) -> Option<Model> {
        let object = self.object(
            node,
            "model",
            keys![
                "name",
                "features",
                "runtime",
                "inputs",
                "outputs",
                "post",
                "decision",
                "label",
                "placement",
                "slo",
                "batching",
                "fallback",
                "shadow",
                "canary",
                "keep_previous",
                "cache"
            ],
        )?;
        let name = self.required(&object, "name", Self::string)?;
        self.refuse_empty(&object, "inputs");
        self.refuse_empty(&object, "outputs");
        let runtime = self.required(&object, "runtime", |reader, node| {
            reader.one_of(node, &[("torchscript", Runtime::TorchScript), ("pt2", Runtime::Pt2)])
        });
        let inputs = self.required(&object, "inputs", |reader, node| reader.list(node, Self::model_input));
        let outputs = self.required(&object, "outputs", |reader, node| reader.list(node, Self::model_output));
        let post = self.optional(&object, "post", |reader, node| {
            reader.list(node, |reader, node| reader.computed(node, "model output", keys!["name", "expr", "type"]))
        });
        let placement = self.optional(&object, "placement", |reader, node| reader.placement(node, name.span));
        let slo = self.optional(&object, "slo", |reader, node| reader.slo(node, name.span));
        let batching = self.optional(&object, "batching", Self::batching);
        Some(Model {
            about: self.about(&object),
            features: self.name(&object, "features"),
            runtime: runtime.map_or(Runtime::TorchScript, |choice| choice.value),
            inputs: inputs.unwrap_or_default(),
            outputs: outputs.unwrap_or_default(),
            post: post.unwrap_or_default(),
            decision: self.optional(&object, "decision", Self::string),
            label: self.optional(&object, "label", Self::label),
            placement: placement.unwrap_or_else(|| Placement {
                devices: vec![Spanned::new("cpu".to_string(), name.span)],
                executors: 1,
                threads: 1,
                max_shape: BTreeMap::new(),
            }),
            slo: slo.unwrap_or_else(|| Slo { deadline: None, tiers: default_tiers(name.span) }),
            batching: batching.unwrap_or(Batching {
                policy: BatchingPolicy::Adaptive,
                max_rows: MAX_ROWS_DEFAULT as u32,
                max_queue_rows: MAX_QUEUE_ROWS_DEFAULT as u32,
            }),
            fallback: self.optional(&object, "fallback", Self::fallback).flatten(),
            shadow: self.optional(&object, "shadow", Self::shadow),
            canary: self.optional(&object, "canary", Self::canary),
            keep_previous: self.optional(&object, "keep_previous", Self::duration),
            cache: self.optional(&object, "cache", Self::response_cache),
            name,
        })
    }

    fn response_cache(&mut self, node: &Node) -> Option<ResponseCacheSettings> {
        let object = self.object(node, "response cache", &["max_bytes", "ttl"])?;
        let memory_bytes = self.optional(&object, "max_bytes", Self::size).unwrap_or(RESPONSE_CACHE_DEFAULT);
        if memory_bytes < RESPONSE_CACHE_MIN {
            let span = object.get("max_bytes").map_or(object.span, |node| node.span);
            let message = format!("{memory_bytes} bytes hold hardly any answer");
            self.report(Diagnostic::error(message, span).help("use at least `64KiB`, or leave out `cache`"));
        }
        let ttl = self.optional(&object, "ttl", Self::duration).unwrap_or(RESPONSE_TTL_DEFAULT);
        Some(ResponseCacheSettings { memory_bytes, ttl })
    }

    fn model_input(&mut self, node: &Node) -> Option<ModelInput> {
        let object = self.object(node, "model input", &["name", "dtype", "features", "missing"])?;
        let name = self.required(&object, "name", Self::string)?;
        self.refuse_empty(&object, "features");
        let missing = self.optional(&object, "missing", |reader, node| match &node.kind {
            Kind::String(text) if text == "refuse" => Some(Missing::Refuse),
            Kind::String(text) if text == "nan" => Some(Missing::Nan),
            Kind::Float(x) if x.is_nan() => Some(Missing::Nan),
            Kind::Int(_) | Kind::Float(_) => Some(Missing::Value(reader.number(node)?)),
            _ => reader.mismatch(node, "`refuse`, `nan` or a number"),
        });
        Some(ModelInput {
            dtype: self.dtype(&object, name.span),
            features: self.required(&object, "features", Self::strings).unwrap_or_default(),
            missing: missing.unwrap_or(Missing::Refuse),
            name,
        })
    }

    fn model_output(&mut self, node: &Node) -> Option<ModelOutput> {
        let object = self.object(node, "model output", &["name", "dtype"])?;
        let name = self.required(&object, "name", Self::string)?;
        Some(ModelOutput { dtype: self.dtype(&object, name.span), name })
    }

    /// The type of a tensor's elements. Float32 stands in where it is missing or wrong, which was reported.
    fn dtype(&mut self, object: &Object<'_>, span: Span) -> Spanned<Type> {
        let dtype = self.required(object, "dtype", Self::field_type).unwrap_or(Spanned::new(Type::Float32, span));
        if !matches!(dtype.value, Type::Bool | Type::Int32 | Type::Int64 | Type::Float32 | Type::Float64) {
            let diagnostic = Diagnostic::error(format!("a tensor cannot hold `{}`", dtype.value), dtype.span);
            self.report(diagnostic.help("use `float32`, `float64`, `int64`, `int32` or `bool`"));
        }
        dtype
    }

    fn label(&mut self, node: &Node) -> Option<Label> {
        let object = self.object(node, "label", &["name", "type", "within"])?;
        Some(Label {
            name: self.required(&object, "name", Self::string)?,
            label_type: self.required(&object, "type", Self::field_type)?,
            within: self.optional(&object, "within", Self::duration),
        })
    }

    fn placement(&mut self, node: &Node, span: Span) -> Option<Placement> {
        let object = self.object(node, "placement", &["devices", "executors", "threads", "max_shape"])?;
        self.refuse_empty(&object, "devices");
        let max_shape = self.optional(&object, "max_shape", |reader, node| match &node.kind {
            Kind::Mapping(entries) => Some(
                entries
                    .iter()
                    .filter_map(|(input, node)| {
                        let shape =
                            reader.list(node, |reader, node| Some(reader.integer(node, 1..=COUNT_MAX)? as u64))?;
                        Some((input.value.clone(), shape))
                    })
                    .collect(),
            ),
            _ => reader.mismatch(node, "a mapping from model input to shape"),
        });
        Some(Placement {
            devices: self
                .optional(&object, "devices", Self::strings)
                .unwrap_or_else(|| vec![Spanned::new("cpu".to_string(), span)]),
            executors: self.optional(&object, "executors", |r, node| r.integer(node, 1..=256)).unwrap_or(1) as u32,
            threads: self.optional(&object, "threads", |r, node| r.integer(node, 1..=256)).unwrap_or(1) as u32,
            max_shape: max_shape.unwrap_or_default(),
        })
    }

    fn slo(&mut self, node: &Node, span: Span) -> Option<Slo> {
        let object = self.object(node, "service level", &["deadline", "tiers"])?;
        self.refuse_empty(&object, "tiers");
        Some(Slo {
            deadline: self.optional(&object, "deadline", Self::duration),
            tiers: self.optional(&object, "tiers", Self::strings).unwrap_or_else(|| default_tiers(span)),
        })
    }

    fn batching(&mut self, node: &Node) -> Option<Batching> {
        let object = self.object(node, "batching policy", &["policy", "window", "max_rows", "max_queue_rows"])?;
        let fixed = self
            .optional(&object, "policy", |reader, node| reader.one_of(node, &[("adaptive", false), ("window", true)]));
        let fixed = fixed.is_some_and(|fixed| fixed.value);
        // A window of zero never waits.
        let window = self.optional(&object, "window", Self::duration_or_zero);
        if let Some(window) = window.filter(|window| *window > WINDOW_MAX) {
            let span = object.key_span("window").unwrap_or(object.span);
            let message = format!("a window of {window:?} holds requests back for too long");
            self.report(Diagnostic::error(message, span).help("use at most 10s"));
        }
        let policy = match (fixed, window) {
            (true, Some(window)) => BatchingPolicy::Window(window),
            (true, None) => {
                if object.get("window").is_none() {
                    let message = "the policy `window` needs its length";
                    self.report(Diagnostic::error(message, object.span).help("add `window: 10ms`"));
                }
                BatchingPolicy::Adaptive
            }
            (false, Some(_)) => {
                let span = object.key_span("window").unwrap_or(object.span);
                let diagnostic = Diagnostic::error("`window` belongs to the policy `window`", span);
                self.report(diagnostic.help("add `policy: window`, or remove `window`: the adaptive policy has none"));
                BatchingPolicy::Adaptive
            }
            (false, None) => BatchingPolicy::Adaptive,
        };
        let max_rows = self.optional(&object, "max_rows", |r, node| r.integer(node, 1..=1_000_000));
        let max_queue_rows = self.optional(&object, "max_queue_rows", |r, node| r.integer(node, 1..=100_000_000));
        let rows = max_rows.unwrap_or(MAX_ROWS_DEFAULT);
        if max_queue_rows.is_some_and(|queue| queue < rows) {
            let span = object.key_span("max_queue_rows").unwrap_or(object.span);
            let message = format!("`max_queue_rows` is smaller than one batch of {rows} rows");
            self.report(Diagnostic::error(message, span).help("a queue holds at least one full batch"));
        }
        Some(Batching {
            policy,
            max_rows: rows as u32,
            max_queue_rows: max_queue_rows.unwrap_or(MAX_QUEUE_ROWS_DEFAULT.max(rows)) as u32,
        })
    }

    /// `{output: number}`, `{model: name}` or `none`. The outer option is None when it could not be read.
    fn fallback(&mut self, node: &Node) -> Option<Option<Fallback>> {
        match &node.kind {
            Kind::String(text) if text == "none" => Some(None),
            Kind::Mapping(entries) => match &entries[..] {
                [(key, node)] if **key == "model" && matches!(node.kind, Kind::String(_)) => {
                    Some(Some(Fallback::Model(self.string(node)?)))
                }
                [] => self.mismatch(node, "a value for every output"),
                _ => {
                    let values = entries.iter().filter_map(|(output, node)| Some((output.clone(), self.number(node)?)));
                    Some(Some(Fallback::Values(values.collect())))
                }
            },
            _ => self.mismatch(node, "`{output: value}`, `{model: name}` or `none`"),
        }
    }

    fn shadow(&mut self, node: &Node) -> Option<Shadow> {
        let object = self.object(
            node,
            "shadow criteria",
            &["min_rows", "max_skew_rows", "drift", "max_flip_rate", "max_forward_ratio", "ends_after"],
        )?;
        let drift = self
            .optional(&object, "drift", |reader, node| reader.one_of(node, &[("hold", "hold"), ("ignore", "ignore")]));
        let drift = drift.unwrap_or(Spanned::new("hold", object.span));
        let max_forward_ratio = self.optional(&object, "max_forward_ratio", Self::number);
        if max_forward_ratio.is_some_and(|ratio| ratio <= 0.0) {
            let span = object.key_span("max_forward_ratio").unwrap_or(object.span);
            self.report(Diagnostic::error("`max_forward_ratio` must be greater than 0", span));
        }
        Some(Shadow {
            min_rows: self.required(&object, "min_rows", |r, node| r.integer(node, 0..=COUNT_MAX)).unwrap_or(0) as u64,
            max_skew_rows: self
                .optional(&object, "max_skew_rows", |r, node| r.integer(node, 0..=COUNT_MAX))
                .unwrap_or(0) as u64,
            drift: Spanned::new(drift.value.to_string(), drift.span),
            max_flip_rate: self.optional(&object, "max_flip_rate", Self::share),
            max_forward_ratio,
            ends_after: self.optional(&object, "ends_after", Self::duration),
        })
    }

    fn canary(&mut self, node: &Node) -> Option<Canary> {
        let object = self.object(
            node,
            "canary criteria",
            &[
                "unit",
                "without_unit",
                "steps",
                "bake",
                "min_units",
                "ends_after",
                "window",
                "success",
                "guardrails",
                "whole_weeks",
                "blackouts",
                "alpha",
            ],
        )?;
        self.refuse_empty(&object, "steps");
        let without_unit =
            self.optional(&object, "without_unit", |reader, node| reader.one_of(node, &[("champion", "champion")]));
        let without_unit = without_unit.unwrap_or(Spanned::new("champion", object.span));
        let steps = self.required(&object, "steps", |reader, node| {
            let mut last = 0.0;
            reader.list(node, |reader, node| {
                let share = reader.share(node)?;
                if share <= last {
                    let diagnostic = Diagnostic::error("each step must be larger than the one before it", node.span);
                    reader.report(diagnostic.help("a ramp only adds units: `[1%, 5%, 25%, 100%]`"));
                }
                last = share;
                Some(share)
            })
        });
        Some(Canary {
            unit: self.name(&object, "unit"),
            without_unit: Spanned::new(without_unit.value.to_string(), without_unit.span),
            steps: steps.unwrap_or_default(),
            bake: self.optional(&object, "bake", Self::duration),
            min_units: self
                .optional(&object, "min_units", |r, node| r.integer(node, 0..=COUNT_MAX))
                .unwrap_or(CANARY_MIN_UNITS_DEFAULT) as u64,
            ends_after: self.optional(&object, "ends_after", Self::duration),
            window: self.optional(&object, "window", Self::duration),
            success: self
                .optional(&object, "success", |reader, node| reader.list(node, Self::success))
                .unwrap_or_default(),
            guardrails: self
                .optional(&object, "guardrails", |reader, node| reader.list(node, Self::guardrail))
                .unwrap_or_default(),
            whole_weeks: self.optional(&object, "whole_weeks", Self::bool).unwrap_or(false),
            blackouts: self
                .optional(&object, "blackouts", |reader, node| reader.list(node, Self::blackout))
                .unwrap_or_default(),
            alpha: self.optional(&object, "alpha", |reader, node| {
                let alpha = reader.share(node)?;
                if alpha > 0.0 && alpha <= 0.5 {
                    return Some(alpha);
                }
                reader.report(
                    Diagnostic::error(
                        "`alpha` is the chance of a false verdict, more than 0% and at most 50%",
                        node.span,
                    )
                    .help("leave it out for 5%"),
                );
                None
            }),
        })
    }

    /// `log_loss`, or `{metric: clicks, range: [0, 1], better: higher, not_worse_by: 0.01}`.
    fn success(&mut self, node: &Node) -> Option<Success> {
        if let Kind::String(_) = &node.kind {
            let metric = self.string(node)?;
            return Some(Success { metric, range: None, centre: None, lower_is_better: None, not_worse_by: None });
        }
        let object = self.object(node, "success metric", &["metric", "range", "centre", "better", "not_worse_by"])?;
        let range = self.optional(&object, "range", |reader, node| {
            let ends = reader.list(node, Self::number)?;
            match ends[..] {
                [low, high] if low < high => Some((low, high)),
                _ => reader.mismatch(node, "two numbers, the lower one first"),
            }
        });
        let better =
            self.optional(&object, "better", |reader, node| reader.one_of(node, &[("lower", true), ("higher", false)]));
        let not_worse_by = self.optional(&object, "not_worse_by", |reader, node| {
            let margin = reader.number(node)?;
            if margin > 0.0 { Some(margin) } else { reader.mismatch(node, "a number greater than 0") }
        });
        Some(Success {
            metric: self.name(&object, "metric"),
            range,
            centre: self.optional(&object, "centre", Self::number),
            lower_is_better: better.map(|better| better.value),
            not_worse_by,
        })
    }

    /// `{from: "2026-12-24T00:00:00Z", until: "2026-12-27T00:00:00Z"}`
    fn blackout(&mut self, node: &Node) -> Option<(i64, i64)> {
        let object = self.object(node, "blackout", &["from", "until"])?;
        let from = self.required(&object, "from", Self::time)?;
        let until = self.required(&object, "until", Self::time)?;
        if from >= until {
            self.report(Diagnostic::error("a blackout ends after it begins", object.span));
            return None;
        }
        Some((from, until))
    }
}

fn default_tiers(span: Span) -> Vec<Spanned<String>> {
    TIERS_DEFAULT.iter().map(|tier| Spanned::new(tier.to_string(), span)).collect()
}

#[cfg(test)]
pub(crate) mod tests;
