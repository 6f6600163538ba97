//! From a checked catalog to a plan: types expressions, resolves names, and computes digests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::aggregate::{Arguments, Buckets, Clamp, Function, Quantile};
use crate::catalog::{
    Catalog, Entity, Feature, FeatureView, Field, Files, Head, Hop, Input, Literal, ViewInput, ViewKind,
};
use crate::diagnose::{Diagnostic, Severity, Span, Spanned};
use crate::digest::Canonical;
use crate::expression::{self, Environment, ExpressionError};
use crate::window::{DAY, default_hop};

/// Columns of each source by name, as its files or its declaration have them.
pub type SourceSchemas = BTreeMap<String, Vec<(String, Type)>>;

/// Compiles a catalog that [`crate::check`] found no error in. All that is wrong is returned, not only the first.
pub fn compile(catalog: &Catalog, files: &Files, schemas: &SourceSchemas) -> Result<Plan, Vec<Diagnostic>> {
    let vocabularies: Vocabularies = catalog
        .vocabularies
        .iter()
        .map(|vocabulary| {
            let values: Vec<String> = vocabulary.values.iter().map(|value| value.value.clone()).collect();
            (vocabulary.name.value.clone(), Arc::from(values))
        })
        .collect();
    let forgotten = Arc::<ForgottenList>::default();
    let mut compiler = Compiler { catalog, files, vocabularies, diagnostics: Vec::new(), forgotten: forgotten.clone() };
    let mut plan = Plan {
        project: catalog.project.as_str().into(),
        sources: Vec::new(),
        views: Vec::new(),
        services: Vec::new(),
        models: Vec::new(),
        digest: Canonical::new("plan").digest(),
        forgotten,
    };
    for source in &catalog.sources {
        if let Some(source) = compiler.source(source, schemas) {
            plan.sources.push(Arc::new(source));
        }
    }
    for view in &catalog.feature_views {
        let Some(source) = plan.source(&view.source).cloned() else { continue };
        if let Some(view) = compiler.view(view, source) {
            plan.views.push(Arc::new(view));
        }
    }
    // A service over a view that did not compile would only repeat what is wrong with the view.
    if compiler.diagnostics.iter().all(|diagnostic| diagnostic.severity != Severity::Error) {
        for service in &catalog.feature_services {
            if let Some(service) = compiler.service(service, &plan.views) {
                plan.services.push(Arc::new(service));
            }
        }
        compiler.unused_transforms(&plan.views);
        for model in &catalog.models {
            let Some(service) = plan.service(&model.features).cloned() else { continue };
            if let Some(model) = compiler.model(model, service) {
                plan.models.push(Arc::new(model));
            }
        }
        compiler.fallbacks(&plan.models);
    }
    if compiler.diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
        return Err(compiler.diagnostics);
    }
    let mut digest = Canonical::new("plan").with("project", &plan.project);
    plan.sources.iter().for_each(|source| digest.add(&source.name, &source.digest));
    plan.views.iter().for_each(|view| digest.add(&view.name, &view.semantic_digest));
    plan.services.iter().for_each(|service| digest.add(&service.name, &service.semantic_digest));
    plan.models.iter().for_each(|model| digest.add(&model.name, &model.semantic_digest));
    plan.digest = digest.digest();
    Ok(plan)
}

struct Compiler<'a> {
    catalog: &'a Catalog,
    files: &'a Files,
    vocabularies: Vocabularies,
    diagnostics: Vec<Diagnostic>,
    forgotten: Arc<ForgottenList>,
}

pub(super) fn micros(duration: Duration) -> Micros {
    Micros::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}

/// What the engines that evaluate are: a change of any of these may change values, so it changes digests.
fn epochs(kind: &str) -> Canonical {
    Canonical::new(kind)
        .with("engine_epoch", expression::ENGINE_EPOCH)
        .with("function_epoch", expression::FUNCTION_EPOCH)
        .with("time_zone_database", expression::time_zone_database())
}

