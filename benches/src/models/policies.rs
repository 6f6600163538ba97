//! Policies in turn on the same arrivals: once in virtual time, once on a real model.

use std::time::Duration;

use inference::batch::simulation::{Arrivals, Device, bursts_of_32, poisson, simulate};
use inference::batch::{BatchLimits, Policy};
use serde::Serialize;

use super::open::{self, End};
use super::{PATIENCE, ROWS_MAX, Spread, Subject};

/// Rows that wait at most. A policy that cannot keep up is to be seen, not to be run into the ground.
const QUEUE_ROWS_MAX: usize = 4_096;

/// Ours, and what users would configure instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    Ours,
    Window(u64),
    /// Runs what is there as soon as an executor is idle.
    ZeroDelay,
    NoBatching,
}

pub const CONTENDERS: [Contender; 6] = [
    Contender::Ours,
    Contender::ZeroDelay,
    Contender::NoBatching,
    Contender::Window(5),
    Contender::Window(10),
    Contender::Window(200),
];

impl Contender {
    pub fn name(self) -> String {
        match self {
            Contender::Ours => "ours".to_owned(),
            Contender::Window(millis) => format!("window {millis} ms"),
            Contender::ZeroDelay => "zero delay".to_owned(),
            Contender::NoBatching => "no batching".to_owned(),
        }
    }

    fn limits(self) -> BatchLimits {
        let of = |rows_max, policy| BatchLimits::new(rows_max, QUEUE_ROWS_MAX).with_policy(policy);
        match self {
            Contender::Ours => of(ROWS_MAX, Policy::Adaptive),
            Contender::Window(millis) => of(ROWS_MAX, Policy::Window(Duration::from_millis(millis))),
            Contender::ZeroDelay => of(ROWS_MAX, Policy::Window(Duration::ZERO)),
            Contender::NoBatching => of(1, Policy::Window(Duration::ZERO)),
        }
    }
}

/// What requests come like. Rates are in rows a second of the simulated executor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Workload {
    Poisson(f64),
    /// Of 32 in 2 ms, with stragglers.
    Bursts(f64),
    /// Poisson at this share of what full batches could answer.
    NearSaturation(f64),
}

pub const WORKLOADS: [(&str, Workload); 5] = [
    ("poisson-10", Workload::Poisson(10.0)),
    ("poisson-80", Workload::Poisson(80.0)),
    ("saturation-90", Workload::NearSaturation(0.9)),
    ("bursts-40", Workload::Bursts(40.0)),
    ("bursts-300", Workload::Bursts(300.0)),
];

/// Requests of a run at least: p99 of fewer is their maximum.
const REQUESTS_MIN: f64 = 400.0;

impl Workload {
    fn arrivals(self, seed: u64, rates: Rates, lasts: Duration) -> Arrivals {
        match self {
            Workload::Poisson(_) | Workload::NearSaturation(_) => poisson(seed, self.rate(rates), lasts),
            Workload::Bursts(_) => bursts_of_32(seed, self.rate(rates), lasts),
        }
    }

    fn rate(self, rates: Rates) -> f64 {
        match self {
            Workload::Poisson(rate) | Workload::Bursts(rate) => rate * rates.scale,
            Workload::NearSaturation(share) => share * rates.capacity,
        }
    }

    /// Slow arrivals need longer for the same number of requests.
    fn lasts(self, rates: Rates, at_least: Duration) -> Duration {
        let share = (at_least.as_secs_f64() / LASTS_USUAL).min(1.0);
        at_least.max(Duration::from_secs_f64(share * REQUESTS_MIN / self.rate(rates)))
    }
}

/// Shorter runs than that many seconds are for trying out, and get no more time for slow arrivals either.
const LASTS_USUAL: f64 = 8.0;

/// How the rates of the simulated executor are carried over to another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// By how much lone requests are faster there.
    pub scale: f64,
    /// Rows a second in full batches.
    pub capacity: f64,
}

/// Of one policy under one workload with one seed.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    pub workload: String,
    pub contender: String,
    pub block: u64,
    pub rate: f64,
    pub sent: usize,
    pub answered: usize,
    pub per_second: f64,
    pub millis: Spread,
    /// Of the generator.
    pub behind: Option<Spread>,
}

/// All policies over so many seeds, in virtual time.
pub fn simulated(seeds: u64, lasts: Duration) -> Vec<Found> {
    let capacity = ROWS_MAX as f64 / Device::USUAL.forward(ROWS_MAX).as_secs_f64();
    let rates = Rates { scale: 1.0, capacity };
    let mut all = Vec::new();
    for (name, workload) in WORKLOADS {
        for seed in 1..=seeds {
            let arrivals = workload.arrivals(seed, rates, lasts);
            for contender in CONTENDERS {
                let seen = simulate(Device::USUAL, contender.limits(), &arrivals, PATIENCE, None);
                let answered = seen.answered();
                let millis = seen.latencies.concat().into_iter().map(|micros| micros as f64 / 1e3).collect();
                all.push(Found {
                    workload: name.to_owned(),
                    contender: contender.name(),
                    block: seed,
                    rate: workload.rate(rates),
                    sent: arrivals.len(),
                    answered,
                    per_second: answered as f64 / seen.seconds.max(lasts.as_secs_f64()),
                    millis: Spread::of(millis),
                    behind: None,
                });
            }
        }
    }
    all
}

