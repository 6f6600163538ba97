//! More than can be answered: what is refused is refused at once, and what is admitted is answered in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use inference::batch::BatchLimits;
use inference::batch::simulation::{Arrivals, Random, poisson};
use serde::Serialize;

use super::open::{self, End};
use super::{ROWS_MAX, Spread, Subject, capacity};
use crate::process;

const QUEUE_ROWS_MAX: usize = 4_096;

#[derive(Debug, Serialize)]
pub struct Overload {
    /// Rows a second that it answers to callers who wait for each other, before and after.
    pub capacity: [f64; 2],
    pub offered: f64,
    pub deadline_ms: f64,
    pub sent: usize,
    /// In time, by tier.
    pub answered: [usize; 2],
    pub refused: [usize; 2],
    /// Admitted, and not answered by the deadline.
    pub late: [usize; 2],
    pub failed: usize,
    /// Left the queue because they could not have been answered in time any more.
    pub dropped: u64,
    pub rows_per_batch: f64,
    pub goodput: f64,
    /// Of the admitted, in time.
    pub in_time: f64,
    pub answer_ms: Spread,
    pub refusal_ms: Spread,
    pub behind_ms: Spread,
    /// The most that was resident in each half, in bytes.
    pub resident: [u64; 2],
}

/// Offers so many times the capacity in two tiers, one request in two each.
pub async fn run(subject: &Subject, times: f64, deadline: Duration, lasts: Duration) -> anyhow::Result<Overload> {
    let limits = BatchLimits::new(ROWS_MAX, QUEUE_ROWS_MAX).with_tiers(2).with_deadline(Some(deadline));
    let server = subject.serve(limits).await?;
    let measure = (lasts / 10).clamp(Duration::from_millis(200), Duration::from_secs(5));
    let (before, _) = capacity::served(&server, subject, measure).await?;
    let offered = times * before;
    let mut random = Random::new(7);
    let mut with_tiers = |seed, lasts| -> Arrivals {
        let tiers = poisson(seed, offered, lasts).into_iter();
        tiers.map(|(at, _)| (at, (random.draw() % 2) as usize)).collect()
    };
    open::run(&server, subject, &with_tiers(11, lasts / 10), deadline).await?;
    let arrivals = with_tiers(12, lasts);
    let (watch, metrics) = (Watch::start()?, server.metrics());
    let seen = open::run(&server, subject, &arrivals, deadline).await?;
    let (resident, after_all) = (watch.stop()?, server.metrics());
    let batches = (after_all.batches - metrics.batches).max(1);
    let (after, _) = capacity::served(&server, subject, measure).await?;
    let count = |end| [0, 1].map(|tier| seen.calls.iter().filter(|call| call.end == end && call.tier == tier).count());
    let (answered, late) = (count(End::Answered), count(End::Late));
    let sum = |tiers: [usize; 2]| tiers.iter().sum::<usize>() as f64;
    Ok(Overload {
        capacity: [before, after],
        offered,
        deadline_ms: deadline.as_secs_f64() * 1e3,
        sent: arrivals.len(),
        answered,
        refused: count(End::Refused),
        late,
        failed: count(End::Failed).iter().sum(),
        dropped: after_all.dropped - metrics.dropped,
        rows_per_batch: (after_all.rows - metrics.rows) as f64 / batches as f64,
        goodput: sum(answered) / seen.seconds.max(lasts.as_secs_f64()),
        in_time: sum(answered) / (sum(answered) + sum(late)),
        answer_ms: Spread::of(seen.millis(End::Answered)),
        refusal_ms: Spread::of(seen.millis(End::Refused)),
        behind_ms: Spread::of(seen.behind),
        resident,
    })
}

/// The memory of this process while something runs.
pub struct Watch {
    watching: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<(Duration, u64)>>,
}

const WATCH_EVERY: Duration = Duration::from_millis(50);

impl Watch {
    pub fn start() -> anyhow::Result<Watch> {
        let watching = Arc::new(AtomicBool::new(true));
        let still = watching.clone();
        let watch = move || {
            let (began, mut samples) = (Instant::now(), Vec::new());
            while still.load(Ordering::Relaxed) {
                samples.push((began.elapsed(), process::resident_bytes().unwrap_or(0)));
                std::thread::sleep(WATCH_EVERY);
            }
            samples
        };
        Ok(Watch { watching, thread: std::thread::Builder::new().name("watch".to_owned()).spawn(watch)? })
    }

    /// The most in each half.
    pub fn stop(self) -> anyhow::Result<[u64; 2]> {
        self.watching.store(false, Ordering::Relaxed);
        let samples = self.thread.join().map_err(|_| anyhow::anyhow!("the watch over memory panicked"))?;
        let middle = samples.last().map_or(Duration::ZERO, |(at, _)| *at / 2);
        let most = |late: bool| samples.iter().filter(|(at, _)| (*at > middle) == late).map(|(_, bytes)| *bytes).max();
        Ok([most(false).unwrap_or(0), most(true).unwrap_or(0)])
    }
}
