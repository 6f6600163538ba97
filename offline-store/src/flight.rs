//! Arrow Flight: training sets computed for a spine that the client streams in, and stored datasets.
//!
//! - `DoExchange` with a `TrainingSetCommand` ([`exchange`]): the client sends the spine, the server answers with the
//!   training set. With a dataset name it is stored on the way, unless it is there already. The last message carries what
//!   known-at rules hid and what was stored.
//! - `DoGet` with a `DatasetTicket` ([`stored`]): rows of a stored dataset, from any place on, in stored or shuffled order.
//!   `GetFlightInfo` with the same bytes deals them to endpoints.
//! - `DoAction` `dataset-profile` with a `DatasetTicket`: what drift is judged by, with labels in place of edges.
//! - Either can be asked for a model's inputs instead of features ([`tensor`]), made by the encoder that serving runs.

mod encode;
mod exchange;
mod stored;
mod tensor;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo, HandshakeRequest, HandshakeResponse,
    PollInfo, PutResult, SchemaResult, Ticket,
};
use async_trait::async_trait;
use feature_defs::plan::{ModelPlan, ServicePlan};
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use tonic::codegen::{BoxFuture, Service, StdError, http};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::dataset::{DatasetError, Manifest};
use crate::engine::{Engine, EngineError};
use encode::{Body, Message};
use stored::Opened;

pub use tensor::REFUSED;

/// What the service needs of the process around it.
#[async_trait]
pub trait Surroundings: Send + Sync + 'static {
    /// The compiled service of a project, or what to say when there is none.
    fn service(&self, project: &str, service: &str) -> Result<Arc<ServicePlan>, Status>;
    /// The compiled model of a project, for those who ask for its inputs.
    fn model(&self, _project: &str, model: &str) -> Result<Arc<ModelPlan>, Status> {
        Err(Status::unimplemented(format!("this server knows no models, so it cannot encode for `{model}`")))
    }
    /// Makes sure that histories hold everything applied so far.
    async fn before_read(&self) -> Result<(), Status>;
    /// Records a dataset in the control log. It may have been recorded before.
    async fn dataset_created(&self, manifest: &Manifest, path: &Path) -> Result<(), Status>;
    /// The manifest's place of a dataset by name, and by id where one is given.
    fn dataset(&self, project: &str, name: &str, id: &str) -> Result<Path, Status>;
    /// The root of the object store where it is a folder on this machine: what killed writers leave there of files cannot
    /// be seen through the store.
    fn store_folder(&self) -> Option<PathBuf> {
        None
    }
    /// Now, as RFC 3339: information for manifests.
    fn now(&self) -> String;
}

pub struct Flight {
    engine: Arc<Engine>,
    surroundings: Arc<dyn Surroundings>,
    /// Bytes a client may send as one spine.
    spine_bytes_max: usize,
    opened: Opened,
}

/// The action that tells a dataset's profile.
const DATASET_PROFILE: &str = "dataset-profile";
/// Messages of the Flight service may be as large as one batch of wide rows.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Tickets name columns, and there may be many.
const TICKET_BYTES_MAX: usize = 4 << 20;

/// The service, ready to be added to a server.
pub fn service(engine: Arc<Engine>, surroundings: Arc<dyn Surroundings>, memory_bytes: u64) -> FlightServer {
    // A spine larger than half the memory bound leaves no room for its answers.
    let spine_bytes_max = usize::try_from(memory_bytes / 2).unwrap_or(usize::MAX);
    let flight = Arc::new(Flight { engine, surroundings, spine_bytes_max, opened: Opened::default() });
    let rest = FlightServiceServer::from_arc(flight.clone())
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    FlightServer { flight, rest }
}

/// The Flight service on the wire. The two calls that answer with data are answered here, because the generated server
/// would copy each batch twice on its way out; everything else is the generated server's.
#[derive(Clone)]
pub struct FlightServer {
    flight: Arc<Flight>,
    rest: FlightServiceServer<Flight>,
}

impl tonic::server::NamedService for FlightServer {
    const NAME: &'static str = <FlightServiceServer<Flight> as tonic::server::NamedService>::NAME;
}

type MessageStream = BoxStream<'static, Result<Message, Status>>;

impl<B> Service<http::Request<B>> for FlightServer
where
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<StdError> + Send + 'static,
    FlightServiceServer<Flight>: Service<
            http::Request<B>,
            Response = http::Response<tonic::body::Body>,
            Error = Infallible,
            Future = BoxFuture<http::Response<tonic::body::Body>, Infallible>,
        >,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let flight = self.flight.clone();
        match request.uri().path() {
            "/arrow.flight.protocol.FlightService/DoGet" => Box::pin(async move {
                let mut tickets = incoming::<Ticket, B>(request, TICKET_BYTES_MAX);
                let messages = match tickets.message().await {
                    Ok(Some(ticket)) => flight.get(&ticket.ticket).await,
                    Ok(None) => Err(Status::invalid_argument("the call carries no ticket")),
                    Err(status) => Err(status),
                };
                Ok(outgoing(messages))
            }),
            "/arrow.flight.protocol.FlightService/DoExchange" => Box::pin(async move {
                let spine = incoming::<FlightData, B>(request, MESSAGE_BYTES_MAX);
                Ok(outgoing(flight.exchange(spine).await))
            }),
            _ => self.rest.call(request),
        }
    }
}

