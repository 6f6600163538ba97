//! The project folder: its texts, its settings, and what they compile to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use feature_defs::catalog::{self, Catalog, Files, Settings, SourceFile};
use feature_defs::check::check;
use feature_defs::diagnose::{Diagnostic, Severity, Span, Spanned, render};
use feature_defs::parse::{SETTINGS_FILE, is_settings_path, parse_definitions, parse_settings};
use feature_defs::plan::{Plan, SourceSchemas, compile};
use feature_defs::value::Type;
use offline_store::source::{SourceError, Sources, pattern_of};
use registry::Registry;
use registry::id::{Digest, ModelName, NameError, ProjectName, ServiceName, SourceName, ViewName};
use registry::state::ViewDigests;
use registry::store::{check_url, open_store};
use thiserror::Error;

use crate::error::{CliError, chain};
use crate::output::Output;

/// Definitions are written by people; a larger file is there by mistake.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// More files than any project has: whoever comes here runs the command in the wrong folder.
const FILES_MAX: usize = 10_000;
const DEPTH_MAX: usize = 32;
/// Never searched for definitions, nor are hidden folders.
const FOLDERS_PASSED_OVER: [&str; 2] = ["data", "target"];

#[derive(Debug, Error)]
pub enum ProjectError {
    #[error("the project folder {} is not there; name it with `-C DIR`, or start a project with `coeval init`", .folder.display())]
    NoFolder { folder: PathBuf },
    #[error("could not read {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is not UTF-8 text; save it as UTF-8", .path.display())]
    NotText { path: PathBuf },
    #[error("{} has {bytes} bytes, more than the {FILE_BYTES_MAX} that a definition file may have; move what is no definition elsewhere", .path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("more than {FILES_MAX} YAML files lie below {}; run this in the project's folder", .folder.display())]
    TooMany { folder: PathBuf },
}

/// Where the project is, as the command line says.
#[derive(Debug, Clone)]
pub struct Place {
    pub folder: PathBuf,
    pub environment: Option<String>,
}

/// The texts of a project.
pub struct Project {
    pub place: Place,
    pub files: Files,
    /// YAML files under another ending, which nothing reads.
    ignored: Vec<String>,
}

/// A project in which nothing is wrong.
pub struct Checked {
    pub settings: Settings,
    pub catalog: Catalog,
    pub schemas: SourceSchemas,
    pub plan: Plan,
    pub warnings: Vec<Diagnostic>,
}

impl Project {
    /// Reads every text of the project.
    pub fn read(place: &Place) -> Result<Project, ProjectError> {
        let mut files = Vec::new();
        let mut ignored = Vec::new();
        if !place.folder.is_dir() {
            return Err(ProjectError::NoFolder { folder: place.folder.clone() });
        }
        read_folder(&place.folder, &place.folder, 0, &mut files, &mut ignored)?;
        Ok(Project { place: place.clone(), files: Files::new(files), ignored })
    }

    pub fn settings(&self) -> Result<Settings, Vec<Diagnostic>> {
        parse_settings(&self.files, self.place.environment.as_deref(), &|name| std::env::var(name).ok())
    }

    /// Settings, definitions and the files of sources: everything that is wrong with them, or what they compile to.
    pub async fn check(&self) -> Result<Checked, Vec<Diagnostic>> {
        let (settings, mut diagnostics) = match self.settings() {
            Ok(settings) => (Some(settings), Vec::new()),
            Err(diagnostics) => (None, diagnostics),
        };
        let name = settings.as_ref().map_or("", |settings| settings.project.as_str());
        let (catalog, found) = parse_definitions(name, &self.files);
        diagnostics.extend(found);
        diagnostics.extend(check(&catalog));
        diagnostics.extend(self.ignored.iter().map(|path| {
            Diagnostic::warning(format!("`{path}` is not read"), Span::NOWHERE)
                .help("definition files end in `.yaml`: rename it")
        }));
        if let Some(settings) = &settings
            && let Err(error) = check_url(&settings.store)
        {
            diagnostics.push(Diagnostic::error(chain(&error), settings.store.span));
        }
        let sources = match Sources::new(&self.place.folder) {
            Ok(sources) => sources,
            Err(error) => {
                diagnostics.push(Diagnostic::error(chain(&error), Span::NOWHERE));
                return Err(diagnostics);
            }
        };
        let schemas = source_schemas(&sources, &catalog, &mut diagnostics).await;
        let Some(settings) = settings else { return Err(diagnostics) };
        if has_errors(&diagnostics) {
            return Err(diagnostics);
        }
        match compile(&catalog, &self.files, &schemas) {
            Ok(plan) => {
                columns_read(&sources, &catalog, &plan, &mut diagnostics).await;
                if has_errors(&diagnostics) {
                    return Err(diagnostics);
                }
                Ok(Checked { settings, catalog, schemas, plan, warnings: diagnostics })
            }
            Err(found) => {
                diagnostics.extend(found);
                Err(diagnostics)
            }
        }
    }

