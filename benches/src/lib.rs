//! The workloads that the speed of both sides is judged by, at any size. Sizes, peers and targets are chosen by
//! `run.py`; here a workload is one call on a folder of files, and what it answered.
//!
//! The files are those of `peers/generate.py`: `spine.parquet` and `view<n>.parquet`.

pub mod definitions;

pub mod training_set;

pub mod managed;

pub mod floor;

pub mod serve;

pub mod online;

pub mod models;

pub mod audit;

pub mod process;

#[cfg(test)]
mod tests;
