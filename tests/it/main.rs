//! Whole servers, as users meet them.

mod audit;
mod process;
