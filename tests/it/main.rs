//! Whole servers, as users meet them.

mod audit;
mod drift;
mod faults;
mod flags;
mod forget;
mod model_faults;
mod models;
mod object_stores;
mod process;
mod redis_store;
mod serving_log;
