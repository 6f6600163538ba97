//! Events at a steady rate, and how long after they were due to be sent they answered online.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::v1;
use proto::v1::ingest_client::IngestClient;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::load::quantile;

/// How often events are sent; each message carries those of one tick.
const TICK: Duration = Duration::from_millis(10);
/// Streams that messages go to in turn: the next message must not wait for the last to be visible.
const STREAMS: usize = 8;

#[derive(Debug, Serialize)]
pub struct Pushed {
    pub sent: u64,
    pub accepted: u64,
    pub rejected: u64,
    pub seconds: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

pub struct Events {
    pub project: String,
    pub source: String,
    pub keys: i64,
    pub rate: u64,
    pub lasts: Duration,
}

/// Pushes and waits for each message to be visible.
pub async fn run(address: &str, events: &Events) -> anyhow::Result<Pushed> {
    let latencies = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (accepted, rejected) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut streams = Vec::new();
    let mut readers = Vec::new();
    for _ in 0..STREAMS {
        let (to_server, messages) = mpsc::channel(1_024);
        let (to_reader, mut due) = mpsc::channel::<Instant>(1_024);
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
        let mut client = IngestClient::new(endpoint.connect().await?);
        let (latencies, accepted, rejected) = (latencies.clone(), accepted.clone(), rejected.clone());
        readers.push(tokio::spawn(async move {
            let mut answers = client.push(ReceiverStream::new(messages)).await?.into_inner();
            while let Some(answer) = answers.message().await? {
                let Some(due) = due.recv().await else { break };
                let took = due.elapsed().as_secs_f64() * 1e3;
                accepted.fetch_add(u64::from(answer.accepted), Ordering::Relaxed);
                rejected.fetch_add(answer.rejected.len() as u64, Ordering::Relaxed);
                latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(took);
            }
            anyhow::Ok(())
        }));
        streams.push((to_server, to_reader));
    }
    let mut random = SmallRng::seed_from_u64(3);
    let per_tick = (events.rate as f64 * TICK.as_secs_f64()).round() as usize;
    let first = Instant::now();
    let run_id = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
    let mut sent = 0u64;
    let mut tick = 0u32;
    while TICK * tick < events.lasts {
        let due = first + TICK * tick;
        tokio::time::sleep_until(due.into()).await;
        let (to_server, to_reader) = &streams[tick as usize % STREAMS];
        let message = message(events, per_tick, sent, run_id, &mut random)?;
        to_reader.send(due).await?;
        if to_server.send(message).await.is_err() {
            break;
        }
        sent += per_tick as u64;
        tick += 1;
    }
    drop(streams);
    for reader in readers {
        reader.await??;
    }
    let seconds = first.elapsed().as_secs_f64();
    let mut latencies = std::mem::take(&mut *latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    latencies.sort_unstable_by(f64::total_cmp);
    Ok(Pushed {
        sent,
        accepted: accepted.load(Ordering::Relaxed),
        rejected: rejected.load(Ordering::Relaxed),
        seconds,
        p50_ms: quantile(&latencies, 0.5),
        p99_ms: quantile(&latencies, 0.99),
        max_ms: latencies.last().copied().unwrap_or(f64::NAN),
    })
}

fn message(
    events: &Events,
    rows: usize,
    first: u64,
    run_id: u128,
    random: &mut SmallRng,
) -> anyhow::Result<v1::PushRequest> {
    use v1::column::Values;
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?;
    let column = |name: &str, values| v1::Column { name: name.to_owned(), validity: Vec::new(), values: Some(values) };
    let keys = (0..rows).map(|_| random.random_range(0..events.keys)).collect();
    let amounts = (0..rows).map(|_| random.random()).collect();
    let ids = (0..rows as u64).map(|row| format!("{run_id}-{}", first + row)).collect();
    Ok(v1::PushRequest {
        project: events.project.clone(),
        source: events.source.clone(),
        rows: vec![
            column("entity", Values::Int64s(v1::Int64Values { values: keys })),
            column("amount", Values::Doubles(v1::DoubleValues { values: amounts })),
            column("at", Values::Timestamps(v1::TimestampValues { microseconds: vec![now; rows] })),
            column("id", Values::Strings(v1::StringValues { values: ids })),
        ],
        wait_visible: true,
    })
}
