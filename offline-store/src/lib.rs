//! The offline store: history, the point-in-time engine, datasets and the Flight service that streams them.
//!
//! This is the only crate that plans DataFusion queries. What a row or a feature *means* is `feature-defs`' business: the
//! engine finds which rows answer, and hands them to the same code that serves online.

pub mod source;

pub mod table;

pub mod history;

pub mod point_in_time;

pub mod dataset;

pub mod labels;
pub mod profile;
pub mod serving_log;

pub mod flight;

mod engine;

pub mod explain;

pub mod audit;

pub mod rollout;

pub use engine::{Engine, EngineError, EngineOptions, ProfiledSet, TrainingSet, TrainingSetRequest};
