//! Bins over an ordered scale, with edges that are chosen once, from training data, and then frozen.
//!
//! Edges that move with the data compare two different rulers; frozen ones make counting exact, mergeable by addition and
//! the same in every process. All numbers are counted by an integer key of the same order, so a bin is `lower <= key <
//! upper` whatever the type, and a point mass (an *atom*) is just a bin of one key. The bins at the ends hold what lies
//! under the smallest and over the largest value of training.

use serde::{Deserialize, Serialize};

use crate::number::{Scale, value};

/// Edges at most: six steps of a binary search, and never more bins than a noise floor can be found for.
pub const EDGES_MAX: usize = 63;

/// Equal-depth bins at most. With as many atoms, two edges each, and both ends there is still room.
pub const BINS_MAX: usize = 20;

/// As many different values, each with an edge on both sides, fit between both ends.
const VALUES_APART_MAX: usize = 30;

/// Frozen edges. Bin 0 lies under the first edge, bin `i` between edges `i - 1` and `i`, the last bin over the last edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<i64>", into = "Vec<i64>")]
pub struct Edges {
    /// Strictly ascending; the rest is `i64::MAX`.
    padded: Box<[i64; EDGES_MAX + 1]>,
    count: usize,
}

impl Edges {
    /// Strictly ascending keys, at most [`EDGES_MAX`] of them.
    pub fn new(keys: &[i64]) -> Result<Edges, &'static str> {
        if keys.len() > EDGES_MAX {
            return Err("a histogram has more edges than fit");
        }
        if keys.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Err("the edges of a histogram do not ascend");
        }
        let mut padded = Box::new([i64::MAX; EDGES_MAX + 1]);
        padded[..keys.len()].copy_from_slice(keys);
        Ok(Edges { padded, count: keys.len() })
    }

    pub fn keys(&self) -> &[i64] {
        &self.padded[..self.count]
    }

    /// Bins, both ends included.
    pub fn bins(&self) -> usize {
        self.count + 1
    }

    /// The bins of some keys. A binary search whose steps do not depend on the data: a mispredicted branch costs more
    /// than the whole search.
    #[inline]
    pub fn find(&self, keys: &[i64], bins: &mut [u8]) {
        match self.count {
            0..=15 => self.find_in::<8>(keys, bins),
            16..=31 => self.find_in::<16>(keys, bins),
            _ => self.find_in::<32>(keys, bins),
        }
    }

    #[inline(always)]
    fn find_in<const FIRST_STEP: usize>(&self, keys: &[i64], bins: &mut [u8]) {
        for (key, bin) in keys.iter().zip(bins) {
            let mut below = 0;
            let mut step = FIRST_STEP;
            while step > 0 {
                // `below + step` is at most 63 here, and the mask tells the compiler that it stays inside.
                below += step * usize::from(self.padded[(below + step - 1) & EDGES_MAX] <= *key);
                step /= 2;
            }
            // The largest key there is reaches the padding too.
            *bin = below.min(self.count) as u8;
        }
    }

    /// Edges of equal depth over `sample` (sorted; of values between `lowest` and `highest`, which are known exactly):
    /// `bins` of them where the sample suffices, atoms where one value has more than half of a bin's share. Where values
    /// are few, each is an atom.
    pub fn of_sample(sample: &[i64], lowest: i64, highest: i64, bins: usize) -> Edges {
        // Below some 20 values a bin, its share is noise.
        let bins = bins.clamp(1, BINS_MAX).min((sample.len() / 20).max(2));
        let runs = runs(sample);
        let mut keys = vec![lowest];
        keys.extend(highest.checked_add(1));
        if runs.len() <= VALUES_APART_MAX {
            runs.iter().for_each(|(key, _)| keys.extend([Some(*key), key.checked_add(1)].into_iter().flatten()));
            return Edges::of_any(keys);
        }

        let mut atoms: Vec<(i64, usize)> =
            runs.iter().copied().filter(|(_, count)| count * 2 * bins > sample.len()).collect();
        atoms.sort_by_key(|(key, count)| (std::cmp::Reverse(*count), *key));
        atoms.truncate(BINS_MAX);
        let is_atom = |key: i64| atoms.iter().any(|(atom, _)| *atom == key);
        let spread: Vec<i64> = sample.iter().copied().filter(|key| !is_atom(*key)).collect();
        let parts = (bins * spread.len()).div_ceil(sample.len()).max(1);
        keys.extend((1..parts).map(|part| spread[part * spread.len() / parts]));
        atoms.iter().for_each(|(key, _)| keys.extend([Some(*key), key.checked_add(1)].into_iter().flatten()));
        Edges::of_any(keys).without_slivers(sample, bins, is_atom)
    }

    fn of_any(mut keys: Vec<i64>) -> Edges {
        keys.sort_unstable();
        keys.dedup();
        keys.truncate(EDGES_MAX);
        Edges::new(&keys).unwrap_or_else(|_| unreachable!("sorted, deduplicated and truncated keys"))
    }

    /// Joins bins that atoms cut thin with a neighbour that is not an atom.
    fn without_slivers(self, sample: &[i64], bins: usize, is_atom: impl Fn(i64) -> bool) -> Edges {
        let mut keys = self.keys().to_vec();
        let depth = |lower: i64, upper: i64| {
            sample.partition_point(|key| *key < upper) - sample.partition_point(|key| *key < lower)
        };
        let apart = |lower: i64, upper: i64| lower.checked_add(1) == Some(upper) && is_atom(lower);
        let mut i = 0;
        while i + 1 < keys.len() {
            let sliver = !apart(keys[i], keys[i + 1]) && depth(keys[i], keys[i + 1]) * 4 * bins < sample.len();
            if sliver && i + 2 < keys.len() && !apart(keys[i + 1], keys[i + 2]) {
                keys.remove(i + 1);
            } else if sliver && i > 0 && !apart(keys[i - 1], keys[i]) {
                keys.remove(i);
            } else {
                i += 1;
            }
        }
        Edges::of_any(keys)
    }

    /// What a bin holds, for people.
    pub fn label(&self, bin: usize, scale: Scale) -> String {
        let keys = self.keys();
        let lower = bin.checked_sub(1).and_then(|edge| keys.get(edge));
        match (lower, keys.get(bin)) {
            (None, None) => "any".into(),
            (None, Some(upper)) => format!("under {}", shown(*upper, scale)),
            (Some(lower), Some(upper)) if lower.checked_add(1) == Some(*upper) => shown(*lower, scale),
            (Some(lower), None) => format!("over {}", shown(lower.saturating_sub(1), scale)),
            (Some(lower), Some(upper)) => {
                format!("{} to {}", shown(*lower, scale), shown(upper.saturating_sub(1), scale))
            }
        }
    }
}

