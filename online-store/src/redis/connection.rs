//! Connections that come back: a call finds an open connection, or opens one, or fails within its time.
//!
//! redis's own connection manager retries on a schedule of its own and keeps a connection that has gone silent for as long
//! as TCP does, which is minutes. Here one deadline covers all of a call, and a connection that missed one is given up.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::redis::aio::MultiplexedConnection;
use ::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, Pipeline, RedisError, ServerError, ServerErrorKind,
    Value,
};
use tokio::time::{Instant, timeout_at};

use super::info::{self, Unfit};
use crate::StoreError;

/// The functions that change rows and tiles.
pub(super) const FUNCTIONS: &str = include_str!("functions.lua");
/// The functions that change the event log, where it is kept in the same Redis.
const LOG_FUNCTIONS: &str = include_str!("log.lua");

/// After a failure the next attempt waits this long, doubled with each further one. Calls in between fail at once: waiting
/// would only use up their deadline.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Calls queued on a connection while its socket is full; further ones wait, within their time.
const QUEUED_CALLS_MAX: usize = 256;

/// Whether a server has everything, or the slots that it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Alone,
    Cluster,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Rows, tiles and facts: the server must be one that can hold them.
    Data,
    /// Questions about the server itself, which replicas answer too.
    Questions,
}

/// Where a Redis is, and how long to wait for it.
pub(super) struct Server {
    pub(super) client: Client,
    pub(super) kind: Kind,
    pub(super) place: Arc<str>,
    pub(super) timeout: Duration,
}

impl Server {
    pub(super) fn timed_out(&self) -> StoreError {
        StoreError::Timeout { place: self.place.to_string(), millis: self.timeout.as_millis() as u64 }
    }

    fn is_tls(&self) -> bool {
        matches!(self.client.get_connection_info().addr(), ConnectionAddr::TcpTls { .. })
    }

    /// What an answer that is an error means.
    pub(super) fn refusal(&self, error: &ServerError) -> StoreError {
        let place = self.place.to_string();
        let text = format!("{} {}", error.code(), error.details().unwrap_or_default());
        let what = text.trim_end().to_owned();
        match error.kind() {
            // It will answer later: it loads its data, or another node takes over.
            Some(
                ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
                | ServerErrorKind::ReadOnly,
            ) => StoreError::Unreachable { place, what },
            // A script of somebody else runs too long.
            _ if error.code() == "BUSY" => StoreError::Unreachable { place, what },
            _ => StoreError::Refused { place, what },
        }
    }

    fn failure(&self, error: RedisError) -> Failure {
        let text = error.to_string();
        match error.kind() {
            ErrorKind::AuthenticationFailed | ErrorKind::InvalidClientConfig | ErrorKind::RESP3NotSupported => {
                Failure::Refused(format!("{text}; correct the user and password in `online:` in coeval.yaml"))
            }
            ErrorKind::Server(
                ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown | ServerErrorKind::ClusterDown,
            ) => Failure::Unreachable(text),
            ErrorKind::Server(_) | ErrorKind::Extension if error.code() == Some("NOAUTH") => {
                Failure::Refused("it asks for a password; write redis://user:password@host in `online:`".to_owned())
            }
            ErrorKind::Server(_) | ErrorKind::Extension => Failure::Refused(text),
            _ => match not_trusted(&text) {
                Some(what) => Failure::Refused(what),
                None => Failure::Unreachable(text),
            },
        }
    }

    fn error(&self, failure: Failure) -> StoreError {
        let place = self.place.to_string();
        match failure {
            Failure::Unreachable(what) => StoreError::Unreachable { place, what },
            Failure::Refused(what) => StoreError::Refused { place, what },
        }
    }

    /// A connection that can be used for its purpose.
    async fn open(&self, purpose: Purpose) -> Result<MultiplexedConnection, Failure> {
        let config = AsyncConnectionConfig::new()
            // The caller's deadline covers all of this.
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(QUEUED_CALLS_MAX);
        let connecting = self.client.get_multiplexed_async_connection_with_config(&config);
        let mut connection = connecting.await.map_err(|error| self.failure(error))?;
        if purpose == Purpose::Data {
            let info = ::redis::cmd("INFO");
            let info: String = info.query_async(&mut connection).await.map_err(|error| self.failure(error))?;
            info::check(&info, self.kind).map_err(|unfit| match unfit {
                Unfit::Refused(what) => Failure::Refused(what),
                Unfit::Replica => Failure::Unreachable("it is a replica now".to_owned()),
            })?;
            for load in load_functions() {
                match load.exec_async(&mut connection).await {
                    // It takes no writes now, which these count as; but it answers reads.
                    Err(error) if matches!(error.code(), Some("OOM" | "MISCONF")) => {}
                    loaded => loaded.map_err(|error| self.failure(error))?,
                }
            }
        }
        Ok(connection)
    }
}