impl Compiler<'_> {
    fn report<T>(&mut self, diagnostic: Diagnostic) -> Option<T> {
        self.diagnostics.push(diagnostic);
        None
    }

    /// Compiles an expression; what is wrong with it points into the YAML text where that is possible.
    fn expression(
        &mut self,
        text: &Spanned<String>,
        environment: &Environment,
        declared: Option<&Type>,
    ) -> Option<Expression> {
        match Expression::compile(text, environment, declared) {
            Ok(expression) => Some(expression),
            Err(error) => {
                let span = self.place_in(text, &error);
                let mut diagnostic = Diagnostic::error(error.message, span);
                diagnostic.help = error.help;
                self.report(diagnostic)
            }
        }
    }

    /// The part of the YAML scalar that the error is about. Escapes and folded lines move bytes, so the part is named
    /// only when the scalar holds the expression verbatim.
    fn place_in(&self, text: &Spanned<String>, error: &ExpressionError) -> Span {
        let span = text.span;
        let part = || {
            let (start, end) = error.offset?;
            let file = self.files.files.get(span.file as usize)?;
            let scalar = file.text.get(span.start as usize..span.end as usize)?;
            let at = span.start as usize + scalar.find(text.as_str())?;
            Some(Span { file: span.file, start: (at + start) as u32, end: (at + end.max(start + 1)) as u32 })
        };
        part().unwrap_or(span)
    }

    fn source(&mut self, source: &catalog::Source, schemas: &SourceSchemas) -> Option<SourcePlan> {
        let declared: Vec<(String, Type)> =
            source.schema.iter().map(|field| (field.name.value.clone(), field.field_type.value.clone())).collect();
        let (kind, schema) = match &source.kind {
            catalog::SourceKind::Stream { event_id, history } => {
                let kind = SourceKind::Stream {
                    event_id: event_id.as_ref().map(|column| column.value.clone()),
                    history: history.as_ref().map(|pattern| pattern.value.clone()),
                };
                (kind, declared)
            }
            catalog::SourceKind::Files { pattern, is_static } => {
                let pattern = pattern.value.clone();
                let kind = if *is_static { SourceKind::Static { pattern } } else { SourceKind::Files { pattern } };
                match schemas.get(source.name.as_str()) {
                    Some(found) if declared.is_empty() => (kind, found.clone()),
                    Some(found) => {
                        for field in &source.schema {
                            if !found.iter().any(|(name, _)| *name == field.name.value) {
                                let known = found.iter().map(|(name, _)| name.as_str());
                                let message =
                                    format!("the files of source `{}` have no column `{}`", *source.name, *field.name);
                                self.report::<()>(
                                    Diagnostic::error(message, field.name.span).nearest(&field.name, known),
                                );
                            }
                        }
                        (kind, declared)
                    }
                    None if !declared.is_empty() => (kind, declared),
                    None => {
                        let message = format!("the columns of source `{}` are not known", *source.name);
                        let help =
                            "its files could not be read; declare `schema:` to define features before there are files";
                        return self.report(Diagnostic::error(message, source.name.span).help(help));
                    }
                }
            }
        };
        let mut environment = Environment::new();
        schema.iter().for_each(|(name, column_type)| environment.column(None, name, column_type.clone()));
        self.vocabularies.iter().for_each(|(name, values)| environment.vocabulary(name, values.clone()));
        for time in [&source.event_time, &source.created_time].into_iter().flatten() {
            match schema.iter().find(|(name, _)| *name == time.value) {
                Some((_, Type::Timestamp)) => {}
                Some((_, other)) => {
                    let message = format!("column `{}` is {other}, but a time must be a timestamp", **time);
                    self.report::<()>(Diagnostic::error(message, time.span));
                }
                None if source_is_stream(source) => {
                    // Streams need not repeat their time columns in `schema`.
                }
                None => {
                    let known = schema.iter().map(|(name, _)| name.as_str());
                    let message = format!("source `{}` has no column `{}`", *source.name, **time);
                    self.report::<()>(Diagnostic::error(message, time.span).nearest(time, known));
                }
            }
        }
        let mut schema = schema;
        if source_is_stream(source) {
            for time in [&source.event_time, &source.created_time].into_iter().flatten() {
                if !schema.iter().any(|(name, _)| *name == time.value) {
                    schema.push((time.value.clone(), Type::Timestamp));
                    environment.column(None, time, Type::Timestamp);
                }
            }
            if let catalog::SourceKind::Stream { event_id: Some(event_id), .. } = &source.kind
                && !schema.iter().any(|(name, _)| *name == event_id.value)
            {
                let known = schema.iter().map(|(name, _)| name.as_str());
                let message = format!("source `{}` has no column `{}`", *source.name, **event_id);
                self.report::<()>(Diagnostic::error(message, event_id.span).nearest(event_id, known));
            }
        }
        let deleted = match &source.deleted {
            Some(deleted) => Some(self.expression(deleted, &environment, Some(&Type::Bool))?),
            None => None,
        };
        let clock = SourceClock {
            has_created_time: source.created_time.is_some(),
            delay: micros(source.delay),
            every: source.every.map_or(0, micros),
        };
        let mut digest = Canonical::new("source").with("name", source.name.as_str());
        let kind_name = match &kind {
            SourceKind::Files { .. } => "files",
            SourceKind::Static { .. } => "static",
            SourceKind::Stream { .. } => "stream",
        };
        digest.add("source_kind", kind_name);
        digest.maybe("event_time", source.event_time.as_ref().map(|column| column.as_str()));
        digest.maybe("created_time", source.created_time.as_ref().map(|column| column.as_str()));
        digest.add("delay", clock.delay);
        digest.add("every", clock.every);
        digest.maybe("deleted", deleted.as_ref().map(Expression::canonical_text));
        deleted.iter().for_each(|deleted| self.add_vocabularies(&mut digest, deleted));
        if let SourceKind::Files { pattern } = &kind {
            // Other files are other rows: what was materialized from the old ones answers for nothing.
            digest.add("files", pattern);
        }
        Some(SourcePlan {
            name: source.name.as_str().into(),
            kind,
            schema,
            event_time: source.event_time.as_ref().map(|column| column.value.clone()),
            created_time: source.created_time.as_ref().map(|column| column.value.clone()),
            clock,
            deleted,
            visibility: source.visibility,
            digest: digest.digest(),
        })
    }

    fn view(&mut self, view: &FeatureView, source: Arc<SourcePlan>) -> Option<ViewPlan> {
        let before = self.diagnostics.len();
        let entity = self.catalog.entity(&view.entity)?;
        let mut environment = Environment::new();
        source.schema.iter().for_each(|(name, column_type)| environment.column(None, name, column_type.clone()));
        self.vocabularies.iter().for_each(|(name, values)| environment.vocabulary(name, values.clone()));

        let mut keys = Vec::new();
        for key in &entity.keys {
            let mapped = view.keys.iter().find(|(name, _)| name.value == key.name.value).map(|(_, column)| column);
            let column = mapped.map_or(key.name.as_str(), |column| column.as_str());
            let span = mapped.map_or(view.name.span, |column| column.span);
            match source.column_type(column) {
                Some(found) if *found == key.field_type.value => {}
                Some(Type::Int32) if key.field_type.value == Type::Int64 => {}
                Some(found) => {
                    let message = format!(
                        "column `{column}` of source `{}` is {found}, but key `{}` of entity `{}` is {}",
                        source.name, *key.name, *entity.name, *key.field_type
                    );
                    self.report::<()>(Diagnostic::error(message, span));
                }
                None => {
                    let known = source.schema.iter().map(|(name, _)| name.as_str());
                    let message = format!(
                        "source `{}` has no column `{column}` for key `{}` of entity `{}`",
                        source.name, *key.name, *entity.name
                    );
                    let mut diagnostic = Diagnostic::error(message, span).nearest(column, known);
                    if mapped.is_none() {
                        let hint = format!("say which column holds it: `keys: {{{}: <column>}}`", *key.name);
                        diagnostic.help = Some(match diagnostic.help {
                            Some(help) => format!("{hint}; {help}"),
                            None => hint,
                        });
                    }
                    self.report::<()>(diagnostic);
                }
            }
            keys.push(ViewKey {
                name: key.name.value.clone(),
                key_type: key.field_type.value.clone(),
                column: column.to_string(),
            });
        }
        let filter = view.filter.as_ref().map(|filter| self.expression(filter, &environment, Some(&Type::Bool)));
        let kind = match &view.kind {
            ViewKind::AsOf { ttl, keep, features } => {
                let ttl = ttl.map(micros);
                let keep = keep.map_or(ttl.unwrap_or(0).max(DAY), micros);
                let features =
                    features.iter().filter_map(|feature| self.view_feature(feature, &source, &environment)).collect();
                ViewPlanKind::AsOf { max_age: MaxAge { ttl, keep }, features }
            }
            ViewKind::Windowed { windows, hop, head, aggregates } => {
                if source.is_static() {
                    let message =
                        format!("source `{}` is static: its rows have no time, so no window holds them", source.name);
                    return self.report(Diagnostic::error(message, view.source.span));
                }
                self.windowed(windows, hop.as_ref(), *head, aggregates, &environment)?
            }
        };
        if self.diagnostics[before..].iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
            return None;
        }
        let filter = filter.flatten();
        let about = self.about(view, entity, &keys);

        let mut storage = epochs("view storage").with("source", source.digest.as_str());
        storage.add("entity_keys", keys.len());
        for key in &keys {
            storage.add("key_type", &key.key_type);
            storage.add("key_column", &key.column);
        }
        storage.maybe("where", filter.as_ref().map(Expression::canonical_text));
        filter.iter().for_each(|filter| self.add_vocabularies(&mut storage, filter));
        match &kind {
            ViewPlanKind::AsOf { features, .. } => {
                for feature in features {
                    storage.add("feature", feature.expression.canonical_text());
                    storage.add("type", &feature.feature_type);
                    self.add_vocabularies(&mut storage, &feature.expression);
                }
            }
            ViewPlanKind::Windowed { aggregates, windows, levels, .. } => {
                for aggregate in aggregates {
                    storage.add("function", aggregate.aggregate.function().name());
                    storage.maybe("of", aggregate.of.as_ref().map(Expression::canonical_text));
                    storage.maybe("input", aggregate.aggregate.input());
                    storage.maybe("where", aggregate.filter.as_ref().map(Expression::canonical_text));
                    storage.maybe("arguments", aggregate.aggregate.function().state_arguments());
                    storage.maybe("by", aggregate.by.as_ref().map(Expression::canonical_text));
                    storage.maybe("buckets", aggregate.aggregate.split().map(|(buckets, _)| buckets.canonical_text()));
                    aggregate.expressions().for_each(|expression| self.add_vocabularies(&mut storage, expression));
                }
                // Windows decide which tiles are kept, and with them what can be read.
                windows.iter().for_each(|window| storage.add("window", format!("{}/{:?}", window.length, window.hop)));
                storage.maybe("levels", levels.as_ref().map(|levels| format!("{:?}", levels.all())));
            }
        }
        let storage_digest = storage.digest();
        let mut semantic = epochs("view").with("name", view.name.as_str()).with("storage", storage_digest.as_str());
        semantic.add("entity", entity.name.as_str());
        if source.visibility != Visibility::Known {
            semantic.add("visibility", format!("{:?}", source.visibility));
        }
        keys.iter().for_each(|key| semantic.add("key", &key.name));
        match &kind {
            ViewPlanKind::AsOf { max_age, features } => {
                semantic.maybe("ttl", max_age.ttl);
                semantic.add("keep", max_age.keep);
                for feature in features {
                    semantic.add("feature", &feature.name);
                    semantic.maybe("default", feature.default.as_ref().map(|default| format!("{default:?}")));
                }
            }
            ViewPlanKind::Windowed { aggregates, outputs, .. } => {
                for output in outputs {
                    let function = aggregates[output.aggregate].aggregate.function();
                    semantic.add("feature", &output.name);
                    semantic.add(
                        "window",
                        format!("{}/{:?}/{:?}", output.window.length, output.window.hop, output.window.head),
                    );
                    semantic.add("aggregate", output.aggregate);
                    semantic.maybe("arguments", function.answer_arguments());
                    semantic.maybe("default", output.default.as_ref().map(|default| format!("{default:?}")));
                }
            }
        }
        Some(ViewPlan {
            name: view.name.as_str().into(),
            entity: entity.name.as_str().into(),
            source,
            keys,
            filter,
            freshness: view.freshness.map(micros),
            kind,
            storage_digest,
            semantic_digest: semantic.digest(),
            forgotten: self.forgotten.clone(),
            about,
        })
    }

    /// See [`ViewPlan::about`].
    fn about(&self, view: &FeatureView, entity: &Entity, keys: &[ViewKey]) -> Vec<KeyPart> {
        let mut about = vec![KeyPart { entity: entity.name.as_str().into(), keys: (0..keys.len()).collect() }];
        for other in self.catalog.feature_views.iter().filter(|other| other.source.value == view.source.value) {
            let Some(entity) = self.catalog.entity(&other.entity) else { continue };
            let place = |key: &Field| {
                let mapped = other.keys.iter().find(|(name, _)| name.value == key.name.value);
                let column = mapped.map_or(key.name.as_str(), |(_, column)| column.as_str());
                keys.iter().position(|known| known.column == column && known.key_type == key.field_type.value)
            };
            let Some(places) = entity.keys.iter().map(place).collect::<Option<Vec<usize>>>() else { continue };
            let part = KeyPart { entity: entity.name.as_str().into(), keys: places };
            if !part.keys.is_empty() && !about.contains(&part) {
                about.push(part);
            }
        }
        about
    }

    /// The vocabularies that an expression reads are part of what it means.
    fn add_vocabularies(&self, digest: &mut Canonical, expression: &Expression) {
        for name in expression.vocabularies() {
            digest.add("vocabulary", name);
            self.vocabularies
                .get(name)
                .into_iter()
                .flat_map(|values| values.iter())
                .for_each(|value| digest.add("value", value));
        }
    }

    fn view_feature(
        &mut self,
        feature: &Feature,
        source: &SourcePlan,
        environment: &Environment,
    ) -> Option<ViewFeature> {
        let declared = feature.feature_type.as_ref().map(|declared| &declared.value);
        let expression = match &feature.expr {
            Some(expr) => self.expression(expr, environment, declared)?,
            None => {
                let name = feature.name.as_str();
                if source.column_type(name).is_none() {
                    let known = source.schema.iter().map(|(name, _)| name.as_str());
                    let message = format!("source `{}` has no column `{name}`", source.name);
                    return self.report(Diagnostic::error(message, feature.name.span).nearest(name, known));
                }
                let text = Spanned::new(format!("\"{}\"", name.replace('"', "\"\"")), feature.name.span);
                self.expression(&text, environment, declared)?
            }
        };
        let feature_type = expression.value_type().clone();
        let default = self.default(feature.default.as_ref(), &feature_type)?;
        Some(ViewFeature { name: feature.name.value.clone(), feature_type, expression, default })
    }

    /// The outer None: something was wrong. The inner None: no default.
    #[expect(clippy::option_option, reason = "absent and wrong are different answers")]
    fn default(&mut self, default: Option<&Spanned<Literal>>, value_type: &Type) -> Option<Option<Value>> {
        let Some(literal) = default else { return Some(None) };
        match literal.to_value(value_type) {
            Ok(value) => Some(Some(value)),
            Err(error) => self.report(Diagnostic::error(format!("the default does not fit: {error}"), literal.span)),
        }
    }

    fn windowed(
        &mut self,
        view_windows: &[Spanned<catalog::WindowLength>],
        hop: Option<&Spanned<Hop>>,
        head: Head,
        definitions: &[catalog::AggregateDef],
        environment: &Environment,
    ) -> Option<ViewPlanKind> {
        let mut aggregates = Vec::new();
        let mut outputs = Vec::new();
        let mut windows: Vec<Window> = Vec::new();
        for definition in definitions {
            let of = match &definition.of {
                Some(of) => match self.expression(of, environment, None) {
                    Some(of) => Some(of),
                    None => continue,
                },
                None => None,
            };
            let Some(aggregate) = self.aggregate(definition, of.as_ref()) else { continue };
            let filter = match &definition.filter {
                Some(filter) => match self.expression(filter, environment, Some(&Type::Bool)) {
                    Some(filter) => Some(filter),
                    None => continue,
                },
                None => None,
            };
            let (aggregate, by) = match &definition.parameters.by {
                Some(by) => match self.split(aggregate, by, environment) {
                    Some((aggregate, by)) => (aggregate, Some(by)),
                    None => continue,
                },
                None => (aggregate, None),
            };
            let feature_type = aggregate.output();
            let Some(default) = self.default(definition.default.as_ref(), &feature_type) else { continue };
            for length in definition.windows_in(view_windows) {
                let micros = micros(length.duration);
                let hop = match hop.map(|hop| hop.value) {
                    Some(Hop::None) => None,
                    Some(Hop::Every(every)) => Some(self::micros(every)),
                    None => Some(default_hop(micros)),
                };
                let window = Window { length: micros, hop, head };
                if !windows.contains(&window) {
                    windows.push(window);
                }
                outputs.push(WindowOutput {
                    name: definition.feature_name(length),
                    aggregate: aggregates.len(),
                    window,
                    feature_type: feature_type.clone(),
                    default: default.clone(),
                });
            }
            aggregates.push(ViewAggregate { name: definition.name.value.clone(), aggregate, of, filter, by });
        }
        let hops: Option<Vec<Micros>> = windows.iter().map(|window| window.hop).collect();
        let levels = match hops {
            None => None,
            Some(hops) => match Levels::new(hops) {
                Ok(levels) => Some(levels),
                Err(error) => {
                    let span = hop.map(|hop| hop.span).or(view_windows.first().map(|window| window.span));
                    return self.report(Diagnostic::error(error.to_string(), span.unwrap_or_default()));
                }
            },
        };
        Some(ViewPlanKind::Windowed { aggregates, outputs, windows, levels })
    }

    /// The function with its arguments over what it aggregates.
    fn aggregate(&mut self, definition: &catalog::AggregateDef, of: Option<&Expression>) -> Option<Aggregate> {
        let catalog::AggregateParameters { q, clamp, n, k, edges, values, by: _ } = &definition.parameters;
        let buckets = match of {
            Some(of) if edges.is_some() || values.is_some() => {
                Some(self.buckets(of.value_type(), edges.as_ref(), values.as_ref())?)
            }
            _ => None,
        };
        let arguments = Arguments {
            q: q.as_ref().and_then(|q| Quantile::new(q.value)),
            clamp: clamp.as_ref().and_then(|clamp| Clamp::new(clamp.value.0, clamp.value.1)),
            n: n.as_ref().map(|n| n.value),
            k: k.as_ref().map(|k| k.value),
            buckets,
        };
        let function = match Function::new(&definition.function, arguments) {
            Ok(function) => function,
            Err(error) => return self.report(Diagnostic::error(error.to_string(), definition.function.span)),
        };
        match Aggregate::new(function, of.map(|of| of.value_type().clone())) {
            Ok(aggregate) => Some(aggregate),
            Err(error) => {
                let span = definition.of.as_ref().map_or(definition.function.span, |of| of.span);
                self.report(Diagnostic::error(error.to_string(), span))
            }
        }
    }

    /// The aggregate of each part, and what tells the parts apart.
    fn split(
        &mut self,
        aggregate: Aggregate,
        by: &catalog::By,
        environment: &Environment,
    ) -> Option<(Aggregate, Expression)> {
        let expression = self.expression(&by.of, environment, None)?;
        let buckets = self.buckets(expression.value_type(), by.edges.as_ref(), by.values.as_ref())?;
        match aggregate.by(buckets) {
            Ok(split) => Some((split, expression)),
            Err(error) => self.report(Diagnostic::error(error.to_string(), by.span)),
        }
    }

    fn buckets(
        &mut self,
        input: &Type,
        edges: Option<&Spanned<Vec<f64>>>,
        values: Option<&Spanned<Vec<Literal>>>,
    ) -> Option<Buckets> {
        let (made, span) = match (edges, values) {
            (Some(edges), _) => (Buckets::edges(input.clone(), edges.value.clone()), edges.span),
            (None, Some(literals)) => {
                let mut values = Vec::with_capacity(literals.len());
                for literal in literals.iter() {
                    // What the buckets cannot be of is said below, once.
                    match literal.to_value(input) {
                        Ok(value) => values.push(value),
                        Err(error) if !input.is_float() => {
                            let message = format!("a value of `values` does not fit: {error}");
                            return self.report(Diagnostic::error(message, literals.span));
                        }
                        Err(_) => {}
                    }
                }
                (Buckets::values(input.clone(), values), literals.span)
            }
            // Reported by the check.
            (None, None) => return None,
        };
        match made {
            Ok(buckets) => Some(buckets),
            Err(error) => self.report(Diagnostic::error(error.to_string(), span)),
        }
    }

    fn service(&mut self, service: &catalog::FeatureService, views: &[Arc<ViewPlan>]) -> Option<ServicePlan> {
        let before = self.diagnostics.len();
        let mut builder = ServiceBuilder::new(self, views);
        builder.declare(&service.features);
        let mut outputs: Vec<ServiceOutput> = Vec::new();
        for line in &service.features {
            for (output, span) in builder.line(line) {
                if outputs.iter().any(|other| other.name == output.name) {
                    let message = format!("feature `{}` is listed twice", output.name);
                    builder.compiler.report::<()>(Diagnostic::error(message, span));
                } else {
                    outputs.push(output);
                }
            }
        }
        let ServiceBuilder { inputs, columns, transforms, .. } = builder;
        if self.diagnostics[before..].iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
            return None;
        }
        let mut digest = epochs("service").with("name", service.name.as_str());
        for column in &columns {
            digest.add("column", &column.name);
            digest.add("type", &column.column_type);
            digest.add("nullable", column.nullable);
        }
        for input in &inputs {
            digest.add("alias", &input.alias);
            digest.add("view", &input.view.semantic_digest);
            input.keys.iter().for_each(|key| digest.add("key", &columns[*key].name));
        }
        for transform in &transforms {
            digest.add("transform", &transform.address);
            digest.add("type", &transform.feature_type);
            self.add_vocabularies(&mut digest, &transform.expression);
            digest.add("expression", transform.expression.canonical_text());
            transform.reads.iter().for_each(|slot| digest.add("reads", format!("{slot:?}")));
            digest.maybe("default", transform.default.as_ref().map(|default| format!("{default:?}")));
        }
        for output in &outputs {
            digest.add("output", &output.name);
            digest.add("type", &output.feature_type);
        }
        let semantic_digest = digest.digest();
        let mut plan =
            ServicePlan { name: service.name.as_str().into(), columns, inputs, transforms, outputs, semantic_digest };
        sensitive::mark(self.catalog, &mut plan);
        Some(plan)
    }

    /// Transforms that no service reads are compiled all the same, so that `validate` finds what is wrong with them.
    fn unused_transforms(&mut self, views: &[Arc<ViewPlan>]) {
        for transform in &self.catalog.transforms {
            let known = self.diagnostics.len();
            let mut builder = ServiceBuilder::new(self, views);
            for feature in &transform.features {
                builder.transform_feature(transform, feature);
            }
            // What a service already reported is not said twice.
            let fresh = self.diagnostics.split_off(known);
            for diagnostic in fresh {
                let said = |other: &Diagnostic| other.span == diagnostic.span && other.message == diagnostic.message;
                if !self.diagnostics.iter().any(said) {
                    self.diagnostics.push(diagnostic);
                }
            }
        }
    }

    fn model(&mut self, model: &catalog::Model, service: Arc<ServicePlan>) -> Option<ModelPlan> {
        let before = self.diagnostics.len();
        let inputs: Vec<TensorPlan> = model.inputs.iter().filter_map(|input| self.tensor(input, &service)).collect();
        let mut environment = Environment::new();
        self.vocabularies.iter().for_each(|(name, values)| environment.vocabulary(name, values.clone()));
        let mut names: Vec<String> = Vec::new();
        let mut outputs = Vec::new();
        for output in &model.outputs {
            match TensorType::from_type(&output.dtype) {
                Some(dtype) => {
                    environment.column(None, &output.name, output.dtype.value.clone());
                    names.push(output.name.value.clone());
                    outputs.push(ModelOutput { name: output.name.value.clone(), dtype });
                }
                None => {
                    let message = format!("an output cannot be {}", *output.dtype);
                    let help = "outputs are float32, float64, int32, int64 or bool";
                    self.report::<()>(Diagnostic::error(message, output.dtype.span).help(help));
                }
            }
        }
        let reads_of = |expression: &Expression, names: &[String]| -> Vec<usize> {
            let columns = expression.columns().iter();
            columns.filter_map(|column| names.iter().position(|name| *name == column.name)).collect()
        };
        let mut post = Vec::new();
        for feature in &model.post {
            let Some(expr) = &feature.expr else {
                let message = format!("`post` feature `{}` has no `expr`", *feature.name);
                self.report::<()>(Diagnostic::error(message, feature.name.span));
                continue;
            };
            let declared = feature.feature_type.as_ref().map(|declared| &declared.value);
            let Some(expression) = self.expression(expr, &environment, declared) else { continue };
            let reads = reads_of(&expression, &names);
            let feature_type = expression.value_type().clone();
            environment.column(None, &feature.name, feature_type.clone());
            names.push(feature.name.value.clone());
            post.push(PostFeature { name: feature.name.value.clone(), feature_type, expression, reads });
        }
        let decision = match &model.decision {
            Some(decision) => self.expression(decision, &environment, Some(&Type::Bool)),
            None => None,
        };
        let decision_reads = decision.as_ref().map_or_else(Vec::new, |decision| reads_of(decision, &names));
        let label = model.label.as_ref().map(|label| LabelPlan {
            name: label.name.value.clone(),
            label_type: label.label_type.value.clone(),
            within: label.within.map(micros),
        });
        let (fallback, fallback_model) = match &model.fallback {
            None => (None, None),
            Some(catalog::Fallback::Model(name)) => (None, Some(name.value.clone())),
            Some(catalog::Fallback::Values(values)) => {
                let mut fallback = Vec::new();
                for output in &model.outputs {
                    match values.iter().find(|(name, _)| name.value == output.name.value) {
                        Some((_, value)) => fallback.push(*value),
                        None => {
                            let message = format!("the fallback has no value for output `{}`", *output.name);
                            let span = values.first().map_or(model.name.span, |(name, _)| name.span);
                            self.report::<()>(Diagnostic::error(message, span));
                        }
                    }
                }
                (Some(fallback), None)
            }
        };
        let max_rows = self.rows_of_largest_shape(model, &inputs);
        if self.diagnostics[before..].iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
            return None;
        }
        let mut digest = epochs("model").with("name", model.name.as_str()).with("service", &service.semantic_digest);
        for input in &inputs {
            digest.add("input", &input.name);
            digest.add("dtype", format!("{:?}", input.dtype));
            digest.add("missing", format!("{:?}", input.missing));
            input.features.iter().for_each(|feature| digest.add("feature", &service.outputs[*feature].name));
        }
        for output in &outputs {
            digest.add("output", &output.name);
            digest.add("dtype", format!("{:?}", output.dtype));
        }
        for feature in &post {
            digest.add("post", &feature.name);
            digest.add("expression", feature.expression.canonical_text());
            self.add_vocabularies(&mut digest, &feature.expression);
        }
        let rollout = RolloutPlan {
            shadow: model.shadow.clone(),
            canary: model.canary.clone(),
            keep_previous: model.keep_previous.map(micros),
            unit: self.unit(model, &service),
        };
        digest.maybe("decision", decision.as_ref().map(Expression::canonical_text));
        decision.iter().for_each(|decision| self.add_vocabularies(&mut digest, decision));
        Some(ModelPlan {
            name: model.name.as_str().into(),
            service,
            runtime: model.runtime,
            inputs,
            outputs,
            post,
            decision,
            decision_reads,
            label,
            fallback,
            fallback_model,
            executors: model.placement.executors,
            threads: model.placement.threads,
            devices: model.placement.devices.iter().map(|device| device.value.clone()).collect(),
            max_rows,
            max_queue_rows: model.batching.max_queue_rows,
            batching: model.batching.policy,
            deadline: model.slo.deadline.map(micros),
            tiers: model.slo.tiers.iter().map(|tier| tier.value.clone()).collect(),
            rollout,
            cache: model.cache,
            semantic_digest: digest.digest(),
        })
    }

    /// The key of the entity that a canary randomises, by the columns of the service: those that a view of the entity is read
    /// by, else those of the keys' names.
    fn unit(&mut self, model: &catalog::Model, service: &ServicePlan) -> Vec<UnitKey> {
        let entity = model.canary.as_ref().and_then(|canary| self.catalog.entity(&canary.unit));
        let Some(entity) = entity else { return Vec::new() };
        let read = service.inputs.iter().find(|input| *input.view.entity == *entity.name.as_str());
        let key = |(index, key): (usize, &Field)| {
            let by_view = read.and_then(|input| input.keys.get(index)).copied();
            let column = by_view.or_else(|| service.columns.iter().position(|column| column.name == key.name.as_str()));
            let name = column.map_or_else(|| key.name.value.clone(), |column| service.columns[column].name.clone());
            UnitKey { name, key_type: key.field_type.value.clone(), column }
        };
        entity.keys.iter().enumerate().map(key).collect()
    }

    /// A model that answers in place of another is asked with the rows of that request, and its outputs are taken for the
    /// other's.
    fn fallbacks(&mut self, models: &[Arc<ModelPlan>]) {
        for model in models {
            let of = self.catalog.model(&model.name);
            let Some(catalog::Fallback::Model(named)) = of.and_then(|of| of.fallback.as_ref()) else { continue };
            let Some(other) = models.iter().find(|other| *other.name == **named) else { continue };
            for column in &other.service.columns {
                let has = |own: &&RequestColumn| own.name == column.name && own.column_type == column.column_type;
                if model.service.columns.iter().any(|own| has(&own)) || (column.nullable && !column.is_key) {
                    continue;
                }
                let message = format!(
                    "the fallback `{}` needs `{}` ({}), which requests for model `{}` do not carry",
                    other.name, column.name, column.column_type, model.name
                );
                let help = format!("let `{}` read features of the same keys and request fields", other.name);
                self.report::<()>(Diagnostic::error(message, named.span).help(help));
            }
            for output in &model.outputs {
                let theirs = other.outputs.iter().find(|theirs| theirs.name == output.name);
                if let Some(theirs) = theirs.filter(|theirs| theirs.dtype != output.dtype) {
                    let (own, theirs) = (output.dtype.value_type(), theirs.dtype.value_type());
                    let message =
                        format!("output `{}` is {own}, but {theirs} in the fallback `{}`", output.name, other.name);
                    self.report::<()>(
                        Diagnostic::error(message, named.span).help("a fallback answers with the same outputs"),
                    );
                }
            }
        }
    }

    /// The rows of the largest batch: those of `batching`, and no more than the declared largest shapes have. No batch is
    /// larger than what memory is reserved for.
    fn rows_of_largest_shape(&mut self, model: &catalog::Model, inputs: &[TensorPlan]) -> u32 {
        let mut max_rows = model.batching.max_rows;
        for (name, shape) in &model.placement.max_shape {
            let Some(input) = inputs.iter().find(|input| input.name == *name) else { continue };
            let mistake = match shape[..] {
                [rows, width] => {
                    max_rows = max_rows.min(u32::try_from(rows).unwrap_or(u32::MAX));
                    (input.width as u64 > width)
                        .then(|| format!("input `{name}` is {} wide, but its `max_shape` says {width}", input.width))
                }
                _ => Some(format!("the `max_shape` of input `{name}` has {} numbers", shape.len())),
            };
            if let Some(mistake) = mistake {
                let help = format!("write rows and width: `{name}: [{max_rows}, {}]`", input.width);
                self.report::<()>(Diagnostic::error(mistake, model.name.span).help(help));
            }
        }
        max_rows.max(1)
    }

    fn tensor(&mut self, input: &catalog::ModelInput, service: &ServicePlan) -> Option<TensorPlan> {
        let Some(dtype) = TensorType::from_type(&input.dtype) else {
            let message = format!("an input tensor cannot be {}", *input.dtype);
            let help = "tensors are float32, float64, int32, int64 or bool";
            return self.report(Diagnostic::error(message, input.dtype.span).help(help));
        };
        let mut features: Vec<usize> = Vec::new();
        for pattern in &input.features {
            let (negated, wanted) = match pattern.strip_prefix('!') {
                Some(rest) => (true, rest),
                None => (false, pattern.as_str()),
            };
            let matches = |name: &str| match wanted.strip_suffix('*') {
                Some("") => true,
                Some(prefix) => prefix.ends_with(':') && name.starts_with(prefix),
                None => name == wanted,
            };
            let matched: Vec<usize> =
                (0..service.outputs.len()).filter(|output| matches(&service.outputs[*output].name)).collect();
            if matched.is_empty() {
                let message = format!("no feature of service `{}` is `{wanted}`", service.name);
                let known = service.outputs.iter().map(|output| output.name.as_str());
                self.report::<()>(Diagnostic::error(message, pattern.span).nearest(wanted, known));
            } else if negated {
                features.retain(|feature| !matched.contains(feature));
            } else {
                features
                    .extend(matched.iter().filter(|output| !features.contains(output)).copied().collect::<Vec<_>>());
            }
        }
        let mut width = 0;
        for feature in &features {
            let output = &service.outputs[*feature];
            let fits = match (&output.feature_type, dtype) {
                (Type::Vector(_), TensorType::Float32 | TensorType::Float64) => true,
                (Type::Bool, _) => true,
                (Type::Int32, TensorType::Bool) | (Type::Int64, TensorType::Bool | TensorType::Int32) => false,
                (Type::Int32 | Type::Int64, _) => true,
                (Type::Float32 | Type::Float64 | Type::Decimal { .. }, TensorType::Float32 | TensorType::Float64) => {
                    true
                }
                _ => false,
            };
            if !fits {
                let message = format!(
                    "feature `{}` is {} and cannot be part of the {} input `{}`",
                    output.name, output.feature_type, *input.dtype, *input.name
                );
                let help = match output.feature_type {
                    Type::String => {
                        format!(
                            "number it with `vocab({}, '...')` in a transform, or leave it out: `!{}`",
                            output.name, output.name
                        )
                    }
                    _ => format!("leave it out: `!{}`", output.name),
                };
                let span = input.features.first().map_or(input.name.span, |pattern| pattern.span);
                self.report::<()>(Diagnostic::error(message, span).help(help));
            }
            width += if let Type::Vector(n) = output.feature_type { n as usize } else { 1 };
        }
        if let (catalog::Missing::Nan, TensorType::Int32 | TensorType::Int64 | TensorType::Bool) =
            (input.missing, dtype)
        {
            let message = format!("`missing: nan` needs a float input, but `{}` is {}", *input.name, *input.dtype);
            self.report::<()>(Diagnostic::error(message, input.name.span));
        }
        Some(TensorPlan { name: input.name.value.clone(), dtype, features, width, missing: input.missing })
    }
}

