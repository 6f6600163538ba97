//! What must hold between objects: names are unique and well formed, references lead somewhere, windows and keys fit.
//!
//! Types of expressions and columns of undeclared files are not known here; `plan.rs` checks them. An empty name stands
//! for something that parsing has already reported, and is passed over.

mod literal;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

pub use self::literal::LiteralError;
use crate::aggregate::{BUCKETS_MAX, CLAMP_MAX, Clamp, FUNCTION_NAMES, Quantile, nearest_name};
use crate::catalog::*;
use crate::diagnose::{Diagnostic, Span, Spanned, article, nearest, shown};
use crate::value::Type;

/// Each tier gets a quarter of the rows of the one above, and the batcher's shares stay small numbers.
const TIERS_MAX: usize = 8;

/// Checks a parsed catalog. Warnings may be among the diagnostics.
pub fn check(catalog: &Catalog) -> Vec<Diagnostic> {
    let mut checker = Checker { catalog, diagnostics: Vec::new() };
    checker.names();
    catalog.entities.iter().for_each(|entity| checker.entity(entity));
    catalog.sources.iter().for_each(|source| checker.source(source));
    catalog.feature_views.iter().for_each(|view| checker.view(view));
    catalog.requests.iter().for_each(|request| checker.request(request));
    catalog.transforms.iter().for_each(|transform| checker.transform(transform));
    checker.transform_cycles();
    catalog.vocabularies.iter().for_each(|vocabulary| checker.vocabulary(vocabulary));
    catalog.feature_services.iter().for_each(|service| checker.service(service));
    catalog.models.iter().for_each(|model| checker.model(model));
    checker.fallback_cycles();
    checker.diagnostics
}

/// Names become column names, SQL identifiers and parts of keys.
const NAME_CHARS_MAX: usize = 64;

/// The column of a spine that says at what time a row is asked for.
const EVENT_TIMESTAMP: &str = "event_timestamp";
/// A feature's status is a column of this name.
const STATUS_SUFFIX: &str = "__status";

/// The parameters that an aggregate function takes beside `of`, `where` and `by`.
fn parameters_of(function: &str) -> &'static [&'static str] {
    match function {
        "last_n" => &["n"],
        "top_k" => &["k"],
        "percentile" => &["q", "clamp"],
        "histogram" => &["edges", "values"],
        _ => &[],
    }
}

struct Checker<'a> {
    catalog: &'a Catalog,
    diagnostics: Vec<Diagnostic>,
}

