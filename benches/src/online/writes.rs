//! The function that puts a row, driven as fast as one connection goes: the floor of materialization.

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use redis::{Cmd, Pipeline};
use serde::Serialize;

/// Commands of one pipeline, as many as ours sends at once.
const COMMANDS: usize = 1_000;
/// Pipelines on their way.
const IN_FLIGHT: usize = 4;

#[derive(Debug, Serialize)]
pub struct Written {
    pub rows: u64,
    pub seconds: f64,
    pub per_second: f64,
}

/// Puts `rows` different rows of `blob_bytes` each into `redis`, where a server of ours has loaded its functions.
pub async fn run(redis: &str, function: &str, rows: u64, blob_bytes: usize) -> anyhow::Result<Written> {
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(30)));
    let connection = redis::Client::open(redis)?.get_multiplexed_async_connection_with_config(&config).await?;
    let started = Instant::now();
    let chunks = (0..rows).step_by(COMMANDS).map(|from| {
        let mut connection = connection.clone();
        async move {
            let to = (from + COMMANDS as u64).min(rows);
            let pipeline = pipeline(function, from..to, blob_bytes);
            let answers = connection.send_packed_commands(&pipeline, 0, pipeline.len()).await?;
            let refused = answers.iter().find(|answer| **answer != redis::Value::Int(1));
            anyhow::ensure!(refused.is_none(), "the function answered {refused:?}");
            anyhow::Ok(())
        }
    });
    let mut chunks = futures::stream::iter(chunks).buffer_unordered(IN_FLIGHT);
    while let Some(done) = chunks.next().await {
        done?;
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(Written { rows, seconds, per_second: rows as f64 / seconds })
}

fn pipeline(function: &str, rows: std::ops::Range<u64>, blob_bytes: usize) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(COMMANDS);
    let mut blob = vec![0x40_u8; blob_bytes];
    blob[0] = 1;
    for row in rows {
        let mut key = b"c1:{bench/".to_vec();
        key.extend_from_slice(&(row ^ (1 << 63)).to_be_bytes());
        key.extend_from_slice(b"}raw@0123456789abcdef");
        // Not all alike, or what a server stores could be shared.
        blob[blob_bytes - 8..].copy_from_slice(&row.to_be_bytes());
        let mut command = Cmd::new();
        command.arg("FCALL").arg(function).arg(1).arg(&key).arg(&blob).arg("");
        pipeline.add_command(command);
    }
    pipeline
}
