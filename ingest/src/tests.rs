//! The whole of ingestion against the reference semantics of `feature-defs`, over stores in memory and a clock that the
//! test sets.

mod files;
mod kill;
mod redis_log;
mod streams;
pub(crate) mod world;