    /// `check`, with what is wrong shown to the user.
    pub async fn checked(&self, output: &Output) -> Result<Checked, CliError> {
        match self.check().await {
            Ok(checked) => {
                self.show(&checked.warnings, output);
                Ok(checked)
            }
            Err(diagnostics) => {
                self.show(&diagnostics, output);
                Err(self.invalid(&diagnostics))
            }
        }
    }

    pub fn show(&self, diagnostics: &[Diagnostic], output: &Output) {
        output.raw(&render(diagnostics, &self.files, output.has_color()));
        if !diagnostics.is_empty() {
            output.raw("\n");
        }
    }

    pub fn invalid(&self, diagnostics: &[Diagnostic]) -> CliError {
        let errors = diagnostics.iter().filter(|diagnostic| diagnostic.severity == Severity::Error).count();
        CliError::Invalid { errors, folder: self.place.folder.clone() }
    }
}

/// Columns of the sources that are files, as the files have them.
async fn source_schemas(sources: &Sources, catalog: &Catalog, diagnostics: &mut Vec<Diagnostic>) -> SourceSchemas {
    let mut schemas = SourceSchemas::new();
    for source in &catalog.sources {
        let Some((pattern, is_history)) = files_of(source) else { continue };
        // An empty pattern has been reported already.
        if pattern.value.is_empty() {
            continue;
        }
        match sources.schema_with(pattern, &types_given(catalog, source)).await {
            Ok(schema) if is_history => history_columns(source, &schema, pattern.span, diagnostics),
            Ok(schema) => {
                schemas.insert(source.name.value.clone(), schema);
            }
            // Features can be defined, and a stream can begin, before there are files.
            Err(error @ SourceError::NoFiles { .. }) if is_history || !source.schema.is_empty() => {
                diagnostics.push(Diagnostic::warning(chain(&error), pattern.span));
            }
            Err(error) => diagnostics.push(Diagnostic::error(chain(&error), pattern.span)),
        }
    }
    schemas
}

/// The pattern of a source's files, and whether they are what happened before a stream began.
fn files_of(source: &catalog::Source) -> Option<(&Spanned<String>, bool)> {
    match &source.kind {
        catalog::SourceKind::Files { pattern, .. } => Some((pattern, false)),
        catalog::SourceKind::Stream { history: Some(pattern), .. } => Some((pattern, true)),
        catalog::SourceKind::Stream { history: None, .. } => None,
    }
}

/// Types that the definitions give to columns of a source: declared, or said of the keys and features that are made of
/// them.
fn types_given(catalog: &Catalog, source: &catalog::Source) -> Vec<(String, Type)> {
    let declared = source.schema.iter().map(|field| (field.name.value.clone(), field.field_type.value.clone()));
    let mut given: Vec<(String, Type)> = declared.collect();
    for view in catalog.feature_views.iter().filter(|view| view.source.value == source.name.value) {
        let entity = catalog.entities.iter().find(|entity| entity.name.value == view.entity.value);
        for key in entity.iter().flat_map(|entity| &entity.keys) {
            let renamed = view.keys.iter().find(|(name, _)| name.value == key.name.value);
            let column = renamed.map_or(&key.name.value, |(_, column)| &column.value);
            given.push((column.clone(), key.field_type.value.clone()));
        }
        if let catalog::ViewKind::AsOf { features, .. } = &view.kind {
            let plain = features.iter().filter(|feature| feature.expr.is_none());
            given.extend(plain.filter_map(|f| Some((f.name.value.clone(), f.feature_type.as_ref()?.value.clone()))));
        }
    }
    given
}

