//! Which hypothesis explains what was served: one that reproduces the bits of as many rows as any, and had the fewest ways
//! to do so by chance.
//!
//! A hypothesis with one setting for all rows ("the clock five hours early") stakes itself once. One that may choose anew
//! for every row ("some event was missing") pays for each choice: a row in which one of 200 events reproduces the bits costs
//! log2 200 bits. So of two that reproduce the same rows the one that says more comes first, and the other is shown as a
//! tie.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::cause::Fault;

/// Hypotheses that are shown beside the best.
const TIES_MAX: usize = 4;

/// What a variant of a hypothesis did to one row.
#[derive(Debug, Clone)]
pub struct Match {
    /// Index into the hypotheses that were tried.
    pub hypothesis: usize,
    /// The share of the hypothesis' choices for this row that this is; 1 where it has none.
    pub weight: f64,
    /// It reproduces every feature of the row, changed or not.
    pub whole: bool,
}

/// A hypothesis with its setting.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Hypothesis {
    pub fault: Fault,
    pub setting: String,
}

/// What explains the wrong values, and how well.
#[derive(Debug, Clone, Serialize)]
pub struct Cause {
    /// The best; None where no hypothesis reproduces a single row.
    pub fault: Option<Fault>,
    pub setting: String,
    /// Rows that were tried, and of them those whose bits are reproduced.
    pub rows: usize,
    pub reproduced: usize,
    /// Of those, rows in which every other feature comes out as served, too.
    pub reproduced_whole: usize,
    /// Others that reproduce as many rows, the likelier first.
    pub ties: Vec<Tie>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Tie {
    pub fault: Fault,
    pub setting: String,
    pub reproduced: usize,
}

struct Standing {
    hypothesis: usize,
    reproduced: usize,
    whole: usize,
    bits: f64,
}

/// Of each row the variants that reproduce it.
pub fn rank(hypotheses: &[Hypothesis], rows: &[Vec<&Match>]) -> Cause {
    let mut settings: BTreeMap<Fault, usize> = BTreeMap::new();
    hypotheses.iter().for_each(|hypothesis| *settings.entry(hypothesis.fault).or_default() += 1);
    let named: BTreeSet<usize> = rows.iter().flatten().map(|found| found.hypothesis).collect();
    let mut standings: Vec<Standing> = named
        .into_iter()
        .map(|hypothesis| {
            // That there are many settings to choose from is paid for once.
            let mut bits = (settings[&hypotheses[hypothesis].fault] as f64).log2();
            let (mut reproduced, mut whole) = (0, 0);
            for row in rows {
                let found = || row.iter().filter(|found| found.hypothesis == hypothesis);
                let weight: f64 = found().map(|found| found.weight).sum();
                if weight > 0.0 {
                    reproduced += 1;
                    whole += usize::from(found().any(|found| found.whole));
                    bits -= weight.min(1.0).log2();
                }
            }
            Standing { hypothesis, reproduced, whole, bits }
        })
        .collect();
    standings.sort_by(|a, b| {
        let key = |standing: &Standing| (standing.reproduced, standing.whole);
        key(b).cmp(&key(a)).then(a.bits.total_cmp(&b.bits)).then(a.hypothesis.cmp(&b.hypothesis))
    });
    let Some(best) = standings.first() else {
        return Cause {
            fault: None,
            setting: String::new(),
            rows: rows.len(),
            reproduced: 0,
            reproduced_whole: 0,
            ties: Vec::new(),
        };
    };
    let hypothesis = &hypotheses[best.hypothesis];
    let ties = standings[1..].iter().filter(|other| (other.reproduced, other.whole) == (best.reproduced, best.whole));
    Cause {
        fault: Some(hypothesis.fault),
        setting: hypothesis.setting.clone(),
        rows: rows.len(),
        reproduced: best.reproduced,
        reproduced_whole: best.whole,
        ties: ties
            .take(TIES_MAX)
            .map(|other| Tie {
                fault: hypotheses[other.hypothesis].fault,
                setting: hypotheses[other.hypothesis].setting.clone(),
                reproduced: other.reproduced,
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hypothesis(fault: Fault, setting: &str) -> Hypothesis {
        Hypothesis { fault, setting: setting.to_owned() }
    }

    fn of(hypothesis: usize, weight: f64) -> Match {
        Match { hypothesis, weight, whole: true }
    }

    #[test]
    fn more_rows_win_and_then_fewer_choices() {
        let tried = [
            hypothesis(Fault::Clock, "+1h"),
            hypothesis(Fault::Clock, "+2h"),
            hypothesis(Fault::Dropped, "load"),
            hypothesis(Fault::Stale, "load"),
        ];
        // All rows are what one event less gives, the newest each time: so they are what an older state gives.
        let rows =
            [vec![of(2, 0.01), of(3, 0.5)], vec![of(2, 0.01), of(3, 0.5)], vec![of(2, 0.01), of(3, 0.5), of(0, 1.0)]];
        let rows: Vec<Vec<&Match>> = rows.iter().map(|row| row.iter().collect()).collect();
        let cause = rank(&tried, &rows);
        assert_eq!((cause.fault, cause.reproduced, cause.rows), (Some(Fault::Stale), 3, 3));
        assert_eq!(cause.ties.len(), 1);
        assert_eq!(cause.ties[0].fault, Fault::Dropped);

        let rows = [vec![of(2, 0.01)], vec![of(2, 0.01), of(3, 0.5)], vec![of(1, 1.0)]];
        let rows: Vec<Vec<&Match>> = rows.iter().map(|row| row.iter().collect()).collect();
        let cause = rank(&tried, &rows);
        assert_eq!((cause.fault, cause.reproduced, cause.rows), (Some(Fault::Dropped), 2, 3));
        assert!(cause.ties.is_empty());
    }

    #[test]
    fn nothing_is_named_where_nothing_fits() {
        let cause = rank(&[hypothesis(Fault::Clock, "+1h")], &[Vec::new(), Vec::new()]);
        assert_eq!((cause.fault, cause.rows, cause.reproduced), (None, 2, 0));
    }
}
