//! Whole servers, as users meet them.

mod audit;
mod drift;
mod evidence;
mod faults;
mod flags;
mod fleet;
mod forget;
mod model_faults;
mod models;
mod object_stores;
mod process;
mod redis_store;
mod rollout;
mod serving_log;
