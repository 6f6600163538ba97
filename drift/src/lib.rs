//! Drift: whether what a model is served still looks like what it was trained on.
//!
//! TODO
#![doc(test(no_crate_inject))]

use thiserror::Error;

pub mod verdict;

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
