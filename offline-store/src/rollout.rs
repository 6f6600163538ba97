//! What the serving log knows of a rollout that no answer tells when it is given: whether rows were served right ([`skew`]), and
//! how good they turned out to be ([`units`]).
//!
//! Both are functions of the log, of labels and of history, so every gateway that asks gets the same. Files of the log are found by
//! the day on which they were *logged*, by the server's clock; which of a unit's rows belong together, and under which step, goes
//! by the time that they were answered *for*: a replay answers months within an hour.

pub mod metric;
pub mod rows;
pub mod skew;
pub mod units;

use std::sync::Arc;

use feature_defs::time::Micros;
use feature_defs::window::DAY;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;
use object_store::path::Path;

use crate::labels::LabelError;
use crate::serving_log::{self, FileName, LogFile, Place, ServingLogError};

/// Days whose files are listed at once.
const LISTS_MAX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    #[error(transparent)]
    Log(#[from] ServingLogError),
    #[error(transparent)]
    Labels(#[from] LabelError),
    #[error(
        "`{column}`, which is the unit or a part of it, is sensitive, and the log holds hashes in its place: whose rows they are cannot be told; take another unit, or judge by what is counted when a request is answered"
    )]
    Hashed { column: String },
    #[error(
        "feature service `{service}` has no column `{column}`, which is the unit or a part of it; its columns are: {known}"
    )]
    NoUnit { service: String, column: String, known: String },
    #[error("column `{column}` of the serving log is missing, or is not of the type that the definitions say")]
    Damaged { column: String },
    #[error(
        "the log has more than {most} rows of it, too many to tell whose losses are whose; lower `serving_log.sample`"
    )]
    TooMany { most: usize },
    #[error("rows of the log could not be worked with: {0}")]
    Arrow(#[from] arrow::error::ArrowError),
}

/// The files of a service that were logged on the day of `logged_from` or later, in an order that does not depend on who asks.
/// Those a day before too: a server that began to log just before midnight keeps to its day.
pub async fn files(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    service: &str,
    logged_from: Micros,
) -> Result<Vec<LogFile>, ServingLogError> {
    let first = serving_log::day(logged_from.saturating_sub(DAY));
    let days = serving_log::days(store, project, service).await?.into_iter().filter(|day| *day >= first);
    let folders: Vec<Path> = days.map(|day| Place { service: service.to_owned(), day }.folder(project)).collect();
    let list = |folder: Path| async move {
        let listed: Result<Vec<_>, _> = store.list(Some(&folder)).try_collect().await;
        listed.map_err(|source| ServingLogError::Store { path: folder.to_string(), verb: "listed", source })
    };
    let mut listed = futures::stream::iter(folders.into_iter().map(list)).buffered(LISTS_MAX);
    let mut found = Vec::new();
    while let Some(objects) = listed.next().await {
        let named = objects?.into_iter().filter_map(|object| {
            let name = FileName::parse(object.location.filename()?)?;
            Some(LogFile { path: object.location, name, bytes: object.size })
        });
        found.extend(named);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

#[cfg(test)]
mod tests;
