//! The definitions of each workload, as a user would write them.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use feature_defs::catalog::{Files, SourceFile};
use feature_defs::plan::{Plan, ServicePlan, SourceSchemas, compile_definitions};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use offline_store::{Engine, EngineOptions};

pub const PROJECT: &str = "benches";
pub const SERVICE: &str = "bench";
/// Feature columns of every generated table.
pub const FEATURES: usize = 5;
pub const WINDOWS: [&str; 3] = ["1h", "1d", "7d"];

/// Which rows of a generated table may be seen, and when.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Known {
    /// From their event time.
    #[default]
    AtOnce,
    /// From the column `created`.
    Created,
}

/// Where windows end on their far side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tails {
    /// `hop: none`.
    Exact,
    /// What a window without `hop` gets.
    Hops,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// The newest row of each of so many tables, at most 7 days old.
    AsOf { views: usize },
    /// Count, sum and max of one column of the first table over [`WINDOWS`].
    Windows(Tails),
}

impl Workload {
    pub fn views(self) -> usize {
        match self {
            Workload::AsOf { views } => views,
            Workload::Windows(_) => 1,
        }
    }

    pub fn definitions(self, known: Known) -> String {
        let mut text = String::from("entities:\n  - {name: user, keys: [{name: user_id, type: int64}]}\nsources:\n");
        let created = match known {
            Known::AtOnce => "",
            Known::Created => ", created_time: created",
        };
        for view in 0..self.views() {
            let _ = writeln!(
                text,
                "  - {{name: source{view}, files: view{view}.parquet, event_time: event_timestamp{created}}}"
            );
        }
        text.push_str("feature_views:\n");
        match self {
            Workload::AsOf { views } => {
                for view in 0..views {
                    let _ = writeln!(text, "  - name: view{view}\n    entity: user\n    source: source{view}");
                    text.push_str("    ttl: 7d\n    features:\n");
                    for feature in 0..FEATURES {
                        let _ = writeln!(text, "      - {{name: v{view}_f{feature}, type: float64}}");
                    }
                }
            }
            Workload::Windows(tails) => {
                let _ = writeln!(
                    text,
                    "  - name: view0\n    entity: user\n    source: source0\n    windows: [{}]",
                    WINDOWS.join(", ")
                );
                if tails == Tails::Exact {
                    text.push_str("    hop: none\n");
                }
                text.push_str("    aggregates:\n      - {name: count, function: count}\n");
                for function in ["sum", "max"] {
                    let _ = writeln!(text, "      - {{name: {function}, function: {function}, of: v0_f0}}");
                }
            }
        }
        let _ = writeln!(text, "feature_services:\n  - name: {SERVICE}\n    features:");
        for view in 0..self.views() {
            let _ = writeln!(text, "      - {{view: view{view}}}");
        }
        text
    }
}

/// Where an engine works and with how much.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The folder with the generated files.
    pub folder: PathBuf,
    /// The object store's folder: datasets and managed tables.
    pub store: PathBuf,
    pub spill: PathBuf,
    pub memory_bytes: u64,
}

/// An engine, and the service that the definitions declare.
pub async fn open(setup: &Setup, workload: Workload, known: Known) -> anyhow::Result<(Engine, Arc<ServicePlan>)> {
    for folder in [&setup.store, &setup.spill] {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    let engine = Engine::new(EngineOptions {
        project_folder: setup.folder.clone(),
        project: PROJECT.into(),
        store: Arc::new(LocalFileSystem::new_with_prefix(&setup.store)?),
        prefix: Path::default(),
        memory_bytes: setup.memory_bytes,
        spill_folder: Some(setup.spill.clone()),
    })?;
    let mut schemas = SourceSchemas::new();
    for view in 0..workload.views() {
        let schema = engine.sources().schema(&format!("view{view}.parquet")).await?;
        schemas.insert(format!("source{view}"), schema);
    }
    let files = Files::new(vec![SourceFile { path: "bench.yaml".into(), text: workload.definitions(known) }]);
    let plan: Plan = compile_definitions(PROJECT, &files, &schemas)
        .map_err(|found| anyhow::anyhow!("{}", feature_defs::diagnose::render(&found, &files, false)))?;
    let service = plan.service(SERVICE).cloned().context("the definitions declare no service")?;
    Ok((engine, service))
}
