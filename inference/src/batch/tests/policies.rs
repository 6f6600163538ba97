//! The policy beside fixed windows, zero-delay batching and no batching, in virtual time.

use super::*;
use crate::batch::simulation::{Arrivals, Device, Random, Seen, bursts_of_32, poisson};

fn simulate(limits: BatchLimits, arrivals: &Arrivals, patience: Duration, noise: Option<u64>) -> Seen {
    simulate_on(Device::USUAL, limits, arrivals, patience, noise)
}

fn simulate_on(
    device: Device,
    limits: BatchLimits,
    arrivals: &Arrivals,
    patience: Duration,
    noise: Option<u64>,
) -> Seen {
    let seen = simulation::simulate(device, limits, arrivals, patience, noise);
    assert_eq!(seen.left, 0, "somebody was left waiting");
    seen
}

const PATIENCE: Duration = Duration::from_secs(10);

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn limits(policy: Policy) -> BatchLimits {
    BatchLimits::new(32, 100_000).with_policy(policy)
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// p50, p95 and p99 under a workload of ten seeds, each in the median.
fn over_seeds(limits: BatchLimits, workload: impl Fn(u64) -> Arrivals) -> [f64; 3] {
    let seen: Vec<Seen> = (1..=10).map(|seed| simulate(limits, &workload(seed), PATIENCE, None)).collect();
    [50.0, 95.0, 99.0].map(|percent| median(seen.iter().map(|seen| seen.percentile(percent).unwrap()).collect()))
}

#[test]
fn at_low_load_nothing_is_lost_to_batching() {
    for per_second in [10.0, 80.0] {
        let of = |limits| over_seeds(limits, |seed| poisson(seed, per_second, secs(100)));
        let ours = of(limits(Policy::Adaptive));
        let zero = of(limits(Policy::Window(Duration::ZERO)));
        let none = of(BatchLimits::new(1, 100_000));
        for ((ours, zero), none) in ours.into_iter().zip(zero).zip(none) {
            assert!(ours <= zero.min(none) * 1.05, "at {per_second}/s: {ours}, {zero}, {none}");
        }
        // The failure that this policy is there for.
        let [windowed, ..] = of(limits(Policy::Window(ms(200))));
        assert!(windowed > 100_000.0, "{windowed}");
    }
}

#[test]
fn near_saturation_it_is_no_worse_than_the_best_window() {
    // 32 rows in 15.2 ms are 2,105 a second.
    let of = |policy| over_seeds(limits(policy), |seed| poisson(seed, 1_900.0, secs(20)))[2];
    let best = [ms(0), ms(5), ms(10), ms(200)].map(|window| of(Policy::Window(window)));
    let best = best.into_iter().fold(f64::INFINITY, f64::min);
    let ours = of(Policy::Adaptive);
    assert!(ours <= best * 1.05, "p99 {ours}, of the best window {best}");
}

#[test]
fn bursts_wait_for_themselves_and_not_for_a_window() {
    for (per_second, seconds) in [(40.0, 80), (300.0, 15)] {
        let of = |limits| over_seeds(limits, |seed| bursts_of_32(seed, per_second, secs(seconds)));
        // Without batches, one executor cannot even keep up.
        let others = [ms(0), ms(5), ms(10), ms(200)].map(|window| of(limits(Policy::Window(window))));
        let ours = of(limits(Policy::Adaptive));
        for (index, percent) in [(2, 99), (0, 50)] {
            let best = others.iter().map(|other| other[index]).fold(f64::INFINITY, f64::min);
            assert!(ours[index] <= best * 1.05, "p{percent} at {per_second}/s: {ours:?} beside {others:?}");
        }
    }
}

#[test]
fn at_twice_the_capacity_what_is_admitted_is_answered_in_time() {
    // Of the latter, hardly three batches fit into a deadline.
    let slow = Device { fixed: ms(15), per_row: us(600) };
    for device in [Device::USUAL, slow] {
        let capacity = 32.0 / device.forward(32).as_secs_f64();
        let mut random = Random::new(7);
        let arrivals: Arrivals = poisson(3, capacity * 2.0, secs(60))
            .into_iter()
            .map(|(at, _)| (at, (random.draw() % 2) as usize))
            .collect();
        let limits = BatchLimits::new(32, 4_096).with_tiers(2).with_deadline(Some(ms(100)));
        let seen = simulate_on(device, limits, &arrivals, ms(100), Some(9));
        let goodput = (seen.answered() - seen.late) as f64 / seen.seconds;
        assert!(goodput >= 0.9 * capacity, "{goodput} of {capacity} rows a second");
        let admitted = seen.answered() + seen.dropped.len();
        let in_time = (seen.answered() - seen.late) as f64 / admitted as f64;
        assert!(in_time >= 0.99, "{in_time} of the admitted; {} dropped, {} late", seen.dropped.len(), seen.late);
        assert!(seen.rejected > arrivals.len() / 3, "the rest is refused on arrival: {}", seen.rejected);
        let [important, rest] = [0, 1].map(|tier| seen.latencies[tier].len() as f64);
        assert!(important > rest * 1.5 && rest > 0.05 * important, "{important} and {rest} of the tiers");
    }
}