fn shown(key: i64, scale: Scale) -> String {
    match scale {
        Scale::Int64 => key.to_string(),
        Scale::Bool => (key != 0).to_string(),
        Scale::Float64 => {
            let x = value(key);
            // Six digits tell bins apart; seventeen hide them.
            let short = format!("{x:.5e}").parse().unwrap_or(x);
            if (1e-4..1e9).contains(&f64::abs(short)) || short == 0.0 {
                short.to_string()
            } else {
                format!("{short:e}")
            }
        }
    }
}

/// The different keys of a sorted sample, and how often each occurs.
fn runs(sample: &[i64]) -> Vec<(i64, usize)> {
    sample.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
}

impl From<Edges> for Vec<i64> {
    fn from(edges: Edges) -> Vec<i64> {
        edges.keys().to_vec()
    }
}

impl TryFrom<Vec<i64>> for Edges {
    type Error = &'static str;

    fn try_from(keys: Vec<i64>) -> Result<Edges, &'static str> {
        Edges::new(&keys)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::number::key;
    use crate::random::Random;

    fn edges_of(values: &[f64], bins: usize) -> Edges {
        let mut keys: Vec<i64> = values.iter().map(|x| key(*x)).collect();
        keys.sort_unstable();
        Edges::of_sample(&keys, keys[0], keys[keys.len() - 1], bins)
    }