#[derive(Debug, Serialize)]
pub struct Real {
    pub rates: Rates,
    /// Raw forwards, in milliseconds, before and after everything.
    pub one_row_ms: [f64; 2],
    pub full_batch_ms: [f64; 2],
    pub found: Vec<Found>,
}

/// All policies in turn on a real model, over so many blocks of so long each. Rates are those of the simulated executor,
/// times how much faster the model answers one row than that one; near saturation, shares of what raw full batches answer.
pub async fn real(subject: &Subject, blocks: u64, lasts: Duration, only: &[String]) -> anyhow::Result<Real> {
    let raw = |rows| subject.raw_forward(rows, 100);
    let (one, full) = (raw(1)?, raw(ROWS_MAX)?);
    let scale = Device::USUAL.forward(1).as_secs_f64() / one.as_secs_f64();
    let rates = Rates { scale, capacity: ROWS_MAX as f64 / full.as_secs_f64() };
    let mut found = Vec::new();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|only| only == name);
    for block in 1..=blocks {
        for (name, workload) in WORKLOADS.into_iter().filter(|(name, _)| wanted(name)) {
            let lasts = workload.lasts(rates, lasts);
            let arrivals = workload.arrivals(block, rates, lasts);
            // Who goes first differs, so that a slow minute hits everybody in turn.
            let mut order = CONTENDERS;
            order.rotate_left((block as usize + 1) * 4 % CONTENDERS.len());
            for contender in order {
                // A server of its own, so that nothing learned from another workload is left. What there is to learn from
                // this one is learned after some requests; they are not counted.
                let server = subject.serve(contender.limits()).await?;
                let lead = workload.arrivals(1_000 + block, rates, lasts / 5);
                open::run(&server, subject, &lead, PATIENCE).await?;
                let seen = open::run(&server, subject, &arrivals, PATIENCE).await?;
                server.shutdown().await;
                let millis = seen.millis(End::Answered);
                found.push(Found {
                    workload: name.to_owned(),
                    contender: contender.name(),
                    block,
                    rate: workload.rate(rates),
                    sent: arrivals.len(),
                    answered: millis.len(),
                    per_second: millis.len() as f64 / seen.seconds.max(lasts.as_secs_f64()),
                    millis: Spread::of(millis),
                    behind: Some(Spread::of(seen.behind)),
                });
            }
        }
    }
    let again = (raw(1)?, raw(ROWS_MAX)?);
    let millis = |first: Duration, second: Duration| [first, second].map(|time| time.as_secs_f64() * 1e3);
    Ok(Real { rates, one_row_ms: millis(one, again.0), full_batch_ms: millis(full, again.1), found })
}

/// Latencies of ours alone, at shares of what it could answer.
#[derive(Debug, Serialize)]
pub struct Steady {
    /// Of lone requests one after the other, in milliseconds.
    pub one_row_ms: f64,
    pub full_batch_ms: f64,
    pub found: Vec<SteadyBlock>,
}

#[derive(Debug, Serialize)]
pub struct SteadyBlock {
    /// Of what: `one row` at a time, or `full batches`.
    pub of: &'static str,
    pub share: f64,
    pub rate: f64,
    pub block: u64,
    pub answered: usize,
    pub millis: Spread,
    /// Forwards that nobody stood before, one after the other, just after.
    pub raw: Spread,
}

pub async fn steady(subject: &Subject, blocks: u64, lasts: Duration) -> anyhow::Result<Steady> {
    let (one, full) = (subject.raw_forward(1, 100)?, subject.raw_forward(ROWS_MAX, 100)?);
    let server = subject.serve(Contender::Ours.limits()).await?;
    let (one_per_second, full_per_second) = (1.0 / one.as_secs_f64(), ROWS_MAX as f64 / full.as_secs_f64());
    let mut found = Vec::new();
    for block in 1..=blocks {
        for (of, capacity) in [("one row", one_per_second), ("full batches", full_per_second)] {
            for share in [0.1, 0.25, 0.5] {
                let rate = share * capacity;
                let lasts = Workload::Poisson(rate).lasts(Rates { scale: 1.0, capacity }, lasts);
                open::run(&server, subject, &poisson(1_000 + block, rate, lasts / 5), PATIENCE).await?;
                let seen = open::run(&server, subject, &poisson(block, rate, lasts), PATIENCE).await?;
                let millis = seen.millis(End::Answered);
                let answered = millis.len();
                let raw = Spread::of(subject.raw_forwards(1, 100)?);
                found.push(SteadyBlock { of, share, rate, block, answered, millis: Spread::of(millis), raw });
            }
        }
    }
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    Ok(Steady { one_row_ms: millis(one), full_batch_ms: millis(full), found })
}
