//! How many rows a second a served model answers, beside the forward that nobody stands before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use inference::batch::BatchLimits;
use inference::executor::ModelServer;
use serde::Serialize;

use super::{PATIENCE, ROWS_MAX, Subject};

/// Callers of one row each that always wait for an answer: enough that a full batch waits while another runs.
const CALLERS: usize = 4 * ROWS_MAX;

/// One block of each, in turn.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Block {
    pub per_second: f64,
    pub rows_per_batch: f64,
    /// Rows a second of full batches on one thread, and nothing else: before and after, in the mean.
    pub raw_per_second: f64,
}

pub async fn saturated(subject: &Subject, blocks: u64, lasts: Duration) -> anyhow::Result<Vec<Block>> {
    let server = subject.serve(BatchLimits::new(ROWS_MAX, 2 * CALLERS)).await?;
    let mut found = Vec::new();
    let mut before = raw(subject, lasts / 4)?;
    for _ in 0..blocks {
        let (per_second, rows_per_batch) = served(&server, subject, lasts).await?;
        let after = raw(subject, lasts / 4)?;
        found.push(Block { per_second, rows_per_batch, raw_per_second: (before + after) / 2.0 });
        before = after;
    }
    Ok(found)
}

/// Rows a second with as many callers as it takes, and rows in a batch.
pub async fn served(server: &Arc<ModelServer>, subject: &Subject, lasts: Duration) -> anyhow::Result<(f64, f64)> {
    let answered = Arc::new(AtomicU64::new(0));
    let (began, before) = (Instant::now(), server.metrics());
    let ends = began + lasts;
    let calls = (0..CALLERS).map(|_| {
        let (server, request, answered) = (server.clone(), subject.request(1), answered.clone());
        tokio::spawn(async move {
            while Instant::now() < ends {
                server.submit(request.clone(), Instant::now() + PATIENCE).await?;
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<(), inference::executor::InferError>(())
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await??;
    }
    let (seconds, after) = (began.elapsed().as_secs_f64(), server.metrics());
    let batches = after.batches - before.batches;
    let per_batch = (after.rows - before.rows) as f64 / batches.max(1) as f64;
    Ok((answered.load(Ordering::Relaxed) as f64 / seconds, per_batch))
}

/// Rows a second of full batches on one thread.
fn raw(subject: &Subject, lasts: Duration) -> anyhow::Result<f64> {
    let one = subject.raw_forward(ROWS_MAX, 1)?;
    let times = (lasts.as_secs_f64() / one.as_secs_f64().max(1e-6)).ceil().clamp(3.0, 10_000.0);
    let millis = subject.raw_forwards(ROWS_MAX, times as usize)?;
    // The mean and not the median: what slows some forwards down slows the served ones down too.
    let mean = millis.iter().sum::<f64>() / millis.len() as f64;
    Ok(ROWS_MAX as f64 * 1e3 / mean)
}
