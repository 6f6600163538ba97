//! The generated tables as managed tables: what `coeval ingest` of a source with files does, once before what is measured.

use offline_store::table::Work;
use offline_store::table::import::import_source;
use serde::Serialize;

use crate::definitions::{Known, Setup, Workload, open_plan};

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Imported {
    pub rows: u64,
    pub bytes: u64,
    /// Of all tables, one after the other.
    pub seconds: f64,
}

/// Imports the sources of the workload into tables on the setup's store. Those that are there already stay.
pub async fn import(setup: &Setup, workload: Workload, known: Known) -> anyhow::Result<Imported> {
    let (engine, plan) = open_plan(setup, workload, known).await?;
    let work = Work {
        memory_bytes: usize::try_from(setup.memory_bytes)?,
        spill_folder: Some(setup.spill.clone()),
        ..Work::default()
    };
    let mut imported = Imported::default();
    for source in &plan.sources {
        let (store, project) = (engine.store(), engine.project_path());
        let done = import_source(store, &project, &plan, source, engine.sources(), &work, NOW, &|_: u64| {}).await?;
        imported.rows += done.rows;
        imported.bytes += done.bytes;
        imported.seconds += done.seconds;
    }
    Ok(imported)
}

/// When tables are said to have been made. Nothing here asks.
const NOW: i64 = 0;