/// What a name without a kind may stand for.
#[derive(Clone, Copy)]
enum Addressed<'a> {
    View(&'a FeatureView),
    Request(&'a Request),
    Transform(&'a Transform),
}

impl<'a> Addressed<'a> {
    fn feature_names(self) -> Vec<String> {
        let names = |features: &[Feature]| features.iter().map(|feature| feature.name.value.clone()).collect();
        match self {
            Addressed::View(view) => view.feature_names(),
            Addressed::Request(request) => request.fields.iter().map(|field| field.name.value.clone()).collect(),
            Addressed::Transform(transform) => names(&transform.features),
        }
    }

    fn what(self) -> &'static str {
        match self {
            Addressed::View(_) => "feature view",
            Addressed::Request(_) => "request",
            Addressed::Transform(_) => "transform",
        }
    }
}

impl<'a> Checker<'a> {
    fn report(&mut self, diagnostic: Diagnostic) {
        self.diagnostics.push(diagnostic);
    }

    fn error(&mut self, message: impl Into<String>, span: Span) {
        self.report(Diagnostic::error(message, span));
    }

    fn addressed(&self, name: &str) -> Option<Addressed<'a>> {
        let catalog = self.catalog;
        catalog
            .view(name)
            .map(Addressed::View)
            .or_else(|| catalog.request(name).map(Addressed::Request))
            .or_else(|| catalog.transform(name).map(Addressed::Transform))
    }

    /// Objects of one kind, and of the kinds that expressions address alike, have different names.
    fn names(&mut self) {
        fn of<T>(
            what: &'static str,
            list: &[T],
            name: impl Fn(&T) -> &Spanned<String>,
        ) -> Vec<(&'static str, Spanned<String>)> {
            list.iter().map(|object| (what, name(object).clone())).collect()
        }
        let catalog = self.catalog;
        let addressed = [
            of("feature view", &catalog.feature_views, |view| &view.name),
            of("request", &catalog.requests, |request| &request.name),
            of("transform", &catalog.transforms, |transform| &transform.name),
        ]
        .concat();
        self.unique(&of("entity", &catalog.entities, |entity| &entity.name));
        self.unique(&of("source", &catalog.sources, |source| &source.name));
        self.unique(&addressed);
        self.unique(&of("vocabulary", &catalog.vocabularies, |vocabulary| &vocabulary.name));
        self.unique(&of("feature service", &catalog.feature_services, |service| &service.name));
        self.unique(&of("model", &catalog.models, |model| &model.name));
    }

    /// Checks the form of names and that no two are the same.
    fn unique(&mut self, names: &[(&'static str, Spanned<String>)]) {
        let mut seen: HashMap<&str, (&str, Span)> = HashMap::new();
        for (what, name) in names.iter().filter(|(_, name)| !name.is_empty()) {
            self.identifier(what, name);
            match seen.get(name.as_str()) {
                Some((first_what, first)) if first_what == what => {
                    let message = format!("there are two {} `{}`", plural(what), shown(name));
                    self.report(Diagnostic::error(message, name.span).related("the first is here", *first));
                }
                Some((first_what, first)) => {
                    let message = format!("there is already a {first_what} `{}`", shown(name));
                    let diagnostic = Diagnostic::error(message, name.span)
                        .label(format!("this is a {what}"))
                        .related("it is here", *first);
                    self.report(
                        diagnostic.help("views, requests and transforms are addressed alike and need different names"),
                    );
                }
                None => {
                    seen.insert(name, (what, name.span));
                }
            }
        }
    }

    fn identifier(&mut self, what: &str, name: &Spanned<String>) {
        if !name.is_empty() && !is_identifier(name) {
            let diagnostic =
                Diagnostic::error(format!("`{}` cannot be the name of {}", shown(name), article(what)), name.span);
            self.report(diagnostic.help("use a letter, then letters, digits and `_`, 64 at most"));
        }
    }

    /// The same, inside one object.
    fn unique_in<'n>(&mut self, what: &str, of: &str, names: impl IntoIterator<Item = &'n Spanned<String>>) {
        let mut seen: HashMap<&str, Span> = HashMap::new();
        for name in names.into_iter().filter(|name| !name.is_empty()) {
            self.identifier(what, name);
            match seen.get(name.as_str()) {
                Some(first) => {
                    let message = format!("{of} has two {} `{}`", plural(what), shown(name));
                    self.report(Diagnostic::error(message, name.span).related("the first is here", *first));
                }
                None => {
                    seen.insert(name, name.span);
                }
            }
        }
    }

    /// Reports a reference that leads nowhere.
    fn unresolved<'n>(
        &mut self,
        what: &str,
        name: &Spanned<String>,
        known: impl IntoIterator<Item = &'n Spanned<String>>,
    ) {
        if !name.is_empty() {
            let known: Vec<&str> =
                known.into_iter().map(|name| name.as_str()).filter(|name| !name.is_empty()).collect();
            self.report(
                Diagnostic::error(format!("there is no {what} `{}`", shown(name)), name.span).nearest(name, known),
            );
        }
    }

    fn entity(&mut self, entity: &Entity) {
        self.unique_in("key", &format!("entity `{}`", *entity.name), entity.keys.iter().map(|key| &key.name));
        for key in &entity.keys {
            self.not_event_timestamp(&key.name);
            if !key.field_type.is_key() {
                let diagnostic = Diagnostic::error(
                    format!("an entity key cannot be of type `{}`", key.field_type.value),
                    key.field_type.span,
                );
                self.report(if key.field_type.is_float() {
                    diagnostic
                        .label("two floats that print alike can differ")
                        .help("use `int64` or `string`: a key must be found again exactly")
                } else {
                    diagnostic.help("use `int64`, `string`, `bool` or `binary`")
                });
            }
        }
    }

    fn not_event_timestamp(&mut self, name: &Spanned<String>) {
        if **name == EVENT_TIMESTAMP {
            let diagnostic = Diagnostic::error(format!("the name `{EVENT_TIMESTAMP}` is taken"), name.span);
            self.report(diagnostic.help("it is the column of a spine that says at what time a row is asked for"));
        }
    }

    fn source(&mut self, source: &Source) {
        let mut seen: HashSet<&str> = HashSet::new();
        for column in &source.schema {
            if !seen.insert(&column.name) {
                let message = format!("source `{}` has two columns `{}`", *source.name, shown(&column.name));
                self.error(message, column.name.span);
            }
        }
        for time in [&source.event_time, &source.created_time].into_iter().flatten() {
            if let Some(column) = source.schema.iter().find(|column| column.name == *time)
                && column.field_type.value != Type::Timestamp
            {
                let message =
                    format!("`{}` is a time and must be a `timestamp`, not a `{}`", **time, column.field_type.value);
                self.error(message, column.field_type.span);
            }
        }
        if let SourceKind::Stream { event_id: Some(event_id), .. } = &source.kind
            && !source.schema.is_empty()
            && !source.schema.iter().any(|column| column.name == *event_id)
        {
            self.no_column(source, event_id, "");
        }
    }

    fn no_column(&mut self, source: &Source, name: &Spanned<String>, instead: &str) {
        let message = format!("source `{}` has no column `{}`", *source.name, shown(name));
        let columns = source.schema.iter().map(|column| column.name.as_str());
        let diagnostic = Diagnostic::error(message, name.span);
        self.report(if nearest(name, columns.clone()).is_some() || instead.is_empty() {
            diagnostic.nearest(name, columns)
        } else {
            diagnostic.help(instead)
        });
    }

    fn view(&mut self, view: &FeatureView) {
        let catalog = self.catalog;
        let of = format!("feature view `{}`", *view.name);
        let entity = catalog.entity(&view.entity);
        let source = catalog.source(&view.source);
        if entity.is_none() {
            self.unresolved("entity", &view.entity, catalog.entities.iter().map(|entity| &entity.name));
        }
        if source.is_none() {
            self.unresolved("source", &view.source, catalog.sources.iter().map(|source| &source.name));
        }
        if let Some(entity) = entity {
            self.keys_of(entity, &view.keys);
        }
        if let (Some(entity), Some(source)) = (entity, source) {
            self.key_columns(view, entity, source);
        }
        let is_static = source.is_some_and(|source| matches!(source.kind, SourceKind::Files { is_static: true, .. }));
        match &view.kind {
            ViewKind::AsOf { ttl, features, .. } => {
                if is_static && (ttl.is_some() || view.freshness.is_some()) {
                    let message =
                        format!("{of} has an age limit, but rows of the static source `{}` have no age", *view.source);
                    self.report(Diagnostic::error(message, view.name.span).help("leave out `ttl` and `freshness`"));
                }
                self.unique_in("feature", &of, features.iter().map(|feature| &feature.name));
                features.iter().for_each(|feature| self.feature(feature));
            }
            ViewKind::Windowed { windows, hop, aggregates, .. } => {
                if is_static {
                    let message = format!("{of} aggregates over time, but rows of `{}` have no time", *view.source);
                    self.report(
                        Diagnostic::error(message, view.source.span).help("windows need a source with an `event_time`"),
                    );
                }
                self.windows(&of, windows);
                self.unique_in("aggregate", &of, aggregates.iter().map(|aggregate| &aggregate.name));
                aggregates.iter().for_each(|aggregate| self.aggregate(&of, aggregate));
                self.generated_names(&of, windows, aggregates);
                if let Some(Spanned { value: Hop::Every(every), span }) = hop {
                    let all = windows
                        .iter()
                        .chain(aggregates.iter().flat_map(|aggregate| aggregate.windows.iter().flatten()));
                    self.hop(*every, *span, all);
                }
            }
        }
    }

    /// Keys of a renaming must be keys of the entity.
    fn keys_of(&mut self, entity: &Entity, keys: &[(Spanned<String>, Spanned<String>)]) {
        for (key, _) in keys {
            if !entity.keys.iter().any(|known| known.name == *key) {
                let message = format!("entity `{}` has no key `{}`", *entity.name, shown(key));
                let known = entity.keys.iter().map(|key| key.name.as_str());
                self.report(Diagnostic::error(message, key.span).nearest(key, known));
            }
        }
    }

    /// Where the source's columns are declared, each key's column must be there, with the key's type.
    fn key_columns(&mut self, view: &FeatureView, entity: &Entity, source: &Source) {
        if source.schema.is_empty() {
            return;
        }
        for key in &entity.keys {
            let renamed = view.keys.iter().find(|(name, _)| *name == key.name).map(|(_, column)| column);
            let column = match renamed {
                Some(column) => column.clone(),
                None => Spanned::new(key.name.value.clone(), view.source.span),
            };
            match source.schema.iter().find(|declared| declared.name == column) {
                None => {
                    let instead = format!("say which column holds the key: `keys: {{{}: ...}}`", *key.name);
                    self.no_column(source, &column, &instead);
                }
                Some(declared) if declared.field_type != key.field_type => {
                    let message = format!(
                        "key `{}` of entity `{}` is `{}`, but column `{}` of source `{}` is `{}`",
                        *key.name, *entity.name, key.field_type.value, *column, *source.name, declared.field_type.value
                    );
                    self.error(message, column.span);
                }
                Some(_) => {}
            }
        }
    }

    fn feature(&mut self, feature: &Feature) {
        self.not_status(&feature.name);
        if let (Some(default), Some(feature_type)) = (&feature.default, &feature.feature_type) {
            self.default(default, feature_type);
        }
        self.default_not_null(feature.default.as_ref());
    }

    fn default(&mut self, default: &Spanned<Literal>, wanted: &Type) {
        if default.value != Literal::Null
            && let Err(error) = default.to_value(wanted)
        {
            self.error(format!("the default does not fit: {error}"), default.span);
        }
    }

    fn default_not_null(&mut self, default: Option<&Spanned<Literal>>) {
        if let Some(default) = default.filter(|default| default.value == Literal::Null) {
            let diagnostic = Diagnostic::error("a default of null changes nothing", default.span);
            self.report(diagnostic.help("leave it out: without a default a missing value is null"));
        }
    }

    fn not_status(&mut self, name: &Spanned<String>) {
        if name.ends_with(STATUS_SUFFIX) {
            let message = format!("a feature's name cannot end in `{STATUS_SUFFIX}`");
            let diagnostic = Diagnostic::error(message, name.span);
            self.report(diagnostic.help("columns of such names hold the statuses of features"));
        }
    }

    fn windows(&mut self, of: &str, windows: &[Spanned<WindowLength>]) {
        for (i, window) in windows.iter().enumerate() {
            if let Some(first) = windows[..i].iter().find(|first| first.duration == window.duration) {
                let message = format!("{of} has the window `{}` twice", window.text);
                let diagnostic = Diagnostic::error(message, window.span);
                let same = first.text == window.text;
                self.report(if same { diagnostic } else { diagnostic.label(format!("as long as `{}`", first.text)) });
            }
        }
    }

    fn aggregate(&mut self, of: &str, aggregate: &AggregateDef) {
        let what = format!("aggregate `{}` of {of}", *aggregate.name);
        self.windows(&what, aggregate.windows.as_deref().unwrap_or_default());
        self.not_status(&aggregate.name);
        self.default_not_null(aggregate.default.as_ref());
        let function = &aggregate.function;
        if function.is_empty() {
            return;
        }
        if !FUNCTION_NAMES.contains(&function.as_str()) {
            let message = format!("there is no aggregate function `{}`", shown(function));
            let diagnostic = Diagnostic::error(message, function.span);
            self.report(match nearest_name(function) {
                Some(near) => diagnostic.help(format!("did you mean `{near}`?")),
                None => diagnostic.nearest(function, FUNCTION_NAMES),
            });
            return;
        }
        let AggregateParameters { q, clamp, n, k, edges, values, by } = &aggregate.parameters;
        let given = [
            ("q", q.as_ref().map(|q| q.span)),
            ("clamp", clamp.as_ref().map(|clamp| clamp.span)),
            ("n", n.as_ref().map(|n| n.span)),
            ("k", k.as_ref().map(|k| k.span)),
            ("edges", edges.as_ref().map(|edges| edges.span)),
            ("values", values.as_ref().map(|values| values.span)),
        ];
        let takes = parameters_of(function);
        let wrong: Vec<(&str, Span, Option<&str>)> = given
            .iter()
            .filter(|(parameter, _)| !takes.contains(parameter))
            .filter_map(|(parameter, span)| {
                let instead = match (*parameter, takes) {
                    ("n" | "k", [instead @ ("n" | "k")]) => Some(*instead),
                    _ => None,
                };
                Some((*parameter, (*span)?, instead))
            })
            .collect();
        // A number under the wrong name is not missing too.
        let misnamed = wrong.iter().any(|(_, _, instead)| instead.is_some());
        let mut missing: Vec<&str> = Vec::new();
        if aggregate.of.is_none() && **function != "count" {
            missing.push("`of`");
        }
        let is_given = |parameter: &str| given.iter().any(|(name, span)| *name == parameter && span.is_some());
        match function.as_str() {
            "percentile" => missing.extend(
                [("q", "`q`"), ("clamp", "`clamp`")].iter().filter(|(name, _)| !is_given(name)).map(|(_, shown)| shown),
            ),
            "last_n" if !misnamed && !is_given("n") => missing.push("`n`"),
            "top_k" if !misnamed && !is_given("k") => missing.push("`k`"),
            _ => {}
        }
        if let Some((last, others)) = missing.split_last() {
            let all = if others.is_empty() { last.to_string() } else { format!("{} and {last}", others.join(", ")) };
            let (what, help) = match (function.as_str(), &missing[..]) {
                (_, ["`of`"]) => {
                    (": what to aggregate", "write `of: column`, or an expression over the source's columns")
                }
                ("percentile", _) => (
                    "",
                    "write like `of: delay, q: 0.9, clamp: [0, 1000]`: 90 % of the values, which lie in this range",
                ),
                ("last_n", _) => ("", "write like `of: price, n: 3`: how many values to keep"),
                _ => ("", "write like `of: price, k: 3`: how many values to keep"),
            };
            self.report(Diagnostic::error(format!("`{}` needs {all}{what}", **function), function.span).help(help));
        }
        for (parameter, span, instead) in wrong {
            let diagnostic = Diagnostic::error(format!("`{}` does not take `{parameter}`", **function), span);
            self.report(match instead {
                Some(instead) => diagnostic.help(format!("write `{instead}`")),
                None => diagnostic,
            });
        }
        if let Some(q) = q {
            if !(q.value > 0.0 && q.value < 1.0) {
                self.error("`q` must lie between 0 and 1", q.span);
            } else if Quantile::new(q.value).is_none() {
                self.error("`q` has more than nine decimals", q.span);
            }
        }
        if let Some(clamp) = clamp {
            let (low, high) = clamp.value;
            if low >= high {
                self.error("the lower end of `clamp` must be below the upper", clamp.span);
            } else if Clamp::new(low, high).is_none() {
                let diagnostic = Diagnostic::error(format!("`clamp` must lie within ±{CLAMP_MAX:e}"), clamp.span);
                self.report(diagnostic.help("a narrow range keeps tiles small: name what values can really be"));
            }
        }
        if **function == "histogram" {
            self.buckets("histogram", function.span, edges.as_ref(), values.as_ref());
        }
        if let Some(by) = by {
            self.buckets("by", by.span, by.edges.as_ref(), by.values.as_ref());
        }
    }

    /// Buckets are declared in one of two ways. Whether they fit what is put into them is checked with its type.
    fn buckets(
        &mut self,
        what: &str,
        span: Span,
        edges: Option<&Spanned<Vec<f64>>>,
        values: Option<&Spanned<Vec<Literal>>>,
    ) {
        if edges.is_some() == values.is_some() {
            let diagnostic = Diagnostic::error(format!("`{what}` needs either `edges` or `values`"), span);
            self.report(diagnostic.help("write `edges: [0, 15, 60]`, or `values: [AA, UA]`; what is in none is OTHER"));
        }
        let sizes = [
            ("edges", edges.map(|edges| (edges.len(), edges.span))),
            ("values", values.map(|values| (values.len(), values.span))),
        ];
        for (name, size) in sizes {
            match size {
                Some((0, span)) => self.error(format!("`{name}` is empty"), span),
                Some((size, span)) if size > BUCKETS_MAX => {
                    self.error(format!("`{name}` are {size}, and {BUCKETS_MAX} is the most"), span);
                }
                _ => {}
            }
        }
        if let Some(edges) = edges
            && edges.windows(2).any(|pair| pair[0] >= pair[1])
        {
            self.error("`edges` must ascend", edges.span);
        }
    }

    /// `<aggregate>_<window>` of different aggregates can meet: `a` over a window and `a_1h`, say.
    fn generated_names(&mut self, of: &str, windows: &[Spanned<WindowLength>], aggregates: &[AggregateDef]) {
        let mut seen: HashMap<String, &AggregateDef> = HashMap::new();
        for aggregate in aggregates.iter().filter(|aggregate| !aggregate.name.is_empty()) {
            for window in aggregate.windows_in(windows) {
                let name = aggregate.feature_name(window);
                if name.len() > NAME_CHARS_MAX && aggregate.name.len() <= NAME_CHARS_MAX {
                    let message =
                        format!("the feature name `{}` is longer than {NAME_CHARS_MAX} characters", shown(&name));
                    self.error(message, aggregate.name.span);
                }
                match seen.get(&name) {
                    // The same aggregate twice, or one window twice, was reported as such.
                    Some(first) if first.name == aggregate.name => {}
                    Some(first) => {
                        let message = format!("{of} gets two features `{}`", shown(&name));
                        let diagnostic = Diagnostic::error(message, aggregate.name.span);
                        self.report(diagnostic.related("the other comes from here", first.name.span));
                    }
                    None => {
                        seen.insert(name, aggregate);
                    }
                }
            }
        }
    }

    /// A hop must fill every window without remainder, and the levels of tiles must nest.
    fn hop<'n>(&mut self, hop: Duration, span: Span, windows: impl Iterator<Item = &'n Spanned<WindowLength>>) {
        const LEVELS: [(&str, u64); 3] = [("5 minutes", 300), ("1 hour", 3_600), ("1 day", 86_400)];
        let hop_micros = hop.as_micros();
        if hop < Duration::from_secs(1) {
            self.error("a hop cannot be shorter than a second", span);
            return;
        }
        let uneven: BTreeSet<(Duration, String)> = windows
            .filter(|window| window.duration.as_micros() % hop_micros != 0)
            .map(|window| (window.duration, format!("`{}`", window.text)))
            .collect();
        if !uneven.is_empty() {
            let texts: Vec<String> = uneven.into_iter().map(|(_, text)| text).collect();
            let diagnostic =
                Diagnostic::error(format!("the hop does not divide the window {}", texts.join(", ")), span);
            self.report(diagnostic.help("choose a hop that divides every window of the view"));
            return;
        }
        for (level, seconds) in LEVELS {
            let level_micros = u128::from(seconds) * 1_000_000;
            if !level_micros.is_multiple_of(hop_micros) && !hop_micros.is_multiple_of(level_micros) {
                let message = format!("the hop neither divides {level} nor is a multiple of it");
                let diagnostic = Diagnostic::error(message, span);
                self.report(diagnostic.help("hops divide each other: use 1m, 5m, 10m, 15m, 30m, 1h, 2h, 6h or 1d"));
                break;
            }
        }
    }

    fn request(&mut self, request: &Request) {
        let of = format!("request `{}`", *request.name);
        self.unique_in("field", &of, request.fields.iter().map(|field| &field.name));
        for field in &request.fields {
            self.not_event_timestamp(&field.name);
            self.not_status(&field.name);
        }
    }

    fn transform(&mut self, transform: &Transform) {
        let of = format!("transform `{}`", *transform.name);
        self.inputs(&of, &transform.inputs);
        let mut seen: HashSet<&str> = HashSet::new();
        for input in &transform.inputs {
            if let Input::Name(name) = input
                && name.contains(':')
            {
                let diagnostic =
                    Diagnostic::error("an input of a transform is a whole view, request or transform", name.span);
                self.report(
                    diagnostic.help(format!("write `{}`; expressions name the feature", shown(input.address()))),
                );
            } else if self.is_taken_alias(input)
                || matches!(input, Input::View(view) if self.catalog.view(&view.view).is_none())
            {
                // Reported already; what really bears the name is not a second one.
            } else if !seen.insert(input.address()) && self.first_of_other_meaning(input, &transform.inputs).is_none() {
                let message = format!("{of} has two inputs `{}`", shown(input.address()));
                let diagnostic = Diagnostic::error(message, input.span());
                self.report(diagnostic.help("give one of them another name: `{view: ..., as: other_name}`"));
            }
        }
        self.unique_in("feature", &of, transform.features.iter().map(|feature| &feature.name));
        transform.features.iter().for_each(|feature| self.feature(feature));
    }

    /// Inputs of transforms and services alike: they exist, their keys are keys, their aliases are free.
    fn inputs(&mut self, of: &str, inputs: &[Input]) {
        let catalog = self.catalog;
        for entry in inputs {
            match entry {
                Input::Name(name) => {
                    if !entry.address().is_empty() && self.addressed(entry.address()).is_none() {
                        let object = Spanned::new(entry.address().to_string(), name.span);
                        let known = catalog.feature_views.iter().map(|view| &view.name);
                        let known = known.chain(catalog.requests.iter().map(|request| &request.name));
                        let known = known.chain(catalog.transforms.iter().map(|transform| &transform.name));
                        self.unresolved("feature view, request or transform", &object, known);
                    }
                }
                Input::View(input) => {
                    let Some(view) = catalog.view(&input.view) else {
                        let message = format!("there is no feature view `{}`", shown(&input.view));
                        let diagnostic = Diagnostic::error(message, input.view.span);
                        self.report(match self.addressed(&input.view) {
                            Some(other) => diagnostic.help(format!(
                                "`{}` is a {}: write its name alone, without `view:`",
                                *input.view,
                                other.what()
                            )),
                            None => diagnostic
                                .nearest(&input.view, catalog.feature_views.iter().map(|view| view.name.as_str())),
                        });
                        continue;
                    };
                    if let Some(entity) = catalog.entity(&view.entity) {
                        self.keys_of(entity, &input.keys);
                    }
                    if let Some(alias) = &input.alias {
                        self.identifier("input", alias);
                    }
                    self.named_features(Addressed::View(view), input.features.as_deref().unwrap_or_default());
                    if self.is_taken_alias(entry)
                        && let Some(other) = self.addressed(input.address())
                    {
                        let message = format!("`{}` is the name of a {}", shown(input.address()), other.what());
                        let diagnostic = Diagnostic::error(message, input.address().span);
                        self.report(diagnostic.help("choose an alias that means nothing else"));
                    } else if let Some(first) = self.first_of_other_meaning(entry, inputs) {
                        let differs = if first.view == input.view { "with other keys" } else { "for another view" };
                        let message = format!("{of} already uses the name `{}` {differs}", shown(input.address()));
                        let diagnostic = Diagnostic::error(message, input.address().span);
                        let diagnostic = diagnostic.related("the first is here", first.address().span);
                        self.report(diagnostic.help("tell them apart by `as`"));
                    }
                }
            }
        }
    }

    /// Whether an input's alias is the name of something else.
    fn is_taken_alias(&self, input: &Input) -> bool {
        match input {
            Input::View(ViewInput { alias: Some(alias), view, .. }) => alias != view && self.addressed(alias).is_some(),
            _ => false,
        }
    }

    /// The first of the inputs that goes by the same name, where it is another view or the same under other keys.
    fn first_of_other_meaning<'n>(&self, input: &Input, inputs: &'n [Input]) -> Option<&'n ViewInput> {
        let Input::View(input) = input else { return None };
        let first = inputs.iter().find_map(|other| match other {
            Input::View(other) if other.address() == input.address() => Some(other),
            _ => None,
        });
        first.filter(|first| first.view != input.view || sorted(&first.keys) != sorted(&input.keys))
    }

    /// Features that a service or input names must be features of the object.
    fn named_features(&mut self, object: Addressed<'_>, names: &[Spanned<String>]) {
        let known = object.feature_names();
        // An object without features was reported where it is defined.
        if known.is_empty() {
            return;
        }
        for name in names.iter().filter(|name| !known.contains(name)) {
            let owner = match object {
                Addressed::View(view) => &view.name,
                Addressed::Request(request) => &request.name,
                Addressed::Transform(transform) => &transform.name,
            };
            let message = format!("{} `{}` has no feature `{}`", object.what(), **owner, shown(name));
            self.report(Diagnostic::error(message, name.span).nearest(name, known.iter().map(String::as_str)));
        }
    }

    /// Follows inputs from transform to transform; a path that comes back is reported once, at the input that closes it.
    fn transform_cycles(&mut self) {
        let catalog = self.catalog;
        let edges = |transform: &'a Transform| -> Vec<(&'a str, Span)> {
            let inputs = transform.inputs.iter().filter_map(|input| match input {
                Input::Name(name) => Some((name.as_str(), name.span)),
                Input::View(_) => None,
            });
            inputs.filter(|(name, _)| catalog.transform(name).is_some()).collect()
        };
        let graph = catalog.transforms.iter().map(|transform| (transform.name.as_str(), edges(transform))).collect();
        for (path, span) in cycles(&graph, catalog.transforms.iter().map(|transform| transform.name.as_str())) {
            let message = format!("transforms depend on each other in a circle: {}", path.join(" -> "));
            self.report(Diagnostic::error(message, span).help("a transform can only read what is computed before it"));
        }
    }

    fn vocabulary(&mut self, vocabulary: &Vocabulary) {
        let mut seen: HashSet<&str> = HashSet::new();
        for value in &vocabulary.values {
            if !seen.insert(value) {
                let message = format!("vocabulary `{}` has `{}` twice", *vocabulary.name, shown(value));
                self.report(Diagnostic::error(message, value.span).help("each value has one number"));
            }
        }
    }

    fn service(&mut self, service: &FeatureService) {
        let of = format!("feature service `{}`", *service.name);
        self.inputs(&of, &service.features);
        let mut seen: BTreeSet<(String, String)> = BTreeSet::new();
        for input in &service.features {
            let (object, names) = match input {
                Input::View(view) => (self.catalog.view(&view.view).map(Addressed::View), view.features.clone()),
                Input::Name(name) => {
                    let object = self.addressed(input.address());
                    match name.split_once(':') {
                        Some((_, feature)) if feature != "*" => {
                            let feature = Spanned::new(feature.to_string(), name.span);
                            if let Some(object) = object {
                                self.named_features(object, std::slice::from_ref(&feature));
                            }
                            (object, Some(vec![feature]))
                        }
                        _ => (object, None),
                    }
                }
            };
            let Some(object) = object else { continue };
            if self.first_of_other_meaning(input, &service.features).is_some() {
                continue;
            }
            let names = match names {
                Some(names) => names.into_iter().map(|name| name.value).collect(),
                None => object.feature_names(),
            };
            let twice: Vec<String> = names
                .into_iter()
                .filter(|name| !seen.insert((input.address().to_string(), name.clone())))
                .map(|name| format!("`{}:{}`", input.address(), shown(&name)))
                .collect();
            if let Some(first) = twice.first() {
                let more = if twice.len() > 1 { format!(" and {} more", twice.len() - 1) } else { String::new() };
                self.error(format!("{of} has {first}{more} twice"), input.span());
            }
        }
    }

    fn model(&mut self, model: &Model) {
        let catalog = self.catalog;
        let of = format!("model `{}`", *model.name);
        if catalog.service(&model.features).is_none() {
            self.unresolved(
                "feature service",
                &model.features,
                catalog.feature_services.iter().map(|service| &service.name),
            );
        }
        self.unique_in("input", &of, model.inputs.iter().map(|input| &input.name));
        let outputs = || model.outputs.iter().map(|output| &output.name);
        self.unique_in("output", &of, outputs().chain(model.post.iter().map(|post| &post.name)));
        for input in &model.inputs {
            let floats = input.dtype.is_float();
            let wrong = match input.missing {
                Missing::Nan if !floats => Some("cannot hold NaN".to_string()),
                Missing::Value(x) if !floats && x.fract() != 0.0 => Some(format!("cannot hold {x}")),
                _ => None,
            };
            if let Some(wrong) = wrong {
                let message = format!("`missing` does not fit: a tensor of `{}` {wrong}", input.dtype.value);
                self.error(message, input.dtype.span);
            }
        }
        let inputs: Vec<&str> = model.inputs.iter().map(|input| input.name.as_str()).collect();
        for name in model.placement.max_shape.keys().filter(|name| !inputs.contains(&name.as_str())) {
            let message = format!("`max_shape` of {of} names an input `{}` that it does not have", shown(name));
            self.report(Diagnostic::error(message, model.name.span).nearest(name, inputs.iter().copied()));
        }
        for device in &model.placement.devices {
            let index = device.strip_prefix("cuda:").map(|index| index.parse::<u16>().is_ok());
            if !(**device == "cpu" || **device == "cuda" || index == Some(true)) {
                let diagnostic = Diagnostic::error(format!("`{}` is not a device", shown(device)), device.span);
                self.report(diagnostic.help("use `cpu`, `cuda` or `cuda:<number>`"));
            }
        }
        self.unique_in("tier", &of, &model.slo.tiers);
        if let Some(tier) = model.slo.tiers.get(TIERS_MAX) {
            let message = format!("{of} has {} tiers", model.slo.tiers.len());
            let help = format!("use at most {TIERS_MAX}: each gets a quarter of the rows of the one above");
            self.report(Diagnostic::error(message, tier.span).help(help));
        }
        if let Some(label) = &model.label {
            self.identifier("label", &label.name);
        }
        self.fallback(model, &of);
        if let Some(canary) = &model.canary {
            match catalog.entity(&canary.unit) {
                None => self.unresolved("entity", &canary.unit, catalog.entities.iter().map(|entity| &entity.name)),
                Some(entity) if entity.keys.is_empty() => {
                    let message = format!("entity `{}` has no keys, so it cannot be randomised", *entity.name);
                    self.error(message, canary.unit.span);
                }
                Some(_) => {}
            }
            self.success(model, canary, &of);
        }
    }

    /// Metrics that compare versions: those that labels give, and a caller's own, which need a range.
    fn success(&mut self, model: &Model, canary: &Canary, of: &str) {
        /// Of a yes or no, and of a number.
        const OF_LABELS: [&str; 5] = ["log_loss", "brier", "error", "absolute_error", "squared_error"];
        let is_bool = model.label.as_ref().map(|label| label.label_type.value == Type::Bool);
        for success in &canary.success {
            let (metric, span) = (success.metric.as_str(), success.metric.span);
            let wrong = match metric {
                "log_loss" | "brier" | "error" => match is_bool {
                    Some(true) => None,
                    _ => Some((
                        format!("`{metric}` needs a label of type bool, which {of} does not declare"),
                        "declare `label: {name: ..., type: bool, within: ...}`",
                    )),
                },
                "absolute_error" | "squared_error" => match is_bool {
                    Some(false) if success.range.is_some() => None,
                    Some(false) => Some((
                        format!("`{metric}` has no range of its own"),
                        "say between what values lie: `{metric: absolute_error, range: [0, 100]}`",
                    )),
                    _ => Some((
                        format!("`{metric}` needs a label that is a number, which {of} does not declare"),
                        "declare `label: {name: ..., type: float64, within: ...}`",
                    )),
                },
                _ if success.range.is_some() => None,
                _ => Some((
                    format!("`{}` is a metric of your own, whose range is not known", shown(metric)),
                    "say between what values lie: `{metric: clicks, range: [0, 1], better: higher}`",
                )),
            };
            if let Some((message, help)) = wrong {
                let diagnostic = Diagnostic::error(message, span);
                let near = nearest(metric, OF_LABELS).filter(|near| *near != metric);
                let help = near.map_or_else(|| help.to_owned(), |near| format!("did you mean `{near}`? Else {help}"));
                self.report(diagnostic.help(help));
            }
            if metric == "error" && model.decision.is_none() {
                let message = format!("`error` needs a decision, which {of} does not declare");
                self.report(Diagnostic::error(message, span).help("declare `decision:`, such as `\"p > 0.5\"`"));
            }
        }
    }

    fn fallback(&mut self, model: &Model, of: &str) {
        let outputs = || model.outputs.iter().map(|output| &output.name);
        match &model.fallback {
            None => {}
            Some(Fallback::Model(name)) => match self.catalog.model(name) {
                None => self.unresolved("model", name, self.catalog.models.iter().map(|model| &model.name)),
                Some(other) => {
                    let has = |output: &Spanned<String>| other.outputs.iter().any(|theirs| theirs.name == *output);
                    if let Some(output) = outputs().find(|output| !has(output)) {
                        let message = format!("the fallback `{}` has no output `{}`", **name, **output);
                        self.report(
                            Diagnostic::error(message, name.span).help("a fallback answers with the same outputs"),
                        );
                    }
                }
            },
            Some(Fallback::Values(values)) => {
                for (output, _) in values.iter().filter(|(output, _)| !outputs().any(|name| name == output)) {
                    let message = format!("{of} has no output `{}`", shown(output));
                    let known = outputs().map(|name| name.as_str());
                    self.report(Diagnostic::error(message, output.span).nearest(output, known));
                }
                if let Some(output) = outputs().find(|name| !values.iter().any(|(output, _)| output == *name)) {
                    let span = values.first().map_or(model.name.span, |(output, _)| output.span);
                    self.error(format!("the fallback of {of} has no value for output `{}`", **output), span);
                }
            }
        }
    }

    fn fallback_cycles(&mut self) {
        let catalog = self.catalog;
        let edges = |model: &'a Model| match &model.fallback {
            Some(Fallback::Model(name)) if catalog.model(name).is_some() => vec![(name.as_str(), name.span)],
            _ => Vec::new(),
        };
        let graph = catalog.models.iter().map(|model| (model.name.as_str(), edges(model))).collect();
        for (path, span) in cycles(&graph, catalog.models.iter().map(|model| model.name.as_str())) {
            let message = format!("models fall back on each other in a circle: {}", path.join(" -> "));
            self.report(Diagnostic::error(message, span).help("the last model of a chain has values or none"));
        }
    }
}

