//! One file per command.

pub mod init;
pub mod validate;

pub mod apply;
pub mod plan;

pub mod serve;

pub mod compact;
pub mod forget;
pub mod ingest;
pub mod materialize;

pub mod features;
pub mod predict;

pub mod audit;
pub mod certify;
pub mod dataset;
pub mod explain;
pub mod flag;
pub mod labels;
pub mod model;
pub mod rollout;

pub mod drift;

pub mod doctor;
