//! The Gateway service. GetFeatures answers with bytes made from columns, so it has a codec of its own; every other method
//! is left to the generated code.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::BufMut as _;
use proto::v1;
use proto::v1::gateway_server::{Gateway as Methods, GatewayServer};
use tonic::body::Body;
use tonic::codec::{Codec, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstDecoder;

use super::MESSAGE_BYTES_MAX;
use crate::answer::Gateway;
use crate::features::FeaturesAnswer;

const GET_FEATURES: &str = "/coeval.v1.Gateway/GetFeatures";

/// Serves the methods of Gateway.
#[derive(Clone)]
pub struct Features {
    gateway: Arc<Gateway>,
    generated: GatewayServer<Generated>,
}

impl Features {
    pub fn new(gateway: Arc<Gateway>) -> Features {
        let generated = GatewayServer::new(Generated { gateway: gateway.clone() });
        let generated =
            generated.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX);
        Features { gateway, generated }
    }
}

impl NamedService for Features {
    const NAME: &'static str = <GatewayServer<Generated> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for Features {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != GET_FEATURES {
            return self.generated.call(request);
        }
        let method = GetFeatures { gateway: self.gateway.clone() };
        Box::pin(async move {
            let bound = Some(MESSAGE_BYTES_MAX);
            let mut grpc = Grpc::new(FeaturesCodec).apply_max_message_size_config(bound, bound);
            Ok(grpc.unary(method, request).await)
        })
    }
}

struct GetFeatures {
    gateway: Arc<Gateway>,
}

impl UnaryService<v1::GetFeaturesRequest> for GetFeatures {
    type Response = FeaturesAnswer;
    type Future = BoxFuture<Response<FeaturesAnswer>, Status>;

    fn call(&mut self, request: Request<v1::GetFeaturesRequest>) -> Self::Future {
        let gateway = self.gateway.clone();
        Box::pin(async move { Ok(Response::new(gateway.get_features(request.into_inner()).await?)) })
    }
}

/// Requests as `prost` reads them, answers as [`FeaturesAnswer::to_bytes`] writes them.
struct FeaturesCodec;

impl Codec for FeaturesCodec {
    type Encode = FeaturesAnswer;
    type Decode = v1::GetFeaturesRequest;
    type Encoder = FeaturesEncoder;
    type Decoder = ProstDecoder<v1::GetFeaturesRequest>;

    fn encoder(&mut self) -> FeaturesEncoder {
        FeaturesEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::default()
    }
}

struct FeaturesEncoder;

impl Encoder for FeaturesEncoder {
    type Item = FeaturesAnswer;
    type Error = Status;

    fn encode(&mut self, answer: FeaturesAnswer, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&answer.to_bytes());
        Ok(())
    }
}

struct Generated {
    gateway: Arc<Gateway>,
}

#[tonic::async_trait]
impl Methods for Generated {
    /// For who calls the trait: on the wire [`Features`] answers it.
    async fn get_features(
        &self,
        request: Request<v1::GetFeaturesRequest>,
    ) -> Result<Response<v1::GetFeaturesResponse>, Status> {
        Ok(Response::new(self.gateway.get_features(request.into_inner()).await?.to_message()))
    }

    async fn predict(&self, request: Request<v1::PredictRequest>) -> Result<Response<v1::PredictResponse>, Status> {
        Ok(Response::new(self.gateway.predict(request.into_inner()).await?))
    }

    async fn evaluate_flags(
        &self,
        request: Request<v1::EvaluateFlagsRequest>,
    ) -> Result<Response<v1::EvaluateFlagsResponse>, Status> {
        Ok(Response::new(self.gateway.evaluate_flags(request.get_ref())?))
    }
}
