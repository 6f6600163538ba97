//! Who gets what: every unit falls into one of 10,000 buckets, for ever, and experiments take buckets.
//!
//! - A *layer* is one way of throwing units into buckets. Experiments in one layer own different buckets, so no unit is in two
//!   of them; layers are independent of each other.
//! - A *ramp* is an experiment's own order of the buckets it owns. The challenger has a prefix of it, so a larger share only
//!   adds units, and what another experiment did to the buckets before says nothing about this one's arms.
//! - A *holdout* is a share of units that no experiment ever touches, the same in all layers.
//!
//! # The hash
//!
//! `SHA-256(part, part, ...)` where every part is its length in bytes as 8 little-endian bytes, then the bytes. The parts are
//! `coeval-bucket-1`, the layer's salt, and then the parts of the unit's key: text as UTF-8, integers as decimal digits, booleans
//! as `true` and `false`, binary as it is. The first 8 bytes, big-endian, times 10,000, divided by 2^64 is the bucket: no bucket
//! is likelier than another by more than 10^-15. The next 8 bytes are the unit's number, by which it is counted once. Any
//! language with SHA-256 can compute it; the tests hold vectors that Python did.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::id::{Incarnation, Salt};

pub const BUCKETS: u16 = 10_000;

/// Pieces of the buckets that one experiment may own.
pub const RANGES_MAX: usize = 64;

/// A part of a unit's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyPart<'a> {
    Text(&'a str),
    Integer(i64),
    Boolean(bool),
    Binary(&'a [u8]),
}

/// Where a unit falls in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    pub bucket: u16,
    /// Tells units apart: two of a billion share one with a chance of 3 %.
    pub unit: u64,
}

/// Places a unit. Depends on nothing but its arguments.
pub fn place(salt: &str, unit: &[KeyPart<'_>]) -> Placed {
    let mut hash = parts(&["coeval-bucket-1", salt]);
    for part in unit {
        match part {
            KeyPart::Text(text) => update(&mut hash, text.as_bytes()),
            KeyPart::Integer(integer) => update(&mut hash, integer.to_string().as_bytes()),
            KeyPart::Boolean(true) => update(&mut hash, b"true"),
            KeyPart::Boolean(false) => update(&mut hash, b"false"),
            KeyPart::Binary(bytes) => update(&mut hash, bytes),
        }
    }
    let [bucket, unit] = words(hash);
    Placed { bucket: below(bucket, u64::from(BUCKETS)) as u16, unit }
}

fn parts(parts: &[&str]) -> Sha256 {
    let mut hash = Sha256::new();
    for part in parts {
        update(&mut hash, part.as_bytes());
    }
    hash
}

fn update(hash: &mut Sha256, part: &[u8]) {
    hash.update((part.len() as u64).to_le_bytes());
    hash.update(part);
}

fn words(hash: Sha256) -> [u64; 2] {
    let bytes: [u8; 32] = hash.finalize().into();
    let word = |at: usize| bytes[at..at + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    [word(0), word(8)]
}

fn below(word: u64, end: u64) -> u64 {
    ((u128::from(word) * u128::from(end)) >> 64) as u64
}

/// Buckets from `from` up to but not including `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    pub from: u16,
    pub to: u16,
}

impl Range {
    pub const ALL: Range = Range { from: 0, to: BUCKETS };

    pub fn overlaps(&self, other: &Range) -> bool {
        self.from < other.to && other.from < self.to
    }
}

/// What is wrong with the buckets that an experiment is to own.
pub fn check_ranges(ranges: &[Range]) -> Result<(), &'static str> {
    if ranges.is_empty() || ranges.len() > RANGES_MAX {
        return Err("an experiment owns between 1 and 64 ranges of buckets");
    }
    if ranges.iter().any(|range| range.from >= range.to || range.to > BUCKETS) {
        return Err("a range of buckets goes from one number to a greater one, at most 10000");
    }
    let overlap = |(at, range): (usize, &Range)| ranges[..at].iter().any(|before| before.overlaps(range));
    if ranges.iter().enumerate().any(overlap) {
        return Err("ranges of buckets of one experiment may not overlap");
    }
    Ok(())
}