fn source_is_stream(source: &catalog::Source) -> bool {
    matches!(source.kind, catalog::SourceKind::Stream { .. })
}

/// Puts one service together on demand: only what its outputs need is read.
struct ServiceBuilder<'c, 'a> {
    compiler: &'c mut Compiler<'a>,
    views: &'c [Arc<ViewPlan>],
    /// Aliases that lines of the service and inputs of its transforms declare.
    declared: BTreeMap<String, ViewInput>,
    inputs: Vec<ServiceInput>,
    columns: Vec<RequestColumn>,
    transforms: Vec<TransformFeature>,
    /// Transforms being resolved, to stop at cycles (which `check` has reported).
    resolving: Vec<String>,
}

impl<'c, 'a> ServiceBuilder<'c, 'a> {
    fn new(compiler: &'c mut Compiler<'a>, views: &'c [Arc<ViewPlan>]) -> Self {
        ServiceBuilder {
            compiler,
            views,
            declared: BTreeMap::new(),
            inputs: Vec::new(),
            columns: Vec::new(),
            transforms: Vec::new(),
            resolving: Vec::new(),
        }
    }

    fn declare(&mut self, lines: &[Input]) {
        for line in lines {
            if let Input::View(view) = line {
                self.declared.insert(view.address().value.clone(), view.clone());
            }
        }
        for line in lines {
            if let Input::Name(name) = line
                && let Some(transform) = self.compiler.catalog.transform(line.address())
            {
                let _ = name;
                self.declare_inputs(transform, 0);
            }
        }
    }

