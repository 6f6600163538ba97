//! The gRPC port: messages in, calls of the core, statuses out.

mod control;
mod ingest;

use std::sync::Arc;

use proto::v1;
use proto::v1::control_server::ControlServer;
use proto::v1::gateway_server::{Gateway as GatewayService, GatewayServer};
use proto::v1::ingest_server::IngestServer;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::answer::Gateway;

pub use control::Control;
pub use ingest::Ingest;

/// The largest message either way: 10,000 rows of a few hundred features with room to spare, and what clients allow.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

struct Features {
    gateway: Arc<Gateway>,
}

#[tonic::async_trait]
impl GatewayService for Features {
    async fn get_features(
        &self,
        request: Request<v1::GetFeaturesRequest>,
    ) -> Result<Response<v1::GetFeaturesResponse>, Status> {
        Ok(Response::new(self.gateway.get_features(request.into_inner()).await?))
    }

    async fn predict(&self, request: Request<v1::PredictRequest>) -> Result<Response<v1::PredictResponse>, Status> {
        Ok(Response::new(self.gateway.predict(request.into_inner()).await?))
    }
}

/// Every service of ours on one port, with reflection.
pub fn routes(gateway: Arc<Gateway>) -> Routes {
    let bound = MESSAGE_BYTES_MAX;
    let features = GatewayServer::new(Features { gateway: gateway.clone() });
    let ingest = IngestServer::new(Ingest::new(gateway.clone()));
    let control = ControlServer::new(Control::new(gateway));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors are generated with the code and committed beside it");
    Routes::new(features.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(ingest.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(control.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(reflection)
}