/// The files of a source need only agree about the columns that something reads, and those must be what they are said
/// to be.
async fn columns_read(sources: &Sources, catalog: &Catalog, plan: &Plan, diagnostics: &mut Vec<Diagnostic>) {
    for source in &plan.sources {
        if pattern_of(source).is_err() {
            continue;
        }
        let of_source = plan.views.iter().filter(|view| Arc::ptr_eq(&view.source, source));
        let read: std::collections::BTreeSet<String> = of_source.flat_map(|view| view.source_columns()).collect();
        let read: Vec<String> = read.into_iter().collect();
        let written = catalog.sources.iter().find(|written| *written.name.value == *source.name);
        let span = written.and_then(files_of).map_or(Span::NOWHERE, |(pattern, _)| pattern.span);
        let error = match sources.files_of(source, &read).await {
            Ok(files) => {
                let none = arrow::array::RecordBatch::new_empty(files.schema.clone());
                source.align(&none, Some(&read)).err().map(|error| chain(&error))
            }
            // Said already, as a warning.
            Err(SourceError::NoFiles { .. }) => None,
            Err(error) => Some(chain(&error)),
        };
        diagnostics.extend(error.map(|error| Diagnostic::error(error, span)));
    }
}

/// A history lacking a column that the stream declares would only be noticed when it is imported.
fn history_columns(source: &catalog::Source, schema: &[(String, Type)], span: Span, diagnostics: &mut Vec<Diagnostic>) {
    let has = |name: &str| schema.iter().any(|(column, _)| column == name);
    let declared = source.schema.iter().filter(|field| !field.nullable).map(|field| &field.name);
    for name in declared.chain(&source.event_time).filter(|name| !name.is_empty() && !has(name)) {
        diagnostics.push(
            Diagnostic::error(format!("the history of source `{}` has no column `{}`", *source.name, **name), span)
                .related("the column is declared here", name.span)
                .nearest(name, schema.iter().map(|(column, _)| column.as_str())),
        );
    }
}

fn has_errors(diagnostics: &[Diagnostic]) -> bool {
    diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
}

fn read_folder(
    root: &Path,
    folder: &Path,
    depth: usize,
    files: &mut Vec<SourceFile>,
    ignored: &mut Vec<String>,
) -> Result<(), ProjectError> {
    let failed = |source| ProjectError::Read { path: folder.to_owned(), source };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        // Folders behind symbolic links are not entered, so that there is an end; files behind them are read.
        if entry.file_type().map_err(failed)?.is_dir() {
            if depth < DEPTH_MAX && !FOLDERS_PASSED_OVER.contains(&name.as_ref()) {
                read_folder(root, &path, depth + 1, files, ignored)?;
            }
        } else if name.ends_with(".yaml") || name.ends_with(".yml") {
            let shown = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
            if name.ends_with(".yml") {
                ignored.push(shown);
                continue;
            }
            if files.len() == FILES_MAX {
                return Err(ProjectError::TooMany { folder: root.to_owned() });
            }
            files.push(SourceFile { text: read_text(&path)?, path: shown });
        }
    }
    ignored.sort();
    Ok(())
}

fn read_text(path: &Path) -> Result<String, ProjectError> {
    let failed = |source| ProjectError::Read { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(ProjectError::TooLarge { path: path.to_owned(), bytes });
    }
    String::from_utf8(std::fs::read(path).map_err(failed)?).map_err(|_| ProjectError::NotText { path: path.to_owned() })
}