    fn declare_inputs(&mut self, transform: &catalog::Transform, depth: usize) {
        for input in &transform.inputs {
            match input {
                Input::View(view) => self.declare_input(transform, view),
                Input::Name(name) => {
                    // Depth is bounded by the number of transforms unless there is a cycle.
                    if let Some(inner) = self.compiler.catalog.transform(name)
                        && depth <= self.compiler.catalog.transforms.len()
                    {
                        self.declare_inputs(inner, depth + 1);
                    }
                }
            }
        }
    }

    /// One name means one view under one set of keys throughout a service: a transform that meant another would silently
    /// read the first.
    fn declare_input(&mut self, transform: &catalog::Transform, view: &ViewInput) {
        let keys = |input: &ViewInput| {
            let pairs = input.keys.iter().map(|(name, column)| (name.value.clone(), column.value.clone()));
            pairs.collect::<BTreeMap<String, String>>()
        };
        let address = view.address();
        match self.declared.get(address.as_str()) {
            Some(first) if first.view != view.view || keys(first) != keys(view) => {
                let message = format!(
                    "transform `{}` reads `{}` as something else than another part of the same service does",
                    *transform.name, **address
                );
                let diagnostic = Diagnostic::error(message, address.span);
                self.compiler.report::<()>(diagnostic.help("give one of them a name of its own with `as`"));
            }
            Some(_) => {}
            None => {
                self.declared.insert(address.value.clone(), view.clone());
            }
        }
    }

