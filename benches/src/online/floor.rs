//! The floor: a tonic handler that forwards recorded commands to Redis in one pipeline, and answers so many bytes.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use anyhow::Context as _;
use bytes::Bytes;
use futures::future::BoxFuture;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, Pipeline};
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};

use super::raw::Raw;
use super::record::{Command, Recorded};

#[derive(Clone)]
struct Floor {
    shared: Arc<Shared>,
}

struct Shared {
    /// None: a call that does nothing.
    redis: Option<MultiplexedConnection>,
    pipelines: Vec<Pipeline>,
    next: AtomicUsize,
    answer: Bytes,
}

impl NamedService for Floor {
    const NAME: &'static str = "coeval.v1.Gateway";
}

impl tower::Service<http::Request<Body>> for Floor {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = Method { shared: self.shared.clone() };
        Box::pin(async move { Ok(Grpc::new(Raw).unary(method, request).await) })
    }
}

struct Method {
    shared: Arc<Shared>,
}

impl UnaryService<Bytes> for Method {
    type Response = Bytes;
    type Future = BoxFuture<'static, Result<Response<Bytes>, Status>>;

    fn call(&mut self, _request: Request<Bytes>) -> Self::Future {
        let shared = self.shared.clone();
        Box::pin(async move {
            if let Some(redis) = &shared.redis {
                let next = shared.next.fetch_add(1, Ordering::Relaxed) % shared.pipelines.len();
                let pipeline = &shared.pipelines[next];
                let answers = redis.clone().send_packed_commands(pipeline, 0, pipeline.len()).await;
                let answers = answers.map_err(|error| Status::unavailable(error.to_string()))?;
                std::hint::black_box(answers);
            }
            Ok(Response::new(shared.answer.clone()))
        })
    }
}

/// Serves until the process is ended; `ready` is told the address.
pub async fn run(
    redis: Option<&str>,
    commands: Option<&Path>,
    answer_bytes: usize,
    ready: impl FnOnce(std::net::SocketAddr),
) -> anyhow::Result<()> {
    let mut pipelines = Vec::new();
    let connection = match (redis, commands) {
        (Some(url), Some(path)) => {
            let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let recorded: Recorded = serde_json::from_slice(&text)?;
            pipelines.extend(recorded.calls.iter().map(|call| pipeline(call)));
            anyhow::ensure!(!pipelines.is_empty(), "{} holds no commands", path.display());
            Some(redis::Client::open(url)?.get_multiplexed_async_connection().await?)
        }
        _ => None,
    };
    let shared =
        Shared { redis: connection, pipelines, next: AtomicUsize::new(0), answer: vec![0x5a; answer_bytes].into() };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    ready(listener.local_addr()?);
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let floor = Floor { shared: Arc::new(shared) };
    tonic::transport::Server::builder().add_service(floor).serve_with_incoming(incoming).await?;
    Ok(())
}

fn pipeline(commands: &[Command]) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(commands.len());
    for command in commands {
        let mut packed = Cmd::new();
        for part in command {
            packed.arg(part);
        }
        pipeline.add_command(packed);
    }
    pipeline
}