impl Place {
    /// The settings alone, for commands that only ask a server.
    pub fn settings(&self, output: &Output) -> Result<Settings, CliError> {
        if !self.folder.is_dir() {
            return Err(ProjectError::NoFolder { folder: self.folder.clone() }.into());
        }
        let mut files = Vec::new();
        let failed = |source| ProjectError::Read { path: self.folder.clone(), source };
        for entry in std::fs::read_dir(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_settings_path(&name) && entry.path().is_file() {
                files.push(SourceFile { text: read_text(&entry.path())?, path: name });
            }
        }
        let project = Project { place: self.clone(), files: Files::new(files), ignored: Vec::new() };
        project.settings().map_err(|diagnostics| {
            project.show(&diagnostics, output);
            project.invalid(&diagnostics)
        })
    }

    /// A path of the settings: a relative one is below the project folder, wherever the command is run.
    pub fn resolve(&self, url: &str) -> String {
        if url.contains("://") {
            return url.to_owned();
        }
        let path = self.folder.join(url.strip_prefix("./").unwrap_or(url));
        path.to_string_lossy().into_owned()
    }

    /// Whether the project's store is a folder that does not exist, so that nothing was ever applied.
    pub fn store_is_absent(&self, settings: &Settings) -> bool {
        !settings.store.contains("://") && !Path::new(&self.resolve(&settings.store)).exists()
    }

    /// Has a plan that was compiled here follow what the project has forgotten.
    pub async fn forget_listed(&self, settings: &Settings, plan: &Plan) -> Result<(), CliError> {
        // Looking does not create a store.
        if self.store_is_absent(settings) {
            return Ok(());
        }
        let registry = self.registry(settings).await?;
        if let Some(known) = registry.state().project(settings.project.as_str()) {
            plan.forget(&gateway::forget::listed(known));
        }
        Ok(())
    }

    /// The project's control log and its fold.
    pub async fn registry(&self, settings: &Settings) -> Result<Registry, CliError> {
        let (store, prefix) = open_store(&self.resolve(&settings.store))?;
        let prefix = prefix.join(settings.project.as_str());
        Ok(Registry::open(store, &prefix, Arc::new(chrono::Utc::now)).await?)
    }
}

/// What the control log keeps of a project: definitions, the settings' own text (variables not filled in, so no secret
/// gets there), and the columns that files of sources had.
pub fn registry_catalog(project: &Project, checked: &Checked) -> Result<registry::state::Catalog, NameError> {
    let digest = |digest: &feature_defs::digest::Digest| Digest::try_new(digest.as_str());
    let Checked { plan, schemas, .. } = checked;
    let definitions = project.files.files.iter().filter(|file| !is_settings_path(&file.path));
    let settings = project.files.files.iter().find(|file| file.path == SETTINGS_FILE);
    let mut views = BTreeMap::new();
    for view in &plan.views {
        let digests = ViewDigests { storage: digest(&view.storage_digest)?, semantic: digest(&view.semantic_digest)? };
        views.insert(ViewName::try_new(&*view.name)?, digests);
    }
    let mut services = BTreeMap::new();
    for service in &plan.services {
        services.insert(ServiceName::try_new(&*service.name)?, digest(&service.semantic_digest)?);
    }
    let mut models = BTreeMap::new();
    for model in &plan.models {
        models.insert(ModelName::try_new(&*model.name)?, ServiceName::try_new(&*model.service.name)?);
    }
    let mut source_schemas = BTreeMap::new();
    for (source, columns) in schemas {
        let columns = serde_json::to_value(columns).expect("names and types are texts");
        source_schemas.insert(SourceName::try_new(source.as_str())?, columns);
    }
    Ok(registry::state::Catalog {
        digest: digest(&plan.digest)?,
        files: definitions.map(|file| (file.path.clone(), file.text.clone())).collect(),
        settings: settings.map(|file| file.text.clone()).unwrap_or_default(),
        source_schemas,
        views,
        services,
        models,
    })
}

pub fn project_name(settings: &Settings) -> Result<ProjectName, NameError> {
    ProjectName::try_new(settings.project.as_str())
}

/// Who makes a change: `--who`, else the account that runs the command.
pub fn who(given: Option<&str>) -> String {
    let account = || ["USER", "LOGNAME", "USERNAME"].iter().find_map(|name| std::env::var(name).ok());
    given
        .map(str::to_owned)
        .or_else(account)
        .filter(|who| !who.trim().is_empty())
        .unwrap_or_else(|| "unknown".to_owned())
}
