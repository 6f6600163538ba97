//! Decisions about a challenger while its evidence comes in: a look at every flush, and still a declared chance of a false
//! stop over the whole rollout, however long it runs.
//!
//! Everything here is a function of sums that add up: units counted, the sum of their outcomes and of the squares. So
//! gateways keep their own, any of them may merge all and judge, and the order in which they were flushed cannot matter. No
//! clock, no files, no threads.
//!
//! # What is observed
//!
//! One number in [0, 1] per *randomisation unit* (an aircraft, a user) and metric: the mean over the unit's rows from its
//! first exposure until its window closes (`exposure`). A unit counts once in an arm. Rows of one unit may depend on each
//! other as they like: they are one observation. `p99 < 60ms` is the same thing, the share of a unit's rows that took longer,
//! and its mean held to one percent.
//!
//! # What the guarantees are
//!
//! | what | how | guarantee |
//! |---|---|---|
//! | a mean against a bound (`mean`) | a mixture of bets, wealth bounded from below by a function of sums | exact at any number of units, for any outcomes in [0, 1], whatever their variance, at every look |
//! | two arms (`difference`) | the same bets on outcomes weighted by the known shares of the arms | exact too, given that an arm is drawn with its share; the level of both arms may change with the time of day |
//! | two versions on the same rows (shadow) | `mean` of the paired difference, per unit | exact |
//! | the split itself (`sample_ratio`) | a mixture of Dirichlet-multinomial likelihood ratios | exact |
//! | several metrics (`correction`) | Holm's correction, or Benjamini and Hochberg's, on e-values | family-wise; share of false discoveries, under any dependence |
//!
//! Exact means: with chance at least 1 − alpha *no* look ever shows evidence of 1/alpha against what is true (Ville 1939).
//! What it costs is told by `plan` before anything starts.
//!
//! # From rows to a decision
//!
//! ```
//! use drift::sequential::evidence::{CanaryEvidence, StepEvidence};
//! use drift::sequential::exposure::{Arm, Exposure, Exposures, Options};
//! use drift::sequential::judge::{self, Decision};
//! use drift::sequential::policy::{CanaryPolicy, Guardrail, Policy, Side};
//! use drift::sequential::snapshot::Snapshot;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let policy: Policy = serde_json::from_str(
//!     r#"{"canary": {"unit": "aircraft", "steps": [5000, 10000], "bake_us": 60000000, "min_units": 50, "ends_after_us": 86400000000},
//!         "guardrails": [{"text": "error_rate < 1%", "measure": {"share": "error_rate"}, "side": "below", "bound": 0.01}]}"#,
//! )?;
//! policy.check()?;
//!
//! // A gateway: step 17 is the entry of the control log that began it.
//! let arm = |bucket: u16| if bucket % 2 == 0 { Arm::Challenger } else { Arm::Champion };
//! let mut exposures = Exposures::new(Options { window_us: 10_000_000, ..Options::default() });
//! for unit in 0..400_u64 {
//!     let bucket = (unit % 10_000) as u16;
//!     let failed = arm(bucket) == Arm::Challenger && unit % 8 == 0;
//!     let exposure = Exposure { unit, bucket, arm: arm(bucket), step: 17, now_us: 0 };
//!     exposures.record(exposure, &[(0, f64::from(u8::from(failed)))]);
//! }
//! exposures.close(10_000_000);
//! let bytes = Snapshot::of(&exposures).encode();
//!
//! // Whoever judges merges what all gateways have written.
//! let mut merged = Snapshot::default();
//! merged.merge(&Snapshot::decode(&bytes)?);
//! let step = StepEvidence::counted(&merged.counts, 17, policy.metrics(), |bucket| Some(arm(bucket)));
//! let evidence = CanaryEvidence { steps: vec![step], ..CanaryEvidence::default() };
//! let judgement = judge::canary(&policy, &evidence, 10_000_000);
//! assert_eq!(judgement.decision, Decision::RollBack);
//! assert!(judgement.reasons[0].starts_with("`error_rate < 1%` is breached: 25.00 % of 200 units"));
//! # Ok(())
//! # }
//! ```
//!
//! # Sources
//!
//! Bets on bounded means: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 2024).
//! The bound that makes the wealth a function of Σx and Σx²: Fan, Grama and Liu 2015, as used by Howard, Ramdas, McAuliffe
//! and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences" (Annals of Statistics 2021). That a
//! bounded outcome is never worse than a Bernoulli one: Hoeffding 1963. Splits and counts: Lindon and Malek,
//! "Anytime-valid inference for multinomial count data" (NeurIPS 2022). E-values corrected for many: Vovk and Wang,
//! "E-values: calibration, combination and applications" (2021); Wang and Ramdas, "False discovery rate control with
//! e-values" (JRSS B 2022).

pub mod judge;

pub mod evidence;
pub mod policy;

pub mod hard;
pub mod plan;

pub mod exposure;
pub mod seen;
pub mod snapshot;
pub mod tally;

pub mod correction;
pub mod difference;
pub mod mean;
pub mod sample_ratio;

pub mod bets;