type Graph<'a> = HashMap<&'a str, Vec<(&'a str, Span)>>;

/// The cycles of a graph, each once, as the path from its first node back to it, with the place of the closing edge.
/// Depth-first on a stack of its own: a long chain costs no call stack.
fn cycles<'a>(graph: &Graph<'a>, order: impl Iterator<Item = &'a str>) -> Vec<(Vec<String>, Span)> {
    let mut out = Vec::new();
    let mut done: HashSet<&str> = HashSet::new();
    for start in order {
        if done.contains(start) {
            continue;
        }
        let mut path: Vec<(&str, usize)> = vec![(start, 0)];
        let mut on_path: HashSet<&str> = HashSet::from([start]);
        while let Some((node, next)) = path.last_mut() {
            let edge = graph.get(node).and_then(|edges| edges.get(*next)).copied();
            *next += 1;
            match edge {
                None => {
                    done.insert(*node);
                    on_path.remove(*node);
                    path.pop();
                }
                Some((target, span)) if on_path.contains(target) => {
                    let from = path.iter().position(|(node, _)| *node == target).unwrap_or(0);
                    let mut cycle: Vec<String> = path[from..].iter().map(|(node, _)| node.to_string()).collect();
                    cycle.push(target.to_string());
                    out.push((cycle, span));
                }
                Some((target, _)) if done.contains(target) => {}
                Some((target, _)) => {
                    on_path.insert(target);
                    path.push((target, 0));
                }
            }
        }
    }
    out
}

/// A letter, then letters, digits and underscores.
pub fn is_identifier(name: &str) -> bool {
    name.len() <= NAME_CHARS_MAX
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn sorted(keys: &[(Spanned<String>, Spanned<String>)]) -> Vec<(&str, &str)> {
    let mut keys: Vec<(&str, &str)> = keys.iter().map(|(key, column)| (key.as_str(), column.as_str())).collect();
    keys.sort_unstable();
    keys
}

fn plural(what: &str) -> String {
    match what.strip_suffix('y') {
        Some(stem) if what != "key" => format!("{stem}ies"),
        _ => format!("{what}s"),
    }
}

#[cfg(test)]
mod tests;
