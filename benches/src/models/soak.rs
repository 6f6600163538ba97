//! Loading and unloading, over and over.

use std::time::Instant;

use inference::batch::BatchLimits;
use serde::Serialize;

use super::{PATIENCE, Subject};
use crate::process;

/// Few sizes: it is loading that is to be seen.
const CYCLE_ROWS_MAX: usize = 8;
const REQUESTS: usize = 4;

#[derive(Debug, Serialize)]
pub struct Cycles {
    pub cycles: usize,
    pub seconds: f64,
    /// After each cycle, in bytes.
    pub resident: Vec<u64>,
    /// The most after a cycle of each half, without the first tenth.
    pub halves: [u64; 2],
    /// Of one cycle, in milliseconds, in the median.
    pub cycle_ms: f64,
}

/// Loads the model, asks it something, and unloads it, so often.
pub async fn cycles(subject: &Subject, cycles: usize) -> anyhow::Result<Cycles> {
    let began = Instant::now();
    let mut resident = Vec::with_capacity(cycles);
    let mut took = Vec::with_capacity(cycles);
    for _ in 0..cycles {
        let start = Instant::now();
        let server = subject.serve(BatchLimits::new(CYCLE_ROWS_MAX, 64)).await?;
        for rows in 1..=REQUESTS {
            server.submit(subject.request(rows), Instant::now() + PATIENCE).await?;
        }
        server.shutdown().await;
        drop(server);
        took.push(start.elapsed().as_secs_f64() * 1e3);
        resident.push(process::resident_bytes().unwrap_or(0));
    }
    let steady = &resident[cycles / 10..];
    let (early, late) = steady.split_at(steady.len() / 2);
    let most = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
    let halves = [most(early), most(late)];
    let cycle_ms = super::Spread::of(took).p50;
    Ok(Cycles { cycles, seconds: began.elapsed().as_secs_f64(), halves, resident, cycle_ms })
}
