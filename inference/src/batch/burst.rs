//! Whether requests come in bursts, learned from what follows a request that found an executor idle. If it runs at
//! once, the rest of its burst waits for a whole forward; if it always waited for company, a lone request would wait for
//! nothing. What followed is seen in both cases, so that learning costs nobody anything.

use std::time::Duration;

use super::cost::Costs;

/// The longest gap between requests of one burst, as a share of a forward and at most.
const GAP_SHARE: f64 = 1.0 / 12.0;
const GAP_MAX: Duration = Duration::from_millis(1);
/// Timers and threads are no finer than that; for a forward so short, nothing is to be gained either.
const GAP_MIN: Duration = Duration::from_micros(50);
/// Lingering ends after so many gaps, however the burst goes on: at most 3 ms.
const LINGER_GAPS: u32 = 3;
/// The share of a new observation in the mean.
const SHARE: f64 = 1.0 / 20.0;
/// A larger burst counts as so large: it is worth no more, and one alone is to be forgotten soon.
const COMPANIONS_MAX: u32 = 8;
/// The forwards that lingering is expected to spare must be worth so many times what it costs. Random arrivals, however
/// dense, come to less: there the gain is as large as the cost.
const WORTH: f64 = 4.0;

/// What is known of bursts.
#[derive(Debug, Default)]
pub struct Bursts {
    /// The mean number of requests that followed closely on one that found an executor idle.
    companions: f64,
    watching: Option<Watch>,
}

#[derive(Debug)]
struct Watch {
    last: Duration,
    ends: Duration,
    companions: u32,
}

/// How long to wait for the rest of a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linger {
    pub gap_max: Duration,
    pub whole_max: Duration,
}

impl Bursts {
    /// A request came. `finds_idle` says that nothing was queued and an executor was idle.
    pub fn arrived(&mut self, now: Duration, finds_idle: bool, costs: &Costs) {
        let gap_max = gap_max(costs);
        if let Some(watch) = &mut self.watching {
            let follows = now.saturating_sub(watch.last) <= gap_max && now <= watch.ends;
            if follows {
                watch.last = now;
                watch.companions = (watch.companions + 1).min(COMPANIONS_MAX);
            }
            if !follows || watch.companions == COMPANIONS_MAX {
                self.companions += SHARE * (f64::from(watch.companions) - self.companions);
                self.watching = None;
            } else {
                return;
            }
        }
        if finds_idle {
            self.watching = Some(Watch { last: now, ends: now + gap_max * LINGER_GAPS, companions: 0 });
        }
    }

    /// Whether a request that finds an executor idle is to wait for others.
    pub fn linger(&self, costs: &Costs) -> Option<Linger> {
        let gap_max = gap_max(costs);
        let spared = self.companions * costs.fixed().as_secs_f64();
        let worth = gap_max >= GAP_MIN && spared > WORTH * gap_max.as_secs_f64();
        worth.then(|| Linger { gap_max, whole_max: gap_max * LINGER_GAPS })
    }
}

fn gap_max(costs: &Costs) -> Duration {
    costs.typical(1).mul_f64(GAP_SHARE).min(GAP_MAX)
}

#[cfg(test)]
impl Bursts {
    /// As after many bursts.
    pub fn bursty() -> Bursts {
        Bursts { companions: f64::from(COMPANIONS_MAX), watching: None }
    }
}