    fn counts(edges: &Edges, values: &[f64]) -> Vec<usize> {
        let keys: Vec<i64> = values.iter().map(|x| key(*x)).collect();
        let mut bins = vec![0; keys.len()];
        edges.find(&keys, &mut bins);
        let mut counts = vec![0; edges.bins()];
        bins.iter().for_each(|bin| counts[usize::from(*bin)] += 1);
        counts
    }

    #[test]
    fn bins_are_of_equal_depth() {
        let mut random = Random::new(1);
        let values: Vec<f64> = (0..10_000).map(|_| random.normal()).collect();
        let edges = edges_of(&values, 20);
        let counts = counts(&edges, &values);
        assert_eq!((counts.len(), counts[0], counts[21]), (22, 0, 0));
        assert!(counts[1..21].iter().all(|count| (490..=510).contains(count)), "{counts:?}");
        // Few values make few bins.
        assert_eq!(edges_of(&values[..100], 20).bins(), 7);
    }

    #[test]
    fn point_masses_are_bins_of_their_own() {
        let mut random = Random::new(2);
        let values: Vec<f64> = (0..10_000).map(|i| if i % 3 == 0 { 0.0 } else { libm::exp(random.normal()) }).collect();
        let edges = edges_of(&values, 10);
        let atom = (0..edges.bins()).find(|bin| edges.label(*bin, Scale::Float64) == "0");
        assert_eq!(atom.map(|bin| counts(&edges, &values)[bin]), Some(3334));
        // No bin but the ends and the atom is far from the depth asked for.
        let others = counts(&edges, &values).into_iter().filter(|count| *count > 0 && *count != 3334);
        assert!(others.clone().all(|count| count > 250), "{:?}", others.collect::<Vec<_>>());
    }

    #[test]
    fn few_values_are_told_apart() {
        let edges = Edges::of_sample(&[1, 1, 2, 5, 5, 5], 1, 5, 20);
        let labels: Vec<String> = (0..edges.bins()).map(|bin| edges.label(bin, Scale::Int64)).collect();
        assert_eq!(labels, ["under 1", "1", "2", "3 to 4", "5", "over 5"]);
        let edges = Edges::of_sample(&[0, 1, 1], 0, 1, 20);
        let labels: Vec<String> = (0..edges.bins()).map(|bin| edges.label(bin, Scale::Bool)).collect();
        assert_eq!(labels, ["under false", "false", "true", "over true"]);
    }

    proptest! {
        #[test]
        fn the_search_counts_edges_at_or_below(
            mut keys in prop::collection::vec(any::<i64>(), 0..=EDGES_MAX),
            others in prop::collection::vec(any::<i64>(), 0..50),
        ) {
            keys.sort_unstable();
            keys.dedup();
            let edges = Edges::new(&keys).unwrap();
            let asked: Vec<i64> = keys.iter().copied().chain(others).chain([i64::MIN, i64::MAX]).collect();
            let mut bins = vec![0; asked.len()];
            edges.find(&asked, &mut bins);
            for (key, bin) in asked.iter().zip(bins) {
                prop_assert_eq!(usize::from(bin), keys.partition_point(|edge| edge <= key));
            }
        }

        #[test]
        fn any_sample_has_edges(mut sample in prop::collection::vec(prop_oneof![any::<i64>(), -20_i64..20], 1..300), bins in 0_usize..40) {
            sample.sort_unstable();
            let (lowest, highest) = (sample[0], sample[sample.len() - 1]);
            let edges = Edges::of_sample(&sample, lowest, highest, bins);
            prop_assert_eq!(edges.keys().first(), Some(&lowest));
            prop_assert!(edges.keys().len() <= EDGES_MAX);
            if highest < i64::MAX {
                prop_assert_eq!(edges.keys().last(), Some(&(highest + 1)));
            }
            let text = serde_json::to_string(&edges).unwrap();
            prop_assert_eq!(serde_json::from_str::<Edges>(&text).unwrap(), edges);
        }
    }
}
