//! `coeval plan`: what `apply` would change, by digest. Reads only.

use std::collections::BTreeMap;
use std::sync::Arc;

use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Plan, SourceSchemas, ViewPlan, compile_definitions};
use online_store::estimate::{READ_BYTES_WARNED, estimate};
use registry::state::Catalog;
use serde::Serialize;

use crate::error::{CliError, counted};
use crate::output::Output;
use crate::project::{Checked, Place, Project};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Source,
    View,
    Service,
    Model,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    Added,
    Changed,
    Removed,
}

/// What becomes of one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    pub what: What,
    pub kind: Kind,
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The storage digest of the generation that is backfilled beside what is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backfill: Option<String>,
}

/// The definitions of a folder against those in force.
#[derive(Debug, Serialize)]
pub struct Difference {
    pub project: String,
    /// The entry that put the present definitions in force.
    pub applied: Option<u64>,
    pub digest: String,
    pub changes: Vec<Change>,
    /// Texts differ (comments, owners, layout), or the settings do.
    pub texts_changed: bool,
    /// What each view of the definitions takes online.
    pub sizes: Vec<Size>,
}

/// About what one entity takes in the online store, see [`online_store::estimate`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Size {
    pub view: String,
    /// Of an entity with an event in every tile, or with a row.
    pub bytes_per_active_entity: usize,
    pub bytes_per_read: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tiles_per_active_entity: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tiles_per_read: Option<usize>,
}

/// What is compared of an object: the digest of its meaning, and for views the digest of what is stored.
struct Digests {
    semantic: String,
    stored: Option<String>,
}

pub async fn run(place: &Place, output: &Output) -> Result<(), CliError> {
    let project = Project::read(place)?;
    let checked = project.checked(output).await?;
    let difference = if place.store_is_absent(&checked.settings) {
        Difference::new(&project, &checked, None)?
    } else {
        let registry = place.registry(&checked.settings).await?;
        let state = registry.state();
        let applied = state.project(&checked.settings.project).map(|known| &known.applied);
        Difference::new(&project, &checked, applied.map(|applied| (applied.fact.entry.0, &applied.catalog)))?
    };
    output.json(&difference);
    difference.show(output);
    if difference.is_empty() {
        output.line("nothing to apply");
    } else {
        output.line("`coeval apply` does this");
    }
    Ok(())
}

impl Difference {
    pub fn new(project: &Project, checked: &Checked, applied: Option<(u64, &Catalog)>) -> Result<Difference, CliError> {
        let before = applied.map(|(_, catalog)| objects_applied(&checked.plan.project, catalog)).unwrap_or_default();
        let after = objects(&checked.plan);
        let offline_only = |name: &str| checked.plan.view(name).is_some_and(|view| view.is_offline_only());
        let catalog = crate::project::registry_catalog(project, checked)?;
        Ok(Difference {
            project: checked.plan.project.to_string(),
            applied: applied.map(|(entry, _)| entry),
            digest: checked.plan.digest.to_string(),
            changes: compare(&before, &after, &offline_only),
            texts_changed: applied.is_none_or(|(_, before)| *before != catalog),
            sizes: sizes(&checked.plan),
        })
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && !self.texts_changed
    }

    pub fn show(&self, output: &Output) {
        match self.applied {
            Some(entry) => output.line(format!("{}, against entry {entry} of the control log", self.project)),
            None => output.line(format!("{}, of which nothing is applied yet", self.project)),
        }
        let width = self.changes.iter().map(|change| change.name.chars().count()).max().unwrap_or(0);
        for change in &self.changes {
            output.line(change.line(width));
        }
        if self.changes.is_empty() && self.texts_changed {
            output.line("  only texts differ: no value changes");
        }
        let count = |what| self.changes.iter().filter(|change| change.what == what).count();
        let backfills = self.changes.iter().filter(|change| change.backfill.is_some()).count();
        let mut summary =
            format!("{} added, {} changed, {} removed", count(What::Added), count(What::Changed), count(What::Removed));
        if backfills > 0 {
            summary.push_str(&format!("; {} to backfill", counted(backfills, "view generation")));
        }
        output.line(summary);
        self.show_sizes(output);
        if output.verbosity() > 0 {
            output.line(format!("digest {}", self.digest));
        }
    }
}

