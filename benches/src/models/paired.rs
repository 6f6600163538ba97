//! Two questions in turn, each waited for: what one costs beyond the other, whatever the machine does meanwhile.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::PathAndQuery;
use prost::Message as _;
use proto::v1;
use serde::Serialize;
use tonic::Request;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};

use super::Spread;
use crate::online::raw::Raw;
use crate::online::requests::Requests;

/// Microseconds.
#[derive(Debug, Serialize)]
pub struct Paired {
    pub pairs: usize,
    pub ours: Micros,
    pub peer: Micros,
    /// Of ours, what the server says that the model took, in the median.
    pub forward_us: f64,
    pub answer_bytes: usize,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Micros {
    pub p50_us: f64,
    pub p95_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
}

struct Caller<'a> {
    client: Grpc<Channel>,
    requests: &'a Requests,
    next: usize,
    millis: Vec<f64>,
}

impl Caller<'_> {
    async fn connect<'a>(address: &str, requests: &'a Requests) -> anyhow::Result<Caller<'a>> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
        Ok(Caller { client: Grpc::new(endpoint.connect().await?), requests, next: 0, millis: Vec::new() })
    }

    async fn ask(&mut self, counts: bool) -> anyhow::Result<Bytes> {
        let request = self.requests.bodies[self.next % self.requests.bodies.len()].clone();
        self.next += 1;
        let start = Instant::now();
        self.client.ready().await?;
        let path = PathAndQuery::from_static(self.requests.path);
        let answer = self.client.unary(Request::new(request), path, Raw).await?.into_inner();
        if counts {
            self.millis.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(answer)
    }

    fn micros(self) -> Micros {
        let Spread { p50, p95, p99, max } = Spread::of(self.millis);
        Micros { p50_us: p50 * 1e3, p95_us: p95 * 1e3, p99_us: p99 * 1e3, max_us: max * 1e3 }
    }
}

/// Predictions of ours and something of a peer's, in turn, after a warm-up that is not counted.
pub async fn run(
    ours: (&str, &Requests),
    peer: (&str, &Requests),
    warm_up: Duration,
    lasts: Duration,
) -> anyhow::Result<Paired> {
    let mut ours = Caller::connect(ours.0, ours.1).await?;
    let mut peer = Caller::connect(peer.0, peer.1).await?;
    let began = Instant::now() + warm_up;
    let ends = began + lasts;
    let (mut forwards, mut answer_bytes) = (Vec::new(), 0);
    loop {
        let now = Instant::now();
        if now >= ends {
            break;
        }
        let counts = now >= began;
        peer.ask(counts).await?;
        let answer = ours.ask(counts).await?;
        answer_bytes = answer.len();
        let answer = v1::PredictResponse::decode(answer)?;
        let failed = answer.outcomes.iter().find(|outcome| outcome.status() != v1::RowStatus::Ok);
        anyhow::ensure!(failed.is_none(), "a row was not answered: {failed:?}");
        if counts {
            forwards.push(f64::from(answer.timings.unwrap_or_default().forward_us));
        }
    }
    let forward_us = Spread::of(forwards).p50;
    let pairs = ours.millis.len();
    Ok(Paired { pairs, ours: ours.micros(), peer: peer.micros(), forward_us, answer_bytes })
}
