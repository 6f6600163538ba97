//! Connections that come back: a call finds an open connection, or opens one, or fails within its time.
//!
//! redis's own connection manager retries on a schedule of its own and keeps a connection that has gone silent for as long
//! as TCP does, which is minutes. Here one deadline covers all of a call, and a connection that missed one is given up.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::redis::aio::MultiplexedConnection;
use ::redis::io::tcp::TcpSettings;
use ::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, FromRedisValue, IntoConnectionInfo, Pipeline,
    RedisError, ServerError, ServerErrorKind, Value,
};
use tokio::time::{Instant, timeout_at};

use crate::{NodeReport, StoreError};

/// The functions that change rows and tiles.
pub(super) const FUNCTIONS: &str = include_str!("functions.lua");

/// After a failure the next attempt waits this long, doubled with each further one. Calls in between fail at once: waiting
/// would only use up their deadline.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Calls queued on a connection while its socket is full; further ones wait, within their time.
const QUEUED_CALLS_MAX: usize = 256;

/// Where a Redis is, and how long to wait for it.
pub(super) struct Server {
    client: Client,
    pub(super) place: String,
    pub(super) timeout: Duration,
}

impl Server {
    pub(super) fn new(url: &str, timeout: Duration) -> Result<Server, StoreError> {
        // An address may hold a password, so only its scheme is shown until it is understood.
        let scheme = url.split("://").next().unwrap_or_default();
        let refused = |place: String, what: String| StoreError::Refused { place, what };
        match scheme {
            "redis" | "redis+unix" | "unix" => {}
            "rediss" => {
                let what = "TLS is not supported yet; use redis:// within a private network, or a TLS tunnel";
                return Err(refused("rediss://".to_owned(), what.to_owned()));
            }
            "redis+cluster" => {
                let what = "Redis Cluster is not supported yet; name one master as redis://host:port";
                return Err(refused("redis+cluster://".to_owned(), what.to_owned()));
            }
            _ => {
                let what = "the address should look like redis://host:port; correct `online:` in coeval.yaml";
                return Err(refused("an unknown address".to_owned(), what.to_owned()));
            }
        }
        let wrong = |error: RedisError| {
            let what = format!("the address is wrong ({error}); it should look like redis://host:port/db");
            refused(format!("{scheme}://"), what)
        };
        let info = url.into_connection_info().map_err(wrong)?;
        let mut place = match info.addr() {
            ConnectionAddr::Unix(path) => path.display().to_string(),
            addr => format!("redis://{addr}"),
        };
        if info.redis_settings().db() != 0 {
            place = format!("{place}/{}", info.redis_settings().db());
        }
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = Client::open(info).map_err(wrong)?;
        Ok(Server { client, place, timeout })
    }

    pub(super) fn timed_out(&self) -> StoreError {
        StoreError::Timeout { place: self.place.clone(), millis: self.timeout.as_millis() as u64 }
    }

    /// What an answer that is an error means.
    pub(super) fn refusal(&self, error: &ServerError) -> StoreError {
        let place = self.place.clone();
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
        match error.kind() {
            ErrorKind::AuthenticationFailed | ErrorKind::InvalidClientConfig | ErrorKind::RESP3NotSupported => {
                Failure::Refused(format!("{error}; correct the user and password in `online:` in coeval.yaml"))
            }
            ErrorKind::Server(
                ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown | ServerErrorKind::ClusterDown,
            ) => Failure::Unreachable(error.to_string()),
            ErrorKind::Server(_) | ErrorKind::Extension => Failure::Refused(error.to_string()),
            _ => Failure::Unreachable(error.to_string()),
        }
    }

    fn error(&self, failure: Failure) -> StoreError {
        let place = self.place.clone();
        match failure {
            Failure::Unreachable(what) => StoreError::Unreachable { place, what },
            Failure::Refused(what) => StoreError::Refused { place, what },
        }
    }

    /// A connection to a server that can be used as a store.
    async fn open(&self) -> Result<MultiplexedConnection, Failure> {
        let config = AsyncConnectionConfig::new()
            // The caller's deadline covers all of this.
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(QUEUED_CALLS_MAX);
        let connecting = self.client.get_multiplexed_async_connection_with_config(&config);
        let mut connection = connecting.await.map_err(|error| self.failure(error))?;
        let info = ::redis::cmd("INFO");
        let info: String = info.query_async(&mut connection).await.map_err(|error| self.failure(error))?;
        check_info(&info).map_err(Failure::Refused)?;
        let load = load_functions();
        load.exec_async(&mut connection).await.map_err(|error| self.failure(error))?;
        Ok(connection)
    }
}

