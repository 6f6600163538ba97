//! The same pace against a server that speaks HTTP/1.1 with JSON, such as Feast's.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::load::{Outcome, quantile};

/// Asks for the features of a service of so many entities, by so many callers with a connection each.
pub async fn run(
    address: &str,
    service: &str,
    keys: i64,
    entities: usize,
    callers: usize,
    warm_up: Duration,
    lasts: Duration,
) -> anyhow::Result<Outcome> {
    let began = Instant::now() + warm_up;
    let ends = began + lasts;
    let mut tasks = Vec::new();
    for caller in 0..callers {
        let (address, service) = (address.to_owned(), service.to_owned());
        tasks.push(tokio::spawn(async move {
            let mut random = SmallRng::seed_from_u64(caller as u64);
            let stream = TcpStream::connect(&address).await.with_context(|| format!("no connection to {address}"))?;
            stream.set_nodelay(true)?;
            let mut stream = BufReader::new(stream);
            let mut micros = Vec::new();
            let mut answer_bytes = 0;
            loop {
                let keys: Vec<i64> = (0..entities).map(|_| random.random_range(0..keys)).collect();
                let body = json!({"feature_service": service, "entities": {"entity": keys}}).to_string();
                let started = Instant::now();
                if started >= ends {
                    return anyhow::Ok((micros, answer_bytes));
                }
                let request = format!(
                    "POST /get-online-features HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
                     Content-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.get_mut().write_all(request.as_bytes()).await?;
                answer_bytes = answer(&mut stream).await?;
                if started >= began {
                    micros.push(started.elapsed().as_secs_f64() * 1e6);
                }
            }
        }));
    }
    let mut all = Vec::new();
    let mut answer_bytes = 0;
    for task in tasks {
        let (micros, bytes) = task.await??;
        all.extend(micros);
        answer_bytes = bytes;
    }
    all.sort_unstable_by(f64::total_cmp);
    let seconds = lasts.as_secs_f64();
    Ok(Outcome {
        answered: all.len() as u64,
        failed: 0,
        seconds,
        per_second: all.len() as f64 / seconds,
        p50_us: quantile(&all, 0.5),
        p95_us: quantile(&all, 0.95),
        p99_us: quantile(&all, 0.99),
        max_us: all.last().copied().unwrap_or(f64::NAN),
        answer_bytes,
        failure: None,
    })
}

/// Reads one answer of a stated length.
async fn answer(stream: &mut BufReader<TcpStream>) -> anyhow::Result<u64> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    anyhow::ensure!(line.contains(" 200 "), "the server answered {}", line.trim());
    let mut length = None;
    loop {
        line.clear();
        stream.read_line(&mut line).await?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = Some(value.trim().parse::<usize>()?);
        }
    }
    let mut body = vec![0; length.context("an answer without a length")?];
    stream.read_exact(&mut body).await?;
    Ok(body.len() as u64)
}
