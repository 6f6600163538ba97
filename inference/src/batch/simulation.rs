//! Whole days of traffic in virtual time, for judging policies: arrivals, an executor whose forwards take as long as it is
//! told, and what callers would have seen. Everything follows from seeds, so that two policies meet the same traffic.

use std::time::Duration;

use super::{BatchLimits, Batcher, Decision, Member, Permit, Request};

/// SplitMix64: a few lines, and the same numbers everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Microseconds until the next of so many events a second that know nothing of each other.
    fn exponential(&mut self, per_second: f64) -> f64 {
        -(1.0 - self.unit()).ln() / per_second * 1e6
    }
}

/// When requests of one row come, in microseconds and in order, and in which tier.
pub type Arrivals = Vec<(u64, usize)>;

/// Requests that know nothing of each other.
pub fn poisson(seed: u64, per_second: f64, lasts: Duration) -> Arrivals {
    let mut random = Random::new(seed);
    let (mut now, mut arrivals) = (0.0, Vec::new());
    loop {
        now += random.exponential(per_second);
        if now >= lasts.as_secs_f64() * 1e6 {
            return arrivals;
        }
        arrivals.push((now as u64, 0));
    }
}

/// Bursts of 32 requests in 2 ms, of which a quarter straggle until 2 to 30 ms after its beginning, at so many requests a
/// second.
pub fn bursts_of_32(seed: u64, per_second: f64, lasts: Duration) -> Arrivals {
    let mut random = Random::new(seed);
    let (mut start, mut arrivals) = (0.0, Vec::new());
    loop {
        start += random.exponential(per_second / 32.0);
        if start >= lasts.as_secs_f64() * 1e6 {
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

/// What callers saw.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Of what was answered, by tier, in microseconds from arrival to the end of the forward.
    pub latencies: Vec<Vec<u64>>,
    /// Answered after the deadline.
    pub late: usize,
    /// From arrival to being dropped.
    pub dropped: Vec<u64>,
    pub rejected: usize,
    /// Until the last batch began.
    pub seconds: f64,
    pub batches: usize,
    /// Entries that nobody ran in the end. A policy that leaves any is broken.
    pub left: usize,
}

impl Seen {
    /// Of the latencies, in microseconds. None if nothing was answered.
    pub fn percentile(&self, percent: f64) -> Option<f64> {
        let mut all: Vec<u64> = self.latencies.concat();
        all.sort_unstable();
        let rank = (all.len() as f64 * percent / 100.0).ceil() as usize;
        all.get(rank.saturating_sub(1)).map(|micros| *micros as f64)
    }

    pub fn answered(&self) -> usize {
        self.latencies.iter().map(Vec::len).sum()
    }
}

/// An executor whose forwards take a fixed time and some more for every row, padding included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    pub fixed: Duration,
    pub per_row: Duration,
}

impl Device {
    /// 12 ms and a tenth more for every row.
    pub const USUAL: Device = Device { fixed: Duration::from_millis(12), per_row: Duration::from_micros(100) };

    pub fn forward(self, rows: usize) -> Duration {
        self.fixed + self.per_row * rows as u32
    }

    pub fn warm_up<T>(self, batcher: &mut Batcher<T>) {
        for rows in batcher.limits().padded_sizes() {
            batcher.costs_mut().warmed_up(rows, self.forward(rows));
        }
    }
}

/// The batch under way.
struct Running {
    ends: u64,
    padded_rows: usize,
    took: Duration,
    /// With the time of arrival.
    members: Vec<Member<u64>>,
}

/// Runs arrivals through a batcher on one executor. Threads wake up at once, and answer when the forward ends. Every
/// request has so much patience. With a seed for it, forwards vary by 0.3 ms, and now and then something disturbs one.
pub fn simulate(
    device: Device,
    limits: BatchLimits,
    arrivals: &Arrivals,
    patience: Duration,
    noise: Option<u64>,
) -> Seen {
    let mut batcher: Batcher<u64> = Batcher::new(limits, 1);
    batcher.executor_idle();
    device.warm_up(&mut batcher);
    let mut random = noise.map(Random::new);
    let mut seen = Seen { latencies: vec![Vec::new(); limits.tiers()], ..Seen::default() };
    let mut arrivals = arrivals.iter().copied().peekable();
    let mut running: Option<Running> = None;
    let mut timer: Option<u64> = None;
    loop {
        let next_arrival = arrivals.peek().map(|(at, _)| *at);
        let ends = running.as_ref().map(|running| running.ends);
        let Some(now) = [next_arrival, ends, timer].into_iter().flatten().min() else { break };
        if let Some(over) = running.take_if(|running| running.ends == now) {
            for member in over.members {
                seen.latencies[member.tier].push(now - member.payload);
                seen.late += usize::from(us(now) > member.deadline);
            }
            batcher.ran(over.padded_rows, over.took);
            batcher.executor_idle();
        } else if let Some((at, tier)) = arrivals.next_if(|(at, _)| *at == now) {
            let request = Request { rows: 1, bytes: 256, deadline: us(at) + patience, tier };
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
                let disturbed = random.as_mut().map_or(Duration::ZERO, |random| {
                    let jitter = us(random.draw() % 300);
                    if random.unit() < 0.02 { jitter + us(5_000) } else { jitter }
                });
                let took = device.forward(padded_rows) + disturbed;
                running = Some(Running { ends: now + took.as_micros() as u64, padded_rows, took, members });
            }
            Decision::Wait { until } => timer = until.map(|until| until.as_micros() as u64),
        }
        seen.seconds = now as f64 / 1e6;
    }
    seen.left = batcher.queue_rows();
    seen
}

fn us(micros: u64) -> Duration {
    Duration::from_micros(micros)
}
