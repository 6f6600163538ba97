//! The connection to a running server, and what its refusals look like to the user.

use std::time::Duration;

use proto::v1::control_client::ControlClient;
use proto::v1::gateway_client::GatewayClient;
use proto::v1::ingest_client::IngestClient;
use proto::v1::{GetCatalogRequest, GetCatalogResponse, NamedType, ServiceInfo, SourceInfo};
use thiserror::Error;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::error::CliError;
use crate::output::Output;
use crate::project::Place;

/// A server on this machine answers at once; one across the world within this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A server that is busy still answers pings within this.
const ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers of many rows are large; this only keeps a mistaken address from filling the memory.
const MESSAGE_BYTES_MAX: usize = 256 << 20;

#[derive(Debug, Error)]
pub enum ServerError {
    #[error("no server answers at {address}; start one with `coeval serve`, or name another with `--server`")]
    Unreachable {
        address: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(
        "the settings let the server choose its port (`serve.grpc: {address}`); name the server with `--server HOST:PORT`"
    )]
    NoPort { address: String },
    #[error("`{text}` is not the address of a server; write HOST:PORT")]
    Address { text: String },
    /// The server's own words: they say what and where.
    #[error("{message} (the server at {address} says so, {code})")]
    Refused { address: String, code: &'static str, message: String },
    #[error("the server at {address} ended the call before it was done; see its log")]
    Cut { address: String },
    #[error(
        "the server at {address} names a type that this build does not know: {text}; use the `coeval` it was started with"
    )]
    Type { address: String, text: String },
}

/// Which server a command asks.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ServerArguments {
    /// The server, as HOST:PORT; without it, the `serve.grpc` of the settings
    #[arg(long, value_name = "URL", env = "COEVAL_SERVER")]
    pub server: Option<String>,
}

/// A server that answered, and the project that it is asked about.
#[derive(Debug, Clone)]
pub struct Server {
    pub address: String,
    pub project: String,
    pub channel: Channel,
}

impl Server {
    /// Reads the settings for the project's name and the server's address, and connects.
    pub async fn of(place: &Place, arguments: &ServerArguments, output: &Output) -> Result<Server, CliError> {
        let settings = place.settings(output)?;
        let address = address(arguments.server.as_deref(), &settings.serve.grpc)?;
        Ok(Server::connect(address, settings.project.value.clone()).await?)
    }

