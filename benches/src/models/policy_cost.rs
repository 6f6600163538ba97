//! What the policy itself costs: the state machine alone, on one thread, by the thread's own clock.

use std::hint::black_box;
use std::time::Duration;

use inference::batch::simulation::Device;
use inference::batch::{BatchLimits, Batcher, Decision, Permit, Request};
use serde::Serialize;

use super::ROWS_MAX;
use crate::process;

#[derive(Debug, Clone, Serialize)]
pub struct PolicyCost {
    /// Requests before each batch.
    pub rows: usize,
    /// Microseconds per request, of each round.
    pub micros: Vec<f64>,
}

/// Queues so many requests, takes their batch and notes what it took, over and over.
fn rounds(rows: usize, rounds: usize, batches: u64) -> PolicyCost {
    let mut batcher: Batcher<u64> = Batcher::new(BatchLimits::new(ROWS_MAX, 4_096), 1);
    Device::USUAL.warm_up(&mut batcher);
    batcher.executor_idle();
    let (mut now, mut micros) = (Duration::ZERO, Vec::with_capacity(rounds));
    for round in 0..=rounds {
        let start = process::thread_time();
        for _ in 0..batches {
            for index in 0..rows {
                now += Duration::from_micros(20);
                let request = Request { rows: 1, bytes: 256, deadline: now + Duration::from_secs(1), tier: 0 };
                let _ = black_box(batcher.push(now, request, index as u64));
            }
            // The last one of a burst may be waited for.
            loop {
                match batcher.poll(now, Permit::All).decision {
                    Decision::Run { members, padded_rows, .. } => {
                        black_box(members);
                        now += Duration::from_millis(12);
                        batcher.ran(padded_rows, Duration::from_millis(12));
                        batcher.executor_idle();
                    }
                    Decision::Wait { until: Some(until) } => now = until,
                    Decision::Wait { until: None } => break,
                }
            }
        }
        let spent = process::thread_time() - start;
        // The first round warms up.
        if round > 0 {
            micros.push(spent.as_secs_f64() * 1e6 / (batches as f64 * rows as f64));
        }
    }
    PolicyCost { rows, micros }
}

/// Of lone requests, and of full batches.
pub fn run(times: usize, batches: u64) -> Vec<PolicyCost> {
    [1, ROWS_MAX].map(|rows| rounds(rows, times, batches)).to_vec()
}