/// The part of a layer's units that one experiment has, and its order of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Its salt too: a layer never changes its buckets.
    pub layer: String,
    /// Orders the buckets; another experiment's seed gives another order.
    pub seed: String,
    pub ranges: Vec<Range>,
}

/// Where a unit stands in an experiment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Of the units that no experiment touches.
    HeldOut,
    /// Of the layer's units that this experiment does not own.
    Elsewhere,
    Champion,
    Challenger,
}

/// The units that are kept out of all experiments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdout {
    /// Random, so that it is no layer's.
    pub salt: Salt,
    pub buckets: u16,
}

impl Holdout {
    pub fn holds(&self, unit: &[KeyPart<'_>]) -> bool {
        self.buckets > 0 && place(self.salt.as_str(), unit).bucket < self.buckets
    }
}

/// An experiment, ready to be asked of units: 20 kB and a hash per question.
#[derive(Debug, Clone)]
pub struct Ramp {
    layer: String,
    /// By bucket; `NOT_OWNED` for others' buckets.
    ranks: Box<[u16]>,
    owned: u16,
    holdout: Option<Holdout>,
}

const NOT_OWNED: u16 = u16::MAX;

impl Ramp {
    /// Buckets outside the layer, and such as are named twice, are passed over: whoever writes a `Traffic` checks it.
    pub fn new(traffic: &Traffic, holdout: Option<&Holdout>) -> Ramp {
        let mut owned: Vec<u16> =
            (0..BUCKETS).filter(|bucket| traffic.ranges.iter().any(|r| (r.from..r.to).contains(bucket))).collect();
        // Fisher and Yates, from the last place to the first; the word for a place is that of SplitMix64 after as many
        // steps.
        let [mut state, _] = words(parts(&["coeval-order-1", &traffic.seed]));
        for place in (1..owned.len()).rev() {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            owned.swap(place, below(mix(state), place as u64 + 1) as usize);
        }
        let mut ranks = vec![NOT_OWNED; usize::from(BUCKETS)];
        for (rank, bucket) in owned.iter().enumerate() {
            ranks[usize::from(*bucket)] = rank as u16;
        }
        Ramp { layer: traffic.layer.clone(), ranks: ranks.into(), owned: owned.len() as u16, holdout: holdout.cloned() }
    }

    /// The same order with other units held out.
    pub fn with_holdout(&self, holdout: Option<&Holdout>) -> Ramp {
        Ramp { holdout: holdout.cloned(), ..self.clone() }
    }

    /// How many of the owned buckets the challenger has at a share of 10,000.
    pub fn challengers(&self, share: u16) -> u16 {
        let (share, owned) = (u32::from(share.min(BUCKETS)), u32::from(self.owned));
        // Up, so that no step is empty.
        (share * owned).div_ceil(u32::from(BUCKETS)) as u16
    }

    pub fn owned(&self) -> u16 {
        self.owned
    }

    /// The rank of a bucket in the experiment's order, if it owns it.
    pub fn rank(&self, bucket: u16) -> Option<u16> {
        self.ranks.get(usize::from(bucket)).copied().filter(|rank| *rank != NOT_OWNED)
    }

