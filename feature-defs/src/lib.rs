//! The domain of Coeval, pure: YAML becomes a checked catalog, the catalog becomes a compiled plan, and the plan's
//! expressions, aggregators and encodings are the ones that both the offline engine and the online path run.
//!
//! This crate never awaits, reads no file and has no clock: time is always an argument.

pub mod columns;
pub mod time;
pub mod value;

pub mod catalog;
pub mod check;
pub mod diagnose;
pub mod expression;
pub mod parse;
pub mod yaml;

pub mod aggregate;
pub mod as_of;
pub mod window;

pub mod digest;
pub mod forgotten;
pub mod plan;