impl Difference {
    fn show_sizes(&self, output: &Output) {
        if self.sizes.is_empty() {
            return;
        }
        output.line("online, about, per entity:");
        let width = self.sizes.iter().map(|size| size.view.chars().count()).max().unwrap_or(0);
        for size in &self.sizes {
            output.line(size.line(width));
        }
        for size in self.sizes.iter().filter(|size| size.bytes_per_read > READ_BYTES_WARNED) {
            output.note(format!(
                "warning: a read of `{}` brings about {} per entity; above {} it is most of what a request takes: use \
                 shorter windows, coarser hops, or fewer sketches and last_n in one view",
                size.view,
                bytes(size.bytes_per_read),
                bytes(READ_BYTES_WARNED)
            ));
        }
    }
}

impl Size {
    fn line(&self, width: usize) -> String {
        let tiles = |count: Option<usize>| count.map_or_else(String::new, |count| format!(" in {count} tiles"));
        format!(
            "  {:<width$}  {}{} stored when active, {}{} per read",
            self.view,
            bytes(self.bytes_per_active_entity),
            tiles(self.tiles_per_active_entity),
            bytes(self.bytes_per_read),
            tiles(self.tiles_per_read),
        )
    }
}

fn bytes(count: usize) -> String {
    if count < 10_000 { format!("{count} B") } else { format!("{:.1} KB", count as f64 / 1_000.0) }
}

fn sizes(plan: &Plan) -> Vec<Size> {
    let size = |view: &Arc<ViewPlan>| {
        let estimate = estimate(&plan.project, view)?;
        Some(Size {
            view: view.name.to_string(),
            bytes_per_active_entity: estimate.stored_bytes,
            bytes_per_read: estimate.read_bytes,
            tiles_per_active_entity: estimate.stored_tiles,
            tiles_per_read: estimate.read_tiles,
        })
    };
    plan.views.iter().filter_map(size).collect()
}

impl Change {
    fn line(&self, width: usize) -> String {
        let mark = match self.what {
            What::Added => '+',
            What::Changed => '~',
            What::Removed => '-',
        };
        let kind = match self.kind {
            Kind::Source => "source ",
            Kind::View => "view   ",
            Kind::Service => "service",
            Kind::Model => "model  ",
        };
        let short = |digest: &Option<String>| digest.as_deref().map(|text| text[..text.len().min(12)].to_owned());
        let digests: Vec<String> = [short(&self.before), short(&self.after)].into_iter().flatten().collect();
        let backfill = match short(&self.backfill) {
            Some(digest) => format!(", backfills generation {digest}"),
            None => String::new(),
        };
        format!("  {mark} {kind} {:<width$}  {}{backfill}", self.name, digests.join(" -> "))
    }
}

type Objects = BTreeMap<(u8, String), (Kind, Digests)>;

fn insert(objects: &mut Objects, kind: Kind, name: &str, semantic: String, stored: Option<String>) {
    objects.insert((kind as u8, name.to_owned()), (kind, Digests { semantic, stored }));
}

fn objects(plan: &Plan) -> Objects {
    let mut out = Objects::new();
    for source in &plan.sources {
        insert(&mut out, Kind::Source, &source.name, source.digest.to_string(), None);
    }
    for view in &plan.views {
        let stored = Some(view.storage_digest.to_string());
        insert(&mut out, Kind::View, &view.name, view.semantic_digest.to_string(), stored);
    }
    for service in &plan.services {
        insert(&mut out, Kind::Service, &service.name, service.semantic_digest.to_string(), None);
    }
    for model in &plan.models {
        insert(&mut out, Kind::Model, &model.name, model.semantic_digest.to_string(), None);
    }
    out
}