    /// The features that one line of the service names.
    fn line(&mut self, line: &Input) -> Vec<(ServiceOutput, Span)> {
        let (wanted, span): (Option<Vec<Spanned<String>>>, Span) = match line {
            Input::View(view) => (view.features.clone(), view.view.span),
            Input::Name(name) => match name.split_once(':') {
                None | Some((_, "*")) => (None, name.span),
                Some((_, feature)) => (Some(vec![Spanned::new(feature.to_string(), name.span)]), name.span),
            },
        };
        let object = line.address().to_string();
        let all: Vec<String> = match self.features_of(&object) {
            Some(all) => all,
            None => {
                let message = format!("there is no view, request or transform `{object}`");
                let known: Vec<String> = self.known_objects();
                let diagnostic = Diagnostic::error(message, span).nearest(&object, known.iter().map(String::as_str));
                self.compiler.report::<()>(diagnostic);
                return Vec::new();
            }
        };
        let wanted = wanted.unwrap_or_else(|| all.iter().map(|name| Spanned::new(name.clone(), span)).collect());
        let mut outputs = Vec::new();
        for feature in wanted {
            if !all.contains(&feature.value) {
                let message = format!("`{object}` has no feature `{}`", *feature);
                let diagnostic = Diagnostic::error(message, feature.span);
                self.compiler.report::<()>(diagnostic.nearest(&feature, all.iter().map(String::as_str)));
                continue;
            }
            if let Some((slot, feature_type)) = self.slot(&object, &feature, feature.span) {
                let name = format!("{object}:{}", *feature);
                outputs.push((ServiceOutput { name, feature_type, slot, sensitive: false }, feature.span));
            }
        }
        outputs
    }

