//! Whole servers, as users meet them.

mod audit;
mod object_stores;
mod process;
