//! The gateway: one process that answers `GetFeatures` and `Predict`, takes events, and follows the control log.
//!
//! The edge (`grpc`, `http`) translates; the core (`request`, `fetch`, `features`, `predict`) computes on plans and Arrow
//! arrays and knows no protocol; `follow` decides what is served; `data` is where events and training sets are somebody
//! else's work; `run` opens everything and listens, `shutdown` drains. Nothing but this crate knows a status code.

pub mod config;
pub mod roles;
pub mod run;
pub mod shutdown;

pub mod grpc;
pub mod http;

mod edge;

pub mod convert;
pub mod status;

pub mod answer;
pub mod arms;
pub mod audit;
pub mod cache;
pub mod certify;
pub mod data;
pub mod deploy;
pub mod drift;
pub mod events;
pub mod features;
pub mod fetch;
pub mod flags;
pub mod follow;
pub mod forget;
pub mod golden;
pub mod guard;
pub mod kept;
pub mod labels;
pub mod memory;
pub mod metrics;
pub mod model_files;
pub mod models;
pub mod observe;
pub mod predict;
pub mod presence;
pub mod request;
pub mod response_cache;
pub mod rollout;
pub mod serving_log;
pub mod versions;

mod nice;