/// The objects of an earlier `apply`, compiled again from its own texts, so that sources and models can be compared too.
fn objects_applied(project: &str, catalog: &Catalog) -> Objects {
    let files = catalog.files.iter().map(|(path, text)| SourceFile { path: path.clone(), text: text.clone() });
    let schemas: Option<SourceSchemas> = catalog
        .source_schemas
        .iter()
        .map(|(name, columns)| Some((name.to_string(), serde_json::from_value(columns.clone()).ok()?)))
        .collect();
    let plan = compile_definitions(project, &Files::new(files.collect()), &schemas.unwrap_or_default());
    let mut out = plan.map(|plan| objects(&plan)).unwrap_or_default();
    // The digests that were written down are what counts, also where this build no longer compiles those texts.
    for (name, digests) in &catalog.views {
        let stored = Some(digests.storage.to_string());
        insert(&mut out, Kind::View, name.as_str(), digests.semantic.to_string(), stored);
    }
    for (name, digest) in &catalog.services {
        insert(&mut out, Kind::Service, name.as_str(), digest.to_string(), None);
    }
    out
}

fn compare(before: &Objects, after: &Objects, offline_only: &dyn Fn(&str) -> bool) -> Vec<Change> {
    let mut changes = Vec::new();
    let keys: std::collections::BTreeSet<&(u8, String)> = before.keys().chain(after.keys()).collect();
    for key in keys {
        let (old, new) = (before.get(key), after.get(key));
        let what = match (old, new) {
            (None, _) => What::Added,
            (_, None) => What::Removed,
            (Some((_, old)), Some((_, new))) if old.semantic != new.semantic || old.stored != new.stored => {
                What::Changed
            }
            _ => continue,
        };
        let kind = new.or(old).map(|(kind, _)| *kind).unwrap_or(Kind::Source);
        let backfill = new
            .and_then(|(_, new)| new.stored.clone())
            .filter(|stored| !offline_only(&key.1) && old.and_then(|(_, old)| old.stored.as_ref()) != Some(stored));
        changes.push(Change {
            what,
            kind,
            name: key.1.clone(),
            before: old.map(|(_, digests)| digests.semantic.clone()),
            after: new.map(|(_, digests)| digests.semantic.clone()),
            backfill,
        });
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(before: &[(Kind, &str, &str, &str)], after: &[(Kind, &str, &str, &str)], expected: &[&str]) {
        let build = |objects: &[(Kind, &str, &str, &str)]| {
            let mut out = Objects::new();
            for (kind, name, semantic, stored) in objects {
                let stored = (*kind == Kind::View).then(|| (*stored).to_owned());
                insert(&mut out, *kind, name, (*semantic).to_owned(), stored);
            }
            out
        };
        let changes = compare(&build(before), &build(after), &|name| name == "exact");
        let lines: Vec<String> = changes.iter().map(|change| change.line(1).trim().to_owned()).collect();
        assert_eq!(lines, expected);
    }

    #[test]
    fn changes_are_told_apart_by_digest() {
        use Kind::{Model, Service, Source, View};
        check(&[(View, "v", "a", "s")], &[(View, "v", "a", "s")], &[]);
        check(&[], &[(View, "v", "a", "s")], &["+ view    v  a, backfills generation s"]);
        // A default changes what a view means and not what it stores.
        check(&[(View, "v", "a", "s")], &[(View, "v", "b", "s")], &["~ view    v  a -> b"]);
        check(&[(View, "v", "a", "s")], &[(View, "v", "b", "t")], &["~ view    v  a -> b, backfills generation t"]);
        check(&[], &[(View, "exact", "a", "s")], &["+ view    exact  a"]);
        check(
            &[(Source, "x", "1", ""), (Model, "m", "3", "")],
            &[(Service, "x", "2", ""), (Model, "m", "4", "")],
            &["- source  x  1", "+ service x  2", "~ model   m  3 -> 4"],
        );
    }
}
