//! Rules that need no statistics: what a gateway does by itself within seconds, and tells afterwards. A version that fails every
//! second row is taken off before the next flush.

use serde::{Deserialize, Serialize};

/// What the last half minute is held to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HardRules {
    /// Of rows that failed or were answered by a fallback.
    pub max_error_rate: f64,
    /// Of scores that are no numbers.
    pub max_nan_rate: f64,
    /// Below so many rows a rate says nothing.
    pub min_rows: u64,
    /// Whether one failure to get memory is enough.
    pub out_of_memory: bool,
}

impl Default for HardRules {
    fn default() -> HardRules {
        HardRules { max_error_rate: 0.5, max_nan_rate: 0.01, min_rows: 20, out_of_memory: true }
    }
}

/// What a rule was broken by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Broken {
    /// `error_rate`, `nan_rate` or `out_of_memory`.
    pub rule: String,
    pub rows: u64,
    pub events: u64,
    pub text: String,
}

/// What became of some rows of a version.
#[derive(Debug, Clone, Copy, Default)]
pub struct Answered {
    pub rows: u64,
    pub errors: u64,
    pub nans: u64,
    pub out_of_memory: bool,
}

const SECONDS: usize = 30;

/// The last half minute of one version on one gateway.
#[derive(Debug, Clone)]
pub struct Watch {
    rules: HardRules,
    /// By second modulo the window: which second, rows, errors, nans.
    slots: [(i64, u64, u64, u64); SECONDS],
}

impl Watch {
    pub fn new(rules: HardRules) -> Watch {
        Watch { rules, slots: [(i64::MIN, 0, 0, 0); SECONDS] }
    }

    /// Adds rows, and says whether a rule is broken now.
    pub fn record(&mut self, answered: Answered, now_us: i64) -> Option<Broken> {
        let second = now_us.div_euclid(1_000_000);
        let slot = &mut self.slots[second.rem_euclid(SECONDS as i64) as usize];
        if slot.0 != second {
            *slot = (second, 0, 0, 0);
        }
        slot.1 += answered.rows;
        slot.2 += answered.errors;
        slot.3 += answered.nans;
        if answered.out_of_memory && self.rules.out_of_memory {
            let text = "the version ran out of memory".to_owned();
            return Some(Broken { rule: "out_of_memory".to_owned(), rows: answered.rows, events: 1, text });
        }
        let recent = |slot: &&(i64, u64, u64, u64)| (0..SECONDS as i64).contains(&second.saturating_sub(slot.0));
        let (mut rows, mut errors, mut nans) = (0, 0, 0);
        for slot in self.slots.iter().filter(recent) {
            (rows, errors, nans) = (rows + slot.1, errors + slot.2, nans + slot.3);
        }
        if rows < self.rules.min_rows.max(1) {
            return None;
        }
        let broken = |rule: &str, what: &str, events: u64, most: f64| {
            let share = events as f64 / rows as f64;
            (share > most).then(|| Broken {
                rule: rule.to_owned(),
                rows,
                events,
                text: format!(
                    "{events} of {rows} rows of the last {SECONDS} s {what}: {:.1} %, more than {:.1} %",
                    100.0 * share,
                    100.0 * most
                ),
            })
        };
        broken("error_rate", "failed", errors, self.rules.max_error_rate)
            .or_else(|| broken("nan_rate", "had scores that are no numbers", nans, self.rules.max_nan_rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    #[test]
    fn a_broken_version_is_noticed_within_seconds_and_forgiven_after_the_window() {
        let mut watch = Watch::new(HardRules::default());
        let good = Answered { rows: 10, ..Answered::default() };
        let bad = Answered { rows: 10, errors: 10, ..Answered::default() };
        for second in 0..10 {
            assert_eq!(watch.record(good, second * SECOND), None);
        }
        let first = (10..30).find_map(|second| watch.record(bad, second * SECOND).map(|broken| (second, broken)));
        let (second, broken) = first.unwrap();
        assert_eq!((second, broken.rule.as_str(), broken.events, broken.rows), (20, "error_rate", 110, 210));
        assert!(broken.text.contains("110 of 210 rows of the last 30 s failed: 52.4 %"), "{}", broken.text);
        assert_eq!(watch.record(Answered { rows: 30, ..good }, 60 * SECOND), None);
    }

    #[test]
    fn few_rows_say_nothing_and_memory_does_at_once() {
        let mut watch = Watch::new(HardRules::default());
        assert_eq!(watch.record(Answered { rows: 19, errors: 19, ..Answered::default() }, 0), None);
        let nan = watch.record(Answered { rows: 181, nans: 3, ..Answered::default() }, SECOND);
        assert_eq!(nan.map(|broken| broken.rule), Some("nan_rate".to_owned()));
        let memory = watch.record(Answered { rows: 1, out_of_memory: true, ..Answered::default() }, SECOND);
        assert_eq!(memory.map(|broken| broken.rule), Some("out_of_memory".to_owned()));
    }
}
