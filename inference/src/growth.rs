//! Whether something that should stay flat grows: memory that nobody can account for is a leak. Pure; time is an argument, as
//! in [`crate::batch`].
//!
//! What counts of each window of time is the least that was seen, because a leak raises that too, while requests come and
//! go. One step up is no leak (a cache that filled, a model that was loaded), so what grows has to have grown in each
//! third of the time that is looked at, and by enough in all.

use std::collections::VecDeque;
use std::time::Duration;

/// Windows looked at; a multiple of three.
const WINDOWS: usize = 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrowthLimits {
    /// The least of every such time counts.
    pub window: Duration,
    /// Growth by less than this is none.
    pub bytes_min: u64,
}

/// It grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Growing {
    /// By so many bytes.
    pub by: u64,
    /// In so much time.
    pub within: Duration,
}

#[derive(Debug, Clone)]
pub struct Growth {
    limits: GrowthLimits,
    /// The least of each window that is over, the newest last; at most [`WINDOWS`].
    least: VecDeque<i64>,
    /// When the window under way began, and the least in it.
    current: Option<(Duration, i64)>,
}

impl Growth {
    pub fn new(limits: GrowthLimits) -> Growth {
        Growth { limits, least: VecDeque::new(), current: None }
    }

    /// Begins again: what is measured is of something else from now on.
    pub fn reset(&mut self) {
        *self = Growth::new(self.limits);
    }

    /// So many bytes were seen. They may be below zero, where they are what is left of a sum.
    pub fn seen(&mut self, now: Duration, bytes: i64) {
        match &mut self.current {
            Some((began, least)) if now.saturating_sub(*began) < self.limits.window => *least = bytes.min(*least),
            Some((_, least)) => {
                if self.least.len() == WINDOWS {
                    self.least.pop_front();
                }
                self.least.push_back(*least);
                self.current = Some((now, bytes));
            }
            None => self.current = Some((now, bytes)),
        }
    }

    pub fn growing(&self) -> Option<Growing> {
        if self.least.len() < WINDOWS {
            return None;
        }
        let third = |index: usize| self.least.range(index * WINDOWS / 3..(index + 1) * WINDOWS / 3).copied().min();
        let (first, second, last) = (third(0)?, third(1)?, third(2)?);
        let by = last.saturating_sub(first);
        // Of a steady growth, half is in each step; as much again is left to noise.
        let steady = |rise: i64| rise.saturating_mul(4) >= by;
        let grows = u64::try_from(by).is_ok_and(|by| by > 0 && by >= self.limits.bytes_min)
            && steady(second.saturating_sub(first))
            && steady(last.saturating_sub(second));
        // From the first third to the last.
        grows.then(|| Growing { by: by.unsigned_abs(), within: self.limits.window * (WINDOWS as u32 * 2 / 3) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: i64 = 1 << 20;

    /// One look a second for so many minutes.
    fn watch(minutes: u64, bytes: impl Fn(u64) -> i64) -> Option<Growing> {
        let limits = GrowthLimits { window: Duration::from_secs(60), bytes_min: 32 << 20 };
        let mut growth = Growth::new(limits);
        (0..minutes * 60).for_each(|second| growth.seen(Duration::from_secs(second), bytes(second)));
        growth.growing()
    }

    /// What requests take beside it: up to 500 MiB, none of it for a moment in every minute.
    fn noise(second: u64) -> i64 {
        (second % 17) as i64 * 30 * MIB
    }

    #[test]
    fn what_leaks_is_found_below_the_noise() {
        let leak = |second: u64| second as i64 * MIB / 10 + noise(second);
        assert_eq!(watch(15, leak), None, "too early to say");
        let found = watch(17, leak).unwrap();
        assert!(found.by > 50 << 20 && found.by < 90 << 20, "{found:?}");
        assert_eq!(found.within, Duration::from_secs(10 * 60));
    }

    #[test]
    fn what_is_flat_is_not_nor_what_grows_by_too_little() {
        assert_eq!(watch(40, noise), None);
        assert_eq!(watch(40, |second| second as i64 * MIB / 40), None, "22 MiB in 15 minutes");
        assert_eq!(watch(40, |second| -(second as i64) * MIB), None);
        assert_eq!(watch(40, |_| -MIB), None);
    }

    #[test]
    fn a_step_is_not_wherever_it_lies() {
        for minute in 0..40 {
            assert_eq!(watch(40, |second| if second / 60 < minute { 0 } else { 900 * MIB }), None, "{minute}");
        }
        // Nor is a cache that fills and then stays full.
        assert_eq!(watch(60, |second| (second as i64 * MIB).min(1_200 * MIB)), None);
    }

    #[test]
    fn it_begins_again() {
        let mut growth = Growth::new(GrowthLimits { window: Duration::from_secs(1), bytes_min: 1 });
        (0..17).for_each(|second| growth.seen(Duration::from_secs(second), second as i64));
        assert!(growth.growing().is_some());
        growth.reset();
        growth.seen(Duration::from_secs(18), 0);
        assert_eq!(growth.growing(), None);
    }
}
