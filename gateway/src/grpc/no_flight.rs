//! What a process without the offline engine answers to Arrow Flight: where to go, rather than a bare "unimplemented".

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

use crate::roles::{Role, Roles};

#[derive(Debug, Clone)]
pub struct NoFlight {
    roles: Roles,
}

impl NoFlight {
    pub fn new(roles: Roles) -> NoFlight {
        NoFlight { roles }
    }
}

impl NamedService for NoFlight {
    const NAME: &'static str = "arrow.flight.protocol.FlightService";
}

impl Service<http::Request<Body>> for NoFlight {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        let text = self.roles.elsewhere(Role::Offline, "training sets are not made, and datasets not read, here");
        ready(Ok(Status::unimplemented(text).into_http()))
    }
}