fn incoming<T, B>(request: http::Request<B>, bytes_max: usize) -> Streaming<T>
where
    T: prost::Message + Default + Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Error: Into<StdError>,
{
    // The encoder of a codec has a type too; it is not used.
    let mut codec = ProstCodec::<T, T>::default();
    let decoder = tonic::codec::Codec::decoder(&mut codec);
    Streaming::new_request(decoder, request.into_body(), None, Some(bytes_max))
}

fn outgoing(messages: Result<MessageStream, Status>) -> http::Response<tonic::body::Body> {
    match messages {
        Ok(messages) => {
            let mut response = http::Response::new(tonic::body::Body::new(Body::new(messages)));
            let content = http::HeaderValue::from_static("application/grpc");
            response.headers_mut().insert(http::header::CONTENT_TYPE, content);
            response
        }
        Err(status) => status.into_http(),
    }
}

fn is_name(name: &str) -> bool {
    name.len() <= 64 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

fn stream_error(error: &datafusion::error::DataFusionError) -> Status {
    match error {
        datafusion::error::DataFusionError::External(source) => match source.downcast_ref::<EngineError>() {
            Some(engine) => engine_status(engine),
            None => Status::internal(error.strip_backtrace()),
        },
        _ => Status::internal(error.strip_backtrace()),
    }
}

fn engine_status(error: &EngineError) -> Status {
    let text = chain(error);
    match error {
        EngineError::MissingColumn { .. }
        | EngineError::WrongType { .. }
        | EngineError::Null { .. }
        | EngineError::Nanoseconds { .. }
        | EngineError::NameTaken { .. } => Status::invalid_argument(text),
        EngineError::Memory { .. } => Status::resource_exhausted(text),
        EngineError::Source(_) => Status::failed_precondition(text),
        EngineError::History { .. } => Status::data_loss(text),
        EngineError::Setup(_) | EngineError::Run(_) => Status::internal(text),
    }
}

fn dataset_status(error: &DatasetError) -> Status {
    let text = chain(error);
    match error {
        DatasetError::UnknownColumn { .. } | DatasetError::Selection(_) => Status::invalid_argument(text),
        DatasetError::Memory { .. } => Status::resource_exhausted(text),
        DatasetError::Damaged { .. } | DatasetError::Part(_) => Status::data_loss(text),
        DatasetError::Newer { .. } => Status::failed_precondition(text),
        DatasetError::Store { source: object_store::Error::NotFound { .. }, verb: "read", .. } => {
            Status::data_loss(text)
        }
        DatasetError::Store { .. } => Status::unavailable(text),
        DatasetError::Write(_) => Status::internal(text),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

#[async_trait]
impl FlightService for Flight {
    type HandshakeStream = BoxStream<'static, Result<HandshakeResponse, Status>>;
    type ListFlightsStream = BoxStream<'static, Result<FlightInfo, Status>>;
    type DoGetStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoPutStream = BoxStream<'static, Result<PutResult, Status>>;
    type DoExchangeStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoActionStream = BoxStream<'static, Result<arrow_flight::Result, Status>>;
    type ListActionsStream = BoxStream<'static, Result<ActionType, Status>>;

    async fn do_exchange(
        &self,
        request: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoExchangeStream>, Status> {
        let messages = self.exchange(request.into_inner()).await?;
        Ok(Response::new(messages.map_ok(Message::into_flight_data).boxed()))
    }

    async fn do_get(&self, request: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        let messages = self.get(&request.into_inner().ticket).await?;
        Ok(Response::new(messages.map_ok(Message::into_flight_data).boxed()))
    }

    async fn get_flight_info(&self, request: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        Ok(Response::new(self.info(request.into_inner()).await?))
    }

    async fn get_schema(&self, request: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        let info = self.get_flight_info(request).await?.into_inner();
        Ok(Response::new(SchemaResult { schema: info.schema }))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        Err(Status::unimplemented("no handshake is needed"))
    }

    async fn list_flights(&self, _: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        Err(Status::unimplemented("datasets are listed by coeval.v1.Control/ListDatasets"))
    }

    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        Err(Status::unimplemented("training sets are computed by DoExchange"))
    }

    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        Err(Status::unimplemented("events are pushed by coeval.v1.Ingest/Push"))
    }

    async fn do_action(&self, request: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        let action = request.into_inner();
        if action.r#type != DATASET_PROFILE {
            let text = format!("there is no action `{}`; there is `{DATASET_PROFILE}`", action.r#type);
            return Err(Status::unimplemented(text));
        }
        let body = self.profile(&action.body).await?;
        Ok(Response::new(stream::iter([Ok(arrow_flight::Result { body })]).boxed()))
    }

    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        let action = ActionType {
            r#type: DATASET_PROFILE.to_owned(),
            description: "the profile of a kept dataset as JSON; the body is a DatasetTicket".to_owned(),
        };
        Ok(Response::new(stream::iter([Ok(action)]).boxed()))
    }
}

#[cfg(test)]
mod tests;
