//! Drift: whether what a model is served still looks like what it was trained on.
//!
//! Every dataset carries a [`profile::Profile`] for each feature and model output: bins that are chosen once from training
//! data and frozen, and what training looked like in them. Serving counts the same bins ([`counts::Counter`]), replicas'
//! counts merge by addition, and [`verdict::judge`] compares one window of one service with its training set. All of it is
//! pure: no clock, no files, no threads, and the same counts give the same verdict on every machine.
//!
//! ```
//! use drift::builder::{Builder, Kind, Options};
//! use drift::counts::{Counter, Rows, Validity, bucket_of_row};
//! use drift::number::Scale;
//! use drift::verdict::{Feature, Policy, Verdict, judge};
//!
//! # fn main() -> Result<(), drift::DriftError> {
//! let buckets: Vec<u8> = (0..5_000).map(bucket_of_row).collect();
//! let rows = Rows { buckets: &buckets, validity: Validity::All, flags: None };
//!
//! let training: Vec<f64> = (0..5_000).map(|i| f64::from(i % 97)).collect();
//! let mut builder = Builder::new(Kind::Numbers(Scale::Float64), Options::default(), 0)?;
//! builder.add_numbers(&training, &rows)?;
//! let profile = builder.profile()?;
//!
//! let served: Vec<f64> = training.iter().map(|x| x + 30.0).collect();
//! let mut counter = Counter::new(profile.layout().clone());
//! counter.add_numbers(&served, &rows)?;
//! let counts = counter.take();
//!
//! let feature = Feature { name: "temp", importance: None, profile: &profile, serving: &counts };
//! let report = judge(&Policy::default(), &[feature])?;
//! assert_eq!(report.verdict, Verdict::Drift);
//! # Ok(())
//! # }
//! ```
//!
//! # What a verdict rests on
//!
//! | question | answer | source |
//! |---|---|---|
//! | which bins | equal depth, atoms for point masses, under and over; frozen (`histogram`, `categories`, `directions`) | Yurdakul 2018 on what moving bins do to PSI |
//! | how much is never seen, of a long tail | what one bucket of training would have found unseen in the others (`categories`) | Good 1953 |
//! | how far | PSI, Jensen-Shannon, KS, L-infinity, Wasserstein over ranks (`distance`) | Jeffreys 1946; Lin 1991; Endres and Schindelin 2003 |
//! | how far by chance | whole blocks resampled; rows at the effective sample size (`noise`) | Efron 1979; Field and Welsh 2007; Kish 1965; Rao and Scott 1981 |
//! | with how few blocks | Student's widening, and none below a dozen (`noise`) | Cameron, Gelbach and Miller 2008; Carter, Schnepel and Steigerwald 2017 |
//! | rates of a few events | exact test of two Poisson rates, and Welch's t (`rates`) | Przyborowski and Wilenski 1940; Welch 1947 |
//! | over many features | family-wise, because an alarm wakes somebody (`verdict`) | Holm 1979 |
//!
//! The rate of false alarms is that of windows which do not overlap: a window that slides by a minute is not judged afresh.
//! `examples/calibration.rs` measures it, with power, and `docs/design/2026-11-22-drift-blocks.md` says why counts are kept
//! as they are and what was measured. `examples/cost.rs` measures what counting costs.
//!
//! # What it is not
//!
//! It does not compare served rows with what training would have computed for them: that is the audit's, row by row and to
//! the bit. A drift is no bug; seasons drift. And it tells nothing of lists, maps and structs but whether they are there.

use thiserror::Error;

pub mod verdict;

pub mod sequential;

pub mod profile;

pub mod builder;
pub mod counts;
pub mod layout;

pub mod categories;
pub mod directions;
pub mod histogram;
pub mod number;

pub mod distinct;
pub mod moments;

pub mod distance;
pub mod noise;
pub mod rates;
mod report;

pub mod random;
pub mod special;
mod wide;

#[derive(Debug, Error, PartialEq)]
pub enum DriftError {
    #[error("{given} were given to a profile of {profiled}: use the method of its kind")]
    WrongKind { profiled: &'static str, given: &'static str },
    #[error(
        "{given} of something were given where {wanted} are wanted: values, buckets, flags and validity must be as long as each other"
    )]
    Length { given: usize, wanted: usize },
    #[error("what was counted over other bins cannot be added: both sides must come from the same profile")]
    OtherLayout,
    #[error(
        "the counts of feature {feature} are over other bins than its profile's: count with the profile of the model version that is judged"
    )]
    OtherProfile { feature: String },
    #[error("the importance of feature {feature} is negative or no number")]
    Importance { feature: String },
    #[error("the policy is not one: {what}")]
    Policy { what: &'static str },
    #[error("{given} {what} are not within what a profile can hold, which is at most {most}")]
    Option { what: &'static str, given: usize, most: usize },
    #[error("a profile cannot be made: {0}")]
    Stored(&'static str),
}