    /// The server that runs, if one does where the settings say; one that was named must be there.
    pub async fn if_running(
        place: &Place,
        arguments: &ServerArguments,
        output: &Output,
    ) -> Result<Option<Server>, CliError> {
        match Server::of(place, arguments, output).await {
            Ok(server) => Ok(Some(server)),
            Err(CliError::Server(ServerError::Unreachable { .. } | ServerError::NoPort { .. }))
                if arguments.server.is_none() =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    pub async fn connect(address: String, project: String) -> Result<Server, ServerError> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|_| ServerError::Address { text: address.clone() })?
            .connect_timeout(CONNECT_TIMEOUT)
            // Whatever took the connection and never speaks HTTP/2 is no server of ours.
            .http2_keep_alive_interval(CONNECT_TIMEOUT)
            .keep_alive_timeout(ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        match endpoint.connect().await {
            Ok(channel) => Ok(Server { address, project, channel }),
            Err(error) => Err(ServerError::Unreachable { address, source: root(error) }),
        }
    }

    pub fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn gateway(&self) -> GatewayClient<Channel> {
        GatewayClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn ingest(&self) -> IngestClient<Channel> {
        IngestClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// What a failed call means to the user.
    pub fn failed(&self, status: Status) -> ServerError {
        let address = self.address.clone();
        // A status that the transport made up has a source; one that the server sent has not.
        if status.code() == Code::Unavailable && std::error::Error::source(&status).is_some() {
            return ServerError::Unreachable { address, source: Box::new(status) };
        }
        if status.message().is_empty() {
            return ServerError::Refused { address, code: code(status.code()), message: status.code().to_string() };
        }
        ServerError::Refused { address, code: code(status.code()), message: status.message().to_owned() }
    }

    pub async fn catalog(&self) -> Result<GetCatalogResponse, ServerError> {
        let request = GetCatalogRequest { project: self.project.clone() };
        let answer = self.control().get_catalog(request).await.map_err(|status| self.failed(status))?;
        Ok(answer.into_inner())
    }

    pub async fn service(&self, name: &str) -> Result<ServiceInfo, CliError> {
        let services = self.catalog().await?.services;
        match services.iter().find(|service| service.name == name) {
            Some(service) => Ok(service.clone()),
            None => Err(CliError::unknown("feature service", name, services.iter().map(|s| s.name.as_str()))),
        }
    }

    pub async fn source(&self, name: &str) -> Result<SourceInfo, CliError> {
        let sources = self.catalog().await?.sources;
        match sources.iter().find(|source| source.name == name) {
            Some(source) => Ok(source.clone()),
            None => Err(CliError::unknown("source", name, sources.iter().map(|s| s.name.as_str()))),
        }
    }

    /// Names and types as the server describes them.
    pub fn types(&self, described: &[NamedType]) -> Result<Vec<(String, feature_defs::value::Type)>, ServerError> {
        let parse = |named: &NamedType| match feature_defs::value::Type::parse(&named.r#type) {
            Ok(parsed) => Ok((named.name.clone(), parsed)),
            Err(error) => Err(ServerError::Type { address: self.address.clone(), text: error.text }),
        };
        described.iter().map(parse).collect()
    }
}

/// HOST:PORT of the server to ask.
pub fn address(given: Option<&str>, settings: &str) -> Result<String, ServerError> {
    let text = given.unwrap_or(settings);
    let bare = text.strip_prefix("grpc://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    let bare = bare.trim_end_matches('/');
    let Some((host, Ok(port))) = bare.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>())) else {
        return Err(ServerError::Address { text: text.to_owned() });
    };
    if port == 0 {
        return Err(ServerError::NoPort { address: bare.to_owned() });
    }
    // Listening everywhere includes here.
    let host = match host {
        "0.0.0.0" => "127.0.0.1",
        "[::]" => "[::1]",
        host => host,
    };
    Ok(format!("{host}:{port}"))
}

/// The transport's error says "transport error"; its innermost cause says "connection refused".
fn root(error: tonic::transport::Error) -> Box<dyn std::error::Error + Send + Sync> {
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string().into()
}

fn code(code: Code) -> &'static str {
    match code {
        Code::InvalidArgument => "invalid argument",
        Code::NotFound => "not found",
        Code::AlreadyExists => "already exists",
        Code::FailedPrecondition => "failed precondition",
        Code::ResourceExhausted => "resource exhausted",
        Code::DeadlineExceeded => "deadline exceeded",
        Code::Unavailable => "unavailable",
        Code::Unimplemented => "unimplemented",
        Code::PermissionDenied => "permission denied",
        Code::Unauthenticated => "unauthenticated",
        Code::OutOfRange => "out of range",
        Code::Aborted => "aborted",
        Code::Cancelled => "cancelled",
        Code::DataLoss => "data loss",
        Code::Ok | Code::Unknown | Code::Internal => "internal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        fn check(given: Option<&str>, settings: &str, expected: &str) {
            let found = match address(given, settings) {
                Ok(address) => address,
                Err(error) => error.to_string(),
            };
            assert!(found.contains(expected), "{found}");
        }
        check(None, "127.0.0.1:7400", "127.0.0.1:7400");
        check(None, "0.0.0.0:7400", "127.0.0.1:7400");
        check(None, "[::]:7400", "[::1]:7400");
        check(Some("grpc://shop:9000/"), "127.0.0.1:7400", "shop:9000");
        check(Some("shop"), "127.0.0.1:7400", "`shop` is not the address");
        check(None, "127.0.0.1:0", "--server HOST:PORT");
    }
}
