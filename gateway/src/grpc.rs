//! The gRPC port: messages in, calls of the core, statuses out.

mod control;
mod features;
mod ingest;
mod no_flight;

use std::sync::Arc;

use proto::v1::control_server::ControlServer;
use proto::v1::ingest_server::IngestServer;
use tonic::service::Routes;

use crate::answer::Gateway;

pub use control::Control;
use features::Features;
pub use ingest::Ingest;
pub use no_flight::NoFlight;

/// The largest message either way: 10,000 rows of a few hundred features with room to spare, and what clients allow.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Every service of ours on one port, with reflection.
pub fn routes(gateway: Arc<Gateway>) -> Routes {
    let bound = MESSAGE_BYTES_MAX;
    let features = Features::new(gateway.clone());
    let ingest = IngestServer::new(Ingest::new(gateway.clone()));
    let control = ControlServer::new(Control::new(gateway));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors are generated with the code and committed beside it");
    Routes::new(features)
        .add_service(ingest.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(control.max_decoding_message_size(bound).max_encoding_message_size(bound))
        .add_service(reflection)
}
