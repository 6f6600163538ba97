//! Rollouts, as this gateway knows them.

pub mod drifted;
pub mod holdout;
pub mod losses;
pub mod quiet;
pub mod skew;
pub mod traffic;
