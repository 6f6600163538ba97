//! The open loop: requests come when they are due, whether or not earlier ones were answered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use inference::batch::simulation::Arrivals;
use inference::executor::{InferError, ModelServer};
use tokio::sync::mpsc;

use super::Subject;

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Answered,
    /// Told at once, or as soon as it was clear, that it will not be answered in time.
    Refused,
    /// Admitted, and then not answered by its deadline.
    Late,
    Failed,
}

#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Since the beginning.
    pub due: Duration,
    pub tier: usize,
    /// From when it was due.
    pub took: Duration,
    pub end: End,
}

const PLACEHOLDER: Duration = Duration::MAX;

/// Everything that came of one run.
#[derive(Debug)]
pub struct Seen {
    pub calls: Vec<Call>,
    /// How late requests were sent, in milliseconds: what the generator itself adds to latencies.
    pub behind: Vec<f64>,
    /// From the first due request to the last answer.
    pub seconds: f64,
}

impl Seen {
    /// Milliseconds of the calls that ended like that.
    pub fn millis(&self, end: End) -> Vec<f64> {
        let of = self.calls.iter().filter(|call| call.end == end);
        of.map(|call| call.took.as_secs_f64() * 1e3).collect()
    }
}

/// Sends requests of one row as they are due, each with so much patience from then on.
///
/// A thread of its own waits for the times, because timers of the runtime are no finer than a millisecond; the calls are
/// tasks of the runtime, as a gateway's are.
pub async fn run(
    server: &Arc<ModelServer>,
    subject: &Subject,
    arrivals: &Arrivals,
    patience: Duration,
) -> anyhow::Result<Seen> {
    let (to_seen, mut from_calls) = mpsc::unbounded_channel();
    let runtime = tokio::runtime::Handle::current();
    let request = subject.request(1);
    let (server, arrivals) = (server.clone(), arrivals.clone());
    let expected = arrivals.len();
    // Time for the thread to be there.
    let first = Instant::now() + Duration::from_millis(5);
    let sender = std::thread::Builder::new().name("arrivals".to_owned()).spawn(move || {
        let mut behind = std::hint::black_box(vec![1.0; arrivals.len()]);
        behind.clear();
        for (at, tier) in arrivals {
            let due = first + Duration::from_micros(at);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            behind.push(due.elapsed().as_secs_f64() * 1e3);
            let (server, inputs, to_seen) = (server.clone(), request.clone(), to_seen.clone());
            runtime.spawn(async move {
                let end = match server.submit_in_tier(inputs, due + patience, tier).await {
                    Ok(outcome) => {
                        std::hint::black_box(outcome);
                        if due.elapsed() > patience { End::Late } else { End::Answered }
                    }
                    Err(error) => end_of(&error),
                };
                // The receiver outlives every call.
                let _ = to_seen.send(Call { due: due - first, tier, took: due.elapsed(), end });
            });
        }
        behind
    })?;
    // Written to beforehand: memory is watched while this runs, and is not to grow by what was seen.
    let mut calls =
        std::hint::black_box(vec![Call { due: PLACEHOLDER, tier: 1, took: PLACEHOLDER, end: End::Failed }; expected]);
    calls.clear();
    while let Some(call) = from_calls.recv().await {
        calls.push(call);
    }
    let behind = sender.join().map_err(|_| anyhow::anyhow!("the thread that sends requests panicked"))?;
    Ok(Seen { calls, behind, seconds: first.elapsed().as_secs_f64() })
}

fn end_of(error: &InferError) -> End {
    match error {
        InferError::QueueFull { .. }
        | InferError::QueueBytesFull { .. }
        | InferError::TooLarge { .. }
        | InferError::TooLate { .. }
        | InferError::MemoryShort { .. }
        | InferError::BreakerOpen { .. }
        | InferError::DeviceBreakerOpen { .. } => End::Refused,
        InferError::Expired | InferError::Dropped => End::Late,
        InferError::Model(_) | InferError::ShuttingDown | InferError::Unavailable(_) => End::Failed,
    }
}
