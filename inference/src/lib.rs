//! Runs models. The problem: a model is a foreign library that is slow to start, fast when fed in batches, holds
//! large per-thread state and may fail or panic, while its callers are many small requests with deadlines.
//!
//! So a [`ModelServer`](executor::ModelServer) owns a few fixed threads, each with its own copy of the model, in
//! front of them one bounded queue, and a pure batching policy ([`batch::Batcher`]) that decides who runs next. An
//! idle executor never waits: it takes what is there. What arrives while all are busy becomes the next batch.
//!
//! This crate knows tensors and nothing of features; the gateway turns features into tensors. Nothing outside
//! [`torch`] knows libtorch, and that opens it with the first model: [`echo`] stands in for tests.

pub mod tensor;

pub mod model;

pub mod batch;

pub mod breaker;

pub mod placement;

pub mod memory;

pub mod ledger;

pub mod turns;

pub mod priority;

pub mod device;

pub mod growth;

pub mod executor;

pub mod check;

pub mod response_cache;

pub mod echo;
#[cfg(feature = "torch")]
pub mod torch;
