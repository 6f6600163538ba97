//! Rows that could not be applied to a view: kept on the object store for people, as JSON lines with a reason.
//!
//! A row in here is in the history like any other; only one view lacks it. Names are made of positions, so writing the
//! same letters again after a crash replaces them.

use std::sync::Arc;

use arrow::array::RecordBatch;
use feature_defs::time::Position;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};

use crate::write::SetAside;

/// Writes what was set aside of one batch.
pub async fn write(
    store: &Arc<dyn ObjectStore>,
    project: &Path,
    source: &str,
    batch: &RecordBatch,
    positions: &[Position],
    aside: &[SetAside],
) -> Result<(), object_store::Error> {
    for letter in aside {
        let mut lines = Vec::new();
        for row in &letter.rows {
            let position = positions[*row as usize];
            let line = serde_json::json!({
                "view": *letter.generation.view,
                "digest": *letter.generation.digest,
                "reason": letter.reason,
                "position": {"time": position.time, "sequence": position.sequence},
                "row": row_as_json(&batch.slice(*row as usize, 1)),
            });
            lines.extend_from_slice(line.to_string().as_bytes());
            lines.push(b'\n');
        }
        let Some(first) = letter.rows.first().map(|row| positions[*row as usize]) else { continue };
        tracing::warn!(
            source,
            view = %letter.generation.view,
            rows = letter.rows.len(),
            reason = letter.reason,
            "rows could not be applied and are kept as dead letters"
        );
        let name = format!("{}-{}-{}.jsonl", first.time, first.sequence, letter.generation.view);
        let path = project.clone().join("dead-letters").join(source).join(name.as_str());
        store.put(&path, PutPayload::from(lines)).await?;
    }
    Ok(())
}

fn row_as_json(row: &RecordBatch) -> serde_json::Value {
    let mut writer = arrow::json::ArrayWriter::new(Vec::new());
    let written = writer.write(row).and_then(|()| writer.finish());
    let parsed =
        written.ok().and_then(|()| serde_json::from_slice::<Vec<serde_json::Value>>(&writer.into_inner()).ok());
    parsed.and_then(|mut rows| rows.pop()).unwrap_or(serde_json::Value::Null)
}
