//! Bins over texts: a dictionary of the frequent categories, OTHER for the rest that training saw, UNSEEN for what it did
//! not.
//!
//! What training saw beyond the dictionary may be of any number, so it is remembered by a Bloom filter: a category of
//! training is never called unseen, and a new one passes for OTHER with the filter's rate of error, which is stated.
//!
//! How much is unseen when nothing changed? Not nothing: the next value of a long tail is often a new one. Training tells,
//! by leaving out one bucket of blocks at a time: what occurs in one bucket only would have been unseen there (Good and
//! Turing's estimate, by blocks). A profile counts it as UNSEEN, and such a category has no place in the dictionary.

use serde::{Deserialize, Serialize};

/// Categories at most: with OTHER and UNSEEN a bin's number fits a byte.
pub const CATEGORIES_MAX: usize = 254;

/// In place of a category's number: there are never so many.
const NOBODY: u8 = u8::MAX;

/// Of a label; the rest of a longer one is only hashed.
pub const LABEL_BYTES_MAX: usize = 64;

/// Bits of a filter while it is filled: 8 KiB for each feature, 2 % of error at 8,000 categories.
const FILTER_BITS: usize = 1 << 16;
const FILTER_BITS_MIN: usize = 64;
/// A frozen filter has this many bits for each category, where there are not too many: one new category in 400 is missed.
const FILTER_BITS_EACH: usize = 16;
const FILTER_HASHES: u32 = 4;

/// A Bloom filter over hashes; its number of bits is a power of two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Filter(Vec<u64>);

impl Default for Filter {
    fn default() -> Filter {
        Filter(vec![0; FILTER_BITS / 64])
    }
}

impl Filter {
    pub fn add(&mut self, hash: u64) {
        for place in self.places(hash) {
            self.0[place / 64] |= 1 << (place % 64);
        }
    }

    pub fn contains(&self, hash: u64) -> bool {
        self.places(hash).all(|place| self.0[place / 64] >> (place % 64) & 1 == 1)
    }

    fn places(&self, hash: u64) -> impl Iterator<Item = usize> + use<> {
        places(hash, self.0.len() * 64 - 1)
    }

    /// Of filters that are still being filled.
    pub fn merge(&mut self, other: &Filter) {
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word |= other);
    }

    /// Half as many bits answer the same questions, with more errors: places are low bits of the hash.
    pub fn frozen(mut self, categories: u64) -> Filter {
        let wished = (categories.min(FILTER_BITS as u64) as usize * FILTER_BITS_EACH).next_power_of_two();
        let words = wished.clamp(FILTER_BITS_MIN, FILTER_BITS) / 64;
        while self.0.len() > words {
            let upper = self.0.split_off(self.0.len() / 2);
            self.merge(&Filter(upper));
        }
        self
    }

    /// How often a category that was not added is taken for one that was.
    pub fn error_rate(&self) -> f64 {
        let set: u32 = self.0.iter().map(|word| word.count_ones()).sum();
        (f64::from(set) / (self.0.len() * 64) as f64).powi(FILTER_HASHES as i32)
    }
}

/// The places of a category among as many as `mask` has.
fn places(hash: u64, mask: usize) -> impl Iterator<Item = usize> {
    (0..FILTER_HASHES).map(move |i| (hash >> (16 * i)) as usize & 0xffff & mask)
}

impl From<Filter> for String {
    fn from(filter: Filter) -> String {
        filter.0.iter().map(|word| format!("{word:016x}")).collect()
    }
}

impl TryFrom<String> for Filter {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Filter, &'static str> {
        const INVALID: &str = "a filter of categories is not hexadecimal words of the stored form";
        let words = text.len() / 16;
        if !text.is_ascii() || !text.len().is_multiple_of(16) || !words.is_power_of_two() || words > FILTER_BITS / 64 {
            return Err(INVALID);
        }
        let word = |i: usize| u64::from_str_radix(&text[16 * i..16 * i + 16], 16).map_err(|_| INVALID);
        (0..words).map(word).collect::<Result<_, _>>().map(Filter)
    }
}

/// Whether a category occurred in one bucket of blocks or in several, in the places that the filter has for it: what
/// others put there hides as much of one as of the other, so that both are wrong about as many new categories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Homes(Box<[u8]>);

impl Homes {
    const SEVERAL: u8 = u8::MAX;

    #[inline]
    pub fn add(&mut self, hash: u64, bucket: u8) {
        for place in places(hash, FILTER_BITS - 1) {
            self.0[place] = Homes::both(self.0[place], bucket + 1);
        }
    }

    /// A union: in any order, and however often.
    fn both(a: u8, b: u8) -> u8 {
        match (a, b) {
            (0, other) | (other, 0) => other,
            (a, b) if a == b => a,
            _ => Homes::SEVERAL,
        }
    }

    pub fn merge(&mut self, other: &Homes) {
        self.0.iter_mut().zip(&other.0).for_each(|(home, other)| *home = Homes::both(*home, *other));
    }

    /// Whether a category that occurred did so in one bucket only.
    pub fn is_of_one_bucket(&self, hash: u64) -> bool {
        places(hash, FILTER_BITS - 1).any(|place| self.0[place] != Homes::SEVERAL)
    }
}

impl Default for Homes {
    fn default() -> Homes {
        Homes(vec![0; FILTER_BITS].into())
    }
}