pub(super) fn load_functions() -> Cmd {
    let mut load = Cmd::new();
    load.arg("FUNCTION").arg("LOAD").arg("REPLACE").arg(FUNCTIONS);
    load
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim());
    info.lines().find_map(value)
}

/// What [`report`] is made of.
pub(super) fn report_commands() -> Vec<Cmd> {
    let mut commands = vec![Cmd::new(), Cmd::new()];
    commands[0].arg("INFO");
    commands[1].arg("CONFIG").arg("GET").arg("appendfsync");
    commands
}

/// What a server says of itself, for people.
pub(super) fn report(place: &str, answers: &[Value]) -> NodeReport {
    let text = |value: Option<&Value>| value.and_then(|value| String::from_redis_value_ref(value).ok());
    let info = text(answers.first()).unwrap_or_default();
    let number = |name: &str| field(&info, name).and_then(|value| value.parse::<u64>().ok());
    let role = match field(&info, "role") {
        Some("slave") => "replica",
        _ => "master",
    };
    // A hosted Redis may not answer CONFIG.
    let settings = answers.get(1).map(Vec::<String>::from_redis_value_ref);
    let durability = match (field(&info, "aof_enabled"), settings) {
        (Some("0"), _) => "no append-only file".to_owned(),
        (_, Some(Ok(settings))) if settings.len() == 2 => format!("appendfsync {}", settings[1]),
        _ => "unknown".to_owned(),
    };
    NodeReport {
        place: place.to_owned(),
        role: role.to_owned(),
        used_bytes: number("used_memory"),
        max_bytes: number("maxmemory").filter(|bytes| *bytes > 0),
        keys: field(&info, "db0").and_then(|db| db.strip_prefix("keys=")?.split(',').next()?.parse().ok()),
        durability,
        problems: check_info(&info).err().into_iter().collect(),
    }
}

/// Whether a server that says this of itself can be a store; else why not.
fn check_info(info: &str) -> Result<(), String> {
    let field = |name: &str| field(info, name).unwrap_or_default();
    let version = field("redis_version");
    let major: Option<u32> = version.split('.').next().and_then(|major| major.parse().ok());
    if major.is_none_or(|major| major < 7) {
        return Err(format!("it is Redis {version}, and functions need version 7 or later; upgrade it"));
    }
    if field("redis_mode") == "cluster" {
        return Err("it is a node of a cluster, which is not supported yet; use a Redis of its own".to_owned());
    }
    if field("role") == "slave" {
        return Err("it is a replica, and replicas take no writes; name its master".to_owned());
    }
    let policy = field("maxmemory_policy");
    if policy != "noeviction" {
        return Err(format!(
            "its maxmemory-policy is `{policy}`, so it drops features when memory is short, which would be served as \
             missing; set it to noeviction"
        ));
    }
    Ok(())
}

/// One connection, shared by concurrent calls, and opened again when it is lost.
pub(super) struct Lane {
    server: Arc<Server>,
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
    pub(super) fn new(server: Arc<Server>) -> Lane {
        Lane { server, open: Mutex::new(None), dial: tokio::sync::Mutex::default() }
    }

    /// Sends a pipeline and returns its answers, errors among them. A connection that turns out to be lost is opened again
    /// once, so that nobody notices a restart; everything a store sends may be sent twice.
    pub(super) async fn call(&self, pipeline: &Pipeline) -> Result<Vec<Value>, StoreError> {
        let deadline = Instant::now() + self.server.timeout;
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
        let failure = match timeout_at(deadline, self.server.open()).await {
            Ok(Ok(connection)) => {
                dial.failed = None;
                let open = Open { number: dial.attempts, connection };
                *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(open.clone());
                return Ok(open);
            }
            Ok(Err(failure)) => failure,
            Err(_) => {
                let millis = self.server.timeout.as_millis();
                Failure::Unreachable(format!("no connection within {millis} ms"))
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

#[cfg(test)]
mod tests;
