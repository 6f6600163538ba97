//! Callers: so many that each wait for their answer, or as many as a rate asks for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use http::uri::PathAndQuery;
use prost::Message as _;
use proto::v1;
use serde::Serialize;
use tonic::Request;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};

use super::raw::{PREDICT, Raw};
use super::requests::Requests;

/// How requests are sent.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// So many callers, each of which sends when it was answered.
    Closed { callers: usize },
    /// So many requests a second, whether or not the last were answered; a late start counts as waiting.
    Open { rate: f64 },
}

/// Microseconds, as callers saw them.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    pub answered: u64,
    pub failed: u64,
    pub seconds: f64,
    pub per_second: f64,
    pub p50_us: f64,
    pub p95_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
    pub answer_bytes: u64,
    /// The first failure, if any.
    pub failure: Option<String>,
}

/// Connections of a run: one for each of a few callers, shared beyond.
const CONNECTIONS_MAX: usize = 8;
/// Requests that wait at most in an open loop, so that a server that cannot keep up is seen and not run into the ground.
const OPEN_MAX: usize = 10_000;

#[derive(Default)]
struct Found {
    micros: Vec<f64>,
    failed: u64,
    failure: Option<String>,
}

/// Sends for `warm_up`, which is not counted, and then for `lasts`.
pub async fn run(
    address: &str,
    requests: &Requests,
    pace: Pace,
    warm_up: Duration,
    lasts: Duration,
) -> anyhow::Result<Outcome> {
    let channels = match pace {
        Pace::Closed { callers } => callers.clamp(1, CONNECTIONS_MAX),
        Pace::Open { .. } => CONNECTIONS_MAX,
    };
    let mut connections = Vec::with_capacity(channels);
    for _ in 0..channels {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
        connections.push(endpoint.connect().await.with_context(|| format!("no connection to {address}"))?);
    }
    let began = Instant::now() + warm_up;
    let ends = began + lasts;
    let bytes = Arc::new(AtomicU64::new(0));
    let found = match pace {
        Pace::Closed { callers } => closed(&connections, callers, requests, began, ends, &bytes).await?,
        Pace::Open { rate } => open(&connections, rate, requests, began, ends, &bytes).await?,
    };
    Ok(summary(found, lasts, bytes.load(Ordering::Relaxed)))
}

async fn call(client: &mut Grpc<Channel>, path: &'static str, request: Bytes) -> Result<Bytes, String> {
    client.ready().await.map_err(|error| error.to_string())?;
    let answer = client.unary(Request::new(request), PathAndQuery::from_static(path), Raw).await;
    answer.map(|answer| answer.into_inner()).map_err(|status| status.to_string())
}

/// How long an answer is, or why it is none: a prediction can fail row by row.
fn judge(path: &str, answer: Result<Bytes, String>) -> Result<u64, String> {
    let answer = answer?;
    let length = answer.len() as u64;
    if path == PREDICT {
        let answer = v1::PredictResponse::decode(answer).map_err(|error| error.to_string())?;
        let failed = answer.outcomes.iter().find(|outcome| outcome.status() != v1::RowStatus::Ok);
        failed.map_or(Ok(()), |failed| Err(failed.reason.clone()))?;
    }
    Ok(length)
}

async fn closed(
    connections: &[Channel],
    callers: usize,
    requests: &Requests,
    began: Instant,
    ends: Instant,
    bytes: &Arc<AtomicU64>,
) -> anyhow::Result<Found> {
    let mut tasks = Vec::new();
    for caller in 0..callers {
        let mut client = Grpc::new(connections[caller % connections.len()].clone());
        let (requests, bytes) = (requests.clone(), bytes.clone());
        tasks.push(tokio::spawn(async move {
            let mut found = Found::default();
            let mut next = caller * 101;
            loop {
                let started = Instant::now();
                if started >= ends {
                    return found;
                }
                let request = requests.bodies[next % requests.bodies.len()].clone();
                next += 1;
                let answer = call(&mut client, requests.path, request).await;
                if started >= began {
                    found.add(started.elapsed(), judge(requests.path, answer), &bytes);
                }
            }
        }));
    }
    let mut all = Found::default();
    for task in tasks {
        all.join(task.await?);
    }
    Ok(all)
}

async fn open(
    connections: &[Channel],
    rate: f64,
    requests: &Requests,
    began: Instant,
    ends: Instant,
    bytes: &Arc<AtomicU64>,
) -> anyhow::Result<Found> {
    let (to_found, mut from_calls) = tokio::sync::mpsc::unbounded_channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    let first = Instant::now();
    let mut sent: u64 = 0;
    loop {
        // When this request was due, whenever it goes: otherwise a slow server would be asked less and look faster.
        let due = first + Duration::from_secs_f64(sent as f64 / rate);
        if due >= ends {
            break;
        }
        tokio::time::sleep_until(due.into()).await;
        let mut client = Grpc::new(connections[sent as usize % connections.len()].clone());
        let request = requests.bodies[sent as usize % requests.bodies.len()].clone();
        let path = requests.path;
        sent += 1;
        if waiting.fetch_add(1, Ordering::Relaxed) >= OPEN_MAX {
            anyhow::bail!("{OPEN_MAX} requests wait for an answer: {rate} a second is more than this server answers");
        }
        let (waiting, to_found) = (waiting.clone(), to_found.clone());
        tokio::spawn(async move {
            let answer = call(&mut client, path, request).await;
            waiting.fetch_sub(1, Ordering::Relaxed);
            if due >= began {
                // The receiver outlives every call.
                let took = due.elapsed();
                let _ = to_found.send((took, judge(path, answer)));
            }
        });
    }
    drop(to_found);
    let mut found = Found::default();
    while let Some((took, answer)) = from_calls.recv().await {
        found.add(took, answer, bytes);
    }
    Ok(found)
}

impl Found {
    fn add(&mut self, took: Duration, answer: Result<u64, String>, bytes: &AtomicU64) {
        match answer {
            Ok(length) => {
                bytes.store(length, Ordering::Relaxed);
                self.micros.push(took.as_secs_f64() * 1e6);
            }
            Err(failure) => {
                self.failed += 1;
                self.failure.get_or_insert(failure);
            }
        }
    }

    fn join(&mut self, other: Found) {
        self.micros.extend(other.micros);
        self.failed += other.failed;
        self.failure = self.failure.take().or(other.failure);
    }
}

pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn summary(mut found: Found, lasts: Duration, answer_bytes: u64) -> Outcome {
    found.micros.sort_unstable_by(f64::total_cmp);
    let sorted = &found.micros;
    let seconds = lasts.as_secs_f64();
    Outcome {
        answered: sorted.len() as u64,
        failed: found.failed,
        seconds,
        per_second: sorted.len() as f64 / seconds,
        p50_us: quantile(sorted, 0.5),
        p95_us: quantile(sorted, 0.95),
        p99_us: quantile(sorted, 0.99),
        max_us: sorted.last().copied().unwrap_or(f64::NAN),
        answer_bytes,
        failure: found.failure,
    }
}

/// Sends one request, once.
pub async fn one(address: &str, path: &'static str, request: Bytes) -> anyhow::Result<Bytes> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
    let mut client = Grpc::new(endpoint.connect().await?);
    client.ready().await?;
    let answer = client.unary(Request::new(request), PathAndQuery::from_static(path), Raw).await?;
    Ok(answer.into_inner())
}