    fn known_objects(&self) -> Vec<String> {
        let catalog = self.compiler.catalog;
        let views = catalog.feature_views.iter().map(|view| view.name.value.clone());
        let requests = catalog.requests.iter().map(|request| request.name.value.clone());
        let transforms = catalog.transforms.iter().map(|transform| transform.name.value.clone());
        views.chain(requests).chain(transforms).chain(self.declared.keys().cloned()).collect()
    }

    fn features_of(&self, object: &str) -> Option<Vec<String>> {
        let catalog = self.compiler.catalog;
        if let Some(view) = self.view_of(object) {
            return Some(view.features().iter().map(|(name, _, _)| name.to_string()).collect());
        }
        if let Some(request) = catalog.request(object) {
            return Some(request.fields.iter().map(|field| field.name.value.clone()).collect());
        }
        let transform = catalog.transform(object)?;
        Some(transform.features.iter().map(|feature| feature.name.value.clone()).collect())
    }

    fn view_of(&self, object: &str) -> Option<Arc<ViewPlan>> {
        let name = self.declared.get(object).map_or(object, |input| input.view.as_str());
        self.views.iter().find(|view| &*view.name == name).cloned()
    }

    /// Where the value of `object:feature` comes from, and its type.
    fn slot(&mut self, object: &str, feature: &str, span: Span) -> Option<(Slot, Type)> {
        if self.view_of(object).is_some() {
            let input = self.input(object, span)?;
            let view = self.inputs[input].view.clone();
            let features = view.features();
            let index = features.iter().position(|(name, _, _)| *name == feature)?;
            return Some((Slot::Feature { input, feature: index }, features[index].1.clone()));
        }
        let catalog = self.compiler.catalog;
        if let Some(request) = catalog.request(object) {
            let field = request.fields.iter().find(|field| *field.name == feature)?;
            let address = Some(format!("{object}:{feature}"));
            let column = self.column(feature, &field.field_type, field.nullable, false, address, field.name.span)?;
            return Some((Slot::Request(column), field.field_type.value.clone()));
        }
        let transform = catalog.transform(object)?;
        let definition = transform.features.iter().find(|candidate| *candidate.name == feature)?;
        let index = self.transform_feature(transform, definition)?;
        Some((Slot::Transform(index), self.transforms[index].feature_type.clone()))
    }

