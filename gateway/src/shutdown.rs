//! The end: say so, stop accepting, finish what is in flight, close what must not be lost - each within a bound.
//!
//! `/ready` and the health service turn first, so that load balancers look elsewhere; requests that still arrive are refused
//! as unavailable, which clients may retry. The HTTP port goes last, because it is the one that says why.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic_health::server::HealthReporter;

use crate::answer::Gateway;
use crate::config::ServeError;
use crate::status::chain;

/// How long what is in flight may take. Longer than any deadline of a prediction, shorter than what supervisors wait before
/// they kill.
const IN_FLIGHT: Duration = Duration::from_secs(30);
/// How long each of the parts may take to close.
const CLOSE: Duration = Duration::from_secs(20);
/// What is not on the object store by then waits on disk.
const UPLOADED: Duration = Duration::from_secs(5);
/// How often to look whether the process is past helping.
const STUCK_LOOK: Duration = Duration::from_millis(250);
const HTTP_CLOSE: Duration = Duration::from_secs(2);

/// The running parts of a server.
pub(crate) struct Draining {
    pub gateway: Arc<Gateway>,
    pub health: HealthReporter,
    pub grpc_server: JoinHandle<Result<(), ServeError>>,
    pub http_server: JoinHandle<Result<(), ServeError>>,
    pub http_stop: CancellationToken,
    pub background: JoinHandle<()>,
}

/// Waits for the word to stop, or for a part to fail, and then ends all of them in order.
pub(crate) async fn drain(mut parts: Draining, stop: CancellationToken) -> Result<(), ServeError> {
    let mut outcome = Ok(());
    let (mut grpc_ended, mut http_ended) = (false, false);
    tokio::select! {
        () = stop.cancelled() => {}
        ended = &mut parts.grpc_server => {
            grpc_ended = true;
            outcome = joined("gRPC", ended);
        }
        ended = &mut parts.http_server => {
            http_ended = true;
            outcome = joined("HTTP", ended);
        }
        why = stuck(&parts.gateway) => {
            tracing::error!(why, "the process ends, for its supervisor to start a new one");
            outcome = Err(ServeError::Stuck { why });
        }
    }
    let gateway = &parts.gateway;
    tracing::info!("draining");
    for service in ["", "coeval.v1.Gateway", "coeval.v1.Ingest", "coeval.v1.Control"] {
        parts.health.set_service_status(service, tonic_health::ServingStatus::NotServing).await;
    }
    gateway.drain.cancel();
    gateway.follower.versions.end_loads();
    // From now on no deploy waits for this gateway.
    let _ = tokio::time::timeout(CLOSE, gateway.presence.end()).await;
    let mut unclosed: Vec<String> = Vec::new();
    if !grpc_ended {
        match tokio::time::timeout(IN_FLIGHT, &mut parts.grpc_server).await {
            Ok(ended) => outcome = outcome.and(joined("gRPC", ended)),
            Err(_) => {
                parts.grpc_server.abort();
                tracing::warn!(seconds = IN_FLIGHT.as_secs(), "calls in flight did not end in time and were cut off");
            }
        }
    }
    // It stops by the same token as the gRPC server.
    if tokio::time::timeout(CLOSE, &mut parts.background).await.is_err() {
        parts.background.abort();
    }
    // Nothing is answered any more: what was, is written down.
    let observing = gateway.clone();
    let ended = tokio::task::spawn_blocking(move || observing.observing.end());
    match tokio::time::timeout(CLOSE, ended).await {
        Ok(_) => {
            if let Some(uploads) = &gateway.uploads {
                uploads.last(UPLOADED, &|| gateway.served().plan().ok().cloned()).await;
            }
            if let Some(drift) = &gateway.drift {
                drift.last(UPLOADED, (gateway.clock)()).await;
            }
        }
        Err(_) => unclosed.push("the serving log was not written to disk in time".to_owned()),
    }
    if let Some(exposures) = &gateway.exposures {
        exposures.last(UPLOADED, (gateway.clock)()).await;
    }
    if let Some(events) = &gateway.events {
        match tokio::time::timeout(CLOSE, events.shutdown()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => unclosed.push(format!("the event log: {}", chain(&error))),
            Err(_) => unclosed.push("the event log did not close in time".to_owned()),
        }
    }
    for model in gateway.served().loaded() {
        if tokio::time::timeout(CLOSE, model.server.shutdown()).await.is_err() {
            unclosed.push(format!("version {} of model `{}` did not end in time", model.version, model.name));
        }
    }
    match tokio::time::timeout(CLOSE, gateway.store.sync()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => unclosed.push(error.to_string()),
        Err(_) => unclosed.push("the online store did not sync in time".to_owned()),
    }
    parts.http_stop.cancel();
    if !http_ended && tokio::time::timeout(HTTP_CLOSE, &mut parts.http_server).await.is_err() {
        parts.http_server.abort();
    }
    tracing::info!("ended");
    outcome?;
    if unclosed.is_empty() { Ok(()) } else { Err(ServeError::Drain { what: unclosed.join("; ") }) }
}

/// Returns when only a new process can help.
async fn stuck(gateway: &Gateway) -> String {
    loop {
        tokio::time::sleep(STUCK_LOOK).await;
        if let Some(why) = gateway.stuck() {
            return why;
        }
    }
}

fn joined(what: &'static str, ended: Result<Result<(), ServeError>, tokio::task::JoinError>) -> Result<(), ServeError> {
    ended.unwrap_or_else(|error| Err(ServeError::Server { what, source: Box::new(error) }))
}