/// What is wrong with the certificates of either side, where that is why there is no connection.
fn not_trusted(text: &str) -> Option<String> {
    let step = if text.contains("invalid peer certificate") {
        "its certificate is not trusted; name the authority that signed it: rediss://host:port?ca=/path/to/ca.pem"
    } else if text.contains("CertificateRequired") || text.contains("UnknownCA") || text.contains("BadCertificate") {
        "it does not trust our certificate; name one that it does: rediss://host:port?cert=/path.pem&key=/path.pem"
    } else if text.contains("corrupt message") {
        "it does not speak TLS there; write redis://, or name its TLS port"
    } else {
        return None;
    };
    Some(format!("{text}: {step}"))
}

pub(super) fn load_functions() -> Vec<Cmd> {
    let load = |functions: &str| {
        let mut load = Cmd::new();
        load.arg("FUNCTION").arg("LOAD").arg("REPLACE").arg(functions);
        load
    };
    vec![load(FUNCTIONS), load(LOG_FUNCTIONS)]
}

/// One connection, shared by concurrent calls, and opened again when it is lost.
pub(super) struct Lane {
    server: Arc<Server>,
    purpose: Purpose,
    open: Mutex<Option<Open>>,
    /// Held while connecting, so that many calls make one attempt.
    dial: tokio::sync::Mutex<Dial>,
}

#[derive(Clone)]
struct Open {
    /// Counts connections, so that a call which lost an earlier one does not close this.
    number: u64,
    connection: MultiplexedConnection,
}

#[derive(Default)]
struct Dial {
    attempts: u64,
    failed: Option<Failed>,
}

struct Failed {
    failure: Failure,
    backoff: Duration,
    until: Instant,
}

#[derive(Debug, Clone)]
enum Failure {
    Unreachable(String),
    Refused(String),
}

impl Lane {
    pub(super) fn new(server: Arc<Server>, purpose: Purpose) -> Lane {
        Lane { server, purpose, open: Mutex::new(None), dial: tokio::sync::Mutex::default() }
    }

    /// Sends a pipeline and returns its answers, errors among them. A connection that turns out to be lost is opened again
    /// once, so that nobody notices a restart; everything a store sends may be sent twice.
    pub(super) async fn call(&self, pipeline: &Pipeline, deadline: Instant) -> Result<Vec<Value>, StoreError> {
        let mut again = true;
        loop {
            let Open { number, mut connection } = self.connection(deadline).await?;
            let sent = connection.send_packed_commands(pipeline, 0, pipeline.len());
            let error = match timeout_at(deadline, sent).await {
                Ok(Ok(values)) if values.len() == pipeline.len() => {
                    if values.iter().any(is_read_only) {
                        // It became a replica; the address may lead to the new master.
                        self.lost(number);
                    }
                    return Ok(values);
                }
                Ok(Ok(values)) => format!("{} answers to {} commands", values.len(), pipeline.len()),
                Ok(Err(error)) => error.to_string(),
                Err(_) => {
                    self.lost(number);
                    return Err(self.server.timed_out());
                }
            };
            self.lost(number);
            if !again {
                return Err(self.server.error(Failure::Unreachable(error)));
            }
            again = false;
        }
    }

    async fn connection(&self, deadline: Instant) -> Result<Open, StoreError> {
        if let Some(open) = self.current() {
            return Ok(open);
        }
        let Ok(mut dial) = timeout_at(deadline, self.dial.lock()).await else {
            return Err(self.server.timed_out());
        };
        if let Some(open) = self.current() {
            return Ok(open);
        }
        if let Some(failed) = &dial.failed
            && Instant::now() < failed.until
        {
            return Err(self.server.error(failed.failure.clone()));
        }
        dial.attempts += 1;
        let failure = match timeout_at(deadline, self.server.open(self.purpose)).await {
            Ok(Ok(connection)) => {
                dial.failed = None;
                let open = Open { number: dial.attempts, connection };
                *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(open.clone());
                return Ok(open);
            }
            Ok(Err(failure)) => failure,
            Err(_) => {
                let millis = self.server.timeout.as_millis();
                // A server without TLS says nothing to one that begins with it.
                let hint = if self.server.is_tls() { "; if it does not speak TLS there, write redis://" } else { "" };
                Failure::Unreachable(format!("no connection within {millis} ms{hint}"))
            }
        };
        let backoff = dial.failed.as_ref().map_or(BACKOFF_MIN, |failed| (failed.backoff * 2).min(BACKOFF_MAX));
        tracing::warn!(place = %self.server.place, ?failure, ?backoff, "the online store cannot be reached");
        dial.failed = Some(Failed { failure: failure.clone(), backoff, until: Instant::now() + backoff });
        Err(self.server.error(failure))
    }

    fn current(&self) -> Option<Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lost(&self, number: u64) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().is_some_and(|open| open.number == number) {
            *open = None;
        }
    }
}

fn is_read_only(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if error.kind() == Some(ServerErrorKind::ReadOnly))
}