    /// The input that reads a view under an alias; made when first needed.
    fn input(&mut self, alias: &str, span: Span) -> Option<usize> {
        if let Some(index) = self.inputs.iter().position(|input| input.alias == alias) {
            return Some(index);
        }
        let view = self.view_of(alias)?;
        let declared = self.declared.get(alias).cloned();
        let mut keys = Vec::new();
        for key in &view.keys {
            let mapped = declared.as_ref().and_then(|input| {
                input.keys.iter().find(|(name, _)| name.value == key.name).map(|(_, column)| column.value.clone())
            });
            let column = mapped.unwrap_or_else(|| key.name.clone());
            keys.push(self.column(&column, &key.key_type, true, true, None, span)?);
        }
        self.inputs.push(ServiceInput { alias: alias.to_string(), view, keys });
        Some(self.inputs.len() - 1)
    }

    fn column(
        &mut self,
        name: &str,
        column_type: &Type,
        nullable: bool,
        is_key: bool,
        address: Option<String>,
        span: Span,
    ) -> Option<usize> {
        if let Some(index) = self.columns.iter().position(|column| column.name == name) {
            let column = &mut self.columns[index];
            if column.column_type != *column_type {
                let message = format!(
                    "request column `{name}` would have to be {} and {column_type} at once",
                    column.column_type
                );
                return self.compiler.report(Diagnostic::error(message, span));
            }
            column.is_key |= is_key;
            // A field that must not be null stays so when it is a key as well.
            column.nullable &= nullable || is_key;
            column.address = column.address.take().or(address);
            return Some(index);
        }
        let name = name.to_string();
        let column_type = column_type.clone();
        self.columns.push(RequestColumn { name, column_type, nullable, is_key, address, sensitive: false });
        Some(self.columns.len() - 1)
    }

