//! Whole days of traffic in virtual time: the policy beside fixed windows, zero-delay batching and no batching, on one
//! executor whose forwards take 12 ms and a tenth more for every row, padded.

use super::*;

/// SplitMix64: a few lines, and the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn exponential(&mut self, per_second: f64) -> f64 {
        -(1.0 - self.unit()).ln() / per_second * 1e6
    }
}

/// When requests come, in microseconds, and in which tier.
type Arrivals = Vec<(u64, usize)>;

fn poisson(seed: u64, per_second: f64, seconds: u64) -> Arrivals {
    let mut random = Random(seed);
    let (mut now, mut arrivals) = (0.0, Vec::new());
    loop {
        now += random.exponential(per_second);
        if now >= seconds as f64 * 1e6 {
            return arrivals;
        }
        arrivals.push((now as u64, 0));
    }
}

/// Bursts of 32 requests in 2 ms, of which a quarter straggle until 2 to 30 ms later, at so many requests a second.
fn bursts_of_32(seed: u64, per_second: f64, seconds: u64) -> Arrivals {
    let mut random = Random(seed);
    let (mut start, mut arrivals) = (0.0, Vec::new());
    loop {
        start += random.exponential(per_second / 32.0);
        if start >= seconds as f64 * 1e6 {
            arrivals.sort();
            return arrivals;
        }
        for _ in 0..32 {
            let straggles = random.unit() < 0.25;
            let after = if straggles { 2_000.0 + random.unit() * 28_000.0 } else { random.unit() * 2_000.0 };
            arrivals.push(((start + after) as u64, 0));
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// Of what was answered, by tier, in microseconds from arrival to the end of the forward.
    latencies: Vec<Vec<u64>>,
    late: usize,
    /// From arrival to being dropped.
    dropped: Vec<u64>,
    rejected: usize,
    seconds: f64,
    batches: usize,
}

impl Seen {
    fn percentile(&self, percent: f64) -> f64 {
        let mut all: Vec<u64> = self.latencies.concat();
        all.sort_unstable();
        let rank = (all.len() as f64 * percent / 100.0).ceil() as usize;
        all[rank.clamp(1, all.len()) - 1] as f64
    }

    fn answered(&self) -> usize {
        self.latencies.iter().map(Vec::len).sum()
    }
}

/// Runs arrivals through a batcher on one executor. Threads wake up at once, and answer when the forward ends.
fn simulate(limits: BatchLimits, arrivals: &Arrivals, patience: Duration, noise: u64) -> Seen {
    let mut batcher: Batcher<u64> = Batcher::new(limits, 1);
    batcher.executor_idle();
    warm_up(&mut batcher);
    let mut random = Random(noise);
    let mut seen = Seen { latencies: vec![Vec::new(); limits.tiers()], ..Seen::default() };
    let mut arrivals = arrivals.iter().copied().peekable();
    // The batch under way: when it ends, its padded size, its time, and its members' arrivals, tiers and deadlines.
    let mut running: Option<(u64, usize, Duration, Vec<Member<u64>>)> = None;
    let mut timer: Option<u64> = None;
    let mut now;
    loop {
        let next_arrival = arrivals.peek().map(|(at, _)| *at);
        let ends = running.as_ref().map(|(ends, ..)| *ends);
        let Some(next) = [next_arrival, ends, timer].into_iter().flatten().min() else { break };
        now = next;
        if ends == Some(now) {
            let (_, padded_rows, took, members) = running.take().expect("it runs");
            for member in members {
                seen.latencies[member.tier].push(now - member.payload);
                seen.late += usize::from(us(now) > member.deadline);
            }
            batcher.ran(padded_rows, took);
            batcher.executor_idle();
        } else if next_arrival == Some(now) {
            let (at, tier) = arrivals.next().expect("peeked");
            let deadline = us(at) + patience;
            let request = Request { rows: 1, bytes: 256, deadline, tier };
            match batcher.push(us(at), request, at) {
                Ok(pushed) if running.is_none() && pushed.wake => {}
                Ok(_) => continue,
                Err(_) => {
                    seen.rejected += 1;
                    continue;
                }
            }
        }
        timer = None;
        if running.is_some() {
            continue;
        }
        let poll = batcher.poll(us(now), Permit::All);
        seen.dropped.extend(poll.dropped.iter().map(|member| now - member.payload));
        match poll.decision {
            Decision::Run { members, padded_rows, .. } => {
                seen.batches += 1;
                // Now and then something disturbs a forward.
                let disturbed = if noise > 0 && random.unit() < 0.02 { us(5_000) } else { Duration::ZERO };
                let jitter = if noise > 0 { us(random.next() % 300) } else { Duration::ZERO };
                let took = forward(padded_rows) + jitter + disturbed;
                running = Some((now + took.as_micros() as u64, padded_rows, took, members));
            }
            Decision::Wait { until } => timer = until.map(|until| until.as_micros() as u64),
        }
        seen.seconds = now as f64 / 1e6;
    }
    assert_eq!(batcher.queue_rows(), 0, "somebody was left waiting");
    seen
}

const PATIENCE: Duration = Duration::from_secs(10);

fn limits(policy: Policy) -> BatchLimits {
    BatchLimits::new(32, 100_000).with_policy(policy)
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// p50, p95 and p99 under a workload of ten seeds, each in the median.
fn over_seeds(limits: BatchLimits, workload: impl Fn(u64) -> Arrivals) -> [f64; 3] {
    let seen: Vec<Seen> = (1..=10).map(|seed| simulate(limits, &workload(seed), PATIENCE, 0)).collect();
    [50.0, 95.0, 99.0].map(|percent| median(seen.iter().map(|seen| seen.percentile(percent)).collect()))
}

#[test]
fn at_low_load_nothing_is_lost_to_batching() {
    for per_second in [10.0, 80.0] {
        let of = |limits| over_seeds(limits, |seed| poisson(seed, per_second, 100));
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
    let of = |policy| over_seeds(limits(policy), |seed| poisson(seed, 1_900.0, 20))[2];
    let best = [ms(0), ms(5), ms(10), ms(200)].map(|window| of(Policy::Window(window)));
    let best = best.into_iter().fold(f64::INFINITY, f64::min);
    let ours = of(Policy::Adaptive);
    assert!(ours <= best * 1.05, "p99 {ours}, of the best window {best}");
}

#[test]
fn bursts_wait_for_themselves_and_not_for_a_window() {
    for (per_second, seconds) in [(40.0, 80), (300.0, 15)] {
        let of = |limits| over_seeds(limits, |seed| bursts_of_32(seed, per_second, seconds));
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
    let capacity = 32.0 / forward(32).as_secs_f64();
    let mut random = Random(7);
    let arrivals: Arrivals =
        poisson(3, capacity * 2.0, 60).into_iter().map(|(at, _)| (at, (random.next() % 2) as usize)).collect();
    let limits = BatchLimits::new(32, 4_096).with_tiers(2).with_deadline(Some(ms(100)));
    let seen = simulate(limits, &arrivals, ms(100), 9);
    let goodput = (seen.answered() - seen.late) as f64 / seen.seconds;
    assert!(goodput >= 0.9 * capacity, "{goodput} of {capacity} rows a second");
    let admitted = seen.answered() + seen.dropped.len();
    let in_time = (seen.answered() - seen.late) as f64 / admitted as f64;
    assert!(in_time >= 0.99, "{in_time} of the admitted; {} dropped, {} late", seen.dropped.len(), seen.late);
    assert!(seen.rejected > arrivals.len() / 3, "the rest is refused on arrival: {}", seen.rejected);
    let [important, rest] = [0, 1].map(|tier| seen.latencies[tier].len() as f64);
    assert!(important > rest * 1.5 && rest > 0.05 * important, "{important} and {rest} of the tiers");
}