    /// Where a unit comes in the experiment's order; none of what is held out or not owned.
    pub fn place_of(&self, unit: &[KeyPart<'_>]) -> Option<u16> {
        let held_out = self.holdout.as_ref().is_some_and(|holdout| holdout.holds(unit));
        if held_out { None } else { self.rank(place(&self.layer, unit).bucket) }
    }

    pub fn standing_of_bucket(&self, bucket: u16, share: u16) -> Standing {
        match self.rank(bucket) {
            None => Standing::Elsewhere,
            Some(rank) if rank < self.challengers(share) => Standing::Challenger,
            Some(_) => Standing::Champion,
        }
    }

    /// Where a unit stands when the challenger has a share of 10,000.
    pub fn assign(&self, unit: &[KeyPart<'_>], share: u16) -> (Standing, Placed) {
        let placed = place(&self.layer, unit);
        if self.holdout.as_ref().is_some_and(|holdout| holdout.holds(unit)) {
            return (Standing::HeldOut, placed);
        }
        (self.standing_of_bucket(placed.bucket, share), placed)
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Which gateway counts the units of which bucket, so that each is counted at one place. When a gateway comes or goes, only
/// its own buckets move (rendezvous hashing, Thaler and Ravishankar 1998).
#[derive(Debug, Clone)]
pub struct Homes {
    /// By bucket, whether it is mine.
    mine: Box<[bool]>,
}

impl Homes {
    pub fn new(me: &Incarnation, live: &BTreeSet<Incarnation>) -> Homes {
        let seed = |gateway: &Incarnation| words(parts(&["coeval-home-1", gateway.as_str()]))[0];
        let weight = |seed: u64, bucket: u16| mix(seed ^ mix(u64::from(bucket).wrapping_add(0x9e37_79b9_7f4a_7c15)));
        let my_seed = seed(me);
        let others: Vec<(u64, &Incarnation)> =
            live.iter().filter(|other| *other != me).map(|other| (seed(other), other)).collect();
        let mine = (0..BUCKETS).map(|bucket| {
            let my_weight = (weight(my_seed, bucket), me);
            others.iter().all(|(seed, other)| (weight(*seed, bucket), *other) < my_weight)
        });
        Homes { mine: mine.collect() }
    }

    pub fn is_mine(&self, bucket: u16) -> bool {
        self.mine.get(usize::from(bucket)).copied().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(seed: &str, ranges: &[(u16, u16)]) -> Traffic {
        let ranges = ranges.iter().map(|(from, to)| Range { from: *from, to: *to }).collect();
        Traffic { layer: "delay".into(), seed: seed.into(), ranges }
    }

    /// Computed by `hashlib`, as the module's documentation says how.
    #[test]
    fn units_fall_where_other_languages_say() {
        #[track_caller]
        fn check(salt: &str, unit: &[KeyPart<'_>], bucket: u16, number: u64) {
            assert_eq!(place(salt, unit), Placed { bucket, unit: number });
        }
        check("delay", &[KeyPart::Text("N14228")], 6835, 0x9e9c_6b03_d9c4_fa8b);
        check("delay", &[KeyPart::Text("N24211")], 5188, 0x6299_220f_e314_cf0b);
        check("delay", &[KeyPart::Text("JFK"), KeyPart::Text("LAX")], 4497, 0xf691_9c49_b379_f4e2);
        check("", &[], 1398, 0x77a0_30bd_9ef1_f902);
        check("layer/ü", &[KeyPart::Integer(i64::MIN)], 8317, 0x25ba_445c_a71c_2f0a);
        check("delay", &[KeyPart::Boolean(true), KeyPart::Binary(&[0, 255])], 5036, 0xc2e3_3785_f406_c098);
        check("delay", &[KeyPart::Text("")], 5164, 0xed39_4017_7b01_b215);
    }

    #[test]
    fn buckets_are_even_and_layers_independent() {
        let mut counts = vec![0_u32; usize::from(BUCKETS)];
        let mut both = 0;
        for unit in 0..200_000 {
            let unit = [KeyPart::Integer(unit)];
            let (first, second) = (place("one", &unit), place("two", &unit));
            counts[usize::from(first.bucket)] += 1;
            both += u32::from(first.bucket < 1_000 && second.bucket < 1_000);
        }
        // Chi-squared with 9,999 degrees of freedom: 10,000 ± 5 deviations of 141.
        let chi: f64 = counts.iter().map(|count| (f64::from(*count) - 20.0).powi(2) / 20.0).sum();
        assert!((9_300.0..10_700.0).contains(&chi), "{chi}");
        assert!((1_780..2_220).contains(&both), "{both}");
    }

    #[test]
    fn parts_of_a_key_do_not_run_together() {
        let text = |parts: &[&'static str]| parts.iter().copied().map(KeyPart::Text).collect::<Vec<_>>();
        assert_ne!(place("s", &text(&["JFK", "LAX"])).unit, place("s", &text(&["JFKL", "AX"])).unit);
        assert_ne!(place("s", &text(&["a"])).unit, place("sa", &text(&[])).unit);
        assert_eq!(place("s", &[KeyPart::Integer(-7)]), place("s", &text(&["-7"])));
    }

    #[test]
    fn a_ramp_only_adds_units() {
        let ramp = Ramp::new(&traffic("seed", &[(0, BUCKETS)]), None);
        let mut before = BTreeSet::new();
        for share in [1, 100, 500, 2_500, 5_000, 10_000] {
            let now: BTreeSet<u16> =
                (0..BUCKETS).filter(|bucket| ramp.standing_of_bucket(*bucket, share) == Standing::Challenger).collect();
            assert_eq!(now.len(), usize::from(share));
            assert!(before.is_subset(&now), "{share}");
            before = now;
        }
        // Another seed takes others.
        let other = Ramp::new(&traffic("other", &[(0, BUCKETS)]), None);
        let of = |ramp: &Ramp, bucket: u16| ramp.standing_of_bucket(bucket, 1_000) == Standing::Challenger;
        let shared = (0..BUCKETS).filter(|bucket| of(&ramp, *bucket) && of(&other, *bucket)).count();
        assert!((50..150).contains(&shared), "{shared}");
    }

    #[test]
    fn experiments_of_one_layer_share_no_unit_and_holdouts_are_in_none() {
        let holdout = Holdout { salt: Salt::try_new("0a".repeat(32)).unwrap(), buckets: 500 };
        let first = Ramp::new(&traffic("1", &[(0, 3_000)]), Some(&holdout));
        let second = Ramp::new(&traffic("2", &[(3_000, 5_000), (9_000, 10_000)]), Some(&holdout));
        let mut counts = [0; 4];
        for unit in 0..20_000 {
            let unit = [KeyPart::Integer(unit)];
            let (one, two) = (first.assign(&unit, 5_000).0, second.assign(&unit, 5_000).0);
            assert_eq!(one == Standing::HeldOut, two == Standing::HeldOut);
            assert!(one == Standing::HeldOut || one == Standing::Elsewhere || two == Standing::Elsewhere);
            counts[one as usize] += 1;
        }
        let [held_out, elsewhere, champion, challenger] = counts;
        assert!((850..1_150).contains(&held_out) && (12_900..13_700).contains(&elsewhere), "{counts:?}");
        assert!((2_650..3_050).contains(&champion) && (2_650..3_050).contains(&challenger), "{counts:?}");
        assert_eq!((first.challengers(100), second.challengers(100), first.challengers(1)), (30, 30, 1));
    }

    #[test]
    fn ranges_are_checked() {
        let ranges = |ranges: &[(u16, u16)]| check_ranges(&traffic("", ranges).ranges);
        assert_eq!(ranges(&[(0, BUCKETS)]), Ok(()));
        assert_eq!(ranges(&[(5_000, 6_000), (0, 100)]), Ok(()));
        for wrong in [&[][..], &[(5, 5)], &[(0, 10_001)], &[(0, 10), (9, 20)]] {
            assert!(ranges(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn every_bucket_has_one_home_and_keeps_it_while_its_gateway_lives() {
        let gateway = |name: &str| Incarnation::try_new(name).unwrap();
        let live: BTreeSet<Incarnation> = ["g1", "g2", "g3"].map(gateway).into();
        let homes =
            |live: &BTreeSet<Incarnation>| -> Vec<Homes> { live.iter().map(|me| Homes::new(me, live)).collect() };
        let all = homes(&live);
        let fewer = homes(&["g1", "g2"].map(gateway).into());
        let mut counts = [0; 3];
        for bucket in 0..BUCKETS {
            let home: Vec<usize> = (0..3).filter(|gateway| all[*gateway].is_mine(bucket)).collect();
            assert_eq!(home.len(), 1, "{bucket}");
            counts[home[0]] += 1;
            assert!(home[0] == 2 || fewer[home[0]].is_mine(bucket), "{bucket}");
        }
        assert!(counts.iter().all(|count| (3_000..3_700).contains(count)), "{counts:?}");
    }
}
