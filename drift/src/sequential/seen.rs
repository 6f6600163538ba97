//! Which units were counted: a unit must not count twice, also when its gateway restarts or another takes over.
//!
//! A Bloom filter (1970) of fixed size. It never forgets a unit; of units that were not counted it takes some for counted, which
//! loses them without regard to their outcome. Filters of several gateways merge by *or*. 128 KiB hold 100,000 units at 1 %
//! lost.

use serde::{Deserialize, Serialize};

pub(super) const WORDS: usize = 1 << 14;
const BITS: u64 = WORDS as u64 * 64;
const HASHES: u64 = 4;

/// Where every second new unit would be taken for one that was counted; no more are counted then.
const SET_BITS_MAX: u64 = BITS / 100 * 84;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u64>", into = "Vec<u64>")]
pub struct Seen {
    words: Box<[u64]>,
    set_bits: u64,
}

impl Default for Seen {
    fn default() -> Seen {
        Seen { words: vec![0; WORDS].into(), set_bits: 0 }
    }
}

impl Seen {
    pub fn contains(&self, unit: u64) -> bool {
        bits(unit).all(|(word, bit)| self.words[word] & bit != 0)
    }

    pub fn insert(&mut self, unit: u64) {
        for (word, bit) in bits(unit) {
            let word = &mut self.words[word];
            self.set_bits += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    pub fn merge(&mut self, other: &Seen) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.set_bits = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
    }

    pub fn is_full(&self) -> bool {
        self.set_bits >= SET_BITS_MAX
    }
}

impl TryFrom<Vec<u64>> for Seen {
    type Error = String;

    /// Trailing zeros need not be stored.
    fn try_from(mut words: Vec<u64>) -> Result<Seen, String> {
        if words.len() > WORDS {
            return Err(format!("{} words are more than the {WORDS} of a filter of units", words.len()));
        }
        words.resize(WORDS, 0);
        let set_bits = words.iter().map(|word| u64::from(word.count_ones())).sum();
        Ok(Seen { words: words.into(), set_bits })
    }
}

impl From<Seen> for Vec<u64> {
    fn from(seen: Seen) -> Vec<u64> {
        seen.words.into_vec()
    }
}

/// Word and bit of each hash, by double hashing (Kirsch and Mitzenmacher 2006).
fn bits(unit: u64) -> impl Iterator<Item = (usize, u64)> {
    let first = crate::random::mix(unit);
    let second = crate::random::mix(unit ^ 0x9e37_79b9_7f4a_7c15) | 1;
    (0..HASHES).map(move |k| {
        let bit = first.wrapping_add(k.wrapping_mul(second)) % BITS;
        ((bit / 64) as usize, 1 << (bit % 64))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_was_seen_is_known_and_few_others_are() {
        let (mut first, mut second) = (Seen::default(), Seen::default());
        for unit in 0..50_000 {
            first.insert(unit);
            second.insert(1_000_000 + unit);
        }
        first.merge(&second);
        assert!((0..50_000).all(|unit| first.contains(unit) && first.contains(1_000_000 + unit)));
        let wrongly = (2_000_000..2_100_000).filter(|unit| first.contains(*unit)).count();
        assert!((500..1_700).contains(&wrongly), "{wrongly} of 100,000");
        assert!(!first.is_full());

        let text = serde_json::to_string(&first).unwrap();
        assert_eq!(serde_json::from_str::<Seen>(&text).unwrap(), first);
        assert!(serde_json::from_str::<Seen>(&format!("[{}0]", "0,".repeat(WORDS))).is_err());
    }

    #[test]
    fn a_full_filter_says_so() {
        let mut seen = Seen::default();
        let most = (0..10_000_000).find(|unit| {
            seen.insert(*unit);
            seen.is_full()
        });
        assert!((400_000..600_000).contains(&most.unwrap()), "{most:?}");
    }
}