/// A category of the dictionary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Category {
    pub hash: u64,
    /// As much of it as is shown.
    pub label: String,
}

/// Frozen categories. Bins are the categories in their order, OTHER, UNSEEN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Categories {
    categories: Vec<Category>,
    seen: Filter,
    /// Open addressing over the hashes, and the number of the category of each; `NOBODY` where there is none. At most a
    /// quarter full.
    hashes: Vec<u64>,
    numbers: Vec<u8>,
}

impl Categories {
    pub fn new(categories: Vec<Category>, seen: Filter) -> Result<Categories, &'static str> {
        if categories.len() > CATEGORIES_MAX {
            return Err("a dictionary has more categories than fit");
        }
        let places = (4 * categories.len()).next_power_of_two().max(4);
        let (mut hashes, mut numbers) = (vec![0; places], vec![NOBODY; places]);
        for (number, category) in categories.iter().enumerate() {
            if category.label.len() > LABEL_BYTES_MAX {
                return Err("the label of a category is longer than allowed");
            }
            let mut place = category.hash as usize & (places - 1);
            while numbers[place] != NOBODY {
                if hashes[place] == category.hash {
                    return Err("a dictionary has a category twice");
                }
                place = (place + 1) & (places - 1);
            }
            (hashes[place], numbers[place]) = (category.hash, number as u8);
        }
        Ok(Categories { categories, seen, hashes, numbers })
    }

    pub fn categories(&self) -> &[Category] {
        &self.categories
    }

    pub fn bins(&self) -> usize {
        self.categories.len() + 2
    }

    pub fn other(&self) -> usize {
        self.categories.len()
    }

    pub fn unseen(&self) -> usize {
        self.categories.len() + 1
    }

    /// See [`Filter::error_rate`].
    pub fn unseen_missed(&self) -> f64 {
        self.seen.error_rate()
    }

    #[inline]
    pub fn find(&self, hash: u64) -> u8 {
        let mask = self.hashes.len() - 1;
        let mut place = hash as usize & mask;
        loop {
            // An empty place has the hash 0, which only its number tells from a category's.
            let number = self.numbers[place];
            if self.hashes[place] == hash && number != NOBODY {
                return number;
            }
            if number == NOBODY {
                return (self.categories.len() + usize::from(!self.seen.contains(hash))) as u8;
            }
            place = (place + 1) & mask;
        }
    }

    /// What tells it from others, for the digest.
    pub fn canonical(&self, out: &mut Vec<u8>) {
        self.categories.iter().for_each(|category| out.extend(category.hash.to_le_bytes()));
        self.seen.0.iter().for_each(|word| out.extend(word.to_le_bytes()));
    }

    pub fn label(&self, bin: usize) -> String {
        match self.categories.get(bin) {
            Some(category) => format!("{:?}", category.label),
            None if bin == self.categories.len() => "OTHER".into(),
            None => "UNSEEN".into(),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    categories: Vec<Category>,
    seen: Filter,
}

impl From<Categories> for Stored {
    fn from(categories: Categories) -> Stored {
        Stored { categories: categories.categories, seen: categories.seen }
    }
}

impl TryFrom<Stored> for Categories {
    type Error = &'static str;

    fn try_from(stored: Stored) -> Result<Categories, &'static str> {
        Categories::new(stored.categories, stored.seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::hash;

    fn numbered(numbers: std::ops::Range<u32>) -> impl Iterator<Item = u64> {
        numbers.map(|number| hash(format!("category {number}").as_bytes()))
    }

    fn dictionary(known: u32, seen: u32) -> Categories {
        let mut filter = Filter::default();
        numbered(0..seen).for_each(|hash| filter.add(hash));
        let categories = numbered(0..known).map(|hash| Category { hash, label: "x".into() }).collect();
        Categories::new(categories, filter.frozen(u64::from(seen))).unwrap()
    }

    #[test]
    fn a_category_is_known_other_or_unseen() {
        for (known, seen) in [(0, 0), (3, 3), (200, 2_000), (254, 5_000)] {
            let categories = dictionary(known, seen);
            for (number, hash) in numbered(0..seen).enumerate() {
                let expected = number.min(known as usize);
                assert_eq!(usize::from(categories.find(hash)), expected, "{number} of {known} and {seen}");
            }
            let missed = numbered(seen..seen + 20_000)
                .filter(|hash| usize::from(categories.find(*hash)) != categories.unseen())
                .count();
            let rate = missed as f64 / 20_000.0;
            assert!(rate <= 1.5 * categories.unseen_missed() + 0.001, "{known} of {seen}: {rate}");
            assert!(categories.unseen_missed() < 0.02, "{known} of {seen}: {}", categories.unseen_missed());
        }
    }

    #[test]
    fn stored_categories_come_back() {
        let categories = dictionary(20, 500);
        let text = serde_json::to_string(&categories).unwrap();
        assert_eq!(serde_json::from_str::<Categories>(&text).unwrap(), categories);
        let twice = vec![Category { hash: 7, label: "a".into() }; 2];
        assert!(Categories::new(twice, Filter::default()).is_err());
        for filter in ["", "00", "0000000000000000 00000000000000", "ééééééééééééé"] {
            let text = format!(r#"{{"categories":[],"seen":"{filter}"}}"#);
            assert!(serde_json::from_str::<Categories>(&text).is_err(), "{text}");
        }
    }
}