    fn transform_feature(&mut self, transform: &catalog::Transform, feature: &Feature) -> Option<usize> {
        let address = format!("{}:{}", *transform.name, *feature.name);
        if let Some(index) = self.transforms.iter().position(|other| other.address == address) {
            return Some(index);
        }
        if self.resolving.contains(&address) {
            return None;
        }
        let Some(expr) = &feature.expr else {
            let message = format!("feature `{}` of transform `{}` has no `expr`", *feature.name, *transform.name);
            return self.compiler.report(Diagnostic::error(message, feature.name.span));
        };
        self.resolving.push(address.clone());
        let index = self.transform_expression(transform, feature, expr, address);
        self.resolving.pop();
        index
    }

    fn transform_expression(
        &mut self,
        transform: &catalog::Transform,
        feature: &Feature,
        expr: &Spanned<String>,
        address: String,
    ) -> Option<usize> {
        let catalog = self.compiler.catalog;
        let mut environment = Environment::new();
        environment.request_time();
        self.compiler.vocabularies.iter().for_each(|(name, values)| environment.vocabulary(name, values.clone()));
        for input in &transform.inputs {
            let relation = input.address();
            if let Input::View(view) = input {
                self.declared.entry(relation.to_string()).or_insert_with(|| view.clone());
            }
            if let Some(view) = self.view_of(relation) {
                for (name, feature_type, _) in view.features() {
                    environment.column(Some(relation), name, feature_type.clone());
                }
                environment.relation_times(relation);
            } else if let Some(request) = catalog.request(relation) {
                for field in &request.fields {
                    environment.column(Some(relation), &field.name, field.field_type.value.clone());
                }
            } else if let Some(inner) = catalog.transform(relation) {
                // Types of inner features are known once they are compiled.
                for inner_feature in &inner.features {
                    if let Some(index) = self.transform_feature(inner, inner_feature) {
                        let feature_type = self.transforms[index].feature_type.clone();
                        environment.column(Some(relation), &inner_feature.name, feature_type);
                    }
                }
            }
        }
        let declared = feature.feature_type.as_ref().map(|declared| &declared.value);
        let expression = self.compiler.expression(expr, &environment, declared)?;
        let mut reads = Vec::new();
        for column in expression.columns() {
            let slot = match &column.relation {
                None => Slot::At,
                Some(relation) if column.name == expression::EVENT_TIME_COLUMN => {
                    Slot::EventTime { input: self.input(relation, expr.span)? }
                }
                Some(relation) => self.slot(relation, &column.name, expr.span)?.0,
            };
            reads.push(slot);
        }
        let feature_type = expression.value_type().clone();
        let default = self.compiler.default(feature.default.as_ref(), &feature_type)?;
        self.transforms.push(TransformFeature { address, feature_type, expression, reads, default });
        Some(self.transforms.len() - 1)
    }
}
